"""Measures against torchmetrics, scikit-learn and examples worked by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    log_loss,
    top_k_accuracy_score,
)
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from longtail.evaluation import metrics

SETTINGS = {"ece_bins": 15, "many_above": 100, "few_below": 20}


def case(seed: int = 0, per_class: int = 30, classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    return rng.normal(size=(len(labels), classes)) + 1.5 * np.eye(classes)[labels], labels


@pytest.mark.parametrize("seed", range(3))
def test_against_libraries(seed):
    logits, labels = case(seed)
    found = metrics.summarize(logits, labels, np.array([500, 101, 100, 20, 19, 5]), **SETTINGS)
    predictions = logits.argmax(1)
    assert found["accuracy"] == pytest.approx((predictions == labels).mean())
    assert found["balanced_error"] == pytest.approx(1 - balanced_accuracy_score(labels, predictions))
    probabilities = torch.tensor(logits).softmax(1)
    assert found["nll"] == pytest.approx(log_loss(labels, probabilities.numpy()))
    expected = multiclass_calibration_error(probabilities, torch.tensor(labels), num_classes=6, n_bins=15)
    assert found["ece"] == pytest.approx(expected.item(), abs=1e-6)
    largest = multiclass_calibration_error(probabilities, torch.tensor(labels), num_classes=6, n_bins=15, norm="max")
    assert found["mce"] == pytest.approx(largest.item(), abs=1e-6)
    by_class = [binary_calibration_error(probabilities[:, c], torch.tensor(labels == c), n_bins=15) for c in range(6)]
    assert found["classwise_ece"] == pytest.approx(np.mean(by_class), abs=1e-6)
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert found["brier"] == pytest.approx(brier_score_loss(labels, probabilities.numpy()))
    recalls = [(predictions[labels == c] == c).mean() for c in range(6)]
    assert found["worst_class"] == pytest.approx(min(recalls))
    assert found["geometric_mean"] == pytest.approx(np.prod(recalls) ** (1 / 6))


def test_groups_have_the_fields_edges():
    groups = metrics.shot_groups(np.array([101, 100, 20, 19]), many_above=100, few_below=20)
    assert {name: mask.tolist() for name, mask in groups.items()} == {
        "many": [True, False, False, False],
        "medium": [False, True, True, False],
        "few": [False, False, False, True],
    }


def test_group_accuracy_by_hand():
    labels = np.array([0, 0, 1, 1, 2, 2])
    logits = 5.0 * np.eye(3)[[0, 0, 1, 0, 0, 0]]
    found = metrics.summarize(logits, labels, np.array([200, 50, 3]), **SETTINGS)
    assert (found["many"], found["medium"], found["few"]) == (1, 0.5, 0)
    assert found["accuracy"] == pytest.approx(0.5)


def test_an_empty_group_is_nan():
    logits, labels = case()
    found = metrics.summarize(logits, labels, np.full(6, 50), **SETTINGS)
    assert np.isnan(found["many"]) and np.isnan(found["few"]) and found["medium"] == found["accuracy"]


def test_perfect_and_hopeless():
    labels = np.arange(6)
    perfect = metrics.summarize(1e3 * np.eye(6), labels, np.full(6, 50), **SETTINGS)
    assert (perfect["accuracy"], perfect["balanced_error"], perfect["ece"], perfect["nll"]) == (1, 0, 0, 0)
    ones, zeros = ("top5", "geometric_mean", "worst_class", "macro_f1"), ("brier", "mce", "classwise_ece", "aurc")
    assert [perfect[name] for name in ones] == [1] * 4
    assert [perfect[name] for name in (*zeros, "ece_equal_mass")] == [0] * 5
    hopeless = metrics.summarize(1e3 * np.eye(6)[::-1], labels, np.full(6, 50), **SETTINGS)
    assert (hopeless["accuracy"], hopeless["ece"], hopeless["brier"], hopeless["aurc"]) == (0, 1, 2, 1)
    assert [hopeless[name] for name in ("geometric_mean", "worst_class", "macro_f1")] == [0, 0, 0]
    assert (hopeless["mce"], hopeless["ece_equal_mass"], hopeless["classwise_ece"]) == (1, 1, 1 / 3)  # two of six


def test_one_class_and_one_sample():
    found = metrics.summarize(np.zeros((1, 1)), np.array([0]), np.array([5]), **SETTINGS)
    assert (found["accuracy"], found["top5"], found["nll"], found["ece"], found["aurc"]) == (1, 1, 0, 0, 0)


def test_ties_go_to_the_lower_class_as_argmax_has_it():
    logits, labels = np.zeros((7, 7)), np.arange(7)
    assert metrics.rank(logits, labels).tolist() == [0, 1, 2, 3, 4, 5, 6]
    found = metrics.summarize(logits, labels, np.full(7, 50), **SETTINGS)
    assert (found["accuracy"], found["top5"]) == (pytest.approx(1 / 7), pytest.approx(5 / 7))
    assert metrics.rank(np.array([[1.0, 3.0, 2.0]] * 3), np.array([0, 1, 2])).tolist() == [2, 0, 1]


def test_f1_counts_a_class_that_is_only_predicted():
    labels, predictions = np.array([0, 0, 1]), np.array([0, 2, 1])
    assert metrics.macro_f1(predictions, labels, 4) == pytest.approx(
        f1_score(labels, predictions, average="macro", zero_division=0)
    )


def test_risk_and_coverage_by_hand():
    right = np.array([True, False, True, True])
    # most confident first: right, wrong, right, right
    assert metrics.aurc(np.array([0.9, 0.8, 0.7, 0.6]), right) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert metrics.aurc(np.array([0.9, 0.8, 0.7, 0.6]), right.astype(int)) == pytest.approx(
        (0 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    )
    # where all are as confident, each share left out has the error of all
    assert metrics.aurc(np.full(4, 0.5), right) == pytest.approx(1 / 4)


def test_equal_mass_bins_by_hand():
    confidence, right = np.array([0.9, 0.1, 0.2, 0.8]), np.array([True, False, True, True])
    # lower half .1, .2: gap -(1 - .3); upper half .8, .9: gap 2 - 1.7
    assert metrics.ece_equal_mass(confidence, right, bins=2) == pytest.approx((0.7 + 0.3) / 4)
    assert metrics.ece_equal_mass(confidence, right, bins=1) == pytest.approx(metrics.ece(confidence, right, bins=1))


def test_mce_by_hand():
    confidence, right = np.array([0.05, 0.15, 0.15, 1.0]), np.array([False, True, False, True])
    assert metrics.mce(confidence, right, bins=10) == pytest.approx(0.35)


@pytest.mark.parametrize("bins", [1, 2, 15])
def test_the_bins_of_the_reliability_diagram_add_up_to_ece(bins):
    logits, labels = case()
    _, right, _, probabilities = metrics.by_image(logits, labels)
    rows = list(metrics.reliability(probabilities.max(1), right, bins=bins))
    assert sum(row["images"] for row in rows) == len(labels)
    total = sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / len(labels)
    assert total == pytest.approx(metrics.ece(probabilities.max(1), right, bins=bins))
    assert all(row["low"] < row["confidence"] <= row["high"] for row in rows)


def test_standard_errors_of_means_are_known():
    rng = np.random.default_rng(0)
    right, nll, confidence = rng.random(4000) < 0.7, rng.exponential(size=4000), rng.random(4000)
    found = metrics.standard_errors(right, nll, confidence, bins=15)
    assert found["accuracy"] == pytest.approx((0.7 * 0.3 / 4000) ** 0.5, rel=0.15)
    assert found["nll"] == pytest.approx(1 / 4000**0.5, rel=0.15)
    assert 0 < found["ece"] < 0.02
    assert found == metrics.standard_errors(right, nll, confidence, bins=15)


def test_ece_by_hand():
    confidence = np.array([0.05, 0.15, 0.15, 1.0])
    right = np.array([False, True, False, True])
    # ten bins: |0 - .05| * 1/4 + |1/2 - .15| * 2/4 + 0
    assert metrics.ece(confidence, right, bins=10) == pytest.approx(0.05 / 4 + 0.35 / 2)


def test_a_confidence_on_a_bins_edge_belongs_to_the_bin_below():
    edge, within = (metrics.ece(np.array([c, 0.15]), np.array([True, False]), bins=10) for c in (0.2, 0.2 + 1e-9))
    assert edge == pytest.approx(abs(1 - 0.35) / 2)  # one bin
    assert within == pytest.approx((0.8 + 0.15) / 2)  # two bins


def test_class_without_samples_is_nan_and_not_counted():
    found = metrics.class_accuracy(np.array([0, 0]), np.array([0, 1]), 3)
    np.testing.assert_array_equal(found, [1, 0, np.nan])


def test_class_counts_of_another_length_are_named():
    with pytest.raises(ValueError, match=r"class counts have shape \(5,\); expected \(6,\)"):
        metrics.summarize(*case(), np.ones(5), **SETTINGS)
