"""Two to eight ranks on one GPU: each has a stream of its own, and their kernels run side by side.

What the kernels do to a peer's memory they do here to another buffer of the same GPU. That checks
every number of ranks, and the hand-overs between kernels, wherever there is one GPU; the link
itself is left to the tests with several.
"""

from contextlib import contextmanager

import pytest
import torch

from dualpipe_ext import PeerTimeoutError
from dualpipe_ext.exchange.plan import RoutingLayout
from tests.support.compare import relative_error
from tests.support.exchange_cases import (
    ROUTINGS,
    Case,
    check_routings,
    check_tables,
    combine,
    dispatch,
    expected_combine,
    expected_dispatch,
    expected_plan,
)

pytestmark = pytest.mark.gpu


class OneGpuMemory:
    """Stands in for PeerMemory: every rank's buffer, all on this GPU."""

    def __init__(self, buffers, rank):
        self.pointers = [buffer.data_ptr() for buffer in buffers]
        self.mine = buffers[rank]

    def part(self, first, count):
        return self.mine[first : first + count]

    def close(self):
        self.pointers = []


@pytest.fixture(autouse=True, scope="module")
def _loaded_kernels():
    """CUDA loads a kernel at its first launch, and waits for running kernels to do so."""
    for dtype in (torch.bfloat16, torch.float32):
        check_routings(0, None, "nvlink", 64, 2, 4, 10, dtype=dtype)
        check_routings(0, None, "nvlink", 64, 2, 4, 10, dtype=dtype, form="unique")


