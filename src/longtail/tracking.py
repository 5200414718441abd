"""MLflow as a view: `longtail track` makes one run of each finished cell, out of result files and DVC's lock.

Nothing here decides a number. What a run shows is read from `stages/dvc.lock` and from those files below
`results/` that the lock vouches for, so a lost store, or a clone that trained nothing, gets the same runs.
Running it twice writes nothing the second time. Two digests find a run that is there already (tags):

    longtail.training   identity of a training: command, dependencies, parameters of its train stage
    longtail.key        identity of a finished cell: what all its stages read and wrote; set last, so a run
                        without it is one that something interrupted, and the next sync completes it

A run of `longtail.live` has the first from its start; sync gives it what it lacks and then the second.
The newest results of a cell carry `longtail.current` = yes, runs that they replaced = no.

This is the only file that imports mlflow, and it does so late: 2 s that a broken lock need not wait for.
"""

import getpass
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from longtail import files
from longtail.live import digest, fingerprint, flock, log_path, plain, versions

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

EXPERIMENT = "longtail"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # or the page opens on traces of agents
LOCK = "stages/dvc.lock"
STAGES = ("train", "predict", "align", "evaluate")
STAGE_NAME = re.compile(
    rf"({'|'.join(STAGES)})-(?P<plan>[^@]+)"
    r"@(?P<dataset>[^-@]+)-(?P<recipe>[^-@]+)-(?P<method>[^-@]+)-(?P<seed>\d+)"
)
SECTIONS = (("datasets", "dataset"), ("recipes", "recipe"), ("methods", "method"))
MEASURES = {
    "accuracy": "accuracy",
    "many": "accuracy many",
    "medium": "accuracy medium",
    "few": "accuracy few",
    "balanced_error": "balanced error",
    "nll": "nll",
    "ece": "ece",
}
ALIGNED = (
    ("aligned_on_held_out", "aligned held-out"),
    ("aligned_on_train", "aligned train"),
)  # the first there is
CURVES = ("lr", "loss", "train_accuracy", "held_out_accuracy")
MACHINE = ("device", "cpu", "gpu", "threads")
MACHINE_METRICS = {"seconds": "training seconds", "images_per_s": "images per s"}
ARTIFACTS = ("table.md", "report.html", "summary.json")
NOTES = 8  # printed; the cells of a plan that still runs are many
BATCH = 1000  # MLflow takes no more metrics at once
ALARM_S = 60  # the child's time for one contact with the store
READ_BYTES = 1 << 16


class TrackingError(ValueError):
    """The lock, a result file or the store cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class Summary:
    """What a sync did, in runs of cells.

    `notes` says what was left out, and why; `page` is where the runs are, below the address of a server.
    """

    created: int
    finished: int
    unchanged: int
    superseded: int
    notes: tuple[str, ...]
    page: str


@dataclass(frozen=True)
class Cell:
    """The coordinates of one training in the grid of its plan."""

    plan: str
    dataset: str
    recipe: str
    method: str
    seed: str

    @property
    def folder(self) -> str:
        """Its results, relative to the repository."""
        return f"results/{self.plan}/cells/{self.dataset}/{self.recipe}/{self.method}/{self.seed}"

    @property
    def title(self) -> str:
        """The run's name, what differs most in front: lists cut names after some 15 letters."""
        return f"{self.method} · seed {self.seed} · {self.dataset} · {self.recipe}"

    def stage(self, kind: str) -> str:
        """The name of one of its stages in stages/dvc.yaml."""
        return f"{kind}-{self.plan}@{self.dataset}-{self.recipe}-{self.method}-{self.seed}"

    def names(self) -> dict[str, str]:
        """Coordinates by name."""
        return dict(vars(self))


