"""Heads out of their projections, against rotations of complex numbers and their gradients."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dualpipe_ext.ops import heads as head_ops
from dualpipe_ext.ops.heads import split_heads, tables, turn_tail
from tests.support.operators import rotary_tables


def turned(x: torch.Tensor, base: float) -> torch.Tensor:
    """x [B, S, N, D] fp64: numbers i and i + D / 2 are a complex one, turned by its angle."""
    half, positions = x.shape[3] // 2, x.shape[1]
    angle = torch.outer(
        torch.arange(positions, dtype=torch.float64),
        base ** (-torch.arange(half, dtype=torch.float64) / half),
    )
    z = (
        torch.complex(x[..., :half], x[..., half:])
        * torch.polar(torch.ones(()).double(), angle)[None, :, None]
    )
    return torch.cat([z.real, z.imag], dim=-1)


@pytest.mark.parametrize("N, G, D", [(4, 2, 16), (3, 3, 6), (8, 1, 2)])
def test_split_heads(N, G, D):
    qkv = torch.randn(2, 11, N + 2 * G, D, dtype=torch.float64, requires_grad=True)
    got = split_heads(qkv, G, base=500.0)
    q, k, v = qkv.split([N, G, G], dim=2)
    want = turned(q, 500.0), turned(k, 500.0), v
    gradients = [torch.randn_like(x) for x in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # fp32 tables
        assert a.is_contiguous()
    a, b = (torch.autograd.grad(outputs, qkv, gradients) for outputs in (got, want))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_turn_tail():
    x = torch.randn(2, 7, 3, 24, dtype=torch.float64, requires_grad=True)
    got = turn_tail(x, 8, base=500.0)
    want = torch.cat([x[..., :16], turned(x[..., 16:], 500.0)], dim=-1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    dy = torch.randn_like(x)
    a, b = (torch.autograd.grad(y, x, dy) for y in (got, want))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_after_inference_the_tables_serve_training():
    with torch.inference_mode():
        split_heads(torch.randn(1, 13, 3, 4), 1, base=77.0)
    qkv = torch.randn(1, 13, 3, 4, requires_grad=True)
    split_heads(qkv, 1, base=77.0)[0].sum().backward()
    assert qkv.grad is not None


# ---- Tables ----


def addresses(positions: int) -> list[int]:
    return [table.data_ptr() for table in tables(positions, 12, 321.0, torch.device("cpu"))]


def test_tables_stay_where_they_are():
    """A CUDA graph holds their address, whatever other lengths come by; together these take at most
    twice the memory of the longest."""
    before = addresses(5)
    for positions in range(1, 200):
        got = tables(positions, 12, 321.0, torch.device("cpu"))
        for a, b in zip(got, rotary_tables(positions, 12, base=321.0), strict=True):
            assert torch.equal(a, b) and a.is_contiguous()
    assert addresses(5) == before
    assert len({addresses(positions)[0] for positions in range(1, 200)}) == 9


def test_who_looks_on_leaves_nothing_behind():
    """Fake tensors, and a graph under capture, which its replays alone fill."""
    with FakeTensorMode():
        split_heads(torch.randn(1, 23, 3, 4), 1, base=55.0)
    torch.func.vmap(lambda x: split_heads(x, 1, base=55.0)[0])(torch.randn(2, 1, 23, 3, 4))
    assert not [key for key in head_ops._kept if key[2] == 55.0]
    q, _, _ = split_heads(torch.randn(1, 23, 3, 4), 1, base=55.0)
    assert type(q) is torch.Tensor and q.shape == (1, 23, 1, 4)


def test_a_capture_uses_kept_tables_and_keeps_none(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(head_ops, "is_capturing", lambda device: True)
    assert tables(6, 4, 44.0, cpu)[0] is not tables(6, 4, 44.0, cpu)[0]
    assert not [key for key in head_ops._kept if key[2] == 44.0]
    monkeypatch.undo()
    warm = tables(8, 4, 44.0, cpu)
    monkeypatch.setattr(head_ops, "is_capturing", lambda device: True)
    assert tables(8, 4, 44.0, cpu)[0] is warm[0]


def test_no_positions_and_no_sequences():
    for shape in ((2, 0, 4, 8), (0, 3, 4, 8)):
        x = torch.randn(shape, requires_grad=True)
        (split_heads(x, 1)[0].sum() + turn_tail(x, 4).sum()).backward()
        assert x.grad.shape == shape


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: split_heads(torch.randn(1, 5, 4, 8), 2), "kv_heads=2 of 4 heads"),
        (lambda: split_heads(torch.randn(1, 5, 4, 8), 0), "kv_heads=0 of 4 heads: pass at least 1"),
        (lambda: split_heads(torch.randn(5, 4, 8), 1), r"\(5, 4, 8\): pass.*B = 1"),
        (lambda: split_heads(torch.randn(1, 5, 4, 7), 1), "width=7 has no pairs"),
        (lambda: turn_tail(torch.randn(1, 5, 4, 8), 10), "width=10 of heads of 8.*2 to 8"),
        (lambda: turn_tail(torch.randn(1, 5, 4, 8), 3), "width=3 of heads of 8"),
        (lambda: turn_tail(torch.zeros(1, 5, 4, 8).long(), 4), "x is torch.int64"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
