"""Augmentation against Pillow and torchvision, image by image, and the frequencies of the draws."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F_pillow
import torchvision.transforms.v2.functional as F
from pictures import draws, from_pillow, to_pillow, varied
from PIL import Image
from scipy.stats import chi2, kstest
from torchvision.transforms import v2

from longtail.data.augmentation import augment as subject
from longtail.data.augmentation.augment import POLICIES, augment, color_jitter, crop, cutout, flip, rotate
from longtail.data.augmentation.operations import hue

OFF = {
    "crop_padding": 0,
    "flip": False,
    "rotation": 0,
    "policy": "none",
    "cutout": 0,
    "color_jitter": [0, 0, 0, 0],
}
ALL = {"crop_padding": 4, "flip": True, "rotation": 15, "cutout": 16, "color_jitter": [0.4, 0.4, 0.4, 0.1]}


@pytest.mark.parametrize("channels", [1, 3])
def test_crop_is_one_of_torchvisions_windows_and_each_is_as_likely(channels):
    image = torch.arange(1, 1 + channels * 30, dtype=torch.uint8).view(channels, 5, 6)
    padded = F.pad(image, [2])
    windows = [F.crop(padded, top, left, 5, 6) for top in range(5) for left in range(5)]
    number_of = {window.numpy().tobytes(): number for number, window in enumerate(windows)}
    assert len(number_of) == 25

    result = crop(image.expand(25_000, -1, -1, -1), padding=2, draws=draws(25_000))

    found = np.bincount([number_of[cut.numpy().tobytes()] for cut in result], minlength=25)
    assert ((found - 1000) ** 2 / 1000).sum() < 51.2


def test_crop_treats_every_image_of_a_batch_as_its_own():
    images = varied(50)
    result = crop(images, padding=4, draws=draws(50))
    for image, cut in zip(images, result, strict=True):
        padded = F.pad(image, [4])
        offsets = itertools.product(range(9), range(9))
        assert any(torch.equal(cut, F.crop(padded, *at, 32, 32)) for at in offsets)


def test_flip_mirrors_half_of_the_images():
    images = varied(2000, 4, 4)
    images[:, :, :, 0] = 1
    images[:, :, :, -1] = 2
    result = flip(images, draws=draws(2000))
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
    angles = (2 * torch.rand(200, generator=draws(200, seed=3).generator, dtype=torch.float64) - 1) * 15

    result = rotate(images, degrees=15, draws=draws(200, seed=3))

    for image, turned, angle in zip(images, result, angles.tolist(), strict=True):
        for before, after in zip(image, turned, strict=True):
            expected = np.array(Image.fromarray(before.numpy()).rotate(angle))
            assert np.array_equal(after.numpy(), expected)


def test_rotate_is_torchvisions_but_for_single_pixels():
    """torchvision turns tensors in float32: a source half-way between two pixels can differ."""
    images = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8, generator=draws(200).generator)
    angles = (2 * torch.rand(200, generator=draws(200, seed=3).generator, dtype=torch.float64) - 1) * 15
    result = rotate(images, degrees=15, draws=draws(200, seed=3))
    turned = zip(images, angles.tolist(), strict=True)
    expected = torch.stack([F.rotate(image, angle) for image, angle in turned])
    differing = (result != expected).any(1).flatten(1).double().mean(1)
    assert differing.mean() < 0.001
    assert differing.max() < 0.01


def test_rotate_draws_angles_to_both_sides():
    image = torch.zeros(1, 1, 33, 33, dtype=torch.uint8)
    image[:, :, 0:3, 16] = 255  # a hand at twelve o'clock
    turned = rotate(image.expand(500, -1, -1, -1), degrees=60, draws=draws(500))
    bright = (turned[:, 0] > 0).nonzero().double()
    rows, columns = (
        torch.stack([bright[bright[:, 0] == number, axis].mean() for number in range(500)]) for axis in (1, 2)
    )
    angles = torch.rad2deg(torch.atan2(columns - 16, 16 - rows))
    assert 55 < angles.max() < 63
    assert -63 < angles.min() < -55
    assert abs(angles.mean()) < 5


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

    result = cutout(image.expand(12_600, -1, -1, -1), length=length, draws=draws(12_600))

    found = dict.fromkeys(expected, 0)
    for cut in result:
        found[cut.numpy().tobytes()] += 1
    for key, centres in expected.items():
        assert found[key] == pytest.approx(200 * len(centres), abs=5 * (200 * len(centres)) ** 0.5)


def jittered_by_torchvision(image, order, factors, strengths):
    """torchvision's ColorJitter on Pillow's image, for one order and its four factors."""
    steps = (
        F_pillow.adjust_brightness,
        F_pillow.adjust_contrast,
        F_pillow.adjust_saturation,
        F_pillow.adjust_hue,
    )
    image = to_pillow(image)
    for number in order:
        if strengths[number]:
            image = steps[number](image, factors[number])
    return from_pillow(image)


@pytest.mark.parametrize("strengths", [(0.4, 0.4, 0.4, 0.1), (0.8, 0, 1.5, 0.5), (0, 0, 0, 0.2), (0, 2, 0, 0)])
def test_color_jitter_gives_torchvisions_bytes(strengths):
    images = varied(240, 16, 24)
    chunk = draws(240, seed=2)
    order = chunk.rand(4, dtype=torch.float64).argsort(0).T.tolist()
    unit = chunk.rand(4, dtype=torch.float64).T.tolist()

    result = color_jitter(images, strengths=strengths, draws=draws(240, seed=2))

    assert len({tuple(steps) for steps in order}) == 24
    for number, image in enumerate(images):
        factors = []
        for place, strength in enumerate(strengths):
            low, high = (-strength, strength) if place == 3 else (max(0, 1 - strength), 1 + strength)
            factors.append(low + unit[number][place] * (high - low))
        assert torch.equal(result[number], jittered_by_torchvision(image, order[number], factors, strengths)), number


def test_color_jitter_draws_as_torchvision_does(monkeypatch):
    """All 24 orders as often; every factor uniform over torchvision's range."""
    calls = []
    for number, name in enumerate(subject.JITTERED):
        step = lambda images, factors, number=number: calls.append((number, factors)) or images  # noqa: E731
        monkeypatch.setitem(subject.JITTERED, name, step)
    strengths = (0.4, 1.5, 0.9, 0.25)
    color_jitter(varied(5).repeat(2000, 1, 1, 1), strengths=strengths, draws=draws(10_000))

    theirs = v2.ColorJitter(*strengths)
    for number, name in enumerate(subject.JITTERED):
        low, high = getattr(theirs, name)
        factors = torch.cat([factors for step, factors in calls if step == number])
        assert len(factors) == 10_000
        assert kstest(factors.numpy(), "uniform", (low, high - low)).pvalue > 0.001
    places = draws(10_000).rand(4, dtype=torch.float64).argsort(0)
    found = torch.unique(places, dim=1, return_counts=True)[1]
    assert len(found) == 24
    assert ((found - 10_000 / 24) ** 2 / (10_000 / 24)).sum() < chi2.ppf(0.999, 23)


