"""Times attention forward and backward beside cuDNN and FlashAttention-2 (torch's) on one GPU.

    python3 -m bench attention [--json FILE] [--num-sms N ...] [--shapes all] [--sweep [PASS ...]]

Every round runs all variants, each time in another order, and medians are compared: absolute times
drift, and clocks depend on how much power the variant before drew. Inputs rotate through sets
larger than L2. FLOPs are those of the products that a query needs: 4 (D + V) / 2 a score forward,
2.5 times that backward (the deterministic one does more and is not credited with it); causal counts
half of the scores. "fair" is a capped variant's speed over its share of the uncapped one's:
speed(n) / (speed(all) · n / all).
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
import triton
from compute import SETS, environment, interleaved_medians, relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel

from dualpipe_ext.ops.attention import flash_attention
from dualpipe_ext.triton_kernels.attention import backward as backward_file
from dualpipe_ext.triton_kernels.attention import backward_query as query_file
from dualpipe_ext.triton_kernels.attention import forward as forward_file

ROUNDS = 21


@dataclass(frozen=True)
class Shape:
    """B sequences of S positions, N query and G key heads, D for q and k, V for v."""

    B: int
    N: int
    G: int
    S: int
    D: int
    V: int
    causal: bool = True

    def __str__(self):
        widths = f"D{self.D}" + (f"/{self.V}" if self.V != self.D else "")
        heads = f"H{self.N}" + (f"/{self.G}" if self.G != self.N else "")
        kind = "causal" if self.causal else "full"
        return f"B{self.B} {heads} S{self.S} {widths} {kind}"

    def flops(self, direction: str) -> float:
        scores = self.B * self.N * self.S * self.S / (2 if self.causal else 1)
        forward = 2 * (self.D + self.V) * scores
        # s and dq and dk have D, dp and dv have V.
        return forward if direction == "forward" else 2 * (3 * self.D + 2 * self.V) * scores


# The first two are the anchors'.
SHAPES = (Shape(4, 32, 32, 4096, 128, 128), Shape(1, 32, 32, 16384, 128, 128))
ALL_SHAPES = (
    *SHAPES,
    Shape(4, 32, 32, 4096, 128, 128, causal=False),
    Shape(4, 32, 8, 4096, 128, 128),
    Shape(4, 32, 32, 4096, 64, 64),
    Shape(2, 32, 32, 4096, 192, 128),
)
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


class Problem:
    """Tensors of one attention; every variant's graph is kept, so that its backward runs alone."""

    def __init__(self, shape: Shape):
        def draw(heads, width):
            x = torch.randn(shape.B, shape.S, heads, width, device="cuda", dtype=torch.bfloat16)
            return x.transpose(1, 2)

        self.shape = shape
        self.inputs = [draw(shape.N, shape.D), draw(shape.G, shape.D), draw(shape.G, shape.V)]
        self.inputs = [x.requires_grad_() for x in self.inputs]
        self.d_out = draw(shape.N, shape.V)
        self.outs: dict[str, torch.Tensor] = {}

    def forward(self, variant: str, **how) -> torch.Tensor:
        q, k, v = self.inputs
        if variant in PEERS:
            gqa = self.shape.N != self.shape.G
            with sdpa_kernel(PEERS[variant]):
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=self.shape.causal, enable_gqa=gqa
                )
        else:
            how |= dict(causal=self.shape.causal, implementation="triton")
            out = flash_attention(q, k, v, **how)
        self.outs[variant] = out
        return out

    def backward(self, variant: str) -> tuple[torch.Tensor, ...]:
        out = self.outs[variant]
        return torch.autograd.grad(out, self.inputs, self.d_out, retain_graph=True)


def row(shape, direction, variant, us, medians, error, cap=None) -> dict:
    """A result; `medians` of the pass by name, `cap` the SMs of a capped variant."""
    flops = shape.flops(direction)
    result = {
        "shape": str(shape),
        "pass": direction,
        "variant": variant,
        "us": round(us, 1),
        "tflops": round(flops / us / 1e6, 1),
        "error": error,
    }
    for peer in PEERS:
        if peer in medians:
            result[f"over_{peer}"] = round(medians[peer] / us, 3)
    if cap:
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        result["fair"] = round(medians["ours"] / us * sms / cap, 3)
    return result


def measure(shape: Shape, caps: list[int], rounds: int) -> list[dict]:
    sets = [Problem(shape) for _ in range(SETS)]
    ours = {"ours": {}, "ours, deterministic": dict(deterministic=True)}
    ours |= {f"ours, {n} SMs": dict(num_sms=n) for n in caps}
    names, errors = [], {}
    for name in [*PEERS, *ours]:
        try:
            for problem in sets:
                problem.forward(name, **ours.get(name, {}))
            sets[0].backward(name)
            names.append(name)
        except RuntimeError as reason:
            if name not in PEERS:
                raise
            print(f"{shape} {name}: {str(reason).splitlines()[0]}")
    judge = names[0]
    want = [sets[0].outs[judge].detach(), *sets[0].backward(judge)]
    for name in names:
        got = [sets[0].outs[name].detach(), *sets[0].backward(name)]
        pairs = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
        errors["forward", name], errors["backward", name] = pairs[0], max(pairs[1:])
    rows = []
    for direction in ("forward", "backward"):
        if direction == "forward":
            variants = {
                n: lambda i, n=n: sets[i].forward(n, **ours.get(n, {}))
                for n in names
                if "deterministic" not in n
            }
        else:
            variants = {n: lambda i, n=n: sets[i].backward(n) for n in names}
        medians = interleaved_medians(variants, rounds)
        rows += [
            row(
                *(shape, direction, f"{direction}: {name}", us, medians, errors[direction, name]),
                cap=ours.get(name, {}).get("num_sms"),
            )
            for name, us in medians.items()
        ]
    return rows


