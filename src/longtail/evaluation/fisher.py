"""Is the balanced product of experts Fisher-consistent? (Sanchez Aimar et al., CVPR 2023, arXiv:2206.05260.)

Measured where the best rule is known: Gaussians in the plane. An expert whose bare logits are, but for what is the same
for all classes,

    z_e = a_e log p(x|y) + b_e log prior(y)

gives the product mean_e z_e, whose argmax is that of log p(x|y) + strength * log prior(y) with

    strength = sum_e b_e / sum_e a_e.

That is Bayes' rule for the class prior ~ prior ** strength, whose balanced error needs no training. At the minimum of
its loss expert e has a_e = 1 and b_e = 1 - tau_e: it is calibrated for its own target. Then strength is 1 - mean tau,
and 0, the balanced optimum, where the taus average to one. Experts with another sharpness a_e are not calibrated.

E experts, N samples, G points of the grid, C classes, F features. Errors are fractions in rows, points of percent in
the page and the picture.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from scipy.optimize import minimize

from longtail import posthoc
from longtail.data import long_tail
from longtail.evaluation import distributions, metrics
from longtail.evaluation.fisher_page import TAUS, Row, listed, markdown
from longtail.evaluation.fisher_toy import (
    MANY_BATCH,
    Experts,
    Toy,
    log_prior,
    network_experts,
    quadratic_experts,
    sunflower,
)
from longtail.posthoc.predictions import product
from longtail.workflow import files

FINE, COARSE = 800, 250  # points along a side: for what theory gives exactly, and for networks and curves
TEST_SAMPLES, ECE_BINS = 40_000, 15
COLUMNS = ("experiment", "name", "experts", "mean_tau", "scale", "images", "seed", "strength", "predicted", "measured",
           "at_best_prior", "sharpness", "ece")  # fmt: skip


# ------------------------------------------------------------------------------------- what is measured of them


def strength_of(sharpness_E: Sequence[float], bias_E: Sequence[float]) -> float:
    """Of the product of experts a_e log p(x|y) + b_e log prior(y): the exponent of the prior, sum of b / sum of a."""
    return sum(bias_E) / sum(sharpness_E)


def sharpness_and_bias(toy: Toy, logits_GC: np.ndarray, log_prior_C: np.ndarray) -> tuple[float, float]:
    """The a and b for which logits are nearest to a log p(x|y) + b log prior(y).

    Nearest by likelihood: softmax((logits - b log prior) / a) is to give the labels of the balanced distribution,
    temperature scaling with one number for the prior's part, here over the whole distribution.
    """
    share_GC = toy.mass_GC / toy.classes
    terms = (logits_GC, np.broadcast_to(log_prior_C, logits_GC.shape))

    def nll(v: np.ndarray) -> tuple[float, np.ndarray]:
        scores_GC = v[0] * terms[0] + v[1] * terms[1]
        scores_GC -= scores_GC.max(1, keepdims=True)
        log_p_GC = scores_GC - np.log(np.exp(scores_GC).sum(1, keepdims=True))
        gap_GC = np.exp(log_p_GC) * share_GC.sum(1, keepdims=True) - share_GC
        return -(share_GC * log_p_GC).sum(), np.array([(gap_GC * term).sum() for term in terms])

    inverse, minus_b = minimize(nll, [1.0, 0.0], jac=True, method="BFGS").x
    return float(1 / inverse), float(-minus_b / inverse)


def target_ece(toy: Toy, experts: Experts, taus: Sequence[float], log_prior_C: np.ndarray) -> float:
    """Mean over experts of the ECE of softmax(bare logits), expert e's on test samples of its own target distribution.

    That is p(x|y) with the class prior ~ prior ** (1 - tau_e), for which its bare logits are meant.
    """
    found = []
    for place, tau in enumerate(taus):
        wanted_C = np.exp((1 - tau) * log_prior_C)
        x_N2, labels_N = toy.sample(np.maximum(np.round(TEST_SAMPLES * wanted_C / wanted_C.sum()), 1).astype(int))
        _, right_N, _, probability_NC = metrics.by_image(experts(x_N2)[place], labels_N)
        found.append(metrics.ece(probability_NC.max(1), right_N, bins=ECE_BINS))
    return float(np.mean(found))


def at_best_prior(toy: Toy, logits_GC: np.ndarray, log_prior_C: np.ndarray) -> float:
    """Excess once the best multiple of log prior is added: what is left is not a matter of the prior."""
    return min(toy.excess(logits_GC + strength * log_prior_C) for strength in np.arange(-0.6, 0.61, 0.04))


def sharpened(logits_EGC: np.ndarray, shift_E1C: np.ndarray, scale_E: Sequence[float]) -> np.ndarray:
    """Logits (E, G, C) whose shifted form is `scale` times as large: scale * (logits + shift) - shift.

    With shift = tau_e log prior it is the posterior of training that gets sharper, which is what over-fitting does;
    with shift 0 the bare logits do.
    """
    scale_E11 = np.reshape(scale_E, (-1, 1, 1))
    return scale_E11 * (logits_EGC + shift_E1C) - shift_E1C


# ------------------------------------------------------------------------------------------- the experiments


def by_mean_tau(toy: Toy, coarse: Toy, counts_C: np.ndarray, sets: Sequence[Sequence[float]]) -> list[Row]:
    """Products of experts with several sets of taus: quadratic ones, and all subsets of three networks."""
    log_prior_C = log_prior(counts_C)
    x_N2, labels_N = toy.sample(counts_C)
    rows = []
    for taus in sets:
        logits_EGC = quadratic_experts(x_N2, labels_N, counts_C, taus=taus)(toy.x_G2)
        rows.append(by_tau_row("quadratic", taus, toy, product(logits_EGC), log_prior_C))
    networks = network_experts(x_N2, labels_N, counts_C, taus=TAUS, seed=0, batch=MANY_BATCH)
    logits_EGC = networks(coarse.x_G2)
    for chosen in ([0], [0, 1], [1], [0, 2], [0, 1, 2], [1, 2], [2]):
        taus = [TAUS[e] for e in chosen]
        rows.append(by_tau_row("networks", taus, coarse, product(logits_EGC[chosen]), log_prior_C))
    return rows


def by_tau_row(experts: str, taus: Sequence[float], toy: Toy, product_GC: np.ndarray, log_prior_C: np.ndarray) -> Row:
    """What theory says of a set of taus, and what its product does."""
    strength = strength_of([1.0] * len(taus), [1 - tau for tau in taus])
    return {
        "experiment": "mean tau", "name": listed(taus), "experts": experts, "mean_tau": float(np.mean(taus)),
        "strength": strength, "predicted": toy.predicted(strength, log_prior_C), "measured": toy.excess(product_GC),
    }  # fmt: skip


def miscalibrations(scale: float) -> dict[str, tuple[list[float], list[float], bool]]:
    """Three ways to scale the experts TAUS: sharpness (E,), bias (E,), and whether training's posterior is scaled."""
    all_, one = [scale] * len(TAUS), [scale, *[1.0] * (len(TAUS) - 1)]
    return {
        "all bare logits": (all_, [scale * (1 - tau) for tau in TAUS], False),
        f"bare logits of τ = {TAUS[0]:g}": (
            one, [a * (1 - tau) for a, tau in zip(one, TAUS, strict=True)], False,
        ),
        "all training posteriors": (all_, [scale - tau for tau in TAUS], True),
    }  # fmt: skip


