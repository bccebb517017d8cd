"""How many routes every expert gets, remembered over steps: what the balancer decides by."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["LoadWindow"]


class LoadWindow:
    """A decayed sum of counts per expert, kept on the device; adding never waits for it.

    Before counts are added, what is there is multiplied by ``decay``: 0.99 forgets half in 69
    additions, 1 forgets nothing. With decay 0.5, adding ``[4, 0]`` and then ``[0, 2]`` gives
    ``[2, 2]``.

    Args:
        num_experts: E.
        decay: above 0, at most 1.

    Raises:
        ValueError: another decay.
    """

    def __init__(self, num_experts: int, decay: float) -> None:
        if not 0 < decay <= 1:
            raise ValueError(
                f"load_decay={decay} is outside (0, 1]: pass what remains of older loads at each "
                "forward, such as 0.99, or 1 to keep all"
            )
        self.num_experts, self.decay = num_experts, decay
        self._sum: Tensor | None = None

    @torch.no_grad()
    def add(self, tokens_per_expert: Tensor) -> None:
        """Takes in the counts [E] of one forward."""
        if self._sum is None or self._sum.device != tokens_per_expert.device:
            kept = 0.0 if self._sum is None else self._sum.to(tokens_per_expert.device)
            self._sum = torch.zeros_like(tokens_per_expert, dtype=torch.float32) + kept
        self._sum.mul_(self.decay).add_(tokens_per_expert)

    def total(self, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
        """[E] fp32, the windows of all ranks of the group added up; they all call it."""
        if self._sum is None:
            total = torch.zeros(self.num_experts, device=device)
        else:
            total = self._sum.clone()
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(total, group=group)
        return total

    def clear(self) -> None:
        self._sum = None
