"""Pipelines of transformer blocks, with expert groups across them."""

import time
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dualpipe_ext.gradients.delayed import delay_linears
from dualpipe_ext.pipeline.pipeline import Pipeline
from dualpipe_ext.pipeline.schedule import build_schedule
from tests.support import small_transformer as small
from tests.support.compare import relative_error
from tests.support.workers import PATIENCE, SLACK

CHUNK, LENGTH, BLOCKS = 2, 4, 3  # three blocks: stages of different depth, and one without


@dataclass(frozen=True)
class Case:
    kind: str
    chunks: int = 4
    weight_delay: str = "all"
    dtype: torch.dtype = torch.float32
    recompute: tuple = ()
    plain: bool = False  # blocks whose attention segments need no autograd

    def build(self, num_stages, group=None):
        """The stages; the same model whatever the group, because experts draw by their number."""
        torch.manual_seed(5)
        cuts = [s * BLOCKS // num_stages for s in range(num_stages + 1)]
        return [
            small.stage(
                [self._block(group) for _ in range(cuts[s], cuts[s + 1])],
                first=s == 0,
                last=s + 1 == num_stages,
            ).to(self.dtype)
            for s in range(num_stages)
        ]

    def _block(self, group):
        if self.plain:
            return small.block("plain", group=group, router=small.fused_router())
        return small.block(group=group, shared_expert_hidden=8, recompute=self.recompute)

    def batch(self, part):
        """Inputs and labels of data-parallel part `part`."""
        shape = (self.chunks * CHUNK, LENGTH)
        return small.words(*shape, seed=part), small.words(*shape, seed=100 + part)


def sequential(case, num_stages, parts):
    """Losses by part, and gradients by stage summed over the parts, balance losses included."""
    stages = case.build(num_stages)
    losses = []
    for part in range(parts):
        for words, labels in zip(*(x.split(CHUNK) for x in case.batch(part)), strict=True):
            y = words
            for stage in stages:
                y = stage(y)
            loss = small.word_loss(y, labels)
            losses.append(loss.detach())
            (loss + sum(stage.aux_loss() for stage in stages)).backward()
    return torch.stack(losses).view(parts, -1), [small.gradients(stage) for stage in stages]


def pass_to(schedule, rank, words, labels):
    """What a pipeline rank passes to `step`."""
    half = len(words) // schedule.num_directions
    passed, options = (), {"num_chunks": schedule.num_chunks}
    for direction in range(schedule.num_directions):
        mine = slice(direction * half, (direction + 1) * half)
        if schedule.rank_of(0, direction) == rank:
            passed = (words[mine],)
        if schedule.rank_of(schedule.num_stages - 1, direction) == rank:
            options |= {"criterion": small.word_loss, "labels": (labels[mine],)}
    return passed, options


def split_groups(rank, pipeline_ranks):
    """(pipeline group, group across, pipeline rank, rank across) for ranks laid out [pp, other]."""
    size = dist.get_world_size()
    across = size // pipeline_ranks
    pipelines = [list(range(i, size, across)) for i in range(across)]
    others = [list(range(p * across, (p + 1) * across)) for p in range(pipeline_ranks)]
    groups = [dist.new_group(ranks) for ranks in (*pipelines, *others)]
    return groups[rank % across], groups[across + rank // across], rank // across, rank % across


def experts_across(rank, _, cases, pipeline_ranks):
    pipeline_group, expert_group, pp, part = split_groups(rank, pipeline_ranks)
    results = []
    for case in cases:
        schedule = build_schedule(case.kind, pipeline_ranks, case.chunks)
        stages = case.build(schedule.num_stages, expert_group)
        mine = schedule.stages_of(pp)
        modules = [stages[stage] for stage in mine]
        pipeline = Pipeline(
            *(modules,),
            schedule=case.kind,
            group=pipeline_group,
            timeout=60,
            weight_delay=case.weight_delay,
        )
        passed, options = pass_to(schedule, pp, *case.batch(part))
        losses = pipeline.step(*passed, **options).losses
        gradients = []
        for stage, module in zip(mine, modules, strict=True):
            for p in module.parameters():
                if not getattr(p, "expert_parallel", False):
                    dist.all_reduce(p.grad, group=expert_group)
            gradients.append((stage, small.gradients(module)))
        results.append((losses, gradients))
    return results


def check(case, results, pipeline_ranks):
    """`results` by global rank; expert gradients are shards along their first dimension."""
    schedule = build_schedule(case.kind, pipeline_ranks, case.chunks)
    across = len(results) // pipeline_ranks
    losses, expected = sequential(case, schedule.num_stages, across)
    tolerance = 1e-6 if case.dtype == torch.float32 else 1e-12
    for part in range(across):
        found = [
            results[schedule.rank_of(schedule.num_stages - 1, d) * across + part][0]
            for d in range(schedule.num_directions)
        ]
        assert relative_error(torch.cat(found), losses[part]) <= tolerance
    for rank, (_, stages) in enumerate(results):
        for stage, gradients in stages:
            wanted = {}
            for name, gradient in expected[stage].items():
                share = gradient.shape[0] // across
                shard = slice(rank % across * share, (rank % across + 1) * share)
                sharded = gradients[name].shape != gradient.shape
                wanted[name] = gradient[shard] if sharded else gradient
            if case.dtype == torch.float64:
                for name, gradient in wanted.items():
                    assert relative_error(gradients[name], gradient) <= tolerance, (case, name)
            # In fp32 the gradients of single norms are sums that cancel: all of a stage together.
            flat = [
                torch.cat([torch.zeros(0), *(g[name].flatten() for name in wanted)])
                for g in (gradients, wanted)
            ]
            assert relative_error(*flat) <= tolerance, (case, stage)


@pytest.mark.parametrize("kind", ["1f1b", "zb1p", "zbv", "dualpipev"])
def test_one_rank(kind):
    for dtype in (torch.float32, torch.float64):
        case = Case(kind, 3, dtype=dtype)
        schedule = build_schedule(kind, 1, case.chunks)
        modules = case.build(schedule.num_stages)
        pipeline = Pipeline(modules, schedule=kind)
        passed, options = pass_to(schedule, 0, *case.batch(0))
        losses = pipeline.step(*passed, **options).losses
        check(case, [(losses, list(enumerate(map(small.gradients, modules))))], 1)


CASES = [
    Case("dualpipev", 5),
    Case("dualpipev", 5, "experts"),
    Case("dualpipev", 4, "off"),
    Case("dualpipe", 4),
    Case("zbv", 3, dtype=torch.float64),
    Case("1f1b", 3),
    Case("dualpipev", 6, dtype=torch.float64, recompute=("attention", "mlp")),
    Case("dualpipe", 6, dtype=torch.float64),
    Case("dualpipev", 4, plain=True),
    Case("dualpipe", 4, "experts", plain=True),
]


def test_two_pipeline_ranks_by_two_expert_ranks(gloo_workers_4):
    results = gloo_workers_4.run(experts_across, CASES, 2)
    for i, case in enumerate(CASES):
        check(case, [result[i] for result in results], 2)


def test_four_pipeline_ranks(gloo_workers_4):
    cases = [Case("dualpipev", 8), Case("dualpipe", 10)]
    results = gloo_workers_4.run(experts_across, cases, 4)
    for i, case in enumerate(cases):
        check(case, [result[i] for result in results], 4)


def columns_of_their_own(rank, _):
    """Losses and gradients where the second column's sequences are shorter, then all longer."""
    pipeline_group, expert_group, pp, part = split_groups(rank, 2)
    case = Case("dualpipev", 4)
    schedule = build_schedule(case.kind, 2, case.chunks)
    stages = case.build(schedule.num_stages, expert_group)
    modules = [stages[stage] for stage in schedule.stages_of(pp)]
    pipeline = Pipeline(modules, group=pipeline_group, timeout=60)
    losses = []
    for length in (LENGTH - 3 * part, LENGTH, LENGTH - 3 * part):
        words, labels = (x[:, :length] for x in case.batch(part))
        passed, options = pass_to(schedule, pp, words, labels)
        losses.append(pipeline.step(*passed, **options).losses)
    return losses, [(s, small.gradients(stages[s])) for s in schedule.stages_of(pp)]


def test_columns_of_different_shapes(gloo_workers_4):
    """Also shapes that come back, and columns of which one learns shapes and the other knows."""
    case = Case("dualpipev", 4)
    results = gloo_workers_4.run(columns_of_their_own)
    losses, expected = sequential(case, 4, 2)
    for part in (0, 1):
        found = results[part][0]
        assert relative_error(found[1], losses[part]) <= 1e-6
        assert torch.equal(found[0], found[2])
    assert torch.equal(results[0][0][0], results[0][0][1])
    assert relative_error(results[1][0][0], losses[1]) > 1e-3
    for rank, (_, stages) in enumerate(results):
        assert [stage for stage, _ in stages] == ([0, 3] if rank < 2 else [1, 2])
        for stage, gradients in stages:
            assert gradients.keys() == expected[stage].keys()
            assert all(gradient.isfinite().all() for gradient in gradients.values())


class Broken(torch.nn.Module):
    def forward(self, x):
        raise ArithmeticError("a broken end")


def fail_in_one_column(rank, _, steps):
    """The error of rank 1 of the first column, or of what came of it, and the seconds until it."""
    dist.barrier()
    size, limit = dist.get_world_size(), timedelta(seconds=PATIENCE)
    groups = [dist.new_group(ranks, timeout=limit) for ranks in ((0, 1), (2, 3), (0, 2), (1, 3))]
    (pp, part), case = divmod(rank, size // 2), Case("dualpipev", 4)
    schedule = build_schedule(case.kind, 2, case.chunks)
    stages = case.build(schedule.num_stages, groups[pp])
    modules = [stages[stage] for stage in schedule.stages_of(pp)]
    pipeline = Pipeline(modules, group=groups[2 + part], timeout=PATIENCE)
    passed, options = pass_to(schedule, pp, *case.batch(part))
    for _ in range(steps):
        pipeline.step(*passed, **options)
    if rank == 2:
        modules[0].last = Broken()
    start = time.monotonic()
    try:
        pipeline.step(*passed, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "nothing", 0.0


@pytest.mark.parametrize("steps", [0, 1])
def test_a_failure_in_one_column_ends_all(steps, gloo_workers_4):
    """In its own column with its text, in the other within the limits of the groups."""
    results = gloo_workers_4.run(fail_in_one_column, steps, timeout=60)
    texts = [text for text, _ in results]
    assert texts[2] == "ArithmeticError: a broken end"
    assert texts[1] != "nothing" and texts[3] != "nothing", texts
    assert texts[0] != "nothing", texts
    assert max(waited for _, waited in results) < 3 * PATIENCE + SLACK, results


def wrapped_case(kind, plain):
    return Case(kind, 4, plain=True) if plain else Case(kind, 4, dtype=torch.float64)


def wrapped(rank, _, kind, wrapper):
    """Gradients of this rank's stages after two steps, two pipeline by two data-parallel ranks."""
    pipeline_group, data_group, pp, part = split_groups(rank, 2)
    wrapper, _, plain = wrapper.partition(", ")
    case = wrapped_case(kind, plain)
    schedule = build_schedule(kind, 2, case.chunks)
    stages = [delay_linears(stage) for stage in case.build(schedule.num_stages)]
    mine = schedule.stages_of(pp)
    if wrapper == "ddp":
        modules = [DistributedDataParallel(stages[s], process_group=data_group) for s in mine]
    else:
        mesh = DeviceMesh.from_group(data_group, "cpu")
        modules = [stages[s] for s in mine]
        for module in modules:
            for block in () if plain else module.blocks:
                fully_shard(block.attention, mesh=mesh)
            fully_shard(module, mesh=mesh)
    pipeline = Pipeline(modules, schedule=kind, group=pipeline_group, timeout=60)
    passed, options = pass_to(schedule, pp, *case.batch(part))
    with torch.no_grad():
        pipeline.step(*passed, **options)
    for last in (False, True):
        pipeline.step(*passed, **options, sync_gradients=last)
    found = []
    for stage, module in zip(mine, modules, strict=True):
        gradients = {}
        for name, p in module.named_parameters():
            full = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            gradients[name.removeprefix("module.")] = full.clone()
        found.append((stage, gradients))
    return found


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "ddp, plain", "fsdp, plain"])
@pytest.mark.parametrize("kind", ["dualpipev", "dualpipe"])
def test_data_parallel_wrappers_reduce_once(kind, wrapper, gloo_workers_4):
    """Two equal steps add up and two ranks are averaged: in the end the sum over both ranks."""
    results = gloo_workers_4.run(wrapped, kind, wrapper)
    case = wrapped_case(kind, "plain" in wrapper)
    tolerance = 1e-12 if case.dtype == torch.float64 else 1e-6
    num_stages = build_schedule(kind, 2, case.chunks).num_stages
    _, expected = sequential(case, num_stages, 2)
    for stages in results:
        for stage, gradients in stages:
            assert gradients.keys() == expected[stage].keys()
            for name, gradient in expected[stage].items():
                assert relative_error(gradients[name], gradient) <= tolerance, (stage, name)
