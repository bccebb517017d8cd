"""The grouped GEMM's Hopper kernels as launches, and what they compile to for sm_90.

`python -m tests.grouped_hopper_kernels` prints the table that test_grouped_hopper.py holds them to.
"""

import tempfile
from pathlib import Path

import torch

from dualpipe_ext.triton_kernels import grouped_hopper, grouped_hopper_swiglu
from dualpipe_ext.triton_kernels.grouped_hopper import HopperConfig
from tests.flash_attention_kernels import AheadOfTime
from tests.test_grouped_mlp import resource_usage

SHORT_STEPS = {"block_k": 32, "stages": 6}

# By name: which launch, and how.
LAUNCHES = {
    "gate_up": ("gate_up", HopperConfig()),
    "gate_up, drawn": ("gate_up", HopperConfig(dynamic=True)),
    "gate_up, inference": ("inference", HopperConfig()),
    "d_gate_up": ("d_gate_up", HopperConfig()),
    "d_gate_up, drawn": ("d_gate_up", HopperConfig(dynamic=True)),
    "d_gate_up, short steps": ("d_gate_up", HopperConfig(**SHORT_STEPS)),
    "down": ("down", HopperConfig()),
    "down, drawn": ("down", HopperConfig(dynamic=True)),
    "drows": ("drows", HopperConfig()),
    "drows, drawn": ("drows", HopperConfig(dynamic=True)),
    "drows, short steps": ("drows", HopperConfig(**SHORT_STEPS)),
}

# (registers a thread, bytes of shared memory) of each, Triton 3.6. 168 registers are what a launch
# of three warpgroups has.
RESOURCES = {
    "gate_up": (168, 213464),
    "gate_up, drawn": (168, 213464),
    "gate_up, inference": (168, 213448),
    "d_gate_up": (168, 213464),
    "d_gate_up, drawn": (168, 213480),
    "d_gate_up, short steps": (168, 213496),
    "down": (168, 213432),
    "down, drawn": (168, 213448),
    "drows": (168, 213432),
    "drows, drawn": (168, 213448),
    "drows, short steps": (168, 213464),
}


def launch(kernel: str, config: HopperConfig) -> None:
    """Only shapes and dtypes of the tensors matter."""
    R, L, H, I = 256, 8, 256, 128  # noqa: E741

    def empty(*size):
        return torch.empty(size, dtype=torch.bfloat16)

    rows, act, gate_up = empty(R, H), empty(R, I), empty(R, 2 * I)
    offsets, how = torch.zeros(L + 1, dtype=torch.int32), {"num_sms": 132, "config": config}
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
    ahead = AheadOfTime(getattr(module, kernel))
    monkeypatch.setattr(module, kernel, ahead)
    launch(*LAUNCHES[name])
    return ahead.compiled


def main() -> None:
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        for name in LAUNCHES:
            with pytest.MonkeyPatch.context() as monkeypatch:
                compiled = compile_launch(name, monkeypatch)
            usage = resource_usage(compiled.asm["cubin"], Path(folder))
            assert usage["STACK"] == usage["LOCAL"] == 0, (name, usage)
            print(f'    "{name}": {usage["REG"], compiled.metadata.shared},', flush=True)


if __name__ == "__main__":
    main()
