"""Launches of a kernel after its first, for a third of the host's time.

JITFunction.run binds, specializes and hashes every argument anew in each launch: 30 to 40 us, and a
transformer block forward and backward has about thirty. What follows looks the compiled kernel up
by a key that differs wherever Triton's does.
"""

import functools
import inspect

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

try:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
except ImportError:  # before Triton 3.6
    GluonDescriptor = TensorDescriptor

__all__ = ["cache_launches"]

VERSIONS = ("3.6.",)  # of Triton, whose compiled kernels are called as below
EMPTY = inspect.Parameter.empty
ONES = {1: (1, 1), 2: (1,), 3: ()}
INT32, INT64 = range(-(2**31), 2**31), range(-(2**63), 2**63)


def cache_launches(kernel=None, *, in_pairs=False):
    """Decorates a kernel whose launches pass constants, and nothing else, by keyword.

    `kernel[grid](...)` stays as it is, for a grid of numbers. A change of Triton's debug mode or of
    a global constant after the first launch goes unnoticed; launch hooks are served, by Triton's
    own way.

    `in_pairs`: from the second launch on, an even number of programs are clusters of two, which
    share nothing. A cluster needs SMs of one GPC, and a kernel of 124 single programs may leave one
    free in each of eight GPCs: communication launched in pairs then waits for its end. (So a graph
    should capture launches that have run once. An odd `comm_sms` communicates in single CTAs, which
    find room anywhere.)
    """
    if kernel is None:
        return functools.partial(cache_launches, in_pairs=in_pairs)
    if isinstance(kernel, JITFunction) and triton.__version__.startswith(VERSIONS):
        kernel.run = _CachedLaunches(kernel, in_pairs)
    return kernel


class _CachedLaunches:
    """In place of `JITFunction.run`."""

    def __init__(self, kernel: JITFunction, in_pairs: bool) -> None:
        self._in_pairs = in_pairs
        self._parameters, self._hooks = kernel.params, kernel.pre_run_hooks
        self._run = kernel.run
        self._found: dict[tuple, tuple] = {}

    def __call__(self, *args, grid, warmup, **constants):
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        hooks = self._hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
        active = driver.active
        device = active.get_current_device()
        key = None if warmup or hooks else _key(device, args, constants)
        found = self._found.get(key)
        if found is None:
            compiled = self._run(*args, grid=grid, warmup=warmup, **constants)
            if key is not None and compiled is not None:
                self._keep(key, compiled, args, constants)
            return compiled
        compiled, run, rest, _ = found
        stream = active.get_current_stream(device)
        values = [constants.get(name, default) for name, default in rest]
        function, metadata = compiled.function, compiled.packed_metadata
        if self._in_pairs and len(grid) == 1 and grid[0] % 2 == 0:
            warps, _, shared = metadata
            grid, metadata = (grid[0] // 2,), (warps, 2, shared)
        run(*grid, *ONES[len(grid)], stream, function, metadata, None, None, None, *args, *values)
        return compiled

    def _keep(self, key: tuple, compiled, args: tuple, constants: dict) -> None:
        given, rest = self._parameters[: len(args)], self._parameters[len(args) :]
        named = [(p.name, p.default) for p in rest if p.is_constexpr]
        missing = [name for name, default in named if default is EMPTY and name not in constants]
        if len(named) == len(rest) and not missing and not any(p.is_constexpr for p in given):
            layouts = [x.layout for x in args if type(x) is GluonDescriptor]  # their ids: in `key`
            self._found[key] = compiled, compiled.run, named, layouts


def _key(device: int, args: tuple, constants: dict) -> tuple | None:
    """What decides which compiled kernel runs, and more than that; None: ask Triton."""
    key = [device, *constants, *constants.values()]
    add = key.append
    for x in args:
        kind = type(x)
        if kind is int:
            add(-1 if x == 1 else (x % 16 == 0) + 2 * (x not in INT32) + 4 * (x not in INT64))
        elif kind is torch.Tensor or kind is torch.nn.Parameter:
            add(x.dtype if x.data_ptr() % 16 == 0 else (x.dtype,))
        elif kind is GluonDescriptor:
            add((x.base.dtype, x.padding, id(x.layout), *x.block_shape))
        elif kind is TensorDescriptor:
            add((x.base.dtype, x.padding, *x.block_shape))
        elif kind is float or x is None:
            add(kind)
        else:
            return None
    return tuple(key)
