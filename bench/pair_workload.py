"""What bench/pair.py times: a stage, its exchanges, and single calls of them, or graphs of many."""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from layer import SHAPES as LAYER_SHAPES
from ranks import Stamp, in_another_order, line_up, local_device, slowest, time_in_turn

from dualpipe_ext import Exchange, MoELayer, Plan
from dualpipe_ext.blocks.attention import GroupedQueryAttention
from dualpipe_ext.blocks.block import TransformerBlock
from dualpipe_ext.blocks.pair import OverlappedPair
from dualpipe_ext.blocks.stage import WEIGHT_DELAYS, StageChunk, TransformerStage
from dualpipe_ext.exchange.backend import Departure

__all__ = [
    "FORMS",
    "HOST_US",
    "MLP_SMS",
    "MORE_SMS",
    "SEQUENCE",
    "SHAPES",
    "GraphWorkload",
    "Workload",
    "sms_of_gemms",
]

# name: tokens a rank, hidden, expert width, experts, topk
SHAPES = LAYER_SHAPES | {"tiny": (64, 64, 32, 16, 2)}
SEQUENCE = 4096
FORMS = ("expert", "unique")
MLP_SMS = ("take-over", "rest")
MORE_SMS = 32  # outside pairs nothing else needs an SM meanwhile
HOST_US = 8000  # a call without waits keeps the host busy for about as long
TIMEOUT = 60.0  # seconds until a rank that fails ends the others
STEP = 6  # micro-batches of a graph
ROOM = 1.3  # rows that a rank's experts may get, over the mean

# A launch, a forward and a backward of all layers: ("pair", form, comm_sms, mlp_sms, weight_delay),
# ("in order" or "comm", form, comm_sms), ("compute", form).
Key = tuple


def sms_of_gemms(mlp_sms: str, comm_sms: int) -> int | None:
    """`num_sms` of a pair; None: all, tiles drawn."""
    if mlp_sms == "take-over" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(local_device()).multi_processor_count - comm_sms


class Replay:
    """In place of a layer's exchange: what it brought the first time, again and again.

    Expanding unique rows and summing them is computation, and done.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._kept: dict[tuple, object] = {}

    def __getattr__(self, name: str):
        found = getattr(self._exchange, name)
        if name not in ("plan", "send", "fetch"):
            return found
        return functools.partial(self._replay, name, found)

    def _replay(self, name: str, call: Callable, *args, **options):
        departure = args[0] if name == "fetch" else None
        key = (name, options.get("channel") if departure is None else departure.channel)
        if key not in self._kept:
            self._kept[key] = call(*args, **options)
        return self._kept[key]


@dataclass
class Form:
    """An exchange, what it sends when it runs alone, and micro-batches whose backward is next.

    `before` went through the exchange, `replayed` through `replays`, a stand-in a layer.
    `departures`: what comes home in the backward and in the forward; rows are summed already.
    """

    exchange: Exchange
    plan: Plan
    topk_weight: torch.Tensor
    departures: tuple[Departure, Departure]
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
        like = {"dtype": self.dtype, "device": self.device}
        exchanges = {}
        for form in args.forms:  # opening is collective: one order on all ranks
            exchanges[form] = Exchange(
                dist.group.WORLD,
                **dict(hidden=hidden, num_experts=experts, topk=topk, max_tokens=tokens),
                **dict(form=form, timeout=TIMEOUT, max_rows=self.max_rows(shape), **like),
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
        self.pairs = {d: OverlappedPair(self.device, weight_delay=d) for d in WEIGHT_DELAYS}
        self._count = 0
        self.forms = {form: self._open(exchange) for form, exchange in exchanges.items()}

    @property
    def backend(self) -> str:
        return next(iter(self.forms.values())).exchange.backend

    def max_rows(self, shape: str) -> int | None:
        return None

    def launch(self, key: Key) -> None:
        kind, *rest = key
        {
            "pair": self.pair, "in order": self.in_order, "compute": self.compute,
            "comm": self.comm,
        }[kind](*rest)  # fmt: skip

    def time(self, keys: Iterable[Key], repeats: int) -> dict[Key, float]:
        """Median µs of a launch."""
        launches = {key: functools.partial(self.launch, key) for key in keys}
        once = time_in_turn(launches, 1, 1, host_us=HOST_US)  # compiles and warms up
        in_order = min(us for key, us in once.items() if key[0] == "in order")
        calls = min(4, math.ceil(25_000 / in_order))
        return time_in_turn(launches, repeats, 1, calls, HOST_US)

    def pair(self, form: str, comm_sms: int, mlp_sms: str, weight_delay: str) -> None:
        used = self._use(form, comm_sms)
        chunk = self._start()
        pair = self._set_pair(comm_sms, mlp_sms, weight_delay)
        pair.run(chunk, used.before, (self.gradient,))
        used.before = chunk

    def in_order(self, form: str, comm_sms: int) -> None:
        used = self._use(form, comm_sms)
        used.before = self._forward_then_backward(used.before)

    def compute(self, form: str) -> None:
        used = self._use(form, self.forms[form].exchange.comm_sms)
        self._put(used.replays)
        used.replayed = self._forward_then_backward(used.replayed)

    @torch.no_grad()
    def comm(self, form: str, comm_sms: int) -> None:
        """As often as in a pair, in its order; the plan is another one's, for no wait."""
        used = self._use(form, comm_sms)
        exchange, plan, weight = used.exchange, used.plan, used.topk_weight
        x, dy = (tensor.flatten(0, 1) for tensor in (self.inputs[0], self.gradient))
        for _ in range(self.layers):
            exchange.send(dy, plan, channel="backward").release()
            exchange.plan(plan.topk_idx)
            exchange.send(x, plan, topk_weight=weight).release()
            for departure in used.departures:
                exchange.fetch(departure, plan)

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

    def _use(self, form: str, comm_sms: int) -> Form:
        used = self.forms[form]
        used.exchange.comm_sms = comm_sms
        self._put([used.exchange] * self.layers)
        return used

    def _set_pair(self, comm_sms: int, mlp_sms: str, weight_delay: str) -> OverlappedPair:
        pair = self.pairs[weight_delay]
        pair.comm_sms = comm_sms
        pair.num_sms = sms_of_gemms(mlp_sms, comm_sms)
        return pair

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
        self._backward(before)
        return chunk

    def _backward(self, chunk: StageChunk) -> None:
        chunk.backward_input((self.gradient,))
        chunk.backward_weight()

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
            departures = (  # "unique" has its sums ready, and no scalars to send with them
                exchange.leave(
                    rows,
                    plan,
                    channel="backward",
                    row_weight=None if exchange.form == "unique" else row_weight,
                ),
                exchange.leave(rows, plan),
            )
        return Form(exchange, plan, weight, departures, before, replays, replayed)


