"""What a plan found: which method wins, by how much, with what spread, what was published, what is flagged.

Everything goes through the plan, never through what lies in the folder, so a cell that left the plan leaves
the report too, and a cell that has not run yet is listed as such. Fractions and nats inside; percent and
points only in text. A spread is the sample standard deviation over training seeds (ddof 1), none for one.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from scipy.special import stdtrit

from longtail import files, plots

MEASURES = ("accuracy", "many", "medium", "few", "balanced_error", "nll", "ece")
GROUPS = ("many", "medium", "few")  # a group without classes is null
RAW, ON_TRAIN, ON_HELD_OUT = "raw", "aligned_on_train", "aligned_on_held_out"
CORRECTIONS = {RAW: "none", ON_TRAIN: "aligned on train", ON_HELD_OUT: "aligned on held-out"}
METHODS = {
    "ce": "Cross-entropy",
    "balanced_softmax": "Balanced softmax",
    "gala": "GALA (released form)",
    "balpoe": "BalPoE (3 experts)",
}
BASELINE = "ce"
CONFIDENCE = 0.95
CURVES = ("dataset", "recipe", "method", "seed", "epoch", "loss", "train_accuracy",
          "held_out_accuracy")  # fmt: skip
CLASSES = ("dataset", "recipe", "method", "class", "name", "train_images", "n", RAW, "aligned",
           "aligned_on")  # fmt: skip
HISTORY = ("epoch", "lr", "loss", "train_accuracy", "held_out_accuracy")
PUBLISHED = ("dataset", "recipe", "method", "correction", "measure", "group", "value", "sd", "runs",
             "optimistic", "transductive", "same_recipe", "source", "note")  # fmt: skip
HEADER = ("Recipe", "Method", "Correction", "Seeds", "All", "Many", "Medium", "Few",
          "Balanced error", "NLL", "ECE", "Best on held-out", "Published", "Difference")  # fmt: skip
READING = (
    "Accuracy on the balanced test images at the last epoch, for all classes and for those with many, a "
    "medium number of and few training images; every column in percent except NLL (nats) and the difference "
    "(points, ours minus published). Values are mean ± sample standard deviation over training seeds."
)
FITTED = {
    ON_TRAIN: "'aligned on train': one shift for each class, fitted on the training images.",
    ON_HELD_OUT: "'aligned on held-out': one shift for each class, fitted on the held-out images, "
    "which training never saw.",
}
SAME_SUBSET = (
    "The spread is over training seeds only: all runs share one training subset and one test set, so it says "
    "nothing about other subsets or other test images."
)

Row = dict[str, Any]
Key = tuple[str, str, str, int]  # dataset, recipe, method, seed


@dataclass(frozen=True)
class Cell:
    """The three small files of one finished cell; `best` is None without a held-out set."""

    last: Mapping[str, Any]
    best: Mapping[str, Any] | None
    classes: list[Row]
    history: list[Row]


@dataclass(frozen=True)
class Results:
    """The cells of a plan that have run; `missing` are those that have not, in the plan's order."""

    plan_name: str
    plan: Mapping[str, Any]
    cells: Mapping[Key, Cell]
    missing: list[Key]

    def groups(self) -> Iterator[tuple[tuple[str, str, str], dict[int, Cell]]]:
        """Each (dataset, recipe, method) of the plan with its finished cells by seed."""
        for group in product(*(self.plan[axis] for axis in ("datasets", "recipes", "methods"))):
            keys = [(*group, seed) for seed in self.plan["seeds"]]
            yield group, {key[3]: self.cells[key] for key in keys if key in self.cells}


class Answer(NamedTuple):
    """What is said of one data set under one recipe."""

    dataset: str
    recipe: str
    text: str


# ---------------------------------------------------------------------------------------------- reading


def number(value: Any, where: str, high: float = math.inf) -> float:
    """`value` as a float from 0 to `high`; else a ValueError that begins with `where`."""
    try:
        if isinstance(value, bool):
            raise ValueError
        result = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {value!r} is not a number") from None
    if not (0 <= result <= high and math.isfinite(result)):
        limit = f"0 to {high:g}" if math.isfinite(high) else "a finite number from 0 on"
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
            if not isinstance(block[correction], Mapping) or measure not in block[correction]:
                raise ValueError(f"{place}: missing")
            value = block[correction][measure]
            if not (value is None and measure in GROUPS):
                number(value, place, math.inf if measure == "nll" else 1.0)
    return block


