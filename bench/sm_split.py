"""How many SMs should communicate? Times the MoE exchange and the grouped MLP over a sweep of them.

For every ``comm_sms``: dispatch, combine, the grouped MLP alone on all SMs, and all of it at once
(the exchange on comm_sms SMs, the MLP on the others), beside NCCL ``all_to_all_single`` and
``torch._grouped_mm``. One process a GPU; variants interleaved, medians of CUDA-event times, the
slowest rank counts. Example::

    python -m bench sm_split --json out.json --plot out.png
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from ranks import describe_run, on_every_gpu, print_progress, time_in_turn, write_json

import dualpipe_ext
from dualpipe_ext import Exchange, grouped_mlp

PEERS = {
    "nccl_unique_rows": "NCCL all_to_all_single, a row per rank",
    "nccl_row_per_expert": "NCCL all_to_all_single, a row per expert",
    "torch_grouped_mm": "torch._grouped_mm",
}


@dataclass(frozen=True)
class Setup:
    """One rank's tensors and sizes, shared by all variants."""

    exchange: Exchange
    plan: dualpipe_ext.Plan
    x: torch.Tensor
    rows: torch.Tensor
    row_weight: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    send_unique: list[int]  # rows for each rank, a token once a rank
    recv_unique: list[int]
    send_routes: list[int]  # rows for each rank, a token once an expert
    recv_routes: list[int]


