"""What a plan found, as a page and as Markdown: the answer, one table and one picture; all the rest folded below.

Percent and points are in text only; the numbers behind it, and what they mean, are those of longtail.report.outcomes.
Everything of a data set is computed once, as `Found`; each `..._part` below makes of it a part of the page.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtail.report import differences, plots, under_shift
from longtail.report.answers import (
    Answer,
    answers,
    described,
    entrant_name,
    entrants,
    headline,
    method_name,
    percent,
    published_text,
    seeds_text,
    spread,
    verdict,
)
from longtail.report.differences import BASELINE, points, points_range
from longtail.report.document import Document, Entry, Line, Part, Section, Table, html, markdown
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

HEADER = ("Method", "Recipe", "Correction", "Seeds", "All", "Many", "Medium", "Few", "NLL", "ECE",
          "Best on held-out", "Best on test")  # fmt: skip
OPTIONAL = HEADER[-2:]  # left out where a data set has none
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
    "medium number of and few training images; every column in percent except NLL (nats). Values are mean ± sample "
    "standard deviation over training seeds."
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
HIGHEST_EIGHT = "The eight methods with the highest accuracy, raw, mean over recipes."  # without cross-entropy
VERDICT = (
    "'Verdict': ours agrees with the published accuracy when that is within the 95 % interval of the difference (test "
    "images, our seeds where there are two or more, their runs where they are known; Student's t). 'These networks': "
    "one seed of ours, or the spread of theirs is not known. The notes say where it is not like with like."
)
NOT_SETTLED = "≈"
SAME_SUBSET = (
    "That spread is over training seeds only; 'How sure' adds that over test images. All runs share one training "
    "subset, so nothing here speaks of others."
)


COMPUTED_READING = (
    "What the training of each cell really ran on, as its metrics.json says (`provenance`): a processor without bf16 "
    "trains in fp32. 'Not recorded': trained before that was kept, or `longtail adopt` took it over from such a one."
)
FILES = ("history", "classes", "distributions", "reliability", "right")
CELLS_READING = (
    "Accuracy of the raw logits of each at its last epoch, its files (measures, history, accuracy by class, "
    "reliability, which images are right), and the command that makes it again. Params are in params.yaml, and as they "
    "were for each stage of a cell in stages/<plan>/dvc.lock; `git log -1 <folder>` says the commit. `longtail track` "
    "gives each cell a run in MLflow with all of these; there, search params.method = '...' AND params.recipe = '...'."
)


@dataclass(frozen=True)
class Found:
    """All of one data set that its page is made of, computed once."""

    results: Results
    dataset: str
    rows: list[Row]
    published: list[Published]
    answers: list[Answer]
    sure: list[differences.Line]  # of the entrants, for each recipe its rows
    all_sure: list[differences.Line]  # of all rows
    shifted: list[under_shift.Row]
    by_class: list[Record]
    by_epoch: list[Record]
    bins: list[Record]
    ratios: list[Record]
    leading: list[str]

    @property
    def plan(self) -> Mapping[str, Any]:
        """The plan's axes."""
        return self.results.plan

    @property
    def run(self) -> list[Row]:
        """The rows that have a value."""
        return [row for row in self.rows if row.n]

    @property
    def raw(self) -> list[Row]:
        """Of these the uncorrected ones."""
        return [row for row in self.run if row.correction == RAW]

    @property
    def names(self) -> dict[str, str]:
        """Methods' names for people."""
        return {method: method_name(method) for method in self.plan["methods"]}

    @property
    def style(self) -> dict[str, Any]:
        """What every picture is given: each method's name and colour."""
        rest = [method for method in self.plan["methods"] if method not in self.leading]
        return {"names": self.names, "colours": plots.colours([*self.leading, *rest])}

    @property
    def recipes(self) -> list[str]:
        """The recipes that have run, in the plan's order."""
        return list(dict.fromkeys(row.recipe for row in self.run))

    @property
    def first(self) -> Row | None:
        """The highest of the entrants."""
        return next(iter(differences.ranked(entrants(self.run))), None)


def build(results: Results, published: Sequence[Published]) -> Document:
    """The whole report."""
    return document(results, rows(results, beside(results.plan, published)), published)


