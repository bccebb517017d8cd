"""Moving experts: every slot gets what is its expert's, or nothing changes anywhere."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext import DualPipeError, ExpertPlacement, MoELayer
from dualpipe_ext.ranks.row_transfer import RowTransfer
from tests.support.workers import WorkerDiedError, WorkerPool

E, P = 6, 3
SIZES = dict(hidden=8, expert_hidden=8, num_experts=E, topk=2)
CHAIN = [  # slots of three ranks; with copies, then without
    [[5, 0, 2, 4, 1, 3], [0, 1, 2, 3, 4, 5], [1, 3, 5, 0, 2, 4]],
    [
        [5, 0, 2, 4, 1, 3, 0, 1, 2],
        [0, 0, 0, 0, 1, 2, 3, 4, 5],  # two copies on one rank, three on another
        [3, 3, 4, 5, 3, 0, 1, 2, 3],
        [2, 5, 4, 5, 3, 0, 1, 2, 3],
    ],
]
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "fresh Adam": torch.optim.Adam,  # has no state yet
    "Adafactor": torch.optim.Adafactor,  # state [S, 2I, 1] and [S, 1, H]
    "Adagrad": torch.optim.Adagrad,
}


def by_expert(tag, shape, experts):
    """Numbers that tell expert and element: what a whole tensor holds for these experts."""
    element = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return torch.stack([(tag + 37 * expert + element) % 251 for expert in experts]).float()


def by_slot(tag, shape, rank, num_slots):
    """Numbers that tell rank and slot: a gradient's parts."""
    element = torch.arange(torch.Size(shape).numel()).reshape(shape)
    slots = range(rank * num_slots, (rank + 1) * num_slots)
    return torch.stack([(tag + 19 * slot + element) % 64 for slot in slots]).float()


def state_tensors(optimizer, weight):
    state = optimizer.state[weight]
    return {k: v for k, v in sorted(state.items()) if torch.is_tensor(v) and v.dim() == 3}


def fill(layer, optimizer):
    """Known contents everywhere; returns the experts' scalars of the optimizer."""
    rank, experts = layer.rank, layer.placement.experts_on(layer.rank)
    with torch.no_grad():
        for tag, weight in enumerate((layer.w13, layer.w2)):
            shape, size = weight.shape[1:], layer.num_local_slots
            weight.copy_(by_expert(tag, shape, experts))
            weight.grad = by_slot(tag, shape, rank, size)
            weight.main_grad = by_slot(tag + 5, shape, rank, size)
            for number, value in enumerate(state_tensors(optimizer, weight).values()):
                value.copy_(by_expert(tag + 10 * number, value.shape[1:], experts))


def check(layer, optimizer, old):
    """Everything is as if made for the new placement; gradients add up to what they were."""
    rank, experts = layer.rank, layer.placement.experts_on(layer.rank)
    for tag, weight in enumerate((layer.w13, layer.w2)):
        assert torch.equal(weight, by_expert(tag, weight.shape[1:], experts))
        for number, (key, value) in enumerate(state_tensors(optimizer, weight).items()):
            assert torch.equal(value, by_expert(tag + 10 * number, value.shape[1:], experts)), key
        for offset, gradient in ((0, weight.grad), (5, weight.main_grad)):
            shape, size = weight.shape[1:], layer.num_local_slots
            parts = torch.cat([by_slot(tag + offset, shape, r, size) for r in range(P)])
            now = torch.empty(P, *gradient.shape)
            dist.all_gather(list(now), gradient.contiguous(), group=layer.group)
            now = now.flatten(0, 1)
            for expert in range(E):
                before = parts[list(old.slots_of_expert[expert])].sum(0)
                after = now[list(layer.placement.slots_of_expert[expert])].sum(0)
                assert torch.equal(after, before), (rank, expert)


def move_along(rank, group, chain, optimizer_name):
    group = dist.new_group(list(range(P)))
    if rank >= P:
        return None
    num_slots = len(chain[0])
    layer = MoELayer(**SIZES, num_slots=num_slots, group=group)
    optimizer = OPTIMIZERS[optimizer_name](layer.parameters())
    if optimizer_name != "fresh Adam":
        layer.w13.grad, layer.w2.grad = torch.ones_like(layer.w13), torch.ones_like(layer.w2)
        optimizer.step()
    weights = (layer.w13, layer.w2)
    pointers = [weight.data_ptr() for weight in weights]
    fill(layer, optimizer)
    steps = [optimizer.state[weight].get("step") for weight in weights]
    for slots in chain:
        old = layer.placement
        layer.rebalance(ExpertPlacement(slots, P), optimizer=optimizer)
        check(layer, optimizer, old)
        for weight in weights:  # parts anew, for the next move
            weight.grad = weight.main_grad = None
        fill(layer, optimizer)
    assert weights[0] is layer.w13 and weights[1] is layer.w2
    assert pointers == [weight.data_ptr() for weight in weights]
    assert steps == [optimizer.state[weight].get("step") for weight in weights]
    return sum(len(state_tensors(optimizer, weight)) for weight in weights)


