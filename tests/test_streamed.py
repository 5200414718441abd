"""Corrections and measures from blocks of logits: what they are from all logits at once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from longtail import evaluation, networks, posthoc
from longtail.posthoc import predictions
from longtail.training import inference, streamed
from longtail.workflow import files, params

CLASSES, D = 7, 12
ALIGN = {"reading": "equal_shares", "weights": "uniform", "temperature": 1.0, "strength": 1.0}
EVALUATE = {
    "ece_bins": 15, "many_above": 40, "few_below": 10, "distribution_ratios": [2, 5], "distribution_draws": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features whose mean says something of the class, two networks on them, and what `predict` makes of all."""
    folder = tmp_path_factory.mktemp("cell")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, D))
    arrays: dict[str, np.ndarray] = {"class_names": np.array([f"class {c}" for c in range(CLASSES)])}
    for split, sizes in {
        "train": 80 // 2 ** np.arange(CLASSES),
        "held_out": [4] * CLASSES,
        "test": [30] * CLASSES,
    }.items():
        labels = np.repeat(np.arange(CLASSES), sizes)
        values = centres[labels] + rng.normal(size=(len(labels), D))
        arrays |= {f"{split}_images": values[:, None, None, :].astype(np.float32), f"{split}_labels": labels}
    files.save_arrays(folder / "data.npz", **arrays)
    torch.manual_seed(0)
    for which, experts in (("last", 3), ("best", 2)):
        network = networks.build(
            hidden=0, standardize=True, channels=D, classes=CLASSES, experts=experts, head="cosine", scale=9.0,
            mean=[0.1], std=[2.0],
        )  # fmt: skip
        network.norm.running_mean.uniform_(-1, 1)
        for c, expert in enumerate(network.experts):
            expert.head.weight.data += 2 * torch.from_numpy(centres * (1 + c)).float()
        networks.save(network, folder / f"model/{which}.safetensors")
    files.write_json(folder / "model/epochs.json", {"last": 3, "best": 2})
    data, model = str(folder / "data.npz"), str(folder / "model")
    inference.predict(data, model, str(folder / "whole.npz"))
    files.write_json(folder / "whole.json", predictions.align(str(folder / "whole.npz"), **ALIGN))
    return folder


def close(one: object, other: object) -> None:
    """Equal but for rounding, containers included."""
    if isinstance(one, dict):
        assert isinstance(other, dict) and list(one) == list(other)
        for key in one:
            close(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            close(a, b)
    elif isinstance(one, (float, np.ndarray, np.floating)):
        np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), rtol=1e-6, atol=2e-6)
    else:
        assert one == other


@pytest.mark.parametrize("block", [5, 64, 1000])
def test_measures_and_corrections_are_those_of_all_logits_at_once(
    cell: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "BLOCK", block)
    data, model = str(cell / "data.npz"), str(cell / "model")
    streamed.predict(data, model, str(cell / "small.npz"))
    whole, small = files.load_arrays(cell / "whole.npz"), files.load_arrays(cell / "small.npz")
    assert {name for name in whole if name not in small} == {
        f"{which}_{split}_logits" for which in ("last", "best") for split in ("train", "held_out")
    }
    assert all(np.array_equal(whole[name], small[name]) for name in small if "logits" not in name)
    np.testing.assert_allclose(small["last_test_logits"], whole["last_test_logits"][:, : streamed.SHOWN], atol=1e-5)
    files.write_json(cell / "small.json", streamed.align(data, model, **ALIGN))
    close(files.read_json(cell / "small.json"), files.read_json(cell / "whole.json"))
    by_block = streamed.evaluate(data, model, str(cell / "small.npz"), str(cell / "small.json"), **EVALUATE)
    at_once = evaluation.evaluate(str(cell / "whole.npz"), str(cell / "whole.json"), **EVALUATE)
    close(by_block.measures, at_once.measures)
    close(by_block.classes, at_once.classes)
    close(by_block.distributions, at_once.distributions)
    close(by_block.reliability, at_once.reliability)
    assert by_block.right == at_once.right


@pytest.mark.parametrize("reading", streamed.READINGS_BY_ROW)
@pytest.mark.parametrize("weights", ["uniform", "balanced"])
@pytest.mark.parametrize("in_memory", [0, 1 << 25])
def test_every_reading_that_goes_by_rows(
    cell: Path, reading: str, weights: str, in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "IN_MEMORY", in_memory)
    monkeypatch.setattr(streamed, "EQUAL_WITHIN", 0.0)
    chosen = {**ALIGN, "reading": reading, "weights": weights, "temperature": 1.5, "strength": 0.7}
    found = streamed.align(str(cell / "data.npz"), str(cell / "model"), **chosen)
    close(files.rounded(found), files.rounded(predictions.align(str(cell / "whole.npz"), **chosen)))


