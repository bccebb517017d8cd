"""The router's logits on Hopper, each warp with a role of its own; `router_choice` chooses.

Letters: T tokens, H hidden, E experts, S splits of H. The arithmetic is `router`'s, weight = high +
low in bf16, for x in bf16. A program's tile is 256 rows of x and at most 1,792 columns:

    loader     one warp: x by TMA, 64 columns a stage
    splitter   four warps: read the weight, fp32, from L2 a step ahead, and leave both parts of it
    products   two warpgroups of 128 rows each. Up to 64 experts high and low stand side by side,
               2 E columns of one operand, so that x is read once; above, where sums of 128 columns
               fill the registers, both parts add to the same sums, low first.

H = 7168 is always cut in four or more: 112 steps of 16 for each part keep what tensor cores lose at
2.6e-6 (`router` has the arithmetic), 5.2e-6 where both parts share the sums, without another sum in
fp32. Every split leaves its sums in memory; the choice adds them in order: the same bits in every
run and for every `num_sms`.

T = 8192, H = 7168, E = 64 on an H200, predicted: 128 programs; 117 MB of x take 28 µs at 4.2 TB/s;
a program's share of x and weight, 1.4 MB, 25 µs at the 32 bytes a clock that reach an SM; tensor
cores 16 µs, and their reads of shared memory 12 µs, beside that.
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

from .attention_tiles import allocate_barriers
from .boxes import describe
from .launch import cache_launches
from .router_tiles import (
    BLOCK_E,
    ceil_div,
    columns_of,
    even_grid,
    even_splits,
)

__all__ = ["HopperConfig", "logits_hopper"]

TILE_ROWS, BLOCK_ROWS, STEP = 256, 64, 64
ROWS = gl.constexpr(TILE_ROWS)  # 128 a warpgroup
BLOCK = gl.constexpr(BLOCK_ROWS)  # of a product
DEPTH = gl.constexpr(STEP)  # columns of x of a stage: rows of 128 bytes
DEEPEST = 28  # steps of one sum


@dataclass(frozen=True, kw_only=True)
class HopperConfig:
    """Compile-time shape of the kernel.

    stages         of x in flight, 32 KiB each
    weight_stages  of both parts of the weight, 256 bytes a column each
    registers, weight_registers  of a thread that multiplies, or splits: two and one make 488
    """

    stages: int = 4
    weight_stages: int = 3
    registers: int = 184
    weight_registers: int = 120


# By columns of experts a program: 128 + 48 KiB, 128 + 64.
CONFIGS = {64: HopperConfig(), 128: HopperConfig(weight_stages=2)}


@gluon.jit
def find_part(item, splits, H, PASSES: gl.constexpr):
    """Tile, split and pass of a number, and the split's first step and the one after its last."""
    parts = splits * PASSES
    tile = item // parts
    inside = item - tile * parts
    split = inside // PASSES
    steps = (H + DEPTH - 1) // DEPTH
    return tile, split, inside % PASSES, split * steps // splits, (split + 1) * steps // splits


