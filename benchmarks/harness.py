"""What every program has without PyTorch: its flags, settings, processes that take turns, tables.

A process inherits its parent's peak memory as the system counts it, so the parent has to stay small: it measures
nothing itself and does not import PyTorch.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Setting:
    """What a process works on. All else is the recipe gala's (params.yaml), with crop and flip.

    Attributes:
        images: of the set; random bytes.
        policy, cutout, mixup_alpha: as in a recipe.
        turn: images that one turn takes, where a turn is not an epoch.
        side: of the matrix product that the machine is measured by.
    """

    depth: int = 32
    experts: int = 1
    classes: int = 100
    images: int = 2048
    batch_size: int = 128
    policy: str = "none"
    cutout: int = 0
    mixup_alpha: float = 0.0
    turn: int = 2048
    side: int = 4096

    @classmethod
    def from_command_line(cls) -> Self:
        """The setting that `Worker` started this process with."""
        return cls(**json.loads(sys.argv[1]))

    @property
    def steps(self) -> int:
        """Steps of a turn."""
        return -(-self.turn // self.batch_size)


class Worker:
    """A process that works when it is asked to, and waits otherwise: several can take turns on one machine.

    Args:
        module: of this folder; it calls `serve`.
    """

    def __init__(self, module: str, setting: Setting):
        self.module = module
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", json.dumps(asdict(setting))],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.hello: dict[str, Any] = self._answer()  # it is warm now, and does not disturb the others

    def ask(self, what: str) -> Any:
        """The answer to one of the questions that the module serves."""
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self._answer()

    def rate(self, what: str) -> float:
        """Images a second of a turn."""
        images, seconds = self.ask(what)
        return float(images / seconds)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"benchmarks.{self.module} ended with {self.process.wait()}; its reason is on stderr")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.process.kill()
        self.process.communicate()


def serve(hello: Mapping[str, Any], answers: Mapping[str, Callable[[], Any]]) -> None:
    """Answer the parent's questions, a line each, until it has no more."""
    to_parent, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    print(json.dumps(hello), file=to_parent, flush=True)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), file=to_parent, flush=True)


def peak_memory() -> float:
    """The largest resident set of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in KiB


def alternate(turns: int, *asks: Callable[[], float]) -> list[list[float]]:
    """Ask in turns, A B A B ...: what drifts on the machine meets all alike. A list of answers for each."""
    rounds = [[ask() for ask in asks] for _ in range(turns)]
    return [list(answers) for answers in zip(*rounds, strict=True)]


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios turn by turn."""
    return median(a / b for a, b in zip(above, below, strict=True))


class Report:
    """Markdown that is printed as it comes, unless it is to be quiet, and can be written at the end."""

    def __init__(self, quiet: bool = False) -> None:
        self.lines: list[str] = []
        self.quiet = quiet

    def say(self, *lines: str) -> None:
        """Add lines."""
        if not self.quiet:
            print(*lines, sep="\n", flush=True)
        self.lines += lines

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Add a table; the first column is text, the others are numbers."""
        self.say("", f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}")
        for row in rows:
            self.say(f"| {' | '.join(row)} |")
        self.say("")

    def write(self, path: Path) -> None:
        """Write all of it, with its folder where there is none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(self.lines).rstrip() + "\n")


def flags(doc: str | None, argv: Sequence[str] | None, *more: str) -> argparse.Namespace:
    """The flags that every program has, and switches of its own.

    `results` is None where nothing is to be written: a quick run writes only where it is told to.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny settings, seconds: says only that it runs")
    parser.add_argument("--results", type=Path, help="folder to write to (default: benchmarks/results)")
    for flag in more:
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args(argv)
    if args.results is None and not args.quick:
        args.results = RESULTS
    return args


def machine_line(about: Mapping[str, Any]) -> str:
    """The machine in a line, without its name and the date."""
    kernels = "with" if about["kernels"] else "WITHOUT"
    return (
        f"{about['cpu']}; cores: {about['cores']}; threads: {about['threads']}; PyTorch {about['torch']}; "
        f"{about['precision']}; {kernels} compiled kernels."
    )
