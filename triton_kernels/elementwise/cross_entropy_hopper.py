"""The loss of cross-entropy alone, with every row in the hands of one warp; `cross_entropy` has the
arithmetic and the gradient.

Letters: T rows, V vocabulary. An SM takes 2.2 µs to fetch the 64 KB of 32768 bf16 numbers, 1.2 for
their exponentials and about as long for the rest. Threads that share a row do one after the other,
since they meet for its sum: 2.7 µs a row. Here a program's 16 warps have a row each and never meet.
They drift apart, and some compute while others wait for memory: a warp asks for 4 KB and computes
the 4 KB before, across the end of a row, too.

Where rows are few, 2 to 16 warps have a part of a row each, and do meet at its end: a warp alone
takes 20 µs for 64 KB. The number of parts is known at run time, so no count of rows compiles anew.
"""

from functools import lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..launch.arithmetic import ceil_div
from ..launch.cached import cache_launches

__all__ = ["cross_entropy_loss"]

WARPS, VECTORS = 16, 8  # of a program; of 16 bytes, that a thread asks for at once
SMS = 132  # for which parts are chosen; from the rows alone, so that num_sms changes no bits
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
NEVER = gl.constexpr(-3.0e38)  # below every finite maximum, and 2^(-inf − NEVER) is 0, not NaN


@gluon.jit
def load_words(
    words_ptr, place, vectors, first, WIDTH: gl.constexpr, BF16: gl.constexpr, layout: gl.constexpr
):
    """WIDTH words of two numbers of each part from word `first` on, two of -inf past its vectors of
    four words. (Times four here: Triton 3.8 does not see a multiple of 4 through gl.where, and
    would load word by word.)"""
    LOWEST: gl.constexpr = -0x007F0080 if BF16 else -0x03FF0400
    column = first + gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)), 0)
    mask = column < gl.expand_dims(vectors, 1) * 4
    return gl.load(words_ptr + (gl.expand_dims(place, 1) + column), mask=mask, other=LOWEST)


@gluon.jit
def both(words, BF16: gl.constexpr):
    """The numbers of words, as fp32: the low ones, the high ones."""
    if BF16:
        low = (words << 16).to(gl.float32, bitcast=True)
        high = (words & -65536).to(gl.float32, bitcast=True)
    else:
        low = words.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        high = (words >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return low, high


@gluon.jit
def add_words(words, biggest, total, BF16: gl.constexpr):
    """Each row's maximum of x · log2 e and sum of 2^(x · log2 e − maximum), with words more."""
    low, high = both(words, BF16)
    higher = gl.maximum(biggest, gl.max(gl.maximum(low, high), axis=1) * LOG2E)
    shift = gl.expand_dims(higher, 1)
    power = gl.exp2(low * LOG2E - shift) + gl.exp2(high * LOG2E - shift)
    return higher, total * gl.exp2(biggest - higher) + gl.sum(power, axis=1)


@gluon.jit
def log2_of_sums(biggest, total, shift, inside: gl.constexpr):
    """Of what the warps have: Σ total · 2^biggest over the 2^shift parts of each one's row."""
    n: gl.constexpr = biggest.shape[0]
    if shift != 0:
        pairs: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [n, 1], [1, 0])
        others: gl.constexpr = gl.SliceLayout(0, pairs)
        mine = gl.expand_dims(gl.arange(0, n, gl.SliceLayout(1, pairs)) >> shift, 1)
        same = mine == gl.expand_dims(gl.arange(0, n, others) >> shift, 0)
        bounds = gl.expand_dims(gl.convert_layout(biggest, others), 0)
        sums = gl.expand_dims(gl.convert_layout(total, others), 0)
        highest = gl.max(gl.where(same, bounds, NEVER), axis=1)
        power = gl.exp2(bounds - gl.expand_dims(highest, 1))
        total = gl.convert_layout(gl.sum(gl.where(same, sums * power, 0.0), axis=1), inside)
        biggest = gl.convert_layout(highest, inside)
    return biggest + gl.log2(total)


