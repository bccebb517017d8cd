"""What a pipeline rank holds and what becomes of one micro-batch in it.

A chunk is one micro-batch in one stage. Whatever the stage is made of, a chunk offers

    forward() -> outputs                 once; also sets `outputs` and `loss`
    backward_input(gradients) -> grads   of the stage's inputs; with a loss, `gradients` is left out
    backward_weight()                    what backward_input left

`start_chunk` makes one for any module: a `TransformerStage` gives chunks that `OverlappedPair` can
interleave, any other nn.Module runs whole, its weight gradients delayed as far as it is built of
`DelayedLinear` (else backward_weight does nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..compat import is_view
from ..gradients.delayed import WeightGradients
from ..gradients.segment import Segment
from .block import TransformerBlock
from .chunk import BlockChunk

__all__ = [
    "WEIGHT_DELAYS",
    "Chunk",
    "Criterion",
    "HookChunk",
    "ModuleChunk",
    "StageChunk",
    "TransformerStage",
    "has_pair_hook",
    "start_chunk",
]

WEIGHT_DELAYS = ("off", "experts", "all")
Criterion = Callable[..., Tensor]  # of a stage's outputs and the labels


class TransformerStage(nn.Module):
    """`first`, then blocks, then `last`: a part of a transformer, or all of it.

    Called as a module it is ordinary autograd; `start_chunk` makes what schedules run.

    Args:
        blocks: `TransformerBlock`s, one after another; none is legal.
        first: maps the stage's inputs to x [..., H], such as an embedding; None: one input, x.
        last: maps x to the stage's outputs, a tensor or a tuple, such as norm and head; None: x.
        aux_loss_scale: weight of the routers' balance losses in the gradients: they add
            aux_loss_scale × sum of aux_loss to every chunk's loss. With a criterion that divides by
            the number of chunks pass 1 / chunks.
    """

    def __init__(
        self,
        blocks: Sequence[TransformerBlock],
        *,
        first: nn.Module | None = None,
        last: nn.Module | None = None,
        aux_loss_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.first, self.blocks, self.last = first, nn.ModuleList(blocks), last
        self.aux_loss_scale = aux_loss_scale

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = _one_input(inputs) if self.first is None else self.first(*inputs)
        for block in self.blocks:
            x = block(x)
        return x if self.last is None else self.last(x)

    def aux_loss(self) -> Tensor | float:
        """Sum of the routers' balance losses in the last forward, without `aux_loss_scale`."""
        blocks: Any = self.blocks
        total: Tensor | float = sum(b.feed_forward.aux_loss for b in blocks if b.routed)
        return total

    def start_chunk(self, *inputs: Tensor, **options: Any) -> StageChunk:
        """See `StageChunk`, which takes the same arguments."""
        return StageChunk(self, *inputs, **options)


