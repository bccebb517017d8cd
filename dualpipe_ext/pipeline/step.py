"""One step of a pipeline on one rank: actions in order, results received, kept and handed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..blocks.pair import OverlappedPair
from ..blocks.stage import Chunk, Criterion, HookChunk, StageChunk, start_chunk
from ..gradients.data_parallel import unwrap
from ..trace.ranges import named_range
from .failure import Failure
from .schedule import Action, Schedule
from .transfers import Transfers

__all__ = ["Batch", "Step", "cut_batch"]

Place = tuple[int, int, int]  # stage, chunk, direction


class Owner(Protocol):
    """What a step asks of its `Pipeline`."""

    rank: int
    modules: tuple[nn.Module, ...]
    weight_delay: str
    recompute: bool
    pair: OverlappedPair
    failure: Failure


@dataclass(frozen=True)
class Batch:
    """This rank's micro-batches: for each chunk the inputs, or the labels; empty where none are."""

    inputs: tuple[tuple[Tensor, ...], ...]
    labels: tuple[tuple[Tensor, ...], ...]

    def signature(self) -> tuple[Any, ...]:
        """Shapes and dtypes of a chunk's inputs."""
        return tuple((tuple(x.shape), str(x.dtype)) for x in self.inputs[0]) if self.inputs else ()


def cut_batch(
    schedule: Schedule,
    rank: int,
    inputs: Sequence[Tensor],
    labels: Sequence[Tensor],
    batch_dim: int,
    *,
    needs_criterion: bool,
) -> Batch:
    """Cut a rank's part of the batch into the chunks of its direction.

    Raises ValueError where inputs, labels or the criterion stand on the wrong rank, or sizes do not
    divide; `needs_criterion` says that one is missing if the last stage is here.
    """
    last = schedule.num_stages - 1
    directions = range(schedule.num_directions)
    chunks = schedule.chunks_per_direction
    found = {}
    for name, tensors, stage in (("inputs", inputs, 0), ("labels", labels, last)):
        here = any(schedule.rank_of(stage, direction) == rank for direction in directions)
        if isinstance(tensors, Tensor):
            raise ValueError(f"{name} are one tensor: pass a list, {name}=[tensor]")
        if tensors and not here:
            ranks = [schedule.rank_of(stage, direction) for direction in directions]
            raise ValueError(f"{name} on rank {rank}, stage {stage} is on {ranks}: pass them there")
        if name == "inputs" and here and not tensors:
            raise ValueError(f"no inputs on rank {rank}, which holds stage 0: pass the batch")
        for tensor in tensors:
            _check_cut(name, tensor, chunks, batch_dim)
        cut = [tensor.tensor_split(chunks, dim=batch_dim) for tensor in tensors]
        found[name] = tuple(zip(*cut, strict=True)) if cut else ((),) * chunks if here else ()
        if name == "labels" and here and needs_criterion:
            raise ValueError(f"criterion=None on rank {rank}, which holds the last stage: pass one")
    return Batch(**found)


def _check_cut(name: str, tensor: Tensor, chunks: int, batch_dim: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"one of the {name} is a {type(tensor).__name__}: pass tensors")
    if not -tensor.dim() <= batch_dim < tensor.dim():
        raise ValueError(
            f"{name} {list(tensor.shape)} have no dimension {batch_dim}: pass the batch's as "
            "batch_dim"
        )
    if tensor.shape[batch_dim] % chunks or not tensor.shape[batch_dim]:
        raise ValueError(
            f"{name} {list(tensor.shape)} do not cut into {chunks} equal chunks along "
            f"dimension {batch_dim}: pad the batch to a multiple of {chunks}"
        )


