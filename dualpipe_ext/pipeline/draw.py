"""A simulated schedule as text, SVG or PNG; needs no GPU and no torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .schedule import Action, Pair, Schedule
from .simulate import Simulation, Time, plain_number

__all__ = ["describe_simulation", "draw_text", "save_plot", "to_svg"]

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
        f"{name} {plain_number(time):g}"
        for name, time in (
            ("F", times.f),
            ("B", times.b),
            ("W", times.w),
            ("F&B", times.pair),
            ("transfer", times.p2p),
        )
    )
    makespan = plain_number(simulation.makespan)
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
        lines.append(f"{rank:>8} {plain_number(bubble):>10g} {share:>7.1%} {peak:>17}")
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
    makespan, bubble = plain_number(simulation.makespan), plain_number(max(simulation.bubble))
    return (
        f"{schedule.kind}, {schedule.num_ranks} ranks, {schedule.num_chunks} chunks: "
        f"makespan {makespan:g}, bubble {bubble:g}"
    )
