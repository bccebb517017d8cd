"""Shared by the benchmarks: a process a GPU, timing in turn, facts of the run."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import dualpipe_ext

__all__ = [
    "Stamp",
    "describe_run",
    "in_another_order",
    "line_up",
    "local_device",
    "on_every_gpu",
    "on_every_rank",
    "print_progress",
    "slowest",
    "time_in_turn",
    "write_json",
]

Variant = TypeVar("Variant")
Launch = Callable[[], object]  # puts work on the current stream


def on_every_gpu(measure: Callable, args: argparse.Namespace) -> None:
    """Run ``measure(args, rank, world_size)`` in one process a GPU (``args.ranks``; None: all)."""
    if not torch.cuda.is_available():
        sys.exit(f"{sys.argv[0]} times GPUs, and torch sees none here")
    on_every_rank(measure, args)


def on_every_rank(measure: Callable, args: argparse.Namespace) -> None:
    """`on_every_gpu`; where there is no GPU, ``args.ranks`` gloo processes (None: 4)."""
    gpus = torch.cuda.device_count()
    world_size = args.ranks or gpus or 4
    if gpus and world_size > gpus:
        sys.exit(f"--ranks {world_size}: this machine has {gpus} GPUs")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    mp.spawn(_run_rank, (measure, args, world_size), nprocs=world_size)


def _run_rank(rank: int, measure: Callable, args: argparse.Namespace, world_size: int) -> None:
    device = None
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        device = local_device()
        _bind_to_cores(rank, world_size)
    else:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    dist.init_process_group(
        "gloo" if device is None else "nccl",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=120),
        device_id=device,
    )
    measure(args, rank, world_size)
    dist.barrier()
    dist.destroy_process_group()


def _bind_to_cores(rank: int, world_size: int) -> None:
    """An equal share of the cores for each rank, side by side: pairs that the host bounds took 12
    ms instead of 14.7."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // world_size
    if share:
        os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share])


def local_device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class Stamp:
    """A moment in the current stream, of a CUDA graph in each replay; on the CPU, on the host."""

    def __init__(self) -> None:
        self._event = None
        if torch.cuda.is_available():
            captured = torch.cuda.is_current_stream_capturing()
            self._event = torch.cuda.Event(enable_timing=True, external=captured)
            self._event.record()
        self._host = time.perf_counter()

    def until(self, end: Stamp) -> float:
        """µs from here to `end`; GPU work must be done."""
        if self._event is None:
            return (end._host - self._host) * 1e6
        return self._event.elapsed_time(end._event) * 1e3


def line_up(host_us: float) -> None:
    """Ranks begin what follows together; on a GPU the host gets about `host_us` ahead of it."""
    if torch.cuda.is_available():
        torch.cuda._sleep(int(host_us * 2000))  # cycles, at about 2 GHz
    dist.all_reduce(torch.zeros(1, device=local_device()))


def slowest(values: Sequence[float]) -> list[float]:
    """The largest of each value over the ranks."""
    found = torch.tensor(values, dtype=torch.float64, device=local_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def in_another_order(variants: Iterable[Variant], repeat: int) -> list[Variant]:
    """Another one each time, the same on all ranks.

    A GPU at its power limit sets its clock by what it drew some 100 ms before: a variant that
    always followed the same others would always get the clock that those earned.
    """
    order = list(variants)
    random.Random(repeat).shuffle(order)
    return order


def time_in_turn(
    variants: dict[str, Launch], repeats: int, warmup: int, calls: int = 1, host_us: float = 250
) -> dict[str, float]:
    """Median µs of one call of each variant on the slowest rank.

    The variants take turns; between the two stamps of a timing one is called `calls` times. The
    host runs ahead of the device by 750 µs, and `host_us` for each call.
    """
    times = {name: [] for name in variants}
    for repeat in range(warmup + repeats):
        for name in in_another_order(variants, repeat):
            line_up(750 + host_us * calls)
            begin = Stamp()
            for _ in range(calls):
                variants[name]()
            if repeat >= warmup:
                times[name].append((begin, Stamp()))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    medians = [
        statistics.median(begin.until(end) for begin, end in stamps) / calls
        for stamps in times.values()
    ]
    return dict(zip(variants, slowest(medians), strict=True))


def describe_run(script: str, args: argparse.Namespace, world_size: int, sizes: dict) -> dict:
    """Command, date, hardware, versions and sizes, for a result file."""
    found = {
        "command": " ".join(["python", script, *map(os.path.basename, args.arguments)]),
        "date": datetime.date.today().isoformat(),
        "gpu": f"{world_size} processes on the CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": None,
        "dualpipe_ext": dualpipe_ext.__version__,
        "sizes": sizes,
    }
    if torch.cuda.is_available():
        found["gpu"] = f"{world_size}x {torch.cuda.get_device_name()}"
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def write_json(path: str, result: dict) -> None:
    with open(path, "w") as file:
        json.dump(result, file, indent=1)


def print_progress(rank: int, text: str) -> None:
    if rank == 0:
        print(text, file=sys.stderr, flush=True)
