"""A piece of a model with a piece of the autograd graph of its own.

A pair of micro-batches interleaves the pieces of a block, so each piece's backward must be callable
by itself: a `Segment` cuts the graph at its inputs and outputs.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint

from .delayed import WeightGradients, run_backward

__all__ = ["Segment"]


class Segment:
    """One call of `function`: `forward`, `backward_input`, `backward_weight`, each once.

    The backward for inputs is autograd's, gradients of parameters included, except those that
    `weight_gradients.linear` leaves for `backward_weight`. So a foreign module works as it is, with
    everything in `backward_input`; with its nn.Linear layers turned by `delay_linears`, all but the
    small change (norm scales, embeddings) waits. Nothing runs twice and no graph is kept for it.

    Args:
        function: tensors → a tensor or a tuple of them. What it closes over gets no gradient,
            except parameters.
        grad: False runs the forward only.
        recompute: keep the inputs only and run `function` again for the backward, with the same
            random numbers (torch.utils.checkpoint, not reentrant).
    """

    def __init__(
        self, function: Callable[..., Any], *, grad: bool = True, recompute: bool = False
    ) -> None:
        self._function: Callable[..., Any] | None = function
        self._grad, self._recompute = grad, recompute
        self._weights = WeightGradients()
        self._leaves: tuple[Tensor, ...] = ()
        self._ends: tuple[GradientEdge | None, ...] = ()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, cut off from the graph. Floating inputs get a gradient, others do not."""
        function = self._function
        assert function is not None, "a segment's forward runs once"
        if not self._grad:
            with torch.no_grad():
                return _as_tuple(function(*inputs))
        leaves = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
        with torch.enable_grad(), self._weights.collect():
            if self._recompute:
                outputs = checkpoint(
                    function,
                    *leaves,
                    use_reentrant=False,
                    # The second run must save what the first did, so `linear` collects there, too.
                    context_fn=lambda: (nullcontext(), self._weights.collect()),
                )
            else:
                outputs = function(*leaves)
        outputs = _as_tuple(outputs)
        # Ends of the graph and not tensors: what was sent away need not stay in memory.
        self._ends = tuple(get_gradient_edge(y) if y.requires_grad else None for y in outputs)
        self._leaves, self._function = leaves, None
        return tuple(y.detach() for y in outputs)

    def backward_input(self, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs from those of the outputs; None stands for zero on both sides."""
        reached = [
            (end, gradient)
            for end, gradient in zip(self._ends, gradients, strict=True)
            if end is not None and gradient is not None
        ]
        if reached:
            ends, given = zip(*reached, strict=True)
            run_backward(ends, given)
        found = tuple(leaf.grad for leaf in self._leaves)
        self._leaves = self._ends = ()
        return found

    def backward_weight(self) -> None:
        """The weight gradients that `backward_input` left."""
        self._weights.run()


def _as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
