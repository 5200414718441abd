"""Cells whose code did change and whose numbers did not, recorded as those of the new code, on evidence.

The old code is taken from git: the commit that has the manifests that DVC's lock names. Old and new run beside each
other on this machine and do the same with each cell (longtail.evidence.probe). Only where every digit and byte is the
same does the lock get the new manifests, through DVC's own objects. The identity that the training had goes to
stages/<plan>/adopted.csv, so that MLflow knows the run again.
"""

import fnmatch
import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

from longtail.evidence import probe, verify
from longtail.training import inference, provenance
from longtail.workflow import chains, declaration, files, locks, manifest, pipeline
from longtail.workflow.cells import Cell
from longtail.workflow.locks import MAKERS, STAGE_NAME, STAGES

ADOPTED = ("stage", "was", "now", "code", "how")  # columns of adopted.csv
STEPS = 5
PROBE = "src/longtail/evidence/probe.py"
RECORD_AFTER_S = 60.0  # that a cell found to be the same waits for others of its plan, so much may be lost by a kill
WAIT_S = 1.0  # between two looks at whether another DVC has ended
EMULATED = ", emulated"  # what longtail.evidence.probe says of a precision that the processor does not do
PORTABLE = "stages/portable.py"  # runs a script of `argv`, on fewer instructions


MANIFESTS = """
import json, sys
from pathlib import Path
from longtail.workflow import declaration, manifest
print(json.dumps(manifest.texts(Path.cwd(), declaration.load(Path("params.yaml")), sys.argv[1:])))
"""


@dataclass
class Stale:
    """A cell of which only the code has changed.

    Attributes:
        cell: which.
        stages: its stages in the lock, in order: {name: entry}.
        changed: of those that are stale, the manifests that the lock has and that there are no more: {name: {path:
            MD5}}.
        bases: stages of other cells that its own start from, in order.
        now: the manifests that there are: {path: MD5}.
    """

    cell: Cell | chains.Cell
    stages: dict[str, dict[str, Any]]
    changed: dict[str, dict[str, str]]
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)
    now: dict[str, str] = field(default_factory=dict)


def adopt(root: Path, params: Mapping[str, Any], plans: Sequence[str], only: str = "*", steps: int = STEPS) -> int:
    """Adopt the stale cells of the plans, a printed line each; returns how many were not.

    Args:
        params: the content of params.yaml.
        only: pattern of <dataset>-<recipe>-<method>-<seed>.
        steps: of each epoch that is begun.

    Raises ValueError for an unknown plan.
    """
    cells = [one for one in stale(root, params, plans) if fnmatch.fnmatchcase(one.cell.name, only)]
    if not cells:
        print("nothing to adopt: no cell is of other code than there is")
        return 0
    refused, found = 0, Found(root)
    with ExitStack() as stack:
        stack.callback(found.record)  # of those before an error or Ctrl-C, too
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="longtail-adopt-")))
        here = stack.enter_context(worker(root))
        old: dict[str, Worker] = {}
        for one in cells:
            try:
                commit = commit_of(root, one.changed)
                if commit not in old:
                    if not git(root, "show", f"{commit}:{PROBE}"):
                        raise ValueError(f"{commit[:10]} is from before this way to look at code; run it again")
                    tree = checkout(root, commit, scratch / commit)
                    # both are looked at by the probe that there is: what it leaves out it leaves out of both
                    (tree / PROBE).write_bytes(Path(probe.__file__).read_bytes())
                    old[commit] = stack.enter_context(worker(tree))
                trouble = compare(root, one, old[commit], here, scratch, steps)
                if not trouble:
                    found.same(one, commit)
            except ValueError as error:
                trouble = str(error)
            refused += bool(trouble)
            if trouble:
                print(f"refused  {one.cell.plan} {one.cell.name}: {trouble}", flush=True)
    return refused


