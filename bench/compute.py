"""Times the grouped MLP's kernels beside `torch._grouped_mm` on one GPU.

    python3 -m bench compute [--json FILE] [--num-sms N ...] [--uneven] [--sweep [KERNEL ...]]

Variants are interleaved, a round each in another order, and medians compared: absolute times
drift, ratios hold. Inputs rotate through sets larger than L2. A delay in front of every round lets
the host queue it whole, so that device events see the kernels and not the launches. Several
`--num-sms` print the fair share of the first: speed(n) / (speed(first) * n / first). `--sweep`
compares what the tables in the code (tiles.py, grouped_hopper.py, grouped_wgrad_hopper.py) choose
from.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import triton

from dualpipe_ext.ops.grouped_mlp import mlp_forward
from dualpipe_ext.triton_kernels.experts import gemm_hopper as grouped_hopper
from dualpipe_ext.triton_kernels.experts import tiles
from dualpipe_ext.triton_kernels.experts import wgrad_hopper as grouped_wgrad_hopper
from dualpipe_ext.triton_kernels.experts.gemm import grouped_gemm
from dualpipe_ext.triton_kernels.experts.gemm_hopper import LONG_STEPS, SHORT_STEPS, HopperConfig
from dualpipe_ext.triton_kernels.experts.swiglu import grouped_gate_up, grouped_swiglu_backward
from dualpipe_ext.triton_kernels.experts.tiles import TileConfig, is_hopper
from dualpipe_ext.triton_kernels.experts.wgrad import grouped_wgrad
from dualpipe_ext.triton_kernels.experts.wgrad_hopper import WgradConfig

ROUNDS = 15
SETS = 2


@dataclass(frozen=True)
class Shape:
    """One MLP: L experts, about R rows, hidden H, expert width I."""

    L: int
    R: int
    H: int
    I: int  # noqa: E741
    uneven: bool = False

    def __str__(self):
        return f"E{self.L} T{self.R} H{self.H} I{self.I}" + (" uneven" if self.uneven else "")

    def counts(self) -> list[int]:
        """Rows of each expert: R / L, or that times U(0.3, 1.7) with one empty."""
        if not self.uneven:
            return [self.R // self.L] * self.L
        draw = random.Random(0)
        counts = [self.R / self.L * draw.uniform(0.3, 1.7) for _ in range(self.L)]
        counts[draw.randrange(self.L)] = 0
        return [round(count / 128) * 128 for count in counts]

    def flops(self, gemm: str) -> float:
        """Of one GEMM; `gate_up` and what belongs to it is twice `down`."""
        twice = 2 if gemm in ("gate_up", "drows", "dw13") else 1
        return 2 * sum(self.counts()) * self.H * self.I * twice


# Gate-up and down GEMMs of these three are the five (and a sixth) of the anchors:
# E64 T32768 K7168 N4096 and K2048 N7168; E16 T32768 K4096 N3072 and K1536 N4096; E32 T16384
# K2048 N1536 (and K768 N2048).
SHAPES = (
    Shape(64, 32768, 7168, 2048),
    Shape(16, 32768, 4096, 1536),
    Shape(32, 16384, 2048, 768),
)


class Problem:
    """Tensors of one MLP, and each step by our kernels and by `torch._grouped_mm`."""

    def __init__(self, shape: Shape, num_sms: int):
        L, H, I = shape.L, shape.H, shape.I  # noqa: E741
        counts = torch.tensor([0, *shape.counts()])
        R = int(counts.sum())
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*size, scale=1.0):
            values = torch.empty(size, dtype=torch.bfloat16, device="cuda")
            return values.normal_(std=scale, generator=generator)

        self.rows, self.dout = draw(R, H), draw(R, H)
        self.w13, self.w2 = draw(L, 2 * I, H, scale=H**-0.5), draw(L, H, I, scale=I**-0.5)
        self.row_weight = torch.rand(R, device="cuda", generator=generator)
        self.offsets = counts.cumsum(0).to("cuda", torch.int32)
        self.ends = self.offsets[1:].contiguous()
        self.act, self.gate_up, self.d_gate_up = draw(R, I), draw(R, 2 * I), draw(R, 2 * I)
        self.out, self.drows = torch.empty_like(self.rows), torch.empty_like(self.rows)
        self.dw13, self.dw2 = torch.empty_like(self.w13), torch.empty_like(self.w2)
        self.num_sms = num_sms

    def ours(self, gemm: str, **how):
        how.setdefault("num_sms", self.num_sms)
        w13, w2, offsets = self.w13, self.w2, self.offsets
        if gemm == "gate_up":
            saved = self.gate_up if how.pop("save", True) else None
            grouped_gate_up(self.rows, self.row_weight, w13, offsets, self.act, saved, **how)
            return self.act
        if gemm == "down":
            return grouped_gemm(self.act, w2, offsets, self.out, weight_is_nk=True, **how)
        if gemm == "d_gate_up":
            weight, into = self.row_weight, self.d_gate_up
            grouped_swiglu_backward(self.dout, w2, self.gate_up, weight, offsets, into, **how)
            return into
        if gemm == "drows":
            return grouped_gemm(self.d_gate_up, w13, offsets, self.drows, weight_is_nk=False, **how)
        y, x, dw = {
            "dw13": (self.d_gate_up, self.rows, self.dw13),
            "dw2": (self.dout, self.act, self.dw2),
        }[gemm]
        total = how.pop("total", None)
        if total is not None:
            return grouped_wgrad(y, x, offsets, total, accumulate=True, **how)
        return grouped_wgrad(y, x, offsets, dw, accumulate=False, **how)

    def torch(self, gemm: str):
        """The bare GEMM of the same size: no SwiGLU, no routing weight, nothing saved."""
        a, b = {
            "gate_up": (self.rows, self.w13.transpose(1, 2)),
            "down": (self.act, self.w2.transpose(1, 2)),
            "d_gate_up": (self.dout, self.w2),
            "drows": (self.d_gate_up, self.w13),
            "dw13": (self.d_gate_up.T, self.rows),
            "dw2": (self.dout.T, self.act),
        }[gemm]
        return torch._grouped_mm(a, b, offs=self.ends)

    def forward(self):
        tensors = (self.rows, self.row_weight, self.w13, self.w2, self.offsets)
        return mlp_forward(*tensors, num_sms=self.num_sms, implementation="triton")


GEMMS = ("gate_up", "down", "d_gate_up", "drows", "dw13", "dw2")
SWEEPS = (*GEMMS, "dw13_main_grad", "dw2_main_grad")
TOTALS = {"main_grad": torch.float32, "grad": torch.bfloat16}  # gradients so far, to add to


def interleaved_medians(variants: dict[str, Callable[[int], object]], rounds: int) -> dict:
    """Median microseconds of each variant, called with the number of the input set."""
    for variant in variants.values():
        for chosen in range(SETS):
            variant(chosen)
    torch.cuda.synchronize()
    times = {name: [] for name in variants}
    for i in range(rounds):
        torch.cuda._sleep(4_000_000 + 400_000 * len(variants))  # about 2 ms, and 200 us a variant
        events = []
        for name, variant in random.Random(i).sample(list(variants.items()), len(variants)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            variant(i % SETS)
            end.record()
            events.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in events:
            times[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def sample(result: torch.Tensor) -> torch.Tensor:
    """All of a matrix, four experts of a weight gradient: enough to compare, and it fits."""
    return result[:4] if result.dim() == 3 else result


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm())


def check(problem: Problem, gemm: str) -> float:
    """Relative difference between our result and one made of `torch._grouped_mm`."""
    got, want = sample(problem.ours(gemm)), sample(problem.torch(gemm))
    if gemm == "gate_up":
        gate, up = want.float().chunk(2, dim=1)
        want = torch.nn.functional.silu(gate) * up * problem.row_weight[:, None]
    if gemm == "d_gate_up":
        gate, up = (t.clone().requires_grad_() for t in problem.gate_up.float().chunk(2, dim=1))
        act = torch.nn.functional.silu(gate) * up * problem.row_weight[:, None]
        want = torch.cat(torch.autograd.grad(act, (gate, up), want.float()), dim=1)
    return relative_error(got, want)


def alternatives(gemm: str, uneven: bool) -> dict[str, dict]:
    """What else than the default a Hopper GPU has, as keyword arguments by name."""
    if not is_hopper(torch.device("cuda", 0)):
        return {}
    if gemm in ("dw13", "dw2"):
        return {} if uneven else {"ours, Triton": {"config": tiles.WGRAD}}
    found = {"ours, take over": {"take_over": True}}
    if not uneven:
        plain = {"d_gate_up": tiles.SWIGLU_BACKWARD, "gate_up": tiles.GATE_UP}
        found["ours, Triton"] = {"config": plain.get(gemm, tiles.GEMM)}
        found["ours, long steps"] = {"config": LONG_STEPS}
        found["ours, short steps"] = {"config": SHORT_STEPS}
    return found


def measure(shape: Shape, num_sms: list[int], rounds: int) -> list[dict]:
    """A row for each GEMM and variant; those on num_sms[1:] with the fair share of num_sms[0]."""
    sets = [Problem(shape, num_sms[0]) for _ in range(SETS)]
    rows = []
    for gemm in GEMMS:
        error = check(sets[0], gemm)
        variants = {
            "ours": lambda i, gemm=gemm: sets[i].ours(gemm),
            "torch": lambda i, gemm=gemm: sets[i].torch(gemm),
        }
        options = {f"ours, {n} SMs": {"num_sms": n} for n in num_sms[1:]} or alternatives(
            gemm, shape.uneven
        )
        for name, how in options.items():
            variants[name] = lambda i, g=gemm, how=how: sets[i].ours(g, **how)
        if gemm in ("dw13", "dw2"):
            for name, dtype in TOTALS.items():
                # One for all sets: in fp32 it takes 7.5 GB for the largest weight.
                total = torch.zeros_like(getattr(sets[0], gemm), dtype=dtype)
                variants[f"ours, {name}"] = lambda i, g=gemm, t=total: sets[i].ours(g, total=t)
                # The peer that does the same work: its gradient in bf16, and a pass to add it.
                variants[f"torch, {name}"] = lambda i, g=gemm, t=total: t.add_(sets[i].torch(g))
        if gemm == "gate_up":
            variants["ours, inference"] = lambda i, g=gemm: sets[i].ours(g, save=False)
        medians = interleaved_medians(variants, rounds)
        rows += [
            row(shape, gemm, name, us, medians["torch"], shape.flops(gemm), error)
            for name, us in medians.items()
            if not name.startswith("torch")
        ]
        for r in rows[-len(medians) :]:
            peer = r["variant"].replace("ours", "torch")
            if r["gemm"] == gemm and peer != "torch" and peer in medians:
                r["ratio_to_torch_and_add"] = round(medians[peer] / r["us"], 3)
            n = options.get(r["variant"], {}).get("num_sms")
            if n and r["gemm"] == gemm:
                r["fair_share"] = round(medians["ours"] * num_sms[0] / r["us"] / n, 3)
    rows.append(measure_forward(shape, sets, rounds))
    return rows


def measure_forward(shape: Shape, sets: list[Problem], rounds: int) -> dict:
    """Whole forward beside the two bare GEMMs of torch, with the host's time to launch it."""
    variants = {
        "ours": lambda i: sets[i].forward(),
        "torch": lambda i: (sets[i].torch("gate_up"), sets[i].torch("down")),
    }
    medians = interleaved_medians(variants, rounds)
    host = []
    for i in range(10):
        begin = time.perf_counter()
        sets[i % SETS].forward()
        host.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    flops = shape.flops("gate_up") + shape.flops("down")
    result = row(shape, "forward", "ours", medians["ours"], medians["torch"], flops, 0.0)
    return result | {"host_us": statistics.median(host)}


