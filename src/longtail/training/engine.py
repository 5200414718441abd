"""The training loop: one network, one loss, one recipe, one seed. Nothing in it knows a method's name.

Every random draw comes from (seed, epoch, place in the epoch), so a training that is taken up at any step needs no
random state and ends with the same bytes as an uninterrupted one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail import networks
from longtail.data import batches
from longtail.losses import BaseLoss
from longtail.training import inference, optimizers, provenance
from longtail.training.checkpoints import Checkpoint
from longtail.workflow import processes

LOOK_EVERY = 20  # steps between looks at what a GPU computes: a look waits for it


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


def scale_of(epoch: int, *, milestones: list[int], scales: list[float]) -> float:
    """The factor on the images' sides in `epoch` (from 1): scales[i] up to and with milestones[i], then 1."""
    return next((scale for last, scale in zip(milestones, scales, strict=True) if epoch <= last), 1.0)


@dataclass
class Fitted:
    """What training leaves: a row an epoch, the last network, and the best one on the held-out set if there is one.

    `first_epoch` is the SHA-256 of the network's tensors after the first epoch: what another training that claims to
    be the same one can be held against within minutes.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    last: bytes = b""
    best: bytes | None = None
    best_epoch: int | None = None
    seconds: float = 0.0  # of training and the looks at other sets, those before a resume included
    first_epoch: str = ""

    def state_dict(self) -> dict[str, Any]:
        """All but the last network, for a checkpoint that is read without pickle's power."""
        best = None if self.best is None else torch.frombuffer(bytearray(self.best), dtype=torch.uint8)
        return {**vars(self), "last": None, "best": best}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Fitted":
        """What `state_dict` gave."""
        best = None if state["best"] is None else state["best"].numpy().tobytes()
        return cls(**{**state, "last": b"", "best": best})


def fit(
    network: networks.Network,
    loss: BaseLoss,
    train: batches.Split,
    held_out: batches.Split | None,
    test: batches.Split | None = None,
    *,
    seed: int,
    checkpoint: Checkpoint,
    on_epoch: Callable[[dict[str, Any]], None],
    epochs: int,
    test_every: int,
    gradients_every: int = 0,
    **recipe: Any,
) -> Fitted:
    """Train `network` with `loss`.

    Args:
        test: looked at every `test_every` epochs and written into the history; nothing is chosen by it.
        gradients_every: epochs between rows of the history that have the gradient ratio of each class, over the
            epochs since the last such row: `gradient_ratio_<class>`, see Training.gradient_ratios; 0 for none.
        on_epoch: called after each epoch with its row of the history, and `images_per_s` beside it.
        the others: a recipe's keys (params.yaml).

    Raises FloatingPointError, naming epoch, step and lr, when a loss is not finite; the last checkpoint stays.
    Raises ValueError for a checkpoint of another number of processes.
    """
    training = Training(network, loss, train, seed=seed, epochs=epochs, gradients=bool(gradients_every), **recipe)
    fitted, state = Fitted(), checkpoint.load()
    if state is not None:
        if (there := len(state["training"]["sums"])) != processes.world():
            here = (
                f"this one has {processes.world()}: go on with LONGTAIL_PROCESSES={there}, or remove it to train anew"
            )
            raise ValueError(f"{checkpoint.path} is of a training by {there} process(es), {here}")
        training.load_state_dict(state["training"])
        fitted = Fitted.from_state_dict(state["fitted"])
    started = perf_counter() - fitted.seconds

    def between_steps() -> None:
        now = torch.tensor(float(checkpoint.due()), device=training.device)
        if processes.from_first(now):  # one clock decides for all
            fitted.seconds = perf_counter() - started
            state = {"training": training.state_dict(), "fitted": fitted.state_dict()}
            if processes.rank() == 0:
                checkpoint.save(lambda: state)

    while training.epoch <= epochs:
        clock = perf_counter()
        images = training.finish_epoch(between_steps)
        images_per_s = images / (perf_counter() - clock)
        row = training.row() | look(training, fitted, held_out, test if due(training.epoch, test_every) else None)
        on_epoch({**row, "images_per_s": images_per_s})
        if due(training.epoch, gradients_every):
            ratios_C = training.gradient_ratios().tolist()
            row |= {f"gradient_ratio_{c}": float(f"{ratio:.4g}") for c, ratio in enumerate(ratios_C)}
        fitted.history.append(row)
        fitted.first_epoch = fitted.first_epoch or provenance.digest(network.state_dict())
        training.next_epoch()
        between_steps()
    fitted.seconds = perf_counter() - started
    fitted.last = networks.to_bytes(training.averaged())
    return fitted


