"""MLflow as a view: `longtail track` makes one run of each finished cell, out of result files and DVC's lock.

Nothing here decides a number. What a run shows is read from a plan's `stages/<plan>/dvc.lock` and from those files
below `results/` that the lock vouches for, so a lost store, or a clone that trained nothing, gets the same runs.
Running it twice writes nothing the second time. Two digests find a run that is there already (tags):

    longtail.training   identity of a training: command, dependencies, parameters of its train stage
    longtail.key        identity of a finished cell: what all its stages read and wrote; set last, so a run
                        without it is one that something interrupted, and the next sync completes it

A run of `longtail.tracking.live` has the first from its start; sync gives it what it lacks and then the second.
The newest results of a cell carry `longtail.current` = yes, runs that they replaced = no.

mlflow is imported late: 2 s that a broken lock need not wait for.
"""

import getpass
import hashlib
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtail.tracking import view
from longtail.tracking.finished import ALIGNED, Result, flatten, in_plans, results
from longtail.tracking.live import flock, log_path
from longtail.workflow.cells import Cell
from longtail.workflow.fingerprint import versions
from longtail.workflow.locks import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Metric, Run

EXPERIMENT = "longtail"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # or the page opens on traces of agents
ARTIFACTS = ("table.md", "report.html", "summary.json")
CELL_ARTIFACTS = ("metrics.json", "classes.csv", "reliability.csv")
NOTES = 8  # printed; the cells of a plan that still runs are many
LOCKED_S = 10.0  # how long another program may write to the database
BATCH = 1000  # MLflow takes no more metrics at once
ALARM_S = 60  # the child's time for one contact with the store
READ_BYTES = 1 << 16


class TrackingError(ValueError):
    """The store cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class Summary:
    """What a sync did, in runs of cells.

    `notes` says what was left out, and why; `pages` is where each plan's runs are, below the address of a server.
    """

    created: int
    finished: int
    unchanged: int
    superseded: int
    notes: tuple[str, ...]
    pages: Mapping[str, str]


# --- the store ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """An open tracking store; all runs are in one experiment."""

    client: "MlflowClient"
    experiment: str
    artifacts: str
    uri: str

    def runs(self) -> "list[Run]":
        """All runs that the user has not deleted."""
        found: list[Run] = []
        page: str | None = ""
        while page is not None:
            part = self.client.search_runs([self.experiment], max_results=1000, page_token=page or None)
            found += part
            page = part.token or None
        return found


def location(root: Path) -> tuple[str, Path | None]:
    """The tracking URI, and for a SQLite one its file: MLFLOW_TRACKING_URI, else mlflow.db in `root`."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').as_posix()}"
    file = uri.removeprefix("sqlite:///").partition("?")[0]
    return uri, Path(file).absolute() if uri.startswith("sqlite:///") else None


