"""The row kernels on a GPU, against plain loops on the host."""

from dataclasses import replace

import pytest
import torch

from dualpipe_ext.ops.fp8 import dequantize_rows, quantize_rows
from tests.support.expert_rows_cases import (
    CASES,
    CHECKS,
    Case,
    Tables,
    check_expand,
    check_sum_per_rank,
)

kernels = pytest.importorskip("dualpipe_ext.triton_kernels.experts.rows")
pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float32)
NAMES = ("expand", "sum_per_rank", "sum_at_home")


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loops(case):
    for check in CHECKS:
        check(kernels, CASES[case], torch.bfloat16, "cuda", num_sms=132)
    check_expand(kernels, CASES[case], torch.bfloat16, "cuda", fp8=True, num_sms=132)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "padded"), [(8, False), (136, True), (2048, False), (7168, True)])
def test_widths(H, padded, dtype):
    case = Case((100, 0, 130, 77), 130, H, L=16, padded=padded)
    for check in CHECKS:
        check(kernels, case, dtype, "cuda", num_sms=100)
    check_expand(kernels, case, dtype, "cuda", fp8=True, num_sms=100)


def test_random_plans():
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    # Each set of these is compiled apart, for seconds.
    ranks, topk, H = draw(1, 8), draw(1, 16), 8 * draw(1, 150)
    for _ in range(8):
        max_tokens = draw(0, 300)
        case = Case(
            counts=tuple(draw(0, max_tokens) for _ in range(ranks)),
            max_tokens=max_tokens,
            H=H,
            K=topk,
            L=draw(1, 40),
            dropped=draw(0, 10) / 10,
            spare=draw(-100, 200),
            padded=bool(draw(0, 1)),
        )
        for check in CHECKS:
            check(kernels, case, torch.bfloat16, "cuda", num_sms=draw(1, 132))
        check_expand(kernels, case, torch.bfloat16, "cuda", fp8=True, num_sms=draw(1, 132))


def run_expand_and_sum(tables, unique, num_sms):
    """rows of `expand`, and sums of `sum_per_rank` from them."""
    rows = torch.full((tables.R, unique.shape[2]), 7.0, dtype=unique.dtype, device="cuda")
    sums = torch.full_like(unique, 7.0)
    counts = tables.unique_counts
    kernels.expand(
        unique,
        tables.expert_rows,
        counts,
        tables.expert_offsets,
        tables.tokens_per_expert,
        rows,
        num_sms=num_sms,
    )
    kernels.sum_per_rank(rows, tables.expert_rows, counts, sums, num_sms=num_sms)
    return rows, sums


def test_sm_count_changes_no_bit():
    tables = Tables(Case((500, 0, 333), 600, 2048, L=8), "cuda")
    unique = tables.random(3, 600, 2048, dtype=torch.bfloat16)
    rows, sums = run_expand_and_sum(tables, unique, 132)
    for num_sms in (1, 7, 100, 10_000):
        again, sums_again = run_expand_and_sum(tables, unique, num_sms)
        assert torch.equal(again, rows) and torch.equal(sums_again, sums)


def compiled():
    """How many binaries each kernel has."""
    caches = [getattr(kernels, f"{name}_kernel").device_caches for name in NAMES]
    return [sum(len(cache[0]) for cache in by_device.values()) for by_device in caches]


def test_new_sizes_compile_nothing():
    case = Case((16, 128, 3, 50), 128, 136, L=4)
    for check in CHECKS:
        check(kernels, case, torch.bfloat16, "cuda", num_sms=16)
    before = compiled()
    for change in (
        dict(counts=(1, 0, 0, 1), max_tokens=1, L=1),
        dict(counts=(100, 300, 7, 0), max_tokens=301, L=9, spare=1000),
        dict(counts=(0, 0, 0, 0), max_tokens=16, spare=0),
    ):
        for check in CHECKS:
            check(kernels, replace(case, **change), torch.bfloat16, "cuda", num_sms=99)
    assert compiled() == before


