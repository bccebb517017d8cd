"""The rest of a block without a GPU: plain torch against fp64 references, the kernels in Triton's
interpreter; test_contract.py has what holds for every operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import block_ops_cases as cases
from tests.support.interpreted import run_interpreted
from tests.support.operators import (
    cross_entropy,
    rms_norm,
    rotary,
    rotary_,
    rotary_tables,
    route,
    swiglu,
)

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
few = settings(max_examples=25)


# ---- Plain torch ----


@few
@given(st.integers(1, 40), st.integers(1, 70), DTYPES, st.booleans())
def test_rms_norm(T, H, dtype, residual):
    cases.check_rms_norm(T, H, dtype, residual=residual)


@few
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 12),
    DTYPES,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_rotary(B, S, N, pairs, dtype, interleaved, packed, places, inplace):
    # fp64 inputs keep fp32 tables.
    if dtype == torch.float64:
        dtype = torch.float32
    how = dict(interleaved=interleaved, packed=packed, places=places, inplace=inplace)
    cases.check_rotary(B, S, N, 2 * pairs, dtype, **how)


@few
@given(st.integers(1, 40), st.integers(1, 70), DTYPES, st.booleans())
def test_swiglu(T, D, dtype, strange):
    cases.check_swiglu(T, D, dtype, strange=strange)


@few
@given(
    st.integers(1, 30),
    st.integers(1, 300),
    DTYPES,
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from([0.0, 1e-2]),
    st.booleans(),
    st.sampled_from([1.0, -0.5]),
)
def test_cross_entropy(T, V, dtype, reduction, z_loss, inplace, scale):
    inplace = inplace and reduction != "none"
    how = dict(reduction=reduction, z_loss=z_loss, inplace=inplace, scale=scale)
    if dtype == torch.bfloat16 and inplace and scale == -0.5:
        scale = how["scale"] = 0.5  # any other is rounded twice
    cases.check_cross_entropy(T, V, dtype, **how)


@few
@given(
    st.integers(1, 30),
    st.sampled_from([8, 24, 72]),
    st.sampled_from([(1, 1), (2, 1), (3, 2), (4, 4)]),
    st.integers(2, 7),  # the gradients of a choice among one are 0
    st.integers(1, 7),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.booleans(),
)
def test_route(T, H, groups, size, topk, dtype, weight_dtype, sigmoid, renormalize):
    groups, keep = groups if sigmoid else (1, 1)
    topk = min(topk, keep * size)
    how = dict(sigmoid=sigmoid, groups=groups, keep=keep, renormalize=renormalize)
    how |= dict(weight_dtype=weight_dtype)
    cases.check_route(T, H, groups * size, topk, dtype, **how)


def test_ties_and_numbers_out_of_range():
    cases.check_router_ties()
    cases.check_targets_out_of_range()
    cases.check_positions_out_of_range()
    cases.check_swiglu_far_out()


def test_all_rows_ignored_and_no_rows():
    logits = torch.randn(3, 9, requires_grad=True)
    for inplace in (False, True):
        logits.grad = None
        loss = cross_entropy(logits * 1, torch.full((3,), -100), inplace=inplace)
        loss.backward()
        assert loss == 0 and not logits.grad.any()
        empty = torch.empty(0, 9, requires_grad=True)
        loss = cross_entropy(empty * 1, torch.empty(0, dtype=torch.int64), inplace=inplace)
        loss.backward()
        assert loss == 0 and empty.grad.shape == (0, 9)
    weight = torch.ones(8, requires_grad=True)
    rms_norm(torch.empty(0, 8), weight).sum().backward()
    assert not weight.grad.any()
    for shape in ((0, 16), (3, 0), (2, 0, 16)):
        gate_up = torch.empty(shape, requires_grad=True)
        act = swiglu(gate_up)
        act.sum().backward()
        assert act.shape == (*shape[:-1], shape[-1] // 2) and gate_up.grad.shape == shape


def test_only_the_sum_is_used():
    """The norm's output may lead nowhere: a block's last residual goes on without it."""
    x, y, weight = torch.randn(3, 8), torch.randn(3, 8), torch.ones(8)
    x.requires_grad_(), y.requires_grad_(), weight.requires_grad_()
    rms_norm(x, weight, residual=y)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8)) and torch.equal(y.grad, x.grad)
    assert weight.grad is None


def test_in_place_cross_entropy_keeps_the_gradient_where_the_logits_were():
    leaf = torch.randn(5, 33, requires_grad=True)
    logits = leaf * 1
    before = logits.detach().clone()
    loss = cross_entropy(logits, torch.arange(5), inplace=True)
    assert not torch.equal(logits.detach(), before)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="pass inplace=False for more than one"):
        loss.backward()
    with torch.no_grad():
        logits.copy_(before)
        cross_entropy(logits, torch.arange(5), inplace=True)
    assert torch.equal(logits.detach(), before)  # no gradient is wanted


def test_rotary_example():
    """A quarter turn takes (1, 0) to (0, 1), whichever numbers make a pair."""
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    assert rotary(x, cos, sin).flatten().tolist() == [-3, 2, 1, 4]
    assert rotary(x, cos, sin, interleaved=True).flatten().tolist() == [-2, 1, 3, 4]


def test_rotary_in_place_turns_back():
    cos, sin = rotary_tables(7, 16)
    x = torch.randn(2, 7, 3, 16)
    y = x.clone()
    assert rotary_(y, cos, sin) is y and not torch.allclose(x, y)
    rotary_(y, cos, -sin)
    torch.testing.assert_close(x, y)


# ---- Errors ----

X, W = torch.randn(4, 8), torch.ones(8)
TABLES = rotary_tables(4, 8)
HEADS = torch.randn(4, 2, 8)
LOGITS, TARGETS = torch.randn(4, 9), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: rms_norm(X, W[1:]), ValueError, r"weight is \(7,\).*\(8,\)"),
        (lambda: rms_norm(X.long(), W), TypeError, r"x is torch\.int64"),
        (lambda: rms_norm(X, W, residual=X.double()), TypeError, "one dtype"),
        (lambda: rms_norm(X, W, residual=X[1:]), ValueError, r"\(3, 8\).*does not broadcast"),
        (lambda: rms_norm(X, W, num_sms=0), ValueError, "num_sms=0.*at least 1"),
        (lambda: rotary_tables(4, 7), ValueError, "width=7.*8"),
        (lambda: rotary(X, *TABLES), ValueError, r"2 dimensions: pass \[B, S, N, D\]"),
        (lambda: rotary(HEADS[..., :6], *TABLES), ValueError, r"width 6: pass \[M, 3\]"),
        (lambda: rotary(HEADS, *(t.double() for t in TABLES)), TypeError, "float32 tables"),
        (lambda: rotary(HEADS[[0] * 5], *TABLES), ValueError, "have 4 positions, x 5"),
        (
            lambda: rotary(HEADS, *TABLES, positions=torch.zeros(3).long()),
            ValueError,
            r"integers \(4,\)",
        ),
        (lambda: swiglu(X.long()), TypeError, r"gate_up is torch\.int64"),
        (lambda: swiglu(LOGITS), ValueError, r"\(4, 9\): pass an even last dimension"),
        (lambda: swiglu(LOGITS[0, 0]), ValueError, r"gate_up is \(\)"),
        (lambda: swiglu(X, num_sms=0), ValueError, "num_sms=0.*at least 1"),
        (lambda: cross_entropy(LOGITS, TARGETS[1:]), ValueError, r"\(3,\).*\(4,\)"),
        (lambda: cross_entropy(LOGITS, TARGETS.float()), TypeError, r"torch\.float32: pass"),
        (lambda: cross_entropy(LOGITS, TARGETS, reduction="avg"), ValueError, "reduction='avg'"),
        (
            lambda: cross_entropy(LOGITS, TARGETS, reduction="none", inplace=True),
            ValueError,
            "inplace=False",
        ),
        (
            lambda: cross_entropy(LOGITS.view(2, 2, 9).mT, TARGETS.new_zeros(2, 9), inplace=True),
            ValueError,
            "no rows to write over",
        ),
        (lambda: route(X.double(), X, None, topk=1), TypeError, r"x is torch\.float64"),
        (lambda: route(X, X.half(), None, topk=1), TypeError, r"weight is torch\.float16"),
        (lambda: route(X, X, W.half(), topk=1), TypeError, r"bias is torch\.float16"),
        (lambda: route(X, LOGITS, None, topk=1), ValueError, r"\(4, 9\) do not fit"),
        (lambda: route(X, X, W, topk=1), ValueError, r"bias is \(8,\).*\(4,\)"),
        (lambda: route(X, X, None, topk=5), ValueError, "topk=5.*1 <= topk <= 4"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- The kernels ----


def test_interpreter_equals_the_references():
    assert run_interpreted("tests.support.block_ops_cases") == [
        f"ok {x}" for x in cases.interpreted()
    ]


def test_splits_fill_the_sms():
    from dualpipe_ext.triton_kernels.routing.tiles import (
        block_of,
        columns_of,
        even_grid,
        even_splits,
    )

    assert [even_splits(tiles, 99) for tiles in (64, 112, 16, 1000)] == [2, 1, 8, 1]
    assert [even_splits(tiles, 99, 4) for tiles in (32, 16, 1000)] == [4, 8, 4]
    assert even_splits(1, 3) == 3 and even_splits(1, 20, 18) == 18
    assert [even_grid(*c) for c in ((224, 132), (128, 132), (3, 1), (1, 8))] == [112, 128, 1, 1]
    assert [columns_of(*c) for c in ((256, 8), (15, 3), (6, 1))] == [(8, 32), (4, 8), (1, 16)]
    assert [block_of(*c) for c in ((8, 16), (8, 32), (1, 512))] == [(8, 16), (4, 32), (1, 128)]
