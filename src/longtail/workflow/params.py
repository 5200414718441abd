"""The schema of params.yaml: an unknown, missing, mistyped or out-of-range key stops before anything runs."""

import ast
import pkgutil
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from longtail.workflow import incremental, ranges
from longtail.workflow.declaration import Loader
from longtail.workflow.ranges import Count, Fraction, Name, NotNegative, Numbers, Positive, Seed

LIBRARY = Path(__file__).parents[1]
READERS = "data/sources"
EMBEDDINGS = "embeddings"  # the reader whose arrays are features
NAME_PATTERN = r"[a-z0-9]+(_[a-z0-9]+)*"
PLAN_NAME = r"[a-z0-9]+([_-][a-z0-9]+)*"
READINGS_BY_ROW = ("all_samples", "normalized", "equal_shares")  # as longtail.training.streamed has them
DEEPEST = 50
SHOWN = reprlib.Repr()  # of a value that does not fit: anchors and aliases make a line of YAML a billion words
SHOWN.maxstring = SHOWN.maxother = 80


class Block(BaseModel):
    # strict: '3' is no number and 1 no truth value; whole numbers still pass for floats
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Align(Block):
    reading: Literal["all_samples", "own_samples", "mean_energy", "normalized", "equal_shares"]
    weights: Literal["balanced", "uniform"]
    temperature: Positive
    strength: NotNegative


class Plan(Block):
    datasets: list[Name] = Field(min_length=1)
    recipes: list[Name] = Field(min_length=1)
    methods: list[Name] = Field(min_length=1)
    trained: list[Name] | None = None  # DVC cannot choose from a list: where not all methods are trained, by kind
    refit: list[Name] = []
    fuse: list[Name] = []
    readings: bool = False  # try all settings of energy aligning, too
    portable: bool = False  # the same bytes on any x86-64 processor with AVX2: for small plans, see stages/portable.py
    align: Align | None = None  # in place of the block `align`
    published: dict[Name, Name] = {}  # data set: that whose published values stand beside it, where it is another cut
    seeds: list[Seed] = Field(min_length=1)

    @model_validator(mode="after")
    def _no_repeats(self) -> "Plan":
        for axis in ("datasets", "recipes", "methods", "seeds"):
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                raise ValueError(f"{axis} names something twice: {values}")
        if others := sorted(self.published.keys() - set(self.datasets)):
            raise ValueError(f"published names {others[0]}, which is not among the plan's datasets")
        return self


class Dataset(Block):
    source: Name
    profile: Literal["exponential", "step", "as_is", "further"]
    imbalance_factor: Annotated[float, Field(ge=1)] | None = None
    draw: Literal["ldam", "first", "own"] = "own"
    seed: Seed
    held_out: Fraction

    @model_validator(mode="after")
    def _a_factor_where_something_is_cut(self) -> "Dataset":
        if (self.profile == "as_is") != (self.imbalance_factor is None):
            raise ValueError("imbalance_factor belongs to every profile but as_is, which cuts nothing")
        return self


class Optimizer(Block):
    lr: Positive
    momentum: Fraction
    nesterov: bool
    weight_decay: NotNegative
    muon_lr: NotNegative
    muon_weight_decay: NotNegative

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "Optimizer":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: true needs momentum > 0")
        if self.muon_weight_decay and not self.muon_lr:
            raise ValueError("muon_weight_decay is of no effect without muon_lr")
        return self


class Schedule(Block):
    warmup_epochs: Annotated[int, Field(ge=0)]
    shape: Literal["cosine", "step"]
    milestones: list[Count]
    factors: list[NotNegative]

    @model_validator(mode="after")
    def _steps_fit_the_shape(self) -> "Schedule":
        if len(self.milestones) != len(self.factors):
            raise ValueError(f"{len(self.milestones)} milestones and {len(self.factors)} factors")
        if (self.shape == "step") != bool(self.milestones):
            raise ValueError("milestones are given for shape: step, and for no other")
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones must rise: {self.milestones}")
        return self


class Resolution(Block):
    milestones: list[Count]
    scales: list[Annotated[float, Field(ge=0.125, le=1)]]  # the smallest images, digits, have 8 pixels

    @model_validator(mode="after")
    def _pairs(self) -> "Resolution":
        if len(self.milestones) != len(self.scales):
            raise ValueError(f"{len(self.milestones)} milestones and {len(self.scales)} scales")
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones must rise: {self.milestones}")
        return self


class Augmentation(Block):
    crop_padding: Annotated[int, Field(ge=0, le=64)]
    flip: bool
    policy: Literal["none", "autoaugment_cifar10", "randaugment", "trivialaugment"]
    color_jitter: list[NotNegative] = Field(min_length=4, max_length=4)
    rotation: Annotated[float, Field(ge=0, le=180)]
    cutout: Annotated[int, Field(ge=0, le=1024)]

    @model_validator(mode="after")
    def _hue_is_a_part_of_a_turn(self) -> "Augmentation":
        if self.color_jitter[3] > 0.5:
            raise ValueError(f"color_jitter: hue is {self.color_jitter[3]} turns, not in 0..0.5")
        return self


