"""Exact attention in tiles, forward and backward, on a given number of SMs.

Letters: B sequences, N query heads, G key/value heads, S positions, T positions of all packed
sequences, D width of queries and keys, V width of values.

    s = scale · q kᵀ          out = softmax(s) v          lse = log Σ exp s

FlashAttention (arXiv 2205.14135, 2307.08691, 2407.08608). Two implementations compute the same:
Gluon kernels on Hopper GPUs, and plain torch, which holds one head's scores at a time, anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..compat import constant_in_graphs
from .operator import (
    Operator,
    Options,
    check_implementation,
    check_num_sms,
    device_facts,
    has_gluon,
    is_aligned,
    sm_count,
    wide,
    without_autocast,
    without_missing_kernels,
)

__all__ = [
    "AttentionOptions",
    "backward_into",
    "backward_operator",
    "flash_attention",
    "forward_operator",
    "runs_as_kernels",
]

DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = ((64, 64), (128, 128), (192, 128))  # (D, V) that the kernels take


@dataclass(frozen=True)
class AttentionOptions(Options):
    """As in `flash_attention`, all given."""

    causal: bool
    scale: float
    num_sms: int  # 0 = all
    deterministic: bool
    implementation: str


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    num_sms: int | None = None,
    deterministic: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """softmax(scale · q kᵀ) v, differentiable in q, k and v.

    q               [B, N, S_q, D], or packed sequences one after the other, [T_q, N, D]
    k, v            [B, G, S_k, D], [B, G, S_k, V], or [T_k, G, D], [T_k, G, V]; N a multiple of G,
                    head n of q uses head n // (N / G)
    causal          query i sees keys up to i + S_k − S_q: the last query sees all keys
    scale           positive; None is D ** −0.5
    cu_seqlens_*    [B + 1] int32 on q's device: first row of each packed sequence and the end of
                    the last, rising from 0. The host does not read them on the GPU. Rows past the
                    end are not read; out and the gradients are 0 there.
    num_sms         SMs that the kernels of both passes may take, at run time; None takes all
    deterministic   the backward gives the same bits in every run, at seven matrix products instead
                    of five; otherwise only dq depends on the order in which tiles finish
    implementation  "triton", "reference", or "auto": Triton for bf16 and fp16 on a Hopper GPU with
                    (D, V) one of (64, 64), (128, 128), (192, 128), else the reference

    Returns out [B, N, S_q, V] with the heads of a position side by side in memory, or [T_q, N, V].
    A query that sees no key gets 0.

    Raises TypeError or ValueError naming the value, the limit and the remedy.
    """
    scale = None if scale is None else float(scale)
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, num_sms, implementation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = AttentionOptions(causal, scale, num_sms or 0, deterministic, implementation)
    return forward_operator(q, k, v, cu_seqlens_q, cu_seqlens_k, options)[0]


def runs_as_kernels(q: Tensor, widths: tuple[int, int]) -> bool:
    """Whether `flash_attention` computes queries like q, with (D, V) of `widths`, by its kernels
    where the choice is its own."""
    return q.is_cuda and q.dtype in DTYPES and widths in WIDTHS and _takes_kernels(q.device)


# ---- Checks ----


def _check(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, num_sms, implementation) -> None:
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None):
        raise ValueError("only one of cu_seqlens_q and cu_seqlens_k is given: pass both or none")
    wanted = "[T, heads, width]" if packed else "[B, heads, S, width]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != (3 if packed else 4):
            hint = "" if packed else ", or cu_seqlens_q and cu_seqlens_k for packed sequences"
            raise ValueError(f"{name} has {x.dim()} dimensions: pass {wanted}{hint}")
        if x.dtype != q.dtype or not x.dtype.is_floating_point:
            raise TypeError(
                f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: pass one floating-point dtype"
            )
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: move it there")
        if 0 in (x.shape[-1], x.shape[1]):
            raise ValueError(f"{name} is {tuple(x.shape)}: pass at least one head and one column")
    if (
        k.shape[:-1] != v.shape[:-1]
        or q.shape[-1] != k.shape[-1]
        or (not packed and q.shape[0] != k.shape[0])
    ):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: pass "
            f"{wanted}, k as wide as q, v as long as k"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads: "
            "give every key head the same number of query heads"
        )
    if packed:
        _check_starts(q, cu_seqlens_q, cu_seqlens_k)
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale={scale}: pass a positive number, or None for D ** -0.5")
    check_num_sms(num_sms)
    check_implementation(implementation)


def _check_starts(q, cu_seqlens_q, cu_seqlens_k) -> None:
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if starts.dtype != torch.int32:
            raise TypeError(f"{name} is {starts.dtype}: pass torch.int32")
        if starts.dim() != 1 or starts.shape[0] < 2 or starts.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"{name} is {tuple(starts.shape)}: pass ({cu_seqlens_q.shape[0]},), the first row "
                "of each of at least one sequence and the end of the last, as many for k as for q"
            )
        if starts.device != q.device:
            raise ValueError(f"{name} is on {starts.device}, q on {q.device}: move it there")
        if not starts.is_contiguous():
            raise ValueError(f"{name} has stride {starts.stride()}: pass it contiguous")


# ---- Plain torch: the oracle, and the path without a Hopper GPU ----


def _spans(x: Tensor, starts: Tensor, name: str) -> list[tuple[int, int]]:
    """First and end row of each sequence, on the host."""
    rows = starts.tolist()
    spans = list(pairwise(rows))
    if rows[0] != 0 or rows[-1] > x.shape[0] or any(a > b for a, b in spans):
        raise ValueError(
            f"{name}={rows}: pass rising numbers from 0 to at most the {x.shape[0]} rows there are"
        )
    return spans


def _heads(
    q, k, v, lse, starts_q, starts_k, *more: tuple[Tensor, str]
) -> Iterator[tuple[Tensor, ...]]:
    """One query head of one sequence after the other, with its key head: views [S, width].

    `more` are pairs (x, "q" or "k") to be cut in the same way.
    """
    if starts_q is None:
        places = [(b, slice(None), slice(None)) for b in range(q.shape[0])]
    else:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        more = tuple((x.transpose(0, 1)[None], side) for x, side in more)
        lse = lse[None]
        spans = zip(_spans(q[0, 0], starts_q, "cu_seqlens_q"),
                    _spans(k[0, 0], starts_k, "cu_seqlens_k"), strict=True)  # fmt: skip
        places = [(0, slice(*a), slice(*b)) for a, b in spans]
    share = q.shape[1] // k.shape[1]
    for b, rows_q, rows_k in places:
        for n in range(q.shape[1]):
            g = n // share
            cut = (x[b, n, rows_q] if side == "q" else x[b, g, rows_k] for x, side in more)
            yield q[b, n, rows_q], k[b, g, rows_k], v[b, g, rows_k], lse[b, n, rows_q], *cut


def _scores(q: Tensor, k: Tensor, options: AttentionOptions) -> Tensor:
    math = wide(q.dtype)
    s = q.to(math) @ k.to(math).T * options.scale
    if options.causal:
        hidden = torch.ones_like(s, dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1)
        s.masked_fill_(hidden, -torch.inf)
    return s


def _probabilities(s: Tensor, lse: Tensor) -> Tensor:
    """0 in the rows of queries that see nothing, whose lse is -inf."""
    return torch.exp(s - torch.where(lse == -torch.inf, torch.inf, lse)[:, None])


@without_autocast
def _reference_forward(q, k, v, starts_q, starts_k, options, out, lse) -> None:
    if starts_q is not None:
        out.zero_()
    for q1, k1, v1, lse1, out1 in _heads(q, k, v, lse, starts_q, starts_k, (out, "q")):
        s = _scores(q1, k1, options)
        lse1.copy_(s.logsumexp(1))
        out1.copy_(_probabilities(s, lse1) @ v1.to(s.dtype))


@without_autocast
def _reference_backward(d_out, q, k, v, out, lse, starts_q, starts_k, options, dq, dk, dv) -> None:
    math = lse.dtype
    dq.zero_()
    # Heads that share keys add up before they are rounded.
    dk_sum, dv_sum = (torch.zeros_like(x, dtype=math) for x in (dk, dv))
    more = ((d_out, "q"), (out, "q"), (dq, "q"), (dk_sum, "k"), (dv_sum, "k"))
    heads = _heads(q, k, v, lse, starts_q, starts_k, *more)
    for q1, k1, v1, lse1, d_out1, out1, dq1, dk1, dv1 in heads:
        p = _probabilities(_scores(q1, k1, options), lse1)
        d_out1 = d_out1.to(math)
        delta = (d_out1 * out1.to(math)).sum(1, keepdim=True)
        ds = p * (d_out1 @ v1.to(math).T - delta) * options.scale
        dq1.copy_(ds @ k1.to(math))
        dk1 += ds.T @ q1.to(math)
        dv1 += p.T @ d_out1
    dk.copy_(dk_sum)
    dv.copy_(dv_sum)


# ---- Choice of the implementation ----


@constant_in_graphs
def _takes_kernels(device: torch.device) -> bool:
    return device_facts(device)[1][0] == 9 and has_gluon()


def _use_kernels(q: Tensor, v: Tensor, implementation: str) -> bool:
    widths = (q.shape[-1], v.shape[-1])
    if implementation != "triton":
        return implementation == "auto" and runs_as_kernels(q, widths)
    if not q.is_cuda:
        problem = f"tensors on {q.device}: it needs a Hopper GPU"
    elif device_facts(q.device)[1][0] != 9:
        problem = f"compute capability {device_facts(q.device)[1][0]}.x: it needs a Hopper GPU, 9.0"
    elif q.dtype not in DTYPES:
        problem = f"{q.dtype}: it takes torch.bfloat16 and torch.float16"
    elif widths not in WIDTHS:
        problem = f"(D, V) = {widths}: it takes {', '.join(map(str, WIDTHS))}; pad the heads"
    else:
        return True
    raise ValueError(f"implementation='triton' with {problem}, or pass implementation='auto'")


def _rows(x: Tensor, packed: bool) -> Tensor:
    """x as [B, heads, S, width] that TMA can read: copied if its strides do not allow that."""
    *outer, last = x.stride()
    fits = last == 1 and is_aligned(x)
    fits = fits and all(s and s % 8 == 0 for s, n in zip(outer, x.shape, strict=False) if n > 1)
    x = x if fits else x.clone(memory_format=torch.contiguous_format)
    return x.transpose(0, 1)[None] if packed else x


# ---- Operators ----


def _empty_like(x: Tensor, width: int, packed: bool) -> Tensor:
    """[..., width], the heads of a position side by side: out's projection needs no copy."""
    if packed:
        return x.new_empty(*x.shape[:-1], width)
    B, N, S, _ = x.shape
    return x.new_empty(B, S, N, width).transpose(1, 2)


