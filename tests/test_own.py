"""One's own images and features: decoded as they are, split by the rule, nothing dropped or mended without a word."""

import csv
import io
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from longtail.data import decode, listing, long_tail, own, sources, split
from longtail.data.sources import embeddings, images

PLAIN = {"size": 8, "channels": 3, "fit": "crop", "exif_orientation": False}
RULE = {"test_per_class": 2, "test_share": 0.5, "min_per_class": 2, "duplicates": "refuse", "seed": 0}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (8, 8), seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    depth = {"L": (), "RGB": (3,), "CMYK": (4,), "RGBA": (4,)}[mode]
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], *depth), np.uint8), mode if mode == "CMYK" else None)


# ------------------------------------------------------------------------------------------------ decoding


def test_pixels_of_the_right_size_come_out_as_they_are() -> None:
    image = noise()
    pixels, facts = decode.decode(encoded(image), **PLAIN)
    np.testing.assert_array_equal(pixels, np.asarray(image))
    assert facts == decode.Facts("PNG", "RGB", 8, 8, False)


KINDS = {
    "grey": (encoded(noise("L")), np.repeat(np.asarray(noise("L"))[:, :, None], 3, 2)),
    "palette": (encoded(noise().quantize(16)), np.asarray(noise().quantize(16).convert("RGB"))),
    "transparent": (encoded(noise("RGBA")), np.asarray(noise("RGBA"))[:, :, :3]),
    "cmyk": (encoded(noise("CMYK"), "TIFF"), np.asarray(noise("CMYK").convert("RGB"))),
    "one pixel": (encoded(Image.new("RGB", (1, 1), (9, 8, 7))), np.full((8, 8, 3), (9, 8, 7))),
    "long": (encoded(Image.new("L", (30_000, 1), 5)), np.full((8, 8, 3), 5)),
    "16 bit": (
        encoded(Image.fromarray(np.repeat(np.arange(8, dtype=np.uint16)[:, None] * 9362, 8, 1))),
        np.repeat(np.array([round(v * 9362 / 257) for v in range(8)])[:, None, None], 8, 1).repeat(3, 2),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_becomes_eight_bit_colour(name: str) -> None:
    data, expected = KINDS[name]
    pixels, _ = decode.decode(data, **PLAIN)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)


def test_a_cmyk_jpeg_keeps_its_colour() -> None:
    data = encoded(Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK"), "JPEG", quality=95)
    pixels, facts = decode.decode(data, **PLAIN)
    assert (facts.kind, facts.mode) == ("JPEG", "CMYK")
    assert np.abs(pixels.astype(int) - (200, 30, 60)).max() < 8


def test_whole_numbers_of_32_bits_have_no_known_range() -> None:
    values = np.arange(256, dtype=np.int32).reshape(16, 16)
    for scale in (1, 257):
        with pytest.raises(decode.BrokenError, match="32 bits, or signed ones, whose range is not known"):
            decode.decode(encoded(Image.fromarray(values * scale), "TIFF"), **PLAIN)


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_a_dark_image_of_16_bits_has_the_scale_of_a_bright_one(kind: str) -> None:
    dark = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for values in (dark, dark * 257):
        data = encoded(Image.fromarray(values), "PNG")
        if kind == "PPM":
            data = b"P5 16 16 65535\n" + values.astype(">u2").tobytes()
        found, facts = decode.decode(data, **PLAIN | {"size": 16, "channels": 1})
        assert facts.kind == kind
        np.testing.assert_array_equal(found[..., 0], (values.astype(int) + 128) // 257)


def test_exif_orientation_is_a_setting() -> None:
    image = noise()
    exif = Image.Exif()
    exif[decode.ORIENTATION] = 6  # to be turned by 90 degrees
    data = encoded(image, "PNG", exif=exif)
    left, facts = decode.decode(data, **PLAIN)
    turned, _ = decode.decode(data, **PLAIN | {"exif_orientation": True})
    assert facts.turned
    np.testing.assert_array_equal(left, np.asarray(image))
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image), -1))


