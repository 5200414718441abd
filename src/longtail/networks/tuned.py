"""Pretrained backbones that are fine-tuned: a frozen trunk, and the last groups and a head for each expert.

The experts start from copies of the same pretrained groups, as BalPoE's (Sanchez Aimar et al., CVPR 2023) share the
first groups and have the last ones to themselves. In training, nothing but batch norm differs from evaluation: dropout
and stochastic depth are off, because they would draw where no resume could draw again.

B batch, C classes, D features, E experts, R the backbone's resolution.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.networks import HEADS, Network, backbones

LISTS = ("blocks", "features", "layers", "stages")  # what timm and torchvision call a network's list of groups
TRIED = 64  # pixels of the image with which a cut is tried
PART = 64  # images at a time where no gradient is asked for, whatever the batch: at R pixels they are large


class Tuned(Network):
    """Images (B, 1 or 3, H, W) in [0, 1] to logits (E, B, C) in float32.

    They are scaled and normalised as the weights want it, within the network: a file of it has all that
    prediction needs.

    Attributes:
        trunk: frozen; empty where all groups are trained.
        experts: the last groups, `body`, and the `head` of each.
        settings: of `build`; `mean` and `std` are those of images that are left as they are.
    """

    trunk: nn.Sequential

    def __init__(self, settings: dict[str, Any], network: nn.Module):
        super().__init__(settings)
        wants = settings["backbone"]
        trunk, body = cut(network, settings["trained_groups"])
        trunk.requires_grad_(False)
        self.trunk = trunk
        with torch.no_grad():
            width = pooled(body(trunk(torch.zeros(1, 3, wants["resolution"], wants["resolution"])))).shape[1]
        self.experts = nn.ModuleList(
            TunedExpert(copy.deepcopy(body), HEADS[settings["head"]](width, settings["classes"], settings["scale"]))
            for _ in range(settings["experts"])
        )
        self.prepare = Prepare(wants["resolution"], wants["mean"], wants["std"])

    def before(self, images: Tensor) -> Tensor:
        """What the experts get, (B, ...): images at the backbone's resolution, normalised, through the trunk."""
        with torch.no_grad():
            x: Tensor = self.trunk(self.prepare(images).contiguous(memory_format=torch.channels_last))
        return x

    def after(self, x: Tensor) -> Tensor:
        """Logits (E, B, C) of what `before` gave."""
        return torch.stack([expert(x) for expert in self.experts])

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.before(images))

    def train(self, mode: bool = True) -> "Tuned":
        """Training differs by batch norm's statistics alone, where they are those of the batch."""
        super().train(False)
        self.training = mode
        if mode and self.settings["norm_statistics"] == "batch":
            for module in self.experts.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train()
        return self


class Prepare(nn.Module):
    """Images (B, 1 or 3, H, W) in [0, 1] as weights want them: (B, 3, R, R), grey repeated, bicubic, normalised."""

    mean: Tensor
    std: Tensor

    def __init__(self, resolution: int, mean: list[float], std: list[float]):
        super().__init__()
        self.resolution = resolution
        for name, values in (("mean", mean), ("std", std)):  # of the settings, not of the weights
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.expand(-1, 3, -1, -1)
        if x.shape[2:] != (self.resolution, self.resolution):
            x = resized(x, self.resolution).clamp(0, 1)
        return (x - self.mean) / self.std


class Prepared(nn.Module):
    """A frozen backbone with what it wants of images: (B, 1 or 3, H, W) in [0, 1] to features (B, D)."""

    def __init__(self, backbone: backbones.Backbone):
        super().__init__()
        self.prepare = Prepare(backbone.resolution, backbone.mean, backbone.std)
        self.network = backbone.network

    def forward(self, images: Tensor) -> Tensor:
        features_BD: Tensor = self.network(self.prepare(images))
        return features_BD.float()


class TunedExpert(nn.Module):
    """The part that an expert has to itself."""

    def __init__(self, body: nn.Module, head: nn.Module):
        super().__init__()
        self.body, self.head = body.requires_grad_(True), head

    def forward(self, x: Tensor) -> Tensor:
        features_BD = pooled(self.body(x))
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.head(features_BD.float())
        return logits


class Trainable(Network):
    """The experts of a tuned network as a network of their own, which is what is trained, saved and averaged.

    Args:
        tuned: whose experts they are, not copies.
        from_trunk: whether the input is what `Tuned.before` gave, computed once for all epochs, or images.
    """

    def __init__(self, tuned: Tuned, *, from_trunk: bool):
        nn.Module.__init__(self)
        whole = {"mean": [0.0], "std": [1.0]} if from_trunk else {}
        self.settings = tuned.settings | whole
        self.experts = tuned.experts
        self.from_trunk = from_trunk
        self.__dict__["tuned"] = tuned  # the trunk is not a part of it

    def forward(self, x: Tensor) -> Tensor:
        """Images in [0, 1], or what the trunk made of them, to logits (E, B, C)."""
        if torch.is_grad_enabled():
            return self._logits(x)
        return torch.cat([self._logits(part) for part in torch.split(x, PART)], 1)

    def _logits(self, x: Tensor) -> Tensor:
        tuned: Tuned = self.__dict__["tuned"]
        return tuned.after(x.contiguous(memory_format=torch.channels_last) if self.from_trunk else tuned.before(x))

    def train(self, mode: bool = True) -> "Trainable":
        """As Tuned.train."""
        self.training = mode
        self.__dict__["tuned"].train(mode)
        return self

    def pretrained(self) -> list[nn.Parameter]:
        """The parameters that start from the backbone's weights: all but the heads'."""
        experts: list[Any] = [*self.experts]
        return [value for expert in experts for value in expert.body.parameters()]


