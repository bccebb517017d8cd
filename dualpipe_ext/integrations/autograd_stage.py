"""A `TransformerStage` as a module whose whole backward is one node of the caller's autograd graph.

Runtimes that know autograd only find their way through it, and an adapter finds the chunk again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge

from ..blocks.pair import OverlappedPair
from ..blocks.stage import StageChunk, TransformerStage

__all__ = ["AutogradStage", "find_run", "gradients_from_loss"]


class AutogradStage(nn.Module):
    """Wraps `stage`; same inputs, outputs and parameters (under ``stage.``), same gradients.

    Args:
        pair: what overlaps; modules of one rank share it. None: one of its own.
        delay: called with the function that computes the weight gradients, in the backward; it runs
            it, now or later. None: at once.
    """

    def __init__(
        self,
        stage: TransformerStage,
        *,
        pair: OverlappedPair | None = None,
        delay: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        super().__init__()
        self.stage = stage
        self.pair = OverlappedPair(next(stage.parameters()).device) if pair is None else pair
        self.delay = delay
        self.shapes_only = False  # a backward then returns zeros and leaves the weights alone
        self._ready: StageChunk | None = None  # run by the pair, not yet asked for

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        chunk, self._ready = self._ready, None
        if chunk is None:
            chunk = self.stage.start_chunk(*inputs, grad=torch.is_grad_enabled())
            chunk.forward()
        outputs = self.attach(chunk, inputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def attach(self, chunk: StageChunk, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of a chunk that has run, on the graph."""
        if not torch.is_grad_enabled():
            return chunk.outputs
        # Whole numbers carry no graph: without it a first stage would get no backward.
        anchor = torch.empty(0, requires_grad=True)
        outputs: tuple[Tensor, ...] = _Run.apply(self, chunk, anchor, *inputs)
        return outputs

    def prepare(self, chunk: StageChunk) -> None:
        """The next call returns this chunk, which has run, instead of running one."""
        self._ready = chunk

    def run_weights(self, chunk: StageChunk) -> None:
        if self.delay is None:
            chunk.backward_weight()
        else:
            self.delay(chunk.backward_weight)


class _Run(torch.autograd.Function):
    """A chunk's place on the graph. `gradients` of the inputs are there once a pair has run it."""

    @staticmethod
    def forward(
        ctx: Any, module: AutogradStage, chunk: StageChunk, anchor: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.module, ctx.chunk, ctx.inputs, ctx.gradients = module, chunk, inputs, None
        outputs, chunk.outputs = chunk.outputs, ()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(y for y in outputs if not y.is_floating_point()))
        ctx.floating = tuple(y.is_floating_point() for y in outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        found = ctx.gradients
        if ctx.module.shapes_only:
            found = [torch.zeros_like(x) if x.requires_grad else None for x in ctx.inputs]
        elif found is None:
            found = ctx.chunk.backward_input(gradients)
            ctx.module.run_weights(ctx.chunk)
        ctx.chunk = ctx.inputs = ctx.gradients = None
        return None, None, None, *found


def find_run(tensor: Tensor) -> Any:
    """The node of the chunk that `tensor`, an output or the loss computed from one, came from.

    Raises ValueError if there is none.
    """
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, _Run._backward_cls):
            return node
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    raise ValueError(
        f"no AutogradStage made this tensor of shape {list(tensor.shape)}: build both stages as one"
    )


def gradients_from_loss(
    loss: Tensor, run: Any, *, keep_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients of the chunk's outputs. Parameters of the criterion itself get none."""
    numbers = [i for i, floating in enumerate(run.floating) if floating]
    edges = [GradientEdge(run, i) for i in numbers]
    found = torch.autograd.grad(loss, edges, retain_graph=keep_graph, allow_unused=True)
    by_number = dict(zip(numbers, found, strict=True))
    return tuple(by_number.get(i) for i in range(len(run.floating)))