def document(results: Results, table: Sequence[Row], published: Sequence[Published]) -> Document:
    """The report of a plan whose rows are known."""
    done, planned = len(results.cells), len(results.cells) + len(results.missing)
    under = f"{done} of {planned} runs are in"
    if hours := [cost["minutes"] / 60 for cost in results.cost.values()]:
        some = "" if len(hours) == done else f" for {len(hours)} of them"
        under += f", {sum(hours):.1f} hours of training{some}"
    under += f"; `longtail status {results.plan_name}` names their commit."
    everything = found(results, table, beside(results.plan, published))
    return Document(f"Results of plan {results.plan_name}", under, [section(one) for one in everything])


def found(results: Results, table: Sequence[Row], published: Sequence[Published]) -> Iterator[Found]:
    """Of each data set what its section needs."""
    said, by_class, by_epoch = answers(results, table), classes(results), curves(results)
    bins, ratios = reliability(results), gradients(results)
    trained = results.plan.get("trained", results.plan["methods"])  # others have the history of what they start from
    for dataset in results.plan["datasets"]:
        mine = [row for row in table if row.dataset == dataset]
        yield Found(
            results,
            dataset,
            mine,
            [one for one in published if one.dataset == dataset],
            [answer for answer in said if answer.dataset == dataset],
            differences.lines(results, entrants(mine)),
            differences.lines(results, mine),
            under_shift.rows(results, dataset),
            of(dataset, by_class),
            [row for row in of(dataset, by_epoch) if row["method"] in trained],
            of(dataset, bins),
            [row for row in of(dataset, ratios) if row["method"] in trained],
            plots.leading([drawn_line(row) for row in mine], BASELINE),
        )


def of(dataset: str, table: Sequence[Record]) -> list[Record]:
    """The rows of a data set."""
    return [row for row in table if row["dataset"] == dataset]


def section(it: Found) -> Section:
    """One data set: the answer, its table and picture, and all the rest."""
    said = headline(it.results, it.rows)
    makers = (
        corrections_part, sure_part, shift_part, calibration_part, curves_part, cost_part, published_part, grid_part,
        by_class_part, numbers_part, gradients_part, computed_part, cells_part,
    )  # fmt: skip
    parts = [part for make in makers if (part := make(it))]
    return Section(it.dataset, said.text, said.more, first_table(it), first_picture(it), parts)


# ------------------------------------------------------------------------------------- the first screen


def ranking(it: Found) -> list[list[Row]]:
    """The entrants, each with its rows by recipe, the highest first, and last those that have only published values."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in entrants(it.rows):
        if row.n or row.published:
            groups.setdefault((row.method, row.correction), []).append(row)
    return sorted(groups.values(), key=lambda group: -max((row.accuracy for row in group if row.n), default=0))


def first_table(it: Found) -> Table | None:
    """Methods x recipes, the highest first: accuracy, seeds, what was published, and what cannot be told apart."""
    groups, first = ranking(it), it.first
    if not groups:
        return None
    recipes = by_accuracy(it)
    highest = {line.row.recipe: line.row for line in it.sure if line.to_best is None}
    close = [line.row for line in it.sure if line.to_best is not None and not line.to_best.settled]
    same = {row.n for group in groups for row in group if row.n}
    lines: list[list[Entry | str]] = []
    for group in groups:
        by_recipe = {row.recipe: row for row in group}
        line: list[Entry | str] = [entrant_name(group[0])]
        for recipe in recipes:
            row = by_recipe.get(recipe)
            if row is None or not (row.n or row.published):
                line.append("-")
                continue
            under = [seeds_text([row])] if row.n and len(same) > 1 else []
            if row.published:
                value = spread(row.published.value, row.published.sd)
                under.append(f"published [{value}]({row.published.url})" if row.published.url else f"published {value}")
            text = f"[{spread(*row.measures['accuracy'])}](#{cell_key(row)})" if row.n else "not run yet"
            text += f" {NOT_SETTLED}" if row in close else ""
            line.append(Entry(text, row is first, row is highest.get(recipe), tuple(under)))
        lines.append(line)
    note = ["Test accuracy in percent at the last epoch, mean ± standard deviation over seeds"]
    note[0] += f" ({min(same)} seed{'s' if min(same) > 1 else ''} each)." if len(same) == 1 else "."
    note.append("Bold: the highest of its recipe; the first line has the highest of all." if len(lines) > 1 else "")
    if close:
        note.append(f"{NOT_SETTLED}: not settled, it cannot be told apart from the highest of its recipe.")
    if 1 in same:
        note.append("One seed says nothing of other trainings.")
    if any(row.published for group in groups for row in group):
        note.append("What to hold against the published values is said below.")
    note.append(lengths(it, recipes))
    return Table("Methods and recipes", ["Method", *recipes], lines, 1, " ".join(text for text in note if text))


def lengths(it: Found, recipes: Iterable[str]) -> str:
    """How many epochs each recipe trains, as the histories have it."""
    trained = it.plan.get("trained", it.plan["methods"])  # others have the history of what they start from
    epochs: dict[str, int] = {}
    for cell, outcome in it.results.cells.items():
        if cell.dataset == it.dataset and cell.method in trained:
            epochs[cell.recipe] = max(epochs.get(cell.recipe, 0), len(outcome.history))
    known = [f"{recipe} {epochs[recipe]}" for recipe in recipes if recipe in epochs]
    return f"Epochs: {', '.join(known)}; the rest of a recipe is in params.yaml, `recipes`." if known else ""


def by_accuracy(it: Found) -> list[str]:
    """The recipes of the first table, the one with the highest accuracy first: on a phone it is all that is seen."""
    highest: dict[str, float] = {}
    for row in (row for group in ranking(it) for row in group):
        highest[row.recipe] = max(highest.get(row.recipe, 0.0), row.accuracy if row.n else 0.0)
    return sorted(highest, key=lambda recipe: -highest[recipe])


def cell_key(row: Row) -> str:
    """The name of a row's first cell: what its accuracy links to."""
    return f"{row.dataset}-{row.recipe}-{row.method}-{row.seeds[0]}"