@dataclass(frozen=True)
class Result:
    """A finished cell as its run shows it."""

    cell: Cell
    training: str
    key: str
    ended_ms: int  # of training
    written_ms: int  # its files in results/
    seconds: float | None
    params: dict[str, str]
    curves: list[tuple[int, dict[str, float]]]
    metrics: dict[str, float]
    last_epoch: int
    tags: dict[str, str]
    data: tuple[str, str] | None  # path and MD5 of the data set

    @property
    def started_ms(self) -> int:
        """When training began; its end where nobody wrote down how long it took."""
        return self.ended_ms - round(1000 * (self.seconds or 0))

    def rows(self) -> Iterator[tuple[str, float, int, int]]:
        """All numbers as (name, value, timestamp in ms, step); the same result gives the same rows."""
        # First, as the compare page plots what was first; at step 0, as the pages draw bars for that and points else.
        for name, value in self.metrics.items():
            yield name, value, self.ended_ms, 0
        for number, (epoch, values) in enumerate(self.curves, 1):
            passed = (self.ended_ms - self.started_ms) * number // len(self.curves)
            for name, value in values.items():
                yield f"curve/{name}", value, self.started_ms + passed, epoch


# --- what is finished: the lock and the result files --------------------------------------------------------


def read_lock(root: Path) -> dict[str, dict[str, Any]]:
    """The stages of stages/dvc.lock by name.

    Raises TrackingError when there is none or when it is no lock of DVC's schema 2.0.
    """
    path = root / LOCK
    try:
        lock = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        raise TrackingError(f"{path}: no such file; run `dvc repro` before `longtail track`") from None
    except yaml.YAMLError as error:
        raise TrackingError(f"{path}: not YAML ({_one_line(error)}); `git checkout {LOCK}`?") from error
    stages = lock.get("stages") if isinstance(lock, dict) else None
    if not isinstance(stages, dict) or str(lock.get("schema")) != "2.0":
        raise TrackingError(f"{path}: not a lock of DVC's schema 2.0 (schema: '2.0', stages: {{name: ...}})")
    for name, entry in stages.items():
        if not isinstance(entry, dict) or "cmd" not in entry:
            raise TrackingError(f"{path}: stages.{name} is no entry with a cmd")
        for which in ("deps", "outs"):
            items = entry.get(which, [])
            if not isinstance(items, list) or not all(isinstance(item, dict) and "path" in item for item in items):
                raise TrackingError(f"{path}: stages.{name}.{which} is no list of {{path, md5, ...}}")
        declared = entry.get("params", {})
        if not isinstance(declared, dict) or not all(isinstance(values, dict) for values in declared.values()):
            raise TrackingError(f"{path}: stages.{name}.params is no {{file: {{key: value}}}}")
    return stages


def results(root: Path, plans: Sequence[str] | None) -> tuple[list[Result], list[str]]:
    """The finished cells of the plans (None: of all), and a note for each that cannot be shown.

    A cell is finished when the lock has its four stages and the files are those that the lock names.

    Raises TrackingError for an unusable lock, a plan that has no stage in it, and a result file that is what
    the lock says but not what this program reads.
    """
    stages = read_lock(root)
    cells: dict[Cell, dict[str, dict[str, Any]]] = {}
    for name, entry in stages.items():
        if match := STAGE_NAME.fullmatch(name):
            cells.setdefault(Cell(**match.groupdict()), {})[match[1]] = entry
    known = sorted({cell.plan for cell in cells})
    for plan in plans or ():
        if plan not in known:
            raise TrackingError(f"{root / LOCK}: nothing of plan {plan!r}; it has {', '.join(known) or 'none'}")
    found, notes = [], []
    for cell, entries in cells.items():
        if plans is not None and cell.plan not in plans:
            continue
        trouble = _unfinished(entries) or _changed(root, cell, entries)
        if trouble:
            notes.append(f"{cell.plan}: {cell.title}: {trouble}")
        else:
            found.append(_result(root, cell, entries, stages.get(f"subsample@{cell.dataset}", {})))
    return found, notes


