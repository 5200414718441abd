"""The losses for other people's loops: those of the pipeline, with plain logits."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT

from longtail import criteria, losses

COUNTS = [50, 20, 5, 2]
KINDS = [getattr(criteria, name) for name in criteria.__all__ if name != "Criterion"]
METHODS = yaml.safe_load((ROOT / "params.yaml").read_text())["methods"]


def batch(experts=1):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(experts, 12, 4, generator=generator)
    return logits, torch.arange(12) % 4


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loss_of_the_pipeline(kind):
    criterion = kind(COUNTS)
    logits, labels = batch(criterion.experts)
    expected = criterion.loss(logits, labels)
    torch.testing.assert_close(criterion(logits, labels), expected)
    if criterion.experts == 1:
        again = kind(torch.tensor(COUNTS))
        torch.testing.assert_close(again(logits[0], labels), expected)
    else:
        with pytest.raises(ValueError, match=r"expected \(3, B, 4\), a row of each expert"):
            criterion(logits[0], labels)


def test_the_papers_settings():
    gala = criteria.GALA(COUNTS).loss
    assert {key: getattr(gala, key) for key in METHODS["gala"]} == METHODS["gala"]
    logits, labels = batch()
    prior = torch.tensor(COUNTS) / sum(COUNTS)
    expected = F.cross_entropy(logits[0] + prior.log(), labels)
    torch.testing.assert_close(criteria.BalancedSoftmax(COUNTS)(logits[0], labels), expected)
    ldam = criteria.LDAM(COUNTS)
    margin = 0.5 * (2 / torch.tensor(COUNTS)) ** 0.25
    plain = F.cross_entropy(logits[0] - 30 * F.one_hot(labels, 4) * margin, labels)
    torch.testing.assert_close(ldam(logits[0], labels), plain)
    ldam.start_epoch(160, 200)
    torch.testing.assert_close(ldam(logits[0], labels), plain)
    ldam.start_epoch(161, 200)
    assert not torch.isclose(ldam(logits[0], labels), plain)
    assert criteria.BalPoE(COUNTS).experts == len(METHODS["balpoe"]["taus"])


def test_galas_margins_follow_the_gradients_of_a_loop_of_ones_own():
    torch.manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    x = torch.randn(len(labels), 6) + F.one_hot(labels, 6) * 1.5
    network, criterion = torch.nn.Linear(6, 4), criteria.GALA(COUNTS)
    optimizer = torch.optim.SGD(network.parameters(), 0.5)
    first = criterion(network(x), labels).item()
    criterion.loss.step_2C.zero_()
    for _ in range(30):
        loss = criterion(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        criterion.after_step()
    theta_C = criterion.loss.theta_C
    assert loss.item() < first and theta_C.argmax() == 0 and theta_C.argmin() == 3  # as the classes are large
    twin = losses.load("gala")(torch.tensor(COUNTS), **METHODS["gala"])
    assert criterion.state_dict().keys() == {f"loss.{key}" for key in twin.state_dict()}


def test_all_of_it_moves_to_another_device():
    criterion = criteria.GALA(COUNTS).to("meta")
    assert {value.device.type for value in [*criterion.buffers(), criterion.loss.step_2C]} == {"meta"}


@pytest.mark.parametrize(("counts", "match"), [([3, 0], "all above 0"), ([[1, 2]], "images of each class")])
def test_counts_that_are_none_are_refused(counts, match):
    with pytest.raises(ValueError, match=match):
        criteria.GALA(counts)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (criteria.GALA, {"variant": "realeased"}), (criteria.GALA, {"accumulation": "duoble"}),
        (criteria.ClassBalanced, {"divide_by": "weigths"}), (criteria.ClassBalanced, {"beta": 1.0}),
    ],
)  # fmt: skip
def test_a_misspelt_setting_is_no_other_loss(kind, settings):
    with pytest.raises(ValueError, match="allowed are"):
        kind([5, 3], **settings)


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(12, 5\); expected \(B, 4\), B = 12 labels"):
        criteria.CrossEntropy(COUNTS)(torch.zeros(12, 5), batch()[1])
    with pytest.raises(ValueError, match=r"shape \(11, 4\); expected \(B, 4\), B = 12 labels"):
        criteria.CrossEntropy(COUNTS)(torch.zeros(11, 4), batch()[1])


def test_it_needs_nothing_of_the_pipeline():
    heavy = ("dvc", "mlflow", "torchvision", "matplotlib", "safetensors", "sklearn")
    code = (
        "import sys; from longtail import criteria; criteria.BalPoE([3, 2]); criteria.GALA([3, 2]); "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