def read_table(path: Path, needed: Sequence[str], limits: Mapping[str, float]) -> list[Row]:
    """Rows of a CSV file; columns in `limits` become numbers from 0 to the limit, empty ones None.

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
            column: (number(text, f"{path}: row {i}, {column}", limits[column]) if text else None)
            if column in limits
            else text
            for column, text in row.items()
        }
        for i, row in enumerate(table, 1)
    ]


def read_cell(folder: Path) -> Cell | None:
    """One cell's files, or None when one of them is not there; ValueError when one is wrong."""
    paths = [folder / name for name in ("metrics.json", "classes.csv", "history.csv")]
    if not all(path.is_file() for path in paths):
        return None
    metrics = files.read_json(paths[0])
    if not isinstance(metrics, Mapping) or "last" not in metrics:
        raise ValueError(f"{paths[0]}: no key 'last'")
    best = metrics.get("best_on_held_out")
    fractions = dict.fromkeys(CORRECTIONS, 1.0)
    classes = read_table(
        paths[1],
        ("class", "name", "train_images", RAW, ON_TRAIN),
        {"class": math.inf, "train_images": math.inf, **fractions},
    )
    limits = dict.fromkeys(HISTORY, math.inf) | {"train_accuracy": 1.0, "held_out_accuracy": 1.0}
    return Cell(
        last=read_measures(metrics["last"], f"{paths[0]}: last"),
        best=None if best is None else read_measures(best, f"{paths[0]}: best_on_held_out"),
        classes=classes,
        history=read_table(paths[2], HISTORY, limits),
    )


def read(plan_name: str, plan: Mapping[str, Any], cells_dir: str | Path) -> Results:
    """Read the cells of a plan {datasets, recipes, methods, seeds} under `cells_dir`.

    Raises ValueError when no cell has run, when a file is wrong, and when two cells of a data set disagree
    on its classes (one of them is older than the data).
    """
    cells: dict[Key, Cell] = {}
    missing: list[Key] = []
    first: dict[str, Key] = {}
    axes = (plan[axis] for axis in ("datasets", "recipes", "methods", "seeds"))
    for key in product(*axes):
        cell = read_cell(folder(cells_dir, key))
        if cell is None:
            missing.append(key)
            continue
        cells[key] = cell
        other = first.setdefault(key[0], key)
        if class_list(cell) != class_list(cells[other]):
            paths = [folder(cells_dir, k) / "classes.csv" for k in (key, other)]
            raise ValueError(f"{paths[0]}: other classes or train_images than in {paths[1]}")
    if not cells:
        raise ValueError(f"{cells_dir}: no cell of plan {plan_name!r} has run ({len(missing)} in the plan)")
    return Results(plan_name, plan, cells, missing)


def folder(cells_dir: str | Path, key: Key) -> Path:
    """Where the small files of a cell lie."""
    return Path(cells_dir, *map(str, key))


def class_list(cell: Cell) -> list[tuple[Any, ...]]:
    """(class, name, train_images) of every class."""
    return [(row["class"], row["name"], row["train_images"]) for row in cell.classes]


def read_published(path: str | Path) -> list[Row]:
    """Published numbers, as fractions, with their flags as booleans.

    Raises ValueError naming the file and the row for a missing column, a number or a flag that is none, and
    for two rows about the same thing.
    """
    rows = read_table(Path(path), PUBLISHED, {"value": 1.0, "sd": 1.0, "runs": math.inf})
    seen: set[tuple[str, ...]] = set()
    for i, row in enumerate(rows, 1):
        if row["value"] is None:
            raise ValueError(f"{path}: row {i}, value: empty")
        for flag in ("optimistic", "transductive", "same_recipe"):
            if row[flag] not in ("true", "false"):
                raise ValueError(f"{path}: row {i}, {flag}: {row[flag]!r}, but allowed is true, false")
            row[flag] = row[flag] == "true"
        key = tuple(row[column] for column in PUBLISHED[:6])
        if key in seen:
            raise ValueError(f"{path}: row {i}: a second row for {', '.join(key)}")
        seen.add(key)
    return rows


