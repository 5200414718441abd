"""How sure a difference of two accuracies is: over test images and over training seeds, paired where it can be.

Two methods see the same test images, so their difference is taken image by image: what is hard for both cancels. The
seeds of a method are other trainings of it: their spread says how far another training would have come out. `judged` is
the one rule for all that the report says of a difference; docs/measures.md has it in words.

S, T seeds; N test images. Values are fractions; percent and points are in text only.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from longtail.report.outcomes import CORRECTIONS, RAW, REBALANCED, Results, Row

CONFIDENCE = 0.95
BASELINE = "ce"
HEADER = ("Method", "Recipe", "Correction", "Seeds", "All", "Images", "Against cross-entropy", "Against the highest",
          "p", "Verdict")  # fmt: skip
READING = (
    "Differences in points, in brackets the 95 % interval. Two accuracies are compared image by image on the same test "
    "images, and by the spread over seeds, of each recipe its own, pooled over its methods (of two that are made of "
    "the same trainings, as two corrections are: the spread of their difference); Student's t, Welch and "
    "Satterthwaite's degrees of freedom. p is for the difference to the highest of the recipe, by Holm's method for "
    "all its rows together. The highest was found on these test images, which flatters it a little. Where one of the "
    "two has one seed, the interval is over images alone, and a difference holds for these networks, not for methods. "
    "'Images': standard error over test images of one network, in points, by bootstrap."
)


class Spread(NamedTuple):
    """A variance of accuracy, and its degrees of freedom."""

    variance: float
    df: int

    def of_means(self, *seeds: int) -> "Spread":
        """Of a difference of means over so many seeds each."""
        return Spread(self.variance * sum(1 / n for n in seeds), self.df)


class Difference(NamedTuple):
    """Of two mean accuracies: the difference, its interval, two-sided p; `seeds`: whether it holds for other seeds."""

    value: float
    low: float
    high: float
    p: float
    seeds: bool

    @property
    def settled(self) -> bool:
        """Whether p allows to say which is higher; where p is not adjusted, whether the interval is without 0."""
        return self.p <= 1 - CONFIDENCE

    @property
    def over(self) -> str:
        """What the interval covers."""
        return "test images and seeds" if self.seeds else "test images alone"

    def swapped(self) -> "Difference":
        """The second minus the first."""
        return self._replace(value=-self.value, low=-self.high, high=-self.low)

    def said(self, above: str, unsettled: str, below: str) -> str:
        """The word for it, with what it holds for: `higher`, or `higher, these networks`."""
        if not self.settled:
            return unsettled
        word = above if self.value > 0 else below
        return word if self.seeds else f"{word}, these networks"


def judged(value: float, parts: Sequence[Spread], *, seeds: bool) -> Difference:
    """A difference with its interval and p: Student's t, with Welch and Satterthwaite's degrees of freedom.

    Args:
        value: the difference.
        parts: what its variance adds up from: over test images, over each side's seeds.
        seeds: whether the seeds of both sides are among the parts.
    """
    total = sum(part.variance for part in parts)
    if total == 0:  # the same predictions
        return Difference(value, value, value, 1.0 if value == 0 else 0.0, seeds)
    freedom = total**2 / sum(part.variance**2 / part.df for part in parts)
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(total)
    p = 2 * float(stdtr(freedom, -abs(value) / math.sqrt(total)))
    return Difference(value, value - half, value + half, p, seeds)


def pooled(groups: Sequence[Sequence[float]]) -> Spread | None:
    """The accuracies of each method's seeds, pooled with equal variances assumed; None when nobody has two seeds."""
    df = sum(len(values) - 1 for values in groups if len(values))
    if not df:
        return None
    squares = sum(float(np.square(np.subtract(values, np.mean(values))).sum()) for values in groups if len(values))
    return Spread(squares / df, df)


def difference(a_SN: np.ndarray, b_TN: np.ndarray, seeds: Sequence[Spread] = ()) -> Difference:
    """Mean accuracy of `a` minus that of `b`, both True where an image is recognised.

    Its variance is that over images of the difference of an image (mean over seeds), plus that over `seeds`; empty
    where one of the two has one seed. What varies with both is counted twice, so the interval is a little too wide
    rather than too narrow. For one network each, this is McNemar's test with Student's t in place of the binomial.

    Raises ValueError when the images are not the same.
    """
    if a_SN.shape[1] != b_TN.shape[1]:
        raise ValueError(f"(seeds, images) are {a_SN.shape} and {b_TN.shape}: nothing to pair")
    each_N = a_SN.mean(0) - b_TN.mean(0)
    return judged(float(each_N.mean()), [over_images(each_N), *seeds], seeds=bool(seeds))


def over_images(each_N: np.ndarray) -> Spread:
    """Of the mean of a value that each image has."""
    return Spread(float(each_N.var(ddof=1)) / len(each_N), len(each_N) - 1)


def of_corrections(a_SN: np.ndarray, b_SN: np.ndarray) -> list[Spread]:
    """Over the seeds of two things made of the same trainings: of their own differences; none for one seed.

    Raises ValueError when there are not as many.
    """
    if len(a_SN) != len(b_SN):
        raise ValueError(f"(seeds, images) are {a_SN.shape} and {b_SN.shape}: nothing to pair")
    own = pooled([a_SN.mean(1) - b_SN.mean(1)])
    return [own.of_means(len(a_SN))] if own else []


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order of the given ones."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = highest
    return adjusted


# ---------------------------------------------------------------------------------------------- of a plan


