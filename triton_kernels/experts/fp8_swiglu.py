"""SwiGLU between two fp8 GEMMs, forward and back: one pass each, which leaves e4m3 rows and scales.

forward   act = silu(gate) * up * row_weight, as e4m3 only
backward  d_gate and d_up in bf16, for the weights' gradient, and as e4m3, for the inputs';
          d_row_weight; and act in bf16, for the gradient of w2: made here, so that it is not kept
          between forward and backward

The formulas are in swiglu.py. A row's 128 columns share a scale (quantize.py), of fp32
values: nothing is rounded to bf16 first. Bytes a number of act: forward 4 read, 1 written; backward
6 read, 8 written. At 4 TB/s an SM has 36 issue slots a thread and number in the forward and 100 in
the backward, and needs about 25 and 45.
"""

import torch
import triton
import triton.language as tl

from ..elementwise.fp8 import BLOCK
from ..launch.arithmetic import ceil_div
from ..launch.cached import cache_launches
from .quantize import to_fp8

__all__ = ["swiglu", "swiglu_backward"]

# Tiles of a CTA of 1024 threads: 16 and 8 numbers a thread, 64 and 48 KiB of loads in flight an SM.
# 256 columns, because I is seldom a multiple of 1024: I = 768 would leave a quarter of them idle.
CHUNK, WARPS = 256, 32
FORWARD_ROWS, BACKWARD_ROWS = 64, 32
STAGES = 2  # the next tile's loads fly while this one is computed


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@cache_launches
@triton.jit(do_not_specialize=["num_experts", "R", "blocks"])
def swiglu_kernel(
    gate_up_ptr,
    row_weight_ptr,
    q_ptr,
    scale_ptr,
    offsets_ptr,
    num_experts,
    R,
    blocks,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    I = blocks * BLOCK  # noqa: E741
    PER_CHUNK: tl.constexpr = CHUNK // BLOCK
    chunks = tl.cdiv(blocks, PER_CHUNK)
    # Offsets are multiples of 128: a tile has all its rows.
    num_tiles = tl.load(offsets_ptr + num_experts) // ROWS * chunks
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        first = tile // chunks * ROWS
        row = (first + tl.arange(0, ROWS))[:, None, None]
        block = tile % chunks * PER_CHUNK + tl.arange(0, PER_CHUNK)[None, :, None]
        column = block * BLOCK + tl.arange(0, BLOCK)[None, None, :]
        inside = block < blocks
        gates = gate_up_ptr + row.to(tl.int64) * (2 * I) + column
        gate = tl.load(gates, mask=inside, other=0).to(tl.float32)
        up = tl.load(gates + I, mask=inside, other=0).to(tl.float32)
        weight = tl.load(row_weight_ptr + first + tl.arange(0, ROWS))[:, None, None]
        act = gate * sigmoid(gate) * up * weight
        q, scale = to_fp8(act, q_ptr.dtype.element_ty)
        tl.store(q_ptr + row.to(tl.int64) * I + column, q, mask=inside)
        tl.store(scale_ptr + block.to(tl.int64) * R + row, scale, mask=inside)


@cache_launches
@triton.jit(do_not_specialize=["num_experts", "R", "blocks"])
def swiglu_backward_kernel(
    d_act_ptr,
    gate_up_ptr,
    row_weight_ptr,
    d_gate_up_ptr,
    q_ptr,
    scale_ptr,
    act_ptr,
    d_row_weight_ptr,
    offsets_ptr,
    num_experts,
    R,
    blocks,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    I = blocks * BLOCK  # noqa: E741
    PER_CHUNK: tl.constexpr = CHUNK // BLOCK
    chunks = tl.cdiv(blocks, PER_CHUNK)
    num_tiles = tl.load(offsets_ptr + num_experts) // ROWS
    # A program has whole rows, chunk after chunk: d_row_weight is one sum in one order, whatever
    # num_sms is.
    own = tl.cdiv(num_tiles - tl.program_id(0), tl.num_programs(0))
    products = tl.zeros((ROWS, PER_CHUNK, BLOCK), tl.float32)
    for step in tl.range(own * chunks, num_stages=STAGES):
        first = (tl.program_id(0) + step // chunks * tl.num_programs(0)) * ROWS
        row = (first + tl.arange(0, ROWS))[:, None, None]
        block = step % chunks * PER_CHUNK + tl.arange(0, PER_CHUNK)[None, :, None]
        column = block * BLOCK + tl.arange(0, BLOCK)[None, None, :]
        inside = block < blocks
        narrow = row.to(tl.int64) * I + column
        wide = row.to(tl.int64) * (2 * I) + column
        d = tl.load(d_act_ptr + narrow, mask=inside, other=0).to(tl.float32)
        gate = tl.load(gate_up_ptr + wide, mask=inside, other=0).to(tl.float32)
        up = tl.load(gate_up_ptr + wide + I, mask=inside, other=0).to(tl.float32)
        weight = tl.load(row_weight_ptr + first + tl.arange(0, ROWS))[:, None, None]
        s = sigmoid(gate)
        silu = gate * s
        product = silu * up
        dtype = act_ptr.dtype.element_ty
        tl.store(act_ptr + narrow, (product * weight).to(dtype), mask=inside)
        products += d * product
        d *= weight
        d_gate = d * up * (s + silu * (1 - s))
        d_up = d * silu
        tl.store(d_gate_up_ptr + wide, d_gate.to(dtype), mask=inside)
        tl.store(d_gate_up_ptr + wide + I, d_up.to(dtype), mask=inside)
        q, scale = to_fp8(d_gate, q_ptr.dtype.element_ty)
        tl.store(q_ptr + wide, q, mask=inside)
        scales = scale_ptr + block.to(tl.int64) * R + row
        tl.store(scales, scale, mask=inside)
        q, scale = to_fp8(d_up, q_ptr.dtype.element_ty)
        tl.store(q_ptr + wide + I, q, mask=inside)
        tl.store(scales + blocks.to(tl.int64) * R, scale, mask=inside)
        if step % chunks == chunks - 1:
            sums = tl.sum(tl.sum(products, axis=2), axis=1)
            tl.store(d_row_weight_ptr + first + tl.arange(0, ROWS), sums)
            products = tl.zeros((ROWS, PER_CHUNK, BLOCK), tl.float32)
    for tile in range(num_tiles + tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        tl.store(d_row_weight_ptr + rows, tl.zeros((ROWS,), tl.float32), mask=rows < R)


def swiglu(
    gate_up: torch.Tensor,
    row_weight: torch.Tensor,
    expert_offsets: torch.Tensor,
    *,
    num_sms: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up * row_weight as fp8.

    gate_up         [R, 2I] contiguous, I a multiple of 128
    row_weight      [R] fp32
    expert_offsets  [L + 1] int32, multiples of 128, last <= R

    Returns q [R, I] e4m3 and scales [I / 128, R] fp32, as `quantize.quantize_rows`, written up to
    row expert_offsets[-1].
    """
    R, I = gate_up.shape[0], gate_up.shape[1] // 2  # noqa: E741
    q = gate_up.new_empty((R, I), dtype=torch.float8_e4m3fn)
    scales = gate_up.new_empty((I // BLOCK, R), dtype=torch.float32)
    tiles = R // FORWARD_ROWS * ceil_div(I, CHUNK)
    swiglu_kernel[(max(1, min(num_sms, tiles)),)](
        gate_up,
        row_weight,
        q,
        scales,
        expert_offsets,
        expert_offsets.shape[0] - 1,
        R,
        I // BLOCK,
        BLOCK=BLOCK,
        ROWS=FORWARD_ROWS,
        CHUNK=CHUNK,
        STAGES=STAGES,
        num_warps=WARPS,
    )
    return q, scales


def swiglu_backward(
    d_act: torch.Tensor,
    gate_up: torch.Tensor,
    row_weight: torch.Tensor,
    expert_offsets: torch.Tensor,
    d_gate_up: torch.Tensor,
    act: torch.Tensor,
    *,
    num_sms: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Goes back through SwiGLU and the routing weight.

    d_act       [R, I] contiguous, I a multiple of 128
    gate_up     [R, 2I] from the forward
    row_weight  [R] fp32
    d_gate_up   [R, 2I], act [R, I]: filled up to row expert_offsets[-1]

    Returns d_gate_up once more, as q [R, 2I] e4m3 with scales [2I / 128, R] fp32, and d_row_weight
    [R] fp32, 0 past expert_offsets[-1].
    """
    R, I = d_act.shape  # noqa: E741
    q = torch.empty_like(d_gate_up, dtype=torch.float8_e4m3fn)
    scales = d_act.new_empty((2 * I // BLOCK, R), dtype=torch.float32)
    d_row_weight = torch.empty_like(row_weight)
    swiglu_backward_kernel[(max(1, min(num_sms, R // BACKWARD_ROWS)),)](
        d_act,
        gate_up,
        row_weight,
        d_gate_up,
        q,
        scales,
        act,
        d_row_weight,
        expert_offsets,
        expert_offsets.shape[0] - 1,
        R,
        I // BLOCK,
        BLOCK=BLOCK,
        ROWS=BACKWARD_ROWS,
        CHUNK=CHUNK,
        STAGES=STAGES,
        num_warps=WARPS,
    )
    return q, scales, d_row_weight
