"""Weight gradients that wait for their turn, and the linear layer that leaves them for later.

The gradient of a layer's inputs is needed at once, by the layer before it; that of its weights only
by the optimizer. Zero-bubble schedules (Qi et al. 2024, arXiv 2401.10241) and DualPipe fill waits
with the second. While a `WeightGradients` collects, `linear` computes the first in autograd's
backward and leaves the second there; `run` computes it and adds it as autograd would have.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..compat import call_post_accumulate_hooks, has_tensor_hooks
from ..ops.main_grad import gradient_of, main_grad_of
from ..ops.operator import autocast_off, wide

__all__ = [
    "DelayedLinear",
    "WeightGradients",
    "accumulate",
    "add_linear",
    "delay_linears",
    "linear",
    "run_backward",
]

# Of parameters' gradients so far; see `WeightGradients.add`.
Compute = Callable[[list[Tensor | None]], Sequence[Tensor | None]]

# Who collects in the forward that runs now: a name for it, the gradients themselves are in objects.
_collector: ContextVar["WeightGradients | None"] = ContextVar("collector", default=None)


class WeightGradients:
    """The weight gradients of one micro-batch in one piece of a model, until `run`.

    Example, the two halves of a backward apart::

        later = WeightGradients()
        with later.collect():
            y = model(x)  # built of DelayedLinear
        y.backward(dy)    # x.grad, and whatever is not a DelayedLinear's weight
        later.run()       # the gradients of the DelayedLinear weights
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Sequence[nn.Parameter], Compute]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """In this context `linear` leaves its weight gradients here when its backward runs."""
        token = _collector.set(self)
        try:
            yield
        finally:
            _collector.reset(token)

    def add(self, parameters: Sequence[nn.Parameter], compute: Compute) -> None:
        """`run` will call `compute(totals)` and add what it returns to the parameters' gradients.

        A total is a parameter's gradient so far where it may be added to in place, else None. For
        each of them `compute` adds to it and returns None, or leaves it and returns a gradient.
        """
        self._waiting.append((parameters, compute))

    def run(self) -> None:
        """Compute what waits, in the order in which it came."""
        waiting, self._waiting = self._waiting, []
        for parameters, compute in waiting:  # one by one: at most one's gradients are in memory
            with torch.no_grad():
                totals = [_total(parameter) for parameter in parameters]
                gradients = compute(totals)
            accumulate(parameters, gradients)
            for parameter, total, gradient in zip(parameters, totals, gradients, strict=True):
                if total is not None and gradient is None and total is parameter.grad:
                    call_post_accumulate_hooks(parameter)


def _total(parameter: nn.Parameter) -> Tensor | None:
    """A parameter's gradient so far, for sums in place; None where autograd must add.

    That is where there is no plain tensor yet, or one that is part of a graph, and where somebody
    may want to see each gradient by itself.
    """
    total = gradient_of(parameter)
    if type(total) is not Tensor or total.requires_grad or not total.is_contiguous():
        return None
    if not parameter.requires_grad or (main_grad_of(parameter) is None and _is_watched(parameter)):
        return None
    return total


def _is_watched(parameter: nn.Parameter) -> bool:
    """Whether it has a tensor hook, or somebody keeps autograd's node for it, on which hooks may be
    (DDP's are). A node that nobody keeps goes with what is written on it."""
    if has_tensor_hooks(parameter) or torch.is_inference_mode_enabled():
        return True
    _metadata(parameter)["dualpipe_ext"] = "seen"
    return "dualpipe_ext" in _metadata(parameter)


def _metadata(parameter: nn.Parameter) -> Any:  # a dict, which torch declares as a method
    return get_gradient_edge(parameter).node.metadata


def accumulate(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Add to each parameter's gradient as autograd would, its hooks included (DDP, FSDP).

    A parameter with an fp32 `main_grad` gets it there and no hooks run (Megatron's convention).
    """
    leaves, leaf_gradients = [], []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None or not parameter.requires_grad:
            continue
        main_grad = main_grad_of(parameter)
        if main_grad is not None:
            main_grad.add_(gradient)
        else:
            leaves.append(parameter)
            leaf_gradients.append(gradient.to(parameter.dtype))
    if leaves:
        run_backward(leaves, leaf_gradients)


def run_backward(
    ends: Sequence[Tensor] | Sequence[GradientEdge], gradients: Sequence[Tensor]
) -> None:
    """torch.autograd.backward in this thread: autograd's own for a GPU is a hand-over away."""
    with torch.autograd.set_multithreading_enabled(False):
        torch.autograd.backward(ends, gradients)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` whose gradients of `weight` and `bias` wait while a `WeightGradients` collects.

    x [..., in], weight [out, in], bias [out] → [..., out]. Under autocast all take its dtype. Falls
    back to `F.linear` where nothing collects, no gradient is wanted, `weight` is no plain parameter
    (a DTensor, a computed weight), or x carries no gradient, because autograd would not come by. So
    it does in torch.compile, whose graphs have the weights' gradients in their backward.
    """
    store = None if torch.compiler.is_compiling() else _collector.get()
    plain = type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)
    if store is None or not plain or not (torch.is_grad_enabled() and x.requires_grad):
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    parameters = (weight,) if bias is None else (weight, bias)
    y: Tensor = _DelayedLinear.apply(x, parameters, store)
    return y


class _DelayedLinear(torch.autograd.Function):
    """The parameters come in a tuple, which autograd does not look into: they stay off its graph.

    Were they on it, their gradient hooks would fire in this backward, before the gradient is there.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parameters: Sequence[nn.Parameter], store: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.parameters, ctx.store = parameters, store
        with autocast_off(x.device.type):
            return F.linear(x, *(parameter.to(x.dtype) for parameter in parameters))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        add_linear(ctx.store, ctx.parameters, x, dy)
        return dy @ ctx.parameters[0].to(dy.dtype), None, None


def add_linear(
    store: WeightGradients, parameters: Sequence[nn.Parameter], x: Tensor, dy: Tensor
) -> None:
    """Leaves the gradients of a linear layer's weight, and of its bias, for `store.run`."""

    def compute(totals: list[Tensor | None]) -> list[Tensor | None]:
        dy_2d, x_2d = dy.flatten(0, -2), x.flatten(0, -2)
        gradients: list[Tensor | None] = [None] * len(parameters)
        added = totals[0] is not None and _add_product(totals[0], dy_2d.T, x_2d)
        if parameters[0].requires_grad and not added:
            gradients[0] = dy_2d.T @ x_2d
        if len(parameters) > 1:
            gradients[1] = dy_2d.sum(0)
        return gradients

    if any(parameter.requires_grad for parameter in parameters):
        store.add(parameters, compute)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> bool:
    """total += a @ b within the GEMM; False where there is none that can."""
    if not a.numel():
        return True
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return True
    sums_fp32 = a.is_cuda and total.dtype == wide(a.dtype) == torch.float32
    if sums_fp32 and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(total, a, b, torch.float32, out=total)
        return True
    return False


class DelayedLinear(nn.Linear):
    """`nn.Linear` whose weight gradient a scheduler may delay; elsewhere the same as nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def delay_linears(module: nn.Module) -> nn.Module:
    """Turn every plain `nn.Linear` inside `module` into a `DelayedLinear`, in place.

    Parameters, names and results stay. A subclass of nn.Linear keeps its own forward, untouched.
    """
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = DelayedLinear
    return module
