"""Stages wrapped in DistributedDataParallel or FSDP2: one reduction after the last micro-batch.

Both reduce a gradient from a hook in the backward of autograd. Under a pipeline that would be
once a chunk, and for a delayed weight gradient before it is there. So their hooks are told to wait
during a step, parameters stay unsharded, and one reduction of everything follows the step's last
weight gradient. It uses what torch.distributed.pipelining uses for the same purpose.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["GradientSync", "unwrap"]


def unwrap(module: nn.Module) -> nn.Module:
    """What DistributedDataParallel wraps; any other module is itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


class GradientSync:
    """One step of one stage. Plain modules need nothing.

    Like both wrappers, `end` averages over the data-parallel group. Parameters that DDP was told to
    ignore (`_ddp_params_and_buffers_to_ignore`), such as expert-parallel ones, stay as they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self._ddp = module if isinstance(module, DistributedDataParallel) else None
        self._sharded = _sharded_modules(module)

    def begin(self) -> None:
        """Gather sharded parameters, and keep hooks from reducing until `end`."""
        for root in self._sharded[:1]:
            root._get_fsdp_state()._lazy_init()  # the stage's segments do not call the root itself
            root.set_reshard_after_forward(False)
            root.set_reshard_after_backward(False)
            root.set_requires_gradient_sync(False)
            root.set_is_last_backward(False)
        handles = [module.unshard(async_op=True) for module in self._sharded]
        for handle in handles:
            if handle is not None:
                handle.wait()

    def end(self, reduce: bool, *, forward_only: bool = False) -> None:
        """`reduce`: average the gradients now; else they go on adding up in the next step."""
        if self._ddp is not None and reduce and self._ddp.require_backward_grad_sync:
            self._reduce_ddp()
        if self._sharded and reduce:
            self._reduce_sharded()
        elif self._sharded and forward_only:
            for module in self._sharded:
                module.reshard()

    def _reduce_ddp(self) -> None:
        """Fire DDP's hooks once: a backward that adds zeros to what the chunks left."""
        ignored = getattr(self._ddp.module, "_ddp_params_and_buffers_to_ignore", ())
        parameters = [
            parameter
            for name, parameter in self._ddp.module.named_parameters()
            if parameter.requires_grad and name not in ignored
        ]
        zeros = [parameter.new_zeros(()).expand_as(parameter) for parameter in parameters]
        self._ddp.reducer.prepare_for_backward([])
        torch.autograd.backward(parameters, zeros)

    def _reduce_sharded(self) -> None:
        root = self._sharded[0]
        root.set_is_last_backward(True)
        root.set_reshard_after_backward(True)
        root.set_requires_gradient_sync(True)
        state = root._get_fsdp_state()
        for inner in state._state_ctx.all_states:
            if inner._fsdp_param_group:
                inner._fsdp_param_group.post_backward()
        state._root_post_backward_final_callback()


def _sharded_modules(module: nn.Module) -> list:
    """The FSDP2 modules of a stage, its root first."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    found = [inner for inner in module.modules() if isinstance(inner, FSDPModule)]
    if found and found[0] is not module:
        raise ValueError(
            f"{type(found[0]).__name__} inside the stage is wrapped by fully_shard, the stage is "
            "not: call fully_shard(stage) last"
        )
    return found
