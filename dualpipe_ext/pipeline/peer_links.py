"""A pipeline's links between GPUs of one host: copy engines and peer memory, no SM.

Every link has `SLOTS` slots for items in the target's memory, used in turn. For item n, counted
from 1 over the life of the link,

    the source, on a stream of its own behind the tensors that it sends,
        waits until item n - SLOTS has been taken, copies into slot (n - 1) % SLOTS, tells the
        target that n is there;
    the target, on the stream that computes, when an action needs it,
        waits until n is there, copies it into new tensors, tells the source that n is taken.

The waits are kernels of one thread, and bounded. No such wait can be in the way of what it waits
for: the target takes items in order, so before it waits for n it has taken all before n, among
them n - SLOTS, which is all that n's source needs to go on. So the streams finish, with one slot
or more, as long as computing waits for received items only.

More holds with two slots or more: whatever a rank has queued finishes without anything that it
queues later, even if sends held up computing, as they do when streams share a hardware queue
(CUDA_DEVICE_MAX_CONNECTIONS=1) or when a kernel must be loaded, which may wait for running ones.
tests/test_pipeline_peer_links.py runs every kind of schedule so.

Memory: SLOTS times the largest item, for each of the one or two neighbours. At 4096 tokens of
hidden size 4096 in bf16 that is 134 MB a neighbour. What is sent stays alive for two more sends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import PeerTimeoutError
from ..ranks.backend import MAX_RANKS
from ..ranks.peer_memory import PeerMemory
from .packing import Part, pack

__all__ = ["SLOTS", "LinkLayout", "PeerLinks"]

SLOTS = 4  # items; at most 2 lie untaken in any kind of schedule of equal stages, and 2 to spare
LINE = 256  # bytes to which slots are rounded
WORD = 8  # bytes of a flag


@dataclass(frozen=True)
class LinkLayout:
    """Where everything lies in the peer memory, which is equally large on all ranks.

        arrived [MAX_RANKS] | taken [MAX_RANKS] | abort | slots of each link into this rank

    Flags are uint64, by source and by target.

    Attributes:
        slot_bytes: by (source, target).
    """

    slot_bytes: Mapping[tuple[int, int], int]

    @classmethod
    def of(cls, needs: Sequence[Mapping[int, int]]) -> LinkLayout:
        """`needs`: of every rank, the bytes of the largest item by source."""
        return cls(
            {
                (source, target): -(-nbytes // LINE) * LINE
                for target, theirs in enumerate(needs)
                for source, nbytes in sorted(theirs.items())
            }
        )

    def joined(self, other: LinkLayout) -> LinkLayout:
        """With room for the links of both."""
        mine, theirs = self.slot_bytes, other.slot_bytes
        links = {**mine, **theirs}
        return LinkLayout({link: max(mine.get(link, 0), theirs.get(link, 0)) for link in links})

    @staticmethod
    def arrived(source: int) -> int:
        """First byte, in the target's memory."""
        return WORD * source

    @staticmethod
    def taken(target: int) -> int:
        """First byte, in the source's memory."""
        return WORD * (MAX_RANKS + target)

    @property
    def abort(self) -> int:
        return WORD * 2 * MAX_RANKS

    def slot(self, source: int, target: int, sequence: int) -> int:
        """First byte, in the target's memory, of the slot that item `sequence` goes through."""
        links = [link for link in self.slot_bytes if link[1] == target]
        before = links[: links.index((source, target))]
        base = _round(self.abort + WORD) + SLOTS * sum(self.slot_bytes[link] for link in before)
        return base + (sequence - 1) % SLOTS * self.slot_bytes[source, target]

    @property
    def nbytes(self) -> int:
        ends = [self.slot(*link, SLOTS) + size for link, size in self.slot_bytes.items()]
        return max(ends, default=_round(self.abort + WORD))


@dataclass
class _Leaving:
    """A sent item; `tensors` must live until its copy is through, or `wait` has been called."""

    tensors: list[Tensor]
    through: torch.cuda.Event
    producer: torch.cuda.Stream

    def is_completed(self) -> bool:
        return bool(self.through.query())

    def wait(self) -> None:
        """The stream that made the tensors waits, and may reuse their memory then."""
        if self.tensors:
            self.producer.wait_event(self.through)
            self.tensors = []


@dataclass
class _Arriving:
    """A received item: the current stream has it when it comes to what is queued next."""

    tensors: list[Tensor]

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        """Nothing to wait for."""


