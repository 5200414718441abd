"""What the pipeline survives: kills at random moments, full disks, two at a time, and 200 cells in a row.

    python -m benchmarks.faults crashes [--tries 100] [--seed 0]
    python -m benchmarks.faults disk
    python -m benchmarks.faults concurrency
    python -m benchmarks.faults soak [--cells 200] [--seed 0]

Each makes a tiny project of its own (digits, a network of 4 channels, a few epochs) in a temporary folder, hurts it,
and holds what comes out against an undisturbed run: every file's bytes, nothing beside them, no process left. Writes
results/faults_<name>.md. docs/reliability.md says what this promises.
"""

import argparse
import hashlib
import json
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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
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
KIND, TUNED = "stages/kinds/dvc.yaml", "stages/tuned/dvc.yaml"  # plans with the stages that `quick` has not
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
    "check": f"{SHARED}:check",
    "manifests": f"{SHARED}:manifests",
    "fisher": f"{SHARED}:fisher",
    "features": f"{SHARED}:features@digits_features",
    "refit": f"{KIND}:refit-kinds@digits_if20-digits-crt-0",
    "fuse": f"{KIND}:fuse-kinds@digits_if20-digits-balpoe_apart-0",
    "compare": f"{KIND}:compare-kinds@{CELL}",
    "readings": f"{KIND}:readings-kinds",
    "fine-tuning: train": f"{TUNED}:train-tuned@digits_if20-tune-ce-0",
    "fine-tuning: predict": f"{TUNED}:predict-tuned@digits_if20-tune-ce-0",
    "fine-tuning: refit": f"{TUNED}:refit-tuned@digits_if20-tune-crt-0",
}
DVC, LONGTAIL = [sys.executable, "-m", "dvc"], [sys.executable, "-m", "longtail.cli"]
END_S = 5.0  # what was asked to stop is to be gone by then
STOPPED = (
    "stopped; the same command goes on",  # ours
    "interrupted by the user",  # DVC's, between two stages
    "exited with -2",  # DVC's, of a stage that had not begun, or had done all and was being taken down
    "Use `dvc push`",  # DVC's last words: it had done all
)
OF_DVC = re.compile(r"\.[A-Za-z0-9_-]{22}\.tmp")  # dvc_objects.fs.utils.tmp_fname: beside a file that it links
UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}")


