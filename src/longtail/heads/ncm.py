"""Nearest class mean: by the cosine between features and the mean of the class (Kang et al., ICLR 2020, section 4.1).

With means of length one the nearest by cosine is the nearest by Euclidean distance too. Nothing is trained, and the
logits of a linear head made so have no scale: their probabilities mean nothing before they are calibrated.
"""

import torch
from torch import nn

from longtail import heads, networks


def refit(head: nn.Module, known: heads.Known) -> nn.Module:
    """A head of the same kind whose weights (C, D) are the means of length one."""
    sums_CD = torch.zeros(known.num_classes, known.features_ND.shape[1])
    sums_CD.index_add_(0, known.labels_N, known.features_ND)
    new = networks.same_kind(head)
    with torch.no_grad():
        new.weight.copy_(sums_CD / sums_CD.norm(dim=1, keepdim=True))
        if isinstance(new, networks.LinearHead):
            new.bias.zero_()
    return new
