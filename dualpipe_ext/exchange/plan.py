"""Where every routed row goes: the plan that dispatch and combine follow.

Letters: T tokens of this rank, K experts a token, E experts, P ranks, L = E / P local experts,
R rows received in expert order, each expert's share padded to ``ROW_ALIGNMENT``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

__all__ = ["Plan", "RoutingLayout", "bad_index_error"]


@dataclass(frozen=True)
class RoutingLayout:
    """The sizes that a plan and an exchange must share.

    Rank r owns the experts [r·L, (r+1)·L).
    """

    rank: int
    world_size: int
    num_experts: int
    topk: int
    max_tokens: int

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.world_size


@dataclass(frozen=True, eq=False)
class Plan(ABC):
    """Deterministic slots of one routing, as tensors on the device.

    Rows are ordered by (expert, source rank, token, k): two runs give the same bits. With
    ``tokens_per_expert=[2, 0, 130]`` the experts start at rows ``[0, 128, 128]`` and R is 384.

    Attributes:
        layout: the sizes it was made for.
        topk_idx: [T, K] int32, this rank's routing; −1 is a dropped route.
        tokens_per_expert: [L] int32, rows each local expert receives, padding left out.
        expert_offsets: [L + 1] int32, first row of each local expert; the last entry is R.
        slots: [P, max_tokens, K] int32, row on this rank of (source rank, token, k); −1 where that
            route leads to another rank, was dropped, or the source has no such token.
        send_rows: [T, P] int32, position of a token among those that this rank sends to each rank,
            in token order; −1 where it does not go.
        unique_counts: [P] int32, tokens that arrive here from each rank, each counted once.
        expert_rows: [P, max_tokens, K] int32, the slots of the i-th token that arrives from each
            rank; undefined from ``unique_counts`` on.
    """

    layout: RoutingLayout
    topk_idx: torch.Tensor
    tokens_per_expert: torch.Tensor
    expert_offsets: torch.Tensor
    slots: torch.Tensor
    send_rows: torch.Tensor
    unique_counts: torch.Tensor
    expert_rows: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """T, the tokens of this rank."""
        return self.topk_idx.shape[0]

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows that dispatch gives: R, for which the host waits where it must, or ``max_rows``.

        Raises:
            IndexError: some rank's ``topk_idx`` holds a value outside [−1, E).
            PeerTimeoutError: a peer did not take part in the plan in time.
        """


def bad_index_error(rank: int, token: int, k: int, value: int, num_experts: int) -> IndexError:
    """The error every rank raises when one rank's routing is out of range."""
    return IndexError(
        f"topk_idx[{token}, {k}] = {value} on rank {rank} is outside [-1, {num_experts}): "
        f"route to one of the {num_experts} experts, or drop the route with -1"
    )
