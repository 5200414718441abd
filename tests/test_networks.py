"""Shapes, sizes and files of the networks."""

import pytest
import torch
import torch.nn.functional as F

from longtail import networks

RGB = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}


def resnet(**changes) -> networks.ResNet:
    settings = {
        "channels": 3, "classes": 10, "experts": 1, "depth": 8, "width": 16, "head": "linear", "scale": 1.0, **RGB,
    }  # fmt: skip
    return networks.ResNet(**{**settings, **changes})


def parameters(network: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)]
)  # He et al. 2016, table 6, with 10 classes
def test_parameters_are_the_papers(depth, millions):
    assert parameters(resnet(depth=depth)) / 1e6 == pytest.approx(millions, abs=0.006)


def test_logits_are_experts_batch_classes_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        logits_EBC = resnet(experts=3, classes=7)(torch.randn(5, 3, 32, 32))
    assert logits_EBC.shape == (3, 5, 7)
    assert logits_EBC.dtype == torch.float32


def test_an_expert_adds_all_but_stem_and_first_group():
    one, three = resnet(depth=32), resnet(depth=32, experts=3)
    shared = parameters(one.conv1) + parameters(one.bn1) + parameters(one.group1)
    assert parameters(three) - shared == 3 * (parameters(one) - shared)


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


def test_a_saved_network_predicts_the_same_and_has_the_same_bytes(tmp_path):
    network = resnet(experts=2, head="cosine", scale=30.0).eval()
    path = networks.save(network, tmp_path / "n.safetensors")
    images = torch.randn(3, 3, 32, 32)
    loaded = networks.load(path)
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
