"""A cell of a plan: one training. What it is called, and where its files and stages are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from longtail.workflow import pipeline


@dataclass(frozen=True)
class Cell:
    """The coordinates of one training in the grid of its plan, and where everything of it is."""

    plan: str
    dataset: str
    recipe: str
    method: str
    seed: str

    @classmethod
    def parse(cls, plan: str, name: str) -> "Cell":
        """The cell `<dataset>-<recipe>-<method>-<seed>` of a plan. Raises ValueError for another form."""
        parts = name.split("-")
        if len(parts) != 4 or not all(parts):
            raise ValueError(f"{name!r} is no cell: <dataset>-<recipe>-<method>-<seed>")
        return cls(plan, *parts)

    @property
    def name(self) -> str:
        """<dataset>-<recipe>-<method>-<seed>."""
        return f"{self.dataset}-{self.recipe}-{self.method}-{self.seed}"

    @property
    def path(self) -> str:
        """Its place among the cells of its plan."""
        return f"{self.dataset}/{self.recipe}/{self.method}/{self.seed}"

    @property
    def results(self) -> str:
        """The folder of its small files, which git keeps, relative to the repository."""
        return f"results/{self.plan}/cells/{self.path}"

    @property
    def runs(self) -> str:
        """The folder of its network and logits, which DVC keeps, relative to the repository."""
        return f"runs/{self.plan}/{self.path}"

    @property
    def title(self) -> str:
        """The run's name, what differs most in front: lists cut names after some 15 letters."""
        return f"{self.method} · seed {self.seed} · {self.recipe} · {self.dataset}"

    @property
    def lock(self) -> str:
        """The lock file that has its stages, relative to the repository."""
        return pipeline.lock(pipeline.file(self.plan))

    def address(self, kind: str) -> str:
        """One of its stages, as DVC addresses it."""
        return f"{pipeline.file(self.plan)}:{kind}-{self.plan}@{self.name}"

    def names(self) -> dict[str, str]:
        """Coordinates by name."""
        return dict(vars(self))


def of_plan(name: str, plan: Mapping[str, Any]) -> list[Cell]:
    """All cells of a plan {datasets, recipes, methods, seeds}, in its order."""
    axes = (map(str, plan[axis]) for axis in ("datasets", "recipes", "methods", "seeds"))
    return [Cell(name, *place) for place in product(*axes)]


def bases(cell: Cell, params: Mapping[str, Any]) -> list[Cell]:
    """The cells whose networks a second stage, or experts that were trained apart, start from; none of other cells."""
    block = params["plans"][cell.plan]
    of_plain = cell.method in block.get("refit", ())
    methods = ["ce"] if of_plain else params["methods"][cell.method].get("fuse", ())
    return [replace(cell, method=method) for method in methods]
