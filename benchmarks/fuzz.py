"""Fuzzing of what reads files from outside: `python -m benchmarks.fuzz READER --minutes 10` (pip install atheris).

Every reader gives a result or raises ValueError or OSError that names the file. Anything else is a finding, and so is
more than 4 GB or 30 s for one file: its bytes are kept in `--findings`, and the next run starts with them. The suite
tries the same readers with hypothesis (tests/test_bad_inputs.py), for seconds in place of minutes.
"""

import argparse
import gzip
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
import torch
import yaml

from longtail import correct
from longtail.data import decode, listing
from longtail.data.large import lists
from longtail.data.large.store import Store
from longtail.data.sources import cifar, embeddings
from longtail.networks import backbones
from longtail.posthoc import tables
from longtail.serving import export
from longtail.training.checkpoints import Checkpoint
from longtail.workflow import files, params

EXPECTED = (ValueError, OSError)


class FindingError(AssertionError):
    """A reader that raised something else than it says, or did not name the file."""


@dataclass(frozen=True)
class Reader:
    """What reads a file, its suffix, and files that are right, to start from.

    `packed` makes the file of the bytes that are changed: in a compressed file, no change would pass its checksum.
    """

    suffix: str
    read: Callable[[Path], Any]
    seeds: tuple[bytes, ...]
    packed: Callable[[bytes], bytes] = bytes


def opened(path: Path) -> None:
    """Logits, to the last row."""
    with tables.opened(path) as values:
        np.asarray(values).sum()


def features(path: Path) -> None:
    """Features beside a table of two labels."""
    labels = path.with_name("labels.csv")
    labels.write_text("label\na\nb\n")
    embeddings.look(labels, path)


def labels(path: Path) -> None:
    """Labels beside logits of three samples."""
    with tables.opened(path) as values:
        correct._check("logits", np.diag(np.asarray([-1, 2, 3], np.float32)), str(path), values)


def image(path: Path) -> None:
    """An image file as eight-bit colour."""
    try:
        decode.decode(path.read_bytes(), size=8, channels=3, fit="pad", exif_orientation=True)
    except decode.BrokenError as error:  # the caller names the file
        raise ValueError(f"{path}: {error}") from error


def large_list(path: Path) -> None:
    """A list of ImageNet-LT's form."""
    lists.parse(path.read_bytes(), str(path))


def annotations(path: Path) -> None:
    """iNaturalist's own annotations, by their name in the folder of the data set."""
    named = path.with_name("val2018.json")
    named.write_bytes(path.read_bytes())
    try:
        lists._from_json(Store(path.parent.name, str(path.parent.parent)), "iNaturalist18_val.txt")
    except ValueError as error:
        raise ValueError(str(error).replace(named.name, path.name)) from error


def images_in_tars(path: Path) -> None:
    """What lies where in the tars of a large data set."""
    store = Store(path.parent.name, str(path.parent.parent))
    sum(1 for nested in (True, False) for _ in store.members(path.name, nested=nested))


def archive(path: Path) -> None:
    """CIFAR-100's archive of pickles."""
    cifar._read_archive(path, CIFAR100)


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


def _weights() -> tuple[bytes, bytes]:
    """A network's tensors as safetensors and as a state dict."""
    import safetensors.torch

    tensors = {"module.stem.weight": torch.ones(2, 3), "stem.bias": torch.zeros(2)}
    file = io.BytesIO()
    torch.save({"state_dict": tensors}, file)
    return safetensors.torch.save(tensors), file.getvalue()


def _checkpoint() -> bytes:
    """What a training leaves while it runs."""
    content = io.BytesIO()
    torch.save({"identity": "x", "epoch": 3, "network": {"w": torch.ones(2)}}, content)
    return content.getvalue()


def _picture(kind: str, size: int = 8) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (size, size), (9, 99, 199)).save(file, kind)
    return file.getvalue()


def _mirrored() -> bytes:
    return _parquet({"img": [{"bytes": _picture("PNG", cifar.SIZE), "path": "a.png"}], "label": [1]})


def _batch() -> bytes:
    """The pickle of one image, its opcodes as the official archive has them."""
    pixels = bytes(range(256)) * 12
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01K\x01M\0\x0c\x86"
        b"cnumpy\ndtype\nU\x02u1K\0K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        b"\x89T" + len(pixels).to_bytes(4, "little") + pixels + b"tb"
    )
    return b"\x80\x02}(U\x04data" + array + b"U\x0bfine_labels](K\x05eU\x09filenames](U\x05a.pngeu."


def _meta() -> bytes:
    names = b"".join(b"U\x02" + f"{number:02}".encode() for number in range(CIFAR100.num_classes))
    return b"\x80\x02}U\x10fine_label_names](" + names + b"es."


