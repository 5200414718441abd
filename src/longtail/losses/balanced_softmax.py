"""Balanced softmax (Ren et al., NeurIPS 2020, arXiv:2007.10740, eq. 4), with the strength of logit adjustment.

Cross-entropy of logits + tau * log prior (Menon et al., ICLR 2021, arXiv:2007.07314, eq. 10; tau = 1 is balanced
softmax). In training the prior explains the imbalance, so that the bare logits do not have to.
"""

import torch.nn.functional as F
from torch import Tensor

from longtail.losses import BaseLoss


class Loss(BaseLoss):
    """Cross-entropy of logits shifted by tau * log prior; tau = 0 is cross-entropy.

    Args:
        class_counts_C: training images of each class, all > 0.
        tau: strength of the shift.
    """

    shift_C: Tensor

    def __init__(self, class_counts_C: Tensor, *, tau: float):
        super().__init__()
        prior_C = class_counts_C.double() / class_counts_C.sum()
        self.register_buffer("shift_C", (tau * prior_C.log()).float())

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0) -> Tensor:
        """Mean over experts and batch, in nats."""
        labels_EB = labels_B.expand(len(logits_EBC), -1)
        shifted_EBC = logits_EBC + self.shift_C
        return weight * F.cross_entropy(shifted_EBC.flatten(0, 1), labels_EB.flatten())
