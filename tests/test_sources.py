"""Readers: canonical arrays, one result whatever the route, and damaged input that is named."""

import base64
import hashlib
import io
import json
import pickle
import random
import struct
import tarfile
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits
from test_fetch import serve

from longtail.data import long_tail, sources
from longtail.data.long_tail import check_source
from longtail.data.sources.cifar import order

read_cifar, read_digits = sources.load("cifar"), sources.load("digits")

MIRROR = Path(__file__).parents[2] / "shared" / "data"
MIRROR_SHA256 = {  # of its README
    "cifar100": {
        "train": "2aa2e92a742ec0fbd361b0b1386394899dfac5a05c448330d3371fd9b63b3e87",
        "test": "2716d826d85ee9ca7f948fb4dc3b3d7515225d1a436d1c4b7e6975855da3d9ee",
    },
    "cifar10": {
        "train": "61bea91e73ac2b02dfb856e685981dce64abe13d4e780aa98a1ac1e7c056d03b",
        "test": "52a9dc125982c0440d5eed87474b2f521e96c45a98df08e4329aa42c692b9d9d",
    },
}
LDAM = {  # of its README: SHA-256 of all chosen places, in drawn order, as little-endian int64; and the first of them
    ("cifar100", 10): "b4fbf1bf0a7f33381467493f50b953ce21b03a2b6d45b0d5e8da5d95d9ffd736",
    ("cifar100", 50): "561fa940cc7d3551d441643e310c7e439bf84f86b7863a3f7364963522d2984a",
    ("cifar100", 100): "e0d58a4d2700c46062da852554e5d185bbee74d3c612b052ea2a839bdadf939e",
    ("cifar100", 200): "2f00ccd33da379d5e64ce9442512a16e9e1eb3f1bb3a90316aac08c69a441157",
    ("cifar10", 10): "a17d69f192b1cf6df09676b6c424e2ad5e7d7863ccc4b9ba70ef128885973218",
    ("cifar10", 50): "d7edcfaf02772bee1e2310a33be8b6c46232f043641158348b9de3ec731e26ac",
    ("cifar10", 100): "4bf45bff8878d2786e47dccd702f96ff33b2b11d8c7da3b5015f10937290f866",
    ("cifar10", 200): "a88004a1d13610934f4f0b642dab5e5df26f0d0ef20408bd092f25ab81103334",
}
FIRST = {"cifar100": [9470, 27272, 30172, 43691, 45171], "cifar10": [4030, 38518, 48266, 45556, 6312]}
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
COLUMNS = {"cifar10": "label", "cifar100": "fine_label"}
Arrays = dict[str, np.ndarray]


class Row(NamedTuple):
    label: int
    file_name: str
    pixels: np.ndarray


Rows = dict[str, list[Row]]


def make_rows(num_classes: int, sizes: Mapping[str, int]) -> Rows:
    """Random images of both splits, in random order."""
    draw = np.random.default_rng(0)
    rows = {
        split: [
            Row(label, f"{word}_s_{number:06}.png", draw.integers(0, 256, (32, 32, 3), np.uint8))
            for label in range(num_classes)
            for number, word in zip(range(size), ["tabby", "felis_catus"] * size, strict=False)
        ]
        for split, size in sizes.items()
    }
    for split in rows:
        random.Random(1).shuffle(rows[split])
    return rows


def class_names(num_classes: int) -> list[str]:
    return [f"class_{label:02}" for label in range(num_classes)]


