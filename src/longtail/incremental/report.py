"""What an incremental plan found: curves over steps, the bias and its removal, and the published values beside ours.

Percent and points are in text only; files hold shares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from longtail.incremental.readouts import CHOSEN, FIT_SETS, GROUPINGS, SHOWN
from longtail.report import plots
from longtail.report.answers import spread
from longtail.report.document import Document, Entry, Part, Section, Table, html, markdown
from longtail.report.document import Line as Said
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
HEADER = ("Training", "Read-out", "Seeds", "Average", "without step 0", "by classes", "Last", "old", "new",
          "Forgetting", "Top-5: average", "without step 0", "last", "Last against as trained")  # fmt: skip
READING = (
    "Accuracy in percent over the test images of all classes seen, last epoch of every step; mean ± sample standard "
    "deviation over seeds. 'Average': mean over steps, the first included, as PyCIL, DER and the survey print it; "
    "'without step 0': as Weight Aligning's release; 'by classes': each step as many times as it has classes. 'Last', "
    "'old' and 'new': after the last step. 'Forgetting': the best accuracy of a step's classes minus the last, mean "
    "over steps. Top-5: the class is among the five most probable, as BiC reports it. 'Energy aligning' without more "
    "is at each step the grouping and the set that were best on held-out memory up to it. In brackets 95 % intervals "
    "in points: over test images, paired, and over seeds by Student's t; with one seed over images alone."
)
CURVES = ("dataset", "order", "protocol", "recipe", "training", "readout", "step", "seen", "accuracy", "sd", "seeds")


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


MOST_IN_A_PICTURE = 12  # steps whose shares are written into a picture
PUBLISHED = ("Method", "Classifier", "Average", "Last", "Network", "Memory", "Order", "Unlike ours", "Source")


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
        rows = [files.read_csv(folder / f"{name}.csv") for name in ("steps", "groups", "energies", "confusion")]
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


def aligned(of: Mapping[str, Line]) -> Line | None:
    """The energy aligning that stands for all: the one chosen on held-out memory, or old/new on the exemplars."""
    return of.get(CHOSEN) or of.get(OLD_NEW)


def gain(of: Mapping[str, Line]) -> float:
    """What energy aligning surely adds after the last step, the low end of its interval; 0 where it was not tried."""
    line = aligned(of)
    return 0.0 if line is None or line.gain is None else line.gain[1]


def answer(training: str, of: Mapping[str, Line]) -> str:
    """What energy aligning is worth to a training, in a sentence."""
    raw, line = of["none"], aligned(of)
    said = f"{training}: {spread(*raw.measures['last'])} % after the last step as trained"
    if line is None or line.gain is None:
        return f"{said}."
    sure = "settled" if line.gain[1] > 0 or line.gain[2] < 0 else "not settled"
    sure += "" if line.seeds > 1 else " for these networks, one seed"
    best = max(of.values(), key=lambda line: line.measures["last"][0])
    return (
        f"{said}, {spread(*line.measures['last'])} % with energy aligning ({points(line.gain)} points, {sure}). "
        f"Highest on test: {best.name}, {spread(*best.measures['last'])} %."
    )


def first_table(by: Mapping[str, Mapping[str, Line]]) -> Table:
    """Trainings x read-outs: accuracy after the last step, and the average over steps."""
    shown = [name for name in SHOWN if any(name in of for of in by.values())]
    highest = max(line.measures["last"][0] for of in by.values() for name, line in of.items() if name in shown)
    rows: list[list[Entry | str]] = []
    for training, of in by.items():
        row: list[Entry | str] = [training, str(of["none"].seeds)]
        for name in shown:
            if name not in of:
                row.append("-")
                continue
            last = of[name].measures["last"]
            under = (spread(*of[name].measures["average"]),)
            row.append(Entry(spread(*last), best=last[0] == highest, under=under))
        rows.append(row)
    note = (
        "Accuracy in percent over the test images of all classes, after the last step; below it the average over "
        "steps, the first included. Mean ± sample standard deviation over seeds. All columns are of the same networks."
    )
    return Table("Trainings and read-outs", ("Training", "Seeds", *(NAMES[name] for name in shown)), rows, 1, note)


def facts(chains: Sequence[Chain]) -> list[str]:
    """What makes numbers comparable: order, memory, held-out images, what energy aligning was chosen by."""
    summary, setting = chains[0].summary, chains[0].cell
    sizes = summary["sizes"]
    listed = " ".join(map(str, summary["order"][:10]))
    kept = ", ".join(f"{size['memory_after']} of {size['memory_budget']}" for size in sizes)
    held_out = ", ".join(str(size["held_out_images"]) for size in sizes)
    trained: dict[str, list[str]] = {}  # by how many images in each step: without replay there are fewer
    for chain in chains:
        row = ", ".join(str(size["train_images"]) for size in chain.summary["sizes"])
        names = trained.setdefault(row, [])
        names += [chain.cell.training] if chain.cell.training not in names else []
    of_which = "; ".join(f"{row} ({', '.join(names)})" if len(trained) > 1 else row for row, names in trained.items())
    said = [
        f"Class order {setting.order}: {listed} ...; SHA-256 of all {summary['classes']} ids joined by commas "
        f"`{summary['order_sha256']}`; of their names, sorted, a line each, `{summary['names_sha256']}`.",
        f"Classes seen after each step: {', '.join(map(str, summary['ends']))}. Images kept: {kept}. Trained on: "
        f"{of_which}; held out of all training, to fit corrections on: {held_out}.",
    ]
    for chain in chains:
        if candidates := best_first(chain.summary["energy_candidates"]):
            best = "; ".join(f"{readout_name(name)} {100 * share:.1f} %" for name, share in candidates[:3])
            said.append(
                f"{chain.cell.training}, seed {chain.cell.seed}: energy aligning is chosen by accuracy on held-out "
                f"memory, a mean over the steps so far; after the last: {best}."
            )
    return said


def best_first(candidates: Mapping[str, float]) -> list[tuple[str, float]]:
    """The ways to align energies by their accuracy on held-out memory; the first is the one that was chosen.

    JSON has them by name, and among equals that one was taken which readouts.py makes first.
    """
    order = [f"energy_{grouping}_on_{on}" for on in FIT_SETS for grouping in GROUPINGS]
    return sorted(candidates.items(), key=lambda item: (-item[1], order.index(item[0])))


def memory_of(summary: Mapping[str, Any]) -> str:
    """A chain's memory in the words of the published table: '2,000 in total', or '20 a class'."""
    budgets = [size["memory_budget"] for size in summary["sizes"]]
    if len(set(budgets)) == 1:
        return f"{budgets[0]:,} in total"
    return f"{budgets[0] // summary['ends'][0]} a class"


