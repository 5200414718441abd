"""Fisher-consistency of the product of experts: the grid against closed forms, training against theory."""

import copy
import re

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from scipy.special import log_softmax
from scipy.stats import norm

from longtail.data import long_tail
from longtail.evaluation import fisher, fisher_toy
from longtail.report import more_plots
from longtail.workflow import files, params

SETTINGS = yaml.safe_load((ROOT / "params.yaml").read_text())["fisher"]
SMALL = SETTINGS | {"classes": 4, "imbalance_factor": 20, "many_images": 1000, "few_images": [60, 100], "seeds": [0, 1],
                    "taus": [[1], [0, 1]], "scales": [0.5, 1, 2]}  # fmt: skip
COUNTS = long_tail.class_counts("exponential", 3000, 6, 50)
LOG_PRIOR = np.log(COUNTS / COUNTS.sum())


@pytest.fixture(scope="module")
def toy():
    return fisher.Toy(*fisher.sunflower(6), points=300)


@pytest.fixture(scope="module")
def trained(toy):
    """Bare logits (3, G, C) of quadratic experts with taus 0, 1, 2."""
    return fisher.quadratic_experts(*toy.sample(COUNTS), COUNTS, taus=fisher.TAUS)(toy.x_G2)


def two_classes(distance, prior, points=500):
    """Two Gaussians of the same covariance, `distance` standard deviations apart, and the closed form of Bayes' error.

    Each class's is Phi(-distance / 2 -+ log odds / distance).
    """
    factor = np.array([[1.5, 0.0], [0.8, 0.6]])
    step = np.array([0.6, -0.8])
    toy = fisher.Toy(np.stack([0 * step, distance * factor @ step]), np.stack([factor, factor]), points=points)
    tilt = np.log(prior[0] / prior[1]) / distance
    return toy, np.array([norm.cdf(-distance / 2 - tilt), norm.cdf(-distance / 2 + tilt)])


def test_densities_integrate_to_one(toy):
    np.testing.assert_allclose(toy.mass_GC.sum(0), 1, atol=1e-8)
    x, labels = toy.sample(np.full(6, 4))
    by_hand = [
        -np.log(2 * np.pi) - np.log(np.linalg.det(cov)) / 2 - d @ np.linalg.inv(cov) @ d / 2
        for c in range(6)
        for cov, d in [(toy.factor_C22[c] @ toy.factor_C22[c].T, x[0] - toy.mean_C2[c])]
    ]
    np.testing.assert_allclose(toy.log_density(x)[0], by_hand)
    assert labels.tolist() == sorted([0, 1, 2, 3, 4, 5] * 4)


@pytest.mark.parametrize("prior", [(0.5, 0.5), (0.9, 0.1), (0.02, 0.98)])
@pytest.mark.parametrize("distance", [1.0, 2.5])
def test_errors_of_two_gaussians_are_the_closed_form(distance, prior):
    prior = np.array(prior)
    toy, error = two_classes(distance, prior)
    scores = toy.log_density_GC + np.log(prior)
    assert toy.error(scores, prior) == pytest.approx(prior @ error, abs=5e-5)
    assert toy.error(scores) == pytest.approx(error.mean(), abs=5e-4)  # not the best rule: borders weigh in cells
    assert toy.bayes_error == pytest.approx(norm.cdf(-distance / 2), abs=5e-5)


def test_a_finer_grid_says_the_same(toy):
    finer = fisher.Toy(toy.mean_C2, toy.factor_C22, points=450)
    assert finer.bayes_error == pytest.approx(toy.bayes_error, abs=5e-5)
    for strength in (-1, 0.25, 1):
        assert finer.predicted(strength, LOG_PRIOR) == pytest.approx(toy.predicted(strength, LOG_PRIOR), abs=1e-3)


def test_the_spiral_has_the_moments_of_a_normal_and_random_samples_their_own():
    points = fisher_toy.spiral(2000)
    np.testing.assert_allclose(points.mean(0), 0, atol=2e-3)
    np.testing.assert_allclose(np.cov(points.T), np.eye(2), atol=5e-3)
    toy = fisher.Toy(*fisher.sunflower(3), points=50)
    for rng in (None, np.random.default_rng(0)):
        x, labels = toy.sample(np.array([20_000, 9000, 30]), rng)
        assert np.bincount(labels).tolist() == [20_000, 9000, 30]
        np.testing.assert_allclose(x[labels == 1].mean(0), toy.mean_C2[1], atol=0.05)
        np.testing.assert_allclose(np.cov(x[labels == 0].T), toy.factor_C22[0] @ toy.factor_C22[0].T, atol=0.05)


def test_excess_is_predicted_to_be_zero_where_the_taus_average_to_one_and_above_elsewhere(toy):
    excess = [toy.predicted(1 - tau, LOG_PRIOR) for tau in (0, 0.5, 0.8, 1, 1.2, 1.5, 2)]
    assert excess[3] == 0 and min(excess[:3] + excess[4:]) > 1e-3
    assert excess[:4] == sorted(excess[:4], reverse=True) and excess[3:] == sorted(excess[3:])


