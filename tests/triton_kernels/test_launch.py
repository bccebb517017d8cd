"""A launch that is looked up passes what Triton's own would, to the kernel that it would compile.

The driver is a fake that notes what the C function of a kernel is called with; kernels are compiled
for sm_90, as everywhere. Triton 3.6 makes a C function for each kernel, later ones have one for all
(`Call.of`).
"""

import gc
import re
import weakref
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.6")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Boxes  # noqa: E402
from triton.runtime._allocation import NullAllocator  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from dualpipe_ext.compat import TRITON  # noqa: E402
from dualpipe_ext.errors import KernelCompileError  # noqa: E402
from dualpipe_ext.triton_kernels.launch import cached as launch  # noqa: E402
from dualpipe_ext.triton_kernels.launch.cached import cache_launches  # noqa: E402
from dualpipe_ext.triton_kernels.launch.descriptors import describe, shared_layout  # noqa: E402

pytestmark = pytest.mark.skipif(
    TRITON.problem(triton.__version__) is not None, reason="launches go Triton's way"
)
A_FUNCTION_A_KERNEL = hasattr(nvidia, "make_launcher")  # 3.6


NEGATE = tl.constexpr(False)


def copy_kernel(
    x_ptr,
    y_ptr,
    scale,
    n,
    m,
    SIZE: tl.constexpr,
    ADD: tl.constexpr,
    TWICE: tl.constexpr = 1,
    NEGATE: tl.constexpr = NEGATE,
):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i, mask=i < n, other=0) * scale
    if ADD:
        x += m
    if TWICE == 2:
        x *= 2
    if NEGATE:
        x = -x
    if y_ptr is not None:
        tl.store(y_ptr + i, x, mask=i < n)


def box_kernel(desc, out_desc, SIZE: tl.constexpr):
    out_desc.store([0, 0], desc.load([0, 0]))


def gluon_kernel(desc, SIZE: gl.constexpr):
    smem = gl.allocate_shared_memory(desc.dtype, desc.block_type.shape, desc.layout)  # noqa: F841


class Utils:
    """The part of Triton's CUDA utilities that a launch calls."""

    def load_binary(self, name, binary, *arguments):
        return 1, hash((name, binary)), 32, 0, 1024

    def __init__(self, launches: list):
        self.launches = launches

    def launch(self, *arguments):
        self.launches.append(Call.of(arguments))

    def build_signature_metadata(self, kinds):
        return bytes(len(kinds))

    def fill_tma_descriptor(self, address, *facts):
        return address, *(tuple(x) if isinstance(x, (list, tuple)) else x for x in facts)

    fill_tma_descriptor_tiled = fill_tma_descriptor

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536,
                "warpSize": 32}  # fmt: skip

    def unload_module(self, module):
        pass


class Driver:
    """One device of compute capability 9.0; every launch is noted."""

    binary_ext, launcher_cls = "cubin", nvidia.CudaLauncher

    def __init__(self):
        self.launches, self.stream, self.device = [], 7, 0
        self.utils = Utils(self.launches)

    def compile(self, **source):
        return SimpleNamespace(launch=self.utils.launch)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


@pytest.fixture
def fake(monkeypatch):
    found = Driver()
    if A_FUNCTION_A_KERNEL:
        monkeypatch.setattr(nvidia, "compile_module_from_src", found.compile)
        monkeypatch.setattr(nvidia, "library_dirs", list)
    else:  # what comes with the C function
        monkeypatch.setattr(nvidia, "PyKernelArg", SimpleNamespace)
        for name in ("CONSTEXPR", "KERNEL", "TUPLE"):
            monkeypatch.setattr(nvidia, f"ARG_{name}", name)
    before = driver._active
    driver.set_active(found)
    yield found
    gc.collect()  # kernels unload from the driver that loaded them
    driver.set_active(before)


