"""dq in a fixed order: every tile of queries walks over its keys, as in the forward.

    p = exp(scale · q kᵀ − lse)        dq = scale · (p (do vᵀ − delta)) k

Beside `attention_backward` without dq it computes the scores and their gradient a second time,
seven products where five do: the price of the same bits in every run.
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

from ..launch.cached import cache_launches
from ..launch.compat import async_load, async_store, barrier
from ..launch.shared_memory import allocate, allocate_integers, matrix, receive, send
from .scores import hide_scores, issue_scores, score_blocks
from .tiles import (
    INTEGERS,
    LN_2,
    ROWS,
    allocate_split,
    allocate_stages,
    box,
    describe_rows,
    describe_split,
    lay_out,
    load_split,
    locate_tile,
    next_tile,
    scratch_row,
    sequence_span,
)

# Integers that the loading warp tells the others of a tile; the first is 0 after the last tile.
FACTS = gl.constexpr(8)


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """Compile-time shape of the kernel.

    block   keys of a block: block registers a thread for the scores and their gradient, D / 2 for
            dq, block / 4 for ds, of 232
    stages  blocks of keys and values in flight
    """

    block: int = 64
    stages: int = 3


# By (D, V). Shared memory in KiB: (D + V) / 4 for the tile, stages · block (D + V) / 512.
QUERY = {
    (64, 64): QueryConfig(block=128, stages=2),  # 32 + 64
    (128, 128): QueryConfig(),  # 64 + 96
    (192, 128): QueryConfig(stages=2),  # 80 + 80
}


@gluon.jit
def load_tiles(
    descriptors,
    tiles,
    tables,
    smem,
    rest_smem,
    facts_smem,
    barriers,
    drawn_from,
    CAUSAL: gl.constexpr,
    VARLEN: gl.constexpr,
    REST: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
):
    """The loading warp: draws a tile, loads its queries and output gradients, then the keys and
    values that they see."""
    q_desc, k_desc, v_desc, do_desc, q_rest_desc, k_rest_desc = descriptors
    q_smem, k_smem, v_smem, do_smem = smem
    q_rest, k_rest = rest_smem
    num_tiles, num_m, num_heads, share, outer, group, q_length, k_length, padded = tiles
    starts_q, starts_k, sequences = tables
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    BLOCK: gl.constexpr = k_desc.block_type.shape[-2]
    q_rest_bytes: gl.constexpr = q_rest_desc.block_type.nbytes if REST else 0
    k_rest_bytes: gl.constexpr = k_rest_desc.block_type.nbytes if REST else 0
    q_bytes: gl.constexpr = q_desc.block_type.nbytes + do_desc.block_type.nbytes + q_rest_bytes

    tile = gl.program_id(0)
    tile_count = 0
    count = 0
    while tile < num_tiles:
        b, h, block = locate_tile(
            tile, num_m, num_heads, outer, group, starts_q, sequences, VARLEN, ROWS, CAUSAL
        )
        q_start, q_rows = sequence_span(b, starts_q, q_length, VARLEN)
        if block * ROWS < q_rows:
            k_start, k_rows = sequence_span(b, starts_k, k_length, VARLEN)
            end, _whole = score_blocks(block, 0, q_rows, k_rows, CAUSAL, BLOCK, ROWS)
            scratch = scratch_row(b, h, num_heads, q_start, padded, VARLEN) + block * ROWS
            mbarrier.wait(q_empty.index(0), (tile_count & 1) ^ 1)
            facts = (1, b, h, block, q_start, q_rows, k_rows, scratch)
            send(facts_smem, 0, facts, FACTS)
            full = q_full.index(0)
            mbarrier.expect(full, 2 * q_bytes)
            for w in gl.static_range(2):
                row = block * ROWS + w * 64
                load_split(
                    q_desc, q_rest_desc, (b, h, q_start, q_rows), row, full, q_smem, q_rest, w,
                    VARLEN, REST,
                )  # fmt: skip
                place = box(b, h, q_start, q_rows, row, 0, VARLEN)
                async_load(do_desc, place, full, do_smem.index(w))
            tile_count += 1
            for i in range(end):
                row = (end - 1 - i) * BLOCK
                slot = count % STAGES
                phase = (count // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(slot), phase)
                full = k_full.index(slot)
                mbarrier.expect(full, k_desc.block_type.nbytes + k_rest_bytes)
                load_split(
                    k_desc, k_rest_desc, (b, h // share, k_start, k_rows), row, full, k_smem,
                    k_rest, slot, VARLEN, REST,
                )  # fmt: skip
                mbarrier.wait(v_empty.index(slot), phase)
                full = v_full.index(slot)
                mbarrier.expect(full, v_desc.block_type.nbytes)
                place = box(b, h // share, k_start, k_rows, row, 0, VARLEN)
                async_load(v_desc, place, full, v_smem.index(slot))
                count += 1
        tile = next_tile(drawn_from, num_tiles)
    mbarrier.wait(q_empty.index(0), (tile_count & 1) ^ 1)
    send(facts_smem, 0, (0,), 1)
    mbarrier.arrive(q_full.index(0))


@gluon.jit
def add_block(
    block,
    row,
    q_rows,
    k_rows,
    lse,
    delta,
    dq,
    dq_rest,
    smem,
    rest_smem,
    barriers,
    count,
    scale,
    W: gl.constexpr,
    MASKED: gl.constexpr,
    CAUSAL: gl.constexpr,
    REST: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Adds what keys block · BLOCK to (block + 1) · BLOCK − 1 give."""
    q_smem, k_smem, v_smem, do_smem = smem
    q_rest_smem, k_rest_smem = rest_smem
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty = barriers
    BLOCK: gl.constexpr = k_smem.shape[-2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    slot = count % STAGES
    phase = count // STAGES & 1
    # Always 0, unknown to the compiler: see attention_backward.
    only = count >> 30
    q = matrix(q_smem, W + only)
    q_rest = matrix(q_rest_smem, W + only)
    mbarrier.wait(k_full.index(slot), phase)
    s = issue_scores(q, q_rest, k_smem, k_rest_smem, slot, layout, BLOCK, REST)
    mbarrier.wait(v_full.index(slot), phase)
    dp = gl.zeros([64, BLOCK], gl.float32, layout)
    v = matrix(v_smem, slot).permute((1, 0))
    dp = warpgroup_mma(matrix(do_smem, W + only), v, dp, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, (s,))
    if MASKED:
        s = hide_scores(s, block * BLOCK, row, q_rows, k_rows, CAUSAL)
    p = gl.exp2(s * scale - gl.expand_dims(lse, 1))
    dp = warpgroup_mma_wait(0, (dp,))
    mbarrier.arrive(v_empty.index(slot))
    ds = (p * (dp - gl.expand_dims(delta, 1))).to(q_smem.dtype)
    operand = gl.convert_layout(ds, gl.DotOperandLayout(0, dq.type.layout, 2))
    dq = warpgroup_mma(operand, matrix(k_smem, slot), dq, is_async=True)
    if REST:
        rest_operand = gl.convert_layout(ds, gl.DotOperandLayout(0, dq_rest.type.layout, 2))
        dq_rest = warpgroup_mma(rest_operand, matrix(k_rest_smem, slot), dq_rest, is_async=True)
        operand, rest_operand, dq, dq_rest = warpgroup_mma_wait(
            0, (operand, rest_operand, dq, dq_rest)
        )
    else:
        operand, dq = warpgroup_mma_wait(0, (operand, dq))
    mbarrier.arrive(k_empty.index(slot))
    return dq, dq_rest, count + 1


@gluon.jit
def compute_tiles(
    dq_desc,
    dq_rest_desc,
    lse_ptr,
    delta_ptr,
    smem,
    rest_smem,
    facts_smem,
    barriers,
    scale,
    W: gl.constexpr,
    CAUSAL: gl.constexpr,
    VARLEN: gl.constexpr,
    REST: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
):
    """Warpgroup W of two: rows 64 W to 64 W + 63 of every tile."""
    q_smem, k_smem, _v_smem, _do_smem = smem
    q_rest_smem, _k_rest_smem = rest_smem
    q_full, q_empty, _k_full, _k_empty, _v_full, _v_empty = barriers
    BLOCK: gl.constexpr = k_smem.shape[-2]
    D: gl.constexpr = q_smem.shape[-1]
    R: gl.constexpr = q_rest_smem.shape[-1]
    dtype: gl.constexpr = q_smem.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])

    count = 0
    tile_count = 0
    mbarrier.wait(q_full.index(0), 0)
    while receive(facts_smem, 0, 0, FACTS) > 0:
        block = receive(facts_smem, 0, 3, FACTS)
        q_rows = receive(facts_smem, 0, 5, FACTS)
        k_rows = receive(facts_smem, 0, 6, FACTS)
        row = block * ROWS + W * 64
        end, whole = score_blocks(block, row, q_rows, k_rows, CAUSAL, BLOCK, ROWS)
        whole = min(whole, end)
        i = receive(facts_smem, 0, 7, FACTS) + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
        lse = gl.load(lse_ptr + i)
        delta = gl.load(delta_ptr + i)
        dq = gl.zeros([64, D], gl.float32, dq_layout)
        dq_rest = gl.zeros([64, R], gl.float32, rest_layout)
        for step in range(end - whole):
            dq, dq_rest, count = add_block(
                end - 1 - step, row, q_rows, k_rows, lse, delta, dq, dq_rest, smem, rest_smem,
                barriers, count, scale, W, True, CAUSAL, REST, STAGES,
            )  # fmt: skip
        for step in range(whole):
            dq, dq_rest, count = add_block(
                whole - 1 - step, row, q_rows, k_rows, lse, delta, dq, dq_rest, smem, rest_smem,
                barriers, count, scale, W, False, CAUSAL, REST, STAGES,
            )  # fmt: skip
        # Through this warpgroup's own queries, which are not read any more.
        b = receive(facts_smem, 0, 1, FACTS)
        h = receive(facts_smem, 0, 2, FACTS)
        q_start = receive(facts_smem, 0, 4, FACTS)
        matrix(q_smem, W).store((dq * (scale * LN_2)).to(dtype))
        if REST:
            matrix(q_rest_smem, W).store((dq_rest * (scale * LN_2)).to(dtype))
        fence_async_shared()
        barrier()
        place = box(b, h, q_start, q_rows, row, 0, VARLEN)
        async_store(dq_desc, place, q_smem.index(W))
        if REST:
            place = box(b, h, q_start, q_rows, row, D, VARLEN)
            async_store(dq_rest_desc, place, q_rest_smem.index(W))
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(0))
        tile_count += 1
        mbarrier.wait(q_full.index(0), tile_count & 1)


