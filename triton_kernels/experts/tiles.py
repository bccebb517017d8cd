"""Which tile a program computes next, and the tile shapes of the grouped GEMMs in plain Triton.

They run on GPUs other than Hopper, which has gemm_hopper.py's, and for two-byte weight
gradients.

Letters: R rows in expert order, L local experts, H hidden, I expert width, M/N/K sides of a GEMM.

Every kernel is persistent: `num_sms` programs step through the tiles, `tile = pid, pid + num_sms,
...`, and read `expert_offsets` on the device. The host knows no group size, and a new R or
`num_sms` compiles nothing.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from ..launch.available import compiles

# Experts start at multiples of this (routing.ROW_ALIGNMENT): a tile has one expert and no mask.
BLOCK_M = 128


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Compile-time shape of one kernel.

    block_n, block_k  sides of a tile beside BLOCK_M = 128 rows; an fp32 accumulator of 128 x 256
                      over 8 warps is 128 registers a thread
    stages            TMA buffers in flight, (128 + block_n) * block_k * 2 bytes each
    split             the epilogue leaves in this many column strips through one shared buffer
    group_m           M tiles that share a strip of weights before the next N tile, for reuse in L2
    flatten           one loop over (tile, k): the next tile's loads fly during this one's epilogue
    """

    block_n: int
    block_k: int = 64
    stages: int
    split: int
    warps: int = 8
    group_m: int = 16
    flatten: bool = True


# Shared memory at two-byte elements, of 227 KiB: stages * (16 + block_n / 8) KiB, plus a strip of
# block_n / split / 4 KiB that leaves; half that for GATE_UP, whose strips are half as wide, twice
# that for fp32. SWIGLU_BACKWARD reads strips of gate and up besides, twice its own.
# Registers of 255, none spilled: GATE_UP 175, SWIGLU_BACKWARD 255, GEMM 165 to 179, WGRAD 154.
GATE_UP = TileConfig(block_n=256, stages=4, split=2)
SWIGLU_BACKWARD = TileConfig(block_n=256, stages=3, split=4)
GEMM = TileConfig(block_n=256, stages=4, split=2)
WGRAD = TileConfig(block_n=256, stages=4, split=2)
WGRAD_ACCUMULATE = TileConfig(block_n=256, stages=4, split=4)


@triton.jit
def locate_tile(
    tile,
    offsets_ptr,
    num_experts,
    num_n,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Expert, first row and N tile of a tile number; `STEPS` = ceil(log2(num_experts)).

    Tiles count expert by expert; inside an expert M runs fastest within groups of `GROUP_M`. With
    offsets [0, 0, 256] and `num_n` = 3, tiles 0, 1, 2 are (1, 0, 0), (1, 128, 0), (1, 0, 1).
    """
    row = tile // num_n * BLOCK_M
    # The last expert that starts at or before `row`: empty ones lose to the one that holds it.
    expert = 0
    for step in tl.static_range(STEPS):
        middle = tl.minimum(expert + (1 << (STEPS - 1 - step)), num_experts)
        expert = tl.where(tl.load(offsets_ptr + middle) <= row, middle, expert)
    start = tl.load(offsets_ptr + expert)
    num_m = (tl.load(offsets_ptr + expert + 1) - start) // BLOCK_M
    inside = tile - start // BLOCK_M * num_n
    group = inside // (GROUP_M * num_n)
    inside -= group * GROUP_M * num_n
    height = tl.minimum(num_m - group * GROUP_M, GROUP_M)
    return expert, start + (group * GROUP_M + inside % height) * BLOCK_M, inside // height


@triton.jit
def split_columns(x):
    """Left and right half of [rows, columns]: renames registers, an MMA thread has both halves."""
    rows: tl.constexpr = x.shape[0]
    half: tl.constexpr = x.shape[1] // 2
    return x.reshape(rows, 2, half).permute(0, 2, 1).split()


def is_hopper(device: torch.device) -> bool:
    """Whether the kernels of grouped_*hopper*.py run there: wgmma is Hopper's alone. Triton's
    interpreter has tensors on the CPU."""
    return _has_wgmma(device) and compiles("gluon")


@cache
def _has_wgmma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def search_steps(num_experts: int) -> int:
    """Halvings that `locate_tile` needs: 1 → 0, 2 → 1, 64 → 6, 65 → 7."""
    return (num_experts - 1).bit_length()
