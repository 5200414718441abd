"""BalPoE whose biases set in late: features of plain cross-entropy, then experts of the balanced product.

Decoupling (Kang et al., ICLR 2020) and SHIKE (Jin et al., CVPR 2023) learn features from the tail as it is and give the
classifiers their balance afterwards, with the rest frozen. Here nothing is frozen: in the last epochs, at small steps,
the whole network goes on with BalPoE's loss (longtail.losses.balpoe), as LDAM's re-weighting is deferred.
"""

from torch import Tensor

from longtail.losses import balpoe
from longtail.workflow.ranges import Biases, Share


class Loss(balpoe.Loss):
    """Cross-entropy of each expert, later BalPoE's loss; deferred = 0 is BalPoE, 1 cross-entropy.

    Args:
        class_counts_C: training images of each class, all > 0.
        taus: as BalPoE has them.
        deferred: share of the epochs, rounded to whole ones, after which the biases set in.
    """

    late_E1C: Tensor

    def __init__(self, class_counts_C: Tensor, *, taus: Biases, deferred: Share):
        super().__init__(class_counts_C, taus=taus)
        self.deferred = deferred
        self.register_buffer("late_E1C", self.shift_E1C)
        self.start_epoch(1, 1)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """The biases are there from the epoch after the deferred ones: 129 of 160 when deferred is 0.8."""
        self.shift_E1C = self.late_E1C * (epoch > round(self.deferred * epochs))
