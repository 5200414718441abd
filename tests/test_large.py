"""Large data sets: lists and trees held against releases, an index, and features that are streamed from it."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import fsspec
import large_trees
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from longtail.data.decode import BrokenError
from longtail.data.large import facts, feed, index, lists, places
from longtail.data.large.pixels import Square, square
from longtail.data.large.store import Piece, Store
from longtail.training import indexed
from longtail.workflow import files

SMALL = {"edition": "other", "held_out": "list"}
BACKBONE = {"library": "torchvision", "network": "resnet18", "weights": "none", "resolution": 32}
HOW = {"share": 0.875, "exif_orientation": False, "draft": False, "broken": "refuse"}


def settings(layout: str) -> dict[str, str]:
    return {"layout": layout, "edition": "other", "held_out": "none" if layout == "inaturalist_2018" else "list"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGTAIL_LARGE", str(tmp_path / "large"))
    monkeypatch.setenv("LONGTAIL_WORKERS", "0")
    return tmp_path / "large"


# ------------------------------------------------------------------------------------------------ the index


@pytest.mark.parametrize("layout", large_trees.MAKERS)
def test_an_index_has_all_rows_by_class_and_name(here: Path, layout: str) -> None:
    rows = large_trees.MAKERS[layout](here)
    arrays = index.make(**settings(layout))
    form = facts.LAYOUTS[layout].form
    for split in rows:
        wanted = sorted((label, form.key(path)) for path, label in rows[split])
        assert [key.decode() for key in arrays[f"{split}_keys"]] == [key for _, key in wanted]
        assert arrays[f"{split}_labels"].tolist() == [label for label, _ in wanted]
    report = json.loads(str(arrays["report"]))
    assert report["images"]["train"] == sum(large_trees.SIZES) and report["many_medium_few"] == [0, 1, 4]
    store, pieces = index.locate(arrays, layout)
    for split, of_split in pieces.items():
        for piece, size in zip(of_split, arrays[f"{split}_sizes"], strict=True):
            assert len(store.piece(piece)) == size


def test_every_form_of_a_list_is_the_same_index(here: Path) -> None:
    found = set()
    for form in ("data_256", "easy", "gala"):
        large_trees.places(here, form)
        found.add(index.digest(index.make(**settings("places_lt"))))
    assert len(found) == 1


def test_archives_are_the_same_index_as_what_they_unpack_to(here: Path) -> None:
    large_trees.imagenet(here)
    unpacked = index.make(**settings("imagenet_lt"))
    large_trees.pack(here / "imagenet", "ILSVRC2012_img_train.tar", "train", nested=True)
    large_trees.pack(here / "imagenet", "ILSVRC2012_img_val.tar", "val")
    packed = index.make(**settings("imagenet_lt"))
    assert unpacked.keys() == packed.keys()
    assert all(np.array_equal(unpacked[name], packed[name]) for name in unpacked)
    store, pieces = index.locate(packed, "imagenet_lt")
    for piece, key in zip(pieces["train"], packed["train_keys"].tolist(), strict=True):
        original = next((here / "imagenet" / ".train").rglob(key.decode()))
        assert piece.offset > 0 and store.piece(piece) == original.read_bytes()


def test_a_store_elsewhere_is_read_by_fsspec(here: Path) -> None:
    large_trees.inaturalist(here)
    local = index.make(**settings("inaturalist_2018"))
    memory = fsspec.filesystem("memory")
    memory.put(str(here), "/elsewhere", recursive=True)
    there = index.make("memory://elsewhere", **settings("inaturalist_2018"))
    assert index.digest(local) == index.digest(there)
    store, pieces = index.locate(there, "inaturalist_2018", "memory://elsewhere")
    assert len(store.piece(pieces["train"][0])) == there["train_sizes"][0]


def test_the_annotations_of_inaturalist_are_joined_by_image(here: Path) -> None:
    rows = large_trees.inaturalist(here)
    listed = index.make(**settings("inaturalist_2018"))
    for name, split in (("train", "train"), ("val", "test")):
        (here / f"inaturalist2018/iNaturalist18_{name}.txt").unlink()
        images = [{"id": 7 * n, "file_name": path} for n, (path, _) in enumerate(rows[split])]
        labels = [{"image_id": 7 * n, "category_id": label} for n, (_, label) in enumerate(rows[split])]
        content = {"images": images, "annotations": labels[::-1]}
        (here / f"inaturalist2018/{name}2018.json").write_text(json.dumps(content))
    joined = index.make(**settings("inaturalist_2018"))
    assert index.digest(listed) == index.digest(joined)


def test_the_subsets_of_class_incremental_learning(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large_trees.imagenet(here)
    monkeypatch.setattr(index, "SUBSET", 3)
    synsets = [f"n{label + 1440764:08}" for label in range(5)]
    drawn = sorted(synsets[place] for place in np.random.RandomState(1993).permutation(5)[:3])
    for layout, wanted in (
        ("imagenet_100_first", synsets[:3]), ("imagenet_100_drawn", drawn), ("imagenet_1000", synsets),
    ):  # fmt: skip
        arrays = index.make(layout=layout, edition="other", held_out="none")
        assert arrays["class_names"].tolist() == wanted
        # all of train, whatever ImageNet-LT's lists take of it
        in_tree = [len(list((here / "imagenet/train" / synset).iterdir())) for synset in wanted]
        assert np.bincount(arrays["train_labels"]).tolist() == in_tree
        assert np.bincount(arrays["test_labels"]).tolist() == [4] * len(wanted)


def test_the_drawn_hundred_are_those_of_the_field() -> None:
    order = np.random.RandomState(1993).permutation(1000)
    assert hashlib.sha256(",".join(map(str, order)).encode()).hexdigest().startswith("305571fb8fde")
    assert sorted(order[:100])[:6] == [7, 11, 14, 44, 54, 62]


# ------------------------------------------------------------------------------------- what is wrong is named


def released(monkeypatch: pytest.MonkeyPatch, layout: str, rows: dict[str, list[tuple[str, int]]], root: Path) -> None:
    """Have the small data set be the release: its counts and the hashes of its lists."""
    known = facts.LAYOUTS[layout]
    sets = {}
    for split, listed in known.lists.items():
        sizes = np.bincount([label for _, label in rows[split]])
        blob = lists.git_blob((root / known.folder / listed.name).read_bytes())
        sets[split] = listed._replace(
            rows=len(rows[split]), smallest=sizes.min(), largest=sizes.max(), blobs={blob: "usual"}
        )
    small = replace(known, classes=len(large_trees.SIZES), lists=sets, shots=(0, 1, 4), fixed={})
    monkeypatch.setitem(facts.LAYOUTS, layout, small)
    assert index.LAYOUTS is facts.LAYOUTS is lists.LAYOUTS


def official(layout: str) -> dict[str, str]:
    return settings(layout) | {"edition": "official"}


@pytest.mark.parametrize("layout", large_trees.MAKERS)
def test_a_release_passes_and_what_is_short_crlf_or_swapped_does_not(
    here: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    rows = large_trees.MAKERS[layout](here)
    released(monkeypatch, layout, rows, here)
    index.make(**official(layout))
    known = facts.LAYOUTS[layout]
    path = here / known.folder / known.lists["train"].name
    whole = path.read_text()

    path.write_text(whole.rpartition("\n")[0].rpartition("\n")[0] + "\n")
    with pytest.raises(ValueError, match=f"{path.name}: too short: 53 rows, {known.title}'s has 54"):
        index.make(**official(layout))
    path.write_text(whole.replace("\n", "\r\n"))
    with pytest.raises(ValueError, match=f"{path.name}: 54 of its lines end with CRLF"):
        index.make(**official(layout))
    path.write_text(whole.replace(" 0\n", " x\n"))
    with pytest.raises(ValueError, match=f"{path.name}: line 1 is "):
        index.make(**official(layout))
    swapped = whole.replace(" 3\n", " z\n").replace(" 4\n", " 3\n").replace(" z\n", " 4\n")
    path.write_text(swapped)
    with pytest.raises(ValueError, match=r"another file: git's hash is .* labels swapped"):
        index.make(**official(layout))
    with pytest.raises(ValueError, match=r"labels are swapped|label"):  # without the release's hashes, too
        index.make(**settings(layout))
    path.write_text(whole + whole.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="is there 2 times"):
        index.make(**settings(layout))


def test_a_list_under_another_name_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = large_trees.imagenet(here)
    released(monkeypatch, "imagenet_lt", rows, here)
    folder = here / "imagenet"
    (folder / "ImageNet_LT_train.txt").write_bytes((folder / "ImageNet_LT_val.txt").read_bytes())
    with pytest.raises(
        ValueError, match=r"this is ImageNet_LT_val\.txt of ImageNet-LT, under the name ImageNet_LT_train"
    ):
        index.make(**official("imagenet_lt"))
    with pytest.raises(ValueError, match="is in train and in held_out: a list stands in another's place"):
        index.make(**settings("imagenet_lt"))


def test_another_year_is_named_by_its_classes(here: Path) -> None:
    large_trees.write_list(
        here / "inaturalist2018/iNaturalist18_train.txt",
        [(f"train_val2018/Aves/{c}/{c:032x}.jpg", c) for c in range(1010)],
    )
    with pytest.raises(ValueError, match="1,010 classes, as iNaturalist 2019 has them; iNaturalist 2018 has 8,142"):
        index.make(**official("inaturalist_2018"))


def test_labels_of_the_official_places_are_not_those_of_places_lt() -> None:
    known = facts.LAYOUTS["places_lt"]
    names = [f"class{c:03}" for c in range(365)]
    for name, label in known.fixed.items():
        names[label] = name
    rows = [(f"train/{name}/1.jpg", label) for label, name in enumerate(names)]
    part = lists.Rows([path for path, _ in rows], [label for _, label in rows], "")
    assert index.check_labels({"train": part}, known, "official") == names
    names[116], names[117], names[118] = "desert-sand", "desert-vegetation", "desert_road"
    part = part._replace(paths=[f"train/{name}/1.jpg" for name in names])
    with pytest.raises(ValueError, match=r"116 is desert-sand, where Places-LT has desert_road.*another numbering"):
        index.check_labels({"train": part}, known, "official")


@pytest.mark.parametrize(
    ("layout", "other", "said"),
    [
        ("imagenet_lt", "ILSVRC2010_images_train.tar", "looks like ILSVRC2010; ImageNet-LT is made of another release"),
        ("places_lt", "data_challenge/x", "looks like Places365-Challenge"),
        ("inaturalist_2018", "train_val2019/x", "looks like iNaturalist 2019"),
    ],
)
def test_missing_images_are_counted_and_the_edition_is_named(here: Path, layout: str, other: str, said: str) -> None:
    large_trees.MAKERS[layout](here)
    folder = here / facts.LAYOUTS[layout].folder
    tree = next(tree for tree in facts.LAYOUTS[layout].parts[0].trees if (folder / tree).is_dir())
    for file in sorted((folder / tree).rglob("*.*"))[:5]:
        file.unlink()
    with pytest.raises(ValueError, match=r"5 of .* listed images .* are not there: .*, \.\.\."):
        index.make(**settings(layout))
    large_trees.put(folder / other, b"")
    with pytest.raises(ValueError, match=said):
        index.make(**settings(layout))


def test_what_to_put_where(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"large/imagenet/ImageNet_LT_train\.txt: no such list\. Put .*115,846 lines"
    ):
        index.make(**official("imagenet_lt"))
    rows = large_trees.imagenet(here)
    released(monkeypatch, "imagenet_lt", rows, here)
    large_trees.pack(here / "imagenet", "ILSVRC2012_img_val.tar", "val")
    with pytest.raises(ValueError, match=r"ILSVRC2012_img_val\.tar: MD5 .*, published is 29b22e29.*another edition"):
        index.make(**official("imagenet_lt"))
    (here / "imagenet/ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"Put ILSVRC2012_img_val\.tar \(6\.3 GB, MD5 29b22e29.*\) there"):
        index.make(**official("imagenet_lt"))


def test_an_archive_whose_md5_is_right_is_read_once_for_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "imagenet").mkdir(parents=True)
    (here / "imagenet/a.tar").write_bytes(b"content")
    archive = facts.Archive("a.tar", hashlib.md5(b"content").hexdigest(), "7 bytes")
    store = Store("imagenet")
    places.verify(store, archive)
    with monkeypatch.context() as patched:
        patched.setattr(store.files, "open", lambda *_: pytest.fail("read again"))
        places.verify(store, archive)
    (here / "imagenet/a.tar").write_bytes(b"contents")
    with pytest.raises(ValueError, match=r"a\.tar: MD5"):
        places.verify(store, archive)


def test_a_tar_gz_has_to_be_unpacked(here: Path) -> None:
    large_trees.inaturalist(here)
    folder = here / "inaturalist2018"
    (folder / "train_val2018").rename(folder / ".hidden")
    (folder / "train_val2018.tar.gz").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"unpack it: `tar -xzf train_val2018\.tar\.gz`.*makes train_val2018"):
        index.make(**settings("inaturalist_2018"))


def test_an_archive_beside_its_tree_is_not_read(here: Path) -> None:
    large_trees.imagenet(here)
    (here / "imagenet/ILSVRC2012_img_train.tar").write_bytes(b"half of a download")
    (here / "imagenet/ILSVRC2012_img_val.tar").write_bytes(b"half of a download")
    assert len(index.make(**settings("imagenet_lt"))["train_labels"])


def test_a_cut_off_tar_is_named(here: Path) -> None:
    large_trees.imagenet(here)
    large_trees.pack(here / "imagenet", "ILSVRC2012_img_val.tar", "val")
    path = here / "imagenet/ILSVRC2012_img_val.tar"
    path.write_bytes(b"no tar at all")
    with pytest.raises(ValueError, match=r"ILSVRC2012_img_val\.tar: not a readable tar"):
        index.make(**settings("imagenet_lt"))


def test_images_that_changed_since_are_noticed(here: Path) -> None:
    large_trees.inaturalist(here)
    arrays = index.make(**settings("inaturalist_2018"))
    store, pieces = index.locate(arrays, "inaturalist_2018")
    file = here / "inaturalist2018" / pieces["train"][0].file
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"no longer the .* bytes that the index was made of"):
        store.piece(pieces["train"][0])
    with pytest.raises(ValueError, match="1 images have another size than when the index was made"):
        index.locate(arrays, "inaturalist_2018")


# ------------------------------------------------------------------------------------------------ decoding


def reference(data: bytes, side: int, share: float) -> np.ndarray:
    """Resize the shorter side, cut the middle: as torchvision does on Pillow images."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    size = round(side / share)
    resized = v2.Resize(size, v2.InterpolationMode.BICUBIC)(picture)
    return np.asarray(v2.CenterCrop(side)(resized)).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (1000, 800)])
