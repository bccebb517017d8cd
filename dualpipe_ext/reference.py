"""The exchange in plain torch and ``torch.distributed``: runs anywhere, and is the tests' oracle.

It favours being obviously right over being fast: every (token, expert) route is sent as a row of
its own, so a row crosses the link up to K times, and the host learns all sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .routing import ROW_ALIGNMENT, Plan, RoutingLayout, bad_index_error

__all__ = ["ReferenceBackend", "ReferencePlan"]


@dataclass(frozen=True, eq=False)
class ReferencePlan(Plan):
    """A plan with the send and receive lists of ``all_to_all_single``.

    Attributes:
        send_routes: [S] int64, flat index t·K + k of each route sent, by destination rank.
        recv_rows: [N] int64, row in expert order of each route received, by source rank.
        send_counts, recv_counts: P ints each, how many of them belong to each rank.
        rows: R.
    """

    send_routes: torch.Tensor
    recv_rows: torch.Tensor
    send_counts: list[int]
    recv_counts: list[int]
    rows: int

    @property
    def num_rows(self) -> int:
        return self.rows


class ReferenceBackend:
    """Dispatch and combine over a process group (gloo or NCCL), or alone with ``group=None``."""

    name = "reference"

    def __init__(self, group: dist.ProcessGroup | None, layout: RoutingLayout):
        self.group = group
        self.layout = layout
        self.comm_sms = 0  # the library below decides

    def plan(self, topk_idx: torch.Tensor) -> ReferencePlan:
        layout, rank = self.layout, self.layout.rank
        idx_PTK = self._gather_routing(topk_idx)
        self._check_range(idx_PTK)

        owner = idx_PTK // layout.num_local_experts  # -1 stays -1
        routes_here = (owner == rank).flatten().nonzero().squeeze(1)
        expert = idx_PTK.flatten()[routes_here] - rank * layout.num_local_experts
        tokens_per_expert = torch.bincount(expert, minlength=layout.num_local_experts)
        padded = (tokens_per_expert + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
        ends = padded.cumsum(0)
        starts = ends - padded

        # A stable sort keeps (source rank, token, k) inside each expert.
        by_expert = torch.argsort(expert, stable=True)
        first_of_expert = tokens_per_expert.cumsum(0) - tokens_per_expert
        position = torch.arange(len(by_expert), device=expert.device)
        sorted_expert = expert[by_expert]
        rows_sorted = starts[sorted_expert] + position - first_of_expert[sorted_expert]
        recv_rows = torch.empty_like(rows_sorted)
        recv_rows[by_expert] = rows_sorted
        slots = torch.full_like(idx_PTK, -1)
        slots.view(-1)[routes_here] = recv_rows

        my_owner = owner[rank, : len(topk_idx)].flatten()
        sent = (my_owner >= 0).nonzero().squeeze(1)
        return ReferencePlan(
            layout=layout,
            topk_idx=topk_idx,
            tokens_per_expert=tokens_per_expert.int(),
            expert_offsets=torch.cat([starts.new_zeros(1), ends]).int(),
            slots=slots.int(),
            send_routes=sent[torch.argsort(my_owner[sent], stable=True)],
            recv_rows=recv_rows,
            send_counts=torch.bincount(my_owner[sent], minlength=layout.world_size).tolist(),
            recv_counts=(owner == rank).sum((1, 2)).tolist(),
            rows=int(ends[-1]),
        )

    def dispatch(
        self, x: torch.Tensor, plan: ReferencePlan, topk_weight: torch.Tensor | None, channel: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = x.new_zeros(plan.rows, x.shape[1])
        rows[plan.recv_rows] = self._send(x[plan.send_routes // self.layout.topk], plan)
        if topk_weight is None:
            return rows, None
        row_weight = topk_weight.new_zeros(plan.rows)
        row_weight[plan.recv_rows] = self._send(topk_weight.flatten()[plan.send_routes], plan)
        return rows, row_weight

    def combine(
        self, rows: torch.Tensor, plan: ReferencePlan, row_weight: torch.Tensor | None, channel: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens, topk, hidden = plan.num_tokens, self.layout.topk, rows.shape[1]
        sum_dtype = torch.promote_types(rows.dtype, torch.float32)
        routes = rows.new_zeros(tokens * topk, hidden, dtype=sum_dtype)
        routes[plan.send_routes] = self._send_back(rows[plan.recv_rows], plan).to(sum_dtype)
        y = routes.view(tokens, topk, hidden).sum(1).to(rows.dtype)
        if row_weight is None:
            return y, None
        topk_weight = row_weight.new_zeros(tokens * topk)
        topk_weight[plan.send_routes] = self._send_back(row_weight[plan.recv_rows], plan)
        return y, topk_weight.view(tokens, topk)

    def check(self) -> None:
        """Nothing to report: ``torch.distributed`` raises by itself."""

    def close(self) -> None:
        """Nothing to free: the process group belongs to the caller."""

    def _gather_routing(self, topk_idx: torch.Tensor) -> torch.Tensor:
        """Everybody's routing, [P, max_tokens, K] int64, −1 where a rank has no such token."""
        layout = self.layout
        padded = topk_idx.new_full((layout.max_tokens, layout.topk), -1, dtype=torch.int64)
        padded[: len(topk_idx)] = topk_idx
        if layout.world_size == 1:
            return padded[None]
        gathered = padded.new_empty(layout.world_size, *padded.shape)
        dist.all_gather(list(gathered.unbind()), padded, group=self.group)
        return gathered

    def _check_range(self, idx_PTK: torch.Tensor) -> None:
        num_experts = self.layout.num_experts
        bad = ((idx_PTK < -1) | (idx_PTK >= num_experts)).nonzero()
        if len(bad):
            rank, token, k = bad[0].tolist()
            raise bad_index_error(rank, token, k, int(idx_PTK[rank, token, k]), num_experts)

    def _send(self, routes: torch.Tensor, plan: ReferencePlan) -> torch.Tensor:
        return self._all_to_all(routes, plan.send_counts, plan.recv_counts)

    def _send_back(self, routes: torch.Tensor, plan: ReferencePlan) -> torch.Tensor:
        return self._all_to_all(routes, plan.recv_counts, plan.send_counts)

    def _all_to_all(
        self, sent: torch.Tensor, send_counts: list[int], recv_counts: list[int]
    ) -> torch.Tensor:
        if self.layout.world_size == 1:
            return sent
        received = sent.new_empty(sum(recv_counts), *sent.shape[1:])
        dist.all_to_all_single(
            received, sent.contiguous(), recv_counts, send_counts, group=self.group
        )
        return received
