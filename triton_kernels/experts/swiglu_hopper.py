"""swiglu.py's two GEMMs on Hopper, with SwiGLU under the tensor cores' work.

The formulas are in that file; the pipeline is gemm_hopper.py's. Two warps of their own take a
finished tile from shared memory in strips of 16 rows and 64 columns: gate and up, of which they
make act; or d = dout @ w2, whose gate and up they load 16 rows ahead, in registers (16 KiB in
flight), from L2, where the tile's have been asked for as a whole as soon as it was known.

Two warps take 22 instructions a number (sm_90), 11,200 issue slots of each warp for a tile, beside
33,000 clocks of the tensor cores at K = 2048. More warps cannot be had: a warpgroup's 64 × 256 sums
need 154 registers a thread, which ptxas allows in launches of up to three warpgroups. But a
program's last tile, beside which nothing is multiplied, is finished by the warpgroups themselves,
each its own half. d leaves for shared memory rounded as the output is, as a backward that stores it
rounds it.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..launch.arithmetic import ceil_div
from ..launch.cached import cache_launches
from ..launch.compat import async_store, barrier, reinterpret
from ..launch.descriptors import describe
from ..launch.shared_memory import receive
from ..launch.sm_sharing import program_limit, tile_counter
from .gemm_hopper import (
    BLOCK_M,
    BLOCK_N,
    CHUNK,
    CHUNKS,
    FACT_SLOTS,
    FACTS,
    LONG_STEPS,
    HopperConfig,
    allocate_pipeline,
    describe_operands,
    leave_tile,
    load_tiles,
    multiply_tile,
)
from .tiles_hopper import prefetch, register_steps

STRIP = gl.constexpr(16)  # rows of a strip
STRIPS = gl.constexpr(8)  # strips below each other in a tile
HALF = gl.constexpr(4)  # in a warpgroup's half of it
WARPS = gl.constexpr(2)  # that finish tiles beside the multiplying warpgroups
PARTS = gl.constexpr(8)  # of a row's d_row_weight that are loaded at once
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


# ---- Forward ----


@gluon.jit
def finish_activation(
    tensors, sizes, place, d_smem, barriers, first, last, SAVE: gl.constexpr, WARPS: gl.constexpr
):
    """Halves `first` to `last` - 1 of a tile: 128 gates and the same columns' ups.

    They leave by TMA as they are, and as silu(gate) * up * row_weight.
    """
    act_ptr, gate_desc, up_desc, row_weight_ptr = tensors
    m, n_tile, phase = place
    _full, _empty, _facts_full, _facts_empty, d_full, d_empty = barriers
    # 16 bytes a thread: a strip's rows of 128 bytes in one go.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    PAIRS: gl.constexpr = CHUNKS // 2
    I = sizes[0] * 8  # noqa: E741 (so the compiler knows that 16 bytes never cross the end)
    n = n_tile * (CHUNK * PAIRS)
    # Strips of the chunks' rows: the same bytes.
    strips = reinterpret(d_smem, d_smem.dtype, [STRIPS * CHUNKS, STRIP, CHUNK], d_smem.layout)
    rows = gl.arange(0, STRIP, gl.SliceLayout(1, layout))
    columns = gl.arange(0, CHUNK, gl.SliceLayout(0, layout))
    act = act_ptr + (gl.cast(m, gl.int64) * I + n)
    weight = gl.load(row_weight_ptr + m + first * (HALF * STRIP) + rows)
    for w in range(first, last):
        mbarrier.wait(d_full.index(w), phase)
        if SAVE:
            for c in gl.static_range(PAIRS):
                here = [m + w * 64, n + c * CHUNK]
                gate_chunk = d_smem.index(w * CHUNKS + c)
                up_chunk = d_smem.index(w * CHUNKS + PAIRS + c)
                async_store(gate_desc, here, gate_chunk)
                async_store(up_desc, here, up_chunk)
        for inside in range(HALF):
            block = w * HALF + inside
            weight_1 = gl.load(row_weight_ptr + m + min(block + 1, STRIPS - 1) * STRIP + rows)
            places = gl.expand_dims(block * STRIP + rows, 1) * I
            for c in gl.static_range(PAIRS):
                gate = strips.index((w * CHUNKS + c) * HALF + inside).load(layout)
                up = strips.index((w * CHUNKS + PAIRS + c) * HALF + inside).load(layout)
                gate = gate.to(gl.float32)
                value = gate * sigmoid(gate) * up.to(gl.float32) * gl.expand_dims(weight, 1)
                column = gl.expand_dims(c * CHUNK + columns, 0)
                gl.store(act + places + column, value.to(d_smem.dtype), mask=column < I - n)
            weight = weight_1
        if SAVE:
            tma.store_wait(0)
        barrier()
        mbarrier.arrive(d_empty.index(w))


# ---- Backward ----


@gluon.jit
def load_strip(gate_up, places, columns, width, c: gl.constexpr):
    """gate and up of a strip, chunk c of its rows' 256 columns, of which `width` exist."""
    gate_ptr, up_ptr = gate_up
    exist = gl.expand_dims(c * CHUNK + columns < width, 0)
    return (
        gl.load(gate_ptr + places + c * CHUNK, mask=exist, other=0.0),
        gl.load(up_ptr + places + c * CHUNK, mask=exist, other=0.0),
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
def add_parts(sums_ptr, row, R, num_n, WARPS: gl.constexpr):
    """d_row_weight of 64 rows, by the last program that has left its part of it.

    sums_ptr points to d_row_weight [R], how many parts each 64 rows have [R / 64] (fp32, too), the
    counter of tiles [1] and the parts [num_n, R]. These are added in the N tiles' order: the same
    bits in every run.
    """
    layout: gl.constexpr = gl.BlockedLayout([PARTS, 1], [1, 32], [1, WARPS], [0, 1])
    if gl.atomic_add(sums_ptr + R + row // 64, 1.0) == num_n - 1:
        rows = row + gl.arange(0, 64, gl.SliceLayout(0, layout))
        parts = sums_ptr + R + R // 64 + 1
        total = gl.zeros([64], gl.float32, gl.SliceLayout(0, layout))
        for t in range(0, num_n, PARTS):
            tiles = gl.expand_dims(t + gl.arange(0, PARTS, gl.SliceLayout(1, layout)), 1)
            places = tiles.to(gl.int64) * R + gl.expand_dims(rows, 0)
            total += gl.sum(gl.load(parts + places, mask=tiles < num_n, other=0.0), 0)
        gl.store(sums_ptr + rows, total)


@gluon.jit
def finish_gradient(tensors, sizes, place, d_smem, barriers, first, last, WARPS: gl.constexpr):
    """Halves `first` to `last` - 1 of a tile: d_gate, d_up and each row's part of d_row_weight."""
    gate_up_ptr, d_gate_up_ptr, row_weight_ptr, sums_ptr = tensors
    eighth, R = sizes
    m, n_tile, phase = place
    _full, _empty, _facts_full, _facts_empty, d_full, d_empty = barriers
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    I = eighth * 8  # noqa: E741
    strips = reinterpret(d_smem, d_smem.dtype, [STRIPS * CHUNKS, STRIP, CHUNK], d_smem.layout)
    rows = gl.arange(0, STRIP, gl.SliceLayout(1, layout))
    columns = gl.arange(0, CHUNK, gl.SliceLayout(0, layout))
    end = m + last * (HALF * STRIP)
    row = m + first * (HALF * STRIP)
    n = n_tile * (CHUNK * CHUNKS)
    width = I - n
    here = gl.cast(row, gl.int64) * (2 * I) + n
    gate_up = (gate_up_ptr + here, gate_up_ptr + here + I)
    d_gate_ptr = d_gate_up_ptr + here
    num_n = (I + CHUNK * CHUNKS - 1) // (CHUNK * CHUNKS)
    parts = sums_ptr + gl.cast(n_tile + 1, gl.int64) * R + R // 64 + 1
    places = gl.expand_dims(rows, 1) * (2 * I) + gl.expand_dims(columns, 0)
    ahead = ()
    for c in gl.static_range(CHUNKS):
        ahead = ahead + load_strip(gate_up, places, columns, width, c)
    weight = gl.load(row_weight_ptr + row + rows)
    for w in range(first, last):
        mbarrier.wait(d_full.index(w), phase)
        for inside in range(HALF):
            # Below the last rows there is nothing to load.
            width_1 = width
            if row + STRIP == end:
                width_1 = 0
            places_1 = places + STRIP * 2 * I
            weight_1 = gl.load(row_weight_ptr + min(row + STRIP, end - STRIP) + rows)
            row_sums = gl.zeros([STRIP], gl.float32, gl.SliceLayout(1, layout))
            now = ahead
            ahead = ()
            for c in gl.static_range(CHUNKS):
                d = strips.index((w * CHUNKS + c) * HALF + inside).load(layout).to(gl.float32)
                d_gate, d_up, product = backward(
                    d, now[2 * c], now[2 * c + 1], gl.expand_dims(weight, 1)
                )
                row_sums += gl.sum(product, 1)
                exist = gl.expand_dims(c * CHUNK + columns < width, 0)
                into = d_gate_ptr + places + c * CHUNK
                gl.store(into, d_gate.to(d_smem.dtype), mask=exist)
                gl.store(into + I, d_up.to(d_smem.dtype), mask=exist)
                ahead = ahead + load_strip(gate_up, places_1, columns, width_1, c)
            gl.store(parts + row + rows, row_sums)
            row += STRIP
            places = places_1
            weight = weight_1
        barrier()
        mbarrier.arrive(d_empty.index(w))
        add_parts(sums_ptr, row - HALF * STRIP, R, num_n, WARPS)


@gluon.jit
def prefetch_gate_up(gate_up_ptr, m, n, I):  # noqa: E741
    """Asks for a tile's gate and up in L2."""
    rows = m + gl.arange(0, STRIPS * STRIP, gl.BlockedLayout([1], [32], [WARPS], [0]))
    address = gate_up_ptr + (rows.to(gl.int64) * (2 * I) + n)
    size = rows * 0 + 2 * min(I - n, CHUNK * CHUNKS)
    prefetch(address, size)
    prefetch(address + I, size)


# ---- Both ----


@gluon.jit
def finish(
    tensors,
    sizes,
    place,
    d_smem,
    barriers,
    first,
    last,
    BACKWARD: gl.constexpr,
    SAVE: gl.constexpr,
    WARPS: gl.constexpr,
):
    if BACKWARD:
        finish_gradient(tensors, sizes, place, d_smem, barriers, first, last, WARPS)
    else:
        finish_activation(tensors, sizes, place, d_smem, barriers, first, last, SAVE, WARPS)


@gluon.jit
def finish_tiles(
    tensors, sizes, d_smem, facts_smem, barriers, BACKWARD: gl.constexpr, SAVE: gl.constexpr
):
    """WARPS warps: all tiles but the last."""
    _full, _empty, facts_full, facts_empty, _d_full, _d_empty = barriers
    count = 0
    mbarrier.wait(facts_full.index(0), 0)
    exists = receive(facts_smem, 0, 0, FACTS, WARPS)
    while exists > 0:
        slot = count % FACT_SLOTS
        m = receive(facts_smem, slot, 1, FACTS, WARPS)
        n_tile = receive(facts_smem, slot, 2, FACTS, WARPS)
        barrier()
        mbarrier.arrive(facts_empty.index(slot))
        if BACKWARD:
            prefetch_gate_up(tensors[0], m, n_tile * (CHUNK * CHUNKS), sizes[0] * 8)
        place = (m, n_tile, count & 1)
        # Known before this tile's products end: its loads have ended when the next tile is named.
        count += 1
        mbarrier.wait(facts_full.index(count % FACT_SLOTS), count // FACT_SLOTS & 1)
        exists = receive(facts_smem, count % FACT_SLOTS, 0, FACTS, WARPS)
        if exists > 0:
            finish(tensors, sizes, place, d_smem, barriers, 0, 2, BACKWARD, SAVE, WARPS)


@gluon.jit
def multiply_and_finish(
    rows_smem,
    weight_smem,
    tensors,
    sizes,
    d_smem,
    facts_smem,
    barriers,
    K,
    W: gl.constexpr,
    BACKWARD: gl.constexpr,
    SAVE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Warpgroup W of two: rows 64 W to 64 W + 63 of every tile, and what becomes of the last's."""
    full, empty, facts_full, facts_empty, d_full, d_empty = barriers
    steps = 0
    count = 0
    mbarrier.wait(facts_full.index(0), 0)
    while receive(facts_smem, count % FACT_SLOTS, 0, FACTS, 4) > 0:
        acc, steps = multiply_tile(
            rows_smem, weight_smem, full, empty, steps, K, W, not BACKWARD, STAGES
        )
        leave_tile(d_smem, acc, d_full, d_empty, count, W, SAVE)
        mbarrier.arrive(facts_empty.index(count % FACT_SLOTS))
        count += 1
        mbarrier.wait(facts_full.index(count % FACT_SLOTS), count // FACT_SLOTS & 1)
    if count > 0:
        # After the end the loading warp names nothing: the last tile's facts are still there.
        slot = (count - 1) % FACT_SLOTS
        m = receive(facts_smem, slot, 1, FACTS, 4)
        n_tile = receive(facts_smem, slot, 2, FACTS, 4)
        place = (m, n_tile, (count - 1) & 1)
        finish(tensors, sizes, place, d_smem, barriers, W, W + 1, BACKWARD, SAVE, 4)


@cache_launches(in_pairs=True)
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
    sums_ptr,
    offsets_ptr,
    counter_ptr,
    limit_ptr,
    num_experts,
    K,
    eighth,
    R,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    GROUP_M: gl.constexpr,
    STEPS: gl.constexpr,
    TAKE_OVER: gl.constexpr,
):
    rows, weight, d, facts, barriers = allocate_pipeline(d_out_desc, w2_desc, STAGES)
    tensors = (gate_up_ptr, d_gate_up_ptr, row_weight_ptr, sums_ptr)
    sizes = (eighth, R)
    gl.warp_specialize(
        [
            (
                multiply_and_finish,
                (rows, weight, tensors, sizes, d, facts, barriers, K, gl.constexpr(0), True, False,
                 STAGES),
            ),
            (
                multiply_and_finish,
                (rows, weight, tensors, sizes, d, facts, barriers, K, gl.constexpr(1), True, False,
                 STAGES),
            ),
            (finish_tiles, (tensors, sizes, d, facts, barriers, True, False)),
            (
                load_tiles,
                (d_out_desc, w2_desc, rows, weight, facts, barriers, offsets_ptr,
                 (counter_ptr, limit_ptr), num_experts, eighth * 8, K, False, STAGES, ROWS,
                 GROUP_M, STEPS, TAKE_OVER),
            ),
        ],
        [4, 2, 1],
        [168, 168, 168],
    )  # fmt: skip


@cache_launches(in_pairs=True)
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
    limit_ptr,
    num_experts,
    K,
    eighth,
    SAVE: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    GROUP_M: gl.constexpr,
    STEPS: gl.constexpr,
    TAKE_OVER: gl.constexpr,
):
    rows, weight, d, facts, barriers = allocate_pipeline(rows_desc, w13_desc, STAGES)
    tensors = (act_ptr, gate_desc, up_desc, row_weight_ptr)
    sizes = (eighth,)
    gl.warp_specialize(
        [
            (
                multiply_and_finish,
                (rows, weight, tensors, sizes, d, facts, barriers, K, gl.constexpr(0), False, SAVE,
                 STAGES),
            ),
            (
                multiply_and_finish,
                (rows, weight, tensors, sizes, d, facts, barriers, K, gl.constexpr(1), False, SAVE,
                 STAGES),
            ),
            (finish_tiles, (tensors, sizes, d, facts, barriers, False, SAVE)),
            (
                load_tiles,
                (rows_desc, w13_desc, rows, weight, facts, barriers, offsets_ptr,
                 (counter_ptr, limit_ptr), num_experts, eighth * 16, K, True, STAGES, ROWS,
                 GROUP_M, STEPS, TAKE_OVER),
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
    take_over: bool = False,
    config: HopperConfig | None = None,
) -> None:
    """As grouped_swiglu.grouped_gate_up; act is computed from the two as they are stored."""
    config = config or LONG_STEPS
    (R, H), L, I = rows.shape, w13.shape[0], act.shape[1]  # noqa: E741
    strip, box = [BLOCK_M // 2, 64], [2, BLOCK_N // 2, config.block_k]
    gate_desc = up_desc = describe(act, strip)
    if gate_up is not None:
        # Each half has its own bounds: a partial tile of gates does not run into the ups.
        gate_desc, up_desc = (
            describe(half, strip, (R, I), (2 * I, 1)) for half in (gate_up, gate_up[:, I:])
        )
    grid = (max(1, min(num_sms, R // BLOCK_M * ceil_div(2 * I, BLOCK_N))),)
    gate_up_hopper_kernel[grid](
        describe(rows, [BLOCK_M // 2, config.block_k]),
        # Matrices 2e and 2e + 1 are expert e's gate and up: one box brings 128 rows of both.
        describe(w13, box, (2 * L, I, H), (I * H, H, 1)),
        gate_desc,
        up_desc,
        act,
        row_weight,
        expert_offsets,
        tile_counter(rows.device) if take_over else expert_offsets,
        program_limit(rows.device),
        L,
        H,
        I // 8,
        SAVE=gate_up is not None,
        STAGES=config.stages,
        ROWS=BLOCK_M,
        GROUP_M=config.group_m,
        STEPS=register_steps(L),
        TAKE_OVER=take_over,
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
    take_over: bool = False,
    config: HopperConfig | None = None,
) -> torch.Tensor:
    """As grouped_swiglu.grouped_swiglu_backward."""
    config = config or LONG_STEPS
    (R, H), (L, _, I) = d_out.shape, w2.shape  # noqa: E741
    num_n = ceil_div(I, BLOCK_N)
    zeros = R + R // 64 + 1  # as add_parts says
    sums = torch.empty(zeros + num_n * R, dtype=torch.float32, device=d_out.device)
    sums[:zeros].zero_()
    rows_desc, weight_desc = describe_operands(d_out, w2, False, config.block_k)
    grid = (max(1, min(num_sms, R // BLOCK_M * num_n)),)
    swiglu_backward_hopper_kernel[grid](
        rows_desc,
        weight_desc,
        gate_up,
        d_gate_up,
        row_weight,
        sums,
        expert_offsets,
        sums[zeros - 1 : zeros].view(torch.int32),
        program_limit(d_out.device),
        L,
        H,
        I // 8,
        R,
        STAGES=config.stages,
        ROWS=BLOCK_M,
        GROUP_M=config.group_m,
        STEPS=register_steps(L),
        TAKE_OVER=take_over,
        num_warps=4,
    )
    return sums[:R]
