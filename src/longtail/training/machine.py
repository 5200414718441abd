"""What a training's time is worth: which machine made a cell. No out of DVC's: another machine writes another one."""

import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from longtail.networks import kernels
from longtail.workflow import files, processes
from longtail.workflow.fingerprint import versions


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, GPU, threads and processes of this machine."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type, "cpu": cpu, "gpu": gpu, "threads": torch.get_num_threads(),
        "processes": processes.world(),
        "kernels": device.type == "cpu" and kernels.library() is not None, "torch": torch.__version__,
    }  # fmt: skip


def memory_mib(device: torch.device) -> float:
    """The most memory that this process has held at a time: of the GPU where there is one, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def write(model: str | Path, fingerprint: str, device: torch.device, **facts: Any) -> None:
    """Write machine.json beside the folder `model`: the facts, this machine, and the training that they belong to."""
    measured = {"training": fingerprint, **facts, "memory_mib": round(memory_mib(device), 1)}
    machine = {**measured, **describe(device), "versions": versions()}
    files.write_json(Path(model).parent / "machine.json", machine)
