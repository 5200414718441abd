"""What the pipeline survives: kills at random moments, full disks, two at a time, and 200 cells in a row.

    python -m benchmarks.faults crashes [--tries 100] [--seed 0]
    python -m benchmarks.faults disk
    python -m benchmarks.faults concurrency
    python -m benchmarks.faults soak [--cells 200] [--seed 0]

Each makes a tiny project of its own (digits, a network of 4 channels, a few epochs) in a temporary folder, hurts it, and
holds what comes out against an undisturbed run: every file's bytes, nothing beside them, no process left. Writes
results/faults_<name>.md. docs/reliability.md says what this promises.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import RESULTS, ROOT, Report

PARTS = (
    "src", "stages", "data/published.csv", "data/published_incremental.csv", "benchmarks/results/time_to_accuracy.csv",
    ".dvc/config", "dvc.yaml", ".dvcignore", ".gitignore",
)  # fmt: skip
CELL = "digits_if20-digits-ce-0"
CHAIN = "digits_all-seed_1993-digits_b0_5-digits-replay-0"
SHARED, QUICK, STEPS = "stages/dvc.yaml", "stages/quick/dvc.yaml", "stages/incremental-quick/dvc.yaml"
ADDRESSES = {
    "download": f"{SHARED}:download@digits",
    "subsample": f"{SHARED}:subsample@digits_if20",
    "train": f"{QUICK}:train-quick@{CELL}",
    "predict": f"{QUICK}:predict-quick@{CELL}",
    "align": f"{QUICK}:align-quick@{CELL}",
    "evaluate": f"{QUICK}:evaluate-quick@{CELL}",
    "report": f"{QUICK}:report-quick",
    "chain: train": f"{STEPS}:train-incremental-quick@{CHAIN}",
    "chain: predict": f"{STEPS}:predict-incremental-quick@{CHAIN}",
    "chain: readout": f"{STEPS}:readout-incremental-quick@{CHAIN}",
    "chain: report": f"{STEPS}:report-incremental-quick",
}
DVC, LONGTAIL = [sys.executable, "-m", "dvc"], [sys.executable, "-m", "longtail.cli"]
END_S = 5.0  # what was asked to stop is to be gone by then
UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}")


class Project:
    """A tiny project: one method on digits, one chain of trainings, on their own in a folder.

    Args:
        folder: that is made.
        seeds: of the plan `quick`.
        plans: further plans, {name: data set}, each of one cell.
    """

    def __init__(self, folder: Path, seeds: int = 1, plans: Mapping[str, str] | None = None):
        self.root = folder
        self.mark = uuid.uuid4().hex  # in the environment of all that is started here
        for name in PARTS:
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "dvc.lock", "adopted.csv", "code", ".dvcignore")
                shutil.copytree(source, target, ignore=ignored)
            else:
                shutil.copyfile(source, target)
        params = small(yaml.safe_load((ROOT / "params.yaml").read_text()), seeds, plans or {})
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        for path in (folder / "stages").glob("*/dvc.yaml"):
            shutil.rmtree(path.parent)
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
        self.run([*LONGTAIL, "plan"])

    @property
    def environment(self) -> dict[str, str]:
        """What its commands have: one thread, checkpoints all the time, no MLflow, and a mark to know them by."""
        return {
            **os.environ, "PYTHONPATH": str(self.root / "src"), "OMP_NUM_THREADS": "1", "LONGTAIL_LIVE_AFTER": "off",
            "PYTHONUNBUFFERED": "1", "LONGTAIL_CHECKPOINT_S": "0.05", "LONGTAIL_FAULTS": self.mark,
            "DVC_SITE_CACHE_DIR": str(self.root.with_name(f"{self.root.name}-state")), "SHELL": "/bin/sh",
            "LONGTAIL_KERNELS": "off",
        }  # fmt: skip

    def start(self, command: Sequence[str], **more: str) -> subprocess.Popen[str]:
        """A command in a process group of its own; its output is one stream."""
        return subprocess.Popen(
            command, cwd=self.root, env={**self.environment, **more}, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, command: Sequence[str], **more: str) -> str:
        """The output of a command that has to succeed."""
        process = self.start(command, **more)
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command[2:])}: exit status {process.returncode}\n{output}")
        return output

    def processes(self) -> dict[int, str]:
        """{process: its command line} of all that were started here, zombies left out."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def tree(self) -> dict[str, Any]:
        """{file: its SHA-256, or its content for a lock file, whose order says when stages ran}."""
        found: dict[str, Any] = {}
        for path in self.root.rglob("*"):
            name = path.relative_to(self.root).as_posix()
            if not path.is_file() or name.startswith((".git/", ".dvc/")) or "__pycache__" in name:
                continue
            if (name.startswith("runs/.checkpoints/") and name.endswith(".lock")) or path.name == "machine.json":
                continue  # empty files that say who trains; what a machine measured of itself
            if name.endswith("dvc.lock"):
                found[name] = yaml.safe_load(path.read_text())
            else:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def damaged(self) -> list[str]:
        """What DVC's cache has under a name that is not its MD5, and a process that DVC believes to be at work."""
        wrong = []
        for path in (self.root / ".dvc/cache/files/md5").glob("??/*"):
            expected = path.parent.name + path.name.removesuffix(".dir")
            if not UNFINISHED.fullmatch(path.name) and hashlib.md5(path.read_bytes()).hexdigest() != expected:
                wrong.append(str(path.relative_to(self.root)))
        record = self.root / ".dvc/tmp/rwlock"
        named = {int(one) for one in re.findall(r'"pid": (\d+)', record.read_text())} if record.exists() else set()
        if running := [one for one in named if Path(f"/proc/{one}").exists()]:  # DVC drops those that are gone itself
            wrong.append(f"{record.relative_to(self.root)} names {running}")
        return wrong

    def forget(self, *addresses: str) -> None:
        """As if these stages had never run: no outs, no entry in a lock, nothing to restore them from."""
        shutil.rmtree(self.root / ".dvc/cache/runs", ignore_errors=True)
        for address in addresses:
            file, _, name = address.rpartition(":")
            path = self.root / file.replace(".yaml", ".lock")
            lock = yaml.safe_load(path.read_text())
            for out in lock["stages"].pop(name)["outs"]:
                target = self.root / out["path"]
                shutil.rmtree(target) if target.is_dir() else target.unlink()
            path.write_text(yaml.safe_dump(lock, sort_keys=False))


