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

from .row_tiles import offset, outer_strides, row_kernel, stride_unit

__all__ = ["cross_entropy", "cross_entropy_gradient", "scale_rows"]

# A chunk: 512 threads have 8 vectors of 16 bytes each, 64 KB, and as many on their way.
LANES = 512
VECTORS = 8
SHARED = 200 * 1024  # bytes of rows in flight: two of 64 KB beside the one that is computed
MAX_STAGES = 3
BLOCK = 8192  # numbers at a time of the gradient alone, 16 a thread
BLOCK_WARPS = 16
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
def columns_of(chunk, LANES: tl.constexpr, VECTORS: tl.constexpr, WIDTH: tl.constexpr):
    """[LANES, VECTORS, WIDTH]. A thread is a lane: it has whole vectors of 16 bytes, and adds or
    compares them without another one."""
    vector = tl.arange(0, LANES)[:, None, None] + tl.arange(0, VECTORS)[None, :, None] * LANES
    return (chunk * VECTORS * LANES + vector) * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def load_chunk(
    row_ptr,
    chunk,
    exists,
    V: tl.constexpr,
    LANES: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Numbers of a chunk, -inf beyond the row. `WORDS` are two of them in one register, which the
    compiler would take apart as soon as they arrive."""
    if WORDS:
        column = columns_of(chunk, LANES, VECTORS, WIDTH // 2)
        BF16: tl.constexpr = row_ptr.dtype.element_ty == tl.bfloat16
        other: tl.constexpr = -0x007F0080 if BF16 else -0x03FF0400  # two of -inf
        words = row_ptr.to(tl.pointer_type(tl.int32)) + column
        numbers = tl.load(words, mask=(column < V // 2) & exists, other=other)
    else:
        column = columns_of(chunk, LANES, VECTORS, WIDTH)
        numbers = tl.load(row_ptr + column, mask=(column < V) & exists, other=float("-inf"))
    return numbers


@triton.jit
def unpack(numbers, DTYPE: tl.constexpr):
    """fp32 [LANES, VECTORS, WIDTH]."""
    if numbers.dtype == tl.int32:
        low = numbers.to(tl.int16).to(DTYPE, bitcast=True)
        high = (numbers >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        LANES: tl.constexpr = numbers.shape[0]
        VECTORS: tl.constexpr = numbers.shape[1]
        numbers = tl.join(low, high).reshape(LANES, VECTORS, 2 * numbers.shape[2])
    return numbers.to(tl.float32)


@triton.jit
def add_chunk(x, biggest, total, LOG2E: tl.constexpr = LOG2E):
    """Each lane's maximum of x · log2 e and sum of 2^(x · log2 e − maximum), with a chunk more."""
    higher = tl.maximum(biggest, tl.max(tl.max(x, axis=2), axis=1) * LOG2E)
    power = tl.exp2(x * LOG2E - higher[:, None, None])
    total = total * tl.exp2(biggest - higher) + tl.sum(tl.sum(power, axis=2), axis=1)
    return higher, total


@triton.jit
def log2_of_sum(biggest, total):
    """Of what the lanes have: total · 2^biggest."""
    highest = tl.max(biggest, axis=0)
    return highest + tl.log2(tl.sum(total * tl.exp2(biggest - highest), axis=0))


@triton.jit
def hit_of(target, chunk, LANES: tl.constexpr, VECTORS: tl.constexpr, WIDTH: tl.constexpr):
    """Which column of a chunk is the target; a lane's columns but for its first are constants."""
    lane = (chunk * VECTORS * LANES + tl.arange(0, LANES)) * WIDTH
    vector = tl.arange(0, VECTORS)[None, :, None] * LANES * WIDTH
    beyond = (target - lane).to(tl.int32)[:, None, None]
    return beyond == vector + tl.arange(0, WIDTH)[None, None, :]


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
    LANES: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
    LOG2E: tl.constexpr = LOG2E,
    LN2: tl.constexpr = LN2,
    NEVER: tl.constexpr = NEVER,
):
    column = columns_of(0, LANES, VECTORS, WIDTH)
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
        x = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
        # Every lane has a maximum of its own: threads meet only to add their sums.
        biggest = tl.maximum(tl.max(tl.max(x, axis=2), axis=1) * LOG2E, NEVER)
        power = tl.exp2(x * LOG2E - biggest[:, None, None])
        total = tl.sum(tl.sum(power, axis=2), axis=1)
        log2_sum = log2_of_sum(biggest, total)
        lse = log2_sum * LN2
        ignored = target == ignore_index
        tl.store(loss_table + row, loss_of(lse, at_target, z_loss, target, ignored, V))
        if lse_table is not None:
            tl.store(lse_table + row, lse)
        if gradient_ptr is not None:
            # exp(x − lse) from the powers at hand: 32768 exponentials take an SM 1.2 µs.
            d_loss = tl.where(valid, factor, float("nan"))
            slope = tl.exp2(biggest - log2_sum) * (d_loss * (1 + 2 * z_loss * lse))
            hit = hit_of(target, 0, LANES, VECTORS, WIDTH)
            gradient = power * slope[:, None, None] - tl.where(hit, d_loss, 0.0)
            gradient = tl.where(ignored, 0.0, gradient).to(gradient_ptr.dtype.element_ty)
            gradients = gradient_ptr + offset(row, gradient_row, UNIT)
            tl.store(gradients + column, gradient, mask=column < V)
        target = next_target


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
    LANES: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
    UNIT: tl.constexpr,
    LN2: tl.constexpr = LN2,
    NEVER: tl.constexpr = NEVER,
):
    LAST: tl.constexpr = (V - 1) // (VECTORS * LANES * WIDTH)
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    factor = 0.0 if gradient_ptr is None else tl.load(factor_table)
    first = tl.program_id(0)
    # Loads run ahead by hand: of a chunk while the one before is computed, across the end of a row,
    # and no thread waits for another before that. A target is known a row ahead, too: in front of
    # x[target] its load would cost every row a microsecond.
    target = tl.load(targets_table + first, mask=first < num_rows, other=0)
    row_ptr = logits_ptr + offset(first, logits_row, UNIT)
    numbers = load_chunk(row_ptr, 0, first < num_rows, V, LANES, VECTORS, WIDTH, WORDS)
    for row in tl.range(first, num_rows, tl.num_programs(0), num_stages=1):
        logits = logits_ptr + offset(row, logits_row, UNIT)
        valid = (target >= 0) & (target < V)
        ignored = target == ignore_index
        at_target = tl.load(logits + target, mask=valid, other=0).to(tl.float32)
        biggest = tl.full((LANES,), NEVER, tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        for chunk in tl.range(LAST, num_stages=1):
            ahead = load_chunk(logits, chunk + 1, True, V, LANES, VECTORS, WIDTH, WORDS)
            biggest, total = add_chunk(unpack(numbers, DTYPE), biggest, total)
            numbers = ahead
        following = row + tl.num_programs(0)
        exists = following < num_rows
        next_target = tl.load(targets_table + following, mask=exists, other=0)
        following_ptr = logits_ptr + offset(following, logits_row, UNIT)
        next_numbers = load_chunk(following_ptr, 0, exists, V, LANES, VECTORS, WIDTH, WORDS)
        biggest, total = add_chunk(unpack(numbers, DTYPE), biggest, total)
        lse = log2_of_sum(biggest, total) * LN2
        tl.store(loss_table + row, loss_of(lse, at_target, z_loss, target, ignored, V))
        if lse_table is not None:
            tl.store(lse_table + row, lse)
        if gradient_ptr is not None:
            gradients = gradient_ptr + offset(row, gradient_row, UNIT)
            d_loss = tl.where(valid, factor, float("nan"))
            for step in tl.range(LAST + 1, num_stages=1):
                if step > 0:
                    numbers = load_chunk(logits, LAST - step, True, V, LANES, VECTORS, WIDTH, WORDS)
                column = columns_of(LAST - step, LANES, VECTORS, WIDTH)
                hit = hit_of(target, LAST - step, LANES, VECTORS, WIDTH)
                x = unpack(numbers, DTYPE)
                gradient = gradient_of(x, lse, d_loss, z_loss, hit, ignored)
                gradient = gradient.to(gradient_ptr.dtype.element_ty)
                tl.store(gradients + column, gradient, mask=column < V)
        target = next_target
        numbers = next_numbers


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
    shape = chunk_shape(V, logits.element_size(), unit)
    kernel = long_row_loss_kernel
    if shape["LANES"] * shape["VECTORS"] * shape["WIDTH"] >= V:
        kernel = row_loss_kernel
        bytes_of_row = shape["LANES"] * shape["VECTORS"] * 16
        shape["STAGES"] = min(MAX_STAGES, SHARED // bytes_of_row)
        del shape["WORDS"]
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


def chunk_shape(V: int, element_size: int, unit: int) -> dict[str, int]:
    """Compile-time shape of a chunk: a row of 32768 bf16 numbers is 8 vectors of each of 512
    lanes, 1000 are one of each of 128. Numbers that cannot be moved as vectors take a register
    each: a chunk has half as many."""
    width = 16 // element_size
    words = element_size == 2 and unit > 1
    most = VECTORS if words or element_size == 4 else VECTORS // 2
    vectors = triton.next_power_of_2(triton.cdiv(V, width))
    lanes = max(128, min(LANES, vectors // 4))
    vectors = max(1, min(most, vectors // lanes))
    shape = dict(LANES=lanes, VECTORS=vectors, WIDTH=width, WORDS=words)
    return shape | dict(num_warps=lanes // 32)


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
    columns = min(BLOCK, triton.next_power_of_2(V))
    gradient_kernel[(max(1, min(num_sms, T * triton.cdiv(V, columns))),)](
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
    columns = min(2 * BLOCK, triton.next_power_of_2(V))
    scale_rows_kernel[(max(1, min(num_sms, T * triton.cdiv(V, columns))),)](
        rows,
        rows.stride(0) // unit,
        factor,
        T,
        V=V,
        COLUMNS=columns,
        UNIT=unit,
        num_warps=max(4, columns // 512),
    )
