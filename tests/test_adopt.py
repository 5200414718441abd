"""Cells of other code: adopted where old and new code do the same with them, refused where one digit differs."""

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import yaml
from conftest import ROOT
from dvc.repo import Repo

from longtail.data.long_tail import class_counts
from longtail.evaluation import distributions, metrics
from longtail.evidence import adopt, probe
from longtail.training import provenance
from longtail.workflow import chains, files, locks
from longtail.workflow.cells import Cell

CE = "digits_if20-digits-ce-0"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A clone of what is committed, with the data set: no cell has run there."""
    clone = tmp_path_factory.mktemp("adopt") / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    command = [sys.executable, "-m", "dvc", "repro", "-q", "stages/dvc.yaml:subsample@digits_if20"]
    subprocess.run(command, cwd=clone, env=environment(clone), check=True)
    return clone


def environment(clone):
    return {**os.environ, "PYTHONPATH": str(clone / "src"), "LONGTAIL_LIVE_AFTER": "off"}


def said(clone, *words):
    command = [sys.executable, "-m", "longtail.cli", *words]
    done = subprocess.run(command, cwd=clone, env=environment(clone), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines() or done.stderr


def edit(clone, name, old, new):
    path = next((clone / "src").rglob(name))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def lock(clone):
    return (clone / "stages/quick/dvc.lock").read_bytes()


@pytest.mark.slow
def test_a_renamed_local_variable_is_adopted_by_every_cell_and_a_changed_momentum_by_none(bare):
    before = lock(bare)
    edit(bare, "engine.py", "clock", "began")
    code, lines = said(bare, "adopt", "quick")
    plan = yaml.safe_load((bare / "params.yaml").read_text())["plans"]["quick"]
    assert code == 0 and len(lines) == len(plan["methods"]) * len(plan["seeds"])
    assert f"adopted  quick {CE}: train" in lines
    after = lock(bare)
    assert after != before
    assert said(bare, "verify", "quick") == (0, ["the results of quick are those of this code and these params"])
    # the training that made the cell is still known
    name = f"train-quick@{CE}"
    now = locks.identity(locks.read_lock(bare / "stages/quick/dvc.lock")[name])
    was = locks.identity(locks.read_lock(ROOT / "stages/quick/dvc.lock")[name])
    known, earlier = locks.adopted(bare, "quick"), locks.adopted(ROOT, "quick")
    assert now != was and locks.origin(now, known) == locks.origin(was, earlier)

    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", "commit", "-qam", "x"], cwd=bare, check=True)
    edit(bare, "optimizers.py", "(by_sgd, **settings,", '(by_sgd, **settings | {"momentum": 0.899},')
    edit(bare, "metrics.py", "TOP = 5", "TOP = 4")
    code, lines = said(bare, "adopt", "quick", "--only", "*-ce-*")
    assert code == 1 and lines[0].startswith(f"refused  quick {CE}: epoch 1 in fp32, step 3: the loss was ")
    was, now = lines[0].split("the loss was ")[1].split(" and is ")
    assert was != now and was.split("[")[0] == now.split("[")[0]
    assert len(lines) == 2 and lock(bare) == after


def stale_cell(md5):
    cell = Cell("quick", *CE.split("-"))
    name = f"evaluate-quick@{CE}"
    entry = {"cmd": "python stages/x.py", "deps": [{"path": "data/long_tail/x.npz", "md5": md5}]}
    return adopt.Stale(cell, {name: entry}, {name: {"stages/code/evaluate.txt": md5}})


def test_code_that_is_in_no_commit_and_data_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no commit here has the code .*stages/code/evaluate.txt with MD5 ffff"):
        adopt.commit_of(ROOT, stale_cell("f" * 32).changed)
    made = r"`dvc repro stages/dvc\.yaml:subsample@x` makes it"
    with pytest.raises(ValueError, match=rf"data/long_tail/x\.npz is not there as evaluate-quick@.* read it; {made}"):
        adopt.job(tmp_path, stale_cell("f" * 32), 5)
    (tmp_path / "data/long_tail").mkdir(parents=True)
    (tmp_path / "data/long_tail/x.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match="is not there as"):
        adopt.job(tmp_path, stale_cell("f" * 32), 5)
    assert adopt.job(tmp_path, stale_cell(adopt.md5(b"x")), 5)["training"] is None


@pytest.mark.slow
def test_a_commit_whose_manifests_are_of_older_code_is_not_taken_for_that_code(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    path = "stages/code/evaluate.txt"
    was = adopt.md5((clone / path).read_bytes())
    before = adopt.commit_of(clone, {"x": {path: was}})
    edit(clone, "metrics.py", "TOP = 5", "TOP = 4")
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", "commit", "-qam", "x"], cwd=clone, check=True)
    assert adopt.commit_of(clone, {"x": {path: was}}) == before


def test_the_commit_is_the_latest_that_has_the_manifest():
    path = "stages/code/evaluate.txt"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    committed = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, check=True).stdout
    assert adopt.commit_of(ROOT, {"x": {path: adopt.md5(committed)}}) == head.strip()


def test_a_small_copy_has_all_groups_and_tails_of_its_own():
    """Of CIFAR-100-LT: with one image a class, swapped groups or test distributions would be no difference."""
    counts = class_counts("exponential", 500, 100, 100)
    arrays = {"class_names": np.array([str(c) for c in range(100)])}
    for split, sizes in (("train", counts), ("held_out", counts // 10), ("test", np.full(100, 100))):
        labels = np.repeat(np.arange(100), sizes)
        arrays |= {f"{split}_labels": labels, f"{split}_images": np.zeros((len(labels), 1))}
    small = probe.small(arrays, False)
    evaluate = probe.shortened(yaml.safe_load((ROOT / "params.yaml").read_text())["evaluate"])
    of_train = np.bincount(small["train_labels"], minlength=100)
    groups = metrics.shot_groups(of_train, many_above=evaluate["many_above"], few_below=evaluate["few_below"])
    assert all(mask_C.sum() > 3 for mask_C in groups.values())
    per_class = np.bincount(small["test_labels"]).min()
    drawn = distributions.names(evaluate["distribution_ratios"], per_class)
    forward, backward = (distributions.frequencies(f"{way}4", of_train, per_class) for way in ("forward", "backward"))
    assert len(drawn) == 5 and (forward != backward).any()
    assert len(small["train_labels"]) < 250 and len(small["test_labels"]) == 400


@pytest.mark.parametrize(("changed", "run"), [(["refit"], 2), (["predict"], 3), (["refit", "evaluate"], 4)])
def test_what_comes_after_the_last_change_is_not_run(changed, run):
    """The same code makes the same bytes of the same bytes; a base of the same code is needed all the same."""
    one = stale_cell("f" * 32)
    names = ["refit", "predict", "evaluate"]
    one.bases = {"train-quick@base": {"cmd": "python stages/train.py", "deps": []}}
    one.stages = {f"{name}-quick@x": {"cmd": f"python stages/{name}.py", "deps": []} for name in names}
    one.changed = {f"{name}-quick@x": {"stages/code/x.txt": "a"} for name in changed}
    asked = [stage["argv"] for stage in adopt.job(ROOT, one, 5)["stages"]]
    assert asked == [[f"stages/{name}.py"] for name in ["train", *names]][:run]


def test_what_computes_all_of_it_is_not_adopted():
    one = stale_cell("f" * 32)
    one.stages = {"evaluate-quick@x": {"cmd": "python stages/portable.py stages/evaluate.py", "deps": []}}
    one.changed = {"evaluate-quick@x": {"stages/code/evaluate.txt": "a", "stages/code/portable.txt": "b"}}
    with pytest.raises(ValueError, match=r"stages/portable\.py changed, which decides how all of it is computed"):
        adopt.job(ROOT, one, 5)
    one.changed = {"evaluate-quick@x": {"stages/code/evaluate.txt": "a"}}
    assert adopt.job(ROOT, one, 5)["stages"][0]["argv"] == ["stages/evaluate.py"]


def test_an_answer_that_is_an_error_does_not_put_the_next_cell_out_of_step(tmp_path):
    """Old code fails with one cell: the new code's answer is read all the same."""
    program = "import sys, json\nfor n, line in enumerate(sys.stdin):\n    print(json.dumps({}), flush=True)\n"
    failing = program.replace("{}", "{'error': 'it'} if n == 0 else {'n': n}")
    counting = program.replace("{}", "{'n': n}")
    with ExitStack() as stack:
        workers = []
        for text in (failing, counting):
            command = [sys.executable, "-c", text]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process = stack.enter_context(subprocess.Popen(command, **pipes))
            stack.callback(process.kill)
            workers.append(adopt.Worker(tmp_path, process))
        for number in range(2):
            for worker in workers:
                worker.ask({})
            answers = [worker.read() for worker in workers]
            assert answers[1] == {"n": number}
            if number == 0:
                with pytest.raises(ValueError, match="failed: it"):
                    workers[0].known(answers[0])


