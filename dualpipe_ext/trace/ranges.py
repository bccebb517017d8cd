"""Named ranges in a profile."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

from ..compat import is_profiling

__all__ = ["LANES", "named_range"]

LANES = ("compute", "comm")  # of an overlapped pair

_NOTHING = nullcontext()


def named_range(name: str) -> AbstractContextManager[object]:
    """torch.profiler.record_function while a profiler runs, else nothing, for 6 us less."""
    if torch.compiler.is_compiling() or not is_profiling():
        return _NOTHING
    return record_function(name)
