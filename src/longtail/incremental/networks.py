"""Networks whose head grows, and the pre-activation ResNet of Weight Aligning's release.

E experts, B batch, C classes, D features.
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail import networks
from longtail.networks import Network, kernels
from longtail.networks.fused import norm_relu
from longtail.networks.resnets import check_normalization


class BareLinear(nn.Linear):
    """Dot products without bias (Weight Aligning, Zhao et al., CVPR 2020)."""

    def __init__(self, features: int, classes: int, scale: float):
        super().__init__(features, classes, bias=False)


class PreActivationBlock(nn.Module):
    """Norm and ReLU before each convolution (He et al., ECCV 2016); 1x1 convolution as shortcut where shapes differ."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        different = stride > 1 or channels_in != channels_out
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False) if different else None

    def forward(self, x: Tensor) -> Tensor:
        y = activated(x, self.bn1)
        past = x if self.shortcut is None else self.shortcut(y)
        y = activated(self.conv1(y), self.bn2)
        return past + self.conv2(y)


def activated(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """relu(norm(x)), not in place: a shortcut may still need x."""
    return norm_relu(x, norm) if norm.training and kernels.usable(x, norm) else F.relu(norm(x))


class PreActivationExpert(nn.Module):
    """The second and third group of blocks, the last norm and a head."""

    def __init__(self, blocks: int, width: int):
        super().__init__()
        self.group2 = preactivation_group(blocks, width, 2 * width, 2)
        self.group3 = preactivation_group(blocks, 2 * width, 4 * width, 2)
        self.norm = nn.BatchNorm2d(4 * width)
        self.head: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        features_BD = activated(self.group3(self.group2(x)), self.norm).mean((2, 3))
        with torch.autocast(x.device.type, enabled=False):
            return self.head(features_BD.float())


def preactivation_group(blocks: int, channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """A run of blocks, the first of which changes channels and resolution."""
    first = PreActivationBlock(channels_in, channels_out, stride)
    return nn.Sequential(first, *(PreActivationBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)))


class PreActivationResNet(Network):
    """The pre-activation ResNet for 32x32 images, 16-32-64 channels wide; features are at least 0."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__(settings)
        check_normalization(**{key: settings[key] for key in ("channels", "mean", "std")})
        blocks, width = (settings["depth"] - 2) // 6, settings["width"]
        self.conv1 = nn.Conv2d(settings["channels"], width, 3, 1, 1, bias=False)
        self.group1 = preactivation_group(blocks, width, width, 1)
        self.experts = nn.ModuleList(PreActivationExpert(blocks, width) for _ in range(settings["experts"]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, channels, H, W) to logits (E, B, C) in float32."""
        x = self.group1(self.conv1(images))
        return torch.stack([expert(x) for expert in self.experts])


class TorchvisionExpert(nn.Module):
    """The third and fourth layer of torchvision's ResNet, and a head."""

    def __init__(self, layer3: nn.Module, layer4: nn.Module):
        super().__init__()
        self.layer3, self.layer4 = layer3, layer4
        self.head: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        features_BD = self.layer4(self.layer3(x)).mean((2, 3))
        with torch.autocast(x.device.type, enabled=False):
            return self.head(features_BD.float())


class TorchvisionResNet(Network):
    """Torchvision's ResNet for larger images, which BiC, UCIR, PODNet, DER and the survey have on ImageNet; drawn as
    there. Experts share stem and first two layers.

    Args:
        settings: `architecture` (resnet18, resnet34 or resnet50) and those of every network.
    """

    def __init__(self, settings: dict[str, Any]):
        from torchvision import models  # seconds and 160 MB that the small networks do without

        super().__init__(settings)
        check_normalization(**{key: settings[key] for key in ("channels", "mean", "std")})
        parts = [getattr(models, settings["architecture"])() for _ in range(settings["experts"])]
        whole = parts[0]
        self.conv1, self.bn1 = whole.conv1, whole.bn1
        self.layer1, self.layer2 = whole.layer1, whole.layer2
        self.features = int(whole.fc.in_features)
        self.experts = nn.ModuleList(TorchvisionExpert(part.layer3, part.layer4) for part in parts)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to logits (E, B, C) in float32."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images)), inplace=True), 3, 2, 1)
        x = self.layer2(self.layer1(x))
        return torch.stack([expert(x) for expert in self.experts])


def build(**settings: Any) -> Network:
    """A network of these settings, those of longtail.networks and two more.

    Args:
        body: option_a (longtail.networks.ResNet), preactivation, or torchvision, whose network `architecture` names.
        head: linear, bare_linear or cosine.
    """
    if settings["body"] == "torchvision":
        made: Network = TorchvisionResNet(settings)
    elif settings["body"] == "preactivation":
        made = PreActivationResNet(settings)
    else:
        kept = {key: value for key, value in settings.items() if key != "body"}
        made = networks.ResNet(**{**kept, "head": "linear", "scale": 1.0})
        made.settings = settings
    kind = BareLinear if settings["head"] == "bare_linear" else networks.HEADS[settings["head"]]
    features = made.features if isinstance(made, TorchvisionResNet) else 4 * settings["width"]
    for expert in each(made):
        expert.head = kind(features, settings["classes"], settings["scale"])
    return made


def each(network: Network) -> list[Any]:
    """The experts."""
    return [*network.experts]


def grown(network: Network, classes: int, *, head: str) -> Network:
    """The network with a head for more classes, new weights drawn from torch's generator.

    Args:
        head: copied: the rows of known classes stay; fresh: all rows are new, as in Weight Aligning's release.
    """
    made = build(**{**network.settings, "classes": classes})
    kept = {name: value for name, value in network.state_dict().items() if ".head." not in name}
    made.load_state_dict(kept, strict=False)
    if head == "copied":
        with torch.no_grad():
            for new, old in zip(each(made), each(network), strict=True):
                for name, value in old.head.named_parameters():
                    getattr(new.head, name)[: len(value)] = value
    return made


def load(path: str | Path, device: str | torch.device = "cpu") -> Network:
    """A network out of a safetensors file, in evaluation mode. Raises ValueError naming a file that is none."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["network"])
        network = build(**settings)
        network.load_state_dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a network of a step ({error})") from error
    return network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def head_arrays(network: Network) -> tuple[Tensor, Tensor]:
    """Weights (E, C, D) and biases (E, C), zeros where there are none, of the heads."""
    weights = torch.stack([expert.head.weight.detach().cpu() for expert in each(network)])
    biases = [getattr(expert.head, "bias", None) for expert in each(network)]
    return weights, torch.stack(
        [torch.zeros(weights.shape[1]) if bias is None else bias.detach().cpu() for bias in biases]
    )


def folded(network: Network, scale_C: Tensor, shift_C: Tensor) -> Network:
    """The network whose own logits are scale_C * logits + shift_C.

    Raises ValueError for a head that cannot have that: a cosine's, or a shift without a bias.
    """
    made = build(**network.settings)
    made.load_state_dict(network.state_dict())
    for expert in each(made):
        bias = getattr(expert.head, "bias", None)
        if not isinstance(expert.head, nn.Linear) or (bias is None and bool(shift_C.any())):
            raise ValueError(f"a {network.settings['head']} head cannot take up a correction; allowed is start: raw")
        with torch.no_grad():
            expert.head.weight.mul_(scale_C[:, None])
            if bias is not None:
                bias.mul_(scale_C).add_(shift_C)
    return made
