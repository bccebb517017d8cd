"""What the overlapped pair gains: a forward and a backward at once, against one after the other.

One process a GPU, all of them one expert group; a stage of `--layers` transformer blocks runs the
forward of one micro-batch with the backward of another. For every shape, form and ``comm_sms``:

    pair      as an `OverlappedPair`: communication on comm_sms SMs, experts' GEMMs on the others
    in order  forward, then backward, on one stream; communication on comm_sms SMs, GEMMs on all
    compute   in order without the transfers, whose results are replayed; unique rows are
              expanded and summed
    comm      the transfers alone, on comm_sms SMs
    bound     the longer of compute and comm
    gain      (fastest in order over all forms and comm_sms) / pair - 1
    hidden    by time: 1 - (pair - compute) / comm. By trace: the share of the communication
              kernels' time beside computation, which `dualpipe-ext trace` explains

Variants take turns; medians of CUDA events; the slowest rank counts. Without a GPU it runs on gloo
(try ``--shapes tiny``), and its figures mean nothing. Example::

    python bench/pair.py --json out.json
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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from layer import SHAPES as LAYER_SHAPES
from ranks import (
    describe_run,
    line_up,
    local_device,
    on_every_rank,
    print_progress,
    slowest,
    time_in_turn,
    write_json,
)

from dualpipe_ext import Exchange, MoELayer
from dualpipe_ext.attention import GroupedQueryAttention
from dualpipe_ext.block import TransformerBlock
from dualpipe_ext.exchange import CHANNELS
from dualpipe_ext.overlap import OverlappedPair
from dualpipe_ext.recording import record_trace
from dualpipe_ext.stage import WEIGHT_DELAYS, StageChunk, TransformerStage
from dualpipe_ext.trace import COMM_KERNELS, Overlap, Trace, measure_overlap, read_trace

# name: tokens a rank, hidden, expert width, experts, topk
SHAPES = LAYER_SHAPES | {"tiny": (64, 64, 32, 16, 2)}
SEQUENCE = 4096
FORMS = ("expert", "unique")
MORE_SMS = 32  # for the run in order, which needs no SM for anything else while it communicates
HOST_US = 8000  # a call without waits keeps the host busy for about as long
TIMEOUT = 60.0  # seconds until a rank that fails ends the others
START = time.monotonic()


class Replay:
    """In place of a layer's exchange: what it brought the first time, again and again.

    Expanding unique rows and summing them is computation, and done.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._kept: dict[tuple, object] = {}

    def __getattr__(self, name: str):
        found = getattr(self._exchange, name)
        if name not in ("plan", "dispatch", "combine", "dispatch_unique", "combine_unique"):
            return found
        return functools.partial(self._replay, name, found)

    def _replay(self, name: str, call: Callable, *args, **options):
        key = (name, options.get("channel"))
        if key not in self._kept:
            self._kept[key] = call(*args, **options)
        return self._kept[key]


@dataclass
class Form:
    """An exchange, what it sends when it runs alone, and micro-batches whose backward is next.

    `before` went through the exchange, `replayed` through `replays`, a stand-in a layer.
    """

    exchange: Exchange
    plan: object
    rows: torch.Tensor
    row_weight: torch.Tensor
    topk_weight: torch.Tensor
    before: StageChunk
    replays: list[Replay]
    replayed: StageChunk


