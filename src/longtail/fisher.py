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

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn

from longtail import distributions, files, long_tail, metrics, posthoc
from longtail.losses import balpoe
from longtail.predictions import product

GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
SPREAD, SIZES, STRETCH = 1.25, (0.8, 1.25), 1.6  # of the toy's classes: balanced Bayes error near 30 %
TINY = 1e-9  # mass of a class that the grid leaves out
FINE, COARSE = 800, 250  # points along a side: for what theory gives exactly, and for networks and curves
TAUS = [0.0, 1.0, 2.0]  # BalPoE's own, where one set is enough
STEPS = 300  # of LBFGS, at most
GRADIENT = 1e-5  # nats: largest slope at what counts as the minimum
HIDDEN, RATE, UPDATES, BATCH, MANY_BATCH = 64, 1e-2, 1000, 128, 512  # of the networks
TEST_SAMPLES, ECE_BINS = 40_000, 15
COLUMNS = ("experiment", "name", "experts", "mean_tau", "scale", "images", "seed", "strength", "predicted", "measured",
           "at_best_prior", "sharpness", "ece")  # fmt: skip

Row = dict[str, Any]
Experts = Callable[[np.ndarray], np.ndarray]  # points (N, 2) -> bare logits (E, N, C)


# ------------------------------------------------------------------------------------------------ the toy


