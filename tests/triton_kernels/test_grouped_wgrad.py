"""The weight gradient's Hopper kernel without a GPU: emulated against fp64 arithmetic."""

import math
from functools import cache

import pytest
import torch

from tests.support import ROOT
from tests.support.compare import relative_error
from tests.support.launches.hopper import WGRADS, wgrad_configuration

NAN = math.nan

# Rows of each expert, M, N, rows past the last one, SMs.
CASES = {
    "one": ((128,), 256, 128, 0, 1),
    "empty first, middle and last": ((0, 256, 0, 0, 128, 0), 264, 72, 64, 3),
    "more tiles than SMs": ((128, 384), 1000, 392, 128, 2),
    "more SMs than tiles": ((0, 256), 8, 8, 0, 40),
    "all rows on one": ((0, 1024, 0), 520, 136, 0, 5),
    "no rows": ((0, 0), 136, 264, 128, 4),
}


def make_problem(counts, M, N, spare, dtype=torch.bfloat16, device="cpu"):
    """y [R, M], x [R, N], offsets [L + 1]: padding rows are zero in y, rows past the last expert
    are NaN."""
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    end = sum(counts)
    y, x = (torch.full((end + spare, width), NAN, dtype=dtype) for width in (M, N))
    y[:end], x[:end] = torch.randn(end, M), torch.randn(end, N)
    for start, count in zip(offsets.tolist(), counts, strict=False):
        y[start + count - count // 3 : start + count] = 0
    return tuple(t.to(device) for t in (y, x, offsets))


def expected(y, x, offsets):
    """dw [L, M, N] in fp64."""
    spans = zip(offsets.tolist(), offsets.tolist()[1:], strict=False)
    return torch.stack([y[a:b].double().T @ x[a:b].double() for a, b in spans])


@cache
def emulated():
    from tests.support.gluon_emulator import Tensor, atomic_add, emulate, load

    module, tiles = emulate(ROOT / "triton_kernels", "experts.wgrad_hopper", "experts.tiles_hopper")

    def draw(counter, limit):
        drawn = tiles.GONE if tiles.gives_way(limit) else atomic_add(counter, 1)
        return Tensor(torch.tensor([drawn]))

    def prefetch(address, size):
        assert (size.data > 0).all() and not (size.data % 16).any()
        last = address.offset + size.data // address.memory.element_size()
        assert address.offset.min() >= 0 and last.max() <= len(address.memory)

    module.draw, module.prefetch, module.look_at_limit = draw, prefetch, load
    return module


@pytest.mark.parametrize("config", WGRADS)
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_fp64(case, config):
    *sizes, num_sms = CASES[case]
    accumulate, dtype, config = wgrad_configuration(config, emulated())
    y, x, offsets = make_problem(*sizes)
    want = expected(y, x, offsets)
    if accumulate:
        dw = torch.randn(want.shape).to(dtype)
        want += dw
        untouched = [(e, dw[e].clone()) for e, count in enumerate(sizes[0]) if count == 0]
    else:
        dw, untouched = torch.full(want.shape, NAN, dtype=dtype), []
    emulated().grouped_wgrad_hopper(
        y, x, offsets, dw, accumulate=accumulate, num_sms=num_sms, config=config
    )
    assert relative_error(dw, want) < (1e-6 if dtype == torch.float32 else 5e-3)
    for expert, before in untouched:
        assert torch.equal(dw[expert], before)


def test_launches_add_up_and_sm_count_changes_no_bit():
    y, x, offsets = make_problem((256, 0, 128), 264, 200, 64)
    results = []
    for num_sms in (1, 4, 4):
        dw = torch.zeros(3, 264, 200)
        for _ in range(2):
            emulated().grouped_wgrad_hopper(y, x, offsets, dw, accumulate=True, num_sms=num_sms)
        results.append(dw)
    assert relative_error(results[0], 2 * expected(y, x, offsets)) < 1e-6
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


@pytest.mark.parametrize("limit, stay", [(0, 3), (1, 1), (2, 2), (3, 3), (124, 3)])
def test_programs_that_give_way_leave_no_tile(limit, stay, monkeypatch):
    """Of three programs those beyond the limit draw nothing; 0: there is none."""
    module, drawn = emulated(), []
    word = torch.full((1,), limit, dtype=torch.int32)
    monkeypatch.setattr(module, "program_limit", lambda device: word)
    real = module.draw

    def draw(counter, limit):
        found = real(counter, limit)
        if int(found.data) != module.GONE:
            drawn.append(module.gl.program_id(0))
        return found

    monkeypatch.setattr(module, "draw", draw)
    y, x, offsets = make_problem((256, 0, 128), 264, 200, 64)
    dw = torch.zeros(3, 264, 200)
    module.grouped_wgrad_hopper(y, x, offsets, dw, accumulate=True, num_sms=3)
    assert relative_error(dw, expected(y, x, offsets)) < 1e-6
    assert set(drawn) == set(range(stay))


def test_the_emulated_kernel_can_fail():
    """Sums that leave before the asynchronous proxy may see them show."""
    from tests.support.gluon_emulator import fence_async_shared

    module = emulated()
    y, x, offsets = make_problem((128,), 256, 128, 0)
    module.fence_async_shared = lambda: None
    try:
        with pytest.raises(RuntimeError, match="no fence_async_shared"):
            module.grouped_wgrad_hopper(
                y, x, offsets, torch.zeros(1, 256, 128), accumulate=True, num_sms=1
            )
    finally:
        module.fence_async_shared = fence_async_shared
