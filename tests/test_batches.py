"""Batches: an epoch covers its split, can be repeated and taken up; mixup mixes as it says."""

import numpy as np
import pytest
import torch
from torchvision import transforms

from longtail import batches as subject
from longtail.batches import (
    Split,
    batch_generator,
    batches_per_epoch,
    epoch,
    in_order,
    mixup,
    normalizer,
    torch_generator,
)

PLAIN = {"crop_padding": 0, "flip": False, "rotation": 0, "policy": "none", "cutout": 0}
FULL = {
    "crop_padding": 2,
    "flip": True,
    "rotation": 0,
    "policy": "autoaugment_cifar10",
    "cutout": 4,
}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def arrays(count, size=8, channels=3):
    """Images that carry their row number in the first two values; labels are rows modulo 5."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count) % 256
    images[:, 0, 1, 0] = np.arange(count) // 256
    return images, np.arange(count) % 5


def split_of(count, **kwargs):
    return Split.from_arrays(*arrays(count, **kwargs), 5, "cpu")


def one_epoch(split, **changes):
    arguments = {
        "batch_size": 16,
        "drop_last": False,
        "augmentation": PLAIN,
        "mean": MEAN,
        "std": STD,
        "seed": 0,
        "epoch": 3,
    }
    return list(epoch(split, **(arguments | changes)))


def rows_of(batches):
    """The row numbers that the plain images of some batches carry."""
    images = torch.cat([images for images, _ in batches])
    values = ((images[:, 0, 0, :2] * STD[0] + MEAN[0]) * 255).round().long()
    return values[:, 0] + 256 * values[:, 1]


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True)
    )


def test_split_keeps_images_and_labels():
    images, labels = arrays(10)
    split = Split.from_arrays(images, labels.astype(np.uint8), 5, "cpu")
    assert len(split) == 10
    assert split.num_classes == 5
    assert split.images.shape == (10, 3, 8, 8)
    assert split.images.is_contiguous()
    assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), images)
    assert split.labels.dtype == torch.int64
    assert split.labels.tolist() == labels.tolist()
    assert len(Split.from_arrays(images[:0], labels[:0], 5, "cpu")) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x.astype(np.float32), y), r"images are float32 of shape \(10, 8, 8, 3\)"),
        (lambda x, y: (x[..., 0], y), r"images are uint8 of shape \(10, 8, 8\)"),
        (lambda x, y: (x, y[:9]), r"labels are int64 of shape \(9,\), not whole numbers \(10,\)"),
        (lambda x, y: (x, y[:, None]), r"labels are int64 of shape \(10, 1\)"),
        (lambda x, y: (x, y.astype(float)), "labels are float64"),
        (lambda x, y: (x, y + 1), r"label 5 in row 4 is not in 0\.\.4"),
        (lambda x, y: (x, y - 1), r"label -1 in row 0 is not in 0\.\.4"),
    ],
)
def test_split_refuses_other_arrays(change, message):
    with pytest.raises(ValueError, match=message):
        Split.from_arrays(*change(*arrays(10)), 5, "cpu")


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalizer_is_torchvisions(channels_last):
    images = split_of(6).images
    result = normalizer(MEAN, STD, channels_last=channels_last, device="cpu")(images)
    both = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    expected = [both(image.permute(1, 2, 0).numpy()) for image in images]
    assert torch.equal(result, torch.stack(expected))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert result.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5, 0.5], [0.2], "mean has 2 channels, std has 1"),
        ([0.5], [0.0], "not above 0"),
        ([0.5], [0.2], "images have 3 channels, mean has 1"),
    ],
)
def test_normalizer_refuses_other_channels(mean, std, message):
    with pytest.raises(ValueError, match=message):
        normalizer(mean, std, channels_last=True, device="cpu")(split_of(2).images)


@pytest.mark.parametrize("batch_size", [1, 16, 300, 1000])
def test_epoch_shows_every_image_once_with_its_label(batch_size):
    split = split_of(300)
    batches = one_epoch(split, batch_size=batch_size)
    rows = rows_of(batches)
    assert len(batches) == -(-300 // batch_size)
    assert {len(labels) for _, labels in batches[:-1]} <= {batch_size}
    assert sorted(rows.tolist()) == list(range(300))
    assert rows.tolist() != list(range(300))
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels[rows])


def test_drop_last_drops_the_partial_batch_alone():
    split = split_of(300)
    whole, dropped = one_epoch(split), one_epoch(split, drop_last=True)
    assert [len(labels) for _, labels in whole] == [16] * 18 + [12]
    assert equal(dropped, whole[:-1])
    assert len(one_epoch(split_of(32), drop_last=True)) == 2
    assert batches_per_epoch(300, batch_size=16, drop_last=True) == 18
    assert batches_per_epoch(300, batch_size=16, drop_last=False) == 19


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (10, {"drop_last": True}, "10 images make no batch of batch_size 16"),
        (0, {}, "0 images"),
        (10, {"batch_size": 0}, "batch_size is 0"),
        (40, {"start_batch": 4}, r"start_batch is 4, not in 0\.\.3"),
        (40, {"start_batch": -1}, "start_batch is -1"),
        (40, {"seed": -1}, "seed -1"),
        (
            40,
            {"augmentation": {"flip": True}},
            "augmentation has the keys flip; it takes crop_padding",
        ),
        (40, {"augmentation": PLAIN | {"policy": "mix"}}, "'mix' is none of none, autoaugment"),
    ],
)
def test_epoch_refuses_what_it_cannot_do_before_the_first_batch(count, changes, message):
    arguments = {"batch_size": 16, "drop_last": False, "augmentation": PLAIN, "seed": 0, "epoch": 0}
    with pytest.raises(ValueError, match=message):
        epoch(split_of(count), mean=MEAN, std=STD, **(arguments | changes))


def test_epoch_can_be_repeated_and_differs_from_others():
    split = split_of(100)
    batches = one_epoch(split, augmentation=FULL)
    torch.rand(3)  # the global generator has no say
    assert equal(batches, one_epoch(split, augmentation=FULL))
    assert not equal(batches, one_epoch(split, augmentation=FULL, epoch=4))
    assert not equal(batches, one_epoch(split, augmentation=FULL, seed=1))
    plain = one_epoch(split)
    assert not torch.equal(rows_of(plain), rows_of(one_epoch(split, epoch=4)))
    assert not torch.equal(rows_of(plain), rows_of(one_epoch(split, seed=1)))


def test_augmentation_leaves_the_order_alone():
    split = split_of(100)
    plain, full = one_epoch(split), one_epoch(split, augmentation=FULL)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(plain, full, strict=True))
    assert not equal(plain, full)


@pytest.mark.parametrize("start", range(14))
def test_start_batch_gives_the_later_batches_of_the_same_epoch(start, monkeypatch):
    monkeypatch.setattr(subject, "CHUNK_PIXELS", 4 * 8 * 8 * 8)  # chunks of four batches of eight
    split = split_of(100)
    batches = one_epoch(split, batch_size=8, augmentation=FULL)
    assert len(batches) == 13
    assert equal(one_epoch(split, batch_size=8, augmentation=FULL, start_batch=start), batches[start:])


def test_start_batch_augments_no_earlier_chunk(monkeypatch):
    monkeypatch.setattr(subject, "CHUNK_PIXELS", 4 * 8 * 8 * 8)
    seen = []
    monkeypatch.setattr(subject, "augment", lambda images, **_: seen.append(len(images)) or images)
    one_epoch(split_of(100), batch_size=8, start_batch=5)
    assert seen == [32, 32, 4]


def test_chunks_and_epochs_draw_independently(monkeypatch):
    monkeypatch.setattr(subject, "CHUNK_PIXELS", 8 * 8 * 8)
    images = np.repeat(arrays(1)[0], 16, axis=0)  # one image sixteen times, two chunks of eight
    split = Split.from_arrays(images, np.zeros(16, np.int64), 5, "cpu")
    cropped = PLAIN | {"crop_padding": 4}
    first, second = one_epoch(split, batch_size=8, augmentation=cropped)
    assert not torch.equal(first[0], second[0])
    other_epoch, _ = one_epoch(split, batch_size=8, augmentation=cropped, epoch=4)
    assert not torch.equal(first[0], other_epoch[0])


def test_epoch_yields_the_memory_format_asked_for():
    for channels_last in (True, False):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        for images, _ in one_epoch(split_of(20), channels_last=channels_last):
            assert images.dtype == torch.float32
            assert images.is_contiguous(memory_format=layout)


def test_epoch_serves_grey_images():
    split = split_of(20, channels=1)
    batches = one_epoch(split, mean=[0.3], std=[0.4], augmentation=FULL | {"policy": "none", "rotation": 10})
    assert [images.shape for images, _ in batches] == [(16, 1, 8, 8), (4, 1, 8, 8)]


def test_in_order_normalizes_the_images_as_they_lie():
    split = split_of(50)
    given = {"mean": MEAN, "std": STD, "channels_last": False}
    batches = list(in_order(split, batch_size=16, **given))
    assert [len(images) for images in batches] == [16, 16, 16, 2]
    expected = normalizer(MEAN, STD, channels_last=False, device="cpu")(split.images)
    assert torch.equal(torch.cat(batches), expected)
    assert list(in_order(split_of(0), batch_size=16, **given)) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        in_order(split, batch_size=0, **given)


def test_mixup_is_the_sum_over_pairs():
    images = torch.randn(6, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(6)

    mixed, partners, weight = mixup(images, labels, alpha=0.4, generator=batch_generator(0, 1, 2))

    assert 0 <= weight <= 1
    assert sorted(partners.tolist()) == list(range(6))
    for row in range(6):
        partner = images[int(partners[row])]  # the label is the row
        torch.testing.assert_close(mixed[row], weight * images[row] + (1 - weight) * partner)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_mixup_with_alpha_zero_changes_nothing():
    images, labels = torch.randn(4, 3, 2, 2), torch.arange(4)
    mixed, partners, weight = mixup(images, labels, alpha=0, generator=batch_generator(0, 0, 0))
    assert mixed is images
    assert partners is labels
    assert weight == 1.0
    with pytest.raises(ValueError, match=r"alpha is -0\.1"):
        mixup(images, labels, alpha=-0.1, generator=batch_generator(0, 0, 0))


@pytest.mark.parametrize("alpha", [0.4, 1.0, 1e4])
def test_mixup_weights_follow_the_beta_distribution(alpha):
    images, labels = torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)
    weights = np.array(
        [mixup(images, labels, alpha=alpha, generator=batch_generator(0, 0, batch))[2] for batch in range(2000)]
    )
    variance = 1 / (4 * (2 * alpha + 1))
    assert weights.mean() == pytest.approx(0.5, abs=4 * (variance / 2000) ** 0.5)
    assert weights.var() == pytest.approx(variance, rel=0.15)


def test_streams_are_apart_in_every_coordinate():
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 0), (0, 0, 0, 1), (0, 1, 1)]
    drawn = [torch.randint(2**31, (4,), generator=torch_generator(*at)).tolist() for at in places]
    assert len({tuple(values) for values in drawn}) == len(places)
    mixes = [batch_generator(*at).random() for at in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len(set(mixes)) == 4
