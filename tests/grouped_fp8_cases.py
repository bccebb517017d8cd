"""The fp8 GEMM's problems and what they should give, in plain torch; and, as a program, the
quantising kernels in Triton's interpreter.

test_grouped_fp8.py starts the program as a child: TRITON_INTERPRET=1 has to be set before Triton is
imported. fp32 inputs, since the interpreter's bf16 arithmetic is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from dualpipe_ext.fp8 import quantize_rows

E4M3 = torch.float8_e4m3fn
NAN = float("nan")

# Rows of each expert (multiples of 128), N, K, rows past the last expert.
CASES = {
    "one tile": ((128,), 256, 128, 0),
    "empty experts": ((0, 256, 0, 0, 128, 0), 256, 512, 128),
    "partial tiles": ((128, 384), 400, 272, 256),
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


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    value, reference = value.double(), reference.double()
    return float((value - reference).norm() / reference.norm())


def check_quantizers(rows: torch.Tensor, weight: torch.Tensor, problem: Problem) -> None:
    """The kernels give what plain torch gives, bit for bit."""
    from dualpipe_ext.triton_kernels import quantize

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
    for name in ("empty experts", "partial tiles", "narrow"):
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
