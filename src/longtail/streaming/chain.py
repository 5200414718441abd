"""Class-incremental learning on images of an index: a chain of steps as longtail.incremental has it, images as here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from longtail.data import batches
from longtail.data.large.pixels import CHANNELS
from longtail.finetuning.train import NOT_OF_THE_ENGINE
from longtail.incremental import predict as incremental
from longtail.incremental.data import Chain
from longtail.incremental.train import Walk, follow
from longtail.losses import BaseLoss
from longtail.networks import Network
from longtail.streaming import sets
from longtail.streaming.images import Images
from longtail.streaming.train import announced, reading
from longtail.training import engine, inference
from longtail.workflow import processes


@dataclass
class Files:
    """The images of one split, with classes as positions in the order; what longtail.incremental.train.Images is."""

    images: Images
    labels_N: np.ndarray
    channels = CHANNELS

    def split(self, rows: np.ndarray, seen: int, device: torch.device) -> batches.Split:
        """Those rows. Raises ValueError for the label of a class not yet seen."""
        labels_N = self.labels_N[rows].astype(np.int64)
        if len(labels_N) and labels_N.max() >= seen:
            raise ValueError(f"label {labels_N.max()} is not in 0..{seen - 1}")
        return batches.Split(cast(Any, self.images.of(rows)), torch.from_numpy(labels_N).to(device), seen)


class FilesWalk(Walk):
    """The steps of a chain whose images are files."""

    def _fit(
        self, network: Network, objective: BaseLoss, train: batches.Split, recipe: dict[str, Any], **how: Any
    ) -> engine.Fitted:
        settings = {key: value for key, value in recipe.items() if key not in NOT_OF_THE_ENGINE}
        foreseen = announced(objective, train, recipe, how["seed"])
        return engine.fit(network, foreseen, train, None, None, **how, **settings)


def run(
    cell: dict[str, str],
    fingerprint: str,
    *,
    data: str,
    order: dict[str, Any],
    protocol: dict[str, Any],
    recipe: dict[str, Any],
    training: dict[str, Any],
    model: str,
    history: str,
) -> None:
    """As longtail.incremental.train.run; `data` is data/long_tail/<stream>.npz.

    Raises ValueError for images that are no longer what they were, too.
    """
    device = inference.find_device()
    processes.start(device)
    inference.set_up(int(cell["seed"]))  # finished steps are looked at, too, before one is trained
    stream = sets.load(data)
    chain = Chain.of(len(stream.class_names), order, protocol)
    with reading(stream, device) as splits:
        images: Any = _files(splits["train"], chain)
        follow(FilesWalk(cell, chain, images, recipe, training, device, fingerprint), Path(model), history)
    processes.stop()


def predict(data: str, model: str, out: str, *, order: dict, protocol: dict, training: dict, seed: int) -> None:
    """As longtail.incremental.predict.predict; `data` is data/long_tail/<stream>.npz."""
    stream = sets.load(data)
    chain = Chain.of(len(stream.class_names), order, protocol)
    with reading(stream, inference.find_device()) as splits:
        train, test = (cast(Any, _files(splits[name], chain)) for name in ("train", "test"))
        incremental.of_chain(chain, stream.class_names, train, test, model, out, training=training, seed=seed)


def _files(split: batches.Split, chain: Chain) -> Files:
    return Files(cast(Any, split.images), chain.positions(split.labels.cpu().numpy()))
