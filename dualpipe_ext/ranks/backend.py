"""Which backend an exchange uses, and what keeps the faster one from running."""

from __future__ import annotations

import torch

from ..build_record import read_build_record

__all__ = ["MAX_RANKS", "choose_backend"]

MAX_RANKS = 8  # one NVLink domain
KERNEL_CAPABILITIES = ((9, 0), (10, 0))  # Hopper and Blackwell: the cubins are built for these


def choose_backend(backend: str, device: torch.device, world_size: int) -> tuple[str, str]:
    """Which backend this process would use, and why.

    Args:
        backend: "auto", "nvlink" or "reference".
        device: where the tokens are.
        world_size: P, ranks of the expert group.

    Returns:
        The name, "nvlink" or "reference", and the reason in plain words.

    Raises:
        ValueError: the name is unknown, or "nvlink" was asked for and cannot run here.
    """
    if backend not in ("auto", "nvlink", "reference"):
        raise ValueError(f'backend={backend!r}: choose "auto", "nvlink" or "reference"')
    if backend == "reference":
        return "reference", "asked for"
    obstacle = _nvlink_obstacle(torch.device(device), world_size)
    if obstacle is None:
        return "nvlink", "asked for" if backend == "nvlink" else "all GPUs reach each other"
    if backend == "nvlink":
        raise ValueError(f'backend="nvlink" cannot run here: {obstacle}, or use backend="auto"')
    return "reference", obstacle


def _nvlink_obstacle(device: torch.device, world_size: int) -> str | None:
    """What keeps the NVLink kernels from running, with the remedy; None if nothing does."""
    if device.type != "cuda":
        return f"the tokens are on {device.type}: move the model to a CUDA device"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: install a CUDA build of torch on a machine with a GPU"
    try:
        from .. import _C  # noqa: F401
    except ImportError as error:
        build = read_build_record()
        reason = f"{error}: reinstall it" if build["built"] else build["reason"]
        return f"the CUDA extension is missing ({reason})"
    if world_size > MAX_RANKS:
        return f"{world_size} ranks are more than {MAX_RANKS} in one NVLink domain: split the group"
    capability = torch.cuda.get_device_capability(device)
    if capability not in KERNEL_CAPABILITIES:
        return (
            f"compute capability {capability} is not one of {KERNEL_CAPABILITIES}: use such a GPU"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    for other in range(torch.cuda.device_count() if world_size > 1 else 0):
        if other != index and not torch.cuda.can_device_access_peer(index, other):
            return (
                f"GPU {index} has no peer access to GPU {other}: hide it with CUDA_VISIBLE_DEVICES"
            )
    return None
