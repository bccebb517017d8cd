"""Pipeline schedules as plain data: which rank runs what, in which order.

Letters: R pipeline ranks, r this rank, M micro-batches (chunks). F forward, B full backward (inputs
and weights), I backward for inputs only, W backward for weights of the oldest chunk that had an I,
F&B an overlapped pair of a forward and a full backward.

    kind       stages  of rank r  M            after
    1f1b       R       r          >= 1         PipeDream-Flush, Narayanan et al. 2021
    zb1p       R       r          >= 1         ZB-H1, Qi et al. 2024, arXiv 2401.10241
    zbv        2R      r, 2R-1-r  >= 1         ZB-V, Qi et al. 2024, arXiv 2405.15362
    dualpipev  2R      r, 2R-1-r  >= 2R        DualPipeV, DeepSeek 2025 (DualPipe cut in half)
    dualpipe   R even  r, R-1-r   even, >= 2R  DualPipe, DeepSeek-V3 2024

Every kind but dualpipe has one direction, 0, even where a rank holds two stages. In dualpipe half
of the chunks enter at rank 0 (direction 0) and half at rank R-1 (direction 1), so direction 1 runs
stage s on rank R-1-s; chunks are numbered from 0 in each direction.

Nothing here imports torch.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["KINDS", "Action", "Pair", "Schedule", "Transfer", "build_schedule"]

KINDS = ("1f1b", "zb1p", "zbv", "dualpipev", "dualpipe")
OPS = ("F", "B", "I", "W")
A_CHUNK_RUNS = "a chunk runs F, B or F, I, W, once each"

Key = tuple[str, int, int, int]
"""A result that others wait for: "F" for an activation or "I" for the gradient of a stage's inputs,
which B and I make alike; then stage, chunk and direction."""


@dataclass(frozen=True, slots=True)
class Action:
    """One forward ("F"), full backward ("B"), backward for inputs ("I") or for weights ("W")."""

    op: str
    stage: int
    chunk: int
    direction: int = 0

    def __str__(self) -> str:
        return f"{self.op} of stage {self.stage}, chunk {self.chunk}, direction {self.direction}"

    @property
    def parts(self) -> tuple["Action", ...]:
        return (self,)

    @property
    def makes(self) -> Key | None:
        """What this action hands to others; None for W."""
        if self.op == "W":
            return None
        return ("F" if self.op == "F" else "I", self.stage, self.chunk, self.direction)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Pair:
    """An overlapped pair: starts when the inputs of both are there, hands on both at its end."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"pair ({self.forward} | {self.backward})"

    @property
    def parts(self) -> tuple[Action, ...]:
        return (self.forward, self.backward)

    def as_dict(self) -> dict[str, Any]:
        return {"op": "FB", **asdict(self)}


@dataclass(frozen=True, slots=True)
class Transfer:
    """One tensor from a rank to a neighbour.

    `tensor` is "activation" or "gradient", made by `stage` for `chunk` in `direction`. The source
    can send when action `sent_after` of its list has run; the target waits for it before action
    `needed_by` of its own list.
    """

    tensor: str
    source: int
    target: int
    stage: int
    chunk: int
    direction: int
    sent_after: int
    needed_by: int


