"""Long-tailed training sets cut from balanced ones, and images held out of them.

The exponential profile is that of Cui et al., 'Class-Balanced Loss Based on Effective Number of
Samples' (CVPR 2019), with the counts of Cao et al., 'Learning Imbalanced Datasets with
Label-Distribution-Aware Margin Loss' (NeurIPS 2019), whose CIFAR cuts the field compares on. The
step profile is that of Buda et al., 'A Systematic Study of the Class Imbalance Problem in
Convolutional Neural Networks' (Neural Networks 2018), again with Cao et al.'s counts. Classes are
ordered by label: class 0 is the largest.

Which images of a class are taken is a `draw`. The field's is that of Cao et al.'s released code, which RIDE, SADE and
BalPoE took over with the images it gives: `ldam`, made to the image from the rows' places in the official archive.

One's own data have a tail already: `as_is` keeps it, `further` cuts it down to the exponential profile below the
largest class, where it is not below it anyway.

N examples, C classes; `imbalance_factor` = largest class / smallest class, 1 or more.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
OWN = ("as_is", "further")  # profiles of sources whose classes differ in size, test split included
PLACES = "train_places"  # the array of a source that says where each row lies in the original release
GROUPS = "train_groups"  # the array of a source that has the same number for rows that belong together

# A stream of its own for the held-out draw. Not 0: SeedSequence pads with zeros, so that
# [seed, class, 0] would be the [seed, class] of subsample.
HOLD_OUT = 1


def _exponential(n_max: int, num_classes: int, ratio: float) -> list[int]:
    """n_i = int(n_max * ratio ** (i / (C - 1))), ratio = 1 / imbalance_factor (Cui et al.)."""
    # Python floats in this very order: another order could move int() by one image.
    return [int(n_max * (ratio ** (i / (num_classes - 1.0)))) for i in range(num_classes)]


def _step(n_max: int, num_classes: int, ratio: float) -> list[int]:
    """The first C // 2 classes have n_max images, the others int(n_max * ratio) (Buda et al.)."""
    head = num_classes // 2
    return [n_max] * head + [int(n_max * ratio)] * (num_classes - head)


PROFILES: dict[str, Callable[[int, int, float], list[int]]] = {
    "exponential": _exponential,
    "step": _step,
}


def class_counts(profile: str, n_max: int, num_classes: int, imbalance_factor: float) -> np.ndarray:
    """Images of each class, int64 (C,): n_max first, never increasing.

    Raises ValueError for an unknown profile, n_max < 1, num_classes < 2, imbalance_factor < 1, or a
    factor so large that some class would have no image.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile: {profile!r} is unknown; allowed are {', '.join(sorted(PROFILES))}")
    if n_max < 1:
        raise ValueError(f"n_max: {n_max} is not allowed; allowed is 1 or more")
    if num_classes < 2:
        raise ValueError(f"num_classes: {num_classes} is not allowed; allowed is 2 or more")
    if not 1 <= imbalance_factor < np.inf:
        raise ValueError(f"imbalance_factor: {imbalance_factor} is not allowed; allowed is 1 or more")
    counts = np.array(PROFILES[profile](int(n_max), int(num_classes), 1 / imbalance_factor), np.int64)
    if counts.min() < 1:
        raise ValueError(
            f"imbalance_factor: {imbalance_factor} leaves class {np.flatnonzero(counts < 1)[0]} "
            f"without an image; allowed is a factor below n_max, the {n_max} of the largest class"
        )
    return counts


def _own(rows: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Every class with a generator of its own, so that another class changes no draw."""
    return [_generator(seed, label).permutation(of_class) for label, of_class in enumerate(rows)]


