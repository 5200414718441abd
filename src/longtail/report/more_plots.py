"""Pictures of other pages than a plan's: energies of readings, and the toy of BalPoE's consistency."""

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullLocator

from longtail.report.plots import PALETTE, PIXELS, STYLE, Row, _smooth, mean


def energies(cells: Mapping[str, Sequence[Mapping[str, str]]]) -> bytes:
    """A PNG: free energy of each class against its training images, a row a method, a column a reading.

    `cells` has for each method the rows of one cell's energies.csv.
    """
    readings = list(dict.fromkeys(row["reading"] for rows in cells.values() for row in rows))
    logits = list(dict.fromkeys(row["logits"] for rows in cells.values() for row in rows))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]  # its names are a Literal
        canvas = Canvas(figsize=(max(3.0 * len(readings), 7.5), 2.6 * len(cells) + 0.7), layout="constrained")
        panels = canvas.subplots(len(cells), len(readings), squeeze=False, sharex=True, sharey="row")
        for axes_, (method, rows) in zip(panels, cells.items(), strict=True):
            for axis, reading in zip(axes_, readings, strict=True):
                for place, name in enumerate(logits):
                    mine = [row for row in rows if (row["reading"], row["logits"]) == (reading, name)]
                    mine.sort(key=lambda row: float(row["train_images"]))
                    axis.plot(
                        [float(row["train_images"]) for row in mine], _smooth([float(row["energy"]) for row in mine]),
                        color=PALETTE[place % len(PALETTE)], linestyle="--" if "," in name else "-", linewidth=1.4,
                        label=name,
                    )  # fmt: skip
                axis.set(xscale="log", title=f"{method}, {reading}" if len(cells) > 1 else reading)
            axes_[0].set_ylabel("free energy - mean (nats)")
        for axis in panels[-1]:
            axis.set_xlabel("training images")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")  # mathtext is off
            axis.xaxis.set_minor_formatter("")
        handles, labels = panels[0][0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        drawn = io.BytesIO()
        canvas.savefig(drawn, format="png", dpi=1.5 * PIXELS, metadata={"Software": None})
    return drawn.getvalue()


def fisher(rows: Sequence[Row]) -> bytes:
    """A PNG of longtail.evaluation.fisher's rows: what was trained as marks, what theory says as lines.

    Excess balanced error against the mean of taus, against the factor of miscalibrated experts, and against ECE.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]  # its names are a Literal
        canvas = Canvas(figsize=(12.6, 4.2), layout="constrained")
        panels = canvas.subplots(1, 3)
        for axis, draw in zip(panels, (_by_mean_tau, _by_scale, _by_mixup), strict=True):
            draw(axis, rows)
        panels[0].set_ylabel("balanced error above Bayes (points)")
        drawn = io.BytesIO()
        canvas.savefig(drawn, format="png", dpi=1.5 * PIXELS, metadata={"Software": None})
    return drawn.getvalue()


def _by_mean_tau(axis: Axes, rows: Sequence[Row]) -> None:
    axis.plot(*_points(rows, "mean tau, theory", "mean_tau", "predicted"), color=PALETTE[0], linewidth=1.4,
              label="theory: Bayes' rule, prior ^ (1 − mean τ)")  # fmt: skip
    for experts, marker, colour in (("quadratic", "o", PALETTE[1]), ("networks", "D", PALETTE[2])):
        mine = [row for row in rows if row.get("experts") == experts]
        places = _points(mine, "mean tau", "mean_tau", "measured")
        axis.plot(*places, linestyle="none", marker=marker, markersize=8 if marker == "o" else 4.5, color=colour,
                  markerfacecolor="none" if marker == "o" else colour, markeredgewidth=1.4,
                  label=f"trained: {experts}")  # fmt: skip
    balanced = [row for row in rows if row["experiment"] == "mean tau" and abs(row["mean_tau"] - 1) < 1e-9]
    axis.annotate(f"{len(balanced)} sets of τ", (1, 0), (0, 12), textcoords="offset points", ha="center", fontsize=8.5)
    axis.set(title="The mean of the taus decides", xlabel="mean τ of the experts")
    axis.legend(loc="upper center")
    axis.set_ylim(top=1.45 * axis.get_ylim()[1])  # room for the legend above the curve's arms


def _by_scale(axis: Axes, rows: Sequence[Row]) -> None:
    names = dict.fromkeys(row["name"] for row in rows if row["experiment"] == "miscalibrated")
    for name, colour in zip(names, (PALETTE[3], PALETTE[5], PALETTE[4]), strict=True):
        mine = [row for row in rows if row["name"] == name]
        axis.plot(*_points(mine, "miscalibrated, theory", "scale", "predicted"), color=colour, linewidth=1.4)
        axis.plot(*_points(mine, "miscalibrated", "scale", "measured"), linestyle="none", marker="o", markersize=6,
                  color=colour, label=name)  # fmt: skip
    axis.set(title="Experts made sharper", xlabel="factor (below 1: under-confident)", xscale="log")
    scales = list(dict.fromkeys(_points(rows, "miscalibrated", "scale", "measured")[0]))
    axis.set_xticks(scales, [f"{scale:.3g}" for scale in scales])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.legend(loc="upper right", title="dots: measured, lines: theory", alignment="left")


def _by_mixup(axis: Axes, rows: Sequence[Row]) -> None:
    mixed = [row for row in rows if row["experiment"] == "mixup"]
    kinds = dict.fromkeys((row["images"], row["name"]) for row in mixed)
    names, sizes = ([*dict.fromkeys(kind[place] for kind in kinds)] for place in (1, 0))
    for images, name in kinds:
        mine = [row for row in mixed if (row["images"], row["name"]) == (images, name)]
        ece, excess = ([100 * row[key] for row in mine] for key in ("ece", "measured"))
        colour, marker = PALETTE[(0, 1)[names.index(name)]], "os^v"[sizes.index(images) % 4]
        axis.plot(ece, excess, linestyle="none", marker=marker, markersize=4, color=colour, alpha=0.4,
                  markeredgewidth=0)  # fmt: skip
        axis.errorbar(mean(ece), mean(excess), xerr=_sd(ece), yerr=_sd(excess), marker=marker, markersize=8,
                      color=colour, linewidth=1.2, label=f"{images} images, {name}")  # fmt: skip
    axis.set(title="Networks that over-fit", xlabel="ECE of the experts (points)", xlim=(0, None), ylim=(0, None))
    axis.legend(loc="lower right")


def _points(rows: Sequence[Row], experiment: str, across: str, up: str) -> tuple[list[float], list[float]]:
    """What a line or its marks go through, errors in points."""
    mine = [row for row in rows if row["experiment"] == experiment]
    return [row[across] for row in mine], [100 * row[up] for row in mine]


def _sd(values: Sequence[float]) -> float:
    """Sample standard deviation."""
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))
