"""Measures of logits against labels. Fractions, not percent; NLL in nats. docs/measures.md has them in one table.

N samples, C classes, K bins. "Classes" are those that have samples; on a balanced test set that is all of them.
"""

from collections.abc import Iterator

import numpy as np
from scipy.special import log_softmax

from longtail.posthoc.inputs import check

TOP = 5
RESAMPLED = ("accuracy", "nll", "ece")  # those whose standard error over images is estimated
DRAWS = 200  # bootstrap samples: the standard error is then known to about 5 %


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


# ------------------------------------------------------------------------------------------ of predictions


def rank(logits_NC: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Place (N,) of the true class, 0 the first; of equal logits the lower class comes first, as argmax has it."""
    own_N1 = np.take_along_axis(logits_NC, labels_N[:, None], 1)
    before_NC = np.arange(logits_NC.shape[1]) < labels_N[:, None]
    return ((logits_NC > own_N1) | ((logits_NC == own_N1) & before_NC)).sum(1)


def macro_f1(predictions_N: np.ndarray, labels_N: np.ndarray, classes: int) -> float:
    """Mean over classes that occur among labels or predictions of 2 right / (samples + predictions)."""
    occurs_C = np.bincount(labels_N, minlength=classes) + np.bincount(predictions_N, minlength=classes)
    right_C = np.bincount(labels_N[predictions_N == labels_N], minlength=classes)
    seen_C = occurs_C > 0
    return float((2 * right_C[seen_C] / occurs_C[seen_C]).mean())


def geometric_mean(accuracy_C: np.ndarray) -> float:
    """Geometric mean of class accuracies (Kubat & Matwin, ICML 1997); 0 as soon as one class is never recognised."""
    known = accuracy_C[~np.isnan(accuracy_C)]
    return float(np.exp(np.log(known).mean())) if (known > 0).all() else 0.0


# ----------------------------------------------------------------------------------------- of probabilities


def bin_index(confidence_N: np.ndarray, bins: int) -> np.ndarray:
    """The equal-width bin (lo, hi] (N,) of each confidence; 0 belongs to the first."""
    return np.clip(np.ceil(confidence_N * bins).astype(int) - 1, 0, bins - 1)


def ece(confidence_N: np.ndarray, right_N: np.ndarray, *, bins: int) -> float:
    """Expected calibration error (Guo et al., ICML 2017): the sum over equal-width bins of their share of samples times
    |accuracy - mean confidence|. Best 0, worst 1."""
    gap_K = np.bincount(bin_index(confidence_N, bins), weights=right_N - confidence_N, minlength=bins)
    return float(np.abs(gap_K).sum() / len(right_N))


def mce(confidence_N: np.ndarray, right_N: np.ndarray, *, bins: int) -> float:
    """Maximum calibration error (Guo et al., ICML 2017): the largest |accuracy - mean confidence| of a bin that has
    samples, however few they are."""
    index_N = bin_index(confidence_N, bins)
    count_K = np.bincount(index_N, minlength=bins)
    gap_K = np.bincount(index_N, weights=right_N - confidence_N, minlength=bins)
    return float(np.max(np.abs(gap_K[count_K > 0]) / count_K[count_K > 0]))


def ece_equal_mass(confidence_N: np.ndarray, right_N: np.ndarray, *, bins: int) -> float:
    """ECE over bins of equally many samples, by confidence (Nguyen & O'Connor, EMNLP 2015; Nixon et al., CVPRW 2019).

    Equal confidences can fall into two bins; they are put in order of their place.
    """
    order_N = np.argsort(confidence_N, kind="stable")
    parts = np.array_split((right_N - confidence_N)[order_N], bins)
    return float(sum(abs(part.sum()) for part in parts) / len(right_N))


def classwise_ece(probability_NC: np.ndarray, labels_N: np.ndarray, *, bins: int) -> float:
    """Mean over all classes of the ECE of p(class) against 'is of this class' (Kull et al., NeurIPS 2019, eq. 3)."""
    return float(np.mean([ece(p_N, labels_N == c, bins=bins) for c, p_N in enumerate(probability_NC.T)]))


def brier(probability_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean squared distance of the probabilities from the one-hot label (Brier 1950). Best 0, worst 2."""
    own_N = np.take_along_axis(probability_NC, labels_N[:, None], 1)[:, 0]
    return float((np.square(probability_NC).sum(1) - 2 * own_N + 1).mean())


def aurc(confidence_N: np.ndarray, right_N: np.ndarray) -> float:
    """Area under the risk-coverage curve (Geifman & El-Yaniv, NIPS 2017): the mean over k of the error among the k most
    confident samples. Samples of one confidence share their error, so that their order does not matter."""
    _, group_N = np.unique(-confidence_N, return_inverse=True)
    wrong_G = np.bincount(group_N, weights=np.logical_not(right_N)) / np.bincount(group_N)
    wrong_N = wrong_G[np.sort(group_N)]
    return float((np.cumsum(wrong_N) / np.arange(1, len(wrong_N) + 1)).mean())


def reliability(confidence_N: np.ndarray, right_N: np.ndarray, *, bins: int) -> Iterator[dict[str, float]]:
    """A row {low, high, images, confidence, accuracy} for each equal-width bin that has samples, lowest first."""
    index_N = bin_index(confidence_N, bins)
    for k in np.unique(index_N):
        inside_N = index_N == k
        yield {
            "low": k / bins, "high": (k + 1) / bins, "images": int(inside_N.sum()),
            "confidence": float(confidence_N[inside_N].mean()), "accuracy": float(right_N[inside_N].mean()),
        }  # fmt: skip


def standard_errors(right_N: np.ndarray, nll_N: np.ndarray, confidence_N: np.ndarray, *, bins: int) -> dict[str, float]:
    """Standard error over images of RESAMPLED: the standard deviation over DRAWS bootstrap samples of the images.

    The samples are the same for the same number of images.
    """
    rng, size = np.random.default_rng(0), len(right_N)
    found = []
    for _ in range(DRAWS):
        some = rng.integers(0, size, size)
        found.append((right_N[some].mean(), nll_N[some].mean(), ece(confidence_N[some], right_N[some], bins=bins)))
    return dict(zip(RESAMPLED, map(float, np.std(found, axis=0, ddof=1)), strict=True))


def summarize(
    logits_NC: np.ndarray,
    labels_N: np.ndarray,
    class_counts_C: np.ndarray,
    *,
    ece_bins: int,
    many_above: int,
    few_below: int,
) -> dict[str, float]:
    """The measures of one set of logits, by name.

    accuracy and top5 (mean over samples), accuracy of many, medium and few (mean over their samples; NaN where a
    group has none), balanced_error (mean over classes of 1 - class accuracy), geometric_mean and worst_class of class
    accuracies, macro_f1; nll, brier, ece, ece_equal_mass, mce, classwise_ece, aurc.

    Raises ValueError for bad logits or labels, or class counts of another length.
    """
    check(logits_NC, labels_N)
    if class_counts_C.shape != logits_NC.shape[1:]:
        raise ValueError(f"class counts have shape {class_counts_C.shape}; expected ({logits_NC.shape[1]},)")
    predictions_N, right_N, nll_N, probability_NC = by_image(logits_NC, labels_N)
    confidence_N = probability_NC.max(1)
    measures = {"accuracy": float(right_N.mean()), "top5": float((rank(logits_NC, labels_N) < TOP).mean())}
    for name, mask_C in shot_groups(class_counts_C, many_above=many_above, few_below=few_below).items():
        chosen_N = mask_C[labels_N]
        measures[name] = float(right_N[chosen_N].mean()) if chosen_N.any() else float("nan")
    accuracy_C = class_accuracy(predictions_N, labels_N, len(class_counts_C))
    return measures | {
        "balanced_error": float(1 - np.nanmean(accuracy_C)),
        "geometric_mean": geometric_mean(accuracy_C),
        "worst_class": float(np.nanmin(accuracy_C)),
        "macro_f1": macro_f1(predictions_N, labels_N, len(class_counts_C)),
        "nll": float(nll_N.mean()),
        "brier": brier(probability_NC, labels_N),
        "ece": ece(confidence_N, right_N, bins=ece_bins),
        "ece_equal_mass": ece_equal_mass(confidence_N, right_N, bins=ece_bins),
        "mce": mce(confidence_N, right_N, bins=ece_bins),
        "classwise_ece": classwise_ece(probability_NC, labels_N, bins=ece_bins),
        "aurc": aurc(confidence_N, right_N),
    }


def by_image(logits_NC: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Predictions (N,), whether they are right (N,), NLL of the label (N,), probabilities (N, C)."""
    log_probability_NC = log_softmax(logits_NC.astype(np.float64), axis=1)
    predictions_N = logits_NC.argmax(1)
    nll_N = -np.take_along_axis(log_probability_NC, labels_N[:, None], 1)[:, 0]
    return predictions_N, predictions_N == labels_N, nll_N, np.exp(log_probability_NC)