@pytest.mark.parametrize("draft", [False, True])
def test_pixels_are_those_of_resize_and_centre_crop(size: tuple[int, int], draft: bool) -> None:
    y, x = np.mgrid[: size[1], : size[0]]
    values = np.stack([127 + 100 * np.sin(x / 60), 127 + 100 * np.cos(y / 45), 127 + 90 * np.sin((x + y) / 80)], 2)
    out = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(out, "JPEG", quality=95)
    found, kind = square(out.getvalue(), Square(224, 0.875, False, draft))
    difference = np.abs(found.numpy().astype(int) - reference(out.getvalue(), 224, 0.875))
    assert kind == "JPEG RGB" and found.shape == (3, 224, 224)
    assert difference.mean() < 1 and difference.max() <= 8  # half a pixel of another place, and rounding


@pytest.mark.parametrize("kind", large_trees.KINDS)
def test_every_kind_is_decoded_to_its_colour(kind: str) -> None:
    data = large_trees.image(2, kind)
    found, said = square(data, Square(16, 0.875, False, False))
    assert found.shape == (3, 16, 16) and found.dtype == torch.uint8
    picture = Image.open(io.BytesIO(data))
    assert said == f"{picture.format} {picture.mode}" + (" turned" if kind == "turned" else "")
    wanted = (
        [100, 180, 175] if kind not in ("grey", "sixteen_bit") else {"grey": [155] * 3, "sixteen_bit": [100] * 3}[kind]
    )
    assert np.abs(found.float().mean((1, 2)).numpy() - wanted).max() < (60 if kind in ("dot", "cmyk") else 12)


