"""Time, bubble and memory of a schedule, and its drawing; needs no GPU and no torch.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

from .schedule import KINDS, Action, Key, Pair, Schedule, build_schedule

__all__ = [
    "Simulation",
    "Span",
    "Times",
    "describe_simulation",
    "draw_text",
    "predict",
    "save_plot",
    "simulate",
    "to_svg",
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
        times = {name: _plain(getattr(self.times, name)) for name in ("f", "b", "w", "fb", "p2p")}
        return {
            "kind": self.schedule.kind,
            "num_ranks": self.schedule.num_ranks,
            "num_chunks": self.schedule.num_chunks,
            "num_stages": self.schedule.num_stages,
            "times": times,
            "makespan": _plain(self.makespan),
            "bubble": [_plain(bubble) for bubble in self.bubble],
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


def _plain(value: Time) -> int | float:
    return int(value) if value == int(value) else float(value)


# Drawing

COLUMNS_PER_ACTION = 3  # of the shortest action, in text: a letter and two digits
COLOURS = {  # per operation: phase 0, phase 1, and whether white text reads better on it
    "F": ("#f6b26b", "#e69138", False),
    "B": ("#93c47d", "#6aa84f", False),
    "I": ("#76c7c0", "#45a59d", False),
    "W": ("#6d9eeb", "#3c78d8", True),
}
NAMES = {"F": "forward", "B": "backward", "I": "backward for inputs", "W": "backward for weights"}


@dataclass(frozen=True, slots=True)
class _Block:
    """One coloured cell: an action, or one half of a pair, `width` time units from `start`."""

    rank: int
    start: float
    width: float
    op: str
    phase: int
    chunk: int


def draw_text(simulation: Simulation, width: int | None = None) -> str:
    """The schedule as text, one line a rank, at most `width` columns (default: as wide as needed).

    F3 is the forward of chunk 3, F3B1 a pair, dots are the bubble; small letters are the second
    phase: the way back through the ranks in zbv and dualpipev, direction 1 in dualpipe. Cells too
    narrow for the number show the letter, pairs then &.
    """
    margin = len(f"rank {simulation.schedule.num_ranks - 1} ")
    shortest = _shortest(simulation)
    columns = math.ceil(simulation.makespan / shortest * COLUMNS_PER_ACTION)
    if width is not None:
        if width <= margin:
            raise ValueError(
                f"width={width}: the ranks' names take {margin} columns, use 80 or more"
            )
        columns = min(columns, width - margin)
    scale = columns / simulation.makespan if simulation.makespan else 0
    lines = []
    for rank, spans in enumerate(simulation.spans):
        row = ["."] * columns
        for span in spans:
            first, last = (round(float(time * scale)) for time in (span.start, span.end))
            row[first:last] = _text_cell(simulation.schedule, span.action, last - first)
        lines.append(f"{f'rank {rank}':<{margin}}{''.join(row)}")
    return "\n".join(lines)


def describe_simulation(simulation: Simulation, width: int | None = None) -> str:
    """For people: sizes, makespan, bubble and peak of every rank, then `draw_text`."""
    schedule, times = simulation.schedule, simulation.times
    names = ", ".join(
        f"{name} {_plain(time):g}"
        for name, time in (
            ("F", times.f),
            ("B", times.b),
            ("W", times.w),
            ("F&B", times.pair),
            ("transfer", times.p2p),
        )
    )
    makespan = _plain(simulation.makespan)
    lines = [
        f"{schedule.kind}: {schedule.num_ranks} ranks, {schedule.num_stages} stages, "
        f"{schedule.num_chunks} chunks; {names}",
        f"makespan {makespan:g}",
        f"{'rank':>8} {'bubble':>10} {'share':>7} {'peak activations':>17}",
    ]
    for rank, (bubble, peak) in enumerate(
        zip(simulation.bubble, simulation.peak_activations, strict=True)
    ):
        share = float(bubble / makespan) if makespan else 0
        lines.append(f"{rank:>8} {_plain(bubble):>10g} {share:>7.1%} {peak:>17}")
    return "\n".join([*lines, "", draw_text(simulation, width)])


def _text_cell(schedule: Schedule, action: Action | Pair, width: int) -> str:
    labels = []
    for part in action.parts:
        letter = part.op.lower() if _phase(schedule, part) else part.op
        labels.append((letter, f"{letter}{part.chunk}"))
    label = "".join(long for _, long in labels)
    if len(label) > width:
        label = "&" if len(labels) == 2 else labels[0][0]
    return label.ljust(width)[:width]


def save_plot(simulation: Simulation, file: str | Path) -> None:
    """Draw into `file`: .svg without further packages, .png through matplotlib.

    Raises ValueError for another suffix, ModuleNotFoundError for .png without matplotlib.
    """
    file = Path(file)
    if file.suffix.lower() == ".svg":
        file.write_text(to_svg(simulation), encoding="utf-8")
    elif file.suffix.lower() == ".png":
        _save_png(simulation, file)
    else:
        raise ValueError(f"cannot draw into {str(file)!r}: name a file that ends in .svg or .png")


def to_svg(simulation: Simulation) -> str:
    """An SVG in the manner of DualPipe's figure: a row a rank, a colour an operation.

    Pairs are two cells in one black frame; the second phase has the darker shades.
    """
    row, left, top = 22, 64, 8
    scale = _pixels_per_time(simulation)
    ranks = simulation.schedule.num_ranks
    chart_width = float(simulation.makespan) * scale
    legend_top = top + ranks * row + 14
    width, height = left + max(chart_width, 640) + 8, legend_top + row
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f"<title>{escape(_title(simulation))}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for rank in range(ranks):
        y = top + rank * row
        lines.append(f'<text x="4" y="{y + 15}">rank {rank}</text>')
        lines.append(
            f'<rect x="{left}" y="{y}" width="{chart_width:.2f}" height="{row}" fill="#eeeeee"/>'
        )
    for block in _blocks(simulation):
        x, y = left + block.start * scale, top + block.rank * row
        lines += _svg_cell(x, y, block.width * scale, row, block.op, block.phase, str(block.chunk))
    for rank, start, end in _frames(simulation):
        x, y = left + start * scale, top + rank * row
        lines.append(
            f'<rect x="{x:.2f}" y="{y}" width="{(end - start) * scale:.2f}" height="{row}" '
            'fill="none" stroke="black" stroke-width="1.5"/>'
        )
    for i, (op, name) in enumerate(NAMES.items()):
        x = left + 160 * i
        lines += _svg_cell(x, legend_top, row, row, op, 0, op)
        lines.append(f'<text x="{x + row + 5}" y="{legend_top + 15}">{name}</text>')
    return "\n".join([*lines, "</svg>\n"])


def _svg_cell(
    x: float, y: float, width: float, height: float, op: str, phase: int, label: str
) -> list[str]:
    *shades, light_text = COLOURS[op]
    cell = (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="{shades[phase]}" '
        'stroke="white" stroke-width="0.5"/>'
    )
    if width < 7 * len(label) + 2:  # a digit of this font is 6 to 7 pixels wide
        return [cell]
    return [
        cell,
        f'<text x="{x + width / 2:.2f}" y="{y + 15}" text-anchor="middle" '
        f'fill="{"white" if light_text else "black"}">{label}</text>',
    ]


def _save_png(simulation: Simulation, file: Path) -> None:
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"matplotlib, which draws {str(file)!r}, is not installed: pip install matplotlib, or "
            "name a file that ends in .svg"
        ) from error
    scale = _pixels_per_time(simulation) / 100
    ranks = simulation.schedule.num_ranks
    size = (max(float(simulation.makespan) * scale, 6.4) + 1, 0.22 * ranks + 1)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for block in _blocks(simulation):
        *shades, light_text = COLOURS[block.op]
        corner, width = (block.start, block.rank - 0.5), block.width
        axes.add_patch(Rectangle(corner, width, 1, fc=shades[block.phase], ec="white", lw=0.5))
        if 100 * width * scale >= 7 * len(str(block.chunk)) + 2:
            centre = (block.start + width / 2, block.rank)
            colour = "white" if light_text else "black"
            axes.text(*centre, block.chunk, ha="center", va="center", fontsize=7, color=colour)
    for rank, start, end in _frames(simulation):
        axes.add_patch(Rectangle((start, rank - 0.5), end - start, 1, fill=False, ec="black"))
    axes.set(
        xlim=(0, float(simulation.makespan) or 1),
        ylim=(ranks - 0.5, -0.5),
        title=_title(simulation),
    )
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    handles = [Patch(color=COLOURS[op][0], label=name) for op, name in NAMES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, format="png")


def _blocks(simulation: Simulation) -> Iterator[_Block]:
    """The cells of a drawing; a pair's are cut in proportion to f and b."""
    times, schedule = simulation.times, simulation.schedule
    share = float(times.f / (times.f + times.b)) if times.f + times.b else 0.5
    for rank, spans in enumerate(simulation.spans):
        for span in spans:
            start, width = float(span.start), float(span.end - span.start)
            parts = span.action.parts
            cuts = (width * share, width * (1 - share)) if len(parts) == 2 else (width,)
            for part, cut in zip(parts, cuts, strict=True):
                yield _Block(rank, start, cut, part.op, _phase(schedule, part), part.chunk)
                start += cut