@dataclass(frozen=True)
class Schedule:
    """What every rank runs, in order: `actions[rank]` is a tuple of `Action` and `Pair`.

    `num_chunks` counts the micro-batches of all directions. See the module for stages per kind.
    """

    kind: str
    num_ranks: int
    num_chunks: int
    actions: tuple[tuple[Action | Pair, ...], ...]

    def __repr__(self) -> str:
        sizes = f"num_ranks={self.num_ranks}, num_chunks={self.num_chunks}"
        return f"Schedule({self.kind!r}, {sizes}, {sum(map(len, self.actions))} actions)"

    @property
    def num_stages(self) -> int:
        return 2 * self.num_ranks if self.kind in ("zbv", "dualpipev") else self.num_ranks

    @property
    def num_directions(self) -> int:
        return 2 if self.kind == "dualpipe" else 1

    @property
    def chunks_per_direction(self) -> int:
        return self.num_chunks // self.num_directions

    def rank_of(self, stage: int, direction: int = 0) -> int:
        """The rank that runs `stage` for chunks of `direction`."""
        if direction == 1:
            return self.num_ranks - 1 - stage
        return stage if stage < self.num_ranks else 2 * self.num_ranks - 1 - stage

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that `rank` holds: the one of direction 0's way in first.

        For example rank 1 of four holds (1,) in 1f1b, (1, 6) in dualpipev and (1, 2) in dualpipe.
        """
        if self.kind in ("zbv", "dualpipev"):
            return (rank, 2 * self.num_ranks - 1 - rank)
        return (rank, self.num_ranks - 1 - rank) if self.kind == "dualpipe" else (rank,)

    def waits_for(self, action: Action) -> tuple[Key, ...]:
        """The results that must exist before `action` starts, the same rank's own included."""
        stage, rest = action.stage, (action.chunk, action.direction)
        if action.op == "F":
            return (("F", stage - 1, *rest),) if stage > 0 else ()
        if action.op == "W":
            return (("I", stage, *rest),)
        own = ("F", stage, *rest)
        return (own, ("I", stage + 1, *rest)) if stage + 1 < self.num_stages else (own,)

    def dependency_order(self) -> Iterator[tuple[int, int]]:
        """(rank, position) of every action, each after all that it waits for.

        Ranks run their lists in order and wait for receives only: sends are asynchronous. Raises
        ValueError when no rank can go on, naming what the blocked ranks wait for.
        """
        done: set[Key] = set()
        blocked: dict[Key, list[int]] = {}
        positions = [0] * self.num_ranks
        runnable = deque(range(self.num_ranks))
        while runnable:
            rank = runnable.popleft()
            while positions[rank] < len(self.actions[rank]):
                parts = self.actions[rank][positions[rank]].parts
                keys = (key for part in parts for key in self.waits_for(part))
                missing = next((key for key in keys if key not in done), None)
                if missing is not None:
                    blocked.setdefault(missing, []).append(rank)
                    break
                yield rank, positions[rank]
                positions[rank] += 1
                for part in parts:
                    made = part.makes
                    if made is not None:
                        done.add(made)
                        runnable.extend(blocked.pop(made, ()))
        if blocked:
            raise ValueError(self._deadlock_message(blocked, positions))

    def transfers(self) -> tuple[Transfer, ...]:
        """Every tensor that crosses ranks, in the order in which each source sends.

        A runtime whose receives match by order (NCCL) posts those from one source in the order
        given here. Raises KeyError for a schedule that `validate` refuses for missing actions.
        """
        needed_by = {}
        for rank, actions in enumerate(self.actions):
            for position, action in enumerate(actions):
                for part in action.parts:
                    for key in self.waits_for(part):
                        if self._rank_of_key(key) != rank:
                            needed_by[key] = (rank, position)
        found = []
        for rank, actions in enumerate(self.actions):
            for position, action in enumerate(actions):
                for part in action.parts:
                    made = part.makes
                    if made is None or not self._leaves_rank(made):
                        continue
                    tensor = "activation" if made[0] == "F" else "gradient"
                    target, needed = needed_by[made]
                    found.append(Transfer(tensor, rank, target, *made[1:], position, needed))
        return tuple(found)

    def validate(self) -> None:
        """Raise ValueError unless this schedule trains every chunk correctly and cannot hang.

        Proves that each (stage, chunk, direction) has one F and either one B or one I and one W, on
        the rank that holds the stage and in dependency order; that a pair joins an F and a B; that
        every send has its receive, both ends seeing one order per kind of tensor; no deadlock.
        """
        if self.kind not in KINDS:
            raise ValueError(f"unknown schedule {self.kind!r}: choose one of {', '.join(KINDS)}")
        if len(self.actions) != self.num_ranks:
            raise ValueError(
                f"{len(self.actions)} lists of actions for {self.num_ranks} ranks: give each one"
            )
        for rank, actions in enumerate(self.actions):
            self._check_places(rank, actions)
            self._check_once(rank, actions)
        self._check_transfers()
        for _ in self.dependency_order():
            pass

    def _check_places(self, rank: int, actions: tuple[Action | Pair, ...]) -> None:
        """Every action is known, in range and at home on `rank`."""
        for position, action in enumerate(actions):
            where = f"rank {rank}, position {position}: {action}"
            ops = [part.op for part in action.parts]
            if len(ops) == 2 and ops != ["F", "B"]:
                raise ValueError(f"{where} joins {ops[0]} and {ops[1]}: a pair is an F and a B")
            for part in action.parts:
                if part.op not in OPS:
                    raise ValueError(f"{where}: op={part.op!r}, choose one of {', '.join(OPS)}")
                for name, value, limit in (
                    ("stage", part.stage, self.num_stages),
                    ("chunk", part.chunk, self.chunks_per_direction),
                    ("direction", part.direction, self.num_directions),
                ):
                    if not 0 <= value < limit:
                        raise ValueError(f"{where}: {name}={value}, must be 0 to {limit - 1}")
                home = self.rank_of(part.stage, part.direction)
                if home != rank:
                    raise ValueError(f"{where}: stage {part.stage} runs on rank {home}, move it")

    def _check_once(self, rank: int, actions: tuple[Action | Pair, ...]) -> None:
        """F, then B or I, then W after an I, once each for all chunks of this rank's stages."""
        seen: dict[tuple[int, int, int], str] = {}
        for position, action in enumerate(actions):
            for part in action.parts:
                place = (part.stage, part.chunk, part.direction)
                before = seen.get(place, "")
                seen[place] = before + part.op
                if seen[place] not in ("F", "FB", "FI", "FIW"):
                    raise ValueError(
                        f"rank {rank}, position {position}: {part} comes after "
                        f"{', '.join(before) or 'nothing'}: {A_CHUNK_RUNS}"
                    )
        for direction in range(self.num_directions):
            for stage in range(self.num_stages):
                if self.rank_of(stage, direction) != rank:
                    continue
                for chunk in range(self.chunks_per_direction):
                    ran = seen.get((stage, chunk, direction), "")
                    if ran not in ("FB", "FIW"):
                        raise ValueError(
                            f"rank {rank} runs {', '.join(ran) or 'nothing'} of stage {stage}, "
                            f"chunk {chunk}, direction {direction}: {A_CHUNK_RUNS}"
                        )

    def _check_transfers(self) -> None:
        """Source and target agree on the order of the tensors of one kind between them."""
        last: dict[tuple[int, int, str, int], Transfer] = {}
        for transfer in self.transfers():
            channel = (transfer.source, transfer.target, transfer.tensor, transfer.direction)
            before = last.get(channel)
            if before is not None and before.needed_by >= transfer.needed_by:
                raise ValueError(
                    f"rank {transfer.source} sends the {transfer.tensor} of chunk {before.chunk} "
                    f"before chunk {transfer.chunk}, rank {transfer.target} takes chunk "
                    f"{transfer.chunk} first: run the chunks in one order on both"
                )
            last[channel] = transfer

    def _rank_of_key(self, key: Key) -> int:
        return self.rank_of(key[1], key[3])

    def _leaves_rank(self, key: Key) -> bool:
        kind, stage, _, direction = key
        other = stage + 1 if kind == "F" else stage - 1
        if not 0 <= other < self.num_stages:
            return False
        return self.rank_of(other, direction) != self.rank_of(stage, direction)

    def _deadlock_message(self, blocked: dict[Key, list[int]], positions: list[int]) -> str:
        lines = []
        for (kind, stage, chunk, direction), ranks in blocked.items():
            tensor = "activation" if kind == "F" else "gradient"
            key = f"the {tensor} of stage {stage}, chunk {chunk}, direction {direction}"
            for rank in ranks:
                position = positions[rank]
                lines.append(
                    f"rank {rank}, position {position}: {self.actions[rank][position]} for {key}"
                )
        return "deadlock, reorder the actions; waiting: " + "; ".join(sorted(lines))


