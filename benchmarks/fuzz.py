"""Fuzzing of what reads files from outside: `python -m benchmarks.fuzz READER --minutes 10` (pip install atheris).

Every reader gives a result or raises ValueError or OSError that names the file. Anything else is a finding: its bytes
are kept in `--findings`, and the next run starts with them. The suite tries the same readers with hypothesis
(tests/test_bad_inputs.py), for seconds in place of minutes.
"""

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longtail import correct
from longtail.data import decode, listing
from longtail.data.sources import cifar, embeddings
from longtail.posthoc import tables
from longtail.workflow import files, params

EXPECTED = (ValueError, OSError)


class FindingError(AssertionError):
    """A reader that raised something else than it says, or did not name the file."""


@dataclass(frozen=True)
class Reader:
    """What reads a file, its suffix, and files that are right, to start from."""

    suffix: str
    read: Callable[[Path], Any]
    seeds: tuple[bytes, ...]


def opened(path: Path) -> None:
    """Logits, to the last row."""
    with tables.opened(path) as values:
        np.asarray(values).sum()


def features(path: Path) -> None:
    """Features beside a table of two labels."""
    labels = path.with_name("labels.csv")
    labels.write_text("label\na\nb\n")
    embeddings.look(labels, path)


def image(path: Path) -> None:
    """An image file as eight-bit colour."""
    try:
        decode.decode(path.read_bytes(), size=8, channels=3, fit="pad", exif_orientation=True)
    except decode.BrokenError as error:  # the caller names the file
        raise ValueError(f"{path}: {error}") from error


def archive(path: Path) -> None:
    """CIFAR-10's archive of pickles."""
    cifar._read_archive(path, cifar.LAYOUTS["cifar10"])


def mirror(path: Path) -> None:
    """A Parquet file of a mirror of CIFAR-10."""
    import fsspec

    table = cifar._read_parquet(fsspec.filesystem("file"), str(path))
    cifar._part(str(path), table, cifar.LAYOUTS["cifar10"].column)


def _npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _zip(method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        made.writestr("logits.npy", _npy(np.eye(3, dtype=np.float32)))
    return file.getvalue()


def _parquet(columns: dict[str, Any]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file, compression="none")
    return file.getvalue()


def _picture(kind: str) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 99, 199)).save(file, kind)
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=0) as made:
        for name in cifar.LAYOUTS["cifar10"].members["train"]:
            data = b"\x80\x02}q\x00U\x04dataq\x01K\x01s."
            member = tarfile.TarInfo(name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return file.getvalue()


SHIFT = {"scale": 1.0, "shift": [0.0, 1.0, -1.0], "fitted_on": "train", "flags": []}
PARAMS = b"plans:\n  tiny:\n    datasets: [a]\n    seeds: [0]\nmethods: {ce: {loss: ce}}\n"

READERS: dict[str, Reader] = {
    "npy": Reader(".npy", opened, (_npy(np.eye(3, dtype=np.float32)), _npy(np.arange(3)))),
    "npz": Reader(".npz", opened, (_zip(zipfile.ZIP_STORED), _zip(zipfile.ZIP_DEFLATED))),
    "csv": Reader(".csv", opened, (b"cat,dog\n1.5,-2\n3,4e-2\n", b'"1","2"\n"3",\n')),
    "parquet": Reader(".parquet", opened, (_parquet({"a": [1.0], "b": [3.0]}), _parquet({"l": [[1.0, 2.0]]}))),
    "shift": Reader(".json", lambda path: correct._read(str(path)), (json.dumps(SHIFT).encode(),)),
    "params": Reader(".yaml", params.load, (PARAMS,)),
    "listing": Reader(".csv", listing.read, (b"path,label,split\na.png,cat,train\nb.png,dog,test\n",)),
    "features": Reader(".npy", features, (_npy(np.ones((2, 3), np.float32)),)),
    "arrays": Reader(".npz", files.load_arrays, (_zip(zipfile.ZIP_STORED),)),
    "image": Reader(".png", image, (_picture("PNG"), _picture("JPEG"), _picture("GIF"), _picture("BMP"))),
    "archive": Reader(".tar.gz", archive, (_tar(),)),
    "mirror": Reader(".parquet", mirror, (_parquet({"img": [{"bytes": _picture("PNG"), "path": "a"}], "label": [1]}),)),
}  # fmt: skip


def judge(reader: Reader, data: bytes, folder: Path) -> str:
    """`read`, or `refused` with a message that names the file. Raises FindingError for anything else."""
    path = folder / f"input{reader.suffix}"
    path.write_bytes(data)
    try:
        reader.read(path)
    except EXPECTED as error:
        if path.name not in str(error):
            raise FindingError(f"the message names no file: {error!r}") from error
        return "refused"
    except Exception as error:
        raise FindingError(f"{error!r}") from error
    return "read"


def functions() -> Iterator[types.FunctionType]:
    """What libFuzzer is to see the branches of: ours, and the archives' readers of the standard library."""
    for name, module in list(sys.modules.items()):
        if name.startswith("longtail.") or name in ("tarfile", "zipfile"):
            for value in list(vars(module).values()):
                members = vars(value).values() if isinstance(value, type) else [value]
                yield from (one for one in members if isinstance(one, types.FunctionType) and one.__module__ == name)


def main() -> None:
    """Fuzz one reader for some minutes; exit status 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=[*READERS])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "longtail-findings")
    args = parser.parse_args()
    try:
        import atheris  # type: ignore[import-untyped]
    except ImportError:
        sys.exit("benchmarks.fuzz needs atheris: pip install atheris")
    reader, counts, began = READERS[args.reader], {"read": 0, "refused": 0}, time.monotonic()
    found: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="longtail-fuzz-") as name:
        folder = Path(name)
        corpus, kept = folder / "corpus", args.findings / args.reader
        corpus.mkdir()
        kept.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate([*reader.seeds, *(path.read_bytes() for path in sorted(kept.iterdir()))]):
            (corpus / f"{number}").write_bytes(data)

        def one(data: bytes) -> None:
            try:
                counts[judge(reader, data, folder)] += 1
            except FindingError as finding:
                kind = str(finding)[:60]
                if kind not in found:
                    found.add(kind)
                    (kept / f"{len(found):03}").write_bytes(data)
                    print(f"{args.reader}: {finding}", flush=True)
            if time.monotonic() - began > 60 * args.minutes:
                tried = sum(counts.values())
                print(f"{args.reader}: {tried} inputs in {args.minutes:g} min, {counts['read']} read, "
                      f"{counts['refused']} refused by name, {len(found)} findings", flush=True)  # fmt: skip
                os._exit(bool(found))  # libFuzzer does not come back

        for function in functions():
            atheris.instrument_func(function)
        atheris.Setup(
            [sys.argv[0], str(corpus), "-timeout=30", "-rss_limit_mb=4096", "-max_len=65536", "-verbosity=0"], one
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
