"""Handwritten digits: 1,797 images of 8x8 pixels that scikit-learn brings along.

Source: Alpaydin and Kaynak, 'Optical Recognition of Handwritten Digits', UCI Machine Learning
Repository, 1998 (its test part). The data set has no test split of its own: a seeded draw makes a
balanced one.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from longtail.workflow.ranges import Count, Seed

MAX_VALUE = 16  # a pixel counts the set points of a 4x4 block


def read(folder: str | Path, *, test_per_class: Count, seed: Seed) -> dict[str, np.ndarray]:
    """Read the digits and draw `test_per_class` test images of each class; the rest is train.

    A value v of 0..16 becomes the uint8 (255 v + 8) // 16: 255 v / 16 rounded half up, so 0 is 0
    and 16 is 255. Rows keep class order, then scikit-learn's row order. `folder` is not used:
    nothing is fetched.

    Raises ValueError when test_per_class leaves some class without a training image, or seed is
    negative.
    """
    values, labels = load_digits(return_X_y=True)
    labels = labels.astype(np.int64)
    images = ((255 * values.astype(np.int64) + MAX_VALUE // 2) // MAX_VALUE).astype(np.uint8)
    images = images.reshape(-1, 8, 8, 1)

    smallest = int(np.bincount(labels).min())
    if not 1 <= test_per_class < smallest:
        raise ValueError(
            f"test_per_class: {test_per_class} is not allowed; "
            f"the smallest class has {smallest} images, so allowed is 1 to {smallest - 1}"
        )
    if seed < 0:
        raise ValueError(f"seed: {seed} is not allowed; allowed is 0 or more")

    train, test = [], []
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        # A generator of its own, so that one class's draw does not hang on the size of another.
        drawn = np.random.default_rng(np.random.SeedSequence([seed, label])).permutation(rows)
        test.append(np.sort(drawn[:test_per_class]))
        train.append(np.sort(drawn[test_per_class:]))
    train_rows, test_rows = np.concatenate(train), np.concatenate(test)
    return {
        "train_images": images[train_rows],
        "train_labels": labels[train_rows],
        "test_images": images[test_rows],
        "test_labels": labels[test_rows],
        "class_names": np.array([str(label) for label in range(10)]),
    }
