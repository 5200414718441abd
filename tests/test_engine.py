"""Training: schedules as published, the same bytes twice, resume to the bit, and a loss that is not finite."""

import math

import numpy as np
import pytest
import torch

from longtail import losses, networks
from longtail.data import batches
from longtail.training import engine, inference
from longtail.training.checkpoints import Checkpoint

pytestmark = pytest.mark.processor
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
    "accumulate": 1,
    "optimizer": {
        "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4,
        "muon_lr": 0.0, "muon_weight_decay": 0.0,
    },
    "schedule": {"warmup_epochs": 1, "shape": "cosine", "milestones": [], "factors": []},
    "weight_average": 0,
    "sync_batch_norm": False,
    "augmentation": {
        "crop_padding": 1, "flip": True, "policy": "none", "color_jitter": [0, 0, 0, 0], "rotation": 0, "cutout": 2,
    },
    "resolution": {"milestones": [], "scales": []},
    "mixup_alpha": 0.4,
    "cutmix_alpha": 0,
    "precision": "fp32",
    "test_every": 0,
}  # fmt: skip


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
    checkpoint: Checkpoint | None = None,
    on_epoch=lambda row: None,
    test: batches.Split | None = None,
    **changes,
) -> engine.Fitted:
    train, held = splits()
    arguments = {
        "gala": {"variant": "released", "accumulation": "double", "lambda1": 1.0, "lambda2": 1.0},
        "ce": {}, "class_balanced_sampling": {}, "balpoe": {"taus": [0.0, 2.0]},
        "ldam": {"max_margin": 0.5, "deferred": 0.5, "beta": 0.99},
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
        network, loss, train, held if held_out else None, test, seed=seed, on_epoch=on_epoch,
        checkpoint=checkpoint or Checkpoint(None, ""), **{**RECIPE, **changes},
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
    monkeypatch.setenv("LONGTAIL_CHECKPOINT_S", "0")
    whole = fit(epochs=5)

    def interrupt(row):
        if row["epoch"] == stop_after + 1:
            raise InterruptedTrainingError  # before this epoch's checkpoint: its work is lost

    with pytest.raises(InterruptedTrainingError):
        fit(epochs=5, checkpoint=Checkpoint(tmp_path / "c.pt", "a"), on_epoch=interrupt)
    epochs = []
    checkpoint = Checkpoint(tmp_path / "c.pt", "a")
    resumed = fit(epochs=5, checkpoint=checkpoint, on_epoch=lambda row: epochs.append(row["epoch"]))
    assert epochs == list(range(stop_after + 1, 6))
    assert (resumed.last, resumed.best, resumed.history) == (whole.last, whole.best, whole.history)
    checkpoint.remove()
    assert not list(tmp_path.iterdir())


def test_checkpoint_of_another_training_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGTAIL_CHECKPOINT_S", "0")
    fit(checkpoint=Checkpoint(tmp_path / "c.pt", "a"))
    epochs = []
    fit(checkpoint=Checkpoint(tmp_path / "c.pt", "b"), on_epoch=lambda row: epochs.append(row["epoch"]))
    assert epochs == [1, 2, 3]


def test_a_broken_checkpoint_is_named(tmp_path):
    (tmp_path / "c.pt").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"c\.pt: not a readable checkpoint"):
        Checkpoint(tmp_path / "c.pt", "a").load()


def test_a_loss_that_is_not_finite_keeps_the_checkpoint_before_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGTAIL_CHECKPOINT_S", "0")
    step = engine.Training.step

    def broken(self, batch):
        if self.steps == 4:
            batch = batch._replace(images=batch.images * torch.nan)
        step(self, batch)

    monkeypatch.setattr(engine.Training, "step", broken)
    checkpoint = Checkpoint(tmp_path / "c.pt", "a")
    message = r"loss is not finite in epoch 2 of 3, step 2, at lr 0\.025"
    with pytest.raises(FloatingPointError, match=message):
        fit(checkpoint=checkpoint)
    state = checkpoint.load()["training"]
    assert state["steps"] == 4 and all(value.isfinite().all() for value in state["network"].values())
    with pytest.raises(FloatingPointError, match=message):  # again from there: the same, and it is said again
        fit(checkpoint=checkpoint)


@pytest.mark.parametrize(("every", "looks"), [(1000, [3]), (2, [2, "between", 3])])
def test_on_a_gpu_losses_are_looked_at_every_few_steps(monkeypatch, every, looks):
    """The branch that spares a GPU the wait, taken on the CPU; three steps, and a look at the epoch's end."""
    monkeypatch.setattr(engine, "LOOK_EVERY", every)
    training = new_training(splits()[0])
    training.device = torch.device("meta")  # no CPU; tensors are made elsewhere
    seen = []
    monkeypatch.setattr(engine.Training, "check_loss", lambda self: seen.append(self.batch))
    monkeypatch.setattr(engine.Training, "step", lambda self, batch: None)
    training.finish_epoch(lambda: seen.append("between"))
    assert seen == looks


