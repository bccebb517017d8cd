"""Schedules against DeepSeek's loops, a list written by hand, and ranks that pass messages."""

import ast
from collections import Counter, defaultdict, deque
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext.pipeline.schedule import KINDS, Action, Pair, Schedule, build_schedule


@st.composite
def sizes(draw, max_ranks=32, kinds=KINDS):
    """(kind, num_ranks, num_chunks) that the kind allows."""
    kind = draw(st.sampled_from(kinds))
    if kind == "dualpipe":
        ranks = 2 * draw(st.integers(1, max_ranks // 2))
        return kind, ranks, 2 * ranks + 2 * draw(st.integers(0, 6))
    ranks = draw(st.integers(1, max_ranks))
    least = 2 * ranks if kind == "dualpipev" else 1
    return kind, ranks, least + draw(st.integers(0, 40 if least == 1 else 12))


def places(kind, ranks, rank):
    """(stage, direction) that a rank runs, and the number of stages, apart from the package."""
    if kind in ("1f1b", "zb1p"):
        return [(rank, 0)], ranks
    if kind == "dualpipe":
        return [(rank, 0), (ranks - 1 - rank, 1)], ranks
    return [(rank, 0), (2 * ranks - 1 - rank, 0)], 2 * ranks


def run_with_messages(kind, ranks, chunks, lists):
    """Runs the JSON form by passing named messages through first-in-first-out channels.

    A rank receives from a channel only what is at its head, so a wrong order fails as a wrong name.
    """
    home = {p: r for r in range(ranks) for p in places(kind, ranks, r)[0]}
    last = places(kind, ranks, 0)[1] - 1
    channels = defaultdict(deque)
    forwarded, graded = set(), set()
    heads = [0] * ranks

    def receive(rank, tensor, stage, chunk, direction, neighbour, commit):
        source = home[neighbour, direction]
        if source == rank:
            return (neighbour, chunk, direction) in (forwarded if tensor == "x" else graded)
        channel = channels[source, rank, tensor, direction]
        if not channel:
            return False
        assert channel[0] == (stage, chunk), f"rank {rank} wants {stage, chunk}: {channel[0]}"
        if commit:
            channel.popleft()
        return True

    def ready(rank, op, stage, chunk, direction, commit):
        where = (stage, chunk, direction)
        if op == "W":
            return where in graded
        if op == "F":
            return stage == 0 or receive(rank, "x", *where, stage - 1, commit)
        return where in forwarded and (
            stage == last or receive(rank, "g", *where, stage + 1, commit)
        )

    def finish(rank, op, stage, chunk, direction):
        if op == "W":
            return
        (forwarded if op == "F" else graded).add((stage, chunk, direction))
        other, tensor = (stage + 1, "x") if op == "F" else (stage - 1, "g")
        if 0 <= other <= last and home[other, direction] != rank:
            channels[rank, home[other, direction], tensor, direction].append((other, chunk))

    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(lists):
            while heads[rank] < len(actions):
                entry = actions[heads[rank]]
                parts = [entry["forward"], entry["backward"]] if entry["op"] == "FB" else [entry]
                fields = [[p[k] for k in ("op", "stage", "chunk", "direction")] for p in parts]
                for op, stage, chunk, direction in fields:
                    assert home[stage, direction] == rank
                    assert (stage, chunk, direction) not in (graded if op in "BI" else ())
                if not all(ready(rank, *f, commit=False) for f in fields):
                    break
                assert all(ready(rank, *f, commit=True) for f in fields)
                for f in fields:
                    finish(rank, *f)
                heads[rank] += 1
                progress = True
    assert heads == [len(actions) for actions in lists], "deadlock"
    assert not any(channels.values()), "sent and never received"


def test_small_dualpipev_is_the_one_written_by_hand():
    expected = [
        "F0 F1 F2 f0 i0 w0 f1 F3&b1 f2&B0 b2 f3&B1 b3 I2 W2 I3 W3",
        "F0 f0 F1 f1 F2 b0 f2&B0 F3&b1 f3&B1 b2 B2 i3 I3 w3 W3",
    ]
    schedule = build_schedule("dualpipev", 2, 4)

    def short(part):
        letter = part.op.lower() if part.stage >= 2 else part.op
        return f"{letter}{part.chunk}"

    found = [" ".join("&".join(map(short, a.parts)) for a in row) for row in schedule.actions]
    assert found == expected


def deepseek_loops(num_ranks, rank, num_chunks):
    """step() of DeepSeek's dualpipev.py, with its names, as a log: phases only."""
    log, queue = [], deque()

    def backward(phase, enable_zb=False):
        log.append(("I" if enable_zb else "B", phase))
        if enable_zb:
            queue.append(phase)

    def weight():
        log.append(("W", queue.popleft()))

    for _ in range((num_ranks - rank - 1) * 2):
        log.append(("F", 0))
    for _ in range(rank + 1):
        log.extend([("F", 0), ("F", 1)])
    for _ in range(num_ranks - rank - 1):
        backward(1, enable_zb=True)
        weight()
        log.append(("F", 1))
    for i in range(num_chunks - num_ranks * 2 + rank + 1):
        if i == 0 and rank == num_ranks - 1:
            log.append(("F", 0))
            backward(1)
        else:
            log.append(("FB", 0, 1))
        log.append(("FB", 1, 0))
    for _ in range(num_ranks - rank - 1):
        backward(1)
        log.append(("FB", 1, 0))
    step_6 = rank + 1
    enable_zb = False
    for i in range(step_6):
        if i == step_6 // 2 and rank % 2 == 1:
            enable_zb = True
        backward(1, enable_zb=enable_zb)
        if i == step_6 // 2 and rank % 2 == 0:
            enable_zb = True
        backward(0, enable_zb=enable_zb)
    for _ in range(num_ranks - rank - 1):
        weight()
        backward(0, enable_zb=True)
    for _ in range(rank + 1):
        weight()
    assert not queue
    return log


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("kind", ["dualpipev", "dualpipe"])
def test_dualpipe_follows_deepseeks_code(kind, num_ranks):
    """For dualpipe num_ranks and num_chunks count one half: ranks r and P-1-r mirror each other."""
    halves = 2 if kind == "dualpipe" else 1
    for num_chunks in (2 * num_ranks, 2 * num_ranks + 5):
        schedule = build_schedule(kind, halves * num_ranks, halves * num_chunks)
        for rank, actions in enumerate(schedule.actions):
            r = min(rank, halves * num_ranks - 1 - rank) if halves == 2 else rank

            def phase(action, upper=r != rank):
                if kind == "dualpipev":
                    return int(action.stage >= num_ranks)
                return action.direction ^ upper

            log = [
                ("FB", phase(a.forward), phase(a.backward))
                if isinstance(a, Pair)
                else (a.op, phase(a))
                for a in actions
            ]
            assert log == deepseek_loops(num_ranks, r, num_chunks)


@settings(max_examples=60, deadline=None)
@given(sizes())
def test_every_schedule_trains_every_chunk_once_and_cannot_hang(size):
    kind, ranks, chunks = size
    schedule = build_schedule(*size)
    schedule.validate()
    lists = [[action.as_dict() for action in actions] for actions in schedule.actions]
    run_with_messages(kind, ranks, chunks, lists)

    per_direction = chunks // 2 if kind == "dualpipe" else chunks
    for rank, actions in enumerate(lists):
        flat = [
            p for a in actions for p in ([a["forward"], a["backward"]] if "forward" in a else [a])
        ]
        ran = defaultdict(str)
        for part in flat:
            ran[part["stage"], part["chunk"], part["direction"]] += part["op"]
        held, _ = places(kind, ranks, rank)
        assert set(ran) == {(s, c, d) for s, d in held for c in range(per_direction)}
        assert set(ran.values()) <= {"FB", "FIW"}
        assert Counter(stage for stage, _ in held) == Counter(schedule.stages_of(rank))


@settings(max_examples=20, deadline=None)
@given(sizes(max_ranks=12))
def test_transfers_join_the_actions_that_make_and_need_them(size):
    kind, ranks, _ = size
    schedule = build_schedule(*size)
    transfers = schedule.transfers()
    for t in transfers:
        op = "F" if t.tensor == "activation" else "BI"
        made = [p for p in schedule.actions[t.source][t.sent_after].parts if p.op in op]
        needed = [p for p in schedule.actions[t.target][t.needed_by].parts if p.op in op]
        step = 1 if t.tensor == "activation" else -1
        assert [(p.stage, p.chunk, p.direction) for p in made] == [(t.stage, t.chunk, t.direction)]
        assert [(p.stage, p.chunk, p.direction) for p in needed] == [
            (t.stage + step, t.chunk, t.direction)
        ]
        assert abs(t.source - t.target) == 1
    stages = places(kind, ranks, 0)[1]
    crossings = stages - 1 - (stages > ranks)  # the V turns around inside its last rank
    assert len(transfers) == len(set(transfers)) == 2 * crossings * schedule.num_chunks
    for source in range(ranks):
        sent = [t.sent_after for t in transfers if t.source == source]
        assert sent == sorted(sent)


def edited(schedule, rank, change):
    """`schedule` with change(list of the rank's actions) applied."""
    lists = [list(actions) for actions in schedule.actions]
    change(lists[rank])
    return replace(schedule, actions=tuple(map(tuple, lists)))


def position(schedule, rank, op, chunk):
    return next(
        i
        for i, action in enumerate(schedule.actions[rank])
        if isinstance(action, Action) and (action.op, action.chunk) == (op, chunk)
    )


def swap(schedule, rank, first, second):
    i, j = position(schedule, rank, *first), position(schedule, rank, *second)

    def change(actions):
        actions[i], actions[j] = actions[j], actions[i]

    return edited(schedule, rank, change)


F1B1, ZB1P = build_schedule("1f1b", 2, 4), build_schedule("zb1p", 2, 4)
V = build_schedule("dualpipev", 2, 4)
BROKEN = {
    "left out": (edited(F1B1, 1, lambda a: a.pop()), "rank 1 runs F of stage 1, chunk 3"),
    "W left out": (edited(ZB1P, 0, lambda a: a.pop()), "rank 0 runs F, I of stage 0, chunk 3"),
    "nothing of a chunk": (
        replace(F1B1, num_chunks=5),
        "rank 0 runs nothing of stage 0, chunk 4",
    ),
    "twice": (edited(F1B1, 0, lambda a: a.append(a[-1])), "comes after F, B: a chunk runs F, B"),
    "B before F": (swap(F1B1, 1, ("F", 0), ("B", 0)), "comes after nothing"),
    "W before I": (swap(ZB1P, 1, ("I", 3), ("W", 3)), "W of stage 1, chunk 3, direction 0 comes"),
    "W after B": (
        edited(F1B1, 0, lambda a: a.append(Action("W", 0, 3))),
        "W of stage 0, chunk 3, direction 0 comes after F, B",
    ),
    "other rank": (replace(F1B1, actions=F1B1.actions[::-1]), "stage 1 runs on rank 1, move it"),
    "order of sends": (swap(F1B1, 0, ("F", 0), ("F", 1)), "before chunk 0, rank 1 takes chunk 0"),
    "unknown op": (edited(F1B1, 0, lambda a: a.append(Action("X", 0, 3))), "op='X', choose one"),
    "stage": (edited(F1B1, 0, lambda a: a.append(Action("F", 2, 3))), "stage=2, must be 0 to 1"),
    "chunk": (edited(F1B1, 0, lambda a: a.append(Action("F", 0, 4))), "chunk=4, must be 0 to 3"),
    "negative": (edited(F1B1, 0, lambda a: a.append(Action("F", 0, -1))), "chunk=-1, must be"),
    "direction": (
        edited(F1B1, 0, lambda a: a.append(Action("F", 0, 3, 1))),
        "direction=1, must be 0 to 0",
    ),
    "pair of forwards": (
        edited(V, 0, lambda a: a.append(Pair(Action("F", 0, 3), Action("F", 3, 3)))),
        "joins F and F: a pair is an F and a B",
    ),
    "lists": (replace(F1B1, actions=F1B1.actions[:1]), "1 lists of actions for 2 ranks"),
    "kind": (replace(F1B1, kind="gpipe"), "unknown schedule 'gpipe'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_validate_names_what_is_broken(name):
    schedule, message = BROKEN[name]
    with pytest.raises(ValueError) as caught:
        schedule.validate()
    assert message in str(caught.value)


def test_validate_finds_a_deadlock_and_names_who_waits_for_what():
    """Each rank wants the other's result first; every action is there once and in local order."""
    f, b = ([Action(op, stage, 0) for stage in (0, 1)] for op in "FB")
    f1, b1 = ([Action(op, stage, 1) for stage in (0, 1)] for op in "FB")
    stuck = Schedule("1f1b", 2, 2, ((f[0], b[0], f1[0], b1[0]), (f[1], f1[1], b[1], b1[1])))
    with pytest.raises(ValueError) as caught:
        stuck.validate()
    message = str(caught.value)
    assert "deadlock" in message
    assert "rank 0, position 1: B of stage 0, chunk 0, direction 0 for the gradient" in message
    assert "rank 1, position 1: F of stage 1, chunk 1, direction 0 for the activation" in message


def test_a_pair_whose_halves_need_each_other_is_a_deadlock():
    one = Schedule("1f1b", 1, 1, ((Pair(Action("F", 0, 0), Action("B", 0, 0)),),))
    with pytest.raises(ValueError, match="deadlock"):
        one.validate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpipe", 2, 4), "unknown schedule 'gpipe': choose one of 1f1b, zb1p, zbv, dualpipev"),
        (("1f1b", 0, 4), "num_ranks=0: must be a whole number, 1 or more"),
        (("zbv", 2, 0), "num_chunks=0: must be a whole number, 1 or more"),
        (("zb1p", 2.0, 4), "num_ranks=2.0: must be a whole number"),
        (("dualpipe", 3, 8), "num_ranks=3 is odd: dualpipe needs an even number, dualpipev takes"),
        (("dualpipe", 2, 5), "num_chunks=5 is odd: dualpipe splits the chunks between two"),
        (("dualpipe", 4, 6), "num_chunks=6 is less than 2 x num_ranks = 8"),
        (("dualpipev", 4, 7), "num_chunks=7 is less than 2 x num_ranks = 8"),
        (("dualpipev", 1, 1), "use 2 chunks or more, or the schedule zbv"),
    ],
)
def test_sizes_that_a_kind_refuses(arguments, message):
    with pytest.raises(ValueError) as caught:
        build_schedule(*arguments)
    assert message in str(caught.value)


def test_schedules_are_values():
    schedule = build_schedule("DualPipe", 2, 4)
    assert schedule == build_schedule("dualpipe", 2, 4)
    assert hash(schedule) == hash(build_schedule("dualpipe", 2, 4))
    assert repr(schedule) == "Schedule('dualpipe', num_ranks=2, num_chunks=4, 16 actions)"
    with pytest.raises(AttributeError):
        schedule.num_ranks = 4


@pytest.mark.parametrize("module", ["schedule", "simulate", "draw"])
def test_modules_import_neither_torch_nor_the_rest_of_the_package(module):
    file = Path(__file__).parents[2] / "dualpipe_ext" / "pipeline" / f"{module}.py"
    allowed = {"collections", "dataclasses", "fractions", "html", "math", "pathlib", "typing"}
    allowed |= {"matplotlib"}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            name = node.module.split(".")[0]
            assert (name in ("schedule", "simulate")) if node.level else (name in allowed)
