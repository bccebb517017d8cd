"""What the overlapped pair gains: a forward and a backward at once, against one after the other.

One process a GPU, all of them one expert group; a stage of `--layers` transformer blocks runs the
forward of one micro-batch with the backward of another. For every shape, form and ``comm_sms``:

    pair      as an `OverlappedPair`: communication on comm_sms SMs, and GEMMs as --mlp-sms says
    in order  forward, then backward, on one stream; communication on comm_sms SMs, GEMMs on all
    compute   in order without the transfers, whose results are replayed; unique rows are
              expanded and summed
    comm      the transfers alone, on comm_sms SMs
    bound     the longer of compute and comm
    gain      (fastest in order over all forms and comm_sms) / pair - 1
    hidden    by time: 1 - (pair - compute) / comm. By trace: the share of the communication
              kernels' time beside computation, which `dualpipe-ext trace` explains

With ``--graphs`` a step of several micro-batches is a CUDA graph, stamped inside: times are those
of one after another, without the host's, which bounds small shapes.

Variants take turns; medians of CUDA events; the slowest rank counts. Without a GPU it runs on gloo
(try ``--shapes tiny``), and its figures mean nothing. Example::

    python -m bench pair --json out.json
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from layer import SHAPES as LAYER_SHAPES
from pair_workload import (
    FORMS,
    HOST_US,
    MLP_SMS,
    MORE_SMS,
    SEQUENCE,
    SHAPES,
    GraphWorkload,
    Workload,
)
from ranks import (
    describe_run,
    line_up,
    on_every_rank,
    print_progress,
    slowest,
    write_json,
)

from dualpipe_ext.blocks.stage import WEIGHT_DELAYS
from dualpipe_ext.trace.recording import record_trace
from dualpipe_ext.trace.report import COMM_KERNELS, Overlap, Trace, measure_overlap, read_trace

START = time.monotonic()
MUCH_IDLE = 0.05  # of a pair, in its trace


def cut_at_markers(trace: Trace) -> list[Trace]:
    """What ran between the all-reduces of `line_up`: after the first to the second, and so on."""
    marks = sorted(
        (event for event in trace.events if re.search("(?i)nccl.*all_?reduce", event.name)),
        key=lambda event: event.start,
    )
    return [
        replace(
            trace,
            events=tuple(e for e in trace.events if e.start >= a.end and e.end <= b.start),
        )
        for a, b in zip(marks[::2], marks[1::2], strict=False)
    ]


def trace_pairs(variants: dict[tuple, Callable], path: Path) -> list[Overlap | None]:
    """One pair of each variant under the profiler, all in one trace; None where it says nothing."""
    with record_trace(path):
        for launch in variants.values():
            launch()
            line_up(HOST_US)
            launch()
            line_up(0)
    try:
        parts = cut_at_markers(read_trace(path))
    except (OSError, ValueError):  # no GPU in it
        parts = []
    if len(parts) != len(variants) or not all(part.events for part in parts):
        return [None] * len(variants)
    # Copies to peers are shown as copies inside the GPU.
    comm = [COMM_KERNELS if key[2] else f"{COMM_KERNELS}|Memcpy DtoD" for key in variants]
    return [measure_overlap(*both).total for both in zip(parts, comm, strict=True)]


def hidden_by_trace(
    variants: dict[tuple, Callable], args: argparse.Namespace, shape: str, rank: int
) -> dict[tuple, dict]:
    """Of each variant that the traces of all ranks show: the rank that hides least."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.traces or folder) / f"pair-{shape}-rank{rank}.json.gz"
        found = trace_pairs(variants, path)
    exposed, busy, idle, missing = [], [], [], []
    for overlap in found:
        shown = overlap is not None and overlap.comm_busy > 0
        missing.append(float(not shown))
        exposed.append(1 - overlap.hidden_share if shown else 0.0)
        busy.append(overlap.comm_busy if shown else 0.0)
        idle.append(overlap.idle if shown else 0.0)
    exposed, busy, idle, missing = map(slowest, (exposed, busy, idle, missing))
    return {
        key: {
            "hidden_by_trace": round(1 - exposed[i], 4),
            "comm_busy_us": round(busy[i], 1),
            "idle_us": round(idle[i], 1),
        }
        for i, key in enumerate(variants)
        if not missing[i]
    }


def splits_of(args: argparse.Namespace, more: tuple[int, ...] = ()) -> list[tuple[str, int]]:
    """(form, comm_sms); copy engines, 0, send unique rows only."""
    sms = dict.fromkeys([*args.comm_sms, *more])
    return [(form, n) for form in args.forms for n in sms if n or form == "unique"]


def measure_shape(shape: str, args: argparse.Namespace, rank: int) -> list[dict]:
    work = (GraphWorkload if args.graphs else Workload)(shape, args, rank)
    print_progress(rank, f"shape {shape}: ready, {work.backend}, {_elapsed():.0f} s")
    delay, *other_delays = args.weight_delay
    pairs = [("pair", *split, how, delay) for split in splits_of(args) for how in args.mlp_sms]
    in_order = [("in order", *split) for split in splits_of(args, (MORE_SMS,))]
    comm = [("comm", *split) for split in splits_of(args)]
    compute = [("compute", form) for form in args.forms]
    us = work.time([*pairs, *in_order, *compute, *comm], args.repeats)
    work.check()
    print_progress(rank, f"shape {shape}: timed, {_elapsed():.0f} s")

    plain = min(in_order, key=us.get)
    records = {key: _record(shape, key, us, us[plain], plain, work) for key in pairs}
    best = min(pairs, key=us.get)
    if other_delays:  # at the fastest split alone
        others = [(*best[:-1], other) for other in other_delays]
        more = us | work.time([plain, best, *others], args.repeats)
        for key in others:
            records[key] = _record(shape, key, more, more[plain], plain, work)
    if args.trace:
        launches = {key: functools.partial(work.launch, key) for key in records}
        for key, found in hidden_by_trace(launches, args, shape, rank).items():
            records[key] |= found
        print_progress(rank, f"shape {shape}: traced, {_elapsed():.0f} s")
    work.close()
    return list(records.values())


