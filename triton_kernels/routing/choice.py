"""The second kernel of the router on Hopper: adds the parts of every logit, and chooses experts.

Letters: T tokens, E experts, K experts a token, S splits of H. Small beside the first kernel, but
on all SMs: where the last program of a tile had to choose for its 256 rows, the others would be
gone, and shared memory of one SM takes 32 of the 256 KiB of parts a microsecond.

A thread has 8 logits of one token: 8, 16 or 32 lanes have a token's 64, 128 or 256, never two
warps, which would meet at two barriers for every maximum. The K rounds stay a loop and no number of
the result is computed in them but the column: what runs once is as much fetched as computed.

Every block of tokens adds what it has for an expert to one int64 in memory, the same sum in any
order: 46 bits of probability in fixed point, or of tokens that chose it; 8 bits of blocks whose
probability was no number; 8 bits of blocks that have added theirs. The block that finds all others
there has the total in its hands, writes it in its final dtype, and leaves 0 for the next launch.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..launch.arithmetic import ceil_div, power_of_two
from ..launch.cached import cache_launches
from .logits_hopper import locate_experts
from .tiles import columns_of, counters

__all__ = ["choose"]

BLOCKS = 128  # that add to one sum, at most
LOST = gl.constexpr(46)
ADDED = gl.constexpr(54)
WARPS, LOGITS = 16, 8  # of a program, of a thread
LOWEST = gl.constexpr(-(2**31))  # below every key of a score
LOWEST_SCORE = gl.constexpr(-2139095041)  # the key of -inf
NOWHERE = gl.constexpr(1 << 30)  # beyond every column


@gluon.jit
def ordered(score):
    """An int32 for each fp32 that compares as they do, except −0, which no sum from 0 on is."""
    bits = score.to(gl.int32, bitcast=True)
    return gl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@gluon.jit
def of_row(x):
    """[rows] as a column."""
    return gl.expand_dims(x, 1)


@gluon.jit
def take_best(key, column):
    """The column of each row's largest key, the first of equals, and the keys without it."""
    best = gl.max(key, axis=1)
    at = gl.min(gl.where(key == of_row(best), column, NOWHERE), axis=1)
    return at, gl.where(column == of_row(at), LOWEST, key)


@gluon.jit
def drop_groups(
    ranking,
    key,
    GROUPS: gl.constexpr,
    SIZE: gl.constexpr,
    KEEP: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
):
    """`key` with that of -inf outside the KEEP groups of the largest sums of two best scores."""
    ROWS: gl.constexpr = ranking.shape[0]
    grouped = ranking.reshape([ROWS, GROUPS, SIZE])
    best = gl.max(grouped, axis=2)
    of_group: gl.constexpr = best.type.layout
    if GROUP_SIZE > 1:
        parent: gl.constexpr = grouped.type.layout
        inner: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, parent))
        member = gl.expand_dims(gl.expand_dims(gl.arange(0, SIZE, inner), 0), 1)
        at = gl.where(grouped == gl.expand_dims(best, 2), member, SIZE)
        first = gl.min(at, axis=2)
        others = gl.where(member == gl.expand_dims(first, 2), float("-inf"), grouped)
        best += gl.max(others, axis=2)
    group = gl.expand_dims(gl.arange(0, GROUPS, gl.SliceLayout(0, of_group)), 0)
    group_key = ordered(best)
    for _ in range(KEEP):
        _, group_key = take_best(group_key, group)
    dropped = gl.expand_dims(group_key != LOWEST, 2)
    kept = gl.where(dropped, LOWEST_SCORE, key.reshape([ROWS, GROUPS, SIZE]))
    return gl.convert_layout(kept.reshape(key.shape), key.type.layout, assert_trivial=True)


@gluon.jit
def add_splits(parts_ptr, place, exists, splits, stride, layout: gl.constexpr, AHEAD: gl.constexpr):
    """The logits of a place, in every split: AHEAD of them are read at once."""
    logit = gl.zeros(place.shape, gl.float32, layout)
    for first in range(0, splits, AHEAD):
        parts = ()
        for i in gl.static_range(AHEAD):
            split = parts_ptr + gl.cast(first + i, gl.int64) * stride
            parts += (gl.load(split + place, mask=exists & (first + i < splits), other=0.0),)
        for i in gl.static_range(AHEAD):
            logit += parts[i]
    return logit


@gluon.jit
def score_experts(logit, bias_ptr, valid, expert, SOFTMAX: gl.constexpr):
    """Scores, by what they are ranked, and probabilities."""
    if SOFTMAX:
        ranking = gl.where(valid, logit, float("-inf"))
        power = gl.exp(ranking - of_row(gl.max(ranking, axis=1)))
        score = power * of_row(1 / gl.sum(power, axis=1))
        probability = score
    else:
        score = gl.where(valid, 1 / (1 + gl.exp(-logit)), 0.0)
        probability = score * of_row(1 / (gl.sum(score, axis=1) + 1e-20))
        bias = gl.load(bias_ptr + expert, mask=valid, other=0.0)
        ranking = gl.where(valid, score + bias, float("-inf"))
    return score, ranking, probability


