"""Many random exchanges on reused buffers, both channels in flight, ranks late at random.

DUALPIPE_STRESS_ITERATIONS sets how many (500; 10,000 for a full run, about a minute): each is a
dispatch and a combine on both channels at once. Values encode their origin in small integers, so
that every check is exact, and the oracle lays rows out on the device without the package's help.
"""

import itertools
import os
import random
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from dualpipe_ext import Exchange

ITERATIONS = int(os.environ.get("DUALPIPE_STRESS_ITERATIONS", "500"))
CHUNK = 20  # iterations whose inputs are made first, so that the host does not wait between them
CHANNELS = ("forward", "backward")
COMM_SMS = (1, 3, 8, 16, 32)
ROUTINGS = ("uniform", "uniform", "one_rank", "self", "one_expert", "dropped", "short")
NAN = float("nan")


@dataclass(frozen=True)
class Setting:
    """Sizes of one exchange; the ranks divide `experts`."""

    form: str
    hidden: int
    topk: int
    experts: int
    max_tokens: int
    dtype: torch.dtype = torch.bfloat16

    def open(self, group, backend: str) -> Exchange:
        return Exchange(
            group,
            hidden=self.hidden,
            num_experts=self.experts,
            topk=self.topk,
            max_tokens=self.max_tokens,
            dtype=self.dtype,
            backend=backend,
            form=self.form,
            timeout=60.0,
        )


SETTINGS = (
    Setting("expert", 8, 1, 16, 40),
    Setting("expert", 264, 5, 16, 96),
    Setting("expert", 1024, 8, 64, 128),
    Setting("expert", 2048, 32, 32, 33, torch.float32),
    Setting("unique", 136, 3, 16, 60, torch.float32),
    Setting("unique", 1024, 8, 64, 128),
    Setting("unique", 7168, 8, 32, 48),
)


