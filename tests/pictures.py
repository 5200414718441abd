"""Images and draws that the tests of augmentation share."""

import numpy as np
import torch
from PIL import Image

from longtail.data.draws import Draws


def draws(count, seed=0, rows=None):
    """Draws for a chunk of `count` images, for all of them unless `rows` are named."""
    generator = torch.Generator().manual_seed(seed)
    return Draws(generator, count, torch.arange(count) if rows is None else torch.tensor(rows, dtype=torch.int64))


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