@pytest.mark.parametrize(("after", "expected"), [(60.0, [2, 1, 1]), (-1.0, [1, 1, 1, 1])])
def test_cells_are_recorded_together_each_plan_for_itself_and_before_an_error(monkeypatch, capsys, after, expected):
    written = []
    monkeypatch.setattr(adopt, "RECORD_AFTER_S", after)
    monkeypatch.setattr(adopt, "record", lambda root, cells: written.append(cells))
    cells = [replace(stale_cell("0" * 32), cell=Cell(plan, *CE.split("-"))) for plan in ("a", "a", "b", "a")]
    with pytest.raises(KeyboardInterrupt), ExitStack() as stack:
        found = adopt.Found(ROOT)
        stack.callback(found.record)
        for one in cells:
            found.same(one, "c0ffee")
        raise KeyboardInterrupt
    assert [len(together) for together in written] == expected
    assert [one for together in written for one in together] == [(one, "c0ffee") for one in cells]
    assert capsys.readouterr().out.splitlines() == [f"adopted  {one.cell.plan} {CE}: evaluate" for one in cells]


def test_code_that_changed_after_the_comparison_is_not_recorded(tmp_path):
    files.write_text(tmp_path / "stages/code/evaluate.txt", "newer still")
    one = replace(stale_cell("0" * 32), now={"stages/code/evaluate.txt": adopt.md5("new")})
    with pytest.raises(ValueError, match=r"evaluate\.txt has changed since .* `longtail adopt quick` again"):
        adopt.record(tmp_path, [(one, "c0ffee")])


