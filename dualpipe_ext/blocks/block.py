"""A transformer block cut into segments, each forward and backward callable apart.

    compute    attention       x [..., H] → h (residual), routing, rows to send m [T, H]
    comm       plan, dispatch  m → rows [R, H] in expert order, row_weight [R]
    compute    mlp             rows → out [R, H]
    comm       combine         out → y [T, H]
    compute    output          h + y

Letters as everywhere: T tokens of this rank, H hidden, R rows in expert order. `overlap.py` runs
the segments of two micro-batches against each other; run one after another they are the block.

**Your own modules.** Everything between two exchanges may be any nn.Module:

- `attention` maps [..., H] to the same shape. Its backward is autograd's, but for a
  `GroupedQueryAttention` behind which a `Router` comes (`attention_segment.py`).
- `feed_forward` is a `MoELayer`, a `RoutedExperts` around your own experts' MLP, or any module that
  maps [..., H] to the same shape: a dense layer, which nothing is exchanged for.

What a module computes with `DelayedLinear`, or `weight_gradients.linear`, leaves its weight
gradient for the segment's backward for weights; `delay_linears(module)` turns nn.Linear into it.
The gradients of all other parameters come with the backward for inputs.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..exchange.exchange import Exchange
from ..exchange.unique_rows import UniqueRows
from ..gradients.delayed import WeightGradients
from ..gradients.segment import Segment
from ..moe.layer import MoELayer
from ..ops.block_ops import rms_norm
from ..ops.grouped_mlp import grouped_mlp, mlp_dgrad, mlp_forward, mlp_wgrad
from ..ops.operator import autocast_off, device_facts
from .attention_segment import AttentionSegment, fits

__all__ = ["BlockChunk", "RoutedExperts", "TransformerBlock"]

RECOMPUTABLE = ("attention", "mlp")


class RoutedExperts(nn.Module):
    """A MoE layer around an experts' MLP of your own: y = layer(x), x [..., H].

    Args:
        router: maps x [T, H] to `router.Routes`, such as a `router.Router`.
        experts: maps (rows [R, H] in expert order, row_weight [R] fp32, expert_offsets [L + 1]
            int32 on the device) to out [R, H], the routing weight applied. Rows that pad an expert
            are zero and must come out finite; with the exchange's max_rows, rows past
            expert_offsets[-1] hold anything. Mark its parameters `expert_parallel = True`.
        exchange: of the expert group.
        shared_expert: a module that sees every token, [T, H] to the same, or None.
        aux_loss_coefficient: factor on the router's balance loss.
    """

    def __init__(
        self,
        router: nn.Module,
        experts: nn.Module,
        exchange: Exchange,
        *,
        shared_expert: nn.Module | None = None,
        aux_loss_coefficient: float = 0.01,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.exchange = router, experts, exchange
        self.shared_expert = shared_expert
        self.aux_loss_coefficient = aux_loss_coefficient
        self.aux_loss: Tensor | None = None
        self.tokens_per_expert: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, x.shape[-1])
        routes = self.router(x_TH)
        self.aux_loss = self.aux_loss_coefficient * routes.aux_loss
        self.tokens_per_expert = routes.tokens_per_expert
        x_TH = x_TH.to(self.exchange.dtype)
        plan = self.exchange.plan(routes.topk_idx)
        rows, row_weight = self.exchange.dispatch(x_TH, plan, topk_weight=routes.topk_weight)
        out = self.experts(rows, row_weight, plan.expert_offsets)
        y = self.exchange.combine(out, plan)
        if self.shared_expert is not None:
            y = y + self.shared_expert(x_TH)
        return y.reshape(x.shape)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then the same with the feed-forward part: [..., H] → [..., H].

    Called as a module it is ordinary autograd; `start_chunk` gives its segments.

    Args:
        hidden: H.
        attention, feed_forward: see the module's head. The norms are RMSNorms of `dtype`.
        recompute: of "attention" and "mlp", the segments that keep their inputs only and run
            again in the backward. "mlp" keeps the dispatched rows: nothing is sent twice.
        norm_eps, dtype, device: of the norms.
    """

    def __init__(
        self,
        hidden: int,
        attention: nn.Module,
        feed_forward: nn.Module,
        *,
        recompute: Collection[str] = (),
        norm_eps: float = 1e-6,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        unknown = sorted(set(recompute) - set(RECOMPUTABLE))
        if unknown or isinstance(recompute, str):
            raise ValueError(f"recompute={recompute!r}: pass a collection out of {RECOMPUTABLE}")
        like = {"eps": norm_eps, "dtype": dtype, "device": device}
        self.attention_norm = nn.RMSNorm(hidden, **like)
        self.attention = attention
        self.feed_forward_norm = nn.RMSNorm(hidden, **like)
        self.feed_forward = feed_forward
        self.recompute = frozenset(recompute)

    @property
    def routed(self) -> bool:
        """Whether tokens travel to experts, or the feed-forward part is dense."""
        return isinstance(self.feed_forward, (MoELayer, RoutedExperts))

    def forward(self, x: Tensor) -> Tensor:
        h, m = self.attend(x)
        return h + self.feed_forward(m)

    def start_chunk(self, *, grad: bool = True, channel: str = "forward") -> BlockChunk:
        """The segments of one micro-batch; `channel` is the exchange's for its forward."""
        return BlockChunk(self, grad=grad, channel=channel)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The attention segment of a dense block: h [..., H] and its norm."""
        first, second = self.attention_norm, self.feed_forward_norm
        mixed = self.attention(rms_norm(x, first.weight, eps=first.eps)).to(x.dtype)
        m, h = rms_norm(mixed, second.weight, residual=x, eps=second.eps)
        return h, m

    def attend_and_route(self, x: Tensor) -> tuple[Tensor, ...]:
        """The attention segment of a routed block, the shared expert and the router in it.

        Returns h [..., H] with the shared expert's part, m [T, H] in the experts' dtype,
        topk_weight [T, K], the weighted balance loss; topk_idx [T, K] and tokens_per_expert [E].
        """
        moe, autocast = self.feed_forward, torch.is_autocast_enabled(x.device.type)
        h, m = self.attend(x)
        m = m.flatten(0, -2)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else m.dtype
        with autocast_off(x.device.type):
            routes = moe.router(m)
            m = m.to(dtype)
            if moe.shared_expert is not None:
                h = h + moe.shared_expert(m).view_as(h)
        aux_loss = moe.aux_loss_coefficient * routes.aux_loss
        return h, m, routes.topk_weight, aux_loss, routes.topk_idx, routes.tokens_per_expert


class BlockChunk:
    """One micro-batch on its way through one block.

    The methods run in the order in which they stand here, forward and then backward; each frees
    what nobody needs after it. All are collective over the expert group where they exchange. They
    return the tensors that the next segment reads, for a caller that runs it on another stream.
    """

    def __init__(self, block: TransformerBlock, *, grad: bool, channel: str) -> None:
        self.block, self._grad, self._channel = block, grad, channel
        self._moe = block.feed_forward if block.routed else None
        self._explicit = isinstance(self._moe, MoELayer)  # the MLP's gradients are our functions
        attend = block.attend_and_route if block.routed else block.attend
        self._attention = Segment(attend, grad=grad, recompute="attention" in block.recompute)
        self._mlp: Segment | None = None  # a foreign or dense MLP
        self._mlp_weights = WeightGradients()
        self._received: UniqueRows | None = None
        self.aux_loss: Tensor | None = None

    @property
    def exchange(self) -> Exchange | None:
        """That of the block; None for a dense one, or before the first forward opened it."""
        return None if self._moe is None else self._moe.exchange

    @property
    def _unique(self) -> bool:
        """Unique rows are expanded, and summed, where the MLP runs: on the compute lane."""
        return self._moe is not None and self.exchange.form == "unique"

    def beside_communication(self, num_sms: int | None) -> tuple[int | None, bool]:
        """`num_sms` and `take_over` of `mlp` and `mlp_backward` beside communication, once the
        exchange is open. Kernels that cannot draw tiles leave communication its SMs.
        """
        if not self._explicit:
            return None, False
        moe, exchange = self._moe, self.exchange
        num_sms = moe.num_sms if num_sms is None else num_sms
        if num_sms is not None or exchange.device.type != "cuda":
            return num_sms, False
        total, (major, _) = device_facts(exchange.device)
        if major == 9 and moe.precision == "bf16":  # they draw
            return None, True
        return total - exchange.comm_sms if exchange.comm_sms else None, False

    # ---- Forward ----

    def attention(self, x: Tensor) -> tuple[Tensor, ...]:
        self._shape = x.shape
        if self._grad and "attention" not in self.block.recompute and fits(self.block, x):
            self._attention = AttentionSegment(self.block)
        self._h, self._m, *routing = self._attention.forward(x)
        if self._moe is None:
            return (self._m,)
        self._topk_weight, aux_loss, self._topk_idx, counts = routing
        self.aux_loss = self._moe.aux_loss = aux_loss
        self._moe.tokens_per_expert = counts
        if self._explicit:
            self._moe.record_load(counts)
            self._topk_idx = self._moe.choose_slots(self._topk_idx)
        return self._m, self._topk_weight, self._topk_idx

    def plan(self) -> tuple[Tensor, ...]:
        """Exchange the routing. Apart from `dispatch`, which makes the host wait for R."""
        if self._moe is None:
            return ()
        if self._moe.exchange is None:
            self._moe._open_exchange(self._m)
        self._plan = self._moe.exchange.plan(self._topk_idx)
        return (self._plan.expert_offsets,)

    @torch.no_grad()
    def dispatch(self) -> tuple[Tensor, ...]:
        if self._moe is None:
            self._rows, self._m = self._m, None
            return (self._rows,)
        options = dict(
            topk_weight=self._topk_weight,
            channel=self._channel,
            payload=getattr(self._moe, "payload", None),
        )
        if self._unique:
            self._received = self.exchange.dispatch_unique(self._m, self._plan, **options)
            found = ()
        else:
            found = self.exchange.dispatch(self._m, self._plan, **options)
            self._rows, self._row_weight = found
        self._m = self._topk_weight = self._topk_idx = None
        return found

    def mlp(self, num_sms: int | None = None, take_over: bool = False) -> tuple[Tensor, ...]:
        """`num_sms` and `take_over` are `grouped_mlp`'s, of our experts; None: the layer's."""
        if self._received is not None:
            self._rows, self._row_weight = self.exchange.expand(self._received, self._plan)
            self._received = None
        self._mlp_forward(num_sms, take_over)
        if self._unique:
            self.exchange.sum_rows(self._out.detach(), self._plan, channel=self._channel)
        return (self._out,)

    def _mlp_forward(self, num_sms: int | None, take_over: bool) -> None:
        self._dtype = self._rows.dtype
        recompute = "mlp" in self.block.recompute
        if self._explicit:
            self._run_experts(num_sms, take_over, recompute)
            return
        function = self.block.feed_forward if self._moe is None else self._moe.experts
        inputs = (self._rows,)
        if self._moe is not None:
            inputs = (self._rows, self._row_weight, self._plan.expert_offsets)
        self._mlp = Segment(function, grad=self._grad, recompute=recompute)
        (self._out,) = self._mlp.forward(*inputs)
        self._rows = self._row_weight = None

    @torch.no_grad()
    def combine(self) -> tuple[Tensor, ...]:
        self._y = self._out
        if self._unique:
            self._y = self.exchange.combine_unique(self._plan, channel=self._channel)
        elif self._moe is not None:
            self._y = self.exchange.combine(self._out, self._plan, channel=self._channel)
        self._out = None
        return (self._y,)

    @torch.no_grad()
    def output(self) -> Tensor:
        out = self._h + self._y.view(self._shape)
        self._h = self._y = None
        return out

    # ---- Backward ----

    @torch.no_grad()
    def combine_backward(self, d_output: Tensor) -> tuple[Tensor, ...]:
        """The backward of combine is a dispatch; `d_output` [..., H] is that of the block."""
        self._d_output = self._d_out = d_output
        if self._moe is not None:
            dy = d_output.reshape(-1, d_output.shape[-1]).to(self._dtype)
            if self._unique:
                self._received = self.exchange.dispatch_unique(dy, self._plan, channel="backward")
                return ()
            self._d_out = self.exchange.dispatch(dy, self._plan, channel="backward")
        return (self._d_out,)

    @torch.no_grad()
    def mlp_backward(
        self, num_sms: int | None = None, take_over: bool = False
    ) -> tuple[Tensor, ...]:
        """Gradients of rows and row_weight; those of the weights wait for the next method."""
        if self._received is not None:
            self._d_out = self.exchange.expand(self._received, self._plan)
            self._received = None
        self._mlp_backward_input(num_sms, take_over)
        if self._unique:
            self.exchange.sum_rows(
                self._d_rows, self._plan, row_weight=self._d_weight, channel="backward"
            )
        return tuple(d for d in (self._d_rows, self._d_weight) if d is not None)

    def _mlp_backward_input(self, num_sms: int | None, take_over: bool) -> None:
        if not self._explicit:
            self._d_rows, *rest = self._mlp.backward_input(self._d_out)
            self._d_weight = rest[0] if rest else None
            self._d_out = None
            return
        if self._saved is None:
            self._run_experts(num_sms, take_over, recompute=False)
            self._out = None
        saved, d_out, moe = self._saved, self._d_out, self._moe
        num_sms = moe.num_sms if num_sms is None else num_sms
        how = {"num_sms": num_sms, "take_over": take_over}
        self._d_rows, self._d_weight = mlp_dgrad(d_out, saved, **how)
        if moe.w13.requires_grad or moe.w2.requires_grad:
            self._mlp_weights.add(
                (moe.w13, moe.w2), lambda totals: mlp_wgrad(d_out, saved, totals=totals, **how)
            )
        self._saved = self._rows = self._row_weight = self._d_out = None

    def mlp_backward_weight(self) -> None:
        self._mlp_weights.run()
        if self._mlp is not None:
            self._mlp.backward_weight()

    @torch.no_grad()
    def dispatch_backward(self) -> tuple[Tensor, ...]:
        """The backward of dispatch is a combine."""
        self._d_m, self._d_topk_weight = self._d_rows, None
        if self._moe is not None:
            weighted = self._d_weight is not None
            if self._unique:
                found = self.exchange.combine_unique(
                    self._plan, channel="backward", weighted=weighted
                )
            else:
                found = self.exchange.combine(
                    self._d_rows, self._plan, row_weight=self._d_weight, channel="backward"
                )
            self._d_m, self._d_topk_weight = found if self._d_weight is not None else (found, None)
        self._d_rows = self._d_weight = None
        return tuple(d for d in (self._d_m, self._d_topk_weight) if d is not None)

    def attention_backward(self, aux_loss_scale: float = 1.0) -> Tensor | None:
        """The gradient of the block's input. The balance loss has the weight `aux_loss_scale`."""
        gradients = (self._d_output, self._d_m)
        if self._moe is not None:
            d_aux_loss = torch.full_like(self.aux_loss, aux_loss_scale)
            gradients = (*gradients, self._d_topk_weight, d_aux_loss, None, None)
        (dx,) = self._attention.backward_input(*gradients)
        self._d_output = self._d_m = self._d_topk_weight = None
        # Not before: the compute lane may have made it, and now it is behind dispatch's backward,
        # which reads it on the communication lane.
        self._plan = None
        return dx

    def attention_backward_weight(self) -> None:
        self._attention.backward_weight()

    def _run_experts(self, num_sms: int | None, take_over: bool, recompute: bool) -> None:
        """Our MLP on the dispatched rows; sets `_out` and, with `grad`, what the backward needs."""
        moe, rows = self._moe, self._rows
        num_sms = moe.num_sms if num_sms is None else num_sms
        self._saved = None
        with torch.no_grad():
            w13, w2 = moe.w13.to(rows.dtype), moe.w2.to(rows.dtype)  # themselves, but for autocast
            inputs = (rows, self._row_weight, w13, w2, self._plan.expert_offsets)
            how = {"num_sms": num_sms, "take_over": take_over, "precision": moe.precision}
            if self._grad and not recompute:
                self._out, self._saved = mlp_forward(*inputs, **how)
                return
            self._out = grouped_mlp(*inputs, **how)
        if not self._grad:
            self._rows = self._row_weight = None