def _ldam(rows: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Class after class shuffled by numpy's old global generator, seeded once (Cao et al.'s released code: seed 0)."""
    generator = np.random.RandomState(seed)
    return [generator.permutation(of_class) for of_class in rows]  # a copy, shuffled


def _first(rows: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """As they come in the archive: no draw at all, and no use for a seed."""
    return rows


DRAWS: dict[str, Callable[[list[np.ndarray], int], list[np.ndarray]]] = {"own": _own, "ldam": _ldam, "first": _first}
OF_THE_ARCHIVE = ("ldam", "first")  # draws that go by the rows' places there


def drawn(
    labels: np.ndarray,
    *,
    profile: str,
    imbalance_factor: float | None,
    seed: int,
    draw: str = "own",
    places: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Rows of a long-tailed subset of `labels` (N,), int64, an array a class, in the order in which they are drawn.

    n_max is the size of the smallest class, for `further` that of the largest; `as_is` takes all, without a factor.
    A count takes the first so many rows of a class's whole order, which no count changes: a larger imbalance_factor
    gives a subset of what a smaller one gives with the same draw and seed.

    Args:
        draw: `own`: a permutation a class. `ldam`: that of Cao et al. (NeurIPS 2019); with seed 0 the subset that the
            papers on CIFAR-LT share. `first`: the first of the archive's order, as others have it; without a seed.
        places: (N,) int64, each row's number in the official archive; `ldam` and `first` need it.

    Raises ValueError as `class_counts` does, for labels that miss a class, a negative seed, an unknown draw, and places
    that are missing or no numbering.
    """
    sizes = _class_sizes(labels, "labels")
    counts = _counts(profile, sizes, imbalance_factor)
    if draw not in DRAWS:
        raise ValueError(f"draw: {draw!r} is unknown; allowed are {', '.join(DRAWS)}")
    _check_seed(seed)
    rows = [np.flatnonzero(labels == label) for label in range(len(sizes))]
    if draw in OF_THE_ARCHIVE:
        if places is None:
            raise ValueError(
                f"draw: {draw!r} needs {PLACES}, the rows' places in the official archive, and the source has none: "
                "read it from its own site, or from a mirror that has places.parquet; without them, allowed is own"
            )
        _check_places(places, len(labels))
        rows = [of_class[np.argsort(places[of_class])] for of_class in rows]
    return [order[:count].astype(np.int64) for order, count in zip(DRAWS[draw](rows, seed), counts, strict=True)]


def _counts(profile: str, sizes_C: np.ndarray, imbalance_factor: float | None) -> np.ndarray:
    """How many of each class are taken (C,)."""
    if (imbalance_factor is None) != (profile == "as_is"):
        raise ValueError(
            f"imbalance_factor: {imbalance_factor} with the profile {profile}: as_is has none, others need one"
        )
    if imbalance_factor is None:
        return sizes_C
    if profile == "further":
        return np.minimum(sizes_C, class_counts("exponential", int(sizes_C.max()), len(sizes_C), imbalance_factor))
    return class_counts(profile, int(sizes_C.min()), len(sizes_C), imbalance_factor)


def subsample(labels: np.ndarray, **settings: Any) -> np.ndarray:
    """Rows of a long-tailed subset of `labels` (N,), int64, ascending: `drawn`, with its settings and errors."""
    return np.sort(np.concatenate(drawn(labels, **settings)))


