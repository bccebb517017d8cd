"""Programs of tests that run kernels in Triton's interpreter: TRITON_INTERPRET=1 has to be set
before Triton is imported, so each is a child process."""

import os
import subprocess
import sys

import pytest

from tests.support import ROOT


def run_interpreted(module: str) -> list[str]:
    """The lines that `python -m module` prints, which has to end well."""
    pytest.importorskip("triton")
    numpy = pytest.importorskip("numpy").__version__
    if tuple(map(int, numpy.split(".")[:2])) > (2, 3):
        pytest.skip(f"numpy {numpy}: Triton 3.6's interpreter needs 2.3 or older")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout.splitlines()
