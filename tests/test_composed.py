"""The composed loss: a slow twin of every part, the limit in which it is BalPoE, and what a part must not do."""

import copy
import importlib.util
import math
from itertools import product

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from small_training import METHODS, split, train
from torch import Tensor

from longtail import losses
from longtail.report import answers

SPEC = importlib.util.spec_from_file_location("effects", ROOT / "docs/effects.py")
assert SPEC is not None and SPEC.loader is not None
EFFECTS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(EFFECTS)

COUNTS_C = torch.tensor([60, 25, 9, 3, 1])
TAUS = [0.0, 1.0, 2.0]
NOTHING = {
    "taus": TAUS, "teach": 0.0, "teach_at": 0.0, "temperature": 1.0, "only_right": True, "focus": 0.0,
    "consensus": 0.0, "margin": 0.0, "margin_power": 0.25,
}  # fmt: skip
SCALE = 12.0


def composed(**changes: object) -> losses.BaseLoss:
    loss = losses.load("composed")(COUNTS_C, **NOTHING | changes)
    loss.scale = SCALE
    return loss


def case(seed: int = 0, batch: int = 40, experts: int = 3) -> tuple[Tensor, Tensor]:
    """Logits of a cosine head, some of them right, some that all experts have wrong alike."""
    generator = torch.Generator().manual_seed(seed)
    labels_B = torch.randint(len(COUNTS_C), (batch,), generator=generator)
    shared_BC = torch.randn(batch, len(COUNTS_C), generator=generator)
    shared_BC[torch.arange(batch), labels_B] += 1
    noise_EBC = torch.randn(experts, batch, len(COUNTS_C), generator=generator)
    return (SCALE * torch.tanh((shared_BC + noise_EBC) / 4)).double(), labels_B


def softmax(z: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in z)
    return [math.exp(value) / total for value in z]


def twin(z_EBC: Tensor, labels_B: Tensor, settings: dict, accuracy: list[float] | None = None) -> float:
    """The formulas of the docstring, image by image, in plain numbers."""
    n, taus, T = COUNTS_C.tolist(), settings["taus"], settings["temperature"]
    log_prior = [math.log(count / sum(n)) for count in n]
    E, C, total = len(taus), len(n), 0.0
    a = accuracy or [0.0] * C
    raw = [(1 - value) ** settings["focus"] for value in a]
    mean = sum(count * value for count, value in zip(n, raw, strict=True)) / sum(n)
    for b, y in enumerate(labels_B.tolist()):
        z = [z_EBC[e, b].tolist() for e in range(E)]
        u = [[z[e][c] + (taus[e] - 1 + settings["teach_at"]) * log_prior[c] for c in range(C)] for e in range(E)]
        value = 0.0
        for e in range(E):
            trained = [z[e][c] + taus[e] * log_prior[c] for c in range(C)]
            angle = math.acos(z[e][y] / SCALE)
            margin = settings["margin"] * (min(n) / n[y]) ** settings["margin_power"]
            if max(range(C), key=lambda c, of=trained: of[c]) != y:
                margin *= 1 + (1 - math.cos(angle)) / 2
            trained[y] = SCALE * math.cos(angle + margin) + taus[e] * log_prior[y]
            value -= math.log(softmax(trained)[y]) / E
            for t in range(E):
                p, q = softmax([one / T for one in u[t]]), softmax([one / T for one in u[e]])
                right = max(range(C), key=lambda c, of=p: of[c]) == y
                if t != e and (right or not settings["only_right"]):
                    apart = sum(p[c] * math.log(p[c] / q[c]) for c in range(C))
                    value += settings["teach"] * T**2 * apart / (E * (E - 1))
        tops = {max(range(C), key=lambda c, of=of: of[c]) for of in u}
        if len(tops) == 1 and y not in tops:
            (j,) = tops
            for e in range(E):
                others = [u[e][k] for k in range(C) if k not in (j, y)]
                value += settings["consensus"] * (u[e][j] - sum(others) / len(others)) / E
        total += value * raw[y] / mean / len(labels_B)
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"teach": 0.7},
        {"teach": 0.7, "only_right": False, "temperature": 2.0},
        {"teach": 1.0, "teach_at": 1.0},
        {"consensus": 0.3},
        {"margin": 0.2},
        {"margin": 0.1, "margin_power": 1.0},
        {"focus": 0.5},
        {"teach": 0.5, "consensus": 0.1, "margin": 0.1, "focus": 0.5, "taus": [0.9, 1.0, 1.1]},
        {"teach": 0.5, "taus": [-1.0, 0.0, 1.0, 2.0, 3.0], "consensus": 0.1},
    ],
)
def test_it_is_its_twin(changes: dict) -> None:
    settings = NOTHING | changes
    z_EBC, labels_B = case(experts=len(settings["taus"]))
    loss = composed(**changes).eval().double()
    accuracy = [0.9, 0.8, 0.5, 0.2, 0.0]
    loss.accuracy_C.copy_(torch.tensor(accuracy))
    assert loss(z_EBC, labels_B).item() == pytest.approx(twin(z_EBC, labels_B, settings, accuracy), rel=1e-5)


