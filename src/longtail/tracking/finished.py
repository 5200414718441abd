"""Finished cells, as DVC's lock and the result files vouch for them: what MLflow is told, without MLflow."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longtail.workflow import declaration, files
from longtail.workflow.cells import Cell, of_plan
from longtail.workflow.fingerprint import digest, plain
from longtail.workflow.locks import (
    MAKERS,
    STAGE_NAME,
    STAGES,
    LockError,
    adopted,
    entry_files,
    identity,
    keys,
    origin,
    read_locks,
)
from longtail.workflow.manifest import is_manifest
from longtail.workflow.pipeline import CELL_FILES

SECTIONS = (("datasets", "dataset"), ("recipes", "recipe"), ("methods", "method"))
MEASURES = {  # MLflow draws a section for what is before a slash, by the alphabet: accuracy is the first chart
    "accuracy": "accuracy/all",
    "many": "accuracy/many",
    "medium": "accuracy/medium",
    "few": "accuracy/few",
    "balanced_error": "balanced error",
    "nll": "nll",
    "ece": "ece",
    "top5": "top-5",
    "geometric_mean": "geometric mean",
    "worst_class": "worst class",
    "macro_f1": "macro F1",
    "brier": "brier",
    "aurc": "aurc",
}
AFTER_ALIGNING = ("accuracy", "many", "medium", "few", "nll", "ece")  # more would hide the others in MLflow's table
ALIGNED = ("aligned_on_train", "aligned train")  # in metrics.json, and what its group is called
RELATIVES = {  # accuracy alone; the name says what has to be held against it
    "aligned_on_held_out": "aligned held-out",
    "logit_adjusted": "logit adjustment",
    "rebalanced_on_test": "re-balanced: transductive",
}
CURVES = ("lr", "loss", "train_accuracy", "held_out_accuracy", "test_accuracy")
WITHOUT = "-"  # the value of a parameter that other methods of the plan have
MACHINE = ("device", "cpu", "gpu", "threads")
MACHINE_METRICS = {"seconds": "training seconds", "images_per_s": "images per s", "memory_mib": "memory MiB"}


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


def results(root: Path, plans: Sequence[str] | None) -> tuple[list[Result], list[str]]:
    """The finished cells of the plans (None: of all), and a note for each that cannot be shown. What has left its plan
    is none of them.

    A cell is finished when the lock has its four stages and the files are those that the lock names.

    Raises LockError for an unusable lock, a plan that has no stage in it, and a result file that is what
    the lock says but not what this program reads.
    """
    stages, there = read_locks(root), in_plans(root)
    cells: dict[Cell, dict[str, dict[str, Any]]] = {}
    for name, entry in stages.items():
        if match := STAGE_NAME.fullmatch(name):
            step = "train" if match[1] in MAKERS.values() else match[1]
            cells.setdefault(Cell(**match.groupdict()), {})[step] = entry
    known = sorted({cell.plan for cell in cells})
    for plan in plans or ():
        if plan not in known:
            raise LockError(f"{root / 'stages'}: nothing of plan {plan!r}; there are {', '.join(known) or 'none'}")
    found, notes = [], []
    for cell, entries in cells.items():
        if (plans is not None and cell.plan not in plans) or not there(cell):
            continue
        trouble = _unfinished(cell, entries) or _changed(root, cell, entries)
        if trouble:
            notes.append(f"{cell.plan}: {cell.title}: {trouble}")
        else:
            found.append(_result(root, cell, entries, _data(stages, cell.dataset)))
    return _alike(found), notes


def in_plans(root: Path) -> Callable[[Cell], bool]:
    """Whether a cell is of a plan of params.yaml; locks and results of one that left are still there. Without a
    params.yaml all are."""
    path = root / "params.yaml"
    if not path.exists():
        return lambda cell: True
    plans = declaration.load(path).get("plans", {})
    known = {cell for plan, axes in plans.items() for cell in of_plan(plan, axes)}
    return lambda cell: cell in known


def _alike(found: Sequence[Result]) -> list[Result]:
    """Every result of a plan with the parameters of all, so that none is `unknown` where MLflow compares them."""
    names: dict[str, dict[str, str]] = {}
    for one in found:
        names.setdefault(one.cell.plan, {}).update(dict.fromkeys(one.params, WITHOUT))
    return [replace(one, params=names[one.cell.plan] | one.params) for one in found]


def _unfinished(cell: Cell, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Why the cell's stages are not one chain: one is missing, or read what another has replaced since."""
    missing = [kind for kind in STAGES if kind not in entries]
    if missing:
        return f"not finished, no {', '.join(missing)} in {cell.lock}"
    made = {path: md5 for entry in entries.values() for path, md5 in entry_files(entry, "outs")}
    for kind, entry in entries.items():
        for path, md5 in entry_files(entry, "deps"):
            if made.get(path, md5) != md5:
                return f"not finished, its {kind} is from before the last change of {path}"
    return ""


