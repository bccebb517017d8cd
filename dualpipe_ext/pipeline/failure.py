"""What went wrong in a pipeline on this rank: one object for the pipeline, its steps and links."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from ..errors import DualPipeError

__all__ = ["Cause", "Failure"]


class Cause(IntEnum):
    """Where a failure began; lower values come first, and lead to higher ones elsewhere."""

    HERE = 0
    OTHER_RANK = 1
    MISSING_TENSOR = 2


class Failure:
    """The first error of the current step, and whether there can be another step.

    Attributes:
        error: None so far. After it a step only keeps the others from waiting.
        cause: of `error`.
        links_broken: a tensor did not come or could not leave; nothing travels any more.
        reason: why there are no more steps, None while there are.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.begin_step()

    def begin_step(self) -> None:
        self.error: Exception | None = None
        self.cause = Cause.HERE
        self.links_broken = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Keeps the first error of the step, and raises none."""
        try:
            yield
        except Exception as error:
            if self.error is None:
                self.error = error
                came_from_outside = isinstance(error, DualPipeError)
                self.cause = Cause.OTHER_RANK if came_from_outside else Cause.HERE
                if self.links_broken:
                    self.cause = Cause.MISSING_TENSOR

    @property
    def text(self) -> str | None:
        """The error of the step, for the other ranks."""
        return None if self.error is None else f"{type(self.error).__name__}: {self.error}"

    def end(self, reason: str | None) -> None:
        """There are no more steps."""
        self.reason = reason

    def check(self) -> None:
        """Raise DualPipeError if there are no more steps."""
        if self.reason is not None:
            raise DualPipeError(
                f"a step before broke off: {self.reason}; make a new Pipeline on a new group"
            )
