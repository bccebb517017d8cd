"""dualpipe_ext: expert-parallel MoE training whose communication hides behind its computation.

Importing it imports nothing, not even torch: a public name loads its module at its first use.
The operators torch.ops.dualpipe_ext.* are registered by their modules. Before loading an exported
program, `import dualpipe_ext.blocks.block`, which registers those of a block.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .balance.eplb import measure_placement, rebalance_experts
    from .balance.placement import ExpertPlacement
    from .blocks.attention import GroupedQueryAttention, LatentAttention
    from .blocks.block import TransformerBlock
    from .blocks.pair import OverlappedPair
    from .blocks.stage import TransformerStage
    from .blocks.tune import Split, tune_split
    from .errors import (
        DualPipeError,
        ExchangeClosedError,
        KernelCompileError,
        MissingKernelsWarning,
        PeerTimeoutError,
        RowsOverflowError,
        UncheckedVersionWarning,
    )
    from .exchange.exchange import Exchange
    from .exchange.plan import Plan
    from .gradients.delayed import DelayedLinear, delay_linears
    from .moe.checkpoint import load_optimizer_state_dict, optimizer_state_dict
    from .moe.layer import MoELayer
    from .moe.routed import RoutedExperts
    from .moe.router import Router, Routes
    from .ops.cross_entropy import cross_entropy
    from .ops.expert_order import ROW_ALIGNMENT
    from .ops.grouped_mlp import grouped_mlp
    from .ops.route_reference import balance_loss, count_tokens
    from .pipeline.pipeline import Pipeline
    from .trace.recording import record_trace

__version__ = "0.1.0"

__all__ = [
    "ROW_ALIGNMENT",
    "DelayedLinear",
    "DualPipeError",
    "Exchange",
    "ExchangeClosedError",
    "ExpertPlacement",
    "GroupedQueryAttention",
    "KernelCompileError",
    "LatentAttention",
    "MissingKernelsWarning",
    "MoELayer",
    "OverlappedPair",
    "PeerTimeoutError",
    "Pipeline",
    "Plan",
    "RoutedExperts",
    "Router",
    "Routes",
    "RowsOverflowError",
    "Split",
    "TransformerBlock",
    "TransformerStage",
    "UncheckedVersionWarning",
    "balance_loss",
    "count_tokens",
    "cross_entropy",
    "delay_linears",
    "grouped_mlp",
    "load_optimizer_state_dict",
    "measure_placement",
    "optimizer_state_dict",
    "rebalance_experts",
    "record_trace",
    "tune_split",
]

_MODULES = {
    "balance.eplb": "measure_placement rebalance_experts",
    "balance.placement": "ExpertPlacement",
    "blocks.attention": "GroupedQueryAttention LatentAttention",
    "blocks.block": "TransformerBlock",
    "blocks.pair": "OverlappedPair",
    "blocks.stage": "TransformerStage",
    "blocks.tune": "Split tune_split",
    "errors": "DualPipeError ExchangeClosedError KernelCompileError "
    "MissingKernelsWarning PeerTimeoutError RowsOverflowError UncheckedVersionWarning",
    "exchange.exchange": "Exchange",
    "exchange.plan": "Plan",
    "gradients.delayed": "DelayedLinear delay_linears",
    "moe.checkpoint": "load_optimizer_state_dict optimizer_state_dict",
    "moe.layer": "MoELayer",
    "moe.routed": "RoutedExperts",
    "moe.router": "Router Routes",
    "ops.cross_entropy": "cross_entropy",
    "ops.expert_order": "ROW_ALIGNMENT",
    "ops.grouped_mlp": "grouped_mlp",
    "ops.route_reference": "balance_loss count_tokens",
    "pipeline.pipeline": "Pipeline",
    "trace.recording": "record_trace",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


class _Package(ModuleType):
    """The package, whose public names are found when they are asked for."""

    def __getattr__(self, name: str) -> Any:
        module = _MODULE_OF.get(name)
        if module is not None:
            value = getattr(import_module(f"{__name__}.{module}"), name)
            self.__dict__[name] = value
            return value
        if not name.startswith("_"):
            try:
                return import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        # Importing a module of that name would put it in the place of its function.
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