def build_schedule(kind: str, num_ranks: int, num_chunks: int) -> Schedule:
    """The schedule `kind`, one of `KINDS`, for R = `num_ranks` and M = `num_chunks`.

    Raises ValueError for an unknown kind or sizes that the kind does not allow.
    """
    kind = kind.lower()
    if kind not in KINDS:
        raise ValueError(f"unknown schedule {kind!r}: choose one of {', '.join(KINDS)}")
    _check_sizes(kind, num_ranks, num_chunks)
    writers = []
    for rank in range(num_ranks):
        mirror = num_ranks - 1 - rank
        if kind == "dualpipe":
            phases = ((rank, 0), (mirror, 1))
            writer = _Writer(*(phases if rank < mirror else phases[::-1]))
            _write_dualpipe(writer, num_ranks // 2, min(rank, mirror), num_chunks // 2)
        else:
            writer = _Writer((rank, 0), (num_ranks + mirror, 0))  # 1f1b and zb1p: the first alone
            WRITERS[kind](writer, num_ranks, rank, num_chunks)
        writers.append(writer)
    return Schedule(kind, num_ranks, num_chunks, tuple(tuple(w.actions) for w in writers))


def _check_sizes(kind: str, num_ranks: int, num_chunks: int) -> None:
    for name, value in (("num_ranks", num_ranks), ("num_chunks", num_chunks)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a whole number, 1 or more")
    if kind == "dualpipe":
        if num_ranks % 2:
            raise ValueError(
                f"num_ranks={num_ranks} is odd: dualpipe needs an even number, dualpipev takes any"
            )
        if num_chunks % 2:
            raise ValueError(
                f"num_chunks={num_chunks} is odd: dualpipe splits the chunks between two "
                f"directions, use {num_chunks + 1}"
            )
    if kind in ("dualpipev", "dualpipe") and num_chunks < 2 * num_ranks:
        raise ValueError(
            f"num_chunks={num_chunks} is less than 2 x num_ranks = {2 * num_ranks}, the least that "
            f"{kind} can fill: use {2 * num_ranks} chunks or more, or the schedule zbv"
        )


class _Writer:
    """Writes one rank's list and counts its chunks: each phase runs them in ascending order.

    `phases[p]` is the (stage, direction) of phase p.
    """

    def __init__(self, *phases: tuple[int, int]):
        self.actions: list[Action | Pair] = []
        self._phases = phases
        self._counts: Counter[tuple[str, int]] = Counter()
        self._delayed: deque[Action] = deque()

    @property
    def num_delayed(self) -> int:
        """Weight gradients not yet written."""
        return len(self._delayed)

    def forward(self, phase: int = 0) -> None:
        self.actions.append(self._next("F", phase))

    def backward(self, phase: int = 0, *, split: bool = False) -> None:
        """A full backward, or with `split` its input half: the weight half is delayed."""
        action = self._next("I" if split else "B", phase)
        self.actions.append(action)
        if split:
            self._delayed.append(Action("W", action.stage, action.chunk, action.direction))

    def weight(self) -> None:
        """The oldest delayed weight gradient."""
        self.actions.append(self._delayed.popleft())

    def pair(self, forward_phase: int, backward_phase: int) -> None:
        self.actions.append(Pair(self._next("F", forward_phase), self._next("B", backward_phase)))

    def _next(self, op: str, phase: int) -> Action:
        counter = ("F" if op == "F" else "B", phase)
        chunk = self._counts[counter]
        self._counts[counter] += 1
        stage, direction = self._phases[phase]
        return Action(op, stage, chunk, direction)


def _write_1f1b(writer: _Writer, num_ranks: int, rank: int, num_chunks: int) -> None:
    warmup = min(num_ranks - rank - 1, num_chunks)
    for _ in range(warmup):
        writer.forward()
    for _ in range(num_chunks - warmup):
        writer.forward()
        writer.backward()
    for _ in range(warmup):
        writer.backward()


def _write_zb1p(writer: _Writer, num_ranks: int, rank: int, num_chunks: int) -> None:
    """1F1B with split backwards; rank r delays r weight gradients.

    1F1B keeps R-r activations on rank r, so r more reach R, the peak of its rank 0. They fill the
    drain: rank r ends its last I one I before rank r-1 does and then has one W more to run.
    """
    warmup = min(num_ranks - rank - 1, num_chunks)
    for _ in range(warmup):
        writer.forward()
    for chunk in range(num_chunks):
        if chunk < num_chunks - warmup:
            writer.forward()
        writer.backward(split=True)
        if writer.num_delayed > rank:
            writer.weight()
    while writer.num_delayed:
        writer.weight()


def _write_zbv(writer: _Writer, num_ranks: int, rank: int, num_chunks: int) -> None:
    """The warm-up takes up to 2R-1 chunks: of fewer, those that do not exist are left out."""
    # Warm-up: nF0, nF1F0, nF1I1W1
    for _ in range(2 * (num_ranks - rank) - 1):
        writer.forward(0)
    for _ in range(rank):
        writer.forward(1)
        writer.forward(0)
    for _ in range(num_ranks - rank):
        writer.forward(1)
        writer.backward(1, split=True)
        writer.weight()
    # Main: n(F0)I0W0F1I1W1
    forwards_left = num_chunks - (2 * num_ranks - rank - 1)
    for i in range(num_chunks - num_ranks):
        if i < forwards_left:
            writer.forward(0)
        writer.backward(0, split=True)
        writer.weight()
        writer.forward(1)
        writer.backward(1, split=True)
        writer.weight()
    # Cool-down: nI0I1, nI0W, nW
    for _ in range(rank):
        writer.backward(0, split=True)
        writer.backward(1, split=True)
    for _ in range(num_ranks - rank):
        writer.backward(0, split=True)
        writer.weight()
    while writer.num_delayed:
        writer.weight()
    writer.actions = [a for a in writer.actions if all(p.chunk < num_chunks for p in a.parts)]


def _write_dualpipe(writer: _Writer, num_ranks: int, rank: int, num_chunks: int) -> None:
    """DualPipeV, and either half of DualPipe with half the ranks and chunks; digits are phases."""
    to_last = num_ranks - rank - 1
    # Step 1: nF0
    for _ in range(2 * to_last):
        writer.forward(0)
    # Step 2: nF0F1
    for _ in range(rank + 1):
        writer.forward(0)
        writer.forward(1)
    # Step 3: nI1WF1
    for _ in range(to_last):
        writer.backward(1, split=True)
        writer.weight()
        writer.forward(1)
    # Step 4 (main step): nF0&B1F1&B0
    for i in range(num_chunks - 2 * num_ranks + rank + 1):
        if i == 0 and to_last == 0:
            # Apart: this F0 fills the wait for the first gradient, which a pair would sit out
            writer.forward(0)
            writer.backward(1)
        else:
            writer.pair(0, 1)
        writer.pair(1, 0)
    # Step 5: nB1F1&B0
    for _ in range(to_last):
        writer.backward(1)
        writer.pair(1, 0)
    # Step 6: nB1B0, the second half of its backwards split
    for i in range(2 * (rank + 1)):
        writer.backward(1 - i % 2, split=i >= rank + 1)
    # Step 7: nWI0
    for _ in range(to_last):
        writer.weight()
        writer.backward(0, split=True)
    # Step 8: nW
    for _ in range(rank + 1):
        writer.weight()


WRITERS = {
    "1f1b": _write_1f1b,
    "zb1p": _write_zb1p,
    "zbv": _write_zbv,
    "dualpipev": _write_dualpipe,
}
