"""Training on images that are read as they are needed: what the engine is given, and that nothing else changes."""

import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import large_trees
import numpy as np
import pytest
import small_stream as small
import torch
from conftest import ROOT
from PIL import Image

from longtail import networks
from longtail.data import batches
from longtail.data.large import feed, index
from longtail.data.large.pixels import Box, Smaller, Square, Window, draw_box, smaller, square, window
from longtail.data.large.store import Piece, Store
from longtail.incremental import predict as predictions
from longtail.incremental import train as incremental
from longtail.networks import own, tuned
from longtail.streaming import chain, images, predict, sets, train
from longtail.training import engine, inference, refit, streamed
from longtail.training.cell import build
from longtail.training.checkpoints import Checkpoint
from longtail.workflow import files

HOW = {"side": 32, "share": 0.875, "exif_orientation": False, "draft": False, "broken": "refuse", "stored": 0}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small ImageNet-LT, its index, and the stream of it, data.npz."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGTAIL_LARGE", str(tmp_path / "large"))
    monkeypatch.setenv("LONGTAIL_WORKERS", "0")
    monkeypatch.setenv("LONGTAIL_LIVE", "off")
    large_trees.imagenet(tmp_path / "large")
    files.save_arrays("index.npz", **index.make(layout="imagenet_lt", edition="other", held_out="list"))
    make()
    return tmp_path


def make(out: str = "data.npz", **changes: Any) -> sets.Stream:
    settings: dict[str, Any] = {**HOW, **changes}
    sets.make("index.npz", out, layout="imagenet_lt", made_by="test", **settings)
    return sets.load(out)


# --------------------------------------------------------------------------------------------- random windows


