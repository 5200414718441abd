"""Augmentation against Pillow and torchvision, image by image, and the frequencies of the draws."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torchvision import transforms

from longtail import augment as subject
from longtail.augment import (
    ENHANCEMENTS,
    OPERATIONS,
    SUB_POLICIES,
    apply_policy,
    augment,
    autoaugment_cifar10,
    crop,
    cutout,
    draw_policy,
    flip,
    magnitude,
    rotate,
)

OFF = {"crop_padding": 0, "flip": False, "rotation": 0, "policy": "none", "cutout": 0}
GREY = (128, 128, 128)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def varied(count, height=32, width=32, channels=3):
    """Noise, gradients, faint, patchy and one-coloured images in turn: histograms of every kind."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, height, width, channels))
    for number, image in enumerate(images):
        kind = number % 5
        if kind == 1:
            image[:] = np.linspace(0, 240, width)[:, None] + rng.integers(0, 9, image.shape)
        elif kind == 2:
            image[:] = image // 8 + rng.integers(0, 200)
        elif kind == 3:
            image[:] = np.where(rng.random((height, width, 1)) < 0.6, 77, image)
        elif kind == 4:
            image[:] = image[0, 0]
    return torch.from_numpy(images.astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def to_pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pillow(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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
        return image.rotate(value, fillcolor=GREY)
    affine = {
        "shear_y": (1, 0, 0, value, 1, 0),
        "translate_x": (1, 0, value * side.get(name, 0), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, value * side.get(name, 0)),
    }[name]
    kind = Image.Resampling.BICUBIC if name == "shear_y" else Image.Resampling.NEAREST
    return image.transform(image.size, Image.Transform.AFFINE, affine, kind, fillcolor=GREY)


@pytest.mark.parametrize("size", [(32, 32), (17, 24), (8, 8)])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operation_gives_pillows_bytes(name, size):
    values = sorted({magnitude(name, level, sign) for level in range(10) for sign in (-1, 1)})
    images = varied(10, *size)
    pairs = list(itertools.product(images, values))
    batch = torch.stack([image for image, _ in pairs])
    given = torch.tensor([value for _, value in pairs], dtype=torch.float64)

    result = OPERATIONS[name](batch, given)

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
        result = OPERATIONS[name](images, torch.full((10,), value, dtype=torch.float64))
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


def test_policy_is_its_two_operations_on_every_image_alone():
    images = varied(400)
    draws = draw_policy(400, generator=generator(1))

    result = apply_policy(images, draws)

    for number, image in enumerate(images):
        expected = to_pillow(image)
        for position, (name, _, level) in enumerate(SUB_POLICIES[draws.sub_policy[number]]):
            if draws.applied[position, number]:
                sign = 1 if draws.positive[position, number] else -1
                expected = pillow_operation(name, expected, magnitude(name, level, sign))
        assert torch.equal(result[number], from_pillow(expected)), number


def test_policy_draws_have_the_published_frequencies():
    count = 100_000
    draws = draw_policy(count, generator=generator())

    chosen = torch.bincount(draws.sub_policy, minlength=25)
    chi_square = ((chosen - count / 25) ** 2 / (count / 25)).sum()
    assert len(chosen) == 25
    assert chi_square < 51.2  # the 0.1 % quantile with 24 degrees of freedom
    deviations = []
    for number, pair in enumerate(SUB_POLICIES):
        among = draws.sub_policy == number
        for position, (_, probability, _) in enumerate(pair):
            times = draws.applied[position, among].sum().item()
            if probability == 0:
                assert times == 0
                continue
            n = among.sum().item()
            variance = n * probability * (1 - probability)
            deviations.append((times - n * probability) ** 2 / variance)
    assert sum(deviations) < 85.4  # the 0.1 % quantile with 49 degrees of freedom
    assert draws.positive.double().mean().item() == pytest.approx(0.5, abs=0.01)
    both = draws.applied[:, draws.sub_policy == 8].double()  # equalize 0.6, equalize 0.5
    assert both.prod(0).mean().item() == pytest.approx(0.3, abs=0.03)  # drawn one by one


def test_policy_needs_colour():
    with pytest.raises(ValueError, match="needs 3 channels, the images have 1"):
        autoaugment_cifar10(varied(2, channels=1), generator=generator())


@pytest.mark.parametrize("channels", [1, 3])
def test_crop_is_one_of_torchvisions_windows_and_each_is_as_likely(channels):
    image = torch.arange(1, 1 + channels * 30, dtype=torch.uint8).view(channels, 5, 6)
    padded = F.pad(image, [2])
    windows = [F.crop(padded, top, left, 5, 6) for top in range(5) for left in range(5)]
    number_of = {window.numpy().tobytes(): number for number, window in enumerate(windows)}
    assert len(number_of) == 25

    result = crop(image.expand(25_000, -1, -1, -1), padding=2, generator=generator())

    found = np.bincount([number_of[cut.numpy().tobytes()] for cut in result], minlength=25)
    assert ((found - 1000) ** 2 / 1000).sum() < 51.2


def test_crop_treats_every_image_of_a_batch_as_its_own():
    images = varied(50)
    result = crop(images, padding=4, generator=generator())
    for image, cut in zip(images, result, strict=True):
        padded = F.pad(image, [4])
        offsets = itertools.product(range(9), range(9))
        assert any(torch.equal(cut, F.crop(padded, *at, 32, 32)) for at in offsets)


def test_flip_mirrors_half_of_the_images():
    images = varied(2000, 4, 4)
    images[:, :, :, 0] = 1
    images[:, :, :, -1] = 2
    result = flip(images, generator=generator())
    mirrored = 0
    for image, flipped in zip(images, result, strict=True):
        if not torch.equal(flipped, image):
            assert torch.equal(flipped, F.horizontal_flip(image))
            mirrored += 1
    assert abs(mirrored - 1000) < 74  # 3.3 standard deviations


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (9, 14)])
def test_rotate_gives_pillows_bytes(size, channels):
    images = varied(200, *size, channels)
    angles = (2 * torch.rand(200, generator=generator(3), dtype=torch.float64) - 1) * 15

    result = rotate(images, degrees=15, generator=generator(3))

    for image, turned, angle in zip(images, result, angles.tolist(), strict=True):
        for before, after in zip(image, turned, strict=True):
            expected = np.array(Image.fromarray(before.numpy()).rotate(angle))
            assert np.array_equal(after.numpy(), expected)