class Call(
    namedtuple("Call", "grid stream function flags metadata launch_metadata hooks scratch values")
):
    """Arguments of the C function; flags are cooperative and PDL, scratch two buffers."""

    @classmethod
    def of(cls, arguments):
        x, y, z, stream, function, *flags = arguments[:7]
        if A_FUNCTION_A_KERNEL:
            *scratch, metadata, launch_metadata, enter, leave = arguments[7:13]
            values = arguments[13:]
        else:
            metadata, launch_metadata, enter, leave, *scratch = arguments[7:13]
            annotations, signature, given = arguments[13:]
            pairs = zip(annotations, given, strict=False)
            values = [value for note, value in pairs if note.type != "CONSTEXPR"]
            assert len(values) == len(signature)
        hooks, values = (enter, leave), tuple(map(address_of, values))
        grid, flags, scratch = (x, y, z), tuple(flags), tuple(scratch)
        return cls(grid, stream, function, flags, metadata, launch_metadata, hooks, scratch, values)


def address_of(x):
    """The C function takes tensors, too, and asks them."""
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def launches_twice(fake, plain, cached, grid, *arguments, **constants):
    """The same launch by Triton and by ours; whether ours looked it up."""
    before = len(cached.run._found)
    del fake.launches[:]
    for kernel in (plain, cached):
        kernel[grid](*arguments, **constants)
    expected, given = (call._replace(launch_metadata=None, hooks=None) for call in fake.launches)
    assert expected == given
    return len(cached.run._found) == before


def both(function, jit=triton.jit, **options):
    return jit(**options)(function), cache_launches(jit(**options)(function))


def test_as_triton_whatever_changes(fake):
    pair = both(copy_kernel)
    x, y = torch.zeros(64), torch.zeros(64)
    usual = {"SIZE": 32, "ADD": True, "num_warps": 1}
    first = ((3,), x, y, 2.0, 17, 5)
    assert not launches_twice(fake, *pair, *first, **usual)
    assert launches_twice(fake, *pair, *first, **usual)
    for n in (18, 2**30 + 1):  # of one kind
        assert launches_twice(fake, *pair, (4, 5), y, x, 0.5, n, 7, **usual)
    fake.stream = 8
    assert launches_twice(fake, *pair, (1, 2, 3), x, y, 2.0, 17, 5, **usual)
    for n in (1, 16, 0, 2**31, 2**35, -1, -(2**31), -(2**31) - 16, 2**63 - 16, -(2**63), 2**63):
        launches_twice(fake, *pair, (3,), x, y, 2.0, n, 5, **usual)
        assert launches_twice(fake, *pair, (3,), x, y, 2.0, n, 5, **usual), n
    for a, b in ((x[1:], y), (x, y[1:]), (x.half(), y), (x, None), (torch.nn.Parameter(x), y)):
        launches_twice(fake, *pair, (3,), a, b, 2.0, 17, 5, **usual)
        assert launches_twice(fake, *pair, (3,), a, b, 2.0, 17, 5, **usual)
    for change in ({"SIZE": 64}, {"ADD": False}, {"num_warps": 2}, {"TWICE": 2}, {"NEGATE": True}):
        assert not launches_twice(fake, *pair, *first, **usual | change)
        assert launches_twice(fake, *pair, *first, **usual | change)


def test_sizes_that_are_not_specialized(fake):
    pair = both(copy_kernel, do_not_specialize=["n", "m"])
    x, usual = torch.zeros(64), {"SIZE": 32, "ADD": True}
    for n in (17, 16, 1, 2**31, 17):
        launches_twice(fake, *pair, (3,), x, x, 2.0, n, 5, **usual)


def test_descriptors(fake):
    pair = both(box_kernel)
    x = torch.zeros(64, 64)
    boxes = {
        size: [TensorDescriptor(x, [64, 64], [64, 1], [16, size]) for _ in range(2)]
        for size in (16, 32)
    }
    assert not launches_twice(fake, *pair, (1,), *boxes[16], SIZE=1)
    assert launches_twice(fake, *pair, (1,), *boxes[16], SIZE=1)
    assert not launches_twice(fake, *pair, (1,), *boxes[32], SIZE=1)
    half = [TensorDescriptor(x.half(), [64, 64], [64, 1], [16, 16]) for _ in range(2)]
    assert not launches_twice(fake, *pair, (1,), *half, SIZE=1)


