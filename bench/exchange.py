"""How fast are dispatch and combine, and how many SMs do they take? Every form, beside the link.

For every ``comm_sms``: the raw TMA row push (the link's ceiling), the plan, dispatch and combine as
unique rows and in expert order, beside NCCL ``all_to_all_single`` and raw copies by copy engine.
One process a GPU; variants take turns, several calls a timing; medians; the slowest rank counts.
``comm_sms`` 0 means the copy engines. Example::

    python -m bench exchange --all --json out.json --plot out.png

"wire" GB/s count the bytes that cross a link, "logical" also rows that stay on their rank, each
(token, rank) once, means over the ranks.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from exchange_report import ROWS, format_report, plot
from ranks import describe_run, on_every_gpu, print_progress, time_in_turn, write_json

from dualpipe_ext import Exchange, grouped_mlp

CALLS = 4  # between two events: a launch costs the host 50 to 100 µs, and must not show
TIMEOUT = 20.0  # seconds until a rank that fails ends the others
EXPERT_HIDDEN = 2048  # of the MLP that runs beside the exchange
Launch = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """Sizes of one routing, uniform and random."""

    tokens: int
    hidden: int
    experts: int
    topk: int

    def open(self, form: str, **options) -> Exchange:
        return Exchange(
            dist.group.WORLD,
            hidden=self.hidden,
            num_experts=self.experts,
            topk=self.topk,
            max_tokens=self.tokens,
            backend="nvlink",
            form=form,
            timeout=TIMEOUT,
            **options,
        )


SMALL = Shape(tokens=8192, hidden=2048, experts=128, topk=8)
SMALL_SMS = 16


class Load:
    """One rank's tokens and routing, and how many rows that sends.

    Attributes: topk_idx, weight ([T, K]); wire_rows, logical_rows (see above);
    sent ([P][P], unique rows from rank to rank).
    """

    def __init__(self, shape: Shape, exchange: Exchange):
        device, self.rank, self.world_size = exchange.device, exchange.rank, exchange.world_size
        self.shape, self.row_bytes = shape, 2 * shape.hidden
        generator = torch.Generator(device).manual_seed(self.rank)
        score = torch.rand(shape.tokens, shape.experts, device=device, generator=generator)
        self.topk_idx = score.topk(shape.topk).indices.int()
        self.weight = torch.rand(shape.tokens, shape.topk, device=device, generator=generator)
        # Twice L2, so that no call finds its input there.
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        sets = math.ceil(2 * l2 / (shape.tokens * self.row_bytes))
        self.next_x = itertools.cycle(
            torch.randn(shape.tokens, shape.hidden, device=device, generator=generator).bfloat16()
            for _ in range(sets)
        ).__next__

        owner = self.topk_idx.long() // exchange.num_local_experts
        goes = torch.nn.functional.one_hot(owner, self.world_size).sum(1) > 0
        sent = [torch.empty(self.world_size, dtype=torch.int64, device=device) for _ in goes[0]]
        dist.all_gather(sent, goes.sum(0))
        self.sent = torch.stack(sent).tolist()
        self.logical_rows = sum(map(sum, self.sent)) / self.world_size
        own = sum(self.sent[p][p] for p in range(self.world_size))
        self.wire_rows = self.logical_rows - own / self.world_size

    @property
    def rows_per_peer(self) -> int:
        return round(self.wire_rows / (self.world_size - 1))

    def rates(self, name: str, us: float) -> dict[str, float]:
        """GB/s of a variant's rows; nothing for what moves none."""
        if name == "plan":
            return {}
        row_bytes, wire, logical = self.row_bytes, self.wire_rows, self.logical_rows
        if name.endswith("_fp8"):
            row_bytes = self.shape.hidden + 4 * math.ceil(self.shape.hidden / 128)
        if name == "ceiling":
            wire = logical = self.rows_per_peer * (self.world_size - 1)
        elif name.startswith("copies"):
            logical = wire
        gb_s = row_bytes / us / 1e3
        return {"wire_gb_s": round(wire * gb_s, 1), "logical_gb_s": round(logical * gb_s, 1)}

    def record(self, name: str, comm_sms: int | None, us: float) -> dict:
        return {"name": name, "comm_sms": comm_sms, "us": round(us, 1)} | self.rates(name, us)


