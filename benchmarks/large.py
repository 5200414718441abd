"""A set of iNaturalist 2018's size, generated: time and memory of each step, growth with the rows, `dvc status`.

python -m benchmarks.large            # seven minutes on one core; writes benchmarks/results/large.*
python -m benchmarks.large --quick    # a minute; prints only, unless --results names a folder

437,513 rows of 8,142 classes with 2 to 1,000 images, and 24,426 of test, have features of 64 numbers (no images). Each
step is the library's own, in a process of its own, whose largest resident set is told.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.harness import ROOT, Report, Setting, Worker, flags, machine_line

D = 64
PART = "LONGTAIL_BENCHMARK_PART"
FULL = {"classes": 8142, "rows": 437_513, "smallest": 2, "largest": 1000, "test": 3}
QUICK = {"classes": 60, "rows": 3000, "smallest": 2, "largest": 400, "test": 3}
GROWTH, GROWTH_QUICK = (10_000, 31_623, 100_000, 316_228, 1_000_000), (2000, 4000)
GROWTH_CLASSES = 1000
FITTED_ON = "rows fitted on"
STEPS = ("index", "draws", "train gala", "train balpoe", "predict", "align", "evaluate", "report")


def counts(classes: int, rows: int, smallest: int, largest: int) -> list[int]:
    """Images of each class, `rows` in all: a power of the class's place between `largest` and `smallest`."""
    low, high = 0.0, 60.0
    for _ in range(60):
        bend = (low + high) / 2
        found = [
            round(smallest + (largest - smallest) * (1 - place / (classes - 1)) ** bend) for place in range(classes)
        ]
        low, high = (bend, high) if sum(found) > rows else (low, bend)
    place, missing = 1, rows - sum(found)
    while missing:  # to the row
        step = 1 if missing > 0 else -1
        if smallest < found[place] + step < largest:
            found[place] += step
            missing -= step
        place = place % (classes - 2) + 1
    return found


# ------------------------------------------------------------------------------------- what each process does


def generate(folder: Path, setting: dict[str, int]) -> None:
    """Write the data set of features, as the stage `indexed_features` does."""
    import numpy as np

    from longtail.workflow import files

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(setting["classes"], D)).astype(np.float32)
    sizes = counts(*(setting[key] for key in ("classes", "rows", "smallest", "largest")))
    arrays = {"class_names": np.array([f"{c} species {c}" for c in range(setting["classes"])])}
    for split, of_class in {
        "train": sizes,
        "held_out": [0] * len(sizes),
        "test": [setting["test"]] * len(sizes),
    }.items():
        labels = np.repeat(np.arange(setting["classes"]), of_class)
        values = centres[labels] + 1.5 * rng.standard_normal((len(labels), D), np.float32)
        arrays |= {f"{split}_images": values[:, None, None, :], f"{split}_labels": labels}
    files.save_arrays(folder / "data.npz", **arrays)


def index(folder: Path, setting: dict[str, int]) -> None:
    """An index of as many images, made, hashed, written and read; nothing looks for its files."""
    import numpy as np

    from longtail.data.large import index
    from longtail.workflow import files

    labels = files.load_arrays(folder / "data.npz", "train_labels", "test_labels")
    arrays: dict[str, np.ndarray] = {"class_names": np.arange(setting["classes"]).astype(str)}
    for split in index.SPLITS:
        own = labels.get(f"{split}_labels", np.zeros(0, np.int64))
        keys = [f"Plantae/{label}/{n:032x}.jpg".encode() for n, label in enumerate(own)]
        arrays |= {f"{split}_keys": np.array(keys, "S" if keys else "S1"), f"{split}_labels": own}
        arrays[f"{split}_sizes"] = np.full(len(own), 200_000)
    index.digest(arrays)
    files.save_arrays(folder / "index.npz", **arrays)
    files.load_arrays(folder / "index.npz")


def draws(folder: Path, setting: dict[str, int]) -> None:
    """An epoch's class-balanced order."""
    import torch

    from longtail.data import batches
    from longtail.workflow import files

    labels = torch.from_numpy(files.load_arrays(folder / "data.npz", "train_labels")["train_labels"])
    split = batches.Split(torch.empty(len(labels), 0, 1, 1), labels, setting["classes"])
    batches.draw_order(split, class_balanced=True, generator=batches.torch_generator(0, batches.ORDER, 1))