def test_fits() -> None:
    """Of an image that is twice as wide as high: black, white, white, black squares of half its height."""
    wide = Image.fromarray(np.repeat(np.repeat(np.array([[0, 255, 255, 0]], np.uint8), 8, 0), 4, 1))  # 16 x 8
    crop, pad, squash = (
        decode.decode(encoded(wide), **PLAIN | {"channels": 1, "fit": fit})[0][:, :, 0]
        for fit in ("crop", "pad", "squash")
    )
    assert (crop == 255).all()
    assert (pad[:2] == 0).all() and (pad[6:] == 0).all() and (pad[2:6, 3:5] == 255).all()
    assert (squash[:, 3:5] == 255).all() and (squash[:, 0] < 30).all()


def test_a_pad_of_an_extreme_shape_has_a_pixel() -> None:
    pixels, _ = decode.decode(encoded(Image.new("L", (1000, 1), 77)), **PLAIN | {"fit": "pad"})
    assert (pixels == 77).all(2).sum() == 8


def test_broken_files_say_why() -> None:
    whole = encoded(noise(size=(64, 64)), "JPEG")
    large, huge = (encoded(Image.new("1", (width, 10_000))) for width in (10_000, 20_000))
    floats = encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    for data, why in (
        (b"", "no image"),
        (b"not an image", "no image"),
        (whole[: len(whole) // 2], "truncated"),
        (encoded(noise(size=(64, 64)))[:2000], "truncated"),
        (large, "10000 x 10000 pixels, more than 89,478,485: a decompression bomb"),
        (huge, "more than 178,956,970 pixels: a decompression bomb"),
        (floats, "floating-point"),
        (encoded(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF"), "32 bits, or signed ones"),
    ):
        with pytest.raises(decode.BrokenError, match=why):
            decode.decode(data, **PLAIN)


def test_a_damaged_byte_never_gives_another_error() -> None:
    data, rng = bytearray(encoded(noise(size=(32, 32)))), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            decode.decode(bytes(damaged), **PLAIN)
        except decode.BrokenError as error:
            assert str(error)


# ------------------------------------------------------------------------------------------------- listing


def make(folder: Path, sizes: dict[str, int]) -> Path:
    for number, (name, size) in enumerate(sizes.items()):
        for image in range(size):
            file = folder / name / f"{image:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(noise(seed=1000 * number + image)))
    return folder


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    make(tmp_path, {"cat": 2, "dog/poodle": 1, ".cache": 1})
    (tmp_path / "cat" / ".DS_Store").write_text("x")
    root, rows = listing.read(tmp_path)
    assert root == tmp_path
    assert [(row.place, row.label, row.split) for row in rows] == [
        ("cat/000.png", "cat", None), ("cat/001.png", "cat", None), ("dog/poodle/000.png", "dog", None),
    ]  # fmt: skip


def test_links_are_followed_and_those_to_nothing_are_named(tmp_path: Path) -> None:
    make(tmp_path / "data", {"cat": 2, "dog": 1})
    make(tmp_path / "elsewhere", {"owl": 2})
    (tmp_path / "data/owl").symlink_to(tmp_path / "elsewhere/owl")
    (tmp_path / "data/dog/1.png").symlink_to(tmp_path / "data/cat/000.png")
    _, rows = listing.read(tmp_path / "data")
    assert [row.label for row in rows] == ["cat", "cat", "dog", "dog", "owl", "owl"]
    (tmp_path / "data/cat/9.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match=r"cat/9.png: a link to nothing \(nowhere.png\); fetch it"):
        listing.read(tmp_path / "data")
    (tmp_path / "data/cat/9.png").unlink()
    (tmp_path / "data/cat/up").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match="a link to a folder that it lies in"):
        listing.read(tmp_path / "data")
    (tmp_path / "data/cat/up").unlink()
    (tmp_path / "data/cat/loop").symlink_to("loop")
    with pytest.raises(ValueError, match="cat/loop: a link that leads nowhere"):
        listing.read(tmp_path / "data")


def test_a_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    make(tmp_path, {"cat": 1})
    os.makedirs(os.fsencode(str(tmp_path)) + b"/caf\xe9")
    with pytest.raises(ValueError, match=r"the name 'caf\\udce9' is not UTF-8; rename it"):
        listing.read(tmp_path)


def test_an_image_outside_of_the_class_folders_is_named(tmp_path: Path) -> None:
    make(tmp_path, {"train/cat": 2, "test/cat": 1})
    (tmp_path / "train/x.png").write_bytes(encoded(noise(seed=1)))
    with pytest.raises(ValueError, match=r"train/x\.png is in no class folder; expected train/<class>/x\.png"):
        listing.read(tmp_path)
    make(tmp_path / "plain", {"cat": 2, "dog": 1})
    (tmp_path / "plain/x.PNG").write_bytes(encoded(noise(seed=1)))
    with pytest.raises(ValueError, match=r"plain: x\.PNG is in no class folder; expected <class>/x\.PNG"):
        listing.read(tmp_path / "plain")


@pytest.mark.parametrize("inside", ["", "train/"])
def test_what_is_no_image_beside_the_class_folders_is_left_out(tmp_path: Path, inside: str) -> None:
    make(tmp_path, {"train/cat": 2, "test/cat": 1} if inside else {"cat": 2, "dog": 1})
    for name in ("metadata.csv", "README", "Thumbs.db"):
        (tmp_path / inside / name).write_text("x")
    assert len(listing.read(tmp_path)[1]) == 3
    (tmp_path / inside / "loose").write_bytes(encoded(noise(seed=1)))  # whatever it is called
    with pytest.raises(ValueError, match="loose is in no class folder"):
        listing.read(tmp_path)


def test_train_and_test_folders_are_splits(tmp_path: Path) -> None:
    make(tmp_path / "train", {"a": 1})
    make(tmp_path / "test", {"a": 1})
    assert [(row.label, row.split) for row in listing.read(tmp_path)[1]] == [("a", "test"), ("a", "train")]
    make(tmp_path / "val", {"a": 1})
    with pytest.raises(ValueError, match="folders test, train, val; allowed are train and test, or a folder a class"):
        listing.read(tmp_path)


def test_tables_say_the_same_as_csv_and_parquet(tmp_path: Path) -> None:
    columns = {"path": ["b.png", "a.png"], "label": [1, 0], "group": ["x", None], "split": ["test", "train"]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, ["b.png", 1, "x", "test"], ["a.png", 0, "", "train"]])
    root, rows = listing.read(tmp_path / "t.parquet")
    assert root == tmp_path
    assert rows == [listing.Row("a.png", "0", None, "train"), listing.Row("b.png", "1", "x", "test")]
    assert listing.read(tmp_path / "t.csv")[1] == rows


def test_names_that_look_like_numbers_are_names(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label,group\n0001,01,1\n0002,1,01\n0003,1e3,\n")
    assert listing.read(tmp_path / "t.csv")[1] == [
        listing.Row("0001", "01", "1", None), listing.Row("0002", "1", "01", None),
        listing.Row("0003", "1e3", None, None),
    ]  # fmt: skip


def test_no_group_is_written_in_many_ways(tmp_path: Path) -> None:
    lines = [f"{n},a,{group}" for n, group in enumerate(["", "NA", "null", "NaN", "7"])]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,group", *lines]))
    assert [row.group for row in listing.read(tmp_path / "t.csv")[1]] == [None] * 4 + ["7"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"label": ["a"]}, "no column path; it has label"),
        ({"path": ["a"]}, "no column label; it has path"),
        ({"path": ["a", "a"], "label": ["x", "y"]}, "a is there twice"),
        ({"path": ["a", "b"], "label": ["x", None]}, "row 2 has no label"),
        ({"path": ["a"], "label": ["x"], "split": ["val"]}, "row 1 has the split 'val'; allowed are train, test"),
        ({"path": ["a"], "label": ["x"], "split": [None]}, "row 1 has the split None"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, columns: dict, said: str) -> None:
    pq.write_table(
        pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}), tmp_path / "t.parquet"
    )
    with pytest.raises(ValueError, match=said):
        listing.read(tmp_path / "t.parquet")


def test_no_folder_and_no_table(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder or table"):
        listing.read(tmp_path / "nowhere")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match=r"allowed are a folder of class folders, and tables: \.csv, \.parquet"):
        listing.read(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="no files in class folders"):
        listing.read(tmp_path)


# --------------------------------------------------------------------------------------------------- split


def test_the_rule() -> None:
    quota = split.quota(np.array([1, 2, 3, 7, 10, 100]), test_per_class=5, test_share=0.5)
    assert quota.tolist() == [0, 1, 1, 3, 5, 5]


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(2, 12), min_size=2, max_size=5), wanted=st.integers(1, 6), seed=st.integers(0, 9))
def test_without_groups_the_quota_is_met_exactly(sizes: list[int], wanted: int, seed: int) -> None:
    labels = [f"c{c}" for c, size in enumerate(sizes) for _ in range(size)]
    test = split.draw(labels, range(len(labels)), test_per_class=wanted, test_share=0.5, seed=seed)
    found = Counter(np.array(labels)[test])
    assert {name: found[name] for name in set(labels)} == {
        f"c{c}": min(wanted, max(size // 2, 1)) for c, size in enumerate(sizes)
    }


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 15)), min_size=6, max_size=60),
    seed=st.integers(0, 9),
)
def test_groups_are_never_torn_apart(rows: list[tuple[str, int]], seed: int) -> None:
    labels, groups = [label for label, _ in rows], [group for _, group in rows]
    sizes = Counter(labels)
    try:
        test = split.draw(labels, groups, test_per_class=4, test_share=0.5, seed=seed)
    except ValueError as error:
        assert "tearing a group" in str(error)
        return
    of_group: dict[int, set[bool]] = {}
    for group, of_test in zip(groups, test, strict=True):
        of_group.setdefault(group, set()).add(bool(of_test))
    assert all(len(sides) == 1 for sides in of_group.values())
    for name, size in sizes.items():
        assert 1 <= sum(test[n] for n in range(len(rows)) if labels[n] == name) <= min(4, max(size // 2, 1))


def test_another_class_changes_no_draw() -> None:
    one = split.draw(["a"] * 20 + ["b"] * 20, range(40), test_per_class=5, test_share=0.5, seed=3)
    two = split.draw(["a"] * 20 + ["c"] * 9, range(29), test_per_class=5, test_share=0.5, seed=3)
    assert one[:20].tolist() == two[:20].tolist()
    assert one[:20].tolist() != split.draw(["a"] * 20, range(20), test_per_class=5, test_share=0.5, seed=4).tolist()


def test_rows_before_a_class_change_no_draw_in_it() -> None:
    """Groups are row numbers; as text, 10 came before 8."""
    tests = []
    for before in (5, 6, 8, 10):
        labels = ["a"] * before + ["m"] * 12
        found = split.draw(labels, range(len(labels)), test_per_class=3, test_share=0.5, seed=0)
        tests.append(np.flatnonzero(found[before:]).tolist())
    assert tests.count(tests[0]) == 4


def test_joined_finds_what_hangs_together() -> None:
    found = split.joined(["p", None, "q", "p", None], [b"1", b"2", b"3", b"3", b"4"])
    assert found[0] == found[3] == found[2]  # p with p, and the content 3 with 3
    assert len(set(found)) == 3


# ------------------------------------------------------------------------------------------------- readers


def rows(labels: str, **more: list) -> list[listing.Row]:
    return [
        listing.Row(f"{n:02}.png", label, **{key: values[n] for key, values in more.items()})
        for n, label in enumerate(labels)
    ]


def values(contents: list[int]) -> np.ndarray:
    return np.array(contents, np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2)


def test_classes_come_by_size_and_rows_by_place() -> None:
    found, report = own.arrays(rows("bbbaaaaaac"), values([*range(10)]), **RULE)
    assert found["class_names"].tolist() == ["a", "b"]
    assert report["classes_left_out"] == {"c": 1}
    assert found["train_labels"].tolist() == [0, 0, 0, 0, 1, 1]
    assert found["test_labels"].tolist() == [0, 0, 1]
    for part in ("train", "test"):
        of_part = found[f"{part}_images"][:, 0, 0, 0].tolist()
        assert of_part == sorted(of_part, key=lambda value: (value < 3, value))
    long_tail.check_source(found, balanced=False)


def test_copies_of_one_label_stay_together() -> None:
    for seed in range(20):
        found, report = own.arrays(rows("aaaaaabbbb"), values([0, 0, 1, 2, 3, 4, 5, 6, 7, 8]), **RULE | {"seed": seed})
        sides = [part for part in ("train", "test") if (found[f"{part}_images"][:, 0, 0, 0] == 0).any()]
        assert len(sides) == 1
        assert report["copies_kept_together"] == 1


def test_groups_and_copies_stay_together_in_what_is_held_out() -> None:
    """Twenty groups of three in each class, and a copy: a cut that holds a fifth out tears none of them."""
    groups = [n // 3 for n in range(120)]
    contents = [*range(119), 0]  # the last one is a copy of the first, in another group
    many = [listing.Row(f"{n:03}.png", "ab"[n % 60 // 30], str(groups[n])) for n in range(120)]
    many[119] = listing.Row("119.png", "a", "39")
    found, _ = own.arrays(many, values(contents), **RULE | {"test_per_class": 12})
    cut = long_tail.cut(found, profile="as_is", seed=0, held_out=0.2)
    of = {content: group for content, group in zip(contents[:119], groups[:119], strict=True)} | {0: groups[0]}
    sides = [{of[int(image[0, 0, 0])] for image in cut[f"{part}_images"]} for part in ("train", "held_out")]
    assert len(sides[1]) > 3 and not sides[0] & sides[1]
    plain, _ = own.arrays(rows("aaabbb"), values([*range(6)]), **RULE)
    assert long_tail.GROUPS not in plain  # nothing belongs together


def test_a_copy_with_another_label_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 copies have another label: 01.png and 02.png; remove or correct"):
        own.arrays(rows("aabb"), values([0, 1, 1, 2]), **RULE)


def test_copies_between_given_splits() -> None:
    given_rows = rows("aaaabbb", split=["train", "train", "train", "test", "train", "train", "test"])
    contents = values([0, 1, 2, 0, 4, 5, 6])
    with pytest.raises(ValueError, match=r"1 training images are in test, too: 00.png and 03.png"):
        own.arrays(given_rows, contents, **RULE)
    kept, report = own.arrays(given_rows, contents, **RULE | {"duplicates": "report"})
    assert len(kept["train_labels"]) == 5 and report["copies_between_splits"] == [("00.png", "03.png")]
    less, _ = own.arrays(given_rows, contents, **RULE | {"duplicates": "leave_out"})
    assert less["train_images"][:, 0, 0, 0].tolist() == [1, 2, 4, 5]
    assert less["test_images"][:, 0, 0, 0].tolist() == [0, 6]


@pytest.mark.parametrize(
    ("given_rows", "said"),
    [
        (rows("aabb", split=["train", None, "train", "test"]), "a split is given for some rows, and for others not"),
        (rows("aabb", split=["train", "train", "train", "test"]), "class 'a' has no row in test"),
        (rows("aabb", split=["train", "test", "test", "test"]), "class 'b' has no row in train"),
        (rows("aabb", split=["train", "test"] * 2, group=["p", "p", "q", "r"]), "group 'p' is in train and in test"),
        (rows("aaaa"), "classes: a; two are needed"),
        (rows("aabb", group=["p", "p", "q", "r"]), "class 'a': of its 2 rows none can go to test without tearing"),
    ],
)
def test_what_cannot_be_split_is_named(given_rows: list[listing.Row], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        own.arrays(given_rows, values([*range(4)]), **RULE)


def image_settings(folder: Path, **other: object) -> dict:
    reader = sources.load("images")
    plain = PLAIN | RULE | {"path": str(folder), "broken": "refuse"} | other
    from longtail.data.sources import images

    looked = images.look(folder, **{key: plain[key] for key in PLAIN})
    return {"read": reader, "settings": plain | {"sha256": looked.sha256}, "looked": looked}


def test_a_folder_to_arrays(tmp_path: Path) -> None:
    make(tmp_path, {"few": 2, "many": 9})
    given_ = image_settings(tmp_path)
    found = given_["read"]("unused", **given_["settings"])
    assert found["class_names"].tolist() == ["many", "few"]
    assert np.bincount(found["train_labels"]).tolist() == [7, 1]
    assert np.bincount(found["test_labels"]).tolist() == [2, 1]
    pixels = {
        noise(seed=seed).tobytes() for seed in [*range(2), *range(1000, 1009)]
    }  # each image is there once, as it is
    assert {image.tobytes() for image in [*found["train_images"], *found["test_images"]]} == pixels


def test_broken_files_are_refused_or_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "a" / "empty.jpg").write_bytes(b"")
    (tmp_path / "b" / "notes.txt").write_text("x")
    shutil.copy(tmp_path / "b" / "000.png", tmp_path / "b" / "000.png.part")
    (tmp_path / "b" / "000.png.part").write_bytes((tmp_path / "b" / "000.png").read_bytes()[:60])
    given_ = image_settings(tmp_path)
    with pytest.raises(
        ValueError, match=r"3 files are no usable images: a/empty.jpg \(no image, by its content\); b/000"
    ):
        given_["read"]("", **given_["settings"])
    found = given_["read"]("", **given_["settings"] | {"broken": "leave_out"})
    assert len(found["train_labels"]) + len(found["test_labels"]) == 8
    assert "left out, no usable images: 3: a/empty.jpg" in capsys.readouterr().out


def test_a_png_that_is_called_jpeg_is_read(tmp_path: Path) -> None:
    make(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "000.JPEG")
    given_ = image_settings(tmp_path)
    assert len(given_["looked"].rows) == 4 and not given_["looked"].broken
    assert given_["looked"].facts[0].kind == "PNG"


def test_changed_images_are_noticed(tmp_path: Path) -> None:
    make(tmp_path, {"a": 3, "b": 3})
    given_ = image_settings(tmp_path)
    (tmp_path / "a" / "000.png").write_bytes(encoded(noise(seed=77)))
    with pytest.raises(ValueError, match=r"sha256: what lies in .* has [0-9a-f]{64}, not [0-9a-f]{64}"):
        given_["read"]("", **given_["settings"])


def test_listed_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\nx.png,a\ny.png,b\n")
    with pytest.raises(ValueError, match=r"2 of 2 listed files are not there: x.png, y.png"):
        image_settings(tmp_path / "t.csv")


# --------------------------------------------------------------------------------------------- embeddings


def table(folder: Path, features: np.ndarray | None = None, **more: list) -> Path:
    columns: dict = {"label": list("aaaaaabbbb"), **more}
    if features is not None:
        columns["features"] = list(features)
    pq.write_table(pa.table(columns), folder / "t.parquet")
    return folder / "t.parquet"


def test_embeddings_from_npy_and_from_parquet_are_the_same(tmp_path: Path) -> None:
    from longtail.data.sources import embeddings

    features = np.random.default_rng(0).normal(size=(10, 5)).astype(np.float32)
    np.save(tmp_path / "f.npy", features)
    labels = table(tmp_path, features)
    beside = embeddings.look(labels, tmp_path / "f.npy")
    inside = embeddings.look(labels, None)
    assert beside[2] == inside[2]
    found = embeddings.read("", labels=str(labels), features=str(tmp_path / "f.npy"), sha256=beside[2], **RULE)
    assert found["train_images"].dtype == np.float32 and found["train_images"].shape == (6, 1, 1, 5)
    assert {row.tobytes() for part in ("train", "test") for row in found[f"{part}_images"]} == {
        row.tobytes() for row in features
    }
    cut = long_tail.cut(found, profile="as_is", seed=0, held_out=0)
    np.testing.assert_array_equal(cut["train_images"], found["train_images"])


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (np.zeros((9, 5)), r"float64 of shape \(9, 5\); allowed are numbers \(10, D\)"),
        (np.zeros(10), "float64 of shape"),
        (np.full((10, 2), np.nan), "row 0 is not finite"),
        (np.full((10, 2), 1e39), "row 0 is not finite in float32"),
        (np.zeros((10, 2), int), "int64 of shape"),
    ],
)
def test_bad_embeddings_are_named(tmp_path: Path, features: np.ndarray, said: str) -> None:
    from longtail.data.sources import embeddings

    np.save(tmp_path / "f.npy", features)
    with pytest.raises(ValueError, match=said):
        embeddings.look(table(tmp_path), tmp_path / "f.npy")
    with pytest.raises(ValueError, match="no column features; it has label"):
        embeddings.look(table(tmp_path), None)


# ------------------------------------------------------------------------------------------------ the tail


def raw(train: list[int], test: list[int]) -> dict[str, np.ndarray]:
    labels = {part: np.repeat(np.arange(len(sizes)), sizes) for part, sizes in (("train", train), ("test", test))}
    found = {f"{part}_labels": of.astype(np.int64) for part, of in labels.items()}
    found |= {f"{part}_images": np.zeros((len(of), 1, 1, 3), np.uint8) for part, of in labels.items()}
    return found | {"class_names": np.array([f"c{c}" for c in range(len(train))])}


def test_the_tail_as_it_is_and_cut_further() -> None:
    arrays = raw([100, 60, 4, 3], [5, 5, 2, 1])
    as_is = long_tail.cut(arrays, profile="as_is", seed=0, held_out=0)
    assert np.bincount(as_is["train_labels"]).tolist() == [100, 60, 4, 3]
    further = long_tail.cut(arrays, profile="further", imbalance_factor=50, seed=0, held_out=0)
    wanted = [int(100 * (1 / 50) ** (c / 3)) for c in range(4)]
    assert (
        np.bincount(further["train_labels"]).tolist() == np.minimum([100, 60, 4, 3], wanted).tolist() == [100, 27, 4, 2]
    )
    with pytest.raises(ValueError, match="the test split must be balanced"):
        long_tail.cut(arrays, profile="exponential", imbalance_factor=2, seed=0, held_out=0)
    with pytest.raises(ValueError, match="as_is has none, others need one"):
        long_tail.cut(arrays, profile="as_is", imbalance_factor=2, seed=0, held_out=0)
    with pytest.raises(ValueError, match="as_is has none, others need one"):
        long_tail.cut(arrays, profile="further", seed=0, held_out=0)


# ---------------------------------------------------------------------------------------------- behind fsspec


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_folder_or_table_by_url_is_the_local_one(tmp_path: Path, protocol: str) -> None:
    import fsspec

    folder = make(tmp_path / "pets", {"cat": 6, "dog": 4})
    (folder / ".hidden.png").write_bytes(b"x")
    url = f"file://{folder}" if protocol == "file" else "memory://bucket/pets"
    if protocol == "memory":
        system = fsspec.filesystem("memory")
        for file in folder.rglob("*"):
            if file.is_file():
                system.pipe_file(f"/bucket/pets/{file.relative_to(folder).as_posix()}", file.read_bytes())
    plain = {"size": 8, "channels": 3, "fit": "crop", "exif_orientation": False}
    local, remote = images.look(folder, **plain), images.look(url, **plain)
    assert local.rows == remote.rows and len(remote.rows) == 10
    assert local.sha256 == remote.sha256 and np.array_equal(local.pixels, remote.pixels)
    some = local.rows[0].place
    table = f"path,label\n{some},x\n".encode()
    (folder / "t.csv").write_bytes(table)
    fsspec.filesystem("memory").pipe_file("/bucket/pets/t.csv", table)
    assert images.look(f"{url}/t.csv", **plain).rows == [listing.Row(some, "x")]
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder or table"):
        listing.read(f"{url}/nowhere")


def test_embeddings_by_url(tmp_path: Path) -> None:
    import fsspec

    values = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    np.save(tmp_path / "f.npy", values)
    system = fsspec.filesystem("memory")
    system.pipe_file("/bucket/t.csv", b"label\na\na\nb\nb\n")
    system.pipe_file("/bucket/f.npy", (tmp_path / "f.npy").read_bytes())
    rows, found, _ = embeddings.look("memory://bucket/t.csv", "memory://bucket/f.npy")
    assert [row.label for row in rows] == ["a", "a", "b", "b"] and np.array_equal(found, values)


def test_a_protocol_that_nobody_knows_is_named() -> None:
    with pytest.raises(ValueError, match=r"nobody://x: fsspec cannot open it"):
        listing.read("nobody://x")
