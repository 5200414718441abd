"""Images of an index that a training reads as it needs them: each decoded once before, to know that it can be.

Where it is asked for, every image is kept smaller as well, in shards: one file of JPEGs after another, with its
checksum in the data set. A training then neither seeks in archives nor decodes pixels that it throws away.

N rows a split, C classes.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from longtail.data.large import feed, places
from longtail.data.large.index import SPLITS, locate
from longtail.data.large.pixels import CHANNELS, QUALITY, Smaller, Square
from longtail.data.large.store import Piece, Store
from longtail.training.checkpoints import alone
from longtail.workflow import files, processes
from longtail.workflow.fingerprint import digest

SHARD = 2048  # images
PART = 64  # that a worker decodes at a time
LOOKED, STORED = Path("runs/.looked"), Path("runs/.stored")
NAMED = 10


@dataclass(frozen=True)
class Stream:
    """A data set of data/long_tail without pixels.

    Attributes:
        labels, pieces: of each split; where an image lies is looked up anew each time.
        square: how an image is shown where nothing is drawn.
        report: what the images were made of, and of what kinds the files were.
    """

    class_names: np.ndarray
    labels: dict[str, np.ndarray]
    pieces: dict[str, list[Piece]]
    store: Store
    square: Square
    report: dict[str, Any]


def make(
    index: str, out: str, *, layout: str, made_by: str, side: int, share: float, exif_orientation: bool, draft: bool,
    broken: str, stored: int,
) -> None:  # fmt: skip
    """Decode every image of an index once, and write down which of them a training may use.

    Args:
        index, layout: the index, and the layout that it is of.
        made_by: the manifest of the code that does this.
        side: of the squares that networks get.
        share: of the shorter side, that the square in the middle shows where nothing is drawn.
        exif_orientation: turn images as EXIF says; the published code does not.
        draft: let libjpeg decode at half size or less where an image is large enough.
        broken: files that are no usable image: `refuse`, all are named and nothing is made; or `leave_out`.
        stored: the shorter side at which each image is kept below runs/.stored; 0: images are read where they lie.

    Raises ValueError naming files, OSError for one that is gone, and as `locate`.
    """
    arrays = files.load_arrays(index)
    about = json.loads(str(arrays["report"]))
    store, pieces = locate(arrays, layout)
    # whether a file can be decoded shows at any size, but not where libjpeg leaves out a part of it
    look = Smaller(stored, exif_orientation, draft) if stored else Square(min(side, 32), share, exif_orientation, False)
    facts = [about["digest"], layout, list(look), made_by, SHARD, *([PIL.__version__, QUALITY] if stored else [])]
    folder = LOOKED / digest(facts)
    shards = {
        split: [
            (folder / f"{split}-{first:09}", pieces[split][first : first + SHARD])
            for first in range(0, len(pieces[split]), SHARD)
        ]
        for split in SPLITS
    }
    todo = [one for split in SPLITS for one in shards[split]]
    with alone(folder.with_suffix(".lock"), "looking at these images"):
        seen = _look(store, look, todo)
        wrong = _checked(store, todo, seen, broken)
        kinds = Counter(kind for found in seen.values() for kind in found["kinds"].tolist())
        print("files: " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items())))
        made = _usable(arrays, {split: [seen[path] for path, _ in shards[split]] for split in SPLITS})
        for split in SPLITS:
            _check_classes(split, made[f"{split}_labels"], len(arrays["class_names"]), seen)
        report = {
            "index": about, "kinds": kinds, "left_out": wrong, "layout": layout, "stored": stored,
            "folder": _kept([path for path, _ in todo], seen) if stored else None,
            "square": Square(side, share, exif_orientation and not stored, draft)._asdict(),
        }  # fmt: skip
        made["report"] = np.array(json.dumps(report, sort_keys=True))
        files.save_arrays(out, **made)
        shutil.rmtree(folder, ignore_errors=True)


def _checked(
    store: Store,
    todo: Sequence[tuple[Path, Sequence[Piece]]],
    seen: Mapping[Path, Mapping[str, np.ndarray]],
    broken: str,
) -> dict[str, str]:
    """Files that are no usable images, with their reasons, said aloud. Raises ValueError where they are refused."""
    wrong = {
        part[n].file + (f" at {part[n].offset}" if part[n].offset else ""): why
        for path, part in todo
        for n, why in zip(seen[path]["broken"].tolist(), seen[path]["why"].tolist(), strict=True)
    }
    if not wrong:
        return wrong
    said = "; ".join(f"{place} ({why})" for place, why in list(wrong.items())[:NAMED])
    said += "; ..." if len(wrong) > NAMED else ""
    if broken == "refuse":
        _forget(seen)
        raise ValueError(
            f"{store.path}: {len(wrong):,} files are no usable images: {said}. Mend them and make the index "
            "anew, or leave them out (broken: leave_out); what was looked at of others is kept"
        )
    print(f"left out, no usable images: {len(wrong):,}: {said}")
    return wrong


def _usable(
    arrays: Mapping[str, np.ndarray], seen: Mapping[str, Sequence[Mapping[str, np.ndarray]]]
) -> dict[str, np.ndarray]:
    """The rows of an index whose files are images, by what was seen of each split's shards; and of shards that are kept
    the bytes of each image, and checksums."""
    made: dict[str, np.ndarray] = {"class_names": arrays["class_names"]}
    for split, found in seen.items():
        good = np.ones(len(arrays[f"{split}_labels"]), bool)
        for number, one in enumerate(found):
            good[number * SHARD + one["broken"]] = False
        made |= {f"{split}_{name}": arrays[f"{split}_{name}"][good] for name in ("keys", "sizes", "labels")}
        made[f"{split}_rows"] = np.flatnonzero(good)
        sizes = [one["sizes"] for one in found if "sizes" in one]
        made[f"{split}_stored"] = np.concatenate(sizes)[good] if sizes else np.empty(0, np.int64)
        made[f"{split}_sha256"] = np.array([str(one["sha256"]) for one in found if "sha256" in one], "U64")
    return made


def _kept(paths: Sequence[Path], seen: Mapping[Path, Mapping[str, np.ndarray]]) -> str:
    """Put the shards where trainings look for them, in a folder that is named by what they are; its name.

    So code that makes the same shards anew changes no data set, and no training.
    """
    name = digest([[path.name, str(seen[path]["sha256"])] for path in paths])
    for path in paths:
        there = STORED / name / f"{path.name}.images"
        there.parent.mkdir(parents=True, exist_ok=True)
        there.unlink(missing_ok=True)  # it may be a damaged one
        os.link(path.with_suffix(".images"), there)
    return name


def load(path: str | Path) -> Stream:
    """A data set that `make` wrote, each image found again.

    Raises ValueError for another data set, and where images or shards are no longer what they were.
    """
    arrays = files.load_arrays(path)
    report = json.loads(str(arrays["report"])) if "report" in arrays else {}
    if "square" not in report or "test_keys" not in arrays:
        raise ValueError(f"{path}: not the images of an index, as the stage `stream` writes them")
    store, pieces = _stored(arrays, report) if report["stored"] else locate(arrays, report["layout"])
    return Stream(
        arrays["class_names"], {split: arrays[f"{split}_labels"] for split in SPLITS}, pieces, store,
        Square(**report["square"]), report,
    )  # fmt: skip


def _stored(arrays: Mapping[str, np.ndarray], report: Mapping[str, Any]) -> tuple[Store, dict[str, list[Piece]]]:
    """The shards of a data set, each with the checksum that it has had, and the piece of every row."""
    store = Store(report["folder"], str(STORED))
    pieces: dict[str, list[Piece]] = {}
    for split in SPLITS:
        pieces[split] = []
        shard = arrays[f"{split}_rows"] // SHARD
        for number, sha256 in enumerate(arrays[f"{split}_sha256"].tolist()):
            name = f"{split}-{number * SHARD:09}.images"
            if processes.rank() == 0:  # one of several looks for all
                _check(store, name, sha256)
            at = 0
            for size in arrays[f"{split}_stored"][shard == number].tolist():
                pieces[split].append(Piece(name, at, size))
                at += size
    return store, pieces


def _check(store: Store, name: str, sha256: str) -> None:
    """Raise ValueError where a shard is not what was written; one that was right is not read again."""
    path = Path(store.at(name))
    again = "`dvc repro -f -s` of the data set's stage `stream` makes it anew"
    if not path.is_file():
        raise ValueError(f"{path}: this shard of smaller images is gone; {again}")
    state = [sha256, path.stat().st_size, path.stat().st_mtime_ns]
    known: Mapping[str, list] = files.read_json(places.VERIFIED) if places.VERIFIED.exists() else {}
    if known.get(str(path)) == state:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: SHA-256 {found}, written was {sha256}: damaged; {again}")
    files.write_json(places.VERIFIED, {**known, str(path): state})


def _look(
    store: Store, how: Square | Smaller, todo: Sequence[tuple[Path, Sequence[Piece]]]
) -> dict[Path, dict[str, np.ndarray]]:
    """What was seen of each shard's images; those that are not there yet are looked at first, and written whole."""
    missing = [(path, part) for path, part in todo if not path.with_suffix(".npz").is_file()]  # written after .images
    side = how.shorter if isinstance(how, Smaller) else how.side
    wanted = (
        feed.Wanted(part[first : first + PART], how) for _, part in missing for first in range(0, len(part), PART)
    )
    with (
        feed.Reader(store, PART * side**2 * CHANNELS) as reader,
        tqdm(total=sum(len(part) for _, part in missing), desc="images", unit="image", disable=None) as bar,
    ):
        chunks = reader.read(wanted)
        for path, part in missing:
            _shard(path, len(part), chunks, images=isinstance(how, Smaller))
            bar.update(len(part))
    return {path: files.load_arrays(path.with_suffix(".npz")) for path, _ in todo}


