"""How long 'Your images' takes, as a new user types it: a folder of images, a look at it, features and 24 cells.

    python -m benchmarks.your_images [--tune] [--quick]

The folder is made of CIFAR-10's training images as PNG files, the first 500 of one class down to the first 10 of
another; `dvc repro stages/dvc.yaml:download@cifar10` brings them. Everything happens in a copy of this checkout in a
temporary folder, with the packages installed (`.[backbones]`). `--tune` fine-tunes the backbone, too.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness import RESULTS, ROOT, Report
from benchmarks.seconds import copy, timed
from longtail.workflow import files

SOURCE = "data/raw/cifar10.npz"
MOST, LEAST = 500, 10  # images of the largest and of the smallest class
QUICK = 20  # of the largest, where it is only to run
PLAN = "longtailed"


def counts(classes: int, most: int) -> list[int]:
    """Images of each class, exponentially from `most` to LEAST, as Cui et al. (CVPR 2019) cut a tail."""
    return [round(most * (LEAST / most) ** (at / (classes - 1))) for at in range(classes)]


def folder_of(images: np.ndarray, labels: np.ndarray, names: Sequence[str], most: int, folder: Path) -> int:
    """Write PNG files into class folders; returns how many.

    Args:
        images: (N, H, W, 3) uint8.
        labels: (N,), below C.
        names: of the C classes.
    """
    written = 0
    for label, count in enumerate(counts(len(names), most)):
        (folder / names[label]).mkdir(parents=True)
        for number, row in enumerate(np.flatnonzero(labels == label)[:count]):
            Image.fromarray(images[row]).save(folder / names[label] / f"{number:04}.png")
            written += 1
    return written


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write benchmarks/results/your_images.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="the same images with a fine-tuned backbone, too")
    parser.add_argument("--quick", action="store_true", help="few images, one cell: says only that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args(argv)
    if not (ROOT / SOURCE).is_file():
        parser.error(f"{SOURCE} is not there: dvc repro stages/dvc.yaml:download@cifar10")
    saved = files.load_arrays(ROOT / SOURCE, "train_images", "train_labels", "class_names")
    report = Report()
    report.say("# Your images", "", f"{os.cpu_count()} cores; made by `python -m benchmarks.your_images`.", "")
    with tempfile.TemporaryDirectory(prefix="your-images-") as temporary:
        images, tree = Path(temporary) / PLAN, copy(ROOT, Path(temporary) / "tree")
        names = [str(name) for name in saved["class_names"]]
        most = QUICK if args.quick else MOST
        number = folder_of(saved["train_images"], saved["train_labels"], names, most, images)
        report.say(
            f"{number:,} PNG files of {len(names)} classes, {most} to {LEAST}, made of CIFAR-10's training images."
        )
        cells = " --only '*-ce-1'" if args.quick else ""
        for plan, more in ((PLAN, ""), (f"{PLAN}_tuned", " --tune"))[: 1 + args.tune]:
            rows = []
            for command in (f"new {images}{more}", f"run {plan} --jobs 2{cells}"):
                wall, processor = timed(f"python -m longtail.cli {command}", tree)
                rows.append([f"`longtail {command.replace(str(images), 'FOLDER')}`", f"{wall:.0f}", f"{processor:.0f}"])
            report.table(["", "wall, s", "processor, s"], rows)
            text = (tree / f"results/{plan}/table.md").read_text()
            answer = next(line for line in text.splitlines() if line.startswith("**"))
            report.say("", f"What came out: {answer.strip('*')}")
    if not args.quick:
        report.write(args.results / "your_images.md")


if __name__ == "__main__":
    main()
