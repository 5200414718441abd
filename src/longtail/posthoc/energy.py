"""Energy aligning (arXiv, see docs/methods.md): the readings of the paper's energy, and the estimator."""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax

from longtail.posthoc.correction import Correction
from longtail.posthoc.inputs import (
    LOST,
    as_labels,
    as_numpy,
    check,
    counts_of,
    number,
    open_classes,
    slices,
    without_masked,
)

# (logits, labels, weights (N,), temperature) -> energies (C,) in float64
Reading = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]


def all_samples(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, t: float) -> np.ndarray:
    """Each class's logit on every sample."""
    highest = np.full(logits.shape[1], -np.inf)
    total = np.zeros(logits.shape[1])
    for where, part in slices(logits):
        before, highest = highest, np.maximum(highest, part.max(0))
        with np.errstate(over="ignore"):
            total *= np.exp((before - highest) / t)
        terms = np.exp((part - highest.astype(part.dtype)) / part.dtype.type(t))
        total += weights[where].astype(part.dtype) @ terms
    return -highest - t * np.log(total)


def own_samples(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, t: float) -> np.ndarray:
    """Each class's logit on the samples of that class."""
    counts = counts_of(labels, logits.shape[1], "own_samples")
    own = logits[np.arange(len(labels)), labels].astype(np.float64) / t
    highest = np.full(len(counts), -np.inf)
    np.maximum.at(highest, labels, own)
    total = np.bincount(labels, np.exp(own - highest[labels]), len(counts))
    return -t * (highest + np.log(total / counts))


def mean_energy(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, t: float) -> np.ndarray:
    """Minus each class's mean logit: `all_samples` at a high temperature.

    Raises ValueError for a class that is masked in some samples only.
    """
    if logits.min() < LOST:
        row, column = np.argwhere(logits < LOST)[0]
        raise ValueError(
            f"mean_energy: class {column} of those that are not masked everywhere is masked in row {row}: no mean"
        )
    return -sum(weights[where] @ part for where, part in slices(logits))


def normalized(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, t: float) -> np.ndarray:
    """`all_samples` of log p(y|x): whatever is added to all logits of a sample changes nothing."""
    total = np.zeros(logits.shape[1])
    for where, part in slices(logits):
        terms = np.exp((part - part.max(1, keepdims=True)) / part.dtype.type(t))
        total += (weights[where] / terms.sum(1, dtype=np.float64)).astype(part.dtype) @ terms
    lost = np.flatnonzero(total < 1e-30)  # too small for the sum above; in logarithms nothing is
    energies = -t * np.log(np.where(total < 1e-30, 1.0, total))
    if len(lost):
        rows = [log_softmax(part.astype(np.float64) / t, axis=1)[:, lost] for _, part in slices(logits)]
        energies[lost] = -t * logsumexp(np.concatenate(rows), axis=0, b=weights[:, None])
    return energies


def equal_shares(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, t: float) -> np.ndarray:
    """`normalized` with the class shares of the samples put back, against these: what `EnergyAligning` makes 0."""
    shares = class_shares(labels, weights, logits.shape[1])
    total = np.zeros(logits.shape[1])
    for where, part in slices(logits):
        total += weights[where] @ softmax(part.astype(np.float64) / t + np.log(shares), axis=1)
    return -t * np.log(np.maximum(total, np.finfo(float).tiny) / shares)


READINGS: dict[str, Reading] = {
    "all_samples": all_samples,
    "own_samples": own_samples,
    "mean_energy": mean_energy,
    "normalized": normalized,
    "equal_shares": equal_shares,
}


WEIGHTS = ("balanced", "uniform")


