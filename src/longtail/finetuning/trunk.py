"""What the frozen trunk makes of a split's images: computed once, and kept for all cells that share trunk and images.

It is kept in shards below runs/.trunk, by the content of trunk and images, each written whole: a run that was killed
goes on after the last one, and ends with the same bytes. Nothing depends on the folder; it may be deleted.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longtail import networks
from longtail.data.batches import Split
from longtail.networks.tuned import Tuned
from longtail.training import provenance

FOLDER = Path("runs/.trunk")
SHARD, PART = 512, 64  # images: in a file, and at a time
LARGEST = 2**30  # bytes of a split that are held in memory; where there are more, the trunk runs at every step


def passed(tuned: Tuned, splits: Mapping[str, Split]) -> dict[str, Split]:
    """The splits with what the trunk makes of their images (N, ...) float32, or as they are where there is no trunk.

    All are left as they are, too, where one of them would take more than LARGEST bytes: a network takes one kind.
    """
    shown = [split for split in splits.values() if len(split)]
    if not len(tuned.trunk) or not shown:
        return dict(splits)
    each = _before(tuned, shown[0].images[:1])[0]
    if each.numel() * each.element_size() * max(map(len, shown)) > LARGEST:
        return dict(splits)
    return {name: _kept(tuned, split) if len(split) else split for name, split in splits.items()}


def _kept(tuned: Tuned, split: Split) -> Split:
    folder = FOLDER / _key(tuned, split)
    found = [_shard(folder / f"{first:09}.npy", tuned, split.images[first : first + SHARD])
             for first in range(0, len(split), SHARD)]  # fmt: skip
    return Split(torch.cat(found).to(split.labels.device), split.labels, split.num_classes)


def _before(tuned: Tuned, images: Tensor) -> Tensor:
    """Of images (n, channels, H, W) uint8: what `Tuned.before` gives, on the CPU."""
    tuned.eval()
    with torch.inference_mode():
        parts = [tuned.before(part.float() / 255).cpu() for part in torch.split(images, PART)]
    return torch.cat(parts).contiguous()


def _shard(path: Path, tuned: Tuned, images: Tensor) -> Tensor:
    if path.is_file():
        return torch.from_numpy(np.load(path, allow_pickle=False))
    made = _before(tuned, images)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")  # two cells may make the same one at a time
    with open(partial, "wb") as file:
        np.save(file, made.numpy())
    partial.replace(path)
    return made.clone()


def _key(tuned: Tuned, split: Split) -> str:
    """16 hex digits for the content of trunk and images, and what else the result depends on."""
    wants = tuned.settings["backbone"]
    found = hashlib.sha256(provenance.digest(tuned.trunk.state_dict()).encode())
    found.update(repr([wants[key] for key in ("library", "network", "version", "resolution", "mean", "std")]).encode())
    found.update(f"{split.labels.device.type} {torch.__version__} {len(tuned.trunk)} {split.images.shape}".encode())
    for module in (__file__, networks.tuned.__file__, networks.backbones.__file__):  # edited code starts anew
        found.update(Path(module).read_bytes())
    found.update(split.images.cpu().numpy().tobytes())
    return found.hexdigest()[:16]
