"""How much communication a profiler trace hides behind computation; needs no GPU and no torch.

Reads Chrome traces of `torch.profiler` (`export_chrome_trace`, `tensorboard_trace_handler`), ours
or anybody's, .json or .json.gz. Only what ran on a GPU counts: complete events of the categories
kernel, gpu_memcpy and gpu_memset. Each belongs to one of three kinds:

    communication  the name matches a regular expression, by default `COMM_KERNELS`
    host copy      a copy between host and GPU: neither hides communication nor is it any; the time
                   of nothing but host copies is idle
    computation    everything else: kernels, memsets, copies inside a GPU

For one GPU, over all of its streams, with |.| the length of a union of intervals (so that events
that overlap or nest count once):

    span          from the first start to the last end of any kind
    compute_busy  |computation|
    comm_busy     |communication|
    exposed_comm  |communication without computation|
    hidden_share  1 - exposed_comm / comm_busy
    idle          span - compute_busy - exposed_comm

A kernel that waits for its peers counts as long as it runs, and one that waits for SMs that a
communication kernel holds does not yet run: the hidden share tells where communication lies, not
what it costs the kernels beside it. Compare the span with that of a run without overlap for that.
"""

import gzip
import json
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from decimal import Decimal
from itertools import accumulate
from pathlib import Path
from typing import Any

__all__ = [
    "COMM_KERNELS",
    "GpuEvent",
    "KernelTime",
    "Overlap",
    "OverlapReport",
    "Trace",
    "measure_overlap",
    "read_trace",
]

COMM_KERNELS = "|".join(
    (
        "(?i:nccl|nvshmem)",
        # torch's symmetric memory and vLLM. Inductor names the kernels that it fuses around a
        # collective after it, triton_poi_fused_all_gather_..., and those compute.
        r"(?<![A-Za-z_])(?:one_shot|two_shot|multimem|cross_device)_\w*(?:reduce|gather)",
        # DeepEP and its like. Names that merely end in it are others: flash_fwd_splitkv_combine.
        "internode|intranode|get_dispatch_layout",
        r"(?:^(?:void )?|::|\d)(?:dispatch|combine)(?!\w*::)",
        # Ours. The profiler leaves some names mangled: digits for colons.
        r"dualpipe.{0,99}?(?:::|\d)"
        "(?:pull_rows|push_rows|push_fp8|push_ceiling|push_and_sum|pull_and_sum|gather_and_count"
        "|assign|wait_until_free|wait_outbox|begin_copy|wait_target|tell_target|finish_copy"
        "|wait_link|tell_link)"
        "(?![a-z_])",
        "Memcpy PtoP",
    )
)
"""Names of communication kernels: NCCL, NVSHMEM, symmetric memory, DeepEP, `Exchange`, copies
between GPUs as far as the profiler tells (it shows some through mapped peer memory as DtoD)."""

# Before torch 1.12 they were called Kernel, Memcpy, Memset.
_CATEGORIES = {
    "kernel": "kernel",
    "gpu_memcpy": "memcpy",
    "gpu_memset": "memset",
    "memcpy": "memcpy",
    "memset": "memset",
}
_HOST_COPY = re.compile("HtoD|DtoH|HtoH|HostToDevice|DeviceToHost")
_LONGEST = 10**18  # µs; a time beyond 30,000 years is a broken one


@dataclass(frozen=True, slots=True)
class GpuEvent:
    """Something that ran on a GPU.

    gpu       its number; in a file merged from several ranks, the process as well
    stream    of that GPU
    category  kernel, memcpy or memset
    start     integer ns on the trace's clock, as is end
    """

    gpu: str
    stream: str
    name: str
    category: str
    start: int
    end: int


