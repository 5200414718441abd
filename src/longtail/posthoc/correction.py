"""What every correction of logits has in common, and one that is a matrix and an offset."""

import json
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from longtail.posthoc.inputs import as_labels, as_numpy, check, is_tensor, like

FITTED_ON = ("train", "held-out", "test")


TRANSDUCTIVE, NEEDS_TEST_PRIOR = "transductive", "needs test prior"


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
