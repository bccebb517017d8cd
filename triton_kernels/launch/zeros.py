"""Zeros on a GPU that are never freed. No Triton in it."""

from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["keep_zeros"]


def keep_zeros(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[count] zeros that any stream may read now.

    Made in a thread of its own: what the current one allocates may go to a pool of
    torch.compile's graphs, whose warm-up refuses tensors that stay.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=dtype, device=device)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_make, count, dtype, device).result()


def _make(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.cuda.device(device), torch.inference_mode(False):
        zeros = torch.zeros(count, dtype=dtype, device=device)
        torch.cuda.current_stream().synchronize()
    return zeros
