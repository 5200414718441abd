"""Gradient-aware logit adjustment (Zhang et al., ICASSP 2024, arXiv:2403.09036), as the authors released it.

Cross-entropy of   z + lambda1 * log(theta + 0.001) - lambda2 * log(phi[label] + 0.001),   added to every class, the
true one included. theta (C,) accumulates the positive gradients of each class's logit and phi (C,) the negative
gradients that the samples of each class cause:

    after each step, with g = |d loss / d z| (B, C):   G[j, c] += sum over samples of class c of g[:, j]
                                                       theta += diagonal of G;   phi += column sums of G off it

so what goes into theta is the running sum G again at each step: early gradients count more, as in the released code.
For cross-entropy the gradients of a sample sum to zero, hence phi = theta; and the phi term is the same for all
classes, so it cancels in the softmax: lambda2 has no effect in this form. tests/test_losses.py shows both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail import processes
from longtail.losses import BaseLoss
from longtail.ranges import NotNegative

EPSILON = 1e-3  # the released constant; also the margin before the first step


class Loss(BaseLoss):
    """Cross-entropy with margins from accumulated gradients; lambda1 = lambda2 = 0 is cross-entropy.

    Only the diagonal and the column sums of G are ever used, so only they are kept: O(C), not O(C * C).

    Args:
        class_counts_C: training images of each class; only their number is used.
        lambda1: strength of the positive-gradient margin.
        lambda2: strength of the negative-gradient margin (without effect, see above).
    """

    positive_C: Tensor
    negative_C: Tensor
    theta_C: Tensor
    phi_C: Tensor
    step_2C: Tensor

    def __init__(self, class_counts_C: Tensor, *, lambda1: NotNegative, lambda2: NotNegative):
        super().__init__()
        self.lambda1, self.lambda2 = lambda1, lambda2
        for name in ("positive_C", "negative_C", "theta_C", "phi_C"):
            zeros_C = torch.zeros(len(class_counts_C), device=class_counts_C.device)
            self.register_buffer(name, zeros_C)
        self.step_2C = torch.zeros(2, len(class_counts_C), device=class_counts_C.device)  # empty between steps

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0) -> Tensor:
        """Mean over experts and batch, in nats; in training its gradients are added to G."""
        margin_C = self.lambda1 * (self.theta_C + EPSILON).log()
        margin_B1 = self.lambda2 * (self.phi_C + EPSILON).log()[labels_B].unsqueeze(1)
        adjusted_EBC = logits_EBC + margin_C - margin_B1
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
        negative_B = weight * (probability_EBC.sum(2) - own_EB).sum(0) / (experts * batch)
        self.step_2C.index_add_(1, labels_B, torch.stack([positive_B, negative_B]))

    @torch.no_grad()
    def after_step(self) -> None:
        """Add the step to the running sums, and those to theta and phi (the released double accumulation)."""
        processes.add_up(self.step_2C)
        self.positive_C += self.step_2C[0]
        self.negative_C += self.step_2C[1]
        self.step_2C.zero_()
        self.theta_C += self.positive_C
        self.phi_C += self.negative_C
