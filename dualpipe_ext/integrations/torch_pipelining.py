"""Our pair under `torch.distributed.pipelining`'s `ScheduleDualPipeV`.

from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleDualPipeV

pair = OverlappedPair(device, comm_sms=16)
modules = [PipelinedStage(stage, pair=pair) for stage in my_two_stages]
stages = [
    PipelineStage(m, index, 2 * ranks, device, group=group, dw_builder=m.take_weights)
    for m, index in zip(modules, (rank, 2 * ranks - 1 - rank))
]
schedule = ScheduleDualPipeV(stages, n_microbatches=16, loss_fn=loss_function)
overlap_pairs(schedule)
schedule.step(...)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..blocks.pair import OverlappedPair
from ..blocks.stage import TransformerStage
from .autograd_stage import AutogradStage, find_run, gradients_from_loss

__all__ = ["PipelinedStage", "overlap_pairs"]


class PipelinedStage(AutogradStage):
    """A stage for `torch.distributed.pipelining.PipelineStage`; see `AutogradStage`.

    Pass `take_weights` as its `dw_builder`: it calls that after every backward for the function
    that computes what this backward left, and runs it at once or as BACKWARD_WEIGHT.
    """

    def __init__(self, stage: TransformerStage, *, pair: OverlappedPair | None = None) -> None:
        self._left: list[Callable[[], None]] = []
        super().__init__(stage, pair=pair, delay=self._left.append)

    def take_weights(self) -> Callable[[], None]:
        left = self._left.copy()
        self._left.clear()

        def run() -> None:
            for compute in left:
                compute()

        return run


def overlap_pairs(schedule: Any) -> None:
    """Let `schedule` run every OVERLAP_F_B action, a forward and a full backward, as one pair.

    Its stages' modules are `PipelinedStage`s. Their forward and backward bookkeeping stays torch's:
    the pair runs first, then torch calls module and backward and gets what the pair has computed.

    Raises:
        ImportError: this torch has no OVERLAP_F_B: update it.
        TypeError: a stage's module is no PipelinedStage.
    """
    try:
        from torch.distributed.pipelining.schedules import OVERLAP_F_B
    except ImportError as error:
        raise ImportError(
            "torch.distributed.pipelining has no OVERLAP_F_B here: update torch, or "
            "use dualpipe_ext.Pipeline"
        ) from error
    for stage in schedule._stages:
        if not isinstance(stage.submod, PipelinedStage):
            raise TypeError(
                f"stage {stage.stage_index} holds a {type(stage.submod).__name__}: wrap a "
                "TransformerStage in a PipelinedStage"
            )
        _shield_from_inference(stage)
    schedule.register_custom_function(OVERLAP_F_B, _run_pair)


def _shield_from_inference(stage: Any) -> None:
    """torch asks a stage for gradients once to learn their shapes: no weight must see those."""
    compute = getattr(stage, "_compute_input_grads", None)
    if compute is None:  # an older torch does not ask
        return

    def compute_shapes(*args: Any, **kwargs: Any) -> Any:
        stage.submod.shapes_only = True
        try:
            return compute(*args, **kwargs)
        finally:
            stage.submod.shapes_only = False

    stage._compute_input_grads = compute_shapes


def _run_pair(action: Any, context: Any) -> None:
    schedule = context.schedule_ref
    stages = {stage.stage_index: stage for stage in schedule._stages}
    forward, backward = action.sub_actions
    f, b = stages[forward.stage_index], stages[backward.stage_index]
    i, j = forward.microbatch_index, backward.microbatch_index
    _wait(schedule.fwd_recv_ops, f, i, not f.is_first and f.stage_index - 1 not in stages)
    _wait(schedule.bwd_recv_ops, b, j, not b.is_last and b.stage_index + 1 not in stages)

    inputs = context.arg_mbs[i] if f.is_first else f._retrieve_recv_activations(i)
    loss = schedule._maybe_get_loss(b, j)
    outputs = b.fwd_cache[j][0]
    run = find_run(outputs[0] if isinstance(outputs, tuple) else outputs)
    if loss is None:
        gradients = b._retrieve_recv_grads(j)
    else:
        gradients = gradients_from_loss(loss, run, keep_graph=True)
    chunk = f.submod.stage.start_chunk(*inputs)
    _, run.gradients = f.submod.pair.run(chunk, run.chunk, gradients)
    f.submod.prepare(chunk)

    output = f.forward_one_chunk(i, context.arg_mbs[i], context.kwarg_mbs[i])
    schedule._maybe_compute_loss(f, output, context.target_mbs, i)
    if f.stage_index + 1 in stages:
        stages[f.stage_index + 1].set_local_fwd_input(output, i)
    schedule.backward_counter[b.stage_index] += 1
    last = schedule.backward_counter[b.stage_index] == schedule._n_microbatches
    b.backward_one_chunk(j, loss=loss, full_backward=True, last_backward=last)
    if b.stage_index - 1 in stages:
        stages[b.stage_index - 1].set_local_bwd_input(b.get_local_bwd_output(j), j)


def _wait(
    operations: dict[tuple[int, int], Any], stage: Any, microbatch: int, received: bool
) -> None:
    if received:
        for work in operations.pop((stage.stage_index, microbatch)):
            work.wait()