def _changed(root: Path, cell: Cell, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Why the cell's files are not those of the lock; empty when they are."""
    made = {path: md5 for entry in entries.values() for path, md5 in entry_files(entry, "outs")}
    for name in CELL_FILES:
        path = f"{cell.results}/{name}"
        if path not in made:
            return f"no stage of it in {cell.lock} has the out {path}"
        try:
            md5 = hashlib.md5((root / path).read_bytes(), usedforsecurity=False).hexdigest()
        except OSError:
            return f"{path} is missing; `git checkout {path}`, or run `dvc repro`"
        if md5 != made[path]:
            return f"{path} is not the one in {cell.lock} (MD5 {md5}, there {made[path]}); run `dvc repro`"
    return ""


def _data(stages: Mapping[str, Any], dataset: str) -> Mapping[str, Any]:
    """What the lock has of the stage that made a data set: a cut, features, or images of an index."""
    made = (f"{stage}@{dataset}" for stage in ("subsample", "features", "indexed_features", "stream"))
    return next((stages[name] for name in made if name in stages), {})


def _result(root: Path, cell: Cell, entries: Mapping[str, Mapping[str, Any]], subsample: Mapping[str, Any]) -> Result:
    train = entries["train"]
    training = origin(identity(train), adopted(root, cell.plan))
    facts = {  # not the code: the same outs of other code are the same result
        kind: [
            sorted(d for d in entry_files(entry, "deps") if not is_manifest(d[0])),
            sorted(entry_files(entry, "outs")),
            keys(entry),
        ]
        for kind, entry in entries.items()
    }
    machine = _machine(root, cell, training)
    written_ms = _mtime_ms(root / cell.results / "history.csv")
    last_epoch, metrics = _metrics(root / cell.results / "metrics.json")
    seconds = machine.get("seconds")
    for key, name in MACHINE_METRICS.items():
        if isinstance(machine.get(key), (int, float)):
            metrics[name] = float(machine[key])
    tags = {f"longtail.{key}": str(machine[key]) for key in MACHINE if machine.get(key) is not None}
    known = machine.get("versions") or {name: machine[name] for name in ("torch",) if name in machine}
    tags |= {f"version.{name}": str(version) for name, version in known.items()}
    data = [(path, md5) for path, md5 in entry_files(train, "deps") if path.endswith(f"/{cell.dataset}.npz")]
    return Result(
        cell=cell,
        training=training,
        key=digest(facts),
        ended_ms=machine.get("ended_ms", written_ms),
        written_ms=written_ms,
        seconds=float(seconds) if isinstance(seconds, (int, float)) else None,
        params=_params(cell, [*entries.values(), subsample]),
        curves=_curves(root / cell.results / "history.csv"),
        metrics=metrics,
        last_epoch=last_epoch,
        tags=tags,
        data=data[0] if data else None,
    )


def _params(cell: Cell, entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Flat text parameters, without the names of the cell's blocks: recipe.epochs, not recipes.x.epochs."""
    shown = cell.names()
    for entry in entries:
        for key, value in keys(entry).items():
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
    path = root / cell.runs / "machine.json"
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
        # a measure that came after the cell was evaluated is not there, as in a report
        shown = {
            name: last["raw"][key] for key, name in MEASURES.items() if key in last["raw"] or key in AFTER_ALIGNING
        }
        block, group = ALIGNED
        # short: the compare page cuts long names
        shown |= {f"{group}/{key}": last[block][key] for key in AFTER_ALIGNING}
        shown |= {f"{group}/accuracy": last[key]["accuracy"] for key, group in RELATIVES.items() if key in last}
        best = written.get("best_on_held_out")
        if best is not None:
            shown["best epoch/accuracy"] = best["raw"]["accuracy"]
            shown["best epoch/epoch"] = best["epoch"]
        return int(last["epoch"]), {name: float(value) for name, value in shown.items() if value is not None}
    except (KeyError, TypeError, ValueError) as error:
        raise LockError(f"{path}: not the metrics of a cell: {error!r}") from error


def _curves(path: Path) -> list[tuple[int, dict[str, float]]]:
    try:
        return [
            (int(row["epoch"]), {name: float(row[name]) for name in CURVES if row[name]})
            for row in files.read_csv(path)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise LockError(f"{path}: not a history (epoch, {', '.join(CURVES)}): {error!r}") from error
