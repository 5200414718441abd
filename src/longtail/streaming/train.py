"""One cell on images of an index: a ResNet from scratch, or a pretrained backbone that is fine-tuned."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from longtail import networks
from longtail.data import batches
from longtail.data.large import feed
from longtail.data.large.pixels import CHANNELS
from longtail.finetuning import train as finetuning
from longtail.losses import BaseLoss
from longtail.networks import tuned
from longtail.streaming import sets
from longtail.streaming.images import PART, Foreseen, Images, as_window, requests
from longtail.training import cell as plain
from longtail.training import engine, inference
from longtail.workflow import processes


def train(
    cell: dict[str, str],
    fingerprint: str,
    *,
    data: str,
    recipe: dict[str, Any],
    method: dict[str, Any],
    backbone: dict[str, Any] | None,
    model: str,
    history: str,
) -> None:
    """Train the cell and write its weights and provenance (folder `model`) and a row an epoch (`history`).

    Args:
        cell: plan, dataset, recipe, method, seed.
        fingerprint: of everything that determines the result; checkpoints and tracking go by it.
        data: data/long_tail/<stream>.npz.
        recipe, method, backbone: the blocks of params.yaml; backbone where the recipe fine-tunes one.

    Raises ValueError for images that are no longer what they were, FloatingPointError for a loss that is not finite.
    """
    device, seed = inference.find_device(), int(cell["seed"])
    processes.start(device)
    inference.set_up(seed)
    stream = sets.load(data)
    with reading(stream, device) as splits:
        network, loss, write = _build(splits["train"], cell["method"], method, recipe, backbone, seed, model, history)
        foreseen = announced(loss, splits["train"], recipe, seed)
        looks = {name: split for name, split in splits.items() if name != "test" or recipe["test_every"]}
        finetuning.run(
            cell, fingerprint, network, foreseen, looks, recipe=recipe, method=method, device=device, model=model,
            write=write,
        )  # fmt: skip
    processes.stop()


@contextmanager
def reading(stream: sets.Stream, device: torch.device) -> Iterator[dict[str, batches.Split]]:
    """The splits of a data set that have images, whose images are read as they are asked for."""
    if device.type == "cuda":  # where pages are pinned, else on the first
        torch.cuda.set_device(device)
    part_bytes = PART * stream.square.side**2 * CHANNELS
    with feed.Reader(stream.store, part_bytes, pinned=device.type == "cuda") as reader:
        yield {
            name: batches.Split(
                cast(Any, Images(reader, stream.pieces[name], stream.square, device)),
                torch.from_numpy(labels.astype(np.int64)).to(device),
                len(stream.class_names),
            )
            for name, labels in stream.labels.items()
            if len(labels)
        }


def announced(loss: BaseLoss, train: batches.Split, recipe: dict[str, Any], seed: int) -> BaseLoss:
    """The loss, which says to the images of `train` what each epoch is going to ask for."""
    images = cast(Any, train.images)

    def begin(epoch: int, batch: int) -> None:
        images.begin(
            as_window(images.square, recipe.get("window")),
            requests(
                train, epoch=epoch, start_batch=batch, seed=seed, class_balanced=loss.class_balanced_sampling,
                rank=processes.rank(), world=processes.world(),
                **{key: recipe[key] for key in ("batch_size", "drop_last", "mixup_alpha", "cutmix_alpha")},
            ),
        )  # fmt: skip

    return Foreseen(loss, begin)


def _build(
    train: batches.Split, name: str, method: dict[str, Any], recipe: dict[str, Any], backbone: dict[str, Any] | None,
    seed: int, model: str, history: str,
) -> tuple[networks.Network, BaseLoss, Any]:  # fmt: skip
    """The network that is trained, its loss, and what writes it."""
    if backbone is None:
        network, loss = plain.build(train, name, method, **recipe)
        return network, loss, lambda fitted: plain._write(fitted, Path(model), history)
    whole, loss = finetuning.build(train, name, method, backbone, recipe["network"], seed)
    trained = tuned.Trainable(whole, from_trunk=False)
    slower = finetuning.Slower(loss, trained.pretrained(), recipe["network"]["pretrained_lr"])

    def write(fitted: engine.Fitted) -> None:
        finetuning.write(whole, fitted, Path(model), history)

    return trained, slower, write
