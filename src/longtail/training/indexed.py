"""Features of a large data set, from its index: images are decoded as they are needed, and never all in memory.

Rows are computed in shards, each written whole: a run that was killed goes on after the last shard and ends with the
same bytes. Shards go by what determines a feature, so that leaving broken files out computes anew what lies beside
them alone.

N rows, D features.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from longtail.data.large import feed
from longtail.data.large.index import locate
from longtail.data.large.pixels import Square
from longtail.data.large.store import Piece, Store
from longtail.networks import backbones
from longtail.training import inference
from longtail.training.checkpoints import alone
from longtail.workflow import files
from longtail.workflow.fingerprint import digest

SHARD = 2048  # images
CHUNK = 64  # images that a worker decodes and the network sees at a time
FOLDER = Path("runs/.features")
NAMED = 10


def extract(
    index: str,
    out: str,
    *,
    layout: str,
    backbone: Mapping[str, Any],
    made_by: str,
    share: float,
    exif_orientation: bool,
    draft: bool,
    broken: str,
) -> None:
    """Write the features of all images of an index as a data set of data/long_tail, images (N, 1, 1, D) float32.

    Args:
        index, layout: the index, and the layout that it is of.
        backbone: the block of params.yaml, as `backbones.load` takes it.
        made_by: the manifest of the code that does this.
        share: of the shorter side, that the square in the middle shows; 0.875 is Resize(256) and CenterCrop(224).
        exif_orientation: turn images as EXIF says; the published code does not.
        draft: let libjpeg decode at half size or less where an image is large enough.
        broken: files that are no usable image: `refuse`, all are named and nothing is made; or `leave_out`.

    `backbone` and `report` among the arrays say, as JSON, what made the features, and of what kinds the files were.
    Raises ValueError naming files, OSError for one that is gone, and as `backbones.load` and `locate`.
    """
    arrays = files.load_arrays(index)
    device = inference.find_device()
    inference.set_up(0)  # nothing is drawn; deterministic algorithms
    made = backbones.load(**backbone)
    made.network.to(device)
    how = Square(made.resolution, share, exif_orientation, draft)
    about = json.loads(str(arrays["report"]))
    shards = FOLDER / digest([about["digest"], made.facts, list(how), made_by, SHARD, device.type])
    store, pieces = locate(arrays, layout)
    todo = [
        (shards / f"{split}-{first:09}.npz", pieces[split][first : first + SHARD])
        for split in inference.SPLITS
        for first in range(0, len(pieces[split]), SHARD)
    ]
    with alone(shards.with_suffix(".lock"), "computing these features"):
        kinds, wrong, broken_shards = _computed(store, made, how, device, todo)
        if wrong:
            said = "; ".join(f"{place} ({why})" for place, why in list(wrong.items())[:NAMED])
            said += "; ..." if len(wrong) > NAMED else ""
            if broken == "refuse":
                for path in broken_shards:  # a file that is mended may have the size that it had
                    path.unlink()
                raise ValueError(
                    f"{store.path}: {len(wrong):,} files are no usable images: {said}. Mend them and make the index "
                    "anew, or leave them out (broken: leave_out); what was computed of others is kept"
                )
            print(f"left out, no usable images: {len(wrong):,}: {said}")
        print("files: " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items())))
        report = {"kinds": kinds, "left_out": wrong, "index": about}
        try:
            _write(Path(out), arrays, made.facts, [path for path, _ in todo], report)
        except ValueError:  # of a class nothing is left, say: these files may be mended now
            for path in broken_shards:
                path.unlink()
            raise
        shutil.rmtree(shards, ignore_errors=True)


def _computed(
    store: Store,
    made: backbones.Backbone,
    how: Square,
    device: torch.device,
    todo: Sequence[tuple[Path, Sequence[Piece]]],
) -> tuple[Counter[str], dict[str, str], list[Path]]:
    """Compute what is missing: how many files there are of each kind, which are no images, the shards with those."""
    kinds, wrong, broken_shards = Counter[str](), dict[str, str](), list[Path]()
    with tqdm(total=sum(len(part) for _, part in todo), desc="features", unit="image", disable=None) as bar:
        for path, part in _compute(store, made, how, device, todo):
            shard = files.load_arrays(path)
            kinds.update(shard["kinds"].tolist())
            wrong |= {part[n].file + (f" at {part[n].offset}" if part[n].offset else ""): why
                      for n, why in zip(shard["broken"].tolist(), shard["why"].tolist(), strict=True)}  # fmt: skip
            broken_shards += [path] if len(shard["broken"]) else []
            bar.update(len(part))
    return kinds, wrong, broken_shards


def _compute(
    store: Store,
    made: backbones.Backbone,
    how: Square,
    device: torch.device,
    todo: Sequence[tuple[Path, Sequence[Piece]]],
) -> Iterator[tuple[Path, Sequence[Piece]]]:
    """Each shard of `todo` when it is there; those that are not are computed and written first."""
    missing = {path: part for path, part in todo if not path.is_file()}  # asked once: the stream is of just these
    parts = [
        feed.Wanted(part[first : first + CHUNK], how)
        for part in missing.values()
        for first in range(0, len(part), CHUNK)
    ]
    with feed.Reader(store, CHUNK * how.side**2 * 3) as reader:
        decoded = reader.read(parts)
        for path, part in todo:
            if path in missing:
                _shard(path, len(part), made, device, decoded)
            yield path, part


def _shard(
    path: Path, count: int, made: backbones.Backbone, device: torch.device, decoded: Iterator[feed.Chunk]
) -> None:
    """Compute and write the features (count, D) of the next chunks."""
    values, kinds, broken = [], list[str](), dict[int, str]()
    while len(kinds) < count:
        chunk = next(decoded)
        with torch.inference_mode():
            images = chunk.values.to(device)
            values.append(made.features(images).cpu().numpy())
        broken |= {len(kinds) + n: why for n, why in chunk.broken.items()}
        kinds += chunk.kinds
    files.save_arrays(
        path, features=np.concatenate(values), kinds=np.array(kinds), broken=np.array([*broken], np.int64),
        why=np.array([*broken.values()], str),
    )  # fmt: skip


def _write(
    out: Path,
    arrays: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
    shards: Sequence[Path],
    report: Mapping[str, Any],
) -> None:
    """The data set in one uncompressed .npz, as `files.save_arrays` has it, shard after shard."""
    width = files.load_arrays(shards[0], "features")["features"].shape[1]
    small: dict[str, np.ndarray] = {
        "class_names": arrays["class_names"],
        "backbone": np.array(json.dumps(facts, sort_keys=True)),
        "report": np.array(json.dumps(report, sort_keys=True)),
    }
    images: dict[str, tuple[tuple[int, ...], Iterator[np.ndarray]]] = {}
    for split in inference.SPLITS:
        mine = [path for path in shards if path.name.startswith(f"{split}-")]
        kept = np.ones(len(arrays[f"{split}_labels"]), bool)
        for number, path in enumerate(mine):
            kept[number * SHARD + files.load_arrays(path, "broken")["broken"]] = False
        labels = arrays[f"{split}_labels"][kept]
        _check_classes(split, labels, len(arrays["class_names"]))
        small[f"{split}_labels"], small[f"{split}_rows"] = labels, np.flatnonzero(kept)
        images[f"{split}_images"] = (len(labels), 1, 1, width), _rows(mine)
    files.save_arrays_by_part(out, images, **small)


def _rows(shards: Sequence[Path]) -> Iterator[np.ndarray]:
    """The features of each shard, without those of broken files."""
    for path in shards:
        shard = files.load_arrays(path, "features", "broken")
        yield np.delete(shard["features"], shard["broken"], 0)


def _check_classes(split: str, labels: np.ndarray, classes: int) -> None:
    """Raise ValueError for a class of which broken files leave no image."""
    if split != "held_out" and len(empty := np.flatnonzero(np.bincount(labels, minlength=classes) == 0)):
        raise ValueError(f"{split}: of class {empty[0]} no image is left; there are {len(empty)} such classes")
