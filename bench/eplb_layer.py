"""What balancing brings a MoELayer: `python -m bench eplb --layer`, one process a GPU.

Every rank routes by a Zipf(1.0) law: the n-th most popular expert is drawn n times less often than
the first, a token's experts all different. Popular experts lie anywhere ("shuffled"), or next to
each other from rank 0 on ("clustered", the worst start). Variants of the layer, same weights:

    in order            where experts are before balancing
    N slots             after `layer.rebalance` by the layer's own statistics; N > E: with copies
    uniform             every expert gets exactly as many tokens as any other: the bound

Forward and backward are timed launch by launch, variants in turn, by CUDA events; medians, and of
these the slowest rank's. Without a GPU it runs on gloo, to see that it runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import dualpipe_ext
from dualpipe_ext import Exchange, ExpertPlacement, MoELayer, rebalance_experts
from dualpipe_ext.moe.router import Routes
from dualpipe_ext.ops.route_reference import count_tokens

TOLERANCE = 1e-2  # bf16 outputs of one layer under two placements; 4e-3 is rounding


class FixedRouter(torch.nn.Module):
    """Routes drawn once; only the weights have a gradient."""

    def __init__(self, topk_idx: torch.Tensor, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.register_buffer("topk_idx", topk_idx, persistent=False)
        weight = torch.full(topk_idx.shape, 1 / topk_idx.shape[1], device=topk_idx.device)
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> Routes:
        count = count_tokens(self.topk_idx, self.num_experts)
        return Routes(self.topk_idx, self.weight, self.weight.new_zeros(()), count)


def draw_zipf(args: argparse.Namespace, popularity: torch.Tensor, rank: int) -> torch.Tensor:
    """[T, K] int32: experts drawn without replacement with probability 1 / (1 + popularity)."""
    generator = torch.Generator().manual_seed(rank)
    uniform = torch.rand(args.tokens, args.experts, generator=generator, dtype=torch.float64)
    gumbel = -(-uniform.clamp(min=1e-12).log()).log()
    return (gumbel - (1.0 + popularity).log()).topk(args.topk).indices.int()


def draw_uniform(args: argparse.Namespace, rank: int) -> torch.Tensor:
    """[T, K] int32: every run of E tokens uses each expert K times; who sits together is random."""
    generator = torch.Generator().manual_seed(rank)
    rounds = -(-args.tokens * args.topk // args.experts)
    order = torch.rand(rounds, args.experts, generator=generator).argsort(-1)
    return order.flatten()[: args.tokens * args.topk].view(args.tokens, args.topk).int()


@dataclass
class Variant:
    """A layer and what was measured of it."""

    routing: str
    name: str
    layer: MoELayer
    record: dict = field(default_factory=dict)
    forward: list = field(default_factory=list)
    backward: list = field(default_factory=list)


class Bench:
    """One rank."""

    def __init__(self, args: argparse.Namespace, rank: int, device: torch.device) -> None:
        self.args, self.rank, self.device = args, rank, device
        self.group = dist.group.WORLD
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(100 + rank)
        x = torch.randn(2, args.tokens, args.hidden, generator=generator)
        self.x, self.dy = x.to(device, self.dtype)
        self.x.requires_grad_()
        self.exchanges = {
            slots: Exchange(
                self.group,
                hidden=args.hidden,
                num_experts=slots,
                topk=args.topk,
                max_tokens=args.tokens,
                dtype=self.dtype,
                comm_sms=args.comm_sms,
                device=device,
            )
            for slots in sorted({args.experts, *args.slots})
        }
        self.variants: list[Variant] = []

    def make_layer(self, topk_idx: torch.Tensor, num_slots: int) -> MoELayer:
        layer = MoELayer(
            hidden=self.args.hidden,
            expert_hidden=self.args.expert_hidden,
            num_experts=self.args.experts,
            topk=self.args.topk,
            num_slots=num_slots,
            group=self.group,
            exchange=self.exchanges[num_slots],
            router=FixedRouter(topk_idx.to(self.device), self.args.experts),
            init_std=self.args.hidden**-0.5,
            dtype=self.dtype,
            device=self.device,
        )
        layer.reset_parameters(seed=0)
        return layer

    def add(self, routing: str, name: str, layer: MoELayer, **record) -> None:
        slots = layer.choose_slots(layer.router.topk_idx)
        rows = count_tokens(slots // layer.num_local_slots, layer.world_size)
        dist.all_reduce(rows)
        balance = float(rows.sum() / rows.max()) / len(rows)
        record |= {"rows": rows.tolist(), "balance": round(balance, 4)}
        self.variants.append(Variant(routing, name, layer, record))

    def add_routing(self, routing: str, popularity: torch.Tensor) -> None:
        """The layer before balancing and after, with any number of slots; the same outputs."""
        args = self.args
        topk_idx = draw_zipf(args, popularity, self.rank)
        before = self.make_layer(topk_idx, args.experts)
        self.add(routing, "in order", before)
        expected = before(self.x).detach()
        for num_slots in args.slots:
            layer = self.make_layer(topk_idx, num_slots)
            optimizer = torch.optim.AdamW([layer.w13, layer.w2], lr=0.0, weight_decay=0.0)
            layer(self.x).backward(self.dy)
            optimizer.step()
            optimizer.zero_grad()
            record = self.rebalance(layer, optimizer)
            error = (layer(self.x).detach() - expected).norm() / expected.norm()
            dist.all_reduce(error, dist.ReduceOp.MAX)
            if not error < TOLERANCE:
                raise RuntimeError(
                    f"{routing}, {num_slots} slots: outputs are {float(error):.1e} from those "
                    f"before balancing, {TOLERANCE} is allowed: the layer is wrong"
                )
            self.add(routing, f"{num_slots} slots", layer, **record, error=float(error))

    def rebalance(self, layer: MoELayer, optimizer: torch.optim.Optimizer) -> dict:
        """Balances by the layer's own statistics; seconds and bytes of the move with Adam."""
        load = layer.expert_load()[None].cpu()
        slots, _, _ = rebalance_experts(load, layer.num_slots, 1, 1, layer.world_size, "improved")
        placement = ExpertPlacement(slots[0], layer.world_size)
        here = set(layer.placement.experts_on(self.rank))
        arriving = set(placement.experts_on(self.rank)) - here
        each = 3 * (layer.w13[0].nbytes + layer.w2[0].nbytes)  # weights and two moments
        numbers = torch.tensor([float(len(arriving) * each), 0.0], device=self.device)
        self.line_up()
        begin = time.perf_counter()
        layer.rebalance(placement, optimizer=optimizer)
        self.synchronize()
        numbers[1] = time.perf_counter() - begin
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        received, seconds = numbers.tolist()
        return {"move_ms": round(seconds * 1e3, 2), "most_bytes_received": int(received)}

    def measure(self) -> list[dict]:
        """One record a variant."""
        for repeat in range(self.args.warmup + self.args.repeats):
            for variant in self.variants:
                self.run(variant, keep=repeat >= self.args.warmup)
            self.synchronize()
        for variant in self.variants:
            variant.record |= self.summarize(variant)
        return [{"routing": v.routing, "variant": v.name} | v.record for v in self.variants]

    def run(self, variant: Variant, keep: bool) -> None:
        layer = variant.layer
        self.x.grad = None
        layer.zero_grad()
        self.line_up()
        marks = [self.mark()]
        y = layer(self.x)
        marks.append(self.mark())
        y.backward(self.dy)
        marks.append(self.mark())
        if keep:
            variant.forward.append(marks[:2])
            variant.backward.append(marks[1:])

    def summarize(self, variant: Variant) -> dict:
        args = self.args
        both = [(f[0], b[1]) for f, b in zip(variant.forward, variant.backward, strict=True)]
        times = [variant.forward, variant.backward, both]
        medians = [statistics.median(self.elapsed(*pair) for pair in pairs) for pairs in times]
        medians.append(self.time_sync(variant.layer))
        slowest = torch.tensor(medians, device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        forward, backward, both, sync = slowest.tolist()
        flops = 18 * args.tokens * args.topk * args.hidden * args.expert_hidden
        return {
            "forward_ms": round(forward, 3),
            "backward_ms": round(backward, 3),
            "both_ms": round(both, 3),
            "tflops_per_gpu": round(flops / both / 1e9, 1),
            "sync_replica_gradients_ms": round(sync, 3),
        }

    def time_sync(self, layer: MoELayer) -> float:
        """Milliseconds of one sync of the copies' gradients, which are there since the last run."""
        if not layer.placement.has_copies:
            return 0.0
        layer(self.x).backward(self.dy)
        layer.sync_replica_gradients()
        pairs = []
        for _ in range(self.args.repeats):
            self.line_up()
            begin = self.mark()
            layer.sync_replica_gradients()
            pairs.append((begin, self.mark()))
        self.synchronize()
        return statistics.median(self.elapsed(*pair) for pair in pairs)

    def line_up(self) -> None:
        """All ranks start together; the host runs a little ahead of the device."""
        if self.device.type == "cuda":
            torch.cuda._sleep(2_000_000)  # 1 ms
        dist.all_reduce(torch.zeros(1, device=self.device))

    def mark(self):
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, begin, end) -> float:
        """Milliseconds."""
        return (end - begin) * 1e3 if self.device.type == "cpu" else begin.elapsed_time(end)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        for exchange in self.exchanges.values():
            exchange.close()


