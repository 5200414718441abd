"""What an incremental plan found: curves over steps, the bias and its removal, and the published values beside ours.

Percent and points are in text only; files hold shares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from scipy.special import stdtrit

from longtail.incremental.readouts import CHOSEN
from longtail.report import plots
from longtail.report.answers import spread
from longtail.workflow import files
from longtail.workflow.chains import Cell, of_plan

SHOWN = (
    "none",
    "weight_aligning",
    "bias_layer",
    "logit_adjusted",
    CHOSEN,
    "nearest_mean",
)  # in pictures and first table
NAMES = {
    "none": "as trained", "weight_aligning": "Weight Aligning", "weight_aligning_l1": "Weight Aligning, L1",
    "weight_aligning_released": "Weight Aligning, released (L1, at most 1)", "bias_layer": "BiC's layer",
    "logit_adjusted": "logit adjustment", CHOSEN: "energy aligning, chosen on held-out",
    "nearest_mean": "nearest mean of exemplars",
}  # fmt: skip
MEASURES = ("average", "average_later", "average_weighted", "last", "old", "new", "forgetting")
HEADER = ("Training", "Read-out", "Seeds", "Average", "without step 0", "by classes", "Last", "old", "new",
          "Forgetting", "Last against as trained")  # fmt: skip
READING = (
    "Accuracy in percent over the test images of all classes seen, last epoch of every step; mean ± sample standard "
    "deviation over seeds. 'Average': mean over steps, the first included, as PyCIL, DER and the survey print it; "
    "'without step 0': as Weight Aligning's release; 'by classes': each step as many times as it has classes. 'Last', "
    "'old' and 'new': after the last step. 'Forgetting': the best accuracy of a step's classes minus the last, mean "
    "over steps. In brackets 95 % intervals in points: over test images, paired, and over seeds by Student's t; with "
    "one seed over images alone."
)
CURVES = ("dataset", "order", "protocol", "recipe", "training", "readout", "step", "seen", "accuracy", "sd", "seeds")


@dataclass(frozen=True)
class Setting:
    """What trainings are compared in: the same images in the same order, the same memory, the same recipe."""

    dataset: str
    order: str
    protocol: str
    recipe: str

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


@dataclass
class Line:
    """A training with one read-out, over seeds."""

    training: str
    readout: str
    seeds: int
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
        return [self.training, self.name, str(self.seeds), *shown, gain]


@dataclass
class Section:
    """One setting: a line for each training and read-out, pictures, what was published."""

    setting: Setting
    answers: list[str]
    lines: list[Line]
    facts: list[str]
    published: list[list[str]]
    figures: list[plots.Figure] = field(default_factory=list)

    def best(self, line: Line) -> bool:
        """Whether a line has the highest last accuracy of its setting."""
        return line.measures["last"][0] == max(other.measures["last"][0] for other in self.lines)


PUBLISHED = ("Method", "Classifier", "Average", "Last", "Network", "Memory", "Order", "Source")


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


def interval(values: Sequence[float], errors: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of a gain over seeds: 95 %, over test images and over seeds.

    Args:
        values: the gain of each seed.
        errors: its standard error over test images, which all seeds share.
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
        rows = [files.read_csv(folder / f"{name}.csv") for name in ("steps", "groups", "energies")]
        found.append(Chain(cell, files.read_json(folder / "summary.json"), *rows))
    if not found:
        raise ValueError(f"{cells_dir}: none of the plan's {len(absent)} cells has run")
    return found, absent


def lines(chains: Sequence[Chain], training: str) -> list[Line]:
    """A training's read-outs, those of SHOWN first."""
    mine = [chain for chain in chains if chain.cell.training == training]
    made = []
    names = list(mine[0].summary["readouts"]) if mine else []
    for readout in sorted(names, key=lambda name: (name not in SHOWN, SHOWN.index(name) if name in SHOWN else 0)):
        values = [chain.summary["readouts"][readout] for chain in mine if readout in chain.summary["readouts"]]
        gain = None
        if readout != "none":
            gain = interval([v["last_gain"] for v in values], [v["last_gain_se"] for v in values])
        measures = {key: mean_sd([value[key] for value in values]) for key in MEASURES}
        changed = any(value["last_changed"] > 0 for value in values)
        made.append(Line(training, readout, len(values), measures, gain, changed))
    return made


