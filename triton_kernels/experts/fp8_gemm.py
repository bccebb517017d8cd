"""out[r] = rows[r] @ W[expert of r]ᵀ with fp8 inputs: rows scaled 1 × 128, weights 128 × 128.

As in DeepSeek-V3 (report, 3.3.2): the tensor cores add fp8 products with about 14 bits, so the sum
over every 128 of K leaves them for fp32 registers, where the scales are applied (DeepGEMM). One
warp loads with TMA; two warpgroups multiply, and while one scales and adds, the other's products
run.

A tile is 128 rows × 256 columns; a warpgroup has 64 of its rows, in two halves of 128 columns. Per
128 of K and tile, at the tensor cores' full rate of 4,096 multiply-adds a clock and SM:
- products: 4 of 64 × 128 × 128, 256 clocks each → 1024;
- shared memory at 128 B a clock: 48 KiB written, and read 4 · (8 + 16) KiB → 1152, so that at most
  0.89 of the full rate can be had (128 × 128 tiles: 640 of 512, 0.80);
- L2: 48.5 KiB, 49 B a clock where 128 × 128 tiles take 65. Our bf16 kernels get 8.1 TB/s from it
  (48 KiB for 4.2 MFLOP at 690 TFLOPS), which would be enough for 1,370 TFLOPS here (1,020);
- adding: 2 · 64 multiply-adds a thread; two warps a scheduler make that 256 of its 1024 slots.
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
from ..launch.compat import async_load, async_store, barrier
from ..launch.descriptors import describe
from ..launch.shared_memory import (
    allocate,
    allocate_barriers,
    allocate_integers,
    matrix,
    receive,
    send,
)

__all__ = ["BACKWARD", "FORWARD", "Fp8Config", "grouped_fp8_gemm"]

SIDE = 128  # rows of a tile; columns of half a tile; K of a partial sum and of a scale
BLOCK = gl.constexpr(SIDE)
# Integers that the loading warp tells the others of a tile; the first is 0 after the last tile.
FACTS = gl.constexpr(4)
FACT_SLOTS = gl.constexpr(2)


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Compile-time shape of the kernel.

    stages      128 of K in flight, 48.5 KiB each; besides, 32 KiB for the output: 226 of 227 KiB
    group_m     M tiles that share a strip of weights before the next N tile, for reuse in L2
    turns       each warpgroup starts its products when the other's have started, by turns; or when
                it likes
    """

    stages: int = 4
    group_m: int = 16
    turns: bool


# H200, three MLPs: with turns the forward's GEMMs are 1.13, 1.02, 1.04, 1.00, 1.00 and 0.96 times
# as fast as without, the backward's 0.87, 0.89, 0.97, 0.98, 0.97 and 0.90 times. Beside their sizes
# they differ in the scales of weights, which lie K by K in the forward only.
FORWARD, BACKWARD = Fp8Config(turns=True), Fp8Config(turns=False)


@gluon.jit
def locate_tile(tile, offsets_ptr, num_experts, num_n, GROUP_M: gl.constexpr):
    """Expert, first row and N tile of a tile number, in the order of `tiles.locate_tile`."""
    row = tile // num_n * BLOCK
    # The last expert that starts at or before `row`: empty ones lose to the one that holds it.
    expert = 0
    above = num_experts
    while above - expert > 1:
        middle = (expert + above) // 2
        if gl.load(offsets_ptr + middle) <= row:
            expert = middle
        else:
            above = middle
    start = gl.load(offsets_ptr + expert)
    num_m = (gl.load(offsets_ptr + expert + 1) - start) // BLOCK
    inside = tile - start // BLOCK * num_n
    group = inside // (GROUP_M * num_n)
    inside -= group * GROUP_M * num_n
    height = min(num_m - group * GROUP_M, GROUP_M)
    return expert, start + (group * GROUP_M + inside % height) * BLOCK, inside // height


