"""Everything that is private to Triton or moves between its releases: kernels and launches import
it from here, and are the same for all releases.

`TRITON` in dualpipe_ext/compat.py says which releases. Comments give the first release with a name.
tests/test_compat.py fails by that name where a new release moved it.
"""

import inspect
from collections.abc import Callable

import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.errors import TritonError
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "TRITON_VERSION",
    "GluonDescriptor",
    "JITFunction",
    "TensorDescriptor",
    "async_load",
    "async_reduce_add",
    "async_store",
    "barrier",
    "device_and_stream",
    "direct_launch",
    "encode_descriptor",
    "has_launch_hooks",
    "is_compile_error",
    "reinterpret",
]

TRITON_VERSION = triton.__version__


def _first(module, *names: str):
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise ImportError(f"Triton {triton.__version__}: {module.__name__} has none of {names}")


# ---- Inside Gluon kernels ----

# Waits for all threads of the CTA, or of their partition of gl.warp_specialize.
barrier = _first(gl, "barrier", "thread_barrier")  # 3.7; 3.6

# TMA. 3.9 keeps the old names to say that they are gone.
async_load = _first(tma, "async_load", "async_copy_global_to_shared")  # 3.8; 3.6
async_store = _first(tma, "async_store", "async_copy_shared_to_global")  # 3.8; 3.6

if hasattr(tma, "async_atomic_add"):  # 3.8
    async_reduce_add = tma.async_atomic_add
else:  # 3.6: the compiler has it, Gluon does not show it
    from triton._C.libtriton import ir

    @builtin
    def async_reduce_add(descriptor, coordinates, source, _semantic=None):
        """Adds `source` in shared memory to a box of the descriptor's tensor; waited for by
        tma.store_wait, as a store is."""
        coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(
            kind, descriptor.handle, coordinates, source.handle
        )


@builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):
    """Shared memory as another dtype, shape and layout."""
    method = _first(memory, "reinterpret", "_reinterpret")  # 3.9; 3.6
    return method(dtype, shape, layout, _semantic=_semantic)


# ---- Launches ----

# (descriptor, what TMA needs to know of its box) -> the C function's arguments. 3.8 adds a third
# argument, for other GPUs.
encode_descriptor = nvidia.make_tensordesc_arg
_ENCODE_REST = (None,) * (len(inspect.signature(encode_descriptor).parameters) - 2)


def device_and_stream() -> tuple[int, int]:
    """The current device and its current stream, as numbers."""
    active = driver.active
    device = active.get_current_device()
    return device, active.get_current_stream(device)


def has_launch_hooks() -> bool:
    """Whether a profiler wants to hear of launches: by chains of hooks, or a function in place."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def is_compile_error(error: Exception) -> bool:
    """Whether Triton failed to make a kernel, and not to load or launch it."""
    if isinstance(error, (AttributeError, ImportError)):  # a name that moved
        return True
    if isinstance(error, TritonError):
        return not isinstance(error, OutOfResources)
    return isinstance(error, RuntimeError) and "PassManager" in str(error)


def direct_launch(compiled, arguments: tuple, constants: list) -> tuple[Callable, list]:
    """How to launch a compiled kernel without what Triton does for every launch.

    Args:
        compiled: what a launch returned.
        arguments: of that launch, without constants.
        constants: the values of its `gl.constexpr` parameters, which follow the arguments.

    Returns:
        ``launch(x, y, z, stream, metadata, values)``, where `metadata` are the kernel's
        (warps, CTAs of a cluster, bytes of shared memory), and `values` a list of the arguments,
        addresses for tensors; and, last first, (place, what `encode_descriptor` takes beside it)
        for each of `values` that has to be replaced by what `encode_descriptor` returns.
    """
    run, function = compiled.run, compiled.function
    if (
        type(run) is not nvidia.CudaLauncher
        or run.global_scratch_size
        or run.profile_scratch_size
        or getattr(run, "gsan_enabled", False)  # 3.8: a sanitizer adds arguments
    ):

        def launch(x, y, z, stream, metadata, values):
            run(x, y, z, stream, function, metadata, None, None, None, *values, *constants)

        return launch, []

    kinds = (TensorDescriptor, GluonDescriptor)
    places = [i for i, x in enumerate(arguments) if isinstance(x, kinds)]
    facts = getattr(compiled.metadata, "tensordesc_meta", None) or [None] * len(places)
    encoded = [(i, (fact, *_ENCODE_REST)) for i, fact in zip(places, facts, strict=True)]
    # Cooperative; beside the kernel before it (PDL).
    flags = run.launch_cooperative_grid, run.launch_pdl
    if hasattr(run, "kernel_signature"):  # 3.7: one C function for all kernels
        c_function, signature = driver.active.utils.launch, run.kernel_signature
        annotations = run.arg_annotations[: len(run.arg_annotations) - len(constants)]

        def launch(x, y, z, stream, metadata, values):
            c_function(
                *(x, y, z, stream, function, *flags, metadata),
                *(None, None, None, None, None, annotations, signature, values),
            )

    else:  # 3.6: one a kernel, in a Python function that takes descriptors to pieces
        c_function = run.launch
        if places:
            c_function = inspect.getclosurevars(c_function).nonlocals["launcher"]

        def launch(x, y, z, stream, metadata, values):
            c_function(
                *(x, y, z, stream, function, *flags, None, None, metadata),
                *(None, None, None, *values, *constants),
            )

    return launch, encoded[::-1]
