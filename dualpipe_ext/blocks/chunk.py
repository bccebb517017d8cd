"""One micro-batch on its way through one block, a segment at a time.

A chunk's methods run in the order in which they stand here, forward and then backward. Each frees
what nothing needs after it. They return the tensors that the next segment reads, for a caller that
runs it on another stream. What a chunk holds between two of them is a dataclass: calling one out
of order is an error that says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..exchange.backend import Arrival, Departure
from ..exchange.exchange import Exchange
from ..exchange.plan import Plan
from ..gradients.delayed import WeightGradients
from ..gradients.segment import Segment
from ..moe.layer import MoELayer
from ..moe.routed import RoutedExperts, RoutedFeedForward
from ..ops.grouped_mlp import MLPSaved, grouped_mlp, mlp_dgrad, mlp_forward, mlp_wgrad
from .attention_segment import AttentionSegment, fits
from .split import SmShare, SmSplit

__all__ = ["BlockChunk", "DenseChunk", "RoutedChunk"]

Tensors = tuple[Tensor, ...]


class Block(Protocol):
    """What a chunk asks of a `TransformerBlock`."""

    attention: nn.Module
    feed_forward: nn.Module
    recompute: frozenset[str]

    def attend(self, x: Tensor) -> Tensors: ...
    def attend_and_route(self, x: Tensor) -> Tensors: ...


class BlockChunk(Protocol):
    """What a pair asks of a chunk. All methods are collective where they exchange.

    Attributes:
        lane: where the exchanges of this chunk run, "comm"; "compute" without any.
        exchange: None without one, or before the first forward opened it.
        split: the SMs while a pair runs, else None.
        aux_loss: the router's weighted balance loss, after `attention`.
    """

    lane: str
    split: SmSplit | None
    aux_loss: Tensor | None

    @property
    def exchange(self) -> Exchange | None: ...

    def attention(self, x: Tensor) -> Tensors: ...
    def plan(self) -> Tensors: ...
    def dispatch(self) -> Tensors: ...
    def mlp(self) -> Tensors: ...
    def combine(self) -> Tensors: ...
    def output(self) -> Tensor: ...

    def combine_backward(self, d_output: Tensor) -> Tensors: ...
    def mlp_backward(self) -> Tensors: ...
    def mlp_backward_weight(self) -> None: ...
    def dispatch_backward(self) -> Tensors: ...
    def attention_backward(self, aux_loss_scale: float = 1.0) -> Tensor | None: ...
    def attention_backward_weight(self) -> None: ...


# ---- A dense block ----


class DenseChunk:
    """A chunk of a block whose feed-forward part exchanges nothing."""

    lane = "compute"
    exchange: Exchange | None = None
    split: SmSplit | None = None
    aux_loss: Tensor | None = None

    def __init__(self, block: Block, *, grad: bool) -> None:
        recompute = block.recompute
        self._attention = Segment(block.attend, grad=grad, recompute="attention" in recompute)
        self._mlp = Segment(block.feed_forward, grad=grad, recompute="mlp" in recompute)
        self._held: Tensors = ()

    def attention(self, x: Tensor) -> Tensors:
        self._held = self._attention.forward(x)
        return self._held[1:]

    def plan(self) -> Tensors:
        return ()

    def dispatch(self) -> Tensors:
        return self._held[1:]

    def mlp(self) -> Tensors:
        h, m = self._held
        (y,) = self._mlp.forward(m)
        self._held = h, y
        return (y,)

    def combine(self) -> Tensors:
        return self._held[1:]

    @torch.no_grad()
    def output(self) -> Tensor:
        h, y = self._held
        self._held = ()
        return h + y.view(h.shape)

    def combine_backward(self, d_output: Tensor) -> Tensors:
        self._held = (d_output,)
        return self._held

    def mlp_backward(self) -> Tensors:
        (d_output,) = self._held
        (d_m,) = self._mlp.backward_input(d_output)
        assert d_m is not None
        self._held = d_output, d_m
        return (d_m,)

    def mlp_backward_weight(self) -> None:
        self._mlp.backward_weight()

    def dispatch_backward(self) -> Tensors:
        return self._held[1:]

    def attention_backward(self, aux_loss_scale: float = 1.0) -> Tensor | None:
        held, self._held = self._held, ()
        (dx,) = self._attention.backward_input(*held)
        return dx

    def attention_backward_weight(self) -> None:
        self._attention.backward_weight()


# ---- A routed block: what it holds between two segments ----


@dataclass(frozen=True)
class _Started:
    """Before `attention`, and after the backward."""

    after: ClassVar[str] = "attention_backward"


@dataclass(frozen=True)
class _Attended:
    after: ClassVar[str] = "attention"
    h: Tensor  # [..., H], the residual
    m: Tensor  # [T, H], to be sent
    topk_weight: Tensor  # [T, K]
    topk_idx: Tensor  # [T, K], slots


@dataclass(frozen=True)
class _Planned:
    after: ClassVar[str] = "plan"
    h: Tensor
    m: Tensor
    topk_weight: Tensor
    plan: Plan


@dataclass(frozen=True)
class _Dispatched:
    after: ClassVar[str] = "dispatch"
    h: Tensor
    plan: Plan
    arrival: Arrival[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Computed:
    after: ClassVar[str] = "mlp"
    h: Tensor
    plan: Plan
    departure: Departure[Tensor]


@dataclass(frozen=True)
class _Combined:
    after: ClassVar[str] = "combine"
    h: Tensor
    plan: Plan
    y: Tensor  # [T, H]


@dataclass(frozen=True)
class _Forwarded:
    after: ClassVar[str] = "output"
    plan: Plan


@dataclass(frozen=True)
class _Returned:
    after: ClassVar[str] = "combine_backward"
    d_output: Tensor
    plan: Plan
    arrival: Arrival[Tensor]


@dataclass(frozen=True)
class _Differentiated:
    after: ClassVar[str] = "mlp_backward"
    d_output: Tensor
    plan: Plan
    departure: Departure[Any]  # a tensor, or a pair if it is weighted


@dataclass(frozen=True)
class _Gathered:
    after: ClassVar[str] = "dispatch_backward"
    d_output: Tensor
    # Until the compute lane, which may have made it, is behind the communication that reads it.
    plan: Plan
    d_m: Tensor
    d_topk_weight: Tensor | None


_Held = (
    _Started
    | _Attended
    | _Planned
    | _Dispatched
    | _Computed
    | _Combined
    | _Forwarded
    | _Returned
    | _Differentiated
    | _Gathered
)
Held = TypeVar("Held", bound=_Held)


class RoutedChunk:
    """A chunk of a block whose tokens travel to experts; `channel` is the forward's."""

    lane = "comm"

    def __init__(self, block: Block, *, grad: bool, channel: str) -> None:
        moe = block.feed_forward
        assert isinstance(moe, RoutedFeedForward)
        self._block, self._moe, self._grad, self._channel = block, moe, grad, channel
        recompute = block.recompute
        self._attention: Segment | AttentionSegment = Segment(
            block.attend_and_route, grad=grad, recompute="attention" in recompute
        )
        again = "mlp" in recompute
        self._experts: _OwnExperts | _ForeignExperts
        if isinstance(moe, MoELayer):
            self._experts = _OwnExperts(moe, grad=grad, recompute=again)
        else:
            assert isinstance(moe, RoutedExperts)
            self._experts = _ForeignExperts(Segment(moe.experts, grad=grad, recompute=again))
        self._held: _Held = _Started()
        self.split: SmSplit | None = None
        self.aux_loss: Tensor | None = None

    @property
    def exchange(self) -> Exchange | None:
        return self._moe.exchange

    def _take(self, kind: type[Held]) -> Held:
        """What the segment before has left."""
        held = self._held
        if not isinstance(held, kind):
            raise RuntimeError(
                f"a chunk's segments run once, in the order of BlockChunk: this one follows "
                f"{kind.after}(), the last one was {held.after}()"
            )
        return held

    def _opened(self) -> Exchange:
        exchange = self._moe.exchange
        assert exchange is not None  # since `plan`
        return exchange

    def _share(self) -> SmShare:
        if self.split is None:
            return SmShare.alone(self._moe)
        return self.split.share(self._moe, self._opened())

    # ---- Forward ----

    def attention(self, x: Tensor) -> Tensors:
        self._take(_Started)
        if self._grad and "attention" not in self._block.recompute and fits(self._block, x):
            self._attention = AttentionSegment(self._block)
        h, m, topk_weight, aux_loss, topk_idx, counts = self._attention.forward(x)
        self.aux_loss = aux_loss
        self._moe.note_routes(aux_loss, counts)
        topk_idx = self._moe.choose_slots(topk_idx)
        self._held = _Attended(h, m, topk_weight, topk_idx)
        return m, topk_weight, topk_idx

    def plan(self) -> Tensors:
        """Exchange the routing. Apart from `dispatch`, which makes the host wait for R."""
        held = self._take(_Attended)
        exchange = self._moe.open_exchange(held.m)
        if self.split is not None:
            self.split.adopt(exchange)
        plan = exchange.plan(held.topk_idx)
        self._held = _Planned(held.h, held.m, held.topk_weight, plan)
        return (plan.expert_offsets,)

    @torch.no_grad()
    def dispatch(self) -> Tensors:
        held = self._take(_Planned)
        arrival = self._opened().send(
            held.m,
            held.plan,
            topk_weight=held.topk_weight,
            channel=self._channel,
            payload=self._moe.payload,
            num_sms=self._share().row_sms,
        )
        self._held = _Dispatched(held.h, held.plan, arrival)
        return arrival.tensors

    def mlp(self) -> Tensors:
        held, exchange, share = self._take(_Dispatched), self._opened(), self._share()
        rows, row_weight = exchange.arrive(held.arrival, held.plan, num_sms=share.row_sms)
        out = self._experts.forward(rows, row_weight, held.plan.expert_offsets, share)
        departure = exchange.leave(
            out.detach(), held.plan, channel=self._channel, num_sms=share.row_sms
        )
        self._held = _Computed(held.h, held.plan, departure)
        return departure.tensors

    @torch.no_grad()
    def combine(self) -> Tensors:
        held = self._take(_Computed)
        y = self._opened().fetch(held.departure, held.plan, num_sms=self._share().row_sms)
        self._held = _Combined(held.h, held.plan, y)
        return (y,)

    @torch.no_grad()
    def output(self) -> Tensor:
        held = self._take(_Combined)
        self._held = _Forwarded(held.plan)
        return held.h + held.y.view(held.h.shape)

    # ---- Backward ----

    @torch.no_grad()
    def combine_backward(self, d_output: Tensor) -> Tensors:
        """The backward of combine is a dispatch; `d_output` [..., H] is that of the block."""
        plan, exchange = self._take(_Forwarded).plan, self._opened()
        dy = d_output.reshape(-1, d_output.shape[-1]).to(exchange.dtype)
        arrival = exchange.send(dy, plan, channel="backward", num_sms=self._share().row_sms)
        self._held = _Returned(d_output, plan, arrival)
        return arrival.tensors

    @torch.no_grad()
    def mlp_backward(self) -> Tensors:
        """Gradients of rows and row_weight; those of the weights wait for the next method."""
        held, exchange, share = self._take(_Returned), self._opened(), self._share()
        d_out = exchange.arrive(held.arrival, held.plan, num_sms=share.row_sms)
        d_rows, d_weight = self._experts.backward_input(d_out, share)
        departure = exchange.leave(
            d_rows, held.plan, row_weight=d_weight, channel="backward", num_sms=share.row_sms
        )
        self._held = _Differentiated(held.d_output, held.plan, departure)
        return departure.tensors

    def mlp_backward_weight(self) -> None:
        self._experts.backward_weight()

    @torch.no_grad()
    def dispatch_backward(self) -> Tensors:
        """The backward of dispatch is a combine."""
        held = self._take(_Differentiated)
        found = self._opened().fetch(held.departure, held.plan, num_sms=self._share().row_sms)
        d_m, d_topk_weight = found if held.departure.weighted else (found, None)
        self._held = _Gathered(held.d_output, held.plan, d_m, d_topk_weight)
        return (d_m,) if d_topk_weight is None else (d_m, d_topk_weight)

    def attention_backward(self, aux_loss_scale: float = 1.0) -> Tensor | None:
        """The gradient of the block's input. The balance loss has the weight `aux_loss_scale`."""
        held = self._take(_Gathered)
        assert self.aux_loss is not None
        d_aux_loss = torch.full_like(self.aux_loss, aux_loss_scale)
        gradients = held.d_output, held.d_m, held.d_topk_weight, d_aux_loss, None, None
        (dx,) = self._attention.backward_input(*gradients)
        self._held = _Started()
        return dx

    def attention_backward_weight(self) -> None:
        self._attention.backward_weight()


