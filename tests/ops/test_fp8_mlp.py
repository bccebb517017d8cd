"""`precision="fp8"` of the grouped MLP without a GPU: against fp64 arithmetic on the rounded
numbers, and against the same MLP in bf16."""

import copy
import io
from itertools import pairwise

import numpy
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dualpipe_ext import MoELayer
from dualpipe_ext.blocks.block import TransformerBlock
from dualpipe_ext.ops.fp8 import dequantize_rows, quantize_rows
from dualpipe_ext.ops.fp8_weight import forget_fp8, fp8_weight
from dualpipe_ext.ops.grouped_mlp import grouped_mlp, mlp_dgrad, mlp_forward, mlp_wgrad
from tests.support.compare import relative_error
from tests.support.grouped_fp8_cases import quantize_squares
from tests.support.grouped_mlp_cases import make_problem

NAMES = ("out", "drows", "drow_weight", "dw13", "dw2")
CASES = [((5, 0, 130), 128, 256, 0), ((0, 200), 256, 128, 72)]


def rounded(x: torch.Tensor) -> torch.Tensor:
    """In fp64, what x stands for in fp8; gradients pass as if nothing had been rounded."""
    return x + (dequantize_rows(*quantize_rows(x.detach()), torch.float64) - x).detach()


def rounded_matrix(weight: torch.Tensor) -> torch.Tensor:
    q, scales = quantize_squares(weight[None])
    return (q.double() * scales.repeat_interleave(128, 1).repeat_interleave(128, 2))[0]


def stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x + (x.detach().to(dtype).double() - x).detach()


def expected(problem, dout):
    """The five of NAMES by torch's derivative in fp64, rounding where the implementation does."""
    rows, row_weight, w13, w2, offsets = problem
    dtype = rows.dtype
    results = [torch.zeros_like(t, dtype=torch.float64) for t in (rows, rows, row_weight, w13, w2)]
    out, drows, drow_weight, dw13, dw2 = results
    for i, (a, b) in enumerate(pairwise(offsets.tolist())):
        x, weight = (t[a:b].double().requires_grad_() for t in (rows, row_weight))
        gate_up = rounded(x) @ rounded_matrix(w13[i]).T
        gradients = []

        def store_and_round(gradient, gradients=gradients):
            gradients.append(gradient)
            return rounded(gradient)

        gate_up.register_hook(store_and_round)
        gate, up = stored(gate_up, dtype).chunk(2, dim=1)
        act = gate / (1 + torch.exp(-gate)) * up * weight[:, None]
        act.register_hook(lambda gradient: stored(gradient, dtype))
        here = rounded(act) @ rounded_matrix(w2[i]).T
        here.register_hook(rounded)
        here.backward(dout[a:b].double())
        out[a:b], drows[a:b], drow_weight[a:b] = here.detach(), x.grad, weight.grad
        dw13[i] = gradients[0].T @ rows[a:b].double()
        dw2[i] = dout[a:b].double().T @ act.detach()
    return results


def run(problem, dout, dout_scale=None, **how):
    """The same five, step by step."""
    out, saved = mlp_forward(*problem, **how)
    drows, drow_weight = mlp_dgrad(dout, saved, dout_scale=dout_scale)
    return out, drows, drow_weight, *mlp_wgrad(dout, saved, dout_scale=dout_scale)


def errors(got, want, end: int) -> dict[str, float]:
    pairs = zip(NAMES, got, want, strict=True)
    return {
        name: relative_error(*((a, b) if name.startswith("dw") else (a[:end], b[:end])))
        for name, a, b in pairs
    }


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("case", CASES)
def test_equals_fp64_of_the_rounded_numbers(case, dtype, tolerance):
    problem, dout = make_problem(*case[:3], dtype, case[3])
    end = int(problem[4][-1])
    found = errors(run(problem, dout, precision="fp8"), expected(problem, dout), end)
    assert max(found.values()) < tolerance, found


