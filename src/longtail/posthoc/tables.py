"""Arrays of numbers in files of any kind, a slice of rows at a time: .npy, .npz, .csv, .parquet.

What is larger than memory stays on the disk: an .npy file is mapped, the others are copied into one first, next to
the system's temporary files. Tables of several columns become float32.
"""

import csv
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from longtail.workflow import files

KINDS = (".npy", ".npz", ".csv", ".parquet")
ROWS = 4096  # of a table at a time
BYTES = 1 << 24  # of an archive at a time
LINE = 1 << 22  # characters: a longer first line of a CSV file is no row of classes
LOOKED_AT, FEW = 256, 8  # lines that kinds of columns are told from; fewer tell nothing
NO_CLASSES = re.compile(r"(unnamed: ?\d+|__index_level_\d+__|level_\d+|index|idx|id|label|labels|target|targets|y|)")


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
            values = _load(mapped)
        except (ValueError, EOFError, OSError) as error:
            raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error
        yield values


def class_names(path: str | Path) -> list[str] | None:
    """The names that a table gives to its columns, one a class; None for files without any."""
    path = Path(path)
    if path.suffix == ".csv":
        first, second = _first_lines(path)
        return list(first) if _is_header(path, first, second) else None
    if path.suffix == ".parquet":
        from pyarrow import parquet

        schema = parquet.ParquetFile(path).schema_arrow
        index = (schema.pandas_metadata or {}).get("index_columns", ())
        names = [name for name in schema.names if name not in index]
        return names if len(names) > 1 else None
    return None


def _load(path: Path) -> np.ndarray:
    """An .npy file, mapped. Raises ValueError where it is none, or holds something else than numbers."""
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except Exception as error:  # numpy parses the header as Python: SyntaxError, TokenError, RecursionError, ...
            raise ValueError(f"not an .npy file of numbers ({str(error) or type(error).__name__})") from error
    if dtype.kind not in "fiu":
        raise ValueError(f"holds {'objects' if dtype.hasobject else dtype}, not numbers")
    if 0 in shape:
        raise ValueError(f"holds nothing: its shape is {shape}")
    try:
        values: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return values
    except (ValueError, OSError, OverflowError) as error:
        raise ValueError(f"not a whole .npy file of numbers ({error})") from error


def _unpack(path: Path, array: str | None, target: Path) -> None:
    """Copy one member of an .npz file, which is an .npy file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            if not names:
                raise ValueError(f"{path} holds no array; it has {', '.join(archive.namelist()) or 'nothing'}")
            if array is None and len(names) > 1:
                raise ValueError(f"{path} has the arrays {', '.join(names)}; say which as {path}:NAME")
            name = array or names[0]
            if name not in names:
                raise ValueError(f"{path} has no array {name!r}; it has {', '.join(names)}")
            size, free = archive.getinfo(f"{name}.npy").file_size, shutil.disk_usage(target.parent).free
            if size > free:
                raise ValueError(f"{path}: {name} unpacks to {size:,} bytes; {target.parent} has room for {free:,}")
            with archive.open(f"{name}.npy") as member, target.open("wb") as file:
                while part := member.read(BYTES):
                    file.write(part)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        # a member that is encrypted is a RuntimeError, of an unknown method a NotImplementedError
        raise ValueError(f"{path}: not an .npz file that can be read ({error})") from error


def _collect(path: Path, parts: Iterable[np.ndarray], target: Path) -> None:
    """Write blocks of rows one after the other, then say how many there are."""
    rows, shape, dtype = 0, (), np.dtype(np.float32)
    body = target.with_suffix(".body")
    with body.open("wb") as file:
        for part in parts:
            rows, shape, dtype = rows + len(part), part.shape[1:], part.dtype
            try:
                part.tofile(file)
            except OSError as error:
                raise ValueError(f"{path}: no room for a copy of it in {target.parent} ({error})") from error
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
    """Blocks of a CSV file of numbers; a first line that holds none is a header, and so is pandas' 0,1,2,..."""
    import pyarrow
    from pyarrow import csv as arrow

    first, second = _first_lines(path)
    if not first:
        raise ValueError(f"{path}: no rows: its first line is empty")
    headed = _is_header(path, first, second)
    if headed:
        _check_names(path, first)
    names = [f"column {number}" for number in range(1, len(first) + 1)]
    _check_whole(path, headed, first if headed else names)
    kind = pyarrow.float64() if len(names) == 1 else pyarrow.float32()  # whole numbers up to 2^53 stay whole
    counts = _Counts(path, first if headed else names)
    try:
        with arrow.open_csv(
            path,
            arrow.ReadOptions(column_names=names, skip_rows=int(headed), block_size=BYTES),
            convert_options=arrow.ConvertOptions(
                column_types=dict.fromkeys(names, kind), null_values=["", "nan", "NaN"]
            ),
        ) as batches:
            for batch in batches:
                block = _columns(batch)
                counts.look(block)
                yield block
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a CSV file of numbers ({error})") from error
    counts.judge()


