"""Batches without a loader: a split is one tensor on the device, a batch is an index into it.

An epoch's order and augmentation follow from (seed, epoch) and the batch size alone, so that
training can be taken up at any batch of any epoch without a stored generator state. Several processes
that share an epoch, each with its own rows of every batch, see together what one process would see.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtail.data.augmentation.augment import augment, check
from longtail.data.draws import Draws

AUGMENTATION = ("crop_padding", "flip", "rotation", "policy", "cutout", "color_jitter")
CHUNK_PIXELS = 2048 * 32 * 32  # augmented in one go: enough to group the policy, little memory

# One stream of random numbers for each use, so that none depends on how much another has drawn.
ORDER, AUGMENT, MIX = range(3)


@dataclass(frozen=True)
class Split:
    """Images (N, channels, H, W) uint8 and labels (N,) int64 in 0..C-1, on one device.

    Features of a frozen backbone are images of one pixel, (N, D, 1, 1) float32.
    """

    images: Tensor
    labels: Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_arrays(
        cls, images: np.ndarray, labels: np.ndarray, num_classes: int, device: torch.device | str
    ) -> "Split":
        """Check images (N, H, W, channels) uint8, or features (N, 1, 1, D) float32, and labels (N,); move them there.

        N may be 0. Raises ValueError for other shapes and types, and for a label not in 0..C-1.
        """
        features = images.dtype == np.float32 and images.shape[1:3] == (1, 1)
        if images.ndim != 4 or (images.dtype != np.uint8 and not features):
            given = f"{images.dtype} of shape {images.shape}"
            raise ValueError(f"images are {given}, not uint8 (N, H, W, channels), nor features, float32 (N, 1, 1, D)")
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


def splits(arrays: Mapping[str, np.ndarray], device: torch.device | str) -> dict[str, Split]:
    """Those of train, held_out and test that have images, from a data set of data/long_tail.

    Raises ValueError as Split.from_arrays.
    """
    classes = len(arrays["class_names"])
    return {
        name: Split.from_arrays(arrays[f"{name}_images"], arrays[f"{name}_labels"], classes, device)
        for name in ("train", "held_out", "test")
        if len(arrays[f"{name}_labels"])
    }


def normalizer(
    mean: Sequence[float],
    std: Sequence[float],
    *,
    channels_last: bool,
    device: torch.device | str,
) -> Callable[[Tensor], Tensor]:
    """A function from uint8 images (B, channels, H, W) to (x / 255 - mean) / std in float32.

    `mean` and `std` are fractions of the full value, one for each channel; `channels_last` chooses
    the memory format. Features, float32, become (x - mean) / std, with one value for all of them.
    Raises ValueError when they do not fit each other, when a std is not above 0,
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
        if images.dtype == torch.float32 and len(shift) == 1:
            return (images - shift) / scale
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


