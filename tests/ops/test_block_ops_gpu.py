"""Router, norm, rotary embedding, SwiGLU and cross-entropy on a GPU, against fp64 on the host."""

import importlib

import pytest
import torch

from dualpipe_ext.moe.router import Router
from dualpipe_ext.ops.attention import flash_attention
from dualpipe_ext.ops.cross_entropy import cross_entropy
from dualpipe_ext.ops.norm import rms_norm
from dualpipe_ext.ops.rotary import rotary, rotary_, rotary_tables
from dualpipe_ext.ops.route import fits, fits_hopper, route
from dualpipe_ext.ops.swiglu import swiglu
from dualpipe_ext.triton_kernels.launch import sm_sharing as claims
from dualpipe_ext.triton_kernels.routing import tiles as router_tiles
from tests.support import block_ops_cases as cases

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = {
    "elementwise.norm": ("rms_norm", "rms_norm_backward", "add_parts"),
    "elementwise.rotary": ("rotary",),
    "elementwise.swiglu": ("swiglu", "swiglu_backward"),
    "elementwise.cross_entropy": ("row_loss", "long_row_loss", "gradient", "scale_rows"),
    "elementwise.cross_entropy_hopper": ("loss",),
    "routing.route": ("route",),
    "routing.backward": ("d_logits", "route_backward"),
    "routing.choice": ("choose",),
    "routing.logits_hopper": ("split_weight", "logits_hopper"),
    "routing.backward_hopper": ("gradients_hopper",),
}


# Every case compiles its kernels, one to three seconds each: a case for each branch of a kernel,
# not for each combination.
@pytest.mark.parametrize(
    ("T", "H", "residual", "dtype"),
    [
        (4097, 7168, True, BF16),
        (300, 136, False, BF16),
        (1, 50, True, FP32),
        (1000, 50, True, FP32),
        (17, 16384, True, FP32),
        (3, 20000, True, BF16),
    ],
    ids=str,
)
def test_rms_norm(T, H, residual, dtype):
    cases.check_rms_norm(T, H, dtype, "cuda", residual=residual)


@pytest.mark.parametrize(
    ("B", "S", "N", "D", "how", "dtype"),
    [
        (2, 4097, 32, 128, {}, BF16),
        (2, 4097, 8, 128, dict(interleaved=True, inplace=True), BF16),
        (1, 1, 1, 64, dict(places=True), FP32),
        (3, 70, 5, 192, dict(interleaved=True, places=True, inplace=True), FP32),
        (1, 1000, 40, 64, dict(packed=True), BF16),
        (2, 33, 3, 6, dict(packed=True, inplace=True), BF16),
    ],
    ids=str,
)
def test_rotary(B, S, N, D, how, dtype):
    cases.check_rotary(B, S, N, D, dtype, "cuda", **how)


@pytest.mark.parametrize(
    ("T", "D", "how", "dtype"),
    [
        (4097, 7168, {}, BF16),
        (1000, 1408, dict(strange=True), BF16),
        (1, 40, {}, FP32),
        (333, 2048, {}, FP32),
        (70, 7, {}, BF16),
    ],
    ids=str,
)
def test_swiglu(T, D, how, dtype):
    cases.check_swiglu(T, D, dtype, "cuda", **how)


def test_swiglu_past_two_to_the_31_numbers():
    T, D = 150_000, 7168  # 2.15e9 and 1.08e9 numbers: of the last rows' gate_up and d_gate_up
    gate_up = torch.empty(T, 2 * D, dtype=BF16, device="cuda").fill_(9)
    gate_up[-40:].normal_()
    dy = torch.ones(T, D, dtype=BF16, device="cuda")
    dy[-40:].normal_()
    want = gate_up[-40:].clone().requires_grad_()
    swiglu(want).backward(dy[-40:])
    got = swiglu(gate_up.requires_grad_())
    assert torch.equal(got[-40:], swiglu(want))
    got.backward(dy)
    assert torch.equal(gate_up.grad[-40:], want.grad)


