"""Policies: which operation of `operations` every image gets, and how strongly.

A policy takes images (B, 3, H, W) uint8 and the `Draws` of their chunk and returns new images of the
same shape. AutoAugment is as the released long-tail recipes apply it; RandAugment and
TrivialAugment are as torchvision applies them to Pillow's images, byte for byte.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from longtail.data.augmentation import operations as op
from longtail.data.draws import Draws

Operation = Callable[[Tensor, Tensor], Tensor]

ENHANCEMENTS: dict[str, Operation] = {
    "brightness": op.brightness,
    "color": op.color,
    "contrast": op.contrast,
    "sharpness": op.sharpness,
}

# --- AutoAugment

AUTOAUGMENT: dict[str, Operation] = {
    **ENHANCEMENTS,
    "autocontrast": op.autocontrast,
    "equalize": op.equalize,
    "invert": op.invert,
    "posterize": op.posterize,
    "rotate": partial(op.rotate, fill=op.GREY),
    "shear_y": op.shear_y_bicubic,
    "solarize": op.solarize,
    "translate_x": op.translate_x_by_fraction,
    "translate_y": op.translate_y_by_fraction,
}

# The 25 sub-policies found on CIFAR-10 (Cubuk et al. 2019, "AutoAugment", appendix), each two
# operations with (name, probability, level). As in the code that the long-tail recipes share,
# `rotate` has no random sign.
SUB_POLICIES = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
)

# Magnitude at level 0 and at level 9, linear between: a slope for the shear, a fraction of the side
# for translations, degrees, bits kept, the first inverted value, and the distance of an
# enhancement's factor from 1.
LEVELS = {
    "shear_y": (0.0, 0.3),
    "translate_x": (0.0, 150 / 331),
    "translate_y": (0.0, 150 / 331),
    "rotate": (0.0, 30.0),
    "posterize": (8.0, 4.0),
    "solarize": (256.0, 0.0),
    "color": (0.0, 0.9),
    "contrast": (0.0, 0.9),
    "sharpness": (0.0, 0.9),
    "brightness": (0.0, 0.9),
}
SIGNED = ("shear_y", "translate_x", "translate_y", "color", "contrast", "sharpness", "brightness")


def magnitude(operation: str, level: int, sign: int) -> float:
    """What `operation` takes at `level` 0..9; `sign` is -1 or 1 and matters to `SIGNED` alone."""
    first, last = LEVELS.get(operation, (0.0, 0.0))
    value = level * ((last - first) / 9) + first
    if operation == "posterize":
        value = float(round(value))
    if operation in SIGNED:
        value *= sign
    return 1 + value if operation in ENHANCEMENTS else value


class SubPolicyDraws(NamedTuple):
    """What AutoAugment needs at random for B images."""

    sub_policy: Tensor  # (B,) int64, 0..24
    applied: Tensor  # (2, B) bool, whether the first and the second operation happen
    positive: Tensor  # (2, B) bool, the signs of their magnitudes


def draw_sub_policies(draws: Draws) -> SubPolicyDraws:
    """One of the 25 sub-policies for each image, and what happens in it."""
    sub_policy = draws.randint(len(SUB_POLICIES))
    probability = torch.tensor([[one[1] for one in pair] for pair in SUB_POLICIES]).T[:, sub_policy]
    applied = draws.rand(2) < probability
    return SubPolicyDraws(sub_policy, applied, draws.randint(2, 2).bool())


def autoaugment_cifar10(images: Tensor, draws: Draws) -> Tensor:
    """AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019): one of 25 sub-policies for each image.

    Raises ValueError for images that have not three channels.
    """
    need_colour("autoaugment_cifar10", images)
    sub_policy, applied, positive = draw_sub_policies(draws)
    for position in range(2):
        pairs = [pair[position] for pair in SUB_POLICIES]
        values = [[magnitude(name, level, sign) for name, _, level in pairs] for sign in (-1, 1)]
        magnitudes = torch.tensor(values, dtype=torch.float64)[positive[position].long(), sub_policy]
        chosen = torch.tensor([list(AUTOAUGMENT).index(name) for name, _, _ in pairs])[sub_policy]
        images = apply_each(images, AUTOAUGMENT, chosen.where(applied[position], NOTHING), magnitudes)
    return images


# --- RandAugment and TrivialAugment

SPACE: dict[str, Operation] = {
    "identity": op.identity,
    "shear_x": op.shear_x,
    "shear_y": op.shear_y,
    "translate_x": op.translate_x,
    "translate_y": op.translate_y,
    "rotate": op.rotate,
    **ENHANCEMENTS,
    "posterize": op.posterize,
    "solarize": op.solarize,
    "autocontrast": op.autocontrast,
    "equalize": op.equalize,
}
BINS = 31  # magnitudes of an operation, from the weakest to the strongest
RANDAUGMENT_OPERATIONS, RANDAUGMENT_BIN = 2, 9  # torchvision's defaults


def magnitude_space(
    *, slope: float, right: float, down: float, degrees: float, enhancement: float, bits: int
) -> Tensor:
    """What every operation of `SPACE` takes: (2, 14, BINS) float64, the first for a negative sign.

    The arguments are the strongest magnitudes: the slope of a shear, pixels of the translations,
    degrees, the distance of an enhancement's factor from 1, and the bits that posterize takes away.
    In between torchvision's float32 steps, since cut fractions depend on the last digit.
    """

    def steps(first: float, last: float) -> Tensor:
        return torch.linspace(first, last, BINS).double()

    nothing = torch.zeros(BINS, dtype=torch.float64)
    signed = dict.fromkeys(("shear_x", "shear_y"), steps(0, slope))
    signed |= {"translate_x": steps(0, right), "translate_y": steps(0, down), "rotate": steps(0, degrees)}
    unsigned = {
        "posterize": 8 - (torch.arange(BINS) / ((BINS - 1) / bits)).round().double(),
        "solarize": steps(255, 0),
    }

    def row(name: str, sign: int) -> Tensor:
        if name in ENHANCEMENTS:
            return 1 + sign * steps(0, enhancement)
        return sign * signed[name] if name in signed else unsigned.get(name, nothing)

    return torch.stack([torch.stack([row(name, sign) for name in SPACE]) for sign in (-1, 1)])


def randaugment_space(height: int, width: int) -> Tensor:
    """`magnitude_space` of RandAugment for images of this size."""
    side = 150 / 331
    return magnitude_space(slope=0.3, right=side * width, down=side * height, degrees=30, enhancement=0.9, bits=4)


def trivialaugment_space() -> Tensor:
    """`magnitude_space` of TrivialAugment's wide space."""
    return magnitude_space(slope=0.99, right=32, down=32, degrees=135, enhancement=0.99, bits=6)


