"""Trains a small byte-level MoE transformer on the sources of Python's standard library.

    python examples/train_moe.py [--steps N] [--hidden H] [--experts E] ...

It starts one process per GPU, or four gloo processes where there is no GPU. Every process reads
its own batches (data parallel) and owns a share of each layer's experts (expert parallel): tokens
travel to the experts. Read it from `train` on; `Block` shows where the MoE layer sits.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from dualpipe_ext import Exchange, MoELayer

VOCABULARY = 256  # bytes


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of x [batch, heads, sequence, width]."""
    half = x.shape[-1] // 2
    frequency = 10_000 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.outer(torch.arange(x.shape[-2], device=x.device), frequency)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """Attention, then the MoE layer where a dense transformer has its MLP."""

    def __init__(self, options: argparse.Namespace, exchange: Exchange) -> None:
        super().__init__()
        hidden = options.hidden
        self.heads = options.heads
        self.attention_norm = nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.projection = nn.Linear(hidden, hidden, bias=False)
        self.moe_norm = nn.RMSNorm(hidden)
        self.moe = MoELayer(
            hidden=hidden,
            expert_hidden=options.expert_hidden,
            num_experts=options.experts,
            topk=options.topk,
            group=exchange.group,
            exchange=exchange,  # one set of buffers serves all layers: they run one after another
            init_std=hidden**-0.5,
            device=exchange.device,
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, sequence, width]
        query, key = rotate(query), rotate(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).flatten(2))
        return x + self.moe(self.moe_norm(x))


class ByteTransformer(nn.Module):
    """Predicts the next byte: [batch, sequence] int64 → [batch, sequence, 256] logits."""

    def __init__(self, options: argparse.Namespace, exchange: Exchange) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, options.hidden)
        self.blocks = nn.ModuleList(Block(options, exchange) for _ in range(options.layers))
        self.norm = nn.RMSNorm(options.hidden)
        self.head = nn.Linear(options.hidden, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def aux_loss(self) -> Tensor:
        """What keeps the experts evenly loaded, summed over the layers of the last forward."""
        return torch.stack([block.moe.aux_loss for block in self.blocks]).sum()


class TimedExchange(Exchange):
    """An Exchange that measures the time of its calls, in forward and in backward.

    On a GPU by events around the call on its stream, else by the clock. The backward of a dispatch
    is a combine that autograd starts by itself; hooks on the graph's node enclose it.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.reset_clock()

    def reset_clock(self) -> None:
        self._marks = []  # start, end, start, end, ...

    def seconds(self) -> float:
        """Time in plan, dispatch and combine since `reset_clock`, waiting for peers included."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if self.device.type == "cpu":
            return sum(end - start for start, end in pairs)
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(end) for start, end in pairs) / 1000

    def plan(self, topk_idx):
        return self._timed(super().plan, topk_idx)

    def dispatch(self, x, plan, **options):
        result = self._timed(super().dispatch, x, plan, **options)
        return self._time_backward(result)

    def combine(self, rows, plan, **options):
        result = self._timed(super().combine, rows, plan, **options)
        return self._time_backward(result)

    def _timed(self, call, *args, **kwargs):
        self._mark()
        result = call(*args, **kwargs)
        self._mark()
        return result

    def _time_backward(self, result):
        node = (result[0] if isinstance(result, tuple) else result).grad_fn
        if node is not None:
            node.register_prehook(lambda *_: self._mark())
            node.register_hook(lambda *_: self._mark())
        return result

    def _mark(self) -> None:
        if self.device.type == "cpu":
            self._marks.append(time.perf_counter())
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)


class ProgressBar:
    """A bar that redraws itself on a terminal, and a line every tenth of the way elsewhere."""

    WIDTH = 24

    def __init__(self, total: int) -> None:
        self.total = total
        self.terminal = sys.stdout.isatty()
        self.start = time.perf_counter()
        self.tenths = 0

    def show(self, done: int, text: str) -> None:
        filled = self.WIDTH * done // self.total
        bar = "#" * filled + "." * (self.WIDTH - filled)
        left = (time.perf_counter() - self.start) * (self.total - done) / done
        line = f"[{bar}] step {done}/{self.total}  {text}  {left:.0f} s left"
        if self.terminal:
            print(f"\r{line:<79}", end="\n" if done == self.total else "", flush=True)
        elif done * 10 // self.total > self.tenths:
            self.tenths = done * 10 // self.total
            print(line, flush=True)


def read_text() -> Tensor:
    """The top-level modules of the standard library, one after another: [bytes] uint8."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    if len(text) < 100_000:
        raise FileNotFoundError(
            f"{folder} holds {len(text)} bytes of Python source, 100000 are needed: "
            "use a Python whose standard library is installed as files"
        )
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def draw_batch(text: Tensor, options: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """[batch, sequence + 1] int64: random places of the text."""
    last = len(text) - options.sequence
    start = torch.randint(last, (options.batch, 1), generator=generator)
    return text[start + torch.arange(options.sequence + 1)].long()


def average_gradients(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Gradients of the mean loss over all ranks.

    The experts' gradients already are sums over the tokens of all ranks, because the tokens came to
    them; all other parameters are replicated and need the all-reduce, here one for all of them.
    """
    replicated = [p.grad for p in model.parameters() if not getattr(p, "expert_parallel", False)]
    flat = torch.cat([grad.flatten() for grad in replicated])
    dist.all_reduce(flat, group=group)
    for grad, total in zip(replicated, flat.split([g.numel() for g in replicated]), strict=True):
        grad.copy_(total.view_as(grad))
    for p in model.parameters():
        p.grad /= group.size()


