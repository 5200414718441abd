"""Losses, one a file: `losses/<loss>.py` exports `Loss`.

A method is a block under `methods` in params.yaml; its loss is the one that the block names (`loss: gala`), or that of
its own name. A loss is `Loss(class_counts, **the rest of the block)` and is called with logits of shape (E, B, C) and
labels of shape (B,). Its keyword-only arguments, annotated with longtail.workflow.ranges, are the schema of its block.
"""

from importlib import import_module
from typing import Any

from torch import Tensor, nn


class BaseLoss(nn.Module):
    """What the engine needs of a loss.

    Attributes:
        scale: of the head's logits, which training sets: 1 for a linear head; a cosine head multiplies by it.
        experts: E, how many experts the network has.
        class_balanced_sampling: whether an epoch draws every class as often as any other (same number of images).
        remembers: whether `forward` takes a fourth argument, the images' places in the training split (B,), and
            `remember` is called.
    """

    scale: float = 1.0
    experts: int = 1
    class_balanced_sampling: bool = False
    remembers: bool = False

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0) -> Tensor:
        """`weight` times the loss, averaged over the batch, in nats. Mixup calls it once for each of its two labels."""
        raise AssertionError("a loss defines forward")

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Called before the first step of `epoch` (from 1) of `epochs`, and again where training is taken up in it."""

    def remember(self, logits_EBC: Tensor, labels_B: Tensor, places_B: Tensor) -> None:
        """Called after `forward` with the logits, which nothing flows back from: each image of the batch comes once.

        A mixed image counts as the one of the two that there is more of; labels and places are that one's.
        """

    def after_step(self) -> None:
        """Called once after each optimiser step; a loss with state of its own updates it here."""


def load(name: str) -> type[Any]:
    """The class `Loss` of losses/<name>.py."""
    return import_module(f"longtail.losses.{name}").Loss