def test_the_product_of_experts_is_bayes_rule_for_the_power_of_the_prior_in_plain_loops(toy):
    """Experts a log p(x|y) + b log prior + what is the same for all classes; probabilities multiplied one by one."""
    rng = np.random.default_rng(0)
    sharpness, bias = rng.uniform(0.5, 2, 3), rng.uniform(-1, 2, 3)
    strength = fisher.strength_of(sharpness, bias)
    for x in rng.normal(size=(40, 2)) * 2:
        log_density = toy.log_density(x[None])[0]
        target = [np.exp(log_density[c]) * np.exp(LOG_PRIOR[c]) ** strength for c in range(6)]
        multiplied = [1.0] * 6
        for a, b in zip(sharpness, bias, strict=True):
            probability = np.exp(log_softmax(a * log_density + b * LOG_PRIOR + rng.normal()))
            for c in range(6):
                multiplied[c] *= probability[c] ** (1 / 3)
        assert int(np.argmax(multiplied)) == int(np.argmax(target))
        ratio = np.array(multiplied) / np.array(target) ** np.mean(sharpness)  # the same for every class
        np.testing.assert_allclose(ratio / ratio[0], 1)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_strengths_of_scaled_experts(toy, scale):
    """What `miscalibrations` says of experts at their minimum is what `sharpened` makes of them."""
    at_minimum = np.stack([toy.log_density_GC[:50] + (1 - tau) * LOG_PRIOR for tau in fisher.TAUS])
    for sharpness, bias, posterior in fisher.miscalibrations(scale).values():
        shift = np.reshape(fisher.TAUS, (-1, 1, 1)) * LOG_PRIOR * posterior
        expected = [a * toy.log_density_GC[:50] + b * LOG_PRIOR for a, b in zip(sharpness, bias, strict=True)]
        np.testing.assert_allclose(fisher.sharpened(at_minimum, shift, sharpness), expected)
    strengths = [fisher.strength_of(a, b) for a, b, _ in fisher.miscalibrations(scale).values()]
    np.testing.assert_allclose(strengths, [0, (scale - 1) / (scale + 2), 1 - 1 / scale], atol=1e-12)


def test_trained_products_with_mean_tau_one_are_bayes_and_all_alike(toy, trained):
    assert toy.excess(trained.mean(0)) == pytest.approx(0, abs=5e-4)
    one, two = (fisher.quadratic_experts(*toy.sample(COUNTS), COUNTS, taus=taus)(toy.x_G2) for taus in ([1], [0, 2]))
    assert toy.excess(one.mean(0)) == pytest.approx(toy.excess(trained.mean(0)), abs=2e-5)
    assert toy.excess(two.mean(0)) == pytest.approx(toy.excess(trained.mean(0)), abs=2e-5)
    assert np.mean(one.mean(0).argmax(1) == two.mean(0).argmax(1)) > 0.999


def test_other_means_miss_by_what_is_predicted(toy, trained):
    for experts, mean in (([0], 0), ([0, 1], 0.5), ([1, 2], 1.5)):
        expected = toy.predicted(1 - mean, LOG_PRIOR)
        assert expected > 0.01
        assert toy.excess(trained[experts].mean(0)) == pytest.approx(expected, abs=3e-3)


def test_scaled_experts_miss_by_what_is_predicted(toy, trained):
    rows = fisher.by_scale(toy, trained, LOG_PRIOR, [0.5, 2.0])
    assert len(rows) == 6
    for row in rows:
        assert row["measured"] == pytest.approx(row["predicted"], abs=4e-3)
        assert (row["predicted"] == 0) == (row["name"] == "all bare logits")


def test_with_a_known_prior_the_product_is_bayes_for_it(toy, trained):
    rows = fisher.by_test_prior(toy, trained, COUNTS, 50)
    assert [row["name"] for row in rows[::3]] == ["forward50", "uniform", "backward50"]
    for row in rows:
        assert row["measured"] > row["predicted"] - 1e-9  # nothing is better than Bayes
        if row["experts"] == "prior known":
            assert row["measured"] == pytest.approx(row["predicted"], abs=1e-3)
    by_hand = fisher.distributions.frequencies("backward50", COUNTS, 3000)
    scores = toy.log_density_GC + np.log(by_hand)
    assert rows[-1]["predicted"] == pytest.approx(toy.error(scores, by_hand / by_hand.sum()))


def test_sharpness_and_bias_are_found_again(toy):
    for a, b in ((1.0, 0.0), (2.5, -0.7), (0.6, 1.3)):
        logits = a * toy.log_density_GC + b * LOG_PRIOR + np.sin(toy.x_G2[:, :1])
        assert fisher.sharpness_and_bias(toy, logits, LOG_PRIOR) == pytest.approx((a, b), abs=2e-3)


