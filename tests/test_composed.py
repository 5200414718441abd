"""The composed loss: a slow twin of every part, the limit in which it is BalPoE, and what a part must not do."""

import importlib.util
import math

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from small_training import METHODS, train
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

    kinds = [last(), last(teach=1.0), last(focus=0.5), last(consensus=0.1), last(teach=1.0, teach_at=1.0)]
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


def test_one_expert_has_no_teacher() -> None:
    z_EBC, labels_B = case(experts=1)
    assert torch.equal(*(composed(teach=t, taus=[1.0])(z_EBC, labels_B) for t in (0.0, 3.0)))


def test_accuracy_of_late_by_hand() -> None:
    """One image right, then one wrong, of class 2; the other classes have seen nothing."""
    loss = composed(focus=0.5, taus=[1.0])
    right_EBC = torch.tensor([[[0.0, 0.0, 5.0, 0.0, 0.0]]])
    loss(right_EBC, torch.tensor([2]))
    loss.after_step()
    assert loss.accuracy_C.tolist() == pytest.approx([0, 0, 1 / 50, 0, 0])
    loss(right_EBC.roll(1, 2), torch.tensor([2]))
    loss.after_step()
    assert loss.accuracy_C.tolist() == pytest.approx([0, 0, 49 / 2500, 0, 0])
    weights_C = loss.class_weights()
    assert (COUNTS_C / COUNTS_C.sum() * weights_C).sum().item() == pytest.approx(1)
    assert (weights_C[2] / weights_C[0]).item() == pytest.approx((1 - 49 / 2500) ** 0.5)


def test_mixed_images_count_by_their_weight() -> None:
    whole, parts = (composed(focus=0.5) for _ in range(2))
    z_EBC, labels_B = case()
    whole(z_EBC, labels_B)
    parts(z_EBC, labels_B, 0.3)
    parts(z_EBC, labels_B, 0.7)
    whole.after_step(), parts.after_step()
    torch.testing.assert_close(whole.accuracy_C, parts.accuracy_C)


def test_accuracy_is_in_a_checkpoint() -> None:
    loss, other = composed(focus=0.5), composed(focus=0.5)
    loss(*case())
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


# The screen


def design() -> tuple[dict, np.ndarray]:
    """The blocks of the plan `composing`, and which parts each has."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    blocks = {name: params["methods"][name] for name in params["plans"]["composing"]["methods"]}
    return blocks, np.array([[part(block) for part in EFFECTS.PARTS.values()] for block in blocks.values()], float)


def test_the_screen_is_plackett_and_burman_s() -> None:
    """Every part is on in six runs, any two in three; what is on is the same everywhere, and one run is BalPoE."""
    blocks, on = design()
    signs = 2 * on - 1
    assert len(blocks) == 12 and np.array_equal(signs.T @ signs, 12 * np.eye(5)) and not signs.sum(0).any()
    for name in ("teach", "focus", "consensus", "margin"):
        assert len({block[name] for block in blocks.values()}) == 2
    assert sum(not row.any() for row in on) == 1


def test_effects_are_found_where_they_are() -> None:
    _, on = design()
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
    blocks, on = design()
    right = dict.fromkeys(("accuracy", "many", "medium", "few"), 0.5)
    results = {
        name: {"raw": right | {"few": 0.3 + 0.02 * row[1]}, "aligned_on_train": right}
        for name, row in zip(blocks, on, strict=True)
    }
    lines = EFFECTS.table(blocks, results).splitlines()
    assert lines[3] == "| teach | +0.0 | +0.0 | +0.0 | +2.0 | +0.0 |"
    assert lines[-1] == "| standard error of each | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |"


def test_a_screen_with_a_cell_missing_is_named(tmp_path) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"fast/screen_01/1/metrics\.json is missing; longtail run composing"):
        EFFECTS.read(tmp_path)


def test_the_page_has_the_table_of_what_is_committed() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    page = (ROOT / "docs/composed.md").read_text(encoding="utf-8")
    assert EFFECTS.table(params["methods"], EFFECTS.read(ROOT)) in page


def test_the_runs_of_the_screen_are_called_what_they_are() -> None:
    blocks, on = design()
    for name, row in zip(blocks, on, strict=True):
        parts = " ".join(part for part, there in zip(EFFECTS.PARTS, row, strict=True) if there)
        short = parts.replace("narrow τ", "τ").replace("consensus", "cons")
        assert answers.METHODS[name] == (f"+ {short}" if short else "BalPoE alone")
        assert len(answers.METHODS[name]) <= 24  # or it covers the curves of a picture
