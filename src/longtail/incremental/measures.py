"""Measures of a chain: of every step and read-out, and over steps; each named as what it is.

A step's accuracy is over the test images of all classes seen (as a share, 0 to 1). Groups are the classes of a real
step, not tens of them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from longtail import posthoc
from longtail.incremental import protocol, readouts
from longtail.workflow import files

STEPS = ["step", "readout", "seen", "accuracy", "top5", "old", "new"]
GROUPS = ["step", "readout", "group", "accuracy"]
CONFUSION = ["step", "readout", "group", "predicted", "images"]
ENERGIES = ["step", "set", "readout", "old", "new"]
ENERGY: dict[str, Any] = {"reading": "normalized", "weights": "balanced", "temperature": 1.0}  # how the bias is shown


@dataclass(frozen=True)
class Measured:
    """The small files of a cell."""

    summary: dict[str, Any]
    steps: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    confusion: list[dict[str, Any]]
    energies: list[dict[str, Any]]


def accuracy(right_N: np.ndarray) -> float | None:
    """The share of what is right; None of no image."""
    return float(right_N.mean()) if len(right_N) else None


def over_steps(accuracies_T: list[float], seen_T: list[int]) -> dict[str, float]:
    """The averages that the literature reports under one name.

    average: mean over steps, the first one included (PyCIL, DER); average_later: without it (Weight Aligning's
    release); average_weighted: each step as many times as it has classes (UCIR); last: the last step's.
    """
    values, seen = np.array(accuracies_T), np.array(seen_T)
    return {
        "average": float(values.mean()),
        "average_later": float(values[1:].mean()),
        "average_weighted": float((values * seen).sum() / seen.sum()),
        "last": float(values[-1]),
    }


def forgetting(by_group: Mapping[tuple[int, int], float], steps: int) -> float:
    """Mean over the groups of all steps but the last of the best accuracy so far minus the last one.

    Args:
        by_group: {(step, group): accuracy}.
    """
    lost = []
    for group in range(steps - 1):
        before = [by_group[step, group] for step in range(group, steps - 1)]
        lost.append(max(before) - by_group[steps - 1, group])
    return float(np.mean(lost))


def measure(predictions: str, correct: Mapping[str, Any]) -> Measured:
    """Fit all read-outs of a chain's predictions.npz and measure them on its test images.

    Args:
        correct: the settings of corrections.

    Raises ValueError naming the file when its logits cannot be corrected.
    """
    arrays = files.load_arrays(predictions)
    try:
        steps = [(seen, readouts.corrections(seen, correct)) for seen in readouts.read(arrays)]
        candidates = readouts.chosen(steps, correct)
    except ValueError as error:
        raise ValueError(f"{predictions}: {error}") from error
    ends = [int(end) for end in arrays["ends"]]
    group_C = protocol.groups(ends)
    rows: list[dict[str, Any]] = []
    last: dict[str, np.ndarray] = {}
    group_rows: list[dict[str, Any]] = []
    confusion: list[dict[str, Any]] = []
    best = [next(iter(of_step), None) for of_step in candidates]
    for seen, name, scores_NC in readouts.scores(steps, best):
        step, labels_N = seen.step, seen.labels["test"]
        predictions_N = scores_NC.argmax(1)
        right_N = predictions_N == labels_N
        best5 = np.argpartition(-scores_NC, min(5, step.seen) - 1, axis=1)[:, : min(5, step.seen)]
        rows.append({
            "step": step.number, "readout": name, "seen": step.seen, "accuracy": accuracy(right_N),
            "top5": accuracy((best5 == labels_N[:, None]).any(1)),
            "old": accuracy(right_N[labels_N < step.old]), "new": accuracy(right_N[labels_N >= step.old]),
        })  # fmt: skip
        group_N = group_C[labels_N]
        if step.seen == ends[-1]:
            last[name] = predictions_N
        for group in range(step.number + 1):
            found = accuracy(right_N[group_N == group])
            group_rows.append({"step": step.number, "readout": name, "group": group, "accuracy": found})
            if name in readouts.SHOWN:
                predicted = np.bincount(group_C[predictions_N[group_N == group]], minlength=step.number + 1)
                confusion += [
                    {"step": step.number, "readout": name, "group": group, "predicted": other, "images": int(images)}
                    for other, images in enumerate(predicted)
                ]
    summary = summarise(rows, group_rows, ends)
    for name, predictions_N in last.items():
        summary[name] |= against_raw(predictions_N, last["none"], steps[-1][0].labels["test"])
    order = arrays["order"]
    facts = {
        "classes": len(order), "ends": ends, "order": order.tolist(), "order_sha256": protocol.order_hash(order),
        "names_sha256": protocol.names_hash(arrays["class_names"].tolist()),
        "sizes": json.loads(str(arrays["sizes"])), "provenance": json.loads(str(arrays["provenance"])),
        "energy_candidates": candidates[-1], "energy_chosen": best,
        "corrections": [fitted(seen, found) for seen, found in steps],
    }  # fmt: skip
    return Measured({**facts, "readouts": summary}, rows, group_rows, confusion, energies(steps))


def against_raw(predictions_N: np.ndarray, raw_N: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """The last step's accuracy minus that without a correction, its standard error over test images, paired.

    And the share of predictions that a correction changes: one that changes nothing is to be noticed.
    """
    difference_N = (predictions_N == labels_N).astype(np.float64) - (raw_N == labels_N)
    return {
        "last_gain": difference_N.mean(),
        "last_gain_se": difference_N.std(ddof=1) / np.sqrt(len(raw_N)),
        "last_changed": float((predictions_N != raw_N).mean()),
    }


def summarise(
    rows: list[dict[str, Any]], group_rows: list[dict[str, Any]], ends: list[int]
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """{read-out: measures over steps}, in the rows' order."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["readout"] for row in rows):
        mine = [row for row in rows if row["readout"] == name]
        by_group = {(row["step"], row["group"]): row["accuracy"] for row in group_rows if row["readout"] == name}
        found[name] = {
            **over_steps([row["accuracy"] for row in mine], ends),
            **{f"{key}_top5": value for key, value in over_steps([row["top5"] for row in mine], ends).items()},
            "forgetting": forgetting(by_group, len(ends)), "old": mine[-1]["old"], "new": mine[-1]["new"],
        }  # fmt: skip
    return found


