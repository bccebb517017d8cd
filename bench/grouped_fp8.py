"""Times the grouped MLP with precision="fp8" beside our bf16 one and torch's on one Hopper GPU.

    python3 bench/grouped_fp8.py [--json FILE] [--num-sms N] [--rounds N] [--gemms] [--sweep]

Forward and backward for inputs as a whole, with all that runs a micro-batch: rounding rows, SwiGLU
and its backward included, and everything that the weights' gradient will need written. "fp8 rows"
has rows, or dout, in e4m3 already. torch has its two GEMMs of each only, without an activation. The
weights are rounded once a step, timed apart.

--gemms adds the four GEMMs one by one, as in bench/compute.py, whose way of timing this is. "torch
fp8" is `torch._scaled_grouped_mm`, which has one scale a row and one a column: less work than ours.
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

from dualpipe_ext.ops.fp8_weight import Fp8Weight
from dualpipe_ext.triton_kernels.experts.fp8_gemm import (
    BACKWARD,
    FORWARD,
    Fp8Config,
    grouped_fp8_gemm,
)
from dualpipe_ext.triton_kernels.experts.fp8_swiglu import swiglu, swiglu_backward
from dualpipe_ext.triton_kernels.experts.gemm import grouped_gemm
from dualpipe_ext.triton_kernels.experts.quantize import quantize_rows, quantize_weights

GEMMS = ("gate_up", "down", "d_gate_up", "drows")
PASSES = {"forward": GEMMS[:2], "backward": GEMMS[2:]}
# Of the difference to bf16: three bits of mantissa on both sides of a product make 3.7e-2, two
# products and a SwiGLU between them 6.5e-2.
GEMM_LIMIT, PASS_LIMIT = 4e-2, 8e-2
SMALL = tuple(replace(shape, R=8192) for shape in SHAPES)


class Fp8Problem:
    """One MLP in bf16 and fp8: the two passes, and the GEMMs with outputs of their own."""

    def __init__(self, shape: Shape, num_sms: int, gemms: bool):
        self.bf16 = bf16 = Problem(shape, num_sms)
        self.num_sms = num_sms
        # Nobody needs what only weight gradients read or write.
        for name in ("drows", "dw13", "dw2"):
            setattr(bf16, name, None)
        self.w13 = Fp8Weight(*quantize_weights(bf16.w13))
        self.w2 = Fp8Weight(*quantize_weights(bf16.w2))
        self.rows = {
            "gate_up": bf16.rows,
            "down": bf16.act,
            "d_gate_up": bf16.dout,
            "drows": bf16.d_gate_up,
        }
        if not gemms:
            self.rows = {"gate_up": bf16.rows, "d_gate_up": bf16.dout}
        self.q_rows = {
            gemm: quantize_rows(rows, bf16.offsets, num_sms=num_sms)
            for gemm, rows in self.rows.items()
        }
        R = bf16.rows.shape[0]
        self.out = {
            gemm: bf16.rows.new_empty(R, self.q_weight(gemm)[0].shape[1]) for gemm in self.rows
        }
        self.packed = {gemm: self.q_weight(gemm)[1].contiguous() for gemm in self.rows}

    def run(self, kind: str, which: str) -> torch.Tensor:
        """out or drows of one pass; `which` of "bf16", "fp8" and "fp8 rows"."""
        bf16, ops, how = self.bf16, torch.ops.dualpipe_ext, (self.num_sms, "triton")
        weights, offsets = (bf16.w13, bf16.w2), bf16.offsets
        if kind == "forward":
            if which == "bf16":
                inputs = (bf16.rows, bf16.row_weight, *weights, offsets, True)
                return ops.grouped_mlp_forward(*inputs, *how, False)[0]
            rows, scale = bf16.rows, None
            if which == "fp8 rows":
                rows, scale = self.q_rows["gate_up"]
                scale = scale.T
            inputs = (rows, scale, bf16.row_weight, *weights, *self.w13, *self.w2, offsets, True)
            return ops.grouped_fp8_forward(*inputs, *how, False)[0]
        inputs = (bf16.gate_up, bf16.row_weight)
        if which == "bf16":
            return ops.grouped_mlp_dgrad(bf16.dout, *inputs, *weights, offsets, *how, False)[0]
        dout, scale = bf16.dout, None
        if which == "fp8 rows":
            dout, scale = self.q_rows["d_gate_up"]
            scale = scale.T
        weights = (*self.w13[1:], *self.w2[1:])
        return ops.grouped_fp8_dgrad(dout, scale, *inputs, *weights, offsets, *how)[0]

    def q_weight(self, gemm: str) -> tuple[torch.Tensor, torch.Tensor]:
        """[L, N, K] in fp8 and its scales."""
        weight = self.w13 if gemm in ("gate_up", "drows") else self.w2
        if gemm in PASSES["forward"]:
            return weight.q, weight.scales
        return weight.transposed, weight.scales.transpose(1, 2)

    def ours(self, gemm: str, config=None, packed: bool = False, **changes) -> torch.Tensor:
        config = config or (FORWARD if gemm in PASSES["forward"] else BACKWARD)
        how = dict(num_sms=self.num_sms, config=replace(config, **changes))
        q, scales = self.q_weight(gemm)
        if packed:
            scales = self.packed[gemm]
        inputs = (*self.q_rows[gemm], q, scales, self.bf16.offsets)
        return grouped_fp8_gemm(*inputs, self.out[gemm], **how)

    def ours_bf16(self, gemm: str) -> torch.Tensor:
        weight = self.bf16.w13 if gemm in ("gate_up", "drows") else self.bf16.w2
        forward = gemm in PASSES["forward"]
        tensors = (self.rows[gemm], weight, self.bf16.offsets, self.out[gemm])
        return grouped_gemm(*tensors, weight_is_nk=forward, num_sms=self.num_sms)

    def torch_fp8(self, gemm: str) -> torch.Tensor:
        rows, weight = self.q_rows[gemm][0], self.q_weight(gemm)[0]
        L, N, _ = weight.shape
        scales = (torch.ones(rows.shape[0], device="cuda"), torch.ones(L, N, device="cuda"))
        how = dict(offs=self.bf16.ends, out_dtype=torch.bfloat16, use_fast_accum=True)
        return torch._scaled_grouped_mm(rows, weight.transpose(1, 2), *scales, **how)


def measure_passes(shape: Shape, sets: list[Fp8Problem], rounds: int) -> list[dict]:
    results = []
    for kind, gemms in PASSES.items():
        variants = {
            "torch bf16, GEMMs only": lambda i, gemms=gemms: [sets[i].bf16.torch(g) for g in gemms]
        }
        names = ("bf16", "fp8", "fp8 rows")
        for name in names:
            variants[name] = lambda i, kind=kind, name=name: sets[i].run(kind, name)
        want = sets[0].run(kind, "bf16")
        errors = {name: relative_error(sets[0].run(kind, name), want) for name in names[1:]}
        medians = interleaved_medians(variants, rounds)
        flops = sum(shape.flops(gemm) for gemm in gemms)
        results += [
            row(shape, kind, name, us, medians["bf16"], flops, errors.get(name), PASS_LIMIT)
            for name, us in medians.items()
        ]
    return results


def measure_gemms(
    shape: Shape, sets: list[Fp8Problem], rounds: int, configs: dict[str, dict]
) -> list[dict]:
    results = []
    for gemm in GEMMS:
        variants = {
            "bf16": lambda i, gemm=gemm: sets[i].ours_bf16(gemm),
            "torch bf16": lambda i, gemm=gemm: sets[i].bf16.torch(gemm),
            "torch fp8": lambda i, gemm=gemm: sets[i].torch_fp8(gemm),
        }
        for name, how in configs.items():
            variants[name] = lambda i, gemm=gemm, how=how: sets[i].ours(gemm, **how)
        want = sample(sets[0].bf16.torch(gemm))
        errors = {
            name: relative_error(sample(sets[0].ours(gemm, **how)), want)
            for name, how in configs.items()
        }
        medians = interleaved_medians(variants, rounds)
        flops = shape.flops(gemm)
        results += [
            row(shape, gemm, name, us, medians["bf16"], flops, errors.get(name), GEMM_LIMIT)
            for name, us in medians.items()
        ]
    return results


def row(shape, gemm, variant, us, bf16_us, flops, error, limit) -> dict:
    return {
        "shape": str(shape),
        "gemm": gemm,
        "variant": variant if error is None or error < limit else f"{variant} WRONG",
        "us": round(us, 1),
        "tflops": round(flops / us / 1e6, 1),
        "ratio": round(bf16_us / us, 3),
        "error": error,
    }


def measure_glue(shape: Shape, sets: list[Fp8Problem], rounds: int) -> list[dict]:
    """What runs between the GEMMs, and both weights' rounding: bytes moved and their rate."""
    bf16 = sets[0].bf16
    scaled = 1 + 4 / 128  # bytes of a number in fp8
    variants, moved = {}, {}
    for name in ("rows", "dout"):
        variants[name] = lambda i, name=name: quantize_rows(
            getattr(sets[i].bf16, name), sets[i].bf16.offsets, num_sms=sets[i].num_sms
        )
        moved[name] = bf16.rows.numel() * (2 + scaled)

    def forward(i):
        b = sets[i].bf16
        return swiglu(b.gate_up, b.row_weight, b.offsets, num_sms=sets[i].num_sms)

    def backward(i):
        b = sets[i].bf16
        tensors = (b.act, b.gate_up, b.row_weight, b.offsets, b.d_gate_up, torch.empty_like(b.act))
        return swiglu_backward(*tensors, num_sms=sets[i].num_sms)

    variants |= {"swiglu": forward, "swiglu backward": backward}
    moved["swiglu"] = bf16.act.numel() * (2 * 2 + scaled)
    moved["swiglu backward"] = bf16.act.numel() * (3 * 2 + 3 * 2 + 2 * scaled)
    for name in ("w13", "w2"):
        variants[name] = lambda i, name=name: quantize_weights(getattr(sets[i].bf16, name))
        moved[name] = getattr(bf16, name).numel() * (2 + 1 + 1)
    return [
        {
            "shape": str(shape),
            "gemm": "between",
            "variant": name,
            "us": round(us, 1),
            "gb_s": round(moved[name] / us / 1e3),
        }
        for name, us in interleaved_medians(variants, rounds).items()
    ]


