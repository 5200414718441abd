"""The contract of the pipeline: what stages declare, what re-runs, what comes back, in a real `dvc repro`."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from dvc.lock import LockError
from dvc.repo import Repo
from ruamel.yaml import main

from longtail import cli
from longtail.workflow import declaration, files, focus, jobs, manifest, pipeline
from longtail.workflow.cells import Cell, of_plan
from longtail.workflow.jobs import Job
from longtail.workflow.locks import STAGES

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
PORTABLE = "stages/portable.py"  # runs another script


@pytest.fixture(scope="module")
def stages():
    with Repo(str(ROOT)) as repo:
        return {stage.addressing: stage for stage in repo.index.stages}


def manifest_of(stage) -> str:
    """The name of the manifest that a stage has to depend on, from its command."""
    words = [word for word in stage.cmd.split() if word != PORTABLE]
    script = Path(words[1]).stem
    flags = {"download": "--source", **dict.fromkeys(manifest.BY_METHOD, "--method")}
    flags |= dict.fromkeys(("incremental_train", "stream_incremental_train"), "--training")
    flag = flags.get(script)
    return f"{script}-{words[words.index(flag) + 1]}" if flag else script


def test_every_stage_declares_the_manifest_of_its_code_and_no_other_code(stages):
    wrong = {}
    for name, stage in stages.items():
        paths = [Path(dep.fs_path).relative_to(ROOT).as_posix() for dep in stage.deps if not hasattr(dep, "params")]
        code = [path for path in paths if path.startswith(("src", "stages"))]
        expected = [f"{manifest.FOLDER}/{manifest_of(stage)}.txt"]
        if PORTABLE in stage.cmd:
            expected.append(f"{manifest.FOLDER}/portable.txt")
        if name == "quick":
            expected = ["stages/show.py"]
        if name.endswith(":check"):  # the one stage whose result the schema does decide
            schema = [f"src/longtail/workflow/{file}.py" for file in ("files", "incremental", "params", "ranges")]
            expected = [*schema, "stages/check.py"]
        if name.endswith(":manifests"):
            scripts = {file.name for file in (ROOT / "stages").glob("*.py")} - {"check.py", "show.py"}
            expected = ["src/longtail", *(f"stages/{script}" for script in scripts)]
        if set(code) != set(expected):
            wrong[name] = {"declared": code, "expected": expected}
    assert not wrong


def test_a_stage_is_read_as_dvc_reads_it(stages, monkeypatch):
    """Every tenth of each kind, the first and the last among them: all of a kind come from one template."""
    monkeypatch.chdir(ROOT)
    kinds: dict[str, list[str]] = {}
    for address in stages:
        kinds.setdefault(address.partition("@")[0], []).append(address)
    for address in dict.fromkeys(one for of_kind in kinds.values() for one in [*of_kind[::10], of_kind[-1]]):
        stage = stages[address]
        keys = [key for dep in stage.deps if hasattr(dep, "params") for key in dep.params]
        deps = [Path(dep.fs_path).relative_to(ROOT).as_posix() for dep in stage.deps if not hasattr(dep, "params")]
        assert declaration.read(address) == (stage.cmd, sorted(deps), sorted(keys)), address


def test_dvc_has_the_compiled_parser_and_reads_the_same_with_it():
    assert main.CParser is not None, "pip install -c constraints.txt -e '.[pipeline]'"
    for path in (ROOT / "params.yaml", *(ROOT / "stages").glob("**/dvc.yaml"), ROOT / "stages/quick/dvc.lock"):
        compiled, plain = (main.YAML(typ="safe", pure=pure).load(path.read_text()) for pure in (False, True))
        assert repr(compiled) == repr(plain), path


def test_every_manifest_is_asked_for_and_there(stages):
    asked = {manifest_of(stage) for stage in stages.values()} - manifest.WITHOUT | {"portable"}
    named = set(manifest.starts(ROOT, PARAMS))
    assert asked <= named
    # methods and trainings that no plan has
    unused = ("train-", "incremental_train-", "finetune", "stream_train-", "stream_refit-", "stream_incremental_train-")
    assert {name for name in named - asked if not name.startswith(unused)} == set()


def test_every_cell_of_every_plan_has_its_stages_and_there_are_no_others(stages):
    plans = cli.plans_of(PARAMS)
    expected = {
        "quick",
        *(f"stages/dvc.yaml:{name}" for name in ("check", "manifests", "fisher")),
        *(f"stages/dvc.yaml:download@{source}" for source in PARAMS["sources"]),
        *(f"stages/dvc.yaml:subsample@{dataset}" for dataset in PARAMS["datasets"]),
        *(f"stages/dvc.yaml:features@{name}" for name in PARAMS["features"]),
        *(f"stages/dvc.yaml:index@{name}" for name in PARAMS["indexes"]),
        *(f"stages/dvc.yaml:indexed_features@{name}" for name in PARAMS["indexed"]),
        *(f"stages/dvc.yaml:stream@{name}" for name in PARAMS["streams"]),
        *(f"stages/{plan}/dvc.yaml:report-{plan}" for plan in plans),
        *(f"stages/{plan}/dvc.yaml:readings-{plan}" for plan, block in plans.items() if block.get("readings")),
        *(address for plan in plans for cell in cli.cells_of(plan, PARAMS) for address in cli.stages(PARAMS, cell)),
    }
    assert set(stages) == expected


def test_another_dvc_at_work_is_named(monkeypatch):
    def locked(_):
        raise LockError("Unable to acquire lock. Most likely another DVC process is running")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["longtail", "verify"])
    monkeypatch.setitem(cli.COMMANDS, "verify", locked)
    with pytest.raises(SystemExit, match="another DVC command is at work in this repository"):
        cli.main()


@pytest.mark.parametrize(
    ("plan", "only", "methods"),
    [
        ("methods", "cifar100_if100-short-crt-1", ["ce", "crt"]),
        ("methods", "cifar100_if100-short-balpoe_apart-1", ["ce", "balanced_softmax", "inverse", "balpoe_apart"]),
        ("methods", "cifar100_if100-short-gala-1", ["gala"]),
        ("composed", "*-balpoe_five_mirrored-1", ["balpoe_five", "balpoe_five_mirrored"]),
    ],
)
def test_cells_that_are_asked_for_come_with_those_that_they_start_from(monkeypatch, plan, only, methods):
    monkeypatch.chdir(ROOT)
    chosen = cli.choose(plan, PARAMS, only)
    assert [cell.method for cell in chosen] == methods and {cell.seed for cell in chosen} == {"1"}


@pytest.mark.parametrize("plan", cli.plans_of(PARAMS))
def test_a_plans_file_is_what_the_template_gives(plan):
    assert (ROOT / pipeline.file(plan)).read_text() == pipeline.text(plan, PARAMS), f"longtail plan {plan}"


@pytest.mark.parametrize(
    ("plan", "changes", "message"),
    [
        ("big", {}, "plan 'big' is not in params.yaml; there are quick"),
        ("code", {"code": PARAMS["plans"]["quick"]}, "stages/code is the folder of the manifests"),
        (
            "two",
            {"two": PARAMS["plans"]["methods"] | {"fuse": ["a", "b"]}},
            r"plans\.two\.fuse = .*: one method at most",
        ),
    ],
)
def test_a_plan_that_cannot_have_a_file_is_refused(plan, changes, message):
    with pytest.raises(ValueError, match=message):
        pipeline.text(plan, PARAMS | {"plans": PARAMS["plans"] | changes})


def test_a_plain_repro_needs_nothing_of_another_plan():
    with Repo(str(ROOT)) as repo:
        graph = repo.index.graph
        todo = [stage for stage in graph.nodes if stage.addressing == "quick"]
        needed = set()
        while todo:
            stage = todo.pop()
            needed.add(stage.addressing)
            todo.extend(graph.successors(stage))
    assert "stages/dvc.yaml:download@digits" in needed
    assert not [name for name in needed if "cifar" in name or "smoke" in name or "paper" in name]


def test_no_param_is_of_the_machine():
    text = (ROOT / "params.yaml").read_text().split("# What runs.")[1]
    for word in ("device", "threads", "workers", "tracking", "progress"):
        assert word not in text


@pytest.mark.slow
def test_the_table_of_params_is_what_dvc_says():
    """A fourth of its 1,400 lines: all of them take a minute."""
    result = subprocess.run(
        [sys.executable, "docs/params_table.py", "--check", "--every", "4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", ["docs/tables.py", "docs/papers.py"])
def test_the_tables_in_documents_are_those_of_the_committed_results(script):
    result = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


class Clone:
    """A copy of the working tree with a plan of two short cells, and DVC in it, which sees these plans alone.

    Of the 12 seconds that `dvc repro` takes to find nothing to do, 9 are for plans that no test here asks for.
    """

    def __init__(self, folder: Path, *plans: str):
        self.root = folder
        names = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        for name in names:
            if name.startswith(("results/", "tests/")) or name.endswith("dvc.lock") or not (ROOT / name).is_file():
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
        self.run("git", "init", "-q", ".")
        focus.write(folder, plans)
        self.edit(
            "    - balanced_softmax\n    - gala\n    - balpoe\n    seeds:\n    - 0\n    - 1\n",
            "    - gala\n    seeds:\n    - 0\n",
            count=1,
        )
        self.edit("epochs: 40", "epochs: 3")
        self.original = (folder / "params.yaml").read_text()

    def run(self, *command: str, **environment: str) -> str:
        """The output of a command that must succeed."""
        env = {**os.environ, "PYTHONPATH": str(self.root / "src"), "OMP_NUM_THREADS": "1", **environment}
        result = subprocess.run(command, cwd=self.root, capture_output=True, text=True, env=env, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    def repro(self, *args: str, **environment: str) -> list[str]:
        """Run `dvc repro`; return the stages whose command ran, without the file they are in."""
        output = self.run(sys.executable, "-m", "dvc", "repro", *args, **environment)
        lines = output.splitlines()
        return [
            line.split("'")[1].split(":")[-1]
            for line, following in zip(lines, [*lines[1:], ""], strict=True)
            if line.startswith("Running stage") and following.startswith(">")
        ]

    def edit(self, old: str, new: str, name: str = "params.yaml", count: int = -1) -> None:
        text = (self.root / name).read_text()
        assert old in text
        (self.root / name).write_text(text.replace(old, new, count))

    def restore(self) -> None:
        (self.root / "params.yaml").write_text(self.original)

    def lock(self) -> dict[str, dict]:
        return yaml.safe_load((self.root / "stages/quick/dvc.lock").read_text())["stages"]

    def outs(self, stage: str) -> dict[str, str]:
        return {out["path"]: out["md5"] for out in self.lock()[stage]["outs"]}


CE, GALA = "digits_if20-digits-ce-0", "digits_if20-digits-gala-0"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    os.environ["LONGTAIL_LIVE_AFTER"] = "off"
    clone = Clone(tmp_path_factory.mktemp("clone"), "quick")
    clone.first = clone.repro()
    return clone


def test_the_first_run_makes_the_plan_in_order(clone):
    cells = [f"{step}-quick@{cell}" for cell in (CE, GALA) for step in STAGES]
    assert set(clone.first) == {
        "check",
        "manifests",
        "download@digits",
        "subsample@digits_if20",
        *cells,
        "report-quick",
        "quick",
    }
    assert clone.first[:2] == ["check", "manifests"] and clone.first[-2:] == ["report-quick", "quick"]
    assert "Cross-entropy" in (clone.root / "results/quick/table.md").read_text()


def test_the_second_run_does_nothing(clone):
    assert clone.repro() == []


def test_editing_lambda_trains_gala_alone_and_putting_it_back_trains_nothing(clone):
    clone.edit("lambda1: 1.0", "lambda1: 0.5")
    ran = clone.repro()
    assert [name for name in ran if "train" in name] == [f"train-quick@{GALA}"]
    assert not [name for name in ran if "-ce-" in name]
    clone.restore()
    assert not [name for name in clone.repro() if name.startswith(("train", "predict", "align", "subsample"))]


def test_bins_of_ece_train_nothing(clone):
    clone.edit("ece_bins: 15", "ece_bins: 12")
    assert set(clone.repro()) == {
        "check", *(f"evaluate-quick@{cell}" for cell in (CE, GALA)), "report-quick", "quick",
    }  # fmt: skip
    clone.restore()
    clone.repro()


def test_a_line_of_another_plan_re_runs_only_the_check(clone):
    clone.edit("epochs: 200", "epochs: 190")
    clone.edit("      milestones:\n      - 160\n", "      milestones:\n      - 150\n")
    assert clone.repro() == ["check"]
    clone.restore()
    clone.repro()


def test_editing_a_loss_trains_its_cells_alone(clone):
    path = clone.root / "src/longtail/losses/gala.py"
    text = path.read_text()
    path.write_text(text + "# edited\n")
    assert clone.repro() == ["manifests"]
    path.write_text(text.replace("class Loss(BaseLoss):", "class Loss(BaseLoss):\n    edited = True"))
    # the same weights come out, so that nothing follows
    assert clone.repro() == ["manifests", f"train-quick@{GALA}"]
    path.write_text(text)
    clone.repro()


def documented(language: str) -> str:
    """The first block of docs/methods.md in this language."""
    text = (ROOT / "docs" / "methods.md").read_text()
    return text.split(f"```{language}\n")[1].split("```")[0]


def test_the_documented_method_is_a_file_and_a_block_and_trains_its_cells_alone(clone):
    loss = clone.root / "src/longtail/losses/prior_smoothing.py"
    loss.write_text(documented("python"))
    added = yaml.safe_load(documented("yaml"))["methods"]["prior_smoothing"]
    clone.edit("    - gala\n    seeds:\n", "    - gala\n    - prior_smoothing\n    seeds:\n", count=1)
    clone.edit("\n  focal:\n", f"\n  prior_smoothing: {json.dumps(added)}\n  focal:\n")
    ran = clone.repro()
    new = [f"{step}-quick@{CE.replace('-ce-', '-prior_smoothing-')}" for step in STAGES]
    assert ran == ["check", "manifests", *new, "report-quick", "quick"]
    assert "prior_smoothing" in (clone.root / "results/quick/table.md").read_text()
    clone.edit('"share": 0.1', '"share": 2')
    output = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], cwd=clone.root, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(clone.root / "src")},
    )  # fmt: skip
    assert "methods.prior_smoothing.share = 2: input should be less than 1" in output.stdout + output.stderr
    clone.restore()
    loss.unlink()
    clone.repro()


def test_a_forced_run_has_the_same_bytes_and_another_seed_has_others(clone):
    names = [f"{step}-quick@{GALA}" for step in STAGES]
    before = {name: clone.outs(name) for name in names}
    addresses = [f"stages/quick/dvc.yaml:{name}" for name in names]
    assert clone.repro("-f", "-s", *addresses) == names
    assert {name: clone.outs(name) for name in names} == before
    clone.edit("    seeds:\n    - 0\n", "    seeds:\n    - 0\n    - 1\n", count=1)
    clone.repro(f"stages/quick/dvc.yaml:train-quick@{GALA[:-1]}1")
    other = clone.outs(f"train-quick@{GALA[:-1]}1")
    assert set(other.values()).isdisjoint(before[names[0]].values())
    clone.restore()


def test_wrong_params_run_nothing(clone):
    clone.edit("ece_bins: 15", "ece_bins: 0")
    result = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], cwd=clone.root, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(clone.root / "src")},
    )  # fmt: skip
    clone.restore()
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "evaluate.ece_bins = 0: input should be greater than or equal to 1" in output
    assert "Running stage 'stages/quick/dvc.yaml:evaluate" not in output


def test_params_edited_during_a_training_are_not_recorded_as_its_own(clone):
    """DVC hashes params when a stage ends; without the guard the lock would say lambda1 3 for a network of 1."""
    stage = f"train-quick@{GALA}"
    clone.edit("epochs: 3\n", "epochs: 30\n")
    before = clone.lock()[stage]
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "-s", f"stages/quick/dvc.yaml:{stage}"], cwd=clone.root, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(clone.root / "src")},
    )  # fmt: skip
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if "epoch 1/30" in line:
            clone.edit("lambda1: 1.0", "lambda1: 3.0")
    assert process.wait() != 0
    assert f"{stage}: its code, data or params were edited while it ran" in output
    assert clone.lock()[stage] == before
    clone.restore()
    clone.repro()


def test_a_broken_file_between_stages_is_named_and_leaves_nothing(clone):
    folder = clone.root / f"runs/quick/{GALA.replace('-', '/')}"
    predictions = folder / "predictions.npz"
    whole = predictions.read_bytes()
    predictions.unlink()  # a link to DVC's cache, perhaps: never write through it
    predictions.write_bytes(whole[:1000])
    result = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "-s", f"stages/quick/dvc.yaml:align-quick@{GALA}"], cwd=clone.root,
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(clone.root / "src")},
    )  # fmt: skip
    assert result.returncode != 0
    assert "predictions.npz: not a readable .npz file" in result.stdout + result.stderr
    assert not (folder / "alignment.json").exists()
    predictions.write_bytes(whole)
    clone.repro()


def test_cells_run_side_by_side_with_one_command(clone):
    clone.edit("    seeds:\n    - 0\n", "    seeds:\n    - 0\n    - 2\n", count=1)
    output = clone.run(sys.executable, "-m", "longtail.cli", "run", "quick", "--jobs", "2", "--only", "*-2")
    assert "table: results/quick/table.md" in output
    for method in ("ce", "gala"):
        assert (clone.root / f"results/quick/cells/digits_if20/digits/{method}/2/metrics.json").exists()
    status = json.loads(
        clone.run(sys.executable, "-m", "dvc", "status", "--json", "stages/quick/dvc.yaml:report-quick")
    )
    assert status == {}
    clone.restore()


def test_longtail_run_leaves_what_dvc_repro_leaves_lock_included(clone):
    """One process for many stages, handed over to a warm one: nothing of the record may differ."""

    def made() -> dict[str, bytes]:
        paths = [*(clone.root / "results/quick").rglob("*.*"), clone.root / "stages/quick/dvc.lock"]
        return {str(path): path.read_bytes() for path in paths}

    clone.edit("ece_bins: 15", "ece_bins: 11")
    assert len(clone.repro("stages/quick/dvc.yaml")) == 4  # the check, two evaluations, the report
    expected = made()
    clone.restore()
    clone.repro()
    assert made() != expected
    clone.edit("ece_bins: 15", "ece_bins: 11")
    clone.run(sys.executable, "-m", "longtail.cli", "run", "quick", "--jobs", "2")
    assert made() == expected
    assert clone.repro("stages/quick/dvc.yaml") == []
    clone.restore()
    clone.repro()


def test_a_job_goes_on_after_a_stage_that_failed_and_after_its_own_end(clone, monkeypatch):
    monkeypatch.chdir(clone.root)
    monkeypatch.setenv("PYTHONPATH", str(clone.root / "src"))
    job = Job({})
    try:
        assert not job.run(["stages/quick/dvc.yaml:nothing"])
        assert job.run(cli.stages(PARAMS, Cell.parse("quick", CE)))
        assert job.process is not None
        job.process.kill()
        job.process.wait()
        assert job.unchanged(cli.stages(PARAMS, Cell.parse("quick", CE)))
    finally:
        job.close()


def test_a_plan_of_ones_own_is_a_block_and_a_command(clone):
    axes = {"datasets": ["digits_if20"], "recipes": ["digits"], "methods": ["ce"], "seeds": [5]}
    clone.edit("\n  smoke:  ", f"\n  mine: {json.dumps(axes)}\n  smoke:  ")
    clone.run(sys.executable, "-m", "longtail.cli", "plan", "mine")
    locks = {path: path.read_bytes() for path in clone.root.glob("stages/*/dvc.lock")}
    clone.run(sys.executable, "-m", "longtail.cli", "run", "mine")
    assert "Cross-entropy" in (clone.root / "results/mine/table.md").read_text()
    assert {path: path.read_bytes() for path in locks} == locks  # of the other plans
    tracked = clone.run(sys.executable, "-m", "longtail.cli", "track", "mine")
    assert "MLflow runs: 1 created, 0 finished, 0 unchanged" in tracked and "results/mine/table.md" in tracked
    shutil.rmtree(clone.root / "stages/mine")
    clone.restore()
    clone.repro()


class FakeJob:
    """A job that does nothing but say what it was asked."""

    asked: list[tuple[str, list[str]]]
    is_unchanged = True
    fails = ()
    closes = True

    def __init__(self, environment, bar=None):
        self.device = environment["LONGTAIL_DEVICE"]

    def run(self, addresses):
        self.asked.append((self.device, addresses))
        return not addresses[-1].endswith(self.fails)

    def unchanged(self, addresses):
        return self.is_unchanged

    def close(self):
        self.asked.append(("closed", []))
        return self.closes


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "Job", FakeJob)
    monkeypatch.setattr(FakeJob, "asked", [], raising=False)
    return FakeJob.asked


def test_jobs_share_the_devices(asked, monkeypatch):
    """Two GPUs, three jobs: a device is used by those jobs that were given it, and none is made up."""
    monkeypatch.setenv("LONGTAIL_DEVICE", "cuda:0,cuda:1")
    assert cli.run("quick", "*", 3) == 0
    cells = [device for device, addresses in asked if len(addresses) == len(STAGES)]
    assert len(cells) == len(of_plan("quick", PARAMS["plans"]["quick"])) and set(cells) == {"cuda:0", "cuda:1"}
    assert asked[-3:] == [("closed", [])] * 3


@pytest.mark.parametrize(("jobs", "processes", "threads"), [(2, "1", 8), (2, "4", 2), (8, "4", 1), (2, "no", 8)])
def test_processes_of_a_cell_share_the_threads_of_its_job(asked, monkeypatch, jobs, processes, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LONGTAIL_PROCESSES", processes)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    given = []
    monkeypatch.setattr(cli, "Job", lambda environment, bar: given.append(environment) or FakeJob(environment, bar))
    assert cli.run("quick", "*", jobs) == 0
    assert {environment["OMP_NUM_THREADS"] for environment in given} == {str(threads)}


def test_a_job_that_cannot_record_what_ran_is_a_failure(asked, monkeypatch):
    monkeypatch.setattr(FakeJob, "closes", False)
    assert cli.run("quick", "*", 2) == 2


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A DVC project with one stage, of half a minute."""
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=tmp_path, check=True)
    (tmp_path / "dvc.yaml").write_text("stages:\n  long:\n    cmd: touch began; sleep 30; touch out\n    outs: [out]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_job_ends_with_a_word(bare):
    """As often as being hung up on could have come before it: the exit status would be of no use."""
    assert jobs.Job({}).close()  # never started
    for _ in range(3):
        job = jobs.Job({})
        assert not job.unchanged(["dvc.yaml:long"])
        assert job.close()
        assert job.process is not None and job.process.poll() is not None


def test_a_job_that_fails_to_record_or_died_says_no(bare, monkeypatch):
    script = "import sys\nfrom longtail.workflow import jobs\ndef close(self): raise OSError('full')\n"
    script += "jobs.Stages.close = close\njobs.serve(jobs.Connection(int(sys.argv[-1])))\n"
    (bare / "full.py").write_text(script)
    started = subprocess.Popen
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", lambda command, **given: started(
            [command[0], str(bare / "full.py"), command[-1]], **given
        ))  # fmt: skip
        job = jobs.Job({})
        assert not job.unchanged(["dvc.yaml:long"])
        assert not job.close()
    job = jobs.Job({})
    assert not job.unchanged(["dvc.yaml:nothing"])  # an exception there, and its process ends
    assert not job.close()
    job = jobs.Job({})
    assert not job.unchanged(["dvc.yaml:long"])
    job.process.kill()
    job.process.wait()
    assert not job.close()


