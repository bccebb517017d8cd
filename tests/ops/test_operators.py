"""What holds for every operator: derivatives that are missing raise, autocast and checkpoints
change nothing, whoever looks on sees operators, and a block of them compiles into one graph."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dualpipe_ext import grouped_mlp
from dualpipe_ext.blocks.attention import GroupedQueryAttention, LatentAttention
from dualpipe_ext.blocks.block import TransformerBlock
from dualpipe_ext.gradients.delayed import DelayedLinear
from dualpipe_ext.moe.router import Router
from dualpipe_ext.ops import cross_entropy, grouped_fp8
from dualpipe_ext.ops import operator as operators
from dualpipe_ext.ops import rotary as rotary_ops
from dualpipe_ext.ops.attention import flash_attention
from dualpipe_ext.ops.grouped_mlp import grouped_mlp as experts
from dualpipe_ext.ops.heads import split_heads, turn_tail
from dualpipe_ext.ops.norm import rms_norm
from dualpipe_ext.ops.rotary import rotary, rotary_, rotary_tables
from dualpipe_ext.ops.route import route
from dualpipe_ext.ops.swiglu import swiglu
from tests.ops.test_grouped_mlp import make_problem

WEIGHT = torch.rand(16) + 0.5


@cache
def problem():
    return make_problem((3, 40), 128, 128, torch.float32)[0][1:]


def in_experts(x, **how):
    rows = nn.functional.pad(x.flatten(0, -2).repeat(1, 8), (0, 0, 0, 256 - x.numel() // 16))
    return experts(rows, *problem(), **how)[:3]


# Functions of x [2, 5, 3, 16].
CALLS = {
    "rms_norm": lambda x: rms_norm(x, WEIGHT),
    "residual": lambda x: rms_norm(x, WEIGHT, residual=2 * x)[1],
    "swiglu": swiglu,
    "rotary": lambda x: rotary(x, *rotary_tables(5, 16)),
    "split_heads": lambda x: torch.cat(split_heads(x, 1), dim=2),
    "turn_tail": lambda x: turn_tail(x, 8),
    "flash_attention": lambda x: flash_attention(x, x, x, causal=True),
    "route": lambda x: route(x.flatten(0, 2), torch.eye(6, 16), None, topk=2)[1],
    "cross_entropy": lambda x: cross_entropy.cross_entropy(x, torch.ones(2, 5, 3).long()),
    "grouped_mlp": in_experts,
    "fp8": lambda x: in_experts(x, precision="fp8"),
}


def make_x(wants_gradient=True):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 5, 3, 16, generator=generator).requires_grad_(wants_gradient)


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_raises(name):
    """A penalty on the gradient, whose own gradient must not be taken for 0."""
    x = make_x()
    y = CALLS[name](x).square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(CALLS[name](x).square().sum(), x)[0])
    with pytest.raises(RuntimeError, match="no second derivative"):
        (y + gradient.square().sum()).backward()


def test_a_second_derivative_of_an_operator_raises():
    """As above, but by the dispatcher, as in a graph."""
    x = torch.randn(4, 8, requires_grad=True)
    y = torch.ops.dualpipe_ext.rms_norm(x, None, torch.ones(8), 1e-6, 0)[0].square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (y + gradient.square().sum()).backward()


OPERATORS = sorted(set(CALLS) - {"residual"})


@pytest.mark.parametrize("name", OPERATORS)
def test_a_tangent_raises(name):
    x = make_x(False)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative.*backward"):
        torch.func.jvp(CALLS[name], (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        CALLS[name](x)  # no tangent
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            CALLS[name](torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("name", ["rms_norm", "flash_attention", "split_heads", "turn_tail"])
def test_vmap(name):
    x = torch.stack([make_x(False), 2 * make_x(False)])
    got = torch.func.vmap(CALLS[name])(x)
    torch.testing.assert_close(got, torch.stack([CALLS[name](part) for part in x]))


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name):
    results = []
    for enabled in (False, True):
        x = make_x()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = CALLS[name](x)
            y.float().square().sum().backward()  # inside: the backward must not see it, either
        results.append((y, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_checkpoints(name, reentrant):
    a, b = make_x(), make_x()
    want, got = CALLS[name](a), checkpoint(CALLS[name], b, use_reentrant=reentrant)
    assert torch.equal(want, got)
    want.square().sum().backward()
    got.square().sum().backward()
    assert torch.equal(a.grad, b.grad)


SEVERAL = {
    "residual": lambda x: rms_norm(x, WEIGHT, residual=2 * x),
    "split_heads": lambda x: split_heads(x, 1),
    "route": lambda x: route(x.flatten(0, 2), torch.eye(6, 16), None, topk=2)[1:3],
}


@pytest.mark.parametrize("through", ["function", "operator"])
@pytest.mark.parametrize("name", SEVERAL)
def test_outputs_that_nobody_uses(name, through, monkeypatch):
    """The gradient is that of all outputs, of which the others have gradients of zero."""
    if through == "operator":
        monkeypatch.setattr(operators, "is_observed", lambda inputs: True)
    x = make_x()
    for used in range(len(SEVERAL[name](x))):
        output, every = SEVERAL[name](x)[used], SEVERAL[name](x)
        dy = torch.randn_like(output)
        found = torch.autograd.grad(output, x, dy)
        given = [dy if i == used else torch.zeros_like(y) for i, y in enumerate(every)]
        torch.testing.assert_close(found, torch.autograd.grad(every, x, given), rtol=0, atol=1e-6)


def test_no_zeros_are_made_for_what_has_no_gradient():
    """The experts' gate and up projections, larger than a layer's rows."""
    x = make_x()
    with torch.profiler.profile(record_shapes=True) as profile:
        in_experts(x)[0].sum().backward()
    zeros = [event.input_shapes for event in profile.events() if event.name == "aten::zero_"]
    assert [256, 256] not in [shapes[0] for shapes in zeros]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_operators():
    x = torch.randn(3, 16)
    trace = torch.jit.trace(lambda x: rms_norm(x, WEIGHT), (x,), check_trace=False)
    assert "dualpipe_ext::rms_norm" in str(trace.inlined_graph)


def write_through_address(y, values):
    y.data.copy_(values)  # as a kernel does: autograd does not see it


def test_rotary_in_place_counts_as_a_write(monkeypatch):
    def write(x, cos, sin, positions, options, y):
        write_through_address(y, 2 * x)

    monkeypatch.setattr(rotary_ops, "rotate_into", write)
    tables = rotary_tables(5, 16)
    for call in (
        lambda x: rotary_(x, *tables),
        lambda x: torch.ops.dualpipe_ext.rotary_(x, *tables, None, False, False, 0),
    ):
        leaf = make_x()
        y = leaf.exp()  # saves its result
        call(y if call.__code__.co_names[0] == "rotary_" else y.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_cross_entropy_in_place_counts_as_a_write(monkeypatch):
    pytest.importorskip("triton")
    from dualpipe_ext.triton_kernels.elementwise import cross_entropy as kernels

    def write(logits, targets, loss, *, gradient, factor, **how):
        write_through_address(gradient, torch.zeros_like(logits))
        loss.zero_()

    monkeypatch.setattr(cross_entropy, "use_triton", lambda *tensors: True)
    monkeypatch.setattr(kernels, "cross_entropy", write)
    monkeypatch.setattr(kernels, "scale_rows", lambda *arguments, **how: None)
    logits = torch.randn(4, 9, requires_grad=True)
    capped = logits.tanh()
    loss = cross_entropy.cross_entropy(capped, torch.zeros(4).long(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- Registrations ----


@dataclass(frozen=True)
class Scale(operators.Options):
    """Of an operator that is defined below."""

    factor: float
    inverse: bool = False


def test_options_are_scalars_in_the_schemas_order():
    assert Scale.schema() == "float factor, bool inverse"
    assert Scale(2.0).scalars() == [2.0, False] and Scale(*Scale(3.0, True).scalars()).inverse


def test_an_operator_with_outputs_says_how_they_look():
    class Doubled:
        def forward(x):
            return 2 * x

    with pytest.raises(TypeError, match="Doubled has outputs and neither plain nor fake"):
        operators.operator("doubled(Tensor x) -> Tensor")(Doubled)
    assert not hasattr(torch.ops.dualpipe_ext, "doubled")


def test_every_operator_is_checked_somewhere():
    """By torch.library.opcheck, in a test that names it."""
    names = torch._C._dispatch_get_all_op_names()
    names = {name.removeprefix("dualpipe_ext::") for name in names if "dualpipe_ext::" in name}
    assert {"rms_norm", "grouped_mlp_forward", "grouped_fp8_forward", "join_heads"} <= names
    assert grouped_mlp and grouped_fp8  # imported for their operators
    files = [file.read_text() for file in Path(__file__).parent.glob("test_*.py")]
    checked = "".join(text for text in files if "library.opcheck" in text)
    for name in names:
        assert f'"{name}"' in checked or f"ops.{name}" in checked, name


def dense():
    return nn.Sequential(DelayedLinear(32, 64), nn.SiLU(), DelayedLinear(64, 32))


class Routed(nn.Module):
    """A router's weights and loss in the place of a feed-forward part."""

    def __init__(self):
        super().__init__()
        self.router = Router(32, 6, 2, implementation="triton")

    def forward(self, x):
        routes = self.router(x.flatten(0, -2))
        return x * routes.topk_weight.view(*x.shape[:-1], 2)[..., :1] + routes.aux_loss


ATTENTION = {
    "grouped": lambda how: GroupedQueryAttention(32, heads=4, kv_heads=2, **how),
    "normalized": lambda how: GroupedQueryAttention(32, heads=4, normalize=True, **how),
    "latent": lambda how: LatentAttention(
        32, heads=2, kv_rank=16, head_width=8, rope_width=4, **how
    ),
}


@pytest.mark.parametrize(
    "attention, feed_forward, dynamic",
    [
        *((name, dense, None) for name in ATTENTION),
        ("latent", Routed, None),
        ("grouped", Routed, True),
    ],
)
def test_a_block_compiles_into_one_graph(attention, feed_forward, dynamic):
    torch.manual_seed(1)
    torch._dynamo.reset()
    attention = ATTENTION[attention]({"implementation": "triton"})
    block = TransformerBlock(32, attention, feed_forward())
    twin = copy.deepcopy(block)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (16, 9):
        results = []
        for function, module in ((block, block), (compiled, twin)):
            x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(2))
            y = function(x.requires_grad_())
            module.zero_grad()
            y.square().sum().backward()
            results.append((y, x.grad, *(p.grad for p in module.parameters())))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other)
