"""Draws docs/images/pair.svg: the two lanes of an overlapped pair, for one layer.

    python docs/lanes.py           writes the file
    python docs/lanes.py --check   exit status 1 if the file differs

Order and dependencies are those of dualpipe_ext/blocks/pair.py; widths are not to scale.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "images" / "pair.svg"

FORWARD, BACKWARD, WEIGHTS, TRANSFER = "#2f6fb7", "#c2571a", "#8a6d3b", "#5f6b76"
COMPUTE, COMM = 52, 118  # top of each lane
UNIT, LEFT, HEIGHT = 44, 148, 40


@dataclass(frozen=True)
class Segment:
    name: str
    lane: int
    start: float  # in units
    width: float
    color: str


SEGMENTS = (
    Segment("attention △", COMPUTE, 0, 3.2, FORWARD),
    Segment("mlp ▲", COMPUTE, 3.2, 3.2, BACKWARD),
    Segment("mlp ▲ weights", COMPUTE, 6.4, 3.2, WEIGHTS),
    Segment("mlp △", COMPUTE, 9.6, 2.8, FORWARD),
    Segment("attention ▲", COMPUTE, 12.4, 3.2, BACKWARD),
    Segment("attention ▲ weights", COMPUTE, 15.6, 3.6, WEIGHTS),
    Segment("combine ▲", COMM, 0, 2.6, BACKWARD),
    Segment("plan, dispatch △", COMM, 3.2, 3.0, FORWARD),
    Segment("dispatch ▲", COMM, 6.4, 2.6, BACKWARD),
    Segment("combine △", COMM, 12.4, 2.6, FORWARD),
    Segment("pipeline transfer", COMM, 15.6, 3.0, TRANSFER),
)
# The segment on the right starts when the one on the left has ended, on the other lane.
HAND_OVERS = (
    ("attention △", "plan, dispatch △"),
    ("combine ▲", "mlp ▲"),
    ("mlp ▲", "dispatch ▲"),
    ("plan, dispatch △", "mlp △"),
    ("dispatch ▲", "attention ▲"),
    ("mlp △", "combine △"),
    ("attention ▲", "pipeline transfer"),
)


def x_of(units: float) -> float:
    return LEFT + UNIT * units


def draw_segment(segment: Segment) -> str:
    x, width = x_of(segment.start), UNIT * segment.width - 3
    return (
        f'<rect x="{x:.1f}" y="{segment.lane}" width="{width:.1f}" height="{HEIGHT}" rx="4" '
        f'fill="{segment.color}"/>\n'
        f'<text x="{x + width / 2:.1f}" y="{segment.lane + 25}" text-anchor="middle" '
        f'fill="#ffffff">{segment.name}</text>'
    )


def draw_hand_over(source: Segment, target: Segment) -> str:
    down = source.lane < target.lane
    x1, x2 = x_of(source.start + source.width) - 5, x_of(target.start) + 5
    y1 = source.lane + HEIGHT if down else source.lane
    y2 = target.lane if down else target.lane + HEIGHT
    return (
        f'<line x1="{x1:.1f}" y1="{y1}" x2="{x2:.1f}" y2="{y2}" '
        'stroke="#333333" stroke-width="1.3" marker-end="url(#head)"/>'
    )


def draw() -> str:
    by_name = {segment.name: segment for segment in SEGMENTS}
    width, height = int(x_of(19.6)), 206
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="Helvetica, Arial, sans-serif" '
        'font-size="14" role="img" aria-label="Two lanes of an overlapped pair: while one '
        'micro-batch computes, the other communicates.">',
        '<defs><marker id="head" markerWidth="7" markerHeight="7" refX="6" refY="3" '
        'orient="auto"><path d="M0,0 L6,3 L0,6 z" fill="#333333"/></marker></defs>',
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
        '<text x="16" y="30" fill="#222222">One layer of an overlapped pair: △ forward of one '
        "micro-batch, ▲ backward of another</text>",
        f'<text x="16" y="{COMPUTE + 25}" fill="#222222" font-weight="bold">compute</text>',
        f'<text x="16" y="{COMM + 18}" fill="#222222" font-weight="bold">communicate</text>',
        f'<text x="16" y="{COMM + 35}" fill="#222222" font-size="12">on comm_sms SMs</text>',
        *(draw_segment(segment) for segment in SEGMENTS),
        *(draw_hand_over(by_name[a], by_name[b]) for a, b in HAND_OVERS),
        f'<text x="{LEFT}" y="190" fill="#444444" font-size="12">Arrows: an event between two '
        "streams. Weight gradients wait for nothing but their inputs, so they fill what is left. "
        "Widths are not to scale.</text>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    if parser.parse_args().check:
        if FILE.read_text() != draw():
            print(f"{FILE} is not what docs/lanes.py draws: run it", file=sys.stderr)
            return 1
        return 0
    FILE.write_text(draw())
    return 0


if __name__ == "__main__":
    sys.exit(main())
