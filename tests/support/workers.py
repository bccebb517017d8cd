"""Processes of one process group that stay alive between tests.

Starting torch and a process group takes seconds, a test on it milliseconds: a `WorkerPool` pays the
start once. It restarts by itself after a failure that may have left its ranks out of step.
"""

import faulthandler
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

__all__ = ["WorkerDiedError", "WorkerPool", "WorkerTracebackError"]

LOOPBACK = "127.0.0.1"
START_TIMEOUT = 120.0  # seconds; torch's import alone takes 2 s on a free core, more on a busy one
PATIENCE = 4.0  # seconds to wait for a rank that never comes; busy cores made others come after 2
SLACK = 10.0  # seconds more, at most, until every rank has its error
STOP = b""
GRACE = 2 * PATIENCE  # seconds that the other ranks get to answer once one has failed


class WorkerDiedError(RuntimeError):
    """A worker process ended in the middle of a call."""


class WorkerTracebackError(Exception):
    """Cause of an error raised by `WorkerPool.run`: who raised it, and its traceback over there."""


@dataclass(frozen=True)
class Answer:
    """What one rank sent back: `value` is its result, or its exception if it `failed`."""

    rank: int
    failed: bool
    value: object
    trace: str = ""


@dataclass(frozen=True)
class Worker:
    process: object
    pipe: connection.Connection
    stacks: Path  # where the worker writes its Python stacks on SIGUSR1


class WorkerPool:
    """`world_size` processes in one group: "gloo" on the CPU only, "nccl" with rank r on GPU r.

    Example:
        def total(rank, group, scale):
            x = torch.tensor([scale * rank])
            dist.all_reduce(x, group=group)
            return x

        WorkerPool(2).run(total, 10)  # [tensor([10]), tensor([10])]
    """

    def __init__(self, world_size: int, backend: str = "gloo") -> None:
        self.world_size = world_size
        self.backend = backend
        self._workers: list[Worker] = []

    def run(self, function, *args, timeout: float = 120.0) -> list:
        """Call `function(rank, group, *args)` on every rank; returns the results, rank 0 first.

        `function` must be importable (top level of a module); arguments and results must pickle,
        with tensors on the CPU.

        Raises the first exception that a rank raised, WorkerDiedError if one ended, TimeoutError
        with the stacks of the ranks still busy after `timeout` seconds.
        """
        if not self._workers:
            self._start()
        return self._call(function, args, timeout)

    def close(self) -> None:
        """Let the workers leave their process group and end; kill those that do not."""
        for worker in self._workers:
            with suppress(OSError):  # already gone
                worker.pipe.send_bytes(STOP)
        for worker in self._workers:
            worker.process.join(timeout=10)
        self._kill()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _start(self) -> None:
        spawn = get_context("spawn")  # a fork would inherit this process's CUDA context and threads
        self._folder = tempfile.TemporaryDirectory(prefix="dualpipe-workers-")
        # Hosted here, on a port the system picks: no race for a free port.
        self._store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
        for rank in range(self.world_size):
            stacks = Path(self._folder.name) / f"rank{rank}"
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_serve,
                args=(rank, self.world_size, self.backend, self._store.port, stacks, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()  # or the end of the worker would not close the pipe
            self._workers.append(Worker(process, ours, stacks))
        self._call(_ready, (), START_TIMEOUT)

    def _call(self, function, args: tuple, timeout: float) -> list:
        request = pickle.dumps((function, args))
        for worker in self._workers:
            with suppress(OSError):  # it died since the last call, and _receive says so
                worker.pipe.send_bytes(request)
        try:
            answers = self._collect(function, timeout)
        except BaseException:
            self._kill()
            raise
        failures = [answer for answer in answers if answer.failed]
        if failures:
            self._raise(failures)
        return [answer.value for answer in sorted(answers, key=lambda answer: answer.rank)]

    def _collect(self, function, timeout: float) -> list[Answer]:
        """One answer a rank, in order of arrival; fewer if others hang after one has failed."""
        deadline = time.monotonic() + timeout
        waiting = {worker.pipe: rank for rank, worker in enumerate(self._workers)}
        answers: list[Answer] = []
        failed = False
        while waiting:
            ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready and not failed:
                raise TimeoutError(self._describe_hang(function, timeout, sorted(waiting.values())))
            if not ready:
                break
            for pipe in ready:
                answer = self._receive(waiting.pop(pipe), function)
                answers.append(answer)
                if answer.failed and not failed:
                    failed = True
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _receive(self, rank: int, function) -> Answer:
        worker = self._workers[rank]
        try:
            return pickle.loads(worker.pipe.recv_bytes())
        except (EOFError, OSError):
            worker.process.join(timeout=5)
            text = (
                f"rank {rank} of {self.world_size} ({self.backend}) ended with exit code "
                f"{worker.process.exitcode} in {function.__qualname__}; see its output"
            )
            return Answer(rank, True, WorkerDiedError(text), text)

    def _raise(self, failures: list[Answer]) -> NoReturn:
        # The same error everywhere leaves the ranks in step. Otherwise messages may be on the way.
        alike = len({type(failure.value) for failure in failures}) == 1
        died = [failure for failure in failures if isinstance(failure.value, WorkerDiedError)]
        if died or not alike or len(failures) < self.world_size:
            self._kill()
        cause = "\n".join(f"on rank {failure.rank}:\n{failure.trace}" for failure in failures)
        # A death explains the errors of the ranks that talked to the dead one.
        raise (died or failures)[0].value from WorkerTracebackError(cause)

    def _describe_hang(self, function, timeout: float, ranks: list[int]) -> str:
        lines = [
            f"{function.__qualname__} on ranks {ranks} of {self.world_size} ({self.backend}) gave "
            f"no answer within {timeout:g} s; they were in:"
        ]
        for rank in ranks:
            if self._workers[rank].stacks.exists():
                os.kill(self._workers[rank].process.pid, signal.SIGUSR1)
        time.sleep(0.5)  # for the dumps to be written
        for rank in ranks:
            stacks = self._workers[rank].stacks
            lines += [
                f"--- rank {rank}",
                stacks.read_text() if stacks.exists() else "(not started)",
            ]
        return "\n".join(lines)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        if self._workers:
            self._workers = []
            self._store = None
            self._folder.cleanup()


def _ready(rank: int, group) -> int:
    return rank


def _serve(rank: int, world_size: int, backend: str, port: int, stacks: Path, pipe) -> None:
    """A worker's life: join the group, answer calls until the parent says stop or is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(stacks, "w") as dump:
        faulthandler.register(signal.SIGUSR1, file=dump)
        device = _choose_device(rank, backend)
        dist.init_process_group(
            backend,
            store=dist.TCPStore(LOOPBACK, port, is_master=False),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=START_TIMEOUT),
            device_id=device,
        )
        while (request := pipe.recv_bytes()) != STOP:
            pipe.send_bytes(_answer(rank, request))
        dist.destroy_process_group()


def _choose_device(rank: int, backend: str) -> torch.device | None:
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.set_num_threads(4)  # the ranks' reference computations share the cores
        return torch.device("cuda", rank)
    # Several ranks share few cores, and Gloo must not pick a network that a container lacks.
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # code that defaults to a GPU stays on the CPU here
    return None


def _answer(rank: int, request: bytes) -> bytes:
    try:
        function, args = pickle.loads(request)
        return pickle.dumps(Answer(rank, False, function(rank, dist.group.WORLD, *args)))
    except Exception as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return pickle.dumps(Answer(rank, True, error, trace))


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)
