"""The command `longtail`: what `dvc repro` cannot do by itself. Everything in it calls dvc or the library."""

import argparse
import difflib
import fnmatch
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from queue import Queue
from typing import Any

from longtail.workflow import chains, files, focus, pipeline
from longtail.workflow import params as schema
from longtail.workflow.cells import Cell, bases, of_plan
from longtail.workflow.jobs import Job
from longtail.workflow.locks import MAKERS, STAGES
from longtail.workflow.pipeline import SHARED

TIMES = "benchmarks/results/time_to_accuracy.csv"
ASK = r'''ask:   curl -H 'Content-Type: application/json' localhost:5001/invocations \
       -d "{\"dataframe_records\": [{\"image\": \"$(base64 -w0 FILE.png)\"}]}"'''
SHORT_S = 60  # what took less says nothing when it is done


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


def plans_of(params: dict[str, Any]) -> dict[str, Any]:
    """All plans, of either kind."""
    return params["plans"] | chains.plans(params)


def known(plan: str, plans: Iterable[str]) -> None:
    """Raise ValueError for a plan that params.yaml does not have, with the name that was meant where one is close."""
    if plan not in plans:
        close = difflib.get_close_matches(plan, list(plans), 1)
        meant = f"did you mean {close[0]}? There are" if close else "there are"
        raise ValueError(f"plan {plan!r} is not in params.yaml; {meant} {', '.join(plans)}")


def run(plan: str, only: str, jobs: int) -> int:
    """Run a plan's cells, `jobs` side by side, then its readings and report. Returns how many of all these failed.

    Cells that start from others' networks come after all those that are trained. Several devices in LONGTAIL_DEVICE
    (cuda:0,cuda:1) are shared by the jobs; processes of one cell (LONGTAIL_PROCESSES) share its job's threads.
    """
    params = schema.load()
    chosen = choose(plan, params, only)
    datasets = sorted({cell.dataset for cell in chosen})
    # threads of two trainings on the same cores wait for each other: each gets its own share
    processes = os.environ.get("LONGTAIL_PROCESSES", "1")
    at_once = jobs * max(1, int(processes) if processes.isdecimal() else 1)  # what is none is a stage's to say
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    devices = os.environ.get("LONGTAIL_DEVICE", "").split(",")
    started = [
        Job({"OMP_NUM_THREADS": threads, "LONGTAIL_DEVICE": devices[job % len(devices)]}, bar)
        for job, bar in enumerate(bars(jobs))
    ]
    failed = 0
    try:
        failed = run_with(started, params, plan, chosen, datasets)
    finally:
        failed += sum(not job.close() for job in started)
    return failed


def choose(plan: str, params: dict[str, Any], only: str) -> list[Cell | chains.Cell]:
    """The cells of a plan whose names fit a pattern, and those whose networks they start from, in the plan's order.

    Raises ValueError, which names what there is, where none fits.
    """
    known(plan, plans_of(params))
    if not Path(pipeline.file(plan)).exists():
        raise ValueError(f"plan {plan!r} has no {pipeline.file(plan)}; `longtail plan {plan}` writes it")
    focus.check(Path.cwd(), plan)
    cells = cells_of(plan, params)
    chosen = {cell for cell in cells if fnmatch.fnmatchcase(cell.name, only)}
    if not chosen:
        names = [cell.name for cell in cells]
        close = difflib.get_close_matches(only.strip("*"), names, 1, 0.4)
        meant = f"did you mean {close[0]}? It" if close else "it"
        raise ValueError(f"--only {only!r} matches no cell; {meant} is one of {', '.join(names)}")
    chosen |= {base for cell in chosen if isinstance(cell, Cell) for base in bases(cell, params)}
    return [cell for cell in cells if cell in chosen]


def dry(plan: str, only: str) -> int:
    """Say what `run` would do: each cell and why; nothing is run. Returns how many cells have to."""
    from longtail.evidence import status

    params = schema.load()
    chosen = choose(plan, params, only)
    found = [one for one in status.states(Path.cwd(), params, plan) if one.cell in chosen]
    for one in found:
        print(f"{one.state:8}{one.cell.name}{f'  ({one.why})' if one.why else ''}")
    waiting = [one for one in found if one.state in (status.STALE, status.MISSING)]
    took = status.left(found, status.known_times(Path(TIMES), plan)) if waiting else 0.0
    hours = "how long that takes is not known yet" if took is None else f"some {status.hours_text(took)} of training"
    print(f"{len(waiting)} of {len(found)} cells to run" + (f", {hours}" if waiting else ""))
    return len(waiting)


