"""From saved logits to corrections and measures: numpy only, seconds for a whole plan."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longtail import posthoc
from longtail.evaluation import distributions, metrics
from longtail.posthoc.predictions import FITTED_ON, NETWORKS, product
from longtail.workflow import files

REBALANCED = "rebalanced_on_test"
RELIABILITY = ("correction", "low", "high", "images", "confidence", "accuracy")
RIGHT = ("correction", "images", "right")


@dataclass
class Evaluated:
    """What is known of a cell on test; all but `measures` is of the last network.

    Attributes:
        measures: {network: {"epoch": ..., correction: {measure: value}}}, and `provenance` where it is known: what
            made the logits, a record a step (longtail.training.provenance).
        classes: a row for each class, with the accuracy after each correction, and the free energies of aligning.
        distributions: accuracy under other distributions of the test images.
        reliability: a row for each correction and bin of confidence, with the columns RELIABILITY.
        right: which images are recognised, a row for each correction, with the columns RIGHT.
    """

    measures: dict[str, Any] = field(default_factory=dict)
    classes: list[dict[str, Any]] = field(default_factory=list)
    distributions: list[dict[str, Any]] = field(default_factory=list)
    reliability: list[dict[str, Any]] = field(default_factory=list)
    right: list[dict[str, Any]] = field(default_factory=list)


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
) -> Evaluated:
    """Measures on test of each network before and after correction.

    Prediction re-balancing is the one correction that is fitted here, on the logits that it corrects: GALA's, as
    published.

    Raises ValueError naming the file when logits or corrections do not fit.
    """
    arrays = files.load_arrays(predictions)
    corrections = files.read_json(alignment_file)
    labels_N, counts_C = arrays["test_labels"], arrays["class_counts"]
    settings = {"ece_bins": ece_bins, "many_above": many_above, "few_below": few_below}
    found = Evaluated()
    if "provenance" in arrays:  # logits that were made before it was kept have none
        found.measures["provenance"] = json.loads(str(arrays["provenance"]))
    for network, name in NETWORKS.items():
        if f"{network}_test_logits" not in arrays:
            continue
        logits_NC = product(arrays[f"{network}_test_logits"])
        elsewhere = corrected(logits_NC, corrections[network])
        rebalancing = posthoc.PredictionRebalancing().fit(logits_NC, fitted_on="test")
        versions = {**elsewhere, REBALANCED: rebalancing.transform(logits_NC)}
        found.measures[name] = {"epoch": int(arrays[f"{network}_epoch"])} | {
            version: metrics.summarize(values_NC, labels_N, counts_C, **settings)
            for version, values_NC in versions.items()
        }
        if network == "last":
            energies = {
                f"energy_{when}_{split}": corrections[network][f"aligned_on_{split}"][key]
                for split in FITTED_ON if f"aligned_on_{split}" in corrections[network]
                for when, key in (("before", "energy"), ("after", "energy_after"))
            }  # fmt: skip
            found.classes = _by_class(versions, energies, labels_N, counts_C, arrays["class_names"])
            for version, values_NC in versions.items():
                _by_image(found, version, values_NC, labels_N, ece_bins)
            found.distributions = distributions.evaluate(
                elsewhere, labels_N, counts_C, ratios=distribution_ratios, draws=distribution_draws,
                transductive={REBALANCED: rebalancing},
            )  # fmt: skip
    return found


def _by_image(found: Evaluated, version: str, logits_NC: np.ndarray, labels_N: np.ndarray, bins: int) -> None:
    """Add what is known of single images."""
    _, right_N, nll_N, probability_NC = metrics.by_image(logits_NC, labels_N)
    confidence_N = probability_NC.max(1)
    errors = metrics.standard_errors(right_N, nll_N, confidence_N, bins=bins)
    found.measures["last"][version]["standard_error"] = errors
    found.reliability += [
        {"correction": version, **row} for row in metrics.reliability(confidence_N, right_N, bins=bins)
    ]
    found.right.append({"correction": version, "images": len(right_N), "right": pack(right_N)})


def pack(right_N: np.ndarray) -> str:
    """Which images are right, eight to a byte, in hexadecimal digits."""
    return np.packbits(right_N).tobytes().hex()


def _by_class(
    versions: dict[str, np.ndarray],
    energies: dict[str, list[float]],
    labels_N: np.ndarray,
    counts_C: np.ndarray,
    names: np.ndarray,
) -> list[dict[str, Any]]:
    columns: dict[str, Any] = {
        version: metrics.class_accuracy(logits_NC.argmax(1), labels_N, len(counts_C))
        for version, logits_NC in versions.items()
    } | energies
    return [
        {"class": c, "name": str(name), "train_images": counts_C[c], **{v: a[c] for v, a in columns.items()}}
        for c, name in enumerate(names)
    ]
