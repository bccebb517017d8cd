"""The exchange in plain torch and ``torch.distributed``: runs anywhere, and is the tests' oracle.

It favours being obviously right over being fast: every (token, expert) route is sent as a row of
its own, so a row crosses the link up to K times, and the host learns all sizes. Form "unique" sends
a token once to every rank, and its sums come home route by route all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..errors import RowsOverflowError
from ..ops.expert_order import ROW_ALIGNMENT
from ..ops.fp8 import E4M3, dequantize_rows, quantize_rows
from ..ops.operator import wide
from .backend import Arrival, Departure, ExpertRows, UniqueRows, Weighted
from .plan import Plan, RoutingLayout, bad_index_error

__all__ = ["ReferenceBackend", "ReferencePlan"]

NAN = float("nan")
E4M3_NAN = 0x7F


@dataclass(frozen=True, eq=False)
class ReferencePlan(Plan):
    """A plan with the send and receive lists of ``all_to_all_single``.

    Attributes:
        send_routes: [S] int64, flat index t·K + k of each route sent, by destination rank.
        recv_rows: [N] int64, row in expert order of each route received, by source rank.
        send_counts, recv_counts: P ints each, how many of them belong to each rank.
        send_tokens: [U] int64, the tokens sent when each crosses once a rank, by destination rank.
        recv_slots: [V] int64, flat index p · max_tokens + i of each one received, by source rank.
        token_send_counts, token_recv_counts: P ints each, how many belong to each rank.
        rows: R, or the exchange's max_rows.
    """

    send_routes: torch.Tensor
    recv_rows: torch.Tensor
    send_counts: list[int]
    recv_counts: list[int]
    send_tokens: torch.Tensor
    recv_slots: torch.Tensor
    token_send_counts: list[int]
    token_recv_counts: list[int]
    rows: int

    @property
    def num_rows(self) -> int:
        return self.rows


class ReferenceBackend:
    """Dispatch and combine over a process group (gloo or NCCL), or alone with ``group=None``."""

    name = "reference"

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        layout: RoutingLayout,
        hidden: int,
        dtype: torch.dtype,
        max_rows: int | None = None,
        *,
        unique: bool = False,
    ):
        self.group = group
        self.unique = unique  # the form
        self.layout = layout
        self.hidden, self.dtype = hidden, dtype
        self.max_rows = max_rows
        self.comm_sms = 0  # the library below decides
        self.peer_bytes = 0

    def plan(self, topk_idx: torch.Tensor) -> ReferencePlan:
        layout, rank = self.layout, self.layout.rank
        idx_PTK = self._gather_routing(topk_idx)
        self._check_range(idx_PTK)

        counts_E = torch.bincount(idx_PTK[idx_PTK >= 0], minlength=layout.num_experts)
        counts_PL = counts_E.view(layout.world_size, -1)
        padded_PL = (counts_PL + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
        self._check_rows(padded_PL.sum(1).tolist())
        tokens_per_expert = counts_PL[rank]
        ends = padded_PL[rank].cumsum(0)
        starts = ends - padded_PL[rank]

        owner = idx_PTK // layout.num_local_experts  # -1 stays -1
        routes_here = (owner == rank).flatten().nonzero().squeeze(1)
        expert = idx_PTK.flatten()[routes_here] - rank * layout.num_local_experts
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

        my_owner = owner[rank, : len(topk_idx)]
        route_owner = my_owner.flatten()
        sent = (route_owner >= 0).nonzero().squeeze(1)
        return ReferencePlan(
            layout=layout,
            topk_idx=topk_idx,
            tokens_per_expert=tokens_per_expert.int(),
            expert_offsets=torch.cat([starts.new_zeros(1), ends]).int(),
            slots=slots.int(),
            **_unique_tables(my_owner, owner == rank, slots),
            send_routes=sent[torch.argsort(route_owner[sent], stable=True)],
            recv_rows=recv_rows,
            send_counts=torch.bincount(route_owner[sent], minlength=layout.world_size).tolist(),
            recv_counts=(owner == rank).sum((1, 2)).tolist(),
            rows=self.max_rows or int(ends[-1]),
        )

    def send(
        self,
        x: torch.Tensor,
        plan: ReferencePlan,
        topk_weight: torch.Tensor | None,
        channel: str,
        payload: str | None = None,
        num_sms: int | None = None,
    ) -> Arrival[Any]:
        if self.unique:
            return self._send_unique(x, plan, topk_weight, channel, payload)
        rows = x.new_zeros(plan.rows, x.shape[1])
        rows[plan.recv_rows] = self._send(x[plan.send_routes // self.layout.topk], plan)
        row_weight = None
        if topk_weight is not None:
            row_weight = topk_weight.new_zeros(plan.rows)
            row_weight[plan.recv_rows] = self._send(topk_weight.flatten()[plan.send_routes], plan)
        return ExpertRows(rows, row_weight, channel)

    def _send_unique(
        self,
        x: torch.Tensor,
        plan: ReferencePlan,
        topk_weight: torch.Tensor | None,
        channel: str,
        payload: str | None,
    ) -> UniqueRows:
        """NaN stands where no token has arrived, so that a read there shows in the results."""
        scales = None
        if payload == "fp8":
            q, scales = quantize_rows(x)
            x, scales = q.view(torch.uint8), self._send_tokens(scales, plan)
        rows = self._send_tokens(x, plan)
        if payload == "fp8":
            rows = rows.view(E4M3)
        if topk_weight is not None:
            topk_weight = self._send_tokens(topk_weight, plan)
        tensors = tuple(t for t in (rows, scales, topk_weight) if t is not None)
        return UniqueRows(rows, scales, topk_weight, channel, tensors, lambda: None)

    def arrive(
        self, arrival: Arrival[Any], plan: ReferencePlan, num_sms: int | None = None
    ) -> Weighted:
        if isinstance(arrival, ExpertRows):
            return arrival.rows, arrival.row_weight
        assert isinstance(arrival, UniqueRows)
        source, i, k, slot = self._arrived_routes(plan)
        arrived = arrival.rows[source, i]
        if arrival.scales is not None:
            arrived = dequantize_rows(arrived, arrival.scales[source, i], self.dtype)
        rows = arrived.new_zeros(plan.rows, arrived.shape[1])
        rows[slot] = arrived
        if arrival.topk_weight is None:
            return rows, None
        row_weight = arrival.topk_weight.new_zeros(plan.rows)
        row_weight[slot] = arrival.topk_weight[source, i, k]
        return rows, row_weight

    def leave(
        self,
        rows: torch.Tensor | None,
        plan: ReferencePlan,
        row_weight: torch.Tensor | None,
        channel: str,
        num_sms: int | None = None,
    ) -> Departure[Any]:
        sums = None
        if rows is None:
            shape = (self.layout.world_size, self.layout.max_tokens, self.hidden)
            sums = torch.full(shape, NAN, dtype=self.dtype, device=plan.topk_idx.device)
        return Departure(channel, row_weight is not None, rows, row_weight, sums)

    def fetch(
        self, departure: Departure[Any], plan: ReferencePlan, num_sms: int | None = None
    ) -> Weighted:
        if departure.sums is not None:
            return self._fetch_sums(departure.sums, plan), None
        rows, row_weight = departure.rows, departure.row_weight
        assert rows is not None
        tokens, topk, hidden = plan.num_tokens, self.layout.topk, rows.shape[1]
        routes = rows.new_zeros(tokens * topk, hidden, dtype=wide(rows.dtype))
        routes[plan.send_routes] = self._send_back(rows[plan.recv_rows], plan).to(routes.dtype)
        y = routes.view(tokens, topk, hidden).sum(1).to(rows.dtype)
        if row_weight is None:
            return y, None
        topk_weight = row_weight.new_zeros(tokens * topk)
        topk_weight[plan.send_routes] = self._send_back(row_weight[plan.recv_rows], plan)
        return y, topk_weight.view(tokens, topk)

    def _fetch_sums(self, sums: torch.Tensor, plan: ReferencePlan) -> torch.Tensor:
        sums = sums.flatten(0, 1)[plan.recv_slots]
        sent_back = self._all_to_all(sums, plan.token_recv_counts, plan.token_send_counts)
        y = sums.new_zeros(plan.num_tokens, self.hidden, dtype=wide(sums.dtype))
        counts = plan.token_send_counts
        for tokens, part in zip(
            plan.send_tokens.split(counts), sent_back.split(counts), strict=True
        ):  # rank by rank, each token at most once: the order of the sum is fixed
            y[tokens] += part
        return y.to(sums.dtype)

    def _arrived_routes(self, plan: ReferencePlan) -> tuple[torch.Tensor, ...]:
        """(source rank, place among its arrivals, k, slot) of every route that leads here."""
        places = torch.arange(self.layout.max_tokens, device=plan.unique_counts.device)
        arrived = places < plan.unique_counts[:, None]
        here = (plan.expert_rows >= 0) & arrived[:, :, None]
        source, i, k = here.nonzero(as_tuple=True)
        return source, i, k, plan.expert_rows[source, i, k].long()

    def check(self) -> None:
        """Nothing to report: ``torch.distributed`` raises by itself."""

    def close(self) -> None:
        """Nothing to free: the process group belongs to the caller."""

    def _gather_routing(self, topk_idx: torch.Tensor) -> torch.Tensor:
        """All ranks' routing, [P, max_tokens, K] int64, −1 where a rank has no such token."""
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

    def _check_rows(self, needed: list[int]) -> None:
        """Every rank knows all ranks' rows, so all raise and stay in step."""
        for rank, rows in enumerate(needed):
            if self.max_rows is not None and rows > self.max_rows:
                raise RowsOverflowError(rank=rank, needed=rows, max_rows=self.max_rows)

    def _send_tokens(self, values: torch.Tensor, plan: ReferencePlan) -> torch.Tensor:
        """[T, ...] → [P, max_tokens, ...]: each token once to every rank that it goes to."""
        layout = self.layout
        received = self._all_to_all(
            values[plan.send_tokens], plan.token_send_counts, plan.token_recv_counts
        )
        shape = (layout.world_size * layout.max_tokens, *values.shape[1:])
        garbage = NAN if values.is_floating_point() else E4M3_NAN
        buffer = torch.full(shape, garbage, dtype=values.dtype, device=values.device)
        buffer[plan.recv_slots] = received
        return buffer.view(layout.world_size, layout.max_tokens, *values.shape[1:])

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