@cache_launches
@gluon.jit(do_not_specialize=["row_words", "num_rows", "shift", "ignore_index"])
def loss_kernel(
    logits_ptr,
    words_ptr,
    targets_ptr,
    loss_ptr,
    lse_ptr,
    row_words,
    num_rows,
    shift,
    ignore_index,
    z_loss,
    V: gl.constexpr,
    VECTORS: gl.constexpr,
    BF16: gl.constexpr,
    WARPS: gl.constexpr,
):
    WIDTH: gl.constexpr = VECTORS * 128
    CHUNKS: gl.constexpr = (V // 2 + WIDTH - 1) // WIDTH
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    inside: gl.constexpr = gl.SliceLayout(1, layout)
    # A warp has part `part` of 2^shift of a row: so many chunks.
    warp = gl.arange(0, WARPS, inside)
    part = warp & ((1 << shift) - 1)
    chunks = (CHUNKS + (1 << shift) - 1) >> shift
    skipped = part * chunks * WIDTH
    length = V // 8 - part * chunks * (WIDTH // 4)  # vectors of the rest of the row
    step = gl.num_programs(0) * (WARPS >> shift)
    row = gl.program_id(0) * (WARPS >> shift) + (warp >> shift)
    place = row.to(gl.int64) * (row_words * 4) + skipped
    here = gl.where(row < num_rows, length, 0)
    words = load_words(words_ptr, place, here, 0, WIDTH, BF16, layout)
    for first in range(gl.program_id(0) * (WARPS >> shift), num_rows, step):
        row = first + (warp >> shift)
        exists = row < num_rows
        start = row.to(gl.int64) * (row_words * 4)
        place = start + skipped
        here = gl.where(exists, length, 0)
        target = gl.load(targets_ptr + row, mask=exists, other=0)
        valid = (target >= 0) & (target < V)
        at_target = gl.load(logits_ptr + (start * 2 + target), mask=exists & valid, other=0.0)
        biggest = gl.full([WARPS], NEVER, gl.float32, inside)
        total = gl.zeros([WARPS], gl.float32, inside)
        for chunk in range(1, chunks):
            ahead = load_words(words_ptr, place, here, chunk * WIDTH, WIDTH, BF16, layout)
            biggest, total = add_words(words, biggest, total, BF16)
            words = ahead
        place = (row + step).to(gl.int64) * (row_words * 4) + skipped
        here = gl.where(row + step < num_rows, length, 0)
        ahead = load_words(words_ptr, place, here, 0, WIDTH, BF16, layout)
        biggest, total = add_words(words, biggest, total, BF16)
        words = ahead
        lse = log2_of_sums(biggest, total, shift, inside) * LN2
        loss = lse - at_target.to(gl.float32) + z_loss * lse * lse
        loss = gl.where(valid, loss, float("nan"))
        loss = gl.where(target == ignore_index, 0.0, loss)
        gl.store(loss_ptr + row, loss, mask=exists & (part == 0))
        gl.store(lse_ptr + row, lse, mask=exists & (part == 0))


def cross_entropy_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    loss: torch.Tensor,
    lse: torch.Tensor,
    *,
    ignore_index: int,
    z_loss: float,
    num_sms: int,
) -> None:
    """Writes loss and lse [T] fp32.

    logits   [T, V] bf16 or fp16, rows contiguous; V and the stride of T multiples of 8, at a
             multiple of 16 bytes
    targets  [T] integers, contiguous
    """
    T, V = logits.shape
    shift = choose_shift(T, V)
    loss_kernel[(max(1, min(num_sms, ceil_div(T, WARPS >> shift))),)](
        logits,
        logits.view(torch.int32),
        targets,
        loss,
        lse,
        logits.stride(0) // 8,
        T,
        shift,
        ignore_index,
        z_loss,
        V=V,
        VECTORS=VECTORS,
        BF16=logits.dtype == torch.bfloat16,
        WARPS=WARPS,
        num_warps=WARPS,
    )


@lru_cache(maxsize=1024)
def choose_shift(T: int, V: int) -> int:
    """Of how many parts, 2^shift, a row is: so that warps have few chunks after each other, a part
    costing one more for what comes after its last."""
    chunks = ceil_div(V, VECTORS * 256)

    def chunks_in_turn(shift: int) -> int:
        rows = ceil_div(T, SMS * (WARPS >> shift))
        return rows * (ceil_div(chunks, 1 << shift) + 1)

    return min(range(WARPS.bit_length()), key=chunks_in_turn)
