"""What a pipeline's tensors travel in, without a GPU: packing, and the links through the host.

Links for GPUs are opened on the CPU here, with Gloo's communicators in NCCL's place.
"""

import copy
import math
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dualpipe_ext.errors import DualPipeError
from dualpipe_ext.pipeline import links as pipeline_links
from dualpipe_ext.pipeline.links import GroupLinks, HostLinks
from dualpipe_ext.pipeline.packing import item_parts, pack, unpack
from dualpipe_ext.pipeline.pipeline import Pipeline
from dualpipe_ext.pipeline.schedule import KINDS, build_schedule
from dualpipe_ext.pipeline.transfers import incoming_bytes
from dualpipe_ext.ranks.agreement import Agreement
from dualpipe_ext.ranks.peer_memory import PeerMemory
from tests.pipeline.test_pipeline import WRONG, Case, Leaving, Residual, check, part_of, square_loss
from tests.support.small_transformer import gradients
from tests.support.workers import PATIENCE, SLACK

DTYPES = (torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.float8_e4m3fn)
PARTS = st.lists(
    st.tuples(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from(DTYPES)),
    max_size=4,
)


@given(PARTS)
def test_packed_tensors_do_not_touch(parts):
    first, total = pack(parts)
    assert all(begin % 16 == 0 for begin in first)
    for begin, limit, (shape, dtype) in zip(first, [*first[1:], total], parts, strict=False):
        assert begin + math.prod(shape) * dtype.itemsize <= limit
    found = unpack(torch.zeros(total, dtype=torch.uint8), parts)
    assert [(tuple(y.shape), y.dtype) for y in found] == parts


def test_pack_example():
    assert pack([((3,), torch.bfloat16), ((2, 2), torch.int64)]) == ([0, 16], 48)


@pytest.mark.parametrize("kind", KINDS)
def test_incoming_bytes_are_those_of_the_transfers(kind):
    """Stage s hands on s + 1 columns and one of whole numbers, direction 1 twice as many."""
    schedule = build_schedule(kind, 4, 8)
    edges = {
        (s, d): (((s + 1, 100 + 100 * d), torch.float32), ((3,), torch.int32))
        for s in range(schedule.num_stages - 1)
        for d in range(schedule.num_directions)
    }
    for rank in range(4):
        expected = {}
        for t in schedule.transfers():
            if t.target == rank:
                gradient = t.tensor == "gradient"
                signature = edges[t.stage - gradient, t.direction]
                size = pack(item_parts(signature, gradient=gradient))[1]
                expected[t.source] = max(size, expected.get(t.source, 0))
        assert incoming_bytes(schedule, rank, edges) == expected
        assert set(expected) == {other for other in (rank - 1, rank + 1) if 0 <= other < 4}


ITEMS = (  # each a list of tensors
    lambda: [torch.randn(4, 6).bfloat16(), torch.arange(5)],
    lambda: [torch.randn(6, 4).t(), torch.tensor(2.5), torch.tensor([True, False])],
    lambda: [torch.empty(0, 3), torch.randn(3, requires_grad=True)],
    lambda: [],
    lambda: [torch.empty(0)],
    lambda: [torch.randn(8).to(torch.float8_e4m3fn)],
)


def send_items(rank, group):
    """Both ways at once, all posted before any is waited for; what came, as lists of bytes."""
    links = HostLinks(Agreement(group, 30.0), torch.device("cpu"))
    torch.manual_seed(3)
    items = [make() for make in ITEMS]
    incoming = [
        links.receive([(tuple(y.shape), y.dtype) for y in item], 1 - rank) for item in items
    ]
    outgoing = [links.send(item, 1 - rank) for item in items]
    for moving in (*incoming, *outgoing):
        moving.wait()
    for moving, item in zip(incoming, items, strict=True):
        for found, sent in zip(moving.tensors, item, strict=True):
            assert found.dtype == sent.dtype and found.shape == sent.shape
            assert not found.requires_grad
            sent = sent.detach().contiguous()
            assert torch.equal(found.flatten().view(torch.uint8), sent.flatten().view(torch.uint8))
    links.close()


def test_items_through_the_host(gloo_workers_2):
    gloo_workers_2.run(send_items, timeout=60)


def wait_in_vain(rank, group):
    links = HostLinks(Agreement(group, 1.0), torch.device("cpu"))
    start, text = time.monotonic(), ""
    if rank == 0:
        try:
            links.receive([((4,), torch.float32)], 1).wait()
        except RuntimeError as error:
            text = str(error)
    dist.barrier(group)
    links.close()
    return text, time.monotonic() - start


