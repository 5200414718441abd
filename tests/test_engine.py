"""Training: schedules as published, the same bytes twice, resume to the bit, and a loss that is not finite."""

import math

import numpy as np
import pytest
import torch

from longtail import batches, engine, inference, losses, networks

SCHEDULES = {
    "gala": {"epochs": 200, "warmup_epochs": 2, "shape": "cosine", "milestones": [], "factors": []},
    "balpoe": {
        "epochs": 200, "warmup_epochs": 5, "shape": "step", "milestones": [160, 180], "factors": [0.1, 0.01],
    },
}  # fmt: skip
RECIPE = {
    "epochs": 3,
    "batch_size": 16,
    "drop_last": False,
    "optimizer": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "schedule": {"warmup_epochs": 1, "shape": "cosine", "milestones": [], "factors": []},
    "augmentation": {"crop_padding": 1, "flip": True, "policy": "none", "rotation": 0, "cutout": 2},
    "mixup_alpha": 0.4,
    "precision": "fp32",
}


@pytest.mark.parametrize(
    ("recipe", "epoch", "factor"),
    [
        ("gala", 1, 0.5),  # lr 0.05, then 0.1, then the cosine; exactly 0 in the last epoch
        ("gala", 2, 1.0),
        ("gala", 3, (1 + math.cos(math.pi / 198)) / 2),
        ("gala", 101, (1 + math.cos(math.pi * 99 / 198)) / 2),
        ("gala", 200, 0.0),
        ("balpoe", 1, 0.2),
        ("balpoe", 5, 1.0),
        ("balpoe", 6, 1.0),
        ("balpoe", 160, 1.0),
        ("balpoe", 161, 0.1),
        ("balpoe", 180, 0.1),
        ("balpoe", 181, 0.01),
        ("balpoe", 200, 0.01),
    ],
)
def test_lr_is_the_released_one(recipe, epoch, factor):
    assert engine.lr_factor(epoch, **SCHEDULES[recipe]) == pytest.approx(factor, abs=1e-12)


def test_a_single_warmup_epoch_and_one_epoch_in_all():
    assert engine.lr_factor(1, epochs=1, warmup_epochs=1, shape="cosine", milestones=[], factors=[]) == 1


def splits() -> tuple[batches.Split, batches.Split]:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], (30, 12, 5))
    images = rng.integers(0, 60, (len(labels), 8, 8, 1)) + 60 * labels[:, None, None, None]
    arrays = images.astype(np.uint8), labels
    rows = np.arange(0, len(labels), 4)
    return (
        batches.Split.from_arrays(*arrays, 3, "cpu"),
        batches.Split.from_arrays(arrays[0][rows], arrays[1][rows], 3, "cpu"),
    )


def fit(
    seed: int = 0,
    method: str = "gala",
    held_out: bool = True,
    checkpoint: engine.Checkpoint | None = None,
    on_epoch=lambda row: None,
    **changes,
) -> engine.Fitted:
    train, held = splits()
    arguments = {
        "gala": {"lambda1": 1.0, "lambda2": 1.0}, "ce": {}, "balpoe": {"taus": [0.0, 2.0]},
    }[method]  # fmt: skip
    inference.set_up(seed)
    loss = losses.load(method)(torch.bincount(train.labels), **arguments)
    network = networks.ResNet(
        channels=1,
        classes=3,
        experts=loss.experts,
        depth=8,
        width=4,
        head="linear",
        scale=1.0,
        mean=[0.3],
        std=[0.3],
    )
    return engine.fit(
        network, loss, train, held if held_out else None, seed=seed, on_epoch=on_epoch,
        checkpoint=checkpoint or engine.Checkpoint(None, ""), **{**RECIPE, **changes},
    )  # fmt: skip


@pytest.mark.parametrize("method", ["ce", "gala", "balpoe"])
def test_twice_the_same_bytes_and_another_seed_differs(method):
    first, second, other = fit(method=method), fit(method=method), fit(method=method, seed=1)
    assert (first.last, first.best, first.history) == (second.last, second.best, second.history)
    assert first.last != other.last


