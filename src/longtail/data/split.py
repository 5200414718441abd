"""A test split of one's own data: as balanced as the counts allow, nothing torn apart that belongs together.

N rows, C classes. The rule: of a class of n rows, `test_per_class` go to test, but no more than `test_share` of n, and
one at least where n is 2 or more.
"""

from collections.abc import Sequence

import numpy as np


def quota(sizes_C: np.ndarray, *, test_per_class: int, test_share: float) -> np.ndarray:
    """Test rows of each class (C,) by the rule above."""
    most_C = np.maximum(np.floor(test_share * sizes_C).astype(int), 1)
    return np.minimum(test_per_class, np.where(sizes_C > 1, most_C, 0))


def draw(
    labels: Sequence[str], groups: Sequence[object], *, test_per_class: int, test_share: float, seed: int
) -> np.ndarray:
    """Which rows are test (N,) bool; rows of one group are all test or all train.

    Class after class, the smallest first, its groups in a drawn order: a group goes to test as a whole where that takes
    none of its classes above its quota. Where every row has a group of its own, the quota is met exactly. A class's
    order is drawn from the seed and its name, so that another class changes nothing in it.

    Raises ValueError, naming the class, where its groups leave it without a test row or without a training row.
    """
    names, label_N, sizes_C = np.unique(np.array(labels, dtype=str), return_inverse=True, return_counts=True)
    number: dict[object, int] = {}  # of a group: by its first row, so that what lies before a class moves nothing in it
    group_N = np.array([number.setdefault(group, len(number)) for group in groups])
    open_C = quota(sizes_C, test_per_class=test_per_class, test_share=test_share)
    members = [
        part.tolist() for part in np.split(np.argsort(group_N, kind="stable"), np.cumsum(np.bincount(group_N))[:-1])
    ]
    test_G = np.zeros(len(members), bool)
    for c in np.argsort(sizes_C, kind="stable"):
        own = np.unique(group_N[label_N == c])
        entropy = np.random.SeedSequence([seed, *str(names[c]).encode()])
        for g in np.random.default_rng(entropy).permutation(own):
            if not open_C[c]:
                break
            needed_C = np.bincount(label_N[members[g]], minlength=len(names)) if len(members[g]) > 1 else None
            if test_G[g]:
                continue
            if needed_C is None:
                open_C[c] -= 1
            elif (needed_C <= open_C).all():
                open_C -= needed_C
            else:
                continue
            test_G[g] = True
    test_N = test_G[group_N]
    for c, name in enumerate(names):
        of_test = int(test_N[label_N == c].sum())
        if not of_test or of_test == sizes_C[c]:
            raise ValueError(
                f"class {str(name)!r}: of its {sizes_C[c]} rows none can go to {'train' if of_test else 'test'} without"
                " tearing a group (or copies of an image) apart; give it more, or raise min_per_class to leave it out"
            )
    return test_N


def joined(groups: Sequence[object], contents: Sequence[bytes]) -> list[int]:
    """A number for each row (N,): the same for rows that share a group or a content, directly or by others."""
    parent = list(range(len(contents)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[object, int] = {}
    for row, keys in enumerate(zip(groups, contents, strict=True)):
        for kind, key in enumerate(keys):
            if key is not None:
                parent[root(row)] = root(first.setdefault((kind, key), row))
    return [root(row) for row in range(len(parent))]