@contextmanager
def open_store(root: Path) -> Iterator[Store]:
    """The store, made where there is none, and for this process alone until the block ends.

    Making the tables takes seconds and fails when two processes do it; looking for a run and then creating it
    would double runs. Both are safe on one machine; two machines on one server must not sync at a time.

    Raises TrackingError, which says what to do, when MLflow cannot use the store, when it was made in another folder (a
    copied or moved checkout: the store keeps absolute paths, and artifacts would go there), and when the experiment is
    deleted.
    """
    uri, database = location(root)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # or it tells of tables that it makes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default waits minutes
    guard = Path(f"{database}.lock") if database else root / "runs" / ".live" / "store.lock"
    guard.parent.mkdir(parents=True, exist_ok=True)
    with open(guard, "ab") as file:
        flock(file, wait=True)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            if database:
                _usable(database)
            client = MlflowClient(tracking_uri=uri)
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                folder = str(database.parent / "mlruns") if database else None
                created = client.create_experiment(EXPERIMENT, folder, tags=EXPERIMENT_TAGS)
                experiment = client.get_experiment(created)
            _check_experiment(experiment, shown(uri), database)
            yield Store(client, experiment.experiment_id, experiment.artifact_location, uri)
        except MlflowException as error:
            if "MLFLOW_ALLOW_FILE_STORE" in str(error):
                raise TrackingError(
                    f"{shown(uri)} is a folder, and MLflow keeps runs in databases: unset MLFLOW_TRACKING_URI (then "
                    f"it is mlflow.db here), or set it to sqlite:///{uri.removeprefix('file://')}/mlflow.db or to the "
                    "address of a server; MLFLOW_ALLOW_FILE_STORE=true has MLflow take the folder"
                ) from error
            raise TrackingError(f"MLflow cannot use {shown(uri)} ({_hidden(one_line(error), uri)})") from error
        except (SQLAlchemyError, sqlite3.Error) as error:
            said = one_line(getattr(error, "orig", None) or error)
            what = (
                "another program writes to it: end that (`mlflow ui`? a copy?), then track again" if "locked" in said
                else "let yourself write there" if "readonly" in said
                else "move it away, and `longtail track` makes another one out of the results" if database
                else "is the server there, and the password right?"
            )  # fmt: skip
            raise TrackingError(f"MLflow cannot use {shown(uri)} ({_hidden(said, uri)}): {what}") from error


def _usable(database: Path) -> None:
    """Raise sqlite3.Error for a database that cannot be written to: MLflow would try ten times, in 100 seconds."""
    if database.exists():
        with closing(sqlite3.connect(database, timeout=LOCKED_S)) as there:
            there.execute("begin immediate")
            there.rollback()


def _check_experiment(experiment: "Experiment", uri: str, database: Path | None) -> None:
    if experiment.lifecycle_stage == "deleted":
        number = experiment.experiment_id
        raise TrackingError(
            f"the experiment {EXPERIMENT!r} of {uri} is deleted; `MLFLOW_TRACKING_URI={uri} mlflow experiments restore "
            f"--experiment-id {number}` brings it back"
        )
    place = Path(experiment.artifact_location.removeprefix("file://"))
    if database and place.name == "mlruns" and place.parent.resolve() != database.parent.resolve():  # as we make it
        raise TrackingError(
            f"{database} was made in {place.parent}, and would put its artifacts there: the checkout was copied or "
            f"moved; remove {database} (and mlruns beside it), and `longtail track` makes them again out of the results"
        )


def shown(uri: str) -> str:
    """A tracking URI without the password that may be in it, and without what follows its question mark."""
    return re.sub(r"\?.+", "?***", re.sub(r"(?<=://)([^/@:]*):[^/]*@", r"\1:***@", uri))


def _hidden(text: str, uri: str) -> str:
    """What MLflow says, without the password and the query of the URI."""
    for found in (re.search(r"(?<=://)[^/@:]*:([^/]*)@", uri), re.search(r"\?(.+)", uri)):
        text = text.replace(found[1], "***") if found and found[1] else text
    return text


def _plan_run(store: Store, runs: "Iterable[Run]", plan: str) -> "Run":
    """The parent of the plan's runs."""
    for run in runs:
        if run.data.tags.get("longtail.kind") == "plan" and run.data.tags.get("longtail.plan") == plan:
            return run
    note = (
        f"All cells of the plan `{plan}`; the table of means and deviations is among the artifacts.\n\n"
        "To compare: choose *Model training* at the top left, expand this run in the list, tick cells, press "
        "*Compare*. *Group by* `method` gives means over seeds. For the current results alone, search "
        f"`tags.\"longtail.plan\" = '{plan}' AND tags.\"longtail.current\" = 'yes'`; docs/mlflow.md has more.\n\n"
        "`accuracy/...` and plain names are raw logits on the test set at the last epoch; `aligned .../` is "
        "the same after energy alignment; `curve/` is training. Fractions; nll in nats."
    )
    tags = {"longtail.kind": "plan", "longtail.plan": plan, "mlflow.note.content": note, **_user()}
    run = store.client.create_run(store.experiment, run_name=plan, tags=tags)
    store.client.set_terminated(run.info.run_id)
    return run