class Batch(NamedTuple):
    """One process's rows of a joint batch: B of its `size` images, none where the batch is too short.

    The loss is weight * L(labels) + (1 - weight) * L(partner_labels); weight is 1 without mixing.
    """

    images: Tensor  # (B, channels, H, W) float32, mixed
    labels: Tensor  # (B,) int64
    partner_labels: Tensor  # (B,) int64
    places: Tensor  # (B,) int64, in the split
    partner_places: Tensor  # (B,) int64
    weight: float
    size: int


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
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    class_balanced: bool = False,
    channels_last: bool = True,
    start_batch: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """One epoch in random order: augmented, normalized and mixed batches.

    The same arguments give the same batches; with `start_batch` k those from number k (from 0) on, at the cost of
    no earlier batch. `augmentation` has the keys of `augment`; `draw_mixing` says what the alphas do, `draw_order`
    what `class_balanced` does. `batch_size` is that of the joint batch, of which process `rank` of `world` gets the
    rows rank, rank + world, ...: together the processes see, byte for byte, the batches of a single one. Raises
    ValueError for an argument out of range, before the first batch is asked for.
    """
    batches = batches_per_epoch(len(split), batch_size=batch_size, drop_last=drop_last)
    if not 0 <= start_batch <= batches:
        raise ValueError(f"start_batch is {start_batch}, not in 0..{batches}")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of world {world}: rank is in 0..world-1")
    _check_augmentation(augmentation)
    _check_alphas(mixup_alpha, cutmix_alpha)
    height, width = split.images.shape[2:]
    normalize = normalizer(mean, std, channels_last=channels_last, device=split.images.device)
    order = draw_order(split, class_balanced=class_balanced, generator=torch_generator(seed, ORDER, epoch))
    order = order[: batches * batch_size]
    pixels = max(height * width, split.images.shape[1] * height * width // 3)  # features are many channels of one pixel
    per_chunk = max(1, CHUNK_PIXELS // (batch_size * pixels))
    draw = partial(draw_mixing, height=height, width=width, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)

    def later_batches() -> Iterator[Batch]:
        for chunk in range(start_batch // per_chunk, -(-batches // per_chunk)):
            first = chunk * per_chunk
            rows = order[first * batch_size : (first + per_chunk) * batch_size]
            joint = torch.split(torch.arange(len(rows)), batch_size)[max(0, start_batch - first) :]
            if not joint:  # the epoch was taken up after its last batch
                return
            mixings = [
                draw(len(places), generator=batch_generator(seed, epoch, number))
                for number, places in enumerate(joint, max(first, start_batch))
            ]
            yield from _chunk(
                split, rows, joint, mixings, augmentation=augmentation, normalize=normalize, rank=rank, world=world,
                generator=torch_generator(seed, AUGMENT, epoch, chunk),
            )  # fmt: skip

    return later_batches()


def _chunk(
    split: Split,
    rows: Tensor,
    joint: Sequence[Tensor],
    mixings: Sequence["Mixing"],
    *,
    augmentation: Mapping[str, Any],
    normalize: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    rank: int,
    world: int,
) -> Iterator[Batch]:
    """The batches of images that are augmented in one go: those in `rows` of the split, in batches of places in them.

    Augments what this process needs of them alone, with the draws that they have among all.
    """
    # (2, B) a batch: places in the chunk of this process's images and of their partners
    pairs = [
        torch.stack((places, places[mixing.partner]))[:, rank::world]
        for places, mixing in zip(joint, mixings, strict=True)
    ]
    wanted, found = torch.unique(torch.cat(pairs, 1), return_inverse=True)
    chosen = rows[wanted].to(split.images.device)
    images = augment(split.images[chosen], **augmentation, draws=Draws(generator, len(rows), wanted))
    labels = split.labels[chosen]
    places_of = torch.split(found.to(split.images.device), [pair.shape[1] for pair in pairs], 1)
    for places, mixing, (own, partner) in zip(joint, mixings, places_of, strict=True):
        batch = normalize(images[own])
        if mixing.weight < 1:
            batch = mix(batch, normalize(images[partner]), mixing)
        yield Batch(batch, labels[own], labels[partner], chosen[own], chosen[partner], mixing.weight, len(places))


def draw_order(split: Split, *, class_balanced: bool, generator: torch.Generator) -> Tensor:
    """The images of an epoch in their order, (N,) int64 on the CPU: all of them in random order, each once.

    Class-balanced, N draws with replacement: a class, all as likely, then an image of it (Kang et al., ICLR 2020,
    section 3.1, q = 0).
    """
    if not class_balanced:
        return torch.randperm(len(split), generator=generator)
    labels_N = split.labels.cpu()
    weights_N = 1 / torch.bincount(labels_N).double()[labels_N]
    return torch.multinomial(weights_N, len(split), replacement=True, generator=generator)


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


class Mixing(NamedTuple):
    """How a joint batch is mixed."""

    partner: Tensor  # (size,) int64 on the CPU, a permutation: whom each image is mixed with
    weight: float  # 0..1, the image's own share
    box: tuple[slice, slice] | None  # CutMix: rows and columns that the partner fills; None: mixup


def draw_mixing(
    count: int,
    *,
    height: int,
    width: int,
    mixup_alpha: float,
    cutmix_alpha: float,
    generator: np.random.Generator,
) -> Mixing:
    """Draw how `count` images are mixed: one permutation and one weight ~ Beta(alpha, alpha) for all.

    An alpha of 0 is no mixing of its kind: where both are 0, every image stays as it is, with weight 1. Where
    neither is, a batch is mixed by either with probability 1/2, as in timm. Mixup (Zhang et al. 2018, equation 1)
    blends with the drawn weight. CutMix (Yun et al. 2019, equations 1 and 2) pastes a box of the partner: its sides
    are sqrt(1 - weight) of the image's, its centre is any pixel, what lies outside is cut off; the weight returned
    is the share of pixels that the image keeps. Raises ValueError for a negative alpha.
    """
    _check_alphas(mixup_alpha, cutmix_alpha)
    if not mixup_alpha and not cutmix_alpha:
        return Mixing(torch.arange(count), 1.0, None)
    cut = not mixup_alpha or (cutmix_alpha > 0 and generator.random() < 0.5)
    alpha = cutmix_alpha if cut else mixup_alpha
    weight, box = float(generator.beta(alpha, alpha)), None
    if cut:
        scale = math.sqrt(1 - weight)
        box = _around(generator, height, scale), _around(generator, width, scale)
        area = math.prod(side.stop - side.start for side in box)
        weight = 1 - area / (height * width)
    return Mixing(torch.from_numpy(generator.permutation(count)), weight, box)


def _around(generator: np.random.Generator, size: int, scale: float) -> slice:
    """`scale` of a side of `size` pixels about a random one of them, as far as the image goes."""
    centre, half = int(generator.integers(size)), int(size * scale) // 2
    return slice(max(0, centre - half), min(size, centre + half))


def mix(images: Tensor, partners: Tensor, mixing: Mixing) -> Tensor:
    """weight * images + (1 - weight) * partners, or the images with the partners' box (B, channels, H, W)."""
    if mixing.box is None:
        return mixing.weight * images + (1 - mixing.weight) * partners
    mixed = images.clone()
    mixed[:, :, *mixing.box] = partners[:, :, *mixing.box]
    return mixed


def batch_generator(seed: int, epoch: int, batch: int) -> np.random.Generator:
    """The generator of one batch's mixing: the same numbers whenever training comes to it."""
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


def _check_alphas(mixup_alpha: float, cutmix_alpha: float) -> None:
    for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
        if alpha < 0:
            raise ValueError(f"{name} is {alpha}, below 0")


def _check_augmentation(augmentation: Mapping[str, Any]) -> None:
    """Raise ValueError for other keys than `AUGMENTATION` and for a value out of range."""
    if set(augmentation) != set(AUGMENTATION):
        given, allowed = (", ".join(sorted(keys)) for keys in (augmentation, AUGMENTATION))
        raise ValueError(f"augmentation has the keys {given}; it takes {allowed}")
    check(**augmentation)