def unique_variants(exchange: Exchange, load: Load) -> dict[str, Launch]:
    """What form "unique" can do, with as many SMs as the exchange is set to."""
    plan = exchange.plan(load.topk_idx)
    departure = exchange.leave(None, plan)
    departure.sums.normal_()
    rows = exchange.dispatch(load.next_x(), plan)
    next_x = load.next_x

    def dispatch(payload: str | None = None) -> None:
        exchange.send(next_x(), plan, payload=payload).release()

    return {
        "ceiling": lambda: exchange._backend.push_ceiling(next_x(), load.rows_per_peer),
        "dispatch_unique": dispatch,
        "dispatch_unique_fp8": lambda: dispatch("fp8"),
        "dispatch_expanded": lambda: exchange.dispatch(next_x(), plan),
        "combine_unique": lambda: exchange.fetch(departure, plan),
        "combine_summed": lambda: exchange.combine(rows, plan),
    }


def expert_variants(exchange: Exchange, load: Load) -> dict[str, Launch]:
    """What form "expert" can do, and the plan."""
    plan = exchange.plan(load.topk_idx)
    rows = exchange.dispatch(load.next_x(), plan)
    return {
        "plan": lambda: exchange.plan(load.topk_idx),
        "dispatch_expert": lambda: exchange.dispatch(load.next_x(), plan),
        "combine_expert": lambda: exchange.combine(rows, plan),
    }


def peer_variants(load: Load) -> dict[str, Launch]:
    """The same unique rows by NCCL, and by plain copies into the peers' memory."""
    sent = load.sent[load.rank]
    received = [row[load.rank] for row in load.sent]
    source = load.next_x().new_empty(sum(sent), load.shape.hidden).normal_()
    target = source.new_empty(sum(received), load.shape.hidden)
    nccl = {"nccl": lambda: dist.all_to_all_single(target, source, received, sent)}
    return nccl | copy_variants(load, source)


def copy_variants(load: Load, source: torch.Tensor) -> dict[str, Launch]:
    """Copy engines alone: no packing, no signals. Peers in turn, or all at once."""
    import torch.distributed._symmetric_memory as symmetric_memory

    rank, ranks, hidden = load.rank, load.world_size, load.shape.hidden
    most = max(map(max, load.sent))
    inbox = symmetric_memory.empty(ranks * most * hidden, dtype=source.dtype, device=source.device)
    handle = symmetric_memory.rendezvous(inbox, dist.group.WORLD)
    pairs = []
    for shift in range(1, ranks):
        peer = (rank + shift) % ranks
        shape = (load.sent[rank][peer], hidden)
        there = handle.get_buffer(peer, shape, source.dtype, rank * most * hidden)
        pairs.append((there, source[: shape[0]]))
    lanes = [torch.cuda.Stream() for _ in pairs]

    def in_turn() -> None:
        for there, here in pairs:
            there.copy_(here, non_blocking=True)

    def at_once() -> None:
        now = torch.cuda.current_stream()
        for lane, (there, here) in zip(lanes, pairs, strict=True):
            lane.wait_stream(now)
            with torch.cuda.stream(lane):
                there.copy_(here, non_blocking=True)
        for lane in lanes:
            now.wait_stream(lane)

    # Bound to the functions: the memory must live as long as they do.
    in_turn.handle = at_once.handle = handle, inbox
    return {"copies_in_turn": in_turn, "copies_at_once": at_once}


