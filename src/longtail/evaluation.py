"""From saved logits to corrections and measures: numpy only, seconds for a whole plan."""

from typing import Any

import numpy as np

from longtail import files, metrics
from longtail.predictions import NETWORKS, product


def corrected(logits_NC: np.ndarray, shifts: dict[str, Any]) -> dict[str, np.ndarray]:
    """The logits as they are and after each alignment, by the name of the row."""
    aligned = {f"aligned_on_{split}": logits_NC + np.asarray(fit["shift"]) for split, fit in shifts.items()}
    return {"raw": logits_NC, **aligned}


def evaluate(
    predictions: str, alignment_file: str, *, ece_bins: int, many_above: int, few_below: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measures on test of each network before and after alignment, and the last network's accuracy of each class.

    Raises ValueError naming the file when logits or shifts do not fit.
    """
    arrays = files.load_arrays(predictions)
    shifts = files.read_json(alignment_file)
    labels_N, counts_C = arrays["test_labels"], arrays["class_counts"]
    results: dict[str, Any] = {}
    classes: list[dict[str, Any]] = []
    for network, name in NETWORKS.items():
        if f"{network}_test_logits" not in arrays:
            continue
        versions = corrected(product(arrays[f"{network}_test_logits"]), shifts[network])
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
