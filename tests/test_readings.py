"""Comparing corrections on a cell's logits: what each may see, and who is chosen."""

import numpy as np
import pytest
from sklearn.base import clone

from longtail import posthoc
from longtail.evaluation import metrics, readings
from longtail.report import more_plots
from longtail.workflow import files

SETTINGS = {"many_above": 100, "few_below": 20, "ece_bins": 15}
COUNTS = np.array([200, 60, 12])


def save(path, *, held_out=True, missing=False):
    """A cell that leans towards the classes with many images, more so on test than on train."""
    rng = np.random.default_rng(0)
    arrays = {"class_counts": COUNTS}
    sizes = {"train": COUNTS, "held_out": np.array([40, 12, 0 if missing else 6]), "test": np.full(3, 50)}
    for name, each in sizes.items():
        if name == "held_out" and not held_out:
            continue
        labels = np.repeat(np.arange(3), each)
        lean = np.log(COUNTS) * (0.5 if name == "train" else 1.0)
        logits = rng.normal(size=(len(labels), 3)) + 2.0 * np.eye(3)[labels] + lean
        arrays |= {f"last_{name}_logits": logits[None].astype(np.float32), f"{name}_labels": labels}
    return str(files.save_arrays(path, **arrays))


def find(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def test_every_candidate_has_its_row(tmp_path):
    rows = readings.compare(save(tmp_path / "p.npz"), **SETTINGS)
    assert len(rows) == 1 + 2 * 4 * 2 + 1 + 3 + 1
    assert all(tuple(row) == readings.COLUMNS and row["note"] is None and row["test"] > 0 for row in rows)
    assert [row["flags"] for row in rows].count("transductive") == 1
    splits, _ = readings.read(save(tmp_path / "p.npz"))
    row = find(rows, correction="energy aligning", reading="normalized", weights="balanced", fitted_on="train")
    fitted = posthoc.EnergyAligning("normalized", "balanced").fit(*splits["train"])
    by_hand = metrics.summarize(fitted.transform(splits["test"][0]), splits["test"][1], COUNTS, **SETTINGS)
    assert (row["test"], row["few"], row["nll"]) == (by_hand["accuracy"], by_hand["few"], by_hand["nll"])
    predicted, labels = fitted.predict(splits["held-out"][0]), splits["held-out"][1]
    assert row["held_out"] == pytest.approx(np.mean([np.mean(predicted[labels == c] == c) for c in range(3)]))


def test_test_images_are_never_seen_but_where_it_says_so(tmp_path):
    path = save(tmp_path / "p.npz")
    arrays = dict(files.load_arrays(path))
    arrays["last_test_logits"] = arrays["last_test_logits"][:, ::-1] - 3
    other = str(files.save_arrays(tmp_path / "q.npz", **arrays))
    for row, same in zip(readings.compare(path, **SETTINGS), readings.compare(other, **SETTINGS), strict=True):
        if row["fitted_on"] != "test":
            assert row["held_out"] == same["held_out"]


def test_what_is_fitted_on_held_out_is_judged_on_the_rest_of_it(tmp_path):
    """A correction that remembers its samples would be perfect on them."""
    seen = []

    class Remember(posthoc.EnergyAligning):
        def _fit(self, logits, labels):
            super()._fit(logits, labels)
            self.rows_ = {row.tobytes() for row in logits}

        def predict(self, logits):
            seen.append(sum(row.tobytes() in self.rows_ for row in logits))
            return super().predict(logits)

    splits, _ = readings.read(save(tmp_path / "p.npz"))
    readings.held_out_accuracy(Remember(), splits, "held-out")
    assert seen == [0] * readings.FOLDS


def test_folds_share_out_every_class():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (50, 10, 5, 2)))
    fold = readings.folds(labels)
    for c, size in enumerate((50, 10, 5, 2)):
        counts = np.bincount(fold[labels == c], minlength=readings.FOLDS)
        assert counts.max() - counts.min() <= 1 and counts.sum() == size
    assert np.ptp(np.bincount(fold)) <= 1


def test_what_cannot_be_fitted_says_why(tmp_path):
    rows = readings.compare(save(tmp_path / "p.npz", missing=True), **SETTINGS)
    row = find(rows, reading="own_samples", weights="uniform", fitted_on="held-out")
    assert "own_samples needs a sample of every class" in row["note"] and row["test"] is None
    with pytest.raises(ValueError, match=r"q\.npz: no held-out logits; choose a data set with held_out above 0"):
        readings.compare(save(tmp_path / "q.npz", held_out=False), **SETTINGS)


