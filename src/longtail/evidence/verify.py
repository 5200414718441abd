"""Is what is committed what the committed code and params give? Nothing is trained, and no data is needed.

Two questions for each plan: do the stages of its finished cells still have the code, params and small files that
its lock was written for (DVC answers), and do the committed tables and pages come out again from the committed
cells (the report's own code answers)? What a fresh clone lacks, since git does not keep it, is no difference.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from longtail import report
from longtail.evaluation import readings
from longtail.incremental import report as incremental
from longtail.report import plots
from longtail.workflow import chains, manifest, pipeline
from longtail.workflow.cells import Cell, of_plan
from longtail.workflow.jobs import parse_once
from longtail.workflow.locks import MAKERS, STAGES, read_locks

REPORT = ("table.md", "report.html", "summary.json", "curves.csv", "classes.csv")
READINGS = ("readings.md", "readings.csv")
INCREMENTAL = "data/published_incremental.csv"
PUBLISHED, TIMES = "data/published.csv", "benchmarks/results/time_to_accuracy.csv"
PICTURE = re.compile(rb"data:image/png;base64,[A-Za-z0-9+/=]*")  # other processors may draw a pixel otherwise
ABSENT = ("deleted", "not in cache")  # DVC's words


def verify(root: str | Path, params: Mapping[str, Any], chosen: Sequence[str]) -> list[str]:
    """What is wrong with the committed results of the `chosen` plans, a line each; empty when all is as it should be.

    Args:
        params: the content of params.yaml.

    Raises ValueError for a plan that it does not have.
    """
    root, plans = Path(root), params["plans"] | chains.plans(params)
    for plan in chosen:
        if plan not in plans:
            raise ValueError(f"plan {plan!r} is not in params.yaml; there are {', '.join(plans)}")
    names = targets(root, {plan: plans[plan] for plan in chosen})
    found = edited(root, params, names) + moved(root, names) + unlocked(root, {plan: plans[plan] for plan in chosen})
    for plan in chosen:
        found += differing(root, plan, plans[plan])
    return found


def with_results(root: str | Path, plans: Iterable[str]) -> list[str]:
    """The plans that have a committed table."""
    return [plan for plan in plans if (Path(root) / "results" / plan / "table.md").exists()]


def targets(root: Path, plans: Mapping[str, Any]) -> list[str]:
    """The stages of the lock that belong to the plans: of their finished cells, their reports, what compares them."""
    lock = read_locks(root)
    names: list[str] = []
    for plan, axes in plans.items():
        if "protocols" in axes:
            for chain in chains.of_plan(plan, axes):
                if f"predict-{plan}@{chain.name}" in lock:  # what is trained may be adopted before it is read out
                    names += [f"{stage}-{plan}@{chain.name}" for stage in chains.STAGES]
            names.append(f"report-{plan}")
            continue
        for dataset in axes["datasets"]:
            for recipe in axes["recipes"]:
                for method in axes["methods"]:
                    for seed in axes["seeds"]:
                        cell = f"{plan}@{dataset}-{recipe}-{method}-{seed}"
                        if f"evaluate-{cell}" in lock:
                            names += [f"{stage}-{cell}" for stage in (*MAKERS.values(), *STAGES[1:], "compare")]
        names += [f"report-{plan}", f"readings-{plan}"]
    return [name for name in dict.fromkeys(names) if name in lock]


def unlocked(root: Path, plans: Mapping[str, Any]) -> list[str]:
    """Results that the tables are made of, and that no lock says where they come from: `results/...: no entry ...`."""
    lock, found = read_locks(root), []
    for plan, axes in plans.items():
        of_chains, file = "protocols" in axes, pipeline.lock(pipeline.file(plan))
        cells: Sequence[Cell | chains.Cell] = chains.of_plan(plan, axes) if of_chains else of_plan(plan, axes)
        for cell in cells:
            stage = f"{'readout' if of_chains else 'evaluate'}-{plan}@{cell.name}"
            if stage not in lock and any((root / cell.results).glob("*")):
                found.append(f"{cell.results}: no entry {stage} in {file}")
    return found


def edited(root: Path, params: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Code that is not that of the manifests of the stages: `stage: other code: definition, ...`."""
    lock = read_locks(root)
    deps = {
        name: [dep["path"] for dep in lock[name].get("deps", ()) if manifest.is_manifest(dep["path"])] for name in names
    }
    now = manifest.texts(root, params)
    changed: dict[str, str] = {}
    for path in {path for paths in deps.values() for path in paths}:
        file = root / path
        was, is_now = file.read_text() if file.exists() else "", now.get(file.stem, "")
        if was != is_now:
            definitions = {title for title, _ in manifest.entries(was) ^ manifest.entries(is_now)}
            changed[path] = ", ".join(sorted(definitions)) or "how definitions refer to each other"
    return [f"{name}: other code: {changed[path]}" for name in names for path in deps[name] if path in changed]


