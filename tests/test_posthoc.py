"""Post-hoc corrections: slow twins, limits in which they are known, and what must hold whatever the logits."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from longtail import posthoc
from longtail.posthoc import (
    Affine,
    BlackBoxShift,
    EnergyAligning,
    ExpectationMaximization,
    KnownPrior,
    LogitAdjustment,
    PredictionRebalancing,
    TemperatureScaling,
    VectorScaling,
)
from longtail.posthoc.inputs import as_numpy

BOTH = [(reading, weights) for reading in posthoc.READINGS for weights in posthoc.WEIGHTS]
LABELS = np.arange(24) % 4  # balanced
logit_arrays = hnp.arrays(np.float64, (24, 4), elements=st.floats(-50, 50))


def case(seed: int = 0, samples: int = 40, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(classes, size=samples - classes)])
    return rng.normal(size=(samples, classes)) * 2, labels


def world(prior, samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a calibrated network under this prior, and labels drawn from it: normal x, one mean a class."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(prior), size=samples, p=prior)
    x = rng.normal(size=(samples, 2)) + 1.5 * means(len(prior))[labels]
    distance = ((x[:, None] - 1.5 * means(len(prior))[None]) ** 2).sum(2)
    return -distance / 2 + np.log(prior), labels


def means(classes: int) -> np.ndarray:
    angle = 2 * np.pi * np.arange(classes) / classes
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def one_of_each(logits, labels) -> list[posthoc.Correction]:
    classes = logits.shape[1]
    made = [
        EnergyAligning(), PredictionRebalancing(), LogitAdjustment(), KnownPrior(np.arange(1, classes + 1)),
        ExpectationMaximization(), BlackBoxShift(logits, labels), TemperatureScaling(), VectorScaling(),
        Affine(2.0, np.arange(classes)),
    ]  # fmt: skip
    return [correction.fit(logits, labels, fitted_on="held-out") for correction in made]


# ------------------------------------------------------------------------------------------- classes that are masked

MASKS = (-np.inf, -1e4, -1e9, float(np.finfo(np.float16).min), float(np.finfo(np.float32).min))
AMONG = np.array([True, True, False, True, True, False])  # of six classes, the third and the last are masked


def estimators(open_C) -> list[posthoc.Correction]:
    """One of each, with settings for each class, of the classes that are open."""
    rng = np.random.default_rng(1)
    source, known = case(3)
    filled = np.full((len(source), len(AMONG)), -1e9)
    filled[:, AMONG] = source
    source_CN, known = np.ascontiguousarray(filled[:, open_C]), np.flatnonzero(AMONG[open_C])[known]
    prior, groups = rng.uniform(1, 2, 6)[open_C], np.array([0, 1, 7, 1, 0, 0])[open_C]
    return [
        *(EnergyAligning(*both) for both in BOTH), EnergyAligning("normalized", groups=groups),
        EnergyAligning(groups=groups),
        EnergyAligning(reference=int(open_C[:4].sum()) - 1, temperature=2.0, strength=0.5),
        PredictionRebalancing(), LogitAdjustment(), LogitAdjustment(2.0, prior), KnownPrior(prior),
        KnownPrior("uniform", prior), ExpectationMaximization(prior), BlackBoxShift(source_CN, known, prior),
        TemperatureScaling(), VectorScaling(), Affine(2.0, prior), Affine(prior, 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mask", MASKS)
def test_a_masked_class_is_as_if_it_were_not_there_and_its_logits_stay(mask, dtype):
    logits, labels = case()
    masked = np.full((len(logits), 6), mask, dtype=dtype)
    masked[:, AMONG] = logits
    known = np.flatnonzero(AMONG)[labels]
    for made, wanted in zip(estimators(np.ones(6, dtype=bool)), estimators(AMONG), strict=True):
        found = made.fit(masked, known).transform(masked)
        expected = wanted.fit(logits.astype(dtype), labels).transform(logits.astype(dtype))
        np.testing.assert_array_equal(found[:, AMONG], expected, err_msg=repr(made))
        np.testing.assert_array_equal(found[:, ~AMONG], np.full((len(logits), 2), mask, dtype=dtype))
        np.testing.assert_array_equal(made.shift_[~AMONG], 0)
        read = posthoc.from_dict(json.loads(json.dumps(made.to_dict())))
        np.testing.assert_array_equal(read.transform(masked), found)
        if isinstance(made, EnergyAligning):
            np.testing.assert_array_equal(made.energy_[AMONG], wanted.energy_)
            assert np.isnan(made.energy_[~AMONG]).all()
            np.testing.assert_array_equal(
                made.energies(masked, known)[AMONG], wanted.energies(logits.astype(dtype), labels)
            )
        if hasattr(made, "prior_"):
            np.testing.assert_array_equal(made.prior_[AMONG], wanted.prior_)
            np.testing.assert_array_equal(made.prior_[~AMONG], 0)


@pytest.mark.parametrize("mask", MASKS)
def test_a_class_that_is_masked_in_some_samples_has_no_part_in_these(mask):
    """As in class-incremental learning with a mask for each task: the others' shifts are those of their softmax."""
    logits, labels = case()
    logits += 2 * np.eye(4)[labels]
    rows = np.flatnonzero(labels != 1)[:20]
    masked, low = logits.copy(), logits.copy()
    masked[rows, 1], low[rows, 1] = mask, -5000.0  # exp of that is 0 as well, and no rule applies
    for made in (EnergyAligning(), EnergyAligning("normalized"), EnergyAligning("own_samples"), LogitAdjustment(),
                 PredictionRebalancing(), ExpectationMaximization(), TemperatureScaling()):  # fmt: skip
        a, b = (clone(made).fit(z, labels) for z in (masked, low))
        np.testing.assert_allclose(a.shift_, b.shift_, rtol=1e-12, atol=1e-12)
        assert (a.transform(masked)[rows, 1] <= 0.9 * np.max(a.scale_) * mask).all()
    vector = VectorScaling().fit(masked, labels)
    assert np.isfinite(vector.scale_).all() and (vector.predict(masked)[rows] != 1).all()
    if mask < -1e8:
        with pytest.raises(ValueError, match=r"mean_energy: class 1 .* is masked in row 0: no mean"):
            EnergyAligning("mean_energy").fit(masked, labels)


