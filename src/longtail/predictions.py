"""A cell's saved logits: what the splits and networks in predictions.npz are called, and aligning them."""

from typing import Any

import numpy as np

from longtail import alignment, files

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
