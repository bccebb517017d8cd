"""The exchange on NVLink with unique rows: what crosses is a row a (token, rank).

Every rank has an inbox that others write and an outbox that they read. Compute kernels on `num_sms`
SMs bring rows from the inbox into expert order, and add up what goes into the outbox.
"""

from __future__ import annotations

import torch

from ..errors import DualPipeError
from ..triton_kernels.experts import rows as expert_rows
from .nvlink import CHANNEL_INDEX, NvlinkBackend, NvlinkPlan, address, aligned

__all__ = ["NvlinkUniqueBackend"]

Received = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class NvlinkUniqueBackend(NvlinkBackend):
    """Dispatch = dispatch_unique + expand, combine = sum_rows + combine_unique."""

    unique = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # Set by the Exchange's users.
        self.num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._boxes = {name: self._make_boxes(name) for name in CHANNEL_INDEX}

    def dispatch(
        self,
        x: torch.Tensor,
        plan: NvlinkPlan,
        topk_weight: torch.Tensor | None,
        channel: str,
        payload: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        received = self.dispatch_unique(x, plan, topk_weight, channel, payload)
        return self.expand(received, plan, channel)

    def combine(
        self, rows: torch.Tensor, plan: NvlinkPlan, row_weight: torch.Tensor | None, channel: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.sum_rows(rows, plan, row_weight, channel)
        return self.combine_unique(plan, channel, row_weight is not None)

    def dispatch_unique(
        self,
        x: torch.Tensor,
        plan: NvlinkPlan,
        topk_weight: torch.Tensor | None,
        channel: str,
        payload: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        self._check_peers()
        x = aligned(x)
        boxes = self._boxes[channel]
        self._wait_released(channel)
        stride = boxes["inbox_weight"].shape[2]
        if topk_weight is not None and stride != self.layout.topk:
            topk_weight = torch.nn.functional.pad(topk_weight, (0, stride - self.layout.topk))
        copies = self.comm_sms == 0  # then compute SMs pack the outbox
        if copies:
            self._exchange.wait_outbox(CHANNEL_INDEX[channel], self._stream())
        self._exchange.push(
            CHANNEL_INDEX[channel],
            x.data_ptr(),
            address(topk_weight),
            payload == "fp8",
            copies,
            len(x),
            plan.tables.data_ptr(),
            self.num_sms if copies else self.comm_sms,
            self._stream(),
        )
        if copies:
            self._copy(plan, channel, weighted=topk_weight is not None, fp8=payload == "fp8")
        boxes["held"] = True
        weights = None if topk_weight is None else boxes["inbox_weight"][:, :, : self.layout.topk]
        if payload == "fp8":
            return boxes["inbox_fp8"], boxes["inbox_scale"], weights
        return boxes["inbox"], None, weights

    def expand(
        self, received: Received, plan: NvlinkPlan, channel: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        unique, scales, weights = received
        try:
            rows, row_weight = self._row_tensors(plan, weights is not None)
            expert_rows.expand(
                unique,
                plan.expert_rows,
                plan.unique_counts,
                plan.expert_offsets,
                plan.tokens_per_expert,
                rows,
                scales=scales,
                topk_weight=weights,
                row_weight=row_weight,
                num_sms=self.num_sms,
            )
        finally:  # a plan with a bad index raises, and the exchange stays usable
            self.release(channel)
        return rows, row_weight

    def release(self, channel: str) -> None:
        """The receive buffer may be overwritten once the current stream's work is done."""
        boxes = self._boxes[channel]
        boxes["held"], boxes["released"] = False, (None, None)
        if not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self.device)
            boxes["released"] = stream, stream.record_event()

    def sums(self, plan: NvlinkPlan, channel: str) -> torch.Tensor:
        self._check_peers()
        self._exchange.wait_outbox(CHANNEL_INDEX[channel], self._stream())
        return self._boxes[channel]["outbox"]

    def sum_rows(
        self, rows: torch.Tensor, plan: NvlinkPlan, row_weight: torch.Tensor | None, channel: str
    ) -> None:
        expert_rows.sum_per_rank(
            aligned(rows),
            plan.expert_rows,
            plan.unique_counts,
            self.sums(plan, channel),
            row_weight=row_weight,
            sum_weight=None if row_weight is None else self._boxes[channel]["outbox_weight"],
            num_sms=self.num_sms,
        )

    def combine_unique(
        self, plan: NvlinkPlan, channel: str, weighted: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._check_peers()
        y, topk_weight = self._home_tensors(plan, weighted)
        if self.comm_sms == 0:
            boxes = self._boxes[channel]
            self._wait_released(channel)
            self._copy(plan, channel, combine=True, weighted=weighted)
            expert_rows.sum_at_home(
                boxes["inbox"],
                plan.send_rows,
                y,
                topk_idx=plan.topk_idx if weighted else None,
                received_weight=boxes["inbox_weight"] if weighted else None,
                topk_weight=topk_weight,
                num_local_experts=self.layout.num_local_experts,
                num_sms=self.num_sms,
            )
            return y, topk_weight
        self._exchange.pull(
            CHANNEL_INDEX[channel],
            plan.topk_idx.data_ptr(),
            plan.num_tokens,
            plan.tables.data_ptr(),
            y.data_ptr(),
            address(topk_weight),
            self.comm_sms,
            self._stream(),
        )
        return y, topk_weight

    def push_ceiling(self, x: torch.Tensor, rows_per_peer: int) -> None:
        """What the link gives: rows of x to every other rank's receive buffer, and nothing else."""
        self._exchange.push_ceiling(
            x.data_ptr(), len(x), rows_per_peer, self.comm_sms, self._stream()
        )

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        self._boxes = {}
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
        boxes = self._boxes[channel]
        self._exchange.copy(
            CHANNEL_INDEX[channel],
            combine,
            weighted,
            fp8,
            plan.tokens_for_ranks(combine=combine),
            [stream.cuda_stream for stream in boxes["streams"]],
            [event.cuda_event for event in boxes["events"]],
            self._stream(),
        )

    def _wait_released(self, channel: str) -> None:
        boxes = self._boxes[channel]
        if boxes["held"]:
            raise DualPipeError(
                f"the rows of the last dispatch_unique on channel {channel!r} are still held: "
                f"call their release() before the channel's next call"
            )
        # A graph cannot wait for what ran before its capture, nor anybody for an event within one.
        stream, event = boxes["released"]
        current = torch.cuda.current_stream(self.device)
        if stream not in (None, current) and not torch.cuda.is_current_stream_capturing():
            current.wait_event(event)

    def _make_boxes(self, channel: str) -> dict:
        """Views of this rank's part of a channel, and what orders its copies."""
        parts = self._exchange.channel_parts(CHANNEL_INDEX[channel])
        ranks, tokens = self.layout.world_size, self.layout.max_tokens
        views = {name: self._memory.part(first, count) for name, (first, count) in parts.items()}
        fp8_bytes = ranks * tokens * self.hidden
        boxes = {
            "inbox": views["inbox"].view(self.dtype),
            "inbox_fp8": views["inbox"][:fp8_bytes].view(torch.float8_e4m3fn),
            "inbox_scale": views["inbox_scale"].view(torch.float32),
            "inbox_weight": views["inbox_weight"].view(torch.float32),
            "outbox": views["outbox"].view(self.dtype),
            "outbox_weight": views["outbox_weight"].view(torch.float32),
        }
        boxes = {name: view.view(ranks, tokens, -1) for name, view in boxes.items()}
        boxes["inbox_scale"] = boxes["inbox_scale"][:, :, : -(-self.hidden // 128)]
        boxes["held"], boxes["released"] = False, (None, None)
        boxes["streams"] = [torch.cuda.Stream(self.device) for _ in range(2)]  # peers, itself
        boxes["events"] = [torch.cuda.Event() for _ in range(ranks + 1)]
        for event in boxes["events"]:
            event.record()  # torch makes them at their first use
        return boxes
