"""Every attention kernel as launches, and what they compile to for sm_90.

`python -m tests.flash_attention_kernels` prints the table that test_flash_attention.py holds them
to.
"""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from tests.test_grouped_mlp import resource_usage

# (registers a thread, bytes of shared memory, of stack a thread) of each launch, Triton 3.6. 168
# registers are what a launch of three warpgroups has; they share them out as 240 + 240 + 24 or
# 232 + 232 + 40. Where there is a stack, it holds numbers of a tile or of a head of it: 2 or 3
# loads a head and as many a tile, none in the loops over queries.
RESOURCES = {
    "forward, 64/64, causal": (168, 164392, 0),
    "forward, 64/64, causal, packed": (168, 164424, 0),
    "forward, 64/64, full": (168, 164392, 0),
    "forward, 64/64, full, packed": (168, 164424, 0),
    "forward, 128/128, causal": (168, 197064, 0),
    "forward, 128/128, causal, packed": (168, 197096, 0),
    "forward, 128/128, full": (168, 197064, 0),
    "forward, 128/128, full, packed": (168, 197096, 0),
    "forward, 192/128, causal": (168, 213520, 0),
    "forward, 192/128, causal, packed": (168, 213552, 0),
    "forward, 192/128, full": (168, 213520, 0),
    "forward, 192/128, full, packed": (168, 213552, 0),
    "backward, 64/64, causal": (168, 99936, 0),
    "backward, 64/64, causal, packed": (168, 99952, 0),
    "backward, 64/64, full": (168, 99936, 0),
    "backward, 64/64, full, packed": (168, 99952, 0),
    "backward, 128/128, causal": (168, 181856, 24),
    "backward, 128/128, causal, packed": (168, 181872, 16),
    "backward, 128/128, full": (168, 181856, 32),
    "backward, 128/128, full, packed": (168, 181872, 16),
    "backward, 192/128, causal": (168, 156800, 8),
    "backward, 192/128, causal, packed": (168, 156800, 0),
    "backward, 192/128, full": (168, 156800, 8),
    "backward, 192/128, full, packed": (168, 156800, 0),
    "backward without dq, 64/64, causal": (168, 83456, 0),
    "backward without dq, 64/64, causal, packed": (168, 83488, 0),
    "backward without dq, 64/64, full": (168, 83456, 0),
    "backward without dq, 64/64, full, packed": (168, 83488, 0),
    "backward without dq, 128/128, causal": (168, 165376, 8),
    "backward without dq, 128/128, causal, packed": (168, 165408, 8),
    "backward without dq, 128/128, full": (168, 165376, 0),
    "backward without dq, 128/128, full, packed": (168, 165408, 0),
    "dq, 64/64, causal": (168, 98768, 0),
    "dq, 64/64, causal, packed": (168, 98800, 0),
    "dq, 64/64, full": (168, 98768, 0),
    "dq, 64/64, full, packed": (168, 98800, 0),
    "dq, 128/128, causal": (168, 164368, 0),
    "dq, 128/128, causal, packed": (168, 164400, 0),
    "dq, 128/128, full": (168, 164368, 0),
    "dq, 128/128, full, packed": (168, 164400, 0),
    "dq, 192/128, causal": (168, 164384, 0),
    "dq, 192/128, causal, packed": (168, 164416, 0),
    "dq, 192/128, full": (168, 164384, 0),
    "dq, 192/128, full, packed": (168, 164416, 0),
    "prepare, 64/64": (48, 0, 0),
    "prepare, 64/64, packed": (48, 0, 0),
    "prepare, 128/128": (48, 0, 0),
    "prepare, 128/128, packed": (48, 0, 0),
    "prepare, 192/128": (43, 0, 0),
    "prepare, 192/128, packed": (40, 0, 0),
    "finish dq, 128": (78, 0, 0),
    "clear tail": (24, 0, 0),
}

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}


class AheadOfTime:
    """Stands in for a Gluon kernel: compiles what a launch would, for sm_90."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, num_warps, **constants):
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.experimental.gluon._runtime import GluonASTSource

        signature, attributes = dict.fromkeys(self.kernel.arg_names, "constexpr"), {}
        parameters = zip(self.kernel.params, arguments, strict=False)
        for i, (parameter, value) in enumerate(parameters):
            name = parameter.name
            if hasattr(value, "block_shape"):
                kind = TYPES[value.base.dtype]
                signature[name] = f"tensordesc<{kind}{list(value.block_shape)},{value.layout!r}>"
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                if not parameter.do_not_specialize_on_alignment:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                assert parameter.do_not_specialize, f"{name} would compile every value"
                signature[name] = "i32"
        source = GluonASTSource(self.kernel, signature, constants, attributes)
        target = GPUTarget("cuda", 90, 32)
        self.compiled = compile(source, target=target, options={"num_warps": num_warps})


def launch(kernel: str, D: int, V: int, causal: bool, packed: bool) -> None:
    """Only shapes and dtypes of the tensors matter."""
    from dualpipe_ext.triton_kernels import (
        attention_backward,
        attention_backward_query,
        attention_delta,
        attention_forward,
    )

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
    "forward": ("attention_forward", "attention_forward_kernel"),
    "backward": ("attention_backward", "attention_backward_kernel"),
    "backward without dq": ("attention_backward", "attention_backward_kernel"),
    "dq": ("attention_backward_query", "query_gradient_kernel"),
    "prepare": ("attention_delta", "prepare_kernel"),
    "finish dq": ("attention_delta", "finish_query_gradient_kernel"),
    "clear tail": ("attention_delta", "clear_tail_kernel"),
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
    ahead = AheadOfTime(getattr(module, kernel))
    monkeypatch.setattr(module, kernel, ahead)
    launch(*LAUNCHES[name])
    return ahead.compiled


def main() -> None:
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        for name in LAUNCHES:
            with pytest.MonkeyPatch.context() as monkeypatch:
                compiled = compile_launch(name, monkeypatch)
            usage = resource_usage(compiled.asm["cubin"], Path(folder))
            numbers = (usage["REG"], compiled.metadata.shared, usage["STACK"] + usage["LOCAL"])
            print(f"    {name!r}: {numbers},", flush=True)


if __name__ == "__main__":
    main()
