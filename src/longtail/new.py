"""`longtail new`: look at somebody's images or embeddings, and write what a comparison on them needs.

It writes blocks into params.yaml (source, data set, features, plan), beside what is there, and the plan's pipeline
file; and says what it saw, what it chose, and how long the plan will take.
"""

import re
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from longtail.data import listing, long_tail, own, sources
from longtail.data.sources import embeddings, images
from longtail.evaluation.metrics import shot_groups
from longtail.workflow import files, pipeline
from longtail.workflow import params as schema

SIZES = (32, 64, 96, 128, 160, 224)  # sides that are proposed
LARGE = 128  # from this side on, the backbone's own resolution
BACKBONES = {"small": "efficientnet_lite0", "large": "efficientnet_lite0_224"}  # blocks of params.yaml
METHODS = ["ce", "balanced_softmax", "class_balanced_sampling", "ldam_drw", "gala", "balpoe", "crt", "lws"]
REFIT = ["crt", "lws"]
TUNE = "tune"  # the recipe of fine-tuning
SEEDS = [1, 2, 3]
SMALL = 2000  # training images below which the recipe has small batches
OF_IMAGES = "--broken is of images; these are features"
CELL_S = 8.0  # of a cell beside its steps: start, logits, corrections, measures; processor time of 24 small cells


@dataclass(frozen=True)
class Chosen:
    """What the caller may say in place of what is proposed."""

    name: str | None = None
    features: str | None = None
    broken: str | None = None
    duplicates: str | None = None
    size: int | None = None
    test_per_class: int | None = None
    tune: bool = False


@dataclass(frozen=True)
class Proposal:
    """Blocks for params.yaml, and the arrays that they would give.

    Attributes:
        source: the block under `sources`.
        backbone: the name of a block under `backbones`; None for embeddings.
        said: lines about what was seen.
    """

    name: str
    source: dict[str, Any]
    arrays: dict[str, np.ndarray]
    backbone: str | None
    said: list[str]


def new(where: str, chosen: Chosen, *, params_file: Path = Path("params.yaml")) -> list[str]:
    """Look at a folder or table, write params.yaml and the plan's pipeline file; returns lines to be shown.

    A source that is there with the same path gets its new `sha256`, and nothing else changes.

    Raises ValueError, with nothing written, for samples that cannot be used as they are, and a name that is taken.
    """
    params = schema.load(params_file)
    name = chosen.name or re.sub(r"[^a-z0-9]+", "_", Path(_whole(where)).stem.lower()).strip("_")
    if not re.fullmatch(schema.NAME_PATTERN, name):
        raise ValueError(f"--name {name!r}: lower-case letters and digits, parted by '_'")
    there = params["sources"].get(name)
    path = _whole(where)
    known: list[str] = []
    if there is not None:
        if path not in (there.get("path"), there.get("labels")):
            raise ValueError(f"sources.{name} is in params.yaml with other data; give this one a --name")
        asked = {"features": chosen.features and _whole(chosen.features), "size": chosen.size, "broken": chosen.broken,
                 "duplicates": chosen.duplicates, "test_per_class": chosen.test_per_class}  # fmt: skip
        if chosen.broken and there["reader"] == schema.EMBEDDINGS:
            raise ValueError(OF_IMAGES)
        for key, value in asked.items():
            if value is not None and value != there.get(key):
                known_as = f"sources.{name}.{key} is {there.get(key)!r} in params.yaml"
                raise ValueError(f"{known_as}, not {value!r}; change it there, or give this one a --name")
        sha256 = _again(there)
        changed = params_file.read_text().replace(there["sha256"], sha256)
        known = [f"sources.{name}: " + ("as it was" if sha256 == there["sha256"] else "samples changed: new sha256")]
        if plan_of(name, chosen) in params["plans"]:
            files.write_text(params_file, changed)
            return known
        found = _known(name, there | {"sha256": sha256}, params)
    else:
        changed = params_file.read_text()
        at = listing.place(path)
        table = chosen.features is not None or (at.suffix in listing.TABLES and "path" not in listing.table(at))
        if chosen.broken and table:
            raise ValueError(OF_IMAGES)
        found = _embeddings(name, path, chosen) if table else _images(name, path, chosen)
    if chosen.tune and found.backbone is None:
        raise ValueError("--tune: these are features; a backbone is fine-tuned on images")
    for section, key, block in blocks(found, params, tune=chosen.tune):
        if key not in params[section]:
            changed = inserted(changed, section, key, block)
        elif there is None or section == "plans":
            raise ValueError(f"{section}.{key} is in params.yaml already; give this one a --name")
    params, plan = schema.parsed(changed), plan_of(name, chosen)
    schema.validate(params)
    steps = pipeline.text(plan, params)
    files.write_text(params_file, changed)
    files.write_text(pipeline.file(plan), steps)
    if found.backbone and not chosen.tune:
        found.said.append(f"features are frozen in this plan; `longtail new {where} --tune` writes one of fine-tuning")
    return [
        *known, *found.said, *_counts(found.arrays, params["evaluate"]),
        *(_time_to_tune if chosen.tune else _time)(found, params),
        f"written: blocks {name} in params.yaml, and {pipeline.file(plan)}",
        f"next: longtail run {plan} --jobs 2",
    ]  # fmt: skip