def runnable(variants: dict[str, Launch], rank: int, where: str) -> dict[str, Launch]:
    """The variants that every rank can run; says why the others are left out. Warms them up."""
    kept = {}
    for name, launch in variants.items():
        reason = None
        try:
            launch()
            torch.cuda.synchronize()
        except ValueError as error:  # such as fp8 rows of a width they do not take
            reason = f"{type(error).__name__}: {error}"
        reasons = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        if not any(reasons):
            kept[name] = launch
        elif all(reasons):
            print_progress(rank, f"{name} left out, {where}: {reasons[0]}")
        else:
            raise RuntimeError(f"{name}, {where}: some ranks failed, others did not: {reasons}")
    return kept


def measure_table(args: argparse.Namespace, rank: int) -> list[dict]:
    """Every row of ROWS for every comm_sms, then the peers."""
    shape = Shape(args.tokens, args.hidden, args.experts, args.topk)
    records, peer_times = [], {}
    with shape.open("expert") as expert, shape.open("unique") as unique:
        load = Load(shape, expert)
        in_order, by_rank = expert_variants(expert, load), unique_variants(unique, load)
        peers = runnable(peer_variants(load), rank, "peers")
        print_progress(rank, f"unique rows sent: {load.sent}")
        for sms in args.sms:
            unique.comm_sms = sms
            ours = dict(by_rank)
            if sms:
                expert.comm_sms = sms
                ours |= in_order
            else:
                del ours["ceiling"]
            ours = runnable(ours, rank, f"comm_sms={sms}")
            us = time_in_turn(ours | peers, args.repeats, args.warmup, CALLS)
            for name in peers:
                peer_times.setdefault(name, []).append(us.pop(name))
            records += [load.record(name, sms, us[name]) for name in ROWS if name in us]
            expert.check()
            unique.check()
            print_progress(rank, f"comm_sms={sms}: " + _in_words(us))
    for name, times in peer_times.items():
        records.append(load.record(name, None, statistics.median(times)))
    return records


def measure_small(args: argparse.Namespace, rank: int) -> list[dict]:
    """Short rows: dispatch of unique rows beside the ceiling for the same row size."""
    with SMALL.open("unique", comm_sms=SMALL_SMS) as exchange:
        load = Load(SMALL, exchange)
        variants = unique_variants(exchange, load)
        variants = {name: variants[name] for name in ("ceiling", "dispatch_unique")}
        us = time_in_turn(variants, args.repeats, args.warmup, CALLS)
        exchange.check()
    records = [load.record(name, SMALL_SMS, us[name]) for name in variants]
    share = records[1]["wire_gb_s"] / records[0]["wire_gb_s"]
    records[1]["of_ceiling"] = round(share, 3)
    print_progress(rank, f"small rows: {share:.1%} of the ceiling")
    return records