def hold_out(
    labels: np.ndarray, *, fraction: float, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Split the rows of `labels` (N,) class by class: (train, held out), int64, ascending.

    Of a class of n images round(fraction * n) are held out: at least one where n is 2 or more and
    the fraction is above 0, and never all. A fraction of 0 holds out nothing. Rows with the same number
    in `groups` (N,) stay together: a class has fewer held out where its groups do not fit, and none where none does.

    Raises ValueError for a fraction outside [0, 1), labels that miss a class or a negative seed.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: {fraction} is not allowed; allowed is 0 up to, but not, 1")
    held_out = np.zeros(len(labels), bool)
    sizes_C = _class_sizes(labels, "labels")
    open_C = np.array([min(max(round(fraction * int(size)), 1), int(size) - 1) for size in sizes_C]) * (fraction > 0)
    if groups is not None:
        _, group_N = np.unique(groups, return_inverse=True)
        members = np.split(np.argsort(group_N, kind="stable"), np.cumsum(np.bincount(group_N))[:-1])
    for label in range(len(sizes_C)):
        rows = _generator(seed, label, HOLD_OUT).permutation(np.flatnonzero(labels == label))
        if groups is None:
            held_out[rows[: open_C[label]]] = True
            continue
        for row in rows:
            if not open_C[label]:
                break
            together = members[group_N[row]]
            classes, wanted = np.unique(labels[together], return_counts=True)
            if not held_out[row] and (wanted <= open_C[classes]).all():
                held_out[together] = True
                open_C[classes] -= wanted
    return np.flatnonzero(~held_out).astype(np.int64), np.flatnonzero(held_out).astype(np.int64)


def cut(
    raw: Mapping[str, np.ndarray],
    *,
    profile: str,
    imbalance_factor: float | None = None,
    seed: int,
    held_out: float,
    draw: str = "own",
) -> Arrays:
    """The arrays of data/long_tail/<dataset>.npz from those of data/raw/<source>.npz.

    `held_out` is the fraction of each class's training images that is set aside; where the source says which belong
    together (`train_groups`), they stay so. The `*_rows` are row numbers in the source's train split; the test split is
    passed on as it is.

    Raises ValueError naming the array, class or setting when the source is not what `sources`
    promises, its test split is not balanced (but for the profiles OWN), or a setting is not allowed.
    """
    check_source(raw, balanced=profile not in OWN)
    rows = subsample(
        raw["train_labels"],
        profile=profile,
        imbalance_factor=imbalance_factor,
        seed=seed,
        draw=draw,
        places=raw.get(PLACES),
    )
    groups = raw[GROUPS][rows] if GROUPS in raw else None
    train, held = hold_out(raw["train_labels"][rows], fraction=held_out, seed=seed, groups=groups)
    arrays: Arrays = {}
    for split, split_rows in (("train", rows[train]), ("held_out", rows[held])):
        arrays[f"{split}_images"] = raw["train_images"][split_rows]
        arrays[f"{split}_labels"] = raw["train_labels"][split_rows]
        arrays[f"{split}_rows"] = split_rows
    return arrays | {name: raw[name] for name in ("test_images", "test_labels", "class_names")}


def check_source(raw: Mapping[str, np.ndarray], *, balanced: bool = True) -> None:
    """Raise ValueError naming the array, class or row where `raw` breaks `sources`' promise."""
    names = ("train_images", "train_labels", "test_images", "test_labels", "class_names")
    if missing := [name for name in names if name not in raw]:
        raise ValueError(f"{missing[0]}: not among the arrays; they are {', '.join(sorted(raw))}")
    class_names = raw["class_names"]
    if class_names.ndim != 1 or class_names.dtype.kind != "U" or len(set(class_names)) != len(class_names):
        raise ValueError(f"class_names: {_kind(class_names)}; allowed is text of shape (C,), each name once")
    for split in ("train", "test"):
        images, labels = raw[f"{split}_images"], raw[f"{split}_labels"]
        features = images.dtype == np.float32 and images.shape[1:3] == (1, 1)
        if images.ndim != 4 or not (images.dtype == np.uint8 or features):
            raise ValueError(
                f"{split}_images: {_kind(images)}; allowed is uint8 of shape (N, H, W, channels), "
                "and for features float32 of shape (N, 1, 1, D)"
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{split}_labels: {_kind(labels)}; there are {len(images)} {split}_images")
        _class_sizes(labels, f"{split}_labels", class_names)
    if PLACES in raw:
        _check_places(raw[PLACES], len(raw["train_labels"]))
    if raw["train_images"].shape[1:] != raw["test_images"].shape[1:]:
        raise ValueError(
            f"test_images: {_kind(raw['test_images'])} do not fit train_images: {_kind(raw['train_images'])}"
        )
    sizes = np.bincount(raw["test_labels"])
    usual = np.bincount(sizes).argmax()  # the size that most classes have: the odd one out is to blame
    if balanced and (odd := [label for label, size in enumerate(sizes) if size != usual]):
        raise ValueError(
            f"test_labels: class {odd[0]} ({class_names[odd[0]]}) has {sizes[odd[0]]} images "
            f"where others have {usual}; the test split must be balanced"
        )


def profile_rows(
    train_labels: np.ndarray,
    held_out_labels: np.ndarray,
    test_labels: np.ndarray,
    class_names: Sequence[str] | np.ndarray,
) -> list[dict[str, Any]]:
    """One row a class, {class, name, train, held_out, test}: the images each split has of it."""
    splits = {"train": train_labels, "held_out": held_out_labels, "test": test_labels}
    sizes = {split: np.bincount(labels, minlength=len(class_names)) for split, labels in splits.items()}
    return [
        {"class": label, "name": str(name)} | {split: int(sizes[split][label]) for split in splits}
        for label, name in enumerate(class_names)
    ]


def _class_sizes(labels: np.ndarray, key: str, class_names: np.ndarray | None = None) -> np.ndarray:
    """Images of each class (C,); ValueError unless labels are int64 (N,), all of 0..C-1 there."""
    if labels.ndim != 1 or labels.dtype != np.int64 or not len(labels):
        raise ValueError(f"{key}: {_kind(labels)}; allowed is int64 of shape (N,), N at least 1")
    num_classes = int(labels.max()) + 1 if class_names is None else len(class_names)
    if len(wrong := np.flatnonzero((labels < 0) | (labels >= num_classes))):
        raise ValueError(f"{key}: {labels[wrong[0]]} in row {wrong[0]}; allowed is 0 to {num_classes - 1}")
    sizes = np.bincount(labels, minlength=num_classes)
    if len(empty := np.flatnonzero(sizes == 0)):
        raise ValueError(f"{key}: class {empty[0]} has no image; every class of 0 to {num_classes - 1} needs one")
    return sizes


def _check_places(places: np.ndarray, rows: int) -> None:
    if places.shape != (rows,) or places.dtype != np.int64:
        raise ValueError(f"{PLACES}: {_kind(places)}; allowed is int64 of shape ({rows},), one for each train label")
    if len(np.unique(places)) < rows or places.min() < 0:
        raise ValueError(f"{PLACES}: allowed are numbers of rows, 0 or more, each once")


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed: {seed} is not allowed; allowed is 0 or more")


def _generator(seed: int, *stream: int) -> np.random.Generator:
    _check_seed(seed)
    return np.random.default_rng(np.random.SeedSequence([seed, *stream]))
