"""Measures against torchmetrics, scikit-learn and examples worked by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from longtail import metrics

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
    hopeless = metrics.summarize(1e3 * np.eye(6)[::-1], labels, np.full(6, 50), **SETTINGS)
    assert (hopeless["accuracy"], hopeless["ece"]) == (0, 1)


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
