"""The long-tailed cut: the field's counts, nested draws, disjoint splits, sources refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtail.data import long_tail

PROFILES = st.sampled_from(["exponential", "step"])
BALANCED = np.repeat(np.arange(5), 60)


def slow_counts(profile: str, n_max: int, num_classes: int, imbalance_factor: float) -> list[int]:
    """The papers' words, class by class."""
    counts = []
    for i in range(num_classes):
        if profile == "exponential":
            share = (1 / imbalance_factor) ** (i / (num_classes - 1))
        else:
            share = 1.0 if i + 1 <= num_classes / 2 else 1 / imbalance_factor
        counts.append(int(n_max * share))
    return counts


def make_raw(**changes: Any) -> dict[str, np.ndarray]:
    """A balanced source: 5 classes x 60 images, each of its own colour; 4 test images a class."""
    numbers = np.arange(300, dtype=np.uint16)
    images = np.zeros((300, 2, 2, 3), np.uint8)
    images[..., 0], images[..., 1] = (numbers % 256)[:, None, None], (numbers // 256)[:, None, None]
    raw: dict[str, np.ndarray] = {
        "train_images": images,
        "train_labels": BALANCED,
        "test_images": images[:20],
        "test_labels": np.repeat(np.arange(5), 4),
        "class_names": np.array(["a", "b", "c", "d", "e"]),
    }
    return raw | changes


# Counts


@pytest.mark.parametrize(
    ("n_max", "num_classes", "imbalance_factor", "total", "smallest"),
    [
        (500, 100, 200, 9_502, 2),
        (500, 100, 100, 10_847, 5),
        (500, 100, 50, 12_608, 10),
        (500, 100, 10, 19_573, 50),
        (500, 100, 1, 50_000, 500),
        (5000, 10, 100, 12_406, 50),
        (5000, 10, 10, 20_431, 500),
    ],
)
def test_exponential_totals_are_those_the_field_reports(
    n_max: int, num_classes: int, imbalance_factor: int, total: int, smallest: int
) -> None:
    counts = long_tail.class_counts("exponential", n_max, num_classes, imbalance_factor)
    assert counts.dtype == np.int64
    assert (counts.sum(), counts.max(), counts.min()) == (total, n_max, smallest)


def test_step_keeps_the_first_half() -> None:
    assert long_tail.class_counts("step", 500, 4, 100).tolist() == [500, 500, 5, 5]
    assert long_tail.class_counts("step", 500, 5, 100).tolist() == [500, 500, 5, 5, 5]


@given(PROFILES, st.integers(1, 6000), st.integers(2, 200), st.floats(1, 1000))
def test_counts_equal_the_slow_ones_and_never_increase(
    profile: str, n_max: int, num_classes: int, imbalance_factor: float
) -> None:
    expected = slow_counts(profile, n_max, num_classes, imbalance_factor)
    if min(expected) < 1:
        with pytest.raises(ValueError, match=r"imbalance_factor: .* without an image"):
            long_tail.class_counts(profile, n_max, num_classes, imbalance_factor)
        return
    counts = long_tail.class_counts(profile, n_max, num_classes, imbalance_factor)
    assert counts.tolist() == expected
    assert counts[0] == n_max and (np.diff(counts) <= 0).all()


@given(PROFILES, st.integers(1, 6000), st.integers(2, 200))
def test_a_factor_of_one_is_balanced(profile: str, n_max: int, num_classes: int) -> None:
    assert set(long_tail.class_counts(profile, n_max, num_classes, 1)) == {n_max}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", 500, 10, 100), "profile: 'linear' is unknown; allowed are exponential, step"),
        (("step", 0, 10, 1), "n_max: 0 .*1 or more"),
        (("step", 500, 1, 100), "num_classes: 1 .*2 or more"),
        (("step", 500, 10, 0.01), "imbalance_factor: 0.01 .*1 or more"),
        (("step", 500, 10, float("nan")), "imbalance_factor: nan"),
        (("step", 500, 10, float("inf")), "imbalance_factor: inf"),
        (("exponential", 50, 10, 100), "100 leaves class 8 without an image.*below n_max, the 50"),
    ],
)
def test_bad_profiles_are_refused(arguments: tuple[str, int, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        long_tail.class_counts(*arguments)


# Subsampling


@given(PROFILES, st.floats(1, 30), st.integers(0, 2**32))
def test_subsample_draws_the_counts_without_repeats(profile: str, imbalance_factor: float, seed: int) -> None:
    labels = np.random.default_rng(0).permutation(BALANCED)  # rows need not be sorted by class
    rows = long_tail.subsample(labels, profile=profile, imbalance_factor=imbalance_factor, seed=seed)
    assert rows.dtype == np.int64 and (np.diff(rows) > 0).all()
    expected = long_tail.class_counts(profile, 60, 5, imbalance_factor)
    assert np.bincount(labels[rows]).tolist() == expected.tolist()


@given(PROFILES, st.floats(1, 30), st.floats(1, 30), st.integers(0, 9))
def test_a_larger_factor_takes_a_subset(profile: str, one: float, other: float, seed: int) -> None:
    small, large = (
        set(long_tail.subsample(BALANCED, profile=profile, imbalance_factor=factor, seed=seed))
        for factor in (min(one, other), max(one, other))
    )
    assert large <= small


def test_seeds_draw_anew_and_the_smallest_class_sets_n_max() -> None:
    labels = np.repeat(np.arange(3), [90, 40, 70])
    draws = [long_tail.subsample(labels, profile="step", imbalance_factor=4, seed=seed) for seed in (0, 0, 1)]
    assert np.bincount(labels[draws[0]]).tolist() == [40, 10, 10]
    assert draws[0].tolist() == draws[1].tolist() != draws[2].tolist()


def test_classes_of_one_size_draw_apart() -> None:
    held = long_tail.hold_out(BALANCED, fraction=0.5, seed=0)[1]
    places = {tuple(row % 60 for row in held if row // 60 == label) for label in range(5)}
    assert len(places) == 5
    halves = long_tail.subsample(BALANCED, profile="step", imbalance_factor=2, seed=0)
    places = {tuple(row % 60 for row in halves if row // 60 == label) for label in (2, 3, 4)}
    assert len(places) == 3


def test_another_class_does_not_change_a_draw() -> None:
    more = np.concatenate([BALANCED, np.full(60, 5)])
    settings = {"profile": "step", "imbalance_factor": 1.0, "seed": 3}
    few = long_tail.subsample(np.append(BALANCED, [0] * 9), **settings)  # type: ignore[arg-type]
    many = long_tail.subsample(np.append(more, [0] * 9), **settings)  # type: ignore[arg-type]
    assert few[(few >= 60) & (few < 300)].tolist() == many[(many >= 60) & (many < 300)].tolist()


def slow_ldam(labels: np.ndarray, places: np.ndarray, counts: list[int]) -> list[int]:
    """The rule of Cao et al.'s code in words: numpy's global generator, in-place shuffles, places of the archive."""
    np.random.seed(0)
    chosen: list[int] = []
    for label, count in enumerate(counts):
        of_class = np.array(sorted(int(place) for place, other in zip(places, labels, strict=True) if other == label))
        np.random.shuffle(of_class)
        chosen += of_class[:count].tolist()
    return chosen


@pytest.mark.parametrize("profile", ["exponential", "step"])
def test_the_field_s_draw_is_that_of_its_code(profile: str) -> None:
    labels, places = np.random.default_rng(0).permutation(BALANCED), np.random.default_rng(1).permutation(300)
    rows = long_tail.drawn(labels, profile=profile, imbalance_factor=7, seed=0, draw="ldam", places=places)
    assert [labels[of_class].tolist() for of_class in rows] == [[label] * len(rows[label]) for label in range(5)]
    assert places[np.concatenate(rows)].tolist() == slow_ldam(labels, places, slow_counts(profile, 60, 5, 7))


def test_the_first_of_the_archive_are_the_lowest_places() -> None:
    labels, places = np.random.default_rng(0).permutation(BALANCED), np.random.default_rng(1).permutation(300)
    for seed in (0, 5):  # of no effect
        rows = long_tail.drawn(labels, profile="step", imbalance_factor=6, seed=seed, draw="first", places=places)
        for label, of_class in enumerate(rows):
            assert places[of_class].tolist() == sorted(places[labels == label])[: len(of_class)]


@pytest.mark.parametrize("draw", ["own", "ldam", "first"])
def test_every_draw_takes_the_counts_and_nests(draw: str) -> None:
    settings: dict[str, Any] = {"draw": draw, "places": np.random.default_rng(1).permutation(300), "seed": 2}
    small, large = (
        long_tail.subsample(BALANCED, profile="exponential", imbalance_factor=factor, **settings) for factor in (10, 3)
    )
    assert np.bincount(BALANCED[small]).tolist() == slow_counts("exponential", 60, 5, 10)
    assert set(small) < set(large) and (np.diff(small) > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draw": "random"}, "draw: 'random' is unknown; allowed are own, ldam, first"),
        (
            {"draw": "ldam"},
            "draw: 'ldam' needs train_places, .* none: .*places.parquet; without them, allowed is own",
        ),
        ({"draw": "first"}, "draw: 'first' needs train_places"),
        (
            {"draw": "ldam", "places": np.arange(299)},
            r"train_places: int64 of shape \(299,\); allowed is .*300",
        ),
        ({"draw": "ldam", "places": np.arange(300.0)}, "train_places: float64"),
        ({"draw": "ldam", "places": np.arange(300) // 2}, "train_places: allowed are numbers of rows, .* each once"),
        ({"draw": "first", "places": np.arange(300) - 1}, "train_places: allowed are numbers of rows, 0 or more"),
    ],
)
def test_bad_draws_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        long_tail.subsample(BALANCED, profile="step", imbalance_factor=2, seed=0, **settings)


def test_cut_hands_the_places_to_the_draw_and_checks_them() -> None:
    places = np.random.default_rng(1).permutation(300)
    settings: dict[str, Any] = {"profile": "step", "imbalance_factor": 6, "seed": 0, "held_out": 0, "draw": "ldam"}
    found = long_tail.cut(make_raw(train_places=places), **settings)
    assert found["train_rows"].tolist() == long_tail.subsample(
        BALANCED, profile="step", imbalance_factor=6, seed=0, draw="ldam", places=places
    ).tolist()  # fmt: skip
    with pytest.raises(ValueError, match="needs train_places"):
        long_tail.cut(make_raw(), **settings)
    with pytest.raises(ValueError, match="train_places: int64 of shape"):
        long_tail.cut(make_raw(train_places=places[1:]), **settings | {"draw": "own"})


# Holding out


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 9),
)
def test_hold_out_is_a_split_class_by_class(sizes: list[int], fraction: float, seed: int) -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    train, held = long_tail.hold_out(labels, fraction=fraction, seed=seed)
    assert train.dtype == held.dtype == np.int64
    assert sorted([*train, *held]) == list(range(len(labels)))  # all rows, none twice
    assert (np.diff(train) > 0).all() and (np.diff(held) > 0).all()
    for label, size in enumerate(sizes):
        count = int((labels[held] == label).sum())
        exact = fraction * size
        if fraction == 0 or size == 1:
            assert count == 0
        else:
            assert 1 <= count < size
            assert abs(count - exact) <= 0.5 + 1e-9 or count in (1, size - 1)  # 0.7 * 25 is no float


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=4, max_size=60),
    st.floats(0, 0.9),
    st.integers(0, 9),
)
def test_what_belongs_together_is_held_out_together(rows: list[tuple[int, int]], fraction: float, seed: int) -> None:
    """Groups may have rows of several classes; no class has more held out than without groups, nor all of it."""
    labels, groups = np.array([*rows, *((c, 100 + c) for c in range(4))]).T
    train, held = long_tail.hold_out(labels, fraction=fraction, seed=seed, groups=groups)
    assert sorted([*train, *held]) == list(range(len(labels)))
    assert not set(groups[train]) & set(groups[held])
    alone = np.bincount(labels[long_tail.hold_out(labels, fraction=fraction, seed=seed)[1]], minlength=4)
    assert (np.bincount(labels[held], minlength=4) <= alone).all()


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=4, max_size=60),
    st.floats(0, 0.9),
    st.integers(0, 9),
)
def test_held_out_groups_are_its_twin(rows: list[tuple[int, int]], fraction: float, seed: int) -> None:
    """Row after row in each class's order: its group goes where the quota of every class in it has room."""
    labels, groups = np.array([*rows, *((c, 100 + c) for c in range(4))]).T
    found = long_tail.hold_out(labels, fraction=fraction, seed=seed, groups=groups)[1].tolist()
    alone = long_tail.hold_out(labels, fraction=fraction, seed=seed)[1]
    room, held = [int((labels[alone] == c).sum()) for c in range(4)], set[int]()
    for label in range(4):
        for row in long_tail._generator(seed, label, long_tail.HOLD_OUT).permutation(np.flatnonzero(labels == label)):
            group = [other for other in range(len(labels)) if groups[other] == groups[row]]
            wanted = [sum(labels[other] == c for other in group) for c in range(4)]
            if row not in held and all(w <= r for w, r in zip(wanted, room, strict=True)):
                held |= {*group}
                room = [r - w for w, r in zip(wanted, room, strict=True)]
    assert found == sorted(held)


def test_where_every_row_is_its_own_group_nothing_changes() -> None:
    plain, own = (long_tail.hold_out(BALANCED, fraction=0.3, seed=1, groups=groups)[1].tolist()
                  for groups in (None, np.arange(len(BALANCED))))  # fmt: skip
    assert plain == own


def test_hold_out_hangs_on_its_seed_and_not_on_the_draw_of_subsample() -> None:
    first, again, other = (long_tail.hold_out(BALANCED, fraction=0.5, seed=seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again != other
    drawn = long_tail.subsample(BALANCED, profile="step", imbalance_factor=2, seed=0)
    tail = [row for row in first if row >= 120]  # classes of which subsample drew half as well
    assert tail != [row for row in drawn.tolist() if row >= 120]


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_fractions_are_below_one(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction: .* allowed is 0 up to"):
        long_tail.hold_out(BALANCED, fraction=fraction, seed=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 2, 2]), "labels: class 1 has no image"),
        (np.array([0, -1, 1]), "labels: -1 in row 1"),
        (np.array([0.0, 1.0]), r"labels: float64 of shape \(2,\); allowed is int64"),
        (np.zeros((2, 2), np.int64), r"labels: int64 of shape \(2, 2\)"),
        (np.zeros(0, np.int64), r"labels: int64 of shape \(0,\)"),
    ],
)
def test_bad_labels_are_refused(labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        long_tail.subsample(labels, profile="step", imbalance_factor=1, seed=0)
    with pytest.raises(ValueError, match=message):
        long_tail.hold_out(labels, fraction=0.5, seed=0)


def test_seeds_are_not_negative() -> None:
    with pytest.raises(ValueError, match=r"seed: -1 .* 0 or more"):
        long_tail.subsample(BALANCED, profile="step", imbalance_factor=1, seed=-1)


# The cut


def test_cut_takes_the_rows_it_names() -> None:
    raw = make_raw()
    arrays = long_tail.cut(raw, profile="exponential", imbalance_factor=10, seed=0, held_out=0.2)
    for split in ("train", "held_out"):
        rows = arrays[f"{split}_rows"]
        assert (arrays[f"{split}_images"] == raw["train_images"][rows]).all()
        assert (arrays[f"{split}_labels"] == raw["train_labels"][rows]).all()
    assert not set(arrays["train_rows"]) & set(arrays["held_out_rows"])
    both = np.concatenate([arrays["train_labels"], arrays["held_out_labels"]])
    assert np.bincount(both).tolist() == slow_counts("exponential", 60, 5, 10)
    assert np.bincount(arrays["held_out_labels"]).tolist() == [12, 7, 4, 2, 1]
    for name in ("test_images", "test_labels", "class_names"):
        assert (arrays[name] == raw[name]).all()


def test_cut_without_a_held_out_set_keeps_its_arrays_empty() -> None:
    arrays = long_tail.cut(make_raw(), profile="step", imbalance_factor=6, seed=0, held_out=0)
    assert arrays["held_out_images"].shape == (0, 2, 2, 3)
    assert arrays["held_out_images"].dtype == np.uint8
    assert arrays["held_out_labels"].shape == arrays["held_out_rows"].shape == (0,)
    assert arrays["held_out_labels"].dtype == arrays["held_out_rows"].dtype == np.int64


RAW = make_raw()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": RAW["train_images"].astype(float)}, "train_images: float64"),
        ({"train_images": RAW["train_images"][..., 0]}, r"train_images: .*\(N, H, W, channels\)"),
        ({"train_images": RAW["train_images"][1:]}, "train_labels: .*there are 299 train_images"),
        ({"test_images": RAW["test_images"][:, :1]}, "test_images: .* do not fit train_images"),
        ({"train_labels": BALANCED.astype(np.int32)}, "train_labels: int32"),
        ({"train_labels": np.where(BALANCED == 2, 5, BALANCED)}, "train_labels: 5 in row 120"),
        ({"train_labels": np.where(BALANCED == 2, 1, BALANCED)}, "train_labels: class 2 has no im"),
        ({"test_labels": np.repeat([0, 1, 2, 3], 5)}, "test_labels: class 4 has no image"),
        ({"test_labels": np.repeat(np.arange(5), [4, 4, 4, 3, 5])}, r"class 3 \(d\) has 3 images"),
        ({"class_names": np.array(["a", "b", "c", "d", "a"])}, "class_names: .* each name once"),
        ({"class_names": np.array(list("abcde"), object)}, "class_names: object"),
        ({"class_names": np.array(list("abcd"))}, "train_labels: 4 in row 240; allowed is 0 to 3"),
    ],
)
def test_bad_sources_are_refused(changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        long_tail.cut(make_raw(**changes), profile="step", imbalance_factor=1, seed=0, held_out=0)


def test_a_missing_array_is_named() -> None:
    raw = make_raw()
    del raw["test_labels"]
    with pytest.raises(ValueError, match="test_labels: not among the arrays; they are class_names"):
        long_tail.cut(raw, profile="step", imbalance_factor=1, seed=0, held_out=0)


def test_profile_rows_count_every_split() -> None:
    rows = long_tail.profile_rows(
        np.array([0, 0, 1]), np.zeros(0, np.int64), np.array([0, 1, 2]), np.array(["a", "b", "c"])
    )
    assert rows == [
        {"class": 0, "name": "a", "train": 2, "held_out": 0, "test": 1},
        {"class": 1, "name": "b", "train": 1, "held_out": 0, "test": 1},
        {"class": 2, "name": "c", "train": 0, "held_out": 0, "test": 1},
    ]
