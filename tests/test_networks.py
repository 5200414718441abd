"""Shapes, sizes and files of the networks."""

from functools import partial
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from small_training import METHODS, RECIPE
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.models.resnet import BasicBlock

from longtail import losses, networks
from longtail.data import batches
from longtail.training import engine, inference
from longtail.workflow import params

RGB = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}


def resnet(**changes) -> networks.ResNet:
    settings = {
        "channels": 3, "classes": 10, "experts": 1, "depth": 8, "width": 16, "head": "linear", "scale": 1.0, **RGB,
    }  # fmt: skip
    return networks.ResNet(**{**settings, **changes})


def large(architecture: str, **changes) -> networks.LargeResNet:
    settings = {"channels": 3, "classes": 10, "experts": 1, "head": "linear", "scale": 1.0, **RGB}
    return networks.LargeResNet(architecture=architecture, **{**settings, **changes})


def torchvisions(architecture: str, classes: int = 1000) -> models.ResNet:
    if architecture == "resnet10":
        return models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
    return models.get_model(architecture, num_classes=classes)


def parameters(network: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)]
)  # He et al. 2016, table 6, with 10 classes
def test_parameters_are_the_papers(depth, millions):
    assert parameters(resnet(depth=depth)) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    ("architecture", "count"),
    [("resnet10", 5_418_792), ("resnet50", 25_557_032), ("resnet152", 60_192_808), ("resnext50_32x4d", 25_028_904)],
)  # torchvision's documentation; ResNet-10 added up by hand
def test_parameters_are_torchvisions(architecture, count):
    with torch.device("meta"):
        assert parameters(large(architecture, classes=1000)) == count
        assert parameters(torchvisions(architecture)) == count


@pytest.mark.parametrize(("depth", "millions"), [(20, 40.6), (32, 68.9), (44, 97.2), (56, 125.5)])
def test_multiply_adds_are_those_of_cifar_resnets(depth, millions):
    """The usual figures, 41, 69, 97 and 126 million; to a decimal, from the shapes of the convolutions."""
    assert multiply_adds(resnet(depth=depth), 32) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    ("architecture", "billions"),
    [
        ("resnet10", 0.889),  # added up by hand
        ("resnet50", models.ResNet50_Weights.IMAGENET1K_V1.meta["_ops"]),
        ("resnet152", models.ResNet152_Weights.IMAGENET1K_V1.meta["_ops"]),
        ("resnext50_32x4d", models.ResNeXt50_32X4D_Weights.IMAGENET1K_V1.meta["_ops"]),
    ],
)
def test_multiply_adds_are_torchvisions(architecture, billions):
    with torch.device("meta"):
        network = large(architecture, classes=1000)
    network.to_empty(device="cpu")  # drawing the weights would take longer than to use them
    assert multiply_adds(network, 224) / 1e9 == pytest.approx(billions, abs=0.001)


