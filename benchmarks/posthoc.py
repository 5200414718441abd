"""Corrections of 50,000 x 8,142 logits: time against one pass of logsumexp over the same array, memory beside it.

python -m benchmarks.posthoc            # under a minute; writes benchmarks/results/posthoc.md
python -m benchmarks.posthoc --quick    # seconds; prints only
"""

from collections.abc import Sequence
from time import perf_counter

import numpy as np
from scipy.special import logsumexp

from benchmarks.harness import Report, Setting, Worker, flags, machine_line, peak_memory
from longtail import posthoc

FULL, QUICK = (50_000, 8_142), (500, 80)
MADE = (
    *(posthoc.EnergyAligning(reading) for reading in posthoc.READINGS),
    posthoc.PredictionRebalancing(),
    posthoc.LogitAdjustment(),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    args = flags(__doc__, argv)
    samples, classes = QUICK if args.quick else FULL
    with Worker("machine", Setting(side=512)) as machine:
        about = machine.hello
    rng = np.random.default_rng(0)
    logits = np.empty((samples, classes), np.float32)
    for row in logits:
        rng.standard_normal(out=row, dtype=np.float32)
    labels = rng.permutation(np.arange(samples) % classes)
    loaded = peak_memory()
    rows = []
    for correction in MADE:  # first: their peak is measured, and scipy's is far above it
        start = perf_counter()
        correction.fit(logits, labels)
        fitted = perf_counter()
        correction.transform(logits, out=logits)
        rows.append((correction, fitted - start, perf_counter() - start, peak_memory() - loaded))
    start = perf_counter()
    logsumexp(logits, axis=1)
    scipy_s = perf_counter() - start

    import torch  # after the others: it takes memory of its own

    start = perf_counter()
    torch.logsumexp(torch.from_numpy(logits), 1)
    torch_s = perf_counter() - start
    report = Report()
    report.say(
        "# Post-hoc corrections of many classes", "", machine_line(about), "",
        f"{samples:,} x {classes:,} logits in float32 ({logits.nbytes / 1e6:,.0f} MB), corrected in place; ours in one "
        f"thread. One pass of logsumexp over the same array: scipy {scipy_s:.2f} s, PyTorch {torch_s:.2f} s. "
        "Memory is the peak above what the process had with the logits.",
    )  # fmt: skip
    report.table(
        ("Correction", "Fit (s)", "Fit and transform (s)", "/ scipy's pass", "/ PyTorch's pass", "Memory (MB)"),
        [
            [repr(made), *(f"{value:.2f}" for value in (fit, both, both / scipy_s, both / torch_s)), f"{memory:,.0f}"]
            for made, fit, both, memory in rows
        ],
    )  # fmt: skip
    if args.results is not None:
        report.write(args.results / "posthoc.md")


if __name__ == "__main__":
    main()
