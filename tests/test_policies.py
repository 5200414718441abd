"""Policies against Pillow and torchvision, image by image, and the frequencies of the draws."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from pictures import draws, from_pillow, to_pillow, varied
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import chi2
from torchvision import transforms
from torchvision.transforms import autoaugment as torchvision_policies

from longtail.data.augmentation.policies import (
    AUTOAUGMENT,
    BINS,
    ENHANCEMENTS,
    POLICIES,
    RANDAUGMENT_BIN,
    SPACE,
    SUB_POLICIES,
    autoaugment_cifar10,
    draw_sub_policies,
    magnitude,
    randaugment,
    randaugment_space,
    trivialaugment,
    trivialaugment_space,
)

SIZES = [(32, 32), (17, 24), (8, 8)]


def pillow_operation(name, image, value):
    """The operation as the recipes' code asks Pillow for it."""
    side = {"translate_x": image.size[0], "translate_y": image.size[1]}
    if name in ("invert", "autocontrast", "equalize"):
        return getattr(ImageOps, name)(image)
    if name == "posterize":
        return ImageOps.posterize(image, int(value))
    if name == "solarize":
        return ImageOps.solarize(image, value)
    if name in ENHANCEMENTS:
        return getattr(ImageEnhance, name.capitalize())(image).enhance(value)
    if name == "rotate":
        return image.rotate(value, fillcolor=(128, 128, 128))
    affine = {
        "shear_y": (1, 0, 0, value, 1, 0),
        "translate_x": (1, 0, value * side.get(name, 0), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, value * side.get(name, 0)),
    }[name]
    kind = Image.Resampling.BICUBIC if name == "shear_y" else Image.Resampling.NEAREST
    return image.transform(image.size, Image.Transform.AFFINE, affine, kind, fillcolor=(128, 128, 128))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(AUTOAUGMENT))
def test_autoaugments_operation_gives_pillows_bytes(name, size):
    values = sorted({magnitude(name, level, sign) for level in range(10) for sign in (-1, 1)})
    images = varied(10, *size)
    pairs = list(itertools.product(images, values))
    batch = torch.stack([image for image, _ in pairs])
    given = torch.tensor([value for _, value in pairs], dtype=torch.float64)

    result = AUTOAUGMENT[name](batch, given)

    expected = [from_pillow(pillow_operation(name, to_pillow(image), value)) for image, value in pairs]
    assert torch.equal(result, torch.stack(expected))


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("invert", lambda image, value: F.invert(image)),
        ("posterize", lambda image, value: F.posterize(image, int(value))),
        ("solarize", F.solarize),
        ("equalize", lambda image, value: F.equalize(image)),
        ("autocontrast", lambda image, value: F.autocontrast(image)),
        ("brightness", F.adjust_brightness),
        ("color", F.adjust_saturation),
        ("contrast", F.adjust_contrast),
        ("sharpness", F.adjust_sharpness),
    ],
)
def test_operation_is_torchvisions_up_to_rounding(name, twin):
    """torchvision's tensor operations round elsewhere: at most two values of 255 apart."""
    images = varied(10)
    for level, sign in itertools.product((1, 5, 9), (-1, 1)):
        value = magnitude(name, level, sign)
        result = AUTOAUGMENT[name](images, torch.full((10,), value, dtype=torch.float64))
        expected = torch.stack([twin(image, value) for image in images])
        assert (result.int() - expected.int()).abs().max() <= 2


def test_magnitudes_are_the_published_levels():
    levels = {
        "shear_y": np.linspace(0, 0.3, 10),
        "translate_x": np.linspace(0, 150 / 331, 10),
        "translate_y": np.linspace(0, 150 / 331, 10),
        "rotate": np.linspace(0, 30, 10),
        "posterize": np.round(np.linspace(8, 4, 10)),
        "solarize": np.linspace(256, 0, 10),
    }
    for name, values in levels.items():
        assert [magnitude(name, level, 1) for level in range(10)] == pytest.approx(list(values))
    for name in ENHANCEMENTS:
        assert magnitude(name, 9, 1) == pytest.approx(1.9)
        assert magnitude(name, 9, -1) == pytest.approx(0.1)
    assert magnitude("translate_x", 4, -1) == -magnitude("translate_x", 4, 1)
    assert magnitude("rotate", 4, -1) == magnitude("rotate", 4, 1)