@dataclass
class _End:
    """This rank's end of a link."""

    link: Any  # the extension's Link
    stream: torch.cuda.Stream | None = None  # at the source
    sequence: int = 0  # of the latest item


class PeerLinks:
    """All links of one rank with its neighbours. See the module.

    Making one is collective over the group; `PeerMemory.rendezvous` must be equal on all ranks.

    Args:
        layout: the same on all ranks.
        timeout: seconds that a wait on the device lasts at most. After one that gave up all
            others pass, what is received is worth nothing, and `check` raises.
    """

    name = "copy engines"
    ahead = 0  # actions: the stream would wait for what the action after this one needs
    kept = 2  # items to a target, whose copies are long through when the next but two leaves

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        rank: int,
        layout: LinkLayout,
        device: torch.device,
        timeout: float,
    ) -> None:
        from .. import _C

        self.device, self.layout, self._rank, self._timeout = device, layout, rank, timeout
        self._fault = torch.zeros(_C.LINK_FAULT_WORDS, dtype=torch.int64).pin_memory()
        self._memory = PeerMemory(group, layout.nbytes, device)
        here = self._memory.pointers[rank]
        self._ends: dict[tuple[int, int], _End] = {}
        for source, target in layout.slot_bytes:
            if rank not in (source, target):
                continue
            sends = rank == source
            peer = target if sends else source
            arrived, taken = layout.arrived(source), layout.taken(target)
            theirs, mine = (taken, arrived) if sends else (arrived, taken)
            link = _C.Link(
                device=device.index,
                peer=peer,
                sends=sends,
                theirs=here + theirs,
                mine=self._memory.pointers[peer] + mine,
                abort=here + layout.abort,
                fault=self._fault.data_ptr(),
                timeout=timeout,
            )
            # High priority: the flag should not wait for a GEMM's CTAs to end.
            stream = torch.cuda.Stream(device, priority=-1) if sends else None
            self._ends[source, target] = _End(link, stream)

    def send(self, tensors: list[Tensor], target: int) -> _Leaving:
        """Send contiguous `tensors`, made on the current stream.

        Raises:
            PeerTimeoutError: a wait before has given up.
        """
        self.check()
        end = self._ends[self._rank, target]
        assert end.stream is not None  # at the source
        end.sequence += 1
        slot = self._slot(self._rank, target, end.sequence)
        copies = [(slot + first, y.data_ptr(), y.nbytes) for first, y in _placed(tensors)]
        producer = torch.cuda.current_stream(self.device)
        end.stream.wait_stream(producer)
        awaited = max(0, end.sequence - SLOTS)
        end.link.move(awaited, copies, end.sequence, end.stream.cuda_stream)
        return _Leaving(tensors, end.stream.record_event(), producer)

    def receive(self, parts: Sequence[Part], source: int) -> _Arriving:
        """The next item of `source`, on the current stream.

        Raises:
            PeerTimeoutError: a wait before has given up.
        """
        self.check()
        end = self._ends[source, self._rank]
        tensors = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in parts]
        end.sequence += 1
        slot = self._slot(source, self._rank, end.sequence)
        copies = [(y.data_ptr(), slot + first, y.nbytes) for first, y in _placed(tensors)]
        stream = torch.cuda.current_stream(self.device).cuda_stream
        end.link.move(end.sequence, copies, end.sequence, stream)
        return _Arriving(tensors)

    def check(self) -> None:
        """Raise what a wait on the device has reported so far."""
        raised, peer, sends, expected, seen = self._fault.tolist()
        if raised:
            source, target = (self._rank, peer) if sends else (peer, self._rank)
            raise PeerTimeoutError(
                rank=self._rank,
                peer=peer,
                channel=f"pipeline, rank {source} to {target}",
                phase="send, waiting for a free slot" if sends else "receive, waiting for its data",
                expected=expected,
                seen=seen,
                timeout=self._timeout,
            )

    def close(self) -> None:
        """Wait for this rank's copies and let go of the memory."""
        torch.cuda.synchronize(self.device)
        self._ends = {}
        self._memory.close()

    def _slot(self, source: int, target: int, sequence: int) -> int:
        """The address at which this rank sees it."""
        return self._memory.pointers[target] + self.layout.slot(source, target, sequence)


def _placed(tensors: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """Each with its first byte in the slot."""
    first, _ = pack([(tuple(tensor.shape), tensor.dtype) for tensor in tensors])
    return list(zip(first, tensors, strict=True))


def _round(nbytes: int) -> int:
    return -(-nbytes // LINE) * LINE
