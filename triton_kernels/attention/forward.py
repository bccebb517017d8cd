"""out = softmax(scale · q kᵀ) v, with the logsumexp of every row.

One warp loads with TMA; two warpgroups compute 64 rows of queries each. Inside a warpgroup the
scores of the next block are computed beside this block's product with v; the other warpgroup's
products fill the time of its exponentials, by themselves or, as in FlashAttention-3 (arXiv
2407.08608), in turns.
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
from ..launch.shared_memory import (
    allocate,
    allocate_barriers,
    allocate_integers,
    matrix,
    receive,
    send,
)
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
    sequence_span,
)

# Integers that the loading warp tells the others of a tile; the first is 0 after the last tile.
FACTS = gl.constexpr(7)


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """Compile-time shape of the kernel.

    block       keys of a block; their scores take block / 2 registers a thread, the output V / 2,
                the probabilities block / 4, of 240
    stages      blocks of keys and of values in flight
    q_stages    tiles of queries in flight; the output leaves through its own queries' memory
    take_turns  warpgroups issue their products in turn: for D = 128 2 % slower than without (885
                against 871 us at B4 N32 S4096, 3450 against 3390 at B1 N32 S16384, H200)
    """

    block: int = 128
    stages: int = 2
    q_stages: int = 2
    take_turns: bool = False


# By (D, V). Shared memory in KiB: 128 q_stages D / 512 + stages · block (D + V) / 512.
FORWARD = {
    (64, 64): ForwardConfig(stages=4, take_turns=True),  # 32 + 128
    (128, 128): ForwardConfig(),  # 64 + 128
    (192, 128): ForwardConfig(q_stages=1, take_turns=True),  # 48 + 160
}


@gluon.jit
def load_tiles(
    descriptors,
    tiles,
    tables,
    q_smem,
    k_smem,
    v_smem,
    facts_smem,
    barriers,
    drawn_from,
    CAUSAL: gl.constexpr,
    VARLEN: gl.constexpr,
    REST: gl.constexpr,
    BLOCK: gl.constexpr,
    Q_STAGES: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
):
    """The loading warp: draws a tile, loads its queries, then keys and values, the last first."""
    q_desc, k_desc, v_desc, q_rest_desc, k_rest_desc = descriptors
    q_smem, q_rest = q_smem
    k_smem, k_rest = k_smem
    num_tiles, num_m, num_heads, share, outer, group, q_length, k_length = tiles
    starts_q, starts_k, sequences = tables
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    q_bytes: gl.constexpr = q_desc.block_type.nbytes
    k_bytes: gl.constexpr = k_desc.block_type.nbytes
    v_bytes: gl.constexpr = v_desc.block_type.nbytes
    q_rest_bytes: gl.constexpr = q_rest_desc.block_type.nbytes if REST else 0
    k_rest_bytes: gl.constexpr = k_rest_desc.block_type.nbytes if REST else 0

    tile = gl.program_id(0)
    q_count = 0
    k_count = 0
    v_count = 0
    while tile < num_tiles:
        b, h, block = locate_tile(
            tile, num_m, num_heads, outer, group, starts_q, sequences, VARLEN, ROWS, CAUSAL
        )
        q_start, q_rows = sequence_span(b, starts_q, q_length, VARLEN)
        if block * ROWS < q_rows:
            k_start, k_rows = sequence_span(b, starts_k, k_length, VARLEN)
            end, _whole = score_blocks(block, 0, q_rows, k_rows, CAUSAL, BLOCK, ROWS)
            slot = q_count % Q_STAGES
            mbarrier.wait(q_empty.index(slot), (q_count // Q_STAGES & 1) ^ 1)
            send(facts_smem, slot, (1, b, h, block, q_start, q_rows, k_rows), FACTS)
            full = q_full.index(slot)
            mbarrier.expect(full, 2 * (q_bytes + q_rest_bytes))
            for w in gl.static_range(2):
                load_split(
                    q_desc, q_rest_desc, (b, h, q_start, q_rows), block * ROWS + w * 64, full,
                    q_smem, q_rest, 2 * slot + w, VARLEN, REST,
                )  # fmt: skip
            q_count += 1
            for i in range(end + 1):
                # Keys run one block ahead of values.
                if i < end:
                    row = (end - 1 - i) * BLOCK
                    slot = k_count % STAGES
                    mbarrier.wait(k_empty.index(slot), (k_count // STAGES & 1) ^ 1)
                    full = k_full.index(slot)
                    mbarrier.expect(full, k_bytes + k_rest_bytes)
                    load_split(
                        k_desc, k_rest_desc, (b, h // share, k_start, k_rows), row, full,
                        k_smem, k_rest, slot, VARLEN, REST,
                    )  # fmt: skip
                    k_count += 1
                if i > 0:
                    row = (end - i) * BLOCK
                    slot = v_count % STAGES
                    mbarrier.wait(v_empty.index(slot), (v_count // STAGES & 1) ^ 1)
                    full = v_full.index(slot)
                    mbarrier.expect(full, v_bytes)
                    place = box(b, h // share, k_start, k_rows, row, 0, VARLEN)
                    async_load(v_desc, place, full, v_smem.index(slot))
                    v_count += 1
        tile = next_tile(drawn_from, num_tiles)
    # Both warpgroups read the end off the last slot.
    slot = q_count % Q_STAGES
    mbarrier.wait(q_empty.index(slot), (q_count // Q_STAGES & 1) ^ 1)
    send(facts_smem, slot, (0, 0, 0, 0, 0, 0, 0), FACTS)
    mbarrier.arrive(q_full.index(slot))


@gluon.jit
def exponentials(s, top, total, scale, MASKED: gl.constexpr):
    """One step of the softmax, base 2: probabilities, new maximum and sum, and their correction.

    s [64, block] scores without `scale`; top, total [64] of the blocks before.
    """
    new = gl.maximum(top, gl.max(s, 1))
    shift = new * scale
    if MASKED:
        # A row that has seen nothing: exp2(-inf - 0) is 0 where exp2(-inf + inf) is no number.
        shift = gl.where(new == float("-inf"), 0.0, shift)
    p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
    correction = gl.exp2(top * scale - shift)
    return p, new, total * correction + gl.sum(p, 1), correction


@gluon.jit
def attend(
    k_block,
    q,
    q_rest,
    p,
    out,
    top,
    total,
    k_smem,
    v_smem,
    barriers,
    turns,
    steps,
    row,
    q_length,
    k_length,
    scale,
    W: gl.constexpr,
    MASKED: gl.constexpr,
    CAUSAL: gl.constexpr,
    REST: gl.constexpr,
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,
):
    """Scores of block `k_block` beside the last block's probabilities times its values."""
    k_smem, k_rest = k_smem
    k_full, k_empty, v_full, v_empty = barriers
    BLOCK: gl.constexpr = k_smem.shape[-2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    k_slot = steps % STAGES
    v_slot = (steps - 1) % STAGES
    mbarrier.wait(k_full.index(k_slot), steps // STAGES & 1)
    if TURNS:
        mbarrier.wait(turns.index(W), (steps & 1) ^ (1 - W))
    s = issue_scores(q, q_rest, k_smem, k_rest, k_slot, s_layout, BLOCK, REST)
    mbarrier.wait(v_full.index(v_slot), (steps - 1) // STAGES & 1)
    out = warpgroup_mma(p, matrix(v_smem, v_slot), out, is_async=True)
    if TURNS:
        mbarrier.arrive(turns.index(1 - W))
    s = warpgroup_mma_wait(1, (s,))
    mbarrier.arrive(k_empty.index(k_slot))
    if MASKED:
        s = hide_scores(s, k_block * BLOCK, row, q_length, k_length, CAUSAL)
    new_p, top, total, correction = exponentials(s, top, total, scale, MASKED)
    out, p = warpgroup_mma_wait(0, (out, p))
    mbarrier.arrive(v_empty.index(v_slot))
    out_top: gl.constexpr = gl.SliceLayout(1, out.type.layout)
    out = out * gl.expand_dims(gl.convert_layout(correction, out_top), 1)
    p = gl.convert_layout(new_p.to(p.dtype), p.type.layout)
    return p, out, top, total, steps + 1


@gluon.jit
def compute_tiles(
    out_desc,
    lse_ptr,
    num_heads,
    q_length,
    q_smem,
    k_smem,
    v_smem,
    facts_smem,
    barriers,
    turns,
    scale,
    W: gl.constexpr,
    CAUSAL: gl.constexpr,
    VARLEN: gl.constexpr,
    REST: gl.constexpr,
    Q_STAGES: gl.constexpr,
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,
    ROWS: gl.constexpr,
):
    """Warpgroup W of two: rows 64 W to 64 W + 63 of every tile."""
    q_smem, q_rest_smem = q_smem
    k_first, k_rest = k_smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    BLOCK: gl.constexpr = k_first.shape[-2]
    V: gl.constexpr = v_smem.shape[-1]
    dtype: gl.constexpr = v_smem.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)

    q_count = 0
    steps = 0
    mbarrier.wait(q_full.index(0), 0)
    while receive(facts_smem, q_count % Q_STAGES, 0, FACTS) > 0:
        q_slot = q_count % Q_STAGES
        block = receive(facts_smem, q_slot, 3, FACTS)
        q_rows = receive(facts_smem, q_slot, 5, FACTS)
        k_rows = receive(facts_smem, q_slot, 6, FACTS)
        row = block * ROWS + W * 64
        end, whole = score_blocks(block, row, q_rows, k_rows, CAUSAL, BLOCK, ROWS)
        q = matrix(q_smem, 2 * q_slot + W)
        q_rest = matrix(q_rest_smem, 2 * q_slot + W)

        k_slot = steps % STAGES
        mbarrier.wait(k_full.index(k_slot), steps // STAGES & 1)
        if TURNS:
            mbarrier.wait(turns.index(W), (steps & 1) ^ (1 - W))
        s = issue_scores(q, q_rest, k_first, k_rest, k_slot, s_layout, BLOCK, REST)
        if TURNS:
            mbarrier.arrive(turns.index(1 - W))
        s = warpgroup_mma_wait(0, (s,))
        mbarrier.arrive(k_empty.index(k_slot))
        s = hide_scores(s, (end - 1) * BLOCK, row, q_rows, k_rows, CAUSAL)
        top = gl.full([64], float("-inf"), gl.float32, row_layout)
        total = gl.zeros([64], gl.float32, row_layout)
        new_p, top, total, _ = exponentials(s, top, total, scale, True)
        p = gl.convert_layout(new_p.to(dtype), p_layout)
        out = gl.zeros([64, V], gl.float32, out_layout)
        steps += 1

        kv = (k_full, k_empty, v_full, v_empty)
        whole = min(whole, end - 1)
        for i in range(end - 1 - whole):
            p, out, top, total, steps = attend(
                end - 2 - i, q, q_rest, p, out, top, total, k_smem, v_smem, kv, turns, steps, row,
                q_rows, k_rows, scale, W, True, CAUSAL, REST, STAGES, TURNS,
            )  # fmt: skip
        for i in range(whole):
            p, out, top, total, steps = attend(
                whole - 1 - i, q, q_rest, p, out, top, total, k_smem, v_smem, kv, turns, steps, row,
                q_rows, k_rows, scale, W, False, CAUSAL, REST, STAGES, TURNS,
            )  # fmt: skip

        v_slot = (steps - 1) % STAGES
        mbarrier.wait(v_full.index(v_slot), (steps - 1) // STAGES & 1)
        out = warpgroup_mma(p, matrix(v_smem, v_slot), out, is_async=True)
        out, p = warpgroup_mma_wait(0, (out, p))
        mbarrier.arrive(v_empty.index(v_slot))

        b = receive(facts_smem, q_slot, 1, FACTS)
        h = receive(facts_smem, q_slot, 2, FACTS)
        q_start = receive(facts_smem, q_slot, 4, FACTS)
        # Rows that saw nothing: out 0, lse -inf.
        seen = total > 0
        inverse = gl.where(seen, 1 / total, 0.0)
        out = out * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, out_layout)), 1)
        i = row + gl.arange(0, 64, row_layout)
        lse = (top * scale + gl.log2(total)) * LN_2
        first = (b * num_heads + h) * q_length
        if VARLEN:
            first = h * q_length + q_start
        gl.store(lse_ptr + first + i, gl.where(seen, lse, float("-inf")), mask=i < q_rows)
        # Through this warpgroup's own queries, which are not read any more.
        q.store(out.to(dtype))
        fence_async_shared()
        barrier()
        place = box(b, h, q_start, q_rows, row, 0, VARLEN)
        async_store(out_desc, place, q_smem.index(2 * q_slot + W))
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(q_slot))

        q_count += 1
        q_slot = q_count % Q_STAGES
        mbarrier.wait(q_full.index(q_slot), q_count // Q_STAGES & 1)


@cache_launches(in_pairs=True)
@gluon.jit(
    do_not_specialize=INTEGERS,
    do_not_specialize_on_alignment=["starts_q_table", "starts_k_table"],
)
def attention_forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    q_rest_desc,
    k_rest_desc,
    lse_ptr,
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
    CAUSAL: gl.constexpr,
    VARLEN: gl.constexpr,
    REST: gl.constexpr,
    Q_STAGES: gl.constexpr,
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,
    ROWS: gl.constexpr,
):
    BLOCK: gl.constexpr = k_desc.block_type.shape[-2]
    q = allocate_split(q_desc, q_rest_desc, 2 * Q_STAGES, REST)
    k = allocate_split(k_desc, k_rest_desc, STAGES, REST)
    v_smem = allocate(v_desc, STAGES)
    facts_smem = allocate_integers(Q_STAGES * FACTS)
    q_full, q_empty = allocate_stages(Q_STAGES)
    k_full, k_empty = allocate_stages(STAGES)
    v_full, v_empty = allocate_stages(STAGES)
    turns = allocate_barriers(2, 1)

    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    tiles = (num_tiles, num_m, num_heads, share, outer, group, q_length, k_length)
    tables = (starts_q_table, starts_k_table, sequences)
    descriptors = (q_desc, k_desc, v_desc, q_rest_desc, k_rest_desc)
    gl.warp_specialize(
        [
            (
                compute_tiles,
                (out_desc, lse_ptr, num_heads, q_length, q, k, v_smem, facts_smem, barriers, turns,
                 scale, gl.constexpr(0), CAUSAL, VARLEN, REST, Q_STAGES, STAGES, TURNS, ROWS),
            ),
            (
                compute_tiles,
                (out_desc, lse_ptr, num_heads, q_length, q, k, v_smem, facts_smem, barriers, turns,
                 scale, gl.constexpr(1), CAUSAL, VARLEN, REST, Q_STAGES, STAGES, TURNS, ROWS),
            ),
            (
                load_tiles,
                (descriptors, tiles, tables, q, k, v_smem, facts_smem, barriers,
                 (counter_ptr, limit_ptr), CAUSAL, VARLEN, REST, BLOCK, Q_STAGES, STAGES, ROWS),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    starts_q: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    *,
    causal: bool,
    scale: float,
    num_sms: int,
    config: ForwardConfig | None = None,
) -> None:
    """Writes out and lse.

    q         [B, N, S_q, D], last dimension contiguous; packed: [1, N, T_q, D]
    k, v      [B, G, S_k, D], [B, G, S_k, V]; N a multiple of G
    out       [B, N, S_q, V]
    lse       [B, N, S_q] fp32, contiguous, natural logarithm; -inf for a query that sees no key
    starts_*  [B + 1] int32 first row of each packed sequence, or None for both
    """
    varlen = starts_q is not None
    D, V = q.shape[3], v.shape[3]
    config = config or FORWARD[D, V]
    grid, arguments = lay_out(q, v, starts_q, starts_k, scale=scale, num_sms=num_sms)
    q_desc, q_rest_desc = describe_split(q, ROWS // 2, varlen)
    k_desc, k_rest_desc = describe_split(k, config.block, varlen)
    attention_forward_kernel[grid](
        q_desc,
        k_desc,
        describe_rows(v, config.block, V, varlen),
        describe_rows(out, ROWS // 2, V, varlen),
        q_rest_desc,
        k_rest_desc,
        lse,
        *arguments,
        CAUSAL=causal,
        VARLEN=varlen,
        REST=D > 128,
        Q_STAGES=config.q_stages,
        STAGES=config.stages,
        TURNS=config.take_turns,
        ROWS=ROWS,
        num_warps=4,
    )
