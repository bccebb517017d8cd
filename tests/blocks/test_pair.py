"""Blocks in segments and overlapped pairs on one process, against plain autograd."""

import copy
import weakref
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dualpipe_ext.blocks import chunk as chunks
from dualpipe_ext.blocks import pair as overlap
from dualpipe_ext.blocks import split
from dualpipe_ext.blocks.block import TransformerBlock
from dualpipe_ext.blocks.pair import OverlappedPair
from dualpipe_ext.blocks.split import SmShare, SmSplit
from dualpipe_ext.blocks.stage import TransformerStage
from dualpipe_ext.exchange.exchange import Exchange
from dualpipe_ext.gradients.delayed import delay_linears
from dualpipe_ext.moe.routed import RoutedExperts
from dualpipe_ext.moe.router import Router
from dualpipe_ext.ops.grouped_mlp import grouped_mlp
from tests.support import small_transformer as small
from tests.support.compare import relative_error

DELAYS = ("off", "experts", "all")


class OwnExperts(nn.Module):
    """An experts' MLP as a user would bring it: autograd does the rest."""

    def __init__(self):
        super().__init__()
        self.w13 = nn.Parameter(torch.randn(4, 16, 16) * 0.3)
        self.w2 = nn.Parameter(torch.randn(4, 16, 8) * 0.3)

    def forward(self, rows, row_weight, expert_offsets):
        return grouped_mlp(rows, row_weight, self.w13, self.w2, expert_offsets)


def own_experts():
    exchange = Exchange(
        None, hidden=16, num_experts=4, topk=2, max_tokens=64, dtype=torch.float64, device="cpu"
    )
    router = Router(16, 4, 2, dtype=torch.float64)
    router.reset_parameters(0.3)
    return RoutedExperts(router, OwnExperts(), exchange, shared_expert=small.Dense())


def whole_model(kinds):
    blocks = {
        "gqa": lambda: small.block(),
        "mla": lambda: small.block("mla"),
        "shared": lambda: small.block(shared_expert_hidden=8),
        "copies": lambda: small.block(num_slots=6),
        "bounded": lambda: small.block(max_rows=1024),
        "unique": lambda: small.block(form="unique"),
        "unique, bounded": lambda: small.block(form="unique", max_rows=1024),
        "dense": lambda: small.block(feed_forward=delay_linears(small.Dense())),
        "foreign dense": lambda: small.block(feed_forward=small.Dense()),
        "own experts": lambda: small.block(feed_forward=own_experts()),
        "recompute": lambda: small.block(recompute=("attention", "mlp")),
        "recompute foreign": lambda: small.block(
            feed_forward=own_experts(), recompute=("attention", "mlp")
        ),
    }
    return small.stage([blocks[kind]() for kind in kinds], first=True, last=True)


MODELS = {
    "routed": ["gqa", "mla", "gqa"],
    "mixed": ["foreign dense", "shared", "own experts"],
    "recompute": ["recompute", "dense", "recompute foreign"],
    "placed and bounded": ["copies", "bounded"],
    "unique rows": ["unique", "gqa", "unique, bounded"],
    "no blocks": [],
}


def autograd_run(model, seeds):
    """Losses and gradients of plain autograd, the balance losses included."""
    model = copy.deepcopy(model)
    losses = []
    for seed in seeds:
        loss = small.word_loss(model(small.words(2, 7, seed=seed)), small.words(2, 7, seed=-seed))
        losses.append(loss.detach())
        (loss + model.aux_loss_scale * model.aux_loss()).backward()
    return losses, small.gradients(model)


def chunk_of(model, seed, **options):
    return model.start_chunk(
        small.words(2, 7, seed=seed),
        criterion=small.word_loss,
        labels=(small.words(2, 7, seed=-seed),),
        **options,
    )


def sequential_run(model, seeds, weight_delay="all"):
    model = copy.deepcopy(model)
    losses = []
    for seed in seeds:
        chunk = chunk_of(model, seed)
        chunk.forward()
        losses.append(chunk.loss)
        chunk.backward_input(weight_delay=weight_delay)
        chunk.backward_weight()
    return losses, small.gradients(model)


def paired_run(model, seeds, weight_delay):
    """Each forward but the first overlaps the backward of the one before."""
    model = copy.deepcopy(model)
    pair = OverlappedPair("cpu", weight_delay=weight_delay)
    chunks = [chunk_of(model, seed) for seed in seeds]
    chunks[0].forward()
    for before, chunk in pairwise(chunks):
        pair.run(chunk, before)
    chunks[-1].backward_input()
    chunks[-1].backward_weight()
    return [chunk.loss for chunk in chunks], small.gradients(model)


def assert_close(found, expected, tolerance=1e-12):
    for loss, other in zip(found[0], expected[0], strict=True):
        assert abs(loss - other) <= tolerance * abs(other)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert relative_error(found[1][name], gradient) <= tolerance, name