def row(shape, gemm, variant, us, torch_us, flops, error) -> dict:
    return {
        "shape": str(shape),
        "gemm": gemm,
        "variant": variant,
        "us": round(us, 1),
        "tflops": round(flops / us / 1e6, 1),
        "torch_us": round(torch_us, 1),
        "torch_tflops": round(flops / torch_us / 1e6, 1),
        "ratio": round(torch_us / us, 3),
        "error": error,
    }


# ---- Sweep ----


def candidates(kernel: str) -> list[dict]:
    """Keyword arguments to try, the default first. All compile for sm_90 without spills."""
    if kernel.endswith("main_grad"):
        found = main_grad_candidates()
    elif not is_hopper(torch.device("cuda", 0)):
        found = triton_candidates(kernel)
    elif kernel in ("dw13", "dw2"):
        found = [*triton_candidates(kernel), grouped_wgrad_hopper.BF16]
    else:
        steps = (LONG_STEPS, SHORT_STEPS)
        found = [replace(config, group_m=m) for m in (16, 8, 4, 32) for config in steps]
    return [{"config": config} for config in found]


def triton_candidates(kernel: str) -> list[TileConfig]:
    base = {
        "gate_up": tiles.GATE_UP,
        "down": tiles.GEMM,
        "drows": tiles.GEMM,
        "d_gate_up": tiles.SWIGLU_BACKWARD,
        "dw13": tiles.WGRAD,
        "dw2": tiles.WGRAD,
    }[kernel]
    changes = [
        {},
        {"group_m": 4},
        {"group_m": 8},
        {"group_m": 32},
        {"flatten": False},
        {"stages": 3, "split": 1},
        {"stages": 2, "split": 2, "block_k": 128},
    ]
    if kernel == "gate_up":
        changes += [{"stages": 4, "split": 1}, {"split": 4}]
    elif kernel == "d_gate_up":
        narrow = {"block_n": 128, "stages": 5, "split": 2}
        changes = [c for c in changes if "stages" not in c]
        changes += [narrow, narrow | {"flatten": False}]
    else:
        changes += [{"split": 4}, {"block_n": 128, "stages": 5, "split": 1}]
    if kernel in ("dw13", "dw2"):
        changes = [c for c in changes if "group_m" not in c and "flatten" not in c]
    return [replace(base, **change) for change in changes]


