"""What comes in: logits and labels as numpy or torch have them, checked, and handed back in their kind."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

SLICE = 1 << 19  # logits that are looked at together: they stay in the processor's cache


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
    """`result` as a tensor on the device of `values` where that is one."""
    if is_tensor(values):
        import torch

        return torch.from_numpy(result).to(values.device)
    return result


def check(logits: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Raise ValueError, naming what and where, unless there are finite logits (N, C) and labels (N,) in 0 ... C - 1."""
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits have shape {logits.shape}; expected (samples, classes), neither of them 0")
    if not np.isfinite(logits.sum(dtype=np.float64)):  # the sum is one cheap look; which one it is takes more
        bad = np.argwhere(~np.isfinite(logits))
        if len(bad):
            row, column = bad[0]
            raise ValueError(
                f"{len(bad)} logit(s) are NaN or inf, first at row {row}, class {column}: {logits[row, column]}"
            )
    if labels is not None:
        check_labels(labels, *logits.shape)


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


def log_prior(prior: Prior, classes: int, name: str) -> np.ndarray:
    """log of a prior (C,), which need not sum to one. Raises ValueError, with its `name`, where it is none."""
    if isinstance(prior, str):
        if prior != "uniform":
            raise ValueError(f"{name} = {prior!r}; allowed are 'uniform' and {classes} positive numbers")
        return np.full(classes, -np.log(classes))
    values = as_numpy(prior).astype(np.float64)
    if values.shape != (classes,):
        raise ValueError(f"{name} has shape {values.shape}; expected ({classes},), a number for each class")
    wrong = np.flatnonzero(~((values > 0) & np.isfinite(values)))
    if len(wrong):
        raise ValueError(f"{name} of class {wrong[0]} is {values[wrong[0]]}; allowed are positive numbers")
    return np.log(values / values.sum())


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