class World:
    """An exchange and what all of its jobs share: values and the numbers of all routes."""

    def __init__(self, setting: Setting, exchange: Exchange):
        self.exchange, self.setting = exchange, setting
        self.ranks, self.rank = exchange.world_size, exchange.rank
        self.device, self.local = exchange.device, exchange.num_local_experts
        shape = (self.ranks, setting.max_tokens, setting.topk)
        self.route_PTK = self.count(self.ranks * setting.max_tokens * setting.topk).view(shape)
        # Sums of K values stay within 256, which bfloat16 still counts exactly.
        self.values = max(2, 256 // setting.topk)
        value, column = self.count(self.values)[:, None], self.count(setting.hidden)
        table = ((value + 11 * column) % self.values).to(setting.dtype)
        nothing = table.new_zeros(1, setting.hidden)
        self.value_or_zero = torch.cat([table, nothing])
        self.value_or_nan = torch.cat([table, nothing + NAN])

    def count(self, n: int) -> torch.Tensor:
        return torch.arange(n, device=self.device)


class Job:
    """One routing of all ranks, this rank's inputs, and what must come out here.

    Letters: P ranks, T max_tokens, K experts a token, H hidden, L local experts, R rows, N = P·T·K.
    """

    def __init__(self, world: World, seed: int, draw: random.Random, kind: tuple[bool, ...] = ()):
        self.world, self.seed = world, seed
        setting = world.setting
        routing = draw.choice(ROUTINGS)
        # With weights in dispatch, in combine; by the calls for unique rows.
        kind = kind or [draw.random() < 0.5 for _ in range(3)]
        self.weighted, self.scalars, by_rank = kind
        self.by_rank = by_rank and setting.form == "unique"
        most = 3 if routing == "short" else setting.max_tokens
        tokens = [draw.choice((0, most, draw.randint(0, most))) for _ in range(world.ranks)]
        self.tokens = tokens[world.rank]
        self.idx_PTK = self._draw_routing(routing, tokens)
        self.route_R, self.num_rows = self._lay_out()
        self._make_dispatch()
        self._make_combine()
        if self.by_rank:
            self._make_sums()

    def _draw_routing(self, routing: str, tokens: list[int]) -> torch.Tensor:
        world, setting = self.world, self.world.setting
        generator = torch.Generator(world.device).manual_seed(self.seed)
        shape = (world.ranks, setting.max_tokens)
        # float64, because the ranks might resolve ties differently.
        score = torch.rand(
            *shape,
            setting.experts,
            dtype=torch.float64,
            device=world.device,
            generator=generator,
        )
        if routing == "one_rank":
            score[:, :, : world.local] += 1
        elif routing == "one_expert":
            score[:, :, self.seed % setting.experts] += 1
        elif routing == "self":
            for p in range(world.ranks):
                score[p, :, p * world.local : (p + 1) * world.local] += 1
        idx = score.topk(setting.topk).indices.int()
        present = (
            world.count(setting.max_tokens) < torch.tensor(tokens, device=world.device)[:, None]
        )
        idx = idx.where(present[:, :, None], -1)
        if routing == "dropped":
            kept = torch.rand(idx.shape, device=world.device, generator=generator) < 0.6
            idx = idx.where(kept, -1)
        return idx

    def _lay_out(self) -> tuple[torch.Tensor, int]:
        """The route in every row, −1 in padding, by (expert, source, token, k); and R."""
        world, local = self.world, self.world.local
        expert_N = self.idx_PTK.flatten().long() - world.rank * local
        expert_N = expert_N.where((expert_N >= 0) & (expert_N < local), local)
        sorted_N, order_N = expert_N.sort(stable=True)
        counts = (expert_N[:, None] == world.count(local)).sum(0)
        padded = (counts + 127) // 128 * 128
        shift = torch.zeros(local + 1, dtype=torch.int64, device=world.device)
        shift[:local] = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
        num_rows = int(padded.sum())
        row_N = (world.count(len(order_N)) + shift[sorted_N]).where(sorted_N < local, num_rows)
        route = torch.full((num_rows + 1,), -1, device=world.device)
        return route.scatter_(0, row_N, order_N)[:num_rows], num_rows

    def _make_dispatch(self) -> None:
        """Columns in turn: token, token and source, job, column."""
        world, setting, seed = self.world, self.world.setting, self.seed
        shape = (world.ranks, setting.max_tokens)
        token = world.count(setting.max_tokens).expand(shape)
        source = world.count(world.ranks)[:, None].expand(shape)
        fields = [token % 200, token // 200 + 10 * source, torch.full_like(token, seed % 251)]
        fields.append(torch.full_like(token, 0))
        column = world.count(setting.hidden)
        x_PTH = torch.stack(fields, -1).to(setting.dtype)[:, :, column % 4]
        x_PTH[:, :, 3::4] = ((column[3::4] // 4 * 7 + seed) % 251).to(setting.dtype)
        self.x_PTH = x_PTH
        self.weight_PTK = (world.route_PTK + seed % 97 * 100_000).float()
        self.x = x_PTH[world.rank, : self.tokens]
        self.topk_weight = self.weight_PTK[world.rank, : self.tokens]

        padding = self.route_R < 0
        token_R = self.route_R.div(setting.topk, rounding_mode="floor")
        self.want_rows = x_PTH.flatten(0, 1)[token_R].masked_fill(padding[:, None], 0)
        self.want_weight = self.weight_PTK.flatten()[self.route_R].masked_fill(padding, 0)

    def _make_combine(self) -> None:
        """Rows that depend on route, expert and job; NaN in padding, which nobody may read."""
        world = self.world
        value_PTK = (7 * world.route_PTK + 3 * self.idx_PTK + 5 * self.seed) % world.values
        self.value_PTK = value_PTK.where(self.idx_PTK >= 0, world.values)
        padding = self.route_R < 0
        value_R = self.value_PTK.flatten()[self.route_R].masked_fill(padding, world.values)
        self.out = world.value_or_nan[value_R]
        scalar_PTK = (3 * world.route_PTK + self.seed % 89).float()
        self.row_weight = scalar_PTK.flatten()[self.route_R].masked_fill(padding, NAN)

        mine = (world.rank, slice(0, self.tokens))
        self.want_y = self._sum_values(self.value_PTK[mine])
        self.want_topk_weight = scalar_PTK[mine].where(self.idx_PTK[mine] >= 0, 0.0)

    def _make_sums(self) -> None:
        """The tokens that come here, each source's moved to the front, and their sums here."""
        world = self.world
        here_PTK = self.idx_PTK.div(world.local, rounding_mode="floor") == world.rank
        goes_PT = here_PTK.any(-1)
        self.arrivals_PT = (~goes_PT).int().sort(dim=1, stable=True).indices
        self.counts = goes_PT.sum(1)
        self.arrived = (world.count(goes_PT.shape[1]) < self.counts[:, None])[:, :, None]
        self.want_unique = self._in_front(self.x_PTH)
        self.want_unique_weight = self._in_front(self.weight_PTK)
        sums = self._sum_values(self.value_PTK.where(here_PTK, world.values))
        self.sums = self._in_front(sums).where(self.arrived, NAN)

    def _sum_values(self, value: torch.Tensor) -> torch.Tensor:
        """[..., K] → [..., H]"""
        return self.world.value_or_zero[value].float().sum(-2).to(self.world.setting.dtype)

    def _in_front(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.gather(1, self.arrivals_PT[:, :, None].expand(-1, -1, tensor.shape[2]))

    def make_plan(self) -> None:
        world = self.world
        self.plan = world.exchange.plan(self.idx_PTK[world.rank, : self.tokens])

    def run(self, channel: str, delay) -> dict[str, torch.Tensor]:
        """Dispatch and combine on the current stream; how many values are wrong, by name."""
        wrong = {}
        delay()
        if self.by_rank:
            self._dispatch_unique(channel, wrong)
        else:
            self._dispatch(channel, wrong)
        delay()
        if self.by_rank:
            self._combine_unique(channel, wrong)
        else:
            self._combine(channel, wrong)
        return wrong

    def _dispatch(self, channel: str, wrong: dict) -> None:
        self._poison(self.want_rows, self.want_weight)
        options = dict(topk_weight=self.topk_weight) if self.weighted else {}
        result = self.world.exchange.dispatch(self.x, self.plan, channel=channel, **options)
        rows, row_weight = result if self.weighted else (result, self.want_weight)
        wrong["rows"] = (rows != self.want_rows).sum()
        wrong["row_weight"] = (row_weight != self.want_weight).sum()

    def _combine(self, channel: str, wrong: dict) -> None:
        self._poison(self.want_y, self.want_topk_weight)
        options = dict(row_weight=self.row_weight) if self.scalars else {}
        result = self.world.exchange.combine(self.out, self.plan, channel=channel, **options)
        y, topk_weight = result if self.scalars else (result, self.want_topk_weight)
        wrong["y"] = (y != self.want_y).sum()
        wrong["topk_weight"] = (topk_weight != self.want_topk_weight).sum()

    def _dispatch_unique(self, channel: str, wrong: dict) -> None:
        options = dict(topk_weight=self.topk_weight) if self.weighted else {}
        unique = self.world.exchange.send(self.x, self.plan, channel=channel, **options)
        wrong["unique_counts"] = (self.plan.unique_counts != self.counts).sum()
        wrong["unique rows"] = ((unique.rows != self.want_unique) & self.arrived).sum()
        if self.weighted:
            off = (unique.topk_weight != self.want_unique_weight) & self.arrived
            wrong["unique weights"] = off.sum()
        unique.rows.fill_(NAN)  # the receive buffer: what comes next has to overwrite it
        unique.release()

    def _combine_unique(self, channel: str, wrong: dict) -> None:
        exchange = self.world.exchange
        departure = exchange.leave(None, self.plan, channel=channel)
        departure.sums.copy_(self.sums)
        self._poison(self.want_y)
        y = exchange.fetch(departure, self.plan)
        wrong["y"] = (y != self.want_y).sum()

    def _poison(self, *alike: torch.Tensor) -> None:
        """Leave NaN where the allocator will put the next outputs of these shapes."""
        for tensor in alike:
            torch.full_like(tensor, NAN)


def _stress(rank, group, backend, settings, iterations) -> int:
    """Returns how many checks passed; raises at the first chunk with a wrong value."""
    draw = random.Random(11)  # the same sequence on every rank
    own = random.Random(rank)
    worlds = [World(setting, setting.open(group, backend)) for setting in settings]
    on_gpu = worlds[0].device.type == "cuda"
    lanes = {channel: torch.cuda.Stream() if on_gpu else None for channel in CHANNELS}
    _warm_up(worlds, lanes, draw)
    passed = 0
    for first in range(0, iterations, CHUNK):
        world = draw.choice(worlds)
        sms = draw.choice(COMM_SMS + (0,) * (world.setting.form == "unique"))
        world.exchange.comm_sms = sms
        chunk = range(first, min(first + CHUNK, iterations))
        jobs = [{c: Job(world, 2 * i + n, draw) for n, c in enumerate(CHANNELS)} for i in chunk]
        checks = _run_chunk(world, jobs, lanes, own)
        wrong = torch.stack([count for _, count in checks]).tolist()
        failed = [(label, n) for (label, _), n in zip(checks, wrong, strict=True) if n]
        assert not failed, f"rank {rank}, {world.setting}, comm_sms={sms}, from {first}: {failed}"
        passed += len(wrong)
    for world in worlds:
        world.exchange.close()
    return passed


def _warm_up(worlds: list[World], lanes: dict, draw: random.Random) -> None:
    """Every kind of call once, one after the other: nothing is left to load or to allocate.

    Both may wait for kernels that run, and those for another rank that waits likewise.
    """
    for lane in filter(None, lanes.values()):
        with torch.cuda.stream(lane):
            blocks = [torch.empty(1 << 28, dtype=torch.uint8, device="cuda") for _ in range(2)]
            blocks += [torch.empty(1 << 19, dtype=torch.uint8, device="cuda") for _ in range(32)]
            del blocks
    for world in worlds:
        for sms in (8, 0) if world.setting.form == "unique" else (8,):
            world.exchange.comm_sms = sms
            for seed, kind in enumerate(itertools.product((False, True), repeat=3)):
                job = Job(world, seed, draw, kind)
                job.make_plan()
                wrong = job.run(CHANNELS[seed % 2], lambda: None)
                wrong = {name: int(count) for name, count in wrong.items()}
                assert not any(wrong.values()), (world.setting, sms, kind, wrong)
        world.exchange.check()


def _run_chunk(world: World, jobs: list[dict], lanes: dict, own: random.Random) -> list:
    on_gpu = world.device.type == "cuda"

    def delay() -> None:
        if on_gpu and own.random() < 0.1:
            torch.cuda._sleep(int(own.random() * 2_000_000))  # up to 1 ms

    for pair in jobs:
        for job in pair.values():
            job.make_plan()
    for pair in jobs:
        for job in pair.values():
            assert job.plan.num_rows == job.num_rows, (world.setting, job.seed)
    checks = []
    for lane in filter(None, lanes.values()):
        lane.wait_stream(torch.cuda.current_stream())
    for pair in jobs:
        # Ranks enqueue the two in different orders: the channels may not wait for each other.
        turn = CHANNELS if not on_gpu or own.random() < 0.5 else CHANNELS[::-1]
        for channel in turn:
            with torch.cuda.stream(lanes[channel]) if on_gpu else nullcontext():
                wrong = pair[channel].run(channel, delay)
            checks += [((pair[channel].seed, channel, name), n) for name, n in wrong.items()]
    if on_gpu:
        torch.cuda.synchronize()
    world.exchange.check()
    return checks


def test_oracle_agrees_with_the_reference_backend(gloo_workers_2):
    small = tuple(
        Setting(form, 24, 3, 8, 20, dtype)
        for form in ("expert", "unique")
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert min(gloo_workers_2.run(_stress, "reference", small, 3 * CHUNK)) > 3 * CHUNK


@pytest.mark.gpu_4
def test_random_exchanges_on_four_ranks(gpu_workers_4):
    args = ("nvlink", SETTINGS, ITERATIONS)
    assert min(gpu_workers_4.run(_stress, *args, timeout=120 + 0.05 * ITERATIONS)) > 4 * ITERATIONS


@pytest.mark.gpu_2
def test_random_exchanges_on_two_ranks(gpu_workers_2):
    iterations = ITERATIONS // 4 + 1
    args = ("nvlink", SETTINGS, iterations)
    assert min(gpu_workers_2.run(_stress, *args, timeout=120 + 0.05 * iterations)) > 4 * iterations


# Two ranks' tokens all go to rank 0: R = 2 T = 300,032 rows of 7168 columns, 3 million elements
# more than 2³¹, and as many in the receive buffer of form "unique". T / 2 is a multiple of 64, so
# that both experts fill whole tiles of 128 rows. At most 17 GB of peer memory and 13 GB more.
LARGE = SimpleNamespace(tokens=150_016, hidden=7168)
PIECE = 1 << 14  # rows compared at a time


def _numbered(rank: int, token: torch.Tensor) -> torch.Tensor:
    """[n, H] bfloat16: columns in turn show the token's three digits to base 200 and the rank."""
    digits = [token % 200, token // 200 % 200, token // 40_000, torch.full_like(token, rank + 1)]
    column = torch.arange(LARGE.hidden, device=token.device)
    return torch.stack(digits, -1).bfloat16()[:, column % 4]


def _large(rank, group, form) -> tuple[int, int, bool]:
    """Rows received, wrong values in them, and whether combine brings x back."""
    sizes = dict(hidden=LARGE.hidden, num_experts=4, topk=1, max_tokens=LARGE.tokens)
    with Exchange(group, backend="nvlink", form=form, timeout=20.0, **sizes) as exchange:
        result = _there_and_back(exchange)
    torch.cuda.empty_cache()  # the next tests share these GPUs
    return result


def _there_and_back(exchange: Exchange) -> tuple[int, int, bool]:
    token = torch.arange(LARGE.tokens, device="cuda")
    x = _numbered(exchange.rank, token)
    plan = exchange.plan((token % 2).int()[:, None])
    torch.full((plan.num_rows, LARGE.hidden), NAN, dtype=x.dtype, device="cuda")
    rows = exchange.dispatch(x, plan)
    wrong = sum(_wrong_rows(rows, token)) if exchange.rank == 0 else 0
    back = torch.equal(exchange.combine(rows, plan), x)
    exchange.check()
    return len(rows), int(wrong), back


def _wrong_rows(rows: torch.Tensor, token: torch.Tensor):
    """Expert e has the tokens of parity e, rank 0's before rank 1's."""
    half = LARGE.tokens // 2
    for expert in range(2):
        for source in range(2):
            got = rows[(2 * expert + source) * half :][:half].split(PIECE)
            tokens = token[expert::2].split(PIECE)
            for piece, numbers in zip(got, tokens, strict=True):
                yield (piece != _numbered(source, numbers)).sum()


@pytest.mark.gpu_2
@pytest.mark.parametrize("form", ["expert", "unique"])
def test_more_than_2_to_the_31_elements(gpu_workers_2, form):
    results = gpu_workers_2.run(_large, form)
    assert results == [(2 * LARGE.tokens, 0, True), (0, 0, True)]
    assert 2 * LARGE.tokens * LARGE.hidden > 2**31