def first_picture(it: Found) -> plots.Figure | None:
    """All entrants and recipes on one axis, with the published values."""
    groups = [(entrant_name(group[0]), [drawn_line(row) for row in group]) for group in ranking(it)]
    return plots.overview(groups, recipes=by_accuracy(it)) if groups else None


# ------------------------------------------------------------------------------------------- the parts


def corrections_part(it: Found) -> Part | None:
    """What correcting the logits afterwards changes, for each method and recipe."""
    used = [key for key in CORRECTIONS if any(row.correction == key for row in it.run)]
    best, first = next(iter(differences.ranked(it.run)), None), it.first
    if best is None or first is None or len(used) < 2:
        return None
    by_place = {(row.method, row.recipe, row.correction): row for row in it.run}
    lines: list[list[Entry | str]] = []
    gains: dict[str, list[float]] = {}
    for raw in it.raw:
        mine = {key: by_place[raw.method, raw.recipe, key] for key in used if (raw.method, raw.recipe, key) in by_place}
        top = max((row for key, row in mine.items() if key != REBALANCED), key=lambda row: row.accuracy)
        line: list[Entry | str] = [method_name(raw.method), raw.recipe]
        for key in used:
            row = mine.get(key)
            line.append("-" if row is None else Entry(spread(*row.measures["accuracy"]), row is best, row is top))
        for key, row in mine.items():
            gains.setdefault(key, []).append(row.accuracy - raw.accuracy)
        lines.append(line)
    header = ["Method", "Recipe", *("as it is" if key == RAW else CORRECTIONS[key] for key in used)]
    by = points_range(gains[ON_TRAIN])
    says = f"Energy aligning, fitted on the training images, changes accuracies by {by}; "
    if best is first:
        says += f"no correction takes the highest accuracy above {percent(first)}."
    else:
        says += f"the highest of all is then {described(best)}: {percent(best)} ({seeds_text([best])})."
    shown = it.leading if len(it.leading) < len(it.plan["methods"]) else it.plan["methods"]  # a page long else
    drawn = [drawn_line(row) for row in it.rows if (row.n or row.published) and row.method in shown]
    limits = accuracy_limits(drawn) if drawn else (0.0, 1.0)
    figures = [
        plots.forest([row for row in drawn if row["recipe"] == recipe], limits=limits, recipe=recipe, **it.style)
        for recipe in it.recipes
    ]
    note = "In percent; bold: the highest of a line, those on test left out. "
    note += " ".join(text for key, text in FITTED.items() if key in used)
    return Part("Corrections", says, [Table("Corrections", header, lines, 2, note)], those(it, figures))


