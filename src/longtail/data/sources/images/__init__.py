"""One's own images: a folder of class folders, or a table of paths and labels (longtail.data.listing)."""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from longtail.data import decode, listing, own
from longtail.workflow.ranges import Channels, Count, Fraction, Seed, Sha256


@dataclass(frozen=True)
class Looked:
    """What decoding a list of files gave.

    Attributes:
        rows: those that are images, and `pixels` (N, size, size, channels) uint8.
        facts: what each of them is.
        broken: the others, and why: {place: reason}.
        sha256: of all files, broken ones included.
    """

    rows: list[listing.Row]
    pixels: np.ndarray
    facts: list[decode.Facts]
    broken: dict[str, str]
    sha256: str


def look(
    path: str | Path,
    *,
    size: int,
    channels: int,
    fit: str,
    exif_orientation: bool,
    on_file: Callable[[], object] = lambda: None,
) -> Looked:
    """Decode all files that `path` lists; `on_file` is called after each. Raises ValueError as `listing.read`, and
    where a listed file is not there."""
    root, rows = listing.read(path)
    if absent := [row.place for row in rows if not (root / row.place).is_file()]:
        raise ValueError(f"{path}: {len(absent)} of {len(rows)} listed files are not there: {', '.join(absent[:3])}")

    def one(row: listing.Row) -> tuple[bytes, np.ndarray | None, decode.Facts | str]:
        data = (root / row.place).read_bytes()
        try:
            pixels, facts = decode.decode(
                data, size=size, channels=channels, fit=fit, exif_orientation=exif_orientation
            )
        except decode.BrokenError as error:
            return hashlib.sha256(data).digest(), None, str(error)
        finally:
            on_file()
        return hashlib.sha256(data).digest(), pixels, facts

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # threads would put each other's filters back, decode's own
        found = list(pool.map(one, rows))
    good = [n for n, (_, pixels, _) in enumerate(found) if pixels is not None]
    return Looked(
        rows=[rows[n] for n in good],
        pixels=np.array([found[n][1] for n in good], np.uint8).reshape(len(good), size, size, channels),
        facts=[fact for _, _, fact in found if isinstance(fact, decode.Facts)],
        broken={row.place: why for row, (_, _, why) in zip(rows, found, strict=True) if isinstance(why, str)},
        sha256=own.digest(rows, [content for content, _, _ in found]),
    )


def read(
    folder: str | Path,
    *,
    path: str,
    sha256: Sha256,
    size: Count,
    channels: Channels,
    fit: Literal["crop", "pad", "squash"],
    exif_orientation: bool,
    broken: Literal["refuse", "leave_out"],
    duplicates: Literal["refuse", "leave_out", "report"],
    min_per_class: Count,
    test_per_class: Count,
    test_share: Fraction,
    seed: Seed,
) -> dict[str, np.ndarray]:
    """Read the images that `path` lists; all rules are in docs/your_images.md. `folder` is not used.

    What was left out is printed, and lies in the array `report` as JSON.

    Args:
        sha256: of all files, labels and splits, as `longtail new` found it: other images are refused.
        size, channels, fit, exif_orientation: as in `decode.decode`.
        broken: files that are no usable image: all named, nothing made of any; or left out, named and counted.
        min_per_class: smaller classes are left out, and named.
        the others: as in `own.arrays`.

    Raises ValueError naming files, classes or settings, as `look` and `own.arrays` do.
    """
    looked = look(path, size=size, channels=channels, fit=fit, exif_orientation=exif_orientation)
    own.check_digest(looked.sha256, sha256, path)
    if looked.broken and broken == "refuse":
        raise ValueError(
            f"{path}: {len(looked.broken)} files are no usable images: {named(looked.broken)}; "
            "mend or remove them, or leave them out (broken: leave_out)"
        )
    arrays, report = own.arrays(
        looked.rows, looked.pixels, test_per_class=test_per_class, test_share=test_share, min_per_class=min_per_class,
        duplicates=duplicates, seed=seed,
    )  # fmt: skip
    if looked.broken:
        print(f"left out, no usable images: {len(looked.broken)}: {named(looked.broken, len(looked.broken))}")
    for name, count in report["classes_left_out"].items():
        print(f"left out: class {name!r}, which has {count} images, fewer than min_per_class")
    for of_train, of_test in report.get("copies_between_splits", ()):
        print(
            f"{'left out of train' if duplicates == 'leave_out' else 'kept'}: {of_train}, a copy of {of_test} in test"
        )
    return arrays


def shorter_side(file: listing.Place) -> int:
    """Pixels of the shorter side of an image, by its header alone; 0 where it has none that can be read."""
    try:
        with file.open("rb") as opened, Image.open(opened) as image:
            return min(image.size)
    except Exception:  # decoders of damaged files raise all there is
        return 0


def named(broken: dict[str, str], most: int = 10) -> str:
    """Files with what is wrong with each."""
    some = [f"{place} ({why})" for place, why in list(broken.items())[:most]]
    return "; ".join(some) + ("; ..." if len(broken) > most else "")


def kinds(facts: Sequence[decode.Facts]) -> Counter[str]:
    """How many files are of each kind: format and mode, and how many are turned by EXIF."""
    found = Counter(f"{fact.kind} {fact.mode}" for fact in facts)
    return found + Counter({"turned by EXIF": sum(fact.turned for fact in facts)})
