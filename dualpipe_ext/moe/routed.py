"""One way through a routed feed-forward layer: route, plan, dispatch, experts, combine.

`MoELayer` and `RoutedExperts` are this with their own experts. A block's chunk runs the same steps
on two lanes (blocks/chunk.py). Letters: T tokens of this rank, H hidden, K experts a token, R rows
in expert order, L local experts, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..exchange.exchange import Exchange
from ..ops.operator import autocast_off
from .router import Routes

__all__ = ["RoutedExperts", "RoutedFeedForward"]


class RoutedFeedForward(nn.Module):
    """y = layer(x) for x [..., H]; a subclass says what its experts are.

    Attributes:
        router: maps x [T, H] to `Routes`.
        shared_expert: sees every token, or None.
        exchange: of the expert group; None until the first forward opens it.
        payload, num_sms: of the exchange's calls.
        aux_loss: of the last forward, `aux_loss_coefficient` × the router's balance loss.
        tokens_per_expert: [E] int64 of the last forward, this rank's routes.
    """

    router: nn.Module
    shared_expert: nn.Module | None
    exchange: Exchange | None
    aux_loss_coefficient: float
    payload: str | None = None
    num_sms: int | None = None
    aux_loss: Tensor | None = None
    tokens_per_expert: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, x.shape[-1])
        dtype = self.row_dtype(x)
        routes = self.route(x_TH)
        self.note_routes(self.aux_loss_coefficient * routes.aux_loss, routes.tokens_per_expert)
        x_TH = x_TH.to(dtype)
        exchange = self.open_exchange(x_TH)
        plan = exchange.plan(self.choose_slots(routes.topk_idx))
        # Queued between the plan and the dispatch, which waits on the host for its row count.
        shared_TH = None if self.shared_expert is None else self.run_shared(x_TH)
        rows, row_weight = exchange.dispatch(
            x_TH,
            plan,
            topk_weight=routes.topk_weight,
            payload=self.payload,
            num_sms=self.num_sms,
        )
        out = self.run_experts(rows, row_weight, plan.expert_offsets)
        y_TH = exchange.combine(out, plan, num_sms=self.num_sms)
        if shared_TH is not None:
            y_TH = y_TH + shared_TH
        return y_TH.reshape(x.shape)

    # ---- The steps ----

    def row_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of dispatched rows."""
        raise NotImplementedError

    def route(self, x_TH: Tensor) -> Routes:
        """The router's choice, outside of autocast."""
        with autocast_off(x_TH.device.type):
            routes: Routes = self.router(x_TH)
            return routes

    def note_routes(self, aux_loss: Tensor, tokens_per_expert: Tensor) -> None:
        """Keeps what a forward leaves on the layer; aux_loss is weighted already."""
        self.aux_loss, self.tokens_per_expert = aux_loss, tokens_per_expert

    def choose_slots(self, topk_idx: Tensor) -> Tensor:
        """The experts of the exchange, [T, K] int32, for the router's."""
        return topk_idx

    def open_exchange(self, x_TH: Tensor) -> Exchange:
        """The layer's exchange, made now if there is none. Then it is collective."""
        raise NotImplementedError

    def run_shared(self, x_TH: Tensor) -> Tensor:
        assert self.shared_expert is not None
        y_TH: Tensor = self.shared_expert(x_TH)
        return y_TH

    def run_experts(self, rows: Tensor, row_weight: Tensor, expert_offsets: Tensor) -> Tensor:
        """out [R, H] of rows [R, H], row_weight [R] and expert_offsets [L + 1], with autograd."""
        raise NotImplementedError


class RoutedExperts(RoutedFeedForward):
    """A MoE layer around an experts' MLP of your own: y = layer(x), x [..., H].

    Args:
        router: maps x [T, H] to `Routes`, such as a `Router`. It runs outside of autocast.
        experts: maps (rows [R, H] in expert order, row_weight [R] fp32, expert_offsets [L + 1]
            int32 on the device) to out [R, H], the routing weight applied. Rows that pad an expert
            are zero and must come out finite; with the exchange's max_rows, rows past
            expert_offsets[-1] hold anything. Mark its parameters `expert_parallel = True`.
        exchange: of the expert group.
        shared_expert: a module that sees every token, [T, H] to the same, or None.
        aux_loss_coefficient: factor on the router's balance loss.
    """

    exchange: Exchange

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

    def row_dtype(self, x: Tensor) -> torch.dtype:
        return self.exchange.dtype

    def open_exchange(self, x_TH: Tensor) -> Exchange:
        return self.exchange

    def run_experts(self, rows: Tensor, row_weight: Tensor, expert_offsets: Tensor) -> Tensor:
        out: Tensor = self.experts(rows, row_weight, expert_offsets)
        return out
