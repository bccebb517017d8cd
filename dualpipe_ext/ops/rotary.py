"""Rotary embedding: pairs of a head's numbers turned by an angle that grows with the position.

    q = rotary(q, cos, sin)     # with cos, sin = rotary_tables(positions, D)

Letters: B sequences, S positions, T positions of packed sequences, N heads, D width of a head, M
positions in a table.

On a GPU one Triton kernel each way, within `num_sms` SMs, counted at run time; elsewhere, and for
fp64, plain torch with the same meaning. Arithmetic is fp32 (fp64 for fp64) whatever the dtype.
Results have the same bits in every run and for every `num_sms`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operator import (
    Operator,
    Options,
    check_num_sms,
    sm_count,
    use_triton,
    wide,
    without_missing_kernels,
)

__all__ = ["RotaryOptions", "rotary", "rotary_", "rotary_tables", "rotate_into"]


def rotary_tables(
    positions: int | Tensor,
    width: int,
    *,
    base: float = 10_000.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin [M, D / 2] fp32 of the angles position · base^(−2i / D) (arXiv 2104.09864).

    Args:
        positions: M of them, counted from 0, or the positions themselves [M].
        width: D, even.
    """
    if width < 2 or width % 2:
        raise ValueError(
            f"width={width} has no pairs to turn: pass an even width, {width + width % 2 or 2}"
        )
    if isinstance(positions, int):
        positions = torch.arange(positions, device=device)
    # The angle in fp64: at position 10⁶ an fp32 product is off by 0.03.
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width
    angle = torch.outer(positions.double(), base**-exponent)
    return angle.cos().float(), angle.sin().float()


@dataclass(frozen=True)
class RotaryOptions(Options):
    """Which numbers make a pair, which way they turn, and the SMs of the kernel (0 = all)."""

    interleaved: bool = False
    inverse: bool = False
    num_sms: int = 0

    def inverted(self) -> RotaryOptions:
        return RotaryOptions(self.interleaved, not self.inverse, self.num_sms)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    num_sms: int | None = None,
) -> Tensor:
    """Every head of ``x`` with its pairs of numbers turned; differentiable in ``x``.

    Args:
        x: [B, S, N, D], or packed [T, N, D], of any strides; N counts query heads, key heads, or
            both side by side. A slice of a head, as in latent attention, is an ``x``, too.
        cos, sin: [M, D / 2] fp32, of :func:`rotary_tables`.
        positions: integers [B, S] or [T] on the device of ``x``; None counts from 0 in every
            sequence, and through all of a packed one. Outside of 0..M−1 the head becomes NaN.
        interleaved: a pair is (2i, 2i + 1), as in the paper, else (i, i + D / 2), as in Llama's
            published weights.
        num_sms: SMs that the kernel may take; None takes all.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes that do not fit.
    """
    positions = _check_rotary(x, cos, sin, positions)
    options = RotaryOptions(interleaved, False, check_num_sms(num_sms))
    return rotary_operator(_four(x), cos, sin, positions, options).view(x.shape)


def rotary_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    num_sms: int | None = None,
) -> Tensor:
    """:func:`rotary` in place, on a slice of a larger tensor, too; returns ``x``."""
    positions = _check_rotary(x, cos, sin, positions)
    options = RotaryOptions(interleaved, False, check_num_sms(num_sms))
    return _RotaryInPlace.apply(x, cos, sin, positions, options)


class _RotaryInPlace(torch.autograd.Function):
    """Mutating operators cannot register a gradient."""

    @staticmethod
    def forward(ctx, x, cos, sin, positions, options):
        rotary_in_place_operator(_four(x), cos, sin, positions, options)
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin, positions)
        ctx.options = options
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        dx = rotary_operator(_four(dy), *ctx.saved_tensors, ctx.options.inverted())
        return dx.view(dy.shape), None, None, None, None