def test_large_logits_of_every_class_are_no_mask():
    """Squared distances from class means, say: low everywhere, but none far below the others."""
    logits, labels = case()
    for made in (EnergyAligning(), EnergyAligning("mean_energy"), VectorScaling()):
        a, b = (clone(made).fit(z, labels) for z in (logits, logits - 2e4))
        assert (a.shift_ != 0).all() and (b.shift_ != 0).all()


def test_a_reference_is_a_class_however_its_number_is_written():
    logits, labels = np.random.default_rng(0).normal(size=(30, 5)), np.arange(30) % 5
    whole, real = (EnergyAligning(reference=one).fit(logits, labels).shift_ for one in (2, 2.0))
    np.testing.assert_array_equal(whole, real)
    with pytest.raises(ValueError, match=r"reference = 2\.5; allowed are 'mean' and 0 to 4"):
        EnergyAligning(reference=2.5).fit(logits, labels)


@pytest.mark.parametrize("value", ["false", 0, None])
def test_a_word_is_neither_true_nor_false(value):
    logits, labels = np.random.default_rng(0).normal(size=(30, 5)), np.arange(30) % 5
    with pytest.raises(ValueError, match=r"balanced = .*; allowed are True and False"):
        posthoc.VectorScaling(balanced=value).fit(logits, labels, fitted_on="held-out")
    with pytest.raises(ValueError, match=r"soft = .*; allowed are True and False"):
        posthoc.BlackBoxShift(logits, labels, soft=value).fit(logits, fitted_on="test")


def test_a_masked_reference_is_refused():
    logits, labels = case()
    masked = np.concatenate([logits, np.full((40, 1), -1e9)], axis=1)
    with pytest.raises(ValueError, match="reference = 4: this class is masked"):
        EnergyAligning(reference=4).fit(masked, labels)


# ----------------------------------------------------------------------------------------------- what warns


