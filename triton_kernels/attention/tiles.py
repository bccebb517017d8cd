"""Which tile of an attention a program computes next, and where its rows lie in memory.

Letters: B sequences, N query heads, G key/value heads, S positions, T positions of all packed
sequences, D width of queries and keys, V width of values.

Every kernel is persistent: a program starts at the tile of its own number and then draws from a
counter in memory, so that a program that starts late, on an SM that communication held, takes what
is left. One warp draws and loads, two warpgroups compute. Sizes are read at run time.
"""

from functools import lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..launch.arithmetic import ceil_div
from ..launch.compat import GluonDescriptor, async_load
from ..launch.descriptors import describe
from ..launch.shared_memory import allocate, allocate_barriers
from ..launch.sm_sharing import program_limit, tile_counter

ROWS = 128  # rows of a tile: 64 for each of the two warpgroups
LOG2_E = 1.4426950408889634
LN_2 = gl.constexpr(0.6931471805599453)
L2_BYTES = 32 << 20  # of the 50 MiB: what heads in flight together may read again and again

# Arguments of the kernels that may be any number without compiling anew.
INTEGERS = [
    "num_tiles",
    "num_heads",
    "share",
    "outer",
    "group",
    "sequences",
    "q_length",
    "k_length",
]
INTEGERS += ["num_m", "num_n", "padded"]

# A box of a packed tensor stays inside its sequence: two further dimensions move it so that the
# sequence's end falls on the end of a dimension of 2^30 rows, where TMA stops reading and writing.
# With stride s the third index, 2^30, adds 2^30 (2^34 - s) elements of a power of two of bytes,
# which modulo 2^64 takes the 2^30 s away again (as in triton.tools.ragged_tma).
FAR = gl.constexpr(1 << 30)


@gluon.jit
def next_tile(drawn_from, num_tiles):
    """The tile after a program's own first one, `num_tiles` or more where there is none.

    drawn_from  counter of tiles, and how many programs may stay (`sm_sharing`)
    """
    counter, limit_ptr = drawn_from
    limit = gl.load(limit_ptr, cache_modifier=".cv")
    tile = num_tiles
    if (limit <= 0) | (gl.program_id(0) < limit):
        tile = gl.num_programs(0) + gl.atomic_add(counter, 1)
    return tile


@gluon.jit
def locate_tile(
    tile,
    num_blocks,
    num_heads,
    outer,
    group,
    starts_table,
    sequences,
    VARLEN: gl.constexpr,
    BLOCK: gl.constexpr,
    LAST_FIRST: gl.constexpr,
):
    """Sequence, head and block of a tile number.

    num_blocks  blocks of BLOCK rows of a sequence; packed: T // BLOCK + B of all sequences, since
                sequence b may start at block starts[b] // BLOCK + b without meeting the next one
    outer       heads of all sequences (packed: heads)
    group       heads that run side by side, so that what they share stays in L2

    Blocks count down with LAST_FIRST: the longest rows of a causal attention come first. With 2
    blocks, 3 heads, `outer` = 6 and `group` = 4, tiles 0 to 5 are heads 0, 1, 2 of sequence 0 and
    head 0 of sequence 1 at block 1, then heads 0 and 1 of sequence 0 at block 0.
    """
    section = tile // (group * num_blocks)
    inside = tile - section * group * num_blocks
    width = min(group, outer - section * group)
    block = inside // width
    head = section * group + inside - block * width
    if LAST_FIRST:
        block = num_blocks - 1 - block
    if VARLEN:
        # The last sequence whose first block is at or before this one.
        sequence = 0
        above = sequences
        while above - sequence > 1:
            middle = (sequence + above) // 2
            if gl.load(starts_table + middle) // BLOCK + middle <= block:
                sequence = middle
            else:
                above = middle
        block -= gl.load(starts_table + sequence) // BLOCK + sequence
    else:
        sequence = head // num_heads
        head -= sequence * num_heads
    return sequence, head, block


@gluon.jit
def sequence_span(sequence, starts_table, length, VARLEN: gl.constexpr):
    """First row of a sequence in its packed tensor, and its rows."""
    start = 0
    if VARLEN:
        start = gl.load(starts_table + sequence)
        length = gl.load(starts_table + sequence + 1) - start
    return start, length


@gluon.jit
def box(sequence, head, start, length, row, column, VARLEN: gl.constexpr):
    """Coordinates of a box in a descriptor of `describe_rows`."""
    if VARLEN:
        place = (FAR, start + length, head, FAR - length + row, column)
    else:
        place = (sequence, head, row, column)
    return place


@gluon.jit
def allocate_split(desc, rest_desc, count: gl.constexpr, REST: gl.constexpr):
    """The same for both descriptors of `describe_split`."""
    smem = allocate(desc, count)
    rest = smem
    if REST:
        rest = allocate(rest_desc, count)
    return smem, rest