def _four(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x.unsqueeze(0)


def _check_rotary(x, cos, sin, positions) -> Tensor | None:
    """Checks the arguments; the positions as [B, S]."""
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}: pass a floating-point tensor")
    if x.dim() not in (3, 4):
        raise ValueError(f"x has {x.dim()} dimensions: pass [B, S, N, D] or packed [T, N, D]")
    B, S, _, D = _four(x).shape
    if D % 2 or cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] * 2 != D:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit heads of width {D}: "
            f"pass [M, {D // 2}] and an even width, as from rotary_tables(M, {D + D % 2})"
        )
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise TypeError(f"cos is {cos.dtype}, sin {sin.dtype}: pass torch.float32 tables")
    if positions is None:
        if cos.shape[0] < S:
            raise ValueError(
                f"the tables have {cos.shape[0]} positions, x {S}: make longer ones, "
                f"rotary_tables({S}, {D})"
            )
        return None
    if positions.is_floating_point() or positions.shape != x.shape[:-2]:
        raise ValueError(
            f"positions are {positions.dtype} {tuple(positions.shape)}: pass integers "
            f"{tuple(x.shape[:-2])}, one a token"
        )
    return positions.reshape(B, S)


def _turned(x, cos, sin, positions, options: RotaryOptions) -> Tensor:
    """The meaning, in plain torch: x [B, S, N, D] turned, not rounded yet."""
    math = wide(x.dtype)
    S, M = x.shape[1], cos.shape[0]
    if positions is None:
        cos, sin = cos[None, :S], sin[None, :S]
    else:
        unknown = ((positions < 0) | (positions >= M)).unsqueeze(-1)
        rows = positions.clamp(0, max(M - 1, 0)).long()
        cos, sin = (table[rows].masked_fill(unknown, torch.nan) for table in (cos, sin))
    cos, sin = cos.to(math).unsqueeze(2), sin.to(math).unsqueeze(2)  # [B or 1, S, 1, D / 2]
    sin = -sin if options.inverse else sin
    pairs = x.to(math)
    if options.interleaved:
        a, b = pairs.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    a, b = pairs.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@without_missing_kernels
def rotate_into(x, cos, sin, positions, options: RotaryOptions, y) -> None:
    """y [B, S, N, D] from x, which may be y."""
    if x.numel() == 0:
        return
    if not use_triton(x):
        y.copy_(_turned(x, cos, sin, positions, options))
        return
    from ..triton_kernels.elementwise import rotary as kernels

    if x.shape[-1] > kernels.MAX_WIDTH:
        y.copy_(_turned(x, cos, sin, positions, options))
        return
    if x.stride(-1) != 1:
        # Turned in a copy; the caller's x follows.
        copy = x.contiguous()
        rotate_into(copy, cos, sin, positions, options, copy)
        y.copy_(copy)
        return
    kernels.rotary(
        x,
        y,
        cos.contiguous(),
        sin.contiguous(),
        None if positions is None else positions.contiguous(),
        interleaved=options.interleaved,
        inverse=options.inverse,
        num_sms=sm_count(x, options.num_sms),
    )


_TABLES = "Tensor cos, Tensor sin, Tensor? positions"


class _RotaryOperator:
    """x [B, S, N, D] turned."""

    @staticmethod
    def forward(x, cos, sin, positions, options):
        y = x.new_empty(x.shape)
        rotate_into(x, cos, sin, positions, options, y)
        return y

    @staticmethod
    def fake(x, cos, sin, positions, options):
        return x.new_empty(x.shape)

    @staticmethod
    def save(ctx, inputs, output):
        _, cos, sin, positions, ctx.options = inputs
        ctx.save_for_backward(cos, sin, positions)

    @staticmethod
    def backward(ctx, dy):
        return (rotary_operator(dy, *ctx.saved_tensors, ctx.options.inverted()),)


rotary_operator = Operator(
    f"rotary(Tensor x, {_TABLES}, {RotaryOptions.schema()}) -> Tensor",
    _RotaryOperator,
    RotaryOptions,
)


class _RotaryInPlaceOperator:
    """x [B, S, N, D] turned where it is."""

    @staticmethod
    def forward(x, cos, sin, positions, options):
        rotate_into(x, cos, sin, positions, options, x)


rotary_in_place_operator = Operator(
    f"rotary_(Tensor(a!) x, {_TABLES}, {RotaryOptions.schema()}) -> ()",
    _RotaryInPlaceOperator,
    RotaryOptions,
)
