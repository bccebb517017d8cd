"""Rows as fp8 e4m3 with one fp32 scale for 128 columns, as DeepSeek-V3 sends them (report, 3.3).

Every 128 columns of a row are stretched to e4m3's range, q = e4m3(x · (448 / amax)), and come back
as q · (amax / 448). With three mantissa bits a value moves by at most 1/16 of itself, or, where it
is far below its block's largest, by amax · 2⁻¹⁰ / 448.
"""

from __future__ import annotations

import torch

from ..errors import KernelCompileError
from ..triton_kernels.elementwise.fp8 import BLOCK, E4M3_MAX, SMALLEST_AMAX
from ..triton_kernels.launch import available
from .operator import device_facts, has_gluon

__all__ = [
    "BLOCK",
    "E4M3",
    "E4M3_MAX",
    "SMALLEST_AMAX",
    "dequantize_rows",
    "quantize_rows",
    "runs_fp8_kernels",
]

E4M3 = torch.float8_e4m3fn


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows to fp8.

    Args:
        x: [..., H] of a floating-point type.

    Returns:
        q [..., H] ``float8_e4m3fn`` and scales [..., ceil(H / 128)] fp32; x ≈ q · its scale.
    """
    hidden, blocks = x.shape[-1], -(-x.shape[-1] // BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, blocks * BLOCK - hidden))
    padded = padded.unflatten(-1, (blocks, BLOCK))
    amax = padded.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX)
    largest = torch.full_like(amax, E4M3_MAX)  # torch multiplies by a scalar's reciprocal instead
    q = (padded * (largest / amax)).to(E4M3)
    return q.flatten(-2)[..., :hidden].contiguous(), (amax / largest).squeeze(-1)


def dequantize_rows(q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the receiver makes of `q` [..., H] and `scales`: [..., H] of `dtype`, rounded once."""
    scale = scales.repeat_interleave(BLOCK, -1)[..., : q.shape[-1]]
    return (q.float() * scale).to(dtype)


def runs_fp8_kernels(tensor: torch.Tensor, implementation: str) -> bool:
    """Whether fp8 products of bf16 weights run as kernels on `tensor`.

    Raises:
        KernelCompileError, ValueError: implementation="triton", and they cannot.
    """
    if implementation == "reference":
        return False
    fits = tensor.is_cuda and tensor.dtype == torch.bfloat16
    fits = fits and device_facts(tensor.device)[1][0] == 9
    if fits and not has_gluon():
        if implementation == "triton":
            reason = available.first_failure() or "Triton is missing or too old"
            raise KernelCompileError(f"{reason}: pass implementation='auto'", is_gluon=True)
        return False
    if implementation == "triton" and not fits:
        raise ValueError(
            f"implementation='triton' with precision='fp8' takes bfloat16 weights on a Hopper GPU "
            f"(compute capability 9.0), these are {tensor.dtype} on {tensor.device}: pass "
            "implementation='auto'"
        )
    return fits
