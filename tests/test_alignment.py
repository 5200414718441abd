"""Energy aligning: slow twins, and what must hold whatever the logits."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from longtail import alignment

SETTINGS = {"temperature": 1.0, "strength": 1.0}
BOTH = [(reading, weights) for reading in alignment.READINGS for weights in alignment.WEIGHTS]


def case(seed: int = 0, samples: int = 40, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(classes, size=samples - classes)])
    return rng.normal(size=(samples, classes)) * 2, labels


def twin(logits, labels, reading, weights, t):
    """The free energies in loops."""
    samples, classes = logits.shape
    count = {c: sum(1 for y in labels if y == c) for c in range(classes)}
    present = sum(1 for c in count.values() if c)
    energies = []
    for y in range(classes):
        total, weight_sum = 0.0, 0.0
        for x in range(samples):
            if reading == "own_samples" and labels[x] != y:
                continue
            w = 1.0 if weights == "uniform" else 1 / (present * count[labels[x]])
            if reading == "mean_energy":
                total += w * logits[x, y]
            elif reading == "normalized":
                total += w * math.exp(logits[x, y] / t) / sum(math.exp(z / t) for z in logits[x])
            else:
                total += w * math.exp(logits[x, y] / t)
            weight_sum += w
        mean = total / weight_sum
        energies.append(-mean if reading == "mean_energy" else -t * math.log(mean))
    return np.array(energies)


@pytest.mark.parametrize(("reading", "weights"), BOTH)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_free_energy_is_its_twin(reading, weights, temperature):
    logits, labels = case()
    found = alignment.free_energy(logits, labels, reading=reading, weights=weights, temperature=temperature)
    np.testing.assert_allclose(found, twin(logits, labels, reading, weights, temperature), rtol=1e-9)


logit_arrays = hnp.arrays(np.float64, (24, 4), elements=st.floats(-50, 50))


@given(logit_arrays, st.sampled_from(["all_samples", "own_samples", "mean_energy"]))
def test_energies_are_equal_after_aligning(logits, reading):
    labels = np.arange(24) % 4
    after = alignment.fit(logits, labels, reading=reading, weights="balanced", **SETTINGS)["energy_after"]
    np.testing.assert_allclose(after, after[0], atol=1e-8)


@given(logit_arrays, st.floats(-20, 20), st.sampled_from(BOTH))
def test_shift_does_not_depend_on_what_is_added_to_all_logits(logits, offset, both):
    labels = np.arange(24) % 4
    settings = {"reading": both[0], "weights": both[1], **SETTINGS}
    a, b = (alignment.fit(z, labels, **settings)["shift"] for z in (logits, logits + offset))
    np.testing.assert_allclose(a, b, atol=1e-7)
    assert a.sum() == pytest.approx(0, abs=1e-7)


def test_normalized_ignores_what_is_added_to_a_sample_and_all_samples_does_not():
    logits, labels = case()
    moved = logits + np.random.default_rng(1).normal(size=(len(logits), 1))
    shifts = {
        reading: [
            alignment.fit(z, labels, reading=reading, weights="balanced", **SETTINGS)["shift"] for z in (logits, moved)
        ]
        for reading in ("normalized", "all_samples")
    }
    np.testing.assert_allclose(*shifts["normalized"], atol=1e-9)
    assert np.abs(np.subtract(*shifts["all_samples"])).max() > 1e-3


def test_shift_of_a_calibrated_network_is_minus_log_prior():
    """Samples whose class cannot be told: a calibrated network says the prior each time."""
    prior = np.array([0.6, 0.3, 0.1])
    labels = np.repeat(np.arange(3), (600, 300, 100))
    logits = np.tile(np.log(prior), (1000, 1))
    for reading in ("all_samples", "normalized", "mean_energy"):
        found = alignment.fit(logits, labels, reading=reading, weights="uniform", **SETTINGS)["shift"]
        np.testing.assert_allclose(found, -np.log(prior) + np.log(prior).mean(), atol=1e-9)


def test_balanced_network_is_not_shifted_for_the_long_tail_of_the_samples():
    """Perfectly separable classes, one of them rare: balanced weights leave it alone, uniform ones do not."""
    labels = np.repeat([0, 1], (90, 10))
    logits = 8.0 * np.eye(2)[labels]
    shifts = {
        w: alignment.fit(logits, labels, reading="normalized", weights=w, **SETTINGS)["shift"]
        for w in alignment.WEIGHTS
    }
    np.testing.assert_allclose(shifts["balanced"], 0, atol=1e-9)
    assert shifts["uniform"][1] > 1


@pytest.mark.parametrize(("reading", "weights"), BOTH)
def test_relabelling_the_classes_permutes_the_shift(reading, weights):
    logits, labels = case()
    order = np.array([2, 0, 3, 1])
    settings = {"reading": reading, "weights": weights, **SETTINGS}
    a = alignment.fit(logits, labels, **settings)["shift"]
    b = alignment.fit(logits[:, order], order.argsort()[labels], **settings)["shift"]
    np.testing.assert_allclose(b, a[order], atol=1e-9)


def test_strength_scales_the_shift():
    logits, labels = case()
    one, half = (
        alignment.fit(logits, labels, reading="normalized", weights="balanced", temperature=1.0, strength=strength)[
            "shift"
        ]
        for strength in (1.0, 0.5)
    )
    np.testing.assert_allclose(half, one / 2)


def test_large_logits_do_not_overflow():
    logits, labels = case()
    for reading, weights in BOTH:
        found = alignment.fit(1e4 * logits, labels, reading=reading, weights=weights, **SETTINGS)
        assert np.isfinite(found["shift"]).all() or reading == "normalized"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, y: (z[0], y), r"shape \(4,\).*expected \(samples, classes\)"),
        (lambda z, y: (z[:0], y[:0]), "neither of them 0"),
        (lambda z, y: (z, y[:-1]), r"labels have shape \(39,\); expected \(40,\)"),
        (lambda z, y: (np.where(np.arange(4) == 2, np.nan, z), y), "row 0, class 2: nan"),
        (lambda z, y: (z, np.where(np.arange(40) == 7, 4, y)), "label 4 in row 7; allowed are 0 to 3"),
        (lambda z, y: (z, np.where(np.arange(40) == 7, -1, y)), "label -1 in row 7"),
        (lambda z, y: (z, np.zeros_like(y)), "class 1 has none"),
    ],
)
def test_bad_logits_and_labels_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        alignment.fit(*change(*case()), reading="own_samples", weights="uniform", **SETTINGS)


@pytest.mark.parametrize("wrong", [{"reading": "mine"}, {"weights": "mine"}])
def test_unknown_settings_name_what_there_is(wrong):
    settings = {"reading": "normalized", "weights": "balanced", **SETTINGS, **wrong}
    with pytest.raises(ValueError, match=r"'mine'; allowed are .*, "):
        alignment.fit(*case(), **settings)
