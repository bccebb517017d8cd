"""Cross-entropy over the vocabulary: the loss of a row, and its gradient on the same visit.

lse = log Σ exp(x);  loss = lse − x[target] + z_loss * lse²
d_x = factor * (exp(x − lse) * (1 + 2 * z_loss * lse) − [target])
(z_loss: ST-MoE, arXiv 2202.08906, PaLM). A row whose target is `ignore_index` has loss and gradient
0; any other target outside of 0..V−1 has NaN, since no one waits for the device to raise.

Letters: T rows, V vocabulary. Persistent: `num_sms` programs step through the rows. Rows of up to
32768 numbers stay in registers: read once, and the gradient, if wanted, written once. Longer rows
are read again for the gradient, the last part first, while they are in L2: 132 rows of 128k bf16
numbers are 35 MB of its 50.
"""

import torch
import triton
import triton.language as tl

from .row_tiles import offset, outer_strides, row_kernel, stride_unit

__all__ = ["cross_entropy", "cross_entropy_gradient", "scale_rows"]

ROW = 32768  # numbers in the registers of 512 threads, 64 each in fp32
ROW_WARPS = 16
SHARED = 200 * 1024  # bytes of rows in flight: two of 64 KB beside the one that is computed
BLOCK = 8192  # numbers of a longer row at a time, 16 a thread
BLOCK_WARPS = 16
BLOCK_STAGES = 4
NEVER = tl.constexpr(-3.0e38)  # below every finite maximum, and exp(-inf − NEVER) is 0, not NaN


@triton.jit
def gradient_of(x, lse, factor, z_loss, column, target, ignored):
    """d_x of a block, fp32; `factor` is the gradient of the row's loss."""
    slope = factor * (1 + 2 * z_loss * lse)
    gradient = tl.exp(x - lse) * slope - tl.where(column == target, factor, 0.0)
    return tl.where(ignored, 0.0, gradient)


@triton.jit
def loss_of(lse, at_target, z_loss, target, ignored, V):
    loss = lse - at_target + z_loss * lse * lse
    loss = tl.where((target >= 0) & (target < V), loss, float("nan"))
    return tl.where(ignored, 0.0, loss)


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
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    inside = column < V
    for row in tl.range(tl.program_id(0), num_rows, tl.num_programs(0), num_stages=STAGES):
        target = tl.load(targets_table + row)
        ignored = target == ignore_index
        logits = logits_ptr + offset(row, logits_row, UNIT)
        valid = (target >= 0) & (target < V)
        at_target = tl.load(logits + target, mask=valid, other=0).to(tl.float32)
        x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
        biggest = tl.maximum(tl.max(x, axis=0), NEVER)
        power = tl.exp(x - biggest)
        total = tl.sum(power, axis=0)
        lse = biggest + tl.log(total)
        tl.store(loss_table + row, loss_of(lse, at_target, z_loss, target, ignored, V))
        if lse_table is not None:
            tl.store(lse_table + row, lse)
        if gradient_ptr is not None:
            # exp(x − lse) from the powers at hand: 32768 exponentials take an SM 1.2 µs.
            factor = tl.load(factor_table)
            factor = tl.where(valid, factor, float("nan"))
            slope = factor * (1 + 2 * z_loss * lse) / total
            gradient = power * slope - tl.where(column == target, factor, 0.0)
            gradient = tl.where(ignored, 0.0, gradient).to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + offset(row, gradient_row, UNIT) + column, gradient, mask=inside)


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
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCKS: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        target = tl.load(targets_table + row)
        ignored = target == ignore_index
        logits = logits_ptr + offset(row, logits_row, UNIT)
        valid = (target >= 0) & (target < V)
        at_target = tl.load(logits + target, mask=valid, other=0).to(tl.float32)
        # Every lane has a maximum and a sum of its own: no barrier before the row's end.
        biggest = tl.full((COLUMNS,), NEVER, tl.float32)
        total = tl.zeros((COLUMNS,), tl.float32)
        for block in tl.range(BLOCKS, num_stages=STAGES):
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            x = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(biggest, x)
            total = total * tl.exp(biggest - higher) + tl.exp(x - higher)
            biggest = higher
        highest = tl.max(biggest, axis=0)
        lse = highest + tl.log(tl.sum(total * tl.exp(biggest - highest), axis=0))
        tl.store(loss_table + row, loss_of(lse, at_target, z_loss, target, ignored, V))
        if lse_table is not None:
            tl.store(lse_table + row, lse)
        if gradient_ptr is not None:
            factor = tl.load(factor_table)
            factor = tl.where(valid, factor, float("nan"))
            gradients = gradient_ptr + offset(row, gradient_row, UNIT)
            for step in tl.range(BLOCKS, num_stages=STAGES):
                column = (BLOCKS - 1 - step) * COLUMNS + tl.arange(0, COLUMNS)
                x = tl.load(logits + column, mask=column < V, other=0).to(tl.float32)
                gradient = gradient_of(x, lse, factor, z_loss, column, target, ignored)
                gradient = gradient.to(gradient_ptr.dtype.element_ty)
                tl.store(gradients + column, gradient, mask=column < V)


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
        gradient = gradient_of(x, lse, factor, z_loss, column, target, ignored)
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
    if ROW >= V:
        columns = triton.next_power_of_2(V)
        stages = max(1, min(3, SHARED // (columns * logits.element_size())))
        kernel, warps = row_loss_kernel, max(4, min(ROW_WARPS, columns // 512))
    else:
        kernel, columns, stages, warps = long_row_loss_kernel, BLOCK, BLOCK_STAGES, BLOCK_WARPS
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
        COLUMNS=columns,
        UNIT=unit,
        STAGES=stages,
        num_warps=warps,
    )


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
