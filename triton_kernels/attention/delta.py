"""What the backward needs of every row, and its dq once all tiles have added to it.

Scratch tensors have whole tiles of 128 rows for every sequence and head, so that TMA neither reads
nor adds across sequences: row `scratch_row(...) + i` belongs to query i.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..launch.cached import cache_launches
from .tiles import LOG2_E, ROWS, locate_tile, num_blocks, scratch_row, sequence_span

# 128 rows are 16 KiB of bf16 for D = 64: one CTA an SM keeps 32 or 64 KiB in flight.
WARPS = 8

_INTEGERS = ["num_tiles", "num_m", "num_heads", "sequences", "q_length", "padded"]
_INTEGERS += ["stride_b", "stride_h", "stride_s", "d_stride_b", "d_stride_h", "d_stride_s"]


@gluon.jit
def row_offsets(b, h, row, stride_b, stride_h, stride_s, columns):
    """Elements before x[b, h, row, columns], [rows, columns]; strides are multiples of 8, which the
    compiler has to see to use 16-byte accesses, and products 64 bits wide."""
    start = gl.cast(b, gl.int64) * stride_b + gl.cast(h, gl.int64) * stride_h
    lines = gl.cast(row, gl.int64) * stride_s + start
    return gl.expand_dims(lines, 1) * 8 + gl.expand_dims(columns, 0)


@cache_launches
@gluon.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=["starts_table"])
def prepare_kernel(
    out_ptr,
    d_out_ptr,
    lse_ptr,
    lse_scratch_ptr,
    delta_scratch_ptr,
    dq_sum_ptr,
    starts_table,
    num_tiles,
    num_m,
    num_heads,
    sequences,
    q_length,
    padded,
    stride_b,
    stride_h,
    stride_s,
    d_stride_b,
    d_stride_h,
    d_stride_s,
    VARLEN: gl.constexpr,
    D: gl.constexpr,
    V: gl.constexpr,
    CLEAR: gl.constexpr,
    ROWS: gl.constexpr,
    LOG2_E: gl.constexpr,
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    i = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, V, gl.SliceLayout(0, layout))
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        b, h, block = locate_tile(
            tile, num_m, num_heads, num_heads if VARLEN else sequences * num_heads, 1,
            starts_table, sequences, VARLEN, ROWS, False,
        )  # fmt: skip
        start, rows = sequence_span(b, starts_table, q_length, VARLEN)
        if block * ROWS < rows:
            row = block * ROWS + i
            inside = row < rows
            scratch = scratch_row(b, h, num_heads, start, padded, VARLEN) + block * ROWS
            first = 0 if VARLEN else b
            offset = row_offsets(first, h, start + row, stride_b, stride_h, stride_s, column)
            mask = gl.expand_dims(inside, 1)
            out = gl.load(out_ptr + offset, mask=mask, other=0.0).to(gl.float32)
            offset = row_offsets(first, h, start + row, d_stride_b, d_stride_h, d_stride_s, column)
            d_out = gl.load(d_out_ptr + offset, mask=mask, other=0.0).to(gl.float32)
            gl.store(delta_scratch_ptr + scratch + i, gl.sum(out * d_out, 1))
            line = (b * num_heads + h) * q_length
            if VARLEN:
                line = h * q_length + start
            lse = gl.load(lse_ptr + line + row, mask=inside, other=float("inf"))
            # exp(s - inf) = 0: a query that saw nothing, or is none, takes part in nothing.
            lse = gl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
            gl.store(lse_scratch_ptr + scratch + i, lse)
            if CLEAR:
                wide: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [WARPS, 1], [1, 0])
                r = gl.arange(0, ROWS, gl.SliceLayout(1, wide))
                c = gl.arange(0, D, gl.SliceLayout(0, wide))
                place = row_offsets(0, 0, scratch + r, 0, 0, D // 8, c)
                gl.store(dq_sum_ptr + place, gl.zeros([ROWS, D], gl.float32, wide))


@cache_launches
@gluon.jit(do_not_specialize=_INTEGERS[:9], do_not_specialize_on_alignment=["starts_table"])
def finish_query_gradient_kernel(
    dq_sum_ptr,
    dq_ptr,
    starts_table,
    scale,
    num_tiles,
    num_m,
    num_heads,
    sequences,
    q_length,
    padded,
    stride_b,
    stride_h,
    stride_s,
    VARLEN: gl.constexpr,
    D: gl.constexpr,
    ROWS: gl.constexpr,
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    i = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        b, h, block = locate_tile(
            tile, num_m, num_heads, num_heads if VARLEN else sequences * num_heads, 1,
            starts_table, sequences, VARLEN, ROWS, False,
        )  # fmt: skip
        start, rows = sequence_span(b, starts_table, q_length, VARLEN)
        if block * ROWS < rows:
            row = block * ROWS + i
            scratch = scratch_row(b, h, num_heads, start, padded, VARLEN) + block * ROWS
            total = gl.load(dq_sum_ptr + row_offsets(0, 0, scratch + i, 0, 0, D // 8, column))
            first = 0 if VARLEN else b
            offset = row_offsets(first, h, start + row, stride_b, stride_h, stride_s, column)
            dq = (total * scale).to(dq_ptr.dtype.element_ty)
            gl.store(dq_ptr + offset, dq, mask=gl.expand_dims(row < rows, 1))


@cache_launches
@gluon.jit(
    do_not_specialize=["rows", "width", "sequences"],
    do_not_specialize_on_alignment=["starts_table"],
)
def clear_tail_kernel(x_ptr, starts_table, rows, width, sequences, WARPS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    column = gl.arange(0, 256 * WARPS, layout)
    end = gl.load(starts_table + sequences)
    for row in range(end + gl.program_id(0), rows, gl.num_programs(0)):
        start = gl.cast(row, gl.int64) * width * 8
        for first in range(0, width * 8, 256 * WARPS):
            zero = gl.zeros([256 * WARPS], x_ptr.dtype.element_ty, layout)
            gl.store(x_ptr + start + first + column, zero, mask=first + column < width * 8)


def scratch_rows(q: torch.Tensor, starts_q: torch.Tensor | None) -> int:
    """Rows of the scratch tensors."""
    B, N, q_length, _ = q.shape
    return (
        (1 if starts_q is not None else B)
        * N
        * ROWS
        * num_blocks(q_length, q_length, starts_q, ROWS)
    )


def row_strides(x: torch.Tensor) -> list[int]:
    """Strides of x [B, N, S, D] but the last, in units of 8 elements."""
    return [0 if n == 1 else s // 8 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]


def prepare(
    out: torch.Tensor,
    d_out: torch.Tensor,
    lse: torch.Tensor,
    starts_q: torch.Tensor | None,
    lse_scratch: torch.Tensor,
    delta_scratch: torch.Tensor,
    dq_sum: torch.Tensor | None,
    *,
    num_sms: int,
) -> None:
    """delta = rowsum(out · d_out), lse in base 2, dq_sum = 0, all in scratch rows.

    out, d_out       [B, N, S_q, V], strides multiples of 8 elements, the last 1
    lse              [B, N, S_q] fp32
    lse_scratch      [rows] fp32; +inf where no query is, or one that saw no key
    delta_scratch    [rows] fp32
    dq_sum           [rows, D] fp32 or None
    """
    varlen = starts_q is not None
    B, N, q_length, V = out.shape
    num_m = num_blocks(q_length, q_length, starts_q, ROWS)
    num_tiles = (1 if varlen else B) * N * num_m
    prepare_kernel[(max(1, min(num_sms, num_tiles)),)](
        out,
        d_out,
        lse,
        lse_scratch,
        delta_scratch,
        lse_scratch if dq_sum is None else dq_sum,
        starts_q if varlen else lse,
        num_tiles,
        num_m,
        N,
        starts_q.shape[0] - 1 if varlen else B,
        q_length,
        num_m * ROWS,
        *row_strides(out),
        *row_strides(d_out),
        VARLEN=varlen,
        D=V if dq_sum is None else dq_sum.shape[1],
        V=V,
        CLEAR=dq_sum is not None,
        ROWS=ROWS,
        LOG2_E=LOG2_E,
        WARPS=WARPS,
        num_warps=WARPS,
    )


def finish_query_gradient(
    dq_sum: torch.Tensor,
    dq: torch.Tensor,
    starts_q: torch.Tensor | None,
    *,
    scale: float,
    num_sms: int,
) -> None:
    """dq [B, N, S_q, D] = scale · dq_sum, [rows, D] fp32; strides of dq as in `prepare`."""
    varlen = starts_q is not None
    B, N, q_length, D = dq.shape
    num_m = num_blocks(q_length, q_length, starts_q, ROWS)
    num_tiles = (1 if varlen else B) * N * num_m
    finish_query_gradient_kernel[(max(1, min(num_sms, num_tiles)),)](
        dq_sum,
        dq,
        starts_q if varlen else dq_sum,
        scale,
        num_tiles,
        num_m,
        N,
        starts_q.shape[0] - 1 if varlen else B,
        q_length,
        num_m * ROWS,
        *row_strides(dq),
        VARLEN=varlen,
        D=D,
        ROWS=ROWS,
        WARPS=WARPS,
        num_warps=WARPS,
    )


def clear_tail(x: torch.Tensor, starts: torch.Tensor, *, num_sms: int) -> None:
    """x [T, N, D], contiguous, becomes 0 from row starts[-1] on."""
    rows = x.shape[0]
    clear_tail_kernel[(max(1, min(num_sms, rows)),)](
        x, starts, rows, x[0].numel() // 8, starts.shape[0] - 1, WARPS=WARPS, num_warps=WARPS
    )