@pytest.mark.parametrize("how", ["a signal to the job", "Ctrl-C here"])
def test_a_stage_that_is_broken_off_is_not_done_and_ends(bare, how, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    def interrupt():
        while not (bare / "began").exists() and time.monotonic() < began + 20:
            time.sleep(0.02)
        os.kill(os.getpid() if how == "Ctrl-C here" else job.process.pid, signal.SIGTERM)

    job, began = jobs.Job({}), time.monotonic()
    before = signal.signal(signal.SIGTERM, stopped)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt) if how == "Ctrl-C here" else nullcontext():
            assert not job.run(["dvc.yaml:long"])
        assert not job.close()  # at once: a question was left open, or there is nobody any more
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - began < 25 and not (bare / "out").exists()


def test_data_that_are_there_are_left_alone_and_a_failure_is_told(asked, monkeypatch, capsys):
    """DVC locks them while another `longtail run` trains on them."""
    monkeypatch.setattr(FakeJob, "fails", ("subsample@digits_if20",))
    assert cli.run("quick", "*", 1) == 0
    assert not [addresses for _, addresses in asked if "stages/dvc.yaml" in "".join(addresses)]
    assert asked[-2][1] == ["stages/quick/dvc.yaml:report-quick"]
    assert "table: results/quick/table.md" in capsys.readouterr().out
    monkeypatch.setattr(FakeJob, "is_unchanged", False)
    assert cli.run("quick", "*-ce-*", 1) == 2
    said = "failed: the data; `dvc repro stages/dvc.yaml:manifests stages/dvc.yaml:subsample@digits_if20` says why"
    assert said in capsys.readouterr().err