class Normalization(Block):
    mean: list[float] = Field(min_length=1)
    std: list[Positive] = Field(min_length=1)

    @model_validator(mode="after")
    def _same_channels(self) -> "Normalization":
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}")
        return self


class Network(Block):
    head: Literal["linear", "cosine"]
    scale: Positive

    @model_validator(mode="after")
    def _scale_fits_the_head(self) -> "Network":
        if self.head == "linear" and self.scale != 1:
            raise ValueError("a linear head has scale: 1")
        return self


class CifarNetwork(Network):
    depth: Annotated[int, Field(ge=8, le=1202)]  # He et al.'s deepest
    width: Annotated[int, Field(ge=4, le=1024, multiple_of=4)]
    shared_groups: Annotated[int, Field(ge=1, le=2)] = 1

    @model_validator(mode="after")
    def _depth(self) -> "CifarNetwork":
        if (self.depth - 2) % 6:
            raise ValueError(f"depth is 6n + 2 (8, 20, 32, 44, 56, ...), not {self.depth}")
        return self


class LargeNetwork(Network):
    architecture: Literal["resnet10", "resnet50", "resnet152", "resnext50_32x4d"]


class ChainNetwork(Network):
    """Of a chain on larger images."""

    architecture: Literal["resnet18", "resnet34", "resnet50"]


class FeatureNetwork(Network):
    hidden: Annotated[int, Field(ge=0)]
    standardize: bool


class TunedNetwork(Network):
    backbone: Name
    trained_groups: Count | Literal["all"]  # the last ones; each expert has them to itself
    pretrained_lr: Annotated[float, Field(gt=0, le=1)]  # times the recipe's: the step of all but the new head
    norm_statistics: Literal["frozen", "batch"]


class RandomWindow(Block):
    """The random part of an image that training shows, of images that are read as they are needed."""

    scale: list[Annotated[float, Field(gt=0, le=1)]] = Field(min_length=2, max_length=2)  # of the image's area
    ratio: list[Positive] = Field(min_length=2, max_length=2)  # width over height

    @model_validator(mode="after")
    def _ranges(self) -> "RandomWindow":
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} falls, from {low} to {high}")
        return self


class Recipe(Block):
    epochs: Count
    batch_size: Annotated[int, Field(ge=2, le=2**20)]
    drop_last: bool
    accumulate: Count
    optimizer: Optimizer
    schedule: Schedule
    weight_average: Annotated[float, Field(ge=0, lt=1)]
    sync_batch_norm: bool
    augmentation: Augmentation
    resolution: Resolution
    mixup_alpha: NotNegative
    cutmix_alpha: NotNegative
    normalization: Normalization
    network: Network
    precision: Literal["fp32", "bf16", "fp16"]
    test_every: Annotated[int, Field(ge=0)]
    gradients_every: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _schedule_fits(self) -> "Recipe":
        late = [step for step in [*self.schedule.milestones, *self.resolution.milestones] if step >= self.epochs]
        if self.schedule.warmup_epochs > self.epochs or late:
            raise ValueError(f"schedule goes on after the last of {self.epochs} epochs: {late or 'warmup_epochs'}")
        if self.schedule.warmup_epochs == self.epochs:
            raise ValueError(f"schedule.warmup_epochs takes all {self.epochs} epochs: nothing is left to train with")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate ({self.accumulate}) is above batch_size ({self.batch_size}): parts without images"
            )
        return self


class CifarRecipe(Recipe):
    network: CifarNetwork


class LargeRecipe(Recipe):
    network: LargeNetwork
    window: RandomWindow | None = None


class LargeChainRecipe(LargeRecipe):
    network: ChainNetwork  # type: ignore[assignment]


class TunedRecipe(Recipe):
    """A recipe that fine-tunes a backbone, whose weights say how images are normalised and scaled."""

    network: TunedNetwork
    normalization: None = None  # type: ignore[assignment]
    window: RandomWindow | None = None

    @model_validator(mode="after")
    def _what_the_backbone_decides(self) -> "TunedRecipe":
        changed = [key for key in ("weight_average", "sync_batch_norm") if getattr(self, key)]
        changed += ["resolution"] if self.resolution.milestones else []
        if changed:
            raise ValueError(f"a backbone that is fine-tuned (network.backbone) has none: {', '.join(changed)} is off")
        return self