@dataclass
class Found:
    """Cells of which old and new code do the same, until they are recorded: a plan's lock file takes seconds to write.

    Attributes:
        root: of the repository.
        cells: of one plan, each with the commit of the old code.
        since: when the first of them was found, in seconds.
    """

    root: Path
    cells: list[tuple[Stale, str]] = field(default_factory=list)
    since: float = 0.0

    def same(self, one: Stale, commit: str) -> None:
        """Keep a cell; record all that there are once they have waited long enough."""
        if self.cells and self.cells[0][0].cell.plan != one.cell.plan:
            self.record()
        if not self.cells:
            self.since = time.monotonic()
        self.cells.append((one, commit))
        if time.monotonic() - self.since > RECORD_AFTER_S:
            self.record()

    def record(self) -> None:
        """Write them, and say so."""
        cells, self.cells = self.cells, []
        if cells:
            record(self.root, cells)
        for one, _ in cells:
            stages = ", ".join(name.split("-")[0] for name in one.changed)
            print(f"adopted  {one.cell.plan} {one.cell.name}: {stages}", flush=True)


def stale(root: Path, params: Mapping[str, Any], plans: Sequence[str]) -> list[Stale]:
    """The cells with stages of other code than there is, and nothing else that has changed.

    Raises ValueError for an unknown plan.
    """
    known = params["plans"] | chains.plans(params)
    for plan in plans:
        if plan not in known:
            raise ValueError(f"plan {plan!r} is not in params.yaml; there are {', '.join(known)}")
    lock = locks.read_locks(root)
    now = {f"{manifest.FOLDER}/{name}.txt": text for name, text in manifest.texts(root, params).items()}
    names = verify.targets(root, {plan: known[plan] for plan in plans})
    otherwise = {  # moved for another reason than its code: that needs a run, not an adoption
        line.split(":")[0] for line in verify.moved(root, names) if f" {manifest.FOLDER}/" not in line
    }
    made = {out["path"]: name for name, entry in lock.items() for out in entry.get("outs", ())}
    cells: dict[Cell | chains.Cell, Stale] = {}
    order = {kind: place for place, kind in enumerate((*MAKERS.values(), *STAGES[1:], "compare", "readout"))}
    for name in sorted(names, key=lambda name: order.get(name.split("-")[0], 0)):
        cell = cell_of(name)
        if cell is None:
            continue  # a report: seconds for `dvc repro`
        one = cells.setdefault(cell, Stale(cell, {}, {}))
        one.stages[name] = lock[name]
        for dep in lock[name].get("deps", ()):
            if dep["path"] in now and dep.get("md5") != md5(now[dep["path"]]):
                one.changed.setdefault(name, {})[dep["path"]] = dep["md5"]
                one.now[dep["path"]] = md5(now[dep["path"]])
            other = made.get(dep["path"], name)
            if STAGE_NAME.fullmatch(other) and not other.endswith(f"@{cell.name}"):
                one.bases[other] = lock[other]
    return [one for one in cells.values() if one.changed and not otherwise & one.stages.keys()]


def cell_of(stage: str) -> Cell | chains.Cell | None:
    """The cell, or the chain of trainings, that a stage of the lock belongs to."""
    if match := STAGE_NAME.fullmatch(re.sub("^compare-", "evaluate-", stage)):  # which not every plan has
        return Cell(**match.groupdict())
    kind, _, rest = stage.partition("-")
    plan, _, name = rest.partition("@")
    return chains.Cell.parse(plan, name) if kind in chains.STAGES and name else None


def md5(text: str | bytes) -> str:
    """As DVC has it."""
    return hashlib.md5(text if isinstance(text, bytes) else text.encode(), usedforsecurity=False).hexdigest()


# --- the old code -------------------------------------------------------------------------------------------


def git(root: Path, *args: str) -> bytes:
    """The output of a git command; empty where it fails."""
    return subprocess.run(["git", *args], cwd=root, capture_output=True, check=False).stdout


@cache
def content_at(root: Path, commit: str, path: str) -> str:
    """The MD5 of a file of a commit."""
    return md5(git(root, "show", f"{commit}:{path}"))


@cache
def commits(root: Path, path: str) -> list[str]:
    """The commits after which a file was changed, newest first, HEAD before them all."""
    touched = git(root, "log", "--format=%H", "--", path).decode().split()
    before = git(root, "log", "--format=%P", "--", path).decode().split()
    head = git(root, "rev-parse", "HEAD").decode().split()
    return [*dict.fromkeys([*head, *before, *touched])]


