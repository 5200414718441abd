"""From saved logits to corrections and measures: numpy only, seconds for a whole plan."""

from typing import Any

import numpy as np

from longtail import files, metrics, posthoc
from longtail.predictions import NETWORKS, product


def corrected(logits_NC: np.ndarray, fitted: dict[str, Any]) -> dict[str, np.ndarray]:
    """The logits as they are and after each correction, by the name of the row.

    Prediction re-balancing is the one that is fitted here, on the logits that it corrects: GALA's, as published.
    """
    rebalancing = posthoc.PredictionRebalancing().fit(logits_NC, fitted_on="test")
    return {
        "raw": logits_NC,
        **{name: posthoc.from_dict(correction).transform(logits_NC) for name, correction in fitted.items()},
        "rebalanced_on_test": rebalancing.transform(logits_NC),
    }


def evaluate(
    predictions: str, alignment_file: str, *, ece_bins: int, many_above: int, few_below: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measures on test of each network before and after correction, and the last network's accuracy of each class.

    Raises ValueError naming the file when logits or corrections do not fit.
    """
    arrays = files.load_arrays(predictions)
    corrections = files.read_json(alignment_file)
    labels_N, counts_C = arrays["test_labels"], arrays["class_counts"]
    results: dict[str, Any] = {}
    classes: list[dict[str, Any]] = []
    for network, name in NETWORKS.items():
        if f"{network}_test_logits" not in arrays:
            continue
        versions = corrected(product(arrays[f"{network}_test_logits"]), corrections[network])
        results[name] = {"epoch": int(arrays[f"{network}_epoch"])}
        for version, logits_NC in versions.items():
            results[name][version] = metrics.summarize(
                logits_NC,
                labels_N,
                counts_C,
                ece_bins=ece_bins,
                many_above=many_above,
                few_below=few_below,
            )
        if network == "last":
            columns = {
                version: metrics.class_accuracy(logits_NC.argmax(1), labels_N, len(counts_C))
                for version, logits_NC in versions.items()
            }
            classes = [
                {
                    "class": c,
                    "name": str(name),
                    "train_images": counts_C[c],
                    **{v: a[c] for v, a in columns.items()},
                }
                for c, name in enumerate(arrays["class_names"])
            ]
    return results, classes