def sure_part(it: Found) -> Part | None:
    """Intervals of all differences within each recipe, and each recipe's answer in sentences."""
    if not it.run:
        return None
    leads = [
        (ranked[0].row.recipe, ranked[1].to_best.swapped())
        for recipe in it.recipes
        if len(ranked := [line for line in it.sure if line.row.recipe == recipe]) > 1 and ranked[1].to_best
    ]
    says = "; ".join(f"{recipe}: {verdict(lead)}" for recipe, lead in leads)
    says = f"The lead of the highest method, recipe by recipe: {says}." if leads else "No recipe has two methods yet."
    names = it.names
    tables = [Table("How sure", differences.HEADER, differences.texts(it.sure, names), 3, differences.READING)]
    if len(it.all_sure) > len(it.sure):
        texts = differences.texts(it.all_sure, names)
        tables.append(Table("How sure, corrections included", differences.HEADER, texts, 3))
    return Part("How sure", says, tables, lines=[Line(answer.text) for answer in it.answers])


def shift_part(it: Found) -> Part | None:
    """Other distributions of the test images."""
    shift = under_shift.table(it.shifted, it.published, it.names)
    if it.first is None or len(shift.header) < 5:  # method, recipe, prior and more than one distribution
        return None
    recipe, said = it.first.recipe, []
    for method in dict.fromkeys((it.first.method, BASELINE)):
        mine = [row for row in it.shifted if (row.recipe, row.method, row.correction, row.column) ==
                (recipe, method, RAW, "accuracy") and row.mean is not None]  # fmt: skip
        if mine:
            values = [f"{100 * mine[place].mean:.1f} %" for place in (0, -1)]  # type: ignore[operator]  # not None
            said.append(f"{method_name(method)} has {values[0]} on {mine[0].distribution} and {values[1]} on "
                        f"{mine[-1].distribution}")  # fmt: skip
    says = (
        "Where the test images have a long tail of their own, that of training (forward) or its reverse (backward; "
        f"recipe {recipe}): {'; '.join(said)}."
    )
    table = Table("Other test distributions", shift.header, shift.lines, 3, under_shift.READING)
    drawn = under_shift.figures([row for row in it.shifted if row.method in it.leading], it.style)
    return Part("Other test distributions", says, [table], those(it, drawn))


def calibration_part(it: Found) -> Part | None:
    """How far confidence is from accuracy, and what aligning does to the free energies."""
    if not it.raw or it.first is None:
        return None
    low = min(entrants(it.run), key=lambda row: row.measures["ece"].mean or 0.0)
    says = (
        f"The confidence of {entrant_name(it.first)} is {spread(*it.first.measures['ece'])} points off (ECE, recipe "
        f"{it.first.recipe}); of the methods as they are the lowest ECE has {described(low)}: "
        f"{spread(*low.measures['ece'])}."
    )
    figures = []
    for recipe in it.recipes:
        bins = [row for row in it.bins if row["recipe"] == recipe]
        by_class = [row for row in it.by_class if row["recipe"] == recipe]
        figures += [
            plots.reliability(chosen(bins, it.leading), recipe=recipe, **it.style),
            plots.aligned_energies(chosen(by_class, it.leading), recipe=recipe, **it.style),
        ]
    return Part("Calibration", says, figures=those(it, figures))


def curves_part(it: Found) -> Part | None:
    """Loss and held-out accuracy by epoch."""
    figures = []
    for recipe in it.recipes:
        epoch_rows = chosen([row for row in it.by_epoch if row["recipe"] == recipe], it.leading)
        for measure in ("loss", "held_out_accuracy"):
            if any(row[measure] is not None for row in epoch_rows):
                figures.append(plots.curves(epoch_rows, measure, recipe=recipe, **it.style))
    if not figures:
        return None
    looked = [(row.best_on_test.mean - row.accuracy, row) for row in it.raw if row.best_on_test.mean is not None]
    if looked:
        most, row = max(looked, key=lambda one: one[0])
        says = (
            f"The last epoch is the result; the best epoch on the test images would have had up to {100 * most:.1f} "
            f"points more ({described(row)})."
        )
    else:
        says = "The last epoch is the result, and nothing looked at the test images before it."
    return Part("Training curves", says, figures=those(it, figures))


