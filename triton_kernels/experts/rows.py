"""Rows between the order in which they cross the link and expert order.

expand        [P, T, H] → [R, H]   every unique row to its up to K places, from fp8 if it came so
sum_per_rank  [R, H] → [P, T, H]   the way back: a token's rows of this rank become one
sum_at_home   [P, T, H] → [T, H]   the ranks' sums of a token, brought home by copy engine, become y

Letters: P ranks, T tokens a rank at most (of sum_at_home's [T, H]: this rank's), H
hidden, K routes a token, L local experts, R rows in expert order.

Every unique row is read once and every expert row written once, or the reverse. All kernels are
persistent: `num_sms` programs step through tiles, one CTA an SM. A second CTA an SM would hide
latency too, but CTAs go to empty SMs first, and a launch would take more SMs than it was given.
Counts are read on the device: other counts, `num_sms`, T or R compile nothing, and the host waits
for nothing.

The last dimension of every tensor is contiguous; other strides are free, those of rows in multiples
of 8 elements. Rows are addressed with 64 bits.
"""

import torch
import triton.language as tl

from ..elementwise.rows import (
    BLOCK,
    MAX_PADDING,
    SCALE_BLOCK,
    RowConfig,
    add_rows,
    count_tiles,
    last_first,
    load_routes,
    load_rows,
    locate_columns,
    locate_routes,
    locate_rows,
    offset,
    outer_strides,
    row_kernel,
    scatter_rows,
    vector_strides,
)
from ..launch.arithmetic import ceil_div, power_of_two

__all__ = ["EXPAND", "SUM", "expand", "sum_at_home", "sum_per_rank"]

# An H200 copies 4 TB/s, 30 bytes a ns and SM, so at 1 µs of loaded latency 30 KB must be in flight.
# Top-8 of 64 on 4 ranks: expand reads 1 byte for 2.2 that it writes, 32 · 32 · 2 · 16 B = 32 KB at
# a time. A sum has 8 loads in flight a thread, 2.2 of them not masked off: 32 · 32 · 2.2 · 16 B =
# 36 KB, in 8 · 4 of the 64 registers that 1024 threads have each.
EXPAND = RowConfig(warps=32, vectors=2)
SUM = RowConfig(warps=32, vectors=1)


@row_kernel
def expand_kernel(
    unique_ptr,
    unique_source,
    unique_row,
    scales_table,
    scales_source,
    scales_row,
    topk_weight_table,
    weight_source,
    weight_row,
    routes_table,
    routes_source,
    routes_row,
    counts_table,
    offsets_table,
    tokens_table,
    rows_ptr,
    rows_row,
    row_weight_table,
    num_rows,
    num_experts,
    H: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr = BLOCK,
    SCALE_BLOCK: tl.constexpr = SCALE_BLOCK,
    MAX_PADDING: tl.constexpr = MAX_PADDING,
):
    CHUNKS: tl.constexpr = (H + CHUNK - 1) // CHUNK
    BLOCKS: tl.constexpr = CHUNK // SCALE_BLOCK
    # Padding first: stores with no load of a row before them, over at once.
    PER_EXPERT: tl.constexpr = MAX_PADDING // ROWS * CHUNKS
    for tile in range(tl.program_id(0), num_experts * PER_EXPERT, tl.num_programs(0)):
        expert = tile // PER_EXPERT
        row = tl.load(offsets_table + expert) + tl.load(tokens_table + expert)
        row += tile % PER_EXPERT // CHUNKS * ROWS + tl.arange(0, ROWS)
        empty = row < tl.minimum(tl.load(offsets_table + expert + 1), num_rows)
        column = locate_columns(tile, CHUNKS, CHUNK)
        zero = tl.zeros((ROWS, BLOCKS, SCALE_BLOCK), rows_ptr.dtype.element_ty)
        target = rows_ptr + offset(row, rows_row)[:, None, None] + column
        tl.store(target, zero, mask=empty[:, None, None] & (column < H))
        if row_weight_table is not None and tile % CHUNKS == 0:
            tl.store(row_weight_table + row, tl.zeros((ROWS,), tl.float32), mask=empty)

    if topk_weight_table is not None:
        for block in range(
            last_first(), count_tiles(counts_table, P, 1, BLOCK), tl.num_programs(0)
        ):
            source, first, count = locate_rows(block, counts_table, P, 1, BLOCK)
            row, k, exists = locate_routes(first, count, BLOCK, K, K_POW2)
            route = routes_table + source * routes_source + row * routes_row + k
            route = tl.load(route, mask=exists, other=-1)
            fits = (route >= 0) & (route < num_rows)
            weight = topk_weight_table + source * weight_source + row * weight_row + k
            tl.store(row_weight_table + route, tl.load(weight, mask=fits), mask=fits)

    num_tiles = count_tiles(counts_table, P, CHUNKS, ROWS)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        source, first, count = locate_rows(tile, counts_table, P, CHUNKS, ROWS)
        row = first + tl.arange(0, ROWS)
        exists = row < count
        column = locate_columns(tile, CHUNKS, CHUNK)
        inside = column < H
        unique = unique_ptr + offset(source, unique_source)
        unique += offset(row, unique_row)[:, None, None] + column
        value = tl.load(unique, mask=exists[:, None, None] & inside)
        if scales_table is not None:
            column_block = tile % CHUNKS * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]
            scales = scales_table + source * scales_source + row[:, None, None] * scales_row
            scales += column_block
            scale = tl.load(scales, mask=exists[:, None, None] & (column_block * SCALE_BLOCK < H))
            value = value.to(tl.float32) * scale
        routes = load_routes(
            routes_table + source * routes_source, routes_row, first, count, ROWS, K
        )
        value = value.to(rows_ptr.dtype.element_ty)
        scatter_rows(value, rows_ptr, 0, rows_row, routes, num_rows, column, inside)


