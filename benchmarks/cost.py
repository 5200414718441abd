"""What training costs as work grows: time and memory against batch size, experts, classes and images.

python -m benchmarks.cost            # under ten minutes on two cores; writes benchmarks/results/cost.csv and cost.png
python -m benchmarks.cost --draw     # the picture again, from the csv
python -m benchmarks.cost --quick    # seconds; prints only, unless --results names a folder
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import RESULTS, Report, Setting, Worker, flags, machine_line

SWEEPS: dict[str, Sequence[int]] = {
    "batch_size": (16, 32, 64, 128, 256, 512),
    "experts": (1, 2, 3, 4, 5, 6, 7),
    "classes": (10, 100, 1000, 8142),
    "images": (1000, 2000, 5000, 10_000, 20_000, 50_000),
}
QUICK_SWEEPS: dict[str, Sequence[int]] = {"batch_size": (8,), "experts": (2,), "classes": (10,), "images": (96,)}
QUICK = Setting(depth=8, images=64, batch_size=16, turn=32, side=512)
TURNS = 5
COLUMNS = ("against", "value", "seconds", "peak_memory_mb", "loaded_mb")
LABELS = {
    "batch_size": "batch size (images)", "experts": "experts", "classes": "classes", "images": "images in the set",
}  # fmt: skip
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write, draw."""
    args = flags(__doc__, argv, "--draw")
    if args.draw:
        folder = args.results or RESULTS
        draw(read(folder / "cost.csv"), folder / "cost.png")
        return
    base, sweeps, turns = (QUICK, QUICK_SWEEPS, 1) if args.quick else (Setting(turn=1024), SWEEPS, TURNS)
    report, rows = Report(), []
    with Worker("machine", base) as machine:
        report.say(
            "# Cost against work", "", machine_line(machine.hello), "",
            f"ResNet-{base.depth}, batches of {base.batch_size}, {base.classes} classes, 1 expert, but for what is "
            "named. Seconds of a step on ready batches (median of turns); against images, of a whole epoch.",
        )  # fmt: skip

    def measured() -> Iterator[list[str]]:
        for against, values in sweeps.items():
            for value in values:
                rows.append(measure(base, against, value, turns))
                shown = (f"{rows[-1]['seconds']:.4g}", f"{rows[-1]['peak_memory_mb']:,.0f}")
                yield [LABELS[against], f"{value:,}", *shown]

    report.table(("Against", "Value", "Seconds", "Peak memory (MB)"), measured())
    if args.results is not None:
        write(rows, args.results / "cost.csv")
        draw(read(args.results / "cost.csv"), args.results / "cost.png")


def measure(base: Setting, against: str, value: int, turns: int) -> Row:
    """A row of the csv: seconds of a step, or of an epoch where images are counted, in a process of its own."""
    setting = replace(base, **{against: value})  # type: ignore[arg-type]  # all of them are whole numbers
    whole = against == "images"
    with Worker("common", setting) as work:
        # a long epoch is a mean over many steps as it is
        seconds = [work.ask("epoch" if whole else "step")[1] for _ in range(1 if value > 10_000 and whole else turns)]
        memory = work.ask("peak memory")
    per = 1 if whole else setting.steps
    return dict(zip(COLUMNS, (against, value, median(seconds) / per, memory, work.hello["loaded"]), strict=True))


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows([f"{row[key]:.6g}" if isinstance(row[key], float) else row[key] for key in COLUMNS]
                        for row in rows)  # fmt: skip


def read(path: Path) -> list[Row]:
    """The rows of the csv."""
    with path.open(newline="") as file:
        return [{key: text if key == "against" else float(text) for key, text in row.items()}
                for row in csv.DictReader(file)]  # fmt: skip


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for each kind of work, time on the left and memory on the right."""
    import matplotlib
    from matplotlib.figure import Figure

    from longtail.report.plots import PALETTE, PIXELS, STYLE

    _, blue, red, *_ = PALETTE
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]  # its names are a Literal
        canvas = Figure(figsize=(9.4, 6.4), layout="constrained")
        panels = canvas.subplots(2, 2).flat
        for axis, (against, label) in zip(panels, LABELS.items(), strict=True):
            points = sorted((row for row in rows if row["against"] == against), key=lambda row: row["value"])
            values, memory = [row["value"] for row in points], axis.twinx()
            (time_line,) = axis.plot(values, [row["seconds"] for row in points], "o-", color=blue, label="time")
            (memory_line,) = memory.plot(values, [row["peak_memory_mb"] for row in points], "s--", color=red,
                                         label="peak memory")  # fmt: skip
            floor = memory.axhline(points[0]["loaded_mb"], color=red, linestyle=":", linewidth=1,
                                   label="Python and PyTorch alone")  # fmt: skip
            if against == "classes":
                axis.set_xscale("log")
            # without the small ones, which lie too close to each other on a linear axis
            axis.set_xticks(values[-3:] if against in ("batch_size", "images") else values)
            axis.set_xticks([], minor=True)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.set(
                title=f"Against {label.split(' (')[0]}",
                xlabel=label,
                ylim=(0, 1.1 * max(row["seconds"] for row in points)),
            )
            axis.set_ylabel("seconds per epoch" if against == "images" else "seconds per step", color=blue)
            memory.set_ylabel("peak memory (MB)", color=red)
            memory.set_ylim(0, 1.1 * max(row["peak_memory_mb"] for row in points))
            memory.grid(visible=False)
            memory.spines["right"].set_visible(True)
        canvas.legend(handles=[time_line, memory_line, floor], loc="outside upper right", ncols=3)
        canvas.savefig(path, dpi=PIXELS * 1.5, metadata={"Software": None})


if __name__ == "__main__":
    main()
