"""From weights to logits: the last step that needs a network. What follows takes seconds and no torch."""

from pathlib import Path

import numpy as np

from longtail import batches, engine, files, networks

SPLITS = ("train", "held_out", "test")


def predict(data: str, model: str, out: str) -> None:
    """Write the logits (E, N, C) of every split, without augmentation, for the last and the best network.

    Prediction is in float32 whatever the training's precision, so that it adds no rounding of its own.

    Raises ValueError when the weights are no network or do not fit the images.
    """
    arrays = files.load_arrays(data)
    device, classes = engine.device(), len(arrays["class_names"])
    engine.set_up(0)  # nothing is drawn; deterministic algorithms
    epochs = files.read_json(Path(model) / "epochs.json")
    predictions: dict[str, np.ndarray] = {
        "class_names": arrays["class_names"],
        "class_counts": np.bincount(arrays["train_labels"], minlength=classes),
    }
    nets = {
        which: networks.load(Path(model) / f"{which}.safetensors", device)
        for which in sorted(epochs)
    }
    for name in SPLITS:
        predictions[f"{name}_labels"] = arrays[f"{name}_labels"]
        if not len(arrays[f"{name}_labels"]):
            continue
        split = batches.Split.from_arrays(
            arrays[f"{name}_images"], arrays[f"{name}_labels"], classes, device
        )
        for which, network in nets.items():
            predictions[f"{which}_{name}_logits"] = engine.logits(
                network, split, precision="fp32"
            ).numpy()
    for which, epoch in epochs.items():
        predictions[f"{which}_epoch"] = np.array(epoch)
    files.save_arrays(out, **predictions)
