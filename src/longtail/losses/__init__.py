"""Losses, one method a file: `losses/<method>.py` exports `Loss`; the file's name is the method's.

A loss is `Loss(class_counts, **params.yaml's methods.<method>)` and is called with logits of shape (E, B, C) and labels
of shape (B,). Its keyword-only arguments, annotated with longtail.ranges, are the schema of its block.
"""

from importlib import import_module
from typing import Any

from torch import Tensor, nn


class BaseLoss(nn.Module):
    """What the engine needs of a loss.

    Attributes:
        experts: E, how many experts the network has.
    """

    experts: int = 1

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0) -> Tensor:
        """`weight` times the loss, averaged over the batch, in nats. Mixup calls it once for each of its two labels."""
        raise AssertionError("a loss defines forward")

    def after_step(self) -> None:
        """Called once after each optimiser step; a loss with state of its own updates it here."""


def load(method: str) -> type[Any]:
    """The class `Loss` of losses/<method>.py."""
    return import_module(f"longtail.losses.{method}").Loss