@gluon.jit
def load_tiles(
    descriptors,
    offsets_ptr,
    sizes,
    smem,
    facts_smem,
    barriers,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """The loading warp: 128 of K after the other, of one tile after the other."""
    rows_desc, scale_desc, weight_desc = descriptors
    num_experts, num_n, num_k, scale_row = sizes
    rows_smem, scale_smem, weight_smem = smem
    full, empty, facts_full, facts_empty = barriers
    rows_bytes: gl.constexpr = rows_desc.block_type.nbytes
    scale_bytes: gl.constexpr = scale_desc.block_type.nbytes
    weight_bytes: gl.constexpr = weight_desc.block_type.nbytes

    num_tiles = gl.load(offsets_ptr + num_experts) // BLOCK * num_n
    count = 0
    steps = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, m, n_tile = locate_tile(tile, offsets_ptr, num_experts, num_n, GROUP_M)
        slot = count % FACT_SLOTS
        mbarrier.wait(facts_empty.index(slot), (count // FACT_SLOTS & 1) ^ 1)
        send(facts_smem, slot, (1, expert, m, n_tile), FACTS)
        mbarrier.arrive(facts_full.index(slot))
        count += 1
        for k in range(num_k):
            stage = steps % STAGES
            mbarrier.wait(empty.index(stage), (steps // STAGES & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * (rows_bytes + scale_bytes + weight_bytes))
            for i in gl.static_range(2):
                row = m + i * 64
                place = 2 * stage + i
                async_load(rows_desc, [row, k * BLOCK], bar, rows_smem.index(place))
                async_load(scale_desc, [k * scale_row + row], bar, scale_smem.index(place))
                # The expert is a dimension of its own: beyond N and K come zeros.
                async_load(
                    weight_desc,
                    [expert, (2 * n_tile + i) * BLOCK, k * BLOCK],
                    bar,
                    weight_smem.index(place),
                )
            steps += 1
    # Both warpgroups read the end off the last slot.
    slot = count % FACT_SLOTS
    mbarrier.wait(facts_empty.index(slot), (count // FACT_SLOTS & 1) ^ 1)
    send(facts_smem, slot, (0, 0, 0, 0), FACTS)
    mbarrier.arrive(facts_full.index(slot))


@gluon.jit
def begin_product(rows, weight, last, turns, unit, W: gl.constexpr, TURNS: gl.constexpr):
    """Starts rows [64, 128] @ weight [128, 128]ᵀ in fp32, in the registers of `last`."""
    if TURNS:
        mbarrier.wait(turns.index(W), (unit & 1) ^ (1 - W))
    partial = warpgroup_mma(rows, weight.permute((1, 0)), last, use_acc=False, is_async=True)
    if TURNS:
        mbarrier.arrive(turns.index(1 - W))
    return partial


@gluon.jit
def add_scaled(acc, partial, scale):
    """acc [64, 128] + scale [64] · partial, before anything that follows."""
    acc = acc + partial * gl.expand_dims(scale, 1)
    # No product is in flight: this keeps LLVM from moving the additions behind the next one, which
    # then takes 64 registers of its own (152 bytes a thread of spills, in the loop).
    return warpgroup_mma_wait(0, (acc,))


@gluon.jit
def store_half(acc, out_desc, out_smem, row, column):
    """Rounds [64, 128] and starts its way out, once the one before it has left the buffer."""
    tma.store_wait(0)
    barrier()
    out_smem.store(acc.to(out_desc.dtype))
    fence_async_shared()
    barrier()
    async_store(out_desc, [row, column], out_smem)


@gluon.jit
def multiply_tiles(
    out_desc,
    scale_ptr,
    sizes,
    smem,
    out_smem,
    facts_smem,
    barriers,
    turns,
    W: gl.constexpr,
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,
):
    """Warpgroup W of two: rows 64 W to 64 W + 63 of every tile."""
    num_k, scale_expert, scale_n, scale_k, last_block = sizes
    rows_smem, row_scale_smem, weight_smem = smem
    full, empty, facts_full, facts_empty = barriers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)

    count = 0
    steps = 0
    mbarrier.wait(facts_full.index(0), 0)
    while receive(facts_smem, count % FACT_SLOTS, 0, FACTS) > 0:
        slot = count % FACT_SLOTS
        expert = receive(facts_smem, slot, 1, FACTS)
        row = receive(facts_smem, slot, 2, FACTS) + W * 64
        block = 2 * receive(facts_smem, slot, 3, FACTS)
        left_ptr = scale_ptr + expert * scale_expert + block * scale_n
        right_ptr = scale_ptr + expert * scale_expert + min(block + 1, last_block) * scale_n
        left_scale = gl.load(left_ptr)
        right_scale = gl.load(right_ptr)
        left = gl.zeros([64, 128], gl.float32, layout)
        right = gl.zeros([64, 128], gl.float32, layout)
        partial = gl.zeros([64, 128], gl.float32, layout)
        for k in range(num_k):
            stage = steps % STAGES
            mbarrier.wait(full.index(stage), steps // STAGES & 1)
            row_scale = row_scale_smem.index(2 * stage + W).load(row_layout)
            # The next weights' scales come while these products run.
            ahead = min(k + 1, num_k - 1) * scale_k
            left_ahead = gl.load(left_ptr + ahead)
            right_ahead = gl.load(right_ptr + ahead)
            rows = rows_smem.index(2 * stage + W)
            weight = matrix(weight_smem, 2 * stage)
            partial = begin_product(rows, weight, partial, turns, 2 * steps, W, TURNS)
            partial = warpgroup_mma_wait(0, (partial,))
            left = add_scaled(left, partial, row_scale * left_scale)
            weight = matrix(weight_smem, 2 * stage + 1)
            partial = begin_product(rows, weight, partial, turns, 2 * steps + 1, W, TURNS)
            if k == num_k - 1:
                # The left half leaves beside the right half's last product.
                store_half(left, out_desc, out_smem.index(W), row, block * BLOCK)
            partial = warpgroup_mma_wait(0, (partial,))
            mbarrier.arrive(empty.index(stage))
            right = add_scaled(right, partial, row_scale * right_scale)
            left_scale = left_ahead
            right_scale = right_ahead
            steps += 1
        mbarrier.arrive(facts_empty.index(slot))
        store_half(right, out_desc, out_smem.index(W), row, (block + 1) * BLOCK)
        count += 1
        slot = count % FACT_SLOTS
        mbarrier.wait(facts_full.index(slot), count // FACT_SLOTS & 1)
    tma.store_wait(0)


@cache_launches(in_pairs=True)
@gluon.jit(
    do_not_specialize=[
        "num_experts",
        "num_n",
        "num_k",
        "row_scale_k",
        "scale_expert",
        "scale_n",
        "scale_k",
        "last_block",
    ]
)
def grouped_fp8_kernel(
    rows_desc,
    row_scale_desc,
    weight_desc,
    out_desc,
    weight_scale_ptr,
    offsets_ptr,
    num_experts,
    num_n,
    num_k,
    row_scale_k,
    scale_expert,
    scale_n,
    scale_k,
    last_block,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    TURNS: gl.constexpr,
):
    smem = (
        allocate(rows_desc, 2 * STAGES),
        allocate(row_scale_desc, 2 * STAGES),
        allocate(weight_desc, 2 * STAGES),
    )
    out_smem = allocate(out_desc, 2)
    facts_smem = allocate_integers(FACT_SLOTS * FACTS)
    # The loading warp arrives once, the warpgroups once each.
    barriers = (
        allocate_barriers(STAGES, 1),
        allocate_barriers(STAGES, 2),
        allocate_barriers(FACT_SLOTS, 1),
        allocate_barriers(FACT_SLOTS, 2),
    )
    turns = allocate_barriers(2, 1)
    sizes = (num_k, scale_expert, scale_n, scale_k, last_block)
    gl.warp_specialize(
        [
            (
                multiply_tiles,
                (out_desc, weight_scale_ptr, sizes, smem, out_smem, facts_smem, barriers, turns,
                 gl.constexpr(0), STAGES, TURNS),
            ),
            (
                multiply_tiles,
                (out_desc, weight_scale_ptr, sizes, smem, out_smem, facts_smem, barriers, turns,
                 gl.constexpr(1), STAGES, TURNS),
            ),
            (
                load_tiles,
                ((rows_desc, row_scale_desc, weight_desc), offsets_ptr,
                 (num_experts, num_n, num_k, row_scale_k), smem, facts_smem, barriers, STAGES,
                 GROUP_M),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def grouped_fp8_gemm(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
    out: torch.Tensor,
    *,
    num_sms: int,
    config: Fp8Config = FORWARD,
) -> torch.Tensor:
    """Multiplies every row with its expert's matrix.

    rows            [R, K] e4m3, K a multiple of 16
    row_scale       [ceil(K / 128), R] fp32 contiguous: of 128 columns of a row (`quantize_rows`)
    weight          [L, N, K] e4m3, contiguous; fp8 products take both sides K by K
    weight_scale    [L, ceil(N / 128), ceil(K / 128)] fp32 of any strides, so that the scales of a
                    transposed weight are a transposed view
    expert_offsets  [L + 1] int32, multiples of 128, last <= R
    out             [R, N] bf16, N a multiple of 8, written up to row expert_offsets[-1]
    """
    R, K = rows.shape
    L, N, _ = weight.shape
    num_n = ceil_div(N, 2 * SIDE)
    grouped_fp8_kernel[(max(1, min(num_sms, R // SIDE * num_n)),)](
        describe(rows, [64, SIDE]),
        describe(row_scale.view(-1), [64]),
        describe(weight, [1, SIDE, SIDE]),
        describe(out, [64, SIDE]),
        weight_scale,
        expert_offsets,
        L,
        num_n,
        ceil_div(K, SIDE),
        R,
        *weight_scale.stride(),
        ceil_div(N, SIDE) - 1,
        STAGES=config.stages,
        GROUP_M=config.group_m,
        TURNS=config.turns,
        num_warps=4,
    )
    return out