def test_another_dvc_is_waited_for(bare, capsys, monkeypatch):
    monkeypatch.setattr(adopt, "WAIT_S", 0.05)
    monkeypatch.setattr("dvc.lock.DEFAULT_TIMEOUT", 0)
    with Repo(str(bare)) as repo, Repo(str(bare)) as other:
        other.lock.lock()
        end = threading.Timer(0.5, other.lock.unlock)
        end.start()
        with adopt.alone(repo):
            assert not other.lock.is_locked
        assert not repo.lock.is_locked
        end.join()
    assert capsys.readouterr().err.count("adopt waits: Unable to acquire lock") == 1


def test_no_record_hides_where_a_training_is_from():
    """A row from an identity to itself would end the way back at itself."""
    for path in sorted(ROOT.glob("stages/*/adopted.csv")):
        assert not [row for row in files.read_csv(path) if row["was"] == row["now"]], path


def test_every_stage_of_a_cell_is_known_to_be_its():
    cell = Cell("posthoc", "a", "b", "c", "1")
    for kind in ("train", "predict", "align", "evaluate", "compare"):
        assert adopt.cell_of(f"{kind}-posthoc@a-b-c-1") == cell
    assert adopt.cell_of("readings-posthoc") is None


def test_the_first_other_digit_is_shown():
    was = {"epoch 1": {"losses": ["2.30", "2.3125"], "weights": "a"}}
    now = {"epoch 1": {"losses": ["2.30", "2.3135"], "weights": "b"}}
    assert adopt.difference(was, was) == ""
    assert adopt.difference(was, now) == "epoch 1, step 2: the loss was 2.31[2]5 and is 2.31[3]5"
    now["epoch 1"]["losses"] = was["epoch 1"]["losses"]
    assert adopt.difference(was, now) == "epoch 1: the losses are the same, the weights after them are not"
    assert "looked at epoch 1 and now at epoch 2" in adopt.difference(was, {"epoch 2": now["epoch 1"]})


