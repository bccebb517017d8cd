"""`dualpipe-ext trace`: hand-made traces with known answers, an oracle on a grid, broken files."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_ext.cli import main
from dualpipe_ext.trace import report as trace_module
from dualpipe_ext.trace.report import COMM_KERNELS, measure_overlap, read_trace

COMM = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_nn_n_tilesize128x128x64"


def event(name, ts, dur, *, gpu=0, stream=7, cat="kernel"):
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "pid": gpu,
        "tid": stream,
        "ts": ts,
        "dur": dur,
        "args": {"device": gpu, "stream": stream, "grid": [132, 1, 1]},
    }


def write(path, events, **more):
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events} | more))
    return path


@pytest.fixture
def measure(tmp_path):
    def measure(events, comm=COMM_KERNELS, **more):
        return measure_overlap(read_trace(write(tmp_path / "trace.json", events)), comm, **more)

    return measure


def figures(overlap):
    return (
        overlap.span,
        overlap.compute_busy,
        overlap.comm_busy,
        overlap.exposed_comm,
        overlap.idle,
        overlap.hidden_share,
    )


def test_communication_that_sticks_out_is_exposed(measure):
    found = measure([event(GEMM, 0, 10), event(COMM, 6, 10, stream=27)])
    assert figures(found.total) == (16, 10, 10, 6, 0, 0.4)
    assert found.gpus[0].gpu == "0"
    assert (found.gpus[0].streams, found.gpus[0].events) == (2, 2)


def test_overlapping_nested_and_zero_length_events_count_once(measure):
    events = [
        event(GEMM, 100, 50),
        event(GEMM, 110, 10, stream=8),  # nested
        event(GEMM, 140, 20, stream=8),  # sticks out of the first to 160
        event("memset", 160, 0, cat="gpu_memset"),
        event(COMM, 150, 30, stream=20),
        event(COMM, 155, 5, stream=21),  # nested
        event(COMM, 200, 5, stream=20),
        event(GEMM, 230, 0),  # the span reaches it
    ]
    # computation [100, 160), communication [150, 180) and [200, 205)
    assert figures(measure(events).total) == (130, 60, 35, 25, 45, 10 / 35)
    assert figures(measure(events[::-1]).total) == figures(measure(events).total)


def test_copies_inside_a_gpu_compute_and_copies_of_the_host_do_not(measure):
    events = [
        event(COMM, 0, 10),
        event("Memcpy DtoD (Device -> Device)", 0, 2, stream=8, cat="gpu_memcpy"),
        event("Memset (Device)", 2, 1, stream=8, cat="gpu_memset"),
        event("Memcpy HtoD (Pinned -> Device)", 3, 9, stream=8, cat="gpu_memcpy"),
        event("Memcpy DtoH (Device -> Pinned)", 12, 3, stream=8, cat="gpu_memcpy"),
        event("Memcpy PtoP (Device -> Device)", 20, 4, stream=8, cat="gpu_memcpy"),
    ]
    found = measure(events)
    assert figures(found.total) == (24, 3, 14, 11, 10, 3 / 14)
    shown = {kernel.name for kernel in found.top_compute}
    assert shown == {"Memcpy DtoD (Device -> Device)", "Memset (Device)"}
    offload = measure(events, comm="HtoD|DtoH").total
    assert (offload.comm_busy, offload.compute_busy) == (12, 14)


def test_what_ran_on_the_host_and_annotations_do_not_count(measure):
    others = [
        event("aten::mm", 0, 1000, cat="cpu_op"),
        event("nccl:all_reduce", 0, 1000, cat="gpu_user_annotation"),
        event("Stream Wait Event", 0, 1000, cat="cuda_sync"),
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 1, "pid": 0, "tid": 7, "ts": 0},
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python3"}},
        {"ph": "i", "name": "Record Window End", "ts": 5000},
    ]
    found = measure([*others, event(GEMM, 100, 5), *others])
    assert figures(found.total) == (5, 5, 0, 0, 0, None)


def test_gpus_hide_their_own_communication_only_and_add_up(measure):
    events = [event(COMM, 0, 10, gpu=gpu) for gpu in (10, 9, 2)]
    events += [event(GEMM, 0, 10, gpu=2), event(GEMM, 8, 8, gpu=9)]
    found = measure(events)
    assert [gpu.gpu for gpu in found.gpus] == ["2", "9", "10"]
    assert [gpu.hidden_share for gpu in found.gpus] == [1, 0.2, 0]
    assert figures(found.total) == (36, 18, 30, 18, 0, 0.4)
    assert "\ntotal " in str(found)


def test_ranks_merged_into_one_file_stay_apart(measure):
    events = []
    for rank in range(2):
        for one in (event(GEMM, 0, 10), event(COMM, 5 * rank, 10, stream=8)):
            events.append(one | {"pid": f"[rank {rank}] 0"})
    peer = event("Memcpy PtoP (Device -> Device)", 30, 2, cat="gpu_memcpy")
    events.append(peer | {"pid": "[rank 1] 0", "args": {"fromDevice": 0, "inDevice": 0}})
    events.append(event(GEMM, 40, 1) | {"pid": "[rank 1] 0", "args": {}})
    found = measure(events)
    assert [gpu.gpu for gpu in found.gpus] == ["[rank 0] 0 GPU 0", "[rank 1] 0 GPU 0"]
    assert [gpu.exposed_comm for gpu in found.gpus] == [0, 7]
    assert [gpu.span for gpu in found.gpus] == [10, 41]


def test_one_process_with_two_devices(measure):
    events = [event(COMM, 0, 4) | {"pid": 0, "args": {"device": gpu}} for gpu in (0, 1)]
    events.append(event(GEMM, 0, 4))
    peer = event("Memcpy PtoP (Device -> Device)", 4, 4, cat="gpu_memcpy")
    events.append(peer | {"args": {"fromDevice": 0, "inDevice": 1, "toDevice": 1}})
    assert [gpu.hidden_share for gpu in measure(events).gpus] == [1, 0]


def test_missing_and_odd_fields(measure):
    events = [
        {"cat": "kernel", "ts": 0, "dur": 3},
        {"cat": "kernel", "ts": 1, "dur": 4, "pid": None, "tid": 3, "name": COMM, "args": None},
        {"cat": "Kernel", "ts": 5, "dur": 1, "ph": "X", "name": GEMM, "args": {"device": None}},
        event(GEMM, None, 1),
        event(GEMM, 7, -1),
        event(GEMM, "7", 1),
        event(GEMM, 7, float("nan")),
        event(GEMM, 7, 10**30),
        event(GEMM, 7, True),
        event(GEMM, 7, 1) | {"ph": "B"},
        event(GEMM, 7, 1, cat=["kernel"]),
        "no event",
        7,
    ]
    found = measure(events)
    assert figures(found.total) == (6, 4, 4, 2, 0, 0.5)
    assert found.gpus[0].gpu == "?"
    assert found.trace.skipped == 7
    assert "3 GPU events, 7 without start or length left out" in str(found)


def test_times_since_1970_keep_their_nanoseconds(tmp_path):
    start = "1740461679471346"  # µs: neighbours as float are 0.25 apart
    text = json.dumps([event(GEMM, 111, 222), event(COMM, 333, 444)])
    for old, new in (("111", f"{start}.001"), ("222", "0.002"), ("333", f"{start}.002")):
        text = text.replace(old, new)
    path = tmp_path / "trace.json"
    path.write_text(text.replace("444", "0.004"))
    first, second = read_trace(path).events
    assert (first.start, first.end) == (int(start) * 1000 + 1, int(start) * 1000 + 3)
    assert (second.start, second.end) == (int(start) * 1000 + 2, int(start) * 1000 + 6)
    assert measure_overlap(read_trace(path)).total.exposed_comm == 0.003


def test_longest_kernels(measure):
    events = [
        event("nccl_a", 0, 10),
        event("nccl_a", 20, 10),
        event("nccl_b", 40, 6),
        event("nccl_c", 60, 1),
        event("gemm", 0, 10, stream=8),
        event("gemm", 15, 10, stream=8),
        event("norm", 15, 4, stream=9),
    ]
    found = measure(events, top=2)
    rows = [(k.name, k.calls, k.time, k.exposed) for k in found.top_comm]
    assert rows == [("nccl_b", 1, 6, 6), ("nccl_a", 2, 20, 5)]
    rows = [(k.name, k.calls, k.time, k.exposed) for k in found.top_compute]
    assert rows == [("gemm", 2, 20, None), ("norm", 1, 4, None)]


@st.composite
def grid_events(draw):
    kinds = {COMM: "kernel", GEMM: "kernel", "Memcpy HtoD (Pinned -> Device)": "gpu_memcpy"}
    name = draw(st.sampled_from(sorted(kinds)))
    start, length = draw(st.integers(0, 24)), draw(st.integers(0, 9))
    where = {"gpu": draw(st.integers(0, 1)), "stream": draw(st.integers(1, 3))}
    return event(name, start, length, cat=kinds[name], **where)


@given(st.lists(grid_events(), min_size=1, max_size=14))
@settings(max_examples=300)
def test_agrees_with_counting_cells_of_a_grid(tmp_path_factory, events):
    path = tmp_path_factory.getbasetemp() / "grid.json"
    found = measure_overlap(read_trace(write(path, events)))
    exposed_calls = {}
    for gpu in found.gpus:
        mine = [one for one in events if str(one["pid"]) == gpu.gpu]
        cells = {name: set() for name in (COMM, GEMM)}
        for one in mine:
            if one["name"] in cells:
                cells[one["name"]] |= set(range(one["ts"], one["ts"] + one["dur"]))
        first = min(one["ts"] for one in mine)
        last = max(one["ts"] + one["dur"] for one in mine)
        exposed = sum(cell in cells[COMM] and cell not in cells[GEMM] for cell in range(40))
        assert gpu.span == last - first
        assert gpu.compute_busy == len(cells[GEMM])
        assert gpu.comm_busy == len(cells[COMM])
        assert gpu.exposed_comm == exposed
        assert gpu.idle == last - first - len(cells[GEMM] | cells[COMM])
        if cells[COMM]:
            hidden = len(cells[COMM] & cells[GEMM]) / len(cells[COMM])
            assert gpu.hidden_share == pytest.approx(hidden)
        for one in mine:
            if one["name"] == COMM:
                call = set(range(one["ts"], one["ts"] + one["dur"])) - cells[GEMM]
                exposed_calls[COMM] = exposed_calls.get(COMM, 0) + len(call)
    assert {kernel.name: kernel.exposed for kernel in found.top_comm} == exposed_calls
    assert sum(gpu.events for gpu in found.gpus) == found.total.events == len(events)


@pytest.mark.parametrize(
    "name",
    [
        COMM,
        "ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclWorkElem)",
        "nvshmemi_transfer_rma_p_kernel",
        "void multimem_all_reduce_kernel<c10::BFloat16, 16>(c10::BFloat16*, unsigned long)",
        "void vllm::cross_device_reduce_2stage<__nv_bfloat16, 8>(vllm::RankData*)",
        "void dpsk::ep::internode::cached_notify<false>(int, int, int, int, int*)",
        "void deep_ep::intranode::combine<__nv_bfloat16, 8, 768>(__nv_bfloat16*, float*)",
        "void deep_ep::internode_ll::dispatch<true, 3, 10, 7168>(void*, float*, int*)",
        "void deep_ep::layout::get_dispatch_layout<256, 32, 8>(long const*, int*, int*)",
        "void hybrid_ep::dispatch_kernel<int>(int)",
        "void dualpipe::(anonymous namespace)::push_and_sum<__nv_bfloat16>(dualpipe::Exchange)",
        "dualpipe::(anonymous namespace)::pull_rows(dualpipe::Exchange, dualpipe::DispatchArgs)",
        "dualpipe::<unnamed>::gather_and_count(dualpipe::Exchange, dualpipe::PlanArgs)",
        "dualpipe::(anonymous namespace)::assign(dualpipe::Exchange, dualpipe::PlanArgs)",
        "dualpipe::wait_until_free(dualpipe::Exchange, int)",
        "_ZN8dualpipe39_GLOBAL__N__e62f1a8b_7_plan_cu_363579706assignENS_8ExchangeENS_8PlanArgsE",
        "_ZN8dualpipe43_GLOBAL__N__8a7eecc5_10_combine_cu_ebded37d12push_and_sumIfEEvNS_8ExchangeE",
        "Memcpy PtoP (Device -> Device)",
    ],
)
def test_communication_by_its_name(name):
    assert re.search(COMM_KERNELS, name)


def test_every_kernel_of_the_exchange_is_communication():
    sources = sorted((Path(__file__).parents[2] / "csrc").rglob("*.cu"))
    pattern = r"__global__ void\s+(?:__launch_bounds__\(.*\)\s+)?(\w+)\("
    kernels = [name for path in sources for name in re.findall(pattern, path.read_text())]
    assert len(kernels) == sum(path.read_text().count("__global__") for path in sources) > 0
    for name in kernels:
        assert re.search(COMM_KERNELS, f"void dualpipe::<unnamed>::{name}(dualpipe::Exchange)")
        mangled = f"_ZN8dualpipe39_GLOBAL__N__e62f1a8b_7_some_cu_36357970{len(name)}{name}ENS_8Ex"
        assert re.search(COMM_KERNELS, mangled), name


@pytest.mark.parametrize(
    "name",
    [
        GEMM,
        "void flash_fwd_splitkv_combine_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4>>()",
        "void cutlass::epilogue::LinearCombination<float>()",
        "void cub::DeviceReduceKernel<cub::DispatchReduce<float>>(float*)",
        "triton_poi_fused_all_gather_into_tensor_wait_tensor_3",
        "triton_red_fused_one_shot_all_reduce_rms_norm_1",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>()",
        "void ns::dispatch_tables::transpose<float>(float*)",
        "void mylib::assign(float*)",
        "void thrust::assign_kernel<float>()",
        "gate_up_kernel",
        "grouped_gemm_kernel",
        "Memcpy DtoD (Device -> Device)",
    ],
)
def test_computation_by_its_name(name):
    assert not re.search(COMM_KERNELS, name)


def test_gzip_bare_list_and_byte_order_mark_read_alike(tmp_path):
    events = [event(GEMM, 0, 10), event(COMM, 6, 10)]
    plain = read_trace(write(tmp_path / "trace.json", events)).events
    bare = json.dumps(events).encode()
    for name, data in {
        "list.json": bare,
        "list.json.gz": gzip.compress(bare),
        "zipped without suffix": gzip.compress((tmp_path / "trace.json").read_bytes()),
        "bom.json": b"\xef\xbb\xbf" + bare,
    }.items():
        (tmp_path / name).write_bytes(data)
        assert read_trace(tmp_path / name).events == plain


def test_kernel_names_with_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "trace.json"
    path.write_bytes(json.dumps([event("NAME", 0, 1)]).encode().replace(b"NAME", b"a\xff\tb"))
    assert read_trace(path).events[0].name == "a�\tb"


def test_data_prints_well(tmp_path):
    events = [event(GEMM, 0, 1500), event("void " + 80 * "n", 0, 5), event(COMM, 6000, 1000)]
    where = {"distributedInfo": {"backend": "nccl", "rank": 3, "world_size": 64}}
    trace = read_trace(write(tmp_path / "trace.json", events, **where))
    assert repr(trace) == f"Trace({str(tmp_path / 'trace.json')!r}, 3 GPU events, rank=3)"
    lines = str(measure_overlap(trace)).splitlines()
    assert lines[0].endswith("trace.json: rank 3 of 64, 3 GPU events")
    names = ["GPU", "streams", "events", "span", "compute", "comm", "exposed", "idle", "hidden"]
    assert lines[1].split() == names
    assert lines[2].split() == ["0", "1", "3", "7.000", "1.500", "1.000", "1.000", "4.500", "0.0%"]
    assert max(map(len, lines[1:])) <= 100
    assert lines[6].split() == ["1.000", "1.000", "1", f"{COMM[:52]}…"]


def test_cpu_trace_of_torch_holds_no_gpu(tmp_path, capsys):
    path = tmp_path / "cpu.json.gz"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(4, 4) @ torch.ones(4, 4)
    profiler.export_chrome_trace(str(path))
    with pytest.raises(
        ValueError, match=r"holds \d+ events, none of a GPU .*ProfilerActivity.CUDA"
    ):
        read_trace(path)
    assert main(["trace", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"dualpipe-ext trace: {path} holds ")


WHOLE = json.dumps({"traceEvents": [event(GEMM, 0, 10)]}).encode()
BAD_FILES = {
    "empty": (b"", "is not JSON, or not all of it is there.*copy the file again"),
    "cut off": (WHOLE[:-20], "is not JSON, or not all of it is there"),
    "binary": (bytes(range(256)), "is not JSON"),
    "deep": (b"[" * 200_000, "is not JSON"),
    "huge exponent": (WHOLE.replace(b'"ts": 0', b'"ts": 1e99999999999999999999'), "is not JSON"),
    "cut gzip": (gzip.compress(WHOLE)[:-12], "is no whole gzip file.*copy it again"),
    "bad gzip": (b"\x1f\x8b" + bytes(range(64)), "is no whole gzip file"),
    "other JSON": (b'{"loads": [1]}', "has no \"traceEvents\" but 'loads'.*export_chrome_trace"),
    "no keys": (b"{}", 'has no "traceEvents" but no keys'),
    "number": (b"7", "events are int, not a list"),
    "dict of events": (b'{"traceEvents": {}}', "events are dict, not a list"),
    "no events": (b"[]", "holds 0 events, none of a GPU"),
    "no times": (WHOLE.replace(b'"dur"', b'"d"'), "holds 1 events, 1 of a GPU without start or"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_named_with_its_fault_and_remedy(tmp_path, capsys, case):
    data, message = BAD_FILES[case]
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} .*{message}"):
        read_trace(path)
    assert main(["trace", str(path)]) == 2
    shown = capsys.readouterr()
    assert str(path) in shown.err
    assert shown.out == ""


def test_command_line(tmp_path, capsys):
    path = str(write(tmp_path / "t.json", [event(GEMM, 0, 10), event("mine", 6, 10, stream=9)]))
    assert main(["trace", path]) == 0
    assert "no communication found: name its kernels with --comm REGEX" in capsys.readouterr().out
    assert main(["trace", path, "--comm", "^mine$"]) == 0
    assert "40.0%" in capsys.readouterr().out
    assert main(["trace", path, "--comm", "^mine$", "--json"]) == 0
    overlap = {
        "streams": 2,
        "events": 2,
        "span": 16,
        "compute_busy": 10,
        "comm_busy": 10,
        "exposed_comm": 6,
        "hidden_share": 0.4,
        "idle": 0,
    }
    assert json.loads(capsys.readouterr().out) == {
        "trace": path,
        "rank": None,
        "world_size": None,
        "comm": "^mine$",
        "skipped": 0,
        **overlap,
        "gpus": [{"gpu": "0", **overlap}],
        "top_comm": [{"name": "mine", "calls": 1, "time": 10, "exposed": 6}],
        "top_compute": [{"name": GEMM, "calls": 1, "time": 10, "exposed": None}],
    }


def test_command_line_refuses(tmp_path, capsys):
    path = str(write(tmp_path / "t.json", [event(GEMM, 0, 10)]))
    assert main(["trace", path, "--comm", "nccl("]) == 2
    assert "comm='nccl(' is no regular expression: missing )" in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "absent.json")]) == 2
    assert "absent.json" in capsys.readouterr().err
    assert main(["trace", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_runs_without_torch():
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('trace_alone', sys.argv[1])\n"
        "module = sys.modules['trace_alone'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "print(module.Trace('x', ()))"
    )
    command = [sys.executable, "-c", program, str(Path(trace_module.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "x: 0 GPU events\n"), done.stderr