def _frames(simulation: Simulation) -> Iterator[tuple[int, float, float]]:
    """(rank, start, end) of every pair."""
    for rank, spans in enumerate(simulation.spans):
        for span in spans:
            if isinstance(span.action, Pair):
                yield rank, float(span.start), float(span.end)


def _phase(schedule: Schedule, action: Action) -> int:
    return int(action.direction == 1 or action.stage >= schedule.num_ranks)


def _shortest(simulation: Simulation) -> Time:
    """The shortest action that takes time; 1 where none does."""
    lengths = {span.end - span.start for spans in simulation.spans for span in spans}
    return min((length for length in lengths if length > 0), default=1)


def _pixels_per_time(simulation: Simulation) -> float:
    """20 pixels for the shortest action, two digits; at most 16,000 in all, which viewers open."""
    shortest, makespan = float(_shortest(simulation)), float(simulation.makespan)
    return min(20 / shortest, 16_000 / makespan) if makespan else 20.0


def _title(simulation: Simulation) -> str:
    schedule = simulation.schedule
    return (
        f"{schedule.kind}, {schedule.num_ranks} ranks, {schedule.num_chunks} chunks: "
        f"makespan {_plain(simulation.makespan):g}, bubble {_plain(max(simulation.bubble)):g}"
    )
