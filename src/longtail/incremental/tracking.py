"""Chains in MLflow: one run a training, its steps as MLflow's steps, each read-out a run nested in it.

A view of result files and DVC's lock, as longtail.tracking.runs is for the other plans: twice writes nothing the second
time, and runs whose results were replaced carry `longtail.current` = no.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtail.incremental.outcomes import readout_name
from longtail.tracking.runs import Store, log_rows, open_store, upload
from longtail.workflow import chains, files
from longtail.workflow.fingerprint import digest
from longtail.workflow.locks import entry_files, keys, read_locks
from longtail.workflow.manifest import is_manifest

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

OVER_STEPS = (
    "average", "average_later", "average_weighted", "last", "old", "new", "forgetting", "average_top5",
    "average_later_top5", "last_top5",
)  # fmt: skip


def sync(root: Path, plans: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Give every finished chain of the plans its runs; returns what happened to how many, and notes.

    Raises LockError for an unusable lock, TrackingError as `open_store`.
    """
    locked = read_locks(root)
    notes: list[str] = []
    finished: list[tuple[chains.Cell, list[dict[str, Any]]]] = []
    for plan, axes in plans.items():
        for cell in chains.of_plan(plan, axes):
            names = [cell.address(stage).rpartition(":")[2] for stage in chains.STAGES]
            if not all(name in locked for name in names):
                continue
            entries = [locked[name] for name in names]
            if changed := _apart(entries) or _changed(root, entries[-1]):
                notes.append(f"{plan}: {cell.title}: {changed}; run `dvc repro`")
                continue
            finished.append((cell, entries))
    counts = dict.fromkeys(("created", "unchanged", "superseded"), 0)
    if not finished and not any(name.startswith(f"{chains.STAGES[-1]}-") for name in locked):
        return counts, notes  # no store is made for nothing
    with open_store(root) as store:
        runs = store.runs()
        parents = {plan: _plan_run(store, runs, root, plan) for plan in {cell.plan for cell, _ in finished}}
        for cell, entries in finished:
            key = digest([_made(entry) for entry in entries] + [entry_files(entries[-1], "outs")])
            same = [run for run in runs if run.data.tags.get("longtail.chain") == f"{cell.plan}/{cell.name}"]
            there = [run for run in same if run.data.tags.get("longtail.key") == key]
            # the chain's own key is written last: without it the others are of a run that was cut off
            if not any(run.data.tags.get("longtail.kind") == "chain" for run in there):
                there = []
                _create(store, root, cell, key, keys(entries[0]), parents[cell.plan].info.run_id)
            counts["unchanged" if there else "created"] += 1
            for run in same:
                current = "yes" if run in there else "no"
                if run.data.tags.get("longtail.current") != current:
                    counts["superseded"] += current == "no"
                    store.client.set_tag(run.info.run_id, "longtail.current", current)
        known = {f"{plan}/{cell.name}" for plan, axes in plans.items() for cell in chains.of_plan(plan, axes)}
        for run in runs:  # of chains that have left their plan
            chain = run.data.tags.get("longtail.chain", "")
            left = chain.partition("/")[0] in plans and chain not in known
            if left and run.data.tags.get("longtail.current") == "yes":
                counts["superseded"] += 1
                store.client.set_tag(run.info.run_id, "longtail.current", "no")
    return counts, notes


def _made(entry: Mapping[str, Any]) -> list[Any]:
    """What decides a stage's result but for its code, which may be adopted: command, data, params."""
    read = [(path, md5) for path, md5 in entry_files(entry, "deps") if not is_manifest(path)]
    return [entry["cmd"], sorted(read), keys(entry)]


def _apart(entries: Sequence[Mapping[str, Any]]) -> str:
    """Why the stages of a chain are not of one training: one read what another has replaced since."""
    made = {path: md5 for entry in entries for path, md5 in entry_files(entry, "outs")}
    for entry in entries:
        for path, md5 in entry_files(entry, "deps"):
            if made.get(path, md5) != md5:
                return f"not finished, a stage is from before the last change of {path}"
    return ""


