"""`longtail correct` and the files that it reads: every kind, in slices, with errors that say where."""

import json
import re
import subprocess
import sys
import tomllib

import numpy as np
import pyarrow
import pytest
from conftest import ROOT
from pyarrow import parquet
from scipy.special import log_softmax

from longtail import correct, posthoc
from longtail.posthoc import tables


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """logits and labels of 60 samples and 5 classes, as .npy, and in other kinds; 200 to fit on."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, samples in (("test", 60), ("train", 200)):
        labels = rng.permutation(np.arange(samples) % 5)
        logits = (rng.normal(size=(samples, 5)) + 2 * np.eye(5)[labels] + np.arange(5)).astype(np.float32)
        np.save(f"{name}.npy", logits)
        np.save(f"{name}_labels.npy", labels)
    logits, labels = np.load("test.npy"), np.load("test_labels.npy")
    np.savetxt("test.csv", logits, delimiter=",", fmt="%.9g")
    np.savetxt("test_labels.csv", labels, fmt="%d", header="label", comments="")
    np.savez("both.npz", z=logits, y=labels)
    np.savez_compressed("one.npz", logits)
    columns = {f"c{i}": logits[:, i] for i in range(5)}
    parquet.write_table(pyarrow.table(columns), "test.parquet")
    parquet.write_table(pyarrow.table({"logits": [*logits.tolist()]}), "lists.parquet")
    return tmp_path


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing}:
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
from longtail import cli
cli.main()
"""


