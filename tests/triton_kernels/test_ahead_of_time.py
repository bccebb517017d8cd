"""Every kernel compiles without a GPU, for sm_90 and, if it is plain Triton, for sm_100, into no
more than tests/resources says, of the instructions that it is meant to have."""

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from dualpipe_ext.triton_kernels.experts import wgrad_hopper
from tests.support.ahead_of_time import check_resources, compile_launch, kernel_of, read_table
from tests.support.launches import LAUNCHES
from tests.support.launches.hopper import wgrad_configuration

KERNELS = Path(__file__).resolve().parents[2] / "triton_kernels"
BY_KERNEL = {launch.kernel: launch for launch in reversed(LAUNCHES) if launch.arch == 90}
FIRST = {id(launch) for launch in BY_KERNEL.values()}  # one of each kernel, for `make test-fast`
CHOSEN = [
    pytest.param(launch, id=str(launch), marks=() if id(launch) in FIRST else pytest.mark.slow)
    for launch in LAUNCHES
    if launch.always or os.environ.get("DUALPIPE_COMPILE_ALL")
]


@pytest.mark.parametrize("launch", CHOSEN)
def test_compiles(launch):
    """`found`: registers, bytes of stack, bytes of shared memory."""
    compiled = compile_launch(launch)
    found = check_resources(launch, compiled)
    if launch.arch == 90:
        CHECKS[launch.group](launch.name, found, compiled.asm["ptx"], compiled.asm["ttgir"])


# ---- What the groups are meant to have ----


def check_attention(name, found, ptx, ttgir):
    if "prepare" in name or "finish" in name or "clear" in name:
        assert "ld.global.v4" in ptx or "st.global.v4" in ptx
        return
    # Asynchronous products of 16-bit numbers, loads by TMA, registers shared out by setmaxnreg.
    assert "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16" in ptx or "64/64" in name
    assert "wgmma.mma_async" in ptx and "mma.sync" not in ptx
    assert "cp.async.bulk.tensor" in ptx and "setmaxnreg.inc" in ptx
    if name.startswith("backward,") and "192" not in name:
        assert "cp.reduce.async.bulk.tensor" in ptx
    # No value leaves a warpgroup but through the buffers: layout changes rename registers.
    assert "convert_layout" not in ttgir or "st.shared" in ptx


IN_FLIGHT = {
    "rms_norm",
    "rms_norm, H 128",
    "rms_norm, H 16384, fp32",
    "rms_norm_backward",
    "cross_entropy",
    "cross_entropy, in place",
    "cross_entropy_gradient",
    "swiglu",
    "swiglu, D 40, fp32",
    "swiglu_backward",
    "swiglu_backward, fp32",
}
LOSS_ALONE = ("cross_entropy", "cross_entropy, V 129280", "cross_entropy, a row a warp")


def check_block_ops(name, found, ptx, ttgir):
    if "Hopper" in name:
        assert "wgmma.mma_async.sync.aligned.m64n" in ptx and "cp.async.bulk.tensor" in ptx
    elif name.startswith("route"):
        assert ttgir.count("warp_group_dot ") >= 2 and "tt.dot " not in ttgir
        # Operands come by TMA, and nothing is laid out anew between the products of a step.
        loop = ttgir[ttgir.index("warp_group_dot ") : ttgir.rindex("warp_group_dot ")]
        assert "convert_layout" not in loop
    elif name not in ("d_logits", "add_parts") and not name.startswith("choose"):
        assert name in LOSS_ALONE or re.search(r"st\.global\S*\.v4\.b32", ptx)
        ahead = "cp.async.cg.shared.global" in ptx
        assert ahead or re.search(r"ld\.global\S*\.v4\.b32", ptx), "16 bytes at a time"
        # A second layout of a tile would be a second computation of all that is made of it, and
        # lanes of a tile of three dimensions meet in one bank of shared memory.
        assert ttgir.count("ttg.local_load ") == ttgir.count("ttg.local_alloc")
        assert not re.search(r"swizzled_shared<.*order = \[2", ttgir)
        # One of a kernel's tiles is in flight while another is computed; the rest need no barrier.
        assert ahead == (name in IN_FLIGHT)


def check_expert_rows(name, found, ptx, ttgir):
    """Nothing spilled, 16 bytes at a time, no barrier that would hold warps together."""
    kernel, _, case = name.partition(": ")
    assert found[1] == found[2] == 0 and "bar.sync" not in ptx
    assert "convert_layout" not in ttgir
    assert "st.global.v4.b32" in ptx
    assert ("ld.global.v2.b32" if "fp8" in case else "ld.global.v4.b32") in ptx
    experts = {"top-10, two ranks": 10, "top-32": 32}.get(case, 8)
    ranks = {"H 2048, top-8, 8 ranks": 8, "top-10, two ranks": 2, "top-32": 8}.get(case, 4)
    wanted = {"sum_per_rank": experts, "sum_at_home": ranks}
    if kernel in wanted:
        assert loads_before_the_first_addition(ptx) == wanted[kernel]


