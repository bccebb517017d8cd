"""The grouped GEMM's Hopper kernels on a GPU against fp64 arithmetic, one by one;
tests/gpu/test_grouped_mlp.py runs them inside the whole MLP."""

import pytest
import torch

from dualpipe_ext.triton_kernels.experts.gemm import grouped_gemm
from dualpipe_ext.triton_kernels.experts.swiglu import grouped_gate_up, grouped_swiglu_backward
from tests.support.compare import relative_error
from tests.support.grouped_mlp_cases import make_problem
from tests.triton_kernels.test_grouped_hopper import by_hand

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="Hopper's kernels",
    ),
]
NAN = float("nan")

# Real rows of each expert, H, I, rows past the last expert.
CASES = {
    "one": ((100,), 64, 256, 0),
    "partial tiles": ((130, 0, 77, 256), 136, 392, 40),
    "deep": ((0, 900, 0, 3), 4096, 264, 256),
    "many tiles": ((3000, 128, 0, 6000), 512, 2048, 0),
}
NAMES = ("d_gate_up", "d_weight", "drows", "products", "saved", "act", "inferred")


def make(case):
    """A problem with rows past the last expert of NaN, gate_up and dout on the GPU."""
    torch.manual_seed(0)
    counts, H, I, spare = CASES[case]  # noqa: E741
    problem, dout = make_problem(counts, H, I, torch.bfloat16, spare)
    gate_up = torch.randn(len(dout), 2 * I).bfloat16()
    end = int(problem[4][-1])
    for tensor in (problem[0], problem[1], gate_up, dout):
        tensor[end:] = NAN
    return [t.cuda() for t in problem], gate_up.cuda(), dout.cuda(), end


def run(problem, gate_up, dout, end, num_sms, take_over=False):
    options = {"num_sms": num_sms, "take_over": take_over}
    rows, row_weight, w13, w2, offsets = problem
    act = gate_up[:, : w2.shape[2]].contiguous()
    d_gate_up, drows, products, saved, act, inferred = (
        torch.full_like(t, NAN) for t in (gate_up, rows, gate_up, gate_up, act, act)
    )
    tensors = (dout, w2, gate_up, row_weight, offsets, d_gate_up)
    d_weight = grouped_swiglu_backward(*tensors, **options)
    grouped_gemm(gate_up, w13, offsets, drows, weight_is_nk=False, **options)
    grouped_gemm(rows, w13, offsets, products, weight_is_nk=True, **options)
    grouped_gate_up(rows, row_weight, w13, offsets, act, saved, **options)
    grouped_gate_up(rows, row_weight, w13, offsets, inferred, None, **options)
    for written in (d_gate_up, drows, products, saved, act, inferred):
        assert written[end:].isnan().all(), "a row past the last expert was written"
    assert not d_weight[end:].any()
    return [t[:end] for t in (d_gate_up, d_weight, drows, products, saved, act, inferred)]


@pytest.mark.parametrize("take_over", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_fp64(case, take_over):
    problem, gate_up, dout, end = make(case)
    got = run(problem, gate_up, dout, end, 132, take_over)
    wants = by_hand(problem, gate_up, dout)
    for name, value, want in zip(NAMES, got, wants, strict=True):
        assert relative_error(value, want) < 5e-3, name


def test_sm_count_and_order_change_no_bit():
    problem, gate_up, dout, end = make("many tiles")
    first = run(problem, gate_up, dout, end, 132)
    for num_sms in (132, 100, 7):
        for take_over in (False, True):
            again = run(problem, gate_up, dout, end, num_sms, take_over)
            for name, a, b in zip(NAMES, first, again, strict=True):
                assert torch.equal(a, b), (name, num_sms, take_over)


def test_many_launches_give_the_same_bits():
    """Parts of d_row_weight are added by whichever program leaves the last one."""
    (_, row_weight, _, w2, offsets), gate_up, dout, _ = make("many tiles")
    tensors = (dout, w2, gate_up, row_weight, offsets, torch.empty_like(gate_up))
    first = grouped_swiglu_backward(*tensors, num_sms=132)
    for i in range(200):
        again = grouped_swiglu_backward(*tensors, num_sms=132 - i % 3, take_over=i % 2 == 1)
        assert torch.equal(first, again), i


def test_new_sizes_compile_nothing():
    from dualpipe_ext.triton_kernels.experts import gemm_hopper as grouped_hopper
    from dualpipe_ext.triton_kernels.experts import swiglu_hopper as grouped_hopper_swiglu

    kernels = (
        grouped_hopper.grouped_gemm_hopper_kernel,
        grouped_hopper_swiglu.swiglu_backward_hopper_kernel,
    )

    def compiled():
        return [sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels]

    counts = []
    for case_counts, spare, num_sms in (((128, 7), 0, 132), ((500, 0), 3, 1), ((1, 900), 999, 99)):
        problem, dout = make_problem(case_counts, 264, 136, torch.bfloat16, spare)
        gate_up = torch.randn(len(dout), 272).bfloat16().cuda()
        for take_over in (False, True):
            problem, dout = [t.cuda() for t in problem], dout.cuda()
            torch.cuda.set_sync_debug_mode("error")
            try:
                _, row_weight, w13, w2, offsets = problem
                how = {"num_sms": num_sms, "take_over": take_over}
                into = torch.empty_like(gate_up)
                grouped_swiglu_backward(dout, w2, gate_up, row_weight, offsets, into, **how)
                grouped_gemm(into, w13, offsets, dout, weight_is_nk=False, **how)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(compiled())
    assert counts[0] == counts[1] == counts[2]
