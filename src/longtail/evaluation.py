"""From saved logits to corrections and measures: numpy only, seconds for a whole plan."""

from typing import Any

import numpy as np

from longtail import distributions, files, metrics, posthoc
from longtail.predictions import NETWORKS, product

REBALANCED = "rebalanced_on_test"


def corrected(logits_NC: np.ndarray, fitted: dict[str, Any]) -> dict[str, np.ndarray]:
    """The logits as they are and after each correction that was fitted elsewhere, by the name of the row."""
    return {
        "raw": logits_NC,
        **{name: posthoc.from_dict(correction).transform(logits_NC) for name, correction in fitted.items()},
    }


def evaluate(
    predictions: str,
    alignment_file: str,
    *,
    ece_bins: int,
    many_above: int,
    few_below: int,
    distribution_ratios: list[int],
    distribution_draws: int,
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Measures on test of each network before and after correction.

    Returns the measures, and of the last network the accuracy of each class, and that under other distributions of
    the test images. Prediction re-balancing is the one correction that is fitted here, on the logits that it
    corrects: GALA's, as published.

    Raises ValueError naming the file when logits or corrections do not fit.
    """
    arrays = files.load_arrays(predictions)
    corrections = files.read_json(alignment_file)
    labels_N, counts_C = arrays["test_labels"], arrays["class_counts"]
    settings = {"ece_bins": ece_bins, "many_above": many_above, "few_below": few_below}
    results: dict[str, Any] = {}
    classes: list[dict[str, Any]] = []
    shifted: list[dict[str, Any]] = []
    for network, name in NETWORKS.items():
        if f"{network}_test_logits" not in arrays:
            continue
        logits_NC = product(arrays[f"{network}_test_logits"])
        elsewhere = corrected(logits_NC, corrections[network])
        rebalancing = posthoc.PredictionRebalancing().fit(logits_NC, fitted_on="test")
        versions = {**elsewhere, REBALANCED: rebalancing.transform(logits_NC)}
        results[name] = {"epoch": int(arrays[f"{network}_epoch"])} | {
            version: metrics.summarize(values_NC, labels_N, counts_C, **settings)
            for version, values_NC in versions.items()
        }
        if network == "last":
            classes = _by_class(versions, labels_N, counts_C, arrays["class_names"])
            shifted = distributions.evaluate(
                elsewhere, labels_N, counts_C, ratios=distribution_ratios, draws=distribution_draws,
                transductive={REBALANCED: rebalancing},
            )  # fmt: skip
    return results, classes, shifted


def _by_class(
    versions: dict[str, np.ndarray], labels_N: np.ndarray, counts_C: np.ndarray, names: np.ndarray
) -> list[dict[str, Any]]:
    columns = {
        version: metrics.class_accuracy(logits_NC.argmax(1), labels_N, len(counts_C))
        for version, logits_NC in versions.items()
    }
    return [
        {"class": c, "name": str(name), "train_images": counts_C[c], **{v: a[c] for v, a in columns.items()}}
        for c, name in enumerate(names)
    ]