@row_kernel
def sum_per_rank_kernel(
    rows_ptr,
    rows_row,
    num_rows,
    routes_table,
    routes_source,
    routes_row,
    counts_table,
    sums_ptr,
    sums_source,
    sums_row,
    row_weight_table,
    sum_weight_table,
    weight_source,
    weight_row,
    H: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr = BLOCK,
):
    CHUNKS: tl.constexpr = (H + CHUNK - 1) // CHUNK
    if row_weight_table is not None:
        for block in range(
            last_first(), count_tiles(counts_table, P, 1, BLOCK), tl.num_programs(0)
        ):
            source, first, count = locate_rows(block, counts_table, P, 1, BLOCK)
            row, k, exists = locate_routes(first, count, BLOCK, K, K_POW2)
            route = routes_table + source * routes_source + row * routes_row + k
            route = tl.load(route, mask=exists, other=-1)
            fits = (route >= 0) & (route < num_rows)
            weight = tl.load(row_weight_table + route, mask=fits, other=0)
            target = sum_weight_table + source * weight_source + row * weight_row + k
            tl.store(target, weight, mask=exists)

    num_tiles = count_tiles(counts_table, P, CHUNKS, ROWS)
    step = tl.num_programs(0)
    source, first, count = locate_rows(tl.program_id(0), counts_table, P, CHUNKS, ROWS)
    routes = load_routes(routes_table + source * routes_source, routes_row, first, count, ROWS, K)
    for tile in range(tl.program_id(0), num_tiles, step):
        # The next tile's routes fly together with this one's rows: one latency a tile, not two.
        after = locate_rows(tile + step, counts_table, P, CHUNKS, ROWS)
        routes_after = load_routes(
            routes_table + after[0] * routes_source, routes_row, after[1], after[2], ROWS, K
        )
        column = locate_columns(tile, CHUNKS, CHUNK)
        inside = column < H
        values = load_rows(rows_ptr, 0, rows_row, routes, num_rows, column, inside)
        row = first + tl.arange(0, ROWS)
        exists = row < count
        # Always so. Behind a branch the additions cannot be scheduled between the loads: ptxas
        # would issue 4 of 8 before it waits for the first.
        if first < count:
            sums = sums_ptr + offset(source, sums_source)
            sums += offset(row, sums_row)[:, None, None] + column
            value = add_rows(values).to(sums_ptr.dtype.element_ty)
            tl.store(sums, value, mask=exists[:, None, None] & inside)
        source, first, count = after
        routes = routes_after