class StageChunk:
    """One micro-batch in a `TransformerStage`.

    Args:
        inputs: of the stage. Floating ones get gradients.
        criterion, labels: loss = criterion(*outputs, *labels), a scalar; None: no loss here.
        grad: False runs the forward only.
        channel: of the exchange, for the forward. Two forwards at once need one each.
    """

    def __init__(
        self,
        stage: TransformerStage,
        *inputs: Tensor,
        criterion: Criterion | None = None,
        labels: Sequence[Tensor] = (),
        grad: bool = True,
        channel: str = "forward",
    ) -> None:
        self.stage, self.channel, self._inputs = stage, channel, inputs
        blocks = cast(Sequence[TransformerBlock], stage.blocks)
        self.blocks: list[BlockChunk] = [
            block.start_chunk(grad=grad, channel=channel) for block in blocks
        ]
        self._first = Segment(stage.first, grad=grad) if stage.first is not None else None
        self._ending = _Ending(stage.last, criterion, labels)
        ends = stage.last is not None or criterion is not None
        self._last = Segment(self._ending, grad=grad) if ends else None
        self.outputs: tuple[Tensor, ...] = ()
        self.loss: Tensor | None = None

    @property
    def views(self) -> tuple[int, ...]:
        """Which outputs are views, whose memory does not go with them."""
        return self._ending.views

    def forward(self) -> tuple[Tensor, ...]:
        x = self.begin_forward()
        for block in self.blocks:
            block.attention(x)
            block.plan()
            block.dispatch()
            block.mlp()
            block.combine()
            x = block.output()
        return self.end_forward(x)

    def backward_input(
        self, gradients: Sequence[Tensor | None] = (), *, weight_delay: str = "all"
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs from those of the outputs.

        `weight_delay`: which weight gradients wait for `backward_weight`, see `OverlappedPair`.
        """
        dx = self.begin_backward(gradients)
        if weight_delay != "all":
            self.end_backward_weight()
        for block in reversed(self.blocks):
            assert dx is not None
            block.combine_backward(dx)
            block.mlp_backward()
            if weight_delay == "off":
                block.mlp_backward_weight()
            block.dispatch_backward()
            dx = block.attention_backward(self.stage.aux_loss_scale)
            if weight_delay != "all":
                block.attention_backward_weight()
        found = self.end_backward(dx)
        if weight_delay != "all":
            self.begin_backward_weight()
        return found

    def backward_weight(self) -> None:
        self.end_backward_weight()
        for block in reversed(self.blocks):
            block.mlp_backward_weight()
            block.attention_backward_weight()
        self.begin_backward_weight()

    # ---- The two ends, for schedulers that run the blocks themselves ----

    def begin_forward(self) -> Tensor:
        inputs, self._inputs = self._inputs, ()
        return _one_input(inputs) if self._first is None else self._first.forward(*inputs)[0]

    def end_forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self._like = (x.shape, x.dtype, x.device)
        found = (x,) if self._last is None else self._last.forward(x)
        self.loss, self.outputs = self._ending.split(found)
        return self.outputs

    def begin_backward(self, gradients: Sequence[Tensor | None] = ()) -> Tensor | None:
        if self._last is None:
            (dx,) = gradients
            # None: what follows did not use it. A block's backward exchanges all the same.
            shape, dtype, device = self._like
            return torch.zeros(shape, dtype=dtype, device=device) if dx is None else dx
        return self._last.backward_input(*self._ending.gradients(self.loss, gradients))[0]

    def end_backward_weight(self) -> None:
        """The delayed weight gradients of `last`."""
        if self._last is not None:
            self._last.backward_weight()

    def end_backward(self, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        return (dx,) if self._first is None else self._first.backward_input(dx)

    def begin_backward_weight(self) -> None:
        """The delayed weight gradients of `first`."""
        if self._first is not None:
            self._first.backward_weight()


class ModuleChunk:
    """One micro-batch in any nn.Module, run whole; `recompute` runs it again for the backward."""

    def __init__(
        self,
        module: nn.Module,
        *inputs: Tensor,
        criterion: Criterion | None = None,
        labels: Sequence[Tensor] = (),
        grad: bool = True,
        recompute: bool = False,
    ) -> None:
        self._inputs = inputs
        self._ending = _Ending(None, criterion, labels)
        self._segment = Segment(
            lambda *inputs: self._ending(module(*inputs)), grad=grad, recompute=recompute
        )
        self.outputs: tuple[Tensor, ...] = ()
        self.loss: Tensor | None = None

    @property
    def views(self) -> tuple[int, ...]:
        return self._ending.views

    def forward(self) -> tuple[Tensor, ...]:
        inputs, self._inputs = self._inputs, ()
        self.loss, self.outputs = self._ending.split(self._segment.forward(*inputs))
        return self.outputs

    def backward_input(
        self, gradients: Sequence[Tensor | None] = (), *, weight_delay: str = "all"
    ) -> tuple[Tensor | None, ...]:
        found = self._segment.backward_input(*self._ending.gradients(self.loss, gradients))
        if weight_delay != "all":
            self.backward_weight()
        return found

    def backward_weight(self) -> None:
        self._segment.backward_weight()


class HookChunk:
    """One micro-batch in a module with DeepSeek's hook, a class method

    overlapped_forward_backward(module0, inputs0, criterion0, labels0, module1, loss1, outputs1,
    output_grads1) -> (outputs0, loss0), as in github.com/deepseek-ai/DualPipe. It is called for a
    pair of chunks, and needs the outputs' graphs: they stay in memory until the backward.
    """

    views: tuple[int, ...] = ()

    def __init__(
        self,
        module: nn.Module,
        *inputs: Tensor,
        criterion: Criterion | None = None,
        labels: Sequence[Tensor] = (),
        grad: bool = True,
    ) -> None:
        self.module, self.criterion, self.labels, self._grad = module, criterion, labels, grad
        self._inputs = inputs
        self._outputs: tuple[Tensor, ...] = ()
        self._loss: Tensor | None = None
        self._weights = WeightGradients()
        self.outputs: tuple[Tensor, ...] = ()
        self.loss: Tensor | None = None

    def forward(self) -> tuple[Tensor, ...]:
        self._take_inputs()
        with torch.set_grad_enabled(self._grad), self._weights.collect():
            outputs = _as_tuple(self.module(*self._inputs))
            loss = None if self.criterion is None else self.criterion(*outputs, *self.labels)
        return self._keep(outputs, loss)

    def backward_input(
        self, gradients: Sequence[Tensor | None] = (), *, weight_delay: str = "all"
    ) -> tuple[Tensor | None, ...]:
        if self._loss is not None:
            self._loss.backward()
        else:
            torch.autograd.backward(*self._reached(gradients))
        found = self._take_gradients()
        if weight_delay != "all":
            self.backward_weight()
        return found

    def backward_weight(self) -> None:
        self._weights.run()

    def run_pair(
        self, backward: HookChunk, gradients: Sequence[Tensor | None] = ()
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """This chunk's forward with the whole backward of another one, by the module's hook."""
        self._take_inputs()
        with_loss = backward._loss is not None
        reached: tuple[list[Tensor], list[Tensor]]
        reached = ([], []) if with_loss else backward._reached(gradients)
        hooked: Any = type(self.module)
        with self._weights.collect():
            outputs, loss = hooked.overlapped_forward_backward(
                *(self.module, list(self._inputs), self.criterion, list(self.labels)),
                *(backward.module, backward._loss, *reached),
            )
        found = backward._take_gradients()
        backward.backward_weight()
        return self._keep(_as_tuple(outputs), loss), found

    def _take_inputs(self) -> None:
        self._inputs = tuple(
            x.detach().requires_grad_(self._grad and x.is_floating_point()) for x in self._inputs
        )

    def _keep(self, outputs: tuple[Tensor, ...], loss: Tensor | None) -> tuple[Tensor, ...]:
        self.views = tuple(i for i, y in enumerate(outputs) if is_view(y))
        self._outputs, self._loss = outputs, loss
        self.loss = None if loss is None else loss.detach()
        self.outputs = tuple(y.detach() for y in outputs)
        return self.outputs

    def _reached(self, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
        pairs = zip(self._outputs, gradients, strict=True)
        kept = [(y, dy) for y, dy in pairs if dy is not None and y.requires_grad]
        return [y for y, _ in kept], [dy for _, dy in kept]

    def _take_gradients(self) -> tuple[Tensor | None, ...]:
        found = tuple(x.grad for x in self._inputs)
        self._inputs = self._outputs = ()
        self._loss = None
        return found


Chunk: TypeAlias = StageChunk | ModuleChunk | HookChunk


def start_chunk(
    module: nn.Module, *inputs: Tensor, recompute: bool = False, **options: Any
) -> Chunk:
    """A chunk of `module`, options as in `StageChunk`. `recompute` is for those that run whole."""
    if isinstance(module, TransformerStage):
        return module.start_chunk(*inputs, **options)
    if has_pair_hook(module) and not recompute:
        return HookChunk(module, *inputs, **options)
    return ModuleChunk(module, *inputs, recompute=recompute, **options)


def has_pair_hook(module: nn.Module) -> bool:
    """Whether its class brings DeepSeek's `overlapped_forward_backward`."""
    return callable(getattr(type(module), "overlapped_forward_backward", None))


class _Ending:
    """The end of a stage: its outputs, and the loss where it has a criterion."""

    def __init__(
        self, last: nn.Module | None, criterion: Criterion | None, labels: Sequence[Tensor]
    ) -> None:
        self._last, self._criterion, self._labels = last, criterion, labels
        self.views: tuple[int, ...] = ()

    def __call__(self, *found: Any) -> tuple[Tensor, ...]:
        if self._last is not None:
            found = (self._last(*found),)
        outputs = _as_tuple(found[0])
        self.views = tuple(i for i, y in enumerate(outputs) if is_view(y))
        self._count = len(outputs)
        if self._criterion is None:
            return outputs
        loss = self._criterion(*outputs, *self._labels)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the criterion returned {shape}, a loss is one number: reduce it")
        return (loss, *outputs)

    def split(self, found: tuple[Tensor, ...]) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        if self._criterion is None:
            return None, found
        return found[0], found[1:]

    def gradients(
        self, loss: Tensor | None, given: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Those of what `__call__` returned."""
        if loss is None:
            return tuple(given)
        return (torch.ones_like(loss), *(given or (None,) * self._count))


def _one_input(inputs: tuple[Tensor, ...]) -> Tensor:
    if len(inputs) != 1:
        raise ValueError(
            f"the stage got {len(inputs)} inputs and takes 1: pass first= to join them"
        )
    return inputs[0]


def _as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    for y in outputs:
        if not isinstance(y, Tensor):
            raise TypeError(f"the stage returned a {type(y).__name__}: return tensors only")
    return outputs
