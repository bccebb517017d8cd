"""Placements, their lookup in dispatch, load windows, and transfers of rows."""

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext import ExpertPlacement, MoELayer, rebalance_experts
from dualpipe_ext.balance.load import LoadWindow
from dualpipe_ext.ranks.row_transfer import RowTransfer

SIZES = dict(hidden=16, expert_hidden=24, num_experts=8, topk=3)


def test_placement_worked_by_hand():
    placement = ExpertPlacement([0, 2, 1, 0], num_ranks=2)
    assert (placement.num_slots, placement.num_experts, placement.slots_per_rank) == (4, 3, 2)
    assert placement.slots_of_expert == ((0, 3), (2,), (1,))
    assert placement.experts_on(1) == (1, 0)
    assert [placement.nearest_slot(0, rank) for rank in range(2)] == [0, 3]
    assert [placement.nearest_slot(2, rank) for rank in range(2)] == [1, 1]
    assert placement.has_copies and not placement.is_in_order
    assert placement == ExpertPlacement(torch.tensor([0, 2, 1, 0]), 2)
    tables = placement.tables(1, "cpu")
    assert tables.copies.tolist() == [2, 1, 1] and tables.share.tolist() == [1.0, 0.5]


def test_placement_in_order():
    assert ExpertPlacement.in_order(8, 4).is_in_order
    assert ExpertPlacement.in_order(4, 2, 6).physical_to_logical == (0, 1, 2, 2, 3, 0)
    assert ExpertPlacement.in_order(4, 1).experts_on(0) == (0, 1, 2, 3)


@pytest.mark.parametrize("num_slots", [8, 12, 20])
def test_tables_of_the_balancer(num_slots, rng):
    """The placement's own tables say what the balancer's say."""
    load = torch.rand(3, 8, generator=rng) ** 4
    found = rebalance_experts(load, num_slots, 1, 1, 4, "improved")
    for slots, by_expert, count in zip(*found, strict=True):
        placement = ExpertPlacement(slots, num_ranks=4)
        tables = placement.tables(2, "cpu")
        assert torch.equal(tables.copies.long(), count)
        for expert in range(8):
            expected = sorted(by_expert[expert, : count[expert]].tolist())
            assert list(placement.slots_of_expert[expert]) == expected


@pytest.mark.parametrize("copies", [1, 2, 3, 5])
@pytest.mark.parametrize("rank", [0, 1])
def test_tokens_spread_evenly_over_copies(copies, rank):
    """97 tokens that all go to one expert: no copy gets two more than another."""
    placement = ExpertPlacement([0, *[1] * copies, *[2] * (6 - copies)], 1)
    topk_idx = torch.tensor([[1, 0, -1]]).repeat(97, 1).int()
    slots = placement.tables(rank, "cpu").assign(topk_idx)
    assert slots.dtype == torch.int32
    assert (slots[:, 1] == 0).all() and (slots[:, 2] == -1).all()
    count = torch.bincount(slots[:, 0], minlength=7)[1 : copies + 1]
    assert count.sum() == 97 and count.max() - count.min() <= 1
    assert torch.equal(slots, placement.tables(rank, "cpu").assign(topk_idx))


def test_routes_to_no_expert_stay_wrong():
    tables = ExpertPlacement([1, 0, 1, 2], 2).tables(0, "cpu")
    topk_idx = torch.tensor([[-1, 0], [-2, 3], [2, 2**31 - 9]], dtype=torch.int32)
    slots = tables.assign(topk_idx).tolist()
    assert slots[0] == [-1, 1] and slots[1][0] == -2 and slots[2][0] == 3
    assert slots[1][1] >= 4 and slots[2][1] >= 4
    assert tables.assign(topk_idx[:0]).shape == (0, 2)


@pytest.mark.parametrize(
    "slots, num_ranks, message",
    [
        ([0, 1, 2], 2, "3 slots do not divide over 2 ranks: pass one row"),
        ([], 1, "0 slots do not divide over 1 ranks"),
        ([0, 1, 3, 3], 2, r"expert 2 of 0\.\.3 has no slot \(1 such\): every expert needs one"),
        ([0, -1], 1, "slot 1 holds expert -1: .* whole numbers from 0"),
        ([0.0, 1.0], 1, "slot 0 holds expert 0.0: .* whole numbers"),
        (torch.zeros(2, 2, dtype=torch.int64), 1, r"slot 0 holds expert \[0, 0\]: pass one row"),
        ([0], 0, "num_ranks=0: pass the group's ranks"),
    ],
)
def test_placements_that_cannot_be(slots, num_ranks, message):
    with pytest.raises(ValueError, match=message):
        ExpertPlacement(slots, num_ranks)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((6, 4), "num_experts=6 does not divide over the group's 4 ranks: .* such as 8"),
        ((8, 4, 10), "num_slots=10 does not hold 8 experts in equal parts on 4 ranks: use 12"),
        ((8, 4, 4), "num_slots=4 does not hold 8 experts .* use 8"),
    ],
)
def test_slots_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExpertPlacement.in_order(*arguments)


