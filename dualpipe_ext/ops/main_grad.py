"""`main_grad`: an fp32 tensor on a parameter, in which the gradients of micro-batches are summed.

Megatron's convention. A parameter that has one gets its gradients there; its `grad` stays None, and
autograd sees no gradient for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "carry_main_grad",
    "check_main_grad",
    "gradient_of",
    "keep_main_grads",
    "main_grad_of",
    "restore_main_grads",
]


def main_grad_of(parameter: Tensor) -> Tensor | None:
    return getattr(parameter, "main_grad", None)


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The gradient that an optimizer will use: `main_grad` where there is one, else `grad`."""
    main_grad = getattr(parameter, "main_grad", None)
    return parameter.grad if main_grad is None else main_grad


def check_main_grad(main_grad: Tensor, weight: Tensor) -> None:
    """ValueError unless kernels can add to it: contiguous fp32 of the weight's shape and device."""
    if (
        main_grad.dtype != torch.float32
        or main_grad.shape != weight.shape
        or main_grad.device != weight.device
        or not main_grad.is_contiguous()
    ):
        raise ValueError(
            f"main_grad is {tuple(main_grad.shape)} {main_grad.dtype} on {main_grad.device} with "
            f"strides {main_grad.stride()}: pass a contiguous torch.float32 tensor of the weight's "
            f"shape {tuple(weight.shape)} on {weight.device}"
        )


def carry_main_grad(weight: Tensor, copy: Tensor) -> Tensor:
    """`copy`, such as a cast of `weight`, whose gradient goes where that of `weight` would."""
    main_grad = getattr(weight, "main_grad", None)
    if copy is not weight and main_grad is not None:
        copy.main_grad = main_grad  # type: ignore[attr-defined]  # Megatron\'s, not torch\'s
    return copy


def keep_main_grads(ctx, *weights: Tensor) -> None:
    """For `restore_main_grads`: a checkpoint hands bare aliases of the weights to the backward."""
    ctx.main_grads = [getattr(weight, "main_grad", None) for weight in weights]


def restore_main_grads(ctx, *weights: Tensor) -> None:
    for weight, main_grad in zip(weights, ctx.main_grads, strict=True):
        if main_grad is not None and not hasattr(weight, "main_grad"):
            weight.main_grad = main_grad  # type: ignore[attr-defined]  # Megatron\'s, not torch\'s
