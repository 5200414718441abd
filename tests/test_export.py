"""A cell as a file that needs no code of ours, and behind MLflow's server: the pipeline's own answers."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import mlflow
import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from longtail import cli, networks
from longtail.posthoc import predictions
from longtail.serving import export
from longtail.training import inference
from longtail.workflow import files

NAME = "toy_if10-plain-balpoe-0"
CLASSES = ["cat", "dog", "emu"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository with one finished cell: an untrained network of two experts, whose logits are what they are."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copyfile(ROOT / "params.yaml", root / "params.yaml")
    rng = np.random.default_rng(0)
    arrays = {"class_names": np.array(CLASSES)}
    for split in ("train", "held_out", "test"):
        labels = np.repeat(np.arange(3), (12, 6, 4))
        arrays |= {f"{split}_images": rng.integers(0, 256, (22, 8, 8, 3), dtype=np.uint8), f"{split}_labels": labels}
    data = files.save_arrays(root / "data/long_tail/toy_if10.npz", **arrays)
    inference.set_up(0)
    network = networks.ResNet(
        channels=3, classes=3, experts=2, depth=8, width=4, head="cosine", scale=30, mean=[0.4, 0.5, 0.6],
        std=[0.2, 0.3, 0.25],
    )  # fmt: skip
    network.train()
    with torch.no_grad():  # running statistics that are not the initial ones
        network(torch.randn(64, 3, 8, 8))
    runs = root / "runs/toy/toy_if10/plain/balpoe/0"
    networks.save(network, runs / "model/last.safetensors")
    files.write_json(runs / "model/epochs.json", {"last": 3})
    inference.predict(str(data), str(runs / "model"), str(runs / "predictions.npz"))
    settings = {"reading": "normalized", "weights": "balanced", "temperature": 1.0, "strength": 1.0}
    files.write_json(runs / "alignment.json", predictions.align(str(runs / "predictions.npz"), **settings))
    return root


def wanted(root, correction: str) -> np.ndarray:
    """The pipeline's logits on test."""
    arrays = files.load_arrays(root / "runs/toy/toy_if10/plain/balpoe/0/predictions.npz")
    logits = arrays["last_test_logits"].mean(0)
    if correction != "none":
        logits = (
            logits
            + files.read_json(root / "runs/toy/toy_if10/plain/balpoe/0/alignment.json")["last"][correction]["shift"]
        )
    return logits


def images(root) -> np.ndarray:
    return files.load_arrays(root / "data/long_tail/toy_if10.npz")["test_images"]


@pytest.mark.parametrize("correction", ["none", "aligned_on_held_out"])
@pytest.mark.parametrize("kind", export.KINDS)
def test_the_file_gives_the_pipeline_s_logits_for_any_number_of_images(root, tmp_path, kind, correction):
    out = tmp_path / f"out/network{kind}"
    difference = export.export(export.Trained(root, "toy", NAME, correction), out)
    assert difference <= export.TOLERANCE
    for some in (images(root), images(root)[:1]):
        if kind == ".onnx":
            session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
            logits, probabilities = session.run(None, {"images": some})
        else:
            outputs = torch.export.load(out).module()(torch.from_numpy(some))
            logits, probabilities = (output.detach().numpy() for output in outputs)
        np.testing.assert_allclose(logits, wanted(root, correction)[: len(some)], atol=1e-4)
        np.testing.assert_allclose(probabilities, torch.tensor(logits).softmax(1).numpy(), atol=1e-6)


