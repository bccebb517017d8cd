"""Time, bubble and memory of a schedule; needs no GPU and no torch. `draw.py` draws it.

Each rank runs its list in order and one action at a time. An action starts when the rank is free
and its inputs are there; a result made on another rank arrives `p2p` after the action that made it
has ended, sends take no time of the rank, and links never queue. Integers and Fractions stay exact.

Without transfer times, with F&B = F+B, I = B-W >= W and F >= W, the bubble is

    1f1b       (R-1)(F+B)
    zb1p       (R-1)(F+B-2W), from R chunks; with any F, I and W (R-1)(F+I-min(F, I, W))
    zbv        (R-1)F for F = I = W, from 2R-1 chunks
    dualpipev  (R-1)(F&B+B-3W) for F = I, less min(F, (R-1)(I-F)) for F < I, because the forward
               that the last rank runs apart fills a wait; plus (R-1)(F-I) for F > I
    dualpipe   the same with R/2 for R

in times of one stage, which is 1/(2R) of the model in zbv and dualpipev and 1/R in the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

from .schedule import KINDS, Action, Key, Pair, Schedule, build_schedule

__all__ = [
    "Simulation",
    "Span",
    "Time",
    "Times",
    "plain_number",
    "predict",
    "simulate",
]

Time: TypeAlias = int | float | Fraction


@dataclass(frozen=True, kw_only=True)
class Times:
    """How long one stage takes for one chunk, in any one unit of time.

    f forward; b full backward (inputs and weights); w the weights' share of b, so that the backward
    for inputs takes b - w; fb an overlapped pair, by default f + b (no gain from overlap); p2p the
    transfer between two ranks. Raises ValueError for negative or infinite times and for w > b.
    """

    f: Time = 1
    b: Time = 2
    w: Time = 1
    fb: Time | None = None
    p2p: Time = 0

    def __post_init__(self) -> None:
        if self.fb is None:
            object.__setattr__(self, "fb", self.f + self.b)
        for name in ("f", "b", "w", "fb", "p2p"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}: must be a finite time, 0 or more")
        if self.w > self.b:
            raise ValueError(
                f"w={self.w} is more than b={self.b}: b is the full backward, inputs and weights, "
                f"pass b={self.b + self.w} if {self.b} is the backward for inputs alone"
            )

    def of(self, action: Action | Pair) -> Time:
        """How long `action` keeps its rank."""
        if isinstance(action, Pair):
            return self.pair
        by_op: dict[str, Time] = {"F": self.f, "B": self.b, "I": self.b - self.w, "W": self.w}
        return by_op[action.op]

    @property
    def pair(self) -> Time:
        """`fb`, which is known once this is made."""
        assert self.fb is not None
        return self.fb

    def scaled(self, factor: Time) -> "Times":
        """The times of a stage with `factor` times the layers; the transfer stays as it is."""
        f, b, w, fb = (factor * time for time in (self.f, self.b, self.w, self.pair))
        return Times(f=f, b=b, w=w, fb=fb, p2p=self.p2p)

    def with_communication(self, ratio: Time, hidden: Time = 1) -> "Times":
        """Adds expert-parallel communication to f, b, w taken as computation alone.

        `ratio` is communication : computation over a forward and a backward (bench/pair.py on four
        H200s: 0.1 to 0.5). Forward and backward for inputs move the same bytes, half each; weights
        move none. A pair takes the longer of its computation and its communication, plus the share
        1 - `hidden` of the shorter that does not disappear behind it.
        """
        if not (math.isfinite(ratio) and ratio >= 0):
            raise ValueError(f"ratio={ratio}: must be communication : computation, 0 or more")
        if not 0 <= hidden <= 1:
            raise ValueError(f"hidden={hidden}: must be a share from 0 to 1")
        compute = self.f + self.b
        comm = ratio * compute
        pair = max(compute, comm) + (1 - hidden) * min(compute, comm)
        return Times(f=self.f + comm / 2, b=self.b + comm / 2, w=self.w, fb=pair, p2p=self.p2p)


@dataclass(frozen=True, slots=True)
class Span:
    """When an action runs."""

    action: Action | Pair
    start: Time
    end: Time


@dataclass(frozen=True)
class Simulation:
    """A schedule in time.

    spans             per rank, in order
    makespan          from the first start to the last end, over all ranks
    bubble            per rank, makespan less the time in which the rank runs something
    peak_activations  per rank, the most (stage, chunk) activations alive at once: a forward's from
                      its start, its pair's included, to the end of its B, or of its W where the
                      backward is split, because weight gradients read the same inputs. Compare
                      kinds by peak_activations / schedule.num_stages, in activations of the model.
    """

    schedule: Schedule
    times: Times
    spans: tuple[tuple[Span, ...], ...]
    makespan: Time
    bubble: tuple[Time, ...]
    peak_activations: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Simulation({self.schedule!r}, makespan={self.makespan}, bubble={self.bubble})"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: whole numbers as int, others as float."""
        names = ("f", "b", "w", "fb", "p2p")
        times = {name: plain_number(getattr(self.times, name)) for name in names}
        return {
            "kind": self.schedule.kind,
            "num_ranks": self.schedule.num_ranks,
            "num_chunks": self.schedule.num_chunks,
            "num_stages": self.schedule.num_stages,
            "times": times,
            "makespan": plain_number(self.makespan),
            "bubble": [plain_number(bubble) for bubble in self.bubble],
            "peak_activations": list(self.peak_activations),
            "actions": [
                [action.as_dict() for action in actions] for actions in self.schedule.actions
            ],
        }


