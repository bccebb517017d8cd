"""The overlapped pair: a forward and a backward of two micro-batches, or two forwards, at once.

Two lanes, compute and communication, in the order of the DeepSeek-V3 report (arXiv 2412.19437,
figure 4); for every layer, forward (△) of one micro-batch, backward (▲) of the other:

    compute  attention△ │ mlp▲ │ mlp▲ weights │ mlp△ │ attention▲ │ attention▲ weights
    comm     combine▲ │ plan△ dispatch△ │ dispatch▲ │ combine△

On a GPU the compute lane is the caller's current stream and the communication lane a stream of its
own; each segment waits, by an event, for the one before it of its own micro-batch if that ran on
the other lane, and for nothing else. The host waits once a layer, for the number of received rows,
while the GPU has the segments in front of it to do. On the CPU the segments run in that order.

In a profile the segments are ranges such as "comm: dispatch F layer 2" (△) and "compute: mlp B
layer 1" (▲), "compute: mlp W": the profiler's trace files take ASCII only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from typing import Any, TypeVar, TypeVarTuple

import torch
from torch import Tensor

from ..ops.operator import device_facts
from ..trace.ranges import named_range
from ..triton_kernels.launch.sm_sharing import can_claim, claim_sms, make_counters
from .chunk import BlockChunk
from .split import SmSplit
from .stage import WEIGHT_DELAYS, StageChunk

__all__ = ["OverlappedPair"]

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class OverlappedPair:
    """Runs pairs of chunks of `TransformerStage`s; one object serves any number of them.

    The results are those of the chunks' own `forward`, `backward_input` and `backward_weight` one
    after another, bit for bit where the kernels are deterministic: only order and streams differ.

    Args:
        device: of the model; None takes the current CUDA device, else the CPU.
        comm_sms: SMs (or a ratio) that communication takes inside a pair, see `Exchange.comm_sms`,
            which comes back to its value afterwards; None leaves it.
        num_sms: SMs that the experts' GEMMs, and the expansion and sums of unique rows, take inside
            a pair. None: the layer's number. Where it has none GEMMs take all SMs and draw their
            tiles from a counter: programs for which communication leaves no room take what is left
            as soon as it ends (bf16 on Hopper; others, and expansion and sums, leave room from the
            start). To communication that comes second the last programs of such GEMMs, of weight
            gradients and of attention leave their SMs after the tile that they have.
        weight_delay: "off": a layer's weight gradients come with its input gradients. "experts":
            those of our expert MLP come after the input gradients have left for the dispatch▲.
            "all": also those of attention, the rest of the block and the stage's two ends; the
            last layer's then hide the transfer to the next rank.

    Every rank of an expert group runs the same pairs, with stages of equally many routed layers.

    With exchanges that have `max_rows`, all pairs of a step, from the first forward to the last
    backward, can be captured in one CUDA graph, which leaves the host nothing to do: capture on the
    stream on which the layers ran before (torch.cuda.graph's `stream`), with gradients set to None,
    and with `capture_error_mode="thread_local"` where NCCL runs.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        comm_sms: int | float | None = None,
        num_sms: int | None = None,
        weight_delay: str = "all",
    ) -> None:
        if weight_delay not in WEIGHT_DELAYS:
            raise ValueError(f"weight_delay={weight_delay!r}: choose one of {WEIGHT_DELAYS}")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.comm_sms, self.num_sms, self.weight_delay = comm_sms, num_sms, weight_delay
        self._lanes = _Lanes(torch.device(device))

    def run(
        self,
        forward: StageChunk,
        backward: StageChunk,
        gradients: Sequence[Tensor | None] = (),
        *,
        on_outputs: Callable[[tuple[Tensor, ...]], None] | None = None,
        on_input_gradients: Callable[[tuple[Tensor | None, ...]], None] | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """The forward of one chunk with the whole backward of another, weights included.

        Args:
            gradients: of `backward`'s outputs; none if it has a loss.
            on_outputs, on_input_gradients: called as soon as `forward`'s outputs, or the gradients
                of `backward`'s inputs, are queued on the compute lane, to send them on.

        Returns the outputs of `forward` and the gradients of `backward`'s inputs.
        """
        run = self._lanes.run
        f, b = self._lanes.tracks("F", "B")
        with self._window(forward, backward):
            self._lanes.share(gradients)
            dx = self._backward(
                b, "end", backward.begin_backward, backward.end_backward_weight, gradients
            )
            x = run("compute", f, "begin", forward.begin_forward)
            # The forward's block whose output is not computed yet.
            before: BlockChunk | None = None
            layers = zip_longest(forward.blocks, reversed(backward.blocks))
            for i, (block_f, block_b) in enumerate(layers):
                f.layer, b.layer = i, len(backward.blocks) - 1 - i
                if block_b is not None:
                    assert dx is not None
                    run(block_b.lane, b, "combine", block_b.combine_backward, dx)
                if before is not None and block_f is not None:
                    x = run("compute", f, "output", before.output)
                self._layer(f, block_f, x, b, block_b)
                before = block_f or before
                if block_b is not None:
                    weights = block_b.attention_backward_weight
                    apart = block_b is backward.blocks[0] and self.weight_delay == "all"
                    dx = self._backward(
                        *(b, "attention", block_b.attention_backward, None if apart else weights),
                        backward.stage.aux_loss_scale,
                    )
            found = run("compute", b, "begin", backward.end_backward, dx)
            _call(on_input_gradients, found)
            if before is not None:
                x = run("compute", f, "output", before.output)
            outputs = run("compute", f, "end", forward.end_forward, x)
            _call(on_outputs, outputs)
            if backward.blocks:  # hides both transfers
                weights = backward.blocks[0].attention_backward_weight
                run("compute", None, "attention W", weights)
            run("compute", None, "begin W", backward.begin_backward_weight)
        return outputs, found

    def run_forwards(
        self, first: StageChunk, second: StageChunk
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Two forwards against each other, as in prefill: one communicates, the other computes.

        They need different exchange channels: start one with channel="forward", the other with
        "backward". Returns the outputs of both.

            compute  attention1 │ attention2 │ mlp1 │ mlp2
            comm     dispatch1 │ dispatch2 │ combine1 │ combine2
        """
        if first.channel == second.channel or len(first.blocks) != len(second.blocks):
            raise ValueError(
                f"the chunks have {len(first.blocks)} and {len(second.blocks)} blocks and channels "
                f"{first.channel!r} and {second.channel!r}: start them from stages of one depth, "
                'one with channel="backward"'
            )
        run, tracks = self._lanes.run, self._lanes.tracks("F1", "F2")
        a, b = tracks
        with self._window(first, second):
            x = run("compute", a, "begin", first.begin_forward)
            y = run("compute", b, "begin", second.begin_forward)
            for i, (block_a, block_b) in enumerate(zip(first.blocks, second.blocks, strict=True)):
                a.layer = b.layer = i
                run("compute", a, "attention", block_a.attention, x)
                run(block_a.lane, a, "plan", block_a.plan)
                run("compute", b, "attention", block_b.attention, y)
                run(block_a.lane, a, "dispatch", block_a.dispatch)
                run(block_b.lane, b, "plan", block_b.plan)
                run("compute", a, "mlp", block_a.mlp)
                run(block_b.lane, b, "dispatch", block_b.dispatch)
                run(block_a.lane, a, "combine", block_a.combine)
                run("compute", b, "mlp", block_b.mlp)
                run(block_b.lane, b, "combine", block_b.combine)
                x = run("compute", a, "output", block_a.output)
                y = run("compute", b, "output", block_b.output)
            outputs = run("compute", a, "end", first.end_forward, x)
            return outputs, run("compute", b, "end", second.end_forward, y)

    def _layer(
        self,
        f: _Track,
        forward: BlockChunk | None,
        x: Tensor,
        b: _Track,
        backward: BlockChunk | None,
    ) -> None:
        """A layer of each, or of one where the other has no more, from attention△ to combine△."""
        run = self._lanes.run
        if forward is not None:
            run("compute", f, "attention", forward.attention, x)
            run(forward.lane, f, "plan", forward.plan)
        if backward is not None:
            if self.weight_delay == "off":
                run("compute", b, "mlp", _mlp_backward_whole, backward)
            else:
                run("compute", b, "mlp", backward.mlp_backward)
                run("compute", None, "mlp W", backward.mlp_backward_weight)
        if forward is not None:
            run(forward.lane, f, "dispatch", forward.dispatch)
        if backward is not None:
            run(backward.lane, b, "dispatch", backward.dispatch_backward)
        if forward is not None:
            run("compute", f, "mlp", forward.mlp)
            run(forward.lane, f, "combine", forward.combine)

    def _backward(
        self,
        track: _Track,
        name: str,
        inputs: Callable[[*Arguments], Result],
        weights: Callable[[], None] | None,
        *args: *Arguments,
    ) -> Result:
        """A compute segment's backward; weights None: the caller runs them later.

        Unless the delay is "all" they belong to the segment, which ends, for others, with them.
        """
        run = self._lanes.run
        if weights is None:
            return run("compute", track, name, inputs, *args)
        if self.weight_delay != "all":
            return run("compute", track, name, _run_both, inputs, weights, *args)
        found = run("compute", track, name, inputs, *args)
        run("compute", None, f"{name} W", weights)
        return found

    @contextmanager
    def _window(self, *chunks: StageChunk) -> Iterator[None]:
        """Both lanes start after what is queued now, and what follows starts after both."""
        split = SmSplit(self.comm_sms, self.num_sms)
        blocks = [block for chunk in chunks for block in chunk.blocks]
        try:
            for block in blocks:
                block.split = split
                if block.exchange is not None:
                    split.adopt(block.exchange)
            self._lanes.open(split)
            try:
                yield
            finally:
                self._lanes.close()
        finally:
            for block in blocks:
                block.split = None
            split.restore()


class _Track:
    """Where one micro-batch stands: its last segment's lane and the event after it."""

    def __init__(self, mark: str, event: torch.cuda.Event | None) -> None:
        self.mark, self.event, self.layer = mark, event, 0
        self.lane: str | None = None


class _Lanes:
    """The two streams, or on the CPU none."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        # High priority: the few SMs that communication takes should not wait for a GEMM to end.
        self._comm: torch.cuda.Stream
        if self._cuda:
            self._comm = torch.cuda.Stream(device, priority=-1)
        self._compute: torch.cuda.Stream  # while a pair runs
        self._split: SmSplit | None = None  # where kernels can give way, while a pair runs

    def open(self, split: SmSplit) -> None:
        if self._cuda:
            device = self._comm.device
            self._split = None
            if can_claim(device):
                make_counters(device)
                self._split = split
            self._compute = torch.cuda.current_stream(device)
            self._comm.wait_stream(self._compute)

    def close(self) -> None:
        if self._cuda:
            self._compute.wait_stream(self._comm)

    def tracks(self, *marks: str) -> list[_Track]:
        return [_Track(mark, torch.cuda.Event() if self._cuda else None) for mark in marks]

    def share(self, tensors: Sequence[Tensor | None]) -> None:
        """Tensors of the compute lane that the communication lane will read."""
        if self._cuda:
            for tensor in tensors:
                if tensor is not None:
                    tensor.record_stream(self._comm)

    def run(
        self,
        lane: str,
        track: _Track | None,
        name: str,
        function: Callable[[*Arguments], Result],
        *args: *Arguments,
    ) -> Result:
        """Queue `function(*args)` as the next segment of `track`; returns what it returns.

        Track None: no segment waits for it, and its inputs are of its own lane.
        """
        label = name if track is None else f"{name} {track.mark} layer {track.layer}"
        with named_range(f"{lane}: {label}"):
            if not self._cuda:
                return function(*args)
            stream, other = self._compute, self._comm
            if lane == "comm":
                stream, other = other, stream
            if track is not None and track.lane not in (None, lane):
                assert track.event is not None
                stream.wait_event(track.event)
            # The compute lane is the current stream.
            found = self._communicate(function, *args) if lane == "comm" else function(*args)
            if track is not None:
                track.lane = lane
                assert track.event is not None
                track.event.record(stream)
                # The allocator must not hand them out again while the other lane still reads.
                made: Any = (found,) if isinstance(found, Tensor) else found or ()
                for tensor in made:
                    if tensor is not None:
                        tensor.record_stream(other)
        return found

    def _communicate(self, function: Callable[[*Arguments], Result], *args: *Arguments) -> Result:
        """On its stream; kernels that draw tiles leave its SMs free while the GPU runs it."""
        torch.cuda.set_stream(self._comm)  # its context manager takes 9 us
        try:
            if self._split is None or not self._split.largest:
                return function(*args)
            device = self._comm.device
            claim_sms(device, max(1, device_facts(device)[0] - self._split.largest))
            try:
                found = function(*args)
            except BaseException:
                with suppress(RuntimeError):  # of a broken stream, which the first error tells
                    claim_sms(device, 0)
                raise
            claim_sms(device, 0)
            return found
        finally:
            torch.cuda.set_stream(self._compute)


def _mlp_backward_whole(block: BlockChunk) -> tuple[Tensor, ...]:
    return _run_both(block.mlp_backward, block.mlp_backward_weight)


def _run_both(
    inputs: Callable[[*Arguments], Result], weights: Callable[[], None], *args: *Arguments
) -> Result:
    found = inputs(*args)
    weights()
    return found


def _call(function: Callable[[Result], None] | None, argument: Result) -> None:
    if function is not None:
        function(argument)
