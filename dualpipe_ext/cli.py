"""The command `dualpipe-ext`: a subcommand adds its parser here and imports its module when run."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeAlias

from . import __version__

__all__ = ["main"]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

INFO_JSON = """\
keys of --json:
  package      version, path
  python       version
  torch        version; cuda, nccl: versions that it carries, or null
  triton       version or null
  unchecked    [a line, with the remedy, for a torch or Triton that this package was not run with]
  driver       version; cuda: the newest CUDA that it runs; null without a driver
  gpus         [{index, name, capability, sms, memory_bytes}]
  peer_access  [i][j]: whether GPU i can address the memory of GPU j
  build        built; archs, nvcc, nvcc_version, host_compiler, sources, or the reason why not;
               importable, error
  backend      name that backend="auto" chooses over all GPUs of this machine, reason
"""

BALANCE_JSON = """\
LOADS: one row a layer, one number (tokens) an expert; .csv, or .json with rows or {"loads": rows}

keys of --json:
  physical_to_logical    [layer][slot] expert in every slot, GPU by GPU
  count                  [layer][expert] copies
  before, after          gpu_load [layer][gpu], balance [layer]: mean / heaviest load of a GPU;
                         before: placement; after: copies_beside_another
  lower_bound            [layer] no placement has a lighter heaviest GPU
  copies_to_send         [layer] copies whose GPU has none of that expert today; null if unknown
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dualpipe-ext`, by default with the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dualpipe-ext", description="Tools of dualpipe_ext.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_info(commands)
    _add_schedule(commands)
    _add_balance(commands)
    _add_trace(commands)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


def _add_info(commands: Commands) -> None:
    info = commands.add_parser(
        "info",
        help="versions, GPUs, what was built, which backend is chosen and why",
        description="Shows what dualpipe_ext found on this machine.",
        epilog=INFO_JSON,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    info.add_argument("--json", action="store_true", help="machine-readable, keys below")
    info.set_defaults(run=_run_info)


def _run_info(options: argparse.Namespace) -> int:
    from .environment import describe_environment, format_environment

    found = describe_environment()
    print(json.dumps(found, indent=2) if options.json else format_environment(found))
    return 0


SCHEDULE_JSON = """\
keys of --json:
  kind, num_ranks, num_chunks, num_stages, times {f, b, w, fb, p2p}
  makespan          time from the first start to the last end
  bubble            [rank]: makespan less the time in which the rank runs something
  peak_activations  [rank]: most activations alive at once, each from a chunk's F to its B or W
  actions           [rank][i], in order: {op: F | B | I | W, stage, chunk, direction}, or
                    {op: FB, forward: {...}, backward: {...}} for an overlapped pair
"""


def _add_schedule(commands: Commands) -> None:
    schedule = commands.add_parser(
        "schedule",
        help="time, bubble, memory and drawing of a pipeline schedule",
        description="Runs a pipeline schedule on paper. Times are those of one stage, in any unit.",
        epilog=SCHEDULE_JSON,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = schedule.add_argument
    add("kind", metavar="KIND", help="1f1b, zb1p, zbv, dualpipev or dualpipe")
    add("--ranks", type=int, required=True, metavar="R", help="pipeline ranks")
    add("--chunks", type=int, required=True, metavar="M", help="micro-batches of all directions")
    add("--f", type=Fraction, default=1, help="forward (1)")
    add("--b", type=Fraction, default=2, help="full backward, for inputs and weights (2)")
    add("--w", type=Fraction, default=1, help="the weights' share of --b (1)")
    add("--fb", type=Fraction, help="an overlapped pair (--f plus --b)")
    add("--p2p", type=Fraction, default=0, help="transfer between two ranks (0)")
    add(
        "--comm-ratio",
        type=Fraction,
        metavar="C",
        help="communication : computation; adds it to --f and --b, pairs hide it, instead of --fb",
    )
    add("--json", action="store_true", help="machine-readable, keys below")
    add("--plot", metavar="FILE", help="draw into FILE.svg, or FILE.png with matplotlib")
    schedule.set_defaults(run=_run_schedule)


def _run_schedule(options: argparse.Namespace) -> int:
    from .pipeline.draw import describe_simulation, save_plot
    from .pipeline.schedule import build_schedule
    from .pipeline.simulate import Times, simulate

    try:
        if options.fb is not None and options.comm_ratio is not None:
            raise ValueError("--fb and --comm-ratio both set the time of a pair: leave one out")
        schedule = build_schedule(options.kind, options.ranks, options.chunks)
        times = Times(f=options.f, b=options.b, w=options.w, fb=options.fb, p2p=options.p2p)
        if options.comm_ratio is not None:
            times = times.with_communication(options.comm_ratio)
        found = simulate(schedule, times)
        if options.plot:
            save_plot(found, options.plot)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        print(f"dualpipe-ext schedule: {error}", file=sys.stderr)
        return 2
    columns = shutil.get_terminal_size((160, 24)).columns
    print(json.dumps(found.as_dict()) if options.json else describe_simulation(found, columns))
    return 0


def _add_balance(commands: Commands) -> None:
    balance = commands.add_parser(
        "balance",
        help="place and copy experts for given loads; load per GPU before and after",
        description="Spreads experts, and copies of the busiest ones, over GPUs.",
        epilog=BALANCE_JSON,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = balance.add_argument
    add("loads", metavar="LOADS.json|csv", help="load statistics, see below")
    add("--gpus", type=int, default=8, help="GPUs of the expert-parallel group (8)")
    add("--replicas", type=int, help="slots for experts and copies (as few as fill all GPUs)")
    add("--nodes", type=int, default=1, help="hosts (1)")
    add("--groups", type=int, default=1, help="expert groups, kept whole on a node (1)")
    add("--policy", choices=["deepseek", "improved"], default="deepseek", help="(deepseek)")
    add("--current", metavar="FILE", help="today's physical_to_logical, or an output of --json")
    add("--max-moved", type=int, metavar="N", help="send at most N copies; needs --current")
    add("--json", action="store_true", help="machine-readable, keys below")
    add("--plot", metavar="FILE", help="draw load per GPU into FILE.png, .svg or .pdf (matplotlib)")
    balance.set_defaults(run=_run_balance)


def _run_balance(options: argparse.Namespace) -> int:
    from .balance.report import balance, plot_balancing, read_loads, read_placement

    try:
        found = balance(
            read_loads(options.loads),
            num_gpus=options.gpus,
            num_replicas=options.replicas,
            num_groups=options.groups,
            num_nodes=options.nodes,
            policy=options.policy,
            current=read_placement(options.current) if options.current else None,
            max_moved=options.max_moved,
        )
        if options.plot:
            plot_balancing(found, options.plot)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        print(f"dualpipe-ext balance: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.to_dict()) if options.json else found)
    return 0


TRACE_JSON = """\
Counts kernels, copies and memsets on GPUs. Communication is what --comm finds in their names, by
default NCCL, NVSHMEM, symmetric memory, DeepEP, dualpipe_ext and copies between GPUs; computation
is the rest without copies from and to the host. Overlapping events of a GPU count once.

keys of --json, times in microseconds:
  trace, rank, world_size, comm, skipped: GPU events without start or length
  span              from the first start to the last end
  compute_busy      length of the union of computation
  comm_busy         length of the union of communication
  exposed_comm      length of communication without computation
  hidden_share      1 - exposed_comm / comm_busy; null without communication
  idle              span - compute_busy - exposed_comm
  streams, events   how many; all of these from span on are sums over GPUs
  gpus              [{gpu, and the same of this GPU alone}]
  top_comm          [{name, calls, time, exposed}], longest exposed first
  top_compute       [{name, calls, time, exposed: null}], longest first
"""


def _add_trace(commands: Commands) -> None:
    trace = commands.add_parser(
        "trace",
        help="communication that a profiler trace hides behind computation",
        description="Reads a Chrome trace of torch.profiler, .json or .json.gz.",
        epilog=TRACE_JSON,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = trace.add_argument
    add("file", metavar="FILE", help="trace of one rank, or of several in one file")
    add("--comm", metavar="REGEX", help="names of communication kernels, instead of the default")
    add("--json", action="store_true", help="machine-readable, keys below")
    trace.set_defaults(run=_run_trace)


def _run_trace(options: argparse.Namespace) -> int:
    from .trace.report import COMM_KERNELS, measure_overlap, read_trace

    try:
        comm = COMM_KERNELS if options.comm is None else options.comm
        found = measure_overlap(read_trace(options.file), comm)
    except (ValueError, OSError) as error:
        print(f"dualpipe-ext trace: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.to_dict()) if options.json else found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
