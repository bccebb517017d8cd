"""TMA descriptors of Gluon kernels, made on the host at every launch."""

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from triton.experimental.gluon import language as gl

from .compat import GluonDescriptor

__all__ = ["describe", "shared_layout"]


def describe(
    x: torch.Tensor,
    block: Sequence[int],
    shape: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> GluonDescriptor:
    """Of boxes `block` of x, or of `shape` with `strides` in elements from where x starts."""
    if x.data_ptr() % 16:
        raise ValueError(
            f"a tensor {list(x.shape)} starts at address {x.data_ptr():#x}, TMA needs a multiple "
            "of 16: clone it"
        )
    shape = x.shape if shape is None else tuple(shape)
    strides = x.stride() if strides is None else tuple(strides)
    found = GluonDescriptor.__new__(GluonDescriptor)
    found.__dict__.update(_checked(x.dtype, shape, strides, tuple(block)), base=x)
    return found


@lru_cache(maxsize=1024)  # 4 us: sizes repeat, though the rows of an expert group seldom do
def _checked(dtype: torch.dtype, shape: tuple, strides: tuple, block: tuple) -> dict:
    layout = shared_layout(block, dtype)
    if 1 in shape:  # such a dimension may have any stride, and TMA wants multiples of 16 bytes
        step = 16 // dtype.itemsize
        outer = zip(shape[:-1], strides[:-1], strict=True)
        strides = (*(step if n == 1 and s % step else s for n, s in outer), strides[-1])
    base = torch.empty(0, dtype=dtype)
    return vars(GluonDescriptor(base, list(shape), list(strides), list(block), layout))


def shared_layout(block: Sequence[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """The layout in shared memory that TMA writes and wgmma reads: swizzled by up to 128 bytes."""
    bits = dtype.itemsize * 8
    width = min(128, block[-1] * bits // 8) if len(block) > 1 else 0
    return _swizzled(width, bits, len(block))


@cache  # making one checks its fields for 6 us
def _swizzled(width: int, bits: int, rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=rank)
