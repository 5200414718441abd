"""Corrections after training: a number for each class, added to its logit. For anyone's logits.

Every correction here is   z -> scale * z + shift   with a shift of each class, and an estimator in scikit-learn's
manner: `fit(logits, labels)`, `transform(logits)`, `predict`, `predict_proba`; several make a Pipeline. They differ in
what the shift is estimated from, and `fit(..., fitted_on="train")` says on what. docs/posthoc.md has the formulas, the
papers and when to use which.

    corrected = EnergyAligning().fit(train_logits, train_labels).transform(test_logits)

Logits are numpy arrays or torch tensors of shape (N samples, C classes), before the softmax, in nats; what comes out is
of the kind and precision that went in. Classes are 0 to C - 1. Work goes through the logits in slices, so it needs
little memory beside them.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

SLICE = 1 << 19  # logits that are looked at together: they stay in the processor's cache
FITTED_ON = ("train", "held-out", "test")
TRANSDUCTIVE, NEEDS_TEST_PRIOR = "transductive", "needs test prior"

Prior = Literal["uniform"] | Sequence[float] | np.ndarray


# --------------------------------------------------------------------------------------------- what comes in


def is_tensor(values: Any) -> bool:
    """Whether it is torch's, without importing torch."""
    return any(kind.__module__.split(".")[0] == "torch" for kind in type(values).__mro__)


def as_numpy(values: Any) -> np.ndarray:
    """A numpy view of an array or a tensor; a copy where there is none (a GPU, bfloat16)."""
    if is_tensor(values):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() and values.element_size() < 4 else values
        return np.asarray(values.numpy())
    return np.asarray(values)


def like(result: np.ndarray, values: Any) -> Any:
    """`result` as a tensor on the device of `values` where that is one."""
    if is_tensor(values):
        import torch

        return torch.from_numpy(result).to(values.device)
    return result


