"""Runs Gluon kernels on the CPU, as Triton's interpreter does for Triton: what a program computes,
and whether its barriers fit together.

`emulate(path)` imports a kernel's file with Gluon replaced by this module. Every warp-specialised
partition is a thread of its own; values are torch tensors of the kernel's dtypes, layouts mean
nothing. What hardware leaves undefined is an error here: waits that never end, products read before
they are waited for or whose operands change under them, shared memory that the asynchronous proxy
reads without a fence after ordinary stores, TMA addresses outside the tensor.
"""

import contextvars
import importlib
import itertools
import math
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

from tests.support.gluon_values import (
    BarrierLayout,
    Pointer,
    Shared,
    Stuck,
    Tensor,
    _local,
    _program,
    allocate_shared_memory,
    atomic_add,
    fence_async_shared,
    flat,
    load,
    raw,
    store,
)

# ---- TMA ----


class TensorDescriptor:
    def __init__(self, base, shape, strides, block_shape, layout):
        self.base, self.shape, self.strides = base, list(shape), list(strides)
        self.block_shape, self.layout = list(block_shape), layout
        count = math.prod(self.block_shape)
        self.block_type = SimpleNamespace(
            shape=self.block_shape, nbytes=count * base.dtype.itemsize
        )
        assert strides[-1] == 1 and len(self.shape) <= 5 and base.data_ptr() % 16 == 0
        assert all(s * base.dtype.itemsize % 16 == 0 for s in strides[:-1]), strides
        assert all(0 < n < 2**32 for n in self.shape)
        assert all(0 < n <= 256 for n in self.block_shape)

    dtype = property(lambda self: self.base.dtype)

    def places(self, coordinates):
        """Element numbers of a box in the tensor's memory, and which of them exist."""
        assert len(coordinates) == len(self.shape)
        place, exists = np.zeros((), np.int64), np.ones((), bool)
        sizes = zip(coordinates, self.block_shape, self.shape, self.strides, strict=True)
        with np.errstate(over="ignore"):
            for first, count, size, stride in sizes:
                i = np.int64(first) + np.arange(count, dtype=np.int64)
                # 64-bit arithmetic of bytes, which wraps around.
                byte = i * np.int64(stride * self.base.dtype.itemsize)
                place = place[..., None] + byte
                exists = exists[..., None] & (i >= 0) & (i < size)
        place = place // self.base.dtype.itemsize
        memory = flat(self.base)
        inside = place[exists]
        assert not inside.size or (inside.min() >= 0 and inside.max() < len(memory)), "TMA outside"
        place = torch.from_numpy(np.where(exists, place, 0))
        return memory, place, torch.from_numpy(exists)


def async_load(descriptor, coordinates, barrier, target):
    assert target.shape == descriptor.block_shape, (target.shape, descriptor.block_shape)
    memory, place, exists = descriptor.places(coordinates)
    target.begin_write()
    value = memory[place] if len(memory) else torch.zeros(place.shape, dtype=descriptor.dtype)
    target.data.copy_(torch.where(exists, value, torch.zeros((), dtype=value.dtype)))
    barrier.arrive(0, arrived=descriptor.block_type.nbytes)


def async_store(descriptor, coordinates, source):
    assert source.shape == descriptor.block_shape
    memory, place, exists = descriptor.places(coordinates)
    memory[place[exists]] = source.read_by_hardware()[exists]


def async_reduce_add(descriptor, coordinates, source):
    assert source.shape == descriptor.block_shape
    memory, place, exists = descriptor.places(coordinates)
    with _program.get().lock:
        memory.index_add_(0, place[exists], source.read_by_hardware()[exists])


# ---- Products ----


