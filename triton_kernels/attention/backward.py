"""Gradients of keys and values, and of queries in the same pass.

    pᵀ = exp(scale · k qᵀ − lse)        dv = pᵀ do
    dsᵀ = pᵀ (v doᵀ − delta)            dk = scale · dsᵀ q        dq += scale · ds k

A tile is 128 keys; two warpgroups have 64 of them each, with their dk and dv in registers, and walk
over the queries that see them, all heads that share the keys included. dq is the only sum across
tiles: each adds its part to an fp32 buffer, in whatever order tiles finish.
`attention_backward_query` computes it in a fixed order instead.
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from ..launch.cached import cache_launches
from ..launch.compat import async_load, async_store, barrier, reinterpret
from ..launch.descriptors import describe
from ..launch.shared_memory import (
    allocate,
    allocate_barriers,
    allocate_integers,
    matrix,
    receive,
    send,
)
from .backward_step import add_step
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
FACTS = gl.constexpr(12)


@dataclass(frozen=True, kw_only=True)
class BackwardConfig:
    """Compile-time shape of the kernel.

    block      queries of a step. Registers a thread, of 240: D/2 + V/2 for dk and dv, block for the
               scores and their gradient, block / 4 for the probabilities, 32 for dq
    stages     steps whose queries and output gradients are in flight
    ds_stages  steps whose ds lies in shared memory: for D = 128 a second one costs 2 to 3 % (2744
               against 2681 us at B4 N32 S4096, 10492 against 10146 at B1 N32 S16384, H200)
    fused      dq as well; without, `attention_backward_query` has to follow
    loader     registers a thread of the loading warpgroup, 264 less those of the computing ones
    """

    block: int = 64
    stages: int = 2
    ds_stages: int = 1
    fused: bool = True
    loader: int = 24


# By (D, V). Shared memory in KiB: (D + V) / 4 for keys and values, stages · block (D + V) / 512,
# ds_stages · block / 4, and 32 that dq or dk and dv leave through.
BACKWARD = {
    (64, 64): BackwardConfig(),  # 32 + 32 + 16 + 32
    (128, 128): BackwardConfig(),  # 64 + 64 + 16 + 32
    (192, 128): BackwardConfig(block=32, fused=False, loader=40),  # 80 + 40 + 8 + 32
}


@gluon.jit
def query_blocks(
    block, q_length, k_length, CAUSAL: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr
):
    """Blocks of queries that see a tile of keys: the first, the first without mask, and the end."""
    end = (q_length + BLOCK - 1) // BLOCK
    start = 0
    whole = 0
    if CAUSAL:
        ahead = block * ROWS + q_length - k_length
        start = min(max(ahead, 0) // BLOCK, end)
        whole = max(ahead + ROWS - 1 + BLOCK - 1, 0) // BLOCK
    if (block + 1) * ROWS > k_length:
        whole = end
    return start, max(start, min(whole, end)), end


@gluon.jit
def load_steps(
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
    """The loading warp: draws a tile, loads its keys and values, then every step's queries."""
    q_desc, k_desc, v_desc, do_desc, q_rest_desc, k_rest_desc, lse_desc, delta_desc = descriptors
    q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem = smem
    q_rest, k_rest = rest_smem
    num_tiles, num_n, num_heads, share, outer, group, q_length, k_length, padded = tiles
    starts_q, starts_k, sequences = tables
    kv_full, kv_empty, q_full, do_full, empty, _ds_full, _ds_empty = barriers
    BLOCK: gl.constexpr = q_desc.block_type.shape[-2]
    q_rest_bytes: gl.constexpr = q_rest_desc.block_type.nbytes if REST else 0
    k_rest_bytes: gl.constexpr = k_rest_desc.block_type.nbytes if REST else 0
    kv_bytes: gl.constexpr = k_desc.block_type.nbytes + v_desc.block_type.nbytes + k_rest_bytes
    q_bytes: gl.constexpr = q_desc.block_type.nbytes + lse_desc.block_type.nbytes + q_rest_bytes
    do_bytes: gl.constexpr = do_desc.block_type.nbytes + delta_desc.block_type.nbytes

    tile = gl.program_id(0)
    tile_count = 0
    count = 0
    while tile < num_tiles:
        b, h, block = locate_tile(
            tile, num_n, num_heads // share, outer, group, starts_k, sequences, VARLEN, ROWS, False
        )
        k_start, k_rows = sequence_span(b, starts_k, k_length, VARLEN)
        if block * ROWS < k_rows:
            q_start, q_rows = sequence_span(b, starts_q, q_length, VARLEN)
            start, whole, end = query_blocks(block, q_rows, k_rows, CAUSAL, BLOCK, ROWS)
            scratch = scratch_row(b, h * share, num_heads, q_start, padded, VARLEN)
            mbarrier.wait(kv_empty.index(0), (tile_count & 1) ^ 1)
            facts = (share, b, h, block * ROWS, k_start, k_rows, q_rows, start, whole, end, scratch,
                     padded)  # fmt: skip
            send(facts_smem, 0, facts, FACTS)
            full = kv_full.index(0)
            mbarrier.expect(full, kv_bytes)
            load_split(
                k_desc, k_rest_desc, (b, h, k_start, k_rows), block * ROWS, full, k_smem, k_rest,
                0, VARLEN, REST,
            )  # fmt: skip
            place = box(b, h, k_start, k_rows, block * ROWS, 0, VARLEN)
            async_load(v_desc, place, full, v_smem.index(0))
            tile_count += 1
            for head in range(h * share, (h + 1) * share):
                for m in range(start, end):
                    slot = count % STAGES
                    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
                    full = q_full.index(slot)
                    row = m * BLOCK
                    mbarrier.expect(full, q_bytes)
                    load_split(
                        q_desc, q_rest_desc, (b, head, q_start, q_rows), row, full, q_smem, q_rest,
                        slot, VARLEN, REST,
                    )  # fmt: skip
                    at = [scratch + row]
                    async_load(lse_desc, at, full, lse_smem.index(slot))
                    full = do_full.index(slot)
                    mbarrier.expect(full, do_bytes)
                    place = box(b, head, q_start, q_rows, row, 0, VARLEN)
                    async_load(do_desc, place, full, do_smem.index(slot))
                    async_load(delta_desc, at, full, delta_smem.index(slot))
                    count += 1
                scratch += padded
        tile = next_tile(drawn_from, num_tiles)
    mbarrier.wait(kv_empty.index(0), (tile_count & 1) ^ 1)
    send(facts_smem, 0, (0,), 1)
    mbarrier.arrive(kv_full.index(0))


