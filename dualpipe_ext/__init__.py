"""dualpipe_ext: expert-parallel MoE training whose communication hides behind its computation.

Importing it imports nothing, not even torch: a public name loads its module at its first use.
The operators torch.ops.dualpipe_ext.* are registered by their modules. Before loading an exported
program, `import dualpipe_ext.block`, which registers those of a block.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attention import GroupedQueryAttention, LatentAttention
    from .block import RoutedExperts, TransformerBlock
    from .eplb import measure_placement, rebalance_experts
    from .errors import (
        DualPipeError,
        ExchangeClosedError,
        KernelCompileError,
        MissingKernelsWarning,
        PeerTimeoutError,
        RowsOverflowError,
        UncheckedVersionWarning,
    )
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
    "KernelCompileError",
    "LatentAttention",
    "MissingKernelsWarning",
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
    "UncheckedVersionWarning",
    "grouped_mlp",
    "load_optimizer_state_dict",
    "measure_placement",
    "optimizer_state_dict",
    "rebalance_experts",
    "record_trace",
    "tune_split",
]

_MODULES = {
    "attention": "GroupedQueryAttention LatentAttention",
    "block": "RoutedExperts TransformerBlock",
    "eplb": "measure_placement rebalance_experts",
    "errors": "DualPipeError ExchangeClosedError KernelCompileError MissingKernelsWarning "
    "PeerTimeoutError RowsOverflowError UncheckedVersionWarning",
    "exchange": "Exchange",
    "grouped_mlp": "grouped_mlp",
    "moe": "MoELayer",
    "optimizer_state": "load_optimizer_state_dict optimizer_state_dict",
    "overlap": "OverlappedPair",
    "pipeline": "Pipeline",
    "placement": "ExpertPlacement",
    "recording": "record_trace",
    "routing": "Plan",
    "stage": "TransformerStage",
    "tune": "Split tune_split",
    "weight_gradients": "DelayedLinear",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


class _Package(ModuleType):
    """The package, whose public names are found when they are asked for."""

    def __getattr__(self, name: str):
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
        # Importing grouped_mlp.py would put the module in the place of its function.
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self):
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
