"""The loss of cross-entropy alone, with every row in the hands of one warp; `cross_entropy` has the
arithmetic and the gradient.

Letters: T rows, V vocabulary. An SM takes 2.2 µs to fetch the 64 KB of 32768 bf16 numbers, 1.2 for
their exponentials and about as long for the rest. Threads that share a row do one after the other,
since they meet for its sum: 2.7 µs a row. Here a program's 16 warps have a row each and never meet.
They drift apart, and some compute while others wait for memory: a warp asks for 4 KB and computes
the 4 KB before, across the end of a row, too.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .arithmetic import ceil_div
from .launch import cache_launches

__all__ = ["cross_entropy_loss"]

WARPS, VECTORS = 16, 8  # of a program; of 16 bytes, that a thread asks for at once
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
NEVER = gl.constexpr(-3.0e38)  # below every finite maximum, and 2^(-inf − NEVER) is 0, not NaN


@gluon.jit
def load_words(
    words_ptr,
    place,
    exists,
    first,
    WORDS: gl.constexpr,
    WIDTH: gl.constexpr,
    BF16: gl.constexpr,
    layout: gl.constexpr,
):
    """WIDTH words of two numbers of every row from word `first` on, two of -inf beyond it."""
    LOWEST: gl.constexpr = -0x007F0080 if BF16 else -0x03FF0400
    column = first + gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)), 0)
    mask = gl.expand_dims(exists, 1) & (column < WORDS)
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


@cache_launches
@gluon.jit(do_not_specialize=["row_words", "num_rows", "ignore_index"])
def loss_kernel(
    logits_ptr,
    words_ptr,
    targets_ptr,
    loss_ptr,
    lse_ptr,
    row_words,
    num_rows,
    ignore_index,
    z_loss,
    V: gl.constexpr,
    VECTORS: gl.constexpr,
    BF16: gl.constexpr,
    ROWS: gl.constexpr,
):
    WIDTH: gl.constexpr = VECTORS * 128
    WORDS: gl.constexpr = V // 2
    LAST: gl.constexpr = (WORDS - 1) // WIDTH
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [ROWS, 1], [1, 0])
    inside: gl.constexpr = gl.SliceLayout(1, layout)
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, inside)
    place = row.to(gl.int64) * (row_words * 4)
    words = load_words(words_ptr, place, row < num_rows, 0, WORDS, WIDTH, BF16, layout)
    for first in range(gl.program_id(0) * ROWS, num_rows, gl.num_programs(0) * ROWS):
        row = first + gl.arange(0, ROWS, inside)
        exists = row < num_rows
        place = row.to(gl.int64) * (row_words * 4)
        target = gl.load(targets_ptr + row, mask=exists, other=0)
        valid = (target >= 0) & (target < V)
        at_target = gl.load(logits_ptr + (place * 2 + target), mask=exists & valid, other=0.0)
        biggest = gl.full([ROWS], NEVER, gl.float32, inside)
        total = gl.zeros([ROWS], gl.float32, inside)
        for chunk in range(LAST):
            start = (chunk + 1) * WIDTH
            ahead = load_words(words_ptr, place, exists, start, WORDS, WIDTH, BF16, layout)
            biggest, total = add_words(words, biggest, total, BF16)
            words = ahead
        following = row + gl.num_programs(0) * ROWS
        place = following.to(gl.int64) * (row_words * 4)
        more = following < num_rows
        ahead = load_words(words_ptr, place, more, 0, WORDS, WIDTH, BF16, layout)
        biggest, total = add_words(words, biggest, total, BF16)
        words = ahead
        lse = (biggest + gl.log2(total)) * LN2
        loss = lse - at_target.to(gl.float32) + z_loss * lse * lse
        loss = gl.where(valid, loss, float("nan"))
        loss = gl.where(target == ignore_index, 0.0, loss)
        gl.store(loss_ptr + row, loss, mask=exists)
        gl.store(lse_ptr + row, lse, mask=exists)


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
    loss_kernel[(max(1, min(num_sms, ceil_div(T, WARPS))),)](
        logits,
        logits.view(torch.int32),
        targets,
        loss,
        lse,
        logits.stride(0) // 8,
        T,
        ignore_index,
        z_loss,
        V=V,
        VECTORS=VECTORS,
        BF16=logits.dtype == torch.bfloat16,
        ROWS=WARPS,
        num_warps=WARPS,
    )
