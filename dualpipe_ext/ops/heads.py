"""Attention heads out of their projections, turned by their positions, and back again.

    q, k, v = split_heads(qkv, kv_heads)   # rotary embedding of q and k on the way
    q = turn_tail(q, 64)                   # of a head's last numbers, as in latent attention

Letters: B sequences, S positions, N query heads, G key heads, D width of a head. Positions count
from 0 in every sequence; a pair is (i, i + D / 2). Each is one copy of its input on a GPU, where
slices, rotation and concatenation apart would be five or more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operator import define, is_observed
from .rotary import rotary_tables, rotate_into

__all__ = ["split_heads", "tables", "turn_tail"]


# By rows, width, base and device. Nothing leaves it: a CUDA graph may hold an address. Rows are a
# power of two, so that all lengths together take at most twice what the longest does.
_kept: dict[tuple, tuple[Tensor, Tensor]] = {}


def tables(positions: int, width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """`rotary_tables`, made once: cos and sin [S, D / 2] fp32.

    Whoever looks on (torch.compile, a fake mode) gets tables of its own, and so does a CUDA graph
    under capture where none are kept: only its replays would fill them.
    """
    if torch.compiler.is_compiling() or is_observed(()):
        return rotary_tables(positions, width, base=base, device=device)
    rows = 1 << max(positions - 1, 0).bit_length()
    key = (rows, width, base, device)
    found = _kept.get(key)
    if found is None:
        if _capturing(device):
            return rotary_tables(positions, width, base=base, device=device)
        # Inference tensors could not be saved for a backward later.
        with torch.inference_mode(False), torch.no_grad():
            found = rotary_tables(rows, width, base=base, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # any stream may read them now
        _kept[key] = found
    if rows == positions:
        return found
    with torch.inference_mode(False):
        return found[0][:positions], found[1][:positions]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def split_heads(
    qkv: Tensor, kv_heads: int, *, base: float = 10_000.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value heads, the first two with rotary embedding (arXiv 2104.09864).

    Args:
        qkv: [B, S, N + 2G, D], query heads first, then keys, then values; D even.
        kv_heads: G.

    Returns q [B, S, N, D], k and v [B, S, G, D], contiguous; differentiable. Raises ValueError.
    """
    _check_heads("qkv", qkv)
    if not 1 <= kv_heads <= (qkv.shape[2] - 1) // 2:
        raise ValueError(
            f"kv_heads={kv_heads} of {qkv.shape[2]} heads: pass at least 1, and twice that less "
            "than the heads in all, for keys and values, so that a query head is left"
        )
    cos, sin = tables(qkv.shape[1], qkv.shape[3], base, qkv.device)
    return _split_heads_operator(qkv, cos, sin, kv_heads)


def turn_tail(x: Tensor, width: int, *, base: float = 10_000.0) -> Tensor:
    """x [B, S, N, D] with rotary embedding of each head's last `width` numbers; differentiable.

    Raises ValueError.
    """
    _check_heads("x", x)
    if not 2 <= width <= x.shape[3] or width % 2:
        raise ValueError(
            f"width={width} of heads of {x.shape[3]} numbers: pass an even number from 2 to "
            f"{x.shape[3]}"
        )
    cos, sin = tables(x.shape[1], width, base, x.device)
    return _turn_tail_operator(x, cos, sin, False)


def _check_heads(name: str, x: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)}: pass floating-point [B, S, heads, D], one "
            "sequence as B = 1"
        )


def _turn(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, y: Tensor) -> None:
    rotate_into(x, cos, sin, None, False, inverse, 0, y)


def _split_heads(qkv, cos, sin, kv_heads):
    q, k, v = outputs = _split_heads_fake(qkv, cos, sin, kv_heads)
    parts = qkv.split([x.shape[2] for x in outputs], dim=2)
    _turn(parts[0], cos, sin, False, q)
    _turn(parts[1], cos, sin, False, k)
    v.copy_(parts[2])
    return outputs


def _split_heads_fake(qkv, cos, sin, kv_heads):
    B, S, heads, D = qkv.shape
    return tuple(qkv.new_empty(B, S, n, D) for n in (heads - 2 * kv_heads, kv_heads, kv_heads))


def _join_heads(dq, dk, dv, cos, sin):
    d_qkv = _join_heads_fake(dq, dk, dv, cos, sin)
    parts = d_qkv.split([x.shape[2] for x in (dq, dk, dv)], dim=2)
    _turn(dq, cos, sin, True, parts[0])
    _turn(dk, cos, sin, True, parts[1])
    parts[2].copy_(dv)
    return d_qkv


def _join_heads_fake(dq, dk, dv, cos, sin):
    B, S, N, D = dq.shape
    return dq.new_empty(B, S, N + 2 * dk.shape[2], D)


def _save_tables(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:3])


def _save_heads(ctx, inputs, output):
    ctx.shapes = [x.shape for x in output]
    _save_tables(ctx, inputs, output)


def _heads_gradient(ctx, *gradients):
    some = next(x for x in gradients if x is not None)
    given = zip(gradients, ctx.shapes, strict=True)
    dq, dk, dv = (some.new_zeros(shape) if x is None else x for x, shape in given)
    return _join_heads_operator(dq, dk, dv, *ctx.saved_tensors), None, None, None


def _turn_tail(x, cos, sin, inverse):
    y, width = x.new_empty(x.shape), 2 * cos.shape[1]
    y[..., :-width].copy_(x[..., :-width])
    _turn(x[..., -width:], cos, sin, inverse, y[..., -width:])
    return y


def _tail_gradient(ctx, dy):
    return _turn_tail_operator(dy, *ctx.saved_tensors, True), None, None, None


_split_heads_operator = define(
    "split_heads(Tensor qkv, Tensor cos, Tensor sin, int kv_heads) -> (Tensor, Tensor, Tensor)",
    _split_heads,
    _split_heads_fake,
    _heads_gradient,
    _save_heads,
)
_join_heads_operator = define(
    "join_heads(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor",
    _join_heads,
    _join_heads_fake,
)
_turn_tail_operator = define(
    "turn_tail(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    _turn_tail,
    lambda x, cos, sin, inverse: x.new_empty(x.shape),
    _tail_gradient,
    _save_tables,
)
