"""Which code a stage runs: one small file a script, with the MD5 of every file that the script imports.

A stage depends on its manifest instead of on twenty files: DVC re-runs it when a line of the manifest changes, so an
edit re-runs exactly the stages whose code it touches, and dvc.lock stays short. Nobody keeps lists by hand: imports are
read off the source, and what a script imports by a name in params.yaml (a loss, a reader, a way to refit a head) is
resolved here. The stage `manifests` writes them all; git keeps them, so that a diff shows what an edit touches.
"""

import ast
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "stages/code"
PACKAGE = "longtail"
# What cannot change a result: the stage's frame, the schema (it only refuses), tracking, and what a machine is called.
PLUMBING = {"__init__", "live", "machine", "manifest", "params", "ranges", "stage"}
# Scripts that need no manifest: what they do is decided by what they declare themselves.
WITHOUT = {"check", "manifests", "show"}


def scripts(root: Path, params: Mapping[str, Any]) -> dict[str, list[Path]]:
    """{manifest: the files that a stage starts from}: its script and what it loads by name.

    `train-<method>` for each method with a loss, `refit-<method>` for each that refits a head, `download-<source>`,
    and `<script>` for every other script of stages/.
    """
    library = root / "src" / PACKAGE
    found = {}
    for script in sorted((root / "stages").glob("*.py")):
        if script.stem in WITHOUT:
            continue
        if script.stem == "download":
            for name, block in params["sources"].items():
                found[f"download-{name}"] = [script, library / "sources" / block["reader"] / "__init__.py"]
        elif script.stem in ("train", "refit"):
            folder, key = {"train": ("losses", "loss"), "refit": ("heads", "refit")}[script.stem]
            for method, block in params["methods"].items():
                file = library / folder / f"{block.get(key, method)}.py"
                if file.exists():
                    found[f"{script.stem}-{method}"] = [script, file]
        else:
            found[script.stem] = [script]
    return found


def imports(file: Path, library: Path) -> set[Path]:
    """Files of the package that a file imports by its source, and those beside it that it names in a string."""
    found: set[Path] = set()
    beside = {path.name: path for path in file.parent.iterdir() if path.suffix not in ("", ".py")}  # templates, kernels
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
        elif isinstance(node, ast.Constant) and node.value in beside:
            found.add(beside[node.value])
        for name in names:
            path = library.parent / Path(*name.split("."))
            found |= {p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()}
    return found


def closure(start: list[Path], library: Path) -> set[Path]:
    """`start` and all that it imports, and that imports in turn, but for plumbing."""
    todo, found = list(start), set(start)
    while todo:
        file = todo.pop()
        if file.suffix != ".py":
            continue
        for new in imports(file, library) - found:
            if new.parent == library and new.stem in PLUMBING:  # but a subpackage's __init__ is no plumbing
                continue
            found.add(new)
            todo.append(new)
    return found


def text(root: Path, start: list[Path]) -> str:
    """The manifest of a stage: `<md5>  <path>`, a line a file, in the order of the paths.

    Raises FileNotFoundError for a file that is not there.
    """
    files = closure(start, root / "src" / PACKAGE)
    lines = {
        file.relative_to(root).as_posix(): hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
        for file in files
    }
    return "".join(f"{lines[path]}  {path}\n" for path in sorted(lines))


def texts(root: Path, params: Mapping[str, Any]) -> dict[str, str]:
    """All manifests, {name: text}."""
    return {name: text(root, start) for name, start in scripts(root, params).items()}


def entries(text: str) -> dict[str, str]:
    """{path: MD5} of a manifest."""
    return {path: md5 for md5, path in (line.split("  ", 1) for line in text.splitlines())}
