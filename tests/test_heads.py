"""Second stages against their formulas, and experts that were trained apart."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longtail import heads, networks
from longtail.data.batches import Split
from longtail.heads import tau_norm
from longtail.heads.lws import Scaled
from longtail.training import fusion, inference, refit
from longtail.workflow import files

SETTINGS = {"channels": 1, "classes": 3, "depth": 8, "width": 4, "mean": [0.3], "std": [0.3]}
WAYS = {
    "crt": {"epochs": 30, "batch_size": 16, "lr": 0.1, "weight_decay": 0.0},
    "lws": {"epochs": 30, "batch_size": 16, "lr": 0.1, "weight_decay": 0.0},
    "tau_norm": {"taus": [1.0]},
    "ncm": {},
}


def network(head: str = "linear", experts: int = 1, seed: int = 0) -> networks.ResNet:
    torch.manual_seed(seed)
    return networks.ResNet(experts=experts, head=head, scale=10.0 if head == "cosine" else 1.0, **SETTINGS).eval()


def arrays() -> dict[str, np.ndarray]:
    """A long tail of noise whose mean tells the class."""
    rng, made = np.random.default_rng(0), {"class_names": np.array(["a", "b", "c"])}
    for name, counts in (("train", (60, 20, 6)), ("held_out", (9, 3, 2)), ("test", (8, 8, 8))):
        labels = np.repeat([0, 1, 2], counts)
        images = rng.integers(0, 60, (len(labels), 8, 8, 1)) + 60 * labels[:, None, None, None]
        made |= {f"{name}_images": images.astype(np.uint8), f"{name}_labels": labels}
    return made


def splits() -> dict[str, Split]:
    made = arrays()
    return {
        name: Split.from_arrays(made[f"{name}_images"], made[f"{name}_labels"], 3, "cpu")
        for name in ("train", "held_out")
    }


def refitted(way: str, net: networks.Network, **changes) -> networks.Network:
    inference.set_up(0)
    refit.refit(net, splits(), way, **{**WAYS[way], **changes})
    return net


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("experts", [1, 2])
def test_features_are_what_the_heads_see(head, experts):
    net, train = network(head, experts), splits()["train"]
    features = refit.features(net, train)
    expected = inference.logits(net, train, precision="fp32")
    for e, expert in enumerate(net.experts):
        torch.testing.assert_close(expert.head(features[e]), expected[e])
    assert not any(expert.head._forward_pre_hooks for expert in net.experts)


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("way", WAYS)
def test_only_the_heads_change_twice_alike_and_a_file_keeps_them(way, head, tmp_path):
    net = refitted(way, network(head, experts=2))
    assert networks.to_bytes(net) == networks.to_bytes(refitted(way, network(head, experts=2)))
    for name, value in network(head, experts=2).state_dict().items():
        if ".head." not in name:
            torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=0)
    loaded, images = networks.load(networks.save(net, tmp_path / "n.safetensors")), torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(loaded(images), net(images))
    assert loaded.settings == net.settings


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("way", ["crt", "lws"])
def test_a_trained_second_stage_comes_near_the_class_balanced_optimum(way, head):
    """LBFGS on the class-weighted cross-entropy of all images is what stochastic draws of classes aim at."""
    before = network(head)
    features_ND, labels_N = refit.features(before, splits()["train"])[0], splits()["train"].labels
    weights_C = 1 / torch.bincount(labels_N) / 3

    def balanced(head: torch.nn.Module) -> torch.Tensor:
        return (weights_C[labels_N] * F.cross_entropy(head(features_ND), labels_N, reduction="none")).sum()

    start = balanced(before.experts[0].head).item()
    net = refitted(way, network(head), epochs=300, lr=0.1 if way == "crt" else 1.0)
    best = networks.same_kind(before.experts[0].head) if way == "crt" else Scaled(before.experts[0].head, 3)
    parameters = [*best.parameters()] if way == "crt" else [best.factor_C]  # a factor each is all that is free
    optimizer = torch.optim.LBFGS(parameters, max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = balanced(best)
        value.backward()
        return value

    optimizer.step(closure)
    reached, optimum = balanced(net.experts[0].head).item(), balanced(best).item()
    assert optimum - 1e-4 <= reached < optimum + 0.15 * (start - optimum) + 0.02


def test_scaled_heads_have_scaled_logits():
    x, factor_C = torch.randn(5, 16), torch.tensor([0.5, 2.0, 1.0])
    for kind in ("linear", "cosine"):
        head = networks.HEADS[kind](16, 3, 4.0)
        once = networks.scaled_head(head, factor_C)
        torch.testing.assert_close(once(x), factor_C * head(x))
        torch.testing.assert_close(networks.scaled_head(once, factor_C)(x), factor_C**2 * head(x))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_tau_normalised_weights_are_their_twin(tau):
    head = networks.LinearHead(4, 3, 1.0)
    new = tau_norm.normalised(head, tau)
    for c in range(3):
        length = math.sqrt(sum(w**2 for w in head.weight[c].tolist()))
        assert new.weight[c].tolist() == pytest.approx([w / length**tau for w in head.weight[c].tolist()], rel=1e-5)
    assert new.bias.tolist() == [0, 0, 0]


def test_tau_is_chosen_on_held_out_images_and_nowhere_else():
    head = networks.LinearHead(2, 2, 1.0)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[10.0, 0.0], [0.0, 1.0]]))
    x, labels = torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([1, 0])  # needs equal lengths
    train = (x, labels, 2)
    chosen = heads.load("tau_norm")(head, heads.Known(*train, held_out=(x, labels)), taus=[0.0, 0.5, 1.0])
    torch.testing.assert_close(chosen.weight, torch.eye(2))
    first = heads.load("tau_norm")(head, heads.Known(*train, held_out=(x, labels)), taus=[1.0, 0.9])  # as good
    torch.testing.assert_close(first.weight, torch.eye(2))
    with pytest.raises(ValueError, match=r"taus \[0.0, 1.0\]: to choose one takes held-out images"):
        heads.load("tau_norm")(head, heads.Known(*train), taus=[0.0, 1.0])


def test_tau_norm_leaves_a_cosine_head_alone():
    assert networks.to_bytes(refitted("tau_norm", network("cosine"))) == networks.to_bytes(network("cosine"))


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_ncm_is_its_twin(head):
    net = network(head)
    train = splits()["train"]
    features, labels = refit.features(net, train)[0].tolist(), train.labels.tolist()
    means = []
    for c in range(3):
        own = [f for f, y in zip(features, labels, strict=True) if y == c]
        means.append([sum(column) / len(own) for column in zip(*own, strict=True)])

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    nearest = [max(range(3), key=lambda c: cosine(f, means[c])) for f in features]
    logits_NC = inference.logits(refitted("ncm", net), train, precision="fp32")[0]
    assert logits_NC.argmax(1).tolist() == nearest


def cell(folder, seed: int, head: str = "linear", epochs: int = 2) -> str:
    """A trained cell as the train stage leaves it."""
    networks.save(network(head, seed=seed), folder / "model" / "last.safetensors")
    files.write_json(folder / "model" / "epochs.json", {"last": epochs})
    row = {"lr": 0.1, "loss": 1.0 + seed, "train_accuracy": 0.5, "held_out_accuracy": None, "test_accuracy": None}
    files.write_csv(folder / "history.csv", [{"epoch": 1 + e} | row for e in range(epochs)], ["epoch", *row])
    return str(folder)


def test_a_second_stage_as_a_stage(tmp_path):
    files.save_arrays(tmp_path / "data.npz", **arrays())
    first = cell(tmp_path / "ce", 0)
    refit.run(
        "f" * 16, data=str(tmp_path / "data.npz"), model=f"{first}/model", history=f"{first}/history.csv", way="crt",
        seed=0, out=str(tmp_path / "crt/model"), history_out=str(tmp_path / "crt/history.csv"), **WAYS["crt"],
    )  # fmt: skip
    assert (tmp_path / "crt/history.csv").read_bytes() == (tmp_path / "ce/history.csv").read_bytes()
    machine = json.loads((tmp_path / "crt/machine.json").read_text())
    assert machine["training"] == "f" * 16 and machine["seconds"] > 0
    inference.predict(str(tmp_path / "data.npz"), str(tmp_path / "crt/model"), str(tmp_path / "p.npz"))
    predictions = files.load_arrays(tmp_path / "p.npz")
    assert (predictions["last_test_logits"][0].argmax(1) == predictions["test_labels"]).mean() > 0.9


def test_experts_apart_are_their_networks_side_by_side(tmp_path):
    cells = [cell(tmp_path / str(seed), seed, head) for seed, head in enumerate(["linear", "cosine", "linear"])]
    fusion.run("f" * 16, cells, out=str(tmp_path / "fused/model"), history=str(tmp_path / "fused/history.csv"))
    fused, images = networks.load(tmp_path / "fused/model/last.safetensors"), torch.randn(4, 1, 8, 8)
    alone = [networks.load(f"{one}/model/last.safetensors")(images) for one in cells]
    torch.testing.assert_close(fused(images), torch.cat(alone), rtol=0, atol=0)
    torch.testing.assert_close(networks.product(fused(images)), sum(one[0] for one in alone) / 3)
    rows = files.read_csv(tmp_path / "fused/history.csv")
    assert [(row["epoch"], float(row["loss"]), row["test_accuracy"]) for row in rows] == [
        ("1", 2.0, ""),
        ("2", 2.0, ""),
    ]
    assert networks.to_bytes(fused) == (tmp_path / "fused/model/last.safetensors").read_bytes()


@pytest.mark.parametrize("count", [1, 2])
def test_a_mirrored_network_says_the_same_of_an_image_and_of_its_mirror_image(tmp_path, count):
    cells = [cell(tmp_path / str(seed), seed) for seed in range(count)]
    fusion.run("f" * 16, cells, mirrored=True, out=str(tmp_path / "model"), history=str(tmp_path / "history.csv"))
    mirrored, images = networks.load(tmp_path / "model/last.safetensors"), torch.randn(4, 1, 8, 8)
    for number, one in enumerate(cells):
        alone = networks.load(f"{one}/model/last.safetensors")
        expected = torch.stack([(alone(image[None]) + alone(image.flip(-1)[None]))[0, 0] / 2 for image in images])
        torch.testing.assert_close(mirrored(images)[number], expected)
        assert not torch.allclose(alone(images)[0], expected, atol=0.01)
    torch.testing.assert_close(mirrored(images.flip(3)), mirrored(images), rtol=0, atol=0)
    assert mirrored.settings["experts"] == count
    assert networks.to_bytes(mirrored) == (tmp_path / "model/last.safetensors").read_bytes()


def test_experts_that_do_not_fit_are_refused(tmp_path):
    cells = [cell(tmp_path / str(epochs), 0, epochs=epochs) for epochs in (2, 3)]
    with pytest.raises(ValueError, match=r"trained for \[2, 3\] epochs"):
        fusion.run("f" * 16, cells, out=str(tmp_path / "model"), history=str(tmp_path / "history.csv"))
    other = networks.ResNet(experts=1, head="linear", scale=1.0, **{**SETTINGS, "classes": 4})
    with pytest.raises(ValueError, match="tell different classes"):
        networks.Apart([network(), other])
