"""Label distribution disentangling (Hong et al., CVPR 2021, arXiv:2012.00321), as the authors released it.

Balanced softmax (eq. 18-19) plus alpha times LADER (eq. 16): the logit of each class c is driven towards
log p(x | c) / p(x) under a uniform prior, where the regularised Donsker-Varadhan bound is tight:

    LADER = - sum over c of prior_c * (a_c - b_c - remine_lambda * b_c^2)
    a_c = mean of z_c over the images of class c (eq. 11; 0 where the batch has none)
    b_c = log mean of exp(z_c) * (1 / C) / prior_c over all images of the batch (eq. 12)

The importance weight of an image under a uniform prior is (1 / C) / prior of the image's own label; the release takes
that of the class whose logit it is, for all images alike, and so does this. Both means are over the batch that the loss
sees: parts of a batch, be they of processes or of `accumulate`, each have their own. The prediction is from the bare
logits.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from longtail.losses import BaseLoss
from longtail.workflow.ranges import NotNegative


class Loss(BaseLoss):
    """Balanced softmax plus alpha * LADER; alpha = 0 is balanced softmax.

    Args:
        class_counts_C: training images of each class, all > 0.
        alpha: strength of the regulariser.
        remine_lambda: how strongly b_c is held at 0, where the bound has no constant to drift by.
    """

    prior_C: Tensor
    log_prior_C: Tensor

    def __init__(self, class_counts_C: Tensor, *, alpha: NotNegative, remine_lambda: NotNegative):
        super().__init__()
        self.alpha, self.remine_lambda = alpha, remine_lambda
        prior_C = class_counts_C.double() / class_counts_C.sum()
        self.register_buffer("prior_C", prior_C.float())
        self.register_buffer("log_prior_C", prior_C.log().float())

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0) -> Tensor:
        """Mean over experts, in nats."""
        labels_EB = labels_B.expand(len(logits_EBC), -1)
        loss = F.cross_entropy((logits_EBC + self.log_prior_C).flatten(0, 1), labels_EB.flatten())
        return weight * (loss + self.alpha * self._lader(logits_EBC, labels_B))

    def _lader(self, logits_EBC: Tensor, labels_B: Tensor) -> Tensor:
        batch, classes = logits_EBC.shape[1:]
        own_BC = F.one_hot(labels_B, classes)
        a_EC = (logits_EBC * own_BC).sum(1) / own_BC.sum(0).clamp(min=1)
        b_EC = logits_EBC.logsumexp(1) - math.log(batch) - math.log(classes) - self.log_prior_C
        bound_EC = a_EC - b_EC - self.remine_lambda * b_EC**2
        return -(self.prior_C * bound_EC).sum(1).mean()