def test_the_file_needs_no_code_of_ours(root, tmp_path):
    export.export(export.Trained(root, "toy", NAME, "none"), tmp_path / "network.pt2")
    np.save(tmp_path / "images.npy", images(root))
    program = (
        "import sys, numpy, torch; sys.modules['longtail'] = None\n"
        "network = torch.export.load('network.pt2').module()\n"
        "print(network(torch.from_numpy(numpy.load('images.npy')))[0].argmax(1).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == wanted(root, "none").argmax(1).tolist()


def test_a_file_that_answers_otherwise_is_not_written(root, tmp_path):
    cell = export.Trained(root, "toy", NAME, "none")
    cell.logits = cell.logits + 0.01
    with pytest.raises(ValueError, match=r"network.pt2: its logits are up to 0.01 nats from the pipeline's"):
        export.export(cell, tmp_path / "network.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["toy", "toy_if10-plain-ce-0", "--out", "a.onnx"],
            "no finished cell; `longtail run toy --only 'toy_if10-plain-ce-0'`",
        ),
        (["toy", "x", "--out", "a.onnx"], "'x' is no cell: <dataset>-<recipe>-<method>-<seed>"),
        (
            ["toy", NAME, "--out", "a.onnx", "--correction", "magic"],
            "no correction 'magic'; there are none, aligned_on_held_out",
        ),
        (["toy", NAME, "--out", "folder.onnx"], "folder.onnx: is a folder; expected the name of a file"),
        (["toy", NAME, "--out", "folder"], "folder: is a folder; expected the name of a file"),
        (["toy", NAME, "--out", "a.h5"], "a.h5: unknown kind '.h5'; allowed are .onnx, .pt2"),
    ],
)
def test_what_is_wrong_is_named(root, monkeypatch, arguments, message):
    monkeypatch.chdir(root)
    for name in ("stages", "folder", "folder.onnx"):
        (root / name).mkdir(exist_ok=True)
    (root / "stages/dvc.yaml").touch()
    monkeypatch.setattr(sys, "argv", ["longtail", "export", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert message in str(caught.value)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port: int, images: list[bytes]) -> dict:
    records = [{"image": base64.b64encode(image).decode()} for image in images]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps({"dataframe_records": records}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.mark.slow
def test_a_registered_cell_is_served_with_the_pipeline_s_answers(root, monkeypatch):
    monkeypatch.chdir(root)
    uri = f"sqlite:///{root / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    cell = export.Trained(root, "toy", NAME, "aligned_on_train")
    address = export.register(cell, root, name="toy", alias="champion")
    assert address == "models:/toy@champion"
    store = mlflow.MlflowClient(uri)
    version = store.get_model_version_by_alias("toy", "champion")
    assert version.tags["longtail.cell"] == f"toy@{NAME}" and version.tags["longtail.correction"] == "aligned_on_train"
    assert "correction: aligned_on_train" in version.description
    with pytest.raises(ValueError, match=rf"toy@champion is version 1 \(toy@{NAME}\); --move gives 'champion' to"):
        export.register(cell, root, name="toy", alias="champion")
    assert len(store.search_model_versions("name='toy'")) == 1
    with monkeypatch.context() as patched:  # a server that does not answer says nothing about the alias

        def fails(*_):
            raise mlflow.exceptions.MlflowException("the server is down")

        patched.setattr(mlflow.MlflowClient, "get_model_version_by_alias", fails)
        with pytest.raises(ValueError, match="MLflow does not say who has toy@champion: the server is down"):
            export.register(cell, root, name="toy", alias="champion")
    assert len(store.search_model_versions("name='toy'")) == 1
    export.register(cell, root, name="toy", alias="champion", move=True)
    assert store.get_model_version_by_alias("toy", "champion").version == 2
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        address,
        "--env-manager",
        "local",
        "-p",
        str(port),
    ]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen(command, cwd=root, env=environment, start_new_session=True)
    try:
        sent = [export.encoded(image) for image in images(root)[:5]]
        for _ in range(120):
            try:
                answers = ask(port, sent)["predictions"]
                break
            except urllib.error.URLError:
                assert server.poll() is None
                time.sleep(0.5)
        logits = torch.tensor(wanted(root, "aligned_on_train")[:5])
        for answer, row in zip(answers, logits, strict=True):
            assert answer["class"] == CLASSES[int(row.argmax())]
            assert list(answer["probabilities"]) == CLASSES
            np.testing.assert_allclose([*answer["probabilities"].values()], row.softmax(0).numpy(), atol=1e-5)
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(port, [sent[0], b"no image"])
        assert "row 1: no image file" in refused.value.read().decode()
    finally:
        os.killpg(server.pid, 9)
        server.wait()


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=80) | st.text(max_size=9) | st.none(), damage=st.integers(0, 76), byte=st.integers(0, 255)
)
def test_whatever_is_asked_for_is_an_image_or_its_row_is_named(data, damage, byte):
    from longtail.serving.served import Served

    served = Served()
    served.about = {"size": 8, "channels": 3, "fit": "squash", "exif_orientation": False}
    whole = bytearray(export.encoded(np.zeros((8, 8, 3), np.uint8)))
    whole[damage % len(whole)] = byte
    for asked in (data, bytes(whole)):
        try:
            assert served.decode(7, asked).shape == (8, 8, 3)
        except ValueError as error:
            assert "row 7" in str(error)


@settings(max_examples=60, deadline=None)
@given(values=st.recursive(st.none() | st.text(max_size=3) | st.floats() | st.integers(), st.lists, max_leaves=5))
def test_whatever_is_asked_for_is_features_or_its_row_is_named(values):
    from longtail.serving.served import Served

    served = Served()
    served.about = {"channels": 2}
    for asked in (values, [values, 1.0], {"a": values}):
        try:
            assert np.isfinite(served.numbers(7, asked)).all()
        except ValueError as error:
            assert "row 7" in str(error)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("turn", [False, True])
def test_what_is_served_is_decoded_as_the_pipeline_decodes_it(fit, turn):
    """A wide photograph with EXIF's orientation, and 16-bit grey."""
    from longtail.data import decode
    from longtail.serving.served import Served

    served, rng = Served(), np.random.default_rng(0)
    served.about = {"size": 8, "channels": 3, "fit": fit, "exif_orientation": turn}
    wide, exif = io.BytesIO(), Image.Exif()
    exif[decode.ORIENTATION] = 6
    Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(wide, "JPEG", exif=exif)
    deep = io.BytesIO()
    Image.fromarray(rng.integers(0, 65536, (20, 20)).astype(np.uint16)).save(deep, "PNG")
    for file in (wide.getvalue(), deep.getvalue()):
        wanted, _ = decode.decode(file, size=8, channels=3, fit=fit, exif_orientation=turn)
        np.testing.assert_array_equal(served.decode(0, file), wanted)


def test_an_image_of_another_size_is_resized():
    """As Pillow does it; the same size stays as it is."""
    from longtail.serving.served import Served

    served = Served()
    served.about = {"size": 8, "channels": 3, "fit": "squash", "exif_orientation": False}
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(served.decode(0, export.encoded(image)), image)
    assert served.decode(0, export.encoded(image.repeat(2, 0).repeat(2, 1))).shape == (8, 8, 3)
    served.about["channels"] = 1
    assert served.decode(0, export.encoded(image)).shape == (8, 8, 1)
