"""`longtail status` and `run --dry`: where each cell of a plan is, and the bars of `longtail run`."""

import subprocess
import sys
import time

import torch
from conftest import ROOT

from longtail.evidence import status
from longtail.workflow import files, stage
from longtail.workflow.cells import Cell
from longtail.workflow.progress import Bar

PARAMS = {"plans": {"mine": {"datasets": ["d"], "recipes": ["r"], "methods": ["ce", "gala"], "seeds": [0, 1]}}}


def cell(method, seed):
    return Cell("mine", "d", "r", method, str(seed))


def lock(folder, *names):
    lines = "".join(f"  {name}:\n    cmd: x\n" for name in names)
    files.write_text(folder / "stages/mine/dvc.lock", f"schema: '2.0'\nstages:\n{lines}")


def test_each_cell_is_done_stale_running_or_missing(tmp_path, monkeypatch):
    lock(tmp_path, "evaluate-mine@d-r-ce-0", "evaluate-mine@d-r-ce-1", "evaluate-mine@d-r-gala-1")
    for method, seed in (("ce", 0), ("ce", 1)):
        files.write_json(tmp_path / cell(method, seed).results / "metrics.json", {})
    files.write_json(tmp_path / cell("ce", 0).runs / "machine.json", {"seconds": 600})
    monkeypatch.setattr(status.verify, "edited", lambda *_: ["evaluate-mine@d-r-ce-1: other code: loss"])
    monkeypatch.setattr(status.verify, "moved", lambda *_: [])
    monkeypatch.setattr(status, "running", lambda _: {cell("gala", 0): 7})
    found = status.states(tmp_path, PARAMS, "mine")
    assert [(one.cell.name, one.state, one.why, one.seconds) for one in found] == [
        ("d-r-ce-0", "done", "", 600.0),
        ("d-r-ce-1", "stale", "other code: loss", None),
        ("d-r-gala-0", "running", "process 7", None),
        ("d-r-gala-1", "missing", "", None),  # in the lock, its results are not there
    ]
    assert status.left(found, {}) is None  # nothing says how long gala takes
    assert status.left(found, {cell("gala", 5): 900.0, cell("gala", 0): 1000.0}) == 600 + 1000
    said = status.overview(tmp_path, PARAMS, "mine", {cell("gala", 1): 3000.0})
    assert said[0] == "mine: 1 done, 1 stale, 1 running, 1 missing of 4 cells, some 60 min of training left"
    assert "  stale d-r-ce-1: other code: loss" in said and said[-1] == "  next: longtail run mine"


def test_a_cell_of_a_plan_with_readings_is_done_with_its_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(status.verify, "edited", lambda *_: [])
    monkeypatch.setattr(status.verify, "moved", lambda *_: [])
    params = {"plans": {"mine": PARAMS["plans"]["mine"] | {"readings": True, "methods": ["ce"], "seeds": [0]}}}
    lock(tmp_path, "evaluate-mine@d-r-ce-0")
    files.write_json(tmp_path / cell("ce", 0).results / "metrics.json", {})
    assert [one.state for one in status.states(tmp_path, params, "mine")] == ["missing"]
    lock(tmp_path, "evaluate-mine@d-r-ce-0", "compare-mine@d-r-ce-0")
    files.write_text(tmp_path / cell("ce", 0).results / "corrections.csv", "")
    assert [one.state for one in status.states(tmp_path, params, "mine")] == ["done"]


def test_a_plan_that_has_not_run_is_missing_as_a_whole(tmp_path):
    assert status.overview(tmp_path, PARAMS, "mine", {})[0] == "mine: 0 done, 4 missing of 4 cells"


def test_a_training_is_seen_by_its_process(tmp_path):
    flags = ["--plan", "mine", "--dataset", "d", "--recipe", "r", "--method", "gala", "--seed", "0"]
    files.write_text(tmp_path / "stages/train.py", "import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "stages/train.py", *flags], cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        assert status.running(tmp_path) == {cell("gala", 0): process.pid}
        assert status.running(ROOT / "src") == {}  # another checkout's
    finally:
        process.kill()
        process.wait()
    assert status.running(tmp_path) == {}


def test_a_resumed_training_says_the_epoch(tmp_path):
    path = tmp_path / "x.pt"
    assert stage.resumed(path) is None
    torch.save({"identity": "x", "training": {"epoch": 19, "batch": 3}}, path)
    assert stage.resumed(path) == 19
    path.write_bytes(b"damaged")
    assert stage.resumed(path) is None


def test_a_bar_begins_where_the_training_goes_on(capsys):
    bar = Bar(1)
    bar.show("d-r-gala-0 goes on from epoch 19")
    bar.show("mine d r gala 0  epoch 19/200  loss 1.0  lr 0.1")
    assert bar.bar is not None and (bar.bar.n, bar.bar.total, bar.bar.initial) == (19, 200, 18)
    assert bar.bar.desc.startswith("mine d r gala 0") and bar.bar.pos == -1
    bar.show("mine d r gala 0  epoch 200/200  loss 0.1  lr 0.0")
    assert bar.bar is None
    assert "goes on from epoch 19" in capsys.readouterr().out


def test_ctrl_c_ends_a_stage_at_once(tmp_path):
    """Although the work is in a thread that nobody would wait for, and in code that swallows the exception."""
    script = (
        "import time\nfrom longtail.workflow import parent\nparent.be_ready()\n"
        "print('here', flush=True)\n"
        "while True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass\n"
    )
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    began = time.monotonic()
    process.send_signal(2)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - began < 5 and process.returncode == 130
    assert said.strip() == "stopped; the same command goes on from the last checkpoint"
