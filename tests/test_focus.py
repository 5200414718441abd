"""`longtail focus`: DVC's commands see the plans that are asked for, and the others stay as they are."""

import subprocess
import sys

import pytest
from conftest import ROOT
from dvc.repo import Repo

from longtail.workflow import files, focus

STAGE = "stages:\n  report-{0}:\n    cmd: echo {0}\n"


@pytest.fixture
def here(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    Repo.init(str(tmp_path)).close()
    for plan in ("mine", "other", "third"):
        files.write_text(tmp_path / f"stages/{plan}/dvc.yaml", STAGE.format(plan))
    files.write_text(tmp_path / "stages/code/train.txt", "program\n")
    files.write_text(tmp_path / "stages/dvc.yaml", STAGE.format("shared") + "    deps: [code/train.txt]\n")
    return tmp_path


def seen_by_dvc(root) -> set[str]:
    with Repo(str(root)) as repo:
        return {stage.name.removeprefix("report-") for stage in repo.index.stages}


def test_dvc_sees_what_is_asked_for_and_all_again(here):
    assert focus.seen(here) is None and seen_by_dvc(here) == {"mine", "other", "third", "shared"}
    focus.write(here, ["mine"])
    assert focus.seen(here) == {"mine"} and seen_by_dvc(here) == {"mine", "shared"}
    assert focus.hidden(here, ["mine", "other", "third"]) == ["other", "third"]
    focus.add(here, "third")
    assert seen_by_dvc(here) == {"mine", "third", "shared"}
    focus.clear(here)
    focus.add(here, "third")  # where none is hidden there is nothing to show
    assert focus.seen(here) is None and seen_by_dvc(here) == {"mine", "other", "third", "shared"}


def test_the_manifests_are_never_hidden(here):
    """They are dependencies: DVC takes an ignored one for missing."""
    focus.write(here, ["mine"])
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "stages/dvc.yaml"], cwd=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_experiment_runs_what_it_touches_and_changes_one_line(here):
    """On the repository's own params.yaml, with stages that only show what they have."""
    params = (ROOT / "params.yaml").read_text()
    files.write_text(here / "params.yaml", params)
    stage = (
        "  {0}:\n    cmd: echo $DVC_STAGE > {0}.txt\n    params:\n    - methods.{0}\n"
        "    outs:\n    - {0}.txt:\n        cache: false\n"
    )
    files.write_text(here / "dvc.yaml", "stages:\n" + "".join(map(stage.format, ("gala", "balpoe"))))
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (
        [sys.executable, "-m", "dvc", "repro"], ["git", "add", "."], [*git, "commit", "-qm", "first"],
        [sys.executable, "-m", "dvc", "exp", "run", "-S", "methods.gala.lambda1=0.5", "-n", "half"],
    ):  # fmt: skip
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "Running stage 'gala'" in done.stdout and "Running stage 'balpoe'" not in done.stdout
    lines = zip(params.splitlines(), (here / "params.yaml").read_text().splitlines(), strict=True)
    assert [pair for pair in lines if len({*pair}) > 1] == [("    lambda1: 1.0", "    lambda1: 0.5")]
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "exp", "list"], cwd=here, capture_output=True, text=True, check=True
    )
    assert "[half]" in listed.stdout


def test_a_hidden_plan_is_named_with_what_shows_it(here):
    focus.write(here, ["mine"])
    focus.check(here, "mine")
    with pytest.raises(ValueError, match=r"plan 'other' is hidden from DVC by stages/.dvcignore, which shows mine; "
                                         r"`longtail focus mine other` shows it, too"):  # fmt: skip
        focus.check(here, "other")
