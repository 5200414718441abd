"""Where a training step's time goes: convolutions, batch norm with ReLU, and the rest.

python -m benchmarks.profile            # a minute; writes benchmarks/results/profile.md
python -m benchmarks.profile --quick    # seconds; prints only

Clocks around the engine's own operations, on the CPU with compiled kernels; PyTorch's profiler slows small operations
so much that its shares are wrong here.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from benchmarks.harness import Report, Setting, Worker, flags, machine_line, serve

PARTS = {  # attribute of longtail.networks.fused's modules -> the row of the table
    ("F", "conv2d"): "convolutions, forward",
    ("kernels", "convolution_backward"): "convolutions, gradients of activations and weights",
    ("kernels", "forward"): "batch norm, residual, ReLU: forward",
    ("kernels", "backward"): "batch norm, residual, ReLU: backward",
}
QUICK = Setting(depth=8, images=64, batch_size=16, turn=64, side=512)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    args = flags(__doc__, argv)
    base = QUICK if args.quick else Setting()
    settings = [replace(base, experts=experts) for experts in ((1,) if args.quick else (1, 3))]
    measured = []
    for setting in settings:
        with Worker("profile", setting) as work:
            measured.append(work.ask("shares"))
    report = Report()
    with Worker("machine", base) as machine:
        about = machine_line(machine.hello)
    report.say(
        "# Where a step's time goes", "", about, "",
        f"ResNet-{base.depth}, batches of {base.batch_size}; share of the step, and milliseconds.",
    )  # fmt: skip
    rows = [[part, *(f"{100 * share[part] / share['step']:.0f} % ({1e3 * share[part]:.1f})" for share in measured)]
            for part in (*PARTS.values(), "the rest", "step")]  # fmt: skip
    report.table(("Part", *(f"{setting.experts} expert(s)" for setting in settings)), rows)
    if args.results is not None:
        report.write(args.results / "profile.md")


def shares(setting: Setting) -> dict[str, float]:
    """Seconds of a step, by part."""
    from benchmarks.common import Bench
    from longtail.networks import fused, kernels

    bench = Bench(setting)
    seconds: defaultdict[str, float] = defaultdict(float)
    if kernels.library() is None:
        raise RuntimeError("without compiled kernels there is nothing to put clocks around")
    bench.warm_up()

    def clocked(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = perf_counter()
            result = function(*arguments)
            seconds[part] += perf_counter() - start
            return result

        return call

    for (module, name), part in PARTS.items():
        owner = getattr(fused, module)
        setattr(owner, name, clocked(getattr(owner, name), part))
    _, whole = bench.step()
    steps = setting.steps
    parts = {part: seconds[part] / steps for part in PARTS.values()}
    return {**parts, "the rest": whole / steps - sum(parts.values()), "step": whole / steps}


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):  # a Worker's own process
        chosen = Setting.from_command_line()
        serve({}, {"shares": lambda: shares(chosen)})
    else:
        main()