# ------------------------------------------------------------------------------------------------- rows


def mean_and_sd(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (ddof 1); None where there is no value, or no second one."""
    known = [value for value in values if value is not None]
    return (
        statistics.fmean(known) if known else None,
        statistics.stdev(known) if len(known) > 1 else None,
    )


def rows(results: Results, published: Sequence[Row]) -> list[Row]:
    """One row for each dataset x recipe x method x correction of the plan, in its order.

    `<measure>_mean` and `<measure>_sd` are over the `n` seeds that have run, at the last epoch;
    `best_on_held_out_mean` and `_sd` are the accuracy at the epoch that was best on held-out images.
    `accuracies` has the accuracy of each of the `seeds`. `published` (accuracy, all classes, no correction)
    stands in raw rows only, `difference` is ours minus published in points, `flags` are its reservations.
    A method of which nothing has run has one raw row with n = 0.
    """
    known = {tuple(row[column] for column in PUBLISHED[:6]): row for row in published}
    table = []
    for (dataset, recipe, method), cells in results.groups():
        for correction in CORRECTIONS:
            seeds = [seed for seed, cell in cells.items() if correction in cell.last]
            if not seeds and correction != RAW:
                continue
            row: Row = {
                "plan": results.plan_name,
                "dataset": dataset,
                "recipe": recipe,
                "method": method,
                "correction": correction,
                "n": len(seeds),
                "planned": len(results.plan["seeds"]),
                "seeds": seeds,
                "accuracies": [cells[seed].last[correction]["accuracy"] for seed in seeds],
            }
            for measure in MEASURES:
                values = [cells[seed].last[correction][measure] for seed in seeds]
                row[f"{measure}_mean"], row[f"{measure}_sd"] = mean_and_sd(values)
            bests = [best[correction]["accuracy"] for seed in seeds
                     if (best := cells[seed].best) is not None and correction in best]  # fmt: skip
            row["best_on_held_out_n"] = len(bests)
            row["best_on_held_out_mean"], row["best_on_held_out_sd"] = mean_and_sd(bests)
            quoted = known.get((dataset, recipe, method, "none", "accuracy", "all"))
            table.append(row | compare(row, quoted if correction == RAW else None))
    return table


def compare(row: Row, quoted: Row | None) -> Row:
    """The published columns of a row."""
    if quoted is None:
        names = ("published", "published_sd", "difference", "source", "note")
        return dict.fromkeys(names) | {"flags": []}
    mean = row["accuracy_mean"]
    return {
        "published": quoted["value"],
        "published_sd": quoted["sd"],
        "difference": None if mean is None else 100 * (mean - quoted["value"]),
        "flags": flags(quoted),
        "source": quoted["source"],
        "note": quoted["note"],
    }


def flags(quoted: Row) -> list[str]:
    """Reservations about a published number, in words."""
    said = {
        "optimistic": "optimistic: epoch chosen on the test set",
        "transductive": "transductive: uses all test images at once",
    }
    found = [words for key, words in said.items() if quoted[key]]
    return found + ([] if quoted["same_recipe"] else ["recipe differs from ours or is not known"])


def summary(table: Sequence[Row]) -> dict[str, Any]:
    """{dataset: {recipe: {method: {accuracy, aligned}}}}: the means that `dvc exp show` should show.

    `aligned` is the accuracy after aligning on held-out images, or on training images without a held-out set.
    """
    tree: dict[str, Any] = {}
    for row in table:
        if not row["n"]:
            continue
        methods = tree.setdefault(row["dataset"], {}).setdefault(row["recipe"], {})
        if row["correction"] == RAW:
            methods[row["method"]] = {"accuracy": row["accuracy_mean"]}
        else:  # held-out comes after train and replaces it
            methods[row["method"]]["aligned"] = row["accuracy_mean"]
    return tree


def curves(results: Results) -> list[Row]:
    """One row for each cell and epoch, with the columns CURVES."""
    names = ("dataset", "recipe", "method", "seed")
    return [
        dict(zip(names, key, strict=True)) | {c: row[c] for c in CURVES[4:]} | {"epoch": int(row["epoch"])}
        for key, cell in results.cells.items()
        for row in cell.history
    ]


def classes(results: Results) -> list[Row]:
    """One row for each dataset x recipe x method x class, with the columns CLASSES: means over seeds.

    `aligned` is on held-out images where every seed has them, else on training images: see `aligned_on`.
    """
    table = []
    for (dataset, recipe, method), cells in results.groups():
        lists = [cell.classes for cell in cells.values()]
        held_out = all(ON_HELD_OUT in rows[0] for rows in lists)
        aligned = ON_HELD_OUT if held_out else ON_TRAIN
        for same in zip(*lists, strict=True):
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
                    "aligned": mean_and_sd(row[aligned] for row in same)[0],
                    "aligned_on": "held_out" if held_out else "train",
                }
            )
    return table


# ------------------------------------------------------------------------------------------ the answer


def least_difference(table: Sequence[Row], n_a: int, n_b: int) -> tuple[float, float] | None:
    """Pooled sd of accuracy over the methods, and the smallest difference of two means it can settle.

    The second is the half-width of Student's 95 % interval for two means of n_a and n_b seeds, with the
    methods' spreads pooled (equal variance assumed). None when no method has two seeds.
    """
    spread = [(row["n"] - 1, row["accuracy_sd"]) for row in table if row["n"] > 1]
    df = sum(free for free, _ in spread)
    if not df:
        return None
    pooled = math.sqrt(sum(free * sd**2 for free, sd in spread) / df)
    quantile = float(stdtrit(df, (1 + CONFIDENCE) / 2))
    return pooled, quantile * pooled * math.sqrt(1 / n_a + 1 / n_b)


def answers(table: Sequence[Row]) -> list[Answer]:
    """What the numbers say, for each data set and recipe; methods are compared within a recipe only."""
    pairs = dict.fromkeys((row["dataset"], row["recipe"]) for row in table)
    return [
        Answer(*pair, answer(*pair, [row for row in table if (row["dataset"], row["recipe"]) == pair]))
        for pair in pairs
    ]


def answer(dataset: str, recipe: str, table: Sequence[Row]) -> str:
    """The answer for one data set and recipe, in sentences."""
    raw = [row for row in table if row["correction"] == RAW and row["n"]]
    ranked = sorted(raw, key=lambda row: -row["accuracy_mean"])  # stable: ties stay in the plan's order
    where = f"On {dataset} with recipe {recipe}, "
    if not ranked:
        return f"{where}no run is in yet."
    first = ranked[0]
    if len(ranked) == 1:
        return f"{where}only {method_name(first['method'])} has run: {percent(first)} ({seeds_text([first])})."
    second = ranked[1]
    lead = first["accuracy_mean"] - second["accuracy_mean"]
    text = (
        f"{where}{method_name(first['method'])} has the highest accuracy: {percent(first)}, "
        f"{100 * lead:.1f} points above {method_name(second['method'])} ({percent(second)})"
    )
    base = next((row for row in ranked[2:] if row["method"] == BASELINE), None)
    if base:
        above = first["accuracy_mean"] - base["accuracy_mean"]
        text += f" and {100 * above:.1f} above {method_name(BASELINE)} ({percent(base)})"
    text += f"; {seeds_text(raw)} for each method."
    parts = [spread_text(raw, first, second, lead), *aligned_text(table, raw), *published_text(raw)]
    return " ".join([text, *parts])


def seeds_text(table: Sequence[Row]) -> str:
    """`2 seeds`, or `1 to 3 seeds` where the rows differ."""
    low, high = min(row["n"] for row in table), max(row["n"] for row in table)
    return f"{low} seed{'s' if low > 1 else ''}" if low == high else f"{low} to {high} seeds"


def spread_text(raw: Sequence[Row], first: Row, second: Row, lead: float) -> str:
    """How far the lead can be trusted."""
    limit = least_difference(raw, first["n"], second["n"])
    if limit is None:
        return "One seed shows no spread, so no difference is settled."
    verdict = "within" if lead <= limit[1] else "beyond"
    return (
        f"The standard deviation over seeds, pooled over methods, is {100 * limit[0]:.1f} points; with this "
        f"few seeds a difference below about {100 * limit[1]:.1f} points is not settled (Student's 95 % "
        f"interval), and the lead over {method_name(second['method'])} is {verdict} that."
    )


def aligned_text(table: Sequence[Row], raw: Sequence[Row]) -> list[str]:
    """What alignment changes, on held-out images where they exist."""
    kinds = [key for key in (ON_HELD_OUT, ON_TRAIN) if any(row["correction"] == key for row in table)]
    if not kinds:
        return []
    before = {row["method"]: row["accuracy_mean"] for row in raw}
    aligned = [row for row in table if row["correction"] == kinds[0]]
    gains = [100 * (row["accuracy_mean"] - before[row["method"]]) for row in aligned]
    best = max(aligned, key=lambda row: row["accuracy_mean"])
    return [
        f"Logits {CORRECTIONS[kinds[0]]} change accuracy by {signed(min(gains))} to {signed(max(gains))} "
        f"points; the highest is then {method_name(best['method'])}, {percent(best)}."
    ]


def published_text(raw: Sequence[Row]) -> list[str]:
    """How far ours are from what was published, with a word where a published number has a reservation."""
    known = [row for row in raw if row["difference"] is not None]
    if not known:
        return []
    said = [f"{method_name(row['method'])} {signed(row['difference'])}" for row in known]
    hint = "; not like with like, see the notes" if any(row["flags"] for row in known) else ""
    return [f"Ours minus published, in points: {', '.join(said)}{hint}."]


# ---------------------------------------------------------------------------------------------- writing


def method_name(key: str) -> str:
    """A method's name for people."""
    return METHODS.get(key, key)


def signed(points: float) -> str:
    """A difference in points, with its sign; what rounds to zero has none."""
    text = f"{points:+.1f}"
    return "0.0" if text in ("-0.0", "+0.0") else text


def spread(mean: float | None, sd: float | None, scale: float = 100, digits: int = 1) -> str:
    """`mean ± sd`, by default in percent; a dash where there is nothing."""
    if mean is None:
        return "-"
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * sd:.{digits}f}" if sd is not None else "")


