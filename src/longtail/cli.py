"""The command `longtail`: what `dvc repro` cannot do by itself. Everything in it calls dvc or the library."""

import argparse
import fnmatch
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from queue import Queue
from typing import Any

from longtail.workflow import chains, files, pipeline
from longtail.workflow import params as schema
from longtail.workflow.cells import Cell, of_plan
from longtail.workflow.jobs import Job
from longtail.workflow.locks import MAKERS, STAGES
from longtail.workflow.pipeline import SHARED


def dvc(*args: str, env: dict[str, str] | None = None) -> int:
    """Run dvc; returns its exit status."""
    return subprocess.run([sys.executable, "-m", "dvc", *args], env=env, check=False).returncode


def repro(*args: str, env: dict[str, str] | None = None) -> int:
    """`dvc repro` that waits for the lock: another dvc command at a stage's end must not cost its result."""
    return dvc("--wait-for-lock", "repro", *args, env=env)


def stages(params: dict[str, Any], cell: Cell | chains.Cell) -> list[str]:
    """A cell's stages as DVC addresses them, in their order; which is the first depends on what its method is.

    The last is `evaluate`, or `compare` in a plan with readings; `readout` of a chain of trainings.
    """
    if isinstance(cell, chains.Cell):
        return [cell.address(stage) for stage in chains.STAGES]
    first = MAKERS[schema.kind(cell.method, params["methods"][cell.method])[0]]
    names = [first, *STAGES[1:], *(["compare"] if params["plans"][cell.plan].get("readings") else [])]
    return [cell.address(stage) for stage in names]


def cells_of(plan: str, params: dict[str, Any]) -> Sequence[Cell | chains.Cell]:
    """The cells of a plan of either kind, in its order."""
    if plan in chains.plans(params):
        return chains.of_plan(plan, chains.plans(params)[plan])
    return of_plan(plan, params["plans"][plan])


def run(plan: str, only: str, jobs: int) -> int:
    """Run a plan's cells, `jobs` side by side, then its readings and report. Returns how many of all these failed.

    Cells that start from others' networks come after all those that are trained. Several devices in LONGTAIL_DEVICE
    (cuda:0,cuda:1) are shared by the jobs.
    """
    params = schema.load()
    plans = params["plans"] | chains.plans(params)
    if plan not in plans:
        raise ValueError(f"plan {plan!r} is not in params.yaml; there are {', '.join(plans)}")
    if not Path(pipeline.file(plan)).exists():
        raise ValueError(f"plan {plan!r} has no {pipeline.file(plan)}; `longtail plan {plan}` writes it")
    cells = cells_of(plan, params)
    chosen = [cell for cell in cells if fnmatch.fnmatchcase(cell.name, only)]
    if not chosen:
        raise ValueError(f"--only {only!r} matches none of {', '.join(cell.name for cell in cells)}")
    datasets = [pipeline.data(name, params) for name in sorted({cell.dataset for cell in chosen})]
    first = [f"{SHARED}:manifests", *datasets]
    # threads of two trainings on the same cores wait for each other: each gets its own share
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    devices = os.environ.get("LONGTAIL_DEVICE", "").split(",")
    started = [Job({"OMP_NUM_THREADS": threads, "LONGTAIL_DEVICE": devices[job % len(devices)]}) for job in range(jobs)]
    try:
        return run_with(started, params, plan, chosen, first)
    finally:
        for job in started:
            job.close()


def run_with(
    jobs: list[Job], params: dict[str, Any], plan: str, chosen: Sequence[Cell | chains.Cell], first: list[str]
) -> int:
    """The cells `chosen` and the report, with these jobs, after the stages `first`; the number of cells that failed."""
    # where they are there, they are left alone: another `longtail run` may be training on them, and then DVC refuses
    if not jobs[0].unchanged(first) and repro("-q", *first):
        print(f"failed: the data; `dvc repro {' '.join(first)}` says why", file=sys.stderr)
        return len(chosen)
    free: Queue[Job] = Queue()
    for job in jobs:
        free.put(job)

    def run_cell(cell: Cell | chains.Cell) -> bool:
        job = free.get()
        try:
            return job.run(steps[cell])
        finally:
            free.put(job)

    steps = {cell: stages(params, cell) for cell in chosen}
    trained = [cell for cell in chosen if ":train-" in steps[cell][0]]
    failed = []
    with ThreadPoolExecutor(len(jobs)) as pool:
        for wave in (trained, [cell for cell in chosen if cell not in trained]):
            failed += [cell for cell, ok in zip(wave, list(pool.map(run_cell, wave)), strict=True) if not ok]
    for cell in failed:
        again = f"dvc repro {' '.join(steps[cell][3:] or steps[cell][-1:])}"
        print(f"failed: {cell.name} (the stage's message is above; `{again}` shows DVC's own as well)", file=sys.stderr)
    if len(failed) == len(chosen):
        return len(failed)
    return len(failed) + sum_up(jobs[0], plan, params["plans"].get(plan, {}))