def test_probabilities_in_place_of_logits_are_warned_of():
    logits, labels = case()
    p = softmax(logits, axis=1)
    for values in (p, p.astype(np.float32), p.astype(np.float16), torch.from_numpy(p).bfloat16()):
        with pytest.warns(UserWarning, match=r"these logits are probabilities .*np\.log\(p\)"):
            LogitAdjustment().fit(values, labels)
    with pytest.warns(UserWarning, match="these logits are probabilities"):
        Affine(1.0, np.arange(4)).fit(logits).transform(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = LogitAdjustment().fit(np.log(p), labels)
        fitted.transform(np.log(p))
    np.testing.assert_allclose(
        fitted.transform(np.log(p)).argmax(1), LogitAdjustment().fit(logits, labels).predict(logits)
    )


def test_a_temperature_at_its_bound_is_warned_of():
    logits, labels = case()
    with pytest.warns(UserWarning, match=r"T = 2.98e\+03 is a bound of the search: the logits say nothing"):
        TemperatureScaling().fit(logits, labels)
    with pytest.warns(UserWarning, match="is a bound of the search: every label has the highest logit"):
        TemperatureScaling().fit(0.01 * np.eye(4)[labels], labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TemperatureScaling().fit(logits + 2 * np.eye(4)[labels], labels)


def test_a_given_prior_needs_no_labels():
    logits, labels = case()
    prior = np.bincount(labels)
    found = LogitAdjustment(prior=prior).fit(logits)
    np.testing.assert_array_equal(found.shift_, LogitAdjustment().fit(logits, labels).shift_)
    with pytest.raises(ValueError, match="requires y to be passed"):
        LogitAdjustment().fit(logits)


# ------------------------------------------------------------------------------------------- energy aligning


def twin(logits, labels, reading, weights, t):
    """The free energies in loops."""
    samples, classes = logits.shape
    count = {c: sum(1 for y in labels if y == c) for c in range(classes)}
    present = sum(1 for c in count.values() if c)
    share = [sum(1 if weights == "uniform" else 1 / count[y] for y in labels if y == c) for c in range(classes)]
    share = [part / sum(share) for part in share]
    energies = []
    for y in range(classes):
        total, weight_sum = 0.0, 0.0
        for x in range(samples):
            if reading == "own_samples" and labels[x] != y:
                continue
            w = 1.0 if weights == "uniform" else 1 / (present * count[labels[x]])
            if reading == "mean_energy":
                total += w * logits[x, y]
            elif reading == "equal_shares":
                v = [share[c] * math.exp(logits[x, c] / t) for c in range(classes)]
                total += w * v[y] / sum(v) / share[y]
            elif reading == "normalized":
                total += w * math.exp(logits[x, y] / t) / sum(math.exp(z / t) for z in logits[x])
            else:
                total += w * math.exp(logits[x, y] / t)
            weight_sum += w
        mean = total / weight_sum
        energies.append(-mean if reading == "mean_energy" else -t * math.log(mean))
    return np.array(energies)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("reading", "weights"), BOTH)
def test_free_energy_is_its_twin_in_slices_of_any_size(monkeypatch, reading, weights, temperature, rows):
    monkeypatch.setattr(posthoc.inputs, "SLICE", 4 * rows)
    logits, labels = case()
    found = posthoc.free_energy(logits, labels, reading=reading, weights=weights, temperature=temperature)
    np.testing.assert_allclose(found, twin(logits, labels, reading, weights, temperature), rtol=1e-9)


@given(logit_arrays, st.sampled_from(["all_samples", "own_samples", "mean_energy"]), st.floats(0.2, 5))
def test_energies_are_equal_after_aligning(logits, reading, temperature):
    fitted = EnergyAligning(reading, temperature=temperature).fit(logits, LABELS)
    after = fitted.energies(fitted.transform(logits), LABELS)
    np.testing.assert_allclose(after, after[0], atol=1e-7)


@given(logit_arrays, st.floats(-20, 20), st.sampled_from(BOTH))
def test_shift_does_not_depend_on_what_is_added_to_all_logits(logits, offset, both):
    a, b = (EnergyAligning(*both).fit(z, LABELS).shift_ for z in (logits, logits + offset))
    np.testing.assert_allclose(a, b, atol=1e-7)
    assert a.sum() == pytest.approx(0, abs=1e-7)


@given(logit_arrays, hnp.arrays(np.float64, (24, 1), elements=st.floats(-50, 50)), st.sampled_from(posthoc.WEIGHTS))
def test_normalized_ignores_what_is_added_to_a_sample(logits, offsets, weights):
    a, b = (EnergyAligning("normalized", weights).fit(z, LABELS).shift_ for z in (logits, logits + offsets))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_all_samples_does_not_ignore_what_is_added_to_a_sample():
    logits, labels = case()
    moved = logits + np.random.default_rng(1).normal(size=(len(logits), 1))
    a, b = (EnergyAligning("all_samples").fit(z, labels).shift_ for z in (logits, moved))
    assert np.abs(a - b).max() > 1e-3


@given(logit_arrays, st.sampled_from(BOTH), st.integers(0, 3))
def test_predictions_do_not_depend_on_the_reference(logits, both, reference):
    fitted, other = (EnergyAligning(*both, reference=r).fit(logits, LABELS) for r in ("mean", reference))
    assert other.shift_[reference] == 0
    np.testing.assert_allclose(fitted.shift_ - fitted.shift_[reference], other.shift_, atol=1e-9)
    np.testing.assert_allclose(fitted.predict_proba(logits), other.predict_proba(logits), atol=1e-9)


def test_shift_of_a_calibrated_network_is_minus_log_prior():
    """Samples whose class cannot be told: a calibrated network says the prior each time."""
    prior = np.array([0.6, 0.3, 0.1])
    labels = np.repeat(np.arange(3), (600, 300, 100))
    logits = np.tile(np.log(prior), (1000, 1))
    for reading in ("all_samples", "normalized", "mean_energy"):
        found = EnergyAligning(reading, "uniform").fit(logits, labels).shift_
        np.testing.assert_allclose(found, -np.log(prior) + np.log(prior).mean(), atol=1e-9)


def test_shift_of_a_calibrated_network_is_minus_log_prior_where_classes_can_be_told():
    """Of 200,000 samples, normalized with uniform weights alone: the others see the logits' scale as well."""
    prior = np.array([0.6, 0.3, 0.1])
    found = EnergyAligning("normalized", "uniform").fit(*world(prior, 200_000)).shift_
    np.testing.assert_allclose(found, -np.log(prior) + np.log(prior).mean(), atol=0.02)


@pytest.mark.parametrize(("reading", "weights"), BOTH)
def test_balanced_data_are_not_shifted(reading, weights):
    """Each sample, its logits turned round by one class after the other: no class is preferred."""
    logits, _ = case(samples=10)
    turned = np.concatenate([np.roll(logits, turn, axis=1) for turn in range(4)])
    labels = np.concatenate([(np.arange(10) + turn) % 4 for turn in range(4)])
    np.testing.assert_allclose(EnergyAligning(reading, weights).fit(turned, labels).shift_, 0, atol=1e-9)


def test_balanced_network_is_not_shifted_for_the_long_tail_of_the_samples():
    """Perfectly separable classes, one of them rare: balanced weights leave it alone, uniform ones do not."""
    labels = np.repeat([0, 1], (90, 10))
    logits = 8.0 * np.eye(2)[labels]
    balanced, uniform = (EnergyAligning("normalized", w).fit(logits, labels).shift_ for w in posthoc.WEIGHTS)
    np.testing.assert_allclose(balanced, 0, atol=1e-9)
    assert uniform[1] > 1


def test_groups_share_a_shift_and_groups_of_one_class_are_none():
    logits, labels = case()
    alone = EnergyAligning("all_samples").fit(logits, labels)
    same = EnergyAligning("all_samples", groups=[4, 7, 5, 6]).fit(logits, labels)
    np.testing.assert_allclose(same.shift_, alone.shift_, atol=1e-12)
    old_new = EnergyAligning("all_samples", groups=[0, 0, 0, 1], reference=0).fit(logits, labels)
    weights = posthoc.sample_weights(labels, "uniform")
    old = -np.log((weights[:, None] * np.exp(logits[:, :3])).sum() / 3)
    new = -np.log((weights * np.exp(logits[:, 3])).sum())
    np.testing.assert_allclose(old_new.shift_, [0, 0, 0, new - old], atol=1e-12)


def test_strength_scales_the_shift():
    logits, labels = case()
    one, half = (EnergyAligning(strength=strength).fit(logits, labels).shift_ for strength in (1.0, 0.5))
    np.testing.assert_allclose(half, one / 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_large_and_small_logits(scale, dtype):
    """What underflows in a sum of exponentials is found in logarithms."""
    logits, labels = case()
    for reading, weights in BOTH:
        found = EnergyAligning(reading, weights).fit((scale * logits).astype(dtype), labels).shift_
        if reading == "normalized":
            rows = log_softmax(scale * logits, axis=1)
            energy = -logsumexp(rows, axis=0, b=posthoc.sample_weights(labels, weights)[:, None])
            np.testing.assert_allclose(found, energy - energy.mean(), rtol=1e-4, atol=1e-6)
        assert np.isfinite(found).all()


# ----------------------------------------------------------------------------------------- until all shares are equal


def equal_twin(logits, labels, weights, t, rounds=20_000):
    """One step after the other in loops over classes: s <- s - T log(expected share / share)."""
    samples, classes = logits.shape
    share = [sum(weights[x] for x in range(samples) if labels[x] == y) for y in range(classes)]
    shift = [-t * math.log(share[y]) for y in range(classes)]
    for _ in range(rounds):
        v = [[(z + s) / t + math.log(p) for z, s, p in zip(row, shift, share, strict=True)] for row in logits]
        tops = [max(row) for row in v]
        sums = [sum(math.exp(one - top) for one in row) for row, top in zip(v, tops, strict=True)]
        for y in range(classes):
            expected = sum(weights[x] * math.exp(v[x][y] - tops[x]) / sums[x] for x in range(samples))
            shift[y] -= t * math.log(expected / share[y])
    return np.array(shift) - np.mean(shift)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("weights", posthoc.WEIGHTS)
def test_equal_energies_are_those_of_its_twin_in_slices_of_any_size(monkeypatch, weights, temperature, rows):
    monkeypatch.setattr(posthoc.inputs, "SLICE", 3 * rows)
    logits, labels = case(samples=12, classes=3)
    found = EnergyAligning(weights=weights, temperature=temperature).fit(logits, labels).shift_
    each = posthoc.sample_weights(labels, weights)
    np.testing.assert_allclose(found, equal_twin(logits, labels, each, temperature, 2000), atol=1e-5)


@given(logit_arrays, st.sampled_from(posthoc.WEIGHTS), st.floats(0.5, 3), st.integers(0, 3))
def test_every_class_is_expected_as_often_as_it_is_there(logits, weights, t, most):
    labels = np.concatenate([np.full(12, most), np.arange(12) % 4])  # a long tail of a kind
    logits = logits + 3.0 * np.random.default_rng(0).normal(size=logits.shape)  # no two alike
    shift = EnergyAligning(weights=weights, temperature=t).fit(logits, labels).shift_
    each = posthoc.sample_weights(labels, weights)
    shares = np.bincount(labels, each, 4)
    expected = each @ softmax((logits + shift) / t + np.log(shares), axis=1)
    np.testing.assert_allclose(expected, shares, rtol=1e-3)


@pytest.mark.parametrize("margin", [5.0, 50.0, 500.0])
def test_what_is_known_by_heart_still_has_a_shift(margin):
    """Each label's logit the same margin above the others: s = -log(share) / 2 for large margins, far below what a
    float can tell from certainty; one step sees nothing but the shares of the labels."""
    prior = np.array([0.7, 0.2, 0.1])
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    by_heart = margin * np.eye(3)[labels]
    found = EnergyAligning().fit(by_heart, labels).shift_
    half = -np.log(prior) / 2
    np.testing.assert_allclose(found, half - half.mean(), atol=0.01 if margin < 10 else 1e-6)
    step = EnergyAligning("normalized").fit(by_heart, labels).shift_
    np.testing.assert_allclose(step, 2 * (half - half.mean()), atol=0.05 if margin < 10 else 1e-6)
    balanced = EnergyAligning(weights="balanced").fit(by_heart, labels).shift_
    np.testing.assert_allclose(balanced, 0, atol=1e-6)


def trained(features, labels, adjustment, classes):
    """Weights and biases of a linear classifier at the end of its training on softmax(z + adjustment)."""
    rows = np.arange(len(labels))

    def loss(flat):
        weight, bias = flat[:-classes].reshape(-1, classes), flat[-classes:]
        v = features @ weight + bias + adjustment
        error = softmax(v, axis=1)
        error[rows, labels] -= 1
        decay = 1e-3 * float((weight**2).sum()) / 2  # of the weights alone
        value = float((logsumexp(v, axis=1) - v[rows, labels]).mean()) + decay
        gradient = features.T @ error / len(labels) + 1e-3 * weight
        return value, np.concatenate([gradient.ravel(), error.mean(0)])

    start = np.zeros((features.shape[1] + 1) * classes)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 0, "gtol": 1e-10}).x
    return found[:-classes].reshape(-1, classes), found[-classes:]


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0])
def test_training_logits_known_by_heart_tell_what_the_loss_did_about_the_prior(tau):
    """100 dimensions for 80 samples: all are known. Trained with tau * log prior added, as balanced softmax (1) and
    the third expert of BalPoE (2) are, what is left to do is (tau - 1) * log prior: the whole of logit adjustment for
    plain cross-entropy, nothing for balanced softmax, and back for the inverse. No count and no tau was told."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 3], [50, 20, 7, 3])
    log_prior = np.log(np.bincount(labels) / len(labels))
    features = rng.normal(size=(len(labels), 100)) + rng.normal(size=(4, 100))[labels] * 0.3
    weight, bias = trained(features, labels, tau * log_prior, 4)
    logits = features @ weight + bias
    assert ((logits + tau * log_prior).argmax(1) == labels).all()
    wanted = (tau - 1) * log_prior
    found = EnergyAligning().fit(logits, labels).shift_
    np.testing.assert_allclose(found, wanted - wanted.mean(), atol=1e-4)


def test_the_shift_of_a_calibrated_network_is_minus_log_prior_whatever_prior_it_is_calibrated_for():
    """200,000 fresh samples of a long tail, logits for another prior: minus the logarithm of that other one."""
    prior, other = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5])
    logits, labels = world(prior, 200_000)
    found = EnergyAligning().fit(logits + np.log(other / prior), labels).shift_
    np.testing.assert_allclose(found, -np.log(other) + np.log(other).mean(), atol=0.03)


@pytest.mark.parametrize("groups", [[0, 1, 2, 3], [0, 1, 0, 2]])
def test_equal_energies_end_when_they_are_near_enough(monkeypatch, groups):
    logits, labels = case()
    weights, groups = np.full(len(labels), 1 / len(labels)), np.array(groups)
    shares = np.bincount(labels) / len(labels)
    passes, slices = [], posthoc.energy.slices
    monkeypatch.setattr(posthoc.energy, "slices", lambda logits: passes.append(1) or slices(logits))
    took = {}
    for within in (0.0, 1e-3, 1e-1):
        passes.clear()
        shift = posthoc.energy.equal_energies(logits, labels, weights, 1.0, groups, within)
        took[within] = len(passes)
        expected = softmax(logits + shift + np.log(shares), axis=1).mean(0)
        steps = np.log(np.bincount(groups, expected) / np.bincount(groups, shares))
        assert np.ptp(steps) < (within or 1e-6)
    assert took[0.0] > took[1e-3] > took[1e-1] > 1


def test_equal_energies_in_groups():
    logits, labels = case()
    apart = EnergyAligning().fit(logits, labels).shift_
    np.testing.assert_allclose(EnergyAligning(groups=[4, 7, 5, 6]).fit(logits, labels).shift_, apart, atol=1e-6)
    shift = EnergyAligning(groups=[0, 0, 0, 1]).fit(logits, labels).shift_
    assert np.ptp(shift[:3]) == 0 and abs(shift[3] - shift[0]) > 1e-3
    shares = np.bincount(labels) / len(labels)
    expected = softmax(logits + shift + np.log(shares), axis=1).mean(0)
    np.testing.assert_allclose(expected[3], shares[3], rtol=1e-6)


def test_a_class_without_a_sample_counts_as_half_of_one():
    logits, labels = case(samples=60)
    some = labels != 2
    shift = EnergyAligning().fit(logits[some], labels[some]).shift_
    shares = np.maximum(np.bincount(labels[some], minlength=4), 0.5) / some.sum()
    shares /= shares.sum()
    expected = softmax(logits[some] + shift + np.log(shares), axis=1).mean(0)
    np.testing.assert_allclose(expected, shares, rtol=1e-5)


# ------------------------------------------------------------------------------------------- its relatives


@given(logit_arrays, st.floats(0, 3))
def test_rebalancing_is_the_published_score(logits, tau):
    p = softmax(logits, axis=1)
    score = p / np.abs(p).sum(0) ** tau
    found = PredictionRebalancing(tau).fit(logits).predict_proba(logits)
    np.testing.assert_allclose(found, score / score.sum(1, keepdims=True), rtol=1e-6, atol=1e-9)


def test_rebalancing_is_energy_aligning_on_the_same_samples():
    """The first step of the normalised reading with uniform weights, up to the reference."""
    logits, labels = case()
    a, b = PredictionRebalancing().fit(logits), EnergyAligning("normalized").fit(logits, labels)
    np.testing.assert_allclose(a.predict_proba(logits), b.predict_proba(logits), atol=1e-12)


def test_logit_adjustment_takes_the_prior_away():
    logits, labels = case()
    counts = np.bincount(labels)
    fitted = LogitAdjustment(tau=1.5).fit(logits, labels)
    np.testing.assert_allclose(fitted.transform(logits), logits - 1.5 * np.log(counts / counts.sum()))
    given_ = LogitAdjustment(tau=1.5, prior=counts).fit(logits, LABELS.repeat(2)[:40])
    np.testing.assert_allclose(given_.shift_, fitted.shift_)
    np.testing.assert_array_equal(LogitAdjustment(tau=0).fit(logits, labels).transform(logits), logits)


def test_a_known_prior_makes_the_network_calibrated_there():
    """Bayes' rule: logits of one prior, corrected for another, are those of that prior."""
    here, there = np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.2, 0.7])
    logits, _ = world(here, 50)
    fitted = KnownPrior(there, model_prior=here).fit(logits)
    wanted = softmax(logits - np.log(here) + np.log(there), axis=1)
    np.testing.assert_allclose(fitted.predict_proba(logits), wanted, atol=1e-12)
    assert fitted.flags == ["needs test prior"]


