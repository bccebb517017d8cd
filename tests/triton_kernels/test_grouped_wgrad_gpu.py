"""The weight gradient's Hopper kernel on a GPU against fp64 arithmetic."""

import pytest
import torch

from dualpipe_ext.triton_kernels.experts.wgrad import grouped_wgrad
from tests.support.launches.hopper import wgrad_configuration
from tests.triton_kernels.test_grouped_wgrad import (
    CASES,
    NAN,
    expected,
    make_problem,
    relative_error,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="the kernel uses wgmma, which only Hopper GPUs have",
    ),
]

# Exact products, but the tensor cores cut off what does not fit fp32, 1024 times in 16384 rows.
FP32 = 1e-4


def configured(name):
    from dualpipe_ext.triton_kernels.experts import wgrad_hopper as grouped_wgrad_hopper

    return wgrad_configuration(name, grouped_wgrad_hopper)


def run(problem, dw, accumulate=True, num_sms=132, config=None):
    """Freed memory is full of NaN beforehand: what is read or left unwritten shows."""
    poison = torch.full((1 << 24,), NAN, device="cuda")
    del poison
    return grouped_wgrad(*problem, dw, accumulate=accumulate, num_sms=num_sms, config=config)


def check(problem, counts, num_sms, accumulate=True, dtype=torch.float32, config=None):
    """One launch against fp64; experts without rows keep their values, or get zeros."""
    want = expected(*problem)
    if accumulate:
        dw = torch.randn(want.shape, device="cuda").to(dtype)
        before = dw.clone()
        want = want + before
    else:
        dw = torch.full(want.shape, NAN, dtype=dtype, device="cuda")
        before = torch.zeros_like(dw)
    run(problem, dw, accumulate, num_sms, config)
    error = relative_error(dw, want)
    assert error < (FP32 if dtype == torch.float32 else 5e-3), error
    for expert, count in enumerate(counts):
        if count == 0:
            assert torch.equal(dw[expert], before[expert])


ALL = ["accumulate", "accumulate, prefetch", "bf16", "accumulate bf16", "accumulate bf16, prefetch"]


@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize("case", CASES)
def test_equals_fp64(case, config):
    *sizes, num_sms = CASES[case]
    check(make_problem(*sizes, device="cuda"), sizes[0], num_sms, *configured(config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adding_is_what_a_second_pass_does(dtype):
    """Bit for bit: the product is rounded, added in fp32, and the sum rounded."""
    counts = (256, 0, 1280, 128)
    problem = make_problem(counts, 1000, 520, 64, dtype, "cuda")
    before = torch.randn(4, 1000, 520, device="cuda").to(dtype) * 30
    product = run(problem, torch.empty_like(before), accumulate=False)
    assert torch.equal(run(problem, before.clone()), before + product)


@pytest.mark.parametrize("config", ["accumulate, half buffered", "accumulate, buffered"])
def test_other_configurations_equal_fp64(config):
    counts = (256, 0, 1024, 128)
    check(make_problem(counts, 1000, 520, 128, device="cuda"), counts, 99, *configured(config))


def test_random_problems():
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(30):
        counts = [128 * draw(0, 9) * draw(0, 1) for _ in range(draw(1, 12))]
        problem = make_problem(counts, 8 * draw(1, 200), 8 * draw(1, 200), draw(0, 200))
        check(tuple(t.cuda() for t in problem), counts, draw(1, 132))


def test_fp16():
    problem = make_problem((384, 0, 128), 264, 392, 128, torch.float16, "cuda")
    check(problem, (384, 0, 128), 132)


def test_all_rows_on_one_of_many_experts():
    counts = (0,) * 40 + (16384,) + (0,) * 23
    check(make_problem(counts, 512, 384, 64, device="cuda"), counts, 132)


def test_launches_add_up_to_the_same_bits_with_any_number_of_sms():
    problem = make_problem((256, 0, 1280, 128), 2048, 768, 64, device="cuda")
    results = []
    for num_sms in (132, 132, 116, 1):
        dw = torch.full((4, 2048, 768), 0.5, device="cuda")
        for _ in range(2):
            run(problem, dw, num_sms=num_sms)
        results.append(dw)
    assert relative_error(results[0] - 0.5, 2 * expected(*problem)) < FP32
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_new_sizes_compile_nothing_and_wait_for_nothing():
    from dualpipe_ext.triton_kernels.experts.wgrad_hopper import grouped_wgrad_hopper_kernel

    def compiled():
        caches = grouped_wgrad_hopper_kernel.device_caches.values()
        return sum(len(cache[0]) for cache in caches)

    def step(counts, M, N, spare, num_sms):
        problem = make_problem(counts, M, N, spare, device="cuda")
        dw = torch.zeros(len(counts), M, N, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(problem, dw, num_sms=num_sms)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    step((128, 0), 256, 128, 0, 132)
    before = compiled()
    step((1280, 0, 128), 264, 136, 77, 1)
    step((128,), 8, 1000, 1, 17)
    assert compiled() == before