def run_with(
    jobs: list[Job], params: dict[str, Any], plan: str, chosen: Sequence[Cell | chains.Cell], datasets: list[str]
) -> int:
    """The cells `chosen` and the report, with these jobs, after the data sets; the number of cells that failed."""
    if not prepare(jobs[0], params, datasets):
        first = [f"{SHARED}:manifests", *(pipeline.data(name, params) for name in datasets)]
        print(f"failed: the data; `dvc repro {' '.join(first)}` says why", file=sys.stderr)
        return len(chosen)
    free: Queue[Job] = Queue()
    for job in jobs:
        free.put(job)

    stopping = threading.Event()
    places = {cell: place for place, cell in enumerate(chosen, 1)}

    def run_cell(cell: Cell | chains.Cell) -> bool:
        job = free.get()
        try:
            if stopping.is_set():
                return False
            say(f"cell {places[cell]} of {len(chosen)}: {cell.name}")
            began = time.monotonic()
            done = job.run(steps[cell])
            if done and (took := time.monotonic() - began) > SHORT_S:
                say(f"cell {places[cell]} of {len(chosen)}: {cell.name} done in {took / 60:.1f} min")
            return done
        finally:
            free.put(job)

    steps = {cell: stages(params, cell) for cell in chosen}
    trained = [cell for cell in chosen if ":train-" in steps[cell][0]]
    failed = []
    with ThreadPoolExecutor(len(jobs)) as pool:
        try:
            for wave in (trained, [cell for cell in chosen if cell not in trained]):
                failed += [cell for cell, ok in zip(wave, list(pool.map(run_cell, wave)), strict=True) if not ok]
        except KeyboardInterrupt:  # the stages have had it too, and end by themselves
            stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    for cell in failed:
        again = f"dvc repro {' '.join(steps[cell][3:] or steps[cell][-1:])}"
        print(f"failed: {cell.name} (the stage's message is above; `{again}` shows DVC's own as well)", file=sys.stderr)
    if len(failed) == len(chosen):
        return len(failed)
    return len(failed) + sum_up(jobs[0], plan, params["plans"].get(plan, {}))


def prepare(job: Job, params: dict[str, Any], datasets: list[str]) -> bool:
    """Bring the manifests of code and the data sets up to date; False when that failed.

    A stage that is up to date is left alone: another `longtail run` may be training on what it made, and DVC lets
    nobody touch that meanwhile. One that is not waits for it.
    """
    common = [f"{SHARED}:check", f"{SHARED}:manifests"]
    if not job.unchanged(common) and not run_changed(job, common):
        return False
    for name in datasets:
        if not job.unchanged([pipeline.data(name, params)]) and not run_changed(job, pipeline.making(name, params)):
            return False
    return True


def run_changed(job: Job, addresses: list[str]) -> bool:
    """Run those of the stages that have to, one after the other; False when one failed."""
    return all(job.unchanged([address]) or job.run([address]) for address in addresses)


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


def say(text: str) -> None:
    """A line of progress; none with LONGTAIL_QUIET. Above the bars, where there are some."""
    if not os.environ.get("LONGTAIL_QUIET"):
        from tqdm import tqdm

        tqdm.write(text)
        sys.stdout.flush()


def bars(jobs: int) -> list[Any]:
    """A bar for each job on a terminal; elsewhere, and with LONGTAIL_QUIET, none."""
    if not sys.stderr.isatty() or os.environ.get("LONGTAIL_QUIET"):
        return [None] * jobs
    from longtail.workflow.progress import Bar

    return [Bar(place) for place in range(jobs)]


def prune(plans: dict[str, Any]) -> list[str]:
    """Remove what is left of plans that params.yaml has no more: their pipeline, not their results."""
    gone = pipeline.left_over(Path.cwd(), plans)
    for file in gone:
        for path in (Path(file), Path(pipeline.lock(file)), Path(file).with_name("adopted.csv")):
            path.unlink(missing_ok=True)
        if not any(Path(file).parent.iterdir()):
            Path(file).parent.rmdir()
    return gone


