"""What a launch and a layer cost the host, in microseconds.

    python -m bench host [--json FILE] [--repeats N]

A launch: SwiGLU of 16 rows, and a grouped GEMM with three TMA descriptors, as we launch kernels and
as Triton itself does. A layer: `MoELayer` forward and backward of 128 tokens on one rank. Medians
of batches of calls by the host's clock. Where the GPU is slower than the host, it is the GPU's
time.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from compute import environment

from dualpipe_ext import MoELayer
from dualpipe_ext.triton_kernels.elementwise import swiglu
from dualpipe_ext.triton_kernels.experts import gemm_hopper as grouped_hopper

BATCH = 20  # calls between two looks at the clock


def host_us(call: Callable[[], object], repeats: int) -> float:
    """Median µs of the host's time for one call."""
    times = []
    for repeat in range(repeats + 3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(BATCH):
            call()
        if repeat >= 3:
            times.append((time.perf_counter() - begin) / BATCH * 1e6)
    torch.cuda.synchronize()
    return round(statistics.median(times), 2)


def as_triton(kernel, call: Callable[[], object]) -> Callable[[], object]:
    """`call` with its kernel launched by Triton's own JITFunction.run."""

    def run():
        ours = kernel.run
        kernel.run = type(kernel).run.__get__(kernel)
        try:
            call()
        finally:
            kernel.run = ours

    return run


def launches() -> dict[str, Callable[[], object]]:
    bf16 = dict(dtype=torch.bfloat16, device="cuda")
    gate_up, y = torch.randn(16, 512, **bf16), torch.empty(16, 256, **bf16)
    rows, weight = torch.randn(256, 256, **bf16), torch.randn(2, 256, 256, **bf16)
    offsets = torch.tensor([0, 128, 256], dtype=torch.int32, device="cuda")
    out = torch.empty(256, 256, **bf16)

    def multiply():
        how = dict(weight_is_nk=True, num_sms=132, config=grouped_hopper.LONG_STEPS)
        grouped_hopper.grouped_gemm_hopper(rows, weight, offsets, out, take_over=False, **how)

    def activate():
        swiglu.swiglu(gate_up, y, num_sms=132)

    return {
        "swiglu": activate,
        "swiglu, by Triton": as_triton(swiglu.swiglu_kernel, activate),
        "grouped GEMM": multiply,
        "grouped GEMM, by Triton": as_triton(grouped_hopper.grouped_gemm_hopper_kernel, multiply),
    }


def layer() -> Callable[[], object]:
    sizes = dict(hidden=256, expert_hidden=256, num_experts=8, topk=2, max_tokens=128)
    moe = MoELayer(**sizes, dtype=torch.bfloat16, device="cuda", comm_sms=8, max_rows=2048)
    x = torch.randn(128, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    gradient = torch.randn_like(x)

    def step():
        torch.autograd.backward([moe(x), moe.aux_loss], [gradient, None])

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--repeats", type=int, default=101)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark launches GPU kernels")
    calls = launches() | {"layer, forward and backward": layer()}
    rows = [{"call": n, "us": host_us(call, arguments.repeats)} for n, call in calls.items()]
    facts = environment(torch.cuda.get_device_properties(0).multi_processor_count)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"environment": facts, "results": rows}, file, indent=1)
    for row in rows:
        print(f"{row['call']:28} {row['us']:8.2f} us")


if __name__ == "__main__":
    main()
