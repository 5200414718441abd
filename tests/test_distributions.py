"""Test sets with other class distributions: the published sizes, and what knowing them is worth."""

import numpy as np
import pytest
from scipy.special import softmax

from longtail import posthoc
from longtail.evaluation import distributions

COUNTS = np.array([int(500 * 0.01 ** (i / 99)) for i in range(100)])  # CIFAR-100-LT, IF 100


@pytest.mark.parametrize(("ratio", "total"), [(2, 7166), (5, 4932), (10, 3876), (25, 2956), (50, 2486)])
def test_totals_are_those_of_balpoe_on_cifar_100(ratio, total):
    forward, backward = (distributions.frequencies(f"{way}{ratio}", COUNTS, 100) for way in ("forward", "backward"))
    assert forward.sum() == backward.sum() == total
    assert (forward[0], forward[-1]) == (100, 100 // ratio)
    np.testing.assert_array_equal(backward, forward[::-1])


def test_forward_follows_the_training_images_whatever_the_classes_are_called():
    counts = np.array([5, 500, 50])
    np.testing.assert_array_equal(distributions.frequencies("forward4", counts, 40), [10, 40, 20])
    np.testing.assert_array_equal(distributions.frequencies("backward4", counts, 40), [40, 10, 20])
    np.testing.assert_array_equal(distributions.frequencies("forward100", counts, 10), [1, 10, 1])  # none is empty


def test_names_go_from_forward_to_backward():
    assert distributions.names([2, 50], 50) == ["forward50", "forward2", "uniform", "backward2", "backward50"]
    # iNaturalist has three test images a class: a long tail of 50 cannot be drawn from them
    assert distributions.names([2, 50], 3) == ["forward2", "uniform", "backward2"]
    assert distributions.names([2, 50], 1) == ["uniform"]


def test_a_draw_has_the_frequencies_and_another_seed_other_images():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), 20))
    wanted = np.array([20, 7, 3])
    rows, again, other = (distributions.draw(labels, wanted, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(np.bincount(labels[rows]), wanted)
    assert len(set(rows)) == len(rows)
    np.testing.assert_array_equal(rows, again)
    assert set(rows) != set(other)


def case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A network that is calibrated for a uniform prior, 300 images of each of 4 classes, and training images."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 300)
    x = rng.normal(size=(1200, 2)) + np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])[labels]
    centres = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    return -((x[:, None] - centres) ** 2).sum(2) / 2, labels, np.array([400, 100, 20, 4])


def test_accuracies_are_those_of_the_drawn_images():
    logits, labels, counts = case()
    rebalancing = posthoc.PredictionRebalancing()
    rows = distributions.evaluate(
        {"raw": logits, "other": -logits}, labels, counts, ratios=[3, 10], draws=4, transductive={"re": rebalancing}
    )
    assert [row["distribution"] for row in rows[::3]] == distributions.names([3, 10], 300)
    assert [row["correction"] for row in rows[:3]] == ["raw", "other", "re"]
    wanted = distributions.frequencies("backward10", counts, 300)
    raw, other, re = rows[-3:]
    values = {"raw": [], "known": [], "other": [], "re": []}
    for seed in range(4):
        some = distributions.draw(labels, wanted, seed)
        z, y, p = logits[some], labels[some], softmax(logits[some], axis=1)
        values["raw"].append(np.mean([z[i].argmax() == y[i] for i in range(len(y))]))
        values["known"].append(np.mean([(z[i] + np.log(wanted)).argmax() == y[i] for i in range(len(y))]))
        values["other"].append(np.mean([z[i].argmin() == y[i] for i in range(len(y))]))
        values["re"].append(np.mean([(p[i] / p.sum(0)).argmax() == y[i] for i in range(len(y))]))
    assert raw["accuracy"] == pytest.approx(np.mean(values["raw"]))
    assert raw["accuracy_sd"] == pytest.approx(np.std(values["raw"], ddof=1))
    assert raw["known_prior"] == pytest.approx(np.mean(values["known"]))
    assert raw["images"] == wanted.sum()
    assert other["accuracy"] == pytest.approx(np.mean(values["other"]))
    assert (re["accuracy"], re["known_prior"]) == (pytest.approx(np.mean(values["re"])), None)


def test_knowing_the_prior_helps_away_from_uniform_and_changes_nothing_there():
    rows = distributions.evaluate({"raw": case()[0]}, *case()[1:], ratios=[2, 50], draws=5, transductive={})
    gains = {row["distribution"]: row["known_prior"] - row["accuracy"] for row in rows}
    assert gains["uniform"] == 0 and rows[2]["accuracy_sd"] is None
    assert gains["forward50"] > gains["forward2"] > 0 < gains["backward2"] < gains["backward50"]
