"""dx and d_weight of the router on Hopper, from d_logits: each warp with a role of its own.

Letters: T tokens, H hidden, E experts. d_logits come as two bf16 numbers each, high + low, from
`router_backward`'s first kernel. A program keeps 128 columns of the weight, and walks down at most
2,048 tokens, 64 a step:

    loader     one warp: x and both parts of d_logits by TMA
    d_weight   two warpgroups: (high + low).T @ x, each half of the columns, or of more than 64
               experts; low first
    dx         one warpgroup: high @ weight, both in bf16 as dx itself is; leaves by TMA

One product makes dx, where three would keep fp32: rounding d_logits, weight and dx to bf16 costs
0.17 % of their norm each, 0.29 % together (emulated).

256 steps of 16 tokens for both parts are what a sum in tensor cores takes (`router` has the
arithmetic: 5.9e-6); so T is cut, d_weight of every cut goes to memory, and the last to arrive adds
them in order: the same bits in every run and for every `num_sms`.

T = 8192, H = 7168, E = 64 on an H200, predicted: 112 programs of 2 × 32 steps; x and dx take 56 µs
at 4.2 TB/s; a program reads 2.1 MB, 37 µs at 32 bytes a clock; tensor cores 21 µs, shared memory
45 µs.
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

from .arithmetic import ceil_div, power_of_two
from .attention_tiles import allocate, allocate_barriers
from .boxes import describe
from .launch import cache_launches
from .router_tiles import counters, even_grid, even_splits

__all__ = ["BackwardHopperConfig", "gradients_hopper"]

TOKENS, WIDTH = 64, 128
TILE = gl.constexpr(TOKENS)  # tokens of a step
STRIP = gl.constexpr(WIDTH)  # columns of x
DEEPEST = 32  # steps of one sum


@dataclass(frozen=True, kw_only=True)
class BackwardHopperConfig:
    """Compile-time shape of the kernel.

    stages       of x in flight, 16 KiB each
    high_stages  of the high part of d_logits, and of the low part, 128 bytes an expert each
    low_stages
    dx_stages    of dx that leave, 16 KiB each
    """

    stages: int = 4
    high_stages: int = 3
    low_stages: int = 3
    dx_stages: int = 2


# By experts, padded. Of 227 KiB, 160, 192 and 208 with the weight, 256 bytes an expert.
CONFIGS = {
    64: BackwardHopperConfig(),
    128: BackwardHopperConfig(high_stages=2, low_stages=2),
    256: BackwardHopperConfig(stages=2, high_stages=2, low_stages=1, dx_stages=1),
}


@gluon.jit
def find_span(item, strips, splits, T):
    """First column of an item, its split, the split's first step and the one after its last. Items
    that run at the same time read the same rows of x and d_logits, from strip to strip."""
    split = item // strips
    steps = (T + TILE - 1) // TILE
    begin = split * steps // splits
    return (item - split * strips) * STRIP, split, begin, (split + 1) * steps // splits


@gluon.jit
def load_step(desc, place, smem, full, empty, count, STAGES: gl.constexpr):
    slot = count % STAGES
    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, place, full.index(slot), smem.index(slot))


@gluon.jit
def load_steps(
    descriptors,
    buffers,
    barriers,
    sizes,
    STAGES: gl.constexpr,
    HIGH_STAGES: gl.constexpr,
    LOW_STAGES: gl.constexpr,
):
    """The loading warp."""
    x_desc, high_desc, low_desc = descriptors
    x_smem, high_smem, low_smem = buffers
    x_full, x_empty, high_full, high_empty, low_full, low_empty = barriers
    T, _H, strips, splits, items = sizes
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n, _split, begin, end = find_span(item, strips, splits, T)
        for step in range(begin, end):
            t = step * TILE
            load_step(high_desc, [t, 0], high_smem, high_full, high_empty, count, HIGH_STAGES)
            load_step(x_desc, [t, n], x_smem, x_full, x_empty, count, STAGES)
            load_step(low_desc, [t, 0], low_smem, low_full, low_empty, count, LOW_STAGES)
            count += 1


@gluon.jit
def multiply_dx(
    dx_desc,
    weight_ptr,
    high_smem,
    weight_smem,
    dx_smem,
    barriers,
    sizes,
    E: gl.constexpr,
    HIGH_STAGES: gl.constexpr,
    DX_STAGES: gl.constexpr,
):
    """One warpgroup: dx of every step."""
    _x_full, _x_empty, high_full, high_empty, _low_full, _low_empty = barriers
    T, H, strips, splits, items = sizes
    COLUMNS: gl.constexpr = weight_smem.shape[0]
    dtype: gl.constexpr = dx_smem.dtype
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STRIP, 16])
    # 8 numbers a thread, 32 rows of 64 experts at a time.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    row = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(1, layout)), 1)
    column = gl.expand_dims(gl.arange(0, STRIP, gl.SliceLayout(0, layout)), 0)
    zero = gl.zeros([TILE, STRIP], gl.float32, acc_layout)
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n, _split, begin, end = find_span(item, strips, splits, T)
        for r in gl.static_range(COLUMNS // 32):
            source = weight_ptr + n + ((r * 32 + row) * H + column)
            mask = (r * 32 + row < E) & (column < H - n)
            value = gl.load(source, mask=mask, other=0.0)
            weight_smem.slice(r * 32, 32).store(value.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        for step in range(begin, end):
            slot = count % HIGH_STAGES
            mbarrier.wait(high_full.index(slot), count // HIGH_STAGES & 1)
            dx = warpgroup_mma(
                high_smem.index(slot), weight_smem, zero, use_acc=False, is_async=True
            )
            dx = warpgroup_mma_wait(0, (dx,))
            mbarrier.arrive(high_empty.index(slot))
            buffer = dx_smem.index(count % DX_STAGES)
            tma.store_wait(DX_STAGES - 1)
            gl.thread_barrier()
            buffer.store(dx.to(dtype))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(dx_desc, [step * TILE, n], buffer)
            count += 1
    tma.store_wait(0)


@gluon.jit
def add_splits(first, parts_ptr, d_weight_ptr, n, splits, E: gl.constexpr, H, N: gl.constexpr):
    """d_weight of 32 experts and N columns: every split's, the first first."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // N, N // 4], [4, 1], [1, 0])
    row = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(1, layout)), 1) + first
    column = gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, layout)), 0)
    exists = (row < E) & (column < H - n)
    place = n + (row * H + column)
    total = gl.load(parts_ptr + place, mask=exists, other=0.0, cache_modifier=".cg")
    for split in range(1, splits):
        source = parts_ptr + gl.cast(split, gl.int64) * E * H + place
        total += gl.load(source, mask=exists, other=0.0, cache_modifier=".cg")
    gl.store(d_weight_ptr + place, total, mask=exists)


