"""The benchmarks run; what they measure is for a machine that does nothing else."""

import csv
import importlib

import pytest
from conftest import ROOT


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
