"""Networks whose logits have shape (E, B, C): experts x batch x classes.

ResNets for 32x32 images (He et al., CVPR 2016, section 4.2; depth 6n + 2, shortcut option A: subsample and pad with
zeros) and for larger ones (torchvision's blocks). The stem and the first groups of blocks are shared; the last two
groups and the head belong to each expert (Sanchez Aimar et al., CVPR 2023), or, of a CIFAR ResNet that shares two, the
last one (as in SHIKE: Jin et al., CVPR 2023). On the features of a frozen backbone there are heads alone. A network
carries its own settings and its normalisation, so a weights file says all that prediction needs.

B batch, C classes, E experts, D features.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.networks import fused, kernels
from longtail.workflow import files


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


class ScaledCosineHead(CosineHead):
    """A cosine head with a scale for each class."""

    def __init__(self, features: int, classes: int, scale: float):
        super().__init__(features, classes, scale)
        self.factor_C = nn.Parameter(torch.ones(classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor_C * super().forward(x)


HEADS: dict[str, type[nn.Module]] = {
    "linear": LinearHead, "cosine": CosineHead, "scaled_cosine": ScaledCosineHead,
}  # fmt: skip


def kind_of(head: Any) -> str:
    """The name in HEADS."""
    return next(name for name, kind in HEADS.items() if type(head) is kind)


def same_kind(head: Any) -> Any:
    """A new head like this one, with weights drawn from torch's generator."""
    classes, features = head.weight.shape
    return type(head)(features, classes, getattr(head, "scale", 1.0))


def scaled_head(head: Any, factor_C: Tensor) -> Any:
    """A head whose logits are those of `head` times a factor for each class."""
    classes, features = head.weight.shape
    if isinstance(head, LinearHead):
        scaled = same_kind(head)
        scaled.load_state_dict({"weight": factor_C[:, None] * head.weight, "bias": factor_C * head.bias})
    else:
        scaled = ScaledCosineHead(features, classes, head.scale)
        scaled.load_state_dict({"weight": head.weight, "factor_C": factor_C * getattr(head, "factor_C", 1.0)})
    return scaled


class Expert(nn.Module):
    """The part that an expert has to itself: the second and third group of blocks, or the third alone, and a head."""

    def __init__(self, blocks: int, width: int, classes: int, head: str, scale: float, *, shared_groups: int):
        super().__init__()
        self.group2 = group(blocks, width, 2 * width, stride=2) if shared_groups == 1 else nn.Sequential()
        self.group3 = group(blocks, 2 * width, 4 * width, stride=2)
        self.head = HEADS[head](4 * width, classes, scale)

    def forward(self, x: Tensor) -> Tensor:
        return pooled_logits(run_blocks(x, [*self.group2, *self.group3]), self.head)


def pooled_logits(x: Tensor, head: nn.Module) -> Tensor:
    """The head's logits (B, C) of the mean over places of x (B, D, H, W), in float32 whatever the trunk uses."""
    features_BD = x.mean((2, 3))  # AdaptiveAvgPool2d has no deterministic backward on GPUs
    with torch.autocast(x.device.type, enabled=False):
        return head(features_BD.float())


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


class Network(nn.Module):
    """Normalised images (B, channels, H, W) to logits (E, B, C) in float32.

    Attributes:
        settings: what `build` makes such a network of; channels, classes, experts, mean and std among them.
        experts: what each has to itself, its `head` among it.
    """

    experts: nn.ModuleList

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        self.settings = settings


def check_normalization(*, channels: int, mean: list[float], std: list[float]) -> None:
    """Raise ValueError for a normalisation that does not fit images of so many channels."""
    if not len(mean) == len(std) == channels:
        raise ValueError(f"images have {channels} channel(s), normalization has {len(mean)}")


