"""What a plan's numbers say, in sentences: which method wins, by how much, and whether that is settled.

Percent and points are in text only; the numbers behind it, and what they mean, are those of longtail.report.outcomes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from longtail.report import differences
from longtail.report.differences import BASELINE, points, points_range, unsigned
from longtail.report.outcomes import ADJUSTED, ALIGNED, CORRECTIONS, RAW, Results, Row

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
    # the runs of a screen (docs/composed.md): what is added to BalPoE, short enough for legends
    "screen_01": "+ τ teach cons margin",
    "screen_02": "+ teach focus margin",
    "screen_03": "+ τ focus cons",
    "screen_04": "+ teach cons margin",
    "screen_05": "+ focus margin",
    "screen_06": "+ cons",
    "screen_07": "+ τ margin",
    "screen_08": "+ τ teach",
    "screen_09": "+ τ teach focus",
    "screen_10": "+ teach focus cons",
    "screen_11": "+ τ focus cons margin",
    "screen_12": "BalPoE alone",
    "balpoe_imagenet": "BalPoE (ImageNet's tau)",
    "balpoe_inaturalist": "BalPoE (iNaturalist's)",
    "balpoe_five": "BalPoE (5 experts)",
    "balpoe_five_deferred": "BalPoE (5), deferred",
    "balpoe_five_mirrored": "BalPoE (5), flips at test",
    "balpoe_five_recall": "BalPoE (5), recall",
}


class Answer(NamedTuple):
    """What is said of one data set under one recipe."""

    dataset: str
    recipe: str
    text: str


class Headline(NamedTuple):
    """What one data set's numbers say: a sentence, and what else to know and to do."""

    text: str
    more: tuple[str, ...] = ()


def entrants(table: Sequence[Row]) -> list[Row]:
    """The rows that stand in the first table: raw logits, and cross-entropy's with logit adjustment, a method too."""
    return [row for row in table if row.correction == RAW or (row.method, row.correction) == (BASELINE, ADJUSTED)]


def entrant_name(row: Row) -> str:
    """`GALA (released form)`; `Cross-entropy with logit adjustment`."""
    name = method_name(row.method)
    return name if row.correction == RAW else f"{name} with {CORRECTIONS[row.correction]}"


def headline(results: Results, table: Sequence[Row]) -> Headline:
    """What wins among the entrants of a data set, by how much, whether that is settled, and what to do.

    Each method is compared at its best recipe; where that is another than the winner's, what the method has over others
    with the same recipe is said as well.
    """
    leaders: dict[tuple[str, str], Row] = {}  # the highest row of each entrant
    for row in differences.ranked(entrants(table)):
        leaders.setdefault((row.method, row.correction), row)
    if not leaders:
        return Headline("No run is in yet.", (f"Start with `longtail run {results.plan_name}`.",))
    first, *others = leaders.values()
    again = f"longtail run {results.plan_name} --only '{first.dataset}-{first.recipe}-{first.method}-*'"
    if not others:
        alone = f"{percent(first)} with recipe {first.recipe} ({seeds_text([first])})"
        if not any(cell.dataset == first.dataset for cell in results.missing):
            return Headline(f"Only {entrant_name(first)} is in this plan: {alone}.")
        text = f"Only {entrant_name(first)} has run: {alone}."
        return Headline(text, (f"The rest: `longtail run {results.plan_name}`.",))
    leads = [one.swapped() for one in differences.behind(results, [first, *others])]
    second, lead = others[0], leads[0]
    # further down, but with so few seeds, or such a spread, that it might be level
    open_ = [(row, one) for row, one in zip(others[1:], leads[1:], strict=True) if not one.settled]
    where = "" if second.recipe == first.recipe else f", recipe {second.recipe}"
    other = f"{entrant_name(second)} ({percent(second)}{where})"
    seeds = seeds_text([first, second])
    if lead.settled:
        does = "has the highest accuracy" if open_ else wins(results, first.dataset)
        text = (
            f"{entrant_name(first)} {does}: {percent(first)} with recipe {first.recipe} "
            f"({seeds}), {100 * lead.value:.1f} points above the next method, {other}: {verdict(lead)}."
        )
        if open_:
            named = ", ".join(f"{entrant_name(row)} ({percent(row)}, recipe {row.recipe})" for row, _ in open_)
            text = f"{text[:-1]}, but it cannot be told apart from {named}."
    else:
        above = f"{100 * lead.value:.1f} points above the next method, {other}, are"
        if abs(100 * lead.value) < 0.05:
            above = f"lead is below a tenth of a point, and over the next method, {other}, it is"
        text = (
            f"{entrant_name(first)} has the highest accuracy, {percent(first)} with recipe {first.recipe} ({seeds}), "
            f"but its {above} {verdict(lead)}."
        )
    interval = (
        f"95 % interval of that difference: {unsigned(lead.low)} to {unsigned(lead.high)} points, over {lead.over}."
    )
    more = interval if second.recipe == first.recipe else f"{interval} {same_recipe(results, first, table)}"
    rival, closest = open_[0] if lead.settled and open_ else (second, lead)
    return Headline(text, (more, to_do(results, [first, rival], closest, again)))


