"""Times router, norm, rotary embedding, SwiGLU and cross-entropy beside a copy on one GPU.

    python3 -m bench block_ops [--json FILE] [--num-sms N] [--tokens T] [--hidden H] [--sweep]

The copy is torch's, of [T, H] bf16, in the same interleaved rounds: `ratio` is a kernel's GB/s to
the copy's. Bytes are those that must move: every input read once, every result written once; what a
kernel reads again or keeps for itself does not count. An operator is timed whole, with the small
launches around its kernel. `--sweep` tries other tile shapes; the best go into the tables of
`triton_kernels/`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from compute import ROUNDS, SETS, environment, interleaved_medians

import dualpipe_ext.ops.cross_entropy  # registers its operators
import dualpipe_ext.ops.norm
import dualpipe_ext.ops.route
import dualpipe_ext.ops.swiglu  # noqa: F401, likewise
from dualpipe_ext.moe.router import Router
from dualpipe_ext.ops.rotary import rotary_tables
from dualpipe_ext.triton_kernels.elementwise import (
    cross_entropy,
    cross_entropy_hopper,
    norm,
    rotary,
    swiglu,
)
from dualpipe_ext.triton_kernels.routing import backward_hopper as router_backward_hopper
from dualpipe_ext.triton_kernels.routing import logits_hopper as router_hopper

ops = torch.ops.dualpipe_ext


@dataclass(frozen=True)
class Timed:
    """`run` of an input set moves `bytes`, and multiplies `flops`, counted once in fp32."""

    run: Callable[[int], object]
    bytes: int
    flops: int = 0


class Inputs:
    """SETS times the tensors that the kernels share, larger together than L2."""

    def __init__(self, T: int, H: int):
        self.T, self.H = T, H
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*shape, dtype=torch.bfloat16):
            values = torch.empty(SETS, *shape, dtype=dtype, device="cuda")
            return values.normal_(generator=generator)

        self.draw = draw
        self.x, self.y, self.dy = (draw(T, H) for _ in range(3))
        self.weight = torch.ones(H, device="cuda")
        self.row = T * H * 2


def norms(inputs: Inputs, num_sms: int) -> dict[str, Timed]:
    x, y, dy, weight = inputs.x, inputs.y, inputs.dy, inputs.weight
    rstd = torch.ones(inputs.T, device="cuda")
    return {
        "copy": Timed(lambda i: y[i].copy_(x[i]), 2 * inputs.row),
        "rms_norm": Timed(
            lambda i: ops.rms_norm(x[i], dy[i], weight, 1e-6, num_sms), 4 * inputs.row
        ),
        "rms_norm_backward": Timed(
            lambda i: ops.rms_norm_backward(dy[i], y[i], x[i], weight, rstd, num_sms),
            4 * inputs.row,
        ),
    }


def rotaries(inputs: Inputs, num_sms: int) -> dict[str, Timed]:
    T, D = inputs.T, 128
    heads = inputs.x[..., : inputs.H // D * D].unflatten(-1, (-1, D)).unsqueeze(1)
    cos, sin = rotary_tables(T, D, device="cuda")
    timed = {}
    for interleaved in (False, True):
        how = (None, interleaved, False, num_sms)
        name = "rotary, interleaved" if interleaved else "rotary"
        moved = 2 * heads[0].numel() * 2
        timed[name] = Timed(lambda i, how=how: ops.rotary(heads[i], cos, sin, *how), moved)
        timed[f"{name}, in place"] = Timed(
            lambda i, how=how: ops.rotary_(heads[i], cos, sin, *how), moved
        )
    return timed


def activations(inputs: Inputs, num_sms: int) -> dict[str, Timed]:
    gate_up, dy = inputs.draw(inputs.T, 2 * inputs.H), inputs.dy
    return {
        "swiglu": Timed(lambda i: ops.swiglu(gate_up[i], num_sms), 3 * inputs.row),
        "swiglu_backward": Timed(
            lambda i: ops.swiglu_backward(dy[i], gate_up[i], num_sms), 5 * inputs.row
        ),
    }


def losses(inputs: Inputs, num_sms: int) -> dict[str, Timed]:
    timed = {}
    for V, T in ((32768, inputs.T), (129280, inputs.T // 4)):
        logits = inputs.draw(T, V)
        targets = torch.randint(V, (T,), device="cuda")
        factor, d_loss = torch.full((1,), 1 / T, device="cuda"), torch.ones(T, device="cuda")
        lse, how, moved = d_loss * 11, (-100, 0.0, num_sms), T * V * 2
        timed |= {
            f"cross_entropy V{V} T{T}": Timed(
                lambda i, x=logits, t=targets, how=how: ops.cross_entropy(x[i], t, *how), moved
            ),
            f"cross_entropy_backward V{V} T{T}": Timed(
                lambda i, x=logits, t=targets, how=how, d=d_loss, lse=lse: (
                    ops.cross_entropy_backward(d, x[i], t, lse, *how)
                ),
                2 * moved,
            ),
            f"cross_entropy, in place V{V} T{T}": Timed(
                lambda i, x=logits, t=targets, how=how, f=factor: ops.cross_entropy_(
                    x[i], t, f, *how
                ),
                2 * moved,
            ),
        }
    return timed


def routers(inputs: Inputs, num_sms: int) -> dict[str, Timed]:
    x, T, H, K = inputs.x, inputs.T, inputs.H, 8
    timed = {}
    for E, groups, keep in ((64, 1, 1), (128, 1, 1), (256, 8, 4)):
        weight = inputs.draw(E, H, dtype=torch.float32)[0] * H**-0.5
        bias = torch.zeros(E, device="cuda") if groups > 1 else None
        how = (True, groups, keep, 2.5, num_sms)
        _, d_sum, idx, _, logits = ops.route(x[0], weight, bias, K, *how)
        d_weight, table = torch.rand(T, K, device="cuda"), T * (E + 2 * K) * 4
        plain = Router(
            H,
            E,
            K,
            kind="softmax" if bias is None else "sigmoid",
            n_groups=groups,
            topk_groups=keep,
            implementation="torch",
            device="cuda",
        ).requires_grad_(False)
        back = (bias is None, True, groups, 2.5, num_sms)
        timed[f"route E{E}, plain torch"] = Timed(
            lambda i, plain=plain: plain(x[i]), inputs.row + E * H * 4 + table, 2 * T * H * E
        )
        for suffix, w in (("", weight), (", weight bf16", weight.bfloat16())):
            size = w.numel() * w.element_size()
            timed |= {
                f"route E{E}{suffix}": Timed(
                    lambda i, w=w, b=bias, how=how: ops.route(x[i], w, b, K, *how),
                    inputs.row + size + table,
                    2 * T * H * E,
                ),
                f"route_backward E{E}{suffix}": Timed(
                    lambda i, w=w, d=d_weight, s=d_sum, z=logits, idx=idx, back=back: (
                        ops.route_backward(d, s, x[i], w, z, idx, *back)
                    ),
                    2 * inputs.row + size + E * H * 4 + table,
                    4 * T * H * E,
                ),
            }
    return timed


KINDS = {"norm": norms, "rotary": rotaries, "swiglu": activations}
KINDS |= {"cross_entropy": losses, "router": routers}


def measure(timed: dict[str, Timed], copy: Timed, rounds: int) -> list[dict]:
    runs = {name: one.run for name, one in timed.items()}
    medians = interleaved_medians(runs | {"copy": copy.run}, rounds)
    copied = copy.bytes / medians["copy"] / 1e3
    return [
        {
            "kernel": name,
            "us": round(us, 1),
            "gbps": round(timed[name].bytes / us / 1e3, 1),
            "copy_gbps": round(copied, 1),
            "ratio": round(timed[name].bytes / us / 1e3 / copied, 3),
            "tflops": round(timed[name].flops / us / 1e6, 1),
        }
        for name, us in medians.items()
        if name in timed
    ]


# ---- Sweep ----


def changes() -> dict[str, list[tuple[object, dict]]]:
    """What to try by kind: names of a module, or entries of a table, and their values."""
    there, back = router_hopper.CONFIGS, router_backward_hopper.CONFIGS
    backward = back[64]
    return {
        "norm": [
            (norm, dict(MAX_STAGES=3)),
            (norm, dict(MAX_STAGES=5, SHARED=200 * 1024)),
            (norm, dict(SEGMENTS=132)),
        ],
        "rotary": [
            (rotary, dict(VECTORS=4)),
            (rotary, dict(VECTORS=4, WARPS=16)),
        ],
        "swiglu": [
            (swiglu, dict(STAGES=1)),
            (swiglu, dict(STAGES=3)),
            (swiglu, dict(COLUMNS=(256,))),
            (swiglu, dict(WARPS=16, TILE=8 * 1024)),
        ],
        "cross_entropy": [
            (cross_entropy, dict(LANES=1024, VECTORS=4)),
            (cross_entropy, dict(ROW=0)),
            (cross_entropy, dict(MAX_STAGES=3)),
            (cross_entropy, dict(KEEP=False)),
            (cross_entropy_hopper, dict(VECTORS=4)),
            (cross_entropy_hopper, dict(WARPS=32, VECTORS=4)),
            (cross_entropy_hopper, dict(WARPS=8)),
        ],
        "router": [
            (there, {64: replace(there[64], stages=4)}),
            (there, {128: replace(there[128], stages=3)}),
            (there, {128: replace(there[128], early=False)}),
            (there, {256: replace(there[256], stages=2)}),
            (back, {64: replace(backward, stages=3)}),
            (back, {64: replace(backward, stages=5)}),
            (back, {64: replace(backward, dx_stages=1)}),
        ],
    }


@contextlib.contextmanager
def changed(where, values: dict):
    table = where if isinstance(where, dict) else vars(where)
    before = {name: table[name] for name in values}
    table.update(values)
    try:
        yield
    finally:
        table.update(before)


def sweep(kinds: list[str], inputs: Inputs, num_sms: int, copy: Timed, rounds: int) -> list[dict]:
    results = []
    for kind in kinds:
        for where, values in [(norm, {}), *changes()[kind]]:
            name = ", ".join(f"{key}: {value}" for key, value in values.items()) or "as it is"
            with changed(where, values):
                try:
                    rows = measure(KINDS[kind](inputs, num_sms), copy, rounds)
                except Exception as reason:  # too much shared memory: not a candidate here
                    print(f"{kind}, {name}: {type(reason).__name__}: {str(reason)[:200]}")
                    continue
            results += [row | {"change": name} for row in rows]
            torch.cuda.empty_cache()
    return results


# ---- Report ----


def print_table(rows: list[dict]) -> None:
    print(f"\n{'kernel':40} {'us':>8} {'GB/s':>8} {'copy':>8} {'ratio':>6} {'TFLOPS':>7}")
    for row in rows:
        numbers = f"{row['us']:8.1f} {row['gbps']:8.1f} {row['copy_gbps']:8.1f} {row['ratio']:6.3f}"
        flops = f" {row['tflops']:7.1f}" if row["tflops"] else ""
        print(f"{row['kernel']:40} {numbers}{flops}  {row.get('change', '')}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--num-sms", type=int, help="SMs the kernels take (default: all)")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sweep", action="store_true", help="compare tile shapes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark times GPU kernels")
    num_sms = arguments.num_sms or torch.cuda.get_device_properties(0).multi_processor_count

    inputs = Inputs(arguments.tokens, arguments.hidden)
    copy = norms(inputs, num_sms)["copy"]
    if arguments.sweep:
        rows = sweep(arguments.kinds, inputs, num_sms, copy, arguments.rounds)
    else:
        rows = []
        for kind in arguments.kinds:
            rows += measure(KINDS[kind](inputs, num_sms), copy, arguments.rounds)
            torch.cuda.empty_cache()
    rows = [row for row in rows if row["kernel"] != "copy"]
    facts = environment(num_sms) | {"tokens": inputs.T, "hidden": inputs.H}
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"environment": facts, "results": rows}, file, indent=1)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print_table(rows)


if __name__ == "__main__":
    main()
