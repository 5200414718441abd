"""A cell of a large data set without its logits: corrections and measures from a block of rows at a time.

437,513 images x 8,142 classes are 14 GB of logits for each expert. Heads on features give them again faster than a disk
does, so that nothing but the network is kept. Corrections and measures are those of `longtail.posthoc` and
`longtail.evaluation`, to rounding (tests/test_streamed.py holds the two together).

N rows, C classes, K bins, V versions of the logits.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtail import networks, posthoc
from longtail.data import batches
from longtail.evaluation import distributions, metrics
from longtail.evaluation.cell import REBALANCED, Evaluated, corrected, pack
from longtail.networks import own
from longtail.posthoc.energy import READINGS, equal_energies, sample_weights
from longtail.posthoc.predictions import FITTED_ON, NETWORKS, product
from longtail.training import inference, provenance
from longtail.workflow import files

BLOCK = 128  # rows whose logits are there at a time
FITTED_ROWS = 32_768  # of a split, of which corrections are fitted; of smaller splits all
IN_MEMORY = 1 << 23  # logits that a fit, which looks at them a hundred times, has in memory; more go to a file
EQUAL_WITHIN = 1e-3  # nats: of logits in a file, which each step reads, equal energies need be no nearer
READINGS_BY_ROW = ("all_samples", "normalized", "equal_shares")  # those that look at one block after the other
SHOWN = 512  # test rows whose logits are kept, for exports to be held against


class Logits:
    """The logits (N, C) of rows of features, as an array of which only slices can be had: the mean of the experts'.

    Args:
        network: heads on features.
        features: (N, 1, 1, D) float32.

    A slice raises ValueError where a logit is not finite.
    """

    def __init__(self, network: networks.Network, features: np.ndarray):
        self.network, self.features = network.eval(), features
        self.shape = len(features), int(network.settings["classes"])
        self.device = next(network.parameters()).device
        self.known: tuple[int, np.ndarray] = -1, np.empty(0)  # the last block, and its number

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last, _ = rows.indices(len(self))
        parts = [
            self._block(number)[max(0, first - number * BLOCK) : last - number * BLOCK]
            for number in range(first // BLOCK, -(-last // BLOCK))
        ]
        return np.concatenate(parts)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All rows, BLOCK at a time."""
        for first in range(0, len(self), BLOCK):
            where = slice(first, min(first + BLOCK, len(self)))
            yield where, self[where]

    def experts(self, rows: slice) -> np.ndarray:
        """The logits (E, n, C) float32 of each expert."""
        images = torch.from_numpy(self.features[rows]).permute(0, 3, 1, 2).to(self.device)
        normalize = batches.normalizer(
            self.network.settings["mean"], self.network.settings["std"], channels_last=True, device=self.device
        )
        with torch.inference_mode():
            found: np.ndarray = self.network(normalize(images)).cpu().numpy()
        return found

    def _block(self, number: int) -> np.ndarray:
        if self.known[0] != number:
            first = number * BLOCK
            values = product(self.experts(slice(first, first + BLOCK)))
            if not np.isfinite(values).all():
                row, column = np.argwhere(~np.isfinite(values))[0]
                raise ValueError(f"the logit of row {first + row}, class {column} is {values[row, column]}")
            self.known = number, values
        return self.known[1]


class Stored:
    """Logits (N, C) in a file, float32, of which slices are read: the system keeps it in memory that is free."""

    def __init__(self, logits: Logits, path: Path):
        self.path, self.shape = path, logits.shape
        self.shift: np.ndarray | float = 0.0  # that is added
        with open(path, "wb") as file:
            for _, part in logits.blocks():
                file.write(part.astype(np.float32).tobytes())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last, _ = rows.indices(len(self))
        classes = self.shape[1]
        values = np.fromfile(self.path, np.float32, (last - first) * classes, offset=4 * first * classes)
        return values.reshape(-1, classes).astype(np.float64) + self.shift


def load(model: str | Path, which: str) -> networks.Network:
    """A network of the folder `model`, on the device. Raises ValueError where it is none on features."""
    path = Path(model) / f"{which}.safetensors"
    if own.is_own(path):
        return own.load(path, inference.find_device())
    network = networks.load(path, inference.find_device())
    if not networks.of_features(network):
        raise ValueError(f"{model}: its network takes images; logits by blocks are of heads on features")
    return network


