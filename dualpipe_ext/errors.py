"""Errors that only this package raises. Bad arguments raise ValueError, TypeError or IndexError."""

from typing import Any

__all__ = [
    "DualPipeError",
    "ExchangeClosedError",
    "KernelCompileError",
    "MissingKernelsWarning",
    "PeerTimeoutError",
    "RowsOverflowError",
    "UncheckedVersionWarning",
]


class DualPipeError(RuntimeError):
    """Base of every error that is not an argument's fault."""


class ExchangeClosedError(DualPipeError):
    """An exchange or its peer memory was used after `close()`."""


class KernelCompileError(DualPipeError):
    """Triton cannot compile a kernel here: its release or its ptxas does not fit.

    Attribute: is_gluon (whether it is one of the kernels that only Hopper GPUs run).
    """

    def __init__(self, message: str, is_gluon: bool = False) -> None:
        super().__init__(message)
        self.is_gluon = is_gluon


class UncheckedVersionWarning(UserWarning):
    """A release of torch or Triton that this package was not run with."""


class MissingKernelsWarning(UserWarning):
    """Kernels that would be faster cannot run here, and something slower runs instead of them."""


class RowsOverflowError(DualPipeError):
    """More rows came to a rank than its exchange's ``max_rows`` holds; the results are wrong.

    Attributes: rank (whose rows), needed (rows in expert order, alignment included), max_rows.
    """

    def __init__(self, *, rank: int, needed: int, max_rows: int) -> None:
        super().__init__(
            f"rank {rank} received {needed} rows in expert order, but max_rows={max_rows}: results "
            f"since then are wrong. Make the Exchange with max_rows={needed} or more, or without."
        )
        self.rank = rank
        self.needed = needed
        self.max_rows = max_rows

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_overflow, (dict(self.__dict__),)


class PeerTimeoutError(DualPipeError):
    """A wait inside a kernel gave up on a peer.

    The kernel recorded what it waited for and ended, so that the process can report and exit. The
    channel is left in an unknown state: close the exchange.

    Attributes: rank (who waited), peer (for whom), channel ("forward" or "backward"), phase (what
    the kernel was doing), expected and seen (values of the flag), timeout (seconds).
    """

    def __init__(
        self,
        *,
        rank: int,
        peer: int,
        channel: str,
        phase: str,
        expected: int,
        seen: int,
        timeout: float,
    ) -> None:
        super().__init__(
            f"rank {rank} waited {timeout:g} s for rank {peer} in {phase} on channel {channel!r}: "
            f"its flag shows {seen}, expected {expected}. Rank {peer} died, hangs, or did not make "
            "the same calls; look at its log, and raise `timeout` if it is only slow."
        )
        self.rank = rank
        self.peer = peer
        self.channel = channel
        self.phase = phase
        self.expected = expected
        self.seen = seen
        self.timeout = timeout

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle their positional arguments only, and workers send errors to a parent.
        return _rebuild_peer_timeout, (dict(self.__dict__),)


def _rebuild_peer_timeout(fields: dict[str, Any]) -> PeerTimeoutError:
    return PeerTimeoutError(**fields)


def _rebuild_overflow(fields: dict[str, Any]) -> RowsOverflowError:
    return RowsOverflowError(**fields)
