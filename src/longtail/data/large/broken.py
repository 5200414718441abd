"""Files of a large data set that are no usable image: noted as they are met, then named and refused, or left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from longtail.data.large.feed import Chunk
from longtail.data.large.store import Piece, Store

NAMED = 10  # of those that are said aloud; the report of the data set has all


@dataclass
class Noted:
    """What is known of the files of a shard: their kinds, and which are no images (place, why)."""

    kinds: list[str] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.kinds)

    def add(self, chunk: Chunk) -> None:
        """Note the next files."""
        self.broken |= {len(self.kinds) + n: why for n, why in chunk.broken.items()}
        self.kinds += chunk.kinds

    def arrays(self) -> dict[str, np.ndarray]:
        """As a shard's file keeps it."""
        return {
            "kinds": np.array(self.kinds),
            "broken": np.array([*self.broken], np.int64),
            "why": np.array([*self.broken.values()], str),
        }


def named(part: Sequence[Piece], shard: Mapping[str, np.ndarray]) -> dict[str, str]:
    """{file: why it is no image}, of the files of a shard."""
    return {
        part[n].file + (f" at {part[n].offset}" if part[n].offset else ""): why
        for n, why in zip(shard["broken"].tolist(), shard["why"].tolist(), strict=True)
    }


def say(store: Store, wrong: Mapping[str, str], broken: str, kept: str) -> None:
    """Say which files are left out.

    Args:
        wrong: as `named`, of all shards; not empty.
        broken: `leave_out` or `refuse`.
        kept: what stays of the others where it is refused.

    Raises ValueError, naming files, where they are refused.
    """
    said = "; ".join(f"{place} ({why})" for place, why in list(wrong.items())[:NAMED])
    said += "; ..." if len(wrong) > NAMED else ""
    if broken == "refuse":
        raise ValueError(
            f"{store.path}: {len(wrong):,} files are no usable images: {said}. Mend them and make the index "
            f"anew, or leave them out (broken: leave_out); {kept} of others is kept"
        )
    print(f"left out, no usable images: {len(wrong):,}: {said}")


def check_classes(split: str, labels: np.ndarray, classes: int) -> None:
    """Raise ValueError for a class of which broken files leave no image."""
    if split != "held_out" and len(empty := np.flatnonzero(np.bincount(labels, minlength=classes) == 0)):
        raise ValueError(f"{split}: of class {empty[0]} no image is left; there are {len(empty)} such classes")
