"""What a plan found, as tables and a page: ours with its spread, what was published, what is flagged.

Percent and points are in text only; the numbers behind it, and what they mean, are those of longtail.report.outcomes.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from longtail.report import differences, plots, under_shift
from longtail.report.answers import Answer, answers, method_name, spread
from longtail.report.differences import BASELINE, points
from longtail.report.outcomes import (
    ADJUSTED,
    CLASSES,
    CORRECTIONS,
    CURVES,
    GROUPS,
    IN_PUBLISHED,
    ON_HELD_OUT,
    ON_TRAIN,
    RAW,
    REBALANCED,
    Outcome,
    Published,
    Record,
    Results,
    Row,
    beside,
    classes,
    curves,
    gradients,
    read,
    read_published,
    reliability,
    rows,
    summary,
)
from longtail.workflow import files
from longtail.workflow.cells import Cell

HEADER = ("Recipe", "Method", "Correction", "Seeds", "All", "Many", "Medium", "Few", "NLL", "ECE",
          "Best on held-out", "Best on test", "Published", "Difference", "Verdict")  # fmt: skip
OPTIONAL = HEADER[-5:]  # left out where a data set has none
MORE = {
    "top5": "Top-5", "balanced_error": "Balanced error", "geometric_mean": "Geometric mean",
    "worst_class": "Worst class", "macro_f1": "Macro F1", "brier": "Brier", "ece_equal_mass": "ECE, equal mass",
    "classwise_ece": "Class-wise ECE", "mce": "MCE", "aurc": "AURC",
}  # fmt: skip
MORE_READING = (
    "In percent, Brier (0 to 2) excepted; mean ± sample standard deviation over seeds. docs/measures.md defines each. "
    "Geometric mean and worst class are of class accuracies; AURC is the error when the least confident are left out, "
    "over all shares left out; lower is better for balanced error, Brier, the calibration errors and AURC."
)
GRID_READING = (
    "Accuracy of the raw logits in percent. 'Method buys': minus cross-entropy with the same recipe, in points. "
    "'Recipe buys': the best recipe minus the worst one with the same method. What has not run is a dash."
)
READING = (
    "Accuracy on the test images at the last epoch, for all classes and for those with many, a "
    "medium number of and few training images; every column in percent except NLL (nats) and the difference "
    "(points, ours minus published). Values are mean ± sample standard deviation over training seeds."
)
UNBALANCED = (
    "The test images are not balanced: 'All' is a mean over images, in which larger classes count for more. The mean "
    "over classes is in 'More measures': one minus the balanced error."
)
FITTED = {
    ADJUSTED: "'logit adjustment': minus the logarithm of the training prior; meant for cross-entropy, the others "
    "have been corrected for it in training.",
    ON_TRAIN: "'aligned on train': one shift for each class, fitted on the training images.",
    ON_HELD_OUT: "'aligned on held-out': one shift for each class, fitted on the held-out images, "
    "which training never saw.",
    REBALANCED: "'re-balanced on test': GALA's prediction re-balancing, fitted on all test images at once and "
    "presuming that they are balanced: never in bold.",
}
BEST_ON_TEST = (
    "'Best on test': the highest test accuracy of a seed's epochs, at which the history looked. Optimistic, for it is "
    "chosen on the test images; here to show what that choice is worth. The last epoch is the result."
)
LEADING = "Cross-entropy and the seven methods with the highest accuracy, raw, mean over recipes."
VERDICT = (
    "'Verdict': ours agrees with the published accuracy when that is within the 95 % interval of the difference (test "
    "images, our seeds where there are two or more, their runs where they are known; Student's t). 'These networks': "
    "one seed of ours, or the spread of theirs is not known. The notes say where it is not like with like."
)
SAME_SUBSET = (
    "That spread is over training seeds only; 'How sure' below adds that over test images. All runs share one training "
    "subset, so nothing here speaks of others."
)


COMPUTED_READING = (
    "What the training of each cell really ran on, as its metrics.json says (`provenance`): a processor without bf16 "
    "trains in fp32. 'Not recorded': trained before that was kept, or `longtail adopt` took it over from such a one."
)
CELLS_READING = (
    "Accuracy of the raw logits of each at its last epoch, its files (measures, history, accuracy by class, "
    "reliability, which images are right), and the command that makes it again. Params are in params.yaml, and as they "
    "were for each stage of a cell in stages/<plan>/dvc.lock; `git log -1 <folder>` says the commit. `longtail track` "
    "gives each cell a run in MLflow with all of these; there, search params.method = '...' AND params.recipe = '...'."
)


class Table(NamedTuple):
    """A table in text: the first `left` columns are words; `folded` ones open on a click."""

    title: str
    header: Sequence[str]
    lines: list[list[str]]
    left: int
    note: str
    folded: bool = False


class Line(NamedTuple):
    """A line of the first table: its cells in text, whether its accuracy is the highest, and the cell to jump to."""

    cells: list[str]
    bold: bool
    raw: bool
    anchor: str | None


class Made(NamedTuple):
    """A finished cell: its files' folder, seen from the report, and the command that makes it again."""

    name: str
    folder: str
    command: str
    accuracy: str
    epoch: int


