"""What the backward of one grouped MLP needs, where a scheduler calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .grouped_options import GroupedOptions

if TYPE_CHECKING:
    from .fp8_weight import Fp8Weight

__all__ = ["Fp8Saved", "MLPSaved"]


@dataclass(frozen=True)
class Fp8Saved:
    """What it needs of a forward in fp8, beside what it always needs."""

    w13: Fp8Weight
    w2: Fp8Weight
    row_scale: torch.Tensor | None  # [R, H / 128] where the rows are e4m3


@dataclass
class MLPSaved:
    """What the backward of one forward needs. mlp_dgrad replaces `gate_up` by `d_gate_up`."""

    rows: torch.Tensor  # [R, H], e4m3 if they came so
    row_weight: torch.Tensor  # [R]
    w13: torch.Tensor  # [L, 2I, H]
    w2: torch.Tensor  # [L, H, I]
    expert_offsets: torch.Tensor  # [L + 1] int32
    act: torch.Tensor | None  # [R, I]; of fp8, once mlp_dgrad has run
    gate_up: torch.Tensor | None  # [R, 2I] before SwiGLU
    d_gate_up: torch.Tensor | None  # [R, 2I] its gradient, once mlp_dgrad has run
    options: GroupedOptions
    fp8: Fp8Saved | None = None  # of precision="fp8"