def _whole(path: str) -> str:
    """A local path from the root on, so that a stage finds it wherever it runs; a URL as it is."""
    return path if listing.is_url(path) else str(Path(path).expanduser().resolve())


def plan_of(name: str, chosen: Chosen) -> str:
    """The plan's name: that of the data, or with fine-tuning another, so that both can be there."""
    return f"{name}_tuned" if chosen.tune else name


def _known(name: str, source: dict[str, Any], params: dict[str, Any]) -> Proposal:
    """The proposal whose source is in params.yaml already."""
    settings = {key: value for key, value in source.items() if key != "reader"}
    arrays = sources.load(source["reader"])("", **settings)
    of_features = params["features"].get(f"{name}_features", {}).get("backbone")
    backbone = of_features or BACKBONES["large" if source.get("size", 0) >= LARGE else "small"]
    return Proposal(name, source, arrays, None if source["reader"] == schema.EMBEDDINGS else backbone, [])


def _again(block: dict[str, Any]) -> str:
    """The SHA-256 of a source's samples as they are now."""
    if block["reader"] == schema.EMBEDDINGS:
        return embeddings.look(block["labels"], block.get("features"))[2]
    keys = ("path", "size", "channels", "fit", "exif_orientation")
    return images.look(**{key: block[key] for key in keys}).sha256


def blocks(found: Proposal, params: dict[str, Any], *, tune: bool = False) -> list[tuple[str, str, dict[str, Any]]]:
    """What goes into params.yaml: (section, name, block)."""
    data, recipe = found.name, "probe" if len(found.arrays["train_labels"]) >= SMALL else "probe_small"
    of_one = []
    if tune:
        recipe = TUNE
        if params["recipes"][TUNE]["network"]["backbone"] != found.backbone:  # the same with the other backbone
            recipe, whole = f"{found.name}_{TUNE}", params["recipes"][TUNE]
            of_one = [("recipes", recipe, whole | {"network": whole["network"] | {"backbone": found.backbone}})]
    elif found.backbone:
        data = f"{found.name}_features"
        of_one = [("features", data, {"dataset": found.name, "backbone": found.backbone})]
    plan = {
        "datasets": [data], "recipes": [recipe], "methods": METHODS,
        "trained": [method for method in METHODS if method not in REFIT], "refit": REFIT, "seeds": SEEDS,
    }  # fmt: skip
    return [
        ("plans", plan_of(found.name, Chosen(tune=tune)), plan),
        ("sources", found.name, found.source),
        ("datasets", found.name, {"source": found.name, "profile": "as_is", "seed": 0, "held_out": 0}),
        *of_one,
    ]


def inserted(text: str, section: str, name: str, block: dict[str, Any]) -> str:
    """The text of params.yaml with one more block in a section; all else, comments too, stays.

    It is written as `dvc exp run -S` would write it, so that an experiment changes its line and no other; and it goes
    before the section's last block, because DVC loses a comment that follows a list.
    """
    from dvc.utils.serialize import dumps_yaml

    lines = text.splitlines(keepends=True)
    place = lines.index(f"{section}:\n") + 1
    for n in range(place, len(lines)):
        if lines[n].strip() and not lines[n][0].isspace():
            break
        if re.match(r"  \w", lines[n]):
            place = n
    written = textwrap.indent(dumps_yaml({name: block}), "  ")
    return "".join([*lines[:place], written, *lines[place:]])


# ------------------------------------------------------------------------------------------------- looking


def _images(name: str, path: str, chosen: Chosen) -> Proposal:
    """Look at images: twice, since the proposed size follows from their own."""
    _, rows = listing.read(path)
    plain: dict[str, Any] = {"channels": 3, "fit": "crop", "exif_orientation": False}
    size, broken = chosen.size or _size(path, rows), chosen.broken or "refuse"
    with tqdm(total=len(rows), desc="looking", unit="file", disable=None) as bar:
        looked = images.look(path, size=size, **plain, on_file=bar.update)
    said = [
        f"{path}: {len(rows)} files, {len({row.label for row in rows})} classes",
        "kinds: " + ", ".join(f"{count} {kind}" for kind, count in images.kinds(looked.facts).most_common()),
        f"sides: {_range([min(fact.width, fact.height) for fact in looked.facts])} pixels (the shorter one); "
        f"proposed: size {size}",
    ]
    if looked.broken:
        said.append(f"no usable images: {len(looked.broken)}: {images.named(looked.broken)}")
        if broken == "refuse":
            raise ValueError(
                "\n".join([*said, "mend or remove them, or leave them out: longtail new ... --broken leave_out"])
            )
    rule = _rule(Counter(row.label for row in looked.rows), chosen)
    arrays, report = own.arrays(looked.rows, looked.pixels, **rule)
    said += _said(report)
    source = {"reader": "images", "path": path, "sha256": looked.sha256, "size": size, **plain, "broken": broken}
    backbone = BACKBONES["large" if size >= LARGE else "small"]
    return Proposal(name, source | rule, arrays, backbone, said)


def _size(path: str, rows: list[listing.Row]) -> int:
    """The largest of SIZES that half of the images (a few hundred of them) have; the smallest for smaller ones."""
    root, _ = listing.read(path)
    some = rows[:: max(1, len(rows) // 300)]
    sides = [side for row in some if (side := images.shorter_side(root / row.place))]
    fitting = [size for size in SIZES if sides and size <= np.median(sides)]
    return max(fitting, default=SIZES[0])


def _embeddings(name: str, path: str, chosen: Chosen) -> Proposal:
    features = _whole(chosen.features) if chosen.features else None
    rows, values, sha256 = embeddings.look(path, features)
    rule = _rule(Counter(row.label for row in rows), chosen)
    arrays, report = own.arrays(rows, values[:, None, None, :], **rule)
    said = [f"{path}: {len(rows)} rows of {values.shape[1]} features", *_said(report)]
    source = {"reader": schema.EMBEDDINGS, "labels": path, **({"features": features} if features else {})}
    return Proposal(name, source | {"sha256": sha256} | rule, arrays, None, said)


def _rule(sizes: Counter[str], chosen: Chosen) -> dict[str, Any]:
    """The proposed test split: 0.3 of the class in the middle, but 10 to 100 images; at most 0.3 of any class."""
    middle = int(np.median(list(sizes.values()))) if sizes else 0
    return {
        "duplicates": chosen.duplicates or "refuse", "min_per_class": 2,
        "test_per_class": chosen.test_per_class or min(100, max(10, round(0.3 * middle))), "test_share": 0.3, "seed": 0,
    }  # fmt: skip


def _said(report: dict[str, Any]) -> list[str]:
    said = [f"left out: class {name!r} with {count}" for name, count in report["classes_left_out"].items()]
    if copies := report.get("copies_kept_together"):
        said.append(f"copies: {copies}, kept in one split each")
    if between := report.get("copies_between_splits"):
        said.append(f"copies of test images in train: {len(between)}")
    return said


def _counts(arrays: dict[str, np.ndarray], evaluate: dict[str, Any]) -> list[str]:
    cut = long_tail.cut(arrays, profile="as_is", seed=0, held_out=0)
    train_C, test_C = (np.bincount(cut[f"{split}_labels"]) for split in ("train", "test"))
    thresholds = {key: evaluate[key] for key in ("many_above", "few_below")}
    groups = {name: int(mask.sum()) for name, mask in shot_groups(train_C, **thresholds).items()}
    lines = [
        f"train: {train_C.sum()} images, {_range(train_C)} a class, {train_C.max() / train_C.min():.0f} : 1; "
        f"largest {cut['class_names'][0]}, smallest {cut['class_names'][-1]}",
        f"test: {test_C.sum()} images, {_range(test_C)} a class",
        f"shots: {groups['many']} classes with many (> {evaluate['many_above']}), {groups['medium']} medium, "
        f"{groups['few']} few (< {evaluate['few_below']}); the block `evaluate` has these limits",
    ]
    if test_C.min() < 10:
        lines.append(
            f"{int((test_C < 10).sum())} classes have fewer than 10 test images: the accuracy of such a class says "
            "little; read the intervals"
        )
    return lines


def _range(values: Any) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low}" if low == high else f"{low} to {high}"


# ---------------------------------------------------------------------------------------------------- time


def _time(found: Proposal, params: dict[str, Any]) -> list[str]:
    """How long the plan will take here, from what a batch of features and a step take."""
    import torch  # a second, after all that can be wrong

    from longtail import networks
    from longtail.networks import backbones

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `longtail run --jobs 2` has on two cores
    images_ = len(found.arrays["train_labels"]) + len(found.arrays["test_labels"])
    width, features_s = found.arrays["train_images"].shape[-1], 0.0
    if found.backbone:
        made = backbones.load(**params["backbones"][found.backbone])
        batch = torch.zeros(32, 3, 8, 8, dtype=torch.uint8)
        with torch.inference_mode():
            width, each = made.features(batch).shape[1], _seconds(lambda: made.features(batch)) / 32
        features_s = images_ * each
    recipe = params["recipes"][params["plans"][found.name]["recipes"][0]]
    classes = len(found.arrays["class_names"])
    network = networks.build(channels=width, classes=classes, experts=1, **recipe["network"], **recipe["normalization"])
    x = torch.randn(recipe["batch_size"], width, 1, 1)
    step_s = _seconds(lambda: network(x).sum().backward())
    steps = recipe["epochs"] * (len(found.arrays["train_labels"]) // recipe["batch_size"])
    torch.set_num_threads(threads)
    cells = len(METHODS) * len(SEEDS)
    cells_s = cells * CELL_S + (cells - len(REFIT) * len(SEEDS)) * steps * step_s * 3  # with loss, optimiser, batches
    return [
        f"time, roughly: features {_minutes(features_s)}, {cells} cells {_minutes(cells_s)} one after the other, "
        f"{_minutes(cells_s / 2)} with two at a time"
    ]


def _time_to_tune(found: Proposal, params: dict[str, Any]) -> list[str]:
    """How long fine-tuning will take here, from a batch through the trunk and a few steps of what is trained."""
    import torch

    from longtail.finetuning import train
    from longtail.networks import tuned

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plan = params["plans"][plan_of(found.name, Chosen(tune=True))]
    recipe = params["recipes"][plan["recipes"][0]]
    network = {key: value for key, value in recipe["network"].items() if key not in ("backbone", "pretrained_lr")}
    channels, classes = found.arrays["train_images"].shape[-1], len(found.arrays["class_names"])
    whole = tuned.start(
        params["backbones"][recipe["network"]["backbone"]],
        channels=channels,
        classes=classes,
        experts=1,
        seed=0,
        **network,
    )
    size = found.arrays["train_images"].shape[1]
    images_ = torch.rand(recipe["batch_size"], channels, size, size)
    with torch.no_grad():
        trunk_s = _seconds(lambda: whole.before(images_), 3) / len(images_) if len(whole.trunk) else 0.0
    before, once = whole.before(images_), train.is_plain(recipe) and len(whole.trunk) > 0
    after: Any = whole.train().after
    step_s = _seconds(lambda: after(before).sum().backward(), 4)
    torch.set_num_threads(threads)
    of_train, of_test = (len(found.arrays[f"{split}_labels"]) for split in ("train", "test"))
    passes = recipe["epochs"] * sum(_experts(params["methods"][method]) for method in plan["trained"]) * len(SEEDS)
    looks = of_train * recipe["epochs"] * len(plan["trained"]) * len(SEEDS)  # at images, in training
    cells = len(plan["methods"]) * len(SEEDS)
    cells_s = cells * CELL_S + passes * (of_train // recipe["batch_size"]) * step_s + (0 if once else looks * trunk_s)
    return [
        f"time, roughly: frozen groups, once, {_minutes((of_train + of_test) * trunk_s)}; {cells} cells "
        f"{_minutes(cells_s)} one after the other, {_minutes(cells_s / 2)} with two at a time "
        f"({step_s:.2f} s a step of {len(images_)} images and one expert)"
    ]


def _experts(method: dict[str, Any]) -> int:
    """How many experts a method's block asks for: as many as its taus."""
    taus = method.get("taus", [0])
    return int(taus["count"]) if isinstance(taus, dict) else len(taus)


def _seconds(work: Any, runs: int = 8) -> float:
    """The shortest of some runs of `work`: what it takes where nothing else runs."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
