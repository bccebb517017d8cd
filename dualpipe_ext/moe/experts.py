"""The experts of a MoE layer, spread over the ranks of a group and movable between them.

Letters: H hidden, I expert width, E experts, R slots for them and their copies, P ranks of the
group, L = E / P experts and S = R / P slots of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..balance.load import LoadWindow
from ..balance.placement import ExpertPlacement, SlotTables
from ..ops.main_grad import gradient_of
from ..ops.operator import wide
from ..ranks.agreement import Agreement
from ..ranks.groups import Group, process_group
from ..ranks.row_transfer import RowTransfer
from .moves import list_expert_tensors, move_experts

__all__ = ["PlacedExperts", "check_multiples_of_8"]

WEIGHTS = ("w13", "w2")


class PlacedExperts(nn.Module):
    """Weights of experts by slot, under an :class:`~dualpipe_ext.ExpertPlacement`.

    Outside, in state dicts, experts are in their logical order whatever the placement: rank r saves
    and loads the experts [r·L, (r+1)·L), each once. Where some live elsewhere that makes
    ``state_dict`` and ``load_state_dict`` collective: every rank of the group calls them. (Loading
    also takes the weights of all E experts, and then no other rank.)

    Parameters ``w13`` [S, 2I, H] and ``w2`` [S, H, I]; in state dicts L of them.
    """

    def __init__(
        self,
        *,
        hidden: int,
        expert_hidden: int,
        num_experts: int,
        num_slots: int | None,
        group: Group,
        load_decay: float,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.group = process_group(group)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.world_size = 1 if self.group is None else dist.get_world_size(self.group)
        self.hidden, self.expert_hidden = hidden, expert_hidden
        check_multiples_of_8(hidden=hidden, expert_hidden=expert_hidden)
        self._placement = ExpertPlacement.in_order(num_experts, self.world_size, num_slots)
        self._tables: SlotTables | None = None
        self._copies_sum: RowTransfer | None = None
        self._agreement: Agreement | None = None
        self._load = LoadWindow(num_experts, load_decay)

        like: dict[str, Any] = {"dtype": dtype, "device": device}
        size = self.num_local_slots
        self.w13 = nn.Parameter(torch.empty(size, 2 * expert_hidden, hidden, **like))
        self.w2 = nn.Parameter(torch.empty(size, hidden, expert_hidden, **like))
        self._mark_expert_parameters()

    @property
    def num_experts(self) -> int:
        """E."""
        return self._placement.num_experts

    @property
    def num_local_experts(self) -> int:
        """L = E / P, the experts that this rank saves."""
        return self.num_experts // self.world_size

    @property
    def num_slots(self) -> int:
        """R."""
        return self._placement.num_slots

    @property
    def num_local_slots(self) -> int:
        """S = R / P, the experts and copies that this rank computes."""
        return self._placement.slots_per_rank

    @property
    def placement(self) -> ExpertPlacement:
        """Where experts are now; :meth:`rebalance` changes it."""
        return self._placement

    # ---- In a forward ----

    def choose_slots(self, topk_idx: Tensor) -> Tensor:
        """Experts [T, K] int32, as a router names them → slots, as the exchange wants them.

        Tokens spread evenly over an expert's copies, see :class:`SlotTables`. No host wait.
        """
        if self._placement.is_in_order:
            return topk_idx
        return self._slot_tables().assign(topk_idx)

    def record_load(self, tokens_per_expert: Tensor) -> None:
        """Take a forward's routes [E] into :meth:`expert_load`, in training mode. No host wait."""
        if self.training:
            self._load.add(tokens_per_expert)

    # ---- Balancing ----

    def expert_load(self, group: dist.ProcessGroup | None = None) -> Tensor:
        """Routes to every expert in the recent past, [E] fp32 on the device, added up over ranks.

        A decayed sum over this layer's forwards in training mode: each weighs ``load_decay`` times
        as much as the next. Collective over ``group``, by default the layer's; with several expert
        groups pass the group of all of them, so that all come to the same placement.
        """
        return self._load.total(self.group if group is None else group, self.w13.device)

    def rebalance(
        self,
        placement: ExpertPlacement,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        timeout: float = 100.0,
    ) -> None:
        """Move experts to where ``placement`` wants them. Collective over the group.

        Call it between steps, after the optimizer's and before the next forward. Weights, fp32
        ``main_grad``, ``grad`` and the optimizer's state move over the group and are written in
        place: parameters stay the same objects. New copies get all that their expert has. For the
        time of the move, what arrives on a rank takes memory a second time; the balancer's
        ``max_moved`` limits it.

        Gradients count as parts, as backward leaves them and before
        :meth:`sync_replica_gradients`: their sum over an expert's copies is kept.

        Each copy takes its own way through the optimizer. That is the same way for optimizers that
        work element by element or expert by expert, like SGD and Adam; those with a norm over
        a whole parameter (Adafactor, LAMB) let copies drift apart.

        A CUDA graph of the layer has the old placement in it: capture it again.

        Args:
            placement: E experts in R slots of P ranks; the same on every rank.
            optimizer: any torch optimizer that steps ``w13`` and ``w2``, with its state in tensors
                of the parameter's first dimension and rank, or in numbers, which stay. None: none.
            timeout: seconds that peers may take for each part of the move.

        Raises:
            ValueError: sizes other than this layer's, state that cannot be cut into experts, or
                ranks that disagree; on every rank one error or another, and nothing changed.
            DualPipeError: a rank died, failed or took too long. Until the last word, which all
                ranks exchange once everything has arrived, nothing is written: weights,
                gradients, optimizer state and placement are as before.
        """
        problem, tensors = None, []
        try:
            self._check_placement(placement, timeout)
            tensors = list_expert_tensors(self._weights(), optimizer)
        except (TypeError, ValueError) as error:
            problem = error
        if self._agreement is None:
            self._agreement = Agreement(self.group, 100.0)
        move_experts(
            self._placement,
            placement,
            tensors,
            rank=self.rank,
            group=self.group,
            device=self.w13.device,
            agreement=self._agreement,
            timeout=timeout,
            problem=problem,
        )
        self._placement, self._copies_sum = placement, None
        self._tables = placement.tables(self.rank, self.w13.device)

    @torch.no_grad()
    def sync_replica_gradients(self) -> None:
        """Give every copy of an expert the sum of all copies' gradients. Collective; no host wait.

        Call it after a step's last backward, before anything uses the gradients (reduction over
        data-parallel ranks, norm, optimizer): once, or copies count twice. It adds into fp32
        ``main_grad`` where the weight has one, else into ``grad``, in the order of the slots, so
        that copies stay equal to the last bit. Without copies it does nothing.
        """
        if not self._placement.has_copies:
            return
        if self._copies_sum is None:
            wanted: list[dict[int, tuple[int, ...]]] = [{} for _ in range(self.world_size)]
            for slots in self._placement.slots_of_expert:
                for slot in slots if len(slots) > 1 else ():
                    rank, local = divmod(slot, self.num_local_slots)
                    wanted[rank][local] = slots
            self._copies_sum = self._transfer(wanted, self.num_local_slots)
        for weight in self._weights().values():
            gradient = gradient_of(weight)
            if gradient is not None:
                self._copies_sum(gradient, gradient)

    @torch.no_grad()
    def squared_gradient_norm(self) -> Tensor:
        """This rank's part of the squared norm of the experts' gradients, fp32, on the device.

        Every expert counts once: each of its c copies, which hold the same gradient after
        :meth:`sync_replica_gradients`, adds 1/c. Sum it over the group; the norm of the model is
        then ``(that + squares of the replicated gradients).sqrt()``.
        """
        share_S = self._slot_tables().share
        total = torch.zeros((), device=share_S.device)
        for weight in self._weights().values():
            gradient = gradient_of(weight)
            if gradient is not None:
                math = wide(gradient.dtype)
                norm_S = torch.linalg.vector_norm(gradient, dim=(1, 2), dtype=math)
                total += (norm_S.square() * share_S).sum()
        return total

    # ---- Slots and logical order ----

    def to_logical(self, by_slot: Tensor) -> Tensor:
        """[S, ...] by slot → [L, ...] of this rank's logical experts. Collective if any are away.

        For whatever has a row an expert, such as averaged weights. In order it is the same tensor.
        """
        placement, local = self._placement, self.num_local_experts
        if placement.is_in_order:
            return by_slot
        wanted = [
            {i: (placement.nearest_slot(rank * local + i, rank),) for i in range(local)}
            for rank in range(self.world_size)
        ]
        return self._transfer(wanted, self.num_local_slots)(by_slot.detach())

    def to_slots(self, by_expert: Tensor) -> Tensor:
        """[L, ...] of this rank's logical experts → [S, ...] by slot. Collective if any are away.

        A tensor of all E experts is cut without any communication.
        """
        placement = self._placement
        if len(by_expert) == self.num_experts:
            here = torch.tensor(placement.experts_on(self.rank), device=by_expert.device)
            return by_expert.detach().index_select(0, here)
        if placement.is_in_order:
            return by_expert
        wanted = [
            {slot: (expert,) for slot, expert in enumerate(placement.experts_on(rank))}
            for rank in range(self.world_size)
        ]
        return self._transfer(wanted, self.num_local_experts)(by_expert.detach())

    def load_dense_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads this rank's share of an unsharded layer's state dict. No communication.

        Raises:
            ValueError: ``w13`` or ``w2`` do not hold E experts.
            RuntimeError: missing or unexpected keys, or other shapes (``load_state_dict``).
        """
        for name in WEIGHTS:
            if name in state and state[name].shape[0] != self.num_experts:
                raise ValueError(
                    f"{name} holds {state[name].shape[0]} experts, this layer has "
                    f"{self.num_experts}: pass an unsharded state dict, or use load_state_dict "
                    "for a shard"
                )
        self.load_state_dict(state)

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the unsharded layer, on every rank; all ranks of the group call it."""
        state = dict(self.state_dict())
        if self.world_size > 1:
            for name in WEIGHTS:
                shard = state[name].contiguous()
                full = shard.new_empty(self.world_size, *shard.shape)
                dist.all_gather(list(full.unbind()), shard, group=self.group)
                state[name] = full.flatten(0, 1)
        return state

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in WEIGHTS:
            destination[prefix + name] = self.to_logical(destination[prefix + name])

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state_dict = dict(state_dict)
        for name in WEIGHTS:
            found = state_dict.get(prefix + name)
            if found is None:
                continue
            sizes = (self.num_local_experts, self.num_experts)
            if found.dim() == 0 or len(found) not in sizes:
                state_dict[prefix + name] = getattr(self, name).detach()  # no second complaint
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: shape {tuple(found.shape)} holds neither "
                    f"this rank's {sizes[0]} experts nor all {sizes[1]}."
                )
                continue
            state_dict[prefix + name] = self.to_slots(found)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    # ---- Within the layer ----

    def _slot_tables(self) -> SlotTables:
        if self._tables is None or self._tables.slots.device != self.w13.device:
            self._tables = self._placement.tables(self.rank, self.w13.device)
        return self._tables

    def _reset_experts(self, seed: int, std: float, generator: torch.Generator) -> None:
        """Every expert has its own stream of random numbers: copies and any P give the same."""
        for slot, expert in enumerate(self._placement.experts_on(self.rank)):
            generator.manual_seed(seed + 1 + expert)
            for weight in (self.w13[slot], self.w2[slot]):
                drawn = torch.empty_like(weight, dtype=torch.float32)
                weight.copy_(drawn.normal_(0.0, std, generator=generator))
        self._load.clear()

    def _weights(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, name) for name in WEIGHTS}

    def _transfer(
        self, wanted: Sequence[Mapping[int, tuple[int, ...]]], rows_per_rank: int
    ) -> RowTransfer:
        device = self.w13.device
        return RowTransfer(wanted, rows_per_rank, rank=self.rank, group=self.group, device=device)

    def _mark_expert_parameters(self) -> None:
        for weight in (self.w13, self.w2):
            weight.expert_parallel = True  # type: ignore[attr-defined]  # for who reduces gradients

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not type it
        self._mark_expert_parameters()  # to_empty() of a meta layer makes new parameters
        self._copies_sum = None  # its indices are on the device
        return self

    def _check_placement(self, placement: ExpertPlacement, timeout: float) -> None:
        if not isinstance(placement, ExpertPlacement):
            raise TypeError(
                f"the placement is a {type(placement).__name__}: pass ExpertPlacement(row, "
                f"num_ranks={self.world_size}) of a row of physical_to_logical"
            )
        for name, ours in (
            ("num_experts", self.num_experts),
            ("num_ranks", self.world_size),
            ("num_slots", self.num_slots),
        ):
            theirs = getattr(placement, name)
            if theirs != ours:
                raise ValueError(
                    f"the placement has {name}={theirs}, the layer {ours}: balance for "
                    f"num_replicas={self.num_slots} and num_gpus={self.world_size}; the number of "
                    "slots is fixed when the layer is built (num_slots)"
                )
        if not timeout > 0:
            raise ValueError(f"timeout={timeout} s is not above 0: pass seconds, such as 100.0")


def check_multiples_of_8(**sizes: int) -> None:
    """ValueError for a width that rows cannot have: they move in units of 16 bytes."""
    for name, value in sizes.items():
        if value < 8 or value % 8:
            raise ValueError(
                f"{name}={value} is not a positive multiple of 8: "
                f"pad it to {max(8, -(-value // 8) * 8)}"
            )
