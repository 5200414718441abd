"""Every command of the README is run: here, word for word in a clone, or by the test or the CI that is named here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT

README = (ROOT / "README.md").read_text()
HERE = {  # what it says when it has worked
    "longtail run paper-cifar100 --dry": "of 60 cells to run",
    "longtail status": "paper-cifar100: ",
    "longtail status quick": "table: results/quick/table.md",
    "longtail focus quick": "DVC sees quick\n",
    "longtail check": "params.yaml fits its schema",
    "longtail correct test.npy --labels test_labels.npy --fit train.npy --fit-labels train_labels.npy "
    "--fitted-on train --out corrected.npy": "corrected logits: corrected.npy",
    "dvc metrics show results/quick/summary.json": "digits_if20.digits.gala.accuracy",
    "dvc exp show -n 3 --only-changed --drop '.*/.*'": "Experiment",
    "dvc params diff HEAD~1": "",
    "dvc metrics diff HEAD~1": "",
    "dvc plots show results/quick/curves.csv results/quick/classes.csv": "index.html",
}
ELSEWHERE = {  # a command, and who runs it
    "dvc repro": "tests/test_pipeline.py::test_the_second_run_does_nothing",
    "longtail track": ".ci/run::longtail track",
    "ruff check && ruff format --check && mypy && lint-imports && pytest -n logical --dist loadfile":
        ".ci/run::block 2",
    "longtail run paper-cifar100 --jobs 2 --only '*-fast-*'":
        "tests/test_pipeline.py::test_cells_run_side_by_side_with_one_command",
    "longtail run incremental-quick": "tests/test_incremental.py::test_a_chain_leaves_its_steps_and_nothing_else",
    "longtail run incremental-cifar100 --jobs 2":
        "tests/test_incremental.py::test_two_processes_train_the_chain_of_one",
    "longtail new FOLDER --tune": "tests/test_new.py::test_fine_tuning_is_a_plan_beside_the_frozen_one",
    "longtail new FOLDER": "tests/test_new.py::test_a_folder_becomes_a_plan",
    "longtail new TABLE --features FILE.npy": "tests/test_new.py::test_embeddings_need_no_image",
    "longtail run NAME --jobs 2": "tests/test_pipeline.py::test_cells_run_side_by_side_with_one_command",
    "longtail export PLAN CELL --out network.onnx":
        "tests/test_export.py::test_the_file_gives_the_pipeline_s_logits_for_any_number_of_images",
    "longtail register PLAN CELL": "tests/test_export.py::test_a_registered_cell_is_served_with_the_pipeline_s_answers",
    "mlflow models serve": "tests/test_export.py::test_a_registered_cell_is_served_with_the_pipeline_s_answers",
    "mlflow ui": "tests/test_browser.py::test_mlflows_view_of_a_plan_has_method_seed_and_what_they_reached",
    "dvc repro stages/dvc.yaml:manifests && git diff --stat stages/code":
        "tests/test_pipeline.py::test_editing_a_loss_trains_its_cells_alone",
    "longtail adopt [plan ...]":
        "tests/test_adopt.py::test_a_renamed_local_variable_is_adopted_by_every_cell_and_a_changed_momentum_by_none",
    "longtail verify": ".ci/run::longtail verify",
    "dvc exp run -S methods.gala.lambda1=0.5":
        "tests/test_focus.py::test_an_experiment_runs_what_it_touches_and_changes_one_line",
}  # fmt: skip


def commands() -> set[str]:
    """The README's shell lines, without comments, and what it calls a command in a sentence or a table."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, flags=re.M | re.S)
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    sentences = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
    lines += re.findall(r"`((?:longtail|dvc|mlflow) [^`]+)`", sentences)
    return {line for line in lines if re.match(r"(longtail|dvc|mlflow|ruff) ", line)}


def test_every_command_has_somebody_who_runs_it():
    assert commands() <= HERE.keys() | ELSEWHERE.keys()
    assert HERE.keys() | ELSEWHERE.keys() <= commands(), "no longer in the README"


@pytest.mark.parametrize("where", sorted(set(ELSEWHERE.values())))
def test_who_runs_a_command_is_there(where):
    file, _, name = where.partition("::")
    text = (ROOT / file).read_text()
    assert (name if file == ".ci/run" else f"def {name}(") in text


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [one for one in HERE if "correct" not in one])
def test_a_command_does_what_it_says_in_a_fresh_clone(clone, command):
    assert HERE[command] in run(command, clone)


def test_logits_of_ones_own_by_the_command_and_in_python(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for name in ("train", "test"):
        arrays[f"{name}_labels"] = rng.integers(0, 4, 60)
        arrays[f"{name}_logits"] = rng.normal(size=(60, 4)) + 2 * np.eye(4)[arrays[f"{name}_labels"]]
        np.save(tmp_path / f"{name}.npy", arrays[f"{name}_logits"])
        np.save(tmp_path / f"{name}_labels.npy", arrays[f"{name}_labels"])
    (command,) = [one for one in HERE if "correct" in one]
    assert HERE[command] in run(command, tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
    exec(code, arrays)
    assert np.array_equal(arrays["predictions"], np.load(tmp_path / "corrected.npy").argmax(1))


def run(command: str, folder: Path) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_plan_is_in_the_list_of_plans():
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    page = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    assert not [plan for plan in (*params["plans"], *params["incremental"]["plans"]) if f"`{plan}`" not in page]


def test_the_hashed_requirements_are_the_constraints():
    def named(name: str) -> dict[str, str]:
        lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
        pairs = (line.split(" --hash=sha256:")[0].split("==") for line in lines)
        return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in pairs}

    hashed = named("requirements-hashed.txt")
    assert hashed.pop("setuptools")  # pip freeze leaves it out
    assert hashed == named("constraints.txt")
    lines = (ROOT / "requirements-hashed.txt").read_text().splitlines()
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines if not line.startswith("#"))
