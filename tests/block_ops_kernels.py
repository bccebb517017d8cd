"""Every kernel of the rest of a block as launches, and what they compile to for sm_90.

`python -m tests.block_ops_kernels` prints the table that test_block_ops.py holds them to.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.test_grouped_mlp import resource_usage

BF16, FP32 = torch.bfloat16, torch.float32

# (registers a thread, bytes of shared memory) of each launch, Triton 3.6.
RESOURCES: dict[str, tuple[int, int]] = {}

TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


class AheadOfTime:
    """Stands in for a kernel: compiles what a launch would, for sm_90."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, num_warps, num_stages=3, **constants):
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        parameters = self.kernel.params
        constants |= {p.name: p.default for p in parameters if p.has_default}
        signature, attributes = dict.fromkeys(self.kernel.arg_names, "constexpr"), {}
        for i, (parameter, value) in enumerate(zip(parameters, arguments, strict=False)):
            name = parameter.name
            if value is None:
                constants[name] = None
            elif hasattr(value, "block_shape"):
                block = ",".join(map(str, value.block_shape))
                signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                if not parameter.do_not_specialize_on_alignment:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                assert parameter.do_not_specialize, f"{name} would compile every value"
                signature[name] = "i32"
        source = ASTSource(self.kernel, signature, constants, attributes)
        target = GPUTarget("cuda", 90, 32)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        self.compiled = compile(source, target=target, options=options)


def _norm(H=7168, residual=True, dtype=BF16):
    from dualpipe_ext.triton_kernels.norm import rms_norm

    x, rstd = torch.empty(64, H, dtype=dtype), torch.empty(64)
    other = x if residual else None
    rms_norm(x, other, torch.empty(H), x, other, rstd, 1e-6, num_sms=132)


def _norm_backward(H=7168, residual=True, dtype=BF16):
    from dualpipe_ext.triton_kernels.norm import rms_norm_backward

    x, rstd = torch.empty(64, H, dtype=dtype), torch.empty(64)
    rms_norm_backward(x, x if residual else None, x, torch.empty(H), rstd, x, num_sms=132)


