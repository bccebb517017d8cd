"""dualpipe_ext: expert-parallel MoE training whose communication hides behind its computation."""

from .attention import GroupedQueryAttention, LatentAttention
from .block import RoutedExperts, TransformerBlock
from .eplb import measure_placement, rebalance_experts
from .errors import DualPipeError, ExchangeClosedError, PeerTimeoutError, RowsOverflowError
from .exchange import Exchange
from .grouped_mlp import grouped_mlp
from .moe import MoELayer
from .optimizer_state import load_optimizer_state_dict, optimizer_state_dict
from .overlap import OverlappedPair
from .pipeline import Pipeline
from .placement import ExpertPlacement
from .recording import record_trace
from .routing import Plan
from .stage import TransformerStage
from .tune import Split, tune_split
from .weight_gradients import DelayedLinear

__version__ = "0.1.0"

__all__ = [
    "DelayedLinear",
    "DualPipeError",
    "Exchange",
    "ExchangeClosedError",
    "ExpertPlacement",
    "GroupedQueryAttention",
    "LatentAttention",
    "MoELayer",
    "OverlappedPair",
    "PeerTimeoutError",
    "Pipeline",
    "Plan",
    "RoutedExperts",
    "RowsOverflowError",
    "Split",
    "TransformerBlock",
    "TransformerStage",
    "grouped_mlp",
    "load_optimizer_state_dict",
    "measure_placement",
    "optimizer_state_dict",
    "rebalance_experts",
    "record_trace",
    "tune_split",
]
