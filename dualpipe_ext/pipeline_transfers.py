"""Activations and gradients between the ranks of a pipeline, asynchronous and in order.

Between two ranks tensors travel in each way in one order, that in which the source makes them,
gradient before activation where one pair makes both. Receives are posted one action ahead, so that
they come in while the action before computes; sends keep their tensors until they have left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import DualPipeError
from .pipeline_agreement import Agreement, seconds
from .schedule import Schedule, Transfer

__all__ = ["Links", "Signature", "Transfers"]

Signature = tuple[tuple[tuple[int, ...], torch.dtype], ...]
"""Shape and dtype of each tensor that one stage hands to the next."""

DEAD = "dead"  # published instead of a signature by a stage that failed before its first output
AHEAD = 1  # actions; a posted NCCL receive holds an SM while it waits, so not more


@dataclass
class _Incoming:
    """A tensor, or several of one output, on the way here."""

    transfer: Transfer
    tensors: tuple[Tensor, ...]
    works: list[dist.Work]


class Links:
    """What tensors travel in: on NCCL a communicator a neighbour and way, else the group.

    NCCL runs what goes through one communicator in one queue: a send would wait behind a receive
    that was posted ahead, and ranks could block each other in a ring. These are made without
    `dist.new_group`, which names groups of few ranks by how many a rank has made so far.

    Making one is collective over the group; ranks talk to the rank before and after them only.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, agreement: Agreement, device: torch.device
    ) -> None:
        self.rank, self.device = agreement.rank, device
        self._group, self._agreement = group, agreement
        self._own: dict[tuple[int, int], object] = {}  # by source and target
        if device.type == "cuda" and agreement.world_size > 1:
            self._open(_make_nccl)

    def send(self, tensor: Tensor, target: int) -> dist.Work:
        own = self._own.get((self.rank, target))
        if own is None:
            return dist.isend(tensor, group=self._group, group_dst=target)
        return own.send([tensor], 1, 0)

    def receive(self, tensor: Tensor, source: int) -> dist.Work:
        own = self._own.get((source, self.rank))
        if own is None:
            return dist.irecv(tensor, group=self._group, group_src=source)
        return own.recv([tensor], 0, 0)

    def close(self) -> None:
        for link in self._own.values():
            link.shutdown()
        self._own = {}

    def _open(self, make: Callable) -> None:
        """Along the chain, in one order on all ranks, because opening makes the host wait."""
        token = torch.zeros(1, device=self.device)
        for low in range(self._agreement.world_size - 1):
            for source, target in ((low, low + 1), (low + 1, low)):
                if self.rank == source or self.rank == target:
                    store = self._agreement.store(f"link/{source}/{target}")
                    position = int(self.rank == target)  # the source has rank 0, the target rank 1
                    self._own[source, target] = make(store, position, 2)
                if self.rank == source:
                    self.send(token, target).wait()
                elif self.rank == target:
                    self.receive(token, source).wait()


