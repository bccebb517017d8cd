"""The tensors of an item, one behind the other in one piece of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "DEAD", "Part", "Signature", "item_parts", "pack", "travels", "unpack"]

Part = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""

Signature = tuple[Part, ...]
"""What one stage hands to the next."""

DEAD = "dead"  # in place of the signature of a stage that failed before its first output
ALIGNMENT = 16  # bytes at which each tensor begins


def travels(part: Part, *, gradient: bool) -> bool:
    """Whether it is part of the item: whole numbers have no gradient."""
    return not gradient or part[1].is_floating_point


def item_parts(signature: Signature, *, gradient: bool) -> tuple[Part, ...]:
    """What travels of outputs with this signature, or of their gradients."""
    return tuple(part for part in signature if travels(part, gradient=gradient))


def pack(parts: Sequence[Part]) -> tuple[list[int], int]:
    """First byte of each tensor, and bytes of all.

    For example ([3], bf16), ([2, 2], int64) begin at 0 and 16 and take 48.
    """
    first, end = [], 0
    for shape, dtype in parts:
        first.append(end)
        end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return first, end


def unpack(buffer: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """The tensors in `buffer` [bytes] uint8, which they share."""
    found = []
    for begin, (shape, dtype) in zip(pack(parts)[0], parts, strict=True):
        count = math.prod(shape) * dtype.itemsize
        found.append(buffer[begin : begin + count].view(dtype).view(shape))
    return found