def randaugment(images: Tensor, draws: Draws) -> Tensor:
    """RandAugment (Cubuk et al. 2020): two of 14 operations for each image, at magnitude 9 of 0..30.

    Both are drawn with replacement, identity among them; signs are drawn. Raises ValueError for
    images that have not three channels.
    """
    need_colour("randaugment", images)
    space = randaugment_space(*images.shape[2:])
    chosen = draws.randint(len(SPACE), RANDAUGMENT_OPERATIONS)
    positive = draws.randint(2, RANDAUGMENT_OPERATIONS)
    for number, sign in zip(chosen, positive, strict=True):
        images = apply_each(images, SPACE, number, space[sign, number, RANDAUGMENT_BIN])
    return images


def trivialaugment(images: Tensor, draws: Draws) -> Tensor:
    """TrivialAugment, wide (Müller & Hutter 2021): one of 14 operations at one of 31 magnitudes.

    The operation, identity among them, its magnitude and its sign are uniform for each image. Raises
    ValueError for images that have not three channels.
    """
    need_colour("trivialaugment", images)
    chosen, strength, positive = draws.randint(len(SPACE)), draws.randint(BINS), draws.randint(2)
    return apply_each(images, SPACE, chosen, trivialaugment_space()[positive, chosen, strength])


POLICIES: dict[str, Callable[[Tensor, Draws], Tensor]] = {
    "autoaugment_cifar10": autoaugment_cifar10,
    "randaugment": randaugment,
    "trivialaugment": trivialaugment,
}

# --- shared parts

NOTHING = -1  # an image that no operation is applied to


def apply_each(images: Tensor, operations: Mapping[str, Operation], chosen: Tensor, magnitudes: Tensor) -> Tensor:
    """Apply to every image the operation of its number, in the order of `operations`, or `NOTHING`.

    `chosen` (B,) int64 and `magnitudes` (B,) float64 lie on the CPU. An operation is called once
    for all its images, and not at all where it has none.
    """
    result = images.clone()
    for number, operation in enumerate(operations.values()):
        index = (chosen == number).nonzero()[:, 0]
        if len(index):
            values, index = magnitudes[index].to(images.device), index.to(images.device)
            result.index_copy_(0, index, operation(images[index], values))
    return result


def need_colour(name: str, images: Tensor) -> None:
    """Raise ValueError for images that have not three channels."""
    if images.shape[1] != 3:
        raise ValueError(f"{name} needs 3 channels, the images have {images.shape[1]}")
