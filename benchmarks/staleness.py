"""Which of the last commits would have made which cells stale, by three ways to say what code a stage runs.

    python -m benchmarks.staleness [--commits 40]

By MD5: every file that a stage imports, its bytes. By tree: the same files, without comments, docstrings and layout. By
reach: only definitions that the stage can reach, wherever they lie (longtail.workflow.meaning). Training is hours,
what follows it seconds: cells that would have to be trained again are counted apart from those of which only a later
stage would run again. Nothing runs; each commit's files are read out of git. Writes results/staleness.md.
"""

import argparse
import hashlib
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import yaml

from longtail.workflow import files, manifest, meaning

ROOT = Path(__file__).parents[1]
WAYS = ("MD5", "tree", "reach")
LATER = ("predict", "align", "evaluate")
FLAT = {f"longtail.{name}" for name in ("live", "machine", "manifest", "meaning", "params", "ranges", "stage", "adopt")}


def git(*args: str) -> bytes:
    """The output of a git command in the repository."""
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, check=True).stdout


def imported(start: list[meaning.Module], stops: frozenset[str]) -> list[meaning.Module]:
    """The modules that these import, and that those import in turn."""
    found = list(start)
    for module in found:
        dotted = [*module.imports.values()]
        others = [module.package.module(name) or module.package.module(name.rpartition(".")[0]) for name in dotted]
        found += [one for one in others if one and one not in found and one.name not in stops and "." in one.name]
    return found


def of_commit(commit: str) -> dict[str, dict[str, str]]:
    """{manifest: {way: what identifies its code}} of a commit; manifests of methods by `train-`, `refit-` and name."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python has none before 3.11.4
        archive.extractall(folder)
        root = Path(folder)
        params = yaml.safe_load((root / "params.yaml").read_text())
        stops = frozenset(manifest.PLUMBING | FLAT)
        library = meaning.Package(root / "src", manifest.PACKAGE, stops)
        found = {}
        for name, start in manifest.starts(root, params).items():
            units = manifest.units(library, start)
            begin = [
                library.at(start.script),
                *{unit.module for unit in units if unit.names in (("Loss",), ("refit",))},
            ]
            modules = imported(begin, stops)
            beside = {unit.title: unit.content for unit in units if unit.node is None}
            texts = sorted(hashlib.md5(module.file.read_bytes()).hexdigest() for module in modules)
            trees = sorted(unit.digest for module in modules for unit in module.units)
            found[name] = {"MD5": f"{texts}{beside}", "tree": f"{trees}{beside}", "reach": meaning.program(units)}
        return found


def cells(commit: str) -> list[str]:
    """The methods of the cells that have results at a commit, a cell each."""
    paths = git("ls-tree", "-r", "--name-only", commit, "results/").decode().split()
    return [path.split("/")[-3] for path in paths if path.endswith("/metrics.json")]


def stale(
    was: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]], way: str, methods: list[str]
) -> str:
    """`<cells to be trained again> / <cells of which something later runs again>`."""
    changed = {name for name in was if name not in now or was[name][way] != now[name][way]}
    trained = [method for method in methods if {f"train-{method}", f"refit-{method}"} & changed]
    later = 0 if not changed & set(LATER) else len(methods) - len(trained)
    return f"{len(trained)} / {later}" if trained or later else "-"


def main() -> None:
    """Compare each commit with the one before it, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--commits", type=int, default=40)
    parser.add_argument("--until", default="HEAD", help="the last of them")
    args = parser.parse_args()
    order = (
        git("log", "--first-parent", "--format=%H", f"-{args.commits + 1}", args.until, "--", "src", "stages/*.py")
        .decode()
        .split()
    )
    known = {commit: of_commit(commit) for commit in order}
    lines, total = [], dict.fromkeys(WAYS, 0)
    for commit, before in pairwise(order):
        methods = cells(before)
        found = {way: stale(known[before], known[commit], way, methods) for way in WAYS}
        for way in WAYS:
            total[way] += int(found[way].split(" / ")[0]) if found[way] != "-" else 0
        said = git("log", "-1", "--format=%h %s", commit).decode().strip().replace("|", "/")[:90]
        lines.append(f"| {said} | {len(methods)} | {' | '.join(found.values())} |")
        print(lines[-1], flush=True)
    neutral = {
        way: sum(line.split(" | ")[2 + n].strip(" |").startswith(("-", "0 /")) for line in lines)
        for n, way in enumerate(WAYS)
    }
    text = [
        "# Which commits would have made which cells stale", "",
        f"The last {len(lines)} commits that touch src/ or a stage's script. Cells to be trained again / cells of",
        "which only a later stage runs again. `python -m benchmarks.staleness` makes this table.", "",
        "| commit | cells there | by MD5 | by tree | by reach |", "| --- | ---: | ---: | ---: | ---: |", *lines,
        f"| **trainings in all** | | {' | '.join(f'**{total[way]}**' for way in WAYS)} |",
        f"| **commits that train nothing** | | {' | '.join(f'**{neutral[way]}**' for way in WAYS)} |", "",
    ]  # fmt: skip
    files.write_text(ROOT / "benchmarks/results/staleness.md", "\n".join(text))


if __name__ == "__main__":
    main()
