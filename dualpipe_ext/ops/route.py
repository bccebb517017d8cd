"""The router as one operator: logits, scores, groups, top-k, weights and the sums of its loss.

Letters: T tokens, H hidden, E experts, K experts a token, G groups.

Softmax scores without a bias, sigmoid scores with one; their meaning is `router.Router`'s. On a GPU
one to three kernels each way, within `num_sms` SMs, counted at run time: for bf16 and at most 256
experts on Hopper the products are in Gluon, else all is in Triton; elsewhere plain torch. Results
have the same bits in every run and for every `num_sms`.

Logits, and from Triton the weight's gradient, are off by a few 1e-6, as fp32 is. The Gluon kernels
multiply gradients of the logits that were rounded to bf16. That leaves the weight's 0.17 % off, and
dx 0.3 %, for which the weight and then the sums are rounded, too; torch rounds dx once, 0.17 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import constant_in_graphs
from .operator import (
    Operator,
    Options,
    aligned,
    check_num_sms,
    has_gluon,
    sm_count,
    use_triton,
    without_autocast,
)
from .route_reference import count_tokens, score, select_experts, weigh

__all__ = [
    "RouteBackwardOptions",
    "RouteOptions",
    "fits",
    "fits_hopper",
    "route",
    "route_backward_operator",
    "route_operator",
]

MAX_TOPK = 32


@dataclass(frozen=True)
class RouteOptions(Options):
    """As in `route`, all given."""

    topk: int
    renormalize: bool
    n_groups: int
    topk_groups: int
    route_scale: float
    num_sms: int  # 0 = all

    def of_backward(self, *, softmax: bool) -> RouteBackwardOptions:
        return RouteBackwardOptions(
            softmax, self.renormalize, self.n_groups, self.route_scale, self.num_sms
        )


@dataclass(frozen=True)
class RouteBackwardOptions(Options):
    """Those that the backward needs, and whether the scores are softmax's or sigmoid's."""

    softmax: bool
    renormalize: bool
    n_groups: int
    route_scale: float
    num_sms: int  # 0 = all


def fits(x: Tensor, weight: Tensor, topk: int, n_groups: int) -> bool:
    """Whether the kernels take x [T, H] and weight [E, H]."""
    if not use_triton(x, weight, tma=True) or x.shape[0] == 0:
        return False
    from ..triton_kernels.routing.tiles import MAX_COLUMNS, columns_of

    groups, size = columns_of(weight.shape[0], n_groups)
    return x.shape[1] % 8 == 0 and topk <= MAX_TOPK and groups * size <= MAX_COLUMNS


def fits_hopper(x: Tensor, weight: Tensor, topk: int, n_groups: int) -> bool:
    """Whether those do that are only for Hopper, bf16 and at most 256 experts."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or x.shape[0] == 0:
        return False
    from ..triton_kernels.routing.tiles import fits_hopper

    T, H = x.shape
    sizes = H % 8 == 0 and topk <= MAX_TOPK and fits_hopper(T, weight.shape[0], n_groups)
    return sizes and _runs_gluon(x.device)


