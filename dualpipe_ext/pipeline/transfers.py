"""Activations and gradients between the ranks of a pipeline, asynchronous and in order.

Between two ranks tensors travel in each way in one order, that in which the source makes them,
gradient before activation where one pair makes both. What they travel in says how many actions
ahead of its use a receive is posted (`links.py`); sends keep their tensors until they have
left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DualPipeError, PeerTimeoutError
from ..ranks.agreement import Agreement
from .failure import Failure
from .links import AnyLinks, InFlight
from .packing import DEAD, Signature, item_parts, pack, travels
from .schedule import Schedule, Transfer

__all__ = ["Transfers", "incoming_bytes"]

Key = tuple[str, int, int, int]  # tensor, stage, chunk, direction


def incoming_bytes(
    schedule: Schedule, rank: int, edges: Mapping[tuple[int, int], Signature | str]
) -> dict[int, int]:
    """Bytes of the largest item that `rank` receives, by source.

    `edges` as in `Transfers`, all that the rank is an end of.
    """
    found: dict[int, int] = {}
    for direction in range(schedule.num_directions):
        for stage in range(schedule.num_stages - 1):
            ends = [schedule.rank_of(s, direction) for s in (stage, stage + 1)]
            if rank not in ends or ends[0] == ends[1]:
                continue
            gradient = rank == ends[0]
            source = ends[1] if gradient else ends[0]
            signature = edges[stage, direction]
            assert not isinstance(signature, str)  # a step that failed leaves no edges
            nbytes = pack(item_parts(signature, gradient=gradient))[1]
            found[source] = max(nbytes, found.get(source, 0))
    return found


@dataclass
class _Incoming:
    """An item on the way here."""

    transfer: Transfer
    signature: Signature
    moving: InFlight

    def tensors(self) -> tuple[Tensor | None, ...]:
        """None for what has no gradient. Once it has been waited for."""
        gradient, found = self.transfer.tensor == "gradient", iter(self.moving.tensors)
        return tuple(
            next(found) if travels(part, gradient=gradient) else None for part in self.signature
        )


class Transfers:
    """The transfers of one step on one rank.

    Args:
        edges: signature of what stage s hands on in direction d, by (s, d): learnt in the first
            step, kept by the caller for the next ones. A stage's gradient has that of its outputs.
        generation: names this set of edges in the store.
        failure: of the pipeline; its `links_broken` is set here.
    """

    def __init__(
        self,
        schedule: Schedule,
        links: AnyLinks,
        agreement: Agreement,
        edges: dict[tuple[int, int], Signature | str],
        generation: int,
        failure: Failure,
        *,
        forward_only: bool,
    ) -> None:
        self._failure = failure
        self._links, self._agreement = links, agreement
        self._edges, self._generation = edges, generation
        self.rank = agreement.rank
        self._queues: dict[int, deque[Transfer]] = {}  # to be received, by source
        self._outgoing: dict[Key, Transfer] = {}
        self._posted: dict[Key, _Incoming] = {}
        self._sent: dict[int, deque[tuple[Transfer, InFlight]]] = {}  # by target
        self._published: list[str] = []  # what this rank told the others
        for transfer in sorted(schedule.transfers(), key=_wire_order):
            if forward_only and transfer.tensor == "gradient":
                continue
            if transfer.target == self.rank:
                self._queues.setdefault(transfer.source, deque()).append(transfer)
            elif transfer.source == self.rank:
                self._outgoing[_key(transfer)] = transfer

    def post(self, position: int) -> None:
        """Post what the actions up to `position` need, and those as far ahead as the links say."""
        for queue in self._queues.values():
            self._post(queue, position + self._links.ahead, wait=False)

    def receive(
        self, tensor: str, stage: int, chunk: int, direction: int
    ) -> tuple[Tensor | None, ...]:
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
        what = f"the {tensor} of stage {stage}, chunk {chunk} from rank {incoming.transfer.source}"
        self._wait(incoming.moving, what)
        if tensor == "gradient":
            # Whoever sends a gradient had the activation, and all that was sent before it.
            self._release(incoming.transfer.source, ("activation", stage - 1, chunk, direction))
        return incoming.tensors()

    def send(
        self,
        tensor: str,
        stage: int,
        chunk: int,
        direction: int,
        tensors: Sequence[Tensor | None] | None,
    ) -> None:
        """Send what `stage` made. None after a failure: zeros, so that no rank waits in vain.

        Raises:
            ValueError: an output has another shape or dtype than in the chunks before, a gradient
                another than its tensor.
            DualPipeError: the connection broke.
        """
        transfer = self._outgoing.get((tensor, stage, chunk, direction))
        if transfer is None:  # sent before the failure
            return
        signature = self._signature(transfer, tensors)
        if not isinstance(signature, str) and not self._failure.links_broken:
            self._poll(transfer.target)
            item = self._item(transfer, signature, tensors)
            with self._watch():
                moving = self._links.send(item, transfer.target)
            sent = self._sent.setdefault(transfer.target, deque())
            sent.append((transfer, moving))
            if self._links.kept is not None and len(sent) > self._links.kept:
                self._let_go(transfer.target)
        del self._outgoing[_key(transfer)]

    def drop(self, tensor: str, stage: int, chunk: int, direction: int) -> None:
        """After a failure: let the tensors come in and forget them, so that no rank waits."""
        key = (tensor, stage, chunk, direction)
        queued = (_key(transfer) for queue in self._queues.values() for transfer in queue)
        if not self._failure.links_broken and (key in self._posted or key in queued):
            with suppress(DualPipeError):  # they will not come
                self.receive(*key)

    def finish(self) -> None:
        """Wait until all that was sent has left; on GPUs make the current stream wait.

        Raises:
            DualPipeError: it did not within the timeout, or a wait on the device has given up.
        """
        for target, sent in self._sent.items():
            while sent and not self._failure.links_broken:
                self._let_go(target)
        with self._watch():
            self._links.check()

    def forget(self) -> None:
        """Take back what this rank published, once all ranks are behind the step and know it.

        The store keeps every key: each new shape of the inputs would leave some there for good.
        """
        for name in self._published:
            with suppress(RuntimeError):  # a store that cannot delete
                self._agreement.store("published").delete_key(name)
        self._published = []

    def _post(self, queue: deque[Transfer], position: int, *, wait: bool) -> None:
        last = max((i for i, t in enumerate(queue) if t.needed_by <= position), default=-1)
        for _ in range(last + 1):
            signature = self._known(queue[0], wait=wait)
            if signature is None:
                return
            transfer = queue[0]
            if not isinstance(signature, str) and not self._failure.links_broken:
                parts = item_parts(signature, gradient=transfer.tensor == "gradient")
                with self._watch():
                    moving = self._links.receive(parts, transfer.source)
                self._posted[_key(transfer)] = _Incoming(transfer, signature, moving)
            queue.popleft()

    def _known(self, transfer: Transfer, *, wait: bool) -> Signature | str | None:
        """What will come; None if not known yet. Only the first activation of an edge is asked."""
        edge = _edge(transfer)
        if edge not in self._edges:
            found = self._agreement.look_up(self._name_of(edge), wait=wait)
            if found is None and wait:
                self._failure.links_broken = True
                raise DualPipeError(
                    f"rank {self.rank} waited {self._agreement.timeout:g} s for rank "
                    f"{transfer.source} to make the {_name(transfer)}: it died, hangs or computes "
                    "longer; see its log, or raise `timeout`"
                )
            if found is None:
                return None
            self._edges[edge] = found
        return self._edges[edge]

    def _signature(self, transfer: Transfer, tensors: Sequence[Any] | None) -> Signature | str:
        """That of the edge, made known if this is its first activation, and checked."""
        edge = _edge(transfer)
        if transfer.tensor == "gradient":
            return self._edges[edge]
        found = DEAD if tensors is None else tuple((tuple(y.shape), y.dtype) for y in tensors)
        if edge not in self._edges:
            self._edges[edge] = found
            self._agreement.publish(self._name_of(edge), found)
            self._published.append(self._name_of(edge))
        expected = self._edges[edge]
        if found not in (DEAD, expected):
            raise ValueError(
                f"stage {transfer.stage} returned {_describe(found)} for chunk {transfer.chunk}, "
                f"but {_describe(expected)} before: all chunks need equal shapes, pad them"
            )
        return expected

    def _item(
        self, transfer: Transfer, signature: Signature, tensors: Sequence[Tensor | None] | None
    ) -> list[Tensor]:
        """What travels; zeros for what is None."""
        found = []
        for i, part in enumerate(signature):
            if not travels(part, gradient=transfer.tensor == "gradient"):
                continue
            tensor = None if tensors is None else tensors[i]
            if tensor is None:
                shape, dtype = part
                tensor = torch.zeros(shape, dtype=dtype, device=self._links.device)
            if (tuple(tensor.shape), tensor.dtype) != part:  # it would not fit where it goes
                raise ValueError(
                    f"the {_name(transfer)} is {_describe(((tensor.shape, tensor.dtype),))}, its "
                    f"tensor {_describe((part,))}: return one like it"
                )
            found.append(tensor.contiguous())
        return found

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """After a wait on the device that gave up, or an error of the links, all is over."""
        try:
            yield
        except torch.OutOfMemoryError:  # of what comes; the links are as they were
            raise
        except PeerTimeoutError:
            self._failure.links_broken = True
            raise
        except RuntimeError as error:
            self._failure.links_broken = True
            raise DualPipeError(
                f"rank {self.rank} could not exchange tensors with its neighbours in the pipeline: "
                f"one died, hangs or left the step; see their logs ({error})"
            ) from error

    def _wait(self, moving: InFlight, what: str) -> None:
        try:
            moving.wait()
        except RuntimeError as error:
            self._failure.links_broken = True
            raise DualPipeError(
                f"rank {self.rank} waited up to {self._agreement.timeout:g} s for {what}: "
                f"that rank died, hangs or left the step; see its log ({error})"
            ) from error

    def _release(self, target: int, key: Key) -> None:
        sent = self._sent.get(target, ())
        if any(_key(transfer) == key for transfer, _ in sent):
            while _key(self._let_go(target)) != key:
                pass

    def _let_go(self, target: int) -> Transfer:
        """Wait for the oldest that was sent to `target`."""
        transfer, moving = self._sent[target].popleft()
        self._wait(moving, f"rank {target} to take the {_name(transfer)}")
        return transfer

    def _poll(self, target: int) -> None:
        """Let go of what has left meanwhile (Gloo does not know before it is waited for)."""
        sent = self._sent.get(target, ())
        while sent and sent[0][1].is_completed():
            sent.popleft()

    def _name_of(self, edge: tuple[int, int]) -> str:
        return f"signature/{self._generation}/{edge[0]}/{edge[1]}"


def _wire_order(transfer: Transfer) -> tuple[int, int, bool]:
    return transfer.source, transfer.sent_after, transfer.tensor == "activation"


def _key(transfer: Transfer) -> Key:
    return transfer.tensor, transfer.stage, transfer.chunk, transfer.direction


def _edge(transfer: Transfer) -> tuple[int, int]:
    """The stage whose output it is, or is the gradient of, and the direction."""
    return transfer.stage - (transfer.tensor == "gradient"), transfer.direction


def _name(transfer: Transfer) -> str:
    return f"{transfer.tensor} of stage {transfer.stage}, chunk {transfer.chunk}"


def _describe(signature: Signature | str) -> str:
    if isinstance(signature, str):  # DEAD
        return "nothing"
    return ", ".join(
        f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in signature
    )