def loads_before_the_first_addition(ptx: str) -> int:
    """All of them, in a block of their own: ptxas mixes loads and additions of one block.

    LLVM makes a bf16 addition of two bf16 rows, which is exactly their fp32 sum, rounded.
    """
    before = ptx[: re.search(r"add(\.rn)?\.(f32|bf16x2)", ptx).start()]
    after = ptx[len(before) :]
    assert "ld.global.v4" not in after
    assert re.search(r"\n\s*(@%p\d+ )?bra", before[before.rindex("ld.global.v4") :])
    return before.count("ld.global.v4.b32")


def check_fp8(name, found, ptx, ttgir):
    if name.startswith("gemm"):
        assert "setmaxnreg.inc" in ptx and "cp.async.bulk.tensor" in ptx
        # Four products of 32 for 128 of K, in two halves, in two warpgroups; the first of each four
        # starts at zero, and the sums of two never meet but in fp32.
        products = re.findall(r"wgmma\.mma_async\.\S+", ptx)
        assert products == ["wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"] * 16
        # Layout changes rename registers.
        assert "convert_layout" not in ttgir
    else:
        # 16 bytes at a time; SwiGLU's loads go through shared memory, a tile ahead.
        load = "cp.async.cg.shared.global" if "swiglu" in name else "ld.global.v4.b32"
        assert load in ptx and "st.global.v4.b32" in ptx


def check_hopper(name, found, ptx, ttgir):
    assert "wgmma.mma_async.sync.aligned.m64n256k16" in ptx


def check_mlp(name, found, ptx, ttgir):
    assert found[1] == 0, "spills"
    assert "wgmma.mma_async" in ptx
    # Splitting the accumulator into strips or into gate and up only renames registers. The one
    # conversion allowed is that of the backward's row sums, 128 numbers.
    conversions = re.findall(r"ttg.convert_layout .* -> tensor<(\S+?),", ttgir)
    assert set(conversions) <= {"128xf32"}, conversions


def check_wgrad(name, found, ptx, ttgir):
    assert "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16" in ptx and "setmaxnreg.inc" in ptx
    accumulate, _, config = wgrad_configuration(name, wgrad_hopper)
    assert ("cp.reduce.async.bulk.tensor" in ptx) == accumulate
    assert ("cp.async.bulk.prefetch.L2" in ptx) == config.prefetch


CHECKS = {
    "attention": check_attention,
    "block_ops": check_block_ops,
    "expert_rows": check_expert_rows,
    "grouped_fp8": check_fp8,
    "grouped_hopper": check_hopper,
    "grouped_mlp": check_mlp,
    "grouped_wgrad": check_wgrad,
}


# ---- The table itself ----


def defined() -> set[str]:
    """Every kernel that can be launched."""
    pattern = re.compile(r"^def (\w+_kernel)\(", re.MULTILINE)
    found = {
        f"{file.parent.name}.{file.stem}.{name}"
        for file in KERNELS.glob("*/*.py")
        for name in pattern.findall(file.read_text())
    }
    return found - {"elementwise.rows.row_kernel"}  # a decorator


def test_no_kernel_is_without_a_launch():
    """Plain ones have one for sm_100, too."""
    assert set(BY_KERNEL) == defined()
    plain = {name for name, launch in BY_KERNEL.items() if not kernel_of(launch)[0].is_gluon()}
    assert {launch.kernel for launch in LAUNCHES if launch.arch == 100} == plain


def test_every_launch_has_its_resources_and_no_other_does():
    names = [(launch.group, launch.name) for launch in LAUNCHES]
    assert len(set(names)) == len(names)
    assert set(names) == {(group, name) for group, names in read_table().items() for name in names}


@pytest.mark.parametrize("kernel", BY_KERNEL)
def test_sizes_share_one_compilation(kernel):
    """Integers are left unspecialised, and so is the alignment of tables; compiling asserts the
    first of every launch."""
    launch = BY_KERNEL[kernel]
    if launch.sizes_of_a_model:
        return
    fractions = ("scale", "route_scale", "unit", "inverse_unit", "z_loss")
    for parameter in kernel_of(launch)[0].params:
        name = parameter.name
        if name.endswith("_ptr"):
            assert not parameter.do_not_specialize, name
        elif name.endswith("_table"):
            assert parameter.do_not_specialize_on_alignment, name
        elif not name.endswith("_desc") and name not in fractions:
            assert parameter.do_not_specialize != parameter.is_constexpr, name
