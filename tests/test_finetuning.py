"""Fine-tuned backbones: what is trained and how far it goes, what is kept, and that a kill changes no byte."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import small_finetuning as small
import torch
from conftest import ROOT
from torch import nn

from longtail import networks, posthoc
from longtail.data import batches
from longtail.finetuning import predict, train, trunk
from longtail.losses import BaseLoss
from longtail.networks import backbones, tuned
from longtail.serving import export
from longtail.training import inference
from longtail.workflow import files, manifest, params, pipeline


def make(experts: int = 2, trained: Any = 1, norm: str = "frozen", seed: int = 0) -> tuned.Tuned:
    return tuned.start(
        small.BACKBONE, channels=3, classes=3, experts=experts, head="cosine", scale=30.0, trained_groups=trained,
        norm_statistics=norm, seed=seed,
    )  # fmt: skip


IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("trained", [1, "all"])
def test_before_training_the_experts_have_the_backbones_own_features(trained: Any) -> None:
    network = make(trained=trained).eval()
    own = backbones.load(**small.BACKBONE)
    wanted = own.features((255 * IMAGES).byte())
    x = network.before((255 * IMAGES).byte() / 255)
    for expert in network.experts:
        torch.testing.assert_close(tuned.pooled(expert.body(x)), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(*(expert.head.weight for expert in network.experts))


@pytest.mark.parametrize(("library", "name"), [("torchvision", "resnet18"), ("torchvision", "mobilenet_v2")])
def test_torchvisions_networks_are_cut_too(library: str, name: str) -> None:
    own = backbones.load(library=library, network=name, weights="none").network  # type: ignore[arg-type]
    body = tuned.cut(own, 1)[1]
    assert 0 < sum(value.numel() for value in body.parameters()) < sum(value.numel() for value in own.parameters())


def test_a_cut_that_cannot_be_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"trained_groups: 99, but the backbone has \d+: blocks.0, .*1 to \d+, and all"
    ):
        make(trained=99)
    vit = backbones.load(library="timm", network="test_vit", weights="none").network
    with pytest.raises(ValueError, match=r"more than its parts one after the other .* allowed is all"):
        tuned.cut(vit, 1)


def test_the_trunk_gets_no_gradient_and_keeps_its_statistics() -> None:
    for norm, moves in (("frozen", False), ("batch", True)):
        network = make(norm=norm).train()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        network(IMAGES).square().sum().backward()
        after = network.state_dict()
        changes = {name for name, value in before.items() if not torch.equal(value, after[name])}
        assert bool(changes) == moves and all(name.startswith("experts.") for name in changes)
        assert all(value.grad is None for value in network.trunk.parameters())
        assert all(value.grad is not None for value in network.experts.parameters())


def test_two_passes_in_training_are_the_same_pass() -> None:
    network = tuned.start(
        {"library": "torchvision", "network": "efficientnet_b0", "weights": "none", "resolution": 32}, channels=1,
        classes=3, experts=1, head="linear", scale=1.0, trained_groups="all", norm_statistics="frozen", seed=0,
    ).train()  # fmt: skip  # which has dropout and stochastic depth
    assert torch.equal(network(IMAGES[:, :1]), network(IMAGES[:, :1]))


def test_it_is_loaded_without_the_backbones_weights(tmp_path: Path) -> None:
    network = make(seed=3).eval()
    file = networks.save(network, tmp_path / "x.safetensors")
    assert tuned.is_tuned(file)
    assert torch.equal(tuned.load(file)(IMAGES), network(IMAGES))
    (tmp_path / "y.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"y.safetensors: not a fine-tuned network"):
        tuned.load(tmp_path / "y.safetensors")


def test_scaling_by_matrices_is_scaling() -> None:
    for side in (5, 8, 21):
        wanted = torch.nn.functional.interpolate(IMAGES, (side, side), mode="bicubic", antialias=True)
        by_hand = torch.einsum("rh,bchw,sw->bcrs", tuned.matrix(8, side), IMAGES, tuned.matrix(8, side))
        torch.testing.assert_close(by_hand, wanted, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ its training


class Square(BaseLoss):
    """Half the mean square of the logits."""

    def forward(self, logits_EBC: torch.Tensor, labels_B: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        return weight * 0.5 * logits_EBC.square().mean()


def test_a_slower_parameter_is_one_with_a_learning_rate_of_its_own() -> None:
    torch.manual_seed(0)
    ours, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    twin.load_state_dict(ours.state_dict())
    how = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    loss = train.Slower(Square(), [ours.weight], 0.25)
    one = torch.optim.SGD(ours.parameters(), lr=0.4, **how)
    groups = torch.optim.SGD([{"params": [twin.weight], "lr": 0.1}, {"params": [twin.bias]}], lr=0.4, **how)
    for _ in range(5):
        x = torch.randn(2, 4)
        for network, optimizer in ((ours, one), (twin, groups)):
            optimizer.zero_grad()
            loss(network(x)[None], torch.zeros(2)).backward()
            optimizer.step()
        loss.after_step()
    torch.testing.assert_close(ours.weight, twin.weight)
    torch.testing.assert_close(ours.bias, twin.bias)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data.npz."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGTAIL_QUIET", "1")
    files.save_arrays("data.npz", **small.arrays())
    return tmp_path


def test_a_cell_from_weights_to_logits_and_other_heads(here: Path) -> None:
    small.tune()
    network = tuned.load("model/last.safetensors")
    fresh = make(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(network.trunk.parameters(), fresh.trunk.parameters(), strict=True))
    moved = [(a - b).abs().max() for a, b in zip(network.experts.parameters(), fresh.experts.parameters(), strict=True)]
    assert all(distance > 0 for distance in moved)
    predict.predict("data.npz", "model", "predictions.npz")
    found, given = files.load_arrays("predictions.npz"), small.arrays()
    for which in ("last", "best"):
        network = tuned.load(f"model/{which}.safetensors")
        for split in inference.SPLITS:
            images = torch.from_numpy(given[f"{split}_images"]).permute(0, 3, 1, 2)
            with torch.no_grad():
                wanted = network(images / 255)
            np.testing.assert_allclose(found[f"{which}_{split}_logits"], wanted, rtol=1e-3, atol=1e-3)
    rows = list(csv.DictReader(Path("history.csv").read_text().splitlines()))
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"]) and float(rows[-1]["train_accuracy"]) > 0.8
    predict.refit(
        "e" * 16, data="data.npz", model="model", history="history.csv", way="lws", seed=1, out="other",
        history_out="other.csv", epochs=2, batch_size=8, lr=0.1, weight_decay=0.0,
    )  # fmt: skip
    assert tuned.load("other/last.safetensors").settings["head"] == "scaled_cosine"
    assert Path("other.csv").read_bytes() == Path("history.csv").read_bytes()


def test_augmented_images_go_through_the_trunk_at_every_step(here: Path) -> None:
    small.tune(augmentation=train.PLAIN["augmentation"] | {"flip": True}, epochs=1, test_every=0)
    assert not Path("runs/.trunk").exists()
    assert tuned.load("model/last.safetensors").settings["experts"] == 2


def test_features_are_refused(here: Path) -> None:
    given = small.arrays()
    files.save_arrays("data.npz", **given | {f"{s}_images": given[f"{s}_images"][:, :1, :1].astype(np.float32)
                                              for s in inference.SPLITS})  # fmt: skip
    with pytest.raises(ValueError, match=r"data.npz: features, not images"):
        small.tune()


def test_what_passed_the_trunk_is_what_passes_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, given = make(), small.arrays()
    split = batches.Split.from_arrays(given["train_images"], given["train_labels"], 3, "cpu")
    passed = trunk.passed(network, {"train": split})["train"]
    torch.testing.assert_close(passed.images, network.before(split.images / 255), rtol=1e-4, atol=1e-5)
    assert torch.equal(
        trunk.passed(make(seed=9), {"train": split})["train"].images, passed.images
    )  # heads are not what it is kept by
    assert len([*Path("runs/.trunk").iterdir()]) == 1
    trunk.passed(make(trained=2), {"train": split})
    assert len([*Path("runs/.trunk").iterdir()]) == 2
    monkeypatch.setattr(trunk, "LARGEST", 1000)
    assert trunk.passed(network, {"train": split})["train"] is split


# -------------------------------------------------------------------------------------------------- killed


def run(where: Path, **options: Any) -> int:
    command = [sys.executable, str(ROOT / "tests" / "small_finetuning.py"), json.dumps(options)]
    return subprocess.run(command, cwd=where, check=False, capture_output=True).returncode


def test_killed_in_the_trunk_and_in_an_epoch_it_ends_with_the_same_bytes(here: Path) -> None:
    killed, whole = here / "killed", here / "whole"
    for folder in (killed, whole):
        folder.mkdir()
        (folder / "data.npz").write_bytes((here / "data.npz").read_bytes())
    assert run(whole, what="tune") == 0
    assert run(killed, what="tune", shard=2) == -signal.SIGKILL  # the first is there, the second not quite
    assert len([*killed.glob("runs/.trunk/*/*.npy")]) == 1
    assert run(killed, what="tune", step=10) == -signal.SIGKILL  # in the second of three epochs
    assert not (killed / "model").exists() and [*killed.glob("runs/.checkpoints/*.pt")]
    assert run(killed, what="tune") == 0
    for name in ("model/last.safetensors", "model/best.safetensors", "model/epochs.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_killed_in_the_extraction_of_features_it_ends_with_the_same_bytes(here: Path) -> None:
    assert run(here, what="features") == 0
    whole = Path("out.npz").read_bytes()
    Path("out.npz").unlink()
    assert run(here, what="features", shard=3) == -signal.SIGKILL
    assert len([*here.glob("runs/.features/*/*[0-9].npy")]) == 2 and not Path("out.npz").exists()
    assert run(here, what="features") == 0
    assert Path("out.npz").read_bytes() == whole


# --------------------------------------------------------------------------------------------- out of the room


def exported(network: Any, images: np.ndarray, logits: np.ndarray, backbone: Any, out: Path) -> float:
    correction = posthoc.Affine().fit(np.zeros((1, 3)))
    cell = SimpleNamespace(
        network=network, deployed=export.Deployed(network, correction, backbone).eval(), images=images, logits=logits,
        title="x", classes=["a", "b", "c"],
    )  # fmt: skip
    return export.export(cell, out)  # type: ignore[arg-type]


def test_a_file_takes_images_and_names_classes(tmp_path: Path) -> None:
    images = small.arrays()["test_images"]
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    network = make().eval()
    own = backbones.load(**small.BACKBONE)
    features = own.features(x)[:, :, None, None]
    heads = networks.build(
        hidden=0, standardize=True, channels=features.shape[1], classes=3, experts=2, head="cosine", scale=30.0,
        mean=[0.0], std=[1.0],
    ).eval()  # fmt: skip
    with torch.no_grad():
        of_tuned, of_heads = network(x / 255).mean(0).numpy(), heads(features).mean(0).numpy()
    assert exported(network, images, of_tuned, None, tmp_path / "tuned.onnx") < 1e-3
    assert exported(heads, images, of_heads, own, tmp_path / "heads.onnx") < 1e-3
    for name in ("tuned", "heads"):
        model = onnx.load(tmp_path / f"{name}.onnx")
        assert {one.key: one.value for one in model.metadata_props}["classes"] == '["a", "b", "c"]'
        assert [one.name for one in model.graph.input] == ["images"]
    assert exported(network, images, of_tuned, None, tmp_path / "tuned.pt2") < 1e-3
    names = {"classes.json": ""}
    torch.export.load(tmp_path / "tuned.pt2", extra_files=names)
    assert json.loads(names["classes.json"]) == ["a", "b", "c"]


# -------------------------------------------------------------------------------------------------- the plan


def tuned_plan(**recipe: Any) -> dict[str, Any]:
    found = params.load(ROOT / "params.yaml")
    found["recipes"]["tune"] |= recipe
    found["plans"]["mine"] = found["plans"]["quick"] | {"recipes": ["tune"]}
    return found


def test_a_plan_of_fine_tuning_has_its_own_stages() -> None:
    text = pipeline.text("mine", tuned_plan())
    assert "stages/finetune.py" in text and "stages/code/finetune-${item.method}.txt" in text
    assert "- backbones.efficientnet_lite0\n" in text and "stages/finetune_predict.py" in text
    assert "train-mine:" in text and "stages/train.py" not in text
    assert "backbones" not in pipeline.text("quick", tuned_plan())
    assert {"finetune-balpoe", "finetune_refit-crt", "finetune_predict"} <= manifest.starts(ROOT, tuned_plan()).keys()


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"weight_average": 0.9}, "recipes.tune: a backbone that is fine-tuned .* weight_average is off"),
        ({"network": {}}, "recipes.tune"),
    ],
)
def test_what_does_not_fit_is_named(recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(params.ParamsError, match=said):
        params.validate(tuned_plan(**recipe))
    found = tuned_plan()
    found["recipes"]["tune"]["network"]["backbone"] = "nobody"
    with pytest.raises(params.ParamsError, match=r"recipes.tune.network.backbone = 'nobody': not in backbones"):
        params.validate(found)
    found = tuned_plan()
    found["plans"]["mine"]["recipes"] = ["tune", "digits"]
    with pytest.raises(
        params.ParamsError, match=r"plans.mine.recipes: tune fine-tune a backbone; all have to, or none"
    ):
        params.validate(found)
