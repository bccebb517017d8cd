"""The README's example is the file that users and tests run."""

import os
import re
import subprocess
import sys
from pathlib import Path

from dualpipe_ext.pipeline.schedule import KINDS, build_schedule
from dualpipe_ext.pipeline.simulate import simulate

ROOT = Path(__file__).parents[2]


def test_the_example_is_the_file():
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- examples/drop_in.py -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert shown and shown[1] == (ROOT / "examples" / "drop_in.py").read_text()


def test_the_example_runs():
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 1"
    command = [sys.executable, *launcher.split(), "examples/drop_in.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "backend, loss 0." in done.stdout


def test_the_bubble_table_is_what_the_tool_prints():
    readme = (ROOT / "README.md").read_text()
    for kind in KINDS:
        stages, bubble, peak = re.search(
            rf"^\| {kind} \| (\d+).*? \| (\d+) \| .*\| (\d+) \|$", readme, re.M
        ).groups()
        result = simulate(build_schedule(kind, 8, 20))
        assert result.schedule.num_stages == int(stages)
        assert max(result.bubble) == int(bubble)
        assert max(result.peak_activations) == int(peak)


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
