"""Which reading of energy aligning is right? Every one of them, and its relatives, on the logits of trained cells.

Chosen is by held-out accuracy alone (mean over the classes that the held-out set has); test is reported beside it. What
is fitted on held-out logits is judged by cross-fitting: fitted on all folds but one, applied to that one.

N samples, C classes.
"""

from collections.abc import Mapping, Sequence
from itertools import product as product_of
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import clone

from longtail import posthoc
from longtail.evaluation import metrics
from longtail.posthoc.predictions import product
from longtail.workflow import files

AXES = ("datasets", "recipes", "methods", "seeds")
FOLDS = 5
READINGS = ("all_samples", "own_samples", "mean_energy", "normalized")  # of one step
COLUMNS = ("correction", "reading", "weights", "fitted_on", "flags", "held_out", "test", "many", "medium", "few",
           "nll", "ece", "note")  # fmt: skip
ENERGIES = ("class", "train_images", "reading", "logits", "energy")
RELATIVES: dict[str, tuple[posthoc.Correction, tuple[str, ...]]] = {
    "logit adjustment": (posthoc.LogitAdjustment(), ("train",)),
    "prediction re-balancing": (posthoc.PredictionRebalancing(), ("train", "held-out", "test")),
    "vector scaling": (posthoc.VectorScaling(), ("held-out",)),
}

Arrays = tuple[np.ndarray, np.ndarray]  # logits (N, C), labels (N,)


def candidates() -> list[tuple[dict[str, str], posthoc.Correction | None]]:
    """What is compared: its first columns, and the correction; None for the logits as they are."""
    found: list[tuple[dict[str, str], posthoc.Correction | None]] = [({"correction": "none"}, None)]
    for fitted_on in ("train", "held-out"):
        for reading in READINGS:
            for weights in posthoc.WEIGHTS:
                named = {"correction": "energy aligning", "reading": reading, "weights": weights}
                found.append(({**named, "fitted_on": fitted_on}, posthoc.EnergyAligning(reading, weights)))
    for name, (correction, places) in RELATIVES.items():
        found += [({"correction": name, "fitted_on": place}, correction) for place in places]
    return found


def compare(predictions: str, *, many_above: int, few_below: int, ece_bins: int) -> list[dict[str, Any]]:
    """A row for each candidate, with the columns COLUMNS; a candidate that cannot be fitted has a note and no number.

    Raises ValueError naming the file when there are no held-out logits.
    """
    splits, counts_C = read(predictions)
    settings = {"many_above": many_above, "few_below": few_below, "ece_bins": ece_bins}
    rows = []
    for named, correction in candidates():
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | named
        try:
            test_NC = splits["test"][0]
            if correction is not None:
                fitted = clone(correction).fit(*splits[named["fitted_on"]], fitted_on=named["fitted_on"])
                row["flags"], test_NC = "; ".join(fitted.flags), fitted.transform(test_NC)
            row["held_out"] = held_out_accuracy(correction, splits, named.get("fitted_on"))
            measured = metrics.summarize(test_NC, splits["test"][1], counts_C, **settings)
            row |= {"test": measured["accuracy"]} | {key: measured[key] for key in COLUMNS if key in measured}
        except ValueError as error:
            row["note"] = str(error)
        rows.append(row)
    return rows


def read(predictions: str) -> tuple[dict[str, Arrays], np.ndarray]:
    """The last network's logits (N, C) and labels of train, held-out and test, and training images of each class."""
    arrays = files.load_arrays(predictions)
    if "last_held_out_logits" not in arrays:
        raise ValueError(f"{predictions}: no held-out logits; choose a data set with held_out above 0")
    splits = {
        name.replace("_", "-"): (product(arrays[f"last_{name}_logits"]), arrays[f"{name}_labels"])
        for name in ("train", "held_out", "test")
    }
    return splits, arrays["class_counts"]


def held_out_accuracy(correction: posthoc.Correction | None, splits: dict[str, Arrays], fitted_on: str | None) -> float:
    """Mean over the held-out classes of class accuracy; cross-fitted where the correction is fitted on held-out."""
    logits_NC, labels_N = splits["held-out"]
    if correction is None:
        predicted_N = logits_NC.argmax(1)
    elif fitted_on == "held-out":
        predicted_N = np.empty(len(labels_N), dtype=int)
        fold_N = folds(labels_N)
        for fold in range(FOLDS):
            inside = fold_N == fold
            fitted = clone(correction).fit(logits_NC[~inside], labels_N[~inside])
            predicted_N[inside] = fitted.predict(logits_NC[inside])
    else:
        predicted_N = clone(correction).fit(*splits[fitted_on or "train"]).predict(logits_NC)
    return float(np.nanmean(metrics.class_accuracy(predicted_N, labels_N, logits_NC.shape[1])))


