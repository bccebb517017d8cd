"""The exchange on NVLink: our kernels over peer memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist

from . import _C
from .backend import MAX_RANKS
from .errors import DualPipeError, PeerTimeoutError, RowsOverflowError
from .peer_memory import PeerMemory
from .routing import Plan, RoutingLayout, bad_index_error
from .triton_kernels import expert_rows

__all__ = ["NvlinkBackend", "NvlinkPlan"]

_CHANNEL_INDEX = {"forward": 0, "backward": 1}
# Operation and phase numbers of csrc/exchange.h, in words: (what, channel) and what was awaited.
_OPERATIONS = (
    ("plan", "forward"),
    ("dispatch", "forward"),
    ("dispatch", "backward"),
    ("combine", "forward"),
    ("combine", "backward"),
)
_PHASES = {
    1: "waiting for it to finish the call before",
    2: "waiting for its data",
    3: "waiting for it to begin the call",
}
PLAN_SMS = 16  # for tens of µs, where copy engines do the rest
_ROWS_NEEDED, _BAD_INDEX = 6, 7  # words of the fault report


@dataclass(frozen=True, eq=False)
class NvlinkPlan(Plan):
    """A plan whose sizes the host learns late, or never, under ``max_rows``.

    Attributes:
        tables: int32, everything the kernels read, the public tensors among it.
        header: int32, pinned: R, then the first bad index (found, rank, token, k, value), then
            the tokens sent to each of 8 ranks and received from each; None under ``max_rows``.
        header_ready: recorded behind the kernel that writes the header.
        check: raises what a kernel reported.
    """

    tables: torch.Tensor
    header: torch.Tensor | None
    header_ready: torch.cuda.Event | None
    check: Callable[[], None]
    max_rows: int | None

    @cached_property
    def num_rows(self) -> int:
        if self.header is None:
            return self.max_rows
        self.header_ready.synchronize()
        self.check()
        rows, found, rank, token, k, value = self.header[:6].tolist()
        if found:
            raise bad_index_error(rank, token, k, value, self.layout.num_experts)
        return rows

    def tokens_for_ranks(self, *, combine: bool) -> list[int]:
        """[P] rows this rank sends to each in a dispatch or a combine; the most if unknown."""
        if self.header is None:
            return [self.layout.max_tokens] * self.layout.world_size
        self.header_ready.synchronize()
        first = 6 + (MAX_RANKS if combine else 0)
        return self.header[first : first + self.layout.world_size].tolist()


class NvlinkBackend:
    """Plan, dispatch and combine as CUDA kernels on the current stream."""

    name = "nvlink"

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        layout: RoutingLayout,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        timeout: float,
        unique: bool = False,
        max_rows: int | None = None,
    ):
        self.layout, self.device, self.dtype, self.hidden = layout, device, dtype, hidden
        self.timeout, self.unique, self.max_rows = timeout, unique, max_rows
        # Set by the Exchange, and again by its users.
        self.comm_sms = 1
        self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._fault = torch.zeros(_C.FAULT_WORDS, dtype=torch.int64).pin_memory()
        self._unread_header = torch.zeros(_C.HEADER_WORDS, dtype=torch.int32, device=device)
        sizes = dict(
            rank=layout.rank,
            ranks=layout.world_size,
            device=device.index,
            hidden=hidden,
            element_bytes=dtype.itemsize,
            experts=layout.num_experts,
            topk=layout.topk,
            max_tokens=layout.max_tokens,
            max_rows=max_rows or 0,
            unique=unique,
            timeout=timeout,
            fault=self._fault.data_ptr(),
        )
        nbytes = _C.Exchange(**sizes, peers=[]).symmetric_bytes
        self._memory = PeerMemory(group, nbytes, device)
        self.peer_bytes = nbytes
        self._exchange = _C.Exchange(**sizes, peers=self._memory.pointers)
        self._parts = self._exchange.plan_parts()
        if unique:
            self._boxes = {name: self._make_boxes(name) for name in _CHANNEL_INDEX}

    def plan(self, topk_idx: torch.Tensor) -> NvlinkPlan:
        self.check()
        tables = torch.empty(self._exchange.plan_elements, dtype=torch.int32, device=self.device)
        # Written by the kernel itself: a copy behind it would cost more than the two kernels' gaps.
        header = self._unread_header
        if self.max_rows is None:
            header = torch.empty(_C.HEADER_WORDS, dtype=torch.int32, pin_memory=True)
        self._exchange.plan(
            topk_idx.data_ptr(),
            len(topk_idx),
            tables.data_ptr(),
            header.data_ptr(),
            self.comm_sms or PLAN_SMS,
            self._stream(),
        )
        header_ready = None
        if self.max_rows is None:
            header_ready = torch.cuda.Event()
            header_ready.record()
        layout = self.layout
        ranks, topk = layout.world_size, layout.topk
        slots = self._part(tables, "slots").view(ranks, layout.max_tokens, -1)
        arrived = self._part(tables, "expert_rows").view(ranks, layout.max_tokens, -1)
        send_rows = self._part(tables, "send_rows").view(layout.max_tokens, -1)
        return NvlinkPlan(
            layout=layout,
            topk_idx=topk_idx,
            tokens_per_expert=self._part(tables, "tokens_per_expert"),
            expert_offsets=self._part(tables, "expert_offsets"),
            slots=slots[:, :, :topk],
            send_rows=send_rows[: len(topk_idx), :ranks],
            unique_counts=self._part(tables, "unique_counts"),
            expert_rows=arrived[:, :, :topk],
            tables=tables,
            header=header if self.max_rows is None else None,
            header_ready=header_ready,
            check=self.check,
            max_rows=self.max_rows,
        )

    def dispatch(
        self,
        x: torch.Tensor,
        plan: NvlinkPlan,
        topk_weight: torch.Tensor | None,
        channel: str,
        payload: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # What can go ahead without R is queued first, and covers the host's wait for it.
        self._check_peers()
        x, index = _aligned(x), _CHANNEL_INDEX[channel]
        if self.unique:
            unique, scales, weights = self._send(x, plan, topk_weight, channel, payload)
        else:
            self._exchange.stage(index, x.data_ptr(), _address(topk_weight), len(x), self._stream())
        rows = torch.empty(plan.num_rows, self.hidden, dtype=self.dtype, device=self.device)
        row_weight = None
        if topk_weight is not None:
            row_weight = torch.empty(plan.num_rows, dtype=torch.float32, device=self.device)
        if self.unique:
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
            return rows, row_weight
        self._exchange.dispatch(
            index,
            x.data_ptr(),
            _address(topk_weight),
            len(x),
            plan.tables.data_ptr(),
            rows.data_ptr(),
            _address(row_weight),
            self.comm_sms,
            self._stream(),
        )
        return rows, row_weight

    def combine(
        self, rows: torch.Tensor, plan: NvlinkPlan, row_weight: torch.Tensor | None, channel: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._check_peers()
        rows = _aligned(rows)
        if self.unique:
            boxes = self._boxes[channel]
            sums = self.sums(plan, channel)
            expert_rows.sum_per_rank(
                rows,
                plan.expert_rows,
                plan.unique_counts,
                sums,
                row_weight=row_weight,
                sum_weight=boxes["outbox_weight"] if row_weight is not None else None,
                num_sms=self.num_sms,
            )
            return self._bring_home(plan, channel, row_weight is not None)
        y, topk_weight = self._home_tensors(plan, row_weight is not None)
        self._exchange.combine(
            _CHANNEL_INDEX[channel],
            rows.data_ptr(),
            _address(row_weight),
            plan.topk_idx.data_ptr(),
            plan.num_tokens,
            plan.tables.data_ptr(),
            y.data_ptr(),
            _address(topk_weight),
            self.comm_sms,
            self._stream(),
        )
        return y, topk_weight

    def dispatch_unique(
        self,
        x: torch.Tensor,
        plan: NvlinkPlan,
        topk_weight: torch.Tensor | None,
        channel: str,
        payload: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        self._check_peers()
        received = self._send(_aligned(x), plan, topk_weight, channel, payload)
        self._boxes[channel]["held"] = True
        return received

    def release(self, channel: str) -> None:
        """The receive buffer may be overwritten once the current stream's work is done."""
        boxes = self._boxes[channel]
        stream = torch.cuda.current_stream(self.device)
        boxes["held"], boxes["released"] = False, (stream, stream.record_event())

    def sums(self, plan: NvlinkPlan, channel: str) -> torch.Tensor:
        self._check_peers()
        self._exchange.wait_outbox(_CHANNEL_INDEX[channel], self._stream())
        return self._boxes[channel]["outbox"]

    def combine_unique(self, plan: NvlinkPlan, channel: str) -> torch.Tensor:
        self._check_peers()
        return self._bring_home(plan, channel, False)[0]

    def push_ceiling(self, x: torch.Tensor, rows_per_peer: int) -> None:
        """What the link gives: rows of x to every other rank's receive buffer, and nothing else."""
        self._exchange.push_ceiling(
            x.data_ptr(), len(x), rows_per_peer, self.comm_sms, self._stream()
        )

    def _send(
        self,
        x: torch.Tensor,
        plan: NvlinkPlan,
        topk_weight: torch.Tensor | None,
        channel: str,
        payload: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Unique rows into the inboxes: (rows, scales, weights) of this rank's own."""
        boxes = self._boxes[channel]
        self._wait_released(channel)
        stride = boxes["inbox_weight"].shape[2]
        if topk_weight is not None and stride != self.layout.topk:
            topk_weight = torch.nn.functional.pad(topk_weight, (0, stride - self.layout.topk))
        copies = self.comm_sms == 0  # then compute SMs pack the outbox
        if copies:
            self._exchange.wait_outbox(_CHANNEL_INDEX[channel], self._stream())
        self._exchange.push(
            _CHANNEL_INDEX[channel],
            x.data_ptr(),
            _address(topk_weight),
            payload == "fp8",
            copies,
            len(x),
            plan.tables.data_ptr(),
            self.num_sms if copies else self.comm_sms,
            self._stream(),
        )
        if copies:
            self._copy(plan, channel, weighted=topk_weight is not None, fp8=payload == "fp8")
        weights = None if topk_weight is None else boxes["inbox_weight"][:, :, : self.layout.topk]
        if payload == "fp8":
            return boxes["inbox_fp8"], boxes["inbox_scale"], weights
        return boxes["inbox"], None, weights

    def _bring_home(
        self, plan: NvlinkPlan, channel: str, weighted: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sums in all outboxes, added up."""
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
            _CHANNEL_INDEX[channel],
            plan.topk_idx.data_ptr(),
            plan.num_tokens,
            plan.tables.data_ptr(),
            y.data_ptr(),
            _address(topk_weight),
            self.comm_sms,
            self._stream(),
        )
        return y, topk_weight

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
            _CHANNEL_INDEX[channel],
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
        stream, event = boxes["released"]
        current = torch.cuda.current_stream(self.device)
        if stream is not None and stream != current:
            current.wait_event(event)

    def _home_tensors(
        self, plan: NvlinkPlan, weighted: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens = plan.num_tokens
        y = torch.empty(tokens, self.hidden, dtype=self.dtype, device=self.device)
        if not weighted:
            return y, None
        return y, torch.empty(tokens, self.layout.topk, dtype=torch.float32, device=self.device)

    def _make_boxes(self, channel: str) -> dict:
        """Views of this rank's part of a channel, and what orders its copies."""
        parts = self._exchange.channel_parts(_CHANNEL_INDEX[channel])
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
        boxes["streams"] = [torch.cuda.Stream(self.device) for _ in range(ranks)]
        boxes["events"] = [torch.cuda.Event() for _ in range(ranks + 1)]
        for event in boxes["events"]:
            event.record()  # torch makes them at their first use
        return boxes

    def check(self) -> None:
        """Raise what kernels reported: a lost peer, or what a plan under max_rows found."""
        self._check_peers()
        rows, bad, *index = self._fault[_ROWS_NEEDED:].tolist()
        if rows:
            self._fault[_ROWS_NEEDED] = 0
            raise RowsOverflowError(rank=self.layout.rank, needed=rows, max_rows=self.max_rows)
        if bad:
            self._fault[_BAD_INDEX] = 0
            raise bad_index_error(*index, self.layout.num_experts)

    def _check_peers(self) -> None:
        # In the middle of a layer nothing else is raised: the other ranks would be left waiting.
        raised, operation, phase, peer, expected, seen = self._fault[:_ROWS_NEEDED].tolist()
        if raised:
            what, channel = _OPERATIONS[operation]
            raise PeerTimeoutError(
                rank=self.layout.rank,
                peer=peer,
                channel=channel,
                phase=f"{what}, {_PHASES[phase]}",
                expected=expected,
                seen=seen,
                timeout=self.timeout,
            )

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        self._boxes = {}
        self._memory.close()

    def _part(self, tables: torch.Tensor, name: str) -> torch.Tensor:
        first, count = self._parts[name]
        return tables[first : first + count]

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at an address that 16-byte accesses can use; seldom a copy."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
