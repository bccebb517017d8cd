"""The attention segment of a block of our own parts, without autograd between them.

A `Segment` records a graph of some forty nodes and walks it back, which takes the host longer than
to launch the segment's kernels. Here both ways are written down. The gradients that meet in x, the
norm's and the residual's, are added in the norm's kernel.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat import has_module_hooks, saves_tensors_elsewhere
from ..gradients.delayed import DelayedLinear, WeightGradients, add_linear, run_backward
from ..moe.layer import MoELayer
from ..moe.router import Router
from ..ops.attention import backward_into as attend_backward_into
from ..ops.attention import forward_operator as attend_operator
from ..ops.heads import tables
from ..ops.norm import norm_backward_operator, norm_operator
from ..ops.operator import is_observed
from ..ops.rotary import RotaryOptions, rotate_into
from ..ops.route import route_backward_operator, route_operator
from .attention import GroupedQueryAttention

__all__ = ["AttentionSegment", "fits"]

PARTS = (nn.RMSNorm, DelayedLinear, DelayedLinear, nn.RMSNorm, Router)


class OwnBlock(Protocol):
    """A `TransformerBlock` of our own parts."""

    attention_norm: nn.RMSNorm
    attention: GroupedQueryAttention
    feed_forward_norm: nn.RMSNorm
    feed_forward: MoELayer


def fits(block: Any, x: Tensor) -> TypeGuard[OwnBlock]:
    """Whether it does all that `block.attend_and_route(x)` does under autograd.

    All modules are ours and as we made them (a parametrization, or FSDP around one of them, changes
    its class), no hook runs in them, all parameters are plain and want a gradient; nothing
    traces, and no saved tensor goes elsewhere.
    """
    attention, moe = block.attention, block.feed_forward
    if type(attention) is not GroupedQueryAttention or type(moe) is not MoELayer:
        return False
    if moe.shared_expert is not None or attention.query_norm is not None or x.dim() != 3:
        return False
    parts = _parts(block)
    if tuple(map(type, parts)) != PARTS or not attention.uses_flash_attention(x):
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    if has_module_hooks(attention, *parts) or saves_tensors_elsewhere():
        return False
    weights: list[Any] = [part.weight for part in parts]
    for weight in weights:
        if type(weight) is not nn.Parameter or not weight.requires_grad:
            return False
    if not x.dtype == weights[1].dtype == weights[2].dtype:
        return False
    if attention.qkv.bias is not None or attention.out.bias is not None or is_observed((x,)):
        return False
    return parts[-1].takes_kernel(x.flatten(0, 1))


def _parts(
    block: OwnBlock,
) -> tuple[nn.RMSNorm, DelayedLinear, DelayedLinear, nn.RMSNorm, Router]:
    attention = block.attention
    router: Any = block.feed_forward.router
    linears = attention.qkv, attention.out
    return block.attention_norm, *linears, block.feed_forward_norm, router


class AttentionSegment:
    """One call of `block.attend_and_route`: a `Segment` in all but its inside.

    Letters: B sequences of S tokens, T = B S, H hidden, N heads, D width of a head.
    """

    def __init__(self, block: OwnBlock) -> None:
        self._block, self._later = block, WeightGradients()
        self._weights: tuple[nn.Parameter, ...]
        # What a forward leaves for its backward: tuples.
        self._attended: Any = None
        self._routed: Any = None

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = _parts(self._block)
        weights: Any = tuple(part.weight for part in parts)  # whatever becomes of the modules
        self._weights = weights
        first, _, _, second, router = parts
        w_first, w_qkv, w_out, w_second, _ = self._weights
        attention, (B, S, _) = self._block.attention, x.shape
        rows = x.flatten(0, 1)
        n, _, rstd = norm_operator(rows, None, w_first, first.eps, 0)
        turns = tables(S, attention.head_width, attention.rope_base, x.device)
        heads = F.linear(n, w_qkv).view(B, S, -1, attention.head_width)
        qkv = self._turn(heads, turns, inverse=False)
        options = attention.kernel_options()
        mixed, lse = attend_operator(*qkv, None, None, options)
        joined = mixed.transpose(1, 2).flatten(2).flatten(0, 1)
        self._attended = rows, n, rstd, turns, qkv, mixed, lse, options, joined
        m, h, rstd = norm_operator(F.linear(joined, w_out), rows, w_second, second.eps, 0)
        return h.view(x.shape), m, *self._route(m, h, rstd, router)

    def _route(self, m: Tensor, h: Tensor, rstd: Tensor, router: Router) -> tuple[Tensor, ...]:
        options, weight = router.kernel_options(), router.kernel_weight()
        routed = route_operator(m, weight, router.bias, options)
        topk_weight, probability_sum, topk_idx, count, logits = routed
        coefficient = self._block.feed_forward.aux_loss_coefficient
        factor = coefficient * router.loss_factor(m.shape[0])
        aux_loss = (probability_sum * count).sum() * factor
        backward = options.of_backward(softmax=router.bias is None)
        self._routed = (m, weight, logits, topk_idx), backward, h, rstd, count, factor
        return topk_weight, aux_loss, topk_idx, count

    @torch.no_grad()
    def backward_input(
        self,
        d_h: Tensor | None,
        d_m: Tensor | None,
        d_topk_weight: Tensor | None,
        d_aux_loss: Tensor | None,
        *no_gradients: None,
    ) -> tuple[Tensor]:
        w_first, _, _, w_second, w_router = self._weights
        d_h, d_second, d_router = self._route_backward(d_h, d_m, d_topk_weight, d_aux_loss)
        dx, d_first = self._attend_backward(d_h)
        run_backward([w_router, w_second, w_first], [d_router, d_second, d_first])
        return (dx,)

    def _route_backward(
        self,
        d_h: Tensor | None,
        d_m: Tensor | None,
        d_topk_weight: Tensor | None,
        d_aux_loss: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of h [T, H], of the second norm's weight and of the router's."""
        (m, weight, logits, topk_idx), options, h, rstd, count, factor = self._routed
        self._routed = None
        if d_topk_weight is None:
            d_topk_weight = torch.zeros_like(topk_idx, dtype=torch.float32)
        d_sum = torch.zeros_like(count, dtype=torch.float32)
        if d_aux_loss is not None:
            d_sum = count * (d_aux_loss * factor)
        saved = m, weight, logits, topk_idx
        d_normed, d_router = route_backward_operator(d_topk_weight, d_sum, *saved, options)
        if d_m is not None:
            d_normed += d_m.view_as(d_normed)
        d_h = None if d_h is None else d_h.reshape(h.shape)
        w_second, w_router = self._weights[3:]
        d_h, d_second = norm_backward_operator(d_normed, d_h, h, w_second, rstd, 0)
        return d_h, d_second, d_router.to(w_router.dtype)

    def _attend_backward(self, d_h: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x [B, S, H] and of the first norm's weight."""
        rows, n, rstd, turns, qkv, mixed, lse, options, joined = self._attended
        self._attended = None
        w_first, w_qkv, w_out, _, _ = self._weights
        add_linear(self._later, (w_out,), joined, d_h)
        B, N, S, D = mixed.shape
        d_mixed = (d_h @ w_out).view(B, S, N, D).transpose(1, 2)
        d_heads = n.new_empty(B, S, w_qkv.shape[0] // D, D)
        attend_backward_into(self._split(d_heads), d_mixed, *qkv, mixed, lse, None, None, options)
        self._turn(d_heads, turns, inverse=True)
        d_heads = d_heads.view(B * S, -1)
        add_linear(self._later, (w_qkv,), n, d_heads)
        dx, d_first = norm_backward_operator(d_heads @ w_qkv, d_h, rows, w_first, rstd, 0)
        return dx.view(B, S, -1), d_first

    def _turn(self, heads: Tensor, turns: tuple[Tensor, Tensor], *, inverse: bool) -> list[Tensor]:
        """Rotates queries and keys of heads [B, S, N + 2G, D] in place; returns their `_split`."""
        turned = heads[:, :, : heads.shape[2] - self._block.attention.kv_heads]
        rotate_into(turned, *turns, None, RotaryOptions(inverse=inverse), turned)
        return self._split(heads)

    def _split(self, heads: Tensor) -> list[Tensor]:
        """Queries, keys and values in heads [B, S, N + 2G, D], as [B, N or G, S, D]."""
        groups = self._block.attention.kv_heads
        sizes = [heads.shape[2] - 2 * groups, groups, groups]
        return [part.transpose(1, 2) for part in heads.split(sizes, dim=2)]

    def backward_weight(self) -> None:
        self._later.run()
