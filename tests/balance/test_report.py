"""`dualpipe-ext balance`: files in, text, JSON and a plot out."""

import csv
import json
import re
import sys

import pytest
import torch

from dualpipe_ext.balance.eplb import measure_placement, rebalance_experts
from dualpipe_ext.balance.report import read_loads, read_placement
from dualpipe_ext.cli import main

LOADS = [[8.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]]


@pytest.fixture
def loads_json(tmp_path):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps(LOADS))
    return str(path)


def run_json(capsys, *arguments):
    assert main(["balance", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_holds_the_placement_and_the_loads(loads_json, capsys):
    found = run_json(capsys, loads_json, "--gpus", "2", "--replicas", "6")
    slots, _, count = rebalance_experts(torch.tensor(LOADS), 6, 1, 1, 2)
    report = measure_placement(torch.tensor(LOADS), slots, 2)
    assert found["physical_to_logical"] == slots.tolist()
    assert found["count"] == count.tolist()
    assert found["before"]["gpu_load"] == [[9, 3], [2, 2]]
    assert found["before"]["balance"] == [6 / 9, 1]
    assert found["after"]["gpu_load"] == report.gpu_load.tolist()
    assert found["lower_bound"] == report.lower_bound.tolist()
    assert found["after"]["copies_beside_another"] == int(report.together.sum())
    assert found["copies_to_send"] is None


def test_text_names_before_and_after(loads_json, capsys):
    assert main(["balance", loads_json, "--gpus", "2", "--replicas", "6"]) == 0
    shown = capsys.readouterr().out
    assert "before: experts in order, no copies" in shown
    assert f"before: mean/heaviest load {(6 / 9 + 1) / 2:.4f}" in shown
    assert "after:  mean/heaviest load" in shown
    assert "    0        6        9" in shown


def test_experts_that_do_not_fill_the_gpus_get_copies(loads_json, capsys):
    found = run_json(capsys, loads_json, "--gpus", "3", "--policy", "improved")
    assert torch.tensor(found["physical_to_logical"]).shape == (2, 6)
    assert torch.tensor(found["before"]["gpu_load"]).sum(-1).tolist() == [12, 4]


def test_output_of_json_is_a_current_placement(loads_json, tmp_path, capsys):
    first = run_json(capsys, loads_json, "--gpus", "2", "--replicas", "6")
    current = tmp_path / "placement.json"
    current.write_text(json.dumps(first))
    again = ["--gpus", "2", "--policy", "improved", "--current", str(current)]
    found = run_json(capsys, loads_json, *again, "--max-moved", "1")
    assert found["before"]["gpu_load"] == first["after"]["gpu_load"]
    assert found["before"]["placement"] == "current placement"
    assert sum(found["copies_to_send"]) <= 1


def test_plot(loads_json, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loads.svg"
    assert main(["balance", loads_json, "--gpus", "2", "--plot", str(picture)]) == 0
    drawn = picture.read_text()
    assert drawn.count("<path") > 2 * len(LOADS)
    capsys.readouterr()


def test_plot_without_matplotlib_says_how_to_get_it(loads_json, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["balance", loads_json, "--gpus", "2", "--plot", "x.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_files_that_mean_the_same(tmp_path):
    expected = torch.tensor(LOADS, dtype=torch.float64)
    for name, text in {
        "object.json": json.dumps({"steps": 3, "loads": LOADS}),
        "plain.csv": "8,1,1,2\n1,1,1,1\n",
        "header.csv": "a,b,c,d\n8.0, 1,1,2\n\n1,1,1,1e0\n",
    }.items():
        (tmp_path / name).write_text(text)
        assert torch.equal(read_loads(tmp_path / name), expected)
    (tmp_path / "layer.json").write_text("[8, 1, 1, 2]")
    assert torch.equal(read_loads(tmp_path / "layer.json"), expected[:1])
    with (tmp_path / "placement.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[0, 1], [1, 0]])
    assert read_placement(tmp_path / "placement.csv").tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("loads.txt", "1,2", "ends in '.txt': give a .json or .csv file"),
        ("loads.json", "[1, 2", "is not JSON"),
        ("loads.json", '{"load": [1, 2]}', 'has no key "loads" but load'),
        ("loads.json", "[]", "holds no rows: give one row a layer"),
        ("loads.json", "[[1, 2], [3]]", "row 1 of .* has 1 numbers, row 0 has 2"),
        ("loads.json", "[[1, null]]", "holds something that is no float"),
        ("loads.csv", "1,two\n", "holds something that is no float: .*two"),
        ("loads.csv", "1,-2\n", r"weight\[0, 1\] is -2.0: loads are finite and >= 0"),
        ("loads.csv", "1,nan\n", r"weight\[0, 1\] is nan"),
    ],
)
def test_files_that_cannot_be_read(name, text, message, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert main(["balance", str(tmp_path / name), "--gpus", "1"]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gpus", "0"], "num_gpus=0 is unknown"),
        (["--gpus", "2", "--replicas", "3"], "num_replicas=3 is less than the 4 experts"),
        (["--gpus", "2", "--replicas", "5"], "num_replicas=5 is not a multiple of num_gpus=2"),
        (["--gpus", "2", "--max-moved", "5"], 'takes neither .*pass policy="improved"'),
        (["--current", "nowhere.json"], "No such file .*nowhere.json"),
    ],
)
def test_options_that_do_not_fit(options, message, loads_json, capsys):
    assert main(["balance", loads_json, *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_current_placement_with_a_fraction(tmp_path):
    (tmp_path / "placement.json").write_text("[[0, 1.5]]")
    with pytest.raises(ValueError, match="a number with a fraction"):
        read_placement(tmp_path / "placement.json")
