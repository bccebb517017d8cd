"""References in fp64 for the rest of a block, on the operators' device, and checks against them.

tests/ops/test_block_ops.py runs the checks on plain torch and on a GPU. As a program
this runs them on the kernels in Triton's interpreter, in fp32 and fp16 (its bf16 arithmetic is
wrong): a child of test_block_ops.py, because TRITON_INTERPRET=1 has to be set before Triton is
imported.
"""

from __future__ import annotations

from unittest import mock

import torch

from dualpipe_ext.moe.router import Router
from tests.support.operators import (
    cross_entropy,
    rms_norm,
    rotary,
    rotary_,
    rotary_tables,
    route,
    swiglu,
)

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 5e-3,
}


def same(got, want, dtype, what, size=None) -> None:
    """Relative to the norm of `want`, or to `size`, that of the terms that cancel in it."""
    assert got.shape == want.shape, f"{what}: {got.shape}, not {want.shape}"
    got, want = got.detach().double().to(want.device), want.detach().double()
    size = want.norm() if size is None else size.detach()
    error = float((got - want).norm() / size.clamp_min(1e-30))
    assert error < TOLERANCE[dtype], f"{what}: relative error {error:.1e} in {dtype}"


def apart(x: torch.Tensor, device) -> torch.Tensor:
    """x in the middle of NaN: 8 columns beside every row, a row at each end."""
    rows = x.reshape(-1, x.shape[-1])
    buffer = torch.full((len(rows) + 2, x.shape[-1] + 8), torch.nan, dtype=x.dtype, device=device)
    inside = buffer[1:-1, : x.shape[-1]]
    inside.copy_(rows.detach())
    if x.dim() == 2:
        return inside
    return inside.unflatten(0, x.shape[:-1])


def drawn(seed: int, *shape, dtype=torch.float32, device="cpu") -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


# ---- RMSNorm ----


def check_rms_norm(T, H, dtype, device="cpu", *, residual=True, num_sms=None, eps=1e-5) -> None:
    how = dict(dtype=dtype, device=device)
    inputs = [drawn(1, T, H, **how), drawn(2, T, H, **how), drawn(3, H, device=device) + 1]
    if dtype == torch.float64:
        inputs[2] = inputs[2].double()
    d_normed, d_hidden = (drawn(seed, T, H, **how) for seed in (4, 5))

    x, other, weight = (t.double().requires_grad_() for t in inputs)
    hidden = x + other if residual else x
    normed = hidden / (hidden.square().sum(1, keepdim=True) / H + eps).sqrt() * weight
    total = (normed * d_normed.double()).sum()
    total = total + (hidden * d_hidden.double()).sum() if residual else total
    wanted = (x, other, weight) if residual else (x, weight)
    gradients = torch.autograd.grad(total, wanted)

    x, other = (apart(t, device).requires_grad_() for t in inputs[:2])
    weight = inputs[2].clone().requires_grad_()
    options = dict(eps=eps, num_sms=num_sms)
    if residual:
        got, got_hidden = rms_norm(x, weight, residual=other, **options)
        same(got_hidden, hidden, dtype, "hidden")
        ends = (got, got_hidden), (apart(d_normed, device), apart(d_hidden, device))
    else:
        got = rms_norm(x, weight, **options)
        ends = (got,), (apart(d_normed, device),)
    assert got.dtype == dtype
    same(got, normed, dtype, "normed")
    found = torch.autograd.grad(ends[0], (x, other, weight) if residual else (x, weight), ends[1])
    # With H = 1 the norm is a sign, whose slope is what is left of terms that cancel.
    rstd = (inputs[0].double() + residual * inputs[1].double()).square().mean(1, keepdim=True)
    size = (d_normed.double() * weight.detach().double() / (rstd + eps).sqrt()).norm()
    same(found[-1], gradients[-1], dtype, "d_weight")
    for value, want in zip(found[:-1], gradients[:-1], strict=True):
        same(value, want, dtype, "dx", size + want.norm())


def check_segments(dtype) -> None:
    """Segments of 5 and of 4 rows, two or three to a program."""
    from dualpipe_ext.triton_kernels.elementwise import norm

    with mock.patch.object(norm, "SEGMENTS", 5):
        check_rms_norm(23, 4100, dtype, num_sms=2)


# ---- Rotary embedding ----


