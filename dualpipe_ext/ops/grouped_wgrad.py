"""Weight gradients of the experts: dw [L, N, K] = y[l].T @ x[l], over rows in expert order.

Letters: R rows in expert order, L local experts; y [R, N] is the gradient of a product's result,
x [R, K] its input. Sums are fp32. Triton on a GPU, a loop over experts in plain torch anywhere.
"""

from __future__ import annotations

import os

import torch

from .grouped_reference import reference_wgrad
from .operator import check_tma_address, define, device_facts, has_triton, sm_count

__all__ = ["IMPLEMENTATIONS", "runs_triton", "weight_gradient"]

IMPLEMENTATIONS = ("auto", "triton", "reference")


def weight_gradient(
    weight: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    *how,
    total: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The gradient of `weight` [L, N, K], or None where it was added to what is there already.

    It is added to `weight.main_grad` if there is one, else to `total` if that can be added to.

    Args:
        how: expert_offsets [L + 1] int32, num_sms (0 = all), implementation, take_over.
        total: the gradient so far, in the weight's dtype or fp32; None if there is none.

    Raises:
        ValueError: `main_grad` is not a contiguous fp32 tensor of the weight's shape and device.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is not None:
        _check_main_grad(main_grad, weight)
    elif total is None or not _can_add(total, weight):
        return _wgrad_operator(y, x, *how)
    _wgrad_add_operator(total if main_grad is None else main_grad, y, x, *how)
    return None


def _can_add(total: torch.Tensor, weight: torch.Tensor) -> bool:
    like = (total.shape, total.device) == (weight.shape, weight.device)
    dtype = total.dtype in (weight.dtype, torch.float32)
    return like and dtype and total.is_contiguous() and total.data_ptr() % 16 == 0


def _check_main_grad(main_grad: torch.Tensor, weight: torch.Tensor) -> None:
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


def runs_triton(tensor: torch.Tensor, implementation: str) -> bool:
    """Whether the grouped GEMMs run as Triton kernels on `tensor`.

    Raises:
        ValueError, TypeError: implementation="triton", and they cannot.
    """
    if implementation == "reference":
        return False
    if tensor.is_cuda:
        fits = device_facts(tensor.device)[1] >= (9, 0)
        if implementation == "auto":
            return fits and tensor.dtype == torch.bfloat16 and has_triton()
        if not fits:
            raise ValueError(
                f"implementation='triton' needs TMA, compute capability 9.0: {tensor.device} has "
                f"{device_facts(tensor.device)[1]}; pass implementation='auto'"
            )
        if tensor.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"implementation='triton' takes bfloat16 or float16 on a GPU, rows are "
                f"{tensor.dtype}: pass implementation='auto'"
            )
        return True
    if implementation == "auto":
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    raise ValueError(
        f"implementation='triton' needs a GPU, rows are on {tensor.device}: pass "
        "implementation='auto', or set TRITON_INTERPRET=1 to run Triton's interpreter"
    )


# ---- Operators ----


def _wgrad_into(dw, accumulate, y, x, expert_offsets, num_sms, implementation, take_over=False):
    y, x = y.contiguous(), x.contiguous()
    if not runs_triton(y, implementation):
        reference_wgrad(y, x, expert_offsets, dw, accumulate)
    elif y.shape[0]:
        from ..triton_kernels.experts.wgrad import grouped_wgrad

        check_tma_address(y=y, x=x, dw=dw)
        how = {"num_sms": sm_count(y, num_sms), "accumulate": accumulate}
        grouped_wgrad(y, x, expert_offsets, dw, **how)
    elif not accumulate:
        dw.zero_()


def _wgrad_new(y, x, expert_offsets, *how):
    dw = _wgrad_fake(y, x, expert_offsets)
    _wgrad_into(dw, False, y, x, expert_offsets, *how)
    return dw


def _wgrad_fake(y, x, expert_offsets, *how):
    return y.new_empty(expert_offsets.shape[0] - 1, y.shape[1], x.shape[1])


def _wgrad_add(total, *y_x_and_how):
    _wgrad_into(total, True, *y_x_and_how)


_HOW = "int num_sms, str implementation, bool take_over=False"
_wgrad_operator = define(
    f"grouped_wgrad(Tensor y, Tensor x, Tensor expert_offsets, {_HOW}) -> Tensor",
    _wgrad_new,
    _wgrad_fake,
)
_wgrad_add_operator = define(
    f"grouped_wgrad_(Tensor(a!) total, Tensor y, Tensor x, Tensor expert_offsets, {_HOW}) -> ()",
    _wgrad_add,
    lambda *arguments: None,
)
