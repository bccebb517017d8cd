"""Our pair under DeepSeek's own `DualPipe` and `DualPipeV` (github.com/deepseek-ai/DualPipe).

    from dualpipe import DualPipeV, set_p2p_tensor_dtype, set_p2p_tensor_shapes
    from dualpipe_ext.integrations.deepseek import DualPipeStage

    pair = OverlappedPair(device, comm_sms=16)
    modules = [DualPipeStage(stage, pair=pair) for stage in my_two_stages]
    DualPipeV(modules, process_group=group).step(...)

Their runtime calls the class method `overlapped_forward_backward` for pairs, and puts weight
gradients off through `WeightGradStore`: both lead here. Outputs are fresh tensors, as it demands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks.pair import OverlappedPair
from ..blocks.stage import Criterion, TransformerStage
from .autograd_stage import AutogradStage, find_run, gradients_from_loss

__all__ = ["DualPipeStage"]


class DualPipeStage(AutogradStage):
    """A stage for `DualPipe([stage, stage])`; see `AutogradStage`.

    `store` is `dualpipe.utils.WeightGradStore`, by default that of the installed package; without
    the package weight gradients come with the others.
    """

    def __init__(
        self, stage: TransformerStage, *, pair: OverlappedPair | None = None, store: Any = None
    ) -> None:
        super().__init__(stage, pair=pair, delay=self._put_off)
        if store is None:
            try:
                from dualpipe.utils import WeightGradStore

                store = WeightGradStore
            except ImportError:
                store = None
        self.store = store

    def _put_off(self, compute: Callable[[], None]) -> None:
        if self.store is not None and self.store.enabled:
            self.store.put(compute)
        else:
            compute()

    @classmethod
    def overlapped_forward_backward(
        cls,
        module0: AutogradStage,
        inputs0: Sequence[Tensor],
        criterion0: Criterion | None,
        labels0: Sequence[Tensor],
        module1: AutogradStage,
        loss1: Tensor | None,
        outputs1: Sequence[Tensor],
        output_grads1: Sequence[Tensor | None],
    ) -> tuple[list[Tensor], Tensor | None]:
        """A forward of `module0` with the whole backward of an earlier chunk of `module1`.

        Returns module0's outputs, a list, and its loss or None; leaves gradients in module1's
        parameters and in the `grad` of the inputs its chunk began with.
        """
        if loss1 is None:
            run = find_run(outputs1[0])
            given = {y.output_nr: dy for y, dy in zip(outputs1, output_grads1, strict=True)}
            gradients = tuple(given.get(i) for i in range(len(run.floating)))
        else:
            run = find_run(loss1)
            gradients = gradients_from_loss(loss1, run)
        chunk0 = module0.stage.start_chunk(*inputs0)
        _, found = module0.pair.run(chunk0, run.chunk, gradients)
        reached = [
            (x, dx)
            for x, dx in zip(run.inputs, found, strict=True)
            if dx is not None and x.requires_grad
        ]
        if reached:
            ends, given_ends = zip(*reached, strict=True)
            torch.autograd.backward(ends, given_ends)
        run.chunk = run.inputs = None
        if loss1 is not None:
            loss1.detach_()
        outputs0 = list(module0.attach(chunk0, inputs0))
        loss0 = None if criterion0 is None else criterion0(*outputs0, *labels0)
        return outputs0, loss0
