"""Form "unique" on NVLink: what crosses is a row a (token, rank).

Every rank has an inbox that others write and an outbox that they read. Compute kernels bring rows
from the inbox into expert order, and add up what goes into the outbox.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import DualPipeError
from ..ops.fp8 import E4M3
from ..ops.operator import aligned
from ..triton_kernels.experts import rows as expert_rows
from .backend import Arrival, Departure, UniqueRows, Weighted
from .nvlink import CHANNEL_INDEX, NvlinkBackend, NvlinkPlan, address

__all__ = ["NvlinkUniqueBackend"]


@dataclass
class _Channel:
    """Views of this rank's part of a channel, and what orders its copies."""

    inbox: torch.Tensor  # [P, max_tokens, H]
    inbox_fp8: torch.Tensor  # [P, max_tokens, H]
    inbox_scale: torch.Tensor  # [P, max_tokens, ceil(H / 128)]
    inbox_weight: torch.Tensor  # [P, max_tokens, K rounded up to 4]
    outbox: torch.Tensor  # [P, max_tokens, H]
    outbox_weight: torch.Tensor  # [P, max_tokens, K rounded up to 4]
    streams: list[torch.cuda.Stream]  # of copies to peers, and to itself
    events: list[torch.cuda.Event]
    is_held: bool = False  # a receiver still reads the inbox
    released: tuple[torch.cuda.Stream, torch.cuda.Event] | None = field(default=None)


