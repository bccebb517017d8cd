"""dw[l] = y[rows of l].T @ x[rows of l] on Hopper, or +=: every value of the gradient so far, bf16
or an fp32 main_grad, is read and written once, in L2.

    loader     one warp: draws tiles, tells all others of them, loads y and x by TMA
    computing  two warpgroups of 64 x 256 results each, which share the wider operand
    carrier    one warp for each of them: takes its results from shared memory to dw

For an fp32 dw the wide side of a tile is dw's rows. A thread of a product has results in pairs
along the wide side: fp32 strips then meet no bank of shared memory twice, where 8 bytes a thread in
swizzled rows of 128 do. Two-byte results are stored as they lie, or rounded and then added.

At E64 T32768 H7168 I2048 the products of W13 take 2.6 ms at full speed, but 7.5 GB of main_grad
have to be read and written, 3.5 ms of DRAM: docs/measured/experts.md.
"""

from dataclasses import dataclass, replace

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
from ..launch.compat import async_load, async_reduce_add, async_store, barrier
from ..launch.descriptors import describe
from ..launch.shared_memory import (
    allocate,
    allocate_barriers,
    allocate_integers,
    matrix,
    receive,
    send,
)
from ..launch.sm_sharing import program_limit, tile_counter
from .tiles_hopper import DRAW_AHEAD, GONE, draw, look_at_limit, prefetch, split_columns

WIDE = gl.constexpr(256)  # columns of a warpgroup's results: 128 registers a thread
GROUP = gl.constexpr(8)  # tiles along the wide side that share the narrow operand in L2

# Integers of a tile: steps along the rows (0 after the last tile), expert, first row and column.
FACTS = gl.constexpr(4)
FACT_SLOTS = gl.constexpr(4)


@dataclass(frozen=True, kw_only=True)
class WgradConfig:
    """Compile-time shape of the kernel.

    block_k   rows of y and x of a step
    stages    steps in flight, 0.75 block_k KiB each
    strip     of the 256 results along the wide side that a buffer holds: 64 x strip of them
    buffers   of each warpgroup; a warpgroup goes on when all its results are in buffers
    prefetch  dw's old values into L2 as soon as a tile is known
    """

    block_k: int = 64
    stages: int = 4
    strip: int = 32
    buffers: int = 2
    prefetch: bool = False


# Shared memory in KiB: 0.75 stages block_k, and strip · buffers / 2 for fp32, half that for bf16.
MAIN_GRAD = WgradConfig()  # 192 + 32
BF16 = WgradConfig(stages=3, strip=64, buffers=4)  # 144 + 64: all results
# With few rows an expert, DRAM bounds a sum's time and old values better come early: 10 to 20 % at
# 512 rows. At 2048 they drive operands out of L2: 5 to 8 % lost in fp32, 2 % in bf16.
FEW_ROWS = 1024