class FeatureRecipe(Recipe):
    """A recipe for heads on frozen features: what only images have is left out."""

    network: FeatureNetwork

    @model_validator(mode="after")
    def _nothing_that_needs_images(self) -> "FeatureRecipe":
        off = {"crop_padding": 0, "flip": False, "policy": "none", "color_jitter": [0] * 4, "rotation": 0, "cutout": 0}
        changed = [f"augmentation.{key}" for key, value in off.items() if getattr(self.augmentation, key) != value]
        changed += [key for key in ("cutmix_alpha", "sync_batch_norm") if getattr(self, key)]
        changed += ["resolution"] if self.resolution.milestones else []
        changed += ["optimizer.muon_lr"] if self.optimizer.muon_lr else []
        changed += ["normalization"] if len(self.normalization.mean) != 1 else []
        if changed:
            raise ValueError(f"heads on features (network.hidden) have no images: {', '.join(changed)} must be off")
        return self


# What a recipe is for, by a key of its block `network`; without any of them, for images of CIFAR's size.
RECIPES: dict[str, type[Recipe]] = {"hidden": FeatureRecipe, "architecture": LargeRecipe, "backbone": TunedRecipe}


class Features(Block):
    dataset: Name
    backbone: Name


class Indexed(Block):
    index: Name
    backbone: Name
    share: Annotated[float, Field(gt=0, le=1)]
    exif_orientation: bool
    draft: bool
    broken: Literal["refuse", "leave_out"]


class Stream(Block):
    index: Name
    side: Annotated[int, Field(ge=8, le=4096)]
    share: Annotated[float, Field(gt=0, le=1)]
    exif_orientation: bool
    draft: bool
    broken: Literal["refuse", "leave_out"]
    stored: Annotated[int, Field(ge=0, le=8192)]

    @model_validator(mode="after")
    def _stored_images_are_no_smaller(self) -> "Stream":
        if self.stored and round(self.stored * self.share) < self.side:
            raise ValueError(
                f"stored: of images whose shorter side is {self.stored} the middle has "
                f"{round(self.stored * self.share)} pixels (share), fewer than side ({self.side}); 0 keeps none smaller"
            )
        return self


class Fuse(Block):
    fuse: list[Name] = Field(min_length=1)
    mirrored: bool = False  # whether it looks at mirror images, too

    @model_validator(mode="after")
    def _is_another_network(self) -> "Fuse":
        if len(self.fuse) == 1 and not self.mirrored:
            raise ValueError(f"fuse names {self.fuse[0]} alone, whose network it is already; or mirrored: true")
        if len(set(self.fuse)) < len(self.fuse):
            raise ValueError(f"fuse names a method twice: {', '.join(self.fuse)}")
        return self


class Evaluate(Block):
    ece_bins: Annotated[int, Field(ge=1, le=1000)]
    many_above: Annotated[int, Field(ge=0)]
    few_below: Annotated[int, Field(ge=0)]
    distribution_ratios: list[Annotated[int, Field(ge=2)]]
    distribution_draws: Annotated[int, Field(ge=1, le=1000)]

    @model_validator(mode="after")
    def _groups_are_apart(self) -> "Evaluate":
        if self.few_below > self.many_above + 1:
            raise ValueError(f"few_below ({self.few_below}) is above many_above ({self.many_above}): groups overlap")
        return self


class Fisher(Block):
    classes: Annotated[int, Field(ge=2)]
    imbalance_factor: Annotated[float, Field(ge=1)]
    many_images: Count
    few_images: list[Count] = Field(min_length=1)
    taus: list[Numbers] = Field(min_length=1)
    scales: list[Positive] = Field(min_length=1)
    mixup_alpha: Positive
    seeds: list[Seed] = Field(min_length=2)
    distribution_ratio: Annotated[int, Field(ge=2)]

    @model_validator(mode="after")
    def _the_smallest_class_has_images(self) -> "Fisher":
        if min(self.few_images) < self.imbalance_factor:
            raise ValueError(f"few_images is {self.few_images}: none for the smallest class")
        if self.many_images < 10 * self.imbalance_factor:  # experts have six numbers a class
            raise ValueError(f"many_images is {self.many_images}: fewer than 10 for the smallest class")
        if not any(abs(sum(taus) / len(taus) - 1) < 1e-9 for taus in self.taus):
            raise ValueError("taus: no set has the mean 1, which is what the balanced error needs")
        for key in ("few_images", "seeds"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"{key} names something twice: {getattr(self, key)}")
        return self


SECTIONS = (
    "plans", "sources", "datasets", "backbones", "features", "recipes", "methods", "align", "evaluate", "fisher",
)  # fmt: skip
OPTIONAL = ("incremental", "indexes", "indexed", "streams")


