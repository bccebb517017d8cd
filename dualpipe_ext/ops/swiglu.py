"""SwiGLU between two matrix products.

    act = swiglu(linear(x, w13))     # silu(gate) * up, w13 being gate above up

Letters: T tokens in any number of dimensions, D width of an activation.

On a GPU one Triton kernel each way, within `num_sms` SMs, counted at run time; elsewhere, and for
fp64, plain torch with the same meaning. Arithmetic is fp32 (fp64 for fp64) whatever the dtype.
Results have the same bits in every run and for every `num_sms`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operator import Operator, check_num_sms, device_facts, sm_count, use_triton, wide

__all__ = ["swiglu", "swiglu_backward_operator", "swiglu_operator"]


def swiglu(gate_up: Tensor, *, num_sms: int | None = None) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), rounded once; differentiable.

    Args:
        gate_up: [..., 2D] of a floating dtype, gate in front of up. The kernels take multiples of 8
            for D, plain torch any other.
        num_sms: SMs that the kernels may take; None takes all.

    Returns:
        [..., D] in the dtype of ``gate_up``.

    Raises:
        TypeError: ``gate_up`` is not floating.
        ValueError: its width is odd.
    """
    if not gate_up.is_floating_point():
        raise TypeError(f"gate_up is {gate_up.dtype}: pass a floating-point tensor")
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up is {tuple(gate_up.shape)}: pass an even last dimension, 2D for a gate and an "
            "up of width D"
        )
    *outer, width = gate_up.shape
    flat = gate_up.reshape(gate_up.shape[:-1].numel(), width)
    return swiglu_operator(flat, check_num_sms(num_sms)).view(*outer, width // 2)


def _swiglu_kernels(gate_up: Tensor):
    """The module of the kernels if they take this tensor."""
    if not use_triton(gate_up) or gate_up.numel() == 0 or gate_up.shape[1] % 16:
        return None
    if gate_up.is_cuda and device_facts(gate_up.device)[1][0] not in (9, 10):
        return None  # 144 KB of shared memory are more than others have
    from ..triton_kernels.elementwise import swiglu

    return swiglu


class _SwigluOperator:
    """silu(gate) * up [T, D] of gate_up [T, 2D]."""

    @staticmethod
    def forward(gate_up, num_sms):
        kernels = _swiglu_kernels(gate_up)
        if kernels is None:
            return swiglu_operator.plain(gate_up, num_sms)
        act = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        kernels.swiglu(kernels.vectors(gate_up), act, num_sms=sm_count(gate_up, num_sms))
        return act

    @staticmethod
    def plain(gate_up, num_sms):
        gate, up = gate_up.to(wide(gate_up.dtype)).chunk(2, dim=1)
        return (gate * gate.sigmoid() * up).to(gate_up.dtype).contiguous()

    @staticmethod
    def save(ctx, inputs, output):
        gate_up, ctx.num_sms = inputs
        ctx.save_for_backward(gate_up)

    @staticmethod
    def backward(ctx, dy):
        return (swiglu_backward_operator(dy, *ctx.saved_tensors, ctx.num_sms),)


swiglu_operator = Operator(
    "swiglu(Tensor gate_up, int num_sms) -> Tensor",
    _SwigluOperator,
)


class _SwigluBackwardOperator:
    """The gradient of gate_up [T, 2D] from that of the activation, dy [T, D]."""

    @staticmethod
    def forward(dy, gate_up, num_sms):
        kernels = _swiglu_kernels(gate_up)
        if kernels is None:
            return swiglu_backward_operator.plain(dy, gate_up, num_sms)
        d_gate_up = gate_up.new_empty(gate_up.shape)
        rows = kernels.vectors(dy), kernels.vectors(gate_up)
        kernels.swiglu_backward(*rows, d_gate_up, num_sms=sm_count(gate_up, num_sms))
        return d_gate_up

    @staticmethod
    def plain(dy, gate_up, num_sms):
        math = wide(gate_up.dtype)
        dy, (gate, up) = dy.to(math), gate_up.to(math).chunk(2, dim=1)
        s = gate.sigmoid()
        d_gate, d_up = dy * up * (s + gate * s * (1 - s)), dy * gate * s
        return torch.cat((d_gate, d_up), dim=1).to(gate_up.dtype).contiguous()


swiglu_backward_operator = Operator(
    "swiglu_backward(Tensor dy, Tensor gate_up, int num_sms) -> Tensor",
    _SwigluBackwardOperator,
)
