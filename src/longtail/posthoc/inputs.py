"""What comes in: logits and labels as numpy or torch have them, checked, and handed back in their kind.

A class is *masked* where its logit is MASKED or lower, and GAP or more below the highest, in every sample: -inf, -1e9
and the lowest number of a type are what people write there (-1e4 is -9984 in bfloat16). To every correction it is as if
its column were not there, and its logits stay as they are.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

SLICE = 1 << 19  # logits that are looked at together: they stay in the processor's cache
MASKED, GAP = -9e3, 1e3
LOST = -1e8  # a single logit like this is masked as well: next to it float32 does not see the others
LOWEST = -1e30  # in place of what is lower, -inf included: no sum or product with it is NaN
ONE = 5e-3  # rows of probabilities, in bfloat16 as well, sum to 1 within this


Prior = Literal["uniform"] | Sequence[float] | np.ndarray


def is_tensor(values: Any) -> bool:
    """Whether it is torch's, without importing torch."""
    return any(kind.__module__.split(".")[0] == "torch" for kind in type(values).__mro__)


def as_numpy(values: Any) -> np.ndarray:
    """A numpy view of an array or a tensor; a copy where there is none (a GPU, bfloat16)."""
    if is_tensor(values):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() and values.element_size() < 4 else values
        return np.asarray(values.numpy())
    return np.asarray(values)


def like(result: np.ndarray, values: Any) -> Any:
    """`result` as a tensor on the device of `values` where that is one, and in half precision where that is."""
    if is_tensor(values):
        import torch

        tensor = torch.from_numpy(result).to(values.device)
        half = values.is_floating_point() and values.element_size() < 4 and tensor.is_floating_point()
        return tensor.to(values.dtype) if half else tensor
    half = getattr(values, "dtype", None) == np.float16 and result.dtype.kind == "f"
    return result.astype(np.float16) if half else result


def written_to(out: Any, dtype: np.dtype) -> np.ndarray | None:
    """A numpy view of an array or a tensor; None where it has another type than `dtype`, or is on a GPU."""
    if is_tensor(out) and (out.device.type != "cpu" or str(out.dtype) != f"torch.{dtype}"):
        return None
    return as_numpy(out) if is_tensor(out) or out.dtype == dtype else None


