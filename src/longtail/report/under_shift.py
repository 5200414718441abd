"""What a plan found under other distributions of the test images: a table and a picture for each data set.

Values are fractions; percent is in text only.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from longtail.report import plots
from longtail.report.answers import spread
from longtail.report.outcomes import ADJUSTED, RAW, Published, Results, mean_and_sd

# (correction, column of distributions.csv) -> what it is called; in published.csv: correction none or known_prior
LINES = {
    (RAW, "accuracy"): "prior unknown",
    (RAW, "known_prior"): "prior known",
    (ADJUSTED, "accuracy"): "logit adjustment, prior unknown",
    (ADJUSTED, "known_prior"): "logit adjustment, prior known",
}
IN_PUBLISHED = {(RAW, "accuracy"): "none", (RAW, "known_prior"): "known_prior"}
ADJUSTED_METHOD = "ce"  # the one whose logits are for the training prior
READING = (
    "Accuracy in percent on test images drawn with the long tail of training (forward), its reverse (backward) or as "
    "many of each class (uniform); the number is the imbalance. Mean over draws of images and over training seeds. "
    "'Prior known' adds the logarithm of the true class frequencies to the logits, which are taken to be for a uniform "
    "prior: it needs the test prior. In brackets what was published."
)


class Row(NamedTuple):
    """A recipe, a method, a line and a distribution of `images` test images: accuracy over seeds."""

    recipe: str
    method: str
    correction: str
    column: str
    line: str
    distribution: str
    images: int
    mean: float | None
    sd: float | None


class Shifted(NamedTuple):
    """The table in text, and the published rows that stand in it."""

    header: list[str]
    lines: list[list[str]]
    quoted: list[Published]


def rows(results: Results, dataset: str) -> list[Row]:
    """One row for each recipe x method x line x distribution."""
    table = []
    for (name, recipe, method), cells in results.groups():
        if name != dataset:
            continue
        for (correction, column), line in LINES.items():
            if correction == ADJUSTED and method != ADJUSTED_METHOD:
                continue
            values: dict[str, list[float]] = {}
            images: dict[str, int] = {}
            for cell in cells.values():
                for row in cell.distributions:
                    if row["correction"] == correction and row[column] is not None:
                        values.setdefault(row["distribution"], []).append(row[column])
                        images[row["distribution"]] = int(row["images"])
            for distribution, found in values.items():
                about = (recipe, method, correction, column, line, distribution, images[distribution])
                table.append(Row(*about, *mean_and_sd(found)))
    return table


def table(found: Sequence[Row], published: Sequence[Published], names: Mapping[str, str]) -> Shifted:
    """Distributions of a data set side by side, a line for each recipe x method x line; `published` is of it, too."""
    known = {(one.recipe, one.method, one.correction, one.group): one for one in published if one.measure == "accuracy"}
    distributions = list(dict.fromkeys(row.distribution for row in found))
    by_line: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in found:
        by_line.setdefault((row.recipe, row.method, row.line), {})[row.distribution] = row
    lines, quoted = [], []
    for (recipe, method, line), by_distribution in by_line.items():
        cells = [names[method], recipe, line]
        for distribution in distributions:
            row = by_distribution[distribution]
            text = spread(row.mean, row.sd)
            correction = IN_PUBLISHED.get((row.correction, row.column), "")
            if theirs := known.get((recipe, method, correction, distribution)):
                text += f" ({100 * theirs.value:.1f})"
                quoted.append(theirs)
            cells.append(text)
        lines.append(cells)
    return Shifted(["Method", "Recipe", "Test prior", *distributions], lines, quoted)


def figures(found: Sequence[Row], style: Mapping[str, Any]) -> list[plots.Figure]:
    """A picture for each recipe."""
    return [
        plots.under_shift([row._asdict() for row in found if row.recipe == recipe], recipe=recipe, **style)
        for recipe in dict.fromkeys(row.recipe for row in found)
    ]
