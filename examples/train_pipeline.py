"""Trains a small byte-level MoE transformer with DualPipeV on the sources of Python's library.

    python examples/train_pipeline.py [--steps N] [--pipeline-ranks R] ...

It starts one process per GPU, or four gloo processes where there is no GPU, as a grid [pipeline
rank, column]. A column is a pipeline, holds the whole model and reads batches of its own; a row is
an expert group: equal stages, and a share of each layer's experts on every rank, so tokens travel
to the experts. With one pipeline rank (fewer than four processes) expert parallelism is alone, and
its communication still hides in overlapped pairs. Read it from `train` on.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from train_moe import ProgressBar, count_cores, draw_batch, read_text, synchronized_clock
from train_moe import TimedExchange as TimedCalls

from dualpipe_ext import Exchange, MoELayer
from dualpipe_ext.blocks.attention import GroupedQueryAttention
from dualpipe_ext.blocks.block import TransformerBlock
from dualpipe_ext.blocks.stage import TransformerStage
from dualpipe_ext.gradients.delayed import DelayedLinear
from dualpipe_ext.pipeline.draw import draw_text
from dualpipe_ext.pipeline.pipeline import Pipeline
from dualpipe_ext.pipeline.schedule import build_schedule
from dualpipe_ext.pipeline.simulate import simulate
from dualpipe_ext.trace.recording import record_trace
from dualpipe_ext.trace.report import measure_overlap, read_trace

VOCABULARY = 256  # bytes


class Head(nn.Module):
    """The end of the model: x [batch, sequence, H] → logits [batch, sequence, 256]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.bytes = DelayedLinear(hidden, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bytes(self.norm(x))


def build_block(options: argparse.Namespace, exchange: Exchange) -> TransformerBlock:
    attention = GroupedQueryAttention(options.hidden, heads=options.heads)
    moe = MoELayer(
        hidden=options.hidden,
        expert_hidden=options.expert_hidden,
        num_experts=options.experts,
        topk=options.topk,
        group=exchange.group,
        exchange=exchange,  # one set of buffers serves all layers and micro-batches
        init_std=options.hidden**-0.5,
        device=exchange.device,
    )
    return TransformerBlock(options.hidden, attention, moe)


def build_stage(
    index: int, num_stages: int, options: argparse.Namespace, exchange: Exchange
) -> TransformerStage:
    """Stage `index` of the model, whose layers are dealt out as evenly as they divide."""
    torch.manual_seed(1000 * options.seed + index)  # equal on the ranks of an expert group
    first, end = (i * options.layers // num_stages for i in (index, index + 1))
    stage = TransformerStage(
        [build_block(options, exchange) for _ in range(first, end)],
        first=nn.Embedding(VOCABULARY, options.hidden) if index == 0 else None,
        last=Head(options.hidden) if index == num_stages - 1 else None,
        aux_loss_scale=1 / options.chunks,  # what keeps the experts evenly loaded
    )
    return stage.to(exchange.device)


class TimedExchange(TimedCalls):
    """Also the calls that a pair makes."""

    def send(self, x, plan, **options):
        return self._timed(super().send, x, plan, **options)

    def fetch(self, departure, plan, **options):
        return self._timed(super().fetch, departure, plan, **options)


def average_gradients(stages: list[TransformerStage], group: dist.ProcessGroup) -> None:
    """Gradients of the mean loss over all columns.

    The experts' gradients already are sums over the tokens of all ranks of their group, because the
    tokens came to them; all other parameters are replicated and need the all-reduce, one for all.
    """
    parameters = [p for stage in stages for p in stage.parameters()]
    replicated = [p.grad for p in parameters if not getattr(p, "expert_parallel", False)]
    flat = torch.cat([grad.flatten() for grad in replicated])
    dist.all_reduce(flat, group=group)
    for grad, total in zip(replicated, flat.split([g.numel() for g in replicated]), strict=True):
        grad.copy_(total.view_as(grad))
    for p in parameters:
        p.grad /= group.size()


def train(rank: int, options: argparse.Namespace, folder: str) -> None:
    """One process of the run."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, count_cores() // options.processes))
    make_deterministic()
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=options.processes,
    )
    columns = options.processes // options.pipeline_ranks
    grid = torch.arange(options.processes).view(options.pipeline_ranks, columns)
    pipeline_group, _ = dist.new_subgroups_by_enumeration(grid.T.tolist())
    expert_group, _ = dist.new_subgroups_by_enumeration(grid.tolist())
    exchange = TimedExchange(
        expert_group,
        hidden=options.hidden,
        num_experts=options.experts,
        topk=options.topk,
        max_tokens=options.batch // options.chunks * options.sequence,
        dtype=torch.bfloat16 if cuda else torch.float32,
        backend=options.backend,
        comm_sms=options.comm_sms,
        device=device,
    )
    schedule = build_schedule("dualpipev", options.pipeline_ranks, options.chunks)
    stages = [
        build_stage(stage, schedule.num_stages, options, exchange)
        for stage in schedule.stages_of(rank // columns)
    ]
    pipeline = Pipeline(stages, schedule="dualpipev", group=pipeline_group)
    trained = Training(rank, stages, pipeline, exchange, options)
    trained.print_setup(draw_text(simulate(schedule), width=100))
    trained.run()
    trained.print_results(trained.describe_hidden(f"{folder}/trace.{rank}.json"))
    pipeline.close()
    exchange.close()
    dist.destroy_process_group()


class Training:
    """The steps of one process, and what they showed."""

    def __init__(self, rank, stages, pipeline, exchange, options) -> None:
        self.rank, self.stages, self.pipeline = rank, stages, pipeline
        self.exchange, self.options, self.device = exchange, options, exchange.device
        self.text = read_text()
        column = exchange.rank  # reads batches of its own
        self.generator = torch.Generator().manual_seed(1000 * options.seed + column)
        self.losses = torch.zeros(options.steps, device=self.device)

    def run(self) -> None:
        """Trains; sets `losses`, `share` spent exchanging and `seconds` a step."""
        options = self.options
        parameters = [p for stage in self.stages for p in stage.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, 0.95))
        ramp = 1 + options.steps // 10
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / ramp, 2 * (1 - step / options.steps))
        )
        warmup = min(5, options.steps - 1)  # the first steps compile the kernels, not timed
        bar = ProgressBar(options.steps) if self.rank == 0 else None
        for step in range(options.steps):
            if step == warmup:
                start = synchronized_clock(self.device)
                self.exchange.reset_clock()
            losses = self.step()
            average_gradients(self.stages, self.exchange.group)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            if losses is not None:
                self.losses[step] = losses.sum()
            if bar and ((step + 1) % 5 == 0 or step + 1 == options.steps):
                recent = self.losses[max(0, step - 4) : step + 1].mean().item()
                bar.show(step + 1, f"loss {recent:.3f}")
        seconds = synchronized_clock(self.device) - start
        self.seconds = seconds / (options.steps - warmup)
        # Losses are on the pipelines' first ranks, zero elsewhere.
        shared = torch.cat([self.losses / self.exchange.world_size, self.losses.new_zeros(1)])
        shared[-1] = self.exchange.seconds() / seconds / options.processes
        dist.all_reduce(shared)
        *self.mean_losses, self.share = shared.tolist()

    def step(self) -> Tensor | None:
        """Gradients of one batch; the chunks' parts of its loss, on the pipelines' first ranks."""
        batch = draw_batch(self.text, self.options, self.generator).to(self.device)
        passed, given = (), {"num_chunks": self.options.chunks}
        if self.pipeline.rank == 0:  # in a V it holds both ends of the model
            passed = (batch[:, :-1],)
            given |= {"criterion": self.loss, "labels": [batch[:, 1:]]}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.pipeline.step(*passed, **given).losses

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """A chunk's part of the batch's mean."""
        found = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return found / self.options.chunks

    def describe_hidden(self, path: str) -> str:
        """How much of rank 0's exchange one more step hides."""
        if self.device.type == "cpu":
            return "nothing: a CPU overlaps nothing"
        with record_trace(path):
            self.step()
        try:
            trace = read_trace(path)
        except ValueError as error:
            return f"not measured: {error}"
        # Transfers between stages wait as long as the pipeline does.
        between = re.compile("(?i)nccl|wait_link|tell_link")
        events = tuple(event for event in trace.events if not between.search(event.name))
        share = measure_overlap(replace(trace, events=events)).total.hidden_share
        if share is None:
            return "not measured: the exchange ran no kernels of its own"
        return f"{100 * share:.1f} % of dispatch and combine, start and end of a step included"

    def print_setup(self, drawing: str) -> None:
        own = [p for stage in self.stages for p in stage.parameters()]
        sharded = sum(p.numel() for p in own if getattr(p, "expert_parallel", False))
        counts = torch.tensor([sum(p.numel() for p in own), sharded], device=self.device)
        dist.all_reduce(counts, group=self.pipeline.group)
        total, sharded = counts.tolist()
        total += sharded * (self.exchange.world_size - 1)
        if self.rank == 0:
            options, columns = self.options, self.exchange.world_size
            print(
                f"{options.processes} processes on {self.device.type}: {options.pipeline_ranks} "
                f"pipeline ranks x {columns} expert ranks\n"
                f"{options.layers} layers, {options.experts} experts of which a token uses "
                f"{options.topk}, {total / 1e6:.1f} M parameters\n"
                f"{self.exchange.backend} backend: {self.exchange.backend_reason}\n"
                f"DualPipeV, {options.chunks} micro-batches (F forward, B backward, I and W its "
                f"halves, F1B0 or & a pair):\n{drawing}",
                flush=True,
            )

    def print_results(self, hidden: str) -> None:
        if self.rank != 0:
            return
        options, tail = self.options, self.mean_losses[-10:]
        tokens = self.exchange.world_size * options.batch * options.sequence
        print(
            f"loss                    {self.mean_losses[0]:.4f} -> {sum(tail) / len(tail):.4f}"
            f" (first step -> mean of the last {len(tail)}, all ranks)\n"
            f"tokens/s                {tokens / self.seconds:,.0f} over all ranks\n"
            f"in dispatch and combine {100 * self.share:.1f} % of the time, waiting included\n"
            f"hidden                  {hidden}\n"
            f"backend                 {self.exchange.backend}\n"
            f"comm_sms                {self.exchange.comm_sms}",
            flush=True,
        )


def make_deterministic() -> None:
    """Two runs with one seed print the same losses: torch's kernels, too, must not use atomics."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # names what has no such kernel
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, changes nothing here


def parse_options() -> argparse.Namespace:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--processes", type=int, default=min(gpus, 8) or 4, help="one per GPU where there are any")
    add("--pipeline-ranks", type=int, help="default: 2 where this leaves 2 or more expert ranks")
    add("--chunks", type=int, help="micro-batches of a step; default: 3 a pipeline rank")
    add("--steps", type=int, default=200 if gpus else 100)
    add("--batch", type=int, default=24 if gpus else 12, help="sequences per pipeline and step")
    add("--sequence", type=int, default=1024 if gpus else 128, help="bytes in a sequence")
    add("--layers", type=int, default=8 if gpus else 4)
    add("--hidden", type=int, default=1024 if gpus else 128)
    add("--heads", type=int, default=8 if gpus else 4)
    add("--expert-hidden", type=int, default=1024 if gpus else 128)
    add("--experts", type=int, help="in each layer; default: 8 or 4 per expert rank")
    add("--topk", type=int, default=2, help="experts that a token uses")
    add("--backend", choices=["auto", "nvlink", "reference"], default="auto")
    add("--comm-sms", type=int, default=16, help="SMs that communication may take")
    add("--lr", type=float, default=1e-3 if gpus else 5e-3)
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, value in vars(options).items():
        if isinstance(value, int) and value < 1 and name not in ("comm_sms", "seed"):
            parser.error(f"--{name.replace('_', '-')} {value} is not above 0")
    if gpus and options.processes > gpus:
        parser.error(f"--processes {options.processes} exceeds the {gpus} GPUs: use at most {gpus}")
    if options.pipeline_ranks is None:
        options.pipeline_ranks = 2 if options.processes >= 4 and options.processes % 2 == 0 else 1
    if options.chunks is None:
        options.chunks = 3 * options.pipeline_ranks
    columns, rest = divmod(options.processes, options.pipeline_ranks)
    if rest:
        parser.error(f"--processes {options.processes} is no multiple of --pipeline-ranks")
    if options.experts is None:
        options.experts = columns * (8 if gpus else 4)
    return options


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        # A process that fails ends the others, and its traceback is raised here.
        mp.spawn(train, (options, folder), nprocs=options.processes)


if __name__ == "__main__":
    main()
