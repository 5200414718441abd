"""Label-distribution-aware margins and deferred re-weighting (Cao et al., NeurIPS 2019, arXiv:1906.07413).

Cross-entropy of the logits with a margin taken off that of the true class (eq. 10-13):

    s * (cos_y - margin_y),   margin_y = max_margin * (smallest n / n_y)^(1/4)

The cosine head (published: s = 30) has multiplied the logits by s already, so s * margin_y is taken off here; with a
linear head s is 1, which is not as published. Re-weighting is as in the
released code: class-balanced weights (longtail.losses.class_balanced) where the paper's algorithm 1 has 1 / n, and the
sum divided by the weights of the batch.
"""

import torch.nn.functional as F
from torch import Tensor

from longtail.losses import BaseLoss, class_balanced
from longtail.workflow.ranges import Fraction, NotNegative, Share


class Loss(BaseLoss):
    """Cross-entropy with margins, later re-weighted; max_margin = 0 with deferred = 1 is cross-entropy.

    Re-weighted it is sum(w * loss) / sum(w) over the batch that it sees: parts of a batch, be they of processes or of
    `accumulate`, are each divided by their own weights.

    Args:
        class_counts_C: training images of each class, all > 0.
        max_margin: margin of the smallest class, as a cosine.
        deferred: share of the epochs, rounded to whole ones, after which re-weighting sets in; 1 is never.
        beta: of the class-balanced weights.
    """

    margin_C: Tensor
    weight_C: Tensor

    def __init__(self, class_counts_C: Tensor, *, max_margin: NotNegative, deferred: Share, beta: Fraction):
        super().__init__()
        counts_C = class_counts_C.double()
        margin_C = max_margin * (counts_C.min() / counts_C) ** 0.25
        self.register_buffer("margin_C", margin_C.float())
        self.register_buffer("weight_C", class_balanced.weights(class_counts_C, beta).float())
        self.deferred = deferred
        self.reweighted = False

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Re-weight from the epoch after the deferred ones: 161 of 200 when deferred is 0.8."""
        self.reweighted = epoch > round(self.deferred * epochs)

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0) -> Tensor:
        """Mean over experts and batch, in nats; weighted in the epochs that are."""
        labels_EB = labels_B.expand(len(logits_EBC), -1)
        shifted_EBC = logits_EBC - F.one_hot(labels_B, len(self.margin_C)) * (self.scale * self.margin_C)
        weight_C = self.weight_C if self.reweighted else None
        return weight * F.cross_entropy(shifted_EBC.flatten(0, 1), labels_EB.flatten(), weight_C)
