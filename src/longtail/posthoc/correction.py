"""What every correction of logits has in common, and one that is a matrix and an offset."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from longtail.posthoc.inputs import (
    as_labels,
    as_numpy,
    check,
    is_tensor,
    like,
    numbers,
    open_classes,
    warn_of_probabilities,
    without_masked,
    written_to,
)

FITTED_ON = ("train", "held-out", "test")


TRANSDUCTIVE, NEEDS_TEST_PRIOR = "transductive", "needs test prior"


class Correction(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]  # untyped
    """What all corrections share; a new one defines `_fit`.

    A class that is masked (longtail.posthoc.inputs) takes no part, and its logits stay: its scale is 1, its shift 0.

    Attributes:
        scale_: float or (C,), what each logit is multiplied by; 1.0 in most.
        shift_: (C,) float64, what is added then.
        fitted_on_: train, held-out or test, or None where nobody said.
        open_: (C,) which classes were not masked.
    """

    needs_labels: Any = True  # a property where it depends on the settings
    needs_test_prior = False
    of_masked: ClassVar[dict[str, float]] = {"shift_": 0.0}  # what has a number for each class, and a masked one's
    scale_: float | np.ndarray
    shift_: np.ndarray
    fitted_on_: str | None
    open_: np.ndarray

    def fit(self, logits: Any, labels: Any = None, *, fitted_on: str | None = None) -> Self:
        """Estimate the correction.

        Args:
            logits: (N, C).
            labels: (N,), whole numbers; corrections that need none ignore them.
            fitted_on: train, held-out or test: what these logits are, kept for tables.

        Raises ValueError for logits or labels that `check` refuses, for a label whose class is masked, and where labels
        are needed and missing. Warns of logits that are probabilities.
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
        self.open_ = open_C = open_classes(values)
        self._fit(*without_masked(values, known, open_C))
        if not open_C.all():
            if np.any(self.scale_ != 1.0):
                self.scale_ = _spread(np.broadcast_to(self.scale_, open_C.sum()), open_C, 1.0)
            for name, value in self.of_masked.items():
                setattr(self, name, _spread(getattr(self, name), open_C, value))
        if not (np.isfinite(self.shift_).all() and np.isfinite(self.scale_).all()):
            raise ValueError(f"{self!r} is no finite number for each class: scale {self.scale_}, shift {self.shift_}")
        return self

    def _fit(self, logits: np.ndarray, labels: Any) -> None:
        """Set `shift_`, and `scale_` where it is not 1, of the classes that are open.

        Args:
            logits: (N, open classes), float32 or float64.
            labels: (N,), places among the open classes, or None.

        `open_` says which they are, for settings that have a number for each class.
        """
        raise AssertionError("a correction defines _fit")

    def _validated(self, logits: Any, *, reset: bool) -> np.ndarray:
        """scikit-learn's checks, and ours that say where; a plain array of floats is not copied."""
        values = as_numpy(logits) if is_tensor(logits) else logits
        settings = {"dtype": [np.float32, np.float64], "ensure_min_features": 2 if reset else 1}
        found = np.asarray(validate_data(self, values, reset=reset, ensure_all_finite=False, **settings))
        check(found)
        warn_of_probabilities(found)
        return found

    def transform(self, logits: Any, *, out: Any = None) -> Any:
        """The corrected logits (N, C), in the kind and precision of what comes in; half precision is rounded once.

        Args:
            out: where they go; `out=logits` corrects in place. It must be of the logits' kind, type and shape.

        Raises ValueError for logits that `check` refuses and for another `out`. Warns of logits that are probabilities.
        """
        check_is_fitted(self, "shift_")
        values = self._validated(logits, reset=False)
        expected = like(values[:0], logits)  # its kind and type
        if out is not None and (_described(out) != _described(expected, values.shape)):
            raise ValueError(f"out is {_described(out)}; expected {_described(expected, values.shape)}")
        target = None if out is None else written_to(out, values.dtype)
        with np.errstate(over="ignore"):
            scale, shift = np.asarray(self.scale_, dtype=values.dtype), self.shift_.astype(values.dtype)
        if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
            raise ValueError(f"scale {self.scale_} or shift {self.shift_} is too large for {values.dtype}")
        with np.errstate(over="ignore"):  # the lowest number, where it masks a class, times more than 1
            if np.any(self.scale_ != 1.0):
                corrected = np.multiply(values, scale, out=target)
                corrected += shift
            else:
                corrected = np.add(values, shift, out=target)
        if out is None:
            return like(corrected, logits)
        if target is None:  # half precision, another device
            out[...] = like(corrected, logits)
        return out

    def predict(self, logits: Any) -> Any:
        """The most probable class (N,) of the corrected logits."""
        return like(as_numpy(self.transform(logits)).argmax(1), logits)

    def predict_proba(self, logits: Any) -> Any:
        """Probabilities (N, C): the softmax of the corrected logits."""
        corrected = as_numpy(self.transform(logits))
        return like(softmax(corrected.astype(np.result_type(corrected, np.float32), copy=False), axis=1), logits)

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


def _described(values: Any, shape: Sequence[int] | None = None) -> str:
    """`tensor float32 (3, 2)`; an array without a word before its type."""
    if not (is_tensor(values) or isinstance(values, np.ndarray)):
        return f"a {type(values).__name__}"
    kind = "tensor " if is_tensor(values) else ""
    return f"{kind}{str(values.dtype).removeprefix('torch.')} {tuple(values.shape if shape is None else shape)}"


def _spread(values: np.ndarray, open_C: np.ndarray, masked: float) -> np.ndarray:
    """A number for each class that is open as one for each class (C,)."""
    spread = np.full(len(open_C), masked)
    spread[open_C] = values
    return spread


def from_dict(fitted: Mapping[str, Any]) -> "Affine":
    """The correction that `to_dict` wrote, as scale and shift. Raises ValueError where something else wrote it."""
    missing = [key for key in ("scale", "shift", "fitted_on", "flags") if key not in fitted]
    if missing:
        raise ValueError(f"no {', '.join(missing)}; expected what to_dict or --shift writes")
    shift, flags = numbers("shift", fitted["shift"]), fitted["flags"]
    if shift.ndim != 1 or not isinstance(flags, Sequence):
        raise ValueError(
            f"shift is {fitted['shift']!r}, flags are {flags!r}; expected a number for each class, and words"
        )
    correction = Affine(fitted["scale"], shift, NEEDS_TEST_PRIOR in flags)
    return correction.fit(np.zeros((1, len(shift))), fitted_on=fitted["fitted_on"])


class Affine(Correction):
    """A given scale (a number or C) and shift (C): what others come to when they are composed or read from a file."""

    needs_labels = False

    def __init__(self, scale: Any = 1.0, shift: Any = 0.0, needs_test_prior: bool = False):
        self.scale, self.shift, self.needs_test_prior = scale, shift, needs_test_prior

    def _fit(self, logits: np.ndarray, labels: Any) -> None:
        classes = len(self.open_)
        scale, shift = numbers("scale", self.scale), numbers("shift", self.shift)
        for name, value in (("scale", scale), ("shift", shift)):
            if value.shape not in ((), (classes,)):
                raise ValueError(f"{name} has shape {value.shape}; expected one finite number or {classes} of them")
            if not np.isfinite(value).all():
                raise ValueError(f"{name} = {getattr(self, name)}; expected one finite number or {classes} of them")
        self.scale_ = float(scale) if scale.ndim == 0 else scale[self.open_]
        self.shift_ = np.broadcast_to(shift, (classes,))[self.open_]
