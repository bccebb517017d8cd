"""Dispatch and combine: move tokens to their experts and their results back.

One :class:`Exchange` serves many layers and micro-batches. It owns two independent channels,
"forward" and "backward", so that the dispatch of one micro-batch and the combine of another can be
in flight together, as DualPipe's overlapped pair needs (DeepSeek-V3 report, figures 4 and 5).
"""

from __future__ import annotations

from typing import Any, TypeVar, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ExchangeClosedError
from ..ops.operator import device_facts, wide
from ..ranks.groups import Group, process_group
from ..trace.ranges import named_range
from ..triton_kernels.launch import available
from .backend import Arrival, Backend, Departure, Weighted
from .options import ExchangeOptions, agree_on_backend
from .plan import Plan, RoutingLayout
from .reference import ReferenceBackend

__all__ = ["CHANNELS", "Exchange"]

CHANNELS = ("forward", "backward")
Pair = tuple[Tensor, Tensor]
Result = TypeVar("Result")


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
            "expert": the communication SMs. "unique": compute kernels on ``num_sms`` SMs, after and
            before a transfer of unique rows, which takes fewer SMs and can send fp8, and twice
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
        group: Group = None,
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
    ) -> None:
        self.group = process_group(group)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.world_size = 1 if self.group is None else dist.get_world_size(self.group)
        self.device = _resolve_device(device)
        self.hidden, self.num_experts, self.topk = hidden, num_experts, topk
        self.max_tokens, self.dtype, self.timeout = max_tokens, dtype, timeout
        self.max_rows = max_rows
        self._backend: Backend[Any] | None = None
        self._comm_sms = 0
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
        self._backend = self._open()
        self.comm_sms = comm_sms

    def _open(self) -> Backend[Any]:
        sizes = self.group, self.layout, self.hidden, self.dtype
        if self.backend == "reference":
            return ReferenceBackend(*sizes, self.max_rows, unique=self.form == "unique")
        # Not before: a package without its CUDA kernels has neither.
        from .nvlink_expert import NvlinkExpertBackend
        from .nvlink_unique import NvlinkUniqueBackend

        kind = NvlinkUniqueBackend if self.form == "unique" else NvlinkExpertBackend
        return kind(*sizes, self.device, self.timeout, self.max_rows)

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
        backend = self._opened()
        self._comm_sms = self._count_sms(comm_sms) if self.backend == "nvlink" else 0
        backend.comm_sms = self._comm_sms

    @property
    def peer_bytes(self) -> int:
        """Bytes of peer memory that this exchange holds on each rank; 0 without NVLink."""
        return 0 if self._backend is None else self._backend.peer_bytes

    @property
    def closed(self) -> bool:
        return self._backend is None

    def plan(self, topk_idx: Tensor) -> Plan:
        """Exchange the routing and give every route its row. Collective.

        Args:
            topk_idx: [T, K] int32 in [−1, E), −1 drops a route; T ≤ max_tokens, T may be 0 and may
                differ between ranks.

        Returns:
            The plan, usable for any number of dispatches and combines. Out-of-range indices raise
            IndexError on every rank: here on the reference backend, at ``plan.num_rows`` (which
            dispatch reads) on the NVLink backend.
        """
        backend = self._opened()
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
        with named_range("dualpipe_ext::plan"):
            plan: Plan = backend.plan(topk_idx.contiguous())
            return plan

    # ---- With autograd ----

    @overload
    def dispatch(
        self,
        x: Tensor,
        plan: Plan,
        *,
        channel: str = ...,
        topk_weight: None = ...,
        payload: str | None = ...,
        num_sms: int | None = ...,
    ) -> Tensor: ...
    @overload
    def dispatch(
        self,
        x: Tensor,
        plan: Plan,
        *,
        channel: str = ...,
        topk_weight: Tensor,
        payload: str | None = ...,
        num_sms: int | None = ...,
    ) -> Pair: ...
    def dispatch(
        self,
        x: Tensor,
        plan: Plan,
        *,
        channel: str = "forward",
        topk_weight: Tensor | None = None,
        payload: str | None = None,
        num_sms: int | None = None,
    ) -> Tensor | Pair:
        """Send every token to its experts. Collective, differentiable (the backward is a combine).

        Args:
            x: [T, H] in the exchange's dtype.
            plan: from :meth:`plan`, for the same T tokens.
            channel: "forward" or "backward".
            topk_weight: [T, K] fp32, sent along when given.
            payload: "fp8" sends float8_e4m3fn with an fp32 scale for 128 columns, in half the time;
                form "unique" only. The gradient passes straight through the rounding.
            num_sms: SMs of the compute kernels that form "unique" has, here and in the backward;
                None: all.

        Returns:
            rows [R, H] in expert order, padding rows zero; with topk_weight a pair of these and
            row_weight [R] fp32, padding zero. With ``max_rows`` the first dimension is that.
        """
        self._check_dispatch(x, plan, channel, topk_weight, payload)
        self._check_num_sms(num_sms)
        how = self, plan, channel, payload, num_sms
        rows, row_weight = _Dispatch.apply(x, topk_weight, *how)
        return rows if topk_weight is None else (rows, row_weight)

    @overload
    def combine(
        self,
        rows: Tensor,
        plan: Plan,
        *,
        channel: str = ...,
        row_weight: None = ...,
        num_sms: int | None = ...,
    ) -> Tensor: ...
    @overload
    def combine(
        self,
        rows: Tensor,
        plan: Plan,
        *,
        channel: str = ...,
        row_weight: Tensor,
        num_sms: int | None = ...,
    ) -> Pair: ...
    def combine(
        self,
        rows: Tensor,
        plan: Plan,
        *,
        channel: str = "forward",
        row_weight: Tensor | None = None,
        num_sms: int | None = None,
    ) -> Tensor | Pair:
        """Bring every expert's rows home and sum them. Collective, differentiable.

        Args:
            rows: [R, H] in expert order, in the exchange's dtype; padding rows are not read.
            plan: the plan of the dispatch.
            channel: "forward" or "backward".
            row_weight: [R] fp32 scalars returned route by route when given, such as the gradient
                of the routing weights.
            num_sms: as in :meth:`dispatch`.

        Returns:
            y [T, H], the sum over a token's rows in fp32, rounded once a rank and once at the end;
            with row_weight a pair of these and [T, K] fp32, zero where a route was dropped.
        """
        self._check_call(plan, channel)
        self._check_combine(rows, plan, row_weight)
        self._check_num_sms(num_sms)
        y, topk_weight = _Combine.apply(rows, row_weight, self, plan, channel, num_sms)
        return y if row_weight is None else (y, topk_weight)

    # ---- The four calls, without autograd, for schedulers ----

    @overload
    def send(
        self,
        x: Tensor,
        plan: Plan,
        *,
        channel: str = ...,
        topk_weight: None = ...,
        payload: str | None = ...,
        num_sms: int | None = ...,
    ) -> Arrival[Tensor]: ...
    @overload
    def send(
        self,
        x: Tensor,
        plan: Plan,
        *,
        channel: str = ...,
        topk_weight: Tensor,
        payload: str | None = ...,
        num_sms: int | None = ...,
    ) -> Arrival[Pair]: ...
    def send(
        self,
        x: Tensor,
        plan: Plan,
        *,
        channel: str = "forward",
        topk_weight: Tensor | None = None,
        payload: str | None = None,
        num_sms: int | None = None,
    ) -> Arrival[Any]:
        """The communication of a dispatch, to be followed by :meth:`arrive`. Collective.

        Arguments as in :meth:`dispatch`; `num_sms` counts where copy engines communicate.

        In form "unique" the result is :class:`~dualpipe_ext.exchange.backend.UniqueRows`, which a
        caller may also gather from by ``plan.expert_rows`` and then release.
        """
        self._check_dispatch(x, plan, channel, topk_weight, payload)
        self._check_num_sms(num_sms)
        weight = None if topk_weight is None else topk_weight.contiguous()
        return self._send(x.contiguous(), plan, weight, channel, payload, num_sms)

    def arrive(self, arrival: Arrival[Result], plan: Plan, *, num_sms: int | None = None) -> Result:
        """Rows in expert order of what :meth:`send` brought, which it releases.

        Returns what :meth:`dispatch` would. Not collective: it may run on another stream than the
        send, ordered behind it, such as beside the next transfer. Form "unique" computes on
        `num_sms` SMs, form "expert" has nothing to do.
        """
        self._check_call(plan, arrival.channel)
        self._check_num_sms(num_sms)
        rows, row_weight = self._arrive(arrival, plan, num_sms)
        return cast(Result, rows if row_weight is None else (rows, row_weight))

    @overload
    def leave(
        self,
        rows: Tensor | None,
        plan: Plan,
        *,
        channel: str = ...,
        row_weight: None = ...,
        num_sms: int | None = ...,
    ) -> Departure[Tensor]: ...
    @overload
    def leave(
        self,
        rows: Tensor | None,
        plan: Plan,
        *,
        channel: str = ...,
        row_weight: Tensor,
        num_sms: int | None = ...,
    ) -> Departure[Pair]: ...
    def leave(
        self,
        rows: Tensor | None,
        plan: Plan,
        *,
        channel: str = "forward",
        row_weight: Tensor | None = None,
        num_sms: int | None = None,
    ) -> Departure[Any]:
        """Make rows [R, H] in expert order ready for :meth:`fetch`. Not collective.

        Form "unique" sums a token's rows on `num_sms` SMs, form "expert" has nothing to do. With
        row_weight [R] fp32 the scalars go along. ``rows=None`` (form "unique") leaves the sums to
        the caller, who fills ``Departure.sums`` in stream order before the fetch.
        """
        self._check_call(plan, channel)
        self._check_num_sms(num_sms)
        if rows is None:
            self._check_unique("leave(None)")
            if row_weight is not None:
                raise ValueError("leave(None) takes no row_weight: pass rows with it")
        else:
            self._check_combine(rows, plan, row_weight)
            rows = rows.contiguous()
        row_weight = None if row_weight is None else row_weight.contiguous()
        return self._leave(rows, plan, row_weight, channel, num_sms)

    def fetch(
        self, departure: Departure[Result], plan: Plan, *, num_sms: int | None = None
    ) -> Result:
        """The communication of a combine. Collective.

        Returns y [T, H], each token's sum; a pair of it and the scalars [T, K] if :meth:`leave` was
        given any. `num_sms` counts where copy engines communicate.
        """
        self._check_call(plan, departure.channel)
        self._check_num_sms(num_sms)
        y, topk_weight = self._fetch(departure, plan, num_sms)
        return cast(Result, (y, topk_weight) if departure.weighted else y)

    def _send(
        self,
        x: Tensor,
        plan: Plan,
        topk_weight: Tensor | None,
        channel: str,
        payload: str | None,
        num_sms: int | None,
    ) -> Arrival[Any]:
        with named_range("dualpipe_ext::send"):
            return self._opened().send(x, plan, topk_weight, channel, payload, num_sms)

    def _arrive(self, arrival: Arrival[Any], plan: Plan, num_sms: int | None) -> Weighted:
        with named_range("dualpipe_ext::arrive"):
            return self._opened().arrive(arrival, plan, num_sms)

    def _leave(
        self,
        rows: Tensor | None,
        plan: Plan,
        row_weight: Tensor | None,
        channel: str,
        num_sms: int | None,
    ) -> Departure[Any]:
        with named_range("dualpipe_ext::leave"):
            return self._opened().leave(rows, plan, row_weight, channel, num_sms)

    def _fetch(self, departure: Departure[Any], plan: Plan, num_sms: int | None) -> Weighted:
        with named_range("dualpipe_ext::fetch"):
            return self._opened().fetch(departure, plan, num_sms)

    # ---- Its life ----

    def check(self) -> None:
        """Raise what a finished kernel reported, without waiting for kernels in flight.

        Raises:
            PeerTimeoutError: a peer did not arrive within ``timeout``.
            RowsOverflowError, IndexError: under ``max_rows``, what a plan found since last time.
        """
        self._opened().check()

    def close(self) -> None:
        """Wait for this rank's kernels and let go of the peer memory. Safe to call twice."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *exception: object) -> None:
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
        return wide(self.dtype)

    def _count_sms(self, comm_sms: int | float) -> int:
        total, _ = device_facts(self.device)
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

    def _opened(self) -> Backend[Any]:
        if self._backend is None:
            raise ExchangeClosedError("this Exchange is closed: make a new one")
        return self._backend

    def _check_call(self, plan: Plan, channel: str) -> None:
        self._opened()
        if channel not in CHANNELS:
            raise ValueError(f'channel={channel!r}: choose "forward" or "backward"')
        if plan.layout != self.layout:
            raise ValueError(
                f"the plan was made for {plan.layout}, this exchange has {self.layout}: "
                f"call plan() of an exchange with the same sizes"
            )

    def _check_dispatch(
        self,
        x: Tensor,
        plan: Plan,
        channel: str,
        topk_weight: Tensor | None,
        payload: str | None,
    ) -> None:
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

    def _check_combine(self, rows: Tensor, plan: Plan, row_weight: Tensor | None) -> None:
        self._check_rows("rows", rows, plan.num_rows, "R")
        if row_weight is not None:
            _check_tensor("row_weight", row_weight, self._weight_dtype, self.device)
            _check_shape("row_weight", row_weight, [plan.num_rows], "[R]")

    def _check_num_sms(self, num_sms: int | None) -> None:
        if num_sms is None:
            return
        total = device_facts(self.device)[0] if self.device.type == "cuda" else None
        if not isinstance(num_sms, int) or num_sms < 1 or (total and num_sms > total):
            raise ValueError(
                f"num_sms={num_sms!r}: pass an int from 1 to {total or 'the SMs of the GPU'}, or "
                "None for all SMs"
            )

    def _check_unique(self, what: str) -> None:
        if self.form != "unique":
            raise ValueError(
                f'{what} needs unique rows: make the Exchange with form="unique", not {self.form!r}'
            )

    def _check_rows(self, name: str, tensor: Tensor, count: int, letter: str) -> None:
        _check_tensor(name, tensor, self.dtype, self.device)
        _check_shape(name, tensor, [count, self.hidden], f"[{letter}, H]")


class _Dispatch(torch.autograd.Function):
    """A dispatch of rows, and of a scalar a route. Its transpose is a combine."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weight: Tensor | None,
        exchange: Exchange,
        plan: Plan,
        channel: str,
        payload: str | None,
        num_sms: int | None,
    ) -> Weighted:
        ctx.exchange, ctx.plan, ctx.weighted = exchange, plan, topk_weight is not None
        ctx.num_sms = num_sms
        weight = None if topk_weight is None else topk_weight.contiguous()
        arrival = exchange._send(x.contiguous(), plan, weight, channel, payload, num_sms)
        return exchange._arrive(arrival, plan, num_sms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor, d_weight: Any) -> Any:
        weight = d_weight.contiguous() if ctx.weighted else None
        how = ctx.plan, ctx.num_sms
        departure = ctx.exchange._leave(d_rows.contiguous(), how[0], weight, "backward", how[1])
        return *ctx.exchange._fetch(departure, *how), *(None,) * 5


