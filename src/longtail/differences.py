"""How sure a difference of two accuracies is: over test images and over training seeds, paired where it can be.

Two methods see the same test images, so their difference is taken image by image: what is hard for both cancels. The
seeds of a method are other trainings of it: their spread says how far another training would have come out.

S, T seeds; N test images. Values are fractions; percent and points are in text only.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from longtail.outcomes import CORRECTIONS, RAW, REBALANCED, Results, Row

CONFIDENCE = 0.95
BASELINE = "ce"
READING = (
    "Differences in points, in brackets the 95 % interval. Two accuracies are compared image by image on the same test "
    "images, and by the spread over seeds, pooled over the methods of a recipe (of two corrections of one method's "
    "networks: the spread of their difference); Student's t with Welch and Satterthwaite's degrees of freedom. p is "
    "for the difference to the highest of the recipe, by Holm's method for all its rows together. The highest was "
    "found on these test images, which flatters it a little. With one seed a difference holds for these networks, not "
    "for methods. 'Images': standard error over test images of one network, in points, by bootstrap."
)


class Spread(NamedTuple):
    """Variance of accuracy over seeds, pooled over methods, and its degrees of freedom."""

    variance: float
    df: int


class Difference(NamedTuple):
    """Of two mean accuracies: the difference, its interval, two-sided p; `seeds`: whether it holds for other seeds."""

    value: float
    low: float
    high: float
    p: float
    seeds: bool


def pooled(groups: Sequence[Sequence[float]]) -> Spread | None:
    """The accuracies of each method's seeds, pooled with equal variances assumed; None when nobody has two seeds."""
    df = sum(len(values) - 1 for values in groups if len(values))
    if not df:
        return None
    squares = sum(float(np.square(np.subtract(values, np.mean(values))).sum()) for values in groups if len(values))
    return Spread(squares / df, df)


def difference(a_SN: np.ndarray, b_TN: np.ndarray, spread: Spread | None, *, same_networks: bool = False) -> Difference:
    """Mean accuracy of `a` minus that of `b`, both True where an image is recognised.

    Its variance is that over images of the difference of an image (mean over seeds), plus that over seeds: `spread`,
    or, for two corrections of `same_networks`, that of the seeds' own differences. What varies with both is counted
    twice, so the interval is a little too wide rather than too narrow. For one network each, this is McNemar's test
    with the normal distribution in place of the binomial.

    Raises ValueError when the images, or the seeds of the same networks, are not the same.
    """
    if a_SN.shape[1] != b_TN.shape[1] or (same_networks and len(a_SN) != len(b_TN)):
        raise ValueError(f"(seeds, images) are {a_SN.shape} and {b_TN.shape}: nothing to pair")
    each_N = a_SN.mean(0) - b_TN.mean(0)
    value, images = float(each_N.mean()), float(each_N.var(ddof=1)) / len(each_N)
    if same_networks:
        each_S = a_SN.mean(1) - b_TN.mean(1)
        seeds, df = (float(each_S.var(ddof=1)) / len(each_S), len(each_S) - 1) if len(each_S) > 1 else (0.0, 0)
    else:
        seeds, df = (spread.variance * (1 / len(a_SN) + 1 / len(b_TN)), spread.df) if spread else (0.0, 0)
    total = images + seeds
    if total == 0:  # the same predictions
        return Difference(value, value, value, 1.0 if value == 0 else 0.0, df > 0)
    freedom = total**2 / (images**2 / (len(each_N) - 1) + (seeds**2 / df if df else 0))
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(total)
    p = 2 * float(stdtr(freedom, -abs(value) / math.sqrt(total)))
    return Difference(value, value - half, value + half, p, df > 0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order of the given ones."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = highest
    return adjusted


# ---------------------------------------------------------------------------------------------- of a plan


def compared(results: Results, a: Row, b: Row, spread: Spread | None) -> Difference:
    """The difference of two rows of longtail.outcomes.rows."""
    same = all(a[key] == b[key] for key in ("dataset", "recipe", "method"))
    return difference(_right(results, a), _right(results, b), spread, same_networks=same)


def _right(results: Results, row: Row) -> np.ndarray:
    keys = [(row["dataset"], row["recipe"], row["method"], seed) for seed in row["seeds"]]
    return np.stack([results.cells[key].right[row["correction"]] for key in keys])


def ranked(table: Sequence[Row], dataset: str, recipe: str) -> list[Row]:
    """The rows of a recipe that can win, the highest first: those that need no test images; ties in their order."""
    rows = [row for row in table if (row["dataset"], row["recipe"]) == (dataset, recipe)]
    return sorted((row for row in rows if row["n"] and row["correction"] != REBALANCED), key=_by_accuracy)


def _by_accuracy(row: Row) -> float:
    return -row["accuracy_mean"]


def spread_of(rows: Sequence[Row]) -> Spread | None:
    """Pooled over the raw rows, which are of different networks."""
    return pooled([row["accuracies"] for row in rows if row["correction"] == RAW])


def lines(results: Results, table: Sequence[Row], dataset: str) -> list[Row]:
    """For each recipe its rows, highest first: the row's own columns, and two differences.

    `to_best` and its Holm-adjusted `p` are None in the first row; `to_baseline` is against the raw logits of
    cross-entropy with the same recipe, None there and where it has not run.
    """
    found = []
    for recipe in dict.fromkeys(row["recipe"] for row in table if row["dataset"] == dataset):
        rows = ranked(table, dataset, recipe)
        if not rows:
            continue
        spread = spread_of(rows)
        baseline = next((row for row in rows if (row["method"], row["correction"]) == (BASELINE, RAW)), None)
        behind = [compared(results, row, rows[0], spread) for row in rows[1:]]
        adjusted = [None, *holm([one.p for one in behind])]
        for row, to_best, p in zip(rows, [None, *behind], adjusted, strict=True):
            bought = None if baseline is None or row is baseline else compared(results, row, baseline, spread)
            found.append(row | {"to_best": to_best, "p": p, "to_baseline": bought})
    return found


def verdict(to_best: Difference | None, p: float | None) -> str:
    """What the numbers settle, in a few words."""
    if to_best is None or p is None:
        return "highest"
    if p > 1 - CONFIDENCE:
        return "not settled"
    return "behind" if to_best.seeds else "behind, these networks"


def interval(one: Difference | None) -> str:
    """`+1.2 (-0.3 to +2.7)` in points; a dash for nothing."""
    if one is None:
        return "-"
    return f"{points(one.value)} ({points(one.low)} to {points(one.high)})"


def points(fraction: float) -> str:
    """A difference in points, with its sign; what rounds to zero has none."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("-0.0", "+0.0") else text


def probability(p: float | None) -> str:
    """p to two figures; a dash for nothing."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def texts(found: Sequence[Row], names: Mapping[str, str]) -> dict[str, list[Any]]:
    """`header` and `lines` of text."""
    header = ["Recipe", "Method", "Correction", "Seeds", "All", "Images", "Against cross-entropy",
              "Against the highest", "p", "Verdict"]  # fmt: skip
    return {
        "header": header,
        "lines": [
            [
                row["recipe"], names[row["method"]], CORRECTIONS[row["correction"]], str(row["n"]),
                f"{100 * row['accuracy_mean']:.1f}", f"{100 * row['accuracy_se_images']:.1f}",
                interval(row["to_baseline"]), interval(row["to_best"]), probability(row["p"]),
                verdict(row["to_best"], row["p"]),
            ]
            for row in found
        ],
    }  # fmt: skip