class Product:
    """A warpgroup's product in flight: computed when it is waited for."""

    def __init__(self, a, b, acc, use_acc):
        self.operands, self.acc, self.use_acc = (a, b), acc, use_acc
        self.type = acc.type
        self.value = None
        for x in self.operands:
            if isinstance(x, Shared):
                x.read_by_hardware()
                x.root.readers.append(x.span())

    shape = property(lambda self: self.acc.shape)

    def finish(self):
        if self.value is not None:
            return
        a, b = (x.data.float() for x in self.operands)
        assert a.shape[1] == b.shape[0], (a.shape, b.shape)
        total = a @ b
        if self.use_acc:
            acc = self.acc
            if isinstance(acc, Product):
                assert acc.value is not None
                acc = acc.value
            total = total + acc.data
        assert list(total.shape) == self.shape, (total.shape, self.shape)
        self.value = Tensor(total, self.type.layout)
        for x in self.operands:
            if isinstance(x, Shared):
                x.root.readers.remove(x.span())


def _in_flight():
    if not hasattr(_local, "products"):
        _local.products = []
    return _local.products


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
    assert isinstance(b, Shared) and is_async
    product = Product(a, b, acc, use_acc)
    _in_flight().append(product)
    return product


def warpgroup_mma_wait(outstanding, deps):
    flight = _in_flight()
    while len(flight) > outstanding:
        flight.pop(0).finish()
    values = []
    for x in deps:
        if isinstance(x, Product):
            # Still flying: hardware gives whatever is in the registers.
            x = x.value if x.value is not None else x
        values.append(x)
    return values[0] if len(values) == 1 else tuple(values)


# ---- Programs ----


def warp_specialize(partitions, worker_num_warps, worker_num_regs):
    program = _program.get()
    assert len(worker_num_warps) == len(worker_num_regs) == len(partitions) - 1

    def run(function, arguments):
        try:
            function(*arguments)
            assert not _in_flight(), "products left in flight"
        except BaseException as error:
            with program.condition:
                if not (program.failure and isinstance(error, Stuck)):
                    program.failure = error
                program.condition.notify_all()

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(run, function, arguments))
        for function, arguments in partitions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if program.failure:
        raise program.failure


class Kernel:
    def __init__(self, function):
        self.function = self.fn = function
        self.__name__ = function.__name__

    def __call__(self, *arguments, **named):
        return self.function(*arguments, **named)

    def __getitem__(self, grid):
        def launch(*arguments, num_warps=4, **constants):
            arguments = [Pointer(flat(x)) if isinstance(x, torch.Tensor) else x for x in arguments]
            lock = threading.Lock()
            for program_id in range(grid[0]):
                state = SimpleNamespace(
                    program_id=program_id,
                    num_programs=grid[0],
                    condition=threading.Condition(),
                    lock=lock,
                    failure=None,
                )
                token = _program.set(state)
                try:
                    self.function(*arguments, **constants)
                finally:
                    _program.reset(token)

        return launch


def jit(function=None, **options):
    return Kernel if function is None else Kernel(function)


def _reduced(function):
    def reduce(x, axis):
        value = function(x.data, axis)
        return value.item() if value.dim() == 0 else Tensor(value)

    return reduce


def _elementwise(function):
    return lambda x: Tensor(function(x.data), x.type.layout)


def _where(condition, a, b):
    condition, a, b = raw(condition), raw(a), raw(b)
    like = a if isinstance(a, torch.Tensor) else b
    dtype = like.dtype if isinstance(like, torch.Tensor) else torch.float32
    a, b = (torch.as_tensor(x, dtype=dtype) for x in (a, b))
    return Tensor(torch.where(condition, a, b))


# What kernels ask of the hardware by name.
INSTRUCTIONS = {"ex2.approx.ftz.f32": torch.exp2, "rcp.approx.ftz.f32": torch.reciprocal}


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    (x,) = args
    return Tensor(INSTRUCTIONS[asm.split()[0]](x.data), x.type.layout)


def _pairwise(function):
    def apply(a, b):
        a, b = raw(a), raw(b)
        like = a if isinstance(a, torch.Tensor) else b
        a, b = (torch.as_tensor(x, dtype=like.dtype) for x in (a, b))
        return Tensor(function(a, b))

    return apply