def cost_part(it: Found) -> Part | None:
    """What training time and memory buy."""
    timed = [
        {"recipe": cell.recipe, "method": cell.method, "accuracy": it.results.cells[cell].last[RAW]["accuracy"], **cost}
        for cell, cost in it.results.cost.items() if cell.dataset == it.dataset
    ]  # fmt: skip
    if not timed:
        return None
    best, least = max(timed, key=lambda row: row["accuracy"]), min(timed, key=lambda row: row["minutes"])
    low, high = (f"{end(row['minutes'] for row in timed):.0f}" for end in (min, max))
    cases = [
        f"{method_name(row['method'])}, {row['recipe']}, has {100 * row['accuracy']:.1f} % for {row['minutes']:.0f}"
        for row in (best, least)
    ]
    took = low if low == high else f"{low} to {high}"
    says = f"A training took {took} minutes: {'; '.join(dict.fromkeys(cases))}."
    figures = [
        plots.cost(known, what, recipes=it.plan["recipes"], **it.style)
        for what in plots.COSTS if (known := [row for row in timed if row[what] is not None])
    ]  # fmt: skip
    return Part("Cost", says, figures=figures)


def published_part(it: Found) -> Part | None:
    """Ours beside what was published, with what to hold against it."""
    pairs = [(row, row.published) for row in it.rows if row.published]
    shift = under_shift.table(it.shifted, it.published, it.names)
    shown = {(row.recipe, row.method, IN_PUBLISHED.get(row.correction, "")) for row in it.rows}
    also = also_published(it.plan, [one for one in it.published if one not in shift.quoted], shown)
    if not pairs and not also:
        return None
    lines: list[list[Entry | str]] = []
    judged: list[str] = []
    notes: list[str] = []
    for row, theirs in pairs:
        mark = letter(len(notes))
        notes.append(f"({mark}) {footnote(row, theirs)}")
        apart = differences.to_published(it.results, row)
        said = "-" if apart is None else apart.said("higher", "agrees", "lower")
        judged += [said] if apart else []
        ours = spread(*row.measures["accuracy"]) if row.n else "not run yet"
        lines.append([
            method_name(row.method), row.recipe, CORRECTIONS[row.correction], seeds_of(row), ours,
            f"{spread(theirs.value, theirs.sd)} ({mark})",
            "-" if row.difference is None else points(row.difference), said,
        ])  # fmt: skip
    says, ran = " ".join(published_text(it.raw)), {(row.recipe, row.method) for row in it.rows if row.n}
    if not any((one.recipe, one.method) in ran for one in it.published):
        says = "Nothing of what was published has run yet."
    if judged:
        says = f"{judged.count('agrees')} of {len(judged)} agree with the published accuracy. {says}".rstrip()
    header = ["Method", "Recipe", "Correction", "Seeds", "Ours", "Published", "Difference", "Verdict"]
    table = [Table("Beside the published values", header, lines, 3, VERDICT)] if lines else []
    texts = [*notes, *(f"Also published: {text}" for text in also)]
    return Part("Beside the published values", says, table, lines=[Line(text) for text in texts])


def grid_part(it: Found) -> Part | None:
    """Method x recipe: what each buys. Nothing where fewer than two recipes have run."""
    place = {(row.recipe, row.method): row for row in it.raw}
    recipes = it.recipes
    if len(recipes) < 2:
        return None
    header = ["Method", *(name for recipe in recipes for name in (recipe, "Method buys")), "Recipe buys"]
    lines, methods, bought = [], [], []
    for method, name in it.names.items():
        means = {recipe: place[recipe, method].accuracy for recipe in recipes if (recipe, method) in place}
        cells = [name]
        for recipe in recipes:
            row, base = place.get((recipe, method)), place.get((recipe, BASELINE))
            cells.append("-" if row is None else spread(*row.measures["accuracy"]))
            if row and base and method != BASELINE:
                methods.append((row.accuracy - base.accuracy, row))
                cells.append(points(methods[-1][0]))
            else:
                cells.append("-")
        if len(means) > 1:
            bought.append((max(means.values()) - min(means.values()), name))
        if means:
            lines.append([*cells, points(bought[-1][0]) if len(means) > 1 else "-"])
    says = []
    if methods:
        most, row = max(methods, key=lambda one: one[0])
        says.append(
            f"over cross-entropy with its recipe a method buys up to {100 * most:.1f} points ({described(row)})"
        )
    if bought:
        most, name = max(bought)
        says.append(f"the recipe buys up to {100 * most:.1f} ({name})")
    said = "; ".join(says) or "no method has run with two recipes yet"
    table = Table("Method and recipe", header, lines, 1, GRID_READING)
    return Part("Method and recipe", f"{said[0].upper()}{said[1:]}.", [table])


