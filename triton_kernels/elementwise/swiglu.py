"""SwiGLU (arXiv 2002.05202) of a dense layer, and the way back, in one pass each.

forward   act = silu(gate) * up,  with silu(g) = g * s and s = sigmoid(g)
backward  d_gate = dy * up * (s + silu(gate) * (1 - s));  d_up = dy * silu(gate)

Letters: T rows, D their width; gate and up stand side by side in a row of 2D. Arithmetic is fp32,
every result rounded once. Bytes a number of act in bf16: forward 4 read, 2 written; backward 6 and
4. Persistent: `num_sms` programs step through tiles of rows × columns, the next tiles' loads in
flight while one is computed.
"""

import torch
import triton
import triton.language as tl

from ..launch.arithmetic import ceil_div, power_of_two
from .rows import VECTOR, offset, row_kernel, stride_unit

__all__ = ["swiglu", "swiglu_backward", "vectors"]

# 1024 threads have 16 bytes of each tensor: a tile of the forward is read in 32 KB, of the backward
# in 48 KB. An H200 copies 30 bytes a ns and SM, so that tiles come every 1.6 and 2.7 µs, and two of
# them are in flight while one is computed: in 206 and 260 instructions a thread, 0.9 and 1.2 µs.
WARPS = 32
TILE = 32 * WARPS * 16  # bytes of one tensor
STAGES = 4  # 96 and 144 KB of shared memory
COLUMNS = (1024, 512, 256)  # of a tile: the first that divides D, or the last


@triton.jit
def locate(tile, num_rows, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows [ROWS] and columns [1, COLUMNS] of a tile, and which of them exist. Columns run fastest:
    with D = 2048 and tiles of 8 × 1024, tile 3 has rows 8 to 15 and columns 1024 to 2047."""
    CHUNKS: tl.constexpr = tl.cdiv(D, COLUMNS)
    row = tile // CHUNKS * ROWS + tl.arange(0, ROWS)
    column = tile % CHUNKS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < num_rows)[:, None] & (column < D)


@row_kernel
def swiglu_kernel(
    gate_up_ptr,
    gate_up_row,
    act_ptr,
    num_rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles = tl.cdiv(num_rows, ROWS) * tl.cdiv(D, COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row, column, inside = locate(tile, num_rows, D, ROWS, COLUMNS)
        gates = gate_up_ptr + offset(row, gate_up_row)[:, None] + column
        gate = tl.load(gates, mask=inside, other=0).to(tl.float32)
        up = tl.load(gates + D, mask=inside, other=0).to(tl.float32)
        act = gate * tl.sigmoid(gate) * up
        target = act_ptr + row[:, None].to(tl.int64) * D + column
        tl.store(target, act.to(act_ptr.dtype.element_ty), mask=inside)


@row_kernel
def swiglu_backward_kernel(
    dy_ptr,
    dy_row,
    gate_up_ptr,
    gate_up_row,
    d_gate_up_ptr,
    num_rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles = tl.cdiv(num_rows, ROWS) * tl.cdiv(D, COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row, column, inside = locate(tile, num_rows, D, ROWS, COLUMNS)
        dy = dy_ptr + offset(row, dy_row)[:, None] + column
        dy = tl.load(dy, mask=inside, other=0).to(tl.float32)
        gates = gate_up_ptr + offset(row, gate_up_row)[:, None] + column
        gate = tl.load(gates, mask=inside, other=0).to(tl.float32)
        up = tl.load(gates + D, mask=inside, other=0).to(tl.float32)
        s = tl.sigmoid(gate)
        silu = gate * s
        d_gate = dy * up * (s + silu * (1 - s))
        target = d_gate_up_ptr + row[:, None].to(tl.int64) * (2 * D) + column
        dtype = d_gate_up_ptr.dtype.element_ty
        tl.store(target, d_gate.to(dtype), mask=inside)
        tl.store(target + D, (dy * silu).to(dtype), mask=inside)


def vectors(rows: torch.Tensor) -> torch.Tensor:
    """`rows` [T, 8n] if they can be moved 16 bytes at a time, else a copy."""
    if rows.stride(1) == 1 and stride_unit(rows) == VECTOR:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def swiglu(gate_up: torch.Tensor, act: torch.Tensor, *, num_sms: int) -> None:
    """Writes act [T, D] = silu(gate) * up.

    gate_up  [T, 2D], gate then up, of `vectors`
    act      contiguous; D a multiple of 8
    """
    T, D = act.shape
    shape, tiles = tile_shape(T, D, act.element_size())
    swiglu_kernel[(max(1, min(num_sms, tiles)),)](
        gate_up, gate_up.stride(0) // VECTOR, act, T, D=D, num_warps=WARPS, **shape
    )


def swiglu_backward(
    dy: torch.Tensor, gate_up: torch.Tensor, d_gate_up: torch.Tensor, *, num_sms: int
) -> None:
    """Writes d_gate_up [T, 2D], contiguous.

    dy, gate_up  [T, D], [T, 2D], of `vectors`; D a multiple of 8
    """
    T, D = dy.shape
    shape, tiles = tile_shape(T, D, dy.element_size())
    swiglu_backward_kernel[(max(1, min(num_sms, tiles)),)](
        dy,
        dy.stride(0) // VECTOR,
        gate_up,
        gate_up.stride(0) // VECTOR,
        d_gate_up,
        T,
        D=D,
        num_warps=WARPS,
        **shape,
    )


def tile_shape(T: int, D: int, element_size: int) -> tuple[dict[str, int], int]:
    """Compile-time shape of a launch, and how many tiles there are.

    D = 7168 in bf16 has tiles of 8 × 1024, D = 1408 of 32 × 256, D = 40 of 128 × 64.
    """
    columns = next((width for width in COLUMNS if D % width == 0), COLUMNS[-1])
    columns = min(columns, power_of_two(D))
    rows = TILE // element_size // columns
    constants = dict(ROWS=rows, COLUMNS=columns, STAGES=STAGES)
    return constants, ceil_div(T, rows) * ceil_div(D, columns)
