"""Checkpoints of optimizers whose parameters are experts: in logical order, as state dicts are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .experts import PlacedExperts
from .moves import is_by_expert

__all__ = ["load_optimizer_state_dict", "optimizer_state_dict"]


def optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` in which rank r holds the state of its experts [r·L, (r+1)·L).

    It does not depend on where the experts of the model's :class:`~dualpipe_ext.MoELayer` s are,
    nor on copies, and belongs to ``model.state_dict()``. All ranks of the layers' groups call it.

    Raises:
        ValueError: state that cannot be cut into experts.
    """
    state = optimizer.state_dict()
    return state | {"state": _convert(model, optimizer, state, saving=True)}


def load_optimizer_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Loads what :func:`optimizer_state_dict` saved, into any placement. All ranks call it.

    Raises:
        ValueError: state for another number of parameters, or that cannot be cut into experts.
    """
    theirs = [len(group["params"]) for group in state["param_groups"]]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    if theirs != ours:
        raise ValueError(
            f"the state is of parameter groups of {theirs} parameters, the optimizer has {ours}: "
            "make it with the same groups as the one that was saved"
        )
    optimizer.load_state_dict(
        dict(state) | {"state": _convert(model, optimizer, state, saving=False)}
    )


def _convert(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], saving: bool
) -> dict[int, Any]:
    """The "state" part with every tensor by expert put into logical order, or into slots."""
    layers = {
        id(weight): layer
        for layer in model.modules()
        if isinstance(layer, PlacedExperts)
        for weight in (layer.w13, layer.w2)
    }
    converted = dict(state["state"])
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        for index, parameter in zip(saved["params"], group["params"], strict=True):
            layer = layers.get(id(parameter))
            if layer is not None and index in converted:
                num_rows = layer.num_local_slots if saving else layer.num_local_experts
                convert = layer.to_logical if saving else layer.to_slots
                converted[index] = _convert_entry(converted[index], parameter, num_rows, convert)
    return converted


def _convert_entry(
    entry: Mapping[str, Any], parameter: Tensor, num_rows: int, convert: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    return {
        key: convert(value) if is_by_expert(value, parameter, num_rows) else value
        for key, value in entry.items()
    }
