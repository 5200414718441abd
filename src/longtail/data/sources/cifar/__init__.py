"""CIFAR-10 and CIFAR-100.

Source: Krizhevsky, 'Learning Multiple Layers of Features from Tiny Images', 2009. Two routes to the
same arrays, side by side in one file because they must agree to the byte: the official archive of
Python pickles, and a mirror of parquet files in the layout of the Hugging Face hub. Pixels are
32x32 RGB; rows are sorted by (class, original file name). Rows also know their place in the archive's training files,
by which the field's long-tailed cuts are made (longtail.data.long_tail).

A copy in the hub's own layout has no file names, but has the archive's order: `order` knows the rest.
"""

import hashlib
import io
import json
import os
import pickle
import pickletools
import posixpath
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from longtail.data.sources.cifar.fetch import MIRROR, download, masked
from longtail.data.sources.cifar.order import by_content
from longtail.workflow.ranges import Count, Hashes, Md5, Url

SIZE = 32
MEMBER_BYTES = 1 << 28  # of the archive: eight times what the official ones have
LOSSLESS = ("WEBP", "PNG")  # no other decoder is tried: a JPEG would be other pixels


class Layout(NamedTuple):
    """Where the archive and the mirror of one data set keep what."""

    num_classes: int
    members: Mapping[str, Sequence[str]]  # pickles of the archive; "names" holds the class names
    labels: bytes  # key of the labels in a split's pickle
    class_names: bytes  # key of the class names in theirs
    column: str  # of the labels in the mirror's parquet files


LAYOUTS = {
    "cifar10": Layout(
        num_classes=10,
        members={
            "train": [f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)],
            "test": ["cifar-10-batches-py/test_batch"],
            "names": ["cifar-10-batches-py/batches.meta"],
        },
        labels=b"labels",
        class_names=b"label_names",
        column="label",
    ),
    "cifar100": Layout(
        num_classes=100,
        members={
            "train": ["cifar-100-python/train"],
            "test": ["cifar-100-python/test"],
            "names": ["cifar-100-python/meta"],
        },
        labels=b"fine_labels",
        class_names=b"fine_label_names",
        column="fine_label",
    ),
}


class Part(NamedTuple):
    """The rows of one file, in its own order; `where` names the file in errors."""

    where: str
    images: np.ndarray  # uint8 (N, 32, 32, 3)
    labels: Sequence[int]
    file_names: Sequence[str] | None  # None in the hub's own layout, which has the archive's order instead


Splits = dict[str, list[Part]]


def read(
    folder: str | Path,
    *,
    name: Literal["cifar10", "cifar100"],
    url: Url,
    md5: Md5,
    sha256: Hashes | None = None,
    choose_on: Count | None = None,
) -> dict[str, np.ndarray]:
    """Read cifar10 or cifar100 from the mirror at LONGTAIL_MIRROR, or else from its own site.

    LONGTAIL_MIRROR is a folder or a URL that fsspec knows; its <name>/{train,test}-*.parquet are
    read. Without it `url` is downloaded into `folder` and must have this `md5`. `sha256` holds the
    hashes of the pixels of `train` and `test` (uint8, N x 32 x 32 x 3, rows in order), checked
    whichever way they came; with every class equally frequent, which is checked too, they vouch for
    the labels as well. `places` among them is the hash of the places (int64, rows in order).

    The places come from the archive, from <name>/places.parquet of a mirror, whose column `place` goes row by row with
    its train split, or, where a mirror has no file names, from its rows, which are then the archive's. A mirror with
    neither gives no `train_places`.

    With `choose_on` the test images are not those of the release, which are left alone, but so many of each class of
    its training images, always the same ones; the others are train. What is chosen by results is chosen there.

    Raises ValueError naming the setting, or the file, and the row if it can be told, that is wrong.
    """
    if name not in LAYOUTS:
        raise ValueError(f"name: {name!r} is unknown; allowed are {', '.join(LAYOUTS)}")
    hashes = {str(split): value for split, value in (sha256 or {}).items()}
    if unknown := sorted(set(hashes) - {"train", "test", "places"}):
        raise ValueError(f"sha256: {unknown[0]!r} is unknown; allowed are train, test, places")
    layout = LAYOUTS[name]
    if mirror := os.environ.get(MIRROR):
        splits, class_names, places = _read_mirror(mirror, name, layout)
    else:
        archive = download(url, Path(folder) / posixpath.basename(urlsplit(url).path), md5)
        splits, class_names = _read_archive(archive, layout)
        places = np.arange(sum(len(part.labels) for part in splits["train"]))
    arrays = {"class_names": np.array(class_names)}
    for split, parts in splits.items():
        images, labels, order = _in_order(parts, name, split, layout.num_classes, hashes.get(split))
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
        if split == "train" and places is not None:
            arrays["train_places"] = _checked_places(places[order], parts, hashes.get("places"))
    return arrays if choose_on is None else _to_choose_on(arrays, choose_on)


