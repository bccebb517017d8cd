"""The grouped MLP's problems; and, as a program, its kernels in Triton's interpreter.

test_grouped_mlp.py starts the program as a child: TRITON_INTERPRET=1 has to be set before Triton is
imported. fp32 and fp16 only: the interpreter's bf16 arithmetic is wrong.
"""

import torch

from dualpipe_ext.ops.grouped_mlp import mlp_dgrad, mlp_forward, mlp_wgrad
from tests.support.compare import relative_error


def make_problem(counts, H, I, dtype, spare=0):  # noqa: E741
    """Random tensors for experts of `counts` real rows each, every expert padded to 128 rows."""
    aligned = [-(-count // 128) * 128 for count in counts]
    offsets = torch.tensor([0, *aligned]).cumsum(0).to(torch.int32)
    R, L = sum(aligned) + spare, len(counts)
    real = torch.zeros(R, dtype=torch.bool)
    for start, count in zip(offsets.tolist(), counts, strict=False):
        real[start : start + count] = True
    rows, dout = (torch.randn(R, H).to(dtype) * real[:, None] for _ in range(2))
    row_weight = torch.rand(R, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    w13 = (torch.randn(L, 2 * I, H) / H**0.5).to(dtype)
    w2 = (torch.randn(L, H, I) / I**0.5).to(dtype)
    return (rows, row_weight * real, w13, w2, offsets), dout


def _reduce(self, kind, desc, value, indices):
    """TMA's add, which Triton 3.6's interpreter lacks."""
    from triton.runtime import interpreter

    pointers, mask = desc.materialize_pointers(indices)
    old = self.create_masked_load(pointers, mask, None, None, None, False)
    total = interpreter.TensorHandle(old.data + value.data, value.dtype)
    return self.create_masked_store(pointers, total, mask, None, None)


def run(problem, dout, implementation: str, num_sms: int) -> dict[str, torch.Tensor]:
    """All results of one forward and backward, without the rows past the last expert."""
    end = int(problem[4][-1])
    out, saved = mlp_forward(*problem, implementation=implementation, num_sms=num_sms)
    gate_up = saved.gate_up[:end].clone()
    drows, drow_weight = mlp_dgrad(dout, saved)
    dw13, dw2 = mlp_wgrad(dout, saved)
    saved.w13.main_grad = torch.ones(saved.w13.shape)
    assert mlp_wgrad(dout, saved)[0] is None
    main_grad = saved.w13.main_grad
    del saved.w13.main_grad
    return {
        "out": out[:end],
        "act": saved.act[:end],
        "gate_up": gate_up,
        "drows": drows[:end],
        "drow_weight": drow_weight,
        "dw13": dw13,
        "dw2": dw2,
        "main_grad": main_grad,
    }


def main() -> None:
    from triton.runtime import interpreter

    if not hasattr(interpreter.InterpreterBuilder, "create_descriptor_reduce"):
        interpreter.InterpreterBuilder.create_descriptor_reduce = _reduce
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 5e-3)):
        # Partial tiles in every dimension; empty experts first, between and last; spare rows.
        for counts, H, I, spare, num_sms in (  # noqa: E741
            ((128, 0, 77), 136, 136, 64, 7),
            ((5,), 8, 8, 0, 1),
            ((0, 256, 0, 1, 0), 64, 264, 128, 100),
        ):
            problem, dout = make_problem(counts, H, I, dtype, spare)
            got = run(problem, dout, "triton", num_sms)
            want = run(problem, dout, "reference", num_sms)
            for name, value in got.items():
                error = relative_error(value, want[name])
                assert error < tolerance, f"{name}: {error} for {dtype}, {counts}, H={H}, I={I}"
            print("ok", dtype, counts, H, I)


if __name__ == "__main__":
    main()
