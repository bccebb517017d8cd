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
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .attention_tiles import (
    INTEGERS,
    LN_2,
    LOG2_E,
    ROWS,
    allocate,
    allocate_barriers,
    allocate_integers,
    box,
    describe_rows,
    heads_side_by_side,
    locate_tile,
    matrix,
    num_blocks,
    receive,
    scratch_row,
    send,
    sequence_span,
    shared_layout,
    tile_counter,
)
from .tma_reduce import async_reduce_add

# Integers that the loading warp tells the others of a tile; the first is 0 after the last tile.
FACTS = gl.constexpr(12)


@dataclass(frozen=True, kw_only=True)
class BackwardConfig:
    """Compile-time shape of the kernel.

    block    queries of a step. Registers a thread, of 232: D/2 + V/2 for dk and dv, block for the
             scores and their gradient, block / 4 for the probabilities, 32 for dq
    stages   steps whose queries and output gradients are in flight
    ds_stages  steps whose ds lies in shared memory
    fused    dq as well; without, `attention_backward_query` has to follow
    loader   registers a thread of the loading warpgroup, 264 less those of the computing ones
    """

    block: int = 64
    stages: int = 2
    ds_stages: int = 2
    fused: bool = True
    loader: int = 40


# By (D, V). Shared memory in KiB: (D + V) / 4 for keys and values, stages · block (D + V) / 512,
# ds_stages · block / 4, and 32 that dq or dk and dv leave through.
BACKWARD = {
    (64, 64): BackwardConfig(),  # 32 + 32 + 32 + 16
    (128, 128): BackwardConfig(loader=24),  # 64 + 64 + 32 + 32
    (192, 128): BackwardConfig(block=32, fused=False, loader=24),  # 80 + 40 + 32
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
    counter,
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
    D: gl.constexpr = q_desc.block_type.shape[-1]
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
            place = box(b, h, k_start, k_rows, block * ROWS, 0, VARLEN)
            tma.async_copy_global_to_shared(k_desc, place, full, k_smem.index(0))
            tma.async_copy_global_to_shared(v_desc, place, full, v_smem.index(0))
            if REST:
                place = box(b, h, k_start, k_rows, block * ROWS, D, VARLEN)
                tma.async_copy_global_to_shared(k_rest_desc, place, full, k_rest.index(0))
            tile_count += 1
            for head in range(h * share, (h + 1) * share):
                for m in range(start, end):
                    slot = count % STAGES
                    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
                    full = q_full.index(slot)
                    row = m * BLOCK
                    mbarrier.expect(full, q_bytes)
                    place = box(b, head, q_start, q_rows, row, 0, VARLEN)
                    tma.async_copy_global_to_shared(q_desc, place, full, q_smem.index(slot))
                    at = [scratch + row]
                    tma.async_copy_global_to_shared(lse_desc, at, full, lse_smem.index(slot))
                    if REST:
                        rest = box(b, head, q_start, q_rows, row, D, VARLEN)
                        tma.async_copy_global_to_shared(q_rest_desc, rest, full, q_rest.index(slot))
                    full = do_full.index(slot)
                    mbarrier.expect(full, do_bytes)
                    tma.async_copy_global_to_shared(do_desc, place, full, do_smem.index(slot))
                    tma.async_copy_global_to_shared(delta_desc, at, full, delta_smem.index(slot))
                    count += 1
                scratch += padded
        tile = gl.num_programs(0) + gl.atomic_add(counter, 1)
    mbarrier.wait(kv_empty.index(0), (tile_count & 1) ^ 1)
    send(facts_smem, 0, (0,), 1)
    mbarrier.arrive(kv_full.index(0))


@gluon.jit
def add_step(
    m,
    key,
    ahead,
    k_length,
    dq_row,
    dk,
    dk_rest,
    dv,
    smem,
    rest_smem,
    ds_smem,
    staging,
    dq_desc,
    barriers,
    count,
    scale,
    W: gl.constexpr,
    MASKED: gl.constexpr,
    CAUSAL: gl.constexpr,
    REST: gl.constexpr,
    STAGES: gl.constexpr,
    DS_STAGES: gl.constexpr,
    FUSED: gl.constexpr,
):
    """Adds what queries m · block to (m + 1) · block − 1 of one head give."""
    q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem = smem
    q_rest_smem, k_rest_smem = rest_smem
    _kv_full, _kv_empty, q_full, do_full, empty, ds_full, ds_empty = barriers
    BLOCK: gl.constexpr = q_smem.shape[-2]
    D: gl.constexpr = q_smem.shape[-1]
    dtype: gl.constexpr = q_smem.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    slot = count % STAGES
    phase = count // STAGES & 1
    q = matrix(q_smem, slot)
    q_rest = matrix(q_rest_smem, slot)
    do = matrix(do_smem, slot)
    # Always 0, which the compiler must not know: it would keep the addresses of all parts of k and
    # v in registers around the loop, 48 of them, and spill as many (376 bytes against none).
    only = count >> 30
    k = matrix(k_smem, only)

    zero = gl.zeros([64, BLOCK], gl.float32, layout)
    mbarrier.wait(q_full.index(slot), phase)
    s = warpgroup_mma(k.slice(W * 64, 64), q.permute((1, 0)), zero, use_acc=False, is_async=True)
    if REST:
        k_rest = matrix(k_rest_smem, only).slice(W * 64, 64)
        s = warpgroup_mma(k_rest, q_rest.permute((1, 0)), s, is_async=True)
    mbarrier.wait(do_full.index(slot), phase)
    v = matrix(v_smem, only).slice(W * 64, 64)
    dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, (s,))
    lse = lse_smem.index(slot).load(columns)
    p = gl.exp2(s * scale - gl.expand_dims(lse, 0))
    if MASKED:
        i = key + gl.arange(0, 64, gl.SliceLayout(1, layout))
        visible = gl.expand_dims(i, 1) < k_length
        if CAUSAL:
            j = m * BLOCK + gl.arange(0, BLOCK, columns)
            visible = visible & (gl.expand_dims(i + ahead, 1) <= gl.expand_dims(j, 0))
        p = gl.where(visible, p, 0.0)
    p_operand = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, dv.type.layout, 2))
    dv = warpgroup_mma(p_operand, do, dv, is_async=True)
    dp = warpgroup_mma_wait(1, (dp,))
    delta = delta_smem.index(slot).load(columns)
    ds = (p * (dp - gl.expand_dims(delta, 0))).to(dtype)
    stage = count % DS_STAGES
    if FUSED:
        mbarrier.wait(ds_empty.index(stage), (count // DS_STAGES & 1) ^ 1)
        ds_smem.index(stage).slice(W * 64, 64).store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(stage))
    ds_operand = gl.convert_layout(ds, gl.DotOperandLayout(0, dk.type.layout, 2))
    dk = warpgroup_mma(ds_operand, q, dk, is_async=True)
    if REST:
        rest_operand = gl.convert_layout(ds, gl.DotOperandLayout(0, dk_rest.type.layout, 2))
        dk_rest = warpgroup_mma(rest_operand, q_rest, dk_rest, is_async=True)
        ds_operand, rest_operand, p_operand, dk, dk_rest, dv = warpgroup_mma_wait(
            0, (ds_operand, rest_operand, p_operand, dk, dk_rest, dv)
        )
        mbarrier.arrive(empty.index(slot))
    elif FUSED:
        mbarrier.wait(ds_full.index(stage), count // DS_STAGES & 1)
        # Both warpgroups' ds times all keys; each takes half of the columns.
        half: gl.constexpr = D // 2
        dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half, 16])
        dq = gl.zeros([BLOCK, half], gl.float32, dq_layout)
        ds_all = ds_smem.index(stage).permute((1, 0))
        dq = warpgroup_mma(ds_all, k.slice(W * half, half, 1), dq, use_acc=False, is_async=True)
        ds_operand, p_operand, dk, dv = warpgroup_mma_wait(1, (ds_operand, p_operand, dk, dv))
        mbarrier.arrive(empty.index(slot))
        dq = warpgroup_mma_wait(0, (dq,))
        mbarrier.arrive(ds_empty.index(stage))
        tma.store_wait(0)
        gl.thread_barrier()
        staging.index(W).store(dq)
        fence_async_shared()
        gl.thread_barrier()
        async_reduce_add(dq_desc, [dq_row + m * BLOCK, W * half], staging.index(W))
    else:
        ds_operand, p_operand, dk, dv = warpgroup_mma_wait(0, (ds_operand, p_operand, dk, dv))
        mbarrier.arrive(empty.index(slot))
    return dk, dk_rest, dv, count + 1


