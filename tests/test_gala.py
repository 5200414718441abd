"""GALA on real images: its training curve against the published update written out, and what lambda2 does."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from longtail import losses, networks
from longtail.data import batches, long_tail
from longtail.training import engine, inference
from longtail.training.checkpoints import Checkpoint

STEPS, BATCH = 200, 32


@pytest.fixture(scope="module")
def tail() -> tuple[torch.Tensor, torch.Tensor]:
    """Digits with an exponential long tail, IF 20: images (N, 1, 8, 8) in 0..1 and labels (N,)."""
    digits = load_digits()
    counts = long_tail.class_counts("exponential", 150, 10, 20)
    rows = np.concatenate([np.flatnonzero(digits.target == c)[:count] for c, count in enumerate(counts)])
    return torch.from_numpy(digits.images[rows] / 16).unsqueeze(1), torch.from_numpy(digits.target[rows])


def network() -> torch.nn.Module:
    """In float64: else 200 steps of rounding would grow to a per cent."""
    torch.manual_seed(0)
    first, second = torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.Conv2d(16, 32, 3, 2, padding=1)
    layers = [first, torch.nn.BatchNorm2d(16), torch.nn.ReLU(), second, torch.nn.BatchNorm2d(32), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(32 * 16, 10)).double()


def curve(tail, criterion) -> tuple[list[float], list[torch.Tensor]]:
    """The losses of 200 steps of plain SGD, and the weights after them."""
    images, labels = tail
    net = network().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    generator, values = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        rows = torch.randint(len(labels), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = criterion(net(images[rows])[None], labels[rows])
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values, [parameter.detach() for parameter in net.parameters()]


class Published:
    """The released update, written from its description: all of G, a gradient from autograd, margins outside of it."""

    def __init__(self, lambda1: float, lambda2: float):
        self.lambda1, self.lambda2 = lambda1, lambda2
        self.gradients, self.positive, self.negative = (torch.zeros(10, 10, dtype=torch.double) for _ in range(3))

    def __call__(self, logits_EBC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        theta_C, phi_C = self.positive.sum(1), self.negative.sum(0)
        adjusted_BC = logits_EBC[0] + self.lambda1 * torch.log(theta_C + 1e-3)
        adjusted_BC = adjusted_BC - self.lambda2 * torch.log(phi_C[labels_B] + 1e-3)[:, None]
        leaf_BC = adjusted_BC.detach().requires_grad_()
        (gradient_BC,) = torch.autograd.grad(F.cross_entropy(leaf_BC, labels_B), leaf_BC)
        for gradient_C, label in zip(gradient_BC.abs(), labels_B, strict=True):
            self.gradients[:, label] += gradient_C  # [classifier, class of the sample], never reset
        eye = torch.eye(10, dtype=torch.double)
        self.positive += self.gradients * eye
        self.negative += self.gradients * (1 - eye)
        return F.cross_entropy(adjusted_BC, labels_B)


@pytest.mark.parametrize("lambdas", [(1.0, 1.0), (1.2, 0.9)])
def test_two_hundred_steps_are_those_of_the_published_update(tail, lambdas):
    lambda1, lambda2 = lambdas
    loss = losses.load("gala")(
        torch.bincount(tail[1]), variant="released", accumulation="double", lambda1=lambda1, lambda2=lambda2
    ).double()
    loss.step_2C = loss.step_2C.double()

    def ours(logits_EBC, labels_B):
        value = loss(logits_EBC, labels_B)
        loss.after_step()  # the loss itself does not move within a step
        return value

    theirs = Published(lambda1, lambda2)
    (values, weights), (expected, expected_weights) = curve(tail, ours), curve(tail, theirs)
    assert expected[0] > 1.5 and np.mean(expected[-20:]) < 0.5  # it did learn
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss.theta_C, theirs.positive.sum(1), rtol=1e-6, atol=1e-9)
    plain, _ = curve(tail, lambda logits_EBC, labels_B: F.cross_entropy(logits_EBC[0], labels_B))
    assert np.abs(np.subtract(plain, expected)).max() > 0.1  # and the margins matter


def trained(tail, **arguments) -> bytes:
    images, labels = tail
    split = batches.Split((255 * images).round().byte(), labels, 10)
    inference.set_up(0)
    settings = {"variant": "released", "accumulation": "double", "lambda1": 1.0, "lambda2": 1.0, **arguments}
    loss = losses.load("gala")(torch.bincount(labels), **settings)
    net = networks.ResNet(
        channels=1, classes=10, experts=1, depth=8, width=8, head="linear", scale=1.0, mean=[0.3], std=[0.4]
    )
    recipe = {
        "epochs": 2, "batch_size": 32, "drop_last": True, "accumulate": 1,
        "optimizer": {"lr": 0.05, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4,
                      "muon_lr": 0, "muon_weight_decay": 0},
        "schedule": {"warmup_epochs": 0, "shape": "cosine", "milestones": [], "factors": []},
        "weight_average": 0, "sync_batch_norm": False,
        "augmentation": {"crop_padding": 1, "flip": False, "policy": "none", "color_jitter": [0, 0, 0, 0],
                         "rotation": 0, "cutout": 0},
        "resolution": {"milestones": [], "scales": []}, "mixup_alpha": 0, "cutmix_alpha": 0, "precision": "fp32",
    }  # fmt: skip
    return engine.fit(
        net,
        loss,
        split,
        None,
        seed=0,
        checkpoint=Checkpoint(None, ""),
        on_epoch=lambda row: None,
        test_every=0,
        **recipe,
    ).last


def test_lambda2_changes_no_bit_of_the_weights_in_the_released_form(tail):
    assert trained(tail, lambda2=0.0) == trained(tail, lambda2=0.9) == trained(tail, lambda2=5.0)
    assert trained(tail, lambda1=0.5) != trained(tail)


def test_lambda2_does_in_the_papers_form(tail):
    assert trained(tail, variant="paper", lambda2=0.9) != trained(tail, variant="paper", lambda2=1.0)


def test_the_accumulation_matters(tail):
    assert trained(tail, accumulation="plain") != trained(tail)
