"""Experts that were trained apart, each in its own cell, as one network: a new expert trains only itself.

The prediction is that of BalPoE (Sanchez Aimar et al., CVPR 2023, arXiv:2206.05260), the mean of the experts' logits;
what is missing is the shared trunk. A network may also look at mirror images, which makes of a cell another one: what
is gained by that is never gained silently.
"""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from longtail import networks
from longtail.training import inference, machine, provenance
from longtail.training.cell import HISTORY
from longtail.workflow import files


def run(fingerprint: str, cells: Sequence[str], *, mirrored: bool = False, out: str, history: str) -> None:
    """Write the networks in `<cell>/model` as one into folder `out`, and the mean of the cells' histories.

    Args:
        mirrored: whether it looks at mirror images too (longtail.networks.Mirrored).

    Raises ValueError when the networks are not of the same classes and normalisation, or the histories of other epochs.
    """
    start = perf_counter()
    epochs = [files.read_json(Path(cell) / "model" / "epochs.json") for cell in cells]
    rows = [files.read_csv(Path(cell) / "history.csv") for cell in cells]
    if len({epoch["last"] for epoch in epochs}) > 1:
        raise ValueError(f"{', '.join(cells)}: trained for {[epoch['last'] for epoch in epochs]} epochs, not as many")
    alone = [networks.load(Path(cell) / "model" / "last.safetensors") for cell in cells]
    network = networks.Apart(alone) if len(alone) > 1 else alone[0]
    networks.save(networks.Mirrored(network) if mirrored else network, Path(out) / "last.safetensors")
    files.write_json(Path(out) / "epochs.json", {"last": epochs[0]["last"]})
    mean = [
        {key: mean_of([row[key] for row in same_epoch]) for key in HISTORY} for same_epoch in zip(*rows, strict=True)
    ]
    files.write_csv(history, [row | {"epoch": number} for number, row in enumerate(mean, 1)], HISTORY)
    provenance.write(out, [record for cell in cells for record in provenance.read(Path(cell) / "model")])
    machine.write(out, fingerprint, inference.find_device(), seconds=perf_counter() - start)


def mean_of(values: list[str]) -> float | None:
    """The mean of numbers in text; None where one is missing."""
    return sum(map(float, values)) / len(values) if all(values) else None