class GraphWorkload(Workload):
    """Without the host: a step of STEP micro-batches is a CUDA graph, and a launch's time that of
    one between its first forward and its last backward. The exchanges get `max_rows`."""

    def __init__(self, *args) -> None:
        self._steps: dict[Key, Callable[[], tuple[Stamp, Stamp]]] = {}
        self._stream = self._pool = None
        if torch.cuda.is_available():
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            # Gradients are accumulated on the stream on which a parameter was first used.
            self._stream.wait_stream(torch.cuda.current_stream())
            torch.cuda.set_stream(self._stream)
        super().__init__(*args)

    def max_rows(self, shape: str) -> int:
        tokens, _, _, experts, topk = SHAPES[shape]
        padding = 128 * experts // dist.get_world_size()
        return math.ceil(ROOM * tokens * topk / 128) * 128 + padding

    def time(self, keys: Iterable[Key], repeats: int) -> dict[Key, float]:
        times = {key: [] for key in keys}
        for key in times:
            if key not in self._steps:
                self._steps[key] = self._capture(key)
        for repeat in range(1 + repeats):
            for key in in_another_order(times, repeat):
                line_up(1000)
                begin, end = self._steps[key]()
                if self._stream is not None:
                    self._stream.synchronize()
                if repeat:
                    times[key].append(begin.until(end) / (STEP - 1))
        medians = [statistics.median(found) for found in times.values()]
        return dict(zip(times, slowest(medians), strict=True))

    def check(self) -> None:
        for form, used in self.forms.items():
            self._step(("in order", form, used.exchange.comm_sms), 2)
        super().check()

    def close(self) -> None:
        self._steps.clear()
        super().close()
        if self._stream is not None:
            torch.cuda.set_stream(torch.cuda.default_stream())

    def _capture(self, key: Key) -> Callable[[], tuple[Stamp, Stamp]]:
        self._step(key, 2)  # compiles
        if self._pool is None:
            return functools.partial(self._step, key)
        torch.cuda.synchronize()
        self.stage.zero_grad()
        graph = torch.cuda.CUDAGraph()
        how = {"stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, pool=self._pool, **how):
            stamps = self._step(key)
        self.stage.zero_grad()

        def replay() -> tuple[Stamp, Stamp]:
            graph.replay()
            return stamps

        return replay

    def _step(self, key: Key, count: int = STEP) -> tuple[Stamp, Stamp]:
        """`count` micro-batches; between the stamps a launch for each but one."""
        kind, form, *rest = key
        if kind == "comm":
            begin = Stamp()
            for _ in range(count - 1):
                self.comm(form, *rest)
            return begin, Stamp()
        used = self._use(form, *(rest[:1] or [self.forms[form].exchange.comm_sms]))
        if kind == "compute":
            self._put(used.replays)
        chunk = self._start()
        chunk.forward()
        begin = Stamp()
        for _ in range(count - 1):
            following = self._start()
            if kind == "pair":
                self._set_pair(*rest).run(following, chunk, (self.gradient,))
            else:
                following.forward()
                self._backward(chunk)
            chunk = following
        end = Stamp()
        self._backward(chunk)
        return begin, end
