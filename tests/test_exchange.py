"""The exchange's contract on the reference backend; the NVLink backend's is in tests/gpu."""

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext import Exchange
from dualpipe_ext.backend import choose_backend
from tests.exchange_cases import (
    ROUTINGS,
    Case,
    check_bad_arguments,
    check_case,
    check_gradients,
    check_halves,
    check_routings,
)
from tests.workers import WorkerPool


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


def test_gradients(gloo_workers_4):
    gloo_workers_4.run(check_gradients, "reference")


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
    from dualpipe_ext import agreement
    from dualpipe_ext.peer_memory import PeerMemory

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
