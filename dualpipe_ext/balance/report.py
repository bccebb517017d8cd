"""Load per GPU before and after balancing: loads from a file, as text, JSON-ready dict, or plot.

Letters: L layers, E experts, R slots, G GPUs. Files hold one row a layer, one number an expert.
"""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .eplb import PlacementReport, measure_placement, rebalance_experts

__all__ = ["Balancing", "balance", "plot_balancing", "read_loads", "read_placement"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Balancing:
    """A placement beside the one before it."""

    physical_to_logical: torch.Tensor  # [L, R]
    count: torch.Tensor  # [L, E] copies
    before_load: torch.Tensor  # [L, G] float64
    after: PlacementReport
    before_name: str  # what the placement before was

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "physical_to_logical": self.physical_to_logical.tolist(),
            "count": self.count.tolist(),
            "before": _summary(self.before_load) | {"placement": self.before_name},
            "after": _summary(self.after.gpu_load)
            | {"copies_beside_another": int(self.after.together.sum())},
            "lower_bound": self.after.lower_bound.tolist(),
            "copies_to_send": None if self.after.moved is None else self.after.moved.tolist(),
        }

    def __str__(self) -> str:
        lines = [f"before: {self.before_name}", "layer     mean   before    after    bound"]
        rows = zip(
            self.after.gpu_load.mean(-1).tolist(),
            self.before_load.amax(-1).tolist(),
            self.after.heaviest.tolist(),
            self.after.lower_bound.tolist(),
            strict=True,
        )
        for layer, numbers in enumerate(rows):
            lines.append(f"{layer:5}" + "".join(f" {number:8.4g}" for number in numbers))
        before = _summary(self.before_load)["balance"]
        lines.append("load of a layer's GPUs: mean, and the heaviest before, after and at best")
        lines.append(f"before: mean/heaviest load {sum(before) / len(before):.4f}")
        lines.append(f"after:  {self.after}")
        return "\n".join(lines)


def _summary(gpu_load: torch.Tensor) -> dict[str, Any]:
    balance = (gpu_load.mean(-1) / gpu_load.amax(-1)).nan_to_num(nan=1.0)
    return {"gpu_load": gpu_load.tolist(), "balance": balance.tolist()}


def balance(
    load_LE: torch.Tensor,
    *,
    num_gpus: int,
    num_replicas: int | None = None,
    num_groups: int = 1,
    num_nodes: int = 1,
    policy: str = "deepseek",
    current: torch.Tensor | None = None,
    max_moved: int | None = None,
) -> Balancing:
    """Balance and compare with today's placement, or with experts in order and without copies.

    Args are those of `rebalance_experts`; num_replicas by default is that of today's placement, or
    as few as fill all GPUs. With policy="deepseek" a current placement is compared with only.
    """
    if num_replicas is None and current is not None:
        num_replicas = current.shape[-1]
    num_experts = load_LE.shape[-1]
    if num_replicas is None:
        num_replicas = math.ceil(num_experts / max(num_gpus, 1)) * max(num_gpus, 1)
    slots, _, count = rebalance_experts(
        load_LE,
        num_replicas,
        num_groups,
        num_nodes,
        num_gpus,
        policy,
        current=current if policy == "improved" else None,
        max_moved=max_moved,
    )
    after = measure_placement(load_LE, slots, num_gpus, num_groups, num_nodes, current=current)
    if current is not None:
        before_load = measure_placement(load_LE, current, num_gpus).gpu_load
    else:
        gpu_of_expert = torch.arange(num_experts) * num_gpus // num_experts
        before_load = torch.zeros_like(after.gpu_load)
        before_load.index_add_(-1, gpu_of_expert, load_LE.double())
    return Balancing(
        physical_to_logical=slots,
        count=count,
        before_load=before_load,
        after=after,
        before_name="experts in order, no copies" if current is None else "current placement",
    )


def read_loads(path: str | Path) -> torch.Tensor:
    """Loads [L, E] float64 from .json (rows, or an object with "loads") or .csv (header allowed).

    Raises:
        ValueError: for another kind of file, rows of unequal length, and what is not a number.
    """
    return torch.tensor(_read_rows(path, "loads", float), dtype=torch.float64)


def read_placement(path: str | Path) -> torch.Tensor:
    """physical_to_logical [L, R] from .json (rows, or what `balance --json` printed) or .csv."""
    return torch.tensor(_read_rows(path, "physical_to_logical", int), dtype=torch.int64)


def _read_rows(path: str | Path, key: str, number: type[int] | type[float]) -> list[list[float]]:
    path = Path(path)
    if path.suffix.lower() == ".json":
        try:
            rows = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if isinstance(rows, dict):
            if key not in rows:
                raise ValueError(f'{path} has no key "{key}" but {", ".join(rows) or "none"}')
            rows = rows[key]
    elif path.suffix.lower() == ".csv":
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
        if rows and not _is_number(rows[0][0]):
            rows = rows[1:]
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}: give a .json or .csv file")
    if isinstance(rows, list) and rows and not any(isinstance(row, list) for row in rows):
        rows = [rows]  # a single layer
    return _check_rows(path, rows, number)


def _check_rows(path: Path, rows: object, number: type[int] | type[float]) -> list[list[float]]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{path} holds no rows: give one row a layer, one number an expert")
    lengths = [len(row) for row in rows]
    for layer, length in enumerate(lengths):
        if length != lengths[0] or length == 0:
            raise ValueError(
                f"row {layer} of {path} has {length} numbers, row 0 has {lengths[0]}: every row "
                "holds the same experts, at least one"
            )
    try:
        numbers = [[number(cell) for cell in row] for row in rows]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} holds something that is no {number.__name__}: {error}") from None
    if number is int and any(
        isinstance(cell, float) and cell != int(cell) for row in rows for cell in row
    ):
        raise ValueError(f"{path} holds a number with a fraction where experts are whole numbers")
    return numbers


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def plot_balancing(balancing: Balancing, path: str | Path) -> None:
    """Draw load per GPU before and after, as shares of each layer's mean.

    Every dot is a GPU of a layer; the lines join the heaviest GPUs, which the steps wait for.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            "a plot needs matplotlib: install it with `pip install matplotlib`"
        ) from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    mean = balancing.after.gpu_load.mean(-1, keepdim=True).clamp(min=1e-300)
    layers = torch.arange(len(mean))
    both = (("before", balancing.before_load), ("after", balancing.after.gpu_load))
    for shift, (name, gpu_load) in zip((-0.15, 0.15), both, strict=True):
        share = gpu_load / mean
        (line,) = axes.plot(
            (layers + shift).tolist(),
            share.amax(-1).tolist(),
            label=f"{name}, heaviest {share.amax(-1).mean():.3f} on average",
        )
        place = (layers[:, None] + shift).expand_as(share).flatten()
        axes.scatter(
            place.tolist(), share.flatten().tolist(), s=6, alpha=0.5, color=line.get_color()
        )
    bound = (balancing.after.lower_bound / mean[:, 0]).tolist()
    axes.plot(layers.tolist(), bound, "k:", linewidth=1, label="lower bound")
    axes.set(
        xlabel="layer",
        ylabel="load of a GPU / mean",
        title=f"{mean.shape[0]} layers on {balancing.before_load.shape[1]} GPUs; "
        f"before: {balancing.before_name}",
    )
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path)
