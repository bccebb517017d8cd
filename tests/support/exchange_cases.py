"""Routings, an independent oracle, and the checks that every backend of the exchange must pass.

The oracle knows everybody's inputs (each rank derives them from a seed) and lays the rows out
expert by expert with ``nonzero``; it shares no code with the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from dualpipe_ext import Exchange
from tests.support.compare import relative_error

ROUTINGS = ("uniform", "one_rank", "self", "empty_rank", "dropped", "hot_expert")


@dataclass(frozen=True)
class Case:
    """One dispatch and combine, and the seed of everybody's inputs."""

    routing: str
    hidden: int
    topk: int
    num_experts: int
    max_tokens: int
    seed: int
    dtype: torch.dtype = torch.bfloat16

    def generator(self, *salt: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self.seed, *salt)) % 2**31)

    def num_tokens(self, rank: int) -> int:
        if self.routing == "empty_rank" and rank == 1:
            return 0
        draw = torch.randint(0, self.max_tokens + 1, (), generator=self.generator(rank, 1))
        return self.max_tokens if rank == 0 else int(draw)

    def topk_idx(self, rank: int, world_size: int) -> torch.Tensor:
        """[T, K] int32, every token's experts distinct."""
        generator, tokens = self.generator(rank, 2), self.num_tokens(rank)
        local = self.num_experts // world_size
        score = torch.rand(tokens, self.num_experts, generator=generator)
        if self.routing == "one_rank":
            score[:, :local] += 1
        elif self.routing == "self":
            score[:, rank * local : (rank + 1) * local] += 1
        elif self.routing == "hot_expert":
            score[:, self.num_experts // 2] += 1
        idx = score.argsort(1, descending=True)[:, : self.topk].int()
        if self.routing == "dropped":
            idx[torch.rand(idx.shape, generator=generator) < 0.3] = -1
        return idx

    def matrix(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """[rows, H], every row and every column different; quick, unlike as many random numbers."""
        by_row = torch.randn(rows, 1, generator=generator)
        return (by_row + torch.randn(self.hidden, generator=generator)).to(self.dtype)

    def x(self, rank: int) -> torch.Tensor:
        return self.matrix(self.num_tokens(rank), self.generator(rank, 3))

    def topk_weight(self, rank: int) -> torch.Tensor:
        shape = (self.num_tokens(rank), self.topk)
        return torch.rand(shape, generator=self.generator(rank, 4))

    def expert_out(self, rank: int, rows: int) -> torch.Tensor:
        return self.matrix(rows, self.generator(rank, 5))

    def row_weight(self, rank: int, rows: int) -> torch.Tensor:
        return torch.rand(rows, generator=self.generator(rank, 6))


@dataclass(frozen=True)
class Expected:
    """What the oracle says one rank receives."""

    rows: int
    tokens_per_expert: list[int]
    expert_offsets: list[int]
    slots: list[torch.Tensor]  # a source rank: [T, K]


def expected_plan(case: Case, idx: list[torch.Tensor], rank: int) -> Expected:
    local = case.num_experts // len(idx)
    slots = [torch.full(i.shape, -1, dtype=torch.int32) for i in idx]
    counts, offsets, row = [], [0], 0
    for expert in range(rank * local, (rank + 1) * local):
        first = row
        for source, i in enumerate(idx):
            token, k = (i == expert).nonzero(as_tuple=True)
            slots[source][token, k] = torch.arange(row, row + len(token), dtype=torch.int32)
            row += len(token)
        counts.append(row - first)
        row = -(-row // 128) * 128
        offsets.append(row)
    return Expected(row, counts, offsets, slots)


def expected_dispatch(case: Case, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.zeros(expected.rows, case.hidden, dtype=case.dtype)
    row_weight = torch.zeros(expected.rows)
    for source, slots in enumerate(expected.slots):
        token, k = (slots >= 0).nonzero(as_tuple=True)
        rows[slots[token, k].long()] = case.x(source)[token]
        row_weight[slots[token, k].long()] = case.topk_weight(source)[token, k]
    return rows, row_weight


def expected_combine(
    case: Case, plans: list[Expected], rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """y in fp64, and the returned [T, K] scalars."""
    tokens = case.num_tokens(rank)
    y = torch.zeros(tokens, case.hidden, dtype=torch.float64)
    topk_weight = torch.zeros(tokens, case.topk)
    for expert_rank, plan in enumerate(plans):
        token, k = (plan.slots[rank] >= 0).nonzero(as_tuple=True)
        slots = plan.slots[rank][token, k].long()
        y.index_add_(0, token, case.expert_out(expert_rank, plan.rows)[slots].double())
        topk_weight[token, k] = case.row_weight(expert_rank, plan.rows)[slots]
    return y, topk_weight


def poison(exchange: Exchange, *shapes: tuple[int, ...]) -> None:
    """Leave NaN where the allocator will put the next outputs of these shapes."""
    for shape in shapes:
        torch.full(shape, float("nan"), dtype=exchange.dtype, device=exchange.device)


def check_case(
    exchange: Exchange, case: Case, channel: str = "forward", comm_sms: tuple[int, ...] = ()
) -> None:
    """Plan, dispatch and combine one case, and compare all of it with the oracle.

    With comm_sms, again for each of these.
    """
    rank, device = exchange.rank, exchange.device
    idx = [case.topk_idx(p, exchange.world_size) for p in range(exchange.world_size)]
    plans = [expected_plan(case, idx, p) for p in range(exchange.world_size)]
    mine = plans[rank]
    rows_and_weight = expected_dispatch(case, mine)
    y_and_weight = expected_combine(case, plans, rank)
    for sms in comm_sms or (exchange.comm_sms,):
        if comm_sms:
            exchange.comm_sms = sms
        plan = exchange.plan(idx[rank].to(device))
        assert plan.num_rows == mine.rows
        assert plan.expert_offsets.tolist() == mine.expert_offsets
        assert plan.tokens_per_expert.tolist() == mine.tokens_per_expert
        check_tables(plan, plans, rank)
        _check_dispatch(exchange, case, plan, channel, *rows_and_weight)
        _check_combine(exchange, case, plan, channel, *y_and_weight)


def check_tables(plan, plans: list[Expected], rank: int) -> None:
    """Slots, and where unique rows go and come from."""
    for source, slots in enumerate(plans[rank].slots):
        assert torch.equal(plan.slots[source, : len(slots)].cpu(), slots)
        arrived = slots[(slots >= 0).any(1)]
        assert int(plan.unique_counts[source]) == len(arrived)
        assert torch.equal(plan.expert_rows[source, : len(arrived)].cpu(), arrived)
    for target, theirs in enumerate(plans):
        goes = (theirs.slots[rank] >= 0).any(1)
        places = torch.full(goes.shape, -1, dtype=torch.int32)
        places[goes] = torch.arange(int(goes.sum()), dtype=torch.int32)
        assert torch.equal(plan.send_rows[:, target].cpu(), places)


def _check_dispatch(exchange, case, plan, channel, want_rows, want_weight) -> None:
    poison(exchange, tuple(want_rows.shape), tuple(want_weight.shape))
    x = case.x(exchange.rank).to(exchange.device)
    weight = case.topk_weight(exchange.rank).to(exchange.device)
    rows, row_weight = exchange.dispatch(x, plan, topk_weight=weight, channel=channel)
    assert torch.equal(rows.cpu(), want_rows)
    assert torch.equal(row_weight.cpu(), want_weight)
    assert torch.equal(exchange.dispatch(x, plan, channel=channel), rows)  # without weights


def _check_combine(exchange, case, plan, channel, want_y, want_weight) -> None:
    poison(exchange, tuple(want_y.shape), tuple(want_weight.shape))
    out = case.expert_out(exchange.rank, plan.num_rows).to(exchange.device)
    scalars = case.row_weight(exchange.rank, plan.num_rows).to(exchange.device)
    y, topk_weight = exchange.combine(out, plan, row_weight=scalars, channel=channel)
    error = relative_error(y, want_y)
    assert error < (5e-3 if case.dtype == torch.bfloat16 else 1e-5), error
    assert torch.equal(topk_weight.cpu(), want_weight)
    assert torch.equal(exchange.combine(out, plan, channel=channel), y)  # the same bits again


def check_routings(
    rank: int,
    group: dist.ProcessGroup | None,
    backend: str,
    hidden: int,
    topk: int,
    num_experts: int,
    max_tokens: int,
    comm_sms: tuple[int, ...] = (16,),
    dtype: torch.dtype = torch.bfloat16,
    form: str = "expert",
) -> str:
    """Every routing on one exchange; returns the backend that ran."""
    with Exchange(
        group,
        hidden=hidden,
        num_experts=num_experts,
        topk=topk,
        max_tokens=max_tokens,
        dtype=dtype,
        backend=backend,
        form=form,
    ) as exchange:
        for i, routing in enumerate(ROUTINGS):
            case = Case(routing, hidden, topk, num_experts, max_tokens, seed=i, dtype=dtype)
            check_case(exchange, case, ("forward", "backward")[i % 2], comm_sms)
        return exchange.backend


def check_halves(rank: int, group: dist.ProcessGroup, backend: str) -> None:
    """Two expert groups of two ranks side by side, as data parallelism around them makes them."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    check_routings(rank, halves[rank // 2], backend, 136, 2, 8, 97)
    dist.barrier(group)


def check_gradients(rank: int, group: dist.ProcessGroup | None, backend: str) -> None:
    """Gradients of x and of the weights through both, where every expert only scales its rows."""
    case = Case("dropped", 64, 4, 8, 50, seed=3, dtype=torch.float32)
    with Exchange(
        group,
        hidden=64,
        num_experts=8,
        topk=4,
        max_tokens=50,
        dtype=torch.float32,
        backend=backend,
    ) as exchange:
        device = exchange.device
        plan = exchange.plan(case.topk_idx(rank, exchange.world_size).to(device))
        x = case.x(rank).to(device).requires_grad_()
        weight = case.topk_weight(rank).to(device).requires_grad_()
        rows, row_weight = exchange.dispatch(x, plan, topk_weight=weight)
        expert = torch.arange(1, exchange.num_local_experts + 1, device=device).repeat_interleave(
            plan.expert_offsets.diff().long()
        )
        factor = rank + expert.float() / 7
        y = exchange.combine(rows * (row_weight * factor)[:, None], plan)
        dy = torch.randn(y.shape, generator=case.generator(rank, 9)).to(device)
        y.backward(dy)

        local = exchange.num_local_experts
        idx = case.topk_idx(rank, exchange.world_size).to(device)
        scale = (idx // local + (idx % local + 1).float() / 7) * (idx >= 0)
        weights = weight.detach()
        assert (
            relative_error(x.grad, (dy * (weights * scale).sum(1, keepdim=True)).double().cpu())
            < 1e-5
        )
        want = ((dy * x.detach()).sum(1, keepdim=True) * scale).double().cpu()
        assert relative_error(weight.grad, want) < 1e-5


def check_bad_arguments(rank: int, group: dist.ProcessGroup | None, backend: str) -> list[str]:
    """Every wrong call raises everywhere and leaves the group usable; returns the messages."""
    messages = []

    def refused(kind: type[Exception], call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except kind as error:
            messages.append(str(error))
        else:
            raise AssertionError(f"accepted: {args} {kwargs}")

    world_size = 1 if group is None else dist.get_world_size(group)
    good = dict(hidden=64, num_experts=8, topk=2, max_tokens=16, backend=backend, form="expert")
    for bad in (
        dict(hidden=70),
        dict(hidden=0),
        dict(topk=9),
        dict(max_tokens=-1),
        dict(dtype=torch.int32),
        dict(backend="pigeon"),
        dict(timeout=0.0),
        dict(form="round"),
        dict(max_rows=100),
        dict(max_rows=0),
        *([dict(num_experts=world_size * 2 + 1)] if world_size > 1 else []),
    ):
        kind = TypeError if "dtype" in bad else ValueError
        refused(kind, Exchange, group, **(good | bad))
    if world_size > 1:
        refused(ValueError, Exchange, group, **(good | dict(hidden=64 + 8 * (rank == 1))))
        refused(ValueError, Exchange, group, **(good | dict(hidden=64 + 7 * (rank == 1))))

    exchange = Exchange(group, **good)
    device = exchange.device
    idx = torch.tensor([[0, 1]] * 5, dtype=torch.int32, device=device)
    x = torch.randn(5, 64, device=device, dtype=torch.bfloat16)
    plan = exchange.plan(idx)
    refused(TypeError, exchange.plan, idx.long())
    refused(ValueError, exchange.plan, idx[:, :1])
    refused(ValueError, exchange.plan, idx.repeat(4, 1))
    refused(TypeError, exchange.dispatch, x.float(), plan)
    refused(ValueError, exchange.dispatch, x[:, :32], plan)
    refused(ValueError, exchange.dispatch, x[:3], plan)
    refused(ValueError, exchange.dispatch, x, plan, channel="sideways")
    refused(ValueError, exchange.combine, x, plan)
    refused(TypeError, exchange.dispatch, x, plan, topk_weight=idx)
    refused(ValueError, exchange.dispatch, x, plan, payload="fp4")
    for needs_unique_rows in (
        lambda: exchange.dispatch(x, plan, payload="fp8"),
        lambda: exchange.leave(None, plan),
    ):
        refused(ValueError, needs_unique_rows)
        assert 'form="unique"' in messages[-1]
    if backend == "nvlink":
        for sms in (-1, 0, 10_000, 1.5):
            refused(ValueError, setattr, exchange, "comm_sms", sms)

    bad_idx = idx.clone()
    bad_idx[3, 1] = 8 if rank == world_size - 1 else 1
    refused(IndexError, lambda: exchange.plan(bad_idx).num_rows)
    assert f"topk_idx[3, 1] = 8 on rank {world_size - 1}" in messages[-1]
    rows = exchange.dispatch(x, exchange.plan(idx))  # still in step
    assert rows.shape[0] == plan.num_rows
    exchange.close()
    refused(RuntimeError, exchange.plan, idx)
    return messages


def dispatch(backend, x, plan, topk_weight, channel, payload=None, num_sms=None):
    """Rows in expert order and their weights, by a backend's calls."""
    arrival = backend.send(x, plan, topk_weight, channel, payload, num_sms)
    return backend.arrive(arrival, plan, num_sms)


def combine(backend, rows, plan, row_weight, channel, num_sms=None):
    """y and the scalars that went along, by a backend's calls."""
    return backend.fetch(backend.leave(rows, plan, row_weight, channel, num_sms), plan, num_sms)