def multiply_adds(network: torch.nn.Module, side: int) -> int:
    """Of an image's forward pass; the counter counts each as two operations."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("architecture", ["resnet10", "resnet50", "resnext50_32x4d"])
def test_one_expert_is_torchvisions_network(architecture):
    """The same seed draws the same weights, and these predict the same."""
    torch.manual_seed(0)
    ours = large(architecture).eval()
    torch.manual_seed(0)
    theirs = torchvisions(architecture, classes=10)
    for name, weight in theirs.state_dict().items():
        name = name.replace("fc", "head")
        own = name.startswith(("layer3", "layer4", "head"))
        torch.testing.assert_close(ours.state_dict()[f"experts.0.{name}" if own else name], weight, rtol=0, atol=0)
    assert parameters(ours) == parameters(theirs)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images)[0], theirs.eval()(images))


@pytest.mark.parametrize("network", [resnet(experts=3, classes=7), large("resnet10", experts=3, classes=7)])
def test_logits_are_experts_batch_classes_in_float32(network):
    with torch.autocast("cpu", torch.bfloat16):
        logits_EBC = network(torch.randn(5, 3, 32, 32))
    assert logits_EBC.shape == (3, 5, 7)
    assert logits_EBC.dtype == torch.float32


def test_an_expert_adds_all_but_stem_and_first_group():
    one, three = resnet(depth=32), resnet(depth=32, experts=3)
    shared = parameters(one.conv1) + parameters(one.bn1) + parameters(one.group1)
    assert parameters(three) - shared == 3 * (parameters(one) - shared)


def test_an_expert_that_shares_two_groups_adds_the_third_and_a_head():
    one, three = resnet(depth=32, shared_groups=2), resnet(depth=32, shared_groups=2, experts=3)
    own = parameters(one.experts[0].group3) + parameters(one.experts[0].head)
    assert parameters(three) - parameters(one) == 2 * own
    assert parameters(one) == parameters(resnet(depth=32))


def test_five_experts_that_share_two_groups_cost_what_three_do_that_share_one():
    five, three = resnet(depth=32, experts=5, shared_groups=2), resnet(depth=32, experts=3)
    assert multiply_adds(five, 32) == pytest.approx(multiply_adds(three, 32), rel=2e-3)
    assert multiply_adds(three, 32) / 1e6 == pytest.approx(158.5, abs=0.1)


def test_one_expert_is_the_same_network_whatever_it_would_share():
    torch.manual_seed(0)
    one = resnet().eval()
    torch.manual_seed(0)
    other = resnet(shared_groups=2).eval()
    moved = {name.replace("experts.0.group2", "group2"): value for name, value in one.state_dict().items()}
    assert {name: value.tolist() for name, value in other.state_dict().items()} == {
        name: value.tolist() for name, value in moved.items()
    }
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(other(images), one(images), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", networks.ARCHITECTURES)
def test_an_expert_adds_two_layers_and_a_head(architecture):
    with torch.device("meta"):
        one, three, whole = large(architecture), large(architecture, experts=3), torchvisions(architecture, classes=10)
    added = sum(parameters(part) for part in (whole.layer3, whole.layer4, whole.fc))
    assert parameters(three) - parameters(one) == 2 * added


@pytest.mark.processor
def test_block_is_its_twin():
    """Option A in loops: subsample the input and pad its channels with zeros."""
    block = networks.Block(4, 8, stride=2).eval()
    x = torch.randn(2, 4, 6, 6)
    short = torch.zeros(2, 8, 3, 3)
    for channel in range(4):
        for row in range(3):
            for column in range(3):
                short[:, channel + 2, row, column] = x[:, channel, 2 * row, 2 * column]
    inner = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), F.relu(inner + short))


def test_cosine_head_ignores_lengths_and_stays_within_its_scale():
    head = networks.CosineHead(8, 5, 30.0)
    x = torch.randn(4, 8)
    torch.testing.assert_close(head(x), head(100 * x))
    assert head(x).abs().max() <= 30
    torch.testing.assert_close(head(head.weight).diagonal(), torch.full((5,), 30.0))


def test_product_is_the_mean_of_logits_and_proportional_to_the_product_of_probabilities():
    logits_EBC = torch.randn(3, 4, 5)
    mean_BC = networks.product(logits_EBC)
    probabilities_BC = logits_EBC.softmax(-1).prod(0) ** (1 / 3)
    expected_BC = probabilities_BC / probabilities_BC.sum(1, keepdim=True)
    torch.testing.assert_close(mean_BC.softmax(-1), expected_BC)


@pytest.mark.parametrize(
    "make",
    [resnet, partial(resnet, shared_groups=2), partial(large, "resnet10")],
    ids=["cifar", "cifar that shares two groups", "resnet10"],
)
def test_a_saved_network_predicts_the_same_and_has_the_same_bytes(tmp_path, make):
    network = make(experts=2, head="cosine", scale=30.0).eval()
    path = networks.save(network, tmp_path / "n.safetensors")
    images = torch.randn(3, 3, 32, 32)
    loaded = networks.load(path)
    assert type(loaded) is type(network)
    assert loaded.settings == network.settings
    torch.testing.assert_close(loaded(images), network(images))
    assert networks.to_bytes(loaded) == path.read_bytes()


def test_a_file_that_is_no_network_is_named(tmp_path):
    path = tmp_path / "n.safetensors"
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"n\.safetensors: not a network"):
        networks.load(path)


def test_normalisation_must_fit_the_images():
    with pytest.raises(ValueError, match=r"1 channel.*has 3"):
        resnet(channels=1)
    with pytest.raises(ValueError, match=r"1 channel.*has 3"):
        large("resnet10", channels=1)


def test_settings_say_which_network_it_is():
    """Those of a CIFAR ResNet have no architecture: its files are older than the others."""
    cifar, other = resnet(), large("resnet10")
    assert "architecture" not in cifar.settings
    assert type(networks.build(**cifar.settings)) is networks.ResNet
    assert other.settings["architecture"] == "resnet10"
    assert type(networks.build(**other.settings)) is networks.LargeResNet
    with pytest.raises(ValueError, match="no architecture 'resnet51'; there are resnet10, resnet50, resnet152, "):
        networks.build(**{**other.settings, "architecture": "resnet51"})


def test_the_schema_allows_the_architectures_that_there_are():
    allowed = params.LargeNetwork.model_fields["architecture"].annotation
    assert get_args(allowed) == tuple(networks.ARCHITECTURES)


@pytest.mark.processor
def test_a_large_network_trains_deterministically():
    """Two trainings of a step leave the same averaged weights, other than the first ones; both experts have learnt."""

    def trained() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        inference.set_up(0)
        network = large("resnet10", classes=3, experts=2, head="cosine", scale=30.0)
        first = {key: value.clone() for key, value in network.state_dict().items()}
        images, labels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 3
        loss = losses.load("balpoe")(torch.bincount(labels), **METHODS["balpoe"])
        recipe = {key: value for key, value in RECIPE.items() if key != "test_every"}
        training = engine.Training(network, loss, batches.Split(images, labels, 3), seed=0, **recipe)
        training.finish_epoch(lambda: None)
        assert training.steps == 1
        return first, training.averaged().state_dict()

    (first, once), (_, twice) = trained(), trained()
    assert all(torch.equal(once[key], twice[key]) for key in once)
    assert all(not torch.equal(first[key], once[key]) for key in once)
