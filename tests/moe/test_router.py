"""The router against a loop over tokens, one decision at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualpipe_ext.moe.router import Router
from dualpipe_ext.ops.route_reference import balance_loss, count_tokens

# Inputs and weights on a coarse grid: logits are exact in fp32, and ties are frequent.
GRID = 0.25


def on_grid(generator, *shape):
    return torch.randint(-2, 3, shape, generator=generator) * GRID


@st.composite
def routers(draw):
    kind = draw(st.sampled_from(["softmax", "sigmoid"]))
    n_groups = draw(st.sampled_from([1, 2, 3, 4])) if kind == "sigmoid" else 1
    topk_groups = draw(st.integers(1, n_groups))
    group_size = draw(st.integers(1, 5))
    router = Router(
        hidden=draw(st.sampled_from([1, 4, 9])),
        num_experts=n_groups * group_size,
        topk=draw(st.integers(1, topk_groups * group_size)),
        kind=kind,
        renormalize=draw(st.booleans()),
        n_groups=n_groups,
        topk_groups=topk_groups,
        route_scale=draw(st.sampled_from([1.0, 2.5])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    with torch.no_grad():
        router.weight.copy_(on_grid(generator, *router.weight.shape))
        if router.bias is not None:
            router.bias.copy_(on_grid(generator, router.num_experts))
    return router, on_grid(generator, draw(st.integers(0, 6)), router.hidden)


def route_one_token(router, logits):
    """Experts, weights and balance probabilities of one token, in plain Python.

    Scores that decide are added in fp32, as the router does: exact ties must stay ties.
    """
    experts = range(router.num_experts)
    if router.kind == "softmax":
        biggest = max(logits)
        scores = [math.exp(value - biggest) for value in logits]
        scores = [value / sum(scores) for value in scores]
        ranking = logits
    else:
        ranking = torch.tensor(logits).sigmoid().numpy()
        scores = [1 / (1 + math.exp(-value)) for value in logits]
        ranking = [np.float32(ranking[e]) + np.float32(router.bias[e]) for e in experts]

    size = router.num_experts // router.n_groups
    group_scores = []
    for group in range(router.n_groups):
        members = sorted(ranking[group * size : (group + 1) * size], reverse=True)
        group_scores.append(sum(members[1:2], members[0]))
    by_score = sorted(range(router.n_groups), key=lambda g: (-group_scores[g], g))
    kept = set(by_score[: router.topk_groups])
    allowed = [e for e in experts if e // size in kept]
    chosen = sorted(allowed, key=lambda e: (-ranking[e], e))[: router.topk]

    weights = [scores[e] for e in chosen]
    if router.renormalize:
        weights = [weight / sum(weights) for weight in weights]
    total = sum(scores)
    return chosen, [w * router.route_scale for w in weights], [score / total for score in scores]


@given(routers())
def test_matches_a_loop_over_tokens(case):
    router, x = case
    tokens, experts = len(x), router.num_experts
    routes = router(x)
    assert routes.topk_idx.dtype == torch.int32 and routes.topk_weight.dtype == torch.float32
    assert routes.topk_idx.shape == routes.topk_weight.shape == (tokens, router.topk)

    counts, probabilities = [0] * experts, [0.0] * experts
    for token, logits in enumerate((x @ router.weight.detach().T).tolist()):
        chosen, weights, probability = route_one_token(router, logits)
        assert routes.topk_idx[token].tolist() == chosen
        assert routes.topk_weight[token].tolist() == pytest.approx(weights, rel=1e-5)
        for expert in chosen:
            counts[expert] += 1
        for expert in range(experts):
            probabilities[expert] += probability[expert]
    assert routes.tokens_per_expert.tolist() == counts
    loss = sum(counts[e] * probabilities[e] for e in range(experts))
    loss *= experts / max(1, tokens * router.topk) / max(1, tokens)
    assert routes.aux_loss.item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_ties_go_to_the_lowest_index(kind):
    router = Router(8, num_experts=300, topk=32, kind=kind)
    torch.nn.init.ones_(router.weight)
    assert torch.equal(router(torch.randn(5, 8)).topk_idx, torch.arange(32).int().expand(5, 32))


def test_groups_keep_their_two_best():
    """Group 1 holds the best single expert, group 0 the better pair."""
    router = Router(1, 4, 2, kind="sigmoid", n_groups=2, topk_groups=1)
    scores = torch.tensor([[0.6, 0.6, 0.9, 0.1]])
    assert router.select(scores).tolist() == [[0, 1]]


def test_an_overridden_choice_is_used():
    class Last(Router):
        def select(self, scores):
            return super().select(-scores)

    for implementation in ("auto", "torch", "triton"):
        router = Last(2, 3, 1, implementation=implementation)
        with torch.no_grad():
            router.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]))
        assert router(torch.tensor([[1.0, 0.0]])).topk_idx.tolist() == [[1]]
    with pytest.raises(ValueError, match="implementation='fast': choose \"auto\""):
        Router(2, 3, 1, implementation="fast")


def test_bias_moves_the_choice_and_not_the_weight():
    router = Router(4, 4, 1, kind="sigmoid", renormalize=False)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
        router.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    routes = router(torch.tensor([[3.0, 0.0, 0.0, 1.0]]))
    assert routes.topk_idx.tolist() == [[3]]
    assert routes.topk_weight.item() == pytest.approx(torch.tensor(1.0).sigmoid().item())


def test_bias_update_balances_the_load(rng):
    router = Router(16, 8, 2, kind="sigmoid", bias_update_rate=0.02)
    with torch.no_grad():
        router.weight.copy_(0.2 * torch.randn(8, 16, generator=rng))
    x = torch.randn(512, 16, generator=rng) + 1.0  # one direction, so that some experts are hot

    def imbalance():
        counts = router(x).tokens_per_expert.double()
        return (counts.max() / counts.mean()).item()

    before = imbalance()
    for _ in range(100):
        router.update_bias(router(x).tokens_per_expert)
    assert before > 1.8 and imbalance() < 1.25


def test_bias_update_example():
    router = Router(8, 4, 1, kind="sigmoid")
    router.update_bias(torch.tensor([4, 0, 2, 2]))
    assert router.bias.tolist() == pytest.approx([-0.001, 0.001, 0.0, 0.0])


def test_bias_survives_a_cast_of_the_model():
    router = Router(8, 4, 1, kind="sigmoid")
    router.bias.fill_(0.501)
    exact = router.bias.clone()
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.bias.dtype == torch.float32 and torch.equal(router.bias, exact)
    assert "bias" in router.state_dict()


def test_arithmetic_is_fp32(rng):
    """bf16 inputs are only read as bf16: autocast and the input's dtype change no decision."""
    router = Router(256, 64, 8)
    x = torch.randn(100, 256, generator=rng).bfloat16()
    expected = router(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x)
    assert torch.equal(found.topk_idx, expected.topk_idx)
    assert torch.equal(found.topk_weight, expected.topk_weight)
    assert found.topk_weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_gradients(kind, renormalize, rng):
    router = Router(5, 6, 3, kind=kind, renormalize=renormalize, route_scale=2.5).double()
    x = torch.randn(4, 5, dtype=torch.float64, generator=rng, requires_grad=True)

    def outputs(x, weight):
        routes = torch.func.functional_call(router, {"weight": weight}, (x,))
        return routes.topk_weight, routes.aux_loss

    weight = torch.randn(6, 5, dtype=torch.float64, generator=rng, requires_grad=True)
    assert torch.autograd.gradcheck(outputs, (x, weight))