def test_exif_is_followed_where_it_is_asked_for() -> None:
    values = np.zeros((40, 60, 3), np.uint8)
    values[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: what is above comes to the right
    for kind in ("JPEG", "PNG"):
        out = io.BytesIO()
        Image.fromarray(values).save(out, kind, exif=exif)
        as_it_is, _ = square(out.getvalue(), Square(16, 1.0, False, False))
        turned, _ = square(out.getvalue(), Square(16, 1.0, True, False))
        assert as_it_is[0, 2].min() > 200 and as_it_is[0, -2].max() < 60
        assert turned[0, :, -2].min() > 200 and turned[0, :, 2].max() < 60


def header_of(width: int, height: int) -> bytes:
    """A PNG whose header says that it is so large."""
    import struct
    import zlib

    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + b"\0\0\0\0IDAT"
        + b"\0" * 40
    )


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (large_trees.image(1)[:-300], "truncated"),
        (large_trees.image(1, "png")[:-200], "truncated|broken"),
        (b"no image", "no image, by its content"),
        (b"", "no image, by its content"),
        (header_of(30_000, 30_000), "decompression bomb"),
        (header_of(12_000, 9_000), "decompression bomb"),
    ],
)
def test_what_cannot_be_used_says_why(data: bytes, why: str) -> None:
    for draft in (False, True):
        with pytest.raises(BrokenError, match=why):
            square(data, Square(8, 0.875, False, draft))


