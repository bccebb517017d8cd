"""Simulated time, bubble and memory against formulas, published figures and a slow simulator."""

import json
import re
import sys
from fractions import Fraction
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext.cli import main
from dualpipe_ext.pipeline.draw import draw_text, save_plot, to_svg
from dualpipe_ext.pipeline.schedule import KINDS, Pair, build_schedule
from dualpipe_ext.pipeline.simulate import Times, predict, simulate
from tests.pipeline.test_schedule import places, sizes


def slow_simulation(kind, ranks, lists, f, b, w, fb, p2p):
    """[(start, end)] per rank from the JSON form: starts raised until no constraint is broken."""
    takes = {"F": f, "B": b, "I": b - w, "W": w, "FB": fb}
    home = {p: r for r in range(ranks) for p in places(kind, ranks, r)[0]}
    last = places(kind, ranks, 0)[1] - 1
    where = {}  # (F or I, stage, chunk, direction) -> (rank, position) that makes it
    for rank, actions in enumerate(lists):
        for i, action in enumerate(actions):
            for part in parts_of(action):
                if part["op"] != "W":
                    where[("F" if part["op"] == "F" else "I", *place(part))] = (rank, i)
    edges = []  # (before, after, transfer)
    for rank, actions in enumerate(lists):
        for i, action in enumerate(actions):
            if i:
                edges.append(((rank, i - 1), (rank, i), 0))
            for part in parts_of(action):
                stage, chunk, direction = place(part)
                if part["op"] == "F" and stage > 0:
                    transfer = p2p if home[stage - 1, direction] != rank else 0
                    edges.append((where["F", stage - 1, chunk, direction], (rank, i), transfer))
                if part["op"] in "BI" and stage < last:
                    transfer = p2p if home[stage + 1, direction] != rank else 0
                    edges.append((where["I", stage + 1, chunk, direction], (rank, i), transfer))
    start = {(r, i): 0 for r, actions in enumerate(lists) for i in range(len(actions))}
    changed = True
    while changed:
        changed = False
        for before, after, transfer in edges:
            ready = start[before] + takes[lists[before[0]][before[1]]["op"]] + transfer
            if ready > start[after]:
                start[after], changed = ready, True
    return [
        [(start[r, i], start[r, i] + takes[action["op"]]) for i, action in enumerate(actions)]
        for r, actions in enumerate(lists)
    ]


def parts_of(action):
    return [action["forward"], action["backward"]] if action["op"] == "FB" else [action]


def place(part):
    return part["stage"], part["chunk"], part["direction"]


def slow_peak(actions, spans):
    """Most activations alive at any moment, from the clock alone."""
    born, freed = {}, {}
    for action, (start, end) in zip(actions, spans, strict=True):
        for part in parts_of(action):
            if part["op"] == "F":
                born[place(part)] = start
            elif part["op"] in "BW":
                freed[place(part)] = end
    return max(sum(born[p] <= t < freed[p] for p in born) for t in born.values())


@settings(max_examples=40, deadline=None)
@given(
    sizes(max_ranks=6),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 20),
    st.integers(0, 5),
)
def test_clock_bubble_and_memory_equal_a_slow_simulator(size, f, i, w, fb, p2p):
    kind, ranks, _ = size
    found = simulate(build_schedule(*size), Times(f=f, b=i + w, w=w, fb=fb, p2p=p2p))
    lists = found.as_dict()["actions"]
    expected = slow_simulation(kind, ranks, lists, f, i + w, w, fb, p2p)
    assert [[(s.start, s.end) for s in spans] for spans in found.spans] == expected
    assert found.makespan == max(end for spans in expected for _, end in spans)
    busy = [sum(end - start for start, end in spans) for spans in expected]
    assert found.bubble == tuple(found.makespan - b for b in busy)
    assert found.peak_activations == tuple(map(slow_peak, lists, expected))


