"""RMSNorm, with the residual's sum in the same kernel.

    normed, x = rms_norm(y, weight, residual=x)     # x + y, and its norm

Letters: T tokens in any number of dimensions, H their width.

On a GPU one Triton kernel each way, within `num_sms` SMs, counted at run time; elsewhere, and for
fp64, plain torch with the same meaning. Arithmetic is fp32 (fp64 for fp64) whatever the dtype.
Results have the same bits in every run and for every `num_sms`.
"""

from __future__ import annotations

from torch import Tensor

from .operator import Operator, check_num_sms, sm_count, use_triton, wide

__all__ = ["norm_backward_operator", "norm_operator", "rms_norm"]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    num_sms: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm (arXiv 1910.07467) of ``x``, or of ``x + residual``; differentiable in all three.

    Args:
        x: [..., H] of a floating dtype.
        weight: [H] of any floating dtype.
        residual: like ``x``.
        eps: added to the mean of squares.
        num_sms: SMs that the kernels may take; None takes all.

    Returns:
        ``normed`` [..., H] in the dtype of ``x``; with a residual the pair of it and ``x +
        residual``, rounded to that dtype before it is normalised.

    Raises:
        TypeError: ``x`` is not floating, or ``residual`` of another dtype.
        ValueError: shapes that do not fit.
    """
    if not x.is_floating_point() or not weight.is_floating_point():
        raise TypeError(f"x is {x.dtype}, weight {weight.dtype}: pass floating-point tensors")
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight is {tuple(weight.shape)}, x {tuple(x.shape)}: pass one weight a column, "
            f"{tuple(x.shape[-1:])}"
        )
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual is {residual.dtype}, x {x.dtype}: pass one dtype")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual is {tuple(residual.shape)}, x {tuple(x.shape)}: pass one shape, the kernel "
            "does not broadcast"
        )
    sms = check_num_sms(num_sms)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    flat_residual = None if residual is None else residual.reshape(flat.shape)
    normed, hidden, _ = norm_operator(flat, flat_residual, weight, eps, sms)
    normed = normed.view(x.shape)
    return normed if residual is None else (normed, hidden.view(x.shape))


def _norm_kernels(x: Tensor, weight: Tensor):
    """The module of the kernels if they take these tensors."""
    if not use_triton(x, weight) or x.numel() == 0:
        return None
    from ..triton_kernels.elementwise import norm

    return norm if x.shape[1] <= norm.MAX_WIDTH else None


def _rows(x: Tensor | None) -> Tensor | None:
    """[T, H] with contiguous rows: a copy only if it must be."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


class _NormOperator:
    """normed [T, H]; x + residual [T, H], or [0] without a residual; 1 / root mean square [T]."""

    @staticmethod
    def forward(x, residual, weight, eps, num_sms):
        kernels = _norm_kernels(x, weight)
        if kernels is None:
            return norm_operator.plain(x, residual, weight, eps, num_sms)
        normed = x.new_empty(x.shape)
        hidden = None if residual is None else x.new_empty(x.shape)
        rstd = x.new_empty(x.shape[:1], dtype=wide(x.dtype))
        kernels.rms_norm(
            _rows(x),
            _rows(residual),
            weight.contiguous(),
            normed,
            hidden,
            rstd,
            eps,
            num_sms=sm_count(x, num_sms),
        )
        return normed, x.new_empty(0) if hidden is None else hidden, rstd

    @staticmethod
    def plain(x, residual, weight, eps, num_sms):
        math = wide(x.dtype)
        hidden = x if residual is None else (x.to(math) + residual.to(math)).to(x.dtype)
        rstd = (hidden.to(math).square().mean(dim=1) + eps).rsqrt()
        normed = (hidden.to(math) * rstd[:, None] * weight.to(math)).to(x.dtype).contiguous()
        return normed, x.new_empty(0) if residual is None else hidden.contiguous(), rstd

    @staticmethod
    def save(ctx, inputs, output):
        x, residual, weight, _, ctx.num_sms = inputs
        _, hidden, rstd = output
        ctx.has_residual = residual is not None
        ctx.mark_non_differentiable(rstd)
        ctx.save_for_backward(hidden if ctx.has_residual else x, weight, rstd)

    @staticmethod
    def backward(ctx, d_normed, d_hidden, _d_rstd):
        hidden, weight, rstd = ctx.saved_tensors
        if not ctx.has_residual:
            d_hidden = None
        if d_normed is None:  # only x + residual was used
            return d_hidden, d_hidden
        dx, d_weight = norm_backward_operator(d_normed, d_hidden, hidden, weight, rstd, ctx.num_sms)
        return dx, dx if ctx.has_residual else None, d_weight


norm_operator = Operator(
    "rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, int num_sms) "
    "-> (Tensor, Tensor, Tensor)",
    _NormOperator,
)


class _NormBackwardOperator:
    """Gradients of hidden, what was normalised, [T, H], with d_hidden added, and of weight [H]."""

    @staticmethod
    def forward(d_normed, d_hidden, hidden, weight, rstd, num_sms):
        kernels = _norm_kernels(hidden, weight)
        if kernels is None:
            return norm_backward_operator.plain(d_normed, d_hidden, hidden, weight, rstd, num_sms)
        dx = hidden.new_empty(hidden.shape)
        d_weight = kernels.rms_norm_backward(
            _rows(d_normed),
            _rows(d_hidden),
            _rows(hidden),
            weight.contiguous(),
            rstd,
            dx,
            num_sms=sm_count(hidden, num_sms),
        )
        return dx, d_weight

    @staticmethod
    def plain(d_normed, d_hidden, hidden, weight, rstd, num_sms):
        math = wide(hidden.dtype)
        unit = hidden.to(math) * rstd[:, None]
        d_weight = (d_normed.to(math) * unit).sum(dim=0)
        slope = d_normed.to(math) * weight.to(math)
        dx = rstd[:, None] * (slope - unit * (slope * unit).mean(dim=1, keepdim=True))
        if d_hidden is not None:
            dx = dx + d_hidden.to(math)
        return dx.to(hidden.dtype).contiguous(), d_weight.to(weight.dtype)


norm_backward_operator = Operator(
    "rms_norm_backward(Tensor d_normed, Tensor? d_hidden, Tensor hidden, Tensor weight, "
    "Tensor rstd, int num_sms) -> (Tensor, Tensor)",
    _NormBackwardOperator,
)