@gluon.jit
def store_gradient(desc, place, value, staging, W: gl.constexpr):
    """Through the memory that this warpgroup's dq leaves through: numbers of half the size in rows
    of twice the length, or of the same length, in every second buffer."""
    columns: gl.constexpr = value.shape[1]
    buffers: gl.constexpr = 4 * staging.shape[1] * staging.shape[2] // (64 * columns)
    shape: gl.constexpr = [buffers] + desc.block_type.shape  # noqa: RUF005 (no stars in Triton)
    tma.store_wait(0)
    gl.thread_barrier()
    buffer = staging._reinterpret(desc.dtype, shape, desc.layout)
    slot: gl.constexpr = W * buffers // 2
    matrix(buffer, slot).store(value.to(desc.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(desc, place, buffer.index(slot))


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
    q_smem = allocate(q_desc, STAGES)
    k_smem = allocate(k_desc, 1)
    v_smem = allocate(v_desc, 1)
    do_smem = allocate(do_desc, STAGES)
    lse_smem = allocate(lse_desc, STAGES)
    delta_smem = allocate(delta_desc, STAGES)
    q_rest = q_smem
    k_rest = k_smem
    if REST:
        q_rest = allocate(q_rest_desc, STAGES)
        k_rest = allocate(k_rest_desc, 1)
    staging = allocate(dq_desc, 2)
    ds_smem = q_smem
    if FUSED:
        ds_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        ds_smem = gl.allocate_shared_memory(q_desc.dtype, [DS_STAGES, ROWS, BLOCK], ds_layout)
    facts_smem = allocate_integers(FACTS)
    # The loading warp arrives once, the warpgroups once each.
    kv_full = allocate_barriers(1, 1)
    kv_empty = allocate_barriers(1, 2)
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
                (sources, tiles, tables, smem, rest, facts_smem, barriers, counter_ptr, CAUSAL,
                 VARLEN, REST, STAGES, ROWS),
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
    (B, N, q_length, D), (_, G, k_length, V) = q.shape, v.shape
    config = config or BACKWARD[D, V]
    first, block = min(D, 128), config.block
    rest = D - first
    num_n = num_blocks(k_length, k_length, starts_k, ROWS)
    outer = G if varlen else B * G
    group = heads_side_by_side(q_length * (N // G), 2 * (D + V), outer, 1)
    num_tiles = outer * num_n
    half = ROWS // 2
    q_desc = q_rest_desc = describe_rows(q, block, first, varlen)
    k_desc = k_rest_desc = describe_rows(k, ROWS, first, varlen)
    dk_desc = dk_rest_desc = describe_rows(dk, half, first, varlen)
    if rest:
        q_rest_desc = describe_rows(q, block, rest, varlen)
        k_rest_desc = describe_rows(k, ROWS, rest, varlen)
        dk_rest_desc = describe_rows(dk, half, rest, varlen)
    # Without dq the descriptor stands for its layout only.
    tile = [max(64, block), first // 2]
    sums = dq_sum if config.fused else lse.new_empty(64, 64)
    dq_desc = TensorDescriptor(
        sums, list(sums.shape), [sums.shape[1], 1], tile, shared_layout(tile, sums.dtype)
    )
    line = shared_layout([block], lse.dtype)
    counter = tile_counter(q.device)
    attention_backward_kernel[(max(1, min(num_sms, num_tiles)),)](
        q_desc,
        k_desc,
        describe_rows(v, ROWS, V, varlen),
        describe_rows(d_out, block, V, varlen),
        q_rest_desc,
        k_rest_desc,
        TensorDescriptor(lse, list(lse.shape), [1], [block], line),
        TensorDescriptor(delta, list(delta.shape), [1], [block], line),
        dk_desc,
        describe_rows(dv, half, V, varlen),
        dk_rest_desc,
        dq_desc,
        starts_q if varlen else counter,
        starts_k if varlen else counter,
        counter,
        scale * LOG2_E,
        num_tiles,
        num_n,
        N,
        N // G,
        outer,
        group,
        starts_q.shape[0] - 1 if varlen else B,
        q_length,
        k_length,
        lse.shape[0] // (N if varlen else B * N),
        CAUSAL=causal,
        VARLEN=varlen,
        REST=rest > 0,
        STAGES=config.stages,
        DS_STAGES=config.ds_stages,
        FUSED=config.fused,
        LOADER=config.loader,
        ROWS=ROWS,
        num_warps=4,
    )