def _first_lines(path: Path) -> tuple[list[str], list[str]]:
    """What is in the first two lines; the second may be empty."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            lines = [file.readline(LINE), file.readline(LINE)]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a CSV file of numbers: no UTF-8 text ({error})") from error
    if len(lines[0]) == LINE:
        raise ValueError(f"{path}: its first line is longer than {LINE:,} characters; expected a line for each sample")
    try:
        first, second = ([text.strip() for text in next(csv.reader([line]), [])] for line in lines)
    except csv.Error as error:
        raise ValueError(f"{path}: not a CSV file of numbers ({error})") from error
    return first, second


def _is_header(path: Path, first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether the first line is no sample. Raises ValueError where that cannot be told."""
    if first[bool(first) and not first[0] :] == [str(number) for number in range(len(first) - (not first[0]))]:
        # pandas' default header, with its index in front or without; of one class, or of whole numbers, it may be a row
        if any(not _is_whole(text) for text in second) or not first[0]:
            return True
        if len(first) > 1:
            raise ValueError(
                f"{path}: its first line, {','.join(first)[:40]}, may be a header or a sample: give the columns names"
            )
        return False
    numbers = [_is_number(text) for text in first]
    if len(first) > 1 and all(numbers) and len(second) == len(first):
        rising = all(float(low) < float(high) for low, high in pairwise(first))
        if rising and all(map(_is_integer, first)) and not any(map(_is_integer, second)):
            raise ValueError(
                f"{path}: its first line, {','.join(first)[:40]}, may be a header or a sample: give the columns names"
            )
    return not any(numbers)


def _check_whole(path: Path, headed: bool, names: Sequence[str]) -> None:
    """Raise ValueError for a column of whole numbers beside others, in the first lines: an index, ids, labels."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            lines = [[text.strip() for text in row] for row in islice(csv.reader(file), headed, headed + LOOKED_AT)]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV file of numbers ({error})") from error
    rows = [row for row in lines if len(row) == len(names)]
    whole = [
        all(_is_whole(row[column]) for row in rows) and len({row[column] for row in rows}) > 1  # else a masked class
        for column in range(len(names))
    ]
    if len(rows) >= FEW and 0 < sum(whole) < len(names):
        number = whole.index(True)
        raise ValueError(
            f"{path}: column {number + 1}, {names[number]!r}, holds whole numbers and others do not: no class? "
            "leave it out"
        )


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raise ValueError for a column that its name says is no class: an index, labels, `id` beside c0, c1, ..."""
    stems = [re.sub(r"\d+$", "", name) for name in names]
    most = max(set(stems), key=stems.count)
    numbered = stems.count(most) > len(names) / 2 and len(names) > 2 and most != names[stems.index(most)]
    for number, (name, stem) in enumerate(zip(names, stems, strict=True), 1):
        said = NO_CLASSES.fullmatch(name.lower()) and len(names) > 1
        if said or (numbered and stem != most):
            raise ValueError(
                f"{path}: column {number}, {name!r}, is no class by its name; leave it out (of pandas: index=False)"
            )


