"""Builds `dualpipe_ext._C`, torch-free: csrc/*/*.cu with nvcc, bindings.cpp with a C++ compiler.

Without a CUDA toolchain the package installs without its kernels, says what is missing, and runs on
the reference backend. What was built, or why not, is kept in `dualpipe_ext/_build.json`.

Environment:
  DUALPIPE_BUILD_CUDA   1: a missing toolchain is an error; 0: never build; unset: build if possible
  DUALPIPE_CUDA_ARCHS   targets, for example "90a" (default "90a 100a", as far as nvcc knows them)
  CUDA_HOME, CUDA_PATH  where to look for nvcc first, before PATH and /usr/local/cuda
  CXX, MAX_JOBS         host compiler; number of compilers at once (default: one a core)
"""

import fcntl
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_CUDA_HOME = Path("/usr/local/cuda")

# The first nvcc that knows each target. The "a" variants carry wgmma and setmaxnreg.
ARCH_NEEDS_NVCC = {"90a": (12, 0), "100a": (12, 8)}


class MissingToolError(Exception):
    """Something that the extension needs is not on this machine; the message says how to get it."""


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    nvcc: Path
    nvcc_version: str
    archs: tuple[str, ...]
    host_compiler: str
    includes: tuple[Path, ...]
    cuda_runtime: Path  # libcudart_static.a


@dataclass(frozen=True, kw_only=True)
class Step:
    """One compiler call. `depfile` is where it writes the headers that it read."""

    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    output: Path
    depfile: Path | None = None


def find_nvcc() -> Path:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates += [DEFAULT_CUDA_HOME / "bin" / "nvcc"]
    for nvcc in candidates:
        if os.access(nvcc, os.X_OK):
            return nvcc
    raise MissingToolError(
        "nvcc was not found (looked in CUDA_HOME, CUDA_PATH, PATH and "
        f"{DEFAULT_CUDA_HOME}/bin). Install NVIDIA's CUDA toolkit, 12.8 or newer, or set "
        "CUDA_HOME to the folder that holds bin/nvcc."
    )


def read_nvcc_version(nvcc: Path) -> str:
    shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"V(\d+\.\d+\.\d+)", shown.stdout)
    if match is None:
        raise MissingToolError(
            f"`{nvcc} --version` failed: {(shown.stderr or shown.stdout).strip()}. "
            "Reinstall the CUDA toolkit or set CUDA_HOME to a working one."
        )
    return match[1]


def choose_archs(nvcc_version: str) -> tuple[str, ...]:
    asked = re.findall(r"\w+", os.environ.get("DUALPIPE_CUDA_ARCHS", ""))
    if asked:
        return tuple(asked)
    major_minor = tuple(int(part) for part in nvcc_version.split(".")[:2])
    known = tuple(arch for arch, needs in ARCH_NEEDS_NVCC.items() if major_minor >= needs)
    if not known:
        raise MissingToolError(
            f"nvcc {nvcc_version} cannot compile for sm_90a. Install NVIDIA's CUDA toolkit, 12.8 "
            "or newer (12.0 leaves out sm_100a), and set CUDA_HOME to it."
        )
    return known


def cuda_folders(nvcc: Path) -> list[Path]:
    """Folders that may hold include/ and lib/, best first.

    nvcc on PATH can be a wrapper script far from its toolkit: ask it before trusting its path.
    """
    asked = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    tops = re.findall(r"^#\$ TOP=(.+)$", asked.stderr, flags=re.MULTILINE)
    roots = [Path(top.strip()) for top in tops] + [nvcc.resolve().parent.parent, DEFAULT_CUDA_HOME]
    target = f"{platform.machine()}-linux".replace("aarch64", "sbsa")
    return [folder for root in roots for folder in (root / "targets" / target, root)]


def first_existing(candidates: list[Path], what: str, remedy: str) -> Path:
    for candidate in candidates:
        if candidate.exists():
            return candidate.resolve()
    looked_in = ", ".join(dict.fromkeys(str(candidate.parent) for candidate in candidates))
    raise MissingToolError(f"{what} was not found (looked in {looked_in}). {remedy}")


