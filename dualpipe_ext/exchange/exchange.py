"""Dispatch and combine: move tokens to their experts and their results back.

One :class:`Exchange` serves many layers and micro-batches. It owns two independent channels,
"forward" and "backward", so that the dispatch of one micro-batch and the combine of another can be
in flight together, as DualPipe's overlapped pair needs (DeepSeek-V3 report, figures 4 and 5).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ..errors import ExchangeClosedError
from ..ranks.groups import process_group
from ..trace.ranges import named_range
from ..triton_kernels.launch import available
from .options import ExchangeOptions, agree_on_backend
from .plan import Plan, RoutingLayout
from .reference import ReferenceBackend
from .unique_rows import UniqueRows

__all__ = ["CHANNELS", "Exchange"]

CHANNELS = ("forward", "backward")


class Exchange:
    """All-to-all of a Mixture-of-Experts layer over one expert group.

    Letters: T tokens of this rank, H hidden, K experts a token, E experts, P ranks, L = E / P local
    experts, R rows in expert order.

    Args:
        group: a ``ProcessGroup``, a 1-D ``DeviceMesh``, or None for one rank without any group.
        hidden: H, a multiple of 8.
        num_experts: E, divisible by P.
        topk: K ≤ min(E, 32).
        max_tokens: the most tokens a rank brings to one dispatch; the same on every rank.
        dtype: of the rows; NVLink kernels take bfloat16 and float32.
        backend: "nvlink", "reference" or "auto" (nvlink where every rank can run it).
        comm_sms: SMs that communication may take: a count from 1 to half of the GPU's, or a ratio
            of them as a float below 1. Two channels in flight take twice as many. 0 moves rows by
            copy engine, which needs form "unique".
        timeout: seconds a kernel waits for a peer before it gives up.
        device: where the tokens are; default the current CUDA device, else the CPU.
        form: who brings rows into expert order and sums a token's rows before the way home.
            "expert": the communication SMs. "unique": compute kernels on ``num_sms`` SMs, behind
            and before a transfer of unique rows, which takes fewer SMs and can send fp8, and twice
            the peer memory. None: "unique" for ``comm_sms`` up to 16 or an eighth of the GPU's,
            where a layer by itself is up to 13 % faster so, else "expert". Pairs of wide layers
            are faster with it on 8 SMs, not on 16. Results are the same.
        max_rows: the most rows in expert order that may come to a rank, a multiple of 128. Then
            dispatch always gives this many and no call waits for the device, so that all can be
            captured in a CUDA graph; rows past the plan's R are undefined (NVLink) or zero. What
            does not fit raises RowsOverflowError at a later call or :meth:`check`.

    Calls go to the current stream; a plan or tensor made on another stream follows torch's rules
    (order the streams, ``record_stream``). Every rank makes the same calls in the same order on a
    channel; the two channels do not wait for each other. Nothing stays in an exchange's buffers
    between calls: all layers and micro-batches can share one.

    Making one is collective over the group. Peer memory on each rank, NVLink backend, and small
    tables (``peer_bytes`` has the sum)::

        form "expert"  2 channels · max_tokens · H · itemsize · (1 + min(K, P − 1)), if P > 1
        form "unique"  2 channels · max_tokens · H · itemsize · 2 · P

    Raises:
        ValueError, TypeError: an argument is wrong, or ranks disagree on one (on every rank).
    """

    def __init__(
        self,
        group=None,
        *,
        hidden: int,
        num_experts: int,
        topk: int,
        max_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        backend: str = "auto",
        comm_sms: int | float = 16,
        timeout: float = 100.0,
        device: torch.device | str | None = None,
        form: str | None = None,
        max_rows: int | None = None,
    ):
        self.group = process_group(group)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.world_size = 1 if self.group is None else dist.get_world_size(self.group)
        self.device = _resolve_device(device)
        self.hidden, self.num_experts, self.topk = hidden, num_experts, topk
        self.max_tokens, self.dtype, self.timeout = max_tokens, dtype, timeout
        self.max_rows = max_rows
        self._backend, self._comm_sms = None, 0
        options = ExchangeOptions(
            hidden=hidden,
            num_experts=num_experts,
            topk=topk,
            max_tokens=max_tokens,
            dtype=dtype,
            backend=backend,
            form=form or _faster_form(comm_sms),
            form_is_free=form is None,
            max_rows=max_rows,
            timeout=timeout,
        )
        self.backend, self.backend_reason, self.form = agree_on_backend(
            options, self.group, self.device
        )
        if backend == "nvlink":
            available.require(self)
        self.layout = RoutingLayout(self.rank, self.world_size, num_experts, topk, max_tokens)
        if self.backend == "nvlink":
            if self.form == "unique":
                from .nvlink_unique import NvlinkUniqueBackend as Backend
            else:
                from .nvlink import NvlinkBackend as Backend
            self._backend = Backend(
                self.group, self.layout, hidden, dtype, self.device, timeout, max_rows
            )
        else:
            self._backend = ReferenceBackend(self.group, self.layout, hidden, dtype, max_rows)
        self.comm_sms = comm_sms

    @property
    def num_local_experts(self) -> int:
        """L = E / P; this rank owns the experts [rank · L, (rank + 1) · L)."""
        return self.num_experts // self.world_size

    @property
    def comm_sms(self) -> int:
        """SMs that the next call may take; set a count or a ratio. 0 on the reference backend."""
        return self._comm_sms

    @comm_sms.setter
    def comm_sms(self, comm_sms: int | float) -> None:
        self._check_open()
        self._comm_sms = self._count_sms(comm_sms) if self.backend == "nvlink" else 0
        self._backend.comm_sms = self._comm_sms

    @property
    def num_sms(self) -> int | None:
        """SMs of the compute kernels of form "unique"; settable. None where there are none."""
        return getattr(self._backend, "num_sms", None)

    @num_sms.setter
    def num_sms(self, num_sms: int) -> None:
        self._check_open()
        if self.num_sms is not None:
            total = torch.cuda.get_device_properties(self.device).multi_processor_count
            if not isinstance(num_sms, int) or not 1 <= num_sms <= total:
                raise ValueError(f"num_sms={num_sms!r} is outside [1, {total}], this GPU's SMs")
            self._backend.num_sms = num_sms

    @property
    def peer_bytes(self) -> int:
        """Bytes of peer memory that this exchange holds on each rank; 0 without NVLink."""
        return getattr(self._backend, "peer_bytes", 0)

    @property
    def closed(self) -> bool:
        return self._backend is None

    def plan(self, topk_idx: torch.Tensor) -> Plan:
        """Exchange the routing and give every route its row. Collective.

        Args:
            topk_idx: [T, K] int32 in [−1, E), −1 drops a route; T ≤ max_tokens, T may be 0 and may
                differ between ranks.

        Returns:
            The plan, usable for any number of dispatches and combines. Out-of-range indices raise
            IndexError on every rank: here on the reference backend, at ``plan.num_rows`` (which
            dispatch reads) on the NVLink backend.
        """
        self._check_open()
        _check_tensor("topk_idx", topk_idx, torch.int32, self.device)
        if topk_idx.dim() != 2 or topk_idx.shape[1] != self.topk:
            raise ValueError(
                f"topk_idx has shape {list(topk_idx.shape)}, not [T, {self.topk}]: "
                f"pass the {self.topk} experts of every token"
            )
        if topk_idx.shape[0] > self.max_tokens:
            raise ValueError(
                f"{topk_idx.shape[0]} tokens exceed max_tokens={self.max_tokens}: make the "
                f"Exchange with max_tokens={topk_idx.shape[0]} on every rank, or send fewer"
            )
        return self._backend_call("plan", topk_idx.contiguous())

    def dispatch(
        self,
        x: torch.Tensor,
        plan: Plan,
        *,
        channel: str = "forward",
        topk_weight: torch.Tensor | None = None,
        payload: str | None = None,
    ):
        """Send every token to its experts. Collective, differentiable (the backward is a combine).

        Args:
            x: [T, H] in the exchange's dtype.
            plan: from :meth:`plan`, for the same T tokens.
            channel: "forward" or "backward".
            topk_weight: [T, K] fp32, sent along when given.
            payload: "fp8" sends float8_e4m3fn with an fp32 scale for 128 columns, in half the time;
                form "unique" only. The gradient passes straight through the rounding.

        Returns:
            rows [R, H] in expert order, padding rows zero; with topk_weight a pair of these and
            row_weight [R] fp32, padding zero. With ``max_rows`` the first dimension is that.
        """
        self._check_dispatch(x, plan, channel, topk_weight, payload)
        rows, row_weight = _Transfer.apply(x, topk_weight, self, plan, "dispatch", channel, payload)
        return rows if topk_weight is None else (rows, row_weight)

    def combine(
        self,
        rows: torch.Tensor,
        plan: Plan,
        *,
        channel: str = "forward",
        row_weight: torch.Tensor | None = None,
    ):
        """Bring every expert's rows home and sum them. Collective, differentiable.

        Args:
            rows: [R, H] in expert order, in the exchange's dtype; padding rows are not read.
            plan: the plan of the dispatch.
            channel: "forward" or "backward".
            row_weight: [R] fp32 scalars returned route by route when given, such as the gradient
                of the routing weights.

        Returns:
            y [T, H], the sum over a token's rows in fp32, rounded once a rank and once at the end;
            with row_weight a pair of these and [T, K] fp32, zero where a route was dropped.
        """
        self._check_call(plan, channel)
        self._check_combine(rows, plan, row_weight)
        y, topk_weight = _Transfer.apply(rows, row_weight, self, plan, "combine", channel, None)
        return y if row_weight is None else (y, topk_weight)

    def dispatch_unique(
        self,
        x: torch.Tensor,
        plan: Plan,
        *,
        channel: str = "forward",
        topk_weight: torch.Tensor | None = None,
        payload: str | None = None,
    ) -> UniqueRows:
        """Send every token once to each rank that has an expert of it. Form "unique"; no autograd.

        Arguments as in :meth:`dispatch`. The consumer brings rows into expert order with
        :meth:`expand`, or gathers them by ``plan.expert_rows`` and then releases what it got.
        """
        self._check_dispatch(x, plan, channel, topk_weight, payload)
        self._check_unique("dispatch_unique")
        weight = None if topk_weight is None else topk_weight.contiguous()
        rows, scales, weights = self._backend_call(
            "dispatch_unique", x.contiguous(), plan, weight, channel, payload
        )
        backend = self._backend
        return UniqueRows(rows, scales, weights, channel, lambda: backend.release(channel))

    def expand(self, received: UniqueRows, plan: Plan):
        """Bring received rows into expert order on ``num_sms`` SMs, and release them.

        Returns what :meth:`dispatch` would. Not collective: it may run on another stream than the
        dispatch, ordered behind it, such as beside the next transfer.
        """
        self._check_call(plan, received.channel)
        self._check_unique("expand")
        found = received.rows, received.scales, received.topk_weight
        rows, row_weight = self._backend_call("expand", found, plan, received.channel)
        return rows if row_weight is None else (rows, row_weight)

    def sums(self, plan: Plan, *, channel: str = "forward") -> torch.Tensor:
        """Where :meth:`combine_unique` reads: [P, max_tokens, H], to be filled by the caller,
        or by :meth:`sum_rows`.

        Row [p, i], i < ``plan.unique_counts[p]``, takes the sum of this rank's rows of the i-th
        token that rank p sent here, ``plan.expert_rows[p, i]``. Writable from this call on (in
        stream order) until combine_unique.
        """
        self._check_call(plan, channel)
        self._check_unique("sums")
        return self._backend.sums(plan, channel)

    def sum_rows(
        self,
        rows: torch.Tensor,
        plan: Plan,
        *,
        channel: str = "forward",
        row_weight: torch.Tensor | None = None,
    ) -> None:
        """Fill :meth:`sums` from rows [R, H] in expert order, on ``num_sms`` SMs.

        With row_weight [R] fp32 the scalars go along. Not collective; no autograd.
        """
        self._check_call(plan, channel)
        self._check_unique("sum_rows")
        self._check_combine(rows, plan, row_weight)
        row_weight = None if row_weight is None else row_weight.contiguous()
        self._backend_call("sum_rows", rows.contiguous(), plan, row_weight, channel)

    def combine_unique(self, plan: Plan, *, channel: str = "forward", weighted: bool = False):
        """y [T, H]: add up the sums that every rank has for this rank's tokens, in rank order.

        Collective, no autograd; the sums are what :meth:`sums` gave and the caller filled. With
        ``weighted`` a pair of these and the scalars [T, K] that every rank gave :meth:`sum_rows`.
        """
        self._check_call(plan, channel)
        self._check_unique("combine_unique")
        y, topk_weight = self._backend_call("combine_unique", plan, channel, weighted)
        return (y, topk_weight) if weighted else y

    def check(self) -> None:
        """Raise what a finished kernel reported, without waiting for kernels in flight.

        Raises:
            PeerTimeoutError: a peer did not arrive within ``timeout``.
            RowsOverflowError, IndexError: under ``max_rows``, what a plan found since last time.
        """
        self._check_open()
        self._backend.check()

    def close(self) -> None:
        """Wait for this rank's kernels and let go of the peer memory. Safe to call twice."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.backend}, rank {self.rank}/{self.world_size}"
        return (
            f"Exchange({state}, hidden={self.hidden}, num_experts={self.num_experts}, "
            f"topk={self.topk}, max_tokens={self.max_tokens}, dtype={self.dtype}, "
            f"comm_sms={self.comm_sms}, form={self.form!r}, peer memory "
            f"{self.peer_bytes / 2**20:.0f} MiB)"
        )

    @property
    def _weight_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _count_sms(self, comm_sms: int | float) -> int:
        total = torch.cuda.get_device_properties(self.device).multi_processor_count
        count = comm_sms
        if count == 0 and self.form != "unique":
            raise ValueError('comm_sms=0 needs unique rows: make the Exchange with form="unique"')
        if isinstance(comm_sms, float) and 0 < comm_sms < 1:
            count = max(1, round(comm_sms * total))
        # Both channels must fit at once, or two kernels could wait for each other's SMs.
        if not isinstance(count, int) or not 0 <= count <= total // 2:
            raise ValueError(
                f"comm_sms={comm_sms!r} is outside [0, {total // 2}], half of this GPU's {total} "
                f"SMs (a float below 1 is a ratio of them): 8 to 24 fill an NVLink"
            )
        return count

    def _backend_call(self, name: str, *args):
        with named_range(f"dualpipe_ext::{name}"):
            return getattr(self._backend, name)(*args)

    def _check_open(self) -> None:
        if self._backend is None:
            raise ExchangeClosedError("this Exchange is closed: make a new one")

    def _check_call(self, plan: Plan, channel: str) -> None:
        self._check_open()
        if channel not in CHANNELS:
            raise ValueError(f'channel={channel!r}: choose "forward" or "backward"')
        if plan.layout != self.layout:
            raise ValueError(
                f"the plan was made for {plan.layout}, this exchange has {self.layout}: "
                f"call plan() of an exchange with the same sizes"
            )

    def _check_dispatch(self, x, plan: Plan, channel: str, topk_weight, payload) -> None:
        self._check_call(plan, channel)
        self._check_rows("x", x, plan.num_tokens, "T")
        if topk_weight is not None:
            _check_tensor("topk_weight", topk_weight, self._weight_dtype, self.device)
            _check_shape("topk_weight", topk_weight, [plan.num_tokens, self.topk], "[T, K]")
        if payload is None:
            return
        if payload != "fp8":
            raise ValueError(f'payload={payload!r}: choose None (as x is) or "fp8"')
        self._check_unique('payload="fp8"')
        if self.dtype != torch.bfloat16 or self.hidden % 16:
            raise ValueError(
                f"fp8 rows are made from bfloat16 with H a multiple of 16, not {self.dtype} with "
                f"H={self.hidden}: leave payload out"
            )

    def _check_combine(self, rows, plan: Plan, row_weight) -> None:
        self._check_rows("rows", rows, plan.num_rows, "R")
        if row_weight is not None:
            _check_tensor("row_weight", row_weight, self._weight_dtype, self.device)
            _check_shape("row_weight", row_weight, [plan.num_rows], "[R]")

    def _check_unique(self, what: str) -> None:
        if self.form != "unique":
            raise ValueError(
                f'{what} needs unique rows: make the Exchange with form="unique", not {self.form!r}'
            )

    def _check_rows(self, name: str, tensor: torch.Tensor, count: int, letter: str) -> None:
        _check_tensor(name, tensor, self.dtype, self.device)
        _check_shape(name, tensor, [count, self.hidden], f"[{letter}, H]")


