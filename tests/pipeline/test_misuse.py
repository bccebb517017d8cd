"""What ranks see of wrong calls, late and dead ranks: the same clear error, soon, and on all."""

import os
import pickle
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe_ext.pipeline.failure import Failure
from dualpipe_ext.pipeline.links import GroupLinks
from dualpipe_ext.pipeline.pipeline import Pipeline
from dualpipe_ext.pipeline.schedule import build_schedule
from dualpipe_ext.pipeline.transfers import Transfers
from dualpipe_ext.ranks.agreement import Agreement
from tests.pipeline.test_links import as_on_gpus
from tests.pipeline.test_pipeline import WIDTH, Case, Residual, check, part_of, square_loss
from tests.support.compare import relative_error
from tests.support.workers import PATIENCE, SLACK, WorkerDiedError, WorkerPool


def chain(rank, group, stage=None, **options):
    """Two ranks of 1f1b."""
    stage = Residual(1) if stage is None else stage
    return Pipeline(stage, schedule="1f1b", group=group, **{"timeout": 30.0, **options})


def batch(rank, size=8):
    """Arguments and options of a step of `chain`."""
    if rank == 0:
        return (torch.linspace(-1, 1, size * WIDTH).view(size, WIDTH),), {"num_chunks": 4}
    options = {"criterion": square_loss, "labels": [torch.ones(size, WIDTH)]}
    return (), {"num_chunks": 4, **options}


def attempt(call, *args, **options):
    """(error's type and text, seconds)."""
    start = time.monotonic()
    try:
        call(*args, **options)
        text = "nothing"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    return text, time.monotonic() - start


WRONG_CALLS = {  # rank that calls wrongly, what it changes in the options, the text
    "dimension": (0, {"batch_dim": 2}, "no dimension 2"),
    "one tensor of labels": (1, {"labels": torch.ones(8, WIDTH)}, "labels=[tensor]"),
    "labels that are none": (1, {"labels": ["one", "two"]}, "is a str: pass tensors"),
    "labels that do not cut": (1, {"labels": [torch.ones(9, WIDTH)]}, "equal chunks"),
    "labels in the wrong place": (0, {"labels": [torch.ones(8, WIDTH)]}, "labels on rank 0"),
    "no criterion": (1, {"criterion": None}, "criterion=None on rank 1"),
    "labels that do not fit": (1, {"labels": [torch.ones(8, WIDTH + 1)]}, "must match the size"),
    "a loss of several numbers": (1, {"criterion": torch.sub}, "a loss is one number"),
    "fraction of a chunk": (1, {"num_chunks": 4.5}, "num_chunks=4.5"),
    "no chunks": (0, {"num_chunks": 0}, "num_chunks=0"),
}


def call_wrongly(rank, group):
    """Of each wrong call the error, and whether a right one works next."""
    pipeline, found = chain(rank, group), {}
    for name, (wrong, change, _) in WRONG_CALLS.items():
        inputs, options = batch(rank)
        failed = attempt(pipeline.step, *inputs, **options | (change if rank == wrong else {}))
        found[name] = (*failed, attempt(pipeline.step, *inputs, **options)[0])
    return found


def test_every_rank_hears_of_a_wrong_call(gloo_workers_2):
    for found in gloo_workers_2.run(call_wrongly, timeout=60):
        for name, (_, _, expected) in WRONG_CALLS.items():
            text, waited, after = found[name]
            assert expected in text and after == "nothing", (name, text, after)
            assert waited < 10


def open_wrongly(rank, group):
    found = []
    for timeout in (0, float("inf"), float("nan"), "soon"):
        found.append(attempt(chain, rank, group, timeout=timeout if rank == 0 else 30.0))
    modules = [Residual(1), Residual(1)]
    few = Pipeline(modules, schedule="dualpipev", group=group, timeout=30.0)
    x = torch.ones(6, WIDTH)
    options = {"criterion": square_loss, "labels": [x]} if rank == 0 else {}
    found.append(attempt(few.step, *([x] if rank == 0 else []), num_chunks=3, **options))
    return found


def test_every_rank_hears_of_a_wrong_limit_and_of_too_few_chunks(gloo_workers_2):
    for *limits, few in gloo_workers_2.run(open_wrongly, timeout=60):
        for text, waited in limits:
            assert text.startswith("ValueError") and "timeout=" in text and waited < 10
        assert "ValueError" in few[0] and "less than 2 x num_ranks" in few[0] and few[1] < 10


def three_ranks(rank, _):
    group = dist.new_group([0, 1, 2])
    if rank == 3:
        return "ValueError: is odd", 0.0
    modules = [Residual(1), Residual(1)]
    return attempt(Pipeline, modules, schedule="dualpipe", group=group, timeout=30.0)


def test_every_rank_hears_of_an_odd_number(gloo_workers_4):
    for text, waited in gloo_workers_4.run(three_ranks, timeout=60):
        assert text.startswith("ValueError") and "is odd" in text and waited < 10


class Late(Residual):
    """Sleeps in its sixth forward: the second chunk of the second step."""

    count, seconds = 0, 2 * PATIENCE

    def forward(self, x):
        self.count += 1
        if self.count == 6:
            time.sleep(self.seconds)
        return super().forward(x)


