"""The losses, for anyone's training loop: plain modules under their own names, with their papers' settings.

    criterion = GALA(class_counts)                        # images of each class, (C,)
    for images, labels in loader:
        loss = criterion(network(images), labels)         # logits (B, C), or (E, B, C) of E experts
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        criterion.after_step()                            # GALA and GALABalPoE; the others need no such call

They are those of longtail.losses, which the pipeline trains with and whose docstrings have formulas and papers. Nothing
of the pipeline is needed, only torch (from a checkout, `pip install '.[losses]'`).
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from longtail import losses

__all__ = [
    "GALA",
    "LADE",
    "LDAM",
    "BalPoE",
    "BalancedSoftmax",
    "ClassBalanced",
    "Criterion",
    "CrossEntropy",
    "Focal",
    "GALABalPoE",
]


class Criterion(nn.Module):
    """What all have in common.

    Args:
        name: of the file in longtail/losses.
        class_counts: training images of each class (C,), all above 0.
        settings: of the loss.

    Attributes:
        experts: E, how many experts the logits have to be of; 1: plain logits (B, C) will do.

    Raises ValueError for counts that are not above 0.
    """

    def __init__(self, name: str, class_counts: Sequence[float] | Tensor, **settings: Any):
        super().__init__()
        counts_C = torch.as_tensor(class_counts)
        if counts_C.ndim != 1 or not bool((counts_C > 0).all()):
            raise ValueError(f"class_counts are {counts_C.tolist()}; expected the images of each class, all above 0")
        self.classes = len(counts_C)
        self.loss: losses.BaseLoss = losses.load(name)(counts_C, **settings)
        self.experts = self.loss.experts

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss, a mean over the batch (and over experts), in nats.

        Args:
            logits: (B, C), or (E, B, C).
            labels: (B,) int64.

        Raises ValueError for logits of another shape.
        """
        expected = f"(B, {self.classes})" if self.experts == 1 else f"({self.experts}, B, {self.classes})"
        logits_EBC = logits[None] if logits.ndim == 2 else logits
        if logits_EBC.ndim != 3 or logits_EBC.shape[2] != self.classes or logits_EBC.shape[1] != len(labels):
            raise ValueError(f"logits have shape {tuple(logits.shape)}; expected {expected}, B = {len(labels)} labels")
        if self.experts > 1 and len(logits_EBC) != self.experts:
            raise ValueError(f"logits have shape {tuple(logits.shape)}; expected {expected}, a row of each expert")
        result: Tensor = self.loss(logits_EBC, labels)
        return result

    def after_step(self) -> None:
        """To be called after each optimiser step; GALA's margins follow the gradients here."""
        self.loss.after_step()

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """To be called before each epoch (from 1); LDAM's deferred re-weighting sets in by it."""
        self.loss.start_epoch(epoch, epochs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moving to another device takes along what a loss sums up between two steps."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in vars(self.loss).items():
            if isinstance(value, Tensor):
                setattr(self.loss, name, fn(value))
        return self


class CrossEntropy(Criterion):
    """The baseline."""

    def __init__(self, class_counts: Sequence[float] | Tensor):
        super().__init__("ce", class_counts)


class Focal(Criterion):
    """Focal loss (Lin et al., ICCV 2017), softmax form; gamma = 2 in the paper."""

    def __init__(self, class_counts: Sequence[float] | Tensor, gamma: float = 2.0):
        super().__init__("focal", class_counts, gamma=gamma)


class ClassBalanced(Criterion):
    """Class-balanced cross-entropy (Cui et al., CVPR 2019), as its code: divided by the images of the batch."""

    def __init__(self, class_counts: Sequence[float] | Tensor, beta: float = 0.9999, divide_by: str = "images"):
        super().__init__("class_balanced", class_counts, beta=beta, divide_by=divide_by)


class LDAM(Criterion):
    """LDAM, deferred re-weighting included (Cao et al., NeurIPS 2019): margins 0.5, the last fifth of epochs weighted.

    `scale` is that of a cosine head whose logits come in (30 in the paper). Without `start_epoch` nothing is weighted.
    """

    def __init__(
        self,
        class_counts: Sequence[float] | Tensor,
        max_margin: float = 0.5,
        deferred: float = 0.8,
        beta: float = 0.9999,
        scale: float = 30.0,
    ):
        super().__init__("ldam", class_counts, max_margin=max_margin, deferred=deferred, beta=beta)
        self.loss.scale = scale


class BalancedSoftmax(Criterion):
    """Balanced softmax (Ren et al., NeurIPS 2020); with tau, logit adjustment in training (Menon et al., ICLR 2021)."""

    def __init__(self, class_counts: Sequence[float] | Tensor, tau: float = 1.0):
        super().__init__("balanced_softmax", class_counts, tau=tau)


class LADE(Criterion):
    """LADE (Hong et al., CVPR 2021), with the settings of its release for CIFAR."""

    def __init__(self, class_counts: Sequence[float] | Tensor, alpha: float = 0.1, remine_lambda: float = 0.01):
        super().__init__("lade", class_counts, alpha=alpha, remine_lambda=remine_lambda)


class GALA(Criterion):
    """Gradient-aware logit adjustment (Zhang et al., ICASSP 2024), as released; call `after_step`.

    Several processes add up their gradients in `after_step` where torch.distributed runs.
    """

    def __init__(
        self,
        class_counts: Sequence[float] | Tensor,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        variant: str = "released",
        accumulation: str = "double",
    ):
        super().__init__(
            "gala", class_counts, lambda1=lambda1, lambda2=lambda2, variant=variant, accumulation=accumulation
        )


class BalPoE(Criterion):
    """Balanced product of experts (Sanchez Aimar et al., CVPR 2023) with its CIFAR biases; predict by the mean logit.

    The paper trains with mixup: mix images yourself, and the loss of both labels.
    """

    def __init__(self, class_counts: Sequence[float] | Tensor, taus: Sequence[float] = (0.0, 1.0, 2.0)):
        super().__init__("balpoe", class_counts, taus=list(taus))


class GALABalPoE(Criterion):
    """GALA's margins in BalPoE's experts, which no paper has; call `after_step`."""

    def __init__(self, class_counts: Sequence[float] | Tensor, taus: Sequence[float] = (0.0, 1.0, 2.0)):
        super().__init__("gala_balpoe", class_counts, taus=list(taus))
