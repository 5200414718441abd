"""Augmented batches without a network: ours against a DataLoader with torchvision's transforms on Pillow images.

python -m benchmarks.data_path            # a minute; writes benchmarks/results/data_path.md
python -m benchmarks.data_path --quick    # seconds; prints only
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from benchmarks.harness import Report, Setting, Worker, alternate, flags, machine_line, ratio

FULL = Setting(images=10_847, policy="autoaugment_cifar10", cutout=16)  # as many as CIFAR-100-LT with IF 100
TURNS = 5


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    args = flags(__doc__, argv)
    setting = replace(FULL, depth=8, images=256, batch_size=64, side=512) if args.quick else FULL
    report = Report()
    with Worker("machine", setting) as machine:
        about = machine.hello
    with Worker("loader", setting) as loader, Worker("common", setting) as ours:
        usual, batched = alternate(1 if args.quick else TURNS, lambda: loader.rate("data"), lambda: ours.rate("data"))
        report.say(
            "# Augmented images a second", "", machine_line(about), "",
            f"{setting.images:,} images of 32x32 in batches of {setting.batch_size}: crop, flip, AutoAugment (policy "
            f"of CIFAR-10), Cutout of {setting.cutout}, float32, normalised; no network. Whole epochs in turns: rates "
            "are medians over turns, the last column is the median of the turns' own ratios.",
        )  # fmt: skip
        named = f"DataLoader, {loader.hello['processes']} processes (images/s)"
    report.table(
        ("Augmentation", named, "longtail.batches (images/s)", "Ours / DataLoader"),
        [["crop, flip, AutoAugment, Cutout", f"{median(usual):,.0f}", f"{median(batched):,.0f}",
          f"{ratio(batched, usual):.1f}"]],
    )  # fmt: skip
    if args.results is not None:
        report.write(args.results / "data_path.md")


if __name__ == "__main__":
    main()
