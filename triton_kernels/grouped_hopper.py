"""The grouped GEMM of Hopper: warps that load, warpgroups that multiply, warps that finish.

A tile of 128 rows and 256 columns passes through three kinds of warps, each on another tile:

    one warp         names the tile (its own number on, every num_programs-th, or drawn from a
                     counter) and loads both operands by TMA, 64 of K a stage
    two warpgroups   multiply, 64 rows each; their fp32 sums leave as two-byte numbers for 64 KiB of
                     shared memory, and the next tile begins
    the last         take them from there: `store_tiles` by TMA, or with SwiGLU or its backward
                     (grouped_hopper_swiglu.py)

so that tensor cores wait for the copy to shared memory alone, some 600 of the 33,000 clocks that
K = 2048 takes, whatever the epilogue does meanwhile.

Shared memory at 128 B a clock, per stage of 1,024 clocks at the tensor cores' full rate: 48 KiB
come in, two warpgroups read 64 × 64 and 64 × 256 each, 80 KiB. In all 128 B a clock: that is why a
warpgroup has 64 × 256 and not 128 × 128 (96 + 48) or tiles of its own (96 + 64).
"""

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .attention_tiles import (
    allocate,
    allocate_barriers,
    allocate_integers,
    send,
    shared_layout,
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
    dynamic  programs draw tiles from a counter, so that one that starts late, on an SM that
             communication held, takes what is left; else each has its share
    """

    block_k: int = 64
    stages: int = 3
    group_m: int = 16
    dynamic: bool = False


@gluon.jit
def locate_tile(
    tile,
    offsets_ptr,
    num_experts,
    num_n,
    ROWS: gl.constexpr,
    GROUP_M: gl.constexpr,
    STEPS: gl.constexpr,
):
    """Expert, first row and N tile of a tile number, in the order of tiles.locate_tile."""
    row = tile // num_n * ROWS
    expert = 0
    for step in gl.static_range(STEPS):
        middle = min(expert + (1 << (STEPS - 1 - step)), num_experts)
        if gl.load(offsets_ptr + middle) <= row:
            expert = middle
    start = gl.load(offsets_ptr + expert)
    num_m = (gl.load(offsets_ptr + expert + 1) - start) // ROWS
    inside = tile - start // ROWS * num_n
    group = inside // (GROUP_M * num_n)
    inside -= group * GROUP_M * num_n
    height = min(num_m - group * GROUP_M, GROUP_M)
    return expert, start + (group * GROUP_M + inside % height) * ROWS, inside // height


@gluon.jit
def receive(slots, slot, i: gl.constexpr, WARPS: gl.constexpr):
    """Integer i of a tile's facts."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.sum(slots.index(slot * FACTS + i).load(layout), 0)


@gluon.jit
def next_tile(tile, counter_ptr, DYNAMIC: gl.constexpr):
    """The tile after `tile`; -1 asks for the first."""
    if DYNAMIC:
        following = gl.atomic_add(counter_ptr, 1)
    else:
        following = tile + gl.num_programs(0)
        if tile < 0:
            following = gl.program_id(0)
    return following


@gluon.jit
def load_tiles(
    rows_desc,
    weight_desc,
    rows_smem,
    weight_smem,
    facts_smem,
    barriers,
    offsets_ptr,
    counter_ptr,
    num_experts,
    N,
    K,
    WEIGHT_IS_NK: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    GROUP_M: gl.constexpr,
    STEPS: gl.constexpr,
    DYNAMIC: gl.constexpr,
):
    """The loading warp."""
    full, empty, facts_full, facts_empty, _d_full, _d_empty = barriers
    WIDTH: gl.constexpr = CHUNK * CHUNKS
    DEPTH: gl.constexpr = rows_desc.block_type.shape[1]
    MATRICES: gl.constexpr = weight_desc.block_type.shape[0]
    stage_bytes: gl.constexpr = 2 * rows_desc.block_type.nbytes + weight_desc.block_type.nbytes
    num_n = (N + WIDTH - 1) // WIDTH
    num_k = (K + DEPTH - 1) // DEPTH
    num_tiles = gl.load(offsets_ptr + num_experts) // ROWS * num_n

    steps = 0
    count = 0
    tile = next_tile(-1, counter_ptr, DYNAMIC)
    while tile < num_tiles:
        expert, m, n_tile = locate_tile(tile, offsets_ptr, num_experts, num_n, ROWS, GROUP_M, STEPS)
        n = n_tile * (WIDTH // MATRICES)
        slot = count % FACT_SLOTS
        mbarrier.wait(facts_empty.index(slot), (count // FACT_SLOTS & 1) ^ 1)
        send(facts_smem, slot, (1, m, n_tile), FACTS)
        mbarrier.arrive(facts_full.index(slot))
        count += 1
        for k in range(num_k):
            slot = steps % STAGES
            mbarrier.wait(empty.index(slot), (steps // STAGES & 1) ^ 1)
            ready = full.index(slot)
            mbarrier.expect(ready, stage_bytes)
            for w in gl.static_range(2):
                place = [m + w * (ROWS // 2), k * DEPTH]
                tma.async_copy_global_to_shared(
                    rows_desc, place, ready, rows_smem.index(2 * slot + w)
                )
            # The expert is a dimension of its own: a partial N or K tile is filled with zeros and
            # never reads the next expert.
            matrix = expert * MATRICES
            place = [matrix, n, k * DEPTH] if WEIGHT_IS_NK else [matrix, k * DEPTH, n]
            tma.async_copy_global_to_shared(weight_desc, place, ready, weight_smem.index(slot))
            steps += 1
        tile = next_tile(tile, counter_ptr, DYNAMIC)
    # The others read the end off the last slot.
    slot = count % FACT_SLOTS
    mbarrier.wait(facts_empty.index(slot), (count // FACT_SLOTS & 1) ^ 1)
    send(facts_smem, slot, (0, 0, 0), FACTS)
    mbarrier.arrive(facts_full.index(slot))


@gluon.jit
def split_columns(x):
    """Left and right half of [rows, columns]: renames registers, an MMA thread has both halves."""
    rows: gl.constexpr = x.shape[0]
    half: gl.constexpr = x.shape[1] // 2
    return x.reshape([rows, 2, half]).permute((0, 2, 1)).split()


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
def multiply_tiles(
    rows_smem,
    weight_smem,
    d_smem,
    facts_smem,
    barriers,
    K,
    W: gl.constexpr,
    WEIGHT_IS_NK: gl.constexpr,
    LEAVES_BY_TMA: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Warpgroup W of two: rows 64 W to 64 W + 63 of every tile."""
    full, empty, facts_full, facts_empty, d_full, d_empty = barriers
    WIDTH: gl.constexpr = CHUNK * CHUNKS
    DEPTH: gl.constexpr = rows_smem.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    num_k = (K + DEPTH - 1) // DEPTH

    steps = 0
    count = 0
    mbarrier.wait(facts_full.index(0), 0)
    while receive(facts_smem, count % FACT_SLOTS, 0, 4) > 0:
        acc = gl.zeros([64, WIDTH], gl.float32, layout)
        for k in range(num_k):
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

        mbarrier.wait(d_empty.index(W), (count & 1) ^ 1)
        leave_chunks(d_smem, W * CHUNKS, acc.to(d_smem.dtype))
        if LEAVES_BY_TMA:
            fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(d_full.index(W))
        mbarrier.arrive(facts_empty.index(count % FACT_SLOTS))
        count += 1
        mbarrier.wait(facts_full.index(count % FACT_SLOTS), count // FACT_SLOTS & 1)


@gluon.jit
def store_tiles(out_desc, d_smem, facts_smem, barriers):
    """One warp: finished tiles leave as they are."""
    _full, _empty, facts_full, facts_empty, d_full, d_empty = barriers
    count = 0
    mbarrier.wait(facts_full.index(0), 0)
    while receive(facts_smem, count % FACT_SLOTS, 0, 1) > 0:
        slot = count % FACT_SLOTS
        m = receive(facts_smem, slot, 1, 1)
        n = receive(facts_smem, slot, 2, 1) * (CHUNK * CHUNKS)
        gl.thread_barrier()
        mbarrier.arrive(facts_empty.index(slot))
        for w in gl.static_range(2):
            mbarrier.wait(d_full.index(w), count & 1)
            for c in gl.static_range(CHUNKS):
                place = [m + w * 64, n + c * CHUNK]
                tma.async_copy_shared_to_global(out_desc, place, d_smem.index(w * CHUNKS + c))
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
    num_experts,
    N,
    K,
    WEIGHT_IS_NK: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    GROUP_M: gl.constexpr,
    STEPS: gl.constexpr,
    DYNAMIC: gl.constexpr,
):
    rows, weight, d, facts, barriers = allocate_pipeline(rows_desc, weight_desc, STAGES)
    gl.warp_specialize(
        [
            (
                multiply_tiles,
                (rows, weight, d, facts, barriers, K, gl.constexpr(0), WEIGHT_IS_NK, True, STAGES),
            ),
            (
                multiply_tiles,
                (rows, weight, d, facts, barriers, K, gl.constexpr(1), WEIGHT_IS_NK, True, STAGES),
            ),
            (store_tiles, (out_desc, d, facts, barriers)),
            (
                load_tiles,
                (rows_desc, weight_desc, rows, weight, facts, barriers, offsets_ptr, counter_ptr,
                 num_experts, N, K, WEIGHT_IS_NK, STAGES, ROWS, GROUP_M, STEPS, DYNAMIC),
            ),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )  # fmt: skip


def describe(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, x.shape, x.stride(), block, shared_layout(block, x.dtype))


def describe_operands(
    rows: torch.Tensor, weight: torch.Tensor, weight_is_nk: bool, block_k: int
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Boxes of a stage: a warpgroup's rows [64, block_k], and a tile's weights."""
    box = [1, BLOCK_N, block_k] if weight_is_nk else [1, block_k, BLOCK_N]
    return describe(rows, [BLOCK_M // 2, block_k]), describe(weight, box)


def tile_counter(like: torch.Tensor) -> torch.Tensor:
    """Where programs draw tile numbers from: zero before every launch."""
    return torch.zeros(1, dtype=torch.int32, device=like.device)


def grouped_gemm_hopper(
    rows: torch.Tensor,
    weight: torch.Tensor,
    expert_offsets: torch.Tensor,
    out: torch.Tensor,
    *,
    weight_is_nk: bool,
    num_sms: int,
    config: HopperConfig,
) -> torch.Tensor:
    """As grouped_gemm.grouped_gemm."""
    (R, K), L, N = rows.shape, weight.shape[0], out.shape[1]
    rows_desc, weight_desc = describe_operands(rows, weight, weight_is_nk, config.block_k)
    grid = (max(1, min(num_sms, R // BLOCK_M * triton.cdiv(N, BLOCK_N))),)
    grouped_gemm_hopper_kernel[grid](
        rows_desc,
        weight_desc,
        describe(out, [BLOCK_M // 2, 64]),
        expert_offsets,
        tile_counter(rows) if config.dynamic else expert_offsets,
        L,
        N,
        K,
        WEIGHT_IS_NK=weight_is_nk,
        STAGES=config.stages,
        ROWS=BLOCK_M,
        GROUP_M=config.group_m,
        STEPS=(L - 1).bit_length(),
        DYNAMIC=config.dynamic,
        num_warps=4,
    )
    return out
