"""The order of file names, for copies of CIFAR that lost them, as those in the hub's own layout did.

order.npz holds, for each split and class, where an image stands among the file names of its class: the images of a
class are taken in the order of the SHA-256 of their pixels (and of their rows, where two are the same), and their ranks
stored. It is made from a copy that has the names (`ranks`; a test makes it again).
"""

import hashlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("order.npz")


def by_content(images: np.ndarray, labels: np.ndarray, split: str, where: str) -> np.ndarray:
    """Rows (N,) in the order of (class, file name), of images without names in the archive's order.

    Args:
        images, labels: uint8 (N, H, W, channels) and int64 (N,), every class equally frequent.
        split: `cifar100_train`, ...
        where: names the images in errors.

    Raises ValueError where these are not as many images a class as CIFAR has.
    """
    with np.load(FILE) as file:
        ranks = file[split].astype(np.int64)
    classes, size = ranks.shape
    if len(labels) != ranks.size:
        raise ValueError(
            f"{where}: {len(labels)} images without file names; without names, allowed are the {ranks.size} of {split}"
        )
    order = np.empty((classes, size), np.int64)
    np.put_along_axis(order, ranks, _by_hash(images, labels).reshape(classes, size), axis=1)
    return order.ravel()


def ranks(images: np.ndarray, labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """What order.npz holds of a split, (C, images a class) uint16.

    Args:
        images, labels: as of `by_content`, in the archive's order.
        order: (N,), those rows in the order of (class, file name).
    """
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))  # of each row among all names
    size = len(order) // (int(labels.max()) + 1)
    return (place[_by_hash(images, labels)] % size).reshape(-1, size).astype(np.uint16)


def _by_hash(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rows in the order of (class, SHA-256 of the pixels, row)."""
    hashes = [hashlib.sha256(image.tobytes()).digest() for image in images]
    return np.array(sorted(range(len(labels)), key=lambda row: (labels[row], hashes[row], row)))