def test_training_learns():
    assert fit(epochs=20, mixup_alpha=0).history[-1]["train_accuracy"] > 0.9


def test_history_has_a_row_an_epoch_and_best_is_the_first_best_epoch():
    fitted = fit(epochs=6)
    assert [row["epoch"] for row in fitted.history] == [1, 2, 3, 4, 5, 6]
    accuracies = [row["held_out_accuracy"] for row in fitted.history]
    assert fitted.best_epoch == accuracies.index(max(accuracies)) + 1


def test_held_out_images_do_not_touch_training():
    with_it, without = fit(), fit(held_out=False)
    assert with_it.last == without.last
    assert without.best is None and without.history[0]["held_out_accuracy"] is None


class InterruptedTrainingError(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_resume_ends_with_the_same_bytes(tmp_path, monkeypatch, stop_after):
    monkeypatch.setattr(engine, "SAVE_EVERY_S", 0)
    whole = fit(epochs=5)

    def interrupt(row):
        if row["epoch"] == stop_after + 1:
            raise InterruptedTrainingError  # before this epoch's checkpoint: its work is lost

    with pytest.raises(InterruptedTrainingError):
        fit(epochs=5, checkpoint=engine.Checkpoint(tmp_path / "c.pt", "a"), on_epoch=interrupt)
    epochs = []
    checkpoint = engine.Checkpoint(tmp_path / "c.pt", "a")
    resumed = fit(epochs=5, checkpoint=checkpoint, on_epoch=lambda row: epochs.append(row["epoch"]))
    assert epochs == list(range(stop_after + 1, 6))
    assert (resumed.last, resumed.best, resumed.history) == (whole.last, whole.best, whole.history)
    checkpoint.remove()
    assert not list(tmp_path.iterdir())


def test_checkpoint_of_another_training_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "SAVE_EVERY_S", 0)
    fit(checkpoint=engine.Checkpoint(tmp_path / "c.pt", "a"))
    epochs = []
    fit(checkpoint=engine.Checkpoint(tmp_path / "c.pt", "b"), on_epoch=lambda row: epochs.append(row["epoch"]))
    assert epochs == [1, 2, 3]


def test_a_broken_checkpoint_is_named(tmp_path):
    (tmp_path / "c.pt").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"c\.pt: not a readable checkpoint"):
        engine.Checkpoint(tmp_path / "c.pt", "a").load()


def test_a_loss_that_is_not_finite_stops_with_epoch_and_lr():
    with pytest.raises(FloatingPointError, match=r"loss is nan in epoch \d+ of 5 at lr"):
        fit(epochs=5, optimizer={**RECIPE["optimizer"], "lr": 1e30})


def test_logits_are_those_of_single_images():
    train, _ = splits()
    network = networks.ResNet(
        channels=1, classes=3, experts=2, depth=8, width=4, head="cosine", scale=30.0, mean=[0.3], std=[0.3]
    ).eval()
    found = inference.logits(network, train, precision="fp32")
    assert found.shape == (2, len(train), 3)
    with torch.inference_mode():
        one = network((train.images[7:8].float() / 255 - 0.3) / 0.3)
    torch.testing.assert_close(found[:, 7:8], one, rtol=1e-4, atol=1e-4)


def test_held_out_accuracy_counts_every_class_the_same(monkeypatch):
    train, _ = splits()  # 30, 12 and 5 images
    logits = torch.zeros(1, len(train), 3)
    logits[..., 0] = 1
    monkeypatch.setattr(inference, "logits", lambda *_, **__: logits)
    assert engine.held_out_accuracy(None, train, precision="fp32") == pytest.approx(1 / 3)


def test_an_unknown_device_is_named(monkeypatch):
    monkeypatch.setenv("LONGTAIL_DEVICE", "abacus")
    with pytest.raises(ValueError, match="LONGTAIL_DEVICE=abacus: no such device"):
        inference.find_device()