def small(params: dict[str, Any], seeds: int, plans: Mapping[str, str]) -> dict[str, Any]:
    """params.yaml with what a tiny project needs, and no more."""
    quick = params["plans"]["quick"] | {"methods": ["ce"], "seeds": list(range(seeds))}
    params["plans"] = {"quick": quick}
    for name, dataset in plans.items():
        params["plans"][name] = quick | {"datasets": [dataset], "seeds": [0]}
        params["datasets"][dataset] = params["datasets"]["digits_if20"] | {"seed": len(params["plans"])}
    keep = {"digits_if20", "digits_all", *plans.values()}
    params["datasets"] = {name: block for name, block in params["datasets"].items() if name in keep}
    params["sources"] = {"digits": params["sources"]["digits"]}
    params["features"] = {"unused": next(iter(params["features"].values())) | {"dataset": "digits_all"}}
    params["methods"] = {"ce": params["methods"]["ce"]}
    recipe = params["recipes"]["digits"]
    recipe |= {"epochs": 3, "batch_size": 64, "network": recipe["network"] | {"width": 4}}
    recipe["schedule"]["warmup_epochs"] = 1
    params["recipes"] = {"digits": recipe}
    params["evaluate"]["distribution_draws"] = 1
    chains = params["incremental"]
    chains["plans"] = {
        "incremental-quick": chains["plans"]["incremental-quick"] | {"trainings": ["replay"], "seeds": [0]}
    }
    for name, kept in (
        ("orders", "seed_1993"),
        ("protocols", "digits_b0_5"),
        ("recipes", "digits"),
        ("trainings", "replay"),
    ):
        chains[name] = {kept: chains[name][kept]}
    for part in ("first", "later"):
        block = chains["recipes"]["digits"].get(part)
        if block:
            block["epochs"] = 2
            block.get("schedule", {})["warmup_epochs"] = 0
    return params


# ---------------------------------------------------------------------------------------------------------- crashes


@dataclass
class Kind:
    """A way to interrupt a command: which of its processes are sent what.

    Attributes:
        who: `group`, `top` (the command itself), or a part of the command line of one of its processes.
    """

    name: str
    who: str
    signal: signal.Signals


