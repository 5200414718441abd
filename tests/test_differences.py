"""How sure a difference is: against the bootstrap, McNemar's test, Student's t, and simulations with known truth."""

import itertools

import numpy as np
import pytest
from scipy import stats

from longtail.report import differences
from longtail.report.differences import Spread, difference, holm, judged, of_corrections, pooled


def networks(rng, seeds, images, accuracy, *, sd=0.0, difficulty=None):
    """Which images are right (seeds, images): each seed has its own accuracy, images a difficulty in common."""
    difficulty = np.zeros(images) if difficulty is None else difficulty
    chances = accuracy + sd * rng.normal(size=(seeds, 1)) + difficulty
    return rng.random((seeds, images)) < chances


def slow_interval(a, b, spreads):
    """The 95 % interval of mean a minus mean b, as docs/measures.md says it: lists of seeds, each a list of images."""
    images = range(len(a[0]))
    d = [sum(seed[x] for seed in a) / len(a) - sum(seed[x] for seed in b) / len(b) for x in images]
    value = sum(d) / len(d)
    terms = [(sum((one - value) ** 2 for one in d) / (len(d) - 1) / len(d), len(d) - 1), *spreads]
    variance = sum(term for term, _ in terms)
    freedom = variance**2 / sum(term**2 / df for term, df in terms)
    half = stats.t.ppf(0.975, freedom) * variance**0.5
    return value, value - half, value + half


def test_over_images_it_is_the_paired_bootstrap():
    """The twin: scipy's bootstrap of the mean difference of an image; one network each, so nothing else."""
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(-0.3, 0.3, 2000)
    a, b = (networks(rng, 1, 2000, accuracy, difficulty=difficulty) for accuracy in (0.55, 0.5))
    found = difference(a, b)
    twin = stats.bootstrap(((a[0] * 1.0 - b[0] * 1.0),), np.mean, n_resamples=4000, rng=1, method="percentile")
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert (found.low, found.high) == pytest.approx(twin.confidence_interval, abs=0.0015)
    assert not found.seeds


def test_two_networks_give_mcnemars_test():
    """Exact McNemar: the images that only one network has right are a binomial with 1/2."""
    rng = np.random.default_rng(1)
    for gain in (0.0, 0.01, 0.03):
        a, b = networks(rng, 1, 5000, 0.5 + gain), networks(rng, 1, 5000, 0.5)
        only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
        exact = stats.binomtest(only_a, only_a + only_b).pvalue
        assert difference(a, b).p == pytest.approx(exact, abs=0.02)


def test_over_seeds_it_is_students_t():
    """In the limit of images that all have the same outcome, only the seeds are left."""
    accuracies = [0.5, 0.53, 0.51], [0.55, 0.58, 0.54]
    images = 100_000
    right = [np.stack([np.arange(images) < round(x * images) for x in group]) for group in accuracies]
    found = difference(right[1], right[0], [pooled(accuracies).of_means(3, 3)])
    twin = stats.ttest_ind(accuracies[1], accuracies[0])
    interval = twin.confidence_interval()
    assert found.p == pytest.approx(twin.pvalue, rel=0.01)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=2e-4)
    assert found.seeds


def test_two_corrections_of_the_same_networks_are_paired():
    """Networks that differ much, and a correction that gains the same in each: the gain is sure."""
    rng = np.random.default_rng(2)
    raw = networks(rng, 3, 5000, 0.5, sd=0.05)
    better = raw | (rng.random(raw.shape) < 0.02)
    spread = pooled([raw.mean(1)]).of_means(3, 3)
    loose, paired = difference(better, raw, [spread]), difference(better, raw, of_corrections(better, raw))
    assert paired.low > 0 > loose.low
    gains = better.mean(1) - raw.mean(1)
    assert paired.value == pytest.approx(gains.mean())
    twin = slow_interval(better.astype(int).tolist(), raw.astype(int).tolist(), [(gains.var(ddof=1) / 3, 2)])
    assert (paired.value, paired.low, paired.high) == pytest.approx(twin)


