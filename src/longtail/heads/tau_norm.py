"""tau-normalised weights: w_c / |w_c| ** tau, without bias (Kang et al., ICLR 2020, section 4.1, equation 3).

A cosine head has no lengths to normalise: it stays as it is.
"""

import copy

import numpy as np
import torch
from torch import nn

from longtail import heads, networks
from longtail.evaluation import metrics
from longtail.workflow.ranges import Numbers


def refit(head: nn.Module, known: heads.Known, *, taus: Numbers) -> nn.Module:
    """The head with the tau of `taus` that has the best class accuracy on held-out images, the first among equals.

    Raises ValueError when there are several taus and no held-out images to choose by.
    """
    if len(taus) > 1 and known.held_out is None:
        raise ValueError(f"taus {taus}: to choose one takes held-out images, and the data set has none; give one tau")
    candidates = [normalised(head, tau) for tau in taus]
    if known.held_out is None:
        return candidates[0]
    features_ND, labels_N = known.held_out

    def accuracy(candidate: nn.Module) -> float:
        with torch.no_grad():
            predictions_N = candidate(features_ND).argmax(1)
        by_class_C = metrics.class_accuracy(predictions_N.numpy(), labels_N.numpy(), known.num_classes)
        return float(np.nanmean(by_class_C))

    return max(candidates, key=accuracy)


def normalised(head: nn.Module, tau: float) -> nn.Module:
    """A copy of the head with weights (C, D) divided by their length ** tau."""
    new = copy.deepcopy(head)
    if isinstance(new, networks.LinearHead):
        with torch.no_grad():
            new.weight /= new.weight.norm(dim=1, keepdim=True) ** tau
            new.bias.zero_()
    return new
