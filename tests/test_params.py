"""params.yaml: what is wrong is named with its key, its value and what is allowed, before anything runs."""

import copy
import re
import shutil

import pytest
import yaml
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longtail import networks
from longtail.workflow import declaration, params

GOOD = yaml.safe_load((ROOT / "params.yaml").read_text())


def changed(key: str, value: object = None, *, drop: bool = False) -> dict:
    values = copy.deepcopy(GOOD)
    *path, last = key.split(".")
    block = values
    for part in path:
        block = block[part]
    if drop:
        del block[last]
    else:
        block[last] = value
    return values


def test_the_committed_file_fits():
    assert params.load(ROOT / "params.yaml") == GOOD


BAD = [
    # unknown
    ("plan", {}, "plan: unknown key; allowed: plans, sources, datasets"),
    ("evaluate.bins", 15, "evaluate.bins = 15: unknown key; allowed: ece_bins, many_above, few_below"),
    (
        "methods.gala.lamda1",
        1.0,
        "methods.gala.lamda1 = 1.0: unknown key; allowed: variant, accumulation, lambda1, lambda2",
    ),
    ("methods.ce.tau", 1.0, "methods.ce.tau = 1.0: unknown key; allowed: no key at all"),
    (
        "recipes.gala.optimizer.learning_rate",
        0.1,
        "unknown key; allowed: lr, momentum, nesterov, weight_decay, muon_lr, muon_weight_decay",
    ),
    ("sources.digits.path", "x", "sources.digits.path = 'x': unknown key; allowed: test_per_class, seed"),
    # mistyped
    (
        "recipes.gala.epochs",
        "200",
        "recipes.gala.epochs = '200': input should be a valid integer",
    ),
    ("recipes.gala.epochs", 1.5, "recipes.gala.epochs = 1.5: input should be a valid integer"),
    (
        "recipes.gala.drop_last",
        1,
        "recipes.gala.drop_last = 1: input should be a valid boolean",
    ),
    (
        "recipes.gala.optimizer.lr",
        "1e-3",
        "recipes.gala.optimizer.lr = '1e-3': input should be a valid number",
    ),
    ("methods.balpoe.taus", 1.0, "methods.balpoe.taus = 1.0: input should be a valid list"),
    ("align", None, "align = None: input should be a valid dictionary"),
    ("datasets", [], "datasets = []: must be a mapping"),
    # out of range
    (
        "datasets.digits_if20.imbalance_factor",
        0.05,
        "imbalance_factor = 0.05: input should be greater than or",
    ),
    (
        "datasets.digits_if20.held_out",
        1.0,
        "datasets.digits_if20.held_out = 1.0: input should be less than 1",
    ),
    (
        "datasets.digits_if20.profile",
        "linear",
        "profile = 'linear': input should be 'exponential', 'step', 'as_is' or 'further'",
    ),
    ("datasets.digits_if20.draw", "random", "draw = 'random': input should be 'ldam', 'first' or 'own'"),
    ("plans.quick.published", {"other": "digits_if20"}, "published names other, which is not among the plan's data"),
    ("plans.quick.published", {"digits_if20": "Dig"}, "plans.quick.published.digits_if20 = 'Dig': must match"),
    ("recipes.gala.optimizer.lr", 0, "recipes.gala.optimizer.lr = 0: input should be greater than 0"),
    ("recipes.gala.optimizer.lr", float("nan"), "recipes.gala.optimizer.lr = nan: input should be a finite"),
    ("recipes.gala.network.depth", 33, "depth is 6n + 2 (8, 20, 32, 44, 56, ...), not 33"),
    ("recipes.gala.precision", "fp8", "precision = 'fp8': input should be 'fp32', 'bf16' or 'fp16'"),
    ("recipes.gala.accumulate", 0, "recipes.gala.accumulate = 0: input should be greater than or equal to 1"),
    ("recipes.gala.weight_average", 1, "recipes.gala.weight_average = 1: input should be less than 1"),
    ("recipes.gala.test_every", -1, "recipes.gala.test_every = -1: input should be greater than or equal to 0"),
    ("recipes.gala.augmentation.policy", "auto", "policy = 'auto': input should be 'none', 'autoaugment_cifar10', "),
    (
        "recipes.gala.augmentation.color_jitter",
        [0.4, 0.4],
        "color_jitter = [0.4, 0.4]: list should have at least 4 items",
    ),
    ("recipes.gala.augmentation.color_jitter", [0, 0, 0, 0.6], "color_jitter: hue is 0.6 turns, not in 0..0.5"),
    ("recipes.gala.resolution.scales", [0.5], "0 milestones and 1 scales"),
    ("recipes.balpoe.schedule.milestones", [160], "1 milestones and 2 factors"),
    ("recipes.balpoe.schedule.milestones", [180, 160], "milestones must rise: [180, 160]"),
    (
        "recipes.balpoe.schedule.milestones",
        [160, 200],
        "schedule goes on after the last of 200 epochs: [200]",
    ),
    ("recipes.gala.schedule.milestones", [9], "1 milestones and 0 factors"),
    ("recipes.gala.schedule.warmup_epochs", 201, "schedule goes on after the last of 200 epochs"),
    ("recipes.gala.schedule.warmup_epochs", 200, "schedule.warmup_epochs takes all 200 epochs"),
    ("recipes.gala.normalization.mean", [0.5], "mean has 1 channels and std 3"),
    ("recipes.digits.optimizer.momentum", 1.0, "momentum = 1.0: input should be less than 1"),
    ("recipes.digits.optimizer.muon_weight_decay", 0.1, "muon_weight_decay is of no effect without muon_lr"),
    ("methods.gala.lambda1", -1, "methods.gala.lambda1 = -1: input should be greater than or equal to 0"),
    ("methods.balpoe.taus", {"low": 0, "high": 2}, "a list of numbers, or {low: number, high: number, count: whole"),
    ("methods.balpoe.taus", {"low": 0, "high": 2, "count": 0}, "count = 0: allowed are 1 to 1024"),
    ("methods.balpoe.taus", {"low": 0, "high": 2, "count": 10**9}, "count = 1000000000: allowed are 1 to 1024"),
    ("methods.balpoe.taus", [], "methods.balpoe.taus = []: list should have at least 1 item"),
    ("align.reading", "magic", "align.reading = 'magic': input should be 'all_samples', 'own_samples'"),
    ("evaluate.ece_bins", 0, "evaluate.ece_bins = 0: input should be greater than or equal to 1"),
    ("evaluate.few_below", 200, "few_below (200) is above many_above (100)"),
    ("sources.cifar10.md5", "abc", "sources.cifar10.md5 = 'abc': must match ^[0-9a-f]{32}$"),
    ("sources.cifar10.name", "cifar20", "name = 'cifar20': input should be 'cifar10' or 'cifar100'"),
    # names
    ("sources.digits.reader", "mnist", "sources.digits.reader = 'mnist': must be one of cifar, digits"),
    ("datasets.digits_if20.source", "mnist", "source = 'mnist': not in sources; there are digits, cifar10"),
    ("plans.quick.methods", ["magic"], "plans.quick.methods = 'magic': not in methods; there are ce,"),
    (
        "plans.quick.methods",
        ["ce", "crt"],
        "plans.quick.trained = None: must be ['ce'], the plan's methods of that kind",
    ),
    (
        "plans.quick.methods",
        ["ce", "crt"],
        "plans.quick.refit = None: must be ['crt'], the plan's methods of that kind",
    ),
    ("plans.quick.methods", ["crt"], "plans.quick.methods: lacks ce, which others of them start from"),
    ("plans.quick.refit", ["ce"], "plans.quick.refit = ['ce']: must be [], the plan's methods of that kind"),
    ("plans.quick.fuse", ["magic"], "plans.quick.fuse = ['magic']: must be [], the plan's methods of that kind"),
    (
        "methods.balpoe_apart.fuse",
        ["ce", "magic"],
        "methods.balpoe_apart.fuse = 'magic': not in methods; there are ce,",
    ),
    ("methods.balpoe_apart.fuse", ["ce"], "methods.balpoe_apart: fuse names ce alone, whose"),
    ("methods.balpoe_apart.fuse", [], "methods.balpoe_apart.fuse = []: list should have at least 1 item"),
    ("methods.ldam_drw.loss", "ldem", "methods.ldam_drw.loss = 'ldem': no file src/longtail/losses/ldem.py; there are"),
    ("methods.mine", {"refit": "ce"}, "methods.mine.refit = 'ce': no file src/longtail/heads/ce.py; there are crt,"),
    ("methods.crt.epochs", 0, "methods.crt.epochs = 0: input should be greater than or equal to 1"),
    (
        "methods.gala.variant",
        "mine",
        "methods.gala.variant = 'mine': input should be 'released', 'paper' or 'classifier'",
    ),
    ("plans.quick.seeds", [0, 0], "seeds names something twice: [0, 0]"),
    ("plans.quick.seeds", [], "plans.quick.seeds = []: list should have at least 1 item"),
    ("methods.magic", {}, "methods.magic: no file src/longtail/losses/magic.py; there are balanced_softmax,"),
    ("datasets.CIFAR-100", {}, "datasets.CIFAR-100: a name is lower-case letters and digits"),
    (
        "plans.tiny\n",
        {},
        "plans.'tiny\\n': a name is lower-case letters and digits, parted by '_', at most 50 characters",
    ),
    (f"plans.{'a' * 51}", {}, "a name is lower-case letters and digits, parted by '_', at most 50 characters"),
    ("plans.quick.datasets", ["a" * 300], "string should have at most 50 characters"),
    (
        "methods.balpoe_apart.fuse",
        ["ce", "balpoe_apart"],
        "fuse = 'balpoe_apart': is fused itself; allowed are methods",
    ),
    ("methods.balpoe_apart.fuse", ["ce", "crt"], "fuse = 'crt': starts from another network itself; allowed are"),
    ("methods.balpoe_apart.fuse", None, "methods.balpoe_apart.fuse = None: input should be a valid list"),
    (
        "methods.balpoe_apart.fuse",
        [["ce"], "gala"],
        "methods.balpoe_apart.fuse.0 = ['ce']: input should be a valid string",
    ),
    ("plans.quick.methods", [["ce"], "balpoe"], "plans.quick.methods.0 = ['ce']: input should be a valid string"),
    ("plans.quick.methods", {"ce": 1}, "plans.quick.methods: input should be a valid list"),
    ("recipes.gala.accumulate", 1000, "accumulate (1000) is above batch_size (64): parts without images"),
    ("recipes.gala.network.depth", 60002, "depth = 60002: input should be less than or equal to 1202"),
    ("recipes.gala.network.width", 4096, "width = 4096: input should be less than or equal to 1024"),
    ("recipes.gala.augmentation.cutout", 1e30, "cutout = 1e+30: input should be"),
    ("recipes.gala.augmentation.cutout", 10**30, "cutout = 1000000000000000000000000000000: input should be"),
    ("recipes.gala.epochs", 10**9, "epochs = 1000000000: input should be less than or equal to 1000000"),
    (
        "recipes.gala.resolution",
        {"milestones": [1], "scales": [0.01]},
        "scales.0 = 0.01: input should be greater than or",
    ),
    # images that are read as they are needed
    ("streams.imagenet_lt.side", 4, "streams.imagenet_lt.side = 4: input should be greater than or equal to 8"),
    ("streams.imagenet_lt.stored", 224, "the middle has 196 pixels (share), fewer than side (224); 0 keeps none"),
    ("streams.imagenet_lt.index", "other", "streams.imagenet_lt.index = 'other': not in indexes; there are"),
    ("recipes.imagenet_balpoe.window.scale", [0.5, 0.1], "scale falls, from 0.5 to 0.1"),
    ("recipes.imagenet_balpoe.window.scale", [0, 1], "window.scale.0 = 0: input should be greater than 0"),
    ("recipes.imagenet_balpoe.window.ratio", [1.0], "window.ratio = [1.0]: list should have at least 2 items"),
    ("recipes.gala.window", {"scale": [0.1, 1], "ratio": [1, 1]}, "recipes.gala.window = "),
    ("plans.imagenet-lt.recipes", ["gala"], "imagenet_lt is of `streams`, and the recipe gala is for small images"),
    ("plans.imagenet-lt.recipes", ["probe"], "has images, and the recipe probe takes features"),
    ("plans.imagenet-lt.datasets", ["imagenet_lt", "digits_if20"], "imagenet_lt is of `streams`, others are not"),
    ("plans.imagenet-lt.readings", True, "imagenet_lt is of `streams`, whose logits are not kept to compare on"),
    (
        "plans.imagenet-lt.align",
        {"reading": "own_samples", "weights": "uniform", "temperature": 1, "strength": 1},
        "plans.imagenet-lt: imagenet_lt is of `streams`, whose logits come by blocks of rows, and align.reading = ",
    ),
    ("plans.quick.recipes", ["imagenet_balpoe"], "the recipe imagenet_balpoe has random windows (window), which only"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD, ids=[f"{key}={value}" for key, value, _ in BAD])
def test_bad_value(key, value, message):
    with pytest.raises(params.ParamsError, match=re.escape(message)) as caught:
        params.validate(changed(key, value))
    assert str(caught.value).startswith(f"params.yaml: {key.split('.')[0]}")


@pytest.mark.parametrize(
    ("block", "change", "message"),
    [
        ("protocols.b0_10_held_out", {"held_out": 0}, "the training bic fits its teacher on held-out memory, and the"),
        (
            "trainings.balanced_softmax",
            {"replay": False},
            "balanced_softmax has a loss that needs every class, and rep",
        ),
        ("protocols.b0_10_held_out", {"memory": 0}, "needs every class, and the protocol b0_10_held_out has memory: 0"),
        ("trainings.bic", {"start": "teacher"}, ""),
        ("recipes.short.first", {"test_every": 1}, "first.test_every and gradients_every must be 0"),
        ("recipes.short.first", {"gradients_every": 2}, "first.test_every and gradients_every must be 0"),
    ],
)
def test_a_chain_that_could_not_end_does_not_begin(block, change, message):
    """These used to be found out after a step or two of a chain: hours later."""
    values = copy.deepcopy(GOOD)
    section, *path = block.split(".")
    at = values["incremental"][section]
    for name in path:
        at = at[name]
    at |= change
    if not message:
        params.validate(values)
        values["incremental"]["recipes"]["short"]["bias"] = False
        message = "the training bic starts from a corrected bias, and the recipe short has bias: false"
        with pytest.raises(params.ParamsError, match=message):
            params.validate(values)
        values["incremental"]["recipes"]["short"] |= {"bias": True}
        values["incremental"]["recipes"]["short"]["first"]["network"] |= {"head": "cosine", "scale": 30.0}
        message = "starts from a corrected head, which a cosine head"
    with pytest.raises(params.ParamsError, match=re.escape(message)):
        params.validate(values)


def test_a_number_as_dvc_writes_it_is_one():
    """YAML 1.2 has 5e-05 as a number, and DVC writes it so; PyYAML's own loader has a text."""
    text = yaml.safe_dump(GOOD).replace("weight_decay: 0.0005", "weight_decay: 5e-05", 1)
    assert "5e-05" in text
    params.validate(params.parsed(text))


LARGE = {"architecture": "resnet50", "head": "cosine", "scale": 30}
BAD_NETWORKS = [
    (
        {**LARGE, "depth": 50},
        ["network.depth = 50: unknown key; allowed: head, scale, architecture"],
    ),
    (
        {"depth": 32, "width": 16, "heads": 2, "head": "linear", "scale": 1},
        ["network.heads = 2: unknown key; allowed: head, scale, depth, width, shared_groups"],
    ),
    (
        {"head": "linear", "scale": 1},
        [
            "network.depth: missing; allowed: head, scale, depth, width, shared_groups",
            "network.width: missing; allowed: head, scale, depth, width, shared_groups",
        ],
    ),
    (
        {"architecture": "resnet50", "head": "cosine"},
        ["network.scale: missing; allowed: head, scale, architecture"],
    ),
    (
        {**LARGE, "architecture": "resnet51"},
        ["network.architecture = 'resnet51': input should be 'resnet10', 'resnet50', 'resnet152' or 'resnext50_32x4d'"],
    ),
    ({**LARGE, "head": "linear"}, ["network: a linear head has scale: 1"]),
    ("resnet50", ["network = 'resnet50': input should be a valid dictionary or instance of CifarNetwork"]),
]


@pytest.mark.parametrize(("network", "messages"), BAD_NETWORKS)
def test_bad_network(network, messages):
    with pytest.raises(params.ParamsError) as caught:
        params.validate(changed("recipes.gala.network", network))
    assert str(caught.value).splitlines() == [f"params.yaml: recipes.gala.{message}" for message in messages]


@pytest.mark.parametrize(
    ("network", "kind"),
    [({"depth": 20, "width": 16, "head": "linear", "scale": 1}, "ResNet"), (LARGE, "LargeResNet")],
)
def test_a_network_that_the_schema_lets_through_can_be_built(network, kind):
    params.validate(changed("recipes.gala.network", network))
    built = networks.build(channels=1, classes=3, experts=1, mean=[0.5], std=[0.5], **network)
    assert type(built).__name__ == kind


@pytest.mark.parametrize(
    "key",
    [
        "evaluate",
        "plans.quick.seeds",
        "methods.gala.lambda2",
        "recipes.gala.optimizer.lr",
        "sources.cifar10.url",
    ],
)
def test_missing_key(key):
    with pytest.raises(params.ParamsError, match=rf"{re.escape(key)}: missing"):
        params.validate(changed(key, drop=True))


def test_every_problem_is_listed_at_once():
    values = changed("evaluate.ece_bins", 0)
    values["methods"]["gala"]["lambda1"] = "a"
    with pytest.raises(params.ParamsError) as caught:
        params.validate(values)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plans: [", "not valid YAML"),
        ("a: 1\na: 2\n", "the key 'a' is there twice"),
        ("- 1\n", "expected a mapping"),
    ],
)
def test_bad_file(tmp_path, text, message):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(params.ParamsError, match=message) as caught:
        params.load(path)
    assert str(path) in str(caught.value)