def test_sub_policies_are_torchvisions_table():
    """torchvision names no level where a level means nothing."""
    table = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10).policies
    for ours, theirs in zip(SUB_POLICIES, table, strict=True):
        for (name, probability, level), (other, other_probability, other_level) in zip(ours, theirs, strict=True):
            assert name.replace("_", "") == other.lower()
            assert probability == other_probability
            assert other_level in (None, level)


def test_autoaugment_is_its_two_operations_on_every_image_alone():
    images = varied(400)
    drawn = draw_sub_policies(draws(400, seed=1))

    result = autoaugment_cifar10(images, draws(400, seed=1))

    for number, image in enumerate(images):
        expected = to_pillow(image)
        for position, (name, _, level) in enumerate(SUB_POLICIES[drawn.sub_policy[number]]):
            if drawn.applied[position, number]:
                sign = 1 if drawn.positive[position, number] else -1
                expected = pillow_operation(name, expected, magnitude(name, level, sign))
        assert torch.equal(result[number], from_pillow(expected)), number


def test_autoaugments_draws_have_the_published_frequencies():
    count = 100_000
    drawn = draw_sub_policies(draws(count))

    chosen = torch.bincount(drawn.sub_policy, minlength=25)
    chi_square = ((chosen - count / 25) ** 2 / (count / 25)).sum()
    assert len(chosen) == 25
    assert chi_square < 51.2  # the 0.1 % quantile with 24 degrees of freedom
    deviations = []
    for number, pair in enumerate(SUB_POLICIES):
        among = drawn.sub_policy == number
        for position, (_, probability, _) in enumerate(pair):
            times = drawn.applied[position, among].sum().item()
            if probability == 0:
                assert times == 0
                continue
            n = among.sum().item()
            variance = n * probability * (1 - probability)
            deviations.append((times - n * probability) ** 2 / variance)
    assert sum(deviations) < 85.4  # the 0.1 % quantile with 49 degrees of freedom
    assert drawn.positive.double().mean().item() == pytest.approx(0.5, abs=0.01)
    both = drawn.applied[:, drawn.sub_policy == 8].double()  # equalize 0.6, equalize 0.5
    assert both.prod(0).mean().item() == pytest.approx(0.3, abs=0.03)  # drawn one by one


def name_at_torchvision(name):
    """translate_x is TranslateX, autocontrast is AutoContrast."""
    return "AutoContrast" if name == "autocontrast" else name.title().replace("_", "")


def torchvisions(image, name, value):
    """The operation as RandAugment and TrivialAugment ask torchvision for it, on Pillow's image."""
    value -= name in ENHANCEMENTS  # they name the distance of the factor from 1
    nearest = transforms.InterpolationMode.NEAREST
    result = torchvision_policies._apply_op(to_pillow(image), name_at_torchvision(name), value, nearest, None)
    return from_pillow(result)


@pytest.mark.parametrize("size", [*SIZES, (1, 5)])
@pytest.mark.parametrize("name", sorted(SPACE))
def test_operation_of_the_wide_spaces_gives_torchvisions_bytes(name, size):
    """At every magnitude of both spaces, with both signs."""
    number = list(SPACE).index(name)
    spaces = torch.stack((randaugment_space(*size), trivialaugment_space()))
    pairs = list(itertools.product(varied(5, *size), spaces[:, :, number].unique().tolist()))
    batch = torch.stack([image for image, _ in pairs])
    given = torch.tensor([value for _, value in pairs], dtype=torch.float64)

    result = SPACE[name](batch, given)

    assert torch.equal(result, torch.stack([torchvisions(image, name, value) for image, value in pairs]))


@pytest.mark.parametrize("size", SIZES)
def test_spaces_are_torchvisions(size):
    tables = {
        "randaugment": transforms.RandAugment()._augmentation_space(BINS, size),
        "trivialaugment": transforms.TrivialAugmentWide()._augmentation_space(BINS),
    }
    ours = {"randaugment": randaugment_space(*size), "trivialaugment": trivialaugment_space()}
    for policy, table in tables.items():
        assert [name_at_torchvision(name) for name in SPACE] == list(table)
        for number, name in enumerate(SPACE):
            magnitudes, signed = table[name_at_torchvision(name)]
            for side, sign in enumerate((-1, 1)):
                expected = magnitudes.double().expand(BINS) * (sign if signed else 1) + (name in ENHANCEMENTS)
                assert torch.equal(ours[policy][side, number], expected), (policy, name)