def _forward_outputs(q: Tensor, v: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    shape = (q.shape[1], q.shape[0]) if packed else q.shape[:3]
    return _empty_like(q, v.shape[-1], packed), q.new_empty(shape, dtype=wide(q.dtype))


@without_missing_kernels
def backward_into(
    gradients, d_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, options: AttentionOptions
) -> None:
    """The backward operator, into tensors of the caller's: at multiples of 16 bytes, with strides
    that are multiples of 8, but for the last, which is 1."""
    packed = cu_seqlens_q is not None
    starts = (cu_seqlens_q, cu_seqlens_k)
    if not _use_kernels(q, v, options.implementation):
        _reference_backward(d_out, q, k, v, out, lse, *starts, options, *gradients)
    elif not q.numel() or not k.numel():
        for x in gradients:
            x.zero_()
    else:
        rows: Any = [_rows(x, packed) for x in (q, k, v, d_out, out, *gradients)]
        for x, written in zip(gradients, rows[5:], strict=True):
            if x.data_ptr() != written.data_ptr():
                raise ValueError(
                    f"a gradient starts at {x.data_ptr():#x} with strides {x.stride()}: pass "
                    "multiples of 16 bytes and of 8"
                )
        sms = sm_count(q, options.num_sms)
        tensors: tuple[Any, ...] = (*rows, lse, cu_seqlens_q, cu_seqlens_k, options, sms)
        _backward_kernels(*tensors)
        if packed:
            from ..triton_kernels.attention.delta import clear_tail

            ends = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)
            for x, end in zip(gradients, ends, strict=True):
                clear_tail(x, end, num_sms=sms)