def test_a_late_look_names_the_first_bad_step(monkeypatch):
    """Steps 2 and 3 are not finite; looked at is at the epoch's end alone."""
    monkeypatch.setattr(engine, "LOOK_EVERY", 1000)
    training = new_training(splits()[0])
    step, device = engine.Training.step, training.device

    def broken(self, batch):
        self.device = device
        step(self, batch._replace(images=batch.images * (torch.nan if self.batch else 1)))
        self.device = torch.device("meta")

    monkeypatch.setattr(engine.Training, "step", broken)
    training.device = torch.device("meta")
    with pytest.raises(FloatingPointError, match="not finite in epoch 1 of 3, step 2,"):
        training.finish_epoch(lambda: None)
    assert training.batch == 3


def new_training(train: batches.Split, **changes) -> engine.Training:
    inference.set_up(0)
    network = networks.ResNet(
        channels=1, classes=3, experts=1, depth=8, width=4, head="linear", scale=1.0, mean=[0.3], std=[0.3]
    )
    settings = {key: value for key, value in {**RECIPE, **changes}.items() if key != "test_every"}
    return engine.Training(network, losses.load("ce")(torch.bincount(train.labels)), train, seed=0, **settings)


def test_averaged_weights_are_the_moving_average():
    train, _ = splits()
    training = new_training(train, weight_average=0.6)
    average = {key: value.double() for key, value in training._averaged_tensors().items()}
    stream = batches.epoch(train, **training.batches, epoch=1)
    for number, batch in enumerate(stream, 1):
        training.network.train()
        training.step(batch)
        decay = min(0.6, (1 + number) / (10 + number))
        now = training._averaged_tensors()
        average = {key: decay * average[key] + (1 - decay) * now[key].double() for key in now}
    found = training.averaged().state_dict()
    for key, value in average.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["conv1.weight"], training.network.state_dict()["conv1.weight"])


def test_the_schedule_multiplies_the_lr_of_every_optimizer():
    training = new_training(splits()[0], optimizer={**RECIPE["optimizer"], "muon_lr": 0.02})
    seen = []
    for _ in range(3):
        training.finish_epoch(lambda: None)
        seen.append([group["lr"] for optimizer in training.optimizers for group in optimizer.param_groups])
        training.next_epoch()
    assert seen == [pytest.approx([0.05 * factor, 0.02 * factor], abs=1e-12) for factor in (1, 0.5, 0)]


def test_without_averaging_the_network_itself_is_evaluated():
    training = new_training(splits()[0])
    assert training.averaged() is training.network and not training.average


@pytest.mark.parametrize(("epoch", "scale"), [(1, 0.5), (10, 0.5), (11, 0.75), (20, 0.75), (21, 1.0)])
def test_resolution_rises_at_its_milestones(epoch, scale):
    assert engine.scale_of(epoch, milestones=[10, 20], scales=[0.5, 0.75]) == scale


def test_small_images_reach_the_network(monkeypatch):
    sides = []
    monkeypatch.setattr(engine.Training, "step", lambda self, batch: sides.append(tuple(batch.images.shape[2:])))
    train, _ = splits()
    training = new_training(train, resolution={"milestones": [1], "scales": [0.75]})
    training.finish_epoch(lambda: None)
    assert set(sides) == {(6, 6)}


def test_test_accuracy_is_written_down_and_changes_nothing():
    _, held = splits()
    seen, unseen = fit(epochs=4, test_every=2, test=held), fit(epochs=4)
    assert [row["test_accuracy"] is None for row in seen.history] == [True, False, True, False]
    assert seen.history[1]["test_accuracy"] == seen.history[1]["held_out_accuracy"]
    assert (seen.last, seen.best) == (unseen.last, unseen.best)
    assert all(row["test_accuracy"] is None for row in unseen.history)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_learns(precision):
    assert fit(epochs=20, mixup_alpha=0, precision=precision).history[-1]["train_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("device", "asked", "has_bf16", "done"),
    [
        ("cpu", "bf16", True, "bf16"), ("cpu", "bf16", False, "fp32"), ("cuda", "bf16", True, "bf16"),
        ("cuda", "bf16", False, "fp16"), ("cuda", "fp32", False, "fp32"), ("cpu", "fp16", False, "fp16"),
    ],
)  # fmt: skip
def test_precision_is_what_the_device_has(monkeypatch, device, asked, has_bf16, done):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(inference, "cpu_has_bf16", lambda: has_bf16)
    assert inference.precision_on(torch.device(device), asked) == done