def worker(rank: int, args: argparse.Namespace) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        rank=rank,
        world_size=args.ranks,
        device_id=device if cuda else None,
    )
    bench = Bench(args, rank, device)
    shuffle = torch.randperm(args.experts, generator=torch.Generator().manual_seed(0))
    for routing, popularity in (("shuffled", shuffle), ("clustered", torch.arange(args.experts))):
        bench.add_routing(routing, popularity)
    bench.add("uniform", "in order", bench.make_layer(draw_uniform(args, rank), args.experts))
    records = bench.measure()
    backend = bench.exchanges[args.experts].backend
    if rank == 0:
        environment = describe(args, backend)
        print(format_records(environment, records))
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"environment": environment, "layer": records}, file, indent=1)
    bench.close()
    dist.destroy_process_group()


def describe(args: argparse.Namespace, backend: str) -> dict:
    cuda = torch.cuda.is_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else None
    return {
        "command": " ".join(["python", "bench/eplb.py", *map(os.path.basename, args.arguments)]),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{args.ranks}x {torch.cuda.get_device_name() if cuda else 'CPU process'}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "dualpipe_ext": dualpipe_ext.__version__,
        "backend": backend,
        "sizes": {
            key: getattr(args, key)
            for key in ("tokens", "hidden", "expert_hidden", "experts", "topk", "comm_sms")
        },
    }