def arguments() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = argparse.ArgumentParser(prog="longtail", description=__doc__)
    parser.add_argument("--version", action="version", version=f"longtail {metadata.version('longtail')}")
    commands = parser.add_subparsers(dest="command")
    one = commands.add_parser("run", help="run a plan's cells side by side, then its readings and report")
    one.add_argument("plan", help="a name under `plans` in params.yaml")
    one.add_argument("--jobs", type=int, default=1, help="cells at a time (default 1, with all cores)")
    one.add_argument("--only", default="*", help="pattern of cells' names, e.g. '*-gala-0'")
    one.add_argument("--dry", action="store_true", help="say which cells would run, and why; run nothing")
    one = commands.add_parser("status", help="where a plan is: cells done, stale, running, missing; hours left")
    one.add_argument("plan", nargs="*", help="plans (default: all in params.yaml)")
    one = commands.add_parser("plan", help="write a plan's pipeline file, stages/<plan>/dvc.yaml")
    one.add_argument("plan", nargs="*", help="plans (default: all in params.yaml)")
    one.add_argument("--prune", action="store_true", help="remove the files of plans that params.yaml has no more")
    one = commands.add_parser("focus", help="hide the pipelines of other plans from DVC: its commands start in seconds")
    one.add_argument("plan", nargs="*", help="plans that DVC is to see (default: say which it sees)")
    one.add_argument("--all", action="store_true", help="let it see all of them again")
    one = commands.add_parser("new", help="look at a folder or table of your own, and write a plan for it")
    one.add_argument(
        "where", help="a folder of class folders, or a table (.csv, .parquet) of path,label[,group][,split]"
    )
    one.add_argument("--name", help="of source, data set and plan (default: the folder's)")
    one.add_argument("--features", help="for a table without paths: an .npy file, a row for each of its lines")
    one.add_argument("--tune", action="store_true", help="fine-tune the backbone, in place of frozen features")
    one.add_argument("--size", type=int, help="side of the images in pixels (default: proposed)")
    one.add_argument("--test-per-class", type=int, help="test images of a class (default: proposed)")
    one.add_argument("--broken", choices=["refuse", "leave_out"], help="files that are no images (default: refuse)")
    one.add_argument(
        "--duplicates", choices=["refuse", "leave_out", "report"], help="of test images in train (default: refuse)"
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
            one.add_argument("--move", action="store_true", help="take the alias from the version that has it")
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


def do_run(args: argparse.Namespace) -> None:
    """Run a plan's cells, or say what would run."""
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: must be at least 1")
    if args.dry:
        dry(args.plan, args.only)
        return
    sys.exit(min(1, run(args.plan, args.only, args.jobs)))


def do_status(args: argparse.Namespace) -> None:
    """Say where plans are."""
    from longtail.evidence import status

    params = schema.load()
    for plan in args.plan:
        known(plan, plans_of(params))
        focus.check(Path.cwd(), plan)
    hidden = focus.hidden(Path.cwd(), plans_of(params))
    chosen = args.plan or [plan for plan in plans_of(params) if plan not in hidden]
    stale = status.stale(Path.cwd(), params, chosen)
    for plan in chosen:
        times = status.known_times(Path(TIMES), plan)
        print("\n".join(status.overview(Path.cwd(), params, plan, times, stale)))
    if hidden and not args.plan:
        print(f"hidden from DVC: {', '.join(hidden)} (`longtail focus --all` shows them)")


def do_check(args: argparse.Namespace) -> None:
    """Check params.yaml, and that no pipeline file is left over."""
    params = schema.load()
    if gone := pipeline.left_over(Path.cwd(), plans_of(params)):
        raise ValueError(
            f"{', '.join(gone)}: of a plan that params.yaml has no more; every `dvc repro` fails on it. "
            "`longtail plan --prune` removes it, its results stay"
        )
    print("params.yaml fits its schema")


def do_plan(args: argparse.Namespace) -> None:
    """Write pipeline files."""
    params = schema.load()
    for plan in args.plan:
        known(plan, plans_of(params))
    for file in prune(plans_of(params)) if args.prune else ():
        print(f"{file} removed")
    texts = {plan: pipeline.text(plan, params) for plan in args.plan or plans_of(params)}
    for plan, text in texts.items():
        files.write_text(pipeline.file(plan), text)
        print(pipeline.file(plan))
    for plan in args.plan:
        focus.add(Path.cwd(), plan)


def do_focus(args: argparse.Namespace) -> None:
    """Hide plans from DVC, show them, or say which it sees."""
    if args.all and args.plan:
        raise ValueError("--all shows every plan: name none")
    plans = plans_of(schema.load())
    for plan in args.plan:
        known(plan, plans)
    if args.all:
        focus.clear(Path.cwd())
    elif args.plan:
        focus.write(Path.cwd(), args.plan)
    hidden = focus.hidden(Path.cwd(), plans)
    print(f"DVC sees {', '.join(plan for plan in plans if plan not in hidden)}")
    if hidden:
        print(f"hidden: {', '.join(hidden)} (`longtail focus --all` shows them; `dvc gc` would drop what they have)")


def do_new(args: argparse.Namespace) -> None:
    """Look at one's own data, and write a plan."""
    from longtail import new

    wishes = new.Chosen(
        args.name, args.features, args.broken, args.duplicates, args.size, args.test_per_class, args.tune
    )
    print("\n".join(new.new(args.where, wishes)))


def do_verify(args: argparse.Namespace) -> None:
    """Hold committed results against the code."""
    from longtail.evidence import verify

    params = schema.load()
    for plan in args.plan:
        known(plan, plans_of(params))
        focus.check(Path.cwd(), plan)
    hidden = focus.hidden(Path.cwd(), plans_of(params))
    chosen = args.plan or [plan for plan in verify.with_results(".", plans_of(params)) if plan not in hidden]
    wrong = verify.verify(".", params, chosen)
    consistent = f"the results of {', '.join(chosen)} are those of this code and these params"
    print("\n".join(wrong) or consistent)
    if hidden and not args.plan:
        print(f"not looked at, for DVC does not see them: {', '.join(hidden)} (`longtail focus --all`)")
    sys.exit(1 if wrong else 0)


def do_adopt(args: argparse.Namespace) -> None:
    """Record cells of other code whose numbers are the same."""
    from longtail.evidence import adopt, verify

    params = schema.load()
    if repro("-q", "-s", f"{SHARED}:check", f"{SHARED}:manifests"):
        raise ValueError(f"the manifests could not be written; `dvc repro {SHARED}:manifests` says why")
    for plan in args.plan:
        known(plan, plans_of(params))
        focus.check(Path.cwd(), plan)
    hidden = focus.hidden(Path.cwd(), plans_of(params))
    chosen = args.plan or [plan for plan in verify.with_results(".", plans_of(params)) if plan not in hidden]
    if hidden and not args.plan:
        print(f"not looked at, for DVC does not see them: {', '.join(hidden)} (`longtail focus --all`)")
    sys.exit(min(1, adopt.adopt(Path.cwd(), params, chosen, args.only, args.steps)))


def do_track(args: argparse.Namespace) -> None:
    """Mirror results into MLflow, chains of trainings too."""
    from longtail.tracking import runs

    with_chains = chains.plans(schema.load())
    others = [plan for plan in args.plan if plan not in with_chains]
    if others or not args.plan:
        runs.track(Path.cwd(), others or None)
    if chosen := {plan: axes for plan, axes in with_chains.items() if plan in (args.plan or with_chains)}:
        from longtail.incremental import tracking

        tracking.track(Path.cwd(), chosen)


def do_export(args: argparse.Namespace) -> None:
    """Write a trained cell as a file that needs no code of ours."""
    from longtail.serving import export

    export.check_target(args.out)
    chosen = export.Trained(Path.cwd(), args.plan, args.cell, args.correction)
    difference = export.export(chosen, args.out)
    print(f"{args.out}: logits within {difference:.1g} nats of the pipeline's on {export.CHECKED} test images")


def do_register(args: argparse.Namespace) -> None:
    """Put a trained cell into MLflow's registry."""
    from longtail.serving import export
    from longtail.tracking import runs

    chosen = export.Trained(Path.cwd(), args.plan, args.cell, args.correction)
    address = export.register(chosen, Path.cwd(), name=args.name, alias=args.alias, move=args.move)
    uri, _ = runs.location(Path.cwd())
    print(address)
    print(f"serve: MLFLOW_TRACKING_URI={runs.shown(uri)} mlflow models serve -m {address} --env-manager local -p 5001")
    if chosen.deployed.input == "images":
        print(ASK)


COMMANDS = {
    "run": do_run,
    "status": do_status,
    "check": do_check,
    "plan": do_plan,
    "focus": do_focus,
    "new": do_new,
    "verify": do_verify,
    "adopt": do_adopt,
    "track": do_track,
    "export": do_export,
    "register": do_register,
}


def main() -> None:
    """Entry point of `longtail`."""
    parser = arguments()
    args, rest = parser.parse_known_args()
    if args.command is None:
        parser.print_help()
        return
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
        COMMANDS[args.command](args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {files.without_advice(str(error))}")
    except OSError as error:
        sys.exit(f"error: {files.said(error)}")
    except Exception as error:
        if (type(error).__module__, type(error).__name__) != ("dvc.lock", "LockError"):
            raise
        sys.exit("error: another DVC command is at work in this repository; again when it has ended")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
