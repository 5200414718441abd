"""How long would each recipe take, all of them on the same machine with the same code, in turns?

python -m benchmarks.recipe_time                      # three minutes; OMP_NUM_THREADS as for the cells
python -m benchmarks.recipe_time --recipes short gala --methods ce gala --results FOLDER
python -m benchmarks.recipe_time --quick

Cells are trained on different days, by different versions of the code, beside different work, so their minutes do not
say what a recipe takes. Here a whole training is put together from what is measured side by side: its epochs, at each
size that images have in it, and its looks at test images. Images are random bytes.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import yaml

from benchmarks.harness import RESULTS, ROOT, Report, alternate, ratio
from longtail import training
from longtail.data import batches
from longtail.training import inference, machine
from longtail.training.engine import Training, class_accuracy, scale_of

CLASSES, TRAIN, TEST = 100, 10_847, 10_000  # CIFAR-100-LT, imbalance factor 100


def main(argv: Sequence[str] | None = None) -> None:
    """Measure in turns, put together, compare with the recipe that is named last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["fast", "balpoe"], help="shares are of the last one's time")
    parser.add_argument("--methods", nargs="+", default=["balanced_softmax", "balpoe"])
    parser.add_argument("--images", type=int, default=2048, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few images, one turn: says only that it runs")
    parser.add_argument("--results", type=Path, help="folder to write to (default: benchmarks/results)")
    args = parser.parse_args(argv)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for flag, block in (("recipes", params["recipes"]), ("methods", params["methods"])):
        if unknown := [name for name in getattr(args, flag) if name not in block]:
            parser.error(f"--{flag} {unknown[0]}: params.yaml has {', '.join(block)}")
    images, turns = (128, 1) if args.quick else (args.images, args.turns)
    folder = args.results or (None if args.quick else RESULTS)
    report, about = Report(), machine.describe(torch.device("cpu"))
    report.say(
        "# What each recipe takes, measured side by side", "",
        f"{about['cpu']}; threads: {about['threads']}; PyTorch {about['torch']}.", "",
        f"Trainings on {TRAIN:,} images, as CIFAR-100-LT has with IF 100, and their looks at {TEST:,} test images, put "
        f"together from {turns} turn(s) of {images} images for each part; medians. Share: of the time of the method's "
        "last line, turn by turn.",
    )  # fmt: skip
    lines = []
    for method in args.methods:
        benches = [Bench(params["recipes"][name], method, params["methods"][method], images) for name in args.recipes]
        seconds = alternate(turns, *(bench.whole_training for bench in benches))
        for name, bench, mine in zip(args.recipes, benches, seconds, strict=True):
            epochs = ", ".join(f"{count} of {scale * 32:g} px" for scale, count in Counter(bench.scales).items())
            lines.append([
                f"{method} · {name}", epochs, str(bench.looks), f"{median(mine) / 60:.1f}",
                f"{ratio(mine, seconds[-1]):.3f}",
            ])  # fmt: skip
    report.table(("Method · recipe", "Epochs", "Looks at test", "Minutes", "Share of time"), lines)
    if folder:
        report.write(folder / "recipe_time.md")


class Bench:
    """One recipe and method, of which each part can be timed.

    Attributes:
        scales: of the images' sides, in each epoch.
        looks: at test images, in the whole training.
    """

    def __init__(self, recipe: Mapping[str, Any], method: str, block: Mapping[str, Any], images: int):
        inference.set_up(0)
        self.scales = [scale_of(epoch, **recipe["resolution"]) for epoch in range(1, recipe["epochs"] + 1)]
        self.looks = recipe["epochs"] // recipe["test_every"] if recipe["test_every"] else 0
        labels = torch.arange(images) % CLASSES  # a long tail would take as long
        pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8)
        self.split = batches.Split(pixels, labels, CLASSES)
        network, loss = training.build(self.split, method, dict(block), **recipe)
        about_others = ("network", "normalization", "test_every")
        settings = {key: value for key, value in recipe.items() if key not in about_others}
        self.training = Training(network, loss, self.split, seed=0, **settings)

    def whole_training(self) -> float:
        """Seconds of all epochs and looks, from a turn of each kind."""
        total = 0.0
        for scale, epochs in Counter(self.scales).items():
            self.training.epoch = self.scales.index(scale)  # the one before the first that has this scale
            self.training.next_epoch()
            start = perf_counter()
            images = self.training.finish_epoch(lambda: None)
            total += epochs * TRAIN * (perf_counter() - start) / images
        if self.looks:
            start = perf_counter()
            class_accuracy(self.training.averaged(), self.split, precision=self.training.precision)
            total += self.looks * TEST * (perf_counter() - start) / len(self.split)
        return total


if __name__ == "__main__":
    main()
