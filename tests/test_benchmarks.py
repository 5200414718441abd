"""The benchmarks run; what they measure is for a machine that does nothing else."""

import csv
import importlib

import pytest
from conftest import ROOT
from test_tracking import add_cell

from longtail import files


def run(monkeypatch, name: str, *flags: str) -> None:
    monkeypatch.syspath_prepend(ROOT)
    importlib.import_module(f"benchmarks.{name}").main(flags)


@pytest.mark.slow
def test_engine(tmp_path, monkeypatch):
    run(monkeypatch, "engine", "--quick", "--results", str(tmp_path))
    rows = [line for line in (tmp_path / "engine.md").read_text().splitlines() if line.startswith("| 3, ")]
    assert len(rows) == 4  # three augmentations, and the straightforward loop
    for row in rows:
        rates = [float(cell.split()[0].replace(",", "")) for cell in row.strip("| ").split(" | ")[1:]]
        assert all(rate >= 0 for rate in rates) and rates[0] > 0


@pytest.mark.slow
def test_data_path(tmp_path, monkeypatch):
    run(monkeypatch, "data_path", "--quick", "--results", str(tmp_path))
    assert "images/s" in (tmp_path / "data_path.md").read_text()


@pytest.mark.slow
def test_profile(tmp_path, monkeypatch):
    run(monkeypatch, "profile", "--quick", "--results", str(tmp_path))
    rows = [line for line in (tmp_path / "profile.md").read_text().splitlines() if line.startswith("| ")]
    shares = [float(row.split(" | ")[1].split(" %")[0]) for row in rows[2:]]
    assert shares[-1] == 100 and 98 <= sum(shares[:-1]) <= 102


@pytest.mark.slow
def test_cost_is_measured_and_drawn(tmp_path, monkeypatch):
    run(monkeypatch, "cost", "--quick", "--results", str(tmp_path))
    with open(tmp_path / "cost.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert rows and all(float(row["seconds"]) > 0 for row in rows)
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_time_to_accuracy_keeps_what_was_measured_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("benchmarks.time_to_accuracy")
    cell = {
        "dataset": "d", "recipe": "long", "method": "ce", "seed": "1", "training": "x", "epochs": 200,
        "accuracy": 0.40, "seconds": 6000.0, "images_per_s": 100.0, "memory_mib": 1500.0,
        "device": "cpu", "cpu": "c", "threads": "1",
    }  # fmt: skip
    again = {**cell, "seed": "2", "accuracy": 0.42}
    short = {**cell, "recipe": "fast", "epochs": 40, "accuracy": 0.39, "seconds": 1200.0}
    arguments = ["--plan", "p", "--dataset", "d", "--results", str(tmp_path)]
    monkeypatch.setattr(module, "collect", lambda root, plan: [cell, again])
    module.main(arguments)
    monkeypatch.setattr(module, "collect", lambda root, plan: [short, {**cell, "accuracy": 0.44}])
    module.main(arguments)
    rows = module.read(tmp_path / "time_to_accuracy.csv")
    assert [(row["recipe"], row["seed"], row["accuracy"]) for row in rows] == [
        ("fast", "1", "0.39"), ("long", "1", "0.44"), ("long", "2", "0.42"),
    ]  # fmt: skip
    lines = [line for line in (tmp_path / "time_to_accuracy.md").read_text().splitlines() if line.startswith("| ce")]
    assert lines[0] == "| ce · long | 200 | 1, 2 | 43.0 ± 1.4 | 100.0 (100.0 to 100.0) | 1.00 |"
    assert lines[1] == "| ce · fast | 40 | 1 | 39.0 | 20.0 (20.0 to 20.0) | 0.20 |"
    assert (tmp_path / "time_to_accuracy.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        module.main([*arguments[:2], "--dataset", "other", *arguments[4:]])
    assert "no cell of plan p on other was trained here" in capsys.readouterr().err


def test_time_to_accuracy_reads_the_cells_that_were_trained_here(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("benchmarks.time_to_accuracy")
    training = add_cell(tmp_path, "ce", accuracy=0.5)
    add_cell(tmp_path, "gala", accuracy=0.6)  # trained elsewhere: nobody knows how long it took
    machine = {"training": training, "seconds": 80.0, "images_per_s": 50.0, "memory_mib": 9.5}
    machine |= {"device": "cpu", "cpu": "c", "threads": 2}
    files.write_json(tmp_path / "runs/quick/digits_if20/digits/ce/0/machine.json", machine)
    (row,) = module.collect(tmp_path, "quick")
    assert tuple(row) == module.COLUMNS
    assert [*row.values()] == ["digits_if20", "digits", "ce", "0", training, 4, 0.5, 80.0, 50.0, 9.5, "cpu", "c", "2"]


def test_posthoc(tmp_path, monkeypatch):
    run(monkeypatch, "posthoc", "--quick", "--results", str(tmp_path))
    rows = [line for line in (tmp_path / "posthoc.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 6 and "EnergyAligning(reading='own_samples')" in rows[3]