class ResNet(Network):
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
        shared_groups: how many of the three groups of blocks the experts share, 1 or 2.

    Raises ValueError for a normalisation that does not fit the channels.
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
        shared_groups: int = 1,
    ):
        super().__init__({
            "channels": channels, "classes": classes, "experts": experts, "depth": depth, "width": width,
            "head": head, "scale": scale, "mean": mean, "std": std,
            **({"shared_groups": shared_groups} if shared_groups != 1 else {}),  # files of before have no such key
        })  # fmt: skip
        check_normalization(channels=channels, mean=mean, std=std)
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.group1 = group(blocks, width, width, stride=1)
        self.group2 = group(blocks, width, 2 * width, stride=2) if shared_groups == 2 else nn.Sequential()
        self.experts = nn.ModuleList(
            Expert(blocks, width, classes, head, scale, shared_groups=shared_groups) for _ in range(experts)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, channels, H, W) to logits (E, B, C) in float32."""
        x = run_blocks(norm_relu(self.conv1(images), self.bn1), [*self.group1, *self.group2])
        return torch.stack([expert(x) for expert in self.experts])


class Architecture(NamedTuple):
    """A ResNet for larger images, as torchvision has it (which has no ResNet-10: half of ResNet-18)."""

    block: str  # the name of torchvision's class
    blocks: tuple[int, int, int, int]  # of the four layers
    groups: int = 1  # of the 3x3 convolutions
    base_width: int = 64


ARCHITECTURES = {
    "resnet10": Architecture("BasicBlock", (1, 1, 1, 1)),
    "resnet50": Architecture("Bottleneck", (3, 4, 6, 3)),
    "resnet152": Architecture("Bottleneck", (3, 8, 36, 3)),
    "resnext50_32x4d": Architecture("Bottleneck", (3, 4, 6, 3), groups=32, base_width=4),
}


def layer(architecture: str, number: int) -> tuple[nn.Sequential, int]:
    """Layer 1 to 4 of an architecture, and how many channels come out of it; all but the first halve the resolution."""
    from torchvision.models import resnet  # seconds and 160 MB that the CIFAR networks do without

    kind = ARCHITECTURES[architecture]
    block, grouping = getattr(resnet, kind.block), {"groups": kind.groups, "base_width": kind.base_width}
    planes, stride = 32 * 2**number, 1 if number == 1 else 2
    channels_in, channels_out = 64 if number == 1 else planes // 2 * block.expansion, planes * block.expansion
    shortcut = None
    if stride != 1 or channels_in != channels_out:
        convolution = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
        shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels_out))
    first = block(channels_in, planes, stride, shortcut, **grouping)
    others = (block(channels_out, planes, **grouping) for _ in range(kind.blocks[number - 1] - 1))
    return nn.Sequential(first, *others), channels_out


class LargeExpert(nn.Module):
    """The part that an expert has to itself, at full width: the third and fourth layer and a head."""

    def __init__(self, architecture: str, classes: int, head: str, scale: float):
        super().__init__()
        self.layer3, _ = layer(architecture, 3)
        self.layer4, features = layer(architecture, 4)
        self.head = HEADS[head](features, classes, scale)

    def forward(self, x: Tensor) -> Tensor:
        return pooled_logits(self.layer4(self.layer3(x)), self.head)


class LargeResNet(Network):
    """A ResNet or ResNeXt for larger images with one or more experts on a shared trunk of stem and two layers.

    With one expert and a linear head it is torchvision's network, and the same seed draws the same weights.

    Args:
        architecture: a name in ARCHITECTURES.
        the others: as those of ResNet.

    Raises ValueError for an unknown architecture, and for a normalisation that does not fit the channels.
    """

    def __init__(
        self,
        *,
        architecture: str,
        channels: int,
        classes: int,
        experts: int,
        head: str,
        scale: float,
        mean: list[float],
        std: list[float],
    ):
        super().__init__({
            "architecture": architecture, "channels": channels, "classes": classes, "experts": experts,
            "head": head, "scale": scale, "mean": mean, "std": std,
        })  # fmt: skip
        check_normalization(channels=channels, mean=mean, std=std)
        if architecture not in ARCHITECTURES:
            raise ValueError(f"no architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1, _ = layer(architecture, 1)
        self.layer2, _ = layer(architecture, 2)
        self.experts = nn.ModuleList(LargeExpert(architecture, classes, head, scale) for _ in range(experts))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, channels, H, W) to logits (E, B, C) in float32."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer2(self.layer1(F.max_pool2d(x, 3, 2, 1)))
        return torch.stack([expert(x) for expert in self.experts])


class FeatureExpert(nn.Module):
    """The part that an expert on frozen features has to itself: a hidden layer, where one is asked for, and a head."""

    def __init__(self, features: int, hidden: int, classes: int, head: str, scale: float):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(features, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.head = HEADS[head](hidden or features, classes, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))


class HeadsOnFeatures(Network):
    """One or more experts on features that a frozen backbone gave: linear probing, with every loss and second stage.

    Features are what images of one pixel would be, (B, D, 1, 1) float32. The losses need no more than logits, so an
    expert here is a head of its own, with a hidden layer where there is one.

    Args:
        hidden: units of each expert's hidden layer (ReLU); 0 for none.
        standardize: batch norm without weights before all else, as is usual in probing (He et al., CVPR 2022, A.1):
            features of backbones differ in scale by orders of magnitude, learning rates then need not.
        channels: D.
        mean, std: one value for all features, of the recipe.
        the others: as those of ResNet.
    """

    def __init__(
        self,
        *,
        hidden: int,
        standardize: bool,
        channels: int,
        classes: int,
        experts: int,
        head: str,
        scale: float,
        mean: list[float],
        std: list[float],
    ):
        super().__init__({
            "hidden": hidden, "standardize": standardize, "channels": channels, "classes": classes, "experts": experts,
            "head": head, "scale": scale, "mean": mean, "std": std,
        })  # fmt: skip
        self.norm = nn.BatchNorm1d(channels, affine=False) if standardize else nn.Identity()
        self.experts = nn.ModuleList(FeatureExpert(channels, hidden, classes, head, scale) for _ in range(experts))

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D, 1, 1) to logits (E, B, C), in float32 whatever the recipe's precision."""
        with torch.autocast(images.device.type, enabled=False):
            x = self.norm(images.flatten(1).float())
            return torch.stack([expert(x) for expert in self.experts])


