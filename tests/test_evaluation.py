"""From weights to logits to measures, on a cell made by hand."""

import json
import sys

import numpy as np
import pytest
import torch

from longtail import networks, posthoc
from longtail.evaluation import cell as evaluation
from longtail.evaluation import metrics
from longtail.networks import kernels
from longtail.posthoc import predictions
from longtail.training import cell as training
from longtail.training import engine, inference, provenance
from longtail.workflow import files

ALIGN = {"reading": "normalized", "weights": "balanced", "temperature": 1.0, "strength": 1.0}
MEASURED = {"ece_bins": 15, "many_above": 100, "few_below": 20}
EVALUATE = {**MEASURED, "distribution_ratios": [2, 5], "distribution_draws": 2}
RECIPE = {
    "epochs": 2, "batch_size": 16, "drop_last": False, "accumulate": 1, "mixup_alpha": 0.2, "cutmix_alpha": 0,
    "weight_average": 0, "sync_batch_norm": False, "resolution": {"milestones": [], "scales": []}, "test_every": 2,
    "precision": "fp32",
    "optimizer": {
        "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4,
        "muon_lr": 0.0, "muon_weight_decay": 0.0,
    },
    "schedule": {"warmup_epochs": 1, "shape": "cosine", "milestones": [], "factors": []},
    "augmentation": {
        "crop_padding": 1, "flip": True, "policy": "none", "color_jitter": [0, 0, 0, 0], "rotation": 5, "cutout": 2,
    },
    "normalization": {"mean": [0.4], "std": [0.3]},
    "network": {"depth": 8, "width": 4, "head": "cosine", "scale": 30},
}  # fmt: skip
CELL = {"plan": "quick", "dataset": "d", "recipe": "r", "method": "balpoe", "seed": "3"}


def save_data(path, held_out: bool = True):
    rng = np.random.default_rng(0)
    arrays = {"class_names": np.array(["a", "b", "c"])}
    for split, counts in {"train": (30, 12, 5), "held_out": (6, 3, 1), "test": (8, 8, 8)}.items():
        labels = np.repeat([0, 1, 2], counts if held_out or split != "held_out" else (0, 0, 0))
        images = rng.integers(0, 60, (len(labels), 8, 8, 1)) + 60 * labels[:, None, None, None]
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    return files.save_arrays(path, **arrays)


