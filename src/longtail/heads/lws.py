"""Learnable weight scaling (LWS): a factor for each class's logit (Kang et al., ICLR 2020, section 4.1, equation 4).

The factors are trained with class-balanced sampling, all else is kept.
"""

import torch
from torch import Tensor, nn

from longtail import heads, networks
from longtail.workflow.ranges import Count, NotNegative, Positive


class Scaled(nn.Module):
    """A head and a factor for each of its logits."""

    def __init__(self, head: nn.Module, classes: int):
        super().__init__()
        self.head = head
        self.factor_C = nn.Parameter(torch.ones(classes))

    def forward(self, features_BD: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C)."""
        return self.factor_C * self.head(features_BD)


def refit(
    head: nn.Module, known: heads.Known, *, epochs: Count, batch_size: Count, lr: Positive, weight_decay: NotNegative
) -> nn.Module:
    """The head with its logits scaled, bias included as in the released code."""
    scaled = Scaled(head, known.num_classes)
    heads.train(
        scaled, [scaled.factor_C], known, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay
    )
    return networks.scaled_head(head, scaled.factor_C.detach())
