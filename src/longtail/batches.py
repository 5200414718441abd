"""Batches without a loader: a split is one tensor on the device, a batch is an index into it.

An epoch's order and augmentation follow from (seed, epoch) and the batch size alone, so that
training can be taken up at any batch of any epoch without a stored generator state.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtail.augment import POLICIES, augment

AUGMENTATION = ("crop_padding", "flip", "rotation", "policy", "cutout")
CHUNK_PIXELS = 2048 * 32 * 32  # augmented in one go: enough to group the policy, little memory

# One stream of random numbers for each use, so that none depends on how much another has drawn.
ORDER, AUGMENT, MIX = range(3)


@dataclass(frozen=True)
class Split:
    """Images (N, channels, H, W) uint8 and labels (N,) int64 in 0..C-1, on one device."""

    images: Tensor
    labels: Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_arrays(
        cls, images: np.ndarray, labels: np.ndarray, num_classes: int, device: torch.device | str
    ) -> "Split":
        """Check images (N, H, W, channels) uint8 and labels (N,) and move them to the device.

        N may be 0. Raises ValueError for other shapes and types, and for a label not in 0..C-1.
        """
        if images.ndim != 4 or images.dtype != np.uint8:
            given = f"{images.dtype} of shape {images.shape}"
            raise ValueError(f"images are {given}, not uint8 (N, H, W, channels)")
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            given = f"{labels.dtype} of shape {labels.shape}"
            raise ValueError(f"labels are {given}, not whole numbers ({len(images)},)")
        wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if len(wrong):
            row = wrong[0]
            raise ValueError(f"label {labels[row]} in row {row} is not in 0..{num_classes - 1}")
        return cls(
            torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device),
            torch.from_numpy(labels.astype(np.int64)).to(device),
            num_classes,
        )


def normalizer(
    mean: Sequence[float],
    std: Sequence[float],
    *,
    channels_last: bool,
    device: torch.device | str,
) -> Callable[[Tensor], Tensor]:
    """A function from uint8 images (B, channels, H, W) to (x / 255 - mean) / std in float32.

    `mean` and `std` are fractions of the full value, one for each channel; `channels_last` chooses
    the memory format. Raises ValueError when they do not fit each other, when a std is not above 0,
    and at the call when the images have other channels.
    """
    if len(mean) != len(std):
        raise ValueError(f"mean has {len(mean)} channels, std has {len(std)}")
    if not all(value > 0 for value in std):
        raise ValueError(f"std {list(std)} has a value that is not above 0")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shift = torch.tensor(mean, dtype=torch.float32, device=device)[:, None, None]
    scale = torch.tensor(std, dtype=torch.float32, device=device)[:, None, None]

    def normalize(images: Tensor) -> Tensor:
        if images.shape[1] != len(shift):
            raise ValueError(f"images have {images.shape[1]} channels, mean has {len(shift)}")
        return images.contiguous(memory_format=layout).float().div_(255).sub_(shift).div_(scale)

    return normalize


def batches_per_epoch(count: int, *, batch_size: int, drop_last: bool) -> int:
    """Batches that `epoch` makes of `count` images.

    Raises ValueError when that is none, or when the batch size is not at least 1.
    """
    _check_batch_size(batch_size)
    batches = count // batch_size if drop_last else -(-count // batch_size)
    if not batches:
        asked = f"batch_size {batch_size} with drop_last {drop_last}"
        raise ValueError(f"{count} images make no batch of {asked}")
    return batches


def epoch(
    split: Split,
    *,
    batch_size: int,
    drop_last: bool,
    augmentation: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    epoch: int,
    channels_last: bool = True,
    start_batch: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order: images (B, channels, H, W) float32 with their labels (B,) int64.

    The same arguments give the same batches; with `start_batch` k those from number k (from 0) on,
    at the cost of no earlier chunk of batches. `augmentation` has the keys of `augment`. Raises
    ValueError for an argument out of range, most of them before the first batch is asked for.
    """
    batches = batches_per_epoch(len(split), batch_size=batch_size, drop_last=drop_last)
    if not 0 <= start_batch <= batches:
        raise ValueError(f"start_batch is {start_batch}, not in 0..{batches}")
    _check_augmentation(augmentation)
    device = split.images.device
    normalize = normalizer(mean, std, channels_last=channels_last, device=device)
    order = torch.randperm(len(split), generator=torch_generator(seed, ORDER, epoch)).to(device)
    order = order[: batches * batch_size]
    per_chunk = max(1, CHUNK_PIXELS // (batch_size * split.images[0, 0].numel()))

    def later_batches() -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in range(start_batch // per_chunk, -(-batches // per_chunk)):
            first = chunk * per_chunk
            rows = order[first * batch_size : (first + per_chunk) * batch_size]
            generator = torch_generator(seed, AUGMENT, epoch, chunk)
            images = augment(split.images[rows], **augmentation, generator=generator)
            labels = split.labels[rows]
            skipped = max(0, start_batch - first) * batch_size
            for row in range(skipped, len(rows), batch_size):
                yield normalize(images[row : row + batch_size]), labels[row : row + batch_size]

    return later_batches()


def in_order(
    split: Split,
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    channels_last: bool,
) -> Iterator[Tensor]:
    """The images as they lie, in float32 batches (B, channels, H, W); the last may be smaller.

    An empty split gives no batch. Raises ValueError as `normalizer` and for a bad batch size.
    """
    _check_batch_size(batch_size)
    device = split.images.device
    normalize = normalizer(mean, std, channels_last=channels_last, device=device)
    firsts = range(0, len(split), batch_size)
    return (normalize(split.images[first : first + batch_size]) for first in firsts)


def mixup(
    images: Tensor, labels: Tensor, *, alpha: float, generator: np.random.Generator
) -> tuple[Tensor, Tensor, float]:
    """Mix every image of a batch with a partner: weight * images + (1 - weight) * partners.

    Zhang et al. 2018, "mixup", equation 1, with one weight ~ Beta(alpha, alpha) and one permutation
    for the batch. Returns the mixed images, the partners' labels (B,) and the weight in 0..1: the
    loss is weight * L(labels) + (1 - weight) * L(partners' labels). alpha 0 is no mixup: the images
    themselves and weight 1. Raises ValueError for a negative alpha.
    """
    if alpha < 0:
        raise ValueError(f"mixup alpha is {alpha}, below 0")
    if alpha == 0:
        return images, labels, 1.0
    weight = float(generator.beta(alpha, alpha))
    partner = torch.from_numpy(generator.permutation(len(images))).to(images.device)
    return weight * images + (1 - weight) * images[partner], labels[partner], weight


def batch_generator(seed: int, epoch: int, batch: int) -> np.random.Generator:
    """The generator of one batch's mixup: the same numbers whenever training comes to it."""
    return np.random.default_rng(_sequence(seed, MIX, epoch, batch))


def torch_generator(seed: int, stream: int, *place: int) -> torch.Generator:
    """A CPU generator for one stream of a training, at one place (epoch, chunk) of it."""
    state = _sequence(seed, stream, *place).generate_state(1)  # torch seeds from 32 bits alone
    return torch.Generator().manual_seed(int(state[0]))


def _sequence(seed: int, stream: int, *place: int) -> np.random.SeedSequence:
    """Well-mixed entropy for a place; ValueError for a negative number."""
    if min(seed, *place) < 0:
        raise ValueError(f"seed {seed} and place {place} must not be negative")
    return np.random.SeedSequence(seed, spawn_key=(stream, *place))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, not at least 1")


def _check_augmentation(augmentation: Mapping[str, Any]) -> None:
    """Raise ValueError for other keys than `AUGMENTATION` and for an unknown policy."""
    if set(augmentation) != set(AUGMENTATION):
        given, allowed = (", ".join(sorted(keys)) for keys in (augmentation, AUGMENTATION))
        raise ValueError(f"augmentation has the keys {given}; it takes {allowed}")
    if augmentation["policy"] not in POLICIES:
        policy = augmentation["policy"]
        raise ValueError(f"augmentation policy {policy!r} is none of {', '.join(POLICIES)}")
