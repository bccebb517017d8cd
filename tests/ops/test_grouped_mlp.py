"""The grouped MLP without a GPU: against per-token fp64 arithmetic, and its kernels in Triton's
interpreter."""

import pytest
import torch

from dualpipe_ext.ops import grouped_bf16, grouped_wgrad
from dualpipe_ext.ops.grouped_mlp import grouped_mlp, mlp_dgrad, mlp_forward, mlp_wgrad
from tests.support.compare import relative_error
from tests.support.grouped_mlp_cases import make_problem
from tests.support.interpreted import run_interpreted

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}


def one_token(row, weight, w13, w2):
    """The definition for one row: no batching, no saved values, torch's own derivative."""
    I = w2.shape[1]  # noqa: E741
    gate = torch.stack([w13[i] @ row for i in range(I)])
    up = torch.stack([w13[I + i] @ row for i in range(I)])
    return w2 @ (gate / (1 + torch.exp(-gate)) * up * weight)


def expected(problem, dout):
    """out and the gradients of rows, row_weight, w13, w2 in fp64, token by token."""
    rows, row_weight, w13, w2 = (t.double().requires_grad_() for t in problem[:4])
    offsets = problem[4].tolist()
    out = torch.zeros_like(rows)
    for expert in range(w2.shape[0]):
        for r in range(offsets[expert], offsets[expert + 1]):
            out[r] = one_token(rows[r], row_weight[r], w13[expert], w2[expert])
    out.backward(dout.double())
    return out.detach(), rows.grad, row_weight.grad, w13.grad, w2.grad


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts, spare", [((5, 0, 130, 0), 0), ((0, 33), 72), ((20,), 128)])
def test_reference_equals_the_definition(dtype, counts, spare):
    problem, dout = make_problem(counts, 8, 16, dtype, spare)
    end = int(problem[4][-1])
    inputs = [t.clone().requires_grad_() for t in problem[:4]]
    out = grouped_mlp(*inputs, problem[4])
    out.backward(dout)
    want = expected(problem, dout)
    got = (out, *(t.grad for t in inputs))
    for name, value, reference in zip(
        ("out", "rows", "row_weight", "w13", "w2"), got, want, strict=True
    ):
        if name in ("out", "rows"):
            value, reference = value[:end], reference[:end]
        assert relative_error(value, reference) < TOLERANCE[dtype], name
    assert not got[2][end:].any()


def test_gradcheck():
    problem, _ = make_problem((2, 0, 1), 8, 8, torch.float64)
    offsets = problem[4]
    inputs = [t.requires_grad_() for t in problem[:4]]
    assert torch.autograd.gradcheck(
        lambda *tensors: grouped_mlp(*tensors, offsets), inputs, fast_mode=True
    )


def test_steps_apart_equal_autograd():
    problem, dout = make_problem((9, 0, 40), 16, 24, torch.float32)
    inputs = [t.clone().requires_grad_() for t in problem[:4]]
    grouped_mlp(*inputs, problem[4]).backward(dout)
    out, saved = mlp_forward(*problem)
    drows, drow_weight = mlp_dgrad(dout, saved)
    dw13, dw2 = mlp_wgrad(dout, saved)
    with torch.no_grad():
        assert torch.equal(out, grouped_mlp(*problem))
    for got, tensor in zip((drows, drow_weight, dw13, dw2), inputs, strict=True):
        assert torch.equal(got, tensor.grad)


def test_main_grad_takes_the_weight_gradients():
    problem, dout = make_problem((3, 0, 60), 16, 8, torch.bfloat16)
    plain = [t.clone().requires_grad_() for t in problem[:4]]
    grouped_mlp(*plain, problem[4]).backward(dout)

    rows, row_weight = problem[:2]
    w13, w2 = (torch.nn.Parameter(t) for t in problem[2:4])
    w13.main_grad = torch.full(w13.shape, 2.0)
    for _ in range(2):
        grouped_mlp(rows, row_weight, w13, w2, problem[4]).backward(dout)
    assert w13.grad is None
    assert relative_error(w13.main_grad - 2, 2 * plain[2].grad.float()) < 5e-3
    assert relative_error(w2.grad, 2 * plain[3].grad.float()) < 5e-3
    assert torch.equal(w13.main_grad[1], torch.full_like(w13.main_grad[1], 2.0))


