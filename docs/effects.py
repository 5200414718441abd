"""What each part of a screen is worth: main effects of the plan `composing`, from committed results.

python docs/effects.py           # a table in Markdown; needs all cells of the plan
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[1]
PLAN = "composing"
PARTS = {
    "narrow τ": lambda block: block["taus"] != [0, 1, 2],
    "teach": lambda block: block["teach"] > 0,
    "focus": lambda block: block["focus"] > 0,
    "consensus": lambda block: block["consensus"] > 0,
    "margin": lambda block: block["margin"] > 0,
}
MEASURES = {  # column: correction and measure
    "accuracy": ("raw", "accuracy"), "many": ("raw", "many"), "medium": ("raw", "medium"), "few": ("raw", "few"),
    "accuracy, aligned": ("aligned_on_train", "accuracy"),
}  # fmt: skip


def effects(values: Sequence[float], on: np.ndarray) -> tuple[np.ndarray, float]:
    """Of runs' values (R,) and which parts each has (R, P): what each part adds (P,), and the standard error of that.

    Least squares of a mean and an effect a part; the error is from what is left, so from the R - P - 1 columns of the
    design that nothing is assigned to. Raises ValueError for parts that the runs cannot tell apart.
    """
    design = np.column_stack([np.ones(len(on)), on])
    if np.linalg.matrix_rank(design) < design.shape[1] or len(design) <= design.shape[1]:
        raise ValueError(f"{len(design)} runs do not tell {on.shape[1]} parts apart")
    found, *_ = np.linalg.lstsq(design, np.asarray(values, float), rcond=None)
    left = values - design @ found
    variance = left @ left / (len(design) - design.shape[1])
    spread = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    return found[1:], float(spread[1:].max())


def table(methods: Mapping[str, Mapping[str, Any]], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table in Markdown, in points; `methods` are blocks of params.yaml, `results` the measures of `last`."""
    names = [*results]
    on = np.array([[part(methods[name]) for part in PARTS.values()] for name in names], float)
    columns = {
        title: effects([100 * results[name][correction][measure] for name in names], on)
        for title, (correction, measure) in MEASURES.items()
    }
    head = f"| added | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}\n"
    rows = [[part, *(f"{found[n]:+.1f}" for found, _ in columns.values())] for n, part in enumerate(PARTS)]
    rows.append(["standard error of each", *(f"{error:.1f}" for _, error in columns.values())])
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def read(root: Path) -> dict[str, Any]:
    """The measures of each cell of the plan, by its method. Raises ValueError where one is missing."""
    params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    plan = params["plans"][PLAN]
    (dataset,), (recipe,), (seed,) = plan["datasets"], plan["recipes"], plan["seeds"]
    found = {}
    for method in plan["methods"]:
        file = root / f"results/{PLAN}/cells/{dataset}/{recipe}/{method}/{seed}/metrics.json"
        if not file.exists():
            raise ValueError(f"{file.relative_to(root)} is missing; longtail run {PLAN}")
        found[method] = json.loads(file.read_text())["last"]
    return found


if __name__ == "__main__":
    try:
        print(table(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["methods"], read(ROOT)), end="")
    except ValueError as error:
        sys.exit(f"error: {error}")
