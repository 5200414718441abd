"""The finished chains of an incremental plan: accuracies and differences, over seeds and class orders."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from longtail.incremental.readouts import CHOSEN, SHOWN
from longtail.report.answers import spread
from longtail.workflow import files
from longtail.workflow.chains import Cell, of_plan

OLD_NEW = "energy_old_new_on_memory"
NAMES = {
    "none": "as trained", "weight_aligning": "Weight Aligning", "weight_aligning_l1": "Weight Aligning, L1",
    "weight_aligning_released": "Weight Aligning, released (L1, at most 1)", "bias_layer": "BiC's layer",
    "logit_adjusted": "logit adjustment", CHOSEN: "energy aligning",
    "nearest_mean": "nearest mean of exemplars",
}  # fmt: skip
MEASURES = (
    "average", "average_later", "average_weighted", "last", "old", "new", "forgetting", "average_top5",
    "average_later_top5", "last_top5",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What trainings are compared in: the same images in the same order, the same memory, the same recipe."""

    dataset: str
    order: str
    protocol: str
    recipe: str

    @classmethod
    def of(cls, cell: Cell) -> "Setting":
        """That of a cell."""
        return cls(cell.dataset, cell.order, cell.protocol, cell.recipe)

    @property
    def title(self) -> str:
        """For a heading."""
        return f"{self.dataset} · {self.order} · {self.protocol} · {self.recipe}"


@dataclass(frozen=True)
class Chain:
    """A finished cell: its summary, and the rows of its steps and groups."""

    cell: Cell
    summary: dict[str, Any]
    steps: list[dict[str, str]]
    groups: list[dict[str, str]]
    energies: list[dict[str, str]]
    confusion: list[dict[str, str]]


@dataclass
class Line:
    """A training with one read-out, over seeds or over class orders."""

    training: str
    readout: str
    count: int  # of seeds or orders
    measures: dict[str, tuple[float, float | None]]  # mean, sample standard deviation
    gain: tuple[float, float, float] | None  # of the last step against as trained: value, low, high
    changed: bool  # whether any prediction of the last step is another one than as trained

    @property
    def name(self) -> str:
        """The read-out in words."""
        return readout_name(self.readout)

    def cells(self) -> list[str]:
        """The line of the table."""
        shown = [spread(*self.measures[key]) for key in MEASURES]
        gain = points(self.gain) if self.changed or self.gain is None else "changes no prediction"
        return [self.training, self.name, str(self.count), *shown, gain]


def readout_name(name: str) -> str:
    """A read-out in words: energy_old_new_on_train is 'energy aligning, old/new, on train'."""
    if name in NAMES:
        return NAMES[name]
    grouping, _, on = name.removeprefix("energy_").partition("_on_")
    shifts = {"class": "each class", "old_new": "old/new", "step": "each step"}[grouping]
    return f"energy aligning, {shifts}, on {on.replace('_', '-')}"


def points(gain: tuple[float, float, float] | None) -> str:
    """A difference in points with its interval."""
    if gain is None:
        return "-"
    value, low, high = (100 * part for part in gain)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None of one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def root_mean_square(values: Sequence[float]) -> float:
    """Standard errors of gains that share their test images, as one."""
    return float(np.sqrt(np.mean(np.square(values))))