def spread(results: Results, dataset: str, recipe: str) -> Spread | None:
    """Over the seeds of a recipe: of its raw logits' accuracies, pooled over its methods."""
    return pooled(
        [
            [cell.last[RAW]["accuracy"] for cell in cells.values()]
            for (*where, _), cells in results.groups()
            if where == [dataset, recipe]
        ]
    )


def over_seeds(results: Results, *rows: Row) -> list[Spread]:
    """What the seeds of rows of different networks add, for each recipe its own; none where a row has one seed."""
    if any(row.n < 2 for row in rows):
        return []
    seeds: dict[str, list[int]] = {}
    for row in rows:
        seeds.setdefault(row.recipe, []).append(row.n)
    own = {recipe: spread(results, rows[0].dataset, recipe) for recipe in seeds}
    return [found.of_means(*seeds[recipe]) for recipe, found in own.items() if found]


def compared(results: Results, a: Row, b: Row) -> Difference:
    """The difference of two rows of longtail.report.outcomes.rows, of one data set."""
    a_SN, b_TN = _right(results, a), _right(results, b)
    paired = same_trainings(results, a, b)
    return difference(a_SN, b_TN, of_corrections(a_SN, b_TN) if paired else over_seeds(results, a, b))


def same_trainings(results: Results, a: Row, b: Row) -> bool:
    """Whether seed for seed the rows are of the same trainings: two corrections of a method's networks; another head on
    its features; its experts looking at mirrored images too. What a cell's files say of its trainings decides.
    """
    if (a.recipe, a.method) == (b.recipe, b.method):
        return True
    mine, theirs = (
        [
            [step.get("first_epoch") for step in outcome.provenance if step["step"] == "train"]
            for outcome in results.of(row)
        ]
        for row in (a, b)
    )
    return a.seeds == b.seeds and mine == theirs and all(each and all(each) for each in mine)


def to_published(results: Results, row: Row) -> Difference | None:
    """A row minus its published accuracy, with the spread of their runs where it is known; None where there is none."""
    if not row.n or row.published is None:
        return None
    each_N = _right(results, row).mean(0) - row.published.value
    ours, theirs = over_seeds(results, row), []
    if row.published.sd is not None:
        runs = int(row.published.runs or 2)  # a deviation takes two
        theirs = [Spread(row.published.sd**2, runs - 1).of_means(runs)]
    return judged(float(each_N.mean()), [over_images(each_N), *ours, *theirs], seeds=bool(ours and theirs))


def _right(results: Results, row: Row) -> np.ndarray:
    return np.stack([outcome.right[row.correction] for outcome in results.of(row)])


def ranked(rows: Sequence[Row]) -> list[Row]:
    """The rows that can win, the highest first: those that need no test images; ties in their order."""
    return sorted((row for row in rows if row.n and row.correction != REBALANCED), key=lambda row: -row.accuracy)


def behind(results: Results, rows: Sequence[Row]) -> list[Difference]:
    """Each row after the first minus the first, with p by Holm's method for all of them together."""
    found = [compared(results, row, rows[0]) for row in rows[1:]]
    return [one._replace(p=p) for one, p in zip(found, holm([one.p for one in found]), strict=True)]


class Line(NamedTuple):
    """A row of the table and how sure it is.

    `to_best` is to the highest of the recipe, None in that; `to_baseline` is to the raw logits of cross-entropy with
    the same recipe, None there and where it has not run.
    """

    row: Row
    to_best: Difference | None
    to_baseline: Difference | None


def lines(results: Results, table: Sequence[Row]) -> list[Line]:
    """Of the rows of a data set: for each recipe its rows, highest first."""
    found = []
    for recipe in dict.fromkeys(row.recipe for row in table):
        rows = ranked([row for row in table if row.recipe == recipe])
        baseline = next((row for row in rows if (row.method, row.correction) == (BASELINE, RAW)), None)
        for row, to_best in zip(rows, [None, *behind(results, rows)], strict=False):
            bought = None if baseline is None or row is baseline else compared(results, row, baseline)
            found.append(Line(row, to_best, bought))
    return found


def interval(one: Difference | None) -> str:
    """`+1.2 (-0.3 to +2.7)` in points; a dash for nothing."""
    if one is None:
        return "-"
    return f"{points(one.value)} ({points(one.low)} to {points(one.high)})"


def points(fraction: float) -> str:
    """A difference in points, with its sign; what rounds to zero has none."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("-0.0", "+0.0") else text


def points_range(fractions: Iterable[float]) -> str:
    """`-0.2 to +1.3 points`; `+2.0 points` where all are the same to a tenth."""
    values = list(fractions)
    low, high = points(min(values)), points(max(values))
    return f"{low} points" if low == high else f"{low} to {high} points"


def unsigned(fraction: float) -> str:
    """An end of an interval in points: a minus where it is below zero, no plus."""
    return points(fraction).removeprefix("+")


def probability(p: float) -> str:
    """p to two figures."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def texts(found: Sequence[Line], names: Mapping[str, str]) -> list[list[str]]:
    """Cells of text, with the columns HEADER."""
    return [
        [
            names[row.method], row.recipe, CORRECTIONS[row.correction], str(row.n), f"{100 * row.accuracy:.1f}",
            f"{100 * row.se_images['accuracy']:.1f}", interval(to_baseline), interval(to_best),
            *(("-", "highest") if to_best is None else
              (probability(to_best.p), to_best.said("ahead", "not settled", "behind"))),
        ]
        for row, to_best, to_baseline in found
    ]  # fmt: skip
