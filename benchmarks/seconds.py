"""What the pipeline itself costs: doing nothing, and measuring cells anew, beside DVC with as many empty stages.

    python -m benchmarks.seconds [--repeat 3] [--cells 13 60] [--tree FOLDER] [--quick]

Everything happens in copies in a temporary folder. Nothing is trained: DVC is told that the stages have run, and the
logits are random numbers of CIFAR-100's sizes. `--tree` measures another checkout of this repository, an older one say.

Commands of one question take turns, so that a busy machine is busy for all of them. `wall` is what a clock says,
`processor` what the processes used; both are the smallest of all turns, ratios the median of those turn by turn.
"""

import argparse
import logging
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import yaml

from benchmarks.harness import RESULTS, ROOT, Report
from longtail.posthoc import predictions
from longtail.workflow import files, pipeline
from longtail.workflow.cells import of_plan
from longtail.workflow.locks import STAGES

PLAN = "seconds"
QUICK = ["check", "manifests", "download@digits", "subsample@digits_if20"]  # what the plan `quick` needs of stages/
HISTORY = "results/paper-cifar100/cells/cifar100_if100/gala/ce/1/history.csv"
EMPTY = """stages:
  empty:
    matrix:
      number: {numbers}
    cmd: cp in out/${{item.number}}
    deps: [in]
    outs:
    - out/${{item.number}}:
        cache: false
"""


def copy(tree: Path, folder: Path) -> Path:
    """The files of a checkout that git knows or would, in a new repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (tree / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree / name, folder / name)
    subprocess.run(["git", "init", "-q", "."], cwd=folder, check=True)
    return folder


def vouch(folder: Path, stages: Mapping[str, Iterable[str] | None]) -> int:
    """Tell DVC that stages have run, by pipeline file (None: all of it); an out that is not there is a line of text.

    Returns how many they are.
    """
    from dvc.dvcfile import load_file
    from dvc.repo import Repo, lock_repo

    logging.getLogger("dvc").setLevel(logging.WARNING)
    count, before = 0, Path.cwd()
    os.chdir(folder)
    try:
        with Repo() as repo, lock_repo(repo):
            for file, names in stages.items():
                pipeline_file = load_file(repo, str(folder / file))
                loaded = [pipeline_file.stages[name] for name in names or pipeline_file.stages]
                for stage in loaded:
                    for out in stage.outs:
                        path = Path(out.fs_path)
                        if not path.exists():
                            path.parent.mkdir(parents=True, exist_ok=True)
                            path.write_text(f"{path.relative_to(folder)}\n")
                for stage in loaded:
                    stage.save(run_cache=False)
                    stage.commit()
                pipeline_file.dump_stages(loaded, update_pipeline=False)
                count += len(loaded)
    finally:
        os.chdir(before)
    return count


def empty(folder: Path, number: int) -> Path:
    """A repository of so many stages that copy a file, all of them up to date."""
    folder.mkdir()
    subprocess.run(["git", "init", "-q", "."], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=folder, check=True)
    (folder / "in").write_text("in\n")
    (folder / "dvc.yaml").write_text(EMPTY.format(numbers=list(range(number))))
    vouch(folder, {"dvc.yaml": None})
    return folder


def plan_of(folder: Path, seeds: int) -> None:
    """A plan of so many cells, whose networks are there: random logits of CIFAR-100-LT's sizes, all of them alike."""
    params = (folder / "params.yaml").read_text()
    block = f"{{datasets: [cifar100_if100], recipes: [gala], methods: [ce], seeds: {list(range(seeds))}}}"
    (folder / "params.yaml").write_text(params.replace("\nplans:\n", f"\nplans:\n  {PLAN}: {block}\n"))
    values = yaml.safe_load((folder / "params.yaml").read_text())
    files.write_text(folder / pipeline.file(PLAN), pipeline.text(PLAN, values))
    rng = np.random.default_rng(0)
    counts_C = np.array([int(500 * 0.01 ** (c / 99)) for c in range(100)])
    labels = {"train": np.repeat(np.arange(100), counts_C), "test": np.repeat(np.arange(100), 100)}
    arrays = {"class_names": np.array([f"class {c}" for c in range(100)]), "class_counts": counts_C}
    for split, labels_N in labels.items():
        logits_NC = rng.normal(size=(len(labels_N), 100)) + 4 * np.eye(100)[labels_N]
        arrays |= {f"{split}_labels": labels_N, f"last_{split}_logits": logits_NC[None].astype(np.float32)}
    arrays["last_epoch"] = np.array(200)
    first: Path | None = None
    for seed in range(seeds):
        run = folder / f"runs/{PLAN}/cifar100_if100/gala/ce/{seed}"
        run.mkdir(parents=True)
        shutil.copyfile(folder / HISTORY, run / "history.csv")
        if first is None:
            first = run
            files.save_arrays(run / "predictions.npz", **arrays)
            settings = values["align"]
            files.write_json(run / "alignment.json", predictions.align(str(run / "predictions.npz"), **settings))
        else:
            for name in ("predictions.npz", "alignment.json"):
                shutil.copyfile(first / name, run / name)
    cells = [cell.name for cell in of_plan(PLAN, values["plans"][PLAN])]
    vouch(folder, {pipeline.SHARED: ["check", "manifests", "download@cifar100", "subsample@cifar100_if100"]})
    vouch(folder, {pipeline.file(PLAN): [f"{stage}-{PLAN}@{cell}" for cell in cells for stage in STAGES]})