def test_the_case_has_all_that_can_happen() -> None:
    z_EBC, labels_B = case()
    right_EB = composed().double().common_E1C + z_EBC
    top_EB = right_EB.argmax(2)
    alike_B = (top_EB == top_EB[0]).all(0)
    assert (alike_B & (top_EB[0] != labels_B)).any() and (alike_B & (top_EB[0] == labels_B)).any() and not alike_B.all()


def test_without_additions_it_is_balpoe_to_the_byte() -> None:
    z_EBC, labels_B = case()
    balpoe, alone = losses.load("balpoe")(COUNTS_C, taus=TAUS), composed()
    pairs = [z_EBC.float().clone().requires_grad_() for _ in range(2)]
    values = [loss(z, labels_B, 0.7) for loss, z in zip((balpoe, alone), pairs, strict=True)]
    gradients = [torch.autograd.grad(value, z)[0] for value, z in zip(values, pairs, strict=True)]
    assert torch.equal(*values) and torch.equal(*gradients)


def test_trained_without_additions_it_is_balpoe_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "composed", NOTHING | {"taus": METHODS["balpoe"]["taus"]})
    assert train("composed").last == train("balpoe").last


def test_what_is_on_decides_what_a_training_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def last(**changes: float) -> bytes:
        monkeypatch.setitem(METHODS, "composed", NOTHING | {"taus": [0.0, 2.0]} | changes)
        return train("composed").last

    kinds = [last(**one) for one in ({}, {"teach": 1.0}, {"focus": 0.5}, {"consensus": 0.1}, {"recall": 1.0})]
    kinds.append(last(teach=1.0, teach_at=1.0))
    assert len(set(kinds)) == len(kinds)
    assert last(teach=1.0, focus=0.5) == last(teach=1.0, focus=0.5)


def gradient(loss: losses.BaseLoss, z_EBC: Tensor, labels_B: Tensor) -> Tensor:
    z_EBC = z_EBC.clone().requires_grad_()
    found: Tensor = torch.autograd.grad(loss.eval().double()(z_EBC, labels_B), z_EBC)[0]
    return found


@pytest.mark.parametrize("changes", [{"consensus": 0.3}, {"focus": 0.5}, {"margin": 0.2}])
def test_gradients_are_those_of_the_numbers(changes: dict) -> None:
    """Where an image is right the margin has no difficulty, which is taken for a number."""
    z_EBC, labels_B = case(batch=6)
    if "margin" in changes:
        z_EBC[:, torch.arange(6), labels_B] = 0.9 * SCALE
    loss = composed(**changes).eval().double()
    assert torch.autograd.gradcheck(lambda z: loss(z, labels_B), z_EBC.requires_grad_())


