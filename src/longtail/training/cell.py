"""One cell, from arrays to weights: builds network and loss, runs the engine, shows and records what happens."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from longtail import losses, networks
from longtail.data import batches
from longtail.tracking.live import Live
from longtail.training import engine, inference, machine, provenance
from longtail.training.checkpoints import Checkpoint
from longtail.workflow import files, processes

HISTORY = ["epoch", "lr", "loss", "train_accuracy", "held_out_accuracy", "test_accuracy"]
NOT_OF_THE_ENGINE = ("network", "normalization", "window")  # of a recipe


def train(
    cell: dict[str, str],
    fingerprint: str,
    *,
    data: str,
    recipe: dict[str, Any],
    method: dict[str, Any],
    model: str,
    history: str,
) -> None:
    """Train the cell and write its weights and provenance (folder `model`) and a row an epoch (`history`).

    Args:
        cell: plan, dataset, recipe, method, seed.
        fingerprint: of everything that determines the result; checkpoints and tracking go by it.
        data: data/long_tail/<dataset>.npz.
        recipe, method: the blocks of params.yaml.

    Raises ValueError for arrays that do not fit the recipe, FloatingPointError for a loss that is not finite.
    """
    device, seed = inference.find_device(), int(cell["seed"])
    processes.start(device)
    splits = batches.splits(files.load_arrays(data), device)
    inference.set_up(seed)
    network, loss = build(splits["train"], cell["method"], method, **recipe)
    run(
        cell, fingerprint, network, loss, splits, recipe=recipe, method=method, device=device, model=model,
        write=lambda fitted: write(fitted, Path(model), history),
    )  # fmt: skip
    processes.stop()


def run(
    cell: dict[str, str],
    fingerprint: str,
    network: networks.Network,
    loss: losses.BaseLoss,
    splits: Mapping[str, batches.Split],
    *,
    recipe: dict[str, Any],
    method: dict[str, Any],
    device: torch.device,
    model: str,
    write: Callable[[engine.Fitted], None],
) -> None:
    """Have the engine train a network, go on where a checkpoint says so, and `write` what comes of it.

    The checkpoint stays: that DVC has the result is known where the next stage starts from it (`workflow.stage`).

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


@contextmanager
def shown(
    cell: dict[str, str], fingerprint: str, recipe: dict[str, Any], method: dict[str, Any]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What shows an epoch's row of the history: on the terminal, and in MLflow while the training runs."""
    with (
        Live(cell, fingerprint, {"recipe": recipe, "method": method}) as live,
        Progress(" ".join(cell.values()), recipe["epochs"]) as progress,
    ):

        def show(row: dict[str, Any]) -> None:
            progress.show(row)
            live.log(row["epoch"], {key: value for key, value in row.items() if value is not None})

        yield show


def build(
    train: batches.Split, method: str, block: dict[str, Any], *, network: dict[str, Any], normalization: dict[str, Any],
    **_: Any,
) -> tuple[networks.Network, losses.BaseLoss]:  # fmt: skip
    """A new network of a recipe, and the loss of a method's block for it; the weights come from torch's generator."""
    arguments = {key: value for key, value in block.items() if key != "loss"}
    counts = torch.bincount(train.labels, minlength=train.num_classes)
    loss = losses.load(block.get("loss", method))(counts, **arguments)
    loss.scale = network["scale"]
    made = networks.build(
        channels=train.images.shape[1], classes=train.num_classes, experts=loss.experts, **network, **normalization
    )
    return made.to(train.labels.device, memory_format=torch.channels_last), loss  # type: ignore[call-overload]


def write(fitted: engine.Fitted, folder: Path, history: str) -> None:
    """The network after the last epoch, and the best one where there is a held-out set; and the history."""
    for which in write_epochs(fitted, folder, history):
        files.write_bytes(folder / f"{which}.safetensors", getattr(fitted, which))


def write_epochs(fitted: engine.Fitted, folder: Path, history: str) -> dict[str, int]:
    """Write the history and which epochs' networks are kept; these, by name."""
    epochs = {"last": len(fitted.history)}
    if fitted.best is not None and fitted.best_epoch is not None:
        epochs["best"] = fitted.best_epoch
    files.write_json(folder / "epochs.json", epochs)
    columns = dict.fromkeys(HISTORY)
    for row in fitted.history:  # gradient ratios, in the rows in which the recipe asks for them
        columns |= dict.fromkeys(row)
    files.write_csv(history, fitted.history, [*columns])
    return epochs


class Progress:
    """A bar on a terminal, a line an epoch elsewhere, nothing with LONGTAIL_QUIET."""

    def __init__(self, name: str, epochs: int):
        self.name, self.epochs = name, epochs
        self.quiet = bool(os.environ.get("LONGTAIL_QUIET"))
        self.bar = None if self.quiet or not sys.stderr.isatty() else tqdm(total=epochs, desc=name, unit="epoch")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, row: dict[str, Any]) -> None:
        """Show a row of the history."""
        facts = {
            "loss": f"{row['loss']:.4f}",
            "lr": f"{row['lr']:.4g}",
            "images/s": f"{row['images_per_s']:.0f}",
        }
        if row["held_out_accuracy"] is not None:
            facts["held-out"] = f"{100 * row['held_out_accuracy']:.1f} %"
        if self.bar is not None:
            self.bar.set_postfix(facts, refresh=False)
            self.bar.update(row["epoch"] - self.bar.n)
        elif not self.quiet:
            shown = "  ".join(f"{key} {value}" for key, value in facts.items())
            print(f"{self.name}  epoch {row['epoch']}/{self.epochs}  {shown}", flush=True)