@gluon.jit
def add_up(
    probability,
    count,
    sum_ptr,
    count_ptr,
    state_ptr,
    blocks,
    unit,
    inverse_unit,
    E: gl.constexpr,
    SIZE: gl.constexpr,
    N_GROUPS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Adds a block's probabilities and tokens, [rows, columns], to those of all blocks; whoever is
    the last stores the total."""
    COLUMNS: gl.constexpr = probability.shape[1]
    LANES: gl.constexpr = probability.shape[0] // 8
    # 8 rows a thread: to add them up where they lie, in other warps, took as long as the K rounds.
    rows: gl.constexpr = gl.BlockedLayout(
        [8, 1, 2], [LANES, 32 // LANES, 1], [1, WARPS, 1], [2, 1, 0]
    )
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    # First all columns' probabilities, then all columns' tokens.
    sums = gl.sum(gl.convert_layout(gl.join(probability, count), rows), axis=0)
    sums = gl.convert_layout(sums.permute((1, 0)).reshape([2 * COLUMNS]), layout)
    number = gl.arange(0, 2 * COLUMNS, layout)
    is_count = number >= COLUMNS
    # What is no number compares as false.
    good = sums >= 0
    value = gl.where(good, sums * gl.where(is_count, 1.0, unit) + 0.5, 0.0).to(gl.int64)
    one = gl.full([2 * COLUMNS], 1, gl.int64, layout)
    value += gl.where(good, one << ADDED, (one << ADDED) + (one << LOST))
    total = gl.atomic_add(state_ptr + number, value, sem="relaxed") + value
    last = (total >> ADDED) == blocks
    gl.store(state_ptr + number, one - 1, mask=last)
    lost = (total >> LOST) & ((one << (ADDED - LOST)) - 1)
    total = total & ((one << LOST) - 1)
    expert, inside = locate_experts(number % COLUMNS, E, SIZE, N_GROUPS)
    mean = gl.where(lost == 0, total.to(gl.float32) * inverse_unit, float("nan"))
    gl.store(sum_ptr + expert, mean, mask=last & inside & (number < COLUMNS))
    gl.store(count_ptr + expert, total, mask=last & inside & is_count)


@cache_launches
@gluon.jit(do_not_specialize=["T", "splits", "blocks", "rounds"])
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
    rounds,
    route_scale,
    unit,
    inverse_unit,
    E: gl.constexpr,
    K: gl.constexpr,
    K_POW2: gl.constexpr,
    GROUPS: gl.constexpr,
    SIZE: gl.constexpr,
    N_GROUPS: gl.constexpr,
    KEEP: gl.constexpr,
    SOFTMAX: gl.constexpr,
    RENORMALIZE: gl.constexpr,
    LANES: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
):
    COLUMNS: gl.constexpr = GROUPS * SIZE
    ROWS: gl.constexpr = WARPS * (32 // LANES)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    routes: gl.constexpr = gl.BlockedLayout([1, 1], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    column = gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(0, layout)), 0)
    expert, valid = locate_experts(column, E, SIZE, N_GROUPS)
    route = gl.expand_dims(gl.arange(0, K_POW2, gl.SliceLayout(0, routes)), 0)
    for block in range(gl.program_id(0), blocks, gl.num_programs(0)):
        # Of every thread: to add up those of a column takes barriers.
        probability_sum = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        count = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        for first in range(block * ROWS, T, blocks * ROWS):
            token = first + of_row(gl.arange(0, ROWS, gl.SliceLayout(1, layout)))
            exists = (token < T) & (column >= 0)
            place = token * COLUMNS + column
            stride = gl.cast(T, gl.int64) * COLUMNS
            logit = add_splits(parts_ptr, place, exists, splits, stride, layout, AHEAD)
            gl.store(logits_ptr + (token * E + expert), logit, mask=exists & valid)
            score, ranking, probability = score_experts(logit, bias_ptr, valid, expert, SOFTMAX)
            key = gl.where(valid, ordered(ranking), LOWEST)
            if KEEP < N_GROUPS:
                key = drop_groups(ranking, key, GROUPS, SIZE, KEEP, E // N_GROUPS)
                key = gl.where(valid, key, LOWEST)

            index = gl.zeros([ROWS, K_POW2], gl.int32, routes)
            for k in range(rounds):
                at, key = take_best(key, column)
                at = gl.convert_layout(at, gl.SliceLayout(1, routes), assert_trivial=True)
                index = gl.where(route == k, of_row(at), index)
            weight = gl.where(route < K, gl.gather(score, index, axis=1), 0.0)
            if RENORMALIZE:
                weight = weight / of_row(gl.sum(weight, axis=1) + 1e-20)
            chosen, _ = locate_experts(index, E, SIZE, N_GROUPS)
            token = first + of_row(gl.arange(0, ROWS, gl.SliceLayout(1, routes)))
            existing = (token < T) & (route < K)
            gl.store(idx_ptr + (token * K + route), chosen, mask=existing)
            gl.store(topk_weight_ptr + (token * K + route), weight * route_scale, mask=existing)

            probability_sum += gl.where(exists, probability, 0.0)
            count += gl.where(exists & valid & (key == LOWEST), 1.0, 0.0)
        add_up(
            probability_sum, count, sum_ptr, count_ptr, state_ptr, blocks, unit, inverse_unit, E,
            SIZE, N_GROUPS, WARPS,
        )  # fmt: skip


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
    them; bias as there.

    Not launched early, while the logits' kernel still runs: that made the whole forward 56.0 µs
    instead of 53.2 with 64 experts, 76.1 instead of 68.7 with 128 (H200).
    """
    (splits, T, columns), E = parts.shape, num_experts
    groups, size = columns_of(E, n_groups)
    lanes = max(4, columns // LOGITS)
    blocks = min(BLOCKS, ceil_div(T, WARPS * 32 // lanes))
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
        topk,
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
        LANES=lanes,
        WARPS=WARPS,
        AHEAD=2 if columns > 128 else 4,  # as many as 8192 tokens take
        num_warps=WARPS,
    )
    return topk_idx, topk_weight, logits, probability_sum, count
