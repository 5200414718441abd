"""Test sets with other class distributions, drawn from a balanced one (LADE, CVPR 2021; BalPoE, CVPR 2023, Table 3).

forward<r> has the long tail of training, with imbalance r; backward<r> has it the other way round; uniform has as many
images of each class: it is the test set itself where that is balanced. A class cannot have less than one image, so that
an imbalance above the images of the smallest class is left out. The frequencies of a draw are fixed, its images are
random: several draws show how much that matters.

N samples, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from longtail import posthoc

COLUMNS = ("distribution", "images", "correction", "accuracy", "accuracy_sd", "known_prior", "known_prior_sd")


def names(ratios: Sequence[int], per_class: int) -> list[str]:
    """The distributions from the most forward to the most backward: those that so many images of a class allow."""
    falling = sorted((ratio for ratio in ratios if ratio <= per_class), reverse=True)
    return [*(f"forward{r}" for r in falling), "uniform", *(f"backward{r}" for r in reversed(falling))]


def frequencies(name: str, class_counts_C: np.ndarray, per_class: int) -> np.ndarray:
    """Images of each class (C,): int(per_class * (1 / r) ** (place / (C - 1))), at least 1.

    The place of a class is its rank by training images, most first; for backward, fewest first.
    """
    classes = len(class_counts_C)
    if name == "uniform":
        return np.full(classes, per_class)
    ratio = int(name.removeprefix("forward").removeprefix("backward"))
    by_rank = [max(1, int(per_class * (1 / ratio) ** (place / max(1, classes - 1)))) for place in range(classes)]
    order_C = np.argsort(-class_counts_C, kind="stable")
    found_C = np.empty(classes, dtype=int)
    found_C[order_C if name.startswith("forward") else order_C[::-1]] = by_rank
    return found_C


def draw(labels_N: np.ndarray, frequencies_C: np.ndarray, seed: int) -> np.ndarray:
    """Rows of a random choice of so many images of each class."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [rng.permutation(np.flatnonzero(labels_N == c))[:wanted] for c, wanted in enumerate(frequencies_C)]
    )


def evaluate(
    versions: Mapping[str, np.ndarray],
    labels_N: np.ndarray,
    class_counts_C: np.ndarray,
    *,
    ratios: Sequence[int],
    draws: int,
    transductive: Mapping[str, posthoc.Correction],
) -> list[dict[str, Any]]:
    """Accuracy (all images of a draw) under each distribution: a row for each of them and each version of the logits.

    Args:
        versions: logits (N, C) by name, `raw` among them.
        ratios, draws: of the distributions, and of random choices of images for each.
        transductive: corrections that are fitted anew on the raw logits of each draw.

    `accuracy` is that of the logits as they are, whoever uses them not knowing the distribution; `known_prior` that
    after adding log frequencies to them, as if they were for a uniform prior (posthoc.KnownPrior). Means and sample
    standard deviations over draws; none of the latter for `uniform`, which has one draw.
    """
    per_class = int(np.bincount(labels_N, minlength=len(class_counts_C)).min())
    rows = []
    for name in names(ratios, per_class):
        wanted_C = frequencies(name, class_counts_C, per_class)
        chosen = [draw(labels_N, wanted_C, seed) for seed in range(1 if name == "uniform" else draws)]
        for correction, logits_NC in versions.items():
            known_NC = posthoc.KnownPrior(wanted_C).fit(logits_NC).transform(logits_NC)
            right_N, known_N = logits_NC.argmax(1) == labels_N, known_NC.argmax(1) == labels_N
            rows.append(
                {"distribution": name, "images": int(wanted_C.sum()), "correction": correction}
                | _mean_and_sd("accuracy", [right_N[some].mean() for some in chosen])
                | _mean_and_sd("known_prior", [known_N[some].mean() for some in chosen])
            )
        for correction, made in transductive.items():
            scores = []
            for some in chosen:
                logits_MC = versions["raw"][some]
                predicted_M = made.fit(logits_MC, fitted_on="test").predict(logits_MC)
                scores.append((predicted_M == labels_N[some]).mean())
            row = {"distribution": name, "images": int(wanted_C.sum()), "correction": correction}
            rows.append(row | _mean_and_sd("accuracy", scores) | {"known_prior": None, "known_prior_sd": None})
    return rows


def _mean_and_sd(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {name: float(np.mean(values)), f"{name}_sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}
