"""The choice of experts on Hopper without a GPU: emulated, against plain torch on its logits."""

import pytest
import torch

from dualpipe_ext.ops.route_reference import count_tokens, score, select_experts
from tests.support.block_ops_cases import drawn
from tests.triton_kernels.test_router_hopper import emulated


def run_choice(parts, bias, E, K, *, groups=1, keep=1, renormalize=True, num_sms=2):
    how = dict(topk=K, renormalize=renormalize, n_groups=groups, topk_groups=keep)
    more = dict(num_experts=E, route_scale=2.5, num_sms=num_sms)
    return emulated()[2].choose(parts, bias, **how, **more)


def wanted_choice(logits, bias, K, *, groups=1, keep=1, renormalize=True):
    scores, probability, ranking = score(logits, "softmax" if bias is None else "sigmoid")
    idx = select_experts(ranking, bias, K, groups, keep)
    weight = scores.gather(1, idx)
    if renormalize:
        weight = weight / weight.sum(1, keepdim=True)
    return idx.int(), weight * 2.5, logits, probability.sum(0), count_tokens(idx, logits.shape[1])


def drawn_parts(splits, T, E, groups):
    """Parts of logits as the first kernel leaves them, and their sum in order."""
    parts = drawn(4, splits, T, *emulated()[2].columns_of(E, groups))
    inside = parts[:, :, :groups, : E // groups].flatten(2)
    return parts.flatten(2), sum(inside[1:], inside[0])


@pytest.mark.parametrize(
    ("T", "E", "K", "splits", "how"),
    [
        (5, 3, 2, 1, {}),
        (300, 64, 8, 4, {}),
        (200, 100, 1, 5, dict(renormalize=False)),
        (70, 15, 4, 2, dict(sigmoid=True, groups=3, keep=2)),
        (300, 256, 8, 2, dict(sigmoid=True, groups=8, keep=4)),
        (9, 256, 32, 3, dict(sigmoid=True, renormalize=False)),
        (70, 64, 5, 9, dict(sigmoid=True, groups=64, keep=7)),
    ],
)
def test_choice(T, E, K, splits, how):
    how = dict(how)
    bias = drawn(3, E) / 8 if how.pop("sigmoid", False) else None
    parts, logits = drawn_parts(splits, T, E, how.get("groups", 1))
    got = run_choice(parts, bias, E, K, num_sms=3, **how)
    for value, want in zip(got, wanted_choice(logits, bias, K, **how), strict=True):
        assert value.dtype == want.dtype
        exact = dict(rtol=0, atol=0) if want is logits or want.dtype != torch.float32 else {}
        torch.testing.assert_close(value, want, **exact)
    for num_sms in (1, 100):
        others = run_choice(parts, bias, E, K, num_sms=num_sms, **how)
        assert all(map(torch.equal, others, got))


def test_first_of_equals():
    parts = torch.zeros(1, 40, 64)
    idx = run_choice(parts, None, 40, 32)[0]
    assert torch.equal(idx, torch.arange(32).int().expand(40, 32))
    parts = torch.ones(1, 2, 5, 8)
    parts[..., 1::2] = -1
    parts[0, 1] *= -1
    parts = torch.nn.functional.pad(parts, (0, 0, 0, 3)).flatten(2)
    idx = run_choice(parts, torch.zeros(40), 40, 4, groups=5, keep=2)[0]
    assert idx.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_what_is_no_number_is_lost_in_one_launch_only(monkeypatch):
    shared = torch.zeros(1024, dtype=torch.int64)
    monkeypatch.setattr(emulated()[2], "counters", lambda like, count: shared)
    parts, logits = drawn_parts(2, 200, 64, 1)
    lost = parts.clone()
    lost[0, 130, 5] = torch.nan
    assert run_choice(lost, None, 64, 4)[3].isnan().all() and not shared.any()
    sums, count = run_choice(parts, None, 64, 4)[3:]
    want = wanted_choice(logits, None, 4)
    torch.testing.assert_close(sums, want[3])
    assert torch.equal(count, want[4]) and not shared.any()