class Workload:
    """One stage, its exchanges in both forms, inputs and gradients; the methods launch one call.

    Every call runs a forward and a backward, and keeps its forward for the backward of the next.
    """

    def __init__(self, shape: str, args: argparse.Namespace, rank: int) -> None:
        tokens, hidden, width, experts, topk = SHAPES[shape]
        self.device, self.layers = local_device(), args.layers
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.total_sms = 0
        if self.device.type == "cuda":
            self.total_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.keep_all_sms = args.mlp_sms != "rest"
        like = {"dtype": self.dtype, "device": self.device}
        exchanges = {}
        for form in args.forms:  # opening is collective: one order on all ranks
            exchanges[form] = Exchange(
                dist.group.WORLD,
                **dict(hidden=hidden, num_experts=experts, topk=topk, max_tokens=tokens),
                **dict(form=form, timeout=TIMEOUT, **like),
            )
        torch.manual_seed(0)  # routers must start alike on all ranks
        heads = max(4, hidden // 128)
        blocks = []
        for _ in range(args.layers):
            moe = MoELayer(
                **dict(hidden=hidden, expert_hidden=width, num_experts=experts, topk=topk),
                **dict(group=dist.group.WORLD, exchange=exchanges[args.forms[0]]),
                **dict(init_std=hidden**-0.5, **like),
            )
            attention = GroupedQueryAttention(hidden, heads=heads, kv_heads=heads // 4, **like)
            blocks.append(TransformerBlock(hidden, attention, moe, **like))
        self.stage = TransformerStage(blocks)
        generator = torch.Generator(self.device).manual_seed(rank + 1)
        self._random = functools.partial(torch.randn, generator=generator, **like)
        sequence = min(SEQUENCE, tokens)
        self.inputs = [self._random(tokens // sequence, sequence, hidden) for _ in range(2)]
        self.gradient = self._random(tokens // sequence, sequence, hidden)
        how = {"take_over": args.mlp_sms == "take-over"}
        self.pairs = {d: OverlappedPair(self.device, weight_delay=d, **how) for d in WEIGHT_DELAYS}
        self._count = 0
        self.forms = {form: self._open(exchange) for form, exchange in exchanges.items()}

    @property
    def backend(self) -> str:
        return next(iter(self.forms.values())).exchange.backend

    def mlp_sms(self, comm_sms: int) -> int | None:
        """SMs of the experts' GEMMs in a pair; None: all."""
        return None if self.keep_all_sms or not self.total_sms else self.total_sms - comm_sms

    def pair(self, form: str, comm_sms: int, weight_delay: str) -> None:
        used = self._use(form, comm_sms, self.mlp_sms(comm_sms))
        pair = self.pairs[weight_delay]
        pair.comm_sms, pair.num_sms = comm_sms, self.mlp_sms(comm_sms)
        chunk = self._start()
        pair.run(chunk, used.before, (self.gradient,))
        used.before = chunk

    def in_order(self, form: str, comm_sms: int) -> None:
        used = self._use(form, comm_sms, None)
        used.before = self._forward_then_backward(used.before)

    def compute(self, form: str) -> None:
        used = self._use(form, self.forms[form].exchange.comm_sms, None)
        self._put(used.replays)
        used.replayed = self._forward_then_backward(used.replayed)

    @torch.no_grad()
    def comm(self, form: str, comm_sms: int) -> None:
        """As often as in a pair, in its order; the plan is another one's, for no wait."""
        used = self._use(form, comm_sms, None)
        exchange, plan, weight = used.exchange, used.plan, used.topk_weight
        x, dy = (tensor.flatten(0, 1) for tensor in (self.inputs[0], self.gradient))
        for _ in range(self.layers):
            if form == "unique":  # its rows are expanded and summed on the compute lane
                exchange.dispatch_unique(dy, plan, channel="backward").release()
                exchange.plan(plan.topk_idx)
                exchange.dispatch_unique(x, plan, topk_weight=weight).release()
                exchange.combine_unique(plan, channel="backward")
                exchange.combine_unique(plan)
                continue
            exchange.dispatch(dy, plan, channel="backward")
            exchange.plan(plan.topk_idx)
            exchange.dispatch(x, plan, topk_weight=weight)
            exchange.combine(used.rows, plan, row_weight=used.row_weight, channel="backward")
            exchange.combine(used.rows, plan)

    def check(self) -> None:
        """Raise what a kernel reported, and if the arithmetic has left the finite numbers."""
        for form in self.forms.values():
            form.exchange.check()
        for name, parameter in self.stage.named_parameters():
            if not bool(parameter.grad.isfinite().all()):
                raise ArithmeticError(f"the gradient of {name} is not finite: times mean nothing")

    def close(self) -> None:
        for form in self.forms.values():
            form.exchange.close()

    def _use(self, form: str, comm_sms: int, num_sms: int | None) -> Form:
        used = self.forms[form]
        used.exchange.comm_sms = comm_sms
        if self.total_sms:
            used.exchange.num_sms = num_sms or self.total_sms
        self._put([used.exchange] * self.layers)
        return used

    def _put(self, exchanges: list) -> None:
        """Give each layer its exchange."""
        for block, exchange in zip(self.stage.blocks, exchanges, strict=True):
            block.feed_forward.exchange = exchange

    def _start(self) -> StageChunk:
        self._count += 1
        return self.stage.start_chunk(self.inputs[self._count % len(self.inputs)])

    def _forward_then_backward(self, before: StageChunk) -> StageChunk:
        chunk = self._start()
        chunk.forward()
        before.backward_input((self.gradient,))
        before.backward_weight()
        return chunk

    def _open(self, exchange: Exchange) -> Form:
        """First micro-batches: one through the exchange, and one whose ways are kept, replayed."""
        self._put([exchange] * self.layers)
        before = self._start()
        before.forward()
        replays = [Replay(exchange) for _ in range(self.layers)]
        self._put(replays)
        kept, replayed = self._start(), self._start()
        kept.forward()
        kept.backward_input((self.gradient,))
        kept.backward_weight()
        replayed.forward()
        with torch.no_grad():
            plan = exchange.plan(replays[0].plan().topk_idx)
            weight = self._random(plan.num_tokens, exchange.topk).float().softmax(-1)
            x = self.inputs[0].flatten(0, 1)
            rows, row_weight = exchange.dispatch(x, plan, topk_weight=weight)
            for channel in CHANNELS:  # fills what "unique" sends home
                exchange.combine(rows, plan, channel=channel)
        return Form(exchange, plan, rows, row_weight, weight, before, replays, replayed)


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
    work = Workload(shape, args, rank)
    delay, *other_delays = args.weight_delay
    pairs = {
        ("pair", form, sms, delay): functools.partial(work.pair, form, sms, delay)
        for form, sms in splits_of(args)
    }
    in_order = {
        ("in order", *split): functools.partial(work.in_order, *split)
        for split in splits_of(args, (MORE_SMS,))
    }
    comm = {("comm", *split): functools.partial(work.comm, *split) for split in splits_of(args)}
    compute = {("compute", form): functools.partial(work.compute, form) for form in args.forms}
    variants = pairs | in_order | compute | comm
    once = time_in_turn(variants, 1, 1, host_us=HOST_US)  # compiles and warms up
    print_progress(rank, f"shape {shape}: ready, {work.backend}, {_elapsed():.0f} s")
    calls = min(4, math.ceil(25_000 / min(once[key] for key in in_order)))
    us = time_in_turn(variants, args.repeats, 1, calls, HOST_US)
    work.check()
    print_progress(rank, f"shape {shape}: timed, {_elapsed():.0f} s")

    plain = min(in_order, key=us.get)
    records = {key: _record(shape, key, us, us[plain], plain, work) for key in pairs}
    best = min(pairs, key=us.get)
    if other_delays:  # at the fastest split alone
        again = {key: variants[key] for key in (plain, best)}
        for other in other_delays:
            key = (*best[:3], other)
            again[key] = functools.partial(work.pair, *key[1:])
        more = us | time_in_turn(again, args.repeats, 1, calls, HOST_US)
        for key in list(again)[2:]:
            records[key] = _record(shape, key, more, more[plain], plain, work)
    if args.trace:
        names = [key for key in records if key in pairs or key[:3] == best[:3]]
        launches = {key: functools.partial(work.pair, *key[1:]) for key in names}
        for key, found in hidden_by_trace(launches, args, shape, rank).items():
            records[key] |= found
        print_progress(rank, f"shape {shape}: traced, {_elapsed():.0f} s")
    work.close()
    return list(records.values())


def _record(shape: str, key: tuple, us: dict, plain_us: float, plain: tuple, work) -> dict:
    _, form, sms, delay = key
    pair, compute, comm = us[key], us["compute", form], us["comm", form, sms]
    bound = max(compute, comm)
    return {
        **{"shape": shape, "form": form, "comm_sms": sms, "mlp_sms": work.mlp_sms(sms)},
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
        "shape form   comm_sms delay      pair   in order    gain  compute     comm    bound "
        "pair/bound  hidden: time  trace"
    ]
    best = {}
    for r in records:
        best[r["shape"]] = min(best.get(r["shape"], math.inf), r["pair_us"])
    for r in records:
        traced = "-" if r["hidden_by_trace"] is None else f"{r['hidden_by_trace']:.1%}"
        mark = "*" if r["pair_us"] == best[r["shape"]] else " "
        lines.append(
            f"{r['shape']:<5} {r['form']:<7} {r['comm_sms']:>7} {r['weight_delay']:<7}"
            f"{r['pair_us']:>8.0f}{mark} {r['fastest_in_order_us']:>9.0f} {r['gain']:>7.1%} "
            f"{r['compute_us']:>8.0f} {r['comm_us']:>8.0f} {r['bound_us']:>8.0f} "
            f"{r['of_bound']:>10.3f} {r['hidden_by_time']:>13.1%} {traced:>6}"
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
    add("--mlp-sms", choices=["rest", "all", "take-over"], default="rest",
        help="SMs of GEMMs in a pair; take-over: all, tiles drawn from a counter")  # fmt: skip
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


if __name__ == "__main__":
    on_every_rank(measure, parse_arguments(sys.argv[1:]))