def track(root: Path, plans: Mapping[str, Any]) -> None:
    """Sync, and say what happened."""
    counts, notes = sync(root, plans)
    print("MLflow runs of chains: " + ", ".join(f"{number} {what}" for what, number in counts.items()))
    for note in notes:
        print(f"left out: {note}")


def _changed(root: Path, readout: Mapping[str, Any]) -> str:
    """The file of a chain's results that is not the one in the lock; empty when all are."""
    for path, md5 in entry_files(readout, "outs"):
        file = root / path
        if not file.is_file() or hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            return f"{path} is not the one in the lock"
    return ""


def _plan_run(store: Store, runs: "Sequence[Run]", root: Path, plan: str) -> "Run":
    """The parent of a plan's runs, with its table and page."""
    tags = {"longtail.kind": "plan", "longtail.plan": plan}
    found = [run for run in runs if tags.items() <= run.data.tags.items()]
    run = found[0] if found else store.client.create_run(store.experiment, run_name=plan, tags=tags)
    upload(store, root, plan, run)
    if not found:
        store.client.set_terminated(run.info.run_id)
    return run


def _create(store: Store, root: Path, cell: chains.Cell, key: str, params: Mapping[str, Any], parent: str) -> None:
    """The run of a chain and one for each of its read-outs; the keys that say that they are whole come last."""
    from mlflow.entities import Param, RunTag

    folder = root / cell.results
    summary, steps = files.read_json(folder / "summary.json"), files.read_csv(folder / "steps.csv")
    history = files.read_csv(folder / "history.csv")
    names = {f"longtail.{name}": value for name, value in cell.names().items()}
    tags = {
        **names, "longtail.kind": "chain", "longtail.chain": f"{cell.plan}/{cell.name}", "mlflow.parentRunId": parent,
    }  # fmt: skip
    run = store.client.create_run(store.experiment, run_name=cell.title, tags=tags).info.run_id
    shown = dict(flat_params(params)) | {"order_sha256": summary["order_sha256"]}
    store.client.log_batch(run, params=[Param(name, str(value)[:500]) for name, value in shown.items()])
    log_rows(store.client, run, [*_curves(history), *_metrics("none", summary, steps)])
    for name in ("summary.json", "steps.csv", "confusion.csv"):
        store.client.log_artifact(run, str(folder / name))
    made = [run]
    for readout in summary["readouts"]:
        tags |= {"mlflow.parentRunId": run, "longtail.kind": "readout", "longtail.readout": readout}
        title = f"{readout_name(readout)} · {cell.title}"
        made.append(store.client.create_run(store.experiment, run_name=title, tags=tags).info.run_id)
        log_rows(store.client, made[-1], [*_metrics(readout, summary, steps)])
    for one in reversed(made):
        store.client.set_terminated(one)
        store.client.log_batch(one, tags=[RunTag("longtail.current", "yes"), RunTag("longtail.key", key)])


def flat_params(params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The declared params of a chain's training as flat names: `recipes.first.epochs`, `trainings.loss`."""

    def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                yield from flat(item, f"{name}.{key}")
        else:
            yield name, value

    for key, block in sorted(params.items()):
        yield from flat(block, key.split(".")[1])


def _curves(history: Sequence[Mapping[str, str]]) -> "Iterator[Metric]":
    """Training, over all epochs of all steps."""
    from mlflow.entities import Metric

    for number, row in enumerate(history, 1):
        for name in ("loss", "train_accuracy", "lr"):
            yield Metric(f"curve/{name}", float(row[name]), 0, number)


def _metrics(readout: str, summary: Mapping[str, Any], steps: Sequence[Mapping[str, str]]) -> "Iterator[Metric]":
    """Accuracy after each step (MLflow's step), and what sums the steps up."""
    from mlflow.entities import Metric

    for row in steps:
        if row["readout"] == readout:
            for name in ("accuracy", "old", "new", "top5"):
                if row[name]:
                    label = "accuracy/all" if name == "accuracy" else f"accuracy/{name}"
                    yield Metric(label, float(row[name]), 0, int(row["step"]))
    for name in OVER_STEPS:
        if summary["readouts"][readout][name] is not None:
            yield Metric(f"over steps/{name}", float(summary["readouts"][readout][name]), 0, 0)