def test_a_side_of_30000_pixels_is_no_bomb() -> None:
    out = io.BytesIO()
    Image.new("RGB", (30_000, 40), (10, 200, 30)).save(out, "JPEG")
    found, _ = square(out.getvalue(), Square(16, 0.875, False, True))
    assert np.abs(found.float().mean((1, 2)).numpy() - [10, 200, 30]).max() < 6


def test_workers_give_what_one_process_gives_in_order(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large_trees.inaturalist(here)
    arrays = index.make(**settings("inaturalist_2018"))
    store, pieces = index.locate(arrays, "inaturalist_2018")
    how = Square(16, 0.875, False, False)
    parts = [feed.Wanted(pieces["train"][first : first + 5], how) for first in range(0, 54, 5)]

    def read() -> list[feed.Chunk]:
        with feed.Reader(store, 1 << 10) as reader:
            return [*reader.read(parts)]

    alone = read()
    monkeypatch.setenv("LONGTAIL_WORKERS", "2")
    together = read()
    assert [chunk.kinds for chunk in alone] == [chunk.kinds for chunk in together]
    assert all(torch.equal(a.values, b.values) for a, b in zip(alone, together, strict=True))
    monkeypatch.setenv("LONGTAIL_WORKERS", "1")
    with feed.Reader(store, 1 << 10) as reader:
        early = reader.read(parts)
        next(early)
        early.close()
        assert len([*reader.read(parts[:2])]) == 2  # a new reading
    monkeypatch.setenv("LONGTAIL_WORKERS", "many")
    with pytest.raises(ValueError, match="LONGTAIL_WORKERS=many"):
        feed.Reader(store, 1)


# ------------------------------------------------------------------------------------------------ features


def extract(out: Path, arrays: dict[str, np.ndarray], layout: str, **changes: object) -> dict[str, np.ndarray]:
    files.save_arrays("index.npz", **arrays)
    chosen = {**HOW, **changes}
    indexed.extract("index.npz", str(out), layout=layout, backbone=BACKBONE, made_by="test", **chosen)
    return files.load_arrays(out)


def test_features_are_those_of_each_image_by_itself(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large_trees.imagenet(here)
    monkeypatch.setattr(indexed, "SHARD", 16)
    monkeypatch.setattr(indexed, "CHUNK", 5)
    arrays = index.make(**settings("imagenet_lt"))
    found = extract(here / "out.npz", arrays, "imagenet_lt")
    store, pieces = index.locate(arrays, "imagenet_lt")
    made = indexed.backbones.load(**BACKBONE)
    for split in index.SPLITS:
        pixels = [square(store.piece(piece), Square(32, 0.875, False, False))[0] for piece in pieces[split]]
        with torch.inference_mode():
            wanted = torch.cat([made.features(one[None]) for one in pixels]).numpy()
        np.testing.assert_allclose(found[f"{split}_images"][:, 0, 0], wanted, rtol=1e-4, atol=1e-5)
        assert np.array_equal(found[f"{split}_labels"], arrays[f"{split}_labels"])
    assert found["train_images"].dtype == np.float32
    kinds = json.loads(str(found["report"]))["kinds"]
    assert kinds["JPEG CMYK"] and kinds["PNG P"] and kinds["JPEG RGB turned"] and kinds["JPEG L"] and kinds["PNG I;16"]


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large_trees.inaturalist(here)
    monkeypatch.setattr(indexed, "SHARD", 16)
    monkeypatch.setattr(indexed, "CHUNK", 5)
    arrays = index.make(**settings("inaturalist_2018"))
    extract(here / "whole.npz", arrays, "inaturalist_2018")
    computed: list[int] = []

    def dies(path: Path, count: int, *rest: object) -> None:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(count)
        original(path, count, *rest)

    original = indexed._shard
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(indexed, "_shard", dies)
        extract(here / "again.npz", arrays, "inaturalist_2018")
    shards = sorted(Path("runs/.features").rglob("*.npz"))
    assert len(shards) == 2 and not (here / "again.npz").exists()
    shards[1].unlink()  # as if the second had not been written to its end, after the first
    extract(here / "again.npz", arrays, "inaturalist_2018")
    assert (here / "again.npz").read_bytes() == (here / "whole.npz").read_bytes()
    assert not list(Path("runs/.features").rglob("*.npz"))


def test_a_shard_that_another_process_writes_meanwhile_moves_no_row(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded images are of what was missing at the beginning; a lock keeps two from it in the first place."""
    large_trees.inaturalist(here)
    monkeypatch.setattr(indexed, "SHARD", 16)
    monkeypatch.setattr(indexed, "CHUNK", 5)
    arrays = index.make(**settings("inaturalist_2018"))
    kept: dict[str, bytes] = {}

    def keep(path: Path, *rest: object) -> None:
        original(path, *rest)
        kept[path.name] = path.read_bytes()

    def beside(path: Path, *rest: object) -> None:
        original(path, *rest)
        path.with_name("train-000000016.npz").write_bytes(kept["train-000000016.npz"])
        with pytest.raises(ValueError, match=r"process \d+ is computing these features"):
            extract(here / "other.npz", arrays, "inaturalist_2018")

    original = indexed._shard
    for out, patch in (("whole.npz", keep), ("again.npz", beside)):
        with monkeypatch.context() as patched:
            patched.setattr(indexed, "_shard", patch)
            extract(here / out, arrays, "inaturalist_2018")
    assert (here / "again.npz").read_bytes() == (here / "whole.npz").read_bytes()


def test_a_file_that_was_mended_is_read_again(here: Path) -> None:
    """Damaged to zeros and put back: it has the size that it had, by which the index knows it."""
    large_trees.inaturalist(here)
    path = sorted((here / "inaturalist2018/train_val2018").rglob("*.jpg"))[10]
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    arrays = index.make(**settings("inaturalist_2018"))
    with pytest.raises(ValueError, match="1 files are no usable images"):
        extract(here / "out.npz", arrays, "inaturalist_2018")
    path.write_bytes(whole)
    assert len(extract(here / "out.npz", arrays, "inaturalist_2018")["train_labels"]) == len(arrays["train_labels"])


def test_broken_files_are_all_named_and_leaving_them_out_computes_others_not_again(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    large_trees.inaturalist(here)
    monkeypatch.setattr(indexed, "SHARD", 16)
    broken = sorted((here / "inaturalist2018/train_val2018").rglob("*.jpg"))[10:12]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-100])
    arrays = index.make(**settings("inaturalist_2018"))
    with pytest.raises(ValueError, match=r"2 files are no usable images: .*leave them out") as error:
        extract(here / "out.npz", arrays, "inaturalist_2018")
    assert all(path.name in str(error.value) for path in broken)
    computed: list[Path] = []
    original = indexed._shard
    with monkeypatch.context() as patched:
        patched.setattr(indexed, "_shard", lambda path, *rest: (computed.append(path), original(path, *rest)))
        found = extract(here / "out.npz", arrays, "inaturalist_2018", broken="leave_out")
    assert 1 <= len(computed) <= len(broken)
    assert "left out, no usable images: 2: " in capsys.readouterr().out
    before = len(arrays["train_labels"]) + len(arrays["test_labels"])
    assert len(found["train_labels"]) + len(found["test_labels"]) == before - 2
    for split in ("train", "test"):
        assert len(found[f"{split}_images"]) == len(found[f"{split}_labels"])
        assert np.array_equal(arrays[f"{split}_labels"][found[f"{split}_rows"]], found[f"{split}_labels"])


def test_a_class_of_which_nothing_is_left_is_named(here: Path) -> None:
    large_trees.inaturalist(here)
    for path in (here / "inaturalist2018/train_val2018" / large_trees.SUPER[1] / "4").iterdir():
        path.write_bytes(b"")
    arrays = index.make(**settings("inaturalist_2018"))
    with pytest.raises(ValueError, match="train: of class 4 no image is left"):
        extract(here / "out.npz", arrays, "inaturalist_2018", broken="leave_out")


def test_after_that_a_mended_file_is_read_again(here: Path) -> None:
    large_trees.inaturalist(here)
    paths = [*(here / "inaturalist2018/train_val2018" / large_trees.SUPER[1] / "4").iterdir()]
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(bytes(path.stat().st_size))
    arrays = index.make(**settings("inaturalist_2018"))
    with pytest.raises(ValueError, match="train: of class 4 no image is left"):
        extract(here / "out.npz", arrays, "inaturalist_2018", broken="leave_out")
    for path, content in zip(paths, whole, strict=True):
        path.write_bytes(content)
    found = extract(here / "out.npz", arrays, "inaturalist_2018", broken="leave_out")
    assert len(found["train_labels"]) == len(arrays["train_labels"])


def test_a_piece_of_an_archive_is_read_to_its_length(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.tar").write_bytes(b"0123456789")
    store = Store("x", str(tmp_path))
    assert store.piece(Piece("a.tar", 2, 3)) == b"234"
    with pytest.raises(ValueError, match=r"a\.tar: no longer"):
        store.piece(Piece("a.tar", 8, 3))
