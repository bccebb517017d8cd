"""main_grad[l] += y[rows of l].T @ x[rows of l] on Hopper: fp32 read and written once.

At E64 T32768 H7168 I2048 the products take 2.6 ms at full speed, but 7.5 GB of main_grad have to
be read and written, 3.5 ms of DRAM: so old values are on their way while products run. Roles:

    loader     one warp: draws tiles, tells all others of them, loads y and x by TMA
    computing  warpgroups of 64 x 256 results each; all share the wider operand
    carrier    one warp for each of them: brings old values into strips of shared memory before they
               are needed, and takes the sums from there to main_grad

Warpgroups need not keep step: what one does with its strips, another's products hide, as far as the
ring of operands lets it fall behind.
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
    matrix,
    send,
    shared_layout,
)
from .tma_reduce import async_reduce_add

WIDE = gl.constexpr(256)  # columns of a warpgroup's results: 128 registers a thread
GROUP = gl.constexpr(8)  # tiles along the wide side that share the narrow operand in L2

# Integers of a tile: steps along the rows (0 after the last tile), expert, first row and column.
FACTS = gl.constexpr(4)
FACT_SLOTS = gl.constexpr(2)


@dataclass(frozen=True, kw_only=True)
class HopperConfig:
    """Compile-time shape of the kernel.

    block_k   rows of y and x of a step
    stages    steps in flight, 0.75 block_k KiB each
    strip     of the 256 results along the wide side that a buffer holds: 64 x strip of them
    buffers   of each warpgroup
    tall      the wide side is main_grad's rows. A thread of a product has results in pairs along
              the wide side: fp32 strips then meet no bank of shared memory twice, where 8 bytes a
              thread in swizzled rows of 128 do
    load      old values come to the SM, which adds; otherwise TMA adds in L2
    prefetch  main_grad's old values into L2 as soon as a tile is known
    """

    block_k: int = 64
    stages: int = 3
    strip: int = 64
    buffers: int = 2
    tall: bool = True
    load: bool = True
    prefetch: bool = True


# Shared memory in KiB: 0.75 stages block_k, and strip · buffers / 2 for fp32, half that for bf16.
HOPPER_ACCUMULATE = HopperConfig()  # 144 + 64
HOPPER_BF16 = HopperConfig(stages=4, tall=False, load=False, prefetch=False)  # 192 + 32


@gluon.jit
def receive(slots, slot, i: gl.constexpr, count: gl.constexpr, WARPS: gl.constexpr):
    """Integer i of a slot that `send` filled."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.sum(slots.index(slot * count + i).load(layout), 0)


