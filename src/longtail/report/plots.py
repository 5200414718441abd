"""The pictures of the report: small PNG files without date or program name, the same for the same numbers.

Sizes are in CSS pixels; a picture has twice as many, so that it stays sharp on fine screens and in print.
The only file that imports matplotlib.
"""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from PIL import Image

PALETTE = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#aa4499", "#b08800", "#56b4e9", "#882255")
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
    "legend.fontsize": 8.5,
    "text.color": "#1a1a1a",
    "axes.labelcolor": "#1a1a1a",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "text.parse_math": False,  # a dollar sign in a class name is a dollar sign
}
WIDTH, HEIGHT = 420, 300
WIDE = 600
SMALL_WIDTH, SMALL_HEIGHT = 320, 260  # four in a row on a wide page
PIXELS = 96  # CSS pixels in an inch
RATIO_TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)
MANY_MARKS = 16  # a legend of more would hide them
HALF_A_LEGEND = 28  # letters that two columns of a legend have room for
MANY_CLASSES = 30  # from here on, classes are summed up by neighbours
NEIGHBOURS = 10
PALETTE_SIZE = 64  # a chart needs no more colours, and the page is a quarter of the size

Row = Mapping[str, Any]


class Figure(NamedTuple):
    """A picture for a page: `uri` is a data URI, width and height are CSS pixels."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str


def colours(methods: Sequence[str]) -> dict[str, str]:
    """One colour a method, by its place in the plan."""
    return {method: PALETTE[i % len(PALETTE)] for i, method in enumerate(methods)}


def leading(table: Sequence[Row], baseline: str) -> list[str]:
    """As many methods as there are colours, in the table's order: all, or the baseline and those of highest accuracy.

    Accuracy is that of the raw rows, mean over recipes.
    """
    accuracies: dict[str, list[float]] = {}
    for row in table:
        accuracies.setdefault(row["method"], [])
        if row["correction"] == "raw" and row["n"]:
            accuracies[row["method"]].append(row["accuracy_mean"])
    means = {method: mean(values) if values else -1.0 for method, values in accuracies.items()}
    ranked = sorted(means, key=lambda method: (method != baseline, -means[method]))[: len(PALETTE)]
    return [method for method in accuracies if method in ranked]


@contextmanager
def axes(width: int = WIDTH, height: int = HEIGHT) -> Iterator[Axes]:
    """Axes of a new picture in the report's style, whatever the reader's own matplotlib settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]  # its names are a Literal
        canvas = Canvas(figsize=(width / PIXELS, height / PIXELS), layout="constrained")
        yield canvas.add_subplot()


def picture(axis: Axes, alt: str, caption: str) -> Figure:
    """The finished picture; call it inside `with axes()`."""
    canvas = axis.get_figure()
    assert isinstance(canvas, Canvas)
    drawn, packed = io.BytesIO(), io.BytesIO()
    canvas.savefig(drawn, format="png", dpi=2 * PIXELS, metadata={"Software": None})
    Image.open(drawn).convert("RGB").quantize(PALETTE_SIZE).save(packed, "PNG", optimize=True)
    width, height = (round(inches * PIXELS) for inches in canvas.get_size_inches())
    data = base64.b64encode(packed.getvalue()).decode()
    return Figure(f"data:image/png;base64,{data}", width, height, alt, caption)


