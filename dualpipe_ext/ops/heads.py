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

from .operator import Operator, is_capturing, is_observed
from .rotary import RotaryOptions, rotary_tables, rotate_into

__all__ = ["split_heads", "tables", "turn_tail"]


# By rows, width, base and device. Nothing leaves it: a CUDA graph may hold an address. Rows are a
# power of two, so that all lengths together take at most twice what the longest does.
_kept: dict[tuple, tuple[Tensor, Tensor]] = {}


def tables(positions: int, width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """`rotary_tables`, made once: cos and sin [S, D / 2] fp32.

    Under torch.compile or a fake mode each call makes its own, and so it does in a CUDA graph under
    capture where none are kept: only its replays would fill them.
    """
    if torch.compiler.is_compiling() or is_observed(()):
        return rotary_tables(positions, width, base=base, device=device)
    rows = 1 << max(positions - 1, 0).bit_length()
    key = (rows, width, base, device)
    kept = _kept.get(key)
    if kept is None:
        if is_capturing(device):
            return rotary_tables(positions, width, base=base, device=device)
        # Inference tensors could not be saved for a backward later.
        with torch.inference_mode(False), torch.no_grad():
            kept = rotary_tables(rows, width, base=base, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # any stream may read them now
        _kept[key] = kept
    if rows == positions:
        return kept
    with torch.inference_mode(False):
        return kept[0][:positions], kept[1][:positions]


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
    return split_heads_operator(qkv, cos, sin, kv_heads)


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
    return turn_tail_operator(x, cos, sin, False)


def _check_heads(name: str, x: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)}: pass floating-point [B, S, heads, D], one "
            "sequence as B = 1"
        )


_FORWARD, _BACKWARD = RotaryOptions(), RotaryOptions(inverse=True)


class _SplitHeadsOperator:
    """q [B, S, N, D], turned, k [B, S, G, D], turned, and v of qkv [B, S, N + 2G, D]."""

    @staticmethod
    def forward(qkv, cos, sin, kv_heads):
        q, k, v = outputs = split_heads_operator.fake(qkv, cos, sin, kv_heads)
        parts = qkv.split([x.shape[2] for x in outputs], dim=2)
        rotate_into(parts[0], cos, sin, None, _FORWARD, q)
        rotate_into(parts[1], cos, sin, None, _FORWARD, k)
        v.copy_(parts[2])
        return outputs

    @staticmethod
    def fake(qkv, cos, sin, kv_heads):
        B, S, heads, D = qkv.shape
        return tuple(qkv.new_empty(B, S, n, D) for n in (heads - 2 * kv_heads, kv_heads, kv_heads))

    @staticmethod
    def save(ctx, inputs, output):
        ctx.shapes = [x.shape for x in output]
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx, *gradients):
        some = next(x for x in gradients if x is not None)
        dq, dk, dv = (
            some.new_zeros(shape) if x is None else x
            for x, shape in zip(gradients, ctx.shapes, strict=True)
        )
        return (join_heads_operator(dq, dk, dv, *ctx.saved_tensors),)


split_heads_operator = Operator(
    "split_heads(Tensor qkv, Tensor cos, Tensor sin, int kv_heads) -> (Tensor, Tensor, Tensor)",
    _SplitHeadsOperator,
)


class _JoinHeadsOperator:
    """The gradient of split_heads' qkv."""

    @staticmethod
    def forward(dq, dk, dv, cos, sin):
        d_qkv = join_heads_operator.fake(dq, dk, dv, cos, sin)
        parts = d_qkv.split([x.shape[2] for x in (dq, dk, dv)], dim=2)
        rotate_into(dq, cos, sin, None, _BACKWARD, parts[0])
        rotate_into(dk, cos, sin, None, _BACKWARD, parts[1])
        parts[2].copy_(dv)
        return d_qkv

    @staticmethod
    def fake(dq, dk, dv, cos, sin):
        B, S, N, D = dq.shape
        return dq.new_empty(B, S, N + 2 * dk.shape[2], D)


join_heads_operator = Operator(
    "join_heads(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor",
    _JoinHeadsOperator,
)


class _TurnTailOperator:
    """x [B, S, N, D] with the last numbers of its heads turned, as many as the tables are for."""

    @staticmethod
    def forward(x, cos, sin, inverse):
        y, width = x.new_empty(x.shape), 2 * cos.shape[1]
        y[..., :-width].copy_(x[..., :-width])
        options = _BACKWARD if inverse else _FORWARD
        rotate_into(x[..., -width:], cos, sin, None, options, y[..., -width:])
        return y

    @staticmethod
    def fake(x, cos, sin, inverse):
        return x.new_empty(x.shape)

    @staticmethod
    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx, dy):
        return (turn_tail_operator(dy, *ctx.saved_tensors, True),)


turn_tail_operator = Operator(
    "turn_tail(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    _TurnTailOperator,
)
