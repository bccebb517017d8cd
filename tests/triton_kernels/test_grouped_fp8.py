"""The fp8 GEMM without a GPU: run by the emulator, its quantising kernels by Triton's
interpreter."""

from functools import cache

import pytest
import torch

from tests.support import ROOT
from tests.support.compare import relative_error
from tests.support.gluon_emulator import emulate
from tests.support.grouped_fp8_cases import (
    CASES,
    INTERPRETED,
    NAN,
    make_problem,
)
from tests.support.interpreted import run_interpreted


@cache
def emulated():
    (module,) = emulate(ROOT / "triton_kernels", "experts.fp8_gemm")
    return module


def run(problem, num_sms: int, config: str = "FORWARD") -> torch.Tensor:
    """out [R, N], NaN where the kernel writes nothing."""
    kernels = emulated()
    out = torch.full((len(problem.rows), problem.weight.shape[1]), NAN, dtype=torch.bfloat16)
    inputs = (problem.q_rows, problem.row_scale, problem.q_weight, problem.weight_scale)
    how = {"num_sms": num_sms, "config": getattr(kernels, config)}
    return kernels.grouped_fp8_gemm(*inputs, problem.offsets, out, **how)


@pytest.mark.parametrize("num_sms", [1, 3, 132])
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_fp64(case, num_sms):
    problem = make_problem(*CASES[case])
    out = run(problem, num_sms)
    # One rounding to bf16: at most 2⁻⁹ of a value, 1.7e-3 on average.
    assert relative_error(out[: problem.end], problem.expected()) < 2.5e-3
    assert out[problem.end :].isnan().all()


def test_turns_change_no_bit():
    problem = make_problem((256, 128), 512, 768)
    assert torch.equal(run(problem, 2, "BACKWARD"), run(problem, 5))


def test_transposed_scales_are_a_view():
    problem = make_problem((128, 128), 272, 400)
    want = run(problem, 2)
    problem.weight_scale = problem.weight_scale.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(problem, 2), want)


def test_fp8_is_as_far_from_bf16_as_three_bits_of_mantissa():
    problem = make_problem((256,), 256, 1024)
    assert 2e-2 < relative_error(run(problem, 4)[: problem.end], problem.unrounded()) < 4e-2


def test_widths_that_do_not_fit_are_named():
    quantize = pytest.importorskip("dualpipe_ext.triton_kernels.experts.quantize")
    offsets = torch.tensor([0, 128], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\(128, 24\).*\(24,\) as multiples of 16"):
        quantize.quantize_rows(torch.zeros(128, 24), offsets, num_sms=1)
    with pytest.raises(ValueError, match=r"strides \(512, 1, 16\).*pass contiguous"):
        quantize.quantize_weights(torch.zeros(1, 32, 16).transpose(1, 2))


def test_interpreter_equals_plain_torch():
    assert run_interpreted("tests.support.grouped_fp8_cases") == [
        f"ok {name}" for name in INTERPRETED
    ]
