"""Scores of a tile of queries: which keys it sees, q kᵀ, and the mask."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from ..launch.shared_memory import matrix


@gluon.jit
def score_blocks(
    block, row, q_length, k_length, CAUSAL: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr
):
    """Blocks of keys that the queries from `row` on see, and how many of them need no mask.

    Query i sees keys up to i + k_length - q_length: the last query sees all. One block at least,
    whatever it shows.
    """
    end = k_length
    whole = k_length
    if CAUSAL:
        end = min(end, (block + 1) * ROWS + k_length - q_length)
        whole = min(whole, row + 1 + k_length - q_length)
    return max((end + BLOCK - 1) // BLOCK, 1), max(whole, 0) // BLOCK


@gluon.jit
def hide_scores(s, key, row, q_length, k_length, CAUSAL: gl.constexpr):
    """-inf where the query must not see the key, or there is none."""
    rows: gl.constexpr = s.shape[0]
    columns: gl.constexpr = s.shape[1]
    column = key + gl.arange(0, columns, gl.SliceLayout(0, s.type.layout))
    last = k_length - 1
    if CAUSAL:
        i = row + gl.arange(0, rows, gl.SliceLayout(1, s.type.layout))
        last = gl.minimum(last, i + k_length - q_length)
        visible = gl.expand_dims(column, 0) <= gl.expand_dims(last, 1)
    else:
        visible = gl.expand_dims(column, 0) <= last
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def issue_scores(
    q, q_rest, k_smem, k_rest, slot, layout: gl.constexpr, BLOCK: gl.constexpr, REST: gl.constexpr
):
    """Starts q kᵀ, [64, block]: one group of products, or two where D has a rest."""
    s = gl.zeros([64, BLOCK], gl.float32, layout)
    s = warpgroup_mma(q, matrix(k_smem, slot).permute((1, 0)), s, use_acc=False, is_async=True)
    if REST:
        s = warpgroup_mma(q_rest, matrix(k_rest, slot).permute((1, 0)), s, is_async=True)
    return s
