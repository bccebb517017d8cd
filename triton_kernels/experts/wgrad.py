"""dW[l] = y[rows of l].T @ x[rows of l]: weight gradients, launches that a scheduler may delay.

On a Hopper GPU dw in bf16 and fp32 is `grouped_wgrad_hopper`'s; the kernel here does the rest.
"""

import torch
import triton
import triton.language as tl

from ..launch.arithmetic import ceil_div
from ..launch.cached import cache_launches
from ..launch.compat import TensorDescriptor
from .tiles import BLOCK_M, WGRAD, WGRAD_ACCUMULATE, TileConfig, is_hopper, split_columns


@triton.jit
def put_strips(dw_desc, expert, m, n, acc, ACCUMULATE: tl.constexpr, SPLIT: tl.constexpr):
    width: tl.constexpr = acc.shape[1]
    if SPLIT == 1:
        block = acc.to(dw_desc.dtype).reshape(1, acc.shape[0], width)
        if ACCUMULATE:
            # TMA adds in L2: the old value never travels to the SM. One add an element per launch,
            # so the sum is deterministic.
            dw_desc.atomic_add([expert, m, n], block)
        else:
            dw_desc.store([expert, m, n], block)
    else:
        left, right = split_columns(acc)
        put_strips(dw_desc, expert, m, n, left, ACCUMULATE, SPLIT // 2)
        put_strips(dw_desc, expert, m, n + width // 2, right, ACCUMULATE, SPLIT // 2)


@cache_launches
@triton.jit(do_not_specialize=["R"])
def grouped_wgrad_kernel(
    y_desc,
    x_desc,
    dw_desc,
    offsets_ptr,
    num_experts,
    M,
    N,
    R,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    num_m = tl.cdiv(M, BLOCK_M)
    tiles_per_expert = num_m * tl.cdiv(N, BLOCK_N)
    num_tiles = num_experts * tiles_per_expert
    stride = tl.num_programs(0)

    # One loop over (tile, k), written out: K is the expert's number of rows, and Triton flattens
    # only loops whose inner length is one for all tiles. An empty expert takes one step of zeros.
    num_steps = 0
    for tile in range(tl.program_id(0), num_tiles, stride):
        expert = tile // tiles_per_expert
        length = tl.load(offsets_ptr + expert + 1) - tl.load(offsets_ptr + expert)
        num_steps += tl.maximum(length // BLOCK_K, 1)

    tile = tl.program_id(0) - stride
    expert = 0
    m = 0
    n = 0
    row = 0
    k = -1
    num_k = 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(num_steps):
        k = tl.where(k == num_k - 1, 0, k + 1)
        row += BLOCK_K
        if k == 0:
            tile += stride
            expert = tile // tiles_per_expert
            inside = tile % tiles_per_expert
            m = inside % num_m * BLOCK_M
            n = inside // num_m * BLOCK_N
            row = tl.load(offsets_ptr + expert)
            length = tl.load(offsets_ptr + expert + 1) - row
            num_k = tl.maximum(length // BLOCK_K, 1)
            row = tl.where(length == 0, R, row)  # past the end, where TMA reads zeros
        y = y_desc.load([row, m])
        x = x_desc.load([row, n])
        acc = tl.dot(y.T, x, acc)
        if k == num_k - 1:
            put_strips(dw_desc, expert, m, n, acc, ACCUMULATE, SPLIT)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


def grouped_wgrad(
    y: torch.Tensor,
    x: torch.Tensor,
    expert_offsets: torch.Tensor,
    dw: torch.Tensor,
    *,
    accumulate: bool,
    num_sms: int,
    config=None,
) -> torch.Tensor:
    """dw[l] = y_l.T @ x_l, or += with `accumulate`.

    y   [R, M], x [R, N]; rows that pad an expert must be zero in one and finite in the other
    dw  [L, M, N], the dtype of y, or fp32 with `accumulate`. An expert without rows gets zeros, or
        keeps its values.

    `config` is a TileConfig, or a WgradConfig for the Gluon kernel, which Hopper GPUs run for dw in
    bf16 and fp32. It always draws its tiles, as grouped_gemm.grouped_gemm does to take over SMs.
    """
    narrow = dw.dtype == torch.float16  # the other kernel was never tried with it
    if config is None and (narrow or not is_hopper(y.device)):
        config = WGRAD_ACCUMULATE if accumulate else WGRAD
    if not isinstance(config, TileConfig):
        from .wgrad_hopper import grouped_wgrad_hopper

        how = {"accumulate": accumulate, "num_sms": num_sms, "config": config}
        return grouped_wgrad_hopper(y, x, expert_offsets, dw, **how)
    (R, M), N, L = y.shape, x.shape[1], dw.shape[0]
    block_n, block_k = config.block_n, config.block_k
    grid = (max(1, min(num_sms, L * ceil_div(M, BLOCK_M) * ceil_div(N, block_n))),)
    grouped_wgrad_kernel[grid](
        TensorDescriptor(y, y.shape, y.stride(), [block_k, BLOCK_M]),
        TensorDescriptor(x, x.shape, x.stride(), [block_k, block_n]),
        TensorDescriptor(dw, dw.shape, dw.stride(), [1, BLOCK_M, block_n // config.split]),
        expert_offsets,
        L,
        M,
        N,
        R,
        ACCUMULATE=accumulate,
        BLOCK_M=BLOCK_M,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SPLIT=config.split,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return dw
