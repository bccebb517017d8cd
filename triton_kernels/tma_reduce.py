"""TMA's addition into global memory, which Triton 3.6 has and its Gluon does not show."""

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin


@builtin
def async_reduce_add(descriptor, coordinates, source, _semantic=None):
    """Adds `source` in shared memory to a box of the descriptor's tensor; waited for by
    tma.store_wait, as a store is."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, source.handle
    )