# ---- The experts' part ----


class _OwnExperts:
    """The grouped MLP of a `MoELayer`, whose gradients are functions of ours."""

    def __init__(self, moe: MoELayer, *, grad: bool, recompute: bool) -> None:
        self._moe, self._grad, self._recompute = moe, grad, recompute
        self._saved: MLPSaved | None = None
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None  # to run again
        self._later = WeightGradients()

    @torch.no_grad()
    def forward(
        self, rows: Tensor, row_weight: Tensor, expert_offsets: Tensor, share: SmShare
    ) -> Tensor:
        if self._grad and not self._recompute:
            return self._run(rows, row_weight, expert_offsets, share)
        if self._grad:
            self._inputs = rows, row_weight, expert_offsets
        moe = self._moe
        w13, w2 = moe.w13.to(rows.dtype), moe.w2.to(rows.dtype)
        return grouped_mlp(
            *(rows, row_weight, w13, w2, expert_offsets),
            num_sms=share.num_sms,
            take_over=share.take_over,
            precision=moe.precision,
        )

    def _run(
        self, rows: Tensor, row_weight: Tensor, expert_offsets: Tensor, share: SmShare
    ) -> Tensor:
        """out, and what the backward needs."""
        moe = self._moe
        w13, w2 = moe.w13.to(rows.dtype), moe.w2.to(rows.dtype)  # themselves, but for autocast
        out, self._saved = mlp_forward(
            *(rows, row_weight, w13, w2, expert_offsets),
            num_sms=share.num_sms,
            take_over=share.take_over,
            precision=moe.precision,
        )
        return out

    def backward_input(self, d_out: Tensor, share: SmShare) -> tuple[Tensor, Tensor]:
        if self._inputs is not None:
            self._run(*self._inputs, share)
        saved, moe = self._saved, self._moe
        assert saved is not None
        num_sms, take_over = share.num_sms, share.take_over
        d_rows, d_weight = mlp_dgrad(d_out, saved, num_sms=num_sms, take_over=take_over)
        if moe.w13.requires_grad or moe.w2.requires_grad:
            self._later.add(
                (moe.w13, moe.w2),
                lambda totals: mlp_wgrad(
                    d_out, saved, totals=totals, num_sms=num_sms, take_over=take_over
                ),
            )
        self._saved = self._inputs = None
        return d_rows, d_weight

    def backward_weight(self) -> None:
        self._later.run()


class _ForeignExperts:
    """Any module as a `Segment`, whose SMs are its own affair."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment

    def forward(
        self, rows: Tensor, row_weight: Tensor, expert_offsets: Tensor, share: SmShare
    ) -> Tensor:
        (out,) = self._segment.forward(rows, row_weight, expert_offsets)
        return out

    def backward_input(self, d_out: Tensor, share: SmShare) -> tuple[Tensor, Tensor | None]:
        d_rows, d_weight, *_ = self._segment.backward_input(d_out)
        assert d_rows is not None
        return d_rows, d_weight

    def backward_weight(self) -> None:
        self._segment.backward_weight()