def check(logits: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Raise ValueError, naming what and where, unless there are logits (N, C) and labels (N,) in 0 ... C - 1.

    Logits are finite, or -inf where a class is masked; a sample has one at least that is not.
    """
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits have shape {logits.shape}; expected (samples, classes), neither of them 0")
    if logits.dtype.kind not in "fiu":
        raise ValueError(f"logits are {logits.dtype}, not numbers")
    low, high = logits.min(), logits.max()  # two cheap looks; which one it is takes more
    if not np.isfinite(high) or np.isnan(low):
        bad = np.argwhere(np.isnan(logits) | (logits == np.inf))
        if len(bad):
            row, column = bad[0]
            raise ValueError(
                f"{len(bad)} logit(s) are NaN or inf, first at row {row}, class {column}: {logits[row, column]}"
            )
    if not np.isfinite(low):
        without = np.flatnonzero(logits.max(1) == -np.inf)
        if len(without):
            raise ValueError(f"{len(without)} sample(s) have no class that is not masked, first row {without[0]}")
    if labels is not None:
        check_labels(labels, *logits.shape)


def open_classes(logits: np.ndarray) -> np.ndarray:
    """Which classes (C,) are not masked; see the head of this file."""
    if not logits.min() <= MASKED:
        return np.ones(logits.shape[1], dtype=bool)
    masked = np.ones(logits.shape[1], dtype=bool)
    for _, part in slices(logits):
        far = part <= part.max(1, keepdims=True) - part.dtype.type(GAP)
        masked &= ((part <= MASKED) & far).all(0)
    return ~masked


def without_masked(logits: np.ndarray, labels: Any, open_C: np.ndarray) -> tuple[np.ndarray, Any]:
    """Logits and labels as if the classes that are not among `open_C` were not there; the same arrays where all are.

    Raises ValueError for a label that is masked in its sample.
    """
    if labels is not None:
        own = logits[np.arange(len(labels)), labels]
        wrong = np.flatnonzero(~open_C[labels] | (own < LOST))
        if len(wrong):
            row = wrong[0]
            raise ValueError(
                f"label {labels[row]} in row {row} is a class that is masked there: its logit is {own[row]}"
            )
    if not open_C.all():
        logits = np.ascontiguousarray(logits[:, open_C])  # else its sums have another order
        labels = None if labels is None else (np.cumsum(open_C) - 1)[labels]
    if logits.min() < LOWEST:
        logits = np.maximum(logits, logits.dtype.type(LOWEST))
    return logits, labels


def warn_of_probabilities(logits: np.ndarray, name: str = "these logits") -> None:
    """Warn where the first rows are probabilities: not negative, and they sum to 1."""
    first = logits[: max(1, SLICE // logits.shape[1])]
    if first.min() >= 0 and (abs(first.sum(1, dtype=np.float64) - 1) <= ONE).all() and logits.shape[1] > 1:
        warnings.warn(
            f"{name} are probabilities (no number is negative, and each row sums to 1), not logits: corrections are of "
            "logits; take their logarithms, np.log(p)",
            stacklevel=4,
        )


def check_labels(labels: np.ndarray, samples: int, classes: int) -> None:
    """Raise ValueError unless labels are (N,) whole numbers in 0 ... C - 1."""
    if labels.shape != (samples,):
        raise ValueError(f"labels have shape {labels.shape}; expected ({samples},) as logits have that many rows")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}, not all whole numbers; allowed are 0 to {classes - 1}")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        row = outside[0]
        raise ValueError(f"label {labels[row]} in row {row}; allowed are 0 to {classes - 1}")


def as_labels(values: Any) -> np.ndarray:
    """As `as_numpy`; whole numbers that were read as floats, from a CSV file say, are whole numbers."""
    labels = as_numpy(values)
    if labels.dtype.kind == "f" and np.all(labels == np.floor(labels)) and np.isfinite(labels).all():
        return labels.astype(np.int64)
    return labels


def log_prior(prior: Prior, open_C: np.ndarray, name: str) -> np.ndarray:
    """log of a prior (C,), which need not sum to one, of the classes that are open.

    Raises ValueError, with its `name`, where it is none.
    """
    classes = len(open_C)
    if isinstance(prior, str):
        if prior != "uniform":
            raise ValueError(f"{name} = {prior!r}; allowed are 'uniform' and {classes} positive numbers")
        return np.full(open_C.sum(), -np.log(open_C.sum()))
    values = numbers(name, prior)
    if values.shape != (classes,):
        raise ValueError(f"{name} has shape {values.shape}; expected ({classes},), a number for each class")
    wrong = np.flatnonzero(open_C & ~((values > 0) & np.isfinite(values)))
    if len(wrong):
        raise ValueError(f"{name} of class {wrong[0]} is {values[wrong[0]]}; allowed are positive numbers")
    values = values[open_C]
    return np.log(values / values.sum())


def numbers(name: str, value: Any) -> np.ndarray:
    """A setting as an array of float64. Raises ValueError, with its `name`, where it is none."""
    try:
        found = as_numpy(value)
        if found.dtype.kind not in "fiu":
            raise TypeError
        return found.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {value!r}; allowed are numbers") from None


def number(name: str, value: Any, *, above: float = -np.inf, least: float = -np.inf) -> float:
    """A setting as a finite number. Raises ValueError, with its `name` and what is allowed, where it is none."""
    allowed = f"numbers above {above:g}" if above > -np.inf else f"numbers from {least:g} on" if least > -np.inf else ""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if real and np.isfinite(value) and value > above and value >= least:
        return float(value)
    raise ValueError(f"{name} = {value!r}; allowed are {allowed or 'finite numbers'}")


def flag(name: str, value: Any) -> bool:
    """A setting that is True or False. Raises ValueError, with its `name`, for anything else: the word 'false', say."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ValueError(f"{name} = {value!r}; allowed are True and False")


def counts_of(labels: np.ndarray, classes: int, why: str) -> np.ndarray:
    """Samples of each class (C,). Raises ValueError for a class that has none."""
    counts = np.bincount(labels, minlength=classes)
    missing = np.flatnonzero(counts == 0)
    if len(missing):
        raise ValueError(f"{why} needs a sample of every class; {len(missing)} have none, first class {missing[0]}")
    return counts


def slices(logits: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Some rows at a time, in float32 or float64."""
    rows = max(1, SLICE // logits.shape[1])
    for first in range(0, len(logits), rows):
        where = slice(first, first + rows)
        part = logits[where]
        yield where, part if part.dtype in (np.float32, np.float64) else part.astype(np.float64)