@dataclass(frozen=True)
class Trace:
    """What ran on the GPUs of a trace.

    skipped           GPU events left out because they have no usable start or length
    rank, world_size  of the process that wrote it, None where the file does not tell
    """

    path: str
    events: tuple[GpuEvent, ...]
    skipped: int = 0
    rank: int | None = None
    world_size: int | None = None

    def __repr__(self) -> str:
        return f"Trace({self.path!r}, {len(self.events)} GPU events, rank={self.rank})"

    def __str__(self) -> str:
        world = "" if self.world_size is None else f" of {self.world_size}"
        rank = "" if self.rank is None else f"rank {self.rank}{world}, "
        skipped = f", {self.skipped} without start or length left out" if self.skipped else ""
        return f"{self.path}: {rank}{len(self.events)} GPU events{skipped}"


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Communication and computation of one GPU, or of all added up. Times in µs."""

    gpu: str
    streams: int
    events: int
    span: float
    compute_busy: float
    comm_busy: float
    exposed_comm: float

    @property
    def hidden_share(self) -> float | None:
        """Share of comm_busy behind computation, None without communication."""
        hidden = self.comm_busy - self.exposed_comm
        return hidden / self.comm_busy if self.comm_busy else None

    @property
    def idle(self) -> float:
        """Time in the span with neither computation nor communication, in µs."""
        return round(self.span - self.compute_busy - self.exposed_comm, 3)

    def to_dict(self) -> dict[str, Any]:
        """Fields and what follows from them, for JSON."""
        return asdict(self) | {"hidden_share": self.hidden_share, "idle": self.idle}

    def __str__(self) -> str:
        times = (self.span, self.compute_busy, self.comm_busy, self.exposed_comm, self.idle)
        hidden = "-" if self.hidden_share is None else f"{self.hidden_share:.1%}"
        return (
            f"{self.gpu:<11} {self.streams:7} {self.events:8}"
            + "".join(f" {time / 1000:10.3f}" for time in times)
            + f" {hidden:>7}"
        )


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """All calls of one kernel on all GPUs, their times added up, in µs.

    exposed  the part of `time` without computation; None for a kernel that computes
    """

    name: str
    calls: int
    time: float
    exposed: float | None = None


@dataclass(frozen=True, kw_only=True)
class OverlapReport:
    """Overlap of every GPU of a trace, their sum, and the kernels that take longest.

    gpus         in order of their numbers
    total        sums over GPUs, so that its span is GPU time, not wall-clock time
    top_comm     longest exposed time first
    top_compute  longest time first
    """

    trace: Trace
    comm: str
    gpus: tuple[Overlap, ...]
    total: Overlap
    top_comm: tuple[KernelTime, ...]
    top_compute: tuple[KernelTime, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `total` on top, then `gpus` and the kernels."""
        total = self.total.to_dict()
        del total["gpu"]
        return {
            "trace": self.trace.path,
            "rank": self.trace.rank,
            "world_size": self.trace.world_size,
            "comm": self.comm,
            "skipped": self.trace.skipped,
            **total,
            "gpus": [gpu.to_dict() for gpu in self.gpus],
            "top_comm": [asdict(kernel) for kernel in self.top_comm],
            "top_compute": [asdict(kernel) for kernel in self.top_compute],
        }

    def __repr__(self) -> str:
        return f"OverlapReport({self.trace!r}, total={self.total!r})"

    def __str__(self) -> str:
        names = ("span", "compute", "comm", "exposed", "idle")
        lines = [
            str(self.trace),
            "GPU         streams   events" + "".join(f" {name:>10}" for name in names) + "  hidden",
        ]
        lines.extend(map(str, self.gpus if len(self.gpus) == 1 else (*self.gpus, self.total)))
        lines.append("times in ms; hidden: share of comm behind computation of the same GPU")
        if not self.total.comm_busy:
            lines.append("no communication found: name its kernels with --comm REGEX")
        if self.top_comm:
            lines += ["", "communication     exposed       time    calls"]
            lines.extend(_line(kernel, kernel.exposed) for kernel in self.top_comm)
        if self.top_compute:
            lines += ["", "computation                     time    calls"]
            lines.extend(_line(kernel, None) for kernel in self.top_compute)
        return "\n".join(lines)


def _line(kernel: KernelTime, exposed: float | None) -> str:
    name = kernel.name.removeprefix("void ")
    name = name if len(name) <= 53 else f"{name[:52]}…"
    shown = "" if exposed is None else f"{exposed / 1000:.3f}"
    return f"{shown:>25} {kernel.time / 1000:10.3f} {kernel.calls:8}  {name}"


