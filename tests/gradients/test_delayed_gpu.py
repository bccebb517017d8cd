"""Sums of weight gradients within the GEMM as no CPU has it: fp32 totals of bf16 products."""

import pytest
import torch

from dualpipe_ext.gradients.delayed import DelayedLinear, WeightGradients
from tests.support.compare import relative_error

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def collect(layer, x, dy):
    """A backward for inputs; the weights' wait."""
    later = WeightGradients()
    with later.collect(), torch.autocast("cuda", BF16):
        y = layer(x)
    y.backward(dy)
    return later


@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("where", ["grad", "main_grad"])
def test_fp32_totals_of_bf16_products(tokens, where):
    torch.manual_seed(0)
    layer = DelayedLinear(136, 72, device="cuda")
    total = torch.randn_like(layer.weight)
    setattr(layer.weight, where, total)
    x = torch.randn(tokens, 136, device="cuda", dtype=BF16, requires_grad=True)
    dy = torch.randn(tokens, 72, device="cuda", dtype=BF16)
    want = total.double() + dy.double().T @ x.detach().double()
    bias = dy.double().sum(0)
    collect(layer, x, dy).run()
    assert getattr(layer.weight, where) is total
    assert relative_error(total, want) < 1e-5  # the product was never bf16
    assert relative_error(layer.bias.grad, bias) < 5e-3


def test_in_a_graph():
    torch.manual_seed(0)
    layer = DelayedLinear(128, 64, bias=False, device="cuda", dtype=BF16)
    x = torch.randn(256, 128, device="cuda", dtype=BF16, requires_grad=True)
    dy = torch.randn(256, 64, device="cuda", dtype=BF16)
    for _ in range(2):
        collect(layer, x, dy).run()
    layer.weight.grad.zero_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        later = collect(layer, x, dy)
        later.run()
    for _ in range(3):
        graph.replay()
    want = 3 * (dy.double().T @ x.detach().double())
    assert relative_error(layer.weight.grad, want) < 5e-3