def sum_up(job: Job, plan: str, axes: dict[str, Any]) -> int:
    """Make a plan's readings, where it has them and a cell has run, and its report; returns how many failed.

    What is made is printed, and what failed or is still to come is said. Cells that were not chosen stay as they are.
    """
    made = {"report": f"table: results/{plan}/table.md\npage:  results/{plan}/report.html"}
    if axes.get("readings"):
        cells = of_plan(plan, axes)
        absent = sum(not Path(cell.results, "corrections.csv").is_file() for cell in cells)
        if absent:
            print(f"readings: of {len(cells) - absent} of {len(cells)} cells; the others are still to come")
        if absent < len(cells):
            made = {"readings": f"readings: results/{plan}/readings.md", **made}
    failed = 0
    for stage, text in made.items():
        address = f"{pipeline.file(plan)}:{stage}-{plan}"
        if not job.run([address]):  # it alone: cells that were not chosen stay as they are
            failed += 1
            print(
                f"failed: the {stage} (its message is above; `dvc repro -s {address}` shows it again)", file=sys.stderr
            )
        else:
            print(text)
    return failed


def arguments() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = argparse.ArgumentParser(prog="longtail", description=__doc__)
    parser.add_argument("--version", action="version", version=f"longtail {metadata.version('longtail')}")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="run a plan's cells side by side, then its readings and report")
    one.add_argument("plan", help="a name under `plans` in params.yaml")
    one.add_argument("--jobs", type=int, default=1, help="cells at a time (default 1, with all cores)")
    one.add_argument("--only", default="*", help="pattern of cells' names, e.g. '*-gala-0'")
    one = commands.add_parser("plan", help="write a plan's pipeline file, stages/<plan>/dvc.yaml")
    one.add_argument("plan", nargs="*", help="plans (default: all in params.yaml)")
    one = commands.add_parser("new", help="look at a folder or table of your own, and write a plan for it")
    one.add_argument(
        "where", help="a folder of class folders, or a table (.csv, .parquet) of path,label[,group][,split]"
    )
    one.add_argument("--name", help="of source, data set and plan (default: the folder's)")
    one.add_argument("--features", help="for a table without paths: an .npy file, a row for each of its lines")
    one.add_argument("--size", type=int, help="side of the images in pixels (default: proposed)")
    one.add_argument("--test-per-class", type=int, help="test images of a class (default: proposed)")
    one.add_argument("--broken", choices=["refuse", "leave_out"], default="refuse", help="files that are no images")
    one.add_argument(
        "--duplicates", choices=["refuse", "leave_out", "report"], default="refuse", help="of test images in train"
    )
    one = commands.add_parser("track", help="mirror the result files into MLflow; twice does nothing more")
    one.add_argument("plan", nargs="*", help="plans (default: all that have run)")
    one = commands.add_parser("verify", help="are the committed results those of the committed code? trains nothing")
    one.add_argument("plan", nargs="*", help="plans (default: all that have a table)")
    for name, text in (
        ("export", "write a trained cell as a file that needs no code of ours: .onnx or .pt2"),
        ("register", "put a trained cell into MLflow's model registry, ready to be served"),
    ):
        one = commands.add_parser(name, help=text)
        one.add_argument("plan", help="a name under `plans` in params.yaml")
        one.add_argument("cell", help="<dataset>-<recipe>-<method>-<seed>")
        one.add_argument("--correction", default="none", help="of the logits: none (default), aligned_on_train, ...")
        if name == "export":
            one.add_argument("--out", required=True, help="where it goes: .onnx or .pt2")
        else:
            one.add_argument("--name", default="longtail", help="of the registered model (default: longtail)")
            one.add_argument("--alias", default="champion", help="that points at this version (default: champion)")
    one = commands.add_parser(
        "adopt", help="record cells whose code changed and whose numbers did not as the new code's"
    )
    one.add_argument("plan", nargs="*", help="plans (default: all that have a table)")
    one.add_argument("--only", default="*", help="pattern of <dataset>-<recipe>-<method>-<seed>, e.g. '*-gala-0'")
    one.add_argument("--steps", type=int, default=5, help="of each epoch that is begun again (default 5)")
    commands.add_parser("probe")  # for `adopt`, which runs it with the old code and with the new
    commands.add_parser("check", help="check params.yaml")
    commands.add_parser("correct", help="correct anyone's logits, in files", add_help=False)
    return parser


