"""DeepSeek's balancing algorithm in slow loops, one layer, one slot at a time: the oracle.

Loads are float32 and stay so in every sum and quotient: near-ties decide where a copy goes.
"""

import numpy as np


def pack_items(loads, num_packs):
    """Heaviest first, into the lightest pack with room; returns each pack's items, in order."""
    room = len(loads) // num_packs
    if room == 1:
        return [[item] for item in range(len(loads))]
    packs = [[] for _ in range(num_packs)]
    totals = [np.float32(0)] * num_packs
    for item in sorted(range(len(loads)), key=lambda item: (-loads[item], item)):
        open_packs = [p for p in range(num_packs) if len(packs[p]) < room]
        chosen = min(open_packs, key=lambda p: (totals[p], p))
        packs[chosen].append(item)
        totals[chosen] = np.float32(totals[chosen] + loads[item])
    return packs


def copy_experts(loads, num_slots):
    """Copies of each expert, and (expert, rank) of every slot in the order they were given."""
    counts = [1] * len(loads)
    slots = [(expert, 0) for expert in range(len(loads))]
    while len(slots) < num_slots:
        per_copy = [np.float32(load / np.float32(c)) for load, c in zip(loads, counts, strict=True)]
        expert = max(range(len(loads)), key=lambda e: (per_copy[e], -e))
        slots.append((expert, counts[expert]))
        counts[expert] += 1
    return counts, slots


def place_layer(loads, group_loads, num_slots, num_nodes, num_gpus):
    """(expert, rank) of every slot of one layer. group_loads are sums, taken by the caller."""
    group_size = len(loads) // len(group_loads)
    placed = []
    for groups in pack_items(group_loads, num_nodes):
        experts = [g * group_size + i for g in groups for i in range(group_size)]
        loads_here = [loads[e] for e in experts]
        counts, slots = copy_experts(loads_here, num_slots // num_nodes)
        slot_loads = [np.float32(loads_here[e] / np.float32(counts[e])) for e, _ in slots]
        for items in pack_items(slot_loads, num_gpus // num_nodes):
            placed += [(experts[slots[i][0]], slots[i][1]) for i in items]
    return placed


def balance_greedily(weight, num_replicas, num_groups, num_nodes, num_gpus):
    """Lists like the tensors of `rebalance_experts`, for a [L, E] tensor of loads."""
    weight = weight.float()
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    group_loads = weight.unflatten(-1, (num_groups, -1)).sum(-1).numpy()
    physical_to_logical, ranks = [], []
    for layer, loads in enumerate(weight.numpy()):
        placed = place_layer(loads, group_loads[layer], num_replicas, num_nodes, num_gpus)
        physical_to_logical.append([expert for expert, _ in placed])
        ranks.append([rank for _, rank in placed])
    num_experts = weight.shape[1]
    count = [[row.count(e) for e in range(num_experts)] for row in physical_to_logical]
    most = max(max(row) for row in count)
    logical_to_physical = [[[-1] * most for _ in range(num_experts)] for _ in count]
    for layer, (experts, layer_ranks) in enumerate(zip(physical_to_logical, ranks, strict=True)):
        for slot, (expert, rank) in enumerate(zip(experts, layer_ranks, strict=True)):
            logical_to_physical[layer][expert][rank] = slot
    return physical_to_logical, logical_to_physical, count
