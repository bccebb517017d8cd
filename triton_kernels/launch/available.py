"""Which kernels this process can compile. No Triton in it.

If one kernel of a family fails to compile, the family is disabled in the process, with a warning:
"gluon" are the kernels for Hopper, which plain Triton or torch replaces, "triton" is all of them.
Where kernels were asked for by name (`require`), the error is raised instead.
"""

import warnings
from weakref import WeakSet

from dualpipe_ext.errors import KernelCompileError, MissingKernelsWarning

__all__ = ["compiles", "first_failure", "give_up", "require"]

_reasons: dict[str, str] = {}  # by family, why its kernels are not tried again
_required_by: WeakSet = WeakSet()


def compiles(family: str) -> bool:
    """Whether kernels of "gluon" or "triton" may be tried."""
    return "triton" not in _reasons and family not in _reasons


def require(owner: object) -> None:
    """While `owner` is alive, a kernel that does not compile is an error."""
    _required_by.add(owner)


def first_failure() -> str | None:
    """Why a family was disabled; None if none was."""
    return next(iter(_reasons.values()), None)


def give_up(error: Exception) -> None:
    """Disable the family of kernels that `error` (KernelCompileError, ImportError) is about.

    Raises:
        KernelCompileError, ImportError: `error`, where the kernels are required.
    """
    if len(_required_by):
        raise error
    family = "gluon" if isinstance(error, KernelCompileError) and error.is_gluon else "triton"
    if not compiles(family):  # another thread came first
        return
    _reasons[family] = str(error)
    slower, what = {
        "gluon": ("plain Triton and torch", "the kernels for Hopper GPUs"),
        "triton": ("plain torch", "all Triton kernels"),
    }[family]
    warnings.warn(
        f"{error}. From here on {what} are replaced by {slower}, several times slower",
        MissingKernelsWarning,
        stacklevel=3,
    )
