"""A transformer block cut into segments, each forward and backward callable apart.

    compute    attention       x [..., H] → h (residual), routing, rows to send m [T, H]
    comm       plan, dispatch  m → rows [R, H] in expert order, row_weight [R]
    compute    mlp             rows → out [R, H]
    comm       combine         out → y [T, H]
    compute    output          h + y

Letters as everywhere: T tokens of this rank, H hidden, R rows in expert order. `pair.py` runs
the segments of two micro-batches against each other; run one after another they are the block.

**Your own modules.** Everything between two exchanges may be any nn.Module:

- `attention` maps [..., H] to the same shape. Its backward is autograd's, but for a
  `GroupedQueryAttention` behind which a `Router` comes (`attention_segment.py`).
- `feed_forward` is a `MoELayer`, a `RoutedExperts` around your own experts' MLP, or any module that
  maps [..., H] to the same shape: a dense layer, which nothing is exchanged for.

What a module computes with `DelayedLinear`, or `gradients.delayed.linear`, leaves its weight
gradient for the segment's backward for weights; `delay_linears(module)` turns nn.Linear into it.
The gradients of all other parameters come with the backward for inputs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import has_module_hooks
from ..moe.routed import RoutedFeedForward
from ..ops.norm import rms_norm
from .chunk import BlockChunk, DenseChunk, RoutedChunk

__all__ = ["TransformerBlock"]

RECOMPUTABLE = ("attention", "mlp")


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
        like: dict[str, Any] = {"eps": norm_eps, "dtype": dtype, "device": device}
        self.attention_norm = nn.RMSNorm(hidden, **like)
        self.attention = attention
        self.feed_forward_norm = nn.RMSNorm(hidden, **like)
        self.feed_forward = feed_forward
        self.recompute = frozenset(recompute)

    @property
    def routed(self) -> bool:
        """Whether tokens travel to experts, or the feed-forward part is dense."""
        return isinstance(self.feed_forward, RoutedFeedForward)

    def forward(self, x: Tensor) -> Tensor:
        h, m = self.attend(x)
        y: Tensor = self.feed_forward(m)
        return h + y

    def start_chunk(self, *, grad: bool = True, channel: str = "forward") -> BlockChunk:
        """The segments of one micro-batch; `channel` is the exchange's for its forward."""
        if self.routed:
            return RoutedChunk(self, grad=grad, channel=channel)
        return DenseChunk(self, grad=grad)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The attention segment of a dense block: h [..., H] and its norm."""
        first, second = self.attention_norm, self.feed_forward_norm
        n = rms_norm(x, first.weight, eps=_eps(first)) if _is_plain(first) else first(x)
        mixed = self.attention(n).to(x.dtype)
        if _is_plain(second):
            m, h = rms_norm(mixed, second.weight, residual=x, eps=_eps(second))
            return h, m
        h = x + mixed
        return h, second(h)

    def attend_and_route(self, x: Tensor) -> tuple[Tensor, ...]:
        """The attention segment of a routed block, the shared expert and the router in it.

        Returns h [..., H] with the shared expert's part, m [T, H] in the experts' dtype,
        topk_weight [T, K], the weighted balance loss; topk_idx [T, K] and tokens_per_expert [E].
        """
        moe = self.feed_forward
        assert isinstance(moe, RoutedFeedForward)
        h, m = self.attend(x)
        m = m.flatten(0, -2)
        routes = moe.route(m)
        m = m.to(moe.row_dtype(m))
        if moe.shared_expert is not None:
            h = h + moe.run_shared(m).view_as(h)
        aux_loss = moe.aux_loss_coefficient * routes.aux_loss
        return h, m, routes.topk_weight, aux_loss, routes.topk_idx, routes.tokens_per_expert


def _eps(norm: nn.RMSNorm) -> float:
    assert norm.eps is not None  # a block's norms have one
    return norm.eps


def _is_plain(norm: nn.Module) -> bool:
    """Whether our kernel may stand for a call of the module, which a hook would not see."""
    return type(norm) is nn.RMSNorm and not has_module_hooks(norm)