def test_host_links_have_a_limit(gloo_workers_2):
    (text, waited), _ = gloo_workers_2.run(wait_in_vain, timeout=60)
    assert "imed out" in text
    assert 0.9 < waited < 10


def as_on_gpus(pipeline):
    """Open the links that a pipeline of GPUs without peer memory would use."""

    def make(store, rank, size, limit):
        # NCCL's watchdog ends the process: not before the ranks could agree on an error.
        assert limit.total_seconds() == 2 * pipeline.timeout
        return dist.ProcessGroupGloo(store, rank, size, limit)

    pipeline_links._make_nccl = make
    pipeline.links._host = HostLinks(pipeline._agreement, pipeline.device)
    return pipeline


def run_steps(rank, group, case):
    """Losses by step, gradients by stage, and what each step's tensors went through."""
    schedule = build_schedule(case.kind, group.size(), case.chunks)
    stages, mine = case.build(schedule.num_stages), schedule.stages_of(rank)
    modules = [copy.deepcopy(stages[stage]) for stage in mine]
    pipeline = as_on_gpus(Pipeline(modules, schedule=case.kind, group=group, timeout=60))
    losses, ways = [], []
    for step in range(case.steps):
        passed, options = part_of(case, schedule, rank, step)
        last = step + 1 == case.steps
        losses.append(pipeline.step(*passed, **options, sync_gradients=last).losses)
        ways.append(pipeline.links.current.name)
    assert "CUDA" in pipeline.links.reason
    pipeline.check()
    pipeline.close()
    return losses, list(zip(mine, map(gradients, modules), strict=True)), ways


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stages", ["delayed", "many"])
def test_first_step_through_the_host(kind, stages, gloo_workers_2):
    case = Case(kind, 4, stages, steps=3)
    results = gloo_workers_2.run(run_steps, case, timeout=60)
    check(case, 2, [result[:2] for result in results])
    assert [ways for *_, ways in results] == [["host", "nccl", "nccl"]] * 2


def test_links_along_a_chain(gloo_workers_4):
    case = Case("dualpipev", 8, steps=2)
    results = gloo_workers_4.run(run_steps, case, timeout=60)
    check(case, 4, [result[:2] for result in results])


def change_shapes(rank, group):
    case = Case("dualpipev", 4)
    schedule = build_schedule(case.kind, group.size(), case.chunks)
    stages = case.build(schedule.num_stages)
    modules = [stages[stage] for stage in schedule.stages_of(rank)]
    pipeline = as_on_gpus(Pipeline(modules, group=group, timeout=60))
    found = []
    for size, grad in ((8, True), (8, False), (24, True), (24, True), (8, True), (8, False)):
        x = torch.linspace(-1, 1, size * 6).view(size, 6)
        options = {"criterion": square_loss, "labels": [x]} if rank == 0 else {}
        with torch.set_grad_enabled(grad):
            losses = pipeline.step(*([x] if rank == 0 else []), num_chunks=4, **options).losses
        found.append((pipeline.links.current.name, None if losses is None else losses.sum()))
    y = x
    with torch.no_grad():
        for stage in stages:
            y = stage(y)
    pipeline.close()
    return found, (y - x).square().sum()


def test_each_shape_is_learnt_once_through_the_host(gloo_workers_2):
    (found, expected), (others, _) = gloo_workers_2.run(change_shapes, timeout=60)
    ways = ["host", "nccl", "host", "nccl", "nccl", "nccl"]
    assert [way for way, _ in found] == [way for way, _ in others] == ways
    for i in (0, 1, 4, 5):
        torch.testing.assert_close(found[i][1], expected)


class FakePeers(GroupLinks):
    """In place of links over peer memory: the group's, and what was opened and closed."""

    name = "copy engines"
    log, refused = [], False

    def __init__(self, group, rank, layout, device, timeout):
        if self.refused and rank == 1:
            raise RuntimeError("the driver refused to map a peer's memory")
        super().__init__(group, SimpleNamespace(timeout=timeout), device)
        self.layout = layout
        self.log.append(("open", max(layout.slot_bytes.values())))

    def close(self):
        self.log.append(("close", max(self.layout.slot_bytes.values())))