def main_grad_candidates() -> list[WgradConfig]:
    shapes = (
        {},
        {"stages": 3, "buffers": 4},
        {"stages": 3, "strip": 64},
        {"block_k": 32, "buffers": 8},
        {"block_k": 32, "stages": 6, "buffers": 4},
    )
    base = grouped_wgrad_hopper.MAIN_GRAD
    return [replace(base, prefetch=p, **shape) for shape in shapes for p in (False, True)]


def describe(config: TileConfig | HopperConfig | WgradConfig) -> str:
    return " ".join(f"{name} {value}" for name, value in asdict(config).items())


def sweep(kernels: list[str], num_sms: int, rounds: int) -> list[dict]:
    results = []
    for shape in SHAPES:
        sets = [Problem(shape, num_sms) for _ in range(SETS)]
        for kernel in kernels:
            results += sweep_kernel(shape, kernel, sets, rounds)
    return results


def sweep_kernel(shape: Shape, kernel: str, sets: list[Problem], rounds: int) -> list[dict]:
    """All candidates of one kernel on one shape, the fastest first."""
    gemm = kernel.removesuffix("_main_grad")
    expected = sample(sets[0].ours(gemm)).clone()
    variants = {"torch": lambda i: sets[i].torch(gemm)}
    shared = {}
    if gemm != kernel:
        main_grad = torch.zeros_like(getattr(sets[0], gemm), dtype=torch.float32)
        shared["total"] = main_grad
        variants["torch and add_"] = lambda i: main_grad.add_(sets[i].torch(gemm))
    for how in candidates(kernel):
        name = describe(how["config"])
        try:
            if shared:
                main_grad.zero_()
            error = relative_error(sample(sets[0].ours(gemm, **shared, **how)), expected)
        except triton.runtime.errors.OutOfResources as reason:
            print(f"{shape} {kernel} {name}: {reason}")
            continue
        if not error < 1e-2:
            print(f"{shape} {kernel} {name}: WRONG, relative error {error:.1e}; left out")
            continue
        variants[name] = lambda i, how=how: sets[i].ours(gemm, **shared, **how)
    medians = interleaved_medians(variants, rounds)
    torch_us = medians.pop("torch")
    rows = [
        row(shape, kernel, name, us, torch_us, shape.flops(gemm), 0.0)
        for name, us in medians.items()
    ]
    return sorted(rows, key=lambda r: r["us"])


