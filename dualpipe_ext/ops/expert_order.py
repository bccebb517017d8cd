"""Rows in expert order: each expert's rows follow those of the expert before it."""

from __future__ import annotations

from itertools import pairwise

import torch

__all__ = ["ROW_ALIGNMENT", "expert_spans"]

# Every expert starts at a multiple of this many rows, the M tile of the grouped GEMMs: a tile has
# one expert. Padding rows are zero.
ROW_ALIGNMENT = 128


def expert_spans(expert_offsets: torch.Tensor, R: int) -> list[tuple[int, int]]:
    """First and end row of each expert, read on the host.

    Args:
        expert_offsets: [L + 1] int32, as `Plan.expert_offsets`.
        R: rows that there are.
    """
    offsets = expert_offsets.tolist()
    spans = list(pairwise(offsets))
    if offsets[0] != 0 or offsets[-1] > R or any(a > b or a % ROW_ALIGNMENT for a, b in spans):
        raise ValueError(
            f"expert_offsets={offsets}: pass rising multiples of {ROW_ALIGNMENT} from 0 to at most "
            f"R={R}, as in Plan.expert_offsets"
        )
    return spans