def train(folder: Path, method: str) -> None:
    """One epoch of the recipe `probe`, with all that a cell does."""
    from longtail.training import cell
    from longtail.workflow import params

    known = params.load(ROOT / "params.yaml")
    recipe = known["recipes"]["probe"] | {"epochs": 1}
    recipe["schedule"] = recipe["schedule"] | {"warmup_epochs": 0}
    os.chdir(folder)
    names = {"plan": "large", "dataset": "generated", "recipe": "probe", "method": method, "seed": "0"}
    cell.train(
        names, f"large-{method}", data="data.npz", recipe=recipe, method=known["methods"][method],
        model=f"{method}/model", history=f"{method}/history.csv",
    )  # fmt: skip


def predict(folder: Path) -> None:
    """What is kept of BalPoE's cell in place of its logits."""
    from longtail.training import streamed

    streamed.predict(str(folder / "data.npz"), str(folder / "balpoe/model"), str(folder / "balpoe/predictions.npz"))


def align(folder: Path) -> None:
    """Energy aligning and logit adjustment of BalPoE's logits on train."""
    from longtail.training import streamed
    from longtail.workflow import files, params

    settings = params.load(ROOT / "params.yaml")["align"]
    found = streamed.align(str(folder / "data.npz"), str(folder / "balpoe/model"), **settings)
    files.write_json(folder / "balpoe/alignment.json", found)


def evaluate(folder: Path) -> None:
    """All measures, four versions of the logits, eleven test distributions."""
    from longtail import evaluation
    from longtail.evaluation import distributions
    from longtail.training import streamed
    from longtail.workflow import files, params

    cell = folder / "balpoe"
    found = streamed.evaluate(
        str(folder / "data.npz"), str(cell / "model"), str(cell / "predictions.npz"), str(cell / "alignment.json"),
        **params.load(ROOT / "params.yaml")["evaluate"],
    )  # fmt: skip
    out = folder / "results/large/cells/generated/probe/balpoe/0"
    files.write_json(out / "metrics.json", found.measures)
    files.write_csv(out / "classes.csv", found.classes, list(found.classes[0]))
    files.write_csv(out / "distributions.csv", found.distributions, distributions.COLUMNS)
    files.write_csv(out / "reliability.csv", found.reliability, evaluation.RELIABILITY)
    files.write_csv(out / "right.csv", found.right, evaluation.RIGHT)
    files.write_text(out / "history.csv", (cell / "history.csv").read_text())


def report(folder: Path) -> None:
    """Table and page."""
    from longtail import report

    plan = {"datasets": ["generated"], "recipes": ["probe"], "methods": ["balpoe"], "seeds": [0]}
    report.write(
        "large", plan, cells_dir=folder / "results/large/cells", published=ROOT / "data/published.csv",
        times=ROOT / "benchmarks/results/time_to_accuracy.csv", out_dir=folder / "results/large",
    )  # fmt: skip


def growth(folder: Path, setting: dict[str, int]) -> dict[str, float]:
    """Seconds of each step alone on so many rows, without starting Python: what grows with the rows."""
    import numpy as np
    import torch

    from longtail import networks
    from longtail.data import batches, long_tail
    from longtail.training import streamed

    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = perf_counter()
        value = work()
        found[name] = perf_counter() - start
        return value

    rng = np.random.default_rng(0)
    labels = np.repeat(
        np.arange(setting["classes"]), counts(*(setting[key] for key in ("classes", "rows", "smallest", "largest")))
    )
    values = rng.standard_normal((len(labels), 1, 1, D), np.float32)
    timed("subsample", lambda: long_tail.subsample(labels, profile="as_is", imbalance_factor=None, seed=0))
    split = batches.Split.from_arrays(values, labels, setting["classes"], "cpu")
    generator = batches.torch_generator(0, batches.ORDER, 1)
    timed("draws", lambda: batches.draw_order(split, class_balanced=True, generator=generator))
    network = networks.build(
        hidden=0, standardize=True, channels=D, classes=setting["classes"], experts=1, head="cosine", scale=30.0,
        mean=[0.0], std=[1.0],
    )  # fmt: skip
    train_an_epoch(folder, network, split, timed)
    rows = timed("rows to fit on", lambda: streamed.fitted_rows(labels))
    with torch.inference_mode():
        logits = streamed.Logits(network, values)
        timed("all logits", lambda: sum(float(part[0, 0]) for _, part in logits.blocks()))
    found[FITTED_ON] = len(rows)
    return found


