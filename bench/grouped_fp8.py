"""Times the fp8 GEMM beside our bf16 one and torch's on one Hopper GPU, and its quantising kernels.

    python3 bench/grouped_fp8.py [--json FILE] [--num-sms N] [--rounds N] [--sweep]

The four GEMMs of an MLP's forward and backward for inputs, as in bench/compute.py, whose way of
timing this is. "torch fp8" is `torch._scaled_grouped_mm`, which has one scale a row and one a
column: less work than ours. Quantising is timed apart: rows before every GEMM, weights once a step.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace

import torch
from compute import (
    ROUNDS,
    SETS,
    SHAPES,
    Problem,
    Shape,
    environment,
    interleaved_medians,
    relative_error,
    sample,
)

from dualpipe_ext.triton_kernels.grouped_fp8 import FP8_GEMM, Fp8Config, grouped_fp8_gemm
from dualpipe_ext.triton_kernels.grouped_gemm import grouped_gemm
from dualpipe_ext.triton_kernels.quantize import quantize_rows, quantize_weights

GEMMS = ("gate_up", "down", "d_gate_up", "drows")
TURNS = ("free", "issue", "run")
LIMIT = 4e-2  # of the difference to bf16: three bits of mantissa on both sides make 3.7e-2


class Fp8Problem:
    """The four GEMMs of one MLP, in bf16 and fp8, with outputs of their own."""

    def __init__(self, shape: Shape, num_sms: int):
        self.bf16 = bf16 = Problem(shape, num_sms)
        self.num_sms = num_sms
        # Nobody needs what only other GEMMs read or write.
        for name in ("drows", "dw13", "dw2", "gate_up"):
            setattr(bf16, name, None)
        self.w13, self.w2 = quantize_weights(bf16.w13), quantize_weights(bf16.w2)
        self.rows = {
            "gate_up": bf16.rows,
            "down": bf16.act,
            "d_gate_up": bf16.dout,
            "drows": bf16.d_gate_up,
        }
        self.q_rows = {
            gemm: quantize_rows(rows, bf16.offsets, num_sms=num_sms)
            for gemm, rows in self.rows.items()
        }
        R = bf16.rows.shape[0]
        self.out = {gemm: bf16.rows.new_empty(R, self.q_weight(gemm)[0].shape[1]) for gemm in GEMMS}

    def q_weight(self, gemm: str) -> tuple[torch.Tensor, torch.Tensor]:
        """[L, N, K] in fp8 and its scales."""
        q, transposed, scales = self.w13 if gemm in ("gate_up", "drows") else self.w2
        if gemm in ("gate_up", "down"):
            return q, scales
        return transposed, scales.transpose(1, 2)

    def ours(self, gemm: str, config: Fp8Config) -> torch.Tensor:
        how = dict(num_sms=self.num_sms, config=config)
        inputs = (*self.q_rows[gemm], *self.q_weight(gemm), self.bf16.offsets)
        return grouped_fp8_gemm(*inputs, self.out[gemm], **how)

    def ours_bf16(self, gemm: str) -> torch.Tensor:
        weight = self.bf16.w13 if gemm in ("gate_up", "drows") else self.bf16.w2
        forward = gemm in ("gate_up", "down")
        tensors = (self.rows[gemm], weight, self.bf16.offsets, self.out[gemm])
        return grouped_gemm(*tensors, weight_is_nk=forward, num_sms=self.num_sms)

    def torch_fp8(self, gemm: str) -> torch.Tensor:
        rows, weight = self.q_rows[gemm][0], self.q_weight(gemm)[0]
        L, N, _ = weight.shape
        scales = (torch.ones(rows.shape[0], device="cuda"), torch.ones(L, N, device="cuda"))
        how = dict(offs=self.bf16.ends, out_dtype=torch.bfloat16, use_fast_accum=True)
        return torch._scaled_grouped_mm(rows, weight.transpose(1, 2), *scales, **how)


def variants_of(sets: list[Fp8Problem], gemm: str, configs: dict[str, Fp8Config]) -> dict:
    variants = {
        "ours bf16": lambda i: sets[i].ours_bf16(gemm),
        "torch bf16": lambda i: sets[i].bf16.torch(gemm),
    }
    for name, config in configs.items():
        variants[name] = lambda i, config=config: sets[i].ours(gemm, config)
    try:
        sets[0].torch_fp8(gemm)
        variants["torch fp8"] = lambda i: sets[i].torch_fp8(gemm)
    except RuntimeError as reason:
        print(f"{gemm}: no torch fp8: {str(reason).splitlines()[0]}")
    return variants


def measure(shape: Shape, num_sms: int, rounds: int, configs: dict[str, Fp8Config]) -> list[dict]:
    sets = [Fp8Problem(shape, num_sms) for _ in range(SETS)]
    results = []
    for gemm in GEMMS:
        want = sample(sets[0].bf16.torch(gemm))
        errors = {
            name: relative_error(sample(sets[0].ours(gemm, config)), want)
            for name, config in configs.items()
        }
        medians = interleaved_medians(variants_of(sets, gemm, configs), rounds)
        for name, us in medians.items():
            error = errors.get(name)
            results.append(
                {
                    "shape": str(shape),
                    "gemm": gemm,
                    "variant": name if error is None or error < LIMIT else f"{name} WRONG",
                    "us": round(us, 1),
                    "tflops": round(shape.flops(gemm) / us / 1e6, 1),
                    "ratio": round(medians["ours bf16"] / us, 3),
                    "error": error,
                }
            )
    return results + measure_quantizers(shape, sets, rounds)


def measure_quantizers(shape: Shape, sets: list[Fp8Problem], rounds: int) -> list[dict]:
    """Rows of each GEMM, and both weights into both orientations: bytes moved and their rate."""
    variants, moved = {}, {}
    for gemm in GEMMS:
        variants[f"rows of {gemm}"] = lambda i, gemm=gemm: quantize_rows(
            sets[i].rows[gemm], sets[i].bf16.offsets, num_sms=sets[i].num_sms
        )
        moved[f"rows of {gemm}"] = sets[0].rows[gemm].numel() * (2 + 1 + 4 / 128)
    for name in ("w13", "w2"):
        variants[name] = lambda i, name=name: quantize_weights(getattr(sets[i].bf16, name))
        moved[name] = getattr(sets[0].bf16, name).numel() * (2 + 1 + 1)
    return [
        {
            "shape": str(shape),
            "gemm": "quantize",
            "variant": name,
            "us": round(us, 1),
            "gb_s": round(moved[name] / us / 1e3),
        }
        for name, us in interleaved_medians(variants, rounds).items()
    ]


def configurations(sweep: bool) -> dict[str, Fp8Config]:
    found = {f"fp8 {turns}": replace(FP8_GEMM, turns=turns) for turns in TURNS}
    if sweep:
        for group_m in (4, 8, 32):
            found[f"fp8 group {group_m}"] = replace(FP8_GEMM, group_m=group_m)
        found["fp8 3 stages"] = replace(FP8_GEMM, stages=3)
    return found


def print_table(results: list[dict]) -> None:
    print(f"\n{'shape':26} {'gemm':10} {'variant':18} {'us':>8} {'TFLOPS':>7} to our bf16")
    for r in results:
        line = f"{r['shape']:26} {r['gemm']:10} {r['variant']:18} {r['us']:8.1f} "
        if r["gemm"] == "quantize":
            print(line + f"{r['gb_s']:7.0f} GB/s")
            continue
        extra = f"  differs {r['error']:.1e}" if r["error"] is not None else ""
        print(line + f"{r['tflops']:7.1f} {r['ratio']:5.2f}{extra}")
    names = {r["variant"]: None for r in results if r["variant"].startswith("fp8")}
    for name in names:
        ratios = [r["ratio"] for r in results if r["variant"] == name]
        print(f"{name}: {statistics.geometric_mean(ratios):.3f} times our bf16, geometric mean")
    for shape in dict.fromkeys(r["shape"] for r in results):
        here = [r for r in results if r["shape"] == shape]
        total = {
            kind: sum(r["us"] for r in here if r["variant"].startswith(kind))
            for kind in ("ours bf16", f"fp8 {FP8_GEMM.turns}", "rows of", "w")
        }
        bf16, fp8, rows, weights = total.values()
        print(
            f"{shape}: bf16 {bf16:.0f} us, fp8 {fp8:.0f} ({bf16 / fp8:.2f}), with its rows' "
            f"quantising {fp8 + rows:.0f} ({bf16 / (fp8 + rows):.2f}); weights {weights:.0f} a step"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--num-sms", type=int, help="SMs our kernels take (default: all)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--sweep", action="store_true", help="more configurations of the kernel")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark times GPU kernels")
    num_sms = arguments.num_sms or torch.cuda.get_device_properties(0).multi_processor_count
    configs = configurations(arguments.sweep)
    results = [r for s in SHAPES for r in measure(s, num_sms, arguments.rounds, configs)]
    facts = environment(num_sms)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"environment": facts, "results": results}, file, indent=1)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print_table(results)


if __name__ == "__main__":
    main()
