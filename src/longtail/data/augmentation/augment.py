"""Augmentation of whole uint8 batches: crop, flip, policy, colour jitter, rotation, cutout.

Every function takes images (B, channels, H, W) uint8 on any device and returns new ones of the same
shape; B may be 0. What is random comes from the `Draws` of the images' chunk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longtail.data.augmentation import operations, policies
from longtail.data.draws import Draws

POLICIES = ("none", *policies.POLICIES)
JITTERED = {  # what colour jitter changes, in the order of its strengths
    "brightness": operations.brightness,
    "contrast": operations.contrast,
    "saturation": operations.color,
    "hue": operations.hue,
}


def crop(images: Tensor, *, padding: int, draws: Draws) -> Tensor:
    """Pad every side with `padding` zeros and cut a window of the old size at a random place."""
    offset = draws.randint(2 * padding + 1, 2).to(images.device)
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    # a view (B, channels, 2 padding + 1, 2 padding + 1, H, W)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, offset[0], offset[1]]


def flip(images: Tensor, *, draws: Draws) -> Tensor:
    """Mirror left and right, every image with probability 1/2."""
    flipped = draws.randint(2).bool().to(images.device)
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


def color_jitter(images: Tensor, *, strengths: Sequence[float], draws: Draws) -> Tensor:
    """Change brightness, contrast, saturation and hue by random factors, for each image in its own order.

    The factors are uniform in [max(0, 1 - strength), 1 + strength], the hue's turn in
    [-strength, strength] of the colour wheel; a strength of 0 leaves its change out. Bytes are
    those of torchvision's ColorJitter on Pillow's images for the same factors and order. Raises
    ValueError for images that have not three channels.
    """
    policies.need_colour("color_jitter", images)
    order = draws.rand(len(JITTERED), dtype=torch.float64).argsort(0)  # which comes first, second, ...
    unit = draws.rand(len(JITTERED), dtype=torch.float64)
    strength = torch.tensor(strengths, dtype=torch.float64)
    low, high = (1 - strength).clamp(min=0), 1 + strength
    low[-1], high[-1] = -strength[-1], strength[-1]
    factors = low[:, None] + unit * (high - low)[:, None]
    for chosen in order:
        used = chosen.where(strength[chosen] > 0, policies.NOTHING)
        images = policies.apply_each(images, JITTERED, used, factors.gather(0, chosen[None])[0])
    return images


def rotate(images: Tensor, *, degrees: float, draws: Draws) -> Tensor:
    """Turn by an angle uniform in [-degrees, degrees], nearest pixel, black outside."""
    unit = draws.rand(dtype=torch.float64)
    return operations.rotate(images, (2 * unit - 1) * degrees)


def cutout(images: Tensor, *, length: int, draws: Draws) -> Tensor:
    """Blacken a square of side `length` (DeVries & Taylor 2017).

    Its centre is uniform over the image, so that the border cuts a part of it off where it is near.
    """
    height, width = images.shape[2:]
    top = draws.randint(height)[:, None] - length // 2
    left = draws.randint(width)[:, None] - length // 2
    row, column = torch.arange(height), torch.arange(width)
    rows = ((row >= top) & (row < top + length)).to(images.device)
    columns = ((column >= left) & (column < left + length)).to(images.device)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


_flip, _cutout, _color_jitter = flip, cutout, color_jitter  # augment's parameters carry these names


def augment(
    images: Tensor,
    *,
    crop_padding: int,
    flip: bool,
    policy: str,
    color_jitter: Sequence[float],
    rotation: float,
    cutout: int,
    draws: Draws,
) -> Tensor:
    """Crop, flip, policy, colour jitter, rotation, cutout, in this order; 0, False and "none" leave a step out.

    `crop_padding` and `cutout` (the square's side) are pixels, `rotation` degrees to either side, `color_jitter`
    the strengths of brightness, contrast, saturation and hue. `images` are the rows of the chunk that `draws` are
    for. Raises ValueError as `check` does, and for a policy or colour jitter of images that have not three channels.
    """
    check(
        crop_padding=crop_padding, flip=flip, policy=policy, color_jitter=color_jitter, rotation=rotation, cutout=cutout
    )
    if crop_padding:
        images = crop(images, padding=crop_padding, draws=draws)
    if flip:
        images = _flip(images, draws=draws)
    if policy != "none":
        images = policies.POLICIES[policy](images, draws)
    if any(color_jitter):
        images = _color_jitter(images, strengths=color_jitter, draws=draws)
    if rotation:
        images = rotate(images, degrees=rotation, draws=draws)
    if cutout:
        images = _cutout(images, length=cutout, draws=draws)
    return images


def check(
    *, crop_padding: int, flip: bool, policy: str, color_jitter: Sequence[float], rotation: float, cutout: int
) -> None:
    """Raise ValueError, naming the key, for a setting of `augment` that is out of range."""
    if policy not in POLICIES:
        raise ValueError(f"augmentation policy {policy!r} is none of {', '.join(POLICIES)}")
    for name, value in (("crop_padding", crop_padding), ("rotation", rotation), ("cutout", cutout)):
        if value < 0:
            raise ValueError(f"augmentation {name} is {value}, below 0")
    if rotation > 180:
        raise ValueError(f"augmentation rotation is {rotation} degrees, not in 0..180")
    if len(color_jitter) != len(JITTERED):
        raise ValueError(
            f"augmentation color_jitter is {list(color_jitter)}, not four strengths: {', '.join(JITTERED)}"
        )
    for name, strength in zip(JITTERED, color_jitter, strict=True):
        if strength < 0:
            raise ValueError(f"augmentation color_jitter: {name} is {strength}, below 0")
    if color_jitter[-1] > 0.5:
        raise ValueError(f"augmentation color_jitter: hue is {color_jitter[-1]} turns, not in 0..0.5")
