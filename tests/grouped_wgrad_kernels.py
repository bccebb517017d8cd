"""Configurations of the weight gradient's Hopper kernel, and what they compile to for sm_90.

`python -m tests.grouped_wgrad_kernels` prints the table that test_grouped_wgrad.py holds them to.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from tests.flash_attention_kernels import AheadOfTime
from tests.test_grouped_mlp import resource_usage

FP32, BF16 = torch.float32, torch.bfloat16

# By name: whether it accumulates, dw's dtype, and what differs from the kernel's own configuration.
CONFIGS = {
    "accumulate": (True, FP32, {}),
    "accumulate, prefetch": (True, FP32, dict(prefetch=True)),
    "accumulate, half buffered": (True, FP32, dict(stages=3, buffers=4)),
    "accumulate, buffered": (True, FP32, dict(block_k=32, buffers=8)),
    "bf16": (False, BF16, {}),
    "accumulate bf16": (True, BF16, {}),
    "accumulate bf16, prefetch": (True, BF16, dict(prefetch=True)),
}

# (registers a thread, bytes of shared memory) of each, Triton 3.6. 168 registers are what a launch
# of three warpgroups has; they share them out as 232 + 232 + 40.
RESOURCES = {
    "accumulate": (168, 229880),
    "accumulate, prefetch": (168, 229896),
    "accumulate, half buffered": (168, 213552),
    "accumulate, buffered": (168, 230072),
    "bf16": (168, 213552),
    "accumulate bf16": (168, 213552),
    "accumulate bf16, prefetch": (168, 213568),
}


def configuration(name: str, module):
    """Of a name in CONFIGS, for the kernel's module or what the emulator makes of it."""
    accumulate, dtype, changes = CONFIGS[name]
    base = module.MAIN_GRAD if dtype == FP32 else module.BF16
    return accumulate, dtype, replace(base, **changes)


def compile_launch(name: str, monkeypatch):
    """The compiled kernel of a configuration."""
    from dualpipe_ext.triton_kernels import grouped_wgrad_hopper as hopper

    accumulate, dtype, config = configuration(name, hopper)
    ahead = AheadOfTime(hopper.grouped_wgrad_hopper_kernel)
    monkeypatch.setattr(hopper, "grouped_wgrad_hopper_kernel", ahead)
    y, x = (torch.empty(256, width, dtype=BF16) for width in (512, 256))
    hopper.grouped_wgrad_hopper(
        y,
        x,
        torch.zeros(9, dtype=torch.int32),
        torch.empty(8, 512, 256, dtype=dtype),
        accumulate=accumulate,
        num_sms=132,
        config=config,
    )
    return ahead.compiled


def main() -> None:
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        for name in CONFIGS:
            with pytest.MonkeyPatch.context() as monkeypatch:
                compiled = compile_launch(name, monkeypatch)
            usage = resource_usage(compiled.asm["cubin"], Path(folder))
            assert usage["STACK"] == usage["LOCAL"] == 0, usage
            print(f"    {name!r}: {usage['REG'], compiled.metadata.shared},", flush=True)


if __name__ == "__main__":
    main()
