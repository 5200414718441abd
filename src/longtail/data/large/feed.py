"""Decoding by worker processes: squares of a list of pieces, in order, a bounded number of them at a time."""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from longtail.data.decode import BrokenError
from longtail.data.large.pixels import Square, square
from longtail.data.large.store import Piece, Store

AHEAD = 3  # chunks in the making for each worker


class Chunk(NamedTuple):
    """Rows, decoded: pixels (n, side, side, 3) uint8, black where a file is broken; what each is; why it is not."""

    pixels: np.ndarray
    kinds: list[str]
    broken: dict[int, str]  # by place in the chunk


def workers() -> int:
    """LONGTAIL_WORKERS, or all cores; 0: in this process."""
    given = os.environ.get("LONGTAIL_WORKERS", "")
    if given and not given.isdigit():
        raise ValueError(f"LONGTAIL_WORKERS={given}: allowed are whole numbers, 0 for this process alone")
    return int(given) if given else os.cpu_count() or 1


def read(store: Store, pieces: Sequence[Piece], how: Square) -> Chunk:
    """Read and decode. A file that is no usable image is named in `broken`; one that is not what the index says raises
    ValueError."""
    pixels = np.zeros((len(pieces), how.side, how.side, 3), np.uint8)
    kinds, broken = [], dict[int, str]()
    for n, piece in enumerate(pieces):
        try:
            found, kind = square(store.piece(piece), how)
            pixels[n] = found.permute(1, 2, 0).numpy()
            kinds.append(kind)
        except BrokenError as error:
            kinds.append("broken")
            broken[n] = str(error)
    return Chunk(pixels, kinds, broken)


def chunks(store: Store, parts: Sequence[Sequence[Piece]], how: Square) -> Iterator[Chunk]:
    """Each part read, in their order; at most AHEAD parts a worker are in memory or in the making.

    Workers end with the iterator, also where it is left early.
    """
    if not (count := workers()):
        yield from (read(store, part, how) for part in parts)
        return
    # not forked: this process has threads; a worker computes with one
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting, later = deque[Future[Chunk]](), iter(parts)
        try:
            for part in islice(later, AHEAD * count):
                waiting.append(pool.submit(read, store, part, how))
            while waiting:
                chunk = waiting.popleft().result()
                for part in islice(later, 1):
                    waiting.append(pool.submit(read, store, part, how))
                yield chunk
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
