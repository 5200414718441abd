"""Cross-entropy on class-balanced batches (Kang et al., ICLR 2020, arXiv:1910.09217, eq. 1 with q = 0).

The engine draws them: every class as often as any other, so that images of small classes come again and again.
"""

from torch import Tensor

from longtail.losses import ce


class Loss(ce.Loss):
    """Mean cross-entropy; what is different is which images an epoch has."""

    class_balanced_sampling = True

    def __init__(self, class_counts_C: Tensor):  # here too: the schema is read off this file
        super().__init__(class_counts_C)