@gluon.jit
def load_split(
    desc, rest_desc, span, row, full, smem, rest, slot, VARLEN: gl.constexpr, REST: gl.constexpr
):
    """Loads rows of a span (sequence, head, first row, rows) with both descriptors."""
    sequence, head, start, length = span
    place = box(sequence, head, start, length, row, 0, VARLEN)
    async_load(desc, place, full, smem.index(slot))
    if REST:
        first: gl.constexpr = desc.block_type.shape[-1]
        place = box(sequence, head, start, length, row, first, VARLEN)
        async_load(rest_desc, place, full, rest.index(slot))


@gluon.jit
def allocate_stages(count: gl.constexpr):
    """mbarriers "full", at which the loading warp arrives, and "empty", both warpgroups."""
    return allocate_barriers(count, 1), allocate_barriers(count, 2)


@gluon.jit
def scratch_row(sequence, head, num_heads, start, padded, VARLEN: gl.constexpr):
    """First row of (sequence, head) in a scratch tensor whose sequences fill whole tiles."""
    if VARLEN:
        row = head * padded + (start // 128 + sequence) * 128
    else:
        row = (sequence * num_heads + head) * padded
    return row


def describe_rows(x: torch.Tensor, rows: int, columns: int, varlen: bool) -> GluonDescriptor:
    """TMA descriptor of x [B, N, S, D], any strides but the last, for boxes of rows × columns.

    A packed x is [1, N, T, D].
    """
    return describe(x, *_lay_boxes(x.shape, x.stride(), rows, columns, varlen))


@lru_cache(maxsize=256)
def _lay_boxes(
    shape: tuple[int, ...], strides: tuple[int, ...], rows: int, columns: int, varlen: bool
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Box, shape and strides of `describe_rows`."""
    # A dimension of one element has whatever stride, which TMA may not like.
    strides = [s if n > 1 else max(1, columns) for s, n in zip(strides, shape, strict=True)]
    strides[-1] = 1
    block = [1] * (len(shape) - 2) + [rows, columns]
    if varlen:
        _, heads, _, width = shape
        row_stride = strides[2]
        shape = [2**31 - 2**16, 2**31 - 2**16, heads, 2**30, width]
        strides = [2**34 - row_stride, row_stride, strides[1], row_stride, 1]
        block = [1, *block]
    return tuple(block), tuple(shape), tuple(strides)


def describe_split(
    x: torch.Tensor, rows: int, varlen: bool
) -> tuple[GluonDescriptor, GluonDescriptor]:
    """Descriptors of the first 128 columns, and of those beyond, or the same again: the columns of
    a tensor in Triton are a power of two."""
    width = x.shape[-1]
    first = min(width, 128)
    columns = (first, width - first or first)
    return tuple(describe_rows(x, rows, n, varlen) for n in columns)


def heads_side_by_side(rows: int, bytes_a_row: int, heads: int, share: int) -> int:
    """`group` of `locate_tile`: as many heads as fit L2, at least those that share one."""
    fit = L2_BYTES // max(1, rows * bytes_a_row) * share
    return max(1, min(heads, max(fit, share)))


def num_blocks(length: int, rows: int, starts: torch.Tensor | None, block: int) -> int:
    """Blocks of `locate_tile`: of one sequence of `length`, or of all packed `rows`."""
    if starts is None:
        return ceil_div(length, block)
    return rows // block + starts.shape[0] - 1


def lay_out(
    q: torch.Tensor,
    v: torch.Tensor,
    starts_q: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    *,
    scale: float,
    num_sms: int,
    of_keys: bool = False,
) -> tuple[tuple[int], tuple]:
    """The grid of a launch over tiles of queries, or of keys, and the arguments of its kernel from
    `starts_q_table` to `k_length`."""
    varlen = starts_q is not None
    (B, N, q_length, D), (_, G, k_length, V) = q.shape, v.shape
    share = N // G
    # Tiles of queries read keys, which `share` heads have in common; tiles of keys read queries.
    if of_keys:
        heads, length, starts, read, together = G, k_length, starts_k, q_length * share, 1
    else:
        heads, length, starts, read, together = N, q_length, starts_q, k_length, share
    blocks = num_blocks(length, length, starts, ROWS)
    outer = heads if varlen else B * heads
    group = heads_side_by_side(read, 2 * (D + V), outer, together)
    num_tiles = outer * blocks
    # Where programs draw tile numbers from, beyond their own.
    counter = tile_counter(q.device)
    drawn_from = (counter, program_limit(q.device))
    tables = (starts_q, starts_k) if varlen else (counter, counter)
    sequences = starts_q.shape[0] - 1 if varlen else B
    sizes = (num_tiles, blocks, N, share, outer, group, sequences, q_length, k_length)
    return (max(1, min(num_sms, num_tiles)),), (*tables, *drawn_from, scale * LOG2_E, *sizes)
