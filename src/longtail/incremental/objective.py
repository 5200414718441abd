"""What a step minimises: a loss of longtail.losses over all classes seen, and distillation from the step before.

The engine gives a loss logits and labels; the teacher needs the images. It looks at them in the same moment as the
network: a hook before the network's forward pass keeps the teacher's logits of the batch for the loss.

E experts, B batch, C classes seen, O of them old.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail import losses
from longtail.losses import BaseLoss
from longtail.networks import Network


def softened(logits_EBO: Tensor, teacher_EBO: Tensor, temperature: float) -> Tensor:
    """Distillation in nats: -sum over old classes of p(teacher / T) log p(logits / T), a mean over experts and batch.

    Without T^2, as in the releases of Weight Aligning, BiC and PyCIL.
    """
    target_EBO = (teacher_EBO / temperature).softmax(-1)
    return -(target_EBO * (logits_EBO / temperature).log_softmax(-1)).sum(-1).mean()


def sigmoid_targets(logits_EBC: Tensor, labels_B: Tensor, teacher_EBO: Tensor | None) -> Tensor:
    """iCaRL's loss (Rebuffi et al., CVPR 2017, equation 4 of the paper, as released), in nats.

    Binary cross-entropy, a mean over experts, batch and classes; targets are one-hot, and for old classes the
    teacher's sigmoid outputs, for exemplars too.
    """
    target_EBC = F.one_hot(labels_B, logits_EBC.shape[2]).to(logits_EBC.dtype).expand_as(logits_EBC)
    if teacher_EBO is not None:
        target_EBC = torch.cat([teacher_EBO.sigmoid(), target_EBC[:, :, teacher_EBO.shape[2] :]], -1)
    return F.binary_cross_entropy_with_logits(logits_EBC, target_EBC)


class Teacher:
    """The corrected network of the step before: its logits of the batch that the student sees.

    Args:
        network: in evaluation mode.
        scale_C, shift_C: its correction; ones and zeros for a raw teacher.
    """

    def __init__(self, network: Network, scale_C: Tensor, shift_C: Tensor):
        self.network, self.scale_C, self.shift_C = network.eval().requires_grad_(False), scale_C, shift_C
        self.seen: Tensor | None = None

    def watch(self, student: Network) -> None:
        """Look at every batch that the student is trained on."""

        def look(module: nn.Module, inputs: tuple[Tensor]) -> None:
            if module.training:
                with torch.no_grad():
                    self.seen = self.network(inputs[0]).float() * self.scale_C + self.shift_C

        student.register_forward_pre_hook(look)


class Objective(BaseLoss):
    """The loss of one step; without a teacher (step 0, or no distillation) that of its classes.

    Args:
        classes: the loss over all classes seen; None: binary cross-entropy over sigmoids (iCaRL).
        kind: share: (1 - r) classes + r distillation, r = old / seen (Weight Aligning, BiC); added: their sum
            (PyCIL's iCaRL); sigmoid: iCaRL's own, with `classes` None; none: no distillation.
        temperature: of softened targets.
        teacher: watches the student.
        old: O.
        positive: parameters that are clamped at 0 from below after each step (Weight Aligning's release).
    """

    def __init__(
        self,
        classes: BaseLoss | None,
        *,
        kind: str,
        temperature: float,
        teacher: Teacher | None,
        old: int,
        positive: Callable[[], list[nn.Parameter]] = list,
    ):
        super().__init__()
        self.classes, self.kind, self.temperature, self.old = classes, kind, temperature, old
        self.__dict__["teacher"] = teacher  # not a part of the loss's own state
        self.__dict__["positive"] = positive
        if classes is not None:
            self.experts, self.class_balanced_sampling = classes.experts, classes.class_balanced_sampling
            self.remembers = classes.remembers

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0, *places_B: Tensor) -> Tensor:
        """`weight` times the objective, in nats."""
        teacher: Teacher | None = self.__dict__["teacher"]
        seen_EBO = teacher.seen if teacher is not None and self.training else None
        if self.classes is None:
            return weight * sigmoid_targets(logits_EBC, labels_B, seen_EBO)
        if seen_EBO is None:
            return self.classes(logits_EBC, labels_B, weight, *places_B)
        share = self.old / logits_EBC.shape[2]
        distilled = softened(logits_EBC[:, :, : self.old], seen_EBO, self.temperature)
        known = self.classes(logits_EBC, labels_B, weight, *places_B)
        if self.kind == "added":
            return known + weight * distilled
        return (1 - share) * known + weight * share * distilled

    def remember(self, logits_EBC: Tensor, labels_B: Tensor, places_B: Tensor) -> None:
        """That of the loss."""
        if self.classes is not None:
            self.classes.remember(logits_EBC, labels_B, places_B)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """That of the loss."""
        if self.classes is not None:
            self.classes.start_epoch(epoch, epochs)

    @torch.no_grad()
    def after_step(self) -> None:
        """That of the loss; then clamp what must not be negative."""
        if self.classes is not None:
            self.classes.after_step()
        for parameter in self.__dict__["positive"]():
            parameter.clamp_(min=0)


def class_loss(name: str, counts_C: Tensor, arguments: dict[str, Any], scale: float) -> BaseLoss | None:
    """The loss of this name for a step's training images; None for `bce`."""
    if name == "bce":
        return None
    loss = losses.load(name)(counts_C, **arguments)
    loss.scale = scale
    return loss