def features_for(data: str | Path, which: str) -> Path:
    """The file of the features that a network takes: `data`, or of a folder, where each has its own, the network's."""
    return Path(data) / f"{which}.npz" if Path(data).is_dir() else Path(data)


def predict(data: str, model: str, out: str) -> None:
    """Write what `inference.predict` writes, but for the logits: of those the first SHOWN of test alone.

    Args:
        data: features in place of images, as `features_for` has them.
    """
    inference.set_up(0)  # nothing is drawn; deterministic algorithms
    kept: dict[str, np.ndarray] = {}
    for which, epoch in sorted(files.read_json(Path(model) / "epochs.json").items()):
        wanted = ("class_names", "test_images", *(f"{split}_labels" for split in inference.SPLITS))
        arrays = files.load_arrays(features_for(data, which), *wanted)
        features = arrays.pop("test_images")
        kept |= arrays
        kept[f"{which}_test_logits"] = Logits(load(model, which), features).experts(slice(0, SHOWN))
        kept[f"{which}_epoch"] = np.array(epoch)
    kept["class_counts"] = np.bincount(kept["train_labels"], minlength=len(kept["class_names"]))
    made = [*provenance.read(model), provenance.record("predict", inference.find_device(), precision="fp32")]
    kept["provenance"] = np.array(json.dumps(made))
    files.save_arrays(out, **kept)


# ------------------------------------------------------------------------------------------------ corrections


def fitted_rows(labels: np.ndarray, most: int | None = None) -> np.ndarray:
    """Rows (n,) ascending, `most` (FITTED_ROWS) or about so many of (N,) labels: of every class the same, all of those
    with fewer."""
    most = FITTED_ROWS if most is None else most
    if len(labels) <= most:
        return np.arange(len(labels))
    counts_C = np.bincount(labels)
    each = next(k for k in range(1, int(counts_C.max()) + 1) if np.minimum(counts_C, k + 1).sum() > most)
    drawn = np.random.default_rng(0).permutation(len(labels))
    order = drawn[np.argsort(labels[drawn], kind="stable")]  # class after class, in a random order
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts_C) - counts_C, counts_C)
    return np.sort(order[rank < each])


def weights_of(labels: np.ndarray, rows: np.ndarray, weights: str) -> np.ndarray:
    """Weights (n,) of the chosen rows that sum to one, so that classes weigh what they do among all of `labels`."""
    chosen = labels[rows]
    plain = sample_weights(chosen, weights)
    if weights == "balanced" or len(rows) == len(labels):
        return plain
    counts_C, kept_C = (np.bincount(some, minlength=labels.max() + 1) for some in (labels, chosen))
    return counts_C[chosen] / kept_C[chosen] / len(labels)


def align(data: str, model: str, **settings: Any) -> dict[str, Any]:
    """What `posthoc.predictions.align` gives, of a split with more than FITTED_ROWS rows from `fitted_rows` of it.

    Raises ValueError for a reading that needs all logits at once.
    """
    if settings["reading"] not in READINGS_BY_ROW:
        raise ValueError(
            f"align.reading = {settings['reading']!r} needs all logits at once; allowed with large data sets are "
            f"{', '.join(READINGS_BY_ROW)}"
        )
    inference.set_up(0)
    fitted: dict[str, Any] = {}
    epochs = files.read_json(Path(model) / "epochs.json")
    for network in [name for name in NETWORKS if name in epochs]:
        for split, fitted_on in FITTED_ON.items():
            arrays = files.load_arrays(features_for(data, network), f"{split}_images", f"{split}_labels")
            labels = arrays[f"{split}_labels"]
            if not len(labels):
                continue
            rows = fitted_rows(labels)
            weights, features = weights_of(labels, rows, settings["weights"]), arrays.pop(f"{split}_images")
            if len(features) != len(rows):  # else there are no others
                features = features[rows]
            logits = Logits(load(model, network), features)
            corrections, classes = fitted.setdefault(network, {}), logits.shape[1]
            with tempfile.TemporaryDirectory() as folder:
                small = len(logits) * classes <= IN_MEMORY
                kept = logits[:] if small else Stored(logits, Path(folder) / "logits")
                corrections[f"aligned_on_{split}"] = _aligned(kept, labels[rows], weights, fitted_on, settings)
            if split == "train":
                adjustment = _known(posthoc.LogitAdjustment(), classes, fitted_on)
                adjustment._fit(np.empty((0, classes)), labels)
                corrections["logit_adjusted"] = adjustment.to_dict()
    return fitted


