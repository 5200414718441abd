"""Does this code train what is committed? The first epoch of each finished cell again, digit for digit.

    python -m benchmarks.first_epoch [plan ...] [--only PATTERN]

After a change that must not change a number: `dvc commit` may then say that the committed cells are of the new code.
Learning rate, loss and training accuracy of the epoch have to be those of results/<plan>/cells/**/history.csv to their
last decimal. Runs each cell with as many threads as it was trained with, where runs/ still says so, else with one;
another processor has other digits. Exit status 1 where a cell differs or none was found.
"""

import argparse
import fnmatch
import sys
from pathlib import Path

import torch
import yaml

from longtail import batches, cli, engine, files, inference, training
from longtail import params as schema

COLUMNS = ("lr", "loss", "train_accuracy")


def first_epoch(cell: str, params: dict) -> dict[str, float]:
    """The first row of the cell's history, `<dataset>-<recipe>-<method>-<seed>`, as it comes out now."""
    dataset, name, method, seed = cell.split("-")
    device = inference.find_device()
    train = batches.splits(files.load_arrays(f"data/long_tail/{dataset}.npz"), device)["train"]
    inference.set_up(int(seed))
    recipe = params["recipes"][name]
    network, loss = training.build(train, method, params["methods"][method], **recipe)
    about_others = ("network", "normalization", "test_every", "gradients_every")
    settings = {key: value for key, value in recipe.items() if key not in about_others}
    run = engine.Training(network, loss, train, seed=int(seed), **settings)
    run.finish_epoch(lambda: None)
    return files.rounded(run.row())


def main() -> int:
    """Compare, a line a cell; returns how many differ, 1 where there is none."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("plan", nargs="*")
    parser.add_argument("--only", default="*", help="pattern of <dataset>-<recipe>-<method>-<seed>")
    args = parser.parse_args()
    params = yaml.safe_load(Path("params.yaml").read_text())
    differing = looked_at = 0
    for plan in args.plan or params["plans"]:
        for cell in cli.cells(params["plans"][plan]):
            folder = Path(plan, *cell.split("-"))
            history, machine = Path("results", plan, "cells", *folder.parts[1:], "history.csv"), Path("runs", folder)
            method = cell.split("-")[2]
            trained = schema.kind(method, params["methods"][method])[0] == "loss"
            if not (trained and history.exists() and fnmatch.fnmatchcase(cell, args.only)):
                continue
            about = machine / "machine.json"
            torch.set_num_threads(files.read_json(about)["threads"] if about.exists() else 1)
            committed = {key: float(files.read_csv(history)[0][key]) for key in COLUMNS}
            again = first_epoch(cell, params)
            same = all(again[key] == committed[key] for key in COLUMNS)
            differing, looked_at = differing + (not same), looked_at + 1
            shown = ", ".join(f"{key} {again[key]:.6f} ({committed[key]:.6f})" for key in COLUMNS)
            print(f"{'same' if same else 'OTHER'}  {plan} {cell}: {shown}", flush=True)
    return differing if looked_at else 1


if __name__ == "__main__":
    sys.exit(min(1, main()))
