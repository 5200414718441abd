"""Class-incremental learning: protocol, memory, objectives, chains that are killed, read-outs, measures."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small_chain
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import softmax

from longtail import losses, posthoc
from longtail import networks as plain_networks
from longtail.incremental import (
    data,
    measures,
    memory,
    networks,
    objective,
    outcomes,
    protocol,
    readouts,
    report,
    teaching,
    tracking,
)  # fmt: skip
from longtail.incremental.train import recipe_of
from longtail.tracking.runs import open_store
from longtail.workflow import chains, declaration, files, params

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
SETTINGS = PARAMS["incremental"]["readouts"]


# --- protocol --------------------------------------------------------------------------------------------------------


def test_class_orders_are_those_of_the_field():
    order = protocol.class_order(100, numpy_seed=1993)
    assert order[:10].tolist() == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76] and order[-1] == 33
    assert protocol.order_hash(order).startswith("997a048a5344") and protocol.order_hash(order).endswith("21c7e")
    thousand = protocol.order_hash(protocol.class_order(1000, numpy_seed=1993))
    assert thousand.startswith("305571fb8fde") and thousand.endswith("8e4")
    icarl = protocol.class_order(100, numpy_seed=1993, shuffles_before=[100, 500])
    assert icarl[:12].tolist() == [87, 0, 52, 58, 44, 91, 68, 97, 51, 15, 94, 92] and icarl[-2:].tolist() == [35, 39]
    assert protocol.class_order(4, listed=[2, 0, 3, 1]).tolist() == [2, 0, 3, 1]
    with pytest.raises(ValueError, match="each of 0 to 3 once"):
        protocol.class_order(4, listed=[2, 0, 3, 3])


def test_steps_may_be_unequal_and_groups_are_those_of_steps():
    steps = protocol.steps(10, 4, 4)
    assert [(step.number, step.old, step.seen, step.new) for step in steps] == [
        (0, 0, 4, 4),
        (1, 4, 8, 4),
        (2, 8, 10, 2),
    ]
    assert protocol.groups([4, 8, 10]).tolist() == [0] * 4 + [1] * 4 + [2] * 2
    with pytest.raises(ValueError, match="no second step"):
        protocol.steps(10, 10, 2)


CHAINS = st.fixed_dictionaries(
    {
        "first_classes": st.integers(1, 6),
        "step_classes": st.integers(1, 5),
        "memory": st.integers(0, 60),
        "memory_rule": st.sampled_from(["total", "per_class"]),
        "selection": st.just("herding"),
        "held_out": st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    }
)


@settings(max_examples=60, deadline=None)
@given(settings_=CHAINS, size=st.integers(1, 9), seed=st.integers(0, 3))
def test_memory_is_never_above_its_budget_and_no_image_is_used_twice(settings_, size, seed):
    labels_N = np.repeat(np.arange(7), size)
    chain = data.Chain.of(7, {}, settings_)
    kept = data.Memory(chain, labels_N, seed)
    untrained = np.concatenate([*kept.aside.values()])
    for step in chain.steps:
        rows = kept.rows(step, replay=True)
        assert (labels_N[rows.train] < step.seen).all() and (labels_N[rows.held_out] < step.seen).all()
        assert len(np.unique(rows.train)) == len(rows.train) and not np.isin(rows.train, untrained).any()
        assert set(rows.held_out) <= set(untrained)
        old = np.isin(rows.train, np.flatnonzero(labels_N < step.old)).sum()
        old += (labels_N[rows.held_out] < step.old).sum()
        if step.old:
            limit = settings_["memory"] * (step.old if settings_["memory_rule"] == "per_class" else 1)
            assert old <= limit
        for label in range(step.old, step.seen):
            kept.ranked[label] = kept.own(label)[: kept.needed(step)]


def slow_herding(features_ND, count):
    """Algorithm 4 of iCaRL, word for word."""
    mean, taken = sum(features_ND) / len(features_ND), []
    for k in range(1, count + 1):
        best, best_distance = None, None
        for row, x in enumerate(features_ND):
            if row in taken:
                continue
            distance = np.linalg.norm(mean - (x + sum(features_ND[i] for i in taken)) / k)
            if best is None or distance < best_distance - 1e-12:
                best, best_distance = row, distance
        taken.append(best)
    return taken


@pytest.mark.parametrize("doubled", [False, True])
def test_herding_is_its_slow_twin(doubled):
    features = np.abs(np.random.default_rng(1).normal(size=(14, 5)))
    if doubled:
        features[7:] = features[:7]  # the same image twice: both may be taken, none is taken twice
    features = memory.normalised(features)
    found = memory.herding(features, 10)
    assert len(set(found.tolist())) == 10
    if doubled:
        np.testing.assert_allclose(features[found], features[slow_herding(features, 10)])
    else:
        assert found.tolist() == slow_herding(features, 10)
    assert memory.herding(features, 99).size == 14
    generator = np.random.default_rng(0)
    assert memory.select(features, 10, way="herding", generator=generator).tolist() == found.tolist()


def slow_herding_released(features_ND, count):
    """iCaRL's code: w starts at the mean and moves by mean - x even where x was taken before."""
    mean = sum(features_ND) / len(features_ND)
    w, taken = mean, []
    for _ in range(1000):
        if len(taken) == count:
            break
        best = max(range(len(features_ND)), key=lambda row: float(np.dot(w, features_ND[row])))
        if best not in taken:
            taken.append(best)
        w = w + mean - features_ND[best]
    rest = sorted(range(len(features_ND)), key=lambda row: -float(np.dot(mean, features_ND[row])))
    return [*taken, *(row for row in rest if row not in taken)][:count]


@pytest.mark.parametrize("count", [5, 40, 60])
def test_the_released_herding_is_its_slow_twin(count):
    features = memory.normalised(np.abs(np.random.default_rng(3).normal(size=(60, 4))))
    assert memory.herding_released(features, count).tolist() == slow_herding_released(features, count)


def test_raw_herding_takes_features_as_they_are():
    features = np.random.default_rng(4).normal(size=(30, 3)) * np.arange(1, 31)[:, None]
    generator = np.random.default_rng(0)
    raw, normal = (memory.select(features, 8, way=way, generator=generator) for way in ("herding_raw", "herding"))
    assert raw.tolist() == slow_herding(features, 8) != normal.tolist()