@gluon.jit
def load_operands(
    a_desc,
    b_desc,
    smem,
    barriers,
    offsets,
    counter,
    sizes,
    ACCUMULATE: gl.constexpr,
    TALL: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The loading warp. Tiles count expert by expert; when accumulating, only experts with rows."""
    num_experts, num_a, num_b, rows = sizes
    a_smem, b_smem, _strips, facts_smem = smem
    full, empty, facts_full, facts_empty = barriers
    BLOCK_K: gl.constexpr = a_desc.block_type.shape[0]
    NARROW: gl.constexpr = a_desc.block_type.shape[1]
    stage_bytes: gl.constexpr = 2 * a_desc.block_type.nbytes + b_desc.block_type.nbytes
    tiles_an_expert = num_a * num_b

    tile = gl.program_id(0)
    count = 0
    step = 0
    # `rank` experts before `expert` have tiles.
    expert = 0
    rank = 0
    start = gl.load(offsets)
    end = gl.load(offsets + 1)
    while expert < num_experts:
        wanted = tile // tiles_an_expert
        if ACCUMULATE:
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
            if TALL:
                send(facts_smem, slot, (num_k, expert, b, a), FACTS)
            else:
                send(facts_smem, slot, (num_k, expert, a, b), FACTS)
            mbarrier.arrive(facts_full.index(slot))
            count += 1
            for _k in range(num_k):
                slot = step % STAGES
                mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
                here = full.index(slot)
                mbarrier.expect(here, stage_bytes)
                tma.async_copy_global_to_shared(b_desc, [row, b], here, b_smem.index(slot))
                for w in gl.static_range(2):
                    buffer = a_smem.index(2 * slot + w)
                    tma.async_copy_global_to_shared(a_desc, [row, a + w * NARROW], here, buffer)
                row += BLOCK_K
                step += 1
            tile = gl.num_programs(0) + gl.atomic_add(counter, 1)
    slot = count % FACT_SLOTS
    mbarrier.wait(facts_empty.index(slot), (count // FACT_SLOTS & 1) ^ 1)
    send(facts_smem, slot, (0, 0, 0, 0), FACTS)
    mbarrier.arrive(facts_full.index(slot))


@gluon.jit
def split_columns(x):
    """Left and right half of [64, columns]: renames registers, a thread has both halves."""
    half: gl.constexpr = x.shape[1] // 2
    return x.reshape(64, 2, half).permute(0, 2, 1).split()


@gluon.jit
def add_strips(
    acc,
    strips,
    full,
    ready,
    count,
    FIRST: gl.constexpr,
    W: gl.constexpr,
    TALL: gl.constexpr,
    LOAD: gl.constexpr,
):
    """Adds acc [64, columns] to its strips in shared memory, the first of which is FIRST."""
    BUFFERS: gl.constexpr = strips.shape[0] // 2
    STRIP: gl.constexpr = strips.shape[2] * strips.shape[3] // 64
    columns: gl.constexpr = acc.shape[1]
    if columns > STRIP:
        left, right = split_columns(acc)
        middle: gl.constexpr = FIRST + columns // STRIP // 2
        add_strips(left, strips, full, ready, count, FIRST, W, TALL, LOAD)
        add_strips(right, strips, full, ready, count, middle, W, TALL, LOAD)
    else:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STRIP, 16])
        slot: gl.constexpr = W * BUFFERS + FIRST % BUFFERS
        turns: gl.constexpr = WIDE // STRIP // BUFFERS
        turn: gl.constexpr = FIRST // BUFFERS
        value = gl.convert_layout(acc, layout)
        buffer = matrix(strips, slot)
        if TALL:
            buffer = buffer.permute((1, 0))
        mbarrier.wait(full.index(slot), (count * turns + turn) & 1)
        if LOAD:
            value = value + buffer.load(layout)
        buffer.store(value.to(strips.dtype))
        fence_async_shared()
        mbarrier.arrive(ready.index(slot))


@gluon.jit
def compute_tiles(
    smem,
    barriers,
    strip_barriers,
    W: gl.constexpr,
    STAGES: gl.constexpr,
    TALL: gl.constexpr,
    LOAD: gl.constexpr,
):
    """Warpgroup W: its 64 of the narrow side, times 256."""
    a_smem, b_smem, strips, facts_smem = smem
    full, empty, facts_full, facts_empty = barriers
    strip_full, strip_ready = strip_barriers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])

    count = 0
    step = 0
    mbarrier.wait(facts_full.index(0), 0)
    num_k = receive(facts_smem, 0, 0, FACTS, 4)
    while num_k > 0:
        mbarrier.arrive(facts_empty.index(count % FACT_SLOTS))
        acc = gl.zeros([64, WIDE], gl.float32, layout)
        for k in range(num_k):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            a = a_smem.index(2 * slot + W).permute((1, 0))
            acc = warpgroup_mma(a, b_smem.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(1, (acc,))
            if k > 0:
                mbarrier.arrive(empty.index((step - 1) % STAGES))
            step += 1
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index((step - 1) % STAGES))
        add_strips(acc, strips, strip_full, strip_ready, count, 0, W, TALL, LOAD)
        count += 1
        slot = count % FACT_SLOTS
        mbarrier.wait(facts_full.index(slot), count // FACT_SLOTS & 1)
        num_k = receive(facts_smem, slot, 0, FACTS, 4)


@gluon.jit
def prefetch_tile(dw_ptr, expert, m, n, M, N, TALL: gl.constexpr):
    """Asks for a warpgroup's 64 x 256 numbers of main_grad in L2: eight of them, a sector of 32
    bytes, an address, because what prefetch takes for a line is not documented."""
    sectors: gl.constexpr = 8 if TALL else WIDE // 8
    i = gl.arange(0, 256, gl.BlockedLayout([1], [32], [1], [0]))
    first = dw_ptr + gl.cast(expert, gl.int64) * M * N
    column = gl.minimum(n + i % sectors * 8, N - 1)
    for _ in range(8):
        row = gl.minimum(m + i // sectors, M - 1)
        prefetch(first + (gl.cast(row, gl.int64) * N + column))
        m += 256 // sectors


@gluon.jit
def prefetch(address):
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], gl.int32, False, 1
    )


@gluon.jit
def put_strips(
    dw_desc,
    tile,
    strips,
    ready,
    use,
    FIRST: gl.constexpr,
    W: gl.constexpr,
    TALL: gl.constexpr,
    ADD: gl.constexpr,
):
    """Starts warpgroup W's buffers, use `use`, on their way to strips FIRST and on of a tile."""
    BUFFERS: gl.constexpr = strips.shape[0] // 2
    STRIP: gl.constexpr = strips.shape[2] * strips.shape[3] // 64
    expert, m, n = tile
    for b in gl.static_range(BUFFERS):
        mbarrier.wait(ready.index(W * BUFFERS + b), use & 1)
        if TALL:
            place = [expert, m + (FIRST + b) * STRIP, n]
        else:
            place = [expert, m, n + (FIRST + b) * STRIP]
        if ADD:
            async_reduce_add(dw_desc, place, strips.index(W * BUFFERS + b))
        else:
            tma.async_copy_shared_to_global(dw_desc, place, strips.index(W * BUFFERS + b))


@gluon.jit
def fetch_strips(
    dw_desc,
    tile,
    strips,
    full,
    FIRST: gl.constexpr,
    W: gl.constexpr,
    TALL: gl.constexpr,
    LOAD: gl.constexpr,
):
    """Fills each buffer of warpgroup W with old values as soon as it has left."""
    BUFFERS: gl.constexpr = strips.shape[0] // 2
    STRIP: gl.constexpr = strips.shape[2] * strips.shape[3] // 64
    expert, m, n = tile
    for b in gl.static_range(BUFFERS):
        tma.store_wait(BUFFERS - 1 - b)
        here = full.index(W * BUFFERS + b)
        if LOAD:
            mbarrier.expect(here, dw_desc.block_type.nbytes)
            if TALL:
                place = [expert, m + (FIRST + b) * STRIP, n]
            else:
                place = [expert, m, n + (FIRST + b) * STRIP]
            buffer = strips.index(W * BUFFERS + b)
            tma.async_copy_global_to_shared(dw_desc, place, here, buffer)
        else:
            mbarrier.arrive(here)


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
    TALL: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    LOAD: gl.constexpr,
    PREFETCH: gl.constexpr,
):
    """The warp that brings warpgroup W its old values and takes its sums away.

    A buffer is full when the warpgroup may use it, ready when it has. A tile uses each of them
    `turns` times; all of a turn leave before they are filled for the next.
    """
    _a_smem, _b_smem, strips, facts_smem = smem
    _full, _empty, facts_full, facts_empty = barriers
    full, ready = strip_barriers
    BUFFERS: gl.constexpr = strips.shape[0] // 2
    turns: gl.constexpr = WIDE * 64 // (strips.shape[2] * strips.shape[3]) // BUFFERS
    last: gl.constexpr = (turns - 1) * BUFFERS
    ADD: gl.constexpr = ACCUMULATE and not LOAD

    count = 0
    use = 0
    tile = (0, 0, 0)
    mbarrier.wait(facts_full.index(0), 0)
    while receive(facts_smem, count % FACT_SLOTS, 0, FACTS, 1) > 0:
        slot = count % FACT_SLOTS
        expert = receive(facts_smem, slot, 1, FACTS, 1)
        m = receive(facts_smem, slot, 2, FACTS, 1)
        n = receive(facts_smem, slot, 3, FACTS, 1)
        mbarrier.arrive(facts_empty.index(slot))
        if TALL:
            n += W * 64
        else:
            m += W * 64
        if PREFETCH:
            prefetch_tile(dw_ptr, expert, m, n, M, N, TALL)
        if count > 0:
            put_strips(dw_desc, tile, strips, ready, use - 1, last, W, TALL, ADD)
        tile = (expert, m, n)
        fetch_strips(dw_desc, tile, strips, full, 0, W, TALL, LOAD)
        for turn in gl.static_range(1, turns):
            put_strips(
                dw_desc, tile, strips, ready, use + turn - 1, (turn - 1) * BUFFERS, W, TALL, ADD
            )
            fetch_strips(dw_desc, tile, strips, full, turn * BUFFERS, W, TALL, LOAD)
        use += turns
        count += 1
        mbarrier.wait(facts_full.index(count % FACT_SLOTS), count // FACT_SLOTS & 1)
    if count > 0:
        put_strips(dw_desc, tile, strips, ready, use - 1, last, W, TALL, ADD)
        tma.store_wait(0)


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
    num_experts,
    num_a,
    num_b,
    rows,
    M,
    N,
    ACCUMULATE: gl.constexpr,
    TALL: gl.constexpr,
    PREFETCH: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
    LOAD: gl.constexpr,
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
    strip_full = allocate_barriers(2 * BUFFERS, 1)
    strip_ready = allocate_barriers(2 * BUFFERS, 1)

    barriers = (full, empty, facts_full, facts_empty)
    strip_barriers = (strip_full, strip_ready)
    sizes = (num_experts, num_a, num_b, rows)
    smem = (a_smem, b_smem, strips, facts_smem)
    gl.warp_specialize(
        [
            (
                compute_tiles,
                (smem, barriers, strip_barriers, gl.constexpr(0), STAGES, TALL, LOAD),
            ),
            (
                compute_tiles,
                (smem, barriers, strip_barriers, gl.constexpr(1), STAGES, TALL, LOAD),
            ),
            (
                load_operands,
                (a_desc, b_desc, smem, barriers, offsets_table, counter_ptr, sizes, ACCUMULATE,
                 TALL, STAGES),
            ),
            (
                carry_strips,
                (dw_desc, dw_ptr, M, N, smem, barriers, strip_barriers, gl.constexpr(0), TALL,
                 ACCUMULATE, LOAD, PREFETCH),
            ),
            (
                carry_strips,
                (dw_desc, dw_ptr, M, N, smem, barriers, strip_barriers, gl.constexpr(1), TALL,
                 ACCUMULATE, LOAD, PREFETCH),
            ),
        ],
        [4, 1, 1, 1],
        [232, 40, 40, 40],
    )  # fmt: skip


def describe(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(
        x, list(x.shape), list(x.stride()), block, shared_layout(block, x.dtype)
    )


def grouped_wgrad_hopper(
    y: torch.Tensor,
    x: torch.Tensor,
    expert_offsets: torch.Tensor,
    dw: torch.Tensor,
    *,
    accumulate: bool,
    num_sms: int,
    config: HopperConfig | None = None,
) -> torch.Tensor:
    """dw[l] = y_l.T @ x_l, or += with `accumulate`.

    y   [R, M], x [R, N] bf16 or fp16; rows that pad an expert must be zero in one and finite in the
        other
    dw  [L, M, N] contiguous; fp32 with `accumulate`. An expert without rows gets zeros, or keeps
        its values
    """
    config = config or (HOPPER_ACCUMULATE if accumulate else HOPPER_BF16)
    (R, M), N, L = y.shape, x.shape[1], dw.shape[0]
    a, b = (x, y) if config.tall else (y, x)
    strip = [1, config.strip, 64] if config.tall else [1, 64, config.strip]
    num_a = triton.cdiv(a.shape[1], 128)
    num_b = triton.cdiv(b.shape[1], 256)
    grouped_wgrad_hopper_kernel[(max(1, min(num_sms, L * num_a * num_b)),)](
        describe(a, [config.block_k, 64]),
        describe(b, [config.block_k, 256]),
        describe(dw, strip),
        dw,
        expert_offsets,
        torch.zeros(1, dtype=torch.int32, device=y.device),
        L,
        num_a,
        num_b,
        R,
        M,
        N,
        ACCUMULATE=accumulate,
        TALL=config.tall,
        PREFETCH=config.prefetch,
        STAGES=config.stages,
        BUFFERS=config.buffers,
        LOAD=accumulate and config.load,
        num_warps=4,
    )
    return dw
