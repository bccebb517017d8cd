"""The grouped MLP in autograd, whatever its products: what a forward keeps, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .grouped_options import GroupedOptions
from .grouped_wgrad import weight_gradient
from .main_grad import keep_main_grads, restore_main_grads

__all__ = ["gradients", "keep_forward"]


def keep_forward(
    ctx,
    rows: torch.Tensor,
    row_weight: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    expert_offsets: torch.Tensor,
    *products: torch.Tensor,
    options: GroupedOptions,
) -> None:
    """For `gradients`: inputs of a forward, its options, and what its `products` need besides."""
    ctx.options = options
    keep_main_grads(ctx, w13, w2)
    ctx.save_for_backward(rows, row_weight, w13, w2, expert_offsets, *products)


def gradients(
    ctx, dout: torch.Tensor, input_gradients: Callable, needs_weights: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """drows, drow_weight, dw13 and dw2; None for a weight that needs none, or has a main_grad.

    ``input_gradients(dout, row_weight, w13, w2, expert_offsets, *products, options)`` computes
    drows, drow_weight, d_gate_up and act.
    """
    rows, row_weight, w13, w2, expert_offsets, *products = ctx.saved_tensors
    options = ctx.options
    drows, drow_weight, d_gate_up, act = input_gradients(
        dout, row_weight, w13, w2, expert_offsets, *products, options
    )
    restore_main_grads(ctx, w13, w2)
    dw13 = dw2 = None
    if needs_weights[0]:
        dw13 = weight_gradient(w13, d_gate_up, rows, expert_offsets, options)
    if needs_weights[1]:
        dw2 = weight_gradient(w2, dout, act, expert_offsets, options)
    return drows, drow_weight, dw13, dw2
