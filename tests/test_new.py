"""`longtail new`: what is written into params.yaml fits its schema, changes nothing else, and is what was looked at."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from test_own import encoded, make, noise

from longtail import new
from longtail.data import sources
from longtail.workflow import params, pipeline


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml alone; time is not measured."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(new, "_time", lambda found, params: ["time"])
    return tmp_path


def read(block: dict) -> dict[str, np.ndarray]:
    return sources.load(block["reader"])("", **{key: value for key, value in block.items() if key != "reader"})


def test_a_folder_becomes_a_plan(here: Path) -> None:
    before = (here / "params.yaml").read_text().replace("weight_decay: 0.0005", "weight_decay: 5e-05")  # as DVC has it
    (here / "params.yaml").write_text(before)
    make(here / "My pets", {"cat": 40, "dog": 12, "newt": 4})
    said = "\n".join(new.new("My pets", new.Chosen()))
    assert "train: 42 images, 3 to 30 a class, 10 : 1; largest cat, smallest newt" in said
    assert "test: 14 images, 1 to 10 a class" in said
    assert "shots: 0 classes with many (> 100), 1 medium, 2 few (< 20)" in said
    assert "2 classes have fewer than 10 test images" in said
    assert "longtail run my_pets --jobs 2" in said
    found = params.load("params.yaml")
    assert found["plans"]["my_pets"]["datasets"] == ["my_pets_features"]
    assert found["features"]["my_pets_features"] == {"dataset": "my_pets", "backbone": "efficientnet_lite0"}
    arrays = read(found["sources"]["my_pets"])
    assert np.bincount(arrays["train_labels"]).tolist() == [30, 9, 3]
    kept = [line for line in (here / "params.yaml").read_text().splitlines() if line in before.splitlines()]
    assert [line for line in before.splitlines() if line not in kept] == []
    for section, blocks in params.parsed(before).items():
        assert {name: found[section][name] for name in blocks} == blocks
    assert pipeline.text("my_pets", found) == Path(pipeline.file("my_pets")).read_text()


def test_changed_images_get_a_new_hash_and_nothing_else(here: Path) -> None:
    folder = make(here / "pets", {"cat": 6, "dog": 4})
    new.new("pets", new.Chosen())
    before = params.load("params.yaml")
    assert new.new("pets", new.Chosen()) == ["sources.pets: as it was"]
    (folder / "cat" / "more.png").write_bytes(encoded(noise(seed=99)))
    assert new.new("pets", new.Chosen()) == ["sources.pets: samples changed: new sha256"]
    after = params.load("params.yaml")
    arrays = read(after["sources"]["pets"])
    assert len(arrays["train_labels"]) + len(arrays["test_labels"]) == 11
    before["sources"]["pets"]["sha256"] = after["sources"]["pets"]["sha256"]
    assert before == after


def test_what_is_asked_otherwise_of_a_source_that_is_there_is_refused(here: Path) -> None:
    make(here / "pets", {"cat": 6, "dog": 4})
    new.new("pets", new.Chosen())
    new.new("pets", new.Chosen(broken="refuse", duplicates="refuse"))
    for changes in ({"broken": "leave_out"}, {"duplicates": "report"}):
        with pytest.raises(ValueError, match=r"is 'refuse' in params.yaml, not .*; change it there, or give this"):
            new.new("pets", new.Chosen(**changes))


def test_what_is_broken_is_named_and_nothing_written(here: Path) -> None:
    make(here / "pets", {"cat": 6, "dog": 4})
    (here / "pets" / "cat" / "x.jpg").write_bytes(b"x")
    before = (here / "params.yaml").read_text()
    with pytest.raises(ValueError, match=r"no usable images: 1: cat/x.jpg \(no image, by its content\)\n.*leave_out"):
        new.new("pets", new.Chosen())
    assert (here / "params.yaml").read_text() == before
    new.new("pets", new.Chosen(broken="leave_out"))
    assert params.load("params.yaml")["sources"]["pets"]["broken"] == "leave_out"


def test_a_name_that_is_taken_or_none(here: Path) -> None:
    make(here / "digits", {"cat": 6, "dog": 4})
    with pytest.raises(ValueError, match=r"sources.digits is in params.yaml with other data; give this one a --name"):
        new.new("digits", new.Chosen())
    with pytest.raises(ValueError, match=r"plans.smoke is in params.yaml already"):
        new.new("digits", new.Chosen(name="smoke"))
    with pytest.raises(ValueError, match=r"--name 'A B'"):
        new.new("digits", new.Chosen(name="A B"))
    before = (here / "params.yaml").read_text()
    for name in ("my-birds", "my birds", "birds_", 50 * "b"):  # features have a name of their own, a longer one
        with pytest.raises(ValueError, match=r"--name '|at most 50 characters"):
            new.new("digits", new.Chosen(name=name))
    assert (here / "params.yaml").read_text() == before


@pytest.mark.parametrize(("side", "size", "backbone"), [(20, 32, ""), (100, 96, ""), (300, 224, "_224")])
def test_the_size_follows_the_images(here: Path, side: int, size: int, backbone: str) -> None:
    for name in ("a", "b"):
        (here / "x" / name).mkdir(parents=True)
        for number in range(4):
            (here / "x" / name / f"{number}.png").write_bytes(
                encoded(noise(size=(side + 9, side), seed=ord(name) + 7 * number))
            )
    new.new("x", new.Chosen())
    found = params.load("params.yaml")
    assert found["sources"]["x"]["size"] == size
    assert found["features"]["x_features"]["backbone"] == f"efficientnet_lite0{backbone}"


def test_embeddings_need_no_image(here: Path) -> None:
    rng = np.random.default_rng(0)
    labels = ["a"] * 30 + ["b"] * 10
    pq.write_table(pa.table({"label": labels}), here / "t.parquet")
    np.save(here / "f.npy", rng.normal(size=(40, 7)))
    new.new("t.parquet", new.Chosen(name="clip", features="f.npy"))
    found = params.load("params.yaml")
    assert found["plans"]["clip"]["datasets"] == ["clip"] and "clip" not in found["features"]
    assert read(found["sources"]["clip"])["train_images"].shape == (28, 1, 1, 7)


def test_other_features_of_the_same_table_are_other_data(here: Path) -> None:
    labels = "label\n" + "cat\n" * 8 + "dog\n" * 5
    (here / "emb.csv").write_text(labels)
    rng = np.random.default_rng(0)
    for name in ("clip", "dino"):
        np.save(here / f"{name}.npy", rng.normal(size=(13, 4)).astype(np.float32))
    new.new("emb.csv", new.Chosen(features="clip.npy"))
    for other in ("dino.npy", "nowhere.npy"):
        with pytest.raises(
            ValueError,
            match=r"sources.emb.features is '.*clip.npy' in params.yaml, not '.*; change it there, or give this",
        ):
            new.new("emb.csv", new.Chosen(features=other))
    assert new.new("emb.csv", new.Chosen(features="clip.npy")) == ["sources.emb: as it was"]
    with_paths = "path,label\n" + "".join(f"{n}.png,{'cat' if n < 8 else 'dog'}\n" for n in range(13))
    (here / "both.csv").write_text(with_paths)  # features are asked for: the paths are not looked at
    new.new("both.csv", new.Chosen(features="dino.npy"))
    assert params.load("params.yaml")["sources"]["both"]["reader"] == "embeddings"


def test_a_block_is_written_as_an_experiment_would_leave_it(tmp_path: Path) -> None:
    from dvc.utils.hydra import apply_overrides

    text = "plans:\n  z:\n    u: []\n  a:\n    x: 1   # of a\n\n# Of sources.\nsources:\n  b:\n    y: 2\n"
    found = new.inserted(text, "plans", "c", {"x": [1, 2], "path": "/it's: a", "flag": True})
    assert found == (
        'plans:\n  z:\n    u: []\n  c:\n    x:\n    - 1\n    - 2\n    path: "/it\'s: a"\n    flag: true\n'
        "  a:\n    x: 1   # of a\n\n# Of sources.\nsources:\n  b:\n    y: 2\n"
    )
    assert "sources:\n  d:\n    z: 3\n  b:\n    y: 2\n" in new.inserted(text, "sources", "d", {"z": 3})
    (tmp_path / "params.yaml").write_text(found)
    apply_overrides(tmp_path / "params.yaml", ["sources.b.y=3"])
    assert (tmp_path / "params.yaml").read_text() == found.replace("y: 2", "y: 3")


def test_time_is_said_from_what_a_step_takes() -> None:
    found = new.Proposal("clip", {}, {
        "train_labels": np.zeros(400, int), "test_labels": np.zeros(10, int), "class_names": np.array(["a", "b"]),
        "train_images": np.zeros((400, 1, 1, 7), np.float32),
    }, None, [])  # fmt: skip
    recipes = params.load(ROOT / "params.yaml")["recipes"]
    (said,) = new._time(found, {"plans": {"clip": {"recipes": ["probe_small"]}}, "recipes": recipes, "backbones": {}})
    assert said.startswith("time, roughly: features 0 s, 24 cells ")


def test_fine_tuning_is_a_plan_beside_the_frozen_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new, "_time_to_tune", lambda found, params: ["time to tune"])
    make(here / "pets", {"cat": 40, "dog": 12})
    assert "longtail new pets --tune" in "\n".join(new.new("pets", new.Chosen()))
    frozen = params.load("params.yaml")
    said = new.new("pets", new.Chosen(tune=True))
    assert said[0] == "sources.pets: as it was" and "longtail run pets_tuned --jobs 2" in said[-1]
    found = params.load("params.yaml")
    tuned = found["plans"].pop("pets_tuned")
    assert tuned["datasets"] == ["pets"] and tuned["recipes"] == ["tune"]
    assert found == frozen
    assert "stages/finetune.py" in Path("stages/pets_tuned/dvc.yaml").read_text()
    assert new.new("pets", new.Chosen(tune=True)) == ["sources.pets: as it was"]


def test_fine_tuning_without_a_frozen_plan_and_with_the_larger_backbone(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new, "_time_to_tune", lambda found, params: ["time to tune"])
    make(here / "pets", {"cat": 6, "dog": 4})
    new.new("pets", new.Chosen(tune=True, size=224))
    found = params.load("params.yaml")
    assert "pets" not in found["plans"] and "pets_features" not in found["features"]
    ours, theirs = found["recipes"]["pets_tune"], found["recipes"]["tune"]
    assert ours["network"].pop("backbone") == "efficientnet_lite0_224"
    assert theirs["network"].pop("backbone") == "efficientnet_lite0" and ours == theirs


def test_features_are_not_fine_tuned(here: Path) -> None:
    pq.write_table(pa.table({"label": ["a"] * 5 + ["b"] * 5}), here / "t.parquet")
    np.save(here / "f.npy", np.random.default_rng(0).normal(size=(10, 3)))
    before = (here / "params.yaml").read_text()
    with pytest.raises(ValueError, match=r"--tune: these are features; a backbone is fine-tuned on images"):
        new.new("t.parquet", new.Chosen(name="clip", features="f.npy", tune=True))
    assert (here / "params.yaml").read_text() == before


def test_the_time_of_fine_tuning_is_said_from_a_few_steps() -> None:
    found = new.Proposal("pets", {}, {
        "train_labels": np.zeros(64, int), "test_labels": np.zeros(4, int), "class_names": np.array(["a", "b"]),
        "train_images": np.zeros((64, 8, 8, 3), np.uint8),
    }, "small", [])  # fmt: skip
    known = params.load(ROOT / "params.yaml")
    known["backbones"]["small"] = {
        "library": "timm", "network": "test_efficientnet", "weights": "none", "resolution": 32,
    }  # fmt: skip
    recipe = known["recipes"]["tune"] | {"network": known["recipes"]["tune"]["network"] | {"backbone": "small"}}
    plan = dict((section, block) for section, _, block in new.blocks(found, known, tune=True))["plans"]
    assert plan["recipes"] == ["pets_tune"]
    known["recipes"]["pets_tune"], known["plans"]["pets_tuned"] = recipe, plan
    (said,) = new._time_to_tune(found, known)
    assert said.startswith("time, roughly: frozen groups, once, 0 s; 24 cells ") and "s a step of 32 images" in said
    assert new._experts(known["methods"]["balpoe"]) == 3 and new._experts(known["methods"]["ce"]) == 1