def come_late(rank, _):
    """Steps of a pipeline whose rank 1 takes longer in the second than the limit."""
    pipeline = chain(rank, dist.new_group(), Late(1) if rank else None, timeout=PATIENCE)
    inputs, options = batch(rank)
    return [attempt(pipeline.step, *inputs, **options) for _ in range(3)]


def test_a_late_rank_ends_the_pipeline_everywhere(gloo_workers_2):
    for first, second, third in gloo_workers_2.run(come_late, timeout=60):
        assert first[0] == "nothing"
        assert second[0].startswith("DualPipeError: rank"), second
        assert second[1] < 2 * PATIENCE + SLACK, second
        assert "a step before broke off" in third[0] and third[1] < PATIENCE, third


def miss_a_step(rank, _):
    """Rank 1 comes to its first step when rank 0 has given up; then both try again."""
    pipeline = chain(rank, dist.new_group(), timeout=PATIENCE)
    inputs, options = batch(rank)
    time.sleep(2 * PATIENCE * rank)
    return [attempt(pipeline.step, *inputs, **options) for _ in range(2)]


def test_words_of_a_step_that_broke_off_are_not_taken_for_the_next(gloo_workers_2):
    (first, again), (late, last) = gloo_workers_2.run(miss_a_step, timeout=60)
    assert "ranks [1] of the group did not begin the step within 4 s" in first[0]
    assert "a step before broke off" in again[0] and again[1] < PATIENCE
    assert late[0].startswith("DualPipeError") and late[1] < PATIENCE + SLACK
    assert "a step before broke off" in last[0]


def step_when_closed(rank, _):
    found = []
    for steps in (0, 2):
        for gpu in (False, True):
            pipeline = chain(rank, dist.new_group())
            if gpu:
                as_on_gpus(pipeline)
            inputs, options = batch(rank)
            for _ in range(steps):
                pipeline.step(*inputs, **options)
            pipeline.close()
            pipeline.close()
            pipeline.check()
            found.append(attempt(pipeline.step, *inputs, **options)[0])
    return found


def test_closed_twice_and_used_once_more(gloo_workers_2):
    for found in gloo_workers_2.run(step_when_closed, timeout=60):
        assert all(text.startswith("DualPipeError: the pipeline is closed") for text in found)


class Dying(Late):
    def forward(self, x):
        self.count += 1
        if self.count == 3:
            os._exit(3)
        return Residual.forward(self, x)


def die(rank, group, kind, folder):
    schedule = build_schedule(kind, group.size(), 8)
    stages = schedule.stages_of(rank)
    modules = [Dying(1) if rank == 2 else Residual(1) for _ in stages]
    pipeline = Pipeline(modules, schedule=kind, group=group, timeout=PATIENCE)
    passed, options = part_of(Case(kind, 8), schedule, rank)
    (folder / str(rank)).write_bytes(pickle.dumps(attempt(pipeline.step, *passed, **options)))


def test_a_dead_process_is_an_error_on_every_rank(tmp_path):
    with WorkerPool(4) as pool, pytest.raises(WorkerDiedError, match="rank 2 of 4"):
        pool.run(die, "dualpipe", tmp_path, timeout=60)
    for rank in (0, 1, 3):
        text, waited = pickle.loads((tmp_path / str(rank)).read_bytes())
        assert text.startswith("DualPipeError: rank"), (rank, text)
        assert waited < PATIENCE + SLACK, (rank, text)


class ToComplex(nn.Module):
    def forward(self, x):
        return torch.complex(x, 2 * x)


class Modulus(nn.Module):
    def forward(self, z):
        return z.real * 3 + z.imag


def hand_on_complex_numbers(rank, group):
    pipeline = chain(rank, group, (ToComplex, Modulus)[rank]())
    inputs, options = batch(rank)
    failed = attempt(pipeline.step, *inputs, **options)[0]
    with torch.no_grad():
        found = pipeline.step(*inputs, **options, return_outputs=True).outputs
    return failed, found


def test_complex_numbers_travel_forward_only(gloo_workers_2):
    """Their gradients would be lost without a word."""
    (first, _), (second, (found,)) = gloo_workers_2.run(hand_on_complex_numbers, timeout=60)
    assert all("output 0 as complex64" in text for text in (first, second))
    torch.testing.assert_close(found, 5 * batch(0)[0][0])


def change_precision(rank, group):
    """Losses with and without autocast, in turns, on one pipeline."""
    torch.manual_seed(rank)
    pipeline, found = chain(rank, group, nn.Linear(WIDTH, WIDTH)), []
    inputs, options = batch(rank)
    for low in (True, False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=low), torch.set_grad_enabled(low):
            found.append(pipeline.step(*inputs, **options).losses)
    return found, pipeline._generation


def test_steps_with_and_without_autocast_take_turns(gloo_workers_2):
    (_, generation), (losses, _) = gloo_workers_2.run(change_precision, timeout=60)
    assert generation == 2
    assert torch.equal(losses[0], losses[2]) and torch.equal(losses[1], losses[3])
    assert 0 < relative_error(losses[0], losses[1]) < 0.05


