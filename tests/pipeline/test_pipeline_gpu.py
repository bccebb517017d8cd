"""The pipeline on GPUs: bf16 blocks bit for bit the whole model run chunk by chunk on one rank.

And its links: a process that begins with a pipeline, shapes that change, ranks that do not come.
"""

import copy
import os
import pickle
import signal
import time
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext import PeerTimeoutError
from dualpipe_ext.errors import DualPipeError
from dualpipe_ext.pipeline.links import Links
from dualpipe_ext.pipeline.pipeline import Pipeline
from dualpipe_ext.pipeline.schedule import build_schedule
from tests.blocks.test_pair_gpu import HIDDEN, LENGTH, build_stage, random_inputs
from tests.pipeline.test_experts import split_groups
from tests.pipeline.test_pipeline import Case, Residual, part_of
from tests.support.compare import relative_error
from tests.support.small_transformer import gradients
from tests.support.workers import WorkerDiedError, WorkerPool

STEPS = 3
WAYS = ["host", "copy engines", "copy engines"]


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
        dy = ()
        for chunk in reversed(chunks):
            dy = chunk.backward_input(dy)
            chunk.backward_weight()
    return torch.stack(losses)


def check_pipeline(rank, _, kind, pipeline_ranks, chunks, depth, modes, ways_expected=WAYS):
    """The pipeline goes first: in a new process all its kernels are new."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    pipeline_group, expert_group, pp, part = split_groups(rank, pipeline_ranks)
    across = dist.get_world_size() // pipeline_ranks
    device = torch.device("cuda", rank)
    schedule = build_schedule(kind, pipeline_ranks, chunks)
    group = expert_group if across > 1 else None
    stages = [build_stage(depth, group, device, s) for s in range(schedule.num_stages)]
    inputs, labels = (random_inputs(chunks, device, seed + 10 * part) for seed in (1, 2))
    mine = schedule.stages_of(pp)
    modules = [stages[s] for s in mine]
    pipeline = Pipeline(modules, schedule=kind, group=pipeline_group, **modes)
    half, wanted = chunks // schedule.num_directions, None
    found, ways = [], []
    for _ in range(STEPS):
        for module in modules:
            module.zero_grad()
        passed, options = (), {"num_chunks": chunks}
        for direction in range(schedule.num_directions):
            part_of_batch = slice(direction * half, (direction + 1) * half)
            if schedule.rank_of(0, direction) == pp:
                passed = (inputs[part_of_batch].reshape(-1, LENGTH, HIDDEN),)
            if schedule.rank_of(schedule.num_stages - 1, direction) == pp:
                label = labels[part_of_batch].reshape(-1, LENGTH, HIDDEN)
                options |= {"criterion": mean_loss, "labels": (label,)}
                wanted = part_of_batch
        losses = pipeline.step(*passed, **options).losses
        ways.append(pipeline.links.current.name)
        found.append(
            (losses, [[p.grad.clone() for p in module.parameters()] for module in modules])
        )
    torch.cuda.synchronize()
    pipeline.check()
    pipeline.close()
    for stage in stages:
        stage.zero_grad()
    expected = sequential(stages, inputs, labels)
    assert ways == ways_expected, pipeline.links.reason
    for losses, grads in found:
        assert losses is None or torch.equal(losses, expected[wanted])
        for stage, ours in zip(mine, grads, strict=True):
            for p, gradient in zip(stages[stage].parameters(), ours, strict=True):
                if kind == "dualpipe":  # two partial sums, each rounded to bf16, instead of one
                    assert relative_error(gradient, p.grad) < 1e-2
                else:
                    assert torch.equal(gradient, p.grad), (kind, stage)
    for stage in stages:
        for block in stage.blocks:
            block.feed_forward.close()


MODES = {"num_sms": 116, "comm_sms": 8}


@pytest.mark.gpu_2
@pytest.mark.parametrize("kind", ["dualpipe", "dualpipev"])
def test_cold_start(kind):
    """Kernels are loaded while others run, which must then not wait for a rank."""
    with WorkerPool(2, "nccl") as pool:
        pool.run(check_pipeline, kind, 2, 6, 1, MODES, timeout=45)


def check_nccl_links(rank, _, *args):
    """As where GPUs do not reach each other's memory."""
    with mock.patch.object(Links, "_find_obstacle", lambda self: "no peer memory"):
        check_pipeline(rank, _, *args, ["host", "nccl", "nccl"])


@pytest.mark.gpu_2
@pytest.mark.parametrize("kind", ["dualpipe", "dualpipev"])
def test_links_by_nccl(kind):
    with WorkerPool(2, "nccl") as pool:
        pool.run(check_nccl_links, kind, 2, 6, 1, MODES, timeout=60)


@pytest.mark.gpu_2
@pytest.mark.parametrize("kind", ["dualpipev", "zbv", "1f1b", "zb1p", "dualpipe"])
def test_two_pipeline_ranks(kind, gpu_workers_2):
    gpu_workers_2.run(check_pipeline, kind, 2, 6, 1, MODES, timeout=300)


@pytest.mark.gpu_4
@pytest.mark.parametrize("kind", ["dualpipev", "dualpipe"])
@pytest.mark.parametrize("pipeline_ranks", [2, 4])
def test_four_gpus(kind, pipeline_ranks, gpu_workers_4):
    modes = {"comm_sms": 8, "weight_delay": "all"}  # GEMMs draw their tiles
    gpu_workers_4.run(check_pipeline, kind, pipeline_ranks, 8, 1, modes, timeout=300)


