"""What every stage script starts with: its flags, the params that it declares, and a guard.

DVC records code and params as they are when a stage ENDS. A file edited while a stage runs would be recorded as the one
that made the result; the guard compares both ends and fails the stage, so that nothing is recorded.
"""

import argparse
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

from longtail.workflow import declaration, files, manifest, parent
from longtail.workflow import params as schema
from longtail.workflow.fingerprint import fingerprint

WRITTEN = ("out", "model", "history", "history_out", "profile")  # flags of the scripts that name what they write
ROOM = 16 * 2**20  # bytes
UNFINISHED = re.compile(r"\..+\.([a-z0-9_]{8}|partial)")  # what `files.write_bytes` and `save_arrays_by_part` begin


@dataclass(frozen=True)
class Stage:
    """A stage as DVC has it, with the facts that determine its result.

    Attributes:
        name: as in dvc.yaml, after the colon.
        cmd: its command.
        deps: paths of its dependencies.
        keys: what it declares of params.yaml.
    """

    name: str
    cmd: str
    deps: list[str]
    keys: list[str]

    def facts(self, code: "Code") -> tuple[str, dict[str, Any]]:
        """The fingerprint of (command, dependencies' content, declared params), and those params."""
        values = declaration.load(Path("params.yaml"))
        found = [(dep, code.md5(dep, values) if manifest.is_manifest(dep) else md5(dep)) for dep in self.deps]
        params = pick(values, self.keys)
        return fingerprint(self.cmd, found, params), params

    def check_code(self, code: "Code", params: dict[str, Any]) -> None:
        """Raise ValueError when a manifest is not that of the code that there is."""
        for dep in self.deps:
            if manifest.is_manifest(dep) and code.md5(dep, params) != md5(dep):
                raise ValueError(f"{dep} is of other code than there is; run `dvc repro stages/dvc.yaml:manifests`")


class Code:
    """The code that there is, as manifests have it. It is parsed again only when a file has changed."""

    def __init__(self) -> None:
        self.state: list[tuple[str, str]] = []
        self.known: dict[str, str] = {}

    def md5(self, dep: str, params: dict[str, Any]) -> str:
        """What the MD5 of a manifest would be now; empty where there is no code for it."""
        files = [path for folder in ("src", "stages") for path in Path(folder).rglob("*") if is_code(path)]
        state = [(str(path), md5(path)) for path in sorted(files)]
        if state != self.state:
            self.state, self.known = state, {}
        if dep not in self.known:
            name = Path(dep).stem
            text = manifest.texts(Path.cwd(), params, [name]).get(name)
            self.known[dep] = "" if text is None else hashlib.md5(text.encode()).hexdigest()
        return self.known[dep]


def is_code(path: Path) -> bool:
    """Whether a manifest may depend on a file."""
    return path.suffix in (".py", *manifest.BESIDE)


