"""Arrays of numbers in files of any kind, a slice of rows at a time: .npy, .npz, .csv, .parquet.

What is larger than memory stays on the disk: an .npy file is mapped, the others are copied into one first, next to
the system's temporary files. Tables of several columns become float32.
"""

import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

KINDS = (".npy", ".npz", ".csv", ".parquet")
ROWS = 4096  # of a table at a time
BYTES = 1 << 24  # of an archive at a time


def kind_of(path: Path) -> str:
    """The file's kind. Raises ValueError, naming those there are, for another."""
    if path.suffix not in KINDS:
        raise ValueError(f"{path}: unknown kind {path.suffix!r}; allowed are {', '.join(KINDS)}")
    return path.suffix


@contextmanager
def opened(path: str | Path, *, array: str | None = None) -> Iterator[np.ndarray]:
    """The array (N, C), or (N,) for one column, of a file, mapped into memory.

    Args:
        array: which one of an .npz file, where it holds several.

    Raises ValueError, naming file and line or column, for what is no array of numbers, FileNotFoundError without a
    file.
    """
    path = Path(path)
    kind = kind_of(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with tempfile.TemporaryDirectory(prefix="longtail-") as folder:
        mapped = Path(folder) / "array.npy"
        try:
            if kind == ".npy":
                mapped = path
            elif kind == ".npz":
                _unpack(path, array, mapped)
            else:
                _collect(path, _csv(path) if kind == ".csv" else _parquet(path), mapped)
            values = np.load(mapped, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error
        if values.dtype.kind not in "fiu":
            raise ValueError(f"{path}: holds {values.dtype}, not numbers")
        yield values


def _unpack(path: Path, array: str | None, target: Path) -> None:
    """Copy one member of an .npz file, which is an .npy file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if array is None and len(names) > 1:
                raise ValueError(f"{path} has the arrays {', '.join(names)}; say which as {path}:NAME")
            name = array or names[0]
            if name not in names:
                raise ValueError(f"{path} has no array {name!r}; it has {', '.join(names)}")
            with archive.open(f"{name}.npy") as member, target.open("wb") as file:
                while part := member.read(BYTES):
                    file.write(part)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not an .npz file ({error})") from error


def _collect(path: Path, parts: Iterable[np.ndarray], target: Path) -> None:
    """Write blocks of rows one after the other, then say how many there are."""
    rows, shape, dtype = 0, (), np.dtype(np.float32)
    body = target.with_suffix(".body")
    with body.open("wb") as file:
        for part in parts:
            rows, shape, dtype = rows + len(part), part.shape[1:], part.dtype
            part.tofile(file)
    if not rows:
        raise ValueError(f"{path}: no rows")
    with target.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, *shape)}
        np.lib.format.write_array_header_2_0(file, header)
        with body.open("rb") as source:
            while block := source.read(BYTES):
                file.write(block)
    body.unlink()


def _csv(path: Path) -> Iterator[np.ndarray]:
    """Blocks of a CSV file of numbers; a first line that holds none is a header."""
    import pyarrow
    from pyarrow import csv

    with path.open(encoding="utf-8") as file:
        first = file.readline().strip().split(",")
    headed = not any(_is_number(text) for text in first)
    names = [f"column {number}" for number in range(1, len(first) + 1)]
    kind = pyarrow.float64() if len(names) == 1 else pyarrow.float32()  # whole numbers up to 2^53 stay whole
    try:
        with csv.open_csv(
            path,
            csv.ReadOptions(column_names=names, skip_rows=int(headed), block_size=BYTES),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, kind), null_values=["", "nan", "NaN"]),
        ) as batches:
            for batch in batches:
                yield _block(batch)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a CSV file of numbers ({error})") from error


def _parquet(path: Path) -> Iterator[np.ndarray]:
    """Blocks of a Parquet file: a column a class, or one column of lists."""
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=ROWS):
            yield _block(batch)
    except (pyarrow.ArrowException, TypeError) as error:
        raise ValueError(f"{path}: not a Parquet file of numbers ({error})") from error


def _block(batch: Any) -> np.ndarray:
    """A batch of columns as rows: (N,) of one column of numbers, else (N, C) in float32."""
    columns = [column.to_numpy(zero_copy_only=False) for column in batch.columns]
    if len(columns) > 1:
        return np.stack(columns, axis=1).astype(np.float32)
    return np.stack(columns[0]).astype(np.float32) if columns[0].dtype == object else np.asarray(columns[0])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextmanager
def written(path: str | Path, shape: tuple[int, int], dtype: Any) -> Iterator[Callable[[np.ndarray], Any]]:
    """A function that appends rows to a file, which is there when all of them are."""
    path = Path(path)
    kind = kind_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / f"part{kind}"
        with part.open("wb") as file, _writer(kind, file, shape, np.dtype(dtype)) as write:
            yield write
        part.replace(path)


@contextmanager
def _writer(
    kind: str, file: IO[bytes], shape: tuple[int, int], dtype: np.dtype
) -> Iterator[Callable[[np.ndarray], Any]]:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    names = [f"class_{number}" for number in range(shape[1])]
    if kind == ".npy":
        np.lib.format.write_array_header_2_0(file, header)
        yield lambda rows: file.write(rows.astype(dtype).tobytes())
    elif kind == ".npz":
        archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        with archive, archive.open("logits.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_2_0(member, header)
            yield lambda rows: member.write(rows.astype(dtype).tobytes())
    elif kind == ".csv":
        file.write((",".join(names) + "\n").encode())
        yield lambda rows: np.savetxt(file, rows, fmt="%.9g", delimiter=",")
    else:
        import pyarrow
        from pyarrow import parquet

        schema = pyarrow.schema([(name, pyarrow.from_numpy_dtype(dtype)) for name in names])
        with parquet.ParquetWriter(file, schema) as writer:
            yield lambda rows: writer.write_table(
                pyarrow.table([rows[:, i].astype(dtype) for i in range(shape[1])], schema=schema)
            )
