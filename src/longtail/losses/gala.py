"""Gradient-aware logit adjustment (Zhang et al., ICASSP 2024, arXiv:2403.09036), as released and as in the paper.

theta (C,) accumulates the positive gradients of each class's logit, phi (C,) negative ones, z are the logits:

    released    cross-entropy of  z_j + lambda1 log theta_j - lambda2 log phi_label  for every class j
    paper       the same for j != label, and z_label for the label: the margin is on the negatives only
    classifier  as paper, but phi_j is what the samples of other classes do to the logit of class j

In `released` and `paper` phi_k is what the samples of class k do to the logits of the others. After each step, with
g = |d loss / d z| (B, C):

    G[j, c] += sum over samples of class c of g[:, j];   theta += diagonal of G;   phi += column sums of G off it

(`classifier`: row sums). So what goes into theta is the running sum G again at each step: early gradients count more.
That is the released code's `double` accumulation; with `plain`, theta and phi are the sums in G themselves.

For cross-entropy the gradients of a sample sum to zero, hence phi = theta but for `classifier`. The phi term of
`released` is the same for all classes, so it cancels in the softmax: lambda2 has no effect in this form, and with
lambda1 = lambda2 it is `paper`. tests/test_losses.py and tests/test_gala.py show all of it.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.losses import BaseLoss
from longtail.workflow import processes
from longtail.workflow.ranges import NotNegative

EPSILON = 1e-3  # the released constant; also the margin before the first step


class Loss(BaseLoss):
    """Cross-entropy with margins from accumulated gradients; lambda1 = lambda2 = 0 is cross-entropy.

    Only the diagonal and the row or column sums of G are ever used, so only they are kept: O(C), not O(C * C).

    Args:
        class_counts_C: training images of each class; only their number is used.
        variant: which formula, see above.
        accumulation: double | plain.
        lambda1: strength of the positive-gradient margin.
        lambda2: strength of the negative-gradient margin (without effect in `released`).

    Raises ValueError for another variant or accumulation.
    """

    positive_C: Tensor
    negative_C: Tensor
    theta_C: Tensor
    phi_C: Tensor
    step_2C: Tensor

    def __init__(
        self,
        class_counts_C: Tensor,
        *,
        variant: Literal["released", "paper", "classifier"],
        accumulation: Literal["double", "plain"],
        lambda1: NotNegative,
        lambda2: NotNegative,
    ):
        super().__init__()
        if variant not in ("released", "paper", "classifier") or accumulation not in ("double", "plain"):
            given = f"variant = {variant!r}, accumulation = {accumulation!r}"
            raise ValueError(f"{given}: allowed are released, paper or classifier, and double or plain")
        self.variant, self.accumulation = variant, accumulation
        self.lambda1, self.lambda2 = lambda1, lambda2
        for name in ("positive_C", "negative_C", "theta_C", "phi_C"):
            zeros_C = torch.zeros(len(class_counts_C), device=class_counts_C.device)
            self.register_buffer(name, zeros_C)
        self.step_2C = torch.zeros(2, len(class_counts_C), device=class_counts_C.device)  # empty between steps

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0) -> Tensor:
        """Mean over experts and batch, in nats; in training its gradients are added to G."""
        # the released phi term is left out: the softmax is the same without it, and so lambda2 cannot even round
        adjusted_EBC = logits_EBC + self.lambda1 * (self.theta_C + EPSILON).log()
        if self.variant != "released":
            margin_B1 = self.lambda2 * (self.phi_C + EPSILON).log()[labels_B].unsqueeze(1)
            own_BC = F.one_hot(labels_B, logits_EBC.shape[2]).bool()
            adjusted_EBC = torch.where(own_BC, logits_EBC, adjusted_EBC - margin_B1)
        if self.training:
            self._accumulate(adjusted_EBC.detach(), labels_B, weight)
        labels_EB = labels_B.expand(len(logits_EBC), -1)
        return weight * F.cross_entropy(adjusted_EBC.flatten(0, 1), labels_EB.flatten())

    @torch.no_grad()
    def _accumulate(self, adjusted_EBC: Tensor, labels_B: Tensor, weight: float) -> None:
        # d loss / d z = (softmax - one-hot) / (experts * batch): no second backward pass is needed
        experts, batch = adjusted_EBC.shape[:2]
        probability_EBC = adjusted_EBC.softmax(-1)
        own_EB = probability_EBC.gather(2, labels_B.view(1, -1, 1).expand(experts, -1, 1)).squeeze(2)
        positive_B = weight * (1 - own_EB).sum(0) / (experts * batch)
        if self.variant == "classifier":
            others_BC = probability_EBC.sum(0).scatter(1, labels_B.unsqueeze(1), 0)
            self.step_2C[0].index_add_(0, labels_B, positive_B)
            self.step_2C[1] += weight * others_BC.sum(0) / (experts * batch)
        else:
            negative_B = weight * (probability_EBC.sum(2) - own_EB).sum(0) / (experts * batch)
            self.step_2C.index_add_(1, labels_B, torch.stack([positive_B, negative_B]))

    @torch.no_grad()
    def after_step(self) -> None:
        """Add the step to the running sums, and those to theta and phi (or, with `plain`, take them as they are)."""
        processes.add_up(self.step_2C)
        self.positive_C += self.step_2C[0]
        self.negative_C += self.step_2C[1]
        self.step_2C.zero_()
        if self.accumulation == "double":
            self.theta_C += self.positive_C
            self.phi_C += self.negative_C
        else:
            self.theta_C.copy_(self.positive_C)
            self.phi_C.copy_(self.negative_C)