def simulate(schedule: Schedule, times: Times | None = None) -> Simulation:
    """Run `schedule` with `times` (by default F=W=1, B=2) on paper.

    Raises ValueError when it deadlocks; `schedule.validate()` finds every other fault.
    """
    times = Times() if times is None else times
    # When a result is where it was made, and that rank; others have it after the transfer.
    arrival: dict[Key, tuple[Time, int]] = {}
    free: list[Time] = [0] * schedule.num_ranks
    spans: list[list[Span]] = [[] for _ in range(schedule.num_ranks)]
    for rank, position in schedule.dependency_order():
        action = schedule.actions[rank][position]
        start = free[rank]
        for part in action.parts:
            for key in schedule.waits_for(part):
                made, maker = arrival[key]
                start = max(start, made if maker == rank else made + times.p2p)
        free[rank] = end = start + times.of(action)
        spans[rank].append(Span(action, start, end))
        for part in action.parts:
            if part.makes is not None:
                arrival[part.makes] = (end, rank)
    makespan = max(free)
    return Simulation(
        schedule=schedule,
        times=times,
        spans=tuple(map(tuple, spans)),
        makespan=makespan,
        bubble=tuple(makespan - sum(map(times.of, actions)) for actions in schedule.actions),
        peak_activations=tuple(map(_peak_activations, schedule.actions)),
    )


def predict(
    num_ranks: int,
    num_chunks: int,
    times: Times | None = None,
    *,
    ratio: Time = 0,
    hidden: Time = 1,
    kinds: Sequence[str] = KINDS,
) -> tuple[Simulation, ...]:
    """One model on one machine under each of `kinds`.

    `times` are those of 1/(2R) of the model, a stage of zbv and dualpipev; the stages of the others
    take twice as long. With a `ratio` they are computation alone and `ratio` and `hidden` set the
    rest, fb included, as in `Times.with_communication`. For example four ranks, 16 chunks and the
    default times give makespans 114, 102, 99, 102, 100 in the order of `KINDS`; 96 is the ideal.
    """
    times = Times() if times is None else times
    if ratio:
        times = times.with_communication(ratio, hidden)
    found = []
    for kind in kinds:
        schedule = build_schedule(kind, num_ranks, num_chunks)
        found.append(simulate(schedule, times.scaled(2 * num_ranks // schedule.num_stages)))
    return tuple(found)


def _peak_activations(actions: Sequence[Action | Pair]) -> int:
    alive = peak = 0
    for action in actions:
        for part in action.parts:
            if part.op == "F":
                alive += 1
                peak = max(peak, alive)
            elif part.op != "I":
                alive -= 1
    return peak


def plain_number(value: Time) -> int | float:
    """An int where it is whole, else a float."""
    return int(value) if value == int(value) else float(value)