def test_a_teacher_is_not_moved_by_its_student() -> None:
    """Only the first expert is right: nothing pulls it, and the others go where it is."""
    labels_B = torch.tensor([2])
    z_EBC = torch.zeros(3, 1, 5).double()
    loss, plain = composed(teach=1.0, taus=[1.0] * 3), composed(taus=[1.0] * 3)
    z_EBC[0, 0, 2], z_EBC[1:, 0, 0] = 4.0, 4.0
    added = gradient(loss, z_EBC, labels_B) - gradient(plain, z_EBC, labels_B)
    torch.testing.assert_close(added[0], torch.zeros(1, 5).double(), rtol=0, atol=1e-12)
    assert (added[1:, 0, 2] < 0).all() and (added[1:, 0, 0] > 0).all()


def test_who_says_the_same_at_the_common_prior_teaches_nothing() -> None:
    """Experts of one posterior under priors that differ: BalPoE's, where all have learnt the same."""
    z_BC, labels_B = (one[0] if one.ndim == 3 else one for one in case(experts=1))
    log_prior_C = (COUNTS_C / COUNTS_C.sum()).double().log()
    z_EBC = torch.stack([z_BC + (1 - tau) * log_prior_C for tau in TAUS])
    for at in (0.0, 1.0, 0.5):
        plain, taught = (composed(teach=t, teach_at=at, only_right=False).double() for t in (0.0, 5.0))
        torch.testing.assert_close(plain(z_EBC, labels_B), taught(z_EBC, labels_B), rtol=1e-6, atol=1e-6)
    same_EBC = z_BC.expand(3, -1, -1)  # who says the same in bare logits does not say the same
    assert composed(teach=5.0).double()(same_EBC, labels_B) > composed().double()(same_EBC, labels_B) + 0.1


def test_two_classes_have_no_consensus() -> None:
    with pytest.raises(ValueError, match=r"consensus = 0\.5 compares wrong classes, of which two classes have one"):
        losses.load("composed")(torch.tensor([3, 2]), **NOTHING | {"consensus": 0.5})


def test_one_expert_has_no_teacher() -> None:
    z_EBC, labels_B = case(experts=1)
    assert torch.equal(*(composed(teach=t, taus=[1.0])(z_EBC, labels_B) for t in (0.0, 3.0)))


def test_accuracy_of_late_by_hand() -> None:
    """One image right, then one wrong, of class 2; the other classes have seen nothing."""
    loss = composed(focus=0.5, taus=[1.0])
    right_EBC = torch.tensor([[[0.0, 0.0, 5.0, 0.0, 0.0]]])
    loss.remember(right_EBC, torch.tensor([2]), torch.tensor([0]))
    loss.after_step()
    assert loss.accuracy_C.tolist() == pytest.approx([0, 0, 1 / 50, 0, 0])
    loss.remember(right_EBC.roll(1, 2), torch.tensor([2]), torch.tensor([0]))
    loss.after_step()
    assert loss.accuracy_C.tolist() == pytest.approx([0, 0, 49 / 2500, 0, 0])
    weights_C = loss.class_weights()
    assert (COUNTS_C / COUNTS_C.sum() * weights_C).sum().item() == pytest.approx(1)
    assert (weights_C[2] / weights_C[0]).item() == pytest.approx((1 - 49 / 2500) ** 0.5)


def test_accuracy_is_in_a_checkpoint() -> None:
    loss, other = composed(focus=0.5), composed(focus=0.5)
    loss.remember(*case(), torch.arange(40))
    loss.after_step()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.class_weights(), loss.class_weights()) and loss.accuracy_C.any()


def test_a_margin_needs_a_cosine_head() -> None:
    loss = losses.load("composed")(COUNTS_C, **NOTHING | {"margin": 0.1})
    with pytest.raises(ValueError, match=r"margin = 0\.1 is an angle: it needs a cosine head"):
        loss(*case())


def test_the_smallest_class_has_the_whole_margin() -> None:
    assert composed(margin=0.1, margin_power=0.5).margin_C.tolist() == pytest.approx(
        [0.1 / 60**0.5, 0.1 / 5, 0.1 / 3, 0.1 / 3**0.5, 0.1]
    )


@pytest.mark.parametrize("size", [SCALE, -SCALE])
def test_angles_of_nothing_and_of_half_a_turn_are_finite(size: float) -> None:
    z_EBC = torch.full((3, 2, 5), size / 2)
    z_EBC[:, :, 1] = size
    value = gradient(composed(margin=0.3), z_EBC.double(), torch.tensor([1, 0]))
    assert value.isfinite().all()