def count_keys(rank, _):
    group = dist.new_group()
    pipeline, store, found = chain(rank, group), None, []
    store = pipeline._agreement.store("")
    for size in range(4, 4 * 9, 4):
        inputs, options = batch(rank, size)
        for _ in range(2):
            pipeline.step(*inputs, **options)
        dist.barrier(group)
        found.append(store.num_keys())
        dist.barrier(group)
    return found


def test_keys_do_not_pile_up_in_the_store(gloo_workers_2):
    """New shapes are told through the store, step by step, for thousands of steps."""
    for found in gloo_workers_2.run(count_keys, timeout=60):
        assert len(set(found[1:])) == 1, found


class Wide(nn.Module):
    """Hands on a bool, nothing at all, a transposed and a wider tensor, and a scalar."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.layer(x)
        return y > 0, y[:0] * 1, y.double().t() * 1, y.bfloat16(), y.sum(), y.new_empty(0, 3)


class Join(nn.Module):
    def forward(self, positive, nothing, turned, low, total, empty):
        assert nothing.shape == (0, WIDTH) and empty.shape == (0, 3)
        return turned.t() * positive + low + total


def hand_on_odd_tensors(rank, group):
    found = []
    for gpu in (False, True):
        torch.manual_seed(3)
        stage = (Wide, Join)[rank]()
        pipeline = chain(rank, group, stage)
        if gpu:
            as_on_gpus(pipeline)
        inputs, options = batch(rank)
        for _ in range(2):  # on GPUs through the host, then through links of their own
            stage.zero_grad()
            pipeline.step(*inputs, **options)
            found.append([p.grad for p in stage.parameters()])
    return found


def test_tensors_of_all_kinds(gloo_workers_2):
    found, _ = gloo_workers_2.run(hand_on_odd_tensors, timeout=60)
    torch.manual_seed(3)
    first, last = Wide(), Join()
    for x in batch(0)[0][0].split(2):
        square_loss(last(*first(x)), torch.ones(2, WIDTH)).backward()
    for gradients in found:
        for gradient, p in zip(gradients, first.parameters(), strict=True):
            torch.testing.assert_close(gradient, p.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", [torch.ones(2, 3).double(), torch.ones(3, 3)])
def test_a_gradient_unlike_its_output_does_not_leave(wrong):
    """It would run over the end of its slot."""
    agreement = Agreement(None, 1.0)
    agreement.rank = 1
    edges = {(0, 0): (((2, 3), torch.float32),)}
    links = GroupLinks(None, agreement, torch.device("cpu"))
    schedule = build_schedule("1f1b", 2, 4)
    transfers = Transfers(schedule, links, agreement, edges, 0, Failure(), forward_only=False)
    with pytest.raises(ValueError, match=r"gradient of stage 1, chunk 0.*\[2, 3\] float32"):
        transfers.send("gradient", 1, 0, 0, (wrong,))


def two_at_once(rank, group):
    """Steps of two pipelines of one group in turns, each with chunks of its own number."""
    cases = [Case("dualpipev", 4, "delayed", steps=2), Case("dualpipev", 7, "delayed", steps=2)]
    pipelines, losses, found = [], [[], []], []
    for case in cases:
        schedule = build_schedule(case.kind, group.size(), case.chunks)
        stages = case.build(schedule.num_stages)
        modules = [stages[s] for s in schedule.stages_of(rank)]
        pipelines.append((schedule, modules, as_on_gpus(Pipeline(modules, group=group))))
    for step in range(2):
        for case, (schedule, _, pipeline), mine in zip(cases, pipelines, losses, strict=True):
            passed, options = part_of(case, schedule, rank, step)
            mine.append(pipeline.step(*passed, **options).losses)
    for (schedule, modules, pipeline), mine in zip(pipelines, losses, strict=True):
        gradients = [{n: p.grad for n, p in m.named_parameters()} for m in modules]
        found.append((mine, list(zip(schedule.stages_of(rank), gradients, strict=True))))
        pipeline.close()
    return cases, found


def test_two_pipelines_in_turns(gloo_workers_2):
    results = gloo_workers_2.run(two_at_once, timeout=60)
    for i, case in enumerate(results[0][0]):
        check(case, 2, [found[i] for _, found in results])


def sum_with_a_late_copy(rank, _):
    """Rank 1 comes to the sum of dualpipe's copies when rank 0 has given up."""
    modules = [Residual(1), Residual(1)]
    group = dist.new_group()
    pipeline = Pipeline(modules, schedule="dualpipe", group=group, timeout=PATIENCE)
    time.sleep(2 * PATIENCE * rank)
    return attempt(pipeline.sum_copies)


def test_the_sum_of_copies_has_the_limit(gloo_workers_2):
    (text, waited), _ = gloo_workers_2.run(sum_with_a_late_copy, timeout=60)
    assert text.startswith("DualPipeError: rank 0 waited") and "rank 1" in text
    assert waited < 2 * PATIENCE  # rank 0 did not wait for it