@gluon.jit
def store_gradient(desc, place, value, staging, W: gl.constexpr):
    """Through the memory that this warpgroup's dq leaves through: numbers of half the size in rows
    of twice the length, or of the same length, in every second buffer."""
    columns: gl.constexpr = value.shape[1]
    buffers: gl.constexpr = 4 * staging.shape[1] * staging.shape[2] // (64 * columns)
    shape: gl.constexpr = [buffers] + desc.block_type.shape  # noqa: RUF005 (no stars in Triton)
    tma.store_wait(0)
    barrier()
    buffer = reinterpret(staging, desc.dtype, shape, desc.layout)
    slot: gl.constexpr = W * buffers // 2
    matrix(buffer, slot).store(value.to(desc.dtype))
    fence_async_shared()
    barrier()
    async_store(desc, place, buffer.index(slot))


@gluon.jit
def compute_gradients(
    descriptors,
    smem,
    rest_smem,
    ds_smem,
    staging,
    facts_smem,
    barriers,
    scale,
    W: gl.constexpr,
    CAUSAL: gl.constexpr,
    VARLEN: gl.constexpr,
    REST: gl.constexpr,
    STAGES: gl.constexpr,
    DS_STAGES: gl.constexpr,
    FUSED: gl.constexpr,
):
    """Warpgroup W of two: keys 64 W to 64 W + 63 of every tile."""
    dk_desc, dv_desc, dk_rest_desc, dq_desc = descriptors
    q_smem, _k_smem, v_smem, _do_smem, _lse_smem, _delta_smem = smem
    q_rest_smem, _k_rest_smem = rest_smem
    kv_full, kv_empty, _q_full, _do_full, _empty, _ds_full, _ds_empty = barriers
    D: gl.constexpr = q_smem.shape[-1]
    V: gl.constexpr = v_smem.shape[-1]
    R: gl.constexpr = q_rest_smem.shape[-1]
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])

    count = 0
    tile_count = 0
    mbarrier.wait(kv_full.index(0), 0)
    share = receive(facts_smem, 0, 0, FACTS)
    while share > 0:
        dq_row = receive(facts_smem, 0, 10, FACTS)
        dk = gl.zeros([64, D], gl.float32, dk_layout)
        dv = gl.zeros([64, V], gl.float32, dv_layout)
        # Without a rest a name for nothing, which the compiler drops.
        dk_rest = gl.zeros([64, R], gl.float32, rest_layout)
        for _head in range(share):
            # Read once a head: in registers through the loops they would spill.
            key = receive(facts_smem, 0, 3, FACTS) + W * 64
            k_rows = receive(facts_smem, 0, 5, FACTS)
            ahead = receive(facts_smem, 0, 6, FACTS) - k_rows
            start = receive(facts_smem, 0, 7, FACTS)
            whole = receive(facts_smem, 0, 8, FACTS)
            end = receive(facts_smem, 0, 9, FACTS)
            for m in range(start, whole):
                dk, dk_rest, dv, count = add_step(
                    m, key, ahead, k_rows, dq_row, dk, dk_rest, dv, smem, rest_smem, ds_smem,
                    staging, dq_desc, barriers, count, scale, W, True, CAUSAL, REST, STAGES,
                    DS_STAGES, FUSED,
                )  # fmt: skip
            for m in range(whole, end):
                dk, dk_rest, dv, count = add_step(
                    m, key, ahead, k_rows, dq_row, dk, dk_rest, dv, smem, rest_smem, ds_smem,
                    staging, dq_desc, barriers, count, scale, W, False, CAUSAL, REST, STAGES,
                    DS_STAGES, FUSED,
                )  # fmt: skip
            dq_row += receive(facts_smem, 0, 11, FACTS)
        b = receive(facts_smem, 0, 1, FACTS)
        h = receive(facts_smem, 0, 2, FACTS)
        row = receive(facts_smem, 0, 3, FACTS) + W * 64
        k_start = receive(facts_smem, 0, 4, FACTS)
        k_rows = receive(facts_smem, 0, 5, FACTS)
        mbarrier.arrive(kv_empty.index(0))
        place = box(b, h, k_start, k_rows, row, 0, VARLEN)
        store_gradient(dv_desc, place, dv, staging, W)
        store_gradient(dk_desc, place, dk * (scale * LN_2), staging, W)
        if REST:
            place = box(b, h, k_start, k_rows, row, D, VARLEN)
            store_gradient(dk_rest_desc, place, dk_rest * (scale * LN_2), staging, W)
        tile_count += 1
        mbarrier.wait(kv_full.index(0), tile_count & 1)
        share = receive(facts_smem, 0, 0, FACTS)
    tma.store_wait(0)