@pytest.mark.parametrize(
    ("shape", "strides"), [(None, None), ((32, 2, 64), (128, 64, 1)), ((1, 64), (64, 1))]
)
def test_described_boxes_are_what_triton_makes_of_them(shape, strides):
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    block = [1] * (len(shape or x.shape) - 1) + [64]
    layout = shared_layout(block, x.dtype)
    want = Boxes(x, list(shape or x.shape), list(strides or x.stride()), block, layout)
    for _ in range(2):  # made, and made of what is kept
        found = describe(x, block, shape, strides)
        assert type(found) is Boxes and found.base is x
        assert vars(found) | {"base": None} == vars(want) | {"base": None}
        assert found.layout is layout  # of which a launch's key has the number


def test_boxes_that_tma_does_not_take():
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"starts at address 0x\w+, TMA needs a multiple of 16"):
        describe(x[:, 1:], [16, 16])
    with pytest.raises(AssertionError, match="16-byte aligned"):
        describe(x, [16, 16], (16, 16), (17, 1))
    assert describe(x, [16, 16], (1, 16), (17, 1)).strides == [8, 1]  # any would do


def test_layouts(fake):
    pair = both(gluon_kernel, gluon.jit)
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    known = []
    for width in (64, 128, 64, 128):
        layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=16, rank=2)
        boxes = Boxes(x, [64, 64], [64, 1], [16, 64], layout)
        launches_twice(fake, *pair, (1,), boxes, SIZE=1)
        known.append(launches_twice(fake, *pair, (1,), boxes, SIZE=1))
    assert all(known)


def test_a_layout_in_a_key_stays_alive(fake):
    """Keys have the number of its object, which another could get."""
    _, kernel = both(gluon_kernel, gluon.jit)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    boxes = Boxes(torch.zeros(64, 64, dtype=torch.bfloat16), [64, 64], [64, 1], [16, 64], layout)
    kernel[(1,)](boxes, SIZE=1)
    alive = weakref.ref(layout)
    del layout, boxes, fake.launches[:]
    gc.collect()
    assert alive() is not None


def test_devices_have_kernels_of_their_own(fake):
    pair = both(copy_kernel)
    first = ((3,), torch.zeros(64), None, 2.0, 17, 5)
    for device in (0, 1):
        fake.device = device
        assert not launches_twice(fake, *pair, *first, SIZE=32, ADD=True)
    fake.device = 0
    assert launches_twice(fake, *pair, *first, SIZE=32, ADD=True)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_get_what_triton_gives_them(fake, name):
    _, kernel = both(copy_kernel)
    first = (torch.zeros(64), None, 2.0, 17, 5)
    kernel[(1,)](*first, SIZE=32, ADD=True)
    hooks = getattr(triton.knobs.runtime, name)
    place = ["launch_enter_hook", "launch_exit_hook"].index(name)
    hooks.add(hook := lambda facts: None)
    try:
        kernel[(1,)](*first, SIZE=32, ADD=True)
    finally:
        hooks.remove(hook)
    assert fake.launches[-1].hooks[place] is hooks
    kernel[(1,)](*first, SIZE=32, ADD=True)
    assert fake.launches[-1].hooks[place] is None


def test_hooks_that_are_no_chains(fake, monkeypatch):
    _, kernel = both(copy_kernel)
    first = (torch.zeros(64), None, 2.0, 17, 5)
    for hook in (None, lambda facts: None):
        monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", hook)
        for _ in range(2):
            kernel[(1,)](*first, SIZE=32, ADD=True)
        assert fake.launches[-1].hooks[1] is hook