def expected(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    ordered = sorted(rows, key=lambda row: (row.label, row.file_name))
    return np.array([row.pixels for row in ordered]), np.array([row.label for row in ordered])


def pixel_hashes(rows: Rows) -> dict[str, str]:
    return {split: hashlib.sha256(expected(rows[split])[0].tobytes()).hexdigest() for split in rows}


def same(one: Arrays, other: Arrays) -> bool:
    """To the byte, when they are saved: kind and order in memory included."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].flags.c_contiguous
        and other[name].flags.c_contiguous
        and np.array_equal(one[name], other[name])
        for name in one
    )


# Official archives, written as Python 2 wrote them


Pickler: Any = pickle._Pickler  # the one written in Python


class Python2Pickler(Pickler):  # type: ignore[misc]
    """Protocol 2 with Python 2's byte strings, and numpy's module as it was called then."""

    def save_text(self, text: str | bytes) -> None:
        data = text.encode("latin-1") if isinstance(text, str) else text
        if len(data) < 256:
            self.write(b"U" + bytes([len(data)]) + data)  # SHORT_BINSTRING
        else:
            self.write(b"T" + struct.pack("<i", len(data)) + data)  # BINSTRING
        self.memoize(text)

    def save_name(self, value: Any, name: str | None = None) -> None:
        then = {"numpy._core.multiarray": "numpy.core.multiarray"}
        module = then.get(value.__module__, value.__module__)
        self.write(f"c{module}\n{name or value.__name__}\n".encode())
        self.memoize(value)

    dispatch = Pickler.dispatch | {
        bytes: save_text,
        str: save_text,
        type: save_name,
        FunctionType: save_name,
    }
    save_global = save_name  # for functions of C


def python2_pickle(value: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue()


def make_batch(rows: Sequence[Row], labels_key: str) -> dict[str, Any]:
    pixels = np.array([row.pixels for row in rows]).reshape(-1, 32, 32, 3)
    return {
        "batch_label": "a batch",
        "data": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(len(rows), 3072),
        labels_key: [row.label for row in rows],
        "filenames": [row.file_name for row in rows],
    }


def make_members(name: str, rows: Rows, names: Sequence[str]) -> dict[str, Any]:
    """Member -> what its pickle holds, in the official layout."""
    folder = FOLDERS[name]
    if name == "cifar100":
        return {
            f"{folder}/meta": {"fine_label_names": list(names), "coarse_label_names": ["x"]},
            f"{folder}/test": make_batch(rows["test"], "fine_labels"),
            f"{folder}/train": make_batch(rows["train"], "fine_labels"),
        }
    members: dict[str, Any] = {
        f"{folder}/data_batch_{number + 1}": make_batch(rows["train"][number::5], "labels") for number in range(5)
    }
    meta = {"label_names": list(names), "num_cases_per_batch": 10000, "num_vis": 3072}
    test = make_batch(rows["test"], "labels")
    return members | {f"{folder}/batches.meta": meta, f"{folder}/test_batch": test}


def make_archive(members: Mapping[str, Any]) -> bytes:
    """A .tar.gz of pickles; a member that is bytes already is taken as it is."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=0) as archive:
        for name, value in ({"readme.html": b"<html>"} | dict(members)).items():
            data = value if isinstance(value, bytes) else python2_pickle(value)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def read_archive(folder: Path, name: str, archive: bytes, **settings: Any) -> Arrays:
    """Read an archive that lies in the folder already: no server, no download."""
    (folder / "archive.tar.gz").write_bytes(archive)
    md5 = hashlib.md5(archive).hexdigest()
    url = "http://127.0.0.1/archive.tar.gz"
    return read_cifar(folder, name=name, url=url, md5=md5, **settings)


# Mirrors


def encode(pixels: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, lossless=True)
    return file.getvalue()


def make_table(rows: Sequence[Row], column: str, metadata: Mapping[str, str]) -> pa.Table:
    images = [{"bytes": encode(row.pixels), "path": row.file_name} for row in rows]
    kinds = {"img": pa.struct({"bytes": pa.binary(), "path": pa.string()}), column: pa.int64()}
    labels = [row.label for row in rows]
    return pa.table({"img": images, column: labels}, schema=pa.schema(kinds, metadata=dict(metadata)))


def metadata_of(name: str, num_classes: int) -> dict[str, str]:
    """As in our mirror for cifar100, as on the Hugging Face hub for cifar10."""
    names = class_names(num_classes)
    if name == "cifar100":
        return {"classes": ",".join(names)}
    feature = {"names": names, "_type": "ClassLabel"}
    features = {"img": {"_type": "Image"}, COLUMNS[name]: feature}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def make_mirror(folder: Path, name: str, rows: Rows, num_classes: int) -> Path:
    """A mirror with train in two files and test in one; returns the folder of the files."""
    (folder / name).mkdir(parents=True)
    half = len(rows["train"]) // 2
    files = {
        "train-00000-of-00002": rows["train"][:half],
        "train-00001-of-00002": rows["train"][half:],
        "test-00000-of-00001": rows["test"],
    }
    for file, part in files.items():
        table = make_table(part, COLUMNS[name], metadata_of(name, num_classes))
        # Not packed, so that a test can find the bytes of an image in the file.
        pq.write_table(table, folder / name / f"{file}.parquet", compression="none")
    return folder / name


NO_ARCHIVE = {"url": "http://127.0.0.1:1/none.tar.gz", "md5": "0" * 32}
ROWS = make_rows(10, {"train": 5, "test": 2})


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGTAIL_MIRROR", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small cifar10 mirror that LONGTAIL_MIRROR names: the folder of its files."""
    monkeypatch.setenv("LONGTAIL_MIRROR", str(tmp_path / "mirror"))
    return make_mirror(tmp_path / "mirror", "cifar10", ROWS, 10)


# A world to choose in


def test_what_is_chosen_by_results_is_chosen_on_training_images(mirror: Path) -> None:
    rows = [(row.label, row.pixels.tobytes()) for row in ROWS["train"]]
    whole = read_cifar("", name="cifar10", **NO_ARCHIVE)
    made = read_cifar("", name="cifar10", **NO_ARCHIVE, choose_on=2)
    assert same(made, read_cifar("", name="cifar10", **NO_ARCHIVE, choose_on=2))
    split = {
        part: [
            (label, pixels.tobytes())
            for label, pixels in zip(made[f"{part}_labels"], made[f"{part}_images"], strict=True)
        ]
        for part in ("train", "test")
    }
    assert sorted(split["train"] + split["test"]) == sorted(rows)  # each once, and none of the release's test images
    assert (
        np.bincount(made["train_labels"]).tolist() == [3] * 10 and np.bincount(made["test_labels"]).tolist() == [2] * 10
    )
    for part in ("train", "test"):
        assert (np.diff(made[f"{part}_labels"]) >= 0).all()
    assert made.keys() == whole.keys()


def test_where_there_is_nothing_left_to_train_on(mirror: Path) -> None:
    with pytest.raises(ValueError, match="choose_on: 5 is not allowed; allowed is 1 to 4, so that train has an image"):
        read_cifar("", name="cifar10", **NO_ARCHIVE, choose_on=5)


def test_places_go_with_the_images_that_stay(tmp_path: Path) -> None:
    archive = make_archive(make_members("cifar10", ROWS, class_names(10)))
    whole = read_archive(tmp_path, "cifar10", archive)
    made = read_archive(tmp_path, "cifar10", archive, choose_on=2)
    place_of = {
        image.tobytes(): place for image, place in zip(whole["train_images"], whole["train_places"], strict=True)
    }
    assert [place_of[image.tobytes()] for image in made["train_images"]] == made["train_places"].tolist()


# Readers by name


def test_readers_are_the_files_of_the_folder() -> None:
    for reader in ("cifar", "digits"):
        assert sources.load(reader).__module__ == f"longtail.data.sources.{reader}"


@pytest.mark.parametrize("reader", ["imagenet", "", "os", "..files", "__init__"])
def test_an_unknown_reader_is_named_with_those_there_are(reader: str) -> None:
    with pytest.raises(ValueError, match=r"reader: .* is unknown; allowed are cifar, digits"):
        sources.load(reader)


# Digits


def test_digits_are_all_there_once_and_the_test_split_is_balanced() -> None:
    arrays = read_digits("unused", test_per_class=50, seed=0)
    check_source(arrays)
    assert arrays["train_images"].shape == (1297, 8, 8, 1)
    assert np.bincount(arrays["test_labels"]).tolist() == [50] * 10
    whole = load_digits()
    assert arrays["class_names"].tolist() == [str(name) for name in whole.target_names]
    slow = [  # Fractions, pixel by pixel
        (int(label), [int(Fraction(int(value)) * 255 / 16 + Fraction(1, 2)) for value in values])
        for values, label in zip(whole.data, whole.target, strict=True)
    ]
    fast = [
        (int(label), image.ravel().tolist())
        for split in ("train", "test")
        for image, label in zip(arrays[f"{split}_images"], arrays[f"{split}_labels"], strict=True)
    ]
    assert sorted(fast) == sorted(slow)
    assert {min(min(image) for _, image in fast), max(max(image) for _, image in fast)} == {0, 255}


def test_digits_keep_class_order_then_row_order() -> None:
    arrays = read_digits("unused", test_per_class=50, seed=0)
    whole = load_digits()
    where: dict[bytes, int] = {}  # row of each image; no two are equal
    for row, image in enumerate(((255 * whole.images.astype(int) + 8) // 16).astype(np.uint8)):
        assert where.setdefault(image.tobytes(), row) == row
    for split in ("train", "test"):
        rows = [where[image.tobytes()] for image in arrays[f"{split}_images"]]
        assert arrays[f"{split}_labels"].tolist() == whole.target[rows].tolist()
        keys = list(zip(arrays[f"{split}_labels"].tolist(), rows, strict=True))
        assert keys == sorted(keys)


def test_digits_hang_on_the_seed_alone() -> None:
    one, again, other = (read_digits("unused", test_per_class=9, seed=seed) for seed in (0, 0, 1))
    assert same(one, again) and not same(one, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_per_class": 0, "seed": 0}, "test_per_class: 0 .* has 174 images.* 1 to 173"),
        ({"test_per_class": 174, "seed": 0}, "test_per_class: 174"),
        ({"test_per_class": 50, "seed": -1}, "seed: -1 .* 0 or more"),
    ],
)
def test_bad_settings_of_digits_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_digits("unused", **settings)


# Cifar: both routes


@pytest.mark.parametrize(("name", "num_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_archive_and_mirror_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, num_classes: int
) -> None:
    rows = make_rows(num_classes, {"train": 4, "test": 1})
    make_mirror(tmp_path / "mirror", name, rows, num_classes)
    sha256 = pixel_hashes(rows)
    archive = make_archive(make_members(name, rows, class_names(num_classes)))
    from_archive = read_archive(tmp_path, name, archive, sha256=sha256)
    monkeypatch.setenv("LONGTAIL_MIRROR", str(tmp_path / "mirror"))
    from_mirror = read_cifar(tmp_path, name=name, sha256=sha256, **NO_ARCHIVE)
    without_places = {key: array for key, array in from_archive.items() if key != "train_places"}
    assert same(without_places, from_mirror)
    write_places(tmp_path / "mirror" / name, from_archive["train_places"])
    assert same(from_archive, read_cifar(tmp_path, name=name, sha256=sha256, **NO_ARCHIVE))
    check_source(from_archive)
    assert from_archive["class_names"].tolist() == class_names(num_classes)
    for split in ("train", "test"):
        images, labels = expected(rows[split])
        assert (from_archive[f"{split}_images"] == images).all()
        assert (from_archive[f"{split}_labels"] == labels).all()


def places_in_order(rows: Sequence[Row]) -> list[int]:
    """Of images without two of one name and class."""
    return sorted(range(len(rows)), key=lambda place: (rows[place].label, rows[place].file_name))


def in_batches(rows: Sequence[Row]) -> list[Row]:
    """The train rows as `make_members` spreads them over the batches of cifar10."""
    return [row for number in range(5) for row in rows[number::5]]


@pytest.mark.parametrize(("name", "num_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_places_count_through_the_training_files_of_the_archive(tmp_path: Path, name: str, num_classes: int) -> None:
    rows = make_rows(num_classes, {"train": 4, "test": 1})
    names = class_names(num_classes)
    arrays = read_archive(tmp_path, name, make_archive(make_members(name, rows, names)))
    lie = in_batches(rows["train"]) if name == "cifar10" else rows["train"]
    assert arrays["train_places"].dtype == np.int64
    assert arrays["train_places"].tolist() == places_in_order(lie)
    for row, place in enumerate(arrays["train_places"]):
        assert (arrays["train_images"][row] == lie[place].pixels).all()


def write_places(folder: Path, places: np.ndarray) -> Path:
    """A places.parquet for a mirror of `make_mirror`, whose train rows lie as ROWS do, from places in our order."""
    tables = [pq.read_table(path) for path in sorted(folder.glob("train-*"))]
    keys = [
        (label, cell["path"])
        for table in tables
        for label, cell in zip(table.column(1).to_pylist(), table["img"].to_pylist(), strict=True)
    ]
    column = np.empty(len(keys), np.int32)
    column[sorted(range(len(keys)), key=lambda row: keys[row])] = places
    pq.write_table(pa.table({"path": [key[1] for key in keys], "place": column}), folder / "places.parquet")
    return folder / "places.parquet"


def test_bad_places_are_named(mirror: Path) -> None:
    path = write_places(mirror, np.arange(50))
    table = pq.read_table(path)
    read_cifar("unused", name="cifar10", **NO_ARCHIVE)
    for wrong, message in (
        (table.drop_columns("place"), "no column 'place' of integers; it has path"),
        (table.set_column(1, "place", table["path"]), "no column 'place' of integers"),
        (table.slice(1), "49 places for 50 training images"),
        (table.set_column(1, "place", pa.array([None, *range(49)])), "49 places for 50"),
    ):
        pq.write_table(wrong, path)
        assert_refused(f"places.parquet: {message}")
    path.write_bytes(b"PAR1")
    assert_refused("places.parquet: not a readable parquet file")


def test_the_hash_of_the_places_is_checked(mirror: Path) -> None:
    places = np.random.default_rng(0).permutation(50)
    write_places(mirror, places)
    hashes = pixel_hashes(ROWS) | {"places": hashlib.sha256(places.astype("<i8").tobytes()).hexdigest()}
    arrays = read_cifar("unused", name="cifar10", sha256=hashes, **NO_ARCHIVE)
    assert arrays["train_places"].tolist() == places.tolist()
    write_places(mirror, places[::-1])
    assert_refused(r"train-00001-of-00002.parquet: the places .* SHA-256 .* expected", sha256=hashes)


def test_a_copy_without_names_that_is_not_all_of_cifar_is_refused(mirror: Path) -> None:
    def lose_names(rows: list[Row]) -> None:
        rows[:] = [row._replace(file_name=None) for row in rows]  # type: ignore[arg-type]

    rewrite(mirror / "train-00000-of-00002.parquet", lose_names)
    assert_refused("00001-of-00002.parquet: some of these files have file names and some have none")
    rewrite(mirror / "train-00001-of-00002.parquet", lose_names)
    assert_refused("50 images without file names; without names, allowed are the 50000 of cifar10_train")


def as_on_the_hub(name: str, arrays: Arrays, folder: Path) -> Path:
    """A mirror of real images in the hub's layout: the archive's order, names lost; the test split in any order."""
    rows = {"train": np.argsort(arrays["train_places"]), "test": np.random.default_rng(0).permutation(10_000)}
    (folder / name).mkdir(parents=True)
    kinds = {"img": pa.struct({"bytes": pa.binary(), "path": pa.string()}), COLUMNS[name]: pa.int64()}
    names = ",".join(arrays["class_names"])
    for split, lie in rows.items():
        images, labels = arrays[f"{split}_images"][lie], arrays[f"{split}_labels"][lie]
        cells = [{"bytes": encode(image), "path": None} for image in images]
        table = pa.table({"img": cells, COLUMNS[name]: labels}, schema=pa.schema(kinds, metadata={"classes": names}))
        pq.write_table(table, folder / name / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_cut_of_the_field_to_the_image_and_a_copy_without_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The published hashes, order.npz made again, and the hub's own layout with the same bytes as a named mirror."""
    if not MIRROR.is_dir():
        pytest.skip(f"no mirror at {MIRROR}")
    monkeypatch.setenv("LONGTAIL_MIRROR", str(MIRROR))
    source = yaml.safe_load((ROOT / "params.yaml").read_text())["sources"][name]
    settings = {"name": name, "sha256": source["sha256"], **NO_ARCHIVE}
    assert source["sha256"].items() >= MIRROR_SHA256[name].items()
    arrays = read_cifar(tmp_path, **settings)
    labels, places = arrays["train_labels"], arrays["train_places"]
    for factor in (10, 50, 100, 200):
        rows = long_tail.drawn(
            labels, profile="exponential", imbalance_factor=factor, seed=0, draw="ldam", places=places
        )
        chosen = places[np.concatenate(rows)]
        assert hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest() == LDAM[name, factor]
        if factor == 100:
            assert chosen[:5].tolist() == FIRST[name]

    archives = np.argsort(places)
    with np.load(order.FILE) as file:
        train = order.ranks(arrays["train_images"][archives], labels[archives], places)
        test = order.ranks(arrays["test_images"], arrays["test_labels"], np.arange(10_000))
        assert np.array_equal(file[f"{name}_train"], train) and np.array_equal(file[f"{name}_test"], test)

    nameless = as_on_the_hub(name, arrays, tmp_path / "hub")
    monkeypatch.setenv("LONGTAIL_MIRROR", str(nameless))
    assert same(read_cifar(tmp_path, **settings), arrays)
    path = nameless / name / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    swapped = np.arange(50_000)
    one, other = np.flatnonzero(np.asarray(table[COLUMNS[name]]) == 3)[:2]
    swapped[[one, other]] = other, one
    pq.write_table(table.take(swapped), path)
    with pytest.raises(ValueError, match="the rows are not in the archive's order"):
        read_cifar(tmp_path, **settings)


@pytest.mark.slow
def test_real_archive_over_a_broken_line_and_real_mirror_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 60,000 images of CIFAR-100, put into the official layout in another order and served."""
    if not MIRROR.is_dir():
        pytest.skip(f"no mirror at {MIRROR}")
    monkeypatch.setenv("LONGTAIL_MIRROR", str(MIRROR))
    from_mirror = read_cifar(tmp_path, name="cifar100", sha256=MIRROR_SHA256["cifar100"], **NO_ARCHIVE)
    monkeypatch.delenv("LONGTAIL_MIRROR")

    assert np.bincount(from_mirror["train_labels"]).tolist() == [500] * 100
    means = from_mirror["train_images"].mean((0, 1, 2)) / 255
    assert means.round(4).tolist() == [0.5071, 0.4865, 0.4409]  # CIFAR-100's own
    rows: Rows = {}
    paths_of = {}
    for split in ("train", "test"):
        file = next((MIRROR / "cifar100").glob(f"{split}-*"))
        table = pq.read_table(file, columns=["img.path"])
        paths = paths_of[split] = table.flatten().column(0).to_pylist()
        columns = from_mirror[f"{split}_labels"].tolist(), paths, from_mirror[f"{split}_images"]
        rows[split] = [Row(*row) for row in zip(*columns, strict=True)]
        random.Random(0).shuffle(rows[split])
    names = from_mirror["class_names"].tolist()
    archive = make_archive(make_members("cifar100", rows, names))

    with serve(archive, cuts=(len(archive) // 3,)) as server:
        from_archive = read_cifar(
            tmp_path,
            name="cifar100",
            url=server.url,
            md5=hashlib.md5(archive).hexdigest(),
            sha256=MIRROR_SHA256["cifar100"],
        )
        assert server.seen == [None, f"bytes={len(archive) // 3}-"]
    lie = {(row.label, row.file_name): place for place, row in enumerate(rows["train"])}
    keys = zip(from_mirror["train_labels"].tolist(), paths_of["train"], strict=True)
    assert from_archive.pop("train_places").tolist() == [lie[key] for key in keys]
    assert np.array_equal(np.sort(from_mirror.pop("train_places")), np.arange(50_000))
    assert same(from_archive, from_mirror)


def test_an_interrupted_archive_resumes_in_the_next_call(tmp_path: Path) -> None:
    archive = make_archive(make_members("cifar10", ROWS, class_names(10)))
    md5 = hashlib.md5(archive).hexdigest()
    with serve(archive, cuts=(10_000, 0)) as server:
        settings = {"name": "cifar10", "url": server.url, "md5": md5}
        with pytest.raises(ValueError, match=r"broke off.*LONGTAIL_MIRROR"):
            read_cifar(tmp_path, **settings)
        assert [file.name for file in tmp_path.iterdir()] == ["archive.tar.gz.part"]
        arrays = read_cifar(tmp_path, **settings)
        assert server.seen[-1] == "bytes=10000-"
        read_cifar(tmp_path, **settings)
        assert len(server.seen) == 3  # the archive is kept
    assert (arrays["train_images"] == expected(ROWS["train"])[0]).all()


def test_a_mirror_may_be_any_url_that_fsspec_knows(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = read_cifar("unused", name="cifar10", **NO_ARCHIVE)
    memory = fsspec.filesystem("memory")
    for path in mirror.iterdir():
        memory.pipe(f"/far/cifar10/{path.name}", path.read_bytes())
    monkeypatch.setenv("LONGTAIL_MIRROR", "memory://far")
    assert same(read_cifar("unused", name="cifar10", **NO_ARCHIVE), here)
    memory.rm("/far", recursive=True)


def test_one_name_and_class_for_two_images_leaves_one_order(tmp_path: Path) -> None:
    rows = {split: [row._replace(file_name="same.png") for row in ROWS[split]] for split in ROWS}
    turned = {split: rows[split][::-1] for split in rows}
    one, other = (
        read_archive(tmp_path, "cifar10", make_archive(make_members("cifar10", some, "abcdefghij")))
        for some in (rows, turned)
    )
    places = one.pop("train_places"), other.pop("train_places")  # these are where each lay
    assert same(one, other) and not np.array_equal(*places)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cifar20"}, "name: 'cifar20' is unknown; allowed are cifar10, cifar100"),
        ({"name": "cifar10", "sha256": {"val": ""}}, "sha256: 'val' is unknown; allowed are train, test, places"),
    ],
)
def test_bad_settings_of_cifar_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_cifar("unused", **settings, **NO_ARCHIVE)


# Cifar: damaged mirrors


def rewrite(path: Path, change: Callable[[list[Row]], Any]) -> None:
    """Write a file of the small mirror anew from changed rows."""
    table = pq.read_table(path)
    rows = [
        Row(label, cell["path"], np.asarray(Image.open(io.BytesIO(cell["bytes"]))))
        for label, cell in zip(table["label"].to_pylist(), table["img"].to_pylist(), strict=True)
    ]
    change(rows)
    pq.write_table(make_table(rows, "label", metadata_of("cifar10", 10)), path)


def change_row(row: int, change: Callable[[Row], Row], rows: list[Row]) -> None:
    rows[row] = change(rows[row])


def assert_refused(message: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message):
        read_cifar("unused", name="cifar10", **NO_ARCHIVE, **settings)


def test_a_mirror_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, mirror: Path) -> None:
    (mirror / "test-00000-of-00001.parquet").unlink()
    assert_refused(r"LONGTAIL_MIRROR: '.*mirror' holds no cifar10/test-\*.parquet")
    monkeypatch.setenv("LONGTAIL_MIRROR", str(mirror / "nowhere"))
    assert_refused(r"LONGTAIL_MIRROR: '.*nowhere' holds no cifar10/train-\*.parquet")
    monkeypatch.setenv("LONGTAIL_MIRROR", "nosuch://bucket")
    assert_refused("LONGTAIL_MIRROR: 'nosuch://bucket' cannot be read")


def test_an_undecodable_image_is_named_with_its_row(mirror: Path) -> None:
    path = mirror / "train-00001-of-00002.parquet"
    data = bytearray(path.read_bytes())
    data[data.index(encode(ROWS["train"][25 + 7].pixels))] ^= 1
    path.write_bytes(data)
    assert_refused(r"train-00001-of-00002.parquet: row 7 \(\w+_s_\d+.png\) is not a readable PNG or WebP")


def test_an_image_that_is_not_lossless_is_refused(mirror: Path) -> None:
    path = mirror / "test-00000-of-00001.parquet"
    table = pq.read_table(path)
    jpeg = [{"bytes": encode(row.pixels, "JPEG"), "path": row.file_name} for row in ROWS["test"]]
    pq.write_table(table.set_column(0, "img", pa.array(jpeg)), path)
    assert_refused(r"test-00000-of-00001.parquet: row 0 \(.*\) is not a readable PNG or WebP image")


def test_pixels_that_decode_but_are_others_name_the_file(mirror: Path) -> None:
    def one_pixel(rows: list[Row]) -> None:
        pixels = rows[3].pixels.copy()
        pixels[5, 6, 1] ^= 1
        rows[3] = rows[3]._replace(pixels=pixels)

    sha256 = pixel_hashes(ROWS)
    read_cifar("unused", name="cifar10", sha256=sha256, **NO_ARCHIVE)
    rewrite(mirror / "test-00000-of-00001.parquet", one_pixel)
    assert_refused(r"test-00000-of-00001.parquet: .* SHA-256 .* expected " + sha256["test"], sha256=sha256)


def test_swapped_labels_do_not_pass_the_hash_of_the_pixels(mirror: Path) -> None:
    def swap(rows: list[Row]) -> None:
        one, other = 0, next(i for i, row in enumerate(rows) if row.label != rows[0].label)
        rows[one], rows[other] = (
            rows[one]._replace(label=rows[other].label),
            rows[other]._replace(label=rows[one].label),
        )

    rewrite(mirror / "test-00000-of-00001.parquet", swap)
    assert_refused("test-00000-of-00001.parquet: .* SHA-256", sha256=pixel_hashes(ROWS))


def test_flipped_bytes_are_named_or_do_no_harm(mirror: Path) -> None:
    """Bytes anywhere in the file: pixels, names, labels, page headers, footer, class names."""
    sha256 = pixel_hashes(ROWS)
    clean = read_cifar("unused", name="cifar10", sha256=sha256, **NO_ARCHIVE)
    path = mirror / "test-00000-of-00001.parquet"
    data = path.read_bytes()
    draw, caught = random.Random(0), 0
    # The footer is small beside the images: half of the flips go there.
    places = [draw.randrange(len(data)) for _ in range(30)]
    places += [draw.randrange(len(data) - 3000, len(data)) for _ in range(30)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            arrays = read_cifar("unused", name="cifar10", sha256=sha256, **NO_ARCHIVE)
        except ValueError as error:
            assert path.name in str(error)
            caught += 1
        else:
            assert same(arrays, clean), place
    assert caught > len(places) / 3


def test_a_cut_or_foreign_file_is_named(mirror: Path) -> None:
    path = mirror / "train-00000-of-00002.parquet"
    data = path.read_bytes()
    for wrong in (data[:-100], b"", b"PAR1 but not really"):
        path.write_bytes(wrong)
        assert_refused("train-00000-of-00002.parquet: not a readable parquet file")


def test_wrong_rows_are_named(mirror: Path) -> None:
    path = mirror / "train-00000-of-00002.parquet"
    data = path.read_bytes()
    nothing: Any = None
    changes: list[tuple[Callable[[Row], Row], str]] = [
        (lambda row: row._replace(label=10), "row 2 has label 10; allowed is 0 to 9"),
        (lambda row: row._replace(label=-1), "row 2 has label -1"),
        (lambda row: row._replace(pixels=row.pixels[:31]), r"row 2 .* is 32x31 RGB; .* 32x32 RGB"),
        (lambda row: row._replace(pixels=row.pixels[..., 0]), r"row 2 .* is 32x32 L"),
        (lambda row: row._replace(file_name=nothing), "row 2 lacks its label or its img.path"),
        (lambda row: row._replace(label=nothing), "row 2 lacks its label"),
        (lambda row: row._replace(label=(row.label + 1) % 10), "class . has 4 .* class . has 6"),
    ]
    for change, message in changes:
        path.write_bytes(data)
        rewrite(path, partial(change_row, 2, change))
        assert_refused(f"train-00000-of-00002.parquet.*: {message}")


def test_wrong_columns_are_named(mirror: Path) -> None:
    path = mirror / "train-00000-of-00002.parquet"
    table = pq.read_table(path)
    bytes_alone = pa.array([{"bytes": b""}] * len(table))
    for wrong, message in (
        (table.drop_columns("label"), "no column 'label'; it has img"),
        (table.drop_columns("img"), "no column 'img'; it has label"),
        (table.set_column(1, "label", table["label"].cast("string")), "column 'label' is string"),
        (table.set_column(0, "img", bytes_alone), "column 'img' is struct<bytes: binary>"),
        (table.set_column(0, "img", table["label"]), "column 'img' is int64"),
        (table.replace_schema_metadata({}), "no class names in the schema's metadata"),
        (table.replace_schema_metadata({"huggingface": "{}"}), "no class names"),
        (table.replace_schema_metadata({"classes": "a,b"}), r"class names are \['a', 'b'\]; .* 10"),
        (
            table.replace_schema_metadata({"classes": "a,b,c,d,e,f,g,h,i,j"}),
            "other class names than .*train-00000-of-00002.parquet",
        ),
    ):
        pq.write_table(wrong, path)
        assert_refused(message)


def test_an_empty_mirror_is_refused(mirror: Path) -> None:
    rewrite(mirror / "test-00000-of-00001.parquet", lambda rows: rows.clear())
    assert_refused("test-00000-of-00001.parquet: class 0 has 0 images")


# Cifar: bad archives


def members() -> dict[str, Any]:
    return make_members("cifar10", ROWS, class_names(10))


BATCH = "cifar-10-batches-py/data_batch_3"


def test_our_archives_are_pickled_as_the_official_ones_are() -> None:
    """So that reading them shows something: plain pickle reads them the way the site says to."""
    data = python2_pickle(members()[BATCH])
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in data and b"_codecs" not in data
    batch = pickle.loads(data, encoding="bytes")
    assert batch[b"data"].shape == (10, 3072) and batch[b"data"].dtype == np.uint8
    assert batch[b"filenames"][0] == ROWS["train"][2].file_name.encode()


def test_data_in_fortran_order_is_read_as_what_it_is(tmp_path: Path) -> None:
    turned = members()
    plain = read_archive(tmp_path, "cifar10", make_archive(turned))
    turned[BATCH]["data"] = np.asfortranarray(turned[BATCH]["data"])
    assert same(read_archive(tmp_path, "cifar10", make_archive(turned)), plain)


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    archive = make_archive(members())
    for length in (0, 100, len(archive) // 2):
        with pytest.raises(ValueError, match=r"archive.tar.gz: (not a readable .tar.gz|no member)"):
            read_archive(tmp_path, "cifar10", archive[:length])


def test_a_wrong_md5_names_url_expected_and_got(tmp_path: Path) -> None:
    archive = make_archive(members())
    with serve(archive) as server, pytest.raises(ValueError) as caught:
        read_cifar(tmp_path, name="cifar10", url=server.url, md5="0" * 32)
    got = hashlib.md5(archive).hexdigest()
    assert all(text in str(caught.value) for text in (server.url, "0" * 32, got))
    assert list(tmp_path.iterdir()) == []


def test_members_are_looked_up_and_never_unpacked(tmp_path: Path) -> None:
    fewer = members()
    del fewer[BATCH]
    with pytest.raises(ValueError, match=f"no member '{BATCH}'"):
        read_archive(tmp_path, "cifar10", make_archive(fewer | {f"../{BATCH}": b"", "/etc/x": b""}))
    with pytest.raises(ValueError, match="no member 'cifar-100-python/meta'"):
        read_archive(tmp_path, "cifar100", make_archive(members()))
    assert [path.name for path in tmp_path.iterdir()] == ["archive.tar.gz"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, None])
def test_links_folders_and_second_copies_are_refused(tmp_path: Path, kind: bytes | None) -> None:
    whole = make_archive(members() if kind is None else {})
    file = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(whole)) as archive,
        tarfile.open(fileobj=file, mode="w:gz") as changed,
    ):
        for member in archive:
            changed.addfile(member, archive.extractfile(member))
        again = tarfile.TarInfo(BATCH)
        again.type, again.linkname = kind or tarfile.REGTYPE, "/etc/hostname"
        changed.addfile(again)
    with pytest.raises(ValueError, match=f"{BATCH} is there twice, or is not a plain file"):
        read_archive(tmp_path, "cifar10", file.getvalue())


def code_that_writes(path: Path) -> dict[str, bytes]:
    """Pickles that would make the file if they were allowed to."""
    target = str(path)

    def call(function: str, *arguments: str) -> bytes:
        module, name = function.split(" ")
        texts = b"".join(b"U" + bytes([len(text)]) + text.encode() for text in arguments)
        return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + texts + b"tR."

    def new_style(module: str, name: str) -> bytes:  # protocol 4: STACK_GLOBAL, names with dots
        texts = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
        return b"\x80\x04" + texts + b"\x93(\x8c" + bytes([len(target)]) + target.encode() + b"tR."

    python = f"open({target!r}, 'w')"
    return {
        "posix.system": call("posix system", f"touch {target}"),
        "builtins.eval": call("builtins eval", python),
        "__builtin__.eval": call("__builtin__ eval", python),
        "builtins.open": call("builtins open", target, "w"),
        "numpy.save": call("numpy save", target, "x"),
        "numpy.dtype.__class__": new_style("numpy", "dtype.__class__"),
        "numpy.core.multiarray.fromfile": call("numpy.core.multiarray fromfile", target),
        "pathlib.Path.touch": new_style("pathlib", "Path.touch"),
        "copy_reg._reconstructor": call("copy_reg _reconstructor", target),
    }


@pytest.mark.parametrize("name", code_that_writes(Path("x")))
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path, name: str) -> None:
    evil = code_that_writes(tmp_path / "ran")[name]
    if name == "builtins.eval":  # the pickle does what it should when it is not refused
        pickle.loads(evil).close()
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()
    with pytest.raises(ValueError, match=f"{BATCH}: its pickle is refused.*it asks for {name}"):
        read_archive(tmp_path, "cifar10", make_archive(members() | {BATCH: evil}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02}",
        b"garbage",
        b"\x80\x02]q\x01.",
        b"\x80\x02Pid\n.",
        b"\x82\x01.",
        b"\x80\x02}r\n\0yK.",  # found by fuzzing: 18 bytes that took 20 GB
    ],
    ids=["empty", "no end", "no stop", "garbage", "a list", "persistent id", "extension", "memory"],
)
def test_broken_pickles_are_named(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=f"{BATCH}: its pickle (is refused|holds no dictionary)"):
        read_archive(tmp_path, "cifar10", make_archive(members() | {BATCH: data}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, f"{BATCH}: data is missing or no array"),
        ({"data": np.zeros((10, 3072), np.int32)}, f"{BATCH}: data is no array of bytes"),
        ({"data": np.array([[1, None]], object)}, f"{BATCH}: data is no array of bytes"),
        ({"data": np.zeros((10, 1024), np.uint8)}, r"data has shape \(10, 1024\); .* \(N, 3072\)"),
        ({"data": np.zeros((9, 3072), np.uint8)}, "9 images, 10 labels, 10 filenames"),
        ({"labels": [0] * 9}, "10 images, 9 labels, 10 filenames"),
        ({"labels": [0] * 9 + [10]}, f"{BATCH}: row 9 has label 10; allowed is 0 to 9"),
        ({"labels": ["0"] * 10}, "labels is missing or no list of integers"),
        ({"labels": None}, "labels is missing or no list of integers"),
        ({"labels": [0] * 10}, r"data_batch_1, .*data_batch_5: class . has . images and class 0"),
        ({"filenames": [1] * 10}, "filenames is missing or no list of text"),
    ],
)
def test_bad_batches_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    bad = members()
    bad[BATCH] |= change
    with pytest.raises(ValueError, match=message):
        read_archive(tmp_path, "cifar10", make_archive(bad))


@pytest.mark.parametrize("names", [["a"], ["a"] * 10, None])
def test_bad_class_names_are_refused(tmp_path: Path, names: list[str] | None) -> None:
    bad = members()
    bad["cifar-10-batches-py/batches.meta"]["label_names"] = names
    with pytest.raises(ValueError, match=r"batches.meta: .*class names"):
        read_archive(tmp_path, "cifar10", make_archive(bad))


def test_an_array_whose_bytes_do_not_fill_its_shape_is_refused(tmp_path: Path) -> None:
    data = python2_pickle(members()[BATCH])
    shape = b"K\nM\x00\x0c\x86"  # (10, 3072)
    assert data.count(shape) == 1
    with pytest.raises(ValueError, match="data has 30720 bytes for shape"):
        read_archive(
            tmp_path,
            "cifar10",
            make_archive(members() | {BATCH: data.replace(shape, b"K\x0bM\x00\x0c\x86")}),
        )


def test_the_hash_of_the_pixels_holds_for_archives_too(tmp_path: Path) -> None:
    wrong = pixel_hashes(ROWS) | {"test": base64.b16encode(bytes(32)).decode()}
    with pytest.raises(ValueError, match=r"test_batch: the pixels have SHA-256"):
        read_archive(tmp_path, "cifar10", make_archive(members()), sha256=wrong)
