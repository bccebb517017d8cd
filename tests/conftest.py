"""Fixtures and skipping shared by all tests."""

import os
import zlib
from collections import Counter

import pytest
import torch

from dualpipe_ext.triton_kernels.launch import available
from tests.support.workers import WorkerPool

# Kernels of eight virtual ranks wait for each other: none may queue behind another's stream.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

GPUS_NEEDED = {"gpu": 1, "gpu_2": 2, "gpu_4": 4}
_untested: pytest.StashKey[Counter] = pytest.StashKey()

try:
    import hypothesis

    # Examples share slow cores with other processes: how long one takes says nothing.
    hypothesis.settings.register_profile("project", deadline=None)
    hypothesis.settings.load_profile("project")
except ImportError:
    pass


def pytest_collection_modifyitems(config, items):
    present = torch.cuda.device_count()
    untested = config.stash.setdefault(_untested, Counter())
    for item in items:
        for marker, needed in GPUS_NEEDED.items():
            if needed > present and item.get_closest_marker(marker):
                reason = f"CUDA devices needed: {needed}, here: {present}"
                item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))
                untested[marker, reason] += 1


def pytest_terminal_summary(terminalreporter, config):
    for (marker, reason), count in sorted(config.stash.get(_untested, Counter()).items()):
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
    return zlib.crc32(request.node.nodeid.encode())


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
