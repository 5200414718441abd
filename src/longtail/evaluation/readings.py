"""How is energy aligning best set? Readings, weights, temperatures, strengths, and its relatives, on trained cells.

Chosen is by held-out accuracy alone (mean over the classes that the held-out set has); test is reported beside it. What
is fitted on held-out logits is judged by cross-fitting: fitted on all folds but one, applied to that one. What comes of
choosing is judged by choosing as well, on all folds but one, and applying the choice to that one (`CHOSEN`).

N samples, C classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product as product_of
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import clone

from longtail import posthoc
from longtail.evaluation import metrics
from longtail.posthoc.predictions import product
from longtail.workflow import files

AXES = ("datasets", "recipes", "methods", "seeds")
FOLDS = 5
TEMPERATURES = (1.0, 0.5, 2.0, 4.0, 8.0)
STRENGTHS = (1.0, 0.25, 0.5, 0.75, 1.25)
COLUMNS = ("correction", "reading", "weights", "temperature", "strength", "fitted_on", "flags", "held_out", "test",
           "many", "medium", "few", "nll", "ece", "note")  # fmt: skip
NUMBERS = COLUMNS[7:-1]
ENERGIES = ("class", "train_images", "reading", "logits", "energy")
ALIGNING, CHOSEN = "energy aligning", "energy aligning as chosen"
RELATIVES: dict[str, tuple[posthoc.Correction, tuple[str, ...]]] = {
    "logit adjustment": (posthoc.LogitAdjustment(), ("train",)),
    "prediction re-balancing": (posthoc.PredictionRebalancing(), ("train", "held-out", "test")),
    "vector scaling": (posthoc.VectorScaling(), ("held-out",)),
}

ALIGNED = (posthoc.EnergyAligning("normalized", "balanced"), posthoc.EnergyAligning())

Arrays = tuple[np.ndarray, np.ndarray]  # logits (N, C), labels (N,)


class Setting(NamedTuple):
    """How energy aligning is set, and what it is fitted on."""

    fitted_on: str
    reading: str
    weights: str
    temperature: float
    strength: float

    def fit(self, logits_NC: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
        """The shift (C,) at full strength; ValueError where it cannot be had."""
        aligning = posthoc.EnergyAligning(self.reading, self.weights, self.temperature)
        return aligning.fit(logits_NC, labels_N).shift_


def settings() -> Iterator[Setting]:
    """All that are tried, the default first: of two that are as good the earlier one is chosen."""
    readings = ("equal_shares", *(reading for reading in posthoc.READINGS if reading != "equal_shares"))
    for fitted_on, reading, weights in product_of(("train", "held-out"), readings, ("uniform", "balanced")):
        for temperature in TEMPERATURES[:1] if reading == "mean_energy" else TEMPERATURES:  # that has none
            for strength in STRENGTHS:
                yield Setting(fitted_on, reading, weights, temperature, strength)


class Tried:
    """The shift of each setting, fitted once on each set of samples that is asked for."""

    def __init__(self, splits: Mapping[str, Arrays]):
        self.splits, self.fold_N = splits, folds(splits["held-out"][1])
        self.known: dict[tuple[Any, ...], np.ndarray | str] = {}

    def shift(self, setting: Setting, without: frozenset[int] = frozenset()) -> np.ndarray:
        """Its shift (C,), of held-out samples without those of some folds; ValueError where it cannot be had."""
        without = without if setting.fitted_on == "held-out" else frozenset()
        key = (setting[:-1], without)
        if key not in self.known:
            logits_NC, labels_N = self.splits[setting.fitted_on]
            if without:
                rest_N = ~np.isin(self.fold_N, list(without))
                logits_NC, labels_N = logits_NC[rest_N], labels_N[rest_N]
            try:
                self.known[key] = setting.fit(logits_NC, labels_N)
            except ValueError as error:
                self.known[key] = str(error)
        found = self.known[key]
        if isinstance(found, str):
            raise ValueError(found)
        return setting.strength * found

    def right(self, setting: Setting, without: frozenset[int] = frozenset()) -> np.ndarray:
        """Which held-out samples (N,) it recognises, each by what was fitted without its fold and some others."""
        logits_NC, labels_N = self.splits["held-out"]
        if setting.fitted_on != "held-out":
            return (logits_NC + self.shift(setting)).argmax(1) == labels_N
        right_N = np.zeros(len(labels_N), dtype=bool)
        for fold in range(FOLDS):
            inside_N = self.fold_N == fold
            shifted = logits_NC[inside_N] + self.shift(setting, without | {fold})
            right_N[inside_N] = shifted.argmax(1) == labels_N[inside_N]
        return right_N

    def best(self, among: Sequence[Setting], without: frozenset[int] = frozenset()) -> Setting:
        """The setting with the highest accuracy on the held-out samples that are not of some folds."""
        labels_N = self.splits["held-out"][1]
        rest_N = ~np.isin(self.fold_N, list(without))
        scores = []
        for setting in among:
            try:
                right_N = self.right(setting, without)
                scores.append(mean_over_classes(right_N[rest_N], labels_N[rest_N]))
            except ValueError:
                scores.append(-1.0)
        return among[int(np.argmax(scores))]


def mean_over_classes(right_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean over the classes that occur of the share of their samples that are right."""
    counts_C = np.bincount(labels_N)
    there_C = counts_C > 0
    return float((np.bincount(labels_N, right_N)[there_C] / counts_C[there_C]).mean())