# ---- Report ----


def environment(num_sms: int) -> dict:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "sms": properties.multi_processor_count,
        "num_sms": num_sms,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", sys.argv[0], *map(os.path.basename, sys.argv[1:])]),
    }


def print_table(rows: list[dict]) -> None:
    names = max(len(r["variant"]) for r in rows)
    print(
        f"\n{'shape':33} {'gemm':14} {'variant':{names}} {'us':>8} {'TFLOPS':>7} {'torch':>7} ratio"
    )
    for r in rows:
        numbers = f"{r['us']:8.1f} {r['tflops']:7.1f} {r['torch_tflops']:7.1f} {r['ratio']:5.2f}"
        extra = f"  host {r['host_us']:.0f} us" if "host_us" in r else ""
        if "ratio_to_torch_and_add" in r:
            extra += f"  {r['ratio_to_torch_and_add']:.2f} of torch and add_"
        if "fair_share" in r:
            extra += f"  fair share {r['fair_share']:.2f}"
        if r["error"]:
            extra += f"  error {r['error']:.1e}"
        print(f"{r['shape']:33} {r['gemm']:14} {r['variant']:{names}} {numbers}{extra}")


def print_means(rows: list[dict]) -> None:
    """Geometric means over shapes and GEMMs of the ratio to torch, and of fair shares."""
    groups = {
        "forward": ("gate_up", "down"),
        "backward for inputs": ("d_gate_up", "drows"),
        "backward for weights": ("dw13", "dw2"),
    }
    print("\ngeometric means")
    for group, gemms in groups.items():
        variants = dict.fromkeys(r["variant"] for r in rows if r["gemm"] in gemms)
        for variant in variants:
            chosen = [r for r in rows if r["gemm"] in gemms and r["variant"] == variant]
            mean = statistics.geometric_mean(r["ratio"] for r in chosen)
            text = f"{group:22} {variant:26} {mean:.3f} of torch"
            if {r["gemm"] for r in chosen} == set(gemms):
                text += f", both GEMMs as one {whole_passes(chosen):.3f}"
            if "fair_share" in chosen[0]:
                mean = statistics.geometric_mean(r["fair_share"] for r in chosen)
                text += f", {mean:.3f} of the fair share"
            print(text)


