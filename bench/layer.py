"""Which form of the exchange for which layer: MoELayer forward + backward, alone and overlapped.

One process a GPU. For every shape, form and ``comm_sms``: the time of a step (forward and backward
of one micro-batch, GEMMs on all SMs), and of two micro-batches on two streams that overlap as they
can (GEMMs on the SMs that communication leaves), a micro-batch. Example::

    python bench/layer.py --json out.json
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.distributed as dist
from ranks import describe_run, on_every_gpu, print_progress, time_in_turn, write_json

from dualpipe_ext import Exchange, MoELayer

# name: tokens a rank, hidden, expert width, experts, topk
SHAPES = {
    "A": (8192, 2048, 768, 128, 8),
    "B": (8192, 4096, 1536, 128, 8),
    "C": (4096, 7168, 2048, 64, 8),
}


def layer_of(shape: str, exchange: Exchange) -> MoELayer:
    _, hidden, width, experts, topk = SHAPES[shape]
    torch.manual_seed(0)
    layer = MoELayer(
        hidden=hidden,
        expert_hidden=width,
        num_experts=experts,
        topk=topk,
        group=exchange.group,
        exchange=exchange,
        dtype=torch.bfloat16,
        device="cuda",
    )
    for weight in (layer.w13, layer.w2):
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    return layer


def step(layer: MoELayer, x: torch.Tensor) -> None:
    y = layer(x)
    torch.autograd.backward([y, layer.aux_loss], [torch.ones_like(y), None])


def overlapped(layers: list[MoELayer], inputs, streams) -> None:
    """Two micro-batches, each on a stream and an exchange of its own."""
    here = torch.cuda.current_stream()
    for layer, x, stream in zip(layers, inputs, streams, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            step(layer, x)
    for stream in streams:
        here.wait_stream(stream)


def measure_form(shape: str, form: str, args: argparse.Namespace, rank: int) -> list[dict]:
    tokens, hidden, _, experts, topk = SHAPES[shape]
    sizes = dict(hidden=hidden, num_experts=experts, topk=topk, max_tokens=tokens)
    total = torch.cuda.get_device_properties(rank).multi_processor_count
    streams = [torch.cuda.Stream() for _ in range(2)]
    exchanges = [Exchange(dist.group.WORLD, form=form, **sizes) for _ in streams]
    layers = [layer_of(shape, exchange) for exchange in exchanges]
    inputs = [
        torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in streams
    ]

    def time(launch, comm_sms: int, num_sms: int) -> float:
        for layer, exchange in zip(layers, exchanges, strict=True):
            exchange.comm_sms = comm_sms
            layer.num_sms = exchange.num_sms = num_sms
        return time_in_turn({"step": launch}, args.repeats, 2)["step"]

    results = []
    for comm_sms in args.sms:
        if comm_sms == 0 and form == "expert":
            continue
        alone = time(lambda: step(layers[0], inputs[0]), comm_sms, total)
        both = time(lambda: overlapped(layers, inputs, streams), comm_sms, total - comm_sms)
        record = {"shape": shape, "form": form, "comm_sms": comm_sms}
        record |= {"alone_us": round(alone, 1), "overlapped_us": round(both / len(layers), 1)}
        print_progress(rank, str(record))
        results.append(record)
    for exchange in exchanges:
        exchange.close()
    return results


def measure(args: argparse.Namespace, rank: int, world_size: int) -> None:
    result = describe_run("bench/layer.py", args, world_size, {"shapes": SHAPES})
    result["results"] = []
    for shape in args.shapes:
        for form in ("expert", "unique"):
            result["results"] += measure_form(shape, form, args, rank)
        if rank == 0 and args.json:
            write_json(args.json, result)
    if rank == 0:
        print("shape  form    comm_sms  alone us  overlapped us a micro-batch")
        for r in result["results"]:
            print(
                f"{r['shape']:<6} {r['form']:<7} {r['comm_sms']:>8} {r['alone_us']:>9.0f} "
                f"{r['overlapped_us']:>14.0f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sms", type=int, nargs="+", default=[0, 8, 16, 24])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--ranks", type=int, help="GPUs to use (all)")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()
    args.arguments = sys.argv[1:]
    on_every_gpu(measure, args)


if __name__ == "__main__":
    main()
