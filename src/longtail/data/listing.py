"""One's own data as rows: a folder of class folders, or a table (CSV, Parquet) of paths and labels.

Either is a local path, or a URL of any file system that fsspec has (s3://, gs://, https://, memory://, file://).
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow.csv
import pyarrow.parquet

SPLITS = ("train", "test")
TABLES = (".csv", ".parquet")
COLUMNS = ("label", "group", "split")
NO_IMAGES = (  # what may lie beside class folders; anything else there might be meant as an image
    ".csv", ".tsv", ".txt", ".md", ".rst", ".json", ".jsonl", ".yaml", ".yml", ".xml", ".html", ".pdf", ".db", ".ini",
    ".log", ".py", ".sh", ".parquet", ".npy", ".npz", ".zip", ".tar", ".gz", ".tgz", "readme", "license",
)  # fmt: skip


@dataclass(frozen=True)
class Remote:
    """A file or folder behind fsspec: as much of pathlib's interface as is used of local ones.

    Args:
        system: fsspec's file system.
        path: its name for it.
    """

    system: Any
    path: str

    def __truediv__(self, inner: str) -> "Remote":
        return Remote(self.system, f"{self.path.rstrip('/')}/{inner}")

    def __str__(self) -> str:
        found: str = self.system.unstrip_protocol(self.path)
        return found

    @property
    def parent(self) -> "Remote":
        return Remote(self.system, self.path.rpartition("/")[0])

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    def exists(self) -> bool:
        return bool(self.system.exists(self.path))

    def is_dir(self) -> bool:
        return bool(self.system.isdir(self.path))

    def is_file(self) -> bool:
        return bool(self.system.isfile(self.path))

    def open(self, mode: str = "rb") -> Any:
        return self.system.open(self.path, mode)

    def read_bytes(self) -> bytes:
        found: bytes = self.system.cat_file(self.path)
        return found


Place = Path | Remote


def place(path: str | Path) -> Place:
    """A local path, `~` expanded, or what a URL names. Raises ValueError for a URL that fsspec cannot open."""
    if not is_url(path):
        return Path(path).expanduser()
    import fsspec  # half a second that local files do without

    try:
        return Remote(*fsspec.core.url_to_fs(str(path)))
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path}: fsspec cannot open it ({error})") from error


def is_url(path: str | Path) -> bool:
    """Whether it has a protocol in front."""
    return "://" in str(path)


def files_under(folder: Place) -> list[str]:
    """All files below a folder, hidden ones left out, relative to it; links to folders are followed.

    Raises ValueError naming a link to nothing, to a folder that it lies in, or a name that is not UTF-8, and
    PermissionError for a folder that cannot be read.
    """
    if isinstance(folder, Path):
        found = [*_walked(folder, "", [])]
    else:
        found = [name.removeprefix(f"{folder.path.rstrip('/')}/") for name in folder.system.find(folder.path)]
    return [name for name in found if not any(part.startswith(".") for part in name.split("/"))]


def _walked(folder: Path, inside: str, above: list[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"{folder}: a link to a folder that it lies in")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if not entry.name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in entry.name):
            raise ValueError(f"{str(folder)!r}: the name {entry.name!r} is not UTF-8; rename it")
        try:
            is_folder = entry.is_dir()
        except OSError as error:  # too many levels: a link to itself
            raise ValueError(f"{entry.path}: a link that leads nowhere ({error.strerror})") from error
        if is_folder:
            yield from _walked(Path(entry.path), f"{inside}{entry.name}/", [*above, real])
        elif entry.is_file():
            yield f"{inside}{entry.name}"
        elif entry.is_symlink():
            raise ValueError(f"{entry.path}: a link to nothing ({os.readlink(entry.path)}); fetch it or take it away")


@dataclass(frozen=True)
class Row:
    """One sample: its label by name; what it must not be parted from; its split, where that is given.

    `place` is its file relative to the folder or table, or its number in a table without files.
    """

    place: str
    label: str
    group: str | None = None
    split: str | None = None


def read(path: str | Path) -> tuple[Place, list[Row]]:
    """The folder that places are relative to, and the rows, sorted by place.

    A folder has a folder for each class; or `train` and `test`, and those in each. Hidden files are left out, and
    tables, texts and archives beside class folders; any other file there is an error. A table
    has the columns `path` and `label`, and may have `group` and `split` (train or test).

    Raises ValueError, naming the place, for anything else, and FileNotFoundError for a path that is not there.
    """
    at = place(path)
    if not at.exists():
        raise FileNotFoundError(f"{at}: no such folder or table")
    if at.is_dir():
        return at, _folder(at)
    columns = table(at)
    if "path" not in columns:
        raise ValueError(f"{at}: no column path; it has {', '.join(columns)}")
    places = [_text(value, at, number, "path") for number, value in enumerate(columns["path"], 1)]
    found = rows(places, columns, at)
    if twice := _twice(row.place for row in found):
        raise ValueError(f"{at}: {twice} is there twice")
    return at.parent, sorted(found, key=lambda row: row.place)


def table(path: Place) -> dict[str, list[Any]]:
    """The columns of a CSV or Parquet file. Raises ValueError naming a file that is neither."""
    readers = {".csv": _csv, ".parquet": pyarrow.parquet.read_table}
    if path.suffix not in readers:
        raise ValueError(f"{path}: allowed are a folder of class folders, and tables: {', '.join(TABLES)}")
    try:
        file: IO[bytes]
        with path.open("rb") as file:
            columns: dict[str, list[Any]] = readers[path.suffix](file).to_pydict()
    except Exception as error:
        raise ValueError(f"{path}: not readable as {path.suffix} ({error})") from error
    return columns


def _csv(file: IO[bytes]) -> pyarrow.Table:
    """Names are text whatever they look like: 01 and 1 are two."""
    names = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(("path", "label", "group", "split"), pyarrow.string())
    )
    found = pyarrow.csv.read_csv(file, convert_options=names)
    if "group" in found.column_names:  # a name may be NA; as a group it is how programs write that there is none
        values = found["group"].to_pylist()
        known = [None if value in names.null_values else value for value in values]
        column = found.column_names.index("group")
        found = found.set_column(column, "group", pyarrow.array(known, pyarrow.string()))
    return found


def rows(places: list[str], columns: dict[str, list[Any]], path: Place) -> list[Row]:
    """Rows of the columns label, group and split of a table; ValueError naming a line without a label, or a split that
    is neither train nor test."""
    if "label" not in columns:
        raise ValueError(f"{path}: no column label; it has {', '.join(columns)}")
    found = []
    for number, place in enumerate(places, 1):
        label, group, split = (columns[name][number - 1] if name in columns else None for name in COLUMNS)
        if split not in SPLITS and not (split is None and "split" not in columns):
            raise ValueError(f"{path}: row {number} has the split {split!r}; allowed are train, test")
        group = None if group is None or str(group) == "" else str(group)
        found.append(Row(place, _text(label, path, number, "label"), group, split))
    return found


def _text(value: Any, path: Place, number: int, column: str) -> str:
    if value is None or str(value) == "":
        raise ValueError(f"{path}: row {number} has no {column}")
    return str(value)


def _folder(path: Place) -> list[Row]:
    names = files_under(path)
    if loose := [name for name in names if "/" not in name and not name.lower().endswith(NO_IMAGES)]:
        raise ValueError(f"{path}: {loose[0]} is in no class folder; expected <class>/{loose[0]}")
    names = [name for name in names if "/" in name]
    inner = sorted({name.split("/")[0] for name in names})
    split = set(inner) == set(SPLITS)
    if "train" in inner and not split:
        raise ValueError(f"{path}: folders {', '.join(inner)}; allowed are train and test, or a folder a class")
    found = []
    for name in names:
        parts = name.split("/")
        if split and len(parts) == 2:
            if not name.lower().endswith(NO_IMAGES):
                raise ValueError(f"{path}: {name} is in no class folder; expected {parts[0]}/<class>/{parts[1]}")
        elif split:
            found.append(Row(name, parts[1], None, parts[0]))
        else:
            found.append(Row(name, parts[0], None, None))
    if not found:
        raise ValueError(f"{path}: no files in class folders there")
    return sorted(found, key=lambda row: row.place)


def _twice(values: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
