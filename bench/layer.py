"""Which form of the exchange for which layer: MoELayer forward + backward, alone and overlapped.

One process a GPU. For every shape, form and ``comm_sms``: the time of a step (forward and backward
of one micro-batch, GEMMs on all SMs), and of two micro-batches on two streams that overlap as they
can (GEMMs on the SMs that communication leaves), a micro-batch. Example::

    python -m bench layer --json out.json
"""

from __future__ import annotations

import argparse
import functools
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
    return MoELayer(
        hidden=hidden,
        expert_hidden=width,
        num_experts=experts,
        topk=topk,
        group=exchange.group,
        exchange=exchange,
        dtype=torch.bfloat16,
        device="cuda",
    )


def step(layer: MoELayer, x: torch.Tensor) -> None:
    layer.zero_grad()
    x.grad = None
    y = layer(x)
    torch.autograd.backward([y, layer.aux_loss], [torch.ones_like(y), None])


class MicroBatches:
    """Two micro-batches of one shape and form, each with a layer, an exchange and a stream."""

    def __init__(self, shape: str, form: str):
        tokens, hidden, _, experts, topk = SHAPES[shape]
        sizes = dict(hidden=hidden, num_experts=experts, topk=topk, max_tokens=tokens)
        self.streams = [torch.cuda.Stream() for _ in range(2)]
        self.exchanges = [Exchange(dist.group.WORLD, form=form, **sizes) for _ in self.streams]
        self.layers = [layer_of(shape, exchange) for exchange in self.exchanges]
        options = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
        self.inputs = [torch.randn(tokens, hidden, **options) for _ in self.streams]
        self.total_sms = torch.cuda.get_device_properties("cuda").multi_processor_count

    def alone(self, comm_sms: int) -> None:
        self._set(comm_sms, self.total_sms)
        step(self.layers[0], self.inputs[0])

    def overlapped(self, comm_sms: int) -> None:
        self._set(comm_sms, self.total_sms - comm_sms)
        here = torch.cuda.current_stream()
        for layer, x, stream in zip(self.layers, self.inputs, self.streams, strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                step(layer, x)
        for stream in self.streams:
            here.wait_stream(stream)

    def _set(self, comm_sms: int, num_sms: int) -> None:
        for layer, exchange in zip(self.layers, self.exchanges, strict=True):
            exchange.comm_sms = comm_sms
            layer.num_sms = num_sms

    def close(self) -> None:
        for exchange in self.exchanges:
            exchange.close()


def measure_shape(shape: str, args: argparse.Namespace, rank: int) -> list[dict]:
    forms = {form: MicroBatches(shape, form) for form in ("expert", "unique")}
    variants = {}
    for form, batches in forms.items():
        for sms in args.sms:
            if sms or form == "unique":
                variants[form, sms, "alone_us"] = functools.partial(batches.alone, sms)
                variants[form, sms, "overlapped_us"] = functools.partial(batches.overlapped, sms)
    times = time_in_turn(variants, args.repeats, 2)
    results = {}
    for (form, sms, name), us in times.items():
        record = {"shape": shape, "form": form, "comm_sms": sms}
        record = results.setdefault((form, sms), record)
        record[name] = round(us / (2 if name == "overlapped_us" else 1), 1)
    for batches in forms.values():
        batches.close()
    print_progress(rank, f"shape {shape} done")
    return list(results.values())


def measure(args: argparse.Namespace, rank: int, world_size: int) -> None:
    result = describe_run("bench/layer.py", args, world_size, {"shapes": SHAPES})
    result["results"] = []
    for shape in args.shapes:
        result["results"] += measure_shape(shape, args, rank)
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