def load_row_kernels(world_size, case):
    """The same for the Triton kernels, of which every number of ranks and of routes has its own."""
    from dualpipe_ext.triton_kernels.experts import rows as expert_rows

    def ints(*shape):
        return torch.zeros(shape, dtype=torch.int32, device="cuda")

    def floats(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device="cuda")

    stride = -(-case.topk // 4) * 4
    routes = ints(world_size, case.max_tokens, stride)[:, :, : case.topk]
    unique = floats(world_size, case.max_tokens, case.hidden, dtype=case.dtype)
    weight = floats(world_size, case.max_tokens, stride)
    rows, row_weight = floats(128, case.hidden, dtype=case.dtype), floats(128)
    local = case.num_experts // world_size
    expert_rows.expand(
        unique,
        routes,
        ints(world_size),
        ints(local + 1),
        ints(local),
        rows,
        topk_weight=weight[:, :, : case.topk],
        row_weight=row_weight,
        num_sms=4,
    )
    expert_rows.sum_per_rank(
        rows, routes, ints(world_size), unique, row_weight=row_weight, sum_weight=weight, num_sms=4
    )


@contextmanager
def virtual_ranks(monkeypatch, world_size, case, timeout=20.0, comm_sms=4, unique=False):
    """A backend and a stream for every rank."""
    from dualpipe_ext.exchange import nvlink, nvlink_expert, nvlink_unique

    kind = nvlink_unique.NvlinkUniqueBackend if unique else nvlink_expert.NvlinkExpertBackend

    buffers, backends = [], []

    def memory(group, nbytes, device):
        while len(buffers) < world_size:
            buffers.append(torch.zeros(nbytes, dtype=torch.uint8, device=device))
        return OneGpuMemory(buffers, len(backends))

    monkeypatch.setattr(nvlink, "PeerMemory", memory)
    device = torch.device("cuda", torch.cuda.current_device())
    for rank in range(world_size):
        layout = RoutingLayout(rank, world_size, case.num_experts, case.topk, case.max_tokens)
        backends.append(kind(None, layout, case.hidden, case.dtype, device, timeout))
        backends[-1].comm_sms = comm_sms
    streams = [torch.cuda.Stream() for _ in range(world_size)]
    # No allocation may wait for the device while some ranks' kernels wait for the others'.
    if unique:
        load_row_kernels(world_size, case)
    pinned = [torch.empty(22, dtype=torch.int32, pin_memory=True) for _ in range(4 * world_size)]
    for stream in streams:
        with torch.cuda.stream(stream):
            blocks = [torch.empty(1 << 26, dtype=torch.uint8, device=device) for _ in range(4)]
            del blocks
    del pinned
    torch.cuda.synchronize()
    yield list(zip(backends, streams, strict=True))
    torch.cuda.synchronize()
    for backend in backends:
        backend.close()


def on_every(ranks, call):
    """call(rank, backend) on each rank's stream; returns the results once all kernels are done."""
    results = []
    for rank, (backend, stream) in enumerate(ranks):
        with torch.cuda.stream(stream):
            results.append(call(rank, backend))
    torch.cuda.synchronize()
    for backend, _ in ranks:
        backend.check()
    return results


def check(ranks, case, channel):
    world_size = len(ranks)
    idx = [case.topk_idx(p, world_size) for p in range(world_size)]
    want = [expected_plan(case, idx, p) for p in range(world_size)]
    on_gpu = [i.cuda() for i in idx]
    plans = on_every(ranks, lambda rank, backend: backend.plan(on_gpu[rank]))
    for plan, expected in zip(plans, want, strict=True):
        assert plan.num_rows == expected.rows
        assert plan.expert_offsets.tolist() == expected.expert_offsets
    for rank, plan in enumerate(plans):
        check_tables(plan, want, rank)

    x = [case.x(p).cuda() for p in range(world_size)]
    weight = [case.topk_weight(p).cuda() for p in range(world_size)]
    torch.cuda.synchronize()
    received = on_every(
        ranks, lambda rank, b: dispatch(b, x[rank], plans[rank], weight[rank], channel, num_sms=4)
    )
    for (rows, row_weight), expected in zip(received, want, strict=True):
        want_rows, want_weight = expected_dispatch(case, expected)
        assert torch.equal(rows.cpu(), want_rows)
        assert torch.equal(row_weight.cpu(), want_weight)

    out = [case.expert_out(p, want[p].rows).cuda() for p in range(world_size)]
    scalars = [case.row_weight(p, want[p].rows).cuda() for p in range(world_size)]
    torch.cuda.synchronize()
    returned = on_every(
        ranks, lambda rank, b: combine(b, out[rank], plans[rank], scalars[rank], channel, num_sms=4)
    )
    for rank, (y, topk_weight) in enumerate(returned):
        want_y, want_weight = expected_combine(case, want, rank)
        assert relative_error(y, want_y) < (5e-3 if case.dtype == torch.bfloat16 else 1e-5)
        assert torch.equal(topk_weight.cpu(), want_weight)


@pytest.mark.parametrize("unique", [False, True], ids=["expert", "unique"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("world_size", range(2, 9))
def test_every_routing(monkeypatch, world_size, dtype, unique):
    sizes = dict(hidden=1160, topk=5, num_experts=4 * world_size, max_tokens=150, dtype=dtype)
    case = Case("uniform", seed=0, **sizes)
    with virtual_ranks(monkeypatch, world_size, case, unique=unique) as ranks:
        for i, routing in enumerate(ROUTINGS):
            check(ranks, Case(routing, seed=i, **sizes), ("forward", "backward")[i % 2])


@pytest.mark.parametrize("topk", [1, 8])
def test_many_epochs_on_one_buffer(monkeypatch, topk):
    sizes = dict(hidden=136, topk=topk, num_experts=12, max_tokens=97)
    with virtual_ranks(monkeypatch, 3, Case("uniform", seed=0, **sizes), comm_sms=7) as ranks:
        for i in range(40):
            check(ranks, Case(ROUTINGS[i % 6], seed=i, **sizes), ("forward", "backward")[i % 2])


def test_a_late_rank_is_waited_for(monkeypatch):
    case = Case("uniform", 64, 2, 6, 50, seed=5)  # every rank has tokens
    with virtual_ranks(monkeypatch, 3, case) as ranks:
        with torch.cuda.stream(ranks[1][1]):
            torch.cuda._sleep(2_000_000_000)  # about a second
        check(ranks, case, "forward")


@pytest.mark.parametrize("operation", ["plan", "dispatch", "combine"])
def test_a_rank_that_never_arrives(monkeypatch, operation):
    case = Case("uniform", 64, 2, 6, 50, seed=5)  # every rank has tokens
    with virtual_ranks(monkeypatch, 3, case, timeout=0.5) as ranks:
        idx = [case.topk_idx(p, 3).cuda() for p in range(3)]
        x = [case.x(p).cuda() for p in range(3)]
        torch.cuda.synchronize()
        plans = on_every(ranks, lambda rank, backend: backend.plan(idx[rank]))
        sizes = [plan.num_rows for plan in plans]
        rows = [torch.zeros(n, 64, dtype=case.dtype, device="cuda") for n in sizes]
        torch.cuda.synchronize()
        calls = {
            "plan": lambda rank, backend: backend.plan(idx[rank]),
            "dispatch": lambda rank, backend: dispatch(
                backend, x[rank], plans[rank], None, "backward"
            ),
            "combine": lambda rank, backend: combine(
                backend, rows[rank], plans[rank], None, "backward"
            ),
        }
        for rank in (0, 2):
            with torch.cuda.stream(ranks[rank][1]):
                calls[operation](rank, ranks[rank][0])
        torch.cuda.synchronize()
        for rank in (0, 2):
            with pytest.raises(PeerTimeoutError, match=f"rank {rank} waited 0.5 s for rank 1") as e:
                ranks[rank][0].check()
            assert e.value.peer == 1 and operation in e.value.phase
            with pytest.raises(PeerTimeoutError):  # and it stays closed to further calls
                calls[operation](rank, ranks[rank][0])