def pick(values: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """The dotted keys of nested `values`, as {key: value}; KeyError names one that is not there."""
    picked = {}
    for key in keys:
        value: Any = values
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise KeyError(f"params.yaml has no {key}")
            value = value[part]
        picked[key] = value
    return picked


def md5(path: str | Path) -> str:
    """The MD5 of a file or a folder as DVC has it: of a folder, that of a list of its files, with `.dir` behind."""
    path = Path(path)
    if path.is_dir():
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        listed = [{"md5": md5(path / name), "relpath": name} for name in names]
        return f"{hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest()}.dir"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def declared() -> Stage:
    """The stage that DVC is running (it says so in DVC_STAGE).

    Raises SystemExit when no `dvc repro` runs this.
    """
    address = os.environ.get("DVC_STAGE")
    if not address:
        sys.exit(f"{sys.argv[0]} is a stage of the pipeline: run it with `dvc repro`, see README.md")
    if found := declaration.read(address):
        return Stage(address.rpartition(":")[2], *found)
    from dvc.dvcfile import load_file  # half a second: only for what the reader of declarations does not know
    from dvc.repo import Repo
    from dvc.stage.loader import StageLoader
    from dvc.utils import parse_target

    path, name = parse_target(address)
    with Repo() as repo:
        pipeline = load_file(repo, path or "dvc.yaml")
        # one stage of hundreds, and without dvc.lock: it takes seconds to read, and another dvc may be writing it
        stage = StageLoader(pipeline, pipeline.contents)[name]
    folder = Path(stage.wdir)
    keys = [key for dep in stage.deps if hasattr(dep, "params") for key in dep.params]
    deps = [Path(dep.fs_path).relative_to(folder).as_posix() for dep in stage.deps if not hasattr(dep, "params")]
    return Stage(stage.name, stage.cmd, sorted(deps), sorted(keys))


def resumed(checkpoint: Path) -> int | None:
    """The epoch that a training goes on with, from 1; None where it begins, or where its checkpoint is of no use."""
    if not checkpoint.exists():
        return None
    import torch

    try:  # whether it belongs to this training and can be read is the training's own business
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return int(state["training"]["epoch"])
    except Exception:
        return None


def own_device() -> None:
    """Give each of several processes of a cell a GPU of its own, where LONGTAIL_DEVICE says `cuda`.

    Raises ValueError for a kind of device that nothing here was written for, and for one GPU with several processes.
    """
    name = os.environ.get("LONGTAIL_DEVICE", "")
    kind, _, number = name.partition(":")
    if kind not in ("", "cpu", "cuda"):
        raise ValueError(f"LONGTAIL_DEVICE={name}: allowed are cpu, cuda and cuda:<number>")
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LONGTAIL_PROCESSES", "1")
    if kind != "cuda" or processes == "1":
        return
    if number:
        raise ValueError(
            f"LONGTAIL_DEVICE={name} with {processes} processes: each has a GPU of its own; say cuda, and which there "
            "are by CUDA_VISIBLE_DEVICES"
        )
    if "LOCAL_RANK" in os.environ:
        os.environ["LONGTAIL_DEVICE"] = f"cuda:{os.environ['LOCAL_RANK']}"


def sweep(paths: Iterable[str]) -> None:
    """Remove what a write of these files, or of files in these folders, left when it was killed.

    `longtail.workflow.files` writes `.<name>.<eight letters>` or `.<name>.partial` beside a file and renames it. A
    cell's folder below runs/ is its own, and DVC lets one stage at a time write there: nobody is at those files now.
    """
    for path in map(Path, paths):
        beside = path.parent.glob(f".{'*' if path.parts[0] == 'runs' else path.name}.*")
        for file in (*beside, *path.glob(".*.*")):
            if UNFINISHED.fullmatch(file.name) and file.is_file():
                file.unlink(missing_ok=True)


def check_room() -> None:
    """Raise OSError where the disk is all but full, as long as DVC has room for what it writes itself.

    On a disk without a byte left DVC cuts off its own record of running processes, and nothing works any more.
    """
    free = shutil.disk_usage(".").free
    if free < ROOM:
        left = f"{free / 2**20:.1f} MiB free where a stage wants {ROOM >> 20}: No space left on device"
        raise OSError(errno.ENOSPC, left, os.getcwd())


def said(error: OSError) -> str:
    """What the system says, and of which file: a full disk names none, so the write that met it is asked."""
    written = [frame.f_locals["path"] for frame, _ in traceback.walk_tb(error.__traceback__) if is_write(frame)]
    path = written[0] if written else error.filename
    if path is None or not error.strerror:
        return str(error)
    room = "; make room, and the same command goes on" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{path}: {error.strerror}{room}"


def is_write(frame: FrameType) -> bool:
    """Whether a frame is that of a function of `files` that writes the file `path`."""
    return frame.f_code in (files.write_bytes.__code__, files.save_arrays_by_part.__code__)


GIVEN: dict[str, Any] = {}  # params, where no `dvc repro` runs the stage: see `given`


@contextmanager
def given(params: Mapping[str, Any]) -> Iterator[None]:
    """Have stages take these declared params instead of asking DVC; for `longtail.evidence.probe`."""
    GIVEN["params"] = params
    try:
        yield
    finally:
        del GIVEN["params"]


@contextmanager
def run(*flags: str) -> Iterator[tuple[SimpleNamespace, dict[str, Any]]]:
    """Check params.yaml, then give the stage its flags and the params that it declares.

    `flags` are the names of the command's `--flags`, each with one value. The namespace has them as attributes, and
    `stage` (its name) and `fingerprint` beside them. Exits with a message when params.yaml is wrong, when the work
    raises ValueError, KeyError, FloatingPointError or OSError (bad input is no reason for a traceback), and when code,
    data or params changed while the stage ran.
    """
    parser = argparse.ArgumentParser()
    for flag in flags:
        parser.add_argument(f"--{flag}", required=True)
    args = SimpleNamespace(**vars(parser.parse_args()))
    if "params" in GIVEN:
        args.stage, args.fingerprint = "probe", "probe"
        yield args, dict(GIVEN["params"])
        return
    parent.be_ready()
    try:
        own_device()
        check_room()
        stage, code, checked = declared(), Code(), schema.load()
        args.stage = stage.name
        stage.check_code(code, checked)
        args.fingerprint, params = stage.facts(code)
        if epoch := resumed(Path("runs/.checkpoints") / f"{args.fingerprint}.pt"):
            print(f"{stage.name.partition('@')[2]} goes on from epoch {epoch}", flush=True)
        sweep(getattr(args, flag) for flag in WRITTEN if hasattr(args, flag))
        yield args, params
        if stage.facts(code)[0] != args.fingerprint:
            sys.exit(
                f"{stage.name}: its code, data or params were edited while it ran, so the result belongs to neither "
                "version and is not recorded; run `dvc repro` again"
            )
    except (ValueError, KeyError, FloatingPointError, OSError) as error:
        if os.environ.get("LONGTAIL_DEBUG"):
            raise
        if isinstance(error, OSError):
            sys.exit(f"error: {said(error)}")
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        sys.exit(f"error: {files.without_advice(text)}")