class _Counts:
    """Whether the first column of several counts the rows: an index that nobody named."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names, self.rows, self.start = path, names, 0, 0.0

    def look(self, block: np.ndarray) -> None:
        if block.ndim == 2 and self.names:
            if not self.rows:
                self.start = float(block[0, 0])
            if not np.array_equal(block[:, 0], self.start + np.arange(self.rows, self.rows + len(block))):
                self.names = ()
        self.rows += len(block)

    def judge(self) -> None:
        """Raises ValueError where it does."""
        if self.names and len(self.names) > 1 and self.rows > 2 and self.start in (0, 1):
            raise ValueError(
                f"{self.path}: its first column, {self.names[0]!r}, counts the rows ({self.start:g}, "
                f"{self.start + 1:g}, ...): an index? leave it out (of pandas: index=False)"
            )


def _parquet(path: Path) -> Iterator[np.ndarray]:
    """Blocks of a Parquet file: a column a class, or one column of lists. An index of pandas' is left out."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        schema, rows, width = file.schema_arrow, 0, 0
        about = schema.pandas_metadata or {}
        index = {name for name in about.get("index_columns", ()) if isinstance(name, str)}
        names = [name for name in schema.names if name not in index]
        _check_columns(path, [schema.field(name) for name in names])
        counts = _Counts(path, names)
        for batch in file.iter_batches(batch_size=ROWS, columns=names):
            block = _columns(batch) if len(names) > 1 else _lists(path, batch.column(0), rows, width)
            counts.look(block)
            rows, width = rows + len(block), block.shape[-1] if block.ndim == 2 else 0
            yield block
    except (pyarrow.ArrowException, TypeError, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file of numbers ({error})") from error
    counts.judge()


def _check_columns(path: Path, fields: Sequence[Any]) -> None:
    """Raise ValueError, naming it, for a column that holds no numbers, or whole ones beside others."""
    from pyarrow import types

    if not fields:
        raise ValueError(f"{path}: no columns")
    if len({field.name for field in fields}) < len(fields):
        raise ValueError(f"{path}: two columns of one name")
    for field in fields:
        kind = field.type
        if len(fields) == 1 and (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
            kind = kind.value_type
        if not (types.is_integer(kind) or types.is_floating(kind)):
            raise ValueError(f"{path}: column {field.name!r} holds {field.type}, not numbers; leave it out, or cast it")
    if len(fields) > 1:
        _check_names(path, [field.name for field in fields])
        whole = [field.name for field in fields if types.is_integer(field.type)]
        if 0 < len(whole) < len(fields):
            raise ValueError(
                f"{path}: column {whole[0]!r} holds whole numbers and others do not: no class? leave it out"
            )


def _columns(batch: Any) -> np.ndarray:
    """A batch of columns as rows: (N,) of one, else (N, C) in float32."""
    columns = [column.to_numpy(zero_copy_only=False) for column in batch.columns]
    return np.stack(columns, axis=1).astype(np.float32) if len(columns) > 1 else np.asarray(columns[0])


def _lists(path: Path, column: Any, before: int, width: int) -> np.ndarray:
    """One column: (N,) of numbers, (N, C) in float32 of lists, all of `width`, or of the first one's where that is 0.

    Raises ValueError with the row, after those `before`, of another length.
    """
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype != object:
        return np.asarray(values)
    for row, value in enumerate(values, before):
        length = 0 if value is None else len(value)
        width = width or length
        if length != width or not length:
            raise ValueError(
                f"{path}: row {row} holds {f'a list of {length}' if length else 'no list'}; expected {width}"
            )
    return np.stack(values).astype(np.float32)


def csv_line(names: Sequence[str]) -> str:
    """A line of a CSV file, with quotes where a name needs them."""
    return ",".join(f'"{name.replace(chr(34), 2 * chr(34))}"' if re.search('[",\n]', name) else name for name in names)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_integer(text: str) -> bool:
    """By its value: 2.0 is."""
    return _is_number(text) and float(text).is_integer()


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"-?\d+", text) is not None


@contextmanager
def written(
    path: str | Path, shape: tuple[int, int], dtype: Any, names: Sequence[str] | None = None
) -> Iterator[Callable[[np.ndarray], Any]]:
    """A function that appends rows to a file, which is there when all of them are.

    Args:
        names: of the columns of a table (default: class_0, class_1, ...).
    """
    path = Path(path)
    kind = kind_of(path)
    files.check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / f"part{kind}"
        named = names if names and len(names) == shape[1] else [f"class_{number}" for number in range(shape[1])]
        with part.open("wb") as file, _writer(kind, file, shape, np.dtype(dtype), named) as write:
            yield write
        part.replace(path)


@contextmanager
def _writer(
    kind: str, file: IO[bytes], shape: tuple[int, int], dtype: np.dtype, names: Sequence[str]
) -> Iterator[Callable[[np.ndarray], Any]]:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    if kind == ".npy":
        np.lib.format.write_array_header_2_0(file, header)
        yield lambda rows: file.write(rows.astype(dtype).tobytes())
    elif kind == ".npz":
        archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        with archive, archive.open("logits.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_2_0(member, header)
            yield lambda rows: member.write(rows.astype(dtype).tobytes())
    elif kind == ".csv":
        file.write((csv_line(names) + "\n").encode())
        yield lambda rows: np.savetxt(file, rows.astype(dtype), fmt="%.9g", delimiter=",")
    else:
        import pyarrow
        from pyarrow import parquet

        schema = pyarrow.schema([(name, pyarrow.from_numpy_dtype(dtype)) for name in names])
        with parquet.ParquetWriter(file, schema) as writer:
            yield lambda rows: writer.write_table(
                pyarrow.table([rows[:, i].astype(dtype) for i in range(shape[1])], schema=schema)
            )