def _backward_kernels(
    q, k, v, d_out, out, dq, dk, dv, lse, starts_q, starts_k, options: AttentionOptions, sms: int
) -> None:
    from ..triton_kernels.attention.backward import BACKWARD, attention_backward
    from ..triton_kernels.attention.backward_query import query_gradient
    from ..triton_kernels.attention.delta import finish_query_gradient, prepare, scratch_rows

    D, V = q.shape[3], v.shape[3]
    config = BACKWARD[D, V]
    config = replace(config, fused=config.fused and not options.deterministic)
    count = scratch_rows(q, starts_q)
    lse_rows, delta = lse.new_empty(count), lse.new_empty(count)
    dq_sum = lse.new_empty(count, D) if config.fused else None
    prepare(out, d_out, lse, starts_q, lse_rows, delta, dq_sum, num_sms=sms)
    scratch = (lse_rows, delta)
    scores: dict[str, Any] = dict(causal=options.causal, scale=options.scale, num_sms=sms)
    attention_backward(
        q, k, v, d_out, *scratch, dk, dv, dq_sum, starts_q, starts_k, config=config, **scores
    )
    if dq_sum is not None:
        finish_query_gradient(dq_sum, dq, starts_q, scale=options.scale, num_sms=sms)
    else:
        query_gradient(q, k, v, d_out, *scratch, dq, starts_q, starts_k, **scores)


