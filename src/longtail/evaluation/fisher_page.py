"""The page of the toy: what the experiments of longtail.evaluation.fisher came to, in Markdown."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

TAUS = [0.0, 1.0, 2.0]  # BalPoE's own, where one set is enough


Row = dict[str, Any]


def listed(taus: Sequence[float]) -> str:
    """The taus as text."""
    return ", ".join(f"{tau:g}" for tau in taus)


def points(value: float, digits: int = 2) -> str:
    """A fraction in points of percent, without a negative zero."""
    return f"{round(100 * value, digits) + 0.0:.{digits}f}"


def mean_and_sd(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation of fractions, in points."""
    return f"{points(float(np.mean(values)))} ± {points(float(np.std(values, ddof=1)))}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table in Markdown; but for the first `words` columns it is of numbers."""
    lines = [header, ["---"] * words + ["---:"] * (len(header) - words), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def furthest(rows: Sequence[Row]) -> str:
    """The largest distance between measured and predicted, in points."""
    return points(max(abs(row["measured"] - row["predicted"]) for row in rows), 3)


def markdown(settings: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The experiments as tables, with a few sentences each that say what is seen."""

    def of(experiment: str) -> list[Row]:
        return [row for row in rows if row["experiment"] == experiment]

    bayes = next(row["predicted"] for row in of("test prior") if row["name"] == "uniform")
    parts = [
        "# Is the balanced product of experts Fisher-consistent?",
        f"{settings['classes']} Gaussian classes in the plane, imbalance factor {settings['imbalance_factor']:g}; the "
        f"balanced error of Bayes' rule is {points(bayes)} %. Excess is balanced error above that, in points, by "
        "quadrature. Predicted is the excess of Bayes' rule for the class prior ~ prior ** strength, without any "
        "training. [docs/fisher.md](../../docs/fisher.md) says how it is made.",
        *_mean_tau_part(of("mean tau")),
        *_scale_part(of("miscalibrated")),
        *_mixup_part(of("mixup")),
        *_prior_part(of("test prior")),
    ]
    return "\n\n".join(parts) + "\n"


def _mean_tau_part(rows: Sequence[Row]) -> list[str]:
    exact, networks = ([row for row in rows if row["experts"] == name] for name in ("quadratic", "networks"))
    balanced, others = ([row for row in exact if (abs(row["strength"]) < 1e-9) is one] for one in (True, False))
    lines = [
        [row["name"], row["experts"], f"{row['mean_tau']:.3g}", points(row["predicted"]), points(row["measured"]),
         points(row["measured"] - row["predicted"])] for row in rows
    ]  # fmt: skip
    seen = [
        f"Quadratic experts with taus that average to one attain Bayes' balanced error, all {len(balanced)} sets "
        f"within {furthest(balanced)} points."
    ]
    if others:
        least = points(min(row["predicted"] for row in others))
        seen.append(f"The other sets miss it by what is predicted, {least} points and more, within {furthest(others)}.")
    seen.append(f"Networks, in all subsets of one training, lie within {furthest(networks)} points of the prediction.")
    return [
        "## The mean of the taus decides",
        " ".join(seen),
        table(["taus", "experts", "mean tau", "predicted", "measured", "difference"], lines, words=2),
        "Quadratic experts can take tau log prior into their constant, so that all sets with the same mean come to the "
        "same rule: the theorem at work, up to the estimation error that is left. Networks are not so tied: each "
        "starts from numbers of its own.",
    ]


def _scale_part(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(row["name"] for row in rows))
    found = {(row["name"], row["scale"]): row for row in rows}
    lines = [
        [f"{scale:g}", *(points(found[name, scale][key]) for name in names for key in ("predicted", "measured"))]
        for scale in dict.fromkeys(row["scale"] for row in rows)
    ]
    return [
        "## Which calibration is needed",
        f"Experts with taus {listed(TAUS)} are made sharper by a factor; the product misses by what is predicted, "
        f"within {furthest(rows)} points. To scale all bare logits alike costs nothing, though no expert is calibrated "
        "then: for the argmax it is enough that experts agree in sharpness. One expert alone draws the product to its "
        "side. To scale training posteriors, which are what the loss sees, logits + tau log prior, leans all experts "
        "alike: strength is 1 - mean tau / factor, to the head where they are too confident, to the tail where they "
        "are not confident enough.",
        table(["factor", *(f"{name}, {key}" for name in names for key in ("predicted", "measured"))], lines),
    ]


def _mixup_part(rows: Sequence[Row]) -> list[str]:
    lines, seen = [], []
    for images in dict.fromkeys(row["images"] for row in rows):
        by_name: dict[str, list[Row]] = {}
        for row in rows:
            if row["images"] == images:
                by_name.setdefault(row["name"], []).append(row)
        for name, same in by_name.items():
            strength, sharpness = (np.mean([row[key] for row in same]) for key in ("strength", "sharpness"))
            lines.append(
                [
                    str(images), name, mean_and_sd([row["ece"] for row in same]),
                    f"{sharpness:.2f}", f"{strength:+.2f}",
                    mean_and_sd([row["measured"] for row in same]),
                    mean_and_sd([prior_part(row) for row in same]),
                    mean_and_sd([row["predicted"] for row in same]),
                ]
            )  # fmt: skip
        (_, without), (name, mixed) = by_name.items()
        measures: dict[str, Callable[[Row], float]] = {
            "ECE": itemgetter("ece"), "excess": itemgetter("measured"), "the prior's part of it": prior_part,
        }  # fmt: skip
        changes = [
            f"{what} {changed([of(b) - of(a) for a, b in zip(without, mixed, strict=True)])}"
            for what, of in measures.items()
        ]
        seen.append(f"With {images} images {name} changes: {', '.join(changes)}.")
    header = ["images", "", "ECE", "sharpness", "strength", "excess", "the prior's part", "predicted of strength"]
    return [
        "## Experts that over-fit, and mixup",
        f"Networks with taus {listed(TAUS)} on few random images, {len({row['seed'] for row in rows})} seeds; points, "
        "mean ± standard deviation. Changes are paired by seed, ± standard error; settled is what is above two of it. "
        + " ".join(seen),
        table(header, lines, words=2),
        "ECE is that of the softmax of bare logits under the expert's own target, mean over the experts. Sharpness a_e "
        "(mean) and strength are fitted: the a_e log p(x|y) + b_e log prior that is nearest to each expert. Sharpness "
        "above 1 is over-confidence, strength above 0 leans to the head. The prior's part of the excess is what goes "
        "away with the best multiple of log prior added to the product; the rest is estimation error, which no prior "
        "mends.",
    ]


def prior_part(row: Row) -> float:
    """What of the excess the best multiple of log prior takes away."""
    return float(row["measured"] - row["at_best_prior"])


def changed(changes: Sequence[float]) -> str:
    """How paired seeds change: mean ± standard error in points, and whether that is more than twice the error."""
    mean, error = float(np.mean(changes)), float(np.std(changes, ddof=1)) / len(changes) ** 0.5
    return (
        f"{'+' if mean > 0 else ''}{points(mean)} ± {points(error)}{'' if abs(mean) > 2 * error else ' (not settled)'}"
    )


def _prior_part(rows: Sequence[Row]) -> list[str]:
    versions = list(dict.fromkeys(row["experts"] for row in rows))
    found = {(row["name"], row["experts"]): row for row in rows}
    lines = [
        [name, points(found[name, versions[0]]["predicted"])]
        + [points(found[name, version]["measured"]) for version in versions]
        for name in dict.fromkeys(row["name"] for row in rows)
    ]
    known = [row for row in rows if row["experts"] == "prior known"]
    return [
        "## Other test priors",
        f"Error in percent under each test prior. The product with taus {listed(TAUS)} plus log test prior attains "
        f"Bayes' rule for that prior within {furthest(known)} points; cross-entropy is the expert with tau 0.",
        table(["test prior", "Bayes", *versions], lines),
    ]