def overview(groups: Sequence[tuple[str, Sequence[Row]]], *, recipes: Sequence[str]) -> Figure:
    """Accuracy of every method with every recipe on one axis, and the published values: what a reader wants first.

    Args:
        groups: a name and its rows {recipe, n, accuracies, accuracy_mean, accuracy_sd, published}, from the top.
        recipes: in the order of their colours and marks.
    """
    shown = [recipe for recipe in recipes if any(row["recipe"] == recipe for _, rows in groups for row in rows)]
    crowd = len(groups) > 8
    step = 0.62 / max(len(shown), 2)
    said = []
    height = 62 + (22 if crowd else 20 + 11 * len(shown)) * len(groups) + 18 * -(-(len(shown) + 1) // 3)
    with axes(WIDE - 24, max(height, 220)) as axis:
        for place, (name, rows) in enumerate(groups):
            words = []
            for row in rows:
                order = shown.index(row["recipe"])
                colour, mark = PALETTE[(order + 1) % len(PALETTE)], "osD^vP"[order % 6]
                y = place + (order - (len(shown) - 1) / 2) * step
                if row["n"]:
                    mean_, sd = 100 * row["accuracy_mean"], 100 * (row["accuracy_sd"] or 0)
                    axis.errorbar(mean_, y, xerr=sd or None, color=colour, marker=mark, markersize=5.5, linewidth=1.6,
                                  zorder=3)  # fmt: skip
                    words.append(f"{row['recipe']} {mean_:.1f} %")
                if row["published"] is not None:
                    axis.plot([100 * row["published"]], [y], linestyle="none", marker=mark, markersize=9, color=colour,
                              markerfacecolor="none", markeredgewidth=1.1, zorder=2)  # fmt: skip
                    words.append(f"published for {row['recipe']} {100 * row['published']:.1f} %")
            said.append(f"{name}: {', '.join(words)}")
        for line in range(1, len(groups)):
            axis.axhline(line - 0.5, color="#e4e4e4", linewidth=0.8)
        axis.set_yticks(range(len(groups)), [name for name, _ in groups])
        axis.set(xlabel="test accuracy (%)", ylim=(len(groups) - 0.5, -0.5))
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        for order, recipe in enumerate(shown):
            axis.plot([], [], linestyle="none", marker="osD^vP"[order % 6], color=PALETTE[(order + 1) % len(PALETTE)],
                      label=recipe)  # fmt: skip
        published = any(row["published"] is not None for _, rows in groups for row in rows)
        if published:
            axis.plot([], [], linestyle="none", marker="o", markersize=9, markerfacecolor="none", color="#4d4d4d",
                      label="hollow: published")  # fmt: skip
        canvas = axis.get_figure()
        assert isinstance(canvas, Canvas)
        canvas.legend(loc="outside lower center", ncols=3, columnspacing=1.2, handletextpad=0.2)
        caption = "Filled: ours, mean ± standard deviation over seeds." + (" Hollow: published." if published else "")
        return picture(axis, f"Test accuracy, the highest method first. {'; '.join(said)}.", caption)


def class_profile(rows: Sequence[Row], *, dataset: str) -> Figure:
    """Training images of each class, largest first."""
    ranked = sorted(rows, key=lambda row: -row["train_images"])
    counts = [row["train_images"] for row in ranked]
    with axes() as axis:
        width = 0.86 if len(counts) < MANY_CLASSES else 1.0
        axis.bar(range(len(counts)), counts, width=width, color="#7d93a8")
        axis.set(title="Training images of each class", ylabel="training images")
        axis.grid(axis="x", visible=False)
        if len(counts) < MANY_CLASSES:
            short = [name if len(name) < 12 else name[:11] + "…" for name in (r["name"] for r in ranked)]
            axis.set_xticks(range(len(counts)), short,
                            rotation=45 if max(map(len, short)) > 3 else 0)  # fmt: skip
            for place, count in enumerate(counts):
                axis.annotate(f"{count:,}", (place, count), (0, 2), textcoords="offset points", ha="center",
                              fontsize=7.5)  # fmt: skip
        else:
            axis.set_xlabel("classes, largest first")
            for place in (0, len(counts) - 1):
                axis.annotate(f"{counts[place]:,}", (place, counts[place]), (0, 2), ha="center",
                              textcoords="offset points", fontsize=8)  # fmt: skip
        ratio = f", ratio {counts[0] / counts[-1]:.3g}" if counts[-1] else ""
        alt = (
            f"Bar chart of the training images of the {len(counts)} classes of {dataset}: from {counts[0]} "
            f"down to {counts[-1]}{ratio}, {sum(counts)} in all."
        )
        return picture(axis, alt, f"{sum(counts):,} training images in {len(counts)} classes{ratio}.")


def neighbours(rows: Sequence[Row], column: str) -> tuple[list[float], list[float]]:
    """(training images, percent) from the smallest class up, as means over equal runs of classes if many."""
    ranked = sorted((row for row in rows if row[column] is not None), key=lambda row: row["train_images"])
    parts = len(ranked) if len(ranked) < MANY_CLASSES else NEIGHBOURS
    edges = [round(i * len(ranked) / parts) for i in range(parts + 1)] if parts else [0]
    groups = [ranked[a:b] for a, b in pairwise(edges)]
    return (
        [math.exp(mean([math.log(max(row["train_images"], 1)) for row in group])) for group in groups],
        [100 * mean([row[column] for row in group]) for group in groups],
    )


def by_class(
    rows: Sequence[Row],
    baseline: Sequence[Row],
    *,
    lowest: float,
    recipe: str,
    names: Mapping[str, str],
    colours: Mapping[str, str],
) -> Figure:
    """Test accuracy of each class against its training images, raw and aligned, with raw `baseline` behind.

    The axis begins below `lowest` (a fraction), so that the pictures of a data set can share it.
    """
    method = rows[0]["method"]
    colour = colours[method]
    crowd = len(rows) >= MANY_CLASSES
    with axes(SMALL_WIDTH, SMALL_HEIGHT) as axis:
        if baseline:
            axis.plot(*neighbours(baseline, "raw"), color="#9a9a9a", linewidth=1.2, linestyle=(0, (2, 2)),
                      label=f"{names[baseline[0]['method']]}, raw")  # fmt: skip
        for column, fill, line in (("raw", "white", (0, (5, 2))), ("aligned", colour, "-")):
            if crowd:
                known = [row for row in rows if row[column] is not None]
                axis.scatter([max(row["train_images"], 1) for row in known],
                             [100 * row[column] for row in known], s=7, alpha=0.4, linewidths=0.6,
                             facecolors=fill, edgecolors=colour)  # fmt: skip
            label = column if column == "raw" else f"aligned on {rows[0]['aligned_on'].replace('_', '-')}"
            axis.plot(*neighbours(rows, column), color=colour, linestyle=line, linewidth=1.6, marker="o",
                      markersize=4.5, markerfacecolor=fill, label=label)  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set(title=f"{names[method]}, {recipe}", xlabel="training images of the class", ylabel="test accuracy (%)",
                 ylim=(max(10 * math.floor(10 * lowest), 0) - 3, 103))  # fmt: skip
        axis.legend(loc="upper left" if crowd else "lower right")  # many classes: the smallest are low
        few, many = ends(rows, "raw"), ends(rows, "aligned")
        alt = (
            f"Accuracy of each class against its training images, {names[method]}, recipe {recipe}: over the "
            f"third of classes with fewest images {few[0]:.0f} % raw and {many[0]:.0f} % aligned, over the "
            f"third with most {few[1]:.0f} % raw and {many[1]:.0f} % aligned."
        )
        seeds = "One seed" if rows[0]["n"] == 1 else f"Mean over {rows[0]['n']} seeds"
        lines = f"; lines join the means of {NEIGHBOURS} groups of classes" if crowd else ""
        return picture(axis, alt, f"{seeds}, recipe {recipe}{lines}.")


def ends(rows: Sequence[Row], column: str) -> tuple[float, float]:
    """Mean percent of the third of classes with the fewest and with the most training images."""
    ranked = sorted((row for row in rows if row[column] is not None), key=lambda row: row["train_images"])
    third = max(len(ranked) // 3, 1)
    low, high = ([100 * row[column] for row in part] for part in (ranked[:third], ranked[-third:]))
    return mean(low), mean(high)


def curves(
    rows: Sequence[Row],
    measure: str,
    *,
    recipe: str,
    names: Mapping[str, str],
    colours: Mapping[str, str],
) -> Figure:
    """`loss` or `held_out_accuracy` by epoch: the mean over seeds, with the range of the seeds as a band."""
    percent = measure != "loss"
    scale = 100 if percent else 1
    title = "Held-out accuracy" if percent else "Training loss"
    ends = []
    with axes() as axis:
        for method in dict.fromkeys(row["method"] for row in rows):
            values: dict[int, list[float]] = {}
            for row in rows:
                if row["method"] == method and row[measure] is not None:
                    values.setdefault(row["epoch"], []).append(scale * row[measure])
            if not values:
                continue
            epochs = sorted(values)
            middle = [mean(values[epoch]) for epoch in epochs]
            axis.plot(epochs, middle, color=colours[method], linewidth=1.5, label=names[method],
                      marker="o" if len(epochs) == 1 else None)  # fmt: skip
            axis.fill_between(epochs, [min(values[e]) for e in epochs], [max(values[e]) for e in epochs],
                              color=colours[method], alpha=0.18, linewidth=0)  # fmt: skip
            ends.append(f"{names[method]} {middle[-1]:.{1 if percent else 2}f}{' %' if percent else ''}")
        axis.set(title=f"{title}, recipe {recipe}", xlabel="epoch", ylabel="accuracy (%)" if percent else "loss (nats)")
        axis.locator_params(axis="x", integer=True)
        axis.legend(loc="lower right" if percent else "upper right")
        caption = "Mean over seeds, band from the lowest to the highest" + (
            "." if percent else "; each method has its own loss, so levels do not compare."
        )
        alt = f"{title} by epoch, recipe {recipe}; at the last epoch {', '.join(ends)}."
        return picture(axis, alt, caption)


def gradients(rows: Sequence[Row], *, recipe: str, name: str) -> Figure:
    """Gradient ratio by epoch, a line for each class, or where they are many for each of ten groups of neighbours.

    Rows are {epoch, class, train_images, ratio}; a line is the geometric mean of its classes.
    """
    images = {row["class"]: row["train_images"] for row in rows}
    ranked = sorted(images, key=lambda c: images[c])
    parts = len(ranked) if len(ranked) < MANY_CLASSES else NEIGHBOURS
    groups = [ranked[round(i * len(ranked) / parts) : round((i + 1) * len(ranked) / parts)] for i in range(parts)]
    colours = matplotlib.colormaps["viridis"]
    with axes(SMALL_WIDTH, SMALL_HEIGHT) as axis:
        axis.axhline(1, color="#9a9a9a", linewidth=1, linestyle=(0, (2, 2)))
        ends = []
        for place, group in enumerate(groups):
            logs: dict[int, list[float]] = {}
            for row in rows:
                if row["class"] in group:
                    logs.setdefault(row["epoch"], []).append(math.log(row["ratio"]))
            line = {epoch: math.exp(mean(values)) for epoch, values in sorted(logs.items())}
            few, many = images[group[0]], images[group[-1]]
            label = f"{few} to {many} images" if place in (0, len(groups) - 1) else None
            axis.plot([*line], [*line.values()], color=colours(0.92 * place / max(len(groups) - 1, 1)), linewidth=1.3,
                      marker="o" if len(line) == 1 else None, label=label)  # fmt: skip
            ends.append(list(line.values())[-1])
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        ticks = RATIO_TICKS if high / low > 3 else [tenths / 10 for tenths in range(3, 31)]
        axis.set_yticks([tick for tick in ticks if low <= tick <= high])
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.minorticks_off()
        axis.set(title=f"{name}, {recipe}", xlabel="epoch", ylabel="positive / negative gradient")
        axis.locator_params(axis="x", integer=True)
        axis.legend(loc="best")
        alt = (
            f"Gradient ratio by epoch, {name}, recipe {recipe}: at the last epoch {ends[0]:.2g} for the classes with "
            f"fewest images and {ends[-1]:.2g} for those with most."
        )
        return picture(axis, alt, "Lines: classes with few (dark) to many images (bright).")


def under_shift(rows: Sequence[Row], *, recipe: str, names: Mapping[str, str], colours: Mapping[str, str]) -> Figure:
    """Accuracy from forward to backward test distributions: full lines without, broken ones with the test prior."""
    distributions = list(dict.fromkeys(row["distribution"] for row in rows))
    said = []
    with axes() as axis:
        for method in dict.fromkeys(row["method"] for row in rows):
            for column, style in (("accuracy", "-"), ("known_prior", (0, (4, 2)))):
                mine = {
                    row["distribution"]: 100 * row["mean"]
                    for row in rows
                    if (row["method"], row["column"], row["correction"]) == (method, column, "raw")
                }
                if not mine:
                    continue
                places = [distributions.index(name) for name in mine]
                axis.plot(places, [*mine.values()], linestyle=style, color=colours[method], linewidth=1.5, marker="o",
                          markersize=3, label=names[method] if column == "accuracy" else None)  # fmt: skip
                known = "" if column == "accuracy" else ", prior known,"
                first, last = mine[distributions[0]], mine[distributions[-1]]
                said.append(f"{names[method]}{known} {first:.1f} to {last:.1f} %")
        axis.set_xticks(range(len(distributions)), [_short(name) for name in distributions])
        axis.set(
            title=f"Other test distributions, recipe {recipe}",
            xlabel="forward · uniform · backward",
            ylabel="test accuracy (%)",
        )
        axis.legend(loc="lower left")
        alt = f"Test accuracy, recipe {recipe}, from {distributions[0]} to {distributions[-1]}: {'; '.join(said)}."
        return picture(axis, alt, "Broken lines: test prior known.")


def aligned_energies(
    rows: Sequence[Row], *, recipe: str, names: Mapping[str, str], colours: Mapping[str, str]
) -> Figure:
    """Free energy of each class against its training images, before (full) and after (broken) aligning."""
    with axes() as axis:
        said = []
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["train_images"])
            images = [max(row["train_images"], 1) for row in mine]
            for column, style in (("energy_before", "-"), ("energy_after", (0, (4, 2)))):
                values = [row[column] for row in mine]
                axis.plot(images, _smooth(values) if len(values) >= MANY_CLASSES else values, linestyle=style,
                          color=colours[method], linewidth=1.5,
                          label=names[method] if column == "energy_before" else None)  # fmt: skip
            before, after = ([row[f"energy_{when}"] for row in mine] for when in ("before", "after"))
            spans = (max(before) - min(before), max(after) - min(after))
            said.append(f"{names[method]} {spans[0]:.1f} to {spans[1]:.1f}")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set(
            title=f"Free energy, recipe {recipe}",
            xlabel="training images of the class",
            ylabel="free energy − mean (nats)",
        )
        axis.legend(loc="best")
        on = rows[0]["aligned_on"].replace("_", "-")
        alt = f"Free energy of each class, recipe {recipe}; span before and after aligning, in nats: {', '.join(said)}."
        return picture(axis, alt, f"Broken lines: after aligning, on {on} images.")


def reliability(rows: Sequence[Row], *, recipe: str, names: Mapping[str, str], colours: Mapping[str, str]) -> Figure:
    """Accuracy against confidence of the raw logits, a dot a bin {method, images, confidence, accuracy}."""
    with axes() as axis:
        axis.plot([0, 100], [0, 100], color="#9a9a9a", linewidth=1, linestyle=(0, (2, 2)))
        said = []
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method]
            total = sum(row["images"] for row in mine)
            axis.plot([100 * row["confidence"] for row in mine], [100 * row["accuracy"] for row in mine],
                      color=colours[method], linewidth=1.2, label=names[method])  # fmt: skip
            axis.scatter([100 * row["confidence"] for row in mine], [100 * row["accuracy"] for row in mine],
                         s=[6 + 220 * row["images"] / total for row in mine], color=colours[method], alpha=0.5,
                         linewidths=0)  # fmt: skip
            over = sum(row["images"] * (row["confidence"] - row["accuracy"]) for row in mine) / total
            said.append(f"{names[method]} {100 * over:+.1f} points")
        axis.set(
            title=f"Reliability, recipe {recipe}",
            xlabel="confidence (%)",
            ylabel="test accuracy (%)",
            xlim=(0, 102),
            ylim=(0, 102),
        )
        axis.legend(loc="upper left")
        alt = f"Accuracy against confidence, recipe {recipe}; mean confidence minus accuracy: {', '.join(said)}."
        return picture(axis, alt, "Raw logits; area of a dot: share of the images. Below the diagonal: too confident.")