def open_peers(rank, _, counts, refused):
    """Steps of growing, shrinking and returning shapes: by what they went, why, errors, the log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_links, "PeerLinks", FakePeers)
        patch.setattr(pipeline_links, "choose_backend", lambda *_: ("nvlink", "it is there"))
        patch.setattr(PeerMemory, "rendezvous", counts[rank])
        patch.setattr(FakePeers, "refused", refused)
        patch.setattr(FakePeers, "log", [])
        stage, group = Residual(1), dist.new_group()
        timeout = PATIENCE if refused else 30.0
        pipeline = as_on_gpus(Pipeline(stage, schedule="1f1b", group=group, timeout=timeout))
        ways, errors = [], []
        for size in (8, 8, 80, 80, 8, 80, 8):
            x = torch.ones(size, 6)
            options = {"criterion": square_loss, "labels": [x]} if rank else {}
            try:
                pipeline.step(*([] if rank else [x]), num_chunks=4, **options)
                ways.append(pipeline.links.current.name)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
        reason = pipeline.links.reason
        pipeline.close()
        return ways, reason, errors, FakePeers.log


def test_peer_memory_grows_with_the_shapes(gloo_workers_2):
    """2 x 6 numbers of fp32 a chunk fill a line of 256 bytes, 20 x 6 two."""
    for ways, reason, _, log in gloo_workers_2.run(open_peers, (3, 3), False, timeout=60):
        assert ways == [*["host", "copy engines"] * 2, *["copy engines"] * 3]
        assert reason == "all GPUs reach each other"
        assert log == [("open", 256), ("close", 256), ("open", 512), ("close", 512)]


def test_ranks_that_opened_unequally_many_peer_memories_use_nccl(gloo_workers_2):
    """Opening one more would hang inside of torch."""
    for ways, reason, _, log in gloo_workers_2.run(open_peers, (1, 2), False, timeout=60):
        assert ways == ["host", "nccl", "host", "nccl", "nccl", "nccl", "nccl"]
        assert "[1, 2] peer memories" in reason and log == []


def test_peer_memory_that_one_rank_cannot_open(gloo_workers_2):
    (ways, _, first, _), (others, _, second, _) = gloo_workers_2.run(
        open_peers, (1, 1), True, timeout=60
    )
    assert ways == others == ["host"]
    assert first[0].startswith("DualPipeError: rank 0 waited up to 4 s")
    assert second[0] == "RuntimeError: the driver refused to map a peer's memory"
    assert all("a step before broke off" in text for text in (*first[1:], *second[1:]))


def fail_then_go_on(rank, _, name, kind):
    """The error of the third step, what it and the next went through, and whether that worked."""
    wrong, where, _ = WRONG[name]
    group = dist.new_group()  # a step that a rank leaves ends it
    case = Case(kind, 8 if kind == "dualpipe" else 4)
    schedule = build_schedule(kind, group.size(), case.chunks)
    where = min(where, schedule.num_stages - 2)  # the last stage may return what it likes
    right = case.build(schedule.num_stages)
    stages = [wrong(1) if s == where else stage for s, stage in enumerate(right)]
    mine = schedule.stages_of(rank)
    timeout = PATIENCE if wrong is Leaving else 30.0
    pipeline = Pipeline([right[s] for s in mine], schedule=kind, group=group, timeout=timeout)
    as_on_gpus(pipeline)
    passed, options = part_of(case, schedule, rank)
    for _ in range(2):
        pipeline.step(*passed, **options)
    pipeline.modules = [stages[s] for s in mine]
    start = time.monotonic()
    try:
        pipeline.step(*passed, **options)
        return "nothing", 0, []
    except BaseException as error:
        text, waited = f"{type(error).__name__}: {error}", time.monotonic() - start
    ways = [pipeline.links.current.name]
    if wrong is not Leaving:
        pipeline.modules = [right[s] for s in mine]
        losses = pipeline.step(*passed, **options).losses
        assert losses is None or losses.isfinite().all()
        ways.append(pipeline.links.current.name)
    pipeline.close()
    return text, waited, ways


@pytest.mark.parametrize("kind", ["dualpipev", "dualpipe"])
@pytest.mark.parametrize("name", ["later forward", "backward", "leaves"])
def test_failures_after_the_first_step(name, kind, gloo_workers_2):
    results = gloo_workers_2.run(fail_then_go_on, name, kind, timeout=60)
    for text, waited, ways in results:
        if name == "leaves":
            assert text.startswith(("Leave", "DualPipeError")), text
            assert waited < 2 * PATIENCE + SLACK
        else:
            assert WRONG[name][2] in text
            assert ways == ["nccl", "host"]  # shapes are learnt anew


def neighbour_missing(rank, group):
    agreement = Agreement(group, PATIENCE)
    if rank == 1:
        time.sleep(2 * PATIENCE)
        return ""
    try:
        HostLinks(agreement, torch.device("cpu"))
    except DualPipeError as error:
        return str(error)
    return "no error"


def test_neighbour_that_does_not_open_its_links(gloo_workers_2):
    text, _ = gloo_workers_2.run(neighbour_missing, timeout=60)
    assert "rank 0 could not connect to its neighbour in the pipeline, ranks 0 to 1" in text
