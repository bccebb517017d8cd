"""Runs a benchmark: `python -m bench NAME [arguments]`; without a name, lists them.

`python -m bench NAME --help` shows a benchmark's own arguments.
"""

import ast
import sys
from importlib import import_module
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def benchmarks() -> dict[str, str]:
    """What each one measures, by name: files with a `main`."""
    found = {}
    for file in sorted(FOLDER.glob("[a-z]*.py")):
        tree = ast.parse(file.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[file.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def main() -> None:
    names = benchmarks()
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        width = max(map(len, names))
        lines = [f"  {name:<{width}}  {text}" for name, text in names.items()]
        print("python -m bench NAME [arguments]", *lines, sep="\n")
        sys.exit(len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help"))
    name = sys.argv.pop(1)
    sys.argv[0] = f"bench/{name}.py"
    sys.path.insert(0, str(FOLDER))
    # Under its own name, by which processes that it starts find its functions.
    import_module(name).main()


if __name__ == "__main__":
    main()