@settings(max_examples=40, deadline=None)
@given(sizes(), st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
def test_bubble_formulas(size, f, i, w):
    """The published ones with F&B = F+B, and what takes their place beyond their reach."""
    kind, ranks, chunks = size
    b = i + w
    found = simulate(build_schedule(*size), Times(f=f, b=b, w=w))
    work = chunks * (f + b) * (2 if kind in ("zbv", "dualpipev") else 1)
    assert found.bubble == (found.makespan - work,) * ranks
    bubble = found.bubble[0]
    half = ranks // 2 if kind == "dualpipe" else ranks
    if kind == "1f1b":
        assert bubble == (ranks - 1) * (f + b)
    elif kind == "zb1p":
        if chunks >= ranks:
            assert bubble == (ranks - 1) * (f + i - min(f, i, w))
        if chunks >= ranks and w <= min(f, i):
            assert bubble == (ranks - 1) * (f + b - 2 * w)
    elif kind == "zbv":
        assert bubble >= (ranks - 1) * f
    elif w <= i:
        table = (half - 1) * ((f + b) + b - 3 * w)
        if f == i:
            assert bubble == table
        elif f < i:
            assert bubble == table - min(f, (half - 1) * (i - f))
        else:
            assert bubble == table + (half - 1) * (f - i)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_table_at_the_papers_sizes(ranks):
    """F=W=1, B=2, F&B=3, for every kind: bubble, and most activations, which are in stages."""
    chunks = 20 * ranks
    rows = {kind: simulate(build_schedule(kind, ranks, chunks)) for kind in KINDS[:4]}
    found = {kind: (set(s.bubble), max(s.peak_activations)) for kind, s in rows.items()}
    assert found == {
        "1f1b": ({3 * (ranks - 1)}, ranks),
        "zb1p": ({ranks - 1}, ranks),
        "zbv": ({ranks - 1}, 2 * ranks),
        "dualpipev": ({2 * (ranks - 1)}, 2 * ranks + 1),
    }
    two_ways = simulate(build_schedule("dualpipe", 2 * ranks, chunks))
    assert set(two_ways.bubble) == {2 * (ranks - 1)}
    assert set(two_ways.peak_activations) == {2 * ranks + 1}


def test_backward_for_inputs_shorter_than_for_weights_leaves_zb1p_the_fill():
    found = simulate(build_schedule("zb1p", 4, 12), Times(f=4, b=7, w=5))
    assert found.bubble == (12, 12, 12, 12)


def test_makespans_of_four_ranks_and_16_chunks():
    """Computed elsewhere. Times are of half a rank's layers; 1f1b's stages take twice as long."""
    kinds = ("1f1b", "zbv", "dualpipev")
    assert [s.makespan for s in predict(4, 16, kinds=kinds)] == [114, 99, 102]
    overlapped = Times(f=1, b=2, w=1, fb=Fraction(5, 2))
    assert [s.makespan for s in predict(4, 16, overlapped, kinds=kinds)] == [114, 99, 89]


@pytest.mark.parametrize("kind", ["1f1b", "zb1p", "zbv", "dualpipev"])
def test_one_rank_has_no_bubble_whatever_a_transfer_takes(kind):
    found = simulate(build_schedule(kind, 1, 6), Times(f=3, b=7, w=2, fb=8, p2p=100))
    assert found.bubble == (0,)


def test_a_transfer_delays_only_what_crosses_ranks():
    """One chunk goes down and up the V of three ranks: 4 of its 5 hand-overs each way cross."""
    found = simulate(build_schedule("zbv", 3, 1), Times(f=1, b=2, w=0, p2p=10))
    assert found.makespan == 6 * (1 + 2) + 2 * 4 * 10


def test_communication_model():
    """Compute 1 + 2, communication half of it: 0.75 each way, hidden, half hidden, shown."""
    half = Fraction(1, 2)
    times = Times(f=1, b=2, w=1, p2p=3).with_communication(half)
    assert (times.f, times.b, times.w, times.fb, times.p2p) == (1.75, 2.75, 1, 3, 3)
    assert Times().with_communication(half, hidden=half).fb == 3.75
    assert Times().with_communication(half, hidden=0).fb == 4.5 == times.f + times.b
    assert Times().with_communication(2).fb == 6  # the longer one is the communication


def test_prediction_for_64_ranks():
    """Nothing hidden is F&B = F+B; hidden, only pairs gain, and all they can: the communication."""
    ratio, kinds = Fraction(1, 2), ("1f1b", "dualpipev")
    plain, shown = predict(64, 128, ratio=ratio, hidden=0, kinds=kinds)
    assert plain.bubble[0] == 63 * 2 * (1 + 2) * (1 + ratio)
    assert shown.schedule.num_stages == 128
    same, hidden = predict(64, 128, ratio=ratio, kinds=kinds)
    assert same.makespan == plain.makespan
    pairs = [sum(isinstance(a, Pair) for a in row) for row in hidden.schedule.actions]
    for rank, count in enumerate(pairs):
        busy = hidden.makespan - hidden.bubble[rank]
        assert busy == shown.makespan - shown.bubble[rank] - count * 3 * ratio
    assert hidden.makespan < shown.makespan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Times(f=-1), "f=-1: must be a finite time, 0 or more"),
        (lambda: Times(p2p=float("inf")), "p2p=inf: must be a finite time"),
        (lambda: Times(fb=float("nan")), "fb=nan: must be a finite time"),
        (lambda: Times(b=1, w=2), "w=2 is more than b=1: b is the full backward"),
        (lambda: Times().with_communication(-1), "ratio=-1: must be"),
        (lambda: Times().with_communication(1, hidden=2), "hidden=2: must be a share from 0 to 1"),
    ],
)
def test_times_that_cannot_be(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)


