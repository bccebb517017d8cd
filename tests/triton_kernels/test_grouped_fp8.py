"""The fp8 GEMM without a GPU: run by the emulator, its quantising kernels by Triton's interpreter,
and all compiled ahead of time for sm_90."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.support.ahead_of_time import check_resources, compile_kernel
from tests.support.gluon_emulator import emulate
from tests.support.grouped_fp8_cases import (
    CASES,
    E4M3,
    INTERPRETED,
    NAN,
    make_problem,
    relative_error,
)
from tests.support.interpreted import run_interpreted

ROOT = Path(__file__).resolve().parents[2]

COMPILED = ("gemm, forward", "gemm, backward", "rows", "weights", "swiglu", "swiglu backward")


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


# ---- Compiled ----


def compile_launch(name: str, monkeypatch):
    from dualpipe_ext.triton_kernels.experts import fp8_gemm as grouped_fp8
    from dualpipe_ext.triton_kernels.experts import fp8_swiglu as grouped_fp8_swiglu
    from dualpipe_ext.triton_kernels.experts import quantize

    bf16, offsets = dict(dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int32)
    rows, weight = torch.empty(256, 256, **bf16), torch.empty(2, 512, 256, **bf16)
    gemm = name.startswith("gemm")
    module = grouped_fp8 if gemm else grouped_fp8_swiglu if "swiglu" in name else quantize
    kernel = f"{name}_kernel" if "swiglu" in name else f"quantize_{name}_kernel"
    kernel = "grouped_fp8_kernel" if gemm else kernel.replace(" ", "_")

    def launch():
        if gemm:
            grouped_fp8.grouped_fp8_gemm(
                rows.to(E4M3),
                torch.empty(2, 256),
                weight.to(E4M3),
                torch.empty(2, 4, 2),
                offsets,
                torch.empty(256, 512, **bf16),
                num_sms=132,
                config=getattr(grouped_fp8, name.split()[-1].upper()),
            )
        elif name == "swiglu":
            grouped_fp8_swiglu.swiglu(rows, torch.empty(256), offsets, num_sms=132)
        elif name == "swiglu backward":
            act, how = rows[:, :128].contiguous(), dict(num_sms=132)
            tensors = (act, rows, torch.empty(256), offsets, rows, act)
            grouped_fp8_swiglu.swiglu_backward(*tensors, **how)
        elif name == "rows":
            quantize.quantize_rows(rows, offsets, num_sms=132)
        else:
            quantize.quantize_weights(weight)

    return compile_kernel(module, kernel, launch, monkeypatch)


@pytest.mark.parametrize("name", COMPILED)
def test_kernel_compiles_for_sm_90(name, monkeypatch):
    pytest.importorskip("triton")
    compiled = compile_launch(name, monkeypatch)
    check_resources("grouped_fp8", name, compiled)
    ptx = compiled.asm["ptx"]
    if name.startswith("gemm"):
        assert "setmaxnreg.inc" in ptx and "cp.async.bulk.tensor" in ptx
        # Four products of 32 for 128 of K, in two halves, in two warpgroups; the first of each four
        # starts at zero, and the sums of two never meet but in fp32.
        products = re.findall(r"wgmma\.mma_async\.\S+", ptx)
        assert products == ["wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"] * 16
        # Layout changes rename registers.
        assert "convert_layout" not in compiled.asm["ttgir"]
    else:
        # 16 bytes at a time; SwiGLU's loads go through shared memory, a tile ahead.
        load = "cp.async.cg.shared.global" if "swiglu" in name else "ld.global.v4.b32"
        assert load in ptx and "st.global.v4.b32" in ptx


def test_sizes_share_one_compilation():
    pytest.importorskip("triton")
    from dualpipe_ext.triton_kernels.experts import fp8_gemm as grouped_fp8
    from dualpipe_ext.triton_kernels.experts import fp8_swiglu as grouped_fp8_swiglu
    from dualpipe_ext.triton_kernels.experts import quantize

    kernels = (quantize.quantize_rows_kernel, quantize.quantize_weights_kernel)
    kernels += (grouped_fp8_swiglu.swiglu_kernel, grouped_fp8_swiglu.swiglu_backward_kernel)
    for kernel in (grouped_fp8.grouped_fp8_kernel, *kernels):
        for parameter in kernel.params:
            if not parameter.name.endswith(("_ptr", "_desc")):
                assert parameter.do_not_specialize != parameter.is_constexpr, parameter.name
