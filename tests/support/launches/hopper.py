"""The Hopper kernels of the grouped MLP: its GEMMs and its weight gradient."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from tests.support.launches.launch import Launch

FP32, BF16 = torch.float32, torch.bfloat16

# By name: whether it accumulates, dw's dtype, and what differs from the kernel's own configuration.
WGRADS = {
    "accumulate": (True, FP32, {}),
    "accumulate, prefetch": (True, FP32, dict(prefetch=True)),
    "accumulate, half buffered": (True, FP32, dict(stages=3, buffers=4)),
    "accumulate, buffered": (True, FP32, dict(block_k=32, buffers=8)),
    "bf16": (False, BF16, {}),
    "accumulate bf16": (True, BF16, {}),
    "accumulate bf16, prefetch": (True, BF16, dict(prefetch=True)),
}


def wgrad_configuration(name: str, module):
    """Of a name in WGRADS, for the kernel's module or what the emulator makes of it."""
    accumulate, dtype, changes = WGRADS[name]
    base = module.MAIN_GRAD if dtype == FP32 else module.BF16
    return accumulate, dtype, replace(base, **changes)


def _wgrad(name: str) -> None:
    from dualpipe_ext.triton_kernels.experts import wgrad_hopper

    accumulate, dtype, config = wgrad_configuration(name, wgrad_hopper)
    y, x = (torch.empty(256, width, dtype=BF16) for width in (512, 256))
    offsets, dw = torch.zeros(9, dtype=torch.int32), torch.empty(8, 512, 256, dtype=dtype)
    how = dict(accumulate=accumulate, num_sms=132, config=config)
    wgrad_hopper.grouped_wgrad_hopper(y, x, offsets, dw, **how)


def grouped_wgrad():
    kernel = "experts.wgrad_hopper.grouped_wgrad_hopper_kernel"
    for name in WGRADS:
        yield Launch("grouped_wgrad", name, kernel, partial(_wgrad, name))


EXPERTS = 256  # as many as the kernels have to keep first rows of in registers


def _gemm(which: str, take_over: bool, steps: str) -> None:
    from dualpipe_ext.triton_kernels.experts import gemm_hopper, swiglu_hopper

    R, L, H, I = 256, EXPERTS, 256, 128  # noqa: E741

    def empty(*size):
        return torch.empty(size, dtype=BF16)

    rows, act, gate_up = empty(R, H), empty(R, I), empty(R, 2 * I)
    offsets = torch.zeros(L + 1, dtype=torch.int32)
    how = {"num_sms": 132, "config": getattr(gemm_hopper, steps), "take_over": take_over}
    if which in ("gate_up", "inference"):
        saved = gate_up if which == "gate_up" else None
        tensors = (rows, torch.empty(R), empty(L, 2 * I, H), offsets, act, saved)
        swiglu_hopper.gate_up_hopper(*tensors, **how)
    elif which == "d_gate_up":
        tensors = (rows, empty(L, H, I), gate_up, torch.empty(R), offsets, gate_up)
        swiglu_hopper.swiglu_backward_hopper(*tensors, **how)
    elif which == "down":
        tensors = (act, empty(L, H, I), offsets, rows)
        gemm_hopper.grouped_gemm_hopper(*tensors, weight_is_nk=True, **how)
    else:
        tensors = (gate_up, empty(L, 2 * I, H), offsets, rows)
        gemm_hopper.grouped_gemm_hopper(*tensors, weight_is_nk=False, **how)


def grouped_hopper():
    """ "take over" for the one that draws its tiles."""
    kernels = {
        "gate_up": "swiglu_hopper.gate_up_hopper_kernel",
        "inference": "swiglu_hopper.gate_up_hopper_kernel",
        "d_gate_up": "swiglu_hopper.swiglu_backward_hopper_kernel",
    }
    for name, which, take_over, steps in (
        ("gate_up", "gate_up", False, "LONG_STEPS"),
        ("gate_up, take over", "gate_up", True, "LONG_STEPS"),
        ("gate_up, inference", "inference", False, "LONG_STEPS"),
        ("d_gate_up", "d_gate_up", False, "LONG_STEPS"),
        ("d_gate_up, take over", "d_gate_up", True, "LONG_STEPS"),
        ("down", "down", False, "LONG_STEPS"),
        ("down, take over", "down", True, "LONG_STEPS"),
        ("down, short steps", "down", False, "SHORT_STEPS"),
        ("drows", "drows", False, "SHORT_STEPS"),
        ("drows, take over", "drows", True, "SHORT_STEPS"),
    ):
        kernel = f"experts.{kernels.get(which, 'gemm_hopper.grouped_gemm_hopper_kernel')}"
        yield Launch("grouped_hopper", name, kernel, partial(_gemm, which, take_over, steps))