def signature_block(file: Path, function: str) -> type[Block]:
    """The schema of a block whose keys are the keyword-only arguments of a function in `file`.

    Read from the source rather than by importing it: checking params.yaml must not import torch. `function` is
    `name` or `Class.name`. The annotations are names of longtail.workflow.ranges or plain types.

    Raises ValueError, naming the file, where there is no such function or an argument says nothing of its values.
    """
    place = file.relative_to(LIBRARY.parents[1])
    body: list[ast.stmt] = ast.parse(file.read_text()).body
    for part in function.split("."):
        there = (item for item in body if isinstance(item, (ast.ClassDef, ast.FunctionDef)) and item.name == part)
        node = next(there, None)
        if node is None:
            raise ValueError(f"{place}: defines no {function}")
        body = node.body
    if not isinstance(node, ast.FunctionDef):
        raise ValueError(f"{place}: {function} is no function")
    if function.endswith(".__init__") and len(node.args.args) > 2:  # self, class_counts
        raise ValueError(
            f"{place}: {function} takes {node.args.args[2].arg!r} by place; the keys of a block come after a `*`"
        )
    fields: dict[str, Any] = {}
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if argument.annotation is None:
            raise ValueError(
                f"{place}: argument {argument.arg!r} of {function} has no annotation, which says what is allowed "
                "(longtail.workflow.ranges, or a plain type)"
            )
        kind = eval(ast.unparse(argument.annotation), dict(vars(ranges)))  # our own source, not input
        fields[argument.arg] = (kind, ... if default is None else ast.literal_eval(default))
    return create_model(function, __base__=Block, **fields)


def _choices(folder: str) -> list[str]:
    """Names of what lies in a folder of the library, one file or one package each."""
    return sorted(module.name for module in pkgutil.iter_modules([str(LIBRARY / folder)]))


def _describe(error: Any, where: str) -> str:
    parts = [str(part) for part in error["loc"] if part != "[key]"]
    key = ".".join([where, *(part if part.isprintable() else repr(part) for part in parts)]).strip(".")
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"{key}: missing"
    if kind == "extra_forbidden":
        return f"{key} = {_shown(error['input'])}: unknown key"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "string_pattern_mismatch":
        message = f"must match {context['pattern']}"
    message = message[0].lower() + message[1:]
    if isinstance(error["input"], dict):
        return f"{key}: {message}"
    return f"{key} = {_shown(error['input'])}: {message}"


def _shown(value: Any) -> str:
    shown = SHOWN.repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _validated(model: type[BaseModel], value: Any, where: str, problems: list[str]) -> Any:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        for item in error.errors():
            text = _describe(item, where)
            if item["type"] in ("extra_forbidden", "missing"):
                allowed = model
                for part in item["loc"][:-1]:
                    field = allowed.model_fields.get(str(part)) if issubclass(allowed, BaseModel) else None
                    kind = field.annotation if field is not None else None
                    if not (isinstance(kind, type) and issubclass(kind, Block)):
                        break
                    allowed = kind
                else:
                    text += f"; allowed: {', '.join(allowed.model_fields) or 'no key at all'}"
            problems.append(text)
    return None


class ParamsError(ValueError):
    """params.yaml is not what it has to be; the message names every key, its value and what is allowed."""


def validate(value: Any, file: str = "params.yaml") -> None:
    """Check the content of params.yaml.

    Raises ParamsError that lists every problem, a line each: `key = value: what is allowed`.
    """
    problems: list[str] = []
    if not isinstance(value, dict):
        raise ParamsError(f"{file}: expected a mapping with the keys {', '.join(SECTIONS)}")
    for key in sorted(map(str, value.keys() - {*SECTIONS, *OPTIONAL})):
        allowed = ", ".join([*SECTIONS, *OPTIONAL])
        problems.append(f"{key if key.isprintable() else repr(key)}: unknown key; allowed: {allowed}")
    for key in [section for section in SECTIONS if section not in value]:
        problems.append(f"{key}: missing")
    named: dict[str, type[Block]] = {
        "plans": Plan, "datasets": Dataset, "features": Features, "indexed": Indexed, "streams": Stream,
    }  # fmt: skip
    for section, model in named.items():
        for name, block in _section(value, section, problems).items():
            _validated(model, block, f"{section}.{name}", problems)
    for name, block in _section(value, "recipes", problems).items():
        network = block.get("network") if isinstance(block, dict) else None
        keys = network if isinstance(network, dict) else {}
        model = next((RECIPES[key] for key in RECIPES if key in keys), CifarRecipe)
        _validated(model, block, f"recipes.{name}", problems)
    singles: dict[str, type[Block]] = {"align": Align, "evaluate": Evaluate, "fisher": Fisher}
    for section, single in singles.items():
        if section in value:
            _validated(single, value[section], section, problems)
    for name, block in _section(value, "methods", problems).items():
        _check_method(name, block, problems)
    for name, block in _section(value, "backbones", problems).items():
        _check_settings("networks/backbones", "load", block, f"backbones.{name}", problems)
    for name, block in _section(value, "indexes", problems).items():
        _check_settings("data/large/index", "make", block, f"indexes.{name}", problems)
    for name, block in _section(value, "sources", problems).items():
        reader = block.get("reader") if isinstance(block, dict) else None
        if reader not in _choices(READERS):
            problems.append(f"sources.{name}.reader = {_shown(reader)}: must be one of {', '.join(_choices(READERS))}")
        else:
            settings = {key: item for key, item in block.items() if key != "reader"}
            _check_settings(f"{READERS}/{reader}", "read", settings, f"sources.{name}", problems)
    _check_names(value, problems)
    if "incremental" in value:
        _check_incremental(value, problems)
    if problems:
        raise ParamsError("\n".join(f"{file}: {problem}" for problem in problems))