@gluon.jit
def multiply_d_weight(
    parts_ptr,
    d_weight_ptr,
    state_ptr,
    buffers,
    barriers,
    sizes,
    W: gl.constexpr,
    E: gl.constexpr,
    STAGES: gl.constexpr,
    HIGH_STAGES: gl.constexpr,
    LOW_STAGES: gl.constexpr,
):
    """Warpgroup W of two: half of a strip's columns, or of more than 64 experts."""
    x_smem, high_smem, low_smem = buffers
    x_full, x_empty, high_full, high_empty, low_full, low_empty = barriers
    T, H, strips, splits, items = sizes
    COLUMNS: gl.constexpr = high_smem.shape[2]
    BY_COLUMNS: gl.constexpr = COLUMNS == 64
    M: gl.constexpr = COLUMNS if BY_COLUMNS else COLUMNS // 2
    N: gl.constexpr = STRIP // 2 if BY_COLUMNS else STRIP
    FIRST: gl.constexpr = 0 if BY_COLUMNS else W * M
    LEFT: gl.constexpr = W * N if BY_COLUMNS else 0
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    row = gl.expand_dims(gl.arange(0, M, gl.SliceLayout(1, layout)), 1) + FIRST
    column = gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, layout)), 0)
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n, split, begin, end = find_span(item, strips, splits, T)
        acc = gl.zeros([M, N], gl.float32, layout)
        for step in range(begin, end):
            slot = count % STAGES
            high_slot = count % HIGH_STAGES
            low_slot = count % LOW_STAGES
            mbarrier.wait(x_full.index(slot), count // STAGES & 1)
            x = x_smem.index(slot).slice(LEFT, N, 1)
            mbarrier.wait(low_full.index(low_slot), count // LOW_STAGES & 1)
            low = low_smem.index(low_slot).slice(FIRST, M, 1).permute((1, 0))
            acc = warpgroup_mma(low, x, acc, is_async=True)
            mbarrier.wait(high_full.index(high_slot), count // HIGH_STAGES & 1)
            high = high_smem.index(high_slot).slice(FIRST, M, 1).permute((1, 0))
            acc = warpgroup_mma(high, x, acc, is_async=True)
            # The low part's product has ended, and all of the step before this one.
            acc = warpgroup_mma_wait(1, (acc,))
            mbarrier.arrive(low_empty.index(low_slot))
            if step > begin:
                mbarrier.arrive(x_empty.index((count - 1) % STAGES))
                mbarrier.arrive(high_empty.index((count - 1) % HIGH_STAGES))
            count += 1
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(x_empty.index((count - 1) % STAGES))
        mbarrier.arrive(high_empty.index((count - 1) % HIGH_STAGES))

        n += LEFT
        target = parts_ptr + gl.cast(split, gl.int64) * E * H + (row * H + (n + column))
        gl.store(target, acc, mask=(row < E) & (n + column < H))
        if splits > 1:
            gl.thread_barrier()  # every thread's sums are written before one of them says so
            arrived_ptr = state_ptr + (item - split * strips) * 2 + W
            arrived = gl.atomic_add(arrived_ptr, 1, sem="acq_rel")
            if arrived == splits - 1:
                gl.store(arrived_ptr, 0)
                for first in range(FIRST, min(FIRST + M, E), 32):
                    add_splits(first, parts_ptr, d_weight_ptr, n, splits, E, H, N)


@cache_launches
@gluon.jit(do_not_specialize=["T", "vectors", "strips", "splits", "items"])
def gradients_hopper_kernel(
    x_desc,
    high_desc,
    low_desc,
    dx_desc,
    weight_ptr,
    parts_ptr,
    d_weight_ptr,
    state_ptr,
    T,
    vectors,
    strips,
    splits,
    items,
    E: gl.constexpr,
    STAGES: gl.constexpr,
    HIGH_STAGES: gl.constexpr,
    LOW_STAGES: gl.constexpr,
    DX_STAGES: gl.constexpr,
):
    COLUMNS: gl.constexpr = high_desc.block_type.shape[1]
    x_smem = allocate(x_desc, STAGES)
    high_smem = allocate(high_desc, HIGH_STAGES)
    low_smem = allocate(low_desc, LOW_STAGES)
    dx_smem = allocate(dx_desc, DX_STAGES)
    weight_smem = gl.allocate_shared_memory(x_desc.dtype, [COLUMNS, STRIP], x_desc.layout)
    x_full = allocate_barriers(STAGES, 1)
    x_empty = allocate_barriers(STAGES, 2)
    high_full = allocate_barriers(HIGH_STAGES, 1)
    high_empty = allocate_barriers(HIGH_STAGES, 3)
    low_full = allocate_barriers(LOW_STAGES, 1)
    low_empty = allocate_barriers(LOW_STAGES, 2)
    barriers = (x_full, x_empty, high_full, high_empty, low_full, low_empty)
    buffers = (x_smem, high_smem, low_smem)
    # H is a multiple of 8, which the compiler has to see to read 16 bytes at a time.
    sizes = (T, vectors * 8, strips, splits, items)
    gl.warp_specialize(
        [
            (
                multiply_d_weight,
                (parts_ptr, d_weight_ptr, state_ptr, buffers, barriers, sizes, gl.constexpr(0), E,
                 STAGES, HIGH_STAGES, LOW_STAGES),
            ),
            (
                multiply_d_weight,
                (parts_ptr, d_weight_ptr, state_ptr, buffers, barriers, sizes, gl.constexpr(1), E,
                 STAGES, HIGH_STAGES, LOW_STAGES),
            ),
            (
                multiply_dx,
                (dx_desc, weight_ptr, high_smem, weight_smem, dx_smem, barriers, sizes, E,
                 HIGH_STAGES, DX_STAGES),
            ),
            (
                load_steps,
                ((x_desc, high_desc, low_desc), buffers, barriers, sizes, STAGES, HIGH_STAGES,
                 LOW_STAGES),
            ),
        ],
        [4, 4, 1],
        [176, 136, 24],
    )  # fmt: skip


def gradients_hopper(
    d_logits: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    num_sms: int,
    config: BackwardHopperConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx [T, H] bf16 and d_weight [E, H] fp32.

    d_logits  [2, T, W] bf16, high and low part; W a multiple of 8, zeros from E on
    x         [T, H] bf16, H a multiple of 8, contiguous, at a multiple of 16 bytes
    weight    [E, H] fp32, likewise; at most 256 experts
    """
    (T, H), E = x.shape, weight.shape[0]
    columns = max(64, power_of_two(E))
    config = config or CONFIGS[columns]
    strips, steps = ceil_div(H, WIDTH), ceil_div(T, TOKENS)
    splits = even_splits(strips, steps, ceil_div(steps, DEEPEST))
    items = strips * splits
    dx = torch.empty_like(x)
    d_weight = torch.empty_like(weight)
    parts = d_weight if splits == 1 else weight.new_empty(splits, E, H)
    gradients_hopper_kernel[(even_grid(items, num_sms),)](
        describe(x, [TOKENS, WIDTH]),
        *(describe(part, [TOKENS, columns]) for part in d_logits),
        describe(dx, [TOKENS, WIDTH]),
        weight,
        parts,
        d_weight,
        counters(x, 2 * strips),
        T,
        H // 8,
        strips,
        splits,
        items,
        E=E,
        STAGES=config.stages,
        HIGH_STAGES=config.high_stages,
        LOW_STAGES=config.low_stages,
        DX_STAGES=config.dx_stages,
        num_warps=4,
    )
    return dx, d_weight
