"""Recorded traces: rows, names and order, and what the reader makes of them."""

import gzip
import json

import torch

from dualpipe_ext.pipeline.pipeline import Pipeline
from dualpipe_ext.trace.ranges import named_range
from dualpipe_ext.trace.recording import add_lanes, record_trace
from dualpipe_ext.trace.report import measure_overlap, read_trace
from tests.support import small_transformer as small


def rows_of(trace):
    """Row name → names of its ranges, in time."""
    events = [event for event in trace["traceEvents"] if event.get("pid") == "dualpipe_ext"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    ranges = sorted((e for e in events if e["ph"] == "X"), key=lambda event: event["ts"])
    return {name: [e["name"] for e in ranges if e["tid"] == tid] for tid, name in names.items()}


def test_pipeline_run_has_named_lanes_and_stages(tmp_path):
    path = tmp_path / "traces" / "rank0.json.gz"
    pipeline = Pipeline([small.stage(1, first=True), small.stage(1, last=True)])
    words = small.words(6, 4)
    with record_trace(path):
        pipeline.step(words, num_chunks=3, criterion=small.word_loss, labels=[words])
    rows = rows_of(json.loads(gzip.decompress(path.read_bytes())))
    expected = [str(action) for action in pipeline._schedule.actions[0]]
    assert rows["pipeline"] == expected and any(name.startswith("pair") for name in expected)
    pairs = sum(name.startswith("pair") for name in expected)
    assert rows["comm"].count("dispatch F layer 0") == pairs
    assert rows["compute"].count("mlp B layer 0") == pairs


def test_gpu_ranges_win_and_streams_get_names(tmp_path):
    def event(cat, name, ts, tid, **more):
        return {
            "ph": "X",
            "cat": cat,
            "name": name,
            "ts": ts,
            "dur": 5,
            "pid": 0,
            "tid": tid,
            **more,
        }

    trace = {
        "traceEvents": [
            event("user_annotation", "compute: mlp F layer 0", 1, 99),
            event("gpu_user_annotation", "compute: mlp F layer 0", 20, 7),
            event("gpu_user_annotation", "comm: dispatch B layer 1", 22, 20),
            event("kernel", "gemm", 20, 7, args={"device": 0, "stream": 7}),
            event("kernel", "ncclDevKernel_SendRecv", 22, 20, args={"device": 0, "stream": 20}),
        ]
    }
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(trace))
    before = measure_overlap(read_trace(path)).total
    add_lanes(trace)
    path.write_text(json.dumps(trace))
    assert measure_overlap(read_trace(path)).total == before
    rows = rows_of(trace)
    assert rows == {"pipeline": [], "compute": ["mlp F layer 0"], "comm": ["dispatch B layer 1"]}
    copied = [e["ts"] for e in trace["traceEvents"] if e.get("cat") == "dualpipe_ext"]
    assert copied == [20, 22]
    names = {
        e["tid"]: e["args"]["name"]
        for e in trace["traceEvents"]
        if e["name"] == "thread_name" and e["pid"] == 0
    }
    assert names == {7: "compute lane", 20: "comm lane"}


def test_without_ranges_the_rows_are_empty(tmp_path):
    path = tmp_path / "trace.json"
    with record_trace(path):
        torch.ones(3).sum()
    assert rows_of(json.loads(path.read_text())) == {"pipeline": [], "compute": [], "comm": []}


def test_a_range_does_not_break_a_compiled_graph():
    def function(x):
        with named_range("part"):
            return x + 1

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))


def test_ranges_are_there_for_a_profiler_only():
    with named_range("unseen"):
        pass
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu]) as profiler, named_range("seen"):
        torch.ones(1)
    names = {event.key for event in profiler.key_averages()}
    assert "seen" in names and "unseen" not in names
