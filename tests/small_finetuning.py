"""A small fine-tuning, or an extraction of features, as a program of its own, for tests that kill it.

    python small_finetuning.py '{"what": "tune", "step": 5}'

Works in the current folder, which has data.npz. `step` (from 1) and `shard` (from 1) are where it kills itself: in the
middle of that step of all, or of the write of that shard; a checkpoint is written after every step.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from longtail.finetuning import train, trunk
from longtail.training import engine, features
from longtail.training.checkpoints import Checkpoint

BACKBONE = {"library": "timm", "network": "test_efficientnet", "weights": "none", "resolution": 32}
RECIPE: dict[str, Any] = {
    "epochs": 3, "batch_size": 8, "drop_last": False, "accumulate": 1,
    "optimizer": {
        "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "muon_lr": 0, "muon_weight_decay": 0,
    },
    "schedule": {"warmup_epochs": 1, "shape": "cosine", "milestones": [], "factors": []},
    "weight_average": 0, "sync_batch_norm": False, "augmentation": train.PLAIN["augmentation"],
    "resolution": {"milestones": [], "scales": []}, "mixup_alpha": 0, "cutmix_alpha": 0, "precision": "fp32",
    "test_every": 1,
    "network": {
        "backbone": "small", "trained_groups": 1, "pretrained_lr": 0.1, "norm_statistics": "batch", "head": "cosine",
        "scale": 30.0,
    },
}  # fmt: skip
CELL = {"plan": "p", "dataset": "d", "recipe": "r", "method": "balpoe", "seed": "1"}


def arrays() -> dict[str, np.ndarray]:
    """Noise whose mean tells the class: 3 classes of 30, 12 and 6 images to train on."""
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {"class_names": np.array(["a", "b", "c"])}
    for split, sizes in (("train", (30, 12, 6)), ("held_out", (3, 3, 3)), ("test", (5, 5, 5))):
        labels = np.repeat([0, 1, 2], sizes)
        images = rng.integers(0, 60, (len(labels), 8, 8, 3)) + 60 * labels[:, None, None, None]
        found |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    return found


def tune(**changes: Any) -> None:
    """Fine-tune in the current folder."""
    train.train(
        CELL, "f" * 16, data="data.npz", recipe=RECIPE | changes, method={"taus": [0.0, 2.0]}, backbone=BACKBONE,
        model="model", history="history.csv",
    )  # fmt: skip


def die_in(owner: Any, name: str, call: int) -> None:
    """Have the `call`-th call of a function kill the process before it ends."""
    original, calls = getattr(owner, name), iter(range(1, call + 1))

    def dying(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, dying)


def main() -> None:
    """Run it as the command line says."""
    options = json.loads(sys.argv[1])
    Checkpoint.due = lambda self: True
    trunk.SHARD = features.SHARD = 16
    if "step" in options:
        die_in(engine.networks, "product", options["step"])  # after the backward pass, before the optimiser's step
    if "shard" in options:
        die_in(Path, "replace", options["shard"])
    if options["what"] == "tune":
        tune()
    else:
        features.extract("data.npz", "out.npz", fingerprint="f" * 16, **BACKBONE)


if __name__ == "__main__":
    main()
