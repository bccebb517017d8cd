"""Cross-entropy of the last stage: loss and gradient over [T, V] logits, fused.

Letters: T rows, V vocabulary.

    lse = log Σ exp(x);  loss of a row = lse − x[target] + z_loss · lse²

On a GPU one Triton kernel each way, within `num_sms` SMs, counted at run time; elsewhere, and for
fp64, plain torch with the same meaning. Arithmetic is fp32 (fp64 for fp64). Results have the same
bits in every run and for every `num_sms`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operator import (
    Operator,
    Options,
    check_num_sms,
    device_facts,
    has_gluon,
    is_aligned,
    sm_count,
    use_triton,
    wide,
)

__all__ = ["CrossEntropyOptions", "cross_entropy", "losses"]

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class CrossEntropyOptions(Options):
    """As in `cross_entropy`."""

    ignore_index: int
    z_loss: float
    num_sms: int  # 0 = all

    def of_kernel(self, logits: Tensor) -> dict:
        """As the kernels take them."""
        return {
            "ignore_index": self.ignore_index,
            "z_loss": self.z_loss,
            "num_sms": sm_count(logits, self.num_sms),
        }


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    inplace: bool = False,
    num_sms: int | None = None,
) -> Tensor:
    """Cross-entropy of ``logits`` [..., V] with ``targets`` [...] integers; differentiable.

    Args:
        ignore_index: rows with this target have loss and gradient 0.
        z_loss: factor on the square of the log of the sum of exponentials (PaLM: 1e-4), which keeps
            it near 0.
        reduction: ``"mean"`` over the rows that are not ignored (0 if there are none), ``"sum"``,
            or ``"none"``: fp32 (fp64 for fp64) [...].
        inplace: write the gradient over the logits, already in the forward: they are read once
            instead of twice, and no second [T, V] is needed. The logits are lost. Needs "mean" or
            "sum". A backward that scales the loss by other than 1 costs one more pass.
        num_sms: SMs that the kernels may take; None takes all.

    A target outside of 0..V−1 that is not ``ignore_index`` makes its row's loss and gradient NaN:
    to raise an error the host would have to wait for the device.

    Raises:
        TypeError: logits that are not floating, targets that are not integers.
        ValueError: shapes that do not fit, an unknown reduction, ``inplace`` with "none".
    """
    rows, row_targets = _check(logits, targets, reduction, inplace)
    options = CrossEntropyOptions(ignore_index, float(z_loss), check_num_sms(num_sms))
    if inplace and torch.is_grad_enabled() and logits.requires_grad:
        factor = _factor(row_targets, ignore_index, reduction, wide(logits.dtype))
        loss = _InPlace.apply(rows, row_targets, factor, options)
        return loss.sum() * factor[0]
    loss, _ = cross_entropy_operator(rows, row_targets, options)
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() * _factor(row_targets, ignore_index, reduction, loss.dtype)[0]


def _check(logits, targets, reduction, inplace) -> tuple[Tensor, Tensor]:
    if not logits.is_floating_point():
        raise TypeError(f"logits are {logits.dtype}: pass a floating-point tensor")
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets are {targets.dtype}: pass torch.int64 or torch.int32")
    if logits.dim() == 0 or logits.shape[-1] == 0 or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets are {tuple(targets.shape)}, logits {tuple(logits.shape)}: pass one target a "
            f"row, {tuple(logits.shape[:-1])}, and at least one class"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: pass one of {REDUCTIONS}")
    if inplace and reduction == "none":
        raise ValueError("inplace with reduction='none': pass 'mean' or 'sum', or inplace=False")
    rows = logits.reshape(-1, logits.shape[-1])
    if inplace and rows.data_ptr() != logits.data_ptr():
        raise ValueError(
            f"logits with strides {logits.stride()} are no rows to write over: pass them "
            "contiguous, or inplace=False"
        )
    return rows, targets.reshape(-1).contiguous()


def _factor(targets: Tensor, ignore_index: int, reduction: str, dtype: torch.dtype) -> Tensor:
    """[1]: what every row's loss is multiplied with, on the device."""
    if reduction == "sum":
        return torch.ones(1, dtype=dtype, device=targets.device)
    return 1 / (targets != ignore_index).sum(dim=0, keepdim=True).clamp_min(1).to(dtype)


class _InPlace(torch.autograd.Function):
    """Losses [T], with the gradient of factor · Σ loss in place of the logits."""

    @staticmethod
    def forward(ctx, logits, targets, factor, options):
        gradient = logits.detach()
        loss = cross_entropy_in_place_operator.dispatch(gradient, targets, factor, options)
        ctx.gradient, ctx.factor, ctx.num_sms = gradient, factor, options.num_sms
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError(
                "the gradient of an in-place cross-entropy has been used: pass inplace=False for "
                "more than one backward"
            )
        # All of d_loss is the gradient of the mean or sum, times factor: 1 unless that was scaled.
        scale = d_loss[:1] / ctx.factor
        scale_rows_operator.dispatch(gradient, scale, ctx.num_sms)
        return gradient, None, None, None


# ---- Plain torch ----


def _gradient(logits, targets, lse, d_loss, options: CrossEntropyOptions) -> Tensor:
    """d_loss [T] or [1] times the gradient of every row's loss, in the dtype of lse."""
    V = logits.shape[1]
    known = (targets >= 0) & (targets < V)
    d_loss = torch.where(known, d_loss, torch.nan)
    slope = d_loss * (1 + 2 * options.z_loss * lse)
    gradient = (logits.to(lse.dtype) - lse[:, None]).exp() * slope[:, None]
    gradient.scatter_add_(1, targets.long().clamp(0, V - 1)[:, None], -d_loss[:, None])
    return gradient.masked_fill_((targets == options.ignore_index)[:, None], 0)