@constant_in_graphs
def _runs_gluon(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9 and has_gluon()


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    topk: int,
    renormalize: bool = True,
    n_groups: int = 1,
    topk_groups: int = 1,
    route_scale: float = 1.0,
    num_sms: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Routes ``x`` [T, H] of bf16, fp16 or fp32 with ``weight`` [E, H] fp32 or bf16.

    A bf16 weight halves the products and gives what it would give in fp32. Its gradient is bf16.

    ``bias`` [E] fp32 means sigmoid scores, chosen with it and among the ``topk_groups`` best of
    ``n_groups`` groups; None softmax.

    Returns ``topk_idx`` [T, K] int32, ``topk_weight`` [T, K] fp32, ``probability_sum`` [E] fp32,
    the tokens' probabilities added up, and ``tokens_per_expert`` [E] int64. ``topk_weight`` and
    ``probability_sum`` are differentiable in ``x`` and ``weight``.

    Raises:
        TypeError, ValueError: dtypes and shapes that do not fit.
    """
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"x is {x.dtype}: pass torch.bfloat16, float16 or float32")
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"weight is {weight.dtype}: pass torch.float32 or bfloat16")
    if bias is not None and bias.dtype != torch.float32:
        raise TypeError(f"bias is {bias.dtype}: pass torch.float32")
    E = weight.shape[0]
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: pass [T, H], [E, H]"
        )
    if bias is not None and bias.shape != (E,):
        raise ValueError(f"bias is {tuple(bias.shape)}: pass one number an expert, ({E},)")
    if not 1 <= topk <= E or E % n_groups or not 1 <= topk_groups <= n_groups:
        raise ValueError(
            f"topk={topk}, n_groups={n_groups}, topk_groups={topk_groups} with {E} experts: pass "
            f"1 <= topk <= {E}, a divisor of {E}, and 1 <= topk_groups <= n_groups"
        )
    sms = check_num_sms(num_sms)
    options = RouteOptions(topk, renormalize, n_groups, topk_groups, route_scale, sms)
    topk_weight, probability_sum, topk_idx, count, _ = route_operator(x, weight, bias, options)
    return topk_idx, topk_weight, probability_sum, count


# ---- Plain torch ----


def _route(x, weight, bias, options: RouteOptions) -> tuple[Tensor, ...]:
    logits = F.linear(x.float(), weight.float())
    scores, probability, ranking = score(logits, "softmax" if bias is None else "sigmoid")
    topk_idx = select_experts(ranking, bias, options.topk, options.n_groups, options.topk_groups)
    topk_weight = weigh(scores, topk_idx, options.renormalize, options.route_scale)
    count = count_tokens(topk_idx, weight.shape[0])
    topk_idx = topk_idx.to(torch.int32, memory_format=torch.contiguous_format)
    return topk_weight, probability.sum(dim=0), topk_idx, count, logits


def _route_backward(
    d_topk_weight, d_probability_sum, x, weight, logits, topk_idx, options: RouteBackwardOptions
) -> tuple[Tensor, Tensor]:
    scores, probability, _ = score(logits, "softmax" if options.softmax else "sigmoid")
    d_chosen = d_topk_weight * options.route_scale
    topk_idx = topk_idx.long()
    if options.renormalize:
        chosen = scores.gather(1, topk_idx)
        total = chosen.sum(dim=1, keepdim=True) + 1e-20
        d_chosen = (d_chosen - (d_chosen * chosen).sum(dim=1, keepdim=True) / total) / total
    d_scores = torch.zeros_like(scores).scatter_add_(1, topk_idx, d_chosen)
    if options.softmax:
        d_scores = d_scores + d_probability_sum
        d_logits = scores * (d_scores - (scores * d_scores).sum(dim=1, keepdim=True))
    else:
        mean = (d_probability_sum * probability).sum(dim=1, keepdim=True)
        d_scores = d_scores + (d_probability_sum - mean) / (scores.sum(dim=1, keepdim=True) + 1e-20)
        d_logits = d_scores * scores * (1 - scores)
    return (d_logits @ weight.float()).to(x.dtype), d_logits.T @ x.float()


# ---- Kernels ----


def _route_kernels(x, weight, bias, options: RouteOptions, hopper: bool) -> tuple[Tensor, ...]:
    """topk_idx, topk_weight, logits, probability_sum and tokens_per_expert."""
    x, weight = aligned(x.contiguous()), aligned(weight.contiguous())
    sizes: dict[str, Any] = {"n_groups": options.n_groups, "num_sms": sm_count(x, options.num_sms)}
    choice = sizes | {
        "topk": options.topk,
        "renormalize": options.renormalize,
        "topk_groups": options.topk_groups,
        "route_scale": options.route_scale,
    }
    if hopper:
        from ..triton_kernels.routing.choice import choose
        from ..triton_kernels.routing.logits_hopper import logits_hopper

        parts = logits_hopper(x, weight, **sizes)
        return choose(parts, bias, num_experts=weight.shape[0], **choice)
    from ..triton_kernels.routing import route as kernels

    return kernels.route(x, weight, bias, part=_part(x), **choice)


def _part(x: Tensor) -> torch.dtype:
    """What the kernels split fp32 into: bf16, which the interpreter computes wrongly."""
    return torch.bfloat16 if x.is_cuda else x.dtype


# ---- Operators ----


class _RouteOperator:
    """topk_weight and probability_sum, which are differentiable; topk_idx, tokens_per_expert and
    the logits [T, E] fp32."""

    @staticmethod
    @without_autocast
    def forward(x, weight, bias, options):
        hopper = fits_hopper(x, weight, options.topk, options.n_groups)
        weight = weight if hopper else weight.float()
        if not fits(x, weight, options.topk, options.n_groups):
            return _route(x, weight, bias, options)
        topk_idx, topk_weight, logits, probability_sum, count = _route_kernels(
            x, weight, bias, options, hopper
        )
        return topk_weight, probability_sum, topk_idx, count, logits

    plain = staticmethod(without_autocast(_route))

    @staticmethod
    def save(ctx, inputs, output):
        x, weight, bias, options = inputs
        _, _, topk_idx, tokens_per_expert, logits = output
        ctx.options = options.of_backward(softmax=bias is None)
        ctx.mark_non_differentiable(topk_idx, tokens_per_expert, logits)
        ctx.save_for_backward(x, weight, logits, topk_idx)

    @staticmethod
    def backward(ctx, d_topk_weight, d_probability_sum, _d_idx, _d_count, _d_logits):
        x, weight, logits, topk_idx = ctx.saved_tensors  # under a checkpoint they can be had once
        if d_topk_weight is None:
            d_topk_weight = torch.zeros_like(topk_idx, dtype=torch.float32)
        if d_probability_sum is None:
            d_probability_sum = logits.new_zeros(logits.shape[1])
        dx, d_weight = route_backward_operator(
            d_topk_weight, d_probability_sum, x, weight, logits, topk_idx, ctx.options
        )
        return dx, d_weight.to(weight.dtype)


route_operator = Operator(
    f"route(Tensor x, Tensor weight, Tensor? bias, {RouteOptions.schema()}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _RouteOperator,
    RouteOptions,
)


class _RouteBackwardOperator:
    """dx, and d_weight in fp32."""

    @staticmethod
    @without_autocast
    def forward(d_topk_weight, d_probability_sum, x, weight, logits, topk_idx, options):
        topk, n_groups = topk_idx.shape[1], options.n_groups
        hopper = fits_hopper(x, weight, topk, n_groups)
        weight = weight if hopper else weight.float()
        if not fits(x, weight, topk, n_groups):
            return _route_backward(
                d_topk_weight, d_probability_sum, x, weight, logits, topk_idx, options
            )
        from ..triton_kernels.routing import backward as kernels

        return kernels.route_backward(
            d_topk_weight.contiguous(),
            d_probability_sum.contiguous(),
            aligned(x.contiguous()),
            aligned(weight.contiguous()),
            logits,
            topk_idx,
            softmax=options.softmax,
            renormalize=options.renormalize,
            route_scale=options.route_scale,
            num_sms=sm_count(x, options.num_sms),
            hopper=hopper,
            part=_part(x),
        )

    plain = staticmethod(without_autocast(_route_backward))


route_backward_operator = Operator(
    "route_backward(Tensor d_topk_weight, Tensor d_probability_sum, Tensor x, Tensor weight, "
    f"Tensor logits, Tensor topk_idx, {RouteBackwardOptions.schema()}) -> (Tensor, Tensor)",
    _RouteBackwardOperator,
    RouteBackwardOptions,
)
