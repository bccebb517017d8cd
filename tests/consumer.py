"""dualpipe_ext as a model's code uses it, for `mypy --strict`: not run, only checked.

`assert_type` holds where the package's types are more than a name: a call that returns a tensor or
a pair, and what comes out of it.
"""

from collections.abc import Iterator
from typing import assert_type

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe_ext import (
    DelayedLinear,
    DualPipeError,
    Exchange,
    ExpertPlacement,
    GroupedQueryAttention,
    LatentAttention,
    MoELayer,
    OverlappedPair,
    PeerTimeoutError,
    Pipeline,
    Plan,
    RoutedExperts,
    Router,
    Routes,
    Split,
    TransformerBlock,
    TransformerStage,
    delay_linears,
    load_optimizer_state_dict,
    measure_placement,
    optimizer_state_dict,
    rebalance_experts,
    record_trace,
    tune_split,
)
from dualpipe_ext.integrations.torch_pipelining import PipelinedStage
from dualpipe_ext.pipeline.schedule import build_schedule
from dualpipe_ext.pipeline.simulate import Times, simulate
from dualpipe_ext.trace.report import measure_overlap, read_trace

HIDDEN, EXPERTS, TOPK, TOKENS = 64, 8, 2, 128


class NoisyRouter(Router):
    """A choice of one's own."""

    @torch.no_grad()
    def select(self, scores: Tensor) -> Tensor:
        return super().select(scores + 0.01 * torch.rand_like(scores))


class Experts(nn.Module):
    """An experts' MLP of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = DelayedLinear(HIDDEN, HIDDEN)

    def forward(self, rows: Tensor, row_weight: Tensor, expert_offsets: Tensor) -> Tensor:
        y: Tensor = self.up(rows)
        return y * row_weight[:, None]


def make_layer(group: dist.ProcessGroup | None) -> MoELayer:
    router = NoisyRouter(HIDDEN, EXPERTS, TOPK, kind="sigmoid", n_groups=2, topk_groups=1)
    layer = MoELayer(
        hidden=HIDDEN,
        expert_hidden=2 * HIDDEN,
        num_experts=EXPERTS,
        topk=TOPK,
        group=group,
        router=router,
        comm_sms=0.1,
        dtype=torch.bfloat16,
    )
    routes: Routes = router.forward(torch.randn(TOKENS, HIDDEN))
    router.update_bias(routes.tokens_per_expert)
    assert_type(routes.topk_idx, Tensor)
    assert_type(layer.aux_loss, Tensor | None)
    dense: MoELayer = MoELayer.from_dense(layer.full_state_dict(), group=group, topk=TOPK)
    dense.close()
    return layer


def exchange_rows(exchange: Exchange, x: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
    plan: Plan = exchange.plan(topk_idx)
    assert_type(exchange.dispatch(x, plan), Tensor)
    rows, row_weight = exchange.dispatch(x, plan, topk_weight=topk_weight, payload="fp8")
    assert_type(row_weight, Tensor)
    y, weights = exchange.combine(rows, plan, row_weight=row_weight)
    assert_type(weights, Tensor)

    sent = exchange.send(x, plan, topk_weight=topk_weight, channel="backward")
    assert_type(exchange.arrive(sent, plan), tuple[Tensor, Tensor])
    with exchange.send(x, plan) as arrival:
        assert_type(exchange.arrive(arrival, plan, num_sms=8), Tensor)
    departure = exchange.leave(rows, plan, row_weight=row_weight)
    assert_type(exchange.fetch(departure, plan), tuple[Tensor, Tensor])
    assert_type(exchange.fetch(exchange.leave(rows, plan), plan), Tensor)
    assert_type(exchange.combine(rows, plan), Tensor)
    return y


def place_experts(layer: MoELayer, optimizer: torch.optim.Optimizer, num_ranks: int) -> float:
    loads = layer.expert_load()[None]
    slots, _, count = rebalance_experts(loads, layer.num_slots, 1, 1, num_ranks, policy="improved")
    placement = ExpertPlacement(slots[0], num_ranks=num_ranks)
    assert placement != ExpertPlacement([0, 2, 1, 3], num_ranks=2)
    layer.rebalance(placement, optimizer=optimizer)
    layer.sync_replica_gradients()
    report = measure_placement(loads, slots, num_ranks)
    saved: dict[str, object] = optimizer_state_dict(layer, optimizer)
    load_optimizer_state_dict(layer, optimizer, saved)
    assert_type(count, Tensor)
    return float(report.heaviest.max())


def make_stage(layer: MoELayer, exchange: Exchange) -> TransformerStage:
    attention = GroupedQueryAttention(HIDDEN, heads=4, kv_heads=2, dtype=torch.bfloat16)
    latent = LatentAttention(HIDDEN, heads=4, kv_rank=32, head_width=16, rope_width=16)
    routed = RoutedExperts(Router(HIDDEN, EXPERTS, TOPK), Experts(), exchange)
    dense = delay_linears(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.SiLU()))
    blocks = [
        TransformerBlock(HIDDEN, attention, layer, recompute=("attention",)),
        TransformerBlock(HIDDEN, latent, routed),
        TransformerBlock(HIDDEN, nn.Identity(), dense),
    ]
    return TransformerStage(blocks, last=nn.Linear(HIDDEN, 10), aux_loss_scale=0.5)


def loss_function(y: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(y, target)


def run_pair(stage: TransformerStage, batches: Iterator[Tensor]) -> OverlappedPair:
    pair = OverlappedPair("cuda", comm_sms=16, weight_delay="experts")
    chunk = stage.start_chunk(next(batches), criterion=loss_function, labels=[next(batches)])
    chunk.forward()
    outputs, gradients = pair.run(stage.start_chunk(next(batches)), chunk)
    assert_type(outputs, tuple[Tensor, ...])
    assert_type(gradients, tuple[Tensor | None, ...])
    splits: list[Split] = tune_split(
        pair, lambda: pair.run(stage.start_chunk(next(batches)), chunk), comm_sms=(8, 0.1, None)
    )
    print(splits[0], PipelinedStage(stage, pair=pair).stage)
    return pair


def train(stages: list[TransformerStage], x: Tensor, target: Tensor) -> float:
    pipeline = Pipeline(stages, schedule="dualpipev", timeout=60)
    simulated = simulate(build_schedule("dualpipev", 4, 16), Times(f=1, b=2.5))
    try:
        with record_trace("trace.json.gz"):
            result = pipeline.step(x, num_chunks=8, criterion=loss_function, labels=[target])
    except PeerTimeoutError as error:
        raise SystemExit(f"rank {error.peer} is gone") from error
    except DualPipeError:
        pipeline.close()
        raise
    hidden: float | None = measure_overlap(read_trace("trace.json.gz")).total.hidden_share
    print(hidden, float(simulated.makespan), result.outputs)
    assert_type(result.losses, Tensor | None)
    return 0.0 if result.losses is None else float(result.losses.mean())
