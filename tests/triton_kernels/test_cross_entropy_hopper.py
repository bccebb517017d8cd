"""The loss kernel with a row a warp without a GPU: emulated, against plain torch."""

from functools import cache

import pytest
import torch

from dualpipe_ext.ops.cross_entropy import CrossEntropyOptions, losses
from tests.support import ROOT, gluon_emulator
from tests.support.block_ops_cases import drawn


@cache
def emulated():
    (module,) = gluon_emulator.emulate(ROOT / "triton_kernels", "elementwise.cross_entropy_hopper")
    return module


def run(logits, targets, z_loss=0.0, num_sms=2):
    loss, lse = (torch.full((len(logits),), torch.nan) for _ in range(2))
    how = dict(ignore_index=-100, z_loss=z_loss, num_sms=num_sms)
    emulated().cross_entropy_loss(logits, targets, loss, lse, **how)
    return loss, lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("T", "V", "extra"),
    [(1, 8, 0), (16, 2048, 0), (50, 2056, 8), (100, 5000, 16), (17, 4096, 0), (3, 40000, 0)],
)
def test_loss(T, V, extra, dtype):
    """Rows may lie further apart than they are long."""
    logits = (3 * drawn(1, T, V + extra)).to(dtype)[:, :V]
    targets = drawn(2, T).mul(V).long().remainder(V)
    targets[::3] = -100
    got = run(logits, targets, z_loss=1e-2)
    want = losses(logits, targets, CrossEntropyOptions(-100, 1e-2, 0))
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-5)
    others = run(logits, targets, z_loss=1e-2, num_sms=100)
    assert all(map(torch.equal, got, others))


def test_few_rows_are_cut_into_parts():
    """To have few chunks of 2048 numbers after each other, on 132 SMs of 16 warps."""
    for T, V, parts in (
        *((1, 2048, 1), (1, 2056, 2), (100, 32768, 16), (500, 32768, 4), (8192, 32768, 1)),
        *((10**9, 129280, 1), (132, 129280, 16), (0, 8, 1)),
    ):
        assert 1 << emulated().choose_shift(T, V) == parts, (T, V)


@pytest.mark.parametrize("V", [24, 5000])
def test_targets_out_of_range_and_rows_of_infinities(V):
    logits = drawn(1, 6, V).bfloat16()
    logits[3], logits[4, 5] = -torch.inf, torch.inf
    targets = torch.tensor([V, -1, 3, 0, 1, -100])
    loss, lse = run(logits, targets)
    assert loss[:2].isnan().all() and loss[2].isfinite() and loss[5] == 0
    assert lse[3] == -torch.inf and not lse[4].isfinite()