@gluon.jit
def load_rows(x_desc, x_smem, barriers, sizes, PASSES: gl.constexpr, STAGES: gl.constexpr):
    """The loading warp."""
    x_full, x_empty, _w_full, _w_empty = barriers
    _T, H, splits, items = sizes
    QUARTERS: gl.constexpr = ROWS // BLOCK
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, _split, _part, begin, end = find_part(item, splits, H, PASSES)
        for step in range(begin, end):
            slot = count % STAGES
            mbarrier.wait(x_empty.index(slot), (count // STAGES & 1) ^ 1)
            full = x_full.index(slot)
            mbarrier.expect(full, QUARTERS * x_desc.block_type.nbytes)
            for q in gl.static_range(QUARTERS):
                place = [tile * ROWS + q * BLOCK, step * DEPTH]
                tma.async_copy_global_to_shared(
                    x_desc, place, full, x_smem.index(slot * QUARTERS + q)
                )
            count += 1


@gluon.jit
def locate_experts(column, E: gl.constexpr, SIZE: gl.constexpr, N_GROUPS: gl.constexpr):
    """Expert of a column, and whether it is one: groups are padded to SIZE columns."""
    GROUP_SIZE: gl.constexpr = E // N_GROUPS
    group = column // SIZE
    member = column % SIZE
    return group * GROUP_SIZE + member, (group < N_GROUPS) & (member < GROUP_SIZE)


@gluon.jit
def split_weight(
    weight_ptr,
    w_smem,
    barriers,
    sizes,
    E: gl.constexpr,
    SIZE: gl.constexpr,
    N_GROUPS: gl.constexpr,
    PASSES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Four warps: the weight as high and low part, one below the other."""
    _x_full, _x_empty, w_full, w_empty = barriers
    _T, H, splits, items = sizes
    COLUMNS: gl.constexpr = w_smem.shape[1] // 2
    # By 64 experts, 32 numbers a thread: each is read again as soon as its registers are free.
    RUN: gl.constexpr = COLUMNS if COLUMNS < 64 else 64
    RUNS: gl.constexpr = COLUMNS // RUN
    # 16 bytes of bf16 a thread and store, 32 bytes of fp32.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    column = gl.expand_dims(gl.arange(0, DEPTH, gl.SliceLayout(0, layout)), 0)
    row = gl.expand_dims(gl.arange(0, RUN, gl.SliceLayout(1, layout)), 1)
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        _tile, _split, part, begin, end = find_part(item, splits, H, PASSES)
        following = ()
        for r in gl.static_range(RUNS):
            expert, valid = locate_experts(part * COLUMNS + r * RUN + row, E, SIZE, N_GROUPS)
            mask = valid & (column < H - begin * DEPTH)
            source = weight_ptr + begin * DEPTH + (expert * H + column)
            following += (gl.load(source, mask=mask, other=0.0),)
        for step in range(begin, end):
            slot = count % STAGES
            parts = w_smem.index(slot)
            ahead = min(step + 1, end - 1) * DEPTH
            values = following
            following = ()
            for r in gl.static_range(RUNS):
                high = values[r].to(w_smem.dtype)
                low = (values[r] - high.to(gl.float32)).to(w_smem.dtype)
                expert, valid = locate_experts(part * COLUMNS + r * RUN + row, E, SIZE, N_GROUPS)
                mask = valid & (column < H - ahead)
                source = weight_ptr + ahead + (expert * H + column)
                following += (gl.load(source, mask=mask, other=0.0),)
                if r == 0:
                    mbarrier.wait(w_empty.index(slot), (count // STAGES & 1) ^ 1)
                parts.slice(r * RUN, RUN).store(high)
                parts.slice(COLUMNS + r * RUN, RUN).store(low)
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(w_full.index(slot))
            count += 1


@gluon.jit
def split_columns(x):
    """Left and right half of [rows, columns]: renames registers, an MMA thread has both halves."""
    rows: gl.constexpr = x.shape[0]
    half: gl.constexpr = x.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half, 16])
    left, right = x.reshape([rows, 2, half]).permute((0, 2, 1)).split()
    left = gl.convert_layout(left, layout, assert_trivial=True)
    return left, gl.convert_layout(right, layout, assert_trivial=True)


@gluon.jit
def leave_sums(acc, parts_ptr, first, T, SIDE_BY_SIDE: gl.constexpr, STRIDE: gl.constexpr):
    """Adds the parts' sums [64, columns], if there are two, and stores the rows before T."""
    if SIDE_BY_SIDE:
        high, low = split_columns(acc)
        acc = low + high
    layout: gl.constexpr = acc.type.layout
    row = gl.expand_dims(gl.arange(0, BLOCK, gl.SliceLayout(1, layout)), 1)
    column = gl.expand_dims(gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout)), 0)
    exists = (row < T - first) & (column >= 0)
    gl.store(parts_ptr + (row * STRIDE + column), acc, mask=exists)


@gluon.jit
def multiply(
    parts_ptr,
    x_smem,
    w_smem,
    barriers,
    sizes,
    W: gl.constexpr,
    PASSES: gl.constexpr,
    STAGES: gl.constexpr,
    W_STAGES: gl.constexpr,
):
    """Warpgroup W of two: rows 128 W to 128 W + 127 of every tile."""
    x_full, x_empty, w_full, w_empty = barriers
    T, H, splits, items = sizes
    COLUMNS: gl.constexpr = w_smem.shape[1] // 2
    ALL: gl.constexpr = COLUMNS * PASSES
    SIDE_BY_SIDE: gl.constexpr = COLUMNS <= 64
    WIDTH: gl.constexpr = 2 * COLUMNS if SIDE_BY_SIDE else COLUMNS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    QUARTERS: gl.constexpr = ROWS // BLOCK
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, split, part, begin, end = find_part(item, splits, H, PASSES)
        upper = gl.zeros([BLOCK, WIDTH], gl.float32, layout)
        lower = gl.zeros([BLOCK, WIDTH], gl.float32, layout)
        for step in range(begin, end):
            slot = count % STAGES
            w_slot = count % W_STAGES
            mbarrier.wait(w_full.index(w_slot), count // W_STAGES & 1)
            mbarrier.wait(x_full.index(slot), count // STAGES & 1)
            x_upper = x_smem.index(slot * QUARTERS + 2 * W)
            x_lower = x_smem.index(slot * QUARTERS + 2 * W + 1)
            weight = w_smem.index(w_slot)
            if SIDE_BY_SIDE:
                both = weight.permute((1, 0))
                upper = warpgroup_mma(x_upper, both, upper, is_async=True)
                lower = warpgroup_mma(x_lower, both, lower, is_async=True)
                upper, lower = warpgroup_mma_wait(2, (upper, lower))
            else:
                low = weight.slice(COLUMNS, COLUMNS).permute((1, 0))
                high = weight.slice(0, COLUMNS).permute((1, 0))
                upper = warpgroup_mma(x_upper, low, upper, is_async=True)
                lower = warpgroup_mma(x_lower, low, lower, is_async=True)
                upper = warpgroup_mma(x_upper, high, upper, is_async=True)
                lower = warpgroup_mma(x_lower, high, lower, is_async=True)
                upper, lower = warpgroup_mma_wait(4, (upper, lower))
            # The step before this one has ended: its stages may be filled again.
            if step > begin:
                mbarrier.arrive(x_empty.index((count - 1) % STAGES))
                mbarrier.arrive(w_empty.index((count - 1) % W_STAGES))
            count += 1
        upper, lower = warpgroup_mma_wait(0, (upper, lower))
        mbarrier.arrive(x_empty.index((count - 1) % STAGES))
        mbarrier.arrive(w_empty.index((count - 1) % W_STAGES))

        first = tile * ROWS + W * (2 * BLOCK)
        target = parts_ptr + ((gl.cast(split, gl.int64) * T + first) * ALL + part * COLUMNS)
        leave_sums(upper, target, first, T, SIDE_BY_SIDE, ALL)
        leave_sums(lower, target + BLOCK * ALL, first + BLOCK, T, SIDE_BY_SIDE, ALL)


@cache_launches
@gluon.jit(do_not_specialize=["T", "vectors", "splits", "items"])
def logits_hopper_kernel(
    x_desc,
    weight_ptr,
    parts_ptr,
    T,
    vectors,
    splits,
    items,
    E: gl.constexpr,
    SIZE: gl.constexpr,
    N_GROUPS: gl.constexpr,
    PASSES: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    W_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    W_REGISTERS: gl.constexpr,
):
    QUARTERS: gl.constexpr = ROWS // BLOCK
    x_smem = gl.allocate_shared_memory(
        x_desc.dtype, [STAGES * QUARTERS, BLOCK, DEPTH], x_desc.layout
    )
    w_smem = gl.allocate_shared_memory(x_desc.dtype, [W_STAGES, 2 * COLUMNS, DEPTH], x_desc.layout)
    x_full = allocate_barriers(STAGES, 1)
    x_empty = allocate_barriers(STAGES, 2)
    w_full = allocate_barriers(W_STAGES, 1)
    w_empty = allocate_barriers(W_STAGES, 2)
    barriers = (x_full, x_empty, w_full, w_empty)
    # H is a multiple of 8, which the compiler has to see to read 16 bytes at a time.
    sizes = (T, vectors * 8, splits, items)
    gl.warp_specialize(
        [
            (
                multiply,
                (parts_ptr, x_smem, w_smem, barriers, sizes, gl.constexpr(0), PASSES, STAGES,
                 W_STAGES),
            ),
            (
                multiply,
                (parts_ptr, x_smem, w_smem, barriers, sizes, gl.constexpr(1), PASSES, STAGES,
                 W_STAGES),
            ),
            (
                split_weight,
                (weight_ptr, w_smem, barriers, sizes, E, SIZE, N_GROUPS, PASSES, W_STAGES),
            ),
            (load_rows, (x_desc, x_smem, barriers, sizes, PASSES, STAGES)),
        ],
        [4, 4, 1],
        [REGISTERS, W_REGISTERS, 24],
    )  # fmt: skip


def logits_hopper(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    n_groups: int,
    num_sms: int,
    config: HopperConfig | None = None,
) -> torch.Tensor:
    """x @ weight.T in parts [S, T, columns] fp32 whose sum it is; columns as `columns_of` has them.

    x       [T, H] bf16, T ≥ 1, H a multiple of 8, contiguous, at a multiple of 16 bytes
    weight  [E, H] fp32, likewise; sizes that `fits_hopper`
    """
    (T, H), E = x.shape, weight.shape[0]
    groups, size = columns_of(E, n_groups)
    columns = min(groups * size, BLOCK_E)
    passes = groups * size // columns
    config = config or next(config for most, config in CONFIGS.items() if columns <= most)
    row_tiles, steps = ceil_div(T, TILE_ROWS), ceil_div(H, STEP)
    splits = even_splits(row_tiles * passes, steps, ceil_div(steps, DEEPEST))
    items = row_tiles * passes * splits
    parts = weight.new_empty(splits, T, groups * size)
    logits_hopper_kernel[(even_grid(items, num_sms),)](
        describe(x, [BLOCK_ROWS, STEP]),
        weight,
        parts,
        T,
        H // 8,
        splits,
        items,
        E=E,
        SIZE=size,
        N_GROUPS=n_groups,
        PASSES=passes,
        COLUMNS=columns,
        STAGES=config.stages,
        W_STAGES=config.weight_stages,
        REGISTERS=config.registers,
        W_REGISTERS=config.weight_registers,
        num_warps=4,
    )
    return parts