def moved(root: Path, names: Sequence[str]) -> list[str]:
    """What changed since the lock was written, by DVC's own comparison: `stage: dependency path modified`."""
    if not names:
        return []
    from dvc.dependency import param  # half a second: only where there is something to ask
    from dvc.dvcfile import load_file
    from dvc.repo import Repo

    changes: list[tuple[str, str, str, str]] = []
    once = mock.patch.object(param, "load_path", parse_once(param.load_path))
    with once, Repo(str(root)) as repo, repo.lock:  # a command of dvc's takes a second for each stage that one names
        stages: dict[str, Any] = {}
        for plan in {name.partition("@")[0].partition("-")[2] for name in names}:
            known = load_file(repo, str(root.resolve() / pipeline.file(plan))).stages
            stages |= {name: known[name] for name in names if name in known}
        said = [(name, entry) for name in names if name in stages
                for entries in stages[name].status().values() for entry in entries]  # fmt: skip
    for stage, entry in said:
        if isinstance(entry, str):  # "changed command"
            changes.append((stage, entry, "", ""))
            continue
        for what, paths in entry.items():
            for path, how in paths.items():
                changes.append((stage, what, path, how if isinstance(how, str) else json.dumps(how)))
    kept = _kept_by_dvc(root, {path for _, _, path, how in changes if how in ABSENT})
    return [
        f"{stage}: {what} {path} {how}".rstrip()
        for stage, what, path, how in changes
        if not (how in ABSENT and path in kept)
    ]


def _kept_by_dvc(root: Path, paths: set[str]) -> set[str]:
    """Those that git ignores: a clone has them when DVC brings them."""
    if not paths:
        return set()
    command = ["git", "check-ignore", "--stdin"]
    done = subprocess.run(
        command, cwd=root, input="\n".join(sorted(paths)), capture_output=True, text=True, check=False
    )
    return set(done.stdout.splitlines())


def differing(root: Path, plan_name: str, plan: Mapping[str, Any]) -> list[str]:
    """The files of results/<plan> that do not come out again from its cells; pictures are not compared."""
    results = root / "results" / plan_name
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(plots, "picture", _not_drawn):
        cells, names = results / "cells", [*REPORT]
        if "protocols" in plan:
            known = root / INCREMENTAL
            incremental.write(plan_name, plan, cells_dir=cells, published=known, out_dir=folder)
            names.remove("classes.csv")
        else:
            report.write(
                plan_name, plan, cells_dir=cells, published=root / PUBLISHED, times=root / TIMES, out_dir=folder
            )
        if (results / READINGS[0]).exists():
            readings.write(plan, cells_dir=str(results / "cells"), out_dir=folder)
            names += READINGS
        return [
            f"results/{plan_name}/{name}: not what the committed cells give"
            for name in names
            if not (results / name).exists() or _text(results / name) != _text(Path(folder) / name)
        ]


def _not_drawn(axis: Any, alt: str, caption: str) -> plots.Figure:
    """A picture's place on the page: drawing them takes nine tenths of a report, and they are not compared."""
    width, height = (round(inches * plots.PIXELS) for inches in axis.get_figure().get_size_inches())
    return plots.Figure("data:image/png;base64,", width, height, alt, caption)


def _text(path: Path) -> bytes:
    return PICTURE.sub(b"picture", path.read_bytes())
