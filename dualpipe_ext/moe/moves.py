"""Move experts between ranks: weights, gradients and optimizer state, all of it or nothing.

Slots, experts and placements: see balance/placement.py. A move has three parts: agree on it, bring
everything that moves into fresh memory, agree that all of it has arrived. Only then is anything
written, in place, so that parameters stay the objects that optimizers know. What fails before the
last agreement (a rank that died, memory that ran out, a peer that is too slow) leaves everything
as it was on every rank. Only a rank that dies in the middle of that last exchange of one number can
divide the others: into some with an error and nothing changed, and some that have moved and get the
error at their next collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..balance.placement import ExpertPlacement
from ..errors import DualPipeError
from ..ops.main_grad import main_grad_of
from ..ranks.agreement import Agreement
from ..ranks.row_transfer import RowTransfer

__all__ = ["ExpertTensor", "list_expert_tensors", "move_experts"]


@dataclass(frozen=True, eq=False)
class ExpertTensor:
    """A tensor [S, ...] with a row for each slot of this rank.

    A gradient is a part: what counts is its sum over an expert's copies. Of anything else each copy
    holds the whole.
    """

    name: str
    tensor: Tensor
    is_gradient: bool = False

    def describe(self) -> str:
        """What all ranks must have in common."""
        shape = list(self.tensor.shape)
        return f"{self.name} {shape} {self.tensor.dtype} {self.is_gradient}"


def list_expert_tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> list[ExpertTensor]:
    """Everything that lives in an expert's slot: weights, gradients, and the optimizer's state.

    Of the state that is every tensor with the parameter's number of dimensions and its first size.
    Numbers and tensors of one element belong to the whole parameter and stay.

    Raises:
        ValueError: the optimizer does not step all of these parameters, or keeps state that is
            neither.
    """
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        strange = [n for n, p in parameters.items() if p.requires_grad and id(p) not in held]
        if strange:
            raise ValueError(
                f"the optimizer has {len(held)} parameters, this layer's {', '.join(strange)} not "
                f"among them: pass the one that steps all of {', '.join(parameters)}, or None if "
                "none does"
            )
    found = []
    for name, parameter in parameters.items():
        found.append(ExpertTensor(name, parameter))
        main_grad = main_grad_of(parameter)
        if main_grad is not None:
            found.append(ExpertTensor(f"{name}.main_grad", main_grad, is_gradient=True))
        if parameter.grad is not None and parameter.grad is not main_grad:
            found.append(ExpertTensor(f"{name}.grad", parameter.grad, is_gradient=True))
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        for key, value in state.items():
            if is_by_expert(value, parameter):
                found.append(ExpertTensor(f"{name}: state {key!r}", value))
    return found


def is_by_expert(value: object, parameter: Tensor, num_rows: int | None = None) -> bool:
    """Whether an optimizer's state has a row for each of the parameter's experts, or is a number.

    Raises:
        ValueError: it is something else, which cannot be cut into experts.
    """
    if value is None or isinstance(value, bool | int | float):
        return False
    if isinstance(value, Tensor):
        num_rows = parameter.shape[0] if num_rows is None else num_rows
        if value.dim() == parameter.dim() and value.shape[0] == num_rows:
            return True
        if value.numel() == 1:
            return False
    found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"the optimizer keeps state of {found} for a parameter of shape {list(parameter.shape)}, "
        f"which has no part for each of the {parameter.shape[0]} experts along its first "
        "dimension: use an optimizer with state of the parameter's shape, such as Adam, for the "
        "experts"
    )


@torch.no_grad()
def move_experts(
    old: ExpertPlacement,
    new: ExpertPlacement,
    tensors: list[ExpertTensor],
    *,
    rank: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
    agreement: Agreement,
    timeout: float,
    problem: Exception | None = None,
) -> None:
    """Rearrange the rows of all tensors from one placement to another, or of none. Collective.

    Takes the memory of what arrives, and of what is sent of one tensor at a time.

    Args:
        agreement: of the group's ranks.
        problem: what keeps this rank from taking part; raised here once the others know.
        timeout: seconds that each of the steps may take.

    Raises:
        ValueError: the ranks disagree on the move.
        DualPipeError: a step failed, here or on another rank; nothing has changed.
    """
    arrivals = []
    agreement.timeout = timeout if timeout > 0 else agreement.timeout
    if problem is None:
        try:
            whole, parts = (
                RowTransfer(moves, old.slots_per_rank, rank=rank, group=group, device=device)
                for moves in plan_moves(old, new)
            )
            transfers = [(each.tensor, parts if each.is_gradient else whole) for each in tensors]
            arrivals = [(*each, each[1].allocate(each[0])) for each in transfers]
        except RuntimeError as error:  # out of memory
            problem = error
    with _reported(rank, timeout):
        mine = _Move(problem is None, (old, new), tuple(each.describe() for each in tensors))
        moves = agreement.gather("come to move experts", mine)
    if problem is not None:
        raise problem
    _check(moves, rank)
    with _reported(rank, timeout):
        for tensor, transfer, arrived in arrivals:
            transfer.fetch(tensor, arrived, timeout)
        agreement.gather("receive its experts", None)
    for tensor, transfer, arrived in arrivals:
        transfer.deliver(arrived, tensor)


Moves = list[dict[int, tuple[int, ...]]]  # [P] slot of the rank -> old slots, of all ranks


def plan_moves(old: ExpertPlacement, new: ExpertPlacement) -> tuple[Moves, Moves]:
    """Where the new contents of slots come from, for whole tensors and for gradients' parts.

    Only slots that change are named. A copy of weights comes from the same rank if it can. The
    parts of an expert whose slots change are added up in one of its new slots, an old one if it
    can be, and the others get zeros.
    """
    size = new.slots_per_rank
    whole: Moves = [{} for _ in range(new.num_ranks)]
    parts: Moves = [{} for _ in range(new.num_ranks)]
    for slot, expert in enumerate(new.physical_to_logical):
        rank, local = divmod(slot, size)
        if old.physical_to_logical[slot] != expert:
            whole[rank][local] = (old.nearest_slot(expert, rank),)
        before, after = old.slots_of_expert[expert], new.slots_of_expert[expert]
        if before == after:
            continue
        first = next((each for each in after if each in before), after[0])
        if slot != first:
            parts[rank][local] = ()
        elif before != (slot,):
            parts[rank][local] = before
    return whole, parts


@dataclass(frozen=True)
class _Move:
    """What a rank is about to do."""

    is_able: bool
    placements: tuple[ExpertPlacement, ExpertPlacement]
    tensors: tuple[str, ...]


def _check(moves: list[_Move], rank: int) -> None:
    """All ranks want the same move of the same tensors, or all raise."""
    for other, move in enumerate(moves):
        if not move.is_able:
            raise DualPipeError(
                f"rank {other} cannot take part in this move of experts, and nothing has changed: "
                "see its error"
            )
        if move.placements != moves[0].placements:
            raise ValueError(
                f"rank {other} was given another placement than rank 0, or had another before: "
                "give every rank the same, computed from loads added up over all ranks"
            )
        if move.tensors != moves[0].tensors:
            raise ValueError(
                f"rank {other} has other tensors to move than rank 0 (here, on rank {rank}: "
                f"{'; '.join(moves[rank].tensors)}): set gradients, main_grad and optimizer "
                "state on all ranks or on none"
            )


@contextmanager
def _reported(rank: int, timeout: float) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise DualPipeError(
            f"rank {rank} could not move experts, and nothing has changed on it: {error}. A rank "
            f"died, failed, or took longer than {timeout:g} s; look at the logs of the others, and "
            "start again from a checkpoint"
        ) from error
