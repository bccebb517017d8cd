"""One launch of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

__all__ = ["Launch"]


@dataclass(frozen=True)
class Launch:
    """`call()` launches `kernel`, "routing.route.route_kernel", and perhaps others; only shapes and
    dtypes of its tensors matter.

    `sizes_of_a_model`: integers may be specialized, since all are sizes that a model has once.
    `always`: else compiled only where DUALPIPE_COMPILE_ALL is set.
    """

    group: str
    name: str
    kernel: str
    call: Callable[[], object]
    also_sm_100: bool = False
    sizes_of_a_model: bool = False
    always: bool = True
    arch: int = 90

    def __str__(self) -> str:
        return f"{self.group}: {self.name}"

    def for_sm_100(self) -> Launch:
        return replace(self, group="sm_100", name=self.kernel, arch=100)
