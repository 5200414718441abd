"""The index of a large data set: which images, of which class, in which split. No pixel, and no place on a disk.

What DVC keeps of 150 GB is this file. It is the same wherever the images lie, unpacked or not: where they are is looked
up when they are read (`places`). N rows a split, C classes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from longtail.data.large import lists, places
from longtail.data.large.facts import LAYOUTS, OFFICIAL, Layout
from longtail.data.large.lists import Rows
from longtail.data.large.store import Store

SPLITS = ("train", "held_out", "test")
DRAWN_SEED, SUBSET = 1993, 100


def make(
    root: str | None = None,
    *,
    layout: Literal[
        "imagenet_lt", "places_lt", "inaturalist_2018", "imagenet_100_first", "imagenet_100_drawn", "imagenet_1000"
    ],
    edition: Literal["official", "other"],
    held_out: Literal["list", "none"],
) -> dict[str, np.ndarray]:
    """The index of a large data set, all of whose images have been found.

    Args:
        root: in place of LONGTAIL_LARGE and data/large.
        layout: which.
        edition: official: lists, counts and labels are those of the release; other: anything in its layout.
        held_out: list: the release's own validation list, where it has one beside test; none.

    Returns {train,held_out,test}_{keys,sizes,labels} (N,): an image's path in one form (bytes), its size in bytes, its
    class, sorted by class and key; class_names (C,); report, JSON: the digest of all that, counts, shots, lists.

    Raises FileNotFoundError saying what to put where, and ValueError saying what is wrong with which file.
    """
    known = LAYOUTS[layout]
    store = Store(known.folder, root)
    if held_out == "list" and "held_out" not in known.lists:
        raise ValueError(f"held_out: list: {known.title} has no list for it, its validation images are the test set")
    if known.subset:
        rows = _subset(store, known, edition)
    else:
        wanted = [split for split in SPLITS if split in known.lists and (split != "held_out" or held_out == "list")]
        rows = {split: lists.read(store, known, split, edition=edition) for split in wanted}
    names = check_labels(rows, known, edition)
    keys = {split: [known.form.key(path) for path in rows[split].paths] for split in rows}
    _check_apart(keys, known)
    every = [key for split in keys for key in keys[split]]
    found = places.find(store, known, every, verified=edition == OFFICIAL)
    arrays: dict[str, np.ndarray] = {"class_names": np.array(_called(store, names))}
    for split in SPLITS:
        of_split = list(zip(rows[split].labels, keys[split], strict=True)) if split in rows else []
        of_split.sort()
        arrays[f"{split}_keys"] = np.array([key.encode() for _, key in of_split], "S" if of_split else "S1")
        arrays[f"{split}_sizes"] = np.array([found[key].size for _, key in of_split], np.int64)
        arrays[f"{split}_labels"] = np.array([label for label, _ in of_split], np.int64)
    report = _report(arrays, rows, known, edition)
    return arrays | {"report": np.array(json.dumps(report, sort_keys=True))}


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of what images the index has, how large each is, of which class and split, and the classes' names."""
    found = hashlib.sha256(json.dumps(arrays["class_names"].tolist()).encode())
    for split in SPLITS:
        found.update(split.encode() + b"\0".join(arrays[f"{split}_keys"].tolist()))
        found.update(
            arrays[f"{split}_sizes"].astype("<i8").tobytes() + arrays[f"{split}_labels"].astype("<i8").tobytes()
        )
    return found.hexdigest()


def locate(arrays: Mapping[str, np.ndarray], layout: str, root: str | None = None) -> tuple[Store, dict[str, list]]:
    """The store, and the piece of every row of each split, as the index has it.

    Raises as `places.find`, and ValueError where an image has another size than when the index was made.
    """
    known = LAYOUTS[layout]
    store = Store(known.folder, root)
    keys = {split: [key.decode() for key in arrays[f"{split}_keys"].tolist()] for split in SPLITS}
    found = places.find(store, known, [key for split in SPLITS for key in keys[split]], verified=False)
    pieces = {split: [found[key] for key in keys[split]] for split in SPLITS}
    for split in SPLITS:
        changed = np.flatnonzero(
            np.array([piece.size for piece in pieces[split]], np.int64) != arrays[f"{split}_sizes"]
        )
        if len(changed):
            raise ValueError(
                f"{store.path}: {len(changed):,} images have another size than when the index was made, first "
                f"{keys[split][changed[0]]}; run the stage `index` again"
            )
    return store, pieces