def _identity(cell: Cell, training: str, parent: str) -> dict[str, str]:
    """The tags that a run of a cell has from its start."""
    return {
        "longtail.kind": "cell",
        "longtail.training": training,
        **{f"longtail.{name}": value for name, value in cell.names().items()},
        "mlflow.parentRunId": parent,
        "mlflow.source.name": cell.address("train"),
        "mlflow.source.type": "PROJECT",
        **_user(),
    }


def _user() -> dict[str, str]:
    with suppress(OSError, KeyError):
        return {"mlflow.user": getpass.getuser()}
    return {}


# --- sync ---------------------------------------------------------------------------------------------------


def sync(root: str | Path, plans: Sequence[str] | None = None) -> Summary:
    """Give every finished cell of the plans (None: of all) its run; see the module's head.

    Raises TrackingError as `results` and `open_store` do.
    """
    root = Path(root).resolve()
    found, notes = results(root, plans)
    pages: dict[str, str] = {}
    counts = dict.fromkeys(("created", "finished", "unchanged", "superseded"), 0)
    if found:
        with open_store(root) as store:
            about = {lock: _about(root, lock) for lock in {result.cell.lock for result in found}}
            runs = store.runs()
            parents = {plan: _plan_run(store, runs, plan) for plan in {result.cell.plan for result in found}}
            by_cell: dict[Cell, list[Run]] = {}
            for run in runs:
                if (cell := _cell(run)) is not None:
                    by_cell.setdefault(cell, []).append(run)
            for result in found:
                same = by_cell.get(result.cell, [])
                outcome, current = _upsert(
                    store, root, result, same, parents[result.cell.plan], about[result.cell.lock]
                )
                if current is None:
                    notes.append(f"{result.cell.plan}: {result.cell.title}: still written to; track again")
                    continue
                counts[outcome] += 1
                others = [run for run in same if run.info.run_id != current]
                counts["superseded"] += sum(_supersede(store, root, run, result) for run in others)
            there = in_plans(root)
            for cell, same in by_cell.items():
                if cell.plan in parents and not there(cell):
                    counts["superseded"] += sum(_retire(store, run) for run in same)
            for plan, parent in parents.items():
                upload(store, root, plan, parent)
            pages = show(store, sorted(parents))
    return Summary(**counts, notes=tuple(notes), pages=pages)


def _cell(run: "Run") -> Cell | None:
    tags = run.data.tags
    if tags.get("longtail.kind") != "cell":
        return None
    return Cell(**{name: tags.get(f"longtail.{name}", "") for name in Cell.__dataclass_fields__})


def _upsert(
    store: Store, root: Path, result: Result, same: "list[Run]", parent: "Run", about: dict[str, str]
) -> tuple[str, str | None]:
    """What happened to the result's run, and its id; no id when a living child is still writing to it."""
    for run in same:
        if run.data.tags.get("longtail.key") == result.key:
            if run.data.tags.get("longtail.current") != "yes":  # back to what it was before
                store.client.set_tag(run.info.run_id, "longtail.current", "yes")
            _log_params(store.client, run, result)  # those of a method that joined the plan since
            return "unchanged", run.info.run_id
    keyless = [run for run in same if "longtail.key" not in run.data.tags]
    open_runs = [run for run in keyless if run.data.tags.get("longtail.training") == result.training]
    if open_runs and _writes(root, result.training):
        return "unchanged", None
    identity = _identity(result.cell, result.training, parent.info.run_id)
    if open_runs:
        run = max(open_runs, key=lambda run: run.info.start_time)
    else:
        run = store.client.create_run(
            store.experiment, start_time=result.started_ms, tags=identity, run_name=result.cell.title
        )
    _complete(store, root, run, result, identity | result.tags | about | {"mlflow.note.content": _note(result)})
    return "finished" if open_runs else "created", run.info.run_id


