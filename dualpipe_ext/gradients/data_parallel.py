"""Stages wrapped in DistributedDataParallel or FSDP2: one reduction after the last micro-batch.

Both reduce a gradient from a hook in the backward of autograd. Under a pipeline that would be
once a chunk, and for a delayed weight gradient before it is there. So their hooks are told to wait
during a step, parameters stay unsharded, and one reduction of everything follows the step's last
weight gradient. It uses what torch.distributed.pipelining uses for the same purpose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..compat import average_ddp_gradients, begin_fsdp_step, end_fsdp_step

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
            begin_fsdp_step(root)
        handles = [module.unshard(async_op=True) for module in self._sharded]
        for handle in handles:
            if handle is not None:
                handle.wait()

    def end(self, reduce: bool, *, forward_only: bool = False) -> None:
        """`reduce`: average the gradients now; else they go on adding up in the next step."""
        if self._ddp is not None and reduce and self._ddp.require_backward_grad_sync:
            average_ddp_gradients(self._ddp)
        if self._sharded and reduce:
            end_fsdp_step(self._sharded[0])
        elif self._sharded and forward_only:
            for module in self._sharded:
                module.reshard()


def _sharded_modules(module: nn.Module) -> list[Any]:
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
