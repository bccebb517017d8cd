"""The attention segment that is written down, against autograd's and the block as a module."""

import copy

import pytest
import torch
from torch import nn

from dualpipe_ext.blocks import chunk as chunk_module
from dualpipe_ext.blocks.attention import GroupedQueryAttention
from dualpipe_ext.blocks.attention_segment import AttentionSegment, fits
from dualpipe_ext.blocks.block import TransformerBlock
from dualpipe_ext.blocks.pair import OverlappedPair
from dualpipe_ext.blocks.stage import TransformerStage
from dualpipe_ext.gradients.segment import Segment
from dualpipe_ext.moe.layer import MoELayer
from dualpipe_ext.moe.router import Router
from tests.support.compare import relative_error

B, S, H = 2, 7, 16


def make_block(kind="softmax", router=None, attention=None, **options):
    """What takes kernels where there are any; here the operators' plain torch."""
    torch.manual_seed(4)
    if router is None:
        groups = {"n_groups": 2, "topk_groups": 1} if kind == "sigmoid" else {}
        router = Router(H, 8, 2, kind=kind, implementation="triton", **groups)
        router.reset_parameters(0.5)
        if router.bias is not None:
            router.bias.normal_(0, 0.1)
    options = {"aux_loss_coefficient": 0.1, "init_std": 0.3, **options}
    moe = MoELayer(hidden=H, expert_hidden=8, num_experts=8, topk=2, router=router, **options)
    if attention is None:
        attention = GroupedQueryAttention(H, heads=4, kv_heads=2, implementation="triton")
    block = TransformerBlock(H, attention, moe)
    for norm in (block.attention_norm, block.feed_forward_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return block


def make_x(seed=0):
    return torch.randn(B, S, H, generator=torch.Generator().manual_seed(seed))


def gradients(block):
    return {name: p.grad for name, p in block.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("used", [(0, 1, 2, 3), (0,), (1,), (2,), (3,), (1, 2)], ids=str)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_against_autograd(kind, used):
    block = make_block(kind)
    other = copy.deepcopy(block)
    x = make_x()
    assert fits(block, x)
    given = [torch.randn(B, S, H), torch.randn(B * S, H), torch.randn(B * S, 2), torch.tensor(0.7)]
    given = [dy if i in used else None for i, dy in enumerate(given)]
    results = []
    for module, make in (
        (block, lambda: AttentionSegment(block)),
        (other, lambda: Segment(other.attend_and_route)),
    ):
        for _ in range(2):  # gradients add up
            segment = make()
            outputs = segment.forward(x)
            (dx,) = segment.backward_input(*given, None, None)
            before = {name: grad.clone() for name, grad in gradients(module).items()}
            segment.backward_weight()
        results.append((outputs, dx, before, gradients(module)))
    (outputs, dx, before, found), (want, want_dx, _, wanted) = results
    torch.testing.assert_close(outputs[3], want[3], rtol=1e-6, atol=0)  # the balance loss
    assert all(torch.equal(outputs[i], want[i]) for i in (0, 1, 2, 4, 5))
    torch.testing.assert_close(dx, want_dx, rtol=1e-5, atol=1e-6)
    assert wanted.keys() <= found.keys()
    for name in ("attention.qkv.weight", "attention.out.weight"):  # only by backward_weight
        assert torch.equal(2 * before[name], found[name])
    for name, gradient in found.items():
        expected = wanted.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6, msg=name)


def no_fit(monkeypatch):
    monkeypatch.setattr(chunk_module, "fits", lambda block, x: False)


@pytest.mark.parametrize("delay", ["off", "experts", "all"])
def test_pairs(delay, monkeypatch):
    """Two micro-batches of two blocks: as the same by autograd, and as the module."""
    results = []
    for explicit in (True, False):
        if not explicit:
            no_fit(monkeypatch)
        stage = TransformerStage([make_block(), make_block("sigmoid")])
        pair = OverlappedPair("cpu", weight_delay=delay)
        chunks = [stage.start_chunk(make_x(seed)) for seed in (1, 2)]
        first = chunks[0].forward()[0]
        kind = AttentionSegment if explicit else Segment
        assert all(type(block._attention) is kind for block in chunks[0].blocks)
        (second,), (dx,) = pair.run(chunks[1], chunks[0], (torch.ones_like(first),))
        chunks[1].backward_input((torch.ones_like(second),))
        chunks[1].backward_weight()
        results.append((first, second, dx, gradients(stage)))
    stage = TransformerStage([make_block(), make_block("sigmoid")])
    inputs = [make_x(seed).requires_grad_() for seed in (1, 2)]
    outputs = []
    for x in inputs:
        outputs.append(stage(x))
        (outputs[-1].sum() + stage.aux_loss_scale * stage.aux_loss()).backward()
    results.append((*outputs, inputs[0].grad, gradients(stage)))
    (*found, grads), *others = results
    for *want, wanted in others:
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert grads.keys() == wanted.keys()
        for name in grads:
            assert relative_error(grads[name], wanted[name]) < 1e-6, name


def hooked(module, name="register_forward_hook"):
    getattr(module, name)(lambda *arguments: None)


class OtherParameter(nn.Parameter):
    pass


def put(module, weight):
    module.weight = weight


REASONS = {
    "a hook": lambda b: hooked(b.attention.qkv),
    "a hook before": lambda b: hooked(b.feed_forward.router, "register_forward_pre_hook"),
    "a hook of the backward": lambda b: hooked(b.attention, "register_full_backward_hook"),
    "frozen": lambda b: b.attention_norm.requires_grad_(False),
    "another class": lambda b: put(b.attention.out, OtherParameter(b.attention.out.weight.data)),
    "parametrized": lambda b: nn.utils.parametrizations.orthogonal(b.attention.out),
    "another dtype": lambda b: b.attention.qkv.half(),
    "torch's attention": lambda b: setattr(b.attention, "implementation", "sdpa"),
    "torch's router": lambda b: setattr(b.feed_forward.router, "implementation", "torch"),
}


@pytest.mark.parametrize("name", REASONS)
def test_does_not_fit(name):
    block = make_block()
    assert fits(block, make_x())
    REASONS[name](block)
    assert not fits(block, make_x())


def test_does_not_fit_other_modules():
    x = make_x()
    normalized = GroupedQueryAttention(H, heads=4, normalize=True, implementation="triton")
    assert not fits(make_block(attention=normalized), x)
    assert not fits(make_block(shared_expert_hidden=8), x)
    assert not fits(make_block(), x.flatten(0, 1))
    assert not fits(make_block().double(), x.double())


def test_does_not_fit_while_others_look_on():
    block, x = make_block(), make_x()
    with torch.autograd.graph.save_on_cpu():
        assert not fits(block, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fits(block, x)
    handle = nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    try:
        assert not fits(block, x)
    finally:
        handle.remove()
    assert fits(block, x)


@pytest.mark.parametrize("recompute", [(), ("attention",)])
def test_recompute_goes_by_autograd(recompute):
    block = make_block()
    block.recompute = frozenset(recompute)
    chunk = block.start_chunk()
    chunk.attention(make_x())
    assert type(chunk._attention) is (Segment if recompute else AttentionSegment)


def test_hooks_of_parameters_run():
    block, seen = make_block(), []
    for name, parameter in block.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    segment = AttentionSegment(block)
    h, m, weight, *_ = segment.forward(make_x())
    segment.backward_input(h, m, weight, torch.tensor(1.0), None, None)
    early = {"attention_norm.weight", "feed_forward_norm.weight", "feed_forward.router.weight"}
    assert set(seen) == early and len(seen) == 3
    segment.backward_weight()
    assert set(seen) - early == {"attention.qkv.weight", "attention.out.weight"} and len(seen) == 5
