"""What a transformer block does between its matrix products: norm, rotary embedding, SwiGLU, fused.

    normed, x = rms_norm(y, weight, residual=x)     # x + y, and its norm
    q = rotary(q, cos, sin)                         # with cos, sin = rotary_tables(positions, D)
    act = swiglu(linear(x, w13))                    # silu(gate) * up, w13 being gate above up

Letters: T tokens in any number of dimensions, H their width; B sequences, S positions, N heads, D
width of a head or of an activation, M positions in a table.

On a GPU one Triton kernel each way, within `num_sms` SMs, counted at run time; elsewhere, and for
fp64, plain torch with the same meaning. Arithmetic is fp32 (fp64 for fp64) whatever the dtype.
Results have the same bits in every run and for every `num_sms`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operator import (
    check_num_sms,
    define,
    device_facts,
    sm_count,
    use_triton,
    wide,
    without_missing_kernels,
)

__all__ = ["rms_norm", "rotary", "rotary_", "rotary_tables", "swiglu"]


# ---- RMSNorm ----


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    num_sms: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm (arXiv 1910.07467) of ``x``, or of ``x + residual``; differentiable in all three.

    Args:
        x: [..., H] of a floating dtype.
        weight: [H] of any floating dtype.
        residual: like ``x``.
        eps: added to the mean of squares.
        num_sms: SMs that the kernels may take; None takes all.

    Returns:
        ``normed`` [..., H] in the dtype of ``x``; with a residual the pair of it and ``x +
        residual``, rounded to that dtype before it is normalised.

    Raises:
        TypeError: ``x`` is not floating, or ``residual`` of another dtype.
        ValueError: shapes that do not fit.
    """
    if not x.is_floating_point() or not weight.is_floating_point():
        raise TypeError(f"x is {x.dtype}, weight {weight.dtype}: pass floating-point tensors")
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight is {tuple(weight.shape)}, x {tuple(x.shape)}: pass one weight a column, "
            f"{tuple(x.shape[-1:])}"
        )
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual is {residual.dtype}, x {x.dtype}: pass one dtype")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual is {tuple(residual.shape)}, x {tuple(x.shape)}: pass one shape, the kernel "
            "does not broadcast"
        )
    sms = check_num_sms(num_sms)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    other = None if residual is None else residual.reshape(flat.shape)
    normed, hidden, _ = norm_operator(flat, other, weight, eps, sms)
    normed = normed.view(x.shape)
    return normed if residual is None else (normed, hidden.view(x.shape))


def _norm_kernels(x: Tensor, weight: Tensor):
    """The module of the kernels if they take these tensors."""
    if not use_triton(x, weight) or x.numel() == 0:
        return None
    from ..triton_kernels.elementwise import norm

    return norm if x.shape[1] <= norm.MAX_WIDTH else None