class Project:
    """A tiny project in a folder: one method on digits, and one chain of trainings."""

    def __init__(self, folder: Path):
        self.root = folder
        self.state = folder.with_name(f"{folder.name}-state")  # what DVC has for itself in /var/tmp
        self.mark = uuid.uuid4().hex  # in the environment of all that is started here

    def make(self, seeds: int = 1, plans: Mapping[str, str] | None = None) -> "Project":
        """Write its files.

        Args:
            seeds: of the plan `quick`.
            plans: further plans, {name: data set}, each of one cell.
        """
        folder = self.root
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
        return self

    @property
    def environment(self) -> dict[str, str]:
        """What its commands have: one thread, checkpoints all the time, no MLflow, and a mark to know them by."""
        return {
            **os.environ, "PYTHONPATH": str(self.root / "src"), "OMP_NUM_THREADS": "1", "LONGTAIL_LIVE_AFTER": "off",
            "PYTHONUNBUFFERED": "1", "LONGTAIL_CHECKPOINT_S": "0.05", "LONGTAIL_FAULTS": self.mark,
            "DVC_SITE_CACHE_DIR": str(self.state), "SHELL": "/bin/sh",
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
            at_work = name.startswith(("runs/.checkpoints/", "runs/.features/")) and name.endswith(".lock")
            if at_work or path.name == "machine.json":
                continue  # files that say who is at work, or was; what a machine measured of itself
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

    def locks(self) -> dict[str, str]:
        """{lock file: its text}."""
        paths = self.root.glob("**/dvc.lock")
        return {path.relative_to(self.root).as_posix(): path.read_text() for path in paths}

    def mend(self, committed: Mapping[str, str]) -> list[str]:
        """Do what docs/reliability.md says of files that plain DVC was writing when it was killed; which they were.

        Args:
            committed: the lock files as git has them.
        """
        mended = [name for name, text in self.locks().items() if not whole(text)]
        for name in mended:
            if name in committed:  # git checkout
                (self.root / name).write_text(committed[name])
            else:
                (self.root / name).unlink()
        record = self.root / ".dvc/tmp/rwlock"
        try:
            json.loads(record.read_text() if record.exists() else "{}")
        except json.JSONDecodeError:
            record.unlink()
            mended.append(record.relative_to(self.root).as_posix())
        for path in self.root.rglob("*.tmp"):
            if OF_DVC.fullmatch(path.name):
                path.unlink()
                mended.append(path.relative_to(self.root).as_posix())
        return mended

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


def whole(text: str) -> bool:
    """Whether DVC can work with a lock file of this text.

    One that is cut off after the path of an output passes DVC's schema, and then DVC fails for want of a hash.
    """
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    try:
        lock = yaml.safe_load(text)
        COMPILED_LOCKFILE_SCHEMA(lock)
    except (yaml.YAMLError, Invalid):
        return False
    stages = ((lock or {}).get("stages") or {}).values()
    return all(out.get("md5") for stage in stages for out in (*stage.get("deps", ()), *stage.get("outs", ())))


def small(params: dict[str, Any], seeds: int, plans: Mapping[str, str]) -> dict[str, Any]:
    """params.yaml with what a tiny project needs, and no more."""
    quick = params["plans"]["quick"] | {"methods": ["ce"], "seeds": list(range(seeds))}
    params["plans"] = {
        "quick": quick,
        "kinds": quick | {
            "methods": ["ce", "balanced_softmax", "crt", "balpoe_apart"], "trained": ["ce", "balanced_softmax"],
            "refit": ["crt"], "fuse": ["balpoe_apart"], "seeds": [0], "readings": True,
        },
        "tuned": quick | {
            "recipes": ["tune"], "methods": ["ce", "crt"], "trained": ["ce"], "refit": ["crt"], "seeds": [0],
        },
    }  # fmt: skip
    for name, dataset in plans.items():
        params["plans"][name] = quick | {"datasets": [dataset], "seeds": [0]}
        params["datasets"][dataset] = params["datasets"]["digits_if20"] | {"seed": len(params["plans"])}
    keep = {"digits_if20", "digits_all", *plans.values()}
    params["datasets"] = {name: block for name, block in params["datasets"].items() if name in keep}
    params["sources"] = {"digits": params["sources"]["digits"]}
    params["backbones"] |= {
        "small": {"library": "timm", "network": "test_efficientnet", "weights": "none", "resolution": 32}
    }
    params["features"] = {"digits_features": {"dataset": "digits_if20", "backbone": "small"}}
    params["methods"] = {name: params["methods"][name] for name in ("ce", "balanced_softmax", "crt", "balpoe_apart")}
    params["methods"]["crt"]["epochs"] = 3
    params["methods"]["balpoe_apart"]["fuse"] = ["ce", "balanced_softmax"]
    params["fisher"] |= {"few_images": [200], "many_images": 1000, "seeds": [0, 1], "taus": [[1], [0, 2]]}
    tune = params["recipes"]["tune"] | {"epochs": 2}
    tune["network"]["backbone"] = "small"
    recipe = params["recipes"]["digits"]
    recipe |= {"epochs": 3, "batch_size": 64, "network": recipe["network"] | {"width": 4}}
    recipe["schedule"]["warmup_epochs"] = 1
    params["recipes"] = {"digits": recipe, "tune": tune}
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
        cut_off: files that plain DVC had half written, mended as docs/reliability.md says.
    """

    target: str
    kind: str
    moment: float
    end_s: float
    wrong: list[str] = field(default_factory=list)
    cut_off: list[str] = field(default_factory=list)


class Bench:
    """A project that is disturbed again and again, each time from the same state.

    Args:
        folder: for the project. The undisturbed one, `whole`, lies beside it, and is taken where it is there.
        place: where the disturbed one is, if elsewhere.
    """

    def __init__(self, folder: Path, place: Path | None = None):
        self.whole = folder / "whole"
        if not self.whole.exists():
            first = Project(folder / "first").make()
            first.run([*DVC, "repro", "quick", STEPS, KIND, TUNED, ADDRESSES["fisher"], ADDRESSES["features"]])
            first.root.rename(self.whole)
        self.expected = Project(self.whole).tree()
        self.project = Project((place or folder) / "project")
        self.seconds: dict[str, float] = {}
        self.locks: dict[str, str] = {}  # as git has them when a target begins

    def prepare(self, target: Target) -> None:
        """The undisturbed project, without what the target makes."""
        shutil.rmtree(self.project.root, ignore_errors=True)
        shutil.copytree(self.whole, self.project.root, symlinks=True)
        self.project.forget(*target.stages)
        self.locks = self.project.locks()

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
        """Interrupt it at this share of its time, and run it again; None when it, or the stage, had ended before."""
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
        if kind.signal == signal.SIGINT and process.returncode and not any(word in output for word in STOPPED):
            outcome.wrong.append(f"no word of it: {output[-200:]}")
        outcome.cut_off = self.project.mend(self.locks)
        unreadable = [name for name in outcome.cut_off if not OF_DVC.fullmatch(Path(name).name)]
        if unreadable and target.command[: len(DVC)] != tuple(DVC):
            outcome.wrong.append(f"cut off: {', '.join(unreadable)}")
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
    tries: int, seed: int, folder: Path, chosen: Sequence[str] = (), after: Callable[[list[Outcome]], Any] = len
) -> list[Outcome]:
    """So many interruptions, every target and kind in turn, at moments that the seed draws.

    `after` is called with all outcomes so far after each.
    """
    bench, draw = Bench(folder), random.Random(seed)
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
        state = "; ".join(outcome.wrong) or f"survived{', mended: ' if outcome.cut_off else ''}"
        state += ", ".join(outcome.cut_off)
        print(
            f"{len(outcomes)}: {target.name}, {kind.name} at {outcome.moment:.0%}, "
            f"gone after {outcome.end_s:.2f} s: {state}",
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
        f"{survived} of {len(outcomes)} survived:",
        f"`python -m benchmarks.faults crashes --tries {len(outcomes)} --seed {seed}`.",
        "Survived: the same command works at once, every file ends with the bytes of an undisturbed run, no file is",
        "left over, DVC's cache is whole and believes nobody to be at work, and nothing runs",
        f"{END_S:.0f} s after the interruption.",
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
    mended = [one for one in outcomes if one.cut_off]
    if mended:
        report.say("Killed while plain DVC wrote a file in place, and mended as docs/reliability.md says:", "")
        report.say(*(f"- {one.target}, {one.kind} at {one.moment:.0%}: {', '.join(one.cut_off)}" for one in mended), "")
    failed = [one for one in outcomes if one.wrong]
    if failed:
        report.say("Not survived:", "")
        report.say(*(f"- {one.target}, {one.kind} at {one.moment:.0%}: {'; '.join(one.wrong)}" for one in failed))
    report.write(RESULTS / "faults_crashes.md")


# ------------------------------------------------------------------------------------------------------------- disk


@dataclass
class Case:
    """What was tried, and what was not as promised."""

    name: str
    said: str = ""
    wrong: list[str] = field(default_factory=list)


FULL = (
    "train",
    "evaluate",
    "report",
    "subsample",
    "predict",
    "chain: train",
    "longtail run, a cell",
)  # all kinds of outs
FREE_KIB = 1024  # DVC alone can work with it


def disk(folder: Path) -> Iterator[Case]:
    """Full disks, folders that cannot be written to, a cache that is gone. Needs root: it mounts."""
    small_disk = folder / "disk"
    small_disk.mkdir()
    system("mount", "-t", "tmpfs", "-o", "size=96m", "none", str(small_disk))
    try:
        bench = Bench(folder, small_disk)
        bench.project.state = folder / "state"
        by_name = {target.name: target for target in targets()}
        yield full(bench, by_name["train"], 0, "epoch 1/")  # the next checkpoint meets it
        yield full(bench, by_name["chain: train"], 0, "epoch 1/")
        for name in FULL:
            yield full(bench, by_name[name], FREE_KIB)
        yield read_only(bench, by_name["train"], "runs")
        yield read_only(bench, by_name["evaluate"], "results")
        yield read_only(bench, by_name["predict"], ".dvc/cache")
        for name in ("train", "evaluate", "chain: train"):
            yield without_cache(bench, by_name[name])
    finally:
        system("umount", "-R", str(small_disk))


def system(*command: str) -> None:
    """Run a command of the system's."""
    subprocess.run(command, check=True)


def attempt(
    bench: Bench, target: Target, case: Case, cause: str, when: str = "", then: Callable[[], None] = print
) -> bool:
    """Run the target, which may fail if it says why and leaves all else as it was; whether it failed.

    When it prints a line with `when` in it, `then` is called.
    """
    process = bench.project.start(target.command)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if when and when in line:
            then()
            when = ""
    process.wait()
    lines = [line.strip() for line in said.splitlines() if cause in line]
    case.said = min(lines, key=len, default="").replace(str(bench.project.root) + "/", "")
    if not process.returncode:
        return False
    if not lines:
        case.wrong.append(f"failed without a word of {cause!r}: {' '.join(said.split())[-200:]}")
    elif "/" not in case.said:
        case.wrong.append("the message names no file")
    found = bench.project.tree()
    for name, value in bench.expected.items():
        others = value
        if name.endswith("dvc.lock"):
            gone = {address.rpartition(":")[2] for address in target.stages} - found.get(name, {}).get(
                "stages", {}
            ).keys()
            others = {**value, "stages": {key: entry for key, entry in value["stages"].items() if key not in gone}}
        if name in found and found[name] != others:
            case.wrong.append(f"after the failure: other bytes: {name}")
    return True


def again(bench: Bench, target: Target, case: Case) -> None:
    """Run it once more, now that nothing is in its way."""
    process = bench.project.start(target.command)
    said, _ = process.communicate()
    if process.returncode:
        case.wrong.append(f"the next run failed: {' '.join(said.split())[-200:]}")
    case.wrong += difference(bench.project.tree(), bench.expected) + bench.project.damaged()


def full(bench: Bench, target: Target, free_kib: int, when: str = "") -> Case:
    """A disk that has so much room when the command starts, or from the moment on when it prints `when`."""
    case = Case(f"{free_kib} KiB free{f' from {when} on' if when else ''}, {target.name}")
    bench.prepare(target)
    ballast = bench.project.root.parent / "ballast"

    def fill() -> None:
        with open(ballast, "wb", buffering=0) as file, suppress(OSError):  # the training writes, too
            while (room := os.statvfs(ballast)).f_bavail * room.f_frsize > free_kib * 1024:
                file.write(bytes(4096))

    if not when:
        fill()
    failed = attempt(bench, target, case, "No space left on device", when, fill)
    ballast.unlink()
    case.said = case.said if failed else "there was room enough"
    again(bench, target, case)
    return case


def read_only(bench: Bench, target: Target, name: str) -> Case:
    """A folder that cannot be written to."""
    case = Case(f"{name} read-only, {target.name}")
    bench.prepare(target)
    where = str(bench.project.root / name)
    system("mount", "--bind", where, where)
    system("mount", "-o", "remount,ro,bind", where)
    try:
        if not attempt(bench, target, case, "Read-only file system"):
            case.wrong.append("it did not fail")
    finally:
        system("umount", where)
    again(bench, target, case)
    return case


def without_cache(bench: Bench, target: Target) -> Case:
    """DVC's cache is gone, and what the stage made."""
    case = Case(f"DVC's cache gone, {target.name}")
    bench.prepare(target)
    shutil.rmtree(bench.project.root / ".dvc/cache")
    again(bench, target, case)
    return case


# ------------------------------------------------------------------------------------------------------ concurrency


def both(*started: tuple[Project, Sequence[str]]) -> list[tuple[int, str]]:
    """Start these commands at once: the exit status and the output of each."""
    processes = [project.start(command) for project, command in started]
    outputs = [process.communicate()[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def concurrency(folder: Path) -> Iterator[Case]:
    """Two at a time: of one stage, one plan, two plans whose data are not there, two clones with one cache."""
    bench = Bench(folder)
    cell = next(target for target in targets() if target.name == "longtail run, a cell")
    yield two_repro(bench, cell)
    yield two_runs(bench, cell)
    yield two_clones(bench, folder)
    yield two_plans(folder)


def two_repro(bench: Bench, cell: Target) -> Case:
    """Plain DVC waits for nobody: one of the two may be refused, and has to say so."""
    case = Case("two `dvc repro`, one checkout")
    bench.prepare(cell)
    ended = both(*[(bench.project, [*DVC, "repro"])] * 2)
    refused = [output for status, output in ended if status]
    case.said = f"{len(refused)} of 2 refused"
    if len(refused) == 2:
        case.wrong.append("both were refused")
    if not all("busy" in output or "Unable to acquire lock" in output for output in refused):
        case.wrong.append(f"refused without a reason: {refused}")
    bench.project.run([*DVC, "repro"])
    case.wrong += difference(bench.project.tree(), bench.expected) + bench.project.damaged()
    return case


def two_runs(bench: Bench, cell: Target) -> Case:
    """Two `longtail run` of one plan: the second waits for the stages that the first one is at."""
    case = Case("two `longtail run`, one plan")
    bench.prepare(cell)
    ended = both(*[(bench.project, [*LONGTAIL, "run", "quick"])] * 2)
    case.said = f"exit status {', '.join(str(status) for status, _ in ended)}"
    case.wrong += [f"failed: {output[-500:]}" for status, output in ended if status]
    case.wrong += difference(bench.project.tree(), bench.expected) + bench.project.damaged()
    return case


def two_clones(bench: Bench, folder: Path) -> Case:
    """Two clones that have nothing yet and share a cache."""
    case = Case("two clones, one cache")
    clones = [Project(folder / name).make() for name in ("left", "right")]
    for clone in clones:
        clone.run([*DVC, "cache", "dir", "--local", str(folder / "shared-cache")])
    ended = both(*((clone, [*DVC, "repro"]) for clone in clones))
    case.said = f"exit status {', '.join(str(status) for status, _ in ended)}"
    case.wrong += [f"failed: {output[-500:]}" for status, output in ended if status]
    found = [clone.tree() for clone in clones]
    case.wrong += difference(*found)
    case.wrong += [
        f"other bytes: {name}"
        for name, value in found[0].items()
        if not name.endswith("dvc.lock") and bench.expected.get(name) != value
    ]
    return case


def two_plans(folder: Path) -> Case:
    """Two `longtail run` of plans on different data, in a checkout that has nothing yet."""
    case = Case("two `longtail run`, two plans, no data yet")
    plans = {"one": "digits_one", "two": "digits_two"}
    project, alone = (Project(folder / name).make(plans=plans) for name in ("together", "alone"))
    ended = both(*((project, [*LONGTAIL, "run", plan]) for plan in plans))
    case.said = f"exit status {', '.join(str(status) for status, _ in ended)}"
    case.wrong += [f"failed: {output[-500:]}" for status, output in ended if status]
    for plan in plans:
        alone.run([*LONGTAIL, "run", plan])
    case.wrong += difference(project.tree(), alone.tree()) + project.damaged()
    return case


def write_cases(title: str, name: str, cases: Iterable[Case]) -> None:
    """A table, a row a case, written again after each."""
    done: list[Case] = []
    for case in cases:
        print(f"{case.name}: {'; '.join(case.wrong) or 'as promised'}\n    {case.said}", flush=True)
        done.append(case)
        good = sum(not one.wrong for one in done)
        report = Report(quiet=True)
        report.say(f"# {title}", "", f"{good} of {len(done)} as promised: `python -m benchmarks.faults {name}`.")
        rows = [[one.name, one.said.replace("|", "/") or "-", "; ".join(one.wrong) or "yes"] for one in done]
        report.table(["case", "what was said", "as promised"], rows)
        report.write(RESULTS / f"faults_{name}.md")


# ------------------------------------------------------------------------------------------------------------- soak

PART = 8  # the soak is told in so many parts


def soak(cells: int, seed: int, folder: Path) -> list[dict[str, float]]:
    """One plan of so many cells, and every now and then something of it is killed; a row for each cell that began.

    The command is given again until it succeeds, as somebody would.
    """
    project, draw = Project(folder / "project").make(seeds=cells), random.Random(seed)
    rows: list[dict[str, float]] = []
    kills, began = 0, time.monotonic()
    every = [JOB, *KINDS]
    while True:
        process = project.start([*LONGTAIL, "run", "quick"])
        assert process.stdout is not None
        left = draw.randrange(5, 20)  # cells until the next kill
        started = 0
        for line in process.stdout:
            if not line.startswith("cell "):
                continue
            job = [pid for pid, command in project.processes().items() if JOB.who in command and "warm" not in command]
            started += 1
            for pid in job[:1]:
                with suppress(OSError):
                    status = Path(f"/proc/{pid}/status").read_text()
                    memory = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
                    handles = len(list(Path(f"/proc/{pid}/fd").iterdir()))
                    place = int(line.split()[1])
                    rows.append(
                        {
                            "cell": place,
                            "at_s": time.monotonic() - began,
                            "memory_mib": memory,
                            "handles": handles,
                            "since_kill": started,
                        }
                    )
            left -= 1
            if left == 0:
                time.sleep(draw.random() * 8)
                hurt(project, process, draw.choice(every))
                kills += 1
        if process.wait() == 0:
            break
        while project.processes():
            time.sleep(0.1)
    check_soak(project, cells)
    print(f"{cells} cells, {kills} kills, {time.monotonic() - began:.0f} s", flush=True)
    return [*rows, {"kills": kills, "seconds": time.monotonic() - began}]


def hurt(project: Project, process: subprocess.Popen[str], kind: Kind) -> None:
    """Send the signal to whom it is for, where that one is there."""
    chosen = {"top": [process.pid], "group": [-process.pid]}.get(kind.who) or [
        pid for pid, command in project.processes().items() if kind.who in command.partition(" -c ")[0]
    ]
    for pid in chosen:
        with suppress(ProcessLookupError):
            os.kill(pid, kind.signal)


def check_soak(project: Project, cells: int) -> None:
    """Every cell is there, DVC finds nothing to do, and five of them are made anew with the same bytes.

    Raises RuntimeError where that is not so.
    """
    done = list(project.root.glob("results/quick/cells/digits_if20/digits/ce/*/metrics.json"))
    if len(done) != cells:
        raise RuntimeError(f"{len(done)} of {cells} cells have measures")
    if "Running stage" in (said := project.run([*DVC, "repro", "quick"])).replace("Running stage 'quick'", ""):
        raise RuntimeError(f"something was left to do: {said[-500:]}")
    before = project.tree()
    for number in range(0, cells, max(1, cells // 5)):
        name = f"{CELL[:-1]}{number}"
        steps = [f"{QUICK}:{step}-quick@{name}" for step in ("train", "predict", "align", "evaluate")]
        project.run([*DVC, "repro", "-f", "-s", *steps])
    if wrong := difference(project.tree(), before):
        raise RuntimeError(f"made anew they differ: {wrong}")


def write_soak(cells: int, seed: int, rows: Sequence[dict[str, float]]) -> None:
    """A table, a row an eighth of the cells: are memory, handles and seconds flat?"""
    *samples, last = rows
    report = Report()
    report.say(
        f"# {cells} cells in one plan, killed {last['kills']:.0f} times", "",
        f"`python -m benchmarks.faults soak --cells {cells} --seed {seed}`: all ended, nothing was left,",
        f"and five cells made anew had the same bytes. {last['seconds'] / 60:.0f} minutes. Memory and handles are",
        "those of the job, the process that runs stage after stage, as a cell begins; seconds are from one cell's",
        "beginning to the next one's.",
    )  # fmt: skip
    by_part: dict[int, list[dict[str, float]]] = defaultdict(list)
    took: dict[int, list[float]] = defaultdict(list)
    for one, following in pairwise(samples):
        if following["cell"] == one["cell"] + 1 and following["since_kill"] == one["since_kill"] + 1:
            took[int((one["cell"] - 1) * PART / cells)].append(following["at_s"] - one["at_s"])
    for one in samples:
        by_part[int((one["cell"] - 1) * PART / cells)].append(one)
    table = []
    for part, found in sorted(by_part.items()):
        middle = {key: median(one[key] for one in found) for key in ("memory_mib", "handles")}
        names = f"{part * cells // PART + 1} to {(part + 1) * cells // PART}"
        seconds = [one for one in took[part] if one > 1]  # a cell that had run before the kill is passed in no time
        table.append(
            [
                names,
                f"{median(seconds):.1f}" if seconds else "-",
                f"{middle['memory_mib']:.0f}",
                f"{middle['handles']:.0f}",
            ]
        )
    report.table(["cells", "seconds a cell, median", "MiB", "handles"], table)
    report.write(RESULTS / "faults_soak.md")


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
    parser.add_argument("what", choices=["crashes", "disk", "concurrency", "soak"])
    parser.add_argument("--tries", type=int, default=100, help="of crashes")
    parser.add_argument("--cells", type=int, default=200, help="of the soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="of crashes: what is interrupted, e.g. train")
    parser.add_argument("--folder", type=Path, help="for the projects; it stays (default: a temporary one)")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C
    with place(args.folder) as folder:
        if args.what == "crashes":
            crashes(args.tries, args.seed, folder, args.only, partial(write_crashes, seed=args.seed))
        elif args.what == "disk":
            write_cases("No room, no right to write, no cache", "disk", disk(folder))
        elif args.what == "concurrency":
            write_cases("Two at a time", "concurrency", concurrency(folder))
        else:
            write_soak(args.cells, args.seed, soak(args.cells, args.seed, folder))


if __name__ == "__main__":
    main()