def test_files_that_one_of_them_does_not_write_are_a_difference():
    assert adopt.other_bytes({"a": "1"}, {"a": "1"}) == ""
    assert adopt.other_bytes({"a": "1", "b": "2"}, {"a": "1", "b": "3"}).endswith("b: other bytes")
    assert adopt.other_bytes({"a": "1", "b": "2"}, {"a": "1"}).endswith("b: not written")
    assert adopt.other_bytes({"a": "1"}, {"a": "1", "b": "2"}).endswith("b: not written before")


RECIPES = yaml.safe_load((ROOT / "params.yaml").read_text())["recipes"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_shortened_recipe_has_all_changes_in_their_order(name):
    recipe, short = RECIPES[name], probe.shortened(RECIPES[name])
    assert short["epochs"] <= 6 and short.keys() == recipe.keys()

    def order(one):
        ends = [one["schedule"]["warmup_epochs"], *one["schedule"]["milestones"], *one["resolution"]["milestones"]]
        return [sorted({0, *ends, one["epochs"]}).index(end) for end in (*ends, one["epochs"])]

    assert order(short) == order(recipe)
    assert short["optimizer"] == recipe["optimizer"] and short["network"] == recipe["network"]


def test_a_chain_of_trainings_is_looked_at_with_short_recipes_of_its_own_classes():
    cell = adopt.cell_of("readout-incremental-quick@d-o-p-r-t-0")
    assert isinstance(cell, chains.Cell) and (cell.plan, cell.training) == ("incremental-quick", "t")
    assert adopt.cell_of("train-quick@digits_if20-digits-ce-0") == Cell("quick", *CE.split("-"))
    assert adopt.cell_of("report-incremental-quick") is None
    recipes = yaml.safe_load((ROOT / "params.yaml").read_text())["incremental"]["recipes"]
    short = probe.shortened(recipes["survey"])
    assert short["first"]["epochs"] == short["later"]["epochs"] == 5 and short["body"] == recipes["survey"]["body"]
    assert short["first"]["schedule"]["milestones"] == [1, 2, 3] == short["later"]["schedule"]["milestones"]
    assert short["later"]["optimizer"] == recipes["survey"]["later"]["optimizer"]
    assert probe.shortened(recipes["short"])["later"] is None


def test_epochs_of_change():
    recipe = {
        "epochs": 200,
        "schedule": {"warmup_epochs": 5, "milestones": [160, 180]},
        "resolution": {"milestones": [28]},
    }
    assert probe.epochs_of_change(recipe, {}) == [1, 6, 29, 161, 181, 200]
    assert probe.epochs_of_change(recipe, {"deferred": 0.9}) == [1, 6, 29, 161, 181, 200]
    assert probe.epochs_of_change(recipe, {"deferred": 0.5})[3] == 101
    assert probe.epochs_of_change(recipe, {"deferred": 1})[-1] == 200


def test_what_computed_a_file_is_no_difference_and_every_number_is(tmp_path):
    def arrays(name, by, value):
        return adopt.content(files.save_arrays(tmp_path / f"{name}.npz", provenance=np.array(by), x=np.array([value])))

    def measures(folder, by, value):
        return adopt.content(files.write_json(tmp_path / folder / "metrics.json", {"provenance": by, "last": value}))

    for content in (arrays, measures):
        one = content("one", "here", 1.0)
        assert content("two", "there", 1.0) == one != content("three", "here", 1.001)
    plain = [files.write_text(tmp_path / name, text) for name, text in (("a.csv", "provenance 1"), ("b.csv", "2"))]
    assert adopt.content(plain[0]) != adopt.content(plain[1])


def test_a_digest_is_of_every_tensor_and_not_of_names():
    import torch

    a, b = torch.arange(3.0), torch.tensor(2)
    assert provenance.digest({"x": a, "y": [b]}) == provenance.digest({"z": (a,), "w": b})
    assert provenance.digest([a, b]) != provenance.digest([b, a])
    assert provenance.digest([a]) != provenance.digest([a.bfloat16()]) != provenance.digest([a.view(3, 1)])
