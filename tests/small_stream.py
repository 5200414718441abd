"""A small training on images that are files, as a program of its own, for tests that kill it or have two processes.

    python small_stream.py '{"step": 5}'
    python small_stream.py '{"chain": {}, "step": 9}'      # class-incremental, two classes a step

Works in the current folder, which has data.npz, a stream. `step` (from 1) is where it kills itself: in the middle of
that step of all; `chunk`, the pixels that are augmented in one go. A checkpoint is written after every step. What each
process saw lies in seen-<rank>.npz.
"""

import json
import os
import signal
import sys
from typing import Any

import numpy as np
import torch

from longtail.data import batches
from longtail.streaming import chain, train
from longtail.training import engine
from longtail.training.checkpoints import Checkpoint
from longtail.workflow import processes

RECIPE: dict[str, Any] = {
    "epochs": 2, "batch_size": 16, "drop_last": False, "accumulate": 1,
    "optimizer": {
        "lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "muon_lr": 0, "muon_weight_decay": 0,
    },
    "schedule": {"warmup_epochs": 0, "shape": "cosine", "milestones": [], "factors": []},
    "weight_average": 0, "sync_batch_norm": False,
    "augmentation": {
        "crop_padding": 0, "flip": True, "policy": "none", "color_jitter": [0.4, 0.4, 0.4, 0], "rotation": 0,
        "cutout": 0,
    },
    "window": {"scale": [0.08, 1.0], "ratio": [0.75, 1.3333333]},
    "resolution": {"milestones": [], "scales": []}, "mixup_alpha": 0.3, "cutmix_alpha": 0, "precision": "fp32",
    "normalization": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    "network": {"architecture": "resnet10", "head": "cosine", "scale": 30.0},
    "test_every": 1,
}  # fmt: skip
CELL = {"plan": "p", "dataset": "d", "recipe": "r", "method": "balpoe", "seed": "1"}
BACKBONE = {"library": "timm", "network": "test_efficientnet", "weights": "none", "resolution": 32}
PROTOCOL = {
    "first_classes": 2, "step_classes": 2, "memory": 10, "memory_rule": "total", "selection": "herding",
    "held_out": 0.2,
}  # fmt: skip
CHAIN = {
    "later": None, "weight_decay_by_step": True, "body": "torchvision", "bias": True, "new_head": "copied",
    "positive_weights": False,
}  # fmt: skip
DISTILLED = {
    "loss": "ce", "arguments": {}, "replay": True, "distillation": "share", "temperature": 2.0,
    "teacher": "weight_aligning", "start": "raw",
}  # fmt: skip
TUNED = {
    "backbone": "small", "trained_groups": 1, "pretrained_lr": 0.1, "norm_statistics": "frozen", "head": "cosine",
    "scale": 30.0,
}  # fmt: skip


def run(backbone: dict[str, Any] | None = None, method: str = "balpoe", **changes: Any) -> None:
    """Train in the current folder."""
    train.train(
        CELL | {"method": method}, "f" * 16, data="data.npz", recipe=RECIPE | changes,
        method={"taus": [0.0, 2.0]} if method == "balpoe" else {}, backbone=backbone, model="model",
        history="history.csv",
    )  # fmt: skip


def settings(first: dict[str, Any]) -> dict[str, Any]:
    """What a chain of `first` and of two classes a step is given."""
    network = {"architecture": "resnet18", "head": "linear", "scale": 1.0}
    changed = {"network": network, "batch_size": 8, "drop_last": True, "test_every": 0, "mixup_alpha": 0}
    recipe = CHAIN | {"first": RECIPE | changed | first}
    return {"order": {"numpy_seed": 1993}, "protocol": PROTOCOL, "recipe": recipe, "training": DISTILLED}


def run_chain(**changes: Any) -> None:
    """Train a chain of steps in the current folder."""
    cell = {"plan": "p", "dataset": "d", "seed": "1"}
    chain.run(cell, "f" * 16, data="data.npz", model="model", history="history.csv", **settings(changes))


def main(options: dict[str, Any]) -> None:
    """Train, seeing to it that every step leaves a checkpoint, and die where it is asked for."""
    steps, dies, seen = 0, options.pop("step", 0), []
    batches.CHUNK_PIXELS = options.pop("chunk", batches.CHUNK_PIXELS)
    if "lr" in options:
        options["optimizer"] = RECIPE["optimizer"] | {"lr": options.pop("lr")}
    original, due = engine.Training.step, Checkpoint.due

    def step(training: engine.Training, batch: Any) -> None:
        nonlocal steps
        steps += 1
        original(training, batch)
        seen.append((batch.images.numpy(), batch.places.numpy()))
        if steps == dies:
            os.kill(os.getpid(), signal.SIGKILL)

    engine.Training.step = step  # type: ignore[method-assign]
    Checkpoint.due = lambda self: self.path is not None  # type: ignore[method-assign]
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    if "chain" in options:
        run_chain(**options["chain"])
    else:
        run(**options)
    Checkpoint.due = due  # type: ignore[method-assign]
    arrays = {f"images_{n}": images for n, (images, _) in enumerate(seen)}
    arrays |= {f"places_{n}": places for n, (_, places) in enumerate(seen)}
    np.savez(f"seen-{rank}.npz", **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":  # workers that decode are spawned, and load this file
    processes.launch()
    main(json.loads(sys.argv[1]))
