"""The exchange's contract on the reference backend; the NVLink backend's is in tests/gpu."""

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext import ROW_ALIGNMENT, Exchange, RowsOverflowError
from dualpipe_ext.exchange.options import MAX_LOCAL_EXPERTS, MAX_TOPK
from dualpipe_ext.ranks.backend import MAX_RANKS, choose_backend
from tests.support.exchange_cases import (
    ROUTINGS,
    Case,
    check_bad_arguments,
    check_case,
    check_gradients,
    check_halves,
    check_routings,
)
from tests.support.workers import WorkerPool


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_routing_on_four_ranks(gloo_workers_4, dtype):
    ran = gloo_workers_4.run(check_routings, "reference", 24, 3, 8, 40, (16,), dtype)
    assert ran == ["reference"] * 4


def test_two_groups_side_by_side(gloo_workers_4):
    gloo_workers_4.run(check_halves, "reference")


def test_three_ranks():
    with WorkerPool(3, "gloo") as pool:
        pool.run(check_routings, "reference", 136, 2, 12, 97)


@settings(max_examples=30)
@given(
    routing=st.sampled_from(ROUTINGS),
    tokens=st.integers(1, 300),
    topk=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_any_shape_on_one_rank(routing, tokens, topk, seed):
    case = Case(routing, 8, topk, 8, tokens, seed, torch.float32)
    sizes = dict(hidden=8, num_experts=8, topk=topk, max_tokens=tokens, dtype=torch.float32)
    with Exchange(backend="reference", device="cpu", **sizes) as exchange:
        check_case(exchange, case)


@pytest.mark.parametrize(
    ("comm_sms", "form"),
    [(0, "unique"), (16, "unique"), (17, "expert"), (0.125, "unique"), (0.13, "expert")],
)
def test_form_by_default(comm_sms, form):
    """Few SMs send unique rows; both forms have the same results, see `check_case`."""
    sizes = dict(hidden=8, num_experts=8, topk=2, max_tokens=4)
    with Exchange(comm_sms=comm_sms, device="cpu", **sizes) as exchange:
        assert exchange.form == form


def test_gradients(gloo_workers_4):
    gloo_workers_4.run(check_gradients, "reference")


def _unique_rows(rank, group):
    """Rows sent once a rank, expanded by the plan, are those of dispatch; and the way back."""
    case = Case("dropped", 24, 3, 8, 40, seed=2, dtype=torch.float32)
    sizes = dict(hidden=24, num_experts=8, topk=3, max_tokens=40, dtype=torch.float32)
    with Exchange(group, comm_sms=0, device="cpu", **sizes) as exchange:
        assert exchange.form == "unique" and "form='unique'" in repr(exchange)
        x, plan = case.x(rank), exchange.plan(case.topk_idx(rank, exchange.world_size))
        rows = exchange.dispatch(x, plan)
        expanded = torch.zeros_like(rows)
        with exchange.send(x, plan, topk_weight=case.topk_weight(rank)) as received:
            for source, count in enumerate(plan.unique_counts.tolist()):
                token, k = (plan.expert_rows[source, :count] >= 0).nonzero(as_tuple=True)
                expanded[plan.expert_rows[source, token, k].long()] = received.rows[source, token]
        assert torch.equal(expanded, rows)
        departure = exchange.leave(None, plan)
        sums = departure.sums
        for source, count in enumerate(plan.unique_counts.tolist()):
            for i, slots in enumerate(plan.expert_rows[source, :count].tolist()):
                sums[source, i] = rows[[slot for slot in slots if slot >= 0]].sum(0)
        y = exchange.fetch(departure, plan)
        torch.testing.assert_close(y, exchange.combine(rows, plan), rtol=1e-6, atol=1e-6)

        received = exchange.send(x, plan, topk_weight=case.topk_weight(rank))
        rows_too, row_weight = exchange.arrive(received, plan)
        expected = exchange.dispatch(x, plan, topk_weight=case.topk_weight(rank))
        assert torch.equal(rows_too, rows) and torch.equal(row_weight, expected[1])
        departure = exchange.leave(rows, plan, row_weight=row_weight, channel="backward")
        found = exchange.fetch(departure, plan)
        want = exchange.combine(rows, plan, row_weight=row_weight)
        torch.testing.assert_close(found[0], want[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(found[1], want[1])


def test_unique_rows(gloo_workers_4):
    gloo_workers_4.run(_unique_rows)


def test_fp8_payload_is_rounded_and_passes_gradients():
    sizes = dict(hidden=32, num_experts=4, topk=2, max_tokens=50)
    with Exchange(form="unique", device="cpu", **sizes) as exchange:
        x = torch.randn(50, 32).bfloat16().requires_grad_()
        plan = exchange.plan(torch.rand(50, 4).topk(2).indices.int())
        rows, exact = exchange.dispatch(x, plan, payload="fp8"), exchange.dispatch(x, plan)
        error = (rows - exact).float().norm() / exact.float().norm()
        assert 1e-3 < error < 4e-2
        (dx,) = torch.autograd.grad(rows, x, rows.detach())
        assert torch.equal(dx, exchange.combine(rows.detach(), plan))


def test_too_many_rows_for_max_rows():
    sizes = dict(hidden=8, num_experts=2, topk=1, max_tokens=200, max_rows=256)
    with Exchange(device="cpu", **sizes) as exchange:
        plan = exchange.plan(torch.zeros(200, 1, dtype=torch.int32))
        assert exchange.dispatch(torch.ones(200, 8).bfloat16(), plan).shape == (256, 8)
        one_each = torch.arange(200, dtype=torch.int32)[:, None] % 2
        one_each[:30] = 0  # 115 and 85 rows: one tile of 128 each
        assert exchange.plan(one_each).num_rows == 256
        one_each[:60] = 0  # 130 rows: two tiles
        with pytest.raises(RowsOverflowError, match="384 rows .* max_rows=256.* max_rows=384"):
            exchange.plan(one_each)


def test_bad_arguments_name_value_limit_and_remedy(gloo_workers_4):
    messages = gloo_workers_4.run(check_bad_arguments, "reference")[0]
    assert any("hidden=70 is not a multiple of 8: pad the model width to 72" in m for m in messages)
    assert any("num_experts=9" in m and "use 12 experts" in m for m in messages)
    assert any("20 tokens exceed max_tokens=16" in m for m in messages)


def test_bad_arguments_without_a_group():
    check_bad_arguments(0, None, "auto")


def test_nvlink_backend_says_why_it_cannot_run_on_a_cpu():
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu, 4)[0] == "reference"
    with pytest.raises(ValueError, match="tokens are on cpu: move the model to a CUDA device"):
        choose_backend("nvlink", cpu, 4)
    with pytest.raises(ValueError, match="cannot run here"):
        Exchange(hidden=8, num_experts=2, topk=1, max_tokens=4, backend="nvlink", device="cpu")


@pytest.mark.parametrize(
    ("world_size", "capability", "peers", "message"),
    [
        (2, (9, 0), False, "GPU 0 has no peer access to GPU 1: hide it with CUDA_VISIBLE_DEVICES"),
        (9, (9, 0), True, "9 ranks are more than 8 in one NVLink domain: split the group"),
        (2, (8, 0), True, r"capability \(8, 0\) is not one of .*: use such a GPU"),
        (2, (9, 0), True, None),
    ],
)
def test_nvlink_backend_says_what_the_gpus_lack(
    monkeypatch, world_size, capability, peers, message
):
    """What torch says of the GPUs is made up; the decision is real."""
    monkeypatch.setitem(sys.modules, "dualpipe_ext._C", ModuleType("_C"))
    monkeypatch.setattr("dualpipe_ext._C", ModuleType("_C"), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: peers)
    gpu = torch.device("cuda", 0)
    if message is None:
        assert choose_backend("auto", gpu, world_size)[0] == "nvlink"
        return
    assert choose_backend("auto", gpu, world_size)[0] == "reference"
    with pytest.raises(ValueError, match=message):
        choose_backend("nvlink", gpu, world_size)


def _exchange_after_others(rank, group):
    """As if rank 1 had opened an exchange in a smaller group: torch's rendezvous would hang."""
    from dualpipe_ext.exchange import options as agreement
    from dualpipe_ext.ranks.peer_memory import PeerMemory

    original = agreement.choose_backend
    agreement.choose_backend = lambda *args: ("nvlink", "pretended")
    PeerMemory.rendezvous = int(rank == 1)
    try:
        Exchange(group, hidden=8, num_experts=4, topk=1, max_tokens=4, device="cpu")
    except ValueError as error:
        return str(error)
    finally:
        agreement.choose_backend = original
        PeerMemory.rendezvous = 0


def test_uneven_rendezvous_are_refused_everywhere(gloo_workers_4):
    for message in gloo_workers_4.run(_exchange_after_others):
        assert "opened [0, 1, 0, 0] NVLink exchanges" in message


def test_limits_are_those_of_the_kernels():
    """Checked before the extension is loaded, and without one."""
    kernels = pytest.importorskip("dualpipe_ext._C")
    assert kernels.MAX_RANKS == MAX_RANKS
    assert (kernels.MAX_TOPK, kernels.MAX_LOCAL_EXPERTS) == (MAX_TOPK, MAX_LOCAL_EXPERTS)
    assert kernels.ROW_ALIGNMENT == ROW_ALIGNMENT
    assert kernels.FAULT_ROWS_NEEDED == 6 and kernels.FAULT_BAD_INDEX == 7
    assert len(kernels.OPERATIONS) == 5 and sorted(kernels.PHASES) == [1, 2, 3]