def _complete(store: Store, root: Path, run: "Run", result: Result, tags: dict[str, str]) -> None:
    """Write what the run lacks of the result; the key goes last."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag

    client, run_id = store.client, run.info.run_id
    there = {(name, row.step) for name in run.data.metrics for row in client.get_metric_history(run_id, name)}
    rows = [Metric(*row) for row in result.rows() if (row[0], row[3]) not in there]
    log_rows(client, run_id, rows)
    _log_params(client, run, result)
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    if result.data is not None:
        path, md5 = result.data
        data = Dataset(result.cell.dataset, md5[:8], "local", json.dumps({"uri": path, "md5": md5}))
        context = InputTag("mlflow.data.context", "training")
        client.log_inputs(run_id, datasets=[DatasetInput(data, [context])])
    for file in (root / result.cell.results / name for name in CELL_ARTIFACTS):
        if file.is_file():
            client.log_artifact(run_id, str(file))
    client.log_dict(run_id, result.params, "params.json")
    client.set_terminated(run_id, "FINISHED", end_time=max(result.ended_ms, run.info.start_time))
    key = {"longtail.state": "finished", "longtail.current": "yes", "longtail.key": result.key}
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in key.items()])


def _log_params(client: "MlflowClient", run: "Run", result: Result) -> None:
    """Write the parameters that a run has not."""
    from mlflow.entities import Param

    params = [Param(key, value) for key, value in result.params.items() if key not in run.data.params]
    for start in range(0, len(params), 100):
        client.log_batch(run.info.run_id, params=params[start : start + 100])


def log_rows(client: "MlflowClient", run_id: str, rows: "Sequence[Metric]") -> None:
    """Write metrics to a run, as many at once as MLflow takes."""
    for start in range(0, len(rows), BATCH):
        client.log_batch(run_id, metrics=rows[start : start + BATCH])


def _supersede(store: Store, root: Path, run: "Run", result: Result) -> bool:
    """Mark another run of the result's cell as history; False when it is already, or is none."""
    tags = run.data.tags
    if tags.get("longtail.current") == "no":
        return False
    if "longtail.key" not in tags:
        later = run.info.start_time > result.written_ms
        if later or _writes(root, tags.get("longtail.training", "")):
            return False  # a training of today, with other settings: its own results will come
        if run.info.status == "RUNNING":
            trained = tags.get("longtail.state") == "trained"
            store.client.set_terminated(run.info.run_id, "FINISHED" if trained else "KILLED")
    store.client.set_tag(run.info.run_id, "longtail.current", "no")
    return True


def _retire(store: Store, run: "Run") -> bool:
    """Mark the current run of a cell that left its plan as history; False when it is already, or still runs."""
    if run.data.tags.get("longtail.current") != "yes":
        return False
    store.client.set_tag(run.info.run_id, "longtail.current", "no")
    return True


def _writes(root: Path, training: str) -> bool:
    """Whether a child of this training lives, here."""
    try:
        with open(log_path(root, training), "rb") as file:
            return not flock(file, wait=False)
    except OSError:
        return False


def show(store: Store, plans: Sequence[str]) -> dict[str, str]:
    """Keep the view of each plan in the experiment, where it is not there; the address of each."""
    there = store.client.get_experiment(store.experiment).tags
    for plan in plans:
        name, state = f"{view.TAG}{view.key(plan)}", view.state(plan)
        if there.get(name) != state:
            store.client.set_experiment_tag(store.experiment, name, state)
    return {plan: view.address(store.experiment, plan) for plan in plans}


