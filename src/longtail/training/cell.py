"""One cell, from arrays to weights: builds network and loss, runs the engine, shows and records what happens."""

import os
import sys
from collections.abc import Callable, Iterator
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
    settings = {key: value for key, value in recipe.items() if key not in ("network", "normalization")}
    checkpoint = Checkpoint(Path("runs/.checkpoints") / f"{fingerprint}.pt", f"{fingerprint} torch {torch.__version__}")
    first = processes.rank() == 0
    with (
        checkpoint.alone() if first else nullcontext(),
        shown(cell, fingerprint, recipe, method) if first else nullcontext(lambda row: None) as on_epoch,
    ):
        try:
            fitted = engine.fit(
                network, loss, splits["train"], splits.get("held_out"), splits.get("test"),
                seed=seed, checkpoint=checkpoint, on_epoch=on_epoch, **settings,
            )  # fmt: skip
        except FloatingPointError as error:
            kept = f"; the checkpoint before it is {checkpoint.path}" if checkpoint.load() else ""
            raise FloatingPointError(f"{' '.join(cell.values())}: {error}{kept}") from error
        if first:
            precision = inference.precision_on(device, recipe["precision"])
            _write(fitted, Path(model), history)
            by = provenance.record("train", device, precision=precision, first_epoch=fitted.first_epoch)
            provenance.write(model, [by])
            machine.write(
                model, fingerprint, device, seconds=fitted.seconds, precision=precision,
                images_per_s=len(splits["train"]) * recipe["epochs"] / fitted.seconds,
            )  # fmt: skip
            checkpoint.remove()
    processes.stop()


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


def _write(fitted: engine.Fitted, folder: Path, history: str) -> None:
    epochs = {"last": len(fitted.history)}
    files.write_bytes(folder / "last.safetensors", fitted.last)
    if fitted.best is not None and fitted.best_epoch is not None:
        files.write_bytes(folder / "best.safetensors", fitted.best)
        epochs["best"] = fitted.best_epoch
    files.write_json(folder / "epochs.json", epochs)
    columns = dict.fromkeys(HISTORY)
    for row in fitted.history:  # gradient ratios, in the rows in which the recipe asks for them
        columns |= dict.fromkeys(row)
    files.write_csv(history, fitted.history, [*columns])


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