def totals_like(tensor, how):
    """A total of ones: what the weight gradients are added to, or what they are not."""
    if how == "strided":
        return torch.ones(tensor.mT.shape, dtype=tensor.dtype).mT
    if how == "unaligned":
        return torch.ones(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return torch.ones_like(tensor, dtype=torch.float32 if how == "fp32" else tensor.dtype)


@pytest.mark.parametrize("how", ["alike", "fp32", "strided", "unaligned"])
def test_totals_take_the_weight_gradients(how):
    """In bf16 bit for bit what a second pass gives. What no kernel adds to stays as it is."""
    problem, dout = make_problem((3, 0, 60), 16, 8, torch.bfloat16)
    _, saved = mlp_forward(*problem)
    mlp_dgrad(dout, saved)
    want = mlp_wgrad(dout, saved)
    totals = [totals_like(weight, how) for weight in problem[2:4]]
    before = [total.clone() for total in totals]
    found = mlp_wgrad(dout, saved, totals=totals)
    for got, total, first, gradient in zip(found, totals, before, want, strict=True):
        if how in ("strided", "unaligned"):
            assert torch.equal(got, gradient) and torch.equal(total, first)
            continue
        assert got is None
        if how == "alike":
            assert torch.equal(total, first + gradient)
        else:
            assert relative_error(total - 1, gradient.float()) < 5e-3


def test_a_main_grad_comes_before_a_total():
    problem, dout = make_problem((3, 60), 16, 8, torch.bfloat16)
    w13 = torch.nn.Parameter(problem[2])
    w13.main_grad, total = torch.zeros(w13.shape), torch.zeros_like(problem[2])
    _, saved = mlp_forward(*problem[:2], w13, *problem[3:])
    mlp_dgrad(dout, saved)
    dw13, dw2 = mlp_wgrad(dout, saved, totals=(total, None))
    assert dw13 is None and dw2 is not None and w13.main_grad.any() and not total.any()


@pytest.mark.parametrize(
    "forward, backward, wanted",
    [
        ({}, {}, (0, False)),
        ({"num_sms": 100}, {}, (100, False)),
        ({"take_over": True}, {}, (0, True)),
        ({"num_sms": 100}, {"take_over": True}, (0, True)),
        ({"take_over": True}, {"num_sms": 9}, (9, False)),
        ({"num_sms": 100}, {"num_sms": 9, "take_over": True}, (9, True)),
    ],
)
def test_backward_has_the_forwards_share_or_its_own(forward, backward, wanted, monkeypatch):
    problem, dout = make_problem((3,), 8, 8, torch.float32)
    _, saved = mlp_forward(*problem, **forward)
    shares = []
    for module, name in ((grouped_bf16, "dgrad_operator"), (grouped_wgrad, "wgrad_operator")):
        operator = getattr(module, name)

        def record(*arguments, operator=operator):
            options = arguments[-1]
            assert options.implementation == "auto"
            shares.append((options.num_sms, options.take_over))
            return operator(*arguments)

        monkeypatch.setattr(module, name, record)
    mlp_dgrad(dout, saved, **backward)
    mlp_wgrad(dout, saved, **backward)
    assert shares == 3 * [wanted]


def test_mlp_dgrad_runs_once_and_before_wgrad():
    problem, dout = make_problem((3,), 8, 8, torch.float32)
    _, saved = mlp_forward(*problem)
    with pytest.raises(ValueError, match="mlp_dgrad first"):
        mlp_wgrad(dout, saved)
    mlp_dgrad(dout, saved)
    with pytest.raises(ValueError, match="already run"):
        mlp_dgrad(dout, saved)


def replaced(index, change):
    problem, _ = make_problem((3, 5), 16, 8, torch.float32)
    problem = list(problem)
    problem[index] = change(problem[index])
    return problem


@pytest.mark.parametrize(
    "index, change, error, message",
    [
        (0, lambda t: t[0], ValueError, r"pass \[R, H\], \[L, 2I, H\], \[L, H, I\]"),
        (0, lambda t: t.bfloat16(), TypeError, r"torch\.bfloat16.*one floating-point dtype"),
        (1, lambda t: t.double(), TypeError, r"row_weight is torch\.float64: pass"),
        (1, lambda t: t[1:], ValueError, r"row_weight is \(255,\).*\(256,\)"),
        (2, lambda t: t[:, 1:], ValueError, r"w13 \(2, 15, 16\)"),
        (
            2,
            lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
            ValueError,
            "w13 has strides",
        ),
        (4, lambda t: t.long(), TypeError, r"expert_offsets is torch\.int64"),
        (4, lambda t: t[1:], ValueError, r"\(2,\): with 2 experts pass \(3,\)"),
        (4, lambda t: t + 1, ValueError, "multiples of 128"),
        (4, lambda t: t * 2, ValueError, "at most R=256"),
        (2, lambda t: t.to("meta"), ValueError, "w13 is on meta, rows on cpu"),
    ],
)
def test_bad_tensors_are_named(index, change, error, message):
    with pytest.raises(error, match=message):
        grouped_mlp(*replaced(index, change))


@pytest.mark.parametrize(
    "H, I, message", [(12, 8, "hidden=12.*16"), (8, 20, "expert_hidden=20.*24")]
)
def test_widths_must_be_multiples_of_8(H, I, message):  # noqa: E741
    problem, _ = make_problem((3,), H, I, torch.float32)
    with pytest.raises(ValueError, match=message):
        grouped_mlp(*problem)


def test_bad_options_are_named():
    problem, dout = make_problem((3,), 8, 8, torch.bfloat16)
    with pytest.raises(ValueError, match=r"num_sms=0.*at least 1"):
        grouped_mlp(*problem, num_sms=0)
    with pytest.raises(ValueError, match=r"implementation='cuda'.*'reference'"):
        grouped_mlp(*problem, implementation="cuda")
    with pytest.raises(ValueError, match="implementation='triton' needs a GPU"):
        grouped_mlp(*problem, implementation="triton")
    w13 = torch.nn.Parameter(problem[2])
    w13.main_grad = torch.zeros(w13.shape, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"main_grad is .*bfloat16.*torch.float32"):
        grouped_mlp(*problem[:2], w13, *problem[3:]).backward(dout)


# ---- The Triton kernels ----


def test_interpreter_equals_reference():
    lines = run_interpreted("tests.support.grouped_mlp_cases")
    assert "\n".join(lines).count("ok") == 6, lines