def upload(store: Store, root: Path, plan: str, parent: "Run") -> None:
    """Attach the plan's table, page and highest accuracy where they changed."""
    for name in ARTIFACTS:
        path, tag = root / "results" / plan / name, f"longtail.md5.{name}"
        if path.is_file():
            md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            if parent.data.tags.get(tag) != md5:
                store.client.log_artifact(parent.info.run_id, str(path))
                if name == "summary.json" and (best := _best(json.loads(path.read_text()))):
                    store.client.log_metric(parent.info.run_id, "accuracy/all", best[0])
                    store.client.set_tag(parent.info.run_id, "longtail.best", best[1])
                store.client.set_tag(parent.info.run_id, tag, md5)


def _best(summary: Mapping[str, Any]) -> tuple[float, str] | None:
    """The highest accuracy of raw logits in a plan's summary, mean over its seeds, and whose it is."""
    found = [
        (value["accuracy"], f"{method}, recipe {recipe}, {dataset}")
        for dataset, recipes in summary.items() for recipe, methods in recipes.items()
        for method, value in methods.items() if isinstance(value, dict) and "accuracy" in value
    ]  # fmt: skip
    return max(found, default=None)


def _note(result: Result) -> str:
    """What the run's page says first."""
    lines = [f"raw {result.metrics['accuracy/all']:.2%}"]
    lines.append(f"{ALIGNED[1]} {result.metrics[f'{ALIGNED[1]}/accuracy']:.2%}")
    address = result.cell.address("evaluate")
    return (
        f"Test accuracy at epoch {result.last_epoch}: {', '.join(lines)}.\n\n"
        f"Files: `{result.cell.results}/`. Again: `dvc --wait-for-lock repro {address}`."
    )


