"""The machine: what it is, and its rate in a large matrix product. Started by the programs as a process of its own."""

import os
from time import perf_counter

import torch

from benchmarks.common import DEVICE, PRECISION
from benchmarks.harness import Setting, serve
from longtail.training import inference
from longtail.training import machine as this_machine

TRIES = 3


def product_rate(side: int) -> float:
    """Floating-point operations a second of a square matrix product in the trainings' precision; the best of a few."""
    left, right = torch.randn(2, side, side).to(inference.DTYPES[PRECISION])
    out = torch.empty_like(left)
    seconds = []
    for _ in range(TRIES):
        start = perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(perf_counter() - start)
    return 2 * side**3 / min(seconds)


if __name__ == "__main__":
    side = Setting.from_command_line().side
    about = {**this_machine.describe(DEVICE), "cores": len(os.sched_getaffinity(0)), "precision": PRECISION}
    product_rate(side)  # warm
    serve(about, {"product": lambda: product_rate(side)})