def check_labels(rows: Mapping[str, Rows], layout: Layout, edition: str) -> list[str]:
    """Raise ValueError where labels and class folders of the paths do not agree; returns the classes' names."""
    folder_of: dict[int, str] = {}
    label_of: dict[str, int] = {}
    for split, part in rows.items():
        for path, label in zip(part.paths, part.labels, strict=True):
            folder = layout.form.folder(path)
            if folder is None:
                continue
            if folder_of.setdefault(label, folder) != folder or label_of.setdefault(folder, label) != label:
                other = f"label {label} is also {folder_of[label]}" if folder_of[label] != folder else (
                    f"{folder} also has the label {label_of[folder]}"
                )  # fmt: skip
                raise ValueError(f"{split}: {path} has the label {label}, and {other}: labels are swapped or wrong")
    labels = sorted(folder_of)
    if labels != list(range(len(labels))):
        gap = next(c for c, label in enumerate(labels) if c != label)
        raise ValueError(
            f"labels: there is no class {gap}, and there is a class {labels[-1]}; allowed are all from 0 on"
        )
    for split in set(rows) & {"train", "test"}:
        if absent := sorted(set(labels) - set(rows[split].labels)):
            raise ValueError(f"{split}: class {absent[0]} ({folder_of[absent[0]]}) has no image")
    names = [folder_of[label] for label in labels]
    wrong = None
    if layout.sorted_names and names != sorted(names):
        wrong = next((c, sorted(names)[c]) for c in labels if names[c] != sorted(names)[c])
    if layout.numbered:
        wrong = next(((c, str(c)) for c in labels if names[c] != str(c)), None)
    if edition == OFFICIAL:
        wrong = wrong or next(((c, n) for n, c in layout.fixed.items() if names[c] != n), None)
    if wrong:
        raise ValueError(
            f"labels: {wrong[0]} is {names[wrong[0]]}, where {layout.title} has {wrong[1]}: labels are swapped, or of "
            "another numbering"
        )
    if edition == OFFICIAL and len(names) != layout.classes:
        raise ValueError(f"{len(names):,} classes; {layout.title} has {layout.classes:,}")
    return names


def shots(counts_C: np.ndarray) -> tuple[int, int, int]:
    """Classes with more than 100, 20 to 100, fewer than 20 training images (Liu et al., CVPR 2019)."""
    many, few = int((counts_C > 100).sum()), int((counts_C < 20).sum())
    return many, len(counts_C) - many - few, few


def _subset(store: Store, layout: Layout, edition: str) -> dict[str, Rows]:
    """All training images of the chosen synsets, and their validation images by ImageNet-LT's test list."""
    test = lists.read(store, layout, "test", edition=edition)
    folders = [layout.form.folder(path) for path in test.paths]
    if None in folders:
        raise ValueError(
            f"{store.at(layout.lists['test'].name)}: its paths name no synset; take the form val/<synset>/..."
        )
    synsets = sorted({folder for folder in folders if folder})
    chosen = synsets
    if layout.subset == "first":
        chosen = synsets[:SUBSET]
    if layout.subset == "drawn":
        drawn = np.random.RandomState(DRAWN_SEED).permutation(len(synsets))[:SUBSET]
        chosen = sorted(synsets[place] for place in drawn)
    number = {synset: label for label, synset in enumerate(chosen)}
    every = places.all_of(store, layout, layout.parts[0], verified=edition == OFFICIAL)
    paths = sorted(path for path in every if layout.form.folder(path) in number)
    if edition == OFFICIAL and layout.of_train not in (None, len(paths)):
        raise ValueError(f"{store.path}: {len(paths):,} training images; {layout.title} has {layout.of_train:,}")
    of_test = [(path, number[folder]) for path, folder in zip(test.paths, folders, strict=True) if folder in number]
    return {
        "train": Rows(paths, [number[str(layout.form.folder(path))] for path in paths], ""),
        "test": Rows([path for path, _ in of_test], [label for _, label in of_test], test.blob),
    }


def _check_apart(keys: Mapping[str, Sequence[str]], layout: Layout) -> None:
    """Raise ValueError where two lists have an image in common."""
    seen: dict[str, str] = {}
    for split, of_split in keys.items():
        for key in of_split:
            if key in seen:
                raise ValueError(
                    f"{layout.title}: {key} is in {seen[key]} and in {split}: a list stands in another's place"
                )
            seen[key] = split


def _called(store: Store, names: list[str]) -> list[str]:
    """iNaturalist's class numbers with the species of categories.json behind them, where it is there."""
    if not store.exists("categories.json"):
        return names
    try:
        species = {str(one["id"]): str(one["name"]) for one in json.loads(store.read("categories.json"))}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{store.at('categories.json')}: not iNaturalist's categories ({error})") from error
    return [f"{name} {species[name]}" if name in species else name for name in names]


def _report(arrays: Mapping[str, np.ndarray], rows: Mapping[str, Rows], layout: Layout, edition: str) -> dict[str, Any]:
    counts_C = np.bincount(arrays["train_labels"])
    found = shots(counts_C)
    if edition == OFFICIAL and layout.shots not in (None, found):
        raise ValueError(f"many, medium, few: {found}; {layout.title} has {layout.shots}: labels were changed")
    return {
        "layout": layout.title, "edition": edition, "digest": digest(arrays), "classes": len(counts_C),
        "images": {split: len(arrays[f"{split}_labels"]) for split in SPLITS},
        "bytes": {split: int(arrays[f"{split}_sizes"].sum()) for split in SPLITS},
        "largest": int(counts_C.max()), "smallest": int(counts_C.min()), "many_medium_few": found,
        "lists": {split: part.blob for split, part in rows.items()},
    }  # fmt: skip
