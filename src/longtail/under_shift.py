"""What a plan found under other distributions of the test images: a table and a picture for each data set.

Values are fractions; percent is in text only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from longtail import plots
from longtail.outcomes import ADJUSTED, RAW, Results, Row, mean_and_sd

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
    "they are (uniform); the number is the imbalance. Mean over draws of images and over training seeds. 'Prior known' "
    "adds the logarithm of the true class frequencies to the logits, which are taken to be for a uniform prior: it "
    "needs the test prior. In brackets what was published."
)


def rows(results: Results, dataset: str) -> list[Row]:
    """One row for each recipe x method x line x distribution: mean and sd over seeds, and the number of images."""
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
                mean, sd = mean_and_sd(found)
                table.append(
                    {"recipe": recipe, "method": method, "correction": correction, "column": column, "line": line,
                     "distribution": distribution, "images": images[distribution], "mean": mean, "sd": sd}
                )  # fmt: skip
    return table


def table(
    found: Sequence[Row], published: Sequence[Row], dataset: str, names: Mapping[str, str]
) -> dict[str, list[Any]]:
    """`header` and `lines` of text, and `quoted`: the published rows that stand in it."""
    known = {
        (row["recipe"], row["method"], row["correction"], row["group"]): row
        for row in published
        if (row["dataset"], row["measure"]) == (dataset, "accuracy")
    }
    distributions = list(dict.fromkeys(row["distribution"] for row in found))
    lines, quoted = [], []
    for recipe, method, line in dict.fromkeys((row["recipe"], row["method"], row["line"]) for row in found):
        cells = [recipe, names[method], line]
        for distribution in distributions:
            (row,) = (
                row for row in found
                if (row["recipe"], row["method"], row["line"], row["distribution"])
                == (recipe, method, line, distribution)
            )  # fmt: skip
            text = f"{100 * row['mean']:.1f}" + (f" ± {100 * row['sd']:.1f}" if row["sd"] is not None else "")
            correction = IN_PUBLISHED.get((row["correction"], row["column"]))
            theirs = known.get((recipe, method, correction, distribution))
            if theirs is not None:
                text += f" ({100 * theirs['value']:.1f})"
                quoted.append(theirs)
            cells.append(text)
        lines.append(cells)
    return {"header": ["Recipe", "Method", "Test prior", *distributions], "lines": lines, "quoted": quoted}


def figures(found: Sequence[Row], style: Mapping[str, Any]) -> list[plots.Figure]:
    """A picture for each recipe."""
    return [
        plots.under_shift([row for row in found if row["recipe"] == recipe], recipe=recipe, **style)
        for recipe in dict.fromkeys(row["recipe"] for row in found)
    ]
