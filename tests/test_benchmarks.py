"""The benchmarks run; what they measure is for a machine that does nothing else."""

import csv
import importlib

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from test_tracking import add_cell

from longtail.data import batches, sources
from longtail.workflow import files


def run(monkeypatch, name: str, *flags: str) -> None:
    monkeypatch.syspath_prepend(ROOT)
    importlib.import_module(f"benchmarks.{name}").main(flags)


@pytest.mark.slow
def test_engine(tmp_path, monkeypatch):
    run(monkeypatch, "engine", "--quick", "--results", str(tmp_path))
    rows = [line for line in (tmp_path / "engine.md").read_text().splitlines() if line.startswith("| 3, ")]
    assert len(rows) == 4  # three augmentations, and the straightforward loop
    for row in rows:
        rates = [float(cell.split()[0].replace(",", "")) for cell in row.strip("| ").split(" | ")[1:]]
        assert all(rate >= 0 for rate in rates) and rates[0] > 0


@pytest.mark.slow
def test_data_path(tmp_path, monkeypatch):
    run(monkeypatch, "data_path", "--quick", "--results", str(tmp_path))
    assert "images/s" in (tmp_path / "data_path.md").read_text()


@pytest.mark.slow
def test_profile(tmp_path, monkeypatch):
    run(monkeypatch, "profile", "--quick", "--results", str(tmp_path))
    rows = [line for line in (tmp_path / "profile.md").read_text().splitlines() if line.startswith("| ")]
    shares = [float(row.split(" | ")[1].split(" %")[0]) for row in rows[2:]]
    assert shares[-1] == 100 and 98 <= sum(shares[:-1]) <= 102


