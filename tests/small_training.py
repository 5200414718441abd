"""A small training as a program of its own, for tests that kill it or run several processes of it.

    python small_training.py '{"out": "last.safetensors", "checkpoint": "c.pt", "epochs": 3, ...}'

Trains a ResNet-8 on 47 images of noise in three classes and writes the last network, and the history beside it.
`die_in_write` (a number) kills the process in the middle of that write of a checkpoint.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from longtail import losses, networks
from longtail.data import batches
from longtail.training import engine, inference
from longtail.training.checkpoints import Checkpoint
from longtail.workflow import files, processes

RECIPE = {
    "epochs": 4, "batch_size": 8, "drop_last": False, "accumulate": 1,
    "optimizer": {
        "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4,
        "muon_lr": 0.01, "muon_weight_decay": 0.01,
    },
    "schedule": {"warmup_epochs": 1, "shape": "cosine", "milestones": [], "factors": []},
    "weight_average": 0.9, "sync_batch_norm": False,
    "augmentation": {
        "crop_padding": 1, "flip": True, "policy": "none", "color_jitter": [0, 0, 0, 0], "rotation": 10, "cutout": 2,
    },
    "resolution": {"milestones": [], "scales": []}, "mixup_alpha": 0.4, "cutmix_alpha": 0.5, "precision": "fp32",
    "test_every": 1,
}  # fmt: skip
METHODS = {
    "ce": {},
    "gala": {"variant": "released", "accumulation": "double", "lambda1": 1.0, "lambda2": 1.0},
    "balpoe": {"taus": [0.0, 2.0]},
    "composed": {
        "taus": [0.0, 2.0], "teach": 0.5, "teach_at": 0.0, "temperature": 2.0, "only_right": True, "focus": 0.5,
        "consensus": 0.0, "margin": 0.0, "margin_power": 0.25, "recall": 0.5,
    },
}  # fmt: skip


def split(every: int = 1) -> batches.Split:
    """Noise whose mean tells the class; every `every`-th image."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], (30, 12, 6))
    images = rng.integers(0, 60, (len(labels), 8, 8, 3)) + 60 * labels[:, None, None, None]
    return batches.Split.from_arrays(images.astype(np.uint8)[::every], labels[::every], 3, "cpu")


def train(
    method: str = "gala", seed: int = 0, checkpoint: Checkpoint | None = None, on_epoch=lambda row: None, **changes
) -> engine.Fitted:
    """The training, with changes to RECIPE."""
    whole = split()
    inference.set_up(seed)
    loss = losses.load(method)(torch.bincount(whole.labels), **METHODS[method])
    network = networks.ResNet(
        channels=3, classes=3, experts=loss.experts, depth=8, width=16, head="linear", scale=1.0,
        mean=[0.3] * 3, std=[0.3] * 3,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    return engine.fit(
        network, loss, whole, split(3), split(2), seed=seed, on_epoch=on_epoch,
        checkpoint=checkpoint or Checkpoint(None, ""), **{**RECIPE, **changes},
    )  # fmt: skip


def main() -> None:
    """Run it as the command line says."""
    options = json.loads(sys.argv[1])
    out, path = Path(options.pop("out")), options.pop("checkpoint", None)
    die_in_write = options.pop("die_in_write", None)
    processes.start(torch.device("cpu"))
    checkpoint = Checkpoint(path, "a training")
    if die_in_write is not None:
        writes = iter(range(die_in_write + 1))
        original = os.replace

        def replace(source: str, target: str) -> None:
            if next(writes, None) == die_in_write:
                data = Path(source).read_bytes()
                Path(source).write_bytes(data[: len(data) // 2])  # as the disk has it before all of it has arrived
                os.kill(os.getpid(), signal.SIGKILL)
            original(source, target)

        os.replace = replace
    fitted = train(checkpoint=checkpoint, **options)
    if processes.rank() == 0:
        files.write_bytes(out, fitted.last)
        files.write_json(out.with_suffix(".json"), {"history": fitted.history, "best_epoch": fitted.best_epoch})
        checkpoint.remove()
    processes.stop()


if __name__ == "__main__":
    main()