def train(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    """One process of the run."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, count_cores() // options.processes))
    make_deterministic()
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=options.processes,
    )
    exchange = TimedExchange(
        dist.group.WORLD,
        hidden=options.hidden,
        num_experts=options.experts,
        topk=options.topk,
        max_tokens=options.batch * options.sequence,
        dtype=torch.bfloat16 if cuda else torch.float32,
        backend=options.backend,
        comm_sms=options.comm_sms,
        device=device,
    )
    torch.manual_seed(options.seed)  # the same on all ranks: replicated parameters start equal
    model = ByteTransformer(options, exchange).to(device)
    if rank == 0:
        print_setup(model, exchange, options)
    losses, seconds, share = run_steps(model, exchange, options)
    if rank == 0:
        print_results(losses, seconds, share, exchange, options)
    exchange.close()
    dist.destroy_process_group()


def run_steps(
    model: ByteTransformer, exchange: TimedExchange, options: argparse.Namespace
) -> tuple[list[float], float, float]:
    """Trains; returns the loss of every step, seconds a step, and the share spent exchanging."""
    group, device = exchange.group, exchange.device
    text = read_text()
    generator = torch.Generator().manual_seed(options.seed * options.processes + exchange.rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95))
    ramp = 1 + options.steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / ramp, 2 * (1 - step / options.steps))
    )
    warmup = min(5, options.steps - 1)  # the first steps compile the kernels and are not timed
    bar = ProgressBar(options.steps) if exchange.rank == 0 else None
    losses = torch.zeros(options.steps, device=device)
    for step in range(options.steps):
        if step == warmup:
            start = synchronized_clock(device)
            exchange.reset_clock()
        batch = draw_batch(text, options, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        (loss + model.aux_loss()).backward()
        average_gradients(model, group)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses[step] = loss.detach()
        if bar and ((step + 1) % 5 == 0 or step + 1 == options.steps):
            bar.show(step + 1, f"loss {losses[max(0, step - 4) : step + 1].mean().item():.3f}")
    seconds = synchronized_clock(device) - start
    shared = torch.cat([losses, losses.new_tensor([exchange.seconds() / seconds])])
    dist.all_reduce(shared, group=group)
    *means, share = (shared / group.size()).tolist()
    return means, seconds / (options.steps - warmup), share


def synchronized_clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def print_setup(model: nn.Module, exchange: Exchange, options: argparse.Namespace) -> None:
    own = sum(p.numel() for p in model.parameters())
    sharded = sum(p.numel() for p in model.parameters() if getattr(p, "expert_parallel", False))
    total = own + sharded * (exchange.world_size - 1)
    print(
        f"{options.processes} processes on {exchange.device.type}, {options.layers} layers, "
        f"{options.experts} experts of which a token uses {options.topk}, "
        f"{total / 1e6:.1f} M parameters\n"
        f"{exchange.backend} backend: {exchange.backend_reason}",
        flush=True,
    )


def print_results(
    losses: list[float],
    seconds: float,
    share: float,
    exchange: Exchange,
    options: argparse.Namespace,
) -> None:
    tail = losses[-10:]
    tokens = options.processes * options.batch * options.sequence
    print(
        f"loss                    {losses[0]:.4f} -> {sum(tail) / len(tail):.4f}"
        f" (first step -> mean of the last {len(tail)}, all ranks)\n"
        f"tokens/s                {tokens / seconds:,.0f} over all ranks\n"
        f"in dispatch and combine {100 * share:.1f} % of the time, waiting for peers included\n"
        f"backend                 {exchange.backend}\n"
        f"comm_sms                {exchange.comm_sms}",
        flush=True,
    )


def make_deterministic() -> None:
    """Two runs with one seed print the same losses: torch's kernels, too, must not use atomics."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, changes nothing here


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parse_options() -> argparse.Namespace:
    gpus = torch.cuda.device_count()
    processes = min(gpus, 8) or 4
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--processes", type=int, default=processes, help="ranks, one per GPU where there are any")
    add("--steps", type=int, default=300 if gpus else 200)
    add("--batch", type=int, default=16 if gpus else 8, help="sequences per process and step")
    add("--sequence", type=int, default=1024 if gpus else 128, help="bytes in a sequence")
    add("--layers", type=int, default=4 if gpus else 2)
    add("--hidden", type=int, default=1024 if gpus else 128)
    add("--heads", type=int, default=8 if gpus else 4)
    add("--expert-hidden", type=int, default=1024 if gpus else 128)
    add("--experts", type=int, default=None, help="in each layer; default: 8 or 2 per process")
    add("--topk", type=int, default=2, help="experts that a token uses")
    add("--backend", choices=["auto", "nvlink", "reference"], default="auto")
    add("--comm-sms", type=int, default=16, help="SMs that communication may take")
    add("--lr", type=float, default=1e-3 if gpus else 5e-3)
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.experts is None:
        options.experts = options.processes * (8 if gpus else 2)
    if gpus and options.processes > gpus:
        parser.error(f"--processes {options.processes} exceeds the {gpus} GPUs: use at most {gpus}")
    return options


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        # A process that fails ends the others, and its traceback is raised here.
        mp.spawn(train, (options, f"{folder}/rendezvous"), nprocs=options.processes)


if __name__ == "__main__":
    main()
