"""What follows training on images that are read as they are needed: features once, then no image any more.

14 GB of logits an expert are too many to keep of iNaturalist's training images, and to decode them anew for each look
would take hours. So what goes into the heads is kept: of all test images, and of those that corrections are fitted on.

N images, n of them, D features, E experts.
"""

from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtail import heads as ways
from longtail import networks
from longtail.data import batches
from longtail.data.large import feed
from longtail.networks import own, tuned
from longtail.streaming import sets
from longtail.streaming.train import reading
from longtail.training import inference, machine, provenance, streamed
from longtail.workflow import files

BATCH = 128  # images whose features are computed at a time


def load(path: str | Path, device: torch.device) -> networks.Network:
    """A network on images. Raises ValueError naming a file that is none."""
    return tuned.load(path, device) if tuned.is_tuned(path) else networks.load(path, device)


def features(network: networks.Network, split: batches.Split) -> Iterator[Tensor]:
    """What goes into the head of each expert, without augmentation: (n, E D) float32 on the CPU, a part at a time."""
    experts: Any = network.eval().experts
    caught: dict[int, Tensor] = {}

    def catch(expert: int) -> Any:
        return lambda _, inputs: caught.__setitem__(expert, inputs[0].float())

    hooks = [expert.head.register_forward_pre_hook(catch(e)) for e, expert in enumerate(experts)]
    stream = batches.in_order(
        split, batch_size=BATCH, mean=network.settings["mean"], std=network.settings["std"], channels_last=True
    )
    try:
        for images in stream:
            with torch.inference_mode():
                network(images)
                found = torch.cat([caught[e] for e in range(len(experts))], 1).cpu()
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def width(network: networks.Network) -> int:
    """E D: the features of all experts."""
    experts: Any = network.experts
    return sum(int(expert.head.weight.shape[1]) for expert in experts)


def predict(data: str, model: str, features_out: str, heads_out: str, out: str) -> None:
    """Write what is to be known of the networks in folder `model` without an image.

    Args:
        data: data/long_tail/<stream>.npz.
        features_out: a folder; <network>.npz in it has labels and names of `data`, and features (n, 1, 1, E D) float32
            in place of images: of test all, of train and held-out those that corrections are fitted on.
        heads_out: a folder of networks that take such features (networks.own).
        out: what `streamed.predict` writes.

    Raises ValueError for weights that are no network on these images, and for images that are not what they were.
    """
    device = inference.find_device()
    inference.set_up(0)  # nothing is drawn; deterministic algorithms
    stream, folder = sets.load(data), Path(heads_out)
    named: dict[str, np.ndarray] = {"class_names": stream.class_names}
    named |= {f"{name}_labels": labels for name, labels in stream.labels.items()}
    epochs = files.read_json(Path(model) / "epochs.json")
    with reading(stream, device) as splits:
        for which in sorted(epochs):
            network = load(Path(model) / f"{which}.safetensors", device)
            parts: dict[str, tuple[tuple[int, ...], Iterator[np.ndarray]]] = {}
            for name in inference.SPLITS:
                split = splits.get(name)
                if split is not None and name != "test":
                    split = _fitted(split)
                count = 0 if split is None else len(split)
                values = (part.numpy() for part in features(network, split)) if split is not None else iter(())
                parts[f"{name}_images"] = (count, 1, 1, width(network)), values
            files.save_arrays_by_part(Path(features_out) / f"{which}.npz", parts, **named)
            networks.save(own.heads_of(network), folder / f"{which}.safetensors")
    files.write_json(folder / "epochs.json", epochs)
    provenance.write(str(folder), provenance.read(model))
    streamed.predict(features_out, heads_out, out)


def _fitted(split: batches.Split) -> batches.Split:
    """The images of a split that corrections are fitted on."""
    labels: Any = split.labels.cpu().numpy()
    rows = streamed.fitted_rows(labels)
    images: Any = split.images
    return batches.Split(
        images.of(rows), split.labels[torch.from_numpy(rows).to(split.labels.device)], split.num_classes
    )


def refit(
    fingerprint: str, *, data: str, model: str, history: str, way: str, seed: int, out: str, history_out: str,
    **settings: Any,
) -> None:  # fmt: skip
    """Give the networks in folder `model` other heads and write them to folder `out`, as longtail.training.refit.run.

    Raises ValueError for settings or images that do not fit.
    """
    begun, device = perf_counter(), inference.find_device()
    with reading(sets.load(data), device) as splits:
        for which in files.read_json(Path(model) / "epochs.json"):
            network = load(Path(model) / f"{which}.safetensors", device)
            inference.set_up(seed)  # the same draws for each
            known = {name: _by_expert(network, split) for name, split in splits.items() if name != "test"}
            train, held_out = splits["train"], splits.get("held_out")
            experts: Any = network.cpu().experts
            for e, expert in enumerate(experts):
                seen = None if held_out is None else (known["held_out"][e], held_out.labels.cpu())
                with torch.enable_grad():
                    of_train = ways.Known(known["train"][e], train.labels.cpu(), train.num_classes, seen)
                    expert.head = ways.load(way)(expert.head, of_train, **settings)
            network.settings["head"] = networks.kind_of(expert.head)
            networks.save(network, Path(out) / f"{which}.safetensors")
    files.write_bytes(Path(out) / "epochs.json", (Path(model) / "epochs.json").read_bytes())
    files.write_bytes(history_out, Path(history).read_bytes())
    provenance.write(out, [*provenance.read(model), provenance.record("refit", device, precision="fp32")])
    machine.write(out, fingerprint, device, seconds=perf_counter() - begun)


def _by_expert(network: networks.Network, split: batches.Split) -> list[Tensor]:
    """The features of all images, (N, D) of each expert."""
    experts: Any = network.experts
    every, at = torch.empty(len(split), width(network)), 0
    for part in features(network, split):
        every[at : at + len(part)] = part
        at += len(part)
    return list(every.chunk(len(experts), 1))


def first(data: str | Path, count: int) -> np.ndarray:
    """The first test images (count, R, R, 3) uint8, as networks are shown them."""
    stream = sets.load(data)
    chunk = feed.read(stream.store, feed.Wanted(stream.pieces["test"][:count], stream.square))
    if chunk.broken:
        raise ValueError(f"{data}: {next(iter(chunk.broken.values()))}, though it was an image once")
    found: np.ndarray = chunk.values.permute(0, 2, 3, 1).numpy()
    return found
