"""What `longtail run` shows on a terminal: a bar for each job, out of the lines that a training prints."""

import re
import threading
from collections.abc import Iterable

from tqdm import tqdm

EPOCH = re.compile(r"(?P<name>.+?)  epoch (?P<epoch>\d+)/(?P<epochs>\d+)  (?P<facts>.*)")
RESUMED = re.compile(r"(?P<name>\S+) goes on from epoch (?P<epoch>\d+)\b.*")


class Bar:
    """The bar of one job, at its own place; all lines that are no epochs are printed above the bars."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.bar: tqdm | None = None
        self.name, self.before = "", 0  # of the training whose epochs come, and how many it had

    def follow(self, lines: Iterable[str]) -> threading.Thread:
        """Read lines until they end, in a thread."""
        thread = threading.Thread(target=self._read, args=[lines], daemon=True)
        thread.start()
        return thread

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.show(line.rstrip("\n"))
        self._end()

    def show(self, line: str) -> None:
        """Take one line: an epoch moves the bar."""
        if resumed := RESUMED.fullmatch(line):
            self.before = int(resumed["epoch"]) - 1
        found = EPOCH.fullmatch(line)
        if not found:
            if line.strip():
                tqdm.write(line)
            return
        if self.bar is None or self.name != found["name"]:
            self._end()
            self.name = found["name"]
            self.bar = tqdm(
                total=int(found["epochs"]), initial=self.before, position=self.place, desc=self.name, unit="epoch",
                leave=False, dynamic_ncols=True,
            )  # fmt: skip
            self.before = 0
        self.bar.set_postfix_str(found["facts"], refresh=False)
        self.bar.update(int(found["epoch"]) - self.bar.n)
        if found["epoch"] == found["epochs"]:
            self._end()

    def _end(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar, self.name = None, ""