@pytest.mark.parametrize("same", [True, False])
def test_an_interval_of_95_percent_holds_the_truth_that_often(same):
    """Methods whose seeds vary, on images of varying difficulty; the truth is the difference of the methods."""
    rng = np.random.default_rng(3)
    inside, runs = 0, 400
    for _ in range(runs):
        difficulty = rng.uniform(-0.2, 0.2, 400)
        if same:
            a = networks(rng, 3, 400, 0.5, sd=0.03, difficulty=difficulty)
            b = a & (rng.random(a.shape) < 0.9)  # loses a tenth of what is right
            truth = 0.05
        else:
            a, b = (networks(rng, 3, 400, x, sd=0.03, difficulty=difficulty) for x in (0.55, 0.5))
            truth = 0.05
        seeds = of_corrections(a, b) if same else [pooled([a.mean(1), b.mean(1)]).of_means(3, 3)]
        found = difference(a, b, seeds)
        inside += found.low <= truth <= found.high
    assert inside / runs >= 0.93  # 0.95 less two standard errors; it may be more, see the docstring


def test_the_same_predictions_do_not_differ():
    right = np.random.default_rng(0).random((2, 50)) < 0.5
    assert difference(right, right, of_corrections(right, right)) == (0, 0, 0, 1, True)
    assert difference(right[:1], right[:1], of_corrections(right[:1], right[:1])) == (0, 0, 0, 1, False)
    all_right = difference(np.ones((1, 50), bool), np.zeros((1, 50), bool))
    assert (all_right.value, all_right.p, all_right.settled) == (1, 0, True)


def test_swapping_the_two_swaps_the_sign():
    rng = np.random.default_rng(4)
    a, b = networks(rng, 2, 300, 0.6), networks(rng, 3, 300, 0.5)
    seeds = [Spread(0.001, 3)]
    assert difference(a, b, seeds) == pytest.approx(difference(b, a, seeds).swapped())


def test_the_interval_is_that_of_the_slow_twin():
    rng = np.random.default_rng(6)
    for seeds_of_a, seeds_of_b in itertools.product((1, 2, 3), repeat=2):
        a, b = networks(rng, seeds_of_a, 40, 0.6), networks(rng, seeds_of_b, 40, 0.5)
        for terms in ([], [(0.004, 2)], [(0.003, 1), (0.0005, 4)]):
            found = difference(a, b, [Spread(*term) for term in terms])
            twin = slow_interval(a.astype(int).tolist(), b.astype(int).tolist(), terms)
            assert (found.value, found.low, found.high) == pytest.approx(twin)
            assert found.seeds == bool(terms)


def test_settled_is_one_rule_for_every_word():
    over_both, over_images = [Spread(1e-4, 10), Spread(1e-4, 2)], [Spread(1e-4, 1000)]
    words = ("higher", "agrees", "lower")
    assert judged(0.2, over_both, seeds=True).said(*words) == "higher"
    assert judged(-0.2, over_both, seeds=True).said(*words) == "lower"
    assert judged(-0.2, over_images, seeds=False).said(*words) == "lower, these networks"
    for value in np.linspace(-0.1, 0.1, 41):
        one = judged(value, over_both, seeds=True)
        assert (one.said(*words) == "agrees") == (one.low <= 0 <= one.high) == (not one.settled)
    assert not judged(0.2, over_images, seeds=False)._replace(p=0.06).settled  # adjusted p decides
    assert judged(0.2, over_images, seeds=False).over == "test images alone"


def test_pooled_variance_by_hand():
    found = pooled([[0.5, 0.54], [0.6, 0.66], [0.7], []])
    assert found == (pytest.approx((0.0008 + 0.0018) / 2), 2)
    assert pooled([[0.5], [0.6]]) is None
    assert Spread(0.06, 4).of_means(2, 3) == (pytest.approx(0.05), 4)


def test_holm_by_hand_and_by_its_definition():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    rng = np.random.default_rng(5)
    for values in rng.random((20, 5)):
        adjusted = holm(list(values))
        for i, alpha in itertools.product(range(5), (0.05, 0.2, 0.6)):
            # step down: rejected while each smallest one in turn is at most alpha / (how many are left)
            order = np.argsort(values)
            rejected = set()
            for place, one in enumerate(order):
                if values[one] * (5 - place) > alpha:
                    break
                rejected.add(one)
            assert (adjusted[i] <= alpha) == (i in rejected)


def test_other_images_or_seeds_are_refused():
    right = np.ones((2, 10), bool)
    with pytest.raises(ValueError, match=r"\(2, 10\) and \(2, 11\): nothing to pair"):
        difference(right, np.ones((2, 11), bool))
    with pytest.raises(ValueError, match="nothing to pair"):
        of_corrections(right, np.ones((3, 10), bool))


@pytest.mark.parametrize(("value", "text"), [(0.0004, "< 0.001"), (0.0123, "0.012"), (0.2, "0.20"), (1.0, "1.00")])
def test_p_as_text(value, text):
    assert differences.probability(value) == text