def _to_choose_on(arrays: dict[str, np.ndarray], each: int) -> dict[str, np.ndarray]:
    """The training images, `each` of every class as test."""
    labels = arrays["train_labels"]
    largest = np.bincount(labels).max() - 1
    if each > largest:
        raise ValueError(f"choose_on: {each} is not allowed; allowed is 1 to {largest}, so that train has an image")
    test = np.zeros(len(labels), bool)
    for label in range(len(arrays["class_names"])):
        rows = np.flatnonzero(labels == label)
        test[np.random.default_rng([0, label]).permutation(rows)[:each]] = True
    left = {name: array[~test] for name, array in arrays.items() if name.startswith("train_")}
    kept = {f"test_{part}": arrays[f"train_{part}"][test] for part in ("images", "labels")}
    return {**arrays, **left, **kept}


def _checked_places(places: np.ndarray, parts: list[Part], sha256: str | None) -> np.ndarray:
    got = hashlib.sha256(places.astype("<i8").tobytes()).hexdigest()
    if sha256 is not None and got != sha256:
        where = ", ".join(part.where for part in parts)
        raise ValueError(
            f"{where}: the places in the archive have SHA-256 {got}, expected {sha256}: places.parquet is of other "
            "rows, or, where there are no file names, the rows are not in the archive's order"
        )
    return places


