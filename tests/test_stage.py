"""What every stage starts with: its flags, its declared params, and the guard against edits while it runs."""

import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from longtail.workflow import files, manifest, stage
from longtail.workflow.stage import Stage

MANIFEST = "stages/code/work.txt"


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with a dependency and params, and a stage that declares a part of them."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "src" / "longtail").mkdir(parents=True)
    (tmp_path / "src" / "longtail" / "imported.py").write_text("Y = 1\n")
    (tmp_path / "stages" / "code").mkdir(parents=True)
    (tmp_path / "stages" / "work.py").write_text("from longtail.imported import Y\nprint(Y)\n")
    (tmp_path / MANIFEST).write_text(manifest.texts(tmp_path, {"sources": {}, "methods": {}})["work"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("a")
    monkeypatch.chdir(tmp_path)
    found = Stage("work", "python work.py", ["code.py", "folder", MANIFEST], ["align", "methods.gala"])
    monkeypatch.setattr(stage, "declared", lambda: found)
    monkeypatch.setattr(sys, "argv", ["work.py", "--out", "x"])
    return tmp_path


def test_a_stage_sees_its_flags_and_the_keys_that_it_declares(workspace):
    with stage.run("out") as (args, params):
        assert (args.out, args.stage) == ("x", "work")
        assert params["methods.gala"]["lambda1"] == 1.0
        with pytest.raises(KeyError):
            params["methods.balpoe"]


EDITS = {
    "a dependency": lambda path: (path / "code.py").write_text("x = 2\n"),
    "a file in a folder": lambda path: (path / "folder" / "a").write_text("b"),
    "a new file in a folder": lambda path: (path / "folder" / "b").write_text(""),
    "a declared param": lambda path: edit_params(path, "lambda1: 1.0", "lambda1: 2.0"),
    "a file of its manifest": lambda path: (path / "src/longtail/imported.py").write_text("Y = 2\n"),
    "its script": lambda path: (path / "stages/work.py").write_text("print(1)\n"),
}


def edit_params(path, old, new):
    text = (path / "params.yaml").read_text()
    assert old in text
    (path / "params.yaml").write_text(text.replace(old, new))


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_while_it_runs_fails_the_stage(workspace, edit):
    with pytest.raises(SystemExit, match="work: its code, data or params were edited"), stage.run("out"):
        EDITS[edit](workspace)


def test_a_manifest_of_other_code_stops_it_before_it_starts(workspace):
    (workspace / "src/longtail/imported.py").write_text("Y = 2\n")
    said = pytest.raises(SystemExit, match=f"{MANIFEST} is of other code .* `dvc repro stages/dvc.yaml:manifests`")
    with said, stage.run("out"):
        raise AssertionError("it started")


def test_an_edit_of_what_it_does_not_declare_does_not(workspace):
    with stage.run("out") as (args, _):
        edit_params(workspace, "ece_bins: 15", "ece_bins: 20")
        (workspace / "src/longtail/imported.py").write_text("# of what it says\nY = 1\nZ = 3\n")
    assert (
        args.fingerprint == stage.declared().facts(stage.Code())[0]
    )  # and what it did run with still has the same identity


def test_wrong_params_stop_it_before_it_starts(workspace):
    edit_params(workspace, "ece_bins: 15", "ece_bins: 0")
    ran = []
    with pytest.raises(SystemExit, match=r"evaluate\.ece_bins = 0"), stage.run("out"):
        ran.append(True)
    assert not ran


def test_bad_input_is_a_message_and_no_traceback(workspace):
    with pytest.raises(SystemExit, match=r"error: x\.npz: no array 'a'"), stage.run("out"):
        raise ValueError("x.npz: no array 'a'")


@pytest.mark.parametrize(
    ("given", "environment", "taken"),
    [
        ("", {}, ""), ("cpu", {"LONGTAIL_PROCESSES": "2"}, "cpu"), ("cuda:1", {}, "cuda:1"), ("cuda", {}, "cuda"),
        ("cuda", {"LONGTAIL_PROCESSES": "2"}, "cuda"),  # before torchrun starts them
        ("cuda", {"LONGTAIL_PROCESSES": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cuda:1"),
        ("cuda:1", {"LONGTAIL_PROCESSES": "2"}, "LONGTAIL_DEVICE=cuda:1 with 2 processes: each has a GPU of its own"),
        ("mps", {}, "LONGTAIL_DEVICE=mps: allowed are cpu, cuda and cuda:<number>"),
    ],
)  # fmt: skip
def test_each_process_of_a_cell_has_a_gpu_of_its_own(monkeypatch, workspace, given, environment, taken):
    """Of torchrun's two processes on one machine both would otherwise be at cuda:0, which NCCL refuses."""
    monkeypatch.setattr(os, "environ", {**os.environ, "LONGTAIL_DEVICE": given, **environment})
    if ":" in taken and " " in taken:
        with pytest.raises(SystemExit, match=taken), stage.run("out"):
            raise AssertionError("it runs")
    else:
        stage.own_device()
        assert os.environ["LONGTAIL_DEVICE"] == taken


def test_a_key_that_is_not_in_params_is_named():
    with pytest.raises(KeyError, match=r"params\.yaml has no methods\.focal"):
        stage.pick({"methods": {"ce": {}}}, ["methods.focal"])


@pytest.mark.parametrize("script", sorted({file.name for file in (ROOT / "stages").glob("*.py")} - {"portable.py"}))
def test_a_stage_run_by_hand_says_what_to_do(script):
    flags = {
        "check.py": ["out"],
        "download.py": ["source", "out"],
        "subsample.py": ["source", "dataset", "out", "profile"],
        "features.py": ["data", "features", "out"],
        "incremental_train.py": [
            "data",
            "plan",
            "dataset",
            "order",
            "protocol",
            "recipe",
            "training",
            "seed",
            "model",
            "history",
        ],
        "incremental_predict.py": ["data", "order", "protocol", "training", "seed", "model", "out"],
        "incremental_readout.py": ["predictions", "history", "out"],
        "incremental_report.py": ["plan", "cells", "published", "out"],
        "train.py": ["data", "plan", "dataset", "recipe", "method", "seed", "model", "history"],
        "manifests.py": ["out"],
        "refit.py": ["data", "model", "history", "method", "seed", "out", "history_out"],
        "fuse.py": ["cells", "method", "seed", "out", "history"],
        "fisher.py": ["out"],
        "predict.py": ["data", "model", "out"],
        "align.py": ["predictions", "out"],
        "evaluate.py": ["predictions", "alignment", "history", "out"],
        "compare.py": ["predictions", "out"],
        "readings.py": ["plan", "cells", "out"],
        "report.py": ["plan", "cells", "published", "times", "out"],
        "show.py": ["table", "page"],
        "align_streamed.py": ["data", "model", "out"],
        "evaluate_streamed.py": ["data", "model", "predictions", "alignment", "history", "out"],
        "predict_streamed.py": ["data", "model", "out"],
        "finetune.py": ["data", "plan", "dataset", "recipe", "method", "seed", "model", "history"],
        "finetune_predict.py": ["data", "model", "out"],
        "finetune_refit.py": ["data", "model", "history", "method", "seed", "out", "history_out"],
        "stream.py": ["index", "stream", "out"],
        "stream_train.py": ["data", "plan", "dataset", "recipe", "method", "seed", "model", "history"],
        "stream_predict.py": ["data", "model", "features", "heads", "out"],
        "stream_refit.py": ["data", "model", "history", "method", "seed", "out", "history_out"],
        "stream_incremental_predict.py": ["data", "order", "protocol", "training", "seed", "model", "out"],
        "stream_incremental_train.py": [
            "data",
            "plan",
            "dataset",
            "order",
            "protocol",
            "recipe",
            "training",
            "seed",
            "model",
            "history",
        ],
        "index.py": ["index", "out"],
        "indexed_features.py": ["index", "features", "out"],
    }[script]
    command = [sys.executable, f"stages/{script}", *(word for flag in flags for word in (f"--{flag}", "x"))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "run it with `dvc repro`" in result.stderr


def test_a_stage_is_found_without_the_lock_file_which_another_dvc_may_be_writing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "double@b")
    (tmp_path / "in.b").write_text("1")
    (tmp_path / "params.yaml").write_text("factor: 2\n")
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  double:\n    foreach: [a, b]\n    do:\n"
        "      cmd: echo ${item}\n      deps: ['in.${item}']\n      params: [factor]\n"
    )
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], check=True)
    (tmp_path / "dvc.lock").write_text('schema: "2.0"\nstages:\n  dou')  # as the other has got so far
    assert stage.declared() == Stage("double@b", "echo b", ["in.b"], ["factor"])


def test_a_folder_is_hashed_as_dvc_has_it(tmp_path):
    """Second stages depend on folders: their fingerprints are those of the lock, by which MLflow finds their times."""
    for name in ("b.txt", "a/c.txt", "a.txt"):
        files.write_text(tmp_path / "folder" / name, name)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "folder"], cwd=tmp_path, check=True)
    (out,) = yaml.safe_load((tmp_path / "folder.dvc").read_text())["outs"]
    assert stage.md5(tmp_path / "folder") == out["md5"]
