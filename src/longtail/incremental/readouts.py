"""Read-outs: what a chain's saved logits say with each correction of the bias to new classes.

Every one comes from longtail.posthoc and is fitted on what was there at its step: never on test images, never on
classes to come. Step 0 has no old classes, hence nothing to correct: all read-outs but the nearest mean equal the raw
one there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from longtail import posthoc
from longtail.incremental.protocol import Step, groups
from longtail.incremental.teaching import WEIGHTS
from longtail.posthoc import Affine, Correction

GROUPINGS = ("old_new", "step", "class")  # simplest first: among equals the first is chosen
FIT_SETS = {"train": "train", "memory": "train", "held_out": "held-out"}  # name: what posthoc calls it
CHOSEN = "energy_chosen"
SHOWN = ("none", "weight_aligning", "bias_layer", "logit_adjusted", CHOSEN, "nearest_mean")  # what pages show first


@dataclass(frozen=True)
class Seen:
    """What is known after a step: logits (N, C) and labels (N,) of each set, head weights, and the groups of classes.

    Attributes:
        ends: classes seen after each step up to this one.
    """

    step: Step
    logits: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    features: Mapping[str, np.ndarray]
    weight_ECD: np.ndarray
    bias_EC: np.ndarray
    ends: list[int]

    def grouping(self, name: str) -> np.ndarray | None:
        """The group of each class (C,) for energy aligning; None: each by itself."""
        if name == "class":
            return None
        if name == "old_new":
            return (np.arange(self.step.seen) >= self.step.old).astype(np.int64)
        return groups(self.ends)


def read(arrays: Mapping[str, np.ndarray]) -> Iterator[Seen]:
    """The steps of a predictions.npz, from step 0."""
    ends = [int(end) for end in arrays["ends"]]
    for number, (old, seen) in enumerate(zip([0, *ends], ends, strict=False)):
        sets = [name for name in (*FIT_SETS, "test") if f"{number:02}_{name}_logits" in arrays]
        yield Seen(
            Step(number, old, seen),
            {name: arrays[f"{number:02}_{name}_logits"] for name in sets},
            {name: arrays[f"{number:02}_{name}_labels"] for name in sets},
            {name: arrays[f"{number:02}_{name}_features"] for name in ("memory", "test") if name in sets},
            arrays[f"{number:02}_weight"],
            arrays[f"{number:02}_bias"],
            ends[: number + 1],
        )


def weight_aligning(name: str, old: int, weight_ECD: np.ndarray, bias_EC: np.ndarray) -> Correction:
    """One of WEIGHTS, fitted."""
    norm, clamp = WEIGHTS[name]
    made = posthoc.WeightAligning(weight_ECD, bias_EC, old=old, norm=norm, clamp=clamp)
    return made.fit(np.zeros((1, weight_ECD.shape[1])), fitted_on="train")


def aligning(seen: Seen, grouping: str, settings: Mapping[str, Any]) -> posthoc.EnergyAligning:
    """Energy aligning for each class, for old and new ones, or for each step's, not yet fitted."""
    return posthoc.EnergyAligning(groups=seen.grouping(grouping), **settings)


