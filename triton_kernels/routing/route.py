"""The router in one kernel: logits, scores, the choice of groups and of experts, their weights.

Letters: T tokens, H hidden, E experts, K experts a token, G groups, S splits of H.

logits = x @ weight.T in fp32, on tensor cores: weight = high + low, two bf16 numbers that keep 16
of its 24 bits, and x is bf16 as it is (or another such pair: three products). Products of bf16
numbers are exact in fp32, so at most 2⁻¹⁷ of each is lost. Over random H = 7168 (emulated on a CPU)
the logits are off by 2.5e-6 of their norm, 4.4e-6 for fp32 x; an fp32 sum in order by 1.5e-6.

Predicted for T = 8192, H = 7168, E = 64 on an H200: 117 MB of x take 28 µs at 4.2 TB/s, 2 × 7.5
GFLOP 23 µs at 650 TFLOPS; fp32 FMA would take 125 µs, three bf16 terms 35 µs. At E = 128 the tensor
cores need 46 µs and at E = 256 93: up to about E = 64 the reading of x can be the bound.

The weight crosses from L2 to an SM once a row tile, 1.8 MB at E = 64: with tiles of 128 rows as
many bytes as x, where 64 rows would make it twice as many. T = 8192 has 64 such tiles for 132 SMs,
hence the splits of H. A split leaves its sums in memory, and the one that arrives last adds all of
them in order and chooses: the same bits in every run and for every `num_sms`.

Tensor cores cut a sum to 24 bits at every step, always towards zero (Fasi et al. 2021, for V100 to
A100): emulated, 2.1e-5 after the 2 × 448 steps of H = 7168. So each block of 64 columns has a sum
of its own, which is added in fp32 on the other units: 2.5e-6. Registers for both allow 128 experts
at a time; with more a program takes 128 of them, and the next one the same rows of x, from L2.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..launch.arithmetic import ceil_div, power_of_two
from ..launch.cached import cache_launches
from ..launch.compat import TensorDescriptor
from .tiles import BLOCK_E, block_of, columns_of, even_splits

__all__ = ["RouterConfig", "config_for", "route"]

LOWEST = tl.constexpr(-(2**31))  # below every key of a score
LOWEST_SCORE = tl.constexpr(-2139095041)  # the key of -inf


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Compile-time shape of the kernel.

    block_m, block_k  rows and columns of x at a time
    stages            buffers in flight, (block_m * bytes of x + experts * 4) * block_k each, of at
                      most BLOCK_E experts
    """

    block_m: int
    block_k: int
    stages: int
    warps: int = 8


CHOICE = 4096  # logits among which experts are chosen at once, 16 a thread

# By experts, padded to a power of two. All tiles have 128 rows: with 64 Triton lays out the sums of
# the products differently for 8 warps, and converts them on the way. Shared memory of 227 KiB: the
# stages, and 4 * experts * block_k bytes for the two parts of the weight.
CONFIGS = {
    64: RouterConfig(block_m=128, block_k=64, stages=4),
    512: RouterConfig(block_m=128, block_k=64, stages=3),
}
# Rows of 4 bytes are twice as large.
CONFIGS_FP32 = {
    64: RouterConfig(block_m=128, block_k=64, stages=3),
    512: RouterConfig(block_m=128, block_k=32, stages=4),
}


def config_for(columns: int, dtype: torch.dtype) -> RouterConfig:
    table = CONFIGS_FP32 if dtype == torch.float32 else CONFIGS
    return next(config for most, config in table.items() if columns <= most)


@triton.jit
def split_parts(value, PART: tl.constexpr):
    """value = high + low, both of type PART."""
    high = value.to(PART)
    return high, (value.to(tl.float32) - high.to(tl.float32)).to(PART)


@triton.jit
def locate_experts(column, E: tl.constexpr, SIZE: tl.constexpr, N_GROUPS: tl.constexpr):
    """Expert of a column, and whether it is one: groups are padded to SIZE columns."""
    GROUP_SIZE: tl.constexpr = E // N_GROUPS
    group = column // SIZE
    member = column % SIZE
    return group * GROUP_SIZE + member, (group < N_GROUPS) & (member < GROUP_SIZE)