@pytest.mark.parametrize("case", CASES)
def test_as_far_from_bf16_as_its_products(case):
    """A product of two rounded operands is 3.7e-2 off. SwiGLU multiplies two of them, 5.2e-2, which
    weight gradients see once; behind the next product it is 6.4e-2."""
    problem, dout = make_problem(*case[:3], torch.bfloat16, case[3])
    end = int(problem[4][-1])
    found = errors(run(problem, dout, precision="fp8"), run(problem, dout), end)
    assert all(4e-2 < error < 8e-2 for error in found.values()), found


def test_autograd_equals_the_steps():
    problem, dout = make_problem((9, 0, 140), 128, 128, torch.bfloat16, 40)
    end = int(problem[4][-1])
    leaves = [t.clone().requires_grad_() for t in problem[:4]]
    out = grouped_mlp(*leaves, problem[4], precision="fp8")
    out.backward(dout)
    got = (out, *(leaf.grad for leaf in leaves))
    for name, a, b in zip(NAMES, got, run(problem, dout, precision="fp8"), strict=True):
        a, b = (a, b) if name.startswith("dw") else (a[:end], b[:end])
        assert torch.equal(a, b), name
    assert not got[2][end:].any()
    with torch.no_grad():
        assert torch.equal(grouped_mlp(*problem, precision="fp8")[:end], out[:end])


def test_main_grad_takes_the_weight_gradients():
    problem, dout = make_problem((3, 60), 128, 128, torch.bfloat16)
    w13, w2 = (torch.nn.Parameter(t) for t in problem[2:4])
    w13.main_grad = torch.full(w13.shape, 2.0)
    grouped_mlp(*problem[:2], w13, w2, problem[4], precision="fp8").backward(dout)
    assert w13.grad is None
    dw13 = run(problem, dout, precision="fp8")[3]
    assert relative_error(w13.main_grad - 2, dw13) < 5e-3


def on_the_grid(rows):
    """In bf16 what rows round to, and as e4m3 rows with scales; it rounds to itself."""
    q, scales = quantize_rows(rows)
    as_bf16 = dequantize_rows(q, scales, torch.bfloat16)
    again, same = quantize_rows(as_bf16)
    assert torch.equal(again.view(torch.uint8), q.view(torch.uint8)) and torch.equal(same, scales)
    return as_bf16, q, scales


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_that_come_as_fp8(transposed):
    """e4m3 rows with scales, and bf16 rows that a dispatch has brought as fp8, give the same bits;
    so does dout."""
    problem, dout = make_problem((70, 128), 256, 128, torch.bfloat16)
    as_bf16, q, scales = on_the_grid(problem[0])
    dout, q_dout, dout_scale = on_the_grid(dout)
    if transposed:
        scales, dout_scale = (scale.T.contiguous().T for scale in (scales, dout_scale))
    how = {"precision": "fp8", "row_scale": scales, "dout_scale": dout_scale}
    got = run((q, *problem[1:]), q_dout, **how)
    want = run((as_bf16, *problem[1:]), dout, precision="fp8")
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.dtype == torch.bfloat16 or name == "drow_weight"
        assert torch.equal(a, b), name


# ---- Weights ----


