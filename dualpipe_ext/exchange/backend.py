"""What a form of the exchange implements, and what its calls hand to each other.

A dispatch is `send`, then `arrive`; a combine is `leave`, then `fetch`. `send` and `fetch`
communicate and are collective. `arrive` and `leave` compute, on any stream ordered behind or before
them. Who brings rows into expert order differs:

    form        send                    arrive           leave                 fetch
    "expert"    rows, sorted by expert  nothing          nothing               rows, summed
    "unique"    each token once a rank  expands to rows  sums a token's rows   one sum a rank

Letters: T tokens of this rank, H hidden, K experts a token, P ranks, R rows in expert order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

from torch import Tensor

from .plan import Plan

__all__ = ["Arrival", "Backend", "Departure", "ExpertRows", "UniqueRows", "Weighted"]

Weighted = tuple[Tensor, Tensor | None]  # rows, and a scalar each if any were sent
Result_co = TypeVar("Result_co", covariant=True)
PlanT = TypeVar("PlanT", bound=Plan)


class Arrival(ABC, Generic[Result_co]):
    """Tokens that `send` brought to this rank; a context manager that releases them.

    Its type parameter is what `Exchange.arrive` returns for it: a tensor, or a pair of tensors.

    Attributes:
        channel: "forward" or "backward".
        tensors: those that another stream has to be told of (`Tensor.record_stream`).
    """

    channel: str
    tensors: tuple[Tensor, ...]

    @abstractmethod
    def release(self) -> None:
        """Give the buffer back, as of the work that the current stream has queued so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


@dataclass(frozen=True, eq=False)
class ExpertRows(Arrival[Any]):
    """Rows in expert order, in memory of their own.

    Attributes:
        rows: [R, H], or [max_rows, H].
        row_weight: [R] fp32 (fp64 beside fp64 rows), or None.
    """

    rows: Tensor
    row_weight: Tensor | None
    channel: str

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]  # no field
        return (self.rows,) if self.row_weight is None else (self.rows, self.row_weight)

    def release(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True, eq=False)
class UniqueRows(Arrival[Any]):
    """Every token that came to this rank, once.

    On NVLink the tensors are the receive buffer itself: nothing is copied, and the channel's next
    call waits until they are released. Row [p, i] is the i-th token that rank p sent here; its rows
    in expert order are ``plan.expert_rows[p, i]``, and only i < ``plan.unique_counts[p]`` holds
    anything.

    Attributes:
        rows: [P, max_tokens, H] in the exchange's dtype, or float8_e4m3fn.
        scales: [P, max_tokens, ⌈H / 128⌉] fp32, factors of 128 columns each of fp8 rows, else None.
        topk_weight: [P, max_tokens, K] fp32, all routing weights of the token, or None.
    """

    rows: Tensor
    scales: Tensor | None
    topk_weight: Tensor | None
    channel: str
    tensors: tuple[Tensor, ...]
    on_release: Callable[[], None]

    def release(self) -> None:
        self.on_release()


@dataclass(frozen=True, eq=False)
class Departure(Generic[Result_co]):
    """Rows that `leave` made ready for `fetch`.

    Its type parameter is what `Exchange.fetch` returns for it: a tensor, or a pair of tensors.

    Attributes:
        channel: "forward" or "backward".
        weighted: whether a scalar a row goes along.
        rows, row_weight: form "expert": [R, H] and [R], else None.
        sums: form "unique": [P, max_tokens, H], where `fetch` reads. Row [p, i], i <
            ``plan.unique_counts[p]``, is the sum of this rank's rows of the i-th token that rank p
            sent here, ``plan.expert_rows[p, i]``. A caller that gave `leave` no rows fills it.
    """

    channel: str
    weighted: bool
    rows: Tensor | None = None
    row_weight: Tensor | None = None
    sums: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for x in (self.rows, self.row_weight) if x is not None)


class Backend(Protocol[PlanT]):
    """One form of the exchange on one kind of transport. `Exchange` checks arguments before.

    Tensors are contiguous. `num_sms`: SMs of the compute kernels in a call, None = all.
    """

    name: str  # "nvlink" or "reference"
    comm_sms: int  # SMs that the communication kernels of the next call take
    peer_bytes: int  # of peer memory held on each rank

    def plan(self, topk_idx: Tensor) -> PlanT: ...

    def send(
        self,
        x: Tensor,
        plan: PlanT,
        topk_weight: Tensor | None,
        channel: str,
        payload: str | None,
        num_sms: int | None,
    ) -> Arrival[Any]:
        """Brings x [T, H], and topk_weight [T, K], to the ranks of their experts. Collective."""
        ...

    def arrive(self, arrival: Arrival[Any], plan: PlanT, num_sms: int | None) -> Weighted:
        """Rows [R, H] in expert order and row_weight [R] of an arrival, which it releases."""
        ...

    def leave(
        self,
        rows: Tensor | None,
        plan: PlanT,
        row_weight: Tensor | None,
        channel: str,
        num_sms: int | None,
    ) -> Departure[Any]:
        """Makes rows [R, H], and row_weight [R], ready to be fetched."""
        ...

    def fetch(self, departure: Departure[Any], plan: PlanT, num_sms: int | None) -> Weighted:
        """y [T, H], the sums over each token's rows, and the scalars [T, K]. Collective."""
        ...

    def check(self) -> None:
        """Raises what a finished kernel reported."""
        ...

    def close(self) -> None: ...
