"""Every kernel as launches, to compile without a GPU: one table, by group and name as in
tests/resources/triton-*.json."""

from tests.support.launches.attention import attention
from tests.support.launches.block_ops import block_ops
from tests.support.launches.experts import expert_rows, grouped_fp8, grouped_mlp
from tests.support.launches.hopper import grouped_hopper, grouped_wgrad
from tests.support.launches.launch import Launch

__all__ = ["LAUNCHES", "Launch"]

_sm_90 = [
    *attention(),
    *block_ops(),
    *expert_rows(),
    *grouped_fp8(),
    *grouped_hopper(),
    *grouped_mlp(),
    *grouped_wgrad(),
]
# Every plain Triton kernel; Gluon kernels are written for Hopper's instructions.
LAUNCHES = (*_sm_90, *(launch.for_sm_100() for launch in _sm_90 if launch.also_sm_100))
