"""Every plain Triton kernel compiles for Blackwell (sm_100), too, and no kernel is without a test
of what it compiles to. Gluon kernels are written for Hopper's instructions and stay there."""

import importlib
import re
from pathlib import Path

import pytest

from tests import block_ops_kernels, test_expert_rows, test_grouped_fp8, test_grouped_mlp

TESTS = Path(__file__).resolve().parent
KERNELS = TESTS.parent / "triton_kernels"
LIMIT = 227 * 1024  # bytes of shared memory of a thread block, as on sm_90

# Module and kernel: registers a thread, bytes of stack that spills take, bytes of shared memory;
# Triton 3.6. `python -m tests.test_ahead_of_time` prints it.
RESOURCES = {
    "cross_entropy.gradient_kernel": (32, 0, 49212),
    "cross_entropy.long_row_loss_kernel": (128, 0, 64),
    "cross_entropy.row_loss_kernel": (107, 0, 196672),
    "cross_entropy.scale_rows_kernel": (32, 0, 0),
    "expert_rows.expand_kernel": (46, 0, 0),
    "expert_rows.sum_at_home_kernel": (32, 0, 0),
    "expert_rows.sum_per_rank_kernel": (64, 0, 0),
    "grouped_fp8_swiglu.swiglu_backward_kernel": (64, 0, 49536),
    "grouped_fp8_swiglu.swiglu_kernel": (50, 0, 66304),
    "grouped_gemm.grouped_gemm_kernel": (160, 0, 229424),
    "grouped_swiglu.gate_up_kernel": (203, 0, 213040),
    "grouped_swiglu.swiglu_backward_kernel": (255, 40, 197680),
    "grouped_wgrad.grouped_wgrad_kernel": (122, 0, 229424),
    "norm.add_parts_kernel": (40, 0, 4096),
    "norm.rms_norm_backward_kernel": (128, 0, 147532),
    "norm.rms_norm_kernel": (58, 0, 98368),
    "quantize.quantize_rows_kernel": (64, 0, 1024),
    "quantize.quantize_weights_kernel": (64, 0, 32768),
    "rotary.rotary_kernel": (42, 0, 0),
    "router.route_kernel": (171, 0, 114728),
    "router_backward.d_logits_kernel": (114, 0, 8192),
    "router_backward.route_backward_kernel": (255, 96, 229552),
    "swiglu.swiglu_backward_kernel": (35, 0, 147456),
    "swiglu.swiglu_kernel": (32, 0, 98304),
}

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
        (file.stem, name)
        for file in KERNELS.glob("*.py")
        for name in pattern.findall(file.read_text())
    }
    return found - {("row_tiles", "row_kernel")}  # a decorator


def is_gluon(module: str, name: str) -> bool:
    module = importlib.import_module(f"dualpipe_ext.triton_kernels.{module}")
    return getattr(module, name).is_gluon()


def compile_kernel(module: str, name: str, monkeypatch):
    """Through the launches that the tests for sm_90 make."""
    from triton.backends import compiler

    hopper = compiler.GPUTarget
    monkeypatch.setattr(compiler, "GPUTarget", lambda kind, arch, warp: hopper(kind, 100, warp))
    if module == "expert_rows":
        kernels = importlib.import_module("dualpipe_ext.triton_kernels.expert_rows")
        ahead = test_expert_rows.AheadOfTime(getattr(kernels, name))
        monkeypatch.setattr(kernels, name, ahead)
        test_expert_rows.launch(name.removesuffix("_kernel"))
        return ahead.compiled
    if module in ("quantize", "grouped_fp8_swiglu"):
        return test_grouped_fp8.compile_launch(FP8[name], monkeypatch)
    if module.startswith("grouped"):
        kernels, launch = test_grouped_mlp.launches()[GROUPED[name]]
        recorder = test_grouped_mlp.Recorder(getattr(kernels, name))
        monkeypatch.setattr(kernels, name, recorder)
        launch()
        return recorder.compile()
    return block_ops_kernels.compile_launch(FEW[name], monkeypatch)


def measure(module: str, name: str, monkeypatch, folder: Path) -> tuple[int, int, int]:
    compiled = compile_kernel(module, name, monkeypatch)
    usage = test_grouped_mlp.resource_usage(compiled.asm["cubin"], folder)
    return usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared


def test_no_kernel_is_without_a_test():
    pytest.importorskip("triton")
    plain = {kernel for kernel in defined() if not is_gluon(*kernel)}
    assert plain == {tuple(name.split(".")) for name in RESOURCES}
    sources = "".join(file.read_text() for file in TESTS.glob("*.py"))
    for _, name in defined() - plain:
        assert f'"{name}"' in sources, f"{name} is compiled nowhere"


@pytest.mark.parametrize("kernel", RESOURCES)
def test_kernel_compiles_for_sm_100(kernel, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    found = measure(*kernel.split("."), monkeypatch, tmp_path)
    assert all(a <= b for a, b in zip(found, RESOURCES[kernel], strict=True)), found
    assert found[2] <= LIMIT


def main() -> None:
    import tempfile

    for module, name in sorted(kernel for kernel in defined() if not is_gluon(*kernel)):
        with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
            found = measure(module, name, monkeypatch, Path(folder))
        print(f'    "{module}.{name}": {found},', flush=True)


if __name__ == "__main__":
    main()