def _record(shape: str, key: tuple, us: dict, plain_us: float, plain: tuple, work) -> dict:
    _, form, sms, mlp_sms, delay = key
    pair, compute, comm = us[key], us["compute", form], us["comm", form, sms]
    bound = max(compute, comm)
    return {
        **{"shape": shape, "form": form, "comm_sms": sms, "mlp_sms": mlp_sms},
        **{"weight_delay": delay, "backend": work.backend, "pair_us": round(pair, 1)},
        "in_order_us": round(us["in order", form, sms], 1),
        "fastest_in_order_us": round(plain_us, 1),
        "fastest_in_order": {"form": plain[1], "comm_sms": plain[2]},
        **{"compute_us": round(compute, 1), "comm_us": round(comm, 1)},
        "bound_us": round(bound, 1),
        "of_bound": round(pair / bound, 4),
        "gain": round(plain_us / pair - 1, 4),
        "hidden_by_time": round(1 - (pair - compute) / comm, 4),
        "hidden_by_trace": None,
    }


def _elapsed() -> float:
    return time.monotonic() - START


def format_table(records: list[dict]) -> str:
    """Fastest split of each shape marked; times in µs."""
    lines = [
        "shape form   comm_sms mlp_sms   delay      pair   in order    gain  compute     comm"
        "    bound pair/bound  hidden: time  trace"
    ]
    best = {}
    for r in records:
        best[r["shape"]] = min(best.get(r["shape"], math.inf), r["pair_us"])
    for r in records:
        traced = "-" if r["hidden_by_trace"] is None else f"{r['hidden_by_trace']:.1%}"
        mark = "*" if r["pair_us"] == best[r["shape"]] else " "
        lines.append(
            f"{r['shape']:<5} {r['form']:<7} {r['comm_sms']:>7} {r['mlp_sms']:<9} "
            f"{r['weight_delay']:<7}"
            f"{r['pair_us']:>8.0f}{mark} {r['fastest_in_order_us']:>9.0f} {r['gain']:>7.1%} "
            f"{r['compute_us']:>8.0f} {r['comm_us']:>8.0f} {r['bound_us']:>8.0f} "
            f"{r['of_bound']:>10.3f} {r['hidden_by_time']:>13.1%} {traced:>6}"
        )
    for shape in best:
        idle = max(r.get("idle_us", 0) / r["pair_us"] for r in records if r["shape"] == shape)
        if idle > MUCH_IDLE:
            lines.append(
                f"{shape}: GPUs are idle for up to {idle:.0%} of a pair, most likely waiting for "
                "the host: max_rows and a CUDA graph of a step leave it nothing to do (--graphs)"
            )
    return "\n".join(lines)


def measure(args: argparse.Namespace, rank: int, world_size: int) -> None:
    sizes = {"shapes": {s: SHAPES[s] for s in args.shapes}, "layers": args.layers}
    sizes |= {"sequence": SEQUENCE, "repeats": args.repeats}
    result = describe_run("bench/pair.py", args, world_size, sizes) | {"results": []}
    for shape in args.shapes:
        if slowest([_elapsed()])[0] > args.limit:
            print_progress(rank, f"shape {shape} left out: --limit {args.limit:g} s are over")
            continue
        result["results"] += measure_shape(shape, args, rank)
        if rank == 0 and args.json:
            write_json(args.json, result)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if rank == 0:
        print(format_table(result["results"]))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(LAYER_SHAPES))
    add("--comm-sms", type=int, nargs="+", default=[0, 8, 16, 24], help="0: copy engines")
    add("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    add("--weight-delay", nargs="+", choices=WEIGHT_DELAYS, default=["all", "experts", "off"],
        help="the first with every split, the others with the fastest (%(default)s)")  # fmt: skip
    add("--mlp-sms", nargs="+", choices=MLP_SMS, default=["take-over"],
        help="SMs of GEMMs in a pair: all, tiles drawn from a counter; rest: equal shares on those "
        "that do not communicate (%(default)s)")  # fmt: skip
    add("--graphs", action="store_true",
        help="time CUDA graphs, without the host; the trace is of plain calls")  # fmt: skip
    add("--layers", type=int, default=2, help="blocks of the stage (%(default)s)")
    add("--repeats", type=int, default=5, help="timings of each variant (%(default)s)")
    add("--ranks", type=int, help="GPUs to use (all)")
    add("--no-trace", dest="trace", action="store_false", help="no hidden share by trace")
    add("--traces", metavar="DIR", help="keep the traces, a file a shape and rank")
    add("--limit", type=float, default=75, help="seconds after which no shape begins (%(default)s)")
    add("--json", metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args(arguments)
    if not splits_of(args):
        parser.error("--comm-sms 0 needs --forms unique")
    args.arguments = arguments
    return args


def main() -> None:
    on_every_rank(measure, parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