def made(asked):
    """The stages that were asked for one at a time: what sums a plan up."""
    return [addresses[0].rpartition(":")[2] for _, addresses in asked if len(addresses) == 1]


def test_a_report_that_failed_is_a_failure(asked, capsys, monkeypatch):
    monkeypatch.setattr(FakeJob, "fails", ("report-quick",))
    assert cli.run("quick", "*", 1) == 1
    said = capsys.readouterr()
    assert "table:" not in said.out
    assert "failed: the report (its message is above; `dvc repro -s stages/quick/dvc.yaml:report-quick`" in said.err
    monkeypatch.setattr(sys, "argv", ["longtail", "run", "quick"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1


LONG = "cifar100_ldam_if100_held_out-ldam-ce-1"  # the one cell of posthoc-long


def test_a_plan_with_readings_compares_its_cells_and_reads_them(asked, capsys, monkeypatch):
    addresses = cli.stages(PARAMS, Cell.parse("posthoc-long", LONG))
    kinds = [address.rpartition(":")[2].partition("-")[0] for address in addresses]
    assert kinds == ["train", "predict", "align", "evaluate", "compare"]
    assert not any("compare" in address for address in cli.stages(PARAMS, Cell.parse("quick", CE)))
    assert cli.run("posthoc-long", "*", 1) == 0
    assert made(asked) == ["readings-posthoc-long", "report-posthoc-long"]
    monkeypatch.setattr(FakeJob, "fails", ("readings-posthoc-long",))
    assert cli.run("posthoc-long", "*", 1) == 1
    said = capsys.readouterr()
    assert "failed: the readings" in said.err and "table: results/posthoc-long/table.md" in said.out


def test_readings_are_of_the_cells_that_have_run(asked, capsys, monkeypatch):
    block = PARAMS["plans"]["posthoc-long"]
    for seeds, readings, said in (
        ([1, 99], ["readings-posthoc-long"], "readings: of 1 of 2 cells; the others are still to come"),
        ([98, 99], [], "readings: of 0 of 2 cells"),
    ):
        asked.clear()
        plans = {**PARAMS["plans"], "posthoc-long": {**block, "seeds": seeds}}
        monkeypatch.setattr(cli.schema, "load", lambda plans=plans: PARAMS | {"plans": plans})
        assert cli.run("posthoc-long", "*", 1) == 0
        assert made(asked) == [*readings, "report-posthoc-long"]
        assert said in capsys.readouterr().out


def test_a_plan_without_stages_is_named(monkeypatch):
    plans = {**PARAMS["plans"], "mine": PARAMS["plans"]["quick"]}
    monkeypatch.setattr(cli.schema, "load", lambda: PARAMS | {"plans": plans})
    with pytest.raises(ValueError, match=r"plan 'mine' has no stages/mine/dvc\.yaml; `longtail plan mine` writes it"):
        cli.run("mine", "*", 1)


def test_the_command_names_what_there_is():
    with pytest.raises(ValueError, match=r"plan 'big' is not in params.yaml; there are quick, frozen-cifar100, "):
        cli.run("big", "*", 1)
    with pytest.raises(ValueError, match=r"--only 'x' matches no cell; it is one of digits_if20-digits-ce-0,"):
        cli.run("quick", "x", 1)


def test_the_name_that_was_meant_is_said():
    with pytest.raises(
        ValueError,
        match=r"plan 'quikc' is not in params.yaml; did you mean quick\? There are quick, frozen-cifar100, ",
    ):
        cli.run("quikc", "*", 1)


def test_a_run_says_which_cell_it_is_at(asked, capsys, monkeypatch):
    monkeypatch.delenv("LONGTAIL_QUIET", raising=False)
    assert cli.run("quick", "*-ce-*", 1) == 0
    said = capsys.readouterr().out
    assert "cell 1 of 2: digits_if20-digits-ce-0" in said and "cell 2 of 2: digits_if20-digits-ce-1" in said


def test_after_ctrl_c_no_other_cell_is_begun(asked, monkeypatch):
    """The stage that runs has had it as well and failed; the jobs must not take the next cell."""
    begun = []

    def interrupted(self, addresses):
        begun.append(addresses)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # until the main thread has it
        return False

    monkeypatch.setattr(FakeJob, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli.run("quick", "*", 1)
    assert len(begun) == 1


def test_bare_longtail_prints_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["longtail"])
    cli.main()
    assert "run a plan's cells side by side" in capsys.readouterr().out


def test_a_left_over_plan_is_named_and_pruned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/dvc.yaml").write_text("stages: {}\n")
    for plan, text in (("gone", pipeline.text("quick", PARAMS).replace("quick", "gone")), ("own", "stages: {}\n")):
        files.write_text(f"stages/{plan}/dvc.yaml", text)
    files.write_text("stages/gone/dvc.lock", "schema: '2.0'\n")
    monkeypatch.setattr(cli.schema, "load", lambda: PARAMS)
    monkeypatch.setattr(sys, "argv", ["longtail", "check"])
    with pytest.raises(SystemExit, match=r"stages/gone/dvc\.yaml: of a plan .* `longtail plan --prune` removes it"):
        cli.main()
    monkeypatch.setattr(sys, "argv", ["longtail", "plan", "--prune", "quick"])
    cli.main()
    assert capsys.readouterr().out.splitlines() == ["stages/gone/dvc.yaml removed", "stages/quick/dvc.yaml"]
    assert sorted(path.name for path in (tmp_path / "stages").iterdir()) == ["dvc.yaml", "own", "quick"]
    monkeypatch.setattr(sys, "argv", ["longtail", "check"])
    cli.main()


def test_the_clone_does_not_import_this_tree(clone):
    """The tests above would prove nothing if the copy ran this tree's package."""
    where = clone.run(sys.executable, "-c", "import longtail; print(longtail.__file__)")
    assert where.strip() == str(clone.root / "src/longtail/__init__.py")
    assert importlib.util.find_spec("longtail") is not None
