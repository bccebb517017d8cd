"""The exchange's contract on NVLink, against the oracle and against the reference backend."""

import random
import time

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext import Exchange, PeerTimeoutError
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

four = pytest.mark.gpu_4
COMM_SMS = (1, 3, 8, 24)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [8, 136, 7168])
def test_one_rank(hidden, dtype):
    ran = check_routings(0, None, "nvlink", hidden, 3, 8, 200, COMM_SMS, dtype)
    assert ran == "nvlink"


@pytest.mark.gpu
def test_one_rank_with_many_experts():
    check_routings(0, None, "nvlink", 64, 32, 512, 150)
    check_routings(0, None, "nvlink", 64, 5, 300, 1000)


@pytest.mark.gpu
def test_one_rank_gradients_and_bad_arguments():
    check_gradients(0, None, "nvlink")
    messages = check_bad_arguments(0, None, "nvlink")
    assert any("comm_sms=10000 is outside [0, " in m for m in messages)


@four
@pytest.mark.parametrize("topk", [1, 2, 8])
@pytest.mark.parametrize("hidden", [8, 136, 2048, 7168])
def test_every_routing(gpu_workers_4, hidden, topk):
    args = ("nvlink", hidden, topk, 16, 150, COMM_SMS)
    assert gpu_workers_4.run(check_routings, *args) == ["nvlink"] * 4


@four
def test_fp32_rows(gpu_workers_4):
    gpu_workers_4.run(check_routings, "nvlink", 7168, 8, 64, 300, (24,), torch.float32)


@four
def test_many_tokens(gpu_workers_4):
    gpu_workers_4.run(check_routings, "nvlink", 256, 8, 64, 3000, (8, 24))


@four
def test_reference_backend_on_nccl(gpu_workers_4):
    gpu_workers_4.run(check_routings, "reference", 136, 8, 16, 150)


@four
def test_two_groups_side_by_side(gpu_workers_4):
    gpu_workers_4.run(check_halves, "nvlink")


@four
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_fewer_ranks(num_ranks):
    with WorkerPool(num_ranks, "nccl") as pool:
        pool.run(check_routings, "nvlink", 136, 2, 4 * num_ranks, 97)


@four
def test_gradients(gpu_workers_4):
    gpu_workers_4.run(check_gradients, "nvlink")


@four
def test_bad_arguments(gpu_workers_4):
    gpu_workers_4.run(check_bad_arguments, "nvlink")


def _random_shapes(rank, group, iterations):
    draw = random.Random(7)  # the same sequence on every rank
    exchanges = [
        Exchange(group, hidden=h, num_experts=16, topk=k, max_tokens=t, dtype=dtype)
        for h, k, t, dtype in (
            (8, 1, 30, torch.bfloat16),
            (264, 5, 90, torch.bfloat16),
            (1024, 8, 64, torch.float32),
        )
    ]
    for i in range(iterations):
        exchange = draw.choice(exchanges)
        exchange.comm_sms = draw.randint(1, 32)
        case = Case(
            draw.choice(ROUTINGS),
            exchange.hidden,
            exchange.topk,
            16,
            draw.randint(1, exchange.max_tokens),
            seed=i,
            dtype=exchange.dtype,
        )
        check_case(exchange, case, draw.choice(("forward", "backward")))
    for exchange in exchanges:
        exchange.close()


@four
def test_thousand_random_shapes_on_reused_buffers(gpu_workers_4):
    gpu_workers_4.run(_random_shapes, 1000, timeout=400)


def _against_reference(rank, group):
    """Full size, where the oracle's loops would take minutes."""
    sizes = dict(hidden=7168, num_experts=64, topk=8, max_tokens=4096)
    generator = torch.Generator("cuda").manual_seed(rank)
    idx = torch.rand(4096, 64, device="cuda", generator=generator).topk(8).indices.int()
    x = torch.randn(4096, 7168, device="cuda", generator=generator).bfloat16()
    results = []
    for backend in ("reference", "nvlink", "nvlink"):
        with Exchange(group, backend=backend, **sizes) as exchange:
            plan = exchange.plan(idx)
            rows = exchange.dispatch(x, plan)
            results.append((plan.slots, rows, exchange.combine(rows, plan)))
    reference, first, second = results
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # the same bits
    assert torch.equal(first[0], reference[0]) and torch.equal(first[1], reference[1])
    assert (first[2].float() - reference[2].float()).norm() < 5e-3 * reference[2].float().norm()


