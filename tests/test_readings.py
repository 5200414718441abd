"""Comparing corrections on a cell's logits: what each may see, and who is chosen."""

import numpy as np
import pytest

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


def slow_accuracy(predicted, labels):
    return np.mean([np.mean([p == c for p, y in zip(predicted, labels, strict=True) if y == c]) for c in set(labels)])


def test_every_candidate_has_its_row(tmp_path):
    rows = readings.compare(save(tmp_path / "p.npz"), **SETTINGS)
    assert len(rows) == 1 + 2 + 2 * 2 * (4 * 5 + 1) * 5 + 1 + 3 + 1
    assert all(tuple(row) == readings.COLUMNS and row["test"] > 0 for row in rows)
    assert [row["flags"] for row in rows].count("transductive") == 1
    splits, _ = readings.read(save(tmp_path / "p.npz"))
    row = find(
        rows, correction="energy aligning", reading="normalized", weights="balanced", temperature=2.0, strength=0.5,
        fitted_on="train",
    )  # fmt: skip
    fitted = posthoc.EnergyAligning("normalized", "balanced", 2.0, 0.5).fit(*splits["train"])
    by_hand = metrics.summarize(fitted.transform(splits["test"][0]), splits["test"][1], COUNTS, **SETTINGS)
    assert (row["test"], row["few"]) == (by_hand["accuracy"], by_hand["few"])
    assert row["nll"] == pytest.approx(by_hand["nll"])
    predicted, labels = fitted.predict(splits["held-out"][0]), splits["held-out"][1]
    assert row["held_out"] == pytest.approx(slow_accuracy(predicted, labels))


def test_the_first_setting_is_the_default():
    default = next(readings.settings())
    assert posthoc.EnergyAligning(*default[1:]).get_params() == posthoc.EnergyAligning().get_params()
    assert len(set(readings.settings())) == len([*readings.settings()])


def test_choosing_is_judged_on_what_it_did_not_see(tmp_path):
    """By hand: for each fold, every setting fitted without it, scored by cross-fitting on the other four."""
    splits, _ = readings.read(save(tmp_path / "p.npz"))
    logits, labels = splits["held-out"]
    among = [
        readings.Setting("held-out", reading, "uniform", 1.0, strength)
        for reading in ("normalized", "equal_shares") for strength in (1.0, 0.5)
    ]  # fmt: skip
    fold = readings.folds(labels)
    predicted = np.empty(len(labels), dtype=int)
    for outer in range(readings.FOLDS):
        rest, scores = fold != outer, []
        for one in among:
            guess = np.empty(len(labels), dtype=int)
            for inner in range(readings.FOLDS):
                seen = rest & (fold != inner)
                fitted = posthoc.EnergyAligning(one.reading, one.weights, strength=one.strength)
                guess[fold == inner] = fitted.fit(logits[seen], labels[seen]).predict(logits[fold == inner])
            scores.append(slow_accuracy(guess[rest], labels[rest]))
        one = among[int(np.argmax(scores))]
        fitted = posthoc.EnergyAligning(one.reading, one.weights, strength=one.strength).fit(logits[rest], labels[rest])
        predicted[~rest] = fitted.predict(logits[~rest])
    best, accuracy = readings.chosen(readings.Tried(splits), among)
    assert accuracy == pytest.approx(slow_accuracy(predicted, labels))
    assert best == max(among, key=lambda one: readings.mean_over_classes(readings.Tried(splits).right(one), labels))


def test_test_images_are_never_seen_but_where_it_says_so(tmp_path):
    path = save(tmp_path / "p.npz")
    arrays = dict(files.load_arrays(path))
    arrays["last_test_logits"] = arrays["last_test_logits"][:, ::-1] - 3
    other = str(files.save_arrays(tmp_path / "q.npz", **arrays))
    for row, same in zip(readings.compare(path, **SETTINGS), readings.compare(other, **SETTINGS), strict=True):
        if row["fitted_on"] != "test":
            assert (row["held_out"], row["note"]) == (same["held_out"], same["note"])


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
    row = find(rows, reading="own_samples", weights="uniform", fitted_on="held-out", temperature=1.0, strength=1.0)
    assert "own_samples needs a sample of every class" in row["note"] and row["test"] is row["held_out"] is None
    with pytest.raises(ValueError, match=r"q\.npz: no held-out logits; choose a data set with held_out above 0"):
        readings.compare(save(tmp_path / "q.npz", held_out=False), **SETTINGS)


