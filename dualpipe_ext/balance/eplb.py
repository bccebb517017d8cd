"""Expert-parallel load balancer: where every expert lives and which ones get copies.

`rebalance_experts` takes the arguments of DeepSeek's EPLB and returns its results; its default
policy makes the same decisions (https://github.com/deepseek-ai/EPLB). `measure_placement` says how
good a placement is and how much of it has to be sent. No GPU is needed or touched.

Letters: L layers, E experts, R slots (an expert's weights on a GPU; a "physical expert" or
"replica"), G GPUs, X most copies of one expert. Slots are numbered GPU by GPU, R/G on each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .greedy import choose_copies, place_greedily
from .improved import improve_placement, place_evenly
from .measures import copies_on_gpus, count_moved, count_together, load_per_gpu

__all__ = ["POLICIES", "PlacementReport", "measure_placement", "rebalance_experts"]

POLICIES = ("deepseek", "improved")


def rebalance_experts(
    weight: torch.Tensor,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    policy: str = "deepseek",
    *,
    current: torch.Tensor | None = None,
    max_moved: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Spread experts and copies of the busiest ones over GPUs, from load statistics.

    If num_nodes divides num_groups, the groups of a group-limited router stay whole: groups are
    packed onto nodes, copies are chosen inside each node and packed onto its GPUs. Otherwise
    groups and nodes are ignored. Tokens of an expert count as spread evenly over its copies.

    The policy "deepseek" is DeepSeek's greedy algorithm, element for element, in float32, ties to
    the lowest index. The policy "improved" searches on from there. It never puts two copies of one
    expert on a GPU (unless a GPU has more slots than its node has experts), and its heaviest GPU
    carries at most the load of the greedy one, except where two copies on one GPU were what
    balanced the loads: loads 10, 6, 1 in four slots on two GPUs split as 5+5 | 6+1 with the two
    copies of the first together, and as 10+½ | 6+½ at best without. It leaves slots in place as far
    as it can.

    Args:
        weight: [L, E], load of every expert (tokens, or a decayed mean of them), finite and >= 0.
        num_replicas: R >= E, a multiple of num_gpus.
        num_groups: groups of consecutive experts.
        num_nodes: hosts, with faster links inside.
        num_gpus: G, a multiple of num_nodes when groups are kept whole.
        policy: "deepseek" or "improved".
        current: [L, R], today's physical_to_logical, for few moves; "improved" only.
        max_moved: how many copies may be sent to GPUs that lack them today, over all layers. They
            go where they lower the heaviest GPUs most. None: as many as help, by 0.2% at least
            where all of a layer would move. Needs current.

    Returns:
        physical_to_logical [L, R]: expert in every slot.
        logical_to_physical [L, E, X]: slots of every expert, padded with -1.
        count [L, E]: copies of every expert. All int64 on the CPU.

    Raises:
        ValueError: for sizes that do not fit each other, loads that are negative or not finite,
            and a current placement that does not belong to these sizes.
    """
    load_LE = check_loads(weight)
    num_groups, num_nodes = check_sizes(
        load_LE.shape[1], num_replicas, num_groups, num_nodes, num_gpus
    )
    sizes = (num_groups, num_nodes, num_gpus)
    if policy == "deepseek":
        if current is not None or max_moved is not None:
            raise ValueError(
                'policy="deepseek" places from nothing and takes neither current nor max_moved: '
                'pass policy="improved"'
            )
        expert_LR, rank_LR = place_greedily(load_LE, num_replicas, *sizes)
        return expert_LR, *locate_copies(expert_LR, rank_LR, load_LE.shape[1])
    if policy != "improved":
        raise ValueError(f"policy={policy!r} is unknown: use one of {', '.join(POLICIES)}")
    if current is None:
        if max_moved is not None:
            raise ValueError(
                f"max_moved={max_moved} has nothing to count from: pass today's placement "
                "as current"
            )
        expert_LR = place_evenly(load_LE, num_replicas, *sizes)
    else:
        if max_moved is not None and max_moved < 0:
            raise ValueError(f"max_moved={max_moved} is negative: pass 0 or more, or None")
        current = check_placement(current, load_LE.shape, num_gpus, num_replicas)
        check_groups_whole(current, load_LE.shape[1], num_groups, num_nodes)
        expert_LR = improve_placement(load_LE, current, *sizes, max_moved)
    return expert_LR, *locate_copies(expert_LR, rank_copies(expert_LR), load_LE.shape[1])


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementReport:
    """What a placement means for a step, by layer; see `measure_placement`."""

    gpu_load: torch.Tensor  # [L, G] float64
    lower_bound: torch.Tensor  # [L] float64: no placement has a lighter heaviest GPU
    together: torch.Tensor  # [L] int64: slots with a further copy of an expert their GPU has
    moved: torch.Tensor | None  # [L] int64: copies to send from today's placement, if it is known

    @property
    def heaviest(self) -> torch.Tensor:
        """[L] float64, load of the heaviest GPU: what the layer's step waits for."""
        return self.gpu_load.amax(-1)

    @property
    def balance(self) -> torch.Tensor:
        """[L] float64, mean over heaviest load: 1 is perfect, also for layers without load."""
        return (self.gpu_load.mean(-1) / self.heaviest).nan_to_num(nan=1.0)

    def __str__(self) -> str:
        bound = (self.gpu_load.mean(-1) / self.lower_bound).nan_to_num(nan=1.0)
        sent = "" if self.moved is None else f", {int(self.moved.sum())} copies to send"
        return (
            f"mean/heaviest load {self.balance.mean():.4f} (worst layer {self.balance.min():.4f}, "
            f"bound {bound.mean():.4f}), {int(self.together.sum())} copies beside another{sent}"
        )


