"""Image files to squares of 224 pixels: ours against a bare decoder, and against a DataLoader on Pillow images.

And what a training on them takes beside the bare steps of its network, ResNet-50.

python -m benchmarks.decoding            # four minutes; writes benchmarks/results/decoding.md
python -m benchmarks.decoding --quick    # seconds; prints only

Files are generated, smooth with noise, of the sizes that ImageNet and iNaturalist have, and are in the system's memory.
"""

import io
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.io import decode_jpeg

from benchmarks.harness import Report, Setting, Worker, alternate, flags, machine_line, ratio
from longtail.data import batches
from longtail.data.large import feed
from longtail.data.large.pixels import Smaller, Square, smaller
from longtail.data.large.store import Piece, Store
from longtail.streaming import sets, train
from longtail.training import cell, engine, inference

SIDE, BATCH, PROCESSES = 224, 64, 2
LOOP = {"architecture": "resnet50", "images": 48, "batch": 16}
SIZES = {"500 x 375, as ImageNet": (500, 375), "800 x 600, as iNaturalist": (800, 600)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def jpeg(width: int, height: int, seed: int) -> bytes:
    """A picture of smooth patches with fine noise, as photographs compress: some 1.1 bits a pixel and more."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 25, width // 25, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    out = io.BytesIO()
    noisy = np.clip(smooth + rng.integers(-14, 15, smooth.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(out, "JPEG", quality=90)
    return out.getvalue()


class Pictures(Dataset[torch.Tensor]):
    """The usual: Pillow, Resize, CenterCrop, ToTensor, Normalize."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize(256),
                transforms.CenterCrop(SIDE),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self.paths[number]) as image:
            made: torch.Tensor = self.transform(image.convert("RGB"))
        return made


def rate(count: int, work: Callable[[], Any]) -> float:
    """Images a second."""
    start = perf_counter()
    work()
    return count / (perf_counter() - start)


class Streams:
    """Both ways with processes, started before they are timed: the first batches are not counted."""

    def __init__(self, paths: Sequence[Path], store: Store, pieces: Sequence[Piece], how: Square):
        self.paths, self.store, self.pieces, self.how = paths, store, pieces, how

    def usual(self) -> float:
        """The DataLoader's rate."""
        loader = DataLoader(Pictures(self.paths), BATCH, num_workers=PROCESSES)
        return self._steady(iter(loader))

    def ours(self) -> float:
        """The rate of a reader."""
        parts = [
            feed.Wanted(self.pieces[first : first + BATCH], self.how) for first in range(0, len(self.pieces), BATCH)
        ]
        with feed.Reader(self.store, BATCH * SIDE**2 * 3) as reader:
            return self._steady(reader.read(parts))

    def _steady(self, stream: Any) -> float:
        ready = 2 * PROCESSES * 3  # batches that may have been made before the clock starts
        for _ in range(ready):
            next(stream)
        return rate(len(self.paths) - ready * BATCH, lambda: [*stream])


def loop(folder: Path, *, turns: int, architecture: str, images: int, batch: int, jitter: float) -> list[list[float]]:
    """Seconds a step, each turn: of the network alone on a batch that lies ready, and of epochs from files."""
    device = torch.device("cpu")
    store = Store("x", str(folder))
    pieces = [Piece(path.name, 0, path.stat().st_size) for path in sorted((folder / "x").iterdir())][:images]
    stream = sets.Stream(
        np.array([str(c) for c in range(1000)]), {"train": np.arange(images) % 1000}, {"train": pieces}, store,
        Square(SIDE, 0.875, False, False), {},
    )  # fmt: skip
    recipe: dict[str, Any] = {
        "batch_size": batch, "drop_last": True, "accumulate": 1, "weight_average": 0.0, "sync_batch_norm": False,
        "optimizer": {
            "lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "muon_lr": 0, "muon_weight_decay": 0,
        },
        "schedule": {"warmup_epochs": 0, "shape": "cosine", "milestones": [], "factors": []},
        "augmentation": {
            "crop_padding": 0, "flip": True, "policy": "none", "color_jitter": [jitter] * 3 + [0.0], "rotation": 0,
            "cutout": 0,
        },
        "resolution": {"milestones": [], "scales": []}, "mixup_alpha": 0.3, "cutmix_alpha": 0, "precision": "bf16",
    }  # fmt: skip
    inference.set_up(0)
    with train.reading(stream, device) as splits:
        network, loss = cell.build(
            splits["train"], "ce", {}, network={"architecture": architecture, "head": "linear", "scale": 1.0},
            normalization={"mean": [*MEAN], "std": [*STD]},
        )  # fmt: skip
        window = {"scale": [0.08, 1.0], "ratio": [0.75, 1.3333333]}
        foreseen = train.announced(loss, splits["train"], {**recipe, "window": window}, 0)
        training = engine.Training(network, foreseen, splits["train"], seed=0, epochs=100, **recipe)
        steps, ready = images // batch, list[batches.Batch]()

        def epoch() -> float:
            start = perf_counter()
            training.finish_epoch(lambda: None)
            took = perf_counter() - start
            training.next_epoch()
            return took / steps

        def bare() -> float:
            start = perf_counter()
            for _ in range(steps):
                training.step(ready[0])
            return (perf_counter() - start) / steps

        step = training.step

        def keep(one: batches.Batch) -> None:
            ready[:] = [one]
            step(one)

        training.step = keep  # type: ignore[method-assign, assignment]
        epoch()  # workers start, memory is had
        training.step = step  # type: ignore[method-assign]
        return alternate(turns, bare, epoch)