def timed(command: str, folder: Path) -> tuple[float, float]:
    """Seconds by the clock and of processor time of a command that must succeed, with the code of its folder."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "src"), os.environ.get("PYTHONPATH", "")])}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout}{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def take_turns(report: Report, rows: Sequence[tuple[str, str, Path]], repeat: int) -> None:
    """A table of commands (what, command, folder), each `repeat` times, and set against the last one."""
    for _, command, folder in rows:
        timed(command, folder)  # the first time, DVC hashes what it has not seen
    turns = [[timed(command, folder) for _, command, folder in rows] for _ in range(repeat)]
    table = []
    for i, (what, command, _) in enumerate(rows):
        wall, processor = (min(turn[i][of] for turn in turns) for of in (0, 1))
        ratio = median(turn[i][1] / turn[-1][1] for turn in turns)
        command = command.replace("python -m ", "")
        table.append([f"{what}: `{command}`", f"{wall:.1f}", f"{processor:.1f}", f"{ratio:.2f}"])
    report.table(["", "wall, s", "processor, s", "ratio (processor)"], table)


def nothing_to_do(report: Report, tree: Path, temporary: Path, repeat: int) -> None:
    """Commands that find everything up to date."""
    whole = copy(tree, temporary / "whole")
    vouched = {pipeline.SHARED: QUICK, pipeline.file("quick"): None, "dvc.yaml": None}
    number = vouch(whole, vouched)
    alone = copy(tree, temporary / "alone")
    for file in alone.glob("stages/*/dvc.yaml"):
        if file.parent.name != "quick":
            shutil.rmtree(file.parent)
    vouch(alone, vouched)
    params = yaml.safe_load((whole / "params.yaml").read_text())
    every = number + sum(
        len(of_plan(plan, block)) * len(STAGES) + 1 for plan, block in params["plans"].items() if plan != "quick"
    )
    few, many = empty(temporary / "few", number), empty(temporary / "many", every)
    named = f"{pipeline.file('quick')} dvc.yaml"
    report.say(
        "## Nothing to do", "", f"The plan `quick` ({number} stages) is up to date; all plans have {every} stages."
    )
    take_turns(
        report,
        [
            ("all plans", "python -m dvc repro", whole),
            ("all plans", "python -m longtail.cli run quick", whole),
            ("DVC, as many empty stages as all plans have", "python -m dvc repro", many),
            ("DVC, as many empty stages as the plan has", "python -m dvc repro", few),
            ("the plan alone", "python -m dvc repro", alone),
        ],
        repeat,
    )
    take_turns(
        report,
        [
            ("all plans, the plan named", f"python -m dvc status -q {named}", whole),
            ("DVC, as many empty stages as all plans have", "python -m dvc status -q", many),
            ("DVC, as many empty stages as the plan has", "python -m dvc status -q", few),
            ("the plan alone", f"python -m dvc status -q {named}", alone),
        ],
        repeat,
    )


def measure_anew(report: Report, tree: Path, temporary: Path, cells: Sequence[int], with_dvc: int) -> None:
    """Another number of bins: every cell is evaluated, and the report made."""
    report.say(
        "## Another number of bins", "", "Cells of CIFAR-100's sizes, two jobs; the report of the plan included."
    )
    table = []
    for number in cells:
        folder = copy(tree, temporary / f"cells{number}")
        plan_of(folder, number)
        bins = 15
        for command in [f"python -m longtail.cli run {PLAN} --jobs 2"] + (
            [f"python -m dvc repro -q {pipeline.file(PLAN)}"] if number <= with_dvc else []
        ):
            text = (folder / "params.yaml").read_text()
            (folder / "params.yaml").write_text(text.replace(f"ece_bins: {bins}", f"ece_bins: {bins - 1}"))
            bins -= 1
            vouch(folder, {pipeline.SHARED: ["check"]})
            whole = timed(command, folder)
            rest = timed(f"python -m dvc repro -q -f -s {pipeline.file(PLAN)}:report-{PLAN}", folder)
            shown = command.replace("python -m ", "").replace(".cli", "")
            numbers = (*whole, rest[0], (whole[0] - rest[0]) / number)
            table.append([f"`{shown}`", str(number), *(f"{value:.1f}" for value in numbers)])
    header = ["", "cells", "wall, s", "processor, s", "of these the report, wall, s", "a cell without it, wall, s"]
    report.table(header, table)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write benchmarks/results/seconds.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="turns of the commands that do nothing")
    parser.add_argument(
        "--cells", type=int, nargs="*", default=[13, 60], help="sizes of the plan that is measured anew"
    )
    parser.add_argument("--with-dvc", type=int, default=13, help="up to so many cells, with plain `dvc repro` as well")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to measure")
    parser.add_argument("--quick", action="store_true", help="one turn, two cells: says only that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args(argv)
    report = Report()
    made = f"{os.cpu_count()} cores; made by `python -m benchmarks.seconds`."
    report.say("# Seconds of the pipeline itself", "", made, "")
    with tempfile.TemporaryDirectory(prefix="seconds-") as folder:
        nothing_to_do(report, args.tree, Path(folder), 1 if args.quick else args.repeat)
        measure_anew(report, args.tree, Path(folder), [2] if args.quick else args.cells, args.with_dvc)
    if not args.quick:
        report.write(args.results / "seconds.md")


if __name__ == "__main__":
    main()
