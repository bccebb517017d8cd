"""The rooms import one way, and nothing private leaves a file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A room imports itself and what stands before it.
ORDER = (
    *("errors", "compat", "build_record", "triton_kernels", "ops", "gradients", "ranks", "trace"),
    *("balance", "exchange", "moe", "blocks", "pipeline", "integrations", "environment", "cli"),
)
KERNELS = ("launch", "elementwise", "attention", "experts", "routing")
FILES = sorted({*ROOT.glob("dualpipe_ext/**/*.py"), *ROOT.glob("triton_kernels/**/*.py")})


def module_of(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith("dualpipe_ext") else f"dualpipe_ext.{name}"


MODULES = {module_of(file): file for file in FILES}


def imports_of(file: Path) -> list[tuple[str, str]]:
    """(module, name) of every import of this package's, in functions and for type checkers too."""
    package = module_of(file) if file.name == "__init__.py" else module_of(file).rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((inner, "") if inner in MODULES else (base, alias.name))
    return [(module, name) for module, name in found if module.split(".")[0] == "dualpipe_ext"]


def room(module: str, depth: int = 1) -> str:
    return ".".join(module.split(".")[depth : depth + 1])


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module):
    here = room(module)
    if not here:  # the package itself names everything, and loads it when it is asked for
        return
    for target, _ in imports_of(MODULES[module]):
        there = room(target)
        if there in ("", "_C"):  # __version__, and the extension
            continue
        assert ORDER.index(there) <= ORDER.index(here), f"{module} imports {target}"
        if there == here == "triton_kernels" and room(module, 2):
            kinds = KERNELS.index(room(target, 2)), KERNELS.index(room(module, 2))
            assert kinds[0] <= kinds[1], f"{module} imports {target}"


def test_no_circle():
    """Among the files, imports in functions counted."""
    after = {module: {target for target, _ in imports_of(MODULES[module])} for module in MODULES}
    after.pop("dualpipe_ext")
    while free := [module for module, targets in after.items() if not targets & after.keys()]:
        for module in free:
            del after[module]
    assert not after, f"each of these imports another of them: {sorted(after)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_private_name_crosses_a_file(module):
    private = [
        f"{target}.{name}"
        for target, name in imports_of(MODULES[module])
        if name.startswith("_") and not name.startswith("__") and name != "_C"
    ]
    assert not private
