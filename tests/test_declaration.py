"""What a stage declares, read without DVC: the part of its templates that is known, and None for the rest."""

import pytest

from longtail.workflow import declaration

PARAMS = "grid: {methods: [a, b], seeds: [0, 1]}\nsources: {x: {file: f}}\nflag: true\n"
MATRIX = """
  work:
    matrix:
      method: ${grid.methods}
      seed: [0, 1]
    cmd: >-
      run ${item.method}
      --seed ${item.seed} --first ${grid.methods[0]} ${key}
    deps: ["in/../${item.method}"]
    params: [grid]
"""
EACH = """
  work:
    foreach: ${sources}
    do:
      cmd: read ${key} ${item.file}
"""


@pytest.fixture
def read(tmp_path, monkeypatch):
    """The stage of a dvc.yaml with this text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(PARAMS)

    def read(text, address):
        (tmp_path / "dvc.yaml").write_text(text)
        return declaration.read(address)

    return read


def test_templates_are_filled_in(read):
    expected = ("run b --seed 1 --first a b-1", ["b"], ["grid"])
    assert read(f"stages:{MATRIX}", "work@b-1") == expected
    assert read(f"stages:{MATRIX}", "dvc.yaml:work@b-1") == expected
    assert read(f"stages:{EACH}", "work@x") == ("read x f", [], [])


@pytest.mark.parametrize(
    ("text", "address"),
    {
        "no such file": ("stages:" + MATRIX, "other/dvc.yaml:work@b-1"),
        "no such stage": ("stages:" + MATRIX, "other"),
        "no such cell": ("stages:" + MATRIX, "work@c-1"),
        "a cell of no matrix": ("stages: {work: {cmd: x}}", "work@a"),
        "a group": ("stages:" + MATRIX, "work"),
        "no such value": ("stages: {work: {cmd: 'run ${grid.epochs}'}}", "work"),
        "a value that DVC writes its own way": ("stages: {work: {cmd: 'run ${flag}'}}", "work"),
        "a mapping": ("stages: {work: {cmd: 'run ${grid}'}}", "work"),
        "an escaped template": (r"stages: {work: {cmd: 'run \${x:-y}'}}", "work"),
        "several commands": ("stages: {work: {cmd: [a, b]}}", "work"),
        "another params file": ("stages: {work: {cmd: a, params: [{other.yaml: [x]}]}}", "work"),
        "a dependency with settings": ("stages: {work: {cmd: a, deps: [{x: {cache: false}}]}}", "work"),
        "variables of a stage": ("stages: {work: {cmd: a, vars: [{x: 1}]}}", "work"),
        "variables in place": ("vars: [{x: 1}]\nstages: {work: {cmd: a}}", "work"),
        "another folder": ("stages: {work: {cmd: a, wdir: other}}", "work"),
        "a list": ("stages: {work: {foreach: [a], do: {cmd: 'x ${item}'}}}", "work@a"),
        "no YAML": ("stages: {", "work"),
    }.values(),
)
def test_what_only_dvc_knows_is_left_to_it(read, text, address):
    assert read(text, address) is None
