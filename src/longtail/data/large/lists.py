"""Lists of images, `path label` a line, held against what is known of their release."""

import hashlib
import json
import re
from collections import Counter
from typing import NamedTuple

from longtail.data.large.facts import LAYOUTS, OFFICIAL, OTHER_CLASSES, Layout, Listed
from longtail.data.large.store import Store

LINE = re.compile(r"(?P<path>\S.*?)[ \t]+(?P<label>\d+)")


class Rows(NamedTuple):
    """Paths as a list has them, their labels, and git's hash of the list."""

    paths: list[str]
    labels: list[int]
    blob: str


def git_blob(data: bytes) -> str:
    """SHA-1 of a file as git has it, by which copies of a list in repositories are known."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def read(store: Store, layout: Layout, split: str, *, edition: str) -> Rows:
    """The rows of a split's list; with `edition: official` they must be those of the release.

    Raises FileNotFoundError where it is not there, and ValueError, naming the line, for CRLF, a line of another form, a
    path that is there twice; for another edition what it seems to be.
    """
    listed = layout.lists[split]
    if not store.exists(listed.name):
        made = _from_json(store, listed.name)
        if made is None:
            raise FileNotFoundError(
                f"{store.at(listed.name)}: no such list. Put {listed.name} there ({listed.rows:,} lines `path label`; "
                f"the repositories that compare on {layout.title} carry it)"
            )
        rows = made
    else:
        rows = parse(store.read(listed.name), store.at(listed.name))
    if edition == OFFICIAL:
        _check_release(rows, listed, layout, store.at(listed.name))
    return rows


def parse(data: bytes, where: str) -> Rows:
    """The rows of a list's bytes. Raises ValueError naming the line."""
    if crlf := data.count(b"\r\n"):
        raise ValueError(
            f"{where}: {crlf:,} of its lines end with CRLF, as in GALA's and DirMixE's copies of "
            "iNaturalist18_val.txt; it would be a part of the label. `sed -i 's/\\r$//' FILE` makes it the usual list"
        )
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error}); a list is text, unpack it where it is zipped") from error
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{where}: line {number} is {line[:80]!r}; allowed is `path label`, one space between")
        paths.append(match["path"])
        labels.append(int(match["label"]))
    if not paths:
        raise ValueError(f"{where}: no line in it")
    if len(set(paths)) < len(paths):
        path, times = Counter(paths).most_common(1)[0]
        raise ValueError(f"{where}: {path} is there {times} times")
    return Rows(paths, labels, git_blob(data))


def _from_json(store: Store, name: str) -> Rows | None:
    """iNaturalist's own annotations in place of a list, where they are there: images and labels joined by image id."""
    file = {"iNaturalist18_train.txt": "train2018.json", "iNaturalist18_val.txt": "val2018.json"}.get(name)
    if file is None or not store.exists(file):
        return None
    try:
        content = json.loads(store.read(file))
        label_of = {one["image_id"]: int(one["category_id"]) for one in content["annotations"]}
        found = [(one["file_name"], label_of[one["id"]]) for one in content["images"]]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{store.at(file)}: not iNaturalist's annotations ({type(error).__name__}: {error})"
        ) from error
    lines = "".join(f"{path} {label}\n" for path, label in found)
    return parse(lines.encode(), store.at(file))


def _check_release(rows: Rows, listed: Listed, layout: Layout, where: str) -> None:
    """Raise ValueError, saying what it is instead, for a list that is not that of the release."""
    if any(rows.blob.startswith(known) for known in listed.blobs):
        return
    for other in LAYOUTS.values():
        for one in other.lists.values():
            if one is not listed and any(rows.blob.startswith(known) for known in one.blobs):
                raise ValueError(f"{where}: this is {one.name} of {other.title}, under the name {listed.name}")
    classes = len(set(rows.labels))
    if classes in OTHER_CLASSES and classes != layout.classes:
        raise ValueError(
            f"{where}: {classes:,} classes, as {OTHER_CLASSES[classes]} has them; {layout.title} has {layout.classes:,}"
        )
    if len(rows.paths) != listed.rows:
        how = "short" if len(rows.paths) < listed.rows else "long"
        raise ValueError(
            f"{where}: too {how}: {len(rows.paths):,} rows, {layout.title}'s has {listed.rows:,}; cut off, or of "
            "another edition. `edition: other` takes a list of your own"
        )
    if classes != layout.classes:
        raise ValueError(f"{where}: {classes:,} classes; {layout.title} has {layout.classes:,}")
    sizes = Counter(rows.labels).values()
    if (min(sizes), max(sizes)) != (listed.smallest, listed.largest):
        raise ValueError(
            f"{where}: classes have {min(sizes)} to {max(sizes)} images; in {layout.title}'s {listed.smallest} to "
            f"{listed.largest}: another edition, or labels were changed"
        )
    if listed.blobs:  # a form that nobody is known to have: rows and sizes are right, paths or labels may not be
        raise ValueError(
            f"{where}: as many rows as {layout.title}'s, but another file: git's hash is {rows.blob[:12]}, known are "
            f"{', '.join(f'{blob[:12]} ({who})' for blob, who in listed.blobs.items())}: labels swapped, rows in "
            "another order, or another form of paths. `edition: other` takes it as it is"
        )
