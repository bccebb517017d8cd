"""Launches of a kernel after its first, for two thirds of the host's time.

JITFunction.run binds, specializes and hashes every argument anew in each launch: 30 to 40 us, and a
transformer block forward and backward has about thirty. What follows looks the compiled kernel up
by a key that differs wherever Triton's does, and calls the C function that Triton made for it.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dualpipe_ext.compat import TRITON
from dualpipe_ext.errors import KernelCompileError

from .compat import (
    TRITON_VERSION,
    GluonDescriptor,
    JITFunction,
    TensorDescriptor,
    device_and_stream,
    direct_launch,
    encode_descriptor,
    has_launch_hooks,
    is_compile_error,
)

__all__ = ["cache_launches"]

# Another release may tell kernels apart by what is not in our key.
IS_CHECKED = TRITON.problem(TRITON_VERSION) is None
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
    if isinstance(kernel, JITFunction):
        kernel.run = _CachedLaunches(kernel, in_pairs)
    return kernel


class _CachedLaunches:
    """In place of `JITFunction.run`."""

    def __init__(self, kernel: JITFunction, in_pairs: bool) -> None:
        self._kernel, self._in_pairs = kernel, in_pairs
        self._parameters, self._hooks = kernel.params, kernel.pre_run_hooks
        self._run = kernel.run
        self._found: dict[tuple, _Launch] = {}

    def __call__(self, *args, grid, warmup, **constants):
        if warmup or self._hooks or not IS_CHECKED or has_launch_hooks():
            return self._ask_triton(args, grid, warmup, constants)
        device, stream = device_and_stream()
        key, values = _read(device, args, constants)
        found = self._found.get(key)
        if found is None:
            compiled = self._ask_triton(args, grid, warmup, constants)
            if key is not None and compiled is not None:
                self._keep(key, compiled, args, constants)
            return compiled
        for place, facts in found.descriptors:
            values[place : place + 1] = encode_descriptor(values[place], *facts)
        metadata = found.metadata
        if self._in_pairs and len(grid) == 1 and grid[0] % 2 == 0:
            grid, metadata = (grid[0] // 2,), found.metadata_in_pairs
        found.launch(*grid, *ONES[len(grid)], stream, metadata, values)
        return found.compiled

    def _ask_triton(self, args: tuple, grid: tuple, warmup: bool, constants: dict):
        try:
            return self._run(*args, grid=grid, warmup=warmup, **constants)
        except Exception as error:
            if not is_compile_error(error):
                raise
            raise compile_error(self._kernel, error) from error

    def _keep(self, key: tuple, compiled, args: tuple, constants: dict) -> None:
        given, rest = self._parameters[: len(args)], self._parameters[len(args) :]
        named = [(p.name, p.default) for p in rest if p.is_constexpr]
        missing = [name for name, default in named if default is EMPTY and name not in constants]
        if len(named) == len(rest) and not missing and not any(p.is_constexpr for p in given):
            values = [constants.get(name, default) for name, default in named]
            self._found[key] = _Launch.of(compiled, args, values)


def compile_error(kernel: JITFunction, error: Exception) -> KernelCompileError:
    """One line of what the compiler said, with its release and the remedy."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    problem = TRITON.problem(TRITON_VERSION)
    return KernelCompileError(
        f"kernel {kernel.fn.__name__} does not compile with Triton {TRITON_VERSION} "
        f"({type(error).__name__}: {lines[-1] if lines else 'no text'})"
        + (f"; {problem}" if problem else ""),
        is_gluon=kernel.is_gluon(),
    )


@dataclass(frozen=True, slots=True)
class _Launch:
    """A compiled kernel, and what all its launches have in common."""

    compiled: object
    launch: Callable
    metadata: tuple  # warps, CTAs of a cluster, bytes of shared memory
    metadata_in_pairs: tuple
    descriptors: list  # their places and how TMA encodes them, the last first
    layouts: list  # whose numbers are in the key

    @classmethod
    def of(cls, compiled, args: tuple, constants: list) -> "_Launch":
        launch, descriptors = direct_launch(compiled, args, constants)
        metadata = compiled.packed_metadata
        warps, _, shared = metadata
        layouts = [x.layout for x in args if type(x) is GluonDescriptor]
        return cls(compiled, launch, metadata, (warps, 2, shared), descriptors, layouts)


def _read(device: int, args: tuple, constants: dict) -> tuple[tuple | None, list]:
    """What decides which compiled kernel runs, and more than that; None: ask Triton. And the
    arguments, with addresses for tensors: of those the C function does not ask the driver."""
    key, values = [device, *constants, *constants.values()], []
    add, pass_on = key.append, values.append
    for x in args:
        kind = type(x)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            address = x.data_ptr()
            add(x.dtype if address % 16 == 0 else (x.dtype,))
            add(x.is_cuda)  # others Triton may refuse
            pass_on(address)
            continue
        pass_on(x)
        if kind is int:
            add(-1 if x == 1 else (x % 16 == 0) + 2 * (x not in INT32) + 4 * (x not in INT64))
        elif kind is GluonDescriptor:
            add((x.base.dtype, x.padding, id(x.layout), *x.block_shape))
        elif kind is TensorDescriptor:
            add((x.base.dtype, x.padding, *x.block_shape))
        elif kind is float or x is None:
            add(kind)
        else:
            return None, []
    return tuple(key), values
