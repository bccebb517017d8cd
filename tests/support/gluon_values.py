"""What an emulated Gluon program holds: registers, shared memory, barriers. See gluon_emulator."""

import contextvars
import math
import operator
import threading
from types import SimpleNamespace

import numpy as np
import torch

PATIENCE = 60.0  # seconds until a wait counts as a deadlock

_program = contextvars.ContextVar("program")


class Stuck(RuntimeError):
    pass


# ---- Registers ----


def raw(x):
    return x.data if isinstance(x, Tensor) else x


class Tensor:
    """A tensor in registers."""

    def __init__(self, data: torch.Tensor, layout=None):
        self.data = data
        self.type = SimpleNamespace(layout=layout)

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: self.data.dtype)

    def to(self, dtype, bitcast=False):
        data = self.data.view(dtype) if bitcast else self.data.to(dtype)
        return Tensor(data, self.type.layout)

    def reshape(self, shape):
        return Tensor(self.data.reshape(shape))

    def permute(self, order):
        return Tensor(self.data.permute(order))

    def split(self):
        return tuple(Tensor(part) for part in self.data.unbind(-1))

    def __bool__(self):
        return bool(self.data)

    def __neg__(self):
        return Tensor(-self.data, self.type.layout)


def _binary(name, swap):
    function = getattr(operator, name)

    def method(self, other):
        if isinstance(other, Pointer):
            return NotImplemented
        other_raw = raw(other)
        value = function(other_raw, self.data) if swap else function(self.data, other_raw)
        layout = self.type.layout
        if isinstance(other, Tensor) and other.data.dim() > self.data.dim():
            layout = other.type.layout
        return Tensor(value, layout)

    return method


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
):
    setattr(Tensor, f"__{_name}__", _binary(_name, False))
    if _name in ("add", "sub", "mul", "truediv"):
        setattr(Tensor, f"__r{_name}__", _binary(_name, True))
Tensor.__and__, Tensor.__or__ = _binary("and_", False), _binary("or_", False)
for _name in ("xor", "lshift", "rshift"):
    setattr(Tensor, f"__{_name}__", _binary(_name, False))
Tensor.__hash__ = None


class Pointer:
    """An address in a tensor's memory: elements from its start."""

    def __init__(self, memory: torch.Tensor, offset=0):
        self.memory, self.offset = memory, offset

    def __add__(self, other):
        if isinstance(other, Tensor):
            other = other.data
        return Pointer(self.memory, self.offset + other)

    __radd__ = __add__

    @property
    def dtype(self):
        return SimpleNamespace(element_ty=self.memory.dtype)


def flat(x: torch.Tensor) -> torch.Tensor:
    """All memory of a tensor from its first element on."""
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return whole[x.storage_offset() :]


def load(pointer, mask=None, other=0.0, cache_modifier=""):
    offset = pointer.offset
    if not isinstance(offset, torch.Tensor):
        return pointer.memory[offset].item()
    mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else raw(mask)
    mask = mask.expand(offset.shape)
    safe = torch.where(mask, offset, 0)
    assert not mask.any() or 0 <= int(safe.min()) <= int(safe.max()) < len(pointer.memory)
    value = (
        pointer.memory[safe]
        if mask.any()
        else torch.zeros(offset.shape, dtype=pointer.memory.dtype)
    )
    return Tensor(torch.where(mask, value, torch.tensor(other, dtype=value.dtype)))


def store(pointer, value, mask=None):
    offset = torch.as_tensor(pointer.offset)
    mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else raw(mask)
    value = torch.as_tensor(raw(value)).to(pointer.memory.dtype).expand(offset.shape)
    chosen = offset[mask.expand(offset.shape)]
    assert not len(chosen) or 0 <= int(chosen.min()) <= int(chosen.max()) < len(pointer.memory)
    pointer.memory[chosen] = value[mask.expand(offset.shape)]


def atomic_add(pointer, value):
    with _program.get().lock:
        old = pointer.memory[pointer.offset].item()
        pointer.memory[pointer.offset] = old + value
    return old


# ---- Shared memory ----


class Shared:
    """A view of an allocation; `root` is what all views of it have in common."""

    layout = None

    def __init__(self, data: torch.Tensor, root=None):
        self.data = data
        self.root = root or SimpleNamespace(readers=[], unfenced=[])

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: self.data.dtype)

    def index(self, i):
        assert 0 <= i < self.data.shape[0]
        if isinstance(self.data, np.ndarray):
            return self.data[i]
        return Shared(self.data[i], self.root)

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, start, length), self.root)

    def permute(self, order):
        return Shared(self.data.permute(order), self.root)

    def reshape(self, shape):
        return Shared(self.data.view(shape), self.root)

    def reinterpret(self, dtype, shape, layout):
        size = math.prod(shape) * dtype.itemsize
        memory = self.data.flatten().view(torch.uint8)
        if size > len(memory):
            # Numbers of four bytes where the kernel counts on two: memory of their own.
            memory = torch.full((size,), 255, dtype=torch.uint8)
            return Shared(memory.view(dtype).view(shape))
        return Shared(memory[:size].view(dtype).view(shape), self.root)

    def span(self):
        # In bytes: views of one allocation may have different dtypes.
        start = self.data.storage_offset()
        last = sum((n - 1) * s for n, s in zip(self.data.shape, self.data.stride(), strict=True))
        size = self.data.dtype.itemsize
        return range(start * size, (start + last + 1) * size)

    def meets(self, spans):
        mine = self.span()
        return any(mine.start < other.stop and other.start < mine.stop for other in list(spans))

    def begin_write(self):
        if self.meets(self.root.readers):
            raise RuntimeError("shared memory written while a product still reads it")

    def store(self, value):
        assert value.dtype == self.dtype, (value.dtype, self.dtype)
        assert value.shape == self.shape, (value.shape, self.shape)
        self.begin_write()
        span = self.span()
        self.root.unfenced.append(span)
        _fences().append((self.root, span))
        self.data.copy_(value.data)

    def load(self, layout):
        return Tensor(self.data.clone(), layout)

    def read_by_hardware(self):
        if self.meets(self.root.unfenced):
            raise RuntimeError("no fence_async_shared between a store and an asynchronous read")
        return self.data


_local = threading.local()


def _fences():
    if not hasattr(_local, "written"):
        _local.written = []
    return _local.written


def fence_async_shared():
    for root, span in _fences():
        root.unfenced.remove(span)
    _fences().clear()


def allocate_shared_memory(dtype, shape, layout):
    if isinstance(layout, BarrierLayout):
        bars = np.empty(shape[0], dtype=object)
        for i in range(shape[0]):
            bars[i] = Barrier()
        return Shared(bars)
    fill = math.nan if dtype.is_floating_point else 77
    return Shared(torch.full(list(shape), fill, dtype=dtype))


class BarrierLayout:
    pass


class Barrier:
    def init(self, count):
        self.count = self.missing = count
        self.bytes = self.phase = 0

    def arrive(self, count=1, expected=0, arrived=0):
        condition = _program.get().condition
        with condition:
            self.missing -= count
            self.bytes += expected - arrived
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == 0 and self.bytes == 0:
                self.phase ^= 1
                self.missing = self.count
                condition.notify_all()

    def wait(self, phase):
        program = _program.get()
        with program.condition:
            done = program.condition.wait_for(
                lambda: self.phase != phase or program.failure, timeout=PATIENCE
            )
            if program.failure:
                raise Stuck("another partition failed")
            if not done:
                raise Stuck(f"barrier waited for {PATIENCE} s: {self.missing} arrivals missing")