KINDS = (
    Kind("kill -9 of the stage", "stages/", signal.SIGKILL),
    Kind("kill -9 of the command", "top", signal.SIGKILL),
    Kind("kill -9 of all", "group", signal.SIGKILL),
    Kind("Ctrl-C", "group", signal.SIGINT),
    Kind("SIGTERM to the command", "top", signal.SIGTERM),
    Kind("SIGTERM to all", "group", signal.SIGTERM),
)
JOB = Kind("kill -9 of the job", "longtail.workflow.jobs", signal.SIGKILL)


@dataclass(frozen=True)
class Target:
    """What is interrupted: a command, and the stages that it has to run."""

    name: str
    command: tuple[str, ...]
    stages: tuple[str, ...]


def targets() -> list[Target]:
    """Every stage by `dvc repro`, and a cell and a chain by `longtail run`."""
    single = [Target(name, (*DVC, "repro", address), (address,)) for name, address in ADDRESSES.items()]
    cell = tuple(ADDRESSES[name] for name in ("train", "predict", "align", "evaluate", "report"))
    chain = tuple(address for name, address in ADDRESSES.items() if name.startswith("chain"))
    return [
        *single,
        Target("longtail run, a cell", (*LONGTAIL, "run", "quick"), cell),
        Target("longtail run, a chain", (*LONGTAIL, "run", "incremental-quick"), chain),
    ]


@dataclass
class Outcome:
    """How an interruption went.

    Attributes:
        wrong: what was not as promised; empty when it was survived.
        end_s: seconds until nothing of it ran any more.
    """

    target: str
    kind: str
    moment: float
    end_s: float
    wrong: list[str] = field(default_factory=list)


class Crashes:
    """A project that is interrupted again and again, each time from the same state.

    Args:
        folder: for the project; the undisturbed one lies beside it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.project = Project(folder / "project")
        self.project.run([*DVC, "repro"])
        self.project.run([*DVC, "repro", STEPS])
        self.expected = self.project.tree()
        shutil.copytree(self.project.root, folder / "whole", symlinks=True)
        self.seconds: dict[str, float] = {}

    def prepare(self, target: Target) -> None:
        """The undisturbed project, without what the target makes."""
        shutil.rmtree(self.project.root)
        shutil.copytree(self.folder / "whole", self.project.root, symlinks=True)
        self.project.forget(*target.stages)

    def begin(self, target: Target) -> subprocess.Popen[str]:
        """Start the command and wait until its first stage begins."""
        process = self.project.start(target.command)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(("Running stage", "cell 1 of")):
                return process
        raise RuntimeError(f"{target.name}: nothing ran")

    def measure(self, target: Target) -> float:
        """Seconds from the beginning of its first stage to its end, undisturbed; once a target."""
        if target.name not in self.seconds:
            self.prepare(target)
            process = self.begin(target)
            began = time.monotonic()
            process.communicate()
            self.seconds[target.name] = time.monotonic() - began
            if self.project.tree() != self.expected:
                raise RuntimeError(
                    f"{target.name}: an undisturbed run differs: {difference(self.project.tree(), self.expected)}"
                )
        return self.seconds[target.name]

    def interrupt(self, target: Target, kind: Kind, moment: float) -> Outcome | None:
        """Interrupt it at this share of its time, and run it again; None when it had ended, or the stage had, before."""
        self.prepare(target)
        process = self.begin(target)
        time.sleep(moment * self.seconds[target.name])
        chosen = {"top": [process.pid], "group": [-process.pid]}.get(kind.who) or [
            pid for pid, command in self.project.processes().items() if kind.who in command.partition(" -c ")[0]
        ]
        if process.poll() is not None or not chosen:
            process.communicate()
            return None
        for pid in chosen:
            with suppress(ProcessLookupError):
                os.kill(pid, kind.signal)
        sent = time.monotonic()
        outcome = Outcome(target.name, kind.name, moment, 0.0)
        output = self._end(process, kind, outcome, sent)
        if kind.signal == signal.SIGINT and "stopped; the same command goes on" not in output and process.returncode:
            outcome.wrong.append("no word how to go on")
        again = self.project.start(target.command)
        said, _ = again.communicate()
        if again.returncode:
            outcome.wrong.append(f"the next run failed: {' '.join(said.split())[-300:]}")
        outcome.wrong += difference(self.project.tree(), self.expected) + self.project.damaged()
        return outcome

    def _end(self, process: subprocess.Popen[str], kind: Kind, outcome: Outcome, sent: float) -> str:
        """Wait until nothing of it runs; note how long that took, and end by force what does not."""
        limit = END_S if kind.name != KINDS[0].name else 60.0  # DVC ends by itself after its stage
        with suppress(subprocess.TimeoutExpired):
            process.wait(limit)
        while (left := self.project.processes()) and time.monotonic() - sent < limit:
            time.sleep(0.02)
        outcome.end_s = time.monotonic() - sent
        for pid, command in left.items():
            outcome.wrong.append(f"still there after {limit:.0f} s: {command}")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate()
        return output


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What is missing, what is too much, and what has other bytes."""
    return [
        *(f"missing: {name}" for name in sorted(expected.keys() - found.keys())),
        *(f"left over: {name}" for name in sorted(found.keys() - expected.keys())),
        *(f"other bytes: {name}" for name in sorted(found) if name in expected and found[name] != expected[name]),
    ]


