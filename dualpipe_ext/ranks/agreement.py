"""What ranks tell each other beside the tensors: arguments, shapes, failures.

It goes through the key-value store of the process group, from host to host: no collective that
could hang behind a rank that is not there, no wait for a device, and every wait has a limit.
"""

from __future__ import annotations

import pickle
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..compat import default_store
from ..errors import DualPipeError

__all__ = ["Agreement"]

POLL = 0.0005  # seconds between two looks; a look at a TCP store takes 0.05 to 0.1 ms


class Agreement:
    """A corner of a group's store, for one pipeline, exchange or layer. `group` None is one rank.

    All ranks make the same calls of `gather` in the same order; a key published once is there for
    all ranks from then on.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.timeout = timeout
        self._gathers = 0
        self._store: dist.PrefixStore | None = None
        if group is not None and self.world_size > 1:
            store = _group_store(group)
            # All ranks of a group open these in one order: the count names this one.
            opened = store.add(f"dualpipe_ext/opened/{self.rank}", 1)
            self._store = dist.PrefixStore(f"dualpipe_ext/{opened}", store)

    def gather(self, what: str, value: object, *, wait: bool = True) -> list[Any]:
        """Every rank's `value`, by rank. `what` says in an error what the missing ranks lack.

        Without `wait` it only leaves word for the others.

        Raises:
            DualPipeError: a rank did not come within the timeout, or the store is gone.
        """
        if self._store is None:
            return [value]
        self._gathers += 1
        keys = [f"gather/{self._gathers}/{rank}" for rank in range(self.world_size)]
        self._set(keys[self.rank], value)
        if not wait:
            return []
        deadline = time.monotonic() + self.timeout
        missing = keys
        while missing := [key for key in missing if not self._check(key)]:
            if time.monotonic() > deadline:
                ranks = [keys.index(key) for key in missing]
                raise DualPipeError(
                    f"ranks {ranks} of the group did not {what} within {self.timeout:g} s: they "
                    "died, hang or called something else; see their logs, or raise `timeout`"
                )
            time.sleep(POLL)
        found = [self._get(key) for key in keys]
        if self._gathers > 1:  # all ranks are past the one before, having come to this one
            with suppress(Exception):
                self._store.delete_key(f"gather/{self._gathers - 1}/{self.rank}")
        return found

    def publish(self, key: str, value: object) -> None:
        self._set(f"published/{key}", value)

    def look_up(self, key: str, *, wait: bool) -> Any | None:
        """What a rank published under `key`; None if nothing did (within the timeout)."""
        deadline = time.monotonic() + self.timeout
        while not self._check(f"published/{key}"):
            if not wait or time.monotonic() > deadline:
                return None
            time.sleep(POLL)
        return self._get(f"published/{key}")

    def store(self, prefix: str) -> dist.Store:
        """A corner of the corner, to open a communicator with."""
        assert self._store is not None  # several ranks
        return dist.PrefixStore(prefix, self._store)

    def _set(self, key: str, value: object) -> None:
        self._call("set", key, pickle.dumps(value))

    def _get(self, key: str) -> Any:
        return pickle.loads(self._call("get", key))

    def _check(self, key: str) -> bool:
        return bool(self._call("check", [key]))

    def _call(self, name: str, *args: object) -> Any:
        try:
            return getattr(self._store, name)(*args)
        except RuntimeError as error:
            raise DualPipeError(
                f"the process group's store does not answer ({error}): the process that hosts it, "
                "usually rank 0, is gone; see its log"
            ) from error


def _group_store(group: dist.ProcessGroup) -> dist.Store:
    """The store that the group was made with."""
    with suppress(AttributeError, RuntimeError):
        return group.get_group_store()
    return dist.PrefixStore(group.group_name, default_store())


def seconds(timeout: float) -> timedelta:
    return timedelta(seconds=timeout)
