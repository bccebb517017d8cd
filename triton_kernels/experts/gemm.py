"""out[r] = rows[r] @ W[expert of r]: the down projection, and the input gradient's last step."""

import torch
import triton
import triton.language as tl

from ..launch.arithmetic import ceil_div
from ..launch.cached import cache_launches
from ..launch.compat import TensorDescriptor
from .tiles import BLOCK_M, GEMM, TileConfig, is_hopper, locate_tile, search_steps, split_columns


@triton.jit
def store_strips(out_desc, m, n, acc, SPLIT: tl.constexpr):
    if SPLIT == 1:
        out_desc.store([m, n], acc.to(out_desc.dtype))
    else:
        width: tl.constexpr = acc.shape[1]
        left, right = split_columns(acc)
        store_strips(out_desc, m, n, left, SPLIT // 2)
        store_strips(out_desc, m, n + width // 2, right, SPLIT // 2)


@cache_launches
@triton.jit
def grouped_gemm_kernel(
    rows_desc,
    weight_desc,
    out_desc,
    offsets_ptr,
    num_experts,
    N,
    K,
    WEIGHT_IS_NK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    STEPS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_n = tl.cdiv(N, BLOCK_N)
    num_k = tl.cdiv(K, BLOCK_K)
    num_tiles = tl.load(offsets_ptr + num_experts) // BLOCK_M * num_n
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, m, n_tile = locate_tile(
            tile, offsets_ptr, num_experts, num_n, BLOCK_M, GROUP_M, STEPS
        )
        n = n_tile * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(num_k):
            a = rows_desc.load([m, k * BLOCK_K])
            # The expert is a dimension of its own in the weight's descriptor: a partial N or K tile
            # is filled with zeros and never reads the next expert.
            if WEIGHT_IS_NK:
                b = weight_desc.load([expert, n, k * BLOCK_K]).reshape(BLOCK_N, BLOCK_K).T
            else:
                b = weight_desc.load([expert, k * BLOCK_K, n]).reshape(BLOCK_K, BLOCK_N)
            acc = tl.dot(a, b, acc)
        store_strips(out_desc, m, n, acc, SPLIT)


def grouped_gemm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    expert_offsets: torch.Tensor,
    out: torch.Tensor,
    *,
    weight_is_nk: bool,
    num_sms: int,
    take_over: bool = False,
    config=None,
) -> torch.Tensor:
    """Multiplies every row with its expert's matrix.

    rows            [R, K]
    weight          [L, N, K] if `weight_is_nk`, else [L, K, N]
    expert_offsets  [L + 1] int32, multiples of 128, last <= R
    out             [R, N], written up to row expert_offsets[-1]
    take_over       programs draw their tiles, on Hopper: one that starts late, on an SM that
                    communication held, takes what is left
    config          a TileConfig, or a HopperConfig for the Gluon kernel; by default what suits
    """
    if config is None and not is_hopper(rows.device):
        config = GEMM
    if not isinstance(config, TileConfig):
        from .gemm_hopper import grouped_gemm_hopper

        how = {"num_sms": num_sms, "take_over": take_over, "config": config}
        return grouped_gemm_hopper(
            rows, weight, expert_offsets, out, weight_is_nk=weight_is_nk, **how
        )
    R, K = rows.shape
    L, N = weight.shape[0], out.shape[1]
    block_n, block_k = config.block_n, config.block_k
    box = [1, block_n, block_k] if weight_is_nk else [1, block_k, block_n]
    grid = (max(1, min(num_sms, R // BLOCK_M * ceil_div(N, block_n))),)
    grouped_gemm_kernel[grid](
        TensorDescriptor(rows, rows.shape, rows.stride(), [BLOCK_M, block_k]),
        TensorDescriptor(weight, weight.shape, weight.stride(), box),
        TensorDescriptor(out, out.shape, out.stride(), [BLOCK_M, block_n // config.split]),
        expert_offsets,
        L,
        N,
        K,
        WEIGHT_IS_NK=weight_is_nk,
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
    return out
