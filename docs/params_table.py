"""Ask DVC which stages re-run when a line of params.yaml changes, and write docs/params.md.

    python docs/params_table.py            # writes the table
    python docs/params_table.py --check    # exits with 1 when the committed one is no longer true
    python docs/params_table.py --check --every 4    # a quarter of its lines, and which lines there are

Each leaf is changed in a copy of the pipeline's files, one at a time. DVC's own comparison of the declared params says
which stages that touches, and DVC's graph what follows them; a name in a plan also makes and drops stages.
"""

import argparse
import contextlib
import copy
import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from dvc.dependency import param
from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "params.md"
STEPS = (
    "check",
    "download",
    "subsample",
    "features",
    "index",
    "indexed_features",
    "stream",
    "train",
    "refit",
    "fuse",
    "predict",
    "align",
    "evaluate",
    "compare",
    "readings",
    "readout",
    "fisher",
    "report",
    "quick",
)
BLOCK = re.compile(r"incremental\.(recipes|trainings|protocols|orders)\.\w+")  # all its lines touch the same stages
HEAD = """# What re-runs when a line of params.yaml changes

Made by `python docs/params_table.py`, which changes each line in a copy and asks DVC; the suite asks about some again.
`check` re-runs for every line, `manifests` for those under methods and sources: a second or two, and nothing follows
from either but for another loss or reader. 'Follows' holds where an out really changes: DVC stops a chain there else.

| line of params.yaml | touches | follows |
| --- | --- | --- |
"""


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings; an empty block, a list and a BLOCK are leaves."""
    if isinstance(values, dict) and values and not BLOCK.fullmatch(prefix):
        for key, value in values.items():
            yield from leaves(value, f"{prefix}.{key}".strip("."))
    else:
        yield prefix, values


def value_at(values: Any, key: str, separator: str) -> Any:
    """The value at a dotted key; KeyError where there is none."""
    for part in key.split(separator):
        values = values[part]
    return values


def other(key: str, value: Any, values: dict[str, Any]) -> Any:
    """Another value than `value`: DVC does not ask whether it is allowed, but a plan's names must exist."""
    if key.startswith(("plans.", "incremental.plans.")) and isinstance(value, list):
        axis = key.split(".")[-1]
        values = values | values["incremental"] if key.startswith("incremental.") else values
        names = values.get("methods" if axis in ("trained", "refit", "fuse") else axis, [])
        more = [name for name in names if name not in value] if names else [max(value) + 1]
        return [*value, more[0]] if more else value[:-1]
    if key.endswith((".reader", ".source")):
        return {"digits": "cifar", "cifar10": "cifar100", "cifar100": "cifar10"}.get(value, "digits")
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, list):
        return [*value, 1]
    return {"changed": 1} if isinstance(value, dict) else f"{value}-changed"


def edited(values: dict[str, Any], key: str) -> dict[str, Any]:
    """A copy of `values` with another value at the dotted key."""
    result = copy.deepcopy(values)
    *path, last = key.split(".")
    block = result
    for part in path:
        block = block[part]
    block[last] = other(key, block[last], values)
    return result