@four
def test_full_size_equals_reference_and_itself(gpu_workers_4):
    gpu_workers_4.run(_against_reference)


def _both_channels_at_once(rank, group, iterations):
    """A forward dispatch and a backward combine in flight together, on two streams."""
    sizes = dict(hidden=2048, num_experts=16, topk=4, max_tokens=256)
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    generator = torch.Generator("cuda").manual_seed(rank)
    with Exchange(group, backend="nvlink", comm_sms=8, **sizes) as exchange:
        idx = torch.rand(256, 16, device="cuda", generator=generator).topk(4).indices.int()
        x = torch.randn(256, 2048, device="cuda", generator=generator).bfloat16()
        plan = exchange.plan(idx)
        rows = exchange.dispatch(x, plan)
        y = exchange.combine(rows, plan)
        torch.cuda.synchronize()
        # CUDA loads a kernel at its first launch, and may wait for running ones: not in the loop.
        wrong = (rows != rows).sum() + (y != y).sum()
        wrong_too = wrong.clone()
        wrong += wrong_too
        for i in range(iterations):
            # Ranks enqueue the two in different orders: the channels may not wait for each other.
            for part in (0, 1) if (i + rank) % 2 else (1, 0):
                if part == 0:
                    with torch.cuda.stream(one):
                        wrong += (exchange.dispatch(x, plan, channel="forward") != rows).sum()
                else:
                    with torch.cuda.stream(other):
                        wrong_too += (exchange.combine(rows, plan, channel="backward") != y).sum()
        torch.cuda.synchronize()
        exchange.check()
        return int(wrong), int(wrong_too)


@four
def test_both_channels_in_flight(gpu_workers_4):
    assert gpu_workers_4.run(_both_channels_at_once, 1000) == [(0, 0)] * 4


def _missing_rank(rank, group, operation, timeout):
    """Rank 2 stays away from one call; returns what the others were told, and when."""
    sizes = dict(hidden=64, num_experts=8, topk=2, max_tokens=32)
    exchange = Exchange(group, backend="nvlink", timeout=timeout, **sizes)
    idx = torch.randint(0, 8, (32, 2), dtype=torch.int32, device="cuda")
    plan = exchange.plan(idx)
    x = torch.randn(32, 64, device="cuda").bfloat16()
    rows = exchange.dispatch(x, plan)
    torch.cuda.synchronize()
    dist.barrier(group)
    start, told = time.monotonic(), None
    if rank != 2:
        try:
            if operation == "plan":
                _ = exchange.plan(idx).num_rows
            else:
                call = exchange.dispatch if operation == "dispatch" else exchange.combine
                call(x if operation == "dispatch" else rows, plan, channel="backward")
                torch.cuda.synchronize()
                exchange.check()
        except PeerTimeoutError as error:
            told = (error.peer, error.rank, error.channel, str(error))
    seconds = time.monotonic() - start
    dist.barrier(group)
    exchange.close()
    return told, seconds


@four
@pytest.mark.parametrize("operation", ["plan", "dispatch", "combine"])
def test_a_rank_that_never_arrives(gpu_workers_4, operation):
    results = gpu_workers_4.run(_missing_rank, operation, 1.5)
    for rank in (0, 1, 3):
        (peer, told_rank, channel, message), seconds = results[rank]
        assert (peer, told_rank) == (2, rank) and operation in message
        assert channel == ("forward" if operation == "plan" else "backward")
        assert 1.4 < seconds < 10
    # The group and new exchanges still work.
    gpu_workers_4.run(check_routings, "nvlink", 64, 2, 8, 32)
