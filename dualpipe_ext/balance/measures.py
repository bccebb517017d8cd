"""What a placement of experts means: load on every GPU, copies that stand together, copies moved.

Letters: L layers, E experts, R slots GPU by GPU, G GPUs. A placement is the expert in every slot,
[L, R] int64.
"""

import torch

__all__ = [
    "copies_on_gpus",
    "count_moved",
    "count_together",
    "keep_slots",
    "load_per_gpu",
    "relabel_gpus",
]


def load_per_gpu(load_LE: torch.Tensor, expert_LR: torch.Tensor, num_gpus: int) -> torch.Tensor:
    """[L, G] float64, an expert's load spread evenly over its copies."""
    count = torch.zeros_like(load_LE, dtype=torch.int64)
    count.scatter_add_(-1, expert_LR, torch.ones_like(expert_LR))
    load = (load_LE.double() / count).gather(-1, expert_LR)
    by_gpu: torch.Tensor = load.unflatten(-1, (num_gpus, -1))
    return by_gpu.sum(-1)


def copies_on_gpus(expert_LR: torch.Tensor, num_gpus: int, num_experts: int) -> torch.Tensor:
    """[L, G, E] int32: copies of every expert on every GPU."""
    by_gpu = expert_LR.unflatten(-1, (num_gpus, -1))
    copies = torch.zeros(*by_gpu.shape[:2], num_experts, dtype=torch.int32)
    return copies.scatter_add_(-1, by_gpu, torch.ones_like(by_gpu, dtype=torch.int32))


def count_together(expert_LR: torch.Tensor, num_gpus: int) -> torch.Tensor:
    """[L] int64: slots that hold a further copy of an expert their GPU has already."""
    copies = copies_on_gpus(expert_LR, num_gpus, int(expert_LR.max()) + 1)
    return expert_LR.shape[1] - (copies > 0).sum((1, 2))


def count_moved(expert_LR: torch.Tensor, home_LR: torch.Tensor, num_gpus: int) -> torch.Tensor:
    """[L] int64: copies to send, that is, experts on a GPU that has none of it at home."""
    num_experts = int(max(expert_LR.max(), home_LR.max())) + 1
    now = copies_on_gpus(expert_LR, num_gpus, num_experts) > 0
    return (now & (copies_on_gpus(home_LR, num_gpus, num_experts) == 0)).sum((1, 2))


def keep_slots(expert_LR: torch.Tensor, home_LR: torch.Tensor, num_gpus: int) -> torch.Tensor:
    """Reorder every GPU's slots: what stays on the GPU stays in its slot.

    One GPU with [4, 7, 1] and at home [1, 2, 4] becomes [1, 7, 4].
    """
    new, home = (each.unflatten(-1, (num_gpus, -1)) for each in (expert_LR, home_LR))
    turn_new, turn_home = (
        (each[..., None] == each[..., None, :]).tril(-1).sum(-1) for each in (new, home)
    )
    same = new[..., None] == home[..., None, :]
    same &= turn_new[..., None] == turn_home[..., None, :]
    stays, kept = same.any(-1), same.any(-2)
    free = kept.int().argsort(dim=-1, stable=True)  # free slots first, in order
    arrival = ((~stays).cumsum(-1) - 1).clamp(min=0)
    slot = torch.where(stays, same.int().argmax(-1), free.gather(-1, arrival))
    return torch.empty_like(new).scatter_(-1, slot, new).flatten(-2)


def relabel_gpus(
    expert_LR: torch.Tensor, home_LR: torch.Tensor, num_nodes: int, num_gpus: int
) -> torch.Tensor:
    """Name nodes, then the GPUs of a node, so that they share many experts with home's."""
    num_experts = int(max(expert_LR.max(), home_LR.max())) + 1
    for packs, outer in ((num_nodes, 1), (num_gpus, num_nodes)):
        new, home = (
            (copies_on_gpus(each, packs, num_experts) > 0)
            .float()
            .view(-1, packs // outer, num_experts)
            for each in (expert_LR, home_LR)
        )
        source = match_packs(new @ home.mT)
        by_pack = expert_LR.reshape(len(source), packs // outer, -1)
        expert_LR = by_pack.gather(1, source[..., None].expand_as(by_pack)).view_as(home_LR)
    return expert_LR


def match_packs(shared_XNN: torch.Tensor) -> torch.Tensor:
    """[X, N] int64: which new pack takes each old pack's place; the largest overlap chooses first.

    shared_XNN[x, i, j] is what new pack i and old pack j share.
    """
    num_packs = shared_XNN.shape[-1]
    row = torch.arange(len(shared_XNN))
    source = torch.empty(shared_XNN.shape[:2], dtype=torch.int64)
    for _ in range(num_packs):
        best = shared_XNN.flatten(1).argmax(-1)
        new, old = best // num_packs, best % num_packs
        source[row, old] = new
        shared_XNN[row, new] = -1
        shared_XNN[row, :, old] = -1
    return source
