"""A cell's saved logits: what the splits and networks in predictions.npz are called, and correcting them."""

from typing import Any

import numpy as np

from longtail import posthoc
from longtail.workflow import files

FITTED_ON = {"train": "train", "held_out": "held-out"}  # what a correction may see; test is not among them
NETWORKS = {"last": "last", "best": "best_on_held_out"}  # array prefix -> name in the results


def product(logits_ENC: np.ndarray) -> np.ndarray:
    """The prediction (N, C): the mean of the experts' logits."""
    return logits_ENC.mean(0, dtype=np.float64)


def align(predictions: str, **settings: Any) -> dict[str, Any]:
    """Fitted corrections {network: {correction: what posthoc's to_dict says, and energies}} of the saved logits.

    Args:
        predictions: path of a cell's predictions.npz.
        settings: of longtail.posthoc.EnergyAligning.

    Raises ValueError naming file and split when the logits cannot be corrected.
    """
    arrays = files.load_arrays(predictions)
    fitted: dict[str, Any] = {}
    for network in NETWORKS:
        for split, fitted_on in FITTED_ON.items():
            logits_ENC, labels_N = arrays.get(f"{network}_{split}_logits"), arrays.get(f"{split}_labels")
            if logits_ENC is None:
                continue
            corrections = fitted.setdefault(network, {})
            logits_NC = product(logits_ENC)
            try:
                aligning = posthoc.EnergyAligning(**settings).fit(logits_NC, labels_N, fitted_on=fitted_on)
                corrections[f"aligned_on_{split}"] = aligning.to_dict() | {
                    "energy": aligning.energy_,
                    "energy_after": aligning.energies(aligning.transform(logits_NC), labels_N),
                }
                if split == "train":
                    adjustment = posthoc.LogitAdjustment().fit(logits_NC, labels_N, fitted_on=fitted_on)
                    corrections["logit_adjusted"] = adjustment.to_dict()
            except ValueError as error:
                raise ValueError(f"{predictions}: {split} logits of the {network} network: {error}") from error
    return fitted