def answers(found: Sequence[Line]) -> list[str]:
    """What the correction of the bias is worth, a sentence for each training."""
    said = []
    for training in dict.fromkeys(line.training for line in found):
        of = {line.readout: line for line in found if line.training == training}
        aligned = of.get(CHOSEN) or of.get("energy_old_new_on_memory")
        if aligned is None or aligned.gain is None:
            continue
        settled = "" if aligned.gain[1] > 0 or aligned.gain[2] < 0 else " (not settled)"
        best = max(of.values(), key=lambda line: line.measures["last"][0])
        said.append(
            f"{training}: {spread(*of['none'].measures['last'])} % after the last step as trained, "
            f"{spread(*aligned.measures['last'])} % with {aligned.name}, {points(aligned.gain)} points{settled}. "
            f"Highest on test: {best.name}, {spread(*best.measures['last'])} %."
        )
    return said


def facts(chains: Sequence[Chain]) -> list[str]:
    """What makes numbers comparable: order, memory, held-out images, what energy aligning was chosen by."""
    summary, setting = chains[0].summary, chains[0].cell
    sizes = summary["sizes"]
    listed = " ".join(map(str, summary["order"][:10]))
    kept = ", ".join(f"{size['memory_after']} of {size['memory_budget']}" for size in sizes)
    said = [
        f"Class order {setting.order}: {listed} ...; SHA-256 of all {summary['classes']} ids joined by commas "
        f"{summary['order_sha256']}.",
        f"Classes seen after each step: {', '.join(map(str, summary['ends']))}. Images kept: {kept}. Trained on: "
        f"{', '.join(str(size['train_images']) for size in sizes)}; held out of all training, to fit corrections on: "
        f"{', '.join(str(size['held_out_images']) for size in sizes)}.",
    ]
    for chain in chains:
        candidates = chain.summary["energy_candidates"]
        if candidates:
            best = "; ".join(
                f"{readout_name(name)} {100 * share:.1f} %" for name, share in list(candidates.items())[:3]
            )
            said.append(
                f"{chain.cell.training}, seed {chain.cell.seed}: energy aligning is chosen by accuracy on held-out "
                f"memory, mean over steps: {best}."
            )
    return said