@row_kernel
def sum_at_home_kernel(
    received_ptr,
    received_source,
    received_row,
    max_tokens,
    routes_table,
    routes_row,
    num_tokens,
    y_ptr,
    y_row,
    idx_table,
    idx_row,
    received_weight_table,
    received_weight_source,
    received_weight_row,
    weight_table,
    weight_row,
    num_local_experts,
    H: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr = BLOCK,
):
    CHUNKS: tl.constexpr = (H + CHUNK - 1) // CHUNK
    if weight_table is not None:
        for block in range(last_first(), tl.cdiv(num_tokens, BLOCK), tl.num_programs(0)):
            row, k, exists = locate_routes(block * BLOCK, num_tokens, BLOCK, K, K_POW2)
            expert = tl.load(idx_table + row * idx_row + k, mask=exists, other=-1)
            rank = expert // num_local_experts
            known = (expert >= 0) & (rank < P)  # the plan reports an index beyond the experts later
            route = tl.load(routes_table + row * routes_row + rank, mask=known, other=-1)
            weight = received_weight_table + rank * received_weight_source
            weight += route * received_weight_row + k
            weight = tl.load(weight, mask=(route >= 0) & (route < max_tokens), other=0)
            tl.store(weight_table + row * weight_row + k, weight, mask=exists)

    num_tiles = tl.cdiv(num_tokens, ROWS) * CHUNKS
    step = tl.num_programs(0)
    first = tl.program_id(0) // CHUNKS * ROWS
    routes = load_routes(routes_table, routes_row, first, num_tokens, ROWS, P)
    for tile in range(tl.program_id(0), num_tiles, step):
        after = (tile + step) // CHUNKS * ROWS
        routes_after = load_routes(routes_table, routes_row, after, num_tokens, ROWS, P)
        column = locate_columns(tile, CHUNKS, CHUNK)
        inside = column < H
        values = load_rows(
            received_ptr, received_source, received_row, routes, max_tokens, column, inside
        )
        row = first + tl.arange(0, ROWS)
        exists = row < num_tokens
        if first < num_tokens:  # always, as in sum_per_rank_kernel
            y = y_ptr + offset(row, y_row)[:, None, None] + column
            value = add_rows(values).to(y_ptr.dtype.element_ty)
            tl.store(y, value, mask=exists[:, None, None] & inside)
        first = after
        routes = routes_after