def read_trace(path: str | Path) -> Trace:
    """GPU events of a Chrome trace: a list of events or {"traceEvents": [...]}, plain or gzipped.

    Needs about two to three times the size of the JSON text in memory. Unknown and missing fields
    are fine: without a device the process counts as the GPU, without a stream the thread.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no trace, or holds nothing that ran on a GPU.
    """
    found = _parse(path)
    if isinstance(found, dict):
        if "traceEvents" not in found:
            keys = ", ".join(map(repr, list(found)[:5])) or "no keys"
            raise ValueError(
                f'{path} is no trace: it has no "traceEvents" but {keys}; give the file that '
                "torch.profiler's export_chrome_trace wrote"
            )
        events, distributed = found["traceEvents"], found.get("distributedInfo")
    else:
        events, distributed = found, None
    if not isinstance(events, list):
        raise ValueError(
            f"{path} is no trace: its events are {type(events).__name__}, not a list; give the "
            "file that torch.profiler's export_chrome_trace wrote"
        )
    kept = [event for event in events if isinstance(event, dict) and _category(event)]
    gpu_events = _to_gpu_events(kept)
    if not gpu_events:
        what = f"{len(kept)} of a GPU without start or length" if kept else "none of a GPU"
        raise ValueError(
            f"{path} holds {len(events)} events, {what} (categories kernel, gpu_memcpy, "
            "gpu_memset): record it on a machine with a GPU, with ProfilerActivity.CUDA among the "
            "activities of torch.profiler.profile"
        )
    distributed = distributed if isinstance(distributed, dict) else {}
    rank, world_size = (
        value if isinstance(value := distributed.get(key), int) else None
        for key in ("rank", "world_size")
    )
    skipped = len(kept) - len(gpu_events)
    return Trace(str(path), tuple(gpu_events), skipped, rank, world_size)


def _parse(path: str | Path) -> object:
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file: {error}; copy it again") from None
    # Kernel names hold what the compiler wrote: neither bad UTF-8 nor control characters are fatal.
    text = data.decode("utf-8-sig", errors="replace")
    del data
    try:
        # Decimal, because µs since 1970 with three digits after the point do not fit a float.
        return json.loads(text, object_hook=_drop_host_event, parse_float=Decimal, strict=False)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON, or not all of it is there: {error}; let the profiler finish "
            "writing, and copy the file again"
        ) from None


def _drop_host_event(value: dict[str, Any]) -> dict[str, Any] | None:
    """Keeps the memory of millions of host events from piling up while the parser runs."""
    return None if "ph" in value and not _category(value) else value


def _category(event: dict[str, Any]) -> str | None:
    category = event.get("cat")
    return _CATEGORIES.get(category.lower()) if isinstance(category, str) else None


def _to_gpu_events(events: list[dict[str, Any]]) -> list[GpuEvent]:
    places = [_place(event) for event in events]
    devices: dict[str, set[str]] = {}  # of a process
    for process, device, _ in places:
        if device:
            devices.setdefault(process, set()).add(device)
    found = []
    for event, (process, device, stream) in zip(events, places, strict=True):
        start, length = _nanoseconds(event.get("ts")), _nanoseconds(event.get("dur"))
        if event.get("ph", "X") != "X" or start is None or length is None or length < 0:
            continue
        category = _category(event)
        assert category is not None  # `read_trace` keeps no others
        if not device and len(devices.get(process, ())) == 1:
            (device,) = devices[process]
        if not device or not process or process == device:
            gpu = device or process or "?"
        else:
            gpu = f"{process} GPU {device}"
        name = str(event.get("name", "?"))
        found.append(GpuEvent(gpu, stream, name, category, start, start + length))
    return found


def _place(event: dict[str, Any]) -> tuple[str, str, str]:
    """Process, device and stream, each "" where unknown.

    The profiler writes the device as the process. Whoever merges ranks into one file renames the
    processes and leaves the device, which then is 0 on many ranks. Peer copies say inDevice.
    """
    arguments = event.get("args")
    arguments = arguments if isinstance(arguments, dict) else {}
    device = arguments.get("device", arguments.get("inDevice"))
    stream = arguments.get("stream", event.get("tid"))
    process, device, stream = (
        "" if place is None else str(place) for place in (event.get("pid"), device, stream)
    )
    return process, device, stream


def _nanoseconds(microseconds: object) -> int | None:
    if not isinstance(microseconds, (int, Decimal)) or isinstance(microseconds, bool):
        return None
    return round(microseconds * 1000) if -_LONGEST < microseconds < _LONGEST else None


