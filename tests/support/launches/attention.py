"""Every attention kernel.

168 registers are what a launch of three warpgroups has; they share them out as 240 + 240 + 24 or
232 + 232 + 40. Where there is a stack, it holds numbers of a tile or of a head of it: 2 or 3 loads
a head and as many a tile, none in the loops over queries (Triton 3.6).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import torch

from tests.support.launches.launch import Launch

WIDTHS = ((64, 64), (128, 128), (192, 128))
KERNELS = {
    "forward": "forward.attention_forward_kernel",
    "backward": "backward.attention_backward_kernel",
    "backward without dq": "backward.attention_backward_kernel",
    "dq": "backward_query.query_gradient_kernel",
    "prepare": "delta.prepare_kernel",
    "finish dq": "delta.finish_query_gradient_kernel",
    "clear tail": "delta.clear_tail_kernel",
}


def _call(kernel: str, D: int, V: int, causal: bool, packed: bool) -> None:
    from dualpipe_ext.triton_kernels.attention import backward, backward_query, delta, forward

    bf16 = dict(dtype=torch.bfloat16)
    q, d_out = torch.empty(1, 4, 256, D, **bf16), torch.empty(1, 4, 256, V, **bf16)
    k, v = torch.empty(1, 2, 256, D, **bf16), torch.empty(1, 2, 256, V, **bf16)
    lse, dq_sum = torch.empty(4 * 512), torch.empty(4 * 512, D)
    starts = [torch.zeros(3, dtype=torch.int32)] * 2 if packed else [None, None]
    how = dict(causal=causal, scale=0.1, num_sms=132)
    config = backward.BACKWARD[D, V]
    fused = config.fused and kernel != "backward without dq"
    dq_sum = dq_sum if fused else None
    if kernel == "forward":
        forward.attention_forward(q, k, v, d_out, lse.view(1, 4, -1), *starts, **how)
    elif kernel == "dq":
        backward_query.query_gradient(q, k, v, d_out, lse, lse, q, *starts, **how)
    elif kernel == "prepare":
        delta.prepare(d_out, d_out, lse, starts[0], lse, lse, dq_sum, num_sms=132)
    elif kernel == "finish dq":
        delta.finish_query_gradient(dq_sum, q, starts[0], scale=0.1, num_sms=132)
    elif kernel == "clear tail":
        delta.clear_tail(q[0], starts[0], num_sms=132)
    else:
        how |= dict(config=replace(config, fused=fused))
        backward.attention_backward(q, k, v, d_out, lse, lse, k, v, dq_sum, *starts, **how)


def _launch(name, kernel, D, V, causal=True, packed=True) -> Launch:
    # All 54 take minutes to compile. These have every branch of every kernel.
    always = (
        kernel in ("prepare", "finish dq", "clear tail")
        or (causal and packed and kernel in ("forward", "backward"))
        or (D == 128 and kernel == "backward" and not packed)
        or (D == 128 and kernel == "dq" and causal and packed)
    )
    call = partial(_call, kernel, D, V, causal, packed)
    return Launch("attention", name, f"attention.{KERNELS[kernel]}", call, always=always)


def attention():
    for kernel in ("forward", "backward", "backward without dq", "dq"):
        for (D, V), causal, packed in product(WIDTHS, (True, False), (False, True)):
            if (D, kernel) == (192, "backward without dq"):
                continue  # the default there
            name = f"{kernel}, {D}/{V}, {'causal' if causal else 'full'}"
            yield _launch(name + (", packed" if packed else ""), kernel, D, V, causal, packed)
    for D, V in WIDTHS:
        yield _launch(f"prepare, {D}/{V}", "prepare", D, V, packed=False)
        yield _launch(f"prepare, {D}/{V}, packed", "prepare", D, V)
    yield _launch("finish dq, 128", "finish dq", 128, 128)
    yield _launch("clear tail", "clear tail", 128, 128)
