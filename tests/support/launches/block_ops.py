"""The kernels of the rest of a block: elementwise ones, the loss, the router."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch

from tests.support.launches.launch import Launch

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
NORM, ROTARY, SWIGLU = (f"elementwise.{name}" for name in ("norm", "rotary", "swiglu"))
LOSS, LOSS_HOPPER = "elementwise.cross_entropy", "elementwise.cross_entropy_hopper"
BACKWARD, LOGITS_HOPPER = "routing.backward", "routing.logits_hopper"


def block_ops():
    def launch(name, kernel, call, also_sm_100=False, **options):
        return Launch("block_ops", name, kernel, partial(call, **options), also_sm_100)

    long = dict(H=16384, dtype=FP32)
    norm, backward = f"{NORM}.rms_norm_kernel", f"{NORM}.rms_norm_backward_kernel"
    yield launch("rms_norm", norm, _norm, True)
    yield launch("rms_norm, H 128", norm, _norm, H=128, residual=False)
    yield launch("rms_norm, H 16384, fp32", norm, _norm, **long)
    yield launch("rms_norm_backward", backward, _norm_backward, True)
    yield launch("rms_norm_backward, H 16384, fp32", backward, _norm_backward, **long)
    yield launch("add_parts", f"{NORM}.add_parts_kernel", _norm_backward, True)

    rotary, odd = f"{ROTARY}.rotary_kernel", dict(interleaved=True, positions=True)
    yield launch("rotary", rotary, _rotary, True)
    yield launch("rotary, interleaved, 5 heads", rotary, _rotary, heads=5, D=192, **odd)

    forward, backward = f"{SWIGLU}.swiglu_kernel", f"{SWIGLU}.swiglu_backward_kernel"
    yield launch("swiglu", forward, _swiglu, True)
    yield launch("swiglu, D 40, fp32", forward, _swiglu, D=40, dtype=FP32)
    yield launch("swiglu_backward", backward, _swiglu_backward, True)
    yield launch("swiglu_backward, fp32", backward, _swiglu_backward, dtype=FP32)

    row, long = f"{LOSS}.row_loss_kernel", f"{LOSS}.long_row_loss_kernel"
    yield launch("cross_entropy, in place", row, _loss)
    yield launch("cross_entropy", row, _loss, True, gradient=False)
    yield launch("cross_entropy, in place, V 129280", long, _loss, V=129280)
    yield launch("cross_entropy, V 129280", long, _loss, True, V=129280, gradient=False)
    yield launch("cross_entropy, a row a warp", f"{LOSS_HOPPER}.loss_kernel", _loss_hopper)
    yield launch("cross_entropy_gradient", f"{LOSS}.gradient_kernel", _loss_gradient, True)
    yield launch("scale_rows", f"{LOSS}.scale_rows_kernel", _scale_rows, True)

    route = "routing.route.route_kernel"
    yield launch("route", route, _route, True)
    yield launch("route, fp32", route, _route, dtype=FP32)
    yield launch("route, E 128, fp32", route, _route, E=128, dtype=FP32)
    yield launch("route, DeepSeek-V3", route, _route, **DEEPSEEK)
    yield launch("route, E 512, K 32, fp32", route, _route, E=512, K=32, dtype=FP32)

    weights, choose = f"{LOGITS_HOPPER}.split_weight_kernel", "routing.choice.choose_kernel"
    yield launch("split_weight", weights, _logits_hopper)
    yield launch("pad_weight", weights, _logits_hopper, E=15, dtype=BF16)
    yield launch("choose", choose, _choose)
    yield launch("choose, E 128", choose, _choose, E=128)
    yield launch("choose, DeepSeek-V3", choose, _choose, **DEEPSEEK)

    d_logits, rounded = f"{BACKWARD}.d_logits_kernel", "d_logits, rounded, DeepSeek-V3"
    yield launch("d_logits", d_logits, _route_backward, True, E=256)
    yield launch("d_logits, rounded", d_logits, _route_backward, hopper=True)
    yield launch(rounded, d_logits, _route_backward, E=256, sigmoid=True, hopper=True)
    for dtype, of_dtype in ((BF16, ""), (FP32, ", fp32")):
        for E in (64, 128, 256, 512):
            if (E, dtype) != (128, FP32):
                name, kernel = (
                    f"route_backward, E {E}{of_dtype}",
                    f"{BACKWARD}.route_backward_kernel",
                )
                few = (E, dtype) == (64, BF16)
                yield launch(name, kernel, _route_backward, few, E=E, dtype=dtype)

    hopper = f"{LOGITS_HOPPER}.logits_hopper_kernel"
    gradients = "routing.backward_hopper.gradients_hopper_kernel"
    for E in (15, 64, 128, 256):
        yield launch(f"route, Hopper, E {E}", hopper, _logits_hopper, E=E)
        yield launch(f"route_backward, Hopper, E {E}", gradients, _gradients_hopper, E=E)
    for E in (64, 128, 256):
        name = f"route, Hopper, E {E}, weight bf16"
        yield launch(name, hopper, _logits_hopper, E=E, dtype=BF16)