def sample_weights(labels: np.ndarray, weights: str) -> np.ndarray:
    """Weights (N,) that sum to one: the same for every sample, or for every class that occurs."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r}; allowed are {', '.join(WEIGHTS)}")
    if weights == "uniform":
        return np.full(len(labels), 1 / len(labels))
    _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return 1 / (len(counts) * counts[index])


def class_shares(labels: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    """The share (C,) of each class in the weights of its samples; a class without a sample counts as half of one."""
    shares: np.ndarray = np.bincount(labels, weights, classes)
    if shares.all():
        return shares
    shares = np.where(shares > 0, shares, 0.5 / len(labels))
    return shares / shares.sum()


def free_energy(
    logits: Any, labels: Any, *, reading: str = "equal_shares", weights: str = "uniform", temperature: float = 1.0
) -> np.ndarray:
    """The free energy (C,) of each class, in float64 and nats, NaN of one that is masked: see `EnergyAligning`.

    Raises ValueError for logits or labels that `check` refuses, for an unknown reading or weights, and for a class
    without a sample where the reading needs one.
    """
    values, known = as_numpy(logits), as_labels(labels)
    check(values, known)
    if not isinstance(reading, str) or reading not in READINGS:
        raise ValueError(f"reading {reading!r}; allowed are {', '.join(READINGS)}")
    temperature = number("temperature", temperature, above=0)
    open_C = open_classes(values)
    values, known = without_masked(values, known, open_C)
    energies = np.full(len(open_C), np.nan)
    energies[open_C] = READINGS[reading](values, known, sample_weights(known, weights), temperature)
    return energies


class EnergyAligning(Correction):
    """Energy aligning (Zhao et al. 2021, arXiv:2106.03343): shift each logit so that free energies are equal.

    With E(x, y) = -z_y(x), the free energy of class y over samples S with weights w that sum to one is

        F(y) = -T log( sum over x in S of w(x) exp(z_y(x) / T) )

    and p(y) is proportional to exp(-F(y) / T), so under a uniform prior all F are equal. Adding s_y to logit y makes
    F(y) - s_y of it: s_y = strength * (F(y) - reference). The paper states the idea; its formula is not public, hence
    the readings.

    With log p(y|x) in place of z (`normalized`), the classes compete: a shift of one moves the energies of all, and one
    step does not make them equal. `equal_shares` goes on until they are. S has class shares of its own, t_y = sum of w
    over the samples of class y; they are put back, so that nothing is presumed of S:

        v(x) = (z(x) + s) / T + log t;   s such that  F(y) = -T log( sum of w(x) softmax(v(x))_y / t_y ) = 0 for all y

    A class is then expected as often as it is there. The first step, from s = -T log t on, is `normalized`; the last is
    where balanced softmax (Ren et al., NeurIPS 2020) with nothing but s free gives the labels the highest likelihood. A
    training ends where exactly these sums agree for its own loss, however well it knows its images; so its own images
    tell how the loss has dealt with the prior (docs/posthoc.md), where it drew each as often as any other.

    Args:
        reading: what S and z are. all_samples: every sample; own_samples: those of class y; mean_energy: every
            sample, F(y) = minus the mean logit; normalized: every sample, log p(y|x) in place of z; equal_shares:
            the same until all are equal, with the class shares of S put back.
        weights: uniform: every sample counts the same, as in training; balanced: every class of S does.
        temperature: T.
        strength: 1 aligns fully, 0 not at all.
        reference: mean (of F over classes that are not masked), or the class whose logit stays.
        groups: (C,) whole numbers: one shift for each group of classes, as between old and new classes in
            class-incremental learning; its F is -T log of the mean of exp(-F(y) / T) in the group.

    Attributes:
        energy_: (C,) the free energies before; NaN of a class that is masked.
    """

    of_masked: ClassVar[dict[str, float]] = {"shift_": 0.0, "energy_": np.nan}
    energy_: np.ndarray

    def __init__(
        self,
        reading: str = "equal_shares",
        weights: str = "uniform",
        temperature: float = 1.0,
        strength: float = 1.0,
        reference: str | int = "mean",
        groups: Any = None,
    ):
        self.reading, self.weights, self.temperature, self.strength = reading, weights, temperature, strength
        self.reference, self.groups = reference, groups

    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None:
        strength = number("strength", self.strength)
        self.energy_ = self.energies(logits, labels)
        t = float(self.temperature)
        if self.reading == "equal_shares":
            energy = equal_energies(logits, labels, sample_weights(labels, self.weights), t, self._groups())
        elif self.groups is None:
            energy = self.energy_
        else:
            groups = self._groups()
            summed = [logsumexp(-self.energy_[groups == group] / t) for group in range(groups.max() + 1)]
            energy = -t * (np.array(summed) - np.log(np.bincount(groups)))[groups]
        self.shift_ = strength * (energy - self._reference(energy))

    def _reference(self, energy: np.ndarray) -> float:
        """The energy that stays, of those of the open classes."""
        if isinstance(self.reference, str):
            if self.reference != "mean":
                raise ValueError(f"reference = {self.reference!r}; allowed are 'mean' and a class")
            return float(energy.mean())
        classes = len(self.open_)
        if number("reference", self.reference) not in range(classes):
            raise ValueError(f"reference = {self.reference}; allowed are 'mean' and 0 to {classes - 1}")
        label = int(self.reference)
        if not self.open_[label]:
            raise ValueError(f"reference = {self.reference}: this class is masked")
        return float(energy[np.flatnonzero(self.open_) == label][0])

    def _groups(self) -> np.ndarray:
        """The group of each open class, numbered from 0 on."""
        classes = len(self.open_)
        groups = np.arange(classes) if self.groups is None else as_numpy(self.groups)
        if groups.shape != (classes,) or groups.dtype.kind not in "iu":
            raise ValueError(f"groups are {groups.dtype} {groups.shape}; expected {classes} whole numbers")
        return np.unique(groups[self.open_], return_inverse=True)[1]

    def energies(self, logits: Any, labels: Any) -> np.ndarray:
        """The free energies (C,) of logits, with this one's settings: of corrected ones, how equal they have become."""
        return free_energy(
            logits, labels, reading=self.reading, weights=self.weights, temperature=self.temperature
        )  # fmt: skip


