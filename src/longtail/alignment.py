"""Energy aligning (Zhao et al. 2021, arXiv:2106.03343): shift each class's logit so that free energies are equal.

With E(x, y) = -z_y(x), the free energy of class y over samples S with weights w (summing to one) is

    F(y) = -T log( sum over x in S of w(x) exp(z_y(x) / T) )

and p(y) is proportional to exp(-F(y) / T): under a uniform prior all F are equal, and adding s_y to logit y turns F(y)
into F(y) - s_y. So   s_y = F(y) - mean of F.   The paper states the idea; its formula is not public, hence `reading`.

`weights: balanced` gives every class of S the same weight, so that a network which is balanced already is not shifted
for the long tail of S; `uniform` gives every sample the same, so that a calibrated network's shift is -log prior of S.

N samples, C classes; logits, energies and shifts share one unit (nats times T).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import log_softmax, logsumexp

# (logits (N, C), labels (N,), weights (N,), temperature) -> energies (C,)
Reading = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]


def all_samples(logits_NC: np.ndarray, labels_N: np.ndarray, weights_N: np.ndarray, t: float) -> np.ndarray:
    """S = every sample, each class's logit on all of them."""
    return -t * logsumexp(logits_NC / t, axis=0, b=weights_N[:, None])


def own_samples(logits_NC: np.ndarray, labels_N: np.ndarray, weights_N: np.ndarray, t: float) -> np.ndarray:
    """S = the samples of class y."""
    energies = [
        -t * (logsumexp(own_N / t) - np.log(len(own_N)))
        for own_N in (logits_NC[labels_N == c, c] for c in range(logits_NC.shape[1]))
    ]
    return np.array(energies)


def mean_energy(logits_NC: np.ndarray, labels_N: np.ndarray, weights_N: np.ndarray, t: float) -> np.ndarray:
    """F(y) = minus the mean logit over S: the limit of all_samples for high temperature."""
    return -weights_N @ logits_NC


def normalized(logits_NC: np.ndarray, labels_N: np.ndarray, weights_N: np.ndarray, t: float) -> np.ndarray:
    """all_samples of log p(y|x): invariant to what is added to all logits of a sample."""
    return t * all_samples(log_softmax(logits_NC / t, axis=1), labels_N, weights_N, 1.0)


READINGS: dict[str, Reading] = {
    "all_samples": all_samples,
    "own_samples": own_samples,
    "mean_energy": mean_energy,
    "normalized": normalized,
}
WEIGHTS = ("balanced", "uniform")


def sample_weights(labels_N: np.ndarray, weights: str) -> np.ndarray:
    """Weights (N,) that sum to one: the same for every sample, or for every class that occurs."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r}; allowed are {', '.join(WEIGHTS)}")
    if weights == "uniform":
        return np.full(len(labels_N), 1 / len(labels_N))
    _, index_N, counts = np.unique(labels_N, return_inverse=True, return_counts=True)
    return 1 / (len(counts) * counts[index_N])


def check(logits_NC: np.ndarray, labels_N: np.ndarray) -> None:
    """Raise ValueError, naming what and where, unless there are finite logits (N, C) and labels (N,) in 0 ... C-1."""
    if logits_NC.ndim != 2 or 0 in logits_NC.shape:
        raise ValueError(f"logits have shape {logits_NC.shape}; expected (samples, classes), neither of them 0")
    if labels_N.shape != logits_NC.shape[:1]:
        raise ValueError(
            f"labels have shape {labels_N.shape}; expected ({len(logits_NC)},) as logits have that many rows"
        )
    bad = np.argwhere(~np.isfinite(logits_NC))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"{len(bad)} logit(s) are not finite, first at row {row}, class {column}: {logits_NC[row, column]}"
        )
    outside = np.flatnonzero((labels_N < 0) | (labels_N >= logits_NC.shape[1]))
    if len(outside):
        row = outside[0]
        raise ValueError(f"label {labels_N[row]} in row {row}; allowed are 0 to {logits_NC.shape[1] - 1}")


def free_energy(
    logits_NC: np.ndarray, labels_N: np.ndarray, *, reading: str, weights: str, temperature: float
) -> np.ndarray:
    """The free energy (C,) of each class, in float64.

    Raises ValueError for logits or labels that `check` refuses, for an unknown reading, and for a class without a
    sample where the reading needs one.
    """
    check(logits_NC, labels_N)
    if reading not in READINGS:
        raise ValueError(f"reading {reading!r}; allowed are {', '.join(READINGS)}")
    if reading == "own_samples":
        missing = np.flatnonzero(np.bincount(labels_N, minlength=logits_NC.shape[1]) == 0)
        if len(missing):
            raise ValueError(f"own_samples needs a sample of every class; class {missing[0]} has none")
    weights_N = sample_weights(labels_N, weights)
    return READINGS[reading](logits_NC.astype(np.float64), labels_N, weights_N, temperature)


def fit(
    logits_NC: np.ndarray,
    labels_N: np.ndarray,
    *,
    reading: str,
    weights: str,
    temperature: float,
    strength: float,
) -> dict[str, np.ndarray]:
    """Energies before and after, and the shift = strength * (F - mean F) to add to the logits, each (C,)."""
    facts: dict[str, Any] = {"reading": reading, "weights": weights, "temperature": temperature}
    energy_C = free_energy(logits_NC, labels_N, **facts)
    shift_C = strength * (energy_C - energy_C.mean())
    return {
        "energy": energy_C,
        "energy_after": free_energy(logits_NC + shift_C, labels_N, **facts),
        "shift": shift_C,
    }
