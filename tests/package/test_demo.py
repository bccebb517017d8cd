"""The examples run as a user starts them, on gloo; a few steps are enough to see the loss fall."""

import os
import re
import subprocess
import sys

from tests.support import ROOT

TINY = ["--hidden", "32", "--heads", "2", "--expert-hidden", "32", "--sequence", "32"]
SMALL_DEMO = [*TINY, "--processes", "2", "--layers", "1", "--batch", "4"]


def run(*command):
    """`python *command` on the CPU; the package is found in this checkout, installed or not."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = path
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def demo(*options):
    return run("examples/train_moe.py", *SMALL_DEMO, *options)


def pipelined(*options):
    return run("examples/train_pipeline.py", *TINY, "--batch", "6", *options)


def test_demo_learns_and_reports():
    first = demo("--steps", "20", "--seed", "3")
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert sum(line.startswith("[") for line in lines) == 4  # steps 5, 10, 15 and 20: no terminal
    assert "step 20/20" in first.stdout and "\r" not in first.stdout

    loss = re.search(r"^loss +(\d+\.\d+) -> (\d+\.\d+)", first.stdout, re.M)
    assert 5.0 < float(loss[1]) < 6.5  # ln 256 = 5.55 before training
    assert float(loss[2]) < float(loss[1]) - 0.5
    assert int(re.search(r"^tokens/s +([\d,]+)", first.stdout, re.M)[1].replace(",", "")) > 0
    share = re.search(r"^in dispatch and combine +(\d+\.\d) %", first.stdout, re.M)
    assert 0 < float(share[1]) < 100
    assert re.search(r"^backend +reference$", first.stdout, re.M)
    assert re.search(r"^comm_sms +0$", first.stdout, re.M)

    again = demo("--steps", "20", "--seed", "3")
    assert (
        re.search(r"^loss.*$", again.stdout, re.M)[0] == loss.string[loss.start() :].split("\n")[0]
    )


def test_pipeline_over_four_processes():
    done = pipelined("--processes", "4", "--layers", "3", "--steps", "15")
    assert done.returncode == 0, done.stderr
    assert "2 pipeline ranks x 2 expert ranks" in done.stdout
    drawn = re.findall(r"^rank (\d) (\S.*)$", done.stdout, re.M)
    assert [rank for rank, _ in drawn] == ["0", "1"]
    for _, actions in drawn:  # six chunks forward in both of a rank's stages
        for chunk in range(6):
            assert f"F{chunk}" in actions and f"f{chunk}" in actions
    loss = re.search(r"^loss +(\d+\.\d+) -> (\d+\.\d+)", done.stdout, re.M)
    assert 5.0 < float(loss[1]) < 6.5 and float(loss[2]) < float(loss[1]) - 0.5
    assert re.search(r"^hidden +nothing: a CPU", done.stdout, re.M)


def test_demo_shows_the_error_of_a_process():
    failed = demo("--steps", "2", "--topk", "9")
    assert failed.returncode != 0
    assert "topk=9" in failed.stderr and "ValueError" in failed.stderr


def test_drop_in_example():
    launcher = "-m torch.distributed.run --nproc-per-node 2"
    finished = run(*launcher.split(), "examples/drop_in.py")
    assert finished.returncode == 0, finished.stderr
    assert "reference backend, loss 0." in finished.stdout
