"""RMSNorm (arXiv 1910.07467) after a residual addition, and the way back.

forward   hidden = x + residual;  rstd = (mean(hidden²) + eps)^-½;  normed = hidden * rstd * weight
backward  with n = hidden * rstd and g = d_normed * weight:
          dx = d_residual = rstd * (g − n * mean(g * n)) + d_hidden;  d_weight = Σ rows d_normed * n

Letters: T rows, H their width. Arithmetic is fp32. Persistent: `num_sms` programs step through
tiles of whole rows, the next tiles' loads in flight while one is computed.
"""

import torch
import triton
import triton.language as tl

from ..launch.arithmetic import ceil_div, power_of_two
from .rows import offset, outer_strides, row_kernel, stride_unit

__all__ = ["MAX_WIDTH", "rms_norm", "rms_norm_backward"]

MAX_WIDTH = 16384  # a row in the registers of 1024 threads: 16 numbers of x, weight and d_weight
TILE = 8192  # numbers of a tile where rows are shorter
# An H200 copies 4 TB/s, 30 bytes a ns and SM, so at 1 µs of loaded latency 30 KB must be in flight.
# A row of H = 7168 in bf16 is a tile of 16 KB: x and residual of two tiles are 64 KB.
SHARED = 160 * 1024  # bytes for tiles in flight
MAX_STAGES = 4
# Parts of d_weight at most, whatever num_sms is, so that it changes no bit: one for each of 132
# SMs, 3.8 MB at H = 7168 beside 470 MB of rows. Two took 130 us instead of 126, four 136.
SEGMENTS = 132
# A program adds all parts of so many columns, loaded at once: 112 programs at H = 7168.
PARTS = 512
PARTS_COLUMNS = 64


