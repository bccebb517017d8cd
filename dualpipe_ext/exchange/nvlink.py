"""What both forms of the exchange on NVLink share: peer memory, the plan, faults of kernels.

nvlink_expert.py and nvlink_unique.py move the rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from .. import _C
from ..compat import current_raw_stream
from ..errors import PeerTimeoutError, RowsOverflowError
from ..ops.operator import device_facts
from ..ranks.peer_memory import PeerMemory
from .plan import Plan, RoutingLayout, bad_index_error

__all__ = ["CHANNEL_INDEX", "NvlinkBackend", "NvlinkPlan", "address"]

CHANNEL_INDEX = {"forward": 0, "backward": 1}
PLAN_SMS = 16  # for tens of µs, where copy engines do the rest


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
            assert self.max_rows is not None
            return self.max_rows
        assert self.header_ready is not None
        self.header_ready.synchronize()
        self.check()
        rows: int
        rows, found, rank, token, k, value = self.header[:6].tolist()
        if found:
            raise bad_index_error(rank, token, k, value, self.layout.num_experts)
        return rows

    def tokens_for_ranks(self, *, combine: bool) -> list[int]:
        """[P] rows this rank sends to each in a dispatch or a combine; the most if unknown."""
        if self.header is None:
            return [self.layout.max_tokens] * self.layout.world_size
        assert self.header_ready is not None
        self.header_ready.synchronize()
        first = 6 + (_C.MAX_RANKS if combine else 0)
        tokens: list[int] = self.header[first : first + self.layout.world_size].tolist()
        return tokens


class NvlinkBackend:
    """The plan as CUDA kernels on the current stream. A form adds the four calls of `Backend`."""

    name = "nvlink"
    unique: bool  # the form

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        layout: RoutingLayout,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        timeout: float,
        max_rows: int | None = None,
    ):
        self.layout, self.device, self.dtype, self.hidden = layout, device, dtype, hidden
        self.timeout, self.max_rows = timeout, max_rows
        self.comm_sms = 1  # set by the Exchange, and again by its users
        self._all_sms = device_facts(device)[0]
        self._fault = torch.zeros(_C.FAULT_WORDS, dtype=torch.int64).pin_memory()
        # Read before every call: 5 us through torch.
        self._words = (ctypes.c_int64 * _C.FAULT_WORDS).from_address(self._fault.data_ptr())
        self._unread_header = torch.zeros(_C.HEADER_WORDS, dtype=torch.int32, device=device)
        sizes: dict[str, Any] = dict(
            rank=layout.rank,
            ranks=layout.world_size,
            device=device.index,
            hidden=hidden,
            element_bytes=dtype.itemsize,
            experts=layout.num_experts,
            topk=layout.topk,
            max_tokens=layout.max_tokens,
            max_rows=max_rows or 0,
            unique=self.unique,
            timeout=timeout,
            fault=self._fault.data_ptr(),
        )
        nbytes = _C.Exchange(**sizes, peers=[]).symmetric_bytes
        self.memory = PeerMemory(group, nbytes, device)
        self.peer_bytes = nbytes
        self.kernels = _C.Exchange(**sizes, peers=self.memory.pointers)
        self._parts = self.kernels.plan_parts()

    def plan(self, topk_idx: torch.Tensor) -> NvlinkPlan:
        self.check()
        tables = torch.empty(self.kernels.plan_elements, dtype=torch.int32, device=self.device)
        # Written by the kernel itself: a copy behind it would cost more than the two kernels' gaps.
        header = self._unread_header
        if self.max_rows is None:
            header = torch.empty(_C.HEADER_WORDS, dtype=torch.int32, pin_memory=True)
        self.kernels.plan(
            topk_idx.data_ptr(),
            len(topk_idx),
            tables.data_ptr(),
            header.data_ptr(),
            self.comm_sms or PLAN_SMS,
            self.stream(),
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

    def row_tensors(
        self, plan: NvlinkPlan, weighted: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Memory for rows in expert order and, if weighted, a scalar each; here the host waits."""
        rows = torch.empty(plan.num_rows, self.hidden, dtype=self.dtype, device=self.device)
        if not weighted:
            return rows, None
        return rows, torch.empty(plan.num_rows, dtype=torch.float32, device=self.device)

    def home_tensors(
        self, plan: NvlinkPlan, weighted: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Memory for y [T, H] and, if weighted, a scalar a route."""
        tokens = plan.num_tokens
        y = torch.empty(tokens, self.hidden, dtype=self.dtype, device=self.device)
        if not weighted:
            return y, None
        return y, torch.empty(tokens, self.layout.topk, dtype=torch.float32, device=self.device)

    def check(self) -> None:
        """Raise what kernels reported: a lost peer, or what a plan under max_rows found."""
        self.check_peers()
        rows, bad, rank, token, k, value = self._words[_C.FAULT_ROWS_NEEDED :]
        if rows:
            self._words[_C.FAULT_ROWS_NEEDED] = 0
            assert self.max_rows is not None  # else kernels report none
            raise RowsOverflowError(rank=self.layout.rank, needed=rows, max_rows=self.max_rows)
        if bad:
            self._words[_C.FAULT_BAD_INDEX] = 0
            raise bad_index_error(rank, token, k, value, self.layout.num_experts)

    def check_peers(self) -> None:
        """Raise what a wait for a peer reported."""
        # In the middle of a layer nothing else is raised: the other ranks would be left waiting.
        if self._words[0]:
            _, operation, phase, peer, expected, seen = self._words[: _C.FAULT_ROWS_NEEDED]
            what, channel = _C.OPERATIONS[operation]
            raise PeerTimeoutError(
                rank=self.layout.rank,
                peer=peer,
                channel=channel,
                phase=f"{what}, {_C.PHASES[phase]}",
                expected=expected,
                seen=seen,
                timeout=self.timeout,
            )

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        self.memory.close()

    def _part(self, tables: torch.Tensor, name: str) -> torch.Tensor:
        first, count = self._parts[name]
        return tables[first : first + count]

    def stream(self) -> int:
        """The address of the current stream."""
        return current_raw_stream(self.device.index)


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