def beside(
    setting: Setting, summary: Mapping[str, Any], published: Sequence[Mapping[str, str]]
) -> list[list[str]]:  # fmt: skip
    """The published rows of a setting: of its data and steps; each says where it differs.

    Args:
        summary: of one of the setting's chains.
    """
    rows = []
    held_out = any(size["held_out_images"] for size in summary["sizes"])
    for row in published:
        if row["dataset"] == setting.dataset and setting.protocol in row["protocols"].split():
            numbers = [f"{100 * float(row[key]):.1f}" if row[key] else "-" for key in ("average", "last")]
            unlike = ["memory"] if row["memory"] != memory_of(summary) else []
            unlike += ["order"] if row["order"] != setting.order else []
            unlike += ["all of the memory trained on"] if held_out and row["method"] != "BiC" else []
            unlike += ["top-5"] if "top-5" in row["classifier"] else []
            rows.append([
                row["method"], row["classifier"], *numbers, row["network"], row["memory"],
                row["order"], ", ".join(unlike) or "-", row["source"],
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


def label(name: str) -> str:
    """A read-out in a legend."""
    return readout_name(name).split(",")[0]


def drawn(mine: Sequence[Chain]) -> list[str]:
    """The read-outs that pictures show of a training."""
    return [name for name in SHOWN if name in mine[0].summary["readouts"]]


COLOUR = dict(zip(SHOWN, plots.PALETTE, strict=False))


def over_steps_figure(mine: Sequence[Chain], training: str) -> plots.Figure:
    """Accuracy over all classes seen, after each step."""
    ends = mine[0].summary["ends"]
    with plots.axes() as axis:
        for name in drawn(mine):
            curve = over_seeds(mine, "steps", name, "step")
            values = [100 * float(np.mean(curve[step])) for step in sorted(curve)]
            axis.plot(ends, values, marker="o", ms=3, lw=1.5, color=COLOUR[name], label=label(name))
        axis.set(xlabel="classes seen", ylabel="test accuracy, %", title=training)
        axis.legend(loc="best", fontsize=7.5)
        last = ", ".join(f"{label(name)} {100 * last_of(mine, name):.1f} %" for name in drawn(mine))
        alt = f"{training}: accuracy over the classes seen; at the end {last}"
        return plots.picture(axis, alt, "Over all classes seen, mean over seeds.")


def by_step_figure(mine: Sequence[Chain], training: str) -> plots.Figure:
    """Accuracy of the classes of each step, after the last one: the bias and its removal."""
    count = len(mine[0].summary["ends"])
    with plots.axes() as axis:
        for name in drawn(mine):
            groups = over_seeds(mine, "groups", name, "group", last=True)
            values = [100 * float(np.mean(groups[group])) for group in sorted(groups)]
            axis.plot(range(1, count + 1), values, marker="o", ms=3, lw=1.5, color=COLOUR[name], label=label(name))
        axis.set(xlabel="step in which the classes came", ylabel="test accuracy, %", title=f"{training}: at the end")
        axis.set_xticks(range(1, count + 1))
        axis.legend(loc="best", fontsize=7.5)
        raw = over_seeds(mine, "groups", "none", "group", last=True)
        old = float(np.mean([np.mean(raw[group]) for group in range(count - 1)]))
        alt = (
            f"{training}, accuracy of each step's classes after the last step: as trained {100 * old:.0f} % for the "
            f"old ones and {100 * float(np.mean(raw[count - 1])):.0f} % for the newest"
        )
        return plots.picture(axis, alt, "The bias to the newest classes, and what removes it.")


def energies_figure(mine: Sequence[Chain], training: str) -> plots.Figure:
    """Mean free energy of old classes minus that of new ones on test images, before and after."""
    ends = mine[0].summary["ends"]
    with plots.axes() as axis:
        for name in [*(name for name in drawn(mine) if name not in ("nearest_mean", CHOSEN)), OLD_NEW]:
            gaps: dict[int, list[float]] = {}
            for chain in mine:
                for row in chain.energies:
                    if row["set"] == "test" and row["readout"] == name:
                        gaps.setdefault(int(row["step"]), []).append(float(row["old"]) - float(row["new"]))
            values = [float(np.mean(gaps[step])) for step in sorted(gaps)]
            places = [ends[step] for step in sorted(gaps)]
            axis.plot(
                places, values, marker="o", ms=3, lw=1.5, color=COLOUR.get(name, COLOUR[CHOSEN]), label=label(name)
            )
        axis.axhline(0, color="#888888", lw=0.8)
        axis.legend(loc="best", fontsize=7.5)
        axis.set(xlabel="classes seen", ylabel="energy of old minus new, nats", title=training)
        alt = f"{training}: mean free energy of old classes minus that of new ones on test images, by step"
        return plots.picture(axis, alt, "Above zero, old classes are thought less probable than they are.")


def confusion_figure(mine: Sequence[Chain], training: str, readout: str) -> plots.Figure:
    """Which step's classes are taken for which, after the last step: shares of each row's images, mean over seeds."""
    count = len(mine[0].summary["ends"])
    shares = np.zeros((count, count))
    for chain in mine:
        for row in chain.confusion:
            if row["readout"] == readout and int(row["step"]) == count - 1:
                shares[int(row["group"]), int(row["predicted"])] += float(row["images"])
    newest = 100 * float(shares[:-1, -1].sum() / shares[:-1].sum())
    shares /= shares.sum(1, keepdims=True)
    with plots.axes(plots.SMALL_WIDTH, plots.SMALL_HEIGHT) as axis:
        axis.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
        for row, column in np.ndindex(count, count):
            value = round(float(100 * shares[row, column]))
            if count <= MOST_IN_A_PICTURE and value:
                axis.text(column, row, str(value), ha="center", va="center", fontsize=6.5,
                          color="white" if value > 60 else "#1a1a1a")  # fmt: skip
        axis.set(xlabel="taken for classes of step", ylabel="classes of step", title=f"{training}: {label(readout)}")
        places = range(0, count, -(-count // 10))
        axis.set_xticks(places, [str(place + 1) for place in places])
        axis.set_yticks(places, [str(place + 1) for place in places])
        axis.grid(visible=False)
        alt = f"{training}, {label(readout)}: {newest:.0f} % of the old classes' images are taken for the newest step's"
        return plots.picture(axis, alt, "Percent of a step's test images, after the last step.")


def last_of(mine: Sequence[Chain], readout: str) -> float:
    """Accuracy after the last step, mean over seeds."""
    return float(np.mean([chain.summary["readouts"][readout]["last"] for chain in mine]))


def section(
    setting: Setting, mine: Sequence[Chain], trainings: Sequence[str], known: Sequence[Mapping[str, str]]
) -> Section:
    """One setting: the answer, then what is folded."""
    by = {training: {line.readout: line for line in lines(mine, training)} for training in trainings}
    by = {training: of for training, of in by.items() if of}
    said = {training: answer(training, of) for training, of in by.items()}
    leads = max(by, key=lambda training: (aligned(by[training]) or by[training]["none"]).measures["last"][0])
    of = {training: [chain for chain in mine if chain.cell.training == training] for training in by}
    every = [line.cells() for its in by.values() for line in its.values()]
    parts = [
        Part(
            "Every read-out",
            "All corrections of each training, with the averages that papers report under one name.",
            [Table("Every read-out", HEADER, every, 2, READING)],
        ),
        Part("Over steps", "How accuracy falls as classes come.", figures=[
            over_steps_figure(of[training], training) for training in by
        ]),
        Part("Old and new classes", "Which step's classes are known at the end.", figures=[
            by_step_figure(of[training], training) for training in by
        ]),
        Part("Confusion between steps", "Which step's classes are taken for which.", figures=[
            confusion_figure(of[training], training, name)
            for training in by for name in ("none", CHOSEN) if name in drawn(of[training])
        ]),
        Part("Energies", "What aligning makes equal: mean free energies of old and of new classes.", figures=[
            energies_figure(of[training], training) for training in by
        ]),
    ]  # fmt: skip
    if rows := beside(setting, mine[0].summary, known):
        says = f"{len(rows)} published values of these steps; network and epochs are to be held against our recipe."
        parts.append(Part("Published", says, [Table("Published", PUBLISHED, rows, 2)]))
    parts.append(Part(
        "Order, memory, and what was chosen", "What a number of this kind rests on.",
        lines=[Said(fact) for fact in facts(mine)],
    ))  # fmt: skip
    most = max(by, key=lambda training: gain(by[training]))  # where there is most to see
    picture = by_step_figure(of[most], most)
    more = [text for training, text in said.items() if training != leads]
    return Section(setting.title, said[leads], more, first_table(by), picture, parts)


def build(
    plan_name: str, plan: Mapping[str, Any], chains: Sequence[Chain], absent: Sequence[Cell], published: str | Path
) -> Document:
    """The whole report."""
    known, sections = files.read_csv(published), []
    for setting, mine in settings(plan, chains).items():
        sections.append(section(setting, mine, plan["trainings"], known))
    under = (
        "Class-incremental learning: classes arrive in steps, few images of old ones are kept; each training once, "
        f"every correction on its saved logits. {len(chains)} of {len(chains) + len(absent)} cells have run"
    )
    waiting = f"; `longtail status {plan_name}` says which are to come." if absent else "."
    return Document(f"Results of plan {plan_name}", under + waiting, sections)


def settings(plan: Mapping[str, Any], chains: Sequence[Chain]) -> dict[Setting, list[Chain]]:
    """The finished chains of each setting of a plan, in its order."""
    found: dict[Setting, list[Chain]] = {}
    for place in product(*(plan[axis] for axis in ("datasets", "orders", "protocols", "recipes"))):
        setting = Setting(*map(str, place))
        mine = [chain for chain in chains if Setting.of(chain.cell) == setting]
        if mine:
            found[setting] = mine
    return found


def curves(setting: Setting, mine: Sequence[Chain], line: Line) -> list[dict[str, Any]]:
    """The rows of curves.csv of one line: accuracy after each step."""
    of = [chain for chain in mine if chain.cell.training == line.training]
    rows = []
    for step, values in sorted(over_seeds(of, "steps", line.readout, "step").items()):
        mean, sd = mean_sd(values)
        rows.append({
            **vars(setting), "training": line.training, "readout": line.readout, "step": step,
            "seen": of[0].summary["ends"][step], "accuracy": mean, "sd": sd, "seeds": len(values),
        })  # fmt: skip
    return rows


def write(
    plan_name: str, plan: Mapping[str, Any], *, cells_dir: str | Path, published: str | Path, out_dir: str | Path
) -> None:
    """Read the cells of a plan and write table.md, report.html, summary.json and curves.csv.

    Raises ValueError as `read`; nothing is written then.
    """
    chains, absent = read(plan_name, plan, cells_dir)
    document, out = build(plan_name, plan, chains, absent, published), Path(out_dir)
    summary: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for setting, mine in settings(plan, chains).items():
        for training in plan["trainings"]:
            for line in lines(mine, training):
                rows += curves(setting, mine, line)
                place = summary.setdefault(setting.title, {}).setdefault(training, {})
                place[line.readout] = {key: line.measures[key][0] for key in ("average", "last")}
    files.write_text(out / "table.md", markdown(document))
    files.write_text(out / "report.html", html(document))
    files.write_csv(out / "curves.csv", rows, CURVES)
    files.write_json(out / "summary.json", summary)
