"""What some code does with a cell: the same numbers from two versions of the code are the evidence of `longtail adopt`.

A cell is looked at in two ways. Its stages run word for word, as DVC's lock has their commands, on a small copy of its
data and with a short recipe: every byte that they write counts. And its training begins again on the real data, in each
epoch in which the recipe changes something. Every draw comes from (seed, epoch, place), so that an epoch can begin
without those before it.
"""

import json
import math
import os
import runpy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtail import posthoc, training
from longtail.data import batches
from longtail.training import engine, inference, provenance
from longtail.workflow import files, stage

IMAGES = 150  # of a small training split, beside one for each class: some classes have six, most have one or two
OTHERS = 4  # of each class of the other splits, so that test sets with long tails of their own can be drawn
SHOTS = {"many_above": 3, "few_below": 3, "distribution_ratios": [2, 4]}  # with which they have all groups and tails
FEW_AT_A_TIME = 64  # images, so that even a small copy takes several turns
FEW_LOGITS = 512  # 5 rows of 100 classes
OF_A_CLASS, CHAIN_BATCH = 24, 16  # of a chain of trainings: few classes in a step, of which some images are held out
BF16_STEPS = 1  # in bf16 where the processor does not do it: emulated, and slow


class Enough(Exception):  # noqa: N818
    """Raised between two steps to end a probe."""


