"""The second kernel of the router on Hopper: adds the parts of every logit, and chooses experts.

Letters: T tokens, E experts, K experts a token, S splits of H. Small beside the first kernel, but
on all SMs: where the last program of a tile had to choose for its 256 rows, the others would be
gone, and shared memory of one SM takes 32 of the 256 KiB of parts a microsecond.

Every block of tokens adds what it has for an expert to one int64 in memory, the same sum in any
order: 46 bits of probability in fixed point, or of tokens that chose it; 8 bits of blocks whose
probability was no number; 8 bits of blocks that have added theirs. The block that finds all others
there has the total in its hands, writes it in its final dtype, and leaves 0 for the next launch.
"""

import torch
import triton
import triton.language as tl

from .arithmetic import ceil_div, power_of_two
from .launch import cache_launches
from .router import choose_experts, locate_experts
from .router_tiles import columns_of, counters

__all__ = ["choose"]

BLOCKS = 128  # that add to one sum, at most
LOST = tl.constexpr(46)
ADDED = tl.constexpr(54)
ROWS, TILE = 64, 4096  # of a chunk: tokens at most, logits
WARPS = 16  # 8 logits a thread
AHEAD = tl.constexpr(4)  # splits read at once


@triton.jit
def add_up(value, state_ptr, blocks, LOST: tl.constexpr = LOST, ADDED: tl.constexpr = ADDED):
    """The sum of all blocks' values up to this one, in how many the value was lost, and whether
    this one is the last."""
    value += tl.full((), 1, tl.int64) << ADDED
    total = tl.atomic_add(state_ptr, value, sem="relaxed") + value
    last = total >> ADDED == blocks
    tl.store(state_ptr, tl.zeros_like(total), mask=last)
    low = tl.full((), 1, tl.int64)
    return total & ((low << LOST) - 1), (total >> LOST) & ((low << (ADDED - LOST)) - 1), last


@cache_launches
@triton.jit(do_not_specialize=["T", "splits", "blocks"])
def choose_kernel(
    parts_ptr,
    bias_ptr,
    logits_ptr,
    idx_ptr,
    topk_weight_ptr,
    sum_ptr,
    count_ptr,
    state_ptr,
    T,
    splits,
    blocks,
    route_scale,
    unit,
    inverse_unit,
    E: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    N_GROUPS: tl.constexpr,
    KEEP: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr = AHEAD,
    LOST: tl.constexpr = LOST,
):
    COLUMNS: tl.constexpr = GROUPS * SIZE
    column = tl.arange(0, COLUMNS)
    expert, valid = locate_experts(column[None, :], E, SIZE, N_GROUPS)
    chunks = tl.cdiv(T, ROWS)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        probability_sum = tl.zeros((COLUMNS,), tl.float32)
        count = tl.zeros((COLUMNS,), tl.int32)
        for chunk in range(block * chunks // blocks, (block + 1) * chunks // blocks):
            token = (chunk * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            exists = token < T
            source = parts_ptr + token * COLUMNS + column[None, :]
            logit = tl.zeros((ROWS, COLUMNS), tl.float32)
            for first in range(0, splits, AHEAD):
                parts = ()
                for i in tl.static_range(AHEAD):
                    mask = exists & (first + i < splits)
                    offset = tl.cast(first + i, tl.int64) * T * COLUMNS
                    parts += (tl.load(source + offset, mask=mask, other=0.0),)
                for i in tl.static_range(AHEAD):
                    logit += parts[i]
            tl.store(logits_ptr + token * E + expert, logit, mask=exists & valid)
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
                E // N_GROUPS,
                SOFTMAX,
                RENORMALIZE,
            )
            route = tl.arange(0, K_POW2)[None, :]
            tl.store(idx_ptr + token * K + route, index, mask=exists & (route < K))
            tl.store(topk_weight_ptr + token * K + route, weight, mask=exists & (route < K))
            probability_sum += tl.sum(tl.where(exists, probability, 0.0), axis=0)
            count += tl.sum((exists & chosen).to(tl.int32), axis=0)

        own, inside = locate_experts(column, E, SIZE, N_GROUPS)
        # What is no number compares as false.
        good = probability_sum >= 0
        fixed = tl.where(good, probability_sum * unit + 0.5, 0.0).to(tl.int64)
        fixed += tl.where(good, 0, 1).to(tl.int64) << LOST
        total, lost, last = add_up(fixed, state_ptr + column, blocks)
        value = tl.where(lost == 0, total.to(tl.float32) * inverse_unit, float("nan"))
        tl.store(sum_ptr + own, value, mask=last & inside)
        total, lost, last = add_up(count.to(tl.int64), state_ptr + COLUMNS + column, blocks)
        tl.store(count_ptr + own, total, mask=last & inside)


def choose(
    parts: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    num_experts: int,
    topk: int,
    renormalize: bool,
    n_groups: int,
    topk_groups: int,
    route_scale: float,
    num_sms: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `router.route` returns, of logits in parts [S, T, columns] fp32, as `columns_of` has
    them; bias as there."""
    (splits, T, columns), E = parts.shape, num_experts
    groups, size = columns_of(E, n_groups)
    rows = min(ROWS, TILE // columns)
    blocks = min(BLOCKS, ceil_div(T, rows))
    fp32 = dict(dtype=torch.float32, device=parts.device)
    topk_idx = torch.empty(T, topk, dtype=torch.int32, device=parts.device)
    topk_weight, logits = torch.empty(T, topk, **fp32), torch.empty(T, E, **fp32)
    probability_sum = torch.empty(E, **fp32)
    count = torch.empty(E, dtype=torch.int64, device=parts.device)
    unit = 2.0 ** (45 - T.bit_length())  # T probabilities, rounded up, stay below 2^46
    choose_kernel[(max(1, min(num_sms, blocks)),)](
        parts,
        bias,
        logits,
        topk_idx,
        topk_weight,
        probability_sum,
        count,
        counters(parts, 2 * columns),
        T,
        splits,
        blocks,
        route_scale,
        unit,
        1 / unit,
        E=E,
        K=topk,
        K_POW2=power_of_two(topk),
        GROUPS=groups,
        SIZE=size,
        N_GROUPS=n_groups,
        KEEP=topk_groups,
        SOFTMAX=bias is None,
        RENORMALIZE=renormalize,
        ROWS=rows,
        num_warps=WARPS,
    )
    return topk_idx, topk_weight, logits, probability_sum, count