def due(epoch: int, every: int) -> bool:
    """Whether something that is done every so many epochs is done in this one; never for 0."""
    return every > 0 and epoch % every == 0


def look(
    training: "Training", fitted: Fitted, held_out: batches.Split | None, test: batches.Split | None
) -> dict[str, float | None]:
    """The epoch's accuracies on other sets, None without a set; keeps the network that is the best on held-out."""
    final = training.averaged()
    found = {
        f"{name}_accuracy": None if split is None else class_accuracy(final, split, precision=training.precision)
        for name, split in (("held_out", held_out), ("test", test))
    }
    accuracy = found["held_out_accuracy"]
    if accuracy is not None and accuracy > max((row["held_out_accuracy"] for row in fitted.history), default=-1.0):
        fitted.best, fitted.best_epoch = networks.to_bytes(final), training.epoch
    return found


class Training:
    """A training at some step of some epoch: all that the next step depends on, and nothing else.

    Attributes:
        epoch: under way, from 1.
        batch: the next one of the epoch, from 0.
        precision: what the device does of the recipe's.
    """

    def __init__(
        self,
        network: networks.Network,
        loss: BaseLoss,
        train: batches.Split,
        *,
        seed: int,
        epochs: int,
        batch_size: int,
        drop_last: bool,
        accumulate: int,
        optimizer: dict[str, Any],
        schedule: dict[str, Any],
        weight_average: float,
        sync_batch_norm: bool,
        augmentation: dict[str, Any],
        resolution: dict[str, Any],
        mixup_alpha: float,
        cutmix_alpha: float,
        precision: str,
        gradients: bool = False,
    ):
        self.network, self.loss, self.train_split = network, loss, train
        self.device = train.labels.device
        self.precision = inference.precision_on(self.device, precision)
        self.accumulate, self.weight_average = accumulate, weight_average
        self.base_lr, self.schedule, self.resolution = optimizer["lr"], {**schedule, "epochs": epochs}, resolution
        self.batches = {
            "batch_size": batch_size, "drop_last": drop_last, "augmentation": augmentation, "mixup_alpha": mixup_alpha,
            "cutmix_alpha": cutmix_alpha, "seed": seed, "class_balanced": loss.class_balanced_sampling,
            "mean": network.settings["mean"], "std": network.settings["std"],
        }  # fmt: skip
        smallest = batch_size if drop_last or len(train) % batch_size == 0 else len(train) % batch_size
        # a batch norm of features, which have no places to take a variance over, wants two rows
        rows = 2 if any(isinstance(module, nn.BatchNorm1d) for module in network.modules()) else 1
        if smallest // processes.world() < rows * accumulate:
            raise ValueError(
                f"{len(train)} images in batches of {batch_size} leave a batch of {smallest}, too small for "
                f"{processes.world()} process(es) x accumulate {accumulate}; take drop_last or another batch_size"
            )
        if sync_batch_norm:
            processes.synchronise(network)
        self.forward = networks.compiled(network)
        self.parameters = [*network.parameters()]
        self.optimizers = optimizers.build(self.parameters, **optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.average = {key: value.clone() for key, value in self._averaged_tensors().items()} if weight_average else {}
        self.steps = 0  # optimiser steps so far
        self.epoch, self.batch = 1, 0
        self.seen = 0  # images of the epoch so far, of all processes
        # of the epoch so far, on the device: the step never waits for them
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, right predictions
        self.bad_batch = torch.tensor(-1, device=self.device)  # the first one whose loss is not finite
        # positive and negative gradients of each class's logit since `gradient_ratios` was last asked
        self.pulls_2C = torch.zeros(2, train.num_classes, dtype=torch.float64, device=self.device)
        self.gradients = gradients

    def _averaged_tensors(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.network.state_dict().items() if value.is_floating_point()}

    @property
    def lr(self) -> float:
        """The learning rate of the epoch under way."""
        return self.base_lr * lr_factor(self.epoch, **self.schedule)

    def finish_epoch(self, between_steps: Callable[[], None]) -> int:
        """Train to the end of the epoch under way; returns how many images that took, of all processes.

        `between_steps` is called where a checkpoint may be taken.
        """
        self.network.train()
        self.loss.train()
        self.loss.start_epoch(self.epoch, self.schedule["epochs"])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_factor(self.epoch, **self.schedule)
        scale, before = scale_of(self.epoch, **self.resolution), self.seen
        stream = batches.epoch(
            self.train_split, **self.batches, epoch=self.epoch, start_batch=self.batch,
            rank=processes.rank(), world=processes.world(),
        )  # fmt: skip
        for batch in stream:
            if scale != 1:
                sides = [round(side * scale) for side in batch.images.shape[2:]]
                small = F.interpolate(batch.images, sides, mode="bilinear", antialias=True)
                batch = batch._replace(images=small.contiguous(memory_format=torch.channels_last))
            self.step(batch)
            self.batch += 1
            if self.device.type == "cpu" or self.batch % LOOK_EVERY == 0:
                self.check_loss()
                between_steps()
        self.check_loss()
        return self.seen - before

    def step(self, batch: batches.Batch) -> None:
        """One optimiser step on a joint batch, of which this process has its share."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in range(self.accumulate):  # of the rows that as many processes would have
            images, labels, partner_labels, places, partner_places = (
                tensor[part :: self.accumulate] for tensor in batch[:5]
            )
            with torch.autocast(self.device.type, inference.DTYPES[self.precision], enabled=self.precision != "fp32"):
                logits_EBC = self.forward(images)
            if self.gradients:
                logits_EBC.register_hook(self._add_gradients)
            share = len(labels) / batch.size  # losses are means over what they see, the step is over the joint batch
            value = self._loss(logits_EBC, labels, places, batch.weight * share)
            if batch.weight < 1:
                value = value + self._loss(logits_EBC, partner_labels, partner_places, (1 - batch.weight) * share)
            if self.loss.remembers:
                most = (labels, places) if batch.weight >= 0.5 else (partner_labels, partner_places)
                self.loss.remember(logits_EBC.detach(), *most)
            self.scaler.scale(value).backward()
            with torch.no_grad():
                predictions = networks.product(logits_EBC).argmax(1)
                right = batch.weight * (predictions == labels).sum()
                right = right + (1 - batch.weight) * (predictions == partner_labels).sum()
                total += value.detach()
                self.sums += torch.stack([value.detach() * batch.size, right])
        processes.add_up_gradients(self.parameters)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.loss.after_step()
        self.steps += 1
        self.seen += batch.size
        if self.weight_average:
            decay = min(self.weight_average, (1 + self.steps) / (10 + self.steps))  # the start is soon forgotten
            now = self._averaged_tensors()
            torch._foreach_lerp_([self.average[key] for key in now], [*now.values()], 1 - decay)
        self.bad_batch = torch.where((self.bad_batch < 0) & ~total.isfinite(), self.batch, self.bad_batch)

    def _loss(self, logits_EBC: Tensor, labels: Tensor, places: Tensor, weight: float) -> Any:
        return self.loss(logits_EBC, labels, weight, *([places] if self.loss.remembers else []))

    def _add_gradients(self, gradient_EBC: Tensor) -> None:
        gradient_EBC = gradient_EBC.double() / self.scaler.get_scale()
        self.pulls_2C[0] -= gradient_EBC.clamp(max=0).sum((0, 1))
        self.pulls_2C[1] += gradient_EBC.clamp(min=0).sum((0, 1))

    def gradient_ratios(self) -> Tensor:
        """Positive over negative gradients of each class (C,), summed since the last call; nan where there are none.

        Of the loss with respect to the class's logit: what pulls it up (for cross-entropy, the class's own samples)
        over what pushes it down (the samples of the others), as GALA balances them (arXiv:2403.09036). Under one the
        class is pushed down; a converged cross-entropy has one for every class.
        """
        positive_C, negative_C = processes.add_up(self.pulls_2C.clone())
        self.pulls_2C.zero_()
        return positive_C / negative_C

    def check_loss(self) -> None:
        """Raise FloatingPointError when a loss of this epoch was not finite in any process."""
        bad = processes.side_by_side(self.bad_batch)
        if (bad >= 0).any():
            first = int(bad[bad >= 0].min()) + 1
            place = f"epoch {self.epoch} of {self.schedule['epochs']}, step {first}"
            raise FloatingPointError(f"the loss is not finite in {place}, at lr {self.lr:g}")

    def row(self) -> dict[str, Any]:
        """The epoch's row of the history."""
        loss, right = processes.add_up(self.sums.clone()).tolist()
        return {"epoch": self.epoch, "lr": self.lr, "loss": loss / self.seen, "train_accuracy": right / self.seen}

    def next_epoch(self) -> None:
        """Go on to the next epoch."""
        self.epoch, self.batch, self.seen = self.epoch + 1, 0, 0
        self.sums.zero_()

    def averaged(self) -> networks.Network:
        """The network, or that of the averaged weights, with the running statistics of the first process."""
        processes.same_buffers(self.network)
        if not self.weight_average:
            return self.network
        self._same_average()
        average = networks.build(**self.network.settings).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        average.load_state_dict({**self.network.state_dict(), **self.average})
        return average

    def _same_average(self) -> None:
        """Averaged running statistics are those of the first process too, whenever it is that one looks."""
        if processes.world() > 1:
            for value in self.average.values():
                processes.from_first(value)

    def state_dict(self) -> dict[str, Any]:
        """All of it, of all processes."""
        processes.same_buffers(self.network)
        self._same_average()
        return {
            "network": self.network.state_dict(), "loss": self.loss.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(), "average": self.average, "steps": self.steps,
            "epoch": self.epoch, "batch": self.batch, "seen": self.seen, "sums": processes.side_by_side(self.sums),
            "pulls": processes.side_by_side(self.pulls_2C),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` left off."""
        self.network.load_state_dict(state["network"])
        self.loss.load_state_dict(state["loss"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        self.average = {key: value.to(self.device) for key, value in state["average"].items()}
        self.steps, self.epoch, self.batch, self.seen = (state[key] for key in ("steps", "epoch", "batch", "seen"))
        self.sums = state["sums"][processes.rank()].to(self.device)
        self.pulls_2C = state["pulls"][processes.rank()].to(self.device)


def class_accuracy(network: networks.Network, split: batches.Split, *, precision: str) -> float:
    """Mean over classes of class accuracy: a held-out set is long-tailed as its train set is.

    Several processes share the images, each looks at its own, none at one twice.
    """
    mine = slice(processes.rank(), None, processes.world())
    split = batches.Split(split.images[mine], split.labels[mine], split.num_classes)
    labels = split.labels.cpu()
    predictions = labels  # none, where there are more processes than images
    if len(split):
        predictions = networks.product(inference.logits(network, split, precision=precision)).argmax(1)
    right = torch.bincount(labels[predictions == labels], minlength=split.num_classes)
    counts = torch.stack([right, torch.bincount(labels, minlength=split.num_classes)]).to(split.labels.device)
    right, total = processes.add_up(counts).cpu()
    return (right / total)[total > 0].double().mean().item()
