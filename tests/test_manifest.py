"""Manifests list what a script really imports, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from longtail import manifest

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
MANIFESTS = manifest.texts(ROOT, PARAMS)


def code(name: str) -> set[str]:
    return set(manifest.entries(MANIFESTS[name]))


def test_there_is_one_for_each_method_source_and_script():
    assert {name for name in MANIFESTS if name.startswith("download-")} == {f"download-{s}" for s in PARAMS["sources"]}
    assert {"train-ce", "train-ldam_drw", "refit-crt", "fuse", "evaluate", "report"} < set(MANIFESTS)
    assert "train-crt" not in MANIFESTS and "refit-ce" not in MANIFESTS and "train-balpoe_apart" not in MANIFESTS


def test_a_method_has_its_loss_and_what_that_builds_on_and_no_other():
    losses = {file for file in code("train-ldam_drw") if "/losses/" in file}
    assert losses == {f"src/longtail/losses/{name}.py" for name in ("__init__", "ldam", "class_balanced")}
    assert "src/longtail/losses/ldam.py" not in code("train-gala_paper")
    assert {"src/longtail/kernels.cpp", "src/longtail/augment.py", "stages/train.py"} < code("train-ce")
    assert "src/longtail/metrics.py" not in code("train-ce")
    assert "src/longtail/report.html.j2" in code("report")


def test_plumbing_changes_no_result():
    assert not any(
        Path(file).name in ("stage.py", "params.py", "manifest.py") for name in MANIFESTS for file in code(name)
    )
    assert all("src/longtail/__init__.py" not in code(name) for name in MANIFESTS)


@pytest.mark.parametrize("name", ["train-class_balanced_sampling", "predict", "evaluate", "refit-lws", "report"])
def test_it_is_what_python_imports(name):
    """The script's imports, run for real: no file of the package is loaded that the manifest and plumbing lack."""
    script, *more = manifest.scripts(ROOT, PARAMS)[name]
    modules = [".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in more]
    program = (
        "import ast, sys\n"
        f"tree = ast.parse(open({str(script)!r}).read())\n"
        "tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]\n"
        "exec(compile(tree, 'script', 'exec'))\n"
        f"for name in {modules!r}: __import__(name)\n"
        "print('\\n'.join(m.__file__ for n, m in sys.modules.items() if n.startswith('longtail')))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {Path(file).relative_to(ROOT).as_posix() for file in done.stdout.split()}
    library = ROOT / "src/longtail"
    by_plumbing = manifest.closure([library / f"{stem}.py" for stem in manifest.PLUMBING], library)
    assert loaded - {file.relative_to(ROOT).as_posix() for file in by_plumbing} <= code(name)
    python = {file for file in code(name) if file.endswith(".py")}
    assert python - loaded <= LATE.get(name, set()) | {script.relative_to(ROOT).as_posix()}


# imported inside a function, where few need it
LATE: dict[str, set[str]] = {}


def test_entries_are_md5_and_path_in_order():
    for text in MANIFESTS.values():
        paths = list(manifest.entries(text))
        assert paths == sorted(paths) and all(len(md5) == 32 for md5 in manifest.entries(text).values())


def small(folder: Path, **sources: str) -> Path:
    library = folder / "src" / "longtail"
    library.mkdir(parents=True)
    for name, text in sources.items():
        (library / name.replace("__", "/").replace("_dot_", ".")).write_text(text)
    return library


def test_every_way_to_import_is_seen(tmp_path):
    library = small(
        tmp_path,
        **{
            "a.py": "from longtail import b",
            "b.py": "def f():\n    import longtail.c",
            "c.py": "from longtail.d import x",
            "d.py": "PAGE = 'page.j2'\nx = 'e.py'",
            "e.py": "",
            "page.j2": "from longtail import e",
            "stage.py": "",
        },
    )
    found = manifest.closure([library / "a.py"], library)
    assert {file.name for file in found} == {"a.py", "b.py", "c.py", "d.py", "page.j2"}


def test_what_was_committed_is_current():
    """As `longtail verify` says for results; here for the manifests themselves."""
    committed = {file.stem: file.read_text() for file in (ROOT / manifest.FOLDER).glob("*.txt")}
    assert committed == MANIFESTS
