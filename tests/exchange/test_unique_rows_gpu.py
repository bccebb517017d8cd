"""Unique rows: the exchange whose expansion and sums run on the compute SMs, and copy engines."""

import pytest
import torch

from dualpipe_ext import DualPipeError, Exchange, RowsOverflowError
from dualpipe_ext.ops.fp8 import dequantize_rows, quantize_rows
from tests.support.compare import relative_error
from tests.support.exchange_cases import Case, check_routings

four = pytest.mark.gpu_4
COMM_SMS = (0, 1, 3, 8, 24)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [8, 136, 7168])
def test_one_rank(hidden, dtype):
    args = (0, None, "nvlink", hidden, 3, 8, 200, COMM_SMS, dtype, "unique")
    assert check_routings(*args) == "nvlink"


@four
@pytest.mark.parametrize("topk", [1, 2, 8])
@pytest.mark.parametrize("hidden", [8, 136, 2048, 7168])
def test_every_routing(gpu_workers_4, hidden, topk):
    args = ("nvlink", hidden, topk, 16, 150, COMM_SMS, torch.bfloat16, "unique")
    assert gpu_workers_4.run(check_routings, *args) == ["nvlink"] * 4


@four
def test_fp32_rows(gpu_workers_4):
    args = ("nvlink", 7168, 8, 64, 300, (0, 24), torch.float32, "unique")
    gpu_workers_4.run(check_routings, *args)


