"""Readers of image data, one a folder: a reader's name in params.yaml is its folder's name here.

Every reader exports `read(folder, **settings)` and returns the arrays of data/raw/<source>.npz:

    train_images  uint8 (N, H, W, channels)      test_images  uint8 (M, H, W, channels)
    train_labels  int64 (N,)                     test_labels  int64 (M,)
    class_names   unicode (C,)
    train_places  int64 (N,), where it is known: each train row's number in the original release, from 0

Where a source has features in place of images, they are float32 (N, 1, 1, D): images of one pixel. The test split is
balanced; that of one's own data as far as the counts allow, and their classes come in the order of their size.

Rows are sorted by class and then by the order the source itself gives (file name, or row number),
so that the same images give the same bytes wherever they were read from.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module

import numpy as np

Read = Callable[..., dict[str, np.ndarray]]


def load(reader: str) -> Read:
    """The `read` function of longtail/data/sources/<reader>.

    Raises ValueError naming the readers there are when there is no such folder.
    """
    readers = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if reader not in readers:
        raise ValueError(f"reader: {reader!r} is unknown; allowed are {', '.join(readers)}")
    read: Read = import_module(f"{__name__}.{reader}").read
    return read
