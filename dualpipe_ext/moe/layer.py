"""A mixture-of-experts layer whose experts are spread over the ranks of a group.

Letters: T tokens of this rank, H hidden, E experts, K experts a token, P ranks of the group,
L = E / P experts of a rank, R slots for experts and copies, S = R / P slots of a rank, I expert
width, D width of the shared expert.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..exchange.exchange import Exchange
from ..gradients.delayed import linear
from ..ops.grouped_fp8 import check_fp8, is_fp8
from ..ops.grouped_mlp import grouped_mlp
from ..ops.main_grad import carry_main_grad
from ..ops.operator import autocast_off, wide
from ..ops.swiglu import swiglu
from ..ranks.groups import Group
from ..triton_kernels.launch import available
from .experts import PlacedExperts, check_multiples_of_8
from .routed import RoutedFeedForward
from .router import Router

__all__ = ["MoELayer", "SharedExpert"]


class MoELayer(PlacedExperts, RoutedFeedForward):
    """Router, dispatch to the experts' ranks, grouped SwiGLU, combine: ``y = layer(x)``.

    ``x`` [..., H] may hold another number of tokens on every rank, none included. Every rank of
    the group calls forward, and backward, equally often and in the same order. Under
    ``torch.autocast`` the experts run in its dtype; else ``x`` has the experts' dtype.

    After a forward the layer holds

    - ``aux_loss``: scalar, ``aux_loss_coefficient`` × the router's balance loss over this rank's
      tokens. It carries a gradient: add it to the loss of the same step.
    - ``tokens_per_expert`` [E] int64, on the device: this rank's routes to every expert.

    State-dict keys (rank r's own experts, [r·L, (r+1)·L), make a sharded checkpoint;
    :meth:`full_state_dict` and :meth:`load_dense_state_dict` convert):

    ====================  ==========  ===============================================
    ``router.weight``     [E, H]      fp32, replicated
    ``router.bias``       [E]         fp32 buffer, replicated, only for ``"sigmoid"``
    ``w13``               [L, 2I, H]  sharded; rows 0..I−1 gate, I..2I−1 up
    ``w2``                [L, H, I]   sharded
    ``shared_expert.w13`` [2D, H]     replicated, only if ``shared_expert_hidden`` > 0
    ``shared_expert.w2``  [H, D]      replicated, likewise
    ====================  ==========  ===============================================

    **Placing experts.** The parameters ``w13`` and ``w2`` have a row for each of this rank's S
    slots: its L experts, until :meth:`rebalance` moves experts where the load is even. With
    ``num_slots`` > E busy experts live in several slots, and tokens spread over the copies. State
    dicts keep the logical order, each expert once, whatever the placement; once experts have
    moved, or copies exist, ``state_dict`` and ``load_state_dict`` need all ranks of the group at
    once (:func:`~dualpipe_ext.optimizer_state_dict` is the optimizer's part). A step with copies::

        loss.backward()
        layer.sync_replica_gradients()  # before anything uses the gradients
        ...                             # reduce them as below; squared_gradient_norm() to clip
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            slots, _, _ = rebalance_experts(
                layer.expert_load()[None], layer.num_slots, 1, 1, P, "improved",
                current=torch.tensor([layer.placement.physical_to_logical]),  # moves few
            )
            layer.rebalance(ExpertPlacement(slots[0], num_ranks=P), optimizer=optimizer)

    **Reducing gradients.** ``w13`` and ``w2`` carry ``expert_parallel = True``. Their gradients
    already are sums over the tokens of all P ranks, because the tokens came to the experts; the
    others hold this rank's part. When each rank's loss is a mean over its own tokens, the gradient
    of the mean over ranks is: all-reduce the replicated gradients, then divide all of them by P::

        for p in layer.parameters():
            if not getattr(p, "expert_parallel", False):
                dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)

    Where the group is a part of N data-parallel ranks, all-reduce the replicated gradients over
    all N, the expert gradients over the N / P ranks that hold the same experts, and divide by N:
    all groups then need the same placement, from ``expert_load(group of all N)``.
    Keep the expert parameters out of ``DistributedDataParallel``: it would mix different experts.

    Args:
        hidden, expert_hidden: H and I, multiples of 8 (rows move in units of 16 bytes).
        num_experts, topk: E, a multiple of P, and K.
        num_slots: R, a multiple of P, at least E; None = E, no copies. Fixed for the layer's life:
            it is the size of the parameters.
        group: a process group, a 1-D DeviceMesh, or None: all experts on this rank, and no process
            group needed. None does *not* mean the default group.
        backend, comm_sms, form, max_rows, timeout: see :class:`~dualpipe_ext.Exchange`.
        payload: None or "fp8", what the forward's dispatch sends: see Exchange.dispatch.
        num_sms: streaming multiprocessors that the expert GEMMs, the kernels that expand and sum
            unique rows, and a router named by a string, may take, None = all.
        precision: of the experts' products, "bf16" (as the dtype is) or "fp8": see
            ops/grouped_fp8.py, also for what to call after a weight was written through ``.data``.
        router: ``"softmax"``, ``"sigmoid"``, or a module that maps x [T, H] to
            :class:`~dualpipe_ext.moe.router.Routes`, for example a ``Router(H, E, K,
            kind="sigmoid", n_groups=8, topk_groups=4, route_scale=2.5)``.
        shared_expert_hidden: D, the width of a dense SwiGLU that sees every token, 0 = none.
        max_tokens: the most tokens any rank will ever pass, the size of the exchange buffers. None:
            the first forward agrees on the largest count among the ranks (one small all-reduce).
        exchange: an :class:`~dualpipe_ext.Exchange` of the same sizes (its ``num_experts`` is R)
            that layers share; without it every layer opens its own at the first forward and holds
            its own peer memory (the formula is in Exchange). Nothing of a layer stays in the
            buffers between calls, so the layers of a model, which run one after the other, can
            share one.
        aux_loss_coefficient: factor on the balance loss (Switch Transformer: 0.01).
        load_decay: what remains of older counts in :meth:`expert_load` after each forward.
        init_std: see :meth:`reset_parameters`.
        dtype, device: of the experts; None = torch's defaults. The router has fp32 at least.

    Raises:
        ValueError: sizes that do not fit each other, the group, a given exchange, or the precision.
    """

    shared_expert: SharedExpert | None

    def __init__(
        self,
        *,
        hidden: int,
        expert_hidden: int,
        num_experts: int,
        topk: int,
        num_slots: int | None = None,
        group: Group = None,
        backend: str = "auto",
        comm_sms: int | float = 16,
        form: str | None = None,
        max_rows: int | None = None,
        timeout: float = 100.0,
        payload: str | None = None,
        num_sms: int | None = None,
        precision: str = "bf16",
        router: str | nn.Module = "softmax",
        shared_expert_hidden: int = 0,
        max_tokens: int | None = None,
        exchange: Exchange | None = None,
        aux_loss_coefficient: float = 0.01,
        load_decay: float = 0.99,
        init_std: float = 0.02,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        dtype = dtype or torch.get_default_dtype()
        super().__init__(
            hidden=hidden,
            expert_hidden=expert_hidden,
            num_experts=num_experts,
            num_slots=num_slots,
            group=group,
            load_decay=load_decay,
            dtype=dtype,
            device=device,
        )
        self.topk, self.shared_expert_hidden = topk, shared_expert_hidden
        self._check_sizes()
        self.backend, self.comm_sms, self.num_sms = backend, comm_sms, num_sms
        if backend == "nvlink":
            available.require(self)
        self.form, self.max_rows, self.max_tokens = form, max_rows, max_tokens
        self.payload, self.precision, self.timeout = payload, precision, timeout
        if is_fp8(precision):
            check_fp8(None, None, self.w13, self.w2)
        self.aux_loss_coefficient, self.init_std = aux_loss_coefficient, init_std
        self.exchange, self._owns_exchange = exchange, exchange is None
        if exchange is not None:
            self._check_exchange(exchange)

        self._owns_router = isinstance(router, str)
        if isinstance(router, str):
            math = wide(dtype)
            router = Router(hidden, num_experts, topk, kind=router, num_sms=num_sms, dtype=math)
        self.router = router if device is None else router.to(device)
        self.shared_expert = None
        if shared_expert_hidden:
            self.shared_expert = SharedExpert(
                hidden, shared_expert_hidden, dtype=dtype, device=device
            )
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., H] → the same shape, in the dtype the experts run in.

        Raises:
            ValueError: a wrong last dimension or device, or more tokens than ``max_tokens``. Other
                ranks then wait for this one until the exchange's timeout.
            TypeError: a dtype that is not the experts', outside of autocast.
        """
        self._check_shape_and_device(x)
        return super().forward(x)

    def note_routes(self, aux_loss: Tensor, tokens_per_expert: Tensor) -> None:
        super().note_routes(aux_loss, tokens_per_expert)
        self.record_load(tokens_per_expert)

    def run_shared(self, x_TH: Tensor) -> Tensor:
        with autocast_off(x_TH.device.type):
            return super().run_shared(x_TH)

    def run_experts(self, rows: Tensor, row_weight: Tensor, expert_offsets: Tensor) -> Tensor:
        w13, w2 = (_cast(weight, rows.dtype) for weight in (self.w13, self.w2))
        num_sms, precision = self.num_sms, self.precision
        with autocast_off(rows.device.type):
            return grouped_mlp(
                *(rows, row_weight, w13, w2, expert_offsets), num_sms=num_sms, precision=precision
            )

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Draws all weights from a normal distribution with ``init_std``; forgets the load.

        Every expert has its own stream of random numbers, made from the seed and the expert's
        global index: the same seed gives the same model whatever P is (on one kind of device).
        None takes the seed from torch's default CPU generator, so call ``torch.manual_seed`` with
        the same number on all ranks. A router passed as a module keeps the weights it has.
        """
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        if self.w13.is_meta:
            return
        generator = torch.Generator(self.w13.device).manual_seed(seed)
        if self._owns_router:
            router: Any = self.router
            router.reset_parameters(self.init_std, generator)
        if self.shared_expert is not None:
            self.shared_expert.reset_parameters(self.init_std, generator)
        self._reset_experts(seed, self.init_std, generator)

    @classmethod
    def from_dense(
        cls,
        dense: MoELayer | Mapping[str, Tensor],
        *,
        group: Group = None,
        **options: Any,
    ) -> MoELayer:
        """A sharded layer with the weights of an unsharded one; every rank passes all of them.

        ``dense`` is a MoELayer of one rank, whose options are taken over, or its state dict (keys
        and shapes in the class docstring, with L = E), which needs ``topk=`` and, for anything but
        a default router, ``router=``. ``options`` are the constructor's, and win.

        Raises:
            ValueError: ``dense`` is sharded itself, or a state dict comes without ``topk``.
        """
        state: Mapping[str, Tensor]
        if isinstance(dense, MoELayer):
            if dense.world_size != 1:
                raise ValueError(
                    f"the layer is sharded over {dense.world_size} ranks, 1 is needed: pass its "
                    "full_state_dict() and topk="
                )
            state, found = dense.state_dict(), dense._options()
            if dense._owns_router:
                found["router"].num_sms = options.get("num_sms", dense.num_sms)
        else:
            if "topk" not in options:
                raise ValueError(
                    "a state dict does not say how many experts a token uses: pass topk="
                )
            state, found = dense, _options_from_shapes(dense)
        layer = cls(group=group, **(found | options))
        layer.load_dense_state_dict(state)
        return layer

    def close(self) -> None:
        """Frees the exchange buffers that the layer opened itself; all ranks call it together."""
        if self._owns_exchange and self.exchange is not None:
            self.exchange.close()
            self.exchange = None

    def extra_repr(self) -> str:
        return (
            f"hidden={self.hidden}, expert_hidden={self.expert_hidden}, top-{self.topk} of "
            f"{self.num_experts} experts, {self.num_local_slots} slots on rank {self.rank} of "
            f"{self.world_size}"
        )

    def _check_shape_and_device(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[-1] != self.hidden:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, its last dimension must be hidden={self.hidden}: "
                "pass the residual stream's activations"
            )
        if x.device != self.w13.device:
            raise ValueError(
                f"x is on {x.device}, the layer on {self.w13.device}: move one of them with .to()"
            )

    def row_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of dispatched rows and expert GEMMs: autocast's, else the parameters'."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        if x.dtype != self.w13.dtype:
            raise TypeError(
                f"x is {x.dtype}, the experts are {self.w13.dtype}: cast x, build the layer with "
                f"dtype={x.dtype}, or run it under torch.autocast"
            )
        return x.dtype

    def open_exchange(self, x_TH: Tensor) -> Exchange:
        """The exchange, created now if this is the first forward; checks the number of tokens."""
        if self.exchange is None:
            if self.max_tokens is None:
                self.max_tokens = self._largest_token_count(x_TH)
            self.exchange = Exchange(
                self.group,
                hidden=self.hidden,
                num_experts=self.num_slots,
                topk=self.topk,
                max_tokens=self.max_tokens,
                dtype=x_TH.dtype,
                backend=self.backend,
                comm_sms=self.comm_sms,
                form=self.form,
                max_rows=self.max_rows,
                timeout=self.timeout,
                device=x_TH.device,
            )
        limit = self.exchange.max_tokens
        if x_TH.shape[0] > limit:
            raise ValueError(
                f"x holds {x_TH.shape[0]} tokens, the exchange buffers {limit}: pass "
                f"max_tokens={x_TH.shape[0]} or more when the layer or its exchange is built"
            )
        return self.exchange

    def _largest_token_count(self, x_TH: Tensor) -> int:
        largest = torch.tensor(x_TH.shape[0], device=x_TH.device)
        if self.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return max(1, int(largest))

    def _check_sizes(self) -> None:
        if self.shared_expert_hidden:
            check_multiples_of_8(shared_expert_hidden=self.shared_expert_hidden)
        if not 1 <= self.topk <= self.num_experts:
            raise ValueError(
                f"topk={self.topk} is outside 1..{self.num_experts}: choose at most "
                f"num_experts={self.num_experts} experts a token"
            )

    def _check_exchange(self, exchange: Exchange) -> None:
        sizes = {"hidden": self.hidden, "topk": self.topk, "world_size": self.world_size}
        for name, ours in (sizes | {"num_experts": self.num_slots}).items():
            theirs = getattr(exchange, name)
            if theirs != ours:
                raise ValueError(
                    f"the shared exchange has {name}={theirs}, the layer {ours}: share an exchange "
                    "among layers of equal sizes only; its experts are the layer's slots"
                )

    def _options(self) -> dict[str, Any]:
        """Constructor options that :meth:`from_dense` takes over."""
        return {
            "hidden": self.hidden,
            "expert_hidden": self.expert_hidden,
            "num_experts": self.num_experts,
            "topk": self.topk,
            "backend": self.backend,
            "comm_sms": self.comm_sms,
            "form": self.form,
            "timeout": self.timeout,
            "payload": self.payload,
            "num_sms": self.num_sms,
            "precision": self.precision,
            "router": copy.deepcopy(self.router),
            "shared_expert_hidden": self.shared_expert_hidden,
            "aux_loss_coefficient": self.aux_loss_coefficient,
            "load_decay": self._load.decay,
            "init_std": self.init_std,
            "dtype": self.w13.dtype,
            "device": self.w13.device,
        }


class SharedExpert(nn.Module):
    """A dense SwiGLU for every token: ``w13`` [2D, H] (gate, then up), ``w2`` [H, D]."""

    def __init__(
        self,
        hidden: int,
        width: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(2 * width, hidden, dtype=dtype, device=device))
        self.w2 = nn.Parameter(torch.empty(hidden, width, dtype=dtype, device=device))

    @torch.no_grad()
    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        self.w13.normal_(0.0, std, generator=generator)
        self.w2.normal_(0.0, std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(swiglu(_linear(x, self.w13)), self.w2)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` in the dtype of `x`, whose weight may be the fp32 one that autocast leaves as it is.

    That one goes in as a parameter, whose gradient can wait, and autocast's rules cast it.
    """
    narrow = weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    if narrow and torch.amp.is_autocast_available(x.device.type):  # not for meta tensors
        with torch.autocast(x.device.type, x.dtype, cache_enabled=False):
            return linear(x, weight)
    return linear(x, weight.to(x.dtype))


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`, whose gradient goes where that of the weight would: to `main_grad`."""
    return carry_main_grad(weight, weight.to(dtype))


def _options_from_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of an unsharded layer from its state dict."""
    num_experts, double_width, hidden = state["w13"].shape
    shared = state.get("shared_expert.w2")
    return {
        "hidden": hidden,
        "expert_hidden": double_width // 2,
        "num_experts": num_experts,
        "router": "sigmoid" if "router.bias" in state else "softmax",
        "shared_expert_hidden": 0 if shared is None else shared.shape[1],
        "dtype": state["w13"].dtype,
        "device": state["w13"].device,
    }
