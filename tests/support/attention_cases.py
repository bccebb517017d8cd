"""Attention by its definition in fp64, random problems, and the kernels' files on the CPU."""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from unittest import mock

import torch

from tests.support import ROOT
from tests.support.compare import relative_error
from tests.support.gluon_emulator import emulate

NAN = float("nan")
NAMES = ("out", "dq", "dk", "dv")

# Lengths, heads, (D, V), causal, packed, spare rows, SMs.
CASES = {
    "one position": ([1], [1], 1, 1, 64, 64, True, False, 0, 4),
    "two batches, shared keys": ([300] * 2, [300] * 2, 2, 1, 64, 64, True, False, 0, 3),
    "more keys": ([130] * 2, [257] * 2, 4, 2, 128, 128, True, False, 0, 2),
    "blind queries": ([401], [130], 2, 2, 128, 128, True, False, 0, 1),
    "whole tiles": ([256], [384], 2, 1, 128, 128, False, False, 0, 7),
    "latent": ([257], [257], 2, 2, 192, 128, True, False, 0, 2),
    "packed": ([130, 0, 5, 200], [130, 7, 0, 300], 4, 2, 128, 128, True, True, 9, 3),
    "packed, full": ([1, 257, 0], [300, 2, 0], 2, 1, 64, 64, False, True, 0, 40),
    "packed, latent": ([129, 3], [140, 3], 2, 1, 192, 128, True, True, 130, 3),
}


def error_of(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Against numbers around 1: where a query sees one key, dq is exactly 0 and ours is a rest; the
    key's dk adds up the rests of all its queries, 5.6e-7 of 58."""
    return relative_error(value, reference, floor=0.2)


def one_query(q, k, v, scale):
    """The definition for one query [D] and the keys [S, D] that it sees."""
    if not len(k):
        return torch.zeros_like(v.sum(0))
    weight = torch.exp(scale * (k @ q))
    return (weight[:, None] * v).sum(0) / weight.sum()


@dataclass
class Problem:
    """Sequences of `q_lengths` queries and `k_lengths` keys; packed, or of one length each."""

    q_lengths: list[int]
    k_lengths: list[int]
    N: int
    G: int
    D: int
    V: int
    causal: bool
    packed: bool
    dtype: torch.dtype = torch.float32
    spare: int = 0  # rows past the end of the last packed sequence
    scale: float = 0.2
    device: str = "cpu"

    def __post_init__(self):
        draw = [(sum(self.q_lengths), self.N, self.D), (sum(self.k_lengths), self.G, self.D)]
        draw += [(sum(self.k_lengths), self.G, self.V), (sum(self.q_lengths), self.N, self.V)]
        self.rows = [torch.randn(shape).to(self.device, self.dtype) for shape in draw]

    def inputs(self) -> list[torch.Tensor]:
        """q, k, v and d_out as the operator takes them; spare rows are NaN."""
        B = len(self.q_lengths)
        if not self.packed:
            return [x.unflatten(0, (B, len(x) // B)).transpose(1, 2) for x in self.rows]
        spare = [x.new_full((self.spare, *x.shape[1:]), NAN) for x in self.rows]
        return [torch.cat(pair) for pair in zip(self.rows, spare, strict=True)]

    def starts(self) -> dict[str, torch.Tensor]:
        if not self.packed:
            return {}
        sums = [
            torch.tensor([0, *lengths]).cumsum(0).to(self.device, torch.int32)
            for lengths in (self.q_lengths, self.k_lengths)
        ]
        return dict(zip(("cu_seqlens_q", "cu_seqlens_k"), sums, strict=True))

    def rows_of(self, results) -> list[torch.Tensor]:
        """out, dq, dk, dv as [T, heads, width], and the spare rows checked to be 0."""
        if not self.packed:
            return [x.transpose(1, 2).flatten(0, 1) for x in results]
        T_q, T_k = sum(self.q_lengths), sum(self.k_lengths)
        cut = []
        for x, end in zip(results, (T_q, T_q, T_k, T_k), strict=True):
            assert not x[end:].any(), "spare rows are not 0"
            cut.append(x[:end])
        return cut

    def expected(self) -> list[torch.Tensor]:
        """out, dq, dk, dv in fp64, [T, heads, width], by torch's own derivative."""
        q, k, v = (x.double().requires_grad_() for x in self.rows[:3])
        out, first_q, first_k = [], 0, 0
        share = self.N // self.G
        for S_q, S_k in zip(self.q_lengths, self.k_lengths, strict=True):
            keys, values = (
                x[first_k : first_k + S_k].repeat_interleave(share, 1).transpose(0, 1)
                for x in (k, v)
            )
            queries = q[first_q : first_q + S_q].transpose(0, 1)
            sees = torch.full((S_q,), S_k, device=q.device)
            if self.causal:
                sees = torch.arange(1, S_q + 1, device=q.device) + (S_k - S_q)
            blind = int((sees <= 0).sum())
            hidden = torch.arange(S_k, device=q.device) >= sees[blind:, None]
            s = queries[:, blind:] @ keys.transpose(1, 2) * self.scale
            mixed = torch.softmax(s.masked_fill(hidden, -torch.inf), dim=2) @ values
            zero = mixed.new_zeros(self.N, blind, self.V)
            out.append(torch.cat([zero, mixed], dim=1).transpose(0, 1))
            first_q, first_k = first_q + S_q, first_k + S_k
        out = torch.cat(out)
        if out.requires_grad:
            out.backward(self.rows[3].double())
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (q, k, v)]
        return [out.detach(), *grads]


@cache
def kernels() -> SimpleNamespace:
    names = ("delta", "forward", "backward", "backward_query")
    paths = [f"attention.{name}" for name in names]
    modules = emulate(ROOT / "triton_kernels", *paths, "launch.sm_sharing")
    return SimpleNamespace(**dict(zip((*names, "sm_sharing"), modules, strict=True)))


def run_kernels(
    problem: Problem, num_sms: int, deterministic: bool, limit: int = 0
) -> list[torch.Tensor]:
    """out, dq, dk, dv by the kernels on the CPU, through the operator's own code.

    Of programs beyond `limit` each leaves after its first tile; 0: none.
    """
    from dualpipe_ext.ops import attention as op

    emulated = kernels()
    emulated.sm_sharing.program_limit(torch.device("cpu")).fill_(limit)
    prefix = "dualpipe_ext.triton_kernels.attention"
    names = ("delta", "forward", "backward", "backward_query")
    fakes = {f"{prefix}.{name}": getattr(emulated, name) for name in names}
    q, k, v, d_out = problem.inputs()
    starts = problem.starts()
    starts = (starts.get("cu_seqlens_q"), starts.get("cu_seqlens_k"))
    options = op.AttentionOptions(problem.causal, problem.scale, num_sms, deterministic, "triton")
    with (
        mock.patch.dict("sys.modules", fakes),
        mock.patch.object(op, "_use_kernels", lambda *arguments: True),
        poisoned_memory(),
    ):
        out, lse = op.forward_operator(q, k, v, *starts, options)
        gradients = op.backward_operator(d_out, q, k, v, out, lse, *starts, options)
    return problem.rows_of([out, *gradients])


def poisoned_memory():
    """What the operator allocates is full of NaN while this context lasts."""
    return mock.patch.object(torch.Tensor, "new_empty", _poisoned)


def _poisoned(self, *shape, dtype=None):
    shape = shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape
    return self.new_full(shape, NAN, dtype=dtype or self.dtype)