def _shard(path: Path, count: int, chunks: Iterator[feed.Chunk], *, images: bool) -> None:
    """Write what the next chunks say of `count` images, and the smaller images themselves where they are kept."""
    kinds, broken, sizes, parts = list[str](), dict[int, str](), list[int](), list[bytes]()
    while len(kinds) < count:
        chunk = next(chunks)
        broken |= {len(kinds) + n: why for n, why in chunk.broken.items()}
        kinds += chunk.kinds
        if images:
            sizes += chunk.sizes
            parts.append(chunk.values.numpy().tobytes())
    kept: dict[str, np.ndarray] = {}
    if images:
        content = b"".join(parts)
        kept = {"sizes": np.array(sizes, np.int64), "sha256": np.array(hashlib.sha256(content).hexdigest())}
        files.write_bytes(path.with_suffix(".images"), content)
    files.save_arrays(
        path.with_suffix(".npz"), kinds=np.array(kinds), broken=np.array([*broken], np.int64),
        why=np.array([*broken.values()], str), **kept,
    )  # fmt: skip


def _forget(seen: Mapping[Path, Mapping[str, np.ndarray]]) -> None:
    """Drop what was seen of shards with broken files: a file that is mended may have the size that it had."""
    for path, found in seen.items():
        if len(found["broken"]):
            path.with_suffix(".npz").unlink()


def _check_classes(split: str, labels: np.ndarray, classes: int, seen: Mapping[Path, Mapping[str, np.ndarray]]) -> None:
    """Raise ValueError for a class of which broken files leave no image."""
    if split != "held_out" and len(empty := np.flatnonzero(np.bincount(labels, minlength=classes) == 0)):
        _forget(seen)
        raise ValueError(f"{split}: of class {empty[0]} no image is left; there are {len(empty)} such classes")
