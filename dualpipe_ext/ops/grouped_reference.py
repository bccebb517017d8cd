"""The grouped MLP in plain torch, expert by expert: the oracle, and the path without a GPU.

Shapes are those of `grouped_mlp.py`. Sums are fp32, of fp64 tensors fp64; expert_offsets is read on
the host.
"""

import torch

from .expert_order import expert_spans
from .operator import wide, without_autocast

__all__ = [
    "reference_dgrad",
    "reference_forward",
    "reference_wgrad",
]


@without_autocast
def reference_forward(rows, row_weight, w13, w2, expert_offsets, out, act, gate_up) -> None:
    math = wide(rows.dtype)
    for expert, (start, end) in enumerate(expert_spans(expert_offsets, rows.shape[0])):
        here = slice(start, end)
        # Rounded first, as the Hopper kernel leaves gate and up in shared memory.
        both = (rows[here].to(math) @ w13[expert].to(math).T).to(rows.dtype)
        gate, up = both.to(math).chunk(2, dim=1)
        act[here] = torch.nn.functional.silu(gate) * up * row_weight[here, None]
        out[here] = act[here].to(math) @ w2[expert].to(math).T
        if gate_up is not None:
            gate_up[here] = both


@without_autocast
def reference_dgrad(
    dout, gate_up, row_weight, w13, w2, expert_offsets, drows, drow_weight, d_gate_up
) -> None:
    math = wide(dout.dtype)
    for expert, (start, end) in enumerate(expert_spans(expert_offsets, dout.shape[0])):
        here = slice(start, end)
        gate, up = gate_up[here].to(math).chunk(2, dim=1)
        weight = row_weight[here, None]
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        # Rounded once, as the Hopper kernel leaves it in shared memory.
        d_act = (dout[here].to(math) @ w2[expert].to(math)).to(dout.dtype).to(math)
        drow_weight[here] = (d_act * silu * up).sum(1)
        d_gate = d_act * weight * up * (sigmoid + silu * (1 - sigmoid))
        d_up = d_act * weight * silu
        d_gate_up[here] = torch.cat((d_gate, d_up), dim=1)
        drows[here] = d_gate_up[here].to(math) @ w13[expert].to(math)


@without_autocast
def reference_wgrad(y, x, expert_offsets, dw, accumulate: bool) -> None:
    math = wide(y.dtype)
    for expert, (start, end) in enumerate(expert_spans(expert_offsets, y.shape[0])):
        product = y[start:end].to(math).T @ x[start:end].to(math)
        if accumulate:  # rounded once by itself where dw is not wider, as the kernels do
            dw[expert] += product.to(dw.dtype)
        else:
            dw[expert] = product
