"""Rows as fp8 e4m3 with one fp32 scale for 128 columns, as DeepSeek-V3 sends them (report, 3.3).

Every 128 columns of a row are stretched to e4m3's range, q = e4m3(x · (448 / amax)), and come back
as q · (amax / 448). With three mantissa bits a value moves by at most 1/16 of itself, or, where it
is far below its block's largest, by amax · 2⁻¹⁰ / 448.
"""

from __future__ import annotations

import torch

__all__ = ["BLOCK", "dequantize_rows", "quantize_rows"]

BLOCK = 128  # columns that share a scale; the last block of a row may have fewer
E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4  # a block of zeros still has a scale to divide by


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
    q = (padded * (largest / amax)).to(torch.float8_e4m3fn)
    return q.flatten(-2)[..., :hidden].contiguous(), (amax / largest).squeeze(-1)


def dequantize_rows(q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the receiver makes of `q` [..., H] and `scales`: [..., H] of `dtype`, rounded once."""
    scale = scales.repeat_interleave(BLOCK, -1)[..., : q.shape[-1]]
    return (q.float() * scale).to(dtype)
