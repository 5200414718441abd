"""Classifier re-training (cRT): a new head, with class-balanced sampling (Kang et al., ICLR 2020, section 4.1)."""

from torch import nn

from longtail import heads, networks
from longtail.workflow.ranges import Count, NotNegative, Positive


def refit(
    head: nn.Module, known: heads.Known, *, epochs: Count, batch_size: Count, lr: Positive, weight_decay: NotNegative
) -> nn.Module:
    """A head of the same kind, from scratch."""
    fresh = networks.same_kind(head)
    heads.train(
        fresh, [*fresh.parameters()], known, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay
    )
    return fresh