def find_host_compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise MissingToolError(
        "no host C++ compiler was found (looked for CXX, g++, c++, clang++ in PATH). Install one, "
        "for example with `apt-get install g++`."
    )


def find_pybind11() -> Path:
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return Path(pybind11.get_include())
    torch = importlib.util.find_spec("torch")  # its wheels carry the pybind11 headers
    if torch is not None and torch.origin is not None:
        include = Path(torch.origin).parent / "include"
        if (include / "pybind11" / "pybind11.h").exists():
            return include
    raise MissingToolError("pybind11 was not found. Install it with `pip install pybind11`.")


def find_toolchain() -> Toolchain:
    """Everything the build needs, or MissingToolError for the first thing that is not there."""
    nvcc = find_nvcc()
    nvcc_version = read_nvcc_version(nvcc)
    archs = choose_archs(nvcc_version)
    folders = cuda_folders(nvcc)
    toolkit = "Install the runtime part of the CUDA toolkit (cuda-cudart-dev) beside nvcc."
    cuda_runtime = first_existing(
        [folder / lib / "libcudart_static.a" for folder in folders for lib in ("lib64", "lib")],
        "libcudart_static.a",
        toolkit,
    )
    cuda_header = first_existing(
        [folder / "include" / "cuda_runtime.h" for folder in folders], "cuda_runtime.h", toolkit
    )
    host_compiler = find_host_compiler()
    python_header = first_existing(
        [Path(sysconfig.get_path(key)) / "Python.h" for key in ("include", "platinclude")],
        "Python.h",
        "Install Python's headers, for example with `apt-get install python3-dev`.",
    )
    return Toolchain(
        nvcc=nvcc,
        nvcc_version=nvcc_version,
        archs=archs,
        host_compiler=host_compiler,
        includes=(find_pybind11(), python_header.parent, cuda_header.parent),
        cuda_runtime=cuda_runtime,
    )


