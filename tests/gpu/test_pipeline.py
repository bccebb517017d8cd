"""The pipeline on NCCL, bf16 blocks: bit for bit the whole model run chunk by chunk on one rank."""

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext.pipeline import Pipeline
from dualpipe_ext.schedule import build_schedule
from tests.gpu.test_overlap import HIDDEN, LENGTH, build_stage, random_inputs
from tests.test_pipeline_experts import split_groups

STEPS = 3


def mean_loss(y, labels):
    return (y.float() - labels.float()).square().mean()


def sequential(stages, inputs, labels):
    losses = []
    for x, label in zip(inputs, labels, strict=True):
        chunks = []
        for i, stage in enumerate(stages):
            last = i + 1 == len(stages)
            options = {"criterion": mean_loss, "labels": (label,)} if last else {}
            chunks.append(stage.start_chunk(x, **options))
            (x,) = chunks[-1].forward()
        losses.append(chunks[-1].loss)
        gradients = ()
        for chunk in reversed(chunks):
            gradients = chunk.backward_input(gradients)
            chunk.backward_weight()
    return torch.stack(losses)


def check_pipeline(rank, _, kind, pipeline_ranks, chunks, depth, modes):
    torch.use_deterministic_algorithms(True, warn_only=True)
    pipeline_group, expert_group, pp, part = split_groups(rank, pipeline_ranks)
    across = dist.get_world_size() // pipeline_ranks
    device = torch.device("cuda", rank)
    schedule = build_schedule(kind, pipeline_ranks, chunks)
    group = expert_group if across > 1 else None
    stages = [build_stage(depth, group, device, s) for s in range(schedule.num_stages)]
    inputs, labels = (random_inputs(chunks, device, seed + 10 * part) for seed in (1, 2))
    expected = sequential(stages, inputs, labels)
    gradients = [[p.grad.clone() for p in stage.parameters()] for stage in stages]
    mine = schedule.stages_of(pp)
    modules = [stages[s] for s in mine]
    pipeline = Pipeline(modules, schedule=kind, group=pipeline_group, **modes)
    half = chunks // schedule.num_directions
    for _ in range(STEPS):
        for module in modules:
            module.zero_grad()
        passed, options = (), {"num_chunks": chunks}
        for direction in range(schedule.num_directions):
            part_of = slice(direction * half, (direction + 1) * half)
            if schedule.rank_of(0, direction) == pp:
                passed = (inputs[part_of].reshape(-1, LENGTH, HIDDEN),)
            if schedule.rank_of(schedule.num_stages - 1, direction) == pp:
                label = labels[part_of].reshape(-1, LENGTH, HIDDEN)
                options |= {"criterion": mean_loss, "labels": (label,)}
                wanted = expected[part_of]
        losses = pipeline.step(*passed, **options).losses
        assert losses is None or torch.equal(losses, wanted)
        for stage, module in zip(mine, modules, strict=True):
            for p, gradient in zip(module.parameters(), gradients[stage], strict=True):
                if kind == "dualpipe":  # two partial sums, each rounded to bf16, instead of one
                    error = (p.grad - gradient).float().norm() / gradient.float().norm()
                    assert error < 1e-2
                else:
                    assert torch.equal(p.grad, gradient), (kind, stage)
    pipeline.close()
    for stage in stages:
        for block in stage.blocks:
            block.feed_forward.close()


@pytest.mark.gpu_2
@pytest.mark.parametrize("kind", ["dualpipev", "zbv", "1f1b", "zb1p", "dualpipe"])
def test_two_pipeline_ranks(kind, gpu_workers_2):
    modes = {"num_sms": 116, "comm_sms": 8}
    gpu_workers_2.run(check_pipeline, kind, 2, 6, 1, modes, timeout=300)


@pytest.mark.gpu_4
@pytest.mark.parametrize("kind", ["dualpipev", "dualpipe"])
@pytest.mark.parametrize("pipeline_ranks", [2, 4])
def test_four_gpus(kind, pipeline_ranks, gpu_workers_4):
    modes = {"num_sms": 116, "comm_sms": 8, "weight_delay": "all"}
    gpu_workers_4.run(check_pipeline, kind, pipeline_ranks, 8, 1, modes, timeout=300)
