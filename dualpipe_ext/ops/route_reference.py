"""The router in plain torch: scores, choice of experts, weights, balance loss.

It is the path without kernels, and what the kernels of `route.py` are checked against. Letters: T
tokens of this rank, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["balance_loss", "count_tokens", "score", "select_experts", "weigh"]


def score(logits: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, probabilities and what experts are ranked by, each [T, E], of `logits` [T, E].

    Softmax ranks by the logits: the same order, without ties from underflow.
    """
    if kind == "softmax":
        scores = logits.softmax(dim=-1)
        return scores, scores, logits
    scores = logits.sigmoid()
    return scores, scores / (scores.sum(dim=-1, keepdim=True) + 1e-20), scores


def weigh(scores: Tensor, topk_idx: Tensor, renormalize: bool, route_scale: float) -> Tensor:
    """Weights [T, K] of the chosen experts `topk_idx` [T, K] int64."""
    weight = scores.gather(1, topk_idx)
    if renormalize:
        weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
    return weight * route_scale


def count_tokens(topk_idx: Tensor, num_experts: int) -> Tensor:
    """[E] int64: how many routes of ``topk_idx`` [T, K] go to each expert; -1 is not counted.

    With E = 3, ``[[0, 2], [2, -1]]`` counts ``[1, 0, 2]``. No host wait (``torch.bincount`` has
    one), and integer sums are the same in any order.
    """
    column = torch.where(topk_idx < 0, num_experts, topk_idx).long().flatten()
    count = torch.zeros(num_experts + 1, dtype=torch.int64, device=topk_idx.device)
    return count.scatter_add_(0, column, torch.ones_like(column))[:num_experts]


def balance_loss(probability: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """E * sum over experts of f_e * P_e: 1 when uniform, E when one expert gets everything.

    f_e, the share of the routes that go to expert e, is a constant to autograd; P_e, the mean
    ``probability`` [T, E] of e over the tokens, carries the gradient (Switch Transformer, eq. 4
    to 6; GShard, arXiv 2006.16668). Only this rank's tokens count. With no tokens it is 0, still
    part of the graph, so that every rank runs the same backward.
    """
    mean_probability = probability.sum(dim=0) / max(probability.shape[0], 1)
    count = tokens_per_expert.to(mean_probability.dtype)
    share = count / count.sum().clamp_min(1)
    return len(count) * (share * mean_probability).sum()


def select_experts(
    scores: Tensor, bias: Tensor | None, topk: int, n_groups: int, topk_groups: int
) -> Tensor:
    """The K experts of every token, best first, [T, K] int64, from ``scores`` [T, E].

    ``bias`` [E] takes part in the choice only; experts outside the token's ``topk_groups`` best of
    ``n_groups`` groups do not. Of equal scores the lower index wins.
    """
    if bias is not None:
        scores = scores + bias
    if topk_groups < n_groups:
        scores = _keep_best_groups(scores, n_groups, topk_groups)
    return _descending_order(scores)[:, :topk]


def _keep_best_groups(scores: Tensor, n_groups: int, topk_groups: int) -> Tensor:
    """``scores`` [T, E] with -inf outside the token's ``topk_groups`` best groups."""
    grouped = scores.unflatten(1, (n_groups, -1))  # [T, G, E/G]
    best_two = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    dropped = _descending_order(best_two)[:, topk_groups:]
    mask = torch.zeros_like(best_two, dtype=torch.bool).scatter_(1, dropped, True)
    return grouped.masked_fill(mask.unsqueeze(-1), -torch.inf).flatten(1)


def _descending_order(scores: Tensor) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices
