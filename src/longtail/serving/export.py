"""A trained cell as a file that needs no code of ours, and in MLflow's model registry.

The file holds normalisation, network, the product of its experts and a correction of its logits: images in, logits and
probabilities out. Of heads on a backbone's features it holds the backbone, too; of heads on somebody's own embeddings,
the heads alone: features in. ONNX runs in any ONNX runtime, .pt2 (torch.export) in plain PyTorch. The names of the
classes are in the file: ONNX's metadata `classes`, .pt2's extra file `classes.json`, a JSON list either.

N images, H x W pixels, C classes, D features.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longtail import networks, posthoc
from longtail.data import decode
from longtail.networks import backbones, tuned
from longtail.posthoc import predictions
from longtail.streaming import predict
from longtail.tracking import runs
from longtail.workflow import cells, files
from longtail.workflow import params as schema

KINDS = (".onnx", ".pt2")
OUTPUTS = ("logits", "probabilities")
CLASSES = "classes"
TOLERANCE = 1e-3  # nats between the file's logits and the pipeline's: other libraries round otherwise
NO_HOLDER = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's words for no such model, no such alias
CHECKED = 256  # test images that the file is tried on
SERVED, DECODE = Path(__file__).with_name("served.py"), Path(decode.__file__)
READING = {"fit": "squash", "exif_orientation": False}  # settings of the reader `images` that say how files are read


class Deployed(nn.Module):
    """Images as they are decoded, uint8 (N, H, W, channels), to corrected logits and probabilities (N, C).

    Of heads on frozen features: features, float32 (N, 1, 1, D), in place of images, where the backbone is not given.

    Args:
        backbone: what made the features that the network takes of images.
    """

    mean: Tensor
    std: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(
        self, network: networks.Network, correction: posthoc.Correction, backbone: backbones.Backbone | None = None
    ):
        super().__init__()
        self.network = network
        self.backbone = None if backbone is None else tuned.Prepared(backbone)
        self.full = 1 if networks.of_features(network) and backbone is None else 255
        self.input = "features" if self.full == 1 else "images"
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(network.settings[name]).view(-1, 1, 1))
        self.register_buffer("scale", torch.as_tensor(correction.scale_, dtype=torch.float32))
        self.register_buffer("shift", torch.as_tensor(correction.shift_, dtype=torch.float32))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.permute(0, 3, 1, 2).float() / self.full
        if self.backbone is not None:
            x = self.backbone(x)[:, :, None, None]
        x = (x - self.mean) / self.std
        logits = self.scale * networks.product(self.network(x)) + self.shift
        return logits, logits.softmax(1)


class Trained:
    """What a finished cell left: network, corrections, class names, test images and their logits.

    Args:
        root: of the repository.
        plan, name: the cell `<dataset>-<recipe>-<method>-<seed>` of a plan.
        correction: none, or a name in the cell's alignment.json.

    Raises ValueError that names the command where the cell has not run, and the corrections there are.
    """

    def __init__(self, root: Path, plan: str, name: str, correction: str):
        self.title = f"{plan}@{name}"
        cell = cells.Cell.parse(plan, name)
        runs = root / cell.runs
        if not (runs / "alignment.json").is_file():
            raise ValueError(f"{runs}: no finished cell; `longtail run {plan} --only '{name}'` makes one")
        weights = runs / "model" / "last.safetensors"
        self.network = tuned.load(weights) if tuned.is_tuned(weights) else networks.load(weights)
        self.results = root / cell.results
        saved = files.load_arrays(runs / "predictions.npz", "class_names", "last_test_logits", "test_labels")
        self.classes = [str(text) for text in saved["class_names"]]
        self.correction_name = correction
        self.correction = self._fitted(runs / "alignment.json", correction)
        self.logits = self.correction.transform(predictions.product(saved["last_test_logits"]))
        dataset, backbone = cell.dataset, None
        params = schema.load(root / "params.yaml")
        if dataset in params["features"]:  # the images that the features are of, and what made them
            made = params["features"][dataset]
            dataset, backbone = made["dataset"], backbones.load(**params["backbones"][made["backbone"]])
        source = params["sources"].get(params["datasets"].get(dataset, {}).get("source"), {})
        # how files become images of that size: as the reader of one's own does it; others have no files
        self.reading = {key: source.get(key, value) for key, value in READING.items()}
        data = root / "data" / "long_tail" / f"{dataset}.npz"
        self.streamed = dataset in params.get("streams", {})
        if self.streamed:  # the images are files
            self.images = predict.first(data, CHECKED)
        else:
            self.images = files.load_arrays(data, "test_images")["test_images"]
        self.deployed = Deployed(self.network, self.correction, backbone).eval()

    def _fitted(self, path: Path, name: str) -> posthoc.Correction:
        """The correction of that name in a cell's alignment.json. Raises ValueError naming a file that is none."""
        if name == "none":
            return posthoc.Affine().fit(np.zeros((1, len(self.classes))))
        fitted = corrections(path)
        if name not in fitted:
            raise ValueError(f"{self.title}: no correction {name!r}; there are none, {', '.join(sorted(fitted))}")
        correction = fitted[name]
        if len(correction.shift_) != len(self.classes):
            raise ValueError(f"{path}: {name} is of {len(correction.shift_)} classes, the cell has {len(self.classes)}")
        return correction