def turned(x, places, interleaved, base=10_000.0):
    """Each pair as a complex number times e^(i · angle), fp64; x [B, S, N, D], places [B, S]."""
    D = x.shape[-1]
    frequency = base ** (-torch.arange(0, D, 2, dtype=torch.float64, device=x.device) / D)
    angle = places.double()[..., None, None] * frequency
    if interleaved:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    else:
        pairs = torch.complex(x.double()[..., : D // 2], x.double()[..., D // 2 :])
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    if interleaved:
        return torch.view_as_real(pairs).flatten(-2)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def check_rotary(
    B,
    S,
    N,
    D,
    dtype,
    device="cpu",
    *,
    interleaved=False,
    packed=False,
    places=None,
    inplace=False,
    num_sms=None,
) -> None:
    """`places` draws positions at random; `packed` makes [T, N, D] of it, which needs them."""
    x, dy = (drawn(seed, B, S, N, D, dtype=dtype, device=device) for seed in (1, 2))
    positions = torch.arange(S).expand(B, S)
    if places or packed:
        positions = torch.randint(0, 100, (B, S), generator=torch.Generator().manual_seed(3))
    positions = positions.to(device)
    cos, sin = rotary_tables(max(S, 100), D, device=device)
    want = turned(x, positions, interleaved)
    # The gradient of a rotation is the opposite rotation.
    want_dx = turned(dy, -positions, interleaved)
    options = dict(interleaved=interleaved, num_sms=num_sms)
    if places or packed:
        options["positions"] = positions.flatten() if packed else positions
    if packed:
        x, dy, want, want_dx = (t.flatten(0, 1) for t in (x, dy, want, want_dx))

    leaf = apart(x, device).requires_grad_()
    if inplace:
        middle = leaf.clone() if inplace == "clone" else leaf * 1
        whole = torch.cat((middle, middle), dim=-2)  # of which it is a slice
        part = whole[..., :N, :]
        y = rotary_(part, cos, sin, **options)
        assert y.data_ptr() == part.data_ptr()
        same(whole[..., N:, :], x, dtype, "the rest")
    else:
        y = rotary(leaf, cos, sin, **options)
    assert y.dtype == dtype
    same(y, want, dtype, "y")
    y.backward(apart(dy, device))
    same(leaf.grad, want_dx, dtype, "dx")


# ---- SwiGLU ----


def check_swiglu(T, D, dtype, device="cpu", *, strange=False, num_sms=None) -> None:
    """`strange`: rows that no vectors of 16 bytes can be read from, and columns of a gradient."""
    gate_up = 2 * drawn(1, T, 2 * D, dtype=dtype, device=device)
    dy = drawn(2, T, D, dtype=dtype, device=device)
    x = gate_up.double().requires_grad_()
    want = x[:, :D] / (1 + (-x[:, :D]).exp()) * x[:, D:]
    (want_dx,) = torch.autograd.grad(want, x, dy.double())

    if strange:
        x = apart(torch.nn.functional.pad(gate_up, (1, 0)), device)[:, 1:].requires_grad_()
        dy = dy.T.contiguous().T
    else:
        x, dy = apart(gate_up, device).requires_grad_(), apart(dy, device)
    got = swiglu(x, num_sms=num_sms)
    (dx,) = torch.autograd.grad(got, x, dy)
    for value, exact, what in ((got, want, "act"), (dx, want_dx, "d_gate_up")):
        assert value.dtype == dtype and value.is_contiguous()
        same(value, exact, dtype, what)
        if dtype in (torch.float16, torch.bfloat16):
            twice = int((value != exact.to(dtype)).sum())
            assert twice <= 1 + value.numel() // 100, f"{what}: {twice} not rounded once"


def check_swiglu_far_out(device="cpu") -> None:
    """Where exp(−gate) is no number of fp32, or 1 + exp(−gate) is 1."""
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30, 1.0], device=device)
    x = torch.cat((gate, torch.full_like(gate, 2.0))).requires_grad_()
    act = swiglu(x)
    act.sum().backward()
    exact = torch.tensor([0, 0, 0, 0, 90, 200, 1e30, 0.731058578630005], device=device)
    slope = torch.tensor([0, 0, 0, 0.5, 1, 1, 1, 0.927670511871487], device=device)
    torch.testing.assert_close(act.detach(), 2 * exact)
    torch.testing.assert_close(x.grad, torch.cat((2 * slope, exact)))


