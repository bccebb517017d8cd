"""Products of the grouped MLP as its tensors are, bf16 in training: `precision="bf16"`.

Triton and Gluon kernels on a GPU, `grouped_reference.py` anywhere. Letters as in grouped_mlp.py.
"""

from __future__ import annotations

import torch

from .grouped_gradient import gradients, keep_forward
from .grouped_options import GroupedOptions, runs_triton
from .grouped_reference import reference_dgrad, reference_forward
from .grouped_saved import MLPSaved
from .operator import Operator, check_tma_address, sm_count

__all__ = ["dgrad", "forward"]


def forward(rows, row_scale, row_weight, w13, w2, expert_offsets, save: bool, options):
    """out; act; gate_up, empty unless `save`; None, since the backward needs nothing else."""
    out, act, gate_up = forward_operator(rows, row_weight, w13, w2, expert_offsets, save, options)
    return out, act, gate_up, None


def dgrad(dout, dout_scale, saved: MLPSaved, options: GroupedOptions) -> tuple[torch.Tensor, ...]:
    """drows, drow_weight, d_gate_up and act."""
    weights = saved.w13, saved.w2
    products = dgrad_operator(
        dout, saved.gate_up, saved.row_weight, *weights, saved.expert_offsets, options
    )
    return *products, saved.act


# ---- Operators ----


class _ForwardOperator:
    """out [R, H], act [R, I] and gate_up [R, 2I], or [0, 2I] unless `save`."""

    @staticmethod
    def forward(rows, row_weight, w13, w2, expert_offsets, save, options):
        (R, H), I = rows.shape, w2.shape[2]  # noqa: E741
        rows = rows.contiguous()
        out, act = rows.new_empty(R, H), rows.new_empty(R, I)
        gate_up = rows.new_empty(R, 2 * I) if save else None
        if not runs_triton(rows, options.implementation):
            reference_forward(rows, row_weight, w13, w2, expert_offsets, out, act, gate_up)
        elif R:
            from ..triton_kernels.experts.gemm import grouped_gemm
            from ..triton_kernels.experts.swiglu import grouped_gate_up

            check_tma_address(rows=rows, w13=w13, w2=w2)
            share = {"num_sms": sm_count(rows, options.num_sms), "take_over": options.take_over}
            grouped_gate_up(rows, row_weight, w13, expert_offsets, act, gate_up, **share)
            grouped_gemm(act, w2, expert_offsets, out, weight_is_nk=True, **share)
        return out, act, rows.new_empty(0, 2 * I) if gate_up is None else gate_up

    @staticmethod
    def fake(rows, row_weight, w13, w2, expert_offsets, save, options):
        (R, H), I = rows.shape, w2.shape[2]  # noqa: E741
        return rows.new_empty(R, H), rows.new_empty(R, I), rows.new_empty(R if save else 0, 2 * I)

    @staticmethod
    def save(ctx, inputs, output):
        rows, row_weight, w13, w2, expert_offsets, _, options = inputs
        _, act, gate_up = output
        ctx.mark_non_differentiable(act, gate_up)
        products = act, gate_up
        keep_forward(ctx, rows, row_weight, w13, w2, expert_offsets, *products, options=options)

    @staticmethod
    def backward(ctx, dout, _d_act, _d_gate_up):
        return gradients(ctx, dout, _input_gradients, ctx.needs_input_grad[2:4])


forward_operator = Operator(
    "grouped_mlp_forward(Tensor rows, Tensor row_weight, Tensor w13, Tensor w2, "
    f"Tensor expert_offsets, bool save, {GroupedOptions.schema()}=False) "
    "-> (Tensor, Tensor, Tensor)",
    _ForwardOperator,
    GroupedOptions,
)


def _input_gradients(dout, row_weight, w13, w2, expert_offsets, act, gate_up, options):
    return *dgrad_operator(dout, gate_up, row_weight, w13, w2, expert_offsets, options), act


class _DgradOperator:
    """drows [R, H], drow_weight [R] and d_gate_up [R, 2I]."""

    @staticmethod
    def forward(dout, gate_up, row_weight, w13, w2, expert_offsets, options):
        dout = dout.contiguous()
        drows, d_gate_up = dout.new_empty(dout.shape), torch.empty_like(gate_up)
        if not runs_triton(dout, options.implementation):
            drow_weight = torch.zeros_like(row_weight)
            reference_dgrad(
                dout, gate_up, row_weight, w13, w2, expert_offsets, drows, drow_weight, d_gate_up
            )
        elif not len(dout):
            drow_weight = torch.zeros_like(row_weight)
        else:
            from ..triton_kernels.experts.gemm import grouped_gemm
            from ..triton_kernels.experts.swiglu import grouped_swiglu_backward

            check_tma_address(dout=dout, gate_up=gate_up, w13=w13, w2=w2)
            share = {"num_sms": sm_count(dout, options.num_sms), "take_over": options.take_over}
            drow_weight = grouped_swiglu_backward(
                dout, w2, gate_up, row_weight, expert_offsets, d_gate_up, **share
            )
            grouped_gemm(d_gate_up, w13, expert_offsets, drows, weight_is_nk=False, **share)
        return drows, drow_weight, d_gate_up

    @staticmethod
    def fake(dout, gate_up, row_weight, w13, w2, expert_offsets, options):
        return dout.new_empty(dout.shape), torch.empty_like(row_weight), torch.empty_like(gate_up)


dgrad_operator = Operator(
    "grouped_mlp_dgrad(Tensor dout, Tensor gate_up, Tensor row_weight, Tensor w13, Tensor w2, "
    f"Tensor expert_offsets, {GroupedOptions.schema()}=False) -> (Tensor, Tensor, Tensor)",
    _DgradOperator,
    GroupedOptions,
)
