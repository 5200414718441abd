"""Optimisers: Muon against slow twins and PyTorch's own, and SGD alone where a recipe does not ask for Muon."""

import copy

import pytest
import torch
from torch import nn

from longtail.training import optimizers

pytestmark = pytest.mark.processor
SHAPES = [(4, 3, 3, 3), (8, 4, 3, 3), (8, 4, 3, 3), (40, 4, 3, 3)]  # wide, wide twice, tall
SETTINGS = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def orthogonal_twin(matrix: torch.Tensor) -> torch.Tensor:
    """The iteration as the post has it, on one matrix, in float64."""
    x = matrix.double()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def network() -> nn.Module:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(shape[1], shape[0], 3) for shape in SHAPES]
    return nn.ModuleList([*convolutions, nn.Linear(5, 3)])


def with_gradients(net: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return net


@pytest.mark.parametrize("shape", [(5, 16, 144), (2, 30, 30), (3, 90, 20), (1, 1, 9)])
def test_orthogonal_is_the_iteration_of_the_post(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    twin = torch.stack([orthogonal_twin(matrix) for matrix in matrices])
    torch.testing.assert_close(optimizers.orthogonal(matrices).double(), twin, rtol=0, atol=1e-4)


def test_orthogonal_keeps_singular_vectors_and_evens_out_singular_values():
    matrix = torch.randn(1, 16, 144, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix[0], full_matrices=False)
    found = u.T @ optimizers.orthogonal(matrix)[0] @ v.T
    assert (found - found.diagonal().diag()).abs().max() < 1e-4
    assert found.diagonal().min() > 0.6 and found.diagonal().max() < 1.25


def test_badly_scaled_and_deficient_matrices_stay_finite():
    for scale in (0.0, 1e-30, 1e-12, 1e12):
        rank_one = scale * torch.outer(torch.arange(1.0, 65), torch.arange(1.0, 577))
        assert optimizers.orthogonal(rank_one[None]).abs().max() < 1.3


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_the_formula(nesterov):
    net = network()
    twin = [parameter.detach().double() for parameter in net.parameters()]
    momenta = [torch.zeros_like(weight) for weight in twin]
    built = optimizers.build(
        net.parameters(), **{**SETTINGS, "nesterov": nesterov}, muon_lr=0.02, muon_weight_decay=0.1
    )
    for number in range(3):
        with_gradients(net, number)
        for optimizer in built:
            optimizer.step()
        for i, parameter in enumerate(net.parameters()):
            weight, gradient = twin[i], parameter.grad.double()
            by_muon = parameter.ndim == 4
            gradient = gradient if by_muon else gradient + 5e-4 * weight
            momenta[i] = 0.9 * momenta[i] + gradient
            update = gradient + 0.9 * momenta[i] if nesterov else momenta[i]
            if by_muon:
                rows, columns = parameter.flatten(1).shape
                direction = orthogonal_twin(update.flatten(1)).view_as(weight)
                twin[i] = (1 - 0.02 * 0.1) * weight - 0.02 * max(1, rows / columns) ** 0.5 * direction
            else:
                twin[i] = weight - 0.1 * update
    for parameter, weight in zip(net.parameters(), twin, strict=True):
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-5, atol=1e-5)


def test_steps_are_those_of_pytorch_on_matrices():
    """Its momentum is an average, (1 - momentum) * g, and it computes in bfloat16."""
    weight = nn.Parameter(torch.randn(16, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    matrix = nn.Parameter(weight.detach().flatten(1).clone())
    ours = optimizers.Muon([weight], lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.1)
    theirs = torch.optim.Muon([matrix], lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.1)
    for seed in range(3):
        weight.grad = torch.randn(16, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
        matrix.grad = weight.grad.flatten(1).clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(weight.detach().flatten(1), matrix.detach(), rtol=0, atol=3e-3)


def test_without_muon_all_is_sgd():
    net = network()
    twin = copy.deepcopy(net)
    (ours,) = optimizers.build(net.parameters(), **SETTINGS, muon_lr=0, muon_weight_decay=0)
    theirs = torch.optim.SGD(twin.parameters(), **SETTINGS, fused=True)
    for seed in range(3):
        with_gradients(net, seed)
        with_gradients(twin, seed)
        ours.step()
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_a_weight_without_a_gradient_stays():
    net = network()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    for optimizer in optimizers.build(net.parameters(), **SETTINGS, muon_lr=0.02, muon_weight_decay=0.1):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
