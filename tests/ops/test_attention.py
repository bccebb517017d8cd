"""Attention without a GPU: plain torch against the definition, the kernels run by an emulator."""

from types import SimpleNamespace

import pytest
import torch

from dualpipe_ext.blocks import attention
from dualpipe_ext.blocks.attention import GroupedQueryAttention, LatentAttention
from dualpipe_ext.ops import attention as operator
from dualpipe_ext.ops.attention import flash_attention
from tests.support.attention_cases import (
    CASES,
    NAMES,
    Problem,
    error_of,
    one_query,
    run_kernels,
)
from tests.support.gluon_emulator import Kernel

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def check(got, want, dtype):
    for name, value, reference in zip(NAMES, got, want, strict=True):
        assert value.dtype == dtype
        assert error_of(value, reference) < TOLERANCE[dtype], name


def run_operator(problem: Problem, **options) -> list[torch.Tensor]:
    *leaves, d_out = problem.inputs()
    leaves = [x.requires_grad_() for x in leaves]
    how = dict(causal=problem.causal, scale=problem.scale, **problem.starts(), **options)
    out = flash_attention(*leaves, **how)
    return problem.rows_of([out.detach(), *torch.autograd.grad(out, leaves, d_out)])


# ---- Plain torch ----


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("S_q, S_k", [(1, 1), (5, 5), (3, 7), (7, 3), (4, 0)])
def test_expected_is_the_definition(S_q, S_k, causal):
    problem = Problem([S_q], [S_k], 4, 2, 8, 16, causal, packed=True, dtype=torch.float64)
    q, k, v, _ = problem.rows
    out = problem.expected()[0]
    for i in range(S_q):
        seen = max(0, i + 1 + S_k - S_q) if causal else S_k
        for n in range(4):
            want = one_query(q[i, n], k[:seen, n // 2], v[:seen, n // 2], problem.scale)
            torch.testing.assert_close(out[i, n], want)


LENGTHS = st.integers(0, 40)


@st.composite
def problems(draw):
    packed = draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    G, D, V = draw(st.integers(1, 3)), draw(st.integers(1, 24)), draw(st.integers(1, 24))
    share, causal = draw(st.integers(1, 3)), draw(st.booleans())
    B = draw(st.integers(1, 3))
    if packed:
        lengths = [draw(st.lists(LENGTHS, min_size=B, max_size=B)) for _ in range(2)]
    else:
        lengths = [[draw(LENGTHS.filter(bool))] * B for _ in range(2)]
    torch.manual_seed(draw(st.integers(0, 2**16)))
    spare = draw(st.integers(0, 3)) if packed else 0
    return Problem(*lengths, G * share, G, D, V, causal, packed, dtype, spare)


@hypothesis.given(problems())
@hypothesis.settings(max_examples=60)
def test_plain_torch_equals_fp64(problem):
    check(run_operator(problem), problem.expected(), problem.dtype)


@pytest.mark.parametrize("S", [1, 513])
def test_bf16_equals_fp64(S):
    problem = Problem([S] * 2, [S] * 2, 4, 2, 64, 64, True, False, torch.bfloat16, scale=0.125)
    check(run_operator(problem), problem.expected(), torch.bfloat16)


def test_equals_torch_sdpa():
    q, k, v, _ = Problem([33], [33], 6, 2, 16, 8, True, False).inputs()
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(flash_attention(q, k, v, causal=True), want)


def test_gradcheck():
    problem = Problem([3, 0, 5], [4, 2, 3], 4, 2, 8, 16, True, True, torch.float64)
    inputs = [x.requires_grad_() for x in problem.inputs()[:3]]
    assert torch.autograd.gradcheck(
        lambda *x: flash_attention(*x, causal=True, **problem.starts()), inputs, fast_mode=True
    )


# ---- Errors ----


def tensors(**changes):
    shapes = dict(q=(2, 4, 5, 8), k=(2, 2, 6, 8), v=(2, 2, 6, 16)) | changes
    return [torch.zeros(shape) for shape in shapes.values()]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(q=(4, 5, 8)), r"q has 3 dimensions: pass \[B, heads, S, width\], or cu_seqlens"),
        (dict(k=(2, 2, 6, 9)), r"k \(2, 2, 6, 9\).*k as wide as q"),
        (dict(v=(2, 2, 7, 16)), r"v \(2, 2, 7, 16\).*v as long as k"),
        (dict(q=(3, 4, 5, 8)), r"q \(3, 4, 5, 8\).*do not fit"),
        (dict(q=(2, 5, 5, 8)), "5 query heads are no multiple of 2 key heads"),
        (dict(q=(2, 0, 5, 8)), r"q is \(2, 0, 5, 8\): pass at least one head"),
    ],
)
def test_bad_shapes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        flash_attention(*tensors(**changes))


