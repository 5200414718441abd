"""Each loss against a slow twin in the paper's notation, its limits, its gradient, and extreme inputs."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtail import losses, params

FOLDER = Path(losses.__file__).parent
METHODS = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__init__")
ARGUMENTS = {
    "ce": {},
    "balanced_softmax": {"tau": 1.0},
    "gala": {"lambda1": 1.0, "lambda2": 1.0},
    "balpoe": {"taus": [0.0, 1.0, 2.0]},
}
COUNTS_C = torch.tensor([60, 25, 9, 3, 1])


def case(experts: int = 1, batch: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_EBC = 3 * torch.randn(experts, batch, len(COUNTS_C), generator=generator)
    return logits_EBC, torch.randint(len(COUNTS_C), (batch,), generator=generator)


def cross_entropy_twin(logits: list[float], label: int) -> float:
    return -math.log(math.exp(logits[label]) / sum(math.exp(z) for z in logits))


def test_every_loss_of_the_folder_is_tested_here():
    assert set(ARGUMENTS) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_arguments_fit_the_schema_read_off_the_file(method):
    schema = params.signature_block(FOLDER / f"{method}.py", "Loss.__init__")
    assert schema.model_validate(ARGUMENTS[method]).model_dump() == ARGUMENTS[method]
    assert set(schema.model_fields) == set(ARGUMENTS[method])


def test_cross_entropy_is_its_twin():
    logits_EBC, labels_B = case()
    expected = [cross_entropy_twin(z.tolist(), y) for z, y in zip(logits_EBC[0], labels_B.tolist(), strict=True)]
    value = losses.load("ce")(COUNTS_C)(logits_EBC, labels_B)
    assert value.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0, 2.0])
def test_balanced_softmax_is_its_twin(tau):
    logits_EBC, labels_B = case()
    total = COUNTS_C.sum().item()
    expected = 0.0
    for z, y in zip(logits_EBC[0].tolist(), labels_B.tolist(), strict=True):
        shifted = [z[c] + tau * math.log(COUNTS_C[c].item() / total) for c in range(len(z))]
        expected += cross_entropy_twin(shifted, y) / len(labels_B)
    value = losses.load("balanced_softmax")(COUNTS_C, tau=tau)(logits_EBC, labels_B)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_balpoe_is_its_twin():
    taus = [0.0, 1.0, 2.0]
    logits_EBC, labels_B = case(experts=3)
    expected = [
        losses.load("balanced_softmax")(COUNTS_C, tau=tau)(logits_EBC[e : e + 1], labels_B).item()
        for e, tau in enumerate(taus)
    ]
    value = losses.load("balpoe")(COUNTS_C, taus=taus)(logits_EBC, labels_B)
    assert value.item() == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_balpoe_refuses_another_number_of_experts():
    with pytest.raises(ValueError, match="2 experts for 3 taus"):
        losses.load("balpoe")(COUNTS_C, taus=[0.0, 1.0, 2.0])(*case(experts=2))


class GalaTwin:
    """The released update in plain loops over samples and classes, with the gradient from autograd."""

    def __init__(self, classes: int, lambda1: float, lambda2: float):
        self.gradients = [[0.0] * classes for _ in range(classes)]  # [classifier][class of the sample]
        self.theta, self.phi = [0.0] * classes, [0.0] * classes
        self.lambda1, self.lambda2 = lambda1, lambda2

    def step(self, logits_BC: Tensor, labels_B: Tensor) -> float:
        adjusted_BC = logits_BC.double().detach().clone()
        for i, y in enumerate(labels_B.tolist()):
            for j in range(len(self.theta)):
                adjusted_BC[i, j] += self.lambda1 * math.log(self.theta[j] + 1e-3)
                adjusted_BC[i, j] -= self.lambda2 * math.log(self.phi[y] + 1e-3)
        adjusted_BC.requires_grad_()
        loss = sum(-adjusted_BC[i].log_softmax(0)[y] for i, y in enumerate(labels_B.tolist())) / len(labels_B)
        (gradient_BC,) = torch.autograd.grad(loss, adjusted_BC)
        for i, y in enumerate(labels_B.tolist()):
            for j in range(len(self.theta)):
                self.gradients[j][y] += abs(gradient_BC[i, j].item())
        for k in range(len(self.theta)):
            self.theta[k] += self.gradients[k][k]
            self.phi[k] += sum(self.gradients[j][k] for j in range(len(self.theta)) if j != k)
        return loss.item()


def test_gala_is_its_twin_over_fifty_steps():
    loss = losses.load("gala")(COUNTS_C, lambda1=1.2, lambda2=0.9)
    twin = GalaTwin(len(COUNTS_C), 1.2, 0.9)
    for step in range(50):
        logits_EBC, labels_B = case(seed=step)
        value = loss(logits_EBC, labels_B)
        loss.after_step()
        assert value.item() == pytest.approx(twin.step(logits_EBC[0], labels_B), rel=1e-4)
    assert loss.theta_C.tolist() == pytest.approx(twin.theta, rel=1e-4)
    assert loss.phi_C.tolist() == pytest.approx(twin.phi, rel=1e-4)


def test_gala_positive_and_negative_gradients_coincide():
    loss = losses.load("gala")(COUNTS_C, lambda1=1.0, lambda2=1.0)
    for step in range(20):
        loss(*case(seed=step))
        loss.after_step()
    torch.testing.assert_close(loss.theta_C, loss.phi_C, rtol=1e-5, atol=1e-6)


def test_gala_lambda2_has_no_effect_and_lambda1_has():
    def gradients(lambda1: float, lambda2: float) -> Tensor:
        loss = losses.load("gala")(COUNTS_C, lambda1=lambda1, lambda2=lambda2)
        for step in range(5):
            loss(*case(seed=step))
            loss.after_step()
        logits_EBC, labels_B = case(seed=9)
        logits_EBC.requires_grad_()
        return torch.autograd.grad(loss(logits_EBC, labels_B), logits_EBC)[0]

    torch.testing.assert_close(gradients(1, 0), gradients(1, 5), rtol=1e-4, atol=1e-6)
    assert (gradients(1, 1) - gradients(0, 1)).abs().max() > 1e-3


def test_gala_accumulates_in_training_only():
    loss = losses.load("gala")(COUNTS_C, lambda1=1.0, lambda2=1.0).eval()
    loss(*case())
    loss.after_step()
    assert loss.theta_C.sum() == 0


def test_gala_under_mixup_accumulates_each_label_by_its_weight():
    logits_EBC, labels_B = case()
    whole, parts = (losses.load("gala")(COUNTS_C, lambda1=1.0, lambda2=1.0) for _ in range(2))
    whole(logits_EBC, labels_B)
    parts(logits_EBC, labels_B, 0.3)
    parts(logits_EBC, labels_B, 0.7)
    torch.testing.assert_close(whole.positive_C, parts.positive_C)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("balanced_softmax", {"tau": 0.0}),
        ("balpoe", {"taus": [0.0]}),
        ("gala", {"lambda1": 0.0, "lambda2": 0.0}),
        ("gala", {"lambda1": 1.0, "lambda2": 1.0}),  # before its first step every margin is the same
    ],
)
def test_limits_are_cross_entropy(method, arguments):
    logits_EBC, labels_B = case()
    expected = losses.load("ce")(COUNTS_C)(logits_EBC, labels_B)
    torch.testing.assert_close(losses.load(method)(COUNTS_C, **arguments)(logits_EBC, labels_B), expected)


@pytest.mark.parametrize("method", ["balanced_softmax", "balpoe"])
def test_uniform_counts_are_cross_entropy(method):
    logits_EBC, labels_B = case(experts=len(ARGUMENTS["balpoe"]["taus"]) if method == "balpoe" else 1)
    uniform_C = torch.full((5,), 12)
    value = losses.load(method)(uniform_C, **ARGUMENTS[method])(logits_EBC, labels_B)
    torch.testing.assert_close(value, losses.load("ce")(uniform_C)(logits_EBC, labels_B))


@pytest.mark.parametrize("method", METHODS)
def test_gradient(method):
    loss = losses.load(method)(COUNTS_C, **ARGUMENTS[method]).eval().double()
    logits_EBC, labels_B = case(experts=loss.experts, batch=3)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels_B), logits_EBC.double().requires_grad_())


@pytest.mark.parametrize("method", METHODS)
def test_relabelling_the_classes_changes_nothing(method):
    order = torch.tensor([3, 1, 4, 0, 2])
    loss, permuted = (losses.load(method)(counts, **ARGUMENTS[method]) for counts in (COUNTS_C, COUNTS_C[order]))
    for step in range(3):
        logits_EBC, labels_B = case(experts=loss.experts, seed=step)
        a = loss(logits_EBC, labels_B)
        b = permuted(logits_EBC[:, :, order], order.argsort()[labels_B])
        torch.testing.assert_close(a, b)
        loss.after_step()
        permuted.after_step()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extremes_stay_finite(method, size):
    counts_C = torch.ones(10_000, dtype=torch.long)
    counts_C[0] = 100_000
    loss = losses.load(method)(counts_C, **ARGUMENTS[method])
    logits_EBC = torch.zeros(loss.experts, 4, len(counts_C))
    logits_EBC[:, :, 5] = size
    logits_EBC.requires_grad_()
    for _ in range(3):
        value = loss(logits_EBC, torch.tensor([0, 5, 9_999, 17]))
        (gradient,) = torch.autograd.grad(value, logits_EBC)
        loss.after_step()
        assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_weight_scales_the_loss(method):
    loss = losses.load(method)(COUNTS_C, **ARGUMENTS[method])
    logits_EBC, labels_B = case(experts=loss.experts)
    torch.testing.assert_close(loss(logits_EBC, labels_B, 0.25), 0.25 * loss(logits_EBC, labels_B))