def measure_overlap(trace: Trace, comm: str = COMM_KERNELS, *, top: int = 5) -> OverlapReport:
    """Measure what the module's head defines, per GPU and in total.

    Args:
        trace: from `read_trace`.
        comm: regular expression, searched anywhere in the name of an event; replaces the default.
        top: how many kernels of each kind to list.

    For example computation in [0, 10) and communication in [6, 16) µs have span 16, compute_busy
    10, comm_busy 10, exposed_comm 6 and hidden_share 0.4. Takes n log n time for n GPU events.

    Raises:
        ValueError: if `comm` is no regular expression.
    """
    try:
        pattern = re.compile(comm)
    except re.error as error:
        raise ValueError(
            f"comm={comm!r} is no regular expression: {error}; escape signs that stand for "
            "themselves with \\"
        ) from None
    is_comm = {name: bool(pattern.search(name)) for name in {event.name for event in trace.events}}
    by_gpu: dict[str, list[GpuEvent]] = {}
    for event in trace.events:
        by_gpu.setdefault(event.gpu, []).append(event)
    calls: dict[tuple[bool, str], list[int]] = {}  # → calls, time, exposed
    gpus = [_measure_gpu(gpu, by_gpu[gpu], is_comm, calls) for gpu in sorted(by_gpu, key=_natural)]
    top_comm, top_compute = _longest(calls, top)
    return OverlapReport(
        trace=trace,
        comm=comm,
        gpus=tuple(gpus),
        total=_add(gpus),
        top_comm=top_comm,
        top_compute=top_compute,
    )


class _Union:
    """Union of half-open intervals of integers."""

    def __init__(self, intervals: Iterable[tuple[int, int]]):
        self.starts: list[int] = []
        self.ends: list[int] = []
        for start, end in sorted(intervals):
            if self.ends and start <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], end)
            else:
                self.starts.append(start)
                self.ends.append(end)
        lengths = (end - start for start, end in zip(self.starts, self.ends, strict=True))
        self.before = list(accumulate(lengths, initial=0))  # length of the first i intervals

    @property
    def length(self) -> int:
        return self.before[-1]

    def up_to(self, time: int) -> int:
        """Length of the part that lies before `time`."""
        i = bisect_right(self.starts, time)
        return self.before[i] - max(self.ends[i - 1] - time, 0) if i else 0

    def free(self, start: int, end: int) -> int:
        """Length of the part of [start, end) outside the union."""
        return end - start - (self.up_to(end) - self.up_to(start))


def _measure_gpu(
    gpu: str,
    events: list[GpuEvent],
    is_comm: dict[str, bool],
    calls: dict[tuple[bool, str], list[int]],
) -> Overlap:
    comm_events = [event for event in events if is_comm[event.name]]
    compute_events = [
        event
        for event in events
        if not is_comm[event.name]
        and not (event.category == "memcpy" and _HOST_COPY.search(event.name))
    ]
    compute = _Union((event.start, event.end) for event in compute_events)
    comm = _Union((event.start, event.end) for event in comm_events)
    for comm_kernel, some in ((True, comm_events), (False, compute_events)):
        for event in some:
            entry = calls.setdefault((comm_kernel, event.name), [0, 0, 0])
            entry[0] += 1
            entry[1] += event.end - event.start
            if comm_kernel:
                entry[2] += compute.free(event.start, event.end)
    span = max(event.end for event in events) - min(event.start for event in events)
    exposed = sum(map(compute.free, comm.starts, comm.ends))
    return Overlap(
        gpu=gpu,
        streams=len({event.stream for event in events}),
        events=len(events),
        span=span / 1000,
        compute_busy=compute.length / 1000,
        comm_busy=comm.length / 1000,
        exposed_comm=exposed / 1000,
    )


def _longest(
    calls: dict[tuple[bool, str], list[int]], top: int
) -> tuple[tuple[KernelTime, ...], tuple[KernelTime, ...]]:
    comm, compute = [], []
    for (comm_kernel, name), (count, time, exposed) in calls.items():
        if comm_kernel:
            comm.append(
                KernelTime(name=name, calls=count, time=time / 1000, exposed=exposed / 1000)
            )
        else:
            compute.append(KernelTime(name=name, calls=count, time=time / 1000))
    comm.sort(key=lambda kernel: (-(kernel.exposed or 0), -kernel.time))
    compute.sort(key=lambda kernel: -kernel.time)
    return tuple(comm[:top]), tuple(compute[:top])


def _add(gpus: list[Overlap]) -> Overlap:
    names = ("streams", "events", "span", "compute_busy", "comm_busy", "exposed_comm")
    sums = {name: round(sum(getattr(gpu, name) for gpu in gpus), 3) for name in names}  # whole ns
    return Overlap(gpu="total", **sums)


def _natural(text: str) -> list[tuple[bool, int, str]]:
    """GPU 10 after GPU 9."""
    parts = re.split(r"([0-9]+)", text)
    return [(True, int(part), "") if i % 2 else (False, 0, part) for i, part in enumerate(parts)]