def equal_energies(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, t: float, groups: np.ndarray, within: float = 0.0
) -> np.ndarray:
    """The shift (C,) in nats, up to a constant, after which all free energies are equal: see `EnergyAligning`.

    Args:
        groups: (C,) numbers from 0 on; classes of one group have one shift.
        within: nats / t that the free energies may differ by; 0: as near as float64 comes, or 1,000 steps do.
    """
    classes = logits.shape[1]
    shares = class_shares(labels, weights, classes)
    absent = np.bincount(groups, np.bincount(labels, weights, classes) - shares)
    held = np.bincount(groups, shares)
    latest: np.ndarray = held

    def loss(shift: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the mean log-likelihood of v, and its gradient: expected minus actual shares.

        Of images that are known by heart both are small but not zero, and the shift is in how small they are for each
        class: nothing is subtracted from 1.
        """
        added = shift[groups] + np.log(shares)
        total, gradient = float(absent @ shift), np.zeros(classes)
        for where, part in slices(logits):
            own = np.arange(len(part)), labels[where]
            off = part.astype(np.float64)
            off -= off[own][:, None]
            off /= t
            off += added - added[labels[where], None]
            off[own] = -np.inf
            highest = np.maximum(off.max(1), 0)
            np.exp(np.subtract(off, highest[:, None], out=off), out=off)
            others, mine = off.sum(1), np.exp(-highest)
            known = highest == 0  # then `mine` is 1, and 1 + others would lose what is small
            log_sum = highest + np.where(known, np.log1p(others), np.log(mine + others))
            total += float(weights[where] @ log_sum)
            off /= (mine + others)[:, None]
            gradient += weights[where] @ off
            gradient -= np.bincount(labels[where], weights[where] * off.sum(1), classes)
        nonlocal latest
        latest = np.bincount(groups, gradient) + absent
        return total, latest

    def near(_: np.ndarray) -> None:
        """End where expected and actual shares, of whose ratio a free energy is the logarithm, are near enough."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if np.ptp(np.log1p(latest / held)) < within:
                raise StopIteration

    start = np.bincount(groups, -np.log(shares)) / np.bincount(groups)
    scale, _ = loss(start)
    if not scale > 0:  # known so well that float64 sees nothing else
        return t * start[groups]
    found = minimize(
        lambda shift: tuple(part / scale for part in loss(shift)),
        start,
        jac=True,
        method="L-BFGS-B",
        callback=near,
        options={"maxiter": 1000, "maxcor": 20, "ftol": 0, "gtol": 1e-8},
    )
    shift: np.ndarray = t * found.x[groups]
    return shift