@pytest.fixture(params=[True, False], ids=["held-out", "no held-out"])
def cell(request, tmp_path, monkeypatch):
    """A trained and predicted cell in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    save_data("data.npz", request.param)
    training.train(
        CELL, "f" * 16, data="data.npz", recipe=RECIPE, method={"taus": [0.0, 1.0, 2.0]},
        model="cell/model", history="cell/history.csv",
    )  # fmt: skip
    inference.predict("data.npz", "cell/model", "cell/predictions.npz")
    return request.param


def test_predictions_are_of_every_split_and_of_the_saved_network(cell):
    arrays = files.load_arrays("cell/predictions.npz")
    assert arrays["last_test_logits"].shape == (3, 24, 3)
    assert arrays["class_counts"].tolist() == [30, 12, 5]
    assert ("last_held_out_logits" in arrays) == ("best_test_logits" in arrays) == cell
    network = networks.load("cell/model/last.safetensors")
    images = files.load_arrays("data.npz")["test_images"][:3].transpose(0, 3, 1, 2)
    with torch.inference_mode():
        logits = network((torch.tensor(images).float() / 255 - 0.4) / 0.3)
    np.testing.assert_allclose(arrays["last_test_logits"][:, :3], logits.numpy(), rtol=1e-4, atol=1e-4)


def test_training_leaves_its_history_and_no_checkpoint(cell, tmp_path):
    rows = files.read_csv("cell/history.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all((row["held_out_accuracy"] != "") == cell for row in rows)
    assert [row["test_accuracy"] != "" for row in rows] == [False, True]
    assert not list(tmp_path.glob("runs/.checkpoints/*.pt*"))
    machine = json.loads((tmp_path / "cell/machine.json").read_text())
    assert machine["training"] == "f" * 16 and machine["seconds"] > 0


def test_what_computed_a_cell_goes_with_it(cell, monkeypatch):
    """From the weights to the measures; and the digest is that of the network after one epoch."""
    files.write_json("cell/alignment.json", predictions.align("cell/predictions.npz", **ALIGN))
    found = evaluation.evaluate("cell/predictions.npz", "cell/alignment.json", **EVALUATE).measures["provenance"]
    assert [step["step"] for step in found] == ["train", "predict"]
    train = found[0]
    assert train["precision"] == RECIPE["precision"] == "fp32" and train["device"] == "cpu"
    assert train["threads"] == torch.get_num_threads() and train["processes"] == 1
    assert train["versions"]["torch"] == torch.__version__.split("+")[0]
    assert train["versions"]["python"] == ".".join(map(str, sys.version_info[:2]))  # its last part changes no digit
    assert train["kernels"] == (train["compiler"] is not None) == (kernels.library() is not None)

    weights = []
    monkeypatch.setattr(engine.Training, "next_epoch", lambda self: weights.append(self.network) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.train(
            CELL, "0" * 16, data="data.npz", recipe=RECIPE, method={"taus": [0.0, 1.0, 2.0]},
            model="again/model", history="again/history.csv",
        )  # fmt: skip
    assert train["first_epoch"] == provenance.digest(weights[0].state_dict())
    last = networks.load("cell/model/last.safetensors").state_dict()
    assert train["first_epoch"] != provenance.digest(last)


def test_logits_of_before_have_no_provenance_and_are_measured_all_the_same(cell):
    arrays = dict(files.load_arrays("cell/predictions.npz"))
    files.write_json("cell/alignment.json", predictions.align("cell/predictions.npz", **ALIGN))
    with_it = evaluation.evaluate("cell/predictions.npz", "cell/alignment.json", **EVALUATE).measures
    del arrays["provenance"], with_it["provenance"]
    files.save_arrays("before.npz", **arrays)
    np.testing.assert_equal(evaluation.evaluate("before.npz", "cell/alignment.json", **EVALUATE).measures, with_it)


def test_alignment_is_fitted_on_train_and_held_out_alone(cell):
    fitted = predictions.align("cell/predictions.npz", **ALIGN)
    on_train = {"aligned_on_train", "logit_adjusted"}
    both = on_train | {"aligned_on_held_out"}
    assert {network: set(made) for network, made in fitted.items()} == (
        {"last": both, "best": both} if cell else {"last": on_train}
    )
    assert fitted["last"]["aligned_on_train"]["fitted_on"] == "train"
    for name in ("aligned_on_train", "aligned_on_held_out") if cell else ("aligned_on_train",):
        assert np.ptp(fitted["last"][name]["energy_after"]) < np.ptp(fitted["last"][name]["energy"])
    arrays = dict(files.load_arrays("cell/predictions.npz"))
    arrays["last_test_logits"] = arrays["last_test_logits"] + 5  # what test says must not matter
    files.save_arrays("other.npz", **arrays)
    np.testing.assert_equal(predictions.align("other.npz", **ALIGN), fitted)


def test_evaluation_measures_raw_and_aligned_logits(cell):
    files.write_json("cell/alignment.json", predictions.align("cell/predictions.npz", **ALIGN))
    found = evaluation.evaluate("cell/predictions.npz", "cell/alignment.json", **EVALUATE)
    results, classes, shifted = found.measures, found.classes, found.distributions
    arrays = files.load_arrays("cell/predictions.npz")
    mean_NC = arrays["last_test_logits"].mean(0)
    labels_N, counts_C = arrays["test_labels"], arrays["class_counts"]
    assert results["last"]["epoch"] == 2
    errors = results["last"]["raw"].pop("standard_error")
    p_NC = np.exp(mean_NC) / np.exp(mean_NC).sum(1, keepdims=True)
    for name, each_N in (
        ("accuracy", mean_NC.argmax(1) == labels_N), ("nll", -np.log(p_NC[np.arange(24), labels_N])),
    ):  # fmt: skip
        assert np.std(each_N) > 0  # the standard error of a mean, which 200 bootstrap samples know to a twentieth
        assert errors[name] == pytest.approx(np.std(each_N) / 24**0.5, rel=0.15)
    assert results["last"]["raw"] == pytest.approx(
        metrics.summarize(mean_NC, labels_N, counts_C, **MEASURED), rel=1e-5, nan_ok=True
    )
    train_NC, train_N = arrays["last_train_logits"].mean(0), arrays["train_labels"]
    by_hand = {
        "aligned_on_train": posthoc.EnergyAligning(**ALIGN).fit(train_NC, train_N),
        "logit_adjusted": posthoc.LogitAdjustment(prior=counts_C).fit(train_NC, train_N),
        "rebalanced_on_test": posthoc.PredictionRebalancing().fit(mean_NC),
    }
    for name, correction in by_hand.items():
        measured = metrics.summarize(correction.transform(mean_NC), labels_N, counts_C, **MEASURED)
        assert results["last"][name]["nll"] == pytest.approx(measured["nll"], rel=1e-4)
    assert ("best_on_held_out" in results) == ("aligned_on_held_out" in results["last"]) == cell
    uniform = {row["correction"]: row for row in shifted if row["distribution"] == "uniform"}
    assert set(uniform) == {*results["last"]} - {"epoch"}
    for name, row in uniform.items():
        assert row["accuracy"] == pytest.approx(results["last"][name]["accuracy"])
    assert [row["train_images"] for row in classes] == [30, 12, 5]
    assert np.mean([row["raw"] for row in classes]) == pytest.approx(results["last"]["raw"]["accuracy"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"last_train_logits": np.full((1, 47, 3), np.inf)}, "train logits of the last network: .*NaN or inf"),
        ({"train_labels": np.full(47, 3)}, "train logits of the last network: label 3 in row 0"),
        ({"train_labels": np.zeros(4, int)}, r"train logits of the last network: labels have shape \(4,\)"),
    ],
)
def test_bad_predictions_are_named_with_file_split_and_network(tmp_path, change, message):
    rng = np.random.default_rng(0)
    good = {"last_train_logits": rng.normal(size=(1, 47, 3)), "train_labels": np.repeat([0, 1, 2], (30, 12, 5))}
    path = files.save_arrays(tmp_path / "p.npz", **{**good, **change})
    with pytest.raises(ValueError, match=rf"p\.npz: {message}"):
        predictions.align(str(path), **ALIGN)


def test_images_that_do_not_fit_the_recipe_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_data("data.npz")
    recipe = {**RECIPE, "normalization": {"mean": [0.5] * 3, "std": [0.2] * 3}}
    with pytest.raises(ValueError, match=r"images have 1 channel\(s\), normalization has 3"):
        training.train(
            CELL, "f", data="data.npz", recipe=recipe, method={"taus": [0.0]}, model="m", history="h.csv"
        )  # fmt: skip
    assert not (tmp_path / "m").exists() and not (tmp_path / "h.csv").exists()


def test_a_diverging_cell_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_data("data.npz")
    recipe = {**RECIPE, "optimizer": {**RECIPE["optimizer"], "lr": 1e30}}
    with pytest.raises(FloatingPointError, match=r"quick d r ce 3: the loss is not finite in epoch \d of 2, step \d"):
        training.train(
            {**CELL, "method": "ce"}, "f", data="data.npz", recipe=recipe, method={}, model="m", history="h.csv"
        )  # fmt: skip
    assert not (tmp_path / "m").exists() and not (tmp_path / "h.csv").exists()


def test_a_cell_that_diverges_later_keeps_its_checkpoint_and_says_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGTAIL_CHECKPOINT_S", "0")
    save_data("data.npz")
    recipe = {**RECIPE, "epochs": 3, "schedule": {**RECIPE["schedule"], "shape": "step", "milestones": [1]}}
    recipe["schedule"]["factors"] = [1e30]
    with pytest.raises(FloatingPointError, match=r"at lr 5e\+28; the checkpoint before it is runs/.checkpoints/f\.pt"):
        training.train(
            {**CELL, "method": "ce"}, "f", data="data.npz", recipe=recipe, method={}, model="m", history="h.csv"
        )  # fmt: skip
    assert (tmp_path / "runs/.checkpoints/f.pt").exists() and not (tmp_path / "m").exists()
