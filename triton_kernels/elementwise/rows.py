"""Tiles of rows × columns, and how a program moves one: what `expert_rows` is made of.

A tile is [rows, chunk / 128, 128]: the blocks of 128 columns that share an fp8 scale are a
dimension of their own. Every thread keeps the same columns from load to store, so that no kernel
needs shared memory or a barrier, and its warps drift apart and hide each other's latency.
"""

import inspect
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..launch.arithmetic import ceil_div, power_of_two
from ..launch.cached import cache_launches
from .fp8 import BLOCK as SCALE_BLOCK

VECTOR = 8  # elements: 16 bytes of bf16; H and strides of rows are multiples of it
BLOCK = 128  # rows whose weights are moved at once: a weight a thread for 8 routes and 32 warps
MAX_PADDING = 128  # rows: experts start at multiples of it (routing.ROW_ALIGNMENT)


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """Compile-time shape of one kernel, for up to 8 routes a row.

    warps    of the one CTA an SM
    vectors  of 16 bytes that a thread has of a tile
    chunk    columns of a tile, a power of two ≥ 128
    """

    warps: int
    vectors: int
    chunk: int = 1024

    def launch(self, rows: torch.Tensor, routes: int) -> tuple[dict[str, int], int, int]:
        """Arguments of a launch that moves `rows` [..., H]; rows of a tile; chunks of a row.

        Every route of a row keeps a vector and its index in registers: with twice as many, half as
        many threads have them. With warps=32, vectors=1 and 8 routes, bf16 rows of H = 7168 take
        tiles of 8 × 1024 in 7 chunks, H = 136 tiles of 32 × 256 in one.
        """
        H = rows.shape[-1]
        warps = max(4, self.warps // ceil_div(power_of_two(routes), 8))
        chunk = max(SCALE_BLOCK, min(self.chunk, power_of_two(H)))
        elements = 32 * warps * self.vectors * 16 // rows.element_size()
        tile_rows = max(1, min(MAX_PADDING, elements // chunk))
        constants = dict(H=H, ROWS=tile_rows, CHUNK=chunk, num_warps=warps)
        return constants, tile_rows, ceil_div(H, chunk)


def vector_strides(rows: torch.Tensor) -> tuple[int, ...]:
    """Strides of the outer dimensions in vectors of 8 elements."""
    *outer, last = rows.stride()
    width = rows.shape[-1]
    if last != 1 or any(n % VECTOR for n in (width, *outer)) or rows.data_ptr() % 16:
        raise ValueError(
            f"rows of width {width} with strides {rows.stride()} at address {rows.data_ptr():#x} "
            f"cannot be moved 16 bytes at a time: pass a contiguous last dimension, a width and "
            f"strides that are multiples of {VECTOR}, at a multiple of 16 bytes"
        )
    return tuple(stride // VECTOR for stride in outer)


def stride_unit(*tensors: torch.Tensor | None) -> int:
    """What `offset` counts in: 8 elements where all rows can be moved 16 bytes at a time, else 1.

    Each value is a compilation of its own. Rows of 50257 bf16 numbers take the slow one.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        lengths = (tensor.shape[-1], *tensor.stride()[:-1])
        if any(n % VECTOR for n in lengths) or tensor.data_ptr() % 16:
            return 1
    return VECTOR


def outer_strides(table: torch.Tensor | None, dimensions: int) -> tuple[int, ...]:
    """Strides of the `dimensions` before the last one; zeros for no table."""
    return (0,) * dimensions if table is None else table.stride()[:-1]


def row_kernel(function):
    """triton.jit for a kernel that compiles once for all sizes and wherever its tables start.

    By their names: `…_ptr` are rows, aligned to 16 bytes; `…_table` numbers, read one by one; other
    lower-case names integers; the rest constants.
    """
    names = [n for n in inspect.signature(function).parameters if n.islower()]
    tables = [n for n in names if n.endswith("_table")]
    integers = [n for n in names if not n.endswith(("_ptr", "_table"))]
    decorate = triton.jit(do_not_specialize=integers, do_not_specialize_on_alignment=tables)
    return cache_launches(decorate(function))


@triton.jit
def count_tiles(counts_table, P: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr):
    """Tiles of all sources; a tile has the rows of one source."""
    tiles = 0
    for p in tl.static_range(P):
        tiles += tl.cdiv(tl.load(counts_table + p), ROWS)
    return tiles * CHUNKS


@triton.jit
def locate_rows(tile, counts_table, P: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr):
    """Source of a tile, its first row, and the source's count, not above it past the last tile.

    Chunks run fastest. With counts [3, 0, 5], ROWS = 4 and CHUNKS = 2 the tiles 0 to 6 have
    (0, 0, 3), (0, 0, 3), (2, 0, 5), (2, 0, 5), (2, 4, 5), (2, 4, 5), (2, 8, 5).
    """
    block = tile // CHUNKS
    source = tl.full((), 0, tl.int32)
    for p in tl.static_range(P - 1):
        blocks = tl.cdiv(tl.load(counts_table + p), ROWS)
        beyond = (source == p) & (block >= blocks)
        block = tl.where(beyond, block - blocks, block)
        source = tl.where(beyond, p + 1, source)
    return source, block * ROWS, tl.load(counts_table + source)


@triton.jit
def locate_columns(
    tile, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SCALE_BLOCK: tl.constexpr = SCALE_BLOCK
):
    """Columns of a tile, [1, CHUNK / 128, 128]."""
    first = tile % CHUNKS * CHUNK
    blocks = tl.arange(0, CHUNK // SCALE_BLOCK)[None, :, None]
    return first + blocks * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, None, :]


@triton.jit
def offset(index, vectors, VECTOR: tl.constexpr = VECTOR):
    """Elements before number `index` of things `vectors` apart, int64: a multiple of 8, which the
    compiler has to see to use 16-byte accesses."""
    return tl.cast(index, tl.int64) * vectors * VECTOR


@triton.jit
def load_routes(table, stride, first, count, ROWS: tl.constexpr, K: tl.constexpr):
    """K vectors [ROWS]: the entry k of the rows from `first` on; −1 from `count` on."""
    routes = ()
    row = first + tl.arange(0, ROWS)
    for k in tl.static_range(K):
        routes += (tl.load(table + row * stride + k, mask=row < count, other=-1),)
    return routes


@triton.jit
def locate_routes(first, count, BLOCK: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr):
    """Row, k and existence of all routes of a block, [BLOCK · K_POW2]: their weights move at once,
    where one k after the other they would wait for memory K times."""
    route = tl.arange(0, BLOCK * K_POW2)
    row = first + route // K_POW2
    k = route % K_POW2
    return row, k, (row < count) & (k < K)


@triton.jit
def last_first():
    """This program's number from the other end: the last ones have fewer tiles of rows."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def scatter_rows(value, target_ptr, source_vectors, row_vectors, routes, num_rows, column, inside):
    """Row routes[k] of source k becomes `value`, for all k with 0 <= routes[k] < num_rows."""
    for k in tl.static_range(len(routes)):
        fits = (routes[k] >= 0) & (routes[k] < num_rows)
        target = target_ptr + offset(k, source_vectors)
        target = target + offset(routes[k], row_vectors)[:, None, None] + column
        tl.store(target, value, mask=fits[:, None, None] & inside)


@triton.jit
def load_rows(source_ptr, source_vectors, row_vectors, routes, num_rows, column, inside):
    """Row routes[k] of source k for all k, zero where not 0 <= routes[k] < num_rows."""
    values = ()
    for k in tl.static_range(len(routes)):
        fits = (routes[k] >= 0) & (routes[k] < num_rows)
        source = source_ptr + offset(k, source_vectors)
        source = source + offset(routes[k], row_vectors)[:, None, None] + column
        values += (tl.load(source, mask=fits[:, None, None] & inside, other=0),)
    return values


@triton.jit
def add_rows(values):
    """Their sum in fp32, the first to the last."""
    total = values[0].to(tl.float32)
    for k in tl.static_range(1, len(values)):
        total += values[k].to(tl.float32)
    return total