class Step:
    """Runs the actions of `pipeline.rank`; after a failure it keeps the others from waiting."""

    def __init__(
        self,
        pipeline: Owner,
        schedule: Schedule,
        transfers: Transfers,
        batch: Batch,
        criterion: Criterion | None,
        *,
        forward_only: bool,
        return_outputs: bool,
    ) -> None:
        self.pipeline, self.schedule, self.transfers = pipeline, schedule, transfers
        self.batch, self.criterion = batch, criterion
        self.forward_only, self.return_outputs = forward_only, return_outputs
        self.rank, self.last = pipeline.rank, schedule.num_stages - 1
        self.failure: Failure = pipeline.failure
        # From one stage of this rank to the other, by tensor and place.
        self._local: dict[tuple[str, int, int, int], tuple[Any, ...]] = {}
        self._chunks: dict[Place, Chunk] = {}
        self._losses: dict[int, Tensor] = {}
        self._outputs: dict[int, tuple[Tensor, ...]] = {}

    def run(self) -> None:
        """All actions. Never raises: see `failure`."""
        for position, action in enumerate(self.schedule.actions[self.rank]):
            parts = action.parts
            if self.forward_only:
                parts = tuple(part for part in parts if part.op == "F")
            if self.failure.error is None and parts:
                with self.failure.watch(), named_range(f"pipeline: {action}"):
                    self.transfers.post(position)
                    self._run(parts)
            if self.failure.error is not None:
                self._chunks.clear()
                self._skip(parts)
        with self.failure.watch():
            self.transfers.finish()

    def losses(self) -> Tensor | None:
        return (
            torch.stack([self._losses[i] for i in sorted(self._losses)]) if self._losses else None
        )

    def outputs(self, batch_dim: int) -> tuple[Tensor, ...]:
        found = [self._outputs[chunk] for chunk in sorted(self._outputs)]
        return tuple(torch.cat(parts, dim=batch_dim) for parts in zip(*found, strict=True))

    def _run(self, parts: tuple[Action, ...]) -> None:
        if len(parts) == 2:
            self._run_pair(*parts)
        elif parts[0].op == "F":
            chunk = self._start(parts[0])
            chunk.forward()
            self._keep(parts[0], chunk)
            self._hand_on_outputs(parts[0], chunk)
        elif parts[0].op == "W":
            self._chunks.pop(_place(parts[0])).backward_weight()
        else:
            self._run_backward(parts[0])

    def _run_backward(self, action: Action) -> None:
        chunk = self._chunks[_place(action)]
        split = action.op == "I"
        delay = self.pipeline.weight_delay if split else "all"  # a B sends before its weights
        found = chunk.backward_input(self._gradients(action), weight_delay=delay)
        self._hand_on_gradients(action, found)
        if not split:
            self._chunks.pop(_place(action)).backward_weight()

    def _run_pair(self, forward: Action, backward: Action) -> None:
        b = self._chunks[_place(backward)]
        f = self._start(forward)
        gradients = self._gradients(backward)
        if isinstance(f, StageChunk) and isinstance(b, StageChunk):
            self.pipeline.pair.run(
                *(f, b, gradients),
                on_outputs=lambda _: self._hand_on_outputs(forward, f),
                on_input_gradients=lambda found: self._hand_on_gradients(backward, found),
            )
        elif (
            isinstance(f, HookChunk)
            and isinstance(b, HookChunk)
            and type(f.module) is type(b.module)
        ):
            _, found = f.run_pair(b, gradients)
            self._hand_on_gradients(backward, found)
            self._hand_on_outputs(forward, f)
        else:
            found = b.backward_input(gradients)
            self._hand_on_gradients(backward, found)
            b.backward_weight()
            f.forward()
            self._hand_on_outputs(forward, f)
        del self._chunks[_place(backward)]
        self._keep(forward, f)

    def _start(self, action: Action) -> Chunk:
        """The chunk, its inputs received."""
        stage, chunk, direction = _place(action)
        if stage == 0:
            inputs = self.batch.inputs[chunk]
        else:
            inputs = self._take("activation", stage - 1, chunk, direction)
        ends = stage == self.last and self.criterion is not None
        return start_chunk(
            unwrap(self._module(action)),
            *inputs,
            criterion=self.criterion if ends else None,
            labels=self.batch.labels[chunk] if ends else (),
            grad=not self.forward_only,
            recompute=self.pipeline.recompute,
        )

    def _module(self, action: Action) -> nn.Module:
        stages = self.schedule.stages_of(self.rank)
        if self.schedule.num_directions == 2:
            return self.pipeline.modules[action.direction]
        return self.pipeline.modules[stages.index(action.stage)]

    def _gradients(self, action: Action) -> tuple[Tensor | None, ...]:
        stage, chunk, direction = _place(action)
        if stage == self.last:
            return ()
        return self._take("gradient", stage + 1, chunk, direction)

    def _take(self, tensor: str, stage: int, chunk: int, direction: int) -> tuple[Any, ...]:
        key = (tensor, stage, chunk, direction)
        if self.schedule.rank_of(stage, direction) == self.rank:
            return self._local.pop(key)
        return self.transfers.receive(*key)

    def _keep(self, action: Action, chunk: Chunk) -> None:
        if not self.forward_only:
            self._chunks[_place(action)] = chunk

    def _hand_on_outputs(self, action: Action, chunk: Chunk) -> None:
        outputs, chunk.outputs = chunk.outputs, ()
        if action.stage == self.last:
            if chunk.loss is not None:
                self._losses[action.chunk] = chunk.loss.detach()
            if self.return_outputs:
                self._outputs[action.chunk] = outputs
            return
        if chunk.views:
            i = chunk.views[0]
            raise ValueError(
                f"stage {action.stage} returned a view as output {i}, {list(outputs[i].shape)}: "
                "its memory could not be freed once it is sent, return .clone() of it"
            )
        for i, y in enumerate(outputs):
            if y.is_complex() and not self.forward_only:
                raise ValueError(
                    f"stage {action.stage} returned output {i} as {str(y.dtype).split('.')[1]}: "
                    "stages exchange gradients of real numbers only, return real and imaginary part"
                )
        self._hand_on("activation", action, action.stage + 1, outputs)

    def _hand_on_gradients(self, action: Action, gradients: tuple[Tensor | None, ...]) -> None:
        if action.stage > 0:
            self._hand_on("gradient", action, action.stage - 1, gradients)

    def _hand_on(self, tensor: str, action: Action, to: int, tensors: tuple[Any, ...]) -> None:
        key = (tensor, *_place(action))
        if self.schedule.rank_of(to, action.direction) == self.rank:
            self._local[key] = tensors
        else:
            self.transfers.send(*key, tensors)

    def _skip(self, parts: tuple[Action, ...]) -> None:
        """What others wait for, without what they sent, in an action's order; must not raise."""
        moves = [  # gradients leave before activations
            (part, *(("activation", 1) if part.op == "F" else ("gradient", -1)))
            for part in reversed(parts)
            if part.op != "W"
        ]
        for part, tensor, step in moves:
            if self._elsewhere(part, -step):
                with self.failure.watch():
                    place = (part.stage - step, part.chunk, part.direction)
                    self.transfers.drop(tensor, *place)
        for part, tensor, step in moves:
            if self._elsewhere(part, step):
                with self.failure.watch():
                    self.transfers.send(tensor, *_place(part), None)

    def _elsewhere(self, part: Action, step: int) -> bool:
        """Whether another rank holds the stage before (-1) or after (1) that of `part`."""
        other = part.stage + step
        return 0 <= other <= self.last and self.schedule.rank_of(other, part.direction) != self.rank


def _place(action: Action) -> Place:
    return action.stage, action.chunk, action.direction