@triton.jit
def ordered(score):
    """An int32 for each fp32 that compares as they do, except −0, which no sum from 0 on is."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def unordered(key):
    """The fp32 that `ordered` made the key of."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def take_best(key, column, LOWEST: tl.constexpr = LOWEST):
    """Each row's largest key, its column, the first of equals, and the keys without it."""
    best = tl.max(key, axis=1)
    at = tl.min(tl.where(key == best[:, None], column, 1 << 30), axis=1)
    return best, at, tl.where(column == at[:, None], LOWEST, key)


@triton.jit
def drop_groups(
    ranking,
    key,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    KEEP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    LOWEST: tl.constexpr = LOWEST,
    LOWEST_SCORE: tl.constexpr = LOWEST_SCORE,
):
    """`key` with that of -inf outside the KEEP groups of the largest sums of two best scores."""
    member = tl.arange(0, SIZE)[None, None, :]
    grouped = ranking.reshape(ROWS, GROUPS, SIZE)
    best = tl.max(grouped, axis=2)
    if GROUP_SIZE > 1:
        first = tl.min(tl.where(grouped == best[:, :, None], member, SIZE), axis=2)
        others = tl.where(member == first[:, :, None], float("-inf"), grouped)
        best += tl.max(others, axis=2)
    group = tl.arange(0, GROUPS)[None, :]
    group_key = ordered(best)
    for _ in range(KEEP):
        _, _, group_key = take_best(group_key, group)
    dropped = (group_key != LOWEST)[:, :, None]
    key = tl.where(dropped, LOWEST_SCORE, key.reshape(ROWS, GROUPS, SIZE))
    return key.reshape(ROWS, GROUPS * SIZE)


