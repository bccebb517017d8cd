"""How a pair divides the SMs between communication and computation, from its begin to its end."""

from __future__ import annotations

from dataclasses import dataclass

from ..exchange.exchange import Exchange
from ..moe.layer import MoELayer
from ..moe.routed import RoutedFeedForward
from ..ops.operator import device_facts

__all__ = ["SmShare", "SmSplit"]


@dataclass(frozen=True)
class SmShare:
    """SMs of a segment's kernels.

    num_sms    of the experts' GEMMs; None: all
    take_over  whether these draw their tiles, see `grouped_mlp`
    row_sms    of kernels that expand and sum unique rows; None: all
    """

    num_sms: int | None
    take_over: bool
    row_sms: int | None

    @classmethod
    def alone(cls, moe: RoutedFeedForward) -> SmShare:
        """Outside of a pair: the layer's number."""
        return cls(moe.num_sms, False, moe.num_sms)


class SmSplit:
    """The SMs of one run of a pair.

    Args:
        comm_sms: of every exchange in it, a count or a ratio; None: each exchange's own.
        num_sms: of the experts' kernels; None: the layer's, or what communication leaves.
    """

    def __init__(self, comm_sms: int | float | None, num_sms: int | None) -> None:
        self.comm_sms, self.num_sms = comm_sms, num_sms
        self.largest = 0  # SMs that communication takes at most
        self._before: dict[Exchange, int] = {}

    def adopt(self, exchange: Exchange) -> None:
        """Gives an exchange its SMs; one that a layer opens in the middle of a pair, too."""
        if exchange not in self._before:
            self._before[exchange] = exchange.comm_sms
            if self.comm_sms is not None:
                exchange.comm_sms = self.comm_sms
            self.largest = max(self.largest, exchange.comm_sms)

    def restore(self) -> None:
        """Gives every exchange its own number back."""
        for exchange, comm_sms in self._before.items():
            if not exchange.closed:
                exchange.comm_sms = comm_sms

    def share(self, moe: RoutedFeedForward, exchange: Exchange) -> SmShare:
        """Of a layer's kernels beside communication.

        Kernels that draw their tiles take all SMs, and leave communication its own while it runs.
        The others, which have equal shares, leave it room from the start.
        """
        num_sms = moe.num_sms if self.num_sms is None else self.num_sms
        is_ours = isinstance(moe, MoELayer)
        if num_sms is not None or exchange.device.type != "cuda":
            return SmShare(num_sms if is_ours else None, False, num_sms)
        total, (major, _) = device_facts(exchange.device)
        free = total - exchange.comm_sms if exchange.comm_sms else None
        if is_ours and major == 9 and moe.precision == "bf16":  # they draw
            return SmShare(None, True, free)
        return SmShare(free if is_ours else None, False, free)
