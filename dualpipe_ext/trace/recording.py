"""Record a run as a Chrome trace (Perfetto, chrome://tracing) with named lanes and stages.

    with record_trace(f"trace.{rank}.json.gz"):
        pipeline.step(...)

It is torch.profiler's trace, which `dualpipe-ext trace` reads, with rows of its own on top: what
the pipeline ran ("F of stage 1, chunk 3, direction 0"), and the segments of both lanes of its
overlapped pairs. On a GPU the lanes' rows show when a segment's kernels ran, and the two streams
carry the lanes' names; elsewhere they show when the host ran it.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .ranges import LANES

__all__ = ["add_lanes", "record_trace"]

ROWS = ("pipeline", *LANES)
CATEGORY = "dualpipe_ext"  # neither a kernel nor a copy: `dualpipe-ext trace` does not count it


@contextmanager
def record_trace(path: str | Path) -> Iterator[None]:
    """Profile the block and write `path`, .json or .json.gz; each rank names a file of its own.

    Profiling costs host time, about 2 µs an operator: look at lanes and overlap, not at seconds.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities) as profiler:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(raw))
        trace = json.loads(raw.read_text(encoding="utf-8", errors="replace"), strict=False)
    text = json.dumps(add_lanes(trace)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def add_lanes(trace: dict[str, Any]) -> dict[str, Any]:
    """A profiler's trace with a process "dualpipe_ext", whose rows are `ROWS`, added in place.

    Ranges named "compute: ...", "comm: ..." and "pipeline: ..." are copied there: those of the GPU
    where there are any, else those of the host.
    """
    events = trace["traceEvents"]
    host = [event for event in events if _row(event) and event.get("cat") == "user_annotation"]
    gpu = [event for event in events if _row(event) and event.get("cat") == "gpu_user_annotation"]
    process = "dualpipe_ext"
    added = [
        _name("process_name", process, 0, process),
        _sort("process_sort_index", process, 0, -1),
    ]
    for number, row in enumerate(ROWS):
        added += [
            _name("thread_name", process, number, row),
            _sort("thread_sort_index", process, number, number),
        ]
    for event in gpu or host:
        row, _, name = event["name"].partition(": ")
        added.append(
            {
                **{
                    "ph": "X",
                    "cat": CATEGORY,
                    "name": name,
                    "ts": event["ts"],
                    "dur": event["dur"],
                },
                **{"pid": process, "tid": ROWS.index(row)},
            }
        )
    streams = {(event["pid"], event["tid"]): _row(event) for event in gpu if _row(event) in LANES}
    # A comm segment may end with a kernel on the compute stream, never the other way round.
    streams |= {(e["pid"], e["tid"]): "compute" for e in gpu if _row(e) == "compute"}
    added += [_name("thread_name", pid, tid, f"{row} lane") for (pid, tid), row in streams.items()]
    events += added
    return trace


def _row(event: dict[str, Any]) -> str | None:
    """Which row a range belongs to; None for all other events."""
    if event.get("ph") != "X":
        return None
    row, separator, _ = str(event.get("name")).partition(": ")
    return row if separator and row in ROWS else None


def _name(kind: str, pid: object, tid: object, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _sort(kind: str, pid: object, tid: object, index: int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"sort_index": index}}