class _Combine(torch.autograd.Function):
    """A combine of rows, and of a scalar a row. Its transpose is a dispatch."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        row_weight: Tensor | None,
        exchange: Exchange,
        plan: Plan,
        channel: str,
        num_sms: int | None,
    ) -> Weighted:
        ctx.exchange, ctx.plan, ctx.weighted = exchange, plan, row_weight is not None
        ctx.num_sms = num_sms
        weight = None if row_weight is None else row_weight.contiguous()
        departure = exchange._leave(rows.contiguous(), plan, weight, channel, num_sms)
        return exchange._fetch(departure, plan, num_sms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_weight: Any) -> Any:
        weight = d_weight.contiguous() if ctx.weighted else None
        sent = d_y.contiguous(), ctx.plan, weight, "backward", None, ctx.num_sms
        arrival = ctx.exchange._send(*sent)
        return *ctx.exchange._arrive(arrival, ctx.plan, ctx.num_sms), *(None,) * 4


def _faster_form(comm_sms: int | float) -> str:
    """Of forward and backward of a layer, by docs/measured/exchange.md."""
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


def _check_tensor(name: str, tensor: object, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: pass a torch.Tensor")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, the exchange takes {dtype}: use .to({dtype})")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the exchange on {device}: move it there")


def _check_shape(name: str, tensor: Tensor, expected: list[int], letters: str) -> None:
    if list(tensor.shape) != expected:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, not {letters} = {expected}: "
            f"pass the tensor that belongs to this plan"
        )