def commit_of(root: Path, changed: Mapping[str, Mapping[str, str]]) -> str:
    """The latest commit that has the manifests of these stages, and the code that they are of.

    A commit of edited code whose manifests were not written anew has the former and not the latter: to compare with it
    would be to compare the new code with itself.

    Raises ValueError when there is none.
    """
    wanted = {path: was for manifests in changed.values() for path, was in manifests.items()}
    for path in wanted:
        for commit in commits(root, path):
            if all(content_at(root, commit, one) == was for one, was in wanted.items()) and (
                wanted.items() <= made_at(root, commit, tuple(wanted)).items()
            ):
                return commit
    path, was = next(iter(wanted.items()))
    raise ValueError(
        f"no commit here has the code that it is of ({path} with MD5 {was}): "
        "was it never committed, or is the history cut off?"
    )


@cache
def made_at(root: Path, commit: str, paths: tuple[str, ...]) -> dict[str, str]:
    """{manifest: the MD5 of what the code of a commit gives for it}."""
    with tempfile.TemporaryDirectory(prefix="longtail-adopt-") as folder:
        tree = checkout(root, commit, Path(folder))
        names = [Path(path).stem for path in paths]
        env = {**os.environ, "PYTHONPATH": str(tree / "src")}
        # as that commit writes them, in its own words
        asked = subprocess.run(
            [sys.executable, "-c", MANIFESTS, *names], cwd=tree, env=env, capture_output=True, text=True, check=False
        )
        if asked.returncode:
            texts = manifest.texts(tree, declaration.load(tree / "params.yaml"), names)
        else:
            texts = json.loads(asked.stdout)
        return {f"{manifest.FOLDER}/{name}.txt": md5(text) for name, text in texts.items()}


def checkout(root: Path, commit: str, folder: Path) -> Path:
    """The files of a commit, in a folder of their own."""
    with tarfile.open(fileobj=io.BytesIO(git(root, "archive", commit))) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python has none before 3.11.4
        archive.extractall(folder)
    return folder


# --- old and new beside each other --------------------------------------------------------------------------


@dataclass
class Worker:
    """A process that runs longtail.evidence.probe with the code of a tree."""

    tree: Path
    process: "subprocess.Popen[str]"

    def ask(self, job: Mapping[str, Any]) -> None:
        """Send a job."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({**job, "tree": str(self.tree)}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its answer says so

    def read(self) -> dict[str, Any]:
        """Its answer, which may be an error."""
        output: IO[str] | None = self.process.stdout
        line = output.readline() if output else ""
        found: dict[str, Any] = json.loads(line) if line else {"error": "it ended without an answer"}
        return found

    def known(self, found: Mapping[str, Any]) -> Mapping[str, Any]:
        """What it found. Raises ValueError when it could not look."""
        if "error" in found:
            raise ValueError(f"the code in {self.tree} failed: {found['error']}")
        return found


@contextmanager
def worker(tree: Path) -> Iterator[Worker]:
    """A process with the code of `tree`, one thread, no tracking; it ends with the block."""
    env = {key: value for key, value in os.environ.items() if key not in ("DVC_STAGE", "LONGTAIL_PROCESSES")}
    env |= {
        "PYTHONPATH": str(tree / "src"),
        "OMP_NUM_THREADS": "1",
        "LONGTAIL_LIVE_AFTER": "off",
        "LONGTAIL_QUIET": "1",
    }
    command = [sys.executable, "-m", "longtail.cli", "probe"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tree, env=env, text=True
    ) as process:
        try:
            yield Worker(tree, process)
        finally:
            process.kill()


def compare(root: Path, one: Stale, old: Worker, new: Worker, scratch: Path, steps: int) -> str:
    """The first difference between what old and new code do with a cell; empty when there is none.

    Raises ValueError when one of them fails, and when the cell cannot be looked at on this machine.
    """
    about = job(root, one, steps)
    folders = [Path(tempfile.mkdtemp(dir=scratch)) for _ in range(2)]
    for process, folder in zip((old, new), folders, strict=True):
        process.ask({**about, "folder": str(folder)})
    answers = [process.read() for process in (old, new)]  # both, or the next cell would be answered with this one's
    was, now = (process.known(found) for process, found in zip((old, new), answers, strict=True))
    emulated = any(place.endswith(EMULATED) for place in now["states"]) or not done_here(one)
    if emulated and (kernels := changed_kernels(root, one, old.tree)):
        raise ValueError(
            f"{kernels} changed, and this processor does not do the precision that the cell was trained in"
        )
    contents = [
        {path: content(folder / path) for path in found["written"] if Path(path).name != provenance.FILE}
        for folder, found in zip(folders, (was, now), strict=True)
    ]
    return difference(was["states"], now["states"]) or other_bytes(*contents)


def done_here(one: Stale) -> bool:
    """Whether this machine does the precision of a chain's trainings; those of other cells say it of themselves."""
    if not isinstance(one.cell, chains.Cell):
        return True
    device = inference.find_device()
    asked = {
        value["first"]["precision"]
        for entry in one.stages.values() for value in locks.keys(entry).values()
        if isinstance(value, Mapping) and "first" in value
    }  # fmt: skip
    return all(inference.precision_on(device, precision) == precision for precision in asked)


