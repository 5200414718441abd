"""Whatever is in a file from outside: it is read, or the error names the file; and nothing in it is run."""

import ast
import pickle
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT))
from benchmarks.fuzz import READERS, judge

from longtail.data.sources.cifar.fetch import masked
from longtail.report import document
from longtail.workflow import files

EACH = 20  # damaged files of a reader, beside those below
NEVER = [b"", b"\0", b"\xff\xfe", b"\x80\x04.", b"null", b"[[[", b"{", b"PK\x03\x04", b"PAR1PAR1", b"\x93NUMPY\x01\0"]


def damaged(name: str) -> list[bytes]:
    """Distinct inputs, cut and with bytes changed, always the same ones."""
    made, seeds = random.Random(name), READERS[name].seeds
    found = dict.fromkeys(NEVER)
    while len(found) < EACH + len(NEVER):
        data = bytearray(made.choice(seeds))
        data = data[: made.randrange(len(data))] if made.random() < 0.4 else data
        for _ in range(made.randrange(1, 5)):
            if data:
                data[made.randrange(len(data))] = made.randrange(256)
        found[bytes(data)] = None
    return list(found)


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_named(name: str, tmp_path: Path) -> None:
    outcomes = [judge(READERS[name], data, tmp_path) for data in damaged(name)]
    assert outcomes.count("refused") >= len(NEVER) - 2  # `null` and zeros may be something somewhere


@pytest.mark.parametrize("name", READERS)
def test_what_is_damaged_was_whole(name: str, tmp_path: Path) -> None:
    """So that damage is met at every depth of a reader, not only at its door."""
    assert {judge(READERS[name], data, tmp_path) for data in READERS[name].seeds} == {"read"}


def test_inputs_are_many() -> None:
    assert sum(len(set(damaged(name))) for name in READERS) >= 150


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_named(name: str, tmp_path: Path, data: bytes) -> None:
    assert judge(READERS[name], data, tmp_path) in ("read", "refused")  # anything else that it raises comes through


def test_an_npy_header_that_is_half_a_line_is_named(tmp_path: Path) -> None:
    """Found by damaged files: numpy's parser of headers raises TokenError."""
    header = b"{'descr': '<f4', 'shape': (2L,\n"
    data = b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header
    assert judge(READERS["npy"], data, tmp_path) == judge(READERS["features"], data, tmp_path) == "refused"
    assert judge(READERS["features"], READERS["npz"].seeds[0], tmp_path) == "refused"  # an archive under this name


def unsafe(call: ast.Call) -> bool:
    """Whether a call could run what is in a file: pickle, torch and numpy without their guards, YAML's full loader."""
    name = ast.unparse(call.func)
    given_as = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name in ("pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "eval", "exec"):
        return True
    if name == "torch.load":
        return given_as.get("weights_only") != "True"
    if name in ("tarfile.extractall", "shutil.unpack_archive"):
        return True
    return given_as.get("allow_pickle", "False") != "False"


def test_nothing_reads_with_the_power_of_pickle() -> None:
    found = [
        f"{path.relative_to(ROOT).as_posix()}: {ast.unparse(node)}"
        for folder in ("src", "stages")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and unsafe(node)
    ]
    annotation = "eval(ast.unparse(argument.annotation), dict(vars(ranges)))"  # of our own source, not of a file
    assert found == [f"src/longtail/workflow/params.py: {annotation}"]
    for text in ("torch.load(p)", "pickle.loads(b)", "np.load(p, allow_pickle=True)"):
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call) and unsafe(call)


def test_no_message_advises_to_read_with_the_power_of_pickle(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    torch.save({"a": Path}, tmp_path / "more.pt")
    (tmp_path / "pickled.npz").write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="allow_pickle") as objects:
        np.load(tmp_path / "objects.npy")
    with pytest.raises(ValueError, match="allow_pickle") as pickled:
        files.load_arrays(tmp_path / "pickled.npz")
    with pytest.raises(pickle.UnpicklingError, match="weights_only") as more:
        torch.load(tmp_path / "more.pt", weights_only=True)
    for caught in (objects, pickled, more):
        said = files.without_advice(f"{tmp_path}: no such thing ({caught.value}); remove it")
        assert "not read" in said and said.endswith("); remove it")
        assert not re.search("allow_pickle|weights_only|safe_globals|unsafely|torch.load", said)
    assert files.without_advice("weights_only is a word") == "weights_only is a word"


def test_what_mlflow_serves_listens_on_loopback_unless_told_otherwise() -> None:
    from mlflow import cli
    from mlflow.models import cli as models

    for command in (cli.server, models.serve):
        assert {option.name: option.default for option in command.params}["host"] == "127.0.0.1"
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    assert not [text for text in texts if re.search(r"--host [\d.]+|0\.0\.0\.0", text)]


def test_credentials_are_masked_and_paths_are_not() -> None:
    assert masked("s3://key:p@ss@host/x?sig=abc it") == "s3://***@host/x?*** it"
    assert "secret" not in masked("cannot read 'https://me:secret@host/m?token=secret2' (secret-free)").split(" (")[0]
    assert masked("/data/me@home/x") == "/data/me@home/x"


def test_a_page_escapes_what_it_shows() -> None:
    shown = str(document.inline("<script>alert(1)</script> & <b>x</b>"))
    assert "<script" not in shown and "<b>" not in shown and "&lt;script&gt;" in shown
