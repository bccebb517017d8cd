"""tiles.py for the grouped GEMMs written in Gluon: which tile is next, where it lies, and what
warps tell each other of it.

One warp names the tiles and loads them: what it waits for, all others wait for soon. So experts'
first rows stay in its registers, and a number drawn from a counter is asked for well before it is
needed. (A draw that waits, 1 us a tile, took 4 % of a GEMM of 54 tiles a program with K = 2048.)
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# The next tile is drawn this many steps of K before a tile's last loads: 1 us, and no more, because
# a program that has drawn a tile keeps it.
DRAW_AHEAD = gl.constexpr(4)


# What is drawn instead of a tile by a program that leaves: more than any kernel has.
GONE = gl.constexpr(0x3FFFFFFF)


@gluon.jit
def look_at_limit(limit_ptr):
    """Asks, from one warp, how many programs may stay now (`sm_sharing`): [32] times that number.

    Nothing waits for it before it is used.
    """
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    return gl.inline_asm_elementwise(
        "ld.volatile.global.u32 $0, [$1];",
        "=r,l",
        [limit_ptr + lane * 0],
        gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def gives_way(limit):
    """Whether this program leaves its SM to communication, after the tile that it has.

    The first program never does, so that all tiles are computed.
    """
    return (limit > 0) & (gl.program_id(0) >= limit)


@gluon.jit
def draw(counter_ptr, limit):
    """Asks for the next number of a counter, from one warp: [32] integers that add up to it, or to
    GONE where the program gives way to a `look_at_limit`.

    Nothing waits for it before the sum is taken; it waits for the limit.
    """
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    stays = (~gives_way(limit)).to(gl.int32)
    return gl.inline_asm_elementwise(
        """
        {
            .reg .pred first, stays;
            setp.eq.s32 first, $2, 0;
            setp.ne.and.s32 stays, $3, 0, first;
            selp.u32 $0, 0x3FFFFFFF, 0, first;
            @stays atom.global.add.u32 $0, [$1], 1;
        }
        """,
        "=&r,l,r,r",
        [counter_ptr + lane * 0, lane, stays],
        gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_starts(offsets_ptr, num_experts, STEPS: gl.constexpr):
    """First rows of up to 2^STEPS experts, in the registers of one warp."""
    expert = gl.arange(0, 1 << STEPS, gl.BlockedLayout([1], [32], [1], [0]))
    return gl.load(offsets_ptr + expert, mask=expert < num_experts, other=0x7FFFFFFF)


@gluon.jit
def locate_tile(tile, starts, end, num_n, ROWS: gl.constexpr, GROUP_M: gl.constexpr):
    """Expert, first row and N tile of a tile number, in the order of tiles.locate_tile.

    starts  of `load_starts`
    end     of the last expert's rows
    """
    row = tile // num_n * ROWS
    # The last expert that starts at or before `row`: empty ones lose to the one that holds it.
    before = starts <= row
    expert = gl.sum(before.to(gl.int32), 0) - 1
    start = gl.max(gl.where(before, starts, 0), 0)
    num_m = (-gl.max(gl.where(before, -end, -starts), 0) - start) // ROWS
    inside = tile - start // ROWS * num_n
    group = inside // (GROUP_M * num_n)
    inside -= group * GROUP_M * num_n
    height = min(num_m - group * GROUP_M, GROUP_M)
    return expert, start + (group * GROUP_M + inside % height) * ROWS, inside // height


@gluon.jit
def split_columns(x):
    """Left and right half of [rows, columns]: renames registers, an MMA thread has both halves."""
    rows: gl.constexpr = x.shape[0]
    half: gl.constexpr = x.shape[1] // 2
    return x.reshape([rows, 2, half]).permute((0, 2, 1)).split()


@gluon.jit
def prefetch(address, size):
    """Asks for `size` bytes, a multiple of 16, at each address in L2."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [address, size],
        gl.int32,
        is_pure=False,
        pack=1,
    )


def register_steps(num_experts: int) -> int:
    """STEPS of `load_starts`: 32 experts are one register a thread. 1 → 5, 32 → 5, 33 → 6."""
    return max(5, (num_experts - 1).bit_length())
