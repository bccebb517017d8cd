"""The router: which K of the E experts a token goes to, and with which weight.

Letters: T tokens of this rank, H hidden, E experts, K experts a token, G groups of experts.

Two kinds:

- ``"softmax"``: probabilities over all experts, the K largest, renormalised to sum to 1 (Mixtral,
  arXiv 2401.04088; without renormalisation Switch Transformer, arXiv 2101.03961).
- ``"sigmoid"``: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): independent scores, a bias per
  expert that only takes part in the selection and is moved after each step towards balance, and
  experts limited to a few groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.operator import autocast_off, check_num_sms, wide
from ..ops.route import RouteOptions, fits_hopper, route_operator
from ..ops.route_reference import balance_loss, count_tokens, score, select_experts, weigh

__all__ = ["Router", "Routes"]


class Routes(NamedTuple):
    """What a router decides for this rank's tokens.

    ``topk_idx``           [T, K] int32, the experts of a token, best first; -1 = route dropped
    ``topk_weight``        [T, K] fp32 (fp64 for fp64 input), carries the router's gradient
    ``aux_loss``           scalar, 1 when choice and probability are uniform over the experts
    ``tokens_per_expert``  [E] int64, this rank's routes to every expert
    """

    topk_idx: Tensor
    topk_weight: Tensor
    aux_loss: Tensor
    tokens_per_expert: Tensor


class Router(nn.Module):
    """A linear gate with top-k selection; the arithmetic is fp32 whatever the dtype of ``x``.

    Two experts with equal scores: the one with the lower index wins, on every device.

    Parameters and buffers: ``weight`` [E, H]; for ``"sigmoid"`` also ``bias`` [E] fp32, a
    buffer that keeps its dtype when the model is cast: from 0.25 on, a step of 0.001 is no more
    than half a bf16 ulp and would be lost.

    Args:
        kind: ``"softmax"`` or ``"sigmoid"``.
        renormalize: divide a token's K weights by their sum. With K = 1 that makes the weight a
            constant 1 and leaves the router only the auxiliary loss to learn from: pass False
            there, as Switch Transformer does.
        n_groups, topk_groups: for ``"sigmoid"``: experts stand in ``n_groups`` equal runs, a group
            scores the sum of its two best biased scores, and a token may use the experts of the
            ``topk_groups`` best groups only (None = all).
        route_scale: factor on the weights (DeepSeek-V3: 2.5).
        bias_update_rate: step of :meth:`update_bias` (DeepSeek-V3: 0.001).
        implementation: "triton": on a GPU one or two kernels make logits, scores and choice
            (:mod:`~dualpipe_ext.ops.route`) for H a multiple of 8, up to 512 experts and K up to
            32; "torch": a kernel for every step, which a subclass that overrides :meth:`select`
            gets in any case; "auto": the first for bf16 and up to 256 experts on a Hopper GPU. The
            two round differently: experts whose scores differ by less than about 1e-6 may change
            places. On Hopper the gradients of weight and x are products of d_logits rounded to
            bf16: the weight's is off by 0.17 %, and dx in bf16 by 0.3 % where "torch" rounds it
            once, 0.17 %.
        num_sms: SMs that the kernels may take, None = all; an attribute that may change any time.
        dtype: of ``weight``. With bf16 the kernels on Hopper have half as much to multiply.

    Raises:
        ValueError: an unknown kind, K > E, or groups that do not divide E or leave fewer than K
            experts.
    """

    bias: Tensor | None

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        topk: int,
        *,
        kind: str = "softmax",
        renormalize: bool = True,
        n_groups: int = 1,
        topk_groups: int | None = None,
        route_scale: float = 1.0,
        bias_update_rate: float = 0.001,
        implementation: str = "auto",
        num_sms: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        topk_groups = n_groups if topk_groups is None else topk_groups
        _check_arguments(kind, num_experts, topk, n_groups, topk_groups)
        self.hidden, self.num_experts, self.topk, self.kind = hidden, num_experts, topk, kind
        self.renormalize, self.route_scale = renormalize, route_scale
        self.n_groups, self.topk_groups = n_groups, topk_groups
        if implementation not in ("auto", "torch", "triton"):
            raise ValueError(
                f'implementation={implementation!r}: choose "auto", "torch" or "triton"'
            )
        self.bias_update_rate = bias_update_rate
        self.implementation, self.num_sms = implementation, num_sms
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, dtype=dtype, device=device))
        bias = None
        if kind == "sigmoid":
            bias = torch.empty(num_experts, dtype=torch.float32, device=device)
        self.register_buffer("bias", bias)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Draws ``weight`` from a normal distribution and sets ``bias`` to zero."""
        with torch.no_grad():
            self.weight.normal_(0.0, std, generator=generator)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor) -> Routes:
        """Routes ``x`` [T, H] of any floating dtype. T = 0 is legal; the loss is then 0."""
        with autocast_off(x.device.type):
            if self.takes_kernel(x):
                return self._fused(x)
            math_dtype = wide(x.dtype)
            logits = F.linear(x.to(math_dtype), self.weight.to(math_dtype))
            scores, probability, ranking = score(logits, self.kind)
            topk_idx = self.select(ranking)
            topk_weight = weigh(scores, topk_idx, self.renormalize, self.route_scale)
            tokens_per_expert = count_tokens(topk_idx, self.num_experts)
            aux_loss = balance_loss(probability, tokens_per_expert)
        return Routes(topk_idx.int(), topk_weight, aux_loss, tokens_per_expert)

    def takes_kernel(self, x: Tensor) -> bool:
        """Whether x [T, H] is routed by the fused operator."""
        if wide(x.dtype) != torch.float32:
            return False
        if self.implementation == "torch" or type(self).select is not Router.select:
            return False
        if self.implementation == "triton":
            return True
        return fits_hopper(x, self.weight, self.topk, self.n_groups)

    def _fused(self, x: Tensor) -> Routes:
        routed = route_operator(x, self.kernel_weight(), self.bias, self.kernel_options())
        topk_weight, probability_sum, topk_idx, tokens_per_expert, _ = routed
        products = (probability_sum * tokens_per_expert).sum()
        aux_loss = products * self.loss_factor(x.shape[0])
        return Routes(topk_idx, topk_weight, aux_loss, tokens_per_expert)

    def kernel_weight(self) -> Tensor:
        """In a dtype that the fused operator takes."""
        return self.weight if self.weight.dtype == torch.bfloat16 else self.weight.float()

    def kernel_options(self) -> RouteOptions:
        """Of `ops.route.route_operator`, behind the bias."""
        groups = self.n_groups, self.topk_groups
        num_sms = check_num_sms(self.num_sms)
        return RouteOptions(self.topk, self.renormalize, *groups, self.route_scale, num_sms)

    def loss_factor(self, num_tokens: int) -> float:
        """Of sum(probability_sum * tokens_per_expert) in the balance loss, T * K routes known."""
        return self.num_experts / max(num_tokens**2 * self.topk, 1)

    @torch.no_grad()
    def select(self, scores: Tensor) -> Tensor:
        """The K experts of every token, [T, K] int64, from ``scores`` [T, E]; outside autograd.

        A stable sort and not ``torch.topk``, which may return any of several equal scores.
        With E = 4, K = 2 and scores ``[.2, .3, .3, .2]`` the answer is ``[1, 2]``.
        """
        return select_experts(scores, self.bias, self.topk, self.n_groups, self.topk_groups)

    @torch.no_grad()
    def update_bias(self, tokens_per_expert: Tensor) -> None:
        """Moves the selection bias by ``bias_update_rate`` towards balance, without a loss.

        ``tokens_per_expert`` [E]: the routes since the last call, **summed over all ranks** by the
        caller, so that the replicated bias stays equal everywhere. Call it once per optimizer step.
        An expert above the mean goes down, one below goes up, one at the mean stays: counts
        ``[4, 0, 2, 2]`` and rate 0.001 add ``[-.001, .001, 0, 0]`` (arXiv 2408.15664).

        Raises:
            RuntimeError: the router has no bias (kind "softmax").
            ValueError: the counts are not [E].
        """
        if self.bias is None:
            raise RuntimeError(
                f"a {self.kind!r} router has no bias: use kind 'sigmoid' for bias balancing"
            )
        if tokens_per_expert.shape != self.bias.shape:
            raise ValueError(
                f"tokens_per_expert has shape {tuple(tokens_per_expert.shape)}, this router has "
                f"{self.num_experts} experts: pass one count for each, [{self.num_experts}]"
            )
        count = tokens_per_expert.to(self.bias.device)
        direction = (count.sum() - count * self.num_experts).sign()
        self.bias.add_(direction.to(self.bias.dtype), alpha=self.bias_update_rate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        bias = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not type it
        if bias is not None and self.bias is not None and self.bias.dtype != bias.dtype:
            self.bias = bias.to(self.bias.device)
        return self

    def extra_repr(self) -> str:
        groups = f", {self.topk_groups} of {self.n_groups} groups" if self.n_groups > 1 else ""
        return f"{self.kind}, hidden={self.hidden}, top-{self.topk} of {self.num_experts}{groups}"


def _check_arguments(
    kind: str, num_experts: int, topk: int, n_groups: int, topk_groups: int
) -> None:
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f"router kind {kind!r} is unknown: use 'softmax' or 'sigmoid'")
    if not 1 <= topk <= num_experts:
        raise ValueError(
            f"topk={topk} is outside 1..{num_experts}: choose at most num_experts={num_experts} "
            "experts a token"
        )
    if kind == "softmax" and n_groups != 1:
        raise ValueError(
            f"n_groups={n_groups} is for kind 'sigmoid', 'softmax' has 1 group: pass n_groups=1"
        )
    if n_groups < 1 or num_experts % n_groups:
        raise ValueError(
            f"num_experts={num_experts} does not split into n_groups={n_groups} equal groups: "
            f"choose a divisor of {num_experts}"
        )
    if not 1 <= topk_groups <= n_groups:
        raise ValueError(
            f"topk_groups={topk_groups} is outside 1..{n_groups}: choose at most "
            f"n_groups={n_groups}"
        )
    reachable = topk_groups * (num_experts // n_groups)
    if topk > reachable:
        raise ValueError(
            f"topk={topk} exceeds the {reachable} experts in topk_groups={topk_groups} groups: "
            f"lower topk to {reachable} or raise topk_groups"
        )
