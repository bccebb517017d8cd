"""What the tensors of a pipeline travel in, from rank to rank.

An item is what a stage hands on for one chunk: its outputs, or the gradients of its inputs. Items
of one source and target arrive in the order in which they were sent, and both ends know shapes and
dtypes beforehand. Four kinds of links:

    group         without a GPU: the process group, usually gloo's
    host          GPUs, in a step that learns the shapes: through host memory, by Gloo
    copy engines  GPUs of one host, from then on: `peer_links.py`
    nccl          other GPUs, from then on

Of each, `ahead` says how many actions before its use a receive is posted, and `kept` how many sent
items a target may have under way before computing waits for the oldest, to free it; None: any.

CUDA loads a kernel at its first launch and may wait, for that, until running kernels end. If one
of these waits for a rank that needs our next kernel, no rank goes on: a process that began with a
step of dualpipe over NCCL hung on two GPUs. Through the host no kernel waits for a rank, so the
step in which everything is new uses that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import DualPipeError
from ..ranks.agreement import Agreement, seconds
from ..ranks.backend import choose_backend
from ..ranks.groups import host_identity
from ..ranks.peer_memory import PeerMemory
from .packing import Part, pack, unpack
from .peer_links import LinkLayout, PeerLinks

__all__ = ["AnyLinks", "GroupLinks", "HostLinks", "InFlight", "Links", "Moving", "NcclLinks"]

Connection: TypeAlias = Any  # torch's dist.Backend, which is declared without send and recv


class InFlight(Protocol):
    """An item on its way, in any kind of links."""

    tensors: list[Tensor]

    def is_completed(self) -> bool: ...
    def wait(self) -> None: ...


@dataclass
class Moving:
    """An item on its way. Its `tensors` must live until it is through, or `wait` has been called.

    With a `limit` the host waits, else the current stream does and NCCL's watchdog has one.
    """

    tensors: list[Tensor]
    works: list[Any]  # dist.Work
    limit: timedelta | None

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self.works)

    def wait(self) -> None:
        """Raises RuntimeError when the limit is over or the other rank is gone."""
        for work in self.works:
            if self.limit is None:
                work.wait()
            else:
                work.wait(self.limit)


class GroupLinks:
    """The process group itself, a message a tensor."""

    name = "group"
    ahead = 1  # actions: what one needs is on its way while the one before computes
    kept = None

    def __init__(
        self, group: dist.ProcessGroup | None, agreement: Agreement, device: torch.device
    ) -> None:
        self.device = device
        self._group, self._limit = group, seconds(agreement.timeout)

    def send(self, tensors: list[Tensor], target: int) -> Moving:
        works = [dist.isend(tensor, group=self._group, group_dst=target) for tensor in tensors]
        return Moving(tensors, works, self._limit)

    def receive(self, parts: Sequence[Part], source: int) -> Moving:
        tensors = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in parts]
        works = [dist.irecv(tensor, group=self._group, group_src=source) for tensor in tensors]
        return Moving(tensors, works, self._limit)

    def check(self) -> None:
        """Nothing waits on a device."""

    def close(self) -> None:
        """The group is not ours."""


class NcclLinks:
    """A communicator a neighbour and way.

    NCCL runs what goes through one communicator in one queue: a send would wait behind a receive
    that was posted ahead, and ranks could block each other in a ring.
    """

    name = "nccl"
    ahead = 1  # actions: a posted receive holds SMs while it waits, so not more
    kept = None

    def __init__(self, agreement: Agreement, device: torch.device) -> None:
        self.device, self._rank = device, agreement.rank
        # The ranks agree on a step's end within the timeout. The watchdog, which ends the process,
        # comes after that.
        limit = 2 * seconds(agreement.timeout)
        self._own = open_chain(
            agreement,
            lambda store, rank, size: _make_nccl(store, rank, size, limit),
            self.name,
            device,
        )

    def send(self, tensors: list[Tensor], target: int) -> Moving:
        own = self._own[self._rank, target]
        return Moving(tensors, [own.send([tensor], 1, 0) for tensor in tensors], None)

    def receive(self, parts: Sequence[Part], source: int) -> Moving:
        own = self._own[source, self._rank]
        tensors = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in parts]
        return Moving(tensors, [own.recv([tensor], 0, 0) for tensor in tensors], None)

    def check(self) -> None:
        """NCCL's watchdog has the limit."""

    def close(self) -> None:
        for own in self._own.values():
            own.shutdown()
        self._own = {}


class HostLinks:
    """Through host memory: a Gloo connection a neighbour and way, a message an item.

    `send` waits until the device has made the tensors, `wait` of what comes until it is here.
    """

    name = "host"
    ahead = 1
    kept = None

    def __init__(self, agreement: Agreement, device: torch.device) -> None:
        self.device, self._rank = device, agreement.rank
        self._limit = seconds(agreement.timeout)
        self._own = open_chain(
            agreement,
            lambda store, rank, size: dist.ProcessGroupGloo(store, rank, size, self._limit),
            self.name,
            torch.device("cpu"),
        )

    def send(self, tensors: list[Tensor], target: int) -> Moving:
        parts = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        buffer = _host_buffer(parts)
        for tensor, part in zip(tensors, unpack(buffer, parts), strict=True):
            part.copy_(tensor.detach())
        # An empty message is none.
        works = [self._own[self._rank, target].send([buffer], 1, 0)] if len(buffer) else []
        return Moving([buffer], works, self._limit)

    def receive(self, parts: Sequence[Part], source: int) -> Moving:
        tensors = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in parts]
        buffer = _host_buffer(parts)
        works = [self._own[source, self._rank].recv([buffer], 0, 0)] if len(buffer) else []
        return _FromHost(tensors, works, self._limit, unpack(buffer, parts))

    def check(self) -> None:
        """Nothing waits on a device."""

    def close(self) -> None:
        self._own = {}


