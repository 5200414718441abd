"""Which class comes when, and how much of the old ones is kept: the protocol of class-incremental learning.

Classes arrive in steps, in an order that has a name. Inside a training a class is its position in that order, so that
the classes seen after a step are 0 ... seen - 1. docs/incremental.md says whose protocol is which.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def class_order(
    classes: int, *, numpy_seed: int | None = None, shuffles_before: Sequence[int] = (), listed: Sequence[int] = ()
) -> np.ndarray:
    """The order (C,) of class ids in which they arrive; entry p is the class that is called p inside a training.

    Args:
        classes: C.
        numpy_seed: of numpy's old generator, RandomState; its permutation is the order. None: the ids as they are.
        shuffles_before: (count, length) of shuffles that the generator did before the order was drawn: iCaRL's code
            seeds 1993, shuffles 100 lists of 500 images, then draws, so its order is not the one called '1993'.
        listed: the order itself, in place of the others.

    Raises ValueError for a list that does not have every class once.
    """
    if len(listed):
        order = np.asarray(listed, dtype=np.int64)
        if sorted(order.tolist()) != list(range(classes)):
            raise ValueError(f"the order lists {len(order)} classes; it must have each of 0 to {classes - 1} once")
        return order
    if numpy_seed is None:
        return np.arange(classes)
    generator = np.random.RandomState(numpy_seed)
    if len(shuffles_before):
        count, length = shuffles_before
        for _ in range(count):
            generator.shuffle(np.arange(length))
    order = np.arange(classes)
    generator.shuffle(order)
    return order


def order_hash(order: np.ndarray) -> str:
    """SHA-256 of the class ids joined by commas: the same order has the same, wherever it comes from."""
    return hashlib.sha256(",".join(map(str, order.tolist())).encode()).hexdigest()


def names_hash(names: list[str]) -> str:
    """SHA-256 of the class names, sorted, a line each: two data sets called ImageNet-100 have other synsets."""
    return hashlib.sha256("\n".join(sorted(map(str, names))).encode()).hexdigest()


def boundaries(classes: int, first: int, each: int) -> list[int]:
    """Classes seen after each step: `first`, then `each` more until all are; the last step may be smaller.

    Raises ValueError where there is no second step.
    """
    if not 0 < first < classes:
        raise ValueError(f"first_classes: {first} of {classes} classes leave no second step; allowed is less")
    return [first, *range(first + each, classes, each), classes]


@dataclass(frozen=True)
class Budget:
    """How many images of an old class are kept.

    Args:
        rule: total: `images` for all classes seen, shared equally, rounded down; per_class: `images` of each class.
        images: the number that the rule is about.
        held_out: share of a class's exemplars that is kept from training, for corrections (BiC, Wu et al. 2019, 3.2:
            a tenth). They are part of the budget.
    """

    rule: str
    images: int
    held_out: float = 0.0

    def per_class(self, seen: int) -> int:
        """Images kept of each class when `seen` classes share the memory."""
        return self.images // seen if self.rule == "total" else self.images

    def limit(self, seen: int) -> int:
        """The most that the memory may hold after `seen` classes."""
        return self.images if self.rule == "total" else self.images * seen

    def held_out_per_class(self, seen: int) -> int:
        """Those of them that no training sees: the share rounded down, but one at least where there are two."""
        kept = self.per_class(seen)
        return max(1, int(self.held_out * kept)) if self.held_out and kept > 1 else 0


@dataclass(frozen=True)
class Step:
    """One step, from 0: classes old ... seen - 1 are new in it."""

    number: int
    old: int
    seen: int

    @property
    def new(self) -> int:
        """How many classes are new."""
        return self.seen - self.old


def steps(classes: int, first: int, each: int) -> list[Step]:
    """All steps. Raises ValueError as `boundaries`."""
    ends = boundaries(classes, first, each)
    return [Step(number, old, seen) for number, (old, seen) in enumerate(zip([0, *ends], ends, strict=False))]


def groups(ends: Sequence[int]) -> np.ndarray:
    """The step (C,) in which each class came, of the steps that end with these numbers of classes."""
    return np.repeat(np.arange(len(ends)), np.diff([0, *ends]))
