"""Products of the grouped MLP in fp8: `precision="fp8"` of `grouped_mlp` and `mlp_forward`.

The four products of the forward and of the backward for inputs take e4m3 numbers with an fp32
scale for 128 columns of a row and for 128 × 128 of a weight, and sum in fp32 (DeepSeek-V3, report,
3.3). The products for weight gradients, and everything that leaves or waits, stay as they are: bf16
with sums in fp32. Letters as in grouped_mlp.py; q rounds to fp8:

    gate_up = q(rows) @ q(w13).T       d_act     = q(dout) @ q(w2)
    act     = silu(gate) up weight     d_gate_up = SwiGLU's backward of d_act
    out     = q(act) @ q(w2).T         drows     = q(d_gate_up) @ q(w13)

Rows that came by `Exchange.dispatch(payload="fp8")` are on the grid already and round to
themselves. `mlp_forward` and `mlp_dgrad` also take rows and dout that are e4m3 already.

Triton and Gluon kernels on a Hopper GPU (bf16); elsewhere plain torch with the same meaning, which
rounds, and multiplies what the rounded numbers stand for.
"""

from __future__ import annotations

from typing import Any

import torch

from .expert_order import expert_spans
from .fp8 import BLOCK, E4M3, dequantize_rows, quantize_rows, runs_fp8_kernels
from .grouped_gradient import gradients, keep_forward
from .grouped_options import GroupedOptions
from .grouped_saved import Fp8Saved, MLPSaved
from .operator import Operator, check_tma_address, sm_count, wide, without_autocast

__all__ = ["check_fp8", "check_scaled", "dgrad", "forward", "is_fp8"]


def is_fp8(precision: str) -> bool:
    """Whether `precision` is "fp8"; ValueError unless it is that or "bf16"."""
    if precision not in ("bf16", "fp8"):
        raise ValueError(f'precision={precision!r}: pass "bf16" or "fp8"')
    return precision == "fp8"


def check_fp8(rows, row_scale, w13: torch.Tensor, w2: torch.Tensor) -> None:
    """Of `precision="fp8"`, beside what grouped_mlp checks."""
    H, I = w2.shape[1:]  # noqa: E741
    for name, value in (("hidden", H), ("expert_hidden", I)):
        if value % BLOCK:
            raise ValueError(
                f"{name}={value} is not a multiple of {BLOCK}, the columns that share an fp8 "
                f"scale: pad the model width to {-(-value // BLOCK) * BLOCK}, or pass "
                f'precision="bf16"'
            )
    if row_scale is not None:
        check_scaled("row", rows, row_scale, w13)