def folds(labels_N: np.ndarray) -> np.ndarray:
    """The fold (N,) of each sample: a class's samples go to one fold after the other, the classes start in turn."""
    order = np.argsort(labels_N, kind="stable")
    fold_N = np.empty(len(labels_N), dtype=int)
    fold_N[order] = np.arange(len(labels_N)) % FOLDS
    return fold_N


def energies(predictions: str) -> list[dict[str, Any]]:
    """The free energy of each class, minus their mean, by each reading with balanced weights: columns ENERGIES.

    `logits` says which: those of train, held-out and test, and those of test after aligning on train or held-out.
    """
    splits, counts_C = read(predictions)
    rows = []
    for reading in READINGS:
        aligning = posthoc.EnergyAligning(reading, "balanced")
        seen = dict(splits)
        for name in ("train", "held-out"):
            try:
                shifted = clone(aligning).fit(*splits[name]).transform(splits["test"][0])
            except ValueError:  # a class without a held-out sample
                continue
            seen[f"test, aligned on {name}"] = shifted, splits["test"][1]
        for name, (logits_NC, labels_N) in seen.items():
            try:
                energy_C = aligning.energies(logits_NC, labels_N)
            except ValueError:
                continue
            rows += [
                {"class": c, "train_images": counts_C[c], "reading": reading, "logits": name, "energy": value}
                for c, value in enumerate(energy_C - energy_C.mean())
            ]
    return rows


