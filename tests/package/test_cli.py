"""`dualpipe-ext` on any machine, with or without a GPU."""

import json
import os
import subprocess
import sys

import pytest

from dualpipe_ext import __version__, build_record, environment
from dualpipe_ext.cli import main


def test_info_json_without_a_gpu():
    done = subprocess.run(
        [sys.executable, "-m", "dualpipe_ext.cli", "info", "--json"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    keys = "package python torch triton unchecked driver gpus peer_access build backend"
    assert list(found) == keys.split()
    assert found["package"]["version"] == __version__
    assert found["gpus"] == found["peer_access"] == []
    assert found["backend"]["name"] == "reference"
    assert found["backend"]["reason"]
    assert found["build"]["built"] or found["build"]["reason"]


def test_info_for_people_names_the_backend_and_the_build(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines() if " " in line.strip())
    assert lines["dualpipe_ext"].startswith(__version__)
    assert lines["backend"].split(":")[0] in ("nvlink", "reference")
    assert "built" in lines["extension"]


def test_info_of_two_gpus_without_peer_access():
    gpu = {"name": "NVIDIA H200", "capability": "9.0", "sms": 132, "memory_bytes": 143771 * 2**20}
    found = environment.describe_environment() | {
        "gpus": [gpu | {"index": 0}, gpu | {"index": 1}],
        "peer_access": [[True, False], [False, True]],
    }
    shown = environment.format_environment(found)
    assert "0           NVIDIA H200, sm 9.0, 132 SMs, 140 GiB" in shown
    assert "1           reaches 1" in shown


def test_package_that_was_never_built_says_how_to(monkeypatch, tmp_path):
    monkeypatch.setattr(build_record, "BUILD_RECORD", tmp_path / "_build.json")
    found = build_record.read_build_record()
    assert not found["built"]
    assert "pip install" in found["reason"]


def test_extension_that_does_not_load_is_reported():
    build = {"built": True, "archs": ["sm_90a"], "nvcc_version": "13.0.88"}
    found = environment.describe_environment()
    found["build"] = build | {"importable": False, "error": "undefined symbol: x"}
    assert "does not load: undefined symbol: x" in environment.format_environment(found)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"]])
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: dualpipe-ext" in capsys.readouterr().err


def test_help_documents_the_json_keys(capsys):
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    shown = capsys.readouterr().out
    for key in environment.describe_environment():
        assert f"\n  {key} " in shown
