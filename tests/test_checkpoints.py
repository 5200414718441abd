"""Resume: `kill -9` at random moments, in the middle of a write too, and the same bytes at the end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_training import train

from longtail.training.checkpoints import Checkpoint

PROGRAM = Path(__file__).with_name("small_training.py")
KILLS = int(os.environ.get("LONGTAIL_TEST_KILLS", "20"))  # 100 for the long version
EPOCHS = 30  # six steps each, a checkpoint after every one


def command(folder: Path, **options) -> list[str]:
    options = {"out": str(folder / "last.safetensors"), "checkpoint": str(folder / "c.pt"), **options}
    return [sys.executable, str(PROGRAM), json.dumps(options)]


def env(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "LONGTAIL_CHECKPOINT_S": "0", **more}


def stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def test_kill_at_random_moments_ends_with_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, epochs=EPOCHS), check=True, env=env())
    moments, kills = random.Random(0), 0
    for number in range(KILLS):
        die = {"die_in_write": moments.randrange(20)} if number % 5 == 0 else {}
        before = stamp(killed / "c.pt")
        process = subprocess.Popen(command(killed, epochs=EPOCHS, **die), env=env())
        while process.poll() is None and stamp(killed / "c.pt") == before:
            time.sleep(0.001)  # it is still starting
        if not die:
            time.sleep(moments.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
        if process.wait() == 0:  # it was over: the next one begins anew
            compare(whole, killed)
            (killed / "last.safetensors").unlink()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 0.8 * KILLS, "most of the trainings were over before they were killed"
    subprocess.run(command(killed, epochs=EPOCHS), check=True, env=env())
    compare(whole, killed)
    assert sorted(path.name for path in killed.iterdir()) == ["last.json", "last.safetensors"]


def compare(whole: Path, killed: Path) -> None:
    for name in ("last.safetensors", "last.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_killed_in_a_write_the_old_checkpoint_is_whole(tmp_path):
    process = subprocess.run(command(tmp_path, die_in_write=7), env=env(), check=False)
    assert process.returncode == -signal.SIGKILL
    state = Checkpoint(tmp_path / "c.pt", "a training").load()
    assert state["training"]["steps"] == 6  # the seventh write was that at the end of the first epoch
    assert len(list(tmp_path.glob(".c.pt.*"))) == 1  # the half that was written
    subprocess.run(command(tmp_path), check=True, env=env())
    assert not list(tmp_path.glob("*c.pt*"))


class StoppedError(Exception):
    pass


@pytest.mark.processor
@pytest.mark.parametrize("method", ["gala", "balpoe"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_in_the_middle_of_an_epoch(tmp_path, method, precision):
    whole = train(method, precision=precision)

    class Stopping(Checkpoint):
        def due(self):
            return True

        def save(self, state):
            super().save(state)
            if torch.load(self.path)["training"]["steps"] == 9:  # six steps an epoch
                raise StoppedError

    with pytest.raises(StoppedError):
        train(method, precision=precision, checkpoint=Stopping(tmp_path / "c.pt", "a"))
    resumed = train(method, precision=precision, checkpoint=Checkpoint(tmp_path / "c.pt", "a"))
    assert (resumed.last, resumed.best, resumed.history) == (whole.last, whole.best, whole.history)


def test_two_trainings_of_one_cell_are_kept_apart(tmp_path):
    first, second = Checkpoint(tmp_path / "c.pt", "a"), Checkpoint(tmp_path / "c.pt", "a")
    message = rf"process {os.getpid()} is training this cell"
    with first.alone(), pytest.raises(ValueError, match=message), second.alone():
        pass
    with second.alone():  # the first is over
        pass


def test_a_checkpoint_is_due_after_its_time_and_a_bad_time_is_named(tmp_path, monkeypatch):
    assert not Checkpoint(tmp_path / "c.pt", "a").due()
    assert Checkpoint(tmp_path / "c.pt", "a", every_s=0).due()
    assert not Checkpoint(None, "a", every_s=0).due()
    monkeypatch.setenv("LONGTAIL_CHECKPOINT_S", "often")
    with pytest.raises(ValueError, match="LONGTAIL_CHECKPOINT_S=often: must be a number of seconds"):
        Checkpoint(None, "a")


def test_a_checkpoint_runs_nothing_that_is_in_it(tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"identity": "a", "state": Harm()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt: not a readable checkpoint"):
        Checkpoint(tmp_path / "c.pt", "a").load()
    assert not (tmp_path / "harm").exists()


def test_a_file_of_another_program_is_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt: not a readable checkpoint"):
        Checkpoint(tmp_path / "c.pt", "a").load()