def test_bad_options_are_named():
    q, k, v = tensors()
    starts = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(TypeError, match=r"float32, torch\.bfloat16.*one floating-point dtype"):
        flash_attention(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match=r"q is \(1, 2, 5, 0\).*at least one head and one column"):
        flash_attention(*(torch.empty(1, 2, 5, width) for width in (0, 0, 8)))
    with pytest.raises(ValueError, match="scale=-1.0: pass a positive number"):
        flash_attention(q, k, v, scale=-1)
    with pytest.raises(ValueError, match=r"num_sms=0.*at least 1"):
        flash_attention(q, k, v, num_sms=0)
    with pytest.raises(ValueError, match=r"implementation='cuda'.*'reference'"):
        flash_attention(q, k, v, implementation="cuda")
    with pytest.raises(ValueError, match=r"'triton' with tensors on cpu.*'auto'"):
        flash_attention(q, k, v, implementation="triton")
    with pytest.raises(ValueError, match="only one of cu_seqlens_q and cu_seqlens_k"):
        flash_attention(q, k, v, cu_seqlens_q=starts)
    with pytest.raises(ValueError, match=r"k is on meta, q on cpu"):
        flash_attention(q, k.to("meta"), v)


@pytest.mark.parametrize(
    "starts, error, message",
    [
        (torch.tensor([0, 5]), TypeError, r"torch\.int64: pass torch\.int32"),
        (torch.tensor([0, 2, 5], dtype=torch.int32), ValueError, r"\(3,\): pass \(2,\)"),
        (torch.tensor([0, 9], dtype=torch.int32), ValueError, r"\[0, 9\].*at most the 6 rows"),
        (torch.tensor([1, 6], dtype=torch.int32), ValueError, r"rising numbers from 0"),
    ],
)
def test_bad_starts_are_named(starts, error, message):
    q, k, v = (torch.zeros(shape) for shape in ((5, 4, 8), (6, 2, 8), (6, 2, 16)))
    good = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(error, match=message):
        flash_attention(q, k, v, cu_seqlens_q=good, cu_seqlens_k=starts)


# ---- In a block ----


@pytest.mark.parametrize("kind", ["grouped", "latent"])
def test_blocks_give_the_same_with_it(kind):
    def make(implementation):
        torch.manual_seed(0)
        if kind == "grouped":
            return GroupedQueryAttention(
                32, heads=4, kv_heads=2, implementation=implementation, num_sms=8
            )
        return LatentAttention(
            32, heads=2, kv_rank=8, head_width=8, rope_width=4, implementation=implementation
        )

    x = torch.randn(2, 9, 32)
    results = []
    for implementation in ("auto", "sdpa", "triton"):
        layer, leaf = make(implementation), x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad, *(p.grad for p in layer.parameters())))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"implementation='flash'.*'sdpa'"):
        make("flash")