# ---- Cross-entropy ----


def check_cross_entropy(
    T,
    V,
    dtype,
    device="cpu",
    *,
    reduction="mean",
    z_loss=0.0,
    inplace=False,
    scale=1.0,
    ignored=0.3,
    num_sms=None,
) -> None:
    logits = (3 * drawn(1, T, V, device=device)).to(dtype)
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(0, V, (T,), generator=generator)
    keep = torch.rand(T, generator=generator) >= ignored
    targets[~keep] = -100
    targets, keep = targets.to(device), keep.to(device)

    x = logits.double().requires_grad_()
    lse = x.exp().sum(1).log()
    losses = lse - x.gather(1, targets.clamp_min(0)[:, None])[:, 0] + z_loss * lse.square()
    losses = losses * keep
    d_losses = drawn(3, T, device=device).double()
    if reduction != "none":
        d_losses = torch.ones_like(d_losses[0])
    want = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        want = want / max(1, int(keep.sum()))
    total = (want * d_losses * scale).sum()
    (want_dx,) = torch.autograd.grad(total, x, retain_graph=True)

    leaf = apart(logits, device).requires_grad_()
    middle = leaf * 1 if inplace else leaf
    options = dict(reduction=reduction, z_loss=z_loss, inplace=inplace, num_sms=num_sms)
    got = cross_entropy(middle, targets, **options)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss_dtype = torch.float32 if dtype != torch.float64 else dtype
    # With V = 1 it is the difference of two equal numbers; its natural unit is 1.
    same(got, want, loss_dtype, "loss", want.norm() + 1)
    (got * d_losses.to(got) * scale).sum().backward()
    # The same for the probability and the 1 of the target.
    size = torch.autograd.grad(total, losses)[0].norm()
    same(leaf.grad, want_dx, dtype, "d_logits", want_dx.norm() + size)


# ---- Router ----


def check_route(
    T,
    H,
    E,
    K,
    dtype,
    device="cpu",
    *,
    sigmoid=False,
    groups=1,
    keep=1,
    renormalize=True,
    num_sms=None,
    weight_dtype=torch.float32,
    run=None,
) -> None:
    """Against `Router` in fp64. `run` takes the place of `route` and its gradient."""
    router = Router(
        H,
        E,
        K,
        kind="sigmoid" if sigmoid else "softmax",
        renormalize=renormalize,
        n_groups=groups,
        topk_groups=keep,
        route_scale=2.5,
    )
    router.double().to(device)
    x = drawn(1, T, H, dtype=dtype, device=device)
    weight = (drawn(2, E, H, device=device) * 2 / H**0.5).to(weight_dtype)
    bias = drawn(3, E, device=device) / 8 if sigmoid else None
    with torch.no_grad():
        router.weight.copy_(weight)
        if sigmoid:
            router.bias.copy_(bias)
    x64 = x.double().requires_grad_()
    want = router(x64)

    x_leaf, weight_leaf = apart(x, device).requires_grad_(), weight.clone().requires_grad_()
    how = dict(topk=K, renormalize=renormalize, n_groups=groups, topk_groups=keep, route_scale=2.5)
    idx, topk_weight, probability_sum, count = (run or route)(
        x_leaf, weight_leaf, bias, num_sms=num_sms, **how
    )
    assert idx.dtype == torch.int32 and count.dtype == torch.int64
    assert topk_weight.dtype == probability_sum.dtype == torch.float32
    logits = x64 @ router.weight.T
    scores = logits.sigmoid() if sigmoid else logits.softmax(1)
    # Experts less apart than fp32 can see may change places: of the gaps between the 33 best of
    # 500 experts one in 10⁴ is below 1e-6. With groups a token's other experts change, too.
    ranking = router.bias + scores if sigmoid else logits
    agree = (idx == want.topk_idx).all(dim=1)
    apart_by = ranking.gather(1, idx.long()) - ranking.gather(1, want.topk_idx.long())
    elsewhere = int((apart_by.abs() > 1e-4).any(dim=1).sum())
    assert elsewhere <= T // 500, f"{elsewhere} of {T} tokens went elsewhere"
    assert (~agree).sum() <= 1 + T // 100
    assert torch.equal(count, idx.flatten().long().bincount(minlength=E))
    fp32 = torch.float32
    same(topk_weight[agree], want.topk_weight[agree], fp32, "topk_weight")
    # The auxiliary loss holds the probabilities: with one share an expert it is their weighted sum.
    d_sum = drawn(4, E, device=device).double()
    sums = (scores / scores.sum(1, keepdim=True)).sum(0)
    same(probability_sum, sums, fp32, "probability_sum")

    d_weight = drawn(5, T, K, device=device).double() * agree[:, None]
    total = (want.topk_weight * d_weight).sum() + (sums * d_sum / T).sum()
    want_dx, want_dw = torch.autograd.grad(total, (x64, router.weight))
    got_dx, got_dw = torch.autograd.grad(
        (topk_weight, probability_sum),
        (x_leaf, weight_leaf),
        (d_weight.float(), (d_sum / T).float()),
    )
    assert got_dx.dtype == dtype and got_dw.dtype == weight_dtype
    # Where one expert has all of the probability, its gradient is what is left of these terms.
    terms = (scores / scores.sum(1, keepdim=True) * d_sum / T).detach()
    size = (terms @ weight.double()).norm()
    same(got_dx, want_dx, dtype, "dx", want_dx.norm() + size)
    size = (terms.T @ x.double()).norm()
    # For bf16 the kernels on Hopper take the logits' gradients rounded to it.
    hopper = device != "cpu" and torch.cuda.get_device_capability(device)[0] == 9
    rounded = dtype == torch.float16 or (dtype == torch.bfloat16 and hopper and E <= 256)
    math = dtype if rounded else weight_dtype
    same(got_dw, want_dw, math, "d_weight", want_dw.norm() + size)


