"""Image files to squares of uint8 as the large data sets are used: the middle of an image, or a random part of it.

A plain JPEG, RGB or grey, is decoded by libjpeg through torchvision and scaled by PyTorch, which takes half of Pillow's
time; where it is at least twice as large as needed, libjpeg decodes it at a half, a quarter or an eighth (`draft`).
Everything else goes the way of one's own images (longtail.data.decode), by content: PNG under the name of JPEG, CMYK,
palette, 16 bit.
"""

import io
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from longtail.data import decode
from longtail.data.decode import MAX_PIXELS, ORIENTATION, BrokenError

CHANNELS = 3
TRIES = 10  # boxes that are drawn before the largest one in the middle is taken, as torchvision does
QUALITY = 95  # of JPEGs that are made smaller

Least = Callable[[int, int], tuple[int, int]]  # of a width and height: those below which an image is too small


class Square(NamedTuple):
    """How a file becomes a square: side, share of the shorter side that it shows, EXIF's turn, libjpeg's scaling."""

    side: int
    share: float
    exif_orientation: bool
    draft: bool


class Window(NamedTuple):
    """How a random part of a file becomes a square: its side, what part of the image's area, width over height."""

    side: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    exif_orientation: bool
    draft: bool


class Smaller(NamedTuple):
    """How a file becomes a smaller one: its shorter side; EXIF's turn and libjpeg's scaling."""

    shorter: int
    exif_orientation: bool
    draft: bool


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def square(data: bytes, how: Square) -> tuple[Tensor, str]:
    """The pixels (3, side, side) uint8 of a file's bytes, and what it is: `JPEG RGB`, `PNG P`, `JPEG RGB turned`.

    Bicubic, antialiased. Raises BrokenError for what is no image, truncated or damaged, above MAX_PIXELS, or of
    floating-point numbers.
    """

    def least(width: int, height: int) -> tuple[int, int]:
        scale = how.side / (how.share * min(width, height))
        return math.ceil(width * scale), math.ceil(height * scale)

    pixels, kind = decoded(data, exif_orientation=how.exif_orientation, least=least if how.draft else None)
    return _scaled(pixels, middle(pixels.shape[1], pixels.shape[2], how.share), how.side, "bicubic"), kind


def window(data: bytes, how: Window, random: np.random.Generator) -> tuple[Tensor, str]:
    """The pixels (3, side, side) uint8 of a random part of an image: RandomResizedCrop (Szegedy et al., CVPR 2015).

    Bilinear, antialiased. What is drawn depends on the file's size alone, not on how it is decoded. Raises as `square`.
    """
    drawn: list[tuple[Box, int, int]] = []

    def least(width: int, height: int) -> tuple[int, int]:
        box = draw_box(random, height, width, scale=how.scale, ratio=how.ratio)
        drawn.append((box, height, width))
        shrink = how.side / min(box.height, box.width)
        return math.ceil(width * shrink), math.ceil(height * shrink)

    pixels, kind = decoded(data, exif_orientation=how.exif_orientation, least=least if how.draft else None)
    height, width = pixels.shape[1:]
    if not drawn:
        return _scaled(
            pixels, draw_box(random, height, width, scale=how.scale, ratio=how.ratio), how.side, "bilinear"
        ), kind
    box, whole_height, whole_width = drawn[0]
    rows, columns = height / whole_height, width / whole_width  # below one where libjpeg scaled
    top, left = min(round(box.top * rows), height - 1), min(round(box.left * columns), width - 1)
    bottom, right = round((box.top + box.height) * rows), round((box.left + box.width) * columns)
    part = Box(top, left, max(1, bottom - top), max(1, right - left))
    return _scaled(pixels, part, how.side, "bilinear"), kind


