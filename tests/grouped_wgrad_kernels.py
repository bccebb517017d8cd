"""Configurations of the weight gradient's Hopper kernel, and what they compile to for sm_90.

`python -m tests.grouped_wgrad_kernels` prints the table that test_grouped_wgrad.py holds them to.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from tests.flash_attention_kernels import AheadOfTime
from tests.test_grouped_mlp import resource_usage

# By name: whether it accumulates, and what differs from the kernel's own configuration for that.
CONFIGS = {
    "accumulate": (True, {}),
    "accumulate, short steps": (True, dict(block_k=32, stages=6, strip=32, buffers=4)),
    "accumulate, wide": (True, dict(tall=False, prefetch=False)),
    "accumulate in L2": (True, dict(stages=4, strip=32, load=False)),
    "bf16": (False, {}),
}

# (registers a thread, bytes of shared memory) of each, Triton 3.6. 168 registers are what a launch
# of three warpgroups has; they share them out as 232 + 232 + 40.
RESOURCES = {
    "accumulate": (168, 213448),
    "accumulate, short steps": (168, 213544),
    "accumulate, wide": (168, 213432),
    "accumulate in L2": (168, 229832),
    "bf16": (168, 229816),
}


def configuration(name: str, module):
    """Of a name in CONFIGS, for the kernel's module or what the emulator makes of it."""
    accumulate, changes = CONFIGS[name]
    base = module.HOPPER_ACCUMULATE if accumulate else module.HOPPER_BF16
    return accumulate, replace(base, **changes)


def compile_launch(name: str, monkeypatch):
    """The compiled kernel of a configuration."""
    from dualpipe_ext.triton_kernels import grouped_wgrad_hopper as hopper

    accumulate, config = configuration(name, hopper)
    ahead = AheadOfTime(hopper.grouped_wgrad_hopper_kernel)
    monkeypatch.setattr(hopper, "grouped_wgrad_hopper_kernel", ahead)
    y, x = (torch.empty(256, width, dtype=torch.bfloat16) for width in (512, 256))
    hopper.grouped_wgrad_hopper(
        y,
        x,
        torch.zeros(9, dtype=torch.int32),
        torch.empty(8, 512, 256, dtype=torch.float32 if accumulate else y.dtype),
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