def corrections(seen: Seen, correct: Mapping[str, Any]) -> dict[str, Correction]:
    """The fitted corrections of a step by name; `none` is first and changes nothing.

    Args:
        correct: blocks `bias_layer` and `energy_aligning` with the settings of longtail.posthoc.

    A correction is missing where what it is fitted on is: without held-out images there is no bias layer, and logit
    adjustment needs an image of every class to count.
    """
    step = seen.step
    found: dict[str, Correction] = {"none": Affine().fit(np.zeros((1, step.seen)))}
    if not step.number:
        return found
    for name in WEIGHTS:
        found[name] = weight_aligning(name, step.old, seen.weight_ECD, seen.bias_EC)
    if "held_out" in seen.logits:
        layer = posthoc.BiasLayer(old=step.old, **correct["bias_layer"])
        found["bias_layer"] = layer.fit(seen.logits["held_out"], seen.labels["held_out"], fitted_on="held-out")
    if np.bincount(seen.labels["train"], minlength=step.seen).all():
        adjustment = posthoc.LogitAdjustment()
        found["logit_adjusted"] = adjustment.fit(seen.logits["train"], seen.labels["train"], fitted_on="train")
    for on, fitted_on in FIT_SETS.items():
        if on in seen.logits:
            for grouping in GROUPINGS:
                made = aligning(seen, grouping, correct["energy_aligning"])
                name = f"energy_{grouping}_on_{on}"
                found[name] = made.fit(seen.logits[on], seen.labels[on], fitted_on=fitted_on)
    return found


def held_out_accuracy(seen: Seen, name: str, correction: Correction, correct: Mapping[str, Any]) -> float:
    """Accuracy of an energy aligning on the held-out memory; one that was fitted there is fitted on the other half."""
    logits_NC, labels_N = seen.logits["held_out"], seen.labels["held_out"]
    if not name.endswith("_on_held_out"):
        return float((correction.predict(logits_NC) == labels_N).mean())
    half = np.zeros(len(labels_N), dtype=bool)
    for label in np.unique(labels_N):
        half[np.flatnonzero(labels_N == label)[::2]] = True
    grouping = name.removeprefix("energy_").removesuffix("_on_held_out")
    right = 0
    for fit_on in (half, ~half):
        fitted = aligning(seen, grouping, correct["energy_aligning"]).fit(logits_NC[fit_on], labels_N[fit_on])
        right += int((fitted.predict(logits_NC[~fit_on]) == labels_N[~fit_on]).sum())
    return right / len(labels_N)


def chosen(
    steps: list[tuple[Seen, dict[str, Correction]]], correct: Mapping[str, Any]
) -> list[dict[str, float]]:  # fmt: skip
    """{candidate: mean of its accuracies on held-out memory up to that step}, the best first, of each step.

    The candidates are the ways to align energies, grouping x set; those fitted on held-out images are left out where a
    class has fewer than two of them to be halved. There are none in step 0, and without held-out images.
    """
    accuracies: dict[str, list[float]] = {}
    found: list[dict[str, float]] = []
    for seen, fitted in steps:
        if seen.step.number and "held_out" in seen.logits:
            two_each = np.bincount(seen.labels["held_out"], minlength=seen.step.seen).min() > 1
            for name in fitted:
                if name.startswith("energy_") and (two_each or not name.endswith("_on_held_out")):
                    accuracies.setdefault(name, []).append(held_out_accuracy(seen, name, fitted[name], correct))
        tried = max(map(len, accuracies.values()), default=0)  # those that every step so far could try
        means = {
            name: float(np.mean(values))
            for name, values in accuracies.items()
            if len(values) == tried and name in fitted
        }
        found.append(dict(sorted(means.items(), key=lambda item: -item[1])))
    return found


def scores(
    steps: list[tuple[Seen, dict[str, Correction]]], best: list[str | None]
) -> Iterator[tuple[Seen, str, np.ndarray]]:  # fmt: skip
    """(step, read-out, scores (N, C) of its test images) of all steps; `best`: each step's way to align energies."""
    for (seen, found), way in zip(steps, best, strict=True):
        logits_NC = seen.logits["test"]
        every = steps[-1][1]  # in step 0 all equal the raw one
        for name in every:
            correction = found.get(name, found["none"])
            yield seen, name, correction.transform(logits_NC)
        if best[-1]:
            yield seen, CHOSEN, found[way or "none"].transform(logits_NC)
        if "memory" in seen.features:
            nearest = posthoc.NearestMean().fit(seen.features["memory"], seen.labels["memory"])
            yield seen, "nearest_mean", nearest.decision_function(seen.features["test"])