def main() -> None:
    """Answer jobs, a line of JSON each on standard input, with a line of JSON each, until the input ends.

    A job is {folder, tree, stages, data, training, steps}: see `look`. An error is an answer too: {"error": text}.
    """
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")  # what the stages print must not stand among the answers
    for line in sys.stdin:
        with redirect_stdout(sys.stderr):
            try:
                found = look(**json.loads(line))
            except (Exception, SystemExit) as error:  # a stage ends with SystemExit
                found = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def look(
    folder: str, tree: str, stages: list[dict[str, Any]], data: Mapping[str, str], training: dict[str, Any] | None,
    steps: int, chain: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """{"written": [path], "states": {probe: {"losses": [...], "weights": SHA-256}}} of a cell.

    Args:
        folder: an empty one, in which the stages run.
        tree: the repository whose scripts they are; this package is its.
        stages: [{"argv": [script, flags ...], "params": {declared key: value}, "outs": [path]}], in order.
        data: {relative path: the file that a small copy of comes there}.
        training: {"data", "recipe", "method", "block", "seed"} of the training to begin, None for none.
        steps: of each epoch that is begun.
        chain: whether it is a chain of trainings.
    """
    back = Path.cwd()
    os.chdir(folder)
    try:
        for path, source in data.items():
            files.save_arrays(path, **small(files.load_arrays(source), chain))
        inference.PREDICT_BATCH, posthoc.inputs.SLICE = FEW_AT_A_TIME, FEW_LOGITS
        for one in stages:
            run_stage(Path(tree), one["argv"], {key: shortened(value) for key, value in one["params"].items()})
        outs = [Path(out) for one in stages for out in one["outs"]]
        there = [
            path for out in outs for path in ([out] if out.is_file() else sorted(out.rglob("*"))) if path.is_file()
        ]
        written = [path.as_posix() for path in there]
    finally:
        os.chdir(back)
    return {"written": written, "states": dict(states(steps=steps, **training)) if training else {}}


def run_stage(tree: Path, argv: list[str], params: Mapping[str, Any]) -> None:
    """Run a stage's script in this process, with these flags and params, without DVC."""
    script, *flags = argv
    before = sys.argv
    sys.argv = [script, *flags]
    try:
        with stage.given(params):
            runpy.run_path(str(tree / script), run_name="__main__")
    finally:
        sys.argv = before


def small(arrays: Mapping[str, np.ndarray], chain: bool) -> dict[str, np.ndarray]:
    """A few images of each split and class, as long-tailed as all of them; what is not of a split stays."""
    images = OF_A_CLASS * len(arrays["class_names"]) if chain else IMAGES
    kept = dict(arrays)
    for split in inference.SPLITS:
        labels_N = arrays[f"{split}_labels"]
        places: list[int] = []
        for c in np.unique(labels_N):
            rows = np.flatnonzero(labels_N == c)
            wanted = math.ceil(len(rows) * images / len(labels_N))
            places += [*rows[: wanted if split == "train" else max(wanted, OTHERS)]]
        for name in (f"{split}_labels", f"{split}_images"):
            kept[name] = arrays[name][sorted(places)]
    return kept


def shortened(value: Any) -> Any:
    """A recipe with few epochs, in which all its changes come in their order, and small batches; the rest as it is.

    Of a chain's recipe, that of the first step and that of the later ones. What is evaluated has the groups and test
    distributions that a small copy has images for.
    """
    if isinstance(value, Mapping) and SHOTS.keys() <= value.keys():
        return {**value, **SHOTS}
    if isinstance(value, Mapping) and {"first", "later"} <= value.keys():
        first, later = shortened(value["first"]), value["later"]
        first["batch_size"] = min(first["batch_size"], CHAIN_BATCH)
        if later is not None:
            whole = shortened({**value["first"], **later})
            later = {key: whole[key] for key in later}
        return {**value, "first": first, "later": later}
    if not (isinstance(value, Mapping) and {"epochs", "schedule", "resolution"} <= value.keys()):
        return value
    schedule, resolution = value["schedule"], value["resolution"]
    changes = sorted({*schedule["milestones"], *resolution["milestones"], schedule["warmup_epochs"]} - {0})
    place = {epoch: number for number, epoch in enumerate(changes, 1)} | {0: 0}
    short = {
        **value,
        "epochs": len(changes) + 2,
        "batch_size": min(value["batch_size"], 50),
        "schedule": {
            **schedule,
            "warmup_epochs": place[schedule["warmup_epochs"]],
            "milestones": [place[epoch] for epoch in schedule["milestones"]],
        },
        "resolution": {**resolution, "milestones": [place[epoch] for epoch in resolution["milestones"]]},
    }
    often = {key: 1 for key in ("test_every", "gradients_every") if value.get(key)}
    return short | often


def epochs_of_change(recipe: Mapping[str, Any], block: Mapping[str, Any]) -> list[int]:
    """The first epoch, the last, and the one after each change: warm-up, milestones of lr and resolution, deferral."""
    last, schedule = recipe["epochs"], recipe["schedule"]
    ends = [0, schedule["warmup_epochs"], *schedule["milestones"], *recipe["resolution"]["milestones"], last - 1]
    ends += [round(block["deferred"] * last)] if "deferred" in block else []
    return sorted({end + 1 for end in ends if end < last})


def states(
    data: str, recipe: dict[str, Any], method: str, block: dict[str, Any], seed: int, steps: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(probe, {"losses": after each step, "weights": SHA-256 of its tensors}), a probe an epoch of change."""
    device = inference.find_device()
    train = batches.splits(files.load_arrays(data), device)["train"]
    settings = {key: value for key, value in recipe.items()
                if key not in ("network", "normalization", "test_every", "gradients_every")}  # fmt: skip
    asked, done = recipe["precision"], inference.precision_on(device, recipe["precision"])

    def begin(epoch: int, steps: int) -> dict[str, Any]:
        inference.set_up(seed)
        network, loss = training.build(train, method, block, **recipe)
        run = engine.Training(
            network, loss, train, seed=seed, gradients=bool(recipe.get("gradients_every")), **settings
        )
        run.epoch = epoch
        each = batches.batches_per_epoch(len(train), batch_size=recipe["batch_size"], drop_last=recipe["drop_last"])
        run.steps = (epoch - 1) * each  # by which a moving average moves
        losses: list[str] = []

        def between_steps() -> None:
            losses.append(repr(float(run.sums[0]) / run.seen))
            if len(losses) == steps:
                raise Enough

        with suppress(Enough):
            run.finish_epoch(between_steps)
        return {"losses": losses, "weights": provenance.digest(run.state_dict())}

    for epoch in epochs_of_change(recipe, block):
        yield f"epoch {epoch} in {done}", begin(epoch, steps)
    if done != asked:
        with as_if_bf16():
            yield f"epoch 1 in {asked}, emulated", begin(1, BF16_STEPS)


@contextmanager
def as_if_bf16() -> Iterator[None]:
    """Have the processor do bf16, by emulation: the code for it runs, the speed is not there."""
    before = inference.cpu_has_bf16
    inference.cpu_has_bf16 = lambda: True
    try:
        yield
    finally:
        inference.cpu_has_bf16 = before
