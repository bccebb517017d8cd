"""Fixtures, skipping and how tests share processes; CONTRIBUTING.md says how to run them."""

import os
import re
import zlib
from collections import Counter

import pytest
import torch

from dualpipe_ext.triton_kernels.launch import available
from tests.support.workers import WorkerPool

# Kernels of eight virtual ranks wait for each other: none may queue behind another's stream.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

GPUS_NEEDED = {"gpu": 1, "gpu_2": 2, "gpu_4": 4}
POOLS = ("gloo_workers_2", "gloo_workers_4")
MOST_PROCESSES = 4  # each imports torch and collects all tests: 6 s of a core

try:
    import hypothesis

    # Examples share slow cores with other processes: how long one takes says nothing.
    hypothesis.settings.register_profile("project", deadline=None)
    hypothesis.settings.load_profile("project")
except ImportError:
    pass


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Of `-n auto`."""
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(config, items):
    present = torch.cuda.device_count()
    for item in items:
        needed = max(
            (GPUS_NEEDED[m.name] for m in item.iter_markers() if m.name in GPUS_NEEDED), default=0
        )
        if needed > present:
            marker = {count: name for name, count in GPUS_NEEDED.items()}[needed]
            reason = f"{marker}: CUDA devices needed: {needed}, here: {present}"
            item.add_marker(pytest.mark.skip(reason=reason))
        elif needed:
            # Virtual ranks spin while they wait for each other: kernels of another process beside
            # them would get the GPU by turns of milliseconds.
            item.add_marker(pytest.mark.xdist_group("gpu"))
        for pool in set(POOLS).intersection(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(pool))  # started once


def pytest_terminal_summary(terminalreporter, config):
    pattern = re.compile(r"Skipped: (gpu\w*): (CUDA devices needed: .*)")
    reports = (
        r for r in terminalreporter.stats.get("skipped", ()) if isinstance(r.longrepr, tuple)
    )
    untested = Counter(m.groups() for r in reports if (m := pattern.match(r.longrepr[2])))
    for (marker, reason), count in sorted(untested.items()):
        terminalreporter.write_line(f"not tested here: {count} tests marked {marker} ({reason})")


@pytest.fixture(scope="session", autouse=True)
def _kernels_are_required():
    """A kernel that does not compile fails its test; its reference may not replace it."""

    class Owner:
        pass

    owner = Owner()
    available.require(owner)
    yield owner


def _seed(request) -> int:
    name, _, _ = request.node.nodeid.partition("@")  # behind it, pytest-xdist's group
    return zlib.crc32(name.encode())


@pytest.fixture(autouse=True)
def _seed_torch(request):
    torch.manual_seed(_seed(request))


@pytest.fixture
def rng(request) -> torch.Generator:
    """A CPU generator whose seed depends on the test alone, not on the order of the tests."""
    return torch.Generator().manual_seed(_seed(request))


def _pool(world_size: int, backend: str):
    with WorkerPool(world_size, backend) as pool:
        yield pool


@pytest.fixture(scope="session")
def gloo_workers_2():
    yield from _pool(2, "gloo")


@pytest.fixture(scope="session")
def gloo_workers_4():
    yield from _pool(4, "gloo")


@pytest.fixture(scope="session")
def gpu_workers_2():
    """Use with the marker gpu_2."""
    yield from _pool(2, "nccl")


@pytest.fixture(scope="session")
def gpu_workers_4():
    """Use with the marker gpu_4."""
    yield from _pool(4, "nccl")