@pytest.mark.parametrize("turn", [0.0, 0.13, -0.5])
def test_hue_gives_pillows_bytes_for_every_fifth_colour(turn):
    levels = torch.tensor([*range(0, 255, 5), 255], dtype=torch.uint8)
    image = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).view(3, len(levels), -1)
    result = hue(image[None], torch.tensor([turn], dtype=torch.float64))[0]
    assert torch.equal(result, from_pillow(F_pillow.adjust_hue(to_pillow(image), turn)))


def test_augment_with_everything_off_is_the_identity():
    images = varied(10)
    chunk = draws(10)
    assert torch.equal(augment(images, **OFF, draws=chunk), images)
    assert torch.equal(chunk.generator.get_state(), draws(10).generator.get_state())


def test_augment_steps_come_in_the_documented_order(monkeypatch):
    calls = []
    for name in ("crop", "_flip", "_color_jitter", "rotate", "_cutout"):
        step = lambda images, name=name, **given: calls.append((name, given)) or images  # noqa: E731
        monkeypatch.setattr(subject, name, step)
    step = lambda images, draws: calls.append(("policy", {"draws": draws})) or images  # noqa: E731
    monkeypatch.setitem(subject.policies.POLICIES, "randaugment", step)
    chunk = draws(2)
    augment(varied(2), **(ALL | {"policy": "randaugment"}), draws=chunk)
    assert calls == [
        ("crop", {"padding": 4, "draws": chunk}),
        ("_flip", {"draws": chunk}),
        ("policy", {"draws": chunk}),
        ("_color_jitter", {"strengths": [0.4, 0.4, 0.4, 0.1], "draws": chunk}),
        ("rotate", {"degrees": 15, "draws": chunk}),
        ("_cutout", {"length": 16, "draws": chunk}),
    ]