def by_scale(toy: Toy, logits_EGC: np.ndarray, log_prior_C: np.ndarray, scales: Sequence[float]) -> list[Row]:
    """Experts made miscalibrated, each in three ways, and what theory says of them."""
    rows = []
    for scale in scales:
        for name, (sharpness_E, bias_E, posterior) in miscalibrations(scale).items():
            shift_E1C = np.reshape(TAUS, (-1, 1, 1)) * log_prior_C * posterior
            strength = strength_of(sharpness_E, bias_E)
            rows.append(
                {
                    "experiment": "miscalibrated", "name": name, "scale": scale, "strength": strength,
                    "predicted": toy.predicted(strength, log_prior_C),
                    "measured": toy.excess(product(sharpened(logits_EGC, shift_E1C, sharpness_E))),
                }
            )  # fmt: skip
    return rows


def by_mixup(toy: Toy, counts_C: np.ndarray, *, mixup_alpha: float, seeds: Sequence[int]) -> list[Row]:
    """Networks on few random images, without mixup and with it: calibration of the experts, and excess."""
    log_prior_C = log_prior(counts_C)
    rows = []
    for alpha in (0.0, mixup_alpha):
        for seed in seeds:
            x_N2, labels_N = toy.sample(counts_C, np.random.default_rng([seed, 1]))
            experts = network_experts(x_N2, labels_N, counts_C, taus=TAUS, seed=seed, mixup_alpha=alpha)
            logits_EGC = experts(toy.x_G2)
            fitted = [sharpness_and_bias(toy, logits_GC, log_prior_C) for logits_GC in logits_EGC]
            strength = strength_of(*zip(*fitted, strict=True))
            rows.append(
                {
                    "experiment": "mixup", "name": f"mixup {alpha:g}" if alpha else "no mixup", "experts": "networks",
                    "images": len(x_N2), "seed": seed, "strength": strength,
                    "predicted": toy.predicted(strength, log_prior_C), "measured": toy.excess(product(logits_EGC)),
                    "at_best_prior": at_best_prior(toy, product(logits_EGC), log_prior_C),
                    "sharpness": float(np.mean([sharpness for sharpness, _ in fitted])),
                    "ece": target_ece(toy, experts, TAUS, log_prior_C),
                }
            )  # fmt: skip
    return rows