def whole_passes(rows: list[dict]) -> float:
    """Speed over torch's of a shape's GEMMs one after the other, the geometric mean of shapes."""
    shapes = dict.fromkeys(r["shape"] for r in rows)
    sums = ([[r[k] for r in rows if r["shape"] == s] for k in ("torch_us", "us")] for s in shapes)
    return statistics.geometric_mean(sum(torch_us) / sum(us) for torch_us, us in sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument(
        "--num-sms", type=int, nargs="+", help="SMs our kernels take (default: all)"
    )
    parser.add_argument(
        "--uneven", action="store_true", help="rows an expert times U(0.3, 1.7), one expert empty"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--sweep", nargs="*", choices=SWEEPS, help="compare tile configurations of these kernels"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark times GPU kernels")
    num_sms = arguments.num_sms or [torch.cuda.get_device_properties(0).multi_processor_count]

    if arguments.sweep is None:
        shapes = [replace(shape, uneven=arguments.uneven) for shape in SHAPES]
        rows = [r for shape in shapes for r in measure(shape, num_sms, arguments.rounds)]
    else:
        rows = sweep(arguments.sweep or list(SWEEPS), num_sms[0], arguments.rounds)
    facts = environment(num_sms[0])
    if arguments.json:
        configs = {
            name: asdict(value)
            for module in (tiles, grouped_hopper, grouped_wgrad_hopper)
            for name, value in vars(module).items()
            if isinstance(value, TileConfig | HopperConfig | WgradConfig)
        }
        with open(arguments.json, "w") as file:
            json.dump({"environment": facts, "configs": configs, "results": rows}, file, indent=1)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print_table(rows)
    if arguments.sweep is None:
        print_means(rows)


if __name__ == "__main__":
    main()
