"""What a training leaves while it runs, so that `kill -9` at any moment costs no more than the last minute."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from longtail.workflow import files

try:
    import fcntl
except ImportError:  # Windows has no flock: nothing keeps two trainings of one cell apart there
    fcntl = None  # type: ignore[assignment]


class Checkpoint:
    """One file that holds a training between two steps; it belongs to the training that its identity names.

    Args:
        path: of the file; None for no checkpoints.
        identity: everything that determines the training; a file of another identity is ignored.
        every_s: seconds between two; the default, LONGTAIL_CHECKPOINT_S or a minute, costs a thousandth of the time.
    """

    def __init__(self, path: str | Path | None, identity: str, every_s: float | None = None):
        self.path = Path(path) if path else None
        self.identity = identity
        asked = os.environ.get("LONGTAIL_CHECKPOINT_S", "60")
        try:
            self.every_s = float(asked) if every_s is None else every_s
        except ValueError:
            raise ValueError(f"LONGTAIL_CHECKPOINT_S={asked}: must be a number of seconds") from None
        self.saved_at = perf_counter()

    def load(self) -> dict[str, Any] | None:
        """The saved state, or None when there is none of this identity. Nothing in the file is run (no pickle).

        Raises ValueError naming a file that cannot be read.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            found = state.get("identity")
        except Exception as error:  # whole or not there, so this is another program's or a failing disk's file
            raise ValueError(f"{self.path}: not a readable checkpoint ({error}); remove it to train anew") from error
        return state if found == self.identity else None

    def due(self) -> bool:
        """Whether the last one is `every_s` ago."""
        return self.path is not None and perf_counter() - self.saved_at >= self.every_s

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write what `state()` returns; a reader sees the old file or the new one."""
        if self.path is None:
            return
        content = io.BytesIO()
        torch.save({"identity": self.identity, **state()}, content)
        files.write_bytes(self.path, content.getvalue())
        self.saved_at = perf_counter()

    def remove(self) -> None:
        """Drop the file, and what a write that was killed left of one: the training is over."""
        if self.path is not None:
            for file in (self.path, *self.path.parent.glob(f".{self.path.name}.*")):
                file.unlink(missing_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every other process from this training meanwhile: two would write the same files.

        Raises ValueError naming the process that is at it: the orphan of a `dvc repro` that was killed, say.
        """
        if self.path is None:
            yield
            return
        with alone(self.path.with_suffix(".lock"), "training this cell"):
            yield


@contextmanager
def alone(lock: Path, does: str) -> Iterator[None]:
    """Keep every other process from what this one `does` meanwhile. Raises ValueError naming the one that is at it."""
    if fcntl is None:
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"process {file.read()} is {does} ({lock}); wait for it or end it") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