def boxes(count: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> list[Box]:
    rng = np.random.default_rng(0)
    return [draw_box(rng, height, width, scale=scale, ratio=ratio) for _ in range(count)]


def test_windows_are_those_of_torchvision_for_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own draws, with ours in place of its generator."""
    from torchvision.transforms import RandomResizedCrop

    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    for seed, (height, width) in enumerate([(375, 500), (500, 333), (40, 41), (20, 300), (300, 9)] * 20):
        rng = np.random.default_rng(seed)

        class Numbers:
            def uniform_(self, low: float, high: float) -> torch.Tensor:
                return torch.tensor([rng.uniform(low, high)], dtype=torch.float64)  # noqa: B023

        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", lambda *_: Numbers())
            patched.setattr(torch, "randint", lambda low, high, size: torch.tensor([rng.integers(high)]))  # noqa: B023
            patched.setattr(torch, "log", lambda x: x.double().log())
            wanted = RandomResizedCrop.get_params(torch.zeros(3, height, width), list(scale), list(ratio))
        found = draw_box(np.random.default_rng(seed), height, width, scale=scale, ratio=ratio)
        assert tuple(found) == wanted, (height, width)


def test_windows_lie_within_the_image_and_have_the_areas_and_ratios_that_are_asked_for() -> None:
    found = boxes(3000, 300, 400, (0.2, 0.8), (0.5, 2.0))
    assert all(0 <= b.top <= 300 - b.height and 0 <= b.left <= 400 - b.width for b in found)
    areas = np.array([b.height * b.width / 120_000 for b in found])
    ratios = np.array([b.width / b.height for b in found])
    assert areas.min() > 0.19 and areas.max() < 0.81
    assert ratios.min() > 0.49 and ratios.max() < 2.05
    plain = boxes(3000, 300, 400, (0.05, 0.25), (1.0, 1.0))  # all of which fit: uniform
    assert abs(np.mean([b.height * b.width for b in plain]) / 120_000 - 0.15) < 0.003
    assert boxes(3, 50, 50, (1.0, 1.0), (1.0, 1.0)) == [Box(0, 0, 50, 50)] * 3


def picture(width: int, height: int) -> bytes:
    y, x = np.mgrid[:height, :width]
    values = np.stack([127 + 100 * np.sin(x / 60), 127 + 100 * np.cos(y / 45), 127 + 90 * np.sin((x + y) / 80)], 2)
    out = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(out, "JPEG", quality=95)
    return out.getvalue()


@pytest.mark.parametrize("draft", [False, True])
def test_a_window_is_that_part_of_the_image_scaled(draft: bool) -> None:
    """Against Pillow's own crop and bilinear scaling of all pixels; libjpeg's scaling moves an edge by half a pixel,
    and a pixel's neighbour differs by up to 20 here."""
    data = picture(900, 700)
    for seed in range(12):
        how = Window(48, (0.08, 1.0), (0.75, 1.333), False, draft)
        found, kind = window(data, how, np.random.default_rng(seed))
        box = draw_box(np.random.default_rng(seed), 700, 900, scale=how.scale, ratio=how.ratio)
        part = Image.open(io.BytesIO(data)).crop((box.left, box.top, box.left + box.width, box.top + box.height))
        wanted = np.asarray(part.resize((48, 48), Image.Resampling.BILINEAR)).transpose(2, 0, 1).astype(int)
        assert kind == "JPEG RGB" and np.abs(found.numpy() - wanted).mean() < (7 if draft else 0.6)


@pytest.mark.parametrize("kind", large_trees.KINDS)
def test_every_kind_has_windows_and_can_be_kept_smaller(kind: str) -> None:
    data = large_trees.image(2, kind)
    found, said = window(data, Window(16, (0.08, 1.0), (0.75, 1.333), True, True), np.random.default_rng(1))
    whole, _ = square(data, Square(16, 1.0, True, False))
    assert found.shape == (3, 16, 16) and said.split()[0] in ("JPEG", "PNG")
    assert (found.float().mean((1, 2)) - whole.float().mean((1, 2))).abs().max() < 30
    made, _ = smaller(data, Smaller(20, True, False))
    kept = Image.open(io.BytesIO(made))
    assert kept.format == "JPEG" and (min(kept.size) == 20 or kind == "dot")
    again, _ = square(made, Square(16, 1.0, True, False))
    assert (again.float() - whole.float()).abs().mean() < 12


def test_a_jpeg_that_is_small_enough_is_kept_as_it_is() -> None:
    data = large_trees.image(1)
    assert smaller(data, Smaller(36, False, False))[0] == data
    assert smaller(data, Smaller(35, False, False))[0] != data
    for draft in (False, True):  # which libjpeg can halve to just that
        for shorter in (299, 300, 301):
            kept = Image.open(io.BytesIO(smaller(picture(800, 600), Smaller(shorter, False, draft))[0]))
            assert min(kept.size) == shorter


# ------------------------------------------------------------------------------------------- what is foreseen


class Recorder:
    """Images of which only is recorded which rows are asked for."""

    def __init__(self, count: int, side: int):
        self.pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        self.shape, self.device, self.asked = torch.Size((count, 3, side, side)), torch.device("cpu"), list[Any]()

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        self.asked.append(rows)
        return self.pixels.expand(len(rows), -1, -1, -1)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("mixing", [(0, 0), (0.3, 0), (0.2, 1.0)])
@pytest.mark.parametrize("chunk", [1, batches.CHUNK_PIXELS])
@pytest.mark.parametrize("class_balanced", [False, True])
def test_what_is_foreseen_is_what_is_asked_for(
    world: int, mixing: tuple[float, float], chunk: int, class_balanced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every epoch, from every batch on, by every process; of chunks of one batch and of many."""
    monkeypatch.setattr(batches, "CHUNK_PIXELS", chunk)
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([20, 9, 3, 1]))
    given: dict[str, Any] = {
        "batch_size": 16, "drop_last": False, "mixup_alpha": mixing[0], "cutmix_alpha": mixing[1], "seed": 3,
        "class_balanced": class_balanced, "epoch": 2, "world": world,
    }  # fmt: skip
    settings = {**small.RECIPE["normalization"], "augmentation": small.RECIPE["augmentation"]}
    for rank in range(world):
        for start in (0, 1, 2, 3):
            recorder: Any = Recorder(len(labels), 8)
            split = batches.Split(recorder, labels, 4)
            for _ in batches.epoch(split, **given, **settings, rank=rank, start_batch=start):
                pass
            foreseen = [*images.requests(split, **given, rank=rank, start_batch=start)]
            assert [one.rows.tolist() for one in foreseen] == [rows.tolist() for rows in recorder.asked]
            assert all(len(one.seeds) == len(one.rows) for one in foreseen)
            assert start == 3 or sum(map(len, recorder.asked)) or (rank and start == 2)


def test_where_an_epoch_is_taken_up_is_known_from_the_checkpoint() -> None:
    from longtail.losses.ce import Loss

    begun: list[tuple[int, int]] = []

    def loss() -> images.Foreseen:
        return images.Foreseen(Loss(torch.ones(2)), lambda epoch, batch: begun.append((epoch, batch)))

    first = loss()
    first.start_epoch(1, 9)
    for _ in range(5):
        first.after_step()
    again = loss()
    again.load_state_dict(first.state_dict())
    again.start_epoch(1, 9)  # within it
    other = loss()
    other.load_state_dict(first.state_dict())
    other.start_epoch(2, 9)  # the checkpoint was its end
    other.after_step()
    other.start_epoch(3, 9)
    assert begun == [(1, 0), (1, 5), (2, 0), (3, 0)]


def test_an_image_that_comes_twice_in_an_epoch_is_drawn_twice() -> None:
    labels = torch.tensor([0] * 30 + [1])
    split: Any = batches.Split(Recorder(31, 8), labels, 2)  # type: ignore[arg-type]
    found = [*images.requests(
        split, epoch=1, seed=0, batch_size=31, drop_last=False, class_balanced=True, mixup_alpha=0, cutmix_alpha=0,
        start_batch=0, rank=0, world=1,
    )]  # fmt: skip
    last = [seed for row, seed in zip(found[0].rows, found[0].seeds, strict=True) if row == 30]
    assert len(last) > 5 and len(set(last)) == len(last)


def test_other_images_than_were_foreseen_are_refused(here: Path) -> None:
    stream = sets.load("data.npz")
    with train.reading(stream, torch.device("cpu")) as splits:
        seen: Any = splits["train"].images
        with pytest.raises(ValueError, match="before their epoch began"):
            seen[torch.tensor([1, 2])]
        plan = [images.Request(torch.tensor([3, 1])), images.Request(torch.tensor([2, 0]))]
        seen.begin(stream.square, iter(plan))
        assert seen[torch.tensor([3, 1])].shape == (2, 3, 32, 32)
        with pytest.raises(ValueError, match="another order than was foreseen"):
            seen[torch.tensor([0, 2])]
        seen.begin(stream.square, iter(plan[:1]))
        seen[torch.tensor([3, 1])]
        with pytest.raises(ValueError, match="another order than was foreseen"):
            seen[torch.tensor([2, 0])]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_looks_and_epochs_get_the_pixels_of_each_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setenv("LONGTAIL_WORKERS", workers)
    monkeypatch.setattr(images, "PART", 3)
    stream = sets.load("data.npz")
    wanted = torch.stack([square(stream.store.piece(piece), stream.square)[0] for piece in stream.pieces["train"]])
    with train.reading(stream, torch.device("cpu")) as splits:
        seen: Any = splits["train"].images
        for _ in range(2):  # a second look begins anew
            assert torch.equal(torch.cat([seen[at : at + 20] for at in range(0, len(seen), 20)]), wanted)
        seen[0:20]  # which another look ends, and which goes on all the same
        half = seen[1::2]
        assert len(half) == len(wanted[1::2]) and torch.equal(half[0:99], wanted[1::2])
        assert torch.equal(seen[20:40], wanted[20:40])
        plan = [images.Request(torch.tensor(rows)) for rows in ([5, 1, 2, 8, 0], [7], [4, 4])]
        seen.begin(stream.square, iter(plan))
        assert all(torch.equal(seen[one.rows], wanted[one.rows]) for one in plan)
        seen.begin(stream.square, iter(plan))
        seen[plan[0].rows]
        assert seen[torch.tensor([], dtype=torch.int64)].shape == (0, 3, 32, 32)
        seen[0:20]
        with pytest.raises(ValueError, match="another reading of these images has begun"):
            seen[plan[1].rows]


# ------------------------------------------------------------------------------------------------- training


def in_memory(stream: sets.Stream) -> dict[str, batches.Split]:
    found = {}
    for name, labels in stream.labels.items():
        pixels = (
            feed.read(stream.store, feed.Wanted(stream.pieces[name], stream.square)).values.permute(0, 2, 3, 1).numpy()
        )
        found[name] = batches.Split.from_arrays(pixels, labels, len(stream.class_names), "cpu")
    return found


@pytest.mark.parametrize("workers", ["0", "2"])
def test_without_windows_it_is_the_training_of_images_in_memory_to_the_bit(
    here: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    stream, recipe = sets.load("data.npz"), small.RECIPE | {"window": None}
    monkeypatch.setenv("LONGTAIL_WORKERS", workers)
    small.run(window=None)
    inference.set_up(1)
    splits = in_memory(stream)
    network, loss = build(splits["train"], "balpoe", {"taus": [0.0, 2.0]}, **recipe)
    settings = {key: value for key, value in recipe.items() if key not in ("network", "normalization", "window")}
    fitted = engine.fit(
        network, loss, splits["train"], splits["held_out"], splits["test"], seed=1, checkpoint=Checkpoint(None, ""),
        on_epoch=lambda row: None, **settings,
    )  # fmt: skip
    assert Path("model/last.safetensors").read_bytes() == fitted.last
    assert Path("model/best.safetensors").read_bytes() == fitted.best
    assert [float(row["test_accuracy"]) for row in files.read_csv("history.csv")] == pytest.approx(
        [row["test_accuracy"] for row in fitted.history], abs=1e-6
    )
    assert json.loads(Path("model/provenance.json").read_text())[0]["step"] == "train"


def chains_of_memory(stream: sets.Stream) -> None:
    """What the stages of a chain in memory write of the same images: other/model, other.npz."""
    arrays: dict[str, Any] = {"class_names": stream.class_names}
    for name, split in in_memory(stream).items():
        arrays[f"{name}_images"] = split.images.permute(0, 2, 3, 1).numpy()
        arrays[f"{name}_labels"] = split.labels.numpy()
    files.save_arrays("memory.npz", **arrays)
    given = small.settings({})
    given["recipe"]["first"].pop("window")
    cell = {"plan": "p", "dataset": "d", "seed": "1"}
    incremental.run(cell, "m" * 16, data="memory.npz", model="other/model", history="other/history.csv", **given)
    axes = {key: given[key] for key in ("order", "protocol", "training")}
    predictions.predict("memory.npz", "other/model", "other.npz", seed=1, **axes)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_without_windows_a_chain_is_that_of_images_in_memory_to_the_bit(
    here: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setenv("LONGTAIL_WORKERS", workers)
    chains_of_memory(sets.load("data.npz"))
    given = small.settings({"window": None})
    small.run_chain(window=None)
    axes = {key: given[key] for key in ("order", "protocol", "training")}
    chain.predict("data.npz", "model", "predictions.npz", seed=1, **axes)
    assert {path.name for path in Path("model").iterdir()} == {path.name for path in Path("other/model").iterdir()}
    for step in range(3):  # five classes, two at a time
        name = f"step_{step:02}.safetensors"
        assert (Path("model") / name).read_bytes() == (Path("other/model") / name).read_bytes()
    ours, other = files.load_arrays("predictions.npz"), files.load_arrays("other.npz")
    assert ours.keys() == other.keys()
    for name, values in ours.items():
        if name != "provenance":
            assert np.array_equal(values, other[name]), name
    small.run_chain()
    assert Path("model/step_00.safetensors").read_bytes() != Path("other/model/step_00.safetensors").read_bytes()


@pytest.mark.slow
def test_a_chain_killed_in_the_middle_of_an_epoch_ends_with_the_same_bytes(here: Path) -> None:
    killed, whole = folder(here, "killed"), folder(here, "whole")
    assert program(whole, workers=2, chain={}) == 0
    steps = len(files.load_arrays(whole / "seen-0.npz")) // 2
    assert program(killed, chain={}, step=2) == -signal.SIGKILL
    assert program(killed, chain={}, workers=2, step=steps // 2) == -signal.SIGKILL
    assert not (killed / "model").exists() and [*killed.glob("runs/.checkpoints/*/step_*")]
    assert program(killed, chain={}) == 0
    names = [path.name for path in (whole / "model").glob("*.safetensors")]
    for name in [*(f"model/{name}" for name in names), "model/memory.npz", "model/steps.json", "history.csv"]:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_walk_a_chain_as_one(here: Path) -> None:
    one, two = folder(here, "one"), folder(here, "two")
    first = {"sync_batch_norm": True, "optimizer": small.RECIPE["optimizer"] | {"lr": 1e-6}}
    assert program(one, chain=first) == 0
    assert program(two, chain=first, processes=2) == 0
    alone = files.load_arrays(one / "seen-0.npz")
    shared = [files.load_arrays(two / f"seen-{rank}.npz") for rank in (0, 1)]
    for n in range(len(alone) // 2):
        for rank, seen in enumerate(shared):
            assert np.array_equal(seen[f"images_{n}"], alone[f"images_{n}"][rank::2])
    assert files.read_json(one / "model/steps.json") == files.read_json(two / "model/steps.json")
    for row, other in zip(*(files.read_csv(where / "history.csv") for where in (one, two)), strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), abs=1e-4)


def test_an_image_of_a_class_to_come_is_refused(here: Path) -> None:
    stream = sets.load("data.npz")
    with train.reading(stream, torch.device("cpu")) as splits:
        split: Any = splits["train"]
        images_of = chain.Files(split.images, split.labels.numpy())
        rows = np.flatnonzero(images_of.labels_N == 3)
        assert len(images_of.split(rows, 4, torch.device("cpu"))) == len(rows) > 0
        with pytest.raises(ValueError, match=r"label 3 is not in 0\.\.2"):
            images_of.split(rows, 3, torch.device("cpu"))


def test_windows_are_drawn_anew_in_each_epoch_and_change_what_is_learned(here: Path) -> None:
    small.run(window=None)
    plain = Path("model/last.safetensors").read_bytes()
    small.run()
    assert Path("model/last.safetensors").read_bytes() != plain
    stream = sets.load("data.npz")
    with train.reading(stream, torch.device("cpu")) as splits:
        seen: Any = splits["train"].images
        how = images.as_window(stream.square, small.RECIPE["window"])
        shown = []
        for epoch in (1, 2, 1):
            seen.begin(how, iter([images.Request(torch.tensor([0]), [(1, images.DRAWS, epoch, 7)])]))
            shown.append(seen[torch.tensor([0])])
    assert torch.equal(shown[0], shown[2]) and not torch.equal(shown[0], shown[1])


def program(where: Path, *, processes: int = 1, workers: int = 1, **options: Any) -> int:
    environment = {
        **os.environ, "LONGTAIL_WORKERS": str(workers), "LONGTAIL_QUIET": "1", "LONGTAIL_PROCESSES": str(processes),
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "tests" / "small_stream.py"), json.dumps(options)]
    done = subprocess.run(command, cwd=where, check=False, capture_output=True, env=environment, text=True)
    if done.returncode > 0:
        print(done.stderr[-3000:])
    return done.returncode


def folder(here: Path, name: str) -> Path:
    made = here / name
    made.mkdir()
    (made / "data.npz").write_bytes((here / "data.npz").read_bytes())
    return made


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"method": "class_balanced_sampling", "chunk": 1, "mixup_alpha": 0}])
def test_killed_in_the_middle_of_an_epoch_it_ends_with_the_same_bytes(here: Path, options: dict[str, Any]) -> None:
    killed, whole = folder(here, "killed"), folder(here, "whole")
    assert program(whole, workers=2, **options) == 0
    assert program(killed, step=2, **options) == -signal.SIGKILL
    assert program(killed, step=4, workers=2, **options) == -signal.SIGKILL  # in the second epoch
    assert not (killed / "model").exists() and [*killed.glob("runs/.checkpoints/*.pt")]
    assert program(killed, **options) == 0
    for name in ("model/last.safetensors", "model/best.safetensors", "model/epochs.json", "history.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_two_processes_see_what_one_sees_each_image_once(here: Path) -> None:
    one, two = folder(here, "one"), folder(here, "two")
    options = {"sync_batch_norm": True, "lr": 1e-6}  # networks that stay the same, to rounding
    assert program(one, **options) == 0
    assert program(two, processes=2, **options) == 0
    alone = files.load_arrays(one / "seen-0.npz")
    shared = [files.load_arrays(two / f"seen-{rank}.npz") for rank in (0, 1)]
    for n in range(len(alone) // 2):
        for rank, seen in enumerate(shared):
            assert np.array_equal(seen[f"places_{n}"], alone[f"places_{n}"][rank::2])
            assert np.array_equal(seen[f"images_{n}"], alone[f"images_{n}"][rank::2])
    for row, other in zip(*(files.read_csv(where / "history.csv") for where in (one, two)), strict=True):
        for column in ("loss", "train_accuracy", "held_out_accuracy", "test_accuracy"):
            assert float(row[column]) == pytest.approx(float(other[column]), abs=1e-4)


def test_a_backbone_is_tuned_on_files_as_on_images_in_memory(here: Path) -> None:
    from longtail.finetuning import train as finetuning

    stream = sets.load("data.npz")
    network: dict[str, Any] = {"network": small.TUNED, "normalization": None, "mixup_alpha": 0}
    small.run(backbone=small.BACKBONE, window=None, **network)
    of_files = Path("model/last.safetensors").read_bytes()
    arrays: dict[str, np.ndarray] = {"class_names": stream.class_names}
    for name, split in in_memory(stream).items():
        arrays |= {f"{name}_images": split.images.permute(0, 2, 3, 1).numpy(), f"{name}_labels": split.labels.numpy()}
    files.save_arrays("memory.npz", **arrays)
    finetuning.train(
        small.CELL, "f" * 16, data="memory.npz", recipe={**small.RECIPE, "window": None, **network},
        method={"taus": [0.0, 2.0]}, backbone=small.BACKBONE, model="model", history="history.csv",
    )  # fmt: skip
    assert Path("model/last.safetensors").read_bytes() == of_files and tuned.is_tuned("model/last.safetensors")


# ------------------------------------------------------------------------------------------------ afterwards


@pytest.mark.parametrize("backbone", [None, small.BACKBONE])
def test_features_and_heads_give_the_networks_own_logits(here: Path, backbone: dict[str, Any] | None) -> None:
    changes = {} if backbone is None else {"network": small.TUNED, "normalization": None}
    small.run(backbone=backbone, **changes)
    predict.predict("data.npz", "model", "features", "heads", "out.npz")
    splits = in_memory(sets.load("data.npz"))
    epochs = files.read_json("model/epochs.json")
    kept = files.load_arrays("out.npz")
    assert set(epochs) == {"last", "best"} and kept["last_epoch"] == 2
    for which in epochs:
        network = predict.load(f"model/{which}.safetensors", torch.device("cpu"))
        heads = streamed.load("heads", which)
        assert isinstance(heads, own.OwnHeads) and heads.settings["experts"] == 2
        for name, split in splits.items():
            wanted = inference.logits(network, split, precision="fp32").numpy()
            features = files.load_arrays(f"features/{which}.npz", f"{name}_images")[f"{name}_images"]
            found = streamed.Logits(heads, features).experts(slice(0, len(features)))
            np.testing.assert_allclose(found, wanted, atol=2e-4)
        shown = kept[f"{which}_test_logits"]
        np.testing.assert_allclose(shown, found[:, : shown.shape[1]], atol=1e-6)
    aligned = streamed.align("features", "heads", reading="equal_shares", weights="uniform", temperature=1, strength=1)
    assert set(aligned["last"]) == {"aligned_on_train", "aligned_on_held_out", "logit_adjusted"}
    files.write_json("alignment.json", aligned)
    found = streamed.evaluate(
        "features", "heads", "out.npz", "alignment.json", ece_bins=15, many_above=10, few_below=6,
        distribution_ratios=[2], distribution_draws=2,
    )  # fmt: skip
    logits = inference.logits(
        predict.load("model/last.safetensors", torch.device("cpu")), splits["test"], precision="fp32"
    )
    accuracy = logits.mean(0).argmax(1).eq(splits["test"].labels).double().mean()
    assert found.measures["last"]["raw"]["accuracy"] == pytest.approx(accuracy.item())


def test_of_a_large_split_features_are_kept_of_what_is_fitted_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.run()
    settings: dict[str, Any] = {"reading": "equal_shares", "weights": "uniform", "temperature": 1, "strength": 1}
    monkeypatch.setattr(streamed, "FITTED_ROWS", 25)
    predict.predict("data.npz", "model", "features", "heads", "out.npz")
    few = files.load_arrays("features/last.npz")
    rows = streamed.fitted_rows(few["train_labels"], 25)
    assert len(few["train_images"]) == len(rows) < len(few["train_labels"]) == sum(large_trees.SIZES)
    of_few = streamed.align("features", "heads", **settings)
    monkeypatch.setattr(streamed, "FITTED_ROWS", 1000)
    predict.predict("data.npz", "model", "all", "heads", "out.npz")
    every = files.load_arrays("all/last.npz")
    np.testing.assert_allclose(every["train_images"][rows], few["train_images"], atol=1e-5)
    monkeypatch.setattr(streamed, "FITTED_ROWS", 25)
    of_all = streamed.align("all", "heads", **settings)
    np.testing.assert_allclose(
        of_few["last"]["aligned_on_train"]["shift"], of_all["last"]["aligned_on_train"]["shift"], atol=1e-4
    )


@pytest.mark.parametrize("way", ["crt", "tau_norm", "ncm"])
def test_other_heads_are_those_that_images_in_memory_give(here: Path, way: str) -> None:
    small.run()
    settings: dict[str, Any] = {
        "crt": {"epochs": 3, "batch_size": 16, "lr": 0.1, "weight_decay": 5e-4},
        "tau_norm": {"taus": [0.0, 0.5, 1.0]}, "ncm": {},
    }[way]  # fmt: skip
    predict.refit("f", data="data.npz", model="model", history="history.csv", way=way, seed=1, out="again",
                  history_out="again.csv", **settings)  # fmt: skip
    network = networks.load("model/last.safetensors")
    inference.set_up(1)
    refit.refit(network, in_memory(sets.load("data.npz")), way, **settings)
    found = networks.load("again/last.safetensors")
    for mine, theirs in zip(found.experts, network.experts, strict=True):
        torch.testing.assert_close(mine.head.state_dict(), theirs.head.state_dict(), atol=1e-3, rtol=1e-3)
    assert Path("again.csv").read_bytes() == Path("history.csv").read_bytes()
    assert [one["step"] for one in files.read_json("again/provenance.json")] == ["train", "refit"]


def test_the_first_test_images_are_what_networks_are_shown(here: Path) -> None:
    wanted = in_memory(sets.load("data.npz"))["test"].images.permute(0, 2, 3, 1)[:7]
    assert np.array_equal(predict.first("data.npz", 7), wanted.numpy())


# --------------------------------------------------------------------------------------------- the data sets


def test_a_stream_has_all_rows_of_its_index_and_says_what_they_are(here: Path) -> None:
    stream, arrays = sets.load("data.npz"), files.load_arrays("index.npz")
    for split in index.SPLITS:
        assert np.array_equal(stream.labels[split], arrays[f"{split}_labels"])
        assert [piece.size for piece in stream.pieces[split]] == arrays[f"{split}_sizes"].tolist()
    assert stream.report["kinds"]["JPEG CMYK"] and not stream.report["left_out"]
    assert not [*Path("runs/.looked").glob("*/*")]
    files.save_arrays("other.npz", **arrays)
    with pytest.raises(ValueError, match=r"other\.npz: not the images of an index"):
        sets.load("other.npz")


def test_broken_files_are_named_refused_or_left_out(here: Path, capsys: pytest.CaptureFixture) -> None:
    stream = sets.load("data.npz")
    path = Path(stream.store.at(stream.pieces["train"][2].file))
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match=rf"1 files are no usable images: .*{path.name} \(no image, by its content\)"):
        make("again.npz")
    assert not Path("again.npz").exists()
    for stored in (33, 0):
        left = make("again.npz", broken="leave_out", stored=stored, side=28)
    assert len(left.labels["train"]) == len(stream.labels["train"]) - 1 and ": 1: " in capsys.readouterr().out
    assert left.pieces["train"][2] == stream.pieces["train"][3] and list(left.report["left_out"].values())
    with train.reading(stream, torch.device("cpu")) as splits:  # one that breaks later is named, too
        seen: Any = splits["train"].images
        with pytest.raises(ValueError, match=rf"{path.name} at 0: no image, by its content, though it was an image"):
            seen[0:8]
    path.write_bytes(whole)
    for stored in (33, 0):
        assert len(make("mended.npz", stored=stored, side=28).labels["train"]) == len(stream.labels["train"])
    path.unlink()
    with pytest.raises(ValueError, match="1 of 84 listed images of ImageNet-LT are not there"):
        make("gone.npz")


def test_of_a_class_something_must_be_left(here: Path) -> None:
    stream = sets.load("data.npz")
    for row in np.flatnonzero(stream.labels["train"] == 4):
        path = Path(stream.store.at(stream.pieces["train"][row].file))
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match="train: of class 4 no image is left"):
        make("again.npz", broken="leave_out")


def test_stored_images_are_smaller_and_held_against_their_checksums(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "SHARD", 16)
    monkeypatch.setattr(sets, "PART", 5)
    plain, kept = sets.load("data.npz"), make("kept.npz", stored=33, side=28)
    for split in index.SPLITS:
        assert len(kept.pieces[split]) == len(plain.pieces[split])
        for mine, theirs in zip(kept.pieces[split], plain.pieces[split], strict=True):
            stored = Image.open(io.BytesIO(kept.store.piece(mine)))
            assert stored.format == "JPEG" and min(stored.size) in (33, 1)
            a, b = (square(s.piece(p), kept.square)[0].float() for s, p in ((kept.store, mine), (plain.store, theirs)))
            assert (a - b).abs().mean() < 12
    shards = sorted(Path("runs/.stored").rglob("*.images"))
    assert len(shards) == 4 + 1 + 2
    (here / "large").rename(here / "elsewhere")  # they are all that a training needs
    again = sets.load("kept.npz")
    with monkeypatch.context() as patched:
        patched.setattr(sets.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
        sets.load("kept.npz")
    content = bytearray(shards[0].read_bytes())
    content[100] ^= 1
    shards[0].write_bytes(content)
    with pytest.raises(ValueError, match=r"\.images: SHA-256 .* damaged; `dvc repro -f -s`"):
        sets.load("kept.npz")
    shards[0].unlink()
    with pytest.raises(ValueError, match="this shard of smaller images is gone"):
        sets.load("kept.npz")
    (here / "elsewhere").rename(here / "large")
    make("kept.npz", stored=33, side=28)
    assert all((here / path).is_file() for path in shards) and sets.load("kept.npz").pieces == again.pieces
    sets.make("index.npz", "other.npz", layout="imagenet_lt", made_by="edited", **{**HOW, "stored": 33, "side": 28})  # type: ignore[arg-type]
    assert Path("other.npz").read_bytes() == Path("kept.npz").read_bytes()  # code that makes the same is no change
    assert len([*Path("runs/.stored").iterdir()]) == 1


def test_a_look_that_was_killed_goes_on_with_the_next_shard(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "SHARD", 16)
    make("whole.npz", stored=33, side=28)
    whole = Path("whole.npz").read_bytes()
    computed: list[Path] = []
    original = sets._shard

    def dies(path: Path, *rest: Any, **more: Any) -> None:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(path)
        original(path, *rest, **more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sets, "_shard", dies)
        make("again.npz", stored=33, side=28)
    assert len([*Path("runs/.looked").rglob("train-*.npz")]) == 2
    make("again.npz", stored=33, side=28)
    assert Path("again.npz").read_bytes() == whole


# ------------------------------------------------------------------------------------------------- the reader


def test_workers_that_shared_memory_has_no_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "free")
    monkeypatch.setattr(feed.shutil, "disk_usage", lambda _: usage(64 << 20))
    assert feed.ahead(2, 4 << 20) == feed.AHEAD and feed.ahead(8, 4 << 20) == 1
    with pytest.raises(
        ValueError, match=r"has 64 MiB free for this process, too little for 16 workers .* LONGTAIL_WORKERS"
    ):
        feed.ahead(16, 4 << 20)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="has 16 MiB free for this process, too little for 8 workers"):
        feed.ahead(8, 4 << 20)
    monkeypatch.delenv("LONGTAIL_WORKERS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(96))
    assert feed.workers() == feed.MOST
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert feed.workers() == 12
    monkeypatch.setattr(feed, "SHARED", Path("/nowhere"))
    assert feed.ahead(16, 4 << 20) == feed.AHEAD


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_stops_a_worker_is_said_as_in_one_process(
    here: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setenv("LONGTAIL_WORKERS", workers)
    Path("a.jpg").write_bytes(large_trees.image(0))
    store = Store(here.name, str(here.parent))
    good, longer, gone = (Piece(name, 0, size) for name, size in (("a.jpg", -1), ("a.jpg", 7), ("b.jpg", 7)))
    good = good._replace(size=len(large_trees.image(0)))
    how = Square(16, 1.0, False, False)
    with feed.Reader(store, 1 << 10) as reader:
        assert len([*reader.read([feed.Wanted([good] * n, how) for n in (1, 2, 3)])]) == 3
        for bad, error in ((longer, ValueError), (gone, FileNotFoundError)):
            with pytest.raises(error, match=r"no longer the 7 bytes|b\.jpg"):
                [*reader.read([feed.Wanted([good], how), feed.Wanted([bad], how), feed.Wanted([good], how)])]
        assert [len(chunk.values) for chunk in reader.read([feed.Wanted([good] * 2, how)])] == [2]


def test_the_global_generator_is_left_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for workers in ("0", "1"):
        monkeypatch.setenv("LONGTAIL_WORKERS", workers)
        torch.manual_seed(5)
        with train.reading(sets.load("data.npz"), torch.device("cpu")) as splits:
            seen: Any = splits["test"].images
            seen[0:9]
        assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(5)).item()


def test_areas_are_drawn_on_the_scale_that_is_asked_for() -> None:
    """The mean of uniform areas, and of ratios whose logarithm is uniform, to three standard errors."""
    found = boxes(4000, 1000, 1000, (0.1, 0.3), (0.8, 1.25))
    areas, ratios = np.array([b.height * b.width / 1e6 for b in found]), np.log([b.width / b.height for b in found])
    for values, low, high in ((areas, 0.1, 0.3), (ratios, math.log(0.8), math.log(1.25))):
        assert abs(values.mean() - (low + high) / 2) < 3 * (high - low) / math.sqrt(12 * len(values)) + 1e-3