def test_calibrated_experts_have_no_ece_and_sharpened_ones_have(toy):
    def experts(factor):
        return lambda x: np.stack([factor * (toy.log_density(x) + (1 - tau) * LOG_PRIOR) for tau in fisher.TAUS])

    assert fisher.target_ece(toy, experts(1.0), fisher.TAUS, LOG_PRIOR) < 0.005
    assert fisher.target_ece(toy, experts(2.0), fisher.TAUS, LOG_PRIOR) > 0.05


def test_the_best_prior_takes_the_lean_away(toy):
    leaning = toy.log_density_GC + 0.4 * LOG_PRIOR
    assert toy.excess(leaning) > 0.01 and fisher.at_best_prior(toy, leaning, LOG_PRIOR) == pytest.approx(0, abs=1e-9)


def test_networks_are_those_of_their_seed_and_mixup_changes_them(toy, monkeypatch):
    monkeypatch.setattr(fisher_toy, "UPDATES", 300)
    counts = long_tail.class_counts("exponential", 100, 6, 50)
    x, labels = toy.sample(counts, np.random.default_rng(0))

    def logits(**settings):
        return fisher.network_experts(x, labels, counts, taus=[0, 2], **settings)(x)

    first = logits(seed=3)
    assert first.shape == (2, len(x), 6)
    np.testing.assert_array_equal(first, logits(seed=3))
    mixed = logits(seed=3, mixup_alpha=0.4)
    entropy = [-np.sum(np.exp(p) * p, axis=2).mean() for p in (log_softmax(z, axis=2) for z in (first, mixed))]
    assert entropy[1] > entropy[0]  # mixed labels make less certain
    accuracy = (first + np.reshape([0, 2], (2, 1, 1)) * np.log(counts / counts.sum())).argmax(2) == labels
    assert accuracy.mean() > 0.9  # on their own images, with the loss's shift


def test_a_fit_that_does_not_come_to_its_minimum_says_so(toy, monkeypatch):
    monkeypatch.setattr(fisher_toy, "STEPS", 2)
    with pytest.raises(ValueError, match=r"taus \[0, 2\]: after 2 steps of LBFGS the slope is .* not below 1e-05"):
        fisher.quadratic_experts(*toy.sample(COUNTS), COUNTS, taus=[0, 2])


def test_two_runs_give_the_same_bytes_and_the_page_says_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(fisher, "FINE", 150)
    monkeypatch.setattr(fisher, "COARSE", 80)
    monkeypatch.setattr(fisher_toy, "UPDATES", 25)
    drawn = []
    for place in ("a", "b"):
        torch.manual_seed(len(drawn))  # the state of the process does not matter
        rows = fisher.write(SMALL, out_dir=str(tmp_path / place))
        drawn.append(more_plots.fisher(rows))
    for name in ("fisher.csv", "fisher.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert drawn[0] == drawn[1] and drawn[0].startswith(b"\x89PNG")
    assert all(tuple(row) == fisher.COLUMNS for row in rows)
    written = files.read_csv(tmp_path / "a/fisher.csv")
    assert len(written) == len(rows) == 2 + 7 + 3 * 3 + 2 * 2 * 2 + 3 * 3 + 61 + 3 * 41
    page = (tmp_path / "a/fisher.md").read_text()
    (row,) = [row for row in rows if (row["experts"], row["name"]) == ("quadratic", "0, 1")]
    assert f"| 0, 1 | quadratic | 0.5 | {100 * row['predicted']:.2f} | {100 * row['measured']:.2f} |" in page
    assert page.count("mixup 0.4 changes: ECE") == 2 and "| backward50 |" in page and "nan" not in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 1}, "fisher.classes = 1: input should be greater than or equal to 2"),
        ({"taus": [[0], [1, 2]]}, "taus: no set has the mean 1, which is what the balanced error needs"),
        ({"taus": [[]]}, "list should have at least 1 item"),
        ({"few_images": [400, 99]}, "few_images is [400, 99]: none for the smallest class"),
        ({"many_images": 999}, "many_images is 999: fewer than 10 for the smallest class"),
        ({"seeds": [0]}, "fisher.seeds = [0]: list should have at least 2 items"),
        ({"seeds": [1, 1]}, "seeds names something twice: [1, 1]"),
        ({"scales": [0]}, "input should be greater than 0"),
        ({"mixup_alpha": 0}, "fisher.mixup_alpha = 0: input should be greater than 0"),
        ({"points": 100}, "fisher.points = 100: unknown key; allowed: classes, imbalance_factor"),
    ],
)
def test_params_that_make_no_sense_are_refused(changes, message):
    values = copy.deepcopy(yaml.safe_load((ROOT / "params.yaml").read_text()))
    values["fisher"] |= changes
    with pytest.raises(params.ParamsError, match=re.escape(message)):
        params.validate(values)