def tile_shape(H: int, bytes_per_number: int) -> dict[str, int]:
    """Compile-time shape of a launch; `bytes_per_number` counts all tensors a tile is read from.

    H = 7168 with two bf16 tensors (4 bytes) gives tiles of 1 × 8192 and 4 stages, H = 128 tiles of
    64 × 128.
    """
    columns = power_of_two(H)
    rows = max(1, TILE // columns)
    stages = min(MAX_STAGES, 1 + SHARED // (rows * columns * bytes_per_number))
    return dict(H=H, COLUMNS=columns, ROWS=rows, STAGES=stages, num_warps=rows * columns // 512)


@row_kernel
def rms_norm_kernel(
    x_ptr,
    x_row,
    residual_ptr,
    residual_row,
    weight_ptr,
    normed_ptr,
    hidden_ptr,
    rstd_table,
    num_rows,
    eps,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < H
    weight = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float32)
    tiles = tl.cdiv(num_rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        exists = row < num_rows
        mask = exists[:, None] & inside
        hidden = tl.load(x_ptr + offset(row, x_row, UNIT)[:, None] + column, mask=mask, other=0)
        target = row[:, None].to(tl.int64) * H + column
        if residual_ptr is not None:
            residual = residual_ptr + offset(row, residual_row, UNIT)[:, None] + column
            residual = tl.load(residual, mask=mask, other=0)
            # Rounded before it is normalised: the backward sees the same numbers.
            hidden = (hidden.to(tl.float32) + residual.to(tl.float32)).to(hidden.dtype)
            tl.store(hidden_ptr + target, hidden, mask=mask)
        hidden = hidden.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(hidden * hidden, axis=1) / H + eps)
        normed = hidden * rstd[:, None] * weight
        tl.store(normed_ptr + target, normed.to(normed_ptr.dtype.element_ty), mask=mask)
        tl.store(rstd_table + row, rstd, mask=exists)


@triton.jit
def store_part(row_ptr, part, H: tl.constexpr, WIDTH: tl.constexpr):
    """A row of sums [COLUMNS] fp32.

    A thread has 8 neighbours of a bf16 row, a store takes 4 of fp32. Left to itself the compiler
    keeps the sums in the store's order, and computes everything of every row in both.
    """
    if WIDTH == 8:
        low, high = part.reshape(part.shape[0] // 8, 2, 4).permute(0, 2, 1).split()
        column = tl.arange(0, part.shape[0] // 8)[:, None] * 8 + tl.arange(0, 4)[None, :]
        tl.store(row_ptr + column, low, mask=column < H)
        tl.store(row_ptr + column + 4, high, mask=column + 4 < H)
    else:
        column = tl.arange(0, part.shape[0])
        tl.store(row_ptr + column, part, mask=column < H)


@row_kernel
def rms_norm_backward_kernel(
    d_normed_ptr,
    d_normed_row,
    d_hidden_ptr,
    d_hidden_row,
    hidden_ptr,
    hidden_row,
    weight_ptr,
    rstd_table,
    dx_ptr,
    parts_ptr,
    num_rows,
    segments,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr = TILE,
):
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < H
    if COLUMNS <= TILE:
        weight = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float32)
    tiles = tl.cdiv(num_rows, ROWS)
    base = tiles // segments  # tiles of a segment; the first `longer` ones have one more
    longer = tiles % segments
    segment = tl.program_id(0)
    tile = segment * base + tl.minimum(segment, longer)
    left = base + (segment < longer).to(tl.int32)
    step_size = tl.num_programs(0)
    own = tl.cdiv(segments - segment, step_size) * base
    own += tl.cdiv(tl.maximum(longer - segment, 0), step_size)
    d_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    # One loop through all segments: at the end of one the loads of the next are in flight.
    for _ in tl.range(own, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        exists = row < num_rows
        mask = exists[:, None] & inside
        d_normed = d_normed_ptr + offset(row, d_normed_row, UNIT)[:, None] + column
        d_normed = tl.load(d_normed, mask=mask, other=0).to(tl.float32)
        hidden = hidden_ptr + offset(row, hidden_row, UNIT)[:, None] + column
        hidden = tl.load(hidden, mask=mask, other=0).to(tl.float32)
        rstd = tl.load(rstd_table + row, mask=exists, other=0)[:, None]
        unit = hidden * rstd
        d_weight += d_normed * unit
        if COLUMNS > TILE:  # no registers to keep it in
            weight = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float32)
        slope = d_normed * weight
        mean = tl.sum(slope * unit, axis=1)[:, None] / H
        dx = rstd * (slope - unit * mean)
        if d_hidden_ptr is not None:
            d_hidden = d_hidden_ptr + offset(row, d_hidden_row, UNIT)[:, None] + column
            dx += tl.load(d_hidden, mask=mask, other=0).to(tl.float32)
        target = dx_ptr + row[:, None].to(tl.int64) * H + column
        tl.store(target, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        last = left == 1
        if last:
            part_ptr = parts_ptr + tl.cast(segment, tl.int64) * H
            store_part(part_ptr, tl.sum(d_weight, axis=0), H, WIDTH)
            d_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
        segment = tl.where(last, segment + step_size, segment)
        tile = tl.where(last, segment * base + tl.minimum(segment, longer), tile + 1)
        left = tl.where(last, base + (segment < longer).to(tl.int32), left - 1)


@row_kernel
def add_parts_kernel(
    parts_ptr,
    d_weight_ptr,
    segments,
    H: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    for first in range(tl.program_id(0) * COLUMNS, H, tl.num_programs(0) * COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, segments, PARTS):
            part = start + tl.arange(0, PARTS)[:, None]
            mask = (part < segments) & (column < H)[None, :]
            total += tl.sum(tl.load(parts_ptr + part * H + column, mask=mask, other=0), axis=0)
        tl.store(d_weight_ptr + column, total.to(d_weight_ptr.dtype.element_ty), mask=column < H)


def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    normed: torch.Tensor,
    hidden: torch.Tensor | None,
    rstd: torch.Tensor,
    eps: float,
    *,
    num_sms: int,
) -> None:
    """Writes normed [T, H] and rstd [T] fp32, with a residual also hidden = x + residual [T, H].

    x, residual     [T, H], one dtype, the last dimension contiguous
    weight          [H] of any floating dtype
    normed, hidden  contiguous
    """
    T, H = x.shape
    shape = tile_shape(H, x.element_size() * (1 if residual is None else 2))
    unit = stride_unit(x, residual)
    rms_norm_kernel[(max(1, min(num_sms, ceil_div(T, shape["ROWS"]))),)](
        x,
        x.stride(0) // unit,
        residual,
        outer_strides(residual, 1)[0] // unit,
        weight,
        normed,
        hidden,
        rstd,
        T,
        eps,
        UNIT=unit,
        **shape,
    )


def rms_norm_backward(
    d_normed: torch.Tensor,
    d_hidden: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor,
    *,
    num_sms: int,
) -> torch.Tensor:
    """Writes dx [T, H], the gradient of x and of residual alike; returns d_weight like weight.

    d_normed, d_hidden, hidden  [T, H], the last dimension contiguous; d_hidden or None
    Every segment of rows writes a sum of its own, which are then added in order: the same bits in
    every run and for every `num_sms`. With T = 8192 the 132 segments have 62 or 63 rows each.
    """
    T, H = hidden.shape
    shape = tile_shape(H, hidden.element_size() * (2 if d_hidden is None else 3))
    segments = min(SEGMENTS, ceil_div(T, shape["ROWS"]))
    unit = stride_unit(d_normed, d_hidden, hidden)
    parts = torch.empty(segments, H, dtype=torch.float32, device=hidden.device)
    rms_norm_backward_kernel[(max(1, min(num_sms, segments)),)](
        d_normed,
        d_normed.stride(0) // unit,
        d_hidden,
        outer_strides(d_hidden, 1)[0] // unit,
        hidden,
        hidden.stride(0) // unit,
        weight,
        rstd,
        dx,
        parts,
        T,
        segments,
        UNIT=unit,
        WIDTH=16 // hidden.element_size(),
        **shape,
    )
    d_weight = torch.empty_like(weight)
    add_parts_kernel[(max(1, min(num_sms, ceil_div(H, PARTS_COLUMNS))),)](
        parts, d_weight, segments, H=H, PARTS=PARTS, COLUMNS=PARTS_COLUMNS, num_warps=16
    )
    return d_weight