class _Transfer(torch.autograd.Function):
    """A dispatch or a combine of rows, and of a scalar a route; each is the other's transpose."""

    @staticmethod
    def forward(ctx, rows, weight, exchange, plan, operation, channel, payload):
        ctx.exchange, ctx.plan, ctx.weighted = exchange, plan, weight is not None
        ctx.transpose = {"dispatch": "combine", "combine": "dispatch"}[operation]
        weight = None if weight is None else weight.contiguous()
        extra = () if payload is None else (payload,)
        return exchange._backend_call(operation, rows.contiguous(), plan, weight, channel, *extra)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows, d_weight):
        ctx.exchange._check_open()
        d_weight = d_weight.contiguous() if ctx.weighted else None
        gradients = ctx.exchange._backend_call(
            ctx.transpose, d_rows.contiguous(), ctx.plan, d_weight, "backward"
        )
        return *gradients, None, None, None, None, None


def _faster_form(comm_sms: int | float) -> str:
    """Of forward and backward of a layer, by docs/MEASURED.md."""
    most = 0.125 if isinstance(comm_sms, float) else 16
    few = isinstance(comm_sms, (int, float)) and comm_sms <= most
    return "unique" if few else "expert"


def _resolve_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _check_tensor(name: str, tensor, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: pass a torch.Tensor")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, the exchange takes {dtype}: use .to({dtype})")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the exchange on {device}: move it there")


def _check_shape(name: str, tensor: torch.Tensor, expected: list[int], letters: str) -> None:
    if list(tensor.shape) != expected:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, not {letters} = {expected}: "
            f"pass the tensor that belongs to this plan"
        )