def test_a_warm_up_and_a_hook_of_the_kernel(fake):
    _, kernel = both(copy_kernel)
    first, seen = (torch.zeros(64), None, 2.0, 17, 5), []
    kernel[(1,)](*first, SIZE=32, ADD=True)
    kernel.warmup(*first, SIZE=32, ADD=True, grid=(1,))
    assert len(fake.launches) == 1
    kernel.pre_run_hooks.append(lambda *arguments, **constants: seen.append(constants["SIZE"]))
    kernel[(1,)](*first, SIZE=32, ADD=True)
    assert seen == [32]


def test_constants_by_position_are_left_to_triton(fake):
    pair = both(copy_kernel)
    x = torch.zeros(64)
    for size in (32, 64, 32):
        launches_twice(fake, *pair, (3,), x, x, 2.0, 17, 5, size, ADD=True)
    assert not pair[1].run._found


def test_in_pairs(fake):
    """Launches that are looked up are clusters of two where the programs are even in number."""
    kernel = cache_launches(triton.jit(copy_kernel), in_pairs=True)
    x = torch.zeros(64)
    for grid in ((6,), (6,), (7,), (6, 1)):
        kernel[grid](x, x, 2.0, 17, 5, SIZE=32, ADD=True)
    warps, _, shared = fake.launches[0].metadata
    launched = [(call.grid, call.metadata[1]) for call in fake.launches]
    assert launched == [((6, 1, 1), 1), ((3, 1, 1), 2), ((7, 1, 1), 1), ((6, 1, 1), 1)]
    assert all(call.metadata[::2] == (warps, shared) for call in fake.launches)


def test_a_kernel_that_wants_scratch_memory_gets_it(fake):
    def launcher(source, metadata):
        found = nvidia.CudaLauncher(source, metadata)
        found.global_scratch_size, found.global_scratch_align = 64, 16
        return found

    fake.launcher_cls = launcher
    sizes = []
    triton.set_allocator(lambda size, align, stream: sizes.append((size, align, stream)) or 4096)
    boxes = [TensorDescriptor(torch.zeros(64, 64), [64, 64], [64, 1], [16, 16]) for _ in range(2)]
    pair = both(box_kernel)
    try:
        assert not launches_twice(fake, *pair, (3,), *boxes, SIZE=1)
        assert launches_twice(fake, *pair, (3,), *boxes, SIZE=1)
    finally:
        triton.set_allocator(NullAllocator())
    assert sizes == [(3 * 64, 16, 7)] * 4 and fake.launches[-1].scratch == (4096, None)


def test_another_release_launches_its_own_way(fake, monkeypatch):
    """It may tell kernels apart by what is not in our key."""
    monkeypatch.setattr(launch, "IS_CHECKED", False)
    pair = both(copy_kernel)
    for _ in range(2):
        launches_twice(fake, *pair, (3,), torch.zeros(64), None, 2.0, 17, 5, SIZE=32, ADD=True)
    assert not pair[1].run._found


def gone_kernel(x_ptr):
    tl.no_such_function(x_ptr)


def test_a_kernel_that_does_not_compile_is_named(fake):
    kernel = cache_launches(triton.jit(gone_kernel))
    message = f"kernel gone_kernel does not compile with Triton {triton.__version__} "
    with pytest.raises(KernelCompileError, match=re.escape(message)) as error:
        kernel[(1,)](torch.zeros(64))
    assert "no_such_function" in str(error.value) and "\n" not in str(error.value)
    assert not error.value.is_gluon and error.value.__cause__ is not None


def test_an_error_of_a_launch_stays_what_it_is(fake, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    kernel = cache_launches(triton.jit(copy_kernel))
    monkeypatch.setattr(fake.utils, "launch", refuse)
    with pytest.raises(RuntimeError, match="illegal memory access") as error:
        kernel[(1,)](torch.zeros(64), None, 2.0, 17, 5, SIZE=32, ADD=True)
    assert not isinstance(error.value, KernelCompileError)
