"""Times our kernels under two releases of Triton, turn by turn, on one GPU.

    python -m bench triton_releases FOLDER [--only NAME ...] [--rounds N] [--turns N] [--json FILE]

FOLDER holds the other Triton (`pip install --no-deps --target FOLDER triton==3.8.0`). Each turn
runs bench/compute.py, bench/attention.py and bench/host.py under the installed Triton and then
under the other, in processes of their own. A figure's ratio is the installed release's least time
over the other's: above 1 the other is faster. `peer` is the same for what is not Triton (torch,
cuDNN) in the same processes: how far the machine drifted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BENCH = Path(__file__).resolve().parent


def commands(rounds: int) -> dict[str, list[str]]:
    return {
        "host": ["host.py"],
        "compute": ["compute.py", "--rounds", str(rounds)],
        "attention": ["attention.py", "--rounds", str(rounds)],
    }


def run(command: list[str], triton: str | None) -> dict:
    """What one benchmark wrote under the installed Triton (None) or one in a folder."""
    search = [*([triton] if triton else []), str(BENCH.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        call = [sys.executable, str(BENCH / command[0]), *command[1:], "--json", str(out)]
        subprocess.run(call, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def times_of(result: dict) -> dict[str, float]:
    """Microseconds by name; those of other libraries begin with "peer: ", and those of launches by
    Triton itself with "Triton's: "."""
    found = {}
    for row in result["results"]:
        place = [row[k] for k in ("shape", "gemm", "variant", "call") if k in row]
        name = ", ".join(place)
        kind = "peer: " if any(word in name for word in ("cudnn", "fa2")) else ""
        kind = "Triton's: " if "by Triton" in name else kind
        found[kind + name] = row["us"]
        if "torch_us" in row:
            found[f"peer: {row['shape']}, {row['gemm']}, torch"] = row["torch_us"]
    return found


def kind_of(name: str) -> str:
    before, colon, _ = name.partition(": ")
    return before if colon and before in ("peer", "Triton's") else "ours"


def compare(turns: list[tuple[dict, dict]]) -> list[dict]:
    """A record a figure, of (installed, other) results of each turn."""
    installed, other = ([times_of(turn[i]) for turn in turns] for i in range(2))
    records = []
    for name in installed[0]:
        before = min(times[name] for times in installed)
        after = min(times[name] for times in other)
        record = {"name": name, "installed_us": before, "other_us": after}
        records.append(record | {"ratio": round(before / after, 4)})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where the other Triton is installed")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of a benchmark")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=commands(0), default=list(commands(0)))
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    arguments = parser.parse_args()
    folder = os.path.abspath(arguments.folder)
    options = f"--rounds {arguments.rounds} --turns {arguments.turns}"
    report: dict = {"command": f"python -m bench triton_releases FOLDER {options}"}
    for name in arguments.only:
        command, turns = commands(arguments.rounds)[name], []
        for turn in range(arguments.turns):
            turns.append((run(command, None), run(command, folder)))
            print(f"{name}: turn {turn + 1} of {arguments.turns}", file=sys.stderr, flush=True)
        first, second = (result["environment"] for result in turns[0])
        report |= {k: first[k] for k in ("gpu", "torch", "cuda", "date")}
        report |= {"installed": first["triton"], "other": second["triton"]}
        report[name] = compare(turns)
        if arguments.json:  # what has been measured, should the next one fail
            Path(arguments.json).write_text(json.dumps(report, indent=1))
    print(f"{report['gpu']}, torch {report['torch']}: {report['installed']} / {report['other']}")
    for name in arguments.only:
        for kind in ("ours", "Triton's", "peer"):
            rows = [r for r in report[name] if kind_of(r["name"]) == kind]
            if not rows:
                continue
            mean = statistics.geometric_mean(r["ratio"] for r in rows)
            print(f"{name:10} {kind}: geometric mean {mean:.3f} of {len(rows)}, the least:")
            for r in sorted(rows, key=lambda r: r["ratio"])[: 4 if kind == "ours" else 1]:
                us = f"{r['installed_us']:9.1f} {r['other_us']:9.1f}"
                print(f"    {r['ratio']:.3f} {us}  {r['name']}")


if __name__ == "__main__":
    main()
