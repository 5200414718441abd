"""A small chain of steps as a program of its own, for tests that kill it or run several processes of it.

    python small_chain.py '{"folder": "...", "data": "d.npz", ...}'

Six classes of noise in steps of two, ResNet-8, two epochs a step; further keys replace those of TRAINING and RECIPE.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from longtail.incremental import predict, train
from longtail.workflow import files, processes, stage

FIRST = {
    "epochs": 2, "batch_size": 16, "drop_last": True, "accumulate": 1,
    "optimizer": {
        "lr": 0.05, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "muon_lr": 0, "muon_weight_decay": 0,
    },
    "schedule": {"warmup_epochs": 0, "shape": "cosine", "milestones": [], "factors": []},
    "weight_average": 0, "sync_batch_norm": False,
    "augmentation": {
        "crop_padding": 1, "flip": True, "policy": "none", "color_jitter": [0, 0, 0, 0], "rotation": 0, "cutout": 0,
    },
    "resolution": {"milestones": [], "scales": []}, "mixup_alpha": 0, "cutmix_alpha": 0,
    "normalization": {"mean": [0.4], "std": [0.3]},
    "network": {"depth": 8, "width": 4, "head": "linear", "scale": 1}, "precision": "fp32", "test_every": 0,
}  # fmt: skip
RECIPE = {
    "first": FIRST, "later": None, "weight_decay_by_step": False, "body": "option_a", "bias": True,
    "new_head": "copied", "positive_weights": False,
}  # fmt: skip
TRAINING = {
    "loss": "ce", "arguments": {}, "replay": True, "distillation": "share", "temperature": 2.0, "teacher": "raw",
    "start": "raw",
}  # fmt: skip
ORDER = {"listed": [4, 2, 0, 5, 1, 3]}
PROTOCOL = {
    "first_classes": 2, "step_classes": 2, "memory": 24, "memory_rule": "total", "selection": "herding",
    "held_out": 0.25,
}  # fmt: skip


def data(path: Path, train_size: int = 20, test_size: int = 5, seed: int = 0) -> Path:
    """Noise whose mean tells the class, six of them; the same images for the same seed."""
    rng = np.random.default_rng(seed)

    def split(size: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(6), size)
        images = rng.integers(0, 40, (len(labels), 8, 8, 1)) + 35 * labels[:, None, None, None]
        return images.astype(np.uint8), labels

    train_images, train_labels = split(train_size)
    test_images, test_labels = split(test_size)
    return files.save_arrays(
        path, train_images=train_images, train_labels=train_labels, test_images=test_images, test_labels=test_labels,
        class_names=np.array([f"class {c}" for c in range(6)]),
    )  # fmt: skip


def run(data_path: Path, out: Path, fingerprint: str = "small", **changes: Any) -> Path:
    """Train the chain below the working folder and write its model, history and predictions into `out`."""
    blocks = {"order": ORDER, "protocol": PROTOCOL, "recipe": RECIPE, "training": TRAINING}
    blocks = {name: {**block, **changes.get(name, {})} for name, block in blocks.items()}
    cell = {"plan": "p", "training": "t", "seed": str(changes.get("seed", 0))}
    train.run(
        cell, fingerprint, data=str(data_path), model=str(out / "model"), history=str(out / "history.csv"), **blocks
    )
    if processes.rank() == 0:
        del blocks["recipe"]
        predict.predict(
            str(data_path), str(out / "model"), str(out / "predictions.npz"), seed=int(cell["seed"]), **blocks
        )
    return out


if __name__ == "__main__":
    os.environ["LONGTAIL_QUIET"] = "1"
    options = json.loads(sys.argv[1])
    outs = [f"{options['out']}/{name}" for name in ("model", "history.csv", "predictions.npz")]
    stage.sweep(outs)  # as the pipeline does before a stage
    run(Path(options.pop("data")), Path(options.pop("out")), **options)