def percent(row: Row) -> str:
    """The accuracy of a row for a sentence: `93.1 ± 0.4 %`."""
    return f"{spread(row['accuracy_mean'], row['accuracy_sd'])} %"


def letter(index: int) -> str:
    """a, b, ... z, aa, ab, ..."""
    return (letter(index // 26 - 1) if index > 25 else "") + chr(ord("a") + index % 26)


def footnote(row: Row) -> str:
    """Where a published number comes from and what to hold against it."""
    parts = [*row["flags"], *([row["note"]] if row["note"] else []), f"source: {row['source']}"]
    return f"{method_name(row['method'])}, recipe {row['recipe']}: {'; '.join(parts)}."


def section(results: Results, table: Sequence[Row], published: Sequence[Row], dataset: str) -> Row:
    """All text of one data set: `lines` (cells, bold, raw), `notes` (letter, text) and lists of sentences."""
    mine = [row for row in table if row["dataset"] == dataset]
    best = max((row["accuracy_mean"] for row in mine if row["n"]), default=None)
    notes: list[tuple[str, str]] = []
    lines = []
    for row in mine:
        quoted = spread(row["published"], row["published_sd"])
        if row["published"] is not None:
            notes.append((letter(len(notes)), footnote(row)))
            quoted += f" ({notes[-1][0]})"
        cells = [
            row["recipe"],
            method_name(row["method"]),
            CORRECTIONS[row["correction"]],
            str(row["n"]) if row["n"] == row["planned"] else f"{row['n']} of {row['planned']}",
            spread(row["accuracy_mean"], row["accuracy_sd"]) if row["n"] else "not run yet",
            *(spread(row[f"{name}_mean"], row[f"{name}_sd"]) for name in (*GROUPS, "balanced_error")),
            spread(row["nll_mean"], row["nll_sd"], 1, 3),
            spread(row["ece_mean"], row["ece_sd"]),
            spread(row["best_on_held_out_mean"], row["best_on_held_out_sd"]),
            quoted,
            "-" if row["difference"] is None else signed(row["difference"]),
        ]
        bold = best is not None and row["accuracy_mean"] == best
        lines.append({"cells": cells, "bold": bold, "raw": row["correction"] == RAW})
    used = {row["correction"] for row in mine}
    return {
        "dataset": dataset,
        "lines": lines,
        "notes": notes,
        "fitted": [text for key, text in FITTED.items() if key in used],
        "also": also_published(results.plan, published, dataset),
        "missing": missing(results, dataset),
    }


def also_published(plan: Mapping[str, Any], published: Sequence[Row], dataset: str) -> list[str]:
    """Published numbers of this data set that the table has no column for, one line a method."""
    lines: dict[str, str] = {}
    for row in published:
        asked = row["recipe"] in plan["recipes"] and row["method"] in plan["methods"]
        in_table = (row["correction"], row["measure"], row["group"]) == ("none", "accuracy", "all")
        if row["dataset"] != dataset or not asked or in_table:
            continue
        corrected = "" if row["correction"] == "none" else f" with {row['correction'].replace('_', ' ')}"
        head = f"{method_name(row['method'])}{corrected}, recipe {row['recipe']}"
        if flags(row):
            head += f" ({'; '.join(flags(row))})"
        what = row["group"] if row["measure"] == "accuracy" else row["measure"].upper()
        value = f"{what} {spread(row['value'], row['sd'])}"
        lines[head] = f"{lines[head]}, {value}" if head in lines else f"{head}: {value}"
    return [f"{line}." for line in lines.values()]


def missing(results: Results, dataset: str) -> list[str]:
    """One line for each recipe and method with cells that have not run."""
    lines: dict[str, list[str]] = {}
    for key in results.missing:
        if key[0] == dataset:
            lines.setdefault(f"{method_name(key[2])}, recipe {key[1]}", []).append(str(key[3]))
    return [
        f"Not run yet: {head}, seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}." for head, seeds in lines.items()
    ]


def command(plan_name: str, key: Key) -> str:
    """The command that makes the numbers of one cell again."""
    return f"dvc repro stages/dvc.yaml:evaluate-{plan_name}@{'-'.join(map(str, key))}"


def sections(results: Results, published: Sequence[Row]) -> list[Row]:
    """The sections of every data set of the plan."""
    table = rows(results, published)
    return [section(results, table, published, dataset) for dataset in results.plan["datasets"]]


def markdown(results: Results, published: Sequence[Row]) -> str:
    """The report as Markdown: the answers, then a table and its notes for each data set."""
    said = answers(rows(results, published))
    blocks = [f"# Results of plan {results.plan_name}", f"{READING} {SAME_SUBSET}"]
    for part in sections(results, published):
        blocks.append(f"## {part['dataset']}")
        blocks += [a.text for a in said if a.dataset == part["dataset"]]
        lines = [list(HEADER), ["---"] * 4 + ["---:"] * (len(HEADER) - 4)]
        for line in part["lines"]:
            cells = [cell.replace("|", "\\|") for cell in line["cells"]]
            cells[4] = f"**{cells[4]}**" if line["bold"] else cells[4]
            lines.append(cells)
        blocks.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
        notes = [f"({mark}) {text}" for mark, text in part["notes"]]
        blocks.append("\n".join(f"- {text}" for text in [*part["fitted"], *notes]))
        if part["also"]:
            blocks.append("Also published:\n\n" + "\n".join(f"- {text}" for text in part["also"]))
        if part["missing"]:
            blocks.append("\n".join(f"- {text}" for text in part["missing"]))
    return "\n\n".join(blocks) + "\n"


def figures(results: Results, table: Sequence[Row], dataset: str) -> dict[str, list[plots.Figure]]:
    """The pictures of one data set, under the heading of each group ("" is the overview)."""
    style: dict[str, Any] = {
        "names": {method: method_name(method) for method in results.plan["methods"]},
        "colours": plots.colours(results.plan["methods"]),
    }
    by_class = [row for row in classes(results) if row["dataset"] == dataset]
    by_epoch = [row for row in curves(results) if row["dataset"] == dataset]
    drawn: dict[str, list[plots.Figure]] = {"": [], "Accuracy by class": [], "Training": []}
    if not by_class:
        return drawn
    known = [row[column] for row in by_class for column in (RAW, "aligned") if row[column] is not None]
    recipes = dict.fromkeys(row["recipe"] for row in by_class)
    shown = [row for row in table if row["dataset"] == dataset and row["recipe"] in recipes
             and (row["n"] or row["published"] is not None)]  # fmt: skip
    for recipe in recipes:
        mine = [row for row in shown if row["recipe"] == recipe]
        drawn[""].append(plots.forest(mine, limits=accuracy_limits(shown), recipe=recipe, **style))
        class_rows = [row for row in by_class if row["recipe"] == recipe]
        baseline = [row for row in class_rows if row["method"] == BASELINE]
        for method in dict.fromkeys(row["method"] for row in class_rows):
            own = [row for row in class_rows if row["method"] == method]
            behind = baseline if method != BASELINE else []
            drawn["Accuracy by class"].append(
                plots.by_class(own, behind, lowest=min(known, default=0.0), recipe=recipe, **style)
            )
        epoch_rows = [row for row in by_epoch if row["recipe"] == recipe]
        for measure in ("loss", "held_out_accuracy"):
            if any(row[measure] is not None for row in epoch_rows):
                drawn["Training"].append(plots.curves(epoch_rows, measure, recipe=recipe, **style))
    first = [row for row in by_class if all(row[k] == by_class[0][k] for k in ("recipe", "method"))]
    drawn[""].insert(1, plots.class_profile(first, dataset=dataset))
    return drawn


def accuracy_limits(table: Sequence[Row]) -> tuple[float, float]:
    """Lowest and highest accuracy of the rows, seeds, spreads and published values, with a little room."""
    values = [value for row in table for value in row["accuracies"]]
    values += [row["published"] for row in table if row["published"] is not None]
    for row in table:
        if row["accuracy_sd"] is not None:
            values += [row["accuracy_mean"] - row["accuracy_sd"], row["accuracy_mean"] + row["accuracy_sd"]]
    room = 0.05 * (max(values) - min(values)) + 0.002
    return min(values) - room, max(values) + room


def html(results: Results, published: Sequence[Row]) -> str:
    """The report as one self-contained page: no script, nothing fetched, pictures inside."""
    table = rows(results, published)
    source = Path(__file__).with_name("report.html.j2").read_text()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    parts = sections(results, published)
    for part in parts:
        part["answers"] = [a.text for a in answers(table) if a.dataset == part["dataset"]]
        part["figures"] = figures(results, table, part["dataset"])
        keys = [key for key in results.cells if key[0] == part["dataset"]]
        part["commands"] = [command(results.plan_name, key) for key in keys]
    planned = len(results.cells) + len(results.missing)
    return environment.from_string(source).render(
        plan_name=results.plan_name,
        done=len(results.cells),
        planned=planned,
        reading=READING,
        same_subset=SAME_SUBSET,
        header=HEADER,
        sections=parts,
    )


def write(
    plan_name: str,
    plan: Mapping[str, Any],
    *,
    cells_dir: str | Path,
    published: str | Path,
    out_dir: str | Path,
) -> None:
    """Read the cells of a plan and write table.md, report.html, summary.json, curves.csv and classes.csv.

    Raises what `read` and `read_published` raise; nothing is written then.
    """
    results = read(plan_name, plan, cells_dir)
    known = read_published(published)
    out = Path(out_dir)
    files.write_text(out / "table.md", markdown(results, known))
    files.write_text(out / "report.html", html(results, known))
    files.write_json(out / "summary.json", summary(rows(results, known)))
    files.write_csv(out / "curves.csv", curves(results), CURVES)
    files.write_csv(out / "classes.csv", classes(results), CLASSES)
