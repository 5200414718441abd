"""Augmentation of whole uint8 batches: crop, flip, AutoAugment, rotation, cutout.

Every function takes images (B, channels, H, W) uint8 on any device and returns new ones of the same
shape. What is random is drawn on the CPU from the `generator` given, so that the same draws reach
every device. The operations give Pillow's bytes, because the released long-tail recipes augment
with Pillow: geometry counts in Pillow's fixed point, blending in its float32; one call serves a
batch with a magnitude for each image.

The file is long because the policy is: 13 operations and the table that chooses among them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

POLICIES = ("none", "autoaugment_cifar10")
GREY = 128  # what AutoAugment shows where a moved image has no pixel
FIXED_POINT = 1 << 16  # Pillow's nearest-neighbour transforms count in 1/65536 of a pixel

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
ENHANCEMENTS = ("color", "contrast", "sharpness", "brightness")


def magnitude(operation: str, level: int, sign: int) -> float:
    """What `operation` takes at `level` 0..9; `sign` is -1 or 1 and matters to `SIGNED` alone."""
    first, last = LEVELS.get(operation, (0.0, 0.0))
    value = level * ((last - first) / 9) + first
    if operation == "posterize":
        value = float(round(value))
    if operation in SIGNED:
        value *= sign
    return 1 + value if operation in ENHANCEMENTS else value


# --- the operations of the policy: images uint8 and magnitudes (B,) float64 -> images


def invert(images: Tensor, magnitudes: Tensor) -> Tensor:
    """255 - x; the magnitudes have no meaning."""
    return 255 - images


def posterize(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Keep the `magnitudes` highest bits of every value."""
    kept = 256 - torch.pow(2.0, 8 - magnitudes)
    return images & _each(kept.to(torch.uint8))


