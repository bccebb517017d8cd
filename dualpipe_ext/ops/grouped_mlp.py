"""The experts' MLP over rows in expert order: forward, input gradients and weight gradients apart.

Letters: R rows in expert order, H hidden, I expert width, L local experts.

    gate, up = rows @ w13[l].T          w13 [L, 2I, H], rows 0..I-1 gate, I..2I-1 up
    act      = silu(gate) * up * row_weight[:, None]
    out      = act @ w2[l].T            w2 [L, H, I]

Sums are fp32 (fp64 for fp64 inputs). The routing weight is part of the activation, so that combine
is a plain sum. Products are of bf16 (grouped_bf16.py) or fp8 (grouped_fp8.py); both have two
implementations that compute the same: Triton on the GPU, and a loop over experts in plain torch
anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import grouped_bf16, grouped_fp8
from .fp8 import dequantize_rows
from .grouped_options import GroupedOptions
from .grouped_saved import MLPSaved
from .grouped_wgrad import weight_gradient
from .operator import check_implementation, check_num_sms, wide

__all__ = ["MLPSaved", "grouped_mlp", "mlp_dgrad", "mlp_forward", "mlp_wgrad"]


def grouped_mlp(
    rows: torch.Tensor,
    row_weight: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    expert_offsets: torch.Tensor,
    *,
    num_sms: int | None = None,
    take_over: bool = False,
    implementation: str = "auto",
    precision: str = "bf16",
) -> torch.Tensor:
    """SwiGLU MLP of each expert on its rows; differentiable in rows, row_weight, w13 and w2.

    rows            [R, H] in expert order; rows that pad an expert to the alignment are zero
    row_weight      [R] fp32 routing weight of each row (fp64 beside fp64 rows)
    w13, w2         [L, 2I, H], [L, H, I], contiguous, dtype of rows; H and I multiples of 8
    expert_offsets  [L + 1] int32 on the device of rows: first row of each expert, multiples of 128,
                    last <= R. The host does not read it on the Triton path.
    num_sms         SMs that the kernels may take, at run time; None takes all
    take_over       for kernels that start beside communication: programs draw their tiles instead
                    of having equal shares, so that one which starts late, on an SM that
                    communication held, takes what is left. Leave num_sms out: programs wait for
                    all SMs, and where none comes free nothing waits for them. The same bits.
                    (Hopper and bf16 or fp16; other kernels have equal shares.)
    implementation  "triton", "reference", or "auto": Triton for bf16 on a Hopper GPU, else the
                    reference
    precision       "bf16": products of the tensors as they are. "fp8": all but the weights'
                    gradients multiply e4m3 numbers, see grouped_fp8.py; H and I multiples of 128

    Returns out [R, H]. Rows past expert_offsets[-1] are neither read nor written: there, out holds
    whatever was in memory.

    A weight that carries an fp32 attribute `main_grad` of its shape gets its gradient added there,
    and autograd sees no gradient for it (Megatron's convention).

    Raises TypeError or ValueError naming the value, the limit and the remedy.
    """
    _check(rows, row_weight, w13, w2, expert_offsets, num_sms, implementation)
    products: Any = grouped_bf16
    if grouped_fp8.is_fp8(precision):
        grouped_fp8.check_fp8(rows, None, w13, w2)
        products = grouped_fp8
    save = torch.is_grad_enabled() and (
        rows.requires_grad or row_weight.requires_grad or w13.requires_grad or w2.requires_grad
    )
    options = GroupedOptions(num_sms or 0, implementation, take_over)
    return products.forward(rows, None, row_weight, w13, w2, expert_offsets, save, options)[0]


@torch.no_grad()
def mlp_forward(
    rows: torch.Tensor,
    row_weight: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    expert_offsets: torch.Tensor,
    *,
    num_sms: int | None = None,
    take_over: bool = False,
    implementation: str = "auto",
    precision: str = "bf16",
    row_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, MLPSaved]:
    """`grouped_mlp` without autograd, for schedulers: out [R, H] and what the backward needs.

    With precision="fp8", rows may be e4m3 already, with row_scale [R, H / 128] fp32 as
    `fp8.quantize_rows` makes them; fastest where the transpose of row_scale is contiguous. Rows
    that pad an expert are zero; out and drows have the weights' dtype.
    """
    wide_rows = rows if row_scale is None else w13.new_empty(1).expand(rows.shape)
    _check(wide_rows, row_weight, w13, w2, expert_offsets, num_sms, implementation)
    products: Any = grouped_bf16
    if grouped_fp8.is_fp8(precision):
        grouped_fp8.check_fp8(rows, row_scale, w13, w2)
        products = grouped_fp8
    elif row_scale is not None:
        raise ValueError(f'row_scale with precision={precision!r}: pass precision="fp8"')
    options = GroupedOptions(num_sms or 0, implementation, take_over)
    weights = row_weight, w13, w2, expert_offsets
    out, act, gate_up, fp8 = products.forward(rows, row_scale, *weights, True, options)
    return out, MLPSaved(rows, *weights, act, gate_up, None, options, fp8)


@torch.no_grad()
def mlp_dgrad(
    dout: torch.Tensor,
    saved: MLPSaved,
    *,
    dout_scale: torch.Tensor | None = None,
    num_sms: int | None = None,
    take_over: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the inputs: drows [R, H] and drow_weight [R] (0 past expert_offsets[-1]).

    dout [R, H]: rows that pad an expert are zero. After a forward with precision="fp8" it may be
    e4m3 already, with dout_scale [R, H / 128] fp32 as `fp8.quantize_rows` makes them; fastest where
    the transpose of dout_scale is contiguous. Without `num_sms` and `take_over` both are the
    forward's. Runs once per forward.
    """
    _check_dout(dout, dout_scale, saved)
    options = _options(num_sms, take_over, saved)
    if saved.gate_up is None:
        raise ValueError("mlp_dgrad has already run on this forward: call mlp_forward again")
    products = grouped_bf16 if saved.fp8 is None else grouped_fp8
    drows, drow_weight, saved.d_gate_up, saved.act = products.dgrad(
        dout, dout_scale, saved, options
    )
    saved.gate_up = None
    return drows, drow_weight


@torch.no_grad()
def mlp_wgrad(
    dout: torch.Tensor,
    saved: MLPSaved,
    *,
    dout_scale: torch.Tensor | None = None,
    num_sms: int | None = None,
    take_over: bool | None = None,
    totals: Sequence[torch.Tensor | None] = (None, None),
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the weights, any time after mlp_dgrad: dw13 [L, 2I, H] and dw2 [L, H, I].

    dout and dout_scale as in mlp_dgrad; e4m3 rows go back to the weights' dtype for these products.
    For a weight with an fp32 `main_grad` the gradient is added there and None returned for it; so
    with `totals`, gradients so far, in the weight's dtype or fp32: the kernel adds to them, which
    spares a pass over all three. One that it cannot add to (strided, or not at a multiple of 16
    bytes) is left alone, and the gradient returned.
    Without `num_sms` and `take_over` both are the forward's; on Hopper these kernels always draw.
    """
    _check_dout(dout, dout_scale, saved)
    options = _options(num_sms, take_over, saved)
    if saved.d_gate_up is None or saved.act is None:
        raise ValueError("mlp_wgrad needs what mlp_dgrad leaves: call mlp_dgrad first")
    rows, offsets = saved.rows, saved.expert_offsets
    if saved.fp8 is not None:
        rows = _wide(rows, saved.fp8.row_scale, saved.w13.dtype)
        dout = _wide(dout, dout_scale, saved.w13.dtype)
    return (
        weight_gradient(saved.w13, saved.d_gate_up, rows, offsets, options, total=totals[0]),
        weight_gradient(saved.w2, dout, saved.act, offsets, options, total=totals[1]),
    )


def _options(num_sms: int | None, take_over: bool | None, saved: MLPSaved) -> GroupedOptions:
    """Given neither of the two, those of the forward."""
    check_num_sms(num_sms)
    if num_sms is None and take_over is None:
        return saved.options
    return GroupedOptions(num_sms or 0, saved.options.implementation, bool(take_over))


def _wide(rows: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return rows if scale is None else dequantize_rows(rows, scale, dtype)


# ---- Checks ----


def _check(rows, row_weight, w13, w2, expert_offsets, num_sms, implementation) -> None:
    if rows.dim() != 2 or w13.dim() != 3 or w2.dim() != 3:
        raise ValueError(
            f"rows, w13, w2 have {rows.dim()}, {w13.dim()}, {w2.dim()} dimensions: "
            "pass [R, H], [L, 2I, H], [L, H, I]"
        )
    (R, H), (L, width, _) = rows.shape, w13.shape
    I = width // 2  # noqa: E741
    if w13.shape != (L, 2 * I, H) or w2.shape != (L, H, I) or L == 0:
        raise ValueError(
            f"w13 {tuple(w13.shape)} and w2 {tuple(w2.shape)} do not fit rows {tuple(rows.shape)}: "
            f"with H={H} pass w13 [L, 2I, {H}] (gate above up) and w2 [L, {H}, I]"
        )
    for name, value in (("hidden", H), ("expert_hidden", I)):
        if value == 0 or value % 8:
            remedy = f"pad the model width to {max(8, -(-value // 8) * 8)}"
            raise ValueError(f"{name}={value} is not a positive multiple of 8: {remedy}")
    _check_tensors(rows, row_weight, w13, w2, expert_offsets, R, L)
    check_num_sms(num_sms)
    check_implementation(implementation)


def _check_tensors(rows, row_weight, w13, w2, expert_offsets, R, L) -> None:
    dtype = rows.dtype
    if not dtype.is_floating_point or w13.dtype != dtype or w2.dtype != dtype:
        raise TypeError(
            f"rows, w13, w2 are {dtype}, {w13.dtype}, {w2.dtype}: pass one floating-point dtype"
        )
    if row_weight.dtype != wide(dtype):
        raise TypeError(f"row_weight is {row_weight.dtype}: pass {wide(dtype)} with {dtype} rows")
    if row_weight.shape != (R,):
        raise ValueError(f"row_weight is {tuple(row_weight.shape)}: pass one weight a row, ({R},)")
    if expert_offsets.dtype != torch.int32:
        raise TypeError(f"expert_offsets is {expert_offsets.dtype}: pass torch.int32")
    if expert_offsets.shape != (L + 1,):
        raise ValueError(
            f"expert_offsets is {tuple(expert_offsets.shape)}: with {L} experts pass ({L + 1},), "
            "the first row of each and the end of the last"
        )
    for name, tensor in (
        ("row_weight", row_weight),
        ("w13", w13),
        ("w2", w2),
        ("expert_offsets", expert_offsets),
    ):
        if tensor.device != rows.device:
            raise ValueError(f"{name} is on {tensor.device}, rows on {rows.device}: move it there")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}: pass it contiguous")


def _check_dout(dout: torch.Tensor, dout_scale: torch.Tensor | None, saved: MLPSaved) -> None:
    rows, expected = saved.rows, saved.w13  # rows may be e4m3
    if dout_scale is not None:
        if saved.fp8 is None:
            raise ValueError(
                'dout_scale after precision="bf16": pass dout as out, or forward "fp8"'
            )
        grouped_fp8.check_scaled("dout", dout, dout_scale, expected)
        expected = dout
    if dout.shape != rows.shape or dout.dtype != expected.dtype or dout.device != expected.device:
        raise ValueError(
            f"dout is {tuple(dout.shape)} {dout.dtype} on {dout.device}: pass the gradient of out, "
            f"{tuple(rows.shape)} {expected.dtype} on {expected.device}"
        )
