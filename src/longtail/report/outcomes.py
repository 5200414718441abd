"""What a plan's cells came to: their small files, the published values, and a row for each line of the table.

Everything goes through the plan, never through what lies in the folder, so a cell that left the plan leaves
the table too, and a cell that has not run yet is known as such. Values are fractions and nats; a spread is the
sample standard deviation over training seeds (ddof 1), none for one.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longtail.workflow import files
from longtail.workflow.cells import Cell, of_plan
from longtail.workflow.pipeline import CELL_FILES

RATIO = "gradient_ratio_"  # and the class: columns of a history that recorded them
MEASURES = ("accuracy", "many", "medium", "few", "balanced_error", "nll", "ece", "top5", "geometric_mean",
            "worst_class", "macro_f1", "brier", "ece_equal_mass", "mce", "classwise_ece", "aurc")  # fmt: skip
SIGNED = ("loss",)  # LADE's has a negative term
HIGHEST = {"nll": math.inf, "brier": 2.0}  # of the others 1
RESAMPLED = ("accuracy", "nll", "ece")  # those with a standard error over images
GROUPS = ("many", "medium", "few")  # a group without classes is null
NEEDED = (*RESAMPLED, *GROUPS)  # the others may be missing: they came after some cells had been measured
RAW, ADJUSTED, ON_TRAIN, ON_HELD_OUT, REBALANCED = (
    "raw", "logit_adjusted", "aligned_on_train", "aligned_on_held_out", "rebalanced_on_test",
)  # fmt: skip
CORRECTIONS = {
    RAW: "none",
    ADJUSTED: "logit adjustment",
    ON_TRAIN: "aligned on train",
    ON_HELD_OUT: "aligned on held-out",
    REBALANCED: "re-balanced on test (transductive)",
}
ALIGNED = ON_TRAIN  # what headlines, pictures and `dvc exp show` have: the default needs no held-out images
IN_PUBLISHED = {RAW: "none", REBALANCED: "prediction_rebalancing"}  # what data/published.csv calls them
CURVES = ("dataset", "recipe", "method", "seed", "epoch", "loss", "train_accuracy",
          "held_out_accuracy", "test_accuracy")  # fmt: skip
CLASSES = ("dataset", "recipe", "method", "class", "name", "train_images", "n", RAW, "aligned",
           "aligned_on", "energy_before", "energy_after")  # fmt: skip
HISTORY = ("epoch", "lr", "loss", "train_accuracy", "held_out_accuracy", "test_accuracy")
RELIABILITY = ("correction", "low", "high", "images", "confidence", "accuracy")
DISTRIBUTIONS = ("distribution", "images", "correction", "accuracy", "accuracy_sd", "known_prior", "known_prior_sd")
RESERVATIONS = {
    "optimistic": "optimistic: epoch chosen on the test set",
    "transductive": "transductive: uses all test images at once",
}
PUBLISHED = ("dataset", "recipe", "method", "correction", "measure", "group", "value", "sd", "runs",
             "optimistic", "transductive", "same_recipe", "source", "url", "note")  # fmt: skip

Record = dict[str, Any]  # of a file, or for a picture: column -> value


class Mean(NamedTuple):
    """Over seeds: mean and sample standard deviation (ddof 1); None where there is no value, or no second one."""

    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class Published:
    """A number that somebody published, as a fraction, with what to hold against it: a row of data/published.csv."""

    dataset: str
    recipe: str
    method: str
    correction: str
    measure: str
    group: str
    value: float
    sd: float | None
    runs: float | None
    optimistic: bool
    transductive: bool
    same_recipe: bool
    source: str
    url: str
    note: str
    another_cut: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """What it is about: no two are about the same."""
        return tuple(getattr(self, column) for column in PUBLISHED[:6])

    @property
    def flags(self) -> list[str]:
        """Its reservations, in words."""
        found = [words for name, words in RESERVATIONS.items() if getattr(self, name)]
        found += ["of another cut of these images"] if self.another_cut else []
        return found + ([] if self.same_recipe else ["recipe differs from ours or is not known"])


@dataclass(frozen=True)
class Row:
    """A line of the table: a method with a recipe and a correction, over the seeds that have run, at the last epoch.

    Attributes:
        planned: how many seeds the plan has.
        accuracies: of each of the `seeds`.
        measures: each of MEASURES over those.
        se_images: for RESAMPLED, the standard error over test images of one network (mean over seeds).
        best_on_held_out: the accuracy at the epoch that was best on held-out images.
        best_on_test: of raw rows, the highest test accuracy in the history: optimistic.
        published: that accuracy of all classes, in rows whose correction was published.
    """

    dataset: str
    recipe: str
    method: str
    correction: str
    planned: int
    seeds: list[int]
    accuracies: list[float]
    measures: Mapping[str, Mean]
    se_images: Mapping[str, float]
    best_on_held_out: Mean
    best_on_test: Mean
    published: Published | None

    @property
    def n(self) -> int:
        """How many seeds have run; 0 only in a method's one raw row, where nothing of it has run."""
        return len(self.seeds)

    @property
    def accuracy(self) -> float:
        """Mean over seeds; StatisticsError where none has run."""
        return statistics.fmean(self.accuracies)

    @property
    def difference(self) -> float | None:
        """Ours minus published; None where one of them is not there."""
        return self.accuracy - self.published.value if self.n and self.published else None


