"""Logits of fine-tuned networks, and other heads for them: what longtail.training does, with the trunk once for all."""

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from longtail import networks
from longtail.data import batches
from longtail.finetuning import trunk
from longtail.networks import tuned
from longtail.training import inference, machine, provenance
from longtail.training.refit import refit as refit_heads
from longtail.workflow import files


def predict(data: str, model: str, out: str) -> None:
    """Write the logits (E, N, C) of every split, as `longtail.training.inference.predict` does.

    Raises ValueError when the weights are no fine-tuned network or do not fit the images.
    """
    arrays = files.load_arrays(data)
    device, classes = inference.find_device(), len(arrays["class_names"])
    inference.set_up(0)  # nothing is drawn; deterministic algorithms
    epochs = files.read_json(Path(model) / "epochs.json")
    found: dict[str, np.ndarray] = {
        "class_names": arrays["class_names"],
        "class_counts": np.bincount(arrays["train_labels"], minlength=classes),
    }
    found |= {f"{name}_labels": arrays[f"{name}_labels"] for name in inference.SPLITS}
    splits = batches.splits(arrays, device)
    for which, epoch in sorted(epochs.items()):
        network = tuned.load(Path(model) / f"{which}.safetensors", device)
        for name, split in splits.items():
            inputs = trunk.passed(network, {name: split})[name]
            runs = tuned.Trainable(network, from_trunk=inputs.images.dtype == torch.float32)
            found[f"{which}_{name}_logits"] = inference.logits(runs, inputs, precision="fp32").numpy()
        found[f"{which}_epoch"] = np.array(epoch)
    by = [*provenance.read(model), provenance.record("predict", device, precision="fp32")]
    found["provenance"] = np.array(json.dumps(by))
    files.save_arrays(out, **found)


def refit(
    fingerprint: str, *, data: str, model: str, history: str, way: str, seed: int, out: str, history_out: str,
    **settings: Any,
) -> None:  # fmt: skip
    """Give the networks in folder `model` other heads and write them to folder `out`, as longtail.training.refit.run.

    Raises ValueError for settings or arrays that do not fit.
    """
    begun = perf_counter()
    device = inference.find_device()
    splits = batches.splits(files.load_arrays(data), device)
    inference.set_up(seed)  # before the trunk is passed: what it gives is kept, and other cells take it
    for which in files.read_json(Path(model) / "epochs.json"):
        network = tuned.load(Path(model) / f"{which}.safetensors", device)
        inputs = trunk.passed(network, {name: split for name, split in splits.items() if name != "test"})
        runs = tuned.Trainable(network, from_trunk=inputs["train"].images.dtype == torch.float32)
        inference.set_up(seed)  # the same draws for each
        refit_heads(runs, inputs, way, **settings)
        network.settings["head"] = runs.settings["head"]
        networks.save(network, Path(out) / f"{which}.safetensors")
    files.write_bytes(Path(out) / "epochs.json", (Path(model) / "epochs.json").read_bytes())
    files.write_bytes(history_out, Path(history).read_bytes())
    provenance.write(out, [*provenance.read(model), provenance.record("refit", device, precision="fp32")])
    machine.write(out, fingerprint, device, seconds=perf_counter() - begun)
