"""Options of the grouped products, and which implementation they mean."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .operator import Options, device_facts, has_triton

__all__ = ["GroupedOptions", "runs_triton"]


@dataclass(frozen=True)
class GroupedOptions(Options):
    """As in `grouped_mlp`."""

    num_sms: int  # 0 = all
    implementation: str
    take_over: bool = False


def runs_triton(tensor: torch.Tensor, implementation: str) -> bool:
    """Whether the grouped GEMMs run as Triton kernels on `tensor`.

    Raises:
        ValueError, TypeError: implementation="triton", and they cannot.
    """
    if implementation == "reference":
        return False
    if tensor.is_cuda:
        fits = device_facts(tensor.device)[1] >= (9, 0)
        if implementation == "auto":
            return fits and tensor.dtype == torch.bfloat16 and has_triton()
        if not fits:
            raise ValueError(
                f"implementation='triton' needs TMA, compute capability 9.0: {tensor.device} has "
                f"{device_facts(tensor.device)[1]}; pass implementation='auto'"
            )
        if tensor.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"implementation='triton' takes bfloat16 or float16 on a GPU, rows are "
                f"{tensor.dtype}: pass implementation='auto'"
            )
        return True
    if implementation == "auto":
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    raise ValueError(
        f"implementation='triton' needs a GPU, rows are on {tensor.device}: pass "
        "implementation='auto', or set TRITON_INTERPRET=1 to run Triton's interpreter"
    )
