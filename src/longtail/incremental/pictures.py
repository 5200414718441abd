"""The pictures of a training whose classes arrive in steps: curves, the bias and its removal, confusion, energies."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from longtail.incremental.outcomes import OLD_NEW, Chain, last_of, over_seeds, readout_name
from longtail.incremental.readouts import CHOSEN, SHOWN
from longtail.report import plots

MOST_IN_A_PICTURE = 12  # steps whose shares are written into a picture


def label(name: str) -> str:
    """A read-out in a legend."""
    return readout_name(name).split(",")[0]


def drawn(mine: Sequence[Chain]) -> list[str]:
    """The read-outs that pictures show of a training."""
    return [name for name in SHOWN if name in mine[0].summary["readouts"]]


def below(axis: Axes) -> None:
    """The legend below the axes: lines cross all of a picture."""
    figure = axis.get_figure()
    assert figure is not None
    figure.legend(loc="outside lower center", ncols=3, fontsize=7.5, columnspacing=1.2)


COLOUR = dict(zip(SHOWN, plots.PALETTE, strict=False))


def over_steps(mine: Sequence[Chain], training: str) -> plots.Figure:
    """Accuracy over all classes seen, after each step."""
    ends = mine[0].summary["ends"]
    with plots.axes() as axis:
        for name in drawn(mine):
            curve = over_seeds(mine, "steps", name, "step")
            values = [100 * float(np.mean(curve[step])) for step in sorted(curve)]
            axis.plot(ends, values, marker="o", ms=3, lw=1.5, color=COLOUR[name], label=label(name))
        axis.set(xlabel="classes seen", ylabel="test accuracy, %", title=training)
        below(axis)
        last = ", ".join(f"{label(name)} {100 * last_of(mine, name):.1f} %" for name in drawn(mine))
        alt = f"{training}: accuracy over the classes seen; at the end {last}"
        return plots.picture(axis, alt, "Over all classes seen, mean over seeds.")


def by_step(mine: Sequence[Chain], training: str) -> plots.Figure:
    """Accuracy of the classes of each step, after the last one: the bias and its removal."""
    count = len(mine[0].summary["ends"])
    with plots.axes() as axis:
        for name in drawn(mine):
            groups = over_seeds(mine, "groups", name, "group", last=True)
            values = [100 * float(np.mean(groups[group])) for group in sorted(groups)]
            axis.plot(range(1, count + 1), values, marker="o", ms=3, lw=1.5, color=COLOUR[name], label=label(name))
        axis.set(xlabel="step in which the classes came", ylabel="test accuracy, %", title=f"{training}: at the end")
        axis.set_xticks(range(1, count + 1))
        below(axis)
        raw = over_seeds(mine, "groups", "none", "group", last=True)
        old = float(np.mean([np.mean(raw[group]) for group in range(count - 1)]))
        alt = (
            f"{training}, accuracy of each step's classes after the last step: as trained {100 * old:.0f} % for the "
            f"old ones and {100 * float(np.mean(raw[count - 1])):.0f} % for the newest"
        )
        return plots.picture(axis, alt, "The bias to the newest classes, and what removes it.")


def energies(mine: Sequence[Chain], training: str) -> plots.Figure:
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
        below(axis)
        axis.set(xlabel="classes seen", ylabel="energy of old minus new, nats", title=training)
        alt = f"{training}: mean free energy of old classes minus that of new ones on test images, by step"
        return plots.picture(axis, alt, "Above zero, old classes are thought less probable than they are.")


def confusion(mine: Sequence[Chain], training: str, readout: str) -> plots.Figure:
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
