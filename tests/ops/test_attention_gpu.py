"""Attention's kernels on a Hopper GPU against fp64 arithmetic.

A kernel takes 2 s to compile for each of the KINDS below, and they decide how long this file runs:
every test draws from them.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dualpipe_ext.blocks.attention import GroupedQueryAttention
from dualpipe_ext.ops.attention import flash_attention
from tests.support.attention_cases import CASES, NAMES, Problem, error_of, poisoned_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="the kernels use wgmma, which only Hopper GPUs have",
    ),
]

BF16 = 5e-3
# D, V, causal, packed: of those of CASES.
KINDS = sorted({case[4:8] for case in CASES.values()})
PACKED = [kind for kind in KINDS if kind[3]]
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 191, 255, 257, 1023, 2049, 4097)


def run(problem: Problem, **options) -> list[torch.Tensor]:
    """out, dq, dk, dv as [T, heads, width]."""
    *leaves, d_out = problem.inputs()
    leaves = [x.requires_grad_() for x in leaves]
    how = dict(causal=problem.causal, scale=problem.scale, implementation="triton")
    with poisoned_memory():
        out = flash_attention(*leaves, **how, **problem.starts(), **options)
        gradients = torch.autograd.grad(out, leaves, d_out)
    return problem.rows_of([out.detach(), *gradients])


def check(got, want, few=False, tolerance=BF16) -> None:
    """Few numbers average few roundings."""
    for name, value, reference in zip(NAMES, got, want, strict=True):
        error = error_of(value, reference)
        assert error < tolerance * (3 if few else 1), f"{name}: {error:.2e}"


def problem(q_lengths, k_lengths, N, G, D, V, causal, packed, spare=0, dtype=torch.bfloat16):
    sizes = (q_lengths, k_lengths, N, G, D, V, causal, packed, dtype, spare)
    return Problem(*sizes, scale=D**-0.5, device="cuda")


def compile_step(dtype: torch.dtype, kind: tuple, step: str) -> None:
    here = problem([40], [40], 2, 1, *kind, dtype=dtype)
    q, k, v, d_out = here.inputs()
    starts = here.starts()
    starts = (starts.get("cu_seqlens_q"), starts.get("cu_seqlens_k"))
    how = (*starts, here.causal, here.scale, 0, step == "deterministic", "triton")
    if step == "forward":
        torch.ops.dualpipe_ext.flash_attention_forward(q, k, v, *how)
    else:
        lse = q.new_zeros(q.shape[:-1], dtype=torch.float32)
        lse = lse.T.contiguous() if here.packed else lse
        torch.ops.dualpipe_ext.flash_attention_backward(d_out, q, k, v, d_out, lse, *how)


@pytest.fixture(scope="module", autouse=True)
def compiled(request) -> None:
    """All kernels of this file, in threads: three quarters of a compilation need no Python. A few
    tests chosen by hand compile what they need."""
    if len(request.session.items) < 10:
        return
    steps = [
        (torch.bfloat16, kind, step)
        for step in ("forward", "backward", "deterministic")
        for kind in KINDS
        if (step, kind[0]) != ("backward", 192)  # deterministic anyway
    ]
    steps += [(torch.float16, (128, 128, True, False), step) for step in ("forward", "backward")]
    compile_step(*steps[0])  # also starts Triton's driver
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(compile_step, *zip(*steps[1:], strict=True)))
    torch.cuda.synchronize()


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("case", CASES)
def test_equals_fp64(case, deterministic):
    *sizes, num_sms = CASES[case]
    here = problem(*sizes)
    got = run(here, num_sms=num_sms, deterministic=deterministic)
    check(got, here.expected(), few=len(here.rows[0]) < 8)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_lengths(kind):
    packed = kind[3]
    for lengths in [LENGTHS] if packed else [[S] for S in LENGTHS]:
        heads = 2 if max(lengths) >= 64 else 64  # few numbers average few roundings
        here = problem(list(lengths), list(lengths), heads, heads // 2, *kind)
        check(run(here), here.expected(), few=max(lengths) < 64)


def test_fp16():
    here = problem([300] * 2, [333] * 2, 4, 2, 128, 128, True, False, dtype=torch.float16)
    check(run(here), here.expected(), tolerance=1e-3)


def test_random_problems():
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(40):
        B, G, (*kind, packed) = draw(1, 6), draw(1, 3), KINDS[draw(0, len(KINDS) - 1)]
        if packed:
            lengths = [[draw(0, 700) * draw(0, 1) for _ in range(B)] for _ in range(2)]
        else:
            lengths = [[draw(1, 700)] * B for _ in range(2)]
        if not all(map(sum, lengths)):
            continue
        here = problem(*lengths, G * draw(1, 4), G, *kind, packed, draw(0, 200))
        got = run(here, num_sms=draw(1, 132), deterministic=bool(draw(0, 1)))
        check(got, here.expected(), few=True)


@pytest.mark.parametrize("kind", PACKED, ids=str)
def test_deterministic_runs_give_the_same_bits(kind):
    here = problem([1500, 0, 900], [1500, 4, 1000], 8, 2, *kind)
    first = run(here, deterministic=True)
    for num_sms in (132, 132, 57, 3):
        again = run(here, deterministic=True, num_sms=num_sms)
        for name, a, b in zip(NAMES, again, first, strict=True):
            assert torch.equal(a, b), name
    # The faster backward sums only dq in an order of its own.
    fast = run(here)
    for name, a, b in zip(NAMES, fast, first, strict=True):
        assert error_of(a, b) < BF16, name
    for num_sms in (132, 57):
        again = run(here, num_sms=num_sms)
        for i in (0, 2, 3):
            assert torch.equal(again[i], fast[i]), NAMES[i]


@pytest.mark.parametrize("strided", ["heads first", "one projection"])
def test_strides(strided):
    here = problem([200] * 2, [200] * 2, 4, 4, 128, 128, True, False)
    q, k, v, _ = here.inputs()
    want = flash_attention(q, k, v, causal=True)
    if strided == "heads first":
        q, k, v = (x.contiguous() for x in (q, k, v))
    else:
        q, k, v = (
            torch.cat([q, k, v], dim=1).transpose(1, 2).contiguous().transpose(1, 2).chunk(3, 1)
        )
    assert torch.equal(flash_attention(q, k, v, causal=True), want)
    leaf = q.clone().requires_grad_()
    out = flash_attention(leaf, k, v, causal=True, deterministic=True)
    # A gradient that is expanded from one number has strides of 0.
    out.sum().backward()
    first = leaf.grad.clone()
    leaf.grad = None
    flash_attention(leaf, k, v, causal=True, deterministic=True).backward(torch.ones_like(out))
    assert torch.equal(first, leaf.grad)


def test_blocks_choose_the_kernels():
    x, results = torch.randn(2, 70, 512, device="cuda", dtype=torch.bfloat16), []
    for implementation in ("auto", "triton", "sdpa"):
        torch.manual_seed(0)
        how = dict(heads=4, kv_heads=2, device="cuda", dtype=torch.bfloat16, num_sms=20)
        layer = GroupedQueryAttention(512, implementation=implementation, **how)
        y = layer(x)
        y.sum().backward()
        results.append((y.detach(), *(p.grad for p in layer.parameters())))
    auto, triton, sdpa = results
    assert torch.equal(auto[0], triton[0])
    for a, b in zip(auto, sdpa, strict=True):
        assert error_of(a, b) < 2 * BF16
    # What the kernels do not take.
    for how in (dict(dtype=torch.float32), dict(dtype=torch.bfloat16, head_width=80)):
        layer = GroupedQueryAttention(512, heads=4, device="cuda", **how)
        layer(x.to(how["dtype"])).sum().backward()


def test_large_scores_stay_finite():
    here = problem([70], [70], 1, 1, 128, 128, False, False)
    here.rows[0], here.rows[1] = 6 + here.rows[0] / 10, -6 + here.rows[1] / 10
    got, want = run(here), here.expected()  # scores around -400
    # Keys of -6 ± 0.1 nearly cancel in dq and leave 60 times ds's rounding.
    assert error_of(got[1], want[1]) < 60 * BF16
    got[1] = want[1]
    check(got, want)
    here = problem([300], [300], 2, 2, 128, 128, True, False)
    here.rows = [x * 20 for x in here.rows]
    got = run(here)
    assert all(x.isfinite().all() for x in got)
    assert error_of(got[0], here.expected()[0]) < BF16


def test_new_sizes_compile_nothing_and_wait_for_nothing():
    from dualpipe_ext.triton_kernels.attention import backward as attention_backward
    from dualpipe_ext.triton_kernels.attention import backward_query as attention_backward_query
    from dualpipe_ext.triton_kernels.attention import delta as attention_delta
    from dualpipe_ext.triton_kernels.attention import forward as attention_forward

    kernels = (
        attention_forward.attention_forward_kernel,
        attention_backward.attention_backward_kernel,
        attention_backward_query.query_gradient_kernel,
        attention_delta.prepare_kernel,
        attention_delta.finish_query_gradient_kernel,
        attention_delta.clear_tail_kernel,
    )

    def compiled():
        return [sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels]

    def step(q_lengths, k_lengths, N, G, num_sms, packed):
        here = problem(q_lengths, k_lengths, N, G, 128, 128, True, packed, 5 if packed else 0)
        *leaves, d_out = here.inputs()
        leaves, starts = [x.requires_grad_() for x in leaves], here.starts()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for deterministic in (False, True):
                how = dict(causal=True, num_sms=num_sms, deterministic=deterministic)
                out = flash_attention(*leaves, **how, **starts)
                torch.autograd.grad(out, leaves, d_out)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    step([128, 7, 0], [128, 7, 1], 4, 2, None, True)
    step([128] * 2, [130] * 2, 4, 2, None, False)
    before = compiled()
    step([500], [333], 8, 8, 1, True)
    step([16, 1, 1, 1], [1, 16, 1, 1], 2, 1, 16, True)
    step([1], [1], 1, 1, 99, False)
    step([1600] * 3, [16] * 3, 16, 1, 132, False)
    assert compiled() == before


def test_cuda_graph_replays_on_new_numbers():
    here = problem([300, 100], [300, 90], 4, 2, 128, 128, True, True)
    run(here, deterministic=True)  # compiles: no module can be loaded during a capture
    q, k, v, d_out = here.inputs()
    starts, graph = here.starts(), torch.cuda.CUDAGraph()
    ops = torch.ops.dualpipe_ext
    how = (starts["cu_seqlens_q"], starts["cu_seqlens_k"], True, here.scale, 0, True, "triton")
    with torch.cuda.graph(graph):
        out, lse = ops.flash_attention_forward(q, k, v, *how)
        gradients = ops.flash_attention_backward(d_out, q, k, v, out, lse, *how)
    q.copy_(torch.randn_like(q))
    graph.replay()
    here.rows[0] = q.clone()
    for name, a, b in zip(NAMES, run(here, deterministic=True), (out, *gradients), strict=True):
        assert torch.equal(a, b), name


def test_triton_refuses_what_it_cannot():
    q, k, v, _ = problem([30], [30], 2, 2, 64, 64, True, False, dtype=torch.float32).inputs()
    with pytest.raises(ValueError, match=r"torch\.float32: it takes torch\.bfloat16"):
        flash_attention(q, k, v, implementation="triton")
    q, k, v, _ = problem([30], [30], 2, 2, 80, 80, True, False).inputs()
    with pytest.raises(ValueError, match=r"\(80, 80\): it takes \(64, 64\), \(128, 128\)"):
        flash_attention(q, k, v, implementation="triton")
    flash_attention(q, k, v)