def make_setup(args: argparse.Namespace, rank: int, world_size: int) -> Setup:
    generator = torch.Generator("cuda").manual_seed(rank)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    exchange = Exchange(
        dist.group.WORLD,
        hidden=args.hidden,
        num_experts=args.experts,
        topk=args.topk,
        max_tokens=args.tokens,
        backend="nvlink",
        form="expert",  # what comm_sms SMs can do by themselves
    )
    local = exchange.num_local_experts
    score = torch.rand(args.tokens, args.experts, device="cuda", generator=generator)
    topk_idx = score.topk(args.topk).indices.int()
    plan = exchange.plan(topk_idx)
    x = randn(args.tokens, args.hidden)
    weight = torch.rand(args.tokens, args.topk, device="cuda", generator=generator)
    rows, row_weight = exchange.dispatch(x, plan, topk_weight=weight)

    goes_to = torch.nn.functional.one_hot(topk_idx.long() // local, world_size).sum(1)
    sends = torch.stack([(goes_to > 0).sum(0), goes_to.sum(0)])
    receives = torch.empty_like(sends)
    for sent, received in zip(sends, receives, strict=True):
        dist.all_to_all_single(received, sent)
    return Setup(
        exchange,
        plan,
        x,
        rows,
        row_weight,
        w13=randn(local, 2 * args.expert_hidden, args.hidden) / args.hidden**0.5,
        w2=randn(local, args.hidden, args.expert_hidden) / args.expert_hidden**0.5,
        send_unique=sends[0].tolist(),
        recv_unique=receives[0].tolist(),
        send_routes=sends[1].tolist(),
        recv_routes=receives[1].tolist(),
    )


def nccl_variant(setup: Setup, sent: list[int], received: list[int]):
    source = setup.rows.new_empty(sum(sent), setup.rows.shape[1]).normal_()
    target = setup.rows.new_empty(sum(received), setup.rows.shape[1])
    return lambda: dist.all_to_all_single(target, source, received, sent)


def torch_grouped_mm_variant(setup: Setup):
    """The two GEMMs with nothing between them: no activation, no routing weight."""
    ends = setup.plan.expert_offsets[1:]
    w13, w2 = setup.w13.transpose(1, 2), setup.w2.transpose(1, 2)
    act = setup.rows.new_empty(len(setup.rows), setup.w2.shape[2]).normal_()

    def run():
        torch._grouped_mm(setup.rows, w13, offs=ends)
        torch._grouped_mm(act, w2, offs=ends)

    return run


def our_variants(setup: Setup, comm_sms: int) -> dict:
    """name -> a function that launches it on the current stream."""
    exchange, plan = setup.exchange, setup.plan
    sms = torch.cuda.get_device_properties(exchange.device).multi_processor_count
    lane = torch.cuda.Stream()

    def mlp(num_sms: int):
        weights = (setup.w13, setup.w2, plan.expert_offsets)
        return grouped_mlp(setup.rows, setup.row_weight, *weights, num_sms=num_sms)

    def dispatch():
        exchange.comm_sms = comm_sms
        exchange.dispatch(setup.x, plan)

    def combine():
        exchange.comm_sms = comm_sms
        exchange.combine(setup.rows, plan)

    def both():
        here = torch.cuda.current_stream()
        lane.wait_stream(here)
        with torch.cuda.stream(lane):
            dispatch()
            combine()
        mlp(sms - comm_sms)
        here.wait_stream(lane)

    return {
        "dispatch": dispatch,
        "combine": combine,
        "mlp_fewer_sms": lambda: mlp(sms - comm_sms),
        "both": both,
        "mlp": lambda: mlp(sms),
    }


def gigabytes_per_second(rows: int, args: argparse.Namespace, microseconds: float) -> float:
    return rows * args.hidden * 2 / microseconds / 1e3


def sweep(args: argparse.Namespace, rank: int, world_size: int) -> list[dict]:
    """One record a value of comm_sms, then NCCL's and torch's; the same on every rank."""
    setup = make_setup(args, rank, world_size)
    logical_rows = sum(setup.recv_unique)
    wire_rows = logical_rows - setup.recv_unique[rank]
    flops = 6 * sum(setup.recv_routes) * args.hidden * args.expert_hidden
    peers = {
        "nccl_unique_rows": nccl_variant(setup, setup.send_unique, setup.recv_unique),
        "nccl_row_per_expert": nccl_variant(setup, setup.send_routes, setup.recv_routes),
        "torch_grouped_mm": torch_grouped_mm_variant(setup),
    }
    records, peer_times = [], {name: [] for name in peers}
    for comm_sms in args.comm_sms:
        ours = our_variants(setup, comm_sms)
        us = time_in_turn(ours | peers, args.repeats, args.warmup)
        for name in peers:
            peer_times[name].append(us.pop(name))
        communication = us["dispatch"] + us["combine"]
        records.append(
            {"comm_sms": comm_sms}
            | {f"{name}_us": round(value, 1) for name, value in us.items()}
            | {
                f"{name}_{kind}_gb_s": round(gigabytes_per_second(rows, args, us[name]), 1)
                for name in ("dispatch", "combine")
                for kind, rows in (("wire", wire_rows), ("logical", logical_rows))
            }
            | {
                "mlp_tflops": round(flops / us["mlp"] / 1e6, 1),
                "hidden_share": round(1 - (us["both"] - us["mlp"]) / communication, 3),
            }
        )
        print_progress(rank, f"comm_sms={comm_sms} done")
    for name, values in peer_times.items():
        us = statistics.median(values)
        record = {"peer": name, "us": round(us, 1)}
        if name == "torch_grouped_mm":
            record["tflops"] = round(flops / us / 1e6, 1)
        else:
            received = setup.recv_unique if name == "nccl_unique_rows" else setup.recv_routes
            wire = sum(received) - received[rank]
            record["wire_gb_s"] = round(gigabytes_per_second(wire, args, us), 1)
        records.append(record)
    setup.exchange.close()
    return records


def format_table(records: list[dict]) -> str:
    """One line a split, then the peers. GB/s are those that cross the link / all that arrive."""
    lines = [
        "SMs   dispatch          combine           MLP alone       on the rest   all at once",
        "      us  wire/logical  us  wire/logical  us      TFLOPS  us            us     hidden",
    ]
    for r in records:
        if "peer" in r:
            rate = f"{r['tflops']:.0f} TFLOPS" if "tflops" in r else f"{r['wire_gb_s']:.0f} GB/s"
            lines.append(f"{PEERS[r['peer']]}: {r['us']:.0f} us, {rate}")
            continue
        exchange = ""
        for name in ("dispatch", "combine"):
            wire, logical = r[f"{name}_wire_gb_s"], r[f"{name}_logical_gb_s"]
            exchange += f"{r[f'{name}_us']:6.0f} {wire:5.0f}/{logical:<4.0f} "
        lines.append(
            f"{r['comm_sms']:3d} {exchange} {r['mlp_us']:6.0f}  {r['mlp_tflops']:6.0f} "
            f"{r['mlp_fewer_sms_us']:8.0f} {r['both_us']:13.0f} {r['hidden_share']:8.0%}"
        )
    return "\n".join(lines)


def plot(records: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours = [r for r in records if "comm_sms" in r]
    sms = [r["comm_sms"] for r in ours]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for key, label, style in (
        ("dispatch_us", "dispatch", "o-"),
        ("combine_us", "combine", "s-"),
        ("mlp_us", "grouped MLP alone", "--"),
        ("both_us", "all at once", "d-"),
    ):
        axes.plot(sms, [r[key] for r in ours], style, label=label)
    for r in records:
        if r.get("peer", "").startswith("nccl"):
            axes.axhline(r["us"], color="grey", linestyle=":", linewidth=1)
            label = PEERS[r["peer"]]
            axes.annotate(label, (sms[0], r["us"]), va="bottom", fontsize=8)
    axes.set(xlabel="SMs that communicate", ylabel="µs", yscale="log", xticks=sms)
    axes.set_title("MoE exchange and grouped MLP by SM split")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def measure(args: argparse.Namespace, rank: int, world_size: int) -> None:
    records = sweep(args, rank, world_size)
    if rank == 0:
        keys = ("tokens", "hidden", "experts", "topk", "expert_hidden", "repeats")
        sizes = {key: getattr(args, key) for key in keys}
        if args.json:
            about = describe_run("bench/sm_split.py", args, world_size, sizes)
            write_json(args.json, about | {"records": records})
        if args.plot:
            plot(records, args.plot)
        print(format_table(records))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--comm-sms", default="2,4,6,8,12,16,20,24,32", help="SM counts to try (%(default)s)")
    add("--ranks", type=int, default=None, help="GPUs to use (all)")
    add("--tokens", type=int, default=4096, help="tokens of each rank (%(default)s)")
    add("--hidden", type=int, default=7168, help="model width (%(default)s)")
    add("--experts", type=int, default=64, help="experts over all ranks (%(default)s)")
    add("--topk", type=int, default=8, help="experts of a token (%(default)s)")
    add("--expert-hidden", type=int, default=2048, help="width of an expert (%(default)s)")
    add("--repeats", type=int, default=20, help="timed launches of each variant (%(default)s)")
    add("--warmup", type=int, default=3, help="untimed ones before (%(default)s)")
    add("--json", metavar="FILE", help="write all figures, hardware and versions")
    add("--plot", metavar="FILE", help="draw the sweep (needs matplotlib)")
    args = parser.parse_args(arguments)
    args.comm_sms = [int(value) for value in args.comm_sms.split(",")]
    args.arguments = arguments
    return args


def main() -> None:
    on_every_gpu(measure, parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