@dataclass(frozen=True)
class Outcome:
    """The small files of one finished cell; `best` is None without a held-out set."""

    last: Mapping[str, Any]
    best: Mapping[str, Any] | None
    classes: list[Record]
    history: list[Record]
    distributions: list[Record]
    reliability: list[Record]
    right: Mapping[str, np.ndarray]  # correction -> (N,), which test images are recognised
    provenance: list[Record]  # what computed it, a record a step; empty where that was not kept


@dataclass(frozen=True)
class Results:
    """The cells of a plan that have run; `missing` are those that have not, in the plan's order.

    `cost` of training ({minutes, memory_mib}; the latter None where it was not measured) is known of those cells that
    benchmarks.time_to_accuracy saw.
    """

    plan_name: str
    plan: Mapping[str, Any]
    cells: Mapping[Cell, Outcome]
    missing: list[Cell]
    cost: Mapping[Cell, Record]

    def groups(self) -> Iterator[tuple[tuple[str, str, str], dict[int, Outcome]]]:
        """Each (dataset, recipe, method) of the plan with its finished cells by seed."""
        for group in product(*(self.plan[axis] for axis in ("datasets", "recipes", "methods"))):
            dataset, recipe, method = group
            same = {seed: Cell(self.plan_name, dataset, recipe, method, str(seed)) for seed in self.plan["seeds"]}
            yield group, {seed: self.cells[cell] for seed, cell in same.items() if cell in self.cells}

    def of(self, row: "Row") -> list[Outcome]:
        """What a row is of, by its seeds."""
        return [self.cells[Cell(self.plan_name, row.dataset, row.recipe, row.method, str(seed))] for seed in row.seeds]


def number(value: Any, where: str, high: float = math.inf, low: float = 0.0) -> float:
    """`value` as a float from `low` to `high`; else a ValueError that begins with `where`."""
    try:
        if isinstance(value, bool):
            raise ValueError
        result = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {value!r} is not a number") from None
    if not (low <= result <= high and math.isfinite(result)):
        limit = f"{low:g} to {high:g}" if math.isfinite(high) else "a finite number" + " from 0 on" * (low == 0)
        raise ValueError(f"{where}: {value!r}, but allowed is {limit}")
    return result


def read_measures(block: Any, where: str) -> Mapping[str, Any]:
    """Check {"epoch": ..., correction: {measure: value}} of metrics.json and return it."""
    if not isinstance(block, Mapping):
        raise ValueError(f"{where}: {block!r} is not a block of measures")
    for needed in ("epoch", RAW, ON_TRAIN):
        if needed not in block:
            raise ValueError(f"{where}: no key {needed!r}; it has {', '.join(map(repr, block))}")
    number(block["epoch"], f"{where}.epoch")
    for correction in (key for key in CORRECTIONS if key in block):
        for measure in MEASURES:
            place = f"{where}.{correction}.{measure}"
            if not isinstance(block[correction], Mapping) or (measure in NEEDED and measure not in block[correction]):
                raise ValueError(f"{place}: missing")
            value = block[correction].get(measure)
            if value is not None or measure in RESAMPLED:
                number(value, place, HIGHEST.get(measure, 1.0))
    return block


def read_table(path: Path, needed: Sequence[str], limits: Mapping[str, float]) -> list[Record]:
    """Records of a CSV file; columns in `limits` become numbers from 0 to the limit, empty ones None.

    Raises ValueError naming the file and the column when a needed column is missing, the file has no row or
    a number is none.
    """
    table = files.read_csv(path)
    if not table:
        raise ValueError(f"{path}: no rows")
    for column in needed:
        if column not in table[0]:
            raise ValueError(f"{path}: no column {column!r}; it has {', '.join(map(str, table[0]))}")
    return [
        {
            column: (
                number(text, f"{path}: row {i}, {column}", limits[column], -math.inf if column in SIGNED else 0.0)
                if text
                else None
            )
            if column in limits
            else text
            for column, text in row.items()
        }
        for i, row in enumerate(table, 1)
    ]


