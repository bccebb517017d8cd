"""What setup.py wrote about the CUDA extension of this copy of the package."""

import json
from pathlib import Path
from typing import Any

__all__ = ["read_build_record"]

BUILD_RECORD = Path(__file__).with_name("_build.json")


def read_build_record() -> dict[str, Any]:
    """What setup.py wrote when it built the CUDA extension of this copy of the package.

    Returns:
        `built` (bool); if true `archs` (["sm_90a", ...]), `nvcc`, `nvcc_version`, `host_compiler`
        and `sources`, else `reason`: what was missing and how to get it.
    """
    if not BUILD_RECORD.exists():
        reason = f"{BUILD_RECORD.parent} was never built: run `pip install .` or `make test` there."
        return {"built": False, "reason": reason}
    record: dict[str, Any] = json.loads(BUILD_RECORD.read_text())
    return record
