"""Class-balanced loss: weights from the effective number of images (Cui et al., CVPR 2019, arXiv:1901.05555)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.losses import BaseLoss
from longtail.workflow.ranges import Fraction


def weights(class_counts_C: Tensor, beta: float) -> Tensor:
    """One over the effective number (1 - beta^n) / (1 - beta) (eq. 2), times what makes them sum to C.

    In float64. beta = 0 gives ones; towards 1 they tend to inverse frequencies.
    """
    log_beta = torch.tensor(beta, dtype=torch.double).log()
    effective_C = torch.expm1(class_counts_C.double() * log_beta) / (beta - 1)  # 1 - beta^n would cancel
    return len(effective_C) / (effective_C * (1 / effective_C).sum())


class Loss(BaseLoss):
    """Cross-entropy, each image times the weight of its class; beta = 0 or equal counts are cross-entropy.

    Args:
        class_counts_C: training images of each class, all > 0.
        beta: how soon more images of a class add nothing new: after about 1 / (1 - beta).
        divide_by: the sum over the batch is divided by the number of its `images`, as in the paper's code: then a batch
            without rare images has next to no gradient; or by their `weights`, as in LDAM's code: those of the part of
            a batch that a process sees at a time, so that more parts are another loss.

    Raises ValueError for another `divide_by`, and for a beta outside [0, 1).
    """

    weight_C: Tensor

    def __init__(self, class_counts_C: Tensor, *, beta: Fraction, divide_by: Literal["images", "weights"]):
        super().__init__()
        if divide_by not in ("images", "weights") or not 0 <= beta < 1:
            raise ValueError(
                f"divide_by = {divide_by!r}, beta = {beta}: allowed are images or weights, and 0 <= beta < 1"
            )
        self.divide_by = divide_by
        self.register_buffer("weight_C", weights(class_counts_C, beta).float())

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0) -> Tensor:
        """Mean over experts and batch, in nats."""
        labels_N = labels_B.expand(len(logits_EBC), -1).flatten()
        loss_N = F.cross_entropy(logits_EBC.flatten(0, 1), labels_N, self.weight_C, reduction="none")
        if self.divide_by == "weights":
            return weight * loss_N.sum() / self.weight_C[labels_N].sum()
        return weight * loss_N.mean()