# What was said of an image an epoch ago


def recalling(**changes: object) -> losses.BaseLoss:
    return composed(**{"recall": 0.4, "temperature": 2.0} | changes).double()


def hear(loss: losses.BaseLoss, epoch: int, *steps: tuple[Tensor, Tensor]) -> None:
    """An epoch of logits and the places of their images."""
    loss.start_epoch(epoch, 9)
    for z_EBC, places_B in steps:
        loss.remember(z_EBC, torch.zeros_like(places_B), places_B)  # labels are focus's business
        loss.after_step()


def test_recall_is_its_twin() -> None:
    """Image by image: the mean over experts of u, of the last epoch that showed the image, where that was right."""
    loss, T = recalling(), 2.0
    (first_EBC, labels_B), (second_EBC, _), (now_EBC, _) = (case(seed, batch=30) for seed in (1, 2, 3))
    places_B = torch.arange(30) * 3
    for z_EBC in (first_EBC, second_EBC):
        z_EBC[:, torch.arange(0, 30, 2), labels_B[::2]] = SCALE  # right, every second one at least
    hear(loss, 1, (first_EBC, places_B))
    hear(loss, 2, (second_EBC[:, :17], places_B[:17]))  # the others are not shown
    loss.start_epoch(3, 9)
    total, spoken = 0.0, 0
    common_EBC = loss.common_E1C.double()
    for b, y in enumerate(labels_B.tolist()):
        r = ((second_EBC if b < 17 else first_EBC) + common_EBC)[:, b].mean(0).tolist()
        if max(range(5), key=lambda c, of=r: of[c]) == y:
            p, spoken = softmax([value / T for value in r]), spoken + 1
            for e in range(3):
                q = softmax([value / T for value in (now_EBC + common_EBC)[e, b].tolist()])
                total += 0.4 * T**2 * sum(p[c] * math.log(p[c] / q[c]) for c in range(5)) / 3 / len(labels_B)
    assert 15 <= spoken < 30
    added = loss(now_EBC, labels_B, 1.0, places_B) - composed().double()(now_EBC, labels_B)
    assert added.item() == pytest.approx(total, rel=1e-6)


def test_in_the_first_epoch_there_is_nothing_to_recall() -> None:
    z_EBC, labels_B = case()
    loss, places_B = recalling(), torch.arange(40)
    hear(loss, 1, (z_EBC, places_B))
    torch.testing.assert_close(loss(z_EBC, labels_B, 1.0, places_B), composed().double()(z_EBC, labels_B))


def test_who_says_what_was_said_is_not_moved() -> None:
    """Experts of one posterior, at temperature 1: the recalled part has no slope where it is met."""
    z_BC, labels_B = (one[0] if one.ndim == 3 else one for one in case(experts=1))
    log_prior_C = (COUNTS_C / COUNTS_C.sum()).double().log()
    z_EBC = torch.stack([z_BC + (1 - tau) * log_prior_C for tau in TAUS])
    loss, places_B = recalling(temperature=1.0), torch.arange(40)
    hear(loss, 1, (z_EBC, places_B))
    loss.start_epoch(2, 9)
    z_EBC.requires_grad_()
    slopes = [
        torch.autograd.grad(value, z_EBC)[0]
        for value in (loss(z_EBC, labels_B, 1.0, places_B), composed().double()(z_EBC, labels_B))
    ]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-7)


def test_an_epoch_that_is_taken_up_in_its_middle_goes_on_from_what_it_has_said() -> None:
    parts = [(case(seed, batch=10)[0], torch.arange(10) + 10 * seed) for seed in range(4)]
    whole, broken, taken_up = recalling(), recalling(), recalling()
    for loss in (whole, broken):
        hear(loss, 1, parts[0], parts[1])
    hear(broken, 2, parts[2])
    taken_up.load_state_dict(broken.state_dict())
    hear(taken_up, 2, parts[3])
    hear(whole, 2, parts[2], parts[3])
    for loss in (whole, taken_up):
        loss.start_epoch(3, 9)
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in taken_up.state_dict().items())
    assert taken_up.known_N.sum() == 40


