"""Cross-entropy over the vocabulary: the loss of a row, and its gradient on the same visit.

lse = log Σ exp(x);  loss = lse − x[target] + z_loss * lse²
d_x = factor * (exp(x − lse) * (1 + 2 * z_loss * lse) − [target])
(z_loss: ST-MoE, arXiv 2202.08906, PaLM). A row whose target is `ignore_index` has loss and gradient
0; any other target outside of 0..V−1 has NaN, since no one waits for the device to raise.

Letters: T rows, V vocabulary. Persistent: `num_sms` programs step through the rows. Rows of up to
64 KB stay in registers: read once, and the gradient, if wanted, written once. Longer rows
are read again for the gradient, the last part first, while they are in L2: 132 rows of 128k bf16
numbers are 35 MB of its 50.
"""

import torch
import triton
import triton.language as tl

from ..launch.arithmetic import ceil_div, power_of_two
from .rows import offset, outer_strides, row_kernel, stride_unit

__all__ = ["cross_entropy", "cross_entropy_gradient", "scale_rows"]

# A chunk: 512 threads have 8 vectors of 16 bytes each, 64 KB, and as many on their way.
LANES = 512
VECTORS = 8
ROW = 32768  # numbers at most of a row that is kept: fp32 [64] a thread
SHARED = 200 * 1024  # bytes of rows in flight: three of 64 KB
MAX_STAGES = 4
KEEP = True  # longer rows, whose gradient is wanted, stay in L2 until it is written
BLOCK = 8192  # numbers at a time of the gradient alone, 16 a thread
BLOCK_STAGES = 4
NEVER = tl.constexpr(-3.0e38)  # below every finite maximum, and 2^(-inf − NEVER) is 0, not NaN
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def gradient_of(x, lse, factor, z_loss, hit, ignored, LOG2E: tl.constexpr = LOG2E):
    """d_x of a block, fp32; `factor` is the gradient of the row's loss, `hit` the target."""
    slope = factor * (1 + 2 * z_loss * lse)
    gradient = tl.exp2(x * LOG2E - lse * LOG2E) * slope - tl.where(hit, factor, 0.0)
    return tl.where(ignored, 0.0, gradient)


@triton.jit
def loss_of(lse, at_target, z_loss, target, ignored, V):
    loss = lse - at_target + z_loss * lse * lse
    loss = tl.where((target >= 0) & (target < V), loss, float("nan"))
    return tl.where(ignored, 0.0, loss)


