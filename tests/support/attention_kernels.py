"""Every attention kernel as launches, to compile for sm_90.

168 registers are what a launch of three warpgroups has; they share them out as 240 + 240 + 24 or
232 + 232 + 40. Where there is a stack, it holds numbers of a tile or of a head of it: 2 or 3 loads
a head and as many a tile, none in the loops over queries (Triton 3.6).
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import product

import torch

from tests.support import ahead_of_time


def launch(kernel: str, D: int, V: int, causal: bool, packed: bool) -> None:
    """Only shapes and dtypes of the tensors matter."""
    from dualpipe_ext.triton_kernels.attention import backward as attention_backward
    from dualpipe_ext.triton_kernels.attention import backward_query as attention_backward_query
    from dualpipe_ext.triton_kernels.attention import delta as attention_delta
    from dualpipe_ext.triton_kernels.attention import forward as attention_forward

    bf16 = dict(dtype=torch.bfloat16)
    q, d_out = torch.empty(1, 4, 256, D, **bf16), torch.empty(1, 4, 256, V, **bf16)
    k, v = torch.empty(1, 2, 256, D, **bf16), torch.empty(1, 2, 256, V, **bf16)
    lse, dq_sum = torch.empty(4 * 512), torch.empty(4 * 512, D)
    starts = [torch.zeros(3, dtype=torch.int32)] * 2 if packed else [None, None]
    how = dict(causal=causal, scale=0.1, num_sms=132)
    config = attention_backward.BACKWARD[D, V]
    fused = config.fused and kernel != "backward without dq"
    dq_sum = dq_sum if fused else None
    if kernel == "forward":
        attention_forward.attention_forward(q, k, v, d_out, lse.view(1, 4, -1), *starts, **how)
    elif kernel == "dq":
        attention_backward_query.query_gradient(q, k, v, d_out, lse, lse, q, *starts, **how)
    elif kernel == "prepare":
        attention_delta.prepare(d_out, d_out, lse, starts[0], lse, lse, dq_sum, num_sms=132)
    elif kernel == "finish dq":
        attention_delta.finish_query_gradient(dq_sum, q, starts[0], scale=0.1, num_sms=132)
    elif kernel == "clear tail":
        attention_delta.clear_tail(q[0], starts[0], num_sms=132)
    else:
        config = replace(config, fused=fused)
        attention_backward.attention_backward(
            q, k, v, d_out, lse, lse, k, v, dq_sum, *starts, config=config, **how
        )


WIDTHS = ((64, 64), (128, 128), (192, 128))
MODULES = {
    "forward": ("attention.forward", "attention_forward_kernel"),
    "backward": ("attention.backward", "attention_backward_kernel"),
    "backward without dq": ("attention.backward", "attention_backward_kernel"),
    "dq": ("attention.backward_query", "query_gradient_kernel"),
    "prepare": ("attention.delta", "prepare_kernel"),
    "finish dq": ("attention.delta", "finish_query_gradient_kernel"),
    "clear tail": ("attention.delta", "clear_tail_kernel"),
}


def _launches() -> dict[str, tuple]:
    """By name, what `launch` takes."""
    found = {}
    for kernel in ("forward", "backward", "backward without dq", "dq"):
        for (D, V), causal, packed in product(WIDTHS, (True, False), (False, True)):
            if (D, kernel) == (192, "backward without dq"):
                continue  # the default there
            name = f"{kernel}, {D}/{V}, {'causal' if causal else 'full'}"
            found[name + (", packed" if packed else "")] = (kernel, D, V, causal, packed)
    for D, V in WIDTHS:
        found[f"prepare, {D}/{V}"] = ("prepare", D, V, True, False)
        found[f"prepare, {D}/{V}, packed"] = ("prepare", D, V, True, True)
    found["finish dq, 128"] = ("finish dq", 128, 128, True, True)
    found["clear tail"] = ("clear tail", 128, 128, True, True)
    return found


LAUNCHES = _launches()


def compile_launch(name: str, monkeypatch):
    """The compiled kernel of a launch in LAUNCHES."""
    module, kernel = MODULES[LAUNCHES[name][0]]
    module = importlib.import_module(f"dualpipe_ext.triton_kernels.{module}")
    return ahead_of_time.compile_kernel(
        module, kernel, lambda: launch(*LAUNCHES[name]), monkeypatch
    )
