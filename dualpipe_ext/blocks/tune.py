"""The fastest split of the SMs for a model on the GPUs at hand, found by its own steps."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..ranks.agreement import Agreement
from ..ranks.groups import Group, process_group
from .pair import OverlappedPair

__all__ = ["Split", "tune_split"]

COMM_SMS = (8, 12, 16, 24)  # with 4 bench/sm_split.py found communication longer than GEMMs


@dataclass(frozen=True)
class Split:
    """Settings of an `OverlappedPair`, and the seconds that a step took with them."""

    comm_sms: int | float | None
    num_sms: int | None
    seconds: float

    def __str__(self) -> str:
        return f"comm_sms={self.comm_sms}, num_sms={self.num_sms}: {1e3 * self.seconds:.2f} ms"


def tune_split(
    pair: OverlappedPair,
    step: Callable[[], object],
    *,
    comm_sms: Sequence[int | float | None] = COMM_SMS,
    num_sms: Sequence[int | None] = (None,),
    group: Group = None,
    warmup: int = 2,
    repeats: int = 5,
    timeout: float = 600.0,
) -> list[Split]:
    """Times ``step`` with every split and leaves the fastest in ``pair``. Collective.

    Args:
        pair: whose `comm_sms` and `num_sms` change, such as that of a `Pipeline`.
        step: runs pairs, always of the same shapes: a step of training. What it trains, it trains;
            `warmup + repeats` times for every split.
        comm_sms, num_sms: to choose from, see `OverlappedPair`; every one with every other. The
            exchanges keep the `form` that they were made with.
        group: of all ranks whose pairs run at the same time; None takes all processes, if there is
            a process group. The slowest of them counts.
        warmup, repeats: steps with every split that do not count, and that do: their median. The
            splits take turns, in another order each time.
        timeout: seconds to wait for the other ranks before the first step and after the last.

    Returns every split, the fastest first; the same list on every rank.

    Raises:
        ValueError: nothing to choose from, or ranks were told to choose differently.
        DualPipeError: a rank did not come within the timeout.

    A step that raises leaves ``pair`` as it was.
    """
    splits = [*itertools.product(comm_sms, num_sms)]
    group = process_group(group)
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    agreement = Agreement(group, timeout)
    asked = splits, warmup, repeats
    for rank, theirs in enumerate(agreement.gather("begin to tune", asked)):
        if theirs != asked:
            raise ValueError(
                f"rank {rank} of the group is to tune {theirs} and rank {agreement.rank} {asked} "
                "(splits, warmup, repeats): pass the same on every rank"
            )
    if not splits or repeats < 1 or warmup < 0:  # all ranks have come, and all raise
        raise ValueError(
            f"comm_sms={comm_sms!r}, num_sms={num_sms!r}, warmup={warmup}, repeats={repeats}: pass "
            "one number or more of each, warmup from 0 and repeats from 1"
        )
    before = pair.comm_sms, pair.num_sms
    try:
        times = _time_in_turn(pair, step, splits, warmup, repeats)
        everyones = agreement.gather("end to tune", times)
    except BaseException:
        pair.comm_sms, pair.num_sms = before
        raise
    found = []
    for i, split in enumerate(splits):
        slowest = [max(repeat) for repeat in zip(*(times[i] for times in everyones), strict=True)]
        found.append(Split(*split, statistics.median(slowest)))
    found.sort(key=lambda split: split.seconds)
    pair.comm_sms, pair.num_sms = found[0].comm_sms, found[0].num_sms
    return found


def _time_in_turn(
    pair: OverlappedPair,
    step: Callable[[], object],
    splits: Sequence[tuple[int | float | None, int | None]],
    warmup: int,
    repeats: int,
) -> list[list[float]]:
    """Seconds of each split's steps but for the first `warmup`."""
    times: list[list[float]] = [[] for _ in splits]
    for turn in range(warmup + repeats):
        # GPUs at their power limit give a split the clock that those before it left.
        for i in random.Random(turn).sample(range(len(splits)), len(splits)):
            pair.comm_sms, pair.num_sms = splits[i]
            _synchronize()
            start = time.perf_counter()
            step()
            _synchronize()
            if turn >= warmup:
                times[i].append(time.perf_counter() - start)
    return times


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
