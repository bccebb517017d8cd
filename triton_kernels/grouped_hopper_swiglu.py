"""grouped_swiglu.py's two GEMMs on Hopper, with SwiGLU under the tensor cores' work.

The formulas are in that file; the pipeline is grouped_hopper.py's. Two warps of their own take a
finished tile from shared memory in strips of 16 rows and 64 columns: gate and up, of which they
make act; or d = dout @ w2, whose gate and up they have loaded two strips ahead, in registers.

Two warps take 22 instructions a number (sm_90), 11,200 issue slots of each warp for a tile, beside
33,000 clocks of the tensor cores at K = 2048. More warps cannot be had: a warpgroup's 64 × 256 sums
need 154 registers a thread, which ptxas allows in launches of up to three warpgroups. d leaves for
shared memory rounded as the output is, as a backward that stores it rounds it.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .attention_tiles import shared_layout
from .grouped_hopper import (
    BLOCK_M,
    BLOCK_N,
    CHUNK,
    CHUNKS,
    FACT_SLOTS,
    HopperConfig,
    allocate_pipeline,
    describe,
    describe_operands,
    load_tiles,
    multiply_tiles,
    receive,
    tile_counter,
)

GATE_UP = HopperConfig()
SWIGLU_BACKWARD = HopperConfig()

STRIP = gl.constexpr(16)  # rows of a strip
STRIPS = gl.constexpr(8)  # strips below each other in a tile
WARPS = gl.constexpr(2)
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def sigmoid(x):
    """By exp2 and reciprocal as the hardware has them (2 ulp): a division takes 6 instructions."""
    e = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -LOG2_E], gl.float32, is_pure=True, pack=1
    )
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1 + e], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def activation_tiles(
    act_ptr,
    gate_desc,
    up_desc,
    row_weight_ptr,
    d_smem,
    facts_smem,
    barriers,
    eighth,
    SAVE: gl.constexpr,
):
    """WARPS warps: a finished tile is 128 gates and the same columns' ups.

    They leave by TMA as they are, and as silu(gate) * up * row_weight.
    """
    _full, _empty, facts_full, facts_empty, d_full, d_empty = barriers
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    HALF: gl.constexpr = STRIPS // 2
    PAIRS: gl.constexpr = CHUNKS // 2
    I = eighth * 8  # noqa: E741
    strips = d_smem._reinterpret(d_smem.dtype, [STRIPS * CHUNKS, STRIP, CHUNK], d_smem.layout)
    rows = gl.arange(0, STRIP, gl.SliceLayout(1, layout))
    columns = gl.arange(0, CHUNK, gl.SliceLayout(0, layout))

    count = 0
    mbarrier.wait(facts_full.index(0), 0)
    while receive(facts_smem, count % FACT_SLOTS, 0, WARPS) > 0:
        slot = count % FACT_SLOTS
        m = receive(facts_smem, slot, 1, WARPS)
        n = receive(facts_smem, slot, 2, WARPS) * (CHUNK * PAIRS)
        gl.thread_barrier()
        mbarrier.arrive(facts_empty.index(slot))
        first = act_ptr + (gl.cast(m, gl.int64) * I + n)
        weight = gl.load(row_weight_ptr + m + rows)
        for w in range(2):
            mbarrier.wait(d_full.index(w), count & 1)
            if SAVE:
                for c in gl.static_range(PAIRS):
                    place = [m + w * 64, n + c * CHUNK]
                    gate_chunk = d_smem.index(w * CHUNKS + c)
                    up_chunk = d_smem.index(w * CHUNKS + PAIRS + c)
                    tma.async_copy_shared_to_global(gate_desc, place, gate_chunk)
                    tma.async_copy_shared_to_global(up_desc, place, up_chunk)
            for inside in range(HALF):
                block = w * HALF + inside
                weight_1 = gl.load(row_weight_ptr + m + min(block + 1, STRIPS - 1) * STRIP + rows)
                places = gl.expand_dims(block * STRIP + rows, 1) * I
                for c in gl.static_range(PAIRS):
                    gate = strips.index((w * CHUNKS + c) * HALF + inside).load(layout)
                    up = strips.index((w * CHUNKS + PAIRS + c) * HALF + inside).load(layout)
                    gate = gate.to(gl.float32)
                    act = gate * sigmoid(gate) * up.to(gl.float32) * gl.expand_dims(weight, 1)
                    column = gl.expand_dims(c * CHUNK + columns, 0)
                    gl.store(first + places + column, act.to(d_smem.dtype), mask=column < I - n)
                weight = weight_1
            if SAVE:
                tma.store_wait(0)
            gl.thread_barrier()
            mbarrier.arrive(d_empty.index(w))
        count += 1
        mbarrier.wait(facts_full.index(count % FACT_SLOTS), count // FACT_SLOTS & 1)


@gluon.jit
def strip_places(strip, width, stride):
    """Offsets of a strip's numbers from a tile's first, and which columns are below `width`.

    Strips run along a row of four first. Past the last strip there is nothing.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    row = strip // CHUNKS * STRIP
    column = strip % CHUNKS * CHUNK
    if strip >= STRIPS * CHUNKS:
        width = 0
    rows = row + gl.arange(0, STRIP, gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, CHUNK, gl.SliceLayout(0, layout))
    places = gl.expand_dims(rows, 1) * stride + gl.expand_dims(columns, 0)
    return places, gl.expand_dims(columns < width, 0)


