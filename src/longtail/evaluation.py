"""From saved logits to corrections and measures: numpy only, seconds for a whole plan."""

from typing import Any

import numpy as np

from longtail import alignment, files, metrics

FITTED_ON = ("train", "held_out")  # what a correction may see; test is not among them
NETWORKS = {"last": "last", "best": "best_on_held_out"}  # array prefix -> name in the results


def product(logits_ENC: np.ndarray) -> np.ndarray:
    """The prediction (N, C): the mean of the experts' logits."""
    return logits_ENC.mean(0, dtype=np.float64)


def align(predictions: str, **settings: Any) -> dict[str, Any]:
    """Energies and shifts {network: {fitted on: {energy, energy_after, shift}}} of the saved logits.

    Args:
        predictions: path of a cell's predictions.npz.
        settings: of longtail.alignment.fit.

    Raises ValueError naming file and split when the logits cannot be aligned.
    """
    arrays = files.load_arrays(predictions)
    fitted: dict[str, Any] = {}
    for network in NETWORKS:
        for split in FITTED_ON:
            logits_ENC = arrays.get(f"{network}_{split}_logits")
            if logits_ENC is None:
                continue
            try:
                fit = alignment.fit(product(logits_ENC), arrays[f"{split}_labels"], **settings)
            except ValueError as error:
                raise ValueError(f"{predictions}: {split} logits of the {network} network: {error}") from error
            fitted.setdefault(network, {})[split] = fit
    return fitted


def corrected(logits_NC: np.ndarray, shifts: dict[str, Any]) -> dict[str, np.ndarray]:
    """The logits as they are and after each alignment, by the name of the row."""
    aligned = {
        f"aligned_on_{split}": logits_NC + np.asarray(fit["shift"]) for split, fit in shifts.items()
    }
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
