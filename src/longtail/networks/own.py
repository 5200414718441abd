"""Heads without the network before them: each expert's on the features that are its own.

Experts that share a part of a network alone have features of their own. Laid side by side, E experts of D features are
E x D features of an image, of which each head takes its D. So what follows training needs no images, and no network.

B batch, C classes, D features, E experts.
"""

import copy
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from longtail.networks import HEADS, Network, kind_of

KEY = "own_features"  # of a file's settings: D


class Alone(nn.Module):
    """An expert that is a head and nothing else."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x)
        return logits


class OwnHeads(Network):
    """Features (B, E D, 1, 1), each expert's after the other's, to logits (E, B, C) in float32.

    Args:
        settings: own_features, classes, experts, head and scale; channels, mean and std are those of such features.
    """

    def __init__(self, settings: dict[str, Any]):
        super().__init__(settings)
        self.experts = nn.ModuleList(
            Alone(HEADS[settings["head"]](settings[KEY], settings["classes"], settings["scale"]))
            for _ in range(settings["experts"])
        )

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            parts = torch.split(images.flatten(1).float(), self.settings[KEY], 1)
            return torch.stack([expert(part) for expert, part in zip(self.experts, parts, strict=True)])


def heads_of(network: Network) -> OwnHeads:
    """Copies of the heads of a network."""
    experts: Any = network.experts
    first = experts[0].head
    classes, features = first.weight.shape
    made = OwnHeads({
        KEY: features, "classes": classes, "experts": len(experts), "head": kind_of(first),
        "scale": getattr(first, "scale", 1.0), "channels": features * len(experts), "mean": [0.0], "std": [1.0],
    })  # fmt: skip
    for mine, expert in zip(made.experts, experts, strict=True):
        mine.head = copy.deepcopy(expert.head)
    return made


def is_own(path: str | Path) -> bool:
    """Whether a file of weights is that of heads without their network."""
    with safetensors.safe_open(path, "pt") as file:
        return KEY in json.loads((file.metadata() or {}).get("network", "{}"))


def load(path: str | Path, device: str | torch.device = "cpu") -> OwnHeads:
    """Heads as `networks.save` wrote them, in evaluation mode."""
    with safetensors.safe_open(path, "pt") as file:
        made = OwnHeads(json.loads((file.metadata() or {})["network"]))
    made.load_state_dict(safetensors.torch.load_file(path))
    return made.to(device).eval()
