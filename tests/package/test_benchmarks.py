"""The benchmarks of pairs and pipelines on gloo: they run, and their figures fit each other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dualpipe_ext.trace.report import GpuEvent, Trace, measure_overlap

ROOT = Path(__file__).parents[2]


def run(folder, *command):
    """What `python -m bench ... --json` wrote on a machine without a GPU, and what it printed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = path
    done = subprocess.run(
        [sys.executable, *command, "--json", str(folder / "out.json")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text()), done.stdout


def test_pair_benchmark(tmp_path):
    options = "--shapes tiny --ranks 2 --repeats 1 --layers 1 --comm-sms 0 8 --traces"
    result, table = run(tmp_path, "-m", "bench", "pair", *options.split(), str(tmp_path))
    splits = [(r["form"], r["comm_sms"], r["weight_delay"]) for r in result["results"]]
    assert splits[:3] == [("expert", 8, "all"), ("unique", 0, "all"), ("unique", 8, "all")]
    best = min(result["results"][:3], key=lambda r: r["pair_us"])
    more = [(best["form"], best["comm_sms"], delay) for delay in ("experts", "off")]
    assert splits[3:] == more
    for r in result["results"]:
        assert r["bound_us"] == max(r["compute_us"], r["comm_us"]) > 0
        assert r["gain"] == pytest.approx(r["fastest_in_order_us"] / r["pair_us"] - 1, abs=1e-3)
        hidden = 1 - (r["pair_us"] - r["compute_us"]) / r["comm_us"]
        assert r["hidden_by_time"] == pytest.approx(hidden, abs=1e-3)
        assert r["hidden_by_trace"] is None and r["backend"] == "reference"  # no GPU in the trace
        assert r["fastest_in_order_us"] <= r["in_order_us"] or r["weight_delay"] != "all"
    assert len(table.splitlines()) == 1 + len(splits)
    assert (tmp_path / "pair-tiny-rank1.json.gz").exists()


def test_pair_benchmark_of_whole_steps(tmp_path):
    options = "--shapes tiny --ranks 2 --repeats 1 --layers 1 --comm-sms 8 --graphs --no-trace"
    result, _ = run(tmp_path, "-m", "bench", "pair", *options.split(), "--weight-delay", "all")
    splits = [(r["form"], r["comm_sms"], r["weight_delay"]) for r in result["results"]]
    assert splits == [("expert", 8, "all"), ("unique", 8, "all")]


def test_pairs_that_wait_for_the_host_are_named(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from pair import format_table

    names = "pair_us fastest_in_order_us compute_us comm_us bound_us of_bound gain hidden_by_time"
    record = dict.fromkeys(names.split(), 1000.0) | {"hidden_by_trace": 0.9, "comm_sms": 8}
    record |= {"form": "unique", "mlp_sms": "rest", "weight_delay": "all"}
    idle = {"A": (20, 340), "B": (30, 40), "C": (None,)}  # us by split; C was not traced
    records = [
        record | {"shape": shape} | ({} if us is None else {"idle_us": us})
        for shape, found in idle.items()
        for us in found
    ]
    *_, last = format_table(records).splitlines()
    assert last.startswith("A: GPUs are idle for up to 34% of a pair")
    assert "idle" not in format_table(records[2:])


def test_trace_of_pairs_is_cut_at_the_markers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from pair import cut_at_markers

    mark, gemm, comm = "ncclDevKernel_AllReduce_Sum_f32_RING_LL()", "gemm", "dualpipe::pull_rows()"
    spans = [(gemm, 0, 90), (mark, 100, 110), (gemm, 110, 150), (comm, 130, 170), (mark, 180, 190)]
    spans += [(comm, 200, 900), (mark, 1000, 1005), (comm, 1010, 1020), (mark, 1030, 1040)]
    events = tuple(GpuEvent("0", "7", name, "kernel", a, b) for name, a, b in spans)
    first, second = cut_at_markers(Trace("trace.json", events, 0, None, None))
    assert measure_overlap(first).total.hidden_share == pytest.approx(0.5)
    assert measure_overlap(second).total.comm_busy == pytest.approx(0.01)


def test_pipeline_benchmark(tmp_path):
    sizes = "--hidden 32 --expert-hidden 16 --experts 8 --topk 2 --tokens 8 --layers 4 --chunks 4"
    options = "--ranks 4 --pipeline-ranks 2 4 --kinds dualpipev zbv dualpipe 1f1b --repeats 1"
    result, table = run(tmp_path, "-m", "bench", "pipeline", *options.split(), *sizes.split())
    records = {r["schedule"]: r for r in result["results"]}
    assert list(records) == ["dualpipev", "zbv", "dualpipe", "1f1b"]  # 4 layers: no V of 4 ranks
    assert {r["layout"] for r in result["results"]} == {"PP2xEP2"}
    losses = [r["loss"] for r in records.values()]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5) and losses[0] > 0
    for kind, r in records.items():
        for name in ("simulated", "alone"):
            off_by = r["step_ms"] / r[f"{name}_ms"] - 1
            assert r[f"off_by_{name}"] == pytest.approx(off_by, abs=1e-3)
        assert 0 < r["busiest_ms"] <= r["simulated_ms"]
        ops = {key.split()[0] for key in r["action_us"]}
        assert (
            ops
            == {
                "dualpipev": {"F", "B", "I", "W", "FB"},
                "dualpipe": {"F", "B", "I", "W", "FB"},
                "zbv": {"F", "I", "W"},
                "1f1b": {"F", "B"},
            }[kind]
        )
        assert all(us > 0 for us in r["action_us"].values())
    assert records["dualpipe"]["copies_ms"] > 0
    assert len(table.splitlines()) == 1 + 4 + 1


def run_bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_every_benchmark_is_listed_and_says_what_it_takes():
    listed = run_bench().stdout
    names = {
        file.stem for file in (ROOT / "bench").glob("[a-z]*.py") if "main()" in file.read_text()
    }
    assert {"pair", "exchange", "compute", "sm_split"} <= names
    for name in names:
        assert f"  {name} " in listed
    for name in ("eplb", "sm_split", "pair"):  # without Triton and a GPU
        assert run_bench(name, "--help").stdout.startswith(f"usage: {name}.py")
    assert run_bench("nonsense").returncode == 1