def resized(x: Tensor, side: int) -> Tensor:
    """Images (B, 3, H, W) to (B, 3, side, side), bicubic with antialiasing.

    Where a file is exported it is the same linear map as two matrix products, which every ONNX runtime has.
    """
    if not torch.compiler.is_exporting():
        return F.interpolate(x, (side, side), mode="bicubic", antialias=True)
    height, width = x.shape[2:]
    return matrix(height, side) @ x @ matrix(width, side).T


def matrix(old: int, new: int) -> Tensor:
    """The matrix (new, old) by which bicubic scaling with antialiasing makes `new` pixels of `old`."""
    return F.interpolate(torch.eye(old)[None, None], (new, old), mode="bicubic", antialias=True)[0, 0]


def pooled(x: Tensor) -> Tensor:
    """Features (B, D): the mean over places where a network leaves them."""
    return x.mean((2, 3)) if x.ndim == 4 else x


# --------------------------------------------------------------------------------------------------- groups


def pieces(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A backbone's parts by name, in their order; its list of groups taken apart."""
    for name, child in network.named_children():
        if name in LISTS and isinstance(child, nn.Sequential):
            yield from ((f"{name}.{inner}", module) for inner, module in child.named_children())
        else:
            yield name, child


def starts(parts: list[tuple[str, nn.Module]]) -> list[int]:
    """Where groups begin: at parts that are made of layers with matrices; a lone layer belongs to the group before."""
    return [
        n for n, (_, part) in enumerate(parts)
        if any(True for _ in part.children()) and any(value.ndim > 1 for value in part.parameters())
    ]  # fmt: skip


def cut(network: nn.Module, trained: int | Literal["all"]) -> tuple[nn.Sequential, nn.Module]:
    """Trunk and body of a backbone without its classifier, the last `trained` groups and what follows them.

    Raises ValueError where it has not so many groups, or where its parts, one after the other, are not the network.
    """
    if trained == "all":
        return nn.Sequential(), network
    parts = list(pieces(network))
    begins = starts(parts)
    if not trained <= len(begins):
        raise ValueError(
            f"trained_groups: {trained}, but the backbone has {len(begins)}: "
            f"{', '.join(parts[n][0] for n in begins)}; allowed are 1 to {len(begins)}, and all"
        )
    at = begins[-trained]
    trunk, body = (nn.Sequential(*(part for _, part in some)) for some in (parts[:at], parts[at:]))
    x = torch.linspace(-1, 1, 2 * 3 * TRIED * TRIED).view(2, 3, TRIED, TRIED)
    try:
        with torch.no_grad():
            same = torch.allclose(pooled(body(trunk(x))), network(x), rtol=1e-3, atol=1e-4)
    except (AssertionError, RuntimeError, TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(
            f"trained_groups: {trained}: this backbone is more than its parts one after the other "
            f"({', '.join(name for name, _ in parts)}); allowed is all"
        )
    return trunk, body


# ---------------------------------------------------------------------------------------- making and keeping


def start(
    backbone: dict[str, Any], *, channels: int, classes: int, experts: int, head: str, scale: float,
    trained_groups: int | Literal["all"], norm_statistics: str, seed: int,
) -> Tuned:  # fmt: skip
    """A network that starts from pretrained weights; the heads are drawn with `seed`.

    Args:
        backbone: a block of params.yaml, as `backbones.load` takes it.
        trained_groups: how many of the last groups are trained, or all; the others are shared.
        norm_statistics: frozen, those of pretraining, or batch.

    Raises ValueError as `backbones.load` and `cut`.
    """
    made = backbones.load(**backbone)
    torch.manual_seed(seed)
    settings = {
        "backbone": made.facts, "trained_groups": trained_groups, "norm_statistics": norm_statistics,
        "channels": channels, "classes": classes, "experts": experts, "head": head, "scale": scale,
        "mean": [0.0] * channels, "std": [1.0] * channels,
    }  # fmt: skip
    return Tuned(settings, made.network)


def is_tuned(path: str | Path) -> bool:
    """Whether a file of weights is that of a tuned network."""
    with safetensors.safe_open(path, "pt") as file:
        return "trained_groups" in json.loads((file.metadata() or {}).get("network", "{}"))


def load(path: str | Path, device: str | torch.device = "cpu") -> Tuned:
    """A tuned network as `networks.save` wrote it, in evaluation mode; no weights file of the backbone is needed.

    Raises ValueError naming a file that is none.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["network"])
        wants = {key: settings["backbone"][key] for key in ("library", "network", "resolution", "mean", "std")}
        made = Tuned(settings, backbones.load(**wants, weights="none").network)
        made.load_state_dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a fine-tuned network ({error})") from error
    return made.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
