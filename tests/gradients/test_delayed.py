"""Weight gradients that wait, and how they are added."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from dualpipe_ext.gradients.delayed import DelayedLinear, WeightGradients, delay_linears
from dualpipe_ext.moe.layer import SharedExpert
from tests.support import small_transformer as small
from tests.support.compare import relative_error

FP32, BF16 = torch.float32, torch.bfloat16
LINEAR, EXPERTS = "blocks.0.attention.out.weight", "blocks.0.feed_forward.w13"


def test_delayed_linear_is_a_linear():
    plain = nn.Linear(5, 3)
    delayed = delay_linears(copy.deepcopy(plain))
    assert type(delayed) is DelayedLinear
    x = torch.randn(4, 5, requires_grad=True)
    y = plain(x)
    y.square().sum().backward()
    dx, x.grad = x.grad, None
    later = WeightGradients()
    with later.collect():
        found = delayed(x)
    assert torch.equal(found, y)
    found.square().sum().backward()
    assert torch.equal(x.grad, dx)
    assert delayed.weight.grad is None and len(later) == 1
    later.run()
    assert torch.allclose(delayed.weight.grad, plain.weight.grad)
    assert torch.allclose(delayed.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize(
    ("dtype", "x_dtype"), [(FP32, FP32), (BF16, BF16), (FP32, BF16), (torch.float64, BF16)]
)
def test_a_shared_expert_leaves_both_of_its_weights(dtype, x_dtype, main_grad):
    """In any pair of dtypes; fp32 weights and a bf16 x are what autocast makes of the layer. Cast
    from fp64, which autocast leaves alone, they come at once."""
    torch.manual_seed(0)
    plain = SharedExpert(16, 24, dtype=dtype)
    plain.reset_parameters(0.3)
    delayed = copy.deepcopy(plain)
    if main_grad:
        delayed.w13.main_grad = torch.zeros(48, 16)
    x, dy = torch.randn(40, 16).to(x_dtype).requires_grad_(), torch.randn(40, 16).to(x_dtype)
    y = plain(x)
    y.backward(dy)
    dx, x.grad = x.grad, None
    later = WeightGradients()
    with later.collect():
        found = delayed(x)
    assert found.dtype == x_dtype and torch.equal(found, y)
    found.backward(dy)
    assert torch.equal(x.grad, dx)
    waits = dtype != torch.float64
    assert len(later) == 2 * waits and (delayed.w2.grad is None) == waits
    later.run()
    for name, want in plain.named_parameters():
        p = delayed.get_parameter(name)
        total = p.grad
        if main_grad and waits and name == "w13":
            assert p.grad is None
            total = p.main_grad
        assert want.grad.dtype == dtype and relative_error(total, want.grad) < 4e-3, name


def test_each_weight_gradient_is_added_before_the_next_is_computed():
    """So that one is in memory at a time, and data-parallel hooks fire as autograd's would."""
    later, seen = WeightGradients(), []
    for i in range(3):
        weight = nn.Parameter(torch.zeros(2))
        weight.register_post_accumulate_grad_hook(lambda _, i=i: seen.append(("added", i)))
        later.add((weight,), lambda _, i=i: seen.append(("computed", i)) or [torch.ones(2)])
    later.run()
    assert seen == [(what, i) for i in range(3) for what in ("computed", "added")]


def run_chunks(model, count=3):
    """The gradients' addresses after each of some micro-batches."""
    torch.manual_seed(5)
    addresses = []
    for _ in range(count):
        x, dy = torch.randn(2, 2, 7, 16)
        chunk = model.start_chunk(x)
        chunk.forward()
        chunk.backward_input((dy,))
        chunk.backward_weight()
        addresses.append({name: p.grad.data_ptr() for name, p in model.named_parameters()})
    return addresses


def test_a_block_leaves_its_shared_experts_weights():
    model = small.stage(1, shared_expert_hidden=8)
    shared = model.blocks[0].feed_forward.shared_expert
    chunk = model.start_chunk(torch.randn(2, 7, 16))
    with torch.autocast("cpu", BF16):
        (out,) = chunk.forward()
    chunk.backward_input((torch.randn_like(out),))
    assert shared.w13.grad is None and shared.w2.grad is None
    chunk.backward_weight()
    assert shared.w13.grad.any() and shared.w2.grad.any()


def run_autograd(model, count=3):
    torch.manual_seed(5)
    for _ in range(count):
        x, dy = torch.randn(2, 2, 7, 16)
        model(x.requires_grad_()).backward(dy)


