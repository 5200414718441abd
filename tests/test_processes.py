"""Two processes on one machine (gloo) against one with the joint batch, and resume after one of them is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_training import split, train
from torch import nn

from longtail.training import engine
from longtail.training.checkpoints import Checkpoint
from longtail.workflow import processes

PROGRAM = Path(__file__).with_name("small_training.py")


def torchrun(folder: Path, world: int = 2, **options) -> subprocess.Popen:
    options = {"out": str(folder / "last.safetensors"), **options}
    flags = ["--standalone", f"--nproc-per-node={world}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LONGTAIL_CHECKPOINT_S": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *flags, str(PROGRAM), json.dumps(options)],
        env=env, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finished(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def flat(network: bytes) -> torch.Tensor:
    tensors = safetensors.torch.load(network)
    weights = [
        tensor.double().flatten() for name, tensor in sorted(tensors.items()) if name.endswith(("weight", "bias"))
    ]
    return torch.cat(weights)


@pytest.mark.parametrize("method", ["gala", "balpoe", "composed"])
def test_two_processes_are_one_with_the_joint_batch(tmp_path, method):
    """Tolerance: 1e-4 of the weights' norm, after 24 steps with mixup, CutMix, averaging and joint batch norm."""
    finished(torchrun(tmp_path, method=method, sync_batch_norm=True))
    one = train(method)
    assert (flat(one.last) - flat((tmp_path / "last.safetensors").read_bytes())).norm() < 1e-4 * flat(one.last).norm()
    rows = json.loads((tmp_path / "last.json").read_text())["history"]
    for row, mine in zip(rows, one.history, strict=True):
        assert row["loss"] == pytest.approx(mine["loss"], abs=1e-4)
        assert row["train_accuracy"] == pytest.approx(mine["train_accuracy"], abs=1e-6)
        assert row["test_accuracy"] == pytest.approx(mine["test_accuracy"], abs=1e-6)


def test_when_a_checkpoint_is_taken_changes_no_digit_of_two_processes(tmp_path):
    """Each has batch norm of its own, and an average of it; what is looked at and kept is the first one's."""
    finished(torchrun(tmp_path / "without"))
    finished(torchrun(tmp_path / "with", checkpoint=str(tmp_path / "c.pt")))
    for name in ("last.safetensors", "last.json"):
        assert (tmp_path / "without" / name).read_bytes() == (tmp_path / "with" / name).read_bytes()


def test_a_checkpoint_of_another_number_of_processes_is_named(tmp_path, monkeypatch):
    class StopError(Exception):
        pass

    def stop(row):
        raise StopError

    monkeypatch.setenv("LONGTAIL_CHECKPOINT_S", "0")
    with pytest.raises(StopError):
        train(checkpoint=Checkpoint(tmp_path / "c.pt", "a"), on_epoch=stop)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    state["training"]["sums"] = state["training"]["sums"].expand(2, -1).clone()
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt is of a training by 2 process\(es\), this one has 1: go on with LONG"):
        train(checkpoint=Checkpoint(tmp_path / "c.pt", "a"))


def test_two_processes_are_one_that_accumulates_two_parts(tmp_path):
    """Each part with batch norm of its own; only the running statistics differ (here, of both parts in turn).

    Tolerance: 1e-4 of the weights' norm; 2e-5 was seen.
    """
    finished(torchrun(tmp_path))
    one = train(accumulate=2)
    assert (flat(one.last) - flat((tmp_path / "last.safetensors").read_bytes())).norm() < 1e-4 * flat(one.last).norm()


@pytest.mark.parametrize("method", ["gala", "composed"])
def test_resume_after_one_process_was_killed(tmp_path, method):
    options = {"method": method, "epochs": 12, "checkpoint": str(tmp_path / "c.pt")}
    finished(torchrun(tmp_path / "whole", **{**options, "checkpoint": str(tmp_path / "w.pt")}))
    process = torchrun(tmp_path, **options)
    while not (tmp_path / "c.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert not (tmp_path / "last.safetensors").exists() and (tmp_path / "c.pt").exists()
    finished(torchrun(tmp_path, **options))
    for name in ("last.safetensors", "last.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_synchronised_batch_norm_is_batch_norm(monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(processes, "add_up", lambda tensor: tensor)  # the other process has nothing
    monkeypatch.setattr(processes.differentiable, "all_reduce", lambda tensor: tensor)
    x = torch.randn(6, 5, 4, 4, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    norm, slow = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    processes.synchronise(norm)
    assert type(norm) is processes.SyncBatchNorm
    gradient = torch.randn(x.shape)
    norm(x).backward(gradient)
    slow(twin).backward(gradient)
    torch.testing.assert_close(x.grad, twin.grad)
    for mine, theirs in zip(norm.state_dict().values(), slow.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_batch_too_small_for_the_processes_is_named(monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: 4)
    with pytest.raises(ValueError, match="48 images in batches of 15 leave a batch of 3, too small for 4 process"):
        train(batch_size=15)


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("LONGTAIL_PROCESSES", raising=False)
    processes.launch()
    assert (processes.world(), processes.rank()) == (1, 0)
    one = torch.ones(3)
    assert processes.add_up(one) is one and processes.from_first(one) is one
    assert processes.side_by_side(one).shape == (1, 3)


@pytest.mark.parametrize("value", ["0", "two", "-1"])
def test_a_bad_number_of_processes_is_named(monkeypatch, value):
    monkeypatch.setenv("LONGTAIL_PROCESSES", value)
    with pytest.raises(ValueError, match=f"LONGTAIL_PROCESSES={value}: must be a whole number"):
        processes.launch()


def test_launch_starts_torchrun(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: calls.append(arguments))
    monkeypatch.setenv("LONGTAIL_PROCESSES", "3")
    monkeypatch.setattr(sys, "argv", ["stages/train.py", "--seed", "1"])
    processes.launch()
    assert calls[0][1:] == [
        "-m", "torch.distributed.run", "--nproc-per-node=3", "--standalone", "stages/train.py", "--seed", "1",
    ]  # fmt: skip
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # torchrun's child
    processes.launch()
    assert len(calls) == 1


def test_evaluation_of_shares_neither_drops_nor_repeats(monkeypatch):
    """Three ranks of 48 images, one after the other: their counts are one process's, each image is seen once."""
    whole, images, seen = split(), [], []

    def logits(network, part, **_):  # right where an image is dark for its class
        images.extend(image.numpy().tobytes() for image in part.images)
        wrong = part.images.float().mean((1, 2, 3)) > 30 + 60 * part.labels
        return torch.eye(3)[(part.labels + wrong) % 3][None]

    monkeypatch.setattr(engine.inference, "logits", logits)
    monkeypatch.setattr(processes, "add_up", lambda counts: seen.append(counts.clone()) or counts)
    alone = engine.class_accuracy(None, whole, precision="fp32")
    one, everything = seen.pop(), sorted(images)
    assert 0.2 < alone < 0.8 and len(everything) == 48
    images.clear()
    monkeypatch.setattr(processes, "world", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        engine.class_accuracy(None, whole, precision="fp32")
    assert torch.equal(sum(seen), one) and torch.equal(one[1], torch.bincount(whole.labels))
    assert sorted(images) == everything
    monkeypatch.setattr(processes, "world", lambda: 50)  # more than there are images
    monkeypatch.setattr(processes, "rank", lambda: 49)
    seen.clear()
    engine.class_accuracy(None, whole, precision="fp32")
    assert not seen[0].any()
