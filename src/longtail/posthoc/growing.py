"""Corrections between old and new classes, for class-incremental learning: classes 0 ... old - 1 were there before.

A network that saw few images of old classes and many of new ones favours the new ones. Energy aligning with groups
(`EnergyAligning(groups=...)`) and logit adjustment know of it already; here are the field's own.
"""

from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from longtail.posthoc.correction import Correction
from longtail.posthoc.inputs import as_labels, as_numpy, check_labels, counts_of


def new_classes(old: int, open_C: np.ndarray) -> np.ndarray:
    """Which of the classes that are not masked are new. Raises ValueError unless there are old and new ones."""
    classes = len(open_C)
    if not 0 < old < classes:
        raise ValueError(f"old = {old}; allowed are 1 to {classes - 1}, for {classes} classes")
    new: np.ndarray = (np.arange(classes) >= old)[open_C]
    if new.all() or not new.any():
        raise ValueError(f"old = {old}: all {'old' if new.all() else 'new'} classes are masked")
    return new


def aligning_factor(weight_CD: np.ndarray, new_C: np.ndarray, *, norm: int, clamp: bool) -> float:
    """gamma of `WeightAligning`, from weights (C, D) or (E, C, D); `new_C` says which classes are new.

    Raises ValueError for new weights that are all 0.
    """
    classes = weight_CD.shape[-2]
    norm_C = np.linalg.norm(weight_CD.astype(np.float64), ord=norm, axis=-1).reshape(-1, classes).mean(0)
    if not norm_C[new_C].mean() > 0:
        raise ValueError("the weights of all new classes are 0")
    gamma = norm_C[~new_C].mean() / norm_C[new_C].mean()
    return float(min(gamma, 1.0) if clamp else gamma)


def bias_layer(logits_NC: np.ndarray, labels_N: np.ndarray, new_C: np.ndarray, *, l2: float) -> tuple[float, float]:
    """beta and gamma of `BiasLayer`; `new_C` says which classes are new."""
    values, rows = logits_NC.astype(np.float64), np.arange(len(labels_N))
    onehot = np.zeros_like(values)
    onehot[rows, labels_N] = 1

    def loss(pair: np.ndarray) -> tuple[float, np.ndarray]:
        beta, gamma = pair
        moved = np.where(new_C, beta * values + gamma, values)
        wrong = (softmax(moved, axis=1) - onehot)[:, new_C]
        nll = -log_softmax(moved, axis=1)[rows, labels_N].mean() + l2 * gamma**2 / 2
        gradient = np.array([(wrong * values[:, new_C]).sum(), wrong.sum()]) / len(rows)
        return float(nll), gradient + np.array([0.0, l2 * gamma])

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-9}).x
    return float(found[0]), float(found[1])


class WeightAligning(Correction):
    """Weight Aligning (Zhao et al., CVPR 2020, arXiv:1911.07053, equations 5 to 7): new classes' weights are scaled.

        gamma = mean of |w_y| over old classes / mean of |w_y| over new classes;   z_y -> gamma z_y for new y

    The biases of the head, where it has any, stay as they are. Of several experts, the norms are means over experts.

    Args:
        weight: (C, D), or (E, C, D), of the head.
        bias: (C,) or (E, C) or None.
        old: number of old classes.
        norm: 2, or 1 as in the authors' release.
        clamp: gamma is at most 1, as in the authors' release.

    Attributes:
        gamma_: the factor.
    """

    needs_labels = False
    gamma_: float

    def __init__(self, weight: Any = None, bias: Any = None, old: int = 0, norm: int = 2, clamp: bool = False):
        self.weight, self.bias, self.old, self.norm, self.clamp = weight, bias, old, norm, clamp

    def _fit(self, logits: np.ndarray, labels: Any) -> None:
        classes = len(self.open_)
        if self.weight is None:
            raise ValueError("WeightAligning needs the weight of the head, (classes, features)")
        weight_CD = as_numpy(self.weight).astype(np.float64)
        if weight_CD.ndim not in (2, 3) or weight_CD.shape[-2] != classes:
            raise ValueError(f"weight has shape {weight_CD.shape}; expected ({classes}, features)")
        new = new_classes(self.old, self.open_)
        if self.norm not in (1, 2):
            raise ValueError(f"norm = {self.norm}; allowed are 1 and 2")
        self.gamma_ = aligning_factor(weight_CD[..., self.open_, :], new, norm=self.norm, clamp=self.clamp)
        self.scale_ = np.where(new, self.gamma_, 1.0)
        bias_C = np.zeros(classes) if self.bias is None else as_numpy(self.bias).astype(np.float64)
        bias_C = bias_C.reshape(-1, classes).mean(0)[self.open_]
        self.shift_ = np.where(new, (1 - self.gamma_) * bias_C, 0.0)


class BiasLayer(Correction):
    """BiC's bias correction layer (Wu et al., CVPR 2019, arXiv:1905.13260, equations 4 and 5).

        z_y -> beta z_y + gamma for new y;  beta, gamma minimise  mean cross-entropy + l2 gamma^2 / 2

    on held-out images of old and new classes, with the network frozen. The loss is convex in both, so that there is one
    answer; the release comes near it with 200 epochs of SGD. Its penalty on gamma is kept.

    Args:
        old: number of old classes.
        l2: of gamma; 0.1 in the release.

    Attributes:
        beta_, gamma_: the two numbers.
    """

    beta_: float
    gamma_: float

    def __init__(self, old: int = 0, l2: float = 0.1):
        self.old, self.l2 = old, l2

    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None:
        new = new_classes(self.old, self.open_)
        self.beta_, self.gamma_ = bias_layer(logits, labels, new, l2=self.l2)
        self.scale_ = np.where(new, self.beta_, 1.0)
        self.shift_ = np.where(new, self.gamma_, 0.0)


class NearestMean(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # untyped
    """The nearest mean of exemplars (iCaRL, Rebuffi et al., CVPR 2017, algorithm 1), on features in place of logits.

    Features have length one; a class's mean is that of its exemplars, brought to length one again. The score of a class
    is minus the squared distance.

    Attributes:
        means_: (C, D).
    """

    means_: np.ndarray

    def fit(self, features: Any, labels: Any) -> "NearestMean":
        """From features (N, D) and labels (N,) of exemplars. Raises ValueError where a class has none."""
        known, classes = as_labels(labels), int(as_labels(labels).max()) + 1
        values = unit(as_numpy(features))
        check_labels(known, len(values), classes)
        counts_of(known, classes, "NearestMean")
        sums = np.zeros((classes, values.shape[1]))
        np.add.at(sums, known, values)
        self.means_, self.classes_ = unit(sums), np.arange(classes)
        return self

    def decision_function(self, features: Any) -> np.ndarray:
        """Scores (N, C) in float64."""
        check_is_fitted(self, "means_")
        values = unit(as_numpy(features))
        score: np.ndarray = 2 * values @ self.means_.T - 1 - (self.means_**2).sum(1)
        return score

    def predict(self, features: Any) -> np.ndarray:
        """The class (N,) of the nearest mean."""
        return self.decision_function(features).argmax(1)


def unit(values: np.ndarray) -> np.ndarray:
    """Rows of length one, in float64."""
    values = values.astype(np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
