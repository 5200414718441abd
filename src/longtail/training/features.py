"""Features of a data set by a frozen backbone: computed once, so that every cell on top of them takes seconds.

Rows are computed in shards, each written whole: a run that was interrupted goes on after the last shard, and ends with
the same bytes.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from longtail.networks import backbones
from longtail.training import inference
from longtail.training.checkpoints import alone
from longtail.workflow import files
from longtail.workflow.fingerprint import digest

SHARD = 512  # images
BATCH = 64
FOLDER = Path("runs/.features")


def extract(data: str, out: str, *, fingerprint: str, **backbone: Any) -> None:
    """Write the data set `data` with features (N, 1, 1, D) float32 in place of its images; all else stays.

    Args:
        fingerprint: of everything that params and code determine; shards go by it and by what the weights are.
        backbone: the block of params.yaml, as `backbones.load` takes it.

    `backbone` among the arrays is what made the features, as JSON. Raises ValueError as `backbones.load`, and for a
    data set that has features already.
    """
    arrays = files.load_arrays(data)
    device = inference.find_device()
    inference.set_up(0)  # nothing is drawn; deterministic algorithms
    made = backbones.load(**backbone)
    made.network.to(device)
    images = {name: arrays[f"{name}_images"] for name in inference.SPLITS}
    if any(split.dtype != np.uint8 for split in images.values()):
        raise ValueError(f"{data}: these are no images, but features already")
    # what the weights are, no fingerprint says where they come without a digest
    shards = FOLDER / digest([fingerprint, made.facts, SHARD, device.type])
    with (
        alone(shards.with_suffix(".lock"), "computing these features"),
        tqdm(total=sum(map(len, images.values())), desc="features", unit="image", disable=None) as bar,
    ):
        for name, split in images.items():
            found = [_shard(shards / f"{name}-{first}.npy", made, split[first : first + SHARD], device, bar)
                     for first in range(0, len(split), SHARD)]  # fmt: skip
            width = made.features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=device)).shape[1]
            flat = np.concatenate([np.empty((0, width), np.float32), *found])
            arrays[f"{name}_images"] = flat[:, None, None, :]
        arrays["backbone"] = np.array(json.dumps(made.facts, sort_keys=True))
        files.save_arrays(out, **arrays)
        shutil.rmtree(shards, ignore_errors=True)


def _shard(path: Path, made: backbones.Backbone, images: np.ndarray, device: torch.device, bar: Any) -> np.ndarray:
    """Features (n, D) of some images: read where they are there, else computed and written."""
    if path.is_file():
        known: np.ndarray = np.load(path, allow_pickle=False)
    else:
        rows = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        with torch.inference_mode():
            known = torch.cat([made.features(part.to(device)).cpu() for part in torch.split(rows, BATCH)]).numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, known)
        partial.replace(path)
    bar.update(len(images))
    return known