class Toy:
    """Gaussian classes in the plane, and a grid on which errors are sums.

    Args:
        mean_C2: the classes' means.
        factor_C22: x = mean + factor @ standard normal; the covariance is factor @ factor.T.
        points: of the grid along each side.

    Attributes:
        x_G2: the grid, but for points where every class's density is below TINY of its peak: in the plane that leaves
            out the mass TINY of each class.
        log_density_GC: log p(x|y) in nats.
        mass_GC: p(x|y) times the area of a cell; its sum over the grid is 1.
    """

    def __init__(self, mean_C2: np.ndarray, factor_C22: np.ndarray, *, points: int):
        self.mean_C2, self.factor_C22 = mean_C2, factor_C22
        sd_C2 = np.sqrt(np.square(factor_C22).sum(2)) * math.sqrt(-2 * math.log(TINY))
        low_2, high_2 = (mean_C2 - sd_C2).min(0), (mean_C2 + sd_C2).max(0)
        step_2 = (high_2 - low_2) / points
        sides = [low + step * (np.arange(points) + 0.5) for low, step in zip(low_2, step_2, strict=True)]
        x_G2 = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2)
        log_density_GC = self.log_density(x_G2)
        inside_G = (log_density_GC - self.log_density(mean_C2).diagonal()).max(1) > math.log(TINY)
        self.x_G2, self.log_density_GC = x_G2[inside_G], log_density_GC[inside_G]
        self.mass_GC = np.exp(self.log_density_GC) * step_2.prod()
        self.bayes_error = self.error(self.log_density_GC)

    @property
    def classes(self) -> int:
        """C."""
        return len(self.mean_C2)

    def log_density(self, x_N2: np.ndarray) -> np.ndarray:
        """log p(x|y) (N, C), in nats."""
        standard_NC2 = np.einsum("cij,ncj->nci", np.linalg.inv(self.factor_C22), x_N2[:, None] - self.mean_C2)
        log_peak_C = -np.log(2 * np.pi * np.abs(np.linalg.det(self.factor_C22)))
        return log_peak_C - np.square(standard_NC2).sum(2) / 2

    def sample(self, counts_C: np.ndarray, rng: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        """So many points (N, 2) of each class, and their labels (N,).

        Without `rng` they lie on a spiral, as evenly as the density has it: the error that a random sample adds is
        then nearly gone (quasi-Monte Carlo), with counts that are still those of a long tail.
        """
        labels_N = np.repeat(np.arange(self.classes), counts_C)
        if rng is None:
            standard_N2 = np.concatenate([spiral(int(count)) for count in counts_C])
        else:
            standard_N2 = rng.standard_normal((len(labels_N), 2))
        return self.mean_C2[labels_N] + np.einsum("nij,nj->ni", self.factor_C22[labels_N], standard_N2), labels_N

    def error(self, scores_GC: np.ndarray, prior_C: np.ndarray | None = None) -> float:
        """Error of the rule argmax of scores under a class prior; of the uniform one it is the balanced error."""
        if prior_C is None:
            prior_C = np.full(self.classes, 1 / self.classes)
        chosen_G = scores_GC.argmax(1)
        right_G = np.take_along_axis(self.mass_GC, chosen_G[:, None], 1)[:, 0]
        return float(1 - (right_G * prior_C[chosen_G]).sum())

    def excess(self, scores_GC: np.ndarray) -> float:
        """Balanced error above that of Bayes' rule."""
        return self.error(scores_GC) - self.bayes_error

    def predicted(self, strength: float, log_prior_C: np.ndarray) -> float:
        """Excess of Bayes' rule for the prior ** strength: what theory says of a product of that strength."""
        return self.excess(self.log_density_GC + strength * log_prior_C)


def sunflower(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Means (C, 2) and factors (C, 2, 2) of the toy: turned ellipses of two sizes, placed as the seeds of a sunflower.

    There neighbours are classes of unlike size, so that the prior matters on every border; nothing is symmetric.
    """
    place_C = np.arange(classes)
    mean_C2 = SPREAD * np.sqrt(place_C + 0.5)[:, None] * turned(GOLDEN_ANGLE * place_C)[:, :, 0]
    axes_C12 = np.take(SIZES, place_C % 2)[:, None, None] * np.array([STRETCH**0.5, STRETCH**-0.5])
    return mean_C2, turned(2 * GOLDEN_ANGLE * place_C) * axes_C12


def turned(angle_C: np.ndarray) -> np.ndarray:
    """Rotations (C, 2, 2) by angles in radians."""
    cos_C, sin_C = np.cos(angle_C), np.sin(angle_C)
    return np.stack([np.stack([cos_C, -sin_C], -1), np.stack([sin_C, cos_C], -1)], 1)


def spiral(count: int) -> np.ndarray:
    """Points (count, 2) that are spread as a standard normal: Box and Muller's radii, turned by the golden angle."""
    place = np.arange(count)
    radius = np.sqrt(-2 * np.log((place + 0.5) / count))
    return radius[:, None] * np.stack([np.cos(GOLDEN_ANGLE * place), np.sin(GOLDEN_ANGLE * place)], 1)


def log_prior(counts_C: np.ndarray) -> np.ndarray:
    """log of the classes' shares (C,), in nats."""
    return np.log(counts_C / counts_C.sum())


# -------------------------------------------------------------------------------------------- the experts


def quadratic_experts(
    x_N2: np.ndarray, labels_N: np.ndarray, counts_C: np.ndarray, *, taus: Sequence[float]
) -> Experts:
    """Experts whose logits are quadratic in x, as the toy's log-densities are, at the minimum of BalPoE's loss.

    The loss is convex in them, so it does not matter where LBFGS starts; it starts at 0. Each class has features that
    are white over its own images, which is close to what Newton's method would do: 50 steps instead of thousands.

    Raises ValueError where that minimum is not reached.
    """
    features_NF = quadratic(x_N2)
    grams_CFF = [features_NF[labels_N == c].T @ features_NF[labels_N == c] for c in range(len(counts_C))]
    white_CFF = torch.from_numpy(np.linalg.inv(np.linalg.cholesky(np.stack(grams_CFF) / len(labels_N))))
    loss = balpoe.Loss(torch.from_numpy(counts_C), taus=list(taus))
    features, labels = torch.from_numpy(features_NF), torch.from_numpy(labels_N)
    weight_EFC = torch.zeros(len(taus), features.shape[1], len(counts_C), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_EFC], max_iter=STEPS, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=GRADIENT / 100, tolerance_change=1e-13,
    )  # fmt: skip

    def plain() -> Tensor:
        return torch.einsum("cgf,egc->efc", white_CFF, weight_EFC)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss(features @ plain(), labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    closure()
    assert weight_EFC.grad is not None
    slope = float(weight_EFC.grad.abs().max())
    if not slope < GRADIENT:
        raise ValueError(
            f"taus {list(taus)}: after {STEPS} steps of LBFGS the slope is {slope:.1e}, not below {GRADIENT}"
        )
    plain_EFC = plain().detach().numpy()
    return lambda x_M2: quadratic(x_M2) @ plain_EFC


def quadratic(x_N2: np.ndarray) -> np.ndarray:
    """The features (N, 6) 1, x, y, xx, xy, yy."""
    x_N, y_N = x_N2.T
    return np.stack([np.ones(len(x_N2)), x_N, y_N, x_N**2, x_N * y_N, y_N**2], axis=1)


class Networks(nn.Module):
    """Perceptrons of two hidden layers, one an expert, that share nothing; each starts from numbers of its own (He)."""

    def __init__(self, experts: int, classes: int, generator: torch.Generator):
        super().__init__()
        sizes = list(pairwise((2, HIDDEN, HIDDEN, classes)))
        draws = [torch.randn(experts, a, b, generator=generator) * math.sqrt(2 / a) for a, b in sizes]
        self.weights = nn.ParameterList(draws)
        self.biases = nn.ParameterList([torch.zeros(experts, 1, b) for _, b in sizes])

    def forward(self, x_B2: Tensor) -> Tensor:
        """Bare logits (E, B, C)."""
        hidden = x_B2.expand(len(self.weights[0]), -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = F.silu(torch.baddbmm(bias, hidden, weight))
        return torch.baddbmm(self.biases[-1], hidden, self.weights[-1])


def network_experts(
    x_N2: np.ndarray,
    labels_N: np.ndarray,
    counts_C: np.ndarray,
    *,
    taus: Sequence[float],
    seed: int,
    batch: int = BATCH,
    mixup_alpha: float = 0.0,
) -> Experts:
    """Small networks trained with BalPoE's loss: Adam, the rate a half cosine to 0, UPDATES steps.

    Mixup as in BalPoE: one weight ~ Beta(alpha, alpha) a batch, each image with another of the batch, the loss of both
    labels. The same seed has the same start and the same batches, mixed or not.
    """
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    middle_2, scale_2 = x_N2.mean(0), x_N2.std(0)

    def standard(x_M2: np.ndarray) -> Tensor:
        return torch.from_numpy((x_M2 - middle_2) / scale_2).float()

    x, labels = standard(x_N2), torch.from_numpy(labels_N)
    networks = Networks(len(taus), len(counts_C), generator)
    loss = balpoe.Loss(torch.from_numpy(counts_C), taus=list(taus))
    optimizer = torch.optim.Adam(networks.parameters(), lr=RATE, fused=True)
    order = torch.empty(0, dtype=torch.long)
    for update in range(UPDATES):
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * update / UPDATES)) / 2
        if len(order) < batch:
            order = torch.randperm(len(x), generator=generator)
        chosen, order = order[:batch], order[batch:]
        x_B2, labels_B = x[chosen], labels[chosen]
        if mixup_alpha:
            weight, partner = float(rng.beta(mixup_alpha, mixup_alpha)), torch.from_numpy(rng.permutation(len(x_B2)))
            logits_EBC = networks(weight * x_B2 + (1 - weight) * x_B2[partner])
            value = loss(logits_EBC, labels_B, weight) + loss(logits_EBC, labels_B[partner], 1 - weight)
        else:
            value = loss(networks(x_B2), labels_B)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    def logits(x_M2: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            parts = [networks(part) for part in torch.split(standard(x_M2), 20_000)]
            return torch.cat(parts, dim=1).double().numpy()

    return logits


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
    """Write fisher.csv and fisher.md; returns the rows, for longtail.plots.fisher."""
    rows = run(**settings)
    files.write_csv(f"{out_dir}/fisher.csv", rows, COLUMNS)
    files.write_text(f"{out_dir}/fisher.md", markdown(settings, rows))
    return rows


# ------------------------------------------------------------------------------------------------- the page


def listed(taus: Sequence[float]) -> str:
    """The taus as text."""
    return ", ".join(f"{tau:g}" for tau in taus)


def points(value: float, digits: int = 2) -> str:
    """A fraction in points of percent, without a negative zero."""
    return f"{round(100 * value, digits) + 0.0:.{digits}f}"


def mean_and_sd(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation of fractions, in points."""
    return f"{points(float(np.mean(values)))} ± {points(float(np.std(values, ddof=1)))}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table in Markdown; but for the first `words` columns it is of numbers."""
    lines = [header, ["---"] * words + ["---:"] * (len(header) - words), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def furthest(rows: Sequence[Row]) -> str:
    """The largest distance between measured and predicted, in points."""
    return points(max(abs(row["measured"] - row["predicted"]) for row in rows), 3)


def markdown(settings: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The experiments as tables, with a few sentences each that say what is seen."""

    def of(experiment: str) -> list[Row]:
        return [row for row in rows if row["experiment"] == experiment]

    bayes = next(row["predicted"] for row in of("test prior") if row["name"] == "uniform")
    parts = [
        "# Is the balanced product of experts Fisher-consistent?",
        f"{settings['classes']} Gaussian classes in the plane, imbalance factor {settings['imbalance_factor']:g}; the "
        f"balanced error of Bayes' rule is {points(bayes)} %. Excess is balanced error above that, in points, by "
        "quadrature. Predicted is the excess of Bayes' rule for the class prior ~ prior ** strength, without any "
        "training. [docs/fisher.md](../../docs/fisher.md) says how it is made.",
        *_mean_tau_part(of("mean tau")),
        *_scale_part(of("miscalibrated")),
        *_mixup_part(of("mixup")),
        *_prior_part(of("test prior")),
    ]
    return "\n\n".join(parts) + "\n"


def _mean_tau_part(rows: Sequence[Row]) -> list[str]:
    exact, networks = ([row for row in rows if row["experts"] == name] for name in ("quadratic", "networks"))
    balanced, others = ([row for row in exact if (abs(row["strength"]) < 1e-9) is one] for one in (True, False))
    lines = [
        [row["name"], row["experts"], f"{row['mean_tau']:.3g}", points(row["predicted"]), points(row["measured"]),
         points(row["measured"] - row["predicted"])] for row in rows
    ]  # fmt: skip
    seen = [
        f"Quadratic experts with taus that average to one attain Bayes' balanced error, all {len(balanced)} sets "
        f"within {furthest(balanced)} points."
    ]
    if others:
        least = points(min(row["predicted"] for row in others))
        seen.append(f"The other sets miss it by what is predicted, {least} points and more, within {furthest(others)}.")
    seen.append(f"Networks, in all subsets of one training, lie within {furthest(networks)} points of the prediction.")
    return [
        "## The mean of the taus decides",
        " ".join(seen),
        table(["taus", "experts", "mean tau", "predicted", "measured", "difference"], lines, words=2),
        "Quadratic experts can take tau log prior into their constant, so that all sets with the same mean come to the "
        "same rule: the theorem at work, up to the estimation error that is left. Networks are not so tied: each "
        "starts from numbers of its own.",
    ]


def _scale_part(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(row["name"] for row in rows))
    found = {(row["name"], row["scale"]): row for row in rows}
    lines = [
        [f"{scale:g}", *(points(found[name, scale][key]) for name in names for key in ("predicted", "measured"))]
        for scale in dict.fromkeys(row["scale"] for row in rows)
    ]
    return [
        "## Which calibration is needed",
        f"Experts with taus {listed(TAUS)} are made sharper by a factor; the product misses by what is predicted, "
        f"within {furthest(rows)} points. To scale all bare logits alike costs nothing, though no expert is calibrated "
        "then: for the argmax it is enough that experts agree in sharpness. One expert alone draws the product to its "
        "side. To scale training posteriors, which are what the loss sees, logits + tau log prior, leans all experts "
        "alike: strength is 1 - mean tau / factor, to the head where they are too confident, to the tail where they "
        "are not confident enough.",
        table(["factor", *(f"{name}, {key}" for name in names for key in ("predicted", "measured"))], lines),
    ]


def _mixup_part(rows: Sequence[Row]) -> list[str]:
    lines, seen = [], []
    for images in dict.fromkeys(row["images"] for row in rows):
        by_name: dict[str, list[Row]] = {}
        for row in rows:
            if row["images"] == images:
                by_name.setdefault(row["name"], []).append(row)
        for name, same in by_name.items():
            strength, sharpness = (np.mean([row[key] for row in same]) for key in ("strength", "sharpness"))
            lines.append(
                [
                    str(images), name, mean_and_sd([row["ece"] for row in same]),
                    f"{sharpness:.2f}", f"{strength:+.2f}",
                    mean_and_sd([row["measured"] for row in same]),
                    mean_and_sd([prior_part(row) for row in same]),
                    mean_and_sd([row["predicted"] for row in same]),
                ]
            )  # fmt: skip
        (_, without), (name, mixed) = by_name.items()
        measures: dict[str, Callable[[Row], float]] = {
            "ECE": itemgetter("ece"), "excess": itemgetter("measured"), "the prior's part of it": prior_part,
        }  # fmt: skip
        changes = [
            f"{what} {changed([of(b) - of(a) for a, b in zip(without, mixed, strict=True)])}"
            for what, of in measures.items()
        ]
        seen.append(f"With {images} images {name} changes: {', '.join(changes)}.")
    header = ["images", "", "ECE", "sharpness", "strength", "excess", "the prior's part", "predicted of strength"]
    return [
        "## Experts that over-fit, and mixup",
        f"Networks with taus {listed(TAUS)} on few random images, {len({row['seed'] for row in rows})} seeds; points, "
        "mean ± standard deviation. Changes are paired by seed, ± standard error; settled is what is above two of it. "
        + " ".join(seen),
        table(header, lines, words=2),
        "ECE is that of the softmax of bare logits under the expert's own target, mean over the experts. Sharpness a_e "
        "(mean) and strength are fitted: the a_e log p(x|y) + b_e log prior that is nearest to each expert. Sharpness "
        "above 1 is over-confidence, strength above 0 leans to the head. The prior's part of the excess is what goes "
        "away with the best multiple of log prior added to the product; the rest is estimation error, which no prior "
        "mends.",
    ]


def prior_part(row: Row) -> float:
    """What of the excess the best multiple of log prior takes away."""
    return float(row["measured"] - row["at_best_prior"])


def changed(changes: Sequence[float]) -> str:
    """How paired seeds change: mean ± standard error in points, and whether that is more than twice the error."""
    mean, error = float(np.mean(changes)), float(np.std(changes, ddof=1)) / len(changes) ** 0.5
    return (
        f"{'+' if mean > 0 else ''}{points(mean)} ± {points(error)}{'' if abs(mean) > 2 * error else ' (not settled)'}"
    )


def _prior_part(rows: Sequence[Row]) -> list[str]:
    versions = list(dict.fromkeys(row["experts"] for row in rows))
    found = {(row["name"], row["experts"]): row for row in rows}
    lines = [
        [name, points(found[name, versions[0]]["predicted"])]
        + [points(found[name, version]["measured"]) for version in versions]
        for name in dict.fromkeys(row["name"] for row in rows)
    ]
    known = [row for row in rows if row["experts"] == "prior known"]
    return [
        "## Other test priors",
        f"Error in percent under each test prior. The product with taus {listed(TAUS)} plus log test prior attains "
        f"Bayes' rule for that prior within {furthest(known)} points; cross-entropy is the expert with tau 0.",
        table(["test prior", "Bayes", *versions], lines),
    ]
