"""From a trained network to one with other heads, on frozen features: seconds, as a DVC stage of its own."""

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from longtail import heads, networks
from longtail.data import batches
from longtail.training import inference, machine, provenance
from longtail.workflow import files


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


def refit(network: networks.Network, splits: Mapping[str, batches.Split], way: str, **settings: Any) -> None:
    """Give each expert of `network` the head that heads/<way>.py makes of its features, in place.

    Args:
        splits: train, and held_out where there is one.
        settings: of the way.

    Raises ValueError for settings that do not fit the data.
    """
    known = {name: features(network, split) for name, split in splits.items() if name != "test"}
    train, held_out = splits["train"], splits.get("held_out")
    network.cpu()
    experts: Any = network.experts
    for e, expert in enumerate(experts):
        seen = None if held_out is None else (known["held_out"][e], held_out.labels.cpu())
        with torch.enable_grad():
            expert.head = heads.load(way)(
                expert.head, heads.Known(known["train"][e], train.labels.cpu(), train.num_classes, seen), **settings
            )
    network.settings["head"] = networks.kind_of(expert.head)


def run(
    fingerprint: str, *, data: str, model: str, history: str, way: str, seed: int, out: str, history_out: str,
    **settings: Any,
) -> None:  # fmt: skip
    """Refit the networks in folder `model` and write them to folder `out`; their history is that of the first stage.

    Raises ValueError as `refit`, and for arrays that are no split.
    """
    start = perf_counter()
    device = inference.find_device()
    splits = batches.splits(files.load_arrays(data), device)
    for which in files.read_json(Path(model) / "epochs.json"):
        network = networks.load(Path(model) / f"{which}.safetensors", device)
        inference.set_up(seed)  # the same draws for each
        refit(network, splits, way, **settings)
        networks.save(network, Path(out) / f"{which}.safetensors")
    files.write_bytes(Path(out) / "epochs.json", (Path(model) / "epochs.json").read_bytes())
    files.write_bytes(history_out, Path(history).read_bytes())
    provenance.write(out, [*provenance.read(model), provenance.record("refit", device, precision="fp32")])
    machine.write(out, fingerprint, device, seconds=perf_counter() - start)
