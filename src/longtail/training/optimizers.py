"""Optimisers: SGD, and Muon for the weights of convolutions where a recipe asks for it.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) takes the momentum of a weight as a matrix and
steps along the nearest one whose singular values are all equal, found by a few matrix products. PyTorch's own
(torch.optim.Muon) takes matrices alone, one at a time; here all convolutions of one shape are done together.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# of the quintic of the post: x -> a x + b x^3 + c x^5 drives singular values in (0, 1] to about 1 (0.7 to 1.2)
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
EPSILON = 1e-7


def build(parameters: Iterable[nn.Parameter], **settings: Any) -> list[torch.optim.Optimizer]:
    """The optimisers of a recipe's block `optimizer`; each parameter belongs to one of them.

    Every group has its `base_lr`, which a schedule multiplies.
    """
    muon_lr, muon_weight_decay = settings.pop("muon_lr"), settings.pop("muon_weight_decay")
    by_muon: list[nn.Parameter] = []
    by_sgd: list[nn.Parameter] = []
    for parameter in parameters:
        (by_muon if muon_lr and parameter.ndim == 4 else by_sgd).append(parameter)
    built: list[torch.optim.Optimizer] = [torch.optim.SGD(by_sgd, **settings, fused=True)]
    if by_muon:
        momentum = {key: settings[key] for key in ("momentum", "nesterov")}
        built.append(Muon(by_muon, lr=muon_lr, weight_decay=muon_weight_decay, **momentum))
    for optimizer in built:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return built


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for weights (out, in, height, width) of convolutions.

    With g the gradient, W the weight as a matrix (out, in * height * width), n and m its sides:

        V <- momentum * V + g;   U = g + momentum * V (Nesterov) or V
        W <- (1 - lr * weight_decay) * W - lr * sqrt(max(1, n / m)) * orthogonal(U)
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, momentum: float, nesterov: bool, weight_decay: float
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for shape, weights in alike.items():
                updates = orthogonal(torch.stack([self._update(weight, group).flatten(1) for weight in weights]))
                lr = group["lr"] * max(1.0, updates.shape[1] / updates.shape[2]) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, [*updates.view(-1, *shape)], alpha=-lr)

    def _update(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        state, gradient = self.state[weight], weight.grad
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        average: Tensor = state["momentum"].mul_(group["momentum"]).add_(gradient)
        return gradient.add(average, alpha=group["momentum"]) if group["nesterov"] else average


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (N, n, m) with their singular vectors, and singular values near 1 (0.7 to 1.2); in float32.

    Newton-Schulz: X <- a X + b X X'X + c X (X'X)^2, from X of Frobenius norm 1. What multiplies X is a polynomial
    of the first X X', so the iteration runs on that small matrix, and X itself is multiplied once, at the end.
    """
    x = matrices.float()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + EPSILON)
    gram = x @ x.mT  # of X as it is by now
    factor = None  # X as it is by now = factor @ the first X
    for iteration in range(ITERATIONS):
        step = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        step.diagonal(dim1=1, dim2=2).add_(A)
        factor = step if factor is None else step @ factor
        if iteration < ITERATIONS - 1:
            gram = step @ gram @ step
    assert factor is not None
    x = factor @ x
    return x if wide else x.mT
