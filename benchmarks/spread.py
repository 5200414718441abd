"""What a fixed subset and a fixed stream of mixup weights hide of the spread over seeds.

python -m benchmarks.spread                              # digits, 40 seeds: under ten minutes on one core
python -m benchmarks.spread --dataset cifar100_if100 --recipe short_strong --mixup 0 --seeds 6    # some 80 minutes
python -m benchmarks.spread --quick                      # seconds; prints only

Published standard deviations differ in what was drawn anew for each run. GALA's released code draws the long-tailed
subset, too; BalPoE's takes one subset for all, and the same weights of mixup at the same step. Here networks are
trained in these ways and others, with the same method and recipe. A network that the csv has is not trained again.
"""

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any
from unittest import mock

import yaml

from benchmarks.harness import RESULTS, ROOT, Report

COLUMNS = ("dataset", "recipe", "method", "mixup_alpha", "subset", "mixing", "seed", "accuracy")
SETTING, DRAWN = COLUMNS[:4], COLUMNS[4:7]
Row = dict[str, str]

# What all runs share, by name: subset, stream of mixup weights and seed of training of the run of a number.
WAYS: dict[str, Callable[[int], tuple[int, int, int]]] = {
    "nothing": lambda number: (number, number, number),
    "the subset": lambda number: (0, number, number),
    "all but the subset": lambda number: (number, 0, 0),
    "the subset and mixup's weights": lambda number: (0, 0, number),  # last: only where there is mixup
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, seed by seed, and say what all of it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits_if20")
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--method", default="balanced_softmax")
    parser.add_argument("--mixup", type=float, default=0.4, help="its alpha, in place of the recipe's; 0 for none")
    parser.add_argument("--seeds", type=int, default=40, help="runs of each way")
    parser.add_argument("--quick", action="store_true", help="two seeds, one epoch: says only that it runs")
    parser.add_argument("--results", type=Path, help="folder to write to (default: benchmarks/results)")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: a spread needs two or more")
    # A quick run writes nowhere: a full one would take its networks of one epoch for finished.
    args.results = None if args.quick else args.results or RESULTS
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for flag, block in (("dataset", "datasets"), ("recipe", "recipes"), ("method", "methods")):
        if getattr(args, flag) not in params[block]:
            parser.error(f"--{flag} {getattr(args, flag)}: params.yaml has {', '.join(params[block])}")
    source = params["datasets"][args.dataset]["source"]
    if not (ROOT / "data" / "raw" / f"{source}.npz").exists():
        parser.error(f"data/raw/{source}.npz is not there: dvc repro stages/dvc.yaml:download@{source}")
    table = args.results / "spread.csv" if args.results else None
    rows = read(table)
    setting = (args.dataset, args.recipe, args.method, f"{args.mixup:g}")
    for run in runs(2 if args.quick else args.seeds, mixup=args.mixup > 0):
        row = dict(zip(COLUMNS, (*setting, *map(str, run)), strict=False))
        if any(row.items() <= known.items() for known in rows):
            continue
        row["accuracy"] = f"{accuracy(row, epochs=1 if args.quick else None):.6f}"
        print(*row.values(), flush=True)
        rows.append(row)
        if table:
            write(rows, table)
    report = say(rows)
    if args.results:
        report.write(args.results / "spread.md")


def runs(count: int, *, mixup: bool) -> Iterator[tuple[int, int, int]]:
    """(subset, mixing, seed) of each network, once: run 0 is the same network all ways."""
    for number in range(count):
        yield from dict.fromkeys(way(number) for way in ways(mixup).values())


def ways(mixup: bool) -> dict[str, Callable[[int], tuple[int, int, int]]]:
    """Those of WAYS that differ from each other with mixup, or without."""
    return dict(list(WAYS.items())[: len(WAYS) if mixup else -1])


def accuracy(row: Row, *, epochs: int | None) -> float:
    """Test accuracy (mean over classes) of a network trained as params.yaml has it, after the last epoch."""
    from longtail import training
    from longtail.data import batches, long_tail
    from longtail.training import engine, inference
    from longtail.training.checkpoints import Checkpoint
    from longtail.workflow import files

    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    recipe, method = params["recipes"][row["recipe"]], params["methods"][row["method"]]
    recipe |= {"mixup_alpha": float(row["mixup_alpha"]), "gradients_every": 0}
    recipe["epochs"] = recipe["test_every"] = epochs or recipe["epochs"]
    tail = dict(params["datasets"][row["dataset"]])
    raw = files.load_arrays(ROOT / "data" / "raw" / f"{tail.pop('source')}.npz")
    splits = batches.splits(long_tail.cut(raw, **tail | {"seed": int(row["subset"])}), inference.find_device())
    seed = int(row["seed"])
    inference.set_up(seed)
    network, loss = training.build(splits["train"], row["method"], method, **recipe)
    settings = {key: value for key, value in recipe.items() if key not in ("network", "normalization")}
    with mixup_weights_of(int(row["mixing"])):
        fitted = engine.fit(
            network, loss, splits["train"], None, splits["test"],
            seed=seed, checkpoint=Checkpoint(None, ""), on_epoch=lambda _: None, **settings,
        )  # fmt: skip
    return float(fitted.history[-1]["test_accuracy"])


def mixup_weights_of(seed: int) -> Any:
    """While it is open, trainings mix with the weights of a training with this seed; partners stay their own."""
    from longtail.data import batches

    own = batches.batch_generator

    def generator(of: int, *place: int) -> SimpleNamespace:
        given, mine = own(seed, *place), own(of, *place)

        def beta(a: float, b: float) -> float:
            mine.beta(a, b)  # so that the partners drawn after it are those of the training as it is
            return float(given.beta(a, b))

        return SimpleNamespace(beta=beta, permutation=mine.permutation)

    return mock.patch.object(batches, "batch_generator", generator)


def say(rows: Sequence[Row]) -> Report:
    """A table for each setting: mean, spread, and the spread relative to that of runs that share nothing."""
    report = Report()
    report.say(
        "# The spread over seeds, by what runs share", "",
        "Test accuracy in percent (mean over classes, last epoch), standard deviation over runs with its 95 % interval "
        "(chi-squared), and its ratio to that of runs that share nothing (95 % interval by F). Intervals presume "
        "normal, independent accuracies; all runs share the test images.",
    )  # fmt: skip
    settings = dict.fromkeys(tuple(row[key] for key in SETTING) for row in rows)
    for setting in settings:
        dataset, recipe, method, mixup = setting
        of_setting = [row for row in rows if tuple(row[key] for key in SETTING) == setting]
        found = {name: of_way(of_setting, name) for name in ways(float(mixup) > 0)}
        lines = []
        for name, values in found.items():
            if len(values) < 2:
                continue
            low, high = deviation_interval(values)
            line = [name, str(len(values)), f"{fmean(values):.2f}", f"{stdev(values):.2f} ({low:.2f} to {high:.2f})"]
            if name == "nothing":
                line.append("1")
            else:
                ratio, low, high = deviation_ratio(values, found["nothing"])
                line.append(f"{ratio:.2f} ({low:.2f} to {high:.2f})")
            lines.append(line)
        mixed = f", mixup {mixup}" if float(mixup) else ", no mixup"
        report.say("", f"## {dataset}, {recipe}, {method}{mixed}")
        report.table(("Runs share", "Runs", "Mean", "Standard deviation", "Ratio"), lines)
        zero, others = by_subset(of_setting)
        if len(zero) > 1 and len(others) > 1:
            apart, low, high = difference(zero, others)
            report.say(
                f"Subset 0: {fmean(zero):.2f} ({len(zero)} runs); the {len(others)} other subsets {fmean(others):.2f} "
                f"(from {min(others):.2f} to {max(others):.2f}, means of their runs). Difference {apart:+.2f}, 95 % "
                f"interval {low:+.2f} to {high:+.2f} (Welch)."
            )
    return report


def of_way(rows: Sequence[Row], way: str) -> list[float]:
    """Accuracies in percent of the runs that share what `way` says."""
    drawn = [tuple(int(row[key]) for key in DRAWN) for row in rows]
    return [
        100 * float(row["accuracy"]) for row, run in zip(rows, drawn, strict=True) if run == WAYS[way](max(run))
    ]  # fmt: skip


def by_subset(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Accuracies in percent of the runs on subset 0 with mixup weights of their own, and the means of other subsets."""
    found: dict[int, list[float]] = {}
    for row in rows:
        subset, mixing, seed = (int(row[key]) for key in DRAWN)
        if mixing == seed:
            found.setdefault(subset, []).append(100 * float(row["accuracy"]))
    return found.pop(0, []), [fmean(values) for _, values in sorted(found.items())]


def difference(values: Sequence[float], others: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Of two means, with Welch's interval."""
    from scipy.stats import ttest_ind

    low, high = ttest_ind(values, others, equal_var=False).confidence_interval(level)
    return fmean(values) - fmean(others), float(low), float(high)


def deviation_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Of the standard deviation of normal values: sqrt((n - 1) s^2 / chi-squared quantiles)."""
    from scipy.stats import chi2

    df, spread = len(values) - 1, stdev(values)
    low, high = (df / chi2.ppf((1 + side * level) / 2, df) for side in (1, -1))
    return spread * low**0.5, spread * high**0.5


def deviation_ratio(
    values: Sequence[float], others: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
    """Standard deviation of `values` over that of `others`, and the interval of the ratio by the F distribution."""
    from scipy.stats import f

    dfs = len(values) - 1, len(others) - 1
    ratio = stdev(values) / stdev(others)
    low, high = (ratio / f.ppf((1 + side * level) / 2, *dfs) ** 0.5 for side in (1, -1))
    return ratio, low, high


def read(path: Path | None) -> list[Row]:
    """The networks that were trained before."""
    if path is None or not path.exists():
        return []
    with open(path, newline="") as file:
        return [*csv.DictReader(file)]


def write(rows: Sequence[Row], path: Path) -> None:
    """All of them, whole or not at all."""
    from longtail.workflow import files

    ordered = sorted(rows, key=lambda row: [*(row[key] for key in SETTING), *(int(row[key]) for key in DRAWN)])
    files.write_csv(path, ordered, [*COLUMNS])


if __name__ == "__main__":
    main()
