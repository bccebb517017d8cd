"""Heads out of their projections, against rotations of complex numbers and their gradients."""

import pytest
import torch

from dualpipe_ext.head_ops import split_heads, turn_tail


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


@pytest.mark.parametrize("backward", [False, True])
def test_operators_obey_torch(backward):
    qkv = torch.randn(1, 5, 4, 8, requires_grad=True)
    table = torch.randn(5, 4)
    ops = torch.ops.dualpipe_ext
    if backward:
        parts = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 1, 8), torch.randn(1, 5, 1, 8)
        torch.library.opcheck(ops.join_heads, (*parts, table, table))
    else:
        torch.library.opcheck(ops.split_heads, (qkv, table, table, 1))
        torch.library.opcheck(ops.turn_tail, (qkv, table, table, False))
