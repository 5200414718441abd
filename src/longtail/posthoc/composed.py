"""Corrections put together, and into a classifier's own weights."""

from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from longtail.posthoc.correction import Affine, Correction
from longtail.posthoc.inputs import as_numpy, like


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
