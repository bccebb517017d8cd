"""The router's Hopper kernels without a GPU: emulated against fp64 arithmetic."""

from functools import cache

import pytest
import torch

from tests import gluon_emulator
from tests.block_ops_cases import drawn
from tests.test_grouped_mlp import ROOT, relative_error

BF16 = torch.bfloat16


class Locked:
    """What these kernels ask of the emulator beyond the others: results of an addition to memory
    that several numbers share, and that a load says how it goes through the caches."""

    @staticmethod
    def load(pointer, mask=None, other=0.0, cache_modifier=""):
        assert cache_modifier in ("", ".cg")
        return gluon_emulator.load(pointer, mask, other)

    @staticmethod
    def atomic_add(pointer, value, sem):
        assert sem == "acq_rel", "what others have written before must be seen"
        return gluon_emulator.atomic_add(pointer, value)


@cache
def emulated():
    """The modules of logits and of gradients."""
    language = gluon_emulator._language

    def with_more():
        gl = language()
        gl.load, gl.atomic_add = Locked.load, Locked.atomic_add
        return gl

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gluon_emulator, "_language", with_more)
        names = ("router_hopper", "router_backward_hopper")
        return gluon_emulator.emulate(ROOT / "triton_kernels", *names)


def run_logits(T, H, E, groups=1, num_sms=3):
    x, weight = drawn(1, T, H, dtype=BF16), drawn(2, E, H)
    parts = emulated()[0].logits_hopper(x, weight, n_groups=groups, num_sms=num_sms)
    assert not parts.isnan().any()
    return parts, x.double() @ weight.double().T


def run_gradients(T, H, E, num_sms=3):
    x, weight, d_logits = drawn(1, T, H, dtype=BF16), drawn(2, E, H), drawn(3, T, E)
    high = d_logits.to(BF16)
    parts = torch.zeros(2, T, E + -E % 8, dtype=BF16)
    parts[0, :, :E], parts[1, :, :E] = high, d_logits - high.float()
    got = emulated()[1].gradients_hopper(parts, x, weight, num_sms=num_sms)
    d_logits = d_logits.double()
    return got, (d_logits @ weight.double(), d_logits.T @ x.double())


@pytest.mark.parametrize(
    ("T", "H", "E", "groups", "num_sms"),
    [
        (5, 8, 3, 1, 1),
        (300, 200, 64, 1, 2),
        (513, 1800, 15, 3, 5),
        (260, 136, 100, 1, 3),
        (130, 200, 256, 8, 40),
    ],
)
def test_logits(T, H, E, groups, num_sms):
    parts, want = run_logits(T, H, E, groups, num_sms)
    assert parts.shape[0] <= -(-H // 64)
    # Groups of experts stand apart, where they are no power of two.
    logits = parts.sum(0).unflatten(1, (-1, parts.shape[2] // {3: 4}.get(groups, groups)))
    assert relative_error(logits[:, :groups, : E // groups].flatten(1), want) < 1e-5
    assert not logits[:, groups:].any() and not logits[:, :, E // groups :].any()


@pytest.mark.parametrize(
    ("T", "H", "E", "num_sms"),
    [(5, 8, 3, 1), (300, 200, 64, 2), (70, 392, 100, 5), (2113, 136, 15, 40), (700, 136, 200, 2)],
)
def test_gradients(T, H, E, num_sms):
    (dx, d_weight), want = run_gradients(T, H, E, num_sms)
    assert dx.dtype == BF16 and d_weight.dtype == torch.float32
    assert relative_error(dx, want[0]) < 4e-3  # three numbers rounded to bf16
    assert relative_error(d_weight, want[1]) < 1e-5


def test_sm_count_changes_no_bit():
    results = [(run_logits(600, 136, 20, num_sms=n)[0], *run_gradients(300, 264, 20, n)[0])
               for n in (1, 2, 100)]  # fmt: skip
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_counters_are_left_as_they_were_found(monkeypatch):
    """Two launches that share them give the same results, and zeros are left."""
    _, gradients = emulated()
    shared = torch.zeros(1024, dtype=torch.int64)
    monkeypatch.setattr(gradients, "counters", lambda like, count: shared)
    first, second = (run_gradients(300, 264, 20)[0] for _ in range(2))
    assert all(map(torch.equal, first, second)) and not shared.any()


def test_every_sum_is_short():
    """At most 1,792 columns, or 2,048 tokens: 2.3e-8 of a sum are lost a step of 16."""
    _, gradients = emulated()
    tiles = gradients.even_splits
    for steps in (1, 28, 112, 128, 1000):
        assert -(-steps // tiles(32, steps, -(-steps // 28))) <= 28
        assert -(-steps // tiles(56, steps, -(-steps // 32))) <= 32


@pytest.mark.parametrize("stride", [1, 132])
def test_one_token_of_any_stride(stride):
    """torch calls it contiguous whatever its stride is, and TMA wants multiples of 16 bytes."""
    x, weight = drawn(1, 256, dtype=BF16).as_strided((1, 128), (stride, 1)), drawn(2, 8, 128)
    assert x.is_contiguous()
    parts = emulated()[0].logits_hopper(x, weight, n_groups=1, num_sms=2)
    assert relative_error(parts.sum(0)[:, :8], x.double() @ weight.double().T) < 1e-5