def train_an_epoch(folder: Path, network: Any, split: Any, timed: Callable[[str, Callable[[], Any]], Any]) -> None:
    """One epoch by the engine."""
    import torch

    from longtail import losses
    from longtail.training import engine, inference
    from longtail.training.checkpoints import Checkpoint
    from longtail.workflow import params

    recipe = dict(params.load(ROOT / "params.yaml")["recipes"]["probe"]) | {"epochs": 1}
    recipe["schedule"] = recipe["schedule"] | {"warmup_epochs": 0}
    settings = {key: value for key, value in recipe.items() if key not in ("network", "normalization")}
    inference.set_up(0)
    loss = losses.load("balanced_softmax")(torch.bincount(split.labels, minlength=split.num_classes), tau=1.0)
    checkpoint = Checkpoint(folder / f"growth-{len(split)}.pt", "growth")
    timed(
        "an epoch",
        lambda: engine.fit(
            network, loss, split, None, None, seed=0, checkpoint=checkpoint, on_epoch=lambda _: None, **settings
        ),
    )


PARTS: dict[str, Callable[..., Any]] = {
    "generate": generate, "index": index, "draws": draws, "growth": growth,
    "train gala": lambda folder, _: train(folder, "gala"), "train balpoe": lambda folder, _: train(folder, "balpoe"),
    "predict": lambda folder, _: predict(folder), "align": lambda folder, _: align(folder),
    "evaluate": lambda folder, _: evaluate(folder), "report": lambda folder, _: report(folder),
}  # fmt: skip


def measured(part: str, folder: Path, setting: dict[str, int]) -> tuple[float, float, Any]:
    """Wall seconds and peak memory (MB) of a part in a process of its own, imports included; and what it gives."""
    asked = json.dumps([part, str(folder), setting])
    start = perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.large"], cwd=ROOT, env={**os.environ, PART: asked, "LONGTAIL_QUIET": "1"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    seconds = perf_counter() - start
    answer = json.loads(done.stdout.splitlines()[-1])
    print(f"{part}: {seconds:.1f} s, {answer['peak_mb']:.0f} MB", file=sys.stderr, flush=True)
    return seconds, answer["peak_mb"], answer["value"]


def serve(asked: str) -> None:
    """Do the part that another process asks for."""
    part, folder, setting = json.loads(asked)
    value = PARTS[part](Path(folder), setting)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({"peak_mb": peak, "value": value if isinstance(value, dict) else None}))


# ---------------------------------------------------------------------------------------------- dvc status


