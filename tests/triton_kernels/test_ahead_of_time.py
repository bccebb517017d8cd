"""Every plain Triton kernel compiles for Blackwell (sm_100), too, and no kernel is without a test
of what it compiles to. Gluon kernels are written for Hopper's instructions and stay there."""

import importlib
import re
from pathlib import Path

import pytest

from tests.ops import test_grouped_mlp
from tests.support import block_ops_kernels
from tests.support.ahead_of_time import check_resources
from tests.triton_kernels import test_expert_rows, test_grouped_fp8

TESTS = Path(__file__).resolve().parents[1]
KERNELS = TESTS.parent / "triton_kernels"

# Module and kernel of every plain Triton kernel.
COMPILED = (
    "elementwise.cross_entropy.gradient_kernel",
    "elementwise.cross_entropy.long_row_loss_kernel",
    "elementwise.cross_entropy.row_loss_kernel",
    "elementwise.cross_entropy.scale_rows_kernel",
    "experts.rows.expand_kernel",
    "experts.rows.sum_at_home_kernel",
    "experts.rows.sum_per_rank_kernel",
    "experts.fp8_swiglu.swiglu_backward_kernel",
    "experts.fp8_swiglu.swiglu_kernel",
    "experts.gemm.grouped_gemm_kernel",
    "experts.swiglu.gate_up_kernel",
    "experts.swiglu.swiglu_backward_kernel",
    "experts.wgrad.grouped_wgrad_kernel",
    "elementwise.norm.add_parts_kernel",
    "elementwise.norm.rms_norm_backward_kernel",
    "elementwise.norm.rms_norm_kernel",
    "experts.quantize.quantize_rows_kernel",
    "experts.quantize.quantize_weights_kernel",
    "elementwise.rotary.rotary_kernel",
    "routing.route.route_kernel",
    "routing.backward.d_logits_kernel",
    "routing.backward.route_backward_kernel",
    "elementwise.swiglu.swiglu_backward_kernel",
    "elementwise.swiglu.swiglu_kernel",
)

FEW = {"rms_norm_kernel": "rms_norm", "rms_norm_backward_kernel": "rms_norm_backward"}
FEW |= {"row_loss_kernel": "cross_entropy", "long_row_loss_kernel": "cross_entropy, V 129280"}
FEW |= {"gradient_kernel": "cross_entropy_gradient", "add_parts_kernel": "add_parts"}
FEW |= {"scale_rows_kernel": "scale_rows", "rotary_kernel": "rotary", "route_kernel": "route"}
FEW |= {"d_logits_kernel": "d_logits"}
FEW |= {"route_backward_kernel": "route_backward, E 64"}
FEW |= {"swiglu_kernel": "swiglu", "swiglu_backward_kernel": "swiglu_backward"}
FP8 = {"quantize_rows_kernel": "rows", "quantize_weights_kernel": "weights"}
FP8 |= {"swiglu_kernel": "swiglu", "swiglu_backward_kernel": "swiglu backward"}
GROUPED = {"grouped_gemm_kernel": "down", "gate_up_kernel": "gate_up"}
GROUPED |= {"swiglu_backward_kernel": "swiglu_backward", "grouped_wgrad_kernel": "wgrad"}


def defined() -> set[tuple[str, str]]:
    """Module and name of every kernel that can be launched."""
    pattern = re.compile(r"^def (\w+_kernel)\(", re.MULTILINE)
    found = {
        (f"{file.parent.name}.{file.stem}", name)
        for file in KERNELS.glob("*/*.py")
        for name in pattern.findall(file.read_text())
    }
    return found - {("elementwise.rows", "row_kernel")}  # a decorator


def is_gluon(module: str, name: str) -> bool:
    module = importlib.import_module(f"dualpipe_ext.triton_kernels.{module}")
    return getattr(module, name).is_gluon()


def compile_launch(kernel: str, monkeypatch):
    """For sm_100, through the launches that the tests for sm_90 make."""
    from triton.backends import compiler

    module, _, name = kernel.rpartition(".")
    hopper = compiler.GPUTarget
    monkeypatch.setattr(compiler, "GPUTarget", lambda kind, arch, warp: hopper(kind, 100, warp))
    if module == "experts.rows":
        case = f"{name.removesuffix('_kernel')}: as in the target"
        return test_expert_rows.compile_launch(case, monkeypatch)
    if module in ("experts.quantize", "experts.fp8_swiglu"):
        return test_grouped_fp8.compile_launch(FP8[name], monkeypatch)
    if module.startswith("experts."):
        return test_grouped_mlp.compile_launch(GROUPED[name], monkeypatch)
    return block_ops_kernels.compile_launch(FEW[name], monkeypatch)


def test_no_kernel_is_without_a_test():
    pytest.importorskip("triton")
    plain = {kernel for kernel in defined() if not is_gluon(*kernel)}
    assert plain == {tuple(name.rsplit(".", 1)) for name in COMPILED}
    sources = "".join(file.read_text() for file in TESTS.rglob("*.py"))
    for _, name in defined() - plain:
        assert f'"{name}"' in sources, f"{name} is compiled nowhere"


@pytest.mark.parametrize("kernel", COMPILED)
def test_kernel_compiles_for_sm_100(kernel, monkeypatch):
    pytest.importorskip("triton")
    check_resources("sm_100", kernel, compile_launch(kernel, monkeypatch))
