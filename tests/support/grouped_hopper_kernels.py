"""The grouped GEMM's Hopper kernels as launches, to compile for sm_90."""

import torch

from dualpipe_ext.triton_kernels.experts import gemm_hopper as grouped_hopper
from dualpipe_ext.triton_kernels.experts import swiglu_hopper as grouped_hopper_swiglu
from dualpipe_ext.triton_kernels.experts.gemm_hopper import LONG_STEPS, SHORT_STEPS, HopperConfig
from tests.support import ahead_of_time

# By name: which launch, and how; "take over" for the one that draws its tiles.
LAUNCHES = {
    "gate_up": ("gate_up", LONG_STEPS),
    "gate_up, take over": ("gate_up", LONG_STEPS),
    "gate_up, inference": ("inference", LONG_STEPS),
    "d_gate_up": ("d_gate_up", LONG_STEPS),
    "d_gate_up, take over": ("d_gate_up", LONG_STEPS),
    "down": ("down", LONG_STEPS),
    "down, take over": ("down", LONG_STEPS),
    "down, short steps": ("down", SHORT_STEPS),
    "drows": ("drows", SHORT_STEPS),
    "drows, take over": ("drows", SHORT_STEPS),
}
EXPERTS = 256  # as many as the kernels have to keep first rows of in registers


def launch(kernel: str, config: HopperConfig, take_over: bool) -> None:
    """Only shapes and dtypes of the tensors matter."""
    R, L, H, I = 256, EXPERTS, 256, 128  # noqa: E741

    def empty(*size):
        return torch.empty(size, dtype=torch.bfloat16)

    rows, act, gate_up = empty(R, H), empty(R, I), empty(R, 2 * I)
    offsets = torch.zeros(L + 1, dtype=torch.int32)
    how = {"num_sms": 132, "config": config, "take_over": take_over}
    if kernel in ("gate_up", "inference"):
        saved = gate_up if kernel == "gate_up" else None
        tensors = (rows, torch.empty(R), empty(L, 2 * I, H), offsets, act, saved)
        grouped_hopper_swiglu.gate_up_hopper(*tensors, **how)
    elif kernel == "d_gate_up":
        tensors = (rows, empty(L, H, I), gate_up, torch.empty(R), offsets, gate_up)
        grouped_hopper_swiglu.swiglu_backward_hopper(*tensors, **how)
    elif kernel == "down":
        tensors = (act, empty(L, H, I), offsets, rows)
        grouped_hopper.grouped_gemm_hopper(*tensors, weight_is_nk=True, **how)
    else:
        tensors = (gate_up, empty(L, 2 * I, H), offsets, rows)
        grouped_hopper.grouped_gemm_hopper(*tensors, weight_is_nk=False, **how)


def compile_launch(name: str, monkeypatch):
    """The compiled kernel of a launch in LAUNCHES."""
    module, kernel = {
        "gate_up": (grouped_hopper_swiglu, "gate_up_hopper_kernel"),
        "inference": (grouped_hopper_swiglu, "gate_up_hopper_kernel"),
        "d_gate_up": (grouped_hopper_swiglu, "swiglu_backward_hopper_kernel"),
    }.get(LAUNCHES[name][0], (grouped_hopper, "grouped_gemm_hopper_kernel"))
    take_over = "take over" in name
    return ahead_of_time.compile_kernel(
        module, kernel, lambda: launch(*LAUNCHES[name], take_over=take_over), monkeypatch
    )
