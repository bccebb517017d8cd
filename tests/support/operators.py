"""The fused operators' functions and modules, by the names that tests use: the one place that says
which file of dualpipe_ext.ops has them."""

from dualpipe_ext.ops import cross_entropy as cross_entropy_module
from dualpipe_ext.ops import grouped_fp8
from dualpipe_ext.ops import rotary as rotary_module
from dualpipe_ext.ops.attention import flash_attention
from dualpipe_ext.ops.cross_entropy import cross_entropy
from dualpipe_ext.ops.grouped_mlp import grouped_mlp
from dualpipe_ext.ops.heads import split_heads, turn_tail
from dualpipe_ext.ops.norm import rms_norm
from dualpipe_ext.ops.rotary import rotary, rotary_, rotary_tables
from dualpipe_ext.ops.route import route
from dualpipe_ext.ops.swiglu import swiglu

__all__ = [
    "cross_entropy",
    "cross_entropy_module",
    "flash_attention",
    "grouped_fp8",
    "grouped_mlp",
    "rms_norm",
    "rotary",
    "rotary_",
    "rotary_module",
    "rotary_tables",
    "route",
    "split_heads",
    "swiglu",
    "turn_tail",
]