def _rows(x: Tensor | None) -> Tensor | None:
    """[T, H] with contiguous rows: a copy only if it must be."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def _rms_norm(x, residual, weight, eps, num_sms):
    kernels = _norm_kernels(x, weight)
    if kernels is None:
        math = wide(x.dtype)
        hidden = x if residual is None else (x.to(math) + residual.to(math)).to(x.dtype)
        rstd = (hidden.to(math).square().mean(dim=1) + eps).rsqrt()
        normed = (hidden.to(math) * rstd[:, None] * weight.to(math)).to(x.dtype).contiguous()
        return normed, x.new_empty(0) if residual is None else hidden.contiguous(), rstd
    normed, hidden, rstd = _rms_norm_fake(x, residual, weight, eps, num_sms)
    kernels.rms_norm(
        _rows(x),
        _rows(residual),
        weight.contiguous(),
        normed,
        None if residual is None else hidden,
        rstd,
        eps,
        num_sms=sm_count(x, num_sms),
    )
    return normed, hidden, rstd


def _rms_norm_fake(x, residual, weight, eps, num_sms):
    hidden = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), hidden, x.new_empty(x.shape[:1], dtype=wide(x.dtype))


def _rms_norm_backward(d_normed, d_hidden, hidden, weight, rstd, num_sms):
    kernels = _norm_kernels(hidden, weight)
    if kernels is None:
        math = wide(hidden.dtype)
        unit = hidden.to(math) * rstd[:, None]
        d_weight = (d_normed.to(math) * unit).sum(dim=0)
        slope = d_normed.to(math) * weight.to(math)
        dx = rstd[:, None] * (slope - unit * (slope * unit).mean(dim=1, keepdim=True))
        if d_hidden is not None:
            dx = dx + d_hidden.to(math)
        return dx.to(hidden.dtype).contiguous(), d_weight.to(weight.dtype)
    dx = hidden.new_empty(hidden.shape)
    d_weight = kernels.rms_norm_backward(
        _rows(d_normed),
        _rows(d_hidden),
        _rows(hidden),
        weight.contiguous(),
        rstd,
        dx,
        num_sms=sm_count(hidden, num_sms),
    )
    return dx, d_weight


def _rms_norm_backward_fake(d_normed, d_hidden, hidden, weight, rstd, num_sms):
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _save_norm(ctx, inputs, output):
    x, residual, weight, _, ctx.num_sms = inputs
    _, hidden, rstd = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(hidden if ctx.has_residual else x, weight, rstd)


def _norm_gradients(ctx, d_normed, d_hidden, _d_rstd):
    hidden, weight, rstd = ctx.saved_tensors
    if not ctx.has_residual:
        d_hidden = None
    if d_normed is None:  # only x + residual was used
        return d_hidden, d_hidden, None, None, None
    dx, d_weight = norm_backward_operator(d_normed, d_hidden, hidden, weight, rstd, ctx.num_sms)
    return dx, dx if ctx.has_residual else None, d_weight, None, None


norm_operator = define(
    "rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, int num_sms) "
    "-> (Tensor, Tensor, Tensor)",
    _rms_norm,
    _rms_norm_fake,
    _norm_gradients,
    _save_norm,
)
norm_backward_operator = define(
    "rms_norm_backward(Tensor d_normed, Tensor? d_hidden, Tensor hidden, Tensor weight, "
    "Tensor rstd, int num_sms) -> (Tensor, Tensor)",
    _rms_norm_backward,
    _rms_norm_backward_fake,
)


# ---- Rotary embedding ----


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
    places = _check_rotary(x, cos, sin, positions)
    how = (interleaved, False, check_num_sms(num_sms))
    return _turned(_four(x), cos, sin, places, *how).view(x.shape)


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
    places = _check_rotary(x, cos, sin, positions)
    how = (interleaved, check_num_sms(num_sms))
    return _RotaryInPlace.apply(x, cos, sin, places, *how)


class _RotaryInPlace(torch.autograd.Function):
    """Mutating operators cannot register a gradient."""

    @staticmethod
    def forward(ctx, x, cos, sin, positions, interleaved, num_sms):
        _turned_(_four(x), cos, sin, positions, interleaved, False, num_sms)
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin, positions)
        ctx.how = (interleaved, num_sms)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        cos, sin, positions = ctx.saved_tensors
        interleaved, num_sms = ctx.how
        arguments = (cos, sin, positions, interleaved, True, num_sms)
        dx = _turned(_four(dy), *arguments).view(dy.shape)
        return dx, None, None, None, None, None


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


def _turn(x, cos, sin, positions, interleaved, inverse, y):
    """The meaning, in plain torch: y [B, S, N, D] from x, which may be y."""
    math = wide(x.dtype)
    S, M = x.shape[1], cos.shape[0]
    if positions is None:
        cos, sin = cos[None, :S], sin[None, :S]
    else:
        unknown = ((positions < 0) | (positions >= M)).unsqueeze(-1)
        places = positions.clamp(0, max(M - 1, 0)).long()
        cos, sin = (table[places].masked_fill(unknown, torch.nan) for table in (cos, sin))
    cos, sin = cos.to(math).unsqueeze(2), sin.to(math).unsqueeze(2)  # [B or 1, S, 1, D / 2]
    sin = -sin if inverse else sin
    pairs = x.to(math)
    a, b = pairs.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else pairs.chunk(2, dim=-1)
    turned = (a * cos - b * sin, a * sin + b * cos)
    y.copy_(torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, dim=-1))


@without_missing_kernels
def rotate_into(x, cos, sin, positions, interleaved, inverse, num_sms, y):
    if x.numel() == 0:
        return
    if not use_triton(x):
        _turn(x, cos, sin, positions, interleaved, inverse, y)
        return
    from ..triton_kernels.elementwise import rotary as kernels

    if x.shape[-1] > kernels.MAX_WIDTH:
        _turn(x, cos, sin, positions, interleaved, inverse, y)
        return
    if x.stride(-1) != 1:
        # Turned in a copy; the caller's x follows.
        copy = x.contiguous()
        rotate_into(copy, cos, sin, positions, interleaved, inverse, num_sms, copy)
        y.copy_(copy)
        return
    kernels.rotary(
        x,
        y,
        cos.contiguous(),
        sin.contiguous(),
        None if positions is None else positions.contiguous(),
        interleaved=interleaved,
        inverse=inverse,
        num_sms=sm_count(x, num_sms),
    )


def _rotary(x, cos, sin, positions, interleaved, inverse, num_sms):
    y = x.new_empty(x.shape)
    rotate_into(x, cos, sin, positions, interleaved, inverse, num_sms, y)
    return y


def _rotary_fake(x, cos, sin, positions, interleaved, inverse, num_sms):
    return x.new_empty(x.shape)


def _rotary_in_place(x, cos, sin, positions, interleaved, inverse, num_sms):
    rotate_into(x, cos, sin, positions, interleaved, inverse, num_sms, x)


def _save_rotary(ctx, inputs, output):
    _, cos, sin, positions, ctx.interleaved, ctx.inverse, ctx.num_sms = inputs
    ctx.save_for_backward(cos, sin, positions)


def _rotary_gradient(ctx, dy):
    cos, sin, positions = ctx.saved_tensors
    how = (ctx.interleaved, not ctx.inverse, ctx.num_sms)
    dx = _turned(dy, cos, sin, positions, *how)
    return dx, None, None, None, None, None, None


_ROTARY = "Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse, int num_sms"
_turned = define(
    f"rotary(Tensor x, {_ROTARY}) -> Tensor", _rotary, _rotary_fake, _rotary_gradient, _save_rotary
)
_turned_ = define(
    f"rotary_(Tensor(a!) x, {_ROTARY}) -> ()", _rotary_in_place, lambda *arguments: None
)


# ---- SwiGLU ----


def swiglu(gate_up: Tensor, *, num_sms: int | None = None) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), rounded once; differentiable.

    Args:
        gate_up: [..., 2D] of a floating dtype, gate in front of up. The kernels take multiples of 8
            for D, plain torch any other.
        num_sms: SMs that the kernels may take; None takes all.

    Returns:
        [..., D] in the dtype of ``gate_up``.

    Raises:
        TypeError: ``gate_up`` is not floating.
        ValueError: its width is odd.
    """
    if not gate_up.is_floating_point():
        raise TypeError(f"gate_up is {gate_up.dtype}: pass a floating-point tensor")
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up is {tuple(gate_up.shape)}: pass an even last dimension, 2D for a gate and an "
            "up of width D"
        )
    *outer, width = gate_up.shape
    flat = gate_up.reshape(gate_up.shape[:-1].numel(), width)
    return _activated(flat, check_num_sms(num_sms)).view(*outer, width // 2)


def _swiglu_kernels(gate_up: Tensor):
    """The module of the kernels if they take this tensor."""
    if not use_triton(gate_up) or gate_up.numel() == 0 or gate_up.shape[1] % 16:
        return None
    if gate_up.is_cuda and device_facts(gate_up.device)[1][0] not in (9, 10):
        return None  # 144 KB of shared memory are more than others have
    from ..triton_kernels.elementwise import swiglu

    return swiglu


def _swiglu(gate_up, num_sms):
    kernels = _swiglu_kernels(gate_up)
    if kernels is None:
        gate, up = gate_up.to(wide(gate_up.dtype)).chunk(2, dim=1)
        return (gate * gate.sigmoid() * up).to(gate_up.dtype).contiguous()
    act = _swiglu_fake(gate_up, num_sms)
    kernels.swiglu(kernels.vectors(gate_up), act, num_sms=sm_count(gate_up, num_sms))
    return act


def _swiglu_fake(gate_up, num_sms):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _swiglu_backward(dy, gate_up, num_sms):
    kernels = _swiglu_kernels(gate_up)
    if kernels is None:
        math = wide(gate_up.dtype)
        dy, (gate, up) = dy.to(math), gate_up.to(math).chunk(2, dim=1)
        s = gate.sigmoid()
        d_gate, d_up = dy * up * (s + gate * s * (1 - s)), dy * gate * s
        return torch.cat((d_gate, d_up), dim=1).to(gate_up.dtype).contiguous()
    d_gate_up = gate_up.new_empty(gate_up.shape)
    rows = kernels.vectors(dy), kernels.vectors(gate_up)
    kernels.swiglu_backward(*rows, d_gate_up, num_sms=sm_count(gate_up, num_sms))
    return d_gate_up


def _swiglu_backward_fake(dy, gate_up, num_sms):
    return gate_up.new_empty(gate_up.shape)


def _save_swiglu(ctx, inputs, output):
    gate_up, ctx.num_sms = inputs
    ctx.save_for_backward(gate_up)


def _swiglu_gradient(ctx, dy):
    return _activated_backward(dy, *ctx.saved_tensors, ctx.num_sms), None


_activated = define(
    "swiglu(Tensor gate_up, int num_sms) -> Tensor",
    _swiglu,
    _swiglu_fake,
    _swiglu_gradient,
    _save_swiglu,
)
_activated_backward = define(
    "swiglu_backward(Tensor dy, Tensor gate_up, int num_sms) -> Tensor",
    _swiglu_backward,
    _swiglu_backward_fake,
)