def pooled(cells: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Means over cells of each candidate's numbers, best held-out accuracy first; those that failed anywhere last.

    `behind` is how far its held-out accuracy is below that of the best one that needs no test images, and `behind_se`
    the standard error of that over cells; None for the best, and where there is one cell.
    """
    numbers = [key for key in COLUMNS[5:] if key != "note"]
    table = []
    for same in zip(*cells, strict=True):
        each = {key: [float(one[key]) if one[key] not in (None, "") else np.nan for one in same] for key in numbers}
        row = {key: same[0][key] for key in COLUMNS}
        row |= {key: None if np.isnan(values).any() else float(np.mean(values)) for key, values in each.items()}
        row["note"] = next((one["note"] for one in same if one["note"]), None)
        table.append((row, np.array(each["held_out"])))
    table.sort(key=lambda pair: -(pair[0]["held_out"] or 0))
    best = next(held_out for row, held_out in table if "transductive" not in (row["flags"] or ""))
    for row, held_out in table:
        behind, cells_ = best - held_out, len(held_out)
        known = held_out is not best and row["held_out"] is not None
        row["behind"] = float(behind.mean()) if known else None
        row["behind_se"] = float(behind.std(ddof=1)) / cells_**0.5 if known and cells_ > 1 else None
    return [row for row, _ in table]


def write(plan: Mapping[str, Any], *, cells_dir: str, out_dir: str) -> dict[str, list[dict[str, str]]]:
    """Write readings.md and readings.csv (means over the cells of each method and of all).

    Returns the energies of each method's first cell, for longtail.report.more_plots.energies.

    Raises ValueError naming the file for a cell that has not run.
    """
    by_method: dict[str, list[list[dict[str, Any]]]] = {}
    seen: dict[str, list[list[dict[str, str]]]] = {}
    for dataset, recipe, method, seed in product_of(*(plan[axis] for axis in AXES)):
        folder = Path(cells_dir, dataset, recipe, method, str(seed))
        if not (folder / "corrections.csv").is_file():
            raise ValueError(f"{folder / 'corrections.csv'}: no such file; the cell has not run")
        by_method.setdefault(method, []).append([*files.read_csv(folder / "corrections.csv")])
        seen.setdefault(method, []).append(files.read_csv(folder / "energies.csv"))
    everything = [cell for cells in by_method.values() for cell in cells]
    tables = {"all": pooled(everything), **{method: pooled(cells) for method, cells in by_method.items()}}
    files.write_csv(
        f"{out_dir}/readings.csv",
        [{"method": method, **row} for method, table in tables.items() for row in table],
        ["method", *COLUMNS, "behind", "behind_se"],
    )
    files.write_text(f"{out_dir}/readings.md", markdown(plan, tables, steepness(seen)))
    return {method: cells[0] for method, cells in seen.items()}


def steepness(cells: Mapping[str, Sequence[Sequence[Mapping[str, str]]]]) -> list[dict[str, Any]]:
    """How energy falls with training images: its slope on their logarithm, least squares over classes, mean over cells.

    A row for each method and reading, with a column for each kind of logits; None where a reading cannot be had. -1 is
    a network whose outputs carry all of the training prior, 0 one that is balanced.
    """
    table = []
    for method, same in cells.items():
        kinds = list(dict.fromkeys(row["logits"] for rows in same for row in rows))
        for reading in dict.fromkeys(row["reading"] for rows in same for row in rows):
            line: dict[str, Any] = {"method": method, "reading": reading}
            for kind in kinds:
                found = []
                for rows in same:
                    mine = [row for row in rows if (row["reading"], row["logits"]) == (reading, kind)]
                    if mine:
                        images, energy = (
                            np.array([float(row[key]) for row in mine]) for key in ("train_images", "energy")
                        )
                        found.append(float(np.polyfit(np.log(images), energy, 1)[0]))
                line[kind] = float(np.mean(found)) if len(found) == len(same) else None
            table.append(line)
    return table


def markdown(
    plan: Mapping[str, Any], tables: Mapping[str, list[dict[str, Any]]], slopes: Sequence[Mapping[str, Any]]
) -> str:
    """What was chosen, a table for all cells and for each method, and how steep the energies are."""
    chosen = next(row for row in tables["all"] if "transductive" not in (row["flags"] or ""))
    lines = [
        "# Which reading of energy aligning",
        f"{', '.join(plan['datasets'])}; recipe {', '.join(plan['recipes'])}; {', '.join(plan['methods'])}; seeds "
        f"{', '.join(map(str, plan['seeds']))}. Accuracies in percent, means over cells; NLL in nats. `Held-out` is "
        "the mean over classes of accuracy on held-out images, cross-fitted where the correction is fitted on them; it "
        "alone decides. `Behind` is the distance to the best that needs no test images, with its standard error over "
        "cells: what is less than two of those behind is not settled. `Test` is the balanced test set; nothing was "
        "chosen by it.",
        f"Best on held-out: **{described(chosen)}**, {100 * chosen['held_out']:.1f} %; on test "
        f"{100 * chosen['test']:.1f} %.",
    ]
    for method, table in tables.items():
        lines.append(f"## {'All cells' if method == 'all' else method}")
        header = [
            "Correction",
            "Fitted on",
            "Held-out",
            "Behind",
            "Test",
            "Many",
            "Medium",
            "Few",
            "NLL",
            "ECE",
            "Note",
        ]
        rows = [header, ["---"] * 2 + ["---:"] * 8 + ["---"]]
        for row in table:
            numbers = [shown(row[key], 100) for key in ("held_out", "test", "many", "medium", "few")]
            behind = shown(row["behind"], 100)
            numbers.insert(1, behind if behind == "-" else f"{behind} ± {shown(row['behind_se'], 100)}")
            numbers += [shown(row["nll"], 1, 3), shown(row["ece"], 100)]
            note = "; ".join(filter(None, (row["flags"], row["note"])))
            rows.append([described(row, fitted_on=False), row["fitted_on"] or "-", *numbers, note or "-"])
        lines.append("\n".join(f"| {' | '.join(cells)} |" for cells in rows))
    kinds = [key for key in slopes[0] if key not in ("method", "reading")]
    lines += [
        "## How steep the energies are",
        "The slope of the free energy on the logarithm of training images (nats, balanced weights, mean over cells): "
        "-1 is a network whose outputs carry all of the training prior, 0 one that is balanced. What is fitted on a "
        "kind of logits takes out the slope that it sees there; what is left on test stands in the last columns.",
    ]
    rows = [["Method", "Reading", *kinds], ["---"] * 2 + ["---:"] * len(kinds)]
    rows += [[row["method"], row["reading"], *(shown(row[kind], 1, 2) for kind in kinds)] for row in slopes]
    lines.append("\n".join(f"| {' | '.join(cells)} |" for cells in rows))
    return "\n\n".join(lines) + "\n"


def described(row: Mapping[str, Any], *, fitted_on: bool = True) -> str:
    """A candidate in words."""
    words = ", ".join(filter(None, (row["correction"], row["reading"], row["weights"])))
    return f"{words}, fitted on {row['fitted_on']}" if fitted_on and row["fitted_on"] else words


def shown(value: float | None, scale: float, digits: int = 1) -> str:
    """A number for a table, or a dash."""
    return "-" if value is None else f"{scale * value:.{digits}f}"
