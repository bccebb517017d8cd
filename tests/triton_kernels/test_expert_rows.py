"""The row kernels without a GPU, in Triton's interpreter; fp8 rows; and the reference backend's
exchange of unique rows, which the kernels complete."""

import pytest
import torch

from dualpipe_ext import RowsOverflowError
from dualpipe_ext.exchange.plan import RoutingLayout
from dualpipe_ext.exchange.reference import ReferenceBackend
from dualpipe_ext.ops.fp8 import dequantize_rows, quantize_rows
from tests.support.compare import relative_error
from tests.support.exchange_cases import (
    ROUTINGS,
    Case,
    combine,
    dispatch,
    expected_plan,
)
from tests.support.expert_rows_cases import CASES
from tests.support.interpreted import run_interpreted

# ---- fp8 ----


def nearest_e4m3(value: float) -> float:
    """By search among all finite e4m3 numbers; ties go to the even mantissa."""
    sign, value = (-1.0 if value < 0 else 1.0), abs(value)
    numbers = [
        (mantissa / 8 * 2.0**-6) if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent in range(16)
        for mantissa in range(8)
        if (exponent, mantissa) != (15, 7)
    ]
    distance, _, best = min((abs(value - n), i % 2, n) for i, n in enumerate(numbers))
    assert distance <= 16
    return sign * best


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [8, 136, 256])
def test_fp8_rows_are_the_nearest_numbers(hidden, dtype):
    x = (torch.randn(3, hidden) * torch.logspace(-6, 3, hidden)).to(dtype)
    x[1] = 0
    q, scales = quantize_rows(x)
    assert q.shape == x.shape and q.dtype == torch.float8_e4m3fn
    assert scales.shape == (3, -(-hidden // 128)) and scales.dtype == torch.float32
    for row in range(3):
        for column in range(hidden):
            block = x[row, column // 128 * 128 : column // 128 * 128 + 128].float()
            amax = block.abs().max().clamp_min(torch.tensor(1e-4))
            assert scales[row, column // 128] == amax / 448
            stretched = float(x[row, column].float() * (448 / amax))
            assert float(q[row, column]) == nearest_e4m3(stretched)


def test_fp8_rows_come_back():
    x = torch.randn(50, 4, 264)
    back = dequantize_rows(*quantize_rows(x), torch.float32)
    amax = x.abs().amax(-1, keepdim=True)
    assert bool(((back - x).abs() <= x.abs() / 16 * 1.0001 + amax * 2**-10 / 448).all())
    # Rounded once: the next bf16 number is at most half a unit away.
    rounded = dequantize_rows(*quantize_rows(x), torch.bfloat16)
    assert torch.equal(rounded, back.bfloat16())
    empty = dequantize_rows(*quantize_rows(x[:0]), torch.float32)
    assert empty.shape == (0, 4, 264)


# ---- the reference backend ----


def make_backend(rank, group, case, world_size, **options):
    layout = RoutingLayout(rank, world_size, case.num_experts, case.topk, case.max_tokens)
    return ReferenceBackend(group, layout, case.hidden, case.dtype, unique=True, **options)


def sent_tokens(idx, local, rank):
    """The tokens that have an expert of `rank`, one by one."""
    first, last = rank * local, (rank + 1) * local
    return [t for t, experts in enumerate(idx.tolist()) if any(first <= e < last for e in experts)]


def check_unique_form(rank, group, routing, dtype):
    world_size = 1 if group is None else group.size()
    case = Case(routing, 136, 3, 8, 40, seed=5, dtype=dtype)
    backend = make_backend(rank, group, case, world_size)
    idx = [case.topk_idx(p, world_size) for p in range(world_size)]
    local = case.num_experts // world_size
    plan = backend.plan(idx[rank])
    slots = expected_plan(case, idx, rank).slots
    arrivals = [sent_tokens(i, local, rank) for i in idx]

    assert plan.unique_counts.dtype == plan.send_rows.dtype == plan.expert_rows.dtype == torch.int32
    assert plan.unique_counts.tolist() == [len(a) for a in arrivals]
    assert plan.expert_rows.shape == (world_size, case.max_tokens, case.topk)
    want_send = torch.full((len(idx[rank]), world_size), -1, dtype=torch.int32)
    for q in range(world_size):
        for position, token in enumerate(sent_tokens(idx[rank], local, q)):
            want_send[token, q] = position
    assert torch.equal(plan.send_rows, want_send)

    x, weight = case.x(rank), case.topk_weight(rank)
    arrival = backend.send(x, plan, weight, "forward")
    rows, scales, weights = arrival.rows, arrival.scales, arrival.topk_weight
    arrival = backend.send(x, plan, None, "forward", "fp8")
    q8, q8_scales, nothing = arrival.rows, arrival.scales, arrival.topk_weight
    assert scales is None and nothing is None and q8.dtype == torch.float8_e4m3fn
    assert rows.shape == q8.shape == (world_size, case.max_tokens, case.hidden)
    for p, tokens in enumerate(arrivals):
        count = len(tokens)
        assert torch.equal(plan.expert_rows[p, :count], slots[p][tokens])
        assert torch.equal(rows[p, :count], case.x(p)[tokens])
        assert torch.equal(weights[p, :count], case.topk_weight(p)[tokens])
        want_q, want_scales = quantize_rows(case.x(p)[tokens])
        assert torch.equal(q8[p, :count].float(), want_q.float())
        assert torch.equal(q8_scales[p, :count], want_scales)
        assert rows[p, count:].isnan().all() and q8[p, count:].float().isnan().all()

    # Home again: y is the sum of what each rank holds for a token.
    departure = backend.leave(None, plan, None, "backward")
    sums = departure.sums
    assert sums.shape == rows.shape and sums.dtype == dtype
    held = [case.matrix(world_size * 40, case.generator(q, 8)).view(sums.shape) for q in range(4)]
    for p, tokens in enumerate(arrivals):
        sums[p, : len(tokens)] = held[rank][p, : len(tokens)]
    y, _ = backend.fetch(departure, plan)
    want = torch.zeros(len(x), case.hidden, dtype=torch.float64)
    for q in range(world_size):
        for position, token in enumerate(sent_tokens(idx[rank], local, q)):
            want[token] += held[q][rank, position].double()
    assert y.dtype == dtype and y.shape == x.shape
    assert relative_error(y, want) < (5e-3 if dtype == torch.bfloat16 else 1e-6)

    # fp8 rows in expert order are the rounded tokens.
    rounded = dequantize_rows(*quantize_rows(x), dtype)
    got, _ = dispatch(backend, x, plan, None, "forward", "fp8")
    assert torch.equal(got, dispatch(backend, rounded, plan, None, "forward")[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_unique_rows_on_four_ranks(gloo_workers_4, dtype):
    for routing in ROUTINGS:
        gloo_workers_4.run(check_unique_form, routing, dtype)


@pytest.mark.parametrize("routing", ["uniform", "dropped"])
def test_unique_rows_on_one_rank(routing):
    check_unique_form(0, None, routing, torch.float32)


def check_max_rows(rank, group):
    """Room for the fullest rank is enough for all; one row less raises on all, and all go on."""
    case = Case("hot_expert", 8, 3, 8, 200, seed=1, dtype=torch.float32)
    idx = [case.topk_idx(p, 4) for p in range(4)]
    needed = [expected_plan(case, idx, p).rows for p in range(4)]
    fullest = max(range(4), key=needed.__getitem__)
    assert min(needed) < needed[fullest] and fullest == 2

    backend = make_backend(rank, group, case, 4, max_rows=needed[fullest] - 1)
    with pytest.raises(RowsOverflowError, match=f"max_rows={needed[fullest]} or more") as caught:
        backend.plan(idx[rank])
    assert (caught.value.rank, caught.value.needed) == (fullest, needed[fullest])

    spare = 64
    roomy = make_backend(rank, group, case, 4, max_rows=needed[fullest] + spare)
    exact = make_backend(rank, group, case, 4)
    plan, exact_plan = roomy.plan(idx[rank]), exact.plan(idx[rank])
    assert (plan.num_rows, exact_plan.num_rows) == (needed[fullest] + spare, needed[rank])
    rows, weight = dispatch(roomy, case.x(rank), plan, case.topk_weight(rank), "forward")
    want, want_weight = dispatch(exact, case.x(rank), exact_plan, case.topk_weight(rank), "forward")
    assert rows.shape == (plan.num_rows, 8) and weight.shape == rows.shape[:1]
    assert torch.equal(rows[: needed[rank]], want) and not rows[needed[rank] :].any()
    assert torch.equal(weight[: needed[rank]], want_weight) and not weight[needed[rank] :].any()
    y, _ = combine(roomy, rows, plan, None, "forward")
    assert torch.equal(y, combine(exact, want, exact_plan, None, "forward")[0])


def test_max_rows(gloo_workers_4):
    gloo_workers_4.run(check_max_rows)


# ---- the kernels ----


def test_interpreter_equals_the_loops():
    assert run_interpreted("tests.support.expert_rows_cases") == [f"ok {name}" for name in CASES]


@pytest.mark.parametrize(
    "rows",
    [
        torch.empty(4, 3, 12),
        torch.empty(4, 3, 20)[..., :16],
        torch.empty(4, 16, 3).transpose(1, 2),
        torch.empty(4 * 16 + 1)[1:].view(4, 16),
    ],
    ids=["width", "stride", "last dimension", "address"],
)
def test_rows_that_16_bytes_do_not_fit_are_refused(rows):
    pytest.importorskip("triton")
    from dualpipe_ext.triton_kernels.elementwise.rows import vector_strides

    with pytest.raises(ValueError, match=r"width \d+ with strides .* multiples of 8"):
        vector_strides(rows)