@triton.jit
def load_chunk(
    row_ptr,
    first,
    exists,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    WORDS: tl.constexpr,
    POLICY: tl.constexpr,
):
    """CHUNK numbers of a row from number `first` on, -inf beyond it. `WORDS` are two of them in one
    register, which the compiler would take apart as soon as they arrive."""
    if WORDS:
        column = first // 2 + tl.arange(0, CHUNK // 2)
        BF16: tl.constexpr = row_ptr.dtype.element_ty == tl.bfloat16
        other: tl.constexpr = -0x007F0080 if BF16 else -0x03FF0400  # two of -inf
        words = row_ptr.to(tl.pointer_type(tl.int32)) + column
        mask = (column < V // 2) & exists
        numbers = tl.load(words, mask=mask, other=other, eviction_policy=POLICY)
    else:
        column = first + tl.arange(0, CHUNK)
        mask = (column < V) & exists
        numbers = tl.load(row_ptr + column, mask=mask, other=float("-inf"), eviction_policy=POLICY)
    return numbers


@triton.jit
def unpack(numbers, DTYPE: tl.constexpr):
    """fp32 [CHUNK]."""
    if numbers.dtype == tl.int32:
        low = numbers.to(tl.int16).to(DTYPE, bitcast=True)
        high = (numbers >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        numbers = tl.join(low, high).reshape(2 * numbers.shape[0])
    return numbers.to(tl.float32)


@triton.jit
def by_lane(numbers, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """[VECTORS, LANES, WIDTH] of a chunk. A thread is a lane: it has whole vectors of 16 bytes, and
    adds or compares them without another one."""
    return numbers.reshape(numbers.shape[0] // (LANES * WIDTH), LANES, WIDTH)


@triton.jit
def add_chunk(x, biggest, total, LOG2E: tl.constexpr = LOG2E):
    """Each lane's maximum of x · log2 e and sum of 2^(x · log2 e − maximum), with a chunk more."""
    higher = tl.maximum(biggest, tl.max(tl.max(x, axis=2), axis=0) * LOG2E)
    power = tl.exp2(x * LOG2E - higher[None, :, None])
    total = total * tl.exp2(biggest - higher) + tl.sum(tl.sum(power, axis=2), axis=0)
    return higher, total


@triton.jit
def log2_of_sum(biggest, total):
    """Of what the lanes have: total · 2^biggest."""
    highest = tl.max(biggest, axis=0)
    return highest + tl.log2(tl.sum(total * tl.exp2(biggest - highest), axis=0))


@triton.jit
def is_target(target, first, CHUNK: tl.constexpr):
    """[CHUNK]: which number is the target. A thread's numbers but for its first are constants."""
    return (target - first).to(tl.int32) == tl.arange(0, CHUNK)


@row_kernel
def row_loss_kernel(
    logits_ptr,
    logits_row,
    targets_table,
    factor_table,
    loss_table,
    lse_table,
    gradient_ptr,
    gradient_row,
    num_rows,
    ignore_index,
    z_loss,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
    LOG2E: tl.constexpr = LOG2E,
    LN2: tl.constexpr = LN2,
    NEVER: tl.constexpr = NEVER,
):
    column = tl.arange(0, CHUNK)
    factor = 0.0 if gradient_ptr is None else tl.load(factor_table)
    first = tl.program_id(0)
    # Known a row ahead: in front of x[target] its load would cost every row a microsecond.
    target = tl.load(targets_table + first, mask=first < num_rows, other=0)
    for row in tl.range(first, num_rows, tl.num_programs(0), num_stages=STAGES):
        logits = logits_ptr + offset(row, logits_row, UNIT)
        valid = (target >= 0) & (target < V)
        at_target = tl.load(logits + target, mask=valid, other=0).to(tl.float32)
        following = row + tl.num_programs(0)
        next_target = tl.load(targets_table + following, mask=following < num_rows, other=0)
        # Loaded as one row: of a tile of three dimensions, lanes lie 128 bytes apart in shared
        # memory, eight in one bank at a time (H200: 5.9 µs a row, where 2.2 µs of DRAM are due).
        x = tl.load(logits + column, mask=column < V, other=float("-inf"))
        x = by_lane(x, LANES, WIDTH).to(tl.float32)
        # Every lane has a maximum of its own: threads meet only to add their sums.
        biggest = tl.maximum(tl.max(tl.max(x, axis=2), axis=0) * LOG2E, NEVER)
        power = tl.exp2(x * LOG2E - biggest[None, :, None])
        total = tl.sum(tl.sum(power, axis=2), axis=0)
        log2_sum = log2_of_sum(biggest, total)
        lse = log2_sum * LN2
        ignored = target == ignore_index
        tl.store(loss_table + row, loss_of(lse, at_target, z_loss, target, ignored, V))
        if lse_table is not None:
            tl.store(lse_table + row, lse)
        if gradient_ptr is not None:
            gradients = gradient_ptr + offset(row, gradient_row, UNIT)
            if ignored:
                zeros = tl.zeros((CHUNK,), gradient_ptr.dtype.element_ty)
                tl.store(gradients + column, zeros, mask=column < V)
            else:
                # exp(x − lse) from the powers at hand: 32768 exponentials take an SM 1.2 µs.
                d_loss = tl.where(valid, factor, float("nan"))
                slope = tl.exp2(biggest - log2_sum) * (d_loss * (1 + 2 * z_loss * lse))
                gradient = (power * slope[None, :, None]).reshape(CHUNK)
                gradient -= tl.where(is_target(target, 0, CHUNK), d_loss, 0.0)
                gradient = gradient.to(gradient_ptr.dtype.element_ty)
                tl.store(gradients + column, gradient, mask=column < V)
        target = next_target


@triton.jit
def store_gradient(
    gradients_ptr,
    numbers,
    first,
    how,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    POLICY: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Of a chunk from number `first` of a row on."""
    lse, d_loss, z_loss, target, ignored = how
    column = first + tl.arange(0, CHUNK)
    hit = is_target(target, first, CHUNK)
    gradient = gradient_of(unpack(numbers, DTYPE), lse, d_loss, z_loss, hit, ignored)
    gradient = gradient.to(gradients_ptr.dtype.element_ty)
    tl.store(gradients_ptr + column, gradient, mask=column < V, eviction_policy=POLICY)


@row_kernel
def long_row_loss_kernel(
    logits_ptr,
    logits_row,
    targets_table,
    factor_table,
    loss_table,
    lse_table,
    gradient_ptr,
    gradient_row,
    num_rows,
    ignore_index,
    z_loss,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
    KEEP: tl.constexpr,
    UNIT: tl.constexpr,
    LN2: tl.constexpr = LN2,
    NEVER: tl.constexpr = NEVER,
):
    LAST: tl.constexpr = (V - 1) // CHUNK
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    # What is read again is to stay in L2, what is not is to make room for it.
    TWICE: tl.constexpr = KEEP and gradient_ptr is not None
    ONCE: tl.constexpr = "evict_first" if TWICE else ""
    AGAIN: tl.constexpr = "evict_last" if TWICE else ""
    factor = 0.0 if gradient_ptr is None else tl.load(factor_table)
    first = tl.program_id(0)
    # Loads run ahead by hand: of a chunk while the one before is computed, across the end of a row,
    # and no thread waits for another before that. A target is known a row ahead, too: in front of
    # x[target] its load would cost every row a microsecond.
    target = tl.load(targets_table + first, mask=first < num_rows, other=0)
    row_ptr = logits_ptr + offset(first, logits_row, UNIT)
    numbers = load_chunk(row_ptr, 0, first < num_rows, V, CHUNK, WORDS, AGAIN)
    for row in tl.range(first, num_rows, tl.num_programs(0), num_stages=1):
        logits = logits_ptr + offset(row, logits_row, UNIT)
        valid = (target >= 0) & (target < V)
        ignored = target == ignore_index
        at_target = tl.load(logits + target, mask=valid, other=0).to(tl.float32)
        following = row + tl.num_programs(0)
        exists = following < num_rows
        next_target = tl.load(targets_table + following, mask=exists, other=0)
        next_ptr = logits_ptr + offset(following, logits_row, UNIT)
        biggest = tl.full((LANES,), NEVER, tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        for chunk in tl.range(LAST, num_stages=1):
            ahead = load_chunk(logits, (chunk + 1) * CHUNK, True, V, CHUNK, WORDS, AGAIN)
            x = by_lane(unpack(numbers, DTYPE), LANES, WIDTH)
            biggest, total = add_chunk(x, biggest, total)
            numbers = ahead
        # The gradient takes the chunks in the other order, then follows the next row.
        if gradient_ptr is None or LAST == 0:
            ahead = load_chunk(next_ptr, 0, exists, V, CHUNK, WORDS, AGAIN)
        else:
            ahead = load_chunk(logits, (LAST - 1) * CHUNK, True, V, CHUNK, WORDS, ONCE)
        x = by_lane(unpack(numbers, DTYPE), LANES, WIDTH)
        biggest, total = add_chunk(x, biggest, total)
        lse = log2_of_sum(biggest, total) * LN2
        tl.store(loss_table + row, loss_of(lse, at_target, z_loss, target, ignored, V))
        if lse_table is not None:
            tl.store(lse_table + row, lse)
        if gradient_ptr is not None:
            gradients = gradient_ptr + offset(row, gradient_row, UNIT)
            d_loss = tl.where(valid, factor, float("nan"))
            how = (lse, d_loss, z_loss, target, ignored)
            for step in tl.range(LAST + 1, num_stages=1):
                store_gradient(
                    gradients, numbers, (LAST - step) * CHUNK, how, V, CHUNK, ONCE, DTYPE
                )
                numbers = ahead
                here = step + 2 <= LAST
                wanted = here | (exists & (step + 1 == LAST))
                ahead_ptr = tl.where(here, logits, next_ptr)
                ahead_first = tl.where(here, LAST - 2 - step, 0) * CHUNK
                ahead = load_chunk(ahead_ptr, ahead_first, wanted, V, CHUNK, WORDS, ONCE)
        else:
            numbers = ahead
        target = next_target


@row_kernel
def gradient_kernel(
    logits_ptr,
    logits_row,
    targets_table,
    factor_table,
    factor_row,
    lse_table,
    gradient_ptr,
    gradient_row,
    num_rows,
    ignore_index,
    z_loss,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCKS: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    tiles = num_rows * BLOCKS
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile // BLOCKS
        column = tile % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
        target = tl.load(targets_table + row)
        lse = tl.load(lse_table + row)
        factor = tl.load(factor_table + row * factor_row)
        factor = tl.where((target >= 0) & (target < V), factor, float("nan"))
        x = logits_ptr + offset(row, logits_row, UNIT) + column
        x = tl.load(x, mask=column < V, other=0).to(tl.float32)
        ignored = target == ignore_index
        gradient = gradient_of(x, lse, factor, z_loss, column == target, ignored)
        gradient = gradient.to(gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + offset(row, gradient_row, UNIT) + column, gradient, mask=column < V)


@row_kernel
def scale_rows_kernel(
    rows_ptr,
    rows_row,
    factor_table,
    num_rows,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
):
    BLOCKS: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    factor = tl.load(factor_table)
    tiles = tl.where(factor == 1, 0, num_rows * BLOCKS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile // BLOCKS
        column = tile % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
        rows = rows_ptr + offset(row, rows_row, UNIT) + column
        x = tl.load(rows, mask=column < V, other=0).to(tl.float32) * factor
        tl.store(rows, x.to(rows_ptr.dtype.element_ty), mask=column < V)


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    loss: torch.Tensor,
    *,
    ignore_index: int,
    z_loss: float,
    num_sms: int,
    lse: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> None:
    """Writes loss [T] fp32, and as asked lse [T] fp32 and gradient [T, V], which may be logits.

    logits   [T, V], rows contiguous
    targets  [T] integers, contiguous
    factor   [1] fp32: the gradient of every loss that is not ignored; with `gradient`
    """
    T, V = logits.shape
    unit = stride_unit(logits, gradient)
    words = logits.element_size() == 2 and unit > 1
    shape = chunk_shape(V, logits.element_size(), words)
    if shape["CHUNK"] >= V and V <= ROW:
        kernel = row_loss_kernel
        row_bytes = shape["CHUNK"] * logits.element_size()
        shape["STAGES"] = min(MAX_STAGES, 1 + SHARED // row_bytes)
    else:
        kernel = long_row_loss_kernel
        shape |= dict(WORDS=words, KEEP=KEEP)
    kernel[(max(1, min(num_sms, T)),)](
        logits,
        logits.stride(0) // unit,
        targets,
        factor,
        loss,
        lse,
        gradient,
        outer_strides(gradient, 1)[0] // unit,
        T,
        ignore_index,
        z_loss,
        V=V,
        UNIT=unit,
        **shape,
    )


def chunk_shape(V: int, element_size: int, words: bool) -> dict[str, int]:
    """Compile-time shape of a chunk: a row of 32768 bf16 numbers is 8 vectors of each of 512
    lanes, 1000 are one of each of 128. Numbers that cannot be moved as vectors take a register
    each: a chunk has half as many."""
    width = 16 // element_size
    most = VECTORS if words or element_size == 4 else VECTORS // 2
    vectors = power_of_two(ceil_div(V, width))
    lanes = max(128, min(LANES, vectors // 4))
    vectors = max(1, min(most, vectors // lanes))
    return dict(CHUNK=vectors * lanes * width, LANES=lanes, WIDTH=width, num_warps=lanes // 32)


def cross_entropy_gradient(
    d_loss: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    gradient: torch.Tensor,
    *,
    ignore_index: int,
    z_loss: float,
    num_sms: int,
) -> None:
    """Writes gradient [T, V] from lse [T] of the forward and d_loss [T] fp32 of any stride."""
    T, V = logits.shape
    unit = stride_unit(logits, gradient)
    columns = min(BLOCK, power_of_two(V))
    gradient_kernel[(max(1, min(num_sms, T * ceil_div(V, columns))),)](
        logits,
        logits.stride(0) // unit,
        targets,
        d_loss,
        d_loss.stride(0),
        lse,
        gradient,
        gradient.stride(0) // unit,
        T,
        ignore_index,
        z_loss,
        V=V,
        COLUMNS=columns,
        UNIT=unit,
        STAGES=BLOCK_STAGES,
        num_warps=max(4, columns // 512),
    )


def scale_rows(rows: torch.Tensor, factor: torch.Tensor, *, num_sms: int) -> None:
    """rows [T, V] *= factor [1] fp32, in place; a factor of 1 touches no row."""
    T, V = rows.shape
    unit = stride_unit(rows)
    columns = min(2 * BLOCK, power_of_two(V))
    scale_rows_kernel[(max(1, min(num_sms, T * ceil_div(V, columns))),)](
        rows,
        rows.stride(0) // unit,
        factor,
        T,
        V=V,
        COLUMNS=columns,
        UNIT=unit,
        num_warps=max(4, columns // 512),
    )