def expand(
    unique: torch.Tensor,
    expert_rows: torch.Tensor,
    unique_counts: torch.Tensor,
    expert_offsets: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    rows: torch.Tensor,
    *,
    num_sms: int,
    scales: torch.Tensor | None = None,
    topk_weight: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    config: RowConfig = EXPAND,
) -> None:
    """Copies every unique row to its places in expert order, and zeroes each expert's padding.

    unique             [P, T, H]; rows [p, :unique_counts[p]] are read
    expert_rows        [P, T, K] int32 row of each route, −1 none; entries ≥ R are left out
    unique_counts      [P] int32
    expert_offsets     [L + 1] int32; tokens_per_expert [L] int32, at most 127 fewer than its rows
    rows               [R, H], written up to row expert_offsets[-1]
    scales             [P, T, ceil(H / 128)] fp32: unique is fp8, and the row unique · scale
    topk_weight        [P, T, K] fp32, written to row_weight [R] fp32, 0 in padding; both or none

    With expert_rows[1, 0] = [−1, 130, 7], rows 130 and 7 become unique[1, 0], and their row_weight
    topk_weight[1, 0, 1] and topk_weight[1, 0, 2].
    """
    P, T, K = expert_rows.shape
    L = tokens_per_expert.shape[0]
    shape, tile_rows, chunks = config.launch(rows, K)
    tiles = P * ceil_div(T, tile_rows) + L * (MAX_PADDING // tile_rows)
    expand_kernel[_grid(num_sms, tiles * chunks)](
        unique,
        *vector_strides(unique),
        scales,
        *outer_strides(scales, 2),
        topk_weight,
        *outer_strides(topk_weight, 2),
        expert_rows,
        *outer_strides(expert_rows, 2),
        unique_counts,
        expert_offsets,
        tokens_per_expert,
        rows,
        *vector_strides(rows),
        row_weight,
        rows.shape[0],
        L,
        P=P,
        K=K,
        K_POW2=power_of_two(K),
        **shape,
    )


def sum_per_rank(
    rows: torch.Tensor,
    expert_rows: torch.Tensor,
    unique_counts: torch.Tensor,
    sums: torch.Tensor,
    *,
    num_sms: int,
    row_weight: torch.Tensor | None = None,
    sum_weight: torch.Tensor | None = None,
    config: RowConfig = SUM,
) -> None:
    """Adds a token's rows of this rank: the transpose of `expand`.

    rows           [R, H] in expert order; padding is not read
    expert_rows    [P, T, K] int32 row of each route, −1 none; entries ≥ R are left out
    unique_counts  [P] int32
    sums           [P, T, H], written in [p, :unique_counts[p]]: fp32 sum, k ascending, rounded once
    row_weight     [R] fp32, brought to sum_weight [P, T, K] fp32, 0 for −1; both or none

    With expert_rows[1, 0] = [−1, 130, 7], sums[1, 0] = rows[130] + rows[7] and sum_weight[1, 0] is
    [0, row_weight[130], row_weight[7]].
    """
    P, T, K = expert_rows.shape
    shape, tile_rows, chunks = config.launch(rows, K)
    tiles = P * ceil_div(T, tile_rows)
    sum_per_rank_kernel[_grid(num_sms, tiles * chunks)](
        rows,
        *vector_strides(rows),
        rows.shape[0],
        expert_rows,
        *outer_strides(expert_rows, 2),
        unique_counts,
        sums,
        *vector_strides(sums),
        row_weight,
        sum_weight,
        *outer_strides(sum_weight, 2),
        P=P,
        K=K,
        K_POW2=power_of_two(K),
        **shape,
    )


def sum_at_home(
    received: torch.Tensor,
    send_rows: torch.Tensor,
    y: torch.Tensor,
    *,
    num_sms: int,
    topk_idx: torch.Tensor | None = None,
    received_weight: torch.Tensor | None = None,
    topk_weight: torch.Tensor | None = None,
    num_local_experts: int = 1,
    config: RowConfig = SUM,
) -> None:
    """Adds the ranks' sums of every token.

    received         [P, max_tokens, H]
    send_rows        [T, P] int32 place in each rank's part, −1 none
    y                [T, H]: fp32 sum, ranks ascending, rounded once; 0 for a token sent nowhere
    topk_idx         [T, K] int32; with num_local_experts it says which rank a route went to
    received_weight  [P, max_tokens, ≥ K] fp32, brought to topk_weight [T, K] fp32 from each route's
                     rank, 0 for −1; with topk_idx, all or none

    With send_rows[5] = [2, 3], y[5] = received[0, 2] + received[1, 3]. With topk_idx[5] = [9, −1]
    and num_local_experts = 8, topk_weight[5] = [received_weight[1, 3, 0], 0].
    """
    T, P = send_rows.shape
    K = 1 if topk_weight is None else topk_weight.shape[1]
    shape, tile_rows, chunks = config.launch(y, P)
    sum_at_home_kernel[_grid(num_sms, ceil_div(T, tile_rows) * chunks)](
        received,
        *vector_strides(received),
        received.shape[1],
        send_rows,
        *outer_strides(send_rows, 1),
        T,
        y,
        *vector_strides(y),
        topk_idx,
        *outer_strides(topk_idx, 1),
        received_weight,
        *outer_strides(received_weight, 2),
        topk_weight,
        *outer_strides(topk_weight, 1),
        num_local_experts,
        P=P,
        K=K,
        K_POW2=power_of_two(K),
        **shape,
    )


def _grid(num_sms: int, tiles: int) -> tuple[int]:
    return (max(1, min(num_sms, tiles)),)
