"""How the router's kernels cut their work: columns of experts, splits, counters. No Triton in it.

Letters: T tokens, H hidden, E experts.
"""

from functools import lru_cache

import torch

from ..launch.arithmetic import ceil_div, power_of_two
from ..launch.zeros import keep_zeros

__all__ = [
    "MAX_COLUMNS",
    "block_of",
    "columns_of",
    "counters",
    "even_grid",
    "even_splits",
    "fits_hopper",
]

MAX_COLUMNS = 512
BLOCK_E = 128  # columns of a part at most
HOPPER_COLUMNS = 256  # of the kernels that are only for Hopper
HOPPER_TOKENS = 1 << 18  # whose probabilities add up in 46 bits with 2^-27 each
EVEN = 128  # SMs that work is cut for, whatever num_sms is, so that it changes no bit


def columns_of(num_experts: int, n_groups: int) -> tuple[int, int]:
    """Groups and experts a group of the kernel, both powers of two, 16 columns or more in all.

    256 experts in 8 groups → (8, 32); 15 in 3 → (4, 8); 6 in one → (1, 16).
    """
    groups = power_of_two(n_groups)
    size = power_of_two(num_experts // n_groups)
    return groups, max(size, 16 // groups)


def fits_hopper(tokens: int, num_experts: int, n_groups: int) -> bool:
    """Whether `router_hopper` and `router_backward_hopper` take as many, for x in bf16."""
    groups, size = columns_of(num_experts, n_groups)
    return groups * size <= HOPPER_COLUMNS and tokens <= HOPPER_TOKENS


def block_of(groups: int, size: int) -> tuple[int, int]:
    """Groups and experts a group of a part: (8, 32) → (4, 32), (1, 512) → (1, 128)."""
    passes = ceil_div(groups * size, BLOCK_E)
    return (groups // passes, size) if groups >= passes else (groups, size // passes)


def even_splits(tiles: int, most: int, least: int = 1) -> int:
    """Splits of every tile, so that all parts together fill rounds of 128 SMs.

    A part is charged 3 % of a tile for what it leaves in memory. 64 tiles → 2, 112 → 1, 16 → 8.
    """

    def time(splits):
        return ceil_div(tiles * splits, EVEN) * (1 / splits + 0.03)

    return min(range(least, max(least, min(most, 16)) + 1), key=time)


def even_grid(items: int, num_sms: int) -> int:
    """Programs, at most `num_sms`, of which none has two items more than another: 224 → 112."""
    rounds = ceil_div(items, max(1, num_sms))
    return max(1, ceil_div(items, max(1, rounds)))


def counters(like: torch.Tensor, count: int) -> torch.Tensor:
    """`count` or more int64 zeros, which a kernel leaves as zeros.

    One buffer for each stream, whose kernels run one after the other, since to clear one for every
    launch takes a launch of its own. A graph in the making gets its own, which it clears.
    """
    count = power_of_two(max(count, 1024))
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int64, device=like.device)
    return _stream_counters(torch.cuda.current_stream(like.device).cuda_stream, like.device, count)


@lru_cache(maxsize=64)
def _stream_counters(stream: int, device: torch.device, count: int) -> torch.Tensor:
    return keep_zeros(count, torch.int64, device)
