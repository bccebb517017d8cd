"""What importing the package and running its tools costs, and that its names are found."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dualpipe_ext
from tests.support import ROOT

HEAVY = ("torch", "triton", "numpy")


def loaded_by(code: str) -> set[str]:
    """Modules of a fresh process after `code`."""
    code += "\nimport sys, json; print(json.dumps(list(sys.modules)), file=sys.stderr)"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(child.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import dualpipe_ext",
        "from dualpipe_ext import DualPipeError, PeerTimeoutError",
        "from dualpipe_ext.cli import main; main('schedule zbv --ranks 2 --chunks 6'.split())",
        "from dualpipe_ext.cli import main; main(['trace', 'no.json'])",
        *(
            "from dualpipe_ext.cli import main\n"
            f"try: main(['{command}', '--help'])\nexcept SystemExit: pass"
            for command in ("schedule", "trace", "balance", "info")
        ),
    ],
)
def test_nothing_heavy_is_imported(code):
    assert not loaded_by(code).intersection(HEAVY)


def test_layers_load_no_compiler():
    """torch._dynamo takes a second; torch.compile loads it when it is used."""
    loaded = loaded_by("import dualpipe_ext as d; d.MoELayer, d.Pipeline, d.OverlappedPair")
    assert "torch" in loaded and not loaded.intersection({"torch._dynamo", "triton"})


def test_operators_and_public_names_need_no_triton():
    modules = [f"dualpipe_ext.ops.{file.stem}" for file in ROOT.glob("dualpipe_ext/ops/[!_]*.py")]
    code = f"""import sys; sys.modules["triton"] = None
import dualpipe_ext.exchange.reference, torch, {", ".join(modules)}
for name in dualpipe_ext.__all__: getattr(dualpipe_ext, name)
y, *_ = torch.ops.dualpipe_ext.rms_norm(torch.ones(2, 8), None, torch.ones(8), 0.0, 0)
assert torch.equal(y, torch.ones(2, 8))"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", dualpipe_ext.__all__)
def test_public_name(name):
    value = getattr(dualpipe_ext, name)
    assert name == "ROW_ALIGNMENT" or (callable(value) and value.__name__ == name)
    assert name in dir(dualpipe_ext)


def test_type_checkers_see_what_is_loaded():
    tree = ast.parse(Path(dualpipe_ext.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == dualpipe_ext._MODULE_OF
    assert sorted(seen) == sorted(dualpipe_ext.__all__)


def test_modules_are_attributes():
    loaded_by("import dualpipe_ext; dualpipe_ext.blocks; dualpipe_ext.integrations")


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="no attribute 'MoeLayer'"):
        dualpipe_ext.MoeLayer
    with pytest.raises(ImportError, match="MoeLayer"):
        from dualpipe_ext import MoeLayer  # noqa: F401
