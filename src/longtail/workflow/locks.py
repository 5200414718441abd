"""DVC's lock files, as far as we read them: which stages ran, and what they read and wrote."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from longtail.workflow import declaration, files, pipeline
from longtail.workflow.fingerprint import fingerprint

MAKERS = {"loss": "train", "refit": "refit", "fuse": "fuse"}  # of a cell's network: the stage for each kind of method
STAGES = ("train", "predict", "align", "evaluate")
STAGE_NAME = re.compile(
    rf"({'|'.join([*MAKERS.values(), *STAGES[1:]])})-(?P<plan>[^@]+)"
    r"@(?P<dataset>[^-@]+)-(?P<recipe>[^-@]+)-(?P<method>[^-@]+)-(?P<seed>\d+)"
)


class LockError(ValueError):
    """A lock, or a result file that it names, cannot be used; the message says which and what to do."""


def read_locks(root: Path) -> dict[str, dict[str, Any]]:
    """The stages of stages/dvc.lock and of every plan's lock file by name, which says the plan.

    Raises LockError when there is none or when one is no lock of DVC's schema 2.0.
    """
    paths = [path for path in (root / pipeline.lock(pipeline.SHARED), *pipeline.locks(root)) if path.exists()]
    if not paths:
        raise LockError(f"{root / 'stages'}: no dvc.lock in it; run `dvc repro` before `longtail track`")
    stages: dict[str, dict[str, Any]] = {}
    for path in paths:
        stages |= read_lock(path)
    return stages


def read_lock(path: Path) -> dict[str, dict[str, Any]]:
    """The stages of one lock file by name. Raises LockError when it is no lock of DVC's schema 2.0."""
    try:
        lock = declaration.load(path)
    except yaml.YAMLError as error:
        raise LockError(f"{path}: not YAML ({one_line(error)}); `git checkout {path}`?") from error
    stages = lock.get("stages") if isinstance(lock, dict) else None
    if not isinstance(stages, dict) or str(lock.get("schema")) != "2.0":
        raise LockError(f"{path}: not a lock of DVC's schema 2.0 (schema: '2.0', stages: {{name: ...}})")
    for name, entry in stages.items():
        if not isinstance(entry, dict) or "cmd" not in entry:
            raise LockError(f"{path}: stages.{name} is no entry with a cmd")
        for which in ("deps", "outs"):
            items = entry.get(which, [])
            if not isinstance(items, list) or not all(isinstance(item, dict) and "path" in item for item in items):
                raise LockError(f"{path}: stages.{name}.{which} is no list of {{path, md5, ...}}")
        declared = entry.get("params", {})
        if not isinstance(declared, dict) or not all(isinstance(values, dict) for values in declared.values()):
            raise LockError(f"{path}: stages.{name}.params is no {{file: {{key: value}}}}")
    return stages


def identity(entry: Mapping[str, Any]) -> str:
    """The fingerprint of a stage, from its entry in the lock; longtail.workflow.stage has the same while it runs."""
    return fingerprint(entry["cmd"], entry_files(entry, "deps"), keys(entry))


def adopted(root: Path, plan: str) -> dict[str, str]:
    """{fingerprint: the one before} of the plan's stages that `longtail adopt` recorded as those of later code."""
    path = root / pipeline.adopted(plan)
    return {row["now"]: row["was"] for row in files.read_csv(path)} if path.exists() else {}


def origin(fingerprint: str, before: Mapping[str, str]) -> str:
    """The fingerprint of the run that made what a stage has."""
    seen = {fingerprint}
    while (was := before.get(fingerprint)) and was not in seen:  # an edit may be taken back
        fingerprint = was
        seen.add(was)
    return fingerprint


def entry_files(entry: Mapping[str, Any], which: str) -> list[tuple[str, str]]:
    """(path, MD5) of each of the entry's `deps` or `outs`."""
    return [(item["path"], str(item.get("md5"))) for item in entry.get(which, ())]


def keys(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a lock's entry as {key: value}, as a stage has them (there is one params file)."""
    return {key: value for values in entry.get("params", {}).values() for key, value in values.items()}


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
