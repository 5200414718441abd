"""What a plan's numbers say, in sentences: which method wins, by how much, and whether that is settled.

Percent and points are in text only; the numbers behind it, and what they mean, are those of longtail.report.outcomes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from longtail.report import differences
from longtail.report.differences import BASELINE, points
from longtail.report.outcomes import ALIGNED, CORRECTIONS, RAW, Results, Row

METHODS = {
    "ce": "Cross-entropy",
    "focal": "Focal loss",
    "class_balanced": "Class-balanced loss",
    "class_balanced_sampling": "Class-balanced sampling",
    "ldam": "LDAM",
    "ldam_drw": "LDAM-DRW",
    "balanced_softmax": "Balanced softmax",
    "lade": "LADE",
    "gala": "GALA (released form)",
    "gala_paper": "GALA (the paper's form)",
    "gala_classifier": "GALA (classifier's side)",
    "inverse": "Logit-adjusted, tau 2",
    "balpoe": "BalPoE (3 experts)",
    "gala_balpoe": "GALA in BalPoE",
    "crt": "cRT",
    "lws": "LWS",
    "tau_norm": "tau-norm",
    "ncm": "NCM",
    "balpoe_apart": "BalPoE, experts apart",
}


class Answer(NamedTuple):
    """What is said of one data set under one recipe, or of all ("") with the command that makes its winner again."""

    dataset: str
    recipe: str
    text: str
    again: str = ""


def answers(results: Results, table: Sequence[Row]) -> list[Answer]:
    """What the numbers say: for each data set the highest of all, then for each recipe its methods."""
    said = []
    for dataset in dict.fromkeys(row.dataset for row in table):
        mine = [row for row in table if row.dataset == dataset]
        run = [row for row in mine if row.n]
        recipes = dict.fromkeys(row.recipe for row in run or mine)
        if run:
            said.append(Answer(dataset, "", *winner(results, dataset, mine)))
        for recipe in recipes:
            rows_ = [row for row in mine if row.recipe == recipe]
            said.append(Answer(dataset, recipe, answer(results, dataset, recipe, rows_)))
    return said


def winner(results: Results, dataset: str, table: Sequence[Row]) -> tuple[str, str]:
    """The highest accuracy over all recipes, methods and corrections, the next method, and how to see it again."""
    leaders: dict[str, Row] = {}  # the highest row of each method
    for row in differences.ranked(table):
        leaders.setdefault(row.method, row)
    first, *others = leaders.values()
    text = f"Highest on {dataset}: {described(first)}, {percent(first)} ({seeds_text([first])})."
    if others:
        second, lead = others[0], differences.behind(results, [first, *others])[0].swapped()
        text += f" The next method is {described(second)}, {percent(second)} ({seeds_text([second])}), "
        text += f"{100 * abs(lead.value):.1f} points lower; {sure_text(lead)}"
    return text, f"longtail run {results.plan_name} --only '{dataset}-{first.recipe}-{first.method}-*'"


def described(row: Row) -> str:
    """`BalPoE (3 experts), recipe fast, logit adjustment`."""
    text = f"{method_name(row.method)}, recipe {row.recipe}"
    return text if row.correction == RAW else f"{text}, {CORRECTIONS[row.correction]}"


def sure_text(lead: differences.Difference) -> str:
    """How far a lead can be trusted: `95 % interval 0.3 to 2.1 points (p = 0.012), over test images ...: settled.`"""
    p = differences.probability(lead.p)
    over = lead.over if lead.seeds else f"{lead.over}, for one seed says nothing of other trainings"
    settled = "settled" if lead.seeds else "settled for these networks, not for the methods"
    return (
        f"95 % interval {100 * lead.low:.1f} to {100 * lead.high:.1f} points (p {p if p[0] == '<' else f'= {p}'}), "
        f"over {over}: {settled if lead.settled else 'not settled'}."
    )


def answer(results: Results, dataset: str, recipe: str, table: Sequence[Row]) -> str:
    """The answer for one data set and recipe, in sentences."""
    raw = [row for row in table if row.correction == RAW and row.n]
    ranked = differences.ranked(raw)
    where = f"On {dataset} with recipe {recipe}, "
    if not ranked:
        return f"{where}no run is in yet."
    first = ranked[0]
    if len(ranked) == 1:
        return f"{where}only {method_name(first.method)} has run: {percent(first)} ({seeds_text([first])})."
    second = ranked[1]
    lead = first.accuracy - second.accuracy
    text = (
        f"{where}{method_name(first.method)} has the highest accuracy: {percent(first)}, "
        f"{100 * lead:.1f} points above {method_name(second.method)} ({percent(second)})"
    )
    base = next((row for row in ranked[2:] if row.method == BASELINE), None)
    if base:
        above = first.accuracy - base.accuracy
        text += f" and {100 * above:.1f} above {method_name(BASELINE)} ({percent(base)})"
    text += f"; {seeds_text(raw)} for each method."
    sure = differences.behind(results, ranked)[0].swapped()
    said = f"The lead over {method_name(second.method)}: {sure_text(sure)}"
    parts = [said, *aligned_text(table, raw), *published_text(raw)]
    return " ".join([text, *parts])


def seeds_text(table: Sequence[Row]) -> str:
    """`2 seeds`, or `1 to 3 seeds` where the rows differ."""
    low, high = min(row.n for row in table), max(row.n for row in table)
    return f"{low} seed{'s' if low > 1 else ''}" if low == high else f"{low} to {high} seeds"


def aligned_text(table: Sequence[Row], raw: Sequence[Row]) -> list[str]:
    """What aligning changes."""
    before = {row.method: row.accuracy for row in raw}
    aligned = [row for row in table if row.correction == ALIGNED]
    if not aligned:
        return []
    gains = [row.accuracy - before[row.method] for row in aligned]
    best = max(aligned, key=lambda row: row.accuracy)
    return [
        f"Logits {CORRECTIONS[ALIGNED]} change accuracy by {points(min(gains))} to {points(max(gains))} "
        f"points; the highest is then {method_name(best.method)}, {percent(best)}."
    ]


def published_text(raw: Sequence[Row]) -> list[str]:
    """How far ours are from what was published, with a word where a published number has a reservation."""
    known = [(row, row.difference, row.published) for row in raw if row.difference is not None]
    if not known:
        return []
    said = [f"{method_name(row.method)} {points(difference)}" for row, difference, _ in known]
    hint = "; not like with like, see the notes" if any(theirs and theirs.flags for *_, theirs in known) else ""
    return [f"Ours minus published, in points: {', '.join(said)}{hint}."]


def method_name(key: str) -> str:
    """A method's name for people."""
    return METHODS.get(key, key)


def spread(mean: float | None, sd: float | None, scale: float = 100, digits: int = 1) -> str:
    """`mean ± sd`, by default in percent; a dash where there is nothing."""
    if mean is None:
        return "-"
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * sd:.{digits}f}" if sd is not None else "")


def percent(row: Row) -> str:
    """The accuracy of a row for a sentence: `93.1 ± 0.4 %`."""
    return f"{spread(*row.measures['accuracy'])} %"
