"""`longtail correct` and the files that it reads: every kind, in slices, with errors that say where."""

import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from decimal import Decimal

import numpy as np
import pandas
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


def test_where_a_fit_comes_from_is_said_without_being_asked(folder, capsys):
    correct.main(["test.npy", "--labels", "test_labels.npy"])
    assert "fitted on the labels that it is scored by: 'after' is too good (--fit and" in capsys.readouterr().out
    correct.main(["test.npy", "--fit", "train.npy", "--fit-labels", "train_labels.npy"])
    assert "fitted on train.npy (--fitted-on says what that is)" in capsys.readouterr().out
    correct.main(["test.npy", "--by", "unknown-prior"])
    assert "fitted on the logits that it corrects, without labels" in capsys.readouterr().out


def test_true_and_false_are_read_as_in_params():
    assert correct._settings("vector", ["balanced=false", "l2=0.1"]) == {"balanced": False, "l2": 0.1}
    assert correct._settings("vector", ["balanced=True"]) == {"balanced": True}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("test.npy --by known-prior", "needs the prior of the test set: --set test_prior=FILE.npy"),
        ("test.npy --by unknown-prior --fit train.npy", "to be the one of test.npy: leave --fit out"),
    ],
)
def test_a_prior_that_would_be_none_or_another_one_is_refused(folder, command, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        correct.main(command.split())


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_names_of_classes_stay(folder, kind):
    names = ["cat", "dog, wild", 'the "newt"', "eel", "emu"]
    with tables.written(f"named.{kind}", (6, 5), np.float32, names) as write:
        write(np.random.default_rng(0).normal(size=(6, 5)))
    assert tables.class_names(f"named.{kind}") == names
    correct.main([f"named.{kind}", "--by", "rebalancing", "--fitted-on", "test", "--out", f"out.{kind}"])
    assert tables.class_names(f"out.{kind}") == names
    assert tables.class_names("test.npy") is None


def test_what_is_fitted_on_test_says_so(folder, capsys):
    correct.main(["test.npy", "--by", "rebalancing", "--set", "tau=0.5", "--fitted-on", "test", "--shift", "s.json"])
    assert "PredictionRebalancing(tau=0.5); fitted on test; transductive" in capsys.readouterr().out
    np.save("prior.npy", np.arange(1, 6))
    correct.main(["test.npy", "--by", "known-prior", "--set", "test_prior=prior.npy", "--shift", "s.json"])
    assert "fitted on nothing: its prior is given; needs test prior" in capsys.readouterr().out
    np.testing.assert_allclose(np.diff(json.loads((folder / "s.json").read_text())["shift"])[0], np.log(2), atol=1e-6)


ROWS = np.random.default_rng(3).normal(size=(50, 4)).astype(np.float32)


def as_csv(rows, header=None, index=None, quote="", end="\n"):
    lines = [] if header is None else [header]
    for number, row in enumerate(rows):
        front = [] if index is None else [index(number)]
        lines.append(",".join([*front, *(f"{quote}{value:.9g}{quote}" for value in row)]))
    return end.join(lines) + end


@pytest.mark.parametrize(
    "text",
    [
        as_csv(ROWS),
        as_csv(ROWS, "0,1,2,3"),  # pandas: frame.to_csv(index=False)
        as_csv(ROWS, '"a","b","c","d"'),
        as_csv(ROWS, "cat,dog,frog,truck"),
        as_csv(ROWS, "class_0,class_1,class_2,class_3"),
        as_csv(ROWS, quote='"'),
        as_csv(ROWS, '"0","1","2","3"', quote='"'),
        as_csv(ROWS, end="\r\n"),
        "\ufeff" + as_csv(ROWS),
        "\ufeff" + as_csv(ROWS, "a,b,c,d"),
    ],
)
def test_a_csv_file_has_as_many_rows_as_samples(tmp_path, text):
    (tmp_path / "z.csv").write_text(text, newline="")
    with tables.opened(tmp_path / "z.csv") as found:
        np.testing.assert_allclose(found, ROWS, rtol=1e-6)


@pytest.mark.parametrize("header", ["1,2,3,4", "10,20,30,40", "2001,2003,2005,2008", "0.0,1.0,2.0,3.0", "-1,0,1,2"])
def test_a_header_of_numbers_is_no_sample(tmp_path, header):
    (tmp_path / "z.csv").write_text(as_csv(ROWS, header))
    with (
        pytest.raises(
            ValueError, match=r"z\.csv: its first line, .* may be a header or a sample: give the columns names"
        ),
        tables.opened(tmp_path / "z.csv"),
    ):
        pass


@pytest.mark.parametrize("header", ["image_id,c0,c1,c2,c3", "sample,cat,dog,eel,emu", None])
def test_a_column_of_whole_numbers_is_no_class(tmp_path, header):
    places = np.random.default_rng(3).permutation(50)
    (tmp_path / "z.csv").write_text(as_csv(ROWS, header, index=lambda number: str(places[number])))
    name = (header or "column 1").split(",")[0]
    said = rf"column 1, '{name}', (holds whole numbers and others do not: no class\?|is no class by its name)"
    with pytest.raises(ValueError, match=said), tables.opened(tmp_path / "z.csv"):
        pass


def test_few_rows_and_whole_values_are_no_reason_to_refuse(tmp_path):
    for text in ("2,0.5,1.25\n1,1.5,0.75\n3,0.2,-0.5\n", "1.0,2.0\n3.0,-4.0\n0.5,1.5\n"):
        (tmp_path / "z.csv").write_text(text)
        with tables.opened(tmp_path / "z.csv") as found:
            assert len(found) == 3


def test_a_masked_class_of_a_table_stays_one(tmp_path):
    masked = np.concatenate([ROWS, np.full((50, 1), -10000.0)], 1)
    (tmp_path / "z.csv").write_text(as_csv(masked))
    with tables.opened(tmp_path / "z.csv") as found:
        np.testing.assert_allclose(found, masked, rtol=1e-6)


@pytest.mark.parametrize("rounding", [2, 0])
def test_rounded_probabilities_are_warned_of(folder, capsys, rounding):
    probabilities = np.exp(log_softmax(np.load("test.npy"), axis=1))
    np.save("p.npy", (100 * probabilities if not rounding else probabilities).round(rounding))
    correct.main(["p.npy", "--by", "rebalancing", "--out", "out.npy"])
    said = capsys.readouterr().err
    kind = "rounded probabilities" if rounding else "percentages"
    assert said.startswith(f"warning: p.npy: these look like {kind}") and said.count("warning") == 1


@pytest.mark.parametrize("kind", tables.KINDS)
def test_a_disk_that_is_full_is_said_with_the_file(folder, monkeypatch, kind):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    np.save("many.npy", np.random.default_rng(0).normal(size=(4000, 5)))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails then, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(SystemExit, match=rf"error: out\{kind}: "):
            correct.main(["many.npy", "--by", "rebalancing", "--out", f"out{kind}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (folder / f"out{kind}").exists() and not [*folder.glob(".out*")]


def test_labels_that_begin_with_0_are_no_header(tmp_path):
    (tmp_path / "y.csv").write_text("0\n1\n2\n")
    with tables.opened(tmp_path / "y.csv") as found:
        assert found.tolist() == [0, 1, 2]
    (tmp_path / "z.csv").write_text("0\n0.5\n2\n")  # of one column of numbers that are not whole, it is
    with tables.opened(tmp_path / "z.csv") as found:
        assert found.tolist() == [0.5, 2]


def columns(**more):
    return {**more, **{f"c{i}": ROWS[:, i] for i in range(4)}}


def frame(**arguments):
    return pandas.DataFrame({f"c{i}": ROWS[:, i] for i in range(4)}, **arguments)


def test_the_index_of_pandas_is_no_class(tmp_path):
    for index in (None, np.arange(50) + 7, [f"image {i}" for i in range(50)]):
        frame(index=index).to_parquet(tmp_path / "z.parquet")
        with tables.opened(tmp_path / "z.parquet") as found:
            np.testing.assert_array_equal(found, ROWS)


@pytest.mark.parametrize("kind", tables.KINDS)
def test_half_precision_comes_back_as_it_came(folder, kind):
    logits = np.load("test.npy").astype(np.float16)
    np.save("half.npy", logits)
    correct.main(["half.npy", "--by", "rebalancing", "--out", f"half{kind}"])
    with tables.opened(f"half{kind}") as found:
        assert found.dtype == (np.float32 if kind in (".csv", ".parquet") else np.float16)  # tables are read as float32
        wanted = posthoc.PredictionRebalancing().fit(logits.astype(np.float64)).transform(logits.astype(np.float64))
        np.testing.assert_array_equal(np.asarray(found), wanted.astype(np.float16).astype(found.dtype))


def test_a_given_prior_needs_no_labels_and_probabilities_are_warned_of(folder, capsys):
    np.save("prior.npy", np.arange(1, 6))
    correct.main(["test.npy", "--by", "adjustment", "--set", "prior=prior.npy", "--out", "out.npy"])
    wanted = posthoc.LogitAdjustment(prior=np.arange(1, 6)).fit(np.load("test.npy")).transform(np.load("test.npy"))
    np.testing.assert_array_equal(np.load("out.npy"), wanted)
    assert capsys.readouterr().err == ""
    np.save("p.npy", np.exp(log_softmax(np.load("test.npy"), axis=1)))
    correct.main(["p.npy", "--by", "adjustment", "--set", "prior=prior.npy", "--out", "out.npy"])
    said = capsys.readouterr().err
    assert said.startswith("warning: p.npy: these logits are probabilities") and said.count("warning") == 1


def test_a_masked_class_stays_masked(folder):
    logits, labels = np.load("test.npy"), np.load("test_labels.npy")
    masked = np.concatenate([logits, np.full((60, 1), -1e9, np.float32)], axis=1)
    np.save("masked.npy", masked)
    correct.main(["masked.npy", "--labels", "test_labels.npy", "--out", "out.npy"])
    np.testing.assert_array_equal(
        np.load("out.npy")[:, :5], posthoc.EnergyAligning().fit(logits, labels).transform(logits)
    )
    np.testing.assert_array_equal(np.load("out.npy")[:, 5], masked[:, 5])


def archive(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as made:
        for name, data in members.items():
            made.writestr(name, data)


def npy(array):
    data = io.BytesIO()
    np.save(data, array, allow_pickle=True)
    return data.getvalue()


def with_method(path, number):
    """An archive whose member says that it is compressed in another way."""
    archive(path, {"z.npy": npy(ROWS)})
    data = bytearray(path.read_bytes())
    for place in (8, data.index(b"PK\x01\x02") + 10):
        data[place : place + 2] = number.to_bytes(2, "little")
    path.write_bytes(data)


def encrypted(path):
    archive(path, {"z.npy": npy(ROWS)})
    data = bytearray(path.read_bytes())
    for place in (6, data.index(b"PK\x01\x02") + 8):
        data[place] |= 1
    path.write_bytes(data)


FILES = {  # name: (what makes it, what is said of it)
    "nothing.npy": (lambda p: p.write_bytes(b""), "not an .npy file of numbers"),
    "text.npy": (lambda p: p.write_text("1,2,3"), "not an .npy file of numbers"),
    "cut.npy": (lambda p: p.write_bytes(npy(ROWS)[:-100]), "not a whole .npy file"),
    "header.npy": (lambda p: p.write_bytes(npy(ROWS)[:40]), "not an .npy file of numbers"),
    "objects.npy": (lambda p: p.write_bytes(npy(np.array([{}]))), "holds objects, not numbers"),
    "pickle.npy": (lambda p: p.write_bytes(pickle.dumps([1.0])), "not an .npy file of numbers"),
    "complex.npy": (lambda p: np.save(p, ROWS.astype(complex)), "holds complex128, not numbers"),
    "bool.npy": (lambda p: np.save(p, ROWS > 0), "holds bool, not numbers"),
    "dates.npy": (lambda p: np.save(p, np.zeros(3, "M8[D]")), "holds datetime64[D], not numbers"),
    "fields.npy": (lambda p: np.save(p, np.zeros(3, "f4,i4")), "not numbers"),
    "zero.npy": (lambda p: np.save(p, np.zeros((0, 4))), "holds nothing: its shape is (0, 4)"),
    "huge.npy": (
        lambda p: p.write_bytes(npy(ROWS).replace(b"(50, 4), }  ", b"(50000, 4),}")), "not a whole .npy file",
    ),
    "nothing.npz": (lambda p: archive(p, {}), "holds no array; it has nothing"),
    "empty.npz": (lambda p: p.write_bytes(b""), "not an .npz file that can be read"),
    "readme.npz": (lambda p: archive(p, {"readme.txt": b"hello"}), "holds no array; it has readme.txt"),
    "word.npz": (lambda p: archive(p, {"z.npy": b"hello"}), "not an .npy file of numbers"),
    "object.npz": (lambda p: archive(p, {"z.npy": npy(np.array([{}]))}), "holds objects, not numbers"),
    "encrypted.npz": (encrypted, "not an .npz file that can be read (File 'z.npy' is encrypted"),
    "method.npz": (lambda p: with_method(p, 97), "not an .npz file that can be read (That compression method"),
    "wrong.npz": (lambda p: with_method(p, 8), "not an .npz file that can be read"),
    "nothing.csv": (lambda p: p.write_text(""), "no rows"),
    "blank.csv": (lambda p: p.write_text("\n\n"), "blank.csv: "),
    "utf16.csv": (lambda p: p.write_bytes("1,2\n3,4\n".encode("utf-16")), "no UTF-8 text"),
    "binary.csv": (lambda p: p.write_bytes(bytes(range(256))), "binary.csv: not a CSV file of numbers"),
    "semicolon.csv": (lambda p: p.write_text("1;2\n3;4\n"), "semicolon.csv: not a CSV file of numbers"),
    "dates.csv": (lambda p: p.write_text("2024-01-01,1\n2024-01-02,2\n"), "dates.csv: not a CSV file of numbers"),
    "line.csv": (lambda p: p.write_text("0.5," * 2_000_000), "its first line is longer than 4,194,304 characters"),
    "index.csv": (lambda p: p.write_text(as_csv(ROWS, ",0,1,2,3", str)), "column 1, '', is no class by its name"),
    "id.csv": (lambda p: p.write_text(as_csv(ROWS, "id,c0,c1,c2,c3", str)), "column 1, 'id', is no class by its name"),
    "name.csv": (
        lambda p: p.write_text(as_csv(ROWS, "shop,c0,c1,c2,c3", lambda n: str(7 * n % 5))),
        "column 1, 'shop', is no class",
    ),
    "label.csv": (lambda p: p.write_text(as_csv(ROWS, "a,b,c,label")), "column 4, 'label', is no class by its name"),
    "counts.csv": (
        lambda p: p.write_text(as_csv(ROWS, None, lambda n: f"{n}.0")),
        "first column, 'column 1', counts the rows (0, 1",
    ),
    "image.csv": (
        lambda p: p.write_text(as_csv(ROWS, "image,cat,dog,frog,truck", lambda n: f"{n + 1}.0")),
        "its first column, 'image', counts the rows (1, 2, ...): an index?",
    ),
    "maybe.csv": (lambda p: p.write_text("0,1,2\n5,3,4\n"), "its first line, 0,1,2, may be a header or a sample"),
    "two.csv": (
        lambda p: p.write_text(as_csv(ROWS, None, lambda n: f"{n},{n % 4}")),
        "column 1, 'column 1', holds whole numbers and others do not",
    ),
    "quote.csv": (lambda p: p.write_text(as_csv(ROWS) + '"' + "1" * 200_000), "not a CSV file of numbers"),
    "header.csv": (lambda p: p.write_text(as_csv(ROWS, "id,1,2,3")), "not a CSV file of numbers"),
    "level.parquet": (
        lambda p: parquet.write_table(pyarrow.table(columns(__index_level_0__=np.arange(50))), p),
        "column 1, '__index_level_0__', is no class by its name",
    ),
    "whole.parquet": (
        lambda p: parquet.write_table(pyarrow.table({f"{n} x": v for n, v in columns(shop=np.arange(50)).items()}), p),
        "column 'shop x' holds whole numbers and others do not",
    ),
    "dates.parquet": (
        lambda p: parquet.write_table(pyarrow.table(columns(day=np.arange(50).astype("M8[s]"))), p),
        "column 'day' holds timestamp[ms], not numbers",
    ),
    "decimals.parquet": (
        lambda p: parquet.write_table(pyarrow.table(columns(price=[Decimal("1.5")] * 50)), p),
        "column 'price' holds decimal128(2, 1), not numbers",
    ),
    "strings.parquet": (
        lambda p: parquet.write_table(pyarrow.table(columns(name=["a"] * 50)), p), "column 'name' holds string",
    ),
    "bools.parquet": (lambda p: parquet.write_table(pyarrow.table({"a": [True]}), p), "column 'a' holds bool"),
    "ragged.parquet": (
        lambda p: parquet.write_table(pyarrow.table({"z": [[1.0, 2.0]] * 9 + [[1.0]]}), p),
        "row 9 holds a list of 1; expected 2",
    ),
    "null.parquet": (
        lambda p: parquet.write_table(pyarrow.table({"z": [[1.0, 2.0]] * 9 + [None]}), p),
        "row 9 holds no list; expected 2",
    ),
    "nested.parquet": (lambda p: parquet.write_table(pyarrow.table({"z": [[[1.0]]]}), p), "column 'z' holds list<"),
    "empty.parquet": (lambda p: parquet.write_table(pyarrow.table({"z": pyarrow.array([], "f8")}), p), "no rows"),
    "text.parquet": (lambda p: p.write_text("hello"), "not a Parquet file of numbers"),
    "cut.parquet": (
        lambda p: (parquet.write_table(pyarrow.table(columns()), p), p.write_bytes(p.read_bytes()[:-50])),
        "not a Parquet file of numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_something_else_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tables, "ROWS", 7)
    make, said = FILES[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(said)) as caught, tables.opened(tmp_path / name):
        pass
    assert str(caught.value).startswith(str(tmp_path / name)) and "allow_pickle" not in str(caught.value)


def test_an_archive_that_unpacks_to_more_than_there_is_room_for_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "zeros.npz", np.zeros((1000, 1000)))
    assert (tmp_path / "zeros.npz").stat().st_size < 10_000
    room = shutil.disk_usage(tmp_path)._replace(free=7_000_000)
    monkeypatch.setattr(tables.shutil, "disk_usage", lambda folder: room)
    with (
        pytest.raises(ValueError, match=r"zeros.npz: arr_0 unpacks to 8,000,128 bytes; .* has room for 7,000,000"),
        tables.opened(tmp_path / "zeros.npz"),
    ):
        pass


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
    (folder / "list.json").write_text("[]")
    (folder / "deep.json").write_text("[" * 100_000)
    shift = {"scale": 1.0, "shift": [0.0] * 5, "fitted_on": None, "flags": []}
    for name, value in {
        "nan": {"shift": [math.nan] * 5}, "word": {"scale": "x"}, "few": {"shift": [0.0] * 4}, "on": {"fitted_on": "x"},
        "none": {"flags": None}, "nested": {"shift": [[0.0]]}, "long": {"scale": [1.0] * 4},
        "huge": {"shift": [1e39, 0.0, 0.0, 0.0, 0.0]},
    }.items():  # fmt: skip
        (folder / f"shift_{name}.json").write_text(json.dumps(shift | value))
    (folder / "folder.npy").mkdir()
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe.npy")
    np.savetxt("headed.csv", np.load("test_labels.npy"), fmt="%d", header="0", comments="")
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
        ("test.npy --apply list.json", "list.json: holds a list; expected what to_dict or --shift writes"),
        ("test.npy --apply deep.json", "deep.json: not a JSON file"),
        ("test.npy --apply test.npy", "test.npy: not a JSON file ('utf-8' codec"),
        ("test.npy --apply folder", "folder: Is a directory"),
        (
            "test.npy --apply shift_nan.json",
            "shift_nan.json: shift = [nan nan nan nan nan]; expected one finite number",
        ),
        ("test.npy --apply shift_word.json", "shift_word.json: scale = 'x'; allowed are numbers"),
        ("test.npy --apply shift_few.json", "shift_few.json has 4 classes, test.npy has 5"),
        ("test.npy --apply shift_on.json", "shift_on.json: fitted_on = 'x'; allowed are train, held-out, test"),
        ("test.npy --apply shift_none.json", "shift_none.json: shift is [0.0, 0.0, 0.0, 0.0, 0.0], flags are None"),
        ("test.npy --apply shift_nested.json", "shift_nested.json: shift is [[0.0]], flags are []"),
        ("test.npy --apply shift_long.json", "shift_long.json: scale has shape (4,); expected one finite number or 5"),
        ("test.npy --by rebalancing --set tau=abc", "test.npy: tau = 'abc'; allowed are finite numbers"),
        ("test.npy --by rebalancing --set tau=nan", "test.npy: tau = 'nan'; allowed are finite numbers"),
        ("test.npy --by rebalancing --set tau=1e999", "test.npy: tau = inf; allowed are finite numbers"),
        ("test.npy --by rebalancing --set tau=1e300 --out a.npy", "test.npy: scale 1.0 or shift"),
        ("test.npy --apply shift_huge.json", "shift_huge.json: scale 1.0 or shift"),
        ("test.npy --labels test_labels.npy --out pipe.npy", "pipe.npy: is no regular file"),
        ("test.npy --by rebalancing --set tau=gone.npy", "gone.npy: no such file"),
        ("test.npy --by rebalancing --set tau=test.npy", "test.npy: tau = array("),
        (
            "test.npy --labels test_labels.npy --set temperature=1e999",
            "test.npy: temperature = inf; allowed are numbers",
        ),
        (
            "test.npy --labels test_labels.npy --set strength=nan",
            "test.npy: strength = 'nan'; allowed are finite numbers",
        ),
        ("test.npy --labels test_labels.npy --set groups=1", "test.npy: groups are int64 (); expected 5 whole numbers"),
        (
            "test.npy --labels test_labels.npy --set reference=[1]",
            "test.npy: reference = [1]; allowed are finite numbers",
        ),
        ("test.npy --labels test_labels.npy --set reading=[1]", "test.npy: reading [1]; allowed are all_samples"),
        ("test.npy --labels test_labels.npy --set weights=[1]", "test.npy: weights [1]; allowed are balanced"),
        (
            "test.npy --labels test_labels.npy --by vector --set l2=x",
            "test.npy: l2 = 'x'; allowed are numbers from 0 on",
        ),
        ("test.npy --by unknown-prior --set max_iter=x", "test.npy: max_iter = 'x'; allowed are numbers from 1 on"),
        ("test.npy --by known-prior --set test_prior={}", "test.npy: test_prior = {}; allowed are numbers"),
        ("test.npy --by known-prior --set test_prior=[1,2]", "test.npy: test_prior has shape (2,); expected (5,)"),
        ("test.npy --labels test_labels.npy --out folder.npy", "folder.npy: is a folder; expected the name of a file"),
        ("test.npy --labels test_labels.npy --out test.npy/a.npy", "test.npy/a.npy: "),
        (
            "test.npy --labels headed.csv",
            "headed.csv: labels have shape (61,); expected (60,) as logits have that many rows; "
            "is its first line, 0, a header?",
        ),
        ("folder.npy", "folder.npy: no such file"),
        ("both.npz:z --labels both.npz:q", "both.npz has no array 'q'; it has z, y"),
        ("test.npy --apply none.json", "none.json: no scale, shift, fitted_on, flags; expected what to_dict"),
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
