"""Bring rows of tensors that are sharded along their first dimension to the ranks that want them.

Letters: P ranks, N rows of a tensor on each rank; row i of rank r has the number r·N + i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["RowTransfer"]


class RowTransfer:
    """Who sends which rows to whom; made once, used for any number of tensors of any dtype.

    ``wanted[p]`` names, for some rows of a result on rank p, the numbers of the rows whose sum goes
    there, added in that order: a single number moves a row, none writes zeros. With two ranks,
    N = 2 and ``wanted = [{0: (3,)}, {0: (1, 2), 1: ()}]``, rank 0 gets the last row of rank 1 into
    its row 0; rank 1 gets the sum of rank 0's row 1 and its own row 0 into row 0, zeros into row 1.

    Every rank makes it from the same ``wanted`` and uses it for the same tensors in the same order.
    Where no rank wants a row of another, nothing is communicated.

    Args:
        wanted: [P] row of the result → numbers of rows.
        rows_per_rank: N.
        rank, group: this rank of the group; group None for one rank.
        device: where rows arrive; the group's backend sends from there.
    """

    def __init__(
        self,
        wanted: Sequence[Mapping[int, tuple[int, ...]]],
        rows_per_rank: int,
        *,
        rank: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.group, self.device = group, device
        # A row crosses once to each rank that wants it, however often; ascending numbers are in
        # order of their source ranks.
        needed = [sorted({row for rows in mine.values() for row in rows}) for mine in wanted]
        sent = [
            [row for row in rows if row // rows_per_rank == rank and peer != rank]
            for peer, rows in enumerate(needed)
        ]
        kept = [row for row in needed[rank] if row // rows_per_rank == rank]
        received = [row for row in needed[rank] if row // rows_per_rank != rank]
        sources = [row // rows_per_rank for row in received]
        self.send_counts = [len(rows) for rows in sent]
        self.receive_counts = [sources.count(peer) for peer in range(len(wanted))]
        self.communicates = any(
            row // rows_per_rank != peer for peer, rows in enumerate(needed) for row in rows
        )

        def on_device(rows: list[int]) -> Tensor:
            rows = [row - rank * rows_per_rank for row in rows]
            return torch.tensor(rows, dtype=torch.int64).to(device)

        self._sent, self._kept = on_device([row for rows in sent for row in rows]), on_device(kept)
        position = {row: place for place, row in enumerate(received + kept)}
        self._places = {
            target: tuple(position[row] for row in rows) for target, rows in wanted[rank].items()
        }

    @property
    def num_received(self) -> int:
        """Rows that come from other ranks."""
        return sum(self.receive_counts)

    def allocate(self, tensor: Tensor) -> Tensor:
        """Memory for the rows of a tensor that this rank needs."""
        count = self.num_received + len(self._kept)
        return torch.empty(count, *tensor.shape[1:], dtype=tensor.dtype, device=self.device)

    def fetch(self, tensor: Tensor, arrived: Tensor, timeout: float | None = None) -> None:
        """Fill `arrived`, from :meth:`allocate`. Collective; `tensor` [N, ...] stays as it is.

        Args:
            timeout: seconds that the host waits for the rows to arrive; None: no wait but the
                stream's on a GPU, the group's own timeout on a CPU.
        """
        received, kept = arrived.tensor_split([self.num_received])
        kept.copy_(_rows(tensor, self._kept))
        if not self.communicates:
            return
        work = dist.all_to_all_single(
            _as_bytes(received),  # gloo and NCCL refuse some dtypes, and none of them matters here
            _as_bytes(_rows(tensor, self._sent).to(self.device)),
            self.receive_counts,
            self.send_counts,
            group=self.group,
            async_op=True,
        )
        wait(work, timeout)

    def deliver(self, arrived: Tensor, result: Tensor) -> None:
        """Write the rows of ``result`` that this rank wants, in place and without allocating.

        Sums are added in the order of ``wanted`` in the result's dtype: the same bits everywhere.
        """
        for target, places in self._places.items():
            if not places:
                result[target].zero_()
                continue
            result[target].copy_(arrived[places[0]])
            for place in places[1:]:
                result[target].add_(arrived[place])

    def __call__(self, tensor: Tensor, result: Tensor | None = None) -> Tensor:
        """All at once, into ``result`` (may be ``tensor``) or as many rows as this rank wants."""
        if result is None:
            result = tensor.new_empty(len(self._places), *tensor.shape[1:])
        arrived = self.allocate(tensor)
        self.fetch(tensor, arrived)
        self.deliver(arrived, result)
        return result


def wait(work: Any, timeout: float | None) -> None:
    """Wait for an asynchronous collective, at most `timeout` seconds if given (RuntimeError)."""
    if timeout is None:
        work.wait()
    else:
        work.wait(timedelta(seconds=timeout))


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.detach().index_select(0, index.to(tensor.device))


def _as_bytes(rows: Tensor) -> Tensor:
    """[n, bytes of a row]; a view of contiguous rows."""
    width = math.prod(rows.shape[1:])
    return rows.view(len(rows), width).view(torch.uint8)