def by_class_part(it: Found) -> Part | None:
    """Accuracy of each class against its training images."""
    if not it.by_class or it.first is None:
        return None
    known = [row[column] for row in it.by_class for column in (RAW, "aligned") if row[column] is not None]
    figures, said = [], []
    for recipe in it.recipes:
        mine = [row for row in it.by_class if row["recipe"] == recipe]
        baseline = [row for row in mine if row["method"] == BASELINE]
        for method in dict.fromkeys(row["method"] for row in mine):
            own = [row for row in mine if row["method"] == method]
            behind = baseline if method != BASELINE else []
            figures.append(plots.by_class(own, behind, lowest=min(known, default=0.0), recipe=recipe, **it.style))
            if recipe == it.first.recipe and method in (it.first.method, BASELINE):
                few, many = plots.ends(own, RAW)
                said.append(f"{method_name(method)} {few:.0f} and {many:.0f} %")
    first = [row for row in it.by_class if all(row[k] == it.by_class[0][k] for k in ("recipe", "method"))]
    says = (
        f"Over the third of the classes with fewest and that with most training images (raw logits, recipe "
        f"{it.first.recipe}): {'; '.join(said)}."
    )
    return Part("Accuracy by class", says, figures=[plots.class_profile(first, dataset=it.dataset), *figures])


def numbers_part(it: Found) -> Part | None:
    """Every measure of every method, recipe and correction."""
    if not it.run:
        return None
    best = max((row.accuracy for row in differences.ranked(it.run)), default=None)
    lines = []
    for row in it.run:
        cells: list[Entry | str] = [
            method_name(row.method), row.recipe, CORRECTIONS[row.correction], seeds_of(row),
            Entry(spread(*row.measures["accuracy"]), leads=row.correction != REBALANCED and row.accuracy == best),
            *(spread(*row.measures[name]) for name in GROUPS), spread(*row.measures["nll"], 1, 3),
            spread(*row.measures["ece"]), spread(*row.best_on_held_out), spread(*row.best_on_test),
        ]  # fmt: skip
        lines.append(cells)
    places = [i for i, name in enumerate(HEADER) if name not in OPTIONAL or any(line[i] != "-" for line in lines)]
    header = [HEADER[i] for i in places]
    reading = f"{READING} {SAME_SUBSET}" + (f" {UNBALANCED}" if any(map(unbalanced, it.run)) else "")
    reading += f" {BEST_ON_TEST}" if "Best on test" in header else ""
    tables = [Table("Every number", header, [[line[i] for i in places] for line in lines], 3, reading), more(it.run)]
    says = f"{len(lines)} rows, corrections included: many, medium and few classes, NLL, ECE, and {len(MORE)} more."
    return Part("Every number", says, tables)


def unbalanced(row: Row) -> bool:
    """Whether the mean over images is another than that over classes."""
    error = row.measures["balanced_error"].mean if row.n else None
    return error is not None and abs(row.accuracy + error - 1) > 1e-5


def more(mine: Sequence[Row]) -> Table:
    """The measures that the first table has no room for."""
    lines = [
        [method_name(row.method), row.recipe, CORRECTIONS[row.correction]]
        + [
            spread(*row.measures[key], 1, 3) if key == "brier" else spread(*row.measures[key]) for key in MORE
        ]
        for row in mine
    ]  # fmt: skip
    return Table("More measures", ["Method", "Recipe", "Correction", *MORE.values()], lines, 3, MORE_READING)


