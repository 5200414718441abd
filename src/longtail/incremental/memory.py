"""Which images of a class are kept: a pure function of what is given, so that a step can be done again.

Exemplars have ranks: a smaller memory keeps the first ones (Rebuffi et al., CVPR 2017, algorithm 5).
"""

from collections.abc import Callable

import numpy as np


def normalised(features_ND: np.ndarray) -> np.ndarray:
    """Features of length one, in float64."""
    features_ND = features_ND.astype(np.float64)
    return features_ND / np.maximum(np.linalg.norm(features_ND, axis=1, keepdims=True), 1e-12)


def herding(features_ND: np.ndarray, count: int) -> np.ndarray:
    """The rows whose running mean stays closest to the class mean (iCaRL, algorithm 4), first the most important.

        p_k = argmin over x not yet taken of | mean - (x + p_1 + ... + p_{k-1}) / k |

    Args:
        features_ND: of one class; normalise them first, as iCaRL does, or not, as BiC.
    """
    features_ND = features_ND.astype(np.float64)
    mean_D, total_D = features_ND.mean(0), np.zeros(features_ND.shape[1])
    left = np.ones(len(features_ND), dtype=bool)
    taken = []
    for k in range(1, min(count, len(features_ND)) + 1):
        distance_N = ((mean_D - (features_ND + total_D) / k) ** 2).sum(1)
        taken.append(int(np.where(left, distance_N, np.inf).argmin()))
        left[taken[-1]] = False
        total_D += features_ND[taken[-1]]
    return np.array(taken, dtype=np.int64)


def herding_released(features_ND: np.ndarray, count: int) -> np.ndarray:
    """Herding as iCaRL's released code has it: w <- w + mean - x, the largest w . x next.

    A row that comes again is skipped, though w moves; after 1,000 rounds the rest is filled with the rows closest to
    the mean. Not the paper's: of 200 exemplars about half are others.
    """
    features_ND = features_ND.astype(np.float64)
    count = min(count, len(features_ND))
    mean_D = features_ND.mean(0)
    w_D, taken = mean_D.copy(), dict[int, None]()
    for _ in range(1000):
        if len(taken) == count:
            break
        best = int((features_ND @ w_D).argmax())
        taken.setdefault(best)
        w_D = w_D + mean_D - features_ND[best]
    closest = np.argsort(-(features_ND @ mean_D), kind="stable")
    return np.array([*taken, *(row for row in closest.tolist() if row not in taken)][:count], dtype=np.int64)


def select(features_ND: np.ndarray, count: int, *, way: str, generator: np.random.Generator) -> np.ndarray:
    """The ranks of one class's rows, `count` of them or as many as there are, by one of SELECTIONS."""
    if way == "random":
        return generator.permutation(len(features_ND))[:count]
    return SELECTIONS[way](features_ND, count)


SELECTIONS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "herding": lambda features_ND, count: herding(normalised(features_ND), count),
    "herding_released": lambda features_ND, count: herding_released(normalised(features_ND), count),
    "herding_raw": herding,
}
