"""Runs a schedule: a model in stages over the ranks of a group, micro-batch by micro-batch.

See `schedule.py` for the kinds, their stages per rank and the least number of chunks, `simulate.py`
for the time they take, `blocks/pair.py` for what happens inside an overlapped pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..blocks.pair import OverlappedPair
from ..blocks.stage import Criterion
from ..errors import DualPipeError, PeerTimeoutError
from ..gradients.data_parallel import GradientSync, unwrap
from ..ops.main_grad import gradient_of
from ..ranks.agreement import Agreement, seconds
from ..ranks.groups import Group, process_group
from .failure import Cause, Failure
from .links import Links
from .packing import Signature
from .schedule import Schedule, build_schedule
from .step import Batch, Step, cut_batch
from .transfers import Transfers, incoming_bytes

__all__ = ["Pipeline", "StepResult"]


SHAPES = 64  # of inputs, whose edges are kept
LONGEST = 1e9  # seconds; kernels count a limit's nanoseconds in 64 bits

Edges = dict[tuple[int, int], Signature | str]  # see `Transfers`


class StepResult(NamedTuple):
    """What a step returns, on ranks where the last stage is; elsewhere None and ().

    `losses` [chunks], detached, in the order of the micro-batches; `outputs` of the last stage, the
    micro-batches joined again, if they were asked for.
    """

    losses: Tensor | None
    outputs: tuple[Tensor, ...]


class _Beginning(NamedTuple):
    """What the ranks tell each other before a step."""

    num_chunks: int
    forward_only: bool
    signature: tuple[Any, ...] | None  # of a chunk's inputs, and what autocast makes of them
    problem: str | None
    broken: bool  # the rank leaves: its GPU gave up waiting


class Pipeline:
    """A model cut into stages, one or two of them on this rank.

    Example, two ranks, four stages in a V::

        first, last = build_stages(rank)           # stages rank and 3 - rank
        pipeline = Pipeline([first, last], schedule="dualpipev", group=group)
        losses, _ = pipeline.step(
            *([tokens] if rank == 0 else []),      # rank 0 holds the first stage ...
            num_chunks=8,
            criterion=loss_function,               # ... and, in a V, the last
            labels=[labels] if rank == 0 else [],
        )
        optimizer.step()

    A stage is any nn.Module that maps tensors to a tensor or a tuple of them. A `TransformerStage`
    gives real overlapped pairs and split backwards; any other module runs whole, a pair as backward
    and forward one after the other, its backward split as far as it is built of `DelayedLinear`
    (else I does all and W nothing). A class with DeepSeek's `overlapped_forward_backward` has that
    called for pairs. Modules may be wrapped in DistributedDataParallel or FSDP2's `fully_shard`:
    gradients are reduced once, after the step's last weight gradient
    (`gradients/data_parallel.py`).

    Gradients are sums over the chunks: a criterion that means the mean divides by their number. In
    dualpipe each stage lives on two ranks; their gradients are summed at the end of `step`.

    Args:
        modules: the stages of this rank, in the order of `Schedule.stages_of(rank)`: for dualpipev
            and zbv stages r and 2R-1-r, for dualpipe stages r and R-1-r, else stage r.
        schedule: "dualpipe", "dualpipev", "1f1b", "zb1p" or "zbv".
        group: of the pipeline's ranks, R of them; None for one rank without any group. Expert
            groups lie across: the ranks of one hold equal stages of different pipelines.
        device: where activations live; None takes that of the first parameter.
        timeout: seconds to wait for another rank, on the host and on the GPU, at most 1e9. Where
            tensors travel by NCCL its own process group has the limit. A stage that fails is an
            error in its own pipeline at once; in others, whose stages wait for it in an expert
            group, when the limit of that exchange or process group is over.
        weight_delay, comm_sms, num_sms: see `OverlappedPair`; the first also says what an I leaves
            for its W.
        recompute: run stages that are no `TransformerStage` again for their backward and keep
            their inputs only, without DeepSeek's hook, which needs their graphs. TransformerStages
            have an option of their own.

    Attributes:
        links: what tensors travel in, see `links.py`: `links.current.name` of the latest
            step and `links.reason`. On GPUs a step whose inputs have shapes that none had before
            goes through the host, which is slow: use few shapes.

    Making one is collective over the group, and so is every step.

    Raises:
        ValueError: a wrong argument, or ranks disagree on one (on every rank).
        DualPipeError: a rank did not come within the timeout.
    """

    def __init__(
        self,
        modules: nn.Module | Sequence[nn.Module],
        *,
        schedule: str = "dualpipev",
        group: Group = None,
        device: torch.device | str | None = None,
        timeout: float = 100.0,
        weight_delay: str = "all",
        comm_sms: int | float | None = None,
        num_sms: int | None = None,
        recompute: bool = False,
    ) -> None:
        self.modules: tuple[nn.Module, ...]
        if isinstance(modules, nn.Module) and not isinstance(modules, nn.ModuleList):
            self.modules = (modules,)
        else:
            self.modules = tuple(modules)
        self.kind, self.group, self.timeout = schedule.lower(), process_group(group), timeout
        self.weight_delay, self.recompute = weight_delay, recompute
        # A wrong limit is an error on all ranks, for which this one waits as others do.
        self._agreement = Agreement(self.group, timeout if _is_limit(timeout) else 100.0)
        self.rank, self.num_ranks = self._agreement.rank, self._agreement.world_size
        self._check()
        self.device = self._find_device(device)
        self.links = Links(self.group, self._agreement, self.device)
        self.pair = OverlappedPair(
            self.device,
            comm_sms=comm_sms,
            num_sms=num_sms,
            weight_delay=weight_delay,
        )
        self._schedule: Schedule | None = None
        # Of all ranks' inputs, in the step before; the edges that belong to them (`Transfers`);
        # what all ranks receive with them (`Links.choose`), None while that is learnt.
        self._signatures: tuple[Any, ...] | None = None
        self._edges: Edges = {}
        self._needs: list[dict[int, int]] | None = None
        self._learnt: dict[tuple[Any, ...], Edges] = {}  # edges by signatures
        self._generation = 0  # of edges
        self.failure = Failure()
        self._closed = False

    def step(
        self,
        *inputs: Tensor,
        num_chunks: int,
        criterion: Criterion | None = None,
        labels: Sequence[Tensor] = (),
        batch_dim: int = 0,
        return_outputs: bool = False,
        sync_gradients: bool = True,
    ) -> StepResult:
        """One training step; under `torch.no_grad()` the forward only, of every schedule.

        Args:
            inputs: of the first stage, on the rank that holds it; cut along `batch_dim` into equal
                chunks. In dualpipe rank 0 and rank R-1 each bring half of the batch.
            num_chunks: M, micro-batches of all directions, equal on all ranks.
            criterion, labels: loss = criterion(*outputs, *labels) of each chunk, on the rank that
                holds the last stage (in dualpipe rank R-1 those for rank 0's inputs, and rank 0
                those for rank R-1's). `labels` are cut like the inputs.
            return_outputs: also return what the last stage gave.
            sync_gradients: False leaves gradients local: for all but the last of several steps
                before an optimizer step.

        Raises:
            ValueError: wrong sizes, a stage that returned a view or other shapes than before, ...:
                on the rank it happened; also any error of a stage's own.
            DualPipeError: on all other ranks then, with its text; or a rank went missing.
                Gradients are in no defined state after either: zero them.
            PeerTimeoutError: the GPU gave up waiting for another rank, in this step or the one
                before: its results are wrong. `check` tells after a synchronization.
        """
        if self._closed:
            raise DualPipeError("the pipeline is closed: make a new Pipeline")
        self.failure.check()
        self.failure.begin_step()
        forward_only = not torch.is_grad_enabled()
        schedule, batch = self._begin(
            inputs, labels, criterion, num_chunks, batch_dim, forward_only
        )
        transfers = Transfers(
            *(schedule, self.links.current, self._agreement, self._edges, self._generation),
            self.failure,
            forward_only=forward_only,
        )
        step = Step(
            *(self, schedule, transfers, batch, criterion),
            forward_only=forward_only,
            return_outputs=return_outputs,
        )
        syncs = []
        with self.failure.watch():
            for module in self.modules:
                syncs.append(GradientSync(module))
                syncs[-1].begin()
        step.run()
        self._end(transfers)
        reduce = sync_gradients and not forward_only
        for sync in syncs:
            sync.end(reduce, forward_only=forward_only)
        if reduce:
            self.sum_copies()
        return StepResult(step.losses(), step.outputs(batch_dim))

    @torch.no_grad()
    def sum_copies(self) -> None:
        """Sum the gradients of dualpipe's two copies of each stage; nothing to do elsewhere.

        `step` does it. A missing gradient counts as zero; `main_grad` is summed where there is one.
        """
        if self.kind != "dualpipe":
            return
        assert self.group is not None  # of two ranks or more
        mirror = self.num_ranks - 1 - self.rank
        # Both ranks of a pair take the lower rank's first stage first.
        try:
            for mine in (0, 1) if self.rank < mirror else (1, 0):
                _sum_with(mirror, unwrap(self.modules[mine]), self.group, self.timeout)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            text = (
                f"rank {self.rank} waited up to {self.timeout:g} s for the gradients of rank "
                f"{mirror}, which has copies of its stages: that rank died, hangs or called "
                f"something else; see its log ({error})"
            )
            self.failure.end(text)
            raise DualPipeError(text) from error

    def check(self) -> None:
        """Raise PeerTimeoutError if, so far, the GPU has given up waiting for another rank.

        The host runs ahead of the GPU: synchronize first to hear of all that was queued.
        """
        self.links.check()

    def close(self) -> None:
        """Let go of memory and connections that the pipeline opened on GPUs; all ranks together.

        After it there are no more steps. Closing again does nothing.
        """
        if not self._closed:
            self._closed = True
            self.links.close()

    def __repr__(self) -> str:
        return f"Pipeline({self.kind!r}, rank {self.rank}/{self.num_ranks}, {self.device})"

    def _check(self) -> None:
        """Raise on every rank what is wrong on one."""
        problem: Exception | None = None
        try:
            # The least number of chunks that every kind takes: checks kind and number of ranks.
            schedule = build_schedule(self.kind, self.num_ranks, 2 * self.num_ranks)
            stages = schedule.stages_of(self.rank)
            if len(self.modules) != len(stages):
                raise ValueError(
                    f"{len(self.modules)} modules for {self.kind!r}: rank {self.rank} of "
                    f"{self.num_ranks} holds the stages {stages}, pass one module for each"
                )
            if not _is_limit(self.timeout):
                raise ValueError(
                    f"timeout={self.timeout!r} is no number of seconds above 0 and up to "
                    f"{LONGEST:g}: pass one, 100.0"
                )
        except ValueError as error:
            problem = error
        mine = (self.kind, self.weight_delay, None if problem is None else str(problem))
        records = self._agreement.gather("open the pipeline", mine)
        if problem is not None:
            raise problem
        for rank, (kind, weight_delay, text) in enumerate(records):
            if text is not None:
                raise ValueError(f"rank {rank}: {text}")
            if (kind, weight_delay) != mine[:2]:
                raise ValueError(
                    f"schedule and weight_delay are {kind!r} and {weight_delay!r} on rank {rank}, "
                    f"here {self.kind!r} and {self.weight_delay!r}: pass the same on every rank"
                )

    def _find_device(self, device: torch.device | str | None) -> torch.device:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            parameters = (p for module in self.modules for p in module.parameters())
            device = next((p.device for p in parameters), device)
        found = torch.device(device)
        if found.type == "cuda" and found.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return found

    def _begin(
        self,
        inputs: Sequence[Tensor],
        labels: Sequence[Tensor],
        criterion: Criterion | None,
        num_chunks: int,
        batch_dim: int,
        forward_only: bool,
    ) -> tuple[Schedule, Batch]:
        """The schedule and this rank's chunks, once all ranks agree."""
        problem: Exception | None = None
        batch, signature = Batch((), ()), None
        try:
            self.links.check()
            if self._schedule is None or self._schedule.num_chunks != num_chunks:
                self._schedule = build_schedule(self.kind, self.num_ranks, num_chunks)
            batch = cut_batch(
                *(self._schedule, self.rank, inputs, labels, batch_dim),
                needs_criterion=criterion is None and not forward_only,
            )
            signature = (batch.signature(), _autocast_dtype(self.device))
        except Exception as error:  # whatever it is, the others must hear of it
            problem = error
        broken = isinstance(problem, PeerTimeoutError)
        text = None if problem is None else str(problem)
        mine = _Beginning(num_chunks, forward_only, signature, text, broken)
        if broken:  # leave word and go: the rank that did not come may be gone
            assert problem is not None
            self.failure.end(text)
            self._agreement.gather("begin the step", mine, wait=False)
            raise problem
        try:
            records = self._agreement.gather("begin the step", mine)
        except DualPipeError as error:  # from here on ranks would take each other's old words
            self.failure.end(str(error))
            raise
        if problem is not None:
            raise problem
        for rank, theirs in enumerate(records):
            if theirs.broken:
                self.failure.end(theirs.problem)
                raise DualPipeError(f"rank {rank} of the pipeline failed: {theirs.problem}")
            if theirs.problem is not None:
                raise ValueError(f"rank {rank}: {theirs.problem}")
            if theirs[:2] != mine[:2]:
                raise ValueError(
                    f"(num_chunks, forward only) is {theirs[:2]} on rank {rank}, here {mine[:2]}: "
                    "pass the same on every rank, and use torch.no_grad() on all or none"
                )
        try:
            self._recall(tuple(theirs.signature for theirs in records))
        except Exception as error:  # the others go on, and wait up to the limit
            self.failure.end(f"{type(error).__name__}: {error}")
            raise
        assert self._schedule is not None
        return self._schedule, batch

    def _end(self, transfers: Transfers) -> None:
        """Raise on every rank what went wrong on one."""
        failure, error = self.failure, self.failure.error
        text, cause, links_broken = failure.text, failure.cause, failure.links_broken
        failure.begin_step()  # an error's frames hold the step's tensors
        what = "finish the step"
        if links_broken:  # no rank can tell who still comes: leave word and go
            assert error is not None
            failure.end(text)
            self._agreement.gather(what, (text, cause, True), wait=False)
            raise error
        try:
            records = self._agreement.gather(what, (text, cause, False))
        except DualPipeError as missing:
            failure.end(str(missing))
            raise (error or missing) from missing
        transfers.forget()
        for rank, (found, _, broken) in enumerate(records):
            if broken:  # it will not come to the next step
                failure.end(f"rank {rank} failed: {found}")
        failed = [(cause, rank) for rank, (found, cause, _) in enumerate(records) if found]
        if not failed:
            assert self._signatures is not None  # since `_begin`
            self._learnt[self._signatures] = self._edges
            return
        self._learnt.clear()  # not all ranks may have learnt all
        self._signatures = None
        if error is not None and cause == Cause.HERE:
            raise error
        _, rank = min(failed)  # causes come before what they led to
        raise DualPipeError(f"rank {rank} of the pipeline failed: {records[rank][0]}") from error

    def _recall(self, signatures: tuple[Any, ...]) -> None:
        """Choose edges and links for a step with these inputs; alike on all ranks."""
        if signatures != self._signatures:
            self._signatures, self._needs = signatures, None
            edges = self._learnt.get(signatures)
            if edges is None:
                self._generation += 1
            self._edges = {} if edges is None else edges
        if self._needs is None and signatures in self._learnt:
            assert self._schedule is not None
            mine = incoming_bytes(self._schedule, self.rank, self._edges)
            self._needs = self._agreement.gather("tell the sizes of what it receives", mine)
        while len(self._learnt) > SHAPES:
            del self._learnt[next(iter(self._learnt))]
        self.links.choose(self._needs)


def _is_limit(timeout: object) -> bool:
    return isinstance(timeout, Real) and bool(0 < cast(Any, timeout) <= LONGEST)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Stages make other dtypes under it of the same inputs."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def _sum_with(other: int, module: nn.Module, group: dist.ProcessGroup, timeout: float) -> None:
    """Add the gradients of `module` and of rank `other`'s copy, on both.

    Raises RuntimeError if the other rank does not come. NCCL has a limit of its own.
    """
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        gradient = gradient_of(parameter)
        if gradient is None:
            gradient = parameter.grad = torch.zeros_like(parameter)
        if hasattr(gradient, "to_local"):  # sharded by FSDP2, both copies alike
            gradient = gradient.to_local()
        by_kind.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    for gradients in by_kind.values():
        for bucket in _buckets(gradients):
            mine = torch.cat([gradient.flatten() for gradient in bucket])
            theirs = torch.empty_like(mine)
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, mine, group=group, group_peer=other),
                    dist.P2POp(dist.irecv, theirs, group=group, group_peer=other),
                ]
            )
            for work in works:
                work.wait(*([seconds(timeout)] if mine.device.type == "cpu" else []))
            parts = theirs.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.add_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """In order, about 64 Mi numbers each: two of them are all that the sum needs beside."""
    found: list[list[Tensor]] = [[]]
    room = 0
    for gradient in gradients:
        if found[-1] and gradient.numel() > room:
            found.append([])
        room = (room if found[-1] else 2**26) - gradient.numel()
        found[-1].append(gradient)
    return found
