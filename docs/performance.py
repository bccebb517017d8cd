"""Writes the tables of docs/PERFORMANCE.md and the README's figures from bench/results.

    python docs/performance.py           rewrites both files between their markers
    python docs/performance.py --check   exit status 1 if a file differs from the results

A table stands between `<!-- table NAME -->` and `<!-- end -->`. Numbers are rounded here and taken
from nowhere else. Imports neither torch nor the package.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from math import prod
from pathlib import Path
from posixpath import relpath

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
FILES = ("README.md", "docs/PERFORMANCE.md")

EXCHANGE = "2026-11-22-exchange-4xH200.json"
SM_SPLIT = "2026-11-22-sm_split-4xH200.json"
PAIR_A = "2026-11-22-pair-A-4xH200.json"
PAIR_BC = "2026-11-22-pair-all-4xH200.json"
PAIR_SLOW_HOST = "2026-11-22-pair-A-slow-host-4xH200.json"
PAIR_GRAPHS = {shape: f"2026-11-22-pair-graphs-{shape}4xH200.json" for shape in ("", "B-", "C-")}
PIPELINE = "2026-11-22-pipeline-4xH200.json"
LAYER = "2026-11-22-layer-4xH200.json"
EPLB_LAYER = "2026-11-22-eplb_layer-4xH200.json"
EPLB = "2026-11-21-eplb-1xCPU.json"
COMPUTE = "2026-11-22-compute-1xH200.json"
FP8 = "2026-11-22-grouped_fp8-1xH200.json"
ATTENTION = "2026-11-22-attention-1xH200.json"
BLOCK_OPS = "2026-11-22-block_ops-1xH200.json"
CROSS_ENTROPY = "2026-11-22-cross_entropy-1xH200.json"
RELEASES = "2026-12-01-triton_releases-1xH200.json"

VERSIONS = (("torch", "torch"), ("cuda", "CUDA"), ("triton", "Triton"), ("nccl", "NCCL"))
SHAPES = {
    "A": "hidden 2048, 128 experts of 768, 8192 tokens",
    "B": "hidden 4096, 128 experts of 1536, 8192 tokens",
    "C": "hidden 7168, 64 experts of 2048, 4096 tokens",
}


# ---- Reading and formatting ----


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def source_line(*names: str) -> str:
    """Where figures come from: hardware, versions, date, command and file, a line a file."""
    lines = []
    for name in names:
        data = load(name)
        found = data.get("environment", {}) | data
        hardware = found.get("gpu") or found["hardware"]
        if not re.match(r"\d", hardware):
            hardware = f"1x {hardware}"
        versions = [f"{label} {found[key]}" for key, label in VERSIONS if key in found]
        parts = [hardware.replace("x ", "× "), *versions, found["date"]]
        lines.append(f"{', '.join(parts)}: `{found['command']}`, [{name}](bench/results/{name})")
    return "\n\n".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("  ", " ")


def number(value: float, digits: int = 0) -> str:
    """Halves go up: 42.5 is 43."""
    return str(Decimal(f"{value:.9g}").quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def percent(share: float | None, digits: int = 0) -> str:
    return "" if share is None else f"{number(100 * share, digits)} %".replace("-", "−")


def milliseconds(us: float, digits: int = 1) -> str:
    return number(us / 1000, digits)


def mean(ratios: Iterable[float]) -> float:
    """Geometric."""
    ratios = list(ratios)
    return prod(ratios) ** (1 / len(ratios))


def by(records: Iterable[dict], *keys: str) -> dict:
    return {tuple(record[key] for key in keys): record for record in records}


# ---- The README's figures ----


def figures() -> str:
    data = load(EXCHANGE)
    us = {(r["name"], r["comm_sms"]): number(r["us"]) for r in data["table"]}
    pairs = [max(pair_records(shape), key=lambda r: r["gain"]) for shape in SHAPES]
    gains = ", ".join(percent(r["gain"], 1) for r in pairs)
    hidden = ", ".join(percent(r["hidden_by_trace"]) for r in pairs)
    forward = number(compute_means("ours", FORWARD), 2)
    weights = number(compute_means("ours, main_grad", WEIGHTS), 2)
    hardware = data["gpu"].replace("x ", "× ")
    lines = [
        f"- **Exchange on 16 of 132 SMs**: dispatch {us['dispatch_unique', 16]} µs, combine "
        f"{us['combine_unique', 16]} µs; a bare push of the same rows takes "
        f"{us['ceiling', 16]} µs, NCCL's all-to-all {us['nccl', None]} µs. "
        "With rows sorted by expert and summed: "
        f"{us['dispatch_expanded', 16]} and {us['combine_summed', 16]} µs.",
        f"- **Overlapped pair**: {gains} faster than the best run without overlap; "
        f"{hidden} of communication hidden (layer shapes A, B, C).",
        f"- **Experts on one GPU**: forward {forward}×, weight gradients summed in fp32 "
        f"{weights}× the speed of `torch._grouped_mm`.",
        f"\n{hardware}, torch {data['torch']}, CUDA {data['cuda']}, {data['date']}; medians.",
    ]
    return "\n".join(lines)


# ---- Exchange ----

EXCHANGE_ROWS = {
    "ceiling": "bare push of unique rows",
    "dispatch_unique": "dispatch, unique rows",
    "dispatch_unique_fp8": "dispatch, unique rows, fp8",
    "dispatch_expanded": "dispatch, then sorted by expert on all SMs",
    "dispatch_expert": "dispatch, sorted by expert on the communication SMs",
    "combine_unique": "combine, rows summed per rank before",
    "combine_summed": "combine, summed on all SMs before",
    "combine_expert": "combine, summed on the communication SMs",
    "plan": "plan",
}


def exchange() -> str:
    records = by(load(EXCHANGE)["table"], "name", "comm_sms")
    sms = (0, 4, 8, 12, 16, 24, 32)
    rows = [
        [text, *(f"{number(records[name, s]['us'])}" if (name, s) in records else "" for s in sms)]
        for name, text in EXCHANGE_ROWS.items()
    ]
    nccl, in_turn, at_once = (
        number(records[name, None]["us"]) for name in ("nccl", "copies_in_turn", "copies_at_once")
    )
    peers = (
        f"NCCL `all_to_all_single` of the same unique rows: {nccl} µs. Copy engines alone: "
        f"{in_turn} µs with one peer at a time, {at_once} with all at once."
    )
    return "\n\n".join(
        [table(["µs by `comm_sms`", *map(str, sms)], rows), peers, source_line(EXCHANGE)]
    )


def sm_split() -> str:
    records = load(SM_SPLIT)["records"]
    peers = {r["peer"]: r["us"] for r in records if "peer" in r}
    alone = next(r for r in records if r.get("comm_sms") == 8)
    rows = [
        [
            str(r["comm_sms"]),
            f"{number(r['dispatch_us'])}",
            f"{number(r['dispatch_wire_gb_s'])}",
            f"{number(r['combine_us'])}",
            f"{number(r['combine_wire_gb_s'])}",
            f"{number(r['mlp_fewer_sms_us'])}",
            f"{number(r['both_us'])}",
            percent(r["hidden_share"]),
        ]
        for r in records
        if "comm_sms" in r
    ]
    head = ["`comm_sms`", "dispatch µs", "GB/s", "combine µs", "GB/s"]
    head += ["MLP on the other SMs µs", "all at once µs", "hidden"]
    text = (
        f"Alone on all SMs the MLP takes {number(alone['mlp_us'])} µs "
        f"({number(alone['mlp_tflops'])} TFLOPS); `torch._grouped_mm` without SwiGLU takes "
        f"{number(peers['torch_grouped_mm'])}."
    )
    return "\n\n".join([table(head, rows), text, source_line(SM_SPLIT)])


def layer() -> str:
    records = by(load(LAYER)["results"], "shape", "comm_sms", "form")
    columns = sorted({key[1:] for key in records})
    rows = [
        [
            shape,
            *(
                f"{number(r['alone_us'])} ({number(r['overlapped_us'])})"
                for r in (records[shape, *column] for column in columns)
            ),
        ]
        for shape in SHAPES
    ]
    head = ["µs", *(f"{sms}, {form}" for sms, form in columns)]
    return "\n\n".join([table(head, rows), source_line(LAYER)])


# ---- Pairs and pipelines ----


def pair_records(shape: str) -> list[dict]:
    return [r for r in load(PAIR_A if shape == "A" else PAIR_BC)["results"] if r["shape"] == shape]


def pair_row(r: dict) -> list[str]:
    return [
        r["shape"],
        r["form"],
        str(r["comm_sms"]),
        milliseconds(r["pair_us"]),
        milliseconds(r["fastest_in_order_us"]),
        percent(r["gain"], 1),
        milliseconds(r["bound_us"]),
        percent(r["hidden_by_trace"], 1),
    ]


PAIR_HEAD = ["shape", "form", "`comm_sms`", "pair ms", "without overlap ms", "gain", "bound ms"]


def pair() -> str:
    rows = [pair_row(r) for shape in SHAPES for r in pair_records(shape)]
    return "\n\n".join([table([*PAIR_HEAD, "hidden"], rows), source_line(PAIR_A, PAIR_BC)])


def pair_slow() -> str:
    first = [r for r in load(PAIR_BC)["results"] if r["shape"] == "A"]
    rows = [
        [which, *pair_row(r)[1:]]
        for which, records in (("first", first), ("later", load(PAIR_SLOW_HOST)["results"]))
        for r in records
    ]
    head = ["A on a slow host", *PAIR_HEAD[1:], "hidden"]
    return "\n\n".join([table(head, rows), source_line(PAIR_BC, PAIR_SLOW_HOST)])


def pair_graphs() -> str:
    names = PAIR_GRAPHS.values()
    records = (r for name in names for r in load(name)["results"] if r["mlp_sms"] == "take-over")
    rows = [pair_row(r)[:-1] for r in records]
    return "\n\n".join([table(PAIR_HEAD, rows), source_line(*names)])


def pipeline() -> str:
    records = by(load(PIPELINE)["results"], "layout", "schedule")
    kinds = list(dict.fromkeys(kind for _, kind in records))
    rows = []
    for layout in dict.fromkeys(layout for layout, _ in records):
        found = [records[layout, kind] for kind in kinds]
        rows.append(
            [f"{layout.replace('xE', ' × E')}: step", *(f"{number(r['step_ms'])}" for r in found)]
        )
        rows.append(["simulated", *(f"{number(r['simulated_ms'])}" for r in found)])
    return "\n\n".join([table(["ms", *kinds], rows), source_line(PIPELINE)])


# ---- Experts ----

FORWARD = ("gate_up", "down")
FOR_INPUTS = ("d_gate_up", "drows")
WEIGHTS = ("dw13", "dw2")


def compute_records() -> dict:
    return by(load(COMPUTE)["results"], "shape", "gemm", "variant")


def compute_ratio(record: dict) -> float:
    """Over torch, which also adds to the gradient so far where ours does."""
    return record.get("ratio_to_torch_and_add", record["ratio"])


def compute_means(variant: str, gemms: Sequence[str]) -> float:
    records = compute_records()
    shapes = dict.fromkeys(shape for shape, *_ in records)
    return mean(compute_ratio(records[shape, gemm, variant]) for shape in shapes for gemm in gemms)


def compute() -> str:
    records = compute_records()
    shapes = list(dict.fromkeys(shape for shape, *_ in records))
    rows = []
    for text, variant, gemms in (
        ("forward: gate_up, down", "ours", FORWARD),
        ("backward for inputs: d_gate_up, drows", "ours", FOR_INPUTS),
        ("weight gradients: dw13, dw2", "ours", WEIGHTS),
        ("weight gradients into fp32 `main_grad`", "ours, main_grad", WEIGHTS),
    ):
        cells = [
            ", ".join(
                f"{number(compute_ratio(records[shape, gemm, variant]), 2)}" for gemm in gemms
            )
            for shape in shapes
        ]
        rows.append([text, *cells, f"{number(compute_means(variant, gemms), 2)}"])
    head = ["speed over `torch._grouped_mm`", *shapes, "geometric mean"]
    times = [
        [gemm, *(f"{number(records[shape, gemm, 'ours']['us'])}" for shape in shapes)]
        for gemm in (*FORWARD, *FOR_INPUTS, *WEIGHTS)
    ]
    return "\n\n".join(
        [table(head, rows), table(["ours, µs", *shapes], times), source_line(COMPUTE)]
    )


def fp8() -> str:
    records = by(load(FP8)["results"], "shape", "gemm", "variant")
    shapes = list(dict.fromkeys(shape for shape, *_ in records))
    rows = []
    for shape in shapes:
        row = [shape]
        for gemm in ("forward", "backward"):
            row.append(f"{number(records[shape, gemm, 'bf16']['us'])}")
            for variant in ("fp8", "fp8 rows"):
                r = records[shape, gemm, variant]
                row.append(f"{number(r['us'])} ({number(r['ratio'], 2)}×)")
        rows.append(row)
    head = ["µs", "forward bf16", "fp8", "rows in e4m3", "backward bf16", "fp8", "dout in e4m3"]
    return "\n\n".join([table(head, rows), source_line(FP8)])


# ---- Attention and elementwise kernels ----


def attention() -> str:
    rows = []
    records = by(load(ATTENTION)["results"], "shape", "pass", "variant")
    for shape, way in dict.fromkeys((shape, way) for shape, way, _ in records):
        rate = {
            name: records[key]["tflops"]
            for name in ("cudnn", "fa2", "ours", "ours, deterministic")
            if (key := (shape, way, f"{way}: {name}")) in records
        }
        capped = records[shape, way, f"{way}: ours, 108 SMs"]["tflops"]
        exact = f"{number(rate['ours, deterministic'])}" if "ours, deterministic" in rate else ""
        rates = [f"{number(rate[name])}" for name in ("cudnn", "fa2", "ours")]
        rows.append([f"{shape}, {way}", *rates, exact, f"{number(capped)}"])
    head = ["TFLOPS", "cuDNN", "FlashAttention-2", "ours", "deterministic", "ours on 108 SMs"]
    return "\n\n".join([table(head, rows), source_line(ATTENTION)])


def elementwise() -> str:
    own = load(CROSS_ENTROPY)["results"]  # of the kernels as they are; the other file's are older
    measured = {r["kernel"]: r for r in [*load(BLOCK_OPS)["results"], *own]}
    rows = [
        [name, f"{number(r['us'])}", f"{number(r['gbps'])}", f"{number(r['ratio'], 2)}"]
        for name, r in measured.items()
    ]
    head = ["kernel", "µs", "GB/s", "over a copy"]
    return "\n\n".join([table(head, rows), source_line(BLOCK_OPS, CROSS_ENTROPY)])


# ---- Balancing and releases ----


def eplb() -> str:
    rows = []
    for r in load(EPLB)["results"]:
        if r["loads"] != "zipf":
            continue
        groups = "" if r["groups"] == 1 else f", {r['groups']} groups on {r['nodes']} nodes"
        row = [f"{r['replicas']} on {r['gpus']}{groups}"]
        for policy in ("deepseek", "improved"):
            row += [f"{number(r[policy]['ms'], 1)} ms", f"{number(r[policy]['balance'], 4)}"]
        rows.append([*row, f"{number(r['bound_balance'], 4)}"])
    head = ["slots on GPUs", "DeepSeek's", "balance", "improved", "balance", "no placement above"]
    return "\n\n".join([table(head, rows), source_line(EPLB)])


def eplb_layer() -> str:
    records = load(EPLB_LAYER)["layer"]
    bound = next(r["both_ms"] for r in records if r["routing"] == "uniform")
    rows = [
        [
            r["routing"],
            r["variant"],
            f"{number(r['balance'], 3)}",
            f"{number(r['both_ms'], 2)}",
            f"{number(r['both_ms'] / bound, 3)}",
            f"{number(r['sync_replica_gradients_ms'], 1)}"
            if r["sync_replica_gradients_ms"]
            else "",
            f"{number(r['move_ms'])}" if "move_ms" in r else "",
        ]
        for r in records
    ]
    head = ["routing", "placement", "balance", "forward + backward ms", "over uniform"]
    head += ["sum of copies' gradients ms", "move ms"]
    return "\n\n".join([table(head, rows), source_line(EPLB_LAYER)])


def releases() -> str:
    data = load(RELEASES)
    rows = []
    for key, text in (("compute", "grouped GEMMs"), ("attention", "attention"), ("host", "host")):
        own = [
            r for r in data[key] if not r["name"].startswith("peer") and "torch" not in r["name"]
        ]
        if key == "host":
            for r in own:
                rows.append([f"host: {r['name']}", "1", f"{number(r['ratio'], 3)}"])
            continue
        ratios = [r["ratio"] for r in own]
        rows.append([text, str(len(own)), f"{number(mean(ratios), 3)}"])
    head = ["", "cases", f"time under {data['installed']} over {data['other']}"]
    return "\n\n".join([table(head, rows), source_line(RELEASES)])


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (
        *(figures, exchange, sm_split, layer, pair, pair_slow, pair_graphs, pipeline, compute, fp8),
        *(attention, elementwise, eplb, eplb_layer, releases),
    )
}
MARKER = re.compile(r"(<!-- table (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def filled(text: str, folder: str) -> str:
    """`text` with every table made anew; links are relative to `folder`."""

    def fill(match: re.Match) -> str:
        made = TABLES[match[2]]()
        up = relpath("bench/results", folder)
        return match[1] + made.replace("](bench/results/", f"]({up}/") + match[3]

    return MARKER.sub(fill, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args(arguments).check
    stale = []
    for name in FILES:
        path = ROOT / name
        text = path.read_text()
        made = filled(text, Path(name).parent.as_posix())
        if made == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(made)
    if check and stale:
        print(f"{', '.join(stale)}: run `python docs/performance.py`", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