@dataclass
class _FromHost(Moving):
    """`wait` copies `found`, on the host, to the tensors."""

    found: list[Tensor]

    def wait(self) -> None:
        super().wait()
        for tensor, found in zip(self.tensors, self.found, strict=True):
            tensor.copy_(found)


AnyLinks = GroupLinks | HostLinks | NcclLinks | PeerLinks


class Links:
    """All links of a pipeline; `current` are those of the running step.

    Attributes:
        reason: why they are what they are, in plain words.

    Making them is collective over the group, and so are `choose` and `close`.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, agreement: Agreement, device: torch.device
    ) -> None:
        self._group, self._agreement, self._device = group, agreement, device
        self.current: AnyLinks = GroupLinks(group, agreement, device)
        self.reason = "one rank" if device.type == "cuda" else "no GPU"
        self._host: HostLinks | None = None
        self._peer: PeerLinks | None = None
        self._nccl: NcclLinks | None = None
        self._obstacle: str | None = None
        if device.type == "cuda" and agreement.world_size > 1:
            self._host = HostLinks(agreement, device)

    def choose(self, needs: Sequence[Mapping[int, int]] | None) -> None:
        """Choose `current` for a step.

        Args:
            needs: of every rank, the bytes of the largest item by source; None if the step is to
                learn them. The same on all ranks.
        """
        if self._host is None:
            return
        if needs is None:
            self.current, self.reason = self._host, "the shapes are not known yet"
            return
        if self._nccl is None:
            layout = LinkLayout.of(needs)
            if self._peer is not None:  # larger shapes than before make it anew, smaller do not
                layout = self._peer.layout.joined(layout)
            if self._peer is None or self._peer.layout != layout:
                self._open(layout)
        links = self._peer if self._nccl is None else self._nccl
        assert links is not None
        self.current = links
        self.reason = self._obstacle or "all GPUs reach each other"

    def check(self) -> None:
        """Raises PeerTimeoutError if a wait on the device has given up so far."""
        if self._peer is not None:
            self._peer.check()

    def close(self) -> None:
        for links in (self._peer, self._nccl, self._host):
            if links is not None:
                links.close()
        self._peer = self._nccl = None

    def _open(self, layout: LinkLayout) -> None:
        """Peer memory for `layout` where all ranks can have it, else NCCL."""
        if self._peer is not None:
            before, self._peer = self._peer, None
            before.close()
            before.check()
        self._obstacle = self._find_obstacle()
        if self._obstacle is not None:
            self._nccl = NcclLinks(self._agreement, self._device)
            return
        timeout = self._agreement.timeout
        self._peer = PeerLinks(self._group, self._agreement.rank, layout, self._device, timeout)

    def _find_obstacle(self) -> str | None:
        """What keeps the ranks from peer memory; the same answer on all."""
        name, reason = choose_backend("auto", self._device, self._agreement.world_size)
        mine = (None if name == "nvlink" else reason, host_identity(), PeerMemory.rendezvous)
        records = self._agreement.gather("open links between GPUs", mine)
        for rank, (text, *_) in enumerate(records):
            if text is not None:
                return f"rank {rank}: {text}"
        if any(host != mine[1] for _, host, _ in records):
            return "the pipeline spans several hosts"
        counts = [count for *_, count in records]
        if min(counts) != max(counts):  # torch would hang, see PeerMemory
            return f"the ranks have opened {counts} peer memories so far, not equally many"
        return None


def open_chain(
    agreement: Agreement,
    make: Callable[[dist.Store, int, int], Connection],
    name: str,
    device: torch.device,
) -> dict[tuple[int, int], Connection]:
    """`make(store, rank, size)` for this rank's neighbours and both ways, by (source, target).

    Along the chain, in one order on all ranks, because opening makes the host wait. The source has
    rank 0 in the new communicator, the target rank 1. Made without `dist.new_group`, which names
    groups of few ranks by how many a rank has made so far.

    Raises:
        DualPipeError: a neighbour did not come in time.
    """
    own, token = {}, torch.zeros(1, device=device)
    for low in range(agreement.world_size - 1):
        for source, target in ((low, low + 1), (low + 1, low)):
            if agreement.rank not in (source, target):
                continue
            store = agreement.store(f"link/{name}/{source}/{target}")
            try:
                link = make(store, int(agreement.rank == target), 2)
                if agreement.rank == source:
                    link.send([token], 1, 0).wait()
                else:
                    link.recv([token], 0, 0).wait()
            except RuntimeError as error:
                raise DualPipeError(
                    f"rank {agreement.rank} could not connect to its neighbour in the pipeline, "
                    f"ranks {source} to {target}, over {name} ({error}): see that rank's log; "
                    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network"
                ) from error
            own[source, target] = link
    return own


def _make_nccl(store: dist.Store, rank: int, size: int, limit: timedelta) -> Connection:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _host_buffer(parts: Sequence[Part]) -> Tensor:
    return torch.empty(pack(parts)[1], dtype=torch.uint8)
