"""The router's logits on Hopper, each warp with a role of its own; `router_choice` chooses.

Letters: T tokens, H hidden, E experts, S splits of H. The arithmetic is `router`'s, for x in bf16:
weight = high + low, two bf16 parts, which a first kernel leaves in memory. A weight in bf16 is its
own high part; it needs no other product, and the first kernel only where groups are padded. In the
second kernel a program's tile is 256 rows of x and 64 or 128 experts:

    two loaders   a warp each, by TMA, 64 columns a stage: x, and the weight's parts
    products      two warpgroups, weight @ x.T: experts are the rows, 64 a product. With 128 each
                  warpgroup has 64 of them and all rows of x, else all experts and half the rows.

That way a product is 64 × 256 and takes 10 KiB from shared memory in the 128 clocks of its 16
columns; 128 experts take 160 KiB a step and 64 come in, 109 bytes a clock of at most 128, and 32 of
the 32 to 42 bytes a clock that an SM gets from L2. As x @ weight.T, 64 × 128, it would be 128.

Tensor cores cut sums (`router` has the arithmetic), so that one ends after 28 steps: 112 of 16
columns for each part lose 2.6e-6, both in one sum 5.2e-6. Up to 64 experts each part has sums of
its own. A warpgroup adds what follows to what it left in memory. Where tiles are fewer than SMs, H
is split, and the choice adds the splits in order: the same bits in every run and for every
`num_sms`.

T = 8192, H = 7168 on an H200, 128 programs, E = 64, 128, 256: 41, 50, 98 µs with the first kernel,
where x takes 28 µs at 4.2 TB/s and the products 22, 43 and 86 at 700 TFLOPS. E = 64 with a weight
in bf16: 35 µs, of which 34 are the loads of x and the launch.
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..experts.tiles_hopper import split_columns
from ..launch.arithmetic import ceil_div
from ..launch.cached import cache_launches
from ..launch.compat import async_load
from ..launch.descriptors import describe
from ..launch.shared_memory import allocate, allocate_barriers
from .tiles import BLOCK_E, columns_of, even_grid, even_splits

__all__ = ["HopperConfig", "logits_hopper", "split_weight"]

TILE_ROWS, STEP, BLOCK_ROWS = 256, 64, 64
ROWS = gl.constexpr(TILE_ROWS)
DEPTH = gl.constexpr(STEP)  # columns of a stage: rows of 128 bytes
BLOCK = gl.constexpr(BLOCK_ROWS)  # experts of a product
DEEPEST = gl.constexpr(28)  # steps of one sum
# Of the weight at a time where it is split, 16 numbers a thread.
SPLIT_ROWS, SPLIT_COLUMNS, SPLIT_WARPS = 8, 512, 8


@dataclass(frozen=True, kw_only=True)
class HopperConfig:
    """Compile-time shape of the kernel.

    stages  in flight, of 32 KiB of x and for each expert 128 bytes of each part
    early   whether it starts while the weight is still being split, with loads of x
    """

    stages: int
    early: bool = True


# By experts of a program, times parts: 5 × 40 KiB, 4 × 48, 3 × 64.
CONFIGS = {64: HopperConfig(stages=5), 128: HopperConfig(stages=4), 256: HopperConfig(stages=3)}


@gluon.jit
def wait_for_launch_before():
    """Until the kernel launched before this one has ended, where this one may start early."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def let_next_launch_start():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;",
        "=r",
        [],
        gl.int32,
        is_pure=False,
        pack=1,
    )


# ---- Both parts of the weight ----


@gluon.jit
def locate_experts(column, E: gl.constexpr, SIZE: gl.constexpr, N_GROUPS: gl.constexpr):
    """Expert of a column, and whether it is one: groups are padded to SIZE columns."""
    GROUP_SIZE: gl.constexpr = E // N_GROUPS
    group = column // SIZE
    member = column % SIZE
    return group * GROUP_SIZE + member, (group < N_GROUPS) & (member < GROUP_SIZE)


@cache_launches
@gluon.jit(do_not_specialize=["vectors", "strips", "items"])
def split_weight_kernel(
    weight_ptr,
    parts_ptr,
    vectors,
    strips,
    items,
    E: gl.constexpr,
    SIZE: gl.constexpr,
    N_GROUPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    PARTS: gl.constexpr,
    HEIGHT: gl.constexpr,
    WIDTH: gl.constexpr,
    WARPS: gl.constexpr,
):
    let_next_launch_start()
    H = vectors * 8
    # 32 bytes of fp32 a thread, 16 of bf16.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    row = gl.expand_dims(gl.arange(0, HEIGHT, gl.SliceLayout(1, layout)), 1)
    column = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)), 0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first = item // strips * HEIGHT
        left = item % strips * WIDTH
        inside = column < H - left
        expert, valid = locate_experts(first + row, E, SIZE, N_GROUPS)
        value = gl.load(weight_ptr + left + (expert * H + column), mask=valid & inside, other=0.0)
        high = value.to(gl.bfloat16)
        # COLUMNS rows of the high part, as many of the low one, and again.
        start = first // COLUMNS * (PARTS * COLUMNS) + first % COLUMNS
        target = parts_ptr + left + ((start + row) * H + column)
        exists = inside & (row >= 0)
        gl.store(target, high, mask=exists)
        if PARTS == 2:
            low = (value - high.to(gl.float32)).to(gl.bfloat16)
            gl.store(target + COLUMNS * H, low, mask=exists)


