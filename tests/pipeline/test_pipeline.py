"""The pipeline runtime on gloo, against the same model run whole by plain autograd."""

import copy
import gc
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe_ext.errors import DualPipeError
from dualpipe_ext.gradients.delayed import delay_linears
from dualpipe_ext.pipeline.pipeline import Pipeline
from dualpipe_ext.pipeline.schedule import build_schedule
from tests.support.compare import relative_error
from tests.support.small_transformer import gradients
from tests.support.workers import PATIENCE, SLACK, WorkerPool

WIDTH, PER_CHUNK = 6, 2


class Residual(nn.Module):
    """A stage of plain torch; `depth` layers, none included."""

    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x * 1.0


class Hooked(Residual):
    """A stage with DeepSeek's hook, as in their example."""

    pairs = 0

    @classmethod
    def overlapped_forward_backward(
        cls, module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1
    ):
        outputs0 = [module0(*inputs0)]
        loss0 = criterion0(*outputs0, *labels0) if criterion0 is not None else None
        if loss1 is not None:
            loss1.backward()
        else:
            torch.autograd.backward(outputs1, output_grads1)
        Hooked.pairs += 1
        return outputs0, loss0


class Many(nn.Module):
    """Stages that hand on two tensors, the second of whole numbers."""

    def __init__(self, depth):
        super().__init__()
        self.inner = Residual(depth)

    def forward(self, x, indices):
        return self.inner(x) * (1 + indices), indices + 1


def square_loss(y, *rest):
    return (y - rest[-1]).square().sum()


@dataclass(frozen=True)
class Case:
    kind: str
    chunks: int
    stages: str = "plain"  # or delayed, hooked, many
    weight_delay: str = "all"
    recompute: bool = False
    steps: int = 1

    def build(self, num_stages):
        torch.manual_seed(5)
        make = {"plain": Residual, "delayed": Residual, "hooked": Hooked, "many": Many}
        stages = [make[self.stages](1 + s % 2) for s in range(num_stages)]
        return [delay_linears(stage) for stage in stages] if self.stages == "delayed" else stages

    def batch(self, seed=0):
        """Inputs and labels of the whole batch, and the criterion."""
        size = self.chunks * PER_CHUNK
        generator = torch.Generator().manual_seed(seed)
        x, labels = torch.randn(2, size, WIDTH, generator=generator)
        inputs = (x, torch.arange(size)[:, None] % 3) if self.stages == "many" else (x,)
        return inputs, labels, square_loss


def sequential(case, ranks):
    """Losses and gradients by stage of the whole model, chunk by chunk."""
    num_stages = build_schedule(case.kind, ranks, case.chunks).num_stages
    stages = case.build(num_stages)
    losses = []
    for step in range(case.steps):
        inputs, labels, criterion = case.batch(step)
        for i in range(case.chunks):
            y = tuple(x[i * PER_CHUNK : (i + 1) * PER_CHUNK] for x in inputs)
            for stage in stages:
                y = stage(*y)
                y = y if isinstance(y, tuple) else (y,)
            loss = criterion(*y, labels[i * PER_CHUNK : (i + 1) * PER_CHUNK])
            losses.append(loss.detach())
            loss.backward()
    return torch.stack(losses), [gradients(stage) for stage in stages]


def part_of(case, schedule, rank, step=0):
    """What this rank passes to `step`."""
    inputs, labels, criterion = case.batch(step)
    half = len(labels) // schedule.num_directions
    options = {"num_chunks": case.chunks, "criterion": None}
    passed = ()
    for direction in range(schedule.num_directions):
        mine = slice(direction * half, (direction + 1) * half)
        if schedule.rank_of(0, direction) == rank:
            passed = tuple(x[mine] for x in inputs)
        if schedule.rank_of(schedule.num_stages - 1, direction) == rank:
            options |= {"criterion": criterion, "labels": (labels[mine],)}
    return passed, options


