"""Measures of logits against labels on a balanced test set. Fractions, not percent; NLL in nats.

N samples, C classes.
"""

import numpy as np
from scipy.special import log_softmax

from longtail.posthoc import check


def class_accuracy(predictions_N: np.ndarray, labels_N: np.ndarray, classes: int) -> np.ndarray:
    """Fraction of each class's samples that is recognised (C,); NaN for a class without samples."""
    total_C = np.bincount(labels_N, minlength=classes)
    right_C = np.bincount(labels_N[predictions_N == labels_N], minlength=classes)
    with np.errstate(invalid="ignore"):
        return right_C / total_C


def shot_groups(class_counts_C: np.ndarray, *, many_above: int, few_below: int) -> dict[str, np.ndarray]:
    """Masks (C,) of the many-, medium- and few-shot classes by training images (Liu et al., CVPR 2019)."""
    many_C = class_counts_C > many_above
    few_C = class_counts_C < few_below
    return {"many": many_C, "medium": ~many_C & ~few_C, "few": few_C}


def ece(confidence_N: np.ndarray, right_N: np.ndarray, *, bins: int) -> float:
    """Expected calibration error (Guo et al., ICML 2017): the sum over equal-width bins (lo, hi] of their share of
    samples times |accuracy - mean confidence|. Best 0, worst 1."""
    index_N = np.clip(np.ceil(confidence_N * bins).astype(int) - 1, 0, bins - 1)
    right_K = np.bincount(index_N, weights=right_N, minlength=bins)
    confidence_K = np.bincount(index_N, weights=confidence_N, minlength=bins)
    return float(np.abs(right_K - confidence_K).sum() / len(right_N))


def summarize(
    logits_NC: np.ndarray,
    labels_N: np.ndarray,
    class_counts_C: np.ndarray,
    *,
    ece_bins: int,
    many_above: int,
    few_below: int,
) -> dict[str, float]:
    """The measures of one set of logits: accuracy, that of many, medium and few (mean over their samples; NaN where a
    group has none), balanced_error (mean over classes of 1 - class accuracy), nll, ece.

    Raises ValueError for bad logits or labels, or class counts of another length.
    """
    check(logits_NC, labels_N)
    if class_counts_C.shape != logits_NC.shape[1:]:
        raise ValueError(f"class counts have shape {class_counts_C.shape}; expected ({logits_NC.shape[1]},)")
    log_probability_NC = log_softmax(logits_NC.astype(np.float64), axis=1)
    predictions_N = logits_NC.argmax(1)
    right_N = predictions_N == labels_N
    groups = shot_groups(class_counts_C, many_above=many_above, few_below=few_below)
    measures = {"accuracy": float(right_N.mean())}
    for name, mask_C in groups.items():
        chosen_N = mask_C[labels_N]
        measures[name] = float(right_N[chosen_N].mean()) if chosen_N.any() else float("nan")
    per_class_C = class_accuracy(predictions_N, labels_N, len(class_counts_C))
    measures["balanced_error"] = float(1 - np.nanmean(per_class_C))
    measures["nll"] = float(-log_probability_NC[np.arange(len(labels_N)), labels_N].mean())
    measures["ece"] = ece(np.exp(log_probability_NC.max(1)), right_N, bins=ece_bins)
    return measures