def against_bare(turns: int, label: str, folder: Path, how: Square) -> tuple[str, ...]:
    """A row: images a second of one core, of a bare decoder and of ours, on all files of a folder."""
    paths = sorted(folder.iterdir())
    store = Store(folder.name, str(folder.parent))
    pieces = [Piece(path.name, 0, path.stat().st_size) for path in paths]
    contents = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths]
    bare, ours = alternate(
        turns,
        lambda: rate(len(contents), lambda: [decode_jpeg(one) for one in contents]),
        lambda: rate(len(pieces), lambda: feed.read(store, feed.Wanted(pieces, how))),
    )
    return label, f"{median(bare):,.0f}", f"{median(ours):,.0f}", f"{ratio(ours, bare):.2f}"


def against_loader(turns: int, label: str, folder: Path, how: Square, count: int) -> tuple[str, ...]:
    """A row: images a second of worker processes, of a DataLoader with Pillow and of ours, on `count` files."""
    paths = sorted(folder.iterdir())
    paths = (paths * (count // len(paths) + 1))[:count]
    pieces = [Piece(path.name, 0, path.stat().st_size) for path in paths]
    streams = Streams(paths, Store(folder.name, str(folder.parent)), pieces, how)
    usual, fed = alternate(turns, streams.usual, streams.ours)
    return label, f"{median(usual):,.0f}", f"{median(fed):,.0f}", f"{ratio(fed, usual):.2f}"


def beside_steps(folder: Path, size: dict[str, Any], turns: int) -> list[tuple[str, ...]]:
    """Rows: what epochs from files take beside the steps of the network, with cores of its own for decoding or not."""
    cores, rows = os.cpu_count() or 1, []
    for threads, jitter in ((max(1, cores - 1), 0.4), (max(1, cores - 1), 0.0), (cores, 0.4), (cores, 0.0)):
        torch.set_num_threads(threads)
        steps = loop(folder, turns=turns, jitter=jitter, **size)
        more = [100 * (whole / bare - 1) for bare, whole in zip(*steps, strict=True)]
        rows.append((
            "as ImageNet-LT's" if jitter else "without jitter, as iNaturalist's", str(threads),
            *(f"{median(some):.3f}" for some in steps), f"{median(more):.1f}", ", ".join(f"{one:.1f}" for one in more),
        ))  # fmt: skip
    torch.set_num_threads(1)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    args = flags(__doc__, argv)
    torch.set_num_threads(1)
    turns, distinct, count = (1, 8, 14 * BATCH) if args.quick else (5, 48, 24 * BATCH)
    size = {"architecture": "resnet10", "images": 8, "batch": 4} if args.quick else LOOP
    with Worker("machine", Setting(side=512)) as machine:
        about = machine.hello
    alone, together, beside = [], [], list[tuple[str, ...]]()
    for name, (width, height) in SIZES.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder, kept = Path(temporary) / "x", Path(temporary) / "kept"  # the second as `stored: 256` has them
            folder.mkdir()
            kept.mkdir()
            for n in range(distinct):
                data = jpeg(width, height, n)
                (folder / f"{n:02}.jpg").write_bytes(data)
                (kept / f"{n:02}.jpg").write_bytes(smaller(data, Smaller(256, False, False))[0])
            os.environ["LONGTAIL_WORKERS"] = str(PROCESSES)
            for draft in (False, True) if min(width, height) * 0.875 >= 2 * SIDE else (False,):
                how, label = Square(SIDE, 0.875, False, draft), f"{name}{', draft' if draft else ''}"
                alone.append(against_bare(turns, label, folder, how))
                together.append(against_loader(1 if args.quick else 2, label, folder, how, count))
            alone.append(against_bare(turns, f"{name}, kept at 256", kept, Square(SIDE, 0.875, False, False)))
            if not beside:
                os.environ["LONGTAIL_WORKERS"] = "1"
                beside = beside_steps(Path(temporary), size, turns)
    report = Report()
    report.say(
        "# Decoded images a second", "", machine_line(about), "",
        f"JPEG files to {SIDE} x {SIDE} uint8, the middle {SIDE}/256 of the shorter side, bicubic. `decode_jpeg` stops "
        "at all pixels of a file that is in memory; ours reads the file, looks at its header, cuts and scales. `draft` "
        "has libjpeg decode at half the size where that is enough. Medians over turns; last column: of the turns' own "
        "ratios.",
        "", "One core:",
    )  # fmt: skip
    report.table(("File", "torchvision.io.decode_jpeg", "ours", "Ours / bare"), alone)
    report.say(f"{PROCESSES} worker processes; DataLoader: Pillow, Resize, CenterCrop, ToTensor, Normalize:")
    report.table(("File", "DataLoader with Pillow", "ours", "Ours / DataLoader"), together)
    report.say(
        f"Training {size['architecture']} on the files of 500 x 375, batch {size['batch']}, bf16, one worker that "
        f"decodes, {os.cpu_count()} cores; random windows, flip, colour jitter, mixup. Seconds a step: of the network "
        "alone on a batch that lies ready, and of epochs from files. Where the network has all cores, the worker takes "
        "of them what it needs, and all threads of a step wait for the one that it takes it from.",
    )  # fmt: skip
    report.table(("Recipe", "Threads", "Network alone", "From files", "More, % (median)", "Each turn"), beside)
    if args.results is not None:
        report.write(args.results / "decoding.md")


if __name__ == "__main__":
    main()