def split_weight(weight: torch.Tensor, *, n_groups: int, num_sms: int) -> torch.Tensor:
    """The weight [E, H] as [passes, parts, N, H] bf16: N of its columns, 64 or 128, a pass, as
    `columns_of` has them, of fp32 the high part and the low part; zeros where there is no expert.
    """
    E, H = weight.shape
    groups, size = columns_of(E, n_groups)
    passes, columns = _passes(groups * size)
    num_parts = _parts(weight)
    parts = torch.empty(passes, num_parts, columns, H, dtype=torch.bfloat16, device=weight.device)
    strips = ceil_div(H, SPLIT_COLUMNS)
    items = passes * columns // SPLIT_ROWS * strips
    split_weight_kernel[(even_grid(items, num_sms),)](
        weight,
        parts,
        H // 8,
        strips,
        items,
        E=E,
        SIZE=size,
        N_GROUPS=n_groups,
        COLUMNS=columns,
        PARTS=num_parts,
        HEIGHT=SPLIT_ROWS,
        WIDTH=SPLIT_COLUMNS,
        WARPS=SPLIT_WARPS,
        num_warps=SPLIT_WARPS,
    )
    return parts


def _passes(columns: int) -> tuple[int, int]:
    """How often a tile is multiplied, and with how many columns, 64 or 128: 256 → (2, 128)."""
    return ceil_div(columns, BLOCK_E), max(BLOCK_ROWS, min(columns, BLOCK_E))


def _parts(weight: torch.Tensor) -> int:
    return 1 if weight.dtype == torch.bfloat16 else 2


# ---- Logits ----


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
def load_stages(
    desc,
    smem,
    barriers,
    sizes,
    IS_WEIGHT: gl.constexpr,
    PASSES: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):
    """A loading warp, of x or of the weight."""
    full, empty = barriers
    _T, H, splits, items = sizes
    if IS_WEIGHT and EARLY:
        wait_for_launch_before()
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, _split, part, begin, end = find_part(item, splits, H, PASSES)
        row = (part if IS_WEIGHT else tile) * desc.block_type.shape[0]
        for step in range(begin, end):
            slot = count % STAGES
            mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(slot), desc.block_type.nbytes)
            place = [row, step * DEPTH]
            async_load(desc, place, full.index(slot), smem.index(slot))
            count += 1


@gluon.jit
def leave_sums(sums, parts_ptr, tokens, again, STRIDE: gl.constexpr):
    """Stores sums [64 experts, N tokens] as rows of tokens, added to what is there if `again`: what
    a thread left there it finds. 64 tokens at a time, 32 numbers a thread."""
    if sums.shape[1] > 64:
        half: gl.constexpr = sums.shape[1] // 2
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half, 16])
        left, right = split_columns(sums)
        left = gl.convert_layout(left, layout, assert_trivial=True)
        right = gl.convert_layout(right, layout, assert_trivial=True)
        leave_sums(left, parts_ptr, tokens, again, STRIDE)
        leave_sums(right, parts_ptr + half * STRIDE, tokens - half, again, STRIDE)
    else:
        layout: gl.constexpr = sums.type.layout
        expert = gl.expand_dims(gl.arange(0, BLOCK, gl.SliceLayout(1, layout)), 1)
        token = gl.expand_dims(gl.arange(0, sums.shape[1], gl.SliceLayout(0, layout)), 0)
        exists = (token < tokens) & (expert < STRIDE)
        place = parts_ptr + (token * STRIDE + expert)
        if again:
            sums += gl.load(place, mask=exists, other=0.0)
        gl.store(place, sums, mask=exists)


