"""What this installation and this machine offer: versions, GPUs, built extension, backend."""

import ctypes
import importlib
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .build_record import read_build_record
from .compat import TORCH, TRITON, triton_version
from .ranks.backend import choose_backend

__all__ = ["describe_environment", "format_environment"]


def describe_environment() -> dict[str, Any]:
    """Everything `dualpipe-ext info` shows, as plain data. Needs no GPU and raises nothing.

    Returns:
        package      version, path
        python       version
        torch        version; cuda: the CUDA runtime that it was built for; nccl: versions or null
        triton       version or null
        unchecked    a line, with the remedy, for each of the two that this package was not run with
        driver       version of the NVIDIA driver; cuda: the newest CUDA it runs; null without one
        gpus         a list of index, name, capability "9.0", sms, memory_bytes
        peer_access  [i][j] is true if GPU i can address the memory of GPU j
        build        see read_build_record; importable: whether `_C` loads, error: why it does not
        backend      name: what backend="auto" chooses over all GPUs of this machine, reason
    """
    problems = TORCH.problem(torch.__version__), TRITON.problem(triton_version())
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "package": {"version": __version__, "path": str(Path(__file__).parent)},
        "python": platform.python_version(),
        "torch": {
            "version": str(torch.__version__),
            "cuda": torch.version.cuda,
            "nccl": _nccl_version(),
        },
        "triton": triton_version(),
        "unchecked": [line for line in problems if line is not None],
        "driver": {"version": _driver_version(), "cuda": _driver_cuda_version()},
        "gpus": [_describe_gpu(index) for index in range(count)],
        "peer_access": [[_can_access(i, j) for j in range(count)] for i in range(count)],
        "build": read_build_record() | _try_extension(),
        "backend": _choose_backend(max(1, count)),
    }


def format_environment(found: dict[str, Any]) -> str:
    """The result of describe_environment as lines for people."""
    torch_, driver, build, backend = (found[k] for k in ("torch", "driver", "build", "backend"))
    lines = [
        ("dualpipe_ext", f"{found['package']['version']} in {found['package']['path']}"),
        ("Python", found["python"]),
        ("torch", f"{torch_['version']}, built for CUDA {torch_['cuda'] or '(none)'}"),
        ("Triton", found["triton"] or "not installed"),
        *(("unchecked", line) for line in found["unchecked"]),
        ("NCCL", torch_["nccl"] or "not in this torch"),
        ("driver", f"{driver['version'] or 'none'}, runs CUDA up to {driver['cuda'] or '(none)'}"),
        ("GPUs", "" if found["gpus"] else "none that torch sees"),
        *((f"  {gpu['index']}", _format_gpu(gpu)) for gpu in found["gpus"]),
        ("peer access", "" if found["peer_access"] else "no GPUs"),
        *((f"  {i}", _format_peers(row)) for i, row in enumerate(found["peer_access"])),
        ("extension", _format_build(build)),
        ("backend", f"{backend['name']}: {backend['reason']}"),
    ]
    return "\n".join(f"{name:<13} {text}".rstrip() for name, text in lines)


def _format_gpu(gpu: dict[str, Any]) -> str:
    memory = gpu["memory_bytes"] / 2**30
    return f"{gpu['name']}, sm {gpu['capability']}, {gpu['sms']} SMs, {memory:.0f} GiB"


def _format_peers(row: list[bool]) -> str:
    return "reaches " + (", ".join(str(j) for j, reached in enumerate(row) if reached) or "none")


def _format_build(build: dict[str, Any]) -> str:
    if not build["built"]:
        return f"not built: {build['reason']}"
    text = f"built for {', '.join(build['archs'])} with nvcc {build['nvcc_version']}"
    return text if build["importable"] else f"{text}, but does not load: {build['error']}"


def _nccl_version() -> str | None:
    try:
        return ".".join(str(part) for part in torch.cuda.nccl.version())
    except (AttributeError, RuntimeError):  # torch built without NCCL
        return None


def _driver_version() -> str | None:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(shown.stdout.split()), None)


def _driver_cuda_version() -> str | None:
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except OSError:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _describe_gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def _can_access(i: int, j: int) -> bool:
    return i == j or torch.cuda.can_device_access_peer(i, j)


def _try_extension() -> dict[str, Any]:
    try:
        importlib.import_module("dualpipe_ext._C")
    except ImportError as error:
        return {"importable": False, "error": str(error)}
    return {"importable": True, "error": None}


def _choose_backend(world_size: int) -> dict[str, Any]:
    name, reason = choose_backend("auto", torch.device("cuda"), world_size)
    return {"name": name, "reason": reason}