def beside(setting: Setting, published: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """The published rows of a setting: of its data and steps; each says where it differs."""
    rows = []
    for row in published:
        if row["dataset"] == setting.dataset and setting.protocol in row["protocols"].split():
            numbers = [f"{100 * float(row[key]):.1f}" if row[key] else "-" for key in ("average", "last")]
            rows.append([
                row["method"], row["classifier"], *numbers, row["network"], row["memory"], row["order"], row["source"],
            ])  # fmt: skip
    return rows


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


def figures(chains: Sequence[Chain], training: str) -> list[plots.Figure]:
    """Of a training: accuracy over steps, accuracy of each step's classes at the end, energies before and after."""
    mine = [chain for chain in chains if chain.cell.training == training]
    there = [name for name in SHOWN if name in mine[0].summary["readouts"]]
    colour = dict(zip(SHOWN, plots.PALETTE, strict=False))
    ends = mine[0].summary["ends"]
    made = []
    with plots.axes() as axis:
        for name in there:
            curve = over_seeds(mine, "steps", name, "step")
            axis.plot(ends, [100 * np.mean(curve[step]) for step in sorted(curve)], marker="o", ms=3, lw=1.5,
                      color=colour[name], label=NAMES[name].split(",")[0])  # fmt: skip
        axis.set(xlabel="classes seen", ylabel="test accuracy, %", title=f"{training}: after each step")
        axis.legend(loc="best", fontsize=7.5)
        last = {name: mine[0].summary["readouts"][name]["last"] for name in there}
        alt = f"{training}: accuracy over classes seen; at the end " + ", ".join(
            f"{NAMES[name]} {100 * value:.1f} %" for name, value in last.items()
        )
        made.append(plots.picture(axis, alt, "Accuracy over all classes seen, mean over seeds."))
    with plots.axes() as axis:
        for name in there:
            groups = over_seeds(mine, "groups", name, "group", last=True)
            axis.plot([group + 1 for group in sorted(groups)], [100 * np.mean(groups[g]) for g in sorted(groups)],
                      marker="o", ms=3, lw=1.5, color=colour[name], label=NAMES[name].split(",")[0])  # fmt: skip
        axis.set(xlabel="step in which the classes came", ylabel="test accuracy, %", title=f"{training}: at the end")
        axis.set_xticks(range(1, len(ends) + 1))
        raw = over_seeds(mine, "groups", "none", "group", last=True)
        alt = (
            f"{training}: accuracy of each step's classes after the last step; as trained "
            f"{100 * np.mean(raw[len(ends) - 1]):.0f} % for the newest, "
            f"{100 * np.mean([np.mean(raw[group]) for group in range(len(ends) - 1)]):.0f} % for the others"
        )
        made.append(plots.picture(axis, alt, "The bias to the newest classes, and its removal."))
    with plots.axes() as axis:
        for name in [name for name in there if name not in ("nearest_mean", CHOSEN)] + ["energy_old_new_on_memory"]:
            gaps: dict[int, list[float]] = {}
            for chain in mine:
                for row in chain.energies:
                    if row["set"] == "test" and row["readout"] == name:
                        gaps.setdefault(int(row["step"]), []).append(float(row["old"]) - float(row["new"]))
            axis.plot([ends[step] for step in sorted(gaps)], [np.mean(gaps[step]) for step in sorted(gaps)],
                      marker="o", ms=3, lw=1.5, color=colour.get(name, colour[CHOSEN]),
                      label=readout_name(name).split(",")[0])  # fmt: skip
        axis.axhline(0, color="#888888", lw=0.8)
        axis.set(xlabel="classes seen", ylabel="energy of old minus new, nats", title=f"{training}: energies on test")
        alt = f"{training}: mean free energy of old classes minus that of new ones on test images, by step"
        made.append(plots.picture(axis, alt, "Above zero: old classes are thought less probable than they are."))
    return made


def build(
    plan_name: str, plan: Mapping[str, Any], cells_dir: str | Path, published: str | Path
) -> tuple[list[Section], list[Cell], list[Chain]]:
    """The sections of a report, cells that are still to come, and those that have run."""
    chains, absent = read(plan_name, plan, cells_dir)
    known = files.read_csv(published)
    sections = []
    for place in product(*(plan[axis] for axis in ("datasets", "orders", "protocols", "recipes"))):
        setting = Setting(*map(str, place))
        mine = [
            chain for chain in chains
            if Setting(chain.cell.dataset, chain.cell.order, chain.cell.protocol, chain.cell.recipe) == setting
        ]  # fmt: skip
        if not mine:
            continue
        found = [line for training in plan["trainings"] for line in lines(mine, training)]
        sections.append(Section(setting, answers(found), found, facts(mine), beside(setting, known)))
        for training in dict.fromkeys(chain.cell.training for chain in mine):
            sections[-1].figures += figures(mine, training)
    return sections, absent, chains


def markdown(plan_name: str, sections: Sequence[Section], absent: Sequence[Cell]) -> str:
    """The report as a Markdown file."""
    text = [f"# Plan {plan_name}", "", READING, ""]
    for section in sections:
        text += [f"## {section.setting.title}", "", *(f"- {said}" for said in section.answers), ""]
        text += table(HEADER, [line.cells() for line in section.lines])
        if section.published:
            text += ["", "Published, with what it rests on:", "", *table(PUBLISHED, section.published)]
        text += ["", *(f"- {fact}" for fact in section.facts), ""]
    if absent:
        text += [f"Still to come: {', '.join(cell.name for cell in absent)}.", ""]
    return "\n".join(text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def html(plan_name: str, sections: Sequence[Section], absent: Sequence[Cell]) -> str:
    """The report as one self-contained page: no script, nothing fetched, pictures inside."""
    source = Path(__file__).with_name("report.html.j2").read_text()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        plan=plan_name, sections=sections, absent=absent, header=HEADER, published=PUBLISHED, reading=READING,
        first=SHOWN,
    )  # fmt: skip


def write(
    plan_name: str, plan: Mapping[str, Any], *, cells_dir: str | Path, published: str | Path, out_dir: str | Path
) -> None:
    """Read the cells of a plan and write table.md, report.html, summary.json and curves.csv.

    Raises ValueError as `read`; nothing is written then.
    """
    sections, absent, chains = build(plan_name, plan, cells_dir, published)
    out = Path(out_dir)
    page = html(plan_name, sections, absent)
    curves = []
    for section in sections:
        for line in section.lines:
            place = {"training": line.training, "readout": line.readout}
            names = {key: getattr(section.setting, key) for key in ("dataset", "order", "protocol", "recipe")}
            mine = [chain for chain in chains if chain.cell.training == line.training
                    and all(getattr(chain.cell, key) == value for key, value in names.items())]  # fmt: skip
            for step, values in sorted(over_seeds(mine, "steps", line.readout, "step").items()):
                mean, sd = mean_sd(values)
                curves.append({
                    **names, **place, "step": step, "seen": mine[0].summary["ends"][step], "accuracy": mean, "sd": sd,
                    "seeds": len(values),
                })  # fmt: skip
    files.write_text(out / "table.md", markdown(plan_name, sections, absent))
    files.write_text(out / "report.html", page)
    files.write_csv(out / "curves.csv", curves, CURVES)
    files.write_json(
        out / "summary.json",
        {
            section.setting.title: {
                line.training: {
                    other.readout: {key: other.measures[key][0] for key in ("average", "last")}
                    for other in section.lines
                    if other.training == line.training
                }
                for line in section.lines
            }
            for section in sections
        },
    )