@cache_launches(in_pairs=True)
@gluon.jit(
    do_not_specialize=INTEGERS,
    do_not_specialize_on_alignment=["starts_q_table", "starts_k_table"],
)
def attention_backward_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    q_rest_desc,
    k_rest_desc,
    lse_desc,
    delta_desc,
    dk_desc,
    dv_desc,
    dk_rest_desc,
    dq_desc,
    starts_q_table,
    starts_k_table,
    counter_ptr,
    limit_ptr,
    scale,
    num_tiles,
    num_n,
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
    DS_STAGES: gl.constexpr,
    FUSED: gl.constexpr,
    LOADER: gl.constexpr,
    ROWS: gl.constexpr,
):
    BLOCK: gl.constexpr = q_desc.block_type.shape[-2]
    q_smem, q_rest = allocate_split(q_desc, q_rest_desc, STAGES, REST)
    k_smem, k_rest = allocate_split(k_desc, k_rest_desc, 1, REST)
    v_smem = allocate(v_desc, 1)
    do_smem = allocate(do_desc, STAGES)
    lse_smem = allocate(lse_desc, STAGES)
    delta_smem = allocate(delta_desc, STAGES)
    staging = allocate(dq_desc, 2)
    ds_smem = q_smem
    if FUSED:
        ds_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        ds_smem = gl.allocate_shared_memory(q_desc.dtype, [DS_STAGES, ROWS, BLOCK], ds_layout)
    facts_smem = allocate_integers(FACTS)
    kv_full, kv_empty = allocate_stages(1)
    q_full = allocate_barriers(STAGES, 1)
    do_full = allocate_barriers(STAGES, 1)
    empty = allocate_barriers(STAGES, 2)
    ds_full = allocate_barriers(DS_STAGES, 2)
    ds_empty = allocate_barriers(DS_STAGES, 2)

    barriers = (kv_full, kv_empty, q_full, do_full, empty, ds_full, ds_empty)
    tiles = (num_tiles, num_n, num_heads, share, outer, group, q_length, k_length, padded)
    tables = (starts_q_table, starts_k_table, sequences)
    smem = (q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem)
    rest = (q_rest, k_rest)
    sources = (q_desc, k_desc, v_desc, do_desc, q_rest_desc, k_rest_desc, lse_desc, delta_desc)
    results = (dk_desc, dv_desc, dk_rest_desc, dq_desc)
    gl.warp_specialize(
        [
            (
                compute_gradients,
                (results, smem, rest, ds_smem, staging, facts_smem, barriers, scale,
                 gl.constexpr(0), CAUSAL, VARLEN, REST, STAGES, DS_STAGES, FUSED),
            ),
            (
                compute_gradients,
                (results, smem, rest, ds_smem, staging, facts_smem, barriers, scale,
                 gl.constexpr(1), CAUSAL, VARLEN, REST, STAGES, DS_STAGES, FUSED),
            ),
            (
                load_steps,
                (sources, tiles, tables, smem, rest, facts_smem, barriers,
                 (counter_ptr, limit_ptr), CAUSAL, VARLEN, REST, STAGES, ROWS),
            ),
        ],
        [4, 1],
        [264 - LOADER, LOADER],
    )  # fmt: skip


def attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dq_sum: torch.Tensor | None,
    starts_q: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    *,
    causal: bool,
    scale: float,
    num_sms: int,
    config: BackwardConfig | None = None,
) -> None:
    """Writes dk and dv, and adds dq / scale to `dq_sum` if the configuration is fused.

    q, d_out    [B, N, S_q, D], [B, N, S_q, V], last dimension contiguous; packed: B = 1, S = T
    k, v        [B, G, S_k, D], [B, G, S_k, V]
    lse, delta  [rows] fp32 of `prepare`
    dk, dv      like k and v
    dq_sum      [rows, D] fp32 of `prepare`
    """
    varlen = starts_q is not None
    (B, N, _, D), V = q.shape, v.shape[3]
    config = config or BACKWARD[D, V]
    block = config.block
    grid, arguments = lay_out(q, v, starts_q, starts_k, scale=scale, num_sms=num_sms, of_keys=True)
    q_desc, q_rest_desc = describe_split(q, block, varlen)
    k_desc, k_rest_desc = describe_split(k, ROWS, varlen)
    dk_desc, dk_rest_desc = describe_split(dk, ROWS // 2, varlen)
    # Without dq the descriptor stands for its layout only.
    tile = [max(64, block), min(D, 128) // 2]
    sums = dq_sum if config.fused else lse.new_empty(64, 64)
    attention_backward_kernel[grid](
        q_desc,
        k_desc,
        describe_rows(v, ROWS, V, varlen),
        describe_rows(d_out, block, V, varlen),
        q_rest_desc,
        k_rest_desc,
        describe(lse, [block]),
        describe(delta, [block]),
        dk_desc,
        describe_rows(dv, ROWS // 2, V, varlen),
        dk_rest_desc,
        describe(sums, tile),
        *arguments,
        lse.shape[0] // (N if varlen else B * N),
        CAUSAL=causal,
        VARLEN=varlen,
        REST=D > 128,
        STAGES=config.stages,
        DS_STAGES=config.ds_stages,
        FUSED=config.fused,
        LOADER=config.loader,
        ROWS=ROWS,
        num_warps=4,
    )