_STARTS = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"


class _ForwardOperator:
    """out, as `flash_attention` returns it, and lse [B, N, S_q], or packed [N, T_q]."""

    @staticmethod
    def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, options):
        packed = cu_seqlens_q is not None
        out, lse = _forward_outputs(q, v, packed)
        starts = (cu_seqlens_q, cu_seqlens_k)
        if not _use_kernels(q, v, options.implementation):
            _reference_forward(q, k, v, *starts, options, out, lse)
        elif not k.numel():
            out.zero_()
            lse.fill_(-torch.inf)
        elif q.numel():
            from ..triton_kernels.attention.delta import clear_tail
            from ..triton_kernels.attention.forward import attention_forward

            sms = sm_count(q, options.num_sms)
            rows: Any = [_rows(x, packed) for x in (q, k, v, out)]
            scores: dict[str, Any] = dict(causal=options.causal, scale=options.scale, num_sms=sms)
            tensors: tuple[Any, ...] = (*rows, lse, cu_seqlens_q, cu_seqlens_k)
            attention_forward(*tensors, **scores)
            if packed:
                clear_tail(out, cu_seqlens_q, num_sms=sms)
        return out, lse

    @staticmethod
    def fake(q, k, v, cu_seqlens_q, cu_seqlens_k, options):
        return _forward_outputs(q, v, cu_seqlens_q is not None)

    @staticmethod
    def save(ctx, inputs, output):
        q, k, v, cu_seqlens_q, cu_seqlens_k, ctx.options = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)

    @staticmethod
    def backward(ctx, d_out, _d_lse):
        return backward_operator(d_out, *ctx.saved_tensors, ctx.options)


forward_operator = Operator(
    f"flash_attention_forward(Tensor q, Tensor k, Tensor v, {_STARTS}, "
    f"{AttentionOptions.schema()}) -> (Tensor, Tensor)",
    _ForwardOperator,
    AttentionOptions,
)


class _BackwardOperator:
    """The gradients of q, k and v."""

    @staticmethod
    def forward(d_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, options):
        packed = cu_seqlens_q is not None
        gradients = tuple(_empty_like(x, x.shape[-1], packed) for x in (q, k, v))
        backward_into(gradients, d_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, options)
        return gradients

    @staticmethod
    def fake(d_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, options):
        packed = cu_seqlens_q is not None
        return tuple(_empty_like(x, x.shape[-1], packed) for x in (q, k, v))


backward_operator = Operator(
    "flash_attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_STARTS}, {AttentionOptions.schema()}) -> (Tensor, Tensor, Tensor)",
    _BackwardOperator,
    AttentionOptions,
)