def pipelined(rank, group, case):
    """Losses, and gradients by stage, of this rank."""
    ranks = 1 if group is None else group.size()
    schedule = build_schedule(case.kind, ranks, case.chunks)
    stages = case.build(schedule.num_stages)
    mine = schedule.stages_of(rank)
    modules = [copy.deepcopy(stages[stage]) for stage in mine]
    pipeline = Pipeline(
        modules,
        schedule=case.kind,
        group=group,
        timeout=60,
        weight_delay=case.weight_delay,
        recompute=case.recompute,
    )
    losses = []
    for step in range(case.steps):
        passed, options = part_of(case, schedule, rank, step)
        last = step + 1 == case.steps
        losses.append(pipeline.step(*passed, **options, sync_gradients=last).losses)
    pipeline.close()
    if case.stages == "hooked" and case.kind.startswith("dualpipe"):
        assert Hooked.pairs > 0
    return losses, list(zip(mine, map(gradients, modules), strict=True))


def check(case, ranks, results):
    expected_losses, expected = sequential(case, ranks)
    schedule = build_schedule(case.kind, ranks, case.chunks)
    for step in range(case.steps):
        found = []
        for direction in range(schedule.num_directions):
            found.append(results[schedule.rank_of(schedule.num_stages - 1, direction)][0][step])
        wanted = expected_losses[step * case.chunks : (step + 1) * case.chunks]
        assert relative_error(torch.cat(found), wanted) <= 1e-6
    seen = set()
    for _, stages in results:
        for stage, found_gradients in stages:
            seen.add(stage)
            for name, gradient in expected[stage].items():
                assert relative_error(found_gradients[name], gradient) <= 1e-6, (case, stage, name)
    assert seen == set(range(schedule.num_stages))


def run_cases(rank, group, cases):
    return [pipelined(rank, group, case) for case in cases]


def check_cases(cases, pool):
    for case, *results in zip(cases, *pool.run(run_cases, cases), strict=True):
        check(case, pool.world_size, results)


VARIANTS = (
    ("plain", "all", False),
    ("delayed", "all", False),
    ("delayed", "off", False),
    ("delayed", "all", True),
    ("hooked", "all", False),
    ("many", "all", False),
)


def variants(kinds, chunks):
    return [
        Case(kind, chunks + (2 * i if kind == "dualpipe" else i), *variant)
        for kind in kinds
        for i, variant in enumerate(VARIANTS)
    ]


KINDS = ("1f1b", "zb1p", "zbv", "dualpipev")


@pytest.mark.parametrize("case", variants(KINDS, 2), ids=str)
def test_one_rank(case):
    check(case, 1, [pipelined(0, None, case)])


def test_two_ranks(gloo_workers_2):
    cases = variants((*KINDS, "dualpipe"), 4)
    cases += [Case(kind, 4, "delayed", steps=2) for kind in (*KINDS, "dualpipe")]
    check_cases(cases, gloo_workers_2)


def test_four_ranks(gloo_workers_4):
    cases = [Case(kind, 8, "delayed") for kind in (*KINDS, "dualpipe")]
    cases += [Case(kind, 11, "delayed", "off") for kind in ("dualpipev", "zb1p")]
    cases += [Case("dualpipe", 10, "delayed", "off"), Case("1f1b", 2), Case("zbv", 3, "delayed")]
    check_cases(cases, gloo_workers_4)


def test_eight_ranks():
    with WorkerPool(8) as pool:
        cases = [Case(kind, 16, "delayed") for kind in ("dualpipev", "dualpipe")]
        check_cases([*cases, Case("dualpipev", 19, "delayed", "off"), Case("zbv", 9)], pool)