def test_text_of_a_small_schedule():
    found = simulate(build_schedule("1f1b", 2, 2), Times(f=1, b=2))
    assert draw_text(found).splitlines() == [
        "rank 0 F0 F1 ......B0    ...B1    ",
        "rank 1 ...F0 B0    F1 B1    ......",
    ]


def test_text_of_pairs_and_phases_and_of_narrow_terminals():
    found = simulate(build_schedule("dualpipev", 1, 2), Times(f=1, b=2, w=1, fb=2))
    assert draw_text(found) == "rank 0 F0 f0 F1 b0    f1B0  b1    I1 W1 "
    assert draw_text(found, width=7 + 11) == "rank 0 FfFb0& b1IW"
    with pytest.raises(ValueError, match="width=7: the ranks' names take 7 columns"):
        draw_text(found, width=7)


@settings(max_examples=15, deadline=None)
@given(sizes(max_ranks=12), st.integers(20, 200))
def test_text_fits_its_width(size, width):
    lines = draw_text(simulate(build_schedule(*size)), width=width).splitlines()
    assert len(lines) == size[1]
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= width


@pytest.mark.parametrize("kind", KINDS)
def test_svg_shows_every_action_to_scale(kind):
    found = simulate(build_schedule(kind, 4, 8), Times(f=1, b=2, w=1, fb=2, p2p=1))
    root = ElementTree.fromstring(to_svg(found))
    rects = [node.attrib for node in root if node.tag.endswith("rect")]
    rows = [r for r in rects if r["fill"] == "#eeeeee"]
    assert len(rows) == 4
    pixels = float(rows[0]["width"]) / found.makespan
    for rank, (row, spans) in enumerate(zip(rows, found.spans, strict=True)):
        cells = [
            r for r in rects if r.get("y") == row["y"] and r["fill"] not in ("#eeeeee", "none")
        ]
        assert len(cells) == sum(len(span.action.parts) for span in spans)
        drawn = sum(float(cell["width"]) for cell in cells) / pixels
        assert drawn == pytest.approx(found.makespan - found.bubble[rank], abs=0.05)
        frames = [r for r in rects if r.get("y") == row["y"] and r["fill"] == "none"]
        paired = [span for span in spans if isinstance(span.action, Pair)]
        starts = [float(row["x"]) + span.start * pixels for span in paired]
        assert [float(frame["x"]) for frame in frames] == pytest.approx(starts, abs=0.05)


