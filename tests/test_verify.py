"""`longtail verify` in a bare clone: no data, no cache, nothing trained; and what it says when something moved."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from longtail.evidence import verify
from longtail.workflow import files

PLAN = "quick"
CELL = "digits_if20-digits-ce-0"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A clone of what is committed; the tests put back what they change."""
    clone = tmp_path_factory.mktemp("verify") / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    return clone


def said(clone, *plans):
    command = [sys.executable, "-m", "longtail.cli", "verify", *plans]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def put_back(clone):
    subprocess.run(["git", "checkout", "-q", "."], cwd=clone, check=True)
    left = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert left.stdout == ""  # it looks, it writes nothing


@pytest.mark.slow
def test_what_is_committed_is_what_the_committed_code_gives(bare):
    code, text = said(bare)
    assert code == 0, text
    assert text.startswith("the results of quick, frozen-cifar100, paper-cifar100")
    put_back(bare)


@pytest.mark.slow
def test_changed_code_params_and_results_are_named(bare):
    change(bare / "src/longtail/losses/ce.py", "class Loss(BaseLoss):", "class Loss(BaseLoss):\n    edited = True")
    with (bare / "src/longtail/losses/balanced_softmax.py").open("a") as file:
        file.write("# a comment is no other code\n")
    change(bare / "params.yaml", "ece_bins: 15", "ece_bins: 16")
    change(bare / "results/quick/table.md", "± ", "± 1")
    classes = f"results/quick/cells/{CELL.replace('-', '/')}/classes.csv"
    change(bare / classes, "0,", "00,")
    code, text = said(bare, PLAN)
    assert code == 1
    lines = text.splitlines()
    assert f"train-{PLAN}@{CELL}: other code: Loss" in lines
    assert any(line.startswith(f"evaluate-{PLAN}@{CELL}: changed deps params.yaml") for line in lines)
    assert f"evaluate-{PLAN}@{CELL}: changed outs {classes} modified" in lines
    assert "results/quick/table.md: not what the committed cells give" in lines
    assert not any("balanced_softmax-0: other code" in line for line in lines)
    put_back(bare)


def test_results_that_no_lock_has_are_named(tmp_path):
    axes = {"datasets": ["d"], "recipes": ["r"], "methods": ["ce", "gala"], "seeds": [0]}
    lock = "schema: '2.0'\nstages:\n  evaluate-mine@d-r-ce-0:\n    cmd: x\n"
    files.write_text(tmp_path / "stages/mine/dvc.lock", lock)
    for method in ("ce", "gala"):
        files.write_text(tmp_path / f"results/mine/cells/d/r/{method}/0/metrics.json", "{}")
    assert verify.unlocked(tmp_path, {"mine": axes}) == [
        "results/mine/cells/d/r/gala/0: no entry evaluate-mine@d-r-gala-0 in stages/mine/dvc.lock"
    ]


@pytest.mark.slow
def test_a_missing_result_is_no_clone_without_a_cache(bare):
    path = f"results/quick/cells/{CELL.replace('-', '/')}/right.csv"
    (bare / path).unlink()
    code, text = said(bare, PLAN)
    assert code == 1 and f"evaluate-{PLAN}@{CELL}: changed outs {path} deleted" in text
    assert "runs/" not in text  # what git does not keep is not missed
    put_back(bare)


@pytest.mark.slow
def test_a_pull_request_is_compared_in_markdown(bare):
    """What .github/workflows/results.yml comments."""
    change(bare / "params.yaml", "ece_bins: 15", "ece_bins: 16")
    change(bare / "results/quick/summary.json", '"accuracy": 0.9', '"accuracy": 0.8')
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [".ci/compare", "HEAD"], cwd=bare, capture_output=True, text=True, env=os.environ | {"PATH": path}, check=False
    )
    assert done.returncode == 0, done.stderr
    committed, metrics, params = done.stdout.split("### ")[1:]
    assert committed.startswith("Committed results") and "results/quick/summary.json: not what" in committed
    rows = [line for line in metrics.splitlines() if line.startswith("| results/")]
    assert len(rows) == 1 and "digits_if20.digits." in rows[0] and rows[0].count("-0.1") == 1
    assert "evaluate.ece_bins" in params and "16" in params
    put_back(bare)


def test_a_report_is_compared_without_drawing_its_pictures(monkeypatch):
    def draw(*args, **kwargs):
        raise AssertionError("it draws")

    monkeypatch.setattr(verify.plots.Canvas, "savefig", draw)
    plan = yaml.safe_load((ROOT / "params.yaml").read_text())["plans"][PLAN]
    assert verify.differing(ROOT, PLAN, plan) == []
    nowhere = verify.plots.Figure("data:image/png;base64,", 1, 1, "", "")  # its size and caption are compared
    monkeypatch.setattr(verify, "_not_drawn", lambda *given: nowhere)
    assert verify.differing(ROOT, PLAN, plan) == [f"results/{PLAN}/report.html: not what the committed cells give"]


def test_an_unknown_plan_is_named():
    with pytest.raises(ValueError, match=r"plan 'nowhere' is not in params\.yaml; there are quick"):
        verify.verify(ROOT, yaml.safe_load((ROOT / "params.yaml").read_text()), ["nowhere"])
