"""The grouped MLP in plain torch, expert by expert: the oracle, and the path without a GPU.

Shapes are those of `grouped_mlp.py`. Sums are fp32, of fp64 tensors fp64; expert_offsets is read on
the host.
"""

from itertools import pairwise

import torch

from ..exchange.plan import ROW_ALIGNMENT
from .operator import without_autocast

__all__ = [
    "accumulation_dtype",
    "expert_spans",
    "reference_dgrad",
    "reference_forward",
    "reference_wgrad",
]


def expert_spans(expert_offsets: torch.Tensor, R: int) -> list[tuple[int, int]]:
    """First and end row of each expert, on the host."""
    offsets = expert_offsets.tolist()
    spans = list(pairwise(offsets))
    if offsets[0] != 0 or offsets[-1] > R or any(a > b or a % ROW_ALIGNMENT for a, b in spans):
        raise ValueError(
            f"expert_offsets={offsets}: pass rising multiples of {ROW_ALIGNMENT} from 0 to at most "
            f"R={R}, as in Plan.expert_offsets"
        )
    return spans


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@without_autocast
def reference_forward(rows, row_weight, w13, w2, expert_offsets, out, act, gate_up) -> None:
    wide = accumulation_dtype(rows.dtype)
    for expert, (start, end) in enumerate(expert_spans(expert_offsets, rows.shape[0])):
        here = slice(start, end)
        # Rounded first, as the Hopper kernel leaves gate and up in shared memory.
        both = (rows[here].to(wide) @ w13[expert].to(wide).T).to(rows.dtype)
        gate, up = both.to(wide).chunk(2, dim=1)
        act[here] = torch.nn.functional.silu(gate) * up * row_weight[here, None]
        out[here] = act[here].to(wide) @ w2[expert].to(wide).T
        if gate_up is not None:
            gate_up[here] = both


@without_autocast
def reference_dgrad(
    dout, gate_up, row_weight, w13, w2, expert_offsets, drows, drow_weight, d_gate_up
) -> None:
    wide = accumulation_dtype(dout.dtype)
    for expert, (start, end) in enumerate(expert_spans(expert_offsets, dout.shape[0])):
        here = slice(start, end)
        gate, up = gate_up[here].to(wide).chunk(2, dim=1)
        weight = row_weight[here, None]
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        # Rounded once, as the Hopper kernel leaves it in shared memory.
        d_act = (dout[here].to(wide) @ w2[expert].to(wide)).to(dout.dtype).to(wide)
        drow_weight[here] = (d_act * silu * up).sum(1)
        d_gate = d_act * weight * up * (sigmoid + silu * (1 - sigmoid))
        d_up = d_act * weight * silu
        d_gate_up[here] = torch.cat((d_gate, d_up), dim=1)
        drows[here] = d_gate_up[here].to(wide) @ w13[expert].to(wide)


@without_autocast
def reference_wgrad(y, x, expert_offsets, dw, accumulate: bool) -> None:
    wide = accumulation_dtype(y.dtype)
    for expert, (start, end) in enumerate(expert_spans(expert_offsets, y.shape[0])):
        product = y[start:end].to(wide).T @ x[start:end].to(wide)
        if accumulate:  # rounded once by itself where dw is not wider, as the kernels do
            dw[expert] += product.to(dw.dtype)
        else:
            dw[expert] = product
