"""Small data sets in the layouts of the large ones, with generated images of every kind that occurs in them.

    python tests/large_trees.py FOLDER    # imagenet, places365, inaturalist2018 below it

A class is a colour, so that what is learned is more than noise.
"""

import io
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = (24, 14, 8, 5, 3)  # training images of the classes
KINDS = ("rgb", "grey", "cmyk", "png", "palette", "sixteen_bit", "turned", "large", "dot")
SUPER = "Plantae", "Insecta", "Aves"
PLACES = ("airfield", "alley", "apartment_building-outdoor", "field-wild", "field_road")


def image(label: int, kind: str = "rgb", seed: int = 0) -> bytes:
    """The bytes of a file of a kind, of the colour of a class."""
    rng = np.random.default_rng([label, seed, KINDS.index(kind)])
    height, width = {"large": (90, 1200), "dot": (1, 1)}.get(kind, (36, 48))
    colour = np.array([label * 50 % 256, label * 90 % 256, 255 - label * 40 % 256])
    values = np.clip(colour + rng.integers(-25, 26, (height, width, 3)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(values)
    out = io.BytesIO()
    if kind == "png":
        picture.save(out, "PNG")
    elif kind == "palette":
        picture.quantize(32).save(out, "PNG")
    elif kind == "sixteen_bit":
        Image.fromarray(values[..., 0].astype(np.uint16) * 257).save(out, "PNG")
    else:
        mode = {"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.convert(mode).save(out, "JPEG", quality=92, **({"exif": exif} if kind == "turned" else {}))
    return out.getvalue()


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_list(path: Path, rows: Sequence[tuple[str, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{place} {label}\n" for place, label in rows))


def make(
    root: Path,
    lists: dict[str, Callable[[int, int, str], tuple[str, str]]],
    names: dict[str, str],
    sizes: Sequence[int] = SIZES,
    test: int = 4,
    held_out: int = 2,
) -> dict[str, list[tuple[str, int]]]:
    """Write the lists and images of a data set; `lists[split]` says a row's path in the list and in the tree."""
    rows: dict[str, list[tuple[str, int]]] = {}
    number = 0
    for split, place in lists.items():
        for label, size in enumerate(sizes):
            for n in range({"train": size, "held_out": held_out, "test": test}[split]):
                number += 1
                listed, lies = place(label, number, split)
                put(root / lies, image(label, KINDS[n % len(KINDS)], number))
                rows.setdefault(split, []).append((listed, label))
        write_list(root / names[split], rows[split])
    return rows


def imagenet(root: Path, **settings: int) -> dict[str, list[tuple[str, int]]]:
    """ImageNet-LT: train in synset folders, validation images flat though the list has folders."""

    def train(label: int, number: int, split: str) -> tuple[str, str]:
        synset = f"n{label + 1440764:08}"
        return (f"train/{synset}/{synset}_{number}.JPEG",) * 2

    def test(label: int, number: int, split: str) -> tuple[str, str]:
        name = f"ILSVRC2012_val_{number:08}.JPEG"
        return f"val/n{label + 1440764:08}/{name}", f"val/{name}"

    names = {split: f"ImageNet_LT_{short}.txt" for split, short in SHORT.items()}
    return make(root / "imagenet", {"train": train, "held_out": train, "test": test}, names, **settings)


def places(root: Path, form: str = "data_256", **settings: int) -> dict[str, list[tuple[str, int]]]:
    """Places-LT: lists in the form `data_256`, `easy` or `gala`; the tree is that of the archive, data_256."""

    def train(label: int, number: int, split: str) -> tuple[str, str]:
        name, file = PLACES[label], f"{number:08}.jpg"
        lies = f"data_256/{name[0]}/{name.replace('-', '/')}/{file}"
        return {"data_256": lies, "easy": f"train/{name}/{file}", "gala": f"train/{name.replace('-', '/')}/{file}"}[
            form
        ], lies

    def test(label: int, number: int, split: str) -> tuple[str, str]:
        file = f"Places365_val_{number:08}.jpg"
        return (f"val_256/{file}" if form == "data_256" else f"val/{PLACES[label]}/{file}"), f"val_256/{file}"

    names = {split: f"Places_LT_{short}.txt" for split, short in SHORT.items()}
    return make(root / "places365", {"train": train, "held_out": train, "test": test}, names, **settings)


def inaturalist(root: Path, **settings: int) -> dict[str, list[tuple[str, int]]]:
    """iNaturalist 2018: one tree, a folder for each category number."""

    def any_split(label: int, number: int, split: str) -> tuple[str, str]:
        return (f"train_val2018/{SUPER[label % 3]}/{label}/{number:032x}.jpg",) * 2

    names = {"train": "iNaturalist18_train.txt", "test": "iNaturalist18_val.txt"}
    return make(root / "inaturalist2018", {"train": any_split, "test": any_split}, names, **settings)


SHORT = {"train": "train", "held_out": "val", "test": "test"}
MAKERS = {"imagenet_lt": imagenet, "places_lt": places, "inaturalist_2018": inaturalist}


def pack(folder: Path, archive: str, tree: str, *, nested: bool = False) -> None:
    """Put a tree of `folder` into a tar beside it, with a tar a class folder where `nested`; hide the tree."""
    with tarfile.open(folder / archive, "w") as outer:
        for inside in sorted((folder / tree).iterdir()):
            if nested:
                content = io.BytesIO()
                with tarfile.open(fileobj=content, mode="w") as inner:
                    for file in sorted(inside.iterdir()):
                        inner.add(file, file.name)
                member = tarfile.TarInfo(f"{inside.name}.tar")
                member.size = len(content.getvalue())
                outer.addfile(member, io.BytesIO(content.getvalue()))
            else:
                outer.add(inside, f"{tree}/{inside.name}")
    (folder / tree).rename(folder / f".{tree}")


if __name__ == "__main__":
    for one in MAKERS.values():
        one(Path(sys.argv[1]))