COSTS = {  # title, axis, unit
    "minutes": ("What training time buys", "minutes of training", "min"),
    "memory_mib": ("What memory buys", "most memory in training (MiB)", "MiB"),
}


def cost(
    rows: Sequence[Row], what: str, *, recipes: Sequence[str], names: Mapping[str, str], colours: Mapping[str, str]
) -> Figure:
    """Test accuracy against one of COSTS, a mark a cell: colour is the method, shape the recipe, by its place."""
    title, axis_label, unit = COSTS[what]
    groups = dict.fromkeys((row["recipe"], row["method"]) for row in rows)
    labels = {(recipe, method): f"{names[method]}, {recipe}" for recipe, method in groups}
    legend = len(groups) <= MANY_MARKS
    columns = 2 if max(map(len, labels.values())) <= HALF_A_LEGEND else 1
    with axes(height=HEIGHT + (17 * -(-len(groups) // columns) if legend else 0)) as axis:
        said = []
        for recipe, method in sorted(groups, key=lambda group: recipes.index(group[0])):
            mine = [row for row in rows if (row["recipe"], row["method"]) == (recipe, method)]
            spent, accuracy = ([row[what] for row in mine], [100 * row["accuracy"] for row in mine])
            axis.plot(spent, accuracy, linestyle="none", marker="osD^vP"[recipes.index(recipe) % 6], markersize=5.5,
                      color=colours[method], label=labels[recipe, method])  # fmt: skip
            said.append(f"{names[method]}, recipe {recipe}, {mean(spent):.0f} {unit} {mean(accuracy):.1f} %")
        axis.set(title=title, xlabel=axis_label, ylabel="test accuracy (%)")
        axis.set_xlim(0, 1.05 * max(row[what] for row in rows))
        if legend:  # below: there is no corner without marks
            canvas = axis.get_figure()
            assert isinstance(canvas, Canvas)
            canvas.legend(loc="outside lower left", ncols=columns, columnspacing=1, handletextpad=0.2)
        alt = f"{title}: {'; '.join(said)}."
        machine = "On the machine of benchmarks/results/time_to_accuracy.md; looks at test accuracy included."
        return picture(axis, alt, machine)


def _smooth(values: Sequence[float], width: int = 9) -> list[float]:
    """Running mean, over fewer at the ends: single classes hide the trend."""
    half = min(width, len(values)) // 2
    return [mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _short(distribution: str) -> str:
    """forward50 is F50, backward2 B2, uniform 1."""
    return distribution.replace("forward", "F").replace("backward", "B").replace("uniform", "1")


def forest(
    rows: Sequence[Row],
    *,
    limits: tuple[float, float],
    recipe: str,
    names: Mapping[str, str],
    colours: Mapping[str, str],
) -> Figure:
    """Accuracy of every method and correction: a dot a seed, mean and standard deviation, published value.

    `limits` are the lowest and highest fraction of the axis, so that the recipes of a data set can share it.
    """
    labels = []
    said = []
    with axes(WIDE, 80 + 21 * len(rows)) as axis:
        for place, row in enumerate(rows):
            colour = colours[row["method"]]
            raw = row["correction"] == "raw"
            what = row["correction"].replace("_", " ").replace("held out", "held-out")
            labels.append(names[row["method"]] if raw else what)
            if row["n"]:
                mean_, sd = 100 * row["accuracy_mean"], row["accuracy_sd"]
                if sd is not None:
                    axis.plot([mean_ - 100 * sd, mean_ + 100 * sd], [place] * 2, color=colour, linewidth=5,
                              alpha=0.3, solid_capstyle="butt")  # fmt: skip
                axis.plot([mean_] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2.2)
                axis.scatter([100 * value for value in row["accuracies"]], [place] * row["n"], s=18,
                             facecolors=colour if raw else "white", edgecolors=colour, linewidths=1.1,
                             zorder=3)  # fmt: skip
                said.append(f"{names[row['method']]} {'' if raw else what + ' '}{mean_:.1f} %")
            if row["published"] is not None:
                axis.scatter([100 * row["published"]], [place], marker="D", s=34, zorder=4, facecolors="none",
                             edgecolors="black", linewidths=1.2)  # fmt: skip
                said.append(f"published {100 * row['published']:.1f} %")
        axis.set_yticks(range(len(rows)), labels)
        axis.set(title=f"Test accuracy, recipe {recipe}", xlabel="test accuracy (%)",
                 xlim=[100 * limit for limit in limits], ylim=(len(rows) - 0.4, -0.6))  # fmt: skip
        axis.grid(axis="y", visible=False)
        for label, row in zip(axis.get_yticklabels(), rows, strict=True):
            label.set_color("#1a1a1a" if row["correction"] == "raw" else "#666666")
        caption = "Dot: one seed (hollow: corrected). Tick and bar: mean ± standard deviation." + (
            " Diamond: published." if any(row["published"] is not None for row in rows) else ""
        )
        return picture(axis, f"Test accuracy, recipe {recipe}: {', '.join(said)}.", caption)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; not a number when there is nothing."""
    return sum(values) / len(values) if values else math.nan
