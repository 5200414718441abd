"""The training loop: one network, one loss, one recipe, one seed. Nothing in it knows a method's name.

Every random draw of an epoch comes from (seed, epoch), so a resumed training needs no random state and ends with the
same bytes as an uninterrupted one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from longtail import batches, inference, networks
from longtail.losses import BaseLoss

SAVE_EVERY_S = 60.0  # seconds between checkpoints: costs nothing against what it saves


def lr_factor(
    epoch: int,
    *,
    epochs: int,
    warmup_epochs: int,
    shape: str,
    milestones: list[int],
    factors: list[float],
) -> float:
    """What lr is multiplied by in `epoch` (from 1): linear warm-up, then steps or a cosine that ends with 0."""
    if epoch <= warmup_epochs:
        return epoch / warmup_epochs
    if shape == "cosine":
        return (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs))) / 2
    passed = [factor for milestone, factor in zip(milestones, factors, strict=True) if epoch > milestone]
    return passed[-1] if passed else 1.0


@dataclass
class Fitted:
    """What training leaves: a row an epoch, the last network, and the best one on the held-out set if there is one."""

    history: list[dict[str, Any]]
    last: bytes
    best: bytes | None
    best_epoch: int | None
    seconds: float  # of training and held-out evaluation, those before a resume included


class Checkpoint:
    """One file that holds a training between two epochs; it belongs to the training that its identity names.

    Args:
        path: of the file; None for no checkpoints.
        identity: everything that determines the training; a file of another identity is ignored.
    """

    def __init__(self, path: str | Path | None, identity: str):
        self.path = Path(path) if path else None
        self.identity = identity
        self.saved_at = perf_counter()

    def load(self) -> dict[str, Any] | None:
        """The saved state, or None when there is none of this identity."""
        if self.path is None or not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # whole or not there, so this is another program's or a failing disk's file
            raise ValueError(f"{self.path}: not a readable checkpoint ({error}); remove it to train anew") from error
        return state if state.get("identity") == self.identity else None

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write what `state()` returns, unless the last time is less than SAVE_EVERY_S ago."""
        if self.path is None or perf_counter() - self.saved_at < SAVE_EVERY_S:
            return
        temporary = self.path.with_suffix(".part")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"identity": self.identity, **state()}, temporary)
        temporary.replace(self.path)
        self.saved_at = perf_counter()

    def remove(self) -> None:
        """Drop the file: the training is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def fit(
    network: networks.ResNet,
    loss: BaseLoss,
    train: batches.Split,
    held_out: batches.Split | None,
    *,
    seed: int,
    checkpoint: Checkpoint,
    on_epoch: Callable[[dict[str, Any]], None],
    epochs: int,
    batch_size: int,
    drop_last: bool,
    optimizer: dict[str, Any],
    schedule: dict[str, Any],
    augmentation: dict[str, Any],
    mixup_alpha: float,
    precision: str,
) -> Fitted:
    """Train `network` with `loss`; SGD, the learning rate set once an epoch.

    Args:
        on_epoch: called after each epoch with its row of the history, and `images_per_s` beside it.
        the others: a recipe's keys (params.yaml).

    Raises FloatingPointError, naming epoch and lr, when the loss of an epoch is not finite.
    """
    sgd = torch.optim.SGD([*network.parameters()], **optimizer)
    recipe: dict[str, Any] = {
        "batch_size": batch_size, "drop_last": drop_last, "augmentation": augmentation, "mixup_alpha": mixup_alpha,
        "precision": precision, "seed": seed,
    }  # fmt: skip
    fitted, done = Fitted([], b"", None, None, 0.0), 0
    state = checkpoint.load()
    if state is not None:
        for part, name in ((network, "network"), (loss, "loss"), (sgd, "sgd")):
            part.load_state_dict(state[name])
        done = state["done"]
        fitted = Fitted(state["history"], b"", _bytes(state["best"]), state["best_epoch"], state["seconds"])
    for epoch in range(done + 1, epochs + 1):
        lr = optimizer["lr"] * lr_factor(epoch, epochs=epochs, **schedule)
        for param_group in sgd.param_groups:
            param_group["lr"] = lr
        start = perf_counter()
        mean_loss, accuracy, images = train_epoch(network, loss, sgd, train, epoch=epoch, **recipe)
        seconds = perf_counter() - start
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"the loss is {mean_loss} in epoch {epoch} of {epochs} at lr {lr:g}")
        row: dict[str, Any] = {"epoch": epoch, "lr": lr, "loss": mean_loss, "train_accuracy": accuracy}
        row["held_out_accuracy"] = None
        if held_out is not None:
            row["held_out_accuracy"] = held_out_accuracy(network, held_out, precision=precision)
            best_so_far = max((past["held_out_accuracy"] for past in fitted.history), default=-1.0)
            if row["held_out_accuracy"] > best_so_far:
                fitted.best, fitted.best_epoch = networks.to_bytes(network), epoch
        fitted.history.append(row)
        fitted.seconds += perf_counter() - start
        on_epoch({**row, "images_per_s": images / seconds})

        def snapshot(done: int = epoch) -> dict[str, Any]:
            best = None if fitted.best is None else torch.frombuffer(bytearray(fitted.best), dtype=torch.uint8)
            return {
                "network": network.state_dict(), "loss": loss.state_dict(), "sgd": sgd.state_dict(), "done": done,
                "history": fitted.history, "best": best, "best_epoch": fitted.best_epoch, "seconds": fitted.seconds,
            }  # fmt: skip

        checkpoint.save(snapshot)
    fitted.last = networks.to_bytes(network)
    return fitted


def _bytes(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.numpy().tobytes()


def train_epoch(
    network: networks.ResNet,
    loss: BaseLoss,
    sgd: torch.optim.SGD,
    train: batches.Split,
    *,
    epoch: int,
    batch_size: int,
    drop_last: bool,
    augmentation: dict[str, Any],
    mixup_alpha: float,
    precision: str,
    seed: int,
) -> tuple[float, float, int]:
    """One pass over the training images; returns mean loss, accuracy on what was trained on, and their number."""
    network.train()
    loss.train()
    device = train.labels.device
    total_loss, right = torch.zeros((), device=device), torch.zeros((), device=device)
    images_seen = 0
    stream = batches.epoch(
        train, batch_size=batch_size, drop_last=drop_last, augmentation=augmentation, seed=seed, epoch=epoch,
        mean=network.settings["mean"], std=network.settings["std"],
    )  # fmt: skip
    for number, (images, labels) in enumerate(stream):
        generator = batches.batch_generator(seed, epoch, number)
        images, labels_b, weight = batches.mixup(images, labels, alpha=mixup_alpha, generator=generator)
        with torch.autocast(device.type, inference.DTYPES[precision], enabled=precision != "fp32"):
            logits_EBC = network(images)
        value = loss(logits_EBC, labels, weight)
        if weight < 1:
            value = value + loss(logits_EBC, labels_b, 1 - weight)
        sgd.zero_grad(set_to_none=True)
        value.backward()
        sgd.step()
        loss.after_step()
        with torch.no_grad():  # sums stay on the device: the step never waits for them
            predictions = networks.product(logits_EBC).argmax(1)
            right += weight * (predictions == labels).sum() + (1 - weight) * (predictions == labels_b).sum()
            total_loss += value.detach() * len(labels)
        images_seen += len(labels)
    return (total_loss / images_seen).item(), (right / images_seen).item(), images_seen


def held_out_accuracy(network: networks.ResNet, split: batches.Split, *, precision: str) -> float:
    """Mean over classes of class accuracy: a held-out set is long-tailed as its train set is."""
    predictions = networks.product(inference.logits(network, split, precision=precision)).argmax(1)
    labels = split.labels.cpu()
    right = torch.bincount(labels[predictions == labels], minlength=split.num_classes)
    total = torch.bincount(labels, minlength=split.num_classes)
    return (right / total)[total > 0].double().mean().item()
