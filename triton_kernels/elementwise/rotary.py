"""Rotary position embedding (arXiv 2104.09864): pairs of a head's numbers turned by an angle.

(a, b) → (a cos − b sin, a sin + b cos); a pair is (2i, 2i + 1) if interleaved, else (i, i + D / 2).
The backward turns the other way.

Letters: T tokens, N heads, D width of a head, M positions in the tables. Persistent: `num_sms`
programs step through tiles of tokens × heads. Arithmetic is fp32; every number is read and written
once, so that the result may take the place of x.
"""

import torch
import triton.language as tl

from ..launch.arithmetic import ceil_div, power_of_two
from .rows import offset, row_kernel, stride_unit

__all__ = ["MAX_WIDTH", "rotary"]

MAX_WIDTH = 1024
# 1024 threads have 2 vectors of 16 bytes each: 32 KB of bf16 are on their way at a time, where 15
# are needed (15 bytes read a ns and SM, 1 µs). Both are turned by the same angles: interleaved, two
# heads of one token take 256 instructions. One head of two tokens took 320, and 0.83 of a copy's
# rate on an H200, where halves of heads with 256 had 0.95.
WARPS = 32
VECTORS = 2
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
    direction,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
):
    head_tiles = tl.cdiv(num_heads, HEADS * GROUPS)
    tiles = tl.cdiv(num_tokens, TOKENS) * head_tiles
    pair = tl.arange(0, HALF)[None, None, :]
    # Numbers that a head's vectors hold: of one half of its pairs, or of whole pairs.
    number = tl.arange(0, 2 * HALF)[None, None, :] if INTERLEAVED else pair
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1):
        # Dimensions are heads, tokens, numbers: lanes of a warp fill the first, and read a line or
        # more of neighbouring heads, whose angles are one.
        token = tile // head_tiles * TOKENS + tl.arange(0, TOKENS)
        head = tile % head_tiles * (HEADS * GROUPS) + tl.arange(0, HEADS)
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
        sin = tl.load(sin_ptr + angle, mask=table_mask, other=float("nan")) * direction

        x = offset(token // length, x_sequence, UNIT) + offset(token % length, x_token, UNIT)
        x = x_ptr + x[None, :, None] + offset(head, x_head, UNIT)[:, None, None] + number
        y = offset(token // length, y_sequence, UNIT) + offset(token % length, y_token, UNIT)
        y = y_ptr + y[None, :, None] + offset(head, y_head, UNIT)[:, None, None] + number
        inside = exists[None, :, None] & (number < (D if INTERLEAVED else D // 2))
        read = ()
        for group in tl.static_range(GROUPS):
            mask = (head + group * HEADS < num_heads)[:, None, None] & inside
            source = x + offset(group * HEADS, x_head, UNIT)
            read += (tl.load(source, mask=mask, other=0),)
            if not INTERLEAVED:
                read += (tl.load(source + D // 2, mask=mask, other=0),)
        for group in tl.static_range(GROUPS):
            mask = (head + group * HEADS < num_heads)[:, None, None] & inside
            target = y + offset(group * HEADS, y_head, UNIT)
            if INTERLEAVED:
                both = read[group].to(tl.float32).reshape(HEADS, TOKENS, HALF, 2)
                a, b = both.split()
                both = tl.join(a * cos - b * sin, a * sin + b * cos)
                both = both.reshape(HEADS, TOKENS, 2 * HALF).to(y_ptr.dtype.element_ty)
                tl.store(target, both, mask=mask)
            else:
                a = read[2 * group].to(tl.float32)
                b = read[2 * group + 1].to(tl.float32)
                turned = (a * cos - b * sin).to(y_ptr.dtype.element_ty)
                tl.store(target, turned, mask=mask)
                turned = (a * sin + b * cos).to(y_ptr.dtype.element_ty)
                tl.store(target + D // 2, turned, mask=mask)


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
    half = power_of_two(D // 2)
    shape = tile_shape(N, half, x.element_size(), interleaved)
    unit = stride_unit(x, y)
    tiles = ceil_div(B * S, shape["TOKENS"]) * ceil_div(N, shape["HEADS"] * shape["GROUPS"])
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
        -1.0 if inverse else 1.0,
        D=D,
        INTERLEAVED=interleaved,
        HALF=half,
        UNIT=unit,
        num_warps=WARPS,
        **shape,
    )


def tile_shape(num_heads: int, half: int, element_size: int, interleaved: bool) -> dict[str, int]:
    """Tokens, heads and groups of heads of a tile: heads that share angles and waste no lanes.

    Heads of width 128 in bf16: 40 are tiles of 16 tokens and 8 heads, interleaved 2 groups of 4
    heads; 32 are 4 tokens and 32 heads; 5 take 8, three lanes idle.
    """
    dividing = num_heads & -num_heads
    if dividing < 4:
        dividing = power_of_two(num_heads)
    vector = 16 // element_size
    # Of a group a thread has a vector of pairs, or one of each half of them.
    vectors, numbers = (1, vector) if interleaved else (2, 2 * vector)
    heads = min(MAX_HEADS, dividing)
    groups = max(1, min(VECTORS // vectors, heads))
    heads //= groups
    lanes = ceil_div(2 * half, numbers)  # of a head
    tokens = max(1, 32 * WARPS // (lanes * heads))
    return dict(TOKENS=tokens, HEADS=heads, GROUPS=groups)