@pytest.mark.parametrize(
    ("V", "how", "dtype"),
    [
        (2, dict(z_loss=1e-3, reduction="none"), BF16),
        (1000, dict(inplace=True, z_loss=1e-3), FP32),
        (32768, dict(z_loss=1e-3, reduction="none"), BF16),
        (32768, dict(inplace=True, scale=0.5, reduction="sum"), BF16),
        (32768, dict(inplace=True, z_loss=1e-3), FP32),
        (50257, dict(inplace=True, z_loss=1e-3), BF16),
        (129280, dict(reduction="none"), BF16),
        (129280, dict(inplace=True, z_loss=1e-3, scale=0.5), BF16),
    ],
    ids=str,
)
def test_cross_entropy(V, how, dtype):
    cases.check_cross_entropy(143, V, dtype, "cuda", **how)


@pytest.mark.parametrize(
    ("T", "V", "how", "dtype"),
    [
        (1, 32768, dict(z_loss=1e-3), BF16),
        (300, 40008, dict(z_loss=1e-3, reduction="none"), FP16),
        (701, 32768, dict(), BF16),
        (70, 129280, dict(reduction="none", num_sms=3), BF16),
        (1024, 8, dict(z_loss=1e-3), BF16),
        (3001, 1000, dict(reduction="none", num_sms=50), BF16),
        (1100, 32776, dict(z_loss=1e-3, reduction="none"), FP16),
        (2500, 32768, dict(reduction="sum", num_sms=132), BF16),
    ],
    ids=str,
)
def test_cross_entropy_with_a_row_a_warp(T, V, how, dtype):
    cases.check_cross_entropy(T, V, dtype, "cuda", **how)


@pytest.mark.parametrize(
    ("T", "H", "E", "K", "how", "dtype"),
    [
        (1, 8, 3, 2, {}, BF16),
        (4097, 7168, 64, 8, {}, BF16),
        (4097, 7168, 64, 8, {}, FP32),
        (1000, 136, 15, 4, dict(sigmoid=True, groups=3, keep=2), BF16),
        (4097, 7168, 64, 8, dict(weight_dtype=BF16), BF16),
        (1000, 136, 15, 4, dict(sigmoid=True, groups=3, keep=2, weight_dtype=BF16), BF16),
        (700, 2048, 100, 4, dict(weight_dtype=BF16), BF16),
        (2049, 7168, 256, 8, dict(sigmoid=True, groups=8, keep=4, weight_dtype=BF16), BF16),
        (300, 520, 512, 6, dict(weight_dtype=BF16), BF16),
        (513, 2048, 128, 1, dict(renormalize=False), BF16),
        (700, 520, 100, 4, dict(renormalize=False), FP32),
        (2049, 7168, 256, 8, dict(sigmoid=True, groups=8, keep=4), BF16),
        (2049, 7168, 256, 8, dict(sigmoid=True, groups=8, keep=4), FP32),
        (300, 520, 500, 32, {}, BF16),
        (300, 520, 512, 6, dict(sigmoid=True, groups=4, keep=2, renormalize=False), BF16),
        (300, 520, 512, 6, {}, FP32),
    ],
    ids=str,
)
def test_route(T, H, E, K, how, dtype):
    assert fits(torch.empty(T, H, dtype=dtype, device="cuda"), torch.empty(E, H), K, 1)
    cases.check_route(T, H, E, K, dtype, "cuda", **how)


def routed(x, weight):
    """Results and gradients of one call."""
    weight = weight.clone().requires_grad_()
    x = x.clone().requires_grad_()
    idx, topk_weight, sums, count = route(x, weight, None, topk=4)
    (topk_weight.square().sum() + sums.square().sum()).backward()
    return idx, topk_weight, sums, count, x.grad, weight.grad