def check(logits: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Raise ValueError, naming what and where, unless there are finite logits (N, C) and labels (N,) in 0 ... C - 1."""
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits have shape {logits.shape}; expected (samples, classes), neither of them 0")
    if not np.isfinite(logits.sum(dtype=np.float64)):  # the sum is one cheap look; which one it is takes more
        bad = np.argwhere(~np.isfinite(logits))
        if len(bad):
            row, column = bad[0]
            raise ValueError(
                f"{len(bad)} logit(s) are NaN or inf, first at row {row}, class {column}: {logits[row, column]}"
            )
    if labels is not None:
        check_labels(labels, *logits.shape)


def check_labels(labels: np.ndarray, samples: int, classes: int) -> None:
    """Raise ValueError unless labels are (N,) whole numbers in 0 ... C - 1."""
    if labels.shape != (samples,):
        raise ValueError(f"labels have shape {labels.shape}; expected ({samples},) as logits have that many rows")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}, not all whole numbers; allowed are 0 to {classes - 1}")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        row = outside[0]
        raise ValueError(f"label {labels[row]} in row {row}; allowed are 0 to {classes - 1}")


def as_labels(values: Any) -> np.ndarray:
    """As `as_numpy`; whole numbers that were read as floats, from a CSV file say, are whole numbers."""
    labels = as_numpy(values)
    if labels.dtype.kind == "f" and np.all(labels == np.floor(labels)) and np.isfinite(labels).all():
        return labels.astype(np.int64)
    return labels


def log_prior(prior: Prior, classes: int, name: str) -> np.ndarray:
    """log of a prior (C,), which need not sum to one. Raises ValueError, with its `name`, where it is none."""
    if isinstance(prior, str):
        if prior != "uniform":
            raise ValueError(f"{name} = {prior!r}; allowed are 'uniform' and {classes} positive numbers")
        return np.full(classes, -np.log(classes))
    values = as_numpy(prior).astype(np.float64)
    if values.shape != (classes,):
        raise ValueError(f"{name} has shape {values.shape}; expected ({classes},), a number for each class")
    wrong = np.flatnonzero(~((values > 0) & np.isfinite(values)))
    if len(wrong):
        raise ValueError(f"{name} of class {wrong[0]} is {values[wrong[0]]}; allowed are positive numbers")
    return np.log(values / values.sum())


def counts_of(labels: np.ndarray, classes: int, why: str) -> np.ndarray:
    """Samples of each class (C,). Raises ValueError for a class that has none."""
    counts = np.bincount(labels, minlength=classes)
    missing = np.flatnonzero(counts == 0)
    if len(missing):
        raise ValueError(f"{why} needs a sample of every class; {len(missing)} have none, first class {missing[0]}")
    return counts


def slices(logits: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Some rows at a time, in float32 or float64."""
    rows = max(1, SLICE // logits.shape[1])
    for first in range(0, len(logits), rows):
        where = slice(first, first + rows)
        part = logits[where]
        yield where, part if part.dtype in (np.float32, np.float64) else part.astype(np.float64)


# --------------------------------------------------------------------------------------------- the estimators


class Correction(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]  # untyped
    """What all corrections share; a new one defines `_fit`.

    Attributes:
        scale_: float or (C,), what each logit is multiplied by; 1.0 in most.
        shift_: (C,) float64, what is added then.
        fitted_on_: train, held-out or test, or None where nobody said.
    """

    needs_labels = True
    needs_test_prior = False
    scale_: float | np.ndarray
    shift_: np.ndarray
    fitted_on_: str | None

    def fit(self, logits: Any, labels: Any = None, *, fitted_on: str | None = None) -> Self:
        """Estimate the correction.

        Args:
            logits: (N, C).
            labels: (N,), whole numbers; corrections that need none ignore them.
            fitted_on: train, held-out or test: what these logits are, kept for tables.

        Raises ValueError for logits or labels that `check` refuses, and where labels are needed and missing.
        """
        if fitted_on is not None and fitted_on not in FITTED_ON:
            raise ValueError(f"fitted_on = {fitted_on!r}; allowed are {', '.join(FITTED_ON)}")
        values = self._validated(logits, reset=True)
        known = None
        if self.needs_labels:
            if labels is None:
                raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None (labels)")
            known = as_labels(labels)
            check(values, known)
        self.fitted_on_, self.scale_ = fitted_on, 1.0
        self._fit(values, known)
        return self

    def _fit(self, logits: np.ndarray, labels: Any) -> None:
        raise AssertionError("a correction defines _fit")

    def _validated(self, logits: Any, *, reset: bool) -> np.ndarray:
        """scikit-learn's checks, and ours that say where; a plain array of floats is not copied."""
        values = as_numpy(logits) if is_tensor(logits) else logits
        if isinstance(values, np.ndarray) and values.ndim == 2 and values.size and values.dtype.kind == "f":
            check(values)
        settings = {"dtype": [np.float32, np.float64], "ensure_min_features": 2 if reset else 1}
        return np.asarray(validate_data(self, values, reset=reset, **settings))

    def transform(self, logits: Any, *, out: Any = None) -> Any:
        """The corrected logits (N, C), in the kind and precision of what comes in.

        Args:
            out: where they go; `out=logits` corrects in place. It must be of the logits' kind, type and shape.
        """
        check_is_fitted(self, "shift_")
        values = self._validated(logits, reset=False)
        target = None if out is None else as_numpy(out)
        if target is not None and (target.shape != values.shape or target.dtype != values.dtype):
            raise ValueError(f"out is {target.dtype} {target.shape}; expected {values.dtype} {values.shape}")
        shift = self.shift_.astype(values.dtype)
        if np.any(self.scale_ != 1.0):
            target = np.multiply(values, np.asarray(self.scale_, dtype=values.dtype), out=target)
            target += shift
        else:
            target = np.add(values, shift, out=target)
        return like(target, logits) if out is None else out

    def predict(self, logits: Any) -> Any:
        """The most probable class (N,) of the corrected logits."""
        return like(as_numpy(self.transform(logits)).argmax(1), logits)

    def predict_proba(self, logits: Any) -> Any:
        """Probabilities (N, C): the softmax of the corrected logits."""
        return like(softmax(as_numpy(self.transform(logits)), axis=1), logits)

    @property
    def flags(self) -> list[str]:
        """Reservations that a table should carry: `transductive`, `needs test prior`."""
        check_is_fitted(self, "shift_")
        transductive = [TRANSDUCTIVE] if self.fitted_on_ == "test" else []
        return transductive + ([NEEDS_TEST_PRIOR] if self.needs_test_prior else [])

    def to_dict(self) -> dict[str, Any]:
        """What was fitted, for a JSON file; `from_dict` makes an equal correction of it."""
        check_is_fitted(self, "shift_")
        return {
            "correction": type(self).__name__,
            "params": json.loads(json.dumps(self.get_params(), default=lambda value: as_numpy(value).tolist())),
            "fitted_on": self.fitted_on_,
            "flags": self.flags,
            "scale": np.asarray(self.scale_).tolist(),
            "shift": self.shift_.tolist(),
        }


def from_dict(fitted: Mapping[str, Any]) -> "Affine":
    """The correction that `to_dict` wrote, as scale and shift."""
    correction = Affine(fitted["scale"], fitted["shift"], NEEDS_TEST_PRIOR in fitted["flags"])
    return correction.fit(np.zeros((1, len(fitted["shift"]))), fitted_on=fitted["fitted_on"])


class Affine(Correction):
    """A given scale (a number or C) and shift (C): what others come to when they are composed or read from a file."""

    needs_labels = False

    def __init__(self, scale: Any = 1.0, shift: Any = 0.0, needs_test_prior: bool = False):
        self.scale, self.shift, self.needs_test_prior = scale, shift, needs_test_prior

    def _fit(self, logits: np.ndarray, labels: Any) -> None:
        classes = logits.shape[1]
        scale, shift = (np.asarray(value, dtype=np.float64) for value in (self.scale, self.shift))
        for name, value in (("scale", scale), ("shift", shift)):
            if value.shape not in ((), (classes,)) or not np.isfinite(value).all():
                raise ValueError(f"{name} has shape {value.shape}; expected one finite number or {classes} of them")
        self.scale_ = float(scale) if scale.ndim == 0 else scale
        self.shift_ = np.broadcast_to(shift, (classes,)).copy()


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
    """Minus each class's mean logit: `all_samples` at a high temperature."""
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


READINGS: dict[str, Reading] = {
    "all_samples": all_samples,
    "own_samples": own_samples,
    "mean_energy": mean_energy,
    "normalized": normalized,
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


def free_energy(
    logits: Any, labels: Any, *, reading: str = "normalized", weights: str = "balanced", temperature: float = 1.0
) -> np.ndarray:
    """The free energy (C,) of each class, in float64 and nats: see `EnergyAligning`.

    Raises ValueError for logits or labels that `check` refuses, for an unknown reading or weights, and for a class
    without a sample where the reading needs one.
    """
    values, known = as_numpy(logits), as_labels(labels)
    check(values, known)
    if reading not in READINGS:
        raise ValueError(f"reading {reading!r}; allowed are {', '.join(READINGS)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; allowed are numbers above 0")
    return READINGS[reading](values, known, sample_weights(known, weights), temperature)


class EnergyAligning(Correction):
    """Energy aligning (Zhao et al. 2021, arXiv:2106.03343): shift each logit so that free energies are equal.

    With E(x, y) = -z_y(x), the free energy of class y over samples S with weights w that sum to one is

        F(y) = -T log( sum over x in S of w(x) exp(z_y(x) / T) )

    and p(y) is proportional to exp(-F(y) / T), so under a uniform prior all F are equal. Adding s_y to logit y makes
    F(y) - s_y of it: s_y = strength * (F(y) - reference). The paper states the idea; its formula is not public, hence
    the readings.

    Args:
        reading: what S and z are. all_samples: every sample; own_samples: those of class y; mean_energy: every
            sample, F(y) = minus the mean logit; normalized: every sample, log p(y|x) in place of z.
        weights: balanced: every class of S counts the same, so a network that is balanced already is not shifted for
            the long tail of S; uniform: every sample does, so a calibrated network's shift is -log prior of S.
        temperature: T.
        strength: 1 aligns fully, 0 not at all.
        reference: mean (of F over classes), or the class whose logit stays.
        groups: (C,) whole numbers: one shift for each group of classes, as between old and new classes in
            class-incremental learning; its F is -T log of the mean of exp(-F(y) / T) in the group.

    Attributes:
        energy_: (C,) the free energies before.
    """

    energy_: np.ndarray

    def __init__(
        self,
        reading: str = "normalized",
        weights: str = "balanced",
        temperature: float = 1.0,
        strength: float = 1.0,
        reference: str | int = "mean",
        groups: Any = None,
    ):
        self.reading, self.weights, self.temperature, self.strength = reading, weights, temperature, strength
        self.reference, self.groups = reference, groups

    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None:
        classes = logits.shape[1]
        self.energy_ = self.energies(logits, labels)
        energy = self.energy_
        if self.groups is not None:
            groups = as_numpy(self.groups)
            if groups.shape != (classes,) or groups.dtype.kind not in "iu":
                raise ValueError(f"groups are {groups.dtype} {groups.shape}; expected {classes} whole numbers")
            energy = energy.copy()
            for group in np.unique(groups):
                own, t = groups == group, self.temperature
                energy[own] = -t * (logsumexp(-energy[own] / t) - np.log(own.sum()))
        if isinstance(self.reference, str):
            if self.reference != "mean":
                raise ValueError(f"reference = {self.reference!r}; allowed are 'mean' and a class")
            reference = energy.mean()
        else:
            if not 0 <= self.reference < classes:
                raise ValueError(f"reference = {self.reference}; allowed are 'mean' and 0 to {classes - 1}")
            reference = energy[self.reference]
        self.shift_ = self.strength * (energy - reference)

    def energies(self, logits: Any, labels: Any) -> np.ndarray:
        """The free energies (C,) of logits, with this one's settings: of corrected ones, how equal they have become."""
        return free_energy(
            logits, labels, reading=self.reading, weights=self.weights, temperature=self.temperature
        )  # fmt: skip


class PredictionRebalancing(Correction):
    """GALA's prediction re-balancing (Zhang et al., ICASSP 2024): every class gets the same share of all predictions.

        n_y = sum over samples of p(y|x);   score = p(y|x) / n_y ** tau,   so   s_y = -tau * log(n_y / N)

    As published it is fitted on the test images that it then scores: transductive, it presumes a balanced test set,
    and its answer for an image depends on the others. Fitted on other logits it does not.

    Args:
        tau: 1 in the released configurations of CIFAR-100-LT.
    """

    needs_labels = False

    def __init__(self, tau: float = 1.0):
        self.tau = tau

    def _fit(self, logits: np.ndarray, labels: Any) -> None:
        uniform = np.full(len(logits), 1 / len(logits))
        self.shift_ = self.tau * normalized(logits, np.zeros(len(logits), dtype=int), uniform, 1.0)


class LogitAdjustment(Correction):
    """Post-hoc logit adjustment (Menon et al., ICLR 2021, section 4.1): s_y = -tau * log prior(y).

    Args:
        tau: 1 is consistent for the balanced error.
        prior: of the training set (C,), any scale; None: the shares of the labels that it is fitted on.
    """

    def __init__(self, tau: float = 1.0, prior: Any = None):
        self.tau, self.prior = tau, prior

    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None:
        classes = logits.shape[1]
        prior = counts_of(labels, classes, "LogitAdjustment") if self.prior is None else self.prior
        self.shift_ = -self.tau * log_prior(prior, classes, "prior")


class KnownPrior(Correction):
    """The test prior is known: s_y = log test_prior(y) - log model_prior(y) (Saerens et al. 2002, equation 2.4).

    Args:
        test_prior: (C,), any scale.
        model_prior: that the logits were trained or corrected for; BalPoE's is uniform (CVPR 2023, section 4.4).
    """

    needs_labels = False
    needs_test_prior = True

    def __init__(self, test_prior: Any = "uniform", model_prior: Any = "uniform"):
        self.test_prior, self.model_prior = test_prior, model_prior

    def _fit(self, logits: np.ndarray, labels: Any) -> None:
        classes = logits.shape[1]
        self.shift_ = log_prior(self.test_prior, classes, "test_prior") - log_prior(
            self.model_prior, classes, "model_prior"
        )


class ExpectationMaximization(Correction):
    """The test prior is unknown: estimated on the test logits by expectation-maximisation (Saerens et al. 2002, 2.9).

        q(y|x) ~ p(y|x) prior(y) / model_prior(y);   prior(y) <- mean over test samples of q(y|x)

    from prior = model_prior on; s_y = log prior(y) - log model_prior(y). Transductive. It climbs the likelihood of
    the test samples under a calibrated model, and believes an over-confident one too much.

    Args:
        model_prior: that the logits were trained or corrected for.
        max_iter, tol: it ends when no prior changes by more than tol, or after so many rounds.

    Attributes:
        prior_: (C,) the estimate.
        n_iter_: rounds.
    """

    needs_labels = False
    prior_: np.ndarray
    n_iter_: int

    def __init__(self, model_prior: Any = "uniform", max_iter: int = 1000, tol: float = 1e-6):
        self.model_prior, self.max_iter, self.tol = model_prior, max_iter, tol

    def _fit(self, logits: np.ndarray, labels: Any) -> None:
        log_model = log_prior(self.model_prior, logits.shape[1], "model_prior")
        self.prior_ = np.exp(log_model)
        uniform = np.full(len(logits), 1 / len(logits))
        floor = np.finfo(float).tiny
        for number in range(1, self.max_iter + 1):
            self.n_iter_ = number
            shift = np.log(np.maximum(self.prior_, floor)) - log_model
            total = np.zeros_like(self.prior_)
            for where, part in slices(logits):
                total += uniform[where] @ softmax(part.astype(np.float64) + shift, axis=1)
            change, self.prior_ = np.abs(total - self.prior_).max(), total
            if change <= self.tol:
                break
        self.shift_ = np.log(np.maximum(self.prior_, floor)) - log_model


class BlackBoxShift(Correction):
    """The test prior is unknown: from how often each class is predicted (Lipton et al., ICML 2018, equation 3).

    With the joint confusion P(predicted i, label j) on labelled source logits and the share q(i) of predictions of
    the test logits, the ratios w = test prior / source prior solve confusion @ w = q: least squares, negative w
    raised to `floor`. s_y = log(w_y * source prior(y)) - log model_prior(y). Transductive.

    Args:
        source_logits, source_labels: (N, C) and (N,), which the network was not trained on.
        model_prior: that the logits were trained or corrected for.
        soft: count probabilities in place of predictions.
        floor: the smallest ratio.

    Attributes:
        prior_: (C,) the estimate.
    """

    needs_labels = False
    prior_: np.ndarray

    def __init__(
        self,
        source_logits: Any = None,
        source_labels: Any = None,
        model_prior: Any = "uniform",
        soft: bool = True,
        floor: float = 1e-3,
    ):
        self.source_logits, self.source_labels, self.model_prior = source_logits, source_labels, model_prior
        self.soft, self.floor = soft, floor

    def _predicted(self, logits: np.ndarray) -> np.ndarray:
        return softmax(logits.astype(np.float64), axis=1) if self.soft else np.eye(logits.shape[1])[logits.argmax(1)]

    def _fit(self, logits: np.ndarray, labels: Any) -> None:
        classes = logits.shape[1]
        if self.source_logits is None or self.source_labels is None:
            raise ValueError("BlackBoxShift needs source_logits and source_labels: labelled, not trained on")
        source, known = as_numpy(self.source_logits), as_labels(self.source_labels)
        check(source, known)
        if source.shape[1] != classes:
            raise ValueError(f"source_logits have {source.shape[1]} classes, the logits to correct {classes}")
        counts = counts_of(known, classes, "BlackBoxShift")
        confusion = np.zeros((classes, classes))
        for where, part in slices(source):
            confusion += self._predicted(part).T @ np.eye(classes)[known[where]]
        confusion /= len(source)
        share = sum(self._predicted(part).sum(0) for _, part in slices(logits)) / len(logits)
        ratio = np.linalg.lstsq(confusion, share, rcond=None)[0]
        prior = np.maximum(ratio, self.floor) * counts / len(source)
        self.prior_ = prior / prior.sum()
        self.shift_ = np.log(self.prior_) - log_prior(self.model_prior, classes, "model_prior")


class TemperatureScaling(Correction):
    """Divide all logits by one number T > 0 that gives the labels the highest likelihood (Guo et al., ICML 2017, 4.2).

    The predictions stay; their confidence changes.

    Attributes:
        temperature_: T.
    """

    temperature_: float

    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None:
        def nll(log_t: float) -> float:
            total = 0.0
            for where, part in slices(logits):
                scaled = part.astype(np.float64) * np.exp(-log_t)
                total += float((logsumexp(scaled, axis=1) - scaled[np.arange(len(part)), labels[where]]).sum())
            return total / len(logits)

        found = minimize_scalar(nll, bounds=(-8.0, 8.0), method="bounded", options={"xatol": 1e-8})
        self.temperature_ = float(np.exp(found.x))
        self.scale_, self.shift_ = 1 / self.temperature_, np.zeros(logits.shape[1])


class VectorScaling(Correction):
    """A scale and a shift of each class that give the labels the highest likelihood (Guo et al., ICML 2017, 4.2).

    Args:
        l2: times the mean square of (scale - 1) and shift, added to the mean loss in nats: 2 C numbers are many for
            few samples.
        balanced: every class counts the same, whatever its number of samples; else every sample does.
    """

    def __init__(self, l2: float = 0.01, balanced: bool = True):
        self.l2, self.balanced = l2, balanced

    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None:
        classes = logits.shape[1]
        weights = sample_weights(labels, "balanced" if self.balanced else "uniform")

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            scale, shift = flat[:classes], flat[classes:]
            off = np.concatenate([scale - 1, shift])
            total, gradient = self.l2 * float(off @ off) / classes, 2 * self.l2 * off / classes
            for where, part in slices(logits):
                values, own = part.astype(np.float64), labels[where]
                log_p = log_softmax(scale * values + shift, axis=1)
                rows = np.arange(len(own))
                total -= float(weights[where] @ log_p[rows, own])
                error = np.exp(log_p)
                error[rows, own] -= 1
                error *= weights[where][:, None]
                gradient[:classes] += (error * values).sum(0)
                gradient[classes:] += error.sum(0)
            return total, gradient

        start = np.concatenate([np.ones(classes), np.zeros(classes)])
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
        self.scale_ = found[:classes]
        self.shift_ = found[classes:] - found[classes:].mean()


# --------------------------------------------------------------------------------------------- putting together


def compose(*corrections: Correction) -> Affine:
    """One correction that does what several fitted ones do, the first one first; it keeps their flags."""
    if not corrections:
        raise ValueError("nothing to compose")
    scale: Any = 1.0
    shift: Any = 0.0
    fitted_on = None
    for correction in corrections:
        check_is_fitted(correction, "shift_")
        scale = np.asarray(correction.scale_) * scale
        shift = np.asarray(correction.scale_) * shift + correction.shift_
        where = correction.fitted_on_
        fitted_on = where if fitted_on is None or where == "test" else fitted_on
    told = any(correction.needs_test_prior for correction in corrections)
    return Affine(scale, shift, told).fit(np.zeros((1, len(shift))), fitted_on=fitted_on)


def fold(weight: Any, bias: Any, correction: Correction) -> tuple[Any, Any]:
    """The final layer (C, D) and (C,) or None whose logits are the corrected ones: no correction is needed any more.

    Computed in float64 and rounded once, to the precision of the weight.
    """
    check_is_fitted(correction, "shift_")
    matrix = as_numpy(weight)
    before = np.zeros(len(matrix)) if bias is None else as_numpy(bias).astype(np.float64)
    if matrix.shape[:1] != correction.shift_.shape or before.shape != correction.shift_.shape:
        raise ValueError(
            f"weight {matrix.shape} and bias {before.shape} are of another layer: the correction has "
            f"{len(correction.shift_)} classes"
        )
    scale = np.broadcast_to(correction.scale_, before.shape)
    folded = (scale[:, None] * matrix).astype(matrix.dtype), (scale * before + correction.shift_).astype(matrix.dtype)
    return like(folded[0], weight), like(folded[1], weight)


def unfold(weight: Any, bias: Any, correction: Correction) -> tuple[Any, Any]:
    """The layer before `fold`, to rounding."""
    check_is_fitted(correction, "shift_")
    scale = 1 / np.asarray(correction.scale_)
    inverse = Affine(scale, -scale * correction.shift_).fit(np.zeros((1, len(correction.shift_))))
    return fold(weight, bias, inverse)
