"""One cell, from arrays to weights: builds network and loss, runs the engine, shows and records what happens."""

import os
import platform
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from longtail import batches, engine, files, inference, kernels, losses, networks, processes
from longtail.checkpoints import Checkpoint
from longtail.live import Live, versions

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
    """Train the cell and write its weights (folder `model`) and a row an epoch (`history`).

    Args:
        cell: plan, dataset, recipe, method, seed.
        fingerprint: of everything that determines the result; checkpoints and tracking go by it.
        data: data/long_tail/<dataset>.npz.
        recipe, method: the blocks of params.yaml.

    Raises ValueError for arrays that do not fit the recipe, FloatingPointError for a loss that is not finite.
    """
    shown = {"recipe": recipe, "method": method}
    recipe = dict(recipe)
    arrays = files.load_arrays(data)
    device, classes = inference.find_device(), len(arrays["class_names"])
    processes.start(device)
    sets = {
        name: batches.Split.from_arrays(arrays[f"{name}_images"], arrays[f"{name}_labels"], classes, device)
        for name in ("train", "held_out", "test")
        if len(arrays[f"{name}_labels"])
    }
    seed = int(cell["seed"])
    inference.set_up(seed)
    counts = torch.bincount(sets["train"].labels, minlength=classes)
    loss = losses.load(cell["method"])(counts, **method)
    network = networks.ResNet(
        channels=sets["train"].images.shape[1],
        classes=classes,
        experts=loss.experts,
        **recipe.pop("network"),
        **recipe.pop("normalization"),
    ).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    identity = f"{fingerprint} torch {torch.__version__}"
    checkpoint = Checkpoint(Path("runs/.checkpoints") / f"{fingerprint}.pt", identity)
    name, first = " ".join(cell.values()), processes.rank() == 0
    with ExitStack() as open_while_training:
        if first:
            open_while_training.enter_context(checkpoint.alone())
            live = open_while_training.enter_context(Live(cell, fingerprint, shown))
            progress = open_while_training.enter_context(Progress(name, recipe["epochs"]))

        def on_epoch(row: dict[str, Any]) -> None:
            if first:
                progress.show(row)
                live.log(row["epoch"], {key: value for key, value in row.items() if value is not None})

        try:
            fitted = engine.fit(
                network, loss, sets["train"], sets.get("held_out"), sets.get("test"),
                seed=seed, checkpoint=checkpoint, on_epoch=on_epoch, **recipe,
            )  # fmt: skip
        except FloatingPointError as error:
            kept = f"; the checkpoint before it is {checkpoint.path}" if checkpoint.load() else ""
            raise FloatingPointError(f"{name}: {error}{kept}") from error
        if first:
            _write(fitted, Path(model), history)
            speed = {"seconds": fitted.seconds, "images_per_s": len(sets["train"]) * recipe["epochs"] / fitted.seconds}
            machine = {"training": fingerprint, **speed, **describe(device), "versions": versions()}
            machine["precision"] = inference.precision_on(device, recipe["precision"])
            files.write_json(Path(model).parent / "machine.json", machine)  # no out: another machine writes another one
            checkpoint.remove()
    processes.stop()


def _write(fitted: engine.Fitted, folder: Path, history: str) -> None:
    epochs = {"last": len(fitted.history)}
    files.write_bytes(folder / "last.safetensors", fitted.last)
    if fitted.best is not None and fitted.best_epoch is not None:
        files.write_bytes(folder / "best.safetensors", fitted.best)
        epochs["best"] = fitted.best_epoch
    files.write_json(folder / "epochs.json", epochs)
    files.write_csv(history, fitted.history, HISTORY)


def describe(device: torch.device) -> dict[str, Any]:
    """The machine that trains: what a run's time is worth."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type, "cpu": cpu, "gpu": gpu, "threads": torch.get_num_threads(),
        "processes": processes.world(),
        "kernels": device.type == "cpu" and kernels.library() is not None, "torch": torch.__version__,
    }  # fmt: skip


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
