"""Shared by the benchmarks of the exchange: a process a GPU, timing in turn, facts of the run."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import socket
import statistics
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import dualpipe_ext

__all__ = ["describe_run", "on_every_gpu", "print_progress", "time_in_turn", "write_json"]

Launch = Callable[[], object]  # puts work on the current stream


def on_every_gpu(measure: Callable, args: argparse.Namespace) -> None:
    """Run ``measure(args, rank, world_size)`` in one process a GPU (``args.ranks``; None: all)."""
    if not torch.cuda.is_available():
        sys.exit(f"{sys.argv[0]} times GPUs, and torch sees none here")
    world_size = args.ranks or torch.cuda.device_count()
    if world_size > torch.cuda.device_count():
        sys.exit(f"--ranks {world_size}: this machine has {torch.cuda.device_count()} GPUs")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    mp.spawn(_run_rank, (measure, args, world_size), nprocs=world_size)


def _run_rank(rank: int, measure: Callable, args: argparse.Namespace, world_size: int) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=120),
        device_id=torch.device("cuda", rank),
    )
    measure(args, rank, world_size)
    dist.barrier()
    dist.destroy_process_group()


def time_in_turn(
    variants: dict[str, Launch], repeats: int, warmup: int, calls: int = 1
) -> dict[str, float]:
    """Median µs of one call of each variant on the slowest rank.

    The variants take turns; between the two events of a timing one is called `calls` times.
    """
    line_up = torch.zeros(1, device="cuda")
    times = {name: [] for name in variants}
    for repeat in range(warmup + repeats):
        for name, launch in variants.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The host runs ahead of the device: about 0.75 ms, and 0.25 ms for each call.
            torch.cuda._sleep(1_500_000 + 500_000 * calls)
            dist.all_reduce(line_up)
            begin.record()
            for _ in range(calls):
                launch()
            end.record()
            if repeat >= warmup:
                times[name].append((begin, end))
        torch.cuda.synchronize()
    medians = [
        statistics.median(b.elapsed_time(e) for b, e in events) * 1e3 / calls
        for events in times.values()
    ]
    slowest = torch.tensor(medians, device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return dict(zip(variants, slowest.tolist(), strict=True))


def describe_run(script: str, args: argparse.Namespace, world_size: int, sizes: dict) -> dict:
    """Command, date, hardware, versions and sizes, for a result file."""
    return {
        "command": " ".join(["python", script, *map(os.path.basename, args.arguments)]),
        "date": datetime.date.today().isoformat(),
        "gpu": f"{world_size}x {torch.cuda.get_device_name()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "dualpipe_ext": dualpipe_ext.__version__,
        "sizes": sizes,
    }


def write_json(path: str, result: dict) -> None:
    with open(path, "w") as file:
        json.dump(result, file, indent=1)


def print_progress(rank: int, text: str) -> None:
    if rank == 0:
        print(text, file=sys.stderr, flush=True)