def corrections(path: str | Path) -> dict[str, posthoc.Correction]:
    """What is fitted to a cell's last network, by name, as its alignment.json has it.

    Raises ValueError naming a file that is none.
    """
    found = files.read_json(path)
    fitted = found.get("last") if isinstance(found, dict) else None
    if not isinstance(fitted, dict) or not all(isinstance(one, dict) for one in fitted.values()):
        raise ValueError(f"{path}: not the corrections of a cell, as the stage `align` writes them")
    made = {}
    for name, one in fitted.items():
        try:
            made[name] = posthoc.from_dict(one)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
    return made


def check_target(out: str | Path) -> Path:
    """The path, where a network can be written to it. Raises ValueError for another kind of file, and for a folder."""
    out = files.check_target(out)
    if out.suffix not in KINDS:
        raise ValueError(f"{out}: unknown kind {out.suffix!r}; allowed are {', '.join(KINDS)}")
    return out


def export(cell: Trained, out: str | Path) -> float:
    """Write the cell as .onnx or .pt2; returns the largest difference of its logits on test images, in nats.

    Raises ValueError for another kind of file, without the packages that ONNX needs, and where the file's logits are
    not the pipeline's; nothing is written then.
    """
    out = check_target(out)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"network{out.suffix}"
        run = (_onnx if out.suffix == ".onnx" else _pt2)(cell, made)
        images = cell.images[:CHECKED]
        difference = float(np.abs(run(images) - cell.logits[:CHECKED]).max())
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{out}: its logits are up to {difference:.2g} nats from the pipeline's, above {TOLERANCE:g}"
            )
        files.write_bytes(out, made.read_bytes())
    return difference


def _example(cell: Trained) -> tuple[Any, Any]:
    """Two images, and how many there are left open."""
    return (torch.from_numpy(cell.images[:2]),), ({0: torch.export.Dim("n")},)