@pytest.mark.parametrize("estimator", ["em", "bbse", "bbse hard"])
def test_an_unknown_prior_is_found(estimator):
    here, there = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.3, 0.6])
    source, labels = world(here, 20_000)
    target, _ = world(there, 20_000, seed=1)
    target = target - np.log(there) + np.log(here)  # what the network of here says there
    found = {
        "em": ExpectationMaximization(here),
        "bbse": BlackBoxShift(source, labels, here),
        "bbse hard": BlackBoxShift(source, labels, here, soft=False),
    }[estimator].fit(target, fitted_on="test")
    np.testing.assert_allclose(found.prior_, there, atol=0.03)
    np.testing.assert_allclose(softmax(found.shift_), softmax(np.log(found.prior_ / here)), atol=1e-12)
    assert found.flags == ["transductive"]


def test_em_stays_where_nothing_has_changed():
    here = np.array([0.5, 0.3, 0.2])
    logits, _ = world(here, 50_000)
    found = ExpectationMaximization(here).fit(logits)
    np.testing.assert_allclose(found.prior_, here, atol=0.01)


def test_em_climbs_the_likelihood():
    logits, _ = case(3)
    log_p = log_softmax(logits, axis=1)
    found = [
        logsumexp(log_p + np.log(ExpectationMaximization(max_iter=n).fit(logits).prior_) + np.log(4), axis=1).sum()
        for n in (1, 2, 5, 50)
    ]
    assert found == sorted(found)