class Apart(Network):
    """Networks that share nothing, as one: its experts are those of all of them.

    Raises ValueError for networks of different channels, classes or normalisation, which no images fit.
    """

    def __init__(self, networks: Sequence[Network]):
        seen = [{key: one.settings[key] for key in ("channels", "classes", "mean", "std")} for one in networks]
        if any(one != seen[0] for one in seen):
            raise ValueError(f"networks that take different images or tell different classes: {seen}")
        experts = sum(one.settings["experts"] for one in networks)
        super().__init__({"apart": [one.settings for one in networks], "experts": experts, **seen[0]})
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, channels, H, W) to logits (E, B, C) in float32."""
        return torch.cat([network(images) for network in self.networks])


class Mirrored(Network):
    """A network that looks at an image and at its mirror image, and takes the mean of its logits of both.

    Twice the multiply-adds, for prediction alone; what many tables have without saying so.
    """

    def __init__(self, network: Network):
        same = {key: network.settings[key] for key in ("channels", "classes", "experts", "mean", "std")}
        super().__init__({"mirrored": network.settings, **same})
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, channels, H, W) to logits (E, B, C) in float32."""
        both: Tensor = self.network(images) + self.network(images.flip(3))
        return both / 2


def build(**settings: Any) -> Network:
    """The network of these settings: Apart, Mirrored, HeadsOnFeatures where they say how many hidden units, a
    LargeResNet where they name an architecture, or a CIFAR ResNet."""
    if "apart" in settings:
        return Apart([build(**one) for one in settings["apart"]])
    if "mirrored" in settings:
        return Mirrored(build(**settings["mirrored"]))
    if "hidden" in settings:
        return HeadsOnFeatures(**settings)
    return LargeResNet(**settings) if "architecture" in settings else ResNet(**settings)


def of_features(network: Network) -> bool:
    """Whether it takes features in place of images; of networks apart, whether all do."""
    parts = network.networks if isinstance(network, Apart) else [network]
    return all(isinstance(part, HeadsOnFeatures) for part in parts)


def compiled(network: Network) -> Any:
    """The network's forward pass, through torch.compile where LONGTAIL_COMPILE=on asks for it.

    What the compiler cannot do runs as it is. On the CPU the compiled kernels of longtail.networks.kernels are faster.
    """
    if os.environ.get("LONGTAIL_COMPILE") != "on":
        return network
    torch._dynamo.config.suppress_errors = True
    return torch.compile(network)


def product(logits_EBC: Tensor) -> Tensor:
    """The prediction (B, C): the mean of the experts' logits, a product of experts; one expert's own logits."""
    return logits_EBC.mean(0)


def to_bytes(network: Network) -> bytes:
    """Weights and settings in the safetensors format: the same network gives the same bytes, and nothing is pickled."""
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    return safetensors.torch.save(weights, {"network": json.dumps(network.settings, sort_keys=True)})


def save(network: Network, path: str | Path) -> Path:
    """Write the network to a .safetensors file."""
    return files.write_bytes(path, to_bytes(network))


def load(path: str | Path, device: str | torch.device = "cpu") -> Network:
    """A network as `save` wrote it, in evaluation mode.

    Raises ValueError naming the file when it is no such file.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["network"])
        network = build(**settings)
        network.load_state_dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a network saved by longtail.networks ({error})") from error
    return network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