def check_scaled(name: str, rows: torch.Tensor, scale: torch.Tensor, w13: torch.Tensor) -> None:
    """Of e4m3 rows [R, H] and their scales; `name` is that of one."""
    shape = (len(rows), w13.shape[2] // BLOCK)
    if rows.dtype != E4M3 or scale.shape != shape or scale.dtype != torch.float32:
        raise ValueError(
            f"{name}_scale is {tuple(scale.shape)} {scale.dtype} with {rows.dtype} rows "
            f"{tuple(rows.shape)}: pass both as fp8.quantize_rows returns them, {E4M3} and {shape} "
            f"torch.float32"
        )
    if not rows.device == scale.device == w13.device:
        raise ValueError(
            f"rows are on {rows.device}, {name}_scale on {scale.device}, w13 on {w13.device}: "
            "move them to one device"
        )


def forward(
    rows, row_scale, row_weight, w13, w2, expert_offsets, save: bool, options: GroupedOptions
) -> tuple[torch.Tensor, None, torch.Tensor, Fp8Saved]:
    """out; no act; gate_up, empty unless `save`; and what else the backward needs.

    Only the weights' gradients take SMs over; the fp8 kernels have equal shares.
    """
    from .fp8_weight import fp8_weight  # imports torch._dynamo, which takes a second

    implementation = options.implementation
    fp8 = Fp8Saved(fp8_weight(w13, implementation), fp8_weight(w2, implementation), row_scale)
    weights = w13, w2, *fp8.w13, *fp8.w2
    out, gate_up = forward_operator(
        rows, row_scale, row_weight, *weights, expert_offsets, save, options
    )
    return out, None, gate_up, fp8


def dgrad(dout, dout_scale, saved: MLPSaved, options: GroupedOptions) -> tuple[torch.Tensor, ...]:
    """drows, drow_weight, d_gate_up and act."""
    assert saved.fp8 is not None
    w13, w2 = saved.fp8.w13, saved.fp8.w2
    return dgrad_operator(
        dout,
        dout_scale,
        saved.gate_up,
        saved.row_weight,
        w13.transposed,
        w13.scales,
        w2.transposed,
        w2.scales,
        saved.expert_offsets,
        options.num_sms,
        options.implementation,
    )


# ---- Plain torch ----


def _rounded(x: torch.Tensor, math: torch.dtype) -> torch.Tensor:
    return dequantize_rows(*quantize_rows(x), math)


def _wide_rows(rows, scale, here: slice, math: torch.dtype) -> torch.Tensor:
    if scale is None:
        return _rounded(rows[here], math)
    return dequantize_rows(rows[here], scale[here], math)


def _wide_matrix(q: torch.Tensor, scales: torch.Tensor, math: torch.dtype) -> torch.Tensor:
    """What one expert's q [N, K] and scales [N / 128, K / 128] stand for."""
    return q.to(math) * scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


@without_autocast
def _reference_forward(
    rows, row_scale, row_weight, q13, s13, q2, s2, expert_offsets, out, gate_up
) -> None:
    math = wide(out.dtype)
    for expert, (start, end) in enumerate(expert_spans(expert_offsets, len(rows))):
        here = slice(start, end)
        x = _wide_rows(rows, row_scale, here, math)
        gate_up[here] = x @ _wide_matrix(q13[expert], s13[expert], math).T
        gate, up = gate_up[here].to(math).chunk(2, dim=1)
        act = torch.nn.functional.silu(gate) * up * row_weight[here, None]
        out[here] = _rounded(act, math) @ _wide_matrix(q2[expert], s2[expert], math).T


@without_autocast
def _reference_dgrad(
    dout,
    dout_scale,
    gate_up,
    row_weight,
    t13,
    s13,
    t2,
    s2,
    expert_offsets,
    drows,
    drow_weight,
    d_gate_up,
    act,
) -> None:
    math = wide(drows.dtype)
    for expert, (start, end) in enumerate(expert_spans(expert_offsets, len(dout))):
        here = slice(start, end)
        d = _wide_rows(dout, dout_scale, here, math)
        d_act = d @ _wide_matrix(t2[expert], s2[expert].T, math).T
        d_act = d_act.to(drows.dtype).to(math)
        gate, up = gate_up[here].to(math).chunk(2, dim=1)
        weight = row_weight[here, None]
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        act[here] = silu * up * weight
        drow_weight[here] = (d_act * silu * up).sum(1)
        d_gate = d_act * weight * up * (sigmoid + silu * (1 - sigmoid))
        both = torch.cat((d_gate, d_act * weight * silu), dim=1)
        d_gate_up[here] = both
        drows[here] = _rounded(both, math) @ _wide_matrix(t13[expert], s13[expert].T, math).T


# ---- Operators ----


def _fp8_rows(rows, scale, expert_offsets, sms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As grouped_fp8_gemm takes them."""
    if scale is not None:
        return rows, scale.T.contiguous()
    from ..triton_kernels.experts.quantize import quantize_rows

    return quantize_rows(rows, expert_offsets, num_sms=sms)


class _ForwardOperator:
    """out [R, H] and gate_up [R, 2I], or [0, 2I] unless `save`."""

    @staticmethod
    def forward(
        rows, row_scale, row_weight, w13, w2, q13, t13, s13, q2, t2, s2, expert_offsets, save,
        options,
    ):  # fmt: skip
        (R, H), I = rows.shape, w2.shape[2]  # noqa: E741
        out, gate_up = w2.new_empty(R, H), w2.new_empty(R, 2 * I)
        if not runs_fp8_kernels(w2, options.implementation):
            _reference_forward(
                rows, row_scale, row_weight, q13, s13, q2, s2, expert_offsets, out, gate_up
            )
        elif R:
            from ..triton_kernels.experts.fp8_gemm import FORWARD, grouped_fp8_gemm
            from ..triton_kernels.experts.fp8_swiglu import swiglu

            rows = rows.contiguous()
            check_tma_address(rows=rows)
            sms = sm_count(rows, options.num_sms)
            x = _fp8_rows(rows, row_scale, expert_offsets, sms)
            launch: dict[str, Any] = {"num_sms": sms, "config": FORWARD}
            grouped_fp8_gemm(*x, q13, s13, expert_offsets, gate_up, **launch)
            act = swiglu(gate_up, row_weight, expert_offsets, num_sms=sms)
            grouped_fp8_gemm(*act, q2, s2, expert_offsets, out, **launch)
        return out, gate_up if save else gate_up.new_empty(0, 2 * I)

    @staticmethod
    def fake(
        rows, row_scale, row_weight, w13, w2, q13, t13, s13, q2, t2, s2, expert_offsets, save,
        options,
    ):  # fmt: skip
        (R, H), I = rows.shape, w2.shape[2]  # noqa: E741
        return w2.new_empty(R, H), w2.new_empty(R if save else 0, 2 * I)

    @staticmethod
    def save(ctx, inputs, output):
        rows, _, row_weight, w13, w2, _, t13, s13, _, t2, s2, expert_offsets, _, options = inputs
        gate_up = output[1]
        ctx.mark_non_differentiable(gate_up)
        products = t13, s13, t2, s2, gate_up
        keep_forward(ctx, rows, row_weight, w13, w2, expert_offsets, *products, options=options)

    @staticmethod
    def backward(ctx, dout, _d_gate_up):
        drows, *rest = gradients(ctx, dout, _input_gradients, ctx.needs_input_grad[3:5])
        return drows, None, *rest


forward_operator = Operator(
    "grouped_fp8_forward(Tensor rows, Tensor? row_scale, Tensor row_weight, Tensor w13, Tensor w2, "
    "Tensor q13, Tensor t13, Tensor s13, Tensor q2, Tensor t2, Tensor s2, Tensor expert_offsets, "
    f"bool save, {GroupedOptions.schema()}) -> (Tensor, Tensor)",
    _ForwardOperator,
    GroupedOptions,
)


def _input_gradients(
    dout, row_weight, w13, w2, expert_offsets, t13, s13, t2, s2, gate_up, options
) -> tuple[torch.Tensor, ...]:
    tensors = dout, None, gate_up, row_weight, t13, s13, t2, s2, expert_offsets
    return dgrad_operator(*tensors, options.num_sms, options.implementation)


class _DgradOperator:
    """drows [R, H], drow_weight [R], d_gate_up [R, 2I] and act [R, I]."""

    @staticmethod
    def forward(
        dout, dout_scale, gate_up, row_weight, t13, s13, t2, s2, expert_offsets, num_sms,
        implementation,
    ):  # fmt: skip
        dout = dout.contiguous()
        drows, d_gate_up = gate_up.new_empty(dout.shape), torch.empty_like(gate_up)
        act = gate_up.new_empty(len(dout), gate_up.shape[1] // 2)
        drow_weight = torch.zeros_like(row_weight)
        if not runs_fp8_kernels(gate_up, implementation):
            tensors = (dout, dout_scale, gate_up, row_weight, t13, s13, t2, s2, expert_offsets)
            _reference_dgrad(*tensors, drows, drow_weight, d_gate_up, act)
        elif len(dout):
            from ..triton_kernels.experts.fp8_gemm import BACKWARD, grouped_fp8_gemm
            from ..triton_kernels.experts.fp8_swiglu import swiglu_backward

            check_tma_address(dout=dout)
            sms = sm_count(dout, num_sms)
            launch: dict[str, Any] = {"num_sms": sms, "config": BACKWARD}
            x = _fp8_rows(dout, dout_scale, expert_offsets, sms)
            d_act = torch.empty_like(act)
            grouped_fp8_gemm(*x, t2, s2.transpose(1, 2), expert_offsets, d_act, **launch)
            rows, scales, drow_weight = swiglu_backward(
                d_act, gate_up, row_weight, expert_offsets, d_gate_up, act, num_sms=sms
            )
            grouped_fp8_gemm(
                rows, scales, t13, s13.transpose(1, 2), expert_offsets, drows, **launch
            )
        return drows, drow_weight, d_gate_up, act

    @staticmethod
    def fake(
        dout, dout_scale, gate_up, row_weight, t13, s13, t2, s2, expert_offsets, num_sms,
        implementation,
    ):  # fmt: skip
        act = gate_up.new_empty(len(dout), gate_up.shape[1] // 2)
        drows = gate_up.new_empty(dout.shape)
        return drows, torch.empty_like(row_weight), torch.empty_like(gate_up), act


dgrad_operator = Operator(
    "grouped_fp8_dgrad(Tensor dout, Tensor? dout_scale, Tensor gate_up, Tensor row_weight, "
    "Tensor t13, Tensor s13, Tensor t2, Tensor s2, Tensor expert_offsets, "
    "int num_sms, str implementation) -> (Tensor, Tensor, Tensor, Tensor)",
    _DgradOperator,
)