def test_temperature_is_that_of_a_scaled_calibrated_network():
    logits, labels = world(np.array([0.5, 0.3, 0.2]), 50_000)
    assert TemperatureScaling().fit(3 * logits, labels).temperature_ == pytest.approx(3, rel=0.03)


def test_temperature_keeps_predictions_and_lowers_the_loss():
    logits, labels = world(np.array([0.5, 0.3, 0.2]), 200)
    fitted = TemperatureScaling().fit(logits, labels)
    corrected = fitted.transform(logits)
    np.testing.assert_array_equal(corrected.argmax(1), logits.argmax(1))
    rows = np.arange(len(labels))
    losses = {
        t: -log_softmax(logits / t, axis=1)[rows, labels].mean()
        for t in (0.5, 0.9, 1, 1.1, 2, fitted.temperature_, 1.01 * fitted.temperature_, 0.99 * fitted.temperature_)
    }
    assert min(losses, key=losses.__getitem__) == fitted.temperature_


def test_vector_scaling_finds_scale_and_shift_and_stays_where_it_is_told_to():
    logits, labels = world(np.array([0.5, 0.3, 0.2]), 50_000)
    moved = logits / np.array([1.0, 2.0, 4.0]) + np.array([1.0, 0.0, -1.0])
    fitted = VectorScaling(l2=0, balanced=False).fit(moved, labels)
    p, q = (softmax(z, axis=1) for z in (fitted.transform(moved), logits))
    assert np.abs(p - q).mean() < 0.01
    held = VectorScaling(l2=1e6).fit(moved, labels)
    np.testing.assert_allclose(held.transform(moved), moved, atol=1e-3)