def _fp8_rows(rank, group, hidden):
    """fp8 rows and scales are bitwise those of plain torch; their gradient is a bf16 combine."""
    case = Case("dropped", hidden, 4, 16, 200, seed=5)
    sizes = dict(hidden=hidden, num_experts=16, topk=4, max_tokens=200, form="unique")
    with Exchange(group, backend="nvlink", **sizes) as exchange:
        ranks = exchange.world_size
        idx = case.topk_idx(rank, ranks)
        plan = exchange.plan(idx.to(exchange.device))
        x = case.x(rank).to(exchange.device)
        x[: len(x) // 2] *= 1e-3
        x[-1:] = 0
        x.requires_grad_()
        everyone = [case.x(p) for p in range(ranks)]
        for comm_sms in (0, 1, 8, 24):
            exchange.comm_sms = comm_sms
            with exchange.send(x.detach(), plan, payload="fp8") as received:
                for source in range(ranks):
                    theirs = everyone[source].clone()
                    theirs[: len(theirs) // 2] *= 1e-3
                    theirs[-1:] = 0
                    experts = case.topk_idx(source, ranks) // exchange.num_local_experts
                    rows, scales = quantize_rows(theirs[(experts == rank).any(1)])
                    count = int(plan.unique_counts[source])
                    got = received.rows[source, :count].cpu()
                    assert torch.equal(got.view(torch.uint8), rows.view(torch.uint8))
                    assert torch.equal(received.scales[source, :count].cpu(), scales)
            rows = exchange.dispatch(x, plan, payload="fp8")
            exact = exchange.dispatch(x.detach(), plan)
            want = dequantize_rows(*quantize_rows(exact), torch.bfloat16)
            assert torch.equal(rows, want)
            assert relative_error(rows.detach(), exact.double().cpu()) < 4e-2
        d_rows = torch.randn(rows.shape, device=exchange.device).bfloat16()
        (dx,) = torch.autograd.grad(rows, x, d_rows)
        assert torch.equal(dx, exchange.combine(d_rows, plan))


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [16, 144, 7168])
def test_fp8_on_one_rank(hidden):
    _fp8_rows(0, None, hidden)


@four
@pytest.mark.parametrize("hidden", [16, 144, 2048, 7168])
def test_fp8_on_four_ranks(gpu_workers_4, hidden):
    gpu_workers_4.run(_fp8_rows, hidden)


def _held_rows(rank, group):
    sizes = dict(hidden=64, num_experts=8, topk=2, max_tokens=16, form="unique")
    with Exchange(group, backend="nvlink", **sizes) as exchange:
        idx = torch.tensor([[0, 5]] * 9, dtype=torch.int32, device=exchange.device)
        x = torch.randn(9, 64, device=exchange.device).bfloat16()
        plan = exchange.plan(idx)
        held = exchange.send(x, plan)
        with pytest.raises(DualPipeError, match="release"):
            exchange.dispatch(x, plan)
        exchange.dispatch(x, plan, channel="backward")  # the other channel has its own buffers
        held.release()
        rows = exchange.dispatch(x, plan)
        side = torch.cuda.Stream()
        for _ in range(20):  # expansion and sums on one stream, transfers on another
            received = exchange.send(x, plan)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                expanded = exchange.arrive(received, plan)
                departure = exchange.leave(expanded, plan)
            torch.cuda.current_stream().wait_stream(side)
            y = exchange.fetch(departure, plan)
            assert torch.equal(expanded, rows)
            assert torch.equal(y, exchange.combine(rows, plan))
        bad = idx.clone()
        bad[2, 0] = 8
        with pytest.raises(IndexError):
            exchange.dispatch(x, exchange.plan(bad))
        assert torch.equal(exchange.dispatch(x, plan), rows)  # nothing is held by the failed call


@four
def test_held_rows_are_refused(gpu_workers_4):
    gpu_workers_4.run(_held_rows)


def _graph(rank, group, form, comm_sms):
    """Plan, dispatch, an expert, combine and their backward in one graph, replayed with other
    routings; equal to the same calls without a graph, and no call waits for the device."""
    sizes = dict(hidden=256, num_experts=16, topk=4, max_tokens=100)
    generator = torch.Generator("cuda").manual_seed(rank)
    max_rows = 4 * 100 * 4 + 4 * 128
    max_rows = -(-max_rows // 128) * 128
    exchange = Exchange(
        group, backend="nvlink", form=form, max_rows=max_rows, comm_sms=comm_sms, **sizes
    )
    idx = torch.empty(100, 4, dtype=torch.int32, device="cuda")
    x = torch.empty(100, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.empty(100, 4, device="cuda", requires_grad=True)

    def draw():
        score = torch.rand(100, 16, device="cuda", generator=generator)
        idx.copy_(score.topk(4).indices)
        with torch.no_grad():
            x.copy_(torch.randn(100, 256, device="cuda", generator=generator))
            weight.copy_(torch.rand(100, 4, device="cuda", generator=generator))

    def step():
        plan = exchange.plan(idx)
        rows, row_weight = exchange.dispatch(x, plan, topk_weight=weight)
        y = exchange.combine(rows * row_weight[:, None].bfloat16(), plan)
        return y.detach(), *torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    draw()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(20):
        draw()
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
        want = x.detach().double() * weight.detach().double().sum(1, keepdim=True)
        assert relative_error(replayed[0], want.cpu()) < 1e-2
    exchange.check()
    exchange.close()


@four
@pytest.mark.parametrize(
    ("form", "comm_sms"), [("expert", 8), ("unique", 8), ("unique", 0)], ids=str
)
def test_graph_with_changing_routing(gpu_workers_4, form, comm_sms):
    gpu_workers_4.run(_graph, form, comm_sms)


def _overflow(rank, group, form):
    """Too many rows for rank 0: it says how many are needed, and later calls are right again."""
    sizes = dict(hidden=64, num_experts=8, topk=2, max_tokens=400)
    with Exchange(group, backend="nvlink", form=form, max_rows=512, **sizes) as exchange:
        ranks, device = exchange.world_size, exchange.device
        x = torch.randn(400, 64, device=device).bfloat16()
        to_rank_0 = torch.tensor([[0, 1]] * 400, dtype=torch.int32, device=device)

        def too_many():
            plan = exchange.plan(to_rank_0)
            exchange.combine(exchange.dispatch(x, plan), plan)
            torch.cuda.synchronize()
            exchange.check()

        if rank == 0:
            with pytest.raises(RowsOverflowError) as overflow:
                too_many()
            needed = 2 * -(-400 * ranks // 128) * 128
            assert (overflow.value.needed, overflow.value.max_rows) == (needed, 512)
        else:
            too_many()
        few = torch.tensor([[2 * rank, 2 * rank + 1]] * 100, dtype=torch.int32, device=device)
        plan = exchange.plan(few % 8)
        y = exchange.combine(exchange.dispatch(x[:100], plan), plan)
        assert torch.equal(y, 2 * x[:100])
        exchange.check()


@four
@pytest.mark.parametrize("form", ["expert", "unique"])
def test_overflow_is_reported(gpu_workers_4, form):
    gpu_workers_4.run(_overflow, form)
