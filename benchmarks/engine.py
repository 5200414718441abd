"""How much of the machine training uses, and how it compares with the straightforward loop.

python -m benchmarks.engine            # under ten minutes on two cores; writes benchmarks/results/engine.md
python -m benchmarks.engine --quick    # seconds; prints only
python -m benchmarks.engine --loop     # the second part alone; prints only
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.harness import Report, Setting, Worker, alternate, flags, machine_line, ratio

AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "crop, flip": {},
    "crop, flip, AutoAugment, Cutout": {"policy": "autoaugment_cifar10", "cutout": 16},
    "crop, flip, mixup 0.4": {"mixup_alpha": 0.4},
}
TURNS = {1: 5, 3: 5, 7: 3}  # by experts: a turn with seven takes long
LOOP_TURNS, LOOP_TURN = 5, 1024
LOOPS = [(1, 128), (3, 128), (1, 64), (3, 64)]  # experts, batch size
QUICK = Setting(depth=8, images=64, batch_size=16, turn=64, side=512)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    args = flags(__doc__, argv, "--loop")
    base = QUICK if args.quick else Setting()
    report = Report()
    with Worker("machine", base) as machine:
        report.say("# The engine's speed", "", machine_line(machine.hello), "")
        if not args.loop:
            of_the_machine(report, base, {3: 1} if args.quick else TURNS, machine)
        precision = machine.hello["precision"]
    report.say(
        "## Against the straightforward loop", "",
        "Steps on ready batches, the two in turns: eager PyTorch as one writes it (benchmarks/straightforward.py), in "
        f"{precision}{'' if precision == 'bf16' else ', since this CPU has no bf16'} as the engine.",
    )  # fmt: skip
    loops = [(3, QUICK.batch_size)] if args.quick else LOOPS
    loop_base, loop_turns = (base, 1) if args.quick else (replace(base, turn=LOOP_TURN), LOOP_TURNS)
    report.table(
        ("Experts, batch size", "Straightforward (images/s)", "Engine (images/s)", "Engine / straightforward"),
        (against_loop(replace(loop_base, experts=experts, batch_size=size), loop_turns) for experts, size in loops),
    )
    if args.results is not None and not args.loop:
        report.write(args.results / "engine.md")


def of_the_machine(report: Report, base: Setting, turns: Mapping[int, int], machine: Worker) -> None:
    """The first part: what training takes of the machine."""
    report.say(
        f"ResNet-{base.depth}, batches of {base.batch_size}, {base.images:,} images of 32x32 in {base.classes} "
        "classes. Rates are medians over turns, and ratios are medians of the turns' own ratios.", "",
        "Share of peak: what the convolutions and the head of a training step compute (three times what PyTorch's "
        "counter finds in a forward pass in evaluation mode; a multiply-add is two operations), over the rate of "
        f"a matrix product of side {base.side} in {machine.hello['precision']}, measured in the same turn.",
    )  # fmt: skip
    seen: dict[str, list[float]] = {"loaded": [], "peak": []}
    report.table(
        ("Experts, augmentation", "Bare step (images/s)", "Epoch (images/s)", "Epoch / bare", "Share of peak, bare",
         "Share of peak, epoch", "Peak memory (MB)"),
        (
            training_row(replace(base, experts=experts, **changes), f"{experts}, {name}", count, machine, seen)
            for experts, count in turns.items()
            for name, changes in AUGMENTATIONS.items()
        ),
    )  # fmt: skip
    report.say(
        f"The matrix product runs at {median(seen['peak']) / 1e9:,.0f} GFLOP/s. Of the memory, "
        f"{median(seen['loaded']):,.0f} MB are Python and PyTorch before there is a network.", "",
    )  # fmt: skip


def training_row(setting: Setting, name: str, turns: int, machine: Worker, seen: dict[str, list[float]]) -> list[str]:
    """A row of the first table; adds to `seen` what is the same for all rows."""
    with Worker("common", setting) as work:
        bare, epoch, peak = alternate(
            turns, lambda: work.rate("step"), lambda: work.rate("epoch"), lambda: machine.ask("product")
        )
        memory = work.ask("peak memory")  # before the counter of operations takes some
        flops = work.ask("flops")
        seen["loaded"].append(work.hello["loaded"])
        seen["peak"] += peak
    shares = [f"{100 * flops * ratio(rates, peak):.0f} %" for rates in (bare, epoch)]
    return [
        name,
        f"{median(bare):,.0f}",
        f"{median(epoch):,.0f}",
        f"{ratio(epoch, bare):.2f}",
        *shares,
        f"{memory:,.0f}",
    ]


def against_loop(setting: Setting, turns: int) -> list[str]:
    """A row of the second table."""
    with Worker("straightforward", setting) as loop, Worker("common", setting) as ours:
        slow, fast = alternate(turns, lambda: loop.rate("step"), lambda: ours.rate("step"))
    name = f"{setting.experts}, {setting.batch_size}"
    return [name, f"{median(slow):,.0f}", f"{median(fast):,.0f}", f"{ratio(fast, slow):.2f}"]


if __name__ == "__main__":
    main()
