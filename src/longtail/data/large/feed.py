"""Decoding by worker processes: parts of a list of images, in order, a bounded number of them at a time.

A reader is one DataLoader whose workers stay from epoch to epoch; what it is asked for, it makes ahead of its being
needed. Nothing in a worker is random but what follows from an image's own seed, so that neither the number of workers
nor which of them does what changes a byte.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from longtail.data.decode import BrokenError
from longtail.data.large.pixels import CHANNELS, Smaller, Square, Window, smaller, square, window
from longtail.data.large.store import Piece, Store

MOST = 16  # workers that are taken unasked: each has 700 MB, most of it PyTorch's libraries, which they share
AHEAD = 3  # parts in the making for each worker
SHARED = Path("/dev/shm")  # where workers leave pixels; containers often have 64 MiB of it


class Wanted(NamedTuple):
    """A part that is asked for: which images, how they are to be decoded, and for each what its draws come from."""

    pieces: Sequence[Piece]
    how: Square | Window | Smaller
    seeds: Sequence[tuple[int, ...]] = ()  # of a Window


class Chunk(NamedTuple):
    """Rows, decoded: what each is, why it is not, and what has become of them.

    Attributes:
        values: (n, 3, side, side) uint8, black where a file is broken; of Smaller, the files' bytes one after another.
        sizes: of Smaller, the bytes of each; 0 where a file is broken.
        broken: reasons, by place in the chunk.
        failed: what stopped the worker, to be raised where the part is used.
    """

    values: Tensor
    sizes: list[int]
    kinds: list[str]
    broken: dict[int, str]
    failed: Exception | None = None


def processes() -> int:
    """How many processes of this training share the machine: torchrun says it."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def workers() -> int:
    """LONGTAIL_WORKERS, or this process's share of the cores that it may use, at most MOST; 0: in this process."""
    given = os.environ.get("LONGTAIL_WORKERS", "")
    if given and not given.isdigit():
        raise ValueError(f"LONGTAIL_WORKERS={given}: allowed are whole numbers, 0 for this process alone")
    return int(given) if given else max(1, min(MOST, len(os.sched_getaffinity(0)) // processes()))


def read(store: Store, wanted: Wanted) -> Chunk:
    """Read and decode. A file that is no usable image is named in `broken`.

    Raises ValueError for one that is not what the index says, OSError for one that is gone.
    """
    pieces, how, seeds = wanted
    side = None if isinstance(how, Smaller) else how.side
    values = torch.zeros(0 if side is None else (len(pieces), CHANNELS, side, side), dtype=torch.uint8)
    parts, sizes, kinds, broken = [b""], list[int](), list[str](), dict[int, str]()
    for n, piece in enumerate(pieces):
        data = store.piece(piece)
        try:
            if isinstance(how, Smaller):
                made, kind = smaller(data, how)
                parts.append(made)
                sizes.append(len(made))
            elif isinstance(how, Window):
                pixels, kind = window(data, how, _generator(seeds[n]))
                values[n] = pixels
            else:
                pixels, kind = square(data, how)
                values[n] = pixels
            kinds.append(kind)
        except BrokenError as error:
            kinds.append("broken")
            broken[n] = str(error)
            if side is None:
                sizes.append(0)
    if side is None:
        values = torch.frombuffer(bytearray(b"".join(parts)) or bytearray(1), dtype=torch.uint8)[: sum(sizes)].clone()
    return Chunk(values, sizes, kinds, broken)


def _generator(place: tuple[int, ...]) -> np.random.Generator:
    """Of an image's draws: seed, stream, and where in it."""
    return np.random.default_rng(np.random.SeedSequence(place[0], spawn_key=place[1:]))


class Files(Dataset[Chunk]):
    """What a worker has of a data set: where it lies. What is asked of it is a part."""

    def __init__(self, store: Store):
        self.store = store

    def __getitem__(self, wanted: Wanted) -> Chunk:
        try:
            return read(self.store, wanted)
        except (OSError, ValueError) as error:
            return Chunk(torch.zeros(0, dtype=torch.uint8), [], [], {}, error)


class Agenda(Sampler[Any]):
    """What is to be read next; the reader sets it."""

    def __init__(self) -> None:
        self.parts: Iterable[Wanted] = ()

    def __iter__(self) -> Iterator[Wanted]:
        return iter(self.parts)


def as_it_is(chunk: Any) -> Any:
    """What a worker does with a part before it sends it: nothing."""
    return chunk


class Reader:
    """Worker processes for a data set, which live until it is closed. One reading at a time: a new one ends the last.

    Args:
        store: where the images are.
        part_bytes: of the largest part that will be asked for.
        pinned: hand over pages that a GPU can copy from while it computes.

    """

    def __init__(self, store: Store, part_bytes: int, *, pinned: bool = False):
        self.store, self.part_bytes, self.pinned = store, part_bytes, pinned
        self.agenda, self.count = Agenda(), workers()
        self.reading = 0  # the number of the one under way
        self.loader: DataLoader[Chunk] | None = None  # made when something is to be read

    def read(self, parts: Iterable[Wanted]) -> Iterator[Chunk]:
        """The parts, in their order; `parts` is gone through as there is room ahead.

        Raises what `read` raises, where the part's turn comes, and ValueError where /dev/shm has no room for what the
        workers make, or where another reading has begun since.
        """
        self.reading += 1
        mine, self.agenda.parts = self.reading, parts
        if self.loader is None:
            self.loader = self._started()
        chunks = iter(self.loader)
        while True:
            if self.reading != mine:
                raise ValueError("another reading of these images has begun, which ended this one")
            chunk = next(chunks, None)
            if chunk is None:
                return
            if chunk.failed is not None:
                raise chunk.failed
            yield chunk

    def _started(self) -> DataLoader[Chunk]:
        settings: dict[str, Any] = {}
        if self.count:
            # not forked: this process has threads
            settings = {
                "num_workers": self.count, "persistent_workers": True, "multiprocessing_context": "spawn",
                "prefetch_factor": ahead(self.count, self.part_bytes),
            }  # fmt: skip
        return DataLoader(
            Files(self.store), batch_size=None, sampler=self.agenda, collate_fn=as_it_is, pin_memory=self.pinned,
            generator=torch.Generator(), **settings,
        )  # fmt: skip

    def close(self) -> None:
        """End the workers."""
        running: Any = None if self.loader is None else self.loader._iterator
        if running is not None and self.count:
            running._shutdown_workers()  # now, and not when somebody collects what is left of it
        self.loader = None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ahead(count: int, part_bytes: int) -> int:
    """How many parts each of `count` workers may have made before they are used: AHEAD, or fewer.

    Half of /dev/shm, or of this process's share of it, has to hold them.

    Raises ValueError where that is none.
    """
    if not SHARED.is_dir():
        return AHEAD
    free = shutil.disk_usage(SHARED).free // processes()
    found = min(AHEAD, int(free / 2 / (count * part_bytes)))
    if found < 1:
        raise ValueError(
            f"{SHARED} has {free >> 20} MiB free for this process, too little for {count} workers that decode "
            f"{part_bytes >> 20} MiB at a time: LONGTAIL_WORKERS takes fewer, `docker run --shm-size` gives more"
        )
    return found