class Later(Block):
    """What the steps after the first have in place of the first one's."""

    epochs: Count
    optimizer: Optimizer
    schedule: Schedule


class IncrementalRecipe(Block):
    first: CifarRecipe
    later: Later | None
    weight_decay_by_step: bool
    body: Literal["option_a", "preactivation"]
    bias: bool
    new_head: Literal["copied", "fresh"]
    positive_weights: bool

    @model_validator(mode="after")
    def _fits(self) -> "IncrementalRecipe":
        if self.first.weight_average:
            raise ValueError("first.weight_average must be 0: a step goes on from the network itself")
        if self.first.test_every or self.first.gradients_every:
            raise ValueError("first.test_every and gradients_every must be 0: a chain looks at test after each step")
        if self.first.network.head == "cosine" and not self.bias:
            raise ValueError("bias: false is of a linear head; a cosine head has none")
        if self.body == "preactivation" and self.first.network.shared_groups != 1:
            raise ValueError("first.network.shared_groups: with body: preactivation experts share the first alone")
        if self.body == "preactivation" and self.first.network.width < 8:  # oneDNN writes beyond its memory (NOTES.md)
            raise ValueError(f"first.network.width: {self.first.network.width}; with body: preactivation at least 8")
        if self.later is not None:
            changes = {"later.schedule": [*self.later.schedule.milestones, self.later.schedule.warmup_epochs],
                       "first.resolution": self.first.resolution.milestones}  # fmt: skip
            for name, steps in changes.items():
                if any(step >= self.later.epochs for step in steps):
                    raise ValueError(f"{name} goes on after the last of later's {self.later.epochs} epochs")
        return self


class LargeIncrementalRecipe(IncrementalRecipe):
    """A chain's recipe for images of `streams`."""

    first: LargeChainRecipe  # type: ignore[assignment]
    body: Literal["torchvision"]  # type: ignore[assignment]


def _check_incremental(value: dict[str, Any], problems: list[str]) -> None:
    """The section `incremental`: its blocks, and that every name in them has one."""
    section = value["incremental"]
    if not isinstance(section, dict) or set(section) != set(incremental.SECTIONS):
        problems.append(f"incremental: must be a mapping with the keys {', '.join(incremental.SECTIONS)}")
        return
    models: dict[str, type[BaseModel]] = {
        "plans": incremental.Plan, "orders": incremental.Order, "protocols": incremental.Protocol,
        "recipes": IncrementalRecipe, "trainings": incremental.Training,
    }  # fmt: skip
    for key, model in models.items():
        for name, block in _section(section, key, problems, "incremental.").items():
            of_files = key == "recipes" and _large(block)
            _validated(LargeIncrementalRecipe if of_files else model, block, f"incremental.{key}.{name}", problems)
    if _validated(incremental.Readouts, section["readouts"], "incremental.readouts", problems) is not None:
        settings = section["readouts"]["energy_aligning"]
        _validated(Align, settings, "incremental.readouts.energy_aligning", problems)
    trainings = section["trainings"] if isinstance(section["trainings"], dict) else {}
    for name, block in trainings.items():
        arguments = block.get("arguments") if isinstance(block, dict) else None
        if isinstance(arguments, dict) and block.get("loss") not in ("bce", None):
            settings = {"loss": block["loss"], **arguments}
            _check_method(f"{name} (incremental.trainings)", settings, problems)
    for plan, block in section["plans"].items() if isinstance(section["plans"], dict) else ():
        if plan in value.get("plans", {}):
            problems.append(f"incremental.plans.{plan}: there is a plan of this name under plans")
        for axis in incremental.AXES[:-1]:
            sets = {**_named(value, "datasets"), **_named(value, "streams")}
            there = sets if axis == "datasets" else section[axis]
            names = block.get(axis) if isinstance(block, dict) else None
            for name in names if isinstance(names, list) else []:
                if isinstance(there, dict) and isinstance(name, str) and name not in there:
                    known = ", ".join(map(str, there))
                    problems.append(f"incremental.plans.{plan}.{axis} = {name!r}: not in {axis}; there are {known}")
        _check_chains_of_files(value, plan, block, problems)
        _check_chains_end(section, plan, block, problems)


def _large(block: Any) -> bool:
    """Whether a recipe of chains names a network for larger images."""
    for key in ("first", "network"):
        block = block.get(key) if isinstance(block, dict) else None
    return isinstance(block, dict) and "architecture" in block


