"""What an incremental plan found: curves over steps, the bias and its removal, and the published values beside ours.

Percent and points are in text only; files hold shares.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longtail.incremental import pictures
from longtail.incremental.outcomes import (
    NAMES,
    Chain,
    Line,
    Setting,
    aligned,
    by_unit,
    difference,
    gain,
    lines,
    mean_sd,
    over_seeds,
    points,
    read,
    readout_name,
    settings,
)
from longtail.incremental.readouts import CHOSEN, FIT_SETS, GROUPINGS, SHOWN
from longtail.report.answers import spread
from longtail.report.document import Document, Entry, Part, Section, Table, html, markdown
from longtail.report.document import Line as Said
from longtail.workflow import files
from longtail.workflow.chains import Cell

UNITS = {"seed": ("Seeds", "seeds"), "order": ("Orders", "class orders")}
HEADER = ("Average", "without step 0", "by classes", "Last", "old", "new",
          "Forgetting", "Top-5: average", "without step 0", "last", "Last against as trained")  # fmt: skip
READING = (
    "Accuracy in percent over the test images of all classes seen, last epoch of every step; mean ± sample standard "
    "deviation over {over}. 'Average': mean over steps, the first included, as PyCIL, DER and the survey print it; "
    "'without step 0': as Weight Aligning's release; 'by classes': each step as many times as it has classes. 'Last', "
    "'old' and 'new': after the last step. 'Forgetting': the best accuracy of a step's classes minus the last, mean "
    "over steps. Top-5: the class is among the five most probable, as BiC reports it. 'Energy aligning' without more "
    "is at each step the grouping and the set that were best on held-out memory up to it. In brackets 95 % intervals "
    "in points: over test images, paired, and over {over} by Student's t; with one seed over images alone."
)
CURVES = ("dataset", "order", "protocol", "recipe", "training", "readout", "step", "seen", "accuracy", "sd", "seeds")
PUBLISHED = ("Method", "Classifier", "Average", "Last", "Network", "Memory", "Order", "Unlike ours", "Source")


def answer(training: str, of: Mapping[str, Line]) -> str:
    """What energy aligning is worth to a training, in a sentence."""
    raw, line = of["none"], aligned(of)
    said = f"{training}: {spread(*raw.measures['last'])} % after the last step as trained"
    if line is None or line.gain is None:
        return f"{said}."
    sure = "settled" if line.gain[1] > 0 or line.gain[2] < 0 else "not settled"
    sure += "" if line.count > 1 else " for these networks, one seed"
    best = max(of.values(), key=lambda line: line.measures["last"][0])
    return (
        f"{said}, {spread(*line.measures['last'])} % with energy aligning ({points(line.gain)} points, {sure}). "
        f"Highest on test: {best.name}, {spread(*best.measures['last'])} %."
    )


def first_table(by: Mapping[str, Mapping[str, Line]], unit: str) -> Table:
    """Trainings x read-outs: accuracy after the last step, and the average over steps."""
    shown = [name for name in SHOWN if any(name in of for of in by.values())]
    highest = max(line.measures["last"][0] for of in by.values() for name, line in of.items() if name in shown)
    rows: list[list[Entry | str]] = []
    for training, of in by.items():
        row: list[Entry | str] = [training, str(of["none"].count)]
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
        f"steps, the first included. Mean ± sample standard deviation over {UNITS[unit][1]}. All columns are of the "
        "same networks."
    )
    return Table(
        "Trainings and read-outs", ("Training", UNITS[unit][0], *(NAMES[name] for name in shown)), rows, 1, note
    )


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


def every_readout(by: Mapping[str, Mapping[str, Line]], unit: str) -> Part:
    """All lines of all trainings."""
    rows = [line.cells() for its in by.values() for line in its.values()]
    header = ("Training", "Read-out", UNITS[unit][0], *HEADER)
    says = "All corrections of each training, with the averages that papers report under one name."
    return Part("Every read-out", says, [Table("Every read-out", header, rows, 2, READING.format(over=UNITS[unit][1]))])


def between(leads: str, by: Mapping[str, Mapping[str, Line]], mine: Sequence[Chain], unit: str) -> Part:
    """Each training against the one that leads: as trained, and both with energy aligning."""
    of = {training: [chain for chain in mine if chain.cell.training == training] for training in by}
    rows: list[list[Entry | str]] = []
    for training in by:
        if training == leads:
            continue
        count, raw = difference(of[training], of[leads], ("none", "none"), unit)
        row: list[Entry | str] = [training, str(count), points(raw)]
        first, second = aligned(by[training]), aligned(by[leads])
        names = (first.readout, second.readout) if first and second else None
        row.append(points(difference(of[training], of[leads], names, unit)[1]) if names else "-")
        rows.append(row)
    note = (
        f"Points of accuracy after the last step against {leads}, of pairs with the same class order and seed. In "
        f"brackets 95 % intervals over {UNITS[unit][1]} and over test images, the latter as if each training had its "
        "own: too wide rather than too narrow."
    )
    header = ("Training", UNITS[unit][0], "as trained", "both with energy aligning")
    return Part(
        "Between trainings",
        f"What a training has against {leads}.",
        [Table("Between trainings", header, rows, 1, note)],
    )


def compared(
    mine: Sequence[Chain], trainings: Sequence[str], unit: str
) -> tuple[dict[str, dict[str, Line]], str, dict[str, str]]:
    """(training -> read-out -> line, the training that leads, a sentence for each)."""
    by = {training: {line.readout: line for line in lines(mine, training, unit)} for training in trainings}
    by = {training: of for training, of in by.items() if of}
    leads = max(by, key=lambda training: (aligned(by[training]) or by[training]["none"]).measures["last"][0])
    return by, leads, {training: answer(training, of) for training, of in by.items()}


def section(
    setting: Setting, mine: Sequence[Chain], trainings: Sequence[str], known: Sequence[Mapping[str, str]]
) -> Section:
    """One setting: the answer, then what is folded."""
    by, leads, said = compared(mine, trainings, "seed")
    of = {training: [chain for chain in mine if chain.cell.training == training] for training in by}
    parts = [every_readout(by, "seed")]
    parts += [between(leads, by, mine, "seed")] if len(by) > 1 else []
    parts += [
        Part("Over steps", "How accuracy falls as classes come.", figures=[
            pictures.over_steps(of[training], training) for training in by
        ]),
        Part("Old and new classes", "Which step's classes are known at the end.", figures=[
            pictures.by_step(of[training], training) for training in by
        ]),
        Part("Confusion between steps", "Which step's classes are taken for which.", figures=[
            pictures.confusion(of[training], training, name)
            for training in by for name in ("none", CHOSEN) if name in pictures.drawn(of[training])
        ]),
        Part("Energies", "What aligning makes equal: mean free energies of old and of new classes.", figures=[
            pictures.energies(of[training], training) for training in by
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
    more = [text for training, text in said.items() if training != leads]
    picture = pictures.by_step(of[most], most)
    return Section(setting.title, said[leads], more, first_table(by, "seed"), picture, parts)


def over_orders(plan: Mapping[str, Any], chains: Sequence[Chain]) -> list[Section]:
    """What holds over class orders: a section for each data set, protocol and recipe that ran with several."""
    kinds: dict[tuple[str, str, str], list[Chain]] = {}
    for setting, mine in settings(plan, chains).items():
        kinds.setdefault((setting.dataset, setting.protocol, setting.recipe), []).extend(mine)
    sections = []
    for kind, mine in kinds.items():
        trainings = [
            training for training in plan["trainings"]
            if len(by_unit((chain for chain in mine if chain.cell.training == training), "order")) > 1
        ]  # fmt: skip
        if not trainings:
            continue
        by, leads, said = compared(mine, trainings, "order")
        parts = [every_readout(by, "order")]
        parts += [between(leads, by, mine, "order")] if len(by) > 1 else []
        more = [text for training, text in said.items() if training != leads]
        title = f"{' · '.join(kind)}, over class orders"
        sections.append(Section(title, said[leads], more, first_table(by, "order"), None, parts))
    return sections


def build(
    plan_name: str, plan: Mapping[str, Any], chains: Sequence[Chain], absent: Sequence[Cell], published: str | Path
) -> Document:
    """The whole report."""
    known, sections = files.read_csv(published), []
    for setting, mine in settings(plan, chains).items():
        sections.append(section(setting, mine, plan["trainings"], known))
    sections = over_orders(plan, chains) + sections
    under = (
        "Class-incremental learning: classes arrive in steps, few images of old ones are kept; each training once, "
        f"every correction on its saved logits. {len(chains)} of {len(chains) + len(absent)} cells have run"
    )
    waiting = f"; `longtail status {plan_name}` says which are to come." if absent else "."
    return Document(f"Results of plan {plan_name}", under + waiting, sections)


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
