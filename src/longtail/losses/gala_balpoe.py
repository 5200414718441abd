"""GALA's margins in BalPoE's experts: no paper has tried it (docs/methods.md says what should add up and what not).

Expert e is trained with its logits shifted by tau_e * log theta_e in place of BalPoE's tau_e * log prior; theta_e (C,)
accumulates the positive gradients of that expert's logits as released GALA does (longtail.losses.gala). For a network
that has learnt nothing yet theta_e is proportional to the class counts, so that both are the same; as training goes on,
theta_e departs from the prior, and the mean bias of the product from uniform.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.losses import BaseLoss
from longtail.losses.balpoe import biases
from longtail.losses.gala import EPSILON
from longtail.workflow import processes
from longtail.workflow.ranges import Biases


class Loss(BaseLoss):
    """Mean over experts of their cross-entropies with GALA's margin times tau_e; taus = [1] is released GALA.

    Args:
        class_counts_C: training images of each class; only their number is used.
        taus: how much of the margin each expert has; there are as many experts.
    """

    tau_E11: Tensor
    positive_EC: Tensor
    theta_EC: Tensor
    step_EC: Tensor

    def __init__(self, class_counts_C: Tensor, *, taus: Biases):
        super().__init__()
        taus = biases(taus)
        self.experts = len(taus)
        zeros_EC = torch.zeros(self.experts, len(class_counts_C), device=class_counts_C.device)
        self.register_buffer(
            "tau_E11", torch.tensor(taus, dtype=torch.float, device=class_counts_C.device).view(-1, 1, 1)
        )
        self.register_buffer("positive_EC", zeros_EC.clone())
        self.register_buffer("theta_EC", zeros_EC.clone())
        self.step_EC = zeros_EC  # empty between steps

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0) -> Tensor:
        """Mean over experts and batch, in nats; in training its gradients are accumulated.

        Raises ValueError when the network has another number of experts than there are taus.
        """
        if len(logits_EBC) != self.experts:
            raise ValueError(f"{len(logits_EBC)} experts for {self.experts} taus")
        adjusted_EBC = logits_EBC + self.tau_E11 * (self.theta_EC + EPSILON).log().unsqueeze(1)
        if self.training:
            self._accumulate(adjusted_EBC.detach(), labels_B, weight)
        labels_EB = labels_B.expand(self.experts, -1)
        return weight * F.cross_entropy(adjusted_EBC.flatten(0, 1), labels_EB.flatten())

    @torch.no_grad()
    def _accumulate(self, adjusted_EBC: Tensor, labels_B: Tensor, weight: float) -> None:
        # of each expert's own mean over the batch, so that theta_e is what it would be in a training of its own
        own_EB = adjusted_EBC.softmax(-1).gather(2, labels_B.view(1, -1, 1).expand(self.experts, -1, 1)).squeeze(2)
        self.step_EC.index_add_(1, labels_B, weight * (1 - own_EB) / len(labels_B))

    @torch.no_grad()
    def after_step(self) -> None:
        """Add the step to the running sum and that to theta (the released double accumulation)."""
        processes.add_up(self.step_EC)
        self.positive_EC += self.step_EC
        self.step_EC.zero_()
        self.theta_EC += self.positive_EC