def test_vector_scaling_ends_where_the_gradient_is_zero():
    logits, labels = case()
    fitted = VectorScaling(l2=0.1).fit(logits, labels)
    weights = posthoc.sample_weights(labels, "balanced")

    def loss(scale, shift):
        own = log_softmax(scale * logits + shift, axis=1)[np.arange(len(labels)), labels]
        return -weights @ own + 0.1 * (((scale - 1) ** 2).sum() + (shift**2).sum()) / 4

    best = loss(fitted.scale_, fitted.shift_)
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert best <= loss(fitted.scale_ + 0.05 * rng.normal(size=4), fitted.shift_ + 0.05 * rng.normal(size=4))


# ------------------------------------------------------------------------------------------- all of them


@given(logit_arrays, st.permutations(range(4)))
@settings(deadline=None, max_examples=25)
def test_relabelling_the_classes_permutes_the_correction(logits, order):
    order = np.array(order)
    labels = order.argsort()[LABELS]
    for made in (
        *(EnergyAligning(*both) for both in BOTH), PredictionRebalancing(), LogitAdjustment(),
        ExpectationMaximization(max_iter=20), TemperatureScaling(),
    ):  # fmt: skip
        a, b = clone(made).fit(logits, LABELS), clone(made).fit(logits[:, order], labels)
        np.testing.assert_allclose(b.shift_, a.shift_[order], atol=1e-5)
        np.testing.assert_allclose(b.scale_, a.scale_, rtol=1e-4)


