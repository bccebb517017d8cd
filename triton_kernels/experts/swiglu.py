"""Gate and up projection with SwiGLU and the routing weight in the epilogue, and the way back.

forward   gate, up = rows @ w13[expert].T;  act = silu(gate) * up * row_weight
backward  d = dout @ w2[expert]  (the gradient of act);  per row, p = silu(gate) * up:
          d_row_weight = sum(d * p);  d_up = d * row_weight * silu(gate)
          d_gate = d * row_weight * up * silu'(gate)
          with silu'(g) = s + g * s * (1 - s),  s = sigmoid(g)
"""

import torch
import triton
import triton.language as tl

from ..launch.arithmetic import ceil_div
from ..launch.cached import cache_launches
from ..launch.compat import TensorDescriptor
from .tiles import (
    BLOCK_M,
    GATE_UP,
    SWIGLU_BACKWARD,
    TileConfig,
    is_hopper,
    locate_tile,
    search_steps,
    split_columns,
)


@triton.jit
def store_activation(
    act_desc,
    gate_desc,
    up_desc,
    m,
    n,
    gate,
    up,
    row_weight,
    SAVE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    if SPLIT == 1:
        if SAVE:
            gate_desc.store([m, n], gate.to(gate_desc.dtype))
            up_desc.store([m, n], up.to(up_desc.dtype))
        act = gate / (1 + tl.exp(-gate)) * up * row_weight[:, None]
        act_desc.store([m, n], act.to(act_desc.dtype))
    else:
        width: tl.constexpr = gate.shape[1]
        gate0, gate1 = split_columns(gate)
        up0, up1 = split_columns(up)
        store_activation(
            act_desc, gate_desc, up_desc, m, n, gate0, up0, row_weight, SAVE, SPLIT // 2
        )
        store_activation(
            act_desc,
            gate_desc,
            up_desc,
            m,
            n + width // 2,
            gate1,
            up1,
            row_weight,
            SAVE,
            SPLIT // 2,
        )


@cache_launches
@triton.jit
def gate_up_kernel(
    rows_desc,
    w13_desc,
    act_desc,
    gate_desc,
    up_desc,
    row_weight_ptr,
    offsets_ptr,
    num_experts,
    H,
    I,  # noqa: E741
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    STEPS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    # A tile of BLOCK_N columns is BLOCK_N / 2 gates and the same columns' ups: w13 is seen as
    # [2L, I, H], where matrices 2e and 2e + 1 are expert e's gate and up, and one box of
    # [2, BLOCK_N / 2, BLOCK_K] brings both.
    HALF: tl.constexpr = BLOCK_N // 2
    num_n = tl.cdiv(I, HALF)
    num_k = tl.cdiv(H, BLOCK_K)
    num_tiles = tl.load(offsets_ptr + num_experts) // BLOCK_M * num_n
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, m, n_tile = locate_tile(
            tile, offsets_ptr, num_experts, num_n, BLOCK_M, GROUP_M, STEPS
        )
        n = n_tile * HALF
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(num_k):
            a = rows_desc.load([m, k * BLOCK_K])
            b = w13_desc.load([2 * expert, n, k * BLOCK_K]).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(a, b.T, acc)
        gate, up = split_columns(acc)
        row_weight = tl.load(row_weight_ptr + m + tl.arange(0, BLOCK_M))
        store_activation(act_desc, gate_desc, up_desc, m, n, gate, up, row_weight, SAVE, SPLIT)


def grouped_gate_up(
    rows: torch.Tensor,
    row_weight: torch.Tensor,
    w13: torch.Tensor,
    expert_offsets: torch.Tensor,
    act: torch.Tensor,
    gate_up: torch.Tensor | None,
    *,
    num_sms: int,
    take_over: bool = False,
    config=None,
) -> None:
    """act = silu(rows @ gate.T) * (rows @ up.T) * row_weight.

    rows        [R, H]
    row_weight  [R] fp32
    w13         [L, 2I, H], rows 0..I-1 gate, I..2I-1 up
    act         [R, I], written up to row expert_offsets[-1]
    gate_up     [R, 2I] the values before SwiGLU for the backward, or None
    take_over, config: as grouped_gemm.grouped_gemm's

    Hopper's kernel computes act from gate and up as they are stored, this one from the fp32 sums.
    """
    if config is None and not is_hopper(rows.device):
        config = GATE_UP
    if not isinstance(config, TileConfig):
        from .swiglu_hopper import gate_up_hopper

        tensors = (rows, row_weight, w13, expert_offsets, act, gate_up)
        gate_up_hopper(*tensors, num_sms=num_sms, take_over=take_over, config=config)
        return
    (R, H), (L, twice, _) = rows.shape, w13.shape
    I = twice // 2  # noqa: E741
    half, block_k = config.block_n // 2, config.block_k
    strip = [BLOCK_M, half // config.split]
    act_desc = TensorDescriptor(act, act.shape, act.stride(), strip)
    gate_desc = up_desc = act_desc
    if gate_up is not None:
        # Each half has its own bounds: a partial tile of gates does not run into the ups.
        gate_desc = TensorDescriptor(gate_up, [R, I], [2 * I, 1], strip)
        up_desc = TensorDescriptor(gate_up[:, I:], [R, I], [2 * I, 1], strip)
    grid = (max(1, min(num_sms, R // BLOCK_M * ceil_div(I, half))),)
    gate_up_kernel[grid](
        TensorDescriptor(rows, rows.shape, rows.stride(), [BLOCK_M, block_k]),
        TensorDescriptor(w13, [2 * L, I, H], [I * H, H, 1], [2, half, block_k]),
        act_desc,
        gate_desc,
        up_desc,
        row_weight,
        expert_offsets,
        L,
        H,
        I,
        SAVE=gate_up is not None,
        BLOCK_M=BLOCK_M,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        SPLIT=config.split,
        GROUP_M=config.group_m,
        STEPS=search_steps(L),
        FLATTEN=config.flatten,
        num_warps=config.warps,
        num_stages=config.stages,
    )


@triton.jit
def store_gate_up_gradient(
    gate_up_desc, d_gate_desc, d_up_desc, m, n, d_act, row_weight, SPLIT: tl.constexpr
):
    """Writes the strip's d_gate and d_up; returns each row's part of d_row_weight, [BLOCK_M]."""
    if SPLIT == 1:
        gate, up = gate_up_desc.load([m, 0, n]).permute(0, 2, 1).split()
        gate = gate.to(tl.float32)
        up = up.to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-gate))
        silu = gate * sigmoid
        part = tl.sum(d_act * silu * up, axis=1)
        d_act *= row_weight[:, None]
        d_up_desc.store([m, n], (d_act * silu).to(d_up_desc.dtype))
        d_gate_desc.store(
            [m, n], (d_act * up * (sigmoid + silu * (1 - sigmoid))).to(d_gate_desc.dtype)
        )
    else:
        half: tl.constexpr = d_act.shape[1] // 2
        left, right = split_columns(d_act)
        part = store_gate_up_gradient(
            gate_up_desc, d_gate_desc, d_up_desc, m, n, left, row_weight, SPLIT // 2
        )
        part += store_gate_up_gradient(
            gate_up_desc, d_gate_desc, d_up_desc, m, n + half, right, row_weight, SPLIT // 2
        )
    return part


@cache_launches
@triton.jit(do_not_specialize=["R"])
def swiglu_backward_kernel(
    d_out_desc,
    w2_desc,
    gate_up_desc,
    d_gate_desc,
    d_up_desc,
    row_weight_ptr,
    parts_ptr,
    offsets_ptr,
    num_experts,
    H,
    I,  # noqa: E741
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    STEPS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_n = tl.cdiv(I, BLOCK_N)
    num_k = tl.cdiv(H, BLOCK_K)
    num_tiles = tl.load(offsets_ptr + num_experts) // BLOCK_M * num_n
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, m, n_tile = locate_tile(
            tile, offsets_ptr, num_experts, num_n, BLOCK_M, GROUP_M, STEPS
        )
        n = n_tile * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(num_k):
            a = d_out_desc.load([m, k * BLOCK_K])
            b = w2_desc.load([expert, k * BLOCK_K, n]).reshape(BLOCK_K, BLOCK_N)
            acc = tl.dot(a, b, acc)
        rows = m + tl.arange(0, BLOCK_M)
        row_weight = tl.load(row_weight_ptr + rows)
        part = store_gate_up_gradient(
            gate_up_desc, d_gate_desc, d_up_desc, m, n, acc, row_weight, SPLIT
        )
        tl.store(parts_ptr + n_tile.to(tl.int64) * R + rows, part)


def grouped_swiglu_backward(
    d_out: torch.Tensor,
    w2: torch.Tensor,
    gate_up: torch.Tensor,
    row_weight: torch.Tensor,
    expert_offsets: torch.Tensor,
    d_gate_up: torch.Tensor,
    *,
    num_sms: int,
    take_over: bool = False,
    config=None,
) -> torch.Tensor:
    """Goes back through the down projection and SwiGLU.

    d_out      [R, H]
    w2         [L, H, I]
    gate_up    [R, 2I] from the forward
    d_gate_up  [R, 2I], written up to row expert_offsets[-1]
    Returns d_row_weight [R] fp32, 0 past expert_offsets[-1]. Every N tile writes its own sums,
    which are then added in the tiles' order: the same bits in every run and for every `num_sms`.
    `take_over` and `config` are as grouped_gemm.grouped_gemm's.
    """
    if config is None and not is_hopper(d_out.device):
        config = SWIGLU_BACKWARD
    if not isinstance(config, TileConfig):
        from .swiglu_hopper import swiglu_backward_hopper

        tensors = (d_out, w2, gate_up, row_weight, expert_offsets, d_gate_up)
        how = {"num_sms": num_sms, "take_over": take_over, "config": config}
        return swiglu_backward_hopper(*tensors, **how)
    (R, H), (L, _, I) = d_out.shape, w2.shape  # noqa: E741
    block_n, block_k = config.block_n, config.block_k
    strip = block_n // config.split
    num_n = ceil_div(I, block_n)
    parts = torch.zeros((num_n, R), dtype=torch.float32, device=d_out.device)
    grid = (max(1, min(num_sms, R // BLOCK_M * num_n)),)
    swiglu_backward_kernel[grid](
        TensorDescriptor(d_out, d_out.shape, d_out.stride(), [BLOCK_M, block_k]),
        TensorDescriptor(w2, w2.shape, w2.stride(), [1, block_k, block_n]),
        TensorDescriptor(gate_up, [R, 2, I], [2 * I, I, 1], [BLOCK_M, 2, strip]),
        TensorDescriptor(d_gate_up, [R, I], [2 * I, 1], [BLOCK_M, strip]),
        TensorDescriptor(d_gate_up[:, I:], [R, I], [2 * I, 1], [BLOCK_M, strip]),
        row_weight,
        parts,
        expert_offsets,
        L,
        H,
        I,
        R,
        BLOCK_M=BLOCK_M,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SPLIT=config.split,
        GROUP_M=config.group_m,
        STEPS=search_steps(L),
        FLATTEN=config.flatten,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return parts.sum(0)
