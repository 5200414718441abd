"""What training time buys: accuracy of finished cells against how long each took, a table for each data set.

python -m benchmarks.time_to_accuracy                 # seconds; writes benchmarks/results/time_to_accuracy.{csv,md,png}
python -m benchmarks.time_to_accuracy --plan quick --dataset digits_if20 --results FOLDER

Nothing is trained here: accuracies are those of results/, as the lock of a plan vouches for them, and times those
that the training itself left in runs/, so it sees cells that were trained in this checkout. Rows of the csv that were
measured elsewhere stay.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from benchmarks.harness import RESULTS, ROOT, Report

COLUMNS = ("dataset", "recipe", "method", "seed", "training", "epochs", "accuracy", "seconds", "images_per_s",
           "memory_mib", "device", "cpu", "threads")  # fmt: skip
KEY = COLUMNS[:4]
Row = dict[str, Any]
PLANS = ("paper-cifar100", "paper-cifar100-ldam", "paper-cifar100-tails", "paper-cifar10", "posthoc", "posthoc-tails",
         "posthoc-long", "composing", "composing-long", "composing-more", "composing-recipes", "composed")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Collect, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    begun = [plan for plan in PLANS if (ROOT / "stages" / plan / "dvc.lock").is_file()]
    parser.add_argument("--plan", nargs="+", default=begun, help="plans whose cells to collect")
    parser.add_argument("--dataset", default="cifar100_if100", help="the one that comes first and is drawn")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args(argv)
    table = args.results / "time_to_accuracy.csv"
    known = {tuple(row[key] for key in KEY): row for row in (read(table) if table.exists() else [])}
    plans = yaml.safe_load((ROOT / "params.yaml").read_text())["plans"]
    for plan in args.plan:
        trained = [row for row in collect(ROOT, plan) if row["method"] not in plans.get(plan, {}).get("fuse", [])]
        known |= {tuple(row[key] for key in KEY): row for row in trained}
    rows = [row for _, row in sorted(known.items())]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    if args.dataset not in datasets:
        parser.error(
            f"no cell of {', '.join(args.plan)} on {args.dataset} was trained here: longtail run {args.plan[0]}"
        )
    report = Report()
    report.say(
        "# Accuracy against training time", "",
        f"{len(rows)} cells, {sum(float(row['seconds']) for row in rows) / 3600:.0f} hours of training; made by "
        "`python -m benchmarks.time_to_accuracy`.", "",
        "Test accuracy of the raw logits at the last epoch, mean ± sample standard deviation over seeds; minutes of "
        "training, looks at test accuracy included, mean and range over seeds; share of the time that the method's "
        "longest recipe took. Cells are of different days and versions of the code, and some shared their processor "
        "with other work: recipe_time.md has shares on equal terms.",
    )  # fmt: skip
    for dataset in sorted(datasets, key=lambda dataset: dataset != args.dataset):
        say(report, dataset, [row for row in rows if row["dataset"] == dataset])
    write(rows, table)
    report.write(args.results / "time_to_accuracy.md")
    draw([row for row in rows if row["dataset"] == args.dataset], args.results / "time_to_accuracy.png")


def collect(root: Path, plan: str) -> list[Row]:
    """A row for each finished cell of the plan of which it is known how long it took."""
    from longtail.tracking import finished

    results, notes = finished.results(root, [plan])
    for note in notes:
        print(note)
    return [
        {
            **{key: result.cell.names()[key] for key in KEY},
            "training": result.training,
            "epochs": result.last_epoch,
            "accuracy": result.metrics["accuracy/all"],
            "seconds": result.seconds,
            "images_per_s": result.metrics.get("images per s", ""),
            "memory_mib": result.metrics.get("memory MiB", ""),
            **{key: result.tags[f"longtail.{key}"] for key in ("device", "cpu", "threads")},
        }
        for result in results
        if result.seconds is not None
    ]


def say(report: Report, dataset: str, rows: Sequence[Row]) -> None:
    """The table of a data set: a line for each method and recipe, the longest recipe of a method first."""
    machines = sorted({f"{row['cpu']}, {row['device']}, {row['threads']} thread(s) a cell" for row in rows})
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    report.say(
        "",
        f"## {dataset}",
        "",
        f"Trained on: {'; '.join(machines)}. {len(rows)} cell{'s' * (len(rows) > 1)}, {hours:.1f} hours.",
    )
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["recipe"]), []).append(row)
    minutes = {key: fmean(float(row["seconds"]) / 60 for row in group) for key, group in groups.items()}
    longest = {method: max(value for key, value in minutes.items() if key[0] == method) for method, _ in groups}
    lines = []
    for key in sorted(groups, key=lambda key: (key[0], -minutes[key])):
        group = groups[key]
        accuracies = [100 * float(row["accuracy"]) for row in group]
        times = [float(row["seconds"]) / 60 for row in group]
        spread = f" ± {stdev(accuracies):.1f}" if len(group) > 1 else ""
        lines.append([
            " · ".join(key), str(group[0]["epochs"]), ", ".join(str(row["seed"]) for row in group),
            f"{fmean(accuracies):.1f}{spread}", f"{minutes[key]:.1f} ({min(times):.1f} to {max(times):.1f})",
            f"{minutes[key] / longest[key[0]]:.2f}",
        ])  # fmt: skip
    report.table(("Method · recipe", "Epochs", "Seeds", "Accuracy (%)", "Minutes a cell", "Share of time"), lines)


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows([row[key] for key in COLUMNS] for row in rows)


def read(path: Path) -> list[Row]:
    """The rows of the csv, as text."""
    with path.open(newline="") as file:
        return [{key: row.get(key, "") for key in COLUMNS} for row in csv.DictReader(file)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """A point a cell: colour is the method, shape the recipe."""
    import matplotlib
    from matplotlib.figure import Figure

    from longtail.report.plots import PALETTE, PIXELS, STYLE

    methods, recipes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("method", "recipe"))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]  # its names are a Literal
        canvas = Figure(figsize=(6.4, 4.0), layout="constrained")
        axis = canvas.subplots()
        for method in methods:
            for recipe in recipes:
                mine = [row for row in rows if (row["method"], row["recipe"]) == (method, recipe)]
                if mine:
                    axis.plot(
                        [float(row["seconds"]) / 60 for row in mine], [100 * float(row["accuracy"]) for row in mine],
                        "osD^vP"[recipes.index(recipe) % 6], color=PALETTE[methods.index(method) % len(PALETTE)],
                        label=f"{method}, {recipe}",
                    )  # fmt: skip
        axis.set(xlabel="minutes of training", ylabel="test accuracy (%)", xlim=(0, None), title="What time buys")
        canvas.legend(loc="outside right upper")
        canvas.savefig(path, dpi=PIXELS * 1.5, metadata={"Software": None})


if __name__ == "__main__":
    main()
