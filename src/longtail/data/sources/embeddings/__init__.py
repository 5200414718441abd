"""Features that somebody already has: a table of labels, and a row of numbers for each of its lines.

The table is CSV or Parquet with the column `label`, and may have `group` and `split`. The features are an .npy file
beside it, (N, D), or the Parquet's own column `features`, a list of D numbers each.
"""

import io
from pathlib import Path
from typing import Literal

import numpy as np

from longtail.data import listing, own
from longtail.workflow.ranges import Count, Fraction, Seed, Sha256


def look(labels: str | Path, features: str | Path | None) -> tuple[list[listing.Row], np.ndarray, str]:
    """Rows, features (N, D) float32, and the SHA-256 of both.

    Raises ValueError naming the file that is missing, has other rows or another shape, or a number that is not finite.
    """
    path = listing.place(labels)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table")
    columns = listing.table(path)
    if features is None:
        if "features" not in columns:
            raise ValueError(f"{path}: no column features; it has {', '.join(columns)}. Name an .npy file")
        lengths = {len(row) if isinstance(row, list) else 0 for row in columns["features"]}
        if len(lengths) != 1 or lengths == {0}:
            raise ValueError(f"{path}: rows of features have the lengths {', '.join(map(str, sorted(lengths)))}")
        try:
            values = np.array(columns["features"], np.float32)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: features are no numbers ({error})") from error
    else:
        file = listing.place(features)
        try:
            values = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python: EOFError, TokenError, RecursionError, ...
            raise ValueError(f"{file}: not a readable .npy file ({error})") from error
        if not isinstance(values, np.ndarray):
            raise ValueError(f"{file}: an archive of arrays; allowed is an .npy file")
    rows = listing.rows([f"{n:09}" for n in range(len(next(iter(columns.values()))))], columns, path)
    source = path if features is None else features
    if values.ndim != 2 or values.dtype.kind != "f" or len(values) != len(rows):
        raise ValueError(
            f"{source}: features: {values.dtype} of shape {values.shape}; allowed are numbers ({len(rows)}, D)"
        )
    with np.errstate(over="ignore"):  # what is too large for float32 is not finite in it
        values = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(values).all():
        row = np.flatnonzero(~np.isfinite(values).all(1))[0]
        raise ValueError(f"{source}: features: row {row} is not finite in float32")
    return rows, values, own.digest(rows, [value.tobytes() for value in values])


def read(
    folder: str | Path,
    *,
    labels: str,
    features: str | None = None,
    sha256: Sha256,
    duplicates: Literal["refuse", "leave_out", "report"],
    min_per_class: Count,
    test_per_class: Count,
    test_share: Fraction,
    seed: Seed,
) -> dict[str, np.ndarray]:
    """Read features; in place of images stand arrays (N, 1, 1, D) float32. `folder` is not used.

    Args:
        labels: the table. features: the .npy file; without it the table's own column.
        the others: as in the reader `images`.

    Raises ValueError as `look` and `own.arrays` do.
    """
    rows, values, found = look(labels, features)
    own.check_digest(found, sha256, labels)
    arrays, report = own.arrays(
        rows, values[:, None, None, :], test_per_class=test_per_class, test_share=test_share,
        min_per_class=min_per_class, duplicates=duplicates, seed=seed,
    )  # fmt: skip
    for name, count in report["classes_left_out"].items():
        print(f"left out: class {name!r}, which has {count} rows, fewer than min_per_class")
    return arrays