@pytest.mark.parametrize("chain", CHAIN, ids=["permutations", "copies"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_everything_of_an_expert_moves_with_it(optimizer, chain, gloo_workers_4):
    counts = gloo_workers_4.run(move_along, chain, optimizer)
    expected = {"SGD": 2, "Adam": 6, "fresh Adam": 0, "Adafactor": 4, "Adagrad": 2}[optimizer]
    assert counts == [expected] * P + [None]


def sum_copies(rank, group, dtype, with_main_grad):
    layer = MoELayer(hidden=8, expert_hidden=8, num_experts=4, topk=2, num_slots=12, group=group)
    layer.rebalance(ExpertPlacement([0, 0, 1, 2, 3, 0, 1, 1, 0, 3, 0, 1], 4))
    for tag, weight in enumerate((layer.w13, layer.w2)):
        gradient = by_slot(tag, weight.shape[1:], rank, 3).to(dtype)
        if with_main_grad:
            weight.main_grad = gradient
        else:
            layer.to(dtype)
            weight.grad = gradient
    layer.sync_replica_gradients()
    norm = layer.squared_gradient_norm()
    dist.all_reduce(norm)
    kind = "main_grad" if with_main_grad else "grad"
    return [getattr(weight, kind).float() for weight in (layer.w13, layer.w2)], norm


@pytest.mark.parametrize("dtype, with_main_grad", [(torch.float32, True), (torch.bfloat16, False)])
def test_copies_get_the_sum_of_their_gradients(dtype, with_main_grad, gloo_workers_4):
    """And each expert counts once in the norm. Integers up to 256: exact in bf16."""
    experts = [0, 0, 1, 2, 3, 0, 1, 1, 0, 3, 0, 1]
    expected, squares = [], 0.0
    for tag, shape in enumerate(((16, 8), (8, 8))):
        parts = torch.cat([by_slot(tag, shape, rank, 3) for rank in range(4)])
        totals = [parts[[e == expert for e in experts]].sum(0) for expert in range(4)]
        expected.append(torch.stack([totals[expert] for expert in experts]))
        squares += sum(total.double().square().sum() for total in totals)
    for rank, (found, norm) in enumerate(gloo_workers_4.run(sum_copies, dtype, with_main_grad)):
        for gradient, whole in zip(found, expected, strict=True):
            assert whole.max() <= 256
            assert torch.equal(gradient, whole[3 * rank : 3 * rank + 3])
        assert abs(norm.double() / squares - 1) < 1e-6


# ---- Failures ----

NUM_MOVING = 9  # both weights, their gradients, two moments each, and one main_grad


def snapshot(layer, optimizer):
    tensors = [layer.w13, layer.w2, layer.w13.main_grad]
    tensors += [v for w in (layer.w13, layer.w2) for v in state_tensors(optimizer, w).values()]
    return [tensor.detach().clone() for tensor in tensors]


def fail_in_a_move(rank, group, how, timeout, folder):
    """Rank 2 dies, stays away or breaks in the middle; the others say what came of it."""
    group = dist.new_group(list(range(3)))
    layer = MoELayer(**SIZES, group=group)
    optimizer = torch.optim.Adam(layer.parameters())
    layer.w13.grad, layer.w2.grad = torch.ones_like(layer.w13), torch.ones_like(layer.w2)
    layer.w13.main_grad = torch.ones_like(layer.w13) * rank
    optimizer.step()
    before, placement = snapshot(layer, optimizer), layer.placement
    fetched = []
    fetch = RowTransfer.fetch

    def fetch_until(self, *arguments):
        fetch(self, *arguments)
        fetched.append(self)
        if rank == 2 and how == "dies" and len(fetched) == 3:
            os._exit(3)
        if rank == 2 and how == "breaks" and len(fetched) == NUM_MOVING:
            raise RuntimeError("everything has arrived, nothing is agreed")

    RowTransfer.fetch = fetch_until
    try:
        if how == "stays away" and rank == 2:
            time.sleep(1)
            return
        layer.rebalance(
            ExpertPlacement([5, 0, 2, 4, 1, 3], P), optimizer=optimizer, timeout=timeout
        )
        message = "no error"
    except DualPipeError as error:
        message = str(error)
    finally:
        RowTransfer.fetch = fetch
    after = snapshot(layer, optimizer)
    same = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    same = same and layer.placement == placement
    Path(folder, str(rank)).write_text(f"{same} {len(fetched)} {message}")


def test_a_failure_leaves_everything_as_it_was(tmp_path):
    with WorkerPool(3) as pool:
        for how, fetches, timeout in (
            ("stays away", [0], 0.5),
            ("breaks", [NUM_MOVING], 2.0),
            ("dies", range(2, 5), 2.0),
        ):
            folder = tmp_path / how
            folder.mkdir()
            if how == "dies":
                with pytest.raises(WorkerDiedError):
                    pool.run(fail_in_a_move, how, timeout, str(folder))
            else:
                pool.run(fail_in_a_move, how, timeout, str(folder))
            survivors = [0, 1, 2] if how == "breaks" else [0, 1]
            assert sorted(path.name for path in folder.iterdir()) == [str(r) for r in survivors]
            for rank in survivors:
                same, fetched, message = (folder / str(rank)).read_text().split(" ", 2)
                assert same == "True", (how, rank)
                assert int(fetched) in fetches, (how, rank)
                assert f"rank {rank} could not move experts, and nothing has changed" in message


def disagree(rank, group):
    layer = MoELayer(hidden=8, expert_hidden=8, num_experts=8, topk=2, group=group)
    optimizer = torch.optim.Adam(layer.parameters())
    swapped = ExpertPlacement([1, 0, 2, 3, 4, 5, 6, 7], 4)
    other = ExpertPlacement([0, 1, 2, 3, 4, 5, 7, 6], 4)
    small = ExpertPlacement([0, 1, 2, 3], 4)
    before = layer.w13.detach().clone()
    messages = []
    for placement in (other if rank == 2 else swapped, small if rank == 2 else swapped, swapped):
        if placement is swapped and len(messages) == 2 and rank == 1:
            layer.w2.grad = torch.ones_like(layer.w2)
        try:
            layer.rebalance(placement, optimizer=optimizer)
        except (ValueError, DualPipeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    unchanged = torch.equal(layer.w13, before)
    layer.w2.grad = None
    layer.rebalance(swapped, optimizer=optimizer)  # the group still works
    return messages, unchanged


def test_ranks_that_disagree(gloo_workers_4):
    for rank, (messages, unchanged) in enumerate(gloo_workers_4.run(disagree)):
        assert unchanged
        assert "ValueError: rank 2 was given another placement than rank 0" in messages[0]
        if rank == 2:
            assert "ValueError: the placement has num_experts=4, the layer 8" in messages[1]
        else:
            assert "DualPipeError: rank 2 cannot take part" in messages[1]
        assert "ValueError: rank 1 has other tensors to move than rank 0" in messages[2]


@pytest.mark.parametrize(
    "placement, message",
    [
        (
            ExpertPlacement([0, 1, 2, 3], 1),
            "num_experts=4, the layer 6: balance for num_replicas=6",
        ),
        (ExpertPlacement([0, 1, 2, 3, 4, 5], 2), "num_ranks=2, the layer 1"),
        (ExpertPlacement([0, 1, 2, 3, 4, 5, 0], 1), "num_slots=7, the layer 6: .* is fixed when"),
    ],
)
def test_placements_of_another_layer(placement, message):
    with pytest.raises(ValueError, match=message):
        MoELayer(**SIZES).rebalance(placement)


def test_what_cannot_be_moved():
    layer, swapped = MoELayer(**SIZES), ExpertPlacement([1, 0, 2, 3, 4, 5], 1)
    with pytest.raises(TypeError, match=r"is a Tensor: pass ExpertPlacement\(row, num_ranks=1\)"):
        layer.rebalance(torch.arange(6))
    with pytest.raises(ValueError, match="timeout=0 s is not above 0"):
        layer.rebalance(swapped, timeout=0)
    stranger = torch.optim.SGD([layer.w2])
    with pytest.raises(ValueError, match="has 1 parameters, this layer's w13 not among them"):
        layer.rebalance(swapped, optimizer=stranger)
    for state, found in (([1, 2], "list"), (torch.ones(7), r"shape \[7\]")):
        optimizer = torch.optim.SGD(layer.parameters())
        optimizer.state[layer.w13]["memory"] = state
        with pytest.raises(ValueError, match=f"state of {found} .* no part for each of the 6"):
            layer.rebalance(swapped, optimizer=optimizer)
    assert layer.placement.is_in_order
    layer.rebalance(swapped)
    assert layer.placement == swapped


def test_an_exchange_of_experts_does_not_fit_slots():
    from dualpipe_ext import Exchange

    exchange = Exchange(hidden=8, num_experts=6, topk=2, max_tokens=4, device="cpu")
    with exchange, pytest.raises(ValueError, match="num_experts=6, the layer 9: .* layer's slots"):
        MoELayer(**SIZES, num_slots=9, exchange=exchange)