@given(hnp.arrays(np.float32, (24, 4), elements=st.floats(-30, 30, width=32)))
@settings(deadline=None, max_examples=50)
def test_float32_agrees_with_float64(logits):
    for made in (*(EnergyAligning(*both) for both in BOTH), PredictionRebalancing(), LogitAdjustment()):
        a, b = (clone(made).fit(logits.astype(kind), LABELS).shift_ for kind in (np.float32, np.float64))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_what_goes_in_comes_out():
    logits, labels = case()
    for correction in one_of_each(logits, labels):
        for dtype in (np.float32, np.float64):
            array = logits.astype(dtype)
            found = correction.transform(array)
            assert type(found) is np.ndarray and found.dtype == dtype
            tensor = correction.transform(torch.from_numpy(array))
            assert isinstance(tensor, torch.Tensor)
            np.testing.assert_array_equal(tensor.numpy(), found)
            np.testing.assert_array_equal(correction.predict(torch.from_numpy(array)).numpy(), found.argmax(1))
            np.testing.assert_allclose(correction.predict_proba(array).sum(1), 1, rtol=1e-5)
        for half in (torch.from_numpy(logits).bfloat16(), torch.from_numpy(logits).half()):
            corrected = correction.transform(half)
            assert corrected.dtype == half.dtype
            torch.testing.assert_close(corrected, correction.transform(half.float()).to(half.dtype), rtol=0, atol=0)
            assert correction.predict(half).dtype == torch.int64 and correction.predict_proba(half).dtype == half.dtype
        assert correction.transform(logits.astype(np.float16)).dtype == np.float16
        assert correction.predict_proba(logits.astype(np.float16)).dtype == np.float16
    fitted = clone(EnergyAligning()).fit(torch.from_numpy(logits), torch.from_numpy(labels))
    np.testing.assert_array_equal(fitted.shift_, EnergyAligning().fit(logits, labels).shift_)


