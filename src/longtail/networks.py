"""Networks whose logits have shape (E, B, C): experts x batch x classes.

ResNets for 32x32 images (He et al., CVPR 2016, section 4.2; depth 6n + 2, shortcut option A: subsample and pad with
zeros). The stem and the first group of blocks are shared; the other two groups and the head belong to each expert
(Sanchez Aimar et al., CVPR 2023). A network carries its own settings and its normalisation, so a weights file says all
that prediction needs.

B batch, C classes, E experts, D features (4 * width).
"""

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail import files, fused, kernels


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a parameter-free shortcut (option A)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.new_channels = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + fused.shortcut(x, self.stride, self.new_channels), inplace=True)


class LinearHead(nn.Linear):
    """Dot products plus bias."""

    def __init__(self, features: int, classes: int, scale: float):
        super().__init__(features, classes)


class CosineHead(nn.Module):
    """scale * cosine between feature and class weight; no bias (BalPoE's classifier, scale 30)."""

    def __init__(self, features: int, classes: int, scale: float):
        super().__init__()
        self.scale = scale
        weight = torch.empty(classes, features).uniform_(-1, 1)
        self.weight = nn.Parameter(F.normalize(weight, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


HEADS = {"linear": LinearHead, "cosine": CosineHead}


class Expert(nn.Module):
    """The part that an expert has to itself: the second and third group of blocks and a head."""

    def __init__(self, blocks: int, width: int, classes: int, head: str, scale: float):
        super().__init__()
        self.group2 = group(blocks, width, 2 * width, stride=2)
        self.group3 = group(blocks, 2 * width, 4 * width, stride=2)
        self.head = HEADS[head](4 * width, classes, scale)

    def forward(self, x: Tensor) -> Tensor:
        features_BD = run_blocks(x, [*self.group2, *self.group3]).mean((2, 3))
        with torch.autocast(x.device.type, enabled=False):  # logits in float32, whatever the trunk uses
            return self.head(features_BD.float())


def group(blocks: int, channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """A run of blocks, the first of which changes channels and resolution."""
    first = Block(channels_in, channels_out, stride)
    return nn.Sequential(first, *(Block(channels_out, channels_out, 1) for _ in range(blocks - 1)))


def norm_relu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """relu(norm(x)): compiled kernels in training where they can be had, else PyTorch's operations."""
    if norm.training and kernels.usable(x, norm):
        return fused.norm_relu(x, norm)
    return F.relu(norm(x), inplace=True)


def run_blocks(x: Tensor, blocks: list[Any]) -> Tensor:
    """The blocks one after the other: compiled kernels in training where they can be had, else the modules."""
    if blocks[0].training and kernels.usable(x, blocks[0].bn1):
        return fused.blocks(x, blocks)
    for block in blocks:
        x = block(x)
    return x


class ResNet(nn.Module):
    """A CIFAR ResNet with one or more experts on a shared trunk.

    Args:
        channels: of the image, 1 or 3.
        classes: C.
        experts: E.
        depth: 6n + 2.
        width: channels of the first group; the third has four times as many.
        head: linear or cosine.
        scale: of the cosine head's logits.
        mean, std: normalisation of images in [0, 1], a value a channel; carried along for prediction.
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        experts: int,
        depth: int,
        width: int,
        head: str,
        scale: float,
        mean: list[float],
        std: list[float],
    ):
        super().__init__()
        if not len(mean) == len(std) == channels:
            raise ValueError(f"images have {channels} channel(s), normalization has {len(mean)}")
        self.settings: dict[str, Any] = {
            "channels": channels, "classes": classes, "experts": experts, "depth": depth, "width": width,
            "head": head, "scale": scale, "mean": mean, "std": std,
        }  # fmt: skip
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.group1 = group(blocks, width, width, stride=1)
        self.experts = nn.ModuleList(Expert(blocks, width, classes, head, scale) for _ in range(experts))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, channels, H, W) to logits (E, B, C) in float32."""
        x = run_blocks(norm_relu(self.conv1(images), self.bn1), [*self.group1])
        return torch.stack([expert(x) for expert in self.experts])


def compiled(network: ResNet) -> Any:
    """The network's forward pass, through torch.compile where LONGTAIL_COMPILE=on asks for it.

    What the compiler cannot do runs as it is. On the CPU the compiled kernels of longtail.kernels are faster.
    """
    if os.environ.get("LONGTAIL_COMPILE") != "on":
        return network
    torch._dynamo.config.suppress_errors = True
    return torch.compile(network)


def product(logits_EBC: Tensor) -> Tensor:
    """The prediction (B, C): the mean of the experts' logits, a product of experts; one expert's own logits."""
    return logits_EBC.mean(0)


def to_bytes(network: ResNet) -> bytes:
    """Weights and settings in the safetensors format: the same network gives the same bytes, and nothing is pickled."""
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    return safetensors.torch.save(weights, {"network": json.dumps(network.settings, sort_keys=True)})


def save(network: ResNet, path: str | Path) -> Path:
    """Write the network to a .safetensors file."""
    return files.write_bytes(path, to_bytes(network))


def load(path: str | Path, device: str | torch.device = "cpu") -> ResNet:
    """A network as `save` wrote it, in evaluation mode.

    Raises ValueError naming the file when it is no such file.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["network"])
        network = ResNet(**settings)
        network.load_state_dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a network saved by longtail.networks ({error})") from error
    return network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
