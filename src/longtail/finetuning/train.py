"""One cell of fine-tuning: builds network and loss, has the engine train what is trained, writes the whole network."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from longtail import losses, networks
from longtail.data import batches
from longtail.finetuning import trunk
from longtail.losses import BaseLoss
from longtail.networks import tuned
from longtail.training import engine, inference, machine, provenance
from longtail.training.cell import HISTORY, shown
from longtail.training.checkpoints import Checkpoint
from longtail.workflow import files, processes

NOT_OF_THE_ENGINE = ("network", "normalization", "window")  # of a recipe
PLAIN = {
    "augmentation": {
        "crop_padding": 0, "flip": False, "policy": "none", "color_jitter": [0, 0, 0, 0], "rotation": 0, "cutout": 0,
    },
    "mixup_alpha": 0,
    "cutmix_alpha": 0,
}  # fmt: skip


class Slower(BaseLoss):
    """A loss after whose steps some parameters have gone only a part of their way.

    w <- w_before + part * (w_after - w_before), which is a learning rate of their own, `part` times the recipe's, for
    any optimiser that multiplies by it last: momentum and weight decay are the optimiser's business.

    Args:
        loss: what is minimised.
        parameters: the slower ones.
        part: in (0, 1].
    """

    def __init__(self, loss: BaseLoss, parameters: list[nn.Parameter], part: float):
        super().__init__()
        self.loss, self.part = loss, part
        self.scale, self.experts = loss.scale, loss.experts
        self.class_balanced_sampling, self.remembers = loss.class_balanced_sampling, loss.remembers
        self.__dict__["slower"] = parameters if part < 1 else []  # not parameters of the loss
        self.__dict__["before"] = None  # no state either: it is what the parameters are between two steps

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0, *places_B: Tensor) -> Tensor:
        """That of the loss."""
        if self.__dict__["before"] is None:
            self.__dict__["before"] = [parameter.detach().clone() for parameter in self.__dict__["slower"]]
        value: Tensor = self.loss(logits_EBC, labels_B, weight, *places_B)
        return value

    def remember(self, logits_EBC: Tensor, labels_B: Tensor, places_B: Tensor) -> None:
        """That of the loss."""
        self.loss.remember(logits_EBC, labels_B, places_B)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """That of the loss."""
        self.loss.start_epoch(epoch, epochs)

    @torch.no_grad()
    def after_step(self) -> None:
        """That of the loss; then take back what the slower parameters have gone too far."""
        self.loss.after_step()
        slower, before = self.__dict__["slower"], self.__dict__["before"]
        if slower:
            torch._foreach_lerp_(before, slower, self.part)
            torch._foreach_copy_(slower, before)


def is_plain(recipe: dict[str, Any]) -> bool:
    """Whether an image is the same in every epoch: then the trunk looks at it once."""
    return all(recipe[key] == value for key, value in PLAIN.items())


def build(
    train: batches.Split, method: str, block: dict[str, Any], backbone: dict[str, Any], network: dict[str, Any],
    seed: int,
) -> tuple[tuned.Tuned, BaseLoss]:  # fmt: skip
    """The network of a recipe's block `network`, from pretrained weights, and the loss of a method's block for it."""
    counts = torch.bincount(train.labels, minlength=train.num_classes)
    loss = losses.load(block.get("loss", method))(counts, **{k: value for k, value in block.items() if k != "loss"})
    loss.scale = network["scale"]
    settings = {key: value for key, value in network.items() if key not in ("backbone", "pretrained_lr")}
    made = tuned.start(
        backbone, channels=train.images.shape[1], classes=train.num_classes, experts=loss.experts, seed=seed, **settings
    )
    return made.to(train.labels.device, memory_format=torch.channels_last), loss  # type: ignore[call-overload]


def train(
    cell: dict[str, str],
    fingerprint: str,
    *,
    data: str,
    recipe: dict[str, Any],
    method: dict[str, Any],
    backbone: dict[str, Any],
    model: str,
    history: str,
) -> None:
    """Fine-tune the cell and write its weights and provenance (folder `model`) and a row an epoch (`history`).

    Args:
        cell: plan, dataset, recipe, method, seed.
        fingerprint: of everything that determines the result; checkpoints and tracking go by it.
        data: data/long_tail/<dataset>.npz.
        recipe, method, backbone: the blocks of params.yaml.

    Raises ValueError for arrays or weights that do not fit, FloatingPointError for a loss that is not finite.
    """
    device, seed = inference.find_device(), int(cell["seed"])
    processes.start(device)
    splits = batches.splits(files.load_arrays(data), device)
    if splits["train"].images.dtype != torch.uint8:
        raise ValueError(f"{data}: features, not images; a backbone is fine-tuned on images")
    inference.set_up(seed)
    whole, loss = build(splits["train"], cell["method"], method, backbone, recipe["network"], seed)
    splits = {name: split for name, split in splits.items() if name != "test" or recipe["test_every"]}
    if is_plain(recipe):  # else held-out images would need the trunk once, too, but what is trained takes one kind
        splits = trunk.passed(whole, splits)
    network = tuned.Trainable(whole, from_trunk=splits["train"].images.dtype == torch.float32)
    slower = Slower(loss, network.pretrained(), recipe["network"]["pretrained_lr"])
    run(
        cell, fingerprint, network, slower, splits, recipe=recipe, method=method, device=device, model=model,
        write=lambda fitted: write(whole, fitted, Path(model), history),
    )  # fmt: skip
    processes.stop()


def run(
    cell: dict[str, str],
    fingerprint: str,
    network: networks.Network,
    loss: BaseLoss,
    splits: Mapping[str, batches.Split],
    *,
    recipe: dict[str, Any],
    method: dict[str, Any],
    device: torch.device,
    model: str,
    write: Callable[[engine.Fitted], None],
) -> None:
    """Have the engine train a network, go on where a checkpoint says so, and `write` what comes of it.

    Args:
        splits: train, and held_out and test where they are to be looked at.
        the others: as those of `train`.

    Raises FloatingPointError, naming the cell, for a loss that is not finite.
    """
    settings = {key: value for key, value in recipe.items() if key not in NOT_OF_THE_ENGINE}
    checkpoint = Checkpoint(Path("runs/.checkpoints") / f"{fingerprint}.pt", f"{fingerprint} torch {torch.__version__}")
    first = processes.rank() == 0
    with (
        checkpoint.alone() if first else nullcontext(),
        shown(cell, fingerprint, recipe, method) if first else nullcontext(lambda row: None) as on_epoch,
    ):
        try:
            fitted = engine.fit(
                network, loss, splits["train"], splits.get("held_out"), splits.get("test"),
                seed=int(cell["seed"]), checkpoint=checkpoint, on_epoch=on_epoch, **settings,
            )  # fmt: skip
        except FloatingPointError as error:
            kept = f"; the checkpoint before it is {checkpoint.path}" if checkpoint.load() else ""
            raise FloatingPointError(f"{' '.join(cell.values())}: {error}{kept}") from error
        if first:
            precision = inference.precision_on(device, recipe["precision"])
            write(fitted)
            by = provenance.record("train", device, precision=precision, first_epoch=fitted.first_epoch)
            provenance.write(model, [by])
            machine.write(
                model, fingerprint, device, seconds=fitted.seconds, precision=precision,
                images_per_s=len(splits["train"]) * recipe["epochs"] / fitted.seconds,
            )  # fmt: skip
            checkpoint.remove()


def write(whole: tuned.Tuned, fitted: engine.Fitted, folder: Path, history: str) -> None:
    """The network after the last epoch, and the best one where there is a held-out set, each whole; and the history."""
    epochs = {"last": len(fitted.history)}
    if fitted.best is not None and fitted.best_epoch is not None:
        epochs["best"] = fitted.best_epoch
    for which in epochs:
        whole.load_state_dict(safetensors.torch.load(getattr(fitted, which)), strict=False)  # the trunk is as it was
        networks.save(whole, folder / f"{which}.safetensors")
    files.write_json(folder / "epochs.json", epochs)
    columns = dict.fromkeys(HISTORY)
    for row in fitted.history:
        columns |= dict.fromkeys(row)
    files.write_csv(history, fitted.history, [*columns])
