"""Configurations of the weight gradient's Hopper kernel, to compile for sm_90."""

from dataclasses import replace

import torch

from tests.support import ahead_of_time

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


def configuration(name: str, module):
    """Of a name in CONFIGS, for the kernel's module or what the emulator makes of it."""
    accumulate, dtype, changes = CONFIGS[name]
    base = module.MAIN_GRAD if dtype == FP32 else module.BF16
    return accumulate, dtype, replace(base, **changes)


def compile_launch(name: str, monkeypatch):
    """The compiled kernel of a configuration."""
    from dualpipe_ext.triton_kernels.experts import wgrad_hopper as hopper

    accumulate, dtype, config = configuration(name, hopper)
    y, x = (torch.empty(256, width, dtype=BF16) for width in (512, 256))
    offsets, dw = torch.zeros(9, dtype=torch.int32), torch.empty(8, 512, 256, dtype=dtype)

    def launch():
        how = dict(accumulate=accumulate, num_sms=132, config=config)
        hopper.grouped_wgrad_hopper(y, x, offsets, dw, **how)

    return ahead_of_time.compile_kernel(hopper, "grouped_wgrad_hopper_kernel", launch, monkeypatch)