def test_in_place():
    logits, labels = case()
    for correction in one_of_each(logits, labels):
        wanted, array, tensor = correction.transform(logits), logits.copy(), torch.from_numpy(logits.copy())
        assert correction.transform(array, out=array) is array
        assert correction.transform(tensor, out=tensor) is tensor
        np.testing.assert_array_equal(array, wanted)
        np.testing.assert_array_equal(tensor.numpy(), wanted)
        for half in (torch.from_numpy(logits).bfloat16(), torch.from_numpy(logits).half(), logits.astype(np.float16)):
            expected = correction.transform(half)
            assert correction.transform(half, out=half) is half
            np.testing.assert_array_equal(as_numpy(half), as_numpy(expected))
    for values, out, message in (
        (logits, logits.astype(np.float32), r"out is float32 \(40, 4\); expected float64 \(40, 4\)"),
        (
            logits,
            torch.zeros(40, 4, dtype=torch.double),
            r"out is tensor float64 \(40, 4\); expected float64 \(40, 4\)",
        ),
        (logits, [[0.0] * 4] * 40, r"out is a list; expected float64 \(40, 4\)"),
        (torch.zeros(40, 4), torch.zeros(40, 4).half(), r"out is tensor float16 \(40, 4\); expected tensor float32"),
        (logits, np.zeros((40, 3)), r"out is float64 \(40, 3\); expected float64 \(40, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            correction.transform(values, out=out)


def test_composed_is_one_after_the_other_and_so_is_a_pipeline():
    logits, labels = case()
    steps = [EnergyAligning(), VectorScaling(), TemperatureScaling()]
    pipeline = make_pipeline(*steps).fit(logits, labels)
    fitted = [step for _, step in pipeline.steps]
    by_hand = logits
    for step in fitted:
        by_hand = step.transform(by_hand)
    np.testing.assert_allclose(pipeline.transform(logits), by_hand, atol=1e-12)
    np.testing.assert_allclose(posthoc.compose(*fitted).transform(logits), by_hand, atol=1e-12)
    np.testing.assert_array_equal(pipeline.predict(logits), by_hand.argmax(1))
    on_test = clone(PredictionRebalancing()).fit(logits, fitted_on="test")
    aligned, told = EnergyAligning().fit(logits, labels, fitted_on="train"), KnownPrior().fit(logits)
    assert posthoc.compose(aligned, on_test).flags == ["transductive"]
    assert posthoc.compose(aligned, told, on_test).flags == ["transductive", "needs test prior"]


@pytest.mark.parametrize("bias", [True, False])
def test_folding_into_the_final_layer_and_back(bias):
    logits, labels = case()
    layer = torch.nn.Linear(7, 4, bias=bias)
    features = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    for correction in one_of_each(logits, labels):
        weight, shifted = posthoc.fold(layer.weight, layer.bias, correction)
        corrected = correction.transform(layer(features))
        torch.testing.assert_close(features @ weight.T + shifted, corrected, rtol=1e-5, atol=1e-5)
        weight, before = posthoc.unfold(weight, shifted, correction)
        torch.testing.assert_close(weight, layer.weight.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(before, layer.bias.detach() if bias else torch.zeros(4), rtol=1e-5, atol=1e-5)


def test_written_and_read_again():
    logits, labels = case()
    for correction in one_of_each(logits, labels):
        read = posthoc.from_dict(json.loads(json.dumps(correction.to_dict())))
        np.testing.assert_array_equal(read.transform(logits), correction.transform(logits))
        assert (read.fitted_on_, read.flags) == ("held-out", correction.flags)


# What scikit-learn's checks do and no logits do: labels that have no column among the logits, or are no numbers.
BEYOND = "labels that are not among the columns"
NEED_LABELS = (EnergyAligning, TemperatureScaling, VectorScaling)


def refused(estimator) -> dict[str, str]:
    checks = {"check_fit_score_takes_y": "the second argument is called labels"}
    if isinstance(estimator, NEED_LABELS):
        names = ("overwrite_params", "fit_returns_self")
        checks |= {f"check_estimators_{name}": BEYOND for name in names}
        checks |= {"check_readonly_memmap_input": BEYOND, "check_dtype_object": BEYOND}
    return checks


@parametrize_with_checks(
    [EnergyAligning(), PredictionRebalancing(), TemperatureScaling(), VectorScaling(), ExpectationMaximization(),
     Affine(), KnownPrior()],
    expected_failed_checks=refused,
)  # fmt: skip
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, y: (z[0], y), r"Expected 2D array"),
        (lambda z, y: (z, y[:-1]), r"labels have shape \(39,\); expected \(40,\)"),
        (
            lambda z, y: (np.where(np.arange(4) == 2, np.nan, z), y),
            "40 logit.*NaN or inf, first at row 0, class 2: nan",
        ),
        (lambda z, y: (np.where(np.arange(4) == 3, np.inf, z), y), "first at row 0, class 3: inf"),
        (
            lambda z, y: (np.where(np.arange(40)[:, None] == 7, -np.inf, z), y),
            "no class that is not masked, first row 7",
        ),
        (
            lambda z, y: (np.where(np.arange(4) == 3, -np.inf, z), y),
            r"label 3 in row 3 is a class that is masked there",
        ),
        (lambda z, y: (np.where(np.arange(4) == 3, -1e9, z), y), r"label 3 in row 3 .* its logit is -1000000000.0"),
        (lambda z, y: (z, y + 1), r"label 4 in row 3; allowed are 0 to 3"),
        (lambda z, y: (z, y - 1), r"label -1 in row 0; allowed are 0 to 3"),
        (lambda z, y: (z, y + 0.5), "labels are float64, not all whole numbers; allowed are 0 to 3"),
        (lambda z, y: (z, None), r"EnergyAligning requires y to be passed"),
    ],
)
def test_bad_logits_and_labels_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        EnergyAligning().fit(*change(*case()))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (EnergyAligning("magic"), "reading 'magic'; allowed are all_samples, own_samples"),
        (EnergyAligning(weights="magic"), "weights 'magic'; allowed are balanced, uniform"),
        (EnergyAligning(temperature=0), "temperature = 0; allowed are numbers above 0"),
        (EnergyAligning(temperature=math.inf), "temperature = inf; allowed are numbers above 0"),
        (EnergyAligning(strength=math.nan), "strength = nan; allowed are finite numbers"),
        (LogitAdjustment(tau="abc"), "tau = 'abc'; allowed are finite numbers"),
        (PredictionRebalancing(tau=None), "tau = None; allowed are finite numbers"),
        (VectorScaling(l2=-1), "l2 = -1; allowed are numbers from 0 on"),
        (ExpectationMaximization(max_iter=0), "max_iter = 0; allowed are numbers from 1 on"),
        (EnergyAligning(reference=1.5), "reference = 1.5; allowed are 'mean' and 0 to 3"),
        (KnownPrior(test_prior=[1, 2, 3, "many"]), "test_prior = .*; allowed are numbers"),
        (KnownPrior(test_prior=[[1], [2, 3]]), "test_prior = .*; allowed are numbers"),
        (Affine(shift="abc"), "shift = 'abc'; allowed are numbers"),
        (Affine(scale=math.nan), "scale = nan; expected one finite number or 4 of them"),
        (EnergyAligning(reference="median"), "reference = 'median'; allowed are 'mean' and a class"),
        (EnergyAligning(reference=4), "reference = 4; allowed are 'mean' and 0 to 3"),
        (EnergyAligning(groups=[0, 1]), "expected 4 whole numbers"),
        (LogitAdjustment(prior=[1, 2, 3, 0]), "prior of class 3 is 0.0; allowed are positive numbers"),
        (KnownPrior([1, 2]), r"test_prior has shape \(2,\); expected \(4,\)"),
        (KnownPrior(model_prior="long tail"), "model_prior = 'long tail'; allowed are 'uniform' and 4 positive"),
        (BlackBoxShift(), "BlackBoxShift needs source_logits and source_labels"),
        (BlackBoxShift(np.zeros((3, 3)), np.arange(3)), "source_logits have 3 classes, the logits to correct 4"),
        (Affine(shift=[1, 2]), "expected one finite number or 4 of them"),
    ],
)
def test_bad_settings_are_named(made, message):
    with pytest.raises(ValueError, match=message):
        made.fit(*case())


def test_missing_classes_are_named():
    logits, labels = case()
    only_zero = np.zeros_like(labels)
    for made in (EnergyAligning("own_samples"), LogitAdjustment(), BlackBoxShift(logits, only_zero)):
        with pytest.raises(ValueError, match=r"needs a sample of every class; 3 have none, first class 1"):
            made.fit(logits, only_zero)


def test_what_does_not_fit_is_named():
    logits, labels = case()
    fitted = EnergyAligning().fit(logits, labels)
    with pytest.raises(ValueError, match="X has 3 features, but EnergyAligning is expecting 4"):
        fitted.transform(logits[:, :3])
    with pytest.raises(ValueError, match="are of another layer: the correction has 4 classes"):
        posthoc.fold(np.zeros((3, 7)), None, fitted)
    with pytest.raises(ValueError, match="fitted_on = 'validation'; allowed are train, held-out, test"):
        EnergyAligning().fit(logits, labels, fitted_on="validation")
    with pytest.raises(ValueError, match="nothing to compose"):
        posthoc.compose()
