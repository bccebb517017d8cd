"""The fp8 GEMM and its quantising kernels on a Hopper GPU against fp64 arithmetic."""

import pytest
import torch

from tests.support.compare import relative_error
from tests.support.grouped_fp8_cases import (
    CASES,
    NAN,
    check_quantizers,
    check_swiglu,
    make_problem,
    make_swiglu,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="the kernel uses wgmma, which only Hopper GPUs have",
    ),
]

# Rows of each expert, N, K, rows past the last expert.
LARGE = {
    "typical": ((512, 768, 0, 1024, 512, 128, 640, 128), 2048, 1536, 384),
    "one hot expert": ((128, 9088, 128, 0, 128), 1024, 7168, 0),
    "many experts": (tuple(128 * (i % 3) for i in range(65)), 768, 256, 1024),
}


def problem(case):
    return make_problem(*(CASES | LARGE)[case], device="cuda")


def run(here, num_sms: int = 132, turns: bool = True) -> torch.Tensor:
    """out [R, N], in memory that was full of NaN."""
    from dualpipe_ext.triton_kernels.experts.fp8_gemm import Fp8Config, grouped_fp8_gemm

    out = torch.full((len(here.rows), here.weight.shape[1]), NAN, dtype=torch.bfloat16)
    inputs = (here.q_rows, here.row_scale, here.q_weight, here.weight_scale, here.offsets)
    return grouped_fp8_gemm(*inputs, out.cuda(), num_sms=num_sms, config=Fp8Config(turns=turns))


@pytest.mark.parametrize("case", [*CASES, *LARGE])
def test_equals_fp64(case):
    here = problem(case)
    out = run(here)
    error = relative_error(out[: here.end], here.expected())
    assert error < 5e-3, f"{error:.2e}"
    assert relative_error(out[: here.end], here.unrounded()) < 4e-2
    assert out[here.end :].isnan().all()


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("num_sms", [1, 108, 132])
def test_schedule_changes_no_bit(turns, num_sms):
    here = problem("typical")
    want = run(here)[: here.end]
    for _ in range(20):
        assert torch.equal(run(here, num_sms, turns=turns)[: here.end], want)


@pytest.mark.parametrize("case", CASES)
def test_quantizers_equal_plain_torch(case):
    here = problem(case)
    check_quantizers(here.rows, here.weight, here)


@pytest.mark.parametrize("num_sms", [1, 132])
@pytest.mark.parametrize(
    "counts, I, spare", [((0, 256, 0), 128, 72), ((128, 384), 640, 0), ((1024, 512), 2048, 128)]
)
def test_swiglu_equals_fp64(counts, I, spare, num_sms):  # noqa: E741
    problem = make_swiglu(counts, I, spare, torch.bfloat16, device="cuda")
    check_swiglu(*problem, num_sms, 3e-3)


def test_transposed_weight_multiplies_the_other_way():
    from dualpipe_ext.triton_kernels.experts.quantize import quantize_weights

    forward = problem("typical")
    here = make_problem(LARGE["typical"][0], 1536, 2048, 0, device="cuda")  # N and K change places
    here.weight = forward.weight.transpose(1, 2)
    _, here.q_weight, scales = quantize_weights(forward.weight)
    here.weight_scale = scales.transpose(1, 2)
    out = run(here)
    assert relative_error(out, here.expected()) < 5e-3
    assert relative_error(out, here.unrounded()) < 4e-2


def test_new_sizes_compile_nothing():
    from dualpipe_ext.triton_kernels.experts import fp8_gemm as grouped_fp8
    from dualpipe_ext.triton_kernels.experts import quantize

    kernels = (grouped_fp8.grouped_fp8_kernel, quantize.quantize_rows_kernel)
    kernels += (quantize.quantize_weights_kernel,)

    def step(case, num_sms):
        here = problem(case)
        run(here, num_sms)
        check_quantizers(here.rows, here.weight, here)

    def compiled():
        return sum(len(c) for kernel in kernels for c, *_ in kernel.device_caches.values())

    step("one tile", 132)
    before = compiled()
    assert before >= 3
    step("many experts", 16)
    step("half a tile wide", 1)
    step("narrow", 99)
    assert compiled() == before
