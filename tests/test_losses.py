"""Each loss against a slow twin in the paper's notation, its limits, its gradient, and extreme inputs."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtail import losses
from longtail.losses.class_balanced import weights
from longtail.workflow import params

FOLDER = Path(losses.__file__).parent
METHODS = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__init__")
ARGUMENTS = {
    "ce": {},
    "balanced_softmax": {"tau": 1.0},
    "gala": {"variant": "released", "accumulation": "double", "lambda1": 1.0, "lambda2": 1.0},
    "gala_balpoe": {"taus": [0.0, 1.0, 2.0]},
    "balpoe": {"taus": [0.0, 1.0, 2.0]},
    "deferred_balpoe": {"taus": [0.0, 1.0, 2.0], "deferred": 0.0},
    "focal": {"gamma": 2.0},
    "class_balanced": {"beta": 0.9999, "divide_by": "images"},
    "class_balanced_sampling": {},
    "ldam": {"max_margin": 0.5, "deferred": 0.8, "beta": 0.9999},
    "lade": {"alpha": 0.1, "remine_lambda": 0.1},
    "composed": {  # what it adds has its twins in test_composed.py: teachers and margins have gradients of their own
        "taus": [0.0, 1.0, 2.0], "teach": 0.0, "teach_at": 0.0, "temperature": 1.0, "only_right": True, "focus": 0.5,
        "consensus": 0.02, "margin": 0.0, "margin_power": 0.25, "recall": 0.0,
    },
}  # fmt: skip
VARIANTS = ("released", "paper", "classifier")
COUNTS_C = torch.tensor([60, 25, 9, 3, 1])


def case(experts: int = 1, batch: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_EBC = 3 * torch.randn(experts, batch, len(COUNTS_C), generator=generator)
    return logits_EBC, torch.randint(len(COUNTS_C), (batch,), generator=generator)


def cross_entropy_twin(logits: list[float], label: int) -> float:
    return -math.log(math.exp(logits[label]) / sum(math.exp(z) for z in logits))


def test_every_loss_of_the_folder_is_tested_here():
    assert set(ARGUMENTS) == set(METHODS)


def which(loss, labels_B, weight=1.0):
    """What a loss is told besides: the weight, and which images they are where it remembers them."""
    return (weight, torch.arange(len(labels_B))) if loss.remembers else (weight,)


@pytest.mark.parametrize("method", METHODS)
def test_arguments_fit_the_schema_read_off_the_file(method):
    schema = params.signature_block(FOLDER / f"{method}.py", "Loss.__init__")
    assert schema.model_validate(ARGUMENTS[method]).model_dump() == ARGUMENTS[method]
    assert set(schema.model_fields) == set(ARGUMENTS[method])


def test_cross_entropy_is_its_twin():
    logits_EBC, labels_B = case()
    expected = [cross_entropy_twin(z.tolist(), y) for z, y in zip(logits_EBC[0], labels_B.tolist(), strict=True)]
    value = losses.load("ce")(COUNTS_C)(logits_EBC, labels_B)
    assert value.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0, 2.0])
def test_balanced_softmax_is_its_twin(tau):
    logits_EBC, labels_B = case()
    total = COUNTS_C.sum().item()
    expected = 0.0
    for z, y in zip(logits_EBC[0].tolist(), labels_B.tolist(), strict=True):
        shifted = [z[c] + tau * math.log(COUNTS_C[c].item() / total) for c in range(len(z))]
        expected += cross_entropy_twin(shifted, y) / len(labels_B)
    value = losses.load("balanced_softmax")(COUNTS_C, tau=tau)(logits_EBC, labels_B)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_balpoe_is_its_twin():
    taus = [0.0, 1.0, 2.0]
    logits_EBC, labels_B = case(experts=3)
    expected = [
        losses.load("balanced_softmax")(COUNTS_C, tau=tau)(logits_EBC[e : e + 1], labels_B).item()
        for e, tau in enumerate(taus)
    ]
    value = losses.load("balpoe")(COUNTS_C, taus=taus)(logits_EBC, labels_B)
    assert value.item() == pytest.approx(sum(expected) / 3, rel=1e-5)


def gala(lambda1: float = 1.0, lambda2: float = 1.0, **changes: str) -> losses.BaseLoss:
    return losses.load("gala")(COUNTS_C, **ARGUMENTS["gala"] | {"lambda1": lambda1, "lambda2": lambda2} | changes)


class GalaTwin:
    """The published updates in plain loops over samples and classes, with the gradient from autograd."""

    def __init__(self, classes: int, lambda1: float, lambda2: float, variant: str, accumulation: str):
        self.gradients = [[0.0] * classes for _ in range(classes)]  # [classifier][class of the sample]
        self.theta, self.phi = [0.0] * classes, [0.0] * classes
        self.lambda1, self.lambda2, self.variant, self.accumulation = lambda1, lambda2, variant, accumulation

    def step(self, logits_BC: Tensor, labels_B: Tensor) -> float:
        classes = range(len(self.theta))
        adjusted_BC = logits_BC.double().detach().clone()
        for i, y in enumerate(labels_B.tolist()):
            for j in classes:
                if j != y or self.variant == "released":
                    adjusted_BC[i, j] += self.lambda1 * math.log(self.theta[j] + 1e-3)
                    adjusted_BC[i, j] -= self.lambda2 * math.log(self.phi[y] + 1e-3)
        adjusted_BC.requires_grad_()
        loss = sum(-adjusted_BC[i].log_softmax(0)[y] for i, y in enumerate(labels_B.tolist())) / len(labels_B)
        (gradient_BC,) = torch.autograd.grad(loss, adjusted_BC)
        for i, y in enumerate(labels_B.tolist()):
            for j in classes:
                self.gradients[j][y] += abs(gradient_BC[i, j].item())
        for k in classes:
            positive = self.gradients[k][k]
            if self.variant == "classifier":
                negative = sum(self.gradients[k][c] for c in classes if c != k)
            else:
                negative = sum(self.gradients[j][k] for j in classes if j != k)
            double = self.accumulation == "double"
            self.theta[k] = positive + (self.theta[k] if double else 0)
            self.phi[k] = negative + (self.phi[k] if double else 0)
        return loss.item()


@pytest.mark.parametrize("accumulation", ["double", "plain"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gala_is_its_twin_over_fifty_steps(variant, accumulation):
    loss = gala(1.2, 0.9, variant=variant, accumulation=accumulation)
    twin = GalaTwin(len(COUNTS_C), 1.2, 0.9, variant, accumulation)
    for step in range(50):
        logits_EBC, labels_B = case(seed=step)
        value = loss(logits_EBC, labels_B)
        loss.after_step()
        assert value.item() == pytest.approx(twin.step(logits_EBC[0], labels_B), rel=1e-4)
    assert loss.theta_C.tolist() == pytest.approx(twin.theta, rel=1e-4)
    assert loss.phi_C.tolist() == pytest.approx(twin.phi, rel=1e-4)


def after(steps: int, loss: losses.BaseLoss) -> losses.BaseLoss:
    for step in range(steps):
        loss(*case(experts=loss.experts, seed=step))
        loss.after_step()
    return loss


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_gala_positive_and_negative_gradients_coincide(variant):
    loss = after(20, gala(variant=variant))
    torch.testing.assert_close(loss.theta_C, loss.phi_C, rtol=1e-5, atol=1e-6)


def test_gala_positive_gradients_and_those_on_the_classifiers_side_do_not():
    loss = after(20, gala(variant="classifier"))
    assert (loss.theta_C / loss.phi_C).log().abs().max() > 0.5
    torch.testing.assert_close(loss.theta_C.sum(), loss.phi_C.sum())  # all that is pulled up pushes others down


def gala_gradients(lambda1: float, lambda2: float, variant: str) -> Tensor:
    loss = after(5, gala(lambda1, lambda2, variant=variant))
    logits_EBC, labels_B = case(seed=9)
    logits_EBC.requires_grad_()
    return torch.autograd.grad(loss(logits_EBC, labels_B), logits_EBC)[0]


def test_gala_lambda2_has_no_effect_in_the_released_form_and_lambda1_has():
    def close(*pair: Tensor) -> None:
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)

    close(gala_gradients(1, 0, "released"), gala_gradients(1, 5, "released"))
    assert (gala_gradients(1, 1, "released") - gala_gradients(0, 1, "released")).abs().max() > 1e-3
    close(gala_gradients(1, 1, "released"), gala_gradients(1, 1, "paper"))  # the paper's form where lambdas are equal


@pytest.mark.parametrize("variant", ["paper", "classifier"])
def test_both_lambdas_have_an_effect_in_the_papers_form(variant):
    base = gala_gradients(1, 1, variant)
    for other in (gala_gradients(1.2, 1, variant), gala_gradients(1, 0.9, variant)):
        assert (base - other).abs().max() > 1e-3


def test_gala_accumulates_in_training_only():
    loss = gala().eval()
    loss(*case())
    loss.after_step()
    assert loss.theta_C.sum() == 0


@pytest.mark.parametrize("variant", ["released", "classifier"])
def test_gala_under_mixup_accumulates_each_label_by_its_weight(variant):
    logits_EBC, labels_B = case()
    whole, parts = (gala(variant=variant) for _ in range(2))
    whole(logits_EBC, labels_B)
    parts(logits_EBC, labels_B, 0.3)
    parts(logits_EBC, labels_B, 0.7)
    torch.testing.assert_close(whole.step_2C, parts.step_2C)


def test_gala_in_balpoe_is_gala_in_each_expert():
    taus = [0.0, 1.0, 2.0]
    joint = losses.load("gala_balpoe")(COUNTS_C, taus=taus)
    alone = [gala(tau, 0.0) for tau in taus]
    for step in range(20):
        logits_EBC, labels_B = case(experts=3, seed=step)
        values = [loss(logits_EBC[e : e + 1], labels_B).item() for e, loss in enumerate(alone)]
        assert joint(logits_EBC, labels_B).item() == pytest.approx(sum(values) / 3, rel=1e-5)
        for loss in (joint, *alone):
            loss.after_step()
    torch.testing.assert_close(joint.theta_EC, torch.stack([loss.theta_C for loss in alone]))


def test_gala_in_balpoe_starts_as_balpoe():
    """Of a network that knows nothing theta is proportional to the counts of the images seen."""
    labels_B = torch.arange(5).repeat_interleave(COUNTS_C)
    joint = losses.load("gala_balpoe")(COUNTS_C, taus=[1.0, 2.0])
    nothing_EBC = torch.zeros(2, len(labels_B), 5)
    joint(nothing_EBC, labels_B)
    joint.after_step()
    for theta_C in joint.theta_EC:
        torch.testing.assert_close(theta_C / theta_C.sum(), COUNTS_C / COUNTS_C.sum())


@pytest.mark.parametrize(
    ("low", "high", "count", "taus"),
    [(0, 2, 3, [0, 1, 2]), (-1, 3, 5, [-1, 0, 1, 2, 3]), (0, 2, 1, [1]), (1, 1, 2, [1, 1])],
)
def test_biases_may_be_limits_and_a_count(low, high, count, taus):
    limits = {"low": low, "high": high, "count": count}
    for method in ("balpoe", "gala_balpoe"):
        loss, listed = (losses.load(method)(COUNTS_C, taus=given) for given in (limits, taus))
        for name, value in listed.state_dict().items():
            torch.testing.assert_close(loss.state_dict()[name], value)
        assert loss.experts == count


def test_deferred_biases_are_cross_entropy_first_and_balpoe_later():
    loss = losses.load("deferred_balpoe")(COUNTS_C, taus=[0.0, 1.0, 2.0], deferred=0.8)
    logits_EBC, labels_B = case(experts=3)
    plain = [losses.load("ce")(COUNTS_C)(logits_C[None], labels_B) for logits_C in logits_EBC]
    late = losses.load("balpoe")(COUNTS_C, taus=[0.0, 1.0, 2.0])(logits_EBC, labels_B)
    for epoch in (1, 7, 8, 9, 10, 8):  # a training that is taken up says the epoch again
        loss.start_epoch(epoch, 10)
        expected = late if epoch > 8 else sum(plain) / 3
        torch.testing.assert_close(loss(logits_EBC, labels_B), expected)


@pytest.mark.parametrize("method", ["balpoe", "deferred_balpoe", "gala_balpoe", "composed"])
def test_another_number_of_experts_is_refused(method):
    with pytest.raises(ValueError, match="2 experts for 3 taus"):
        losses.load(method)(COUNTS_C, **ARGUMENTS[method])(*case(experts=2))


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("balanced_softmax", {"tau": 0.0}),
        ("balpoe", {"taus": [0.0]}),
        ("focal", {"gamma": 0.0}),
        ("class_balanced", {"beta": 0.0, "divide_by": "images"}),
        ("class_balanced", {"beta": 0.0, "divide_by": "weights"}),
        ("class_balanced_sampling", {}),
        ("ldam", {"max_margin": 0.0, "deferred": 1.0, "beta": 0.9999}),
        *(("gala", ARGUMENTS["gala"] | {"variant": v, "lambda1": 0.0, "lambda2": 0.0}) for v in VARIANTS),
        ("gala", ARGUMENTS["gala"]),  # before its first step every margin is the same
        ("gala_balpoe", {"taus": [0.0]}),
        ("deferred_balpoe", {"taus": [1.0], "deferred": 1.0}),
    ],
)
def test_limits_are_cross_entropy(method, arguments):
    logits_EBC, labels_B = case()
    expected = losses.load("ce")(COUNTS_C)(logits_EBC, labels_B)
    torch.testing.assert_close(losses.load(method)(COUNTS_C, **arguments)(logits_EBC, labels_B), expected)


@pytest.mark.parametrize("method", ["balanced_softmax", "balpoe", "class_balanced"])
def test_uniform_counts_are_cross_entropy(method):
    logits_EBC, labels_B = case(experts=len(ARGUMENTS["balpoe"]["taus"]) if method == "balpoe" else 1)
    uniform_C = torch.full((5,), 12)
    value = losses.load(method)(uniform_C, **ARGUMENTS[method])(logits_EBC, labels_B)
    torch.testing.assert_close(value, losses.load("ce")(uniform_C)(logits_EBC, labels_B))


@pytest.mark.parametrize(
    ("method", "changes"), [*((method, {}) for method in METHODS), *(("gala", {"variant": v}) for v in VARIANTS[1:])]
)
def test_gradient(method, changes):
    loss = losses.load(method)(COUNTS_C, **ARGUMENTS[method] | changes).eval().double()
    logits_EBC, labels_B = case(experts=loss.experts, batch=3)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels_B), logits_EBC.double().requires_grad_())


@pytest.mark.parametrize("method", METHODS)
def test_relabelling_the_classes_changes_nothing(method):
    order = torch.tensor([3, 1, 4, 0, 2])
    loss, permuted = (losses.load(method)(counts, **ARGUMENTS[method]) for counts in (COUNTS_C, COUNTS_C[order]))
    for step in range(3):
        logits_EBC, labels_B = case(experts=loss.experts, seed=step)
        a = loss(logits_EBC, labels_B, *which(loss, labels_B))
        b = permuted(logits_EBC[:, :, order], order.argsort()[labels_B], *which(loss, labels_B))
        torch.testing.assert_close(a, b)
        loss.after_step()
        permuted.after_step()


@pytest.mark.parametrize(
    ("method", "changes"), [*((method, {}) for method in METHODS), *(("gala", {"variant": v}) for v in VARIANTS[1:])]
)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extremes_stay_finite(method, changes, size):
    counts_C = torch.ones(10_000, dtype=torch.long)
    counts_C[0] = 100_000
    loss = losses.load(method)(counts_C, **ARGUMENTS[method] | changes)
    logits_EBC = torch.zeros(loss.experts, 4, len(counts_C))
    logits_EBC[:, :, 5] = size
    logits_EBC.requires_grad_()
    labels_B = torch.tensor([0, 5, 9_999, 17])
    for _ in range(3):
        value = loss(logits_EBC, labels_B, *which(loss, labels_B))
        (gradient,) = torch.autograd.grad(value, logits_EBC)
        loss.after_step()
        assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_weight_scales_the_loss(method):
    loss = losses.load(method)(COUNTS_C, **ARGUMENTS[method])
    logits_EBC, labels_B = case(experts=loss.experts)
    whole, quarter = (loss(logits_EBC, labels_B, *which(loss, labels_B, weight)) for weight in (1.0, 0.25))
    torch.testing.assert_close(quarter, 0.25 * whole)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_is_its_twin(gamma):
    logits_EBC, labels_B = case()
    expected = 0.0
    for z, y in zip(logits_EBC[0].tolist(), labels_B.tolist(), strict=True):
        p = math.exp(z[y]) / sum(math.exp(other) for other in z)
        expected += -((1 - p) ** gamma) * math.log(p) / len(labels_B)
    value = losses.load("focal")(COUNTS_C, gamma=gamma)(logits_EBC, labels_B)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_focal_of_even_odds():
    value = losses.load("focal")(COUNTS_C, gamma=2.0)(torch.zeros(1, 3, 5), torch.tensor([0, 2, 4]))
    assert value.item() == pytest.approx(0.8**2 * math.log(5), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_focal_has_a_gradient_where_nothing_is_wrong(gamma, size):
    logits_EBC = torch.zeros(1, 2, 5)
    logits_EBC[:, :, 1] = size
    logits_EBC.requires_grad_()
    value = losses.load("focal")(COUNTS_C, gamma=gamma)(logits_EBC, torch.tensor([1, 0]))
    (gradient,) = torch.autograd.grad(value, logits_EBC)
    assert value.isfinite() and gradient.isfinite().all()


def class_balanced_twin(beta: float) -> list[float]:
    effective = [(1 - beta**n) / (1 - beta) for n in COUNTS_C.tolist()]
    total = sum(1 / e for e in effective)
    return [len(effective) / e / total for e in effective]


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_class_balanced_is_its_twin(beta):
    logits_EBC, labels_B = case()
    w = class_balanced_twin(beta)
    pairs = zip(logits_EBC[0].tolist(), labels_B.tolist(), strict=True)
    expected = sum(w[y] * cross_entropy_twin(z, y) for z, y in pairs) / len(labels_B)
    value = losses.load("class_balanced")(COUNTS_C, beta=beta, divide_by="images")(logits_EBC, labels_B)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value = losses.load("class_balanced")(COUNTS_C, beta=beta, divide_by="weights")(logits_EBC, labels_B)
    weighted = expected * len(labels_B) / sum(w[y] for y in labels_B.tolist())
    assert value.item() == pytest.approx(weighted, rel=1e-5)


def test_class_balanced_weights_by_hand():
    # effective numbers of 1 and 2 images: 1 and 1 + beta = 1.5, so 1 : 2/3, and they sum to 2
    assert weights(torch.tensor([1, 2]), 0.5).tolist() == pytest.approx([1.2, 0.8], rel=1e-15)


@pytest.mark.parametrize("count", [2, 500, 100_000])
@pytest.mark.parametrize("beta", [0.0, 0.9999, 0.99999999])
def test_effective_number_is_the_sum_of_its_series(beta, count):
    one, many = weights(torch.tensor([1, count]), beta).tolist()
    assert one / many == pytest.approx(math.fsum(beta**k for k in range(count)), rel=1e-12)


def test_class_balanced_weights_tend_to_inverse_frequencies():
    inverse_C = 1 / COUNTS_C.double()
    expected_C = len(COUNTS_C) * inverse_C / inverse_C.sum()
    torch.testing.assert_close(weights(COUNTS_C, 1 - 1e-12), expected_C, rtol=1e-9, atol=0)


def test_one_loss_draws_its_classes_alike():
    assert [name for name in METHODS if losses.load(name).class_balanced_sampling] == ["class_balanced_sampling"]


def ldam(
    epoch: int = 1, epochs: int = 200, counts_C: Tensor = COUNTS_C, scale: float = 30.0, **changes: float
) -> losses.BaseLoss:
    loss = losses.load("ldam")(counts_C, **{**ARGUMENTS["ldam"], **changes})
    loss.scale = scale
    loss.start_epoch(epoch, epochs)
    return loss


@pytest.mark.parametrize("epoch", [1, 160, 161, 200])
def test_ldam_is_its_twin(epoch):
    logits_EBC, labels_B = case()
    counts = COUNTS_C.tolist()
    C = 0.5 / max(n**-0.25 for n in counts)  # so that the largest margin is 0.5
    w = class_balanced_twin(0.9999) if epoch > 160 else [1.0] * len(counts)
    above = below = 0.0
    for z, y in zip(logits_EBC[0].tolist(), labels_B.tolist(), strict=True):
        cosines = [value / 30 for value in z]
        cosines[y] -= C / counts[y] ** 0.25
        above += w[y] * cross_entropy_twin([30 * value for value in cosines], y)
        below += w[y]
    assert ldam(epoch)(logits_EBC, labels_B).item() == pytest.approx(above / below, rel=1e-5)


def test_ldam_margins_by_hand():
    margins = ldam(counts_C=torch.tensor([16, 1, 81])).margin_C
    assert margins.tolist() == pytest.approx([0.25, 0.5, 0.5 / 3], rel=1e-6)  # the smallest class has max_margin


def test_ldam_of_equal_counts_has_one_margin():
    value = ldam(counts_C=torch.full((5,), 12), scale=2.0)(torch.zeros(1, 3, 5), torch.tensor([0, 2, 4]))
    assert value.item() == pytest.approx(math.log(1 + 4 * math.exp(2.0 * 0.5)), rel=1e-6)


def test_ldam_deferred_is_class_balanced_over_the_weights_of_the_batch():
    logits_EBC, labels_B = case()
    expected = losses.load("class_balanced")(COUNTS_C, beta=0.9999, divide_by="weights")(logits_EBC, labels_B)
    torch.testing.assert_close(ldam(200, max_margin=0.0)(logits_EBC, labels_B), expected)


@pytest.mark.parametrize(
    ("deferred", "epochs", "plain"), [(0.8, 200, 160), (0.8, 55, 44), (0.29, 100, 29), (0.0, 10, 0), (1.0, 10, 10)]
)
def test_ldam_reweights_from_the_epoch_after_the_deferred_ones(deferred, epochs, plain):
    loss = ldam(deferred=deferred)
    seen = []
    for epoch in range(1, epochs + 1):
        loss.start_epoch(epoch, epochs)
        seen.append(loss.reweighted)
    assert seen == [False] * plain + [True] * (epochs - plain)


def test_ldam_taken_up_inside_an_epoch_is_the_same():
    logits_EBC, labels_B = case()
    through = ldam(160)
    plain = through(logits_EBC, labels_B)
    for _ in range(2):
        through.start_epoch(161, 200)
        taken_up = ldam(161)
        taken_up.load_state_dict(through.state_dict())
        assert taken_up(logits_EBC, labels_B) == through(logits_EBC, labels_B) != plain
    through.start_epoch(160, 200)
    assert through(logits_EBC, labels_B) == plain


def test_ldam_deferred_has_gradient_weight_and_no_order_of_classes():
    logits_EBC, labels_B = case(batch=3)
    loss = ldam(200).double()
    assert torch.autograd.gradcheck(lambda z: loss(z, labels_B), logits_EBC.double().requires_grad_())
    torch.testing.assert_close(ldam(200)(logits_EBC, labels_B, 0.25), 0.25 * ldam(200)(logits_EBC, labels_B))
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = ldam(200, counts_C=COUNTS_C[order])(logits_EBC[:, :, order], order.argsort()[labels_B])
    torch.testing.assert_close(permuted, ldam(200)(logits_EBC, labels_B))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_ldam_deferred_stays_finite(size):
    counts_C = torch.ones(10_000, dtype=torch.long)
    counts_C[0] = 100_000
    logits_EBC = torch.zeros(1, 4, len(counts_C))
    logits_EBC[:, :, 5] = size
    logits_EBC.requires_grad_()
    value = ldam(200, counts_C=counts_C)(logits_EBC, torch.tensor([0, 5, 9_999, 17]))
    (gradient,) = torch.autograd.grad(value, logits_EBC)
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("batch", [3, 7, 40])
@pytest.mark.parametrize(("alpha", "remine_lambda"), [(0.1, 0.1), (1.0, 0.01), (2.0, 0.0)])
def test_lade_is_its_twin(batch, alpha, remine_lambda):
    logits_EBC, labels_B = case(batch=batch)
    classes, total = len(COUNTS_C), COUNTS_C.sum().item()
    p_s = [n / total for n in COUNTS_C.tolist()]
    samples = list(zip(logits_EBC[0].tolist(), labels_B.tolist(), strict=True))
    expected = 0.0
    for f, y in samples:
        expected += cross_entropy_twin([f[c] + math.log(p_s[c]) for c in range(classes)], y) / batch
    for c in range(classes):
        own = [f[c] for f, y in samples if y == c]
        first = sum(own) / len(own) if own else 0.0
        second = math.log(sum(math.exp(f[c]) * (1 / classes) / p_s[c] for f, _ in samples) / batch)
        expected += alpha * p_s[c] * (-first + second + remine_lambda * second**2)
    value = losses.load("lade")(COUNTS_C, alpha=alpha, remine_lambda=remine_lambda)(logits_EBC, labels_B)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_lade_with_alpha_0_is_balanced_softmax():
    logits_EBC, labels_B = case()
    expected = losses.load("balanced_softmax")(COUNTS_C, tau=1.0)(logits_EBC, labels_B)
    value = losses.load("lade")(COUNTS_C, alpha=0.0, remine_lambda=0.1)(logits_EBC, labels_B)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("remine_lambda", [0.0, 0.5])
def test_lade_regulariser_of_constant_logits_is_a_divergence(remine_lambda):
    # z_c = log(C * prior_c) has exp(z_c) * (1 / C) / prior_c = 1, so nothing is left but -KL(prior, uniform)
    prior_C = COUNTS_C / COUNTS_C.sum()
    logits_EBC, labels_B = (5 * prior_C).log().expand(1, 5, 5), torch.arange(5)
    loss, without = (losses.load("lade")(COUNTS_C, alpha=a, remine_lambda=remine_lambda) for a in (1.0, 0.0))
    value = loss(logits_EBC, labels_B) - without(logits_EBC, labels_B)
    torch.testing.assert_close(value, -(prior_C * (5 * prior_C).log()).sum())


@pytest.mark.parametrize("method", ["focal", "class_balanced", "class_balanced_sampling", "ldam", "lade"])
def test_several_experts_have_the_mean_of_their_losses(method):
    loss = losses.load(method)(COUNTS_C, **ARGUMENTS[method])
    loss.start_epoch(200, 200)
    logits_EBC, labels_B = case(experts=3)
    expected = torch.stack([loss(logits_EBC[e : e + 1], labels_B) for e in range(3)]).mean()
    torch.testing.assert_close(loss(logits_EBC, labels_B), expected)