def test_energies_of_logits_in_a_file_are_equal_to_a_thousandth_of_a_nat(
    cell: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearly = {}
    for in_memory in (1 << 25, 0):
        monkeypatch.setattr(streamed, "IN_MEMORY", in_memory)
        found = streamed.align(str(cell / "data.npz"), str(cell / "model"), **ALIGN)
        nearly[in_memory] = np.array(found["last"]["aligned_on_train"]["shift"])
    whole, stored = nearly.values()
    assert 0 < np.abs(stored - whole).max() < 0.02
    logits, labels = (
        files.load_arrays(cell / "whole.npz")[f"{name}"] for name in ("last_train_logits", "train_labels")
    )
    share = np.bincount(labels) / len(labels)
    u = logits.mean(0) + stored + np.log(share)
    expected = (np.exp(u) / np.exp(u).sum(1, keepdims=True)).mean(0)
    assert np.ptp(np.log(expected / share)) < streamed.EQUAL_WITHIN


def test_a_reading_that_needs_all_logits_is_refused(cell: Path) -> None:
    assert streamed.READINGS_BY_ROW == params.READINGS_BY_ROW  # which says so before anything runs
    with pytest.raises(ValueError, match=r"own_samples' needs all logits at once; allowed .* all_samples, normalized"):
        streamed.align(str(cell / "data.npz"), str(cell / "model"), **{**ALIGN, "reading": "own_samples"})


def test_rows_that_are_fitted_on_are_all_of_small_classes_and_few_of_large_ones() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [500, 60, 9, 2]))
    rows = streamed.fitted_rows(labels, 50)
    kept = np.bincount(labels[rows])
    assert kept.tolist() == [19, 19, 9, 2] and len(np.unique(rows)) == len(rows) and (np.diff(rows) > 0).all()
    assert streamed.fitted_rows(labels, len(labels)).tolist() == list(range(len(labels)))
    weights = streamed.weights_of(labels, rows, "uniform")
    np.testing.assert_allclose(np.bincount(labels[rows], weights), np.bincount(labels) / len(labels))
    np.testing.assert_allclose(np.bincount(labels[rows], streamed.weights_of(labels, rows, "balanced")), [0.25] * 4)


def test_a_correction_of_some_rows_is_near_that_of_all(cell: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = str(cell / "data.npz"), str(cell / "model")
    monkeypatch.setattr(streamed, "FITTED_ROWS", 100)
    some = np.array(streamed.align(data, model, **ALIGN)["last"]["aligned_on_train"]["shift"])
    whole = np.array(files.read_json(cell / "whole.json")["last"]["aligned_on_train"]["shift"])
    assert np.abs(some - whole).max() < 0.5 < np.abs(whole).max()


def test_networks_on_images_and_logits_that_are_no_numbers_are_refused(cell: Path, tmp_path: Path) -> None:
    network = networks.build(
        depth=8, width=16, channels=1, classes=3, experts=1, head="linear", scale=1.0, mean=[0.0], std=[1.0]
    )
    networks.save(network, tmp_path / "last.safetensors")
    with pytest.raises(ValueError, match="its network takes images"):
        streamed.load(tmp_path, "last")
    heads = streamed.load(cell / "model", "last")
    heads.experts[1].head.weight.data[4, 2] = float("nan")
    with pytest.raises(ValueError, match="the logit of row 0, class 4 is nan"):
        streamed.Logits(heads, np.ones((3, 1, 1, D), np.float32))[0:3]


def test_networks_of_heads_apart_take_features(cell: Path, tmp_path: Path) -> None:
    heads = [networks.load(cell / f"model/{which}.safetensors") for which in ("last", "best")]
    networks.save(networks.Apart(heads), tmp_path / "last.safetensors")
    assert streamed.load(tmp_path, "last").settings["experts"] == 5


def test_without_ratios_there_is_the_uniform_test_set_alone(cell: Path) -> None:
    data, model = str(cell / "data.npz"), str(cell / "model")
    streamed.predict(data, model, str(cell / "plain.npz"))
    found = streamed.evaluate(
        data, model, str(cell / "plain.npz"), str(cell / "whole.json"), **EVALUATE | {"distribution_ratios": []}
    )
    assert {row["distribution"] for row in found.distributions} == {"uniform"}


def test_shown_logits_are_enough_for_exports(cell: Path) -> None:
    from longtail.serving import export

    assert streamed.SHOWN >= export.CHECKED
    assert posthoc.from_dict(files.read_json(cell / "whole.json")["last"]["logit_adjusted"]) is not None
