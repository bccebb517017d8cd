"""The balancer's policy "improved": search from the greedy placement, or from today's.

Letters as in eplb_packing: L layers, E experts, R slots, X problems side by side (layers × nodes).
"""

import torch

from .greedy import assign_groups, pack, place_greedily, place_on_gpus
from .measures import count_moved, count_together, keep_slots, load_per_gpu, relabel_gpus
from .search import PlacementSearch

__all__ = ["improve_placement", "place_evenly"]

# Other starts are tried for a node whose heaviest GPU is this share above what any could reach.
GOOD_ENOUGH = 2e-3
# Their largest load per copy, in shares of a GPU's mean load.
PIECES = (1.0, 0.5, 0.75, 1.25)
# Starts with shaken loads, for the few nodes where the greedy placement is still better, because
# it may put two copies on one GPU. 30 save all but some of these with few slots a GPU.
SHAKEN_STARTS = 30


def place_evenly(
    load_LE: torch.Tensor, num_slots: int, num_groups: int, num_nodes: int, num_gpus: int
) -> torch.Tensor:
    """The best placement found from nothing, [L, R]: greedy start, then steps.

    An expert gets at most one copy a GPU of its node, so that copies never need to share one. Two
    assignments of groups to nodes are tried, DeepSeek's and one evened out further: the second is
    better on average, the first now and then.
    """
    load_LE = load_LE.float()
    expert_at_LE = assign_groups(load_LE, num_groups, num_nodes)
    tried = [expert_at_LE]
    if num_nodes > 1:
        size = load_LE.shape[1] // num_groups
        group_load = load_LE.unflatten(-1, (num_groups, size)).sum(-1)
        group_at = PlacementSearch(group_load, expert_at_LE[:, ::size] // size, num_nodes).run()
        tried += [(group_at[..., None] * size + torch.arange(size)).flatten(-2)]
    found = [
        place_in_nodes(load_LE, expert_at_LE, num_slots, num_nodes, num_gpus)
        for expert_at_LE in tried
    ]
    peaks = torch.stack([load_per_gpu(load_LE, each, num_gpus).amax(-1) for each in found])
    return torch.stack(found)[peaks.argmin(0), torch.arange(len(load_LE))]


def place_in_nodes(
    load_LE: torch.Tensor, expert_at_LE: torch.Tensor, num_slots: int, num_nodes: int, num_gpus: int
) -> torch.Tensor:
    """Copies and GPUs for a given assignment of experts to nodes, [L, R]."""
    num_layers, num_experts = load_LE.shape
    load_XE = load_LE.gather(-1, expert_at_LE).view(num_layers * num_nodes, -1)
    expert_XR = place_on_node(load_XE, num_slots // num_nodes, num_gpus // num_nodes)
    first = torch.arange(num_nodes)[:, None] * (num_experts // num_nodes)
    place_LR = (expert_XR.view(num_layers, num_nodes, -1) + first).flatten(-2)
    return expert_at_LE.gather(-1, place_LR)


def place_on_node(load_XE: torch.Tensor, num_slots: int, num_gpus: int) -> torch.Tensor:
    """Copies and GPUs inside nodes, [X, R], from further starts where the first leaves room."""
    most_on_a_gpu = -(-(num_slots // num_gpus) // load_XE.shape[1])  # 1, unless slots abound
    max_copies = num_gpus * most_on_a_gpu
    greedy_XR, _, _ = place_on_gpus(load_XE, num_slots, num_gpus, max_copies=num_slots)
    greedy_X = load_per_gpu(load_XE, greedy_XR, num_gpus).amax(-1)
    start_XR, _, count_XE = place_on_gpus(load_XE, num_slots, num_gpus, max_copies)
    mean_X = load_XE.sum(-1) / num_gpus
    largest_X = (load_XE / count_XE).amax(-1)
    good_X = (1 + GOOD_ENOUGH) * torch.maximum(mean_X, largest_X)

    found_XR = PlacementSearch(load_XE, start_XR, num_gpus).run()
    peak_X = load_per_gpu(load_XE, found_XR, num_gpus).amax(-1)

    def try_start(
        x: torch.Tensor, piece: float | torch.Tensor, noise: float | torch.Tensor
    ) -> None:
        load = load_XE[x]
        largest = torch.maximum(largest_X[x], piece * mean_X[x])
        count = choose_enough_copies(load, num_slots, max_copies, largest)
        start = pack_copies(load * noise, count, num_slots, num_gpus)
        other = PlacementSearch(load, start, num_gpus).run()
        peak = load_per_gpu(load, other, num_gpus).amax(-1)
        better = peak < peak_X[x]
        found_XR[x[better]], peak_X[x[better]] = other[better], peak[better]

    for piece in PIECES:
        try_start((peak_X > good_X).nonzero()[:, 0], piece, noise=1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(SHAKEN_STARTS):
        x = (peak_X > greedy_X * (1 + 1e-9)).nonzero()[:, 0]
        pieces = torch.empty(len(x)).uniform_(0.3, 1.5, generator=generator)
        noise = torch.empty(len(x), load_XE.shape[1]).uniform_(0.7, 1.3, generator=generator)
        try_start(x, pieces, noise)
    return found_XR


def choose_enough_copies(
    load_XE: torch.Tensor, num_slots: int, max_copies: int, largest_X: torch.Tensor
) -> torch.Tensor:
    """As few copies as keep load/copies <= largest; the slots left over go to the lightest experts.

    Many equal copies of a few hot experts pair up badly: 6 of 0.64 and 4 of 0.50 of a GPU's share
    on 8 GPUs put 1.14 on two of them, 4 of 0.95 and 2 of 0.99 fit.

    Returns:
        count_XE: [X, E] int64, num_slots in all.
    """
    needed = torch.ceil(load_XE / largest_X[:, None].clamp(min=1e-30) * (1 - 1e-6)).long()
    count_XE = needed.clamp(1, max_copies)
    expert = load_XE.argsort(dim=-1, stable=True)
    room = (max_copies - count_XE).gather(-1, expert)
    left = num_slots - count_XE.sum(-1, keepdim=True)
    before = room.cumsum(-1) - room
    return count_XE.scatter_add_(-1, expert, torch.minimum((left - before).clamp(min=0), room))


def pack_copies(
    load_XE: torch.Tensor, count_XE: torch.Tensor, num_slots: int, num_gpus: int
) -> torch.Tensor:
    """Pack the given copies onto GPUs; returns the expert in every slot, [X, R]."""
    num_problems, num_experts = load_XE.shape
    expert_XR = torch.arange(num_experts).repeat(num_problems).repeat_interleave(count_XE.flatten())
    expert_XR = expert_XR.view(num_problems, num_slots)
    gpu, rank = pack((load_XE / count_XE).gather(-1, expert_XR), num_gpus)
    slot = gpu * (num_slots // num_gpus) + rank
    return torch.empty_like(expert_XR).scatter_(-1, slot, expert_XR)


def improve_placement(
    load_LE: torch.Tensor,
    home_LR: torch.Tensor,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    max_moved: int | None,
) -> torch.Tensor:
    """The best placement found that sends at most max_moved copies from today's, [L, R].

    Steps from today's placement first. Then, where the copies allowed suffice, layers take the
    placement found from nothing: those that gain more than GOOD_ENOUGH or would else stay behind
    DeepSeek's placement, first those that gain most for what they send.
    """
    num_layers, num_slots = home_LR.shape
    sizes = (num_groups, num_nodes, num_gpus)
    by_node = home_LR.reshape(num_layers * num_nodes, -1)
    search = PlacementSearch(
        load_LE.repeat_interleave(num_nodes, 0),
        by_node,
        num_gpus // num_nodes,
        problems_per_layer=num_nodes,
        home_XR=by_node,
        budget=max_moved,
    )
    stepped = keep_slots(search.run().view(num_layers, -1), home_LR, num_gpus)
    fresh = place_evenly(load_LE, num_slots, *sizes)
    fresh = keep_slots(relabel_gpus(fresh, home_LR, num_nodes, num_gpus), home_LR, num_gpus)
    greedy, _ = place_greedily(load_LE, num_slots, *sizes)

    peak, peak_fresh, peak_greedy = (
        load_per_gpu(load_LE, each, num_gpus).amax(-1) for each in (stepped, fresh, greedy)
    )
    gain = peak - peak_fresh
    worth = (gain > GOOD_ENOUGH * peak) | ((gain > 0) & (peak > peak_greedy))
    sent = count_moved(stepped, home_LR, num_gpus)
    further = count_moved(fresh, home_LR, num_gpus) - sent
    score = torch.where(worth, gain / further.clamp(min=1), 0.0)
    if num_slots // num_gpus <= load_LE.shape[1] // num_nodes:  # else some must stand together
        fewer_together = count_together(stepped, num_gpus) - count_together(fresh, num_gpus)
        score[fewer_together > 0] = torch.inf
        score[fewer_together < 0] = 0
    order = score.argsort(descending=True, stable=True)
    order = order[score[order] > 0]
    if max_moved is not None:
        order = order[further[order].cumsum(0) <= max_moved - sent.sum()]
    stepped[order] = fresh[order]
    return stepped