def test_the_released_herding_is_another_one_and_takes_nothing_twice():
    features = np.abs(np.random.default_rng(2).normal(size=(300, 16)))
    generator = np.random.default_rng(0)
    paper, released = (
        memory.select(features, 150, way=way, generator=generator) for way in ("herding", "herding_released")
    )
    assert len(set(released.tolist())) == 150 and released[0] == paper[0]
    assert 0.2 < len(set(paper.tolist()) & set(released.tolist())) / 150 < 0.95
    drawn = memory.select(features, 150, way="random", generator=generator)
    assert len(set(drawn.tolist())) == 150


# --- networks and objectives ------------------------------------------------------------------------------------------


def network(**changes):
    torch.manual_seed(0)
    made = networks.build(**{
        "channels": 1, "classes": 3, "experts": 1, "body": "option_a", "depth": 8, "width": 4, "head": "linear",
        "scale": 1.0, "mean": [0.4], "std": [0.3], **changes,
    })  # fmt: skip
    return made.eval()


BODIES = [
    {}, {"head": "bare_linear"}, {"head": "cosine", "scale": 4.0}, {"experts": 2}, {"body": "preactivation"},
    {"body": "preactivation", "head": "bare_linear"},
]  # fmt: skip


@pytest.mark.parametrize("changes", BODIES)
def test_a_grown_network_keeps_its_logits_and_comes_back_from_its_file(changes, tmp_path):
    small, images = network(**changes), torch.randn(4, 1, 8, 8)
    copied = networks.grown(small, 5, head="copied").eval()
    torch.testing.assert_close(copied(images)[:, :, :3], small(images))
    fresh = networks.grown(small, 5, head="fresh").eval()
    assert fresh(images).shape == (changes.get("experts", 1), 4, 5)
    assert not torch.isclose(fresh(images)[:, :, :3], small(images)).all(-1).any()
    path = files.write_bytes(tmp_path / "n.safetensors", plain_networks.to_bytes(copied))
    torch.testing.assert_close(networks.load(path)(images), copied(images))


def test_a_correction_goes_into_a_head_and_not_into_a_cosine():
    small, images = network(), torch.randn(4, 1, 8, 8)
    scale, shift = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([0.0, 1.0, -1.0])
    torch.testing.assert_close(networks.folded(small, scale, shift).eval()(images), small(images) * scale + shift)
    with pytest.raises(ValueError, match="cosine head cannot take up"):
        networks.folded(network(head="cosine"), scale, shift)
    with pytest.raises(ValueError, match="bare_linear head cannot take up"):
        networks.folded(network(head="bare_linear"), scale, shift)


def test_features_of_the_preactivation_network_are_at_least_zero():
    caught = []
    made = network(body="preactivation")
    made.experts[0].head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    made(torch.randn(4, 1, 8, 8))
    assert caught[0].shape == (4, 16) and (caught[0] >= 0).all() and (caught[0] > 0).any()


def test_distillation_is_its_slow_twin():
    rng = np.random.default_rng(0)
    z, t = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5, 3))
    slow = np.mean([
        -sum(softmax(t[e, b] / 2)[c] * np.log(softmax(z[e, b] / 2)[c]) for c in range(3))
        for e in range(2) for b in range(5)
    ])  # fmt: skip
    found = objective.softened(torch.tensor(z), torch.tensor(t), 2.0)
    assert found.item() == pytest.approx(slow)
    labels, sigmoid = np.array([0, 3, 3, 1, 2]), lambda x: 1 / (1 + np.exp(-x))
    wide = rng.normal(size=(2, 5, 4))
    slow = 0.0
    for e in range(2):
        for b in range(5):
            for c in range(4):
                target = sigmoid(t[e, b, c]) if c < 3 else float(labels[b] == c)
                p = sigmoid(wide[e, b, c])
                slow -= (target * np.log(p) + (1 - target) * np.log(1 - p)) / 40
    found = objective.sigmoid_targets(torch.tensor(wide), torch.tensor(labels), torch.tensor(t))
    assert found.item() == pytest.approx(slow)
    alone = objective.sigmoid_targets(torch.tensor(wide), torch.tensor(labels), None)
    onehot = F.one_hot(torch.tensor(labels), 4).double().expand(2, 5, 4)
    assert alone.item() == pytest.approx(F.binary_cross_entropy(torch.tensor(wide).sigmoid(), onehot).item())


def step_objective(kind, student, teacher):
    counts = torch.tensor([5, 5, 5, 20, 20])
    made = objective.Objective(
        losses.load("ce")(counts), kind=kind, temperature=2.0, teacher=teacher, old=3,
        positive=lambda: [student.experts[0].head.weight],
    )  # fmt: skip
    made.train()
    return made


@pytest.mark.parametrize("kind", ["share", "added"])
def test_the_teacher_sees_the_batch_of_the_student_with_its_correction(kind):
    old, images, labels = network(), torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 4])
    student = networks.grown(old, 5, head="fresh").train()
    scale, shift = torch.tensor([1.0, 1.0, 0.5]), torch.tensor([0.0, 0.0, 0.3])
    teacher = objective.Teacher(old, scale, shift)
    teacher.watch(student)
    made = step_objective(kind, student, teacher)
    logits = student(images)
    ce = F.cross_entropy(logits[0], labels)
    kd = objective.softened(logits[:, :, :3], old.eval()(images) * scale + shift, 2.0)
    expected = 0.4 * ce + 0.6 * kd if kind == "share" else ce + kd
    torch.testing.assert_close(made(logits, labels), expected)
    torch.testing.assert_close(made(logits, labels, 0.25), 0.25 * expected)
    made.eval()
    torch.testing.assert_close(made(logits, labels), ce)  # no teacher outside training
    assert not [name for name, _ in made.named_parameters()] and "teacher" not in str(made.state_dict().keys())
    with torch.no_grad():
        student.experts[0].head.weight[0, 0] = -1
    made.after_step()
    assert (student.experts[0].head.weight >= 0).all()


