"""The README's example is the file that users and tests run."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_example_is_the_file():
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- examples/drop_in.py -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert shown and shown[1] == (ROOT / "examples" / "drop_in.py").read_text()


def test_the_example_runs():
    command = [sys.executable, "examples/drop_in.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "backend, loss 0." in done.stdout


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
