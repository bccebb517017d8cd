"""Rotary position embedding (arXiv 2104.09864): pairs of a head's numbers turned by an angle.

(a, b) → (a cos − b sin, a sin + b cos); a pair is (2i, 2i + 1) if interleaved, else (i, i + D / 2).
The backward turns the other way.

Letters: T tokens, N heads, D width of a head, M positions in the tables. Persistent: `num_sms`
programs step through tiles of tokens × heads. Arithmetic is fp32; every number is read and written
once, so that the result may take the place of x.
"""

import torch
import triton
import triton.language as tl

from .row_tiles import offset, row_kernel, stride_unit

__all__ = ["MAX_WIDTH", "rotary"]

MAX_WIDTH = 1024
# Numbers of a tile: 1024 threads have 16 each, two vectors of 16 bytes in bf16: 32 KB are on their
# way at a time, where 15 are needed (15 bytes read a ns and SM, 1 µs).
TILE = 16384
WARPS = 32
MAX_HEADS = 64  # of a tile


@row_kernel
def rotary_kernel(
    x_ptr,
    x_sequence,
    x_token,
    x_head,
    y_ptr,
    y_sequence,
    y_token,
    y_head,
    cos_ptr,
    sin_ptr,
    positions_table,
    num_tokens,
    length,
    num_heads,
    max_positions,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
):
    head_tiles = tl.cdiv(num_heads, HEADS)
    tiles = tl.cdiv(num_tokens, TOKENS) * head_tiles
    pair = tl.arange(0, HALF)[None, None, :]
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1):
        # Dimensions are heads, tokens, pairs: lanes of a warp fill the first, and read a line or
        # more of neighbouring heads, whose angles are one.
        token = tile // head_tiles * TOKENS + tl.arange(0, TOKENS)
        head = tile % head_tiles * HEADS + tl.arange(0, HEADS)
        exists = token < num_tokens
        if positions_table is None:
            position = token % length
        else:
            position = tl.load(positions_table + token, mask=exists, other=0)
        # A position beyond the tables turns a head to NaN, where a wrong angle would go unseen.
        known = (position >= 0) & (position < max_positions)
        # Every thread reads the angles of its pairs: from another one they would cost a barrier.
        angle = position.to(tl.int64)[None, :, None] * (D // 2) + pair
        angle = tl.broadcast_to(angle, (HEADS, TOKENS, HALF))
        table_mask = (exists & known)[None, :, None] & (pair < D // 2)
        cos = tl.load(cos_ptr + angle, mask=table_mask, other=float("nan"))
        sin = tl.load(sin_ptr + angle, mask=table_mask, other=float("nan"))
        if INVERSE:
            sin = -sin

        heads = ((head < num_heads)[:, None] & exists[None, :])[:, :, None]
        x = offset(token // length, x_sequence, UNIT) + offset(token % length, x_token, UNIT)
        x = x_ptr + x[None, :, None] + offset(head, x_head, UNIT)[:, None, None]
        y = offset(token // length, y_sequence, UNIT) + offset(token % length, y_token, UNIT)
        y = y_ptr + y[None, :, None] + offset(head, y_head, UNIT)[:, None, None]
        if INTERLEAVED:
            number = tl.arange(0, 2 * HALF)[None, None, :]
            mask = heads & (number < D)
            both = tl.load(x + number, mask=mask, other=0).to(tl.float32)
            a, b = both.reshape(HEADS, TOKENS, HALF, 2).split()
            both = tl.join(a * cos - b * sin, a * sin + b * cos)
            both = both.reshape(HEADS, TOKENS, 2 * HALF).to(y_ptr.dtype.element_ty)
            tl.store(y + number, both, mask=mask)
        else:
            mask = heads & (pair < D // 2)
            a = tl.load(x + pair, mask=mask, other=0).to(tl.float32)
            b = tl.load(x + D // 2 + pair, mask=mask, other=0).to(tl.float32)
            tl.store(y + pair, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
            tl.store(y + D // 2 + pair, (a * sin + b * cos).to(y_ptr.dtype.element_ty), mask=mask)


def rotary(
    x: torch.Tensor,
    y: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    *,
    interleaved: bool,
    inverse: bool,
    num_sms: int,
) -> None:
    """y = x with every head turned; y may be x.

    x, y       [B, S, N, D], D even; the last dimension contiguous
    cos, sin   [M, D / 2] fp32, contiguous
    positions  [B, S] integers, contiguous; None counts from 0 in every sequence. A position outside
               of 0..M−1 makes NaN.
    """
    B, S, N, D = x.shape
    half = triton.next_power_of_2(D // 2)
    tokens, heads = tile_shape(N, half)
    unit = stride_unit(x, y)
    tiles = triton.cdiv(B * S, tokens) * triton.cdiv(N, heads)
    rotary_kernel[(max(1, min(num_sms, tiles)),)](
        x,
        *(stride // unit for stride in x.stride()[:3]),
        y,
        *(stride // unit for stride in y.stride()[:3]),
        cos,
        sin,
        positions,
        B * S,
        S,
        N,
        cos.shape[0],
        D=D,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        TOKENS=tokens,
        HEADS=heads,
        HALF=half,
        UNIT=unit,
        num_warps=WARPS,
    )


def tile_shape(num_heads: int, half: int) -> tuple[int, int]:
    """Tokens and heads of a tile, powers of two: heads that share angles and waste no lanes.

    Heads of width 128: 40 → (16, 8), 32 → (4, 32), 5 → (16, 8), three lanes idle.
    """
    dividing = num_heads & -num_heads
    if dividing < 4:
        dividing = triton.next_power_of_2(num_heads)
    heads = min(MAX_HEADS, TILE // (2 * half), dividing)
    return max(1, TILE // (2 * half * heads)), heads