def losses(logits, targets, options: CrossEntropyOptions) -> tuple[Tensor, Tensor]:
    """The loss and the lse of every row, [T] each."""
    V = logits.shape[1]
    x = logits.to(wide(logits.dtype))
    lse = x.logsumexp(dim=1)
    at_target = x.gather(1, targets.long().clamp(0, V - 1)[:, None])[:, 0]
    loss = lse - at_target + options.z_loss * lse.square()
    loss = torch.where((targets >= 0) & (targets < V), loss, torch.nan)
    return loss.masked_fill(targets == options.ignore_index, 0), lse


# ---- Kernels ----


def _takes_kernels(logits: Tensor) -> bool:
    return use_triton(logits) and logits.numel() != 0


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _fits_hopper(rows: Tensor) -> bool:
    """Whether rows are 16-bit numbers that lie evenly, on a Hopper GPU."""
    if not rows.is_cuda or rows.element_size() != 2 or not is_aligned(rows):
        return False
    if rows.shape[1] % 8 or rows.stride(0) % 8:
        return False
    return device_facts(rows.device)[1][0] == 9 and has_gluon()


# ---- Operators ----


class _CrossEntropyOperator:
    """The loss and the lse of every row, [T] each."""

    @staticmethod
    def forward(logits, targets, options):
        if not _takes_kernels(logits):
            return losses(logits, targets, options)
        loss = logits.new_empty(logits.shape[:1], dtype=wide(logits.dtype))
        lse = torch.empty_like(loss)
        rows = _rows(logits)
        if _fits_hopper(rows):
            from ..triton_kernels.elementwise.cross_entropy_hopper import cross_entropy_loss

            cross_entropy_loss(rows, targets, loss, lse, **options.of_kernel(logits))
        else:
            from ..triton_kernels.elementwise import cross_entropy as kernels

            kernels.cross_entropy(rows, targets, loss, lse=lse, **options.of_kernel(logits))
        return loss, lse

    plain = staticmethod(losses)

    @staticmethod
    def save(ctx, inputs, output):
        logits, targets, ctx.options = inputs
        _, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(logits, targets, lse)

    @staticmethod
    def backward(ctx, d_loss, _d_lse):
        return (cross_entropy_backward_operator(d_loss, *ctx.saved_tensors, ctx.options),)


cross_entropy_operator = Operator(
    f"cross_entropy(Tensor logits, Tensor targets, {CrossEntropyOptions.schema()}) "
    "-> (Tensor, Tensor)",
    _CrossEntropyOperator,
    CrossEntropyOptions,
)


class _CrossEntropyBackwardOperator:
    """The gradient of the logits [T, V] from that of every row's loss, d_loss [T]."""

    @staticmethod
    def forward(d_loss, logits, targets, lse, options):
        if not _takes_kernels(logits):
            return cross_entropy_backward_operator.plain(d_loss, logits, targets, lse, options)
        from ..triton_kernels.elementwise import cross_entropy as kernels

        gradient = logits.new_empty(logits.shape)
        kernels.cross_entropy_gradient(
            d_loss, _rows(logits), targets, lse, gradient, **options.of_kernel(logits)
        )
        return gradient

    @staticmethod
    def plain(d_loss, logits, targets, lse, options):
        gradient = _gradient(logits, targets, lse, d_loss, options)
        return gradient.to(logits.dtype).contiguous()


cross_entropy_backward_operator = Operator(
    "cross_entropy_backward(Tensor d_loss, Tensor logits, Tensor targets, Tensor lse, "
    f"{CrossEntropyOptions.schema()}) -> Tensor",
    _CrossEntropyBackwardOperator,
    CrossEntropyOptions,
)


class _CrossEntropyInPlaceOperator:
    """The loss of every row [T]; the gradient of factor [1] times their sum replaces the logits."""

    @staticmethod
    def forward(logits, targets, factor, options):
        if not _takes_kernels(logits):
            loss, lse = losses(logits, targets, options)
            logits.copy_(_gradient(logits, targets, lse, factor, options))
            return loss
        from ..triton_kernels.elementwise import cross_entropy as kernels

        rows = _rows(logits)
        loss = logits.new_empty(logits.shape[:1], dtype=torch.float32)
        kernels.cross_entropy(
            rows, targets, loss, gradient=rows, factor=factor, **options.of_kernel(logits)
        )
        if rows is not logits:
            logits.copy_(rows)
        return loss

    @staticmethod
    def fake(logits, targets, factor, options):
        return logits.new_empty(logits.shape[:1], dtype=wide(logits.dtype))


cross_entropy_in_place_operator = Operator(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor factor, "
    f"{CrossEntropyOptions.schema()}) -> Tensor",
    _CrossEntropyInPlaceOperator,
    CrossEntropyOptions,
)


class _ScaleRowsOperator:
    """rows [T, V] times factor [1]."""

    @staticmethod
    def forward(rows, factor, num_sms):
        if rows.numel() == 0:
            return
        if not use_triton(rows) or rows.stride(1) != 1:
            rows.mul_(factor)
            return
        from ..triton_kernels.elementwise import cross_entropy as kernels

        kernels.scale_rows(rows, factor, num_sms=sm_count(rows, num_sms))


scale_rows_operator = Operator(
    "scale_rows_(Tensor(a!) rows, Tensor factor, int num_sms) -> ()",
    _ScaleRowsOperator,
)
