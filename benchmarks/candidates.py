"""Recipes side by side on validation images, so that one can be chosen without a look at test images.

python -m benchmarks.candidates --list
python -m benchmarks.candidates --only 'as it was' --method balpoe     # half an hour of one core
python -m benchmarks.candidates --say                                  # the table again, of what the csv has
python -m benchmarks.candidates --quick                                # one epoch; prints only

A tenth of CIFAR-100's training images, as many of each class, is kept out, and the long tail (imbalance factor 100) is
cut from the rest: candidates.yaml has this and the recipes. A network that the csv has is not trained again, and one
that was interrupted goes on from its checkpoint. Several may be under way at once, a core each.
"""

import argparse
import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from benchmarks.harness import RESULTS, ROOT, Report

COLUMNS = ("candidate", "method", "seed", "settings", "accuracy", "train_accuracy", "seconds", "threads", "cpu")
KEY = COLUMNS[:4]
SETTINGS = Path(__file__).with_suffix(".yaml")
Row = dict[str, str]


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is asked for and missing, and say what all of it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="candidates by name (default: all)")
    parser.add_argument("--method", default="balpoe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="name the candidates and train nothing")
    parser.add_argument("--say", action="store_true", help="write the table and train nothing")
    parser.add_argument("--quick", action="store_true", help="one epoch of the first: says only that it runs")
    parser.add_argument("--results", type=Path, help="folder to write to (default: benchmarks/results)")
    args = parser.parse_args(argv)
    data, recipes = read(SETTINGS)
    if args.list:
        print(*recipes, sep="\n")
        return
    methods = yaml.safe_load((ROOT / "params.yaml").read_text())["methods"]
    if args.method not in methods:
        parser.error(f"--method {args.method}: params.yaml has {', '.join(methods)}")
    asked = args.only or [*recipes][: 1 if args.quick else None]
    if unknown := [name for name in asked if name not in recipes]:
        parser.error(f"--only {unknown[0]!r}: candidates.yaml has {'; '.join(recipes)}")
    # A quick run writes nowhere: its network of one epoch is no candidate.
    table = None if args.quick else (args.results or RESULTS) / "candidates.csv"
    for name in [] if args.say else asked:
        recipe = recipes[name] | ({"epochs": 1} if args.quick else {})
        key = dict(zip(KEY, (name, args.method, str(args.seed), digest(recipe, methods[args.method])), strict=True))
        if not any(key.items() <= row.items() for row in networks_in(table)):
            row = key | train(data, recipe, args.method, methods[args.method], args.seed, key if table else None)
            print(*row.values(), flush=True)
            if table:
                write([*networks_in(table), row], table)
    if table:
        say(networks_in(table), recipes).write(table.with_suffix(".md"))


def read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The data's settings, and whole recipes by name: the base, with what a candidate names in place of it.

    Raises ValueError for a key that the base has not.
    """
    given = yaml.safe_load(path.read_text())

    def merged(base: Mapping[str, Any], other: Mapping[str, Any], place: str) -> dict[str, Any]:
        if unknown := [key for key in other if key not in base]:
            raise ValueError(f"{path}: {place} has {unknown[0]!r}, which `base` has not")
        return {
            key: merged(value, other.get(key, {}), place) if isinstance(value, Mapping) else other.get(key, value)
            for key, value in base.items()
        }

    return given["data"], {name: merged(given["base"], other, name) for name, other in given["candidates"].items()}


def digest(recipe: Mapping[str, Any], method: Mapping[str, Any]) -> str:
    """Of everything that params say of a training: a candidate whose settings change is another one."""
    return hashlib.sha256(json.dumps([recipe, method], sort_keys=True).encode()).hexdigest()[:12]


def train(
    data: Mapping[str, Any],
    recipe: Mapping[str, Any],
    name: str,
    method: Mapping[str, Any],
    seed: int,
    key: Mapping[str, str] | None,
) -> Row:
    """Validation accuracy (mean over classes) after the last epoch, and what it took; checkpoints for a key."""
    from longtail import training
    from longtail.data import batches
    from longtail.training import engine, inference, machine
    from longtail.training.checkpoints import Checkpoint

    device = inference.find_device()
    splits = batches.splits(validation_arrays(**data), device)
    inference.set_up(seed)
    network, loss = training.build(splits["train"], name, dict(method), **recipe)
    settings = {key: value for key, value in recipe.items() if key not in ("network", "normalization")}
    identity = "-".join(key.values()) if key else ""
    place = ROOT / "runs" / ".checkpoints" / f"candidate-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.pt"
    checkpoint = Checkpoint(place if key else None, identity)

    def on_epoch(row: dict[str, Any]) -> None:
        facts = f"loss {row['loss']:.4f}  train {row['train_accuracy']:.4f}  images/s {row['images_per_s']:.0f}"
        print(f"  epoch {row['epoch']}/{recipe['epochs']}  {facts}", flush=True)

    with checkpoint.alone():
        fitted = engine.fit(
            network, loss, splits["train"], None, splits["test"],
            seed=seed, checkpoint=checkpoint, on_epoch=on_epoch, test_every=recipe["epochs"], **settings,
        )  # fmt: skip
        checkpoint.remove()
    last = fitted.history[-1]
    about = machine.describe(device)
    return {
        "accuracy": f"{last['test_accuracy']:.6f}", "train_accuracy": f"{last['train_accuracy']:.6f}",
        "seconds": f"{fitted.seconds:.0f}", "threads": str(about["threads"]), "cpu": about["gpu"] or about["cpu"],
    }  # fmt: skip


def validation_arrays(source: str, kept_out: float, **tail: Any) -> dict[str, Any]:
    """A long-tailed cut of the train split without what is kept out of each class, which is its test split.

    Raises FileNotFoundError where the source has not been downloaded.
    """
    from longtail.data import long_tail
    from longtail.workflow import files

    path = ROOT / "data" / "raw" / f"{source}.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: dvc repro stages/dvc.yaml:download@{source}")
    raw = files.load_arrays(path)
    rest, validation = long_tail.hold_out(raw["train_labels"], fraction=kept_out, seed=tail["seed"])
    halves = {
        f"{split}_{kind}": raw[f"train_{kind}"][rows]
        for split, rows in (("train", rest), ("test", validation))
        for kind in ("images", "labels")
    }
    return long_tail.cut({**halves, "class_names": raw["class_names"]}, **tail, held_out=0)


def say(rows: Sequence[Row], recipes: Mapping[str, Any]) -> Report:
    """The table: a line a candidate and method, the best of a method first."""
    report = Report()
    machines = sorted({f"{row['cpu']}, {row['threads']} thread(s) a network" for row in rows})
    report.say(
        "# Candidates for a recipe, on validation images", "", f"Trained on: {'; '.join(machines)}.", "",
        "CIFAR-100-LT, imbalance factor 100, cut from nine tenths of the training images; accuracy in percent at the "
        "last epoch (mean over classes) on the tenth kept out, 50 images a class. Test images are not looked at. "
        "Minutes of training, other work beside it at times. What each "
        "candidate is: candidates.yaml.",
    )  # fmt: skip
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["candidate"] in recipes:
            groups.setdefault((row["method"], row["candidate"], row["settings"]), []).append(row)

    def mean(group: Sequence[Row], column: str) -> float:
        return fmean(float(row[column]) for row in group)

    lines = [
        [
            f"{method}: {candidate}", str(recipes[candidate]["epochs"]), ", ".join(row["seed"] for row in group),
            f"{100 * mean(group, 'accuracy'):.1f}", f"{100 * mean(group, 'train_accuracy'):.1f}",
            f"{mean(group, 'seconds') / 60:.1f}",
        ]
        for (method, candidate, _), group in sorted(
            groups.items(), key=lambda item: (item[0][0], -mean(item[1], "accuracy"))
        )
    ]  # fmt: skip
    report.table(("Candidate", "Epochs", "Seeds", "Validation (%)", "Train, augmented (%)", "Minutes"), lines)
    return report


def networks_in(path: Path | None) -> list[Row]:
    """The networks that were trained before."""
    if path is None or not path.exists():
        return []
    with open(path, newline="") as file:
        return [*csv.DictReader(file)]


def write(rows: Sequence[Row], path: Path) -> None:
    """All of them, whole or not at all."""
    from longtail.workflow import files

    files.write_csv(path, sorted(rows, key=lambda row: [row[key] for key in KEY]), [*COLUMNS])


if __name__ == "__main__":
    main()