def _check_chains_of_files(value: dict[str, Any], plan: str, block: Any, problems: list[str]) -> None:
    """Chains on images that are read as they are needed have recipes for them; a plan has all such sets, or none."""
    datasets, recipes = (_names(block, axis) for axis in ("datasets", "recipes"))
    of_files = [name for name in datasets if name in _named(value, "streams")]
    if of_files and of_files != datasets:
        problems.append(
            f"incremental.plans.{plan}.datasets: {', '.join(of_files)} of `streams`, the others not; another plan "
            "takes those"
        )
    for name in recipes:
        recipe = _named(value["incremental"], "recipes").get(name)
        if recipe is None or _large(recipe) == bool(of_files):
            continue
        first = datasets[0] if datasets else "its data"
        if of_files:
            said = f"{first} is of `streams`, and the recipe {name} for small images; take one with first.network."
            said += "architecture"
        else:
            said = f"{first} is not of `streams`, and the recipe {name} names an architecture, which only those have"
        problems.append(f"incremental.plans.{plan}: {said}")


def _check_chains_end(section: dict[str, Any], plan: str, block: Any, problems: list[str]) -> None:
    """What a chain would find out after its first steps: hours later."""
    blocks = {axis: _named(section, axis) for axis in ("protocols", "recipes", "trainings")}
    protocols, recipes, trainings = (
        {name: blocks[axis][name] for name in _names(block, axis) if isinstance(blocks[axis].get(name), dict)}
        for axis in blocks
    )
    said = f"incremental.plans.{plan}: the training"
    for name, training in trainings.items():
        layer, start = training.get("teacher") == "bias_layer", training.get("start") == "teacher"
        every, needs = training.get("loss") not in ("ce", "bce"), f"{said} {name} has a loss that needs every class"
        if every and training.get("replay") is False:
            problems.append(f"{needs}, and replay: false; allowed are ce and bce")
        for other, protocol in protocols.items():
            if layer and protocol.get("held_out") == 0:
                problems.append(
                    f"{said} {name} fits its teacher on held-out memory, and the protocol {other} has held_out: 0"
                )
            if every and training.get("replay") is True and protocol.get("memory") == 0:
                problems.append(f"{needs}, and the protocol {other} has memory: 0; allowed are ce and bce")
        for other, recipe in recipes.items():
            network = _named(_named(recipe, "first"), "network")
            if start and network.get("head") == "cosine":
                problems.append(
                    f"{said} {name} starts from a corrected head, which a cosine head (recipe {other}) is not"
                )
            if start and layer and recipe.get("bias") is False:
                problems.append(f"{said} {name} starts from a corrected bias, and the recipe {other} has bias: false")


