"""How fast and how good is the balancer? Both policies beside the loop oracle, on one CPU core.

58 layers × 256 experts (DeepSeek-V3), for uniform, Zipf(1) and lognormal loads. Times are medians
of `--rounds` calls of `rebalance_experts`; the oracle (tests/greedy_balancer.py: the same algorithm
in Python loops) runs once, on `--oracle-layers` layers, and its time is scaled to all of them.
Then, for a drift of the loads: balance against copies sent, `max_moved` by `max_moved`. Example::

    python -m bench eplb --json out.json

With ``--layer`` it times a MoELayer before and after balancing instead, on all GPUs; see
eplb_layer.py.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eplb_layer

from dualpipe_ext.balance.eplb import POLICIES, measure_placement, rebalance_experts
from tests.support.greedy_balancer import balance_greedily

NUM_LAYERS, NUM_EXPERTS = 58, 256
# num_replicas, num_groups, num_nodes, num_gpus
SHAPES = ((288, 1, 1, 32), (288, 8, 4, 32), (320, 1, 1, 64), (320, 8, 8, 64))
LOADS = ("uniform", "zipf", "lognormal")
DRIFT = 0.1  # standard deviation of the loads' logarithms from one balancing to the next
MAX_MOVED = (0, 58, 290, 1160, None)


def draw_loads(kind: str, generator: torch.Generator) -> torch.Tensor:
    shape = (NUM_LAYERS, NUM_EXPERTS)
    uniform = torch.rand(shape, generator=generator)
    if kind == "uniform":
        return 1000 * uniform
    if kind == "zipf":
        return 1e5 / (1 + uniform.argsort(-1))
    return 1000 * torch.randn(shape, generator=generator).exp()


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def measure(shape: tuple[int, ...], kind: str, rounds: int, oracle_layers: int) -> dict:
    """Times and balance of both policies, and whether "deepseek" gives what the oracle gives."""
    weight = draw_loads(kind, torch.Generator().manual_seed(0))
    num_replicas, num_groups, num_nodes, num_gpus = shape
    result = {
        "replicas": num_replicas,
        "groups": num_groups,
        "nodes": num_nodes,
        "gpus": num_gpus,
        "loads": kind,
    }
    for policy in POLICIES:
        found = rebalance_experts(weight, *shape, policy)
        few = 1 + rounds // 5 if policy == "improved" else rounds
        report = measure_placement(weight, found[0], num_gpus, num_groups, num_nodes)
        result[policy] = {
            "ms": round(
                milliseconds(lambda p=policy: rebalance_experts(weight, *shape, p), few), 2
            ),
            "balance": round(float(report.balance.mean()), 5),
            "worst_balance": round(float(report.balance.min()), 5),
            "copies_beside_another": int(report.together.sum()),
        }
    bound = (report.gpu_load.mean(-1) / report.lower_bound).mean()
    result["bound_balance"] = round(float(bound), 5)
    if oracle_layers:
        few_layers = weight[:oracle_layers]
        begin = time.perf_counter()
        expected = balance_greedily(few_layers, *shape)
        taken = (time.perf_counter() - begin) * 1e3
        result["oracle_ms"] = round(taken * NUM_LAYERS / oracle_layers)
        found = rebalance_experts(few_layers, *shape)
        result["equals_oracle"] = [each.tolist() for each in found] == list(expected)
    return result


def measure_moves(shape: tuple[int, ...]) -> list[dict]:
    """Balance against copies sent, from a placement for loads that have drifted since."""
    generator = torch.Generator().manual_seed(0)
    weight = draw_loads("lognormal", generator)
    current, _, _ = rebalance_experts(weight, *shape, "improved")
    weight = weight * (DRIFT * torch.randn(weight.shape, generator=generator)).exp()
    num_replicas, num_groups, num_nodes, num_gpus = shape
    rows = []
    for max_moved in MAX_MOVED:
        begin = time.perf_counter()
        slots, _, _ = rebalance_experts(
            weight, *shape, "improved", current=current, max_moved=max_moved
        )
        taken = (time.perf_counter() - begin) * 1e3
        report = measure_placement(weight, slots, num_gpus, num_groups, num_nodes, current=current)
        rows.append(
            {
                "replicas": num_replicas,
                "groups": num_groups,
                "nodes": num_nodes,
                "gpus": num_gpus,
                "max_moved": max_moved,
                "moved": int(report.moved.sum()),
                "balance": round(float(report.balance.mean()), 5),
                "ms": round(taken),
            }
        )
    return rows


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} CPU cores, {names[0]}" if names else platform.machine()


def print_results(results: list[dict], moves: list[dict]) -> None:
    print(
        f"\n{NUM_LAYERS} layers x {NUM_EXPERTS} experts; balance: mean / heaviest load of a GPU\n"
        f"{'slots':>5} {'groups':>6} {'nodes':>5} {'GPUs':>4} {'loads':10} {'loops ms':>8}"
        f" {'deepseek ms':>11} {'balance':>8} {'together':>8}"
        f" {'improved ms':>11} {'balance':>8} {'together':>8} {'bound':>8}"
    )
    for r in results:
        ours, search = r["deepseek"], r["improved"]
        print(
            f"{r['replicas']:5} {r['groups']:6} {r['nodes']:5} {r['gpus']:4} {r['loads']:10}"
            f" {r.get('oracle_ms', '-'):>8} {ours['ms']:11.1f} {ours['balance']:8.4f}"
            f" {ours['copies_beside_another']:8} {search['ms']:11.1f} {search['balance']:8.4f}"
            f" {search['copies_beside_another']:8} {r['bound_balance']:8.4f}"
            + ("" if r.get("equals_oracle", True) else "  WRONG: differs from the loops")
        )
    print(
        f"\nafter a drift of {DRIFT:.0%}, from the placement before it\n"
        f"{'slots':>5} {'groups':>6} {'nodes':>5} {'GPUs':>4} {'max_moved':>9} {'moved':>6}"
        f" {'balance':>8} {'ms':>6}"
    )
    for r in moves:
        print(
            f"{r['replicas']:5} {r['groups']:6} {r['nodes']:5} {r['gpus']:4}"
            f" {r['max_moved']!s:>9} {r['moved']:6} {r['balance']:8.4f} {r['ms']:6}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--oracle-layers", type=int, default=58, help="0 leaves the loops out")
    parser.add_argument("--layer", action="store_true", help="time a MoELayer, on all GPUs")
    eplb_layer.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.layer:
        eplb_layer.run(arguments)
        return
    torch.set_num_threads(1)
    environment = {
        "hardware": cpu_name(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "bench/eplb.py", *sys.argv[1:]]),
    }
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    results = [
        measure(shape, kind, arguments.rounds, arguments.oracle_layers)
        for shape in SHAPES
        for kind in LOADS
    ]
    moves = [row for shape in SHAPES[:3] for row in measure_moves(shape)]
    print_results(results, moves)
    if arguments.json:
        with open(arguments.json, "w") as file:
            found = {"environment": environment, "results": results, "moves": moves}
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
