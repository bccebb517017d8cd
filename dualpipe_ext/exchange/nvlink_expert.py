"""Form "expert" on NVLink: the communication SMs bring rows into expert order, and sum them."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.operator import aligned
from .backend import Arrival, Departure, ExpertRows, Weighted
from .nvlink import CHANNEL_INDEX, NvlinkBackend, NvlinkPlan, address

__all__ = ["NvlinkExpertBackend"]


class NvlinkExpertBackend(NvlinkBackend):
    """`send` and `fetch` do all of it; there are no compute kernels."""

    unique = False

    def send(
        self,
        x: torch.Tensor,
        plan: NvlinkPlan,
        topk_weight: torch.Tensor | None,
        channel: str,
        payload: str | None = None,
        num_sms: int | None = None,
    ) -> ExpertRows:
        self.check_peers()
        x, index = aligned(x), CHANNEL_INDEX[channel]
        # Can go ahead without R, and covers the host's wait for it.
        self.kernels.stage(index, x.data_ptr(), address(topk_weight), len(x), self.stream())
        rows, row_weight = self.row_tensors(plan, topk_weight is not None)
        self.kernels.dispatch(
            index,
            x.data_ptr(),
            address(topk_weight),
            len(x),
            plan.tables.data_ptr(),
            rows.data_ptr(),
            address(row_weight),
            self.comm_sms,
            self.stream(),
        )
        return ExpertRows(rows, row_weight, channel)

    def arrive(
        self, arrival: Arrival[Any], plan: NvlinkPlan, num_sms: int | None = None
    ) -> Weighted:
        assert isinstance(arrival, ExpertRows)
        return arrival.rows, arrival.row_weight

    def leave(
        self,
        rows: torch.Tensor | None,
        plan: NvlinkPlan,
        row_weight: torch.Tensor | None,
        channel: str,
        num_sms: int | None = None,
    ) -> Departure[Any]:
        return Departure(channel, row_weight is not None, rows, row_weight)

    def fetch(
        self, departure: Departure[Any], plan: NvlinkPlan, num_sms: int | None = None
    ) -> Weighted:
        self.check_peers()
        assert departure.rows is not None
        rows = aligned(departure.rows)
        y, topk_weight = self.home_tensors(plan, departure.weighted)
        self.kernels.combine(
            CHANNEL_INDEX[departure.channel],
            rows.data_ptr(),
            address(departure.row_weight),
            plan.topk_idx.data_ptr(),
            plan.num_tokens,
            plan.tables.data_ptr(),
            y.data_ptr(),
            address(topk_weight),
            self.comm_sms,
            self.stream(),
        )
        return y, topk_weight