def interval(values: Sequence[float], errors: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of a gain over seeds or class orders: 95 %, over test images and over these.

    Args:
        values: the gain of each seed or order.
        errors: its standard error over test images, which all share.
    """
    count, mean = len(values), float(np.mean(values))
    images = float(np.mean(np.square(errors)))
    seeds = float(np.var(values, ddof=1)) / count if count > 1 else 0.0
    if not seeds:
        half = 1.96 * np.sqrt(images)
    else:
        freedom = (images + seeds) ** 2 * (count - 1) / seeds**2
        half = float(stdtrit(freedom, 0.975)) * np.sqrt(images + seeds)
    return mean, mean - half, mean + half


def read(plan_name: str, plan: Mapping[str, Any], cells_dir: str | Path) -> tuple[list[Chain], list[Cell]]:
    """The finished cells of a plan, and those that are not there yet.

    Raises ValueError where none is finished, or one's files are no results.
    """
    found, absent = [], []
    for cell in of_plan(plan_name, plan):
        folder = Path(cells_dir) / cell.path
        if not (folder / "summary.json").is_file():
            absent.append(cell)
            continue
        rows = [files.read_csv(folder / f"{name}.csv") for name in ("steps", "groups", "energies", "confusion")]
        found.append(Chain(cell, files.read_json(folder / "summary.json"), *rows))
    if not found:
        raise ValueError(f"{cells_dir}: none of the plan's {len(absent)} cells has run")
    return found, absent


def by_unit(chains: Iterable[Chain], unit: str) -> list[list[Chain]]:
    """The chains of each seed, or of each class order."""
    found: dict[str, list[Chain]] = {}
    for chain in chains:
        found.setdefault(getattr(chain.cell, unit), []).append(chain)
    return list(found.values())


def lines(chains: Sequence[Chain], training: str, unit: str = "seed") -> list[Line]:
    """A training's read-outs, those of SHOWN first, over seeds or class orders; several chains of one are averaged."""
    mine = [chain for chain in chains if chain.cell.training == training]
    made = []
    names = list(mine[0].summary["readouts"]) if mine else []
    for readout in sorted(names, key=lambda name: (name not in SHOWN, SHOWN.index(name) if name in SHOWN else 0)):
        units = by_unit((chain for chain in mine if readout in chain.summary["readouts"]), unit)
        values = [[chain.summary["readouts"][readout] for chain in group] for group in units]
        gain = None
        if readout != "none":
            errors = [root_mean_square([value["last_gain_se"] for value in group]) for group in values]
            gain = interval([float(np.mean([value["last_gain"] for value in group])) for group in values], errors)
        measures = {key: mean_sd([float(np.mean([v[key] for v in group])) for group in values]) for key in MEASURES}
        changed = any(value["last_changed"] > 0 for group in values for value in group)
        made.append(Line(training, readout, len(units), measures, gain, changed))
    return made


def difference(
    one: Sequence[Chain], other: Sequence[Chain], readouts: tuple[str, str], unit: str = "seed"
) -> tuple[int, tuple[float, float, float] | None]:
    """(seeds or orders that both have, accuracy after the last step of `one` minus `other` as `interval` gives it).

    Args:
        readouts: of `one`, and of `other`.

    Pairs have the same class order and seed; one without these read-outs is none. The error over test images is that
    of two independent accuracies: both are of the same images, where trainings mostly agree, so the interval is too
    wide rather than too narrow.
    """
    partners = {
        (chain.cell.order, chain.cell.seed): chain for chain in other if readouts[1] in chain.summary["readouts"]
    }
    paired = [
        chain for chain in one
        if readouts[0] in chain.summary["readouts"] and (chain.cell.order, chain.cell.seed) in partners
    ]  # fmt: skip
    values, errors = [], []
    for group in by_unit(paired, unit):
        of_group, variances = [], []
        for chain in group:
            first = chain.summary["readouts"][readouts[0]]["last"]
            partner = partners[chain.cell.order, chain.cell.seed].summary["readouts"]
            second = partner[readouts[1]]["last"]
            of_group.append(first - second)
            variances.append((first * (1 - first) + second * (1 - second)) / images_of(chain))
        values.append(float(np.mean(of_group)))
        errors.append(float(np.sqrt(np.mean(variances))))
    return len(values), interval(values, errors) if values else None


def images_of(chain: Chain) -> int:
    """How many test images there are of all classes, after the last step."""
    final = len(chain.summary["ends"]) - 1
    rows = [row for row in chain.confusion if row["readout"] == "none" and int(row["step"]) == final]
    return sum(int(row["images"]) for row in rows)


def aligned(of: Mapping[str, Line]) -> Line | None:
    """The energy aligning that stands for all: the one chosen on held-out memory, or old/new on the exemplars."""
    return of.get(CHOSEN) or of.get(OLD_NEW)


def gain(of: Mapping[str, Line]) -> float:
    """What energy aligning surely adds after the last step, the low end of its interval; 0 where it was not tried."""
    line = aligned(of)
    return 0.0 if line is None or line.gain is None else line.gain[1]


def over_seeds(
    chains: Sequence[Chain], rows: str, readout: str, key: str, last: bool = False
) -> dict[int, list[float]]:
    """{step or group: accuracies of all seeds} of a read-out; `last`: of the groups, after the last step."""
    found: dict[int, list[float]] = {}
    for chain in chains:
        final = len(chain.summary["ends"]) - 1
        for row in getattr(chain, rows):
            if row["readout"] == readout and (not last or int(row["step"]) == final):
                found.setdefault(int(row[key]), []).append(float(row["accuracy"]))
    return found


def last_of(mine: Sequence[Chain], readout: str) -> float:
    """Accuracy after the last step, mean over seeds."""
    return float(np.mean([chain.summary["readouts"][readout]["last"] for chain in mine]))


def settings(plan: Mapping[str, Any], chains: Sequence[Chain]) -> dict[Setting, list[Chain]]:
    """The finished chains of each setting of a plan, in its order."""
    found: dict[Setting, list[Chain]] = {}
    for place in product(*(plan[axis] for axis in ("datasets", "orders", "protocols", "recipes"))):
        setting = Setting(*map(str, place))
        mine = [chain for chain in chains if Setting.of(chain.cell) == setting]
        if mine:
            found[setting] = mine
    return found
