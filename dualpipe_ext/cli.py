"""The command `dualpipe-ext`: a subcommand adds its parser here and imports its module when run."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from fractions import Fraction

from . import __version__

__all__ = ["main"]

INFO_JSON = """\
keys of --json:
  package      version, path
  python       version
  torch        version; cuda, nccl: versions that it carries, or null
  triton       version or null
  driver       version; cuda: the newest CUDA that it runs; null without a driver
  gpus         [{index, name, capability, sms, memory_bytes}]
  peer_access  [i][j]: whether GPU i can address the memory of GPU j
  build        built; archs, nvcc, nvcc_version, host_compiler, sources, or the reason why not;
               importable, error
  backend      name that backend="auto" chooses over all GPUs of this machine, reason
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dualpipe-ext`, by default with the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dualpipe-ext", description="Tools of dualpipe_ext.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_info(commands)
    _add_schedule(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


def _add_info(commands) -> None:
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
  peak_activations  [rank]: chunks whose forward has run but not their last backward
  actions           [rank][i], in order: {op: F | B | I | W, stage, chunk, direction}, or
                    {op: FB, forward: {...}, backward: {...}} for an overlapped pair
"""


def _add_schedule(commands) -> None:
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
    from .schedule import build_schedule
    from .simulate import Times, describe_simulation, save_plot, simulate

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


if __name__ == "__main__":
    sys.exit(main())