def _aligned(
    logits: Any, labels: np.ndarray, weights: np.ndarray, fitted_on: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Energy aligning of the rows, with the energies before and after, as `to_dict` has it."""
    aligning = _known(posthoc.EnergyAligning(**settings), logits.shape[1], fitted_on)
    t, read = float(settings["temperature"]), READINGS[settings["reading"]]
    aligning.energy_ = energy = read(logits, labels, weights, t)
    if settings["reading"] == "equal_shares":
        within = EQUAL_WITHIN / t if isinstance(logits, Stored) else 0.0
        energy = equal_energies(logits, labels, weights, t, np.arange(logits.shape[1]), within)
    aligning.shift_ = float(settings["strength"]) * (energy - energy.mean())
    if isinstance(logits, Stored):
        logits.shift = aligning.shift_
    else:
        logits = logits + aligning.shift_
    after = read(logits, labels, weights, t)
    return aligning.to_dict() | {"energy": aligning.energy_, "energy_after": after}


def _known(correction: Any, classes: int, fitted_on: str) -> Any:
    """A correction before its `_fit`, without masked classes: what `Correction.fit` sets around it."""
    correction.fitted_on_, correction.scale_ = fitted_on, 1.0
    correction.open_, correction.n_features_in_ = np.ones(classes, bool), classes
    return correction


# --------------------------------------------------------------------------------------------------- measures


@dataclass
class Seen:
    """What is kept of each image of one version of the logits (N,), and of each class (C, K)."""

    predictions: list[np.ndarray] = field(default_factory=list)
    in_top: list[np.ndarray] = field(default_factory=list)
    nll: list[np.ndarray] = field(default_factory=list)
    confidence: list[np.ndarray] = field(default_factory=list)
    brier: list[np.ndarray] = field(default_factory=list)
    known_right: list[np.ndarray] = field(default_factory=list)  # (distributions, n) with the prior known
    gap_CK: np.ndarray | float = 0.0  # sum of (is of the class) - p in each bin of p

    def add(self, logits_NC: np.ndarray, labels_N: np.ndarray, priors_PC: np.ndarray, bins: int) -> None:
        """Look at some rows; `priors_PC` are shifts for test priors that are known."""
        predictions_N, _, nll_N, probability_NC = metrics.by_image(logits_NC, labels_N)
        self.predictions.append(predictions_N)
        self.in_top.append(metrics.rank(logits_NC, labels_N) < metrics.TOP)
        self.nll.append(nll_N)
        self.confidence.append(probability_NC.max(1))
        own_N = np.take_along_axis(probability_NC, labels_N[:, None], 1)[:, 0]
        self.brier.append(np.square(probability_NC).sum(1) - 2 * own_N + 1)
        self.known_right.append(np.array([(logits_NC + prior_C).argmax(1) == labels_N for prior_C in priors_PC]))
        classes = logits_NC.shape[1]
        place_NC = metrics.bin_index(probability_NC, bins) + bins * np.arange(classes)
        np.negative(probability_NC, out=probability_NC)
        probability_NC[np.arange(len(labels_N)), labels_N] += 1
        gap = np.bincount(place_NC.ravel(), probability_NC.ravel(), classes * bins)
        self.gap_CK = self.gap_CK + gap.reshape(classes, bins)

    def measures(
        self, labels_N: np.ndarray, counts_C: np.ndarray, *, ece_bins: int, many_above: int, few_below: int
    ) -> dict[str, float]:
        """As `metrics.summarize`."""
        predictions_N, confidence_N = np.concatenate(self.predictions), np.concatenate(self.confidence)
        right_N, bins = predictions_N == labels_N, ece_bins
        found = {"accuracy": float(right_N.mean()), "top5": float(np.concatenate(self.in_top).mean())}
        for name, mask_C in metrics.shot_groups(counts_C, many_above=many_above, few_below=few_below).items():
            chosen_N = mask_C[labels_N]
            found[name] = float(right_N[chosen_N].mean()) if chosen_N.any() else float("nan")
        accuracy_C = metrics.class_accuracy(predictions_N, labels_N, len(counts_C))
        return found | {
            "balanced_error": float(1 - np.nanmean(accuracy_C)),
            "geometric_mean": metrics.geometric_mean(accuracy_C),
            "worst_class": float(np.nanmin(accuracy_C)),
            "macro_f1": metrics.macro_f1(predictions_N, labels_N, len(counts_C)),
            "nll": float(np.concatenate(self.nll).mean()),
            "brier": float(np.concatenate(self.brier).mean()),
            "ece": metrics.ece(confidence_N, right_N, bins=bins),
            "ece_equal_mass": metrics.ece_equal_mass(confidence_N, right_N, bins=bins),
            "mce": metrics.mce(confidence_N, right_N, bins=bins),
            "classwise_ece": float((np.abs(self.gap_CK).sum(1) / len(labels_N)).mean()),
            "aurc": metrics.aurc(confidence_N, right_N),
        }


def evaluate(
    data: str,
    model: str,
    predictions: str,
    alignment: str,
    *,
    ece_bins: int,
    many_above: int,
    few_below: int,
    distribution_ratios: list[int],
    distribution_draws: int,
) -> Evaluated:
    """What `evaluation.evaluate` gives, from features in place of logits."""
    known = files.load_arrays(
        predictions, "class_names", "class_counts", "test_labels", "provenance",
        *(f"{name}_epoch" for name in files.read_json(Path(model) / "epochs.json")),
    )  # fmt: skip
    corrections = files.read_json(alignment)
    labels_N, counts_C = known["test_labels"], known["class_counts"]
    shots = {"many_above": many_above, "few_below": few_below}
    found = Evaluated(measures={"provenance": json.loads(str(known["provenance"]))})
    inference.set_up(0)
    for which, name in NETWORKS.items():
        if f"{which}_epoch" not in known:
            continue
        last = which == "last"
        logits = Logits(load(model, which), files.load_arrays(features_for(data, which), "test_images")["test_images"])
        drawn = Drawn.of(labels_N, counts_C, distribution_ratios if last else None, distribution_draws)
        shifts = _rebalancing(logits, [np.arange(len(labels_N)), *drawn.rows])
        rebalancing = _known(posthoc.PredictionRebalancing(), logits.shape[1], "test")
        rebalancing.shift_ = shifts[0]
        seen: dict[str, Seen] = {}
        anew: list[np.ndarray] = []  # which rows each rebalancing of a draw has right
        member = np.array([np.isin(np.arange(len(labels_N)), rows) for rows in drawn.rows])
        for where, raw_NC in logits.blocks():
            versions = {**corrected(raw_NC, corrections[which]), REBALANCED: rebalancing.transform(raw_NC)}
            for version, values_NC in versions.items():
                priors = drawn.priors if version != REBALANCED else drawn.priors[:0]
                seen.setdefault(version, Seen()).add(values_NC, labels_N[where], priors, ece_bins)
            if last:
                anew.append(_right_anew(raw_NC, labels_N[where], member[:, where], shifts[1:]))
        found.measures[name] = {"epoch": int(known[f"{which}_epoch"])} | {
            version: one.measures(labels_N, counts_C, ece_bins=ece_bins, **shots) for version, one in seen.items()
        }
        if last:
            _by_class_and_image(found, seen, corrections[which], labels_N, counts_C, known["class_names"], ece_bins)
            found.distributions = drawn.rows_of(seen, np.concatenate(anew, 1), labels_N)
    return found


@dataclass
class Drawn:
    """Test sets with other class distributions: their names, images of each class, rows of each draw, known priors.

    Attributes:
        chosen: rows of each draw of each distribution; `rows` has them all, one after the other.
        priors: (P, C) shifts of the logits where each distribution is known.
    """

    names: list[str]
    wanted: list[np.ndarray]
    chosen: list[list[np.ndarray]]
    priors: np.ndarray

    @classmethod
    def of(cls, labels_N: np.ndarray, counts_C: np.ndarray, ratios: Sequence[int] | None, draws: int) -> "Drawn":
        """As `distributions.evaluate` draws them; nothing for None."""
        per_class = int(np.bincount(labels_N, minlength=len(counts_C)).min())
        names = [] if ratios is None else distributions.names(ratios, per_class)
        wanted = [distributions.frequencies(name, counts_C, per_class) for name in names]
        chosen = [
            [distributions.draw(labels_N, wanted_C, seed) for seed in range(1 if name == "uniform" else draws)]
            for name, wanted_C in zip(names, wanted, strict=True)
        ]
        nothing = np.zeros((1, len(counts_C)))
        priors = [posthoc.KnownPrior(wanted_C).fit(nothing).shift_ for wanted_C in wanted]
        return cls(names, wanted, chosen, np.array(priors).reshape(len(names), len(counts_C)))

    @property
    def rows(self) -> list[np.ndarray]:
        return [rows for of_name in self.chosen for rows in of_name]

    def rows_of(self, seen: Mapping[str, Seen], anew: np.ndarray, labels_N: np.ndarray) -> list[dict[str, Any]]:
        """As `distributions.evaluate`; `anew` (draws, N): what is right after a rebalancing of the draw."""
        found, number = [], 0
        known = {name: np.concatenate(one.known_right, 1) for name, one in seen.items() if name != REBALANCED}
        right = {name: np.concatenate(one.predictions) == labels_N for name, one in seen.items()}
        for place, (name, wanted_C, chosen) in enumerate(zip(self.names, self.wanted, self.chosen, strict=True)):
            for version in known:
                found.append(
                    {"distribution": name, "images": int(wanted_C.sum()), "correction": version}
                    | distributions._mean_and_sd("accuracy", [right[version][some].mean() for some in chosen])
                    | distributions._mean_and_sd("known_prior", [known[version][place][some].mean() for some in chosen])
                )
            scores = [anew[number + n][some].mean() for n, some in enumerate(chosen)]
            number += len(chosen)
            row = {"distribution": name, "images": int(wanted_C.sum()), "correction": REBALANCED}
            row |= distributions._mean_and_sd("accuracy", scores)
            found.append(row | {"known_prior": None, "known_prior_sd": None})
        return found


def _rebalancing(logits: Logits, draws: Sequence[np.ndarray]) -> np.ndarray:
    """Shifts (draws, C): what `PredictionRebalancing` fits on the rows of each draw."""
    member = np.zeros((len(draws), len(logits)))
    for number, rows in enumerate(draws):
        member[number, rows] = 1 / len(rows)
    mass = np.zeros((len(draws), logits.shape[1]))
    for where, part in logits.blocks():
        terms = np.exp(part - part.max(1, keepdims=True))
        terms /= terms.sum(1, keepdims=True)
        mass += member[:, where] @ terms
    return -np.log(np.maximum(mass, np.finfo(float).tiny))


def _right_anew(logits_NC: np.ndarray, labels_N: np.ndarray, member: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Which rows (draws, n) are right after the shift of each draw; False for rows that it does not have."""
    found = np.zeros(member.shape, bool)
    for number, shift in enumerate(shifts):
        rows = np.flatnonzero(member[number])
        found[number, rows] = (logits_NC[rows] + shift).argmax(1) == labels_N[rows]
    return found


def _by_class_and_image(
    found: Evaluated,
    seen: Mapping[str, Seen],
    corrections: Mapping[str, Any],
    labels_N: np.ndarray,
    counts_C: np.ndarray,
    names: np.ndarray,
    bins: int,
) -> None:
    """Add what `evaluation.evaluate` says of the last network's classes and images."""
    columns: dict[str, Any] = {}
    for version, one in seen.items():
        predictions_N, confidence_N = np.concatenate(one.predictions), np.concatenate(one.confidence)
        right_N, nll_N = predictions_N == labels_N, np.concatenate(one.nll)
        columns[version] = metrics.class_accuracy(predictions_N, labels_N, len(counts_C))
        errors = metrics.standard_errors(right_N, nll_N, confidence_N, bins=bins)
        found.measures["last"][version]["standard_error"] = errors
        found.reliability += [
            {"correction": version, **row} for row in metrics.reliability(confidence_N, right_N, bins=bins)
        ]
        found.right.append({"correction": version, "images": len(right_N), "right": pack(right_N)})
    columns |= {
        f"energy_{when}_{split}": corrections[f"aligned_on_{split}"][key]
        for split in FITTED_ON if f"aligned_on_{split}" in corrections
        for when, key in (("before", "energy"), ("after", "energy_after"))
    }  # fmt: skip
    found.classes = [
        {
            "class": c,
            "name": str(name),
            "train_images": counts_C[c],
            **{key: column[c] for key, column in columns.items()},
        }
        for c, name in enumerate(names)
    ]
