"""A cell of an incremental plan: one chain of trainings. What it is called, and where its files and stages are."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from longtail.workflow import pipeline
from longtail.workflow.incremental import AXES


@dataclass(frozen=True)
class Cell:
    """The coordinates of one chain of trainings in the grid of its plan, and where everything of it is."""

    plan: str
    dataset: str
    order: str
    protocol: str
    recipe: str
    training: str
    seed: str

    @classmethod
    def parse(cls, plan: str, name: str) -> "Cell":
        """The cell <dataset>-<order>-<protocol>-<recipe>-<training>-<seed>. Raises ValueError for another form."""
        parts = name.split("-")
        if len(parts) != len(AXES) or not all(parts):
            raise ValueError(f"{name!r} is no cell: <dataset>-<order>-<protocol>-<recipe>-<training>-<seed>")
        return cls(plan, *parts)

    @property
    def _places(self) -> tuple[str, ...]:
        return (self.dataset, self.order, self.protocol, self.recipe, self.training, self.seed)

    @property
    def name(self) -> str:
        """<dataset>-<order>-<protocol>-<recipe>-<training>-<seed>."""
        return "-".join(self._places)

    @property
    def path(self) -> str:
        """Its place among the cells of its plan."""
        return "/".join(self._places)

    @property
    def results(self) -> str:
        """The folder of its small files, which git keeps, relative to the repository."""
        return f"results/{self.plan}/cells/{self.path}"

    @property
    def runs(self) -> str:
        """The folder of its networks and logits, which DVC keeps, relative to the repository."""
        return f"runs/{self.plan}/{self.path}"

    @property
    def title(self) -> str:
        """The run's name, what differs most in front."""
        return f"{self.training} · {self.protocol} · seed {self.seed} · {self.recipe} · {self.order} · {self.dataset}"

    def address(self, kind: str) -> str:
        """One of its stages, as DVC addresses it."""
        return f"{pipeline.file(self.plan)}:{kind}-{self.plan}@{self.name}"

    def names(self) -> dict[str, str]:
        """Coordinates by name."""
        return dict(vars(self))


STAGES = ("train", "predict", "readout")


def of_plan(name: str, plan: Mapping[str, Any]) -> list[Cell]:
    """All cells of a plan, in its order."""
    return [Cell(name, *place) for place in product(*(map(str, plan[axis]) for axis in AXES))]


def plans(params: Mapping[str, Any]) -> dict[str, Any]:
    """The incremental plans of params.yaml; none without the section."""
    found: dict[str, Any] = params.get("incremental", {}).get("plans", {})
    return found
