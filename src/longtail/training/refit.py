"""From a trained network to one with other heads, on frozen features: seconds, as a DVC stage of its own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from longtail import heads, networks
from longtail.data import batches
from longtail.training import inference, machine, provenance
from longtail.workflow import files

Features = Callable[[networks.Network, batches.Split], list[Tensor]]  # (N, D) for each expert
Load = Callable[[Path, torch.device], networks.Network]


def features(network: networks.Network, split: batches.Split) -> list[Tensor]:
    """What goes into the head of each expert, (N, D) float32 on the CPU, without augmentation."""
    experts: Any = network.experts
    caught: list[list[Tensor]] = [[] for _ in experts]

    def catch(expert: int) -> Any:
        return lambda _, inputs: caught[expert].append(inputs[0].cpu())

    hooks = [expert.head.register_forward_pre_hook(catch(e)) for e, expert in enumerate(experts)]
    inference.logits(network, split, precision="fp32")
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in caught]


def refit(
    network: networks.Network, splits: Mapping[str, batches.Split], way: str, known: Features = features,
    **settings: Any,
) -> None:  # fmt: skip
    """Give each expert of `network` the head that heads/<way>.py makes of its features, in place.

    Args:
        splits: train, and held_out where there is one.
        known: how features are had.
        settings: of the way.

    Raises ValueError for settings that do not fit the data.
    """
    of = {name: known(network, split) for name, split in splits.items() if name != "test"}
    train, held_out = splits["train"], splits.get("held_out")
    network.cpu()
    experts: Any = network.experts
    for e, expert in enumerate(experts):
        seen = None if held_out is None else (of["held_out"][e], held_out.labels.cpu())
        with torch.enable_grad():
            expert.head = heads.load(way)(
                expert.head, heads.Known(of["train"][e], train.labels.cpu(), train.num_classes, seen), **settings
            )
    network.settings["head"] = networks.kind_of(expert.head)


def run(
    fingerprint: str, *, data: str, model: str, history: str, way: str, seed: int, out: str, history_out: str,
    **settings: Any,
) -> None:  # fmt: skip
    """Refit the networks in folder `model` and write them to folder `out`; their history is that of the first stage.

    Raises ValueError as `refit`, and for arrays that are no split.
    """
    splits = batches.splits(files.load_arrays(data), inference.find_device())
    of_folder(
        fingerprint, splits, model=model, history=history, way=way, seed=seed, out=out, history_out=history_out,
        **settings,
    )  # fmt: skip


def of_folder(
    fingerprint: str, splits: Mapping[str, batches.Split], *, model: str, history: str, way: str, seed: int, out: str,
    history_out: str, load: Load = networks.load, known: Features = features, **settings: Any,
) -> None:  # fmt: skip
    """As `run`, from splits; `load` reads a network, `known` has its features.

    Raises ValueError as `refit`.
    """
    start, device = perf_counter(), inference.find_device()
    for which in files.read_json(Path(model) / "epochs.json"):
        network = load(Path(model) / f"{which}.safetensors", device)
        inference.set_up(seed)  # the same draws for each
        refit(network, splits, way, known, **settings)
        networks.save(network, Path(out) / f"{which}.safetensors")
    files.write_bytes(Path(out) / "epochs.json", (Path(model) / "epochs.json").read_bytes())
    files.write_bytes(history_out, Path(history).read_bytes())
    provenance.write(out, [*provenance.read(model), provenance.record("refit", device, precision="fp32")])
    machine.write(out, fingerprint, device, seconds=perf_counter() - start)