def measure_placement(
    weight: torch.Tensor,
    physical_to_logical: torch.Tensor,
    num_gpus: int,
    num_groups: int = 1,
    num_nodes: int = 1,
    *,
    current: torch.Tensor | None = None,
) -> PlacementReport:
    """Load of every GPU under a placement, a bound to compare with, and what must be sent.

    The bound of a layer is the largest of: the mean load of a GPU; the heaviest expert's load per
    copy when all R slots are used against it, an expert on as many GPUs as can hold it; and, with
    groups kept whole, the mean load of a GPU on the node with the heaviest group if the lightest
    groups join it there.

    Args:
        weight: [L, E] loads, as for `rebalance_experts`; also the other arguments.
        physical_to_logical: [L, R].
        current: [L, R], today's physical_to_logical. A copy counts as moved if its GPU has none of
            that expert today; multiply by an expert's bytes to get bytes.

    Raises:
        ValueError: as `rebalance_experts`.
    """
    load_LE = check_loads(weight)
    placement = check_placement(physical_to_logical, load_LE.shape, num_gpus)
    num_slots = placement.shape[1]
    num_groups, num_nodes = check_sizes(
        load_LE.shape[1], num_slots, num_groups, num_nodes, num_gpus
    )
    moved = None
    if current is not None:
        current = check_placement(current, load_LE.shape, num_gpus, num_slots)
        moved = count_moved(placement, current, num_gpus)
    return PlacementReport(
        gpu_load=load_per_gpu(load_LE, placement, num_gpus),
        lower_bound=bound_heaviest(load_LE, num_slots, num_groups, num_nodes, num_gpus),
        together=count_together(placement, num_gpus),
        moved=moved,
    )


def bound_heaviest(
    load_LE: torch.Tensor, num_slots: int, num_groups: int, num_nodes: int, num_gpus: int
) -> torch.Tensor:
    """[L] float64: see `measure_placement`."""
    load = load_LE.double()
    gpus = num_gpus // num_nodes
    # With more slots a GPU than experts the surplus holds copies that relieve no GPU.
    useful_slots = min(num_slots, gpus * load.shape[1])
    _, _, count = choose_copies(load_LE, useful_slots, max_copies=gpus)
    per_copy = (load / count).amax(-1)
    group_load = load.unflatten(-1, (num_groups, -1)).sum(-1).sort(dim=-1).values
    joined = num_groups // num_nodes - 1
    node_load = group_load[:, -1] + group_load[:, :joined].sum(-1)
    return torch.stack([load.sum(-1) / num_gpus, per_copy, node_load / gpus]).amax(0)


# ---- Copies of every expert ----


def rank_copies(expert_LR: torch.Tensor) -> torch.Tensor:
    """[L, R] int64: how many earlier slots hold the same expert."""
    order = expert_LR.argsort(dim=-1, stable=True)
    sorted_LR = expert_LR.gather(-1, order)
    place = torch.arange(expert_LR.shape[1]).expand_as(expert_LR)
    starts = torch.ones_like(sorted_LR, dtype=torch.bool)
    starts[:, 1:] = sorted_LR[:, 1:] != sorted_LR[:, :-1]
    first = (place * starts).cummax(-1).values
    return torch.empty_like(expert_LR).scatter_(-1, order, place - first)


