"""What computed a network: one record for each step that made it, in order, kept in git with the cell's measures.

`model/provenance.json` goes with the weights through predictions to `metrics.json`, key `provenance`. It says what the
recipe does not: the precision that the device really did, whose kernels, how many threads, which versions. A re-run
on the same machine with the same record is byte for byte the same.
"""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor

from longtail.networks import kernels
from longtail.workflow import files, processes
from longtail.workflow.fingerprint import versions

FILE = "provenance.json"
NUMERIC = ("python", "numpy", "torch", "torchvision")  # the versions that can change a digit


def record(step: str, device: torch.device, **facts: Any) -> dict[str, Any]:
    """What computes here: `step` and `facts`, the device, its instructions, our kernels, threads and versions."""
    on_cpu = device.type == "cpu"
    return {
        "step": step, **facts, "device": device.type if on_cpu else torch.cuda.get_device_name(device),
        "instructions": instructions() if on_cpu else None,
        "kernels": on_cpu and kernels.library() is not None,
        "compiler": compiler() if on_cpu else None,
        "threads": torch.get_num_threads(), "processes": processes.world(),
        "versions": numeric_versions(),
    }  # fmt: skip


def numeric_versions() -> dict[str, str]:
    """The versions that can change a digit; of Python without its last part, which changes none."""
    found = {name: version for name, version in versions().items() if name in NUMERIC}
    return {**found, "python": found["python"].rpartition(".")[0]}


def instructions() -> str:
    """The widest instructions that PyTorch and oneDNN use on this processor: `AVX512 bf16 AMX`, `AVX2`, ..."""
    here = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    bf16 = here and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return " ".join([torch.backends.cpu.get_cpu_capability(), *["bf16"] * bf16, *["AMX"] * (bf16 and kernels.amx())])


def compiler() -> str | None:
    """The first line of what the kernels' compiler says of itself; None without kernels."""
    with suppress(OSError, SubprocessError):
        return kernels.compiler_version() if kernels.library() is not None else None
    return None


def write(model: str | Path, made: Iterable[Mapping[str, Any]]) -> None:
    """Write the records of a network into its folder."""
    files.write_json(Path(model) / FILE, [*made])


def read(model: str | Path) -> list[dict[str, Any]]:
    """The records of a network; none where it was trained before they were kept."""
    path = Path(model) / FILE
    return list(files.read_json(path)) if path.exists() else []


def digest(state: Any) -> str:
    """The SHA-256 of all tensors in nested dictionaries and lists, in their order, whatever they are called."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for item in value.values():
                add(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)

    add(state)
    return found.hexdigest()