STEPS = [
    {"crop_padding": 4},
    {"flip": True},
    {"rotation": 15},
    {"policy": "autoaugment_cifar10"},
    {"policy": "randaugment"},
    {"policy": "trivialaugment"},
    {"color_jitter": [0.4, 0.4, 0.4, 0.1]},
    {"cutout": 16},
]


@pytest.mark.parametrize("on", STEPS)
def test_augment_follows_the_generator_and_spares_its_input(on):
    images = varied(64)
    before = images.clone()
    first = augment(images, **(OFF | on), draws=draws(64, seed=5))
    assert torch.equal(first, augment(images, **(OFF | on), draws=draws(64, seed=5)))
    assert not torch.equal(first, augment(images, **(OFF | on), draws=draws(64, seed=6)))
    assert first.dtype == torch.uint8
    assert torch.equal(images, before)


@pytest.mark.parametrize("rows", [[], [63], list(range(1, 64, 2)), [40, 3, 17]])
@pytest.mark.parametrize("on", [*STEPS, ALL | {"policy": "trivialaugment"}])
def test_rows_of_a_chunk_are_augmented_as_in_the_whole_chunk(on, rows):
    images = varied(64, 12, 20)
    whole = augment(images, **(OFF | on), draws=draws(64))
    assert torch.equal(augment(images[rows], **(OFF | on), draws=draws(64, rows=rows)), whole[rows])


@pytest.mark.parametrize("channels", [1, 2])
def test_images_without_colour_have_their_steps_too(channels):
    images = varied(20, 9, 14, channels)
    on = ALL | {"policy": "none", "color_jitter": [0] * 4, "cutout": 4}
    result = augment(images, **on, draws=draws(20))
    assert result.shape == images.shape
    with pytest.raises(ValueError, match=f"color_jitter needs 3 channels, the images have {channels}"):
        augment(images, **ALL, policy="none", draws=draws(20))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", POLICIES)
def test_augment_gives_the_same_bytes_on_a_gpu(policy):
    images = varied(2000)
    there = augment(images.cuda(), **ALL, policy=policy, draws=draws(2000))
    assert torch.equal(there.cpu(), augment(images, **ALL, policy=policy, draws=draws(2000)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"policy": "augmix"},
            "'augmix' is none of none, autoaugment_cifar10, randaugment, trivialaugment",
        ),
        ({"cutout": -1}, "cutout is -1"),
        ({"crop_padding": -2}, "crop_padding is -2"),
        ({"rotation": -15}, "rotation is -15"),
        ({"rotation": 181}, r"rotation is 181 degrees, not in 0\.\.180"),
        ({"color_jitter": [0.4, 0.4, 0.4]}, "not four strengths: brightness, contrast, saturation, hue"),
        ({"color_jitter": [0.4, -0.1, 0.4, 0.1]}, r"color_jitter: contrast is -0\.1, below 0"),
        ({"color_jitter": [0.4, 0.4, 0.4, 0.6]}, r"hue is 0\.6 turns, not in 0\.\.0\.5"),
    ],
)
def test_augment_refuses_what_it_does_not_know(wrong, message):
    with pytest.raises(ValueError, match=message):
        augment(varied(2), **(OFF | wrong), draws=draws(2))