@pytest.mark.parametrize("runs", [False, True])
def test_auto_takes_the_kernels_where_they_run(runs, monkeypatch):
    calls = []

    def spy(*tensors, **options):
        calls.append(options)
        return flash_attention(*tensors, **options)

    monkeypatch.setattr(attention, "flash_attention", spy)
    monkeypatch.setattr(attention, "runs_as_kernels", lambda q, v: runs)
    for implementation in ("auto", "sdpa", "triton"):
        GroupedQueryAttention(32, heads=4, implementation=implementation, num_sms=8)(
            torch.randn(1, 9, 32)
        )
    assert calls == [dict(causal=True, num_sms=8, deterministic=False)] * (1 + runs)


@pytest.mark.parametrize(
    "changes, runs",
    [
        (dict(), True),
        (dict(D=64, V=64, dtype=torch.float16), True),
        (dict(D=192), True),
        (dict(D=96, V=96), False),
        (dict(V=64), False),
        (dict(dtype=torch.float32), False),
        (dict(is_cuda=False), False),
        (dict(major=8), False),
        (dict(major=10), False),
        (dict(gluon=False), False),
    ],
    ids=str,
)
def test_what_runs_as_kernels(changes, runs, monkeypatch):
    case = dict(D=128, V=128, dtype=torch.bfloat16, is_cuda=True, major=9, gluon=True) | changes
    monkeypatch.setattr(operator, "device_facts", lambda device: (132, (case["major"], 0)))
    monkeypatch.setattr(operator, "has_gluon", lambda: case["gluon"])
    q = SimpleNamespace(dtype=case["dtype"], is_cuda=case["is_cuda"], device="a GPU")
    assert operator.runs_as_kernels(q, (case["D"], case["V"])) == runs


# ---- The kernels, emulated ----


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_fp64(case, deterministic):
    *shape, spare, num_sms = CASES[case]
    # bf16 as on the GPU, and fp32, which shows what rounding would hide.
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem(*shape, dtype, spare, scale=0.1)
        want = problem.expected()
        got = run_kernels(problem, num_sms, deterministic)
        # Few numbers average few roundings.
        limit = TOLERANCE[dtype] * (3 if len(problem.rows[0]) < 8 else 1)
        for name, value, reference in zip(NAMES, got, want, strict=True):
            error = error_of(value, reference)
            assert error < limit, f"{name}: {error} for {dtype}"


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("case", CASES)
def test_programs_that_leave_change_nothing(case, deterministic):
    *shape, spare, num_sms = CASES[case]
    problem = Problem(*shape, torch.float32, spare, scale=0.1)
    got = run_kernels(problem, max(num_sms, 2), deterministic, limit=1)
    for name, value, reference in zip(NAMES, got, problem.expected(), strict=True):
        assert error_of(value, reference) < 3 * TOLERANCE[torch.float32], name


def test_rows_that_are_no_keys_add_nothing():
    """Scores around -230: exp(0 - lse) of a row of zeros past the last key would be infinite."""
    problem = Problem([70], [70], 1, 1, 64, 64, False, False, scale=0.1)
    q, k, *_ = problem.rows
    problem.rows[0], problem.rows[1] = 6 + q / 10, -6 + k / 10
    for deterministic in (False, True):
        got = run_kernels(problem, 1, deterministic)
        for name, value, reference in zip(NAMES, got, problem.expected(), strict=True):
            # exp of numbers of that size has five digits in fp32.
            assert error_of(value, reference) < 1e-3, name


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_num_sms_caps_both_passes(deterministic, monkeypatch):
    launches, launch = {}, Kernel.__getitem__

    def spy(self, grid):
        launches[self.__name__] = grid
        return launch(self, grid)

    monkeypatch.setattr(Kernel, "__getitem__", spy)
    problem = Problem([130, 0, 5], [130, 7, 0], 4, 2, 64, 64, True, True, spare=9)
    run_kernels(problem, 3, deterministic)
    assert len(launches) == 5
    assert set(launches.values()) == {(3,)}


def test_sm_count_changes_no_bit():
    problem = Problem([300, 40], [300, 50], 4, 2, 64, 64, True, True, torch.float16)
    first = run_kernels(problem, 1, True)
    for a, b in zip(first, run_kernels(problem, 5, True), strict=True):
        assert torch.equal(a, b)
