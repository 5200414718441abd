"""One's own data as rows: a folder of class folders, or a table (CSV, Parquet) of paths and labels."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet

SPLITS = ("train", "test")
TABLES = (".csv", ".parquet")
COLUMNS = ("label", "group", "split")


@dataclass(frozen=True)
class Row:
    """One sample: its label by name; what it must not be parted from; its split, where that is given.

    `place` is its file relative to the folder or table, or its number in a table without files.
    """

    place: str
    label: str
    group: str | None = None
    split: str | None = None


def read(path: str | Path) -> tuple[Path, list[Row]]:
    """The folder that places are relative to, and the rows, sorted by place.

    A folder has a folder for each class; or `train` and `test`, and those in each. Hidden files are left out. A table
    has the columns `path` and `label`, and may have `group` and `split` (train or test).

    Raises ValueError, naming the place, for anything else, and FileNotFoundError for a path that is not there.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder or table")
    if path.is_dir():
        return path, _folder(path)
    columns = table(path)
    if "path" not in columns:
        raise ValueError(f"{path}: no column path; it has {', '.join(columns)}")
    places = [_text(value, path, number, "path") for number, value in enumerate(columns["path"], 1)]
    found = rows(places, columns, path)
    if twice := _twice(row.place for row in found):
        raise ValueError(f"{path}: {twice} is there twice")
    return path.parent, sorted(found, key=lambda row: row.place)


def table(path: Path) -> dict[str, list[Any]]:
    """The columns of a CSV or Parquet file. Raises ValueError naming a file that is neither."""
    readers = {".csv": pyarrow.csv.read_csv, ".parquet": pyarrow.parquet.read_table}
    if path.suffix not in readers:
        raise ValueError(f"{path}: allowed are a folder of class folders, and tables: {', '.join(TABLES)}")
    try:
        columns: dict[str, list[Any]] = readers[path.suffix](path).to_pydict()
    except Exception as error:
        raise ValueError(f"{path}: not readable as {path.suffix} ({error})") from error
    return columns


def rows(places: list[str], columns: dict[str, list[Any]], path: Path) -> list[Row]:
    """Rows of the columns label, group and split of a table; ValueError naming a line without a label, or a split that
    is neither train nor test."""
    if "label" not in columns:
        raise ValueError(f"{path}: no column label; it has {', '.join(columns)}")
    found = []
    for number, place in enumerate(places, 1):
        label, group, split = (columns[name][number - 1] if name in columns else None for name in COLUMNS)
        if split not in SPLITS and not (split is None and "split" not in columns):
            raise ValueError(f"{path}: row {number} has the split {split!r}; allowed are train, test")
        found.append(Row(place, _text(label, path, number, "label"), None if group is None else str(group), split))
    return found


def _text(value: Any, path: Path, number: int, column: str) -> str:
    if value is None or str(value) == "":
        raise ValueError(f"{path}: row {number} has no {column}")
    return str(value)


def _folder(path: Path) -> list[Row]:
    inner = _folders(path)
    split = set(inner) == set(SPLITS)
    if "train" in inner and not split:
        raise ValueError(f"{path}: folders {', '.join(inner)}; allowed are train and test, or a folder a class")
    found: list[Row] = []
    for part in SPLITS if split else (".",):
        for label in _folders(path / part):
            found += [
                Row(file.relative_to(path).as_posix(), label, None, part if split else None)
                for file in (path / part / label).rglob("*")
                if file.is_file() and not any(name.startswith(".") for name in file.relative_to(path).parts)
            ]
    if not found:
        raise ValueError(f"{path}: no files in class folders there")
    return sorted(found, key=lambda row: row.place)


def _folders(path: Path) -> list[str]:
    return sorted(inner.name for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith("."))


def _twice(values: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
