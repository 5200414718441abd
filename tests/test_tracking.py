"""Tracking: a store that shows what is in the result files, once, whatever was interrupted on the way."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from small_cells import RECIPE, add_cell, measures

from longtail.report import outcomes
from longtail.tracking import finished, live
from longtail.tracking import runs as tracking
from longtail.tracking.live import Live
from longtail.tracking.runs import TrackingError, sync, track
from longtail.workflow import files
from longtail.workflow.fingerprint import fingerprint
from longtail.workflow.locks import LockError

SRC = Path(live.__file__).parents[1]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with tables and nothing in them: making those takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture
def root(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two finished cells and an empty store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("LONGTAIL_LIVE_AFTER", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    for method, accuracy in (("ce", 0.5), ("gala", 0.75)):
        add_cell(tmp_path, method, accuracy=accuracy)
    return tmp_path


def tables(root: Path) -> dict[str, list[Any]]:
    """Every row of every table of the store."""
    with sqlite3.connect(root / "mlflow.db") as store:
        names = [name for (name,) in store.execute("select name from sqlite_master where type = 'table'")]
        return {name: store.execute(f'select * from "{name}"').fetchall() for name in names}


def client(root: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


def runs(root: Path, **tags: str) -> list[Run]:
    """Runs of cells with these longtail.* tags, oldest first."""
    store = client(root)
    experiment = store.get_experiment_by_name("longtail")
    assert experiment is not None
    asked = " AND ".join(f"tags.`longtail.{key}` = '{value}'" for key, value in tags.items())
    found = store.search_runs([experiment.experiment_id], asked, order_by=["attributes.start_time ASC"])
    return [run for run in found if run.data.tags["longtail.kind"] == "cell"]


def steps(root: Path, run: Run, name: str) -> list[int]:
    return sorted(row.step for row in client(root).get_metric_history(run.info.run_id, name))


def cell(method: str = "gala") -> dict[str, object]:
    return {"plan": "quick", "dataset": "digits_if20", "recipe": "digits", "method": method, "seed": 0}


def shown(method_params: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"recipe": RECIPE, "method": method_params or {"tau": 1.0}}


def wait_for_child(root: Path, training: str, *, seconds: float = 60) -> None:
    """Until the child of a training has let go of its log."""
    path = live.log_path(root, training)
    until = time.monotonic() + seconds
    while tracking._writes(root, training):
        assert time.monotonic() < until, path.read_text()
        time.sleep(0.05)
    assert not path.exists(), path.read_text()


def train_live(root: Path, training: str, epochs: range, **values: float) -> None:
    with Live(cell(), training, shown(), root=root) as curves:
        for epoch in epochs:
            curves.log(epoch, {"loss": 2 / epoch, "lr": 0.1 / epoch, "held_out_accuracy": None, **values})


def test_the_cells_here_are_such_as_the_report_reads(root: Path) -> None:
    add_cell(root, "balpoe", accuracy=0.4, held_out=False)
    for method, accuracy in (("ce", 0.5), ("gala", 0.75), ("balpoe", 0.4)):
        read = outcomes.read_cell(root / f"results/quick/cells/digits_if20/digits/{method}/0")
        assert read is not None and read.last["raw"]["accuracy"] == accuracy and read.right["raw"].shape == (8,)


# --- sync ------------------------------------------------------------------------------------------------


def test_the_searches_of_the_docs_find_what_they_say(root: Path) -> None:
    """Every search string of docs/mlflow.md, its values put to those of the two cells here."""
    sync(root)
    add_cell(root, "gala", accuracy=0.8)  # replaces one
    sync(root)
    page = (Path(__file__).parents[1] / "docs/mlflow.md").read_text()
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and " | `" in line]
    searches = {question.strip("| "): text.strip(" |`") for question, text in lines[:8]}
    expected = {
        "what a plan found": 2, "one method": 1, "what reaches": 2, "good on the tail": 2, "confident": 2,
        "trained for": 2, "what was replaced": 1, "trainings that were stopped": 0,
    }  # fmt: skip
    assert len(searches) == len(expected)
    store = client(root)
    experiment = store.get_experiment_by_name("longtail")
    for (question, text), (start, count) in zip(searches.items(), expected.items(), strict=True):
        assert question.startswith(start)
        for theirs, ours in (
            ("balpoe", "gala"),
            ('few" > 0.3', 'few" > 0.2'),
            ("ece > 0.1", "ece > 0.01"),
            ("'70'", "'4'"),
        ):
            text = text.replace(theirs, ours)
        found = store.search_runs([experiment.experiment_id], text)
        assert len([run for run in found if run.data.tags["longtail.kind"] == "cell"]) == count, question


def test_a_run_shows_its_cell(root: Path) -> None:
    summary = sync(root)
    assert (summary.created, summary.finished, summary.unchanged, summary.superseded) == (2, 0, 0, 0)
    assert summary.notes == ()
    (run,) = runs(root, method="gala")
    metrics, params, tags = run.data.metrics, run.data.params, run.data.tags
    assert run.info.status == "FINISHED"
    assert metrics["accuracy/all"] == 0.75
    assert metrics["accuracy/few"] == 0.25
    assert "accuracy/medium" not in metrics  # no class is medium
    assert metrics["aligned held-out/accuracy"] == 0.77
    assert metrics["worst class"] == 0.5 and metrics["balanced error"] == 0.25
    assert metrics["aligned train/accuracy"] == 0.76 and metrics["aligned train/few"] == 0.25
    assert "aligned train/balanced error" not in metrics
    assert [name for name in metrics if name.startswith("aligned held-out")] == ["aligned held-out/accuracy"]
    assert metrics["best epoch/epoch"] == 3
    assert metrics["curve/loss"] == 0.5
    assert steps(root, run, "curve/held_out_accuracy") == [1, 2, 3, 4]
    assert params["method"] == "gala"
    assert params["method.tau"] == "1"
    assert params["recipe.optimizer.lr"] == "0.1"
    assert params["recipe.milestones"] == "2, 3"
    assert params["evaluate.ece_bins"] == "15"
    assert tags["longtail.current"] == "yes"
    assert len(tags["longtail.lock.sha256"]) == 64
    assert "torch" in tags["longtail.tracked_with"]
    assert run.inputs is not None
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits_if20", "d" * 8)
    parent = client(root).get_run(tags["mlflow.parentRunId"])
    assert parent.info.run_name == "quick"


def test_without_held_out_there_is_nothing_of_it(root: Path) -> None:
    add_cell(root, "ce", accuracy=0.4, held_out=False)
    sync(root)
    (run,) = runs(root, method="ce")
    assert not [name for name in run.data.metrics if "held" in name or "best" in name]
    assert run.data.metrics["aligned train/accuracy"] == pytest.approx(0.41)


def test_a_second_sync_writes_nothing(root: Path) -> None:
    files.write_text(root / "results" / "quick" / "table.md", "| table |")
    sync(root)
    before = tables(root)
    summary = sync(root)
    assert (summary.created, summary.finished, summary.unchanged, summary.superseded) == (0, 0, 2, 0)
    after = tables(root)
    assert {name: len(rows) for name, rows in after.items()} == {name: len(rows) for name, rows in before.items()}
    assert after == before
    assert len(before["runs"]) == 3 and len(before["metrics"]) > 30  # it would have noticed


def test_other_results_make_a_new_run_and_age_the_old(root: Path) -> None:
    sync(root)
    add_cell(root, "gala", accuracy=0.8)
    summary = sync(root)
    assert (summary.created, summary.unchanged, summary.superseded) == (1, 1, 1)
    assert [run.data.metrics["accuracy/all"] for run in runs(root, method="gala", current="yes")] == [0.8]
    assert [run.data.metrics["accuracy/all"] for run in runs(root, method="gala", current="no")] == [0.75]
    add_cell(root, "gala", accuracy=0.75)  # back again: the old run is the current one, nothing is made
    summary = sync(root)
    assert (summary.created, summary.unchanged, summary.superseded) == (0, 2, 1)
    assert [run.data.metrics["accuracy/all"] for run in runs(root, method="gala", current="yes")] == [0.75]
    assert sync(root).superseded == 0


def test_an_interrupted_sync_is_completed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_inputs", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sync(root, ["quick"])
    summary = sync(root)
    assert (summary.created, summary.finished) == (1, 1)
    for run in runs(root, current="yes", state="finished"):
        assert steps(root, run, "curve/loss") == [1, 2, 3, 4]
        assert steps(root, run, "accuracy/all") == [0]
    assert len(runs(root)) == 2


def test_the_plan_gets_its_table_when_it_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    original = MlflowClient.log_artifact

    def log_artifact(self: MlflowClient, run_id: str, path: str, *rest: Any) -> None:
        sent.append(Path(path).name)
        original(self, run_id, path, *rest)

    monkeypatch.setattr(MlflowClient, "log_artifact", log_artifact)
    files.write_text(root / "results" / "quick" / "table.md", "| 1 |")
    summary = {"digits_if20": {"digits": {"ce": {"accuracy": 0.4, "aligned": 0.9}, "gala": {"accuracy": 0.75}}}}
    files.write_json(root / "results" / "quick" / "summary.json", summary)
    sync(root)
    assert sent.count("metrics.json") == 2 and sent[-2:] == ["table.md", "summary.json"]
    plan = client(root).get_run(runs(root)[0].data.tags["mlflow.parentRunId"])
    assert plan.data.metrics == {"accuracy/all": 0.75}
    assert plan.data.tags["longtail.best"] == "gala, recipe digits, digits_if20"
    sent.clear()
    files.write_text(root / "results" / "quick" / "table.md", "| 2 |")
    sync(root)
    assert sent == ["table.md"]
    (stored,) = (root / "mlruns").rglob("table.md")
    assert stored.read_text() == "| 2 |"


def test_a_cell_has_its_files_and_a_plan_its_view(root: Path) -> None:
    found = sync(root)
    (run,) = runs(root, method="gala")
    names = {file.path for file in client(root).list_artifacts(run.info.run_id)}
    assert names >= {"metrics.json", "classes.csv", "params.json"}
    assert list(found.pages) == ["quick"] and found.pages["quick"].endswith("viewStateShareKey=longtail-quick")
    experiment = client(root).get_experiment(run.info.experiment_id)
    kept = json.loads(experiment.tags["mlflow.sharedViewState.longtail-quick"])
    order = [f"{kept['orderByKey']} DESC"]
    chosen = client(root).search_runs([run.info.experiment_id], kept["searchFilter"], order_by=order)
    assert [one.data.params["method"] for one in chosen] == ["gala", "ce"]
    shown = {column.split("`")[1] for column in kept["selectedColumns"]} - {"accuracy/medium"}  # no class here has that
    assert shown <= {*run.data.params, *run.data.metrics}


def test_runs_of_a_plan_have_the_same_parameters_whenever_they_came(root: Path) -> None:
    sync(root)
    add_cell(root, "balpoe", accuracy=0.4, method_params={"taus": [0, 1], "mixup": 0.4})
    sync(root)
    found = {run.data.params["method"]: run.data.params for run in runs(root)}
    assert found["balpoe"]["method.taus"] == "0, 1" and found["balpoe"]["method.tau"] == "-"
    assert found["ce"]["method.taus"] == "-" and found["ce"]["method.mixup"] == "-" and found["ce"]["method.tau"] == "1"
    assert found["ce"].keys() == found["gala"].keys() == found["balpoe"].keys()


def test_relatives_of_aligning_are_shown_with_their_flag(root: Path) -> None:
    parts = {name: measures(0.4 + 0.1 * place) for place, name in enumerate(("raw", "aligned_on_train"))}
    parts |= {"logit_adjusted": measures(0.6), "rebalanced_on_test": measures(0.7)}
    add_cell(root, "balpoe", accuracy=0.4, metrics={"last": {"epoch": 4, **parts}})
    sync(root)
    (run,) = runs(root, method="balpoe")
    assert run.data.metrics["logit adjustment/accuracy"] == 0.6
    assert run.data.metrics["re-balanced: transductive/accuracy"] == 0.7
    assert "logit adjustment/nll" not in run.data.metrics


def test_what_the_machine_says_counts_for_its_own_training_only(root: Path) -> None:
    training = add_cell(root, "gala", accuracy=0.75)
    machine = {"gpu": "H100", "cpu": "EPYC", "seconds": 80.0, "images_per_s": 5000.0, "torch": "2.14.1"}
    place = root / "runs" / "quick" / "digits_if20" / "digits"
    files.write_json(place / "gala" / "0" / "machine.json", machine | {"training": training})
    files.write_json(place / "ce" / "0" / "machine.json", machine | {"training": "another"})
    sync(root)
    (run,) = runs(root, method="gala")
    assert run.data.metrics["training seconds"] == 80
    assert run.data.metrics["images per s"] == 5000
    assert run.data.tags["longtail.gpu"] == "H100"
    assert run.data.tags["version.torch"] == "2.14.1"
    assert run.info.end_time - run.info.start_time == 80_000
    (run,) = runs(root, method="ce")
    assert "training seconds" not in run.data.metrics
    assert "longtail.gpu" not in run.data.tags


def test_plans_are_chosen_by_name(root: Path) -> None:
    add_cell(root, "ce", accuracy=0.3, plan="paper-cifar100")
    assert sync(root, ["paper-cifar100"]).created == 1
    assert sync(root).created == 2
    with pytest.raises(LockError, match="nothing of plan 'quik'; there are paper-cifar100, quick"):
        sync(root, ["quik"])


def test_what_left_its_plan_is_history(root: Path) -> None:
    """Its lock entries and results are still there; a report leaves it out as well."""
    add_cell(root, "gala", accuracy=0.75)
    assert sync(root).created == 2
    axes = {"datasets": ["digits_if20"], "recipes": ["digits"], "methods": ["ce"], "seeds": [0]}
    files.write_text(root / "params.yaml", json.dumps({"plans": {"quick": axes}}))
    again = sync(root)
    assert (again.unchanged, again.superseded) == (1, 1)
    assert [runs(root, method=method)[0].data.tags["longtail.current"] for method in ("ce", "gala")] == ["yes", "no"]
    assert sync(root).superseded == 0


def test_a_measure_that_came_later_is_not_there_and_stops_nothing(root: Path) -> None:
    path = root / "results/quick/cells/digits_if20/digits/ce/0/metrics.json"
    written = json.loads(path.read_text())
    del written["last"]["raw"]["top5"]
    assert "top-5" not in finished._metrics(Path(files.write_json(path, written)))[1]
    del written["last"]["raw"]["few"]
    with pytest.raises(LockError, match="not the metrics of a cell: KeyError"):
        finished._metrics(Path(files.write_json(path, written)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no dvc\.lock in it; run `dvc repro`"),
        ("stages: {a: [", "not YAML"),
        ("- 1", "not a lock of DVC's schema 2.0"),
        ("schema: '1.0'\nstages: {}", "not a lock of DVC's schema 2.0"),
        ("schema: '2.0'\nstages: {check: 1}", "stages.check is no entry"),
        ("schema: '2.0'\nstages: {check: {cmd: x, outs: [{md5: 1}]}}", "stages.check.outs is no list"),
        ("schema: '2.0'\nstages: {check: {cmd: x, params: [1]}}", "stages.check.params is no"),
    ],
)
def test_a_broken_lock_is_named(root: Path, text: str | None, message: str) -> None:
    path = root / "stages" / "quick" / "dvc.lock"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(LockError, match=message) as caught:
        sync(root)
    assert str(root / "stages" if text is None else path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.json", None, "metrics.json is missing"),
        ("history.csv", "epoch,lr\n1,2\n", "history.csv is not the one in stages/quick/dvc.lock"),
        ("classes.csv", "x", "classes.csv is not the one in stages/quick/dvc.lock"),
    ],
)
def test_files_that_the_lock_does_not_know_are_left_out(root: Path, name: str, text: str | None, message: str) -> None:
    path = root / "results/quick/cells/digits_if20/digits/gala/0" / name
    path.unlink() if text is None else path.write_text(text)
    summary = sync(root)
    assert summary.created == 1
    (note,) = summary.notes
    assert message in note and "gala" in note


@pytest.mark.parametrize("written", [[1], {"last": {"epoch": 4}}, {"last": {"epoch": 4, "raw": {"nll": 1}}}])
def test_metrics_of_another_shape_are_named(root: Path, written: Any) -> None:
    add_cell(root, "ce", accuracy=0.5, metrics=written)
    with pytest.raises(LockError, match=r"ce/0/metrics\.json: not the metrics of a cell"):
        sync(root)


def test_a_cell_in_the_making_is_left_out(root: Path) -> None:
    sync(root)
    path = root / "stages" / "quick" / "dvc.lock"
    lock = yaml.safe_load(path.read_text())
    lock["stages"]["train-quick@digits_if20-digits-gala-0"]["outs"][0]["md5"] = "new.dir"
    del lock["stages"]["align-quick@digits_if20-digits-ce-0"]
    path.write_text(yaml.safe_dump(lock))
    summary = sync(root)
    assert (summary.created, summary.unchanged) == (0, 0)
    missing, stale = sorted(summary.notes)
    assert "ce" in missing and "not finished, no align" in missing
    assert "its predict is from before the last change of runs/quick/digits_if20/digits/gala/0/model" in stale


def test_a_dead_server_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"MLflow cannot use http://127\.0\.0\.1:9"):
        sync(root)


def lock_it(root: Path) -> sqlite3.Connection:
    held = sqlite3.connect(root / "mlflow.db")
    held.execute("begin exclusive")
    return held


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.write_bytes(b"x" * 5000),
            r"file is not a database\): move it away, and `longtail track` makes",
        ),
        (
            lambda path: path.write_bytes(path.read_bytes()[:200_000]),
            r"malformed\): move it away, and `longtail track`",
        ),
        (lambda path: lock_it(path.parent), r"database is locked\): another program writes to it: end that"),
        (lambda path: (path.unlink(), path.mkdir()), r"unable to open database file\): move it away"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line(
    root: Path, damage: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: MLflow itself tries ten times, in 100 seconds."""
    monkeypatch.setattr(tracking, "LOCKED_S", 0.1)
    began = time.monotonic()
    keep = damage(root / "mlflow.db")
    with pytest.raises(TrackingError, match=rf"MLflow cannot use sqlite:///.*mlflow.db \(.*{message}") as caught:
        sync(root)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 30
    del keep