def assert_equal(found, expected):
    assert all(map(torch.equal, found[0], expected[0]))
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("kinds", MODELS.values(), ids=MODELS)
def test_segments_and_pairs_against_autograd(kinds):
    model = whole_model(kinds).double()
    model.aux_loss_scale = 0.5
    seeds = (1, 2, 3)
    sequential = sequential_run(model, seeds)
    assert_close(sequential, autograd_run(model, seeds))
    for name, gradient in sequential[1].items():
        assert gradient.abs().sum() > 0, name
    for weight_delay in DELAYS:
        assert_equal(sequential_run(model, seeds, weight_delay), sequential)
        assert_equal(paired_run(model, seeds, weight_delay), sequential)


@pytest.mark.parametrize("depths", [(1, 3), (3, 1), (0, 2), (2, 0)])
@pytest.mark.parametrize("weight_delay", ["off", "all"])
def test_pair_of_different_stages(depths, weight_delay):
    forward_stage, backward_stage = (small.stage(depth) for depth in depths)
    x, z, dz = torch.randn(3, 2, 7, 16)
    calls = []

    def run(paired):
        for stage in (forward_stage, backward_stage):
            stage.zero_grad()
        f, b = forward_stage.start_chunk(x), backward_stage.start_chunk(z)
        b.forward()
        if paired:
            pair = OverlappedPair("cpu", weight_delay=weight_delay)
            outputs, found = pair.run(
                *(f, b, (dz,)), on_outputs=calls.append, on_input_gradients=calls.append
            )
            assert calls[0] is found and calls[1] is outputs
        else:
            outputs = f.forward()
            found = b.backward_input((dz,))
            b.backward_weight()
        f.backward_input((dz,))
        f.backward_weight()
        return (*outputs, *found), small.gradients(forward_stage) | small.gradients(backward_stage)

    assert_equal(run(paired=True), run(paired=False))


def test_two_forwards_at_once():
    model = whole_model(["gqa", "shared", "dense"]).double()
    a, b = (chunk_of(model, i, grad=False, channel=c) for i, c in ((1, "forward"), (2, "backward")))
    (logits_a,), (logits_b,) = OverlappedPair("cpu").run_forwards(a, b)
    with torch.no_grad():
        assert relative_error(logits_a, model(small.words(2, 7, seed=1))) < 1e-12
        assert relative_error(logits_b, model(small.words(2, 7, seed=2))) < 1e-12
    with pytest.raises(ValueError, match="channel"):
        OverlappedPair("cpu").run_forwards(chunk_of(model, 1), chunk_of(model, 2))


def test_order_of_the_lanes():
    """The pair's order is the figure's, read off the profiler's ranges."""
    model = small.stage(1)
    f, b = (model.start_chunk(torch.randn(1, 4, 16)) for _ in range(2))
    (out,) = b.forward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        OverlappedPair("cpu").run(f, b, (torch.randn_like(out),))
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    names = [e.name for e in events if e.name.startswith(("compute: ", "comm: "))]
    lanes = {"compute": [], "comm": []}
    for name in names:
        lane, _, segment = name.partition(": ")
        lanes[lane].append(segment.removesuffix(" layer 0"))
    inner = [n for n in lanes["compute"] if n.startswith(("attention", "mlp"))]
    assert inner == [*("attention F", "mlp B", "mlp W", "mlp F", "attention B", "attention W")]
    assert lanes["comm"] == ["combine B", "plan F", "dispatch F", "dispatch B", "combine F"]


@pytest.mark.parametrize("weight_delay", DELAYS)
def test_what_the_delay_leaves(weight_delay):
    model = small.stage(1, shared_expert_hidden=8)
    chunk = model.start_chunk(torch.randn(2, 7, 16))
    (out,) = chunk.forward()
    chunk.backward_input((torch.randn_like(out),), weight_delay=weight_delay)
    moe, attention = model.blocks[0].feed_forward, model.blocks[0].attention
    assert (moe.w13.grad is None) == (weight_delay != "off")
    assert (attention.qkv.weight.grad is None) == (weight_delay == "all")
    assert attention.query_norm.weight.grad is not None
    chunk.backward_weight()
    assert all(p.grad is not None for p in model.parameters())