def solarize(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Invert the values that are not below the threshold."""
    return torch.where(images < _each(magnitudes.float()), images, 255 - images)


def brightness(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Blend with black; a factor of 1 changes nothing."""
    return _blend(torch.zeros_like(images[:, :1, :1, :1]), images, magnitudes)


def color(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Blend with the image's own grey; a factor of 1 changes nothing."""
    return _blend(_luma(images), images, magnitudes)


def contrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Blend with the rounded mean of the image's grey; a factor of 1 changes nothing."""
    pixels = images.shape[2] * images.shape[3]
    total = _luma(images).sum((1, 2, 3), keepdim=True)
    return _blend((2 * total + pixels) // (2 * pixels), images, magnitudes)


def sharpness(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Blend with the image smoothed: 3x3 means, the centre counted five times; the rim stays."""
    values = images.to(torch.int16)
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    window = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * values[:, :, 1:-1, 1:-1]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = ((window.float() + 6.5) / 13).to(torch.uint8)
    return _blend(smooth, images, magnitudes)


def autocontrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Stretch every channel to 0..255; the magnitudes have no meaning."""
    low, high = (bound.double() for bound in torch.aminmax(images.flatten(2), dim=2, keepdim=True))
    flat = high == low
    # not 255 / span: torch makes that a reciprocal and a product, which at times is one value off
    scale = torch.where(flat, 1.0, torch.full_like(low, 255).div_(high - low))
    offset = torch.where(flat, 0.0, -low * scale)
    stretched = images.flatten(2).double().mul_(scale).add_(offset)
    return stretched.clamp_(0, 255).to(torch.uint8).view_as(images)


def equalize(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Even out every channel's histogram; the magnitudes have no meaning."""
    values = images.flatten(2).flatten(0, 1).long()  # one row for each channel of each image
    row = torch.arange(len(values), device=images.device)[:, None]
    histogram = torch.bincount((values + 256 * row).flatten(), minlength=256 * len(values))
    histogram = histogram.view(-1, 256)
    brightest = histogram.gather(1, values.amax(1, keepdim=True))
    step = (values.shape[1] - brightest) // 255
    below = histogram.cumsum(1) - histogram
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table)
    return table.to(torch.uint8).gather(1, values).view_as(images)


def translate_x(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Show at x the pixel nearest to x + magnitude * W, grey outside."""
    height, width = images.shape[2:]
    column = _shifted(width, magnitudes)[:, None, :].expand(-1, height, -1)
    row = torch.arange(height, device=images.device)[:, None].expand_as(column)
    return _take(images, row, column, fill=GREY)


def translate_y(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Show at y the pixel nearest to y + magnitude * H, grey outside."""
    height, width = images.shape[2:]
    row = _shifted(height, magnitudes)[:, :, None].expand(-1, -1, width)
    column = torch.arange(width, device=images.device).expand_as(row)
    return _take(images, row, column, fill=GREY)


def shear_y(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Show at (x, y) the bicubic value of column x at height y + magnitude * x, grey outside."""
    height, width = images.shape[2:]
    centre_x = torch.arange(width, device=images.device) + 0.5
    centre_y = torch.arange(height, device=images.device)[:, None] + 0.5
    source = magnitudes[:, None, None] * centre_x + centre_y
    outside = (source < 0) | (source >= height)
    source = source - 0.5
    first = source.floor()
    part = (source - first)[:, None]
    rows = [(first.long() + tap).clamp(0, height - 1)[:, None] for tap in (-1, 0, 1, 2)]
    v = [images.gather(2, row.expand_as(images)).double() for row in rows]
    # Keys' cubic convolution with a = -1, in the order in which Pillow multiplies
    cubic = 2 * (v[0] - v[1]) + v[2] - v[3], -v[0] + v[1] - v[2] + v[3]
    value = v[1] + part * (-v[0] + v[2] + part * (cubic[0] + part * cubic[1]))
    return value.clamp_(0, 255).to(torch.uint8).masked_fill_(outside[:, None], GREY)


def turn(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Turn counter-clockwise by `magnitudes` degrees, nearest pixel, grey outside."""
    return _turned(images, magnitudes, fill=GREY)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": autocontrast,
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "equalize": equalize,
    "invert": invert,
    "posterize": posterize,
    "rotate": turn,
    "sharpness": sharpness,
    "shear_y": shear_y,
    "solarize": solarize,
    "translate_x": translate_x,
    "translate_y": translate_y,
}


# --- the policy


class Draws(NamedTuple):
    """What the policy needs at random for B images."""

    sub_policy: Tensor  # (B,) int64, 0..24
    applied: Tensor  # (2, B) bool, whether the first and the second operation happen
    positive: Tensor  # (2, B) bool, the signs of their magnitudes


def draw_policy(count: int, *, generator: torch.Generator) -> Draws:
    """One of the 25 sub-policies for each of `count` images, and what happens in it."""
    sub_policy = torch.randint(len(SUB_POLICIES), (count,), generator=generator)
    probability = torch.tensor([[op[1] for op in pair] for pair in SUB_POLICIES]).T[:, sub_policy]
    applied = torch.rand(2, count, generator=generator) < probability
    positive = torch.randint(2, (2, count), generator=generator).bool()
    return Draws(sub_policy, applied, positive)


def apply_policy(images: Tensor, draws: Draws) -> Tensor:
    """Apply the two operations of every image's sub-policy, as drawn.

    Raises ValueError for images that have not three channels.
    """
    if images.shape[1] != 3:
        raise ValueError(f"autoaugment_cifar10 needs 3 channels, the images have {images.shape[1]}")
    images = images.clone()
    for position in range(2):
        pairs = [pair[position] for pair in SUB_POLICIES]
        magnitudes = torch.tensor(
            [[magnitude(name, level, sign) for name, _, level in pairs] for sign in (-1, 1)],
            dtype=torch.float64,
        )[draws.positive[position].long(), draws.sub_policy]
        for name in sorted({pair[0] for pair in pairs}):
            chosen = torch.tensor([pair[0] == name for pair in pairs])[draws.sub_policy]
            index = (chosen & draws.applied[position]).nonzero()[:, 0]
            if not len(index):
                continue
            values = magnitudes[index].to(images.device)
            index = index.to(images.device)
            images.index_copy_(0, index, OPERATIONS[name](images[index], values))
    return images


def autoaugment_cifar10(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019): one of 25 sub-policies for each image.

    Raises ValueError for images that have not three channels.
    """
    return apply_policy(images, draw_policy(len(images), generator=generator))


# --- the other steps


def crop(images: Tensor, *, padding: int, generator: torch.Generator) -> Tensor:
    """Pad every side with `padding` zeros and cut a window of the old size at a random place."""
    offset = torch.randint(2 * padding + 1, (2, len(images)), generator=generator).to(images.device)
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    # a view (B, channels, 2 padding + 1, 2 padding + 1, H, W)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, offset[0], offset[1]]


def flip(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Mirror left and right, every image with probability 1/2."""
    flipped = torch.randint(2, (len(images),), generator=generator).bool().to(images.device)
    return torch.where(_each(flipped), images.flip(3), images)


def rotate(images: Tensor, *, degrees: float, generator: torch.Generator) -> Tensor:
    """Turn by an angle uniform in [-degrees, degrees], nearest pixel, black outside.

    Raises ValueError when `degrees` is not in 0..180.
    """
    if not 0 <= degrees <= 180:
        raise ValueError(f"rotation is {degrees} degrees, not in 0..180")
    unit = torch.rand(len(images), generator=generator, dtype=torch.float64)
    return _turned(images, (2 * unit - 1) * degrees, fill=0)


def cutout(images: Tensor, *, length: int, generator: torch.Generator) -> Tensor:
    """Blacken a square of side `length` (DeVries & Taylor 2017).

    Its centre is uniform over the image, so that the border cuts a part of it off where it is near.
    """
    height, width = images.shape[2:]
    top = torch.randint(height, (len(images), 1), generator=generator) - length // 2
    left = torch.randint(width, (len(images), 1), generator=generator) - length // 2
    row, column = torch.arange(height), torch.arange(width)
    rows = ((row >= top) & (row < top + length)).to(images.device)
    columns = ((column >= left) & (column < left + length)).to(images.device)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


_flip, _cutout = flip, cutout  # augment's parameters carry these names


def augment(
    images: Tensor,
    *,
    crop_padding: int,
    flip: bool,
    rotation: float,
    policy: str,
    cutout: int,
    generator: torch.Generator,
) -> Tensor:
    """Crop, flip, policy, rotation, cutout, in this order; 0, False and "none" leave a step out.

    `crop_padding` and `cutout` (the square's side) are pixels, `rotation` degrees to either side.
    Raises ValueError for an unknown policy or a negative number, and what the steps raise.
    """
    if policy not in POLICIES:
        raise ValueError(f"augmentation policy {policy!r} is none of {', '.join(POLICIES)}")
    for name, value in (("crop_padding", crop_padding), ("rotation", rotation), ("cutout", cutout)):
        if value < 0:
            raise ValueError(f"augmentation {name} is {value}, below 0")
    if crop_padding:
        images = crop(images, padding=crop_padding, generator=generator)
    if flip:
        images = _flip(images, generator=generator)
    if policy == "autoaugment_cifar10":
        images = autoaugment_cifar10(images, generator=generator)
    if rotation:
        images = rotate(images, degrees=rotation, generator=generator)
    if cutout:
        images = _cutout(images, length=cutout, generator=generator)
    return images


# --- shared parts


def _each(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), one value for each image."""
    return values[:, None, None, None]


def _luma(images: Tensor) -> Tensor:
    """Pillow's grey of RGB images: (B, 3, H, W) uint8 -> (B, 1, H, W) int32 in 0..255."""
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[:, None]  # ITU-R 601


def _blend(degenerate: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """degenerate + factor * (image - degenerate) in float32, clipped to 0..255, fractions cut."""
    base = degenerate.float()
    blended = (images.float() - base).mul_(_each(factors.float())).add_(base)
    return blended.clamp_(0, 255).to(torch.uint8)


def _take(images: Tensor, row: Tensor, column: Tensor, *, fill: int) -> Tensor:
    """images[b, :, row[b, y, x], column[b, y, x]] at every (y, x); `fill` where that is outside."""
    height, width = images.shape[2:]
    outside = (row < 0) | (row >= height) | (column < 0) | (column >= width)
    source = (row * width + column).masked_fill_(outside, 0).flatten(1)[:, None]
    taken = images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1))
    return taken.view_as(images).masked_fill_(outside[:, None], fill)


def _shifted(size: int, fractions: Tensor) -> Tensor:
    """Whole coordinates (B, size) that lie `fractions` of the size further on, inside or not."""
    centre = torch.arange(size, device=fractions.device, dtype=torch.float64) + 0.5
    return (centre + (fractions * size)[:, None]).floor().long()


def _turned(images: Tensor, degrees: Tensor, *, fill: int) -> Tensor:
    """Turn every image counter-clockwise about its middle, to Pillow's nearest pixel.

    Sine and cosine are taken where `degrees` (B,) lies, the rest is whole numbers: angles on the
    CPU choose the same pixels on every device.
    """
    height, width = images.shape[2:]
    radians = degrees.double() * (-math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    x0 = width / 2 + cos * (0.5 - width / 2) + sin * (0.5 - height / 2)
    y0 = height / 2 - sin * (0.5 - width / 2) + cos * (0.5 - height / 2)
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]

    def along(start: Tensor, step_x: Tensor, step_y: Tensor) -> Tensor:
        terms = (torch.stack((start, step_x, step_y)) * FIXED_POINT + 0.5).floor().long()
        first, dx, dy = terms.to(images.device)[:, :, None, None]
        source: Tensor = (first + x * dx + y * dy) >> 16
        return source

    return _take(images, along(y0, -sin, cos), along(x0, cos, sin), fill=fill)
