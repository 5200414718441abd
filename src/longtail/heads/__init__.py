"""Second stages: a new head on the frozen features of a trained network, one way a file (Kang et al., ICLR 2020).

`heads/<way>.py` exports `refit(head, known, **the method's block)`, which returns the new head; a method's block names
its way (`refit: crt`) or has its name. The keyword-only arguments, annotated with longtail.workflow.ranges, are the
schema of the block. Features are those of the training images without augmentation: computed once, so that a stage
takes seconds. The paper (arXiv:1910.09217) trains its second stage on augmented images.
"""

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Known:
    """What a second stage may see, of one expert: features (N, D) float32 and labels (N,) of train and held-out."""

    features_ND: Tensor
    labels_N: Tensor
    num_classes: int
    held_out: tuple[Tensor, Tensor] | None = None


def load(way: str) -> Any:
    """The function `refit` of heads/<way>.py."""
    return import_module(f"longtail.heads.{way}").refit


def train(
    head: nn.Module,
    parameters: list[nn.Parameter],
    known: Known,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
) -> None:
    """Cross-entropy of class-balanced draws by SGD with momentum 0.9 and a cosine to 0, as the paper's cRT and LWS.

    An epoch is as many draws as there are images: a class, all as likely, then an image of it, from torch's generator.
    """
    weights_N = 1 / torch.bincount(known.labels_N).double()[known.labels_N]
    count = len(known.labels_N)
    steps = epochs * math.ceil(count / batch_size)
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.multinomial(weights_N, count, replacement=True).split(batch_size):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            F.cross_entropy(head(known.features_ND[rows]), known.labels_N[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