def test_graph_replays_with_other_counts_and_waits_for_nothing():
    case = Case((64, 64, 64, 64), 64, 2048, L=8, dropped=0.0)
    new = Tables(replace(case, counts=(5, 64, 0, 31), dropped=0.7), "cuda", seed=1)
    captured = Tables(case, "cuda")
    captured.R = max(captured.R, new.R)
    unique = captured.random(4, 64, 2048, dtype=torch.bfloat16)
    run_expand_and_sum(captured, unique, 16)  # no kernel can be loaded during a capture
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            rows, sums = run_expand_and_sum(captured, unique, 16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("expert_rows", "unique_counts", "expert_offsets", "tokens_per_expert"):
        getattr(captured, name).copy_(getattr(new, name))
    graph.replay()
    new.R = captured.R
    want, want_sums = run_expand_and_sum(new, unique, 132)
    end = new.offsets[-1]
    assert torch.equal(rows[:end], want[:end]) and torch.equal(sums, want_sums)


def test_tables_may_start_anywhere():
    """A table of a plan is a slice of a longer tensor, aligned to 4 bytes."""
    tables = Tables(Case((40, 9), 40, 136), "cuda")
    unique = tables.random(2, 40, 136, dtype=torch.bfloat16)
    rows, sums = run_expand_and_sum(tables, unique, 8)
    for name in ("expert_rows", "unique_counts", "expert_offsets", "tokens_per_expert"):
        table = getattr(tables, name)
        buffer = table.new_empty(table.numel() + 1)
        setattr(tables, name, buffer[1:].view(table.shape).copy_(table))
    again, sums_again = run_expand_and_sum(tables, unique, 8)
    assert torch.equal(again, rows) and torch.equal(sums_again, sums)


def test_rows_past_two_to_the_31_elements():
    H, R = 7168, 2**31 // 7168 + 1000
    if torch.cuda.mem_get_info()[0] < 3 * R * H * 2:
        pytest.skip("needs 13 GB of GPU memory")
    rows = torch.empty(R, H, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(3, 1, H, device="cuda").bfloat16()
    # The third source begins past 2³¹ elements, and two of the rows do.
    boxes = torch.empty(3, R // 2, H, dtype=torch.bfloat16, device="cuda")
    boxes[:, :1] = x
    table = dict(dtype=torch.int32, device="cuda")
    routes = torch.tensor([[[R - 1]], [[5]], [[R - 2]]], **table).expand(3, R // 2, 1)
    counts = torch.ones(3, **table)
    empty = torch.zeros(2, **table)
    kernels.expand(boxes, routes, counts, empty, empty[:1], rows, num_sms=132)
    for source, row in ((0, R - 1), (1, 5), (2, R - 2)):
        assert torch.equal(rows[row], x[source, 0])
    boxes[:, :1] = 0
    kernels.sum_per_rank(rows, routes, counts, boxes, num_sms=132)
    assert torch.equal(boxes[:, :1], x)

    send = torch.tensor([[R // 2 - 1, -1, 3]], **table)
    boxes[2, 3] = boxes[0, R // 2 - 1] = x[0, 0]
    y = torch.empty(1, H, dtype=torch.bfloat16, device="cuda")
    kernels.sum_at_home(boxes, send, y, num_sms=132)
    assert torch.equal(y, 2 * x[0])


def test_fp8_on_the_gpu_is_fp8_on_the_host():
    x = torch.randn(64, 7168).mul(torch.logspace(-6, 3, 7168)).bfloat16()
    q, scales = quantize_rows(x.cuda())
    want_q, want_scales = quantize_rows(x)
    assert torch.equal(scales.cpu(), want_scales)
    assert torch.equal(q.cpu().float(), want_q.float())
    back = dequantize_rows(q, scales, torch.bfloat16)
    assert torch.equal(back.cpu(), dequantize_rows(want_q, want_scales, torch.bfloat16))


def test_a_token_with_no_route_here_becomes_zero():
    case = Case((20,), 20, 136, dropped=1.0)
    check_sum_per_rank(kernels, case, torch.bfloat16, "cuda")