def _tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return file.getvalue()


def _archive(train: bytes) -> bytes:
    """CIFAR-100's members, of one image each; `train` is the pickle of the first."""
    parts = {"train": train, "test": _batch(), "names": _meta()}
    return _tar({CIFAR100.members[part][0]: data for part, data in parts.items()})


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=0, mtime=0)


def _params() -> bytes:
    """Of the repository's params.yaml what a plan of one cell needs."""
    whole = yaml.safe_load(Path(__file__).resolve().parent.with_name("params.yaml").read_text(encoding="utf-8"))
    plan = {"datasets": ["digits_if20"], "recipes": ["digits"], "methods": ["ce"], "seeds": [0]}
    kept = {
        "sources": ["digits", "cifar100"],
        "datasets": ["digits_if20", "cifar100_ldam_if100"],
        "backbones": ["efficientnet_lite0"],
        "features": ["cifar100_ldam_if100_lite0"],
        "recipes": ["digits"],
        "methods": ["ce"],
    }
    made = {"plans": {"tiny": plan}}
    made |= {section: {name: whole[section][name] for name in names} for section, names in kept.items()}
    made |= {section: whole[section] for section in ("align", "evaluate", "fisher")}
    return yaml.safe_dump(made).encode()


CIFAR100 = cifar.LAYOUTS["cifar100"]
ANNOTATED = {
    "images": [{"id": 5, "file_name": "train_val2018/a/1/x.jpg"}],
    "annotations": [{"image_id": 5, "category_id": 3}],
}
SHIFT = {"scale": 1.0, "shift": [0.0, 1.0, -1.0], "fitted_on": "train", "flags": []}

READERS: dict[str, Reader] = {
    "npy": Reader(".npy", opened, (_npy(np.eye(3, dtype=np.float32)), _npy(np.arange(3)))),
    "npz": Reader(".npz", opened, (_zip(zipfile.ZIP_STORED), _zip(zipfile.ZIP_DEFLATED))),
    "csv": Reader(".csv", opened, (b"cat,dog\n1.5,-2\n3,4e-2\n", b'"1","2"\n"3",\n')),
    "parquet": Reader(".parquet", opened, (_parquet({"a": [1.0], "b": [3.0]}), _parquet({"l": [[1.0, 2.0]]}))),
    "shift": Reader(".json", lambda path: correct._read(str(path)), (json.dumps(SHIFT).encode(),)),
    "params": Reader(".yaml", params.load, (_params(),)),
    "labels": Reader(".csv", labels, (b"label\n0\n2\n1\n", b"2\n2\n0\n")),
    "safetensors": Reader(".safetensors", backbones.read, _weights()[:1]),
    "state": Reader(".pth", backbones.read, _weights()[1:]),
    "listing": Reader(".csv", listing.read, (b"path,label,split\na.png,cat,train\nb.png,dog,test\n",)),
    "list": Reader(".txt", large_list, (b"train/n1/a.JPEG 0\nval/n2/b.JPEG 7\n",)),
    "annotations": Reader(".json", annotations, (json.dumps(ANNOTATED).encode(),)),
    "tars": Reader(".tar", images_in_tars, (_tar({"n1.tar": _tar({"n1_1.JPEG": _picture("JPEG")})}),)),
    "features": Reader(".npy", features, (_npy(np.ones((2, 3), np.float32)),)),
    "arrays": Reader(".npz", files.load_arrays, (_zip(zipfile.ZIP_STORED),)),
    "alignment": Reader(".json", export.corrections, (json.dumps({"last": {"raw": SHIFT}}).encode(),)),
    "checkpoint": Reader(".pt", lambda path: Checkpoint(path, "x").load(), (_checkpoint(),)),
    "image": Reader(".png", image, (_picture("PNG"), _picture("JPEG"), _picture("GIF"), _picture("BMP"))),
    "archive": Reader(".tar.gz", archive, (_archive(_batch()),), packed=_gzip),
    "pickle": Reader(".tar.gz", archive, (_batch(),), packed=lambda data: _gzip(_archive(data))),
    "mirror": Reader(".parquet", mirror, (_mirrored(),)),
}  # fmt: skip


def judge(reader: Reader, data: bytes, folder: Path) -> str:
    """`read`, or `refused` with a message that names the file. Raises FindingError for anything else."""
    path = folder / f"input{reader.suffix}"
    path.write_bytes(reader.packed(data))
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
        if name.startswith("longtail.") or name in ("pickle", "tarfile", "zipfile"):
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
            [
                sys.argv[0],
                str(corpus),
                "-timeout=30",
                "-rss_limit_mb=4096",
                "-max_len=65536",
                "-verbosity=0",
                f"-artifact_prefix={kept}/",
            ],
            one,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