def locate_copies(
    expert_LR: torch.Tensor, rank_LR: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """logical_to_physical [L, E, X], copies in the order of their ranks, and count [L, E]."""
    num_layers, num_slots = expert_LR.shape
    count = copies_on_gpus(expert_LR, 1, num_experts)[:, 0].long()
    most = int(count.max())
    slots = torch.full((num_layers, num_experts * most), -1)
    slots.scatter_(-1, expert_LR * most + rank_LR, torch.arange(num_slots).expand_as(expert_LR))
    return slots.view(num_layers, num_experts, most), count


# ---- Checks ----


def check_loads(weight: torch.Tensor) -> torch.Tensor:
    """[L, E] float32 on the CPU."""
    if weight.dim() != 2 or weight.numel() == 0 or weight.is_complex():
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and {weight.dtype}: pass [layers, experts] "
            "real numbers, at least one of each; one layer is weight[None]"
        )
    load = weight.detach().float().cpu()
    # The sum is finite only if all are, and overflows where a GPU's load might.
    if load.amin() >= 0 and load.sum(-1).isfinite().all():
        return load
    wrong = (~((load >= 0) & load.isfinite())).nonzero()
    if len(wrong) == 0:
        raise ValueError(
            f"the loads of layer {int((~load.sum(-1).isfinite()).nonzero()[0])} add up to more "
            "than float32 holds (3.4e38): divide all loads by their mean"
        )
    layer, expert = wrong[0].tolist()
    raise ValueError(
        f"weight[{layer}, {expert}] is {weight[layer, expert].item()}: loads are finite and >= 0; "
        f"set it and {len(wrong) - 1} others like it to 0, or leave that statistic out"
    )


def check_sizes(
    num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[int, int]:
    """The num_groups and num_nodes to go by: 1 and 1 if groups are not kept whole."""
    sizes = {
        "num_replicas": num_replicas,
        "num_groups": num_groups,
        "num_nodes": num_nodes,
        "num_gpus": num_gpus,
    }
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is unknown here: pass a whole number, at least 1")
    if num_replicas < num_experts:
        raise ValueError(
            f"num_replicas={num_replicas} is less than the {num_experts} experts of weight: every "
            f"expert needs a slot; pass at least {-(-num_experts // num_gpus) * num_gpus}"
        )
    check_divides("num_gpus", num_gpus, "num_replicas", num_replicas, least=num_experts)
    if num_groups % num_nodes:
        return 1, 1
    if num_experts % num_groups:
        raise ValueError(
            f"num_groups={num_groups} does not divide the {num_experts} experts of weight: pass "
            "the router's number of groups, or num_groups=1 and num_nodes=1 to ignore groups"
        )
    check_divides("num_nodes", num_nodes, "num_gpus", num_gpus)
    return num_groups, num_nodes


def check_divides(name: str, divisor: int, multiple_name: str, value: int, least: int = 1) -> None:
    if value % divisor:
        below = value // divisor * divisor
        above = below + divisor
        remedy = f"{below} or {above}" if below >= least else f"{above}"
        raise ValueError(
            f"{multiple_name}={value} is not a multiple of {name}={divisor}: use {remedy}"
        )


def check_placement(
    placement: torch.Tensor,
    load_shape: Sequence[int],
    num_gpus: int,
    num_replicas: int | None = None,
) -> torch.Tensor:
    """[L, R] int64 on the CPU, every expert somewhere."""
    num_layers, num_experts = load_shape
    wanted = "slots" if num_replicas is None else num_replicas
    if (
        placement.dim() != 2
        or placement.shape[0] != num_layers
        or placement.shape[1] != (num_replicas or placement.shape[1])
        or placement.is_floating_point()
    ):
        raise ValueError(
            f"the placement has shape {tuple(placement.shape)} and {placement.dtype}: pass the "
            f"physical_to_logical of these loads, [{num_layers}, {wanted}] whole numbers"
        )
    placement = placement.detach().long().cpu()
    wrong = ((placement < 0) | (placement >= num_experts)).nonzero()
    if len(wrong):
        layer, slot = wrong[0].tolist()
        raise ValueError(
            f"the placement has expert {int(placement[layer, slot])} in layer {layer}, slot {slot}:"
            f" experts are 0 to {num_experts - 1}"
        )
    missing = (copies_on_gpus(placement, 1, num_experts)[:, 0] == 0).nonzero()
    if len(missing):
        layer, expert = missing[0].tolist()
        raise ValueError(
            f"the placement has no slot for expert {expert} in layer {layer}: every expert needs "
            "one"
        )
    return placement


def check_groups_whole(
    placement: torch.Tensor, num_experts: int, num_groups: int, num_nodes: int
) -> None:
    nodes_of_expert = (copies_on_gpus(placement, num_nodes, num_experts) > 0).int()
    nodes = nodes_of_expert.unflatten(-1, (num_groups, -1)).amax(-1).sum(1)
    split = (nodes > 1).nonzero()
    if len(split):
        layer, group = split[0].tolist()
        raise ValueError(
            f"today's placement has group {group} of layer {layer} on {int(nodes[layer, group])} "
            f"nodes: with num_groups={num_groups} and num_nodes={num_nodes} groups stay whole; "
            "pass num_groups=1 and num_nodes=1, or current=None to place from nothing"
        )