def test_a_database_that_may_not_be_written_to_is_not_to_be_moved_away(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(tracking, "_usable", refuse)
    with pytest.raises(TrackingError, match=r"readonly database\): let yourself write there$"):
        sync(root)


def test_a_database_s_file_is_known_whatever_is_asked_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for query in ("", "?timeout=60"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/x.db{query}")
        assert tracking.location(tmp_path)[1] == tmp_path / "x.db"


def test_a_folder_as_store_is_told_what_to_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(root / "runs_of_mine"))
    with pytest.raises(TrackingError, match=r"runs_of_mine is a folder.*unset.*MLFLOW_ALLOW_FILE_STORE=true"):
        sync(root)


def test_a_deleted_experiment_is_told_how_to_come_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync(root)
    store = client(root)
    experiment = store.get_experiment_by_name("longtail")
    assert experiment is not None
    store.delete_experiment(experiment.experiment_id)
    with pytest.raises(TrackingError, match=r"is deleted; `(.*)` brings it back") as caught:
        sync(root)
    command = re.search(r"`(.*)`", str(caught.value))
    assert command is not None
    subprocess.run(command[1], shell=True, check=True, capture_output=True, cwd=root)
    assert sync(root).unchanged == 2


def test_a_copied_checkout_does_not_write_into_the_original(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files.write_text(root / "results" / "quick" / "table.md", "| 1 |")
    sync(root)
    copy = tmp_path_factory.mktemp("copied") / "root"
    shutil.copytree(root, copy)
    files.write_text(copy / "results" / "quick" / "table.md", "| 2 |")
    with pytest.raises(TrackingError, match=rf"was made in {root}, .*: the checkout was copied or moved; remove"):
        sync(copy)
    (stored,) = (root / "mlruns").rglob("table.md")
    assert stored.read_text() == "| 1 |"
    (copy / "mlflow.db").unlink()
    shutil.rmtree(copy / "mlruns")
    code = "from longtail.tracking.runs import sync; print(sync('.').created)"  # MLflow keeps a database open
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"
    (stored,) = (copy / "mlruns").rglob("table.md")
    assert stored.read_text() == "| 2 |"


def test_no_password_is_printed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for uri in (
        "http://me:sesame@127.0.0.1:9", "postgresql://me:sesame@127.0.0.1:9/runs", "http://127.0.0.1:9/?token=sesame",
    ):  # fmt: skip
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises((TrackingError, ImportError)) as caught:
            sync(root)
        assert "sesame" not in str(caught.value)
    assert tracking.shown("http://me:a/b@host/x") == "http://me:a/b@host/x"  # no URI has a slash in a password
    assert tracking.shown("http://host:5000/?token=sesame") == "http://host:5000/?***"
    assert tracking.shown("sqlite:///mlflow.db") == "sqlite:///mlflow.db"


def test_track_says_where_to_look(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_text(root / "results" / "quick" / "table.md", "| table |")
    track(".", ["quick"])
    said = capsys.readouterr().out
    assert "2 created, 0 finished, 0 unchanged, 0 superseded" in said
    assert "results/quick/table.md" in said
    assert "http://127.0.0.1:5000/#/experiments/" in said
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db --workers 1" in said


@pytest.mark.slow
def test_four_processes_make_one_store(root: Path) -> None:
    (root / "mlflow.db").unlink()
    code = "from longtail.tracking.runs import sync; print(sync('.').created)"
    environment = os.environ | {"PYTHONPATH": str(SRC), "MLFLOW_DISABLE_TELEMETRY": "true"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    created = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert sorted(created) == ["0", "0", "0", "2"]
    assert len(runs(root)) == 2


# --- live ------------------------------------------------------------------------------------------------


def test_fingerprint_is_that_of_the_facts() -> None:
    deps = [("b.py", "2"), ("a.py", "1")]
    one = fingerprint("python train.py", deps, {"methods.x": {"tau": 1.0, "on": True}})
    assert one == fingerprint("python train.py", deps[::-1], {"methods.x": {"on": True, "tau": 1}})
    assert len(one) == 16
    others = {
        fingerprint("python  train.py", deps, {"methods.x": {"tau": 1.0, "on": True}}),
        fingerprint("python train.py", deps[:1], {"methods.x": {"tau": 1.0, "on": True}}),
        fingerprint("python train.py", deps, {"methods.x": {"tau": 1.5, "on": True}}),
        fingerprint("python train.py", deps, {"methods.x": {"tau": 1.0, "on": 1}}),
        one,
    }
    assert len(others) == 5


def test_training_does_not_import_mlflow() -> None:
    code = "import sys, longtail.tracking.live; assert not {'mlflow', 'numpy'} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_short_training_starts_no_child(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_live(root, "short", range(1, 5))
    monkeypatch.setenv("LONGTAIL_LIVE_AFTER", "off")
    train_live(root, "off", range(1, 5))
    assert not (root / "runs").exists()


def test_sync_finishes_the_live_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTAIL_LIVE_AFTER", "0")
    training = add_cell(root, "gala", accuracy=0.75)
    train_live(root, training, range(1, 4), images_per_s=1000.0)  # the fourth row was dropped
    wait_for_child(root, training)
    (run,) = runs(root)
    assert run.info.status == "RUNNING"
    assert run.data.tags["longtail.state"] == "trained"
    assert run.data.params["method.tau"] == "1"
    assert "torch" in {tag.removeprefix("version.") for tag in run.data.tags}
    assert steps(root, run, "curve/loss") == [1, 2, 3]

    summary = sync(root)
    assert (summary.created, summary.finished, summary.superseded) == (1, 1, 0)
    (same,) = runs(root, method="gala")
    assert same.info.run_id == run.info.run_id
    assert same.info.status == "FINISHED"
    assert same.data.metrics["accuracy/all"] == 0.75
    for name in ("curve/loss", "curve/lr", "curve/held_out_accuracy"):
        assert steps(root, same, name) == [1, 2, 3, 4]
    before = tables(root)
    assert sync(root).unchanged == 2
    assert tables(root) == before


def test_a_killed_training_that_goes_on_is_one_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTAIL_LIVE_AFTER", "0")
    training = add_cell(root, "gala", accuracy=0.75)
    code = (
        "import json, os, signal, sys; from longtail.tracking.live import Live\n"
        "curves = Live(json.loads(sys.argv[1]), sys.argv[2], {'method': {'tau': 1.0}}).__enter__()\n"
        "for epoch in (1, 2, 3): curves.log(epoch, {'loss': 2 / epoch})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    command = [sys.executable, "-c", code, json.dumps(cell()), training]
    assert subprocess.run(command, env=environment, cwd=root).returncode == -signal.SIGKILL
    wait_for_child(root, training)
    (run,) = runs(root)
    assert (run.info.status, run.data.tags["longtail.state"]) == ("KILLED", "killed")

    train_live(root, training, range(3, 5))  # from the checkpoint of epoch 2
    wait_for_child(root, training)
    assert runs(root)[0].info.status == "RUNNING"
    sync(root)
    (same,) = runs(root, method="gala")
    assert (same.info.run_id, same.info.status) == (run.info.run_id, "FINISHED")
    assert steps(root, same, "curve/loss") == [1, 2, 3, 4]


@pytest.mark.parametrize(("error", "status"), [(ValueError("nan"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_how_a_training_ended(root: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: str) -> None:
    monkeypatch.setenv("LONGTAIL_LIVE_AFTER", "0")
    with pytest.raises(type(error)), Live(cell(), "training", shown(), root=root) as curves:
        curves.log(1, {"loss": 1.0})
        raise error
    wait_for_child(root, "training")
    assert [run.info.status for run in runs(root)] == [status]


def test_leftovers_of_a_finished_cell_are_history(root: Path) -> None:
    """A run left open before the results were written is closed; one that began after them may be at work."""
    written = (root / "results/quick/cells/digits_if20/digits/gala/0/history.csv").stat().st_mtime_ns // 10**6
    tags = {"longtail.kind": "cell", **{f"longtail.{key}": str(value) for key, value in cell().items()}}
    with tracking.open_store(root) as store:
        ids = [
            store.client.create_run(
                store.experiment, start_time=written + late, tags=tags | {"longtail.training": str(late)}
            ).info.run_id
            for late in (-60_000, 60_000)
        ]
    assert sync(root).superseded == 1
    left, at_work = (client(root).get_run(run_id) for run_id in ids)
    assert (left.info.status, left.data.tags["longtail.current"]) == ("KILLED", "no")
    assert (at_work.info.status, at_work.data.tags.get("longtail.current")) == ("RUNNING", None)


def test_a_run_that_is_written_to_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTAIL_LIVE_AFTER", "0")
    training = add_cell(root, "gala", accuracy=0.75)
    curves = Live(cell(), training, shown(), root=root)
    curves.log(1, {"loss": 1.0})
    until = time.monotonic() + 60
    while not runs_or_none(root):
        assert time.monotonic() < until
        time.sleep(0.1)
    summary = sync(root)
    assert summary.created == 1
    assert "gala" in summary.notes[0] and "still written to" in summary.notes[0]
    curves.__exit__(None, None, None)
    wait_for_child(root, training)
    assert sync(root).finished == 1


def runs_or_none(root: Path) -> list[Run]:
    return runs(root) if client(root).get_experiment_by_name("longtail") else []


@pytest.fixture
def start_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Make Live start a shell command instead of its child."""

    def replace(command: str) -> None:
        script = tmp_path / "child"
        script.write_text(f"#!/bin/sh\n{command}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        monkeypatch.setenv("LONGTAIL_LIVE_AFTER", "0")

    yield replace


def test_a_dead_server_costs_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LONGTAIL_LIVE_AFTER", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    began = time.monotonic()
    train_live(root, "training", range(1, 101))
    assert time.monotonic() - began < 1
    until = time.monotonic() + 60
    while tracking._writes(root, "training"):  # and the child gives up by itself
        assert time.monotonic() < until
        time.sleep(0.1)
    assert "127.0.0.1" in live.log_path(root, "training").read_text()
    assert capfd.readouterr().err == ""


def test_a_dead_child_is_one_warning(
    root: Path, start_instead: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    start_instead("exit 1")
    with Live(cell(), "training", shown(), root=root) as curves:
        for epoch in range(1, 20):
            curves.log(epoch, {"loss": 1.0})
            time.sleep(0.02)
    (line,) = capfd.readouterr().err.splitlines()
    assert "training goes on" in line and "BrokenPipe" in line


def test_a_full_pipe_does_not_block(
    root: Path,
    start_instead: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    start_instead("exec sleep 60")
    monkeypatch.setattr(live, "PENDING_BYTES", 100_000)
    monkeypatch.setattr(live, "EXIT_WAIT_S", 0.2)
    began = time.monotonic()
    with Live(cell(), "training", shown(), root=root) as curves:
        for epoch in range(1, 10_000):
            curves.log(epoch, {"loss": 1.0})
    assert time.monotonic() - began < 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "rows are dropped" in line
    assert curves._child is not None
    curves._child.kill()
    curves._child.wait()


def test_nothing_that_is_wrong_stops_a_training(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LONGTAIL_LIVE_AFTER", "soon")
    with Live(cell(), "training", {"method": object()}, root=root) as curves:
        curves.log(1, {"loss": "high"})  # type: ignore[dict-item]
    assert len(capfd.readouterr().err.splitlines()) == 1
    monkeypatch.setenv("LONGTAIL_LIVE_AFTER", "0")
    files.write_text(root / "runs" / ".live", "a file where a folder should be")
    with Live(cell(), "training", shown(), root=root) as curves:
        curves.log(1, {"loss": 1.0})
    assert len(capfd.readouterr().err.splitlines()) == 1
