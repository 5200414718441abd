"""The usual data path that ours is compared with: Pillow images, torchvision's transforms, a DataLoader's processes.

Nothing of longtail; answers the question "data" with [images, seconds] of an epoch of batches.
"""

import random
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.autoaugment import AutoAugment, AutoAugmentPolicy

from benchmarks.harness import Setting, serve

PROCESSES = 2
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Cutout:
    """A black square of side `length` about a random pixel, on an image (channels, H, W)."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        y, x, half = random.randrange(height), random.randrange(width), self.length // 2
        mask = torch.ones(height, width)
        mask[max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
        return image * mask


class Images(Dataset[tuple[Tensor, int]]):
    """Random images with labels."""

    def __init__(self, setting: Setting):
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (setting.images, 32, 32, 3), dtype=np.uint8)
        self.labels = rng.integers(0, setting.classes, setting.images).tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, 4),
                transforms.RandomHorizontalFlip(),
                AutoAugment(AutoAugmentPolicy.CIFAR10),
                transforms.ToTensor(),
                Cutout(setting.cutout),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[row])), self.labels[row]


def epoch(loader: DataLoader[tuple[Tensor, int]]) -> tuple[int, float]:
    """Images and seconds of an epoch."""
    start = perf_counter()
    return sum(len(labels) for _, labels in loader), perf_counter() - start


if __name__ == "__main__":
    setting = Setting.from_command_line()
    loader = DataLoader(
        Images(setting), batch_size=setting.batch_size, shuffle=True, num_workers=PROCESSES, persistent_workers=True
    )
    epoch(loader)  # its processes start
    serve({"processes": PROCESSES}, {"data": lambda: epoch(loader)})