def main() -> None:
    """Entry point of `longtail`."""
    parser = arguments()
    args, rest = parser.parse_known_args()
    if args.command == "correct":  # the one that needs no repository
        from longtail import correct

        correct.main(rest)
        return
    if args.command == "probe":
        from longtail.evidence import probe

        probe.main()
        return
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if not Path(SHARED).exists():
        sys.exit(f"error: no {SHARED} here; run longtail in the root of the repository")
    try:
        if args.command == "run":
            if args.jobs < 1:
                raise ValueError(f"--jobs {args.jobs}: must be at least 1")
            sys.exit(min(1, run(args.plan, args.only, args.jobs)))
        if args.command == "check":
            schema.load()
            print("params.yaml fits its schema")
        if args.command == "plan":
            params = schema.load()
            texts = {
                plan: pipeline.text(plan, params) for plan in args.plan or [*params["plans"], *chains.plans(params)]
            }
            for plan, text in texts.items():
                files.write_text(pipeline.file(plan), text)
                print(pipeline.file(plan))
        if args.command == "new":
            from longtail import new

            wishes = new.Chosen(args.name, args.features, args.broken, args.duplicates, args.size, args.test_per_class)
            print("\n".join(new.new(args.where, wishes)))
        if args.command == "verify":
            from longtail.evidence import verify

            params = schema.load()
            chosen = args.plan or verify.with_results(".", [*params["plans"], *chains.plans(params)])
            wrong = verify.verify(".", params, chosen)
            print("\n".join(wrong) or f"as committed: {', '.join(chosen)}")
            sys.exit(1 if wrong else 0)
        if args.command == "adopt":
            from longtail.evidence import adopt, verify

            params = schema.load()
            if repro("-q", "-s", f"{SHARED}:check", f"{SHARED}:manifests"):
                raise ValueError(f"the manifests could not be written; `dvc repro {SHARED}:manifests` says why")
            chosen = args.plan or verify.with_results(".", [*params["plans"], *chains.plans(params)])
            sys.exit(min(1, adopt.adopt(Path.cwd(), params, chosen, args.only, args.steps)))
        if args.command == "track":
            from longtail.tracking import runs

            with_chains = chains.plans(schema.load())
            others = [plan for plan in args.plan if plan not in with_chains]
            if others or not args.plan:
                runs.track(Path.cwd(), others or None)
            if chosen := {plan: axes for plan, axes in with_chains.items() if plan in (args.plan or with_chains)}:
                from longtail.incremental import tracking

                tracking.track(Path.cwd(), chosen)
        if args.command in ("export", "register"):
            from longtail.tracking import export, runs

            if args.command == "export":
                export.check_target(args.out)
            chosen = export.Trained(Path.cwd(), args.plan, args.cell, args.correction)
            if args.command == "export":
                difference = export.export(chosen, args.out)
                print(
                    f"{args.out}: logits within {difference:.1g} nats of the pipeline's on {export.CHECKED} test images"
                )
            else:
                address = export.register(chosen, Path.cwd(), name=args.name, alias=args.alias)
                uri, _ = runs.location(Path.cwd())
                print(
                    f"{address}\nMLFLOW_TRACKING_URI={uri} mlflow models serve -m {address} --env-manager local -p 5001"
                )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {files.said(error)}")


if __name__ == "__main__":
    main()