def _unique_tables(
    my_owner_TK: torch.Tensor, here_PTK: torch.Tensor, slots: torch.Tensor
) -> dict[str, Any]:
    """The plan's fields for tokens that cross once a rank.

    my_owner_TK holds the rank of each of my routes, here_PTK whether a route leads to this rank.
    With two ranks, [[0, 0], [1, 0], [1, −1]] makes send_rows [[0, −1], [1, 0], [−1, 1]].
    """
    world_size, max_tokens, _ = here_PTK.shape
    ranks = torch.arange(world_size, device=here_PTK.device)
    goes_TP = (my_owner_TK[:, :, None] == ranks).any(1)
    arrives_PT = here_PTK.any(2)
    source, token = arrives_PT.nonzero(as_tuple=True)
    recv_slots = source * max_tokens + (arrives_PT.cumsum(1) - 1)[source, token]
    expert_rows = torch.full_like(slots, -1)
    expert_rows.flatten(0, 1)[recv_slots] = slots[source, token]
    counts = arrives_PT.sum(1)
    return dict(
        send_rows=torch.where(goes_TP, goes_TP.cumsum(0) - 1, -1).int(),
        unique_counts=counts.int(),
        expert_rows=expert_rows.int(),
        send_tokens=goes_TP.T.nonzero()[:, 1],
        recv_slots=recv_slots,
        token_send_counts=goes_TP.sum(0).tolist(),
        token_recv_counts=counts.tolist(),
    )