@dataclass(frozen=True)
class Section:
    """All that is said of one data set, in text; `notes` are (letter, text), `tables` the others by name."""

    dataset: str
    answers: list[Answer]
    header: list[str]
    lines: list[Line]
    explained: list[str]
    notes: list[tuple[str, str]]
    tables: dict[str, Table]
    also: list[str]
    missing: list[str]
    cells: list[Made]


@dataclass(frozen=True)
class Report:
    """What a plan found, in text, ready to be written as Markdown and as a page; `table` has the numbers behind it."""

    plan_name: str
    done: int
    planned: int
    table: list[Row]
    sections: list[Section]


# ---------------------------------------------------------------------------------------------- writing


def letter(index: int) -> str:
    """a, b, ... z, aa, ab, ..."""
    return (letter(index // 26 - 1) if index > 25 else "") + chr(ord("a") + index % 26)


def footnote(row: Row, theirs: Published) -> str:
    """Where a published number comes from and what to hold against it."""
    parts = [*theirs.flags, *([theirs.note] if theirs.note else []), f"source: {theirs.source}"]
    corrected = "" if row.correction == RAW else f" {CORRECTIONS[row.correction]}"
    return f"{method_name(row.method)}{corrected}, recipe {row.recipe}: {'; '.join(parts)}."


def build(results: Results, published: Sequence[Published]) -> Report:
    """The whole report but its pictures."""
    published = beside(results.plan, published)
    table = rows(results, published)
    said = answers(results, table)
    return Report(
        results.plan_name,
        len(results.cells),
        len(results.cells) + len(results.missing),
        table,
        [
            section(
                results,
                dataset,
                [row for row in table if row.dataset == dataset],
                [one for one in published if one.dataset == dataset],
                [answer for answer in said if answer.dataset == dataset],
            )
            for dataset in results.plan["datasets"]
        ],
    )


def section(
    results: Results, dataset: str, mine: Sequence[Row], published: Sequence[Published], said: list[Answer]
) -> Section:
    """One data set in text: of its rows, what was published of it, and what is said of it."""
    lines, notes = main_table(results, mine)
    columns = [
        place for place, name in enumerate(HEADER)
        if name not in OPTIONAL or any(line.cells[place] != "-" for line in lines)
    ]  # fmt: skip
    header = [HEADER[place] for place in columns]
    used = {row.correction for row in mine}
    shown = {(row.recipe, row.method, IN_PUBLISHED.get(row.correction, "")) for row in mine}
    names = {method: method_name(method) for method in results.plan["methods"]}
    shift = under_shift.table(under_shift.rows(results, dataset), published, names)
    explained = [text for key, text in FITTED.items() if key in used]
    explained += [UNBALANCED] if any(unbalanced(row) for row in mine) else []
    explained += [BEST_ON_TEST] if "Best on test" in header else []
    explained += [VERDICT] if "Verdict" in header else []
    return Section(
        dataset=dataset,
        answers=said,
        header=header,
        lines=[line._replace(cells=[line.cells[place] for place in columns]) for line in lines],
        explained=explained,
        notes=notes,
        tables={
            "methods": sure(results, [row for row in mine if row.correction == RAW], names),
            "corrections": sure(results, mine, names),
            "grid": grid(mine, results.plan, names),
            "more": more(mine),
            "shift": Table("Other test distributions", shift.header, shift.lines, 3, under_shift.READING),
            "computed": computed(results, dataset),
        },
        also=also_published(results.plan, [one for one in published if one not in shift.quoted], shown),
        missing=missing(results, dataset),
        cells=[made(cell, outcome) for cell, outcome in results.cells.items() if cell.dataset == dataset],
    )


def unbalanced(row: Row) -> bool:
    """Whether the mean over images is another than that over classes."""
    error = row.measures["balanced_error"].mean if row.n else None
    return error is not None and abs(row.accuracy + error - 1) > 1e-5


def main_table(results: Results, mine: Sequence[Row]) -> tuple[list[Line], list[tuple[str, str]]]:
    """The lines of the first table of a data set, with all columns of HEADER, and its notes."""
    best = max((row.accuracy for row in differences.ranked(mine)), default=None)
    lines: list[Line] = []
    notes: list[tuple[str, str]] = []
    for row in (row for row in mine if row.n or row.published):
        quoted = "-"
        if row.published:
            notes.append((letter(len(notes)), footnote(row, row.published)))
            quoted = f"{spread(row.published.value, row.published.sd)} ({notes[-1][0]})"
        apart = differences.to_published(results, row)
        cells = [
            row.recipe,
            method_name(row.method),
            CORRECTIONS[row.correction],
            str(row.n) if row.n == row.planned else f"{row.n} of {row.planned}",
            spread(*row.measures["accuracy"]) if row.n else "not run yet",
            *(spread(*row.measures[name]) for name in GROUPS),
            spread(*row.measures["nll"], 1, 3),
            spread(*row.measures["ece"]),
            spread(*row.best_on_held_out),
            spread(*row.best_on_test),
            quoted,
            "-" if row.difference is None else points(row.difference),
            "-" if apart is None else apart.said("higher", "agrees", "lower"),
        ]
        bold = row.n > 0 and row.correction != REBALANCED and row.accuracy == best
        anchor = f"{row.dataset}-{row.recipe}-{row.method}-{row.seeds[0]}" if row.n else None
        lines.append(Line(cells, bold, row.correction == RAW, anchor))
    return lines, notes


def made(cell: Cell, outcome: Outcome) -> Made:
    """What the report says of a finished cell."""
    accuracy, epoch = f"{100 * outcome.last[RAW]['accuracy']:.2f}", int(outcome.last["epoch"])
    return Made(cell.name, f"cells/{cell.path}", f"dvc repro {cell.address('evaluate')}", accuracy, epoch)


def sure(results: Results, mine: Sequence[Row], names: Mapping[str, str]) -> Table:
    """Intervals of the differences within each recipe: of the methods, or of these with corrections."""
    lines = differences.texts(differences.lines(results, mine), names)
    corrected = any(row.correction != RAW for row in mine)
    title = "How sure, corrections included" if corrected else "How sure"
    return Table(title, differences.HEADER, lines, 3, differences.READING, folded=corrected)


def grid(mine: Sequence[Row], plan: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    """Method x recipe: what each buys. No lines when fewer than two recipes have run."""
    found = {(row.recipe, row.method): row for row in mine if row.correction == RAW and row.n}
    recipes = [recipe for recipe in plan["recipes"] if any(key[0] == recipe for key in found)]
    header = ["Method", *(name for recipe in recipes for name in (recipe, "Method buys")), "Recipe buys"]
    if len(recipes) < 2:
        return Table("Method and recipe", header, [], 1, GRID_READING)
    lines = []
    for method, name in names.items():
        means = {recipe: found[recipe, method].accuracy for recipe in recipes if (recipe, method) in found}
        cells = [name]
        for recipe in recipes:
            row, base = found.get((recipe, method)), found.get((recipe, BASELINE))
            cells.append("-" if row is None else spread(*row.measures["accuracy"]))
            cells.append(points(row.accuracy - base.accuracy) if row and base and method != BASELINE else "-")
        bought = points(max(means.values()) - min(means.values())) if len(means) > 1 else "-"
        if means:
            lines.append([*cells, bought])
    return Table("Method and recipe", header, lines, 1, GRID_READING)


def more(mine: Sequence[Row]) -> Table:
    """The measures that the first table has no room for."""
    lines = [
        [row.recipe, method_name(row.method), CORRECTIONS[row.correction]]
        + [
            spread(*row.measures[key], 1, 3) if key == "brier" else spread(*row.measures[key]) for key in MORE
        ]
        for row in mine if row.n
    ]  # fmt: skip
    header = ["Recipe", "Method", "Correction", *MORE.values()]
    return Table("More measures", header, lines, 3, MORE_READING, folded=True)


def computed(results: Results, dataset: str) -> Table:
    """What computed the cells, as far as they say: one line for all that were computed alike."""
    alike: dict[tuple[str, ...], int] = {}
    for cell, outcome in results.cells.items():
        if cell.dataset == dataset:
            known = by(outcome.provenance) if outcome.provenance else ["not recorded"] + 4 * ["-"]
            cells = [cell.recipe, *known]
            alike[tuple(cells)] = alike.get(tuple(cells), 0) + 1
    lines = [[*cells, str(count)] for cells, count in alike.items()]
    header = ["Recipe", "Precision", "Device", "Kernels", "Threads", "Versions", "Cells"]
    return Table("What computed the cells", header, lines, 6, COMPUTED_READING, folded=True)


def by(provenance: Sequence[Record]) -> list[str]:
    """Precision, device, kernels, threads and versions of the training; where there were several, all that differ."""

    def texts(step: Record) -> list[str]:
        threads = f"{step['processes']} x {step['threads']}" if step["processes"] > 1 else str(step["threads"])
        versions = ", ".join(f"{name} {version}" for name, version in step["versions"].items())
        device = step["device"] if step["instructions"] is None else f"{step['device']}, {step['instructions']}"
        return [step["precision"], device, "ours" if step["kernels"] else "PyTorch's", threads, versions]

    trained = [step for step in provenance if step["step"] == "train"] or provenance
    return [" / ".join(dict.fromkeys(column)) for column in zip(*map(texts, trained), strict=True)]


def also_published(
    plan: Mapping[str, Any], published: Sequence[Published], shown: Set[tuple[str, str, str]]
) -> list[str]:
    """Published numbers of a data set that the table has no place for, one line a method.

    `shown` are the (recipe, method, correction) whose published accuracy the table has.
    """
    lines: dict[str, str] = {}
    for one in published:
        asked = one.recipe in plan["recipes"] and one.method in plan["methods"]
        overall = (one.measure, one.group) == ("accuracy", "all")
        if not asked or (overall and (one.recipe, one.method, one.correction) in shown):
            continue
        corrected = "" if one.correction == "none" else f" with {one.correction.replace('_', ' ')}"
        head = f"{method_name(one.method)}{corrected}, recipe {one.recipe}"
        if one.flags:
            head += f" ({'; '.join(one.flags)})"
        what = one.group if one.measure == "accuracy" else one.measure.upper()
        value = f"{what} {spread(one.value, one.sd)}"
        lines[head] = f"{lines[head]}, {value}" if head in lines else f"{head}: {value}"
    return [f"{line}." for line in lines.values()]


def missing(results: Results, dataset: str) -> list[str]:
    """One line for each recipe with cells that have not run."""
    lines: dict[str, dict[str, list[str]]] = {}
    for cell in (cell for cell in results.missing if cell.dataset == dataset):
        lines.setdefault(cell.recipe, {}).setdefault(method_name(cell.method), []).append(cell.seed)
    return [
        f"Not run yet, recipe {recipe}: "
        + "; ".join(f"{name} seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" for name, seeds in methods.items())
        + "."
        for recipe, methods in lines.items()
    ]


def markdown(found: Report) -> str:
    """The report as Markdown: the answers, then the tables and their notes for each data set."""
    blocks = [f"# Results of plan {found.plan_name}", f"{READING} {SAME_SUBSET}"]
    for part in found.sections:
        blocks.append(f"## {part.dataset}")
        blocks += [f"{a.text} Again: `{a.again}`" if a.again else a.text for a in part.answers]
        lines = [[*line.cells] for line in part.lines]
        for cells, line in zip(lines, part.lines, strict=True):
            cells[4] = f"**{cells[4]}**" if line.bold else cells[4]
        if lines:
            blocks.append(markdown_table(part.header, lines, 4))
        notes = [f"({mark}) {text}" for mark, text in part.notes]
        blocks.append("\n".join(f"- {text}" for text in [*part.explained, *notes]))
        for table in part.tables.values():
            if table.lines:
                blocks += [f"### {table.title}", table.note, markdown_table(table.header, table.lines, table.left)]
        if part.also:
            blocks.append("Also published:\n\n" + "\n".join(f"- {text}" for text in part.also))
        if part.missing:
            blocks.append("\n".join(f"- {text}" for text in part.missing))
        blocks += ["### Cells", CELLS_READING]
        blocks.append("\n".join(f"- [{c.name}]({c.folder}): {c.accuracy} %, `{c.command}`" for c in part.cells))
    return "\n\n".join(blocks) + "\n"


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A table of which the first `left` columns are words, the others numbers."""
    rules = ["---"] * left + ["---:"] * (len(header) - left)
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in (header, rules, *lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def figures(results: Results, table: Sequence[Row], dataset: str) -> dict[str, list[plots.Figure]]:
    """The pictures of one data set, under the heading of each group ("" is the overview)."""
    lines = [drawn_line(row) for row in table if row.dataset == dataset and (row.n or row.published)]
    leading = plots.leading([drawn_line(row) for row in table if row.dataset == dataset], BASELINE)
    style: dict[str, Any] = {
        "names": {method: method_name(method) for method in results.plan["methods"]},
        "colours": plots.colours([*leading, *(m for m in results.plan["methods"] if m not in leading)]),
    }
    by_class = [row for row in classes(results) if row["dataset"] == dataset]
    trained = results.plan.get("trained", results.plan["methods"])  # others have the history of what they start from
    by_epoch = [row for row in curves(results) if row["dataset"] == dataset and row["method"] in trained]
    shifted = [row for row in under_shift.rows(results, dataset) if row.method in leading]
    drawn: dict[str, list[plots.Figure]] = {
        "": [], "Accuracy by class": [], "Calibration and energies": [], "Shift": under_shift.figures(shifted, style),
        "Training": [], "Gradient ratios": [],
    }  # fmt: skip
    if not by_class:
        return drawn
    known = [row[column] for row in by_class for column in (RAW, "aligned") if row[column] is not None]
    recipes = dict.fromkeys(row["recipe"] for row in by_class)
    lines = [row for row in lines if row["recipe"] in recipes]
    for recipe in recipes:
        mine = [row for row in lines if row["recipe"] == recipe]
        if len(leading) < len(results.plan["methods"]):  # a page long else
            mine = [row for row in mine if row["correction"] == RAW]
        drawn[""].append(plots.forest(mine, limits=accuracy_limits(lines), recipe=recipe, **style))
        class_rows = [row for row in by_class if row["recipe"] == recipe]
        baseline = [row for row in class_rows if row["method"] == BASELINE]
        for method in dict.fromkeys(row["method"] for row in class_rows):
            own = [row for row in class_rows if row["method"] == method]
            behind = baseline if method != BASELINE else []
            drawn["Accuracy by class"].append(
                plots.by_class(own, behind, lowest=min(known, default=0.0), recipe=recipe, **style)
            )
        bins = [row for row in reliability(results) if (row["dataset"], row["recipe"]) == (dataset, recipe)]
        drawn["Calibration and energies"] += [
            plots.reliability(chosen(bins, leading), recipe=recipe, **style),
            plots.aligned_energies(chosen(class_rows, leading), recipe=recipe, **style),
        ]
        epoch_rows = chosen([row for row in by_epoch if row["recipe"] == recipe], leading)
        for measure in ("loss", "held_out_accuracy"):
            if any(row[measure] is not None for row in epoch_rows):
                drawn["Training"].append(plots.curves(epoch_rows, measure, recipe=recipe, **style))
        ratios = [row for row in gradients(results) if (row["dataset"], row["recipe"]) == (dataset, recipe)]
        for method in dict.fromkeys(row["method"] for row in ratios if row["method"] in trained):
            own = [row for row in ratios if row["method"] == method]
            drawn["Gradient ratios"].append(plots.gradients(own, recipe=recipe, name=style["names"][method]))
    if len(leading) < len(results.plan["methods"]):
        for group in ("Calibration and energies", "Shift", "Training"):
            drawn[group] = [figure._replace(caption=f"{figure.caption} {LEADING}") for figure in drawn[group]]
    first = [row for row in by_class if all(row[k] == by_class[0][k] for k in ("recipe", "method"))]
    drawn[""].append(plots.class_profile(first, dataset=dataset))
    timed = [
        {"recipe": cell.recipe, "method": cell.method, "accuracy": results.cells[cell].last[RAW]["accuracy"], **cost}
        for cell, cost in results.cost.items() if cell.dataset == dataset
    ]  # fmt: skip
    for what in plots.COSTS:
        if known := [row for row in timed if row[what] is not None]:
            drawn["Training"].append(plots.cost(known, what, recipes=results.plan["recipes"], **style))
    return drawn


def drawn_line(row: Row) -> Record:
    """A row as longtail.report.plots draws it."""
    return {
        "recipe": row.recipe,
        "method": row.method,
        "correction": row.correction,
        "n": row.n,
        "accuracies": row.accuracies,
        "accuracy_mean": row.measures["accuracy"].mean,
        "accuracy_sd": row.measures["accuracy"].sd,
        "published": row.published and row.published.value,
    }


def chosen(found: Sequence[Record], methods: Sequence[str]) -> list[Record]:
    """The rows of these methods."""
    return [row for row in found if row["method"] in methods]


def accuracy_limits(table: Sequence[Record]) -> tuple[float, float]:
    """Lowest and highest accuracy of the rows, seeds, spreads and published values, with a little room."""
    values = [value for row in table for value in row["accuracies"]]
    values += [row["published"] for row in table if row["published"] is not None]
    for row in table:
        if row["accuracy_sd"] is not None:
            values += [row["accuracy_mean"] - row["accuracy_sd"], row["accuracy_mean"] + row["accuracy_sd"]]
    room = 0.05 * (max(values) - min(values)) + 0.002
    return min(values) - room, max(values) + room


def html(found: Report, pictures: Mapping[str, Mapping[str, Sequence[plots.Figure]]]) -> str:
    """The report as one self-contained page: no script, nothing fetched, pictures inside.

    Args:
        pictures: by data set what `figures` gives.
    """
    source = Path(__file__).with_name("report.html.j2").read_text()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        report=found, drawn=pictures, reading=READING, cells_reading=CELLS_READING, same_subset=SAME_SUBSET
    )


def write(
    plan_name: str,
    plan: Mapping[str, Any],
    *,
    cells_dir: str | Path,
    published: str | Path,
    out_dir: str | Path,
    times: str | Path | None = None,
) -> None:
    """Read the cells of a plan and write table.md, report.html, summary.json, curves.csv and classes.csv.

    Raises what `read` and `read_published` raise; nothing is written then.
    """
    results = read(plan_name, plan, cells_dir, times)
    found, out = build(results, read_published(published)), Path(out_dir)
    pictures = {part.dataset: figures(results, found.table, part.dataset) for part in found.sections}
    files.write_text(out / "table.md", markdown(found))
    files.write_text(out / "report.html", html(found, pictures))
    files.write_json(out / "summary.json", summary(found.table))
    files.write_csv(out / "curves.csv", curves(results), CURVES)
    files.write_csv(out / "classes.csv", classes(results), CLASSES)
