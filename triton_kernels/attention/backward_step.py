"""A step of the backward: what a block of queries gives to a tile of keys, and to its own dq."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..launch.compat import async_reduce_add, barrier
from ..launch.shared_memory import matrix


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
        barrier()
        staging.index(W).store(dq)
        fence_async_shared()
        barrier()
        async_reduce_add(dq_desc, [dq_row + m * BLOCK, W * half], staging.index(W))
    else:
        ds_operand, p_operand, dk, dv = warpgroup_mma_wait(0, (ds_operand, p_operand, dk, dv))
        mbarrier.arrive(empty.index(slot))
    return dk, dk_rest, dv, count + 1
