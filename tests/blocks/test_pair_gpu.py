"""Overlapped pairs on GPUs: bit for bit what the same segments give one after another."""

from collections import Counter

import pytest
import torch

from dualpipe_ext.blocks.attention import GroupedQueryAttention, LatentAttention
from dualpipe_ext.blocks.block import TransformerBlock
from dualpipe_ext.blocks.pair import OverlappedPair
from dualpipe_ext.blocks.stage import TransformerStage
from dualpipe_ext.blocks.tune import tune_split
from dualpipe_ext.moe.layer import MoELayer

HIDDEN, SEQUENCES, LENGTH = 1024, 2, 768
ROUNDS = 4  # a race shows now and then only
MODES = (
    {},
    {"comm_sms": 24},
    {"comm_sms": 8, "num_sms": 116},
    {"comm_sms": 20, "num_sms": 112, "weight_delay": "experts"},
    {"comm_sms": 4, "num_sms": 64, "weight_delay": "off"},
)


def build_stage(depth, group, device, seed=0, **options):
    """bf16 blocks, GQA and MLA in turn; weights of order one for the width."""
    torch.manual_seed(seed)
    like = {"dtype": torch.bfloat16, "device": device}
    blocks = []
    for i in range(depth):
        attention = GroupedQueryAttention(HIDDEN, heads=8, kv_heads=2, **like)
        if i % 2:
            attention = LatentAttention(HIDDEN, heads=8, kv_rank=256, query_rank=512, **like)
        moe = MoELayer(
            **dict(hidden=HIDDEN, expert_hidden=512, num_experts=16, topk=4, group=group),
            **dict(max_tokens=SEQUENCES * LENGTH, init_std=HIDDEN**-0.5, **options),
            **like,
        )
        blocks.append(TransformerBlock(HIDDEN, attention, moe, **like))
    return TransformerStage(blocks)


def random_inputs(count, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    shape = (count, SEQUENCES, LENGTH, HIDDEN)
    return torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device)


def run(stages, inputs, gradients, pair):
    """Outputs, input gradients and weight gradients of a chain: each forward meets a backward."""
    for stage in stages:
        stage.zero_grad()
    forward_stage, backward_stage = stages
    results = []
    before = backward_stage.start_chunk(inputs[0])
    before.forward()
    for x, dy in zip(inputs[1:], gradients, strict=False):
        chunk = forward_stage.start_chunk(x)
        if pair is None:
            outputs = chunk.forward()
            found = before.backward_input((dy,))
            before.backward_weight()
        else:
            outputs, found = pair.run(chunk, before, (dy,))
        results += [*outputs, *found]
        before, forward_stage, backward_stage = chunk, backward_stage, forward_stage
    found = before.backward_input((gradients[-1],))
    before.backward_weight()
    results += found
    for stage in stages:
        results += [p.grad for p in stage.parameters()]
    return [result.clone() for result in results]


def check_pairs(rank, group, options=None):
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = torch.device("cuda", rank)
    stages = [build_stage(depth, group, device, depth, **(options or {})) for depth in (3, 2)]
    inputs, gradients = (random_inputs(5, device, seed + 10 * rank) for seed in (1, 2))
    expected = run(stages, inputs, gradients, None)
    for mode in MODES:
        pair = OverlappedPair(device, **mode)
        for _ in range(ROUNDS):
            found = run(stages, inputs, gradients, pair)
            for i, (one, other) in enumerate(zip(found, expected, strict=True)):
                assert torch.equal(one, other), (mode, i, (one - other).abs().max().item())
    check_two_forwards(stages[0], inputs, device)
    for stage in stages:
        for block in stage.blocks:
            block.feed_forward.close()
    torch.use_deterministic_algorithms(False)


def check_two_forwards(stage, inputs, device):
    expected = [stage.start_chunk(x, grad=False).forward()[0] for x in inputs[:2]]
    for _ in range(ROUNDS):
        chunks = [
            stage.start_chunk(x, grad=False, channel=channel)
            for x, channel in zip(inputs[:2], ("forward", "backward"), strict=True)
        ]
        found = OverlappedPair(device, comm_sms=8, num_sms=116).run_forwards(*chunks)
        for (one,), other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def check_graph(rank, group, options):
    """A graph of a chain of pairs, replayed on other inputs, against the same chain in order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = torch.device("cuda", rank)
    stages = [build_stage(depth, group, device, depth, **options) for depth in (2, 1)]
    inputs, gradients = (random_inputs(4, device, seed + 10 * rank) for seed in (1, 2))
    pair = OverlappedPair(device, comm_sms=options.get("comm_sms", 8))
    run(stages, inputs, gradients, pair)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = run(stages, inputs, gradients, pair)
    for seed in range(3, 3 + ROUNDS):
        inputs.copy_(random_inputs(4, device, seed + 10 * rank))
        graph.replay()
        found = [result.clone() for result in captured]
        expected = run(stages, inputs, gradients, None)
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(one, other), (seed, i, (one - other).abs().max().item())
    for stage in stages:
        for block in stage.blocks:
            block.feed_forward.exchange.check()
            block.feed_forward.close()
    torch.use_deterministic_algorithms(False)


GRAPHS = [
    {"max_rows": 16384, "form": "expert"},
    {"max_rows": 16384},
    {"max_rows": 16384, "comm_sms": 0},
]


@pytest.mark.gpu
@pytest.mark.parametrize("options", GRAPHS, ids=str)
def test_graph_of_pairs(options):
    check_graph(0, None, options)


@pytest.mark.gpu_2
@pytest.mark.parametrize("options", GRAPHS, ids=str)
def test_graph_of_pairs_on_two_gpus(options, gpu_workers_2):
    gpu_workers_2.run(check_graph, options, timeout=300)


def tune(rank, group):
    device = torch.device("cuda", rank)
    stage, pair = build_stage(1, group, device), OverlappedPair(device)
    x, dy = random_inputs(2, device, rank)
    used, open_lanes = Counter(), pair._lanes.open

    def open_and_count(comm_sms):
        used[comm_sms] += 1
        open_lanes(comm_sms)

    def step():
        before, after = stage.start_chunk(x), stage.start_chunk(dy)
        before.forward()
        pair.run(after, before, (dy,))
        after.backward_input((x,))
        after.backward_weight()

    pair._lanes.open = open_and_count
    how = {"group": group, "warmup": 1, "repeats": 2}
    splits = tune_split(pair, step, comm_sms=(4, 12), num_sms=(None, 100), **how)
    stage.blocks[0].feed_forward.close()
    return splits, used, pair.comm_sms


@pytest.mark.gpu_2
def test_tuning_on_two_gpus(gpu_workers_2):
    first, second = gpu_workers_2.run(tune, timeout=300)
    assert first == second
    splits, used, left = first
    assert used == {4: 6, 12: 6} and left == splits[0].comm_sms
    found = {(split.comm_sms, split.num_sms) for split in splits}
    assert found == {(4, None), (4, 100), (12, None), (12, 100)}


@pytest.mark.gpu
def test_pairs_on_one_gpu():
    check_pairs(0, None)


@pytest.mark.gpu_2
def test_pairs_on_two_gpus(gpu_workers_2):
    gpu_workers_2.run(check_pairs, timeout=300)


@pytest.mark.gpu_4
@pytest.mark.parametrize("options", [{}, {"form": "expert"}, {"max_rows": 16384}], ids=str)
def test_pairs_on_four_gpus(options, gpu_workers_4):
    gpu_workers_4.run(check_pairs, options, timeout=300)