def test_an_image_that_comes_twice_is_remembered_by_the_mean() -> None:
    """As class-balanced sampling draws them."""
    loss, z_EBC = recalling(), case(batch=4)[0]
    hear(loss, 1, (z_EBC[:, :3], torch.tensor([7, 7, 5])), (z_EBC[:, 3:], torch.tensor([7])))
    loss.start_epoch(2, 9)
    common_BC = (z_EBC + loss.common_E1C).mean(0)
    torch.testing.assert_close(loss.said_NC[7], common_BC[[0, 1, 3]].mean(0))
    torch.testing.assert_close(loss.said_NC[5], common_BC[2])
    assert loss.known_N.nonzero().flatten().tolist() == [5, 7]


def test_the_engine_says_which_images_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves of a mixed image, and of which of the two there is more."""
    said: list[tuple[str, Tensor, float]] = []
    kind = losses.load("composed")
    forward, remember, labels = kind.forward, kind.remember, split().labels

    def listen(self: losses.BaseLoss, logits: Tensor, labels_B: Tensor, weight: float, places_B: Tensor) -> Tensor:
        assert torch.equal(labels[places_B], labels_B)
        said.append(("forward", places_B, weight))
        value: Tensor = forward(self, logits, labels_B, weight, places_B)
        return value

    def keep(self: losses.BaseLoss, logits: Tensor, labels_B: Tensor, places_B: Tensor) -> None:
        assert not logits.requires_grad and torch.equal(labels[places_B], labels_B)
        said.append(("remember", places_B, 0.0))
        remember(self, logits, labels_B, places_B)

    monkeypatch.setattr(kind, "forward", listen)
    monkeypatch.setattr(kind, "remember", keep)
    train("composed", epochs=6, batch_size=48)  # a batch an epoch: every image comes once, and once as a partner
    assert [name for name, *_ in said] == ["forward", "forward", "remember"] * 6
    for own, partner, kept in zip(said[::3], said[1::3], said[2::3], strict=True):
        assert own[2] + partner[2] == pytest.approx(1)
        assert sorted(own[1].tolist()) == sorted(partner[1].tolist()) == list(range(48))
        assert not torch.equal(own[1], partner[1])
        assert torch.equal(kept[1], (own if own[2] >= 0.5 else partner)[1])
    assert {own[2] >= 0.5 for own in said[::3]} == {True, False}


@pytest.mark.parametrize("changes", [{"recall": 0.4}, {"focus": 0.5}])
def test_who_does_not_say_which_images_they_are_is_told(changes: dict) -> None:
    z_EBC, labels_B = case()
    with pytest.raises(ValueError, match=r"recall = .* and focus = .*: what is not 0 needs places_B"):
        composed(**changes)(z_EBC, labels_B)
    composed(**changes).eval()(z_EBC, labels_B)
    assert not composed().remembers and not any("_N" in name for name in composed().state_dict())


# The screen


PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def design(plan: str = "composing") -> np.ndarray:
    """Which parts each run of a screen has."""
    return np.array([*EFFECTS.parts(plan, PARAMS).values()], float)


def test_the_screen_is_plackett_and_burman_s() -> None:
    """Every part is on in six runs, any two in three; what is on is the same everywhere, and one run is BalPoE."""
    on, blocks = design(), [PARAMS["methods"][name] for name in PARAMS["plans"]["composing"]["methods"]]
    signs = 2 * on - 1
    assert len(blocks) == 12 and np.array_equal(signs.T @ signs, 12 * np.eye(5)) and not signs.sum(0).any()
    for name in ("teach", "focus", "consensus", "margin"):
        assert len({block[name] for block in blocks}) == 2
    assert sum(not row.any() for row in on) == 1


def test_the_second_screen_has_every_pair_of_a_recipe_and_a_method() -> None:
    """A full factorial; but for its parts, all runs are the same, and half of them recall nothing."""
    on, plan = design("composing-long"), PARAMS["plans"]["composing-long"]
    assert sorted(map(tuple, on)) == sorted(product((0, 1), repeat=3))
    recipes = [copy.deepcopy(PARAMS["recipes"][name]) for name in plan["recipes"]]
    assert {recipe["network"]["shared_groups"] for recipe in recipes} == {2}
    # the average is over as many epochs, whatever the batch
    assert len({round((1 - recipe["weight_average"]) / recipe["batch_size"], 9) for recipe in recipes}) == 1
    for recipe in recipes:
        for name in ("batch_size", "weight_average", "cutmix_alpha"):
            del recipe[name]
        del recipe["optimizer"]["muon_lr"], recipe["optimizer"]["muon_weight_decay"]
    assert all(recipe == recipes[0] for recipe in recipes)
    plain, recalled = (PARAMS["methods"][name] for name in plan["methods"])
    assert {key: value for key, value in recalled.items() if key in plain and key != "loss"} == {"taus": plain["taus"]}
    assert {key for key, value in recalled.items() if value and key not in plain} == {
        "temperature", "only_right", "margin_power", "recall",
    }  # fmt: skip


def test_effects_are_found_where_they_are() -> None:
    on = design()
    truth = np.array([-1.0, 2.0, 0.5, 0.0, 0.25])
    found, error = EFFECTS.effects(50 + on @ truth, on)
    assert found == pytest.approx(truth) and error == pytest.approx(0, abs=1e-9)
    noise = np.random.default_rng(0).normal(size=(2000, 12))
    many = [EFFECTS.effects(50 + on @ truth + one, on) for one in noise]
    spread = np.std([found for found, _ in many], axis=0)
    assert spread == pytest.approx(2 / math.sqrt(12), rel=0.1)  # a difference of two means of six
    assert np.sqrt(np.mean([error**2 for _, error in many])) == pytest.approx(2 / math.sqrt(12), rel=0.05)
    with pytest.raises(ValueError, match="6 runs do not tell 5 parts apart"):
        EFFECTS.effects(np.zeros(6), on[:6])


def test_the_table_of_effects() -> None:
    right = dict.fromkeys(("accuracy", "many", "medium", "few"), 0.5)
    results = {
        run: {"raw": right | {"few": 0.3 + 0.02 * row[1]}, "aligned_on_train": right}
        for run, row in EFFECTS.parts("composing", PARAMS).items()
    }
    lines = EFFECTS.table("composing", PARAMS, results).splitlines()
    assert lines[3] == "| teach | +0.0 | +0.0 | +0.0 | +2.0 | +0.0 |"
    assert lines[-1] == "| standard error of each | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |"


def test_a_screen_with_a_cell_missing_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"fast/screen_01/1/metrics\.json is missing; longtail run composing"):
        EFFECTS.read(tmp_path, "composing", PARAMS)
    with pytest.raises(ValueError, match="quick is no screen; there are composing"):
        EFFECTS.main(["quick"])


def test_a_screen_with_a_cell_missing_is_no_error_among_all(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(EFFECTS, "ROOT", tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    EFFECTS.main([])
    assert [line.partition(":")[0] for line in capsys.readouterr().out.split("\n\n") if line] == [*EFFECTS.SCREENS]
    with pytest.raises(ValueError, match=r"metrics\.json is missing; longtail run composing-long"):
        EFFECTS.main(["composing-long"])


def test_the_page_has_the_table_of_what_is_committed() -> None:
    page = (ROOT / "docs/composed.md").read_text(encoding="utf-8")
    assert EFFECTS.table("composing", PARAMS, EFFECTS.read(ROOT, "composing", PARAMS)) in page


def test_the_runs_of_the_screen_are_called_what_they_are() -> None:
    for (_, name), row in EFFECTS.parts("composing", PARAMS).items():
        parts = " ".join(part for part, there in zip(EFFECTS.SCREENS["composing"], row, strict=True) if there)
        short = parts.replace("narrow τ", "τ").replace("consensus", "cons")
        assert answers.METHODS[name] == (f"+ {short}" if short else "BalPoE alone")
        assert len(answers.METHODS[name]) <= 24  # or it covers the curves of a picture
