"""The command `dualpipe-ext`: a subcommand adds its parser here and imports its module when run."""

import argparse
import json
import sys
from collections.abc import Sequence

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


if __name__ == "__main__":
    sys.exit(main())