def _names(block: Any, axis: str) -> list[str]:
    """The names of a plan's axis; none where it is no list."""
    names = block.get(axis) if isinstance(block, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _named(value: dict[str, Any], section: str) -> dict[str, Any]:
    """A section's blocks; none where it is no mapping."""
    found = value.get(section)
    return found if isinstance(found, dict) else {}


KINDS = {"loss": ("losses", "Loss.__init__"), "refit": ("heads", "refit")}  # key: folder, function with the settings


def kind(method: str, block: Any) -> tuple[str, str]:
    """What a method is: (loss | refit | fuse, the name of its file; for fuse its own).

    A block says it with a key of that name (`loss: ldam`); else it is the file of its own name, a loss where there is
    none.
    """
    keys = block if isinstance(block, dict) else {}
    if "fuse" in keys:
        return "fuse", method
    for key in KINDS:
        if key in keys:
            return key, str(keys[key])
    return ("refit" if method in _choices("heads") else "loss"), method


def _check_method(method: str, block: Any, problems: list[str]) -> None:
    what, name = kind(method, block)
    if what == "fuse":
        _validated(Fuse, block, f"methods.{method}", problems)
        return
    folder, function = KINDS[what]
    if name not in _choices(folder):
        given = f"methods.{method}" + (f".{what} = {name!r}" if isinstance(block, dict) and what in block else "")
        there = ", ".join(_choices(folder))
        problems.append(f"{given}: no file src/longtail/{folder}/{name}.py; there are {there}")
        return
    settings = {key: item for key, item in block.items() if key != what} if isinstance(block, dict) else block
    _check_settings(f"{folder}/{name}", function, settings, f"methods.{method}", problems)


def _check_settings(name: str, function: str, settings: Any, where: str, problems: list[str]) -> None:
    """Hold the settings of a block against the arguments of the function that they are for, in a file or a package."""
    package, file = LIBRARY / name / "__init__.py", LIBRARY / f"{name}.py"
    try:
        schema = signature_block(package if package.exists() else file, function)
    except ValueError as error:
        problems.append(f"{where}: {error}")
    else:
        _validated(schema, settings, where, problems)


def _section(value: dict[str, Any], section: str, problems: list[str], inside: str = "") -> dict[str, Any]:
    """The named blocks of a section that have a usable name."""
    blocks = value.get(section, {})
    if not isinstance(blocks, dict) or (section in value and not blocks):
        problems.append(f"{inside}{section} = {_shown(blocks)}: must be a mapping of name to block")
        return {}
    pattern = PLAN_NAME if section == "plans" else NAME_PATTERN
    good = {}
    for name, block in blocks.items():
        if isinstance(name, str) and re.fullmatch(pattern, name) and len(name) <= ranges.LONGEST:
            good[name] = block
        else:
            shown = name if isinstance(name, str) and name.isprintable() else _shown(name)
            problems.append(
                f"{inside}{section}.{shown}: a name is lower-case letters and digits, parted by '_', at most "
                f"{ranges.LONGEST} characters"
            )
    return good


def _check_names(value: dict[str, Any], problems: list[str]) -> None:
    """Every name that a block refers to has a block."""

    def known(section: str) -> list[str]:
        blocks = value.get(section)
        return list(blocks) if isinstance(blocks, dict) else []

    def check(key: str, name: Any, section: str) -> None:
        if isinstance(name, str) and name not in known(section):
            problems.append(
                f"{key} = {_shown(name)}: not in {section}; there are {', '.join(map(str, known(section)))}"
            )

    for plan in known("plans"):
        block = value["plans"][plan]
        for axis in ("datasets", "recipes", "methods"):
            names = block.get(axis) if isinstance(block, dict) else None
            for name in names if isinstance(names, list) else []:
                if axis != "datasets" or name not in [*known("features"), *known("indexed"), *known("streams")]:
                    check(f"plans.{plan}.{axis}", name, axis)
    methods = value["methods"] if isinstance(value.get("methods"), dict) else {}
    for method, block in methods.items():
        experts = block.get("fuse") if isinstance(block, dict) else None
        for name in experts if isinstance(experts, list) else []:
            check(f"methods.{method}.fuse", name, "methods")
            if isinstance(name, str) and name in methods and (made := kind(name, methods[name])[0]) != "loss":
                is_ = "is fused itself" if made == "fuse" else "starts from another network itself"
                problems.append(f"methods.{method}.fuse = {name!r}: {is_}; allowed are methods that are trained")
    for plan in known("plans"):
        if isinstance(value["plans"][plan], dict):
            _check_kinds(plan, value["plans"][plan], methods, problems)
    for dataset in known("datasets"):
        block = value["datasets"][dataset]
        if isinstance(block, dict):
            check(f"datasets.{dataset}.source", block.get("source"), "sources")
    for name in known("features"):
        block = value["features"][name]
        if name in known("datasets"):
            problems.append(f"features.{name}: datasets has that name, too; a plan could mean either")
        if isinstance(block, dict):
            check(f"features.{name}.dataset", block.get("dataset"), "datasets")
            check(f"features.{name}.backbone", block.get("backbone"), "backbones")
    for name in known("indexed"):
        block = value["indexed"][name]
        if name in [*known("datasets"), *known("features")]:
            problems.append(f"indexed.{name}: datasets or features has that name, too; a plan could mean either")
        if isinstance(block, dict):
            check(f"indexed.{name}.index", block.get("index"), "indexes")
            check(f"indexed.{name}.backbone", block.get("backbone"), "backbones")
    for name in known("streams"):
        block = value["streams"][name]
        if name in [*known("datasets"), *known("features"), *known("indexed")]:
            problems.append(f"streams.{name}: another section has that name, too; a plan could mean either")
        if isinstance(block, dict):
            check(f"streams.{name}.index", block.get("index"), "indexes")
    for name in known("recipes"):
        if isinstance(value["recipes"][name], dict) and isinstance(value["recipes"][name].get("network"), dict):
            network = value["recipes"][name]["network"]
            check(f"recipes.{name}.network.backbone", network.get("backbone"), "backbones")
    _check_features(value, problems)


def of_features(value: dict[str, Any], dataset: str) -> bool:
    """Whether a data set has features in place of images: made by a backbone, or read as such."""
    block = value["datasets"].get(dataset, {})
    return (
        dataset in value["features"]
        or dataset in value.get("indexed", ())
        or value["sources"].get(block.get("source"), {}).get("reader") == EMBEDDINGS
    )


def _check_features(value: dict[str, Any], problems: list[str]) -> None:
    """A plan's recipes are for what its data sets have: features or images."""
    if problems:  # the blocks that follow are not what they should be
        return
    for plan, block in value["plans"].items():
        for section in ("indexed", "streams"):
            large = [dataset for dataset in block["datasets"] if dataset in value.get(section, ())]
            if large and large != block["datasets"]:
                problems.append(
                    f"plans.{plan}.datasets: {large[0]} is of `{section}`, others are not; give it a plan of its own"
                )
            if large and block.get("readings"):
                problems.append(
                    f"plans.{plan}.readings: {large[0]} is of `{section}`, whose logits are not kept to compare on"
                )
            reading = (block.get("align") or value["align"])["reading"]
            if large and reading not in READINGS_BY_ROW:
                problems.append(
                    f"plans.{plan}: {large[0]} is of `{section}`, whose logits come by blocks of rows, and "
                    f"align.reading = {reading!r} needs them all at once; allowed are {', '.join(READINGS_BY_ROW)}"
                )
        _check_stream(value, plan, block, problems)
        for dataset in block["datasets"]:
            for recipe in block["recipes"]:
                features = "hidden" in value["recipes"][recipe]["network"]
                if features != of_features(value, dataset):
                    has, takes = ("features", "images") if not features else ("images", "features (network.hidden)")
                    problems.append(f"plans.{plan}: {dataset} has {has}, and the recipe {recipe} takes {takes}")
        mirrored = [name for name in block.get("fuse", ()) if value["methods"][name].get("mirrored")]
        if mirrored and of_features(value, block["datasets"][0]):
            problems.append(f"plans.{plan}.fuse: {mirrored[0]} is mirrored, and features have no mirror image")
        tuned = [recipe for recipe in block["recipes"] if "backbone" in value["recipes"][recipe]["network"]]
        if tuned and tuned != block["recipes"]:
            problems.append(f"plans.{plan}.recipes: {', '.join(tuned)} fine-tune a backbone; all have to, or none")
        if tuned and block.get("fuse"):
            problems.append(f"plans.{plan}.fuse: networks that are fine-tuned cannot be fused; balpoe has experts")


def _check_stream(value: dict[str, Any], plan: str, block: dict[str, Any], problems: list[str]) -> None:
    """Images that are read as they are needed take recipes for large images, and nothing else has random windows."""
    streams = [dataset for dataset in block["datasets"] if dataset in value.get("streams", ())]
    for name in block["recipes"]:
        recipe = value["recipes"][name]
        if streams and not {"architecture", "backbone"} & recipe["network"].keys():
            problems.append(
                f"plans.{plan}: {streams[0]} is of `streams`, and the recipe {name} is for small images or features; "
                "take one with network.architecture or network.backbone"
            )
        if not streams and recipe.get("window"):
            problems.append(
                f"plans.{plan}: the recipe {name} has random windows (window), which only images of `streams` have"
            )
    if streams and block.get("fuse"):
        problems.append(f"plans.{plan}.fuse: networks on `streams` cannot be fused; balpoe has experts")


def _check_kinds(plan: str, block: dict[str, Any], methods: dict[str, Any], problems: list[str]) -> None:
    """The lists `trained`, `refit`, `fuse` of a plan are its methods of that kind; what they start from is there."""
    given = block.get("methods")
    chosen = [name for name in given if isinstance(name, str) and name in methods] if isinstance(given, list) else []
    kinds: dict[str, list[str]] = {"loss": [], "refit": [], "fuse": []}
    for name in chosen:
        kinds[kind(name, methods[name])[0]].append(name)
    needed = {*(["ce"] if kinds["refit"] else [])}
    for name in kinds["fuse"]:
        experts = methods[name]["fuse"]
        needed |= {expert for expert in experts if isinstance(expert, str)} if isinstance(experts, list) else set()
    all_trained = not kinds["refit"] and not kinds["fuse"]
    for key, expected in (("trained", kinds["loss"]), ("refit", kinds["refit"]), ("fuse", kinds["fuse"])):
        given = block.get(key, expected if all_trained or not expected else None)
        if given != expected:
            problems.append(
                f"plans.{plan}.{key} = {_shown(given)}: must be {expected}, the plan's methods of that kind"
            )
    if missing := sorted(needed - set(chosen)):
        problems.append(f"plans.{plan}.methods: lacks {', '.join(missing)}, which others of them start from")


def load(path: str | Path = "params.yaml") -> dict[str, Any]:
    """Read and check params.yaml; return its content.

    Raises ParamsError when it is missing, no YAML, has a key twice, or does not fit the schema.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        _check_depth(text)
        value = parsed(text)
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:  # a date without a day, a number of 5,000 digits
        raise ParamsError(f"{path}: not valid YAML: {error}") from error
    validate(value, str(path))
    found: dict[str, Any] = value
    return found


def parsed(text: str) -> Any:
    """The content of params.yaml's text, as DVC reads it: YAML 1.2, in which 5e-05 is a number."""
    return yaml.load(text, Loader=_UniqueKeys)


def _check_depth(text: str) -> None:
    """Raise ValueError for YAML that is nested deeper than params are: PyYAML ends Python with a segmentation fault."""
    depth = 0
    for event in yaml.parse(text, Loader=Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            line = event.start_mark.line + 1 if event.start_mark else "?"
            raise ValueError(f"nested {depth} deep in line {line}")


class _UniqueKeys(Loader):
    """YAML keeps the last of two equal keys without a word; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, type(None))):
                raise yaml.constructor.ConstructorError(None, None, f"no key: {_shown(key)}", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found