# --- chains -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A finished small chain, and the data it is of."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LONGTAIL_QUIET", "1")
        images = small_chain.data(folder / "data.npz")
        small_chain.run(images, folder / "out")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a chain's outs by name; provenance aside, which names the machine's threads."""
    skip = ("machine.json", "provenance.json", "predictions.npz")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in skip
    }  # fmt: skip


def test_a_chain_leaves_its_steps_and_nothing_else(chain):
    names = [f"model/step_0{t}.safetensors" for t in range(3)]
    assert set(content(chain / "out")) == {*names, "model/memory.npz", "model/steps.json", "history.csv"}
    assert not [path for path in (chain / "runs").rglob("*") if path.is_file()]
    sizes = files.read_json(chain / "out/model/steps.json")
    # 24 images for 2, 4, 6 classes: 12, 6 and 4 each, of them 3, 1, 1 held out
    assert [size["memory_after"] for size in sizes] == [24, 24, 24]
    assert [size["train_images"] for size in sizes] == [34, 34 + 18, 38 + 20]
    assert [size["held_out_images"] for size in sizes] == [6, 12, 6]
    history = files.read_csv(chain / "out/history.csv")
    assert [(row["step"], row["epoch"]) for row in history] == [(str(t), str(e)) for t in range(3) for e in (1, 2)]


def test_no_test_image_and_no_image_of_a_later_step_is_touched(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGTAIL_QUIET", "1")
    arrays = files.load_arrays(chain / "data.npz")
    arrays["test_images"] = 255 - arrays["test_images"]
    late = np.isin(arrays["train_labels"], [1, 3])  # the classes of the last step
    arrays["train_images"][late] = 255 - arrays["train_images"][late]
    small_chain.run(files.save_arrays(tmp_path / "data.npz", **arrays), tmp_path / "out")
    clean, poisoned = content(chain / "out"), content(tmp_path / "out")
    for name in ("model/step_00.safetensors", "model/step_01.safetensors"):
        assert clean[name] == poisoned[name]
    assert clean["model/step_02.safetensors"] != poisoned["model/step_02.safetensors"]
    arrays = files.load_arrays(chain / "data.npz")
    arrays["test_images"] = 255 - arrays["test_images"]
    small_chain.run(files.save_arrays(tmp_path / "data.npz", **arrays), tmp_path / "again")
    assert content(tmp_path / "again") == clean


@pytest.mark.slow
def test_a_chain_that_is_killed_again_and_again_ends_with_the_same_bytes(chain, tmp_path):
    options = json.dumps({"data": str(chain / "data.npz"), "out": "out"})
    command = [sys.executable, str(Path(__file__).with_name("small_chain.py")), options]
    environment = {**os.environ, "LONGTAIL_CHECKPOINT_S": "0", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    rng, kills = np.random.default_rng(0), 0
    kept = tmp_path / "runs/.checkpoints/small"
    for wait in rng.uniform(0, 0.6, 6):
        running = subprocess.Popen(command, cwd=tmp_path, env=environment)
        while running.poll() is None and not [*kept.glob("*.pt"), *kept.glob("*.npz")]:
            time.sleep(0.01)
        before = {path.name for path in kept.glob("*")}
        while running.poll() is None and {path.name for path in kept.glob("*")} == before and wait > 0.3:
            time.sleep(0.01)
        time.sleep(wait)
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
            kills += 1
        if running.wait() == 0:
            break
    assert kills >= 2
    # what a kill between the beginning of a write and its renaming leaves, which few kills meet by themselves
    (tmp_path / "out/model").mkdir(parents=True, exist_ok=True)
    for left in ("model/.step_01.safetensors.pibfl119", ".history.csv.pibfl119", ".predictions.npz.pibfl119"):
        (tmp_path / "out" / left).touch()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert content(tmp_path / "out") == content(chain / "out")
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


WIDER = small_chain.FIRST["network"] | {"width": 8}  # preactivation wants that


@pytest.mark.slow
def test_two_processes_train_the_chain_of_one(chain, tmp_path):
    # 'fresh' rows and sums in another order round otherwise: the same to rounding, after so few steps
    program = tmp_path / "two.py"
    program.write_text(
        "import json, sys\nfrom pathlib import Path\nimport small_chain\nfrom longtail.workflow import processes\n"
        "processes.launch()\noptions = json.loads(sys.argv[1])\n"
        "small_chain.run(Path(options['data']), Path(options['out']))\n"
    )
    options = json.dumps({"data": str(chain / "data.npz"), "out": "out"})
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "LONGTAIL_PROCESSES": "2", "PYTHONPATH": paths, "LONGTAIL_QUIET": "1"}
    subprocess.run([sys.executable, str(program), options], cwd=tmp_path, env=environment, check=True)
    one, two = (files.load_arrays(folder / "out/model/memory.npz") for folder in (chain, tmp_path))
    assert all(len(two[name]) == len(one[name]) for name in one)
    first, second = (networks.load(folder / "out/model/step_00.safetensors") for folder in (chain, tmp_path))
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.2, atol=0.02, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"loss": "bce", "distillation": "sigmoid"}},
        {"training": {"loss": "balpoe", "arguments": {"taus": [0.0, 2.0]}, "teacher": "bias_layer"}},
        {"training": {key: PARAMS["incremental"]["trainings"]["gala"][key] for key in ("loss", "arguments")}},
        {"training": {"teacher": "weight_aligning", "start": "teacher"}},
        {"recipe": {"body": "preactivation", "bias": False, "new_head": "fresh", "positive_weights": True,
                    "weight_decay_by_step": True, "first": small_chain.FIRST | {"network": WIDER}},
         "training": {"teacher": "weight_aligning_released"}, "protocol": {"selection": "herding_released"}},
        {"training": {"replay": False, "distillation": "none"}, "protocol": {"memory": 0, "held_out": 0}},
    ],
)  # fmt: skip
def test_every_kind_of_training_runs_to_the_end(changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGTAIL_QUIET", "1")
    images = small_chain.data(tmp_path / "data.npz", train_size=12)
    small_chain.run(images, tmp_path / "out", **changes)
    found = measures.measure(str(tmp_path / "out/predictions.npz"), SETTINGS)
    assert len(found.steps) == 3 * len(found.summary["readouts"])
    kept = changes.get("protocol", {}).get("memory") != 0
    assert {name in found.summary["readouts"] for name in ("nearest_mean", "energy_chosen", "bias_layer")} == {kept}
    assert "weight_aligning" in found.summary["readouts"]


@pytest.mark.parametrize("rule", [{"memory": 24, "memory_rule": "total"}, {"memory": 4, "memory_rule": "per_class"}])
def test_unequal_steps_go_from_images_to_measures(rule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGTAIL_QUIET", "1")
    images = small_chain.data(tmp_path / "data.npz", train_size=12)
    small_chain.run(images, tmp_path / "out", protocol={"first_classes": 3, "step_classes": 2, **rule})
    found = measures.measure(str(tmp_path / "out/predictions.npz"), SETTINGS)
    assert found.summary["ends"] == [3, 5, 6]
    of_groups = {(row["step"], row["group"]): row["accuracy"] for row in found.groups if row["readout"] == "none"}
    of_steps = {row["step"]: row for row in found.steps if row["readout"] == "none"}
    for step, classes in ((1, (3, 2)), (2, (3, 2, 1))):  # as many test images of each class
        mean = sum(of_groups[step, group] * size for group, size in enumerate(classes)) / sum(classes)
        assert of_steps[step]["accuracy"] == pytest.approx(mean)
        assert of_steps[step]["new"] == of_groups[step, step]
    taken = [row for row in found.confusion if row["readout"] == "none"]
    assert [sum(row["images"] for row in taken if row["step"] == step) for step in (0, 1, 2)] == [15, 25, 30]


def test_later_steps_have_what_is_later_and_the_decay_of_their_number():
    later = {"epochs": 7, "optimizer": {"lr": 0.2, "weight_decay": 0.6}, "schedule": {"shape": "cosine"}}
    recipe = small_chain.RECIPE | {"later": later, "weight_decay_by_step": True}
    first, second = (recipe_of(recipe, protocol.Step(number, 2 * number, 2 * number + 2)) for number in (0, 2))
    assert first == small_chain.FIRST
    assert second == small_chain.FIRST | later | {"optimizer": {"lr": 0.2, "weight_decay": pytest.approx(0.2)}}
    assert later["optimizer"]["weight_decay"] == 0.6
    plain = recipe_of(small_chain.RECIPE | {"weight_decay_by_step": True}, protocol.Step(4, 8, 10))
    assert plain["optimizer"]["weight_decay"] == pytest.approx(1e-4)


def test_balanced_softmax_without_images_of_old_classes_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = small_chain.data(tmp_path / "data.npz", train_size=12)
    training = {"loss": "balanced_softmax", "arguments": {"tau": 1.0}, "replay": False, "distillation": "none"}
    with pytest.raises(ValueError, match="step 1: 2 classes have no image to train on, which balanced_softmax needs"):
        small_chain.run(images, tmp_path / "out", training=training)


def test_a_teacher_with_a_bias_layer_needs_held_out_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = small_chain.data(tmp_path / "data.npz", train_size=12)
    with pytest.raises(ValueError, match="teacher: bias_layer is fitted on held-out memory; the protocol's held_out"):
        small_chain.run(images, tmp_path / "out", training={"teacher": "bias_layer"}, protocol={"held_out": 0})


# --- read-outs and measures -------------------------------------------------------------------------------------------


def biased(rng, old=4, classes=6, count=600, beta=0.5, gamma=-2.0):
    """Calibrated logits, and the same with new classes lifted by the inverse of (beta, gamma)."""
    labels = rng.integers(0, classes, count)
    fair = rng.normal(size=(count, classes)) * 1.5
    labels = np.array([rng.choice(classes, p=softmax(row)) for row in fair])
    raw = fair.copy()
    raw[:, old:] = (raw[:, old:] - gamma) / beta
    return fair, raw, labels


def test_the_bias_layer_finds_a_known_bias():
    fair, raw, labels = biased(np.random.default_rng(0), count=20000)
    layer = posthoc.BiasLayer(old=4, l2=0.0).fit(raw, labels, fitted_on="held-out")
    assert layer.beta_ == pytest.approx(0.5, abs=0.05) and layer.gamma_ == pytest.approx(-2.0, abs=0.2)
    np.testing.assert_allclose(layer.transform(raw), fair, atol=0.4)

    def loss(beta, gamma):
        moved = raw.copy()
        moved[:, 4:] = beta * moved[:, 4:] + gamma
        return -np.log(softmax(moved, axis=1)[np.arange(len(labels)), labels]).mean() + 0.1 * gamma**2 / 2

    ridge = posthoc.BiasLayer(old=4, l2=0.1).fit(raw, labels)
    best = loss(ridge.beta_, ridge.gamma_)
    assert all(
        loss(ridge.beta_ + db, ridge.gamma_ + dg) > best for db, dg in [(0.01, 0), (-0.01, 0), (0, 0.05), (0, -0.05)]
    )
    assert abs(ridge.gamma_) < abs(layer.gamma_)


def test_a_masked_class_takes_no_part_in_either():
    _, raw, labels = biased(np.random.default_rng(1))
    weight = np.random.default_rng(2).normal(size=(6, 3))
    wide, wide_weight = np.insert(raw, 2, -1e9, axis=1), np.insert(weight, 2, 1e6, axis=0)
    moved = labels + (labels >= 2)
    for narrow, with_mask in [
        (posthoc.BiasLayer(old=4).fit(raw, labels), posthoc.BiasLayer(old=5).fit(wide, moved)),
        (posthoc.WeightAligning(weight, old=4).fit(raw), posthoc.WeightAligning(wide_weight, old=5).fit(wide)),
    ]:
        assert with_mask.gamma_ == pytest.approx(narrow.gamma_, rel=1e-6)
        np.testing.assert_allclose(np.delete(with_mask.transform(wide), 2, axis=1), narrow.transform(raw))
        assert (with_mask.transform(wide)[:, 2] == -1e9).all()
    with pytest.raises(ValueError, match="all new classes are masked"):
        posthoc.BiasLayer(old=6).fit(np.insert(raw, 6, -1e9, axis=1), labels)


def test_weight_aligning_by_hand():
    weight = np.array([[3.0, 4.0], [0.0, 5.0], [6.0, 8.0], [0.0, 30.0]])  # norms 5, 5; 10, 30
    logits, bias = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([0.0, 0.0, 1.0, -1.0])
    aligned = posthoc.WeightAligning(weight, bias, old=2).fit(logits)
    assert aligned.gamma_ == 0.25
    # 0.25 w.x + b = 0.25 (z - b) + b
    np.testing.assert_allclose(aligned.transform(logits), [[1.0, 2.0, 0.25 * 2 + 1, 0.25 * 5 - 1]])
    assert posthoc.WeightAligning(weight, old=2, norm=1).fit(logits).gamma_ == pytest.approx(6 / 22)
    small = posthoc.WeightAligning(weight / np.array([[1], [1], [10], [10]]), old=2)
    assert small.fit(logits).gamma_ == pytest.approx(2.5)
    assert small.set_params(clamp=True).fit(logits).gamma_ == 1
    experts = posthoc.WeightAligning(np.stack([weight, 3 * weight]), old=2).fit(logits)
    assert experts.gamma_ == pytest.approx(0.25)
    for bad, message in [({"old": 0}, "old = 0"), ({"old": 4}, "old = 4"), ({"norm": 3}, "norm = 3")]:
        with pytest.raises(ValueError, match=message):
            posthoc.WeightAligning(weight, **{"old": 2, **bad}).fit(logits)
    with pytest.raises(ValueError, match="expected"):
        posthoc.WeightAligning(weight[:3], old=2).fit(logits)


def test_the_teacher_has_the_correction_of_the_read_out():
    rng = np.random.default_rng(3)
    weight_ECD, bias_EC = rng.normal(size=(2, 6, 4)), rng.normal(size=(2, 6))
    _, raw, labels = biased(rng)
    given_ = {"weight_ECD": weight_ECD, "bias_EC": bias_EC, "logits_NC": raw, "labels_N": labels}
    for name in teaching.WEIGHTS:
        scale_C, shift_C = teaching.correction(name, 4, **given_)
        expected = readouts.weight_aligning(name, 4, weight_ECD, bias_EC)
        np.testing.assert_allclose(scale_C, expected.scale_)
        np.testing.assert_allclose(shift_C, expected.shift_)
    scale_C, shift_C = teaching.correction("bias_layer", 4, **given_)
    layer = posthoc.BiasLayer(old=4, l2=teaching.L2).fit(raw, labels)
    np.testing.assert_allclose(scale_C * raw + shift_C, layer.transform(raw))
    assert teaching.correction("raw", 4, **given_)[0].tolist() == [1] * 6


def test_the_nearest_mean_by_hand():
    features = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    nearest = posthoc.NearestMean().fit(features, np.array([0, 0, 1]))
    half = (np.array([1, 0]) + np.array([1, 1]) / np.sqrt(2)) / 2  # the mean of unit vectors, made one itself
    np.testing.assert_allclose(nearest.means_, [half / np.linalg.norm(half), [0, 1]])
    np.testing.assert_allclose(
        nearest.decision_function([[0.0, 5.0]]), [[-np.sum((nearest.means_[0] - [0, 1]) ** 2), 0.0]], atol=1e-12
    )
    assert nearest.predict([[9.0, 1.0], [1.0, 9.0]]).tolist() == [0, 1]
    with pytest.raises(ValueError, match="needs a sample of every class"):
        posthoc.NearestMean().fit(features, np.array([0, 0, 2]))


def predictions(path, rng, changes=0.0):
    """A predictions.npz of two steps, four classes and then two, with a bias to the new ones."""
    names = np.array([*"abcdef"])
    made = {
        "ends": np.array([4, 6]),
        "order": np.arange(6),
        "class_names": names,
        "sizes": np.array("[]"),
        "provenance": np.array("[]"),
    }
    for step, classes in enumerate((4, 6)):
        for name in ("train", "memory", "held_out", "test"):
            _, raw, labels = biased(rng, 4, 6, 400, beta=1.0, gamma=-2.0 * (changes != 1))
            keep = labels < classes
            made[f"0{step}_{name}_logits"] = raw[keep][:, :classes]
            made[f"0{step}_{name}_labels"] = labels[keep]
            made[f"0{step}_{name}_features"] = np.eye(6)[labels[keep]] + rng.normal(size=(keep.sum(), 6)) * 0.3
        made[f"0{step}_weight"], made[f"0{step}_bias"] = np.ones((1, classes, 3)), np.zeros((1, classes))
    return str(files.save_arrays(path, **made))


def test_energy_aligning_removes_a_known_bias_and_what_changes_nothing_is_noticed(tmp_path):
    found = measures.measure(predictions(tmp_path / "p.npz", np.random.default_rng(0)), SETTINGS)
    of = found.summary["readouts"]
    for name in ("energy_old_new_on_held_out", "energy_class_on_memory", "bias_layer", readouts.CHOSEN):
        assert of[name]["last"] > of["none"]["last"] + 0.05 and of[name]["last_changed"] > 0.1
        assert of[name]["last_gain"] == pytest.approx(of[name]["last"] - of["none"]["last"])
    shift = found.summary["corrections"][1]["energy_old_new_on_held_out"]["shift_new_minus_old"]
    assert shift == pytest.approx(-2, abs=0.35)
    gap = {row["readout"]: row["old"] - row["new"] for row in found.energies if row["set"] == "test"}
    assert abs(gap["energy_old_new_on_held_out"]) < 0.3 < gap["none"]
    assert of["weight_aligning"]["last_changed"] == 0  # all rows have one norm
    line = outcomes.Line("t", "weight_aligning", 1, {key: (0.5, None) for key in outcomes.MEASURES}, (0, 0, 0), False)
    assert line.cells()[-1] == "changes no prediction"


def test_a_step_chooses_by_what_was_there_up_to_it(tmp_path):
    rng, arrays = np.random.default_rng(6), {"ends": np.array([2, 4, 6]), "class_names": np.array([*"abcdef"])}
    arrays |= {"order": np.arange(6), "sizes": np.array("[]"), "provenance": np.array("[]")}
    biases = np.array([[0, 0, 0, 0, 0, 0], [0, 0, 1.5, 1.5, 0, 0], [0, 3, 0, 2, -2, 1]])  # of old and new, then of each
    for step, classes in enumerate((2, 4, 6)):
        for name in ("train", "memory", "held_out", "test"):
            _, raw, labels = biased(rng, 4, 6, 600, beta=1.0, gamma=0.0)
            keep = labels < classes
            arrays[f"0{step}_{name}_logits"] = (raw[keep] + biases[step])[:, :classes]
            arrays[f"0{step}_{name}_labels"] = labels[keep]
            arrays[f"0{step}_{name}_features"] = np.eye(6)[labels[keep]]
        arrays[f"0{step}_weight"], arrays[f"0{step}_bias"] = np.ones((1, classes, 3)), np.zeros((1, classes))
    found = measures.measure(str(files.save_arrays(tmp_path / "p.npz", **arrays)), SETTINGS)
    accuracies = {}
    for seen in [*readouts.read(arrays)][1:]:
        for name, made in readouts.corrections(seen, SETTINGS).items():
            if name.startswith("energy_"):
                value = readouts.held_out_accuracy(seen, name, made, SETTINGS)
                accuracies.setdefault(name, []).append(value)
    at_once = max(accuracies, key=lambda name: accuracies[name][0])  # the first of equals
    in_all = max(accuracies, key=lambda name: sum(accuracies[name]))
    assert found.summary["energy_chosen"] == [None, at_once, in_all] and at_once != in_all
    of = {(row["step"], row["readout"]): row["accuracy"] for row in found.steps}
    assert of[1, readouts.CHOSEN] == of[1, at_once] and of[2, readouts.CHOSEN] == of[2, in_all]
    assert of[1, at_once] != of[1, in_all]


def test_what_a_step_cannot_be_fitted_on_is_not_chosen(tmp_path):
    """A memory that shrinks to nothing: held-out images of the first steps alone."""
    arrays = files.load_arrays(predictions(tmp_path / "p.npz", np.random.default_rng(6)))
    steps = [(seen, readouts.corrections(seen, SETTINGS)) for seen in readouts.read(arrays)]
    seen, fitted = steps[1]
    without = {name: made for name, made in fitted.items() if not name.endswith("_on_held_out")}
    bare = dataclasses.replace(seen, logits={key: value for key, value in seen.logits.items() if key != "held_out"})
    candidates = readouts.chosen([*steps, (bare, without)], SETTINGS)
    assert candidates[1] and {name for name in candidates[1] if name in without} == candidates[2].keys()


def test_the_choice_of_energy_aligning_never_sees_test_labels(tmp_path):
    path = predictions(tmp_path / "p.npz", np.random.default_rng(1))
    before = measures.measure(path, SETTINGS).summary
    arrays = files.load_arrays(path)
    for step in (0, 1):
        arrays[f"0{step}_test_labels"] = arrays[f"0{step}_test_labels"][::-1].copy()
        arrays[f"0{step}_test_logits"] = -arrays[f"0{step}_test_logits"]
    files.save_arrays(path, **arrays)
    after = measures.measure(path, SETTINGS).summary
    assert before["energy_candidates"] == after["energy_candidates"] and before["corrections"] == after["corrections"]
    assert before["readouts"]["none"]["last"] != after["readouts"]["none"]["last"]
    # what a report says was chosen is what was, though a summary lists candidates by name
    first, _ = report.best_first(dict(sorted(after["energy_candidates"].items())))[0]
    assert after["readouts"][first] == after["readouts"][readouts.CHOSEN] and first != min(after["energy_candidates"])
    # on held-out images the candidates that were fitted there are scored by cross-fitting
    _, seen = readouts.read(files.load_arrays(path))
    fitted = readouts.aligning(seen, "class", SETTINGS["energy_aligning"]).fit(
        seen.logits["held_out"], seen.labels["held_out"]
    )
    crossed = readouts.held_out_accuracy(seen, "energy_class_on_held_out", fitted, SETTINGS)
    itself = float((fitted.predict(seen.logits["held_out"]) == seen.labels["held_out"]).mean())
    assert crossed != itself


def test_averages_and_forgetting_by_hand():
    found = measures.over_steps([0.9, 0.6, 0.3], [2, 4, 10])
    assert found["average"] == pytest.approx(0.6) and found["average_later"] == pytest.approx(0.45)
    assert found["average_weighted"] == pytest.approx((1.8 + 2.4 + 3.0) / 16) and found["last"] == 0.3
    by_group = {(0, 0): 0.9, (1, 0): 0.95, (2, 0): 0.5, (1, 1): 0.8, (2, 1): 0.6, (2, 2): 0.9}
    assert measures.forgetting(by_group, 3) == pytest.approx((0.45 + 0.2) / 2)


def test_intervals_are_over_images_and_seeds():
    mean, low, high = outcomes.interval([0.04], [0.01])
    assert (mean, low, high) == pytest.approx((0.04, 0.04 - 0.0196, 0.04 + 0.0196))
    mean, low, high = outcomes.interval([0.03, 0.05], [1e-9, 1e-9])  # seeds alone: Student's t with one degree
    assert (high - low) / 2 == pytest.approx(12.706 * 0.01, rel=1e-3) and mean == pytest.approx(0.04)


def outcome(training, order, seed, last, gain=0.1):
    """A finished chain as reports read it: accuracies after the last of two steps, of 200 test images."""
    values = {key: last for key in outcomes.MEASURES} | {"last_gain": 0.0, "last_gain_se": 0.0, "last_changed": 0.0}
    corrected = values | {"last": last + gain, "last_gain": gain, "last_gain_se": 0.02, "last_changed": 0.3}
    confusion = [{"readout": "none", "step": "1", "images": "100"}] * 2
    confusion += [{"readout": "none", "step": "0", "images": "100"}, {"readout": outcomes.CHOSEN, "step": "1"}]
    summary = {"ends": [1, 2], "readouts": {"none": values, outcomes.CHOSEN: corrected}}
    return outcomes.Chain(chains.Cell("x", "d", order, "p", "r", training, seed), summary, [], [], [], confusion)


def test_trainings_are_compared_in_pairs_of_seeds_and_of_orders():
    one = [outcome("a", "o", seed, last) for seed, last in (("1", 0.5), ("2", 0.54), ("3", 0.9))]
    other = [outcome("b", "o", seed, last) for seed, last in (("1", 0.4), ("2", 0.48))]
    count, (mean, low, high) = outcomes.difference(one, other, ("none", "none"))
    assert count == 2 and mean == pytest.approx(0.08)  # the third has no partner
    images = np.mean([(0.5 * 0.5 + 0.4 * 0.6) / 200, (0.54 * 0.46 + 0.48 * 0.52) / 200])
    seeds = np.var([0.1, 0.06], ddof=1) / 2
    half = stats.t.ppf(0.975, (images + seeds) ** 2 / seeds**2) * np.sqrt(images + seeds)  # Welch and Satterthwaite
    assert (low, high) == pytest.approx((mean - half, mean + half))
    assert outcomes.difference(one, other, (outcomes.CHOSEN, "none"))[1][0] == pytest.approx(0.18)
    assert outcomes.difference(one[2:], other, ("none", "none")) == (0, None)
    bare = outcome("b", "o", "2", 0.48)  # nothing could be chosen there: no held-out memory
    del bare.summary["readouts"][outcomes.CHOSEN]
    assert outcomes.difference(one, [other[0], bare], (outcomes.CHOSEN, outcomes.CHOSEN))[0] == 1
    itself = outcomes.difference(one, one, ("none", "none"))[1]
    assert itself[0] == 0 and itself[1] < 0 < itself[2]


def test_over_class_orders_seeds_of_one_order_are_averaged():
    mine = [outcome("t", *place, last, gain) for place, last, gain in (
        (("o", "1"), 0.5, 0.1), (("o", "2"), 0.6, 0.2), (("p", "1"), 0.3, 0.05)
    )]  # fmt: skip
    raw, chosen = outcomes.lines(mine, "t", "order")
    assert raw.count == chosen.count == 2 and raw.measures["last"][0] == pytest.approx((0.55 + 0.3) / 2)
    assert chosen.gain == pytest.approx(outcomes.interval([0.15, 0.05], [0.02, 0.02]))
    assert outcomes.lines(mine, "t")[0].count == 2 and outcomes.lines([mine[0]], "t")[0].measures["last"] == (0.5, None)
    plan = PLAN | {"orders": ["o", "p"], "trainings": ["t", "u"], "seeds": ["1", "2"]}
    (section,) = report.over_orders(plan, [*mine, outcome("u", "o", "1", 0.9)])  # u ran in one order alone
    assert section.name == "d · p · r, over class orders" and [row[0] for row in section.table.lines] == ["t"]
    assert section.table.lines[0][1] == "2" and "sample standard deviation over class orders" in section.table.note
    assert report.over_orders(plan, mine[:2]) == []
    (section,) = report.over_orders(plan, [*mine, outcome("u", "o", "1", 0.4), outcome("u", "p", "1", 0.2)])
    (table,) = section.parts[1].tables
    ((name, count, raw, both),) = table.lines
    assert (name, count) == ("u", "2") and raw.startswith("-10.0 [") and both.startswith("-7.5 [")


PLAN = {"datasets": ["d"], "orders": ["o"], "protocols": ["p"], "recipes": ["r"], "trainings": ["t"], "seeds": [0, 1]}


def results(chain, root):
    """The result files of the small chain, as the first cell of PLAN."""
    found = measures.measure(str(chain / "out/predictions.npz"), SETTINGS)
    folder = root / chains.Cell("x", "d", "o", "p", "r", "t", "0").results
    files.write_json(folder / "summary.json", found.summary)
    for name in ("steps", "groups", "confusion", "energies"):
        files.write_csv(folder / f"{name}.csv", getattr(found, name), getattr(measures, name.upper()))
    files.write_text(folder / "history.csv", (chain / "out/history.csv").read_text())
    return found


def test_how_many_images_a_step_trains_on_is_said_of_each_training():
    """Without replay there are fewer: a page said of all what is true of its first training."""

    def chain(training, train_images):
        sizes = [{"memory_after": 4, "memory_budget": 4, "held_out_images": 1, "train_images": n} for n in train_images]
        summary = {
            "sizes": sizes, "order": [1, 0], "classes": 2, "order_sha256": "x", "names_sha256": "y", "ends": [1, 2],
            "energy_candidates": {},
        }  # fmt: skip
        return SimpleNamespace(summary=summary, cell=SimpleNamespace(order="o", training=training, seed="0"))

    plain, other = [chain(name, images) for name, images in (("finetune", (9, 9)), ("replay", (9, 13)))]
    assert "Trained on: 9, 9; held out" in report.facts([plain, plain])[1]
    both = report.facts([plain, other, chain("distilled", (9, 13))])[1]
    assert "Trained on: 9, 9 (finetune); 9, 13 (replay, distilled); held out of all training" in both


def test_a_report_of_a_chain_says_what_it_rests_on(chain, tmp_path):
    found = results(chain, tmp_path)
    cells = tmp_path / "results/x/cells"
    published = files.write_text(
        tmp_path / "published.csv",
        "dataset,protocols,method,classifier,average,last,network,memory,order,source\n"
        "d,p q,WA,CNN,0.5,,ResNet-32,24 in total,o,somewhere\nd,q,no,CNN,0.9,,N,1,o,elsewhere\n"
        'd,p,BiC,"CNN, top-5",0.6,,ResNet-18,20 a class,three,there\n',
    )
    report.write("x", PLAN, cells_dir=cells, published=published, out_dir=tmp_path / "out")
    text = (tmp_path / "out/table.md").read_text()
    assert protocol.order_hash(np.array(small_chain.ORDER["listed"])) in text
    names = "\n".join(f"class {label}" for label in range(6))
    assert hashlib.sha256(names.encode()).hexdigest() in text
    assert "24 of 24, 24 of 24, 24 of 24" in text and "elsewhere" not in text
    assert "| WA | CNN | 50.0 | - | ResNet-32 | 24 in total | o | all of the memory trained on | somewhere |" in text
    assert "| ResNet-18 | 20 a class | three | memory, order, top-5 | there |" in text
    assert "1 of 2 cells have run; `longtail status x` says which are to come." in text
    assert "settled for these networks, one seed" in text
    raw = found.summary["readouts"]["none"]
    assert f"| t | as trained | 1 | {100 * raw['average']:.1f} |" in text
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<img") == 6 and 'alt="t: ' in page
    with pytest.raises(ValueError, match="none of the plan's 2 cells has run"):
        report.write("x", PLAN, cells_dir=tmp_path / "no", published=published, out_dir=tmp_path / "out")


@pytest.mark.slow
def test_mlflow_has_a_run_for_each_chain_and_read_out_once(chain, tmp_path, monkeypatch):
    found = results(chain, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    cell = chains.Cell("x", "d", "o", "p", "r", "t", "0")
    outs = [{"path": f"{cell.results}/{name}"} for name in ("summary.json", "steps.csv", "history.csv")]

    def lock(code="a", model="m", of="m"):
        for out in outs:
            out["md5"] = hashlib.md5((tmp_path / out["path"]).read_bytes()).hexdigest()
        entry = {"cmd": "python", "params": {"params.yaml": {"incremental.trainings.t": {"loss": "ce"}}}}
        stages = {f"{stage}-x@{cell.name}": dict(entry) for stage in chains.STAGES}
        stages[f"train-x@{cell.name}"] = entry | {"outs": [{"path": "model", "md5": model}]}
        read = [{"path": "stages/code/incremental_predict.txt", "md5": code}, {"path": "model", "md5": of}]
        stages[f"predict-x@{cell.name}"] = entry | {"deps": read}
        stages[f"readout-x@{cell.name}"]["outs"] = outs
        files.write_text(tmp_path / "stages/x/dvc.lock", yaml.safe_dump({"schema": "2.0", "stages": stages}))

    lock()
    assert tracking.sync(tmp_path, {"x": PLAN})[0] == {"created": 1, "unchanged": 0, "superseded": 0}
    assert tracking.sync(tmp_path, {"x": PLAN})[0] == {"created": 0, "unchanged": 1, "superseded": 0}
    with open_store(tmp_path) as store:
        runs = store.runs()
        (parent,) = [run for run in runs if run.data.tags["longtail.kind"] == "chain"]
        nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert {run.data.tags["longtail.readout"] for run in nested} == set(found.summary["readouts"])
        assert parent.data.params["trainings.loss"] == "ce"
        (raw,) = [run for run in nested if run.data.tags["longtail.readout"] == "none"]
        points = store.client.get_metric_history(raw.info.run_id, "accuracy/all")
        shown = {point.step: pytest.approx(point.value, abs=1e-6) for point in points}
        assert shown == {row["step"]: row["accuracy"] for row in found.steps if row["readout"] == "none"}
        assert raw.data.metrics["over steps/last"] == pytest.approx(found.summary["readouts"]["none"]["last"], abs=1e-6)
    summary = files.read_json(tmp_path / outs[0]["path"])
    files.write_json(tmp_path / outs[0]["path"], summary | {"again": 1})
    counts, notes = tracking.sync(tmp_path, {"x": PLAN})
    assert not any(counts.values()) and "summary.json is not the one in the lock" in notes[0]
    lock()
    assert tracking.sync(tmp_path, {"x": PLAN})[0]["created"] == 1
    assert tracking.sync(tmp_path, {"x": PLAN})[0] == {"created": 0, "unchanged": 1, "superseded": 0}
    lock(code="adopted")  # other code that does the same makes no other run
    assert tracking.sync(tmp_path, {"x": PLAN})[0] == {"created": 0, "unchanged": 1, "superseded": 0}
    lock(model="trained anew", of="m")  # killed before its logits were made again
    counts, notes = tracking.sync(tmp_path, {"x": PLAN})
    assert not any(counts.values()) and "a stage is from before the last change of model" in notes[0]
    lock(model="n", of="n")
    assert tracking.sync(tmp_path, {"x": PLAN})[0]["created"] == 1

    def current():
        with open_store(tmp_path) as store:
            return [run for run in store.runs() if run.data.tags.get("longtail.current") == "yes"]

    (whole,) = [run for run in current() if run.data.tags["longtail.kind"] == "chain"]
    with open_store(tmp_path) as store:  # as if it had been cut off before the last key
        store.client.delete_tag(whole.info.run_id, "longtail.key")
    assert tracking.sync(tmp_path, {"x": PLAN})[0]["created"] == 1
    assert len([run for run in current() if run.data.tags["longtail.kind"] == "chain"]) == 1
    tracking.sync(tmp_path, {"x": PLAN | {"seeds": [1]}})  # it has left the plan
    assert not current()


# --- the pipeline -----------------------------------------------------------------------------------------------------


def test_a_changed_correction_retrains_nothing_and_another_order_its_own_chain_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    for plan, axes in chains.plans(PARAMS).items():
        for cell in chains.of_plan(plan, axes):
            keys = {}
            for stage in chains.STAGES:
                declared = declaration.read(cell.address(stage))
                assert declared is not None
                keys[stage] = declared[2]
            own = {"orders": cell.order, "protocols": cell.protocol, "trainings": cell.training}
            place = sorted(f"incremental.{section}.{name}" for section, name in own.items())
            assert keys["predict"] == place
            assert keys["train"] == sorted([*place, f"incremental.recipes.{cell.recipe}"])
            assert keys["readout"] == ["incremental.readouts"]


def test_cells_are_found_by_their_names():
    cell = chains.Cell.parse("p", "d-o-pr-r-t-3")
    assert (cell.training, cell.seed, cell.runs) == ("t", "3", "runs/p/d/o/pr/r/t/3")
    with pytest.raises(ValueError, match="is no cell"):
        chains.Cell.parse("p", "d-r-m-0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plans": {"q": {"datasets": ["no"]}}}, "not in datasets"),
        ({"orders": {"seed_1993": {"numpy_seed": 1, "listed": [0, 1]}}}, "not both"),
        ({"orders": {"as_numbered": {"shuffles_before": [1, 2]}}}, "with a numpy_seed"),
        ({"protocols": {"b0_10": {"memory_rule": "some"}}}, "memory_rule"),
        ({"trainings": {"replay": {"loss": "nothing"}}}, "no file src/longtail/losses/nothing.py"),
        ({"trainings": {"replay": {"arguments": {"tau": 1.0}}}}, "unknown key"),
        ({"trainings": {"replay": {"arguments": [1]}}}, "replay.arguments = .1.: "),
        ({"trainings": {"replay": {"arguments": "x"}}}, "replay.arguments = 'x': "),
        ({"plans": {"q": {"datasets": ["imagenet_1000"]}}}, "take one with first.network.architecture"),
        ({"plans": {"q": {"recipes": ["imagenet_bic"]}}}, "names an architecture, which only those have"),
        ({"plans": {"q": {"datasets": ["imagenet_1000", "digits_all"]}}}, "imagenet_1000 of `streams`, the others not"),
        ({"recipes": {"imagenet_bic": {"body": "option_a"}}}, "imagenet_bic.body = 'option_a'"),
        ({"trainings": {"replay": {"distillation": "sigmoid"}}}, "goes with loss: bce"),
        ({"trainings": {"replay": {"teacher": "bias_layer"}}}, "no effect without distillation"),
        ({"recipes": {"digits": {"first": {"weight_average": 0.9}}}}, "weight_average must be 0"),
        ({"recipes": {"digits": {"first": {"network": {"width": 4}}, "body": "preactivation"}}}, "width: 4; with body"),
        (
            {"recipes": {"digits": {"first": {"network": {"shared_groups": 2}}, "body": "preactivation"}}},
            "shared_groups: with",
        ),
        (
            {"recipes": {"survey": {"first": {"resolution": {"milestones": [190], "scales": [0.5]}}}}},
            "first.resolution goes on after the last of later's 170",
        ),
        ({"readouts": {"energy_aligning": {"reading": "none"}}}, "reading"),
    ],
)
def test_params_that_do_not_fit_are_named(change, message):
    value = yaml.safe_load((ROOT / "params.yaml").read_text())
    section = value["incremental"]
    section["plans"]["q"] = json.loads(json.dumps(section["plans"]["incremental-quick"]))

    def merge(into, new):
        for key, item in new.items():
            if isinstance(item, dict) and isinstance(into.get(key), dict):
                merge(into[key], item)
            else:
                into[key] = item

    merge(section, change)
    with pytest.raises(params.ParamsError, match=message):
        params.validate(value)


def test_what_is_pictured_is_what_aligning_surely_changes_most():
    def line(readout, gain):
        return outcomes.Line("t", readout, 2, {key: (0.5, None) for key in outcomes.MEASURES}, gain, True)

    chosen, old_new = line(outcomes.CHOSEN, (14.5, 13.5, 15.4)), line(outcomes.OLD_NEW, (6.9, 6.0, 7.7))
    raw = line("none", None)
    assert outcomes.gain({"none": raw, outcomes.OLD_NEW: old_new, outcomes.CHOSEN: chosen}) == 13.5
    assert outcomes.gain({"none": raw, outcomes.OLD_NEW: old_new}) == 6.0
    assert outcomes.gain({"none": raw}) == 0
