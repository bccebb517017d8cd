"""Weight gradients of the experts: dw [L, N, K] = y[l].T @ x[l], over rows in expert order.

Letters: R rows in expert order, L local experts; y [R, N] is the gradient of a product's result,
x [R, K] its input. Sums are fp32. Triton on a GPU, a loop over experts in plain torch anywhere.
"""

from __future__ import annotations

import torch

from .grouped_options import GroupedOptions, runs_triton
from .grouped_reference import reference_wgrad
from .main_grad import check_main_grad, main_grad_of
from .operator import Operator, check_tma_address, is_aligned, sm_count

__all__ = ["weight_gradient", "wgrad_add_operator", "wgrad_operator"]


def weight_gradient(
    weight: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    expert_offsets: torch.Tensor,
    options: GroupedOptions,
    *,
    total: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The gradient of `weight` [L, N, K], or None where it was added to what is there already.

    It is added to `weight.main_grad` if there is one, else to `total` if that can be added to.

    Args:
        expert_offsets: [L + 1] int32.
        total: the gradient so far, in the weight's dtype or fp32; None if there is none.

    Raises:
        ValueError: `main_grad` is not a contiguous fp32 tensor of the weight's shape and device.
    """
    main_grad = main_grad_of(weight)
    if main_grad is not None:
        check_main_grad(main_grad, weight)
        total = main_grad
    elif total is None or not _can_add(total, weight):
        return wgrad_operator(y, x, expert_offsets, options)
    wgrad_add_operator(total, y, x, expert_offsets, options)
    return None


def _can_add(total: torch.Tensor, weight: torch.Tensor) -> bool:
    fits = (total.shape, total.device) == (weight.shape, weight.device)
    fits = fits and total.dtype in (weight.dtype, torch.float32)
    return fits and total.is_contiguous() and is_aligned(total)


# ---- Operators ----


def _write(dw, y, x, expert_offsets, options: GroupedOptions, *, accumulate: bool) -> None:
    y, x = y.contiguous(), x.contiguous()
    if not runs_triton(y, options.implementation):
        reference_wgrad(y, x, expert_offsets, dw, accumulate)
    elif y.shape[0]:
        from ..triton_kernels.experts.wgrad import grouped_wgrad

        check_tma_address(y=y, x=x, dw=dw)
        sms = sm_count(y, options.num_sms)
        grouped_wgrad(y, x, expert_offsets, dw, num_sms=sms, accumulate=accumulate)
    elif not accumulate:
        dw.zero_()


def _empty_gradient(y, x, expert_offsets) -> torch.Tensor:
    return y.new_empty(expert_offsets.shape[0] - 1, y.shape[1], x.shape[1])


_INPUTS = f"Tensor y, Tensor x, Tensor expert_offsets, {GroupedOptions.schema()}=False"


class _WgradOperator:
    """dw."""

    @staticmethod
    def forward(y, x, expert_offsets, options):
        dw = _empty_gradient(y, x, expert_offsets)
        _write(dw, y, x, expert_offsets, options, accumulate=False)
        return dw

    @staticmethod
    def fake(y, x, expert_offsets, options):
        return _empty_gradient(y, x, expert_offsets)


wgrad_operator = Operator(
    f"grouped_wgrad({_INPUTS}) -> Tensor",
    _WgradOperator,
    GroupedOptions,
)


class _WgradAddOperator:
    """Adds dw to total."""

    @staticmethod
    def forward(total, y, x, expert_offsets, options):
        _write(total, y, x, expert_offsets, options, accumulate=True)


wgrad_add_operator = Operator(
    f"grouped_wgrad_(Tensor(a!) total, {_INPUTS}) -> ()",
    _WgradAddOperator,
    GroupedOptions,
)