def _in_order(
    parts: list[Part], name: str, split: str, num_classes: int, sha256: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of all parts sorted by (class, file name): images (N, 32, 32, 3), labels (N,), and their order (N,)."""
    for part in parts:
        for row, label in enumerate(part.labels):
            if not 0 <= label < num_classes:
                raise ValueError(f"{part.where}: row {row} has label {label}; allowed is 0 to {num_classes - 1}")
    where = ", ".join(part.where for part in parts)
    images = np.concatenate([part.images for part in parts])
    labels = np.concatenate([np.asarray(part.labels, np.int64) for part in parts])

    sizes = np.bincount(labels, minlength=num_classes)
    if not 1 <= sizes.min() == sizes.max():
        low, high = int(sizes.argmin()), int(sizes.argmax())
        raise ValueError(
            f"{where}: class {low} has {sizes[low]} images and class {high} has {sizes[high]}; "
            "allowed is as many of each, 1 or more"
        )
    named = [part.file_names for part in parts if part.file_names is not None]
    if named and len(named) < len(parts):
        raise ValueError(
            f"{where}: some of these files have file names and some have none; one or the other is allowed"
        )
    if named:
        file_names = [file_name for names in named for file_name in names]
        # Pixels come last, so that two files of one name and class do not hang on the order read.
        order = np.array(sorted(range(len(labels)), key=lambda i: (labels[i], file_names[i], images[i].tobytes())))
    else:
        order = by_content(images, labels, f"{name}_{split}", where)
    # C order, whatever the order of the source in memory: it would show in the file's bytes.
    images, labels = np.ascontiguousarray(images[order]), labels[order]
    got = hashlib.sha256(images.data).hexdigest()
    if sha256 is not None and got != sha256:
        raise ValueError(f"{where}: the pixels have SHA-256 {got}, expected {sha256}: damaged, or other images")
    return images, labels, order


# The mirror


def _read_mirror(mirror: str, name: str, layout: Layout) -> tuple[Splits, list[str], np.ndarray | None]:
    """The parts and class names of <mirror>/<name>/{train,test}-*.parquet, and the places of the train rows."""
    try:
        files, root = fsspec.core.url_to_fs(mirror)
        found = {
            split: sorted(files.glob(f"{root.rstrip('/')}/{name}/{split}-*.parquet")) for split in ("train", "test")
        }
    except Exception as error:  # whatever the file system behind the URL raises
        said = masked(f"{MIRROR}: {mirror!r} cannot be read ({type(error).__name__}: {error})")
        raise ValueError(said) from (None if said != said.replace("***", "") else error)  # its text may hold a password
    splits: Splits = {}
    names: dict[str, list[str]] = {}
    for split, paths in found.items():
        if not paths:
            raise ValueError(f"{MIRROR}: {masked(mirror)!r} holds no {name}/{split}-*.parquet")
        splits[split] = []
        for path in paths:
            table = _read_parquet(files, path)
            splits[split].append(_part(path, table, layout.column))
            names[path] = _mirror_class_names(path, table.schema, layout)
    first, class_names = next(iter(names.items()))
    for path, others in names.items():
        if others != class_names:
            raise ValueError(f"{path}: has other class names than {first}; one of them is damaged")
    rows = sum(len(part.labels) for part in splits["train"])
    path = f"{root.rstrip('/')}/{name}/places.parquet"
    if files.exists(path):
        return splits, class_names, _places(path, _read_parquet(files, path), rows)
    archives_order = all(part.file_names is None for part in splits["train"])
    return splits, class_names, np.arange(rows) if archives_order else None


def _read_parquet(files: Any, path: str) -> pa.Table:
    try:
        with files.open(path, "rb") as file:
            return pq.ParquetFile(file).read()
    except Exception as error:  # pyarrow raises half a dozen kinds for damaged bytes
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error


def _places(path: str, table: pa.Table, rows: int) -> np.ndarray:
    """The column `place` (N,) of places.parquet."""
    if "place" not in table.column_names or not pa.types.is_integer(table["place"].type):
        raise ValueError(f"{path}: no column 'place' of integers; it has {', '.join(table.column_names)}")
    if len(table) != rows or table["place"].null_count:
        there = len(table) - table["place"].null_count
        raise ValueError(f"{path}: {there} places for {rows} training images; allowed is one for each")
    return np.asarray(table["place"], np.int64)


def _part(path: str, table: pa.Table, column: str) -> Part:
    """Decode the rows of one parquet file."""
    kinds = dict(zip(table.schema.names, table.schema.types, strict=True))
    wanted = {column: pa.types.is_integer, "img": lambda kind: _fields(kind) >= {"bytes", "path"}}
    for name, fits in wanted.items():
        if name not in kinds:
            raise ValueError(f"{path}: no column {name!r}; it has {', '.join(kinds)}")
        if not fits(kinds[name]):
            raise ValueError(
                f"{path}: column {name!r} is {kinds[name]}; "
                "allowed are integers for labels, struct(bytes, path) for img"
            )
    try:
        rows, labels = table["img"].to_pylist(), table[column].to_pylist()
    except ValueError as error:  # text that is not UTF-8
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error
    images = np.empty((len(rows), SIZE, SIZE, 3), np.uint8)
    nameless = all(cell is None or not cell["path"] for cell in rows)
    for row, (cell, label) in enumerate(zip(rows, labels, strict=True)):
        if label is None or cell is None or not (cell["path"] or nameless):
            raise ValueError(f"{path}: row {row} lacks its label or its img.path, by which rows are ordered")
        images[row] = _decode(cell["bytes"], f"{path}: row {row} ({cell['path'] or 'without a name'})")
    return Part(path, images, labels, None if nameless else [cell["path"] for cell in rows])


def _fields(kind: pa.DataType) -> set[str]:
    return {field.name for field in kind} if pa.types.is_struct(kind) else set()


def _decode(encoded: bytes | None, where: str) -> np.ndarray:
    """Pixels of one image file, uint8 (32, 32, 3)."""
    try:
        image = Image.open(io.BytesIO(encoded or b""), formats=LOSSLESS)
        if image.size == (SIZE, SIZE) and image.mode == "RGB":
            return np.asarray(image)
    except Exception as error:  # every decoder of Pillow has exceptions of its own
        raise ValueError(f"{where} is not a readable PNG or WebP image ({type(error).__name__})") from error
    size = f"{image.width}x{image.height} {image.mode}"
    raise ValueError(f"{where} is {size}; allowed is {SIZE}x{SIZE} RGB")


def _mirror_class_names(path: str, schema: pa.Schema, layout: Layout) -> list[str]:
    """Class names from the schema's metadata: `classes`, or what the `datasets` library writes."""
    metadata = schema.metadata or {}
    try:
        if b"classes" in metadata:
            names = metadata[b"classes"].decode().split(",")
        else:
            names = json.loads(metadata[b"huggingface"])["info"]["features"][layout.column]["names"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no class names in the schema's metadata ('classes' or 'huggingface')") from error
    return _checked_names(names, path, layout.num_classes)


def _checked_names(names: Any, where: str, num_classes: int) -> list[str]:
    if not isinstance(names, list) or not len(names) == len(set(map(str, names))) == num_classes:
        raise ValueError(f"{where}: its class names are {names!r:.200}; allowed are {num_classes} different ones")
    return [str(name) for name in names]


# The archive


def _read_archive(path: Path, layout: Layout) -> tuple[Splits, list[str]]:
    """The parts and class names of the official .tar.gz.

    Nothing is unpacked to disk; members not asked for are not read.
    """
    wanted = {member for members in layout.members.values() for member in members}
    found: dict[str, dict[Any, Any]] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.name not in wanted:
                    continue
                where = f"{path}: {member.name}"
                file = archive.extractfile(member) if member.isreg() else None
                if file is None or member.name in found:
                    raise ValueError(f"{where} is there twice, or is not a plain file")
                if member.size > MEMBER_BYTES:
                    raise ValueError(f"{where} unpacks to {member.size:,} bytes; allowed are {MEMBER_BYTES:,}")
                found[member.name] = _unpickle(file.read(), where)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable .tar.gz ({error})") from error
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"{path}: no member {missing[0]!r}")
    splits = {
        split: [_batch(f"{path}: {member}", found[member], layout.labels) for member in layout.members[split]]
        for split in ("train", "test")
    }
    meta = layout.members["names"][0]
    names = _texts(found[meta].get(layout.class_names), f"{path}: {meta}: class names")
    return splits, _checked_names(names, f"{path}: {meta}", layout.num_classes)


def _batch(where: str, batch: Mapping[Any, Any], labels_key: bytes) -> Part:
    """One pickle's rows: data (N, 3072), a row all red, then all green, then all blue."""
    data = _array(batch.get(b"data"), f"{where}: data")
    if data.ndim != 2 or data.shape[1] != 3 * SIZE * SIZE:
        raise ValueError(f"{where}: data has shape {data.shape}; allowed is (N, {3 * SIZE * SIZE})")
    labels = batch.get(labels_key)
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise ValueError(f"{where}: {labels_key.decode()} is missing or no list of integers")
    file_names = _texts(batch.get(b"filenames"), f"{where}: filenames")
    if not len(data) == len(labels) == len(file_names):
        raise ValueError(f"{where}: {len(data)} images, {len(labels)} labels, {len(file_names)} filenames")
    images = data.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)
    return Part(where, images, labels, file_names)


