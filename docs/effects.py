"""What each part of a screen is worth: main effects of a plan of SCREENS, from committed results.

python docs/effects.py           # tables in Markdown, of each screen that has all its cells
python docs/effects.py PLAN      # of one
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[1]
SCREENS: dict[str, dict[str, Callable[[Any, Any], bool]]] = {  # plan: part: whether a recipe and a method have it
    "composing": {
        "narrow τ": lambda _, method: method["taus"] != [0, 1, 2],
        "teach": lambda _, method: method["teach"] > 0,
        "focus": lambda _, method: method["focus"] > 0,
        "consensus": lambda _, method: method["consensus"] > 0,
        "margin": lambda _, method: method["margin"] > 0,
    },
    "composing-long": {
        "CutMix in turn": lambda recipe, _: recipe["cutmix_alpha"] > 0,
        "Muon, batch 64": lambda recipe, _: recipe["optimizer"]["muon_lr"] > 0,
        "recall": lambda _, method: method.get("recall", 0) > 0,
    },
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


def parts(plan: str, params: Mapping[str, Any]) -> dict[tuple[str, str], list[bool]]:
    """{(recipe, method): which parts of the screen it has}, of every run of a plan."""
    block, recipes, methods = params["plans"][plan], params["recipes"], params["methods"]
    return {
        (recipe, method): [has(recipes[recipe], methods[method]) for has in SCREENS[plan].values()]
        for recipe in block["recipes"]
        for method in block["methods"]
    }


def table(plan: str, params: Mapping[str, Any], results: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """The table in Markdown, in points; `params` is params.yaml, `results` the measures of `last` of each run."""
    found = parts(plan, params)
    on = np.array([found[run] for run in results], float)
    columns = {
        title: effects([100 * result[correction][measure] for result in results.values()], on)
        for title, (correction, measure) in MEASURES.items()
    }
    head = f"| added | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}\n"
    rows = [[part, *(f"{found[n]:+.1f}" for found, _ in columns.values())] for n, part in enumerate(SCREENS[plan])]
    rows.append(["standard error of each", *(f"{error:.1f}" for _, error in columns.values())])
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def read(root: Path, plan: str, params: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """The measures of each run of the plan. Raises ValueError where one is missing."""
    (dataset,), (seed,) = params["plans"][plan]["datasets"], params["plans"][plan]["seeds"]
    found = {}
    for recipe, method in parts(plan, params):
        file = root / f"results/{plan}/cells/{dataset}/{recipe}/{method}/{seed}/metrics.json"
        if not file.exists():
            raise ValueError(f"{file.relative_to(root)} is missing; longtail run {plan}")
        found[recipe, method] = json.loads(file.read_text())["last"]
    return found


def main(plans: Sequence[str]) -> None:
    """Print the tables of these screens."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for plan in plans or SCREENS:
        if plan not in SCREENS:
            raise ValueError(f"{plan} is no screen; there are {', '.join(SCREENS)}")
        try:
            found = read(ROOT, plan, params)
        except ValueError as error:
            if plans:
                raise
            print(f"{plan}: {error}\n")
            continue
        print(f"{plan}\n\n{table(plan, params, found)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