# ---- Load ----


def test_window_forgets():
    window = LoadWindow(2, 0.5)
    assert window.total(None, torch.device("cpu")).tolist() == [0, 0]
    for counts in ([4, 0], [0, 2], [8, 0]):
        window.add(torch.tensor(counts))
    assert window.total(None, torch.device("cpu")).tolist() == [9, 1]
    with pytest.raises(ValueError, match=r"load_decay=1.5 is outside \(0, 1\]"):
        LoadWindow(2, 1.5)


def count_loads(rank, group):
    layer = MoELayer(**SIZES, group=group, load_decay=0.75, num_slots=12)
    counts = []
    for step in range(3):
        x = torch.randn(5 * rank, 16, generator=torch.Generator().manual_seed(10 * step + rank))
        layer(x)
        counts.append(layer.tokens_per_expert)
    layer.eval()(x)  # an evaluation says nothing about training
    found = [layer.expert_load(), layer.expert_load()]
    layer.close()
    return counts, found


def test_load_is_a_decayed_sum_over_steps_and_ranks(gloo_workers_4):
    answers = gloo_workers_4.run(count_loads)
    expected = sum(
        0.75 ** (2 - step) * counts[step].double() for counts, _ in answers for step in range(3)
    )
    assert expected.sum() == 30 * 3 * (1 + 0.75 + 0.75**2)
    for _, found in answers:
        for load in found:
            assert load.dtype == torch.float32
            assert torch.allclose(load.double(), expected, rtol=1e-6, atol=0)


# ---- Rows ----


def transfer_rows(rank, group, wanted, shards, dtype):
    before = shards[rank].to(dtype)
    transfer = RowTransfer(wanted, 3, rank=rank, group=group, device=torch.device("cpu"))
    into = torch.full((4, *before.shape[1:]), 77).to(dtype)
    result = transfer(before, into)
    assert result is into and torch.equal(before, shards[rank].to(dtype))
    return result


@pytest.mark.parametrize(
    "shape, dtype",
    [((2, 3), torch.bfloat16), ((), torch.float64), ((5,), torch.int32), ((0,), torch.float32)],
)
def test_rows_reach_those_who_want_them(shape, dtype, gloo_workers_4):
    """Against indexing into the unsharded tensor; one rank wants nothing, one sends nothing."""
    shards = [
        (torch.arange(3 * max(1, torch.Size(shape).numel())) + 16 * rank) % 64 for rank in range(4)
    ]
    shards = [shard[: 3 * torch.Size(shape).numel()].reshape(3, *shape) for shard in shards]
    wanted = [
        {0: (11,), 2: (0, 11, 3), 3: (11,)},
        {},
        {3: (1,), 1: (7, 8), 0: ()},
        {0: (3,), 1: (9,)},
    ]
    whole = torch.cat(shards).to(dtype)
    for rank, found in enumerate(gloo_workers_4.run(transfer_rows, wanted, shards, dtype)):
        for target in range(4):
            if target in wanted[rank]:
                expected = whole[list(wanted[rank][target])].sum(0).to(dtype)
            else:
                expected = torch.full(shape, 77).to(dtype)
            assert torch.equal(found[target], expected), (rank, target)


def silent_transfer(rank, group):
    """No collective where everything is at home: other ranks need not take part."""
    if rank == 0:
        transfer = RowTransfer(
            [{0: (1,)}, {0: (3,)}], 2, rank=0, group=group, device=torch.device("cpu")
        )
        return transfer(torch.tensor([5, 6]))
    return None


def test_rows_at_home_need_no_communication(gloo_workers_4):
    assert gloo_workers_4.run(silent_transfer)[0].tolist() == [6]


def route_outside(rank, group):
    """Errors of the exchange still name what is wrong when slots are not experts."""

    class Wild(torch.nn.Module):
        def forward(self, x):
            from dualpipe_ext.moe.router import Routes

            topk_idx = torch.tensor([[0, 8 if rank == 2 else 1, -1]], dtype=torch.int32)
            return Routes(topk_idx, torch.ones(1, 3), torch.zeros(()), torch.ones(8).long())

    layer = MoELayer(**SIZES, group=group, router=Wild(), num_slots=12, max_tokens=1)
    try:
        layer(torch.zeros(1, 16))
    except IndexError as error:
        message = str(error)
    total = torch.ones(1)
    dist.all_reduce(total)
    return message


def test_router_that_names_no_expert(gloo_workers_4):
    for message in gloo_workers_4.run(route_outside):
        assert "topk_idx[0, 1] = 12 on rank 2 is outside [-1, 12)" in message
