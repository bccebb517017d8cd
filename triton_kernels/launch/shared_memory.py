"""Shared memory of Gluon kernels: boxes, mbarriers, and integers that one warp tells the others."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

__all__ = ["allocate", "allocate_barriers", "allocate_integers", "matrix", "receive", "send"]


@gluon.jit
def allocate(desc, count: gl.constexpr):
    """Shared memory for `count` boxes of a descriptor."""
    shape: gl.constexpr = [count] + desc.block_type.shape  # noqa: RUF005 (no stars in Triton)
    return gl.allocate_shared_memory(desc.dtype, shape, desc.layout)


@gluon.jit
def allocate_integers(count: gl.constexpr):
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int32, [count, 1], layout)


@gluon.jit
def allocate_barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """`count` mbarriers that each complete a phase with `arrivals` arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def matrix(smem, slot):
    """Buffer `slot` without the box's leading dimensions of one."""
    buffer = smem.index(slot)
    return buffer.reshape([buffer.shape[-2], buffer.shape[-1]])


@gluon.jit
def send(slots, slot, numbers, count: gl.constexpr):
    """Leaves `count` integers in a slot of shared memory, from one warp; an mbarrier that this warp
    arrives at afterwards shows them to others."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in gl.static_range(count):
        slots.index(slot * count + i).store(gl.full([1], numbers[i], gl.int32, layout))


@gluon.jit
def receive(slots, slot, i: gl.constexpr, count: gl.constexpr, WARPS: gl.constexpr = 4):
    """Integer i of a slot that `send` filled with `count`, in WARPS warps."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.sum(slots.index(slot * count + i).load(layout), 0)
