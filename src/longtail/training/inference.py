"""From images to logits: the last step that needs a network. What follows takes seconds and no torch."""

import ctypes
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longtail import networks
from longtail.data import batches
from longtail.training import provenance
from longtail.workflow import files

PREDICT_BATCH = 512  # images; does not change a prediction by more than rounding
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPLITS = ("train", "held_out", "test")


def find_device() -> torch.device:
    """LONGTAIL_DEVICE, or the first GPU, or the CPU."""
    local = os.environ.get("LOCAL_RANK", "0")  # torchrun's: each process has a GPU of its own
    name = os.environ.get("LONGTAIL_DEVICE") or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"LONGTAIL_DEVICE={name}: no such device here ({str(error).splitlines()[0]})") from error


def precision_on(device: torch.device, precision: str) -> str:
    """What a device does of a recipe's precision: instead of bf16, GPUs without it do fp16, and CPUs fp32."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    if precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        return "fp32"
    return precision


def cpu_has_bf16() -> bool:
    """Whether PyTorch's convolutions multiply bfloat16 on this processor."""
    here: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return here and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def keep_memory() -> None:
    """Have the C library keep the memory that a step frees: the next one needs the same, and new pages cost a sixth."""
    no_mmap, no_trim, grow_by = (-4, 0), (-1, 2**31 - 1), (-2, 2**28)  # glibc's M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option in (no_mmap, no_trim, grow_by):
            mallopt(*option)


def set_up(seed: int) -> None:
    """Seed the initialisation and allow deterministic algorithms and true float32 only."""
    keep_memory()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
    torch.manual_seed(seed)
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would import the compiler: 1.3 s
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False


def logits(network: networks.Network, split: batches.Split, *, precision: str) -> Tensor:
    """Logits (E, N, C) of a split in its order, without augmentation, float32 on the CPU."""

    def parts() -> Iterator[Tensor]:
        stream = batches.in_order(
            split,
            batch_size=PREDICT_BATCH,
            mean=network.settings["mean"],
            std=network.settings["std"],
            channels_last=True,
        )
        for images in stream:
            with torch.autocast(images.device.type, DTYPES[precision], enabled=precision != "fp32"):
                yield network(images).cpu()

    network.eval()
    with torch.inference_mode():
        return torch.cat([*parts()], dim=1)


def predict(data: str, model: str, out: str) -> None:
    """Write the logits (E, N, C) of every split, without augmentation, for the last and the best network.

    Prediction is in float32 whatever the training's precision, so that it adds no rounding of its own.
    What made the network and the logits goes with them (`provenance`, JSON).

    Raises ValueError when the weights are no network or do not fit the images.
    """
    arrays = files.load_arrays(data)
    device, classes = find_device(), len(arrays["class_names"])
    set_up(0)  # nothing is drawn; deterministic algorithms
    epochs = files.read_json(Path(model) / "epochs.json")
    predictions: dict[str, np.ndarray] = {
        "class_names": arrays["class_names"],
        "class_counts": np.bincount(arrays["train_labels"], minlength=classes),
    }
    nets = {which: networks.load(Path(model) / f"{which}.safetensors", device) for which in sorted(epochs)}
    for name in SPLITS:
        predictions[f"{name}_labels"] = arrays[f"{name}_labels"]
        if not len(arrays[f"{name}_labels"]):
            continue
        split = batches.Split.from_arrays(arrays[f"{name}_images"], arrays[f"{name}_labels"], classes, device)
        for which, network in nets.items():
            predictions[f"{which}_{name}_logits"] = logits(network, split, precision="fp32").numpy()
    made = [*provenance.read(model), provenance.record("predict", device, precision="fp32")]
    predictions["provenance"] = np.array(json.dumps(made))
    for which, epoch in epochs.items():
        predictions[f"{which}_epoch"] = np.array(epoch)
    files.save_arrays(out, **predictions)