@gluon.jit
def load_operands(
    a_desc,
    b_desc,
    smem,
    barriers,
    offsets,
    drawn_from,
    sizes,
    ACCUMULATE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The loading warp. Tiles count expert by expert; when accumulating, only experts with rows."""
    num_experts, num_a, num_b, rows = sizes
    counter, limit_ptr = drawn_from
    a_smem, b_smem, strips, facts_smem = smem
    full, empty, facts_full, facts_empty = barriers
    TURNED: gl.constexpr = strips.dtype == gl.float32
    BLOCK_K: gl.constexpr = a_desc.block_type.shape[0]
    NARROW: gl.constexpr = a_desc.block_type.shape[1]
    stage_bytes: gl.constexpr = 2 * a_desc.block_type.nbytes + b_desc.block_type.nbytes
    tiles_an_expert = num_a * num_b

    drawn = draw(counter, look_at_limit(limit_ptr))
    count = 0
    step = 0
    # `rank` experts before `expert` have tiles.
    expert = 0
    rank = 0
    start = gl.load(offsets)
    end = gl.load(offsets + 1)
    while expert < num_experts:
        tile = gl.sum(drawn, 0)
        wanted = tile // tiles_an_expert
        if tile == GONE:
            expert = num_experts
        elif ACCUMULATE:
            while (expert < num_experts) & ((end <= start) | (rank < wanted)):
                if end > start:
                    rank += 1
                expert += 1
                start = end
                end = gl.load(offsets + min(expert + 1, num_experts))
        else:
            expert = wanted
            start = gl.load(offsets + min(expert, num_experts))
            end = gl.load(offsets + min(expert + 1, num_experts))
        if expert < num_experts:
            inside = tile - wanted * tiles_an_expert
            group = inside // (GROUP * num_a)
            inside -= group * GROUP * num_a
            width = min(num_b - group * GROUP, GROUP)
            i = inside // width
            a = i * (2 * NARROW)
            b = (group * GROUP + inside - i * width) * WIDE
            row = start
            num_k = (end - start) // BLOCK_K
            if num_k == 0:
                # Zeros to store: past the end, where TMA reads them.
                row = rows
                num_k = 1
            slot = count % FACT_SLOTS
            mbarrier.wait(facts_empty.index(slot), (count // FACT_SLOTS & 1) ^ 1)
            if TURNED:
                send(facts_smem, slot, (num_k, expert, b, a), FACTS)
            else:
                send(facts_smem, slot, (num_k, expert, a, b), FACTS)
            mbarrier.arrive(facts_full.index(slot))
            count += 1
            limit = look_at_limit(limit_ptr)
            for k in range(num_k):
                if k == max(num_k - DRAW_AHEAD, 0):
                    drawn = draw(counter, limit)
                slot = step % STAGES
                mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
                here = full.index(slot)
                mbarrier.expect(here, stage_bytes)
                async_load(b_desc, [row, b], here, b_smem.index(slot))
                for w in gl.static_range(2):
                    buffer = a_smem.index(2 * slot + w)
                    async_load(a_desc, [row, a + w * NARROW], here, buffer)
                row += BLOCK_K
                step += 1
    slot = count % FACT_SLOTS
    mbarrier.wait(facts_empty.index(slot), (count // FACT_SLOTS & 1) ^ 1)
    send(facts_smem, slot, (0, 0, 0, 0), FACTS)
    mbarrier.arrive(facts_full.index(slot))


@gluon.jit
def leave_strips(acc, strips, full, empty, count, FIRST: gl.constexpr, W: gl.constexpr):
    """Copies acc [64, columns] to its strips in shared memory, the first of which is FIRST."""
    BUFFERS: gl.constexpr = strips.shape[0] // 2
    STRIP: gl.constexpr = strips.shape[2] * strips.shape[3] // 64
    columns: gl.constexpr = acc.shape[1]
    if columns > STRIP:
        left, right = split_columns(acc)
        middle: gl.constexpr = FIRST + columns // STRIP // 2
        leave_strips(left, strips, full, empty, count, FIRST, W)
        leave_strips(right, strips, full, empty, count, middle, W)
    else:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STRIP, 16])
        slot: gl.constexpr = W * BUFFERS + FIRST % BUFFERS
        turns: gl.constexpr = WIDE // STRIP // BUFFERS
        turn: gl.constexpr = FIRST // BUFFERS
        buffer = matrix(strips, slot)
        if strips.dtype == gl.float32:
            buffer = buffer.permute((1, 0))
        mbarrier.wait(empty.index(slot), (count * turns + turn & 1) ^ 1)
        buffer.store(gl.convert_layout(acc, layout, assert_trivial=True).to(strips.dtype))
        fence_async_shared()
        barrier()
        mbarrier.arrive(full.index(slot))


@gluon.jit
def compute_tiles(smem, barriers, strip_barriers, W: gl.constexpr, STAGES: gl.constexpr):
    """Warpgroup W: its 64 of the narrow side, times 256."""
    a_smem, b_smem, strips, facts_smem = smem
    full, empty, facts_full, facts_empty = barriers
    strip_full, strip_empty = strip_barriers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])

    count = 0
    step = 0
    mbarrier.wait(facts_full.index(0), 0)
    num_k = receive(facts_smem, 0, 0, FACTS, 4)
    while num_k > 0:
        acc = gl.zeros([64, WIDE], gl.float32, layout)
        for k in range(num_k):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            a = a_smem.index(2 * slot + W).permute((1, 0))
            acc = warpgroup_mma(a, b_smem.index(slot), acc, is_async=True)
            # The product before this one has ended: its stage may be filled again.
            acc = warpgroup_mma_wait(1, (acc,))
            if k > 0:
                mbarrier.arrive(empty.index((step - 1) % STAGES))
            step += 1
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index((step - 1) % STAGES))
        leave_strips(acc, strips, strip_full, strip_empty, count, 0, W)
        mbarrier.arrive(facts_empty.index(count % FACT_SLOTS))
        count += 1
        slot = count % FACT_SLOTS
        mbarrier.wait(facts_full.index(slot), count // FACT_SLOTS & 1)
        num_k = receive(facts_smem, slot, 0, FACTS, 4)


@gluon.jit
def prefetch_tile(dw_ptr, expert, m, n, M, N, TURNED: gl.constexpr):
    """Asks for a warpgroup's part of dw in L2."""
    ROWS: gl.constexpr = WIDE if TURNED else 64
    COLUMNS: gl.constexpr = 64 if TURNED else WIDE
    SIZE: gl.constexpr = 4 if TURNED else 2
    rows = gl.minimum(m + gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [1], [0])), M - 1)
    if n < N:
        first = dw_ptr + (gl.cast(expert, gl.int64) * M * N + n)
        prefetch(first + rows.to(gl.int64) * N, rows * 0 + SIZE * min(N - n, COLUMNS))