def test_count_tokens_leaves_out_dropped_routes():
    topk_idx = torch.tensor([[0, 2], [2, -1], [-1, -1]], dtype=torch.int32)
    assert count_tokens(topk_idx, 4).tolist() == [1, 0, 2, 0]


def test_balance_loss_is_1_when_uniform_and_E_at_worst():
    uniform = torch.full((6, 3), 1 / 3)
    assert balance_loss(uniform, torch.tensor([4, 4, 4])).item() == pytest.approx(1)
    collapsed = torch.tensor([[0.0, 1.0, 0.0]]).expand(6, 3)
    assert balance_loss(collapsed, torch.tensor([0, 12, 0])).item() == pytest.approx(3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kind="hash"), "'hash' is unknown: use 'softmax' or 'sigmoid'"),
        (dict(topk=9), "topk=9 is outside 1..8.*num_experts=8"),
        (dict(topk=0), "topk=0 is outside 1..8"),
        (dict(n_groups=2), "n_groups=2 is for kind 'sigmoid'"),
        (dict(kind="sigmoid", n_groups=3), "num_experts=8 does not split into n_groups=3"),
        (dict(kind="sigmoid", n_groups=4, topk_groups=5), "topk_groups=5 is outside 1..4"),
        (dict(kind="sigmoid", n_groups=4, topk_groups=1), "topk=3 exceeds the 2 experts"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Router(8, **({"num_experts": 8, "topk": 3} | arguments))


def test_wrong_bias_updates():
    with pytest.raises(RuntimeError, match="'softmax' router has no bias"):
        Router(8, 4, 1).update_bias(torch.zeros(4))
    with pytest.raises(ValueError, match=r"shape \(3,\), this router has 4 experts"):
        Router(8, 4, 1, kind="sigmoid").update_bias(torch.zeros(3))
