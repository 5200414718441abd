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

from longtail.posthoc.composed import compose, fold, unfold
from longtail.posthoc.correction import FITTED_ON, Affine, Correction, from_dict
from longtail.posthoc.corrections import (
    BlackBoxShift,
    ExpectationMaximization,
    KnownPrior,
    LogitAdjustment,
    PredictionRebalancing,
    TemperatureScaling,
    VectorScaling,
)
from longtail.posthoc.energy import READINGS, WEIGHTS, EnergyAligning, free_energy, sample_weights
from longtail.posthoc.growing import BiasLayer, NearestMean, WeightAligning
from longtail.posthoc.inputs import as_labels, check, check_labels, slices

__all__ = [
    "FITTED_ON",
    "READINGS",
    "WEIGHTS",
    "Affine",
    "BiasLayer",
    "BlackBoxShift",
    "Correction",
    "EnergyAligning",
    "ExpectationMaximization",
    "KnownPrior",
    "LogitAdjustment",
    "NearestMean",
    "PredictionRebalancing",
    "TemperatureScaling",
    "VectorScaling",
    "WeightAligning",
    "as_labels",
    "check",
    "check_labels",
    "compose",
    "fold",
    "free_energy",
    "from_dict",
    "sample_weights",
    "slices",
    "unfold",
]
