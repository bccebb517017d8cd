"""The two greedy steps of DeepSeek's balancer, over all layers at once.

Letters: L layers, E experts, R slots (an expert's weights on a GPU: a replica), G GPUs, X problems
side by side (layers, or layers × nodes), N items to pack. Loads are float32 and every sum and
quotient is taken in DeepSeek's order, so that near-ties fall as theirs do.
"""

import torch

__all__ = ["assign_groups", "choose_copies", "pack", "place_greedily", "place_on_gpus"]


def choose_copies(
    load_XE: torch.Tensor, num_slots: int, max_copies: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give every expert a slot and each further slot to the largest load per copy.

    Picking the largest load/copies again and again walks down the merged lists load/1, load/2, ...
    of all experts, so one sort replaces the loop. The k-th heaviest expert gets its c-th further
    copy only after the k-1 heavier ones got c-1 each: pairs with k·(c-1) >= the number of further
    slots need not be sorted. (That leans on load/c falling strictly with c: true in float32 for
    layers whose heaviest load is 0 or over 1e-30.)

    Args:
        load_XE: [X, E] float32.
        num_slots: R >= E.
        max_copies: of one expert; max_copies · E >= R.

    Returns:
        expert_XR [X, R], rank_XR [X, R] (the how-many-th copy, from 0), count_XE [X, E]; int64.
        With loads [[6, 9, 2]] and 5 slots: experts [[0, 1, 2, 1, 0]], ranks [[0, 0, 0, 1, 1]].
    """
    num_problems, num_experts = load_XE.shape
    expert_XR = torch.arange(num_experts).repeat(num_problems, 1)
    rank_XR = torch.zeros_like(expert_XR)
    count_XE = torch.ones_like(expert_XR)
    further = num_slots - num_experts
    if further == 0:
        return expert_XR, rank_XR, count_XE

    heaviest, heaviest_expert = torch.sort(load_XE, dim=-1, descending=True, stable=True)
    # Row k-1 and column c-1 of the pairs to sort: k·(c-1) < further.
    rows = torch.arange(min(num_experts, further))[:, None]
    columns = torch.arange(min(further, max_copies - 1))
    row, column = ((rows + 1) * columns < further).nonzero().T
    copies = column + 1
    quotient = heaviest[:, row] / copies
    expert = heaviest_expert[:, row]
    # Ties: to the lowest expert, an expert's copies in turn.
    order = (expert * (further + 1) + copies).argsort(dim=-1)
    by_value = quotient.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, by_value[:, :further])
    chosen = expert.gather(-1, order)
    count_XE.scatter_add_(-1, chosen, torch.ones_like(chosen))
    return torch.cat([expert_XR, chosen], -1), torch.cat([rank_XR, copies[order]], -1), count_XE


def pack(load_XN: torch.Tensor, num_packs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put N/num_packs items into each pack: heaviest first, into the lightest pack with room.

    Packs of one item are the items in their order.

    Args:
        load_XN: [X, N] float32; num_packs divides N.

    Returns:
        pack_XN and rank_XN (place inside the pack, by arrival), [X, N] int64.
    """
    num_problems, num_items = load_XN.shape
    room = num_items // num_packs
    if room == 1:
        pack_XN = torch.arange(num_items).repeat(num_problems, 1)
        return pack_XN, torch.zeros_like(pack_XN)

    load_XN, item_XN = torch.sort(load_XN, dim=-1, descending=True, stable=True)
    load_NX1 = load_XN.T.contiguous()[..., None]
    pack_NX1 = torch.empty(num_items, num_problems, 1, dtype=torch.int64)
    rank_NX1 = torch.empty_like(pack_NX1)
    pack_load = torch.zeros(num_problems, num_packs)
    filled = torch.zeros(num_problems, num_packs, dtype=torch.int64)
    one = torch.ones(num_problems, 1, dtype=torch.int64)
    infinite = torch.tensor(torch.inf)
    for load, chosen, rank in zip(load_NX1, pack_NX1, rank_NX1, strict=True):
        torch.argmin(pack_load, -1, keepdim=True, out=chosen)
        torch.gather(filled, -1, chosen, out=rank)
        filled.scatter_add_(-1, chosen, one)
        # A full pack weighs infinitely much and is never the lightest again.
        pack_load.scatter_add_(-1, chosen, torch.where(rank == room - 1, infinite, load))
    pack_XN = torch.empty_like(item_XN).scatter_(-1, item_XN, pack_NX1[..., 0].T)
    rank_XN = torch.empty_like(item_XN).scatter_(-1, item_XN, rank_NX1[..., 0].T)
    return pack_XN, rank_XN


def assign_groups(load_LE: torch.Tensor, num_groups: int, num_nodes: int) -> torch.Tensor:
    """Pack groups of experts onto nodes.

    Returns:
        expert_at_LE: [L, E] int64, experts node by node: node m of M has places [m·E/M, (m+1)·E/M).
    """
    num_layers, num_experts = load_LE.shape
    group_size = num_experts // num_groups
    group_load = load_LE.unflatten(-1, (num_groups, group_size)).sum(-1)
    node, rank = pack(group_load, num_nodes)
    place = node * (num_groups // num_nodes) + rank
    group_at = torch.empty_like(place)
    group_at.scatter_(-1, place, torch.arange(num_groups).expand(num_layers, -1))
    return (group_at[..., None] * group_size + torch.arange(group_size)).flatten(-2)


def place_on_gpus(
    load_XE: torch.Tensor, num_slots: int, num_gpus: int, max_copies: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose copies, then pack them onto the GPUs of one node.

    Returns:
        expert_XR, rank_XR: expert in every slot, GPU by GPU, and which of its copies; count_XE.
    """
    expert_XR, rank_XR, count_XE = choose_copies(load_XE, num_slots, max_copies)
    load_XR = (load_XE / count_XE).gather(-1, expert_XR)
    gpu, rank_on_gpu = pack(load_XR, num_gpus)
    slot = gpu * (num_slots // num_gpus) + rank_on_gpu
    by_slot = torch.empty_like(slot)
    by_slot.scatter_(-1, slot, torch.arange(num_slots).expand(slot.shape))
    return expert_XR.gather(-1, by_slot), rank_XR.gather(-1, by_slot), count_XE


def place_greedily(
    load_LE: torch.Tensor, num_slots: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek's placement: groups onto nodes, copies inside each node, copies onto its GPUs.

    Returns:
        expert_LR, rank_LR: [L, R] int64, expert in every slot and which of its copies it is.
    """
    num_layers, num_experts = load_LE.shape
    expert_at_LE = assign_groups(load_LE, num_groups, num_nodes)
    load_XE = load_LE.gather(-1, expert_at_LE).view(num_layers * num_nodes, -1)
    expert_XR, rank_XR, _ = place_on_gpus(
        load_XE, num_slots // num_nodes, num_gpus // num_nodes, max_copies=num_slots
    )
    first = torch.arange(num_nodes)[:, None] * (num_experts // num_nodes)
    place_LR = (expert_XR.view(num_layers, num_nodes, -1) + first).flatten(-2)
    return expert_at_LE.gather(-1, place_LR), rank_XR.view(num_layers, -1)
