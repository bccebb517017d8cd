"""README.md and the documents say what is so: examples run as printed, links lead somewhere, tables
are made from the results."""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import dualpipe_ext
from dualpipe_ext import cli
from dualpipe_ext.pipeline.schedule import KINDS, build_schedule
from dualpipe_ext.pipeline.simulate import simulate

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
HOW_TOS = sorted((ROOT / "docs" / "how-to").glob("*.md"))
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def code_blocks(text: str, language: str) -> list[str]:
    """Of Markdown, those in lists without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


# ---- The README ----


def test_the_readme_is_a_page():
    assert len(README.split()) <= 1000


def test_the_example_is_the_file():
    shown = re.search(r"<!-- examples/drop_in.py -->\n```python\n(.*?)```", README, re.DOTALL)
    assert shown and shown[1] == (ROOT / "examples" / "drop_in.py").read_text()


def test_the_example_runs():
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 1"
    done = run([sys.executable, *launcher.split(), "examples/drop_in.py"], ROOT)
    assert "backend, loss 0." in done.stdout


class Runtime:
    """In the place of DeepSeek's DualPipeV, which is not installed here: keeps its arguments."""

    def __init__(self, modules, process_group):
        self.modules = modules

    def step(self, *inputs, num_chunks, criterion, labels):
        for module in self.modules:
            inputs = (module(*inputs),)
        criterion(inputs[0], labels[0]).backward()


def test_the_entries_run_as_printed():
    blocks = code_blocks(README, "python")
    under_a_runtime, layer, pairs, pipeline = (b for b in blocks if "import torch\n" not in b)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = torch.randn(2, 8, 4, 32, device=device)

    def loss(outputs, labels=0):
        return (outputs - labels).square().mean()

    names = {"dualpipe_ext": dualpipe_ext, "DualPipeV": Runtime, "loss": loss, "group": None}
    names |= {"GroupedQueryAttention": dualpipe_ext.GroupedQueryAttention}
    names |= {"H": 32, "I": 64, "E": 4, "K": 2, "x": x, "y": y, "batches": (x, y)}
    with torch.device(device):
        exec(layer, names)
        exec(pairs, names)
        stage = names["stage"]
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        names |= {"x": x, "y": y, "optimizer": optimizer}
        names |= {"stages": [stage, dualpipe_ext.TransformerStage([])]}
        exec(under_a_runtime, names)
        exec(pipeline, names)
    assert all(p.grad is not None for p in stage.parameters())
    assert names["losses"].shape == (8,)
    names["moe"].close()


def test_the_tools_run_as_printed(tmp_path, monkeypatch):
    tools = next(code for code in code_blocks(README, "") if "schedule dualpipev" in code)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loads.csv").write_text(",".join(map(str, range(32))))
    kernel = {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 0, "dur": 5, "args": {"device": 0}}
    (tmp_path / "trace.json").write_text(repr({"traceEvents": [kernel]}).replace("'", '"'))
    commands = [shlex.split(line) for line in tools.splitlines()]
    ran = [cli.main(words[1:]) for words in commands if words[0] == "dualpipe-ext"]
    assert ran == [0, 0, 0]
    assert (tmp_path / "schedule.svg").read_text().startswith("<svg")


# ---- The documents ----


@pytest.mark.parametrize("path", HOW_TOS, ids=lambda path: path.stem)
def test_a_how_to_runs_as_printed(path, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("\n".join(code_blocks(path.read_text(), "python")))
    run([sys.executable, str(script)], tmp_path)


def test_the_bubble_table_is_what_the_tool_prints():
    how_to = (ROOT / "docs" / "how-to" / "train-with-pairs.md").read_text()
    for kind in KINDS:
        stages, bubble, peak = re.search(
            rf"^\| {kind} \| (\d+).*? \| (\d+) \| .*\| (\d+) \|$", how_to, re.M
        ).groups()
        result = simulate(build_schedule(kind, 8, 20))
        assert result.schedule.num_stages == int(stages)
        assert max(result.bubble) == int(bubble)
        assert max(result.peak_activations) == int(peak)


def test_tables_and_figures_are_those_of_the_results(capsys):
    assert load_script("performance").main(["--check"]) == 0, capsys.readouterr().err


def test_every_result_in_a_table_is_known_to_the_page():
    performance = load_script("performance")
    page = (ROOT / "docs" / "PERFORMANCE.md").read_text() + README
    marked = [match[2] for match in performance.MARKER.finditer(page)]
    assert sorted(marked) == sorted(performance.TABLES)


def test_the_picture_is_what_its_script_draws():
    lanes = load_script("lanes")
    assert lanes.FILE.read_text() == lanes.draw()


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub names them."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = re.sub(r"`[^`\n]+`", "", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text()), f"{target}#{anchor}"


def test_the_architecture_names_every_room():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    rooms = [file.parent.name for file in ROOT.glob("dualpipe_ext/*/__init__.py")]
    assert [name for name in rooms if f"`{name}/`" not in text] == []


def resolve(name: str) -> object:
    """A module, or what one of them holds."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, name = name.rpartition(".")
        return getattr(importlib.import_module(module), name)


def test_the_api_pages_show_every_public_name():
    pages = "".join(path.read_text() for path in ROOT.glob("docs/api/*.md"))
    shown = {}
    for name in re.findall(r"^::: (\S+)$", pages, re.MULTILINE):
        value = resolve(name)
        whole = isinstance(value, ModuleType)
        names = value.__all__ if whole else [name.rpartition(".")[2]]
        shown |= {each: getattr(value, each) if whole else value for each in names}
    for name in dualpipe_ext.__all__:
        assert shown.get(name) is getattr(dualpipe_ext, name), name