def gradients_part(it: Found) -> Part | None:
    """Gradient ratios, where they were recorded."""
    figures = []
    for recipe in it.recipes:
        ratios = [row for row in it.ratios if row["recipe"] == recipe]
        for method in dict.fromkeys(row["method"] for row in ratios):
            own = [row for row in ratios if row["method"] == method]
            figures.append(plots.gradients(own, recipe=recipe, name=it.names[method]))
    says = "Positive against negative gradients of each class by epoch; balanced is 1."
    return Part("Gradient ratios", says, figures=figures) if figures else None


def computed_part(it: Found) -> Part | None:
    """What computed the cells, as far as they say: one line for all that were computed alike."""
    alike: dict[tuple[str, ...], int] = {}
    for cell, outcome in it.results.cells.items():
        if cell.dataset == it.dataset:
            known = by(outcome.provenance) if outcome.provenance else ["not recorded"] + 4 * ["-"]
            cells = [cell.recipe, *known]
            alike[tuple(cells)] = alike.get(tuple(cells), 0) + 1
    if not alike:
        return None
    lines = [[*cells, str(count)] for cells, count in alike.items()]
    header = ["Recipe", "Precision", "Device", "Kernels", "Threads", "Versions", "Cells"]
    precisions = " and ".join(dict.fromkeys(cells[1] for cells in alike))
    table = Table("What computed the cells", header, lines, 6, COMPUTED_READING)
    return Part("What computed the cells", f"Precision of the training: {precisions}.", [table])


def cells_part(it: Found) -> Part | None:
    """The finished cells, their files and how to make them again; those that are missing."""
    lines = [Line(text) for text in missing(it.results, it.dataset)]
    done = 0
    for cell, outcome in it.results.cells.items():
        if cell.dataset != it.dataset:
            continue
        folder, done = f"cells/{cell.path}", done + 1
        links = ", ".join(f"[{name}]({folder}/{name}.csv)" for name in FILES)
        accuracy, epoch = 100 * outcome.last[RAW]["accuracy"], int(outcome.last["epoch"])
        again = f"dvc repro {cell.address('evaluate')}"
        text = f"[{cell.name}]({folder}/metrics.json): {accuracy:.2f} %, epoch {epoch}; {links}. `{again}`"
        lines.append(Line(text, cell.name))
    says = f"{done} runs, their files, and the command that makes each again"
    waiting = sum(cell.dataset == it.dataset for cell in it.results.missing)
    return Part(
        "Cells", f"{says}; {waiting} have not run yet." if waiting else f"{says}.", lines=lines, note=CELLS_READING
    )


# -------------------------------------------------------------------------------------- parts of parts


def those(it: Found, figures: Sequence[plots.Figure]) -> list[plots.Figure]:
    """The figures; where they leave methods out, their captions say which."""
    if len(it.leading) == len(it.plan["methods"]):
        return list(figures)
    which = LEADING if BASELINE in it.leading else HIGHEST_EIGHT
    return [figure._replace(caption=f"{figure.caption} {which}") for figure in figures]


def seeds_of(row: Row) -> str:
    """`3`, or `1 of 3` where some are missing."""
    return str(row.n) if row.n == row.planned else f"{row.n} of {row.planned}"


def letter(index: int) -> str:
    """a, b, ... z, aa, ab, ..."""
    return (letter(index // 26 - 1) if index > 25 else "") + chr(ord("a") + index % 26)


def footnote(row: Row, theirs: Published) -> str:
    """Where a published number comes from and what to hold against it."""
    source = f"[{theirs.source}]({theirs.url})" if theirs.url else theirs.source
    parts = [*theirs.flags, *([theirs.note] if theirs.note else []), f"source: {source}"]
    corrected = "" if row.correction == RAW else f" {CORRECTIONS[row.correction]}"
    return f"{method_name(row.method)}{corrected}, recipe {row.recipe}: {'; '.join(parts)}."


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
    results, known = read(plan_name, plan, cells_dir, times), read_published(published)
    table = rows(results, beside(plan, known))
    made, out = document(results, table, known), Path(out_dir)
    files.write_text(out / "table.md", markdown(made))
    files.write_text(out / "report.html", html(made))
    files.write_json(out / "summary.json", summary(table))
    files.write_csv(out / "curves.csv", curves(results), CURVES)
    files.write_csv(out / "classes.csv", classes(results), CLASSES)