def forward_only(rank, group):
    """Outputs and losses under no_grad, then of a batch of another shape, which is negotiated."""
    case = Case("dualpipev", 4)
    schedule = build_schedule(case.kind, group.size(), case.chunks)
    modules = [case.build(schedule.num_stages)[stage] for stage in schedule.stages_of(rank)]
    pipeline = Pipeline(modules, group=group, timeout=60)
    passed, options = part_of(case, schedule, rank)
    with torch.no_grad():
        first = pipeline.step(*passed, **options, return_outputs=True)
        passed = tuple(x.repeat(3, 1) for x in passed)
        second = pipeline.step(*passed, num_chunks=5 - 1, return_outputs=True)
    assert all(p.grad is None for module in modules for p in module.parameters())
    return first, second


def test_forward_only_with_outputs(gloo_workers_2):
    case = Case("dualpipev", 4)
    (first, second), (none, _) = gloo_workers_2.run(forward_only, timeout=60)
    assert none == (None, ())
    (x,), labels, _ = case.batch()
    y = x
    for stage in case.build(4):
        y = stage(y)
    assert relative_error(first.outputs[0], y) < 1e-6
    assert relative_error(first.losses.sum(), (y - labels).square().sum()) < 1e-6
    assert second.losses is None
    assert relative_error(second.outputs[0], y.repeat(3, 1)) < 1e-6


def test_wrong_arguments():
    for modules, kind, match in (
        ([nn.Identity()] * 2, "dualpipe", "num_ranks=1 is odd"),
        (nn.Identity(), "dualpipev", "pass one module for each"),
        (nn.Identity(), "gpipe", "unknown schedule"),
    ):
        with pytest.raises(ValueError, match=match):
            Pipeline(modules, schedule=kind)
    pipeline = Pipeline([Residual(1), Residual(1)])
    x = torch.ones(4, WIDTH)
    for inputs, options, match in (
        ((x,), {"num_chunks": 1}, "less than 2 x num_ranks"),
        ((x,), {"num_chunks": 3}, "equal chunks"),
        ((), {"num_chunks": 2}, "no inputs"),
        ((x,), {"num_chunks": 2}, "criterion=None"),
    ):
        with pytest.raises(ValueError, match=match):
            pipeline.step(*inputs, **options)


class Wide(nn.Module):
    """Counts its outputs in memory, by a size that nothing else has."""

    most, size = 0, 1237

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        tensors = (found for found in gc.get_objects() if type(found) is torch.Tensor)
        Wide.most = max(Wide.most, sum(tensor.numel() == self.size for tensor in tensors))
        return (x.mean() * self.weight).expand(1, self.size) * 1.0


class Narrow(Wide):
    def forward(self, x):
        return x.mean(1, keepdim=True) * self.weight


def count_outputs(rank, group, kind):
    pipeline = Pipeline(Wide() if rank == 0 else Narrow(), schedule=kind, group=group, timeout=60)
    passed, options = (torch.ones(12, 4),), {}
    if rank == 1:
        passed, options = (), {"criterion": square_loss, "labels": [torch.ones(12, 1)]}
    pipeline.step(*passed, num_chunks=12, **options)
    return Wide.most


@pytest.mark.parametrize("kind", ["1f1b", "zb1p"])
def test_sent_activations_are_freed(kind, gloo_workers_2):
    """Two chunks are in flight on rank 0, and their gradients; not all twelve."""
    assert 1 <= gloo_workers_2.run(count_outputs, kind)[0] <= 4


class View(Residual):
    def forward(self, x):
        return super().forward(x)[:, :]


class Growing(Residual):
    """Returns one more row from its third chunk on."""

    count = 0

    def forward(self, x):
        self.count += 1
        return super().forward(torch.cat([x, x[:1]]) if self.count > 2 else x)


class Failing(Residual):
    def forward(self, x):
        raise ArithmeticError("at once")


class FailingLater(Growing):
    def forward(self, x):
        self.count += 1
        if self.count > 2:
            raise ArithmeticError("chunk 2")
        return Residual.forward(self, x)


class FailingBackward(Residual):
    def forward(self, x):
        return Refuse.apply(super().forward(x))


class Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        raise ArithmeticError("in backward")


class Leave(BaseException):
    """Not an Exception: the rank leaves the step without a word, as one that dies."""


class Leaving(FailingLater):
    def forward(self, x):
        self.count += 1
        if self.count > 2:
            raise Leave
        return Residual.forward(self, x)


WRONG = {  # stage, where it stands, what its rank raises
    "view": (View, 1, "returned a view"),
    "shapes": (Growing, 1, "need equal shapes"),
    "first forward": (Failing, 1, "at once"),
    "first forward of the first stage": (Failing, 0, "at once"),
    "later forward": (FailingLater, 2, "chunk 2"),
    "backward": (FailingBackward, 1, "in backward"),
    "leaves": (Leaving, 1, "Leave"),
}


def wrong_stage(rank, _, name, kind, timeout):
    """(text of the error, seconds), and whether a right step works after it."""
    wrong, where, _ = WRONG[name]
    group = dist.new_group()  # a step that a rank leaves ends it
    case = Case(kind, 8 if kind == "dualpipe" else 4)
    schedule = build_schedule(kind, group.size(), case.chunks)
    where = min(where, schedule.num_stages - 2)  # the last stage may return what it likes
    right = case.build(schedule.num_stages)
    stages = [wrong(1) if s == where else stage for s, stage in enumerate(right)]
    mine = schedule.stages_of(rank)
    pipeline = Pipeline([stages[s] for s in mine], schedule=kind, group=group, timeout=timeout)
    passed, options = part_of(case, schedule, rank)
    start = time.monotonic()
    try:
        pipeline.step(*passed, **options)
        return "nothing", 0, False
    except (Exception, Leave) as error:
        text, seconds = f"{type(error).__name__}: {error}", time.monotonic() - start
    if wrong is Leaving:
        # Gloo's thread would spin on the broken connection for as long as the worker lives.
        del pipeline
        dist.destroy_process_group(group)
        return text, seconds, False
    pipeline.modules = [right[s] for s in mine]
    losses = pipeline.step(*passed, **options).losses
    return text, seconds, losses is None or bool(losses.isfinite().all())


@pytest.mark.parametrize("kind", ["dualpipev", "1f1b", "dualpipe"])
def test_every_rank_hears_of_a_wrong_stage(kind, gloo_workers_2):
    for name, (_, _, text) in WRONG.items():
        timeout = PATIENCE if name == "leaves" else 30.0
        results = gloo_workers_2.run(wrong_stage, name, kind, timeout, timeout=60)
        for found, seconds, goes_on in results:
            if name == "leaves":
                assert found.startswith(("Leave", "DualPipeError")), (name, found)
            else:
                assert text in found and goes_on, (name, found)
            assert seconds < 2 * timeout + SLACK


def disagree(rank, group, what):
    modules = [Residual(1), Residual(1)]
    timeout = PATIENCE if what == "absent" else 30.0
    options = dict(schedule="dualpipev", group=group, timeout=timeout)
    if what == "schedule" and rank == 1:
        options["schedule"] = "zbv"
    try:
        pipeline = Pipeline(modules, **options)
        if what == "absent" and rank == 1:
            return "absent"
        pipeline.step(
            *([torch.ones(24, WIDTH)] if rank == 0 else []),
            num_chunks=4 + 2 * rank if what == "chunks" else 4,
            **({"criterion": square_loss, "labels": [torch.ones(24, WIDTH)]} if rank == 0 else {}),
        )
    except (ValueError, DualPipeError) as error:
        return str(error)


def test_disagreeing_ranks(gloo_workers_2):
    for what, text in (("schedule", "on every rank"), ("chunks", "on every rank")):
        for found in gloo_workers_2.run(disagree, what, timeout=60):
            assert text in found
    found = gloo_workers_2.run(disagree, "absent", timeout=60)
    assert "ranks [1] of the group did not begin the step within 4 s" in found[0]