@gluon.jit
def multiply(
    parts_ptr,
    x_smem,
    w_smem,
    barriers,
    sizes,
    W: gl.constexpr,
    STRIDE: gl.constexpr,
    PARTS: gl.constexpr,
    PASSES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Warpgroup W of two: half of a tile's experts, or of its rows."""
    full, empty = barriers
    T, H, splits, items = sizes
    COLUMNS: gl.constexpr = w_smem.shape[1] // PARTS
    BY_EXPERTS: gl.constexpr = COLUMNS > BLOCK
    N: gl.constexpr = ROWS if BY_EXPERTS else ROWS // 2
    EXPERT: gl.constexpr = W * BLOCK if BY_EXPERTS else 0
    ROW: gl.constexpr = 0 if BY_EXPERTS else W * N
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, split, part, begin, end = find_part(item, splits, H, PASSES)
        first = tile * ROWS + ROW
        target = parts_ptr + (gl.cast(split, gl.int64) * T + first) * STRIDE
        target += part * COLUMNS + EXPERT
        for start in range(begin, end, DEEPEST):
            sums = gl.zeros([BLOCK, N], gl.float32, layout)
            small = gl.zeros([BLOCK, N], gl.float32, layout)  # unused where all share the sums
            for step in range(start, min(start + DEEPEST, end)):
                slot = count % STAGES
                mbarrier.wait(full.index(slot), count // STAGES & 1)
                x = x_smem.index(slot).slice(ROW, N).permute((1, 0))
                high = w_smem.index(slot).slice(EXPERT, BLOCK)
                # The step before this one ends.
                if PARTS == 1:
                    sums = warpgroup_mma(high, x, sums, is_async=True)
                    sums = warpgroup_mma_wait(1, (sums,))
                else:
                    low = w_smem.index(slot).slice(COLUMNS + EXPERT, BLOCK)
                    if BY_EXPERTS:
                        sums = warpgroup_mma(low, x, sums, is_async=True)
                        sums = warpgroup_mma(high, x, sums, is_async=True)
                        sums = warpgroup_mma_wait(2, (sums,))
                    else:
                        small = warpgroup_mma(low, x, small, is_async=True)
                        sums = warpgroup_mma(high, x, sums, is_async=True)
                        small, sums = warpgroup_mma_wait(2, (small, sums))
                if step > start:
                    mbarrier.arrive(empty.index((count - 1) % STAGES))
                count += 1
            if BY_EXPERTS or PARTS == 1:
                sums = warpgroup_mma_wait(0, (sums,))
            else:
                small, sums = warpgroup_mma_wait(0, (small, sums))
                sums += small
            mbarrier.arrive(empty.index((count - 1) % STAGES))
            leave_sums(sums, target, T - first, start > begin, STRIDE)


@cache_launches
@gluon.jit(do_not_specialize=["T", "vectors", "splits", "items"])
def logits_hopper_kernel(
    x_desc,
    weight_desc,
    parts_ptr,
    T,
    vectors,
    splits,
    items,
    STRIDE: gl.constexpr,
    PARTS: gl.constexpr,
    PASSES: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):
    x_smem = allocate(x_desc, STAGES)
    w_smem = allocate(weight_desc, STAGES)
    barriers = (allocate_barriers(STAGES, 2), allocate_barriers(STAGES, 2))
    sizes = (T, vectors * 8, splits, items)
    gl.warp_specialize(
        [
            (
                multiply,
                (parts_ptr, x_smem, w_smem, barriers, sizes, gl.constexpr(0), STRIDE, PARTS,
                 PASSES, STAGES),
            ),
            (
                multiply,
                (parts_ptr, x_smem, w_smem, barriers, sizes, gl.constexpr(1), STRIDE, PARTS,
                 PASSES, STAGES),
            ),
            (
                load_stages,
                (x_desc, x_smem, barriers, sizes, gl.constexpr(False), PASSES, STAGES, EARLY),
            ),
            (
                load_stages,
                (weight_desc, w_smem, barriers, sizes, gl.constexpr(True), PASSES, STAGES, EARLY),
            ),
        ],
        [4, 1, 1],
        [232, 40, 40],
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
    weight  [E, H] fp32 or bf16, likewise; sizes that `fits_hopper`
    """
    (T, H), E = x.shape, weight.shape[0]
    groups, size = columns_of(E, n_groups)
    passes, columns = _passes(groups * size)
    num_parts = _parts(weight)
    config = config or CONFIGS[columns * num_parts]
    row_tiles = ceil_div(T, TILE_ROWS)
    splits = even_splits(row_tiles * passes, ceil_div(H, STEP))
    items = row_tiles * passes * splits
    # Beyond its end TMA reads zeros.
    as_it_is = num_parts == 1 and (n_groups == 1 or size == E // n_groups)
    parts = weight if as_it_is else split_weight(weight, n_groups=n_groups, num_sms=num_sms)
    early = config.early and not as_it_is  # which waits for the one kernel that writes `parts`
    sums = torch.empty(splits, T, groups * size, dtype=torch.float32, device=x.device)
    logits_hopper_kernel[(even_grid(items, num_sms),)](
        describe(x, [TILE_ROWS, STEP]),
        describe(parts.view(-1, H), [num_parts * columns, STEP]),
        sums,
        T,
        H // 8,
        splits,
        items,
        STRIDE=groups * size,
        PARTS=num_parts,
        PASSES=passes,
        STAGES=config.stages,
        EARLY=early,
        num_warps=4,
        launch_pdl=early,
    )
    return sums
