"""Pipeline schedules on GPUs beside their simulation: one model, several schedules, same runtime.

The ranks are laid out as pipelines × expert groups, for each number in ``--pipeline-ranks`` (on 4
GPUs: PP2×EP2 and PP4). Each schedule of `Pipeline` runs the same `--layers` transformer blocks over
the same micro-batches; steps of the schedules take turns. Every rank times the actions F, B, I, W
and F&B of its schedule, and the simulator puts these times, and that of a transfer, together again:

    step        ms of a step, forward and backward of all chunks, no optimizer: median, slowest rank
    simulated   the makespan of `simulate` with the actions' times in those steps
    off by      step / simulated - 1
    alone       the makespan with the times of actions one by one afterwards, with the whole expert
                group, between pauses: clocks differ
    busiest     simulated time in actions of the rank that has most: what a schedule without waits
                would take
    F&B/(F+B)   what a pair takes of its halves' time, one after the other; alone, as the actions'
                means behind it

Times in steps hold for transfers by copy engines, which an action waits for before it begins; in
others the action itself waits. Outside pairs communication has nothing beside it and takes
``--alone-sms``. Gradients stay in place; the sum over dualpipe's two copies is timed apart
(``copies``). Without a GPU it runs on gloo, and its figures mean nothing. Example::

    python -m bench pipeline --json out.json
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from pair_workload import MLP_SMS, MORE_SMS, sms_of_gemms
from ranks import (
    Stamp,
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
from dualpipe_ext.blocks.attention import GroupedQueryAttention
from dualpipe_ext.blocks.block import TransformerBlock
from dualpipe_ext.blocks.stage import WEIGHT_DELAYS, TransformerStage
from dualpipe_ext.pipeline.pipeline import Pipeline
from dualpipe_ext.pipeline.schedule import Action, Pair, Schedule, build_schedule
from dualpipe_ext.pipeline.simulate import simulate
from dualpipe_ext.pipeline.step import Step

KINDS = ("dualpipev", "dualpipe", "zbv", "1f1b")
OPERATIONS = ("F", "B", "I", "W", "FB")
TIMEOUT = 60.0  # seconds until a rank that fails ends the others
WARMUP = 2  # steps that do not count
START = time.monotonic()
Signature = tuple  # (op, stage, direction), or ("FB", and both halves' stage and direction)


def mean_square(y: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (y.float() - labels.float()).square().mean()


def signature_of(action: Action | Pair) -> Signature:
    """What actions of equal length have in common."""
    if isinstance(action, Pair):
        f, b = action.parts
        return ("FB", f.stage, f.direction, b.stage, b.direction)
    return (action.op, action.stage, action.direction)


@dataclass(frozen=True)
class MeasuredTimes:
    """In place of `simulate.Times`: µs by signature, a stage's own."""

    us: dict[Signature, float]
    p2p: float

    def of(self, action: Action | Pair) -> float:
        return self.us[signature_of(action)]

    def means(self) -> dict[str, float | None]:
        """Over the stages; None for an operation that the schedule does without."""
        found = {op: [us for key, us in self.us.items() if key[0] == op] for op in OPERATIONS}
        return {op: round(statistics.mean(us), 1) if us else None for op, us in found.items()}


