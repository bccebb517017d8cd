"""Which expert every slot of a group of ranks holds, and to which slot a route goes.

Letters: T tokens of this rank, K experts a token, E experts (the router's, "logical"), R slots (an
expert's weights on a rank, "physical"; more slots than experts: some experts have copies), P ranks,
S = R / P slots of a rank, X most copies of one expert. Slots are numbered rank by rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["ExpertPlacement", "SlotTables"]


@dataclass(frozen=True)
class ExpertPlacement:
    """The expert in every slot: a row of the balancer's ``physical_to_logical``, as plain numbers.

    ``ExpertPlacement([0, 2, 1, 0], num_ranks=2)``: rank 0 holds the experts 0 and 2, rank 1 the
    experts 1 and 0; expert 0 has copies in the slots 0 and 3. Equal placements compare equal. From
    the balancer::

        slots, _, _ = rebalance_experts(loads, R, num_groups, num_nodes, P)
        placements = [ExpertPlacement(row, num_ranks=P) for row in slots]  # one a layer

    Args:
        physical_to_logical: [R] expert of every slot; a tensor or a sequence of ints. Experts are
            0 to the highest number in it, and each has a slot.
        num_ranks: P, a divisor of R.

    Raises:
        ValueError: an expert without a slot, a negative number, or R that P does not divide.
    """

    physical_to_logical: tuple[int, ...]
    num_ranks: int

    def __init__(self, physical_to_logical: Tensor | Sequence[int], num_ranks: int) -> None:
        given = physical_to_logical
        experts = given.tolist() if isinstance(given, Tensor) else list(given)
        _check_slots(experts, num_ranks)
        object.__setattr__(self, "physical_to_logical", tuple(experts))
        object.__setattr__(self, "num_ranks", num_ranks)

    @classmethod
    def in_order(
        cls, num_experts: int, num_ranks: int, num_slots: int | None = None
    ) -> ExpertPlacement:
        """Every rank holds its E / P experts in order, then copies of those that follow them.

        4 experts in 6 slots of 2 ranks: ``[0, 1, 2,  2, 3, 0]``.

        Raises:
            ValueError: P does not divide E or R, or there are fewer slots than experts.
        """
        num_slots = num_experts if num_slots is None else num_slots
        if num_experts < 1 or num_experts % num_ranks:
            raise ValueError(
                f"num_experts={num_experts} does not divide over the group's {num_ranks} ranks: use"
                f" a multiple of {num_ranks}, such as "
                f"{max(1, -(-num_experts // num_ranks)) * num_ranks}"
            )
        if num_slots < num_experts or num_slots % num_ranks:
            fitting = -(-max(num_slots, num_experts) // num_ranks) * num_ranks
            raise ValueError(
                f"num_slots={num_slots} does not hold {num_experts} experts in equal parts on "
                f"{num_ranks} ranks: use {fitting}"
            )
        local = num_experts // num_ranks
        experts = (
            (rank * local + slot) % num_experts
            for rank in range(num_ranks)
            for slot in range(num_slots // num_ranks)
        )
        return cls(tuple(experts), num_ranks)

    @property
    def num_slots(self) -> int:
        """R."""
        return len(self.physical_to_logical)

    @property
    def slots_per_rank(self) -> int:
        """S."""
        return self.num_slots // self.num_ranks

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.slots_of_expert)

    @property
    def has_copies(self) -> bool:
        return self.num_slots > self.num_experts

    @cached_property
    def is_in_order(self) -> bool:
        """Slot and expert have the same number everywhere: nothing to translate."""
        return self.physical_to_logical == tuple(range(self.num_slots))

    @cached_property
    def slots_of_expert(self) -> tuple[tuple[int, ...], ...]:
        """[E] the slots that hold each expert, ascending."""
        slots: list[list[int]] = [[] for _ in range(max(self.physical_to_logical) + 1)]
        for slot, expert in enumerate(self.physical_to_logical):
            slots[expert].append(slot)
        return tuple(map(tuple, slots))

    def experts_on(self, rank: int) -> tuple[int, ...]:
        """[S] the expert in each of a rank's slots."""
        first = rank * self.slots_per_rank
        return self.physical_to_logical[first : first + self.slots_per_rank]

    def nearest_slot(self, expert: int, rank: int) -> int:
        """A slot of the expert: on this rank if there is one, else a copy chosen by the rank."""
        slots = self.slots_of_expert[expert]
        here = [slot for slot in slots if slot // self.slots_per_rank == rank]
        return here[0] if here else slots[rank % len(slots)]

    def tables(self, rank: int, device: torch.device | str) -> SlotTables:
        """What a rank's dispatch looks up, on the device."""
        slots = self.slots_of_expert
        most = max(map(len, slots))
        padded = [(each * most)[:most] for each in slots]  # the padding is never looked up
        copies = torch.tensor([len(each) for each in slots], dtype=torch.int32)
        return SlotTables(
            rank=rank,
            num_slots=self.num_slots,
            slots=torch.tensor(padded, dtype=torch.int32).to(device),
            copies=copies.to(device),
            share=(1 / copies[list(self.experts_on(rank))]).to(device),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotTables:
    """An :class:`ExpertPlacement` on a device, as one rank uses it.

    rank, num_slots: of the placement.
    slots   [E, X] int32, slots of every expert.
    copies  [E] int32, how many they are.
    share   [S] fp32, 1 / copies of the expert in each slot of this rank.
    """

    rank: int
    num_slots: int
    slots: Tensor
    copies: Tensor
    share: Tensor

    def assign(self, topk_idx: Tensor) -> Tensor:
        """The slot of every route: experts [T, K] int32 → slots [T, K] int32; no host wait.

        Token t of rank r takes copy (t + r) mod copies, so that a run of n tokens spreads evenly,
        to within one, and a given routing always goes the same way. -1 stays -1; numbers that are
        no expert become numbers that are no slot, for the exchange to refuse.
        """
        num_experts, most = self.slots.shape
        expert = topk_idx.clamp(0, num_experts - 1)
        if most == 1:
            slot = self.slots[expert, 0]
        else:
            token = torch.arange(len(topk_idx), dtype=torch.int32, device=topk_idx.device)
            slot = self.slots[expert, (token[:, None] + self.rank) % self.copies[expert]]
        outside = topk_idx + (self.num_slots - num_experts) * (topk_idx >= 0)
        return torch.where(expert == topk_idx, slot, outside.int())


def _check_slots(experts: list[int], num_ranks: int) -> None:
    if not isinstance(num_ranks, int) or num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks!r}: pass the group's ranks, at least 1")
    if not experts or len(experts) % num_ranks:
        raise ValueError(
            f"{len(experts)} slots do not divide over {num_ranks} ranks: pass one row of "
            "physical_to_logical, balanced for num_gpus = num_ranks"
        )
    for slot, expert in enumerate(experts):
        if isinstance(expert, bool) or not isinstance(expert, int) or expert < 0:
            raise ValueError(
                f"slot {slot} holds expert {expert!r}: pass one row [R] of physical_to_logical, "
                "whole numbers from 0"
            )
    missing = sorted(set(range(max(experts) + 1)) - set(experts))
    if missing:
        raise ValueError(
            f"expert {missing[0]} of 0..{max(experts)} has no slot ({len(missing)} such): every "
            "expert needs one"
        )