def read_cell(folder: Path) -> Outcome | None:
    """One cell's files, or None when one of them is not there; ValueError when one is wrong."""
    paths = [folder / name for name in CELL_FILES]
    if not all(path.is_file() for path in paths):
        return None
    right = read_right(paths[5])
    metrics = files.read_json(paths[0])
    if not isinstance(metrics, Mapping) or "last" not in metrics:
        raise ValueError(f"{paths[0]}: no key 'last'")
    last = read_measures(metrics["last"], f"{paths[0]}: last")
    for correction in (key for key in CORRECTIONS if key in last):
        for measure in RESAMPLED:
            where = f"{paths[0]}: last.{correction}.standard_error.{measure}"
            number(last[correction].get("standard_error", {}).get(measure), where)
        if correction not in right:
            raise ValueError(f"{paths[5]}: no row for {correction!r}, which is in {paths[0].name}")
    best = metrics.get("best_on_held_out")
    fractions = dict.fromkeys(CORRECTIONS, 1.0)
    classes = read_table(
        paths[1],
        ("class", "name", "train_images", RAW, ON_TRAIN, "energy_before_train", "energy_after_train"),
        {"class": math.inf, "train_images": math.inf, **fractions},
    )
    limits = dict.fromkeys(HISTORY, math.inf) | {name: 1.0 for name in HISTORY if name.endswith("accuracy")}
    return Outcome(
        last=last,
        best=None if best is None else read_measures(best, f"{paths[0]}: best_on_held_out"),
        classes=classes,
        history=read_table(paths[2], HISTORY, limits),
        distributions=read_table(paths[3], DISTRIBUTIONS, {"images": math.inf} | dict.fromkeys(DISTRIBUTIONS[3:], 1.0)),
        reliability=read_table(paths[4], RELIABILITY, dict.fromkeys(RELIABILITY[1:], 1.0) | {"images": math.inf}),
        right=right,
        provenance=[*metrics.get("provenance", [])],
    )