@gluon.jit
def carry_strips(
    dw_desc,
    dw_ptr,
    M,
    N,
    smem,
    barriers,
    strip_barriers,
    W: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    PREFETCH: gl.constexpr,
):
    """The warp that takes warpgroup W's results away. A tile uses each buffer `turns` times."""
    _a_smem, _b_smem, strips, facts_smem = smem
    _full, _empty, facts_full, facts_empty = barriers
    full, empty = strip_barriers
    BUFFERS: gl.constexpr = strips.shape[0] // 2
    STRIP: gl.constexpr = strips.shape[2] * strips.shape[3] // 64
    TURNED: gl.constexpr = strips.dtype == gl.float32
    turns: gl.constexpr = WIDE // STRIP // BUFFERS

    count = 0
    mbarrier.wait(facts_full.index(0), 0)
    while receive(facts_smem, count % FACT_SLOTS, 0, FACTS, 1) > 0:
        slot = count % FACT_SLOTS
        expert = receive(facts_smem, slot, 1, FACTS, 1)
        m = receive(facts_smem, slot, 2, FACTS, 1)
        n = receive(facts_smem, slot, 3, FACTS, 1)
        mbarrier.arrive(facts_empty.index(slot))
        if TURNED:
            n += W * 64
        else:
            m += W * 64
        if PREFETCH:
            prefetch_tile(dw_ptr, expert, m, n, M, N, TURNED)
        for turn in gl.static_range(turns):
            for b in gl.static_range(BUFFERS):
                mbarrier.wait(full.index(W * BUFFERS + b), count * turns + turn & 1)
                strip = (turn * BUFFERS + b) * STRIP
                place = [expert, m + strip, n] if TURNED else [expert, m, n + strip]
                if ACCUMULATE:
                    async_reduce_add(dw_desc, place, strips.index(W * BUFFERS + b))
                else:
                    async_store(dw_desc, place, strips.index(W * BUFFERS + b))
            for b in gl.static_range(BUFFERS):
                tma.store_wait(BUFFERS - 1 - b)
                mbarrier.arrive(empty.index(W * BUFFERS + b))
        count += 1
        mbarrier.wait(facts_full.index(count % FACT_SLOTS), count // FACT_SLOTS & 1)


@cache_launches(in_pairs=True)
@gluon.jit(
    do_not_specialize=["num_experts", "num_a", "num_b", "rows", "M", "N"],
    do_not_specialize_on_alignment=["offsets_table"],
)
def grouped_wgrad_hopper_kernel(
    a_desc,
    b_desc,
    dw_desc,
    dw_ptr,
    offsets_table,
    counter_ptr,
    limit_ptr,
    num_experts,
    num_a,
    num_b,
    rows,
    M,
    N,
    ACCUMULATE: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
    PREFETCH: gl.constexpr,
):
    a_smem = allocate(a_desc, 2 * STAGES)
    b_smem = allocate(b_desc, STAGES)
    strips = allocate(dw_desc, 2 * BUFFERS)
    facts_smem = allocate_integers(FACT_SLOTS * FACTS)
    full = allocate_barriers(STAGES, 1)
    empty = allocate_barriers(STAGES, 2)
    facts_full = allocate_barriers(FACT_SLOTS, 1)
    # Two warpgroups and two carriers read them.
    facts_empty = allocate_barriers(FACT_SLOTS, 4)
    strip_barriers = (allocate_barriers(2 * BUFFERS, 1), allocate_barriers(2 * BUFFERS, 1))
    barriers = (full, empty, facts_full, facts_empty)
    sizes = (num_experts, num_a, num_b, rows)
    smem = (a_smem, b_smem, strips, facts_smem)
    gl.warp_specialize(
        [
            (
                compute_tiles,
                (smem, barriers, strip_barriers, gl.constexpr(0), STAGES),
            ),
            (
                compute_tiles,
                (smem, barriers, strip_barriers, gl.constexpr(1), STAGES),
            ),
            (
                load_operands,
                (a_desc, b_desc, smem, barriers, offsets_table, (counter_ptr, limit_ptr), sizes,
                 ACCUMULATE, STAGES),
            ),
            (
                carry_strips,
                (dw_desc, dw_ptr, M, N, smem, barriers, strip_barriers, gl.constexpr(0),
                 ACCUMULATE, PREFETCH),
            ),
            (
                carry_strips,
                (dw_desc, dw_ptr, M, N, smem, barriers, strip_barriers, gl.constexpr(1),
                 ACCUMULATE, PREFETCH),
            ),
        ],
        [4, 1, 1, 1],
        [232, 40, 40, 40],
    )  # fmt: skip


def grouped_wgrad_hopper(
    y: torch.Tensor,
    x: torch.Tensor,
    expert_offsets: torch.Tensor,
    dw: torch.Tensor,
    *,
    accumulate: bool,
    num_sms: int,
    config: WgradConfig | None = None,
) -> torch.Tensor:
    """dw[l] = y_l.T @ x_l, or += with `accumulate`.

    y   [R, M], x [R, N] bf16 or fp16; rows that pad an expert must be zero in one and finite in the
        other
    dw  [L, M, N] contiguous, the dtype of y, or fp32 with `accumulate`. An expert without rows gets
        zeros, or keeps its values
    """
    (R, M), N, L = y.shape, x.shape[1], dw.shape[0]
    turned = dw.dtype == torch.float32
    if config is None:
        config = MAIN_GRAD if turned else BF16
        if accumulate and R // L < FEW_ROWS:
            config = replace(config, prefetch=True)
    a, b = (x, y) if turned else (y, x)
    strip = [1, config.strip, 64] if turned else [1, 64, config.strip]
    num_a = ceil_div(a.shape[1], 128)
    num_b = ceil_div(b.shape[1], 256)
    grouped_wgrad_hopper_kernel[(max(1, min(num_sms, L * num_a * num_b)),)](
        describe(a, [config.block_k, 64]),
        describe(b, [config.block_k, 256]),
        describe(dw, strip),
        dw,
        expert_offsets,
        tile_counter(y.device),
        program_limit(y.device),
        L,
        num_a,
        num_b,
        R,
        M,
        N,
        ACCUMULATE=accumulate,
        STAGES=config.stages,
        BUFFERS=config.buffers,
        PREFETCH=config.prefetch,
        num_warps=4,
    )
    return dw
