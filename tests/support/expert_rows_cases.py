"""Random tables, an oracle in plain loops, and the checks of the row kernels.

As a program it runs them in Triton's interpreter, in fp32 and fp16 (its bf16 arithmetic is wrong);
test_expert_rows.py starts it as a child, because TRITON_INTERPRET=1 has to be set before Triton is
imported. tests/gpu/test_expert_rows.py runs them on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dualpipe_ext.ops.fp8 import dequantize_rows, quantize_rows

GARBAGE_ROW = 1 << 30  # where nobody may look: past unique_counts and beside the K routes
POISON = 77.0
# Half a unit in the last place; fp32 sums of eight numbers add a few roundings.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-21}


@dataclass(frozen=True)
class Case:
    """counts: tokens from each rank, of max_tokens; H; K routes to L experts, `dropped` of them −1;
    spare rows past the last expert (negative: R is too small); whether outer strides are padded."""

    counts: tuple[int, ...]
    max_tokens: int
    H: int
    K: int = 8
    L: int = 4
    dropped: float = 0.6
    spare: int = 5
    padded: bool = False


CASES = {
    "one token": Case((1,), 1, 8, K=1, L=1, dropped=0.0),
    "H 8": Case((3, 0, 150), 160, 8, padded=True),
    "H 136": Case((40, 0, 7), 40, 136, padded=True),
    "many routes": Case((9, 5), 12, 136, K=20, L=6),
    "all dropped": Case((6, 6), 6, 16, dropped=1.0),
    "no tokens": Case((0, 0), 4, 24),
    "no room for tokens": Case((0, 0), 0, 24),
    "too few rows": Case((30, 30), 30, 136, spare=-300),
    "H 2048": Case((9, 3), 11, 2048, padded=True),
}


class Tables:
    """A plan's tables for `case`, and tensors of any dtype, on `device`."""

    def __init__(self, case: Case, device: str, seed: int = 0):
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(seed)
        P, T, K, L = len(case.counts), case.max_tokens, case.K, case.L
        expert = torch.randint(0, L, (P, T, K), generator=self.generator)
        expert[torch.rand(P, T, K, generator=self.generator) < case.dropped] = -1
        for p, count in enumerate(case.counts):
            expert[p, count:] = -1
        rows, offsets, tokens = torch.full((P, T, K), -1), [0], []
        for e in range(L):
            here = (expert == e).nonzero(as_tuple=True)
            rows[here] = torch.arange(offsets[-1], offsets[-1] + len(here[0]))
            tokens.append(len(here[0]))
            offsets.append(offsets[-1] + -(-tokens[-1] // 128) * 128)
        self.R = max(0, offsets[-1] + case.spare)
        self.rows_of = {  # (p, i): row of each k, −1 none
            (p, i): rows[p, i].tolist() for p in range(P) for i in range(case.counts[p])
        }
        for p, count in enumerate(case.counts):
            rows[p, count:] = GARBAGE_ROW
        self.offsets, self.tokens = offsets, tokens
        self.expert_rows = self.table(rows.int(), GARBAGE_ROW)
        self.unique_counts, self.expert_offsets, self.tokens_per_expert = (
            torch.tensor(values, dtype=torch.int32, device=device)
            for values in (case.counts, offsets, tokens)
        )

    def table(self, values: torch.Tensor, garbage: float) -> torch.Tensor:
        """`values` on the device, in a buffer whose last dimension is longer if `padded`."""
        padding = 8 if self.case.padded else 0
        shape = (*values.shape[:-1], values.shape[-1] + padding)
        buffer = torch.full(shape, garbage, dtype=values.dtype, device=self.device)
        view = buffer[..., : values.shape[-1]]
        view.copy_(values)
        return view

    def random(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return self.table(torch.randn(shape, generator=self.generator).to(dtype), POISON)

    def poison(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return self.table(torch.full(shape, POISON, dtype=dtype), POISON)


def check_expand(kernels, case: Case, dtype, device="cpu", fp8=False, num_sms=3) -> None:
    t = Tables(case, device)
    P, T = len(case.counts), case.max_tokens
    unique, scales = t.random(P, T, case.H, dtype=dtype), None
    values = unique.cpu()
    if fp8:
        q, scales = quantize_rows(values * 10)
        values = dequantize_rows(q, scales, dtype)
        unique = t.table(q.view(torch.uint8), 0x7F).view(torch.float8_e4m3fn)
        scales = t.table(scales, POISON)
    weight = t.random(P, T, case.K, dtype=torch.float32)
    rows = t.poison(t.R, case.H, dtype=dtype)
    row_weight = torch.full((t.R,), POISON, device=device)

    want = torch.full((max(t.R, t.offsets[-1]), case.H), POISON, dtype=dtype)
    want_weight = torch.full((len(want),), POISON)
    for e, count in enumerate(t.tokens):
        want[t.offsets[e] + count : t.offsets[e + 1]] = 0
        want_weight[t.offsets[e] + count : t.offsets[e + 1]] = 0
    for (p, i), targets in t.rows_of.items():
        for k, row in enumerate(targets):
            if row >= 0:
                want[row], want_weight[row] = values[p, i], weight[p, i, k].cpu()

    tables = (t.expert_rows, t.unique_counts, t.expert_offsets, t.tokens_per_expert)
    options = dict(scales=scales, num_sms=num_sms)
    kernels.expand(unique, *tables, rows, topk_weight=weight, row_weight=row_weight, **options)
    assert torch.equal(rows.cpu(), want[: t.R])
    assert torch.equal(row_weight.cpu(), want_weight[: t.R])
    rows.fill_(POISON)
    kernels.expand(unique, *tables, rows, **options)
    assert torch.equal(rows.cpu(), want[: t.R])


def check_sum_per_rank(kernels, case: Case, dtype, device="cpu", num_sms=3) -> None:
    t = Tables(case, device)
    P, T = len(case.counts), case.max_tokens
    rows = t.random(t.R, case.H, dtype=dtype)
    row_weight = torch.randn(t.R, generator=t.generator).to(device)
    sums = t.poison(P, T, case.H, dtype=dtype)
    sum_weight = t.poison(P, T, case.K, dtype=torch.float32)

    want = torch.full((P, T, case.H), POISON, dtype=torch.float64)
    want_weight = torch.full((P, T, case.K), POISON)
    largest = torch.zeros_like(want)
    on_cpu, weight_on_cpu = rows.cpu().double(), row_weight.cpu()
    for (p, i), sources in t.rows_of.items():
        want[p, i], want_weight[p, i] = 0, 0
        for k, row in enumerate(sources):
            if 0 <= row < t.R:
                want[p, i] += on_cpu[row]
                largest[p, i] += on_cpu[row].abs()
                want_weight[p, i, k] = weight_on_cpu[row]

    tables = (rows, t.expert_rows, t.unique_counts)
    kernels.sum_per_rank(
        *tables, sums, num_sms=num_sms, row_weight=row_weight, sum_weight=sum_weight
    )
    check_sum(sums, want, largest)
    assert torch.equal(sum_weight.cpu(), want_weight)
    again = t.poison(P, T, case.H, dtype=dtype)
    kernels.sum_per_rank(*tables, again, num_sms=num_sms)
    assert torch.equal(again, sums)


def check_sum(got: torch.Tensor, want: torch.Tensor, largest: torch.Tensor) -> None:
    """`got` is `want` rounded once, but for the sum's own roundings, of `largest` · 2⁻²³ each."""
    error = (got.cpu().double() - want).abs()
    assert bool((error <= ROUNDING[got.dtype] * want.abs() + 2**-21 * largest).all()), error.max()


def home_tables(case: Case, device: str) -> tuple[Tables, torch.Tensor, torch.Tensor, int]:
    """For T = counts[0] tokens of this rank: topk_idx [T, K] over P ranks, send_rows [T, P]."""
    t = Tables(case, device)
    P, T, local = len(case.counts), case.counts[0], case.L
    idx = torch.randint(0, P * local, (T, case.K), generator=t.generator)
    idx[torch.rand(idx.shape, generator=t.generator) < case.dropped] = -1
    send = torch.full((T, P), -1)
    for p in range(P):
        position = 0
        for token in range(T):
            if any(0 <= e - p * local < local for e in idx[token].tolist()):
                send[token, p] = position
                position += 1
    return t, idx.int(), send.int(), local


def check_sum_at_home(kernels, case: Case, dtype, device="cpu", num_sms=3) -> None:
    t, idx, send, local = home_tables(case, device)
    P, T = len(case.counts), len(idx)
    received = t.random(P, case.max_tokens, case.H, dtype=dtype)
    received_weight = t.random(P, case.max_tokens, case.K, dtype=torch.float32)
    y = t.poison(T, case.H, dtype=dtype)
    weight = t.poison(T, case.K, dtype=torch.float32)

    want, largest = (torch.zeros(T, case.H, dtype=torch.float64) for _ in range(2))
    want_weight = torch.zeros(T, case.K)
    for token in range(T):
        for p, position in enumerate(send[token].tolist()):
            if position >= 0:
                want[token] += received[p, position].cpu().double()
                largest[token] += received[p, position].cpu().double().abs()
        for k, expert in enumerate(idx[token].tolist()):
            if expert >= 0:
                position = int(send[token, expert // local])
                want_weight[token, k] = received_weight[expert // local, position, k].cpu()

    send = t.table(send, GARBAGE_ROW)
    kernels.sum_at_home(
        received,
        send,
        y,
        num_sms=num_sms,
        topk_idx=t.table(idx, GARBAGE_ROW),
        received_weight=received_weight,
        topk_weight=weight,
        num_local_experts=local,
    )
    check_sum(y, want, largest)
    assert torch.equal(weight.cpu(), want_weight)
    again = t.poison(T, case.H, dtype=dtype)
    kernels.sum_at_home(received, send, again, num_sms=num_sms)
    assert torch.equal(again, y)


CHECKS = (check_expand, check_sum_per_rank, check_sum_at_home)


def main() -> None:
    from dualpipe_ext.triton_kernels.experts import rows as expert_rows

    for name, case in CASES.items():
        for dtype in (torch.float32, torch.float16):
            for check in CHECKS:
                check(expert_rows, case, dtype)
            check_expand(expert_rows, case, dtype, fp8=True, num_sms=2)
        print("ok", name, flush=True)


if __name__ == "__main__":
    main()
