"""Programs that leave their SMs to communication, on a Hopper GPU: all tiles are computed."""

import pytest
import torch

from dualpipe_ext.ops.attention import flash_attention
from dualpipe_ext.triton_kernels.launch.sm_sharing import (
    COUNTERS,
    can_claim,
    claim_sms,
    make_counters,
    program_limit,
    tile_counter,
)
from tests.ops.test_grouped_mlp_gpu import on_gpu, run
from tests.support.grouped_mlp_cases import make_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="kernels that draw tiles use wgmma, which only Hopper GPUs have",
    ),
]

LIMITS = (1, 8, 124)


@pytest.fixture
def limit():
    """The word that programs look at."""
    word = program_limit(torch.device("cuda", torch.cuda.current_device()))
    yield word
    word.zero_()


def test_experts(limit):
    sizes = (500, 700, 0, 1000, 511, 12), 2048, 768
    inputs = on_gpu(*make_problem(*sizes, torch.bfloat16, 128))
    first = run(*inputs, take_over=True)
    for programs in LIMITS:
        limit.fill_(programs)
        assert all(map(torch.equal, first, run(*inputs, take_over=True))), programs


@pytest.mark.parametrize("width", [64, 128])
def test_attention(width, limit):
    shape = (2, 8, 1000, width)
    q, k, v, d_out = (torch.randn(shape, device="cuda").bfloat16() for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def both_ways():
        out = flash_attention(*leaves, causal=True, deterministic=True, implementation="triton")
        return [out, *torch.autograd.grad(out, leaves, d_out)]

    first = both_ways()
    for programs in LIMITS:
        limit.fill_(programs)
        assert all(map(torch.equal, first, both_ways())), programs


@pytest.mark.parametrize("as_graph", [False, True])
def test_claim_writes_the_limit(as_graph, limit):
    device = limit.device
    assert can_claim(device)
    seen = torch.zeros(2, dtype=torch.int32, device=device)

    def claim():
        claim_sms(device, 124)
        seen[0].copy_(limit[0])
        claim_sms(device, 0)
        seen[1].copy_(limit[0])

    if as_graph:
        claim()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            claim()
        seen.fill_(-1)
        claim = graph.replay
    claim()
    assert seen.tolist() == [124, 0]


@pytest.mark.parametrize("made", [0, 1, 2])
def test_counters_are_zero_on_every_stream(made):
    """Whether all of them were made in advance, or more are wanted than were."""
    device = torch.device("cuda", torch.cuda.current_device())
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    for i in range(2 * COUNTERS):
        for stream in streams:
            with torch.cuda.stream(stream):
                if i % COUNTERS == 0 and i < made * COUNTERS:
                    make_counters(device)
                counter = tile_counter(device)
                assert counter.data_ptr() % 16 == 0
                found.append(counter[:1].clone())
                counter.add_(7)  # as a kernel does
    torch.cuda.synchronize()
    assert not torch.cat(found).any()


def test_a_graph_clears_its_counter():
    device = torch.device("cuda", torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counter = tile_counter(device)
        before = counter.clone()
        counter.add_(7)
    for _ in range(3):
        graph.replay()
        assert before.item() == 0 and counter.item() == 7
