"""The grouped GEMM's Hopper kernels without a GPU: emulated against fp64 arithmetic."""

import math
from functools import cache
from itertools import pairwise

import pytest
import torch

from tests.support import ROOT
from tests.support.compare import relative_error
from tests.support.grouped_mlp_cases import make_problem

NAN = math.nan
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}

# Real rows of each expert, H, I, rows past the last expert, SMs.
CASES = {
    "tiny": ((5,), 8, 8, 0, 1),
    "partial tiles": ((128, 0, 77), 136, 136, 64, 2),
    "empty first, middle and last": ((0, 256, 0, 1, 0), 264, 520, 128, 3),
    "all rows on one": ((0, 700, 0), 72, 264, 0, 4),
    "more SMs than tiles": ((90, 200), 328, 8, 8, 40),
    "no rows": ((0, 0), 136, 72, 128, 2),
}


def by_hand(problem, gate_up, dout):
    """d_gate_up, d_row_weight, gate_up @ w13, and of the forward rows @ w13.T and act, both twice.

    In fp64, up to the last expert's end; SwiGLU's derivative is torch's own.
    """
    (rows, row_weight, w13, w2), offsets = (t.double() for t in problem[:4]), problem[4].tolist()
    end = offsets[-1]
    gate_up, row_weight = (t[:end].double().requires_grad_() for t in (gate_up, row_weight))
    d_act, products, back = [], [], []
    for expert, (a, b) in enumerate(pairwise(offsets)):
        d_act.append(dout[a:b].double() @ w2[expert])
        products.append(rows[a:b] @ w13[expert].T)
        back.append((gate_up[a:b].detach(), w13[expert]))
    gate, up = gate_up.chunk(2, dim=1)
    act = torch.nn.functional.silu(gate) * up * row_weight[:, None]
    gradients = torch.autograd.grad(act, (gate_up, row_weight), torch.cat(d_act))
    back, products = torch.cat([x @ w for x, w in back]), torch.cat(products)
    gate, up = products.chunk(2, dim=1)
    forward = gate * gate.sigmoid() * up * row_weight.detach()[:, None]
    return *gradients, back, products, products, forward, forward


@cache
def emulated():
    from tests.support.gluon_emulator import Tensor, atomic_add, emulate, load

    names = ("experts.gemm_hopper", "experts.swiglu_hopper", "experts.tiles_hopper")
    gemm, swiglu, tiles = emulate(ROOT / "triton_kernels", *names)

    def draw(counter, limit):
        drawn = tiles.GONE if tiles.gives_way(limit) else atomic_add(counter, 1)
        return Tensor(torch.tensor([drawn]))

    def prefetch(address, size):
        last = address.offset + size.data // 2
        assert (size.data > 0).all() and not (size.data % 16).any()
        assert address.offset.min() >= 0 and last.max() <= len(address.memory)
        prefetched.append(int(size.data.sum()))

    prefetched = []
    gemm.draw, gemm.look_at_limit = draw, load
    swiglu.prefetch, swiglu.prefetched = prefetch, prefetched
    return gemm, swiglu


def limit_programs(limit):
    """Of every kernel of `emulated`."""
    gemm, _ = emulated()
    gemm.program_limit(torch.device("cpu")).fill_(limit)


def run(problem, gate_up, dout, num_sms, take_over=False, **options):
    """The same by the kernels: rows @ w13.T by two of them, act with and without saving.

    NaN wherever nothing must be written.
    """
    gemm, swiglu = emulated()
    rows, row_weight, w13, w2, offsets = problem
    end = int(offsets[-1])
    config = gemm.HopperConfig(**options) if options else None
    how = {"num_sms": num_sms, "take_over": take_over, "config": config}
    act = gate_up[:, : w2.shape[2]]
    results = [torch.full_like(t, NAN) for t in (gate_up, rows, gate_up, gate_up, act, act)]
    d_gate_up, drows, products, saved, act, inferred = map(torch.Tensor.contiguous, results)
    swiglu.prefetched.clear()
    d_weight = swiglu.swiglu_backward_hopper(
        dout, w2, gate_up, row_weight, offsets, d_gate_up, **how
    )
    assert sum(swiglu.prefetched) == gate_up[:end].numel() * 2, "gate and up are read once"
    gemm.grouped_gemm_hopper(gate_up, w13, offsets, drows, weight_is_nk=False, **how)
    gemm.grouped_gemm_hopper(rows, w13, offsets, products, weight_is_nk=True, **how)
    swiglu.gate_up_hopper(rows, row_weight, w13, offsets, act, saved, **how)
    swiglu.gate_up_hopper(rows, row_weight, w13, offsets, inferred, None, **how)
    for written in (d_gate_up, drows, products, saved, act, inferred):
        assert written[end:].isnan().all(), "a row past the last expert was written"
    assert not d_weight[end:].any()
    return [t[:end] for t in (d_gate_up, d_weight, drows, products, saved, act, inferred)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("take_over", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_emulated_kernels_equal_fp64(case, take_over, dtype):
    torch.manual_seed(0)
    *sizes, num_sms = CASES[case]
    problem, dout = make_problem(*sizes[:3], dtype, sizes[3])
    gate_up = torch.randn(len(dout), 2 * sizes[2]).to(dtype)
    end = int(problem[4][-1])
    for tensor in (problem[0], problem[1], gate_up, dout):
        tensor[end:] = NAN
    options = {"block_k": 64, "stages": 3} if take_over else {}
    got = run(problem, gate_up, dout, num_sms, take_over, **options)
    for value, want in zip(got, by_hand(problem, gate_up, dout), strict=True):
        assert value.shape == want.shape
        assert not end or relative_error(value, want) < TOLERANCE[dtype]


def test_sm_count_and_order_change_no_bit():
    torch.manual_seed(0)
    problem, dout = make_problem((300, 0, 500), 72, 520, torch.bfloat16)
    gate_up = torch.randn(len(dout), 1040).bfloat16()
    first = run(problem, gate_up, dout, 1)
    for num_sms, take_over in ((3, False), (7, False), (2, True)):
        again = run(problem, gate_up, dout, num_sms, take_over)
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_programs_that_leave_change_no_bit(limit):
    torch.manual_seed(0)
    problem, dout = make_problem((300, 0, 500), 72, 520, torch.bfloat16)
    gate_up = torch.randn(len(dout), 1040).bfloat16()
    first = run(problem, gate_up, dout, 5, take_over=True)
    limit_programs(limit)
    try:
        again = run(problem, gate_up, dout, 5, take_over=True)
    finally:
        limit_programs(0)
    assert all(map(torch.equal, first, again))