@dataclass(frozen=True)
class OnGpu(Case):
    """The plain stages of the CPU's tests, with chunks of 2 * `times` rows."""

    times: int = 1

    def batch(self, seed=0):
        inputs, labels, criterion = super().batch(seed)
        inputs = tuple(x.repeat(self.times, 1).cuda() for x in inputs)
        return inputs, labels.repeat(self.times, 1).cuda(), criterion


def change_shapes(rank, group, kind):
    """What each step went through, and how far its losses and gradients are from a whole run's."""
    schedule = build_schedule(kind, 2, 4)
    stages = [stage.cuda() for stage in OnGpu(kind, 4, "many").build(schedule.num_stages)]
    mine = schedule.stages_of(rank)
    modules = [copy.deepcopy(stages[s]) for s in mine]
    pipeline = Pipeline(modules, schedule=kind, group=group, timeout=20.0)
    found = []
    for times, grad in (
        *((1, True), (1, False), (3000, True), (3000, True)),
        *((3000, False), (3000, True), (1, True), (1, True)),
    ):
        case = OnGpu(kind, 4, "many", times=times)
        passed, options = part_of(case, schedule, rank)
        for module in (*modules, *stages):
            module.zero_grad()
        with torch.set_grad_enabled(grad):
            losses = pipeline.step(*passed, **options).losses
            inputs, labels, criterion = case.batch()
            y = inputs
            for stage in stages:
                y = stage(*y)
            loss = criterion(*y, labels)
            if grad:
                loss.backward()
        if kind == "dualpipe":  # the losses of half of the chunks are here, the others there
            losses = losses.sum()
            dist.all_reduce(losses, group=group)
        errors = [] if losses is None else [relative_error(losses.sum(), loss)]
        for s, module in zip(mine, modules, strict=True):
            for name, gradient in gradients(module).items():  # zeros after forwards only
                errors.append(relative_error(gradient, gradients(stages[s])[name]))
        found.append((pipeline.links.current.name, max(errors, default=0)))
    torch.cuda.synchronize()
    pipeline.check()
    pipeline.close()
    return found


@pytest.mark.gpu_2
@pytest.mark.parametrize("kind", ["dualpipe", "zbv", "1f1b"])
def test_other_shapes_and_forwards_only(kind, gpu_workers_2):
    """Room grows for the larger ones, and stays for the smaller."""
    for found in gpu_workers_2.run(change_shapes, kind, timeout=120):
        ways = ["host" if step in (0, 2) else "copy engines" for step in range(8)]
        assert [way for way, _ in found] == ways
        assert max(error for _, error in found) < 1e-4


class Late(Residual):
    """Calls `trouble` in front of its forward number `when`."""

    count, when, trouble = 0, None, None

    def forward(self, x):
        self.count += 1
        if self.count == self.when:
            self.trouble()
        return super().forward(x)


def prepare(rank, group, timeout, trouble):
    """A pipeline of two ranks after three steps; in the next, rank 1 has its `trouble`."""
    case = OnGpu("dualpipev", 4, times=100)
    schedule = build_schedule(case.kind, 2, case.chunks)
    torch.manual_seed(0)
    stages = [Late(1).cuda() for _ in range(schedule.num_stages)]
    modules = [stages[s] for s in schedule.stages_of(rank)]
    passed, options = part_of(case, schedule, rank)
    for limit in (60.0, timeout):  # the first loads all kernels
        pipeline = Pipeline(modules, schedule=case.kind, group=group, timeout=limit)
        for _ in range(3):
            pipeline.step(*passed, **options)
        torch.cuda.synchronize()
        pipeline.check()
        if limit == 60.0:
            pipeline.close()
    assert pipeline.links.current.name == "copy engines"
    if rank == 1:
        modules[0].trouble, modules[0].when = trouble, modules[0].count + 3
    return pipeline, lambda: pipeline.step(*passed, **options)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def survive(rank, group, file):
    pipeline, step = prepare(rank, group, 1.5, die)
    start, text = time.monotonic(), "no error"
    try:
        step()
        torch.cuda.synchronize()
        pipeline.check()
    except DualPipeError as error:
        text = str(error)
    pipeline.close()
    file.write_bytes(pickle.dumps((text, time.monotonic() - start)))


@pytest.mark.gpu_2
def test_dead_rank(tmp_path):
    file = tmp_path / "rank0"
    with WorkerPool(2, "nccl") as pool, pytest.raises(WorkerDiedError):
        pool.run(survive, file, timeout=60)
    text, seconds = pickle.loads(file.read_bytes())
    assert "ranks [1] of the group did not finish the step" in text or "for rank 1" in text
    assert seconds < 2 * 1.5 + 1


def sleep():
    torch.cuda._sleep(8_000_000_000)  # 4 s at 2 GHz


def outlast(rank, group):
    """The errors of a step, of `check` after it, and of the next step."""
    pipeline, step = prepare(rank, group, 1.0, sleep)
    errors = []
    for call in (step, lambda: (torch.cuda.synchronize(), pipeline.check()), step):
        try:
            call()
            errors.append(None)
        except DualPipeError as error:
            errors.append(error)
    start = time.monotonic()
    pipeline.close()
    return errors, time.monotonic() - start


@pytest.mark.gpu_2
def test_gpu_that_comes_too_late():
    """The hosts agree on the end of the step before the GPU gives up."""
    with WorkerPool(2, "nccl") as pool:
        results = pool.run(outlast, timeout=60)
    (_, later, _), _ = results[0]
    assert isinstance(later, PeerTimeoutError)
    assert (later.rank, later.peer, later.timeout) == (0, 1, 1.0)
    assert later.seen < later.expected
    assert "rank 1 to 0" in later.channel
    for errors, closing in results:
        assert isinstance(errors[-1], DualPipeError)
        assert closing < 5