def smaller(data: bytes, how: Smaller) -> tuple[bytes, str]:
    """A JPEG of a file whose shorter side is `shorter`, bicubic; the file itself where it is a JPEG that is no larger.

    Raises as `square`.
    """

    own: list[int] = []

    def least(width: int, height: int) -> tuple[int, int]:
        own.append(min(width, height))
        scale = how.shorter / min(width, height)
        return math.ceil(width * scale), math.ceil(height * scale)

    pixels, kind = decoded(data, exif_orientation=how.exif_orientation, least=least if how.draft else None)
    height, width = pixels.shape[1:]
    if (own[0] if own else min(height, width)) <= how.shorter and kind in ("JPEG RGB", "JPEG L"):
        return data, kind
    scale = how.shorter / min(height, width)
    if scale < 1:
        size = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = _resized(pixels, size, "bicubic")
    made = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(made, "JPEG", quality=QUALITY, subsampling=0)
    return made.getvalue(), kind


def draw_box(
    random: np.random.Generator, height: int, width: int, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A random part of an image, as torchvision's RandomResizedCrop draws it.

    Its area is uniform in `scale` of the image's, the logarithm of width over height uniform in that of `ratio`; what
    does not fit is drawn again, TRIES times, and then it is the largest part in the middle whose ratio is allowed.
    """
    for _ in range(TRIES):
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w)
    whole = width / height
    w = width if whole <= ratio[1] else round(height * ratio[1])
    h = height if whole >= ratio[0] else round(width / ratio[0])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def middle(height: int, width: int, share: float) -> Box:
    """The square in the middle with this share of the shorter side."""
    side = max(1, round(min(height, width) * share))
    return Box((height - side) // 2, (width - side) // 2, side, side)


def decoded(data: bytes, *, exif_orientation: bool, least: Least | None) -> tuple[Tensor, str]:
    """All pixels (3, H, W) uint8 of a file's bytes, and what it is.

    Args:
        least: sizes down to which libjpeg may scale while it decodes, which is asked for plain JPEGs; None: it may not.

    Raises BrokenError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged EXIF, and of bombs, which are refused
        try:
            image = Image.open(io.BytesIO(data))
            turned = _turned(image)
            kind = f"{image.format} {image.mode}{' turned' if turned else ''}"
            if image.width * image.height > MAX_PIXELS:
                raise BrokenError(
                    f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}: a decompression bomb"
                )
            if image.format != "JPEG" or image.mode not in ("RGB", "L"):
                return _any(data, exif_orientation=exif_orientation), kind
            upright = turned and exif_orientation
            width, height = (0, 0) if least is None or upright else least(*image.size)
            if 0 < 2 * width <= image.width and 2 * height <= image.height:
                image.draft(None, (width, height))
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            else:
                pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except BrokenError:
            raise
        except Image.DecompressionBombError as error:
            raise BrokenError(f"more than {2 * MAX_PIXELS:,} pixels: a decompression bomb") from error
        except Exception as error:  # decoders of damaged files raise all there is
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BrokenError("no image, by its content" if "cannot identify" in said else said) from error
    if upright:
        pixels = torch.from_numpy(np.array(ImageOps.exif_transpose(_with_exif(pixels, image)))).permute(2, 0, 1)
    return pixels, kind


def _turned(image: Image.Image) -> bool:
    """Whether EXIF says to turn it; without EXIF, which most have not, it costs nothing to ask."""
    return "exif" in image.info and image.getexif().get(ORIENTATION, 1) not in (0, 1)


def _with_exif(pixels: Tensor, image: Image.Image) -> Image.Image:
    plain = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    plain.info["exif"] = image.info["exif"]
    return plain


def _any(data: bytes, *, exif_orientation: bool) -> Tensor:
    """All pixels (3, H, W) of any file, by Pillow."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        turned = ImageOps.exif_transpose(image) if exif_orientation else image
        pixels = np.array(decode.eight_bit(turned, decode.MODES[CHANNELS], image.format))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _scaled(pixels: Tensor, box: Box, side: int, mode: str) -> Tensor:
    """A part of (3, H, W), scaled to (3, side, side)."""
    part = pixels[:, box.top : box.top + box.height, box.left : box.left + box.width]
    return _resized(part, (side, side), mode)


def _resized(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(3, H, W) uint8 to (3, *size), antialiased."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    given = pixels[None].contiguous(memory_format=torch.channels_last)  # which PyTorch scales faster
    found: Tensor = F.interpolate(given, size, mode=mode, antialias=True)[0]
    return found
