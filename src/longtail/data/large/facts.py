"""What the large long-tailed data sets are: lists, archives, counts and hashes of their releases.

Sources: ImageNet-LT and Places-LT of Liu et al. (CVPR 2019), iNaturalist 2018 (Van Horn et al., CVPR 2018), and the
subsets of ImageNet that class-incremental learning uses. Hashes of lists are git's (the blob of the file in the
repositories that carry it), those of archives the publishers' MD5.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

OFFICIAL, OTHER = "official", "other"


class Listed(NamedTuple):
    """A list file, `path label` a line: its rows, images of the smallest and the largest class, and its known forms."""

    name: str
    rows: int
    smallest: int
    largest: int
    blobs: Mapping[str, str]  # git's SHA-1, or its beginning: who has this form


class Archive(NamedTuple):
    """A published archive; a plain tar is read where it lies, `nested` ones hold a tar a class."""

    name: str
    md5: str | None  # None: not published
    size: str
    nested: bool = False

    @property
    def read_in_place(self) -> bool:
        return self.name.endswith(".tar")


class Part(NamedTuple):
    """Images that come together: unpacked in one of `trees`, or in one of `archives`."""

    trees: tuple[str, ...]
    archives: tuple[Archive, ...]


class Form(NamedTuple):
    """How the paths of a data set are read, whatever form a list or an unpacked tree has."""

    key: Callable[[str], str]  # the same for every form of one image's path
    folder: Callable[[str], str | None]  # the class folder that a path names, None where it names none


@dataclass(frozen=True)
class Layout:
    """A data set as it was published.

    Attributes:
        folder: where its files lie, below the folder of all large data sets.
        classes: how many.
        lists: the list of each split; none for those that are made from the archive alone.
        parts: the images.
        shots: classes with more than 100, 20 to 100, and fewer than 20 training images.
        sorted_names: whether label k is the k-th class folder by name.
        numbered: whether a class folder is its label.
        fixed: classes whose labels are known, where the numbering differs from what one would think.
        subset: how the class-incremental subset is chosen: `first` 100 synsets, 100 `drawn`, `all`.
        of_train: published number of training images, where there is no list.
    """

    title: str
    folder: str
    classes: int
    lists: Mapping[str, Listed]
    parts: tuple[Part, ...]
    form: Form
    shots: tuple[int, int, int] | None = None
    sorted_names: bool = False
    numbered: bool = False
    fixed: Mapping[str, int] = field(default_factory=dict)
    subset: str | None = None
    of_train: int | None = None


def _imagenet_folder(path: str) -> str | None:
    name, parent = path.rpartition("/")[2], path.rpartition("/")[0].rpartition("/")[2]
    if re.match(r"n\d{8}_", name):
        return name[:9]
    return parent if re.fullmatch(r"n\d{8}", parent) else None


def _places_class(path: str) -> str | None:
    """apartment_building-outdoor, of data_256/a/apartment_building/outdoor/1.jpg, or train/..., with / or -."""
    *folders, _ = path.split("/")
    for number, name in enumerate(folders):
        if name in ("data_256", "val_256", "train", "val"):
            folders = folders[number + 1 :]
            if name == "data_256":
                folders = folders[1:]  # the letter
            break
    return "-".join(folders) or None


def _places_key(path: str) -> str:
    name = path.rpartition("/")[2]
    return name if name.startswith("Places365_val_") else f"{_places_class(path)}/{name}"


IMAGENET_FORM = Form(lambda path: path.rpartition("/")[2], _imagenet_folder)
PLACES_FORM = Form(_places_key, _places_class)
INATURALIST_FORM = Form(lambda path: "/".join(path.split("/")[-3:]), lambda path: path.split("/")[-2])

IMAGENET = (
    Part(("train",), (Archive("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e", "138 GB", nested=True),)),
    Part(("val",), (Archive("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622", "6.3 GB"),)),
)
EASY = Archive("places365standard_easyformat.tar", None, "24 GB")
PLACES = (
    Part(
        ("data_256", "train", "places365_standard/train"),
        (Archive("train_256_places365standard.tar", "53ca1c756c3d1e7809517cc47c5561c5", "24 GB"), EASY),
    ),
    Part(
        ("val_256", "val", "places365_standard/val"),
        (Archive("val_256.tar", "e27b17d8d44f4af9a78502beb927f808", "0.5 GB"), EASY),
    ),
)
INATURALIST = (
    Part(("train_val2018",), (Archive("train_val2018.tar.gz", "b1c6952ce38f31868cc50ea72d066cc3", "120 GB"),)),
)
IMAGENET_TEST = Listed(
    "ImageNet_LT_test.txt", 50_000, 50, 50,
    {"76a2fb9749d6cd29e765cc4f8c270f2504131e2f": "usual", "0b447ac53963": "validation images in one folder"},
)  # fmt: skip


def _subset(title: str, subset: str, classes: int, of_train: int | None) -> Layout:
    return Layout(
        title, "imagenet", classes, {"test": IMAGENET_TEST}, IMAGENET, IMAGENET_FORM, sorted_names=True, subset=subset,
        of_train=of_train,
    )  # fmt: skip


LAYOUTS = {
    "imagenet_lt": Layout(
        "ImageNet-LT", "imagenet", 1000,
        {
            "train": Listed("ImageNet_LT_train.txt", 115_846, 5, 1280,
                            {"a063f095fcd475db4cf8b0658c4b73955535bbf9": "usual"}),
            "held_out": Listed("ImageNet_LT_val.txt", 20_000, 20, 20,
                               {"3ed3188b2f44829ce2dec1cc27040d8d40984088": "usual"}),
            "test": IMAGENET_TEST,
        },
        IMAGENET, IMAGENET_FORM, (385, 479, 136), sorted_names=True,
    ),
    "places_lt": Layout(
        "Places-LT", "places365", 365,
        {
            "train": Listed("Places_LT_train.txt", 62_500, 5, 4980,
                            {"6392252f8ae867bc8a5e841cc1b29e5b8ef4b636": "easy format",
                             "1d608b558c25c271da75c06f1e5e3625a4ebcb79": "data_256",
                             "982f95576e42903f374f251529d99196e57ac50a": "GALA's"}),
            "held_out": Listed("Places_LT_val.txt", 7_300, 20, 20,
                               {"b93a2ca58ccb": "easy format", "89c29c097332": "data_256", "79729dc06d93": "GALA's"}),
            "test": Listed("Places_LT_test.txt", 36_500, 100, 100,
                           {"e732e58b8aa718a2c1c11933375f5710652c2b93": "easy format",
                            "d43400ac9bc2275baa058456da40b20abb50b108": "data_256"}),
        },
        PLACES, PLACES_FORM, (131, 163, 71),
        # not the official numbering: categories_places365.txt has desert/sand at 116, field/wild at 141
        fixed={"desert_road": 116, "desert-sand": 117, "desert-vegetation": 118, "field_road": 141, "field-wild": 142},
    ),
    "inaturalist_2018": Layout(
        "iNaturalist 2018", "inaturalist2018", 8142,
        {
            "train": Listed("iNaturalist18_train.txt", 437_513, 2, 1000,
                            {"4accdb7584d2f0a5106c40a33ed6afa392189bcc": "usual"}),
            "test": Listed("iNaturalist18_val.txt", 24_426, 3, 3,
                           {"4c23900857fd0f5adcd4cc0dffef345039eeb05f": "usual"}),
        },
        INATURALIST, INATURALIST_FORM, (842, 4076, 3224), numbered=True,
    ),
    # BiC, PODNet, DER have the first 100 synsets by name; UCIR, PyCIL, FOSTER 100 that are drawn with seed 1993
    "imagenet_100_first": _subset("ImageNet-100, first synsets", "first", 100, 129_359),
    "imagenet_100_drawn": _subset("ImageNet-100, drawn synsets", "drawn", 100, None),
    "imagenet_1000": _subset("ImageNet-1000", "all", 1000, 1_281_167),
}  # fmt: skip

# What gives another release away: folders and archives of it, and how many classes its lists have.
OTHER_RELEASES = {
    "imagenet": {"ILSVRC2010_images_train.tar": "ILSVRC2010", "fall11_whole.tar": "fall 2011, all of ImageNet"},
    "places365": {
        "data_large": "Places365 in high resolution",
        "data_challenge": "Places365-Challenge",
        "train_256_places365challenge.tar": "Places365-Challenge",
        "train_large_places365challenge.tar": "Places365-Challenge",
        "train_256_places_extra69.tar": "Places-Extra69",
    },
    "inaturalist2018": {
        "train_val_images": "iNaturalist 2017",
        "train_val2019": "iNaturalist 2019",
        "train_val2019.tar.gz": "iNaturalist 2019",
        "train": "iNaturalist 2021",
        "train.tar.gz": "iNaturalist 2021",
        "train_mini": "iNaturalist 2021 mini",
    },
}  # fmt: skip
OTHER_CLASSES = {5089: "iNaturalist 2017", 1010: "iNaturalist 2019", 10_000: "iNaturalist 2021"}
