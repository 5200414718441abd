"""Operations on whole uint8 batches, with a magnitude for each image; Pillow's bytes.

Every operation takes images (B, 3, H, W) uint8 on any device and magnitudes (B,) float64 on the same
one, and returns new images of the same shape; B may be 0. Geometry counts in Pillow's fixed point,
blending in its float32. torchvision's own batch operations take one magnitude for the whole batch.
"""

import math

import torch
from torch import Tensor

GREY = 128  # what AutoAugment shows where a moved image has no pixel
FIXED_POINT = 1 << 16  # Pillow's nearest-neighbour transforms count in 1/65536 of a pixel

# --- values


def identity(images: Tensor, magnitudes: Tensor) -> Tensor:
    """The images themselves; the magnitudes have no meaning."""
    return images


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


def hue(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Move every pixel on by `magnitudes` turns of Pillow's colour wheel, -0.5..0.5.

    As Pillow's HSV has 8 bits a channel, a magnitude of 0 does not give the images' own bytes.
    """
    # rounded to float32 where Pillow rounds: one hue in some hundred would be a step off otherwise
    rgb = images.float()
    brightest = rgb.amax(1)
    span = brightest - rgb.amin(1)
    red, green, blue = ((brightest[:, None] - rgb) / span.clamp(min=1)[:, None]).double().unbind(1)
    sector = torch.where(rgb[:, 1] == brightest, 2 + red - blue, 4 + green - red)
    sector = torch.where(rgb[:, 0] == brightest, blue - green, sector).float().double()
    position = ((sector / 6 + 1) % 1).float().double().mul_(255).long()
    saturation = (span / brightest.clamp(min=1)).double().mul_(255).long().float().div_(255)
    # Pillow's wheel has 255 steps, but the sum overflows at 256, as it does in torchvision
    moved = (position.masked_fill_(span == 0, 0) + (magnitudes * 255).long()[:, None, None]).remainder_(256)
    wheel = torch.arange(256, device=images.device, dtype=torch.float64) * 6 / 255
    channels = []
    for start in (5, 3, 1):  # how much of its saturation a hue takes from red, green, blue: a trapezoid
        around = (wheel + start) % 6
        taken = torch.minimum(around, 4 - around).clamp_(0, 1)[moved]
        channels.append(taken.mul_(saturation).neg_().add_(1).mul_(brightest).add_(0.5).to(torch.uint8))
    return torch.stack(channels, 1)


# --- geometry, nearest pixel unless said otherwise


def rotate(images: Tensor, magnitudes: Tensor, *, fill: int = 0) -> Tensor:
    """Turn counter-clockwise about the middle by `magnitudes` degrees; `fill` outside.

    Sine and cosine are taken where the degrees lie, the rest is whole numbers: angles on the CPU
    choose the same pixels on every device.
    """
    height, width = images.shape[2:]
    radians = magnitudes.double() * (-math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    x0 = width / 2 + cos * (0.5 - width / 2) + sin * (0.5 - height / 2)
    y0 = height / 2 - sin * (0.5 - width / 2) + cos * (0.5 - height / 2)
    return _affine(images, (x0, cos, sin), (y0, -sin, cos), fill=fill)


def shear_x(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Show at (x, y) the pixel at x + magnitude * y, black outside."""
    half, one, zero = (torch.full_like(magnitudes, value) for value in (0.5, 1, 0))
    return _affine(images, (half + magnitudes / 2, one, magnitudes), (half, zero, one), fill=0)


def shear_y(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Show at (x, y) the pixel at y + magnitude * x, black outside."""
    half, one, zero = (torch.full_like(magnitudes, value) for value in (0.5, 1, 0))
    return _affine(images, (half, one, zero), (half + magnitudes / 2, magnitudes, one), fill=0)


def shear_y_bicubic(images: Tensor, magnitudes: Tensor) -> Tensor:
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


def translate_x(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Move to the right by `magnitudes` pixels, fractions cut, black outside."""
    height, width = images.shape[2:]
    column = torch.arange(width, device=images.device) - magnitudes.long()[:, None]
    row = torch.arange(height, device=images.device)[:, None]
    return _take(images, row, column[:, None, :], fill=0)


def translate_y(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Move down by `magnitudes` pixels, fractions cut, black outside."""
    height, width = images.shape[2:]
    row = torch.arange(height, device=images.device) - magnitudes.long()[:, None]
    column = torch.arange(width, device=images.device)
    return _take(images, row[:, :, None], column, fill=0)


def translate_x_by_fraction(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Show at x the pixel nearest to x + magnitude * W, grey outside."""
    height, width = images.shape[2:]
    row = torch.arange(height, device=images.device)[:, None]
    return _take(images, row, _shifted(width, magnitudes)[:, None, :], fill=GREY)


def translate_y_by_fraction(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Show at y the pixel nearest to y + magnitude * H, grey outside."""
    height, width = images.shape[2:]
    column = torch.arange(width, device=images.device)
    return _take(images, _shifted(height, magnitudes)[:, :, None], column, fill=GREY)


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


def _affine(images: Tensor, x: tuple[Tensor, Tensor, Tensor], y: tuple[Tensor, Tensor, Tensor], *, fill: int) -> Tensor:
    """Show everywhere the pixel at (x, y), in pixels from the upper left corner.

    Each of the two is (its value at the first pixel, its step to the right, its step down), all (B,).
    """
    height, width = images.shape[2:]
    across = torch.arange(width, device=images.device)
    down = torch.arange(height, device=images.device)[:, None]

    def source(terms: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        fixed = (torch.stack(terms) * FIXED_POINT + 0.5).floor().long()
        first, right, below = fixed.to(images.device)[:, :, None, None]
        place: Tensor = (first + across * right + down * below) >> 16
        return place

    return _take(images, source(y), source(x), fill=fill)


def _take(images: Tensor, row: Tensor, column: Tensor, *, fill: int) -> Tensor:
    """images[b, :, row[b, y, x], column[b, y, x]] at every (y, x); `fill` where that is outside.

    `row` and `column` may be anything that broadcasts to (B, H, W).
    """
    height, width = images.shape[2:]
    outside = (row < 0) | (row >= height) | (column < 0) | (column >= width)
    source = (row * width + column).masked_fill_(outside, 0).flatten(1)[:, None]
    taken = images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1))
    return taken.view_as(images).masked_fill_(outside[:, None], fill)


def _shifted(size: int, fractions: Tensor) -> Tensor:
    """Whole coordinates (B, size) that lie `fractions` of the size further on, inside or not."""
    centre = torch.arange(size, device=fractions.device, dtype=torch.float64) + 0.5
    return (centre + (fractions * size)[:, None]).floor().long()
