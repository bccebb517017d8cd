"""Rows and weights as fp8 e4m3 with one fp32 scale for 1 × 128 or 128 × 128 of them.

As `dualpipe_ext.ops.fp8`, bit for bit: q = e4m3(x · (448 / amax)), x ≈ q · (amax / 448). Products
of fp8 numbers need both sides contiguous along K, so that a weight is kept in both orientations: as
it is for the forward, transposed for the backward for inputs. A square's scale is that of its
transpose.
"""

import torch
import triton
import triton.language as tl

from ..elementwise import fp8
from ..elementwise.fp8 import BLOCK
from ..launch.arithmetic import ceil_div
from ..launch.cached import cache_launches

__all__ = ["quantize_rows", "quantize_weights"]

VECTOR = 16  # fp8 numbers: widths come as multiples of it, so that the compiler knows they are
E4M3_MAX, SMALLEST_AMAX = tl.constexpr(fp8.E4M3_MAX), tl.constexpr(fp8.SMALLEST_AMAX)

# A tile of rows: 32 · 1024 bf16 numbers are 64 KiB in flight an SM, twice what hides a loaded
# latency of 1 µs at 30 bytes a ns, and 4 vectors of 16 bytes a thread.
ROWS, CHUNK, WARPS = 32, 1024, 32


@triton.jit
def to_fp8(x, dtype: tl.constexpr):
    """x [rows, blocks, 128] fp32 as e4m3, and the blocks' scales [rows, blocks, 1]."""
    amax = tl.maximum(tl.max(tl.abs(x), axis=2, keep_dims=True), SMALLEST_AMAX)
    largest = tl.full(amax.shape, E4M3_MAX, tl.float32)
    return (x * tl.div_rn(largest, amax)).to(dtype), tl.div_rn(amax, largest)


@cache_launches
@triton.jit(do_not_specialize=["num_experts", "R", "vectors"])
def quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    offsets_ptr,
    num_experts,
    R,
    vectors,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    K = vectors * VECTOR
    chunks = tl.cdiv(K, CHUNK)
    num_tiles = tl.cdiv(tl.load(offsets_ptr + num_experts), ROWS) * chunks
    blocks = tl.arange(0, CHUNK // BLOCK)[None, :, None]
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row = tile // chunks * ROWS + tl.arange(0, ROWS)
        block = tile % chunks * (CHUNK // BLOCK) + blocks
        column = block * BLOCK + tl.arange(0, BLOCK)[None, None, :]
        place = row.to(tl.int64)[:, None, None] * K + column
        # The last offset is a multiple of 128: a tile has all its rows.
        x = tl.load(x_ptr + place, mask=column < K, other=0).to(tl.float32)
        q, scale = to_fp8(x, q_ptr.dtype.element_ty)
        tl.store(q_ptr + place, q, mask=column < K)
        target = scale_ptr + block.to(tl.int64) * R + row[:, None, None]
        tl.store(target, scale, mask=block * BLOCK < K)


@cache_launches
@triton.jit(do_not_specialize=["vectors_n", "vectors_k"])
def quantize_weights_kernel(
    weight_ptr,
    q_ptr,
    transposed_ptr,
    scale_ptr,
    vectors_n,
    vectors_k,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    N, K = vectors_n * VECTOR, vectors_k * VECTOR
    blocks_n, blocks_k = tl.cdiv(N, BLOCK), tl.cdiv(K, BLOCK)
    square = tl.program_id(0)
    expert = square // (blocks_n * blocks_k)
    first_n = square // blocks_k % blocks_n * BLOCK
    first_k = square % blocks_k * BLOCK
    n = (first_n + tl.arange(0, BLOCK))[:, None]
    k = (first_k + tl.arange(0, BLOCK))[None, :]
    matrix = expert.to(tl.int64) * N * K
    inside = (n < N) & (k < K)
    x = tl.load(weight_ptr + matrix + (n * K + k), mask=inside, other=0)
    amax = tl.max(tl.max(tl.abs(x), axis=1), axis=0).to(tl.float32)
    amax = tl.maximum(amax, SMALLEST_AMAX)
    largest = tl.full((), E4M3_MAX, tl.float32)
    scale = tl.div_rn(largest, amax)
    q = (x.to(tl.float32) * scale).to(q_ptr.dtype.element_ty)
    tl.store(scale_ptr + square, tl.div_rn(amax, largest))
    tl.store(q_ptr + matrix + (n * K + k), q, mask=inside)
    n = (first_n + tl.arange(0, BLOCK))[None, :]
    k = (first_k + tl.arange(0, BLOCK))[:, None]
    q = (tl.trans(x).to(tl.float32) * scale).to(q_ptr.dtype.element_ty)
    tl.store(transposed_ptr + matrix + (k * N + n), q, mask=(n < N) & (k < K))


def quantize_rows(
    x: torch.Tensor, expert_offsets: torch.Tensor, *, num_sms: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds the rows of all experts to fp8.

    x               [R, K] contiguous, K a multiple of 16
    expert_offsets  [L + 1] int32, multiples of 128, last <= R

    Returns q [R, K] e4m3 and scales [ceil(K / 128), R] fp32, x[r, c] ≈ q[r, c] scales[c // 128, r],
    of the rows before expert_offsets[-1]; the rest is not written.
    """
    R, K = x.shape
    _check_widths(x, K)
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = x.new_empty((ceil_div(K, BLOCK), R), dtype=torch.float32)
    tiles = R // ROWS * ceil_div(K, CHUNK)
    quantize_rows_kernel[(max(1, min(num_sms, tiles)),)](
        x,
        q,
        scales,
        expert_offsets,
        expert_offsets.shape[0] - 1,
        R,
        K // VECTOR,
        BLOCK=BLOCK,
        VECTOR=VECTOR,
        ROWS=ROWS,
        CHUNK=CHUNK,
        num_warps=WARPS,
    )
    return q, scales


def quantize_weights(
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds expert weights to fp8, in both orientations; on all SMs, once a training step.

    weight  [L, N, K] contiguous, N and K multiples of 16

    Returns q [L, N, K] and its transpose [L, K, N] in e4m3, and the scales
    [L, ceil(N / 128), ceil(K / 128)] fp32; those of the transpose are `scales.transpose(1, 2)`.
    """
    L, N, K = weight.shape
    _check_widths(weight, N, K)
    q = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    transposed = q.new_empty((L, K, N))
    scales = weight.new_empty((L, ceil_div(N, BLOCK), ceil_div(K, BLOCK)), dtype=torch.float32)
    quantize_weights_kernel[(scales.numel(),)](
        weight,
        q,
        transposed,
        scales,
        N // VECTOR,
        K // VECTOR,
        BLOCK=BLOCK,
        VECTOR=VECTOR,
        num_warps=16,
    )
    return q, transposed, scales


def _check_widths(x: torch.Tensor, *widths: int) -> None:
    if any(width % VECTOR for width in widths) or not x.is_contiguous():
        raise ValueError(
            f"{tuple(x.shape)} with strides {x.stride()} cannot be moved 16 fp8 numbers at a time: "
            f"pass contiguous numbers, and {widths} as multiples of {VECTOR}"
        )
