"""The grouped GEMM of Hopper: warps that load, warpgroups that multiply, warps that finish.

A tile of 128 rows and 256 columns passes through three kinds of warps, each on another tile:

    one warp         names the tile (its own number on, every num_programs-th, or drawn from a
                     counter) and loads both operands by TMA, 64 of K a stage
    two warpgroups   multiply, 64 rows each; their fp32 sums leave as two-byte numbers for 64 KiB of
                     shared memory, and the next tile begins
    the last         take them from there: `store_tiles` by TMA, or with SwiGLU or its backward
                     (swiglu_hopper.py)

so that tensor cores wait for the copy to shared memory alone, some 600 of the 33,000 clocks that
K = 2048 takes, whatever the epilogue does meanwhile.

Shared memory at 128 B a clock, per stage of 1,024 clocks at the tensor cores' full rate: 48 KiB
come in, two warpgroups read 64 × 64 and 64 × 256 each, 80 KiB. In all 128 B a clock: that is why a
warpgroup has 64 × 256 and not 128 × 128 (96 + 48) or tiles of its own (96 + 64).
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..launch.arithmetic import ceil_div
from ..launch.cached import cache_launches
from ..launch.compat import GluonDescriptor, async_load, async_store, barrier
from ..launch.descriptors import describe
from ..launch.shared_memory import allocate, allocate_barriers, allocate_integers, receive, send
from ..launch.sm_sharing import program_limit, tile_counter
from .tiles_hopper import (
    DRAW_AHEAD,
    draw,
    load_starts,
    locate_tile,
    look_at_limit,
    register_steps,
    split_columns,
)

BLOCK_M = 128
BLOCK_N = 256
CHUNK = gl.constexpr(64)  # columns of a piece of a finished tile: what a row of 128 bytes holds
CHUNKS = gl.constexpr(4)
# Integers that the loading warp tells the others of a tile: whether there is one, its first row,
# its N tile. Slots for as many tiles as it may run ahead.
FACTS = gl.constexpr(3)
FACT_SLOTS = gl.constexpr(4)


@dataclass(frozen=True, kw_only=True)
class HopperConfig:
    """Compile-time shape of a kernel.

    block_k  K of a stage, 384 rows of it: 48 KiB for 64
    stages   in flight; besides, 64 KiB of finished tile: 208 of 227 KiB
    group_m  M tiles that share a strip of weights before the next N tile, for reuse in L2
    """

    block_k: int = 64
    stages: int = 3
    group_m: int = 16


LONG_STEPS = HopperConfig()
SHORT_STEPS = HopperConfig(block_k=32, stages=6)
# Short steps begin to multiply, and end, sooner: 5 % of the time at K = 768, where twelve long ones
# make a tile. With weights [K, N] they win or lose up to 2 %. With [N, K] and K from 1536 on they
# lose 2 to 4 %, and with SwiGLU or its backward up to 5 %.
SHORT_K = 1024


@gluon.jit
def load_tiles(
    rows_desc,
    weight_desc,
    rows_smem,
    weight_smem,
    facts_smem,
    barriers,
    offsets_ptr,
    drawn_from,
    num_experts,
    N,
    K,
    WEIGHT_IS_NK: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    GROUP_M: gl.constexpr,
    STEPS: gl.constexpr,
    TAKE_OVER: gl.constexpr,
):
    """The loading warp. `drawn_from`: the counter of tiles, and the limit of programs."""
    counter_ptr, limit_ptr = drawn_from
    full, empty, facts_full, facts_empty, _d_full, _d_empty = barriers
    WIDTH: gl.constexpr = CHUNK * CHUNKS
    DEPTH: gl.constexpr = rows_desc.block_type.shape[1]
    MATRICES: gl.constexpr = weight_desc.block_type.shape[0]
    stage_bytes: gl.constexpr = 2 * rows_desc.block_type.nbytes + weight_desc.block_type.nbytes
    num_n = (N + WIDTH - 1) // WIDTH
    num_k = (K + DEPTH - 1) // DEPTH
    end = gl.load(offsets_ptr + num_experts)
    num_tiles = end // ROWS * num_n
    starts = load_starts(offsets_ptr, num_experts, STEPS)

    steps = 0
    count = 0
    tile = gl.program_id(0)
    if TAKE_OVER:
        drawn = draw(counter_ptr, look_at_limit(limit_ptr))
        tile = gl.sum(drawn, 0)
    while tile < num_tiles:
        expert, m, n_tile = locate_tile(tile, starts, end, num_n, ROWS, GROUP_M)
        n = n_tile * (WIDTH // MATRICES)
        slot = count % FACT_SLOTS
        mbarrier.wait(facts_empty.index(slot), (count // FACT_SLOTS & 1) ^ 1)
        send(facts_smem, slot, (1, m, n_tile), FACTS)
        mbarrier.arrive(facts_full.index(slot))
        count += 1
        if TAKE_OVER:
            limit = look_at_limit(limit_ptr)
        for k in range(num_k):
            if TAKE_OVER and k == max(num_k - DRAW_AHEAD, 0):
                drawn = draw(counter_ptr, limit)
            slot = steps % STAGES
            mbarrier.wait(empty.index(slot), (steps // STAGES & 1) ^ 1)
            ready = full.index(slot)
            mbarrier.expect(ready, stage_bytes)
            for w in gl.static_range(2):
                place = [m + w * (ROWS // 2), k * DEPTH]
                async_load(rows_desc, place, ready, rows_smem.index(2 * slot + w))
            # The expert is a dimension of its own: a partial N or K tile is filled with zeros and
            # never reads the next expert.
            matrix = expert * MATRICES
            place = [matrix, n, k * DEPTH] if WEIGHT_IS_NK else [matrix, k * DEPTH, n]
            async_load(weight_desc, place, ready, weight_smem.index(slot))
            steps += 1
        if TAKE_OVER:
            tile = gl.sum(drawn, 0)
        else:
            tile += gl.num_programs(0)
    # The others read the end off the last slot.
    slot = count % FACT_SLOTS
    mbarrier.wait(facts_empty.index(slot), (count // FACT_SLOTS & 1) ^ 1)
    send(facts_smem, slot, (0, 0, 0), FACTS)
    mbarrier.arrive(facts_full.index(slot))


@gluon.jit
def leave_chunks(d_smem, slot, d):
    """Copies [64, columns] to d_smem[slot], d_smem[slot + 1], ... of [64, 64] each."""
    columns: gl.constexpr = d.shape[1]
    if columns == CHUNK:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
        d_smem.index(slot).store(gl.convert_layout(d, layout, assert_trivial=True))
    else:
        left, right = split_columns(d)
        leave_chunks(d_smem, slot, left)
        leave_chunks(d_smem, slot + columns // CHUNK // 2, right)


@gluon.jit
def multiply_tile(
    rows_smem,
    weight_smem,
    full,
    empty,
    steps,
    K,
    W: gl.constexpr,
    WEIGHT_IS_NK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Sums of warpgroup W, fp32 [64, 256], and the number of steps of K until now."""
    WIDTH: gl.constexpr = CHUNK * CHUNKS
    DEPTH: gl.constexpr = rows_smem.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    acc = gl.zeros([64, WIDTH], gl.float32, layout)
    for k in range((K + DEPTH - 1) // DEPTH):
        slot = steps % STAGES
        mbarrier.wait(full.index(slot), steps // STAGES & 1)
        weight = weight_smem.index(slot)
        if WEIGHT_IS_NK:
            weight = weight.reshape([WIDTH, DEPTH]).permute((1, 0))
        else:
            weight = weight.reshape([DEPTH, WIDTH])
        acc = warpgroup_mma(rows_smem.index(2 * slot + W), weight, acc, is_async=True)
        # The product before this one has ended: its stage may be filled again.
        acc = warpgroup_mma_wait(1, (acc,))
        if k > 0:
            mbarrier.arrive(empty.index((steps - 1) % STAGES))
        steps += 1
    acc = warpgroup_mma_wait(0, (acc,))
    mbarrier.arrive(empty.index((steps - 1) % STAGES))
    return acc, steps


@gluon.jit
def leave_tile(d_smem, acc, d_full, d_empty, count, W: gl.constexpr, BY_TMA: gl.constexpr):
    """Warpgroup W's sums of tile `count`, rounded, for those who finish it."""
    mbarrier.wait(d_empty.index(W), (count & 1) ^ 1)
    leave_chunks(d_smem, W * CHUNKS, acc.to(d_smem.dtype))
    if BY_TMA:
        fence_async_shared()
    barrier()
    mbarrier.arrive(d_full.index(W))


@gluon.jit
def multiply_tiles(
    rows_smem,
    weight_smem,
    d_smem,
    facts_smem,
    barriers,
    K,
    W: gl.constexpr,
    WEIGHT_IS_NK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Warpgroup W of two: rows 64 W to 64 W + 63 of every tile."""
    full, empty, facts_full, facts_empty, d_full, d_empty = barriers
    steps = 0
    count = 0
    mbarrier.wait(facts_full.index(0), 0)
    while receive(facts_smem, count % FACT_SLOTS, 0, FACTS, 4) > 0:
        acc, steps = multiply_tile(
            rows_smem, weight_smem, full, empty, steps, K, W, WEIGHT_IS_NK, STAGES
        )
        leave_tile(d_smem, acc, d_full, d_empty, count, W, True)
        mbarrier.arrive(facts_empty.index(count % FACT_SLOTS))
        count += 1
        mbarrier.wait(facts_full.index(count % FACT_SLOTS), count // FACT_SLOTS & 1)


@gluon.jit
def store_tiles(out_desc, d_smem, facts_smem, barriers):
    """One warp: finished tiles leave as they are."""
    _full, _empty, facts_full, facts_empty, d_full, d_empty = barriers
    count = 0
    mbarrier.wait(facts_full.index(0), 0)
    while receive(facts_smem, count % FACT_SLOTS, 0, FACTS, 1) > 0:
        slot = count % FACT_SLOTS
        m = receive(facts_smem, slot, 1, FACTS, 1)
        n = receive(facts_smem, slot, 2, FACTS, 1) * (CHUNK * CHUNKS)
        barrier()
        mbarrier.arrive(facts_empty.index(slot))
        for w in gl.static_range(2):
            mbarrier.wait(d_full.index(w), count & 1)
            for c in gl.static_range(CHUNKS):
                place = [m + w * 64, n + c * CHUNK]
                async_store(out_desc, place, d_smem.index(w * CHUNKS + c))
            tma.store_wait(0)
            mbarrier.arrive(d_empty.index(w))
        count += 1
        mbarrier.wait(facts_full.index(count % FACT_SLOTS), count // FACT_SLOTS & 1)


@gluon.jit
def allocate_pipeline(rows_desc, weight_desc, STAGES: gl.constexpr):
    """Stages of both operands, the finished tile, the facts, and their barriers."""
    rows_smem = allocate(rows_desc, 2 * STAGES)
    weight_smem = allocate(weight_desc, STAGES)
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    d_smem = gl.allocate_shared_memory(rows_desc.dtype, [2 * CHUNKS, 64, CHUNK], layout)
    facts_smem = allocate_integers(FACT_SLOTS * FACTS)
    full = allocate_barriers(STAGES, 1)
    empty = allocate_barriers(STAGES, 2)
    facts_full = allocate_barriers(FACT_SLOTS, 1)
    facts_empty = allocate_barriers(FACT_SLOTS, 3)
    d_full = allocate_barriers(2, 1)
    d_empty = allocate_barriers(2, 1)
    barriers = (full, empty, facts_full, facts_empty, d_full, d_empty)
    return rows_smem, weight_smem, d_smem, facts_smem, barriers


@cache_launches(in_pairs=True)
@gluon.jit(
    do_not_specialize=["num_experts", "N", "K"],
    do_not_specialize_on_alignment=["offsets_ptr", "counter_ptr"],
)
def grouped_gemm_hopper_kernel(
    rows_desc,
    weight_desc,
    out_desc,
    offsets_ptr,
    counter_ptr,
    limit_ptr,
    num_experts,
    N,
    K,
    WEIGHT_IS_NK: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    GROUP_M: gl.constexpr,
    STEPS: gl.constexpr,
    TAKE_OVER: gl.constexpr,
):
    rows, weight, d, facts, barriers = allocate_pipeline(rows_desc, weight_desc, STAGES)
    gl.warp_specialize(
        [
            (
                multiply_tiles,
                (rows, weight, d, facts, barriers, K, gl.constexpr(0), WEIGHT_IS_NK, STAGES),
            ),
            (
                multiply_tiles,
                (rows, weight, d, facts, barriers, K, gl.constexpr(1), WEIGHT_IS_NK, STAGES),
            ),
            (store_tiles, (out_desc, d, facts, barriers)),
            (
                load_tiles,
                (rows_desc, weight_desc, rows, weight, facts, barriers, offsets_ptr,
                 (counter_ptr, limit_ptr), num_experts, N, K, WEIGHT_IS_NK, STAGES, ROWS, GROUP_M,
                 STEPS, TAKE_OVER),
            ),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )  # fmt: skip


def describe_operands(
    rows: torch.Tensor, weight: torch.Tensor, weight_is_nk: bool, block_k: int
) -> tuple[GluonDescriptor, GluonDescriptor]:
    """Boxes of a stage: a warpgroup's rows [64, block_k], and a tile's weights."""
    box = [1, BLOCK_N, block_k] if weight_is_nk else [1, block_k, BLOCK_N]
    return describe(rows, [BLOCK_M // 2, block_k]), describe(weight, box)


def grouped_gemm_hopper(
    rows: torch.Tensor,
    weight: torch.Tensor,
    expert_offsets: torch.Tensor,
    out: torch.Tensor,
    *,
    weight_is_nk: bool,
    num_sms: int,
    take_over: bool = False,
    config: HopperConfig | None = None,
) -> torch.Tensor:
    """As grouped_gemm.grouped_gemm."""
    (R, K), L, N = rows.shape, weight.shape[0], out.shape[1]
    if config is None:
        config = LONG_STEPS if weight_is_nk and K > SHORT_K else SHORT_STEPS
    rows_desc, weight_desc = describe_operands(rows, weight, weight_is_nk, config.block_k)
    grid = (max(1, min(num_sms, R // BLOCK_M * ceil_div(N, BLOCK_N))),)
    grouped_gemm_hopper_kernel[grid](
        rows_desc,
        weight_desc,
        describe(out, [BLOCK_M // 2, 64]),
        expert_offsets,
        tile_counter(rows.device) if take_over else expert_offsets,
        program_limit(rows.device),
        L,
        N,
        K,
        WEIGHT_IS_NK=weight_is_nk,
        STAGES=config.stages,
        ROWS=BLOCK_M,
        GROUP_M=config.group_m,
        STEPS=register_steps(L),
        TAKE_OVER=take_over,
        num_warps=4,
    )
    return out