def test_corrections_need_nothing_of_the_pipeline(tmp_path):
    """`pip install .` without an extra: what pyproject.toml names for the pipeline is not there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["pipeline"]
    missing = {{"pillow": "PIL"}.get(name, name) for name in (re.split(r"[.\[]", line)[0] for line in extras)}
    assert {"torch", "dvc", "mlflow"} <= missing
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.normal(size=(60, 3)))
    np.save(tmp_path / "y.npy", np.arange(60) % 3)
    on = ["--fit", "x.npy", "--fit-labels", "y.npy", "--fitted-on", "train"]
    words = ["correct", "x.npy", "--labels", "y.npy", *on, "--out", "z.npy"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing), *words],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "z.npy").exists()


@pytest.mark.parametrize("name", ["test.npy", "test.csv", "one.npz", "test.parquet", "lists.parquet"])
def test_every_kind_is_read_as_the_same_array(folder, monkeypatch, name):
    monkeypatch.setattr(tables, "ROWS", 7)
    monkeypatch.setattr(tables, "BYTES", 100)
    with tables.opened(name) as found:
        assert isinstance(found, np.memmap) and found.dtype == np.float32
        np.testing.assert_array_equal(found, np.load("test.npy"))


def test_labels_are_one_column_and_archives_have_names(folder):
    labels = np.load("test_labels.npy")
    with tables.opened("test_labels.csv") as found:
        np.testing.assert_array_equal(posthoc.as_labels(found), labels)
    with tables.opened("both.npz", array="y") as found:
        np.testing.assert_array_equal(found, labels)
    with (
        pytest.raises(ValueError, match=r"both.npz has the arrays z, y; say which as both.npz:NAME"),
        tables.opened("both.npz"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"both.npz has no array 'x'; it has z, y"),
        tables.opened("both.npz", array="x"),
    ):
        pass


@pytest.mark.parametrize("kind", tables.KINDS)
def test_every_kind_is_written_whole_or_not_at_all(folder, kind):
    logits = np.load("test.npy")
    with tables.written(f"out/a{kind}", logits.shape, logits.dtype) as write:
        for first in range(0, 60, 7):
            write(logits[first : first + 7])
    with tables.opened(f"out/a{kind}") as found:
        np.testing.assert_array_equal(found, logits)
    with pytest.raises(KeyboardInterrupt), tables.written(f"out/b{kind}", logits.shape, logits.dtype) as write:
        write(logits[:7])
        raise KeyboardInterrupt
    assert [path.name for path in (folder / "out").iterdir()] == [f"a{kind}"]


def test_correct_fits_shows_and_writes(folder, monkeypatch, capsys):
    monkeypatch.setattr(posthoc.inputs, "SLICE", 5 * 7)
    correct.main(["test.npy", "--labels", "test_labels.csv", "--fit", "train.npy", "--fit-labels", "train_labels.npy",
                  "--fitted-on", "train", "--out", "corrected.npy", "--shift", "shift.json"])  # fmt: skip
    logits, labels = np.load("test.npy"), np.load("test_labels.npy")
    fitted = posthoc.EnergyAligning().fit(np.load("train.npy"), np.load("train_labels.npy"))
    wanted = fitted.transform(logits)
    np.testing.assert_allclose(np.load("corrected.npy"), wanted, rtol=1e-6)
    written = json.loads((folder / "shift.json").read_text())
    np.testing.assert_allclose(written["shift"], fitted.shift_, atol=1e-6)
    assert (written["fitted_on"], written["flags"]) == ("train", [])
    shown = capsys.readouterr().out
    assert "EnergyAligning(groups=None, reading='equal_shares'" in shown and "fitted on train" in shown
    table = [line for line in shown.splitlines() if line.count(".") == 2 and ")  " in line]
    rows = {line[:-22].strip(): [float(text) for text in line[-22:].split()] for line in table}
    for place, values in enumerate((logits, wanted)):
        assert rows["accuracy (%)"][place] == pytest.approx(100 * (values.argmax(1) == labels).mean(), abs=1e-3)
        nll = -log_softmax(values, axis=1)[np.arange(60), labels].mean()
        assert rows["NLL (nats)"][place] == pytest.approx(nll, abs=1e-3)
    correct.main(["test.parquet", "--apply", "shift.json", "--out", "again.csv"])
    np.testing.assert_allclose(np.loadtxt("again.csv", delimiter=",", skiprows=1), wanted, atol=1e-5)


def test_what_is_fitted_on_test_says_so(folder, capsys):
    correct.main(["test.npy", "--by", "rebalancing", "--set", "tau=0.5", "--fitted-on", "test", "--shift", "s.json"])
    assert "PredictionRebalancing(tau=0.5); fitted on test; transductive" in capsys.readouterr().out
    np.save("prior.npy", np.arange(1, 6))
    correct.main(["test.npy", "--by", "known-prior", "--set", "test_prior=prior.npy", "--shift", "s.json"])
    assert "fitted on unsaid; needs test prior" in capsys.readouterr().out
    np.testing.assert_allclose(np.diff(json.loads((folder / "s.json").read_text())["shift"])[0], np.log(2), atol=1e-6)


def broken(folder):
    logits = np.load("test.npy")
    logits[31, 2] = np.nan
    np.save("nan.npy", logits)
    np.save("flat.npy", logits[:, 0])
    np.save("words.npy", np.array(["a", "b"]))
    np.save("few.npy", np.arange(5))
    np.save("outside.npy", np.full(60, 5))
    (folder / "words.csv").write_text("1,2\n3,x\n")
    (folder / "ragged.csv").write_text("1,2\n3\n")
    (folder / "empty.csv").write_text("a,b\n")
    (folder / "none.npz").write_bytes(b"PK")
    (folder / "none.parquet").write_bytes(b"PAR1")
    (folder / "none.json").write_text("{}")
    np.save("tail.npy", np.zeros(60, int))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("gone.npy", "gone.npy: no such file"),
        ("test.txt", "test.txt: unknown kind '.txt'; allowed are .npy, .npz, .csv, .parquet"),
        (
            "nan.npy --labels test_labels.npy",
            "nan.npy: rows 28 to 34: 1 logit(s) are NaN or inf, first at row 3, class 2",
        ),
        ("flat.npy --labels test_labels.npy", "flat.npy: logits have shape (60,); expected (samples, classes)"),
        ("words.npy", "words.npy: holds <U1, not numbers"),
        ("words.csv", "words.csv: not a CSV file of numbers (In CSV column #1"),
        ("ragged.csv", "ragged.csv: not a CSV file of numbers (CSV parse error"),
        ("empty.csv", "empty.csv: no rows"),
        ("none.npz", "none.npz: not an .npz file"),
        ("none.parquet", "none.parquet: not a Parquet file of numbers"),
        ("test.npy --labels few.npy", "few.npy: labels have shape (5,); expected (60,)"),
        ("test.npy --labels outside.npy", "outside.npy: label 5 in row 0; allowed are 0 to 4"),
        (
            "test.npy --labels tail.npy --by adjustment",
            "test.npy: LogitAdjustment needs a sample of every class; 4 have",
        ),
        ("test.npy", "--by energy is fitted on labels: give --labels"),
        ("test.npy --fit train.npy", "--by energy is fitted on labels: give --fit-labels"),
        ("test.npy --fit-labels few.npy", "--fit-labels needs --fit"),
        (
            "test.npy --labels test_labels.npy --set tau=1",
            "--set tau=1: allowed for energy are reading=..., weights=...",
        ),
        ("test.npy --labels test_labels.npy --set reading=x", "test.npy: reading 'x'; allowed are all_samples"),
        ("test.npy --labels test_labels.npy --out a.txt", "a.txt: unknown kind '.txt'"),
        ("test.npy --apply none.json", "none.json: no fitted_on, flags, scale, shift; expected what --shift writes"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(folder, monkeypatch, arguments, message):
    monkeypatch.setattr(posthoc.inputs, "SLICE", 5 * 7)
    broken(folder)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(SystemExit) as caught:
        correct.main([*arguments.split(), "--shift", "new.json"])
    assert f"error: {message}" in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == before
