"""Image files to squares of uint8 as the large data sets are used: shorter side scaled, the middle cut out.

A plain JPEG, RGB or grey, is decoded by libjpeg through torchvision and scaled by PyTorch, which takes half of Pillow's
time; where it is at least twice as large as needed, libjpeg decodes it at a half, a quarter or an eighth (`draft`).
Everything else goes the way of one's own images (longtail.data.decode), by content: PNG under the name of JPEG, CMYK,
palette, 16 bit.
"""

import io
import warnings
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


class Square(NamedTuple):
    """How a file becomes a square: side, share of the shorter side that it shows, EXIF's turn, libjpeg's scaling."""

    side: int
    share: float
    exif_orientation: bool
    draft: bool


def square(data: bytes, how: Square) -> tuple[Tensor, str]:
    """The pixels (3, side, side) uint8 of a file's bytes, and what it is: `JPEG RGB`, `PNG P`, `JPEG RGB turned`.

    Bicubic, antialiased. Raises BrokenError for what is no image, truncated or damaged, above MAX_PIXELS, or of
    floating-point numbers.
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
                return _scaled(_any(data, how), how), kind
            if how.draft and min(image.size) * how.share >= 2 * how.side:
                image.draft(None, _least(image.size, how))
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
    if turned and how.exif_orientation:
        upright = ImageOps.exif_transpose(_with_exif(pixels, image))
        pixels = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    return _scaled(pixels, how), kind


def _turned(image: Image.Image) -> bool:
    """Whether EXIF says to turn it; without EXIF, which most have not, it costs nothing to ask."""
    return "exif" in image.info and image.getexif().get(ORIENTATION, 1) not in (0, 1)


def _with_exif(pixels: Tensor, image: Image.Image) -> Image.Image:
    plain = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    plain.info["exif"] = image.info["exif"]
    return plain


def _any(data: bytes, how: Square) -> Tensor:
    """All pixels (3, H, W) of any file, by Pillow."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        turned = ImageOps.exif_transpose(image) if how.exif_orientation else image
        pixels = np.array(decode.eight_bit(turned, decode.MODES[CHANNELS], image.format))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _least(size: tuple[int, int], how: Square) -> tuple[int, int]:
    """The size (width, height) above which libjpeg may scale: that of which the share has the wanted side."""
    scale = how.side / (how.share * min(size))
    return int(np.ceil(size[0] * scale)), int(np.ceil(size[1] * scale))


def _scaled(pixels: Tensor, how: Square) -> Tensor:
    """The middle of (3, H, W), a square of `share` of the shorter side, scaled to (3, side, side)."""
    height, width = pixels.shape[1:]
    side = max(1, round(min(height, width) * how.share))
    top, left = (height - side) // 2, (width - side) // 2
    middle = pixels[None, :, top : top + side, left : left + side]
    middle = middle.contiguous(memory_format=torch.channels_last)  # which PyTorch scales faster
    if side == how.side:
        return middle[0]
    found: Tensor = F.interpolate(middle, (how.side, how.side), mode="bicubic", antialias=True)[0]
    return found