def measure_latency(args: argparse.Namespace, rank: int) -> list[dict]:
    """128 tokens a rank: dispatch and combine, the plan before them or not, as CUDA graphs."""
    shape = Shape(128, args.hidden, args.experts, args.topk)
    local = args.experts // dist.get_world_size()
    most = dist.get_world_size() * shape.tokens * min(shape.topk, local)
    records = []
    for form in ("expert", "unique"):
        with shape.open(form, max_rows=(most // 128 + local) * 128) as exchange:
            load = Load(shape, exchange)
            plan, x = exchange.plan(load.topk_idx), load.next_x()

            def both(exchange=exchange, plan=plan, x=x):
                exchange.combine(exchange.dispatch(x, plan), plan)

            def with_plan(exchange=exchange, load=load, x=x):
                plan = exchange.plan(load.topk_idx)
                exchange.combine(exchange.dispatch(x, plan), plan)

            for sms in filter(None, args.sms):
                exchange.comm_sms = sms
                variants, how = {}, {}
                for name, launch in {"both": both, "with_plan": with_plan}.items():
                    variants[name], how[name] = as_graph(launch, rank, f"{form}, {name}")
                us = time_in_turn(variants, args.repeats, args.warmup, 5 * CALLS)
                exchange.check()
                records += [
                    {"name": name, "form": form, "comm_sms": sms, "us": round(us[name], 1)}
                    | {"launched_as": how[name]}
                    for name in variants
                ]
                print_progress(rank, f"128 tokens, {form}, comm_sms={sms}: " + _in_words(us))
                variants.clear()  # graphs use the exchange's memory: they go first
                torch.cuda.synchronize()
    return records


def as_graph(launch: Launch, rank: int, what: str) -> tuple[Launch, str]:
    """`launch` as the replay of a graph; itself, where some rank cannot capture it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            launch()
    torch.cuda.synchronize()
    graph, reason = torch.cuda.CUDAGraph(), None
    try:
        # NCCL's watchdog queries events in its own thread, which the default mode forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            launch()
    except Exception as error:  # whatever it is, all ranks must go on alike
        reason = f"{type(error).__name__}: {error}"
    torch.cuda.synchronize()
    reasons = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    if any(reasons):
        print_progress(rank, f"not captured, {what}: {next(filter(None, reasons))}")
        return launch, "events"
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, "graph"


def measure_beside(args: argparse.Namespace, rank: int) -> list[dict]:
    """What communication costs a grouped MLP: on the other SMs, over its time alone on those
    ("slowdown") and on all ("of_all"); and on all SMs, drawing its tiles ("of_all_drawn")."""
    shape = Shape(args.tokens, args.hidden, args.experts, args.topk)
    records = []
    with shape.open("expert") as expert, shape.open("unique") as unique:
        load = Load(shape, expert)
        mlp = make_mlp(expert, load)
        total = torch.cuda.get_device_properties(expert.device).multi_processor_count
        in_order, by_rank = expert_variants(expert, load), unique_variants(unique, load)
        lane = torch.cuda.Stream()
        for sms in args.sms:
            unique.comm_sms = sms
            names = ["dispatch_unique", "combine_unique"]
            if sms:
                expert.comm_sms = sms
                names += ["dispatch_expert", "combine_expert"]
            on_the_rest, on_all = functools.partial(mlp, total - sms), functools.partial(mlp, total)
            drawn = functools.partial(mlp, total, take_over=True)
            communicate = {name: (in_order | by_rank)[name] for name in names}
            communicate = runnable(communicate, rank, f"comm_sms={sms}")
            mlps = {"mlp": on_the_rest, "mlp on all": on_all}
            alone = time_in_turn(mlps | communicate, 7, 2)
            for name, launch in communicate.items():
                count = 2 + math.ceil(1.4 * alone["mlp"] / alone[name])
                beside, covered = time_beside(on_the_rest, launch, count, lane)
                drawn_beside, _ = time_beside(drawn, launch, count, lane)
                records.append(
                    {"name": name, "comm_sms": sms, "mlp_sms": total - sms, "calls": count}
                    | {"mlp_us": round(alone["mlp"], 1), "mlp_beside_us": round(beside, 1)}
                    | {"slowdown": round(beside / alone["mlp"], 3), "covered": round(covered, 3)}
                    | {"mlp_on_all_us": round(alone["mlp on all"], 1)}
                    | {"of_all": round(beside / alone["mlp on all"], 3)}
                    | {"of_all_drawn": round(drawn_beside / alone["mlp on all"], 3)}
                )
            expert.check()
            unique.check()
            print_progress(rank, f"beside an MLP, comm_sms={sms}: done")
    return records


def make_mlp(exchange: Exchange, load: Load) -> Callable[..., torch.Tensor]:
    """mlp(num_sms, take_over): the forward of this rank's experts on the rows that it receives."""
    plan = exchange.plan(load.topk_idx)
    rows, row_weight = exchange.dispatch(load.next_x(), plan, topk_weight=load.weight)
    local, hidden, width = exchange.num_local_experts, load.shape.hidden, EXPERT_HIDDEN
    w13 = rows.new_empty(local, 2 * width, hidden).normal_(std=hidden**-0.5)
    w2 = rows.new_empty(local, hidden, width).normal_(std=width**-0.5)
    inputs = rows, row_weight, w13, w2, plan.expert_offsets
    return lambda num_sms, take_over=False: grouped_mlp(
        *inputs, num_sms=num_sms, take_over=take_over
    )


def time_beside(
    mlp: Launch, communicate: Launch, count: int, lane: torch.cuda.Stream
) -> tuple[float, float]:
    """Median µs of the MLP beside `count` calls on another stream, slowest rank.

    Also the share of its time, 1 at most, for which there was communication; the least of all.
    """
    line_up = torch.zeros(1, device="cuda")
    times, shares = [], []
    here = torch.cuda.current_stream()
    for repeat in range(7):
        begin, end, over = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda._sleep(4_000_000 + 400_000 * count)  # 2 ms and 0.2 ms a call for the host
        dist.all_reduce(line_up)
        lane.wait_stream(here)
        with torch.cuda.stream(lane):
            for _ in range(count):
                communicate()
            over.record()
        torch.cuda._sleep(60_000)  # 30 µs: communication takes its SMs first
        begin.record()
        mlp()
        end.record()
        here.wait_stream(lane)
        torch.cuda.synchronize()
        if repeat >= 2:
            times.append(begin.elapsed_time(end) * 1e3)
            shares.append(min(1.0, begin.elapsed_time(over) * 1e3 / times[-1]))
    worst = torch.tensor([statistics.median(times), -min(shares)], device="cuda")
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    slowest, share = worst.tolist()
    return slowest, -share


def _in_words(us: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in us.items()) + " us"


PARTS = {
    "table": measure_table,
    "latency": measure_latency,
    "small": measure_small,
    "beside": measure_beside,
}


@torch.no_grad()
def measure(args: argparse.Namespace, rank: int, world_size: int) -> None:
    shape = Shape(args.tokens, args.hidden, args.experts, args.topk)
    sizes = asdict(shape) | {"repeats": args.repeats, "calls_a_timing": CALLS}
    sizes |= {"expert_hidden_beside": EXPERT_HIDDEN, "small": asdict(SMALL)}
    result = describe_run("bench/exchange.py", args, world_size, sizes)
    for part in args.parts:
        result[part] = PARTS[part](args, rank)
        if rank == 0 and args.json:
            write_json(args.json, result)  # after each: a later part may fail
        torch.cuda.empty_cache()
    if rank == 0:
        if args.plot and result.get("table"):
            plot(result["table"], args.plot)
        print(format_report(result))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--sms", type=int, nargs="+", default=[0, 4, 8, 12, 16, 24, 32], help="counts to try")
    add("--ranks", type=int, default=None, help="GPUs to use, 2 or more (all)")
    add("--tokens", type=int, default=4096, help="tokens of each rank (%(default)s)")
    add("--hidden", type=int, default=7168, help="model width (%(default)s)")
    add("--experts", type=int, default=64, help="experts over all ranks (%(default)s)")
    add("--topk", type=int, default=8, help="experts of a token (%(default)s)")
    add("--repeats", type=int, default=15, help="timings of each variant (%(default)s)")
    add("--warmup", type=int, default=3, help="untimed ones before (%(default)s)")
    add("--latency", action="store_true", help="only: 128 tokens, replayed as a CUDA graph")
    add("--small", action="store_true", help="only: H 2048, top-8 of 128, 8192 tokens, 16 SMs")
    add("--beside", action="store_true", help="only: the slowdown of a grouped MLP beside it")
    add("--all", action="store_true", help="the table and all of these")
    add("--json", metavar="FILE", help="write all figures, hardware and versions")
    add("--plot", metavar="FILE", help="draw the table (needs matplotlib)")
    args = parser.parse_args(arguments)
    args.parts = [part for part in PARTS if args.all or getattr(args, part, False)] or ["table"]
    args.arguments = arguments
    return args


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if (args.ranks or torch.cuda.device_count()) == 1:
        sys.exit("bench/exchange.py times the links between GPUs: use 2 or more")
    on_every_gpu(measure, args)


if __name__ == "__main__":
    main()
