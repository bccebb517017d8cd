"""Every kernel of the rest of a block as launches, to compile for sm_90."""

from __future__ import annotations

import importlib
from unittest import mock

import torch

from tests.support import ahead_of_time

BF16, FP32 = torch.bfloat16, torch.float32


def _norm(H=7168, residual=True, dtype=BF16):
    from dualpipe_ext.triton_kernels.elementwise.norm import rms_norm

    x, rstd = torch.empty(64, H, dtype=dtype), torch.empty(64)
    other = x if residual else None
    rms_norm(x, other, torch.empty(H), x, other, rstd, 1e-6, num_sms=132)


def _norm_backward(H=7168, residual=True, dtype=BF16):
    from dualpipe_ext.triton_kernels.elementwise.norm import rms_norm_backward

    x, rstd = torch.empty(64, H, dtype=dtype), torch.empty(64)
    rms_norm_backward(x, x if residual else None, x, torch.empty(H), rstd, x, num_sms=132)


def _rotary(heads=32, D=128, interleaved=False, positions=False):
    from dualpipe_ext.triton_kernels.elementwise.rotary import rotary

    x, table = torch.empty(2, 64, heads, D, dtype=BF16), torch.empty(64, D // 2)
    places = torch.zeros(2, 64, dtype=torch.int64) if positions else None
    rotary(x, x, table, table, places, interleaved=interleaved, inverse=False, num_sms=132)


def _swiglu(D=7168, dtype=BF16):
    from dualpipe_ext.triton_kernels.elementwise.swiglu import swiglu

    swiglu(torch.empty(64, 2 * D, dtype=dtype), torch.empty(64, D, dtype=dtype), num_sms=132)


def _swiglu_backward(D=7168, dtype=BF16):
    from dualpipe_ext.triton_kernels.elementwise.swiglu import swiglu_backward

    dy, gate_up = torch.empty(64, D, dtype=dtype), torch.empty(64, 2 * D, dtype=dtype)
    swiglu_backward(dy, gate_up, gate_up, num_sms=132)


def _loss(V=32768, gradient=True):
    from dualpipe_ext.triton_kernels.elementwise.cross_entropy import cross_entropy

    logits, loss = torch.empty(8, V, dtype=BF16), torch.empty(8)
    extra = dict(gradient=logits, factor=loss[:1]) if gradient else dict(lse=loss)
    targets = torch.zeros(8, dtype=torch.int64)
    cross_entropy(logits, targets, loss, ignore_index=-100, z_loss=0.0, num_sms=132, **extra)


def _loss_hopper(V=32768):
    from dualpipe_ext.triton_kernels.elementwise.cross_entropy_hopper import cross_entropy_loss

    logits, loss = torch.empty(8, V, dtype=BF16), torch.empty(8)
    targets = torch.zeros(8, dtype=torch.int64)
    cross_entropy_loss(logits, targets, loss, loss, ignore_index=-100, z_loss=0.0, num_sms=132)


def _loss_gradient(V=32768):
    from dualpipe_ext.triton_kernels.elementwise.cross_entropy import cross_entropy_gradient

    logits, loss = torch.empty(8, V, dtype=BF16), torch.empty(8)
    targets = torch.zeros(8, dtype=torch.int64)
    options = dict(ignore_index=-100, z_loss=0.0, num_sms=132)
    cross_entropy_gradient(loss, logits, targets, loss, logits, **options)


def _scale_rows(V=32768):
    from dualpipe_ext.triton_kernels.elementwise.cross_entropy import scale_rows

    scale_rows(torch.empty(8, V, dtype=BF16), torch.empty(1), num_sms=132)


def _route(E=64, K=8, groups=1, keep=1, sigmoid=False, dtype=BF16):
    from dualpipe_ext.triton_kernels.routing.route import route

    x, weight = torch.empty(8192, 64, dtype=dtype), torch.empty(E, 64)
    how = dict(topk=K, renormalize=True, n_groups=groups, topk_groups=keep, route_scale=2.5)
    route(x, weight, torch.empty(E) if sigmoid else None, num_sms=132, **how)


def _logits_hopper(E=64, dtype=FP32):
    from dualpipe_ext.triton_kernels.routing.logits_hopper import logits_hopper

    x, weight = torch.empty(8192, 64, dtype=BF16), torch.empty(E, 64, dtype=dtype)
    logits_hopper(x, weight, n_groups=3 if E == 15 else 1, num_sms=132)


def _gradients_hopper(E=64):
    from dualpipe_ext.triton_kernels.routing.backward_hopper import gradients_hopper

    d_logits = torch.empty(128, E + -E % 8, dtype=BF16)
    x, weight = torch.empty(128, 128, dtype=BF16), torch.empty(E, 128, dtype=BF16)
    gradients_hopper(d_logits, x, weight, num_sms=132)


def _choose(E=64, K=8, groups=1, keep=1, sigmoid=False):
    from dualpipe_ext.triton_kernels.routing.choice import choose

    how = dict(topk=K, renormalize=True, n_groups=groups, topk_groups=keep, route_scale=2.5)
    bias = torch.empty(E) if sigmoid else None
    choose(torch.empty(4, 8192, E), bias, num_experts=E, num_sms=132, **how)


def _route_backward(E=64, K=8, sigmoid=False, dtype=BF16, hopper=False):
    from dualpipe_ext.triton_kernels.routing.backward import route_backward

    T, H = 128, 128
    x, weight, logits = torch.empty(T, H, dtype=dtype), torch.empty(E, H), torch.empty(T, E)
    idx = torch.zeros(T, K, dtype=torch.int32)
    how = dict(softmax=not sigmoid, renormalize=True, route_scale=2.5, num_sms=132, hopper=hopper)
    with mock.patch("dualpipe_ext.triton_kernels.routing.backward_hopper.gradients_hopper"):
        route_backward(torch.empty(T, K), torch.empty(E), x, weight, logits, idx, **how)


DEEPSEEK = dict(E=256, groups=8, keep=4, sigmoid=True)
# The module and kernel that has to compile, what launches it, options.
LAUNCHES = {
    "rms_norm": ("elementwise.norm", "rms_norm_kernel", _norm, {}),
    "rms_norm, H 128": ("elementwise.norm", "rms_norm_kernel", _norm, dict(H=128, residual=False)),
    "rms_norm, H 16384, fp32": (
        "elementwise.norm",
        "rms_norm_kernel",
        _norm,
        dict(H=16384, dtype=FP32),
    ),
    "rms_norm_backward": ("elementwise.norm", "rms_norm_backward_kernel", _norm_backward, {}),
    "rms_norm_backward, H 16384, fp32": (
        "elementwise.norm",
        "rms_norm_backward_kernel",
        _norm_backward,
        dict(H=16384, dtype=FP32),
    ),
    "add_parts": ("elementwise.norm", "add_parts_kernel", _norm_backward, {}),
    "rotary": ("elementwise.rotary", "rotary_kernel", _rotary, {}),
    "rotary, interleaved, 5 heads": (
        "elementwise.rotary",
        "rotary_kernel",
        _rotary,
        dict(heads=5, D=192, interleaved=True, positions=True),
    ),
    "swiglu": ("elementwise.swiglu", "swiglu_kernel", _swiglu, {}),
    "swiglu, D 40, fp32": ("elementwise.swiglu", "swiglu_kernel", _swiglu, dict(D=40, dtype=FP32)),
    "swiglu_backward": ("elementwise.swiglu", "swiglu_backward_kernel", _swiglu_backward, {}),
    "swiglu_backward, fp32": (
        "elementwise.swiglu",
        "swiglu_backward_kernel",
        _swiglu_backward,
        dict(dtype=FP32),
    ),
    "cross_entropy, in place": ("elementwise.cross_entropy", "row_loss_kernel", _loss, {}),
    "cross_entropy": ("elementwise.cross_entropy", "row_loss_kernel", _loss, dict(gradient=False)),
    "cross_entropy, in place, V 129280": (
        "elementwise.cross_entropy",
        "long_row_loss_kernel",
        _loss,
        dict(V=129280),
    ),
    "cross_entropy, V 129280": (
        "elementwise.cross_entropy",
        "long_row_loss_kernel",
        _loss,
        dict(V=129280, gradient=False),
    ),
    "cross_entropy, a row a warp": (
        "elementwise.cross_entropy_hopper",
        "loss_kernel",
        _loss_hopper,
        {},
    ),
    "cross_entropy_gradient": ("elementwise.cross_entropy", "gradient_kernel", _loss_gradient, {}),
    "scale_rows": ("elementwise.cross_entropy", "scale_rows_kernel", _scale_rows, {}),
    "route": ("routing.route", "route_kernel", _route, {}),
    "route, fp32": ("routing.route", "route_kernel", _route, dict(dtype=FP32)),
    "route, E 128, fp32": ("routing.route", "route_kernel", _route, dict(E=128, dtype=FP32)),
    "route, DeepSeek-V3": ("routing.route", "route_kernel", _route, DEEPSEEK),
    "route, E 512, K 32, fp32": (
        "routing.route",
        "route_kernel",
        _route,
        dict(E=512, K=32, dtype=FP32),
    ),
    "split_weight": ("routing.logits_hopper", "split_weight_kernel", _logits_hopper, {}),
    "pad_weight": (
        "routing.logits_hopper",
        "split_weight_kernel",
        _logits_hopper,
        dict(E=15, dtype=BF16),
    ),
    "choose": ("routing.choice", "choose_kernel", _choose, {}),
    "choose, E 128": ("routing.choice", "choose_kernel", _choose, dict(E=128)),
    "choose, DeepSeek-V3": ("routing.choice", "choose_kernel", _choose, DEEPSEEK),
    "d_logits": ("routing.backward", "d_logits_kernel", _route_backward, dict(E=256)),
    "d_logits, rounded": (
        "routing.backward",
        "d_logits_kernel",
        _route_backward,
        dict(hopper=True),
    ),
    "d_logits, rounded, DeepSeek-V3": (
        "routing.backward",
        "d_logits_kernel",
        _route_backward,
        dict(E=256, sigmoid=True, hopper=True),
    ),
} | {
    f"route_backward, E {E}" + (", fp32" if dtype == FP32 else ""): (
        "routing.backward",
        "route_backward_kernel",
        _route_backward,
        dict(E=E, dtype=dtype),
    )
    for dtype in (BF16, FP32)
    for E in (64, 128, 256, 512)
    if (E, dtype) != (128, FP32)
}
HOPPER = {
    "route": ("routing.logits_hopper", "logits_hopper_kernel", _logits_hopper),
    "route_backward": ("routing.backward_hopper", "gradients_hopper_kernel", _gradients_hopper),
}
LAUNCHES |= {
    f"{name}, Hopper, E {E}": (*launch, dict(E=E))
    for name, launch in HOPPER.items()
    for E in (15, 64, 128, 256)
}
LAUNCHES |= {
    f"route, Hopper, E {E}, weight bf16": (*HOPPER["route"], dict(E=E, dtype=BF16))
    for E in (64, 128, 256)
}


def compile_launch(name: str, monkeypatch):
    """The compiled kernel of a launch in LAUNCHES."""
    module, kernel, launch, options = LAUNCHES[name]
    module = importlib.import_module(f"dualpipe_ext.triton_kernels.{module}")
    return ahead_of_time.compile_kernel(module, kernel, lambda: launch(**options), monkeypatch)