def test_plots_by_suffix(tmp_path, monkeypatch):
    found = simulate(build_schedule("dualpipe", 4, 8))
    save_plot(found, tmp_path / "schedule.SVG")
    assert (tmp_path / "schedule.SVG").read_text() == to_svg(found)
    with pytest.raises(ValueError, match=r"plan\.pdf.*ends in \.svg or \.png"):
        save_plot(found, tmp_path / "plan.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install matplotlib, or name .*\.svg"):
        save_plot(found, tmp_path / "schedule.png")


def test_png_through_matplotlib(tmp_path):
    pytest.importorskip("matplotlib")
    save_plot(simulate(build_schedule("dualpipev", 2, 4)), tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


def run(capsys, *arguments):
    status = main(["schedule", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_command_json(capsys, tmp_path):
    arguments = ("dualpipev", "--ranks", "4", "--chunks", "16", "--fb", "2.5", "--json")
    plot = tmp_path / "v.svg"
    status, out, err = run(capsys, *arguments, "--plot", str(plot))
    assert (status, err) == (0, "")
    found = json.loads(out)
    keys = "kind num_ranks num_chunks num_stages times makespan bubble peak_activations actions"
    assert list(found) == keys.split()
    assert found["times"] == {"f": 1, "b": 2, "w": 1, "fb": 2.5, "p2p": 0}
    assert found["makespan"] == 89
    assert found["bubble"] == [3.5, 4, 4.5, 4.5]
    assert found["peak_activations"] == [9, 9, 9, 9]
    assert found["actions"][3][8:10] == [
        {"op": "F", "stage": 3, "chunk": 4, "direction": 0},
        {"op": "B", "stage": 4, "chunk": 0, "direction": 0},
    ]
    assert found["actions"][3][10] == {
        "op": "FB",
        "forward": {"op": "F", "stage": 4, "chunk": 4, "direction": 0},
        "backward": {"op": "B", "stage": 3, "chunk": 0, "direction": 0},
    }
    assert plot.read_text().startswith("<svg")


def test_command_for_people(capsys):
    arguments = ("zbv", "--ranks", "2", "--chunks", "4", "--p2p", "1/2", "--comm-ratio", "0.5")
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    first, *_, upper, lower = out.splitlines()
    sizes_shown = "zbv: 2 ranks, 4 stages, 4 chunks; F 1.75, B 2.75, W 1, F&B 3, transfer 0.5"
    assert first == sizes_shown
    assert re.match(r"rank 0 F0", upper)
    assert lower.startswith("rank 1 ..")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("gpipe --ranks 2 --chunks 4", "unknown schedule 'gpipe': choose one of"),
        ("dualpipe --ranks 3 --chunks 8", "num_ranks=3 is odd"),
        ("dualpipev --ranks 2 --chunks 3", "num_chunks=3 is less than 2 x num_ranks = 4"),
        ("1f1b --ranks 2 --chunks 4 --w 5", "w=5 is more than b=2"),
        ("1f1b --ranks 2 --chunks 4 --fb 3 --comm-ratio 1", "leave one out"),
        ("1f1b --ranks 2 --chunks 4 --plot x.pdf", "ends in .svg or .png"),
        ("1f1b --ranks 2 --chunks 4 --plot /nowhere/x.svg", "/nowhere/x.svg"),
    ],
)
def test_command_errors(capsys, arguments, message):
    status, out, err = run(capsys, *arguments.split())
    assert (status, out) == (2, "")
    assert err.startswith("dualpipe-ext schedule: ")
    assert message in err
