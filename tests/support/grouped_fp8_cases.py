"""The fp8 GEMM's problems and what they should give, in plain torch; and, as a program, the
quantising kernels in Triton's interpreter.

test_grouped_fp8.py starts the program as a child: TRITON_INTERPRET=1 has to be set before Triton is
imported. fp32 inputs, since the interpreter's bf16 arithmetic is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from dualpipe_ext.ops.fp8 import quantize_rows
from tests.support.compare import relative_error

E4M3 = torch.float8_e4m3fn
NAN = float("nan")

INTERPRETED = ("swiglu", "swiglu, half a tile wide", "empty experts", "partial tiles", "narrow")

# Rows of each expert (multiples of 128), N, K, rows past the last expert.
CASES = {
    "one tile": ((128,), 256, 128, 0),
    "empty experts": ((0, 256, 0, 0, 128, 0), 256, 512, 128),
    "partial tiles": ((128, 384), 400, 272, 200),
    "narrow": ((256, 128), 16, 16, 0),
    "half a tile wide": ((128, 128, 128), 128, 640, 0),
    "many M tiles": ((2304,), 512, 256, 0),
}


def quantize_squares(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [L, N, K] as e4m3 and a scale for 128 × 128 of it, square by square."""
    L, N, K = weight.shape
    q = torch.empty(L, N, K, dtype=E4M3, device=weight.device)
    scales = torch.empty(L, -(-N // 128), -(-K // 128), device=weight.device)
    for expert in range(L):
        for n in range(0, N, 128):
            for k in range(0, K, 128):
                square = weight[expert, n : n + 128, k : k + 128].float()
                amax = torch.clamp(square.abs().max(), min=1e-4)
                largest = torch.full_like(amax, 448.0)
                q[expert, n : n + 128, k : k + 128] = (square * (largest / amax)).to(E4M3)
                scales[expert, n // 128, k // 128] = amax / largest
    return q, scales


@dataclass
class Problem:
    """Rows and weights as fp8, and the numbers they were."""

    rows: torch.Tensor  # [R, K] bf16; NaN past the last expert
    weight: torch.Tensor  # [L, N, K] bf16
    offsets: torch.Tensor
    q_rows: torch.Tensor
    row_scale: torch.Tensor  # [K / 128, R]
    q_weight: torch.Tensor
    weight_scale: torch.Tensor  # [L, N / 128, K / 128]

    @property
    def end(self) -> int:
        return int(self.offsets[-1])

    def expected(self) -> torch.Tensor:
        """Of the fp8 numbers, in fp64: [end, N]."""
        K = self.rows.shape[1]
        _, N, _ = self.weight.shape
        scale = self.row_scale.T.double().repeat_interleave(128, 1)[:, :K]
        rows = self.q_rows.double() * scale
        scale = self.weight_scale.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
        return self._multiply(rows, self.q_weight.double() * scale[:, :N, :K])

    def unrounded(self) -> torch.Tensor:
        """Of the bf16 numbers, in fp64: [end, N]."""
        return self._multiply(self.rows.double(), self.weight.double())

    def _multiply(self, rows, weight):
        spans = pairwise(self.offsets.tolist())
        return torch.cat([rows[a:b] @ weight[i].T for i, (a, b) in enumerate(spans)])


def make_problem(counts, N: int, K: int, spare: int = 0, device: str = "cpu") -> Problem:
    """Rows and squares of very different sizes, so that a wrong scale shows."""
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32).to(device)
    R, L = sum(counts) + spare, len(counts)
    rows = torch.randn(R, K, device=device) * torch.rand(R, 1, device=device).exp2()
    blocks = torch.randint(-3, 4, (R, -(-K // 128)), device=device).float().exp2()
    rows = (rows * blocks.repeat_interleave(128, 1)[:, :K]).bfloat16()
    squares = torch.randint(-3, 4, (L, -(-N // 128), -(-K // 128)), device=device).float().exp2()
    squares = squares.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :N, :K]
    weight = (torch.randn(L, N, K, device=device) * squares).bfloat16()
    rows[sum(counts) :] = NAN
    q_rows, row_scale = quantize_rows(rows)
    q_weight, weight_scale = quantize_squares(weight)
    return Problem(rows, weight, offsets, q_rows, row_scale.T.contiguous(), q_weight, weight_scale)


def check_quantizers(rows: torch.Tensor, weight: torch.Tensor, problem: Problem) -> None:
    """The kernels give what plain torch gives, bit for bit."""
    from dualpipe_ext.triton_kernels.experts import quantize

    def same(a, b):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))

    end = problem.end
    q, scales = quantize.quantize_rows(rows, problem.offsets, num_sms=5)
    same(q[:end], problem.q_rows[:end])
    assert torch.equal(scales[:, :end], problem.row_scale[:, :end])
    q, transposed, scales = quantize.quantize_weights(weight)
    same(q, problem.q_weight)
    same(transposed, problem.q_weight.transpose(1, 2).contiguous())
    assert torch.equal(scales, problem.weight_scale)


def make_swiglu(counts, I: int, spare: int, dtype, device: str = "cpu"):  # noqa: E741
    """d_act [R, I], gate_up [R, 2I], row_weight [R] and offsets; NaN past the last expert."""
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32).to(device)
    R = sum(counts) + spare
    d_act, gate_up = torch.randn(R, I, device=device), 2 * torch.randn(R, 2 * I, device=device)
    row_weight = torch.rand(R, device=device)
    for tensor in (d_act, gate_up, row_weight):
        tensor[sum(counts) :] = NAN
    return d_act.to(dtype), gate_up.to(dtype), row_weight, offsets


def check_swiglu(d_act, gate_up, row_weight, offsets, num_sms: int, tolerance: float) -> None:
    """The kernels against torch's derivative in fp64, and fp8 against rounding that."""
    from dualpipe_ext.triton_kernels.experts.fp8_swiglu import swiglu, swiglu_backward

    end = int(offsets[-1])

    def check_fp8(q, scales, exact):
        want, want_scales = quantize_rows(exact.float())
        assert relative_error(scales[:, :end].T, want_scales) < 1e-5
        # A number next to the middle of two may go the other way, by an eighth at most.
        got, want = q[:end].float(), want.float()
        assert ((got - want).abs() <= 0.126 * want.abs() + 2**-9).all()
        assert (got != want).float().mean() < 1e-3

    gates = gate_up[:end].double().requires_grad_()
    weight = row_weight[:end].double().requires_grad_()
    gate, up = gates.chunk(2, dim=1)
    exact = gate / (1 + torch.exp(-gate)) * up * weight[:, None]
    exact.backward(d_act[:end].double())
    check_fp8(*swiglu(gate_up, row_weight, offsets, num_sms=num_sms), exact.detach())
    d_gate_up, act = torch.full_like(gate_up, NAN), torch.full_like(d_act, NAN)
    *d_fp8, d_row_weight = swiglu_backward(
        d_act, gate_up, row_weight, offsets, d_gate_up, act, num_sms=num_sms
    )
    check_fp8(*d_fp8, gates.grad)
    for got, want in ((act, exact.detach()), (d_gate_up, gates.grad)):
        assert relative_error(got[:end], want) < tolerance
        assert got[end:].isnan().all()
    assert relative_error(d_row_weight[:end], weight.grad) < 1e-5
    assert not d_row_weight[end:].any()


def _convert_float(convert):
    """The interpreter's conversion, but fp8 by torch: its own rounds halves up, loses carries."""

    def converted(values, source, target, rounding):
        if str(target) == "fp8e4nv":
            return torch.from_numpy(values).to(E4M3).view(torch.uint8).numpy()
        return convert(values, source, target, rounding)

    return converted


def main() -> None:
    from triton.runtime import interpreter

    interpreter._convert_float = _convert_float(interpreter._convert_float)
    torch.manual_seed(0)
    wide, odd, *quantizers = INTERPRETED
    for name, counts, width, spare in ((wide, (0, 128, 128), 512, 200), (odd, (256,), 384, 0)):
        for num_sms in (1, 3, 100):
            problem = make_swiglu(counts, width, spare, torch.float32)
            check_swiglu(*problem, num_sms, 1e-6)
        print("ok", name)
    for name in quantizers:
        problem = make_problem(*CASES[name])
        # One block of zeros: its scale is that of the smallest maximum.
        problem.rows[:3, :128], problem.weight[0, :128, :128] = 0, 0
        problem.q_rows, scales = quantize_rows(problem.rows)
        problem.row_scale = scales.T.contiguous()
        problem.q_weight, problem.weight_scale = quantize_squares(problem.weight)
        check_quantizers(problem.rows.float(), problem.weight.float(), problem)
        print("ok", name)


if __name__ == "__main__":
    main()