@pytest.mark.slow
def test_torch_compile_falls_back_or_gives_the_same_network(monkeypatch):
    """Batches of one size: for another one PyTorch compiles all of it again, a minute of a core."""
    monkeypatch.setenv("LONGTAIL_COMPILE", "on")
    compiled = fit(epochs=1, drop_last=True)
    monkeypatch.delenv("LONGTAIL_COMPILE")
    assert compiled.history[0]["loss"] == pytest.approx(fit(epochs=1, drop_last=True).history[0]["loss"], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_with_epoch_and_lr():
    with pytest.raises(FloatingPointError, match=r"loss is not finite in epoch \d+ of 5, step \d+, at lr"):
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
    assert engine.class_accuracy(None, train, precision="fp32") == pytest.approx(1 / 3)


def test_an_unknown_device_is_named(monkeypatch):
    monkeypatch.setenv("LONGTAIL_DEVICE", "abacus")
    with pytest.raises(ValueError, match="LONGTAIL_DEVICE=abacus: no such device"):
        inference.find_device()


def test_class_balanced_sampling_draws_each_class_alike():
    train, _ = splits()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([batches.draw_order(train, class_balanced=True, generator=generator) for _ in range(200)])
    share_C = torch.bincount(train.labels[drawn]) / len(drawn)
    torch.testing.assert_close(share_C, torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    share_N = torch.bincount(drawn, minlength=len(train)) / len(drawn)  # and each image of a class
    torch.testing.assert_close(share_N, (1 / 3 / torch.bincount(train.labels))[train.labels].float(), atol=0.01, rtol=0)


def test_without_it_every_image_comes_once():
    train, _ = splits()
    order = batches.draw_order(train, class_balanced=False, generator=torch.Generator().manual_seed(0))
    assert order.sort().values.tolist() == list(range(len(train)))


def test_a_loss_asks_for_class_balanced_batches():
    plain, balanced = fit(method="ce"), fit(method="class_balanced_sampling")
    assert plain.last != balanced.last
    assert balanced.last == fit(method="class_balanced_sampling").last


def test_a_loss_is_told_the_epoch_and_a_deferred_one_departs_there(monkeypatch):
    """LDAM re-weights after half of four epochs: until then it is LDAM that never does."""
    told = []
    original = losses.load("ldam").start_epoch
    monkeypatch.setattr(
        losses.load("ldam"), "start_epoch", lambda self, *args: (told.append(args), original(self, *args))[1]
    )
    deferred = fit(method="ldam", epochs=4, mixup_alpha=0).history
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    monkeypatch.setattr(losses.load("ldam"), "start_epoch", lambda self, *args: None)
    never = fit(method="ldam", epochs=4, mixup_alpha=0).history
    assert deferred[:2] == never[:2] and deferred[2] != never[2]


class Recording:
    """Gradients of cross-entropy by hand, from the logits that the engine gave the loss."""

    def __init__(self, monkeypatch):
        self.positive, self.negative = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        original = losses.load("ce").forward

        def forward(loss, logits_EBC, labels_B, weight=1.0):
            p_BC = logits_EBC[0].detach().double().softmax(1)
            for i, y in enumerate(labels_B.tolist()):
                for j in range(3):
                    if j == y:
                        self.positive[j] += weight * (1 - p_BC[i, j]) / len(labels_B)
                    else:
                        self.negative[j] += weight * p_BC[i, j] / len(labels_B)
            return original(loss, logits_EBC, labels_B, weight)

        monkeypatch.setattr(losses.load("ce"), "forward", forward)


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_ratios_are_their_twin_and_change_nothing_else(monkeypatch, every):
    without = fit(method="ce", mixup_alpha=0, epochs=2, drop_last=True)
    seen = Recording(monkeypatch)
    fitted = fit(method="ce", mixup_alpha=0, epochs=2, drop_last=True, gradients_every=every)
    assert fitted.last == without.last
    ratios = [[row.get(f"gradient_ratio_{c}") for c in range(3)] for row in fitted.history]
    assert (ratios[0][0] is None) == (every == 2)
    if every == 2:
        assert ratios[1] == pytest.approx((seen.positive / seen.negative).tolist(), rel=1e-3)
    assert ratios[1][0] > ratios[1][2]  # the small class is pushed down more than up


def test_gradient_ratios_of_a_resumed_training_are_those_of_an_uninterrupted_one(tmp_path):
    class StopError(Exception):
        pass

    def stop(row):
        if row["epoch"] == 2:
            raise StopError

    settings = {"method": "ce", "epochs": 4, "gradients_every": 3}
    whole = fit(**settings)
    checkpoint = Checkpoint(tmp_path / "c.pt", "a", every_s=0)
    with pytest.raises(StopError):
        fit(**settings, checkpoint=checkpoint, on_epoch=stop)
    assert fit(**settings, checkpoint=checkpoint).history == whole.history


def test_a_batch_norm_of_features_wants_two_rows():
    inference.set_up(0)
    images, labels = torch.randn(33, 8, 1, 1), torch.arange(33) % 3
    network = networks.build(
        hidden=0, standardize=True, channels=8, classes=3, experts=1, head="linear", scale=1.0, mean=[0.0], std=[1.0]
    )
    loss = losses.load("ce")(torch.bincount(labels))
    recipe = {key: value for key, value in RECIPE.items() if key != "test_every"} | {"batch_size": 32}
    off = {"crop_padding": 0, "flip": False, "rotation": 0, "cutout": 0}
    recipe["augmentation"] = recipe["augmentation"] | off
    with pytest.raises(ValueError, match="33 images in batches of 32 leave a batch of 1, too small"):
        engine.Training(network, loss, batches.Split(images, labels, 3), seed=0, **recipe)
