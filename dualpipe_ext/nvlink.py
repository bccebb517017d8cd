"""The exchange on NVLink: our kernels over peer memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist

from . import _C
from .errors import PeerTimeoutError
from .peer_memory import PeerMemory
from .routing import Plan, RoutingLayout, bad_index_error

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
_PHASES = {1: "waiting for it to finish the call before", 2: "waiting for its data"}


@dataclass(frozen=True, eq=False)
class NvlinkPlan(Plan):
    """A plan whose sizes the host learns late.

    Attributes:
        tables: int32, everything the kernels read, the public tensors among it.
        header: [6] int32, pinned: R, then the first bad index (found, rank, token, k, value).
        header_ready: recorded after the copy of the header.
        check: raises what a kernel reported.
    """

    tables: torch.Tensor
    header: torch.Tensor
    header_ready: torch.cuda.Event
    check: Callable[[], None]

    @cached_property
    def num_rows(self) -> int:
        self.header_ready.synchronize()
        self.check()
        rows, found, rank, token, k, value = self.header.tolist()
        if found:
            raise bad_index_error(rank, token, k, value, self.layout.num_experts)
        return rows


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
    ):
        self.layout, self.device, self.dtype, self.hidden = layout, device, dtype, hidden
        self.timeout = timeout
        self.comm_sms = 1  # set by the Exchange, and again by its users
        self._fault = torch.zeros(_C.FAULT_WORDS, dtype=torch.int64).pin_memory()
        sizes = dict(
            rank=layout.rank,
            ranks=layout.world_size,
            device=device.index,
            hidden=hidden,
            element_bytes=dtype.itemsize,
            experts=layout.num_experts,
            topk=layout.topk,
            max_tokens=layout.max_tokens,
            timeout=timeout,
            fault=self._fault.data_ptr(),
        )
        nbytes = _C.Exchange(**sizes, peers=[]).symmetric_bytes
        self._memory = PeerMemory(group, nbytes, device)
        self._exchange = _C.Exchange(**sizes, peers=self._memory.pointers)
        self._parts = self._exchange.plan_parts()

    def plan(self, topk_idx: torch.Tensor) -> NvlinkPlan:
        self.check()
        tables = torch.empty(self._exchange.plan_elements, dtype=torch.int32, device=self.device)
        self._exchange.plan(
            topk_idx.data_ptr(), len(topk_idx), tables.data_ptr(), self.comm_sms, self._stream()
        )
        header = torch.empty(6, dtype=torch.int32, pin_memory=True)
        header.copy_(self._part(tables, "header"), non_blocking=True)
        header_ready = torch.cuda.Event()
        header_ready.record()
        layout = self.layout
        slots = self._part(tables, "slots").view(layout.world_size, layout.max_tokens, -1)
        return NvlinkPlan(
            layout=layout,
            topk_idx=topk_idx,
            tokens_per_expert=self._part(tables, "tokens_per_expert"),
            expert_offsets=self._part(tables, "expert_offsets"),
            slots=slots[:, :, : layout.topk],
            tables=tables,
            header=header,
            header_ready=header_ready,
            check=self.check,
        )

    def dispatch(
        self, x: torch.Tensor, plan: NvlinkPlan, topk_weight: torch.Tensor | None, channel: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.check()
        x = _aligned(x)
        rows = torch.empty(plan.num_rows, self.hidden, dtype=self.dtype, device=self.device)
        row_weight = None
        if topk_weight is not None:
            row_weight = torch.empty(plan.num_rows, dtype=torch.float32, device=self.device)
        self._exchange.dispatch(
            _CHANNEL_INDEX[channel],
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
        self.check()
        rows = _aligned(rows)
        tokens = plan.num_tokens
        y = torch.empty(tokens, self.hidden, dtype=self.dtype, device=self.device)
        topk_weight = None
        if row_weight is not None:
            topk_weight = torch.empty(
                tokens, self.layout.topk, dtype=torch.float32, device=self.device
            )
        self._exchange.combine(
            _CHANNEL_INDEX[channel],
            rows.data_ptr(),
            _address(row_weight),
            plan.topk_idx.data_ptr(),
            tokens,
            plan.tables.data_ptr(),
            y.data_ptr(),
            _address(topk_weight),
            self.comm_sms,
            self._stream(),
        )
        return y, topk_weight

    def check(self) -> None:
        raised, operation, phase, peer, expected, seen = self._fault.tolist()
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