def _about(root: Path, lock: str) -> dict[str, str]:
    """Where the results were found: commit, lock, and what wrote the run."""
    tags = {
        "longtail.lock.sha256": hashlib.sha256((root / lock).read_bytes()).hexdigest(),
        "longtail.tracked_with": ", ".join(map(" ".join, versions().items())),
    }
    if commit := git(root, "rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        tags["mlflow.source.git.dirty"] = str(git(root, "status", "--porcelain", "--", lock) != "")
    return tags


def git(root: Path, *words: str) -> str | None:
    """What a git command says; None where it fails, or there is no git."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else None
    return None


def track(root: str | Path, plans: Sequence[str] | None = None) -> None:
    """`longtail track`: sync, then say what happened and where to look.

    Raises TrackingError as `sync` does.
    """
    root = Path(root).resolve()
    summary = sync(root, plans)
    print(
        f"MLflow runs: {summary.created} created, {summary.finished} finished, "
        f"{summary.unchanged} unchanged, {summary.superseded} superseded"
    )
    for note in summary.notes[:NOTES]:
        print(f"left out: {note}")
    if len(summary.notes) > NOTES:
        print(f"left out: {len(summary.notes) - NOTES} more")
    for table in sorted((root / "results").glob("*/table.md")):
        if plans is None or table.parent.name in plans:
            page = table.parent / "report.html"
            print(f"{table.parent.name}: {_near(table)}" + (f", page {_near(page)}" if page.exists() else ""))
    uri, database = location(root)
    if database is None:
        server = shown(uri).rstrip("/")
    else:
        store = shlex.quote(f"sqlite:///{_near(database)}")
        # one reader needs one worker and no job runners: 0.4 GB instead of 2.3
        switches = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
        print(f"runs: {switches} mlflow ui --backend-store-uri {store} --workers 1")
        server = "http://127.0.0.1:5000"
    if summary.pages:
        print("side by side, current runs with accuracy of all, few and ECE:")
    for plan, address in summary.pages.items():
        print(f"  {plan}: {server}{address}")


def _near(path: Path) -> str:
    """The path as seen from here, where it is below."""
    with suppress(ValueError):
        return path.relative_to(Path.cwd()).as_posix()
    return path.as_posix()


# --- live: the child process --------------------------------------------------------------------------------


class _LiveRun:
    """A run that grows while its training runs; the same training's interrupted run is gone on with."""

    def __init__(self, start: Mapping[str, Any]):
        cell = Cell(**{name: str(value) for name, value in start["cell"].items()})
        root, training = Path(start["root"]), start["training"]
        with open_store(root) as store:
            runs = store.runs()
            parent = _plan_run(store, runs, cell.plan)
            tags = _identity(cell, training, parent.info.run_id) | {"longtail.state": "training"}
            tags |= {f"version.{name}": version for name, version in versions().items()}
            self.client = store.client
            self.there: set[tuple[str, int]] = set()
            for run in runs:
                if (
                    _cell(run) == cell
                    and run.data.tags["longtail.training"] == training
                    and "longtail.key" not in run.data.tags
                    and run.data.tags.get("longtail.current") != "no"
                ):
                    self._go_on(run)
                    break
            else:
                run = self.client.create_run(store.experiment, start_time=start["time"], tags=tags, run_name=cell.title)
                self.run_id = run.info.run_id
                self._describe(cell, start["params"])

    def _go_on(self, run: "Run") -> None:
        self.run_id = run.info.run_id
        self.client.update_run(self.run_id, status="RUNNING")
        self.client.set_tag(self.run_id, "longtail.state", "training")
        for name in run.data.metrics:
            self.there |= {(name, row.step) for row in self.client.get_metric_history(self.run_id, name)}

    def _describe(self, cell: Cell, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        shown = [Param(key, value) for key, value in (flatten(params) | cell.names()).items()]
        for start in range(0, len(shown), 100):
            self.client.log_batch(self.run_id, params=shown[start : start + 100])

    def log(self, messages: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows that are not there; a resumed training repeats epochs."""
        from mlflow.entities import Metric

        rows = [
            Metric(f"curve/{name}", value, message["time"], message["epoch"])
            for message in messages
            for name, value in message["values"].items()
            if (f"curve/{name}", message["epoch"]) not in self.there
        ]
        log_rows(self.client, self.run_id, rows)

    def end(self, outcome: str) -> None:
        """Say how training ended; after a good end the run stays open until `sync` finishes it."""
        self.client.set_tag(self.run_id, "longtail.state", "trained" if outcome == "finished" else outcome)
        if outcome != "finished":
            self.client.set_terminated(self.run_id, "FAILED" if outcome == "failed" else "KILLED")


def live_child() -> None:
    """Read the messages of `longtail.tracking.live` from standard input until it closes, and write them to MLflow.

    Every contact with the store has ALARM_S; then the process ends (SIGALRM), since nobody looks after it.
    """
    os.nice(10)
    run: _LiveRun | None = None
    start: dict[str, Any] = {}
    outcome, rest = "killed", b""  # a pipe that closes without a word: the training was killed
    while data := os.read(sys.stdin.fileno(), READ_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        signal.alarm(ALARM_S)
        for message in messages:
            outcome = message.get("end", outcome)
            if "start" in message:
                start = message["start"]
                run = _LiveRun(start)
        if run is not None:
            run.log(message for message in messages if "epoch" in message)
        signal.alarm(0)
    if run is not None:
        signal.alarm(ALARM_S)
        run.end(outcome)
        log = log_path(start["root"], start["training"])
        with suppress(OSError):
            if log.stat().st_size == 0:
                log.unlink()


def main() -> None:
    """`python -m longtail.tracking.runs live`: the child process of `longtail.tracking.live`."""
    if sys.argv[1:] != ["live"]:
        sys.exit("usage: python -m longtail.tracking.runs live < messages of longtail.tracking.live")
    began = time.monotonic()
    try:
        live_child()
    except Exception as error:
        sys.exit(f"after {time.monotonic() - began:.0f} s: {error!r}")


if __name__ == "__main__":
    main()
