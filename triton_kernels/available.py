"""Which kernels this process can compile. No Triton in it.

A kernel that does not compile takes its family with it: "gluon" are the kernels for Hopper, which
plain Triton or torch can replace, "triton" all. That is said once; whoever asked for the kernels by
name (`require`) gets the error instead.
"""

import warnings
from weakref import WeakSet

from dualpipe_ext.errors import KernelCompileError, MissingKernelsWarning

__all__ = ["compiles", "give_up", "require"]

_reasons: dict[str, str] = {}  # by family, why its kernels are not tried again
_required_by: WeakSet = WeakSet()


def compiles(family: str) -> bool:
    """Whether kernels of "gluon" or "triton" may be tried."""
    return "triton" not in _reasons and family not in _reasons


def require(owner: object) -> None:
    """While `owner` is alive, a kernel that does not compile is an error.

    Raises:
        KernelCompileError: there has been one already.
    """
    for reason in _reasons.values():
        raise KernelCompileError(f'{reason}; backend="nvlink" wants all kernels, "auto" does not')
    _required_by.add(owner)


def give_up(error: Exception) -> None:
    """Do without the kernels of the family that `error` (KernelCompileError, ImportError) is about.

    Raises:
        KernelCompileError, ImportError: `error`, where somebody requires the kernels.
    """
    if len(_required_by):
        raise error
    family = "gluon" if isinstance(error, KernelCompileError) and error.is_gluon else "triton"
    if not compiles(family):
        return
    _reasons[family] = str(error)
    slower, what = {
        "gluon": ("plain Triton and torch", "the kernels for Hopper GPUs"),
        "triton": ("plain torch", "all Triton kernels"),
    }[family]
    warnings.warn(
        f"{error}. From here on {slower} run instead of {what}, several times slower",
        MissingKernelsWarning,
        stacklevel=3,
    )