def plan_steps(tools: Toolchain, sources: list[Path], objects: Path, library: Path) -> list[Step]:
    """The compiler calls that make `library` from `sources`: one an object file, then the link."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in tools.archs]
    nvcc = [str(tools.nvcc), "-ccbin", tools.host_compiler, "-O3", "-std=c++17", "-lineinfo"]
    nvcc += [*targets, "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", f"-I{CSRC}"]
    cxx = [tools.host_compiler, "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"]
    cxx += [f"-I{CSRC}", *(f"-isystem{include}" for include in tools.includes)]
    steps = []
    for source in sources:
        compiler = nvcc if source.suffix == ".cu" else cxx
        output = objects / f"{source.name}.o"
        depfile = objects / f"{source.name}.d"
        call = [*compiler, "-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
        steps.append(Step(command=tuple(call), inputs=(source,), output=output, depfile=depfile))
    outputs = tuple(step.output for step in steps)
    link = [tools.host_compiler, "-shared", "-Wl,--exclude-libs,ALL", *map(str, outputs)]
    # Static, and never -lcuda: one binary runs beside any torch, and imports without a driver.
    link += [str(tools.cuda_runtime), "-lpthread", "-ldl", "-lrt", "-o", str(library)]
    return [*steps, Step(command=tuple(link), inputs=outputs, output=library)]


def write_ninja_file(steps: list[Step], path: Path) -> None:
    def escape(file: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(file))

    lines = ["rule run", "  command = $call", "  description = $out"]
    lines += ["rule compile", "  command = $call", "  description = $in"]
    lines += ["  depfile = $dep", "  deps = gcc"]
    for step in steps:
        inputs = " ".join(escape(file) for file in step.inputs)
        rule = "compile" if step.depfile else "run"
        lines += [f"build {escape(step.output)}: {rule} {inputs}"]
        lines += [f"  call = {shlex.join(step.command).replace('$', '$$')}"]
        lines += [f"  dep = {step.depfile}"] if step.depfile else []
    path.write_text("\n".join(lines) + "\n")


def find_ninja() -> str | None:
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        packaged = Path(ninja.BIN_DIR) / "ninja"
        if packaged.exists():
            return str(packaged)
    return shutil.which("ninja")


def run_steps(steps: list[Step], folder: Path) -> None:
    """Parallel and incremental with ninja; otherwise every step, one after the other."""
    ninja = find_ninja()
    if ninja is None:
        print("dualpipe_ext: ninja was not found, compiling one file at a time", file=sys.stderr)
        for step in steps:
            print(shlex.join(step.command), flush=True)
            subprocess.run(step.command, check=True)
        return
    write_ninja_file(steps, folder / "build.ninja")
    jobs = os.environ.get("MAX_JOBS")
    call = [ninja, "-C", str(folder), *(["-j", jobs] if jobs else [])]
    subprocess.run(call, check=True)


def announce(message: str) -> None:
    """pip hides what a build prints unless it fails, so the terminal gets the message as well."""
    print(message, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        # Without a terminal a log may keep stderr, and `dualpipe-ext info` repeats the reason.
        with suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(f"\n{message}\n")


class BuildCudaExtension(build_ext):
    """`build_ext` for the one extension of this package, in place or into the wheel."""

    def run(self) -> None:
        (extension,) = self.extensions
        library = Path(self.get_ext_fullpath(extension.name)).absolute()
        library.parent.mkdir(parents=True, exist_ok=True)
        wish = os.environ.get("DUALPIPE_BUILD_CUDA", "")
        if wish not in ("", "0", "1"):
            raise SystemExit(
                f"DUALPIPE_BUILD_CUDA={wish!r} is neither 0 (never) nor 1 (must build)"
            )
        try:
            if wish == "0":
                raise MissingToolError("DUALPIPE_BUILD_CUDA=0 asked for no CUDA kernels.")
            record = self.build(find_toolchain(), [ROOT / s for s in extension.sources], library)
        except MissingToolError as missing:
            if wish == "1":
                raise SystemExit(f"dualpipe_ext: DUALPIPE_BUILD_CUDA=1, but {missing}") from None
            library.unlink(missing_ok=True)  # one from an earlier build may not fit the sources
            record = {"built": False, "reason": str(missing)}
            announce(
                f"{'*' * 78}\ndualpipe_ext is being installed WITHOUT its CUDA kernels:\n"
                f"  {missing}\nWithout them everything runs on the slower reference backend.\n"
                f"DUALPIPE_BUILD_CUDA=1 makes this an error.\n{'*' * 78}"
            )
        (library.parent / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def build(self, tools: Toolchain, sources: list[Path], library: Path) -> dict:
        # Not build_temp: pip makes that anew for every call, and ninja could reuse nothing.
        objects = ROOT / "build" / f"csrc-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        objects.mkdir(parents=True, exist_ok=True)
        linked = objects / library.name
        try:
            with open(objects / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another build of this tree may be running
                run_steps(plan_steps(tools, sources, objects, linked), objects)
        except subprocess.CalledProcessError as failed:
            raise SystemExit(
                f"dualpipe_ext: compiling failed (exit code {failed.returncode}, messages above); "
                "DUALPIPE_BUILD_CUDA=0 installs without the CUDA kernels"
            ) from None
        # A running process may have the old file mapped: replace it, never write into it.
        fresh = library.with_name(f"{library.name}.new")
        shutil.copy2(linked, fresh)
        os.replace(fresh, library)
        return {
            "built": True,
            "archs": [f"sm_{arch}" for arch in tools.archs],
            "nvcc": str(tools.nvcc),
            "nvcc_version": tools.nvcc_version,
            "host_compiler": tools.host_compiler,
            "sources": [source.name for source in sources],
        }

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # run() writes straight into the source tree for an editable install


if __name__ == "__main__":
    kernels = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*/*.cu"))
    setup(
        ext_modules=[Extension("dualpipe_ext._C", sources=[*kernels, "csrc/bindings.cpp"])],
        cmdclass={"build_ext": BuildCudaExtension},
    )
