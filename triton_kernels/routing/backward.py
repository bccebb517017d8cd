"""The router's way back: from the gradients of its weights and probabilities to dx and d_weight.

Letters: T tokens, H hidden, E experts, K experts a token.

Two kernels. The first makes d_logits [T, E], small enough to stay in L2, as two bf16 numbers each
(`router` says how much that keeps), or for `router_backward_hopper` rounded to one, and then the
weight, too. The second reads x once and writes dx once:
d_weight = d_logits.T @ x and dx = d_logits @ weight, both from the same tile of d_logits. A program
keeps a strip of columns of the weight and of d_weight, and walks down the tokens. Where there are
fewer strips than SMs, the tokens are split and every split leaves a d_weight of its own; they are
added in order: the same bits in every run and for every `num_sms`.

T = 8192, H = 7168, E = 64 on an H200: 235 MB of x and dx take 56 µs at 4.2 TB/s; 2 + 3 products of
7.5 GFLOP 58 µs at 650 TFLOPS, beside them if the loads keep ahead; at E = 256 they take four times
as long and are the bound.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..elementwise.rows import row_kernel
from ..launch.arithmetic import ceil_div, power_of_two
from ..launch.cached import cache_launches
from ..launch.compat import TensorDescriptor
from .route import PARTS, split_parts
from .tiles import BLOCK_E, even_splits

__all__ = ["RouterBackwardConfig", "config_for", "route_backward"]


@dataclass(frozen=True, kw_only=True)
class RouterBackwardConfig:
    """Compile-time shape of the second kernel.

    block_t, block_n  tokens and columns at a time; the program keeps experts * block_n sums
    stages            buffers in flight, (experts * 4 + block_n * bytes of x) * block_t each
    """

    block_t: int
    block_n: int
    stages: int
    warps: int = 8


# By experts, padded to a power of two ≥ 64. Shared memory of 227 KiB: the stages, 4 * experts *
# block_n bytes for the weight's two parts, and a tile of dx that leaves.
CONFIGS = {
    64: RouterBackwardConfig(block_t=64, block_n=128, stages=4, warps=4),
    128: RouterBackwardConfig(block_t=128, block_n=64, stages=2),
    256: RouterBackwardConfig(block_t=128, block_n=64, stages=1),
    512: RouterBackwardConfig(block_t=128, block_n=32, stages=1),
}
CONFIGS_FP32 = {
    64: RouterBackwardConfig(block_t=64, block_n=64, stages=3, warps=4),
    128: RouterBackwardConfig(block_t=128, block_n=32, stages=2),
    256: RouterBackwardConfig(block_t=128, block_n=32, stages=1),
    512: RouterBackwardConfig(block_t=128, block_n=16, stages=1),
}
# Of d_logits: rows and numbers of a tile at most, 16 a thread of 512; routes whose expert and
# gradient are read at once, where one after the other each would wait for L2.
ROWS, NUMBERS, WARPS = 64, 8192, 16
ROUTES = tl.constexpr(8)


def config_for(columns: int, dtype: torch.dtype) -> RouterBackwardConfig:
    table = CONFIGS_FP32 if dtype == torch.float32 else CONFIGS
    return next(config for most, config in table.items() if columns <= most)


@row_kernel
def d_logits_kernel(
    logits_table,
    idx_table,
    d_weight_table,
    d_sum_table,
    high_ptr,
    low_ptr,
    weight_ptr,
    rounded_ptr,
    num_rows,
    vectors,
    route_scale,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROUTES: tl.constexpr = ROUTES,
):
    """d_logits as one number or two, without a low part if low_ptr is None; with rounded_ptr, a
    copy of `vectors` times 8 numbers of the weight in its dtype."""
    column = tl.arange(0, COLUMNS)[None, :]
    d_sum = tl.load(d_sum_table + column, mask=column < E, other=0)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        exists = row < num_rows
        mask = exists[:, None] & (column < E)
        logit = tl.load(logits_table + row[:, None].to(tl.int64) * E + column, mask=mask, other=0)
        # Gradient of the chosen scores, before renormalisation; 0 elsewhere.
        d_chosen = tl.zeros((ROWS, COLUMNS), tl.float32)
        chosen = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, K, ROUTES):
            experts = ()
            gradients = ()
            for i in tl.static_range(ROUTES):
                here = exists & (first + i < K)
                route = row * K + first + i
                experts += (tl.load(idx_table + route, mask=here, other=-1),)
                gradients += (tl.load(d_weight_table + route, mask=here, other=0),)
            for i in tl.static_range(ROUTES):
                at = column == experts[i][:, None]
                d_chosen = tl.where(at, gradients[i][:, None] * route_scale, d_chosen)
                chosen = tl.where(at, 1.0, chosen)

        if SOFTMAX:
            logit = tl.where(column < E, logit, float("-inf"))
            power = tl.exp(logit - tl.max(logit, axis=1)[:, None])
            score = power / tl.sum(power, axis=1)[:, None]
        else:
            score = tl.where(column < E, 1 / (1 + tl.exp(-logit)), 0.0)
        if RENORMALIZE:
            total = tl.sum(chosen * score, axis=1)[:, None] + 1e-20
            mean = tl.sum(d_chosen * score, axis=1)[:, None] / total
            d_chosen = chosen * (d_chosen - mean) / total
        if SOFTMAX:
            d_score = d_chosen + d_sum
            d_logit = score * (d_score - tl.sum(score * d_score, axis=1)[:, None])
        else:
            total = tl.sum(score, axis=1)[:, None] + 1e-20
            mean = tl.sum(d_sum * score, axis=1)[:, None] / total
            d_logit = (d_chosen + (d_sum - mean) / total) * score * (1 - score)
        high, low = split_parts(tl.where(mask, d_logit, 0.0), high_ptr.dtype.element_ty)
        target = row[:, None].to(tl.int64) * WIDTH + column
        mask = exists[:, None] & (column < WIDTH)
        tl.store(high_ptr + target, high, mask=mask)
        if low_ptr is not None:
            tl.store(low_ptr + target, low, mask=mask)

    if rounded_ptr is not None:
        count = vectors * 8
        for tile in range(tl.program_id(0), tl.cdiv(count, NUMBERS), tl.num_programs(0)):
            place = tile * NUMBERS + tl.arange(0, NUMBERS)
            weight = tl.load(weight_ptr + place, mask=place < count, other=0)
            tl.store(
                rounded_ptr + place, weight.to(rounded_ptr.dtype.element_ty), mask=place < count
            )


@cache_launches
@triton.jit(do_not_specialize=["T", "H", "splits"])
def route_backward_kernel(
    high_desc,
    low_desc,
    x_desc,
    weight_desc,
    dx_desc,
    d_weight_ptr,
    T,
    H,
    splits,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    PASSES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
):
    strips = tl.cdiv(H, BLOCK_N)
    steps = tl.cdiv(T, BLOCK_T)
    # The strips of a split follow each other: at the same time they read the same d_logits.
    for item in range(tl.program_id(0), strips * splits, tl.num_programs(0)):
        n = item % strips * BLOCK_N
        split = item // strips
        weights = ()
        d_weights = ()
        for part in tl.static_range(PASSES):
            weights += (split_parts(weight_desc.load([part * COLUMNS, n]), PART),)
            d_weights += (tl.zeros((COLUMNS, BLOCK_N), tl.float32),)
        for step in range(split * steps // splits, (split + 1) * steps // splits):
            t = step * BLOCK_T
            x = x_desc.load([t, n])
            if x.dtype != PART:
                x_high, x_low = split_parts(x, PART)
            dx = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            before = d_weights
            d_weights = ()
            for part in tl.static_range(PASSES):
                high = high_desc.load([t, part * COLUMNS])
                low = low_desc.load([t, part * COLUMNS])
                # Small terms first, and a sum for each block of tokens (see `router`).
                if x.dtype == PART:
                    block = tl.dot(low.T, x)
                    block = tl.dot(high.T, x, block)
                else:
                    block = tl.dot(low.T, x_high)
                    block = tl.dot(high.T, x_low, block)
                    block = tl.dot(high.T, x_high, block)
                d_weights += (before[part] + block,)
                weight_high, weight_low = weights[part]
                dx = tl.dot(low, weight_high, dx)
                dx = tl.dot(high, weight_low, dx)
                dx = tl.dot(high, weight_high, dx)
            dx_desc.store([t, n], dx.to(dx_desc.dtype))
        # Not by TMA: Triton would keep a buffer for it beside those of the loop.
        column = n + tl.arange(0, BLOCK_N)[None, :]
        for part in tl.static_range(PASSES):
            expert = part * COLUMNS + tl.arange(0, COLUMNS)[:, None]
            target = d_weight_ptr + tl.cast(split, tl.int64) * E * H + (expert * H + column)
            tl.store(target, d_weights[part], mask=(expert < E) & (column < H))


def route_backward(
    d_topk_weight: torch.Tensor,
    d_probability_sum: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor,
    topk_idx: torch.Tensor,
    *,
    softmax: bool,
    renormalize: bool,
    route_scale: float,
    num_sms: int,
    hopper: bool = False,
    part: torch.dtype = torch.bfloat16,
    config: RouterBackwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx [T, H] and d_weight [E, H] fp32.

    d_topk_weight      [T, K] fp32, contiguous, as topk_idx [T, K] int32
    d_probability_sum  [E] fp32, contiguous: of the probabilities added over the tokens
    x, weight, logits  as given to and returned by `router.route`
    hopper             with the second kernel of `router_backward_hopper`: bf16, a Hopper GPU, at
                       most 256 experts; d_weight then from d_logits rounded to bf16, 0.17 % off,
                       and the weight may be bf16
    """
    (T, H), E, K = x.shape, weight.shape[0], topk_idx.shape[1]
    width = ceil_div(E, 8) * 8  # TMA: rows of 16 bytes
    d_logits = torch.empty(1 if hopper else 2, T, width, dtype=part, device=x.device)
    rounding = hopper and weight.dtype != part
    rounded = torch.empty_like(weight, dtype=part) if rounding else None
    columns = max(16, power_of_two(E))
    rows = min(ROWS, NUMBERS // columns)
    tiles = max(ceil_div(T, rows), ceil_div(E * H, NUMBERS) if rounding else 1)
    d_logits_kernel[(max(1, min(num_sms, tiles)),)](
        logits,
        topk_idx,
        d_topk_weight,
        d_probability_sum,
        d_logits[0],
        None if hopper else d_logits[1],
        weight,
        rounded,
        T,
        E * H // 8,
        route_scale,
        E=E,
        WIDTH=width,
        K=K,
        COLUMNS=columns,
        ROWS=rows,
        NUMBERS=NUMBERS,
        SOFTMAX=softmax,
        RENORMALIZE=renormalize,
        num_warps=WARPS,
    )
    if hopper:
        from .backward_hopper import gradients_hopper

        weight = rounded if rounding else weight
        return gradients_hopper(d_logits[0], x, weight, num_sms=num_sms)

    columns = max(64, columns)  # an MMA of a warp group has 64 rows
    config = config or config_for(columns, x.dtype)
    block_t, block_n = config.block_t, config.block_n
    passes = ceil_div(columns, BLOCK_E)
    columns //= passes
    strips = ceil_div(H, block_n)
    splits = even_splits(strips, ceil_div(T, block_t))
    dx = torch.empty_like(x)
    d_weight = torch.empty(splits, E, H, dtype=torch.float32, device=x.device)
    route_backward_kernel[(max(1, min(num_sms, strips * splits)),)](
        *(TensorDescriptor(d, d.shape, d.stride(), [block_t, columns]) for d in d_logits),
        TensorDescriptor(x, x.shape, x.stride(), [block_t, block_n]),
        TensorDescriptor(weight, weight.shape, weight.stride(), [columns, block_n]),
        TensorDescriptor(dx, dx.shape, dx.stride(), [block_t, block_n]),
        d_weight,
        T,
        H,
        splits,
        E=E,
        COLUMNS=columns,
        PASSES=passes,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        PART=PARTS[part],
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return dx, d_weight.sum(0) if splits > 1 else d_weight[0]
