"""dx and d_weight of the router on Hopper, from d_logits: each warp with a role of its own.

Letters: T tokens, H hidden, E experts. d_logits and the weight come in bf16, from
`router_backward`'s first kernel. A program takes 128 columns of x, a strip, and walks down at most
4,096 tokens, two tiles of 64 a step:

    loader     one warp: the strip's weight, x and d_logits by TMA
    d_weight   two warpgroups: d_logits.T @ x, each half of the columns, or of more than 64 experts
    dx         one warpgroup: d_logits @ weight, a tile at a time: one such product in the tensor
               cores while the one before it is rounded and leaves by TMA

Every sum starts from numbers rounded to bf16 once, as other layers' gradients do: d_weight is off
by 0.17 % of its norm (d_logits), dx by 0.29 % (d_logits, weight, dx itself). A second bf16 number
for what d_logits lose would keep d_weight in fp32, for half as many products again and twice the
reads of d_logits, which every strip reads anew.

256 steps of 16 tokens are what a sum in tensor cores takes (`router` has the arithmetic: 5.9e-6);
so T is cut, d_weight of every cut goes to memory, and the last to arrive adds them in order: the
same bits in every run and for every `num_sms`.

T = 8192, H = 7168 on an H200: 112 programs, 72, 72 and 109 µs with 64, 128 and 256 experts, where
a copy of x takes 59 and the products for 256 take 101 on as many SMs at 5.3 TFLOPS each. Strips of
256 columns read half as much of d_logits, but took 76 and 93 µs with 64 and 128 experts; the steps
of all strips in 128 equal parts, each of which goes on into the next strip, 78 and 84.
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

from ..launch.arithmetic import ceil_div, power_of_two
from ..launch.cached import cache_launches
from ..launch.compat import async_load, async_store, barrier
from ..launch.descriptors import describe
from ..launch.shared_memory import allocate, allocate_barriers
from .tiles import counters, even_grid, even_splits

__all__ = ["BackwardHopperConfig", "gradients_hopper"]

TOKENS, WIDTH = 64, 128
TILE = gl.constexpr(TOKENS)  # tokens of a stage
STRIP = gl.constexpr(WIDTH)  # columns of x
DEEPEST = 4096 // (2 * TOKENS)  # steps of one sum
AHEAD = gl.constexpr(4)  # parts of d_weight read at once


@dataclass(frozen=True, kw_only=True)
class BackwardHopperConfig:
    """Compile-time shape of the kernel.

    stages     of x in flight, 16 KiB each
    d_stages   of d_logits, 128 bytes an expert each, two or more
    dx_stages  of dx that leave, 16 KiB each
    """

    stages: int
    d_stages: int
    dx_stages: int


# By experts, padded. Of 227 KiB 200, 208 and 224 with the weight, 256 bytes an expert. With 256
# experts a third stage of d_logits, for a second one of dx, takes 109 µs instead of 146.
CONFIGS = {
    64: BackwardHopperConfig(stages=6, d_stages=5, dx_stages=3),
    128: BackwardHopperConfig(stages=5, d_stages=4, dx_stages=2),
    256: BackwardHopperConfig(stages=3, d_stages=3, dx_stages=1),
}


@gluon.jit
def find_span(item, sizes):
    """First column of an item, its split, the split's first step and the one after its last. Items
    that run at the same time read the same rows of x and d_logits, from strip to strip."""
    _H, strips, steps, splits, _items = sizes
    split = item // strips
    left = (item - split * strips) * STRIP
    return left, split, split * steps // splits, (split + 1) * steps // splits


@gluon.jit
def load_tile(desc, place, smem, full, empty, count, STAGES: gl.constexpr):
    slot = count % STAGES
    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    async_load(desc, place, full.index(slot), smem.index(slot))


@gluon.jit
def load_steps(descriptors, buffers, barriers, sizes, STAGES: gl.constexpr, D_STAGES: gl.constexpr):
    """The loading warp."""
    x_desc, d_desc, weight_desc = descriptors
    x_smem, d_smem, weight_smem = buffers
    x_full, x_empty, d_full, d_empty, weight_full, weight_empty = barriers
    count = 0
    for item in range(gl.program_id(0), sizes[4], gl.num_programs(0)):
        number = item // gl.num_programs(0)
        left, _split, begin, end = find_span(item, sizes)
        for tile in range(2 * begin, 2 * end):
            t = tile * TILE
            load_tile(d_desc, [t, 0], d_smem, d_full, d_empty, count, D_STAGES)
            load_tile(x_desc, [t, left], x_smem, x_full, x_empty, count, STAGES)
            count += 1
            # Behind the first tile, which need not wait for dx of the item before.
            if tile == 2 * begin:
                place = [0, left]
                load_tile(weight_desc, place, weight_smem, weight_full, weight_empty, number, 1)


@gluon.jit
def start_dx(buffers, barriers, count, D_STAGES: gl.constexpr):
    """d_logits of a tile times the strip's weight."""
    _x_smem, d_smem, weight_smem = buffers
    _x_full, _x_empty, d_full, _d_empty, _weight_full, _weight_empty = barriers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STRIP, 16])
    zero = gl.zeros([TILE, STRIP], gl.float32, layout)
    slot = count % D_STAGES
    mbarrier.wait(d_full.index(slot), count // D_STAGES & 1)
    d_logits = d_smem.index(slot)
    return warpgroup_mma(d_logits, weight_smem.index(0), zero, use_acc=False, is_async=True)


@gluon.jit
def finish_dx(
    product,
    dx_desc,
    dx_smem,
    place,
    d_empty,
    count,
    IN_FLIGHT: gl.constexpr,
    D_STAGES: gl.constexpr,
    DX_STAGES: gl.constexpr,
):
    """Sends a product, the `count`th of this program, to `place`; IN_FLIGHT others were started
    after it."""
    dx = warpgroup_mma_wait(IN_FLIGHT, (product,))
    mbarrier.arrive(d_empty.index(count % D_STAGES))
    buffer = dx_smem.index(count % DX_STAGES)
    tma.store_wait(DX_STAGES - 1)
    barrier()
    buffer.store(dx.to(dx_smem.dtype))
    fence_async_shared()
    barrier()
    async_store(dx_desc, place, buffer)


@gluon.jit
def multiply_dx(
    dx_desc,
    dx_smem,
    buffers,
    barriers,
    sizes,
    D_STAGES: gl.constexpr,
    DX_STAGES: gl.constexpr,
):
    """One warpgroup: dx, two products a step."""
    _x_full, _x_empty, _d_full, d_empty, weight_full, weight_empty = barriers
    count = 0
    for item in range(gl.program_id(0), sizes[4], gl.num_programs(0)):
        number = item // gl.num_programs(0)
        left, _split, begin, end = find_span(item, sizes)
        mbarrier.wait(weight_full.index(0), number & 1)
        for step in range(begin, end):
            t = step * (2 * TILE)
            first = start_dx(buffers, barriers, count, D_STAGES)
            second = start_dx(buffers, barriers, count + 1, D_STAGES)
            finish_dx(first, dx_desc, dx_smem, [t, left], d_empty, count, 1, D_STAGES, DX_STAGES)
            finish_dx(
                second, dx_desc, dx_smem, [t + TILE, left], d_empty, count + 1, 0, D_STAGES,
                DX_STAGES,
            )  # fmt: skip
            count += 2
        mbarrier.arrive(weight_empty.index(0))
    tma.store_wait(0)


@gluon.jit
def add_parts(
    parts_ptr,
    d_weight_ptr,
    first,
    end,
    left,
    count,
    H,
    E: gl.constexpr,
    N: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """N columns of d_weight, experts `first` to `end` - 1: the sum of `count` parts, in order."""
    ROWS: gl.constexpr = 2048 // N
    LANES: gl.constexpr = min(N // 4, 32)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32 // LANES, LANES], [4, 1], [1, 0])
    column = left + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, layout)), 0)
    for row in range(first, end, ROWS):
        expert = row + gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, layout)), 1)
        exists = (expert < E) & (column < H)
        place = expert * H + column
        total = gl.zeros([ROWS, N], gl.float32, layout)
        for part in range(0, count, AHEAD):
            values = ()
            for i in gl.static_range(AHEAD):
                source = parts_ptr + gl.cast(part + i, gl.int64) * E * H + place
                mask = exists & (expert * 0 + part + i < count)
                values += (gl.load(source, mask=mask, other=0.0, cache_modifier=".cg"),)
            for i in gl.static_range(AHEAD):
                total += values[i]
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
    D_STAGES: gl.constexpr,
):
    """Warpgroup W of two: d_weight of half a strip's columns, or of more than 64 experts."""
    x_smem, d_smem, _weight_smem = buffers
    x_full, x_empty, d_full, d_empty, _weight_full, _weight_empty = barriers
    H, strips, _steps, splits, items = sizes
    EXPERTS: gl.constexpr = d_smem.shape[2]
    BY_COLUMNS: gl.constexpr = EXPERTS == 64
    M: gl.constexpr = EXPERTS if BY_COLUMNS else EXPERTS // 2
    N: gl.constexpr = STRIP // 2 if BY_COLUMNS else STRIP
    FIRST: gl.constexpr = 0 if BY_COLUMNS else W * M
    LEFT: gl.constexpr = W * N if BY_COLUMNS else 0
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    row = FIRST + gl.expand_dims(gl.arange(0, M, gl.SliceLayout(1, layout)), 1)
    column = LEFT + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, layout)), 0)
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        left, split, begin, end = find_span(item, sizes)
        acc = gl.zeros([M, N], gl.float32, layout)
        for tile in range(2 * begin, 2 * end):
            slot = count % STAGES
            d_slot = count % D_STAGES
            mbarrier.wait(d_full.index(d_slot), count // D_STAGES & 1)
            mbarrier.wait(x_full.index(slot), count // STAGES & 1)
            x = x_smem.index(slot).slice(LEFT, N, 1)
            d_logits = d_smem.index(d_slot).slice(FIRST, M, 1)
            acc = warpgroup_mma(d_logits.permute((1, 0)), x, acc, is_async=True)
            # The product before this one has ended.
            acc = warpgroup_mma_wait(1, (acc,))
            if tile > 2 * begin:
                mbarrier.arrive(x_empty.index((count - 1) % STAGES))
                mbarrier.arrive(d_empty.index((count - 1) % D_STAGES))
            count += 1
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(x_empty.index((count - 1) % STAGES))
        mbarrier.arrive(d_empty.index((count - 1) % D_STAGES))

        n = left + column
        target = parts_ptr + gl.cast(split, gl.int64) * E * H + (row * H + n)
        gl.store(target, acc, mask=(row < E) & (n < H))

    if splits > 1:
        # Told only now, so that an item's sums need not have arrived before the next one begins.
        barrier()  # every thread's sums are written before one of them says so
        for item in range(gl.program_id(0), items, gl.num_programs(0)):
            strip = item % strips
            arrived_ptr = state_ptr + strip * 2 + W
            arrived = gl.atomic_add(arrived_ptr, 1, sem="acq_rel")
            if arrived == splits - 1:
                gl.store(arrived_ptr, 0)
                left = strip * STRIP + LEFT
                last = min(FIRST + M, E)
                add_parts(parts_ptr, d_weight_ptr, FIRST, last, left, splits, H, E, N, AHEAD)


@cache_launches
@gluon.jit(do_not_specialize=["vectors", "strips", "steps", "splits", "items"])
def gradients_hopper_kernel(
    x_desc,
    d_desc,
    weight_desc,
    dx_desc,
    parts_ptr,
    d_weight_ptr,
    state_ptr,
    vectors,
    strips,
    steps,
    splits,
    items,
    E: gl.constexpr,
    STAGES: gl.constexpr,
    D_STAGES: gl.constexpr,
    DX_STAGES: gl.constexpr,
):
    buffers = (allocate(x_desc, STAGES), allocate(d_desc, D_STAGES), allocate(weight_desc, 1))
    dx_smem = allocate(dx_desc, DX_STAGES)
    x_full, x_empty = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2)
    d_full, d_empty = allocate_barriers(D_STAGES, 1), allocate_barriers(D_STAGES, 3)
    weight_full, weight_empty = allocate_barriers(1, 1), allocate_barriers(1, 1)
    barriers = (x_full, x_empty, d_full, d_empty, weight_full, weight_empty)
    # H is a multiple of 8, which the compiler has to see to read 16 bytes at a time.
    sizes = (vectors * 8, strips, steps, splits, items)
    gl.warp_specialize(
        [
            (
                multiply_d_weight,
                (parts_ptr, d_weight_ptr, state_ptr, buffers, barriers, sizes, gl.constexpr(0), E,
                 STAGES, D_STAGES),
            ),
            (
                multiply_d_weight,
                (parts_ptr, d_weight_ptr, state_ptr, buffers, barriers, sizes, gl.constexpr(1), E,
                 STAGES, D_STAGES),
            ),
            (multiply_dx, (dx_desc, dx_smem, buffers, barriers, sizes, D_STAGES, DX_STAGES)),
            (load_steps, ((x_desc, d_desc, weight_desc), buffers, barriers, sizes, STAGES,
                          D_STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
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

    d_logits  [T, W] bf16; W a multiple of 8, zeros from E on
    x         [T, H] bf16, H a multiple of 8, contiguous, at a multiple of 16 bytes
    weight    [E, H] bf16, likewise; at most 256 experts
    """
    (T, H), E = x.shape, weight.shape[0]
    columns = max(64, power_of_two(E))
    config = config or CONFIGS[columns]
    strips, steps = ceil_div(H, WIDTH), ceil_div(T, 2 * TOKENS)
    splits = even_splits(strips, steps, ceil_div(steps, DEEPEST))
    items = strips * splits
    dx = torch.empty_like(x)
    d_weight = torch.empty(E, H, dtype=torch.float32, device=x.device)
    gradients_hopper_kernel[(even_grid(items, num_sms),)](
        describe(x, [TOKENS, WIDTH]),
        describe(d_logits, [TOKENS, columns]),
        describe(weight, [columns, WIDTH]),
        describe(dx, [TOKENS, WIDTH]),
        d_weight if splits == 1 else d_weight.new_empty(splits, E, H),
        d_weight,
        counters(x, 2 * strips),
        H // 8,
        strips,
        steps,
        splits,
        items,
        E=E,
        STAGES=config.stages,
        D_STAGES=config.d_stages,
        DX_STAGES=config.dx_stages,
        num_warps=4,
    )
    return dx, d_weight
