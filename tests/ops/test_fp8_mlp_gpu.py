"""`precision="fp8"` of the grouped MLP on a Hopper GPU."""

import pytest
import torch

from dualpipe_ext.ops.fp8 import dequantize_rows, quantize_rows
from dualpipe_ext.ops.fp8_weight import fp8_weight
from dualpipe_ext.ops.grouped_mlp import grouped_mlp, mlp_dgrad, mlp_forward, mlp_wgrad
from tests.ops.test_fp8_mlp import NAMES, errors, expected, run
from tests.ops.test_grouped_mlp_gpu import on_gpu
from tests.support.grouped_mlp_cases import make_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="the kernels use wgmma, which only Hopper GPUs have",
    ),
]

FP8 = {"precision": "fp8", "implementation": "triton"}

# Real rows of each expert, H, I, rows past the last expert, which hold NaN.
CASES = {
    "tiny": ((5,), 128, 128, 0),
    "empty experts": ((0, 130, 0, 77), 256, 384, 40),
    "typical": ((500, 700, 0, 1000, 511, 12, 640, 128), 2048, 768, 384),
}


def problem_of(case):
    return on_gpu(*make_problem(*CASES[case][:3], torch.bfloat16, CASES[case][3]))


@pytest.mark.parametrize("case", CASES)
def test_equals_fp64_of_the_rounded_numbers(case):
    problem, dout, end = problem_of(case)
    got = run(problem, dout, **FP8)
    # Sums of 14 bits round some numbers to another neighbour, in bf16 and then in fp8.
    found = errors(got, expected(problem, dout), end)
    assert max(found.values()) < 1e-2, found
    found = errors(got, run(problem, dout, implementation="triton"), end)
    assert max(found.values()) < (0.2 if case == "tiny" else 8e-2), found  # 5 rows average little
    assert not got[2][end:].any()


@pytest.mark.parametrize("num_sms", [1, 100])
def test_num_sms_changes_no_bit(num_sms):
    problem, dout, end = problem_of("typical")
    want = run(problem, dout, **FP8)
    for _ in range(3):
        got = run(problem, dout, num_sms=num_sms, **FP8)
        # Of the weights' gradients the bf16 tests say it.
        for name, a, b in zip(NAMES[:3], got[:3], want[:3], strict=True):
            assert torch.equal(a[:end], b[:end]), name


def test_autograd_equals_the_steps():
    problem, dout, end = problem_of("empty experts")
    leaves = [t.clone().requires_grad_() for t in problem[:4]]
    out = grouped_mlp(*leaves, problem[4], precision="fp8")
    out.backward(dout)
    got = (out, *(leaf.grad for leaf in leaves))
    found = errors(got, run(problem, dout, **FP8), end)
    assert not any(found.values()), found


def test_rows_that_come_as_fp8():
    """What is on the grid rounds to itself, so that e4m3 rows and their bf16 give the same bits,
    as does dout."""
    problem, dout, end = problem_of("typical")
    q, scales = quantize_rows(problem[0])
    q_dout, dout_scales = quantize_rows(dout)
    problem[0] = dequantize_rows(q, scales, torch.bfloat16)
    want = run(problem, dequantize_rows(q_dout, dout_scales, torch.bfloat16), **FP8)
    for turn in (lambda scale: scale, lambda scale: scale.T.contiguous().T):
        how = {"row_scale": turn(scales), "dout_scale": turn(dout_scales)}
        got = run((q, *problem[1:]), q_dout, **how, **FP8)
        found = errors(got, want, end)
        assert not any(found.values()), found


def test_a_graph_rounds_the_weights_at_every_replay():
    problem, _, end = problem_of("empty experts")
    with torch.no_grad():
        grouped_mlp(*problem, **FP8)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = grouped_mlp(*problem, **FP8)
        problem[2].mul_(-2)
        graph.replay()
        assert torch.equal(out[:end], grouped_mlp(*problem, **FP8)[:end])


def test_another_stream_waits_for_the_rounding():
    weight = torch.randn(16, 2048, 2048, device="cuda").bfloat16()
    want = fp8_weight(weight.clone())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda._sleep(20_000_000)  # about 10 ms before the rounding
    rounded = fp8_weight(weight)
    with torch.cuda.stream(stream):
        same = fp8_weight(weight)
        sums = [x.float().sum() for x in same]
    assert same is rounded
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(torch.stack(sums), torch.stack([x.float().sum() for x in want]))


def test_other_sizes_compile_nothing():
    from dualpipe_ext.triton_kernels.experts import fp8_gemm as grouped_fp8
    from dualpipe_ext.triton_kernels.experts import fp8_swiglu as grouped_fp8_swiglu
    from dualpipe_ext.triton_kernels.experts import quantize

    modules = (grouped_fp8, grouped_fp8_swiglu, quantize)
    kernels = [k for m in modules for name, k in vars(m).items() if name.endswith("_kernel")]
    assert len(kernels) == 5

    def compiled():
        return sum(len(c) for kernel in kernels for c, *_ in kernel.device_caches.values())

    def step(case):
        problem, dout, _ = problem_of(case)
        _, saved = mlp_forward(*problem, **FP8)
        mlp_dgrad(dout, saved)
        mlp_wgrad(dout, saved)

    step("typical")
    before = compiled()
    step("tiny")
    step("empty experts")
    assert compiled() == before >= 6
