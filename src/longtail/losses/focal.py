"""Focal loss (Lin et al., ICCV 2017, arXiv:1708.02002, eq. 4) in its softmax form, as in LDAM's released code.

The paper has sigmoids and a weight alpha; here p is the softmax's, and there is no alpha: classes weigh the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.losses import BaseLoss
from longtail.workflow.ranges import NotNegative


class Loss(BaseLoss):
    """Mean of (1 - p)^gamma times cross-entropy, p the probability of the true class; gamma = 0 is cross-entropy.

    Args:
        class_counts_C: not used.
        gamma: how much less what is already right counts.
    """

    def __init__(self, class_counts_C: Tensor, *, gamma: NotNegative):
        super().__init__()
        self.gamma = gamma

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0) -> Tensor:
        """Mean over experts and batch, in nats."""
        labels_EB = labels_B.expand(len(logits_EBC), -1)
        loss_N = F.cross_entropy(logits_EBC.flatten(0, 1), labels_EB.flatten(), reduction="none")
        # for gamma < 1 the power has no slope at p = 1, and 0 * inf would be the gradient there
        wrong_N = (-torch.expm1(-loss_N)).clamp(min=torch.finfo(loss_N.dtype).tiny)
        return weight * (wrong_N**self.gamma * loss_N).mean()
