"""The images of a chain of steps: what a step may see, and nothing else.

Rows are those of the data set's training images; classes are positions in the class order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from longtail.incremental import protocol
from longtail.incremental.protocol import Budget, Step


@dataclass(frozen=True)
class Chain:
    """A protocol on a data set: steps, class order, memory.

    Attributes:
        order_C: class ids in the order in which they come.
        steps: all of them, from step 0.
        budget: of the memory.
        selection: how exemplars are chosen, see longtail.incremental.memory.
    """

    order_C: np.ndarray
    steps: list[Step]
    budget: Budget
    selection: str

    @classmethod
    def of(cls, classes: int, order: Mapping[str, Any], settings: Mapping[str, Any]) -> "Chain":
        """From the blocks of params.yaml. Raises ValueError for an order or steps that do not fit the classes."""
        return cls(
            protocol.class_order(classes, **order),
            protocol.steps(classes, settings["first_classes"], settings["step_classes"]),
            Budget(settings["memory_rule"], settings["memory"], settings["held_out"]),
            settings["selection"],
        )

    def positions(self, labels_N: np.ndarray) -> np.ndarray:
        """Class ids (N,) as positions in the order."""
        place_C = np.empty_like(self.order_C)
        place_C[self.order_C] = np.arange(len(self.order_C))
        return place_C[labels_N]

    def pool(self, step: Step) -> int:
        """Images of each class of a step that are set aside before any training, for corrections.

        As many as an old class has in the first step in which the class may be corrected: the step itself, and in
        step 0, which nothing corrects, the next one.
        """
        return self.budget.held_out_per_class(step.old or step.seen)

    def held_out_in(self, step: Step) -> int:
        """Images of each class seen, new ones included, that a correction may be fitted on after this step."""
        return self.budget.held_out_per_class(step.old or step.seen)


@dataclass(frozen=True)
class Rows:
    """Rows of the training images by what a step does with them."""

    train: np.ndarray  # new images, then exemplars of old classes
    held_out: np.ndarray  # as many of each class seen; none without a share


class Memory:
    """The exemplars of old classes by rank, and each class's images that no training sees.

    Args:
        chain: the protocol.
        labels_N: positions of the training images.
        seed: draws which images of a class are set aside.
    """

    def __init__(self, chain: Chain, labels_N: np.ndarray, seed: int):
        self.chain, self.labels_N = chain, labels_N
        self.ranked: dict[int, np.ndarray] = {}  # of each old class, as many as were ever needed
        self.aside: dict[int, np.ndarray] = {}
        for step in chain.steps:
            for label in range(step.old, step.seen):
                rows = np.flatnonzero(labels_N == label)
                generator = np.random.default_rng([seed, label])
                drawn = generator.permutation(rows)[: min(chain.pool(step), max(0, len(rows) - 1))]
                self.aside[label] = drawn

    def own(self, label: int) -> np.ndarray:
        """Rows of a class that its own step trains on."""
        rows = np.flatnonzero(self.labels_N == label)
        return rows[~np.isin(rows, self.aside[label])]

    def exemplars(self, seen: int, held_out: int) -> np.ndarray:
        """Rows of the exemplars that a training sees, when `seen` classes share the memory, by class and rank."""
        count = self.chain.budget.per_class(seen) - held_out
        kept = [self.ranked[label][: max(0, count)] for label in sorted(self.ranked)]
        return np.concatenate([*kept, np.empty(0, dtype=np.int64)]).astype(np.int64)

    def rows(self, step: Step, *, replay: bool) -> Rows:
        """What a step sees. Raises AssertionError where the memory is above its budget."""
        held_out = self.chain.held_out_in(step)
        old = self.exemplars(step.old, held_out) if step.old else np.empty(0, dtype=np.int64)
        aside = [self.aside[label][:held_out] for label in range(step.seen)]
        size = len(old) + sum(len(aside[label]) for label in range(step.old))
        if step.old and size > self.chain.budget.limit(step.old):
            raise AssertionError(
                f"step {step.number}: {size} images in a memory of {self.chain.budget.limit(step.old)}"
            )
        new = [self.own(label) for label in range(step.old, step.seen)]
        return Rows(
            np.concatenate([*new, old] if replay else new),
            np.concatenate([*aside, np.empty(0, dtype=np.int64)]).astype(np.int64),
        )

    def needed(self, step: Step) -> int:
        """Exemplars of each new class that the steps after this one train on."""
        return self.chain.budget.per_class(step.seen) - self.chain.budget.held_out_per_class(step.seen)