def crashes(
    tries: int, seed: int, folder: Path, chosen: Sequence[str] = (), after: Callable[[list[Outcome]], None] = len
) -> list[Outcome]:
    """So many interruptions, every target and kind in turn, at moments that the seed draws.

    `after` is called with all outcomes so far after each.
    """
    bench, draw = Crashes(folder), random.Random(seed)
    every = [
        (target, kind)
        for target in targets()
        for kind in (*KINDS, *([JOB] if "longtail" in target.name else []))
        if not chosen or target.name in chosen
    ]
    draw.shuffle(every)
    outcomes: list[Outcome] = []
    while len(outcomes) < tries:
        target, kind = every[len(outcomes) % len(every)]
        bench.measure(target)
        outcome = None
        while outcome is None:
            outcome = bench.interrupt(target, kind, draw.random())
        outcomes.append(outcome)
        state = "; ".join(outcome.wrong) or "survived"
        print(
            f"{len(outcomes)}: {target.name}, {kind.name} at {outcome.moment:.0%}, gone after {outcome.end_s:.2f} s: {state}",
            flush=True,
        )
        after(outcomes)
    return outcomes


def write_crashes(outcomes: Sequence[Outcome], seed: int) -> None:
    """The table of survived / tried, a row a target, a column a kind."""
    report = Report(quiet=True)
    survived = sum(not one.wrong for one in outcomes)
    stopped = [one.end_s for one in outcomes if one.kind == "Ctrl-C"]
    report.say(
        "# Interrupted at random moments", "",
        f"{survived} of {len(outcomes)} survived: `python -m benchmarks.faults crashes --tries {len(outcomes)} --seed {seed}`.",
        "Survived: the same command works at once, every file ends with the bytes of an undisturbed run, no file is left over,",
        f"DVC's cache is whole and believes nobody to be at work, and nothing runs {END_S:.0f} s after the interruption.",
        f"After Ctrl-C nothing ran any more within {max(stopped, default=0):.1f} s at most.",
    )  # fmt: skip
    kinds = [kind.name for kind in (*KINDS, JOB)]
    rows = []
    for target in dict.fromkeys([*(target.name for target in targets())]):
        of_target = [[one for one in outcomes if (one.target, one.kind) == (target, kind)] for kind in kinds]
        rows.append(
            [target, *(f"{sum(not one.wrong for one in cell)} / {len(cell)}" if cell else "" for cell in of_target)]
        )
    report.table(["interrupted", *kinds], rows)
    failed = [one for one in outcomes if one.wrong]
    if failed:
        report.say("Not survived:", "")
        report.say(*(f"- {one.target}, {one.kind} at {one.moment:.0%}: {'; '.join(one.wrong)}" for one in failed))
    report.write(RESULTS / "faults_crashes.md")


@contextmanager
def place(folder: Path | None) -> Iterator[Path]:
    """The folder that was asked for, which stays, or a temporary one."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="longtail-faults-") as name:
        yield Path(name)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("crashes", help="interrupt every stage at random moments")
    one.add_argument("--tries", type=int, default=100)
    one.add_argument("--only", nargs="*", default=[], help="targets, e.g. train")
    for each in (one,):
        each.add_argument("--seed", type=int, default=0)
        each.add_argument("--folder", type=Path, help="for the project; it stays (default: a temporary one)")
        each.add_argument("--no-results", action="store_true", help="print only")
    args = parser.parse_args()
    with place(args.folder) as folder:
        if args.command == "crashes":
            write = len if args.no_results else partial(write_crashes, seed=args.seed)
            crashes(args.tries, args.seed, folder, args.only, write)


if __name__ == "__main__":
    main()
