"""The tuner: steps by a clock of our own, agreement over gloo, and a real pair."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext import OverlappedPair, Split, tune_split
from dualpipe_ext.blocks import tune
from tests.support import small_transformer as small
from tests.support.workers import PATIENCE, SLACK


class Clock:
    """Steps of `pair` last what `seconds` says of (comm_sms, num_sms, how often it ran)."""

    def __init__(self, patch, seconds):
        self.now, self.seconds, self.steps = 0.0, seconds, []
        self.pair = SimpleNamespace(comm_sms="before", num_sms="before")
        patch.setattr(tune.time, "perf_counter", lambda: self.now)

    def step(self):
        split = self.pair.comm_sms, self.pair.num_sms
        self.now += self.seconds(*split, self.steps.count(split))
        self.steps.append(split)


def test_the_fastest_split_is_left(monkeypatch):
    clock = Clock(monkeypatch, lambda comm, gemm, _: abs(comm - 16) + (1 if gemm is None else 2))
    splits = tune_split(
        clock.pair, clock.step, comm_sms=(8, 16, 24), num_sms=(None, 116), warmup=1, repeats=2
    )
    assert splits[:2] == [Split(16, None, 1.0), Split(16, 116, 2.0)]
    assert [split.seconds for split in splits] == [1, 2, 9, 9, 10, 10]
    assert (clock.pair.comm_sms, clock.pair.num_sms) == (16, None)
    assert str(splits[1]) == "comm_sms=16, num_sms=116: 2000.00 ms"
    assert all(clock.steps.count(split) == 3 for split in clock.steps)
    turns = [clock.steps[i : i + 6] for i in (0, 6, 12)]
    assert all(len(set(turn)) == 6 for turn in turns) and len(set(map(tuple, turns))) > 1


def test_warm_up_and_outliers_do_not_count(monkeypatch):
    """A split that compiles first, and is held up once, is the fastest all the same."""
    clock = Clock(
        monkeypatch,
        lambda comm, _, ran: 1.0 if comm == 8 else [50.0, 0.5, 0.5, 40.0][ran],
    )
    splits = tune_split(clock.pair, clock.step, comm_sms=(8, 16), warmup=1, repeats=3)
    assert splits == [Split(16, None, 0.5), Split(8, None, 1.0)]


def test_a_step_that_fails_changes_nothing(monkeypatch):
    clock = Clock(monkeypatch, lambda comm, *_: 1 / (comm - 16))
    with pytest.raises(ZeroDivisionError):
        tune_split(clock.pair, clock.step, comm_sms=(20, 16))
    assert (clock.pair.comm_sms, clock.pair.num_sms) == ("before", "before")


@pytest.mark.parametrize(
    "wrong", [{"comm_sms": ()}, {"num_sms": ()}, {"repeats": 0}, {"warmup": -1}]
)
def test_nothing_to_time(wrong):
    with pytest.raises(ValueError, match="pass one number or more of each"):
        tune_split(SimpleNamespace(comm_sms=8, num_sms=None), lambda: None, **wrong)


def tune_unequal(rank, _):
    """8 SMs are slow on rank 1 alone; each rank is held up once with 16."""
    with pytest.MonkeyPatch.context() as patch:

        def seconds(comm, _, ran):
            return 3.0 if (comm, rank) == (8, 1) else [9.0, 1.0, 1.0][(ran + rank) % 3]

        clock = Clock(patch, seconds)
        splits = tune_split(clock.pair, clock.step, comm_sms=(8, 16), warmup=0, repeats=3)
    return splits, clock.pair.comm_sms


def test_the_slowest_rank_counts(gloo_workers_2):
    """A repeat is as slow as its slowest rank: of 16's three, two have one that is held up."""
    for splits, left in gloo_workers_2.run(tune_unequal, timeout=60):
        assert splits == [Split(8, None, 3.0), Split(16, None, 9.0)] and left == 8


def tune_differently(rank, _):
    """Other splits on each rank; none on one of them; none on both."""
    pair, found = SimpleNamespace(comm_sms=8, num_sms=None), []
    for comm_sms in ((8, 16 + rank), (8,) * rank, ()):
        with pytest.raises(ValueError) as error:
            tune_split(pair, lambda: None, comm_sms=comm_sms, timeout=PATIENCE)
        found.append(str(error.value))
    return found


def test_every_rank_hears_of_wrong_splits(gloo_workers_2):
    for different, one, both in gloo_workers_2.run(tune_differently, timeout=60):
        assert "(16, None)" in different and "(17, None)" in different
        assert all("the same on every rank" in text for text in (different, one))
        assert "pass one number or more of each" in both


def tune_alone(rank, _):
    group = dist.new_group()
    if rank == 1:
        return "absent", 0.0
    start = time.monotonic()
    try:
        tune_split(SimpleNamespace(comm_sms=8, num_sms=None), lambda: None, group=group,
                   timeout=PATIENCE)  # fmt: skip
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "nothing", 0.0


def test_a_rank_that_does_not_tune(gloo_workers_2):
    (text, waited), _ = gloo_workers_2.run(tune_alone, timeout=60)
    assert text.startswith("DualPipeError: ranks [1]") and "did not begin to tune" in text
    assert waited < PATIENCE + SLACK


def test_steps_of_a_real_pair_train():
    stage = small.stage(1)
    pair, optimizer = OverlappedPair("cpu"), torch.optim.SGD(stage.parameters(), lr=0.1)
    x = torch.randn(2, 6, small.HIDDEN)
    losses = []

    def step():
        before = stage.start_chunk(x)
        (y,) = before.forward()
        losses.append(y.square().mean().item())
        pair.run(stage.start_chunk(x), before, (2 * y / y.numel(),))
        optimizer.step()
        optimizer.zero_grad()

    splits = tune_split(pair, step, comm_sms=(8, 16), warmup=1, repeats=2)
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert pair.comm_sms == splits[0].comm_sms and math.isfinite(splits[1].seconds)
