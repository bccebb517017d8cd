"""The plain kernels of the experts: their rows, the grouped MLP, fp8."""

from __future__ import annotations

from functools import partial

import torch

from tests.support.launches.launch import Launch

BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn

ROWS = {
    "as in the target": {},
    "without weights": dict(weighted=False),
    "H 2048, top-8, 8 ranks": dict(H=2048, P=8),
    "H 136": dict(H=136),
    "top-10, two ranks": dict(H=2048, K=10, P=2),
    "top-32": dict(K=32, P=8),
    "fp32": dict(dtype=FP32),
}


def _rows(name, dtype=BF16, H=7168, K=8, P=4, fp8=False, weighted=True) -> None:
    from dualpipe_ext.triton_kernels.experts import rows as kernels

    T, L, R = 64, 8, 1024

    def table(*shape):
        return torch.zeros(shape, dtype=torch.int32)

    rows, x = torch.empty(R, H, dtype=dtype), torch.empty(T, H, dtype=dtype)
    boxes, routes = torch.empty(P, T, H, dtype=dtype), table(P, T, K)
    counts, send = table(P), table(T, P)
    of_rows, of_tokens, of_boxes = torch.empty(R), torch.empty(T, K), torch.empty(P, T, K)
    scales = torch.empty(P, T, -(-H // 128)) if fp8 else None
    unique = boxes.to(E4M3) if fp8 else boxes
    home = dict(topk_idx=table(T, K), received_weight=of_boxes, topk_weight=of_tokens)
    arguments, weights = {
        "expand": (
            (unique, routes, counts, table(L + 1), table(L), rows),
            dict(topk_weight=of_boxes, row_weight=of_rows),
        ),
        "sum_per_rank": (
            (rows, routes, counts, boxes),
            dict(row_weight=of_rows, sum_weight=of_boxes),
        ),
        "sum_at_home": ((boxes, send, x), home | dict(num_local_experts=L)),
    }[name]
    options = (weights if weighted else {}) | (dict(scales=scales) if fp8 else {})
    getattr(kernels, name)(*arguments, num_sms=132, **options)


def expert_rows():
    def launch(name, case, options):
        first = case == "as in the target"
        kernel, call = f"experts.rows.{name}_kernel", partial(_rows, name, **options)
        return Launch("expert_rows", f"{name}: {case}", kernel, call, also_sm_100=first)

    for name in ("expand", "sum_per_rank", "sum_at_home"):
        for case, options in ROWS.items():
            yield launch(name, case, options)
    for H in (136, 7168):
        yield launch("expand", f"fp8, H {H}", dict(fp8=True, H=H))


def _mlp(name: str) -> None:
    from dualpipe_ext.triton_kernels.experts import gemm, swiglu, wgrad

    R, L, H, I = 256, 8, 256, 128  # noqa: E741
    rows, act, gate_up = (torch.empty(R, width, dtype=BF16) for width in (H, I, 2 * I))
    w13, w2 = torch.empty(L, 2 * I, H, dtype=BF16), torch.empty(L, H, I, dtype=BF16)
    offsets, weight, how = torch.zeros(L + 1, dtype=torch.int32), torch.empty(R), dict(num_sms=132)
    if name.startswith("gate_up"):
        saved = gate_up if name == "gate_up" else None
        swiglu.grouped_gate_up(rows, weight, w13, offsets, act, saved, **how)
    elif name == "down":
        gemm.grouped_gemm(act, w2, offsets, rows, weight_is_nk=True, **how)
    elif name == "drows":
        gemm.grouped_gemm(gate_up, w13, offsets, rows, weight_is_nk=False, **how)
    elif name == "swiglu_backward":
        swiglu.grouped_swiglu_backward(rows, w2, gate_up, weight, offsets, gate_up, **how)
    else:
        accumulate = name == "wgrad_accumulate"
        dw = w13.float() if accumulate else w13
        wgrad.grouped_wgrad(gate_up, rows, offsets, dw, accumulate=accumulate, **how)


def grouped_mlp():
    """Every kernel with every default configuration."""
    for name, kernel, also_sm_100 in (
        ("gate_up", "swiglu.gate_up_kernel", True),
        ("gate_up_inference", "swiglu.gate_up_kernel", False),
        ("down", "gemm.grouped_gemm_kernel", True),
        ("swiglu_backward", "swiglu.swiglu_backward_kernel", True),
        ("drows", "gemm.grouped_gemm_kernel", False),
        ("wgrad", "wgrad.grouped_wgrad_kernel", True),
        ("wgrad_accumulate", "wgrad.grouped_wgrad_kernel", False),
    ):
        kernel, call = f"experts.{kernel}", partial(_mlp, name)
        yield Launch("grouped_mlp", name, kernel, call, also_sm_100, sizes_of_a_model=True)


def _fp8(name: str) -> None:
    from dualpipe_ext.triton_kernels.experts import fp8_gemm, fp8_swiglu, quantize

    rows, weight = torch.empty(256, 256, dtype=BF16), torch.empty(2, 512, 256, dtype=BF16)
    offsets, how = torch.zeros(3, dtype=torch.int32), dict(num_sms=132)
    if name.startswith("gemm"):
        scales, out = (torch.empty(2, 256), torch.empty(2, 4, 2)), torch.empty(256, 512, dtype=BF16)
        tensors = (rows.to(E4M3), scales[0], weight.to(E4M3), scales[1], offsets, out)
        how |= dict(config=getattr(fp8_gemm, name.split()[-1].upper()))
        fp8_gemm.grouped_fp8_gemm(*tensors, **how)
    elif name == "swiglu":
        fp8_swiglu.swiglu(rows, torch.empty(256), offsets, **how)
    elif name == "swiglu backward":
        act = rows[:, :128].contiguous()
        fp8_swiglu.swiglu_backward(act, rows, torch.empty(256), offsets, rows, act, **how)
    elif name == "rows":
        quantize.quantize_rows(rows, offsets, **how)
    else:
        quantize.quantize_weights(weight)


def grouped_fp8():
    for name, kernel in {
        "gemm, forward": "fp8_gemm.grouped_fp8_kernel",
        "gemm, backward": "fp8_gemm.grouped_fp8_kernel",
        "rows": "quantize.quantize_rows_kernel",
        "weights": "quantize.quantize_weights_kernel",
        "swiglu": "fp8_swiglu.swiglu_kernel",
        "swiglu backward": "fp8_swiglu.swiglu_backward_kernel",
    }.items():
        gluon, call = name.startswith("gemm"), partial(_fp8, name)
        yield Launch("grouped_fp8", name, f"experts.{kernel}", call, also_sm_100=not gluon)