def fitted(seen: readouts.Seen, found: Mapping[str, posthoc.Correction]) -> dict[str, Any]:
    """What each correction of a step came to: scale and shift, a mean over old and over new classes."""
    old = np.arange(seen.step.seen) < seen.step.old
    said: dict[str, Any] = {}
    for name, correction in found.items():
        if name == "none":
            continue
        scale_C = np.broadcast_to(correction.scale_, old.shape)
        said[name] = {
            "scale_new": scale_C[~old].mean(),
            "shift_new_minus_old": correction.shift_[~old].mean() - correction.shift_[old].mean(),
        }
    return said


def energies(steps: list[tuple[readouts.Seen, dict[str, posthoc.Correction]]]) -> list[dict[str, Any]]:
    """Free energies in nats, a mean over old and over new classes, raw and after each correction, on each set.

    That of test images shows what is there; nothing is fitted on it.
    """
    rows = []
    for seen, found in steps:
        if not seen.step.number:
            continue
        old = np.arange(seen.step.seen) < seen.step.old
        for on, logits_NC in seen.logits.items():
            for name, correction in found.items():
                energy_C = posthoc.free_energy(correction.transform(logits_NC), seen.labels[on], **ENERGY)
                rows.append({
                    "step": seen.step.number, "set": on, "readout": name, "old": energy_C[old].mean(),
                    "new": energy_C[~old].mean(),
                })  # fmt: skip
    return rows
