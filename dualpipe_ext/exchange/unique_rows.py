"""What a dispatch of unique rows leaves in the receive buffer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["UniqueRows"]


@dataclass(frozen=True, eq=False)
class UniqueRows:
    """Every token that came to this rank, once; a context manager that releases the buffer.

    On the NVLink backend the tensors are the receive buffer itself: nothing is copied, and the
    channel's next call waits until they are released. Row [p, i] is the i-th token that rank p sent
    here; its rows in expert order are ``plan.expert_rows[p, i]``, and only i <
    ``plan.unique_counts[p]`` holds anything.

    Attributes:
        rows: [P, max_tokens, H] in the exchange's dtype, or float8_e4m3fn.
        scales: [P, max_tokens, ⌈H / 128⌉] fp32, factors of 128 columns each of fp8 rows, else None.
        topk_weight: [P, max_tokens, K] fp32, all routing weights of the token, or None.
        channel: "forward" or "backward".
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    topk_weight: torch.Tensor | None
    channel: str
    on_release: Callable[[], None]

    def release(self) -> None:
        """Give the buffer back, as of the work that the current stream has queued so far."""
        self.on_release()

    def __enter__(self) -> UniqueRows:
        return self

    def __exit__(self, *exception) -> None:
        self.release()