def _texts(values: Any, where: str) -> list[str]:
    if not isinstance(values, list) or any(not isinstance(value, bytes) for value in values):
        raise ValueError(f"{where} is missing or no list of text")
    return [value.decode("latin-1") for value in values]


class _PickledDtype:
    """Takes the place of numpy.dtype in a pickle: keeps the code of the type ('u1')."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes have none of."""


class _PickledArray:
    """Takes the place of numpy.ndarray: keeps what the pickle says, for `_array` to judge."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads lists, dictionaries, numbers, text and arrays of bytes, and calls only stand-ins.

    A pickle is a program that may import and call anything; the official files need three names of
    numpy, which become stand-ins, so that not even numpy gets arguments from the file.
    """

    stand_ins: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
        ("numpy", "ndarray"): "numpy.ndarray",  # only ever handed to _reconstruct
        ("numpy", "dtype"): _PickledDtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.stand_ins:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}; allowed are lists, dictionaries, numbers, text and arrays of bytes"
            )
        return self.stand_ins[module, name]


def _unpickle(data: bytes, where: str) -> dict[Any, Any]:
    """The dictionary in a pickle of Python 2, its text as bytes."""
    try:
        _check_memo(data)
        value = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a broken pickle raises whatever its broken instruction hits
        raise ValueError(f"{where}: its pickle is refused: {error!r}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: its pickle holds no dictionary but {type(value).__name__}")
    return value


def _check_memo(data: bytes) -> None:
    """Raise ValueError where values are remembered by numbers out of turn: Python makes room for all numbers below."""
    for step, (opcode, number, _) in enumerate(pickletools.genops(data)):
        if opcode.name.endswith("PUT") and number is not None and int(number) > step:
            raise ValueError(f"step {step} of it remembers a value as number {number}")


def _array(value: Any, where: str) -> np.ndarray:
    """The uint8 array that a `_PickledArray` describes."""
    state = getattr(value, "state", None)  # (version, shape, dtype, Fortran order, bytes)
    if not isinstance(value, _PickledArray) or not isinstance(state, tuple) or len(state) != 5:
        raise ValueError(f"{where} is missing or no array")
    _, shape, dtype, fortran, raw = state
    if not isinstance(dtype, _PickledDtype) or dtype.code != b"u1" or not isinstance(raw, bytes):
        raise ValueError(f"{where} is no array of bytes ({getattr(dtype, 'code', dtype)!r:.40})")
    try:
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} has {len(raw)} bytes for shape {shape!r:.80}") from error
