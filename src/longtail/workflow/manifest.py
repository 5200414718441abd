"""Which code a stage runs: one small file a script, by what the code means (longtail.workflow.meaning).

A stage depends on its manifest instead of on twenty files: DVC re-runs it when the manifest changes, so an edit re-runs
exactly the stages whose code it touches, and dvc.lock stays short. The first line is the hash of all that the stage can
reach, as one program: comments, docstrings, layout and the module in which a definition lies are no part of it. The
lines below say which definitions those are, so that a diff shows what an edit touches. Nobody keeps lists by hand; what
a script imports by a name in params.yaml (a loss, a reader, a way to refit a head) is resolved here. The stage
`manifests` writes them all, and git keeps them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtail.workflow.meaning import Package, Unit, program, reached

FOLDER = "stages/code"
BESIDE = (".cpp", ".j2", ".npz")  # what modules name beside Python: kernels, templates, tables
PACKAGE = "longtail"
# What cannot change a result: the stage's frame, the schema (it only refuses), tracking, and what a machine is.
PLUMBING = frozenset(
    f"{PACKAGE}.{name}"
    for name in (
        *("tracking.live", "training.machine", "training.provenance"),
        *("workflow.declaration", "workflow.fingerprint", "workflow.jobs"),
        *("workflow.manifest", "workflow.meaning", "workflow.params", "workflow.parent", "workflow.ranges"),
        "workflow.stage",
        "workflow.warm",
    )
)
# Scripts that need no manifest: what they do is decided by what they declare themselves.
WITHOUT = {"check", "manifests", "show"}
EXPORTS = {"losses": "Loss", "heads": "refit", "data/sources": "read"}  # what is loaded by a name in params.yaml
# Scripts with a manifest for each method: the folder of what they load, and the key of its name in the method's block.
BY_METHOD = {
    "train": ("losses", "loss"), "finetune": ("losses", "loss"), "stream_train": ("losses", "loss"),
    "refit": ("heads", "refit"), "finetune_refit": ("heads", "refit"), "stream_refit": ("heads", "refit"),
}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """What a stage starts from: its script, and the dotted name of what it loads by name, if it does."""

    script: Path
    loads: str | None = None


def starts(root: Path, params: Mapping[str, Any]) -> dict[str, Start]:
    """{manifest: its start}.

    `train-<method>`, `finetune-<method>` and `stream_train-<method>` for each method with a loss, `refit-<method>` and
    the like for each that refits a head, `incremental_train-<training>` and `stream_incremental_train-<training>` for
    each training of chains, `download-<source>`, and `<script>` for every other script of stages/.
    """
    found = {}
    for script in sorted((root / "stages").glob("*.py")):
        if script.stem in WITHOUT:
            continue
        if script.stem == "download":
            for name, block in params["sources"].items():
                found[f"download-{name}"] = Start(script, _export(root, "data/sources", block["reader"]))
        elif script.stem in BY_METHOD:
            folder, key = BY_METHOD[script.stem]
            for method, block in params["methods"].items():
                export = _export(root, folder, block.get(key, method))
                if export:
                    found[f"{script.stem}-{method}"] = Start(script, export)
        elif script.stem in ("incremental_train", "stream_incremental_train"):
            for name, block in params.get("incremental", {}).get("trainings", {}).items():
                found[f"{script.stem}-{name}"] = Start(script, _export(root, "losses", block["loss"]))
        else:
            found[script.stem] = Start(script)
    return found


def _export(root: Path, folder: str, name: str) -> str | None:
    """The dotted name of what <folder>/<name> exports, or None when there is no such file."""
    path = root / "src" / PACKAGE / folder / name
    there = path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    return f"{PACKAGE}.{folder.replace('/', '.')}.{name}.{EXPORTS[folder]}" if there else None


def package(root: Path) -> Package:
    """The library below `root`, as the manifests read it."""
    return Package(root / "src", PACKAGE, PLUMBING, BESIDE)


def units(library: Package, start: Start) -> list[Unit]:
    """All that a stage can reach.

    Raises ValueError when the file that it loads by name does not export what it should.
    """
    begin = [library.at(start.script).whole]
    if start.loads:
        reference = library.resolve(start.loads)
        if reference is None or not reference.units:
            module, _, name = start.loads.rpartition(".")
            raise ValueError(f"src/{module.replace('.', '/')}: defines no {name}")
        begin += reference.units
    return reached(begin)


def text(library: Package, start: Start) -> str:
    """The manifest of a stage: `<SHA-256>  program`, then `<digest>  <definition>`, a line a definition, by name."""
    found = units(library, start)
    lines = sorted(f"{unit.title}\0{unit.digest}" for unit in found)
    pairs = (line.split("\0") for line in lines)
    return f"{program(found)}  program\n" + "".join(f"{digest}  {title}\n" for title, digest in pairs)


def texts(root: Path, params: Mapping[str, Any], names: Iterable[str] | None = None) -> dict[str, str]:
    """Manifests, {name: text}: all, or those of these names that there are."""
    library, found = package(root), starts(root, params)
    return {name: text(library, start) for name, start in found.items() if names is None or name in names}


def is_manifest(path: str) -> bool:
    """Whether a dependency of a stage is a manifest."""
    return path.startswith(f"{FOLDER}/")


def entries(text: str) -> set[tuple[str, str]]:
    """{(definition, digest)} of a manifest, `program` left out."""
    pairs = (line.split("  ", 1) for line in text.splitlines()[1:])
    return {(title, digest) for digest, title in pairs}