def format_records(environment: dict, records: list[dict]) -> str:
    bound = next(r["both_ms"] for r in records if r["routing"] == "uniform")
    sizes = ", ".join(f"{name} {value}" for name, value in environment["sizes"].items())
    lines = [
        f"{environment['hardware']}, torch {environment['torch']}, {environment['backend']} "
        f"backend, {environment['date']}; {sizes}",
        "balance: mean / most rows of a rank; sync: of copies' gradients, once a step; move: "
        "weights and Adam's moments",
        f"{'routing':10} {'experts':10} {'balance':>7} {'forward':>8} {'backward':>8} "
        f"{'both ms':>8} {'/ bound':>7} {'TFLOPS':>7} {'sync ms':>8} {'move ms':>8}",
    ]
    for r in records:
        lines.append(
            f"{r['routing']:10} {r['variant']:10} {r['balance']:7.3f} {r['forward_ms']:8.3f} "
            f"{r['backward_ms']:8.3f} {r['both_ms']:8.3f} {r['both_ms'] / bound:7.3f} "
            f"{r['tflops_per_gpu']:7.1f} {r['sync_replica_gradients_ms']:8.3f} "
            f"{r.get('move_ms', 0):8.1f}"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("with --layer").add_argument
    add("--ranks", type=int, help="processes, one a GPU (all GPUs, or 4)")
    add("--tokens", type=int, default=4096, help="tokens of each rank (%(default)s)")
    add("--hidden", type=int, default=4096, help="model width (%(default)s)")
    add("--expert-hidden", type=int, default=1536, help="width of an expert (%(default)s)")
    add("--experts", type=int, default=64, help="experts over all ranks (%(default)s)")
    add("--topk", type=int, default=8, help="experts of a token (%(default)s)")
    add("--slots", default="64,72,80", help="slots to balance for (%(default)s)")
    add("--comm-sms", type=int, default=16, help="SMs that communicate (%(default)s)")
    add("--warmup", type=int, default=3, help="untimed rounds before (%(default)s)")


def run(args: argparse.Namespace) -> None:
    args.arguments = sys.argv[1:]
    args.slots = [int(slots) for slots in args.slots.split(",")]
    args.ranks = args.ranks or torch.cuda.device_count() or 4
    args.repeats = args.rounds
    if args.experts % args.topk:
        sys.exit(
            f"--topk {args.topk} does not divide --experts {args.experts}: the uniform routing "
            "would give a token one expert twice"
        )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29534")
    mp.spawn(worker, (args,), nprocs=args.ranks)