def route_in_parts(*arguments, num_sms, **how):
    """`route` with an fp32 x split into fp16 parts, as a GPU splits it into bf16."""
    from dualpipe_ext.triton_kernels.routing.backward import route_backward
    from dualpipe_ext.triton_kernels.routing.route import route as forward

    half = dict(part=torch.float16, num_sms=num_sms)

    class Parts(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            x, ctx.softmax = x.contiguous(), bias is None
            idx, topk_weight, logits, sums, count = forward(x, weight, bias, **how, **half)
            ctx.save_for_backward(x, weight, logits, idx)
            ctx.mark_non_differentiable(idx, count)
            return idx, topk_weight, sums, count

        @staticmethod
        def backward(ctx, _idx, d_topk_weight, d_sum, _count):
            # Parts of fp16 need gradients away from its smallest numbers.
            up = 2.0**10
            options = {name: how[name] for name in ("renormalize", "route_scale")}
            dx, dw = route_backward(
                d_topk_weight * up, d_sum * up, *ctx.saved_tensors, softmax=ctx.softmax,
                **options, **half,
            )  # fmt: skip
            return dx / up, dw / up, None

    return Parts.apply(*arguments)


# ---- All of them ----


def block(x, weight, gate, head, cos, sin, targets, topk=2):
    """What is between the matrix products of a block and behind the last."""
    normed, x = rms_norm(x, weight, residual=x)
    turned = rotary(normed.unflatten(1, (-1, 2 * cos.shape[1])), cos, sin).flatten(1)
    x = x + swiglu(torch.cat((turned, x), dim=1))
    _, topk_weight, probability_sum, _ = route(turned, gate, None, topk=topk)
    x = x + topk_weight.sum(1, keepdim=True) * turned + probability_sum.sum()
    return cross_entropy(x @ head, targets)


# ---- In the interpreter ----


def interpreted() -> dict[str, object]:
    """Every kernel and every branch of one, small."""
    fp32, fp16 = torch.float32, torch.float16
    checks = {}
    for dtype in (fp32, fp16):
        checks |= {
            f"norm {dtype}": lambda dtype=dtype: (
                check_rms_norm(5, 136, dtype, num_sms=2),
                check_rms_norm(300, 24, dtype, residual=False, num_sms=3),
                check_rms_norm(3, 9, dtype, num_sms=100),
                check_rms_norm(2, 8200, dtype, num_sms=1),
                check_segments(dtype),
            ),
            f"rotary {dtype}": lambda dtype=dtype: (
                check_rotary(2, 5, 5, 24, dtype, num_sms=2),
                check_rotary(2, 70, 3, 192, dtype, interleaved=True, places=True, num_sms=3),
                check_rotary(1, 9, 8, 16, dtype, packed=True, inplace=True, num_sms=1),
                check_rotary(1, 3, 2, 6, dtype, interleaved=True, inplace=True),
            ),
            f"swiglu {dtype}": lambda dtype=dtype: (
                check_swiglu(5, 136, dtype, num_sms=2),
                check_swiglu(300, 24, dtype, num_sms=3),
                check_swiglu(7, 2048, dtype, num_sms=1),
                check_swiglu(9, 1536, dtype, num_sms=5, strange=True),
                check_swiglu(3, 1160, dtype, num_sms=100),
                check_swiglu(3, 9, dtype),
            ),
            f"cross-entropy {dtype}": lambda dtype=dtype: (
                check_cross_entropy(5, 1000, dtype, z_loss=1e-2, num_sms=2),
                check_cross_entropy(3, 37, dtype, reduction="none", num_sms=1),
                check_cross_entropy(3, 33001, dtype, inplace=True, z_loss=1e-2, scale=0.5),
                check_cross_entropy(
                    4, 8200, dtype, inplace=True, reduction="sum", z_loss=1e-2, num_sms=3
                ),
                check_cross_entropy(2, 40000, dtype, num_sms=100),
            ),
            f"router {dtype}": lambda dtype=dtype: (
                check_route(5, 8, 3, 2, dtype, num_sms=1),
                check_route(140, 136, 12, 3, dtype, renormalize=False, num_sms=3),
                check_route(
                    130, 72, 15, 4, dtype, sigmoid=True, groups=3, keep=2, num_sms=2
                ),
                check_route(
                    3, 40, 64, 5, dtype, sigmoid=True, groups=64, keep=7, renormalize=False
                ),
                check_route(3, 200, 300, 32, dtype, num_sms=5),
            ),
        }  # fmt: skip
    checks["router in parts"] = lambda: (
        check_route(9, 136, 20, 3, fp32, run=route_in_parts, num_sms=2),
        check_route(3, 40, 500, 3, fp32, run=route_in_parts, num_sms=2),
    )
    checks["out of range"] = lambda: (check_targets_out_of_range(), check_positions_out_of_range())
    checks["router ties"] = check_router_ties
    checks["swiglu far out"] = check_swiglu_far_out
    return checks


def check_targets_out_of_range(device="cpu") -> None:
    logits = torch.zeros(4, 16, device=device, requires_grad=True)
    targets = torch.tensor([3, 16, -100, -1], device=device)
    loss = cross_entropy(logits, targets, reduction="none")
    loss.sum().backward()
    want = torch.tensor([False, True, False, True])
    assert torch.equal(loss.isnan().cpu(), want) and loss[2] == 0
    assert torch.equal(logits.grad.isnan().all(dim=1).cpu(), want)
    assert torch.equal(logits.grad.isnan().any(dim=1).cpu(), want)


def check_positions_out_of_range(device="cpu") -> None:
    cos, sin = rotary_tables(4, 8, device=device)
    positions = torch.tensor([0, 4, 3, -1], device=device)
    y = rotary(torch.ones(4, 2, 8, device=device), cos, sin, positions=positions)
    want = torch.tensor([False, True, False, True])
    assert torch.equal(y.isnan().all(dim=(1, 2)).cpu(), want)
    assert torch.equal(y.isnan().any(dim=2).any(dim=1).cpu(), want)


def check_router_ties(device="cpu", dtype=torch.float32) -> None:
    """Equal scores: the lowest index wins."""
    x = torch.ones(3, 8, dtype=dtype, device=device)
    x[1] = 0
    x[2] = -x[2]
    weight = torch.ones(40, 8, device=device)
    idx = route(x, weight, None, topk=32)[0]
    assert torch.equal(idx.cpu(), torch.arange(32).int().expand(3, 32))
    weight[1::2] = -1
    bias = torch.zeros(40, device=device)
    idx = route(x, weight, bias, topk=4, n_groups=5, topk_groups=2)[0]
    assert idx.tolist() == [[0, 2, 4, 6], [0, 1, 2, 3], [1, 3, 5, 7]]


def main() -> None:
    for name, check in interpreted().items():
        check()
        print("ok", name, flush=True)


if __name__ == "__main__":
    main()