def _unfinished(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Why the cell's stages are not one chain: one is missing, or read what another has replaced since."""
    missing = [kind for kind in STAGES if kind not in entries]
    if missing:
        return f"not finished, no {', '.join(missing)} in {LOCK}"
    made = {path: md5 for entry in entries.values() for path, md5 in _files(entry, "outs")}
    for kind, entry in entries.items():
        for path, md5 in _files(entry, "deps"):
            if made.get(path, md5) != md5:
                return f"not finished, its {kind} is from before the last change of {path}"
    return ""


def _changed(root: Path, cell: Cell, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Why the cell's files are not those of the lock; empty when they are."""
    made = {path: md5 for entry in entries.values() for path, md5 in _files(entry, "outs")}
    for name in ("history.csv", "metrics.json", "classes.csv"):
        path = f"{cell.folder}/{name}"
        if path not in made:
            return f"no stage of it in {LOCK} has the out {path}"
        try:
            md5 = hashlib.md5((root / path).read_bytes(), usedforsecurity=False).hexdigest()
        except OSError:
            return f"{path} is missing; `git checkout {path}`, or run `dvc repro`"
        if md5 != made[path]:
            return f"{path} is not the one in {LOCK} (MD5 {md5}, there {made[path]}); run `dvc repro`"
    return ""


def _result(root: Path, cell: Cell, entries: Mapping[str, Mapping[str, Any]], subsample: Mapping[str, Any]) -> Result:
    train = entries["train"]
    training = fingerprint(train["cmd"], _files(train, "deps"), _keys(train))
    facts = {
        kind: [sorted(_files(entry, "deps")), sorted(_files(entry, "outs")), _keys(entry)]
        for kind, entry in entries.items()
    }
    machine = _machine(root, cell, training)
    written_ms = _mtime_ms(root / cell.folder / "history.csv")
    last_epoch, metrics = _metrics(root / cell.folder / "metrics.json")
    seconds = machine.get("seconds")
    for key, name in MACHINE_METRICS.items():
        if isinstance(machine.get(key), (int, float)):
            metrics[name] = float(machine[key])
    tags = {f"longtail.{key}": str(machine[key]) for key in MACHINE if machine.get(key) is not None}
    known = machine.get("versions") or {name: machine[name] for name in ("torch",) if name in machine}
    tags |= {f"version.{name}": str(version) for name, version in known.items()}
    data = [(path, md5) for path, md5 in _files(train, "deps") if path.endswith(f"/{cell.dataset}.npz")]
    return Result(
        cell=cell,
        training=training,
        key=digest(facts),
        ended_ms=machine.get("ended_ms", written_ms),
        written_ms=written_ms,
        seconds=float(seconds) if isinstance(seconds, (int, float)) else None,
        params=_params(cell, [*entries.values(), subsample]),
        curves=_curves(root / cell.folder / "history.csv"),
        metrics=metrics,
        last_epoch=last_epoch,
        tags=tags,
        data=data[0] if data else None,
    )


def _files(entry: Mapping[str, Any], which: str) -> list[tuple[str, str]]:
    return [(item["path"], str(item.get("md5"))) for item in entry.get(which, ())]


def _keys(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a lock's entry as {key: value}, as a stage has them (there is one params file)."""
    return {key: value for values in entry.get("params", {}).values() for key, value in values.items()}


def _params(cell: Cell, entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Flat text parameters, without the names of the cell's blocks: recipe.epochs, not recipes.x.epochs."""
    shown = cell.names()
    for entry in entries:
        for key, value in _keys(entry).items():
            for section, one in SECTIONS:
                block = f"{section}.{getattr(cell, one)}"
                if key == block or key.startswith(f"{block}."):
                    key = one + key.removeprefix(block)
            shown |= flatten({key: value})
    return shown


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as text under dotted names, so that 1.0 and 1 look alike; a list is `0, 1, 2`."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            flat[f"{prefix}{key}"] = ", ".join(map(_text, value)) or "none"
        else:
            flat[f"{prefix}{key}"] = _text(value)
    return flat


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(plain(value))


def _machine(root: Path, cell: Cell, training: str) -> dict[str, Any]:
    """What the training machine left behind, and when; nothing of another training or in another clone."""
    path = root / "runs" / Path(*cell.names().values()) / "machine.json"
    with suppress(OSError, ValueError):
        machine = files.read_json(path)
        if isinstance(machine, dict) and machine.get("training") == training:
            return machine | {"ended_ms": _mtime_ms(path)}
    return {}


def _mtime_ms(path: Path) -> int:
    return path.stat().st_mtime_ns // 1_000_000


def _metrics(path: Path) -> tuple[int, dict[str, float]]:
    """The last epoch and the named numbers of metrics.json; a group without classes has no number."""
    written = files.read_json(path)
    try:
        last = written["last"]
        shown = {name: last["raw"][key] for key, name in MEASURES.items()}
        block, group = next(pair for pair in ALIGNED if pair[0] in last)
        # shorter than `accuracy few`: the compare page cuts long names
        shown |= {f"{group}/{key.replace('_', ' ')}": last[block][key] for key in MEASURES}
        best = written.get("best_on_held_out")
        if best is not None:
            shown["best epoch/accuracy"] = best["raw"]["accuracy"]
            shown["best epoch/epoch"] = best["epoch"]
        return int(last["epoch"]), {name: float(value) for name, value in shown.items() if value is not None}
    except (KeyError, StopIteration, TypeError, ValueError) as error:
        raise TrackingError(f"{path}: not the metrics of a cell: {error!r}") from error


def _curves(path: Path) -> list[tuple[int, dict[str, float]]]:
    try:
        return [
            (int(row["epoch"]), {name: float(row[name]) for name in CURVES if row[name]})
            for row in files.read_csv(path)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise TrackingError(f"{path}: not a history (epoch, {', '.join(CURVES)}): {error!r}") from error


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
    return uri, Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


@contextmanager
def open_store(root: Path) -> Iterator[Store]:
    """The store, made where there is none, and for this process alone until the block ends.

    Making the tables takes seconds and fails when two processes do it; looking for a run and then creating it
    would double runs. Both are safe on one machine; two machines on one server must not sync at a time.

    Raises TrackingError when MLflow cannot use the store.
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

        try:
            client = MlflowClient(tracking_uri=uri)
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                folder = str(database.parent / "mlruns") if database else None
                created = client.create_experiment(EXPERIMENT, folder, tags=EXPERIMENT_TAGS)
                experiment = client.get_experiment(created)
            yield Store(client, experiment.experiment_id, experiment.artifact_location, uri)
        except MlflowException as error:
            raise TrackingError(f"MLflow cannot use {uri} ({_one_line(error)})") from error


def _plan_run(store: Store, runs: "Iterable[Run]", plan: str) -> "Run":
    """The parent of the plan's runs."""
    for run in runs:
        if run.data.tags.get("longtail.kind") == "plan" and run.data.tags.get("longtail.plan") == plan:
            return run
    note = (
        f"All cells of the plan `{plan}`; the table of means and deviations is among the artifacts.\n\n"
        "To compare: choose *Model training* at the top left, expand this run in the list, tick cells, press "
        "*Compare*. *Group by* `method` gives means over seeds. For the current results alone, search "
        f"`tags.\"longtail.plan\" = '{plan}' AND tags.\"longtail.current\" = 'yes'`.\n\n"
        "Plain names (`accuracy few`) are raw logits on the test set at the last epoch; `aligned .../` is "
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
        "mlflow.source.name": f"stages/dvc.yaml:{cell.stage('train')}",
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
    page = ""
    counts = dict.fromkeys(("created", "finished", "unchanged", "superseded"), 0)
    if found:
        with open_store(root) as store:
            page = f"/#/experiments/{store.experiment}/runs?workflowType=machine_learning"
            about = _about(root)
            runs = store.runs()
            parents = {plan: _plan_run(store, runs, plan) for plan in {result.cell.plan for result in found}}
            by_cell: dict[Cell, list[Run]] = {}
            for run in runs:
                if (cell := _cell(run)) is not None:
                    by_cell.setdefault(cell, []).append(run)
            for result in found:
                same = by_cell.get(result.cell, [])
                outcome, current = _upsert(store, root, result, same, parents[result.cell.plan], about)
                if current is None:
                    notes.append(f"{result.cell.plan}: {result.cell.title}: still written to; track again")
                    continue
                counts[outcome] += 1
                others = [run for run in same if run.info.run_id != current]
                counts["superseded"] += sum(_supersede(store, root, run, result) for run in others)
            for plan, parent in parents.items():
                notes += _upload(store, root, plan, parent)
    return Summary(**counts, notes=tuple(notes), page=page)


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
    _complete(store, run, result, identity | result.tags | about | {"mlflow.note.content": _note(result)})
    return "finished" if open_runs else "created", run.info.run_id


def _complete(store: Store, run: "Run", result: Result, tags: dict[str, str]) -> None:
    """Write what the run lacks of the result; the key goes last."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    client, run_id = store.client, run.info.run_id
    there = {(name, row.step) for name in run.data.metrics for row in client.get_metric_history(run_id, name)}
    rows = [Metric(*row) for row in result.rows() if (row[0], row[3]) not in there]
    params = [Param(key, value) for key, value in result.params.items() if key not in run.data.params]
    _log_rows(client, run_id, rows)
    for start in range(0, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100])
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    if result.data is not None:
        path, md5 = result.data
        data = Dataset(result.cell.dataset, md5[:8], "local", json.dumps({"uri": path, "md5": md5}))
        context = InputTag("mlflow.data.context", "training")
        client.log_inputs(run_id, datasets=[DatasetInput(data, [context])])
    client.set_terminated(run_id, "FINISHED", end_time=max(result.ended_ms, run.info.start_time))
    key = {"longtail.state": "finished", "longtail.current": "yes", "longtail.key": result.key}
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in key.items()])


def _log_rows(client: "MlflowClient", run_id: str, rows: "Sequence[Metric]") -> None:
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


def _writes(root: Path, training: str) -> bool:
    """Whether a child of this training lives, here."""
    try:
        with open(log_path(root, training), "rb") as file:
            return not flock(file, wait=False)
    except OSError:
        return False


def _upload(store: Store, root: Path, plan: str, parent: "Run") -> list[str]:
    """Attach the plan's table and page where they changed; return notes of what could not be."""
    place = Path(store.artifacts.removeprefix("file://"))
    if place.is_absolute() and not place.exists() and not place.parent.exists():
        return [f"{plan}: no artifacts: the store was made in {place.parent}; remove it and track again"]
    for name in ARTIFACTS:
        path, tag = root / "results" / plan / name, f"longtail.md5.{name}"
        if path.is_file():
            md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            if parent.data.tags.get(tag) != md5:
                store.client.log_artifact(parent.info.run_id, str(path))
                store.client.set_tag(parent.info.run_id, tag, md5)
    return []


def _note(result: Result) -> str:
    """What the run's page says first."""
    lines = [f"raw {result.metrics['accuracy']:.2%}"]
    lines += [
        f"{name} {result.metrics[f'{name}/accuracy']:.2%}"
        for _, name in ALIGNED
        if f"{name}/accuracy" in result.metrics
    ]
    address = f"stages/dvc.yaml:{result.cell.stage('evaluate')}"
    return (
        f"Test accuracy at epoch {result.last_epoch}: {', '.join(lines)}.\n\n"
        f"Files: `{result.cell.folder}/`. Again: `dvc --wait-for-lock repro {address}`."
    )


def _about(root: Path) -> dict[str, str]:
    """Where the results were found: commit, lock, and what wrote the run."""
    tags = {
        "longtail.lock.sha256": hashlib.sha256((root / LOCK).read_bytes()).hexdigest(),
        "longtail.tracked_with": ", ".join(map(" ".join, versions().items())),
    }
    if commit := _git(root, "rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        tags["mlflow.source.git.dirty"] = str(_git(root, "status", "--porcelain", "--", LOCK) != "")
    return tags


def _git(root: Path, *words: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else None
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


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
        print(f"runs: {uri.rstrip('/')}{summary.page}")
    else:
        store = shlex.quote(f"sqlite:///{_near(database)}")
        # one reader needs one worker and no job runners: 0.4 GB instead of 2.3
        switches = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
        print(f"runs: {switches} mlflow ui --backend-store-uri {store} --workers 1")
        print(f"      then open http://127.0.0.1:5000{summary.page}")


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
        _log_rows(self.client, self.run_id, rows)

    def end(self, outcome: str) -> None:
        """Say how training ended; after a good end the run stays open until `sync` finishes it."""
        self.client.set_tag(self.run_id, "longtail.state", "trained" if outcome == "finished" else outcome)
        if outcome != "finished":
            self.client.set_terminated(self.run_id, "FAILED" if outcome == "failed" else "KILLED")


def live_child() -> None:
    """Read the messages of `longtail.live` from standard input until it closes, and write them to MLflow.

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
    """`python -m longtail.tracking live`: the child process of `longtail.live`."""
    if sys.argv[1:] != ["live"]:
        sys.exit("usage: python -m longtail.tracking live < messages of longtail.live")
    began = time.monotonic()
    try:
        live_child()
    except Exception as error:
        sys.exit(f"after {time.monotonic() - began:.0f} s: {error!r}")


if __name__ == "__main__":
    main()
