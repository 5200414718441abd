"""A finished cell as the pipeline leaves it: its results and its entries in DVC's lock, without a training."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from longtail.evaluation.cell import pack
from longtail.report import outcomes
from longtail.workflow import files
from longtail.workflow.fingerprint import fingerprint
from longtail.workflow.pipeline import CELL_FILES

COLUMNS = ["epoch", "lr", "loss", "train_accuracy", "held_out_accuracy", "test_accuracy"]
RECIPE = {"epochs": 4, "milestones": [2, 3], "optimizer": {"lr": 0.1}}


def add_cell(
    root: Path,
    method: str,
    *,
    accuracy: float,
    plan: str = "quick",
    dataset: str = "digits_if20",
    recipe: str = "digits",
    seed: int = 0,
    epochs: int = 4,
    held_out: bool = True,
    method_params: dict[str, Any] | None = None,
    history: list[dict[str, Any]] | None = None,
    metrics: dict[str, Any] | None = None,
) -> str:
    """Write a cell's results and lock entries as the pipeline would; return its training's fingerprint."""
    where = f"{dataset}/{recipe}/{method}/{seed}"
    results, runs = f"results/{plan}/cells/{where}", f"runs/{plan}/{where}"
    rows = history or [
        {"epoch": epoch, "lr": 0.1 / epoch, "loss": 2 / epoch, "train_accuracy": accuracy}
        | {"held_out_accuracy": accuracy - 1 / (epoch + 9) if held_out else None, "test_accuracy": None}
        for epoch in range(1, epochs + 1)
    ]
    if metrics is None:
        parts = ["raw", "aligned_on_train"] + ["aligned_on_held_out"] * held_out
        last = {part: measures(accuracy + 0.01 * number) for number, part in enumerate(parts)}
        metrics = {"last": {"epoch": len(rows), **last}}
        if held_out:
            metrics["best_on_held_out"] = {"epoch": 3, **last}
    files.write_csv(root / results / "history.csv", rows, COLUMNS)
    files.write_json(root / results / "metrics.json", metrics)
    written_last = metrics.get("last", {}) if isinstance(metrics, dict) else {}  # some tests write what is no cell's
    corrections = [key for key in outcomes.CORRECTIONS if key in written_last]
    energies = {f"energy_{when}_train": 0.0 for when in ("before", "after")}
    rows_of = {
        "classes.csv": [
            {"class": 0, "name": "zero", "train_images": 9, **dict.fromkeys(corrections, accuracy), **energies}
        ],
        "distributions.csv": [
            dict.fromkeys(outcomes.DISTRIBUTIONS, 0.1) | {"distribution": "uniform", "images": 8, "correction": key}
            for key in corrections
        ],
        "reliability.csv": [
            dict.fromkeys(outcomes.RELIABILITY, accuracy) | {"images": 8, "correction": key} for key in corrections
        ],
        "right.csv": [
            {"correction": key, "images": 8, "right": pack(np.arange(8) < round(8 * accuracy))} for key in corrections
        ],
    }
    for name, lines in rows_of.items():
        files.write_csv(root / results / name, lines, list(lines[0]) if lines else ["correction"])

    path = root / "stages" / plan / "dvc.lock"
    lock: dict[str, Any] = {"schema": "2.0", "stages": {}}
    if path.exists():
        lock = yaml.safe_load(path.read_text())
    data = ("data/long_tail/" + dataset + ".npz", "d" * 32)
    params = {f"recipes.{recipe}": RECIPE, f"methods.{method}": method_params or {"tau": 1.0}}
    model = (f"{runs}/model", hashlib.md5(json.dumps([params, method, seed]).encode()).hexdigest() + ".dir")
    logits = (f"{runs}/predictions.npz", hashlib.md5(model[1].encode()).hexdigest())
    energy = (f"{runs}/alignment.json", hashlib.md5(logits[1].encode()).hexdigest())
    written = [(f"{results}/{name}", md5(root / results / name)) for name in CELL_FILES]
    chain = {
        "train": ([data], params, [model]),
        "predict": ([data, model], {}, [logits]),
        "align": ([logits], {"align": {"temperature": 1.0}}, [energy]),
        "evaluate": ([logits, energy], {"evaluate": {"ece_bins": 15}}, written),
    }
    for kind, (deps, declared, outs) in chain.items():
        lock["stages"][f"{kind}-{plan}@{dataset}-{recipe}-{method}-{seed}"] = {
            "cmd": f"python stages/{kind}.py --method {method} --seed {seed}",
            "deps": [{"path": path, "hash": "md5", "md5": md5} for path, md5 in deps],
            **({"params": {"params.yaml": declared}} if declared else {}),
            "outs": [{"path": path, "hash": "md5", "md5": md5} for path, md5 in outs],
        }
    files.write_text(path, yaml.safe_dump(lock))
    return fingerprint(f"python stages/train.py --method {method} --seed {seed}", [data], params)


def measures(accuracy: float) -> dict[str, Any]:
    """A block of metrics.json; no class is medium."""
    some = {"accuracy": accuracy, "many": 0.9, "medium": None, "few": 0.25, "balanced_error": 1 - accuracy}
    some |= {"nll": 1.5, "ece": 0.05, "standard_error": dict.fromkeys(outcomes.RESAMPLED, 0.01)}
    return dict.fromkeys(outcomes.MEASURES, 0.5) | some


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()