def chosen(tried: Tried, among: Sequence[Setting]) -> tuple[Setting, float]:
    """The best setting, and what comes of choosing: each fold by the setting that is best without it."""
    labels_N = tried.splits["held-out"][1]
    right_N = np.zeros(len(labels_N), dtype=bool)
    for fold in range(FOLDS):
        outer = frozenset({fold})
        best = tried.best(among, outer)
        inside_N = tried.fold_N == fold
        shifted = tried.splits["held-out"][0][inside_N] + tried.shift(best, outer)
        right_N[inside_N] = shifted.argmax(1) == labels_N[inside_N]
    return tried.best(among), mean_over_classes(right_N, labels_N)


def compare(predictions: str, *, many_above: int, few_below: int, ece_bins: int) -> list[dict[str, Any]]:
    """A row for each candidate, with the columns COLUMNS; a candidate that cannot be fitted has a note and no number.

    The first are the logits as they are, and energy aligning as it is chosen of what is fitted on train, and of all.

    Raises ValueError naming the file when there are no held-out logits.
    """
    splits, counts_C = read(predictions)
    test_NC, test_N = splits["test"]

    def measured(logits_NC: np.ndarray) -> dict[str, Any]:
        found = metrics.summarize(
            logits_NC, test_N, counts_C, many_above=many_above, few_below=few_below, ece_bins=ece_bins
        )
        return {"test": found["accuracy"]} | {key: found[key] for key in NUMBERS if key in found}

    def row(correction: str, **columns: Any) -> dict[str, Any]:
        return dict.fromkeys(COLUMNS) | {"correction": correction} | columns

    tried, grid = Tried(splits), list(settings())
    rows = [row("none", held_out=held_out_accuracy(None, splits, None), **measured(test_NC))]
    for names, among in (("train", [one for one in grid if one.fitted_on == "train"]), ("train or held-out", grid)):
        best, held_out = chosen(tried, among)
        note = f"{best.reading}, {best.weights}, T {best.temperature:g}, strength {best.strength:g}, {best.fitted_on}"
        values = {"held_out": held_out, "note": note, **measured(test_NC + tried.shift(best))}
        rows.append(row(CHOSEN, fitted_on=names, **values))
    for setting in grid:
        try:
            held_out = mean_over_classes(tried.right(setting), splits["held-out"][1])
            rows.append(
                row(ALIGNING, **setting._asdict(), held_out=held_out, **measured(test_NC + tried.shift(setting)))
            )
        except ValueError as error:
            rows.append(row(ALIGNING, **setting._asdict(), note=str(error)))
    for name, (correction, places) in RELATIVES.items():
        for place in places:
            fitted = clone(correction).fit(*splits[place], fitted_on=place)
            held_out = held_out_accuracy(correction, splits, place)
            values = {"flags": "; ".join(fitted.flags), "held_out": held_out, **measured(fitted.transform(test_NC))}
            rows.append(row(name, fitted_on=place, **values))
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
    """The free energy of each class (`normalized`, balanced weights), minus their mean: columns ENERGIES.

    `logits` says which: those of train, held-out and test, and those of test after aligning on train (ALIGNED).
    """
    splits, counts_C = read(predictions)
    seen = dict(splits)
    for aligning in ALIGNED:
        shifted = clone(aligning).fit(*splits["train"]).transform(splits["test"][0])
        seen[f"test, {aligning.reading} on train"] = shifted, splits["test"][1]
    rows = []
    for name, (logits_NC, labels_N) in seen.items():
        energy_C = posthoc.free_energy(logits_NC, labels_N, reading="normalized", weights="balanced")
        rows += [
            {"class": c, "train_images": counts_C[c], "reading": "normalized", "logits": name, "energy": value}
            for c, value in enumerate(energy_C - energy_C.mean())
        ]
    return rows