@cache_launches(in_pairs=True)
@gluon.jit(
    do_not_specialize=INTEGERS,
    do_not_specialize_on_alignment=["starts_q_table", "starts_k_table"],
)
def query_gradient_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    q_rest_desc,
    k_rest_desc,
    dq_desc,
    dq_rest_desc,
    lse_ptr,
    delta_ptr,
    starts_q_table,
    starts_k_table,
    counter_ptr,
    limit_ptr,
    scale,
    num_tiles,
    num_m,
    num_heads,
    share,
    outer,
    group,
    sequences,
    q_length,
    k_length,
    padded,
    CAUSAL: gl.constexpr,
    VARLEN: gl.constexpr,
    REST: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
):
    q_smem, q_rest = allocate_split(q_desc, q_rest_desc, 2, REST)
    do_smem = allocate(do_desc, 2)
    k_smem, k_rest = allocate_split(k_desc, k_rest_desc, STAGES, REST)
    v_smem = allocate(v_desc, STAGES)
    facts_smem = allocate_integers(FACTS)
    q_full, q_empty = allocate_stages(1)
    k_full, k_empty = allocate_stages(STAGES)
    v_full, v_empty = allocate_stages(STAGES)

    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    tiles = (num_tiles, num_m, num_heads, share, outer, group, q_length, k_length, padded)
    tables = (starts_q_table, starts_k_table, sequences)
    smem = (q_smem, k_smem, v_smem, do_smem)
    rest = (q_rest, k_rest)
    sources = (q_desc, k_desc, v_desc, do_desc, q_rest_desc, k_rest_desc)
    gl.warp_specialize(
        [
            (
                compute_tiles,
                (dq_desc, dq_rest_desc, lse_ptr, delta_ptr, smem, rest, facts_smem, barriers, scale,
                 gl.constexpr(0), CAUSAL, VARLEN, REST, STAGES, ROWS),
            ),
            (
                compute_tiles,
                (dq_desc, dq_rest_desc, lse_ptr, delta_ptr, smem, rest, facts_smem, barriers, scale,
                 gl.constexpr(1), CAUSAL, VARLEN, REST, STAGES, ROWS),
            ),
            (
                load_tiles,
                (sources, tiles, tables, smem, rest, facts_smem, barriers,
                 (counter_ptr, limit_ptr), CAUSAL, VARLEN, REST, STAGES, ROWS),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def query_gradient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    starts_q: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    *,
    causal: bool,
    scale: float,
    num_sms: int,
    config: QueryConfig | None = None,
) -> None:
    """Writes dq, shaped like q; the rest as in `attention_backward`."""
    varlen = starts_q is not None
    (B, N, _, D), V = q.shape, v.shape[3]
    config = config or QUERY[D, V]
    half = ROWS // 2
    grid, arguments = lay_out(q, v, starts_q, starts_k, scale=scale, num_sms=num_sms)
    q_desc, q_rest_desc = describe_split(q, half, varlen)
    k_desc, k_rest_desc = describe_split(k, config.block, varlen)
    dq_desc, dq_rest_desc = describe_split(dq, half, varlen)
    query_gradient_kernel[grid](
        q_desc,
        k_desc,
        describe_rows(v, config.block, V, varlen),
        describe_rows(d_out, half, V, varlen),
        q_rest_desc,
        k_rest_desc,
        dq_desc,
        dq_rest_desc,
        lse,
        delta,
        *arguments,
        lse.shape[0] // (N if varlen else B * N),
        CAUSAL=causal,
        VARLEN=varlen,
        REST=D > 128,
        STAGES=config.stages,
        ROWS=ROWS,
        num_warps=4,
    )