def test_the_share_goes_to_all_gemms(monkeypatch):
    seen = {}

    def spy(name, function):
        def call(*arguments, num_sms, take_over, **options):
            seen[name] = num_sms, take_over
            return function(*arguments, num_sms=num_sms, take_over=take_over, **options)

        return call

    for name in ("mlp_forward", "mlp_dgrad", "mlp_wgrad"):
        monkeypatch.setattr(chunks, name, spy(name, getattr(chunks, name)))
    layer = small.block().double()
    chunk = layer.start_chunk()
    chunk.attention(torch.randn(2, 8, 16, dtype=torch.float64))
    for segment in (chunk.plan, chunk.dispatch):
        segment()
    monkeypatch.setattr(chunk, "_share", lambda: SmShare(7, True, None))
    chunk.mlp()
    chunk.combine()
    chunk.combine_backward(torch.ones_like(chunk.output()))
    chunk.mlp_backward()
    chunk.mlp_backward_weight()
    assert seen == dict.fromkeys(("mlp_forward", "mlp_dgrad", "mlp_wgrad"), (7, True))


@pytest.mark.parametrize(
    "capability, precision, num_sms, comm_sms, expected",
    [
        ((9, 0), "bf16", None, 8, (None, True, 124)),  # tiles are drawn
        ((9, 0), "bf16", None, 0, (None, True, None)),  # copy engines
        ((9, 0), "bf16", 100, 8, (100, False, 100)),
        ((9, 0), "fp8", None, 8, (124, False, 124)),
        ((9, 0), "fp8", None, 0, (None, False, None)),
        ((10, 0), "bf16", None, 8, (124, False, 124)),
    ],
)
def test_sms_of_experts(capability, precision, num_sms, comm_sms, expected, monkeypatch):
    """Kernels with equal shares leave communication its SMs; others may draw tiles on all."""
    monkeypatch.setattr(split, "device_facts", lambda device: (132, capability))
    moe = small.block().feed_forward
    moe.precision = precision
    exchange = SimpleNamespace(comm_sms=comm_sms, device=torch.device("cuda"))
    assert SmSplit(None, num_sms).share(moe, exchange) == SmShare(*expected)
    moe.num_sms = 7
    assert SmSplit(None, None).share(moe, exchange) == SmShare(7, False, 7)
    assert SmShare.alone(moe) == SmShare(7, False, 7)


def split_of(comm_sms):
    made = SmSplit(None, None)
    made.largest = comm_sms
    return made


@pytest.fixture
def claimed(monkeypatch):
    """Lanes as on a GPU of 132 SMs; the limits that they write, between the streams they set."""
    written, lanes = [], overlap._Lanes(torch.device("cpu"))
    monkeypatch.setattr(overlap, "claim_sms", lambda device, limit: written.append(limit))
    monkeypatch.setattr(overlap, "device_facts", lambda device: (132, (9, 0)))
    monkeypatch.setattr(overlap, "can_claim", lambda device: True)
    monkeypatch.setattr(overlap, "make_counters", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "compute")
    lanes._cuda, lanes._comm = True, SimpleNamespace(device=None, wait_stream=lambda other: None)
    names = {id(lanes._comm): "comm"}
    monkeypatch.setattr(
        torch.cuda, "set_stream", lambda stream: written.append(names.get(id(stream), stream))
    )
    return lanes, written


@pytest.mark.parametrize("comm_sms, limit", [(8, 124), (132, 1)])
def test_claims_end_with_what_communicates(comm_sms, limit, claimed):
    lanes, written = claimed
    lanes.open(split_of(comm_sms))
    assert lanes._communicate(lambda *numbers: written.append("segment") or sum(numbers), 1, 2) == 3
    assert written == ["comm", limit, "segment", 0, "compute"]
    del written[:]

    def fail():
        raise ValueError("of the segment")

    with pytest.raises(ValueError, match="of the segment"):
        lanes._communicate(fail)
    assert written == ["comm", limit, 0, "compute"]


def test_a_broken_stream_shows_its_first_error(claimed, monkeypatch):
    lanes, _ = claimed
    lanes.open(split_of(8))

    def fail(device, limit):
        raise RuntimeError("of the stream")

    def segment():
        monkeypatch.setattr(overlap, "claim_sms", fail)
        raise ValueError("of the segment")

    with pytest.raises(ValueError, match="of the segment"):
        lanes._communicate(segment)


@pytest.mark.parametrize("comm_sms, can", [(0, True), (8, False)])
def test_nothing_claimed(comm_sms, can, claimed, monkeypatch):
    """Copy engines take no SM; other GPUs' kernels do not look."""
    lanes, written = claimed
    lanes.open(split_of(8))
    monkeypatch.setattr(overlap, "can_claim", lambda device: can)
    lanes.open(split_of(comm_sms))
    lanes._communicate(lambda: None)
    assert written == ["comm", "compute"]


def test_plan_lives_until_the_compute_lane_is_behind_its_last_reader():
    chunk = small.stage(1).start_chunk(torch.randn(2, 7, 16))
    (out,) = chunk.forward()
    (block,) = chunk.blocks
    plan = weakref.ref(block._held.plan)
    block.combine_backward(torch.randn_like(out))
    block.mlp_backward()
    block.mlp_backward_weight()
    block.dispatch_backward()
    assert plan() is not None
    block.attention_backward()
    assert plan() is None


