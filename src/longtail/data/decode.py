"""Image files as they are, decoded by their content into squares of one size; what cannot be is named, with its reason.

Grey, palette, CMYK, 16 bit and animations (their first frame) become 8-bit grey or RGB; transparency is dropped, as
Pillow and torchvision do.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485  # Pillow's own limit, a quarter of a gigabyte in RGB: more is taken for a decompression bomb
ORIENTATION = 0x0112  # EXIF's tag
MODES = {1: "L", 3: "RGB"}  # by channels


class BrokenError(ValueError):
    """A file that is no image that can be used; the message says why."""


@dataclass(frozen=True)
class Facts:
    """What a file is.

    Attributes:
        kind: the format by its content, PNG or JPEG say.
        mode: Pillow's name of what a pixel is: L, RGB, P, CMYK, I;16, ...
        width, height: in pixels, as they lie in the file.
        turned: whether EXIF says to turn or mirror it.
    """

    kind: str
    mode: str
    width: int
    height: int
    turned: bool


def decode(data: bytes, *, size: int, channels: int, fit: str, exif_orientation: bool) -> tuple[np.ndarray, Facts]:
    """The pixels (size, size, channels) uint8 of a file's bytes, and what it is.

    Args:
        fit: `crop`: the largest square in the middle; `pad`: all of it, black beside; `squash`: all of it, distorted.
        exif_orientation: turn it as EXIF says; the published long-tail code does not.

    Scaled bicubically, with antialiasing. Raises BrokenError for what is no image, truncated or damaged, has more than
    MAX_PIXELS pixels, or floating-point ones, whose range nobody knows.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF; and of bombs, which are refused below
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BrokenError(
                        f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}: a decompression bomb"
                    )
                facts = Facts(
                    str(image.format), image.mode, image.width, image.height,
                    image.getexif().get(ORIENTATION, 1) not in (0, 1),
                )  # fmt: skip
                image.load()
                turned = ImageOps.exif_transpose(image) if exif_orientation else image
                return _square(eight_bit(turned, MODES[channels], image.format), size, fit), facts
    except BrokenError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's, of twice as many
        raise BrokenError(f"more than {2 * MAX_PIXELS:,} pixels: a decompression bomb") from error
    except Exception as error:  # decoders of damaged files raise all there is
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BrokenError("no image, by its content" if "cannot identify" in said else said) from error


def eight_bit(image: Image.Image, mode: str, kind: str | None) -> Image.Image:
    """An image in 8-bit grey or RGB (`mode`). Raises BrokenError for numbers whose range is not known.

    Args:
        kind: Pillow's name of the file's format. Mode `I` is 16 bits in PNG and PGM, and 32 or signed in TIFF: what the
            range is must not hang on how bright the image happens to be.
    """
    if image.mode == "F" or (image.mode == "I" and kind not in ("PNG", "PPM")):
        what = "floating-point pixels" if image.mode == "F" else "whole numbers of 32 bits, or signed ones"
        raise BrokenError(f"{what}, whose range is not known; write 8 or 16 bits")
    if image.mode.startswith("I"):
        values = (np.asarray(image).astype(np.int64) + 128) // 257  # 65535 is 255
        image = Image.fromarray(values.astype(np.uint8))
    return image.convert(mode)


def _square(image: Image.Image, size: int, fit: str) -> np.ndarray:
    width, height = image.size
    box, inner = (0.0, 0.0, float(width), float(height)), (size, size)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    if fit == "pad":
        scale = size / max(width, height)
        inner = max(1, round(width * scale)), max(1, round(height * scale))
    pixels = np.asarray(image.resize(inner, Image.Resampling.BICUBIC, box=box))
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    square = np.zeros((size, size, pixels.shape[2]), np.uint8)
    top, left = (size - inner[1]) // 2, (size - inner[0]) // 2
    square[top : top + inner[1], left : left + inner[0]] = pixels
    return square