def test_pooled_is_the_mean_and_the_best_on_held_out_comes_first(tmp_path):
    rows = readings.compare(save(tmp_path / "p.npz"), **SETTINGS)
    rows = rows[:12] + rows[-5:]
    other = [{**row, "held_out": row["held_out"] / 2, "test": 0.5} for row in rows]
    other[3] = {**other[3], "test": None, "held_out": None, "note": "why"}
    table = readings.pooled([rows, other])
    assert [row["held_out"] or 0 for row in table] == sorted([row["held_out"] or 0 for row in table], reverse=True)
    first = max(rows[:3] + rows[4:], key=lambda row: row["held_out"])
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
            {"logits": kind, "train_images": str(n), "energy": str(k * slope * np.log(n) + offset)}
            for kind, k in (("train", 1), ("test", 2)) for n in (5, 50, 500)
        ]  # fmt: skip

    (found,) = readings.steepness({"ce": [rows(-1.0, 0.3), rows(-0.5, 2.0)]})
    assert found == {"group": "ce", "train": pytest.approx(-0.75), "test": pytest.approx(-1.5)}


def test_energies_are_those_of_the_splits_and_of_test_after_aligning(tmp_path):
    path = save(tmp_path / "p.npz")
    splits, _ = readings.read(path)
    rows = readings.energies(path)
    by_logits = {name: [row["energy"] for row in rows if row["logits"] == name] for name in {r["logits"] for r in rows}}
    assert set(by_logits) == {"train", "held-out", "test", "test, normalized on train", "test, equal_shares on train"}
    energy = posthoc.free_energy(*splits["held-out"], reading="normalized", weights="balanced")
    np.testing.assert_allclose(by_logits["held-out"], energy - energy.mean())
    aligned = posthoc.EnergyAligning().fit(*splits["train"]).transform(splits["test"][0])
    energy = posthoc.free_energy(aligned, splits["test"][1], reading="normalized", weights="balanced")
    np.testing.assert_allclose(by_logits["test, equal_shares on train"], energy - energy.mean())


def test_the_plan_s_page_says_what_is_best_of_the_cells_that_have_run(tmp_path):
    plan = {"datasets": ["d"], "recipes": ["r", "s"], "methods": ["ce", "balanced_softmax"], "seeds": [1, 2]}
    path = save(tmp_path / "p.npz", missing=True)
    rows, energies = readings.compare(path, **SETTINGS), readings.energies(path)
    with pytest.raises(ValueError, match=r"cells: no cell has a corrections\.csv"):
        readings.write(plan, cells_dir=str(tmp_path / "cells"), out_dir=str(tmp_path / "out"))
    for place in ("r/ce/1", "r/ce/2", "s/balanced_softmax/1"):
        files.write_csv(tmp_path / "cells/d" / place / "corrections.csv", rows, readings.COLUMNS)
        files.write_csv(tmp_path / "cells/d" / place / "energies.csv", energies, readings.ENERGIES)
    drawn = readings.write(plan, cells_dir=str(tmp_path / "cells"), out_dir=str(tmp_path / "out"))
    assert list(drawn) == ["r, ce", "s, balanced_softmax"]
    page = (tmp_path / "out/readings.md").read_text()
    default = find(rows, **dict(zip(readings.Setting._fields, next(readings.settings()), strict=True)))
    said = f"equal_shares, uniform, fitted on train: {100 * default['held_out']:.1f} % on held-out"
    assert f"The default, energy aligning, {said}, {100 * default['test']:.1f} % on test." in page
    aligning = [row for row in rows if row["correction"] == "energy aligning" and row["held_out"] is not None]
    best = max(aligning, key=lambda row: row["held_out"])
    assert f"The best setting on held-out, {readings.described(best)}: {100 * best['held_out']:.1f} %" in page
    assert page.count("| default |") == 3 and page.count("energy aligning as chosen") == 2 * 3
    assert "| Cells | train | held-out | test |" in page
    assert "| prediction re-balancing | test |" in page and "| transductive |" in page
    assert more_plots.energies(drawn) == more_plots.energies(drawn) and more_plots.energies(drawn).startswith(
        b"\x89PNG"
    )