class Layout:
    """The ranks as [pipeline rank, column], the stages of this one, and its micro-batches.

    A row is an expert group; the columns are pipelines with data of their own.
    """

    def __init__(self, pipeline_ranks: int, args: argparse.Namespace, rank: int, world_size: int):
        self.args, self.device = args, local_device()
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipeline_ranks, self.columns = pipeline_ranks, world_size // pipeline_ranks
        self.rank, self.column = divmod(rank, self.columns)
        rows = [[r * self.columns + c for c in range(self.columns)] for r in range(pipeline_ranks)]
        # Both collective over all ranks.
        pipelines = [list(ranks) for ranks in zip(*rows, strict=True)]
        self.pipeline_group, _ = dist.new_subgroups_by_enumeration(pipelines)
        expert_group, _ = dist.new_subgroups_by_enumeration(rows)
        like = {"dtype": self.dtype, "device": self.device}
        self.exchange = Exchange(
            expert_group if self.columns > 1 else None,
            **dict(hidden=args.hidden, num_experts=args.experts, topk=args.topk),
            **dict(max_tokens=args.tokens, form=args.form, timeout=TIMEOUT, **like),
            comm_sms=args.alone_sms,
        )
        self._stages: dict[tuple[int, int], TransformerStage] = {}
        generator = torch.Generator(self.device).manual_seed(self.column)
        sequence = min(args.sequence, args.tokens)
        shape = (args.chunks * args.tokens // sequence, sequence, args.hidden)
        self.inputs, self.labels = (torch.randn(shape, generator=generator, **like) for _ in "xy")
        self.gradient = torch.randn(shape, generator=generator, **like)[: len(self.chunk_input)]

    @property
    def name(self) -> str:
        return f"PP{self.pipeline_ranks}xEP{self.columns}"

    @property
    def chunk_input(self) -> torch.Tensor:
        return self.inputs[: len(self.inputs) // self.args.chunks]

    def stage(self, index: int, num_stages: int) -> TransformerStage:
        """The layers of a stage; schedules with equal stages share them."""
        if (index, num_stages) not in self._stages:
            first, end = (i * self.args.layers // num_stages for i in (index, index + 1))
            blocks = [self._block(layer) for layer in range(first, end)]
            self._stages[index, num_stages] = TransformerStage(blocks)
        return self._stages[index, num_stages]

    def open(self, kind: str) -> Pipeline:
        args = self.args
        schedule = build_schedule(kind, self.pipeline_ranks, args.chunks)
        return Pipeline(
            [self.stage(s, schedule.num_stages) for s in schedule.stages_of(self.rank)],
            schedule=kind,
            group=self.pipeline_group if self.pipeline_ranks > 1 else None,
            timeout=TIMEOUT,
            weight_delay=args.weight_delay,
            comm_sms=args.comm_sms,
            num_sms=sms_of_gemms(args.mlp_sms, args.comm_sms),
        )

    def step(self, pipeline: Pipeline, schedule: Schedule, losses: dict[str, torch.Tensor]) -> None:
        """One step; leaves this rank's sum of losses in `losses`."""
        half = len(self.inputs) // schedule.num_directions
        passed, options = (), {"num_chunks": schedule.num_chunks, "sync_gradients": False}
        for direction in range(schedule.num_directions):
            mine = slice(direction * half, (direction + 1) * half)
            if schedule.rank_of(0, direction) == self.rank:
                passed = (self.inputs[mine],)
            if schedule.rank_of(schedule.num_stages - 1, direction) == self.rank:
                options |= {"criterion": mean_square, "labels": (self.labels[mine],)}
        found = pipeline.step(*passed, **options).losses
        losses[schedule.kind] = (
            torch.zeros((), device=self.device) if found is None else found.sum()
        )

    def close(self) -> None:
        self.exchange.close()

    def _block(self, layer: int) -> TransformerBlock:
        args, like = self.args, {"dtype": self.dtype, "device": self.device}
        torch.manual_seed(layer)  # one model, however it is cut
        moe = MoELayer(
            **dict(hidden=args.hidden, expert_hidden=args.expert_hidden, topk=args.topk),
            **dict(num_experts=args.experts, group=self.exchange.group, exchange=self.exchange),
            **dict(init_std=args.hidden**-0.5, **like),
        )
        heads = max(4, args.hidden // 128)
        attention = GroupedQueryAttention(args.hidden, heads=heads, kv_heads=heads // 4, **like)
        return TransformerBlock(args.hidden, attention, moe, **like)


class StepTimer:
    """Steps of one rank that time their actions."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self._steps: list[list[tuple[Signature, Stamp, Stamp]]] = []

    def __call__(self) -> None:
        run, stamps = Step._run, []

        def timed(step: Step, parts: tuple[Action, ...]) -> None:
            begin = Stamp()
            run(step, parts)
            action = parts[0] if len(parts) == 1 else Pair(*parts)
            stamps.append((signature_of(action), begin, Stamp()))

        with mock.patch.object(Step, "_run", timed):
            self._step()
        self._steps.append(stamps)

    def medians(self) -> dict[Signature, float]:
        found: dict[Signature, list[float]] = {}
        for stamps in self._steps[WARMUP:]:
            for signature, begin, end in stamps:
                found.setdefault(signature, []).append(begin.until(end))
        return {signature: statistics.median(us) for signature, us in found.items()}


class ActionTimer:
    """Times the actions of one rank's schedule, each on chunks made for it."""

    def __init__(self, layout: Layout, pipeline: Pipeline, schedule: Schedule) -> None:
        self.layout, self.pipeline, self.schedule = layout, pipeline, schedule
        mine = schedule.actions[layout.rank]
        self.stamps: dict[Signature, list] = {signature_of(action): [] for action in mine}

    def run(self) -> None:
        """Each signature once; equal on all ranks of an expert group."""
        for signature in self.stamps:
            op, *places = signature
            if op == "FB":
                self._run_pair(signature, *places)
            elif op != "W":  # which comes with its I
                self._run_single(signature, *signature)

    def medians(self) -> dict[Signature, float]:
        """µs of all but the first run."""
        return {
            signature: statistics.median(begin.until(end) for begin, end in stamps[1:])
            for signature, stamps in self.stamps.items()
        }

    def _run_single(self, signature: Signature, op: str, stage: int, direction: int) -> None:
        chunk = self._start(stage, direction)
        if op == "F":
            self._time(signature, chunk.forward)
            return
        chunk.forward()
        gradients = self._gradients(stage)
        if op == "B":
            self._time(signature, lambda: _run_whole(chunk, gradients))
            return
        delay = self.pipeline.weight_delay
        self._time(signature, lambda: chunk.backward_input(gradients, weight_delay=delay))
        self._time(("W", stage, direction), chunk.backward_weight)

    def _run_pair(self, signature: Signature, stage, direction, other, other_direction) -> None:
        backward = self._start(other, other_direction)
        backward.forward()
        forward = self._start(stage, direction)
        gradients = self._gradients(other)
        self._time(signature, lambda: self.pipeline.pair.run(forward, backward, gradients))

    def _time(self, signature: Signature, launch: Callable) -> None:
        begin = Stamp()
        launch()
        self.stamps[signature].append((begin, Stamp()))

    def _start(self, stage: int, direction: int):
        here = self.schedule.stages_of(self.layout.rank).index(stage)
        if self.schedule.num_directions == 2:
            here = direction
        ends = stage == self.schedule.num_stages - 1
        labels = self.layout.labels[: len(self.layout.chunk_input)]
        return self.pipeline.modules[here].start_chunk(
            self.layout.chunk_input,
            criterion=mean_square if ends else None,
            labels=(labels,) if ends else (),
        )

    def _gradients(self, stage: int) -> tuple[torch.Tensor, ...]:
        return () if stage == self.schedule.num_stages - 1 else (self.layout.gradient,)


def _run_whole(chunk, gradients) -> None:
    chunk.backward_input(gradients)
    chunk.backward_weight()


def transfer_us(layout: Layout, pipeline: Pipeline, repeats: int = 10) -> float:
    """Median time of an activation from an even pipeline rank to the next, slowest pair.

    Through the links of `pipeline`, from a tensor of one rank to a tensor of the other.
    """
    neighbour = layout.rank + 1 - 2 * (layout.rank % 2)
    x, times, links = torch.empty_like(layout.chunk_input), [], pipeline.links.current
    for repeat in range(repeats + 2):
        line_up(100)
        begin = Stamp()
        if neighbour < layout.pipeline_ranks:
            if layout.rank % 2:
                links.receive([(tuple(x.shape), x.dtype)], neighbour).wait()
            else:
                links.send([x], neighbour).wait()
        if repeat >= 2:
            times.append((begin, Stamp()))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    pipeline.check()
    return slowest([statistics.median(begin.until(end) for begin, end in times)])[0]


def time_actions_alone(layout: Layout, pipelines: dict, repeats: int) -> dict[str, dict]:
    """µs by schedule and signature."""
    timers = {kind: ActionTimer(layout, *found) for kind, found in pipelines.items()}
    for _ in range(repeats + 1):
        for timer in timers.values():
            line_up(1000)
            timer.run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return gather_times(timers)


def gather_times(timers: dict[str, StepTimer] | dict[str, ActionTimer]) -> dict[str, dict]:
    """The medians of all ranks; the slowest column counts."""
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, {kind: timer.medians() for kind, timer in timers.items()})
    found = {kind: {} for kind in timers}
    for theirs in everybody:
        for kind, times in theirs.items():
            for signature, us in times.items():
                found[kind][signature] = max(us, found[kind].get(signature, 0.0))
    return found


def time_copies(layout: Layout, pipelines: dict) -> float | None:
    """ms that dualpipe takes to sum the gradients of its two copies."""
    if "dualpipe" not in pipelines:
        return None
    pipeline, _ = pipelines["dualpipe"]
    return time_in_turn({"copies": pipeline.sum_copies}, 3, 1)["copies"] / 1e3


def describe_kind(
    layout: Layout, schedule: Schedule, step_us: float, times: MeasuredTimes, alone: MeasuredTimes
) -> dict:
    simulation, apart = simulate(schedule, times), simulate(schedule, alone)
    busiest = float(simulation.makespan - min(simulation.bubble))
    means = alone.means()
    # Of the backwards that a schedule has: whole, or in two parts.
    backward = means["B"] or (means["I"] or 0) + (means["W"] or 0)
    pair = None if means["FB"] is None else means["FB"] / (means["F"] + backward)
    found = {"layout": layout.name, "schedule": schedule.kind, "step_ms": round(step_us / 1e3, 3)}
    for name, made in (("simulated", simulation), ("alone", apart)):
        found[f"{name}_ms"] = round(float(made.makespan) / 1e3, 3)
        found[f"off_by_{name}"] = round(step_us / float(made.makespan) - 1, 4)
    return found | {
        "busiest_ms": round(busiest / 1e3, 3),
        "pair_of_halves": None if pair is None else round(pair, 4),
        "mean_us": times.means(),
        "mean_alone_us": means,
        "transfer_us": round(times.p2p, 1),
        "action_us": {" ".join(map(str, key)): round(us, 1) for key, us in times.us.items()},
    }


def measure_layout(layout: Layout, args: argparse.Namespace, rank: int) -> list[dict]:
    kinds = [k for k in args.kinds if not (k == "dualpipe" and layout.pipeline_ranks % 2)]
    pipelines, losses = {}, {}
    for kind in kinds:  # opening is collective: one order on all ranks
        schedule = build_schedule(kind, layout.pipeline_ranks, args.chunks)
        pipelines[kind] = (layout.open(kind), schedule)
    steps = {
        kind: StepTimer(functools.partial(layout.step, *found, losses))
        for kind, found in pipelines.items()
    }
    for kind, step in steps.items():
        step()  # compiles, and learns the shapes
        print_progress(rank, f"{layout.name} {kind}: first step, {_elapsed():.0f} s")
    step_us = time_in_turn(steps, args.repeats, WARMUP - 1)
    total = torch.stack([losses[kind] for kind in kinds])
    dist.all_reduce(total)
    layout.exchange.check()
    print_progress(rank, f"{layout.name}: steps timed, {_elapsed():.0f} s")
    actions, alone = gather_times(steps), time_actions_alone(layout, pipelines, args.repeats)
    pipeline = next(pipeline for pipeline, _ in pipelines.values())
    p2p = transfer_us(layout, pipeline)
    how = f"{pipeline.links.current.name} ({pipeline.links.reason})"
    print_progress(rank, f"{layout.name}: transfers by {how}, an activation in {p2p:.1f} us")
    records = []
    for (kind, (_, schedule)), loss in zip(pipelines.items(), total.tolist(), strict=True):
        times = (MeasuredTimes(found[kind], p2p) for found in (actions, alone))
        records.append(
            describe_kind(layout, schedule, step_us[kind], *times)
            | {
                "transfers": how,
                "backend": layout.exchange.backend,
                "loss": loss / args.chunks / layout.columns,
            }
        )
    copies = time_copies(layout, pipelines)
    for record in records:
        if record["schedule"] == "dualpipe":
            record["copies_ms"] = round(copies, 3)
    print_progress(rank, f"{layout.name}: actions timed, {_elapsed():.0f} s")
    for pipeline, _ in pipelines.values():
        pipeline.close()
    return records


def _elapsed() -> float:
    return time.monotonic() - START


def format_table(records: list[dict]) -> str:
    """A line a schedule; the losses must agree, because it is one model."""
    lines = [
        "layout   schedule    step ms  simulated  off by    alone  off by  busiest  F&B/(F+B)"
        "       F       B       I       W     F&B us    loss"
    ]
    for r in records:
        pair = "-" if r["pair_of_halves"] is None else f"{r['pair_of_halves']:.3f}"
        means = "".join(
            f"{'-' if us is None else round(us):>8}" for us in r["mean_alone_us"].values()
        )
        lines.append(
            f"{r['layout']:<8} {r['schedule']:<9} {r['step_ms']:>9.2f} {r['simulated_ms']:>10.2f} "
            f"{r['off_by_simulated']:>+7.1%} {r['alone_ms']:>8.2f} {r['off_by_alone']:>+7.1%} "
            f"{r['busiest_ms']:>8.2f} {pair:>10}{means}   {r['loss']:>8.5f}"
        )
        if "copies_ms" in r:
            lines.append(
                f"{'':<8} sum over dualpipe's copies, not in the step: {r['copies_ms']} ms"
            )
    return "\n".join(lines)


def measure(args: argparse.Namespace, rank: int, world_size: int) -> None:
    names = ("hidden", "expert_hidden", "experts", "topk", "tokens", "sequence", "layers")
    sizes = {name: getattr(args, name) for name in (*names, "chunks", "repeats")}
    names = ("comm_sms", "alone_sms", "mlp_sms", "form", "weight_delay")
    sizes |= {name: getattr(args, name) for name in names}
    result = describe_run("bench/pipeline.py", args, world_size, sizes) | {"results": []}
    for pipeline_ranks in args.pipeline_ranks:
        if world_size % pipeline_ranks or args.layers % (2 * pipeline_ranks):
            print_progress(rank, f"{pipeline_ranks} pipeline ranks left out: they do not divide")
            continue
        if slowest([_elapsed()])[0] > args.limit:
            print_progress(rank, f"PP{pipeline_ranks} left out: --limit {args.limit:g} s are over")
            continue
        layout = Layout(pipeline_ranks, args, rank, world_size)
        result["results"] += measure_layout(layout, args, rank)
        layout.close()
        if rank == 0 and args.json:
            write_json(args.json, result)
        del layout
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
    add("--pipeline-ranks", type=int, nargs="+", default=[2, 4], help="layouts to time")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--chunks", type=int, default=16, help="micro-batches of a step (%(default)s)")
    add("--layers", type=int, default=8, help="blocks of the model (%(default)s)")
    add("--tokens", type=int, default=4096, help="of a micro-batch (%(default)s)")
    add("--sequence", type=int, default=4096, help="tokens of a sequence (%(default)s)")
    add("--hidden", type=int, default=4096, help="model width (%(default)s)")
    add("--expert-hidden", type=int, default=1536, help="width of an expert (%(default)s)")
    add("--experts", type=int, default=64, help="experts of a layer (%(default)s)")
    add("--topk", type=int, default=8, help="experts of a token (%(default)s)")
    add("--form", choices=["expert", "unique"], default="expert", help="of the exchange")
    add("--comm-sms", type=int, default=16, help="SMs that communicate in pairs (%(default)s)")
    add("--alone-sms", type=int, default=MORE_SMS, help="and outside pairs (%(default)s)")
    add("--mlp-sms", choices=MLP_SMS, default="take-over",
        help="SMs of GEMMs in a pair: all, tiles drawn from a counter; rest: equal shares on those "
        "that do not communicate (%(default)s)")  # fmt: skip
    add("--weight-delay", choices=WEIGHT_DELAYS, default="all", help="(%(default)s)")
    add("--repeats", type=int, default=5, help="timed steps of each schedule (%(default)s)")
    add("--ranks", type=int, help="GPUs to use (all)")
    add("--limit", type=float, default=60, help="seconds after which no layout begins")
    add("--json", metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args(arguments)
    if args.tokens % min(args.sequence, args.tokens):
        parser.error(f"--tokens {args.tokens} is no multiple of --sequence {args.sequence}")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} leaves nothing to time: use 1 or more")
    args.arguments = arguments
    return args


def main() -> None:
    on_every_rank(measure, parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
