"""dualpipe_ext: expert-parallel MoE training whose communication hides behind its computation."""

from .eplb import measure_placement, rebalance_experts
from .errors import DualPipeError, ExchangeClosedError, PeerTimeoutError
from .exchange import Exchange
from .grouped_mlp import grouped_mlp
from .moe import MoELayer
from .routing import Plan

__version__ = "0.1.0"

__all__ = [
    "DualPipeError",
    "Exchange",
    "ExchangeClosedError",
    "MoELayer",
    "PeerTimeoutError",
    "Plan",
    "grouped_mlp",
    "measure_placement",
    "rebalance_experts",
]
