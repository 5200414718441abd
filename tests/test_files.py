"""Files are whole or not there, and the same content has the same bytes."""

import hashlib
import sys
import zipfile

import numpy as np
import pytest

from longtail.workflow import files


def test_json_bytes_depend_on_content_alone(tmp_path):
    a = files.write_json(tmp_path / "a", {"b": 0.1 + 0.2, "a": [np.float32(1), np.int64(2)]})
    b = files.write_json(tmp_path / "b", {"a": (1.0, 2), "b": 0.3})
    assert a.read_bytes() == b.read_bytes()


def test_json_has_no_nan_and_refuses_infinity(tmp_path):
    assert files.read_json(files.write_json(tmp_path / "a", {"x": float("nan")})) == {"x": None}
    with pytest.raises(ValueError, match="inf"):
        files.write_json(tmp_path / "b", float("inf"))
    assert not (tmp_path / "b").exists()


def test_csv_keeps_rows_and_leaves_missing_cells_empty(tmp_path):
    path = files.write_csv(tmp_path / "a.csv", [{"x": 1, "y": None}, {"x": 0.123456789, "y": "a,b"}], ["x", "y"])
    assert path.read_text() == 'x,y\n1,\n0.123457,"a,b"\n'
    assert files.read_csv(path) == [{"x": "1", "y": ""}, {"x": "0.123457", "y": "a,b"}]


def test_arrays_come_back_and_have_the_same_bytes(tmp_path):
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array(["x", "yz"])}
    first, second = (files.save_arrays(tmp_path / name, **arrays) for name in ("1.npz", "2.npz"))
    assert first.read_bytes() == second.read_bytes()
    np.testing.assert_equal(files.load_arrays(first), arrays)


ARRAYS = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.array(["x", "yz"]), "c": np.float32(0.5)}
SHA256 = "4e5da071cba4557d73bd7ac3aa6db0f3c0065068cfa00d75afef6e36e9ef1700"


@pytest.mark.parametrize("before_3_11_4", [False, True])
def test_arrays_have_the_same_bytes_under_every_python(tmp_path, monkeypatch, before_3_11_4):
    if before_3_11_4:
        now = zipfile.ZipInfo.FileHeader

        def twice(self, zip64=None):
            """What Python 3.11.3 wrote for small arrays: their sizes in both places, the old version of the format."""
            versions = self.create_version, self.extract_version
            header = now(self, zip64)
            self.create_version, self.extract_version = versions
            size = self.file_size.to_bytes(4, "little")
            return header[:4] + bytes([self.extract_version]) + header[5:18] + size + size + header[26:]

        monkeypatch.setattr(zipfile.ZipInfo, "FileHeader", twice)
    np.savez(tmp_path / "numpy.npz", **ARRAYS)
    ours = files.save_arrays(tmp_path / "ours.npz", **ARRAYS).read_bytes()
    assert hashlib.sha256(ours).hexdigest() == SHA256
    alike = sys.version_info >= (3, 11, 4) and not before_3_11_4
    assert ((tmp_path / "numpy.npz").read_bytes() == ours) is alike
    rows = {"a": ((2, 2), iter([np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32)]))}
    parts = files.save_arrays_by_part(tmp_path / "parts.npz", rows)
    whole = files.save_arrays(tmp_path / "whole.npz", a=np.array([[1, 1], [0, 0]], np.float32))
    assert parts.read_bytes() == whole.read_bytes()
    np.testing.assert_equal(files.load_arrays(tmp_path / "ours.npz"), ARRAYS)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = files.write_text(tmp_path / "a", "old")

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"not a zip"])
def test_a_file_that_is_no_npz_is_named(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: not a readable \.npz"):
        files.load_arrays(path)


def test_pickled_objects_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"a\.npz: not a readable \.npz file of plain arrays"):
        files.load_arrays(path)


def test_objects_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        files.save_arrays(tmp_path / "a.npz", a=np.array([{"x": 1}], dtype=object))
    assert not [*tmp_path.iterdir()]


def test_a_missing_array_is_named_with_those_that_are_there(tmp_path):
    path = files.save_arrays(tmp_path / "a.npz", x=np.zeros(1), y=np.zeros(1))
    with pytest.raises(ValueError, match=r"a\.npz: no array 'z'; it has x, y"):
        files.load_arrays(path, "x", "z")


def test_bad_json_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not a JSON file"):
        files.read_json(path)
