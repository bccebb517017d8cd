"""Memory that every rank of a group can read and write over NVLink."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..compat import symmetric_memory

__all__ = ["PeerMemory"]


class PeerMemory:
    """The same number of bytes on every rank, zeroed, each mapped on all ranks.

    Built on torch symmetric memory; alone (``group=None``) it is an ordinary tensor. Its own signal
    pads stay unused: they may serve one stream only.

    Args:
        group: the ranks that share it, or None for one rank.
        nbytes: bytes on each rank.
        device: this rank's CUDA device.

    Making one is collective. ``pointers[p]`` is the address at which this rank sees rank p's bytes.
    ``PeerMemory.rendezvous`` counts how many this process has made with others: torch (2.11, 2.13)
    numbers its own rendezvous by process, not by group, so two ranks that come with different
    counts would wait for each other forever. Compare the counts first.

    Raises:
        RuntimeError: the driver refused to map a peer's memory.
    """

    rendezvous = 0

    def __init__(self, group: dist.ProcessGroup | None, nbytes: int, device: torch.device):
        self.nbytes = nbytes
        self._handle: Any = None  # of torch, or none for one rank
        self._buffer: torch.Tensor | None
        if group is None or dist.get_world_size(group) == 1:
            self._buffer = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            self.pointers = [self._buffer.data_ptr()]
            return
        memory = symmetric_memory()
        self._buffer = memory.empty(nbytes, dtype=torch.uint8, device=device)
        PeerMemory.rendezvous += 1
        self._handle = memory.rendezvous(self._buffer, group)
        # With a memory pool below it, the tensor need not start at its segment's first byte.
        inside = self._buffer.data_ptr() - self._handle.buffer_ptrs[self._handle.rank]
        self.pointers = [pointer + inside for pointer in self._handle.buffer_ptrs]
        self._buffer.zero_()
        torch.cuda.synchronize(device)
        dist.barrier(group)  # no rank may signal into memory that its owner still clears

    def part(self, first: int, count: int) -> torch.Tensor:
        """[count] uint8, this rank's own bytes from `first` on."""
        assert self._buffer is not None, "closed"
        return self._buffer[first : first + count]

    def close(self) -> None:
        """Let go of the memory; a peer's mapping keeps it alive for that peer."""
        self._buffer = self._handle = None
        self.pointers = []