def _rotary(heads=32, D=128, interleaved=False, positions=False):
    from dualpipe_ext.triton_kernels.rotary import rotary

    x, table = torch.empty(2, 64, heads, D, dtype=BF16), torch.empty(64, D // 2)
    places = torch.zeros(2, 64, dtype=torch.int64) if positions else None
    rotary(x, x, table, table, places, interleaved=interleaved, inverse=False, num_sms=132)


def _loss(V=32768, gradient=True):
    from dualpipe_ext.triton_kernels.cross_entropy import cross_entropy

    logits, loss = torch.empty(8, V, dtype=BF16), torch.empty(8)
    extra = dict(gradient=logits, factor=loss[:1]) if gradient else dict(lse=loss)
    targets = torch.zeros(8, dtype=torch.int64)
    cross_entropy(logits, targets, loss, ignore_index=-100, z_loss=0.0, num_sms=132, **extra)


def _loss_gradient(V=32768):
    from dualpipe_ext.triton_kernels.cross_entropy import cross_entropy_gradient

    logits, loss = torch.empty(8, V, dtype=BF16), torch.empty(8)
    targets = torch.zeros(8, dtype=torch.int64)
    options = dict(ignore_index=-100, z_loss=0.0, num_sms=132)
    cross_entropy_gradient(loss, logits, targets, loss, logits, **options)


def _scale_rows(V=32768):
    from dualpipe_ext.triton_kernels.cross_entropy import scale_rows

    scale_rows(torch.empty(8, V, dtype=BF16), torch.empty(1), num_sms=132)


def _route(E=64, K=8, groups=1, keep=1, sigmoid=False, dtype=BF16):
    from dualpipe_ext.triton_kernels.router import route

    x, weight = torch.empty(8192, 64, dtype=dtype), torch.empty(E, 64)
    how = dict(topk=K, renormalize=True, n_groups=groups, topk_groups=keep, route_scale=2.5)
    route(x, weight, torch.empty(E) if sigmoid else None, num_sms=132, **how)


def _route_backward(E=64, K=8, sigmoid=False, dtype=BF16):
    from dualpipe_ext.triton_kernels.router_backward import route_backward

    T, H = 128, 128
    x, weight, logits = torch.empty(T, H, dtype=dtype), torch.empty(E, H), torch.empty(T, E)
    idx = torch.zeros(T, K, dtype=torch.int32)
    how = dict(softmax=not sigmoid, renormalize=True, route_scale=2.5, num_sms=132)
    route_backward(torch.empty(T, K), torch.empty(E), x, weight, logits, idx, **how)


def _d_logits(**options):
    _route_backward(**options)


DEEPSEEK = dict(E=256, groups=8, keep=4, sigmoid=True)
# What is launched, the module and kernel that has to compile, options.
LAUNCHES = {
    "rms_norm": (_norm, "norm", "rms_norm_kernel", {}),
    "rms_norm, no residual, H 128": (
        _norm,
        "norm",
        "rms_norm_kernel",
        dict(H=128, residual=False),
    ),
    "rms_norm, fp32, H 16384": (
        _norm,
        "norm",
        "rms_norm_kernel",
        dict(H=16384, dtype=FP32),
    ),
    "rms_norm_backward": (_norm_backward, "norm", "rms_norm_backward_kernel", {}),
    "rms_norm_backward, fp32, H 16384": (
        _norm_backward,
        "norm",
        "rms_norm_backward_kernel",
        dict(H=16384, dtype=FP32),
    ),
    "rotary": (_rotary, "rotary", "rotary_kernel", {}),
    "rotary, interleaved, positions, D 192, 5 heads": (
        _rotary,
        "rotary",
        "rotary_kernel",
        dict(heads=5, D=192, interleaved=True, positions=True),
    ),
    "cross_entropy in place": (_loss, "cross_entropy", "row_loss_kernel", {}),
    "cross_entropy": (_loss, "cross_entropy", "row_loss_kernel", dict(gradient=False)),
    "cross_entropy in place, V 129280": (
        _loss,
        "cross_entropy",
        "long_row_loss_kernel",
        dict(V=129280),
    ),
    "cross_entropy_gradient": (_loss_gradient, "cross_entropy", "gradient_kernel", {}),
    "scale_rows": (_scale_rows, "cross_entropy", "scale_rows_kernel", {}),
    "route": (_route, "router", "route_kernel", {}),
    "route, fp32": (_route, "router", "route_kernel", dict(dtype=FP32)),
    "route, E 128": (_route, "router", "route_kernel", dict(E=128)),
    "route, E 128, fp32": (_route, "router", "route_kernel", dict(E=128, dtype=FP32)),
    "route, DeepSeek-V3": (_route, "router", "route_kernel", DEEPSEEK),
    "route, E 512, top-32": (_route, "router", "route_kernel", dict(E=512, K=32)),
    "route, E 512, fp32": (_route, "router", "route_kernel", dict(E=512, dtype=FP32)),
    "d_logits": (_d_logits, "router_backward", "d_logits_kernel", {}),
    "route_backward": (_route_backward, "router_backward", "route_backward_kernel", {}),
    "route_backward, fp32": (
        _route_backward,
        "router_backward",
        "route_backward_kernel",
        dict(dtype=FP32),
    ),
    "route_backward, E 128": (
        _route_backward,
        "router_backward",
        "route_backward_kernel",
        dict(E=128),
    ),
    "route_backward, E 256": (
        _route_backward,
        "router_backward",
        "route_backward_kernel",
        dict(E=256),
    ),
    "route_backward, E 512": (
        _route_backward,
        "router_backward",
        "route_backward_kernel",
        dict(E=512),
    ),
}


class Ignored:
    """Stands in for the other kernels of a module."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


def compile_launch(name: str, monkeypatch):
    """The compiled kernel of a launch in LAUNCHES."""
    import importlib

    launch, module, kernel, options = LAUNCHES[name]
    module = importlib.import_module(f"dualpipe_ext.triton_kernels.{module}")
    ahead = AheadOfTime(getattr(module, kernel))
    for other in [other for other in vars(module) if other.endswith("_kernel")]:
        monkeypatch.setattr(module, other, Ignored())
    monkeypatch.setattr(module, kernel, ahead)
    launch(**options)
    return ahead.compiled


def main() -> None:
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        for name in LAUNCHES:
            with pytest.MonkeyPatch.context() as monkeypatch:
                compiled = compile_launch(name, monkeypatch)
            usage = resource_usage(compiled.asm["cubin"], Path(folder))
            spilled = usage["STACK"] or usage["LOCAL"]
            note = f"  # SPILLS {usage}" if spilled else ""
            print(f"    {name!r}: ({usage['REG']}, {compiled.metadata.shared}),{note}", flush=True)


if __name__ == "__main__":
    main()