@gluon.jit
def load_strip(gate, up, strip, width, stride):
    places, exist = strip_places(strip, width, stride)
    return (
        gl.load(gate + places, mask=exist, other=0.0),
        gl.load(up + places, mask=exist, other=0.0),
    )


@gluon.jit
def backward(d, gate, up, weight):
    """d_gate, d_up and d silu(gate) up of a strip: 13 instructions a number beside conversions."""
    gate = gate.to(gl.float32)
    up = up.to(gl.float32)
    s = sigmoid(gate)
    d_s = d * s
    d_silu = d_s * gate
    d_gate = (d_s + d_silu - s * d_silu) * up * weight
    return d_gate, d_silu * weight, d_silu * up


@gluon.jit
def swiglu_backward_tiles(
    gate_up_ptr,
    d_gate_up_ptr,
    row_weight_ptr,
    parts_ptr,
    d_smem,
    facts_smem,
    barriers,
    eighth,
    R,
):
    """WARPS warps: d_gate, d_up and each row's part of d_row_weight. `eighth` is I / 8."""
    _full, _empty, facts_full, facts_empty, d_full, d_empty = barriers
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    I = eighth * 8  # noqa: E741 (so the compiler knows that 16 bytes never cross the end)
    # Strips of the chunks' rows: the same bytes.
    strips = d_smem._reinterpret(d_smem.dtype, [STRIPS * CHUNKS, STRIP, CHUNK], d_smem.layout)
    HALF: gl.constexpr = STRIPS // 2
    rows = gl.arange(0, STRIP, gl.SliceLayout(1, layout))

    count = 0
    mbarrier.wait(facts_full.index(0), 0)
    while receive(facts_smem, count % FACT_SLOTS, 0, WARPS) > 0:
        slot = count % FACT_SLOTS
        m = receive(facts_smem, slot, 1, WARPS)
        n_tile = receive(facts_smem, slot, 2, WARPS)
        gl.thread_barrier()
        mbarrier.arrive(facts_empty.index(slot))
        n = n_tile * (CHUNK * CHUNKS)
        width = I - n
        first = gl.cast(m, gl.int64) * (2 * I) + n
        gate_ptr = gate_up_ptr + first
        up_ptr = gate_ptr + I
        d_gate_ptr = d_gate_up_ptr + first
        d_up_ptr = d_gate_ptr + I
        parts = parts_ptr + gl.cast(n_tile, gl.int64) * R + m
        gate, up = load_strip(gate_ptr, up_ptr, 0, width, 2 * I)
        gate_1, up_1 = load_strip(gate_ptr, up_ptr, 1, width, 2 * I)
        weight = gl.load(row_weight_ptr + m + rows)
        for w in range(2):
            mbarrier.wait(d_full.index(w), count & 1)
            for inside in range(HALF):
                block = w * HALF + inside
                weight_1 = gl.load(row_weight_ptr + m + min(block + 1, STRIPS - 1) * STRIP + rows)
                products = gl.zeros([STRIP, CHUNK], gl.float32, layout)
                for chunk in gl.static_range(CHUNKS):
                    strip = block * CHUNKS + chunk
                    gate_2, up_2 = load_strip(gate_ptr, up_ptr, strip + 2, width, 2 * I)
                    d = strips.index((w * CHUNKS + chunk) * HALF + inside).load(layout)
                    d = d.to(gl.float32)
                    d_gate, d_up, product = backward(d, gate, up, gl.expand_dims(weight, 1))
                    products += product
                    places, exist = strip_places(strip, width, 2 * I)
                    gl.store(d_gate_ptr + places, d_gate.to(gate.dtype), mask=exist)
                    gl.store(d_up_ptr + places, d_up.to(gate.dtype), mask=exist)
                    gate, up, gate_1, up_1 = gate_1, up_1, gate_2, up_2
                gl.store(parts + block * STRIP + rows, gl.sum(products, 1))
                weight = weight_1
            gl.thread_barrier()
            mbarrier.arrive(d_empty.index(w))
        count += 1
        mbarrier.wait(facts_full.index(count % FACT_SLOTS), count // FACT_SLOTS & 1)


@gluon.jit(
    do_not_specialize=["num_experts", "K", "eighth", "R"],
    do_not_specialize_on_alignment=["row_weight_ptr", "offsets_ptr", "counter_ptr"],
)
def swiglu_backward_hopper_kernel(
    d_out_desc,
    w2_desc,
    gate_up_ptr,
    d_gate_up_ptr,
    row_weight_ptr,
    parts_ptr,
    offsets_ptr,
    counter_ptr,
    num_experts,
    K,
    eighth,
    R,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    GROUP_M: gl.constexpr,
    STEPS: gl.constexpr,
    DYNAMIC: gl.constexpr,
):
    rows, weight, d, facts, barriers = allocate_pipeline(d_out_desc, w2_desc, STAGES)
    gl.warp_specialize(
        [
            (
                multiply_tiles,
                (rows, weight, d, facts, barriers, K, gl.constexpr(0), False, False, STAGES),
            ),
            (
                multiply_tiles,
                (rows, weight, d, facts, barriers, K, gl.constexpr(1), False, False, STAGES),
            ),
            (
                swiglu_backward_tiles,
                (gate_up_ptr, d_gate_up_ptr, row_weight_ptr, parts_ptr, d, facts, barriers, eighth,
                 R),
            ),
            (
                load_tiles,
                (d_out_desc, w2_desc, rows, weight, facts, barriers, offsets_ptr, counter_ptr,
                 num_experts, eighth * 8, K, False, STAGES, ROWS, GROUP_M, STEPS, DYNAMIC),
            ),
        ],
        [4, 2, 1],
        [168, 168, 168],
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=["num_experts", "K", "eighth"],
    do_not_specialize_on_alignment=["row_weight_ptr", "offsets_ptr", "counter_ptr"],
)
def gate_up_hopper_kernel(
    rows_desc,
    w13_desc,
    gate_desc,
    up_desc,
    act_ptr,
    row_weight_ptr,
    offsets_ptr,
    counter_ptr,
    num_experts,
    K,
    eighth,
    SAVE: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    GROUP_M: gl.constexpr,
    STEPS: gl.constexpr,
    DYNAMIC: gl.constexpr,
):
    rows, weight, d, facts, barriers = allocate_pipeline(rows_desc, w13_desc, STAGES)
    gl.warp_specialize(
        [
            (
                multiply_tiles,
                (rows, weight, d, facts, barriers, K, gl.constexpr(0), True, SAVE, STAGES),
            ),
            (
                multiply_tiles,
                (rows, weight, d, facts, barriers, K, gl.constexpr(1), True, SAVE, STAGES),
            ),
            (
                activation_tiles,
                (act_ptr, gate_desc, up_desc, row_weight_ptr, d, facts, barriers, eighth, SAVE),
            ),
            (
                load_tiles,
                (rows_desc, w13_desc, rows, weight, facts, barriers, offsets_ptr, counter_ptr,
                 num_experts, eighth * 16, K, True, STAGES, ROWS, GROUP_M, STEPS, DYNAMIC),
            ),
        ],
        [4, 2, 1],
        [168, 168, 168],
    )  # fmt: skip


def gate_up_hopper(
    rows: torch.Tensor,
    row_weight: torch.Tensor,
    w13: torch.Tensor,
    expert_offsets: torch.Tensor,
    act: torch.Tensor,
    gate_up: torch.Tensor | None,
    *,
    num_sms: int,
    config: HopperConfig | None = None,
) -> None:
    """As grouped_swiglu.grouped_gate_up; act is computed from the two as they are stored."""
    config = config or GATE_UP
    (R, H), L, I = rows.shape, w13.shape[0], act.shape[1]  # noqa: E741
    strip, box = [BLOCK_M // 2, 64], [2, BLOCK_N // 2, config.block_k]
    gate_desc = up_desc = describe(act, strip)
    if gate_up is not None:
        # Each half has its own bounds: a partial tile of gates does not run into the ups.
        gate_desc, up_desc = (
            TensorDescriptor(half, [R, I], [2 * I, 1], strip, shared_layout(strip, act.dtype))
            for half in (gate_up, gate_up[:, I:])
        )
    grid = (max(1, min(num_sms, R // BLOCK_M * triton.cdiv(2 * I, BLOCK_N))),)
    gate_up_hopper_kernel[grid](
        describe(rows, [BLOCK_M // 2, config.block_k]),
        # Matrices 2e and 2e + 1 are expert e's gate and up: one box brings 128 rows of both.
        TensorDescriptor(w13, [2 * L, I, H], [I * H, H, 1], box, shared_layout(box, w13.dtype)),
        gate_desc,
        up_desc,
        act,
        row_weight,
        expert_offsets,
        tile_counter(rows) if config.dynamic else expert_offsets,
        L,
        H,
        I // 8,
        SAVE=gate_up is not None,
        STAGES=config.stages,
        ROWS=BLOCK_M,
        GROUP_M=config.group_m,
        STEPS=(L - 1).bit_length(),
        DYNAMIC=config.dynamic,
        num_warps=4,
    )


def swiglu_backward_hopper(
    d_out: torch.Tensor,
    w2: torch.Tensor,
    gate_up: torch.Tensor,
    row_weight: torch.Tensor,
    expert_offsets: torch.Tensor,
    d_gate_up: torch.Tensor,
    *,
    num_sms: int,
    config: HopperConfig | None = None,
) -> torch.Tensor:
    """As grouped_swiglu.grouped_swiglu_backward."""
    config = config or SWIGLU_BACKWARD
    (R, H), (L, _, I) = d_out.shape, w2.shape  # noqa: E741
    num_n = triton.cdiv(I, BLOCK_N)
    # One fill for the parts and, behind them, the counter.
    scratch = torch.zeros(num_n * R + 1, dtype=torch.float32, device=d_out.device)
    parts, counter = scratch[:-1].view(num_n, R), scratch[-1:].view(torch.int32)
    rows_desc, weight_desc = describe_operands(d_out, w2, False, config.block_k)
    grid = (max(1, min(num_sms, R // BLOCK_M * num_n)),)
    swiglu_backward_hopper_kernel[grid](
        rows_desc,
        weight_desc,
        gate_up,
        d_gate_up,
        row_weight,
        parts,
        expert_offsets,
        counter,
        L,
        H,
        I // 8,
        R,
        STAGES=config.stages,
        ROWS=BLOCK_M,
        GROUP_M=config.group_m,
        STEPS=(L - 1).bit_length(),
        DYNAMIC=config.dynamic,
        num_warps=4,
    )
    return parts.sum(0)