SCALARS = [
    '010', '1:30', '1:30.5', '5e-2', '1e-05', '5.0e-2', '1e3', '1.5e3', '.5', '1.', '.5e1', 'yes', 'no', 'on',
    'off', 'y', 'n', 'true', 'True', 'false', '1_000', '0o17', '0x1F', '0b101', '+1', '-7', '09', '0', '-0',
    '~', 'null', '.inf', '-.inf', '1.0', '0.1', '12e03', '1e+5', '-1E-5', '00', '08.5', '1__0', '0_1',
    '2024-01-01', 'abc', "'010'", '"1e3"',
]  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_params_are_read_as_dvc_reads_them(tmp_path, text):
    """DVC records what it reads: YAML 1.2. PyYAML's 1.1 has 8 for 010 and 90 for 1:30, and no number for 1e-05."""
    from dvc.utils.serialize import parse_yaml

    (tmp_path / "a.yaml").write_text(f"a: {text}\n")
    found = declaration.load(tmp_path / "a.yaml")["a"]
    wanted = parse_yaml(f"a: {text}\n", "a.yaml")["a"]
    assert (type(found), found) == (type(wanted), wanted)


@given(st.from_regex(r"[-+0-9a-fobx_.:eE]{1,8}", fullmatch=True))
def test_any_number_is_read_as_dvc_reads_it(text):
    from dvc.utils.serialize import parse_yaml

    assume(not re.search(r"[-+.]_", text))  # ._5 and -_5 are numbers to DVC and text to us, which no param may be
    try:
        wanted = parse_yaml(f"a: {text}\n", "a.yaml")["a"]
    except Exception:
        return  # no YAML, or a number that even DVC cannot read
    try:
        found = yaml.load(f"a: {text}\n", declaration.Loader)["a"]
    except (yaml.YAMLError, ValueError):
        return
    assert (type(found), found) == (type(wanted), wanted)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    epochs: 200", "    epochs: 1:30", "epochs = '1:30': input should be a valid integer"),
        ("    flip: true", "    flip: yes", "flip = 'yes': input should be a valid boolean"),
        ("    epochs: 200", "    epochs: 0200", None),
        ("    epochs: 200", "    ? {a: b}\n    : 200", "no key: {'a': 'b'}"),
        ("    epochs: 200", "    ? [a, b]\n    : 200", "no key: "),
        ("    epochs: 200", "    epochs: 2024-02-31", "not valid YAML: day"),
        ("    epochs: 200", f"    epochs: {'9' * 5000}", "not valid YAML: Exceeds the limit"),
        ("    epochs: 200", f"    epochs: {'[' * 100_000}", "not valid YAML: nested 51 deep in line"),
        ("    epochs: 200", f"    epochs:\n      {'- ' * 100_000}", "not valid YAML: nested 51 deep in line"),
        ("    epochs: 200", "    epochs: !!python/object/apply:os.getcwd []", "not valid YAML: could not determine"),
    ],
)
def test_yaml_of_another_kind_is_refused_or_read_as_meant(tmp_path, old, new, message):
    text = (ROOT / "params.yaml").read_text()
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(old, new, 1))
    assert path.read_text() != text
    if message is None:
        assert params.load(path) == params.load(ROOT / "params.yaml")
        return
    with pytest.raises(params.ParamsError, match=re.escape(message)):
        params.load(path)