def wins(results: Results, dataset: str) -> str:
    """`wins`; while runs of the data set are missing, how many are in."""
    done, missing = (sum(cell.dataset == dataset for cell in cells) for cells in (results.cells, results.missing))
    return f"is ahead with {done} of {done + missing} runs in" if missing else "wins"


def verdict(lead: differences.Difference) -> str:
    """Whether it is settled which is higher, in a word or two."""
    if not lead.settled:
        return "not settled"
    return "settled" if lead.seeds else "settled for these networks, not yet for the methods (one seed)"


def same_recipe(results: Results, first: Row, table: Sequence[Row]) -> str:
    """What the winner's method has over the best other one with the same recipe, where most seeds of both have run."""
    pairs = []
    for recipe in dict.fromkeys(row.recipe for row in table):
        ranked = differences.ranked([row for row in entrants(table) if row.recipe == recipe])
        own = [row for row in ranked if (row.method, row.correction) == (first.method, first.correction)]
        rest = [row for row in ranked if row not in own]
        pairs += [(own[0], rest)] if own and rest else []
    if not pairs:
        return f"No other method has run with recipe {first.recipe}: part of the lead may be the recipe's."
    mine, rest = max(pairs, key=lambda pair: (min(pair[0].n, pair[1][0].n), pair[0].accuracy))
    rival, found = rest[0], differences.behind(results, [mine, *rest])[0].swapped()  # the best of several: p is Holm's
    side = "above" if found.value >= 0 else "below"
    return (
        f"The recipes differ; with the same one ({mine.recipe}, {seeds_text([mine, rival])}) it is "
        f"{100 * abs(found.value):.1f} points {side} {entrant_name(rival)}: {verdict(found)}."
    )


def to_do(results: Results, pair: Sequence[Row], lead: differences.Difference, again: str) -> str:
    """The command that brings one further: the seeds that are missing, more seeds, or the winner once more."""
    if not (lead.settled and lead.seeds):
        if short := [row for row in pair if row.n < row.planned]:
            patterns = dict.fromkeys(f"{row.dataset}-{row.recipe}-{row.method}-*" for row in short)
            runs = " and ".join(f"`longtail run {results.plan_name} --only '{only}'`" for only in patterns)
            return f"To do: run the seeds that are missing, {runs}."
        more = f"To do: more seeds would tell, `plans.{results.plan_name}.seeds` in params.yaml"
        return f"{more}; until then take the one that costs less." if not lead.settled else f"{more}."
    if any(cell.dataset == pair[0].dataset for cell in results.missing):
        return f"To do: run the rest, `longtail run {results.plan_name}`."
    return f"To do: take it; `{again}` makes it again."


def answers(results: Results, table: Sequence[Row]) -> list[Answer]:
    """What the numbers say of the methods of each data set with each recipe."""
    said = []
    for dataset in dict.fromkeys(row.dataset for row in table):
        mine = [row for row in table if row.dataset == dataset]
        run = [row for row in mine if row.n]
        for recipe in dict.fromkeys(row.recipe for row in run or mine):
            rows_ = [row for row in mine if row.recipe == recipe]
            said.append(Answer(dataset, recipe, answer(results, dataset, recipe, rows_)))
    return said


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
        f"95 % interval {unsigned(lead.low)} to {unsigned(lead.high)} points (p {p if p[0] == '<' else f'= {p}'}), "
        f"over {over}: {settled if lead.settled else 'not settled'}."
    )


def answer(results: Results, dataset: str, recipe: str, table: Sequence[Row]) -> str:
    """The answer for one data set and recipe, in sentences."""
    raw = [row for row in table if row.correction == RAW and row.n]
    ranked = differences.ranked(entrants(table))
    where = f"On {dataset} with recipe {recipe}, "
    if not ranked:
        return f"{where}no run is in yet."
    first = ranked[0]
    if len(ranked) == 1:
        return f"{where}only {entrant_name(first)} has run: {percent(first)} ({seeds_text([first])})."
    second = ranked[1]
    sure = differences.behind(results, ranked)[0].swapped()
    text = (
        f"{where}{entrant_name(first)} has the highest accuracy: {percent(first)}, "
        f"{unsigned(sure.value)} points above {entrant_name(second)} ({percent(second)})"
    )
    base = next((row for row in ranked[2:] if (row.method, row.correction) == (BASELINE, RAW)), None)
    if base:
        above = differences.compared(results, first, base).value
        text += f" and {unsigned(above)} above {method_name(BASELINE)} ({percent(base)})"
    text += f"; {seeds_text(ranked)} for each method."
    said = f"The lead over {entrant_name(second)}: {sure_text(sure)}"
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
        f"Logits {CORRECTIONS[ALIGNED]} change accuracy by {points_range(gains)}; the highest is then "
        f"{method_name(best.method)}, {percent(best)}."
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