def changed_kernels(root: Path, one: Stale, old: Path) -> str:
    """The compiled files among the definitions that changed: what they do depends on the processor."""
    titles: set[str] = set()
    for path in {path for manifests in one.changed.values() for path in manifests}:
        was, now = (manifest.entries((tree / path).read_text()) for tree in (old, root))
        titles |= {title for title, _ in was ^ now}
    return ", ".join(sorted(title for title in titles if title.endswith(".cpp")))


def job(root: Path, one: Stale, steps: int) -> dict[str, Any]:
    """What longtail.evidence.probe is to do with a cell: its stages up to the last one that is of other code.

    What comes after is the same code, and its input the same bytes, or the cell is refused.

    Raises ValueError when its data are not there.
    """
    entries = {**one.bases, **one.stages}
    data, stages = {}, []
    last = max(place for place, name in enumerate(entries) if name in one.changed)
    for name, entry in [*entries.items()][: last + 1]:
        outs = [out["path"] for out in entry.get("outs", ())]
        argv = entry["cmd"].split()[1:]
        if f"{manifest.FOLDER}/{Path(PORTABLE).stem}.txt" in one.changed.get(name, ()):
            raise ValueError(f"{PORTABLE} changed, which decides how all of it is computed: run it again")
        if argv[0] == PORTABLE:  # old and new code run on this machine, side by side: any way of computing will do
            argv = argv[1:]
        stages.append({"argv": argv, "params": locks.keys(entry), "outs": outs})
        for dep in entry.get("deps", ()):
            if dep["path"].startswith("data/"):
                data[dep["path"]] = str(root / dep["path"])
                if not (root / dep["path"]).exists() or md5((root / dep["path"]).read_bytes()) != dep["md5"]:
                    made = f"{pipeline.SHARED}:subsample@{Path(dep['path']).stem}"
                    raise ValueError(f"{dep['path']} is not there as {name} read it; `dvc repro {made}` makes it")
    first = next(iter(one.stages))
    training = None
    if first in one.changed and first.startswith("train-") and isinstance(one.cell, Cell):
        read = locks.keys(one.stages[first])
        if "backbone" in read[f"recipes.{one.cell.recipe}"]["network"]:
            raise ValueError("fine-tuned with other code: no comparison begins its epochs, train it again")
        training = {
            "data": str(root / "data" / "long_tail" / f"{one.cell.dataset}.npz"),
            "recipe": read[f"recipes.{one.cell.recipe}"], "method": one.cell.method,
            "block": read[f"methods.{one.cell.method}"], "seed": int(one.cell.seed),
        }  # fmt: skip
    about = {"stages": stages, "data": data, "training": training, "steps": steps}
    return about | ({"chain": True} if isinstance(one.cell, chains.Cell) else {})


def difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first other digit of a loss, else the first epoch whose weights differ; empty when all is the same."""
    if was.keys() != now.keys():
        return f"looked at {', '.join(was)} and now at {', '.join(now)}"
    for place in was:
        for step, (old, new) in enumerate(zip(was[place]["losses"], now[place]["losses"], strict=True), 1):
            if old != new:
                same = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
                shown = [f"{text[:same]}[{text[same : same + 1]}]{text[same + 1 :]}" for text in (old, new)]
                return f"{place}, step {step}: the loss was {shown[0]} and is {shown[1]}"
        if was[place]["weights"] != now[place]["weights"]:
            return f"{place}: the losses are the same, the weights after them are not"
    return ""


def content(path: Path) -> str:
    """The SHA-256 of a file, without the part of it that says only what computed it (`provenance`)."""
    if path.name in ("metrics.json", "summary.json"):
        measures = {key: value for key, value in files.read_json(path).items() if key != "provenance"}
        return hashlib.sha256(json.dumps(measures, sort_keys=True).encode()).hexdigest()
    if path.suffix != ".npz":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = hashlib.sha256()
    for name, array in sorted(files.load_arrays(path).items()):
        if name != "provenance":
            found.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return found.hexdigest()


def other_bytes(was: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first file that the stages write otherwise."""
    for path in sorted(was.keys() | now.keys()):
        if was.get(path) != now.get(path):
            how = (
                "other bytes" if path in was and path in now else "not written" if path in was else "not written before"
            )
            return f"on a small copy of the data, {path}: {how}"
    return ""


# --- the record ---------------------------------------------------------------------------------------------


@contextmanager
def alone(repo: Any) -> Iterator[None]:
    """DVC's lock of the repository, waited for as long as another command has it."""
    from dvc.lock import LockError

    said = False
    while True:
        try:
            repo.lock.lock()
            break
        except LockError as error:
            if not said:
                print(f"adopt waits: {error}", file=sys.stderr, flush=True)
            said = True
            time.sleep(WAIT_S)
    try:
        yield
    finally:
        repo.lock.unlock()


def record(root: Path, cells: Sequence[tuple[Stale, str]]) -> None:
    """Give the lock's entries of cells of a plan the manifests of the code that there is, and keep the identities of
    their trainings; each cell comes with the commit of the old code.

    Raises ValueError where the code has changed since the cells were compared.
    """
    from dvc.repo import Repo  # half a second: only where there is something to write
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.meta import Meta

    logging.getLogger("dvc").setLevel(logging.WARNING)  # it says so of each cell
    plan = cells[0][0].cell.plan
    file = pipeline.file(plan)
    changed = {name: (was, commit) for one, commit in cells for name, was in one.changed.items()}
    for path, wanted in {path: wanted for one, _ in cells for path, wanted in one.now.items()}.items():
        if md5((root / path).read_bytes()) != wanted:
            raise ValueError(f"{path} has changed since these cells were looked at; `longtail adopt {plan}` again")
    with Repo(str(root)) as repo, alone(repo):
        before = locks.read_lock(root / pipeline.lock(file))
        stages = [repo.stage.get_target(f"{root / file}:{name}") for name in changed]
        for stage in stages:
            for path, was in changed[stage.name][0].items():
                content = (root / path).read_bytes()
                for dep in stage.deps:
                    if dep.fs_path == str(root / path) and dep.hash_info.value == was:
                        dep.hash_info, dep.meta = HashInfo("md5", md5(content)), Meta(size=len(content))
        stages[0].dvcfile._lockfile.dump_stages(stages)
        after = locks.read_lock(root / pipeline.lock(file))
        kept = root / pipeline.adopted(plan)
        rows = files.read_csv(kept) if kept.exists() else []
        rows += [
            {"stage": name, "was": locks.identity(before[name]), "now": locks.identity(after[name]),
             "code": commit[:10], "how": "adopted"}
            for name, (_, commit) in changed.items()
            if name.split("-")[0] in MAKERS.values() and locks.identity(before[name]) != locks.identity(after[name])
        ]  # fmt: skip
        if rows:
            files.write_csv(kept, rows, ADOPTED)