class Pipeline:
    """The committed pipeline in a folder of its own, as if every stage had run with the committed params."""

    def __init__(self, folder: Path):
        # what DVC reads for a declared param: it would parse the file anew for every stage and walk through all of it
        param.load_path = lambda path, fs, **options: self.current
        param.dpath = SimpleNamespace(get=value_at)
        self.folder = folder
        for name in ("dvc.yaml", *(path.relative_to(ROOT) for path in (ROOT / "stages").rglob("dvc.yaml"))):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text((ROOT / name).read_text())
        shutil.copyfile(ROOT / "params.yaml", folder / "params.yaml")
        self.values: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
        self.current = self.values
        with contextlib.redirect_stdout(io.StringIO()):
            Repo.init(str(folder), no_scm=True).close()
        self.repo = Repo(str(folder))
        self.stages = {self.name(stage): stage for stage in self.repo.index.stages}
        # stages that declare the same keys share an answer
        self.declared: dict[tuple[str, ...], list[Any]] = {}
        for stage in self.stages.values():
            for dep in stage.deps:
                if isinstance(dep, ParamsDependency):
                    self.declared.setdefault(tuple(dep.params), []).append(dep)
        for deps in self.declared.values():
            deps[0].fill_values(deps[0].read_params())

    @staticmethod
    def name(stage: Any) -> str:
        return stage.addressing.split(":")[-1]

    def touched(self, key: str) -> set[str]:
        """Stages that re-run because of the key itself, those that it makes included, but for `check`."""
        self.current = edited(self.values, key)
        changed = [deps for deps in self.declared.values() if deps[0].status()]
        touched = {self.name(dep.stage) for deps in changed for dep in deps}
        if files := self.shaped_by(key):
            (self.folder / "params.yaml").write_text(json.dumps(self.current))  # YAML too, and written at once
            for stage in (stage for path in files for stage in self.repo.stage.load_all(str(path))):
                before = self.stages.get(self.name(stage))
                paths = [[str(dep) for dep in s.deps] for s in (stage, before) if s is not None]
                if before is None or before.cmd != stage.cmd or paths[0] != paths[1]:
                    touched.add(self.name(stage))
        self.current = self.values
        return touched - {"manifests"}

    def shaped_by(self, key: str) -> list[Path]:
        """The pipeline files that read the key themselves, so that other stages may come out: seconds to find out."""
        section, *_, last = words = key.split(".")
        pipeline = (self.folder / "stages/dvc.yaml").read_text()
        if section == "plans":
            read = f"${{plans.{words[1]}."
        elif key.startswith("incremental.plans."):
            read = f"${{incremental.plans.{words[2]}."
        elif section in ("sources", "datasets", "features") and f"${{item.{last}}}" in pipeline:
            read = f"${{{section}}}"
        elif section == "methods" and last == "fuse":
            read = "${methods."
        else:
            return []
        return [path for path in self.folder.rglob("dvc.yaml") if read in path.read_text()]

    def followers(self, names: set[str]) -> set[str]:
        """Every stage downstream of the named ones, but for themselves."""
        graph = self.repo.index.graph
        found: set[str] = set()
        stack = [self.stages[name] for name in names if name in self.stages]
        while stack:
            for stage in graph.predecessors(stack.pop()):
                if self.name(stage) not in found:
                    found.add(self.name(stage))
                    stack.append(stage)
        return found - names


def summarized(names: set[str], everything: set[str]) -> str:
    """Stage names in short: `train-quick@*-gala-*` for all such cells of a plan."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split("@")[0], []).append(name.partition("@")[2])
    shown = []
    for group in sorted(groups, key=lambda g: (STEPS.index(g.split("-")[0]), g)):
        items = groups[group]
        if items == [""]:
            shown.append(f"`{group}`")
        elif "-" not in group:
            shown.extend(f"`{group}@{item}`" for item in sorted(items))
        else:
            every = [cell for g, _, cell in (n.partition("@") for n in everything) if g == group]
            axes = [
                "*" if {c.split("-")[i] for c in every} <= {c.split("-")[i] for c in items} and len(every) > 1
                else "\\|".join(sorted({c.split("-")[i] for c in items}))
                for i in range(len(every[0].split("-")))
            ]  # fmt: skip
            pattern = re.sub(r"^\*(-\*)+$", "*", "-".join(axes))
            shown.append(f"`{group}@{pattern}` ({len(items)})")
    return ", ".join(shown) or "nothing"


def steps(names: set[str]) -> str:
    """The kinds of stages in the pipeline's order, and of how many cells."""
    kinds = {step: sum(1 for name in names if re.split("[-@]", name)[0] == step) for step in STEPS}
    return ", ".join(f"{step} ({count})" if count > 1 else step for step, count in kinds.items() if count) or "nothing"


def table(every: int = 1) -> dict[str, str]:
    """The lines of docs/params.md by the key that they are of; of one key in `every` alone, "" for the others."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline(Path(folder))
        lines = {}
        for number, (key, _) in enumerate(leaves(pipeline.values)):
            lines[key] = ""
            if number % every == 0:
                touched = pipeline.touched(key)
                shown = summarized(touched, set(pipeline.stages) | touched)
                lines[key] = f"| `{key}` | {shown} | {steps(pipeline.followers(touched))} |"
        pipeline.repo.close()
    return lines


def wrong(every: int) -> list[str]:
    """What the committed table says otherwise than DVC: keys, of those that are looked at (`table`)."""
    text = PAGE.read_text()
    said = {line.split("`")[1]: line for line in text.removeprefix(HEAD).splitlines()}
    found = table(every)
    differ = {key for key, line in found.items() if line and said.get(key) != line}
    return sorted(differ | (said.keys() ^ found.keys()) | set([] if text.startswith(HEAD) else ["its head"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="with --check: ask DVC of one line in N")
    args = parser.parse_args()
    if not args.check:
        PAGE.write_text(HEAD + "".join(f"{line}\n" for line in table().values()))
    elif keys := wrong(args.every):
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        sys.exit(f"{PAGE} is not what DVC says of {', '.join(keys[:5])}{more}: python docs/params_table.py")
