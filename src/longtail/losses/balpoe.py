"""Balanced product of experts (Sanchez Aimar et al., CVPR 2023, arXiv:2206.05260).

Expert e is trained with its logits shifted by tau_e * log prior, so its bare logits model a class prior proportional to
prior ** (1 - tau_e): tau 0 keeps the long tail, 1 is uniform, 2 inverts it. The prediction is the mean of the bare
logits (a product of experts, longtail.networks.product); when the taus average to one it aims at the balanced error.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.losses import BaseLoss
from longtail.workflow.ranges import Biases


def biases(taus: Any) -> list[float]:
    """One for each expert: the list, or of {low, high, count} so many at equal distances; one alone in the middle."""
    if not isinstance(taus, dict):
        return list(taus)
    low, high, count = taus["low"], taus["high"], taus["count"]
    return [low + (high - low) * (e / (count - 1) if count > 1 else 0.5) for e in range(count)]


class Loss(BaseLoss):
    """Mean over experts of their logit-adjusted cross-entropies; taus = [0] is cross-entropy.

    Args:
        class_counts_C: training images of each class, all > 0.
        taus: the bias of each expert, see `biases`; there are as many experts.
    """

    shift_E1C: Tensor

    def __init__(self, class_counts_C: Tensor, *, taus: Biases):
        super().__init__()
        taus = biases(taus)
        self.experts = len(taus)
        log_prior_C = (class_counts_C.double() / class_counts_C.sum()).log()
        shift_E1C = torch.tensor(taus, dtype=torch.double).view(-1, 1, 1) * log_prior_C.cpu()
        self.register_buffer("shift_E1C", shift_E1C.float().to(class_counts_C.device))

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0) -> Tensor:
        """Mean over experts and batch, in nats.

        Raises ValueError when the network has another number of experts than there are taus.
        """
        if len(logits_EBC) != self.experts:
            raise ValueError(f"{len(logits_EBC)} experts for {self.experts} taus")
        labels_EB = labels_B.expand(self.experts, -1)
        shifted_EBC = logits_EBC + self.shift_E1C
        return weight * F.cross_entropy(shifted_EBC.flatten(0, 1), labels_EB.flatten())