@pytest.mark.slow
def test_cost_is_measured_and_drawn(tmp_path, monkeypatch):
    run(monkeypatch, "cost", "--quick", "--results", str(tmp_path))
    with open(tmp_path / "cost.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert rows and all(float(row["seconds"]) > 0 for row in rows)
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_large_set_is_measured_and_drawn(tmp_path, monkeypatch):
    run(monkeypatch, "large", "--quick", "--results", str(tmp_path))
    rows = [line.split(" | ")[0].strip("| ") for line in (tmp_path / "large.md").read_text().splitlines()]
    assert {*importlib.import_module("benchmarks.large").STEPS, "2,000", "4,000"} <= {*rows}
    assert (tmp_path / "large.png").read_bytes().startswith(b"\x89PNG")


def test_time_to_accuracy_keeps_what_was_measured_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("benchmarks.time_to_accuracy")
    cell = {
        "dataset": "d", "recipe": "long", "method": "ce", "seed": "1", "training": "x", "epochs": 200,
        "accuracy": 0.40, "seconds": 6000.0, "images_per_s": 100.0, "memory_mib": 1500.0,
        "device": "cpu", "cpu": "c", "threads": "1",
    }  # fmt: skip
    again = {**cell, "seed": "2", "accuracy": 0.42}
    short = {**cell, "recipe": "fast", "epochs": 40, "accuracy": 0.39, "seconds": 1200.0}
    arguments = ["--plan", "p", "--dataset", "d", "--results", str(tmp_path)]
    monkeypatch.setattr(module, "collect", lambda root, plan: [cell, again])
    module.main(arguments)
    monkeypatch.setattr(module, "collect", lambda root, plan: [short, {**cell, "accuracy": 0.44}])
    module.main(arguments)
    rows = module.read(tmp_path / "time_to_accuracy.csv")
    assert [(row["recipe"], row["seed"], row["accuracy"]) for row in rows] == [
        ("fast", "1", "0.39"), ("long", "1", "0.44"), ("long", "2", "0.42"),
    ]  # fmt: skip
    lines = [line for line in (tmp_path / "time_to_accuracy.md").read_text().splitlines() if line.startswith("| ce")]
    assert lines[0] == "| ce · long | 200 | 1, 2 | 43.0 ± 1.4 | 100.0 (100.0 to 100.0) | 1.00 |"
    assert lines[1] == "| ce · fast | 40 | 1 | 39.0 | 20.0 (20.0 to 20.0) | 0.20 |"
    assert (tmp_path / "time_to_accuracy.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        module.main([*arguments[:2], "--dataset", "other", *arguments[4:]])
    assert "no cell of p on other was trained here" in capsys.readouterr().err


def test_time_to_accuracy_reads_the_cells_that_were_trained_here(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("benchmarks.time_to_accuracy")
    training = add_cell(tmp_path, "ce", accuracy=0.5)
    add_cell(tmp_path, "gala", accuracy=0.6)  # trained elsewhere: nobody knows how long it took
    machine = {"training": training, "seconds": 80.0, "images_per_s": 50.0, "memory_mib": 9.5}
    machine |= {"device": "cpu", "cpu": "c", "threads": 2}
    files.write_json(tmp_path / "runs/quick/digits_if20/digits/ce/0/machine.json", machine)
    (row,) = module.collect(tmp_path, "quick")
    assert tuple(row) == module.COLUMNS
    assert [*row.values()] == ["digits_if20", "digits", "ce", "0", training, 4, 0.5, 80.0, 50.0, 9.5, "cpu", "c", "2"]


@pytest.fixture
def recipe_time(tmp_path, monkeypatch):
    """The program with a recipe that is small for four of six epochs, and a clock that the pixels of a turn move."""
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("benchmarks.recipe_time")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    plain = {**params["recipes"]["smoke"], "epochs": 6, "test_every": 0}
    plain["network"] = {**plain["network"], "depth": 8, "width": 4}
    small = {**plain, "resolution": {"milestones": [1, 4], "scales": [0.25, 0.5]}, "test_every": 2}
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump({**params, "recipes": {"small": small, "plain": plain}}, sort_keys=False)
    )
    monkeypatch.setattr(module, "ROOT", tmp_path)
    clock = [0.0]
    monkeypatch.setattr(module, "perf_counter", lambda: clock[0])
    epoch = module.Training.finish_epoch

    def finish_epoch(self, between_steps):
        images = epoch(self, between_steps)
        clock[0] += images * module.scale_of(self.epoch, **self.resolution) ** 2
        return images

    def class_accuracy(network, split, *, precision):
        clock[0] += len(split) / 4
        return 0.0

    monkeypatch.setattr(module.Training, "finish_epoch", finish_epoch)
    monkeypatch.setattr(module, "class_accuracy", class_accuracy)
    return module


def test_recipe_time_adds_up_epochs_of_each_size_and_looks(tmp_path, recipe_time):
    flags = ["--methods", "ce", "--images", "128", "--turns", "2", "--results", str(tmp_path)]
    recipe_time.main(["--recipes", "small", "plain", *flags])
    lines = [line for line in (tmp_path / "recipe_time.md").read_text().splitlines() if line.startswith("| ce")]
    plain = 6 * 10_847
    small = (1 / 16 + 3 / 4 + 2) * 10_847 + 3 * 10_000 / 4
    assert lines == [
        f"| ce · small | 1 of 8 px, 3 of 16 px, 2 of 32 px | 3 | {small / 60:.1f} | {small / plain:.3f} |",
        f"| ce · plain | 6 of 32 px | 0 | {plain / 60:.1f} | 1.000 |",
    ]


def test_recipe_time_says_what_it_does_not_know(recipe_time, capsys):
    with pytest.raises(SystemExit):
        recipe_time.main(["--recipes", "slow"])
    assert "--recipes slow: params.yaml has small, plain" in capsys.readouterr().err


def test_posthoc(tmp_path, monkeypatch):
    run(monkeypatch, "posthoc", "--quick", "--results", str(tmp_path))
    rows = [line for line in (tmp_path / "posthoc.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 7 and "EnergyAligning(reading='own_samples')" in rows[3] and "EnergyAligning()" in rows[6]


def test_seconds(tmp_path, monkeypatch):
    """Its repositories of empty stages are up to date, as it says, and a command that fails is no measurement."""
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("benchmarks.seconds")
    folder = module.empty(tmp_path / "few", 3)
    wall, processor = module.timed("python -m dvc status -q", folder)
    assert wall > 0 and processor > 0
    (folder / "in").write_text("another\n")
    with pytest.raises(RuntimeError, match="dvc status -q"):
        module.timed("python -m dvc status -q", folder)


def test_your_images_are_a_tail_of_cifar_10s(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("benchmarks.your_images")
    counts = module.counts(10, 500)
    assert sum(counts) == 1401 and (counts[0], counts[-1]) == (500, 10) and counts == sorted(counts, reverse=True)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), np.tile([2, 0, 1], 20)
    assert module.folder_of(images, labels, ["ape", "bee", "cat"], 20, tmp_path / "set") == 20 + 14 + 10
    assert len([*(tmp_path / "set/bee").iterdir()]) == 14
    third = np.asarray(Image.open(tmp_path / "set/cat/0003.png"))
    assert np.array_equal(third, images[labels == 2][3])
    monkeypatch.setattr(module, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        module.main(["--quick"])  # no raw images yet


@pytest.fixture
def spread(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.spread")


def test_spread_trains_what_is_missing(tmp_path, monkeypatch, spread):
    monkeypatch.setattr(spread, "ROOT", tmp_path)
    flags = ["--results", str(tmp_path), "--seeds", "3"]
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    with pytest.raises(SystemExit):
        spread.main(flags)  # no raw images yet
    files.save_arrays(tmp_path / "data/raw/digits.npz", **sources.load("digits")("", test_per_class=50, seed=0))
    trained = []

    def accuracy(row, epochs):
        trained.append(tuple(int(row[key]) for key in ("subset", "mixing", "seed")))
        return 0.5 + 0.01 * len(trained)

    monkeypatch.setattr(spread, "accuracy", accuracy)
    spread.main([*flags, "--mixup", "0"])
    assert trained == [(0, 0, 0), *(run for n in (1, 2) for run in ((n, n, n), (0, n, n), (n, 0, 0)))]
    spread.main([*flags, "--seeds", "2", "--mixup", "0"])
    assert len(trained) == 7
    spread.main(flags)
    assert trained[7:] == [(0, 0, 0), *(run for n in (1, 2) for run in ((n, n, n), (0, n, n), (n, 0, 0), (0, 0, n)))]
    lines = (tmp_path / "spread.md").read_text().splitlines()
    without = next(line for line in lines if line.startswith("| the subset | 3 |"))  # 51, 53 and 56 %
    assert without.split(" | ")[2:4] == ["53.33", "2.52 (1.31 to 15.82)"]
    mixed = "".join(lines).split("mixup 0.4")[1]
    assert "(3 runs); the 2 other subsets" in mixed and "Difference " in mixed
    for wrong in (["--seeds", "1"], ["--recipe", "none"], ["--dataset", "cifar100_if100"]):
        with pytest.raises(SystemExit):
            spread.main([*flags, *wrong])


@pytest.mark.slow
def test_spread_trains_networks_that_learn(tmp_path, monkeypatch, spread):
    monkeypatch.setattr(spread, "ROOT", tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    files.save_arrays(tmp_path / "data/raw/digits.npz", **sources.load("digits")("", test_per_class=50, seed=0))
    row = dict.fromkeys(spread.COLUMNS[:-1], "1")
    row |= {"dataset": "digits_if20", "recipe": "digits", "method": "balanced_softmax", "mixup_alpha": "0.4"}
    found = spread.accuracy(row, epochs=12)
    assert found > 0.6
    assert spread.accuracy(row, epochs=12) == found
    assert spread.accuracy({**row, "subset": "0"}, epochs=12) != found
    assert spread.accuracy({**row, "mixing": "0"}, epochs=12) != found


def test_spread_replaces_the_weights_of_mixup_and_nothing_else(spread):
    images = torch.arange(64 * 3 * 4 * 4).reshape(64, 3, 4, 4).to(torch.uint8)
    split = batches.Split(images, torch.arange(64) % 5, 5)

    def drawn(seed: int) -> list[batches.Batch]:
        augmentation = {"crop_padding": 0, "flip": False, "policy": "none", "color_jitter": [0] * 4, "rotation": 0}
        return list(batches.epoch(
            split, batch_size=16, drop_last=False, augmentation={**augmentation, "cutout": 0}, mean=[0.5] * 3,
            std=[0.5] * 3, seed=seed, epoch=1, mixup_alpha=0.4,
        ))  # fmt: skip

    other, own = drawn(0), drawn(5)
    with spread.mixup_weights_of(0):
        mixed = drawn(5)
    assert [batch.weight for batch in mixed] == [batch.weight for batch in other] != [batch.weight for batch in own]
    for one, two in zip(mixed, own, strict=True):
        assert torch.equal(one[1], two[1]) and torch.equal(one[2], two[2])
    with spread.mixup_weights_of(5):
        assert all(torch.equal(one[0], two[0]) for one, two in zip(drawn(5), own, strict=True))
    assert torch.equal(drawn(5)[0][0], own[0][0])  # and it is over afterwards


def test_one_subset_against_the_others(spread):
    def row(subset, mixing, seed, accuracy):
        return {"subset": str(subset), "mixing": str(mixing), "seed": str(seed), "accuracy": str(accuracy)}

    rows = [row(0, 0, 0, 0.5), row(0, 1, 1, 0.54), row(0, 0, 1, 0.9), row(2, 2, 2, 0.6), row(1, 1, 1, 0.5),
            row(1, 0, 0, 0.7), row(2, 0, 0, 0.64)]  # fmt: skip
    zero, others = spread.by_subset(rows)
    assert zero == pytest.approx([50, 54]) and others == pytest.approx([60, 62])  # not the run with others' weights
    apart, low, high = spread.difference([1.0, 3.0], [5.0, 7.0])  # equal spreads: Student's, two degrees of freedom
    assert (apart, low, high) == pytest.approx((-4, -4 - 4.30265 * 2**0.5, -4 + 4.30265 * 2**0.5), rel=1e-5)


def test_intervals_of_spreads(spread):
    """A table's quantiles of chi-squared and F; and simulated spreads of a known one, of which 95 % are to be held."""
    ten = [0.0, 2.0] * 5  # s^2 = 10 / 9
    assert spread.deviation_interval(ten) == pytest.approx(((10 / 19.0228) ** 0.5, (10 / 2.7004) ** 0.5), rel=1e-4)
    ratio, low, high = spread.deviation_ratio([3 * x for x in ten], ten)
    assert (ratio, low, high) == pytest.approx((3, 3 / 4.02599**0.5, 3 * 4.02599**0.5), rel=1e-4)
    rng = np.random.default_rng(0)
    held = np.zeros(2)
    for _ in range(400):
        one, two = rng.normal(scale=2, size=6).tolist(), rng.normal(size=9).tolist()
        low, high = spread.deviation_interval(one)
        _, ratio_low, ratio_high = spread.deviation_ratio(one, two)
        held += (low < 2 < high, ratio_low < 2 < ratio_high)
    assert np.all(np.abs(held / 400 - 0.95) < 0.03)


@pytest.fixture
def candidates(tmp_path, monkeypatch):
    """The program in a folder of its own, with two small recipes for digits."""
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("benchmarks.candidates")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    base = {key: value for key, value in params["recipes"]["digits"].items() if key != "test_every"}
    given = {
        "data": {"source": "digits", "kept_out": 0.2, "profile": "exponential", "imbalance_factor": 20, "seed": 0},
        "base": {**base, "epochs": 2},
        "candidates": {"as it is": {}, "slower": {"optimizer": {"lr": 0.01}}},
    }
    (tmp_path / "candidates.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    raw = sources.load("digits")("", test_per_class=50, seed=0)
    rows = np.concatenate([np.flatnonzero(raw["train_labels"] == label)[:120] for label in range(10)])
    balanced = {name: raw[name][rows] for name in ("train_images", "train_labels")}
    files.save_arrays(tmp_path / "data/raw/digits.npz", **{**raw, **balanced})
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "SETTINGS", tmp_path / "candidates.yaml")
    return module


def test_validation_images_are_kept_out_of_the_long_tail(candidates):
    data, _ = candidates.read(candidates.SETTINGS)
    arrays = candidates.validation_arrays(**data)
    raw = files.load_arrays(candidates.ROOT / "data/raw/digits.npz")
    train, validation = ({image.tobytes() for image in arrays[f"{split}_images"]} for split in ("train", "test"))
    assert not train & validation and validation <= {image.tobytes() for image in raw["train_images"]}
    sizes = np.bincount(arrays["train_labels"])
    assert sizes[0] == 96 and sizes[-1] == 4  # 96 / 20, rounded down
    assert set(np.bincount(arrays["test_labels"])) == {24}


def test_candidates_are_trained_once(tmp_path, candidates, capsys):
    flags = ["--results", str(tmp_path), "--method", "balpoe"]
    candidates.main([*flags, "--only", "as it is"])
    (first,) = candidates.networks_in(tmp_path / "candidates.csv")
    candidates.main(flags)
    rows = candidates.networks_in(tmp_path / "candidates.csv")
    assert [row["candidate"] for row in rows] == ["as it is", "slower"] and rows[0] == first
    assert rows[0]["settings"] != rows[1]["settings"] and rows[0]["accuracy"] != rows[1]["accuracy"]
    assert "| balpoe: slower | 2 | 0 |" in (tmp_path / "candidates.md").read_text()
    assert not [*(tmp_path / "runs").rglob("*.pt")]
    capsys.readouterr()
    candidates.main(["--list"])
    assert capsys.readouterr().out == "as it is\nslower\n"


def test_candidates_say_what_they_do_not_know(tmp_path, candidates, capsys):
    for wrong, known in ((["--only", "other"], "as it is; slower"), (["--method", "other"], "balpoe")):
        with pytest.raises(SystemExit):
            candidates.main([*wrong, "--results", str(tmp_path)])
        assert known in capsys.readouterr().err
    given = yaml.safe_load(candidates.SETTINGS.read_text())
    candidates.SETTINGS.write_text(yaml.safe_dump(given | {"candidates": {"typo": {"optimizer": {"rate": 1}}}}))
    with pytest.raises(ValueError, match="typo has 'rate'"):
        candidates.read(candidates.SETTINGS)
    with pytest.raises(FileNotFoundError, match="download@cifar10"):
        candidates.validation_arrays("cifar10", 0.1, seed=0)
