"""Batches: an epoch covers its split, can be repeated, taken up and shared; mixup and CutMix mix as they say."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.transforms import v2

from longtail.data import batches as subject
from longtail.data.augmentation.augment import POLICIES
from longtail.data.batches import (
    Split,
    batch_generator,
    batches_per_epoch,
    draw_mixing,
    epoch,
    in_order,
    mix,
    normalizer,
    torch_generator,
)

PLAIN = {"crop_padding": 0, "flip": False, "rotation": 0, "policy": "none", "cutout": 0, "color_jitter": [0, 0, 0, 0]}
FULL = {
    "crop_padding": 2,
    "flip": True,
    "rotation": 0,
    "policy": "autoaugment_cifar10",
    "cutout": 4,
    "color_jitter": [0, 0, 0, 0],
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
    images = torch.cat([batch.images for batch in batches])
    values = ((images[:, 0, 0, :2] * STD[0] + MEAN[0]) * 255).round().long()
    return values[:, 0] + 256 * values[:, 1]


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for pair in zip(first, second, strict=True)
        for a, b in zip(*pair, strict=True)
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
    assert {len(batch.labels) for batch in batches[:-1]} <= {batch_size}
    assert sorted(rows.tolist()) == list(range(300))
    assert rows.tolist() != list(range(300))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), split.labels[rows])


def test_drop_last_drops_the_partial_batch_alone():
    split = split_of(300)
    whole, dropped = one_epoch(split), one_epoch(split, drop_last=True)
    assert [len(batch.labels) for batch in whole] == [16] * 18 + [12]
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
        (40, {"mixup_alpha": -0.1}, r"mixup_alpha is -0\.1, below 0"),
        (40, {"cutmix_alpha": -1}, "cutmix_alpha is -1, below 0"),
        (40, {"rank": 2, "world": 2}, r"rank 2 of world 2: rank is in 0\.\.world-1"),
        (40, {"rank": -1}, "rank -1 of world 1"),
        (40, {"world": 0}, "rank 0 of world 0"),
        (40, {"augmentation": PLAIN | {"rotation": 200}}, "rotation is 200 degrees"),
        (40, {"augmentation": PLAIN | {"color_jitter": [0]}}, "color_jitter is"),
        (
            40,
            {"augmentation": {"flip": True}},
            "augmentation has the keys flip; it takes color_jitter, crop_padding",
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
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(plain, full, strict=True))
    assert not equal(plain, full)


@pytest.mark.parametrize("start", range(14))
def test_start_batch_gives_the_later_batches_of_the_same_epoch(start, monkeypatch):
    monkeypatch.setattr(subject, "CHUNK_PIXELS", 4 * 8 * 8 * 8)  # chunks of four batches of eight
    split = split_of(100)
    batches = one_epoch(split, batch_size=8, augmentation=FULL)
    assert len(batches) == 13
    assert equal(one_epoch(split, batch_size=8, augmentation=FULL, start_batch=start), batches[start:])


def test_start_batch_augments_no_earlier_batch(monkeypatch):
    monkeypatch.setattr(subject, "CHUNK_PIXELS", 4 * 8 * 8 * 8)
    seen = []
    monkeypatch.setattr(subject, "augment", lambda images, **_: seen.append(len(images)) or images)
    one_epoch(split_of(100), batch_size=8, start_batch=5)
    assert seen == [24, 32, 4]


def test_chunks_and_epochs_draw_independently(monkeypatch):
    monkeypatch.setattr(subject, "CHUNK_PIXELS", 8 * 8 * 8)
    images = np.repeat(arrays(1)[0], 16, axis=0)  # one image sixteen times, two chunks of eight
    split = Split.from_arrays(images, np.zeros(16, np.int64), 5, "cpu")
    cropped = PLAIN | {"crop_padding": 4}
    first, second = one_epoch(split, batch_size=8, augmentation=cropped)
    assert not torch.equal(first.images, second.images)
    other_epoch, _ = one_epoch(split, batch_size=8, augmentation=cropped, epoch=4)
    assert not torch.equal(first.images, other_epoch.images)


def test_epoch_yields_the_memory_format_asked_for():
    for channels_last in (True, False):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        for alphas in ({}, {"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}):
            for batch in one_epoch(split_of(20), channels_last=channels_last, **alphas):
                assert batch.images.dtype == torch.float32
                assert batch.images.is_contiguous(memory_format=layout)


def test_epoch_serves_grey_images():
    split = split_of(20, channels=1)
    batches = one_epoch(split, mean=[0.3], std=[0.4], augmentation=FULL | {"policy": "none", "rotation": 10})
    assert [batch.images.shape for batch in batches] == [(16, 1, 8, 8), (4, 1, 8, 8)]


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


# sha256 of images, labels, partners' labels and weights of an epoch, computed with the code before
# epochs could be shared or mixed (commit e6109b9): results that were published depend on these bytes
RECORDED = [
    ("autoaugment_cifar10", 0, 4, 8, 0.0, "89b9b2b53204c95a249aa45ee115eb5fb1e0db043f26dd7648b2f417fc100cff"),
    ("autoaugment_cifar10", 0, 4, 8, 0.4, "e9a8f36bd10e00bf9981c6c36937b136ac691dbc4e85caf8cde81faa63ad813a"),
    ("none", 15, 4, 0, 0.0, "96b484470469d612449569e76102dd43e45ebcb890a51fb8a662fe5f035c934b"),
    ("none", 15, 4, 0, 0.4, "f4172108596ef564f05315ce899d101bd28f2b8776183b40eb96daa123522008"),
    ("autoaugment_cifar10", 30, 2, 5, 0.0, "bea4d1bc2956e213fe3600c4614ee4450c6aa61ed798aa7939b7bf49d92eb956"),
    ("autoaugment_cifar10", 30, 2, 5, 0.4, "004747dbb0c7f5c7a6d74f85c74efc1777cbfc71c0d1bb3a4e60c8536373af06"),
]


@pytest.mark.parametrize(("policy", "rotation", "padding", "hole", "alpha", "digest"), RECORDED)
def test_epoch_gives_the_recorded_bytes(policy, rotation, padding, hole, alpha, digest, monkeypatch):
    monkeypatch.setattr(subject, "CHUNK_PIXELS", 4 * 8 * 16 * 12)
    images = np.random.default_rng(0).integers(0, 256, (100, 16, 12, 3), dtype=np.uint8)
    split = Split.from_arrays(images, np.arange(100) % 5, 5, "cpu")
    augmentation = {"crop_padding": padding, "flip": True, "rotation": rotation, "policy": policy, "cutout": hole}
    augmentation["color_jitter"] = [0, 0, 0, 0]
    whole = hashlib.sha256()
    for batch in one_epoch(split, batch_size=8, augmentation=augmentation, seed=1, epoch=2, mixup_alpha=alpha):
        for part in (batch.images, batch.labels, batch.partner_labels, batch.weight):
            whole.update(np.ascontiguousarray(part).tobytes())
    assert whole.hexdigest() == digest


SHARED = [
    {},
    {"mixup_alpha": 0.4},
    {"cutmix_alpha": 1.0},
    {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "start_batch": 5},
]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("changes", SHARED)
@pytest.mark.parametrize("policy", POLICIES)
def test_processes_that_share_an_epoch_see_the_bytes_of_one(policy, changes, world, monkeypatch):
    monkeypatch.setattr(subject, "CHUNK_PIXELS", 4 * 8 * 8 * 8)  # chunks of four batches of eight
    on = FULL | {"policy": policy, "rotation": 20, "color_jitter": [0.4, 0.4, 0.4, 0.1]}
    changes = {"batch_size": 8, "augmentation": on} | changes
    split = split_of(98)  # the last batch has two images: none for the third process
    alone = one_epoch(split, **changes)
    shares = [one_epoch(split, rank=rank, world=world, **changes) for rank in range(world)]
    for batch, *parts in zip(alone, *shares, strict=True):
        assert batch.size == len(batch.labels)
        for rank, part in enumerate(parts):
            assert (part.size, part.weight) == (batch.size, batch.weight)
            whole = [None if field is None else field[rank::world] for field in batch[:5]]
            assert equal([part[:5]], [whole])
    assert len(shares[-1][-1].images) == (1 if world == 2 else 0)
    assert shares[-1][-1].images.shape[1:] == (3, 8, 8)


@pytest.mark.parametrize(("alphas", "seen"), [({}, 16), ({"mixup_alpha": 1.0}, 24)])
def test_a_process_augments_its_rows_and_their_partners_alone(alphas, seen, monkeypatch):
    """Of a chunk of 32 images: half of them, and about half of the others as partners."""
    monkeypatch.setattr(subject, "CHUNK_PIXELS", 4 * 8 * 8 * 8)
    counts = []
    monkeypatch.setattr(subject, "augment", lambda images, **_: counts.append(len(images)) or images)
    one_epoch(split_of(320), batch_size=8, rank=1, world=2, **alphas)
    assert np.mean(counts) == pytest.approx(seen, abs=1.5)
    if not alphas:
        assert counts == [seen] * 10


def test_epoch_mixes_each_batch_with_itself():
    """Each batch by its own draws, whatever batch the epoch starts from; labels go with their images."""
    split = split_of(100)
    plain = one_epoch(split)
    mixed = one_epoch(split, mixup_alpha=1.0, cutmix_alpha=1.0)
    for number, (before, after) in enumerate(zip(plain, mixed, strict=True)):
        mixing = drawn(len(before.labels), (8, 8), 1.0, 1.0, generator=batch_generator(0, 3, number))
        assert torch.equal(after.images, mix(before.images, before.images[mixing.partner], mixing))
        assert torch.equal(after.labels, before.labels)
        assert torch.equal(after.partner_labels, before.labels[mixing.partner])
        assert after.weight == mixing.weight
    assert equal(one_epoch(split, mixup_alpha=1.0, cutmix_alpha=1.0, start_batch=3), mixed[3:])
    assert all(batch.weight == 1 and torch.equal(batch.labels, batch.partner_labels) for batch in plain)


def drawn(count, size, mixup_alpha, cutmix_alpha, *, generator):
    alphas = {"mixup_alpha": mixup_alpha, "cutmix_alpha": cutmix_alpha}
    return draw_mixing(count, height=size[0], width=size[1], **alphas, generator=generator)


def test_mixup_is_the_sum_over_pairs():
    images = torch.randn(6, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    mixing = drawn(6, (4, 4), 0.4, 0, generator=batch_generator(0, 1, 2))

    mixed = mix(images, images[mixing.partner], mixing)

    assert 0 <= mixing.weight <= 1
    assert mixing.box is None
    assert sorted(mixing.partner.tolist()) == list(range(6))
    for row in range(6):
        partner = images[int(mixing.partner[row])]
        torch.testing.assert_close(mixed[row], mixing.weight * images[row] + (1 - mixing.weight) * partner)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_alphas_of_zero_mix_nothing():
    generator = batch_generator(0, 0, 0)
    mixing = drawn(4, (2, 2), 0, 0, generator=generator)
    assert mixing.partner.tolist() == [0, 1, 2, 3]
    assert (mixing.weight, mixing.box) == (1.0, None)
    assert generator.random() == batch_generator(0, 0, 0).random()  # nothing was drawn


@pytest.mark.parametrize("alpha", [0.4, 1.0, 1e4])
def test_mixup_weights_follow_the_beta_distribution(alpha):
    weights = np.array(
        [drawn(2, (1, 1), alpha, 0, generator=batch_generator(0, 0, batch)).weight for batch in range(2000)]
    )
    variance = 1 / (4 * (2 * alpha + 1))
    assert weights.mean() == pytest.approx(0.5, abs=4 * (variance / 2000) ** 0.5)
    assert weights.var() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 3), (5, 12, 3), (12, 5, 1), (1, 1, 1)])
def test_cutmix_is_the_paste_pixel_by_pixel(height, width, channels):
    images = torch.randn(4, channels, height, width).contiguous(memory_format=torch.channels_last)
    for batch in range(100):
        mixing = drawn(4, (height, width), 0, 1.0, generator=batch_generator(0, 0, batch))
        mixed = mix(images, images[mixing.partner], mixing)

        rng = batch_generator(0, 0, batch)  # the paper's draws: lambda, then the centre of the box
        share, y, x = rng.beta(1.0, 1.0), rng.integers(height), rng.integers(width)
        assert mixing.partner.tolist() == rng.permutation(4).tolist()
        half_height, half_width = (int(side * np.sqrt(1 - share)) // 2 for side in (height, width))
        expected, kept = images.clone(), 0
        for row in range(height):
            for column in range(width):
                if -half_height <= row - y < half_height and -half_width <= column - x < half_width:
                    expected[:, :, row, column] = images[mixing.partner, :, row, column]
                else:
                    kept += 1
        assert torch.equal(mixed, expected)
        assert mixing.weight == pytest.approx(kept / (height * width), abs=1e-12)
        assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_cutmix_draws_torchvisions_boxes(monkeypatch):
    """The same box and weight as torchvision's CutMix for the same lambda and centre."""
    theirs = v2.CutMix(num_classes=2)
    image = torch.zeros(4, 3, 20, 28)
    for batch in range(200):
        mixing = drawn(4, (20, 28), 0, 1.0, generator=batch_generator(0, 0, batch))
        rng = batch_generator(0, 0, batch)
        share, y, x = rng.beta(1.0, 1.0), int(rng.integers(20)), int(rng.integers(28))
        centre = iter((x, y))
        with monkeypatch.context() as patch:
            patch.setattr(theirs, "_dist", SimpleNamespace(sample=lambda _, share=share: share))
            patch.setattr(torch, "randint", lambda *_, centre=centre, **__: torch.tensor([next(centre)]))
            expected = theirs.make_params([image])
        rows, columns = mixing.box
        assert expected["box"] == (columns.start, rows.start, columns.stop, rows.stop)
        assert expected["lam_adjusted"] == pytest.approx(mixing.weight, abs=1e-12)


def test_both_alphas_mix_half_of_the_batches_each_way():
    boxes = [drawn(2, (8, 8), 0.4, 1.0, generator=batch_generator(0, 0, n)).box is not None for n in range(1000)]
    assert abs(sum(boxes) - 500) < 52  # 3.3 standard deviations


def test_streams_are_apart_in_every_coordinate():
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 0), (0, 0, 0, 1), (0, 1, 1)]
    drawn = [torch.randint(2**31, (4,), generator=torch_generator(*at)).tolist() for at in places]
    assert len({tuple(values) for values in drawn}) == len(places)
    mixes = [batch_generator(*at).random() for at in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len(set(mixes)) == 4
