"""The worker pool: results, and what happens when a worker raises, dies or hangs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.workers import WorkerDiedError, WorkerPool


def total(rank, group, scale):
    x = torch.tensor([float(scale * rank)])
    dist.all_reduce(x, group=group)
    return x


def identify(rank, group):
    return os.getpid(), dist.get_rank(group), torch.get_num_threads()


def fail_on_rank_1(rank, group):
    if rank == 1:
        raise ValueError("hidden=7170 is not a multiple of 8")
    dist.barrier(group)


def fail_everywhere(rank, group):
    raise IndexError(f"rank {rank}")


def die_on_rank_0(rank, group):
    if rank == 0:
        os._exit(7)
    dist.barrier(group)


def hang_on_rank_1(rank, group):
    if rank == 1:
        time.sleep(600)


def return_a_lambda(rank, group):
    return lambda: rank


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2) as pool:
        yield pool


def test_results_come_in_rank_order_from_one_group(pool):
    assert pool.run(total, 10) == [torch.tensor([10.0]), torch.tensor([10.0])]


def test_workers_stay_alive_between_calls(pool):
    first, second = pool.run(identify), pool.run(identify)
    assert first == second
    assert [(rank, threads) for _, rank, threads in first] == [(0, 1), (1, 1)]
    assert os.getpid() not in [pid for pid, _, _ in first]


def test_exception_of_one_rank_is_raised_with_its_traceback(pool):
    with pytest.raises(ValueError, match="hidden=7170 is not a multiple of 8") as caught:
        pool.run(fail_on_rank_1)
    assert "on rank 1:" in str(caught.value.__cause__)
    assert "in fail_on_rank_1" in str(caught.value.__cause__)
    assert pool.run(total, 1)[0] == 1  # rank 0 was left in a barrier: both are new processes


def test_same_exception_everywhere_keeps_the_workers(pool):
    before = pool.run(identify)
    with pytest.raises(IndexError):
        pool.run(fail_everywhere)
    assert pool.run(identify) == before


def test_death_is_reported_and_the_next_call_gets_new_workers(pool):
    with pytest.raises(WorkerDiedError, match=r"rank 0 of 2 .* exit code 7 in die_on_rank_0"):
        pool.run(die_on_rank_0)
    assert pool.run(total, 3)[1] == 3


def test_hang_is_reported_with_the_stack_and_the_next_call_gets_new_workers(pool):
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2") as caught:
        pool.run(hang_on_rank_1, timeout=2.0)
    assert "in hang_on_rank_1" in str(caught.value)
    assert pool.run(total, 5)[0] == 5


def test_workers_end_with_their_parent():
    script = (
        "import os, signal\n"
        "from tests.support.test_workers import WorkerPool, identify\n"
        "print(*(pid for pid, _, _ in WorkerPool(2).run(identify)), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.run(
        [sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True, check=False
    )
    assert parent.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in parent.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # dead, at most waiting to be collected


def test_result_that_cannot_be_sent_is_an_error(pool):
    with pytest.raises(Exception, match=r"(?i)pickle|local object"):
        pool.run(return_a_lambda)