def test_an_experiment_changes_one_line_of_params(tmp_path):
    """`dvc exp run -S` writes the file anew: it is kept in the form that DVC writes."""
    from dvc.utils.hydra import apply_overrides

    path = tmp_path / "params.yaml"
    before = (ROOT / "params.yaml").read_text()
    path.write_text(before)
    apply_overrides(path, ["methods.gala.lambda1=0.8"])
    pairs = zip(before.splitlines(), path.read_text().splitlines(), strict=True)
    changed = [pair for pair in pairs if len({*pair}) > 1]
    assert changed == [("    lambda1: 1.0", "    lambda1: 0.8")]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_params_in_another_encoding_are_named(tmp_path, encoding):
    path = tmp_path / "params.yaml"
    path.write_bytes("# café\nplans: {}\n".encode(encoding))
    with pytest.raises(params.ParamsError, match=r"params\.yaml: not UTF-8 text"):
        params.load(path)


def test_a_billion_words_are_shown_short(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (tmp_path / "params.yaml").write_text("\n".join([*lines, "plans: *a11", "evaluate: *a11", "methods: {ce: *a11}"]))
    with pytest.raises(params.ParamsError) as caught:
        params.load(tmp_path / "params.yaml")
    assert len(str(caught.value)) < 10_000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["ce", "quick"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def paths(value, here=()):
    """Every key of nested mappings and lists, as a path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*here, key)
        yield from paths(item, (*here, key))


@given(st.data())
@settings(max_examples=100)
def test_whatever_stands_anywhere_fits_or_is_named(data):
    values = copy.deepcopy(GOOD)
    *above, last = data.draw(st.sampled_from(sorted(paths(values), key=str)))
    block = values
    for key in above:
        block = block[key]
    block[last] = data.draw(VALUES)
    try:
        params.validate(values)
    except params.ParamsError as error:
        assert all(line.startswith("params.yaml: ") for line in str(error).splitlines())


@given(st.text(alphabet=" \n\t-:?&*!|>'\"%@`{}[],#abc019.~", max_size=60))
@settings(max_examples=300)
def test_whatever_text_is_there_is_no_traceback(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text)
    with pytest.raises(params.ParamsError, match=r"any\.yaml: "):
        params.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(params.ParamsError, match="no such file"):
        params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Other:\n    pass\n", "defines no Loss.__init__"),
        ("class Loss:\n    pass\n", "defines no Loss.__init__"),
        ("class Loss:\n    def __init__(self, class_counts, gamma: float): ...\n", "takes 'gamma' by place"),
        ("class Loss:\n    def __init__(self, class_counts, *, gamma): ...\n", "'gamma' of Loss.__init__ has no annot"),
    ],
)  # fmt: skip
def test_a_loss_that_says_too_little_is_named(tmp_path, monkeypatch, text, message):
    """What a newcomer writes first."""
    library = tmp_path / "src/longtail"
    shutil.copytree(params.LIBRARY, library, ignore=shutil.ignore_patterns("__pycache__"))
    (library / "losses/mine.py").write_text(text)
    monkeypatch.setattr(params, "LIBRARY", library)
    with pytest.raises(params.ParamsError, match=f"methods.mine: src/longtail/losses/mine.py: .*{message}"):
        params.validate(changed("methods.mine", {}))