def test_sums_over_micro_batches_equal_autograds():
    model, expected = small.stage(2), small.stage(2)
    model.aux_loss_scale = 0.0
    expected.load_state_dict(model.state_dict())
    first, *others = run_chunks(model)
    assert all(addresses == first for addresses in others)
    run_autograd(expected)
    for name, p in expected.named_parameters():
        assert relative_error(small.gradients(model)[name], p.grad) < 1e-6, name


def test_later_micro_batches_make_no_gradient_of_their_own(monkeypatch):
    """They are added where they are computed: `accumulate` gets none of a matrix."""
    from dualpipe_ext.gradients import delayed as weight_gradients

    model, passed = small.stage(1), []
    run_chunks(model, 1)
    real = weight_gradients.accumulate
    monkeypatch.setattr(
        weight_gradients, "accumulate", lambda ps, gs: (passed.extend(gs), real(ps, gs))
    )
    run_chunks(model, 1)
    assert passed and all(gradient is None or gradient.dim() == 1 for gradient in passed)


def test_hooks_run_once_a_micro_batch_and_see_the_sum():
    """Those of the parameter, and those of autograd's node, which DDP uses."""
    model, seen, nodes, keep = small.stage(1), [], [], []
    for name in (LINEAR, EXPERTS):
        p = model.get_parameter(name)
        p.register_post_accumulate_grad_hook(lambda p, n=name: seen.append((n, p.grad.clone())))
        keep.append(get_gradient_edge(p).node)
        keep[-1].register_hook(lambda *_, n=name: nodes.append(n))
    run_chunks(model, 3)
    assert sorted(nodes) == sorted(name for name, _ in seen) == sorted([LINEAR, EXPERTS] * 3)
    for name, gradient in seen[-2:]:
        assert torch.equal(gradient, model.get_parameter(name).grad)


def test_a_tensors_hook_gets_each_gradient_alone():
    model, expected = small.stage(1), small.stage(1)
    expected.load_state_dict(model.state_dict())
    for name in (LINEAR, EXPERTS):
        model.get_parameter(name).register_hook(lambda gradient: 2 * gradient)
    run_chunks(model), run_chunks(expected)
    for name in (LINEAR, EXPERTS):
        found, want = (m.get_parameter(name).grad for m in (model, expected))
        assert relative_error(found, 2 * want) < 1e-6


@pytest.mark.parametrize("how", ["strided", "of a graph", "frozen"])
def test_gradients_that_cannot_be_added_to_in_place(how):
    model, expected = small.stage(1), small.stage(1)
    expected.load_state_dict(model.state_dict())
    totals = {}
    for name in (LINEAR, EXPERTS):
        p = model.get_parameter(name)
        like = torch.randn_like(p)
        expected.get_parameter(name).grad = like.clone()
        p.grad = like.mT.contiguous().mT if how == "strided" else like
        if how == "of a graph":
            p.grad.requires_grad_()
        p.requires_grad_(how != "frozen")
        totals[name] = like.clone()
    run_chunks(model), run_chunks(expected)
    for name in (LINEAR, EXPERTS):
        found, want = (m.get_parameter(name).grad for m in (model, expected))
        assert relative_error(found.detach(), totals[name] if how == "frozen" else want) < 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_may_come_in_any_grad_mode(mode):
    model, expected = small.stage(1), small.stage(1)
    expected.load_state_dict(model.state_dict())
    torch.manual_seed(6)
    for _ in range(2):
        x, dy = torch.randn(2, 2, 7, 16)
        for stage in (model, expected):
            chunk = stage.start_chunk(x)
            chunk.forward()
            chunk.backward_input((dy,))
            if stage is model:
                with mode():
                    chunk.backward_weight()
            else:
                chunk.backward_weight()
    for name, p in expected.named_parameters():
        assert relative_error(small.gradients(model)[name], p.grad) < 1e-6, name


def test_a_hook_on_autograds_node_changes_what_is_added():
    """Nothing is added past a node that somebody keeps."""
    model, expected = small.stage(1), small.stage(1)
    expected.load_state_dict(model.state_dict())
    nodes = [get_gradient_edge(model.get_parameter(name)).node for name in (LINEAR, EXPERTS)]
    for node in nodes:
        node.register_prehook(lambda gradients: (2 * gradients[0],))
    run_chunks(model), run_chunks(expected)
    for name in (LINEAR, EXPERTS):
        found, want = (m.get_parameter(name).grad for m in (model, expected))
        assert relative_error(found, 2 * want) < 1e-6
