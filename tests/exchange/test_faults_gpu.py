"""One rank fails: the others are told who, in time, and can exit. Each fault has its own processes.

The ranks' group is gloo's, so that nothing but the exchange connects the GPUs: what NCCL does about
a dead peer is not the question here. Both forms of the exchange share the processes of a fault, and
every token goes to every rank, unless a scenario says otherwise.
"""

import os
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext import Exchange, ExchangeClosedError, PeerTimeoutError, RowsOverflowError
from tests.support.workers import LOOPBACK

pytestmark = pytest.mark.gpu_4

RANKS = 4
FORMS = ("expert", "unique")
GROUP_BACKEND = "gloo"
TIMEOUT = 3.0  # seconds a kernel waits for a peer
SLACK = 5.0  # seconds more until Python has to know
LIMIT = 60.0  # seconds for a scenario, with the start of its processes
CALLS = ("plan", "dispatch", "combine")
SIZES = dict(hidden=256, num_experts=16, topk=4, max_tokens=128, comm_sms=8, backend="nvlink")


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: `exit_code` None if it was still running once the others had ended."""

    exit_code: int | None
    report: object


def run_ranks(scenario, *args, stays: int | None = None) -> list[Outcome]:
    """`scenario(rank, group, *args)` on every rank in new processes; its results, rank 0 first.

    `stays`: a rank that nobody waits for; it is killed once the others have ended.
    """
    spawn = get_context("spawn")
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    ranks = []
    for rank in range(RANKS):
        ours, theirs = spawn.Pipe(duplex=False)
        arguments = (rank, store.port, theirs, scenario, args)
        process = spawn.Process(target=_be_rank, args=arguments, daemon=True)
        process.start()
        theirs.close()  # or the end of the process would not close the pipe
        ranks.append((process, ours))
    deadline = time.monotonic() + LIMIT
    try:
        for rank, (process, _) in enumerate(ranks):
            if rank != stays:
                process.join(max(0.0, deadline - time.monotonic()))
        return [Outcome(process.exitcode, _receive(pipe)) for process, pipe in ranks]
    finally:
        for process, pipe in ranks:
            process.kill()
            process.join()
            pipe.close()


def _receive(pipe):
    try:
        return pipe.recv() if pipe.poll() else None
    except EOFError:
        return None


def _be_rank(rank, port, pipe, scenario, args):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.cuda.set_device(rank)
    dist.init_process_group(
        GROUP_BACKEND,
        store=dist.TCPStore(LOOPBACK, port, is_master=False),
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=LIMIT),
    )
    pipe.send(scenario(rank, dist.group.WORLD, *args))
    dist.destroy_process_group()


class Job:
    """An exchange and calls of it that have all been made once, on its own stream.

    A call that is to fail then neither loads a kernel nor allocates memory, which might wait.
    """

    def __init__(self, group, form, idx=None, **options):
        self.exchange = Exchange(group, form=form, **(SIZES | dict(timeout=TIMEOUT) | options))
        self.idx = everywhere() if idx is None else idx
        generator = torch.Generator("cuda").manual_seed(self.exchange.rank)
        self.x = torch.randn(128, 256, device="cuda", generator=generator).bfloat16()
        self.plan = self.exchange.plan(self.idx)
        self.rows = self.exchange.dispatch(self.x, self.plan)
        self.y = self.exchange.combine(self.rows, self.plan)
        torch.cuda.synchronize()
        self.stream = torch.cuda.Stream()
        with torch.cuda.stream(self.stream):
            for operation in CALLS:
                self.call(operation)
        torch.cuda.synchronize()
        self.exchange.check()

    def call(self, operation: str):
        if operation == "plan":
            return self.exchange.plan(self.idx)
        if operation == "dispatch":
            return self.exchange.dispatch(self.x, self.plan, channel="backward")
        return self.exchange.combine(self.rows, self.plan, channel="backward")


def everywhere() -> torch.Tensor:
    """[128, 4]: every token to one expert of each rank, all experts equally often."""
    token, k = torch.arange(128, device="cuda")[:, None], torch.arange(4, device="cuda")
    return ((token + 4 * k) % 16).int()


def load_kernels(group) -> None:
    """Compile and load every kernel, which may take longer than TIMEOUT, on one rank or another."""
    for form in FORMS:
        Job(group, form, timeout=50.0).exchange.close()


def told(jobs: dict, operations: dict | None = None) -> tuple[dict, float]:
    """Make one call of every job at once, each on its stream.

    Returns (error's type, peer, waiting rank, "operation, phase") or None by job, and seconds.
    """
    start, results = time.monotonic(), {}
    for name, job in jobs.items():
        with torch.cuda.stream(job.stream):
            job.call((operations or {}).get(name, "dispatch"))
    torch.cuda.synchronize()
    for name, job in jobs.items():
        try:
            job.exchange.check()
            results[name] = None
        except PeerTimeoutError as error:
            results[name] = ("PeerTimeoutError", error.peer, error.rank, error.phase)
    return results, time.monotonic() - start


def expect_told(outcome: Outcome, rank: int, peer: int) -> None:
    """The rank was told in time that `peer` is missing, in every job, and exited cleanly."""
    assert outcome.report is not None, f"rank {rank} ended without a report: {outcome}"
    results, seconds = outcome.report
    for name, result in results.items():
        assert result is not None, f"rank {rank}, {name}: no error"
        assert result[:3] == ("PeerTimeoutError", peer, rank), (name, result)
    assert 0.9 * TIMEOUT < seconds < TIMEOUT + SLACK
    assert outcome.exit_code == 0


def _killed(rank, group):
    load_kernels(group)
    jobs = {form: Job(group, form) for form in FORMS}
    for _ in range(5):
        for job in jobs.values():
            job.call("dispatch")
            job.call("combine")
    torch.cuda.synchronize()
    dist.barrier(group)
    if rank == 2:
        torch.cuda._sleep(10_000_000_000)  # 5 s: the calls are under way, but reach nobody
        for job in jobs.values():
            job.call("dispatch")
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    report = told(jobs)
    for job in jobs.values():
        job.exchange.close()
    return report


def test_killed_rank():
    outcomes = run_ranks(_killed)
    assert outcomes[2].exit_code == -signal.SIGKILL
    for rank in (0, 1, 3):
        expect_told(outcomes[rank], rank, peer=2)


def _never_comes(rank, group):
    load_kernels(group)
    operations = {f"{form}, {call}": call for form in FORMS for call in CALLS}
    jobs = {name: Job(group, name.split(",")[0]) for name in operations}
    dist.barrier(group)
    if rank == 2:
        time.sleep(2 * LIMIT)
    report = told(jobs, operations)
    for name, call in operations.items():
        phase = report[0][name][3] if report[0][name] else "no error"
        assert phase.startswith(call), (name, phase)
    for job in jobs.values():
        job.exchange.close()
    return report


def test_rank_that_never_comes():
    outcomes = run_ranks(_never_comes, stays=2)
    assert outcomes[2].exit_code is None  # nobody's exit waited for it
    for rank in (0, 1, 3):
        expect_told(outcomes[rank], rank, peer=2)


def _late(rank, group):
    """Rank 2 comes 2 s late with all its calls: in Python, and again on its streams."""
    load_kernels(group)
    jobs = {form: Job(group, form, timeout=20.0) for form in FORMS}
    report = {}
    for late in ("host", "stream"):
        dist.barrier(group)
        start, results = time.monotonic(), {}
        if rank == 2 and late == "host":
            time.sleep(2)
        for form, job in jobs.items():
            with torch.cuda.stream(job.stream):
                if rank == 2 and late == "stream":
                    torch.cuda._sleep(4_000_000_000)  # 2 s at 1.98 GHz
                results[form] = [job.call(operation) for operation in CALLS]
        torch.cuda.synchronize()
        seconds = time.monotonic() - start
        for form, job in jobs.items():
            job.exchange.check()
            plan, rows, y = results[form]
            same = [torch.equal(plan.slots, job.plan.slots), torch.equal(rows, job.rows)]
            report[form, late] = [*same, torch.equal(y, job.y)], seconds
    for job in jobs.values():
        job.exchange.close()
    return report


def test_late_rank_is_waited_for():
    for rank, outcome in enumerate(run_ranks(_late)):
        assert outcome.exit_code == 0 and outcome.report is not None, (rank, outcome)
        for name, (same, seconds) in outcome.report.items():
            assert same == [True] * 3, (rank, name)
            assert 1.5 < seconds < 15, (rank, name)  # it did wait


def _constructors_disagree(rank, group):
    messages = []
    for wrong in (
        dict(hidden=264),
        dict(num_experts=32),
        dict(topk=3),
        dict(max_tokens=64),
        dict(dtype=torch.float32),
        dict(form="unique"),
        dict(max_rows=512),
    ):
        options = SIZES | dict(form="expert") | (wrong if rank == 1 else {})
        try:
            Exchange(group, **options).close()
            messages.append(f"no error for {wrong}")
        except ValueError as error:
            messages.append(str(error))
    job = Job(group, "expert")  # the group still works
    job.exchange.close()
    return messages


def test_ranks_that_disagree_on_sizes():
    outcomes = run_ranks(_constructors_disagree)
    assert [outcome.exit_code for outcome in outcomes] == [0] * RANKS
    for outcome in outcomes:
        assert outcome.report == outcomes[0].report  # the same message on every rank
        for message in outcome.report:
            assert "rank 1" in message and "pass the same on every rank" in message, message


def _wrong_width(rank, group):
    load_kernels(group)
    jobs = {form: Job(group, form) for form in FORMS}
    dist.barrier(group)
    if rank == 1:
        messages = []
        for job in jobs.values():
            job.x = torch.randn(128, 264, device="cuda").bfloat16()
            try:
                job.call("dispatch")
            except ValueError as error:
                messages.append(str(error))
        report = messages
    else:
        report = told(jobs)
    for job in jobs.values():
        job.exchange.close()
    return report


def test_rank_with_rows_of_another_width():
    outcomes = run_ranks(_wrong_width)
    assert outcomes[1].exit_code == 0
    assert len(outcomes[1].report) == len(FORMS)
    assert all("[128, 264]" in message for message in outcomes[1].report)
    for rank in (0, 2, 3):
        expect_told(outcomes[rank], rank, peer=1)


def _closed(rank, group):
    """Rank 1 closes its exchanges, whose memory the others have mapped."""
    load_kernels(group)
    jobs = {form: Job(group, form) for form in FORMS}
    dist.barrier(group)
    if rank == 1:
        for job in jobs.values():
            job.exchange.close()
    dist.barrier(group)
    report = [_refusals(job) for job in jobs.values()] if rank == 1 else told(jobs)
    for job in jobs.values():
        job.exchange.close()  # on rank 1 for the second time
    return report


def _refusals(job) -> int:
    exchange, plan = job.exchange, job.plan
    calls = [
        *(lambda name=name: job.call(name) for name in CALLS),
        lambda: exchange.send(job.x, plan),
        exchange.check,
        lambda: setattr(exchange, "comm_sms", 4),
    ]
    if exchange.form == "unique":
        calls += [
            lambda: exchange.leave(None, plan),
        ]
    for i, call in enumerate(calls):
        try:
            call()
        except ExchangeClosedError:
            continue
        raise AssertionError(f"call {i} of a closed exchange was accepted")
    return len(calls)


def test_closed_exchange():
    outcomes = run_ranks(_closed)
    assert outcomes[1] == Outcome(0, [5, 8])
    for rank in (0, 2, 3):
        expect_told(outcomes[rank], rank, peer=1)


def crowded() -> torch.Tensor:
    """[128, 4]: even tokens to all experts of rank 0, odd ones to some of the other ranks."""
    token, k = torch.arange(128, device="cuda")[:, None], torch.arange(4, device="cuda")
    return torch.where(token % 2 == 0, k, 4 + (2 * token + k) % 12).int()


def _overflow(rank, group):
    """512 rows a rank hold the first routing; the second brings 4 × 256 of them to rank 0."""
    load_kernels(group)  # a rank that is told early may leave the others to their timeout
    return {form: _overflow_one(group, form) for form in FORMS}


def _overflow_one(group, form) -> dict:
    roomy = [Job(group, form, idx=idx, timeout=50.0) for idx in (everywhere(), crowded())]
    full = Job(group, form, max_rows=512)
    assert full.rows.shape == (512, 256)
    assert torch.equal(full.y, roomy[0].y)
    right, error, rows, y = roomy[1], None, None, None
    try:
        plan = full.exchange.plan(right.idx)
        rows = full.exchange.dispatch(right.x, plan)
        y = full.exchange.combine(rows, plan)
    except (RowsOverflowError, PeerTimeoutError) as raised:
        error = raised
    torch.cuda.synchronize()
    try:
        full.exchange.check()
    except (RowsOverflowError, PeerTimeoutError) as raised:
        error = error or raised
    report = {"error": error}
    if error is None:
        received = right.rows.shape[0]
        report["rows"] = torch.equal(rows[:received], right.rows)
        report["y of odd tokens"] = torch.equal(y[1::2], right.y[1::2])
    for job in (*roomy, full):
        job.exchange.close()
    return report


def test_more_rows_than_max_rows():
    outcomes = run_ranks(_overflow)
    assert [outcome.exit_code for outcome in outcomes] == [0] * RANKS
    for form in FORMS:
        error = outcomes[0].report[form]["error"]
        assert isinstance(error, RowsOverflowError), (form, error)
        assert "1024" in str(error) and "max_rows=512" in str(error)
        assert (error.rank, error.needed, error.max_rows) == (0, 1024, 512)
        for rank in (1, 2, 3):
            report = outcomes[rank].report[form]
            # For the even tokens, whose rows rank 0 had no room for, its error has to speak.
            fine = report["error"] is not None or (report["rows"] and report["y of odd tokens"])
            assert fine, (rank, form, report)
