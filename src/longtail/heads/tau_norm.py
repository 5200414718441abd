"""tau-normalised weights: w_c / |w_c| ** tau, without bias (Kang et al., ICLR 2020, section 4.1, equation 3).

A cosine head has no lengths to normalise: it stays as it is.
"""

import copy

import torch
from torch import nn

from longtail import heads, networks
from longtail.ranges import Numbers


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
    return max(candidates, key=lambda candidate: class_accuracy(candidate, features_ND, labels_N))


def normalised(head: nn.Module, tau: float) -> nn.Module:
    """A copy of the head with weights (C, D) divided by their length ** tau."""
    new = copy.deepcopy(head)
    if isinstance(new, networks.LinearHead):
        with torch.no_grad():
            new.weight /= new.weight.norm(dim=1, keepdim=True) ** tau
            new.bias.zero_()
    return new


@torch.no_grad()
def class_accuracy(head: nn.Module, features_ND: torch.Tensor, labels_N: torch.Tensor) -> float:
    """Mean over the classes that there are of the share recognised."""
    right_N = (head(features_ND).argmax(1) == labels_N).double()
    total_C = torch.bincount(labels_N)
    right_C = torch.bincount(labels_N, weights=right_N)
    return float((right_C / total_C)[total_C > 0].mean())