# ---- Sweep ----


def candidates(direction: str, shape: Shape) -> list[object]:
    """Configurations to try, the default first."""
    widths = (shape.D, shape.V)
    if direction == "forward":
        base = forward_file.FORWARD[widths]
        changes = [{}, {"block": 64, "stages": 3}]
        if base.q_stages > 1:
            changes += [{"q_stages": 1}]
        if shape.D == 64:
            changes += [{"stages": 4}, {"block": 256}]
        changes = [{**c, "take_turns": turns} for c in changes for turns in (False, True)]
    elif direction == "backward":
        base = backward_file.BACKWARD[widths]
        changes = [{}, {"loader": 40}, {"loader": 24}, {"stages": 3}, {"fused": False}]
        changes += [{"block": 32, "stages": 4, "fused": False}]
        if base.fused:
            changes += [{"ds_stages": 1}, {"ds_stages": 2}, {"ds_stages": 1, "loader": 24}]
        if shape.D == 64:
            changes += [{"block": 128, "loader": 24}]
    else:
        base = query_file.QUERY[widths]
        sizes = [(64, 2), (64, 3), (128, 1), (128, 2)]
        if shape.D == 64:
            sizes += [(64, 4), (128, 3)]
        changes = [{}, *({"block": block, "stages": stages} for block, stages in sizes)]
    found = [replace(base, **change) for change in changes]
    return list(dict.fromkeys(found))


TABLES = {
    "forward": forward_file.FORWARD,
    "backward": backward_file.BACKWARD,
    "dq": query_file.QUERY,
}


def sweep(directions: list[str], shapes, rounds: int) -> list[dict]:
    """All candidates, the fastest first; "backward" and "dq" by the whole backward."""
    results = []
    for shape in shapes:
        sets = [Problem(shape) for _ in range(SETS)]
        widths = (shape.D, shape.V)
        for direction in directions:
            table, default = TABLES[direction], TABLES[direction][widths]
            whole = "forward" if direction == "forward" else "backward"

            def use(config, i, table=table, direction=direction, widths=widths, sets=sets):
                table[widths] = config
                if direction == "forward":
                    return [sets[i].forward("ours")]
                return sets[i].backward("ours")

            for problem in sets:
                problem.forward("ours", deterministic=direction == "dq")
            want = [x.detach().clone() for x in use(default, 0)]
            variants = {}
            for config in candidates(direction, shape):
                name = ", ".join(f"{k} {v}" for k, v in asdict(config).items())
                try:
                    got = use(config, 0)
                    torch.cuda.synchronize()
                except triton.runtime.errors.OutOfResources as reason:
                    print(f"{shape} {direction} {name}: {reason}")
                    continue
                error = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
                if not error < 1e-2:
                    print(f"{shape} {direction} {name}: WRONG, relative error {error:.1e}")
                    continue
                variants[f"{direction}: {name}"] = lambda i, c=config: use(c, i)
            medians = interleaved_medians(variants, rounds)
            table[widths] = default
            rows = [row(shape, whole, name, us, {}, 0.0) for name, us in medians.items()]
            results += sorted(rows, key=lambda r: r["us"])
    return results


# ---- Report ----


def print_table(rows: list[dict]) -> None:
    names = max(len(r["variant"]) for r in rows)
    keys = {"over_cudnn": "÷cudnn", "over_fa2": "÷fa2", "fair": "fair"}
    keys = {key: title for key, title in keys.items() if any(key in r for r in rows)}
    titles = "".join(f"{title:>8}" for title in keys.values())
    print(f"\n{'shape':28} {'variant':{names}} {'us':>9} {'TFLOPS':>7}{titles}")
    for r in rows:
        ratios = "".join(f"{r[key]:8.3f}" if key in r else " " * 8 for key in keys)
        error = f"  error {r['error']:.1e}" if r["error"] else ""
        numbers = f"{r['us']:9.1f} {r['tflops']:7.1f}{ratios}{error}"
        print(f"{r['shape']:28} {r['variant']:{names}} {numbers}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--num-sms", type=int, nargs="*", default=[], help="caps to time besides")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--shapes", nargs="*", metavar="TEXT", help="all, or those whose name has one of the texts"
    )
    parser.add_argument(
        "--sweep", nargs="*", choices=list(TABLES), help="compare configurations of these kernels"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark times GPU kernels")
    shapes = SHAPES
    if arguments.shapes:
        texts = arguments.shapes
        shapes = [s for s in ALL_SHAPES if "all" in texts or any(t in str(s) for t in texts)]
    if arguments.sweep is None:
        rows = [r for s in shapes for r in measure(s, arguments.num_sms, arguments.rounds)]
    else:
        rows = sweep(arguments.sweep or list(TABLES), shapes, arguments.rounds)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    facts = environment(sms) | {"cudnn": torch.backends.cudnn.version()}
    if arguments.json:
        configs = {
            name: {f"{D}/{V}": asdict(config) for (D, V), config in table.items()}
            for name, table in TABLES.items()
        }
        with open(arguments.json, "w") as file:
            json.dump({"environment": facts, "configs": configs, "results": rows}, file, indent=1)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print_table(rows)


if __name__ == "__main__":
    main()