def pooled(cells: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Means over cells of each candidate's numbers, best held-out accuracy first; those that failed anywhere last.

    `behind` is how far its held-out accuracy is below that of the best one that needs no test images, and `behind_se`
    the standard error of that over cells; None for the best, and where there is one cell.
    """
    table = []
    for same in zip(*cells, strict=True):
        each = {key: [float(one[key]) if one[key] not in (None, "") else np.nan for one in same] for key in NUMBERS}
        row = {key: same[0][key] for key in COLUMNS}
        row |= {key: None if np.isnan(values).any() else float(np.mean(values)) for key, values in each.items()}
        row["note"] = "; ".join(dict.fromkeys(one["note"] for one in same if one["note"])) or None
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
    """Write readings.md and readings.csv: means over the cells that have run, of each group and of all.

    A group has one method, one recipe and one data set. Returns the energies of each group's first cell, for
    longtail.report.more_plots.energies.

    Raises ValueError where no cell has run.
    """
    by_group: dict[str, list[list[dict[str, Any]]]] = {}
    seen: dict[str, list[list[dict[str, str]]]] = {}
    several = [axis for axis in AXES[:3] if len(plan[axis]) > 1 or axis == "methods"]
    for values in product_of(*(plan[axis] for axis in AXES)):
        folder = Path(cells_dir, *map(str, values))
        if (folder / "corrections.csv").is_file():
            group = ", ".join(value for axis, value in zip(AXES, values, strict=True) if axis in several)
            by_group.setdefault(group, []).append([*files.read_csv(folder / "corrections.csv")])
            seen.setdefault(group, []).append(files.read_csv(folder / "energies.csv"))
    everything = [cell for cells in by_group.values() for cell in cells]
    if not everything:
        raise ValueError(f"{cells_dir}: no cell has a corrections.csv; none has run")
    counts = {group: len(cells) for group, cells in by_group.items()}
    tables = {"all": pooled(everything), **{group: pooled(cells) for group, cells in by_group.items()}}
    files.write_csv(
        f"{out_dir}/readings.csv",
        [{"group": group, **row} for group, table in tables.items() for row in table],
        ["group", *COLUMNS, "behind", "behind_se"],
    )
    files.write_text(f"{out_dir}/readings.md", markdown(plan, tables, steepness(seen), counts))
    return {group: cells[0] for group, cells in seen.items()}


def shown_rows(table: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of a pooled table, the default, the best of each reading on each kind of samples, and all that is no aligning."""
    best: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in table:  # best first
        if row["correction"] == ALIGNING and row["held_out"] is not None:
            best.setdefault((row["fitted_on"], row["reading"]), row)
    return [
        row
        for row in table
        if row["correction"] != ALIGNING or any(row is one for one in best.values()) or is_default(row)
    ]


def is_default(row: Mapping[str, Any]) -> bool:
    """Whether this is energy aligning with nothing said, fitted on train."""
    named = [row[key] for key in Setting._fields]
    return row["correction"] == ALIGNING and [str(value) for value in named] == [
        str(value) for value in next(settings())
    ]


def steepness(cells: Mapping[str, Sequence[Sequence[Mapping[str, str]]]]) -> list[dict[str, Any]]:
    """How energy falls with training images: its slope on their logarithm, least squares over classes, mean over cells.

    A row for each group, with a column for each kind of logits. -1 is a network whose outputs carry all of the training
    prior, 0 one that is balanced.
    """
    table = []
    for group, same in cells.items():
        line: dict[str, Any] = {"group": group}
        for kind in dict.fromkeys(row["logits"] for rows in same for row in rows):
            found = []
            for rows in same:
                mine = [row for row in rows if row["logits"] == kind]
                images, energy = (np.array([float(row[key]) for row in mine]) for key in ("train_images", "energy"))
                found.append(float(np.polyfit(np.log(images), energy, 1)[0]))
            line[kind] = float(np.mean(found))
        table.append(line)
    return table


def markdown(
    plan: Mapping[str, Any],
    tables: Mapping[str, list[dict[str, Any]]],
    slopes: Sequence[Mapping[str, Any]],
    counts: Mapping[str, int],
) -> str:
    """What was chosen, a table for all cells and for each group, and how steep the energies are.

    `counts` are the cells of each group that have run.
    """
    planned = prod(len(plan[axis]) for axis in AXES)
    ran = ", ".join(f"{group}: {count}" for group, count in counts.items())
    default = next(row for row in tables["all"] if is_default(row))
    best = next(row for row in tables["all"] if row["correction"] == ALIGNING)
    lines = [
        "# How energy aligning is best set",
        f"{', '.join(plan['datasets'])}; recipe {', '.join(plan['recipes'])}; {', '.join(plan['methods'])}; seeds "
        f"{', '.join(map(str, plan['seeds']))}: {sum(counts.values())} of {planned} cells have run ({ran}). "
        f"{len(list(settings()))} settings of energy aligning, fitted on train or on held-out, and its relatives; here "
        "the default and the best of each reading, in readings.csv all. Accuracies in percent, means over cells; NLL "
        "in nats. `Held-out` is the mean over classes of accuracy on held-out images, cross-fitted where the "
        "correction is fitted on them; it alone decides. 'As chosen' has the setting that is best on held-out, in each "
        "cell its own (see the note); its held-out accuracy is that of choosing: on four folds, judged on the fifth. "
        "`Behind` is the distance to the best that needs no test images, with its standard error over cells: what is "
        "less than two of those behind is not settled. `Test` is the balanced test set; nothing was chosen by it.",
        f"The default, {described(default)}: {shown(default['held_out'], 100)} % on held-out, "
        f"{shown(default['test'], 100)} % on test. The best setting on held-out, {described(best)}: "
        f"{shown(best['held_out'], 100)} % and {shown(best['test'], 100)} %.",
    ]
    for group, table in tables.items():
        lines.append(f"## {'All cells' if group == 'all' else group}")
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
        for row in shown_rows(table):
            numbers = [shown(row[key], 100) for key in ("held_out", "test", "many", "medium", "few")]
            behind = shown(row["behind"], 100)
            numbers.insert(1, behind if behind == "-" else f"{behind} ± {shown(row['behind_se'], 100)}")
            numbers += [shown(row["nll"], 1, 3), shown(row["ece"], 100)]
            note = "; ".join(filter(None, ("default" * is_default(row), row["flags"], row["note"])))
            rows.append([described(row, fitted_on=False), row["fitted_on"] or "-", *numbers, note or "-"])
        lines.append("\n".join(f"| {' | '.join(cells)} |" for cells in rows))
    kinds = [key for key in slopes[0] if key != "group"]
    lines += [
        "## How steep the energies are",
        "The slope of the free energy (`normalized`, balanced weights) on the logarithm of training images, in nats, "
        "mean over cells: -1 is a network whose outputs carry all of the training prior, 0 one that is balanced. The "
        "last columns are test logits after aligning on train: by one step of `normalized` with balanced weights, and "
        "as it is by default.",
    ]
    rows = [["Cells", *kinds], ["---"] + ["---:"] * len(kinds)]
    rows += [[row["group"], *(shown(row[kind], 1, 2) for kind in kinds)] for row in slopes]
    lines.append("\n".join(f"| {' | '.join(cells)} |" for cells in rows))
    return "\n\n".join(lines) + "\n"


def described(row: Mapping[str, Any], *, fitted_on: bool = True) -> str:
    """A candidate in words."""
    words = [row["correction"], row["reading"], row["weights"]]
    words += [f"{name} {float(row[key]):g}" for name, key in (("T", "temperature"), ("strength", "strength"))
              if row[key] not in (None, "") and float(row[key]) != 1]  # fmt: skip
    text = ", ".join(filter(None, words))
    return f"{text}, fitted on {row['fitted_on']}" if fitted_on and row["fitted_on"] else text


def shown(value: float | None, scale: float, digits: int = 1) -> str:
    """A number for a table, or a dash."""
    return "-" if value is None else f"{scale * value:.{digits}f}"