@triton.jit
def choose_experts(
    logit,
    bias_ptr,
    valid,
    expert,
    route_scale,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    N_GROUPS: tl.constexpr,
    KEEP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    LOWEST: tl.constexpr = LOWEST,
):
    """Experts and weights [ROWS, K_POW2] of `logit` [ROWS, GROUPS * SIZE], the probability of every
    column and whether it was chosen."""
    COLUMNS: tl.constexpr = GROUPS * SIZE
    if SOFTMAX:
        ranking = tl.where(valid, logit, float("-inf"))
        top = tl.max(ranking, axis=1)
        power = tl.exp(ranking - top[:, None])
        total = tl.sum(power, axis=1)
        score = power / total[:, None]
        probability = score
    else:
        score = tl.where(valid, 1 / (1 + tl.exp(-logit)), 0.0)
        probability = score / (tl.sum(score, axis=1)[:, None] + 1e-20)
        bias = tl.load(bias_ptr + expert, mask=valid, other=0)
        ranking = tl.where(valid, score + bias, float("-inf"))

    column = tl.arange(0, COLUMNS)[None, :]
    key = tl.where(valid, ordered(ranking), LOWEST)
    if KEEP < N_GROUPS:
        key = drop_groups(ranking, key, ROWS, GROUPS, SIZE, KEEP, GROUP_SIZE)
        key = tl.where(valid, key, LOWEST)
    route = tl.arange(0, K_POW2)[None, :]
    index = tl.zeros((ROWS, K_POW2), tl.int32)
    weight = tl.zeros((ROWS, K_POW2), tl.float32)
    for k in range(K):
        best, at, key = take_best(key, column)
        if SOFTMAX:
            here = tl.exp(unordered(best) - top) / total
        else:
            here = tl.sum(tl.where(column == at[:, None], score, 0.0), axis=1)
        index = tl.where(route == k, (at // SIZE * GROUP_SIZE + at % SIZE)[:, None], index)
        weight = tl.where(route == k, here[:, None], weight)
    if RENORMALIZE:
        weight = weight / (tl.sum(weight, axis=1)[:, None] + 1e-20)
    return index, weight * route_scale, probability, valid & (key == LOWEST)


@cache_launches
@triton.jit(do_not_specialize=["T", "H", "row_tiles", "splits"])
def route_kernel(
    x_desc,
    weight_desc,
    bias_ptr,
    logits_ptr,
    parts_ptr,
    arrived_ptr,
    idx_ptr,
    topk_weight_ptr,
    sums_ptr,
    T,
    H,
    row_tiles,
    splits,
    route_scale,
    E: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    N_GROUPS: tl.constexpr,
    KEEP: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    PASSES: tl.constexpr,
    PART: tl.constexpr,
):
    COLUMNS: tl.constexpr = GROUPS * SIZE
    GROUP_SIZE: tl.constexpr = E // N_GROUPS
    expert, valid = locate_experts(tl.arange(0, COLUMNS)[None, :], E, SIZE, N_GROUPS)
    PART_COLUMNS: tl.constexpr = COLUMNS // PASSES
    # Of a part: see `block_of`.
    GROUP_STEP: tl.constexpr = GROUPS // PASSES
    SIZE_STEP: tl.constexpr = 0 if GROUP_STEP > 0 else SIZE // PASSES
    steps = tl.cdiv(H, BLOCK_K)
    parts = splits * PASSES
    # The parts of a tile follow each other: they run at the same time.
    for item in range(tl.program_id(0), row_tiles * parts, tl.num_programs(0)):
        tile = item // parts
        split = item % parts // PASSES
        part = item % PASSES
        first = tile * BLOCK_M
        acc = tl.zeros((BLOCK_M, PART_COLUMNS), tl.float32)
        for step in range(split * steps // splits, (split + 1) * steps // splits):
            x = x_desc.load([first, step * BLOCK_K])
            weight = weight_desc.load([part * GROUP_STEP, part * SIZE_STEP, step * BLOCK_K])
            weight = weight.reshape(PART_COLUMNS, BLOCK_K)
            high, low = split_parts(weight, PART)
            # Small terms first.
            if x.dtype == PART:
                block = tl.dot(x, low.T)
                block = tl.dot(x, high.T, block)
            else:
                x_high, x_low = split_parts(x, PART)
                block = tl.dot(x_low, high.T)
                block = tl.dot(x_high, low.T, block)
                block = tl.dot(x_high, high.T, block)
            acc += block

        column = part * PART_COLUMNS + tl.arange(0, PART_COLUMNS)[None, :]
        of_part, inside = locate_experts(column, E, SIZE, N_GROUPS)
        row = tl.arange(0, BLOCK_M)[:, None]
        target = parts_ptr + (tl.cast(split, tl.int64) * T + first) * E + (row * E + of_part)
        tl.store(target, acc, mask=(row < T - first) & inside)
        arrived = 0
        tl.debug_barrier()  # every thread's sums are written before one of them says so
        if parts > 1:
            arrived = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel")
        if arrived == parts - 1:
            probability_sum = tl.zeros((COLUMNS,), tl.float32)
            count = tl.zeros((COLUMNS,), tl.float32)
            for start in range(first, tl.minimum(first + BLOCK_M, T), ROWS):
                token = start + tl.arange(0, ROWS)
                exists = (token < T)[:, None]
                source = token[:, None].to(tl.int64) * E + expert
                logit = tl.load(
                    parts_ptr + source, mask=exists & valid, other=0, cache_modifier=".cg"
                )
                for _ in range(1, splits):
                    source += tl.cast(T, tl.int64) * E
                    logit += tl.load(
                        parts_ptr + source, mask=exists & valid, other=0, cache_modifier=".cg"
                    )
                if splits > 1:
                    source = token[:, None].to(tl.int64) * E + expert
                    tl.store(logits_ptr + source, logit, mask=exists & valid)
                index, weight, probability, chosen = choose_experts(
                    logit,
                    bias_ptr,
                    valid,
                    expert,
                    route_scale,
                    ROWS,
                    K,
                    K_POW2,
                    GROUPS,
                    SIZE,
                    N_GROUPS,
                    KEEP,
                    GROUP_SIZE,
                    SOFTMAX,
                    RENORMALIZE,
                )
                route = tl.arange(0, K_POW2)[None, :]
                chosen_at = token[:, None].to(tl.int64) * K + route
                tl.store(idx_ptr + chosen_at, index, mask=exists & (route < K))
                tl.store(topk_weight_ptr + chosen_at, weight, mask=exists & (route < K))
                probability_sum += tl.sum(tl.where(exists & valid, probability, 0.0), axis=0)
                count += tl.sum((exists & chosen).to(tl.float32), axis=0)
            sums = sums_ptr + 2 * tile * E + expert
            tl.store(sums, probability_sum[None, :], mask=valid)
            tl.store(sums + E, count[None, :], mask=valid)


# The dtypes that a weight (and an x of another dtype) is split into: bf16 for a GPU; the
# interpreter, whose bf16 arithmetic is wrong, takes the others.
PARTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def route(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    topk: int,
    renormalize: bool,
    n_groups: int,
    topk_groups: int,
    route_scale: float,
    num_sms: int,
    part: torch.dtype = torch.bfloat16,
    config: RouterConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chooses K experts for every token.

    x       [T, H], T ≥ 1, H a multiple of 8, contiguous, at a multiple of 16 bytes
    weight  [E, H] fp32, likewise; padded to powers of two (see `columns_of`) at most 512 experts
    bias    [E] fp32: sigmoid scores, chosen with this bias and by groups; None: softmax

    Returns topk_idx [T, K] int32, topk_weight [T, K] fp32, logits [T, E] fp32, each expert's
    probabilities added over the tokens [E] fp32, and how many tokens chose it [E] int64.
    """
    (T, H), E = x.shape, weight.shape[0]
    groups, size = columns_of(E, n_groups)
    config = config or config_for(groups * size, x.dtype)
    steps = ceil_div(H, config.block_k)
    row_tiles = ceil_div(T, config.block_m)
    passes = ceil_div(groups * size, BLOCK_E)
    splits = even_splits(row_tiles * passes, steps)
    fp32 = dict(dtype=torch.float32, device=x.device)
    logits = torch.empty(T, E, **fp32)
    parts = torch.empty(splits, T, E, **fp32) if splits > 1 else logits
    counters = row_tiles if splits * passes > 1 else 0
    arrived = torch.zeros(counters, dtype=torch.int32, device=x.device)
    topk_idx = torch.empty(T, topk, dtype=torch.int32, device=x.device)
    topk_weight = torch.empty(T, topk, **fp32)
    sums = torch.empty(row_tiles, 2, E, **fp32)
    route_kernel[(max(1, min(num_sms, row_tiles * splits * passes)),)](
        TensorDescriptor(x, x.shape, x.stride(), [config.block_m, config.block_k]),
        TensorDescriptor(
            weight,
            [n_groups, E // n_groups, H],
            [E // n_groups * H, H, 1],
            [*block_of(groups, size), config.block_k],
        ),
        bias,
        logits,
        parts,
        arrived,
        topk_idx,
        topk_weight,
        sums,
        T,
        H,
        row_tiles,
        splits,
        route_scale,
        E=E,
        K=topk,
        K_POW2=power_of_two(topk),
        GROUPS=groups,
        SIZE=size,
        N_GROUPS=n_groups,
        KEEP=topk_groups,
        SOFTMAX=bias is None,
        RENORMALIZE=renormalize,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        ROWS=min(config.block_m, CHOICE // (groups * size)),
        PASSES=passes,
        PART=PARTS[part],
        num_warps=config.warps,
        num_stages=config.stages,
    )
    probability_sum, count = sums.sum(0, dtype=torch.float64)
    return topk_idx, topk_weight, logits, probability_sum.float(), count.long()
