"""The toy whose Bayes rule is known, and experts that learn it: what longtail.evaluation.fisher experiments with."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.losses import balpoe

GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


SPREAD, SIZES, STRETCH = 1.25, (0.8, 1.25), 1.6  # of the toy's classes: balanced Bayes error near 30 %


TINY = 1e-9  # mass of a class that the grid leaves out


STEPS = 300  # of LBFGS, at most


GRADIENT = 1e-5  # nats: largest slope at what counts as the minimum


HIDDEN, RATE, UPDATES, BATCH, MANY_BATCH = 64, 1e-2, 1000, 128, 512  # of the networks


Experts = Callable[[np.ndarray], np.ndarray]  # points (N, 2) -> bare logits (E, N, C)


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