def test_weights_are_those_of_the_definition():
    weight = torch.randn(2, 256, 384) * torch.randn(2, 256, 1).exp()
    weight[0, :128, :128] = 0
    rounded, (q, scales) = fp8_weight(weight), quantize_squares(weight)
    assert torch.equal(rounded.q.view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(rounded.transposed.view(torch.uint8), q.mT.contiguous().view(torch.uint8))
    assert rounded.transposed.is_contiguous() and torch.equal(rounded.scales, scales)


def write_in_place(weight):
    with torch.no_grad():
        weight[0, 0, 0] += 1


def step(weight, kind, **options):
    weight.grad = torch.ones_like(weight)
    kind([weight], lr=0.1, **options).step()


CHANGES = {
    "in place": write_in_place,
    "new memory": lambda weight: setattr(weight, "data", weight.data + 1),
    "SGD": lambda weight: step(weight, torch.optim.SGD),
    "AdamW, foreach": lambda weight: step(weight, torch.optim.AdamW, foreach=True),
    # Leaves the version counter as it is.
    "AdamW, fused": lambda weight: step(weight, torch.optim.AdamW, fused=True),
    "through data": lambda weight: (weight.data.add_(1), forget_fp8(weight)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_are_rounded_once_until_they_change(change):
    weight = torch.nn.Parameter(torch.randn(1, 128, 128))
    before = fp8_weight(weight)
    assert fp8_weight(weight) is before
    CHANGES[change](weight)
    after = fp8_weight(weight)
    assert after is not before and fp8_weight(weight) is after
    assert torch.equal(after.scales, quantize_squares(weight.detach())[1])
    assert not torch.equal(after.scales, before.scales) or change == "in place"


def test_what_is_kept_is_neither_copied_nor_saved():
    weight = torch.nn.Parameter(torch.randn(1, 256, 256))
    file = io.BytesIO()
    torch.save(weight, file)
    size = len(file.getvalue())
    fp8_weight(weight)
    file = io.BytesIO()
    torch.save(weight, file)
    assert len(file.getvalue()) < size + 2000
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(weight)):
        assert torch.equal(fp8_weight(other).scales, fp8_weight(weight).scales)
        assert fp8_weight(other) is not fp8_weight(weight)


def test_a_file_with_rounded_weights_loads_as_weights_only():
    weight = torch.nn.Parameter(torch.randn(1, 128, 128))
    rounded, file = fp8_weight(weight), io.BytesIO()
    torch.save([weight], file)
    file.seek(0)
    (loaded,) = torch.load(file, weights_only=True)
    assert torch.equal(fp8_weight(loaded).scales, rounded.scales)


def test_other_memory_at_the_same_address_is_noticed():
    """As when weights go to the host and come back to where they were."""
    memory = numpy.ones(128 * 128, dtype=numpy.float32)

    def view():
        return torch.from_numpy(memory).view(1, 128, 128)

    weight = torch.nn.Parameter(view())
    before = fp8_weight(weight)
    memory *= 2
    weight.data = view()
    assert torch.equal(fp8_weight(weight).scales, 2 * before.scales)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_main_grad_under_a_checkpoint(reentrant, precision):
    """It hands the backward aliases of the weights, which have no attributes."""
    found = []
    for call in (
        lambda layer, x: layer(x),
        lambda *both: checkpoint(*both, use_reentrant=reentrant),
    ):
        layer = MoELayer(**SIZES, precision=precision)
        layer.reset_parameters(seed=1)
        for weight in (layer.w13, layer.w2):
            weight.main_grad = torch.zeros(weight.shape)
        x = torch.randn(40, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
        call(layer, x).sum().backward()
        assert layer.w13.grad is None and layer.w2.grad is None
        found.append((layer.w13.main_grad, layer.w2.main_grad))
    assert found[0][0].any() and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_layer_refuses_widths_before_its_first_forward():
    with pytest.raises(ValueError, match=r"expert_hidden=72.*multiple of 128"):
        MoELayer(**(SIZES | {"expert_hidden": 72}), precision="fp8")
    with pytest.raises(ValueError, match="precision='fp4'"):
        MoELayer(**SIZES, precision="fp4")


def test_a_backward_uses_the_weights_of_its_forward():
    problem, dout = make_problem((50,), 128, 128, torch.bfloat16)
    want = run(problem, dout, precision="fp8")[1]
    _, saved = mlp_forward(*problem, precision="fp8")
    write_in_place(problem[2])
    mlp_forward(*problem, precision="fp8")
    assert torch.equal(mlp_dgrad(dout, saved)[0], want)


def test_inference_tensors_are_rounded_each_time():
    with torch.inference_mode():
        problem, _ = make_problem((50,), 128, 128, torch.bfloat16)
        out = grouped_mlp(*problem, precision="fp8")
    with torch.no_grad():
        again = grouped_mlp(*(t.clone() for t in problem), precision="fp8")
    assert torch.equal(out, again)


# ---- Checks ----


@pytest.mark.parametrize(
    "sizes, change, message",
    [
        ((192, 128), {}, r"hidden=192.*multiple of 128.*256.*precision=\"bf16\""),
        ((128, 72), {}, r"expert_hidden=72.*multiple of 128.*to 128"),
        ((128, 128), {"precision": "fp4"}, r"precision='fp4': pass \"bf16\" or \"fp8\""),
        ((128, 128), {"implementation": "triton"}, "Hopper GPU.*cpu.*implementation='auto'"),
        ((128, 128), {"row_scale": torch.ones(128, 1)}, r"torch.bfloat16 rows.*fp8.quantize_rows"),
        ((128, 128), {"row_scale": torch.ones(1), "precision": "bf16"}, r"pass precision=\"fp8\""),
    ],
)
def test_what_fp8_does_not_take_is_named(sizes, change, message):
    problem, _ = make_problem((3,), *sizes, torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        mlp_forward(*problem, **({"precision": "fp8"} | change))


def test_a_gradient_in_fp8_needs_its_scales_and_a_forward_in_fp8():
    problem, dout = make_problem((3,), 128, 128, torch.bfloat16)
    q, scales = quantize_rows(dout)
    _, saved = mlp_forward(*problem, precision="fp8")
    for given, message in (
        ((dout, scales), r"dout_scale is .*torch.bfloat16 rows.*fp8.quantize_rows"),
        ((q, scales[1:]), r"dout_scale is \(127, 1\)"),
        ((q, None), r"dout is .*float8_e4m3fn.*torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            mlp_dgrad(given[0], saved, dout_scale=given[1])
    _, saved = mlp_forward(*problem)
    with pytest.raises(ValueError, match='dout_scale after precision="bf16"'):
        mlp_dgrad(q, saved, dout_scale=scales)


# ---- Layers ----

SIZES = dict(hidden=128, expert_hidden=128, num_experts=4, topk=2, max_tokens=64)


def test_layer_and_chunk_run_in_fp8():
    layers = [MoELayer(**SIZES, precision=precision) for precision in ("bf16", "fp8", "fp8")]
    for layer in layers:
        layer.reset_parameters(seed=1)
    blocks = [TransformerBlock(128, torch.nn.Identity(), layer) for layer in layers]
    x, dy = torch.randn(2, 40, 128)
    exact, rounded = (block(x) for block in blocks[:2])
    assert 1e-4 < relative_error(rounded.detach(), exact.detach()) < 8e-2
    rounded.backward(dy)
    chunk = blocks[2].start_chunk()
    chunk.attention(x)
    for segment in (chunk.plan, chunk.dispatch, chunk.mlp, chunk.combine):
        segment()
    assert torch.equal(chunk.output(), rounded)
    chunk.combine_backward(dy)
    chunk.mlp_backward()
    chunk.mlp_backward_weight()
    assert torch.equal(layers[2].w13.grad, layers[1].w13.grad)
    assert MoELayer.from_dense(layers[1]).precision == "fp8"


def test_trains_like_bf16():
    """A layer learns 64 tokens by heart: its loss falls to a fifth, step by step as in bf16."""
    losses = {}
    for precision in ("bf16", "fp8"):
        layer = MoELayer(**SIZES, init_std=0.1, precision=precision)
        layer.reset_parameters(seed=4)
        # Fused: if the weights' rounding missed its steps, the loss would stay where it is.
        optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3, fused=True)
        x, target = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(5))
        losses[precision] = []
        for _ in range(16):
            loss = torch.nn.functional.mse_loss(layer(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[precision].append(loss.item())
    assert losses["fp8"][-1] < 0.2 * losses["fp8"][0]
    for bf16, fp8 in zip(*losses.values(), strict=True):
        assert abs(fp8 - bf16) < 0.15 * bf16
