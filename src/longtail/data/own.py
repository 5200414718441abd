"""One's own samples, read and labelled, to the arrays that every source returns: classes, splits, copies, report.

N rows, C classes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from longtail.data import long_tail, split
from longtail.data.listing import Row

NAMED = 3  # rows that a message names; the report has all
Arrays = dict[str, np.ndarray]


def digest(rows: Sequence[Row], contents: Sequence[bytes]) -> str:
    """SHA-256 of rows and what each holds: whether samples, labels, groups or splits are still the same."""
    found = hashlib.sha256()
    for row, content in zip(rows, contents, strict=True):
        found.update(json.dumps([row.place, row.label, row.group, row.split]).encode() + content)
    return found.hexdigest()


def check_digest(found: str, wanted: str, where: str) -> None:
    """Raise ValueError where samples are not those that params.yaml was written for."""
    if found != wanted:
        raise ValueError(
            f"sha256: what lies in {where} has {found}, not {wanted}: samples, labels or splits changed. Put the new "
            "one into params.yaml (`longtail new` does), so that all that hangs on them runs again"
        )


def arrays(
    rows: Sequence[Row],
    values: np.ndarray,
    *,
    test_per_class: int,
    test_share: float,
    min_per_class: int,
    duplicates: str,
    seed: int,
) -> tuple[Arrays, dict[str, Any]]:
    """The arrays of `sources`, and a report: classes left out, copies, how the splits came about.

    Classes are in the order of their training rows, most first, then of their names. Copies are rows with the same
    bytes in `values` (N, H, W, channels). Where the split is drawn, they stay together, as groups do; where it is given
    and they lie on both sides, `duplicates` says what becomes of it: refuse, leave_out (of train), report. Rows of
    train that belong together share a number in `train_groups`, by which they stay together in what is held out.

    Raises ValueError, naming classes and rows: fewer than two classes, a split that is given for some rows alone, a
    class without a row in one of the splits, copies with different labels or (refuse) between splits, a group in both.
    """
    report: dict[str, Any] = {}
    contents = [hashlib.sha256(value.tobytes()).digest() for value in values]
    kept, report["classes_left_out"] = _large_enough(rows, min_per_class)
    _check_labels(rows, contents, kept)
    given = {rows[n].split is not None for n in kept}
    if len(given) > 1:
        raise ValueError("a split is given for some rows, and for others not")
    if given == {True}:
        test, copies = _given(rows, contents, kept, duplicates)
        report["copies_between_splits"] = copies
        if duplicates == "leave_out":
            out = {place for pair in copies for place in pair[:1]}
            test, kept = zip(
                *((t, n) for t, n in zip(test, kept, strict=True) if rows[n].place not in out), strict=True
            )
    else:
        together = split.joined([rows[n].group for n in kept], [contents[n] for n in kept])
        report["copies_kept_together"] = len(kept) - len({contents[n] for n in kept})
        labels = [rows[n].label for n in kept]
        test = split.draw(labels, together, test_per_class=test_per_class, test_share=test_share, seed=seed).tolist()
    sizes = Counter(rows[n].label for n, of_test in zip(kept, test, strict=True) if not of_test)
    of_test = Counter(rows[n].label for n, is_test in zip(kept, test, strict=True) if is_test)
    for one, other, name in ((sizes, of_test, "test"), (of_test, sizes, "train")):
        if lacking := sorted(set(one) - set(other)):
            raise ValueError(f"class {lacking[0]!r} has no row in {name}; there are {len(lacking)} such classes")
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    if len(names) < 2:
        raise ValueError(f"classes: {', '.join(names) or 'none'}; two are needed at least")
    number = {name: c for c, name in enumerate(names)}
    found: Arrays = {"class_names": np.array(names)}
    for part, wanted in (("train", False), ("test", True)):
        chosen = [n for n, is_test in zip(kept, test, strict=True) if is_test == wanted]
        chosen.sort(key=lambda n: (number[rows[n].label], rows[n].place))
        found[f"{part}_images"] = values[chosen]
        found[f"{part}_labels"] = np.array([number[rows[n].label] for n in chosen], np.int64)
        groups = split.joined([rows[n].group for n in chosen], [contents[n] for n in chosen])
        if part == "train" and len(set(groups)) < len(groups):
            found[long_tail.GROUPS] = np.array(groups, np.int64)
    report |= {"train": len(found["train_labels"]), "test": len(found["test_labels"]), "classes": len(names)}
    return found | {"report": np.array(json.dumps(report, sort_keys=True))}, report


def _large_enough(rows: Sequence[Row], least: int) -> tuple[Sequence[int], dict[str, int]]:
    """Row numbers of the classes that have `least` rows, and the other classes with how many they have."""
    sizes = Counter(row.label for row in rows)
    small = {name: size for name, size in sorted(sizes.items()) if size < least}
    return [n for n, row in enumerate(rows) if row.label not in small], small


def _check_labels(rows: Sequence[Row], contents: Sequence[bytes], kept: Sequence[int]) -> None:
    """Raise ValueError where a sample and its copy have different labels: one of them is wrong."""
    first: dict[bytes, int] = {}
    twins = [(first.setdefault(contents[n], n), n) for n in kept]
    wrong = [(a, b) for a, b in twins if rows[a].label != rows[b].label]
    if wrong:
        said = _pairs([(rows[a].place, rows[b].place) for a, b in wrong])
        raise ValueError(f"{len(wrong)} copies have another label: {said}; remove or correct one of each")


def _given(
    rows: Sequence[Row], contents: Sequence[bytes], kept: Sequence[int], duplicates: str
) -> tuple[Sequence[bool], list[tuple[str, str]]]:
    """Which of the rows are test, as given, and the copies of test rows in train: (train's place, test's)."""
    test = [rows[n].split == "test" for n in kept]
    both = {rows[n].group for n, t in zip(kept, test, strict=True) if t and rows[n].group is not None}
    both &= {rows[n].group for n, t in zip(kept, test, strict=True) if not t}
    if both:
        raise ValueError(f"group {min(map(str, both))!r} is in train and in test; there are {len(both)} such groups")
    of_test = {contents[n]: rows[n].place for n, t in zip(kept, test, strict=True) if t}
    copies = [
        (rows[n].place, of_test[contents[n]])
        for n, t in zip(kept, test, strict=True)
        if not t and contents[n] in of_test
    ]
    if copies and duplicates == "refuse":
        raise ValueError(
            f"{len(copies)} training images are in test, too: {_pairs(copies)}; "
            "duplicates: leave_out takes them out of train, report keeps them"
        )
    return test, copies


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{a} and {b}" for a, b in pairs[:NAMED]) + ("; ..." if len(pairs) > NAMED else "")