class NvlinkUniqueBackend(NvlinkBackend):
    """`send` pushes into inboxes, `fetch` pulls from outboxes; `arrive` and `leave` are Triton's.

    With `comm_sms` 0 copy engines move the bytes, and compute SMs pack and sum them.
    """

    unique = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._channels = {name: self._make_channel(name) for name in CHANNEL_INDEX}

    def send(
        self,
        x: torch.Tensor,
        plan: NvlinkPlan,
        topk_weight: torch.Tensor | None,
        channel: str,
        payload: str | None = None,
        num_sms: int | None = None,
    ) -> UniqueRows:
        self.check_peers()
        x, parts, fp8 = aligned(x), self._channels[channel], payload == "fp8"
        self._wait_released(channel)
        stride = parts.inbox_weight.shape[2]
        if topk_weight is not None and stride != self.layout.topk:
            topk_weight = torch.nn.functional.pad(topk_weight, (0, stride - self.layout.topk))
        copies = self.comm_sms == 0  # then compute SMs pack the outbox
        if copies:
            self.kernels.wait_outbox(CHANNEL_INDEX[channel], self.stream())
        self.kernels.push(
            CHANNEL_INDEX[channel],
            x.data_ptr(),
            address(topk_weight),
            fp8,
            copies,
            len(x),
            plan.tables.data_ptr(),
            (num_sms or self._all_sms) if copies else self.comm_sms,
            self.stream(),
        )
        if copies:
            self._copy(plan, channel, weighted=topk_weight is not None, fp8=fp8)
        parts.is_held = True
        weights = None if topk_weight is None else parts.inbox_weight[:, :, : self.layout.topk]
        rows, scales = (parts.inbox_fp8, parts.inbox_scale) if fp8 else (parts.inbox, None)
        return UniqueRows(rows, scales, weights, channel, (), lambda: self._release(channel))

    def arrive(
        self, arrival: Arrival[Any], plan: NvlinkPlan, num_sms: int | None = None
    ) -> Weighted:
        assert isinstance(arrival, UniqueRows)
        try:
            rows, row_weight = self.row_tensors(plan, arrival.topk_weight is not None)
            expert_rows.expand(
                arrival.rows,
                plan.expert_rows,
                plan.unique_counts,
                plan.expert_offsets,
                plan.tokens_per_expert,
                rows,
                scales=arrival.scales,
                topk_weight=arrival.topk_weight,
                row_weight=row_weight,
                num_sms=num_sms or self._all_sms,
            )
        finally:  # a plan with a bad index raises, and the exchange stays usable
            arrival.release()
        return rows, row_weight

    def leave(
        self,
        rows: torch.Tensor | None,
        plan: NvlinkPlan,
        row_weight: torch.Tensor | None,
        channel: str,
        num_sms: int | None = None,
    ) -> Departure[Any]:
        self.check_peers()
        self.kernels.wait_outbox(CHANNEL_INDEX[channel], self.stream())
        parts, weighted = self._channels[channel], row_weight is not None
        if rows is not None:
            expert_rows.sum_per_rank(
                aligned(rows),
                plan.expert_rows,
                plan.unique_counts,
                parts.outbox,
                row_weight=row_weight,
                sum_weight=parts.outbox_weight if weighted else None,
                num_sms=num_sms or self._all_sms,
            )
        return Departure(channel, weighted, sums=parts.outbox)

    def fetch(
        self, departure: Departure[Any], plan: NvlinkPlan, num_sms: int | None = None
    ) -> Weighted:
        self.check_peers()
        channel, weighted = departure.channel, departure.weighted
        y, topk_weight = self.home_tensors(plan, weighted)
        if self.comm_sms == 0:
            parts = self._channels[channel]
            self._wait_released(channel)
            self._copy(plan, channel, combine=True, weighted=weighted)
            expert_rows.sum_at_home(
                parts.inbox,
                plan.send_rows,
                y,
                topk_idx=plan.topk_idx if weighted else None,
                received_weight=parts.inbox_weight if weighted else None,
                topk_weight=topk_weight,
                num_local_experts=self.layout.num_local_experts,
                num_sms=num_sms or self._all_sms,
            )
            return y, topk_weight
        self.kernels.pull(
            CHANNEL_INDEX[channel],
            plan.topk_idx.data_ptr(),
            plan.num_tokens,
            plan.tables.data_ptr(),
            y.data_ptr(),
            address(topk_weight),
            self.comm_sms,
            self.stream(),
        )
        return y, topk_weight

    def push_ceiling(self, x: torch.Tensor, rows_per_peer: int) -> None:
        """What the link gives: rows of x to every other rank's receive buffer, and nothing else."""
        self.kernels.push_ceiling(x.data_ptr(), len(x), rows_per_peer, self.comm_sms, self.stream())

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        self._channels = {}
        super().close()

    def _copy(
        self,
        plan: NvlinkPlan,
        channel: str,
        *,
        weighted: bool,
        combine: bool = False,
        fp8: bool = False,
    ) -> None:
        parts = self._channels[channel]
        self.kernels.copy(
            CHANNEL_INDEX[channel],
            combine,
            weighted,
            fp8,
            plan.tokens_for_ranks(combine=combine),
            [stream.cuda_stream for stream in parts.streams],
            [event.cuda_event for event in parts.events],
            self.stream(),
        )

    def _release(self, channel: str) -> None:
        parts = self._channels[channel]
        parts.is_held, parts.released = False, None
        if not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self.device)
            parts.released = stream, stream.record_event()

    def _wait_released(self, channel: str) -> None:
        parts = self._channels[channel]
        if parts.is_held:
            raise DualPipeError(
                f"the rows of the last send on channel {channel!r} are still held: call their "
                "release(), or arrive(), before the channel's next call"
            )
        # A graph cannot wait for what ran before its capture, nor anybody for an event within one.
        if parts.released is None or torch.cuda.is_current_stream_capturing():
            return
        stream, event = parts.released
        current = torch.cuda.current_stream(self.device)
        if stream != current:
            current.wait_event(event)

    def _make_channel(self, channel: str) -> _Channel:
        parts = self.kernels.channel_parts(CHANNEL_INDEX[channel])
        ranks, tokens = self.layout.world_size, self.layout.max_tokens
        views = {name: self.memory.part(first, count) for name, (first, count) in parts.items()}

        def view(name: str, dtype: torch.dtype, nbytes: int | None = None) -> torch.Tensor:
            return views[name][:nbytes].view(dtype).view(ranks, tokens, -1)

        scales = view("inbox_scale", torch.float32)
        made = _Channel(
            inbox=view("inbox", self.dtype),
            inbox_fp8=view("inbox", E4M3, ranks * tokens * self.hidden),
            inbox_scale=scales[:, :, : -(-self.hidden // 128)],
            inbox_weight=view("inbox_weight", torch.float32),
            outbox=view("outbox", self.dtype),
            outbox_weight=view("outbox_weight", torch.float32),
            streams=[torch.cuda.Stream(self.device) for _ in range(2)],
            events=[torch.cuda.Event() for _ in range(ranks + 1)],
        )
        for event in made.events:
            event.record()  # torch makes them at their first use
        return made
