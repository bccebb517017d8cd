"""What holds for every operator of torch.ops.dualpipe_ext: it obeys torch.library.opcheck, takes
nothing and tensors of any strides, refuses dtypes; derivatives that are missing raise, autocast and
checkpoints change nothing, whoever looks on sees operators, and all compile into one graph."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dualpipe_ext.blocks.attention import GroupedQueryAttention, LatentAttention
from dualpipe_ext.blocks.block import TransformerBlock
from dualpipe_ext.gradients.delayed import DelayedLinear
from dualpipe_ext.moe.router import Router
from dualpipe_ext.ops import operator as operators
from dualpipe_ext.ops.fp8 import quantize_rows
from dualpipe_ext.ops.fp8_weight import fp8_weight
from dualpipe_ext.ops.operator import Operator, Options
from tests.support.attention_cases import Problem
from tests.support.grouped_mlp_cases import make_problem
from tests.support.operators import (
    cross_entropy,
    cross_entropy_module,
    flash_attention,
    grouped_mlp,
    rms_norm,
    rotary,
    rotary_,
    rotary_module,
    rotary_tables,
    route,
    split_heads,
    swiglu,
    turn_tail,
)

OPS = torch.ops.dualpipe_ext

WEIGHT = torch.rand(16) + 0.5


PROBLEM = make_problem((3, 40), 128, 128, torch.float32)[0][1:]


def in_experts(x, **how):
    rows = nn.functional.pad(x.flatten(0, -2).repeat(1, 8), (0, 0, 0, 256 - x.numel() // 16))
    return grouped_mlp(rows, *PROBLEM, **how)[:3]


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
    "cross_entropy": lambda x: cross_entropy(x, torch.ones(2, 5, 3).long()),
    "grouped_mlp": in_experts,
    "fp8": lambda x: in_experts(x, precision="fp8"),
}


def make_x(wants_gradient=True):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 5, 3, 16, generator=generator).requires_grad_(wants_gradient)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_other_dtypes_are_refused(name, dtype):
    with pytest.raises((TypeError, ValueError), match=str(dtype)):
        CALLS[name](make_x(False).to(dtype))


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_raises(name):
    """A penalty on the gradient, whose own gradient must not be taken for 0."""
    x = make_x()
    y = CALLS[name](x).square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(CALLS[name](x).square().sum(), x)[0])
    with pytest.raises(RuntimeError, match="no second derivative"):
        (y + gradient.square().sum()).backward()


ONCE = sorted(set(CALLS) - {"cross_entropy", "fp8", "residual"})


@pytest.mark.parametrize("name", ONCE)
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

    monkeypatch.setattr(rotary_module, "rotate_into", write)
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

    monkeypatch.setattr(cross_entropy_module, "use_triton", lambda *tensors: True)
    monkeypatch.setattr(kernels, "cross_entropy", write)
    monkeypatch.setattr(kernels, "scale_rows", lambda *arguments, **how: None)
    logits = torch.randn(4, 9, requires_grad=True)
    capped = logits.tanh()
    loss = cross_entropy(capped, torch.zeros(4).long(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- The operators, by their names ----


def rows_of(T, *shape, dtype=torch.float32):
    return torch.randn(T, *shape).to(dtype)


def _rms_norm(T):
    for other in (rows_of(T, 8), None):
        yield rows_of(T, 8), other, torch.rand(8), 1e-6, 0


def _rms_norm_backward(T):
    for d_hidden in (rows_of(T, 8), None):
        yield rows_of(T, 8), d_hidden, rows_of(T, 8), torch.rand(8), torch.ones(T), 0


def _rotary(T):
    yield rows_of(2, T, 3, 8), *rotary_tables(T, 8), None, True, False, 0
    yield rows_of(2, T, 3, 8), *rotary_tables(T, 8), torch.zeros(2, T).long(), False, True, 0


def _swiglu(T):
    yield rows_of(T, 16), 0


def _swiglu_backward(T):
    yield rows_of(T, 8), rows_of(T, 16), 0


HOW = (-100, 1e-3, 0)  # ignore_index, z_loss, num_sms


def _targets(T):
    return torch.tensor([0, 8, -100, 3, 1])[:T]


def _cross_entropy(T):
    yield rows_of(T, 9), _targets(T), *HOW


def _cross_entropy_backward(T):
    yield rows_of(T)[:, None][:, 0], rows_of(T, 9), _targets(T), rows_of(T), *HOW


def _cross_entropy_in_place(T):
    yield rows_of(T, 9), _targets(T), torch.ones(1), *HOW


def _scale_rows(T):
    yield rows_of(T, 9), torch.ones(1), 0


def _route(T):
    for bias in (None, torch.zeros(6)):
        for dtype in (torch.float32, torch.bfloat16):
            yield rows_of(T, 8), rows_of(6, 8, dtype=dtype), bias, 2, True, 1, 1, 2.5, 0


def _route_backward(T):
    idx = torch.tensor([[0, 3]] * T, dtype=torch.int32).view(T, 2)
    for softmax in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            tensors = (rows_of(T, 2), rows_of(6), rows_of(T, 8), rows_of(6, 8, dtype=dtype))
            yield *tensors, rows_of(T, 6), idx, softmax, True, 1, 2.5, 0


def _attention(T, backward=False):
    for packed in (False, True):
        case = Problem([T, T], [T + 2, T + 2], 4, 2, 8, 16, True, packed)
        q, k, v, d_out = case.inputs()
        starts, how = case.starts(), (True, 0.3, 0, False, "auto")
        starts = (starts.get("cu_seqlens_q"), starts.get("cu_seqlens_k"))
        if not backward:
            yield q, k, v, *starts, *how
        else:
            out, lse = OPS.flash_attention_forward(q, k, v, *starts, *how)
            yield d_out, q, k, v, out, lse, *starts, *how


def _experts(T, width=8):
    counts = (3, 0, 130) if T else (0, 0, 0)
    (rows, weight, w13, w2, offsets), dout = make_problem(counts, 2 * width, width, torch.float32)
    gate_up, act = torch.randn(len(rows), 2 * width), torch.randn(len(rows), width)
    return rows, weight, w13, w2, offsets, dout, gate_up, act


def _mlp_forward(T):
    *inputs, _, _, _ = _experts(T)
    for save in (True, False):
        yield *inputs, save, 0, "reference", save


def _mlp_dgrad(T):
    _, weight, w13, w2, offsets, dout, gate_up, _ = _experts(T)
    yield dout, gate_up, weight, w13, w2, offsets, 0, "reference"


def _wgrad(T):
    *_, offsets, dout, _, act = _experts(T)
    yield dout, act, offsets, 0, "reference"


def _wgrad_in_place(T):
    _, _, _, w2, offsets, dout, _, act = _experts(T)
    yield w2, dout, act, offsets, 0, "reference"


def _fp8_forward(T):
    rows, weight, w13, w2, offsets, *_ = _experts(T, 128)
    for save in (True, False):
        rounded = (*fp8_weight(w13), *fp8_weight(w2))
        yield rows, None, weight, w13, w2, *rounded, offsets, save, 0, "reference", False


def _fp8_dgrad(T):
    _, weight, w13, w2, offsets, dout, gate_up, _ = _experts(T, 128)
    rounded = (*fp8_weight(w13)[1:], *fp8_weight(w2)[1:])
    for given in ((dout, None), quantize_rows(dout)):
        yield *given, gate_up, weight, *rounded, offsets, 0, "reference"


def _tables(T):
    return torch.randn(T, 4), torch.randn(T, 4)


# By operator: its inputs for T tokens, of every branch.
INPUTS = {
    "cross_entropy": _cross_entropy,
    "cross_entropy_": _cross_entropy_in_place,
    "cross_entropy_backward": _cross_entropy_backward,
    "flash_attention_backward": lambda T: _attention(T, backward=True),
    "flash_attention_forward": _attention,
    "grouped_fp8_dgrad": _fp8_dgrad,
    "grouped_fp8_forward": _fp8_forward,
    "grouped_mlp_dgrad": _mlp_dgrad,
    "grouped_mlp_forward": _mlp_forward,
    "grouped_wgrad": _wgrad,
    "grouped_wgrad_": _wgrad_in_place,
    "join_heads": lambda T: [
        (rows_of(1, T, 2, 8), *(rows_of(1, T, 1, 8) for _ in range(2)), *_tables(T))
    ],
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "rotary": _rotary,
    "rotary_": _rotary,
    "route": _route,
    "route_backward": _route_backward,
    "scale_rows_": _scale_rows,
    "split_heads": lambda T: [(rows_of(1, T, 4, 8), *_tables(T), 1)],
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "turn_tail": lambda T: [(rows_of(1, T, 4, 8), *_tables(T), False)],
}
# Inputs that have gradients.
LEAVES = {
    "cross_entropy": (0,),
    "flash_attention_forward": (0, 1, 2),
    "grouped_fp8_forward": (0, 2, 3, 4),
    "grouped_mlp_forward": (0, 1, 2, 3),
    "rms_norm": (0, 1, 2),
    "rotary": (0,),
    "route": (0, 1),
    "split_heads": (0,),
    "swiglu": (0,),
    "turn_tail": (0,),
}
# Without the schema's, which multiplies its inputs: torch's CPU cannot multiply fp8.
FP8_CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def operator(name):
    return getattr(OPS, name).default


def with_leaves(name, inputs):
    """The inputs, those of LEAVES as leaves; operators that keep nothing have none."""
    names = [argument.name for argument in operator(name)._schema.arguments]
    kept = "save" not in names or inputs[names.index("save")]
    leaves = LEAVES.get(name, ()) if kept else ()
    return [
        x.clone().requires_grad_() if i in leaves and x is not None else x
        for i, x in enumerate(inputs)
    ]


def tensors_of(outputs):
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return [x for x in outputs if isinstance(x, torch.Tensor)]


def test_every_operator_is_here():
    names = torch._C._dispatch_get_all_op_names()
    names = {name.removeprefix("dualpipe_ext::") for name in names if "dualpipe_ext::" in name}
    assert names == set(INPUTS)


@pytest.mark.parametrize("name", INPUTS)
def test_opcheck(name):
    """Schema, fake implementation, registration of the gradient, dynamic shapes in a graph."""
    how = {"test_utils": FP8_CHECKS} if "fp8" in name else {}
    for inputs in INPUTS[name](5):
        torch.library.opcheck(operator(name), with_leaves(name, inputs), **how)


@pytest.mark.parametrize("name", LEAVES)
def test_a_second_derivative_of_an_operator_raises(name):
    """By the dispatcher, as in a graph."""
    inputs = with_leaves(name, next(iter(INPUTS[name](5))))
    leaves = [inputs[i] for i in LEAVES[name]]
    y = sum(x.square().sum() for x in tensors_of(operator(name)(*inputs)) if x.requires_grad)
    gradients = torch.autograd.grad(y, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (y + sum(x.square().sum() for x in gradients)).backward()


@pytest.mark.parametrize("name", INPUTS)
def test_no_tokens(name):
    for inputs in INPUTS[name](0):
        inputs = with_leaves(name, inputs)
        outputs = tensors_of(operator(name)(*inputs))
        assert all(not x.float().nan_to_num(1).any() or not x.numel() for x in outputs)
        differentiable = [x.sum() for x in outputs if x.requires_grad]
        if differentiable:
            sum(differentiable).backward()
        for x in inputs:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                assert x.grad.shape == x.shape and not x.grad.any()


def strided(x):
    """The same numbers, every other one of its memory."""
    return torch.stack((x, torch.full_like(x, 1)), dim=-1)[..., 0]


# What cannot be anything but contiguous: the host's functions refuse other weights.
CONTIGUOUS = ("w13", "w2", "expert_offsets", "total", "q13", "t13", "s13", "q2", "t2", "s2")


@pytest.mark.parametrize("name", INPUTS)
def test_strides_change_nothing(name):
    names = [argument.name for argument in operator(name)._schema.arguments]
    for inputs in INPUTS[name](5):
        given = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        apart = [
            strided(x) if isinstance(x, torch.Tensor) and n not in CONTIGUOUS else x
            for n, x in zip(names, inputs, strict=False)
        ]
        assert any(isinstance(x, torch.Tensor) and not x.is_contiguous() for x in apart)
        want = tensors_of(operator(name)(*given))
        got = tensors_of(operator(name)(*apart))
        for a, b in zip((*got, *tensors_of(apart)), (*want, *tensors_of(given)), strict=True):
            torch.testing.assert_close(a.float(), b.float(), equal_nan=True)


# ---- In one graph ----


@pytest.mark.parametrize("name", CALLS)
def test_compiles_into_one_graph(name):
    torch._dynamo.reset()
    fullgraph = name != "fp8"  # rounding weights once is the host's
    results = []
    for call in (CALLS[name], torch.compile(CALLS[name], backend="aot_eager", fullgraph=fullgraph)):
        x = make_x()
        y = call(x)
        outputs = [out for out in tensors_of(y) if out.requires_grad]
        sum(out.square().sum() for out in outputs).backward()
        results.append((*outputs, x.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


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


# ---- How they are registered ----


@dataclass(frozen=True)
class Scale(Options):
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
        Operator("doubled(Tensor x) -> Tensor", Doubled)
    assert not hasattr(torch.ops.dualpipe_ext, "doubled")
