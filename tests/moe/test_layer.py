"""MoELayer on the CPU: against a dense oracle, and four gloo processes against one."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from dualpipe_ext import Exchange, MoELayer
from dualpipe_ext.moe.router import Router
from dualpipe_ext.ops.route_reference import count_tokens
from tests.support.compare import relative_error
from tests.support.dense_moe import dense_moe, swiglu

SIZES = dict(hidden=16, expert_hidden=24, num_experts=8, topk=3)
STEPS = 4


def test_the_router_takes_the_layers_sms():
    layer = MoELayer(**SIZES, num_sms=100)
    assert layer.router.num_sms == 100
    assert MoELayer.from_dense(layer, num_sms=50).router.num_sms == 50
    own = Router(SIZES["hidden"], SIZES["num_experts"], SIZES["topk"], num_sms=7)
    layer = MoELayer(**SIZES, num_sms=100, router=own)
    assert MoELayer.from_dense(layer, num_sms=50).router.num_sms == own.num_sms == 7


def test_main_grad_takes_the_gradient_under_autocast():
    """There the experts multiply casts of the weights."""
    found = []
    for wide in (True, False):
        layer = MoELayer(**SIZES)
        layer.reset_parameters(seed=1)
        for weight in (layer.w13, layer.w2) if wide else ():
            weight.main_grad = torch.zeros(weight.shape)
        x = torch.randn(20, SIZES["hidden"], generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
        assert not wide or layer.w13.grad is None
        found.append(layer.w13.main_grad if wide else layer.w13.grad)
    assert relative_error(*found) < 5e-3


class DroppingRouter(Router):
    """Drops every route whose weight is below a threshold, as a capacity limit would."""

    def forward(self, x):
        routes = super().forward(x)
        topk_idx = routes.topk_idx.masked_fill(routes.topk_weight < 0.33, -1)
        counts = count_tokens(topk_idx, self.num_experts)
        return routes._replace(topk_idx=topk_idx, tokens_per_expert=counts)


@dataclass(frozen=True)
class Scenario:
    """A training run; rank r brings tokens[r] tokens to every step."""

    tokens: tuple[int, ...]
    router: str = "softmax"
    shared_expert_hidden: int = 0
    dtype: torch.dtype = torch.float32

    def layer(self, group=None):
        torch.manual_seed(7)
        # expert_hidden 24 and init_std 0.3: outputs and router gradients of order one.
        router = self.router
        if router == "dropping":
            router = DroppingRouter(16, 8, 3, dtype=self.dtype)
        elif router == "sigmoid":
            options = dict(kind="sigmoid", n_groups=4, topk_groups=2, route_scale=2.5)
            router = Router(16, 8, 3, dtype=self.dtype, **options)
        if isinstance(router, Router):
            router.reset_parameters(0.3)
        return MoELayer(
            **SIZES,
            group=group,
            router=router,
            shared_expert_hidden=self.shared_expert_hidden,
            max_tokens=max(self.tokens),
            aux_loss_coefficient=0.1,
            init_std=0.3,
            dtype=self.dtype,
        )

    def loss(self, layer, step, rank):
        """Rank `rank`'s part of the step's loss; the parts of all ranks add up to the whole."""
        generator = torch.Generator().manual_seed(100 * step + rank)
        shape = (self.tokens[rank], 16)
        x, target = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(self.dtype)
        error = (layer(x.requires_grad_()) - target).square().sum() / sum(self.tokens)
        return error + layer.aux_loss / len(self.tokens)


SCENARIOS = {
    "even": Scenario(tokens=(32, 32, 32, 32)),
    "uneven, none on rank 2": Scenario(tokens=(40, 7, 0, 64), shared_expert_hidden=8),
    "dropped routes": Scenario(tokens=(40, 7, 0, 64), router="dropping"),
    "sigmoid, groups": Scenario(tokens=(16, 32, 33, 1), router="sigmoid"),
    "float64": Scenario(tokens=(40, 7, 0, 64), router="dropping", dtype=torch.float64),
}


def sharded_run(rank, group, scenario):
    """[(loss, gradients, tokens per expert)] of every step, as the whole group sees them."""
    layer = scenario.layer(group)
    history = []
    for step in range(STEPS):
        loss = scenario.loss(layer, step, rank)
        loss.backward()
        loss = loss.detach()
        counts = layer.tokens_per_expert.clone()
        dist.all_reduce(loss)
        dist.all_reduce(counts)
        for p in layer.parameters():
            if not getattr(p, "expert_parallel", False):
                dist.all_reduce(p.grad)
        history.append((loss, gradients(layer), counts))
        descend(layer, counts)
    layer.close()
    return history


def dense_run(scenario):
    layer = scenario.layer()
    history = []
    for step in range(STEPS):
        losses, counts = [], torch.zeros(8, dtype=torch.int64)
        for rank in range(len(scenario.tokens)):
            losses.append(scenario.loss(layer, step, rank))
            counts += layer.tokens_per_expert
        loss = torch.stack(losses).sum()
        loss.backward()
        history.append((loss.detach(), gradients(layer), counts))
        descend(layer, counts)
    return history


def gradients(layer):
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


def descend(layer, counts):
    with torch.no_grad():
        for p in layer.parameters():
            p -= 0.1 * p.grad
            p.grad = None
    if layer.router.bias is not None:
        layer.router.update_bias(counts)


@pytest.mark.parametrize("name", SCENARIOS)
def test_four_processes_train_like_one(name, gloo_workers_4):
    """Losses and gradients of every step. Sums over tokens run in another order, hence no equality:
    4e-7 is seen in fp32, 5e-16 in fp64."""
    scenario = SCENARIOS[name]
    tolerance = 1e-6 if scenario.dtype == torch.float32 else 1e-14
    expected = dense_run(scenario)
    found = gloo_workers_4.run(sharded_run, scenario)
    for step, (loss, grads, counts) in enumerate(expected):
        for rank in range(4):
            rank_loss, rank_grads, rank_counts = found[rank][step]
            assert relative_error(rank_loss, loss) <= tolerance
            assert torch.equal(rank_counts, counts)
            for key, grad in grads.items():
                if key in ("w13", "w2"):
                    grad = grad[2 * rank : 2 * rank + 2]
                error = relative_error(rank_grads[key], grad)
                assert error <= tolerance, f"step {step}, rank {rank}, {key}: {error:.1e}"
    first, last = expected[0][0], expected[-1][0]
    assert torch.isfinite(last) and last != first


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "dropping"])
def test_matches_the_dense_oracle(router, rng):
    """Output and all gradients on one process, in float64."""
    scenario = Scenario((0,), router=router, shared_expert_hidden=8, dtype=torch.float64)
    layer = scenario.layer()
    layer.max_tokens = None
    x = torch.randn(5, 9, 16, dtype=torch.float64, generator=rng, requires_grad=True)
    dy = torch.randn(5, 9, 16, dtype=torch.float64, generator=rng)
    y = layer(x)
    ((y * dy).sum() + layer.aux_loss).backward()

    twin = copy.deepcopy({name: p.detach() for name, p in layer.named_parameters()})
    for p in twin.values():
        p.requires_grad_()
    x_twin = x.detach().clone().requires_grad_()
    flat = x_twin.reshape(-1, 16)
    routes = torch.func.functional_call(layer.router, {"weight": twin["router.weight"]}, (flat,))
    y_twin = dense_moe(flat, routes.topk_idx, routes.topk_weight, twin["w13"], twin["w2"])
    y_twin = y_twin + swiglu(flat, twin["shared_expert.w13"], twin["shared_expert.w2"])
    ((y_twin * dy.reshape(-1, 16)).sum() + 0.1 * routes.aux_loss).backward()

    assert y.shape == x.shape
    assert relative_error(y.reshape(-1, 16), y_twin) < 1e-13
    assert relative_error(x.grad, x_twin.grad) < 1e-13
    for name, p in layer.named_parameters():
        assert relative_error(p.grad, twin[name].grad) < 1e-13, name
    if router == "dropping":
        assert 0 < layer.tokens_per_expert.sum() < 45 * 3
    assert torch.equal(layer.tokens_per_expert, routes.tokens_per_expert)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_gradcheck(router, rng):
    layer = MoELayer(
        hidden=8, expert_hidden=8, num_experts=4, topk=2, router=router, dtype=torch.float64,
        init_std=0.5, shared_expert_hidden=8, aux_loss_coefficient=1.0,
    )  # fmt: skip
    x = torch.randn(3, 8, dtype=torch.float64, generator=rng, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def outputs(x, *parameters):
        y = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return y, layer.aux_loss

    assert torch.autograd.gradcheck(outputs, (x, *layer.parameters()))


def test_checkpointing_recomputes_the_same(rng):
    layer = Scenario((12,)).layer()
    x = torch.randn(12, 16, generator=rng)
    layer(x).square().sum().backward()
    expected = gradients(layer)
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    for name, grad in gradients(layer).items():
        assert torch.equal(grad, expected[name])


def test_autocast_runs_the_experts_in_its_dtype(rng):
    layer = Scenario((12,)).layer()
    x = torch.randn(12, 16, generator=rng)
    expected = Scenario((12,)).layer()(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.square().sum().backward()
    # 1e-2: four bf16 roundings of 2e-3 each, those of both weights among them
    assert y.dtype == torch.bfloat16 and relative_error(y, expected) < 1e-2
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


def test_parameters_and_counts(rng):
    layer = MoELayer(**SIZES, shared_expert_hidden=8, dtype=torch.bfloat16)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "router.weight": (8, 16),
        "w13": (8, 48, 16),
        "w2": (8, 16, 24),
        "shared_expert.w13": (16, 16),
        "shared_expert.w2": (16, 8),
    }
    marked = {n for n, p in layer.named_parameters() if getattr(p, "expert_parallel", False)}
    assert marked == {"w13", "w2"}
    assert layer.router.weight.dtype == torch.float32 and layer.w13.dtype == torch.bfloat16
    assert MoELayer(**SIZES, router="sigmoid").state_dict()["router.bias"].shape == (8,)


def test_meta_layer_is_filled_later():
    layer = MoELayer(**SIZES, router="sigmoid", shared_expert_hidden=8, device="meta")
    layer.to_empty(device="cpu").reset_parameters(seed=5)
    assert layer.w13.expert_parallel and layer.w2.expert_parallel
    expected = MoELayer(**SIZES, router="sigmoid", shared_expert_hidden=8)
    expected.reset_parameters(seed=5)
    for name, value in expected.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    assert layer(torch.ones(2, 16)).isfinite().all()


def weights_of_rank(rank, group, scenario):
    layer = scenario.layer(group)
    return layer.state_dict(), layer.full_state_dict()


def test_initial_weights_do_not_depend_on_the_number_of_ranks(gloo_workers_2, gloo_workers_4):
    scenario = Scenario((4,), router="sigmoid", shared_expert_hidden=8)
    expected = scenario.layer().state_dict()
    assert not torch.equal(expected["w13"][0], expected["w13"][1])
    for pool in (gloo_workers_2, gloo_workers_4):
        for shard, full in pool.run(weights_of_rank, scenario):
            assert shard["w13"].shape[0] == 8 // pool.world_size
            assert full.keys() == expected.keys()
            for name in expected:
                assert torch.equal(full[name], expected[name]), name


def reload_dense(rank, group, dense, x):
    """Every way from an unsharded layer into a sharded one; their outputs, and a round trip."""
    layers = [
        MoELayer.from_dense(dense, group=group),
        MoELayer.from_dense(dense.state_dict(), group=group, topk=3, router=dense.router),
        MoELayer.from_dense(dense, group=DeviceMesh.from_group(group, "cpu"), max_tokens=40),
    ]
    resumed = MoELayer.from_dense(dense, group=group)
    resumed.reset_parameters(seed=1)
    resumed.load_state_dict(layers[0].state_dict())
    outputs = [layer(x[: 5 * rank]) for layer in (*layers, resumed)]
    limits = [layer.exchange.max_tokens for layer in layers]
    try:
        MoELayer.from_dense(layers[0], group=group)
    except ValueError as error:
        refusal = str(error)
    back = MoELayer.from_dense(layers[0].full_state_dict(), topk=3, router=dense.router)
    for layer in layers:
        layer.close()
    return [y.detach() for y in outputs], limits, back(x).detach(), refusal


def test_weights_travel_between_dense_and_sharded(gloo_workers_4, rng):
    dense = Scenario((20,), router="sigmoid", shared_expert_hidden=8).layer()
    dense.router.bias.normal_(generator=rng)
    x = torch.randn(20, 16, generator=rng)
    expected = dense(x).detach()
    dense.close()  # an open exchange of this process does not travel
    dense.aux_loss = dense.tokens_per_expert = None
    for rank, answer in enumerate(gloo_workers_4.run(reload_dense, dense, x)):
        outputs, limits, back, refusal = answer
        for y in outputs:
            assert relative_error(y, expected[: 5 * rank]) < 1e-6
        assert limits == [15, 15, 40]  # agreed at the first forward: rank 3 has most tokens
        assert relative_error(back, expected) < 1e-6
        assert "sharded over 4 ranks" in refusal and "full_state_dict" in refusal


def test_from_dense_wants_topk_and_all_experts():
    state = MoELayer(**SIZES).state_dict()
    with pytest.raises(ValueError, match="pass topk="):
        MoELayer.from_dense(state)
    state["w2"] = state["w2"][:4]
    with pytest.raises(ValueError, match="w2 holds 4 experts, this layer has 8"):
        MoELayer.from_dense(state, topk=3)


def test_layers_share_one_exchange(rng):
    with Exchange(
        hidden=16, num_experts=8, topk=3, max_tokens=20, dtype=torch.float32, device="cpu"
    ) as exchange:
        torch.manual_seed(3)
        first, second = (MoELayer(**SIZES, exchange=exchange, init_std=0.3) for _ in range(2))
        x = torch.randn(20, 16, generator=rng, requires_grad=True)
        y = second(x + first(x))
        y.square().sum().backward()
        torch.manual_seed(3)
        alone = [MoELayer(**SIZES, init_std=0.3) for _ in range(2)]
        x_alone = x.detach().clone().requires_grad_()
        y_alone = alone[1](x_alone + alone[0](x_alone))
        y_alone.square().sum().backward()
        assert torch.equal(y, y_alone) and torch.equal(x.grad, x_alone.grad)
        first.close()
        assert not exchange.closed  # it belongs to the caller
    for layer in alone:
        layer.close()


def construct_badly(rank, group):
    try:
        MoELayer(hidden=16, expert_hidden=8, num_experts=6, topk=2, group=group)
    except ValueError as error:
        message = str(error)
    total = torch.ones(1)
    dist.all_reduce(total)  # the group is still usable
    return message, total.item()


def test_experts_must_divide_over_the_ranks(gloo_workers_4):
    for message, total in gloo_workers_4.run(construct_badly):
        assert message == (
            "num_experts=6 does not divide over the group's 4 ranks: use a multiple of 4, such as 8"
        )
        assert total == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(hidden=7170), "hidden=7170 is not a positive multiple of 8: pad it to 7176"),
        (dict(expert_hidden=0), "expert_hidden=0 is not a positive multiple of 8: pad it to 8"),
        (dict(shared_expert_hidden=4), "shared_expert_hidden=4 .* pad it to 8"),
        (dict(topk=9), "topk=9 is outside 1..8: choose at most num_experts=8"),
        (dict(router="hash"), "'hash' is unknown: use 'softmax' or 'sigmoid'"),
    ],
)
def test_wrong_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoELayer(**(SIZES | arguments))


def test_wrong_group():
    with pytest.raises(TypeError, match="pass a ProcessGroup, a DeviceMesh or None"):
        MoELayer(**SIZES, group="world")


def test_wrong_exchange():
    exchange = Exchange(hidden=16, num_experts=8, topk=2, max_tokens=4, device="cpu")
    with exchange, pytest.raises(ValueError, match="exchange has topk=2, the layer 3"):
        MoELayer(**SIZES, exchange=exchange)


def test_wrong_input():
    layer = MoELayer(**SIZES)
    with pytest.raises(ValueError, match=r"shape \(4, 15\), its last dimension must be hidden=16"):
        layer(torch.zeros(4, 15))
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16, the experts are torch\.float32"):
        layer(torch.zeros(4, 16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="x is on meta, the layer on cpu: move"):
        layer(torch.zeros(4, 16, device="meta"))
    layer(torch.zeros(4, 16))
    with pytest.raises(ValueError, match="5 tokens, the exchange buffers 4: pass max_tokens=5"):
        layer(torch.zeros(5, 16))
    layer(torch.zeros(4, 16))  # and goes on


def test_num_sms_and_timeout_reach_the_exchange(monkeypatch):
    """All four calls, forward and backward, of a layer that stands alone."""
    layer, seen = MoELayer(**SIZES, num_sms=7, timeout=3.5), set()
    x = torch.randn(5, SIZES["hidden"], requires_grad=True)
    layer(x)
    assert layer.exchange.timeout == 3.5
    assert MoELayer.from_dense(layer).timeout == 3.5
    backend = layer.exchange._backend
    for name in ("send", "arrive", "leave", "fetch"):
        call = getattr(backend, name)

        def spy(*arguments, name=name, call=call):
            seen.add((name, arguments[-1]))
            return call(*arguments)

        monkeypatch.setattr(backend, name, spy)
    layer(x).sum().backward()
    assert seen == {(name, 7) for name in ("send", "arrive", "leave", "fetch")}