def test_route_after_a_number_was_lost():
    """Sums over all tokens start from what the last launch left behind."""
    x, weight = torch.randn(1000, 512, device="cuda").to(BF16), torch.randn(24, 512, device="cuda")
    want = routed(x, weight)
    lost = x.clone()
    lost[777, 5] = torch.nan
    assert routed(lost, weight)[2].isnan().all()
    for got, expected in zip(routed(x, weight), want, strict=True):
        assert torch.equal(got, expected)


def test_route_on_two_streams_and_in_a_graph():
    x, weight = torch.randn(2, 5000, 2048, device="cuda").to(BF16), torch.randn(64, 2048).cuda()
    want = [routed(one, weight) for one in x]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = [None, None]
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i] = routed(x[i], weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got.append(routed(x[0], weight))
    want.append(want[0])
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for one, expected in zip(got, want, strict=True):
        assert all(map(torch.equal, one, expected))


def test_fp16():
    cases.check_rms_norm(300, 136, FP16, "cuda")
    cases.check_rotary(1, 70, 5, 64, FP16, "cuda")
    cases.check_swiglu(300, 136, FP16, "cuda")
    cases.check_cross_entropy(50, 1000, FP16, "cuda", inplace=True)
    cases.check_route(300, 1024, 20, 4, FP16, "cuda")


def test_random_shapes():
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    T, sms = draw(1, 900), draw(1, 132)
    cases.check_rms_norm(T, draw(2, 3000), BF16, "cuda", num_sms=sms)
    cases.check_rotary(1, T, draw(1, 12), 2 * draw(1, 64), BF16, "cuda", num_sms=sms)
    cases.check_swiglu(T, 8 * draw(1, 500), BF16, "cuda", num_sms=sms)
    cases.check_cross_entropy(T, draw(2, 9000), BF16, "cuda", num_sms=sms)
    E = draw(2, 300)
    how = dict(sigmoid=bool(draw(0, 1)), num_sms=sms, weight_dtype=(BF16, FP32)[draw(0, 1)])
    cases.check_route(T, 8 * draw(1, 90), E, draw(1, min(E, 9)), BF16, "cuda", **how)


def test_ties_and_numbers_out_of_range():
    for dtype in (BF16, FP32):
        cases.check_router_ties("cuda", dtype)
    cases.check_targets_out_of_range("cuda")
    cases.check_positions_out_of_range("cuda")
    cases.check_swiglu_far_out("cuda")


def everything(num_sms, T=700, H=1024, seed=0):
    """All results of one forward and backward of each operator."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape, dtype=BF16):
        return torch.randn(shape, device="cuda", generator=generator).to(dtype).requires_grad_()

    x, y, weight = draw(T, H), draw(T, H), draw(H)
    gate, cut = draw(64, H, dtype=FP32), draw(T, H)
    cos, sin = rotary_tables(T, 128, device="cuda")
    targets = torch.arange(T, device="cuda") % H
    options = dict(num_sms=num_sms)
    normed, hidden = rms_norm(x, weight, residual=y, **options)
    turned = rotary(normed.view(T, -1, 128), cos, sin, **options).flatten(1)
    rotary_((cut * 1).view(T, -1, 128), cos, sin, **options)
    act = swiglu(torch.cat((turned, hidden), dim=1), **options)
    idx, topk_weight, sums, count = route(turned, gate, None, topk=8, **options)
    loss = cross_entropy(hidden + act, targets, **options) + topk_weight.square().sum() + sums.sum()
    loss = loss + 2 * cross_entropy(cut * 1, targets, inplace=True, **options)
    loss.backward()
    leaves = (x, y, weight, gate, cut)
    results = [normed, hidden, turned, act, idx, topk_weight, sums, count, loss]
    return [*results, *(t.grad for t in leaves)]


def test_sm_count_changes_no_bit():
    want = everything(132)
    for num_sms in (132, 1, 7, 100, 10_000):
        for got, expected in zip(everything(num_sms), want, strict=True):
            assert torch.equal(got, expected)


def compiled():
    """How many binaries each kernel has."""
    counts = {}
    for module, names in KERNELS.items():
        module = importlib.import_module(f"dualpipe_ext.triton_kernels.{module}")
        for name in names:
            caches = getattr(module, f"{name}_kernel").device_caches
            counts[name] = sum(len(cache[0]) for cache in caches.values())
    return counts


def test_new_sizes_compile_nothing():
    everything(132)
    before = compiled()
    for T, num_sms in ((1, 1), (16, 16), (129, 100), (5000, 132)):
        everything(num_sms, T)
    assert compiled() == before


def test_nothing_waits_for_the_host():
    everything(132)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(100, seed=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_into_one_graph():
    # Widths and dtypes of `everything`, whose kernels are there.
    T, H = 64, 1024
    cos, sin = rotary_tables(T, 128, device="cuda")
    tensors = [torch.randn(T, H).to(BF16), torch.rand(H).to(BF16)]
    tensors += [torch.randn(64, H) / 32, torch.randn(H, H) / 32]
    targets = torch.arange(T, device="cuda")
    results = []
    for function in (cases.block, torch.compile(cases.block, backend="aot_eager", fullgraph=True)):
        leaves = [t.cuda().requires_grad_() for t in tensors]
        loss = function(*leaves, cos, sin, targets, topk=8)
        loss.backward()
        results.append((loss, *(t.grad for t in leaves)))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-3, atol=1e-5)


def test_graphs_of_torch_compile(monkeypatch):
    """Its warm-up refuses what stays in its pool, and here nothing has been made before."""
    monkeypatch.setattr(claims, "_limits", {})
    router_tiles._stream_counters.cache_clear()
    gate = torch.randn(64, 512, device="cuda") / 20

    def function(x):
        heads = x.view(1, 256, 4, 128).transpose(1, 2)
        mixed = flash_attention(heads, heads, heads, causal=True).transpose(1, 2).reshape(256, 512)
        return mixed + route(mixed, gate, None, topk=4)[1].sum(1, keepdim=True)

    graphed = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    for seed in range(5):  # warm-up, capture, replays
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(256, 512, device="cuda", generator=generator).to(BF16)
        found, wanted = [], []
        for run, results in ((graphed, found), (function, wanted)):  # in this order
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            y.float().square().sum().backward()
            results += [y.detach().clone(), leaf.grad.clone()]
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_router_takes_the_kernels_by_itself():
    x = torch.randn(300, 512, device="cuda").to(BF16)
    routers = [Router(512, 64, 8, implementation=how).cuda() for how in ("auto", "triton")]
    routers[1].weight.data.copy_(routers[0].weight)
    assert fits_hopper(x, routers[0].weight, 8, 1)
    assert not fits_hopper(x.float(), routers[0].weight, 8, 1)
    for auto, triton in zip(routers[0](x), routers[1](x), strict=True):
        assert torch.equal(auto, triton)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_router_module_is_the_one_of_the_host(kind):
    groups = dict(n_groups=8, topk_groups=3) if kind == "sigmoid" else {}
    router = Router(512, 64, 8, kind=kind, **groups)
    x = torch.randn(1000, 512).bfloat16()
    want = router(x)
    want.aux_loss.backward()
    want_grad, router.weight.grad = router.weight.grad, None
    router.cuda().implementation, router.num_sms = "triton", 50
    got = router(x.cuda())
    got.aux_loss.backward()
    agree = (got.topk_idx.cpu() == want.topk_idx).all(dim=1)
    assert (~agree).sum() <= 2
    torch.testing.assert_close(got.topk_weight.cpu()[agree], want.topk_weight[agree])
    torch.testing.assert_close(got.aux_loss.cpu(), want.aux_loss, rtol=1e-3, atol=0)
    error = (router.weight.grad.cpu() - want_grad).norm() / want_grad.norm()
    assert error < 1e-2  # the loads of two tokens may differ
    assert torch.equal(got.tokens_per_expert.sum(), torch.tensor(8000, device="cuda"))
