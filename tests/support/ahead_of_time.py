"""Kernels compiled for sm_90 and sm_100 without a GPU, and what each may take: the launches are in
tests/support/launches/, tests/triton_kernels/test_ahead_of_time.py holds them to the numbers here.

tests/resources/triton-3.8.json holds, for that release, by group and name of a launch: registers a
thread, bytes of stack a thread that spills take, bytes of shared memory. After a change of a
kernel, or for a new release:

    python -m tests.support.ahead_of_time           # prints what differs from the table
    python -m tests.support.ahead_of_time --write    # writes it
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.support.launches import LAUNCHES, Launch

SHARED_LIMIT = 227 * 1024  # bytes of a thread block
TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
}


class AheadOfTime:
    """Stands in for the kernel of a launch: compiles what that would."""

    def __init__(self, kernel, launch: Launch):
        self.kernel, self.launch, self.compiled = kernel, launch, None

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, num_warps, num_stages=3, launch_pdl=False, **constants):
        from triton import compile
        from triton.backends import compiler
        from triton.compiler import ASTSource
        from triton.experimental.gluon._runtime import GluonASTSource

        parameters = self.kernel.params
        constants = {p.name: p.default for p in parameters if p.has_default} | constants
        signature, attributes = dict.fromkeys(self.kernel.arg_names, "constexpr"), {}
        for i, (parameter, value) in enumerate(zip(parameters, arguments, strict=False)):
            name = parameter.name
            if value is None:
                constants[name] = None
            elif hasattr(value, "block_shape"):
                layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
                kind = TYPES[value.base.dtype]
                signature[name] = f"tensordesc<{kind}{list(value.block_shape)}{layout}>"
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                if not parameter.do_not_specialize_on_alignment:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                free = parameter.do_not_specialize or self.launch.sizes_of_a_model
                assert free, f"{name} would compile every value"
                signature[name] = "i32"
        source = GluonASTSource if self.kernel.is_gluon() else ASTSource
        source = source(self.kernel, signature, constants, attributes)
        target = compiler.GPUTarget("cuda", self.launch.arch, 32)
        options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": launch_pdl}
        self.compiled = compile(source, target=target, options=options)


class Ignored:
    """Stands in for the other kernels of a module."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


def kernel_of(launch: Launch):
    """The kernel, and its module."""
    module, _, kernel = launch.kernel.rpartition(".")
    module = importlib.import_module(f"dualpipe_ext.triton_kernels.{module}")
    return getattr(module, kernel), module


def compile_launch(launch: Launch):
    """What `launch` has its kernel compile to; the module's other kernels do nothing."""
    kernel, module = kernel_of(launch)
    ahead = AheadOfTime(kernel, launch)
    fakes = {name: Ignored() for name in vars(module) if name.endswith("_kernel")}
    with mock.patch.multiple(module, **fakes | {launch.kernel.rpartition(".")[2]: ahead}):
        launch.call()
    return ahead.compiled


def resources_of(compiled) -> tuple[int, int, int]:
    """Registers a thread, bytes of stack a thread, bytes of shared memory of a compiled kernel, by
    the cuobjdump that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip(f"{tool} is missing: registers and spills cannot be read")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        call = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    use = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}
    return use["REG"], use["STACK"] + use["LOCAL"], compiled.metadata.shared


def table_path() -> Path:
    import triton

    release = ".".join(triton.__version__.split(".")[:2])
    return Path(__file__).parent.parent / "resources" / f"triton-{release}.json"


def read_table() -> dict[str, dict[str, list[int]]]:
    """By group and name, what the installed Triton's kernels may take."""
    path = table_path()
    if not path.exists():
        pytest.fail(f"{path.name} is missing: run `python -m tests.support.ahead_of_time --write`")
    return json.loads(path.read_text())


def check_resources(launch: Launch, compiled) -> tuple[int, int, int]:
    """No more of anything than the table says; what it is."""
    found, allowed = resources_of(compiled), read_table()[launch.group][launch.name]
    assert all(a <= b for a, b in zip(found, allowed, strict=True)), (found, allowed)
    assert found[2] <= SHARED_LIMIT
    return found


def main() -> None:
    path, write = table_path(), "--write" in sys.argv
    before = json.loads(path.read_text()) if path.exists() else {}
    table: dict[str, dict[str, list[int]]] = {}
    for launch in LAUNCHES:
        found = list(resources_of(compile_launch(launch)))
        table.setdefault(launch.group, {})[launch.name] = found
        allowed = before.get(launch.group, {}).get(launch.name)
        if allowed != found:
            print(f"{launch}: {allowed} -> {found}", flush=True)
    if write:
        text = json.dumps(table, indent=1, ensure_ascii=False)
        text = re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", text)
        path.write_text(text + "\n")


if __name__ == "__main__":
    main()