def test_pooled_is_the_mean_and_the_best_on_held_out_comes_first(tmp_path):
    rows = readings.compare(save(tmp_path / "p.npz"), **SETTINGS)
    other = [{**row, "held_out": row["held_out"] / 2, "test": 0.5} for row in rows]
    other[1] = {**other[1], "test": None, "held_out": None, "note": "why"}
    table = readings.pooled([rows, other])
    assert [row["held_out"] or 0 for row in table] == sorted([row["held_out"] or 0 for row in table], reverse=True)
    first = max(rows[:1] + rows[2:], key=lambda row: row["held_out"])
    assert table[0]["held_out"] == pytest.approx(0.75 * first["held_out"])
    assert table[-1]["note"] == "why" and table[-1]["test"] is None
    best = next(row for row in table if not row["flags"])
    assert best["behind"] is None and table[-1]["behind"] is None
    second = next(row for row in table if row is not best and row["held_out"] is not None and not row["flags"])
    assert second["behind"] == pytest.approx(best["held_out"] - second["held_out"])
    # the other cell is half of this one, so the two distances are d and d/2, their standard error d/4
    assert second["behind_se"] == pytest.approx(second["behind"] / 3)


def test_the_slope_of_energies_by_hand():
    def rows(slope, offset):
        return [
            {"reading": "normalized", "logits": kind, "train_images": str(n),
             "energy": str(k * slope * np.log(n) + offset)}
            for kind, k in (("train", 1), ("test", 2)) for n in (5, 50, 500)
        ]  # fmt: skip

    (found,) = readings.steepness({"ce": [rows(-1.0, 0.3), rows(-0.5, 2.0)]})
    assert found == {
        "method": "ce", "reading": "normalized", "train": pytest.approx(-0.75), "test": pytest.approx(-1.5),
    }  # fmt: skip


def test_energies_are_those_of_the_splits_and_equal_after_aligning_on_them(tmp_path):
    path = save(tmp_path / "p.npz")
    splits, _ = readings.read(path)
    rows = [row for row in readings.energies(path) if row["reading"] == "all_samples"]
    by_logits = {name: [row["energy"] for row in rows if row["logits"] == name] for name in {r["logits"] for r in rows}}
    assert set(by_logits) == {"train", "held-out", "test", "test, aligned on train", "test, aligned on held-out"}
    aligning = posthoc.EnergyAligning("all_samples", "balanced")
    energy = aligning.energies(*splits["held-out"])
    np.testing.assert_allclose(by_logits["held-out"], energy - energy.mean())
    shift = clone(aligning).fit(*splits["train"]).shift_
    np.testing.assert_allclose(by_logits["test, aligned on train"], np.subtract(by_logits["test"], shift), atol=1e-6)


def test_the_plan_s_page_says_who_won_and_names_a_cell_that_has_not_run(tmp_path):
    plan = {"datasets": ["d"], "recipes": ["r"], "methods": ["ce", "balanced_softmax"], "seeds": [1, 2]}
    path = save(tmp_path / "p.npz", missing=True)
    rows, energies = readings.compare(path, **SETTINGS), readings.energies(path)
    for method in plan["methods"]:
        for seed in plan["seeds"]:
            folder = tmp_path / "cells/d/r" / method / str(seed)
            files.write_csv(folder / "corrections.csv", rows, readings.COLUMNS)
            files.write_csv(folder / "energies.csv", energies, readings.ENERGIES)
    drawn = readings.write(plan, cells_dir=str(tmp_path / "cells"), out_dir=str(tmp_path / "out"))
    page = (tmp_path / "out/readings.md").read_text()
    inductive = [row for row in rows if row["held_out"] is not None and not row["flags"]]
    best = max(inductive, key=lambda row: row["held_out"])
    assert f"Best on held-out: **{readings.described(best)}**, {100 * best['held_out']:.1f} %" in page
    assert "| Method | Reading | train | held-out | test |" in page
    assert "| prediction re-balancing | test |" in page and "| transductive |" in page
    assert page.count("own_samples needs a sample of every class") == 2 * 3  # both weights; all cells and two methods
    assert list(drawn) == plan["methods"]
    assert more_plots.energies(drawn) == more_plots.energies(drawn) and more_plots.energies(drawn).startswith(
        b"\x89PNG"
    )
    with pytest.raises(ValueError, match=r"cells/d/r/ce/3/corrections.csv: no such file; the cell has not run"):
        readings.write({**plan, "seeds": [3]}, cells_dir=str(tmp_path / "cells"), out_dir=str(tmp_path / "out"))