def dvc_status(folder: Path, files_beside: int) -> tuple[float, float]:
    """Seconds of `dvc status` in a repository that has the index as its out, and so many images that DVC does not look
    at; and of the first one after the index was written."""
    repository = folder / "repository"
    (repository / "data/large").mkdir(parents=True)

    def run(*command: str) -> float:
        start = perf_counter()
        subprocess.run(command, cwd=repository, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return perf_counter() - start

    dvc = [sys.executable, "-m", "dvc"]
    run("git", "init", "-q")
    run(*dvc, "init", "-q")
    (repository / ".dvcignore").write_text("/data/large\n")
    for number in range(files_beside):
        path = repository / f"data/large/{number // 1000:04}/{number:08}.jpg"
        if number % 1000 == 0:
            path.parent.mkdir()
        path.touch()
    command = f"cp {folder / 'index.npz'} data/index.npz"
    run(*dvc, "stage", "add", "-q", "-n", "index", "-o", "data/index.npz", command)
    run(*dvc, "repro", "-q")
    return run(*dvc, "status", "-q"), run(*dvc, "status", "-q")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    if asked := os.environ.get(PART):
        serve(asked)
        return
    args = flags(__doc__, argv)
    setting, sizes = (QUICK, GROWTH_QUICK) if args.quick else (FULL, GROWTH)
    with Worker("machine", Setting(side=512)) as machine:
        about = machine.hello
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured("generate", folder, setting)
        rows = [(step, *measured(step, folder, setting)[:2]) for step in STEPS]
        size = (folder / "index.npz").stat().st_size
        beside = 1000 if args.quick else 100_000
        first, second = dvc_status(folder, beside)
        grown = []
        for count in sizes:
            classes = setting["classes"] if args.quick else GROWTH_CLASSES
            one = {"classes": classes, "rows": count, "smallest": 2, "largest": max(20, count * 12 // classes)}
            _, peak, found = measured("growth", folder, one)
            grown.append((count, peak, found))
    write(args, about, setting, rows, (size, beside, first, second), grown)


def write(
    args: Any, about: Any, setting: dict[str, int], rows: list, status: tuple[int, int, float, float], grown: list
) -> None:
    """The report."""
    size, beside, first, second = status
    out = Report()
    classes = setting["classes"] if args.quick else GROWTH_CLASSES
    logits = setting["rows"] * setting["classes"] * 4 / 1e9
    out.say(
        "# A set of iNaturalist 2018's size", "", machine_line(about), "",
        f"{setting['rows']:,} rows, {setting['classes']:,} classes of {setting['smallest']} to "
        f"{setting['largest']:,}, {setting['test'] * setting['classes']:,} test rows, features of {D} numbers, "
        "generated. Each step in a process "
        f"of its own, imports included; BalPoE with three experts. `predict` of other plans would write {logits:.1f} "
        "GB of logits of train for each expert; here none are kept.",
    )  # fmt: skip
    out.table(
        ("Step", "Seconds", "Peak memory (MB)"),
        [(step, f"{seconds:.1f}", f"{peak:.0f}") for step, seconds, peak in rows],
    )
    out.say(
        f"\nThe index has {size / 1e6:.1f} MB. `dvc status` with it, beside {beside:,} files below data/large: "
        f"{first:.1f} s, and {second:.1f} s the second time.\n",
        f"Growth with the rows ({classes:,} classes, one expert, D = {D}), seconds of the step alone:\n",
    )
    names = [name for name in grown[0][2] if name != FITTED_ON]
    out.table(
        ("Rows", *names, FITTED_ON, "Peak memory (MB)"),
        [
            (f"{count:,}", *(f"{found[name]:.3f}" for name in names), f"{found[FITTED_ON]:,.0f}", f"{peak:.0f}")
            for count, peak, found in grown
        ],
    )
    if args.results:
        out.write(args.results / "large.md")
        draw([(count, {name: found[name] for name in names}) for count, _, found in grown], args.results / "large.png")


def draw(grown: Sequence[tuple[int, dict[str, float]]], path: Path) -> None:
    """Seconds of each step against rows, both by powers of ten, beside what grows as the rows do."""
    import matplotlib
    from matplotlib.figure import Figure

    from longtail.report.plots import PALETTE, PIXELS, STYLE

    rows = [count for count, _ in grown]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]  # its names are a Literal
        canvas = Figure(figsize=(7.2, 4.6), layout="constrained")
        axis = canvas.subplots()
        for number, name in enumerate(grown[0][1]):
            seconds = [found[name] for _, found in grown]
            color = PALETTE[number % len(PALETTE)]
            axis.plot(rows, seconds, "o-", color=color, label=name)
            axis.plot(rows, [seconds[-1] * count / rows[-1] for count in rows], ":", color=color, linewidth=1)
        axis.plot([], [], "k:", linewidth=1, label="in proportion to the rows")
        axis.set(xscale="log", yscale="log", xlabel="rows", ylabel="seconds of the step alone")
        axis.set_ylim(bottom=1e-3)  # below, it is the clock that is measured
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        canvas.legend(loc="outside right upper")
        canvas.savefig(path, dpi=PIXELS * 1.5, metadata={"Software": None})


if __name__ == "__main__":
    main()