def by_test_prior(toy: Toy, logits_EGC: np.ndarray, counts_C: np.ndarray, ratio: int) -> list[Row]:
    """Error under other test priors of the product with and without that prior, and of the expert TAUS[0] alone.

    `predicted` is the error of Bayes' rule for that prior, which only who knows the prior can attain.
    """
    rows = []
    for name in (f"forward{ratio}", "uniform", f"backward{ratio}"):
        test_C = distributions.frequencies(name, counts_C, int(counts_C.max()))
        known = posthoc.KnownPrior(test_C).fit(product(logits_EGC)).transform(product(logits_EGC))
        best = toy.error(toy.log_density_GC + log_prior(test_C), test_C / test_C.sum())
        scores = {"as it is": product(logits_EGC), "prior known": known, "cross-entropy": logits_EGC[0]}
        rows += [
            {"experiment": "test prior", "name": name, "experts": version, "predicted": best,
             "measured": toy.error(scores_GC, test_C / test_C.sum())}
            for version, scores_GC in scores.items()
        ]  # fmt: skip
    return rows


def curves(toy: Toy, log_prior_C: np.ndarray, sets: Sequence[Sequence[float]], scales: Sequence[float]) -> list[Row]:
    """What theory says between the points: of mean taus, and of scales."""
    means = [0.0, 2.0, *(float(np.mean(taus)) for taus in sets)]
    rows: list[Row] = [
        {"experiment": "mean tau, theory", "mean_tau": tau, "strength": 1 - tau,
         "predicted": toy.predicted(1 - tau, log_prior_C)} for tau in np.linspace(min(means), max(means), 61)
    ]  # fmt: skip
    for scale in np.geomspace(min(scales), max(scales), 41):
        for name, (sharpness_E, bias_E, _) in miscalibrations(scale).items():
            strength = strength_of(sharpness_E, bias_E)
            rows.append(
                {"experiment": "miscalibrated, theory", "name": name, "scale": scale, "strength": strength,
                 "predicted": toy.predicted(strength, log_prior_C)}
            )  # fmt: skip
    return rows


def run(
    *,
    classes: int,
    imbalance_factor: float,
    many_images: int,
    few_images: Sequence[int],
    taus: Sequence[Sequence[float]],
    scales: Sequence[float],
    mixup_alpha: float,
    seeds: Sequence[int],
    distribution_ratio: int,
) -> list[Row]:
    """All experiments: rows with the keys COLUMNS. The arguments are those of `fisher` in params.yaml."""
    toy, coarse = (Toy(*sunflower(classes), points=points) for points in (FINE, COARSE))
    profile = partial(long_tail.class_counts, "exponential", num_classes=classes, imbalance_factor=imbalance_factor)
    many_C = profile(n_max=many_images)
    logits_EGC = quadratic_experts(*toy.sample(many_C), many_C, taus=TAUS)(toy.x_G2)
    found = [
        *by_mean_tau(toy, coarse, many_C, taus),
        *by_scale(toy, logits_EGC, log_prior(many_C), scales),
        *chain(*(by_mixup(coarse, profile(n_max=few), mixup_alpha=mixup_alpha, seeds=seeds) for few in few_images)),
        *by_test_prior(toy, logits_EGC, many_C, distribution_ratio),
        *curves(coarse, log_prior(many_C), taus, scales),
    ]
    return [dict.fromkeys(COLUMNS) | row for row in found]


def write(settings: Mapping[str, Any], *, out_dir: str) -> list[Row]:
    """Write fisher.csv and fisher.md; returns the rows, for longtail.report.more_plots."""
    rows = run(**settings)
    files.write_csv(f"{out_dir}/fisher.csv", rows, COLUMNS)
    files.write_text(f"{out_dir}/fisher.md", markdown(settings, rows))
    return rows
