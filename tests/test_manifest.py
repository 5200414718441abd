"""Manifests list what a script really reaches, and nothing else; how code is written is no part of them."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from longtail.workflow import manifest

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
MANIFESTS = manifest.texts(ROOT, PARAMS)
LIBRARY, STARTS = manifest.package(ROOT), manifest.starts(ROOT, PARAMS)  # read once: it takes a third of a second


def code(name: str) -> set[str]:
    """The modules and files whose definitions a manifest has."""
    found = manifest.units(LIBRARY, STARTS[name])
    return {unit.module.name if unit.node else unit.title for unit in found}


def definitions(name: str) -> set[str]:
    return {title for title, _ in manifest.entries(MANIFESTS[name])}


def test_there_is_one_for_each_method_source_and_script():
    assert {name for name in MANIFESTS if name.startswith("download-")} == {f"download-{s}" for s in PARAMS["sources"]}
    assert {"train-ce", "train-ldam_drw", "refit-crt", "fuse", "evaluate", "report"} < set(MANIFESTS)
    assert "train-crt" not in MANIFESTS and "refit-ce" not in MANIFESTS and "train-balpoe_apart" not in MANIFESTS


def test_a_method_has_its_loss_and_what_that_builds_on_and_no_other():
    losses = {name for name in code("train-ldam_drw") if ".losses" in name}
    assert losses == {"longtail.losses", "longtail.losses.ldam", "longtail.losses.class_balanced"}
    assert "longtail.losses.ldam" not in code("train-gala_paper")
    assert "kernels.cpp" in code("train-ce") and "train.py" in definitions("train-ce")
    assert "document.html.j2" in code("report")


def test_what_a_module_has_beside_what_is_reached_does_not_count():
    assert "save_arrays" not in definitions("train-ce") and "load_arrays" in definitions("train-ce")
    assert {"evaluate", "summarize"} < definitions("evaluate") and "EnergyAligning" not in definitions("evaluate")


def test_plumbing_changes_no_result():
    for name in manifest.PLUMBING:
        assert LIBRARY.module(name), name
    assert not any(code(name) & manifest.PLUMBING for name in MANIFESTS)


def test_the_first_line_is_of_all_and_the_others_are_of_one_definition_each():
    for text in MANIFESTS.values():
        first, *lines = text.splitlines()
        assert len(first.split()[0]) == 64 and first.endswith("  program")
        assert len(manifest.entries(text)) == len(set(lines))
        assert [line.split("  ", 1)[1] for line in lines] == sorted(line.split("  ", 1)[1] for line in lines)


def test_a_loss_of_another_name_is_told(tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    path = next(tmp_path.rglob("losses/ce.py"))
    path.write_text(path.read_text().replace("class Loss", "class Lost"))
    with pytest.raises(ValueError, match=r"src/longtail/losses/ce: defines no Loss"):
        manifest.texts(tmp_path, PARAMS)


def test_what_was_committed_is_current():
    """As `longtail verify` says for results; here for the manifests themselves."""
    committed = {file.stem: file.read_text() for file in (ROOT / manifest.FOLDER).glob("*.txt")}
    assert committed == MANIFESTS


class Documented(ast.NodeTransformer):
    """Gives everything another docstring."""

    def document(self, node):
        self.generic_visit(node)
        if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
            node.body.pop(0)
        node.body.insert(0, ast.Expr(ast.Constant("Said otherwise.")))
        return node

    visit_Module = visit_FunctionDef = visit_ClassDef = document


def test_comments_docstrings_and_layout_change_no_line(tmp_path):
    """Every module and script: a comment, other docstrings, and the formatter with another line length."""
    for folder in ("src", "stages"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    files = [*tmp_path.glob("src/**/*.py"), *tmp_path.glob("stages/*.py")]
    assert len(files) > 60
    for file in files:
        tree = Documented().visit(ast.parse(file.read_text()))
        file.write_text("# about it\n" + ast.unparse(ast.fix_missing_locations(tree)) + "\n# the end\n")
    command = [sys.executable, "-m", "ruff", "format", "-q", "--line-length", "70", "--isolated", *files]
    subprocess.run(command, check=True)
    for file in tmp_path.rglob("*.cpp"):
        file.write_text("// about it\n\n" + file.read_text().replace("\n    ", "\n      ").replace(" {\n", "\n{\n"))
    assert manifest.texts(tmp_path, PARAMS) == MANIFESTS


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("engine.py", "LOOK_EVERY = 20", "LOOK_EVERY = 21"),
        ("inputs.py", "SLICE = ", "SLICE = 1 + "),
        ("ldam.py", "super().__init__()", "super().__init__(1)"),
        ("energy.py", "class EnergyAligning(", "class EnergyAligning(int, "),
    ],
)
def test_a_changed_definition_changes_exactly_the_manifests_that_reach_it(tmp_path, file, old, new):
    for folder in ("src", "stages"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = next(Path(tmp_path).rglob(file))
    assert path.read_text().count(old) == 1, file
    title = new.split(" = ")[0] if " = " in new else "EnergyAligning" if "Energy" in new else "Loss"
    path.write_text(path.read_text().replace(old, new))
    now = manifest.texts(tmp_path, PARAMS)
    changed = {name for name in now if now[name] != MANIFESTS[name]}
    module = ".".join(path.relative_to(tmp_path / "src").with_suffix("").parts)
    reaching = {
        name
        for name, start in STARTS.items()
        for unit in manifest.units(LIBRARY, start)
        if unit.module.name == module and title in unit.names
    }
    assert changed == reaching and 0 < len(changed) < len(now)
    for name in changed:
        was, is_now = manifest.entries(MANIFESTS[name]), manifest.entries(now[name])
        assert {line[0] for line in was ^ is_now} == {title}


@pytest.mark.slow
def test_nothing_runs_that_the_manifest_does_not_have(tmp_path):
    """Stages of three cells, watched while they run: every function of ours that they call is in their manifest."""
    command = [sys.executable, ROOT / "tests/watched.py", tmp_path]
    env = {**os.environ, "LONGTAIL_QUIET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    ran = json.loads(done.stdout.splitlines()[-1])
    expected = {"train-gala_balpoe", "train-ldam_drw", "train-ce", "refit-crt", "predict", "evaluate", "compare"}
    assert expected <= set(ran)
    for name, seen in ran.items():
        units = manifest.units(LIBRARY, STARTS[name])
        reached = {(str(unit.module.file), title) for unit in units for title in unit.names}
        called = {(file, title) for file, title in seen if title[0] != "<" and "/evidence/" not in file}
        assert called <= reached, name
        assert len(called) > 10  # it did watch