def test_gradient_hooks_fire_after_the_delayed_weights():
    model = small.stage(1)
    fired = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append((name, p.grad)))
    chunk = model.start_chunk(torch.randn(2, 7, 16))
    (out,) = chunk.forward()
    chunk.backward_input((torch.randn_like(out),))
    early = {name for name, _ in fired}
    assert early.isdisjoint({"blocks.0.attention.qkv.weight", "blocks.0.feed_forward.w13"})
    chunk.backward_weight()
    assert sorted(name for name, _ in fired) == sorted(n for n, _ in model.named_parameters())
    assert all(gradient is not None for _, gradient in fired)


def test_main_grad_takes_the_gradient():
    model = small.stage(1)
    expected = copy.deepcopy(model)
    x, dy = torch.randn(2, 2, 7, 16)
    for stage in (model, expected):
        if stage is model:
            for p in stage.parameters():
                if p.dim() > 1:
                    p.main_grad = torch.zeros_like(p, dtype=torch.float32)
        chunk = stage.start_chunk(x)
        chunk.forward()
        chunk.backward_input((dy,))
        chunk.backward_weight()
    for name in ("blocks.0.attention.out.weight", "blocks.0.feed_forward.w2"):
        p = model.get_parameter(name)
        assert p.grad is None
        assert relative_error(p.main_grad, expected.get_parameter(name).grad) < 1e-6


def test_autocast_runs_blocks_in_bf16():
    model = small.stage(2, first=True, last=True)
    expected = autograd_run(model, (1,))
    with torch.autocast("cpu", torch.bfloat16):
        chunk = chunk_of(model, 1)
        chunk.forward()
        chunk.backward_input()
        chunk.backward_weight()
    assert abs(chunk.loss - expected[0][0]) < 0.05 * expected[0][0]
    for name, gradient in expected[1].items():
        assert relative_error(small.gradients(model)[name], gradient) < 0.3, name


def test_wrong_arguments():
    with pytest.raises(ValueError, match="choose one of"):
        OverlappedPair("cpu", weight_delay="some")
    with pytest.raises(ValueError, match="collection out of"):
        TransformerBlock(16, nn.Identity(), nn.Identity(), recompute="attention")
    with pytest.raises(ValueError, match="takes 1"):
        TransformerStage([]).start_chunk(torch.ones(1), torch.ones(1)).forward()
    chunk = small.stage(1, last=True).start_chunk(
        torch.randn(1, 3, 16), criterion=lambda y: y.square()
    )
    with pytest.raises(ValueError, match="a loss is one number"):
        chunk.forward()


def test_segments_out_of_order_are_refused():
    (block,) = small.stage(1).start_chunk().blocks
    block.attention(torch.randn(2, 7, 16))
    with pytest.raises(RuntimeError, match=r"follows plan\(\), the last one was attention\(\)"):
        block.dispatch()
    block.plan()
    with pytest.raises(RuntimeError, match=r"follows attention\(\), the last one was plan\(\)"):
        block.plan()


def test_the_first_pair_has_its_comm_sms(monkeypatch):
    """Though its layer opens the exchange in the middle of it."""
    seen, send = [], Exchange.send

    def spy(exchange, *arguments, **options):
        seen.append(exchange.comm_sms)
        return send(exchange, *arguments, **options)

    monkeypatch.setattr(Exchange, "send", spy)
    # A backend on the CPU has no SMs: what is set comes back.
    monkeypatch.setattr(Exchange, "comm_sms", property(lambda e: e.__dict__["sms"], set_sms))
    model = small.stage(1)
    first = model.start_chunk(torch.randn(2, 7, 16), channel="forward")
    second = model.start_chunk(torch.randn(2, 7, 16), channel="backward")
    assert model.blocks[0].feed_forward.exchange is None
    OverlappedPair("cpu", comm_sms=24).run_forwards(first, second)
    assert seen == [24, 24]
    assert model.blocks[0].feed_forward.exchange.comm_sms == 16  # its own is back


def set_sms(exchange, comm_sms):
    exchange.__dict__["sms"] = comm_sms


def test_hooks_on_norms_run():
    """They see what the norm gets and gives, and may replace it."""
    block = small.block()
    x, seen = torch.randn(2, 7, 16), []
    want = block(x)

    def hook(norm, inputs, output):
        seen.append((norm, output))
        return 2 * output

    handles = [
        norm.register_forward_hook(hook) for norm in (block.attention_norm, block.feed_forward_norm)
    ]
    changed = block(x)
    assert [norm for norm, _ in seen] == [block.attention_norm, block.feed_forward_norm]
    assert not torch.allclose(changed, want)
    chunk = TransformerStage([block]).start_chunk(x)
    (out,) = chunk.forward()
    torch.testing.assert_close(out, changed.detach())
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(block(x), want)