def read_right(path: Path) -> dict[str, np.ndarray]:
    """Which images are recognised (N,) after each correction; ValueError names the file and the row that is wrong."""
    found = {}
    for i, row in enumerate(read_table(path, ("correction", "images", "right"), {"images": math.inf}), 1):
        try:
            packed = np.frombuffer(bytes.fromhex(row["right"]), dtype=np.uint8)
        except ValueError:
            raise ValueError(f"{path}: row {i}, right: not hexadecimal digits") from None
        images = int(row["images"] or 0)
        if len(packed) != -(-images // 8):
            raise ValueError(f"{path}: row {i}, right: {8 * len(packed)} places for {images} images")
        found[row["correction"]] = np.unpackbits(packed, count=images).astype(bool)
    return found


def read(plan_name: str, plan: Mapping[str, Any], cells_dir: str | Path, times: str | Path | None = None) -> Results:
    """Read the cells of a plan {datasets, recipes, methods, seeds} under `cells_dir`, and how long each trained.

    Raises ValueError when no cell has run, when a file is wrong, and when two cells of a data set disagree
    on its classes (one of them is older than the data) or on the test distributions.
    """
    cells: dict[Cell, Outcome] = {}
    missing: list[Cell] = []
    first: dict[str, Cell] = {}
    for cell in of_plan(plan_name, plan):
        found = read_cell(Path(cells_dir, cell.path))
        if found is None:
            missing.append(cell)
            continue
        cells[cell] = found
        other = first.setdefault(cell.dataset, cell)
        if class_list(found) != class_list(cells[other]):
            paths = [Path(cells_dir, one.path, "classes.csv") for one in (cell, other)]
            raise ValueError(f"{paths[0]}: other classes or train_images than in {paths[1]}")
        if len(found.right[RAW]) != len(cells[other].right[RAW]):
            paths = [Path(cells_dir, one.path, "right.csv") for one in (cell, other)]
            raise ValueError(f"{paths[0]}: another number of test images than in {paths[1]}")
        if distributions(found) != distributions(cells[other]):
            paths = [Path(cells_dir, one.path, "distributions.csv") for one in (cell, other)]
            again = f"`longtail run {plan_name}` measures anew what was measured with other ratios"
            raise ValueError(f"{paths[0]}: other test distributions than in {paths[1]}; {again}")
    if not cells:
        raise ValueError(f"{cells_dir}: no cell of plan {plan_name!r} has run ({len(missing)} in the plan)")
    costs = {} if times is None else read_cost(plan_name, Path(times))
    return Results(plan_name, plan, cells, missing, {cell: row for cell, row in costs.items() if cell in cells})


def read_cost(plan_name: str, path: Path) -> dict[Cell, Record]:
    """{minutes, memory_mib} by cell, out of benchmarks/results/time_to_accuracy.csv; ValueError as of `read_table`."""
    limits = {"seconds": math.inf, "memory_mib": math.inf}
    return {
        Cell(plan_name, row["dataset"], row["recipe"], row["method"], row["seed"]): {
            "minutes": row["seconds"] / 60, "memory_mib": row["memory_mib"],
        }
        for row in read_table(path, ("dataset", "recipe", "method", "seed", *limits), limits)
    }  # fmt: skip


def distributions(cell: Outcome) -> list[str]:
    """The names of the test distributions that it was measured on."""
    return list(dict.fromkeys(row["distribution"] for row in cell.distributions))


def class_list(cell: Outcome) -> list[tuple[Any, ...]]:
    """(class, name, train_images) of every class."""
    return [(row["class"], row["name"], row["train_images"]) for row in cell.classes]


def read_published(path: str | Path) -> list[Published]:
    """The rows of data/published.csv.

    Raises ValueError naming the file and the row for a missing column, a number or a flag that is none, and
    for two rows about the same thing.
    """
    found: dict[tuple[str, ...], Published] = {}
    for i, row in enumerate(read_table(Path(path), PUBLISHED, {"value": 1.0, "sd": 1.0, "runs": math.inf}), 1):
        if row["value"] is None:
            raise ValueError(f"{path}: row {i}, value: empty")
        for flag in ("optimistic", "transductive", "same_recipe"):
            if row[flag] not in ("true", "false"):
                raise ValueError(f"{path}: row {i}, {flag}: {row[flag]!r}, but allowed is true, false")
            row[flag] = row[flag] == "true"
        if row["sd"] is not None and row["runs"] is not None and row["runs"] < 2:
            raise ValueError(f"{path}: row {i}, runs: {row['runs']:g}, but a deviation (sd) takes two")
        if row["url"] and not row["url"].startswith("https://"):
            raise ValueError(f"{path}: row {i}, url: {row['url']!r}, but allowed is https://... or nothing")
        one = Published(**{column: row[column] for column in PUBLISHED})
        if one.key in found:
            raise ValueError(f"{path}: row {i}: a second row for {', '.join(one.key)}")
        found[one.key] = one
    return list(found.values())


def beside(plan: Mapping[str, Any], published: Sequence[Published]) -> list[Published]:
    """What stands beside a plan's data sets: what was published of each, or, by its key `published`, of another cut."""
    other = plan.get("published", {})
    return [
        replace(one, dataset=dataset, another_cut=dataset in other)
        for dataset in plan["datasets"]
        for one in published
        if one.dataset == other.get(dataset, dataset)
    ]


def mean_and_sd(values: Iterable[float | None]) -> Mean:
    """Of the values that are there."""
    known = [value for value in values if value is not None]
    return Mean(statistics.fmean(known) if known else None, statistics.stdev(known) if len(known) > 1 else None)


def rows(results: Results, published: Sequence[Published]) -> list[Row]:
    """One row for each dataset x recipe x method x correction of the plan, in its order."""
    known = {one.key: one for one in published}
    table = []
    for (dataset, recipe, method), cells in results.groups():
        for correction in CORRECTIONS:
            seeds = [seed for seed, cell in cells.items() if correction in cell.last]
            if not seeds and correction != RAW:
                continue
            last = [cells[seed].last[correction] for seed in seeds]
            bests = [best[correction]["accuracy"] for seed in seeds
                     if (best := cells[seed].best) is not None and correction in best]  # fmt: skip
            # a second stage has the history of the network that it starts from, a fused one a mean of several
            own = correction == RAW and method in (results.plan.get("trained") or results.plan["methods"])
            looks = [best_on_test(cells[seed]) for seed in seeds] if own else []
            about = (dataset, recipe, method, IN_PUBLISHED.get(correction, ""), "accuracy", "all")
            table.append(
                Row(
                    *(dataset, recipe, method, correction),
                    planned=len(results.plan["seeds"]),
                    seeds=seeds,
                    accuracies=[measured["accuracy"] for measured in last],
                    measures={name: mean_and_sd(measured.get(name) for measured in last) for name in MEASURES},
                    se_images={
                        name: statistics.fmean(measured["standard_error"][name] for measured in last)
                        for name in (RESAMPLED if seeds else ())
                    },
                    best_on_held_out=mean_and_sd(bests),
                    best_on_test=mean_and_sd(looks),
                    published=known.get(about),
                )
            )
    return table


def best_on_test(cell: Outcome) -> float | None:
    """The highest of the test accuracies that the history saw and the result itself; None when it never looked.

    The history's looks have the precision of training, the result that of `predict`: they can differ by some images.
    """
    looks = [row["test_accuracy"] for row in cell.history if row["test_accuracy"] is not None]
    return max(*looks, cell.last[RAW]["accuracy"]) if looks else None


def summary(table: Sequence[Row]) -> dict[str, Any]:
    """{dataset: {recipe: {method: {accuracy, aligned}}}}: the means that `dvc exp show` should show.

    `aligned` is the accuracy after aligning on training images.
    """
    tree: dict[str, Any] = {}
    for row in table:
        if row.n and row.correction in (RAW, ALIGNED):
            method = tree.setdefault(row.dataset, {}).setdefault(row.recipe, {}).setdefault(row.method, {})
            method["accuracy" if row.correction == RAW else "aligned"] = row.accuracy
    return tree


def curves(results: Results) -> list[Record]:
    """One row for each cell and epoch, with the columns CURVES."""
    return [
        {c: cell.names()[c] for c in CURVES[:4]} | {c: row[c] for c in CURVES[4:]} | {"epoch": int(row["epoch"])}
        for cell, outcome in results.cells.items()
        for row in outcome.history
    ]


def gradients(results: Results) -> list[Record]:
    """Gradient ratios (longtail.training.engine) where they were recorded, geometric means over seeds.

    A row is {dataset, recipe, method, epoch, class, train_images, ratio}.
    """
    table = []
    for (dataset, recipe, method), cells in results.groups():
        found: dict[tuple[int, int], list[float]] = {}
        for cell in cells.values():
            for row in cell.history:
                for column, text in row.items():
                    if column.startswith(RATIO) and text and float(text) > 0:
                        place = int(row["epoch"]), int(column.removeprefix(RATIO))
                        found.setdefault(place, []).append(math.log(float(text)))
        images = [int(row["train_images"]) for row in next(iter(cells.values())).classes] if found else []
        table += [
            {"dataset": dataset, "recipe": recipe, "method": method, "epoch": epoch, "class": c,
             "train_images": images[c], "ratio": math.exp(statistics.fmean(logs))}
            for (epoch, c), logs in found.items()
        ]  # fmt: skip
    return table


def classes(results: Results) -> list[Record]:
    """One row for each dataset x recipe x method x class, with the columns CLASSES: means over seeds.

    `aligned` is on training images. Energies are those of the images that aligning was fitted on, minus their mean over
    classes, in nats.
    """
    table = []
    for (dataset, recipe, method), cells in results.groups():
        lists = [cell.classes for cell in cells.values()]
        energies = {
            f"energy_{when}": np.mean([_centred(rows, f"energy_{when}_train") for rows in lists], axis=0)
            for when in ("before", "after")
            if lists
        }
        for place, same in enumerate(zip(*lists, strict=True)):
            table.append(
                {
                    "dataset": dataset,
                    "recipe": recipe,
                    "method": method,
                    "class": int(same[0]["class"]),
                    "name": same[0]["name"],
                    "train_images": int(same[0]["train_images"]),
                    "n": len(same),
                    RAW: mean_and_sd(row[RAW] for row in same)[0],
                    "aligned": mean_and_sd(row[ALIGNED] for row in same)[0],
                    "aligned_on": "train",
                    **{name: float(values[place]) for name, values in energies.items()},
                }
            )
    return table


def _centred(rows: Sequence[Record], column: str) -> np.ndarray:
    """A column of numbers minus its mean."""
    values = np.array([float(row[column]) for row in rows])
    return values - values.mean()


def reliability(results: Results, correction: str = RAW) -> list[Record]:
    """One row for each dataset x recipe x method x bin of confidence: the bins of all seeds together."""
    table = []
    for (dataset, recipe, method), cells in results.groups():
        bins: dict[float, list[Record]] = {}
        for cell in cells.values():
            for row in cell.reliability:
                if row["correction"] == correction:
                    bins.setdefault(row["low"], []).append(row)
        for low, same in sorted(bins.items()):
            images = sum(row["images"] for row in same)
            table.append(
                {"dataset": dataset, "recipe": recipe, "method": method, "low": low, "images": images}
                | {
                    column: sum(row["images"] * row[column] for row in same) / images
                    for column in ("confidence", "accuracy")
                }
            )
    return table