def configurations(sweep: bool) -> dict[str, dict]:
    """Arguments of Fp8Problem.ours by name; no config: the pass's own."""
    found = {"fp8": {}}
    for turns in (True, False):
        name = "turns" if turns else "no turns"
        found[f"fp8, {name}"] = {"config": Fp8Config(turns=turns)}
        # The scales of transposed weights K by K, as the forward's are.
        found[f"fp8, {name}, packed"] = {"config": Fp8Config(turns=turns), "packed": True}
    if sweep:
        for group_m in (4, 8, 32):
            found[f"fp8, group {group_m}"] = {"group_m": group_m}
        found["fp8, 3 stages"] = {"stages": 3}
    return found


def measure(shape: Shape, num_sms: int, rounds: int, gemms: bool, configs: dict) -> list[dict]:
    sets = [Fp8Problem(shape, num_sms, gemms) for _ in range(SETS)]
    results = measure_passes(shape, sets, rounds)
    if gemms:
        results += measure_gemms(shape, sets, rounds, configs)
    return results + measure_glue(shape, sets, rounds)


def print_table(results: list[dict]) -> None:
    print(f"\n{'shape':26} {'':9} {'variant':24} {'us':>8} {'TFLOPS':>7} to our bf16")
    for r in results:
        line = f"{r['shape']:26} {r['gemm']:9} {r['variant']:24} {r['us']:8.1f} "
        if "gb_s" in r:
            print(line + f"{r['gb_s']:7.0f} GB/s")
            continue
        extra = f"  differs {r['error']:.1e}" if r["error"] is not None else ""
        print(line + f"{r['tflops']:7.1f} {r['ratio']:5.2f}{extra}")
    print("\ngeometric means, times our bf16")
    for title, gemms in {**{kind: (kind,) for kind in PASSES}, "GEMMs": GEMMS}.items():
        here = [r for r in results if r["gemm"] in gemms]
        for name in dict.fromkeys(r["variant"] for r in here if r["variant"].startswith("fp8")):
            for rows in ("T32768", "T16384", "T8192", ""):
                ratios = [r["ratio"] for r in here if r["variant"] == name and rows in r["shape"]]
                if ratios:
                    mean = statistics.geometric_mean(ratios)
                    print(f"{title:9} {name:24} {rows or 'all':7} {mean:.3f} of {len(ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--num-sms", type=int, help="SMs our kernels take (default: all)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--gemms", action="store_true", help="the four GEMMs one by one as well")
    parser.add_argument("--sweep", action="store_true", help="--gemms in more configurations")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark times GPU kernels")
    num_sms = arguments.num_sms or torch.cuda.get_device_properties(0).multi_processor_count
    gemms, configs = arguments.gemms or arguments.sweep, configurations(arguments.sweep)
    how = (num_sms, arguments.rounds)
    results = [r for shape in SHAPES for r in measure(shape, *how, gemms, configs)]
    results += [r for shape in SMALL for r in measure(shape, *how, False, configs)]
    facts = environment(num_sms)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"environment": facts, "results": results}, file, indent=1)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print_table(results)


if __name__ == "__main__":
    main()
