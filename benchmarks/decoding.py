"""Image files to squares of 224 pixels: ours against a bare decoder, and against a DataLoader on Pillow images.

python -m benchmarks.decoding            # two minutes; writes benchmarks/results/decoding.md
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
from longtail.data.large import feed
from longtail.data.large.pixels import Square
from longtail.data.large.store import Piece, Store

SIDE, BATCH, PROCESSES = 224, 64, 2
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
        """The rate of `feed.chunks`."""
        parts = [self.pieces[first : first + BATCH] for first in range(0, len(self.pieces), BATCH)]
        return self._steady(feed.chunks(self.store, parts, self.how))

    def _steady(self, stream: Any) -> float:
        ready = 2 * PROCESSES * 3  # batches that may have been made before the clock starts
        for _ in range(ready):
            next(stream)
        return rate(len(self.paths) - ready * BATCH, lambda: [*stream])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    args = flags(__doc__, argv)
    torch.set_num_threads(1)
    os.environ["LONGTAIL_WORKERS"] = str(PROCESSES)
    turns, distinct, batches = (1, 8, 14) if args.quick else (5, 48, 24)
    with Worker("machine", Setting(side=512)) as machine:
        about = machine.hello
    alone, together = [], []
    for name, (width, height) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"x/{n}.jpg" for n in range(distinct)]
            paths[0].parent.mkdir()
            for n, path in enumerate(paths):
                path.write_bytes(jpeg(width, height, n))
            store = Store("x", folder)
            pieces = [Piece(path.name, 0, path.stat().st_size) for path in paths]
            contents = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths]
            for draft in (False, True) if min(width, height) * 0.875 >= 2 * SIDE else (False,):
                how = Square(SIDE, 0.875, False, draft)
                bare, ours = alternate(
                    turns,
                    lambda contents=contents: rate(len(contents), lambda: [decode_jpeg(one) for one in contents]),  # type: ignore[misc]
                    lambda s=store, p=pieces, h=how: rate(len(p), lambda: feed.read(s, p, h)),  # type: ignore[misc]
                )
                label = f"{name}{', draft' if draft else ''}"
                alone.append((label, f"{median(bare):,.0f}", f"{median(ours):,.0f}", f"{ratio(ours, bare):.2f}"))
                many = (batches * BATCH) // distinct + 1
                streams = Streams((paths * many)[: batches * BATCH], store, (pieces * many)[: batches * BATCH], how)
                usual, fed = alternate(1 if args.quick else 2, streams.usual, streams.ours)
                together.append((label, f"{median(usual):,.0f}", f"{median(fed):,.0f}", f"{ratio(fed, usual):.2f}"))
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
    if args.results is not None:
        report.write(args.results / "decoding.md")


if __name__ == "__main__":
    main()
