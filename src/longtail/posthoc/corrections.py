"""The relatives of energy aligning: what the shift is estimated from is what they differ in (docs/posthoc.md)."""

import warnings
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax

from longtail.posthoc.correction import Correction
from longtail.posthoc.energy import normalized, sample_weights
from longtail.posthoc.inputs import (
    as_labels,
    as_numpy,
    check,
    counts_of,
    flag,
    log_prior,
    number,
    slices,
    without_masked,
)

BOUND = 8.0  # of log T


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
        self.shift_ = number("tau", self.tau) * normalized(logits, np.zeros(len(logits), dtype=int), uniform, 1.0)


class LogitAdjustment(Correction):
    """Post-hoc logit adjustment (Menon et al., ICLR 2021, section 4.1): s_y = -tau * log prior(y).

    Args:
        tau: 1 is consistent for the balanced error.
        prior: of the training set (C,), any scale: then no labels are needed; None: the shares of the labels that it
            is fitted on.
    """

    @property
    def needs_labels(self) -> bool:
        """Whether the prior is not given."""
        return self.prior is None

    def __init__(self, tau: float = 1.0, prior: Any = None):
        self.tau, self.prior = tau, prior

    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None:
        tau = number("tau", self.tau)
        if self.prior is None:
            counts, everyone = (
                counts_of(labels, logits.shape[1], "LogitAdjustment"),
                np.ones(logits.shape[1], dtype=bool),
            )
            self.shift_ = -tau * log_prior(counts, everyone, "prior")
        else:
            self.shift_ = -tau * log_prior(self.prior, self.open_, "prior")


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
        self.shift_ = log_prior(self.test_prior, self.open_, "test_prior") - log_prior(
            self.model_prior, self.open_, "model_prior"
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
    of_masked: ClassVar[dict[str, float]] = {"shift_": 0.0, "prior_": 0.0}
    prior_: np.ndarray
    n_iter_: int

    def __init__(self, model_prior: Any = "uniform", max_iter: int = 1000, tol: float = 1e-6):
        self.model_prior, self.max_iter, self.tol = model_prior, max_iter, tol

    def _fit(self, logits: np.ndarray, labels: Any) -> None:
        tol = number("tol", self.tol, least=0)
        rounds = number("max_iter", self.max_iter, least=1)
        log_model = log_prior(self.model_prior, self.open_, "model_prior")
        self.prior_ = np.exp(log_model)
        uniform = np.full(len(logits), 1 / len(logits))
        floor = np.finfo(float).tiny
        for self.n_iter_ in range(1, int(rounds) + 1):
            shift = np.log(np.maximum(self.prior_, floor)) - log_model
            total = np.zeros_like(self.prior_)
            for where, part in slices(logits):
                total += uniform[where] @ softmax(part.astype(np.float64) + shift, axis=1)
            change, self.prior_ = np.abs(total - self.prior_).max(), total
            if change <= tol:
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
    of_masked: ClassVar[dict[str, float]] = {"shift_": 0.0, "prior_": 0.0}
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
        if flag("soft", self.soft):
            return softmax(logits.astype(np.float64), axis=1)
        return np.eye(logits.shape[1])[logits.argmax(1)]

    def _fit(self, logits: np.ndarray, labels: Any) -> None:
        classes, floor = logits.shape[1], number("floor", self.floor, above=0)
        if self.source_logits is None or self.source_labels is None:
            raise ValueError("BlackBoxShift needs source_logits and source_labels: labelled, not trained on")
        source, known = as_numpy(self.source_logits), as_labels(self.source_labels)
        check(source, known)
        if source.shape[1] != len(self.open_):
            raise ValueError(f"source_logits have {source.shape[1]} classes, the logits to correct {len(self.open_)}")
        source, known = without_masked(source, known, self.open_)
        counts = counts_of(known, classes, "BlackBoxShift")
        confusion = np.zeros((classes, classes))
        for where, part in slices(source):
            confusion += self._predicted(part).T @ np.eye(classes)[known[where]]
        confusion /= len(source)
        share = sum(self._predicted(part).sum(0) for _, part in slices(logits)) / len(logits)
        ratio = np.linalg.lstsq(confusion, share, rcond=None)[0]
        prior = np.maximum(ratio, floor) * counts / len(source)
        self.prior_ = prior / prior.sum()
        self.shift_ = np.log(self.prior_) - log_prior(self.model_prior, self.open_, "model_prior")


class TemperatureScaling(Correction):
    """Divide all logits by one number T > 0 that gives the labels the highest likelihood (Guo et al., ICML 2017, 4.2).

    The predictions stay; their confidence changes. Warns where T ends at a bound of the search, exp(-8) or exp(8).

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

        found = minimize_scalar(nll, bounds=(-BOUND, BOUND), method="bounded", options={"xatol": 1e-8})
        self.temperature_ = float(np.exp(found.x))
        if abs(found.x) > BOUND - 0.01:
            why = "the logits say nothing about the labels" if found.x > 0 else "every label has the highest logit"
            warnings.warn(f"T = {self.temperature_:.3g} is a bound of the search: {why}", stacklevel=3)
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
        classes, l2 = logits.shape[1], number("l2", self.l2, least=0)
        weights = sample_weights(labels, "balanced" if flag("balanced", self.balanced) else "uniform")

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            scale, shift = flat[:classes], flat[classes:]
            off = np.concatenate([scale - 1, shift])
            total, gradient = l2 * float(off @ off) / classes, 2 * l2 * off / classes
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