def _language() -> ModuleType:
    gl = ModuleType("gluon.language")
    layouts = (
        "BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DotOperandLayout",
        "SwizzledSharedLayout", "NVMMASharedLayout",
    )  # fmt: skip
    for name in layouts:
        setattr(gl, name, lambda *arguments, **named: None)
    gl.constexpr = lambda value: value
    gl.float32, gl.float16, gl.bfloat16 = torch.float32, torch.float16, torch.bfloat16
    gl.int16, gl.int32, gl.int64 = torch.int16, torch.int32, torch.int64
    gl.static_range = range
    gl.program_id = lambda axis: _program.get().program_id
    gl.num_programs = lambda axis: _program.get().num_programs
    gl.arange = lambda start, end, layout=None: Tensor(torch.arange(start, end), layout)
    gl.full = lambda shape, value, dtype, layout=None: Tensor(
        torch.full(list(shape), value, dtype=dtype), layout
    )
    gl.zeros = lambda shape, dtype, layout=None: gl.full(shape, 0, dtype, layout)
    gl.cast = lambda x, dtype: x.to(dtype) if isinstance(x, Tensor) else x
    gl.expand_dims = lambda x, axis: Tensor(x.data.unsqueeze(axis), x.type.layout)
    gl.convert_layout = lambda x, layout, assert_trivial=False: Tensor(x.data, layout)
    gl.sum, gl.max = _reduced(torch.sum), _reduced(torch.amax)
    gl.exp2, gl.log2 = _elementwise(torch.exp2), _elementwise(torch.log2)
    gl.where, gl.maximum, gl.minimum = _where, _pairwise(torch.maximum), _pairwise(torch.minimum)
    gl.load, gl.store, gl.atomic_add = load, store, atomic_add
    gl.inline_asm_elementwise = inline_asm_elementwise
    gl.allocate_shared_memory = allocate_shared_memory
    gl.warp_specialize = warp_specialize
    return gl


def _hopper() -> ModuleType:
    hopper = ModuleType("gluon.language.nvidia.hopper")
    hopper.fence_async_shared = fence_async_shared
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = warpgroup_mma, warpgroup_mma_wait
    hopper.mbarrier = SimpleNamespace(
        MBarrierLayout=BarrierLayout,
        init=lambda bar, count: bar.init(count),
        wait=lambda bar, phase: bar.wait(phase),
        arrive=lambda bar, count=1: bar.arrive(count),
        expect=lambda bar, size: bar.arrive(1, expected=size),
    )
    hopper.tma = SimpleNamespace(
        store_wait=lambda pendings: None,
    )
    return hopper


def _compat() -> ModuleType:
    compat = ModuleType("compat")
    compat.GluonDescriptor, compat.barrier = TensorDescriptor, lambda: None
    compat.async_load, compat.async_store = async_load, async_store
    compat.async_reduce_add = async_reduce_add
    compat.reinterpret = lambda memory, *how: memory.reinterpret(*how)
    return compat


_numbers = itertools.count()


def _as_it_is(kernel=None, **options):
    return _as_it_is if kernel is None else kernel


def emulate(folder: Path, *names: str) -> list[ModuleType]:
    """The files `names`.py of a folder as modules that run on the CPU, sharing their imports."""
    triton, experimental = ModuleType("triton"), ModuleType("triton.experimental")
    triton.cdiv = lambda a, b: -(-a // b)
    gluon = ModuleType("gluon")
    gluon.jit, gluon.language = jit, _language()
    experimental.gluon = gluon
    prefix = "triton.experimental.gluon"
    fakes = {
        "triton": triton,
        "triton.experimental": experimental,
        prefix: gluon,
        f"{prefix}.language": gluon.language,
        f"{prefix}.language.nvidia": ModuleType("gluon.language.nvidia"),
        f"{prefix}.language.nvidia.hopper": _hopper(),
    }
    package = ModuleType(f"emulated_{next(_numbers)}")
    package.__path__ = [str(folder)]
    fakes[f"{package.__name__}.launch.compat"] = _compat()
    fakes[f"{package.__name__}.launch.cached"] = launch = ModuleType("cached")
    launch.cache_launches = _as_it_is
    before = {name: sys.modules.get(name) for name in fakes}
    sys.modules.update(fakes | {package.__name__: package})
    try:
        return [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
