"""Files that are either whole or not there, and whose bytes depend on their content alone.

Everything is written to a temporary file in the same folder and moved into place, so that an interrupted
stage leaves nothing half-written. Text has sorted keys, six decimals and no dates, so that the same results
give the same bytes and DVC stops a chain whose inputs did not change.
"""

import csv
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DECIMALS = 6


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write `data` to `path` atomically, making its folder where there is none; return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would follow the file into git and shared folders
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def check_target(path: str | Path) -> Path:
    """The path, where a file can be written to it: asked before the work, not after it.

    Raises ValueError where it is a folder, a device or a pipe, or its folder is none.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; expected the name of a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no regular file, and would be replaced by one")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{path}: {above} is no folder")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{path}: {above} cannot be written to")
    return path


def said(error: OSError) -> str:
    """What the system says of a file, the file first."""
    return f"{error.filename}: {error.strerror}" if error.filename is not None and error.strerror else str(error)


PICKLED = {  # what libraries say of such a file, with how to open it all the same: what is said here
    r"Weights only load failed.*\.html\.?": "it holds more than plain weights, which is not read",
    r"Object arrays cannot be loaded when allow_pickle=False": "it holds objects, which are not read",
    r"If you trust the file you can load it unsafely.*?`pickle\.load\(\)`\.": "It is not read.",
}


def without_advice(text: str) -> str:
    """An error's text without a library's advice to open a file with pickle's power, which runs whatever is in it."""
    for advice, said_here in PICKLED.items():
        text = re.sub(advice, said_here, text, flags=re.DOTALL)
    return text


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_bytes(path, text.encode())


def rounded(value: Any) -> Any:
    """`value` as plain Python, floats at six decimals and NaN as None, containers included."""
    if isinstance(value, Mapping):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, np.ndarray):
        return rounded(value.tolist())
    if isinstance(value, np.generic):
        return rounded(value.item())
    if isinstance(value, float):
        if np.isnan(value):
            return None
        return round(value, DECIMALS) + 0.0  # no negative zero
    return value


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON with sorted keys and six decimals.

    Raises ValueError for an infinite number: JSON has none.
    """
    text = json.dumps(rounded(value), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    return write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; a ValueError names the file when it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested without end
        raise ValueError(f"{path}: not a JSON file ({error})") from error


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Path:
    """Write rows with the given columns, in that order; None and NaN become empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if value is None else value for key, value in rounded(row).items()})
    return write_text(path, text.getvalue())


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """Rows of a CSV file as dictionaries of text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Member(zipfile.ZipInfo):
    """An array's place in a .npz: of 1980, so that the same arrays give the same bytes, under any Python."""

    def __init__(self, array: str):
        super().__init__(f"{array}.npy")

    def FileHeader(self, zip64: bool | None = None) -> bytes:  # noqa: N802 (zipfile's name)
        """As Python has it since 3.11.4: before, a header for large members held their sizes twice."""
        if not zip64:
            return super().FileHeader(zip64)
        self.create_version = self.extract_version = zipfile.ZIP64_VERSION
        header = super().FileHeader(zip64)
        return header[:18] + b"\xff" * 8 + header[26:]  # both sizes are in the field for large ones


def save_arrays(path: str | Path, **arrays: np.ndarray) -> Path:
    """Write arrays to one uncompressed .npz, as numpy.savez: the same arrays give the same bytes.

    Raises ValueError for an array of objects.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(Member(name), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
    return write_bytes(path, buffer.getvalue())


def save_arrays_by_part(
    path: str | Path, parts: Mapping[str, tuple[tuple[int, ...], Iterable[np.ndarray]]], **arrays: np.ndarray
) -> Path:
    """As `save_arrays`, with float32 arrays of known shapes whose rows come a part at a time and are never all there.

    Raises ValueError where the parts have not the rows of the shape.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with zipfile.ZipFile(partial, "w", allowZip64=True) as archive:
            for name, (shape, rows) in parts.items():
                with archive.open(Member(name), "w", force_zip64=True) as file:
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    count = 0
                    for part in rows:
                        file.write(np.ascontiguousarray(part, "<f4").tobytes())
                        count += len(part)
                if count != shape[0]:
                    raise ValueError(f"{path}: {name} has {count} rows, not {shape[0]}")
            for name, array in arrays.items():
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=False)
                archive.writestr(Member(name), buffer.getvalue())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


def load_arrays(path: str | Path, *names: str) -> dict[str, np.ndarray]:
    """Read the named arrays (all of them when none is named) from a .npz file.

    Raises ValueError naming the file when it is no .npz or lacks one of the arrays; FileNotFoundError when
    there is no such file. Pickled objects are refused.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = sorted(set(names) - set(archive.files))
            if missing:
                raise ValueError(
                    f"{path}: no array {', '.join(map(repr, missing))}; it has {', '.join(sorted(archive.files))}"
                )
            return {name: archive[name] for name in names or archive.files}
    except FileNotFoundError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: not a readable .npz file of plain arrays ({error})") from error
