"""dualpipe_ext: expert-parallel MoE training whose communication hides behind its computation."""

from .eplb import measure_placement, rebalance_experts
from .errors import DualPipeError, ExchangeClosedError, PeerTimeoutError, RowsOverflowError
from .exchange import Exchange
from .grouped_mlp import grouped_mlp
from .moe import MoELayer
from .optimizer_state import load_optimizer_state_dict, optimizer_state_dict
from .placement import ExpertPlacement
from .routing import Plan

__version__ = "0.1.0"

__all__ = [
    "DualPipeError",
    "Exchange",
    "ExchangeClosedError",
    "ExpertPlacement",
    "MoELayer",
    "PeerTimeoutError",
    "Plan",
    "RowsOverflowError",
    "grouped_mlp",
    "load_optimizer_state_dict",
    "measure_placement",
    "optimizer_state_dict",
    "rebalance_experts",
]
