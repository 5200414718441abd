"""Where a plan is: which of its cells have run, which are out of date, run now or are missing, and how long they take.

Nothing is run and nothing is written. What is out of date is DVC's own comparison, as in `verify`.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longtail.evidence import verify
from longtail.workflow import chains, files, pipeline
from longtail.workflow.cells import Cell, of_plan
from longtail.workflow.locks import read_lock

DONE, STALE, RUNNING, MISSING = "done", "stale", "running", "missing"
STATES = (DONE, STALE, RUNNING, MISSING)
TRAININGS: dict[str, type[Cell] | type[chains.Cell]] = {
    "stages/train.py": Cell, "stages/finetune.py": Cell, "stages/stream_train.py": Cell,
    "stages/incremental_train.py": chains.Cell, "stages/stream_incremental_train.py": chains.Cell,
}  # fmt: skip


class State(NamedTuple):
    """A cell and where it is; `why` it is stale, or the process that runs it; `seconds` that its training took."""

    cell: Cell | chains.Cell
    state: str
    why: str
    seconds: float | None


def stale(root: Path, params: Mapping[str, Any], plans: Sequence[str]) -> dict[tuple[str, str], str]:
    """Why cells of these plans are out of date, by (plan, cell); asked once for all of them, for it takes seconds.

    Raises LockError for a lock file that is none.
    """
    every = params["plans"] | chains.plans(params)
    run = {plan: every[plan] for plan in plans if (root / pipeline.lock(pipeline.file(plan))).exists()}
    found: dict[tuple[str, str], str] = {}
    if names := verify.targets(root, run) if run else []:
        for line in verify.edited(root, params, names) + verify.moved(root, names):
            stage, _, why = line.partition(": ")
            address, _, cell = stage.partition("@")
            found.setdefault((address.partition("-")[2], cell), why)
    return found


def states(
    root: Path, params: Mapping[str, Any], plan: str, known_stale: Mapping[tuple[str, str], str] | None = None
) -> list[State]:
    """Every cell of a plan, in its order; what is stale is asked where it is not given.

    Raises LockError for a lock file that is none.
    """
    out_of_date = stale(root, params, [plan]) if known_stale is None else known_stale
    axes = (params["plans"] | chains.plans(params))[plan]
    of_chains = plan in chains.plans(params)
    cells: Sequence[Cell | chains.Cell] = chains.of_plan(plan, axes) if of_chains else of_plan(plan, axes)
    last, file = ("readout", "summary.json") if of_chains else ("evaluate", "metrics.json")
    if axes.get("readings"):
        last, file = "compare", "corrections.csv"
    path = root / pipeline.lock(pipeline.file(plan))
    known = read_lock(path) if path.exists() else {}
    at_work = running(root)
    found = []
    for cell in cells:
        if cell in at_work:
            state, why = RUNNING, f"process {at_work[cell]}"
        elif f"{last}-{plan}@{cell.name}" not in known or not (root / cell.results / file).exists():
            state, why = MISSING, ""
        else:
            why = out_of_date.get((plan, cell.name), "")
            state = STALE if why else DONE
        found.append(State(cell, state, why, seconds(root, cell)))
    return found


def running(root: Path) -> dict[Cell | chains.Cell, int]:
    """The cells that are being trained in this checkout, with their process, as Linux has it in /proc."""
    found: dict[Cell | chains.Cell, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            kind = next((kind for script, kind in TRAININGS.items() if script in words), None)
            if kind is None or Path(os.readlink(entry / "cwd")) != root.resolve():
                continue
            given = {name: words[words.index(f"--{name}") + 1] for name in kind.__dataclass_fields__}
        except (OSError, ValueError, IndexError):  # ended meanwhile, another user's, or another program's
            continue
        found[kind(**given)] = int(entry.name)
    return found


def seconds(root: Path, cell: Cell | chains.Cell) -> float | None:
    """How long its training took, where its machine is known here."""
    path = root / cell.runs / "machine.json"
    if not path.is_file():
        return None
    value = files.read_json(path).get("seconds")
    return float(value) if isinstance(value, (int, float)) else None


def like(cell: Cell | chains.Cell) -> tuple[str, str]:
    """What has cells take about as long as each other."""
    return cell.recipe, cell.method if isinstance(cell, Cell) else cell.training


def left(found: Sequence[State], times: Mapping[Cell, float]) -> float | None:
    """Seconds that the cells which are not done will train; None where no cell like one of them is known.

    A cell takes what others of its recipe and method (or training) took on average, here or in `times`.
    """
    known: dict[tuple[str, str], list[float]] = {}
    for one in found:
        elsewhere = times.get(one.cell) if isinstance(one.cell, Cell) else None
        if (took := one.seconds or elsewhere) is not None:
            known.setdefault(like(one.cell), []).append(took)
    waiting = [known.get(like(one.cell)) for one in found if one.state in (MISSING, STALE)]
    if any(took is None for took in waiting):
        return None
    return sum(sum(took) / len(took) for took in waiting if took)


def commit(root: Path, plan: str) -> str:
    """Date, hash and subject of the last commit of the plan's results; empty where there is none."""
    command = ["git", "log", "-1", "--format=%cs %h %s", "--", f"results/{plan}"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()


def overview(
    root: Path,
    params: Mapping[str, Any],
    plan: str,
    times: Mapping[Cell, float],
    known_stale: Mapping[tuple[str, str], str] | None = None,
) -> list[str]:
    """What `longtail status` says of a plan, a line each."""
    found = states(root, params, plan, known_stale)
    counts = {state: sum(one.state == state for one in found) for state in STATES}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count or state == DONE)
    rest = counts[STALE] + counts[MISSING]
    took = left(found, times) if rest else None
    hours = "" if took is None else f", some {hours_text(took)} of training left"
    lines = [f"{plan}: {said} of {len(found)} cells{hours}"]
    lines += [f"  running {one.cell.name} ({one.why})" for one in found if one.state == RUNNING]
    for one in [one for one in found if one.state == STALE][:3]:
        lines.append(f"  stale {one.cell.name}: {one.why}")
    if (root / f"results/{plan}/table.md").exists():
        lines.append(f"  table: results/{plan}/table.md" + (f" ({made})" if (made := commit(root, plan)) else ""))
    if rest:
        lines.append(f"  next: longtail run {plan}")
    return lines


def hours_text(value: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def known_times(path: Path, plan: str) -> dict[Cell, float]:
    """Seconds by cell out of benchmarks/results/time_to_accuracy.csv, for another machine's plan of the same cells."""
    if not path.exists():
        return {}
    columns = ("dataset", "recipe", "method", "seed")
    return {
        Cell(plan, *(row[name] for name in columns)): float(row["seconds"]) for row in files.read_csv(path)
        if row["seconds"]
    }  # fmt: skip
