"""Where large data lie: a folder, or a place that fsspec knows, read in pieces of files and of archives in them."""

import os
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import fsspec

LARGE = "LONGTAIL_LARGE"  # the folder, or URL, of all large data sets
DEFAULT = "data/large"
MANY = (".tar", ".images")  # files with many images in them


class Piece(NamedTuple):
    """The bytes of one image: `size` of them in `file`, from `offset` on."""

    file: str
    offset: int
    size: int


class Store:
    """The folder of one data set, `folder` below `root` (default LONGTAIL_LARGE, else data/large).

    Raises ValueError for a root whose kind fsspec does not know.
    """

    def __init__(self, folder: str, root: str | None = None):
        place = root or os.environ.get(LARGE) or DEFAULT
        try:
            self.files, path = fsspec.core.url_to_fs(place)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{LARGE}: {place!r} cannot be read ({error})") from error
        self.local = "file" in (
            self.files.protocol if isinstance(self.files.protocol, tuple) else (self.files.protocol,)
        )
        self.path = f"{path.rstrip('/')}/{folder}"

    def at(self, name: str) -> str:
        """The whole path of a name."""
        return f"{self.path}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self.files.exists(self.at(name)))

    def read(self, name: str) -> bytes:
        """A file. Raises OSError."""
        return bytes(self.files.cat_file(self.at(name)))

    def piece(self, piece: Piece) -> bytes:
        """An image's bytes. Raises OSError, and ValueError where the file has become shorter or longer."""
        if self.local:
            with open(self.at(piece.file), "rb", buffering=0) as file:
                data = os.pread(file.fileno(), piece.size + 1, piece.offset)
        else:
            data = self.files.cat_file(self.at(piece.file), start=piece.offset, end=piece.offset + piece.size + 1)
        whole = piece.offset == 0 and not piece.file.endswith(MANY)
        if len(data) < piece.size or (whole and len(data) != piece.size):
            raise ValueError(f"{self.at(piece.file)}: no longer the {piece.size:,} bytes that the index was made of")
        return bytes(data[: piece.size])

    def tree(self, folder: str) -> Iterator[tuple[str, Any]]:
        """(path relative to the store, a function that says its size) of all files below a folder."""
        if self.local:
            waiting = [folder]
            while waiting:
                here = waiting.pop()
                with os.scandir(self.at(here)) as entries:
                    for entry in entries:
                        if entry.is_dir():
                            waiting.append(f"{here}/{entry.name}")
                        else:
                            yield f"{here}/{entry.name}", lambda entry=entry: entry.stat().st_size
        else:
            for path, info in self.files.find(self.at(folder), detail=True).items():
                yield path.removeprefix(f"{self.path}/"), lambda info=info: info["size"]

    def members(self, archive: str, *, nested: bool) -> Iterator[tuple[str, Piece]]:
        """(name, piece) of the files in a tar, or in the tars in it. Raises ValueError where it is none, or cut off."""
        try:
            with self.files.open(self.at(archive), "rb") as file, tarfile.open(fileobj=file, mode="r:") as outer:
                for member in outer:
                    if not member.isreg():
                        continue
                    if not nested:
                        yield member.name.removeprefix("./"), Piece(archive, member.offset_data, member.size)
                        outer.members.clear()  # type: ignore[attr-defined]  # it keeps a million of them
                        continue
                    with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                        for one in inner:
                            yield one.name, Piece(archive, member.offset_data + one.offset_data, one.size)
        except tarfile.TarError as error:
            raise ValueError(f"{self.at(archive)}: not a readable tar ({error}); download it again") from error
