"""Write docs/papers.md's tables: every CIFAR number of data/published.csv, ours beside it or what it waits for.

python docs/papers.py            # from results/*/cells and data/published.csv
python docs/papers.py --check    # exits with 1 when the document has other tables than these give
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tables import ROOT, START, with_tables

from longtail.report import answers, outcomes
from longtail.report.outcomes import IN_PUBLISHED, RAW, Outcome, Published
from longtail.workflow import declaration

MARK = START.replace("tables.py", "papers.py")
DOCUMENT = ROOT / "docs" / "papers.md"
SETS = {  # as published.csv has them -> for people
    f"cifar{classes}_ldam_if{factor}": f"CIFAR-{classes}-LT, IF {factor}"
    for classes in (100, 10)
    for factor in (100, 10, 50, 200)
}
HEAD = ("Method", "Recipe", "Published", "Ours, same cut", "Ours, a cut of our own", "Waits for")
NOTHING = "-"


def value(outcome: Outcome, one: Published) -> float | None:
    """What a cell has for a published number; None where its plan does not measure that."""
    if one.group not in ("all", "many", "medium", "few"):
        column = "known_prior" if one.correction == "known_prior" else "accuracy"
        rows = [row for row in outcome.distributions if (row["distribution"], row["correction"]) == (one.group, RAW)]
        return rows[0][column] if rows else None
    correction = next(key for key, name in IN_PUBLISHED.items() if name == one.correction)
    measured = outcome.last.get(correction, {})
    found: float | None = measured.get(one.measure if one.group == "all" else one.group)
    return found


def of_seeds(values: list[float]) -> str:
    """`52.7 ± 0.2 (3)`: mean, standard deviation, seeds."""
    if not values:
        return NOTHING
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread} ({len(values)})"


def published(one: Published) -> str:
    """Its value with its deviation, its source, and marks for what is to be held against it."""
    spread = f" ± {100 * one.sd:.1f}" if one.sd is not None else ""
    text = f"{100 * one.value:.1f}{spread}"
    marks = ("*" if one.optimistic else "") + ("†" if one.transductive else "") + ("" if one.same_recipe else "°")
    return (f"[{text}]({one.url})" if one.url else text) + marks.replace("*", r"\*")


def what(one: Published) -> str:
    """The method, and what of it was measured where that is not its own accuracy on all classes."""
    group = "" if one.group == "all" else f", {one.group}"
    measure = "" if one.measure == "accuracy" else f", {one.measure.upper()}"
    how = {"none": "", "prediction_rebalancing": ", re-balanced on test", "known_prior": ", prior known"}[
        one.correction
    ]
    return answers.method_name(one.method) + how + group + measure


def line(one: Published, plans: dict[str, Any], cells: dict[str, dict[Any, Outcome]]) -> list[str]:
    """A row of the table."""
    same, other, waits = [], [], []
    for name, plan in plans.items():
        for dataset in plan["datasets"]:
            cut = plan.get("published", {}).get(dataset, dataset)
            if cut != one.dataset or one.recipe not in plan["recipes"] or one.method not in plan["methods"]:
                continue
            mine = (dataset, one.recipe, one.method)
            found = {cell.seed: outcome for cell, outcome in cells[name].items() if mine == where(cell)}
            values = [known for outcome in found.values() if (known := value(outcome, one)) is not None]
            (same if dataset == one.dataset else other).extend(values)
            if dataset == one.dataset and len(found) < len(plan["seeds"]):
                waits.append(f"{len(plan['seeds']) - len(found)} of {len(plan['seeds'])} seeds of {name}")
    return [
        what(one), one.recipe, published(one), of_seeds(same), of_seeds(other),
        ", ".join(waits) or (NOTHING if same else "no plan has it"),
    ]  # fmt: skip


def where(cell: Any) -> tuple[str, str, str]:
    """Data set, recipe and method."""
    return cell.dataset, cell.recipe, cell.method


def table(rows: Iterable[list[str]]) -> str:
    """Of Markdown."""
    lines = [HEAD, ["---", "---", "---:", "---:", "---:", "---"], *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def tables() -> list[str]:
    """Accuracy on the balanced test set, then all else, each data set under a heading of its own."""
    params = declaration.load(ROOT / "params.yaml")
    plans = {name: plan for name, plan in params["plans"].items() if any(of_cifar(plan))}
    cells = {name: {} if not has_cells(name) else outcomes.read(name, plan, folder(name)).cells
             for name, plan in plans.items()}  # fmt: skip
    known = [one for one in outcomes.read_published(ROOT / "data" / "published.csv") if one.dataset in SETS]
    whole: Callable[[Published], bool] = lambda one: (one.measure, one.group) == ("accuracy", "all")  # noqa: E731
    found = []
    for wanted in (whole, lambda one: not whole(one)):
        text = ""
        for dataset, title in SETS.items():
            rows = [line(one, plans, cells) for one in known if one.dataset == dataset and wanted(one)]
            text += f"### {title}\n\n{table(rows)}\n" if rows else ""
        found.append(text)
    return found


def of_cifar(plan: dict[str, Any]) -> list[bool]:
    """Of each data set, whether published numbers may stand beside it here."""
    return [plan.get("published", {}).get(dataset, dataset) in SETS for dataset in plan["datasets"]]


def folder(plan: str) -> Path:
    """Where a plan's cells are."""
    return ROOT / "results" / plan / "cells"


def has_cells(plan: str) -> bool:
    """Whether one has run."""
    return any(folder(plan).rglob("metrics.json"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    text = DOCUMENT.read_text()
    anew = with_tables(text, tables(), MARK)
    if not parser.parse_args().check:
        DOCUMENT.write_text(anew)
    elif anew != text:
        sys.exit(
            f"{DOCUMENT.relative_to(ROOT)} has other tables than the committed results give: python docs/papers.py"
        )
