"""Kills, full disks, two at a time: what nothing may be lost by. benchmarks/faults.py tries it at length."""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT
from dvc.lock import LockError
from dvc.repo import Repo

sys.path.insert(0, str(ROOT))
from benchmarks import faults

from longtail.workflow import files, jobs, pipeline, stage

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
STAGES = {"check": "stages/dvc.yaml:check", "subsample": faults.ADDRESSES["subsample"]}  # quick ones
SECONDS = {"check": 0.8, "subsample": 1.0}  # roughly: a moment is a share of them
TRIES = [
    *(("check", kind, 0.3 + 0.1 * n) for n, kind in enumerate(faults.KINDS)),
    *(("subsample", kind, 0.3 + 0.2 * n) for n, kind in enumerate(faults.KINDS[:4])),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A tiny project with its data."""
    folder = tmp_path_factory.mktemp("faults")
    first = faults.Project(folder / "whole").make()
    first.run([*faults.DVC, "repro", STAGES["subsample"]])
    bench = faults.Bench(folder)
    bench.seconds = SECONDS
    return bench


@pytest.mark.parametrize(("name", "kind", "moment"), TRIES, ids=[f"{name}, {kind.name}" for name, kind, _ in TRIES])
def test_an_interrupted_stage_goes_on_to_the_same_bytes_and_leaves_nothing(bench, name, kind, moment):
    target = faults.Target(name, (*faults.DVC, "repro", STAGES[name]), (STAGES[name],))
    outcome = None
    while outcome is None:  # the stage had ended, or had not begun
        outcome = bench.interrupt(target, kind, moment)
        moment /= 2
    assert outcome.wrong == []


def test_the_harness_sees_what_is_wrong(bench):
    """A file that is left over, other bytes, an orphan: each is told."""
    bench.prepare(faults.Target("none", (), ()))
    root = bench.project.root
    assert faults.difference(bench.project.tree(), bench.expected) == []
    (root / "data/raw/.digits.npz.abcd1234").write_text("half")
    (root / "data/params.ok").write_text("other")
    (root / "results/profiles/digits_if20.csv").unlink()
    found = faults.difference(bench.project.tree(), bench.expected)
    assert found == [
        "missing: results/profiles/digits_if20.csv", "left over: data/raw/.digits.npz.abcd1234",
        "other bytes: data/params.ok",
    ]  # fmt: skip
    process = bench.project.start(["sleep", "60"])
    assert list(bench.project.processes()) == [process.pid]
    process.kill()
    process.communicate()
    assert bench.project.processes() == {}
    cached = next((root / ".dvc/cache/files/md5").glob("??/*"))
    cached.chmod(0o644)
    cached.write_text("other")
    assert bench.project.damaged() == [str(cached.relative_to(root))]


@pytest.mark.parametrize("written", ["", "    cmd: python check.py\n    outs:\n    - path: data/params.ok\n"])
def test_what_plain_dvc_had_half_written_is_mended(bench, written):
    target = faults.Target("check", (*faults.DVC, "repro", STAGES["check"]), (STAGES["check"],))
    bench.prepare(target)
    root, committed = bench.project.root, bench.locks
    assert bench.project.mend(committed) == []
    (root / "stages/dvc.lock").write_text("schema: '2.0'\nstages:\n  check:\n" + written)
    (root / ".dvc/tmp/rwlock").write_text('{"read": ')
    left = "data/raw/.mlqNSOPZGmpSQFqaSqLW5w.tmp"
    (root / left).touch()
    assert bench.project.mend(committed) == ["stages/dvc.lock", ".dvc/tmp/rwlock", left]
    bench.project.run(target.command)
    assert faults.difference(bench.project.tree(), bench.expected) == []


@pytest.mark.skipif(sys.platform != "linux", reason="by /proc")
@pytest.mark.parametrize("between", [[], ["/bin/sh", "-c"]], ids=["started by dvc", "a shell between"])
def test_a_stage_ends_with_dvc(tmp_path, between):
    script = tmp_path / "stages" / "one.py"
    script.parent.mkdir()
    script.write_text("import longtail, time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "stages/one.py"]
    command = [*between, f"{' '.join(command)}; true"] if between else command
    dvc = f"import os, subprocess\nsubprocess.run({command!r}, env={{**os.environ, 'DVC_STAGE': 'one'}})"
    above = subprocess.Popen([sys.executable, "-c", dvc], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert above.stdout is not None and above.stdout.readline() == "ready\n"
    above.kill()
    began = time.monotonic()
    assert above.stdout.read() == ""  # until nobody has it open any more
    assert time.monotonic() - began < 5
    above.communicate()


def test_what_a_killed_write_left_is_swept_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unfinished = [
        "runs/p/.machine.json.abcd_123",
        "runs/p/model/.last.safetensors.abcd1234",
        "data/.a.npz.zzzzzzz9",
        "data/.a.npz.partial",
    ]
    kept = [
        "runs/p/model/last.safetensors",
        "data/.b.npz.abcd1234",
        "data/.a.npz.keep",
        "data/.gitignore",
        "data/a.npz",
    ]
    for name in (*unfinished, *kept):
        files.write_text(name, "")
    stage.sweep(["runs/p/model", "data/a.npz"])
    assert sorted(str(path) for path in Path().rglob("*") if path.is_file()) == sorted(kept)


def test_rows_that_come_by_parts_leave_nothing_on_a_full_disk_and_the_file_is_told(tmp_path):
    def rows():
        yield np.zeros((1, 2), np.float32)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as raised:
        files.save_arrays_by_part(tmp_path / "a.npz", {"a": ((2, 2), rows())})
    assert stage.said(raised.value).startswith(f"{tmp_path / 'a.npz'}: No space left on device; make room")
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError) as raised:
        files.write_text(tmp_path / "a.csv", "text")
    assert stage.said(raised.value) == (
        f"{tmp_path / 'a.csv'}: No space left on device; make room, and the same command goes on"
    )
    assert not list(tmp_path.iterdir())
    assert stage.said(OSError("odd")) == "odd"
    assert stage.said(PermissionError(errno.EACCES, "Permission denied", "b")) == "b: Permission denied"


def test_a_stage_does_not_begin_on_a_disk_that_is_all_but_full(monkeypatch):
    stage.check_room()
    monkeypatch.setattr(stage, "ROOM", 2**80)
    with pytest.raises(OSError) as raised:
        stage.check_room()
    assert "No space left on device; make room" in stage.said(raised.value)


def test_what_has_run_is_recorded_though_another_dvc_was_waited_for(monkeypatch):
    """A job that is ended while it waits has forgotten the file as it was; its record is written all the same."""
    recorded = []
    loaded = SimpleNamespace(dump_stages=lambda stages, update_pipeline: recorded.extend(stages))
    monkeypatch.setattr("dvc.dvcfile.load_file", lambda repo, path: loaded)
    stages = jobs.Stages.__new__(jobs.Stages)
    stages.repo, stages.files, stages.ran = None, {}, {"stages/quick/dvc.yaml": ["predict-quick@a"]}
    stages._write()
    assert recorded == ["predict-quick@a"] and not stages.ran


def test_a_lock_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "dvc.lock"
    path.write_text("old")
    open_whole = jobs.whole(open)
    with pytest.raises(KeyboardInterrupt), open_whole(path, "w+", encoding="utf-8") as file:
        file.write("half")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with open_whole(path, "w", encoding="utf-8") as file:
        file.write("new")
    with open_whole(path, encoding="utf-8") as file:
        assert file.read() == "new"


def test_a_record_that_was_cut_off_is_removed_and_a_whole_one_stays(tmp_path):
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=tmp_path, check=True)
    with Repo(str(tmp_path)) as repo:
        record = Path(repo.tmp_dir, "rwlock")
        for text, stays in (('{"read": {', False), ("", False), ('{"read": {}, "write": {}}', True)):
            record.write_text(text)
            jobs.mend(repo)
            assert record.exists() is stays


def test_a_job_waits_for_another_dvc_and_reads_the_lock_anew(monkeypatch, capsys):
    class Waiting(jobs.Stages):
        def __init__(self):
            self.files = {"a/dvc.yaml": "as it was"}
            self.repo = None

    monkeypatch.setattr("dvc.repo.lock_repo", lambda repo: nullcontext())
    monkeypatch.setattr(jobs, "WAIT_S", 0)
    stages, busy = Waiting(), iter([True, True, False])

    def work(address):
        if next(busy):
            raise LockError("'a' is busy")
        return f"{address} done"

    assert stages._when_free(work, "a/dvc.yaml:one") == "a/dvc.yaml:one done"
    assert stages.files == {}
    assert capsys.readouterr().err == "one waits: 'a' is busy\n"  # once


def test_a_job_ends_when_nobody_asks_any_more():
    reading, writing = os.pipe()
    code = f"from longtail.workflow import jobs\nprint('ready', flush=True)\njobs.end_with({reading})"
    process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[reading], stdout=subprocess.PIPE, text=True)
    os.close(reading)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert process.poll() is None
    os.close(writing)
    assert process.wait(5) == -signal.SIGTERM
    process.communicate()


def test_the_stages_of_a_data_set_come_in_their_order():
    shared = pipeline.SHARED
    assert pipeline.making("digits_if20", PARAMS) == [f"{shared}:download@digits", f"{shared}:subsample@digits_if20"]
    assert pipeline.making("cifar100_ldam_if100_lite0", PARAMS) == [
        f"{shared}:download@cifar100", f"{shared}:subsample@cifar100_ldam_if100",
        f"{shared}:features@cifar100_ldam_if100_lite0",
    ]  # fmt: skip