class Transfers:
    """The transfers of one step on one rank.

    Args:
        edges: signature of what stage s hands on in direction d, by (s, d): learnt in the first
            step, kept by the caller for the next ones. A stage's gradient has that of its outputs.
        generation: names this set of edges in the store.
    """

    def __init__(
        self,
        schedule: Schedule,
        links: Links,
        agreement: Agreement,
        edges: dict[tuple[int, int], Signature | str],
        generation: int,
        *,
        forward_only: bool,
    ) -> None:
        self._links, self._agreement = links, agreement
        self._edges, self._generation = edges, generation
        self.rank = links.rank
        self._queues: dict[int, deque[Transfer]] = {}  # to be received, by source
        self._outgoing: dict[tuple, Transfer] = {}
        self._posted: dict[tuple, _Incoming] = {}
        self._sent: dict[int, deque] = {}  # (transfer, works, tensors), by target
        self.broken = False
        for transfer in sorted(schedule.transfers(), key=_wire_order):
            if forward_only and transfer.tensor == "gradient":
                continue
            if transfer.target == self.rank:
                self._queues.setdefault(transfer.source, deque()).append(transfer)
            elif transfer.source == self.rank:
                self._outgoing[_key(transfer)] = transfer

    def post(self, position: int) -> None:
        """Post what the actions up to `position` + 1 need, as far as its shape is known."""
        for queue in self._queues.values():
            self._post(queue, position + AHEAD, wait=False)

    def receive(self, tensor: str, stage: int, chunk: int, direction: int) -> tuple[Tensor, ...]:
        """The tensors that `stage` made, on another rank; `tensor` "activation" or "gradient".

        Raises:
            DualPipeError: they did not come within the timeout, or the rank had failed.
        """
        key = (tensor, stage, chunk, direction)
        for queue in self._queues.values():
            for transfer in queue:
                if _key(transfer) == key:
                    self._post(queue, transfer.needed_by, wait=True)
                    break
        incoming = self._posted.pop(key, None)
        if incoming is None:  # taken off the queue, but never posted
            raise DualPipeError(f"stage {stage} failed on its rank before its first output")
        self._wait(incoming.works, f"the {tensor} of stage {stage}, chunk {chunk}", incoming)
        if tensor == "gradient":
            # Whoever sends a gradient had the activation, and all that was sent before it.
            self._release(incoming.transfer.source, ("activation", stage - 1, chunk, direction))
        return incoming.tensors

    def send(
        self, tensor: str, stage: int, chunk: int, direction: int, tensors: Sequence | None
    ) -> None:
        """Send what `stage` made. None after a failure: zeros, so that nobody waits in vain.

        Raises:
            ValueError: an output has another shape or dtype than in the chunks before.
        """
        transfer = self._outgoing.get((tensor, stage, chunk, direction))
        if transfer is None:  # sent before the failure
            return
        signature = self._signature(transfer, tensors)
        del self._outgoing[_key(transfer)]
        if signature == DEAD or self.broken:
            return
        if tensors is None:
            tensors = [None] * len(signature)
        self._poll(transfer.target)
        works, kept = [], []
        for (shape, dtype), found in zip(signature, tensors, strict=True):
            if tensor == "gradient" and not dtype.is_floating_point:
                continue
            if found is None:
                found = torch.zeros(shape, dtype=dtype, device=self._links.device)
            kept.append(found.contiguous())
            works.append(self._links.send(kept[-1], transfer.target))
        self._sent.setdefault(transfer.target, deque()).append((transfer, works, kept))

    def drop(self, tensor: str, stage: int, chunk: int, direction: int) -> None:
        """After a failure: let the tensors come in and forget them, so that nobody waits."""
        key = (tensor, stage, chunk, direction)
        queued = (_key(transfer) for queue in self._queues.values() for transfer in queue)
        if not self.broken and (key in self._posted or key in queued):
            with suppress(DualPipeError):  # they will not come
                self.receive(*key)

    def finish(self) -> None:
        """Wait until all that was sent has left (NCCL: make the current stream wait)."""
        for target, sent in self._sent.items():
            while sent and not self.broken:
                transfer, works, _ = sent.popleft()
                self._wait(works, f"rank {target} to take the {_name(transfer)}", None)

    def _post(self, queue: deque[Transfer], position: int, *, wait: bool) -> None:
        last = max((i for i, t in enumerate(queue) if t.needed_by <= position), default=-1)
        for _ in range(last + 1):
            signature = self._known(queue[0], wait=wait)
            if signature is None:
                return
            transfer = queue.popleft()
            if signature == DEAD or self.broken:
                continue
            gradient = transfer.tensor == "gradient"
            tensors, works = [], []
            for shape, dtype in signature:
                if gradient and not dtype.is_floating_point:
                    tensors.append(None)
                    continue
                tensors.append(torch.empty(shape, dtype=dtype, device=self._links.device))
                works.append(self._links.receive(tensors[-1], transfer.source))
            self._posted[_key(transfer)] = _Incoming(transfer, tuple(tensors), works)

    def _known(self, transfer: Transfer, *, wait: bool) -> Signature | str | None:
        """What will come; None if not known yet. Only the first activation of an edge is asked."""
        edge = _edge(transfer)
        if edge not in self._edges:
            found = self._agreement.look_up(self._name_of(edge), wait=wait)
            if found is None and wait:
                self.broken = True
                raise DualPipeError(
                    f"rank {self.rank} waited {self._agreement.timeout:g} s for rank "
                    f"{transfer.source} to make the {_name(transfer)}: it died, hangs or computes "
                    "longer; see its log, or raise `timeout`"
                )
            if found is None:
                return None
            self._edges[edge] = found
        return self._edges[edge]

    def _signature(self, transfer: Transfer, tensors: Sequence | None) -> Signature | str:
        """That of the edge, made known if this is its first activation, and checked."""
        edge = _edge(transfer)
        if transfer.tensor == "gradient":
            return self._edges[edge]
        found = DEAD if tensors is None else tuple((tuple(y.shape), y.dtype) for y in tensors)
        if edge not in self._edges:
            self._edges[edge] = found
            self._agreement.publish(self._name_of(edge), found)
        expected = self._edges[edge]
        if found not in (DEAD, expected):
            raise ValueError(
                f"stage {transfer.stage} returned {_describe(found)} for chunk {transfer.chunk}, "
                f"but {_describe(expected)} before: all chunks need equal shapes, pad them"
            )
        return expected

    def _wait(self, works: Sequence[dist.Work], what: str, incoming: _Incoming | None) -> None:
        try:
            for work in works:
                if self._links.device.type == "cuda":
                    work.wait()  # the stream waits, the host goes on; NCCL's watchdog has the limit
                else:
                    work.wait(seconds(self._agreement.timeout))
        except RuntimeError as error:
            self.broken = True
            source = "" if incoming is None else f" from rank {incoming.transfer.source}"
            raise DualPipeError(
                f"rank {self.rank} waited up to {self._agreement.timeout:g} s for {what}{source}: "
                f"that rank died, hangs or left the step; see its log ({error})"
            ) from error

    def _release(self, target: int, key: tuple) -> None:
        sent = self._sent.get(target, ())
        if any(_key(transfer) == key for transfer, _, _ in sent):
            done = False
            while not done:
                transfer, works, _ = sent.popleft()
                self._wait(works, f"rank {target} to take the {_name(transfer)}", None)
                done = _key(transfer) == key

    def _poll(self, target: int) -> None:
        """Let go of what has left meanwhile (Gloo does not know before it is waited for)."""
        sent = self._sent.get(target, ())
        while sent and all(work.is_completed() for work in sent[0][1]):
            sent.popleft()

    def _name_of(self, edge: tuple[int, int]) -> str:
        return f"signature/{self._generation}/{edge[0]}/{edge[1]}"


def _make_nccl(store, rank: int, size: int):
    return dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())


def _wire_order(transfer: Transfer) -> tuple:
    return transfer.source, transfer.sent_after, transfer.tensor == "activation"


def _key(transfer: Transfer) -> tuple:
    return transfer.tensor, transfer.stage, transfer.chunk, transfer.direction


def _edge(transfer: Transfer) -> tuple[int, int]:
    """The stage whose output it is, or is the gradient of, and the direction."""
    return transfer.stage - (transfer.tensor == "gradient"), transfer.direction


def _name(transfer: Transfer) -> str:
    return f"{transfer.tensor} of stage {transfer.stage}, chunk {transfer.chunk}"


def _describe(signature: Signature | str) -> str:
    if signature == DEAD:
        return "nothing"
    return ", ".join(
        f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in signature
    )