def _pt2(cell: Trained, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    example, open_size = _example(cell)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(cell.deployed, example, dynamic_shapes=open_size)
        torch.export.save(program, path, extra_files={f"{CLASSES}.json": json.dumps(cell.classes)})
        loaded = torch.export.load(path).module()
    return lambda images: loaded(torch.from_numpy(images))[0].detach().numpy()


def _onnx(cell: Trained, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx needs it, and says so less clearly
    except ImportError as error:
        raise ValueError(
            f"ONNX needs {error.name}: pip install -c constraints.txt -e '.[export]'; .pt2 does not"
        ) from error
    example, open_size = _example(cell)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            cell.deployed, example, dynamo=True, dynamic_shapes=open_size, verbose=False,
            input_names=[cell.deployed.input], output_names=[*OUTPUTS],
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props[CLASSES] = json.dumps(cell.classes)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run([OUTPUTS[0]], {cell.deployed.input: images})[0])


def register(cell: Trained, root: Path, *, name: str, alias: str, move: bool = False) -> str:
    """Put the cell into MLflow's model registry, with signature, input example and a card; returns its address.

    The store is that of `longtail track`. What is served reads image files (served.py), or rows of features where the
    cell's data set are somebody's own embeddings, and needs onnxruntime, numpy and Pillow, nothing of this project.

    Args:
        move: take the alias from the version that has it.

    Raises ValueError where another version has the alias and it is not to be moved, and for images of `streams`;
    nothing is written then.
    """
    if cell.streamed:
        raise ValueError(
            f"{cell.title}: what is served would decode files otherwise than `streams` do, which show a share of the "
            "middle; `longtail export` writes the network, for squares as they are shown to it"
        )
    uri, _ = runs.location(root)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    import pandas
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array, Map

    takes = cell.deployed.input.removesuffix("s") if cell.deployed.input == "images" else cell.deployed.input
    kind: Any = DataType.binary if takes == "image" else Array(DataType.double)
    given: Any = encoded(cell.images[0]) if takes == "image" else cell.images[0].ravel().astype(float).tolist()
    signature = ModelSignature(
        Schema([ColSpec(kind, takes)]),
        Schema([ColSpec(DataType.string, "class"), ColSpec(Map(DataType.double), "probabilities")]),
    )
    with runs.open_store(root) as store, tempfile.TemporaryDirectory() as folder:
        if not move and (holder := _holder(store, name, alias)):
            raise ValueError(f"{holder}; --move gives {alias!r} to {cell.title}, --alias takes another name")
        mlflow.set_tracking_uri(uri)
        network, about = Path(folder) / "network.onnx", Path(folder) / "about.json"
        export(cell, network)
        size, _, channels = cell.images.shape[1:]
        facts = {"classes": cell.classes, "cell": cell.title, "size": size, "channels": channels, **cell.reading}
        about.write_text(json.dumps(facts))
        with (
            mlflow.start_run(
                run_name=f"register {cell.title}", experiment_id=store.experiment, tags={"longtail.kind": "model"}
            ),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings(
                "ignore", message=".*[Tt]ype hint", category=UserWarning
            )  # served.py needs no mlflow
            logged = mlflow.pyfunc.log_model(
                name="model", python_model=str(SERVED), artifacts={"network": str(network), "about": str(about)},
                code_paths=[str(DECODE)], signature=signature, input_example=pandas.DataFrame({takes: [given]}),
                registered_model_name=name, pip_requirements=_requirements(),
                metadata={"cell": cell.title, **_measures(cell)},
            )  # fmt: skip
        version = str(logged.registered_model_version)
        facts = _card(cell, root)
        for key, value in facts.items():
            store.client.set_model_version_tag(name, version, f"longtail.{key}", value)
        card = "\n".join(f"- {key}: {value}" for key, value in facts.items())
        store.client.update_model_version(name, version, description=f"{cell.title}\n\n{card}")
        store.client.set_registered_model_alias(name, alias, version)
    return f"models:/{name}@{alias}"


def _holder(store: runs.Store, name: str, alias: str) -> str:
    """Which version has the alias, in words; empty where none has."""
    from mlflow.exceptions import MlflowException

    try:
        version = store.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in NO_HOLDER:
            return ""
        raise ValueError(f"MLflow does not say who has {name}@{alias}: {str(error).splitlines()[0]}") from error
    return f"{name}@{alias} is version {version.version} ({version.tags.get('longtail.cell', 'of another program')})"


def _card(cell: Trained, root: Path) -> dict[str, str]:
    """What one wants to know of a model: where it comes from and what it reached on test."""
    found = {"cell": cell.title, "correction": cell.correction_name, "classes": str(len(cell.classes))}
    if accuracy := _measures(cell).get("accuracy"):
        found["accuracy"] = f"{accuracy:.4f}"
    if commit := runs.git(root, "rev-parse", "HEAD"):
        found["commit"] = commit
    return found


def encoded(image: np.ndarray) -> bytes:
    """An image (H, W, channels) as a PNG."""
    import io

    from PIL import Image

    drawn = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(drawn, "PNG")
    return drawn.getvalue()


def _requirements() -> list[str]:
    from importlib.metadata import version

    return [f"{package}=={version(package)}" for package in ("mlflow", "numpy", "onnxruntime", "pandas", "pillow")]


def _measures(cell: Trained) -> dict[str, Any]:
    """The cell's test accuracy with its correction, where it has been evaluated."""
    path = cell.results / "metrics.json"
    which = "raw" if cell.correction_name == "none" else cell.correction_name
    found = files.read_json(path)["last"].get(which) if path.is_file() else None
    return {"accuracy": found["accuracy"]} if found else {}