def test_randaugment_is_two_operations_on_every_image_alone():
    images = varied(400, 24, 32)
    chunk = draws(400, seed=1)
    chosen, positive = chunk.randint(14, 2), chunk.randint(2, 2)
    space = randaugment_space(24, 32)

    result = randaugment(images, draws(400, seed=1))

    for number, image in enumerate(images):
        expected = image
        for operation, sign in zip(chosen[:, number], positive[:, number], strict=True):
            value = space[sign, operation, RANDAUGMENT_BIN].item()
            expected = torchvisions(expected, list(SPACE)[operation], value)
        assert torch.equal(result[number], expected), number


def test_trivialaugment_is_one_operation_on_every_image_alone():
    images = varied(400, 24, 32)
    chunk = draws(400, seed=1)
    chosen, strength, positive = chunk.randint(14), chunk.randint(BINS), chunk.randint(2)
    space = trivialaugment_space()

    result = trivialaugment(images, draws(400, seed=1))

    for number, image in enumerate(images):
        value = space[positive[number], chosen[number], strength[number]].item()
        assert torch.equal(result[number], torchvisions(image, list(SPACE)[chosen[number]], value)), number


def calls_of_torchvision(policy, times, monkeypatch):
    """How often torchvision's own policy asks for every (operation, magnitude)."""
    calls = Counter()
    monkeypatch.setattr(
        torchvision_policies,
        "_apply_op",
        lambda image, name, value, **_: calls.update([(name, round(value, 6) + 0.0)]) or image,
    )
    image = to_pillow(varied(1)[0])
    torch.manual_seed(0)
    for _ in range(times):
        policy(image)
    return calls


def calls_of_ours(policy, times, monkeypatch):
    """How often our policy does it, one image after another: the magnitude that an operation is given."""
    calls = Counter()

    def recorder(name):
        def record(images, magnitudes):
            values = (magnitudes - int(name in ENHANCEMENTS)).tolist()
            calls.update((name_at_torchvision(name), round(value, 6) + 0.0) for value in values)
            return images

        return record

    for name in SPACE:
        monkeypatch.setitem(SPACE, name, recorder(name))
    policy(varied(5).repeat(times // 5, 1, 1, 1), draws(times))
    return calls


@pytest.mark.parametrize(
    ("ours", "theirs", "cells"),
    [
        (randaugment, transforms.RandAugment(), 23),  # 9 operations with two signs, 5 with one value
        (trivialaugment, transforms.TrivialAugmentWide(), 9 * 61 + 7 + 31 + 3),
    ],
)
def test_frequencies_are_torchvisions(ours, theirs, cells, monkeypatch):
    """Every (operation, magnitude): a chi-square test of two samples of 10,000 images."""
    found = calls_of_ours(ours, 10_000, monkeypatch)
    expected = calls_of_torchvision(theirs, 10_000, monkeypatch)

    assert found.total() == expected.total()
    keys = set(found) | set(expected)
    assert len(keys) == cells
    # equal totals: (a - b)^2 / (a + b) summed is chi-square
    statistic = sum((found[key] - expected[key]) ** 2 / (found[key] + expected[key]) for key in keys)
    assert chi2.ppf(0.001, cells - 1) < statistic < chi2.ppf(0.999, cells - 1)


@pytest.mark.parametrize("name", POLICIES)
def test_policy_needs_colour(name):
    with pytest.raises(ValueError, match=f"{name} needs 3 channels, the images have 1"):
        POLICIES[name](varied(2, channels=1), draws(2))


@pytest.mark.parametrize("name", POLICIES)
def test_policy_takes_one_image_or_none_and_spares_its_input(name):
    images = varied(100)
    before = images.clone()
    whole = POLICIES[name](images, draws(100))
    assert torch.equal(images, before)
    assert not torch.equal(whole, before)
    assert torch.equal(POLICIES[name](images[7:8], draws(100, rows=[7])), whole[7:8])
    assert POLICIES[name](images[:0], draws(100, rows=[])).shape == (0, 3, 32, 32)