def test_rotate_is_torchvisions_but_for_single_pixels():
    """torchvision turns tensors in float32: a source half-way between two pixels can differ."""
    images = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8, generator=generator())
    angles = (2 * torch.rand(200, generator=generator(3), dtype=torch.float64) - 1) * 15
    result = rotate(images, degrees=15, generator=generator(3))
    turned = zip(images, angles.tolist(), strict=True)
    expected = torch.stack([F.rotate(image, angle) for image, angle in turned])
    differing = (result != expected).any(1).flatten(1).double().mean(1)
    assert differing.mean() < 0.001
    assert differing.max() < 0.01


def test_rotate_draws_angles_to_both_sides():
    image = torch.zeros(1, 1, 33, 33, dtype=torch.uint8)
    image[:, :, 0:3, 16] = 255  # a hand at twelve o'clock
    turned = rotate(image.expand(500, -1, -1, -1), degrees=60, generator=generator())
    bright = (turned[:, 0] > 0).nonzero().double()
    rows, columns = (
        torch.stack([bright[bright[:, 0] == number, axis].mean() for number in range(500)]) for axis in (1, 2)
    )
    angles = torch.rad2deg(torch.atan2(columns - 16, 16 - rows))
    assert 55 < angles.max() < 63
    assert -63 < angles.min() < -55
    assert abs(angles.mean()) < 5
    with pytest.raises(ValueError, match="181"):
        rotate(image, degrees=181, generator=generator())


@pytest.mark.parametrize("length", [3, 4, 20])
def test_cutout_blackens_a_square_about_any_pixel(length):
    image = torch.arange(1, 1 + 2 * 7 * 9, dtype=torch.uint8).view(2, 7, 9)
    expected = {}
    for y, x in itertools.product(range(7), range(9)):
        cut = image.clone()
        for row, column in itertools.product(range(7), range(9)):
            above, left = row - (y - length // 2), column - (x - length // 2)
            if 0 <= above < length and 0 <= left < length:
                cut[:, row, column] = 0
        expected.setdefault(cut.numpy().tobytes(), []).append((y, x))

    result = cutout(image.expand(12_600, -1, -1, -1), length=length, generator=generator())

    found = dict.fromkeys(expected, 0)
    for cut in result:
        found[cut.numpy().tobytes()] += 1
    for key, centres in expected.items():
        assert found[key] == pytest.approx(200 * len(centres), abs=5 * (200 * len(centres)) ** 0.5)


def test_augment_with_everything_off_is_the_identity():
    images = varied(10)
    state = generator()
    assert torch.equal(augment(images, **OFF, generator=state), images)
    assert torch.equal(state.get_state(), generator().get_state())


def test_augment_steps_come_in_the_documented_order(monkeypatch):
    calls = []
    for name in ("crop", "_flip", "autoaugment_cifar10", "rotate", "_cutout"):
        step = lambda images, name=name, **given: calls.append((name, given)) or images  # noqa: E731
        monkeypatch.setattr(subject, name, step)
    state = generator()
    on = {
        "crop_padding": 4,
        "flip": True,
        "rotation": 15,
        "policy": "autoaugment_cifar10",
        "cutout": 8,
    }
    augment(varied(2), **on, generator=state)
    assert calls == [
        ("crop", {"padding": 4, "generator": state}),
        ("_flip", {"generator": state}),
        ("autoaugment_cifar10", {"generator": state}),
        ("rotate", {"degrees": 15, "generator": state}),
        ("_cutout", {"length": 8, "generator": state}),
    ]


@pytest.mark.parametrize(
    "on",
    [
        {"crop_padding": 4},
        {"flip": True},
        {"rotation": 15},
        {"policy": "autoaugment_cifar10"},
        {"cutout": 16},
    ],
)
def test_augment_follows_the_generator_and_spares_its_input(on):
    images = varied(64)
    before = images.clone()
    first = augment(images, **(OFF | on), generator=generator(5))
    assert torch.equal(first, augment(images, **(OFF | on), generator=generator(5)))
    assert not torch.equal(first, augment(images, **(OFF | on), generator=generator(6)))
    assert first.dtype == torch.uint8
    assert torch.equal(images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_augment_gives_the_same_bytes_on_a_gpu():
    images = varied(2000)
    on = {"crop_padding": 4, "flip": True, "rotation": 15, "cutout": 16}
    on["policy"] = "autoaugment_cifar10"
    there = augment(images.cuda(), **on, generator=generator())
    assert torch.equal(there.cpu(), augment(images, **on, generator=generator()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"policy": "randaugment"}, "'randaugment' is none of none, autoaugment_cifar10"),
        ({"cutout": -1}, "cutout is -1"),
        ({"crop_padding": -2}, "crop_padding is -2"),
        ({"rotation": -15}, "rotation is -15"),
    ],
)
def test_augment_refuses_what_it_does_not_know(wrong, message):
    with pytest.raises(ValueError, match=message):
        augment(varied(2), **(OFF | wrong), generator=generator())
